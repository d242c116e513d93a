"""PKD: the student's feature maps imitate the teacher's up to scale and offset of each channel."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosskd.align import ChannelProjection
from crosskd.losses import pkd_loss
from crosskd.methods.base import Method, Requirement
from crosskd.pairing import Pair
from crosskd.schedule import Schedule
from crosskd.step import Step

__all__ = ["PKD"]

_logger = logging.getLogger("crosskd")

# Published for these students; ours for all others, which is the more frequent of the two.
_WEIGHTS = {"RPN": 6.0}
_WEIGHT = 10.0


class PKD(Method):
    r"""Imitation of the feature pyramid by the Pearson correlation of each channel.

    .. math::
        w \sum_l \frac{1}{M_l} \sum \tfrac{1}{2} (\mathrm{norm}(s_l) - \mathrm{norm}(t_l))^2

    over all :math:`M_l` elements of a level, where norm takes away each channel's mean over batch and space
    and divides by its standard deviation. The strides of the levels must agree and nothing else: an FCOS
    teaches a RetinaNet, a Faster R-CNN or a plain backbone teaches anything. Levels are matched by stride;
    those without a counterpart are left out and named once. Where widths differ, a 1x1 projection of the
    student's map is trained with the student and thrown away with the `crosskd.Distiller`.

    Published for the first four levels with the weights 6 (Faster R-CNN) and 10 (RetinaNet, RepPoints, and an
    FCOS teaching a RetinaNet). For other students nothing was published, and 10 is our choice.

    Args:
        weight: of ``kd_pkd``; what was published for the student's type unless given.
        levels: the student's levels to use, counted from 0, the finest; all that have a counterpart unless
            given.
        resize: resizes the teacher's maps to the student's where they differ, and takes the teacher's level
            of the nearest stride where none is equal. Without it other sizes are refused.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the loss's name where two methods' would clash.

    Raises:
        ValueError: a negative weight, no levels.

    References:
        PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient (Cao et
        al., NeurIPS 2022), equation 3 and section 4.1.

    Example:
        >>> PKD(levels=(0, 1)).extra_repr()
        'weight=None, levels=(0, 1), resize=False'
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({"maps"})

    def __init__(
        self,
        weight: float | None = None,
        levels: Sequence[int] | None = None,
        *,
        resize: bool = False,
        schedule: Schedule | None = None,
        name: str = "pkd",
    ) -> None:
        super().__init__(schedule=schedule, name=name)
        if weight is not None and not weight > 0:
            raise ValueError(f"weight must be above 0, got {weight}")
        if levels is not None and not levels:
            raise ValueError("levels is empty: there is nothing to distil; leave it out for all levels")
        self.weight = weight
        self.levels = None if levels is None else tuple(levels)
        self.resize = resize
        self.matches: tuple[tuple[int, int], ...] = ()
        self.projections = nn.ModuleDict()

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"weight={self.weight}, levels={self.levels}, resize={self.resize}"

    def setup(self, pair: Pair) -> None:
        """Matches the levels by stride, settles the weight, makes projections where widths differ."""
        self.matches = self._matched(pair)
        if self.weight is None:
            first = pair.student.heads[0].head_type if pair.student.heads else ""
            self.weight = _WEIGHTS.get(first, _WEIGHT)
        if pair.teacher.widths is None or pair.student.widths is None:
            side = "teacher" if pair.teacher.widths is None else "student"
            raise ValueError(
                f"it is unknown how many channels the {side}'s maps have: give its adapter widths=, one "
                "number per level"
            )
        for level, teacher_level in self.matches:
            width, teacher_width = pair.student.widths[level], pair.teacher.widths[teacher_level]
            if width != teacher_width:
                self.projections[f"level{level}"] = ChannelProjection(width, teacher_width)

    def _matched(self, pair: Pair) -> tuple[tuple[int, int], ...]:
        """(student's level, teacher's level) of those that are compared."""
        strides, theirs = pair.student.strides, pair.teacher.strides
        if pair.levels is None or strides is None or theirs is None:
            raise ValueError(
                f"{self.name} matches levels by their strides, which one of the adapters doesn't tell: give "
                "it strides=, one number per level"
            )
        chosen = range(len(strides)) if self.levels is None else self.levels
        if not set(chosen) <= set(range(len(strides))):
            raise ValueError(
                f"levels={self.levels}, but the student has {len(strides)} levels, counted from 0"
            )
        equal = dict(pair.levels)
        matches = []
        for level in chosen:
            if level in equal:
                matches.append((level, equal[level]))
            elif self.resize:
                wanted = pair.scale * strides[level]  # at the teacher's resolution
                ratios = [max(stride / wanted, wanted / stride) for stride in theirs]
                matches.append((level, ratios.index(min(ratios))))
        missing = [strides[level] for level in chosen if level not in dict(matches)]
        if not matches or (missing and self.levels is not None):
            raise ValueError(
                f"the student's levels of strides {missing} have no counterpart among the teacher's, "
                f"{list(theirs)}: choose other levels=, or resize=True for the nearest"
            )
        if missing:
            _logger.info(
                "%s: the student's levels of strides %s are left out, the teacher has none",
                self.name,
                missing,
            )
        return tuple(matches)

    def loss_names(self) -> tuple[str, ...]:
        """The only loss."""
        return ("kd_pkd",)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Compares the maps level by level."""
        losses = []
        for level, teacher_level in self.matches:
            student, teacher = step.student.maps[level], step.teacher.maps[teacher_level]
            if student.shape[2:] != teacher.shape[2:]:
                teacher = self._resized(teacher, student, level)
            if f"level{level}" in self.projections:
                student = self.projections[f"level{level}"](_trained(student, level))
            losses.append(pkd_loss(student, teacher))
        assert self.weight is not None
        return {"kd_pkd": self.weight * torch.stack(losses).sum()}

    def _resized(self, teacher: Tensor, student: Tensor, level: int) -> Tensor:
        if not self.resize:
            raise ValueError(
                f"the maps of the student's level {level} differ in size: {tuple(teacher.shape[2:])} "
                f"(teacher), {tuple(student.shape[2:])} (student) as (height, width). Give both images of "
                f"the same size, or have the teacher's maps resized by resize=True"
            )
        return F.interpolate(teacher, size=student.shape[2:], mode="bilinear", align_corners=False)


def _trained(features: Tensor, level: int) -> Tensor:
    """The student's map; raises ``ValueError`` where only the projection behind it would be trained."""
    if torch.is_grad_enabled() and not features.requires_grad:
        raise ValueError(
            f"the student's map of level {level} depends on no trainable parameter, so distilling it has no "
            "effect: it is frozen or detached"
        )
    return features
