"""The quality focal loss: numbers, second derivative, and the memory that it takes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from crosskd.losses import quality_focal, quality_focal_loss
from tests.helpers.loss_cases import as_maps, assert_published, gradient, make_logits, with_gradient


@pytest.mark.parametrize("beta", [1, 2])
def test_published_value_and_gradient(beta):
    assert_published(f"quality_focal_beta{beta}", quality_focal_loss)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_what_torch_func_and_tracing_make_of_it():
    student, teacher = make_logits(4)

    def loss(logits: Tensor) -> Tensor:
        return quality_focal_loss(logits, teacher)

    leaf = student.clone().requires_grad_()
    value = loss(leaf)
    (expected,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(torch.func.grad(loss)(student), expected)
    direction = torch.ones_like(student)
    slope = torch.func.jvp(loss, (student,), (direction,))[1]
    torch.testing.assert_close(slope, (expected * direction).sum())
    rows = torch.func.vmap(quality_focal_loss)(student, teacher)
    torch.testing.assert_close(rows.mean(), value.detach())
    torch.testing.assert_close(torch.jit.trace(loss, (student,))(student), value.detach())


def test_a_value_by_hand():
    # sigmoid(0) = 1/2 against sigmoid(log 3) = 3/4: distance 1/4, and the cross entropy is log 2.
    student, teacher = torch.zeros(1, 1), torch.full((1, 1), math.log(3))
    assert quality_focal_loss(student, teacher).item() == pytest.approx(math.log(2) / 4)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_quality_focal_second_derivative(beta):
    student, teacher = make_logits(4)
    inputs = with_gradient(student)
    assert torch.autograd.gradgradcheck(lambda s: quality_focal_loss(s, teacher, beta=beta), inputs)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_quality_focal_equals_the_plain_composition(beta):
    student, teacher = make_logits(50)
    weight = torch.rand(50).double()
    student = with_gradient(student)
    target = teacher.sigmoid()
    elementwise = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    plain = ((student.sigmoid() - target).abs() ** beta * elementwise).sum(-1).mul(weight).sum() / 7
    loss = quality_focal_loss(student, teacher, beta=beta, weight=weight, normalizer=7)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(loss, student), gradient(plain, student), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_quality_focal_second_derivative_is_finite_where_the_two_agree(beta):
    teacher, _ = make_logits(4)
    student = with_gradient(teacher)
    loss = quality_focal_loss(student, teacher, beta=beta)
    (first,) = torch.autograd.grad(loss, student, create_graph=True)
    assert gradient(first.square().sum() + first.sum(), student).isfinite().all()


@pytest.mark.parametrize("chunk", [1, 5, 7, 10, 54, 55, 56])
@pytest.mark.parametrize("layout", ["rows", "maps"])
def test_quality_focal_chunks_change_nothing(chunk, layout, monkeypatch):
    student, teacher = make_logits(1, 11)
    if layout == "maps":
        student, teacher = as_maps(student.expand(2, -1, -1)), as_maps(teacher.expand(2, -1, -1))
    student = with_gradient(student)
    expected = quality_focal_loss(student, teacher)
    expected_gradient = gradient(expected, student)
    monkeypatch.setattr(quality_focal, "_CHUNK_CPU", chunk)
    loss = quality_focal_loss(student, teacher)
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient(loss, student), expected_gradient, rtol=1e-14, atol=0)


class Allocations(TorchDispatchMode):
    """Counts the tensors of at least some size that operators make, views of older ones aside."""

    def __init__(self, at_least: int) -> None:
        super().__init__()
        self.at_least = at_least
        self.storages: set[int] = set()
        self.count = 0

    def __torch_dispatch__(self, operator, types, arguments=(), kwargs=None):
        output = operator(*arguments, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in arguments if isinstance(x, Tensor)}
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                self.count += tensor.numel() >= self.at_least
        return output


@pytest.mark.parametrize("layout", ["rows", "maps"])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_quality_focal_makes_one_tensor_of_the_logits_size(layout, beta, monkeypatch):
    monkeypatch.setattr(quality_focal, "_CHUNK_CPU", 100)
    student, teacher = make_logits(2, 200)
    if layout == "maps":
        student, teacher = as_maps(student), as_maps(teacher)
    student.requires_grad_()
    with Allocations(student.numel() // 2) as made:
        loss = quality_focal_loss(student, teacher, beta=beta, weight=torch.rand(2, 200))
        assert made.count == 0
        loss.backward()
    assert made.count == 1


def test_quality_focal_keeps_nothing_but_its_inputs_for_backward():
    student, teacher = make_logits(40)
    student.requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        quality_focal_loss(student, teacher, weight=torch.rand(40))
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() >= student.numel()}
    assert large == {student.data_ptr(), teacher.data_ptr()}


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.5, 1.0])
@inductor_config.patch({"cpp.vec_isa_ok": False})  # else it compiles trials of vector instructions first
def test_quality_focal_compiled_agrees_with_eager(beta):
    student, teacher = (x.float() for x in make_logits(30))
    teacher[0] = student[0]  # where the two agree exactly, a power below 1 has no slope
    student = with_gradient(student)
    weight = torch.rand(30)

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return quality_focal_loss(s, t, beta=beta, weight=weight, normalizer=3.0)

    eager, compiled = loss(student, teacher), torch.compile(loss, fullgraph=True)(student, teacher)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient(compiled, student), gradient(eager, student), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [-0.1, math.nan])
def test_error_beta(beta):
    with pytest.raises(ValueError, match=f"beta must be 0 or more, got {beta}"):
        quality_focal_loss(torch.zeros(2, 4), torch.zeros(2, 4), beta=beta)
