"""What the import says without mmdet: this one runs everywhere."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["crosskd.adapters.mmdet", "crosskd.integrations.mmdet"])
def test_the_import_says_what_to_install(module):
    code = (
        "import sys; sys.modules['mmdet'] = None\n"
        f"try:\n    import {module}\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "examples/mmdet/install_mmdet.py" in done.stdout
    assert "mmdet 3 and mmcv" in done.stdout
