"""What `crosskd.check` has found out, to read or to take numbers from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from crosskd.towers import TapPoint

__all__ = ["LEAST_OVERLAP", "SURE", "CheckReport", "Confidence", "Fit", "LossSize", "Split"]

SURE = 0.5
LEAST_OVERLAP = 0.5


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
    """How well the teacher's predictions of a probability of at least 0.1 fit the objects.

    Objects are found that overlap one of their class, or of any, by an IoU of at least 0.5; ``best_iou`` is
    the mean of each one's largest. If ``classless``, classes can't be compared, and any counts as right.
    """

    objects: int
    found: int
    found_in_any_class: int
    best_iou: float
    classless: bool = False


@dataclass(frozen=True)
class CheckReport:
    """What `check` has found out; ``print`` shows it.

    Attributes:
        teacher: its type, size and adapter.
        student: likewise.
        head_types: of the teacher's heads that are distilled, whose settings hold; none for feature maps.
        splits: where features inside a head are read, by method and branch.
        projections: that are made because widths differ.
        differences: between the two, in words.
        own_losses: the student's own, by name.
        distillation_losses: the methods', by name.
        confidence: the teacher's on these images; ``None`` for a backbone.
        fit: of the teacher's predictions to the objects; ``None`` where either is missing.
        remarks: what deserves a second look, in words.
    """

    teacher: str
    student: str
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

    def __str__(self) -> str:
        lines = [f"teacher: {self.teacher}", f"student: {self.student}"]
        lines += [f"settings of: {', '.join(self.head_types)}"] if self.head_types else []
        for split in self.splits:
            student = f"student after block {split.student.position}"
            teacher = f"teacher after block {split.teacher.position} ({split.student.tap})"
            lines.append(f"{split.method}, {split.branch} branch: {student}, {teacher}")
            for level, (shape, width) in enumerate(
                zip(split.student_shapes, split.teacher_widths, strict=True)
            ):
                lines.append(f"  level {level}: {shape}, the teacher's has {width} channels")
        lines += [f"projection {projection}" for projection in self.projections]
        lines += ["differences", *(f"  {difference}" for difference in self.differences or ("none",))]
        lines.append(f"{'losses':<26} {'value':>10} {'gradient':>10}")
        for name, loss in self.losses.items():
            lines.append(f"  {name:<24} {loss.value:>10.4g} {loss.gradient:>10.4g}")
        if self.confidence is not None:
            highest, sure = self.confidence.highest, self.confidence.sure
            lines.append(
                f"the teacher's largest class probability per image: {min(highest):.3f} to "
                f"{max(highest):.3f}; predictions of {SURE} or more per image: {min(sure)} to {max(sure)}"
            )
        if self.fit is not None:
            classes = "any class" if self.fit.classless else "right class"
            others = "" if self.fit.classless else f", {self.fit.found_in_any_class} whatever the class"
            found = f"{self.fit.found} of {self.fit.objects} objects (IoU {LEAST_OVERLAP} or more, {classes})"
            lines.append(f"the teacher finds {found}{others}; mean best IoU {self.fit.best_iou:.3f}")
        lines += ["remarks", *(f"  {remark}" for remark in self.remarks)] if self.remarks else []
        return "\n".join(lines)
