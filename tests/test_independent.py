"""Whole CrossKD losses and their gradient, within a family, against a slow float64 calculation."""

from __future__ import annotations

import pytest

from crosskd import CrossKD, Distiller
from tests.helpers.slow_crosskd import assert_losses_and_gradients_agree, float64_batch, slow_losses
from tests.helpers.tiny import tiny_fcos, tiny_retinanet


@pytest.mark.parametrize(
    ("build", "norm", "groups"),
    [(tiny_retinanet, "none", 0), (tiny_retinanet, "group", 8), (tiny_fcos, "group", 32)],
    ids=["retinanet", "retinanet-group-norm", "fcos"],
)
@pytest.mark.parametrize(("position", "tap"), [(0, "post"), (3, "post"), (2, "pre"), (4, "post")])
def test_losses_and_gradient_agree_with_the_slow_calculation(build, norm, groups, position, tap):
    teacher, student = build(norm=norm, seed=1).double(), build(norm=norm, seed=2).double()
    distiller = Distiller(teacher, student, CrossKD(position=position, tap=tap))
    images, targets = float64_batch()
    losses = distiller(images, targets)
    expected = slow_losses(distiller, images, targets, position=position, tap=tap, groups=(groups, groups))
    assert_losses_and_gradients_agree(distiller, losses, expected)
