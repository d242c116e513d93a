"""Finding a detector's modules by paths or functions, and reading widths off them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from torch import nn

__all__ = ["Where", "ends_in_a_layer", "find_modules", "is_linear", "kinds_of", "of_level", "width_of"]

Where = str | Callable[[Any], Any]
"""A module of a detector: its path, ``"head.cls_tower"``, or a function that finds it."""


def find_modules(detector: nn.Module, where: Where, name: str) -> tuple[nn.Module, ...]:
    """The module that a path or a function names, or one per level.

    Args:
        detector: whose modules.
        where: a path, with at most one ``*`` for one module per level, or a function of the detector.
        name: what to call it in an error.

    Raises:
        ValueError: there is no such module.

    Example:
        >>> find_modules(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), "0", "predictors['cls']['logits']")
        (Linear(in_features=2, out_features=3, bias=True),)
    """
    if isinstance(where, str):
        found: Any = _at_path(detector, where, name)
    else:
        try:
            found = where(detector)
        except (AttributeError, IndexError, KeyError) as error:
            kind = type(detector).__name__
            raise ValueError(f"{name}: the function failed on {kind}: {error!r}") from error
    listed = found if isinstance(found, list | tuple) else [found]
    if not listed or not all(isinstance(module, nn.Module) for module in listed):
        raise ValueError(
            f"{name} must be a module of {type(detector).__name__} or a list of them, one per level, got "
            f"{kinds_of(found)}"
        )
    return tuple(listed)


def _at_path(detector: nn.Module, path: str, name: str) -> list[nn.Module]:
    modules = [detector]
    before = type(detector).__name__
    for part in path.split("."):
        if part == "*" and len(modules) == 1:
            modules = [child for child in modules[0]._modules.values() if child is not None]
        else:
            missing = [m for m in modules if not isinstance(getattr(m, part, None), nn.Module)]
            if missing:
                raise ValueError(
                    f"{name}: there is no module {path!r} in {type(detector).__name__}: {before} has no "
                    f"{part!r}, but {list(missing[0]._modules) or 'no modules at all'}"
                )
            modules = [getattr(module, part) for module in modules]
        before = part if before == type(detector).__name__ else f"{before}.{part}"
    return modules


def of_level(modules: Sequence[nn.Module], level: int) -> nn.Module:
    """The module for one level, where there is one module for all levels or one per level."""
    return modules[level if len(modules) > 1 else 0]


def kinds_of(value: Any) -> str:
    """The types of what somebody returned, for an error."""
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {[type(part).__name__ for part in value]}"
    return type(value).__name__


def ends_in_a_layer(predictor: nn.Module) -> bool:
    """Whether a predictor surely gives as many numbers as its last layer says."""
    while isinstance(predictor, nn.Sequential) and len(predictor):
        predictor = predictor[-1]
    return _first_width([predictor], "out") is not None


def width_of(predictor: nn.Module, side: Literal["in", "out"]) -> int:
    """How many numbers a predictor takes or gives at a location; raises ``ValueError`` if it can't be read
    off.
    """
    modules = list(predictor.modules())
    width = _first_width(modules if side == "in" else reversed(modules), side)
    if width is None:
        raise ValueError(
            f"the predictor {type(predictor).__name__} has neither {side}_channels nor {side}_features, nor "
            "has a layer of it: make it of convolutions or linear layers"
        )
    return width


def _first_width(modules: Iterable[nn.Module], side: str) -> int | None:
    for module in modules:
        for name in (f"{side}_channels", f"{side}_features"):
            value = getattr(module, name, None)
            if isinstance(value, int):
                return value
    return None


def is_linear(predictor: nn.Module) -> bool:
    """Whether a predictor gives (batch, …, numbers), as linear layers do."""
    layers = [m for m in predictor.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    return bool(layers) and isinstance(layers[-1], nn.Linear)
