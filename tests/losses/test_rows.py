"""What all losses of rows have in common: weights, normalizers, constants, layouts, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.loss_cases import as_maps, every_logit_loss, every_loss, gradient, with_gradient


@every_loss
def test_mean_over_rows_agrees_with_a_plain_calculation(case):
    student, teacher = case.make(7)
    expected = math.fsum(case.reference(student, teacher)) / 7
    assert case(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@every_loss
@pytest.mark.parametrize("as_tensor", [False, True])
def test_weight_and_normalizer_agree_with_a_plain_calculation(case, as_tensor):
    student, teacher = case.make(2, 4)
    weight = torch.rand(2, 4).double()
    weight[0, 1] = 0
    rows = case.reference(student, teacher)
    expected = math.fsum(w * row for w, row in zip(weight.flatten().tolist(), rows, strict=True)) / 2.5
    normalizer = torch.tensor([2.5], dtype=torch.float64) if as_tensor else 2.5
    loss = case(student, teacher, weight=weight, normalizer=normalizer)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@every_loss
def test_weight_of_booleans_selects_rows(case):
    student, teacher = case.make(6)
    chosen = torch.tensor([True, False, False, True, True, False])
    selected, expected = (
        case(student, teacher, weight=chosen, normalizer=3.0),
        case(student[chosen], teacher[chosen]),
    )
    torch.testing.assert_close(selected, expected, rtol=1e-13, atol=0)


@every_loss
def test_gradcheck(case):
    student, teacher = case.make(6)
    weight = torch.rand(6).double()

    def loss(s: Tensor) -> Tensor:
        return case(s, teacher, weight=weight, normalizer=2.0)

    assert torch.autograd.gradcheck(loss, with_gradient(student))


@every_logit_loss
@pytest.mark.parametrize("create_graph", [False, True])
def test_own_teacher_has_no_gradient(case, create_graph):
    teacher, _ = case.make(5)
    student = with_gradient(teacher)
    (found,) = torch.autograd.grad(case(student, teacher), student, create_graph=create_graph)
    torch.testing.assert_close(found.detach(), torch.zeros_like(found), rtol=0, atol=1e-15)


@every_loss
def test_no_gradient_reaches_the_constants(case):
    student, teacher = (x.requires_grad_() for x in case.make(4))
    weight, normalizer = torch.rand(4, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    case(student, teacher, weight=weight, normalizer=normalizer).backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert weight.grad is None
    assert normalizer.grad is None


@every_loss
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_rows_give_zero_with_a_gradient(case, shape):
    student, teacher = (torch.zeros(*shape, 4) for _ in range(2))
    student.requires_grad_()
    for arguments in ({}, {"weight": torch.zeros(shape), "normalizer": 1.0}):
        loss = case(student, teacher, **arguments)
        assert loss.item() == 0
        loss.backward()
        assert student.grad.shape == student.shape


@every_loss
@pytest.mark.parametrize("value", [0.0, -2.0, math.nan])
def test_error_a_normalizer_that_is_not_above_0(case, value):
    student, teacher = case.make(3)
    for normalizer in (value, torch.tensor(value), torch.tensor([value])):
        with pytest.raises(ValueError, match=f"normalizer must be above 0, got {value}"):
            case(student, teacher, normalizer=normalizer)


@every_logit_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits_stay_finite(case, dtype):
    extremes = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4], dtype=dtype)
    student, teacher = torch.meshgrid(extremes, extremes, indexing="ij")
    student = with_gradient(student)
    loss = case(student, teacher)
    assert loss.isfinite()
    assert gradient(loss, student).isfinite().all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_changes_nothing(case, dtype):
    student, teacher = (x.to(dtype) for x in case.make(6))
    student = with_gradient(student)
    expected = case(student.float(), teacher.float())
    with torch.autocast("cpu", torch.bfloat16):
        loss = case(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    found = gradient(loss, student)
    assert found.dtype == dtype
    torch.testing.assert_close(found, gradient(case(student.float(), teacher.float()), student))


@every_loss
@given(order=st.permutations(range(6)), seed=st.integers(0, 2**16))
@settings(max_examples=15, deadline=None)
def test_order_of_rows_is_free(case, order, seed):
    torch.manual_seed(seed)
    student, teacher = case.make(6)
    weight = torch.rand(6).double()
    student, permuted = with_gradient(student), with_gradient(student[order])
    loss = case(student, teacher, weight=weight)
    other = case(permuted, teacher[order], weight=weight[order])
    torch.testing.assert_close(other, loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient(other, permuted), gradient(loss, student)[order], rtol=1e-13, atol=0)


@every_loss
@given(shape=st.lists(st.integers(1, 4), min_size=0, max_size=3), seed=st.integers(0, 2**16))
@settings(max_examples=15, deadline=None)
def test_flattening_to_rows_changes_nothing(case, shape, seed):
    torch.manual_seed(seed)
    student, teacher = case.make(*shape)
    weight = torch.rand(shape).double()
    student = with_gradient(student)
    loss = case(student, teacher, weight=weight)
    rows = (x.reshape(-1, x.shape[-1]) for x in (student, teacher))
    flat = case(*rows, weight=weight.reshape(-1))
    torch.testing.assert_close(flat, loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient(flat, student), gradient(loss, student), rtol=1e-13, atol=0)


@every_loss
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
def test_layout_in_memory_changes_nothing(case, sides):
    contiguous = case.make(3, 4)
    student, teacher = (as_maps(x) if side else x for x, side in zip(contiguous, sides, strict=True))
    assert not (student.is_contiguous() and teacher.is_contiguous())
    student, plain = student.requires_grad_(), with_gradient(contiguous[0])
    loss, expected = case(student, teacher), case(plain, contiguous[1])
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient(loss, student), gradient(expected, plain), rtol=1e-13, atol=0)


@every_loss
def test_error_shapes_differ(case):
    with pytest.raises(ValueError, match=r"expected tensors of one shape, got .* \(2, 4\), .* \(3, 4\)"):
        case(torch.zeros(2, 4), torch.zeros(3, 4))


@every_loss
@pytest.mark.parametrize("side", [0, 1])
def test_error_not_floating_point(case, side):
    arguments = [torch.zeros(2, 4), torch.zeros(2, 4)]
    arguments[side] = arguments[side].long()
    with pytest.raises(TypeError, match=r"must hold floating-point numbers, got torch\.int64"):
        case(*arguments)


@every_loss
def test_error_no_dimension(case):
    with pytest.raises(ValueError, match=r"must have shape \(\.\.\., (classes|4)\)"):
        case(torch.tensor(0.0), torch.tensor(0.0))


@every_loss
@pytest.mark.parametrize("shape", [(), (1,), (2,), (2, 3, 1), (3, 2)])
def test_error_weight_is_not_one_number_a_row(case, shape):
    message = rf"weight must hold .* expected \(2, 3\), got \({', '.join(map(str, shape))},?\)"
    with pytest.raises(ValueError, match=message):
        case(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), weight=torch.ones(shape))


@every_loss
@pytest.mark.parametrize("normalizer", [0, -1.0, math.nan])
def test_error_normalizer_not_above_zero(case, normalizer):
    with pytest.raises(ValueError, match=f"normalizer must be above 0, got {normalizer}"):
        case(torch.zeros(2, 4), torch.zeros(2, 4), normalizer=normalizer)


@every_loss
def test_error_normalizer_of_several_numbers(case):
    with pytest.raises(ValueError, match=r"normalizer must be one number, got shape \(2,\)"):
        case(torch.zeros(2, 4), torch.zeros(2, 4), normalizer=torch.ones(2))
