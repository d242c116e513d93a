"""Adapters for torchvision's RetinaNet and FCOS, any backbone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from crosskd.adapters.base import Anchors, Batch, Head, OwnOutput
from crosskd.adapters.replacing import replaced
from crosskd.adapters.torchvision.common import (
    TorchvisionAdapter,
    decode_deltas,
    grid_anchors,
    predictors_of,
    targets_of,
    widened,
)
from crosskd.predictions import Assignment, Predictions, positives_of_teacher
from crosskd.towers import Branch, Tower

__all__ = ["TorchvisionFCOS", "TorchvisionRetinaNet"]


class _DenseHead(Head):
    """What the heads of RetinaNet and FCOS have in common: two sub-heads, each a tower over all levels."""

    predictors: Mapping[str, tuple[str, ...]]

    def __init__(self, detector: Any) -> None:
        self.detector = detector
        self.num_classes = int(detector.head.classification_head.num_classes)
        branches, self.rest = [], {}
        for name, names in self.predictors.items():
            head = getattr(detector.head, f"{name}_head")
            self.rest[name] = predictors_of(head)
            predictors = {predictor: getattr(head, predictor) for predictor in names}
            empty = isinstance(head.conv, Sized) and not len(head.conv)
            width = next(iter(predictors.values())).in_channels if empty else None
            branches.append(Branch(name, (Tower.of(head.conv, f"{name} tower", width_in=width),), predictors))
        self.branches = tuple(branches)

    def anchors(self, batch: Batch, maps: Sequence[Tensor]) -> Anchors:
        """The detector's own anchors."""
        return grid_anchors(self.detector.anchor_generator, batch, maps, None)

    def losses(
        self, predictions: Predictions, anchors: Anchors, batch: Batch
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The detector's own ``compute_loss``, and the matches that it hands to its head."""
        return self._run_compute_loss(predictions, anchors, batch.targets, self.detector.head.compute_loss)

    def assign(self, predictions: Predictions, anchors: Anchors, batch: Batch) -> Assignment:
        """The matches of the detector's own ``compute_loss``, which looks at places alone."""
        targets = targets_of(batch, first_label=0)
        return self._run_compute_loss(predictions, anchors, targets, lambda *_: {})[1]

    def _run_compute_loss(
        self, predictions: Predictions, anchors: Anchors, targets: Any, head_loss: Callable[..., Any]
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The detector's own ``compute_loss`` with another one of its head, and the matches given to that."""
        matches: list[Tensor] = []

        def with_matches(*arguments: Any) -> dict[str, Tensor]:
            matches.extend(arguments[-1])
            losses: dict[str, Tensor] = head_loss(*arguments)
            return losses

        further = self.further_arguments(anchors)
        boxes = [anchors.boxes] * len(targets)
        with replaced(self.detector.head, compute_loss=with_matches):
            losses = self.detector.compute_loss(targets, self.outputs(predictions), boxes, *further)
        if len(matches) != len(targets):
            raise ValueError(
                f"{type(self.detector).__name__}.compute_loss did not call head.compute_loss once with its "
                "matches, so the label assignment can't be shared: write an adapter for this detector "
                "(docs/adapters.md)"
            )
        return losses, self.assignment(torch.stack(matches), anchors, targets)

    def outputs(self, predictions: Predictions) -> dict[str, Tensor]:
        """Predictions under the names that torchvision's ``compute_loss`` reads."""
        outputs = {"cls_logits": predictions.logits, "bbox_regression": predictions.regression}
        if predictions.quality is not None:
            outputs["bbox_ctrness"] = predictions.quality.unsqueeze(-1)
        return outputs

    def further_arguments(self, anchors: Anchors) -> tuple[Any, ...]:
        """Further arguments of the detector's ``compute_loss``."""
        return ()

    @abstractmethod
    def assignment(
        self, matches: Tensor, anchors: Anchors, targets: Sequence[Mapping[str, Tensor]]
    ) -> Assignment:
        """Which anchors count, by matches (batch, anchors): an object's index, or below 0 for none."""

    @staticmethod
    def predictions_of(outputs: Mapping[str, Tensor]) -> Predictions:
        """What the head's own forward gave."""
        quality = outputs.get("bbox_ctrness")
        quality = None if quality is None else quality.squeeze(-1)
        return Predictions(outputs["cls_logits"], outputs["bbox_regression"], quality)


class _RetinaNetHead(_DenseHead):
    head_type = "RetinaNet"
    predictors = {"classification": ("cls_logits",), "regression": ("bbox_reg",)}  # noqa: RUF012

    def predict(self, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Runs the predictors of torchvision's two sub-heads by their own forward."""
        logits = self.rest["classification"].forward([towers["classification"]])
        regression = self.rest["regression"].forward([towers["regression"]])
        return Predictions(logits, regression, quality=None)

    def decode(self, predictions: Predictions, anchors: Anchors) -> Tensor:
        """Boxes by the detector's own coder, in float32 at least."""
        return decode_deltas(self.detector.box_coder, predictions, anchors)

    def assignment(
        self, matches: Tensor, anchors: Anchors, targets: Sequence[Mapping[str, Tensor]]
    ) -> Assignment:
        """Anchors between the thresholds don't count; the normalizer is the number of positives."""
        positive = matches >= 0
        label_weights = matches != self.detector.proposal_matcher.BETWEEN_THRESHOLDS
        positives = positive.sum(dim=1).clamp(min=1).sum().float()
        return Assignment(label_weights.float(), positive, positives)


class _FCOSHead(_DenseHead):
    head_type = "FCOS"
    predictors = {"classification": ("cls_logits",), "regression": ("bbox_reg", "bbox_ctrness")}  # noqa: RUF012

    def predict(self, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Runs the predictors of torchvision's two sub-heads by their own forward."""
        logits = self.rest["classification"].forward([towers["classification"]])
        regression, centerness = self.rest["regression"].forward([towers["regression"]])
        return Predictions(logits, regression, quality=centerness.squeeze(-1))

    def decode(self, predictions: Predictions, anchors: Anchors) -> Tensor:
        """Boxes by the head's own coder, in float32 at least."""
        assert anchors.boxes is not None
        sides = widened(predictions.regression)
        boxes: Tensor = self.detector.head.box_coder.decode(sides, anchors.boxes.expand(len(sides), -1, -1))
        return boxes

    def further_arguments(self, anchors: Anchors) -> tuple[Any, ...]:
        """How many anchors each level has."""
        return (list(anchors.per_level),)

    def assignment(
        self, matches: Tensor, anchors: Anchors, targets: Sequence[Mapping[str, Tensor]]
    ) -> Assignment:
        """All points count; the normalizer is the sum of the positives' centerness targets."""
        assert anchors.boxes is not None
        total = torch.zeros((), device=matches.device)
        for of_image, target in zip(matches, targets, strict=True):
            found = of_image >= 0
            boxes = target["boxes"][of_image[found]]
            sides = self.detector.head.box_coder.encode(
                anchors.boxes[found], boxes
            )  # (positives, 4), l t r b
            total = total + _centerness(sides).sum()
        # At least 1: on a batch without objects the published 1e-6 makes the loss a million times larger.
        return Assignment(None, matches >= 0, total.clamp(min=1))

    def assign_unlabelled(self, predictions: Predictions, threshold: float) -> Assignment:
        """The teacher's confident points, whose predicted centerness is summed."""
        return positives_of_teacher(predictions, threshold, sum_quality=True)


class _DenseAdapter(TorchvisionAdapter):
    head: type[_DenseHead]

    def __init__(self, detector: Any) -> None:
        super().__init__(detector)
        self.heads = (self.head(detector),)

    def own_outputs(self, batch: Batch) -> list[OwnOutput]:
        """What the head gives in the detector's own forward."""
        ((_, outputs),) = self.own_head_outputs(batch, [self.detector.head])
        return [OwnOutput(_DenseHead.predictions_of(outputs))]


class TorchvisionRetinaNet(_DenseAdapter):
    """Adapter for ``torchvision.models.detection.RetinaNet``, v1 and v2, any backbone and head norm.

    Example:
        >>> from torchvision.models.detection import retinanet_resnet50_fpn
        >>> adapter = TorchvisionRetinaNet(retinanet_resnet50_fpn(weights=None, weights_backbone=None))
        >>> adapter.strides, adapter.heads[0].head_type
        ((8.0, 16.0, 32.0, 64.0, 128.0), 'RetinaNet')
    """

    head = _RetinaNetHead


class TorchvisionFCOS(_DenseAdapter):
    """Adapter for ``torchvision.models.detection.FCOS``, any backbone.

    Example:
        >>> from torchvision.models.detection import fcos_resnet50_fpn
        >>> adapter = TorchvisionFCOS(fcos_resnet50_fpn(weights=None, weights_backbone=None))
        >>> [branch.name for branch in adapter.heads[0].branches]
        ['classification', 'regression']
    """

    head = _FCOSHead


def _centerness(sides: Tensor) -> Tensor:
    """FCOS's centerness of a point in its box, from its distances (rows, 4) to left, top, right, bottom."""
    left_right, top_bottom = sides[:, [0, 2]], sides[:, [1, 3]]
    ratios = (left_right.amin(1) / left_right.amax(1)) * (top_bottom.amin(1) / top_bottom.amax(1))
    centerness: Tensor = ratios.sqrt()
    return centerness
