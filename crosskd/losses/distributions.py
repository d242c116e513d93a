"""Divergence of distributions over bins."""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from crosskd._checks import compute_dtype
from crosskd.losses._rows import check_logits, weighted

__all__ = ["distribution_kl_loss"]


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
    dtype = compute_dtype(student_logits, teacher_logits)
    student = F.log_softmax(student_logits.to(dtype) / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().to(dtype) / temperature, dim=-1)
    bins = F.kl_div(student, teacher, reduction="none", log_target=True)
    bins = bins.masked_fill(teacher.isneginf(), 0.0)  # a bin that the teacher rules out adds nothing
    rows = bins.sum(-1) if over_bins == "sum" else bins.mean(-1)
    return weighted(rows * temperature**2, weight, normalizer)
