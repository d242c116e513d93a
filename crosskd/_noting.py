"""An adapter that tells of every call, so that a step can be watched from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from crosskd.adapters.protocol import Adapter

__all__ = ["noting"]


class _Noting:
    def __init__(self, adapter: Any, note: Callable[[str, tuple[Any, ...], Any], None], where: str) -> None:
        self._adapter, self._note, self._where = adapter, note, where

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for while it is copied, before there is an adapter
            raise AttributeError(name)
        value = getattr(self._adapter, name)
        if name == "second" and value is not None:
            return _Noting(value, self._note, "second.")
        if not callable(value):
            return value

        def call(*arguments: Any, **named: Any) -> Any:
            result = value(*arguments, **named)
            self._note(self._where + name, arguments, result)
            return result

        return call


def noting(adapter: Adapter, note: Callable[[str, tuple[Any, ...], Any], None]) -> Adapter:
    """The same adapter; each of its functions tells afterwards of its name, arguments and result.

    Those of a second stage have names such as ``"second.losses"``.
    """
    return cast(Adapter, _Noting(adapter, note, ""))
