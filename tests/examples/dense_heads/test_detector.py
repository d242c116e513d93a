"""Anchors, matches, losses and detections of the plain detectors."""

from __future__ import annotations

import math

import pytest
import torch
from dense_heads.assignment import BACKGROUND
from dense_heads.atss import centerness_of, moved
from dense_heads.detector import OUTSIDE, Outputs
from dense_heads.gfl import boxes_around, distribution_focal_loss, paired_iou, quality_focal_loss
from torch.nn import functional as F
from torchvision.ops import box_iou

from tests.examples.dense_heads.small import (
    CLASSES,
    FAMILIES,
    batch_with_and_without_objects,
    grid_of,
    random_boxes,
    small,
)
from tests.helpers.tiny import STRIDES, tiny_batch

families = pytest.mark.parametrize("family", FAMILIES)


# -- anchors --------------------------------------------------------------------------------------


def test_anchors_stand_on_corners_and_are_squares_of_so_many_strides():
    grid = grid_of(small("gfl", anchor_scale=3.0), (64, 96))
    assert grid.level_sizes == [8 * 12, 4 * 6, 2 * 3]
    assert grid.anchors[0].tolist() == [-12, -12, 12, 12]
    assert grid.centers[1].tolist() == [8, 0]
    assert grid.centers[12].tolist() == [0, 8]
    assert grid.centers[-1].tolist() == [64, 32]
    assert grid.anchors[-1].tolist() == [64 - 48, 32 - 48, 64 + 48, 32 + 48]
    assert grid.strides[[0, 96, 120]].tolist() == [8, 16, 32]


def test_an_image_counts_up_to_the_size_that_it_would_be_padded_to_alone():
    detector = small("gfl")
    grid = grid_of(detector, (64, 70), (64, 128))
    # 70 pixels are padded to 96, whose last location at stride 8 is at 88.
    inside = grid.inside[0]
    assert grid.centers[inside][:, 0].max() == 88
    assert grid.centers[~inside][:, 0].min() == 96
    assert grid.inside[1].all()
    targets = [{"boxes": random_boxes(3, 64), "labels": torch.zeros(3, dtype=torch.int64)}] * 2
    matches = detector.match(grid, targets)
    assert ((matches == OUTSIDE) == ~grid.inside).all()
    assert (matches[0] >= 0).any()
    alone = detector.match(grid_of(detector, (64, 96)), targets[:1])
    assert sorted(matches[0][inside].tolist()) == sorted(alone[0].tolist())


def test_feature_maps_of_other_strides_are_refused():
    detector = small("gfl", strides=(4, 16, 32))
    images, targets = tiny_batch()
    with pytest.raises(ValueError, match=r"strides \(4, 16, 32\) need feature maps of \[\(16, 16\)"):
        detector(images, targets)


def test_positives_carry_the_object_of_their_own_image():
    targets = [
        {"boxes": random_boxes(2, 64, 1), "labels": torch.tensor([3, 1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
        {"boxes": random_boxes(1, 64, 2), "labels": torch.tensor([2])},
    ]
    matches = torch.tensor([[1, BACKGROUND, 0], [OUTSIDE] * 3, [BACKGROUND, BACKGROUND, 0]])
    image, anchor, labels, boxes = small("gfl").positives(matches, targets)
    assert image.tolist() == [0, 0, 2]
    assert anchor.tolist() == [0, 2, 2]
    assert labels.tolist() == [1, 3, 2]
    assert torch.equal(boxes, torch.stack([*targets[0]["boxes"].flip(0), targets[2]["boxes"][0]]))
    assert small("gfl").normalizer(matches) == 4  # 2, an image without positives as 1, 1


# -- boxes ----------------------------------------------------------------------------------------


def test_gfl_decodes_the_expectation_in_strides():
    detector = small("gfl", reg_max=4)
    grid = grid_of(detector, (32, 32))
    regression = torch.full((1, len(grid.anchors), 4, 5), -50.0)
    regression[..., 2] = 0.0  # all of it in bin 2
    regression[:, :, 3, 3] = 0.0  # the bottom is halfway between 2 and 3
    boxes = detector.decode(regression, grid)[0]
    distances = torch.tensor([-2.0, -2.0, 2.0, 2.5]) * grid.strides[:, None]
    torch.testing.assert_close(boxes, grid.centers.repeat(1, 2) + distances)


def test_atss_decodes_shift_and_growth():
    anchors = torch.tensor([[0.0, 0, 10, 20]])
    # A tenth of the side a unit, a fifth of the logarithm: the centre moves by (1, -4), the width doubles.
    deltas = torch.tensor([[1.0, -2.0, 5 * math.log(2), 0.0]])
    torch.testing.assert_close(moved(anchors, deltas), torch.tensor([[-4.0, -4.0, 16.0, 16.0]]))
    huge = moved(anchors, torch.tensor([[0.0, 0, 1e4, -1e4]]))
    torch.testing.assert_close(huge[0, 2] - huge[0, 0], torch.tensor(10 * 62.5))
    torch.testing.assert_close(huge[0, 3] - huge[0, 1], torch.tensor(20 / 62.5))


def test_centerness_is_1_in_the_middle_and_0_at_a_side():
    boxes = torch.tensor([[0.0, 0, 8, 4]]).expand(3, 4)
    points = torch.tensor([[4.0, 2], [2, 2], [0, 2]])
    torch.testing.assert_close(centerness_of(points, boxes), torch.tensor([1.0, (1 / 3) ** 0.5, 0.0]))


def test_paired_iou_is_the_diagonal_of_all_pairs():
    boxes, others = random_boxes(20, 64, 1), random_boxes(20, 64, 2)
    torch.testing.assert_close(paired_iou(boxes, others), box_iou(boxes, others).diagonal())


# -- losses ---------------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cross_entropy(logit: float, target: float) -> float:
    p = sigmoid(logit)
    return -(target * math.log(p) + (1 - target) * math.log(1 - p))


def giou_loss(a: list[float], b: list[float]) -> float:
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    width, height = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
    intersection = max(0, width) * max(0, height)
    union = sum(areas) - intersection
    hull = math.prod(max(a[k + 2], b[k + 2]) - min(a[k], b[k]) for k in (0, 1))
    return 1 - intersection / union + (hull - union) / hull


def case(family: str):
    """Random outputs in float64, matches with all kinds of anchors, targets."""
    generator = torch.Generator().manual_seed(1)
    detector = small(family)
    grid = grid_of(detector, (64, 40), (64, 96))
    targets = [{"boxes": random_boxes(3, 60, seed), "labels": torch.tensor([0, 3, 1])} for seed in (3, 4)]
    batch, anchors = grid.inside.shape

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    regression = random(batch, anchors, 4, 17) if family == "gfl" else random(batch, anchors, 4)
    centerness = random(batch, anchors) if family == "atss" else None
    outputs = Outputs(random(batch, anchors, CLASSES) - 1, regression, centerness)
    matches = detector.match(grid, targets)
    assert {OUTSIDE, BACKGROUND, 0, 1, 2} <= set(matches.unique().tolist())
    return detector, outputs, grid, matches, targets


def as_loops(family: str, outputs: Outputs, grid, matches, targets, decoded) -> dict[str, float]:
    """The losses anchor by anchor, as the papers have them."""
    classification, boxes, third, total = 0.0, 0.0, 0.0, 0.0
    positives = 0
    for image, target in enumerate(targets):
        positives += max(1, int((matches[image] >= 0).sum()))
        for anchor, match in enumerate(matches[image].tolist()):
            if match == OUTSIDE:
                continue
            logits = outputs.logits[image, anchor].tolist()
            wanted = [0.0] * len(logits)
            if match >= 0:
                box, own = target["boxes"][match].tolist(), decoded[image, anchor].tolist()
                x, y = grid.centers[anchor].tolist()
                sides = [x - box[0], y - box[1], box[2] - x, box[3] - y]
                if family == "gfl":
                    wanted[target["labels"][match]] = box_iou(
                        decoded[image, anchor][None], target["boxes"][match][None].double()
                    ).item()
                    weight = sigmoid(max(logits))
                    stride = grid.strides[anchor].item()
                    for side, distance in enumerate(sides):
                        wished = min(max(distance / stride, 0), 15.9)
                        log_p = outputs.regression[image, anchor, side].log_softmax(0).tolist()
                        low = int(wished)
                        loss = (low + 1 - wished) * log_p[low] + (wished - low) * log_p[low + 1]
                        third -= weight * loss / 4
                else:
                    wanted[target["labels"][match]] = 1.0
                    ratios = [min(p) / max(p) for p in ((sides[0], sides[2]), (sides[1], sides[3]))]
                    weight = math.sqrt(math.prod(ratios))
                    third += cross_entropy(outputs.centerness[image, anchor].item(), weight)
                boxes += weight * giou_loss(own, box)
                total += weight
            for logit, y in zip(logits, wanted, strict=True):
                p = sigmoid(logit)
                if family == "gfl":
                    classification += (p - y) ** 2 * cross_entropy(logit, y)
                else:
                    alpha, distance = (0.25, 1 - p) if y else (0.75, p)
                    classification += alpha * distance**2 * cross_entropy(logit, y)
    total = max(total, 1.0)
    losses = {"classification": classification / positives, "bbox_regression": 2 * boxes / total}
    if family == "gfl":
        return {**losses, "distribution": 0.25 * third / total}
    return {**losses, "bbox_ctrness": third / positives}


@families
def test_losses_agree_with_slow_loops(family):
    detector, outputs, grid, matches, targets = case(family)
    losses = detector.losses(outputs, grid, matches, targets)
    expected = as_loops(family, outputs, grid, matches, targets, detector.decode(outputs.regression, grid))
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-6), name


def test_quality_focal_loss_has_its_gradient_and_is_0_at_the_quality():
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    qualities = torch.rand(6, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: quality_focal_loss(x, qualities), logits)
    assert quality_focal_loss(qualities.logit(), qualities).abs().max() < 1e-12


def test_distribution_focal_loss_has_its_gradient_and_prefers_the_two_bins_around():
    sides = torch.randn(5, 4, 9, dtype=torch.float64, requires_grad=True)
    distances = torch.rand(5, 4, dtype=torch.float64) * 7.9
    assert torch.autograd.gradcheck(lambda x: distribution_focal_loss(x, distances), sides)
    sure = torch.full((1, 1, 9), -30.0)
    sure[..., 3], sure[..., 4] = math.log(0.75), math.log(0.25)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert distribution_focal_loss(sure, torch.tensor([[3.25]])).item() == pytest.approx(entropy)


# -- the detector ---------------------------------------------------------------------------------


@families
def test_training_gives_losses_that_reach_every_parameter(family):
    detector = small(family)
    losses = detector(*batch_with_and_without_objects())
    assert all(loss.ndim == 0 and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        # A level without a positive anchor has nothing to scale.
        assert parameter.grad.abs().sum() > 0 or "scales" in name, name


@families
def test_a_batch_without_objects_teaches_background(family):
    images, targets = batch_with_and_without_objects()
    losses = small(family)(images[1:], targets[1:])
    assert losses["classification"] > 0
    assert [loss.item() for name, loss in losses.items() if name != "classification"] == [0.0, 0.0]
    sum(losses.values()).backward()


@families
def test_losses_fall(family):
    images, targets = tiny_batch()
    detector = small(family)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    totals = []
    for _ in range(25):
        total = sum(detector(images, targets).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.6 * totals[0]


def test_targets_are_needed_in_training():
    with pytest.raises(ValueError, match="targets are needed in training"):
        small("gfl")([torch.rand(3, 64, 64)])


def slow_detections(boxes, scores, centerness, size, levels, detector):
    """Thresholds, the best of each level, greedy suppression by class: one box at a time."""
    candidates, start = [], 0
    for count in levels:
        level = [
            (scores[a, c].item(), a, c)
            for a in range(start, start + count)
            for c in range(scores.shape[1])
            if scores[a, c] > detector.score_thresh
        ]
        candidates += sorted(level, reverse=True)[: detector.topk_candidates]
        start += count
    found = []
    for score, anchor, label in candidates:
        box = [
            min(max(value, 0.0), float(limit))
            for value, limit in zip(boxes[anchor].tolist(), (size[1], size[0]) * 2, strict=True)
        ]
        if box[2] > box[0] and box[3] > box[1]:
            factor = 1.0 if centerness is None else centerness[anchor].item()
            found.append((score * factor, label, box))
    kept: list[tuple[float, int, list[float]]] = []
    for candidate in sorted(found, reverse=True):
        rivals = [torch.tensor([k[2]]) for k in kept if k[1] == candidate[1]]
        if all(box_iou(torch.tensor([candidate[2]]), r).item() <= detector.nms_thresh for r in rivals):
            kept.append(candidate)
    return kept[: detector.detections_per_img]


@families
@torch.no_grad()
def test_detections_agree_with_slow_loops(family):
    detector = small(family, score_thresh=0.2, topk_candidates=60, detections_per_img=40).eval()
    size = (64, 90)
    grid = grid_of(detector, size)
    features = [torch.randn(1, 32, 64 // s, 96 // s) for s in STRIDES]
    outputs = detector.head(features)
    (found,) = detector.detections(outputs, grid, [size])
    centerness = None if outputs.centerness is None else outputs.centerness[0].sigmoid()
    boxes, scores = detector.decode(outputs.regression, grid)[0], outputs.logits[0].sigmoid()
    expected = slow_detections(boxes, scores, centerness, size, grid.level_sizes, detector)
    assert 5 < len(expected) <= 40
    assert found["labels"].tolist() == [label for _, label, _ in expected]
    torch.testing.assert_close(found["scores"], torch.tensor([score for score, _, _ in expected]))
    torch.testing.assert_close(found["boxes"], torch.tensor([box for _, _, box in expected]))


@families
@torch.no_grad()
def test_detections_are_in_the_pixels_that_were_given(family):
    detector = small(family, score_thresh=0.1).eval()
    images = [torch.rand(3, 128, 160), torch.rand(3, 64, 64)]
    for image, found in zip(images, detector(images), strict=True):
        height, width = image.shape[1:]
        assert len(found["boxes"]) > 0
        assert found["boxes"][:, [2, 3]].amax(0).le(torch.tensor([width, height])).all()
        assert found["boxes"].min() >= 0
        assert (found["scores"][:-1] >= found["scores"][1:]).all()
    larger = detector(images[:1])[0]["boxes"]
    half = F.interpolate(images[0][None], scale_factor=0.5, mode="bilinear")[0]
    smaller = detector([half])
    torch.testing.assert_close(larger, smaller[0]["boxes"] * 2, rtol=1e-3, atol=1e-2)


@torch.no_grad()
def test_nothing_is_found_where_nothing_is_sure():
    (found,) = small("atss", score_thresh=0.999).eval()([torch.rand(3, 64, 64)])
    assert found["boxes"].shape == (0, 4)
    assert found["scores"].shape == found["labels"].shape == (0,)


def test_half_precision_is_widened_for_losses_and_boxes():
    detector = small("gfl")
    images, targets = batch_with_and_without_objects()
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(images, targets)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


def test_boxes_around_points():
    points, distances = torch.tensor([[5.0, 6.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert boxes_around(points, distances).tolist() == [[4.0, 4.0, 8.0, 10.0]]
