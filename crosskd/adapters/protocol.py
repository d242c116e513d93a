"""What an adapter must give. Read this file first when you bring a detector of your own.

An adapter holds no detector and no state: each function is handed the detector that it is about, so one
object serves teacher and student. One training step calls them in this order::

    prepare     images, targets  → pixels for both detectors
    features    pixels           → one feature map a level          (teacher, then student)
    branches    the head's towers, which the library runs and taps
    predict     tower outputs    → predictions, level by level      (teacher, student, cross-head)
    locations   anchors or points, once
    losses      the student's own losses and its label assignment, once
    decode      predictions      → boxes

Before the first step it calls `num_classes`, `strides` and `check_pair`. In eval it calls `detect` alone.

A detector of two stages has a second head, which answers for regions that the first one proposes. Its adapter
is a `TwoStageAdapter`: an `Adapter` of the first head with a `SecondStage` beside it, whose turn comes next::

    regions     the student's proposals, once
    features    what each detector pools from its own maps there   (teacher, then student)
    branches, predict, losses, decode   as above
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from crosskd.adapters.levels import LevelPairs
from crosskd.head import Branch
from crosskd.methods.recipes import HeadRecipe
from crosskd.predictions import Assignment, Predictions

__all__ = ["Adapter", "Inputs", "SecondStage", "TwoStageAdapter", "heads_of"]


@dataclass(frozen=True, eq=False)
class Inputs:
    """A batch, preprocessed once for both detectors.

    Attributes:
        student_pixels: shape (batch, channels, height, width), normalised as the student wants it.
        teacher_pixels: the same pixels, normalised as the teacher wants them. They are let go after the
            teacher's forward: from `locations` on they tell no more than their shape.
        targets: the targets in the resized image's coordinates, in the detector's own form, or ``None``.
        extra: whatever else the adapter's own functions need.
    """

    student_pixels: Tensor
    teacher_pixels: Tensor
    targets: Any
    extra: Any = None


@runtime_checkable
class Adapter(Protocol):
    """Turns a detector into towers, predictions, boxes and an assignment.

    Attributes:
        recipe: the published settings for this type of head.
    """

    recipe: HeadRecipe

    def supports(self, detector: nn.Module) -> bool:
        """Whether this adapter understands a detector."""
        ...

    def num_classes(self, detector: nn.Module) -> int:
        """How many classes a detector predicts logits for."""
        ...

    def strides(self, detector: nn.Module) -> Sequence[float] | None:
        """Pixels between neighbouring locations, a level; ``None`` where only an image could tell."""
        ...

    def check_pair(self, teacher: nn.Module, student: nn.Module, levels: LevelPairs) -> None:
        """Raises ``ValueError``, saying what differs and what to do, for a pair that can't be distilled.

        Called once, when the `Distiller` is made, which has checked types, classes and strides by then:
        what is left are anchors, box coding, whatever else must agree.

        Args:
            teacher: of a type that `supports` accepts, like the student.
            student: the detector to train.
            levels: which of the teacher's levels belongs to each of the student's.
        """
        ...

    def branches(self, detector: nn.Module) -> tuple[Branch, ...]:
        """The head's branches, in the same order and under the same names for both detectors."""
        ...

    def prepare(self, teacher: nn.Module, student: nn.Module, images: Any, targets: Any) -> Inputs:
        """The student's own preprocessing, once; the teacher gets the same resized pixels.

        Raises:
            ValueError: targets that the student's own training would refuse.
        """
        ...

    def features(self, detector: nn.Module, pixels: Tensor) -> Sequence[Tensor]:
        """What the head is fed: a tensor (batch, channels, height, width) a level, finest first."""
        ...

    def predict(self, detector: nn.Module, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Runs the head's predictors on the tower outputs of one level.

        Args:
            detector: whose predictors to run.
            level: whose outputs they are, counted as in `features`, for what differs by level.
            towers: by branch name, the tower's output (batch, channels, height, width).

        Returns:
            The level's predictions, its locations row by row, a location's anchors one behind the other.
        """
        ...

    def locations(self, detector: nn.Module, inputs: Inputs, features: Sequence[Tensor]) -> Any:
        """The anchors or points of a batch, in the form that `losses` and `decode` want."""
        ...

    def decode(self, detector: nn.Module, predictions: Predictions, locations: Any) -> Tensor:
        """Boxes of shape (batch, anchors, 4), xyxy in resized pixels, not clipped to the image."""
        ...

    def losses(
        self, student: nn.Module, predictions: Predictions, locations: Any, inputs: Inputs
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The student's own losses under their own names, and the assignment they were made with."""
        ...

    def detect(self, student: nn.Module, images: Any, targets: Any) -> Any:
        """What the student alone answers to images: ``student(images)`` for most detectors.

        Args:
            student: in eval mode.
            images: as `prepare` takes them.
            targets: what was given beside the images, ``None`` mostly: some frameworks carry an image's
                size there.
        """
        ...

    def check_locations(self, teacher: Any, student: Any, levels: LevelPairs) -> None:
        """Raises ``ValueError`` where teacher and student predict boxes at different places.

        Called on the first step with what `locations` gives for each, for what can't be seen before.

        Args:
            teacher: the teacher's locations, of all its levels.
            student: the student's.
            levels: which of the teacher's levels belongs to each of the student's.
        """
        ...


@runtime_checkable
class SecondStage(Protocol):
    """Takes apart a head that answers for regions. Like an adapter it holds no detector and no state.

    Teacher and student answer for the same regions, the student's own, each with features from its own maps.
    All images' regions stand one behind the other, in one level: towers take (regions, channels, height,
    width) or (regions, channels), and predictions have the shape (1, regions, …).

    Attributes:
        recipe: the settings that hold for this head unless others are given.
    """

    recipe: HeadRecipe

    def num_classes(self, detector: nn.Module) -> int:
        """How many classes a detector predicts logits for, the background included."""
        ...

    def check_pair(self, teacher: nn.Module, student: nn.Module) -> None:
        """Raises ``ValueError``, saying what differs and what to do, for heads that can't be compared.

        Where no method distils this head, or the first one, its check gets the student as both.
        """
        ...

    def branches(self, detector: nn.Module) -> tuple[Branch, ...]:
        """The head's branches, in the same order and under the same names for both detectors."""
        ...

    def regions(self, student: nn.Module, predictions: Predictions, locations: Any, inputs: Inputs) -> Any:
        """The regions of a batch, which the student proposes, as constants.

        Called after the first head's `Adapter.losses`, so that random numbers are drawn in the detector's
        own order.

        Args:
            student: whose first head made the predictions.
            predictions: the first head's.
            locations: the first head's.
            inputs: with targets the regions are those that the student's own losses are made on; without,
                as many of its best.
        """
        ...

    def counts(self, regions: Any) -> Sequence[int]:
        """How many regions each image has."""
        ...

    def features(
        self, detector: nn.Module, maps: Sequence[Tensor], regions: Any, inputs: Inputs
    ) -> Sequence[Tensor]:
        """What the head is fed: one level, a tensor (regions, channels, height, width).

        Args:
            detector: pools it.
            maps: what `Adapter.features` gave for this detector.
            regions: the student's.
            inputs: what this detector's maps were made of. With a view of its own, the teacher's images
                may be of another size than those that the regions belong to.
        """
        ...

    def predict(self, detector: nn.Module, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Runs the head's predictors on the tower outputs, ``level`` always 0; shape (1, regions, …)."""
        ...

    def decode(self, detector: nn.Module, predictions: Predictions, regions: Any) -> Tensor:
        """Boxes of shape (1, regions, 4), or (1, regions, classes, 4): xyxy in resized pixels, unclipped."""
        ...

    def losses(
        self, student: nn.Module, predictions: Predictions, regions: Any, inputs: Inputs
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The student's own losses of this head under their own names, and the assignment behind them."""
        ...

    def assign_unlabelled(self, student: nn.Module, teacher: Predictions, threshold: float) -> Assignment:
        """The assignment for images without targets; arguments as for `TwoStageAdapter`'s."""
        ...


@runtime_checkable
class TwoStageAdapter(Adapter, Protocol):
    """An adapter of a detector's first head, with its second head beside it.

    Attributes:
        parts: the names of the two heads, by which methods choose one (``CrossKD(part=…)``).
        second: the second head.
    """

    parts: tuple[str, str]
    second: SecondStage

    def assign_unlabelled(self, student: nn.Module, teacher: Predictions, threshold: float) -> Assignment:
        """The first head's assignment for images without targets, where its losses are means over a sample.

        Args:
            student: whose sampling to follow.
            teacher: its predictions.
            threshold: where the teacher is at least this sure (class probability), there is an object.
        """
        ...


def heads_of(adapter: Adapter) -> dict[str | None, Adapter | SecondStage]:
    """What takes each of a detector's heads apart, by the head's name, in the order in which they run.

    A detector's only head has no name, ``None``. Adapters are asked for a ``second`` attribute and not for
    their type, for some are wrapped.
    """
    second = getattr(adapter, "second", None)
    if second is None:
        return {None: adapter}
    first, last = adapter.parts  # type: ignore[attr-defined]
    return {first: adapter, last: second}
