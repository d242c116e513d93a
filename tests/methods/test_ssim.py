"""StructuralKD: feature maps that look alike, level by level."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from crosskd import Distiller, StructuralKD
from tests.helpers.slow_crosskd import float64_batch
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet
from tests.losses.test_ssim import mirrored


def plain_scaled(features: Tensor, minmax: str) -> Tensor:
    result = []
    for image, channel in product(range(features.shape[0]), range(features.shape[1])):
        among = {
            "channel": features[image, channel],
            "batch": features[:, channel],
            "map": features[image],
            "all": features,
        }[minmax]
        result.append((features[image, channel] - among.min()) / (among.max() - among.min()))
    return torch.stack(result)  # (images x channels, height, width)


def plain_loss(student: Tensor, teacher: Tensor, window_size: int, sigma: float) -> Tensor:
    """Location by location, of maps (any, height, width) that are mirrored at their border."""
    height, width = student.shape[1:]
    offsets = range(-(window_size // 2), window_size // 2 + 1)
    total = student.new_zeros(())
    for row, column in product(range(height), range(width)):
        weights = student.new_zeros(height, width)
        for down, right in product(offsets, offsets):
            cell = mirrored(row + down, height), mirrored(column + right, width)
            weights[cell] += math.exp(-(down**2 + right**2) / (2 * sigma**2))
        weights = weights / weights.sum()
        mean_s, mean_t = ((weights * of).sum(dim=(1, 2)) for of in (student, teacher))
        off_s, off_t = student - mean_s[:, None, None], teacher - mean_t[:, None, None]
        var_s, var_t, both = ((weights * of).sum(dim=(1, 2)) for of in (off_s**2, off_t**2, off_s * off_t))
        luminance = (2 * mean_s * mean_t + 0.01**2) / (mean_s**2 + mean_t**2 + 0.01**2)
        structure = (2 * both + 0.03**2) / (var_s + var_t + 0.03**2)
        total = total + ((1 - luminance * structure) / 2).sum()
    return total / student.numel()


def pyramid(detector: nn.Module, images: list[Tensor]) -> list[Tensor]:
    return list(detector.backbone(detector.transform(images)[0].tensors).values())


@pytest.mark.parametrize(
    ("settings", "weight"),
    [
        ({"minmax": "channel"}, 4),
        ({"minmax": "batch", "weight": 0.5, "levels": (1,)}, 0.5),
        ({"minmax": "map", "window_size": 3, "sigma": 0.8}, 4),
        ({"minmax": "all"}, 4),
    ],
)
def test_feature_maps_of_a_whole_detector(settings, weight):
    """Levels of 8 x 8, 4 x 4 and 2 x 2 cells, smaller than the window."""
    teacher, student = tiny_fcos(seed=1).double().eval(), tiny_retinanet(seed=2).double()
    images, targets = float64_batch()
    losses = Distiller(teacher, student, StructuralKD(**settings))(images, targets)
    assert set(losses) == {"classification", "bbox_regression", "kd_ssim"}
    ours, theirs = pyramid(student, images), pyramid(teacher, images)
    expected = torch.zeros((), dtype=torch.float64)
    for level in settings.get("levels", range(3)):
        maps = (plain_scaled(of[level], settings["minmax"]) for of in (ours, theirs))
        window = settings.get("window_size", 11), settings.get("sigma", 1.5)
        expected = expected + weight * plain_loss(*maps, *window)
    torch.testing.assert_close(losses["kd_ssim"], expected, rtol=1e-9, atol=0)
    for level in settings.get("levels", range(3)):
        lateral = student.backbone.laterals[level].weight
        found, wanted = (
            torch.autograd.grad(of, lateral, retain_graph=True)[0] for of in (losses["kd_ssim"], expected)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8 * wanted.abs().max().item())


def test_unlabelled_images_and_images_without_objects():
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), StructuralKD())
    images, targets = tiny_batch()
    labelled = distiller(images, targets)["kd_ssim"]
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)} for _ in targets]
    assert torch.equal(distiller(images, empty)["kd_ssim"], labelled)
    assert torch.equal(distiller(images)["kd_ssim"], labelled)


def test_projections_belong_to_the_distiller_and_get_gradients():
    """At an image of 32 pixels, whose coarsest level is a single location, as well."""
    student = tiny_retinanet(width=32, seed=2, side=32)
    distiller = Distiller(tiny_fcos(width=64, seed=1, side=32), student, StructuralKD())
    added = {key for key in distiller.state_dict() if not key.startswith("student.")}
    assert len(added) == 6
    assert not any("projection" in key for key in student.state_dict())
    distiller(*tiny_batch(side=32))["kd_ssim"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.methods["ssim"].parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, "weight must be above 0, got 0"),
        ({"window_size": 10}, "window_size must be an odd number of cells, 1 or more, got 10"),
        ({"sigma": -1.0}, "sigma must be above 0, got -1.0"),
        ({"minmax": "image"}, "minmax must be one of 'channel', 'batch', 'map', 'all', got 'image'"),
        ({"levels": ()}, "levels is empty"),
    ],
)
def test_error_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        StructuralKD(**settings)
