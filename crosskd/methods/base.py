"""What a method is given and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from crosskd.head import Branch, Tapped, TapPoint
from crosskd.methods.recipes import HeadRecipe
from crosskd.predictions import Assignment, Predictions
from crosskd.schedule import Schedule

__all__ = ["Method", "Step"]


@dataclass(frozen=True, eq=False)
class Step:
    """One training step, as a method sees it.

    Attributes:
        student: the student's predictions.
        teacher: the teacher's predictions, constants.
        assignment: which anchors count.
        teacher_branches: the teacher's head.
        student_taps: by branch name, one entry a level: the features at the method's student point.
        teacher_taps: likewise, what `Method.observe_teacher` made of the teacher's features.
        predict_as_teacher: turns outputs of the teacher's towers, by branch name and in level order,
            into predictions; gradients flow through it.
        boxes: decodes predictions into boxes of shape (batch, anchors, 4), xyxy in pixels; of shape
            (batch, anchors, classes, 4) where each class has one.
        counts: of a head that answers for regions, how many of them each image has: they stand one behind
            the other in a batch of one.
    """

    student: Predictions
    teacher: Predictions
    assignment: Assignment
    teacher_branches: tuple[Branch, ...]
    student_taps: Mapping[str, Sequence[Tapped]]
    teacher_taps: Mapping[str, Sequence[Any]]
    predict_as_teacher: Callable[[Mapping[str, Iterable[Tensor]]], Predictions]
    boxes: Callable[[Predictions], Tensor]
    counts: Sequence[int] | None = None


class Method(nn.Module, ABC):
    """A way to distil: takes a `Step`, returns named losses.

    A method of your own derives from this class and implements `forward`; the other functions have
    defaults that suit a method which looks at predictions only.

    Args:
        schedule: how strongly the method counts as training goes on; always fully without one.
        name: what stands in front of the method's losses where two methods' would clash.
        part: of a detector with several heads the one to distil; each of them, by a copy of the method,
            unless given.
    """

    def __init__(self, *, schedule: Schedule | None = None, name: str, part: str | None = None) -> None:
        super().__init__()
        self.schedule = schedule
        self.name = name
        self.part = part

    def setup(
        self,
        teacher_branches: tuple[Branch, ...],
        student_branches: tuple[Branch, ...],
        recipe: HeadRecipe,
    ) -> None:
        """Called once, by the `Distiller`: settles open settings, checks them, makes projections.

        Raises:
            ValueError: settings that don't fit the two heads.
        """
        return

    def points(self, branch: str) -> tuple[TapPoint, TapPoint] | None:
        """Where to tap a branch of the (student, teacher), or ``None`` not to."""
        return None

    def observe_teacher(self, features: Tensor) -> Any:
        """What to keep of the teacher's tapped features until `forward`; all of them by default."""
        return features

    def loss_names(self) -> tuple[str, ...]:
        """The names of the losses, which are reported as 0 once the schedule has stopped the method."""
        return ()

    @abstractmethod
    def forward(self, step: Step) -> dict[str, Tensor]:
        """Returns scalar losses by name (``kd_cls``…), already weighted."""
