"""How things are compared and told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from crosskd.predictions import Predictions, join_levels

__all__ = ["alike", "difference", "kinds", "near", "numbers", "some"]

# Numbers that are calculated twice by the same operators differ by no more than this, relatively.
ROUNDING = 1e-5


def numbers(levels: Sequence[Predictions]) -> list[Tensor]:
    """Logits, regression and, where there is one, quality of all levels."""
    joined = join_levels(levels)
    return [part for part in (joined.logits, joined.regression, joined.quality) if part is not None]


def near(a: Tensor, b: Tensor | None, tolerance: float) -> bool:
    """Whether two tensors differ by no more than a share of the largest number."""
    if b is None or a.shape != b.shape:
        return False
    if not a.numel():
        return True
    a, b = a.detach().double(), b.detach().double()
    return bool((a - b).abs().max() <= tolerance * a.abs().max().clamp(min=1e-12))


def alike(theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors hold the same numbers, but for rounding."""
    return len(theirs) == len(ours) and all(near(a, b, ROUNDING) for a, b in zip(theirs, ours, strict=True))


def difference(theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> str:
    """How two lists of tensors differ, in words."""
    shapes = [[tuple(t.shape) for t in side] for side in (theirs, ours)]
    if shapes[0] != shapes[1]:
        return f"shapes {shapes[0]} and {shapes[1]}"
    largest = max(float((a - b).abs().max()) for a, b in zip(theirs, ours, strict=True) if a.numel())
    return f"they differ by up to {largest:.3g}"


def some(names: Sequence[str]) -> str:
    """A few of some names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def kinds(value: Any) -> str:
    """What a value is, in words."""
    if not isinstance(value, Mapping):
        return f"a {type(value).__name__}"
    return f"a dict of {sorted({type(item).__name__ for item in value.values()})}"
