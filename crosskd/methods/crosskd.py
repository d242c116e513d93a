"""CrossKD: the student's intermediate features, read by the rest of the teacher's head."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from crosskd._unchanged import unchanged
from crosskd.adapters.base import Head
from crosskd.align import ChannelProjection, FeatureStatistics, align_statistics, feature_statistics
from crosskd.methods.base import Method, Requirement, Taught
from crosskd.methods.comparison import Comparison
from crosskd.methods.settings import RegressionLoss, settings_for
from crosskd.pairing import (
    Pair,
    anchors_agree,
    require_all_levels,
    require_branches,
    require_grid,
    require_heads,
    require_same_regions,
)
from crosskd.predictions import Predictions, join_levels
from crosskd.schedule import Schedule
from crosskd.step import Step
from crosskd.towers import Branch, Tap, Tapped, TapPoint, Tower

__all__ = ["CrossKD"]

_logger = logging.getLogger("crosskd")


class CrossKD(Method):
    """Cross-head distillation: the student's tower features are read by the frozen teacher's head.

    After ``position`` blocks the features of each of the student's towers are aligned to the teacher's
    statistics at the same place and passed through the rest of the teacher's tower and its predictors.
    What comes out, the cross-head predictions, is compared with the teacher's own. The student's own
    predictors learn from the labels alone, so the two targets never contradict each other.

    The teacher's head judges both sides, so the two need the same strides and towers of the same branches,
    and nothing else: a RetinaNet can teach a GFL, and a teacher of 80 classes a student of three. Where the
    two are heads of one type with the same anchors, the student's own label assignment says which anchors
    count and what the losses are divided by; otherwise the teacher's does, on the objects of the batch.

    A branch whose losses all have a weight of 0 is left alone: it is not tapped, and has no projection.

    Everything left at ``None`` takes the value published for the type of the teacher's head:

    ========= ======== ========== =================================== ==============
    head      position cls_weight reg_weight                          quality_weight
    ========= ======== ========== =================================== ==============
    GFL       3        1          4 (KL of distributions)             0
    RetinaNet 3        1          1 (GIoU)                            0
    ATSS      3        1          1 (GIoU)                            1
    FCOS      2        0.4        0.75 (log IoU)                      0
    ========= ======== ========== =================================== ==============

    For other heads nothing was published; ours are in `crosskd.methods.settings`.

    Args:
        position: after how many blocks of each tower the teacher's head takes over: from 0, the
            tower's input, to the number of blocks. `crosskd.describe` prints what a detector offers.
            Two numbers, (student's, teacher's), where the towers differ in length. Of a two-stage detector,
            unless given, the last place in front of one of the teacher's blocks.
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
        head: of a two-stage detector the head to distil, ``"rpn"`` or ``"box"`` for torchvision's; both of
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

    requires: frozenset[Requirement] = frozenset({"towers", "predictions"})
    teaches: Taught = "cross-head predictions"

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
        head: str | None = None,
    ) -> None:
        super().__init__(schedule=schedule, name=name, head=head)
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
        self.class_map: tuple[int, ...] | None = None
        self.idle: frozenset[str] = frozenset()
        self.anchors_agree = False

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

    def setup(self, pair: Pair) -> None:
        """Demands levels and towers that fit, settles position and weights, makes projections."""
        teacher, student = require_heads(pair)
        require_grid(pair)
        require_branches(pair)
        require_all_levels(pair)
        self.class_map = pair.class_map
        self.comparison = self.comparison.settled(teacher)
        idle = _idle_branches(pair.teacher.detector, teacher, self.comparison)
        branches = [(b, _named(student, b.name)) for b in teacher.branches if b.name not in idle]
        further = {branch.name for branch in student.branches} - {branch.name for branch in teacher.branches}
        self.idle = idle | further
        unless_given = ""
        if self.position is None:
            self.position = settings_for(teacher).position
            unless_given = (
                f". The position was not given: {self.position} is what holds for the teacher's "
                f"{teacher.head_type} head. Pass CrossKD(position=(student's, teacher's))"
            )
        if self.position is None:
            self.position = _last_positions(branches)
        student_point, teacher_point = self.split
        for of_teacher, of_student in branches:
            sides = (("teacher", of_teacher, teacher_point), ("student", of_student, student_point))
            for side, branch, point in sides:
                try:
                    branch.check(point)
                except ValueError as error:
                    raise ValueError(f"{side}: {error}{unless_given}") from None
            _check_kinds(of_teacher, teacher_point, of_student, student_point)
            _tell_of_hidden_activation(of_teacher, teacher_point)
            if not of_teacher.tower(0).is_flat(teacher_point.position):
                require_same_regions(pair)
            self._add_projections(of_teacher, of_student, pair)

    def _add_projections(self, teacher: Branch, student: Branch, pair: Pair) -> None:
        student_point, teacher_point = self.split
        per_level = len(teacher.towers) > 1 or len(student.towers) > 1
        levels = pair.levels
        if levels is None:
            count = max(len(teacher.towers), len(student.towers))
            levels = tuple((level, level) for level in range(count))
        for place, (level, teacher_level) in enumerate(levels if per_level else ((0, 0),)):
            width = student.tower(level).width(student_point.position)
            teacher_width = teacher.tower(teacher_level).width(teacher_point.position)
            if width == teacher_width:
                continue
            key = f"{student.name}_level{place}" if per_level else student.name
            self.projections[key] = ChannelProjection(width, teacher_width, bias=False)
            _logger.info(
                "%s: the split features differ in width, %d (student) and %d (teacher): a 1x1 projection is "
                "made and trained with the student, and left out of it when it is saved",
                key,
                width,
                teacher_width,
            )

    def check(self, step: Step) -> None:
        """Finds out whose label assignment says which of the teacher's anchors count."""
        self.anchors_agree = anchors_agree(step)

    def tap_points(self, branch: str) -> tuple[TapPoint, TapPoint] | None:
        """The split, on either side; ``None`` for a branch that no loss reads or the teacher doesn't have."""
        return None if branch in self.idle else self.split

    def keep_of_teacher(self, tapped: Tapped) -> FeatureStatistics:
        """Alignment needs the teacher's statistics only, so its features need not be kept."""
        return feature_statistics(tapped.read())

    def loss_names(self) -> tuple[str, ...]:
        """The losses whose weight is not 0."""
        return self.comparison.names

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Compares the cross-head predictions with the teacher's own."""
        assignment = step.assignment if self.anchors_agree else step.teacher_assignment()
        return self.comparison.losses(self.cross_head(step), step.teacher, step.teacher, assignment)

    def cross_head(self, step: Step) -> Predictions:
        """What the teacher's head makes of the student's features."""
        levels = []
        head = step.teacher.head
        for place, level in enumerate(step.teacher.levels):
            towers: dict[str, Tensor] = {}
            for branch in head.branches:
                if branch.name in self.idle:
                    continue
                features = self._projected(step.student.taps[branch.name][place], branch.name, place)
                aligned = align_statistics(features, step.teacher.taps[branch.name][place])
                towers[branch.name] = branch.tower(level).tail(aligned, self.split[1])
            for branch in head.branches:
                if branch.name in self.idle:
                    towers[branch.name] = _blank(branch.tower(level), next(iter(towers.values())))
            levels.append(head.predict(level, towers).of_classes(self.class_map))
        return join_levels(levels)

    def _projected(self, tap: Tapped, branch: str, place: int) -> Tensor:
        """Tapped features of the student's, of the teacher's width."""
        features = tap.read()
        for key in (branch, f"{branch}_level{place}"):
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


def _idle_branches(detector: nn.Module, head: Head, comparison: Comparison) -> frozenset[str]:
    """The branches that no loss reads: no prediction of a weight above 0 has a gradient there.

    Args:
        detector: the teacher.
        head: its head.
        comparison: settled.
    """
    known = {"kd_cls": "logits", "kd_reg": "regression", "kd_quality": "quality"}
    wanted = [output for name, output in known.items() if name in comparison.names]
    if head.objectness and "kd_cls" in comparison.names:  # the product of the two
        wanted.append("quality")
    # Of two branches one has the classes and the other the boxes, so that neither is idle.
    if len(head.branches) < 2 or (len(head.branches) == 2 and {"logits", "regression"} <= set(wanted)):
        return frozenset()
    like, towers = next(detector.parameters()), {}
    for branch in head.branches:
        tower = branch.tower(0)
        width, flat = tower.width(len(tower.blocks)), tower.is_flat(len(tower.blocks))
        shape = (1, width) if flat else (1, 4, 4, width) if tower.channels_last else (1, width, 4, 4)
        towers[branch.name] = torch.ones(shape, dtype=like.dtype, device=like.device, requires_grad=True)
    with torch.enable_grad(), unchanged(detector):
        predictions = head.predict(0, towers)
        read = [value for name in wanted if (value := getattr(predictions, name)) is not None]
        if not read:
            return frozenset()
        total = torch.stack([value.sum() for value in read]).sum()
        gradients = torch.autograd.grad(total, list(towers.values()), allow_unused=True)
    return frozenset(name for name, given in zip(towers, gradients, strict=True) if given is None)


def _blank(tower: Tower, like: Tensor) -> Tensor:
    """What stands for a tower's output where no loss reads it: zeros at the locations of another's."""
    width = tower.width(len(tower.blocks))
    shape = (*like.shape[:-1], width) if tower.channels_last else (like.shape[0], width, *like.shape[2:])
    return like.new_zeros(()).expand(shape)


def _is_position(value: Any) -> bool:
    """Whether a value is a number of blocks, or one for either side."""
    numbers = value if isinstance(value, tuple) else (value,)
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
    return whole and (not isinstance(value, tuple) or len(value) == 2)


def _named(head: Head, name: str) -> Branch:
    return next(branch for branch in head.branches if branch.name == name)


def _last_positions(branches: list[tuple[Branch, Branch]]) -> tuple[int, int]:
    """Where to split towers for which no position was published, as (student's, teacher's).

    As late as leaves the teacher's towers a block to run, and at the same distance from the student's end
    if its features are of the same kind there, maps or vectors; else as near to it as they are.

    Args:
        branches: (the teacher's, the student's).
    """
    pairs = [(theirs.tower(0), ours.tower(0)) for theirs, ours in branches]
    theirs, ours = (min(len(pair[side].blocks) for pair in pairs) for side in (0, 1))
    own = [*range(max(ours - 1, 0), -1, -1), ours]
    # The inputs of both, at 0, are maps.
    return next(
        (student_position, position)
        for position in range(max(theirs - 1, 0), -1, -1)
        for student_position in own
        if all(t.is_flat(position) == s.is_flat(student_position) for t, s in pairs)
    )


def _tell_of_hidden_activation(teacher: Branch, point: TapPoint) -> None:
    """Tells where aligned features may miss the activation that they pass a second time elsewhere."""
    if not point.position:
        return
    block = teacher.tower(0).blocks[point.position - 1]
    if block.activation is None and not block.has_pre:
        _logger.info(
            "block %d of the teacher's %s tower (%s) may run an activation that can't be told from the "
            "rest of it: aligned features don't pass it a second time. Let the block end in a module that is "
            "the activation for CrossKD as published",
            point.position,
            teacher.name,
            ", ".join(type(layer).__name__ for layer in block.layers),
        )


def _check_kinds(teacher: Branch, teacher_point: TapPoint, student: Branch, student_point: TapPoint) -> None:
    """Raises ``ValueError`` where the features of the two are of different kinds at the split."""
    theirs, ours = teacher.tower(0), student.tower(0)
    if theirs.channels_last != ours.channels_last:
        kinds = [
            "linear layers, channels last" if t.channels_last else "convolutions" for t in (theirs, ours)
        ]
        raise ValueError(
            f"the {student.name} tower differs in kind: {kinds[0]} (teacher), {kinds[1]} (student). Features "
            "of one can't be read by the other: build both of the same kind of layers"
        )
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
