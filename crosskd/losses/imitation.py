"""Squared error of feature maps, which may count most where the teacher's map is active."""

from __future__ import annotations

import torch
from torch import Tensor

from crosskd._checks import compute_dtype, require_floating, require_same_shape, shape_text
from crosskd.losses._rows import weighted

__all__ = ["imitation_loss"]


def imitation_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    active_above: float | None = None,
    inactive_weight: float = 0.05,
) -> Tensor:
    r"""Mean squared difference of features, weighted by where the teacher's are active.

    .. math::
        \frac{1}{M} \sum_{n, c, x} w_{nx} \, (s_{ncx} - t_{ncx})^2

    over all M elements. A location's magnitude is its mean absolute value over the channels;
    :math:`w_{nx}` is 1 where the magnitude of the teacher's features is above ``active_above`` times the
    largest of the image, and ``inactive_weight`` elsewhere. Without ``active_above`` it is 1 everywhere.

    Args:
        student_features: shape (batch, channels, \*space).
        teacher_features: shape (batch, channels, \*space), a constant.
        active_above: the share of the image's largest magnitude, from 0 to below 1; 0 for whatever is not
            zero, as in a map that is empty where there is nothing to see.
        inactive_weight: weight of the other locations, 0 to 1.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that differ or have no channels, a share or weight that is out of range.
        TypeError: features that are not floating point.

    References:
        Cross-Modality Knowledge Distillation Network for Monocular 3D Object Detection (Hong et al., ECCV
        2022); that a whole location is active or not, and the share, are ours.

    Example:
        >>> teacher = torch.tensor([[[[0.0, 2.0]]]])
        >>> imitation_loss(teacher + 1, teacher).item()
        1.0
        >>> round(imitation_loss(teacher + 1, teacher, active_above=0.0).item(), 4)  # (0.05 + 1) / 2
        0.525
    """
    require_floating(student_features=student_features, teacher_features=teacher_features)
    require_same_shape(student_features=student_features, teacher_features=teacher_features)
    if student_features.ndim < 2:
        raise ValueError(
            f"features must have shape (batch, channels, *space), got {shape_text(student_features)}"
        )
    check_active(active_above, inactive_weight)
    dtype = compute_dtype(student_features, teacher_features)
    student, teacher = student_features.to(dtype), teacher_features.detach().to(dtype)
    rows = (student - teacher).square().mean(dim=1)  # (batch, *space)
    if active_above is None:
        return weighted(rows, None, None)
    magnitude = teacher.abs().mean(dim=1)
    largest = magnitude[:, None].flatten(1).amax(dim=1).reshape(-1, *[1] * (magnitude.ndim - 1))
    active = magnitude > active_above * largest
    return weighted(rows, torch.where(active, 1.0, inactive_weight), None)


def check_active(active_above: float | None, inactive_weight: float) -> None:
    if active_above is not None and not 0 <= active_above < 1:
        raise ValueError(f"active_above must be 0 to below 1, or None for all alike, got {active_above}")
    if not 0 <= inactive_weight <= 1:
        raise ValueError(f"inactive_weight must be 0 to 1, got {inactive_weight}")
