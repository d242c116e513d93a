"""CWD: each channel's map as a distribution over space."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from crosskd._checks import compute_dtype, require_floating, require_same_shape, shape_text

__all__ = ["cwd_loss"]


def cwd_loss(student_features: Tensor, teacher_features: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Divergence from where each of the teacher's channels is active to where the student's is.

    .. math::
        \frac{\tau^2}{C N} \sum_{n, c}
        \mathrm{KL}(\mathrm{softmax}(t_{nc} / \tau) \,\|\, \mathrm{softmax}(s_{nc} / \tau))

    where the softmax of a channel is over all of its locations.

    Args:
        student_features: shape (batch, channels, \*space).
        teacher_features: shape (batch, channels, \*space), a constant.
        temperature: spreads both distributions over more locations; above 0.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that differ or have no space, a temperature that is not above 0.
        TypeError: features that are not floating point.

    References:
        Channel-wise Knowledge Distillation for Dense Prediction (Shu et al., ICCV 2021).

    Example:
        >>> import torch
        >>> features = torch.randn(2, 3, 4, 4)
        >>> bool(cwd_loss(features, features + 5) < 1e-6)  # an offset doesn't matter
        True
    """
    require_floating(student_features=student_features, teacher_features=teacher_features)
    require_same_shape(student_features=student_features, teacher_features=teacher_features)
    if student_features.ndim < 3:
        raise ValueError(
            f"features must have shape (batch, channels, *space), got {shape_text(student_features)}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    dtype = compute_dtype(student_features, teacher_features)
    student, teacher = (
        F.log_softmax(features.to(dtype).flatten(2) / temperature, dim=-1)
        for features in (student_features, teacher_features.detach())
    )
    divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
    channels = student.shape[0] * student.shape[1]
    return divergence * temperature**2 / max(channels, 1)
