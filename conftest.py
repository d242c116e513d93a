"""What happens to tests that need mmdet, and to the modules that need it, where there is none."""

import os
from pathlib import Path

import pytest

# Where it is set, mmdet must be there: a test run that was to use it can't pass by skipping.
MMDET_REQUIRED = "CROSSKD_REQUIRE_MMDET"
ADAPTERS = Path(__file__).parent / "crosskd" / "adapters"


def missing_mmdet() -> str | None:
    """Why mmdet can't be used here, or None where it can."""
    try:
        import mmcv._ext  # noqa: F401
        import mmdet  # noqa: F401
    except ImportError as error:
        return f"needs mmdet with its compiled operators, see examples/mmdet/install_mmdet.py ({error})"
    return None


def needs_mmdet(path: Path) -> bool:
    """Whether a file is one of the package's modules that can't be imported without mmdet."""
    return path.parent == ADAPTERS and "mmdet" in path.stem


def pytest_configure() -> None:
    """Refuses to start where mmdet is required and missing."""
    reason = missing_mmdet() if os.environ.get(MMDET_REQUIRED) else None
    if reason:
        raise pytest.UsageError(f"{MMDET_REQUIRED} is set: {reason}")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out the examples in the docstrings of modules that can't be imported here."""
    return True if needs_mmdet(collection_path) and missing_mmdet() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked ``mmdet``, with the reason, where it is missing."""
    for item in items:
        if needs_mmdet(item.path):
            item.add_marker("mmdet")
    marked = [item for item in items if item.get_closest_marker("mmdet")]
    reason = missing_mmdet() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))
