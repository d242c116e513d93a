"""The region around objects that LD distils besides the positive anchors."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crosskd.losses import valuable_region
from tests.helpers.plain_losses import areas
from tests.helpers.reference_files import load_parity

STRIDES = (8, 16, 32)


def squares(side: int = 64, size: int = 4) -> tuple[Tensor, list[int]]:
    """Anchors of some strides around each location of three levels, and how many each level has."""
    levels = []
    for stride in STRIDES:
        places = stride * torch.arange(side // stride).double()
        middles = torch.cartesian_prod(places, places).flip(-1)
        levels.append(torch.cat([middles - size * stride / 2, middles + size * stride / 2], dim=1))
    return torch.cat(levels), [len(level) for level in levels]


def region_by_hand(anchors: Tensor, boxes: Tensor, per_level: list[int], candidates: int = 9) -> list[float]:
    """The rule, anchor by anchor."""
    weights = [0.0] * len(anchors)
    listed = anchors.tolist()
    for box in boxes.tolist():
        rows = []
        for anchor in listed:
            inner, union, _ = areas(anchor, box)
            apart = [(anchor[k] + anchor[k + 2] - box[k] - box[k + 2]) / 2 for k in (0, 1)]
            corners = [max(anchor[k + 2], box[k + 2]) - min(anchor[k], box[k]) for k in (0, 1)]
            distance = math.hypot(*apart) ** 2
            rows.append((inner / union, distance, inner / union - distance / math.hypot(*corners) ** 2))
        start, overlaps = 0, []
        for count in per_level:
            nearest = sorted(rows[start : start + count], key=lambda row: row[1])[:candidates]
            overlaps += [row[0] for row in nearest]
            start += count
        threshold = statistics.mean(overlaps) + statistics.stdev(overlaps)
        for index, (overlap, _, with_distance) in enumerate(rows):
            if 0.25 * threshold <= with_distance < threshold:
                weights[index] = max(weights[index], overlap)
    return weights


def drawn(objects: int, side: float = 64) -> Tensor:
    corner = side * 0.7 * torch.rand(objects, 2).double()
    return torch.cat([corner, corner + 3 + side * 0.4 * torch.rand(objects, 2).double()], dim=1)


def test_published_weights():
    published = load_parity("methods.pt")["ld"]
    found = valuable_region(published["anchors"], published["gt_boxes"], published["anchors_per_level"])
    torch.testing.assert_close(found, published["vlr_iou"], rtol=1e-12, atol=0)
    both = published["positive"] & (found > 0)
    assert both.any()  # an anchor may be positive and in the region


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_it_is_the_rule_anchor_by_anchor(seed):
    torch.manual_seed(seed)
    anchors, per_level = squares(32)
    boxes = drawn(3, side=32)
    expected = torch.tensor(region_by_hand(anchors, boxes, per_level), dtype=torch.float64)
    torch.testing.assert_close(valuable_region(anchors, boxes, per_level), expected, rtol=1e-9, atol=0)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.floats(0.1, 10))
def test_the_unit_and_the_origin_do_not_matter(seed, scale):
    torch.manual_seed(seed)
    anchors, per_level = squares()
    boxes = drawn(2)
    moved = [scale * corners + 40 for corners in (anchors, boxes)]
    found, expected = valuable_region(*moved, per_level), valuable_region(anchors, boxes, per_level)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_of_several_objects_the_largest_overlap_counts():
    anchors, per_level = squares()
    boxes = drawn(4)
    alone = [valuable_region(anchors, box[None], per_level) for box in boxes]
    expected = torch.stack(alone).amax(dim=0)
    assert ((torch.stack(alone) > 0).sum(dim=0) > 1).any()
    assert torch.equal(valuable_region(anchors, boxes, per_level), expected)


def test_a_larger_fraction_and_fewer_candidates_change_the_region():
    anchors, per_level = squares()
    boxes = drawn(4)
    everything = valuable_region(anchors, boxes, per_level)
    inner = valuable_region(anchors, boxes, per_level, fraction=0.5)
    assert 0 < (inner > 0).sum() < (everything > 0).sum()
    assert (inner <= everything).all()
    expected = torch.tensor(region_by_hand(anchors, boxes, per_level, candidates=3), dtype=torch.float64)
    torch.testing.assert_close(valuable_region(anchors, boxes, per_level, candidates=3), expected)


def test_no_objects_and_no_anchors():
    anchors, per_level = squares()
    nothing = valuable_region(anchors, torch.zeros(0, 4), per_level)
    assert nothing.shape == (len(anchors),)
    assert not nothing.any()
    assert valuable_region(torch.zeros(0, 4), drawn(2), [0, 0]).shape == (0,)


def test_levels_with_few_anchors():
    """Coarse levels of small images have fewer than nine, and a level may have none."""
    anchors, boxes = squares(32)[0], drawn(2, side=32)
    expected = region_by_hand(anchors, boxes, [16, 4, 1])
    found = valuable_region(anchors, boxes, [16, 4, 1, 0])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    alone = valuable_region(anchors[:1], anchors[:1] + 2, [1])  # of one anchor there is no deviation
    assert alone.item() == pytest.approx(30**2 / (2 * 32**2 - 30**2))


def test_half_precision_is_calculated_in_float32():
    anchors, per_level = squares()
    boxes = drawn(2).round()
    found = valuable_region(anchors.half(), boxes.half(), per_level)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, valuable_region(anchors, boxes, per_level).float(), rtol=1e-5, atol=0)


def test_errors():
    anchors, per_level = squares()
    with pytest.raises(ValueError, match=r"must add up to the 84 anchors, got \[64, 16\]"):
        valuable_region(anchors, drawn(1), per_level[:2])
    with pytest.raises(ValueError, match=r"anchors must have shape .* xyxy in pixels, got \(84, 2\)"):
        valuable_region(anchors[:, :2], drawn(1), per_level)
    with pytest.raises(TypeError, match="boxes must hold floating-point numbers"):
        valuable_region(anchors, drawn(1).long(), per_level)
