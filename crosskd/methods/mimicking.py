"""Prediction mimicking: the baseline that CrossKD is measured against."""

from __future__ import annotations

from torch import Tensor

from crosskd.methods.base import Method, Taught
from crosskd.methods.comparison import Comparison
from crosskd.methods.settings import RegressionLoss
from crosskd.pairing import (
    Pair,
    require_rows_alike,
    require_same_anchors,
    require_same_bins,
    require_same_boxes,
)
from crosskd.schedule import Schedule
from crosskd.step import Step

__all__ = ["PredictionMimicking"]


class PredictionMimicking(Method):
    """The student's own predictions mimic the teacher's, with the same losses and weights as `CrossKD`.

    The student's predictors then have two targets at once, the labels and the teacher, which contradict each
    other wherever the teacher errs: what CrossKD avoids. Classes (or a ``class_map``), anchors, box coding
    and the kind of the predictions must agree.

    Args:
        cls_weight: weight of ``kd_cls``; the published one of the teacher's head type unless given.
        reg_weight: weight of ``kd_reg``; the published one of the teacher's head type unless given.
        quality_weight: weight of ``kd_quality``; the published one of the teacher's head type unless given.
        regression: which loss ``kd_reg`` is: ``"giou"``, ``"log_iou"`` or ``"distribution_kl"``.
        beta: exponent of the quality focal loss in ``kd_cls``.
        temperature: of the distributions, for ``"distribution_kl"``.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the losses' names where two methods' would clash.
        head: of a two-stage detector the head to distil, ``"rpn"`` or ``"box"`` for torchvision's; both of
            them, each with its own settings, unless given.

    Raises:
        ValueError: a weight, exponent or temperature that is out of range.

    References:
        CrossKD, section 3.1, "prediction mimicking".

    Example:
        >>> PredictionMimicking(cls_weight=0.5).comparison.cls_weight
        0.5
    """

    teaches: Taught = "predictions"

    def __init__(
        self,
        cls_weight: float | None = None,
        reg_weight: float | None = None,
        *,
        quality_weight: float | None = None,
        regression: RegressionLoss | None = None,
        beta: float = 1.0,
        temperature: float = 1.0,
        schedule: Schedule | None = None,
        name: str = "mimicking",
        head: str | None = None,
    ) -> None:
        super().__init__(schedule=schedule, name=name, head=head)
        self.comparison = Comparison(
            cls_weight=cls_weight,
            reg_weight=reg_weight,
            quality_weight=quality_weight,
            regression=regression,
            beta=beta,
            temperature=temperature,
        )

    def setup(self, pair: Pair) -> None:
        """Demands predictions that can be compared row by row, settles the weights."""
        teacher, _ = require_rows_alike(pair)
        self.comparison = self.comparison.settled(teacher)

    def check(self, step: Step) -> None:
        """Demands the same anchors and the same box coding."""
        require_same_anchors(step)
        require_same_boxes(step)
        if self.comparison.reg_weight and self.comparison.regression == "distribution_kl":
            require_same_bins(step)

    def loss_names(self) -> tuple[str, ...]:
        """The losses whose weight is not 0."""
        return self.comparison.names

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Compares the student's own predictions with the teacher's."""
        return self.comparison.losses(
            step.student.predictions,
            step.teacher,
            step.student,
            step.assignment,
            step.teacher.resized_boxes,
        )
