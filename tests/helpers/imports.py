"""Imports made anew, which in another process would take seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def forgotten(*packages: str) -> Iterator[None]:
    """Within this, packages and what is in them are imported as if for the first time."""

    def known() -> list[str]:
        inside = tuple(f"{package}." for package in packages)
        return [name for name in sys.modules if name in packages or name.startswith(inside)]

    before = {name: sys.modules.pop(name) for name in known()}
    try:
        yield
    finally:
        for name in known():
            del sys.modules[name]
        sys.modules.update(before)
        for package in before.keys() & set(packages):
            parent, _, name = package.rpartition(".")
            if parent:
                setattr(sys.modules[parent], name, before[package])
