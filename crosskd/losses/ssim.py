"""SSIM: how alike two feature maps look around each location."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crosskd._checks import compute_dtype, require_floating, require_same_shape, shape_text
from crosskd.align import EPSILON

__all__ = ["MinMax", "min_max_scaled", "ssim_loss", "ssim_map"]

MinMax = Literal["channel", "batch", "map", "all"]
"""What has one minimum and maximum: a channel of an image, a channel of all images, an image's whole map, or
all images' maps together."""

_DIMENSIONS: dict[str, tuple[int, ...]] = {
    "channel": (2, 3),
    "batch": (0, 2, 3),
    "map": (1, 2, 3),
    "all": (0, 1, 2, 3),
}
# (0.01 L)^2 and (0.03 L)^2 for values from 0 to L = 1.
_C1, _C2 = 0.01**2, 0.03**2


def ssim_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    window_size: int = 11,
    sigma: float = 1.5,
    minmax: MinMax | None = None,
) -> Tensor:
    r"""Half of what is missing to a structural similarity of 1, averaged over channels and locations.

    .. math::
        \frac{1}{M} \sum \tfrac{1}{2} \bigl(1 - \mathrm{SSIM}(s, t)\bigr)

    over all M elements, with the SSIM of `ssim_map`. Beside the two maps themselves nothing of their size is
    kept for the gradient: the windows' means and variances are calculated again on the way back.

    Args:
        student_features: shape (batch, channels, height, width), values from 0 to 1, or any with ``minmax``.
        teacher_features: of the same shape, a constant.
        window_size: side of the window in cells, odd.
        sigma: the window's standard deviation in cells, above 0.
        minmax: scales either side by `min_max_scaled` first; not at all unless given.

    Returns:
        A scalar from 0 to 1, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that differ or are no maps, a window that is even or below 1, a sigma that is not
            above 0, an unknown ``minmax``.
        TypeError: features that are not floating point.

    References:
        Structural Knowledge Distillation for Object Detection (de Rijk et al., NeurIPS 2022).

    Example:
        >>> features = torch.rand(1, 3, 8, 8)
        >>> bool(ssim_loss(features, features) < 1e-6)
        True
        >>> bool(ssim_loss(5 * features + 1, features, minmax="channel") < 1e-2)  # the scale doesn't matter
        True
    """
    _check_maps(student_features, teacher_features)
    check_window(window_size, sigma)
    if minmax is not None:
        check_minmax(minmax)
    loss: Tensor = checkpoint(
        _dissimilarity,
        student_features,
        teacher_features.detach(),
        _windows(student_features, teacher_features, window_size, sigma),
        minmax,
        use_reentrant=False,
        preserve_rng_state=False,
    )
    return loss


def _dissimilarity(
    student: Tensor, teacher: Tensor, windows: tuple[Tensor, Tensor], minmax: MinMax | None
) -> Tensor:
    if minmax is not None:
        student, teacher = min_max_scaled(student, minmax), min_max_scaled(teacher, minmax)
    similarity = _similarity(student, teacher, windows)
    return (1 - similarity).sum() / (2 * max(similarity.numel(), 1))


def ssim_map(student_features: Tensor, teacher_features: Tensor, *, window_size: int, sigma: float) -> Tensor:
    r"""The structural similarity of two maps around each location, channel by channel.

    .. math::
        \frac{(2 \mu_s \mu_t + C_1) (2 \sigma_{st} + C_2)}
        {(\mu_s^2 + \mu_t^2 + C_1) (\sigma_s^2 + \sigma_t^2 + C_2)}
        \qquad C_1 = 0.01^2, \; C_2 = 0.03^2

    Means, variances and the covariance are weighted by a Gaussian window. Beyond its border a map is
    mirrored, the outermost cells not repeated, as kornia does; a map smaller than the window is mirrored over
    and over. Of a single cell only its value is left to compare.

    Args:
        student_features: shape (batch, channels, height, width), values from 0 to 1.
        teacher_features: of the same shape.
        window_size: side of the window in cells, odd.
        sigma: the window's standard deviation in cells, above 0.

    Returns:
        Values from -1 to 1 in the shape of the maps, float32 (float64 for float64 inputs).

    Raises:
        ValueError: as `ssim_loss`.
        TypeError: features that are not floating point.

    References:
        Image Quality Assessment: From Error Visibility to Structural Similarity (Wang et al., 2004), equation
        13. How the border is treated is ours.

    Example:
        >>> checks = (torch.arange(64.0).reshape(1, 1, 8, 8) + torch.arange(8.0)[:, None]) % 2
        >>> bool((ssim_map(checks, 1 - checks, window_size=11, sigma=1.5) < -0.9).all())
        True
    """
    _check_maps(student_features, teacher_features)
    check_window(window_size, sigma)
    windows = _windows(student_features, teacher_features, window_size, sigma)
    return _similarity(student_features, teacher_features, windows)


def _similarity(student: Tensor, teacher: Tensor, windows: tuple[Tensor, Tensor]) -> Tensor:
    rows, columns = windows
    student, teacher = student.to(rows.dtype), teacher.to(rows.dtype)

    def windowed(features: Tensor) -> Tensor:
        """The weighted mean of the window around each location."""
        across = F.linear(features, columns)
        return F.linear(across.transpose(2, 3), rows).transpose(2, 3)

    with torch.autocast(student.device.type, enabled=False):
        student_mean, teacher_mean = windowed(student), windowed(teacher)
        product = student_mean * teacher_mean
        squares = student_mean.square() + teacher_mean.square()
        covariance = windowed(student * teacher) - product
        variances = windowed(student.square() + teacher.square()) - squares  # of both, for they are added
        luminance = (2 * product + _C1) / (squares + _C1)
        return luminance * (2 * covariance + _C2) / (variances + _C2)


def _windows(student: Tensor, teacher: Tensor, window_size: int, sigma: float) -> tuple[Tensor, Tensor]:
    """The weights of rows and of columns, in the type to calculate in."""
    like = student.new_empty((), dtype=compute_dtype(student, teacher))
    height, width = student.shape[2:]
    return _window(height, window_size, sigma, like), _window(width, window_size, sigma, like)


def _window(length: int, window_size: int, sigma: float, like: Tensor) -> Tensor:
    """Each cell's weights (length, length) for the cells of one axis, which is mirrored at its ends."""
    offsets = torch.arange(window_size, device=like.device) - window_size // 2
    gaussian = torch.exp(-0.5 * (offsets.to(like.dtype) / sigma).square())
    gaussian = gaussian / gaussian.sum()
    places = torch.arange(length, device=like.device)[:, None] + offsets
    period = max(2 * (length - 1), 1)
    places = places.remainder(period)
    places = torch.where(places < length, places, period - places)
    weights = gaussian.new_zeros(length, length)
    return weights.scatter_add(1, places, gaussian.expand(length, -1))


def min_max_scaled(features: Tensor, minmax: MinMax) -> Tensor:
    """Features from 0, their minimum, to 1, their maximum.

    The gradient passes through minimum and maximum, so it is that of a loss which scale and offset of the
    features don't change. Where all values are equal, as those of a channel of a single location are, they
    become 0 without a gradient.

    Args:
        features: shape (batch, channels, height, width).
        minmax: what has one minimum and maximum: ``"channel"``, each channel of each image; ``"batch"``, each
            channel of all images; ``"map"``, all channels of each image; ``"all"``, everything.

    Returns:
        Of the same shape, float32 (float64 for float64 features).

    Raises:
        ValueError: no maps, or an unknown ``minmax``.
        TypeError: features that are not floating point.

    Example:
        >>> min_max_scaled(torch.tensor([[[[2.0, 4.0, 6.0]]]]), "channel")
        tensor([[[[0.0000, 0.5000, 1.0000]]]])
    """
    require_floating(features=features)
    check_minmax(minmax)
    features = features.to(compute_dtype(features))
    if features.numel() == 0:
        return features
    dimensions = _DIMENSIONS[minmax]
    low = features.amin(dimensions, keepdim=True)
    extent = features.amax(dimensions, keepdim=True) - low
    constant = extent <= EPSILON
    scaled = (features - low) / extent.masked_fill(constant, 1.0)
    return scaled.masked_fill(constant, 0.0)


def check_minmax(minmax: str) -> None:
    if minmax not in get_args(MinMax):
        raise ValueError(f"minmax must be one of {', '.join(map(repr, get_args(MinMax)))}, got {minmax!r}")


def check_window(window_size: int, sigma: float) -> None:
    if not (window_size >= 1 and window_size % 2 == 1):
        raise ValueError(f"window_size must be an odd number of cells, 1 or more, got {window_size}")
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0, got {sigma}")


def _check_maps(student_features: Tensor, teacher_features: Tensor) -> None:
    require_floating(student_features=student_features, teacher_features=teacher_features)
    require_same_shape(student_features=student_features, teacher_features=teacher_features)
    if student_features.ndim != 4:
        raise ValueError(
            f"features must have shape (batch, channels, height, width), got {shape_text(student_features)}"
        )
