"""Prediction mimicking: the baseline that CrossKD is measured against."""

from __future__ import annotations

from torch import Tensor

from crosskd.head import Branch
from crosskd.methods.base import Method, Step
from crosskd.methods.comparison import Comparison
from crosskd.methods.recipes import HeadRecipe, RegressionLoss
from crosskd.schedule import Schedule

__all__ = ["PredictionMimicking"]


class PredictionMimicking(Method):
    """The student's own predictions mimic the teacher's, with the same losses and weights as `CrossKD`.

    The student's predictors then hear two targets at once, the ground truth and the teacher, which
    contradict each other wherever the teacher errs: what CrossKD avoids.

    Args:
        cls_weight: weight of ``kd_cls``; the recipe's without it.
        reg_weight: weight of ``kd_reg``; the recipe's without it.
        quality_weight: weight of ``kd_quality``; the recipe's without it.
        regression: which loss ``kd_reg`` is: ``"giou"``, ``"log_iou"`` or ``"distribution_kl"``.
        beta: exponent of the quality focal loss in ``kd_cls``.
        temperature: of the distributions, for ``"distribution_kl"``.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the losses' names where two methods' would clash.
        part: of a two-stage detector the head to distil, ``"rpn"`` or ``"box"`` for torchvision's; both of
            them, each with its own settings, unless given.

    Raises:
        ValueError: a weight, exponent or temperature that is out of range.

    References:
        CrossKD, section 3.1, "prediction mimicking".

    Example:
        >>> PredictionMimicking(cls_weight=0.5).comparison.cls_weight
        0.5
    """

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
        part: str | None = None,
    ) -> None:
        super().__init__(schedule=schedule, name=name, part=part)
        self.comparison = Comparison(
            cls_weight=cls_weight,
            reg_weight=reg_weight,
            quality_weight=quality_weight,
            regression=regression,
            beta=beta,
            temperature=temperature,
        )

    def setup(
        self,
        teacher_branches: tuple[Branch, ...],
        student_branches: tuple[Branch, ...],
        recipe: HeadRecipe,
    ) -> None:
        """Settles the weights."""
        self.comparison = self.comparison.settled(recipe)

    def loss_names(self) -> tuple[str, ...]:
        """The losses whose weight is not 0."""
        return self.comparison.names

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Holds the student's own predictions against the teacher's."""
        return self.comparison.losses(step.student, step)
