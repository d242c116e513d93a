"""CWD's loss, which compares where channels are active."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crosskd.losses import cwd_loss
from tests.helpers.loss_cases import gradient, with_gradient
from tests.helpers.reference_files import load_parity


@pytest.mark.parametrize("case", ["cwd_tau1", "cwd_tau4"])
def test_value_and_gradient_agree_with_numbers_of_others(case):
    known = load_parity("methods.pt")[case]
    student = with_gradient(known["student"])
    loss = cwd_loss(student, known["teacher"], temperature=known["temperature"])
    assert loss.item() == pytest.approx(float(known["loss"]), rel=1e-6)
    expected = known["grad_student"]
    scale = expected.abs().max().item()
    torch.testing.assert_close(gradient(loss, student), expected, rtol=1e-6, atol=1e-6 * scale)


def plain_cwd(student: Tensor, teacher: Tensor, temperature: float) -> float:
    def distribution(channel: list[float]) -> list[float]:
        powers = [math.exp(value / temperature) for value in channel]
        return [power / math.fsum(powers) for power in powers]

    ours, theirs = (features.flatten(0, 1).flatten(1).tolist() for features in (student, teacher))
    divergences = []
    for our_channel, their_channel in zip(ours, theirs, strict=True):
        pairs = zip(distribution(our_channel), distribution(their_channel), strict=True)
        divergences.append(math.fsum(p * math.log(p / q) for q, p in pairs))
    return temperature**2 * math.fsum(divergences) / len(divergences)


@given(
    shape=st.tuples(*(st.integers(1, 4) for _ in range(4))),
    temperature=st.floats(0.3, 8.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_it_agrees_with_a_plain_calculation(shape, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(shape, generator=generator).double() for _ in range(2))
    loss = cwd_loss(student, teacher, temperature=temperature).item()
    assert loss == pytest.approx(plain_cwd(student, teacher, temperature), rel=1e-9, abs=1e-12)


def test_gradient_reaches_the_student_alone():
    student, teacher = (torch.randn(2, 3, 2, 2).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda s: cwd_loss(s, teacher.detach(), temperature=2.0), student)
    cwd_loss(student, teacher, temperature=2.0).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_it_is_float32_under_autocast():
    student, teacher = torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(2, 3, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cwd_loss(student, teacher, temperature=1.0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, cwd_loss(student.float(), teacher.float(), temperature=1.0))


def test_extreme_activations_are_finite():
    student = torch.tensor([1e4, -1e4, 0.0, 0.0]).reshape(1, 1, 2, 2).requires_grad_()
    loss = cwd_loss(student, -student.detach(), temperature=1.0)
    assert loss.isfinite()
    assert gradient(loss, student).isfinite().all()


def test_no_images_give_a_zero_with_a_gradient():
    student = torch.zeros(0, 3, 2, 2, requires_grad=True)
    loss = cwd_loss(student, torch.zeros(0, 3, 2, 2), temperature=1.0)
    assert loss.item() == 0
    assert gradient(loss, student).shape == (0, 3, 2, 2)


@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "error", "message"),
    [
        ((1, 2, 3, 3), (1, 3, 3, 3), 1.0, ValueError, r"student_features \(1, 2, 3, 3\), teacher_features"),
        ((2, 3), (2, 3), 1.0, ValueError, r"\(batch, channels, \*space\), got \(2, 3\)"),
        ((1, 2, 3, 3), (1, 2, 3, 3), 0.0, ValueError, "temperature must be above 0, got 0.0"),
    ],
)
def test_errors(student, teacher, temperature, error, message):
    with pytest.raises(error, match=message):
        cwd_loss(torch.zeros(student), torch.zeros(teacher), temperature=temperature)


def test_error_whole_numbers():
    with pytest.raises(TypeError, match="teacher_features must hold floating-point numbers"):
        cwd_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3).int(), temperature=1.0)
