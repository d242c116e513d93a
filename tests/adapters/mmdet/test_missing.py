"""What the import says without mmdet: this one runs everywhere."""

from __future__ import annotations

import importlib
import sys

import pytest

from tests.helpers.imports import forgotten

MODULES = ("crosskd.adapters.mmdet", "crosskd.integrations.mmdet")


@pytest.mark.parametrize("module", MODULES)
def test_the_imports_say_what_to_install(module):
    with forgotten("mmdet", *MODULES):
        sys.modules["mmdet"] = None
        with pytest.raises(ImportError, match=r"mmdet 3 and mmcv.*examples/mmdet/install_mmdet.py"):
            importlib.import_module(module)
