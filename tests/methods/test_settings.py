"""The published settings, as the paper and its results state them, and what holds for other heads."""

from __future__ import annotations

import pytest
from torch import nn

from crosskd.methods.settings import OTHER, OTHER_DISTRIBUTIONS, SETTINGS, settings_for
from crosskd.towers import Branch, Tower
from tests.helpers.steps import PlainHead


@pytest.mark.parametrize(
    ("head_type", "position", "cls_weight", "reg_weight", "regression", "quality_weight"),
    [
        ("GFL", 3, 1.0, 4.0, "distribution_kl", 0.0),
        ("RetinaNet", 3, 1.0, 1.0, "giou", 0.0),
        ("ATSS", 3, 1.0, 1.0, "giou", 1.0),
        ("FCOS", 2, 0.4, 0.75, "log_iou", 0.0),
    ],
)
def test_published_settings(head_type, position, cls_weight, reg_weight, regression, quality_weight):
    settings = settings_for(PlainHead(head_type=head_type))
    assert settings.published
    assert settings.position == position
    assert (settings.cls_weight, settings.reg_weight) == (cls_weight, reg_weight)
    assert settings.regression == regression
    assert settings.quality_weight == quality_weight


def test_what_is_ours_is_not_called_published():
    published = {head_type for head_type, settings in SETTINGS.items() if settings.published}
    assert published == {"GFL", "RetinaNet", "ATSS", "FCOS"}


def blocks(count: int) -> Branch:
    layers = [layer for _ in range(count) for layer in (nn.Conv2d(4, 4, 1), nn.ReLU())]
    return Branch("both", (Tower.of(layers, "tower", width_in=4),), {})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, OTHER),
        ({"bins": 8}, OTHER),
        ({"bins": 8, "decodes": False}, OTHER_DISTRIBUTIONS),
        ({"decodes": False}, OTHER),
    ],
)
def test_heads_of_other_types(fields, expected):
    head = PlainHead([blocks(2), blocks(3)], **fields)
    assert settings_for(head) == expected
    shortest = settings_for(PlainHead([blocks(2), blocks(0)], **fields))
    assert shortest.position == 0
    assert (shortest.cls_weight, shortest.reg_weight) == (expected.cls_weight, expected.reg_weight)
    assert shortest.regression == expected.regression
