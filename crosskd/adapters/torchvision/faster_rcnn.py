"""Adapter for torchvision's Faster R-CNN: its region proposal network, and its box head on the proposals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead, permute_and_flatten

from crosskd.adapters.base import Anchors, Batch, Head, OwnOutput, RegionHead
from crosskd.adapters.replacing import replaced
from crosskd.adapters.torchvision.common import (
    TorchvisionAdapter,
    decode_deltas,
    grid_anchors,
    predictors_of,
    targets_of,
    widened,
)
from crosskd.predictions import Assignment, Predictions, join_levels
from crosskd.towers import Block, Branch, Tower

__all__ = ["Regions", "TorchvisionFasterRCNN"]

_BACKGROUND = 0


@dataclass(frozen=True, eq=False)
class Regions:
    """What the student's box head answers for.

    Attributes:
        boxes: one tensor (regions, 4) per image, xyxy in pixels of the student's batch.
        image_sizes: (height, width) of each image in the student's batch.
        matches: with targets, one tensor (regions,) per image: the index of the region's object.
        labels: with targets, one tensor (regions,) per image: each region's class, 0 for the background.
        deltas: with targets, one tensor (regions, 4) per image: from each region to its object.
    """

    boxes: list[Tensor]
    image_sizes: tuple[tuple[int, int], ...]
    matches: list[Tensor] | None = None
    labels: list[Tensor] | None = None
    deltas: list[Tensor] | None = None

    def within(self, image_sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """The boxes in the same images of other sizes, (height, width)."""
        boxes = []
        for of_image, (height, width), (h, w) in zip(self.boxes, self.image_sizes, image_sizes, strict=True):
            same = (height, width) == (h, w)
            scale = of_image.new_tensor([w / width, h / height, w / width, h / height])
            boxes.append(of_image if same else of_image * scale)
        return boxes


class _RPN(Head):
    """The region proposal network: one tower of convolutions that objectness and boxes share."""

    name = "rpn"
    head_type = "RPN"
    num_classes = 1

    def __init__(self, detector: Any) -> None:
        self.rpn = detector.rpn
        head = _known(detector, "rpn.head", RPNHead)
        empty = isinstance(head.conv, Sized) and not len(head.conv)
        tower = Tower.of(head.conv, "rpn tower", width_in=head.cls_logits.in_channels if empty else None)
        self.rest = predictors_of(head)
        predictors = {"cls_logits": head.cls_logits, "bbox_pred": head.bbox_pred}
        self.branches = (Branch("rpn", (tower,), predictors),)

    def predict(self, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Objectness and boxes, by the head's own forward and in torchvision's order."""
        return _proposed(*self.rest.forward([towers["rpn"]]))

    def anchors(self, batch: Batch, maps: Sequence[Tensor]) -> Anchors:
        """The detector's own anchors."""
        return grid_anchors(self.rpn.anchor_generator, batch, maps, None)

    def decode(self, predictions: Predictions, anchors: Anchors) -> Tensor:
        """Boxes by the network's own coder, in float32 at least."""
        return decode_deltas(self.rpn.box_coder, predictions, anchors)

    def losses(
        self, predictions: Predictions, anchors: Anchors, batch: Batch
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The network's own losses, and the sample of anchors that they are means over."""
        rpn, boxes = self.rpn, [anchors.boxes] * len(batch.targets)
        labels, objects = rpn.assign_targets_to_anchors(boxes, batch.targets)
        deltas = rpn.box_coder.encode(objects, boxes)
        samples: list[tuple[list[Tensor], list[Tensor]]] = []
        sampler = rpn.fg_bg_sampler

        def with_sample(labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            samples.append(sampler(labels))
            return samples[-1]

        flat = predictions.logits.flatten(0, 1), predictions.regression.flatten(0, 1)
        with replaced(rpn, fg_bg_sampler=with_sample):
            objectness, box = rpn.compute_loss(*flat, labels, deltas)
        if len(samples) != 1:
            raise ValueError(
                f"{type(rpn).__name__}.compute_loss did not call fg_bg_sampler once, so the sample of "
                "anchors can't be shared: write an adapter for this detector (docs/adapters.md)"
            )
        losses = {"loss_objectness": objectness, "loss_rpn_box_reg": box}
        return losses, _of_sample(torch.stack(labels), *samples[0])

    def assign(self, predictions: Predictions, anchors: Anchors, batch: Batch) -> Assignment:
        """The network's own labels of its anchors, of which its sampler takes as many as in training."""
        targets = targets_of(batch, first_label=_BACKGROUND + 1)
        labels, _ = self.rpn.assign_targets_to_anchors([anchors.boxes] * len(targets), targets)
        return _of_sample(torch.stack(labels), *self.rpn.fg_bg_sampler(labels))

    def assign_unlabelled(self, predictions: Predictions, threshold: float) -> Assignment:
        """The network's own sampling, of anchors that the teacher holds for objects and of others."""
        labels = (predictions.confidence() >= threshold).float()
        return _of_sample(labels, *self.rpn.fg_bg_sampler(list(labels)))


class _BoxHead(RegionHead):
    """The box head: a softmax over the classes, and a box for each of them."""

    name = "box"
    head_type = "box head"
    background = _BACKGROUND

    def __init__(self, detector: Any, map_names: Sequence[str]) -> None:
        self.rpn, self.roi_heads, self.map_names = detector.rpn, detector.roi_heads, tuple(map_names)
        height, width = self.roi_heads.box_roi_pool.output_size
        self.pooled = (int(height), int(width))
        predictor = _known(detector, "roi_heads.box_predictor", FastRCNNPredictor)
        self.num_classes = int(predictor.cls_score.out_features)
        predictors = {"cls_score": predictor.cls_score, "bbox_pred": predictor.bbox_pred}
        self.branches = (Branch("box", (_box_tower(self.roi_heads),), predictors),)

    def regions(self, predictions: Predictions, anchors: Anchors, batch: Batch) -> Regions:
        """The detector's own proposals: the sample that its losses are made on, or as many of the best."""
        sizes = list(batch.image_sizes)
        boxes = self.rpn.box_coder.decode(predictions.regression.flatten(0, 1), [anchors.boxes] * len(sizes))
        boxes, objectness = boxes.view(len(sizes), -1, 4), predictions.logits.flatten(0, 1)
        proposals, _ = self.rpn.filter_proposals(boxes, objectness, sizes, list(anchors.per_level))
        if batch.targets is None:
            most = self.roi_heads.fg_bg_sampler.batch_size_per_image
            return Regions([of_image[:most] for of_image in proposals], batch.image_sizes)
        proposals, matches, labels, deltas = self.roi_heads.select_training_samples(proposals, batch.targets)
        return Regions(proposals, batch.image_sizes, matches, labels, list(deltas))

    def counts(self, regions: Regions) -> tuple[int, ...]:
        """How many regions each image has."""
        return tuple(len(of_image) for of_image in regions.boxes)

    def pool(self, maps: Sequence[Tensor], regions: Regions, batch: Batch) -> Tensor:
        """What the detector pools at the regions, shape (regions, channels, height, width)."""
        named = dict(zip(self.map_names, maps, strict=True))
        sizes = list(batch.image_sizes)
        pooled: Tensor = self.roi_heads.box_roi_pool(named, regions.within(sizes), sizes)
        return pooled

    def predict(self, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Classes, and a box for each of them, by the detector's own predictor."""
        return _classified(*self.roi_heads.box_predictor(towers["box"]))

    def decode(self, predictions: Predictions, anchors: Any) -> Tensor:
        """Boxes (1, regions, classes, 4) by the detector's own coder, in float32 at least."""
        deltas = widened(predictions.regression)
        boxes = [of_image.to(deltas.dtype) for of_image in anchors.boxes]
        decoded: Tensor = self.roi_heads.box_coder.decode(deltas[0].flatten(1), boxes)
        return decoded[None]

    def losses(
        self, predictions: Predictions, anchors: Any, batch: Batch
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The losses that ``roi_heads``' own forward makes of the predictions: means over the regions."""
        regions: Regions = anchors
        sample = regions.boxes, regions.matches, regions.labels, regions.deltas
        outputs = predictions.logits[0], predictions.regression[0].flatten(1)
        roi_heads = self.roi_heads
        with replaced(
            roi_heads,
            select_training_samples=lambda proposals, targets: sample,
            box_roi_pool=lambda maps, boxes, sizes: None,
            box_head=lambda pooled: None,
            box_predictor=lambda vectors: outputs,
        ):
            losses: dict[str, Tensor]
            _, losses = roi_heads.forward({}, regions.boxes, list(batch.image_sizes), batch.targets)
        assert regions.labels is not None
        return losses, _of_regions(torch.cat(regions.labels) > _BACKGROUND)

    def assign_unlabelled(self, predictions: Predictions, threshold: float) -> Assignment:
        """All regions count; those that the teacher holds for objects are the positives."""
        return _of_regions(predictions.confidence()[0] >= threshold)


class TorchvisionFasterRCNN(TorchvisionAdapter):
    """Adapter for ``torchvision.models.detection.FasterRCNN``, v1 and v2, any backbone.

    The first head, ``"rpn"``, is the region proposal network: one tower of convolutions that objectness and
    boxes share. The second, ``"box"``, is the box head, fully connected or convolutional (v2), with a softmax
    over the classes and a box for each of them. It answers for the student's proposals, which each detector
    pools from its own maps; so the two box heads may stand on any levels.

    The methods' losses are means over the same sample of anchors and regions as the student's own losses.

    A Mask or Keypoint R-CNN can be a teacher; its further heads would not be trained, so it is no student.

    Example:
        >>> from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn
        >>> detector = fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None)
        >>> [(head.name, head.head_type, head.num_classes) for head in TorchvisionFasterRCNN(detector).heads]
        [('rpn', 'RPN', 1), ('box', 'box head', 91)]
    """

    first_label = _BACKGROUND + 1

    def __init__(self, detector: Any) -> None:
        super().__init__(detector)
        further = [name for name in ("mask", "keypoint") if getattr(detector.roi_heads, f"has_{name}")()]
        self.untrained = tuple(f"a {name} head" for name in further)
        if not self.map_names:
            raise ValueError(
                f"the backbone of a {type(detector).__name__} refused an image of zeros, from which the "
                "names of its maps are read; the log says why. Let it take images of 256 x 256 pixels, or "
                "set the transform's fixed_size to a size that it takes"
            )
        self.heads = (_RPN(detector), _BoxHead(detector, self.map_names))

    def own_outputs(self, batch: Batch) -> list[OwnOutput]:
        """What the two heads give in the detector's own forward, and the regions that it makes itself."""
        rpn, roi_heads = self.detector.rpn, self.detector.roi_heads
        modules = [rpn.head, roi_heads.box_roi_pool, roi_heads.box_predictor]
        (_, proposed), (pooled, _), (_, classified) = self.own_head_outputs(batch, modules)
        maps, boxes, _ = pooled
        regions = Regions(list(boxes), batch.image_sizes)
        return [
            OwnOutput(_proposed(*proposed)),
            OwnOutput(_classified(*classified), regions, list(maps.values())),
        ]


def _known(detector: nn.Module, path: str, kind: type[nn.Module]) -> Any:
    """A part of a detector; raises ``ValueError`` unless it is of torchvision's class."""
    module = detector.get_submodule(path)
    if not isinstance(module, kind):
        raise ValueError(
            f"{path} is a {type(module).__name__}: this adapter knows torchvision's {kind.__name__}; write "
            "an adapter for this detector (docs/adapters.md) and pass it as adapter="
        )
    return module


def _box_tower(roi_heads: Any) -> Tower:
    """The box head's tower, which takes pooled maps and ends in vectors."""
    head, locations = roi_heads.box_head, math.prod(roi_heads.box_roi_pool.output_size)
    if isinstance(head, TwoMLPHead):
        # Its forward runs flatten and ReLU as functions.
        blocks = (Block((nn.Flatten(), head.fc6), nn.ReLU()), Block((head.fc7,), nn.ReLU()))
        return Tower("box tower", blocks, head.fc6.in_features // locations)
    convolutions = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    linear = [m for m in head.modules() if isinstance(m, nn.Linear)]
    if not convolutions and not linear:
        return Tower.of(head, "box tower", channels_last=False)
    width = convolutions[0].in_channels if convolutions else linear[0].in_features // locations
    return Tower.of(head, "box tower", width_in=width, channels_last=False)


def _proposed(objectness: Sequence[Tensor], deltas: Sequence[Tensor]) -> Predictions:
    """The predictions of an RPN, from its layers' outputs (batch, anchors, height, width) per level."""
    levels = []
    for of_level, of_boxes in zip(objectness, deltas, strict=True):
        batch, anchors, height, width = of_level.shape
        logits = permute_and_flatten(of_level, batch, anchors, 1, height, width)
        regression = permute_and_flatten(of_boxes, batch, anchors, 4, height, width)
        levels.append(Predictions(logits, regression, quality=None))
    return join_levels(levels)


def _classified(logits: Tensor, deltas: Tensor) -> Predictions:
    """The predictions of a box head, from logits (regions, classes) and deltas (regions, classes x 4)."""
    regression = deltas.view(1, *logits.shape, 4)
    return Predictions(logits[None], regression, None, background=_BACKGROUND, box_per_class=True)


def _of_sample(labels: Tensor, positive: Sequence[Tensor], negative: Sequence[Tensor]) -> Assignment:
    """The assignment behind losses that are means over a sample of anchors.

    Args:
        labels: shape (batch, anchors), 1 for an object, 0 for none, below 0 where it is unknown.
        positive: one tensor (anchors,) per image, above 0 at the objects' anchors in the sample.
        negative: likewise, the others.
    """
    sampled = torch.stack([a.bool() | b.bool() for a, b in zip(positive, negative, strict=True)])
    return Assignment(sampled.float(), labels > 0, sampled.sum().clamp(min=1).float())


def _of_regions(positive: Tensor) -> Assignment:
    """The assignment behind losses that are means over regions, of which these (regions,) hold an object."""
    amount = torch.tensor(float(max(len(positive), 1)), device=positive.device)
    return Assignment(None, positive[None], amount)
