"""What happens to tests and modules that need mmdet, ultralytics or transformers, where there is none."""

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

# Where it is set, the peer must be there: a test run that was to use it can't pass by skipping.
REQUIRED = "CROSSKD_REQUIRE_{}"
PACKAGE = Path(__file__).parent / "crosskd"


def missing_mmdet() -> str | None:
    """Why mmdet can't be used here, or None where it can."""
    try:
        import mmcv._ext  # noqa: F401
        import mmdet  # noqa: F401
    except ImportError as error:
        return f"needs mmdet with its compiled operators, see examples/mmdet/install_mmdet.py ({error})"
    return None


def missing_ultralytics() -> str | None:
    """Why ultralytics can't be used here, or None where it can."""
    if "YOLO_CONFIG_DIR" not in os.environ:  # it writes settings where it is imported
        folder = os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="yolo_")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # It would look for updates, download fonts and install packages.
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    try:
        import crosskd.adapters.ultralytics  # noqa: F401
    except ImportError as error:
        return f"needs ultralytics, see docs/yolo.md ({error})"
    return None


def missing_transformers() -> str | None:
    """Why transformers can't be used here, or None where it can."""
    try:
        import scipy  # noqa: F401  # its losses match by it
        import transformers  # noqa: F401
    except ImportError as error:
        return f"needs transformers and scipy, see docs/transformers.md ({error})"
    return None


MISSING = {"mmdet": missing_mmdet, "ultralytics": missing_ultralytics, "transformers": missing_transformers}


def needs(peer: str, path: Path) -> bool:
    """Whether a file or folder of the package can't be imported without a peer: they bear its name."""
    return path.is_relative_to(PACKAGE) and any(peer in part for part in path.relative_to(PACKAGE).parts)


def pytest_configure(config: pytest.Config) -> None:
    """Refuses to start where a peer is required and missing."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # the processes that run the tests look; this one would import all peers before they start
    for peer, missing in MISSING.items():
        variable = REQUIRED.format(peer.upper())
        reason = missing() if os.environ.get(variable) else None
        if reason:
            raise pytest.UsageError(f"{variable} is set: {reason}")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Each test, and each docstring's example, draws the same random numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported for the tests stays: nothing looks for garbage in it, now or while they run."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000)  # 700 or 2,000 new objects, Python's own choice, are less than a detector
        gc.enable()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out the examples in the docstrings of modules that can't be imported here."""
    absent = any(needs(peer, collection_path) and missing() for peer, missing in MISSING.items())
    return True if absent else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked with a peer's name, with the reason, where it is missing.

    Where several processes share the tests, slow ones come first, so that none is left with one at the end.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for peer, missing in MISSING.items():
        for item in items:
            if needs(peer, item.path):
                item.add_marker(peer)
        marked = [item for item in items if item.get_closest_marker(peer)]
        reason = missing() if marked else None
        if reason:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))
