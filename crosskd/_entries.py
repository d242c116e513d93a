"""One image's part of a teacher's run, as it is saved to a file, and a batch's run made of such parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from crosskd._checks import shape_text
from crosskd.adapters.base import Adapter, Batch, Head
from crosskd.align import FeatureStatistics, join_statistics
from crosskd.predictions import Predictions
from crosskd.step import DetectorTrace, HeadTrace, Taps, shape_only

__all__ = ["Entry", "entry_of", "joined", "parting_place"]

Entry = dict[str, Any]
"""Dicts and lists of numbers, names and tensors, each tensor with a batch of 1."""

_NUMBERS = ("logits", "regression", "quality")
_KINDS = ("background", "box_per_class", "objectness")


def entry_of(trace: DetectorTrace, index: int, dtype: torch.dtype | None, *, maps: bool) -> Entry:
    """What is kept of one image of a run.

    Args:
        trace: run with ``each_image``.
        index: the image's place in it.
        dtype: what maps and predictions are kept in; what methods keep at taps keeps its type.
        maps: keep the maps, not only their shapes.
    """
    entry: Entry = {"maps": [_kept(level, index, dtype, shape_alone=not maps) for level in trace.maps]}
    for run in trace.heads.values():  # one at most: heads of regions run later
        numbers = [getattr(run.predictions, name) for name in _NUMBERS]
        entry["numbers"] = [None if given is None else _kept(given, index, dtype) for given in numbers]
        entry["kinds"] = {name: getattr(run.predictions, name) for name in _KINDS}
        entry["levels"] = list(run.levels)
        entry["taps"] = [
            (method, branch, _tap(method, level[index]))
            for method, branches in run.taps.items()
            for branch, levels in branches.items()
            for level in levels
        ]
    return entry


def _kept(tensor: Tensor, index: int, dtype: torch.dtype | None, *, shape_alone: bool = False) -> Entry:
    """One image's part of a tensor (batch, …), and the type that it had."""
    part = tensor[index : index + 1]
    if shape_alone:
        return {"shape": list(part.shape[1:]), "type": part.dtype}
    return {"numbers": torch.empty(part.shape, dtype=dtype or part.dtype).copy_(part), "type": part.dtype}


def _tap(method: str, kept: Any) -> Entry:
    """What a method keeps of one image's features."""
    if isinstance(kept, FeatureStatistics):
        return {"mean": kept.mean.cpu(), "std": kept.std.cpu(), "locations": kept.locations}
    if isinstance(kept, Tensor) and kept.ndim and len(kept) == 1:
        return _kept(kept, 0, None)
    raise TypeError(
        f"{method} keeps a {type(kept).__name__} of the teacher's features of one image, and teacher_cache= "
        "knows tensors of shape (1, …) and crosskd.align.FeatureStatistics: return one of these from its "
        "keep_of_teacher, or leave teacher_cache= out"
    )


def parting_place(kept: Entry, now: Entry, tolerance: float) -> str | None:
    """Where two entries of one image differ by more than rounding, and how; ``None`` where they don't.

    Args:
        kept: the one.
        now: the other, of the same format.
        tolerance: what numbers may differ by, as a share of the largest in their tensor.
    """
    before, after = _parts(kept), _parts(now)
    for place in {**before, **after}:
        one, other = before.get(place), after.get(place)
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape:
            if not one.numel():
                continue
            a, b = one.double(), other.double()
            largest = float(a.nan_to_num(0.0, 0.0, 0.0).abs().max())
            away = float(torch.where(a == b, 0.0, (a - b).abs()).max())  # infinite numbers may be equal
            if not away <= tolerance * largest:
                return f"{place} by up to {away:.3g}, where the largest is {largest:.3g}"
        elif isinstance(one, Tensor) or isinstance(other, Tensor) or one != other:
            texts = [shape_text(part) if isinstance(part, Tensor) else str(part) for part in (one, other)]
            return f"{place} {texts[0]}, now {texts[1]}"
    return None


def _parts(entry: Entry) -> dict[str, Any]:
    """All that an entry holds of an answer by its place, but for types: autocast has others on a GPU."""
    named = {f"map of level {level}": kept for level, kept in enumerate(entry["maps"])}
    if "numbers" in entry:
        named |= {**dict(zip(_NUMBERS, entry["numbers"], strict=True)), **entry["kinds"]}
        named["levels"] = entry["levels"]
        for place, (method, branch, kept) in enumerate(entry["taps"]):
            named[f"tap {place} ({method}, {branch})"] = kept
    parts = {}
    for name, part in named.items():
        if isinstance(part, dict):
            parts.update({f"{name}, {key}": value for key, value in part.items() if key != "type"})
        else:
            parts[name] = part
    return parts


def joined(adapter: Adapter, batch: Batch, head: Head | None, entries: Sequence[Entry]) -> DetectorTrace:
    """The entries of a batch's images as one run of the teacher.

    Args:
        adapter: the teacher's.
        batch: as the teacher takes it.
        head: the one that was run, if any.
        entries: one an image.
    """
    device, first = batch.pixels.device, entries[0]
    maps = [_together(level, device) for level in zip(*(entry["maps"] for entry in entries), strict=True)]
    heads = {}
    if head is not None:
        numbers = zip(*(entry["numbers"] for entry in entries), strict=True)
        given = [None if parts[0] is None else _together(parts, device) for parts in numbers]
        taps: Taps = {}
        for parts in zip(*(entry["taps"] for entry in entries), strict=True):
            method, branch, _ = parts[0]
            together = _joined_tap([kept for _, _, kept in parts], device)
            taps.setdefault(method, {}).setdefault(branch, []).append(together)
        predictions = Predictions(*given, **first["kinds"])  # type: ignore[arg-type]
        heads[head.name] = HeadTrace(head, predictions, tuple(first["levels"]), taps)
    return DetectorTrace(adapter, replace(batch, pixels=shape_only(batch.pixels)), maps, heads)


def _together(parts: Sequence[Entry], device: torch.device) -> Tensor:
    """What was kept of several images as one tensor (batch, …) of the type that it had."""
    dtype = parts[0]["type"]
    if "shape" in parts[0]:
        return torch.empty((), dtype=dtype, device=device).expand(len(parts), *parts[0]["shape"])
    return torch.cat([part["numbers"] for part in parts]).to(device).to(dtype)


def _joined_tap(parts: Sequence[Entry], device: torch.device) -> Any:
    if "mean" not in parts[0]:
        return _together(parts, device)
    statistics = join_statistics([FeatureStatistics(**part) for part in parts])
    return replace(statistics, mean=statistics.mean.to(device), std=statistics.std.to(device))
