"""BCKD: each class on its own as a binary decision, and boxes where the two disagree on the classes."""

from __future__ import annotations

import torch
from torch import Tensor

from crosskd._checks import require_not_negative
from crosskd.adapters.base import Head
from crosskd.losses import giou_loss, quality_focal_loss
from crosskd.methods.base import Method, Taught
from crosskd.pairing import (
    Pair,
    require_grid,
    require_heads,
    require_rows_alike,
    require_same_anchors,
    require_same_boxes,
)
from crosskd.schedule import Schedule
from crosskd.step import Step

__all__ = ["BCKD"]

# (cls_weight, reg_weight) by the type of the teacher's head. Those of GFL are published, and ours for all
# others but YOLO's.
_WEIGHTS = {
    "GFL": (1.0, 4.0),
    # Ours: as GFL's, once and twice what the head's own losses weigh (0.5 and 7.5 in ultralytics' defaults).
    "YOLO with distributions": (0.5, 15.0),
    "YOLO with distances": (0.5, 15.0),
}


class BCKD(Method):
    r"""Bridging cross-task protocol inconsistency: the student's own predictions, class by class.

    Classes are compared as the detector reads them, one binary decision each, by the quality focal loss;
    boxes by the GIoU loss, weighted by how far the two disagree on the classes there:

    .. math::
        \frac{w_{cls}}{Z} \sum_i \sum_k |p_{ik} - q_{ik}|^\beta \, \mathrm{BCE}(p_{ik}, q_{ik}) +
        \frac{w_{reg}}{Z} \sum_i \max_k |p_{ik} - q_{ik}| \, (1 - \mathrm{GIoU}(b_i, c_i))

    over all anchors i that count, with p and b the student's probabilities and boxes and q and c the
    teacher's; Z is the number of positive anchors. The weight of the boxes is a constant: nothing is learned
    through it.

    Published for GFL, with the weights 1 and 4. The use with any other head is ours.

    Args:
        cls_weight: weight of ``kd_bckd_cls``; by the type of the teacher's head unless given.
        reg_weight: weight of ``kd_bckd_box``; by the type of the teacher's head unless given.
        beta: exponent of the quality focal loss; published with 1.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the losses' names where two methods' would clash.
        head: of a two-stage detector the head to distil: ``"rpn"`` for torchvision's, whose other head has a
            softmax.

    Raises:
        ValueError: a weight or an exponent below 0, or two weights of 0.

    References:
        Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection (Yang et al.,
        ICCV 2023).

    Example:
        >>> BCKD(reg_weight=2.0)
        BCKD(cls_weight=None, reg_weight=2.0, beta=1.0)
    """

    teaches: Taught = "predictions"

    def __init__(
        self,
        cls_weight: float | None = None,
        reg_weight: float | None = None,
        *,
        beta: float = 1.0,
        schedule: Schedule | None = None,
        name: str = "bckd",
        head: str | None = None,
    ) -> None:
        super().__init__(schedule=schedule, name=name, head=head)
        require_not_negative(cls_weight=cls_weight, reg_weight=reg_weight, beta=beta)
        if cls_weight == 0 and reg_weight == 0:
            raise ValueError("cls_weight and reg_weight are both 0: there is nothing to distil")
        self.cls_weight, self.reg_weight, self.beta = cls_weight, reg_weight, beta

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"cls_weight={self.cls_weight}, reg_weight={self.reg_weight}, beta={self.beta}"

    def setup(self, pair: Pair) -> None:
        """Demands a sigmoid per class and predictions of one kind, settles the weights."""
        teacher, student = require_heads(pair)
        require_grid(pair)  # first: the others recommend what is refused for decoders, too
        for side, head in (("teacher", teacher), ("student", student)):
            _require_sigmoid(side, head)
        require_rows_alike(pair)
        known = _WEIGHTS.get(teacher.head_type, _WEIGHTS["GFL"])
        self.cls_weight = known[0] if self.cls_weight is None else self.cls_weight
        self.reg_weight = known[1] if self.reg_weight is None else self.reg_weight
        if self.reg_weight and not student.decodes:
            raise ValueError(
                "boxes are to be compared, but the student's adapter decodes none: pass it decode=, or set "
                "reg_weight=0"
            )

    def check(self, step: Step) -> None:
        """Demands the same anchors and the same box coding."""
        require_same_anchors(step)
        require_same_boxes(step)

    def loss_names(self) -> tuple[str, ...]:
        """The losses whose weight is not 0."""
        weights = {"kd_bckd_cls": self.cls_weight, "kd_bckd_box": self.reg_weight}
        return tuple(name for name, weight in weights.items() if weight != 0)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Compares the student's own predictions with the teacher's."""
        student, teacher, assignment = step.student.predictions, step.teacher.predictions, step.assignment
        losses: dict[str, Tensor] = {}
        if self.cls_weight:
            losses["kd_bckd_cls"] = self.cls_weight * quality_focal_loss(
                student.class_logits(),
                teacher.class_logits(),
                beta=self.beta,
                weight=assignment.label_weights,
                normalizer=assignment.normalizer,
            )
        if self.reg_weight:
            head, anchors = step.student.head, step.student.anchors
            losses["kd_bckd_box"] = self.reg_weight * giou_loss(
                head.decode(student, anchors),
                step.teacher_boxes(),
                weight=_box_weight(step),
                normalizer=assignment.normalizer,
            )
        return losses


@torch.no_grad()
def _box_weight(step: Step) -> Tensor:
    """How far the two disagree on the classes, by anchor or, where each class has a box, by class."""
    student, teacher = step.student.predictions, step.teacher.predictions
    weight = (teacher.probabilities() - student.probabilities()).abs()
    if not student.box_per_class:
        weight = weight.amax(dim=-1)
    label_weights = step.assignment.label_weights
    if label_weights is None:
        return weight
    return weight * (label_weights.unsqueeze(-1) if student.box_per_class else label_weights)


def _require_sigmoid(side: str, head: Head) -> None:
    """Raises ``ValueError`` for a head whose classes share a softmax."""
    if head.background is not None:
        raise ValueError(
            f"BCKD takes each class as a binary decision, but the {side}'s classes share a softmax, in which "
            f"class {head.background} is no object: choose crosskd.CrossKD() or "
            "crosskd.PredictionMimicking(), "
            'which know a softmax, or of torchvision\'s two-stage detectors head="rpn" alone'
        )
