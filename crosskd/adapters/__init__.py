"""Adapters: one folder for each framework, each binding one of its detectors."""

from __future__ import annotations

from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet

from crosskd.adapters.base import (
    Adapter,
    AdapterSpec,
    Anchors,
    Batch,
    Head,
    Objects,
    OwnOutput,
    PixelCoding,
    RegionHead,
)
from crosskd.adapters.torchvision import TorchvisionFCOS, TorchvisionRetinaNet

__all__ = [
    "Adapter",
    "AdapterSpec",
    "Anchors",
    "Batch",
    "Head",
    "Objects",
    "OwnOutput",
    "PixelCoding",
    "RegionHead",
    "TorchvisionFCOS",
    "TorchvisionRetinaNet",
    "find_adapter",
]


def find_adapter(detector: nn.Module) -> Adapter:
    """The adapter of a detector, found from its type.

    Raises:
        TypeError: no adapter understands it.

    Example:
        >>> find_adapter(nn.Linear(2, 2))
        Traceback (most recent call last):
        TypeError: no adapter understands a Linear. There are adapters for torchvision's RetinaNet, FCOS, ...
    """
    if isinstance(detector, RetinaNet):
        return TorchvisionRetinaNet(detector)
    if isinstance(detector, FCOS):
        return TorchvisionFCOS(detector)
    raise TypeError(
        f"no adapter understands a {type(detector).__name__}. There are adapters for torchvision's RetinaNet, FCOS, "
    )
