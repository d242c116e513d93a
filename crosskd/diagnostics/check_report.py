"""What `crosskd.check` has found out, to read or to take numbers from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from crosskd.towers import TapPoint

__all__ = ["LEAST_OVERLAP", "SURE", "SURE_DETECTION", "CheckReport", "Confidence", "Fit", "LossSize", "Split"]

SURE = 0.5
SURE_DETECTION = 0.3
LEAST_OVERLAP = 0.5
_FEW = 30  # objects, of which a measured AP says little


@dataclass(frozen=True)
class Split:
    """Where a method reads a branch: tap points; per level the student's shape, the teacher's channels."""

    method: str
    branch: str
    student: TapPoint
    teacher: TapPoint
    student_shapes: tuple[tuple[int, ...], ...]
    teacher_widths: tuple[int, ...]


@dataclass(frozen=True)
class LossSize:
    """A loss's value, and the norm of its gradient over all of the student's parameters."""

    value: float
    gradient: float


@dataclass(frozen=True)
class Confidence:
    """Per image, the teacher's largest class probability, and how many anchors have one of at least 0.5."""

    highest: tuple[float, ...]
    sure: tuple[int, ...]


@dataclass(frozen=True)
class Fit:
    """How well the teacher's detections fit the objects: the best of its predictions, without duplicates.

    An object is found by a detection with a score of at least 0.3 that overlaps it by an IoU of at least 0.5.

    Attributes:
        images: how many with known objects there are.
        objects: how many there are.
        found: by detections of their class.
        found_in_any_class: by any.
        ap: COCO's average precision over IoUs from 0.5 to 0.95, from 0 to 100.
        ap50: the same at 0.5.
        duplicates: per image, such detections over an object that another one found.
        false_alarms: per image, those over no object.
        taken: for each true class, how many of its objects the surest prediction assigns to each class.
        classless: classes can't be compared, and any counts as right.
    """

    images: int
    objects: int
    found: int
    found_in_any_class: int
    ap: float
    ap50: float
    duplicates: float
    false_alarms: float
    taken: Mapping[int, Mapping[int, int]]
    classless: bool = False

    @property
    def seen(self) -> int:
        """How many objects have a prediction over them that says a class."""
        return sum(sum(of_class.values()) for of_class in self.taken.values())

    @property
    def right(self) -> int:
        """How many of these are taken for what they are."""
        return sum(of_class.get(label, 0) for label, of_class in self.taken.items())

    def mostly(self) -> dict[int, int]:
        """For which class the objects of each are taken most often."""
        return {label: max(of, key=lambda other: of[other]) for label, of in self.taken.items()}


@dataclass(frozen=True, repr=False)
class CheckReport:
    """What `check` has found out; it shows itself by ``print``, in a notebook and in the interpreter.

    Attributes:
        teacher: its type, size and adapter.
        student: likewise.
        images: how many the teacher was judged on.
        head_types: of the teacher's heads that are distilled, whose settings hold; none for feature maps.
        splits: where features inside a head are read, by method and branch.
        projections: that are made because widths differ.
        differences: between the two, in words.
        own_losses: the student's own on the first batch, by name.
        distillation_losses: the methods', by name.
        confidence: the teacher's on these images; ``None`` for a backbone.
        fit: of the teacher's detections to the objects; ``None`` where either is missing.
        remarks: what deserves a second look, each with what to do about it.
    """

    teacher: str
    student: str
    images: int
    head_types: tuple[str, ...]
    splits: tuple[Split, ...]
    projections: tuple[str, ...]
    differences: tuple[str, ...]
    own_losses: Mapping[str, LossSize]
    distillation_losses: Mapping[str, LossSize]
    confidence: Confidence | None
    fit: Fit | None
    remarks: tuple[str, ...]

    @property
    def losses(self) -> dict[str, LossSize]:
        """All of them."""
        return {**self.own_losses, **self.distillation_losses}

    @property
    def gradient_ratio(self) -> float | None:
        """The distillation's gradient over that of the student's own losses; ``None`` without the latter."""
        theirs, own = (
            math.hypot(*(size.gradient for size in sizes.values()))
            for sizes in (self.distillation_losses, self.own_losses)
        )
        return theirs / own if own else None

    @property
    def verdict(self) -> str:
        """Whether there is something to look at before a long run, in one line."""
        if self.remarks:
            return f"look at {len(self.remarks)} thing{'s' * (len(self.remarks) > 1)} before a long run"
        if self.fit is None:
            return "no fault found, but without objects the teacher's detections can't be judged"
        return "ready: no fault found"

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [self.verdict, *(f"  {number}. {remark}" for number, remark in enumerate(self.remarks, 1))]
        lines += ["", f"teacher: {self.teacher}", f"student: {self.student}"]
        lines += [f"  differs in {difference}" for difference in self.differences]
        lines += ["", *self._lines_on_teacher(), "", *self._lines_on_splits()]
        lines.append(f"{'losses of the first batch':<26} {'value':>10} {'gradient at the student':>24}")
        for name, loss in self.losses.items():
            lines.append(f"  {name:<24} {loss.value:>10.4g} {loss.gradient:>24.4g}")
        if self.gradient_ratio is not None:
            times = f"{self.gradient_ratio:.3g} times as large as that of the student's own losses"
            lines.append(f"  the distillation's gradient is {times}; usual at the start of a")
            lines.append("  training: up to 20 for predictions, 200 for feature maps; later a quarter of it")
        return "\n".join([*lines, "", *self._lines_on_what_to_do()])

    def _lines_on_teacher(self) -> Iterator[str]:
        yield f"the teacher on {self.images} image{'s' * (self.images > 1)}"
        if self.fit is not None:
            fit, classes = self.fit, "any class" if self.fit.classless else "right class"
            others = "" if fit.classless else f", {fit.found_in_any_class} whatever the class"
            yield f"  AP {fit.ap:.1f}, AP50 {fit.ap50:.1f} (usual: AP50 of 40 to 90)"
            found = f"(score {SURE_DETECTION}, IoU {LEAST_OVERLAP}, {classes}){others}"
            yield f"  finds {fit.found} of {fit.objects} objects {found}"
            if fit.seen:
                right = f"its likeliest class is the right one over {fit.right} of {fit.seen} objects"
                yield f"  {right} (usual: 9 of 10; few: another order of classes)"
            alarms = f"{fit.false_alarms:.1f} false alarms and {fit.duplicates:.1f} duplicates per image"
            per_image = f"{fit.objects / fit.images:.1f} objects per image"
            yield f"  {alarms} (usual: fewer than the {per_image})"
        if self.confidence is not None:
            highest, sure = self.confidence.highest, self.confidence.sure
            yield (
                f"  largest class probability per image {min(highest):.3f} to {max(highest):.3f} (usual: "
                f"above {SURE}); predictions of {SURE} or more per image: {min(sure)} to {max(sure)}"
            )
        if self.confidence is None:
            yield "  it has no head, and how good it is can't be read off its maps"

    def _lines_on_splits(self) -> Iterator[str]:
        if self.head_types:
            yield f"distilled with the settings of {', '.join(self.head_types)}"
        for split, branches in _alike(self.splits):
            student = f"student after block {split.student.position}"
            teacher = f"teacher after block {split.teacher.position} ({split.teacher.tap})"
            yield f"  {split.method}, {branches}: {student}, {teacher}"
            shapes, level = split.student_shapes, 0
            for width, group in groupby(split.teacher_widths):
                first, level = level, level + len(list(group))
                which = f"level {first}" if level == first + 1 else f"levels {first} to {level - 1}"
                of_student = ", ".join(map(str, shapes[first:level]))
                yield f"    {which}: {of_student}; the teacher's width is {width}"
        for projection in self.projections:
            yield f"  projection {projection}"

    def _lines_on_what_to_do(self) -> Iterator[str]:
        yield "what to do"
        if self.remarks:
            yield "  mend what is listed first, or know why it is right here, and check again"
        if self.fit is None and self.confidence is not None:
            yield "  hand in images with their targets, so that the teacher is judged"
        elif self.fit is not None and self.fit.objects < _FEW:
            yield f"  {self.fit.objects} objects say little: hand in more images, or a loader with batches="
        yield "  then train crosskd.Distiller(teacher, student, …) in the student's place, its optimizer with"
        yield "  distiller.parameters(), and compare with the student trained alone"


def _alike(splits: tuple[Split, ...]) -> list[tuple[Split, str]]:
    """Splits that differ in the branch alone, once, with the branches' names."""
    grouped: dict[tuple[object, ...], list[Split]] = {}
    for split in splits:
        key = split.method, split.student, split.teacher, split.student_shapes, split.teacher_widths
        grouped.setdefault(key, []).append(split)
    named = []
    for group in grouped.values():
        names = " and ".join(split.branch for split in group)
        named.append((group[0], f"{names} branch{'es' * (len(group) > 1)}"))
    return named
