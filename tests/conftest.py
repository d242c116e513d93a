"""Fixtures of all tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Each test draws the same random numbers, whichever ran before it."""
    torch.manual_seed(0)
