"""Response distillation: the teacher's predictions in place of labels."""

from __future__ import annotations

from torch import Tensor

from crosskd._checks import require_not_negative
from crosskd.losses import giou_loss, quality_focal_loss, softmax_focal_loss
from crosskd.methods.base import Method, Taught
from crosskd.pairing import (
    Pair,
    require_rows_alike,
    require_same_anchors,
    require_same_boxes,
)
from crosskd.predictions import mean_over_ranks
from crosskd.schedule import Schedule
from crosskd.step import Step

__all__ = ["ResponseDistillation"]

# Of the published implementation, for every type of head.
_CLS_WEIGHT, _REG_WEIGHT = 2.0, 2.0
_BETA = 2.0
_THRESHOLD = 0.1


class ResponseDistillation(Method):
    r"""The teacher's class probabilities and boxes are the labels of the student's own predictions.

    .. math::
        \frac{w_c}{N_c} \sum_{i, k} |\sigma(s_{ik}) - p_{ik}|^2 \, \mathrm{BCE}(s_{ik}, p_{ik}) \; + \;
        \frac{w_r}{N_r} \sum_{i \,:\, P_i > 0.1} P_i \, \bigl(1 - \mathrm{GIoU}(b_i, b^t_i)\bigr),
        \qquad P_i = \sum_k p_{ik}

    where :math:`p_{ik}` is the teacher's probability of class k at anchor i, :math:`N_c` the number of
    :math:`p_{ik} > 0.1` and :math:`N_r` the number of :math:`P_i > 0.1`, both at least 1 and averaged over
    processes. No label is read: images without targets are distilled as those with targets are, and nothing
    depends on the student's label assignment. Where classes share a softmax, background is no class and the
    loss is the softmax's own; where each class has a box, :math:`P` is its class's probability.

    The response part of CMKD, made for a teacher that sees another modality of the scene by
    ``Distiller(teacher_view=…)``, to follow the feature part, `crosskd.FeatureImitation`. The quality
    focal loss with its exponent, what it is divided by, which boxes count and how much, and both weights are
    those of the published implementation, which differs from the paper. GIoU, and what the boxes are divided
    by, are ours.

    The student's predictors then have two targets at once where there are labels, as in
    `crosskd.PredictionMimicking`: don't combine it with `crosskd.CrossKD`. Classes (or a ``class_map``),
    anchors, box coding and the kind of the predictions must agree.

    Args:
        cls_weight: weight of ``kd_response_cls``.
        reg_weight: weight of ``kd_response_box``; 0 for a head that decodes no boxes.
        beta: exponent of the quality focal loss.
        threshold: the teacher's probability above which a class, or an anchor's classes together, count.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the losses' names where two methods' would clash.
        head: of a two-stage detector the head to distil, ``"rpn"`` or ``"box"`` for torchvision's; both of
            them unless given.

    Raises:
        ValueError: a weight, exponent or threshold that is out of range.

    References:
        Cross-Modality Knowledge Distillation Network for Monocular 3D Object Detection (Hong et al., ECCV
        2022), response distillation.

    Example:
        >>> ResponseDistillation(reg_weight=0).loss_names()
        ('kd_response_cls',)
    """

    teaches: Taught = "predictions"

    def __init__(
        self,
        cls_weight: float = _CLS_WEIGHT,
        reg_weight: float = _REG_WEIGHT,
        *,
        beta: float = _BETA,
        threshold: float = _THRESHOLD,
        schedule: Schedule | None = None,
        name: str = "response",
        head: str | None = None,
    ) -> None:
        super().__init__(schedule=schedule, name=name, head=head)
        require_not_negative(cls_weight=cls_weight, reg_weight=reg_weight, beta=beta)
        if cls_weight == 0 and reg_weight == 0:
            raise ValueError(
                "cls_weight and reg_weight are both 0: there is nothing to distil; raise one of them"
            )
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold is a probability, 0 to below 1, got {threshold}")
        self.cls_weight, self.reg_weight = cls_weight, reg_weight
        self.beta, self.threshold = beta, threshold

    def setup(self, pair: Pair) -> None:
        """Demands predictions that can be compared row by row, and boxes."""
        teacher, _ = require_rows_alike(pair)
        if self.reg_weight and not teacher.decodes:
            raise ValueError(
                "boxes are to be compared, but the teacher's adapter decodes none: pass it decode=, or set "
                "reg_weight=0"
            )

    def check(self, step: Step) -> None:
        """Demands the same anchors and the same box coding."""
        require_same_anchors(step)
        require_same_boxes(step)

    def loss_names(self) -> tuple[str, ...]:
        """The losses whose weight is not 0."""
        weights = {"kd_response_cls": self.cls_weight, "kd_response_box": self.reg_weight}
        return tuple(name for name, weight in weights.items() if weight)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Compares the student's own predictions with the teacher's."""
        losses = {}
        if self.cls_weight:
            losses["kd_response_cls"] = self.cls_weight * self._class_loss(step)
        if self.reg_weight:
            losses["kd_response_box"] = self.reg_weight * self._box_loss(step)
        return losses

    def _class_loss(self, step: Step) -> Tensor:
        student, teacher = step.student.predictions, step.teacher.predictions
        likely = teacher.probabilities() > self.threshold  # (batch, anchors, classes)
        loss = quality_focal_loss if teacher.background is None else softmax_focal_loss
        logits = student.class_logits(), teacher.class_logits()
        return loss(*logits, beta=self.beta, normalizer=_number_of(likely))

    def _box_loss(self, step: Step) -> Tensor:
        student, teacher, head = step.student.predictions, step.teacher.predictions, step.student.head
        probabilities = teacher.probabilities()
        # (batch, anchors), or (batch, anchors, classes) where each class has a box
        weight = probabilities if teacher.box_per_class else probabilities.sum(dim=-1)
        counts = weight > self.threshold
        boxes = head.decode(student, step.student.anchors)
        return giou_loss(boxes, step.teacher_boxes(), weight=weight * counts, normalizer=_number_of(counts))


def _number_of(counts: Tensor) -> Tensor:
    """How many are true, on average over processes; 1 at least."""
    return mean_over_ranks(counts.sum().float()).clamp(min=1)
