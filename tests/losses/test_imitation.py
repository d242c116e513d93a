"""Squared error of feature maps, weighted by where the teacher's are active."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crosskd.losses import imitation_loss
from tests.helpers.loss_cases import gradient, with_gradient


def plain_imitation(
    student: Tensor, teacher: Tensor, active_above: float | None, inactive_weight: float
) -> float:
    """The sum over all elements, one by one, of (batch, channels, height, width)."""
    images, channels, height, width = student.shape
    total = 0.0
    for n in range(images):
        places = [(y, x) for y in range(height) for x in range(width)]
        magnitude = {
            (y, x): sum(abs(teacher[n, c, y, x].item()) for c in range(channels)) / channels
            for y, x in places
        }
        for y, x in places:
            active = active_above is None or magnitude[y, x] > active_above * max(magnitude.values())
            for c in range(channels):
                difference = student[n, c, y, x].item() - teacher[n, c, y, x].item()
                total += (1.0 if active else inactive_weight) * difference**2
    return total / student.numel()


@given(
    shape=st.tuples(*(st.integers(1, 4) for _ in range(4))),
    active_above=st.none() | st.floats(0, 0.9),
    inactive_weight=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30)
def test_it_agrees_with_a_plain_calculation(shape, active_above, inactive_weight, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(shape, generator=generator).double() for _ in range(2))
    teacher = teacher * (torch.rand(shape[0], 1, *shape[2:], generator=generator) > 0.5)
    loss = imitation_loss(student, teacher, active_above=active_above, inactive_weight=inactive_weight)
    assert loss.item() == pytest.approx(plain_imitation(student, teacher, active_above, inactive_weight))


def test_empty_places_of_the_teacher_count_a_twentieth():
    teacher = torch.zeros(1, 2, 1, 4)
    teacher[0, 1, 0, 3] = -3.0  # one channel of one place
    student = with_gradient(teacher + 1)
    loss = imitation_loss(student, teacher, active_above=0.0)
    assert loss.item() == pytest.approx((3 * 0.05 + 1) / 4)
    assert gradient(loss, student)[0, 0, 0].tolist() == pytest.approx([0.0125, 0.0125, 0.0125, 0.25])


def test_a_share_is_of_each_images_largest_magnitude():
    teacher = torch.tensor([[1.0, 0.4], [100.0, 10.0]]).reshape(2, 1, 1, 2)
    student = with_gradient(teacher + 1)
    loss = imitation_loss(student, teacher, active_above=0.3, inactive_weight=0.0)
    assert gradient(loss, student).flatten().tolist() == [0.5, 0.5, 0.5, 0.0]


def test_vectors_have_one_place():
    assert imitation_loss(torch.ones(3, 2), torch.zeros(3, 2) + 2, active_above=0.5).item() == 1
    assert imitation_loss(torch.ones(3, 2), torch.zeros(3, 2), active_above=0.5).item() == pytest.approx(0.05)


def test_a_teacher_without_any_activity_is_inactive_everywhere():
    student = torch.ones(1, 2, 2, 2)
    assert imitation_loss(student, torch.zeros(1, 2, 2, 2), active_above=0.0).item() == pytest.approx(0.05)


@pytest.mark.parametrize("active_above", [None, 0.5])
def test_gradient_reaches_the_student_alone(active_above):
    student, teacher = (torch.randn(2, 3, 2, 2).double().requires_grad_() for _ in range(2))

    def loss_of(features: Tensor) -> Tensor:
        return imitation_loss(features, teacher, active_above=active_above)

    assert torch.autograd.gradcheck(loss_of, student)
    loss_of(student).backward()
    assert teacher.grad is None


def test_it_is_float32_under_autocast():
    student, teacher = (300 * torch.randn(2, 3, 4, 4).half() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = imitation_loss(student, teacher, active_above=0.2)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, imitation_loss(student.float(), teacher.float(), active_above=0.2))


def test_no_images_give_a_zero_with_a_gradient():
    student = torch.zeros(0, 3, 2, 2, requires_grad=True)
    loss = imitation_loss(student, torch.zeros(0, 3, 2, 2), active_above=0.2)
    assert loss.item() == 0
    assert gradient(loss, student).shape == student.shape


@pytest.mark.parametrize(
    ("student", "settings", "error", "message"),
    [
        (torch.zeros(1, 2, 3, 3), {}, ValueError, r"one shape, got .*\(1, 2, 3, 3\).*\(1, 2, 2, 2\)"),
        (torch.zeros(1, 2, 2, 2).int(), {}, TypeError, "student_features must hold floating-point"),
        (torch.zeros(1, 2, 2, 2), {"active_above": 1.0}, ValueError, "active_above .* got 1.0"),
        (torch.zeros(1, 2, 2, 2), {"inactive_weight": -0.1}, ValueError, "inactive_weight must be 0 to 1"),
    ],
)
def test_errors(student, settings, error, message):
    with pytest.raises(error, match=message):
        imitation_loss(student, torch.zeros(1, 2, 2, 2), **settings)


def test_error_no_channels():
    with pytest.raises(ValueError, match=r"\(batch, channels, \*space\), got \(4,\)"):
        imitation_loss(torch.zeros(4), torch.zeros(4))
