"""Files that tests compare with: published numbers and real images.

The smaller files of published numbers stand in ``tests/data/parity``. For all others ``CROSSKD_SHARED``
names the folder that holds ``parity`` and ``data``; without it, a folder ``shared`` beside the checkout is
used. Where it is missing the tests that need it skip and say so.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

CARRIED = Path(__file__).parents[1] / "data" / "parity"
SHARED = Path(os.environ.get("CROSSKD_SHARED", Path(__file__).parents[3] / "shared"))


def load_parity(name: str) -> dict[str, Any]:
    """Loads a file of published numbers, or skips the test."""
    path = CARRIED / name
    if not path.exists():
        path = SHARED / "parity" / name
    if not path.exists():
        pytest.skip(f"no file {name} of published numbers under {SHARED} (set CROSSKD_SHARED)")
    return torch.load(path, weights_only=True)


def bccd_folder() -> Path:
    """The folder of the BCCD images in COCO form, or skips the test."""
    return data_path("bccd")


def data_path(name: str) -> Path:
    """A folder or file of ``data``, such as ``"bccd"``, or skips the test."""
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"no {name} under {SHARED / 'data'} (set CROSSKD_SHARED)")
    return path
