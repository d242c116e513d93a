"""Adapters for torchvision's detectors, any backbone: RetinaNet and FCOS here, others in their own files."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.retinanet import (
    RetinaNetClassificationHead,
    RetinaNetHead,
    RetinaNetRegressionHead,
)

from crosskd.adapters._torchvision_images import prepare_images
from crosskd.adapters._torchvision_parts import (
    Forwards,
    Locations,
    as_list,
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
from crosskd.adapters._torchvision_ssd import TorchvisionSSDAdapter
from crosskd.adapters._torchvision_two_stage import Regions, TorchvisionFasterRCNNAdapter
from crosskd.adapters.levels import LevelPairs
from crosskd.adapters.protocol import Inputs
from crosskd.head import Branch, Tower
from crosskd.methods import recipes
from crosskd.methods.recipes import HeadRecipe
from crosskd.predictions import Assignment, Predictions, mean_over_ranks

__all__ = [
    "Locations",
    "Regions",
    "TorchvisionFCOSAdapter",
    "TorchvisionFasterRCNNAdapter",
    "TorchvisionRetinaNetAdapter",
    "TorchvisionSSDAdapter",
    "prepare_images",
]


class _TorchvisionAdapter(ABC):
    """What the two families have in common; each adds its predictors, box coding and assignment."""

    recipe: HeadRecipe
    _family: type[nn.Module]
    _forwards: Forwards

    def supports(self, detector: nn.Module) -> bool:
        """Whether a detector is of this family, or of a class derived from it."""
        return isinstance(detector, self._family)

    # -- construction -------------------------------------------------------------------------

    def num_classes(self, detector: Any) -> int:
        """How many labels the detector knows, the first of them 0.

        Raises:
            ValueError: its predictors give numbers for others.
        """
        head = detector.head
        classes, anchors = int(head.classification_head.num_classes), _anchors_of(detector)
        for name, values in self._predicted(classes).items():
            weight = getattr(head.get_submodule(name), "weight", None)
            if anchors is not None and isinstance(weight, Tensor) and len(weight) != anchors * values:
                raise ValueError(
                    f"head.{name} gives {len(weight)} numbers a location, but {anchors} anchors there with "
                    f"{values} each (num_classes is {classes}) need {anchors * values}: build the head with "
                    "the classes and the anchor_generator that it is for, or set its num_classes"
                )
        return classes

    def strides(self, detector: Any) -> list[float] | None:
        """Pixels between neighbouring locations a level, or ``None`` where a probe does not pass."""
        return probed_strides(detector)

    def check_pair(self, teacher: nn.Module, student: nn.Module, levels: LevelPairs) -> None:
        """Raises ``ValueError`` for a pair whose predictions can't be compared."""
        for side, detector in (("teacher", teacher), ("student", student)):
            check_forwards(side, detector, self._forwards)
        check_image_channels(teacher.get_submodule("transform"), student.get_submodule("transform"), levels)
        theirs, ours = (detector.get_submodule("anchor_generator") for detector in (teacher, student))
        check_anchor_settings(theirs, ours, {"sizes": True, "aspect_ratios": False}, levels)
        check_box_coding(self._coder_settings(teacher), self._coder_settings(student))

    def branches(self, detector: nn.Module) -> tuple[Branch, ...]:
        """The classification and the regression branch, each one tower over all levels."""
        branches = []
        for name, predictor_names in self._predictors().items():
            head: Any = detector.get_submodule(f"head.{name}_head")
            predictors = {p: getattr(head, p) for p in predictor_names}
            blocks = list(head.conv)
            width = None if blocks else next(iter(predictors.values())).in_channels
            tower = Tower.of(blocks, f"{name} tower", width_in=width)
            branches.append(Branch(name, (tower,), predictors))
        return tuple(branches)

    # -- one step -----------------------------------------------------------------------------

    def prepare(self, teacher: Any, student: Any, images: Any, targets: Any) -> Inputs:
        """The student's transform, once; the teacher gets its pixels, renormalised."""
        classes = student.head.classification_head.num_classes
        return prepare_images(teacher.transform, student.transform, images, targets, classes)

    def features(self, detector: Any, pixels: Tensor) -> list[Tensor]:
        """The backbone's feature maps."""
        return as_list(detector.backbone(pixels))

    def locations(self, detector: Any, inputs: Inputs, features: Sequence[Tensor]) -> Locations:
        """The detector's own anchors."""
        anchors = detector.anchor_generator(inputs.extra, list(features))
        return Locations(anchors, [f.shape[-2] * f.shape[-1] for f in features])

    def detect(self, student: nn.Module, images: Any, targets: Any) -> Any:
        """The student's own detections."""
        return student(images)

    def check_locations(self, teacher: Locations, student: Locations, levels: LevelPairs) -> None:
        """Raises ``ValueError`` where the anchors of the two differ."""
        check_same_anchors(teacher, student, levels)

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
    def _predicted(self, classes: int) -> dict[str, int]:
        """How many numbers each predictor, by its path in the head, gives for an anchor."""

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
        logits = predict_from_tower(head.classification_head, towers["classification"])
        regression = predict_from_tower(head.regression_head, towers["regression"])
        return Predictions(logits, regression, quality=None)

    def decode(self, detector: Any, predictions: Predictions, locations: Locations) -> Tensor:
        """Boxes by the detector's own coder, in float32 at least."""
        return decode_deltas(detector.box_coder, predictions, locations)

    def _predictors(self) -> dict[str, tuple[str, ...]]:
        return {"classification": ("cls_logits",), "regression": ("bbox_reg",)}

    def _predicted(self, classes: int) -> dict[str, int]:
        return {"classification_head.cls_logits": classes, "regression_head.bbox_reg": 4}

    def _coder_settings(self, detector: Any) -> dict[str, Any]:
        return delta_coder_settings(detector.box_coder, detector.head.regression_head.box_coder)

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
        logits = predict_from_tower(head.classification_head, towers["classification"])
        regression, centerness = predict_from_tower(head.regression_head, towers["regression"])
        return Predictions(logits, regression, quality=centerness.squeeze(-1))

    def decode(self, detector: Any, predictions: Predictions, locations: Locations) -> Tensor:
        """Boxes by the head's own coder, in float32 at least."""
        sides = widened(predictions.regression)
        boxes: Tensor = detector.head.box_coder.decode(sides, locations.stacked())
        return boxes

    def _predictors(self) -> dict[str, tuple[str, ...]]:
        return {"classification": ("cls_logits",), "regression": ("bbox_reg", "bbox_ctrness")}

    def _predicted(self, classes: int) -> dict[str, int]:
        boxes = {"regression_head.bbox_reg": 4, "regression_head.bbox_ctrness": 1}
        return {"classification_head.cls_logits": classes, **boxes}

    def _coder_settings(self, detector: Any) -> dict[str, Any]:
        coders = (detector.box_coder, detector.head.box_coder)
        return {
            "coder": [type(coder).__qualname__ for coder in coders],
            "normalize_by_size": [coder.normalize_by_size for coder in coders],
        }

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


def _anchors_of(detector: Any) -> int | None:
    """Anchors at a location, where the generator tells; as many on each level, which share the head."""
    generator = detector.anchor_generator
    if not all(hasattr(generator, name) for name in ("sizes", "aspect_ratios", "num_anchors_per_location")):
        return None  # of the user's own
    return int(generator.num_anchors_per_location()[0])


def _centerness(sides: Tensor) -> Tensor:
    """FCOS's centerness of a point in its box, from its distances (rows, 4) to left, top, right, bottom."""
    left_right, top_bottom = sides[:, [0, 2]], sides[:, [1, 3]]
    ratios = (left_right.amin(1) / left_right.amax(1)) * (top_bottom.amin(1) / top_bottom.amax(1))
    centerness: Tensor = ratios.sqrt()
    return centerness


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
