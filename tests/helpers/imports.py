"""Imports made anew, which in another process would take seconds."""

from __future__ import annotations

import sys

import pytest


def forget(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Lets packages, and what is in them, be imported as if for the first time, until the test ends."""
    for name in [*sys.modules]:
        if name.startswith(tuple(f"{package}." for package in packages)) or name in packages:
            monkeypatch.delitem(sys.modules, name)
