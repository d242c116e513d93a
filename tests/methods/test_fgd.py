"""FGD: objects and background apart, attention, and the global part, on whole detectors."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from crosskd import FGD, Distiller, Schedule
from crosskd.adapters import Objects, backbone
from crosskd.pairing import Pair
from crosskd.step import Step
from tests.helpers.slow_crosskd import float64_batch
from tests.helpers.steps import PlainAdapter, PlainHead, make_side
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet
from tests.methods.test_pkd import pair_of

NAMES = ("kd_fgd_focal", "kd_fgd_attention", "kd_fgd_global")
RETINANET = {"temperature": 0.5, "alpha": 1e-3, "beta": 5e-4, "gamma": 5e-4, "lambda_": 5e-6}


# -- a plain calculation --------------------------------------------------------------------------


def plain_attention(features: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Of one image's map (channels, height, width): of locations and of channels."""
    channels, height, width = features.shape
    size = features.abs()
    space = (size.sum(dim=0) / channels / temperature).exp()
    channel = (size.sum(dim=(1, 2)) / (height * width) / temperature).exp()
    return height * width * space / space.sum(), channels * channel / channel.sum()


def plain_context(features: Tensor, state: dict[str, Tensor], side: str) -> Tensor:
    """One image's map with its context added at each location."""
    locations = features.flatten(1).T  # (locations, channels)
    scores = locations @ state[f"conv_mask_{side}.weight"].flatten() + state[f"conv_mask_{side}.bias"]
    shares = scores.exp() / scores.exp().sum()
    context = sum(share * location for share, location in zip(shares, locations, strict=True))
    first, norm, last = (f"channel_add_conv_{side}.{index}" for index in (0, 1, 3))
    hidden = state[f"{first}.weight"].flatten(1) @ context + state[f"{first}.bias"]
    hidden = (hidden - hidden.mean()) / (hidden.var(correction=0) + 1e-5).sqrt()
    hidden = (hidden * state[f"{norm}.weight"].flatten() + state[f"{norm}.bias"].flatten()).clamp(min=0)
    added = state[f"{last}.weight"].flatten(1) @ hidden + state[f"{last}.bias"]
    return features + added[:, None, None]


def plain_level(
    student: Tensor,
    teacher: Tensor,
    boxes: list[Tensor],
    stride: float,
    settings: dict[str, float],
    state: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The losses of one level: image by image, cell by cell."""
    losses = {name: student.new_zeros(()) for name in NAMES}
    for ours, theirs, of_image in zip(student, teacher, boxes, strict=True):
        space, channel = plain_attention(ours, settings["temperature"])
        their_space, their_channel = plain_attention(theirs, settings["temperature"])
        places = [(row, column) for row in range(ours.shape[1]) for column in range(ours.shape[2])]
        foreground = dict.fromkeys(places, 0.0)
        for x1, y1, x2, y2 in (of_image / stride).tolist():
            left, top, right, bottom = math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)
            for row, column in places:
                if top <= row <= bottom and left <= column <= right:
                    cells = (right - left + 1) * (bottom - top + 1)
                    foreground[row, column] = max(foreground[row, column], 1 / cells)
        outside = sum(weight == 0 for weight in foreground.values())
        for (row, column), weight in foreground.items():
            factor = settings["alpha"] * weight if weight else settings["beta"] / outside
            squares = their_channel * (theirs[:, row, column] - ours[:, row, column]) ** 2
            losses["kd_fgd_focal"] = (
                losses["kd_fgd_focal"] + factor * their_space[row, column] * squares.sum()
            )
        attended = (space - their_space).abs().sum() + (channel - their_channel).abs().sum()
        losses["kd_fgd_attention"] = losses["kd_fgd_attention"] + settings["gamma"] * attended
        whole = plain_context(theirs, state, "t") - plain_context(ours, state, "s")
        losses["kd_fgd_global"] = losses["kd_fgd_global"] + settings["lambda_"] * (whole**2).sum()
    return {name: loss / len(student) for name, loss in losses.items()}


def random_contexts(method: FGD) -> None:
    """So that the global part does something from the first step on."""
    generator = torch.Generator().manual_seed(3)
    for parameter in method.contexts.parameters():
        with torch.no_grad():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def assert_agrees(distiller: Distiller, images, targets, boxes: list[Tensor], settings) -> None:
    """Losses and their gradients at the student's maps, against the plain calculation."""
    trace = distiller.trace(images, targets)
    losses = trace.losses["fgd"]
    assert tuple(losses) == NAMES
    method = distiller.methods["fgd"]
    maps = [feature_map.detach().requires_grad_() for feature_map in trace.student.maps]
    expected = dict.fromkeys(NAMES, 0.0)
    for level, (ours, theirs) in enumerate(zip(maps, trace.teacher.maps, strict=True)):
        projection = method.projections[f"level{level}"].convolution
        weight, bias = projection.weight.flatten(1), projection.bias[:, None, None]
        projected = torch.einsum("oc,nchw->nohw", weight, ours) + bias
        state = dict(method.contexts[f"level{level}"].named_parameters())
        parts = plain_level(projected, theirs, boxes, 8.0 * 2**level, settings, state)
        expected = {name: expected[name] + parts[name] for name in NAMES}
    for name in NAMES:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-9, atol=0)
        found = torch.autograd.grad(losses[name], trace.student.maps, retain_graph=True)
        wanted = torch.autograd.grad(expected[name], maps, retain_graph=True)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9 * theirs.abs().max().item())


def distiller_of(method: FGD) -> Distiller:
    """An FCOS teaches a RetinaNet of half its width, in float64."""
    distiller = Distiller(tiny_fcos(width=64, seed=1), tiny_retinanet(width=32, seed=2), method).double()
    random_contexts(distiller.methods["fgd"])
    return distiller


def test_losses_and_gradients_of_a_whole_detector():
    images, targets = float64_batch()
    targets[1] = {name: tensor[:0] for name, tensor in targets[1].items()}  # an image without objects
    boxes = [target["boxes"] for target in targets]
    assert_agrees(distiller_of(FGD()), images, targets, boxes, RETINANET)


def test_unlabelled_images_take_the_teachers_confident_boxes():
    images, _ = float64_batch()
    distiller = distiller_of(FGD(threshold=0.7))
    (step,) = distiller.trace(images).steps.values()
    boxes = [objects.boxes.double() for objects in step.foreground(0.7)]
    more = [objects.boxes for objects in step.foreground(0.5)]
    assert 0 < sum(map(len, boxes)) < sum(map(len, more))
    assert_agrees(distiller, images, None, boxes, RETINANET)


def test_error_unlabelled_images_of_a_teacher_that_finds_nothing():
    teacher = tiny_fcos(width=64, seed=1).backbone
    distiller = Distiller(teacher, tiny_retinanet(seed=2), FGD(), teacher_adapter=backbone())
    images, targets = tiny_batch()
    assert set(NAMES) < set(distiller(images, targets))
    with pytest.raises(ValueError, match="TinyBackbone has no head. Give images with targets"):
        distiller(images)


def test_a_batch_without_any_object():
    images, targets = float64_batch()
    targets = [{name: tensor[:0] for name, tensor in target.items()} for target in targets]
    distiller = distiller_of(FGD())
    losses = distiller(images, targets)
    sum(losses[name] for name in NAMES).backward()
    assert all(losses[name] > 0 for name in NAMES)
    assert all(parameter.grad is not None for parameter in distiller.methods.parameters())


def step_of(teacher: list[Tensor], student: list[Tensor], box: list[float], strides: tuple) -> Step:
    """One object in each image."""
    objects = (Objects(torch.tensor([box]), torch.tensor([1])),) * len(student[0])
    adapter = PlainAdapter(PlainHead(), strides=strides)
    return Step(make_side(maps=teacher), make_side(maps=student, objects=objects, adapter=adapter))


def method_for(pair: Pair, **settings) -> FGD:
    method = FGD(**settings)
    method.setup(pair)
    return method


def test_a_level_of_one_cell():
    """Its attention is 1 whatever it shows, and the object leaves no background."""
    student = torch.randn(2, 6, 1, 1, requires_grad=True)
    method = method_for(pair_of((8.0,), (8.0,)), gamma=0, lambda_=0, temperature=1e6)
    teacher = torch.randn(2, 6, 1, 1)
    losses = method(step_of([teacher], [student], [0.0, 0.0, 7.0, 7.0], (8.0,)))
    assert set(losses) == {"kd_fgd_focal"}
    expected = 1e-3 / 4 * (student - teacher).square().sum() / 2  # of four cells one is on the map
    torch.testing.assert_close(losses["kd_fgd_focal"], expected)


def test_boxes_are_scaled_by_the_students_stride_where_the_teachers_level_is_resized():
    student = torch.zeros(2, 6, 4, 4, requires_grad=True)
    settings = {"alpha": 1.0, "beta": 0, "gamma": 0, "lambda_": 0}
    method = method_for(pair_of((16.0,), (8.0,)), resize=True, **settings)
    step = step_of([torch.randn(2, 6, 2, 2)], [student], [8.0, 16.0, 15.0, 24.0], (8.0,))
    method(step)["kd_fgd_focal"].backward()
    touched = student.grad.abs().sum(dim=(0, 1)) > 0
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[2:4, 1:3] = True
    assert torch.equal(touched, expected)


# -- parameters -----------------------------------------------------------------------------------


def test_its_parameters_are_part_of_the_distillers_state_and_not_of_the_students():
    student = tiny_retinanet(width=32, seed=2)
    distiller = Distiller(tiny_fcos(width=64, seed=1), student, FGD(levels=(1, 2)))
    added = {key for key in distiller.state_dict() if not key.startswith("student.")}
    parts = ("conv_mask", "channel_add_conv")
    convolutions = [
        f"{part}_{side}{index}"
        for side in ("s", "t")
        for part, indices in zip(parts, (("",), (".0", ".1", ".3")), strict=True)
        for index in indices
    ]
    assert added == {
        f"methods.fgd.{part}.{kind}"
        for level in ("level1", "level2")
        for part in (
            f"projections.{level}.convolution",
            *(f"contexts.{level}.{convolution}" for convolution in convolutions),
        )
        for kind in ("weight", "bias")
    }
    assert not any("context" in key for key in student.state_dict())
    context = distiller.methods["fgd"].contexts["level1"]
    assert context.conv_mask_s.in_channels == context.conv_mask_t.in_channels == 64


def test_all_parameters_get_a_gradient_and_are_trained():
    distiller = Distiller(tiny_fcos(width=64, seed=1), tiny_retinanet(width=32, seed=2), FGD())
    parameters = dict(distiller.methods.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.Adam(distiller.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        sum(distiller(*tiny_batch()).values()).backward()
        assert all(parameter.grad is not None for parameter in parameters.values())
        optimizer.step()
    # The softmax over locations doesn't depend on the bias of its scores.
    unchanged = {name for name, parameter in parameters.items() if torch.equal(parameter, before[name])}
    assert all(name.endswith(("conv_mask_s.bias", "conv_mask_t.bias")) for name in unchanged)


def test_a_stopped_schedule_reports_all_losses():
    method = FGD(schedule=Schedule(stop=1))
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), method)
    first, second = (distiller(*tiny_batch()) for _ in range(2))
    assert set(first) == set(second)
    assert all(first[name] > 0 for name in NAMES)
    assert not any(second[name] for name in NAMES)


def test_error_maps_of_a_frozen_student():
    student = tiny_retinanet(seed=2)
    student.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="map of level 0 depends on no trainable parameter"):
        Distiller(tiny_fcos(width=32, seed=1), student, FGD())(*tiny_batch())


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_type", "known"),
    [
        ("RetinaNet", (0.5, 1e-3, 5e-4, 5e-4, 5e-6)),
        ("GFL", (0.5, 1e-3, 5e-4, 5e-4, 5e-6)),
        ("FCOS", (0.8, 1.6e-3, 8e-4, 8e-4, 8e-6)),
        ("RPN", (0.5, 5e-5, 2.5e-5, 5e-5, 5e-7)),
        ("other", (0.5, 1e-3, 5e-4, 5e-4, 5e-6)),
    ],
)
def test_the_settings_are_those_of_the_students_type(head_type, known):
    pair = pair_of((8.0,), (8.0,), head_type=head_type)
    assert asdict(method_for(pair).settings) == dict(zip(RETINANET, known, strict=True))
    changed = asdict(method_for(pair, beta=0, temperature=2.0).settings)
    assert changed == dict(zip(RETINANET, known, strict=True)) | {"beta": 0, "temperature": 2.0}


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        ({"alpha": 0}, NAMES),
        ({"alpha": 0, "beta": 0}, NAMES[1:]),
        ({"gamma": 0}, (NAMES[0], NAMES[2])),
        ({"lambda_": 0}, NAMES[:2]),
    ],
)
def test_parts_of_weight_0_are_left_out(weights, names):
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), FGD(**weights))
    method = distiller.methods["fgd"]
    losses = distiller(*tiny_batch())
    assert tuple(name for name in losses if "kd" in name) == names == method.loss_names()
    assert bool(method.contexts) == (weights.get("lambda_") != 0)


def test_a_weight_on_top_of_all_parts():
    losses, twice = (
        Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), FGD(weight))(*tiny_batch())
        for weight in (None, 2.0)
    )
    for name in NAMES:
        torch.testing.assert_close(twice[name], 2 * losses[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, "weight must be above 0, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"alpha": -1.0}, "alpha must be 0 or more, got -1.0"),
        ({"beta": math.nan}, "beta must be 0 or more, got nan"),
        ({"lambda_": math.inf}, "lambda_ must be 0 or more, got inf"),
        ({"threshold": 1.0}, "threshold is a probability between 0 and 1, got 1.0"),
        (dict.fromkeys(("alpha", "beta", "gamma", "lambda_"), 0), "all four weights are 0"),
    ],
)
def test_error_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        FGD(**settings)


def test_printing_shows_the_settings():
    assert "resize=False, gamma=0.1\n" in repr(FGD(gamma=0.1))
    settled = "temperature=0.5, alpha=0.001, beta=0.0005, gamma=0.1, lambda_=5e-06\n"
    assert settled in repr(method_for(pair_of((8.0,), (8.0,)), gamma=0.1))
