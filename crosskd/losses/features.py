"""Losses of feature maps against feature maps."""

from __future__ import annotations

from torch import Tensor

from crosskd._checks import compute_dtype, require_floating, require_same_shape
from crosskd.align import feature_statistics
from crosskd.losses._rows import weighted

__all__ = ["pkd_loss"]


def pkd_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Half the mean squared difference of features normalised per channel.

    .. math::
        \frac{1}{M} \sum \tfrac{1}{2} (\mathrm{norm}(s) - \mathrm{norm}(t))^2

    over all M elements, where norm takes away each channel's mean over batch and space and divides by
    its standard deviation (unbiased, 1e-6 added).

    Args:
        student_features: shape (batch, channels, \*space).
        teacher_features: shape (batch, channels, \*space), a constant.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that differ, less than two dimensions, no element.
        TypeError: features that are not floating point.

    References:
        PKD (Cao et al., NeurIPS 2022), equation 3.

    Example:
        >>> import torch
        >>> features = torch.randn(2, 3, 4, 4)
        >>> bool(pkd_loss(features, 5 * features + 1) < 1e-6)  # scale and offset don't matter
        True
    """
    require_floating(student_features=student_features, teacher_features=teacher_features)
    require_same_shape(student_features=student_features, teacher_features=teacher_features)
    dtype = compute_dtype(student_features, teacher_features)
    student, teacher = student_features.to(dtype), teacher_features.detach().to(dtype)
    difference = feature_statistics(student).normalize(student) - feature_statistics(teacher).normalize(
        teacher
    )
    return weighted(difference.square() / 2, None, None)
