"""LD on a whole detector: the plain GFL, against a calculation of its own in float64."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from dense_heads import adapter_of
from torch import Tensor

from crosskd import LD, CrossKD, Distiller
from tests.examples.dense_heads.small import CLASSES, small
from tests.helpers.plain_losses import areas
from tests.helpers.slow_crosskd import assert_losses_and_gradients_agree, float64_batch, normalized
from tests.helpers.tiny import STRIDES

SIDE, ANCHOR_SCALE, BINS = 64, 4, 9


def anchors_by_level() -> list[list[list[float]]]:
    """Squares around each location of the three levels."""
    half = ANCHOR_SCALE / 2
    return [
        [
            [s * (column - half), s * (row - half), s * (column + half), s * (row + half)]
            for row in range(SIDE // s)
            for column in range(SIDE // s)
        ]
        for s in STRIDES
    ]


def middle(box: list[float]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def overlap(anchor: list[float], box: list[float]) -> tuple[float, float]:
    """IoU and DIoU."""
    inner, union, _ = areas(anchor, box)
    diagonal = math.hypot(*(max(anchor[k + 2], box[k + 2]) - min(anchor[k], box[k]) for k in (0, 1)))
    return inner / union, inner / union - (math.dist(middle(anchor), middle(box)) / diagonal) ** 2


def assigned(boxes: list[list[float]]) -> tuple[list[bool], list[float]]:
    """Which anchors are positive by ATSS, and the weight of each in the valuable region."""
    levels = anchors_by_level()
    listed = [anchor for level in levels for anchor in level]
    positive, region = [False] * len(listed), [0.0] * len(listed)
    for box in boxes:
        candidates, start = [], 0
        for level in levels:
            distances = [math.dist(middle(anchor), middle(box)) for anchor in level]
            order = sorted(range(len(level)), key=distances.__getitem__)
            candidates += [start + index for index in order[:9]]
            start += len(level)
        overlaps = [overlap(listed[index], box)[0] for index in candidates]
        threshold = statistics.mean(overlaps) + statistics.stdev(overlaps)
        for index, iou in zip(candidates, overlaps, strict=True):
            x, y = middle(listed[index])
            inside = box[0] < x < box[2] and box[1] < y < box[3]
            positive[index] = positive[index] or (iou >= threshold and inside)
        for index, anchor in enumerate(listed):
            iou, with_distance = overlap(anchor, box)
            if 0.25 * threshold <= with_distance < threshold:
                region[index] = max(region[index], iou)
    return positive, region


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Of one row, times the squared temperature, over the number of its numbers."""
    powers = [(row / temperature).exp() for row in (teacher, student)]
    wanted, found = (p / p.sum() for p in powers)
    return temperature**2 * (wanted * (wanted / found).log()).sum() / len(student)


def losses_by_hand(distiller: Distiller, images: Any, targets: Any, reduction: str) -> dict[str, Tensor]:
    outputs = []
    for detector in (distiller.student, distiller.teacher):
        maps = list(detector.backbone(normalized(detector, images)).values())
        outputs.append(detector.head(maps))
    (logits, sides, _), (wanted_logits, wanted_sides, _) = outputs
    main, region, main_amount, region_amount = 0.0, 0.0, 0.0, 0.0
    classes: list[list[Tensor]] = [[], [], []]
    level_of = [level for level, s in enumerate(STRIDES) for _ in range((SIDE // s) ** 2)]
    for image, target in enumerate(targets):
        positive, weights = assigned(target["boxes"].tolist())
        for index, weight in enumerate(weights):
            if not positive[index] and not weight:
                continue
            pairs = zip(sides[image, index], wanted_sides[image, index], strict=True)
            of_sides = sum(divergence(ours, theirs, 10.0) for ours, theirs in pairs)
            region = region + weight * of_sides
            region_amount += weight
            if positive[index]:
                sure = 1 / (1 + math.exp(-max(logits[image, index].tolist())))
                main = main + sure * of_sides
                main_amount += sure
                both = (logits[image, index], wanted_logits[image, index])
                classes[level_of[index]].append(divergence(*both, 2.0))
    if reduction == "sum":
        averaged = sum(torch.stack(of_level).mean() for of_level in classes if of_level)
        return {"kd_ld_main": main / 16, "kd_ld_region": region / 64, "kd_ld_cls": 10 * averaged}
    everywhere = torch.stack([row for of_level in classes for row in of_level]).mean()
    return {
        "kd_ld_main": 15 * main / (4 * main_amount),
        "kd_ld_region": 25 * region / (4 * region_amount),
        "kd_ld_cls": 50 * CLASSES / 80 * everywhere,
    }


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_losses_and_gradients_of_a_whole_detector(reduction):
    options = {"reg_max": BINS - 1, "blocks": 1}
    teacher, student = (small("gfl", seed=seed, **options).double() for seed in (1, 2))
    distiller = Distiller(teacher, student, LD(reduction=reduction), adapter_of)
    images, targets = float64_batch()
    losses = distiller(images, targets)
    expected = losses_by_hand(distiller, images, targets, reduction)
    assert_losses_and_gradients_agree(distiller, losses, expected)


def test_the_padding_of_smaller_images_is_nobodys_nearest():
    """An image gives the same region alone and beside a larger one."""
    teacher, student = (small("gfl", seed=seed) for seed in (1, 2))
    images, targets = float64_batch(batch=1)
    image, target = images[0].float(), {**targets[0], "boxes": targets[0]["boxes"].float()}
    regions = []
    for batch in ([image], [image, torch.rand(3, 64, 120)]):
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        seen: list[Tensor] = []

        class Watching(LD):
            def _region(self, step):
                region, sizes = super()._region(step), step.student.anchors.per_level
                counted = step.assignment.label_weights[0] > 0
                assert counted.all() == (len(step.objects) == 1)
                assert sum(sizes) == region.shape[1]
                seen.append(region[0][counted])  # noqa: B023
                return region

        distiller = Distiller(teacher, student, Watching(), adapter_of)
        distiller(batch, [target, nothing][: len(batch)])
        regions.append(seen[0])
    assert regions[0].any()
    torch.testing.assert_close(*regions, rtol=0, atol=0)


def test_unlabelled_images():
    teacher, student = (small("gfl", seed=seed) for seed in (1, 2))
    torch.nn.init.zeros_(teacher.head.logits.bias)  # sure of something
    distiller = Distiller(teacher, student, LD(), adapter_of)
    losses = distiller([torch.rand(3, 64, 64), torch.rand(3, 64, 96)])
    assert set(losses) == {"kd_ld_main", "kd_ld_region", "kd_ld_cls"}
    assert all(loss > 0 for loss in losses.values())


def test_it_warns_beside_crosskd():
    teacher, student = (small("gfl", seed=seed) for seed in (1, 2))
    with pytest.warns(UserWarning, match="ld pulls the student's own predictions .* crosskd exists"):
        Distiller(teacher, student, [CrossKD(), LD()], adapter_of)
