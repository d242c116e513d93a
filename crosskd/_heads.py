"""One head of a pair of detectors: runs its towers on both sides, taps them, makes the methods' steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosskd.adapters.levels import LevelPairs
from crosskd.adapters.protocol import Adapter, SecondStage
from crosskd.head import Branch, Tapped, TapPoint
from crosskd.methods.base import Method, Step
from crosskd.predictions import Assignment, Predictions, join_levels

__all__ = ["Head", "Observed", "Taps", "check_anchors", "loss_name", "shape_only", "space"]

Taps = dict[str, list[Any]]
"""One method's taps: by branch name, one entry a level."""

ItemT = TypeVar("ItemT")


class Observed(NamedTuple):
    """What a head's run on one side leaves.

    Attributes:
        predictions: the teacher's are those at the student's levels and of the student's classes.
        taps: each method's, by its name.
    """

    predictions: Predictions
    taps: dict[str, Taps]


@dataclass(frozen=True, eq=False)
class Head:
    """One head of both detectors, taken apart by an adapter or by its second stage.

    Attributes:
        part: its name among several; ``None`` for a detector of one head.
        source: takes it apart.
        teacher: the frozen teacher.
        student: the student.
        levels: which of the teacher's levels belongs to each of the student's.
        class_map: the teacher's class for each of the student's, where they differ.
    """

    part: str | None
    source: Adapter | SecondStage
    teacher: nn.Module
    student: nn.Module
    levels: LevelPairs
    class_map: tuple[int, ...] | None

    def of(self, methods: Mapping[str, Method]) -> dict[str, Method]:
        """Those of some methods, by name, that distil this head."""
        return {name: method for name, method in methods.items() if method.part == self.part}

    def used(self, of_levels: Sequence[ItemT]) -> list[ItemT]:
        """Of something for each of the teacher's levels, what is there for the student's."""
        return [of_levels[level] for level in self.levels.of_teacher(len(of_levels))]

    def teacher_branches(self) -> tuple[Branch, ...]:
        """The teacher's head, with towers for the levels that the student has."""
        return tuple(
            branch if len(branch.towers) == 1 else replace(branch, towers=tuple(self.used(branch.towers)))
            for branch in self.source.branches(self.teacher)
        )

    def level_sizes(
        self, teacher: Sequence[Tensor], student: Sequence[Tensor]
    ) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """The sizes of the levels that are compared, the teacher's and the student's.

        Args:
            teacher: all its feature maps.
            student: likewise.
        """
        last = _channels_last(self.teacher_branches())
        return [space(m, last) for m in self.used(teacher)], [space(m, last) for m in student]

    def check_levels(self, teacher: Sequence[Tensor], student: Sequence[Tensor], *, resized: bool) -> None:
        """Raises ``ValueError`` where the levels of the two differ in number or size.

        Args:
            teacher: all its feature maps.
            student: likewise.
            resized: the teacher's are resized, so that sizes may differ.
        """
        theirs, ours = self.level_sizes(teacher, student)
        if theirs != ours and not (resized and len(theirs) == len(ours)):
            raise ValueError(
                f"the levels differ: {theirs} (teacher), {ours} (student) as (height, width). Both need the "
                "same strides, and images of the same size; build them with the same pyramid levels, or have "
                "the teacher's resized by resize_levels=True"
            )

    def check_decoding(self, predictions: Predictions, locations: Any) -> None:
        """Raises ``ValueError`` where one prediction is another box to the teacher than to the student."""
        try:
            theirs, ours = (
                self.source.decode(d, predictions, locations).flatten(0, -2)
                for d in (self.teacher, self.student)
            )
        except ValueError:
            return  # nothing decodes here; a method that asks for boxes is told so
        if torch.allclose(theirs, ours, rtol=1e-3, atol=1e-2, equal_nan=True):
            return
        at = int((theirs - ours).abs().amax(dim=-1).argmax())
        boxes = [[round(value, 2) for value in side[at].tolist()] for side in (theirs, ours)]
        raise ValueError(
            f"box coding differs: one prediction is the box {boxes[0]} (teacher) and {boxes[1]} (student), "
            "xyxy in pixels. Give both the same means, deviations, scale or strides, and train the teacher "
            "with them"
        )

    # -- one training step ------------------------------------------------------------------------

    def observe_teacher(
        self,
        maps: Sequence[Tensor],
        methods: Mapping[str, Method],
        student_maps: Sequence[Tensor] | None = None,
    ) -> Observed:
        """The teacher's predictions, and what each method keeps of its features: no more.

        Args:
            maps: of all the teacher's levels.
            methods: those of this head.
            student_maps: whose sizes the teacher's features are to be resized to; ``None`` not to.
        """
        # No decorator: the compiler doesn't follow a decorated method of an object that it made itself.
        with torch.no_grad():
            branches = self.teacher_branches()

            def keep(name: str, tapped: Tapped) -> Any:
                return methods[name].observe_teacher(tapped.read())

            towers, taps = _run_towers(branches, self.used(maps), methods, 1, keep)
            if student_maps is not None:
                last = _channels_last(branches)
                sizes = [space(m, last) for m in student_maps]
                towers = {name: _resized(outputs, sizes, last) for name, outputs in towers.items()}
            predictions = self.predict_as_teacher(towers, len(self.used(maps)))
            return Observed(predictions.detach(), taps)

    def run_student(self, maps: Sequence[Tensor], methods: Mapping[str, Method]) -> Observed:
        """The student's predictions, and its features where each method taps them."""
        branches = self.source.branches(self.student)
        towers, taps = _run_towers(branches, maps, methods, 0, lambda _, tapped: tapped)
        predictions = join_levels(
            self.source.predict(self.student, level, outputs)
            for level, outputs in _by_level(towers, range(len(maps)))
        )
        return Observed(predictions, taps)

    def predict_as_teacher(self, towers: Mapping[str, Iterable[Tensor]], levels: int) -> Predictions:
        """The teacher's predictors on outputs of its towers, of the student's classes alone.

        Args:
            towers: by branch name, one output for each of the student's levels.
            levels: how many the student has.
        """
        indices = self.levels.of_teacher(levels)
        return join_levels(
            self.source.predict(self.teacher, level, outputs).of_classes(self.class_map)
            for level, outputs in _by_level(towers, indices)
        )

    def distil(
        self,
        methods: Mapping[str, Method],
        teacher: Observed,
        student: Observed,
        assignment: Assignment,
        locations: Any,
        levels: int,
    ) -> dict[str, dict[str, Tensor]]:
        """Each method's losses.

        Args:
            methods: those of this head.
            teacher: what was observed of it.
            student: what its run has left.
            assignment: the student's own.
            locations: the student's, or its regions.
            levels: how many the student has.
        """
        branches = self.teacher_branches()
        count = getattr(self.source, "counts", None)
        counts = None if count is None else tuple(count(locations))
        return {
            name: method(
                Step(
                    student=student.predictions,
                    teacher=teacher.predictions,
                    assignment=assignment,
                    teacher_branches=branches,
                    student_taps=student.taps[name],
                    teacher_taps=teacher.taps[name],
                    predict_as_teacher=lambda towers: self.predict_as_teacher(towers, levels),
                    boxes=lambda predictions: self.source.decode(self.student, predictions, locations),
                    counts=counts,
                )
            )
            for name, method in methods.items()
        }


def _run_towers(
    branches: Sequence[Branch],
    maps: Sequence[Tensor],
    methods: Mapping[str, Method],
    side: int,
    keep: Callable[[str, Tapped], Any],
) -> tuple[dict[str, Iterator[Tensor]], dict[str, Taps]]:
    """Runs a head's towers, tapping them for each method on the way.

    Args:
        branches: of the head.
        maps: a feature map (batch, channels, height, width) a level.
        methods: those that want taps, by name.
        side: which of a method's two points to tap: 0 the student's, 1 the teacher's.
        keep: what to make of a method's tapped features.

    Returns:
        By branch name, the outputs a level, each made when it is asked for; and the taps, which are
        there once the outputs have been.
    """
    taps: dict[str, Taps] = {name: {} for name in methods}

    def outputs(branch: Branch, points: dict[str, TapPoint]) -> Iterator[Tensor]:
        wanted = set(points.values())
        for level, feature_map in enumerate(maps):
            output, noted = branch.tower(level).run(feature_map, wanted)
            for name, point in points.items():
                taps[name].setdefault(branch.name, []).append(keep(name, noted[point]))
            yield output

    towers = {}
    for branch in branches:
        both = {name: method.points(branch.name) for name, method in methods.items()}
        points = {name: pair[side] for name, pair in both.items() if pair is not None}
        towers[branch.name] = outputs(branch, points)
    return towers, taps


def _by_level(
    towers: Mapping[str, Iterable[Tensor]], levels: Iterable[int]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The towers' outputs level by level, each asked for when its turn comes."""
    outputs = {name: iter(tower) for name, tower in towers.items()}
    for level in levels:
        yield level, {name: next(tower) for name, tower in outputs.items()}


def _channels_last(branches: Sequence[Branch]) -> bool:
    """Whether a head takes (batch, …, channels): its first tower tells."""
    return branches[0].towers[0].channels_last


def space(feature_map: Tensor, channels_last: bool) -> tuple[int, ...]:
    """A level's size without batch and channels: (height, width), (locations,) or ()."""
    return tuple(feature_map.shape[1:-1] if channels_last else feature_map.shape[2:])


def _resized(
    outputs: Iterable[Tensor], sizes: Sequence[tuple[int, ...]], channels_last: bool
) -> Iterator[Tensor]:
    """Feature maps, resized where they have another (height, width)."""
    for output, size in zip(outputs, sizes, strict=True):
        if space(output, channels_last) == size:
            yield output
            continue
        if output.ndim != 4 or len(size) != 2:
            raise ValueError(
                f"resize_levels=True, but the teacher's features {tuple(output.shape)} are no map of "
                "(height, width): what the student predicts at must be given to the teacher as it is"
            )
        features = output.movedim(-1, 1) if channels_last else output
        features = F.interpolate(features, size=size, mode="bilinear", align_corners=False)
        yield features.movedim(1, -1) if channels_last else features


def check_anchors(teacher: Predictions, student: Predictions) -> None:
    """Raises ``ValueError`` where the two predict other numbers of boxes, or boxes of another form."""
    kinds = [
        "a sigmoid a class" if p.background is None else f"a softmax whose class {p.background} is no object"
        for p in (teacher, student)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"the classes have {kinds[0]} (teacher), {kinds[1]} (student): probabilities of one kind can't "
            "be compared with those of the other; build both heads alike"
        )
    theirs, ours = (p.regression.shape for p in (teacher, student))
    if theirs != ours:
        raise ValueError(
            f"the teacher's predictions are {tuple(theirs)} and the student's {tuple(ours)}, as (batch, "
            "anchors, 4 or 4 x bins): both need as many anchors at each location, and as many bins"
        )


def shape_only(tensor: Tensor) -> Tensor:
    """A stand-in of the same shape and no memory, so that what the teacher has used can be freed."""
    return tensor.new_empty(()).expand(tensor.shape)


def loss_name(key: str, part: str | None) -> str:
    """A loss's name with its part in it: ``kd_cls`` of ``"rpn"`` is ``kd_rpn_cls``."""
    if part is None:
        return key
    return f"kd_{part}_{key[3:]}" if key.startswith("kd_") else f"{part}_{key}"
