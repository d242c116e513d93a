"""What importing the package brings, and that its public face is whole."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import crosskd

MODULES = sorted(module.name for module in pkgutil.walk_packages(crosskd.__path__, "crosskd."))
# Adapters that can't be imported without their framework are looked at where that is there.
PEERS = ("mmdet", "ultralytics")
PUBLIC_MODULES = [
    pytest.param(name, marks=[getattr(pytest.mark, peer) for peer in PEERS if f".{peer}" in name])
    for name in ("crosskd", *MODULES)
    if "._" not in name
]


def test_import_brings_nothing_but_torch_and_torchvision():
    code = (
        "import sys, torch, torchvision\nbefore = {*sys.modules}\nimport crosskd, crosskd.adapters\n"
        "print(*{name.split('.')[0] for name in {*sys.modules} - before})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = set(result.stdout.split())
    assert "crosskd" in added
    # Of these it may load more modules than torch and torchvision had; nothing of what else is installed.
    assert added - set(sys.stdlib_module_names) <= {"crosskd", "numpy", "torch", "torchvision"}


def test_version_is_that_of_the_project():
    """The project reads its version from the package, unless it states one, which must be the same."""
    project = Path(__file__).parents[1]
    text = (project / "pyproject.toml").read_text()
    stated = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    if stated is None:
        assert re.search(r'^dynamic = \["version"\]$', text, re.MULTILINE)
        source = project / re.search(r'^\[tool\.hatch\.version\]\npath = "(.+)"$', text, re.MULTILINE).group(
            1
        )
        stated = re.search(r'^__version__ = "(.+)"$', source.read_text(), re.MULTILINE)
    assert stated.group(1) == crosskd.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", crosskd.__version__)


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_public_names_exist_and_are_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    assert module.__all__ == sorted(module.__all__, key=lambda public: (not public.isupper(), public))
    for public in module.__all__:
        thing = getattr(module, public)
        if not (inspect.isclass(thing) or inspect.isfunction(thing) or inspect.ismodule(thing)):
            continue  # settings and type aliases: values, whose class has the docstring
        assert inspect.getdoc(thing), f"{name}.{public} has no docstring"
        for method, function in inspect.getmembers(thing, inspect.isfunction):
            if not method.startswith("_") and function.__module__.startswith("crosskd"):
                assert inspect.getdoc(getattr(thing, method)), f"{name}.{public}.{method} has no docstring"


def test_package_is_typed():
    assert (Path(crosskd.__file__).parent / "py.typed").exists()
