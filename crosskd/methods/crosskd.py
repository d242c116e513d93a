"""CrossKD: the student's intermediate features, read by the rest of the teacher's head."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crosskd._statistics import FeatureStatistics, feature_statistics
from crosskd.align import ChannelProjection, align_statistics
from crosskd.head import Branch, Tap, Tapped, TapPoint
from crosskd.methods.base import Method, Step
from crosskd.methods.comparison import Comparison
from crosskd.methods.recipes import HeadRecipe, RegressionLoss
from crosskd.predictions import Predictions
from crosskd.schedule import Schedule

__all__ = ["CrossKD"]

_logger = logging.getLogger("crosskd")


class CrossKD(Method):
    """Cross-head distillation: the student's tower features are read by the frozen teacher's head.

    After ``position`` blocks the features of each of the student's towers are aligned to the teacher's
    statistics at the same place and passed through the rest of the teacher's tower and its predictors.
    What comes out, the cross-head predictions, is held against the teacher's own. The student's own
    predictors hear the ground truth alone, so the two targets never contradict each other.

    Everything left at ``None`` takes the published value of the head type that is distilled:

    ========= ======== ========== =================================== ==============
    head      position cls_weight reg_weight                          quality_weight
    ========= ======== ========== =================================== ==============
    GFL       3        1          4 (KL of distributions)             0
    RetinaNet 3        1          1 (GIoU)                            0
    ATSS      3        1          1 (GIoU)                            1
    FCOS      2        0.4        0.75 (log IoU)                      0
    ========= ======== ========== =================================== ==============

    For other heads nothing was published; their adapters say which settings they have instead.

    Args:
        position: after how many blocks of each tower the teacher's head takes over: from 0, the
            tower's input, to the number of blocks. `crosskd.describe` prints what a detector offers.
            Two numbers, (student's, teacher's), where the towers differ in length. Of a two-stage detector
            that it isn't given for, the last place in front of one of the teacher's blocks.
        tap: ``"post"`` hands over the features after the block's activation, with which all published
            results were trained; ``"pre"`` those before it.
        cls_weight: weight of ``kd_cls``.
        reg_weight: weight of ``kd_reg``.
        quality_weight: weight of ``kd_quality``, on a head's centerness or IoU prediction.
        regression: which loss ``kd_reg`` is: ``"giou"``, ``"log_iou"`` or ``"distribution_kl"``.
        beta: exponent of the quality focal loss in ``kd_cls``.
        temperature: of the distributions, for ``"distribution_kl"``.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the losses' names where two methods' would clash.
        part: of a two-stage detector the head to distil, ``"rpn"`` or ``"box"`` for torchvision's; both of
            them, each with its own settings, unless given.

    Raises:
        ValueError: a weight, exponent, temperature or tap that is out of range.

    References:
        CrossKD: Cross-Head Knowledge Distillation for Object Detection (Wang et al., CVPR 2024,
        arXiv 2306.11369), section 3.2 (cross-head predictions) and 3.3 (losses).

    Example:
        >>> CrossKD(position=2, reg_weight=0.5).extra_repr()
        "position=2, tap='post', cls_weight=None, reg_weight=0.5, quality_weight=None"
    """

    def __init__(
        self,
        position: int | tuple[int, int] | None = None,
        tap: Tap = "post",
        cls_weight: float | None = None,
        reg_weight: float | None = None,
        *,
        quality_weight: float | None = None,
        regression: RegressionLoss | None = None,
        beta: float = 1.0,
        temperature: float = 1.0,
        schedule: Schedule | None = None,
        name: str = "crosskd",
        part: str | None = None,
    ) -> None:
        super().__init__(schedule=schedule, name=name, part=part)
        if tap not in ("post", "pre"):
            raise ValueError(f'tap must be "post" or "pre", got {tap!r}')
        if position is not None and not _is_position(position):
            raise TypeError(
                f"position must be a whole number of blocks, or two, (student's, teacher's), got {position!r}"
            )
        self.position = position
        self.tap: Tap = tap
        self.comparison = Comparison(
            cls_weight=cls_weight,
            reg_weight=reg_weight,
            quality_weight=quality_weight,
            regression=regression,
            beta=beta,
            temperature=temperature,
        )
        self.projections = nn.ModuleDict()

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        c = self.comparison
        return (
            f"position={self.position}, tap={self.tap!r}, cls_weight={c.cls_weight}, "
            f"reg_weight={c.reg_weight}, quality_weight={c.quality_weight}"
        )

    @property
    def split(self) -> tuple[TapPoint, TapPoint]:
        """Where the student's and the teacher's towers are split."""
        if self.position is None:
            raise ValueError("the position is not settled yet: hand the method to a Distiller first")
        both = (self.position, self.position) if isinstance(self.position, int) else self.position
        return TapPoint(both[0], self.tap), TapPoint(both[1], self.tap)

    def setup(
        self,
        teacher_branches: tuple[Branch, ...],
        student_branches: tuple[Branch, ...],
        recipe: HeadRecipe,
    ) -> None:
        """Settles position and weights, checks them, and makes a projection where widths differ."""
        if self.position is None:
            self.position = recipe.position
        if self.position is None:
            self.position = _last_positions(teacher_branches, student_branches)
        self.comparison = self.comparison.settled(recipe)
        student_point, teacher_point = self.split
        for teacher, student in zip(teacher_branches, student_branches, strict=True):
            sides = (("teacher", teacher, teacher_point), ("student", student, student_point))
            for side, branch, point in sides:
                try:
                    branch.check(point)
                except ValueError as error:
                    raise ValueError(f"{side}: {error}") from None
            _check_kinds(teacher, teacher_point, student, student_point)
            self._add_projections(teacher, student)

    def _add_projections(self, teacher: Branch, student: Branch) -> None:
        student_point, teacher_point = self.split
        for level in range(max(len(teacher.towers), len(student.towers))):
            width = student.tower(level).width(student_point.position)
            teacher_width = teacher.tower(level).width(teacher_point.position)
            if width != teacher_width:
                per_level = len(teacher.towers) > 1 or len(student.towers) > 1
                key = f"{student.name}_level{level}" if per_level else student.name
                self.projections[key] = ChannelProjection(width, teacher_width)
                _logger.info(
                    "%s: the split features differ in width, %d (student) and %d (teacher): a 1x1 projection "
                    "is made and trained with the student, and left out of it when it is saved",
                    key,
                    width,
                    teacher_width,
                )

    def points(self, branch: str) -> tuple[TapPoint, TapPoint]:
        """The split, on either side."""
        return self.split

    def observe_teacher(self, features: Tensor) -> FeatureStatistics:
        """Alignment needs the teacher's statistics only, so its features need not be kept."""
        return feature_statistics(features)

    def loss_names(self) -> tuple[str, ...]:
        """The losses whose weight is not 0."""
        return self.comparison.names

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Holds the cross-head predictions against the teacher's own."""
        return self.comparison.losses(self.cross_head(step), step)

    def cross_head(self, step: Step) -> Predictions:
        """What the teacher's head makes of the student's features."""
        return step.predict_as_teacher(
            {branch.name: self._tower_outputs(branch, step) for branch in step.teacher_branches}
        )

    def _tower_outputs(self, branch: Branch, step: Step) -> Iterator[Tensor]:
        """The rest of a teacher's towers on the student's features, level by level."""
        taps: Sequence[Tapped] = step.student_taps[branch.name]
        statistics: Sequence[FeatureStatistics] = step.teacher_taps[branch.name]
        for level, (tap, teacher) in enumerate(zip(taps, statistics, strict=True)):
            features = self._projected(tap, branch.name, level)
            yield branch.tower(level).tail(align_statistics(features, teacher), self.split[1])

    def _projected(self, tap: Tapped, branch: str, level: int) -> Tensor:
        """Tapped features of the student's, of the teacher's width."""
        features = tap.read()
        for key in (branch, f"{branch}_level{level}"):
            if key not in self.projections:
                continue
            # The projection itself would train on.
            if torch.is_grad_enabled() and not features.requires_grad:
                raise ValueError(
                    f"the student's features at {tap.place} depend on no trainable parameter, so "
                    "distilling them has no effect: they are frozen or detached before the split"
                )
            features = self.projections[key](features)
        return features


def _is_position(value: Any) -> bool:
    """Whether a value is a number of blocks, or one for either side."""
    numbers = value if isinstance(value, tuple) else (value,)
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
    return whole and (not isinstance(value, tuple) or len(value) == 2)


def _last_positions(teacher: tuple[Branch, ...], student: tuple[Branch, ...]) -> tuple[int, int]:
    """Where to split towers for which no position was published, as (student's, teacher's).

    As late as leaves the teacher's towers a block to run, and at the same distance from the student's end
    if its features are of the same kind there, maps or vectors; else as near to it as they are.
    """
    pairs = [(t.tower(0), s.tower(0)) for t, s in zip(teacher, student, strict=True)]
    theirs, ours = (min(len(tower.blocks) for tower in side) for side in zip(*pairs, strict=True))
    own = [*range(max(ours - 1, 0), -1, -1), ours]
    # The inputs of both, at 0, are maps.
    return next(
        (student_position, position)
        for position in range(max(theirs - 1, 0), -1, -1)
        for student_position in own
        if all(t.is_flat(position) == s.is_flat(student_position) for t, s in pairs)
    )


def _check_kinds(teacher: Branch, teacher_point: TapPoint, student: Branch, student_point: TapPoint) -> None:
    """Raises ``ValueError`` where one side's features are vectors at the split and the other's are maps."""
    theirs, ours = teacher.tower(0), student.tower(0)
    flat = theirs.is_flat(teacher_point.position), ours.is_flat(student_point.position)
    if flat[0] == flat[1]:
        return
    kinds = ["vectors" if side else "maps" for side in flat]
    fitting = [n for n in range(len(theirs.blocks) + 1) if theirs.is_flat(n) == flat[1]]
    after = [f"after block {point.position}" for point in (teacher_point, student_point)]
    raise ValueError(
        f"the {student.name} branch is split where features are {kinds[0]} (teacher, {after[0]}) and "
        f"{kinds[1]} (student, {after[1]}): give position=(student's, teacher's); {fitting} will do for the "
        f"teacher beside {student_point.position} for the student"
    )
