"""The losses between predictions that CrossKD and prediction mimicking share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from crosskd._checks import require_not_negative
from crosskd.adapters.base import Head
from crosskd.losses import (
    distribution_kl_loss,
    giou_loss,
    iou_loss,
    quality_focal_loss,
    softmax_focal_loss,
)
from crosskd.methods.settings import RegressionLoss, settings_for
from crosskd.predictions import Assignment, Predictions, mean_over_ranks
from crosskd.step import Side

__all__ = ["Comparison"]

# Distributions are averaged by the teacher's confidence. Where it is sure of nothing at all there is
# nothing to average, and the loss is 0 instead of 0 / 0.
_SMALLEST_CONFIDENCE = 1e-6


@dataclass(frozen=True)
class Comparison:
    """How predictions are held against the teacher's; ``None`` takes what is known for the teacher's head.

    Attributes:
        cls_weight: weight of ``kd_cls``, the quality focal loss of the logits, or its equal for a softmax.
        reg_weight: weight of ``kd_reg``.
        quality_weight: weight of ``kd_quality``, the binary cross entropy of centerness (or IoU) logits
            against the teacher's probability, on positive anchors; of objectness on all that count.
        regression: which loss ``kd_reg`` is.
        beta: the quality focal loss's exponent.
        temperature: of the distributions, where ``regression`` is ``"distribution_kl"``.
    """

    cls_weight: float | None
    reg_weight: float | None
    quality_weight: float | None
    regression: RegressionLoss | None
    beta: float
    temperature: float

    def __post_init__(self) -> None:
        weights = {"cls_weight": self.cls_weight, "reg_weight": self.reg_weight}
        require_not_negative(**weights, quality_weight=self.quality_weight, beta=self.beta)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {self.temperature}: choose a finite number")
        if self.regression not in (None, "giou", "log_iou", "distribution_kl"):
            raise ValueError(
                f'regression must be "giou", "log_iou" or "distribution_kl", got {self.regression!r}'
            )
        if self.cls_weight == 0 and self.reg_weight == 0 and not self.quality_weight:
            raise ValueError(
                "cls_weight and reg_weight are both 0: there is nothing to distil; raise one of them"
            )

    def settled(self, head: Head) -> Comparison:
        """The same comparison with every open choice filled in for a teacher's head.

        Raises:
            ValueError: a choice that this head can't serve.
        """
        known = settings_for(head)
        settled = Comparison(
            cls_weight=known.cls_weight if self.cls_weight is None else self.cls_weight,
            reg_weight=known.reg_weight if self.reg_weight is None else self.reg_weight,
            quality_weight=known.quality_weight if self.quality_weight is None else self.quality_weight,
            regression=known.regression if self.regression is None else self.regression,
            beta=self.beta,
            temperature=self.temperature,
        )
        if settled.reg_weight and settled.regression != "distribution_kl" and not head.decodes:
            raise ValueError(
                f'boxes are to be compared (regression="{settled.regression}"), but the teacher\'s adapter '
                "decodes "
                "none: pass it decode=, or set reg_weight=0"
            )
        if settled.reg_weight and settled.regression == "distribution_kl" and head.bins == 1:
            raise ValueError(
                'regression="distribution_kl" needs a teacher that predicts distributions, more than one bin '
                'for each side of a box; this one predicts plain numbers: choose "giou" or "log_iou"'
            )
        return settled

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the losses whose weight is not 0."""
        weights = {
            "kd_cls": self.cls_weight,
            "kd_reg": self.reg_weight,
            "kd_quality": self.quality_weight,
        }
        return tuple(name for name, weight in weights.items() if weight)

    def losses(
        self,
        predictions: Predictions,
        teacher: Side,
        side: Side,
        assignment: Assignment,
        teacher_boxes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The weighted losses of predictions against the teacher's; those of weight 0 are left out.

        Args:
            predictions: the cross-head's predictions, or the student's own.
            teacher: the teacher's side of the step.
            side: whose head decodes the predictions into boxes.
            assignment: which anchors count, and the normalizer.
            teacher_boxes: what the predicted boxes are compared with; what ``side`` makes of the teacher's
                predictions unless given.
        """
        losses: dict[str, Tensor] = {}
        if self.cls_weight:
            # One sigmoid per class, or one softmax over all of them: the same loss of either kind of head.
            sigmoid = teacher.predictions.background is None
            losses["kd_cls"] = self.cls_weight * (quality_focal_loss if sigmoid else softmax_focal_loss)(
                predictions.class_logits(),
                teacher.predictions.class_logits(),
                beta=self.beta,
                weight=assignment.label_weights,
                normalizer=assignment.normalizer,
            )
        if self.reg_weight:
            losses["kd_reg"] = self.reg_weight * self._regression_loss(
                predictions, teacher, side, assignment, teacher_boxes
            )
        if self.quality_weight:
            losses["kd_quality"] = self.quality_weight * _quality_loss(predictions, teacher, assignment)
        return losses

    def _regression_loss(
        self,
        predictions: Predictions,
        teacher: Side,
        side: Side,
        assignment: Assignment,
        teacher_boxes: Tensor | None,
    ) -> Tensor:
        # Where the teacher sees no object its boxes mean nothing, hence its confidence as the weight.
        weight = teacher.predictions.box_confidence()  # (batch, anchors), or (batch, anchors, classes)
        label_weights = assignment.label_weights
        if label_weights is not None:
            weight = weight * (label_weights if weight.ndim == 2 else label_weights.unsqueeze(-1))
        if self.regression == "distribution_kl":
            return distribution_kl_loss(
                predictions.regression,
                teacher.predictions.regression,
                temperature=self.temperature,
                weight=weight.unsqueeze(-1).expand(predictions.regression.shape[:-1]),
                normalizer=4 * mean_over_ranks(weight.sum()).clamp(min=_SMALLEST_CONFIDENCE),
            )
        boxes = side.head.decode(predictions, side.anchors)
        if teacher_boxes is None:
            teacher_boxes = side.head.decode(teacher.predictions, side.anchors)
        loss = giou_loss if self.regression == "giou" else iou_loss
        return loss(boxes, teacher_boxes, weight=weight, normalizer=assignment.normalizer)


def _quality_loss(predictions: Predictions, teacher: Side, assignment: Assignment) -> Tensor:
    if predictions.quality is None or teacher.predictions.quality is None:
        raise ValueError("quality_weight is set, but this head predicts no centerness or IoU: leave it at 0")
    # A centerness means nothing without an object; objectness says where there is none.
    everywhere = teacher.predictions.objectness
    return quality_focal_loss(
        predictions.quality.unsqueeze(-1),
        teacher.predictions.quality.unsqueeze(-1),
        beta=0.0,  # binary cross entropy
        weight=assignment.label_weights if everywhere else assignment.positive.float(),
        normalizer=assignment.normalizer,
    )
