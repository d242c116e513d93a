"""Adapters: one folder for each framework, each binding one of its detectors."""

from __future__ import annotations

from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.ssd import SSD

from crosskd.adapters.backbone import backbone
from crosskd.adapters.base import (
    Adapter,
    AdapterSpec,
    Anchors,
    Batch,
    DecoderHead,
    DecoderLayer,
    Head,
    Objects,
    OwnOutput,
    PixelCoding,
    Queries,
    RegionHead,
)
from crosskd.adapters.generic import generic
from crosskd.adapters.torchvision import (
    TorchvisionFasterRCNN,
    TorchvisionFCOS,
    TorchvisionRetinaNet,
    TorchvisionSSD,
)

__all__ = [
    "Adapter",
    "AdapterSpec",
    "Anchors",
    "Batch",
    "DecoderHead",
    "DecoderLayer",
    "Head",
    "Objects",
    "OwnOutput",
    "PixelCoding",
    "Queries",
    "RegionHead",
    "TorchvisionFCOS",
    "TorchvisionFasterRCNN",
    "TorchvisionRetinaNet",
    "TorchvisionSSD",
    "backbone",
    "find_adapter",
    "generic",
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
    adapter = _known_adapter(detector)
    if adapter is not None:
        return adapter
    raise TypeError(
        f"no adapter understands a {type(detector).__name__}{_detector_inside(detector)}. There are adapters "
        "for torchvision's RetinaNet, FCOS, SSD and Faster R-CNN, for ultralytics' YOLOs, for mmdet's "
        "one-stage detectors and DINO, and for transformers' RT-DETR, D-FINE and DETRs. "
        "crosskd.adapters.generic() makes one of a detector of your own, to be passed as adapter= "
        "(docs/your_detector.md), and crosskd.adapters.backbone() one of a teacher without a head, as "
        "teacher_adapter="
    )


def _known_adapter(detector: nn.Module) -> Adapter | None:
    """The adapter of a detector whose type is known."""
    of_torchvision = (
        (RetinaNet, TorchvisionRetinaNet),
        (FCOS, TorchvisionFCOS),
        (SSD, TorchvisionSSD),
        (FasterRCNN, TorchvisionFasterRCNN),
    )
    for kind, adapter in of_torchvision:
        if isinstance(detector, kind):
            return adapter(detector)
    if _is_of("ultralytics", detector):
        from crosskd.adapters.ultralytics import UltralyticsDetect

        return UltralyticsDetect(detector)
    if _is_of("mmdet", detector):
        from crosskd.adapters.mmdet import MMDetSingleStage, MMDetTransformer

        transformer = hasattr(detector, "forward_transformer")
        return MMDetTransformer(detector) if transformer else MMDetSingleStage(detector)
    if _is_of("transformers", detector):
        from crosskd.adapters.transformers import TransformersDetr

        return TransformersDetr(detector)
    return None


def _detector_inside(wrapper: nn.Module) -> str:
    """Where in a module of an unknown type there is a detector of a known one, in words."""
    for path, module in wrapper.named_modules():
        if not path:
            continue
        try:
            known = _known_adapter(module)
        except (TypeError, ValueError):
            continue
        if known is not None:
            return f", but its .{path} is a {type(module).__name__} that one does: hand in that"
    return ""


def _is_of(package: str, detector: nn.Module) -> bool:
    """Whether a detector is of one of a package's classes; to find out, the package need not be there."""
    return any(base.__module__.partition(".")[0] == package for base in type(detector).__mro__)
