"""Packages that some tests can't do without, and that .ci/run installs."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest


def package(name: str) -> Any:
    """A module; where there is none the test is skipped, or fails if CROSSKD_REQUIRE_PACKAGES is set."""
    if os.environ.get("CROSSKD_REQUIRE_PACKAGES"):
        return importlib.import_module(name)
    return pytest.importorskip(name)
