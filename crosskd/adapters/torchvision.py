"""Adapters for torchvision's RetinaNet and FCOS, any backbone, any head norm."""

from __future__ import annotations

import copy
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import (
    RetinaNetClassificationHead,
    RetinaNetHead,
    RetinaNetRegressionHead,
)

from crosskd._checks import compute_dtype
from crosskd.adapters.levels import LevelPairs
from crosskd.adapters.protocol import Inputs
from crosskd.frozen import frozen_copy
from crosskd.head import Branch, Tower
from crosskd.methods import recipes
from crosskd.methods.recipes import HeadRecipe
from crosskd.predictions import Assignment, Predictions, mean_over_ranks

__all__ = [
    "Locations",
    "TorchvisionFCOSAdapter",
    "TorchvisionRetinaNetAdapter",
    "prepare_images",
]

_logger = logging.getLogger("crosskd")
_PROBE_PIXELS = 256


@dataclass(frozen=True, eq=False)
class Locations:
    """Where a batch's predictions stand.

    Attributes:
        anchors: one tensor (anchors, 4) an image, xyxy in resized pixels.
        level_sizes: feature locations a level, without counting the anchors at each.
    """

    anchors: list[Tensor]
    level_sizes: list[int]

    def stacked(self) -> Tensor:
        """All images' anchors, shape (batch, anchors, 4)."""
        return torch.stack(self.anchors)

    def of_levels(self, image: int, levels: LevelPairs) -> Tensor:
        """An image's anchors (anchors, 4) on the teacher's levels that are used."""
        anchors = self.anchors[image]
        per_location = len(anchors) // sum(self.level_sizes)
        by_level = torch.split(anchors, [size * per_location for size in self.level_sizes])
        return torch.cat([by_level[index] for index in levels.of_teacher(len(by_level))])


class _TorchvisionAdapter(ABC):
    """What the two families have in common; each adds its predictors, box coding and assignment."""

    recipe: HeadRecipe
    _family: type[nn.Module]
    _forwards: tuple[tuple[str, type[nn.Module]], ...]

    def supports(self, detector: nn.Module) -> bool:
        """Whether a detector is of this family, or of a class derived from it."""
        return isinstance(detector, self._family)

    # -- construction -------------------------------------------------------------------------

    def num_classes(self, detector: Any) -> int:
        """How many labels the detector knows, the first of them 0."""
        return int(detector.head.classification_head.num_classes)

    def strides(self, detector: Any) -> list[float] | None:
        """Pixels between neighbouring locations a level, or ``None`` where a probe does not pass."""
        backbone = frozen_copy(detector.backbone)
        parameter = next(backbone.parameters(), torch.empty(0))
        pixels = parameter.new_zeros(1, 3, _PROBE_PIXELS, _PROBE_PIXELS)
        try:
            with torch.no_grad():
                maps = _as_list(backbone(pixels))
        except Exception as error:  # noqa: BLE001  # a backbone may refuse this size in any way
            _logger.info("strides not checked at construction, the probe image failed: %s", error)
            return None
        return [_PROBE_PIXELS / feature_map.shape[-1] for feature_map in maps]

    def check_pair(self, teacher: nn.Module, student: nn.Module, levels: LevelPairs) -> None:
        """Raises ``ValueError`` for a pair whose predictions can't be compared."""
        for side, detector in (("teacher", teacher), ("student", student)):
            self._check_head(side, detector)
        self._check_anchors(teacher, student, levels)
        self._check_box_coding(teacher, student)

    def _check_head(self, side: str, detector: Any) -> None:
        for path, known in self._forwards:
            module = detector.get_submodule(path)
            forwards = type(module).forward, known.forward
            if forwards[0] is not forwards[1] or "forward" in vars(module):
                raise ValueError(
                    f"{side}: {path} is a {type(module).__name__} with a forward of its own, which "
                    f"this adapter, made for {known.__name__}, does not know: write an adapter for it "
                    "(crosskd.adapters.Adapter) and pass it as adapter="
                )

    @staticmethod
    def _check_anchors(teacher: Any, student: Any, levels: LevelPairs) -> None:
        for name, scale in (("sizes", levels.scale), ("aspect_ratios", 1.0)):
            generators = (detector.anchor_generator for detector in (teacher, student))
            theirs, ours = (_plain(getattr(g, name, None)) for g in generators)
            if theirs is None or ours is None:
                continue  # a generator of the user's own: compared by its anchors on the first step
            paired = [theirs[i] for i in levels.of_teacher(len(theirs)) if i < len(theirs)]
            expected = len(ours) if levels.teacher is None else len(levels.teacher)
            if not len(paired) == len(ours) == expected:
                raise ValueError(
                    f"the teacher's anchors have {len(theirs)} levels and the student's {len(ours)}, of "
                    f"which {expected} are to be compared: build each with anchors for each of its own "
                    "levels, the shared ones the same"
                )
            if not _scaled_alike(paired, ours, scale):
                times = "" if scale == 1 else f" times {scale:g}, as the strides are"
                raise ValueError(
                    f"anchor {name} differ: {tuple(paired)} (teacher), {ours} (student){times}. Boxes "
                    "predicted from different anchors can't be compared: build both detectors with the same "
                    "anchor_generator, and train the teacher with it"
                )

    def _check_box_coding(self, teacher: Any, student: Any) -> None:
        theirs, ours = (self._coder_settings(detector) for detector in (teacher, student))
        if theirs != ours:
            raise ValueError(
                f"box coding differs: {theirs} (teacher), {ours} (student). Give both the same box "
                "coder, and train the teacher with it"
            )

    def branches(self, detector: nn.Module) -> tuple[Branch, ...]:
        """The classification and the regression branch, each one tower over all levels."""
        branches = []
        for name, predictor_names in self._predictors().items():
            head: Any = detector.get_submodule(f"head.{name}_head")
            predictors = {p: getattr(head, p) for p in predictor_names}
            width = next(iter(predictors.values())).in_channels
            blocks = list(head.conv)
            tower = Tower.of(blocks, f"{name} tower", width_in=None if blocks else width)
            branches.append(Branch(name, (tower,), predictors))
        return tuple(branches)

    # -- one step -----------------------------------------------------------------------------

    def prepare(self, teacher: Any, student: Any, images: Any, targets: Any) -> Inputs:
        """The student's transform, once; the teacher gets its pixels, renormalised."""
        classes = student.head.classification_head.num_classes
        return prepare_images(teacher.transform, student.transform, images, targets, classes)

    def features(self, detector: Any, pixels: Tensor) -> list[Tensor]:
        """The backbone's feature maps."""
        return _as_list(detector.backbone(pixels))

    def locations(self, detector: Any, inputs: Inputs, features: Sequence[Tensor]) -> Locations:
        """The detector's own anchors."""
        anchors = detector.anchor_generator(inputs.extra, list(features))
        return Locations(anchors, [f.shape[-2] * f.shape[-1] for f in features])

    def detect(self, student: nn.Module, images: Any, targets: Any) -> Any:
        """The student's own detections."""
        return student(images)

    def check_locations(self, teacher: Locations, student: Locations, levels: LevelPairs) -> None:
        """Raises ``ValueError`` where the anchors of the two differ."""
        for image, ours in enumerate(student.anchors):
            theirs = teacher.of_levels(image, levels)
            # torchvision rounds anchors to whole pixels, which a factor enlarges.
            rounding = 1e-5 if levels.scale == 1 else max(levels.scale, 1.0)
            scaled = (levels.scale * ours).to(theirs)
            if theirs.shape != ours.shape or not torch.allclose(theirs, scaled, atol=rounding):
                times = "" if levels.scale == 1 else f" times {levels.scale:g}, as the strides are"
                raise ValueError(
                    f"the anchors differ on the first batch: {tuple(theirs.shape)} (teacher), "
                    f"{tuple(ours.shape)} (student){times}, or other places or sizes: give both detectors "
                    "the same anchor_generator"
                )

    def losses(
        self, student: Any, predictions: Predictions, locations: Locations, inputs: Inputs
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The student's own ``compute_loss``, and the matches that it made on the way."""
        losses, matches = _losses_and_matches(
            student,
            inputs.targets,
            self._head_outputs(predictions),
            locations.anchors,
            *self._extra_loss_arguments(locations),
        )
        return losses, self._assignment(student, matches, locations, inputs.targets)

    # -- what differs by family ---------------------------------------------------------------

    @abstractmethod
    def _predictors(self) -> dict[str, tuple[str, ...]]:
        """The predictors' names by branch."""

    @abstractmethod
    def _coder_settings(self, detector: Any) -> dict[str, Any]:
        """What two detectors must share for the same numbers to mean the same box."""

    @abstractmethod
    def _head_outputs(self, predictions: Predictions) -> dict[str, Tensor]:
        """Predictions under the names that torchvision's ``compute_loss`` reads."""

    @abstractmethod
    def _assignment(
        self, student: Any, matches: Tensor, locations: Locations, targets: list[dict[str, Tensor]]
    ) -> Assignment:
        """Turns matches, shape (batch, anchors), into what the methods need."""

    def _extra_loss_arguments(self, locations: Locations) -> tuple[Any, ...]:
        """Further arguments of the detector's ``compute_loss``."""
        return ()


class TorchvisionRetinaNetAdapter(_TorchvisionAdapter):
    """Adapter for ``torchvision.models.detection.RetinaNet``, v1 and v2, any backbone and head norm.

    Example:
        >>> from torchvision.models.detection import retinanet_resnet50_fpn
        >>> detector = retinanet_resnet50_fpn(weights=None, weights_backbone=None)
        >>> TorchvisionRetinaNetAdapter().supports(detector)
        True
    """

    recipe = recipes.RETINANET
    _family = RetinaNet
    _forwards = (
        ("head", RetinaNetHead),
        ("head.classification_head", RetinaNetClassificationHead),
        ("head.regression_head", RetinaNetRegressionHead),
    )

    def predict(self, detector: Any, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Runs the predictors of torchvision's two sub-heads by their own forward."""
        head = detector.head
        logits = _predict(head.classification_head, towers["classification"])
        regression = _predict(head.regression_head, towers["regression"])
        return Predictions(logits, regression, quality=None)

    def decode(self, detector: Any, predictions: Predictions, locations: Locations) -> Tensor:
        """Boxes by the detector's own coder, in float32 at least."""
        deltas = _widened(predictions.regression)
        anchors = locations.stacked().to(deltas.dtype)
        boxes = detector.box_coder.decode_single(deltas.flatten(0, 1), anchors.flatten(0, 1))
        return boxes.view_as(deltas)  # type: ignore[no-any-return]

    def _predictors(self) -> dict[str, tuple[str, ...]]:
        return {"classification": ("cls_logits",), "regression": ("bbox_reg",)}

    def _coder_settings(self, detector: Any) -> dict[str, Any]:
        coders = (detector.box_coder, detector.head.regression_head.box_coder)
        return {
            "weights": [tuple(coder.weights) for coder in coders],
            "bbox_xform_clip": [coder.bbox_xform_clip for coder in coders],
        }

    def _head_outputs(self, predictions: Predictions) -> dict[str, Tensor]:
        return {"cls_logits": predictions.logits, "bbox_regression": predictions.regression}

    def _assignment(
        self, student: Any, matches: Tensor, locations: Locations, targets: list[dict[str, Tensor]]
    ) -> Assignment:
        positive = matches >= 0
        counted = matches != student.proposal_matcher.BETWEEN_THRESHOLDS
        positives = positive.sum(dim=1).clamp(min=1).sum().float()
        return Assignment(counted.float(), positive, mean_over_ranks(positives))


class TorchvisionFCOSAdapter(_TorchvisionAdapter):
    """Adapter for ``torchvision.models.detection.FCOS``, any backbone.

    Example:
        >>> from torchvision.models.detection import fcos_resnet50_fpn
        >>> detector = fcos_resnet50_fpn(weights=None, weights_backbone=None)
        >>> TorchvisionFCOSAdapter().supports(detector)
        True
    """

    recipe = recipes.FCOS
    _family = FCOS
    _forwards = (
        ("head", FCOSHead),
        ("head.classification_head", FCOSClassificationHead),
        ("head.regression_head", FCOSRegressionHead),
    )

    def predict(self, detector: Any, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Runs the predictors of torchvision's two sub-heads by their own forward."""
        head = detector.head
        logits = _predict(head.classification_head, towers["classification"])
        regression, centerness = _predict(head.regression_head, towers["regression"])
        return Predictions(logits, regression, quality=centerness.squeeze(-1))

    def decode(self, detector: Any, predictions: Predictions, locations: Locations) -> Tensor:
        """Boxes by the head's own coder, in float32 at least."""
        sides = _widened(predictions.regression)
        boxes: Tensor = detector.head.box_coder.decode(sides, locations.stacked())
        return boxes

    def _predictors(self) -> dict[str, tuple[str, ...]]:
        return {"classification": ("cls_logits",), "regression": ("bbox_reg", "bbox_ctrness")}

    def _coder_settings(self, detector: Any) -> dict[str, Any]:
        coders = (detector.box_coder, detector.head.box_coder)
        return {"normalize_by_size": [coder.normalize_by_size for coder in coders]}

    def _head_outputs(self, predictions: Predictions) -> dict[str, Tensor]:
        assert predictions.quality is not None
        return {
            "cls_logits": predictions.logits,
            "bbox_regression": predictions.regression,
            "bbox_ctrness": predictions.quality.unsqueeze(-1),
        }

    def _extra_loss_arguments(self, locations: Locations) -> tuple[Any, ...]:
        return (locations.level_sizes,)

    def _assignment(
        self, student: Any, matches: Tensor, locations: Locations, targets: list[dict[str, Tensor]]
    ) -> Assignment:
        positive = matches >= 0
        total = torch.zeros((), device=matches.device)
        for image_matches, anchors, target in zip(matches, locations.anchors, targets, strict=True):
            found = image_matches >= 0
            boxes = target["boxes"][image_matches[found]]
            sides = student.head.box_coder.encode(anchors[found], boxes)  # (positives, 4), l t r b
            total = total + _centerness(sides).sum()
        # At least 1: on a batch without objects the published 1e-6 makes the loss a million times larger.
        return Assignment(None, positive, mean_over_ranks(total).clamp(min=1))


def prepare_images(teacher: Any, student: Any, images: Any, targets: Any, num_classes: int) -> Inputs:
    """Images and targets in torchvision's form, resized once for both detectors.

    For adapters of detectors that preprocess by torchvision's ``GeneralizedRCNNTransform``.

    Args:
        teacher: the teacher's transform; its mean and deviation alone are used.
        student: the student's transform, which normalises, resizes and batches.
        images: tensors (3, height, width) with values from 0 to 1.
        targets: dicts of ``boxes`` (objects, 4), xyxy in pixels, and ``labels`` (objects,), one an image;
            or ``None``.
        num_classes: how many the student predicts, labelled from 0.

    Returns:
        Both detectors' pixels and the resized targets; ``extra`` is the student's ``ImageList``.

    Raises:
        ValueError: images or targets in another form, labels that the student doesn't know, boxes
            without area.
        TypeError: images that are no tensors.
    """
    _check_images(images)
    if targets is not None:
        _check_targets(targets, len(images), num_classes)
    batch, resized_targets = student(list(images), targets)
    if resized_targets is not None:
        _check_boxes(resized_targets)
    teacher_pixels = _renormalized(batch, student, teacher)
    return Inputs(batch.tensors, teacher_pixels, resized_targets, extra=batch)


def _centerness(sides: Tensor) -> Tensor:
    """FCOS's centerness of a point in its box, from its distances (rows, 4) to left, top, right, bottom."""
    left_right, top_bottom = sides[:, [0, 2]], sides[:, [1, 3]]
    ratios = (left_right.amin(1) / left_right.amax(1)) * (top_bottom.amin(1) / top_bottom.amax(1))
    centerness: Tensor = ratios.sqrt()
    return centerness


class _PredictorsOnly:
    """Stands in for one of torchvision's heads in its own forward, as one whose tower is done already."""

    def __init__(self, head: nn.Module) -> None:
        self._head = head

    def conv(self, tower_output: Tensor) -> Tensor:
        return tower_output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)


def _predict(head: nn.Module, tower_output: Tensor) -> Any:
    return type(head).forward(_PredictorsOnly(head), [tower_output])  # type: ignore[arg-type, unused-ignore]


def _losses_and_matches(student: Any, targets: Any, *arguments: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Runs the detector's own ``compute_loss`` and notes the matches that it hands to its head.

    It runs on a shallow copy of the detector, whose head notes and passes on, so that neither is
    changed and a subclass's own assignment is used.
    """
    noted: list[Tensor] = []
    head_loss = student.head.compute_loss

    def note(targets: Any, outputs: Any, anchors: Any, matches: list[Tensor]) -> dict[str, Tensor]:
        noted.extend(matches)
        losses: dict[str, Tensor] = head_loss(targets, outputs, anchors, matches)
        return losses

    head = copy.copy(student.head)
    head.__dict__["compute_loss"] = note
    view = copy.copy(student)
    view.__dict__["_modules"] = {**student._modules, "head": head}
    losses: dict[str, Tensor] = view.compute_loss(targets, *arguments)
    if len(noted) != len(targets):
        raise ValueError(
            f"student: {type(student).__name__}.compute_loss did not call head.compute_loss once with its "
            "matches, so the label assignment can't be shared: write an adapter for this detector "
            "(crosskd.adapters.Adapter) and pass it as adapter="
        )
    return losses, torch.stack(noted)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(compute_dtype(tensor))


def _as_list(features: Any) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features.values())


def _plain(values: Any) -> Any:
    """Nested tuples of numbers, so that settings compare by value."""
    if isinstance(values, list | tuple):
        return tuple(_plain(value) for value in values)
    return float(values) if isinstance(values, int | float) else values


def _scaled_alike(theirs: Sequence[Any], ours: Sequence[Any], scale: float) -> bool:
    """Whether the teacher's numbers a level are the student's times a factor, which anchors round."""
    if scale == 1:
        return tuple(theirs) == tuple(ours)
    pairs = zip(theirs, ours, strict=True)
    return all(
        len(a) == len(b) and all(math.isclose(x, scale * y, rel_tol=0.03) for x, y in zip(a, b, strict=True))
        for a, b in pairs
    )


def _renormalized(batch: ImageList, student: Any, teacher: Any) -> Tensor:
    """The student's pixels under the teacher's mean and deviation, the padding still zero."""
    pixels: Tensor = batch.tensors
    means, stds = (
        [torch.as_tensor(getattr(t, name), dtype=pixels.dtype, device=pixels.device)
         for t in (student, teacher)]
        for name in ("image_mean", "image_std")
    )  # fmt: skip
    if torch.equal(means[0], means[1]) and torch.equal(stds[0], stds[1]):
        return pixels
    scale = (stds[0] / stds[1])[:, None, None]
    shift = ((means[0] - means[1]) / stds[1])[:, None, None]
    renormalized = torch.zeros_like(pixels)
    for index, (height, width) in enumerate(batch.image_sizes):
        own = pixels[index, :, :height, :width]
        renormalized[index, :, :height, :width] = own * scale + shift
    return renormalized


def _check_images(images: Any) -> None:
    """Raises ``ValueError`` or ``TypeError`` for images that aren't in torchvision's form."""
    if isinstance(images, Tensor):
        if images.ndim != 4:
            raise ValueError(
                "images must be a list of tensors (3, height, width) with values from 0 to 1, or one "
                f"tensor (batch, 3, height, width), got shape {tuple(images.shape)}"
            )
    elif not isinstance(images, list | tuple) or not all(isinstance(i, Tensor) for i in images):
        raise TypeError(
            "images must be a list of tensors (3, height, width) with values from 0 to 1, got "
            f"{type(images).__name__}"
        )
    if len(images) == 0:
        raise ValueError("images is empty: a batch needs at least one image")


def _check_targets(targets: Any, images: int, classes: int) -> None:
    """Raises ``ValueError`` for targets that aren't in torchvision's form, before they are resized."""
    if len(targets) != images:
        raise ValueError(f"got {images} images but {len(targets)} targets: one is needed for each")
    for index, target in enumerate(targets):
        if not isinstance(target, Mapping) or not {"boxes", "labels"} <= target.keys():
            raise ValueError(f'targets[{index}] must be a dict with "boxes" and "labels", got {target!r}')
        boxes, labels = target["boxes"], target["labels"]
        if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
            raise ValueError(
                f"targets[{index}] must hold boxes of shape (objects, 4) and labels of shape "
                f"(objects,), got {tuple(boxes.shape)} and {tuple(labels.shape)}"
            )
        if labels.dtype != torch.int64:
            raise ValueError(f"targets[{index}] must hold labels of type torch.int64, got {labels.dtype}")
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(
                f"targets[{index}] has labels from {int(labels.min())} to {int(labels.max())}, but the "
                f"student predicts {classes} classes, labelled 0 to {classes - 1}"
            )


def _check_boxes(targets: list[dict[str, Tensor]]) -> None:
    """Raises ``ValueError`` for boxes, after resizing, that a detector can't learn from."""
    for index, target in enumerate(targets):
        boxes = target["boxes"]
        proper = (boxes[:, 2:] > boxes[:, :2]).all(dim=1) & boxes.isfinite().all(dim=1)
        if not proper.all():
            box = [round(value, 2) for value in boxes[~proper][0].tolist()]
            raise ValueError(
                f"targets[{index}] has {int((~proper).sum())} box(es) without a positive, finite width and "
                f"height, the first, after resizing, {box}: leave them out (boxes are xyxy, in pixels)"
            )
