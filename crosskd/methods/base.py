"""What a method states and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

from torch import Tensor, nn

from crosskd.pairing import Pair
from crosskd.schedule import Schedule
from crosskd.step import Step
from crosskd.towers import Tapped, TapPoint

__all__ = ["Method", "Requirement", "Taught"]

Requirement = Literal["maps", "towers", "predictions", "objects", "queries"]
Taught = Literal["features", "predictions", "cross-head predictions"]


class Method(nn.Module, ABC):
    """A way to distil: takes a `crosskd.step.Step`, returns named losses.

    A method of your own derives from this class, states what it ``requires`` and implements `forward`. It
    demands in `setup` what must agree between the two detectors, and makes there what it trains. A method
    that requires ``"towers"`` or ``"predictions"`` distils a head; of detectors with several heads each is
    distilled by a copy of the method.

    Args:
        schedule: how strongly the method counts as training goes on; always fully without one.
        name: what stands in front of the method's losses where two methods' would clash.
        head: of a detector with several heads the one to distil; each of them unless given.

    Attributes:
        requires: what of a step the method reads: ``"maps"`` (both feature pyramids), ``"towers"`` (features
            inside a head), ``"predictions"`` (with anchors and label assignment), ``"objects"`` (boxes and
            labels of the batch), ``"queries"`` (a decoder's, which can be run once more). What no method
            requires is not run, or not kept.
        teaches: what the losses pull at. Methods of ``"predictions"`` pull the student's own predictions away
            from the labels, which methods of ``"cross-head predictions"`` are made to avoid: together they
            give a warning.
        watches_maps: the method puts hooks on the student's maps. A compiled step then ends a graph behind
            them, for inside one the gradient at a map is not to be seen.

    Example:
        >>> class MapDistance(Method):
        ...     requires = frozenset({"maps"})
        ...
        ...     def forward(self, step):
        ...         student, teacher = step.student.maps[0], step.teacher.maps[0]
        ...         return {"kd_maps": (student - teacher).square().mean()}
        >>> sorted(MapDistance(name="distance").requires)
        ['maps']
    """

    requires: frozenset[Requirement] = frozenset({"predictions"})
    teaches: Taught = "features"
    watches_maps: bool = False

    def __init__(self, *, schedule: Schedule | None = None, name: str, head: str | None = None) -> None:
        super().__init__()
        if isinstance(self.requires, str):
            raise TypeError(f'requires must be a set such as frozenset({{"maps"}}), got {self.requires!r}')
        if not isinstance(schedule, Schedule | None):
            given = type(schedule).__name__
            raise TypeError(f"schedule must be a Schedule, such as Schedule(stop=1000), got a {given}")
        self.schedule = schedule
        self.name = name
        self.head = head

    def distils_heads(self) -> bool:
        """Whether the method is given one head of each detector."""
        return not self.requires.isdisjoint({"towers", "predictions", "queries"})

    def setup(self, pair: Pair) -> None:
        """Called once, by the `crosskd.Distiller`: demands what must agree, makes projections.

        Args:
            pair: the two detectors' adapters, and the heads to distil where the method distils heads.

        Raises:
            ValueError: a pair that can't be distilled so, or settings that don't fit it.
        """
        return

    def check(self, step: Step) -> None:
        """Called on the method's first step, before `forward`: demands what only a batch shows.

        Raises:
            ValueError: a pair that can't be distilled so.
        """
        return

    def tap_points(self, branch: str) -> tuple[TapPoint, TapPoint] | None:
        """Where to tap a branch's towers, as (student's, teacher's); ``None`` not to."""
        return None

    def keep_of_teacher(self, tapped: Tapped) -> Any:
        """What to keep of the teacher's features at a tap until `forward`; all of them by default.

        With a `crosskd.cache.TeacherCache` it is called for each image alone, and gives a tensor of shape
        (1, …), of which a batch's are put one behind the other, or `crosskd.align.FeatureStatistics`.
        """
        return tapped.read()

    def loss_names(self) -> tuple[str, ...]:
        """The names of the losses, which are reported as 0 once the schedule has stopped the method."""
        return ()

    @abstractmethod
    def forward(self, step: Step) -> dict[str, Tensor]:
        """Returns scalar losses by name (``kd_cls``…), already weighted."""
