"""Quality focal loss of classes that share a softmax."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from crosskd._checks import compute_dtype
from crosskd.losses._rows import check_beta, check_logits, power, weighted

__all__ = ["softmax_focal_loss"]


def softmax_focal_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    r"""Quality focal loss for classes that share a softmax, one of them the background.

    With :math:`p` the student's and :math:`q` the teacher's probabilities,

    .. math::
        \frac{1}{Z} \sum_i w_i \Big( \tfrac{1}{2} \sum_k |p_{ik} - q_{ik}| \Big)^\beta \;
        \Big( - \sum_k q_{ik} \log p_{ik} \Big)

    The distance in front is the total variation, which for two classes is the difference of their
    probabilities: for those this is `quality_focal_loss` of the difference of the two logits.

    Args:
        student_logits: shape (..., classes), before the softmax.
        teacher_logits: shape (..., classes), a constant.
        beta: how strongly rows where the two already agree are damped; 0 or more. With 0 this is
            cross entropy against the teacher's probabilities.
        weight: one number per row, shape (...).
        normalizer: what the weighted sum is divided by; the number of rows without it.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that differ, a weight that is not one number per row, ``beta`` below 0, a
            normalizer that is not above 0.
        TypeError: logits that are not floating point.

    References:
        Ours: Generalized Focal Loss (Li et al., NeurIPS 2020), equation 5, for several classes at once.

    Example:
        >>> import torch
        >>> student = torch.zeros(2, 3, requires_grad=True)
        >>> loss = softmax_focal_loss(student, torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.3468, torch.Size([2, 3]))
    """
    check_logits(student_logits, teacher_logits)
    check_beta(beta)
    dtype = compute_dtype(student_logits, teacher_logits)
    student = F.log_softmax(student_logits.to(dtype), dim=-1)
    # By the same operators as the student's: where the two agree they are the same to the last bit, and the
    # distance's slope, which is 1 however small the distance, counts as 0.
    teacher = F.log_softmax(teacher_logits.detach().to(dtype), dim=-1).exp()
    rows = -(teacher * student).sum(-1)
    if beta != 0:  # with 0 rows count in full even where the two agree
        rows = power(0.5 * (student.exp() - teacher).abs().sum(-1), beta) * rows
    return weighted(rows, weight, normalizer)
