"""MGD's loss, a sum of squares."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crosskd.losses import mgd_loss
from tests.helpers.loss_cases import gradient, with_gradient
from tests.helpers.reference_files import load_parity


def test_value_and_gradient_agree_with_numbers_of_others():
    known = load_parity("methods.pt")["mgd"]
    channels = known["student"].shape[1]
    layers = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
    generator = nn.Sequential(layers[0], nn.ReLU(), layers[1]).double()
    generator.load_state_dict(known["generator"])
    student = with_gradient(known["student"])
    loss = mgd_loss(generator(student * known["mask"]), known["teacher"])
    assert loss.item() == pytest.approx(float(known["loss"]), rel=1e-6)
    expected = known["grad_student"]
    scale = expected.abs().max().item()
    torch.testing.assert_close(gradient(loss, student), expected, rtol=1e-6, atol=1e-6 * scale)


def test_it_is_a_sum_over_all_but_the_images():
    generated, teacher = torch.randn(2, 3, 2, 5, 4).double()
    pairs = zip(generated.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    expected = sum((ours - theirs) ** 2 for ours, theirs in pairs) / 3
    assert mgd_loss(generated, teacher).item() == pytest.approx(expected, rel=1e-12)
    twice = mgd_loss(torch.cat([generated, generated]), torch.cat([teacher, teacher]))
    assert twice.item() == pytest.approx(expected, rel=1e-12)


def test_gradient_reaches_what_was_generated_alone():
    generated, teacher = (torch.randn(2, 3, 2, 2).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda g: mgd_loss(g, teacher.detach()), generated)
    mgd_loss(generated, teacher).backward()
    assert teacher.grad is None


def test_it_is_float32_under_autocast():
    generated, teacher = (300 * torch.randn(2, 3, 4, 4)).half(), torch.zeros(2, 3, 4, 4).half()
    with torch.autocast("cpu", torch.bfloat16):
        loss = mgd_loss(generated, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(
        generated.double().square().sum().item() / 2
    )  # more than float16 holds


def test_no_images_give_a_zero_with_a_gradient():
    generated = torch.zeros(0, 3, 2, 2, requires_grad=True)
    loss = mgd_loss(generated, torch.zeros(0, 3, 2, 2))
    assert loss.item() == 0
    assert gradient(loss, generated).shape == (0, 3, 2, 2)


def test_errors():
    maps = torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match=r"generated \(1, 2, 3, 3\), teacher \(1, 2, 6, 6\)"):
        mgd_loss(maps, torch.zeros(1, 2, 6, 6))
    with pytest.raises(TypeError, match="teacher must hold floating-point numbers"):
        mgd_loss(maps, maps.int())
