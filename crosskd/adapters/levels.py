"""Which of the teacher's levels belongs to each of the student's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

__all__ = ["LevelPairs", "check_channels", "pair_levels"]


@dataclass(frozen=True)
class LevelPairs:
    """The teacher's level for each of the student's.

    Attributes:
        teacher: indices of the teacher's levels, in the order of the student's; ``None`` where strides
            could not be told beforehand, and the two go level by level.
        scale: the teacher's strides over the student's. Other than 1 where the teacher sees the images
            at another resolution.
        own_view: the teacher sees images of its own (``teacher_view=``), which may have other channels.

    Example:
        >>> pairs = pair_levels([8, 16, 32, 64], [16, 32])
        >>> list(pairs), pairs.scale
        ([(0, 1), (1, 2)], 1.0)
    """

    teacher: tuple[int, ...] | None
    scale: float = 1.0
    own_view: bool = field(default=False, compare=False)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(student level, teacher level), where known."""
        return iter(enumerate(self.teacher or ()))

    def of_teacher(self, levels: int) -> Sequence[int]:
        """The teacher's levels that are used, of so many."""
        return range(levels) if self.teacher is None else self.teacher


def pair_levels(
    teacher: Sequence[float] | None, student: Sequence[float] | None, *, rescaled: bool = False
) -> LevelPairs:
    """Pairs levels by their strides; the teacher may have levels that the student lacks.

    Args:
        teacher: pixels between neighbouring locations, a level; ``None`` where unknown.
        student: likewise.
        rescaled: the teacher sees images of its own, maybe at another resolution, so that all strides may
            differ by one factor.

    Raises:
        ValueError: one of the student's levels has no counterpart.
    """
    if teacher is None or student is None:
        return LevelPairs(None, own_view=rescaled)
    scales = [1.0, *(stride / student[0] for stride in teacher)] if rescaled else [1.0]
    for scale in scales:
        found = _in_order(teacher, [scale * stride for stride in student])
        if found is not None:
            return LevelPairs(found, scale, own_view=rescaled)
    raise ValueError(
        f"strides differ: {list(teacher)} (teacher), {list(student)} (student). Each of the student's levels "
        "needs one of the teacher's with the same stride, while the teacher may have more: build both with "
        "the same pyramid levels, and for images of one size where they resize them to a fixed one"
    )


def check_channels(teacher: int, student: int, levels: LevelPairs, told_by: str = "") -> None:
    """Raises ``ValueError`` where one's images have other channels than the other's, whose pixels it gets.

    Args:
        teacher: how many channels its images have.
        student: likewise.
        levels: tell whether the teacher sees images of its own.
        told_by: what says so, such as ``", as its mean says"``.
    """
    if teacher != student and not levels.own_view:
        raise ValueError(
            f"the images' channels differ: {teacher} (teacher), {student} (student){told_by}. Both get the "
            "same pixels: give the teacher images of its own by teacher_view=, or train one for the student's"
        )


def _in_order(strides: Sequence[float], wanted: Sequence[float]) -> tuple[int, ...] | None:
    """Where some strides stand among others, in the same order; two levels may have one stride."""
    found: list[int] = []
    for stride in wanted:
        after = range(found[-1] + 1 if found else 0, len(strides))
        index = next((i for i in after if math.isclose(strides[i], stride, rel_tol=1e-6)), None)
        if index is None:
            return None
        found.append(index)
    return tuple(found)
