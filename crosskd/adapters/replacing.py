"""Running a detector's own functions on the detector, with some of its parts replaced for that time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["replaced"]


@contextmanager
def replaced(module: Any, **attributes: Any) -> Iterator[None]:
    """Replaces attributes of a module, submodules included, while the body runs.

    What the module's own functions keep on it during that time stays.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(2, 2)
        >>> with replaced(layer, forward=lambda features: -features):
        ...     layer(1)
        -1
        >>> "forward" in vars(layer)
        False
    """
    own = {name: vars(module)[name] for name in attributes if name in vars(module)}
    vars(module).update(attributes)  # in front of a submodule of that name
    try:
        yield
    finally:
        for name in attributes:
            del vars(module)[name]
        vars(module).update(own)
