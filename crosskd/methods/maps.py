"""What methods of feature maps share: which levels belong together, and what bridges widths and sizes."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crosskd._checks import require_numbers
from crosskd.align import ChannelProjection
from crosskd.methods.base import Method, Requirement
from crosskd.pairing import Pair
from crosskd.schedule import Schedule
from crosskd.step import Step, outside_graph
from crosskd.views import place_level, sample

__all__ = ["MapMethod"]

_logger = logging.getLogger("crosskd")


class MapMethod(Method):
    """A method that compares the feature pyramids level by level.

    The strides of the levels must agree and nothing else: an FCOS teaches a RetinaNet, a Faster R-CNN or a
    plain backbone teaches anything. Levels are matched by stride; those without a counterpart are left out
    and named once. Where widths differ, a 1x1 projection of the student's map is trained with the student
    and thrown away with the `crosskd.Distiller`.

    A method of this kind answers `weight_for` and returns in `forward` what it makes of `compared`.

    Args:
        weight: of the loss; that of `weight_for` unless given.
        levels: the student's levels to use, counted from 0, the finest; all that have a counterpart unless
            given.
        resize: resizes the teacher's maps to the student's where they differ, and takes the teacher's level
            of the nearest stride where none is equal. Without it other sizes are refused.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the loss's name where two methods' would clash.

    Attributes:
        projection_bias: whether the projections shift their channels; not where the method takes each
            channel's mean away.
        matches: (student's level, teacher's level) of those that are compared.
        projections: of the student's maps to the teacher's width, by ``level0``…, where they differ.

    Raises:
        ValueError: a weight that is not above 0, no levels.

    Example:
        >>> class MapDistance(MapMethod):
        ...     def weight_for(self, head_type):
        ...         return 2.0
        ...
        ...     def forward(self, step):
        ...         losses = [(student - teacher).abs().mean() for _, student, teacher in self.compared(step)]
        ...         return {"kd_distance": self.weight * torch.stack(losses).sum()}
        >>> MapDistance(levels=[0, 1], name="distance")
        MapDistance(
          weight=None, levels=(0, 1), resize=False
          (projections): ModuleDict()
        )
    """

    requires: frozenset[Requirement] = frozenset({"maps"})
    projection_bias: bool = True

    def __init__(
        self,
        weight: float | None = None,
        levels: Sequence[int] | None = None,
        *,
        resize: bool = False,
        schedule: Schedule | None = None,
        name: str,
    ) -> None:
        super().__init__(schedule=schedule, name=name)
        require_numbers(weight=weight)
        if weight is not None and not 0 < weight < math.inf:
            raise ValueError(f"weight must be above 0, got {weight}: choose a finite number")
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

    def weight_for(self, head_type: str) -> float:
        """The weight where none was given, for the type of the student's first head, such as ``"GFL"``.

        Raises:
            ValueError: a method that doesn't answer this, so that ``weight`` must be given.
        """
        raise ValueError(f"{type(self).__name__} has no weight of its own: pass weight=")

    def setup(self, pair: Pair) -> None:
        """Matches the levels by stride, settles the weight, makes projections where widths differ."""
        self.matches = self._matched(pair)
        if self.weight is None:
            self.weight = self.weight_for(pair.student.heads[0].head_type if pair.student.heads else "")
        for level, width, teacher_width in self.widths(pair):
            projection = self.projection(width, teacher_width)
            if projection is not None:
                self.projections[f"level{level}"] = projection

    def projection(self, width: int, teacher_width: int) -> nn.Module | None:
        """What one of the student's maps goes through first: a 1x1 projection where the widths differ."""
        if width == teacher_width:
            return None
        return ChannelProjection(width, teacher_width, bias=self.projection_bias)

    def widths(self, pair: Pair) -> list[tuple[int, int, int]]:
        """(level, the student's channels, the teacher's) of each level that is compared.

        Raises:
            ValueError: an adapter doesn't give them.
        """
        if pair.teacher.widths is None or pair.student.widths is None:
            side = "teacher" if pair.teacher.widths is None else "student"
            raise ValueError(
                f"it is unknown how many channels the {side}'s maps have: give its adapter widths=, one "
                "number per level"
            )
        return [
            (level, pair.student.widths[level], pair.teacher.widths[theirs]) for level, theirs in self.matches
        ]

    def _matched(self, pair: Pair) -> tuple[tuple[int, int], ...]:
        """(student's level, teacher's level) of those that are compared."""
        strides, theirs = pair.student.strides, pair.teacher.strides
        if pair.levels is None or strides is None or theirs is None:
            raise ValueError(
                f"{self.name} matches levels by their strides, which one of the adapters doesn't give: pass "
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

    def of_student(self, features: Tensor) -> Tensor:
        """What is compared of one of the student's maps, in front of a projection: the map itself."""
        return features

    def compared(self, step: Step) -> list[tuple[int, Tensor, Tensor]]:
        """(level, student's map, teacher's map) of each level that is compared, of one shape.

        Raises:
            ValueError: maps of other sizes without ``resize``, or a frozen map where the method has
                parameters of its own, which would be trained alone.
        """
        compared = []
        trains = next(self.parameters(), None) is not None
        for level, teacher_level in self.matches:
            student = self.of_student(step.student.maps[level])
            teacher = self._placed(step, level, teacher_level)
            if trains:
                student = _trained(student, level)
            if f"level{level}" in self.projections:
                student = self.projections[f"level{level}"](student)
            compared.append((level, student, teacher))
        return compared

    def _placed(self, step: Step, level: int, teacher_level: int) -> Tensor:
        """The teacher's map at the locations of the student's."""
        teacher, student = step.teacher.maps[teacher_level], step.student.maps[level]
        if teacher.shape[2:] == student.shape[2:] and step.alike:
            return teacher
        strides = tuple(
            None if of_side is None else of_side[at]
            for of_side, at in ((step.teacher.strides, teacher_level), (step.student.strides, level))
        )
        return self._resized(step, level, (teacher, student.detach()), strides)

    # The sizes of images change from batch to batch.
    @outside_graph
    def _resized(
        self, step: Step, level: int, maps: tuple[Tensor, Tensor], strides: Sequence[float | None]
    ) -> Tensor:
        batches = step.teacher.batch, step.student.batch
        sizes = [tuple(of_side.shape[2:]) for of_side in maps]
        grid, exact = place_level(batches, sizes, strides, step.scale, maps[0])
        if not (exact or self.resize):
            images = [list(batch.image_sizes) for batch in batches]
            raise ValueError(
                f"the maps of the student's level {level} differ in size: {sizes[0]} (teacher), {sizes[1]} "
                f"(student) as (height, width), of images of {images[0]} (teacher), {images[1]} (student). "
                "Give both images of the same size, or have the teacher's maps resized: "
                f"{type(self).__name__}(resize=True). Distiller(resize_levels=True) is for predictions"
            )
        return sample(maps[0], grid, mixes=not exact)


def _trained(features: Tensor, level: int) -> Tensor:
    """The student's map; raises ``ValueError`` where only the method's parameters would be trained."""
    if torch.is_grad_enabled() and not features.requires_grad:
        raise ValueError(
            f"the student's map of level {level} depends on no trainable parameter, so distilling it has no "
            "effect: it is frozen or detached"
        )
    return features
