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
    TorchvisionSSDAdapter,
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
    "TorchvisionSSDAdapter",
    "TwoStageAdapter",
    "find_adapter",
]


def find_adapter(*detectors: nn.Module) -> Adapter:
    """The adapter that understands all of the given detectors.

    Raises:
        ValueError: each is understood, but they are of different families.
        TypeError: no adapter understands one of them.

    Example:
        >>> find_adapter(nn.Linear(2, 2))
        Traceback (most recent call last):
        TypeError: no adapter understands Linear. There are adapters for torchvision's RetinaNet, FCOS, ...
    """
    known: tuple[Adapter, ...] = (
        TorchvisionRetinaNetAdapter(),
        TorchvisionFCOSAdapter(),
        TorchvisionSSDAdapter(),
        TorchvisionFasterRCNNAdapter(),
    )
    families = [_family_of(detector, known) for detector in detectors]
    if None not in families and len(set(families)) > 1:
        raise ValueError(
            f"the detectors are of different families: {_listed(detectors)}. What one predicts means nothing "
            "to the other's head: take a teacher of the student's family"
        )
    if any(_is_of("ultralytics", detector) for detector in detectors):
        from crosskd.adapters.ultralytics import UltralyticsAdapter

        return UltralyticsAdapter.for_detectors(*detectors)
    if any(_is_of("mmdet", detector) for detector in detectors):
        from crosskd.adapters.mmdet import MMDetAdapter

        return MMDetAdapter.for_detectors(*detectors)
    for adapter in known:
        if all(adapter.supports(detector) for detector in detectors):
            return adapter
    types = " with ".join(type(detector).__name__ for detector in detectors)
    raise TypeError(
        f"no adapter understands {types}. There are adapters for torchvision's RetinaNet, FCOS, SSD and "
        "Faster R-CNN, for ultralytics' YOLOs and for mmdet's dense detectors, teacher and student of the "
        "same family. For any other detector make one with crosskd.adapters.GenericAdapter, or write one, an "
        "object with the functions of crosskd.adapters.Adapter, and pass it as adapter="
    )


def _family_of(detector: nn.Module, known: tuple[Adapter, ...]) -> str | None:
    """What two detectors must share for one adapter to understand both, as far as types tell."""
    package = _package_of(detector)
    if package in ("ultralytics", "mmdet"):
        return package
    return next((type(adapter).__name__ for adapter in known if adapter.supports(detector)), None)


def _listed(detectors: tuple[nn.Module, ...]) -> str:
    sides = (" (teacher)", " (student)") if len(detectors) == 2 else ("",) * len(detectors)
    names = [f"{_package_of(detector)}'s {type(detector).__name__}" for detector in detectors]
    return ", ".join(name + side for name, side in zip(names, sides, strict=True))


def _package_of(detector: nn.Module) -> str | None:
    return next((p for p in ("ultralytics", "mmdet", "torchvision") if _is_of(p, detector)), None)


def _is_of(package: str, detector: nn.Module) -> bool:
    """Whether a detector is of one of a package's classes; to find out, the package need not be there."""
    return any(base.__module__.partition(".")[0] == package for base in type(detector).__mro__)
