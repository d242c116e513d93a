"""What it takes to distil a detector of one's own: a ``crosskd.adapters.Adapter`` with a ``Head``.

These detectors have the transform and the backbone of torchvision's, so the adapter derives from the one of
those, which prepares images and runs the backbone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

import crosskd.adapters
from crosskd.adapters import Adapter, Anchors, Batch, Head, OwnOutput
from crosskd.adapters.torchvision.common import TorchvisionAdapter, image_list, targets_of
from crosskd.predictions import Assignment, Predictions
from crosskd.towers import Branch, Tower
from dense_heads.atss import ATSS
from dense_heads.detector import OUTSIDE, Grid, Outputs
from dense_heads.gfl import GFL


class _DenseHead(Head):
    """The head of the detectors of this package; the two differ in name alone."""

    def __init__(self, detector: Any) -> None:
        self.detector = detector
        self.num_classes = detector.num_classes
        head = detector.head
        self.bins = head.bins or 1
        behind = {"regression": head.regression, "centerness": head.centerness}
        predictors = {
            "classification": {"logits": head.logits},
            "regression": {name: module for name, module in behind.items() if module is not None},
        }
        width = detector.backbone.out_channels
        branches = []
        for name, modules in predictors.items():
            tower = Tower.of(getattr(head, f"{name}_tower"), f"{name} tower", width_in=width)
            branches.append(Branch(name, (tower,), modules))
        self.branches = tuple(branches)

    def predict(self, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Runs the head's predictors on a level's tower outputs."""
        return Predictions(*self.detector.head.predict(level, towers["classification"], towers["regression"]))

    def anchors(self, batch: Batch, maps: Sequence[Tensor]) -> Anchors:
        """The detector's grid; ``extra`` tells which anchors of an image are inside of it."""
        grid = self.detector.grid(image_list(batch), maps)
        sizes = tuple(tuple(each.shape[2:]) for each in maps)
        per_level = tuple(grid.level_sizes)
        return Anchors(grid.anchors, per_level, strides=grid.strides, sizes=sizes, extra=grid.inside)

    def decode(self, predictions: Predictions, anchors: Anchors) -> Tensor:
        """Boxes by the detector's own function, in float32 at least."""
        regression = _outputs(predictions).widened().regression
        boxes: Tensor = self.detector.decode(regression, _grid(anchors))
        return boxes

    def losses(
        self, predictions: Predictions, anchors: Anchors, batch: Batch
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The detector's own losses, and the matches that they were made with."""
        grid = _grid(anchors)
        matches = self.detector.match(grid, batch.targets)
        losses = self.detector.losses(_outputs(predictions), grid, matches, batch.targets)
        return losses, self._assignment(matches)

    def assign(self, predictions: Predictions, anchors: Anchors, batch: Batch) -> Assignment:
        """The detector's own matches, which look at places alone."""
        return self._assignment(self.detector.match(_grid(anchors), targets_of(batch, first_label=0)))

    def _assignment(self, matches: Tensor) -> Assignment:
        return Assignment((matches != OUTSIDE).float(), matches >= 0, self.detector.normalizer(matches))


class _GFLHead(_DenseHead):
    head_type = "GFL"


class _ATSSHead(_DenseHead):
    head_type = "ATSS"


class _DenseAdapter(TorchvisionAdapter):
    """Adapter for the detectors of this package."""

    head: type[_DenseHead]

    def __init__(self, detector: Any) -> None:
        super().__init__(detector)
        self.heads = (self.head(detector),)

    def _read_levels(self) -> None:
        """These detectors know their strides."""
        self.strides = tuple(map(float, self.detector.strides))
        self.widths = (self.detector.backbone.out_channels,) * len(self.strides)

    def own_outputs(self, batch: Batch) -> list[OwnOutput]:
        """What the head gives in the detector's own forward."""
        ((_, outputs),) = self.own_head_outputs(batch, [self.detector.head])
        return [OwnOutput(Predictions(*outputs))]


class GFLAdapter(_DenseAdapter):
    """Adapter for `GFL`."""

    head = _GFLHead


class ATSSAdapter(_DenseAdapter):
    """Adapter for `ATSS`."""

    head = _ATSSHead


def adapter_of(detector: nn.Module) -> Adapter:
    """The adapter of a detector, of this package or one that the library knows itself.

    Raises:
        TypeError: no adapter understands it.
    """
    if isinstance(detector, GFL):
        return GFLAdapter(detector)
    if isinstance(detector, ATSS):
        return ATSSAdapter(detector)
    return crosskd.adapters.find_adapter(detector)


def _outputs(predictions: Predictions) -> Outputs:
    return Outputs(predictions.logits, predictions.regression, predictions.quality)


def _grid(anchors: Anchors) -> Grid:
    """Anchors in the detectors' own form."""
    return Grid(anchors.boxes, anchors.strides, list(anchors.per_level), anchors.extra)
