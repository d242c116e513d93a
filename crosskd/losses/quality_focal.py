"""Quality focal loss of classes with a sigmoid each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crosskd._checks import compute_dtype
from crosskd.losses._rows import check_beta, check_logits, has_kernel, is_followed, power, weighted

__all__ = ["quality_focal_loss"]

# How many numbers the quality focal loss works on at a time: on a CPU as many a thread as fit its cache,
# on a GPU enough to keep the number of kernel launches low. A few temporary tensors of this size are
# alive at once, so it is also kept to a small part of the logits.
_CHUNK_CPU = 2**16
_CHUNK_ACCELERATOR = 2**22
_CHUNKS_AT_LEAST = 32


def _quality_focal_value(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """|sigmoid(s) - sigmoid(t)|^beta * BCE(s, sigmoid(t)), elementwise."""
    target = teacher.sigmoid()
    loss = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    if beta == 0:
        return loss
    return loss * power((student.sigmoid() - target).abs(), beta)


def _quality_focal_derivative(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The derivative of `_quality_focal_value` by the student's logits, elementwise."""
    probability, target = student.sigmoid(), teacher.sigmoid()
    difference = probability - target
    if beta == 0:
        return difference
    # Cross entropy as softplus(s) - s * target: two passes over the numbers instead of four. For a large
    # s it cancels, but the sigmoid's slope that multiplies it is smaller still.
    cross_entropy = torch.addcmul(F.softplus(student, threshold=50), student, target, value=-1)
    slope = torch.addcmul(probability, probability, probability, value=-1) * cross_entropy
    if beta == 1:
        return torch.addcmul(slope, difference, difference) * difference.sign()
    distance = difference.abs()
    slope = slope * difference.sign()
    return power(distance, beta) * difference + beta * power(distance, beta - 1) * slope


def _chunk_size(logits: Tensor) -> int:
    """How many numbers to work on at a time."""
    largest = _CHUNK_CPU * torch.get_num_threads() if logits.device.type == "cpu" else _CHUNK_ACCELERATOR
    return min(largest, max(logits.numel() // _CHUNKS_AT_LEAST, _CHUNK_CPU))


def _row_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields matching (rows, K) pieces of tensors of one shape (..., K), without copying them."""
    first = tensors[0]
    if first.numel() == 0:
        return
    if first.ndim != 2:
        try:
            tensors = tuple(tensor.view(-1, first.shape[-1]) for tensor in tensors)
        except RuntimeError:
            # Not viewable as rows: copying it would cost the memory that chunks are there to save.
            for pieces in zip(*(tensor.unbind(0) for tensor in tensors), strict=True):
                yield from _row_chunks(*pieces)
            return
    rows = max(1, _chunk_size(first) // first.shape[-1])
    yield from zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


class _QualityFocalRows(torch.autograd.Function):
    """Quality focal loss summed over the last dimension: on a GPU one kernel, elsewhere in chunks.

    The plain composition of operators keeps about five tensors of the logits' size for its backward.
    This one keeps none, and its backward makes one, the gradient itself.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, beta: float) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.beta = beta
        if has_kernel(student, teacher):
            from crosskd.losses._kernels import quality_focal_rows

            return quality_focal_rows(student, teacher, beta)
        dtype = compute_dtype(student, teacher)
        rows = [
            _quality_focal_value(s.to(dtype), t.to(dtype), beta).sum(-1)
            for s, t in _row_chunks(student, teacher)
        ]
        shape = student.shape[:-1]
        if not rows:
            return torch.zeros(shape, dtype=dtype, device=student.device)
        return torch.cat(rows).reshape(shape)

    @staticmethod
    def backward(ctx: Any, *row_gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (row_gradient,) = row_gradients
        student, teacher = ctx.saved_tensors
        dtype = row_gradient.dtype
        if torch.is_grad_enabled():
            # create_graph=True: the same formula in one piece, so that autograd can differentiate it.
            derivative = _quality_focal_derivative(student.to(dtype), teacher.to(dtype), ctx.beta)
            return (derivative * row_gradient.unsqueeze(-1)).to(student.dtype), None, None
        if has_kernel(student, teacher):
            from crosskd.losses._kernels import quality_focal_gradient

            return quality_focal_gradient(student, teacher, row_gradient, ctx.beta), None, None
        gradient = torch.empty_like(student)
        expanded = row_gradient.unsqueeze(-1).expand(student.shape)
        for s, t, g, out in _row_chunks(student, teacher, expanded, gradient):
            out.copy_(_quality_focal_derivative(s.to(dtype), t.to(dtype), ctx.beta).mul_(g))
        return gradient, None, None


def quality_focal_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    r"""Quality focal loss of the student's logits against the teacher's probabilities.

    .. math::
        \frac{1}{Z} \sum_i w_i \sum_k |\sigma(s_{ik}) - \sigma(t_{ik})|^\beta \;
        \mathrm{BCE}(s_{ik}, \sigma(t_{ik}))

    Forward and backward keep at most one tensor of the logits' size beside the two inputs, so that
    100,000 anchors of 80 classes fit. It can be differentiated twice.

    Args:
        student_logits: shape (..., classes), before the sigmoid.
        teacher_logits: shape (..., classes), a constant.
        beta: how strongly rows where the two already agree are damped; 0 or more. With 0 this is
            binary cross entropy against the teacher's probabilities.
        weight: one number per row, shape (...).
        normalizer: what the weighted sum is divided by; the number of rows without it.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that differ, a weight that is not one number per row, ``beta`` below 0, a
            normalizer that is not above 0.
        TypeError: logits that are not floating point.

    References:
        Generalized Focal Loss (Li et al., NeurIPS 2020), equation 5, with the teacher's probability
        as the quality; CrossKD (Wang et al., CVPR 2024), section 3.3.

    Example:
        >>> student = torch.zeros(2, 3, requires_grad=True)
        >>> loss = quality_focal_loss(student, torch.ones(2, 3))
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.4805, torch.Size([2, 3]))
    """
    check_logits(student_logits, teacher_logits)
    check_beta(beta)
    teacher_logits = teacher_logits.detach()
    # The compiler fuses the plain composition by itself and chooses what to keep for backward; what
    # torch.func and torch.jit.trace transform are operators.
    if is_followed():
        dtype = compute_dtype(student_logits, teacher_logits)
        value = _quality_focal_value(student_logits.to(dtype), teacher_logits.to(dtype), beta)
        return weighted(value.sum(-1), weight, normalizer)
    rows = _QualityFocalRows.apply(student_logits, teacher_logits, beta)
    return weighted(rows, weight, normalizer)
