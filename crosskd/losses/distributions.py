"""Divergence of distributions over bins."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from crosskd._checks import compute_dtype
from crosskd.losses._rows import check_logits, has_kernel, is_followed, weighted

__all__ = ["distribution_kl_loss"]


class _DistributionRows(torch.autograd.Function):
    """The divergence of each row by one kernel of a GPU, and its gradient by another."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        from crosskd.losses._kernels import distribution_kl_rows

        ctx.save_for_backward(student, teacher)
        ctx.temperature = temperature
        return distribution_kl_rows(student, teacher, temperature)

    @staticmethod
    def backward(ctx: Any, *row_gradients: Tensor) -> tuple[Tensor | None, None, None]:
        from crosskd.losses._kernels import distribution_kl_gradient

        (row_gradient,), (student, teacher) = row_gradients, ctx.saved_tensors
        if torch.is_grad_enabled():
            # create_graph=True: the same formula in operators, so that autograd can differentiate it.
            own, other = (F.softmax(side.float() / ctx.temperature, dim=-1) for side in (student, teacher))
            gradient = (own - other) * row_gradient.unsqueeze(-1) / ctx.temperature
            return gradient.to(student.dtype), None, None
        return distribution_kl_gradient(student, teacher, row_gradient, ctx.temperature), None, None


def _rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The divergence of each row, shape (...)."""
    if has_kernel(student, teacher) and not is_followed():
        rows: Tensor = _DistributionRows.apply(student, teacher, temperature)
        return rows
    dtype = compute_dtype(student, teacher)
    own = F.log_softmax(student.to(dtype) / temperature, dim=-1)
    other = F.log_softmax(teacher.to(dtype) / temperature, dim=-1)
    bins = F.kl_div(own, other, reduction="none", log_target=True)
    return bins.masked_fill(other.isneginf(), 0.0).sum(-1)  # a bin that the teacher rules out adds nothing


def distribution_kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    over_bins: Literal["sum", "mean"] = "sum",
) -> Tensor:
    r"""Kullback-Leibler divergence from the teacher's distribution over bins to the student's.

    .. math::
        \frac{1}{Z} \sum_i w_i \, T^2 \,
        \mathrm{KL}(\mathrm{softmax}(t_i / T) \,\|\, \mathrm{softmax}(s_i / T))

    Used for detectors that predict each side of a box as a distribution (GFL): one row a side.

    Args:
        student_logits: shape (..., bins), before the softmax.
        teacher_logits: shape (..., bins), a constant.
        temperature: softens both distributions; above 0.
        weight: one number per row, shape (...).
        normalizer: what the weighted sum is divided by; the number of rows without it.
        over_bins: ``"sum"`` is the divergence itself, ``"mean"`` that over the number of bins, as in LD.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that differ, a weight that is not one number per row, a temperature or a
            normalizer that is not above 0, another ``over_bins`` than these.
        TypeError: logits that are not floating point.

    References:
        Localization Distillation (Zheng et al., CVPR 2022), equation 3; CrossKD, section 3.3.

    Example:
        >>> import torch
        >>> student = torch.zeros(1, 4, 17, requires_grad=True)
        >>> loss = distribution_kl_loss(student, torch.randn(1, 4, 17))
        >>> loss.backward()
        >>> bool(loss > 0)
        True
    """
    check_logits(student_logits, teacher_logits)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0, got {temperature}: choose a finite number")
    if over_bins not in ("sum", "mean"):
        raise ValueError(f'over_bins must be "sum" or "mean", got {over_bins!r}')
    rows = _rows(student_logits, teacher_logits.detach(), temperature) * temperature**2
    return weighted(rows if over_bins == "sum" else rows / student_logits.shape[-1], weight, normalizer)
