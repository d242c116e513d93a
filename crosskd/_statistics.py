"""Channel statistics of feature maps, which both the losses and the alignment measure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosskd._checks import compute_dtype, require_floating, shape_text

EPSILON = 1e-6


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and standard deviation of each channel, over batch and space.

    Attributes:
        mean: shape (1, channels, 1, …), as many dimensions as the features.
        std: of the same shape, unbiased; 0 where there is a single location.
    """

    mean: Tensor
    std: Tensor

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
    correction = 1 if features.numel() > features.shape[1] else 0
    std, mean = torch.std_mean(features, dim=dimensions, correction=correction, keepdim=True)
    return FeatureStatistics(mean=mean, std=std)
