"""The divergence of distributions over bins."""

from __future__ import annotations

import math

import pytest
import torch

from crosskd.losses import distribution_kl_loss
from tests.helpers.loss_cases import assert_published, make_logits


@pytest.mark.parametrize("temperature", [1, 2, 10])
def test_published_value_and_gradient(temperature):
    assert_published(f"distribution_kl_T{temperature}", distribution_kl_loss)


def test_a_value_by_hand():
    # The teacher is sure of 3/4 and 1/4, the student undecided.
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distribution_kl_loss(student, teacher).item() == pytest.approx(expected)


def test_it_is_the_divergence_of_torchs_own_distributions():
    student, teacher = make_logits(6)
    categories = [torch.distributions.Categorical(logits=logits) for logits in (teacher, student)]
    expected = torch.distributions.kl_divergence(*categories).mean()
    torch.testing.assert_close(distribution_kl_loss(student, teacher), expected, rtol=1e-12, atol=0)


def test_a_bin_that_the_teacher_rules_out_adds_nothing():
    student = torch.randn(2, 4, requires_grad=True)
    teacher = torch.tensor([[0.0, 1.0, -math.inf, 2.0]] * 2)
    loss = distribution_kl_loss(student, teacher)
    loss.backward()
    p, log_q = teacher.softmax(-1), student.detach().log_softmax(-1)
    kept = [0, 1, 3]
    expected = (p[:, kept] * (p[:, kept].log() - log_q[:, kept])).sum(-1).mean()
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(student.grad, (student.detach().softmax(-1) - p) / 2)


def test_the_mean_over_bins_is_the_sum_over_their_number():
    student, teacher = make_logits(6)
    options = {"temperature": 10.0, "weight": torch.rand(6), "normalizer": 4.0}
    mean = distribution_kl_loss(student, teacher, over_bins="mean", **options)
    torch.testing.assert_close(
        5 * mean, distribution_kl_loss(student, teacher, **options), rtol=1e-12, atol=0
    )
    with pytest.raises(ValueError, match='over_bins must be "sum" or "mean", got \'none\''):
        distribution_kl_loss(student, teacher, over_bins="none")


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_error_temperature(temperature):
    with pytest.raises(ValueError, match=f"temperature must be above 0, got {temperature}"):
        distribution_kl_loss(torch.zeros(2, 4), torch.zeros(2, 4), temperature=temperature)
