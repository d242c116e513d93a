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
    """Where a method reads a branch's features.

    Attributes:
        method: its name.
        branch: the branch's.
        student: where the student's tower is tapped.
        teacher: where the teacher's is.
        student_shapes: the student's features per level, (batch, channels, height, width); of a head that
            answers for regions (regions, channels, height, width) or (regions, channels).
        teacher_widths: the channels of the teacher's, per level.
    """

    method: str
    branch: str
    student: TapPoint
    teacher: TapPoint
    student_shapes: tuple[tuple[int, ...], ...]
    teacher_widths: tuple[int, ...]


@dataclass(frozen=True)
class LossSize:
    """How large a loss is, and how large its gradient.

    Attributes:
        value: the loss itself.
        gradient: the norm of its gradient over all of the student's parameters.
    """

    value: float
    gradient: float


@dataclass(frozen=True)
class Confidence:
    """How sure the teacher is of its predictions.

    Attributes:
        highest: the largest class probability, per image.
        sure: how many anchors, or regions, have one of at least 0.5, per image.
    """

    highest: tuple[float, ...]
    sure: tuple[int, ...]


@dataclass(frozen=True)
class Fit:
    """How well the teacher's predictions of a probability of at least 0.1 fit the objects.

    Attributes:
        objects: how many the targets hold.
        found: how many of them overlap a prediction of their class by an IoU of at least 0.5.
        found_in_any_class: how many overlap one of whatever class.
        best_iou: each object's largest IoU with a prediction of its class, on average.
        classless: the teacher's classes can't be compared with the student's, so that any counts as right.
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
        if self.head_types:
            lines.append(f"settings of: {', '.join(self.head_types)}")
        for split in self.splits:
            lines.append(
                f"{split.method}, {split.branch} branch: student after block {split.student.position}, "
                f"teacher after block {split.teacher.position} ({split.student.tap})"
            )
            for level, shape in enumerate(split.student_shapes):
                lines.append(
                    f"  level {level}: {shape}, the teacher's has {split.teacher_widths[level]} channels"
                )
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
            fit = self.fit
            classes = "any class" if fit.classless else "right class"
            others = "" if fit.classless else f", {fit.found_in_any_class} whatever the class"
            lines.append(
                f"the teacher finds {fit.found} of {fit.objects} objects (IoU {LEAST_OVERLAP} or more, "
                f"{classes}){others}; mean best IoU {fit.best_iou:.3f}"
            )
        if self.remarks:
            lines += ["remarks", *(f"  {remark}" for remark in self.remarks)]
        return "\n".join(lines)
