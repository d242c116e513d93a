"""Making a student's features acceptable to a teacher's head: statistics and width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crosskd._checks import compute_dtype, require_floating, shape_text

__all__ = [
    "ChannelProjection",
    "FeatureStatistics",
    "align_statistics",
    "feature_statistics",
    "join_statistics",
]


EPSILON = 1e-6


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and standard deviation of each channel, over batch and space.

    Attributes:
        mean: shape (1, channels, 1, …), as many dimensions as the features.
        std: of the same shape, unbiased; 0 where there is a single location.
        locations: how many were measured, of all images together.
    """

    mean: Tensor
    std: Tensor
    locations: int = 1

    def normalize(self, features: Tensor) -> Tensor:
        r"""Features without their mean, over their standard deviation (1e-6 added).

        Args:
            features: shape (batch, channels, \*space).
        """
        return (features - self.mean) / (self.std + EPSILON)


def feature_statistics(features: Tensor) -> FeatureStatistics:
    r"""Measures each channel's mean and standard deviation over batch and space, in float32 at least.

    Args:
        features: shape (batch, channels, \*space).

    Raises:
        ValueError: fewer than two dimensions, or no element to measure.
        TypeError: features that are not floating point.

    Example:
        >>> feature_statistics(torch.randn(2, 8, 5, 5)).mean.shape
        torch.Size([1, 8, 1, 1])
    """
    require_floating(features=features)
    if features.ndim < 2 or features.numel() == 0:
        raise ValueError(
            f"features must have shape (batch, channels, *space) and at least one element, "
            f"got {shape_text(features)}"
        )
    features = features.to(compute_dtype(features))
    dimensions = [d for d in range(features.ndim) if d != 1]
    # A single location has no unbiased standard deviation: it counts as 0, not as "not a number".
    locations = features.numel() // features.shape[1]
    correction = 1 if locations > 1 else 0
    std, mean = torch.std_mean(features, dim=dimensions, correction=correction, keepdim=True)
    return FeatureStatistics(mean=mean, std=std, locations=locations)


def join_statistics(parts: Sequence[FeatureStatistics]) -> FeatureStatistics:
    r"""The statistics of several images together, of those of each: exact but for rounding.

    Args:
        parts: of the same number of channels.

    Example:
        >>> features = torch.randn(4, 8, 5, 5)
        >>> joined = join_statistics([feature_statistics(image) for image in features.split(1)])
        >>> torch.allclose(joined.std, feature_statistics(features).std, atol=1e-6)
        True
    """
    counts = [part.locations for part in parts]
    total = sum(counts)
    mean = sum(n / total * part.mean.double() for n, part in zip(counts, parts, strict=True))
    squares = sum(
        (n - 1) * part.std.double().square() + n * (part.mean.double() - mean).square()
        for n, part in zip(counts, parts, strict=True)
    )
    std = torch.as_tensor(squares / max(1, total - 1)).sqrt()
    like = parts[0].mean
    return FeatureStatistics(torch.as_tensor(mean).to(like), std.to(like), total)


def align_statistics(student_features: Tensor, teacher: FeatureStatistics | Tensor) -> Tensor:
    r"""Gives the student's features the teacher's mean and standard deviation, channel by channel.

    .. math::
        \frac{s - \mu_s}{\sigma_s + 10^{-6}} \, \sigma_t + \mu_t

    The gradient flows through the student's own mean and standard deviation too. Arithmetic is
    float32 (float64 for float64 features) whatever autocast says.

    Args:
        student_features: shape (batch, channels, \*space).
        teacher: the teacher's features, of the same number of channels, or what
            `feature_statistics` measured of them. A constant.

    Returns:
        Aligned features, of the shape and type of the student's.

    Raises:
        ValueError: another number of channels (see `ChannelProjection`), or no element to measure.
        TypeError: features that are not floating point.

    References:
        CrossKD, section 3.2; the statistics are those of PKD (Cao et al., NeurIPS 2022).

    Example:
        >>> student = torch.randn(2, 8, 5, 5, requires_grad=True)
        >>> aligned = align_statistics(student, 3 * torch.randn(2, 8, 5, 5) + 1)
        >>> aligned.sum().backward()
        >>> aligned.shape
        torch.Size([2, 8, 5, 5])
    """
    require_floating(student_features=student_features)
    if isinstance(teacher, Tensor):
        teacher = feature_statistics(teacher)
    if teacher.mean.ndim != student_features.ndim or (teacher.mean.shape[1] != student_features.shape[1]):
        raise ValueError(
            f"student features {shape_text(student_features)} cannot take on statistics of "
            f"{teacher.mean.shape[1]} channels in {teacher.mean.ndim} dimensions: project them to "
            "the teacher's width first (ChannelProjection)"
        )
    student = student_features.to(compute_dtype(student_features, teacher.mean))
    statistics = feature_statistics(student)
    scale = teacher.std.detach() / (statistics.std + EPSILON)
    aligned = torch.addcmul(teacher.mean.detach(), student - statistics.mean, scale)
    return aligned.to(student_features.dtype)


class ChannelProjection(nn.Module):
    """A 1x1 convolution from the width of a student's tower to that of the teacher's.

    It is a linear layer over the channels, whatever stands behind them: features of linear layers, with one
    dimension of locations or none, are projected as well. Made by a method where the widths differ; it is
    trained with the student and thrown away with the `Distiller`.

    Args:
        student_width: channels of the student's features.
        teacher_width: channels that the teacher's head takes.
        bias: whether it may shift each channel. Where a normalisation behind it takes the shift away again
            its gradient is 0, so there it has none; one in an older checkpoint is left out.

    Example:
        >>> ChannelProjection(64, 256)(torch.randn(2, 64, 5, 5)).shape
        torch.Size([2, 256, 5, 5])
    """

    def __init__(self, student_width: int, teacher_width: int, *, bias: bool = True) -> None:
        super().__init__()
        if student_width < 1 or teacher_width < 1:
            raise ValueError(
                f"widths must be at least 1, got {student_width} (student) and {teacher_width} (teacher)"
            )
        self.student_width = student_width
        self.teacher_width = teacher_width
        self.convolution = nn.Conv2d(student_width, teacher_width, kernel_size=1, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        r"""Projects features of shape (batch, student_width, \*space)."""
        if features.ndim < 2 or features.shape[1] != self.student_width:
            raise ValueError(
                f"expected features of shape (batch, {self.student_width}, *space), "
                f"got {shape_text(features)}"
            )
        # A convolution wants two dimensions of space; linear layers leave any number of them.
        space = features.shape[2:]
        flat = features if len(space) == 2 else features.reshape(*features.shape[:2], math.prod(space), 1)
        projected: Tensor = self.convolution(flat)
        return projected if len(space) == 2 else projected.reshape(*projected.shape[:2], *space)
