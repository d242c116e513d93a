"""LD: the student's distributions over the sides of boxes, on positive anchors and around the objects."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from crosskd._checks import compute_dtype, require_not_negative
from crosskd.losses import distribution_kl_loss, valuable_region
from crosskd.methods.base import Method, Requirement, Taught
from crosskd.pairing import (
    Pair,
    require_grid,
    require_heads,
    require_rows_alike,
    require_same_anchors,
    require_same_bins,
    require_same_boxes,
)
from crosskd.predictions import mean_over_ranks
from crosskd.schedule import Schedule
from crosskd.step import Step, distinct_objects, outside_graph

__all__ = ["LD", "Reduction"]

Reduction = Literal["sum", "mean"]

# What a loss over nothing is divided by: it is 0 then, instead of 0 / 0.
_SMALLEST_AMOUNT = 1e-6
# (main_weight, region_weight, cls_weight). Published for GFL with sums. Ours for means: what the sums come to
# on two images like COCO's, each with 60 positives, of which the student is sure by a half, and a region
# whose weights add up to 200; and where 80 classes are averaged on each of five levels.
_WEIGHTS: dict[Reduction, tuple[float, float, float]] = {
    "sum": (0.25, 0.25, 10.0),
    "mean": (15.0, 25.0, 50.0),
}
_PUBLISHED_WITH_SUMS = ("GFL",)
_CLASSES_OF_COCO = 80


class LD(Method):
    r"""Localisation distillation: distributions over the sides of boxes, and the classes of positive anchors.

    For heads that predict each side of a box as a distribution. With :math:`\mathrm{KL}_T` the divergence
    from the teacher's to the student's at temperature T, times :math:`T^2` and divided by the number of bins,
    it is

    .. math::
        \frac{w_m}{4} \sum_{i \in P} m_i \sum_{side} \mathrm{KL}_{10}
        + \frac{w_r}{16} \sum_i v_i \sum_{side} \mathrm{KL}_{10}
        + w_c \sum_l \frac{1}{|P_l|} \sum_{i \in P_l} \mathrm{KL}_2(\mathrm{classes})

    over the positive anchors P of the student's own label assignment, :math:`P_l` those of a level;
    :math:`m_i` is the student's largest class probability, a constant, and :math:`v_i` the weight that
    `crosskd.losses.valuable_region` gives an anchor around an object. An anchor may be in both.

    The first two are sums in the published form: they grow with the images of a batch and with their objects.
    With ``reduction="mean"``, ours, each is the weighted mean of the divergence of a side, and the third
    one mean over all positives; the amounts are averaged over processes.

    Published for GFL. For heads whose anchors are points, such as YOLO's, the region needs boxes: squares
    around the points, which is ours.

    Args:
        main_weight: weight of ``kd_ld_main``; 0.25 for sums and 15 for means unless given.
        region_weight: weight of ``kd_ld_region``; 0.25 for sums and 25 for means unless given. With 0 neither
            objects nor anchors are needed.
        cls_weight: weight of ``kd_ld_cls``; unless given 10 for sums, and for means 50 times the number of
            classes over 80. 0 for a single class, of which a softmax says nothing.
        reduction: ``"sum"`` or ``"mean"``; unless given sums for GFL, as published, and means for all others.
        temperature: of the distributions; published with 10.
        cls_temperature: of the softmax over the class logits; published with 2.
        anchor_size: side of the square around a point, in strides of its level, for heads whose anchors are
            points. 8 is that of GFL's anchors.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the losses' names where two methods' would clash.
        head: of a detector with several heads the one to distil.

    Raises:
        ValueError: weights below 0 or all 0, a temperature or a size that is not above 0, another reduction.

    References:
        Localization Distillation for Dense Object Detection (Zheng et al., CVPR 2022).

    Example:
        >>> LD(reduction="mean").extra_repr()
        "main_weight=None, region_weight=None, cls_weight=None, reduction='mean'"
    """

    requires: frozenset[Requirement] = frozenset({"predictions", "objects"})
    teaches: Taught = "predictions"

    def __init__(
        self,
        main_weight: float | None = None,
        region_weight: float | None = None,
        cls_weight: float | None = None,
        *,
        reduction: Reduction | None = None,
        temperature: float = 10.0,
        cls_temperature: float = 2.0,
        anchor_size: float = 8.0,
        schedule: Schedule | None = None,
        name: str = "ld",
        head: str | None = None,
    ) -> None:
        super().__init__(schedule=schedule, name=name, head=head)
        weights = {"main_weight": main_weight, "region_weight": region_weight, "cls_weight": cls_weight}
        require_not_negative(**weights)
        if all(value == 0 for value in weights.values()):
            raise ValueError("all three weights are 0: there is nothing to distil")
        positive = {
            "temperature": temperature,
            "cls_temperature": cls_temperature,
            "anchor_size": anchor_size,
        }
        for argument, number in positive.items():
            if not 0 < number < math.inf:
                raise ValueError(f"{argument} must be above 0, got {number}")
        if reduction not in (None, "sum", "mean"):
            raise ValueError(f'reduction must be "sum" or "mean", got {reduction!r}')
        self.main_weight, self.region_weight, self.cls_weight = main_weight, region_weight, cls_weight
        self.reduction = reduction
        self.temperature, self.cls_temperature, self.anchor_size = temperature, cls_temperature, anchor_size
        if region_weight == 0:
            self.requires = frozenset({"predictions"})

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return (
            f"main_weight={self.main_weight}, region_weight={self.region_weight}, "
            f"cls_weight={self.cls_weight}, reduction={self.reduction!r}"
        )

    def setup(self, pair: Pair) -> None:
        """Demands distributions that can be compared row by row, settles reduction and weights."""
        teacher, student = require_heads(pair)
        require_grid(pair)  # first: the others recommend what is refused for decoders, too
        for side, head in (("teacher", teacher), ("student", student)):
            if head.bins == 1:
                raise ValueError(
                    f"LD compares distributions over the sides of boxes, but the {side}'s {head.head_type} "
                    "head predicts plain numbers: choose crosskd.CrossKD(), or crosskd.BCKD() for the "
                    "student's own predictions"
                )
        require_rows_alike(pair)
        if self.reduction is None:
            self.reduction = "sum" if student.head_type in _PUBLISHED_WITH_SUMS else "mean"
        main, region, classes = _WEIGHTS[self.reduction]
        if self.reduction == "mean":  # the divergence, a mean over the classes, counts alike for any number
            classes *= student.num_classes / _CLASSES_OF_COCO
        if student.num_classes < 2:
            if self.cls_weight:
                raise ValueError(
                    "cls_weight is set, but a softmax over a single class is always 1, so there is nothing "
                    "to compare: leave cls_weight out"
                )
            classes = 0.0
        self.main_weight = main if self.main_weight is None else self.main_weight
        self.region_weight = region if self.region_weight is None else self.region_weight
        self.cls_weight = classes if self.cls_weight is None else self.cls_weight

    def check(self, step: Step) -> None:
        """Demands the same anchors and the same box coding; for the region, anchors that are known."""
        require_same_anchors(step)
        require_same_boxes(step)
        if self.main_weight or self.region_weight:
            require_same_bins(step)
        if self.region_weight:
            _anchor_boxes(step, self.anchor_size)

    def loss_names(self) -> tuple[str, ...]:
        """The losses whose weight is not 0."""
        weights = {
            "kd_ld_main": self.main_weight,
            "kd_ld_region": self.region_weight,
            "kd_ld_cls": self.cls_weight,
        }
        return tuple(name for name, weight in weights.items() if weight != 0)

    # How many anchors are positive, or near an object, is known to the batch alone.
    @outside_graph
    def forward(self, step: Step) -> dict[str, Tensor]:
        """Compares the student's own predictions with the teacher's."""
        losses: dict[str, Tensor] = {}
        if self.main_weight:
            weight = _positives(step) * step.student.predictions.detach().confidence()
            losses["kd_ld_main"] = self.main_weight * self._of_sides(step, weight, 4.0)
        if self.region_weight:
            weight = self._region(step)
            losses["kd_ld_region"] = self.region_weight * self._of_sides(step, weight, 16.0)
        if self.cls_weight:
            losses["kd_ld_cls"] = self.cls_weight * self._of_classes(step)
        return losses

    def _of_sides(self, step: Step, weight: Tensor, divisor: float) -> Tensor:
        """The divergence of the distributions.

        Args:
            step: with predictions.
            weight: of each anchor, shape (batch, anchors).
            divisor: of the sum over anchors and sides.
        """
        amount: Tensor | float = divisor
        if self.reduction == "mean":
            amount = 4 * mean_over_ranks(weight.sum()).clamp(min=_SMALLEST_AMOUNT)
        rows = weight > 0
        return distribution_kl_loss(
            step.student.predictions.regression[rows],
            step.teacher.predictions.regression[rows],
            temperature=self.temperature,
            weight=weight[rows].unsqueeze(-1).expand(-1, 4),
            normalizer=amount,
            over_bins="mean",
        )

    def _of_classes(self, step: Step) -> Tensor:
        """The divergence of the softmaxes over the class logits of positive anchors."""
        weight = _positives(step)
        rows = weight > 0
        amount: Tensor | float = 1.0
        if self.reduction == "mean":
            amount = mean_over_ranks(weight.sum()).clamp(min=_SMALLEST_AMOUNT)
        else:
            per_level = list(step.student.anchors.per_level)
            levels = torch.split(rows, per_level, dim=1)
            counts = [level.sum().clamp(min=1).expand_as(level) for level in levels]
            weight = weight / torch.cat(counts, dim=1)
        return distribution_kl_loss(
            step.student.predictions.logits[rows],
            step.teacher.predictions.logits[rows],
            temperature=self.cls_temperature,
            weight=weight[rows],
            normalizer=amount,
            over_bins="mean",
        )

    @torch.no_grad()
    def _region(self, step: Step) -> Tensor:
        """The weight of each anchor in the valuable region, shape (batch, anchors)."""
        anchors, per_level = _anchor_boxes(step, self.anchor_size), _rows_per_level(step)
        label_weights = step.assignment.label_weights
        regions = []
        for image, boxes in enumerate(_boxes_of_objects(step)):
            if label_weights is None:
                regions.append(valuable_region(anchors, boxes, per_level))
                continue
            # Anchors that don't count, such as those in the padding, are nobody's nearest.
            counted = label_weights[image] > 0
            counts = torch.stack([level.sum() for level in torch.split(counted, per_level)]).tolist()
            found = valuable_region(anchors[counted], boxes, counts)
            region = found.new_zeros(len(anchors))
            region[counted] = found
            regions.append(region * label_weights[image])
        return torch.stack(regions)


def _positives(step: Step) -> Tensor:
    """1 for each positive anchor, or the weight that its head gives it, else 0; shape (batch, anchors)."""
    positive, weights = step.assignment.positive, step.assignment.label_weights
    positive = positive.to(compute_dtype(step.student.predictions.logits))
    return positive if weights is None else positive * weights


def _anchor_boxes(step: Step, size: float) -> Tensor:
    """The student's anchors (anchors, 4), xyxy in pixels; points become squares of a size in strides."""
    anchors = step.student.anchors
    if anchors.boxes is None:
        raise ValueError(
            "LD's valuable region is made of anchors, which the student's adapter doesn't give: pass "
            "generic() anchors=, boxes (anchors, 4) or points (anchors, 2) in pixels, or set region_weight=0"
        )
    boxes = _floating(anchors.boxes)
    if boxes.shape[1] == 4:
        return boxes
    strides = anchors.strides
    if strides is None:
        if step.student.strides is None:
            raise ValueError(
                "LD's valuable region takes squares of some strides around the student's points, but its "
                "adapter gives no strides: pass generic() strides=, or set region_weight=0"
            )
        of_levels = boxes.new_tensor([step.student.strides[level] for level in step.student.levels])
        strides = of_levels.repeat_interleave(boxes.new_tensor(anchors.per_level).long())
    half = size / 2 * strides.to(boxes)[:, None]
    return torch.cat([boxes - half, boxes + half], dim=1)


def _floating(boxes: Tensor) -> Tensor:
    return boxes if boxes.is_floating_point() else boxes.float()


def _rows_per_level(step: Step) -> list[int]:
    """How many anchors each level has, those apart that stand at the same points a second time.

    A head with two halves predicts at each point twice, and an object's nearest are to be different ones.
    """
    anchors = step.student.anchors
    if not anchors.sizes or anchors.boxes.shape[1] == 4:
        return list(anchors.per_level)
    rows = []
    for count, (height, width) in zip(anchors.per_level, anchors.sizes, strict=True):
        rows += [height * width] * (count // (height * width))
    return rows


def _boxes_of_objects(step: Step) -> list[Tensor]:
    """Each image's boxes (objects, 4), xyxy in pixels; without targets those that the teacher is sure of."""
    if step.objects is not None:
        return [_floating(of_image.boxes) for of_image in step.objects]
    if step.student.batch.targets is not None:
        raise ValueError(
            "LD's valuable region surrounds the objects, but the student's adapter gives none of the "
            "targets: give generic() objects=, a function of the targets, or set region_weight=0"
        )
    head, teacher = step.student.head, step.teacher.predictions
    if not head.decodes:
        raise ValueError(
            "LD's valuable region surrounds objects, which on unlabelled images are the teacher's boxes, but "
            "the student's adapter decodes none: pass it decode=, or set region_weight=0"
        )
    found = []
    boxes = step.teacher_boxes()
    scores, labels = teacher.probabilities().max(dim=-1)
    for image, sure in enumerate(step.assignment.positive):
        of_image = boxes[image][sure], scores[image][sure], labels[image][sure]
        found.append(distinct_objects(*of_image, step.image_sizes[image]).boxes)
    return found
