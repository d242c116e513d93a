"""The kernels of a GPU, against float64: on a GPU where there is one, interpreted by Triton elsewhere."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from crosskd.losses import distribution_kl_loss, distributions, quality_focal, quality_focal_loss
from crosskd.losses._rows import has_kernel

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float16: {"rtol": 2e-3, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-5},
}


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request, monkeypatch):
    """Where the kernels run, instead of the operators, for all but float64."""
    if request.param == "cpu":
        if not INTERPRETED:
            pytest.skip("Triton interprets kernels in the process of test_all_of_it_interpreted")
        for module in (quality_focal, distributions):
            monkeypatch.setattr(module, "has_kernel", lambda s, t: s.dtype != torch.float64)
    return request.param


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_all_of_it_interpreted():
    pytest.importorskip("triton")
    # Triton decides when it is imported whether its functions are interpreted.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "cpu"]
    # It needs no peer, and would import those that this run requires.
    environment = {name: value for name, value in os.environ.items() if "CROSSKD_REQUIRE" not in name}
    environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def drawn(device, shape, dtype=torch.float32, scale=4.0):
    """Logits of student and teacher and a weight a row, that all types can hold."""
    generator = torch.Generator().manual_seed(0)
    sides = (torch.randn(2, *shape, generator=generator) * scale).to(dtype)
    weight = torch.rand(shape[:-1], generator=generator)
    return sides[0].to(device), sides[1].to(device), weight.to(device)


def value_and_gradient(loss, student, *rest):
    leaf = student.clone().requires_grad_()
    value = loss(leaf, *rest)
    value.backward()
    return value.detach(), leaf.grad


def assert_as_in_float64(loss, student, teacher, weight):
    value, gradient = value_and_gradient(loss, student, teacher, weight)
    expected = value_and_gradient(loss, student.double(), teacher.double(), weight.double())
    assert value.dtype == torch.float32
    assert gradient.dtype == student.dtype
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), expected[1], **TOLERANCES[student.dtype])


def sum_of(loss, **options):
    return lambda student, teacher, weight: loss(student, teacher, weight=weight, normalizer=1.0, **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("beta", [0.0, 1.0, 1.5, 2.0])
def test_quality_focal(device, beta, dtype):
    inputs = drawn(device, (2, 37, 80), dtype)
    assert_as_in_float64(sum_of(quality_focal_loss, beta=beta), *inputs)


@pytest.mark.parametrize("shape", [(5, 1), (1, 1, 3), (3, 2100), (2, 3, 5, 20)])
def test_quality_focal_of_other_shapes(device, shape):
    assert_as_in_float64(sum_of(quality_focal_loss), *drawn(device, shape))


def test_quality_focal_where_both_agree_and_far_out(device):
    student, teacher, weight = drawn(device, (4, 8))
    student[0] = teacher[0]
    student[1] = torch.tensor([-90.0, 90.0, -30.0, 30.0, -17.0, 17.0, -1e4, 1e4])
    loss = sum_of(quality_focal_loss)
    assert_as_in_float64(loss, student, teacher, weight)
    steep, gradient = value_and_gradient(sum_of(quality_focal_loss, beta=0.5), student, teacher, weight)
    assert steep.isfinite()
    assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))
    # Improbable for both: log(1 + e) in float32 would be 0.
    improbable = torch.full((1, 4), -20.0, device=device)
    value = quality_focal_loss(improbable, improbable - 1, beta=0.0)
    expected = quality_focal_loss(improbable.double(), improbable.double() - 1, beta=0.0)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_distribution_kl(device, temperature, dtype):
    student, teacher, weight = drawn(device, (2, 31, 4, 17), dtype)
    teacher[:, :, :, 3] = -math.inf  # a bin that the teacher rules out
    loss = sum_of(distribution_kl_loss, temperature=temperature)
    assert_as_in_float64(loss, student, teacher, weight)


@pytest.mark.parametrize("shape", [(5, 2), (1, 3), (70, 8), (3, 2100)])
def test_distribution_kl_of_other_shapes(device, shape):
    assert_as_in_float64(sum_of(distribution_kl_loss, over_bins="mean"), *drawn(device, shape))


@pytest.mark.parametrize("loss", [quality_focal_loss, distribution_kl_loss])
def test_what_is_not_finite_is_seen(device, loss):
    student, teacher, _ = drawn(device, (3, 5))
    teacher[1, 2] = math.nan
    assert loss(student, teacher).isnan()


@pytest.mark.parametrize("loss", [quality_focal_loss, distribution_kl_loss])
def test_the_second_derivative_is_that_of_the_operators(device, loss):
    student, teacher, weight = drawn(device, (6, 8), scale=1.0)

    def second(dtype):
        leaf = student.to(dtype).requires_grad_()
        value = loss(leaf, teacher.to(dtype), weight=weight.to(dtype))
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0].double()

    torch.testing.assert_close(second(torch.float32), second(torch.float64), rtol=1e-4, atol=1e-7)


@GPU
@pytest.mark.parametrize(("loss", "width"), [(quality_focal_loss, 80), (distribution_kl_loss, 17)])
def test_no_tensor_of_the_logits_size_is_made_beside_the_gradient(loss, width):
    student, teacher, weight = drawn("cuda", (2, 50000, width))
    student.requires_grad_()
    loss(student, teacher, weight=weight).backward()
    student.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss(student, teacher, weight=weight).backward()
    size = student.numel() * student.element_size()
    assert torch.cuda.max_memory_allocated() - before < 1.35 * size


@GPU
def test_other_types_and_layouts_are_left_to_the_operators():
    student, teacher, _ = drawn("cuda", (4, 6))
    assert has_kernel(student, teacher)
    assert has_kernel(student.half(), teacher)
    assert not has_kernel(student.double(), teacher.double())
    assert not has_kernel(student.t(), teacher.t())
    assert not has_kernel(student, teacher.cpu())
    assert not has_kernel(student[:0], teacher[:0])


def test_a_processor_has_no_kernels():
    assert not has_kernel(torch.zeros(2, 3), torch.zeros(2, 3))
