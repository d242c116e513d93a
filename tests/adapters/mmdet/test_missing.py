"""What the import says without mmdet: this one runs everywhere."""

from __future__ import annotations

import importlib
import sys

import pytest

from tests.helpers.imports import forget

MODULES = ("crosskd.adapters.mmdet", "crosskd.integrations.mmdet")


@pytest.mark.parametrize("module", MODULES)
def test_the_imports_say_what_to_install(module, monkeypatch):
    forget(monkeypatch, "mmdet", *MODULES)
    monkeypatch.setitem(sys.modules, "mmdet", None)
    with pytest.raises(ImportError, match=r"mmdet 3 and mmcv.*examples/mmdet/install_mmdet.py"):
        importlib.import_module(module)
