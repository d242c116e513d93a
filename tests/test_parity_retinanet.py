"""RetinaNet's published numbers, through torchvision's own modules and the public Distiller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead

from crosskd.adapters import TorchvisionRetinaNet
from tests.helpers.published_heads import (
    ExactAnchors,
    FixedBackbone,
    FixedFeatures,
    distil,
    gradient_errors,
    rows,
)
from tests.helpers.reference_files import load_parity

CASES = [("retinanet_base.pt", 3), ("retinanet_position4.pt", 4)]


class FixedRetinaNetAdapter(FixedFeatures, TorchvisionRetinaNet):
    """The adapter, on fixed features."""


def published_to_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published head's parameters under the names of torchvision's modules."""
    renamed = {}
    for name, tensor in state.items():
        branch = "classification_head" if "cls" in name else "regression_head"
        if "_convs" in name:
            _, number, _, kind = name.split(".")
            renamed[f"{branch}.conv.{number}.0.{kind}"] = tensor
        else:
            predictor = "cls_logits" if "cls" in name else "bbox_reg"
            renamed[f"{branch}.{predictor}.{name.split('.')[-1]}"] = tensor
    return renamed


def build(case: dict[str, Any], side: str) -> RetinaNet:
    strides = case["strides"]
    sizes = tuple(tuple(4 * stride * 2 ** (octave / 3) for octave in range(3)) for stride in strides)
    head = RetinaNetHead(case["channels"], 9, case["num_classes"])
    head.load_state_dict(published_to_torchvision(case[f"{side}_head"]))
    height, width = case["image_size"]
    return RetinaNet(
        FixedBackbone(case[f"{side}_features"]),
        case["num_classes"],
        min_size=height,
        max_size=width,
        anchor_generator=ExactAnchors(strides, sizes, (0.5, 1.0, 2.0), offset=0.0),
        head=head,
    )


@pytest.fixture(params=CASES, ids=[name for name, _ in CASES])
def case(request) -> dict[str, Any]:
    name, position = request.param
    loaded = load_parity(name)
    assert loaded["position"] == position
    return loaded


def test_losses_agree(case):
    _, losses, _ = distil(case, build, FixedRetinaNetAdapter)
    expected = case["expected"]["losses"]
    assert losses["kd_cls"].item() == pytest.approx(expected["loss_cls_kd"], rel=1e-5)
    assert losses["kd_reg"].item() == pytest.approx(expected["loss_reg_kd"], rel=1e-5)


def test_gradient_at_the_students_features_agrees(case):
    distiller, losses, _ = distil(case, build, FixedRetinaNetAdapter, torch.float64)
    errors = gradient_errors(distiller, losses, case)
    # A level of six locations an image, nearly all of a channel cut off by the ReLU: a tiny deviation.
    assert errors.pop(3) < 1e-4
    assert max(errors) < 1e-5


def test_cross_head_and_teacher_predictions_agree(case):
    _, _, method = distil(case, build, FixedRetinaNetAdapter)
    for name, predictions in (
        ("cross_head", method.cross_head(method.step)),
        ("teacher", method.step.teacher.predictions),
    ):
        expected = case["expected"][name]
        logits, regression = rows(expected["logits"], case["num_classes"]), rows(expected["regression"], 4)
        torch.testing.assert_close(predictions.logits, logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(predictions.regression, regression, rtol=1e-4, atol=1e-4)


def one_image(case: dict[str, Any], index: int) -> dict[str, Any]:
    """The case with one of its images alone."""
    features = {
        key: [level[index : index + 1] for level in case[key]]
        for key in ("student_features", "teacher_features")
    }
    return {**case, **features, "targets": case["targets"][index : index + 1]}


def test_students_own_losses_agree(case):
    """Published losses are divided by the batch's positives, torchvision's by each image's own.

    So each image is run alone, where the two agree, and its share of the positives weighs it.
    """
    totals = dict.fromkeys(("classification", "bbox_regression"), 0.0)
    positives = 0.0
    for index in range(len(case["targets"])):
        _, losses, method = distil(one_image(case, index), build, FixedRetinaNetAdapter)
        count = method.step.assignment.normalizer.item()
        positives += count
        for name in totals:
            totals[name] += losses[name].item() * count
    expected = case["expected"]["losses"]
    assert totals["classification"] / positives == pytest.approx(expected["loss_cls"], rel=1e-5)
    assert totals["bbox_regression"] / positives == pytest.approx(expected["loss_bbox"], rel=1e-5)
