"""Adapter for torchvision's Faster R-CNN: its region proposal network, and its box head on the proposals."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, permute_and_flatten

from crosskd.adapters._torchvision_images import prepare_images
from crosskd.adapters._torchvision_parts import (
    Locations,
    check_anchor_settings,
    check_box_coding,
    check_forwards,
    check_image_channels,
    check_same_anchors,
    decode_deltas,
    delta_coder_settings,
    predict_from_tower,
    probed_strides,
    widened,
)
from crosskd.adapters.levels import LevelPairs
from crosskd.adapters.protocol import Inputs
from crosskd.head import Block, Branch, Tower
from crosskd.methods.recipes import HeadRecipe
from crosskd.predictions import Assignment, Predictions, mean_over_ranks

__all__ = ["Regions", "TorchvisionFasterRCNNAdapter"]

_BACKGROUND = 0

# TwoMLPHead runs these as functions.
_FLATTEN = nn.Flatten()
_RELU = nn.ReLU()


class _NamedMaps(list[Tensor]):
    """Feature maps, finest first, that know their names, by which a box head chooses those that it pools."""

    def __init__(self, maps: Mapping[str, Tensor]) -> None:
        super().__init__(maps.values())
        self.by_name = dict(maps)


@dataclass(frozen=True, eq=False)
class Regions:
    """What the student's box head answers for.

    Attributes:
        boxes: one tensor (regions, 4) an image, xyxy in the student's resized pixels.
        image_sizes: (height, width) of the student's resized images.
        labels: with targets, one tensor (regions,) an image: each region's class, 0 for the background.
        deltas: with targets, one tensor (regions, 4) an image: from each region to its object.
    """

    boxes: list[Tensor]
    image_sizes: list[tuple[int, int]]
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


class TorchvisionFasterRCNNAdapter:
    """Adapter for ``torchvision.models.detection.FasterRCNN``, v1 and v2, any backbone.

    The first head, ``"rpn"``, is the region proposal network: one tower of convolutions that objectness and
    boxes share. The second, ``"box"``, is the box head, fully connected or convolutional (v2), with a softmax
    over the classes and a box for each of them. It answers for the student's own proposals, which each
    detector pools from its own maps; so the two box heads may stand on any levels.

    Nothing was published for these heads. Both are split as late as leaves the teacher's tower a block,
    and both losses count 1. The distillation hears the same sample of anchors and regions that the student's
    own losses are means over, and is divided by their number likewise.

    Example:
        >>> from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn
        >>> detector = fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None)
        >>> TorchvisionFasterRCNNAdapter().supports(detector)
        True
    """

    recipe = HeadRecipe("Faster R-CNN's RPN", None, cls_weight=1.0, reg_weight=1.0, regression="giou")
    parts = ("rpn", "box")

    def __init__(self) -> None:
        self.second = _BoxHead()

    def supports(self, detector: nn.Module) -> bool:
        """Whether a detector is a Faster R-CNN, or of a class derived from it."""
        return isinstance(detector, FasterRCNN)

    # -- construction -------------------------------------------------------------------------

    def num_classes(self, detector: nn.Module) -> int:
        """One: whether there is an object."""
        return 1

    def strides(self, detector: Any) -> list[float] | None:
        """Pixels between neighbouring locations a level, or ``None`` where a probe does not pass."""
        return probed_strides(detector)

    def check_pair(self, teacher: Any, student: Any, levels: LevelPairs) -> None:
        """Raises ``ValueError`` for two region proposal networks that can't be compared."""
        for side, detector in (("student", student), ("teacher", teacher)):
            _check_box_detector(side, detector)
            check_forwards(side, detector, [("rpn.head", RPNHead)])
        check_image_channels(teacher.transform, student.transform, levels)
        settings = {"sizes": True, "aspect_ratios": False}
        check_anchor_settings(teacher.rpn.anchor_generator, student.rpn.anchor_generator, settings, levels)
        theirs, ours = (detector.rpn.box_coder for detector in (teacher, student))
        check_box_coding(delta_coder_settings(theirs), delta_coder_settings(ours))

    def branches(self, detector: Any) -> tuple[Branch, ...]:
        """One branch of one tower over all levels."""
        head = detector.rpn.head
        blocks = list(head.conv)
        tower = Tower.of(blocks, "rpn tower", width_in=None if blocks else head.cls_logits.in_channels)
        return (Branch("rpn", (tower,), {"cls_logits": head.cls_logits, "bbox_pred": head.bbox_pred}),)

    # -- one step -----------------------------------------------------------------------------

    def prepare(self, teacher: Any, student: Any, images: Any, targets: Any) -> Inputs:
        """The student's transform, once; the teacher gets its pixels, renormalised."""
        classes = self.second.num_classes(student)
        transforms = teacher.transform, student.transform
        return prepare_images(*transforms, images, targets, classes, first_label=_BACKGROUND + 1)

    def features(self, detector: Any, pixels: Tensor) -> list[Tensor]:
        """The backbone's feature maps."""
        maps = detector.backbone(pixels)
        return _NamedMaps({"0": maps} if isinstance(maps, Tensor) else maps)

    def predict(self, detector: Any, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Objectness and boxes, by the head's own forward and in torchvision's order."""
        (objectness,), (deltas,) = predict_from_tower(detector.rpn.head, towers["rpn"])
        batch, anchors, height, width = objectness.shape
        logits, regression = (
            permute_and_flatten(layer, batch, anchors, numbers, height, width)
            for layer, numbers in ((objectness, 1), (deltas, 4))
        )
        return Predictions(logits, regression, quality=None)

    def locations(self, detector: Any, inputs: Inputs, features: Sequence[Tensor]) -> Locations:
        """The detector's own anchors."""
        anchors = detector.rpn.anchor_generator(inputs.extra, list(features))
        return Locations(anchors, [f.shape[-2] * f.shape[-1] for f in features])

    def decode(self, detector: Any, predictions: Predictions, locations: Locations) -> Tensor:
        """Boxes by the detector's own coder, in float32 at least."""
        return decode_deltas(detector.rpn.box_coder, predictions, locations)

    def losses(
        self, student: Any, predictions: Predictions, locations: Locations, inputs: Inputs
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The network's own losses, and the sample of anchors that they were made on."""
        rpn = student.rpn
        labels, boxes = rpn.assign_targets_to_anchors(locations.anchors, inputs.targets)
        targets = rpn.box_coder.encode(boxes, locations.anchors)
        noting = _NotingSampler(rpn.fg_bg_sampler)
        # On a shallow copy, so that the network itself keeps its sampler.
        view = copy.copy(rpn)
        view.__dict__["fg_bg_sampler"] = noting
        flat = predictions.logits.flatten(0, 1), predictions.regression.flatten(0, 1)
        objectness, box = view.compute_loss(*flat, labels, targets)
        if not noting.chosen:
            raise ValueError(
                f"student: {type(rpn).__name__}.compute_loss did not call fg_bg_sampler, so the sample of "
                "anchors can't be shared: write an adapter for this detector "
                "(crosskd.adapters.TwoStageAdapter) and pass it as adapter="
            )
        losses = {"loss_objectness": objectness, "loss_rpn_box_reg": box}
        return losses, _sampled(torch.stack(labels), noting.sampled())

    def assign_unlabelled(self, student: Any, teacher: Predictions, threshold: float) -> Assignment:
        """The network's own sampling, of anchors that the teacher holds for objects and of others."""
        labels = (teacher.confidence() >= threshold).float()
        noting = _NotingSampler(student.rpn.fg_bg_sampler)
        noting(list(labels))
        return _sampled(labels, noting.sampled())

    def detect(self, student: nn.Module, images: Any, targets: Any) -> Any:
        """The student's own detections."""
        return student(images)

    def check_locations(self, teacher: Locations, student: Locations, levels: LevelPairs) -> None:
        """Raises ``ValueError`` where the anchors of the two differ."""
        check_same_anchors(teacher, student, levels)


class _BoxHead:
    """The second stage: torchvision's box head on the student's own proposals."""

    recipe = HeadRecipe(
        "Faster R-CNN's box head",
        None,
        cls_weight=1.0,
        reg_weight=1.0,
        regression="giou",
        background=_BACKGROUND,
    )

    # -- construction -------------------------------------------------------------------------

    def num_classes(self, detector: Any) -> int:
        """How many classes there are, with the background, which is 0."""
        predictor = detector.roi_heads.box_predictor
        if not isinstance(predictor, FastRCNNPredictor):
            raise ValueError(
                f"roi_heads.box_predictor is a {type(predictor).__name__}: this adapter knows torchvision's "
                "FastRCNNPredictor; write an adapter for it (crosskd.adapters.TwoStageAdapter) and pass it "
                "as adapter="
            )
        return int(predictor.cls_score.out_features)

    def check_pair(self, teacher: Any, student: Any) -> None:
        """Raises ``ValueError`` for two box heads that can't be compared."""
        for side, detector in (("student", student), ("teacher", teacher)):
            _check_box_detector(side, detector)
            check_forwards(side, detector, [("roi_heads.box_predictor", FastRCNNPredictor)])
            head = detector.roi_heads.box_head
            known = TwoMLPHead if isinstance(head, TwoMLPHead) else FastRCNNConvFCHead
            check_forwards(side, detector, [("roi_heads.box_head", known)])
        theirs, ours = (tuple(d.roi_heads.box_roi_pool.output_size) for d in (teacher, student))
        if theirs != ours:
            raise ValueError(
                f"regions are pooled to {theirs} (teacher), {ours} (student) as (height, width): give both "
                "the same output_size of roi_heads.box_roi_pool, and train the teacher with it"
            )
        theirs, ours = (detector.roi_heads.box_coder for detector in (teacher, student))
        check_box_coding(delta_coder_settings(theirs), delta_coder_settings(ours))

    def branches(self, detector: Any) -> tuple[Branch, ...]:
        """One branch, whose tower takes pooled maps and ends in vectors."""
        roi_heads = detector.roi_heads
        head, locations = roi_heads.box_head, math.prod(roi_heads.box_roi_pool.output_size)
        if isinstance(head, TwoMLPHead):
            blocks = (Block((_FLATTEN, head.fc6), _RELU), Block((head.fc7,), _RELU))
            tower = Tower("box tower", blocks, head.fc6.in_features // locations)
        else:
            layers = list(head)
            convolutions = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
            linear = next(m for m in head.modules() if isinstance(m, nn.Linear))
            width = convolutions[0].in_channels if convolutions else linear.in_features // locations
            tower = Tower.of(layers, "box tower", width_in=width, channels_last=False)
        predictor = roi_heads.box_predictor
        predictors = {"cls_score": predictor.cls_score, "bbox_pred": predictor.bbox_pred}
        return (Branch("box", (tower,), predictors),)

    # -- one step -----------------------------------------------------------------------------

    def regions(
        self, student: Any, predictions: Predictions, locations: Locations, inputs: Inputs
    ) -> Regions:
        """The student's own proposals: the sample that its losses are made on, or as many of the best."""
        rpn, roi_heads, sizes = student.rpn, student.roi_heads, inputs.extra.image_sizes
        boxes = rpn.box_coder.decode(predictions.regression.flatten(0, 1), locations.anchors)
        boxes, objectness = boxes.view(len(sizes), -1, 4), predictions.logits.flatten(0, 1)
        proposals, _ = rpn.filter_proposals(boxes, objectness, sizes, locations.per_level())
        if inputs.targets is None:
            most = roi_heads.fg_bg_sampler.batch_size_per_image
            return Regions([of_image[:most] for of_image in proposals], sizes)
        proposals, _, labels, deltas = roi_heads.select_training_samples(proposals, inputs.targets)
        return Regions(proposals, sizes, labels, list(deltas))

    def counts(self, regions: Regions) -> list[int]:
        """How many regions each image has."""
        return [len(of_image) for of_image in regions.boxes]

    def features(
        self, detector: Any, maps: Sequence[Tensor], regions: Regions, inputs: Inputs
    ) -> list[Tensor]:
        """What the detector pools at the regions, shape (regions, channels, height, width)."""
        assert isinstance(maps, _NamedMaps)
        sizes = inputs.extra.image_sizes
        return [detector.roi_heads.box_roi_pool(maps.by_name, regions.within(sizes), sizes)]

    def predict(self, detector: Any, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Classes, and a box for each of them, by the detector's own predictor."""
        logits, deltas = detector.roi_heads.box_predictor(towers["box"])
        regression = deltas.view(1, *logits.shape, 4)
        return Predictions(logits[None], regression, None, background=_BACKGROUND, box_per_class=True)

    def decode(self, detector: Any, predictions: Predictions, regions: Regions) -> Tensor:
        """Boxes (1, regions, classes, 4) by the detector's own coder, in float32 at least."""
        deltas = widened(predictions.regression)
        boxes = [of_image.to(deltas.dtype) for of_image in regions.boxes]
        decoded: Tensor = detector.roi_heads.box_coder.decode(deltas[0].flatten(1), boxes)
        return decoded[None]

    def losses(
        self, student: Any, predictions: Predictions, regions: Regions, inputs: Inputs
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The box head's own losses, which are means over the regions."""
        assert regions.labels is not None
        assert regions.deltas is not None
        deltas = predictions.regression[0].flatten(1)
        classifier, box = fastrcnn_loss(predictions.logits[0], deltas, regions.labels, regions.deltas)
        positive = torch.cat(regions.labels) > _BACKGROUND
        return {"loss_classifier": classifier, "loss_box_reg": box}, _of_regions(positive)

    def assign_unlabelled(self, student: Any, teacher: Predictions, threshold: float) -> Assignment:
        """All regions count; those that the teacher holds for objects are the positives."""
        return _of_regions(teacher.confidence()[0] >= threshold)


class _NotingSampler:
    """Samples as another does, and keeps what it has chosen."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.chosen: list[Tensor] = []

    def __call__(self, labels: list[Tensor]) -> Any:
        positive, negative = self._sampler(labels)
        self.chosen = [a.bool() | b.bool() for a, b in zip(positive, negative, strict=True)]
        return positive, negative

    def sampled(self) -> Tensor:
        """Which anchors were chosen, shape (batch, anchors)."""
        return torch.stack(self.chosen)


def _sampled(labels: Tensor, sampled: Tensor) -> Assignment:
    """The assignment behind losses that are means over a sample.

    Args:
        labels: shape (batch, anchors), 1 for an object, 0 for none, below 0 where it can't be told.
        sampled: shape (batch, anchors).
    """
    normalizer = mean_over_ranks(sampled.sum().clamp(min=1).float())
    return Assignment(sampled.float(), labels > 0, normalizer)


def _of_regions(positive: Tensor) -> Assignment:
    """The assignment behind losses that are means over regions, of which these (regions,) hold an object."""
    amount = torch.tensor(float(max(len(positive), 1)), device=positive.device)
    return Assignment(None, positive[None], mean_over_ranks(amount))


def _check_box_detector(side: str, detector: Any) -> None:
    """Raises ``ValueError`` for a detector that computes otherwise than Faster R-CNN, or predicts more."""
    further = [name for name in ("mask", "keypoint") if getattr(detector.roi_heads, f"has_{name}")()]
    if further:
        raise ValueError(
            f"{side}: a {type(detector).__name__}, whose {' and '.join(further)} head this adapter does not "
            "train: use a FasterRCNN, or write an adapter for it (crosskd.adapters.TwoStageAdapter)"
        )
    whole = [("", GeneralizedRCNN), ("rpn", RegionProposalNetwork), ("roi_heads", RoIHeads)]
    check_forwards(side, detector, whole)
