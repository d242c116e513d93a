"""The adapters of ``examples/dense_heads`` pass the conformance kit."""

from __future__ import annotations

import pytest
from dense_heads import adapter_of

from tests.examples.dense_heads.small import CLASSES, FAMILIES, small
from tests.helpers.conformance import assert_green
from tests.helpers.tiny import tiny_batch


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapters_are_green(family):
    teacher, student = small(family, width=64), small(family, seed=1)
    assert_green(adapter_of, *tiny_batch(num_classes=CLASSES), teacher=teacher, student=student)
