"""The losses between predictions that CrossKD and prediction mimicking share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from crosskd.losses import (
    distribution_kl_loss,
    giou_loss,
    iou_loss,
    quality_focal_loss,
    softmax_focal_loss,
)
from crosskd.methods.base import Step
from crosskd.methods.recipes import HeadRecipe, RegressionLoss
from crosskd.predictions import Predictions, mean_over_ranks

__all__ = ["Comparison"]

# Distributions are averaged by the teacher's confidence. Where it is sure of nothing at all there is
# nothing to average, and the loss is 0 instead of 0 / 0.
_SMALLEST_CONFIDENCE = 1e-6


@dataclass(frozen=True)
class Comparison:
    """How predictions are held against the teacher's; ``None`` leaves the choice to the recipe.

    Attributes:
        cls_weight: weight of ``kd_cls``, the quality focal loss of the logits, or its equal for a softmax.
        reg_weight: weight of ``kd_reg``.
        quality_weight: weight of ``kd_quality``, the binary cross entropy of centerness (or IoU) logits
            against the teacher's probability, on positive anchors.
        regression: which loss ``kd_reg`` is.
        beta: the quality focal loss's exponent.
        temperature: of the distributions, where ``regression`` is ``"distribution_kl"``.
        times_batch: multiply by the number of images, as the detector's own losses are.
    """

    cls_weight: float | None
    reg_weight: float | None
    quality_weight: float | None
    regression: RegressionLoss | None
    beta: float
    temperature: float
    times_batch: bool = False

    def __post_init__(self) -> None:
        for name in ("cls_weight", "reg_weight", "quality_weight", "beta"):
            value: float | None = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.regression not in (None, "giou", "log_iou", "distribution_kl"):
            raise ValueError(
                f'regression must be "giou", "log_iou" or "distribution_kl", got {self.regression!r}'
            )
        if self.cls_weight == 0 and self.reg_weight == 0 and not self.quality_weight:
            raise ValueError(
                "cls_weight and reg_weight are both 0: there is nothing to distil; raise one of them"
            )

    def settled(self, recipe: HeadRecipe) -> Comparison:
        """The same comparison with every open choice filled in from a recipe."""
        return Comparison(
            cls_weight=recipe.cls_weight if self.cls_weight is None else self.cls_weight,
            reg_weight=recipe.reg_weight if self.reg_weight is None else self.reg_weight,
            quality_weight=(recipe.quality_weight if self.quality_weight is None else self.quality_weight),
            regression=recipe.regression if self.regression is None else self.regression,
            beta=self.beta,
            temperature=self.temperature,
            times_batch=recipe.times_batch,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the losses whose weight is not 0."""
        weights = {
            "kd_cls": self.cls_weight,
            "kd_reg": self.reg_weight,
            "kd_quality": self.quality_weight,
        }
        return tuple(name for name, weight in weights.items() if weight)

    def losses(self, predictions: Predictions, step: Step) -> dict[str, Tensor]:
        """The weighted losses of predictions against the teacher's; those of weight 0 are left out.

        Args:
            predictions: the cross-head's predictions, or the student's own.
            step: the step they belong to.
        """
        losses: dict[str, Tensor] = {}
        assignment = step.assignment
        if self.cls_weight:
            # One sigmoid a class, or one softmax over all of them: the same loss of either kind of head.
            sigmoid = step.teacher.background is None
            losses["kd_cls"] = self.cls_weight * (quality_focal_loss if sigmoid else softmax_focal_loss)(
                predictions.logits,
                step.teacher.logits,
                beta=self.beta,
                weight=assignment.counted,
                normalizer=assignment.normalizer,
            )
        if self.reg_weight:
            losses["kd_reg"] = self.reg_weight * self._regression_loss(predictions, step)
        if self.quality_weight:
            losses["kd_quality"] = self.quality_weight * _quality_loss(predictions, step)
        images = len(predictions.logits) if self.times_batch else 1
        return {name: loss * images for name, loss in losses.items()} if images > 1 else losses

    def _regression_loss(self, predictions: Predictions, step: Step) -> Tensor:
        # Where the teacher sees no object its boxes mean nothing, hence its confidence as the weight.
        weight = step.teacher.box_confidence()  # (batch, anchors), or (batch, anchors, classes)
        counted = step.assignment.counted
        if counted is not None:
            weight = weight * (counted if weight.ndim == 2 else counted.unsqueeze(-1))
        if self.regression == "distribution_kl":
            if predictions.regression.ndim != 4 or predictions.box_per_class:
                raise ValueError(
                    'regression="distribution_kl" needs a head that predicts distributions, shape '
                    f"(batch, anchors, 4, bins), got {tuple(predictions.regression.shape)}: choose "
                    '"giou" or "log_iou"'
                )
            return distribution_kl_loss(
                predictions.regression,
                step.teacher.regression,
                temperature=self.temperature,
                weight=weight.unsqueeze(-1).expand(predictions.regression.shape[:-1]),
                normalizer=4 * mean_over_ranks(weight.sum()).clamp(min=_SMALLEST_CONFIDENCE),
            )
        boxes, teacher_boxes = step.boxes(predictions), step.boxes(step.teacher)
        loss = giou_loss if self.regression == "giou" else iou_loss
        return loss(boxes, teacher_boxes, weight=weight, normalizer=step.assignment.normalizer)


def _quality_loss(predictions: Predictions, step: Step) -> Tensor:
    if predictions.quality is None or step.teacher.quality is None:
        raise ValueError("quality_weight is set, but this head predicts no centerness or IoU: leave it at 0")
    return quality_focal_loss(
        predictions.quality.unsqueeze(-1),
        step.teacher.quality.unsqueeze(-1),
        beta=0.0,  # binary cross entropy
        weight=step.assignment.positive.float(),
        normalizer=step.assignment.normalizer,
    )
