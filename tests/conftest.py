"""Fixtures of all tests, and what happens to those that need mmdet where there is none."""

import os

import pytest
import torch

# Where it is set, mmdet must be there: a test run that was to use it can't pass by skipping.
MMDET_REQUIRED = "CROSSKD_REQUIRE_MMDET"


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Each test draws the same random numbers, whichever ran before it."""
    torch.manual_seed(0)


def missing_mmdet() -> str | None:
    """Why mmdet can't be used here, or None where it can."""
    try:
        import mmcv._ext  # noqa: F401
        import mmdet  # noqa: F401
    except ImportError as error:
        return f"needs mmdet with its compiled operators, see examples/mmdet/install_mmdet.py ({error})"
    return None


def pytest_configure() -> None:
    """Refuses to start where mmdet is required and missing."""
    reason = missing_mmdet() if os.environ.get(MMDET_REQUIRED) else None
    if reason:
        raise pytest.UsageError(f"{MMDET_REQUIRED} is set: {reason}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked ``mmdet``, with the reason, where it is missing."""
    marked = [item for item in items if item.get_closest_marker("mmdet")]
    reason = missing_mmdet() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))
