"""PKD's loss, which compares whole feature maps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from crosskd.losses import pkd_loss
from tests.helpers.loss_cases import assert_published, gradient


def test_published_value_and_gradient():
    assert_published("pkd", pkd_loss)


def test_pkd_agrees_with_a_plain_calculation():
    student, teacher = torch.randn(2, 3, 2, 4).double(), torch.randn(2, 3, 2, 4).double()

    def normalized(features: Tensor) -> list[float]:
        flat = []
        for channel in features.transpose(0, 1).flatten(1).tolist():
            mean = math.fsum(channel) / len(channel)
            variance = math.fsum((x - mean) ** 2 for x in channel) / (len(channel) - 1)
            flat += [(x - mean) / (math.sqrt(variance) + 1e-6) for x in channel]
        return flat

    pairs = list(zip(normalized(student), normalized(teacher), strict=True))
    expected = math.fsum((s - t) ** 2 / 2 for s, t in pairs) / len(pairs)
    assert pkd_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_pkd_gradient_reaches_the_student_alone():
    student, teacher = (torch.randn(2, 3, 2, 2).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda s: pkd_loss(s, teacher.detach()), student)
    pkd_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_pkd_is_float32_under_autocast():
    student, teacher = torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(2, 3, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = pkd_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, pkd_loss(student.float(), teacher.float()))


def test_pkd_of_constant_channels_is_finite():
    student = torch.zeros(1, 2, 3, 3, requires_grad=True)
    loss = pkd_loss(student, torch.randn(1, 2, 3, 3))
    assert loss.isfinite()
    assert gradient(loss, student).isfinite().all()


def test_error_pkd():
    with pytest.raises(ValueError, match=r"student_features \(1, 2, 3, 3\), teacher_features \(1, 3, 3, 3\)"):
        pkd_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, 3))
    with pytest.raises(TypeError, match=r"teacher_features must hold floating-point numbers"):
        pkd_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3).int())
