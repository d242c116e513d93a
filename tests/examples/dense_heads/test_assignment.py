"""Adaptive training sample selection against slow loops over boxes, levels and anchors."""

from __future__ import annotations

import statistics

import pytest
import torch
from dense_heads.assignment import BACKGROUND, assign
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples.dense_heads.small import grid_of, random_boxes, small


def overlap(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return intersection / (areas - intersection)


def center(box: list[float]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def slow(anchors: torch.Tensor, level_sizes: list[int], boxes: torch.Tensor, top: int) -> list[int]:
    """The definition, step by step: section 3.2 of the paper."""
    rows = anchors.double().tolist()
    best = [(0.0, BACKGROUND)] * len(rows)
    for number, box in enumerate(boxes.double().tolist()):
        (x, y), candidates, start = center(box), [], 0
        for size in level_sizes:
            level = range(start, start + size)
            level = sorted(level, key=lambda i: (center(rows[i])[0] - x) ** 2 + (center(rows[i])[1] - y) ** 2)
            candidates += level[:top]
            start += size
        overlaps = [overlap(rows[i], box) for i in candidates]
        threshold = statistics.mean(overlaps) + statistics.stdev(overlaps)
        for index, value in zip(candidates, overlaps, strict=True):
            px, py = center(rows[index])
            inside = min(px - box[0], py - box[1], box[2] - px, box[3] - py) > 0.01
            if value >= threshold and inside and value > best[index][0]:
                best[index] = (value, number)
    return [number for _, number in best]


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_agrees_with_the_definition(seed, count, top):
    grid = grid_of(small("gfl"), (64, 96))
    boxes = random_boxes(count, 64, seed)
    found = assign(grid.anchors, grid.level_sizes, boxes, top)
    assert found.tolist() == slow(grid.anchors, grid.level_sizes, boxes, top)


def test_an_object_on_an_anchor_takes_that_anchor():
    grid = grid_of(small("gfl"), (64, 64))
    matches = assign(grid.anchors, grid.level_sizes, grid.anchors[[27, 70]])
    assert matches[27] == 0
    assert matches[70] == 1


@pytest.mark.parametrize("count", [0, 1])
def test_images_with_fewer_locations_than_candidates(count):
    anchors = torch.tensor([[0.0, 0, 32, 32], [0, 0, 64, 64]])
    matches = assign(anchors, [1, 1], torch.tensor([[2.0, 2, 40, 40]])[:count])
    assert matches.shape == (2,)
    assert matches.dtype == torch.int64
    if not count:
        assert matches.tolist() == [BACKGROUND, BACKGROUND]
