"""MGD: masks, generators and the two ways to add up, on whole detectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from crosskd import MGD, Distiller
from crosskd.pairing import Pair
from tests.helpers.slow_crosskd import float64_batch
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet
from tests.methods.test_pkd import pair_of, step_of


def method_for(pair: Pair, **settings) -> MGD:
    method = MGD(**settings)
    method.setup(pair)
    return method


def masks_of(method: MGD) -> dict[str, Tensor]:
    """Gets the masks (batch, height, width) that the generators of a method meet from now on, by level."""
    masks: dict[str, Tensor] = {}
    for level, generator in method.generators.items():

        def record(_, inputs: tuple[Tensor], level: str = level) -> None:
            masks[level] = (inputs[0] != 0).any(dim=1)

        generator.register_forward_pre_hook(record)
    return masks


# -- numbers --------------------------------------------------------------------------------------


def plain_convolution(features: Tensor, layer: nn.Conv2d) -> Tensor:
    """3x3, with zeros beyond the map, of one image (channels, height, width): location by location."""
    channels, height, width = features.shape
    padded = features.new_zeros(channels, height + 2, width + 2)
    padded[:, 1:-1, 1:-1] = features
    convolved = []
    for row in range(height):
        for column in range(width):
            window = padded[:, row : row + 3, column : column + 3]
            convolved.append((layer.weight * window).sum(dim=(1, 2, 3)) + layer.bias)
    return torch.stack(convolved, dim=1).view(-1, height, width)


@pytest.mark.parametrize(("reduction", "weight"), [("sum", 2e-5), ("mean", 114.688)])
@pytest.mark.parametrize("labelled", [True, False])
def test_losses_and_gradients_of_a_whole_detector(reduction, weight, labelled):
    """An FCOS teaches a RetinaNet of half its width."""
    teacher, student = tiny_fcos(width=64, seed=1), tiny_retinanet(width=32, seed=2)
    distiller = Distiller(teacher, student, MGD(reduction=reduction)).double()
    method = distiller.methods["mgd"]
    masks = masks_of(method)
    images, targets = float64_batch()
    trace = distiller.trace(images, targets if labelled else None)
    maps = [feature_map.detach().requires_grad_() for feature_map in trace.student.maps]
    total, elements = torch.zeros((), dtype=torch.float64), 0
    for level, (ours, theirs) in enumerate(zip(maps, trace.teacher.maps, strict=True)):
        projection = method.projections[f"level{level}"].convolution
        first, _, last = method.generators[f"level{level}"]
        for image in range(2):
            projected = torch.einsum("oi,ihw->ohw", projection.weight.flatten(1), ours[image])
            projected = projected + projection.bias[:, None, None]
            hidden = plain_convolution(projected * masks[f"level{level}"][image], first).clamp(min=0)
            total = total + ((theirs[image] - plain_convolution(hidden, last)) ** 2).sum() / 2
        elements += theirs[0].numel()
    expected = weight * (total if reduction == "sum" else total / elements)
    loss = trace.losses["mgd"]["kd_mgd"]
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    found, wanted = torch.autograd.grad(loss, trace.student.maps), torch.autograd.grad(expected, maps)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9 * theirs.abs().max().item())


def test_images_without_objects():
    images, targets = tiny_batch()
    targets = [{name: tensor[:0] for name, tensor in target.items()} for target in targets]
    distiller = Distiller(tiny_fcos(seed=1), tiny_retinanet(seed=2), MGD())
    sum(distiller(images, targets).values()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in distiller.methods.parameters())


# -- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_ratio", [0.0, 0.3, 0.65])
def test_a_location_is_masked_with_the_given_probability(mask_ratio):
    method = method_for(pair_of((8.0,), (8.0,)), mask_ratio=mask_ratio)
    masks = masks_of(method)
    maps = torch.ones(2, 6, 50, 50)
    torch.manual_seed(0)
    method(step_of([maps], [maps.clone().requires_grad_()]))
    masked = 1 - masks["level0"].float().mean(dim=(1, 2))
    deviation = math.sqrt(mask_ratio * (1 - mask_ratio) / 2500)
    assert ((masked - mask_ratio).abs() <= 4 * deviation).all()


def test_masks_are_drawn_anew_for_each_step_level_and_image_from_torchs_generator():
    method = method_for(pair_of((8.0, 16.0), (8.0, 16.0)))
    masks = masks_of(method)
    maps = [torch.ones(2, 6, 8, 8), torch.ones(2, 6, 8, 8)]
    student = [feature_map.clone().requires_grad_() for feature_map in maps]

    def drawn() -> list[Tensor]:
        method(step_of(maps, student))
        return [of_image for level in masks.values() for of_image in level]

    torch.manual_seed(0)
    first, second = drawn(), drawn()
    different = [*first, *second]
    assert len({tuple(mask.flatten().tolist()) for mask in different}) == len(different) == 8
    torch.manual_seed(0)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(drawn(), first, strict=True))


def test_masked_locations_are_0_in_all_channels_and_others_unchanged():
    method = method_for(pair_of((8.0,), (8.0,)))
    student = torch.randn(2, 6, 8, 8).bfloat16()
    masked = method._masked(student)
    assert masked.dtype == torch.bfloat16
    hidden = (masked == 0).all(dim=1, keepdim=True)
    assert 0 < hidden.sum() < hidden.numel()
    assert torch.equal(masked, torch.where(hidden, torch.zeros_like(student), student))


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_type", "weight", "mask_ratio"),
    [("RetinaNet", 2e-5, 0.65), ("FCOS", 2e-5, 0.65), ("other", 2e-5, 0.65), ("RPN", 5e-7, 0.45)],
)
def test_the_settings_are_those_of_the_students_type(head_type, weight, mask_ratio):
    pair = pair_of((8.0,), (8.0,), head_type=head_type)
    method = method_for(pair)
    assert (method.weight, method.mask_ratio) == (weight, mask_ratio)
    method = method_for(pair, weight=0.5, mask_ratio=0.1, reduction="mean")
    assert (method.weight, method.mask_ratio) == (0.5, 0.1)


@pytest.mark.parametrize(("head_type", "finest"), [("RetinaNet", 8), ("RPN", 4)])
def test_the_mean_equals_the_published_sum_at_the_published_size(head_type, finest):
    """At 800 x 1344 pixels and 256 channels; here with 1 channel, whose sum is smaller by as much."""
    strides = [float(finest * 2**level) for level in range(5)]
    sizes = [(math.ceil(800 / stride), math.ceil(1344 / stride)) for stride in strides]
    maps = [torch.randn(1, 1, *size) for size in sizes]
    losses = []
    for reduction in ("sum", "mean"):
        pair = pair_of(strides, strides, widths=((1,) * 5, (1,) * 5), head_type=head_type)
        torch.manual_seed(0)
        method = method_for(pair, reduction=reduction)
        losses.append(method(step_of(maps, [m.clone().requires_grad_() for m in maps]))["kd_mgd"].item())
    assert 256 * losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_mean_is_not_tied_to_the_size_of_the_images():
    losses = []
    for side in (16, 32):
        torch.manual_seed(0)
        method = method_for(pair_of((8.0,), (8.0,)), reduction="mean", mask_ratio=0)
        for layer in (method.generators["level0"][0], method.generators["level0"][2]):
            nn.init.zeros_(layer.weight)  # so that the borders don't matter
        maps = torch.ones(2, 6, side, side)
        losses.append(method(step_of([maps], [maps.clone().requires_grad_()]))["kd_mgd"].item())
    assert losses[0] == pytest.approx(losses[1])


# -- parameters -----------------------------------------------------------------------------------


def test_its_parameters_are_part_of_the_distillers_state_and_not_of_the_students():
    student = tiny_retinanet(width=32, seed=2)
    distiller = Distiller(tiny_fcos(width=64, seed=1), student, MGD(levels=(0, 2)))
    added = {key for key in distiller.state_dict() if not key.startswith("student.")}
    assert added == {
        f"methods.mgd.{part}.{kind}"
        for level in ("level0", "level2")
        for part in (f"projections.{level}.convolution", f"generators.{level}.0", f"generators.{level}.2")
        for kind in ("weight", "bias")
    }
    assert not any("generator" in key for key in student.state_dict())
    assert distiller.methods["mgd"].generators["level0"][0].weight.shape == (64, 64, 3, 3)


def test_error_maps_of_a_frozen_student():
    student = tiny_retinanet(seed=2)
    student.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="map of level 0 depends on no trainable parameter"):
        Distiller(tiny_fcos(width=32, seed=1), student, MGD())(*tiny_batch())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradients_are_finite_under_autocast(reduction):
    distiller = Distiller(tiny_fcos(width=64, seed=1), tiny_retinanet(seed=2), MGD(reduction=reduction))
    with torch.autocast("cpu", torch.bfloat16):
        loss = distiller(*tiny_batch())["kd_mgd"]
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in distiller.methods.parameters())


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, "weight must be above 0, got 0"),
        ({"mask_ratio": 1.0}, "mask_ratio is a probability from 0 to below 1, got 1.0"),
        ({"mask_ratio": -0.1}, "mask_ratio is a probability from 0 to below 1, got -0.1"),
        ({"mask_ratio": math.nan}, "mask_ratio is a probability from 0 to below 1, got nan"),
        ({"reduction": "none"}, 'reduction must be "sum" or "mean", got \'none\''),
    ],
)
def test_error_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MGD(**settings)


def test_printing_shows_the_settings():
    method = method_for(pair_of((8.0,), (8.0,)))
    assert "weight=2e-05, levels=None, resize=False, mask_ratio=0.65, reduction='sum'" in repr(method)
    assert method.loss_names() == ("kd_mgd",)
