"""Adapter for mmdet's one-stage detectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmdet.models.detectors import BaseDetector, SingleStageDetector
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn

from crosskd.adapters.base import Adapter, Batch, Objects, OwnOutput, PixelCoding
from crosskd.adapters.mmdet.heads import HEADS, MMDetHead, head_class_of, summed
from crosskd.adapters.replacing import replaced

__all__ = ["MMDetSingleStage", "pixel_coding"]

_PIXEL_MAX = 255.0


class MMDetSingleStage(Adapter):
    """Adapter for mmdet's ``SingleStageDetector`` with a GFL, ATSS, RetinaNet, FCOS or RTMDet (SepBN) head.

    Images are a batch (batch, channels, height, width) that the detector's data preprocessor has made,
    targets mmdet's data samples: what mmdet hands to a detector's own ``loss``.

    Args:
        detector: the detector.
        head: how its head is taken apart, for one of your own; found from the head's type unless given.

    Raises:
        TypeError: another kind of detector, or a head that none of the families fits.
        ValueError: a head without the family's towers and predictors, or whose classes share a softmax.

    Example:
        >>> import pytest
        >>> mmdet = pytest.importorskip("mmdet")
        >>> MMDetSingleStage(nn.Linear(2, 2))
        Traceback (most recent call last):
        TypeError: a Linear is not one of mmdet's detectors
    """

    def __init__(self, detector: Any, head: type[MMDetHead] | None = None) -> None:
        family = _head_class(detector) if head is None else head
        self.detector: Any = detector
        self.head = family(detector.bbox_head)
        self.heads = (self.head,)
        self.strides = tuple(float(stride) for stride in self.head.strides)
        self.widths = (int(detector.bbox_head.in_channels),) * len(self.strides)
        self.pixel_coding = pixel_coding(detector)
        self.pad_divisor = int(getattr(detector.data_preprocessor, "pad_size_divisor", 1))

    def prepare(self, images: Any, targets: Any) -> Batch:
        """Takes pixels and data samples as they are.

        Args:
            images: one tensor (batch, channels, height, width), as the detector's data preprocessor makes it.
            targets: one ``DetDataSample`` with ``gt_instances`` per image; or ``None``.

        Raises:
            ValueError: images or data samples in another form, labels that the detector doesn't know, a
                detector that was built without a ``train_cfg``.
        """
        if not isinstance(images, Tensor) or images.ndim != 4:
            got = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(
                "images must be one tensor (batch, channels, height, width), as a detector's data "
                f"preprocessor returns it, got {got}: call detector.data_preprocessor(data, True) first"
            )
        whole = (int(images.shape[-2]), int(images.shape[-1]))
        if targets is None:
            return self.take(Batch(images, (whole,) * len(images)))
        self.head.require_assigner("student")
        _check_samples(targets, len(images), self.head.num_classes)
        sizes, objects, metas = [], [], []
        for sample in targets:
            height, width = sample.metainfo.get("img_shape", whole)[:2]
            sizes.append((int(height), int(width)))
            instances = sample.gt_instances
            objects.append(Objects(get_box_tensor(instances.bboxes), instances.labels))
            metas.append(sample.metainfo)
        return Batch(images, tuple(sizes), tuple(objects), targets, extra=metas)

    def take(self, batch: Batch) -> Batch:
        """A batch with image metas, which mmdet's label assignment reads."""
        return replace(batch, extra=[self._meta(size, batch.size) for size in batch.image_sizes])

    def _meta(self, size: tuple[int, int], whole: tuple[int, int]) -> dict[str, Any]:
        """What the detector's own pipeline would say of an image of a size in a batch of another."""
        padded = tuple(
            min(math.ceil(side / self.pad_divisor) * self.pad_divisor, limit)
            for side, limit in zip(size, whole, strict=True)
        )
        return {
            "img_shape": size,
            "ori_shape": size,
            "pad_shape": padded,
            "batch_input_shape": whole,
            "scale_factor": (1.0, 1.0),
        }

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """The detector's own ``extract_feat``."""
        maps = list(self.detector.extract_feat(pixels))
        strides = self.head.strides
        if len(maps) != len(strides):
            raise ValueError(
                f"{type(self.detector).__name__}.extract_feat gives {len(maps)} levels, its head has "
                f"{len(strides)} strides, {list(strides)}: build backbone, neck and head for the same levels"
            )
        return maps

    def detect(self, images: Any, targets: Any) -> Any:
        """The detector's own ``predict``: data samples with ``pred_instances``.

        Without data samples boxes are in the batch's pixels, for no other size is known.
        """
        if targets is None:
            whole = tuple(images.shape[-2:])
            targets = [DetDataSample(metainfo=self._meta(whole, whole)) for _ in images]
        return self.detector.predict(images, targets)

    def own_losses(self, images: Any, targets: Any) -> Mapping[str, Tensor]:
        """The losses of mmengine's training step, lists of one per level summed."""
        self.prepare(images, targets)  # says what is wrong with a batch before mmdet stumbles over it
        try:
            losses = self.detector(images, targets, mode="loss")
        except AssertionError:
            self.maps(images)  # says so where levels are missing, which mmdet's heads assert without a word
            raise
        return summed(losses)

    def own_outputs(self, batch: Batch) -> list[OwnOutput]:
        """What the head gives in the detector's own forward."""
        # In eval mode FCOS's head gives pixels, in train mode, as for its losses, strides.
        with replaced(self.detector.bbox_head, training=True):
            maps = self.detector(batch.pixels, mode="tensor")
        return [OwnOutput(self.head.as_predictions(*maps))]


def _head_class(detector: nn.Module) -> type[MMDetHead]:
    """The family of a detector's head."""
    known = ", ".join(family.mmdet_class.__name__ for family in HEADS)
    name = type(detector).__name__
    if not isinstance(detector, BaseDetector):
        raise TypeError(f"a {name} is not one of mmdet's detectors")
    if not isinstance(detector, SingleStageDetector):
        stages = "a detector of two stages" if hasattr(detector, "roi_head") else "not a one-stage detector"
        raise TypeError(
            f"{name} is {stages}: mmdet's adapter takes a SingleStageDetector with one of the heads {known}, "
            "a DeformableDETR or a DINO"
        )
    family = head_class_of(detector.bbox_head)
    if family is None:
        raise TypeError(
            f"{name} has a {type(detector.bbox_head).__name__}; mmdet's adapter knows the heads {known}. For "
            "another one write an adapter (docs/adapters.md) and pass it as adapter="
        )
    return family


def pixel_coding(detector: Any) -> PixelCoding | None:
    """What the data preprocessor makes of images; ``None`` for one that leaves them as they are given."""
    preprocessor = detector.data_preprocessor
    if not hasattr(preprocessor, "_enable_normalize"):
        return None
    convolutions = (m for m in detector.backbone.modules() if isinstance(m, nn.Conv2d))
    first = next(convolutions, None)
    channels = 3 if first is None else first.in_channels
    mean, std = [0.0], [1.0]
    if preprocessor._enable_normalize:
        mean, std = preprocessor.mean.flatten().tolist(), preprocessor.std.flatten().tolist()
    if len(mean) == 1:  # one for all channels
        mean, std = mean * channels, std * channels
    return PixelCoding(
        mean=tuple(value / _PIXEL_MAX for value in mean),
        std=tuple(value / _PIXEL_MAX for value in std),
        # mmdet reads images with blue first.
        bgr=channels == 3 and not preprocessor._channel_conversion,
        padding=float(preprocessor.pad_value),
    )


def _check_samples(samples: Sequence[Any], images: int, classes: int) -> None:
    """Raises ``ValueError`` for data samples that the detector's own loss would stumble over."""
    if len(samples) != images:
        raise ValueError(f"got {images} images but {len(samples)} data samples: one is needed for each")
    for index, sample in enumerate(samples):
        if not isinstance(sample, DetDataSample) or "gt_instances" not in sample:
            raise ValueError(
                f"data sample {index} must be a DetDataSample with gt_instances, got {type(sample).__name__}"
            )
        boxes, labels = sample.gt_instances.bboxes, sample.gt_instances.labels
        if tuple(boxes.shape) != (len(labels), 4):
            raise ValueError(
                f"data sample {index} must hold boxes of shape (objects, 4) and labels of shape (objects,), "
                f"got {tuple(boxes.shape)} and {tuple(labels.shape)}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(
                f"data sample {index} has labels from {int(labels.min())} to {int(labels.max())}, but the "
                f"detector predicts {classes} classes, labelled 0 to {classes - 1}"
            )
