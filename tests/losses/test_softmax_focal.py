"""The focal loss of classes that share a softmax, beside that of a sigmoid per class."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from crosskd.losses import quality_focal_loss, softmax_focal_loss
from tests.helpers.loss_cases import gradient, make_logits, with_gradient

every_beta = pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
logits_of_classes = st.integers(2, 6).flatmap(
    lambda classes: st.tuples(
        *[st.lists(st.floats(-20, 20, width=32), min_size=classes, max_size=classes)] * 2
    )
)


def test_a_value_by_hand():
    # The student is undecided between three, the teacher sure of 3/5: the rest is 1/5 each. Half of the
    # differences, 4/15 and twice 2/15, is 4/15, and the cross entropy is log 3 whatever the teacher says.
    student, teacher = torch.zeros(1, 3), torch.tensor([[math.log(3), 0.0, 0.0]])
    assert softmax_focal_loss(student, teacher).item() == pytest.approx(4 / 15 * math.log(3))
    assert softmax_focal_loss(student, teacher, beta=0).item() == pytest.approx(math.log(3))


@every_beta
def test_softmax_focal_of_two_classes_is_quality_focal_of_their_difference(beta):
    """Two classes that share a softmax have the sigmoids of plus and minus the difference of their logits."""
    (student, teacher), weight = (3 * torch.randn(2, 8, 2).double()), torch.rand(8).double()
    student, alone = with_gradient(student), with_gradient(student[:, 1:] - student[:, :1])
    shared = softmax_focal_loss(student, teacher, beta=beta, weight=weight, normalizer=3.0)
    of_difference = quality_focal_loss(
        alone, teacher[:, 1:] - teacher[:, :1], beta=beta, weight=weight, normalizer=3.0
    )
    torch.testing.assert_close(shared, of_difference, rtol=1e-12, atol=0)
    expected = gradient(of_difference, alone)
    found = gradient(shared, student)
    torch.testing.assert_close(found, torch.cat([-expected, expected], dim=1), rtol=1e-10, atol=1e-14)


@given(logits=logits_of_classes, beta=st.sampled_from([0.0, 0.5, 1.0, 2.0]), shift=st.floats(-50, 50))
@example(logits=([1.0, 1.0, 0.0], [1.0, 1.0, 0.0]), beta=0.0, shift=0.485)
@settings(max_examples=60, deadline=None)
def test_softmax_focal_has_bounds_and_no_say_in_what_the_softmax_does_not_see(logits, beta, shift):
    student, teacher = (torch.tensor([side], dtype=torch.float64) for side in logits)
    value = softmax_focal_loss(student, teacher, beta=beta).item()
    cross_entropy = F.cross_entropy(student, teacher.softmax(-1)).item()
    assert -1e-12 <= value <= cross_entropy + 1e-9
    moved = softmax_focal_loss(student + shift, teacher - shift, beta=beta).item()
    # The root of a last bit is larger than the bit.
    assert moved == pytest.approx(value, rel=1e-6, abs=1e-6)
    turned = softmax_focal_loss(student.flip(-1), teacher.flip(-1), beta=beta).item()
    assert turned == pytest.approx(value, rel=1e-6, abs=1e-6)


@every_beta
def test_softmax_focal_without_the_focus_is_cross_entropy(beta):
    student, teacher = make_logits(9)
    expected = F.cross_entropy(student, teacher.softmax(-1))
    torch.testing.assert_close(softmax_focal_loss(student, teacher, beta=0), expected)
    # The distance is at most 1, and 1 where the two are sure of different classes.
    assert softmax_focal_loss(student, teacher, beta=beta) <= expected
    sure = 200 * torch.eye(5).double()
    apart = softmax_focal_loss(sure, sure.roll(1, 0), beta=beta)
    torch.testing.assert_close(apart, torch.tensor(200.0).double())


def test_error_beta():
    with pytest.raises(ValueError, match=r"beta must be 0 or more, got -0\.1"):
        softmax_focal_loss(torch.zeros(2, 4), torch.zeros(2, 4), beta=-0.1)
