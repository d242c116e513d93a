"""The cosine loss: directions at each position."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crosskd.losses import cosine_loss
from tests.helpers.loss_cases import gradient


def maps(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape).double().requires_grad_(), torch.randn(*shape).double()


def plain(student: Tensor, teacher: Tensor) -> float:
    """In plain Python, position by position."""
    losses = []
    rows = [side.detach().movedim(1, -1).flatten(0, -2).tolist() for side in (student, teacher)]
    for s, t in zip(*rows, strict=True):
        lengths = math.hypot(*s) * math.hypot(*t)
        losses.append(1 - math.fsum(a * b for a, b in zip(s, t, strict=True)) / lengths)
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 5, 7), (4, 5)])
def test_it_agrees_with_a_plain_calculation_and_with_pytorch(shape):
    student, teacher = maps(*shape)
    loss = cosine_loss(student, teacher)
    assert loss.item() == pytest.approx(plain(student, teacher), rel=1e-12)
    expected = (1 - F.cosine_similarity(student, teacher, dim=1)).mean()
    torch.testing.assert_close(gradient(loss, student), gradient(expected, student), rtol=1e-9, atol=1e-12)


@given(scale=st.floats(0.01, 100), other=st.floats(0.01, 100))
def test_lengths_do_not_matter(scale, other):
    student, teacher = maps(2, 3, 2, 2)
    torch.testing.assert_close(cosine_loss(scale * student, other * teacher), cosine_loss(student, teacher))


def test_the_gradient_reaches_the_student_alone():
    student, teacher = maps(2, 3, 2, 2)
    assert torch.autograd.gradcheck(lambda s: cosine_loss(s, teacher), student)
    cosine_loss(student, teacher.requires_grad_()).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("side", [0, 1])
def test_vectors_without_a_direction_count_as_one_without_a_gradient(side):
    both = [torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2, 2)]
    both[side][..., 0, 1] = 0
    student, teacher = both[0].requires_grad_(), both[1]
    loss = cosine_loss(student, teacher)
    found = gradient(loss, student)
    assert found.isfinite().all()
    assert (found[..., 0, 1] == 0).all()
    assert (found[..., 1, 1] != 0).all()
    kept = torch.tensor([0, 2, 3])
    others = cosine_loss(student.flatten(2)[..., kept], teacher.flatten(2)[..., kept])
    torch.testing.assert_close(loss, (3 * others + 1) / 4)


def test_it_is_float32_under_autocast():
    student, teacher = torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(2, 3, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cosine_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, cosine_loss(student.float(), teacher.float()))


def test_nothing_but_the_maps_is_kept_for_the_gradient():
    kept = []
    student, teacher = torch.randn(2, 64, 8, 8, requires_grad=True), torch.randn(2, 64, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        cosine_loss(student, teacher)
    whole = {t.data_ptr() for t in kept if t.numel() == student.numel()}
    assert whole == {student.data_ptr(), teacher.data_ptr()}


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (torch.zeros(1, 2, 3), torch.zeros(1, 3, 3), ValueError, r"student \(1, 2, 3\), teacher \(1, 3, 3\)"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 2, 3).int(), TypeError, "teacher must hold floating-point"),
        (torch.zeros(3), torch.zeros(3), ValueError, r"\(batch, channels, \*space\) .*got \(3,\)"),
        (torch.zeros(0, 2, 3), torch.zeros(0, 2, 3), ValueError, r"one element, got \(0, 2, 3\)"),
    ],
)
def test_error_cosine(student, teacher, error, message):
    with pytest.raises(error, match=message):
        cosine_loss(student, teacher)
