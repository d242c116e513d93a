"""The SSIM loss of feature maps, judged by kornia's and by a plain calculation."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crosskd.losses import ssim_loss
from crosskd.losses.ssim import min_max_scaled, ssim_map
from tests.helpers.loss_cases import gradient, with_gradient
from tests.helpers.packages import package

SCOPES = ("channel", "batch", "map", "all")


def scaled_maps(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.rand(shape).double(), torch.rand(shape).double()


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_size", [3, 7, 11])
def test_kornia_agrees(window_size):
    metrics = package("kornia.metrics")
    student, teacher = scaled_maps(2, 3, 17, 14)
    teacher = 0.7 * student + 0.3 * teacher
    student = student.requires_grad_()
    ours = ssim_map(student, teacher, window_size=window_size, sigma=1.5)
    theirs = metrics.ssim(student, teacher, window_size, max_val=1.0, eps=0.0, padding="same")
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    found, expected = (gradient(((1 - of) / 2).mean(), student) for of in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9 * expected.abs().max().item())


def mirrored(place: int, length: int) -> int:
    """The cell that a place beyond the border shows."""
    while not 0 <= place < length:
        place = 0 if length == 1 else -place if place < 0 else 2 * (length - 1) - place
    return place


def plain_loss(student: Tensor, teacher: Tensor, window_size: int, sigma: float) -> float:
    """Location by location, of maps that are mirrored at their border."""
    height, width = student.shape[2:]
    offsets = range(-(window_size // 2), window_size // 2 + 1)
    missing = []
    for image, channel in product(range(student.shape[0]), range(student.shape[1])):
        ours, theirs = student[image, channel].tolist(), teacher[image, channel].tolist()
        for y, x in product(range(height), range(width)):
            cells = []
            for down, right in product(offsets, offsets):
                v, u = mirrored(y + down, height), mirrored(x + right, width)
                weight = math.exp(-(down**2 + right**2) / (2 * sigma**2))
                cells.append((weight, ours[v][u], theirs[v][u]))
            total = math.fsum(w for w, _, _ in cells)
            mean_s = math.fsum(w * s for w, s, _ in cells) / total
            mean_t = math.fsum(w * t for w, _, t in cells) / total
            var_s = math.fsum(w * (s - mean_s) ** 2 for w, s, _ in cells) / total
            var_t = math.fsum(w * (t - mean_t) ** 2 for w, _, t in cells) / total
            both = math.fsum(w * (s - mean_s) * (t - mean_t) for w, s, t in cells) / total
            luminance = (2 * mean_s * mean_t + 1e-4) / (mean_s**2 + mean_t**2 + 1e-4)
            missing.append(1 - luminance * (2 * both + 9e-4) / (var_s + var_t + 9e-4))
    return math.fsum(missing) / (2 * len(missing))


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 6), st.integers(1, 6)),
    window_size=st.sampled_from([1, 3, 5, 11]),
    sigma=st.floats(0.5, 4.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_it_agrees_with_a_plain_calculation(shape, window_size, sigma, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.rand(shape, generator=generator).double() for _ in range(2))
    loss = ssim_loss(student, teacher, window_size=window_size, sigma=sigma).item()
    assert loss == pytest.approx(plain_loss(student, teacher, window_size, sigma), rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("minmax", [None, *SCOPES])
def test_gradient_reaches_the_student_alone(minmax):
    student, teacher = (of.requires_grad_() for of in scaled_maps(2, 2, 3, 4))
    assert torch.autograd.gradcheck(lambda s: ssim_loss(s, teacher, minmax=minmax), student)
    assert teacher.grad is None
    ssim_loss(student, teacher, minmax=minmax).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_it_is_float32_under_autocast():
    student, teacher = (of.bfloat16() for of in scaled_maps(2, 3, 6, 6))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ssim_loss(student, teacher, minmax="channel")
    assert loss.dtype == torch.float32
    assert torch.equal(loss, ssim_loss(student.float(), teacher.float(), minmax="channel"))


def test_range_of_the_loss():
    checks = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).double()[None, None]
    assert ssim_loss(checks, checks).item() == pytest.approx(0, abs=1e-12)
    assert ssim_loss(checks, 1 - checks).item() > 0.95


def test_no_images_give_a_zero_with_a_gradient():
    student = torch.zeros(0, 3, 4, 4, requires_grad=True)
    loss = ssim_loss(student, torch.zeros(0, 3, 4, 4), minmax="channel")
    assert loss.item() == 0
    assert gradient(loss, student).shape == (0, 3, 4, 4)


# -- scaling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("minmax", SCOPES)
def test_each_scope_has_its_own_minimum_and_maximum(minmax):
    features = torch.randn(2, 3, 4, 5).double()
    expected = torch.empty_like(features)
    for image, channel in product(range(2), range(3)):
        among = (
            {
                "channel": features[image, channel],
                "batch": features[:, channel],
                "map": features[image],
                "all": features,
            }[minmax]
            .flatten()
            .tolist()
        )
        low, high = min(among), max(among)
        expected[image, channel] = (features[image, channel] - low) / (high - low)
    torch.testing.assert_close(min_max_scaled(features, minmax), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("minmax", SCOPES)
def test_scale_and_offset_make_no_difference(minmax):
    """Nor is there a gradient along them."""
    student, teacher = (torch.randn(2, 3, 5, 5).double() for _ in range(2))
    student.requires_grad_()
    loss = ssim_loss(student, teacher, minmax=minmax)
    torch.testing.assert_close(ssim_loss(3 * student - 2, teacher, minmax=minmax), loss, rtol=1e-10, atol=0)
    found = gradient(loss, student)
    size = found.abs().sum().item()
    assert found.sum().item() == pytest.approx(0, abs=1e-9 * size)
    assert (found * student.detach()).sum().item() == pytest.approx(0, abs=1e-9 * size)


@pytest.mark.parametrize("minmax", SCOPES)
def test_a_constant_map_gets_no_gradient_instead_of_an_endless_one(minmax):
    student = torch.full((2, 3, 4, 4), 5.0, requires_grad=True)
    loss = ssim_loss(student, torch.randn(2, 3, 4, 4), minmax=minmax)
    assert 0 < loss.item() < 1
    assert not gradient(loss, student).any()


def test_a_single_location():
    """Its channels have nothing to compare by themselves, but can be compared with one another."""
    student, teacher = with_gradient(torch.randn(2, 6, 1, 1)), torch.randn(2, 6, 1, 1)
    own = ssim_loss(student, teacher, minmax="channel")
    assert own.item() == pytest.approx(0, abs=1e-6)
    assert not gradient(own, student).any()
    assert gradient(ssim_loss(student, teacher, minmax="map"), student).any()


# -- memory ---------------------------------------------------------------------------------------


def test_nothing_of_the_maps_size_is_kept_beside_them():
    student, teacher = with_gradient(torch.randn(2, 8, 16, 16)), torch.randn(2, 8, 16, 16)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ssim_loss(student, teacher, minmax="channel")
    own = {student.data_ptr(), teacher.data_ptr()}
    assert [of.shape for of in kept if of.numel() >= student.numel() and of.data_ptr() not in own] == []


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((2, 3, 4), {}, r"\(batch, channels, height, width\), got \(2, 3, 4\)"),
        ((1, 2, 3, 3), {"window_size": 4}, "window_size must be an odd number of cells, 1 or more, got 4"),
        ((1, 2, 3, 3), {"window_size": -1}, "window_size must be an odd number"),
        ((1, 2, 3, 3), {"sigma": 0.0}, "sigma must be above 0, got 0.0"),
        ((1, 2, 3, 3), {"minmax": "image"}, "minmax must be one of 'channel', 'batch', 'map', 'all', got"),
    ],
)
def test_errors(shape, settings, message):
    with pytest.raises(ValueError, match=message):
        ssim_loss(torch.zeros(shape), torch.zeros(shape), **settings)


def test_error_other_shapes_or_whole_numbers():
    with pytest.raises(ValueError, match=r"student_features \(1, 2, 3, 3\), teacher_features \(1, 3, 3, 3\)"):
        ssim_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, 3))
    with pytest.raises(TypeError, match="teacher_features must hold floating-point numbers"):
        ssim_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3).int())
