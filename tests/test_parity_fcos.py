"""FCOS's published numbers, as far as torchvision's definition of the head allows.

The published head and torchvision's share their towers, their classification and, once anchors are
handed in (points at half strides, no centre sampling), their label assignment. So the following is
comparable, and compared, through the unchanged adapter: the logits of teacher and cross-head, ``kd_cls``
with its normaliser (the sum of the positives' centerness targets), the student's own classification
loss, and the regression towers up to the last convolution's output.

What isn't: the published head regresses ``exp(scale * output)`` pixels where torchvision has
``relu(output)`` strides, and predicts centerness from the classification tower where torchvision has the
regression tower. Boxes, ``kd_reg``, and the student's losses of boxes (IoU weighted by centerness, or
GIoU) and of centerness therefore differ by definition. To check the method itself on them,
`PublishedFCOSAdapter` runs the published predictors and box coding behind torchvision's towers: under it
``kd_reg``, all predictions, the centerness loss and the gradient at the student's features are the
published ones. The detector's own forward isn't, so it is not compared (``prove=False``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.fcos import FCOSHead

from crosskd.adapters import TorchvisionFCOS
from crosskd.predictions import Predictions
from tests.helpers.published_heads import (
    ExactAnchors,
    FixedBackbone,
    FixedFeatures,
    distil,
    gradient_errors,
    rows,
)
from tests.helpers.reference_files import load_parity


class FixedFCOSAdapter(FixedFeatures, TorchvisionFCOS):
    """The adapter, on fixed features."""


class PublishedHead(FixedFCOSAdapter.head):
    """The published predictors and box coding behind torchvision's towers."""

    def predict(self, level, towers):
        detector, classification = self.detector, towers["classification"]
        logits = detector.head.classification_head.cls_logits(classification)
        sides = detector.head.regression_head.bbox_reg(towers["regression"])
        sides = (detector.published_scales[level] * sides).exp()
        centerness = detector.published_centerness(classification)
        quality = rows([centerness], 1).squeeze(2)
        return Predictions(rows([logits], logits.shape[1]), rows([sides], 4), quality)

    def decode(self, predictions, anchors):
        points = (anchors.boxes[:, :2] + anchors.boxes[:, 2:]) / 2
        left_top, right_bottom = predictions.regression.split(2, dim=-1)
        return torch.cat([points - left_top, points + right_bottom], dim=-1)


class PublishedFCOSAdapter(FixedFCOSAdapter):
    """The adapter with that head."""

    head = PublishedHead


def published_to_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published head's towers and predictors under the names of torchvision's modules.

    torchvision predicts centerness from another tower: that predictor is left out.
    """
    predictors = {"conv_cls": "classification_head.cls_logits", "conv_reg": "regression_head.bbox_reg"}
    renamed = {}
    for name, tensor in state.items():
        part, *middle, kind = name.split(".")
        if part in predictors:
            renamed[f"{predictors[part]}.{kind}"] = tensor
        elif part in ("cls_convs", "reg_convs"):
            branch = "classification_head" if part == "cls_convs" else "regression_head"
            number, layer = middle
            module = f"{branch}.conv.{3 * int(number) + (layer == 'gn')}"
            renamed[f"{module}.{kind}"] = tensor
            if layer == "conv":
                renamed[f"{module}.bias"] = torch.zeros(len(tensor))  # the published ones have no bias
    return renamed


def build(case: dict[str, Any], side: str) -> FCOS:
    strides, state = case["strides"], case[f"{side}_head"]
    head = FCOSHead(case["channels"], 1, case["num_classes"])
    missing, unexpected = head.load_state_dict(published_to_torchvision(state), strict=False)
    assert unexpected == []
    assert missing == ["regression_head.bbox_ctrness.weight", "regression_head.bbox_ctrness.bias"]
    height, width = case["image_size"]
    detector = FCOS(
        FixedBackbone(case[f"{side}_features"]),
        case["num_classes"],
        min_size=height,
        max_size=width,
        anchor_generator=ExactAnchors(strides, tuple((s,) for s in strides), (1.0,), offset=0.5),
        head=head,
        center_sampling_radius=float("inf"),
    )
    detector.published_centerness = nn.Conv2d(case["channels"], 1, 3, padding=1)
    kinds = ("weight", "bias")
    detector.published_centerness.load_state_dict({k: state[f"conv_centerness.{k}"] for k in kinds})
    detector.register_buffer(
        "published_scales", torch.stack([state[f"scales.{level}.scale"] for level in range(len(strides))])
    )
    return detector


@pytest.fixture
def case() -> dict[str, Any]:
    return load_parity("fcos_base.pt")


@pytest.fixture(params=[FixedFCOSAdapter, PublishedFCOSAdapter], ids=["torchvision", "published"])
def adapter(request):
    return request.param


def predictions_of(method) -> dict[str, Predictions]:
    return {"teacher": method.step.teacher.predictions, "cross_head": method.cross_head(method.step)}


def assert_agree(ours: Tensor, published: Tensor) -> None:
    torch.testing.assert_close(ours, published, rtol=1e-4, atol=1e-4)


def test_logits_agree(case, adapter):
    _, _, method = distil(case, build, adapter, prove=adapter is FixedFCOSAdapter)
    for name, predictions in predictions_of(method).items():
        assert_agree(predictions.logits, rows(case["expected"][name]["logits"], case["num_classes"]))


def test_classification_losses_agree(case, adapter):
    _, losses, _ = distil(case, build, adapter, prove=adapter is FixedFCOSAdapter)
    expected = case["expected"]["losses"]
    assert losses["kd_cls"].item() == pytest.approx(expected["loss_cls_kd"], rel=1e-5)
    assert losses["classification"].item() == pytest.approx(expected["loss_cls"], rel=1e-5)


def test_torchvisions_regression_agrees_before_its_activation(case):
    """The published ``exp(scale * output)``, taken apart, is torchvision's output where its ReLU passes."""
    distiller, _, method = distil(case, build, FixedFCOSAdapter)
    scales = distiller.teacher.published_scales
    for name, predictions in predictions_of(method).items():
        published = case["expected"][name]["regression"]
        outputs = [sides.log() / scale for sides, scale in zip(published, scales, strict=True)]
        expected = rows(outputs, 4).relu()
        assert 0.2 < (expected > 0).float().mean() < 0.8
        assert_agree(predictions.regression, expected)


def test_published_predictions_agree(case):
    _, _, method = distil(case, build, PublishedFCOSAdapter, prove=False)
    for name, predictions in predictions_of(method).items():
        expected = case["expected"][name]
        assert_agree(predictions.regression, rows(expected["regression"], 4))
        assert_agree(predictions.quality, rows(expected["centerness"], 1).squeeze(2))


def test_published_regression_and_centerness_losses_agree(case):
    _, losses, _ = distil(case, build, PublishedFCOSAdapter, prove=False)
    expected = case["expected"]["losses"]
    assert losses["kd_reg"].item() == pytest.approx(expected["loss_reg_kd"], rel=1e-5)
    assert losses["bbox_ctrness"].item() == pytest.approx(expected["loss_centerness"], rel=1e-5)


def test_published_gradient_at_the_students_features_agrees(case):
    distiller, losses, _ = distil(case, build, PublishedFCOSAdapter, torch.float64, prove=False)
    *finer, coarsest = gradient_errors(distiller, losses, case)
    assert max(finer) < 1e-5
    # GroupNorm over two locations: the published gradient, of float32, has little more than a digit left.
    assert coarsest < 0.15
