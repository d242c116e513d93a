"""The blood cells of `benchmarks/blood_cells.py`, where tests find them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.benchmarks.test_benchmarks import load
from tests.examples import conftest  # noqa: F401  # so that the examples' modules are found
from tests.helpers.reference_files import bccd_folder

blood_cells = load("blood_cells")
average_precision = blood_cells.average_precision


def cells(split: str, count: int, first_label: int = 0) -> tuple[Any, Tensor, list[dict[str, Tensor]]]:
    """A split's first images, and their targets."""
    found: tuple[Any, Tensor, list[dict[str, Tensor]]]
    found = blood_cells.cells(bccd_folder(), split, count, first_label)
    return found
