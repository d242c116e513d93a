"""What it takes to distil a detector of one's own: the functions of ``crosskd.adapters.Adapter``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crosskd.adapters import Inputs
from crosskd.adapters.levels import LevelPairs
from crosskd.adapters.torchvision import prepare_images
from crosskd.head import Branch, Tower
from crosskd.methods import recipes
from crosskd.methods.recipes import HeadRecipe
from crosskd.predictions import Assignment, Predictions
from dense_heads.atss import ATSS
from dense_heads.detector import OUTSIDE, DenseDetector, Grid, Outputs
from dense_heads.gfl import GFL


class _DenseHeadsAdapter:
    """Adapter for the detectors of this package; the families differ in their published settings alone."""

    recipe: HeadRecipe
    family: type[DenseDetector]

    def supports(self, detector: nn.Module) -> bool:
        """Whether a detector is of this family."""
        return isinstance(detector, self.family)

    def num_classes(self, detector: Any) -> int:
        """How many classes the detector knows."""
        return int(detector.num_classes)

    def strides(self, detector: Any) -> tuple[int, ...]:
        """Pixels between neighbouring locations a level."""
        strides: tuple[int, ...] = detector.strides
        return strides

    def check_pair(self, teacher: nn.Module, student: nn.Module, levels: LevelPairs) -> None:
        """Raises ``ValueError`` for a pair whose predictions can't be compared."""
        why = {
            "anchor_scale": "boxes predicted from different anchors can't be compared",
            "reg_max": "distributions over different bins can't be compared",
        }
        for name, advice in why.items():
            theirs, ours = (getattr(detector, name, None) for detector in (teacher, student))
            if theirs != ours:
                raise ValueError(
                    f"{name} differs: {theirs} (teacher), {ours} (student): {advice}. Build both with the "
                    f"same {name}, and train the teacher with it"
                )

    def branches(self, detector: Any) -> tuple[Branch, ...]:
        """The two towers, each one over all levels, with the predictors behind it."""
        head = detector.head
        behind = {"regression": head.regression, "centerness": head.centerness}
        predictors = {
            "classification": {"logits": head.logits},
            "regression": {name: module for name, module in behind.items() if module is not None},
        }
        width = detector.backbone.out_channels
        return tuple(
            Branch(
                name, (Tower.of(getattr(head, f"{name}_tower"), f"{name} tower", width_in=width),), modules
            )
            for name, modules in predictors.items()
        )

    def prepare(self, teacher: Any, student: Any, images: Any, targets: Any) -> Inputs:
        """The student's transform, once; the teacher gets the same pixels."""
        return prepare_images(teacher.transform, student.transform, images, targets, student.num_classes)

    def features(self, detector: Any, pixels: Tensor) -> list[Tensor]:
        """The pyramid's feature maps."""
        return list(detector.backbone(pixels).values())

    def predict(self, detector: Any, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Runs the head's predictors on a level's tower outputs."""
        return Predictions(*detector.head.predict(level, towers["classification"], towers["regression"]))

    def locations(self, detector: Any, inputs: Inputs, features: Sequence[Tensor]) -> Grid:
        """The detector's anchors."""
        grid: Grid = detector.grid(inputs.extra, features)
        return grid

    def decode(self, detector: Any, predictions: Predictions, locations: Grid) -> Tensor:
        """Boxes by the detector's own function, in float32 at least."""
        boxes: Tensor = detector.decode(_outputs(predictions).widened().regression, locations)
        return boxes

    def losses(
        self, student: Any, predictions: Predictions, locations: Grid, inputs: Inputs
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The detector's own losses, and the matches that they were made with."""
        matches = student.match(locations, inputs.targets)
        losses = student.losses(_outputs(predictions), locations, matches, inputs.targets)
        counted = (matches != OUTSIDE).float()
        return losses, Assignment(counted, matches >= 0, student.normalizer(matches))

    def detect(self, student: nn.Module, images: Any, targets: Any) -> Any:
        """The student's own detections."""
        return student(images)

    def check_locations(self, teacher: Grid, student: Grid, levels: LevelPairs) -> None:
        """Raises ``ValueError`` where the anchors of the two differ."""
        by_level = teacher.anchors.split(teacher.level_sizes)
        paired = torch.cat([by_level[level] for level in levels.of_teacher(len(by_level))])
        if paired.shape != student.anchors.shape or not paired.equal(levels.scale * student.anchors):
            raise ValueError("the anchors differ on the first batch: build both detectors with the same grid")


class GFLAdapter(_DenseHeadsAdapter):
    """Adapter for `GFL`."""

    recipe = recipes.GFL
    family = GFL


class ATSSAdapter(_DenseHeadsAdapter):
    """Adapter for `ATSS`."""

    recipe = recipes.ATSS
    family = ATSS


def adapter_of(*detectors: nn.Module) -> GFLAdapter | ATSSAdapter | None:
    """The adapter for detectors of this package, ``None`` for others, which the library may know itself."""
    for adapter in (GFLAdapter(), ATSSAdapter()):
        if all(adapter.supports(detector) for detector in detectors):
            return adapter
    return None


def _outputs(predictions: Predictions) -> Outputs:
    return Outputs(predictions.logits, predictions.regression, predictions.quality)
