"""Adapter for torchvision's SSD and SSDlite: predictors of each level's own, one softmax over the classes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.ssd import SSD, SSDHead, SSDScoringHead
from torchvision.models.detection.ssdlite import SSDLiteHead

from crosskd.adapters._torchvision_images import prepare_images
from crosskd.adapters._torchvision_parts import (
    Locations,
    as_list,
    check_anchor_settings,
    check_box_coding,
    check_forwards,
    check_image_channels,
    check_same_anchors,
    decode_deltas,
    delta_coder_settings,
    probed_strides,
)
from crosskd.adapters.levels import LevelPairs
from crosskd.adapters.protocol import Inputs
from crosskd.head import Branch, Tower
from crosskd.methods.recipes import HeadRecipe
from crosskd.predictions import Assignment, Predictions, mean_over_ranks

__all__ = ["TorchvisionSSDAdapter"]

_BACKGROUND = 0
_BRANCHES = ("classification", "regression")


class TorchvisionSSDAdapter:
    """Adapter for ``torchvision.models.detection.SSD``, with SSD's head or SSDlite's, any backbone.

    Each level has predictors of its own. SSD's are one convolution, so the teacher's head can take over at
    position 0 alone, the feature map itself. SSDlite's are a depthwise convolution, a tower of one block, and
    a 1x1 convolution: positions 0 and 1. Where widths differ, each level gets a projection for each branch.
    An SSD may teach an SSDlite, and the other way round.

    The classes share a softmax, and class 0 is the background: ``num_classes`` counts it, targets' labels
    start at 1, and a ``class_map`` starts with 0.

    Nothing was published for this head; the settings are ours. The split is at position 0. The classification
    loss (`crosskd.losses.softmax_focal_loss`, over all anchors) and the GIoU of the boxes count 1 each, both
    divided by the number of positive anchors, as SSD's own losses are.

    SSD resizes all images to one size, and its anchors are fractions of that. The teacher is given the
    student's resized pixels, so both must be made for one size. A teacher for another size needs a
    ``teacher_view``, in which it resizes the images itself.

    On a level of one location, in a batch of one image, features have no deviation: aligned, they are the
    teacher's own, and the level teaches nothing in that step.

    Example:
        >>> from torchvision.models.detection import ssdlite320_mobilenet_v3_large
        >>> detector = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
        >>> branch = TorchvisionSSDAdapter().branches(detector)[0]
        >>> branch.name, [tower.width_in for tower in branch.towers]
        ('classification', [672, 480, 512, 256, 256, 128])
    """

    recipe = HeadRecipe(
        "SSD",
        0,
        cls_weight=1.0,
        reg_weight=1.0,
        regression="giou",
        background=_BACKGROUND,
    )

    def supports(self, detector: nn.Module) -> bool:
        """Whether a detector is an SSD, or of a class derived from it."""
        return isinstance(detector, SSD)

    # -- construction -------------------------------------------------------------------------

    def num_classes(self, detector: Any) -> int:
        """How many classes share the softmax, the background included."""
        return int(_scoring_head(detector, "classification").num_columns)

    def strides(self, detector: Any) -> list[float] | None:
        """Pixels between neighbouring locations a level, at the detector's own size: no whole numbers.

        ``None`` where a probe does not pass, or where the detector has no size of its own.
        """
        size = _size(detector)
        if size is None:
            return None
        width, height = size
        return probed_strides(detector, (height, width))

    def check_pair(self, teacher: Any, student: Any, levels: LevelPairs) -> None:
        """Raises ``ValueError`` for a pair whose predictions can't be compared."""
        for side, detector in (("teacher", teacher), ("student", student)):
            _check_forwards_of(side, detector)
            try:
                _check_anchor_counts(detector)
            except ValueError as error:
                raise ValueError(f"{side}: {error}") from error
        check_image_channels(teacher.transform, student.transform, levels)
        _check_sizes(teacher, student, levels)
        # Fractions of the image, so that a teacher for images of another size has the same numbers.
        relative = {"aspect_ratios": False, "scales": False, "steps": False, "clip": False}
        check_anchor_settings(_AnchorSettings.of(teacher), _AnchorSettings.of(student), relative, levels)
        check_box_coding(delta_coder_settings(teacher.box_coder), delta_coder_settings(student.box_coder))

    def branches(self, detector: nn.Module) -> tuple[Branch, ...]:
        """The classification and the regression branch, each of one tower a level."""
        return tuple(_branch(name, _scoring_head(detector, name)) for name in _BRANCHES)

    # -- one step -----------------------------------------------------------------------------

    def prepare(self, teacher: Any, student: Any, images: Any, targets: Any) -> Inputs:
        """The student's transform, once; the teacher gets its pixels, renormalised."""
        transforms, classes = (teacher.transform, student.transform), self.num_classes(student)
        return prepare_images(*transforms, images, targets, classes, first_label=_BACKGROUND + 1)

    def features(self, detector: Any, pixels: Tensor) -> list[Tensor]:
        """The backbone's feature maps."""
        return as_list(detector.backbone(pixels))

    def predict(self, detector: nn.Module, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Runs the level's predictors, in torchvision's two sub-heads' own forward and order."""
        logits, regression = (
            _predict(_scoring_head(detector, name), level, towers[name]) for name in _BRANCHES
        )
        return Predictions(logits, regression, None, background=_BACKGROUND)

    def locations(self, detector: Any, inputs: Inputs, features: Sequence[Tensor]) -> Locations:
        """The detector's own anchors, called default boxes there."""
        anchors = detector.anchor_generator(inputs.extra, list(features))
        per_location = _per_location(_scoring_head(detector, "regression"))
        return Locations(anchors, [f.shape[-2] * f.shape[-1] for f in features], per_location)

    def decode(self, detector: Any, predictions: Predictions, locations: Locations) -> Tensor:
        """Boxes by the detector's own coder, in float32 at least."""
        return decode_deltas(detector.box_coder, predictions, locations)

    def losses(
        self, student: Any, predictions: Predictions, locations: Locations, inputs: Inputs
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The student's own ``compute_loss``, with the matches that its own forward makes."""
        losses, matches = _losses_and_matches(student, predictions, locations, inputs)
        positive = matches >= 0
        normalizer = mean_over_ranks(positive.sum().clamp(min=1).float())
        return losses, Assignment(None, positive, normalizer)

    def detect(self, student: nn.Module, images: Any, targets: Any) -> Any:
        """The student's own detections."""
        return student(images)

    def check_locations(self, teacher: Locations, student: Locations, levels: LevelPairs) -> None:
        """Raises ``ValueError`` where the anchors of the two differ."""
        check_same_anchors(teacher, student, levels)


# -- the head -------------------------------------------------------------------------------------


def _scoring_head(detector: nn.Module, branch: str) -> SSDScoringHead:
    head = detector.get_submodule("head")
    found = getattr(head, f"{branch}_head", None)
    if not isinstance(found, SSDScoringHead):
        raise ValueError(
            f"head.{branch}_head is a {type(found).__name__}: this adapter knows torchvision's "
            "SSDScoringHead; write an adapter for it (crosskd.adapters.Adapter) and pass it as adapter="
        )
    return found


def _branch(name: str, head: SSDScoringHead) -> Branch:
    towers, predictors = [], {}
    for level in range(len(head.module_list)):
        path, layers, predictor = _split(head, level)
        title = f"{name} tower of level {level}"
        towers.append(Tower.of(layers, title, width_in=None if layers else predictor.in_channels))
        predictors[path] = predictor
    return Branch(name, tuple(towers), predictors)


def _split(head: SSDScoringHead, level: int) -> tuple[str, list[nn.Module], nn.Conv2d]:
    """A level's path to its predictor, the layers of its tower, and its predictor."""
    of_level, path = head.module_list[level], f"module_list.{level}"
    layers = [of_level]
    if isinstance(of_level, nn.Sequential) and type(of_level).forward is nn.Sequential.forward:
        layers = list(of_level)
        path = f"{path}.{len(layers) - 1}"
    predictor = layers.pop() if layers else None
    if not isinstance(predictor, nn.Conv2d):
        raise ValueError(
            f"{path} of a {type(head).__name__} is a {type(predictor).__name__}: this adapter expects, for "
            "each level, an nn.Conv2d, or an nn.Sequential that ends in one; for other predictors write an "
            "adapter (crosskd.adapters.Adapter) and pass it as adapter="
        )
    return path, layers, predictor


def _per_location(head: SSDScoringHead) -> list[int]:
    """Anchors at each location, a level, as a sub-head's predictors have them."""
    predictors = [_split(head, level)[2] for level in range(len(head.module_list))]
    return [predictor.out_channels // head.num_columns for predictor in predictors]


class _OneLevel:
    """Stands in for a sub-head in its own forward, as one of one level whose tower is done already."""

    def __init__(self, head: SSDScoringHead, predictor: nn.Module) -> None:
        self.num_columns = head.num_columns
        self._predictor = predictor

    def _get_result_from_module_list(self, features: Tensor, level: int) -> Any:
        return self._predictor(features)


def _predict(head: SSDScoringHead, level: int, tower_output: Tensor) -> Tensor:
    """A level's rows (batch, anchors, columns), laid out by the sub-head's own forward."""
    stand_in: Any = _OneLevel(head, _split(head, level)[2])
    rows: Tensor = type(head).forward(stand_in, [tower_output])
    return rows


# -- what a pair must share -----------------------------------------------------------------------


@dataclass(frozen=True)
class _AnchorSettings:
    """What makes a detector's anchors, one value a level; ``None`` for what tells nothing beforehand.

    Attributes:
        aspect_ratios: of the anchors at a location.
        scales: of a level's squares, the smaller and what the larger is made of, as a share of the image.
        steps: pixels between locations, as shares of the image's width and height.
        clip: whether anchors end at the image's size.
    """

    aspect_ratios: Any
    scales: Any
    steps: Any
    clip: Any

    @classmethod
    def of(cls, detector: nn.Module) -> _AnchorSettings:
        """Those of a detector's generator, as far as it has torchvision's names for them."""
        generator, size = detector.get_submodule("anchor_generator"), _size(detector)
        ratios, scales, steps, clip = (
            getattr(generator, name, None) for name in ("aspect_ratios", "scales", "steps", "clip")
        )
        levels = None if ratios is None else len(ratios)
        return cls(
            aspect_ratios=ratios,
            # A level's larger square lies between its scale and the next level's.
            scales=None if scales is None else list(pairwise(scales))[:levels],
            steps=None if not steps or size is None else [[step / side for side in size] for step in steps],
            clip=None if clip is None or levels is None else [bool(clip)] * levels,
        )


def _size(detector: Any) -> tuple[int, int] | None:
    """(width, height) that all images are resized to, if they are."""
    size = getattr(detector.transform, "fixed_size", None)
    return None if size is None else (int(size[0]), int(size[1]))


def _check_forwards_of(side: str, detector: nn.Module) -> None:
    """Raises ``ValueError`` for a detector that computes otherwise than torchvision's."""
    known = SSDLiteHead if isinstance(detector.get_submodule("head"), SSDLiteHead) else SSDHead
    check_forwards(side, detector, [("", SSD), ("head", known)])
    for name in _BRANCHES:
        path = f"head.{name}_head"
        check_forwards(side, detector, [(path, SSDScoringHead)])
        head = type(detector.get_submodule(path))
        method = "_get_result_from_module_list"
        if getattr(head, method, None) is not getattr(SSDScoringHead, method):
            raise ValueError(
                f"{side}: {path} is a {head.__name__} with a {method} of its own, which this adapter does "
                "not know: write an adapter for it (crosskd.adapters.Adapter) and pass it as adapter="
            )


def _check_anchor_counts(detector: Any) -> None:
    """Raises ``ValueError`` for a head that was built for other anchors than the detector has."""
    by_head = {name: _per_location(_scoring_head(detector, name)) for name in _BRANCHES}
    counts = getattr(detector.anchor_generator, "num_anchors_per_location", None)
    expected = next(iter(by_head.values())) if counts is None else list(counts())
    for name, found in by_head.items():
        if found != expected:
            raise ValueError(
                f"head.{name}_head predicts for {found} anchors at a location, a level, and there are "
                f"{expected}: build the head with anchor_generator.num_anchors_per_location()"
            )


def _check_sizes(teacher: nn.Module, student: nn.Module, levels: LevelPairs) -> None:
    """Raises ``ValueError`` where the teacher would see images of a size that it wasn't made for."""
    theirs, ours = _size(teacher), _size(student)
    if theirs != ours and not levels.own_view:
        raise ValueError(
            f"images are resized to {_text(theirs)} (teacher), {_text(ours)} (student). The teacher is given "
            "the student's resized images, a size that it wasn't trained for: build both with the same "
            "size=, or pass teacher_view=, with which the teacher resizes the images itself"
        )


def _text(size: tuple[int, int] | None) -> str:
    return "no fixed size" if size is None else f"{size[0]} x {size[1]} pixels"


# -- the student's own losses ---------------------------------------------------------------------


def _losses_and_matches(
    student: Any, predictions: Predictions, locations: Locations, inputs: Inputs
) -> tuple[dict[str, Tensor], Tensor]:
    """Runs the detector's own forward from the predictions on, and notes its matches (batch, anchors).

    It runs on a shallow copy of the detector, whose transform, backbone, head and anchor generator answer
    what is there already, so that the detector itself isn't changed.
    """
    noted: list[Tensor] = []

    def compute_loss(
        targets: Any, outputs: Any, anchors: Any, matches: list[Tensor], *others: Any
    ) -> dict[str, Tensor]:
        noted.extend(matches)
        losses: dict[str, Tensor] = student.compute_loss(targets, outputs, anchors, matches, *others)
        return losses

    outputs = {"bbox_regression": predictions.regression, "cls_logits": predictions.logits}
    view = copy.copy(student)
    view.__dict__.update(
        transform=lambda images, targets: (inputs.extra, targets),
        backbone=lambda pixels: {},
        head=lambda features: outputs,
        anchor_generator=lambda images, features: locations.anchors,
        compute_loss=compute_loss,
    )
    losses: dict[str, Tensor] = type(student).forward(view, inputs.extra.tensors, inputs.targets)
    return losses, torch.stack(noted)
