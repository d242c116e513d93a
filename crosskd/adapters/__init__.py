"""Adapters: one file a framework, each turning its detectors into towers and predictions."""

from __future__ import annotations

from torch import nn

from crosskd.adapters.generic import GenericAdapter
from crosskd.adapters.levels import LevelPairs
from crosskd.adapters.protocol import Adapter, Inputs, SecondStage, TwoStageAdapter
from crosskd.adapters.torchvision import (
    TorchvisionFasterRCNNAdapter,
    TorchvisionFCOSAdapter,
    TorchvisionRetinaNetAdapter,
)

__all__ = [
    "Adapter",
    "GenericAdapter",
    "Inputs",
    "LevelPairs",
    "SecondStage",
    "TorchvisionFCOSAdapter",
    "TorchvisionFasterRCNNAdapter",
    "TorchvisionRetinaNetAdapter",
    "TwoStageAdapter",
    "find_adapter",
]


def find_adapter(*detectors: nn.Module) -> Adapter:
    """The adapter that understands all of the given detectors.

    Raises:
        TypeError: none does.

    Example:
        >>> find_adapter(nn.Linear(2, 2))
        Traceback (most recent call last):
        TypeError: no adapter understands Linear. There are adapters for torchvision's RetinaNet and ...
    """
    if any(_is_of("ultralytics", detector) for detector in detectors):
        from crosskd.adapters.ultralytics import UltralyticsAdapter

        return UltralyticsAdapter.for_detectors(*detectors)
    if any(_is_of("mmdet", detector) for detector in detectors):
        from crosskd.adapters.mmdet import MMDetAdapter

        return MMDetAdapter.for_detectors(*detectors)
    known: tuple[Adapter, ...] = (
        TorchvisionRetinaNetAdapter(),
        TorchvisionFCOSAdapter(),
        TorchvisionFasterRCNNAdapter(),
    )
    for adapter in known:
        if all(adapter.supports(detector) for detector in detectors):
            return adapter
    types = " with ".join(type(detector).__name__ for detector in detectors)
    raise TypeError(
        f"no adapter understands {types}. There are adapters for torchvision's RetinaNet, FCOS and Faster "
        "R-CNN, for ultralytics' YOLOs and for mmdet's dense detectors, teacher and student of the same "
        "family. For any other detector make one with crosskd.adapters.GenericAdapter, or write one, an "
        "object with the functions of crosskd.adapters.Adapter, and pass it as adapter="
    )


def _is_of(package: str, detector: nn.Module) -> bool:
    """Whether a detector is of one of a package's classes; to find out, the package need not be there."""
    return any(base.__module__.partition(".")[0] == package for base in type(detector).__mro__)
