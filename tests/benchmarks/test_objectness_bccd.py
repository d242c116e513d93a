"""The benchmark of objectness: the adapter is the page's own, and each way's students have their row."""

from __future__ import annotations

import pytest

from tests.benchmarks.test_benchmarks import load
from tests.helpers.reference_files import bccd_folder

objectness = load("objectness_bccd")


def test_the_adapter_is_that_of_the_page():
    assert objectness.page_adapter(objectness.page_code()).objectness is True


@pytest.mark.slow
def test_each_way_has_a_student_of_every_seed():
    teacher, found = objectness.scores(bccd_folder(), (1, 1), 1)
    assert list(found) == list(objectness.WAYS)
    assert all(len(of) == 1 and 0 <= of[0] <= 100 for of in found.values())
    assert 0 <= teacher <= 100
