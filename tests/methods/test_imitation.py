"""Feature imitation, the feature part of distillation from another modality."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crosskd import Distiller, FeatureImitation
from tests.helpers.slow_crosskd import float64_batch
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet


def pyramid(detector: nn.Module, images: list[Tensor]) -> list[Tensor]:
    return list(detector.backbone(detector.transform(images)[0].tensors).values())


def adapted(distiller: Distiller, features: Tensor, level: int) -> Tensor:
    """A map behind the block of its level, from the weights in the distiller's state."""
    state = distiller.state_dict()
    weights = [
        state[f"methods.imitation.projections.level{level}.{layer}.{kind}"]
        for layer in (0, 2)
        for kind in ("weight", "bias")
    ]
    hidden = F.conv2d(features, weights[0], weights[1], padding=1)
    return F.conv2d(hidden.clamp(min=0), weights[2], weights[3])


def plain_loss(student: Tensor, teacher: Tensor, active_above: float | None) -> Tensor:
    """The loss of one level, place by place."""
    images, _, height, width = student.shape
    total = student.new_zeros(())
    for n in range(images):
        largest = max(teacher[n, :, y, x].abs().mean().item() for y in range(height) for x in range(width))
        for y in range(height):
            for x in range(width):
                active = (
                    active_above is None or teacher[n, :, y, x].abs().mean().item() > active_above * largest
                )
                error = ((student[n, :, y, x] - teacher[n, :, y, x]) ** 2).sum()
                total = total + (1.0 if active else 0.05) * error
    return total / student.numel()


@pytest.mark.parametrize("active_above", [None, 0.7])
@pytest.mark.parametrize("width", [32, 64])
def test_loss_and_gradient_of_a_whole_detector(active_above, width):
    teacher, student = tiny_fcos(seed=1, width=width).double().eval(), tiny_retinanet(seed=2).double()
    images, targets = float64_batch()
    method = FeatureImitation(3.0, active_above=active_above)
    distiller = Distiller(teacher, student, method)
    loss = distiller(images, targets)["kd_imitation"]
    maps = [features.detach().requires_grad_() for features in pyramid(student, images)]
    expected = 3 * sum(
        plain_loss(adapted(distiller, ours, level), theirs.detach(), active_above)
        for level, (ours, theirs) in enumerate(zip(maps, pyramid(teacher, images), strict=True))
    )
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    expected.backward()
    grown = pyramid(student, images)
    torch.autograd.backward(grown, [features.grad for features in maps])
    by_hand = student.backbone.stem[0][0].weight.grad.clone()
    student.zero_grad()
    loss.backward()
    torch.testing.assert_close(student.backbone.stem[0][0].weight.grad, by_hand, rtol=1e-8, atol=1e-12)


def test_without_a_block_equal_widths_are_compared_as_they_are():
    teacher, student = tiny_fcos(seed=1).double().eval(), tiny_retinanet(seed=2).double()
    images, targets = float64_batch()
    distiller = Distiller(teacher, student, FeatureImitation(adapt=False))
    assert list(distiller.methods.parameters()) == []
    maps = zip(pyramid(student, images), pyramid(teacher, images), strict=True)
    expected = sum(F.mse_loss(ours, theirs) for ours, theirs in maps)
    torch.testing.assert_close(distiller(images, targets)["kd_imitation"], expected, rtol=1e-9, atol=0)


def test_without_a_block_other_widths_are_projected():
    distiller = Distiller(tiny_fcos(width=64), tiny_retinanet(seed=2), FeatureImitation(adapt=False))
    (weight, *_) = distiller.methods["imitation"].projections["level0"].parameters()
    assert weight.shape == (64, 32, 1, 1)
    distiller(*tiny_batch())["kd_imitation"].backward()
    assert weight.grad.abs().sum() > 0


def test_blocks_are_of_the_chosen_levels_and_part_of_the_distiller_alone():
    student = tiny_retinanet(seed=2)
    keys = set(student.state_dict())
    distiller = Distiller(tiny_fcos(seed=1), student, FeatureImitation(levels=(0, 2)))
    added = {key for key in distiller.state_dict() if not key.startswith("student.")}
    assert added == {
        f"methods.imitation.projections.level{level}.{layer}.{kind}"
        for level in (0, 2)
        for layer in (0, 2)
        for kind in ("weight", "bias")
    }
    assert set(student.state_dict()) == keys


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_every_parameter_of_the_blocks_gets_a_gradient(labelled, empty):
    distiller = Distiller(tiny_fcos(seed=1), tiny_retinanet(seed=2), FeatureImitation())
    images, targets = tiny_batch()
    if empty:
        targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in images]
    losses = distiller(images, targets) if labelled else distiller(images)
    assert ("classification" in losses) == labelled
    losses["kd_imitation"].backward()
    assert all(parameter.grad is not None for parameter in distiller.methods.parameters())
    assert distiller.student.backbone.stem[0][0].weight.grad.abs().sum() > 0


def test_the_teacher_sees_images_of_its_own():
    teacher, student = tiny_fcos(seed=1), tiny_retinanet(seed=2)
    images, targets = tiny_batch()
    for target, image in zip(targets, images, strict=True):
        target["other"] = 1 - image

    def view(images, targets):
        return [target["other"] for target in targets]

    method = FeatureImitation(adapt=False)
    loss = Distiller(teacher, student, method, teacher_view=view)(images, targets)["kd_imitation"]
    teachers = pyramid(teacher.eval(), [target["other"] for target in targets])
    maps = zip(pyramid(student, images), teachers, strict=True)
    torch.testing.assert_close(loss, sum(F.mse_loss(ours, theirs) for ours, theirs in maps))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, "weight must be above 0, got 0"),
        ({"active_above": 1.5}, "active_above must be 0 to below 1, or None for all alike, got 1.5"),
        ({"inactive_weight": 2}, "inactive_weight must be 0 to 1, got 2"),
    ],
)
def test_error_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        FeatureImitation(**settings)


def test_printing_shows_the_settings():
    assert "adapt=True, active_above=0.1, inactive_weight=0.05" in repr(FeatureImitation(active_above=0.1))
    assert FeatureImitation().loss_names() == ("kd_imitation",)


def test_the_teachers_images_may_have_another_number_of_channels():
    sees_depth = tiny_fcos(seed=1, image_mean=[0.5] * 4, image_std=[0.5] * 4)
    first = sees_depth.backbone.stem[0][0]
    sees_depth.backbone.stem[0][0] = nn.Conv2d(4, first.out_channels, 3, stride=2, padding=1)
    images, targets = tiny_batch()

    def view(images, targets):
        return [torch.cat([image, image[:1]]) for image in images]

    student = tiny_retinanet(seed=2)
    losses = Distiller(sees_depth, student, FeatureImitation(), teacher_view=view)(images, targets)
    assert losses["kd_imitation"] > 0
