"""GFL's published numbers, through an adapter of a user's own: distributions, and a norm in the towers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from crosskd import Distiller
from crosskd.adapters import Adapter, Inputs, LevelPairs
from crosskd.head import Branch, Tower
from crosskd.methods import GFL
from crosskd.predictions import Assignment, Predictions
from tests.published_heads import FixedBackbone, Watched, distil, gradient_errors
from tests.reference_files import load_parity

CASES = [("gfl_base.pt", 3), ("gfl_position0.pt", 0)]
BINS = 17


def tower_of(state: dict[str, Tensor], name: str, width: int) -> nn.Sequential:
    """Four times convolution, GroupNorm, ReLU, in one flat run."""
    layers: list[nn.Module] = []
    for number in range(4):
        convolution, norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(32, width)
        convolution.weight.data = state[f"{name}.{number}.conv.weight"]
        norm.load_state_dict({key: state[f"{name}.{number}.gn.{key}"] for key in ("weight", "bias")})
        layers += [convolution, norm, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def predictor_of(state: dict[str, Tensor], name: str) -> nn.Conv2d:
    weight = state[f"{name}.weight"]
    predictor = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
    predictor.load_state_dict({"weight": weight, "bias": state[f"{name}.bias"]})
    return predictor


class PublishedGFL(nn.Module):
    """A head on the feature maps that the published numbers were computed from."""

    def __init__(self, case: dict[str, Any], side: str) -> None:
        super().__init__()
        state = case[f"{side}_head"]
        self.backbone = FixedBackbone(case[f"{side}_features"])
        self.classification, self.regression = (
            tower_of(state, name, case["channels"]) for name in ("cls_convs", "reg_convs")
        )
        self.logits, self.sides = predictor_of(state, "gfl_cls"), predictor_of(state, "gfl_reg")
        scales = [state[f"scales.{level}.scale"] for level in range(len(case["strides"]))]
        self.scales = nn.Parameter(torch.stack(scales))


class GFLAdapter:
    """What a user would write; of the student's own losses only their assignment is needed here."""

    recipe = GFL

    def __init__(self, strides: list[int]) -> None:
        self._strides = strides

    def supports(self, detector: nn.Module) -> bool:
        return isinstance(detector, PublishedGFL)

    def num_classes(self, detector: PublishedGFL) -> int:
        return detector.logits.out_channels

    def strides(self, detector: nn.Module) -> list[int]:
        return self._strides

    def check_pair(self, teacher: nn.Module, student: nn.Module, levels: LevelPairs) -> None:
        return None

    def detect(self, student: nn.Module, images: Any, targets: Any) -> Any:
        return student(images)

    def check_locations(self, teacher: Any, student: Any, levels: LevelPairs) -> None:
        return None

    def branches(self, detector: PublishedGFL) -> tuple[Branch, ...]:
        return (
            Branch(
                "classification",
                (Tower.of(detector.classification, "classification tower"),),
                {"logits": detector.logits},
            ),
            Branch(
                "regression", (Tower.of(detector.regression, "regression tower"),), {"sides": detector.sides}
            ),
        )

    def prepare(self, teacher: nn.Module, student: nn.Module, images: list[Tensor], targets: Any) -> Inputs:
        pixels = torch.stack(images)
        return Inputs(pixels, pixels, targets)

    def features(self, detector: PublishedGFL, pixels: Tensor) -> Sequence[Tensor]:
        return list(detector.backbone(pixels).values())

    def predict(self, detector: PublishedGFL, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        sides = detector.scales[level] * detector.sides(towers["regression"])
        return as_predictions([detector.logits(towers["classification"])], [sides])

    def locations(self, detector: nn.Module, inputs: Inputs, features: Sequence[Tensor]) -> list[Tensor]:
        """One square anchor of 8 strides a point, a tensor (anchors, 4) a level."""
        levels = []
        for stride, feature_map in zip(self._strides, features, strict=True):
            y, x = (stride * torch.arange(size) for size in feature_map.shape[-2:])
            centers = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).reshape(-1, 2)
            levels.append(torch.cat([centers - 4 * stride, centers + 4 * stride], dim=1).float())
        return levels

    def decode(self, detector: nn.Module, predictions: Predictions, locations: Any) -> Tensor:
        raise AssertionError("distributions are compared as they are")

    def losses(
        self, student: nn.Module, predictions: Predictions, locations: list[Tensor], inputs: Inputs
    ) -> tuple[dict[str, Tensor], Assignment]:
        positive = torch.stack([atss_positives(locations, t["boxes"]) for t in inputs.targets])
        normalizer = positive.sum(dim=1).clamp(min=1).sum().float()
        return {}, Assignment(torch.ones(positive.shape), positive, normalizer)


def as_predictions(logits: list[Tensor], sides: list[Tensor]) -> Predictions:
    """Maps a level (batch, channels, height, width) as one row an anchor."""
    rows = [torch.cat([x.flatten(2).mT for x in levels], dim=1) for levels in (logits, sides)]
    return Predictions(rows[0], rows[1].unflatten(-1, (4, BINS)), None)


def atss_positives(levels: list[Tensor], boxes: Tensor) -> Tensor:
    """Which anchors adaptive training sample selection makes responsible for a box, shape (anchors,)."""
    anchors, start, candidates = torch.cat(levels), 0, []
    centers, box_centers = ((b[:, :2] + b[:, 2:]) / 2 for b in (anchors, boxes))
    distances = torch.cdist(centers, box_centers)
    for level in levels:
        nearest = distances[start : start + len(level)].topk(min(9, len(level)), dim=0, largest=False)
        candidates.append(start + nearest.indices)
        start += len(level)
    chosen = torch.cat(candidates)  # (candidates, boxes)
    overlaps = box_iou(anchors, boxes).gather(0, chosen)
    thresholds = overlaps.mean(0) + overlaps.std(0)
    inner = torch.cat([centers[chosen] - boxes[:, :2], boxes[:, 2:] - centers[chosen]], dim=-1)
    positive = torch.zeros(len(anchors), dtype=torch.bool)
    positive[chosen[(overlaps >= thresholds) & (inner.amin(-1) > 0.01)]] = True
    return positive


@pytest.fixture(params=CASES, ids=[name for name, _ in CASES])
def case(request) -> dict[str, Any]:
    name, position = request.param
    loaded = load_parity(name)
    assert loaded["position"] == position
    return loaded


def step_of(case: dict[str, Any]) -> tuple[Distiller, dict[str, Tensor], Watched]:
    adapter = GFLAdapter(case["strides"])
    assert isinstance(adapter, Adapter)
    return distil(case, PublishedGFL, adapter)


def test_losses_agree(case):
    _, losses, _ = step_of(case)
    expected = case["expected"]["losses"]
    assert losses["kd_cls"].item() == pytest.approx(expected["loss_cls_kd"], rel=1e-4)
    assert losses["kd_reg"].item() == pytest.approx(expected["loss_reg_kd"], rel=1e-4)


def test_gradient_at_the_students_features_agrees(case):
    distiller, losses, _ = step_of(case)
    *larger, smallest = gradient_errors(distiller, losses, case)
    assert max(larger) < 1e-4
    # The last level has two locations an image: its deviation, and what it divides, is less precise.
    assert smallest < 1e-3


@pytest.mark.parametrize("side", ["teacher", "cross_head"])
def test_predictions_agree(case, side):
    _, _, method = step_of(case)
    found = method.step.teacher if side == "teacher" else method.cross_head(method.step)
    expected = as_predictions(*(case["expected"][side][name] for name in ("logits", "regression")))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.regression, expected.regression, rtol=1e-4, atol=1e-4)
