"""Methods by the names of their classes, as configs give them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import crosskd.methods
from crosskd.methods import CrossKD, Method
from crosskd.schedule import Schedule

__all__ = ["MethodConfig", "named_methods"]

MethodConfig: TypeAlias = Method | str | Mapping[str, Any]
"""A method, the name of its class, or a dict of its class as ``type`` and of its arguments."""


def named_methods(
    configs: MethodConfig | Sequence[MethodConfig] | None,
    find: Callable[[str], Any] | None = None,
    register: str = "pass an object of a class derived from crosskd.Method",
) -> list[Method]:
    """Makes methods of what a config holds.

    Args:
        configs: one or several of: a method; ``"FGD"``, the name of a class in `crosskd.methods`;
            ``dict(type="CrossKD", position=2)``, where the type may also be the class itself, and a
            ``schedule`` is a dict of `crosskd.Schedule`'s arguments. ``None`` is CrossKD as published.
        find: where else a name may stand: gives a class, or ``None``.
        register: what to do for a method of one's own, for the error.

    Raises:
        ValueError: a type that is no method.
        TypeError: arguments that the class doesn't take, or something else than a config.

    Example:
        >>> pkd, crosskd = named_methods(["PKD", {"type": "CrossKD", "schedule": {"stop": 9}}])
        >>> type(pkd).__name__, crosskd.schedule.stop
        ('PKD', 9)
    """
    if configs is None:
        return [CrossKD()]
    listed = configs if isinstance(configs, Sequence) and not isinstance(configs, str) else [configs]
    return [_method(config, find, register) for config in listed]


def _method(config: MethodConfig, find: Callable[[str], Any] | None, register: str) -> Method:
    if isinstance(config, Method):
        return config
    if not isinstance(config, str | Mapping):
        raise TypeError(
            f"methods: expected a method, the name of one, or a dict with its name as type, got {config!r}"
        )
    settings: dict[str, Any] = {"type": config} if isinstance(config, str) else dict(config)
    kind = settings.pop("type", None)
    found = kind
    if isinstance(kind, str):
        found = getattr(crosskd.methods, kind, None) or (find(kind) if find else None)
    if not _is_method(found):
        known = [name for name in crosskd.methods.__all__ if _is_method(getattr(crosskd.methods, name))]
        raise ValueError(
            f"methods: type {kind!r} is no method of distillation: choose from {', '.join(known)}, or "
            f"{register}"
        )
    if isinstance(settings.get("schedule"), Mapping):
        settings["schedule"] = Schedule(**settings["schedule"])
    method: Method = found(**settings)
    return method


def _is_method(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Method) and not inspect.isabstract(value)
