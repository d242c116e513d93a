"""GFL's published numbers, through the public protocol: distributions, and a norm in the towers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_heads import GFL, GFLAdapter
from dense_heads.mmdet_weights import mmdet_name
from torch import Tensor

from crosskd import Distiller
from tests.helpers.published_heads import FixedBackbone, Watched, distil, gradient_errors, rows
from tests.helpers.reference_files import load_parity

CASES = [("gfl_base.pt", 3), ("gfl_position0.pt", 0)]


def published(case: dict[str, Any], side: str) -> GFL:
    """A detector with a published head, on the feature maps that the numbers were computed from."""
    backbone = FixedBackbone(case[f"{side}_features"])
    state = {f"bbox_head.{name}": value for name, value in case[f"{side}_head"].items()}
    classes = len(state["bbox_head.gfl_cls.bias"])
    shorter, longer = sorted(case["image_size"])
    detector = GFL(backbone, classes, strides=case["strides"], min_size=shorter, max_size=longer)
    own = detector.head.state_dict(prefix="head.")
    detector.load_state_dict({key: state[mmdet_name(key, "gfl")] for key in own}, strict=False)
    return detector


@pytest.fixture(params=CASES, ids=[name for name, _ in CASES])
def case(request) -> dict[str, Any]:
    name, position = request.param
    loaded = load_parity(name)
    assert loaded["position"] == position
    return loaded


def step_of(
    case: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[Distiller, dict[str, Tensor], Watched]:
    return distil(case, published, GFLAdapter, dtype)


def test_losses_agree(case):
    _, losses, _ = step_of(case)
    names = {"kd_cls": "loss_cls_kd", "kd_reg": "loss_reg_kd"}
    names |= {"classification": "loss_cls", "bbox_regression": "loss_bbox", "distribution": "loss_dfl"}
    assert losses.keys() == names.keys()
    for name, published_name in names.items():
        assert losses[name].item() == pytest.approx(case["expected"]["losses"][published_name], rel=1e-4)


def test_gradient_at_the_students_features_agrees(case):
    distiller, losses, _ = step_of(case, torch.float64)
    *larger, smallest = gradient_errors(distiller, losses, case)
    assert max(larger) < 1e-5
    # The last level has two locations an image: its deviation, and what it divides, is less precise.
    assert smallest < 1e-3


@pytest.mark.parametrize("side", ["teacher", "cross_head"])
def test_predictions_agree(case, side):
    _, _, method = step_of(case)
    found = method.step.teacher.predictions if side == "teacher" else method.cross_head(method.step)
    expected = case["expected"][side]
    logits, regression = rows(expected["logits"], found.logits.shape[-1]), rows(expected["regression"], 68)
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.regression.flatten(2), regression, rtol=1e-4, atol=1e-4)
