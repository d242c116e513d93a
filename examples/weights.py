"""Whether weights fit a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def misfit(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What keeps given weights from fitting a model's own, by key; an empty text if nothing does."""
    missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    shapes = [
        f"{key} {tuple(given[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in sorted(own.keys() & given.keys())
        if given[key].shape != own[key].shape
    ]
    if not (missing or unknown or shapes):
        return ""
    return (
        f"{len(missing)} keys missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}, {len(shapes)} of "
        f"another shape {shapes[:3]}"
    )
