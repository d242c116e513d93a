"""Adapter for torchvision's SSD and SSDlite: predictors for each level, one softmax over the classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.ssd import SSDScoringHead

from crosskd.adapters.base import Anchors, Batch, Head, OwnOutput
from crosskd.adapters.replacing import replaced
from crosskd.adapters.torchvision.common import (
    AsGiven,
    TorchvisionAdapter,
    decode_deltas,
    grid_anchors,
    predictors_of,
    targets_of,
)
from crosskd.predictions import Assignment, Predictions
from crosskd.towers import Branch, Tower

__all__ = ["TorchvisionSSD"]

_BACKGROUND = 0


class _SSDHead(Head):
    head_type = "SSD"
    background = _BACKGROUND

    def __init__(self, detector: Any) -> None:
        self.detector = detector
        self.num_classes = int(_scoring_head(detector, "classification").num_columns)
        branches = []
        self.rest: dict[str, list[Any]] = {}  # by branch name, one per level
        for name in ("classification", "regression"):
            head = _scoring_head(detector, name)
            towers, predictors, self.rest[name] = [], {}, []
            for level in range(len(head.module_list)):
                path, layers, predictor = _split(head, level)
                width = None if layers else predictor.in_channels
                towers.append(Tower.of(layers, f"{name} tower of level {level}", width_in=width))
                predictors[path] = predictor
                alone = _Predictor(predictor)
                self.rest[name].append(predictors_of(head, _get_result_from_module_list=alone))
            branches.append(Branch(name, tuple(towers), predictors))
        self.branches = tuple(branches)
        # Of the regression head, which has four numbers for each box.
        self.per_location = [layer.out_channels // 4 for layer in predictors.values()]

    def predict(self, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Runs the level's predictors, in the layout of torchvision's two sub-heads' own forward."""
        logits = self.rest["classification"][level].forward([towers["classification"]])
        regression = self.rest["regression"][level].forward([towers["regression"]])
        return Predictions(logits, regression, None, background=_BACKGROUND)

    def anchors(self, batch: Batch, maps: Sequence[Tensor]) -> Anchors:
        """The detector's own anchors, called default boxes there.

        Raises:
            ValueError: images of another size than the detector is made for.
        """
        size = _fixed_size(self.detector)
        if size is not None and batch.size != size:
            raise ValueError(
                f"an SSD that resizes its images to {size} as (height, width) is given a batch of "
                f"{batch.size}: its anchors are fractions of the image, so its head was trained for objects "
                "of other sizes in pixels. A teacher gets the student's resized images: build both with the "
                "same size=, or pass teacher_view=, with which the teacher resizes the images itself"
            )
        return grid_anchors(self.detector.anchor_generator, batch, maps, self.per_location)

    def decode(self, predictions: Predictions, anchors: Anchors) -> Tensor:
        """Boxes by the detector's own coder, in float32 at least."""
        return decode_deltas(self.detector.box_coder, predictions, anchors)

    def losses(
        self, predictions: Predictions, anchors: Anchors, batch: Batch
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The detector's own ``compute_loss``, with the matches that its own forward makes."""
        return self._run_forward(predictions, anchors, batch, batch.targets, self.detector.compute_loss)

    def assign(self, predictions: Predictions, anchors: Anchors, batch: Batch) -> Assignment:
        """The matches that the detector's own forward makes, which looks at places alone."""
        targets = targets_of(batch, first_label=_BACKGROUND + 1)
        return self._run_forward(predictions, anchors, batch, targets, lambda *_: {})[1]

    def _run_forward(
        self,
        predictions: Predictions,
        anchors: Anchors,
        batch: Batch,
        targets: Any,
        compute_loss: Callable[..., dict[str, Tensor]],
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The detector's own forward from the predictions on, which makes the matches itself.

        Args:
            predictions: of all levels.
            anchors: likewise.
            batch: as the detector takes it.
            targets: of each image, in pixels of the batch.
            compute_loss: what the forward calls with its matches.

        Returns:
            What ``compute_loss`` gave, and the assignment by the matches.
        """
        matches: list[Tensor] = []

        def with_matches(targets: Any, outputs: Any, boxes: Any, matched: list[Tensor]) -> dict[str, Tensor]:
            matches.extend(matched)
            return compute_loss(targets, outputs, boxes, matched)

        outputs = {"bbox_regression": predictions.regression, "cls_logits": predictions.logits}
        detector = self.detector
        with replaced(
            detector,
            training=True,  # a teacher, too, is to make matches, and its parts are replaced anyway
            transform=AsGiven(detector.transform, batch.image_sizes),
            backbone=lambda pixels: {},
            head=lambda maps: outputs,
            anchor_generator=lambda images, maps: [anchors.boxes] * len(targets),
            compute_loss=with_matches,
        ):
            losses: dict[str, Tensor] = detector.forward(list(batch.pixels.unbind()), targets)
        if len(matches) != len(targets):
            raise ValueError(
                f"{type(detector).__name__}.forward did not call compute_loss once with its matches, so the "
                "label assignment can't be shared: write an adapter for this detector (docs/adapters.md)"
            )
        positive = torch.stack(matches) >= 0
        return losses, Assignment(None, positive, positive.sum().clamp(min=1).float())


class TorchvisionSSD(TorchvisionAdapter):
    """Adapter for ``torchvision.models.detection.SSD``, with SSD's head or SSDlite's, any backbone.

    Each level has predictors of its own. SSD's are one convolution, so the teacher's head can take over at
    position 0 alone, the feature map itself. SSDlite's are a depthwise convolution, a tower of one block, and
    a 1x1 convolution: positions 0 and 1. Where widths differ, each level gets a projection for each branch.
    An SSD may teach an SSDlite, and the other way round.

    The classes share a softmax, and class 0 is the background: ``num_classes`` counts it, targets' labels
    start at 1, and a ``class_map`` starts with 0.

    SSD resizes all images to one size, and its anchors are fractions of that. A teacher is given the
    student's resized images, and methods that read its head refuse images of another size than its own: they
    need detectors made for one size, or a ``teacher_view``, in which the teacher resizes the images itself.

    On a level of one location, in a batch of one image, features have no deviation: aligned, they are the
    teacher's, and CrossKD teaches nothing on that level in that step.

    Example:
        >>> from torchvision.models.detection import ssdlite320_mobilenet_v3_large
        >>> detector = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
        >>> branch = TorchvisionSSD(detector).heads[0].branches[0]
        >>> branch.name, [tower.width_in for tower in branch.towers]
        ('classification', [672, 480, 512, 256, 256, 128])
    """

    first_label = _BACKGROUND + 1

    def __init__(self, detector: Any) -> None:
        super().__init__(detector)
        self.heads = (_SSDHead(detector),)

    def own_outputs(self, batch: Batch) -> list[OwnOutput]:
        """What the head gives in the detector's own forward."""
        ((_, outputs),) = self.own_head_outputs(batch, [self.detector.head])
        logits, regression = outputs["cls_logits"], outputs["bbox_regression"]
        return [OwnOutput(Predictions(logits, regression, None, background=_BACKGROUND))]


class _Predictor:
    """Runs one level's predictor alone, as the sub-heads' own forward asks for it."""

    def __init__(self, predictor: nn.Module) -> None:
        self._predictor = predictor

    def __call__(self, features: Tensor, level: int) -> Any:
        return self._predictor(features)


def _scoring_head(detector: Any, branch: str) -> SSDScoringHead:
    head = getattr(detector.head, f"{branch}_head", None)
    if not isinstance(head, SSDScoringHead):
        raise ValueError(
            f"head.{branch}_head is a {type(head).__name__}: this adapter knows torchvision's "
            "SSDScoringHead; write an adapter for this detector (docs/adapters.md) and pass it as adapter="
        )
    return head


def _split(head: SSDScoringHead, level: int) -> tuple[str, list[nn.Module], nn.Conv2d]:
    """A level's path to its predictor, the layers of its tower, and its predictor."""
    of_level, path = head.module_list[level], f"module_list.{level}"
    layers = [of_level]
    if isinstance(of_level, nn.Sequential):
        layers = list(of_level)
        path = f"{path}.{len(layers) - 1}"
    predictor = layers.pop() if layers else None
    if not isinstance(predictor, nn.Conv2d):
        raise ValueError(
            f"{path} of a {type(head).__name__} is a {type(predictor).__name__}: this adapter expects, for "
            "each level, an nn.Conv2d, or an nn.Sequential that ends in one; for other predictors write an "
            "adapter (docs/adapters.md) and pass it as adapter="
        )
    return path, layers, predictor


def _fixed_size(detector: Any) -> tuple[int, int] | None:
    """(height, width) that all images are resized to; ``None`` where they keep their shape."""
    size = getattr(detector.transform, "fixed_size", None)
    return None if size is None else (int(size[1]), int(size[0]))
