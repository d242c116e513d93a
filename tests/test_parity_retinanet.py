"""RetinaNet's published numbers, through torchvision's own modules and the public Distiller."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead

from crosskd import CrossKD, Distiller
from crosskd.adapters import TorchvisionRetinaNetAdapter
from tests.reference_files import load_parity

CASES = [("retinanet_base.pt", 3), ("retinanet_position4.pt", 4)]


class FixedBackbone(nn.Module):
    """Hands out the feature maps that the published numbers were computed from."""

    def __init__(self, features: list[Tensor]) -> None:
        super().__init__()
        self.out_channels = features[0].shape[1]
        self.features = nn.ParameterList([nn.Parameter(f.clone()) for f in features])

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {str(level): feature for level, feature in enumerate(self.features)}


class UnroundedAnchors(AnchorGenerator):
    """Anchors of exact size: torchvision's are rounded to whole pixels."""

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device="cpu"):
        scales = torch.as_tensor(scales, dtype=dtype, device=device)
        ratios = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        widths, heights = (1 / ratios[:, None] * scales).view(-1), (ratios[:, None] * scales).view(-1)
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2


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
    features = case[f"{side}_features"]
    sizes = tuple(tuple(4 * s * 2 ** (octave / 3) for octave in range(3)) for s in case["strides"])
    head = RetinaNetHead(case["channels"], 9, case["num_classes"])
    head.load_state_dict(published_to_torchvision(case[f"{side}_head"]))
    height, width = case["image_size"]
    return RetinaNet(
        FixedBackbone(features),
        case["num_classes"],
        min_size=height,
        max_size=width,
        anchor_generator=UnroundedAnchors(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        head=head,
        proposal_matcher=Matcher(0.5, 0.4, allow_low_quality_matches=True),
    )


class FixedFeaturesAdapter(TorchvisionRetinaNetAdapter):
    """The strides can't be probed where the feature maps don't depend on the image."""

    def _strides(self, detector: Any) -> None:
        return None


@pytest.fixture(params=CASES, ids=[name for name, _ in CASES])
def case(request) -> dict[str, Any]:
    name, position = request.param
    loaded = load_parity(name)
    assert loaded["position"] == position
    return loaded


def distil(case: dict[str, Any]) -> tuple[Distiller, dict[str, Tensor]]:
    method = CrossKD(position=case["position"])
    distiller = Distiller(build(case, "teacher"), build(case, "student"), method, FixedFeaturesAdapter())
    images = [torch.rand(3, *case["image_size"]) for _ in case["targets"]]
    return distiller, distiller(images, [dict(target) for target in case["targets"]])


def flat(levels: list[Tensor], last: int) -> Tensor:
    """Published maps (batch, anchors * last, height, width) as rows (batch, all anchors, last)."""
    return torch.cat([x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, last) for x in levels], dim=1)


def test_losses_agree(case):
    _, losses = distil(case)
    expected = case["expected"]["losses"]
    assert losses["kd_cls"].item() == pytest.approx(expected["loss_cls_kd"], rel=1e-4)
    assert losses["kd_reg"].item() == pytest.approx(expected["loss_reg_kd"], rel=1e-4)


def test_gradient_at_the_students_features_agrees(case):
    distiller, losses = distil(case)
    (losses["kd_cls"] + losses["kd_reg"]).backward()
    expected = case["expected"]["kd_grad_student_features"]
    for feature, gradient in zip(distiller.student.backbone.features, expected, strict=True):
        torch.testing.assert_close(feature.grad, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_cross_head_and_teacher_predictions_agree(case, monkeypatch):
    seen = {}
    original = CrossKD.forward

    def note(self, step):
        seen["cross_head"], seen["teacher"] = self.cross_head(step), step.teacher
        return original(self, step)

    monkeypatch.setattr(CrossKD, "forward", note)
    distil(case)
    classes = case["num_classes"]
    for name, predictions in seen.items():
        expected = case["expected"][name]
        logits, regression = flat(expected["logits"], classes), flat(expected["regression"], 4)
        torch.testing.assert_close(predictions.logits, logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(predictions.regression, regression, rtol=1e-4, atol=1e-4)


def test_students_own_losses_agree(case):
    """The published student losses sum over the batch and divide by all positives, at least 1 an image."""
    distiller, _ = distil(case)
    student, adapter = distiller.student, distiller.adapter
    images = [torch.rand(3, *case["image_size"]) for _ in case["targets"]]
    per_image = {"classification": 0.0, "bbox_regression": 0.0}
    positives = 0
    for index in range(len(images)):
        one = RetinaNet.__new__(RetinaNet)
        one.__dict__.update(student.__dict__)
        inputs = adapter.prepare(student, student, images, [dict(t) for t in case["targets"]])
        maps = adapter.features(student, inputs.student_pixels)
        outputs = student.head(maps)
        anchors = student.anchor_generator(inputs.extra, maps)
        target = inputs.targets[index]
        only = {key: value[index : index + 1] for key, value in outputs.items()}
        losses = student.compute_loss([target], only, [anchors[index]])
        matches = student.proposal_matcher(
            __import__("torchvision").ops.box_iou(target["boxes"], anchors[index])
        )
        count = max(1, int((matches >= 0).sum()))
        positives += count
        for key in per_image:
            per_image[key] += losses[key].item() * count
    expected = case["expected"]["losses"]
    assert per_image["classification"] / positives == pytest.approx(expected["loss_cls"], rel=1e-4)
    assert per_image["bbox_regression"] / positives == pytest.approx(expected["loss_bbox"], rel=1e-4)
    assert math.isfinite(positives)
