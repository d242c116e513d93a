"""Detectors whose modules are named, and no class is written: paths, functions, layers of every kind."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.ops import box_iou

from crosskd import BCKD, PKD, CrossKD, Distiller, Method, PredictionMimicking, ResponseDistillation
from crosskd.adapters import (
    Anchors,
    Batch,
    Objects,
    PixelCoding,
    TorchvisionFCOS,
    TorchvisionRetinaNet,
    generic,
)
from crosskd.adapters.generic import GenericAdapter
from crosskd.adapters.torchvision.common import grid_anchors
from crosskd.align import align_statistics
from crosskd.losses import giou_loss, quality_focal_loss
from crosskd.predictions import Assignment, Predictions
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet

CLASSES = 3


# -- small detectors ------------------------------------------------------------------------------


def block(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())


class Backbone(nn.Module):
    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(3 if not n else width, width, 3, 2, 1) for n in range(levels))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            pixels = stage(pixels).relu()
            maps.append(pixels)
        return maps


class Head(nn.Module):
    """One for all levels, or one per level."""

    def __init__(self, width: int, classes: int, anchors: int, bins: int, blocks: int) -> None:
        super().__init__()
        self.cls_tower = nn.Sequential(*(block(width) for _ in range(blocks)))
        self.box_tower = nn.Sequential(*(block(width) for _ in range(blocks)))
        self.cls = nn.Conv2d(width, anchors * classes, 1)
        self.box = nn.Conv2d(width, anchors * 4 * bins, 1)
        self.quality = nn.Conv2d(width, anchors, 1)

    def forward(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls(self.cls_tower(feature_map)), self.box(self.box_tower(feature_map))


class Shared(nn.Module):
    """A detector with a head for all levels."""

    def __init__(
        self, width: int = 8, *, classes=CLASSES, levels=2, anchors=1, bins=1, blocks=2, seed=0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = Backbone(width, levels)
            self.head = Head(width, classes, anchors, bins, blocks)

    def forward(self, images: Tensor) -> Any:
        return [self.head(feature_map) for feature_map in self.backbone(images)]


class PerLevel(nn.Module):
    """A detector with a head per level."""

    def __init__(self, width: int = 8, *, levels=2, anchors=(1, 1), seed=0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = Backbone(width, levels)
            self.heads = nn.ModuleList(Head(width, CLASSES, anchors[n], 1, 2) for n in range(levels))

    def forward(self, images: Tensor) -> Any:
        maps = self.backbone(images)
        return [head(feature_map) for head, feature_map in zip(self.heads, maps, strict=True)]


def own_losses(detector, predictions: Predictions, anchors, targets) -> tuple[dict[str, Tensor], Tensor]:
    """Every second anchor holds an object of class 0."""
    positive = torch.arange(predictions.logits.shape[1]) % 2 == 0
    positive = positive.expand(predictions.logits.shape[:2])
    return {"own": F.binary_cross_entropy_with_logits(predictions.logits[..., 0], positive.float())}, positive


def as_boxes(detector, regression: Tensor, anchors) -> Tensor:
    return torch.cat([-1 - regression[..., :2].exp(), 1 + regression[..., 2:].exp()], dim=-1)


def adapter_for(paths: str = "head.", **options: Any) -> generic:
    settings: dict[str, Any] = {
        "features": "backbone",
        "towers": {"cls": f"{paths}cls_tower", "box": f"{paths}box_tower"},
        "predictors": {"cls": {"logits": f"{paths}cls"}, "box": {"regression": f"{paths}box"}},
        "losses": own_losses,
        "decode": as_boxes,
    }
    return generic(**{**settings, **options})


def pixels(seed: int = 1) -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def losses_of(teacher, student, adapter, method=None, **options) -> dict[str, Tensor]:
    return Distiller(teacher, student, method or CrossKD(), adapter, **options)(pixels(), [])


def by_hand(teacher: nn.Module, student: nn.Module, heads, anchors=(1, 1)) -> dict[str, Tensor]:
    """CrossKD's losses at position 1, calculated without adapter, towers or distiller."""
    logits, sides = [[], []], [[], []]
    maps = teacher.backbone(pixels()), student.backbone(pixels())
    for level, (theirs, ours) in enumerate(zip(*maps, strict=True)):
        for tower, predictor, found in (("cls_tower", "cls", logits), ("box_tower", "box", sides)):
            their_head, our_head = heads(teacher, level), heads(student, level)
            modules = getattr(their_head, tower)
            after = modules[0](theirs).detach()
            aligned = align_statistics(getattr(our_head, tower)[0](ours), after).relu()
            for outputs, features in zip(found, (after, aligned), strict=True):
                output = getattr(their_head, predictor)(modules[1](features))
                shape = (len(output), anchors[level], -1, *output.shape[2:])
                outputs.append(output.view(shape).permute(0, 3, 4, 1, 2).flatten(1, 3))
    (teacher_logits, cross_logits), (teacher_sides, cross_sides) = (
        [torch.cat(outputs, dim=1) for outputs in found] for found in (logits, sides)
    )
    positives = float(len(cross_logits) * ((cross_logits.shape[1] + 1) // 2))
    weight = teacher_logits.amax(-1).sigmoid().detach()
    boxes = [as_boxes(None, regression, None) for regression in (cross_sides, teacher_sides.detach())]
    return {
        "kd_cls": quality_focal_loss(cross_logits, teacher_logits.detach(), beta=1.0, normalizer=positives),
        "kd_reg": giou_loss(*boxes, weight=weight, normalizer=positives),
    }


def assert_close(losses: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert losses.keys() >= expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, msg=lambda text, name=name: f"{name}: {text}")


# -- objectness ------------------------------------------------------------------------------------


class Objectness(Shared):
    def forward(self, images: Tensor) -> Any:
        maps = self.backbone(images)
        return [(self.head(each), self.head.quality(self.head.box_tower(each))) for each in maps]


def with_objectness(**options: Any) -> generic:
    predictors = {"cls": {"logits": "head.cls"}, "box": {"regression": "head.box", "quality": "head.quality"}}
    return adapter_for(predictors=predictors, **{"objectness": True, **options})


@pytest.mark.parametrize("method", [CrossKD, PredictionMimicking, BCKD, ResponseDistillation])
def test_classes_count_as_far_as_there_is_an_object(method):
    """A teacher that is sure that there is nothing teaches that, whatever its classes say."""
    teacher, student = Objectness(), Objectness(seed=1)
    teacher.head.quality.bias.data.fill_(-40.0)
    expected = None
    for classes in (-3.0, 0.0, 30.0):
        teacher.head.cls.bias.data.fill_(classes)
        losses = losses_of(teacher, student, with_objectness(), method(cls_weight=1.0))
        found = {name: loss.item() for name, loss in losses.items()}
        if method is CrossKD:  # there the teacher's head predicts both
            assert found["kd_cls"] < 1e-9
            assert found["kd_quality"] < 1e-9
        elif expected is not None:
            assert found == pytest.approx(expected)
        expected = found


def test_objectness_is_read_off_its_own_branch_without_boxes():
    """A loss of weight 0 leaves a branch alone, but not that of the objectness."""
    teacher, student = Objectness(), Objectness(width=4, seed=1)
    distiller = Distiller(teacher, student, CrossKD(reg_weight=0, quality_weight=0), with_objectness())
    distiller(pixels(), [])["kd_cls"].backward()
    assert student.head.box_tower[0][0].weight.grad.abs().sum() > 0


def test_a_predict_of_ones_own_says_that_it_has_an_objectness():
    def predict(detector, level: int, towers) -> Predictions:
        parts = [detector.head.cls(towers["cls"]), detector.head.box(towers["box"])]
        logits, sides = (part.flatten(2).mT for part in parts)
        quality = detector.head.quality(towers["box"]).flatten(1)
        return Predictions(logits, sides, quality, objectness=said)

    expected = losses_of(Objectness(), Objectness(seed=1), with_objectness())
    options = {"predict": predict, "num_classes": CLASSES}
    said = True
    assert_close(losses_of(Objectness(), Objectness(seed=1), with_objectness(**options)), expected)
    said = False
    with pytest.raises(ValueError, match="objectness False for Objectness, but .* objectness=True"):
        losses_of(Objectness(), Objectness(seed=1), with_objectness(**options))


def test_error_objectness_without_its_predictor():
    with pytest.raises(ValueError, match=r"objectness=True .* \['logits', 'regression'\]"):
        adapter_for(objectness=True)


# -- hand-written numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("anchors", [1, 3])
def test_a_head_for_all_levels_by_path(anchors):
    teacher, student = Shared(anchors=anchors), Shared(anchors=anchors, seed=1)
    losses = losses_of(teacher, student, adapter_for())
    assert sorted(losses) == ["kd_cls", "kd_reg", "own"]
    assert_close(losses, by_hand(teacher, student, lambda d, _: d.head, (anchors, anchors)))


@pytest.mark.parametrize("anchors", [(1, 1), (2, 3)])
def test_a_head_per_level_by_path(anchors):
    teacher, student = PerLevel(anchors=anchors), PerLevel(anchors=anchors, seed=1)
    losses = losses_of(teacher, student, adapter_for("heads.*."))
    assert_close(losses, by_hand(teacher, student, lambda d, level: d.heads[level], anchors))


def test_functions_find_what_paths_do():
    expected = losses_of(PerLevel(), PerLevel(seed=1), adapter_for("heads.*."))
    found = adapter_for(
        features=lambda detector, images: dict(enumerate(detector.backbone(images))),
        towers={
            "cls": lambda detector: [nn.ModuleList(head.cls_tower) for head in detector.heads],
            "box": lambda detector: tuple(head.box_tower for head in detector.heads),
        },
        predictors={
            "cls": {"logits": lambda detector: [head.cls for head in detector.heads]},
            "box": {"regression": "heads.*.box"},
        },
    )
    assert_close(losses_of(PerLevel(), PerLevel(seed=1), found), expected)


def test_levels_may_share_a_module():
    """A ModuleList that holds one module twice has two levels."""
    teacher, student = PerLevel(), PerLevel(seed=1)
    for detector in (teacher, student):
        detector.heads[1] = detector.heads[0]
    losses = losses_of(teacher, student, adapter_for("heads.*."))
    assert_close(losses, by_hand(teacher, student, lambda d, _: d.heads[0]))


def test_one_feature_map_of_all():
    teacher, student = Shared(levels=1), Shared(levels=1, seed=1)
    adapter = adapter_for(features=lambda detector, images: detector.backbone(images)[0])
    assert_close(losses_of(teacher, student, adapter), by_hand(teacher, student, lambda d, _: d.head, (1,)))


# -- the same numbers as adapters that were written ------------------------------------------------


def torchvision_adapter(family: str, **options: Any) -> generic:
    """What torchvision's heads are made of, by name."""

    def prepare(detector, images, targets):
        batch, targets = detector.transform(images, targets)
        return Batch(batch.tensors, tuple(batch.image_sizes), targets=targets)

    return generic(
        features="backbone",
        towers={n: f"head.{n}_head.conv" for n in ("classification", "regression")},
        prepare=prepare,
        anchors=lambda detector, batch, maps: (
            grid_anchors(detector.anchor_generator, batch, maps, None).boxes
        ),
        head_type=family,
        **options,
    )


def retinanet_losses(detector: RetinaNet, predictions, anchors, targets):
    """Torchvision's loss, and the matches once more."""
    outputs = {"cls_logits": predictions.logits, "bbox_regression": predictions.regression}
    losses = detector.compute_loss(targets, outputs, [anchors] * len(targets))
    matches = [detector.proposal_matcher(box_iou(target["boxes"], anchors)) for target in targets]
    positive = torch.stack([match >= 0 for match in matches])
    label_weights = torch.stack(
        [(match != detector.proposal_matcher.BETWEEN_THRESHOLDS).float() for match in matches]
    )
    return losses, Assignment(label_weights, positive, positive.sum(1).clamp(min=1).sum().float())


def retinanet_boxes(detector: RetinaNet, regression: Tensor, anchors: Tensor) -> Tensor:
    rows = anchors.expand(len(regression), -1, -1).flatten(0, 1)
    return detector.box_coder.decode_single(regression.flatten(0, 1), rows).view_as(regression)


def retinanet_adapter() -> generic:
    return torchvision_adapter(
        "RetinaNet",
        predictors={
            "classification": {"logits": "head.classification_head.cls_logits"},
            "regression": {"regression": "head.regression_head.bbox_reg"},
        },
        losses=retinanet_losses,
        decode=retinanet_boxes,
    )


@pytest.mark.parametrize("method", [CrossKD(), CrossKD(position=2, tap="pre"), PredictionMimicking()])
@pytest.mark.parametrize("width", [32, 16])
def test_retinanet_by_paths_is_retinanet_by_its_adapter(method, width):
    results = []
    for adapter in (retinanet_adapter(), TorchvisionRetinaNet):
        torch.manual_seed(0)  # of the projections
        student = tiny_retinanet(seed=1, width=width)
        distiller = Distiller(tiny_retinanet(), student, method, adapter)
        losses = distiller(*tiny_batch())
        sum(losses.values()).backward()
        results.append((losses, [parameter.grad for parameter in student.parameters()]))
    (losses, gradients), (expected, expected_gradients) = results
    assert losses.keys() == expected.keys()
    assert_close(losses, expected)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def fcos_level(detector, level: int, towers) -> Predictions:
    """FCOS's distances are a ReLU of what its predictor gives."""
    head = detector.head.regression_head
    logits = detector.head.classification_head.cls_logits(towers["classification"])
    outputs = (logits, F.relu(head.bbox_reg(towers["regression"])), head.bbox_ctrness(towers["regression"]))
    logits, sides, quality = (output.flatten(2).mT for output in outputs)
    return Predictions(logits, sides, quality.squeeze(-1))


def fcos_losses(detector, predictions, anchors, targets):
    adapter = TorchvisionFCOS(detector)
    pixels = torch.empty(len(targets), 3, 64, 64)
    maps = adapter.maps(pixels)
    found = adapter.heads[0].anchors(Batch(pixels, ((64, 64),) * len(targets)), maps)
    return adapter.heads[0].losses(predictions, found, Batch(pixels, (), targets=targets))


def fcos_boxes(detector, regression: Tensor, anchors: Tensor) -> Tensor:
    return detector.head.box_coder.decode(regression, anchors.expand(len(regression), -1, -1))


def fcos_adapter(**options: Any) -> generic:
    return torchvision_adapter(
        "FCOS",
        predictors={
            "classification": {"logits": "head.classification_head.cls_logits"},
            "regression": {
                "regression": "head.regression_head.bbox_reg",
                "quality": "head.regression_head.bbox_ctrness",
            },
        },
        losses=fcos_losses,
        decode=fcos_boxes,
        **options,
    )


def test_a_predict_of_ones_own_is_fcos_by_its_adapter():
    method = CrossKD(quality_weight=1.0)
    losses, expected = (
        Distiller(tiny_fcos(), tiny_fcos(seed=1), method, adapter)(*tiny_batch())
        for adapter in (fcos_adapter(predict=fcos_level), TorchvisionFCOS)
    )
    assert losses.keys() == expected.keys()
    assert_close(losses, expected)


def test_quality_as_it_comes():
    """FCOS's own numbers, but for the ReLU."""
    predictions = []
    towers = {name: torch.randn(2, 32, 4, 5) for name in ("classification", "regression")}
    detector = tiny_fcos()
    for adapter in (fcos_adapter(), fcos_adapter(predict=fcos_level)):
        predictions.append(adapter(detector).heads[0].predict(0, towers))
    assert torch.equal(predictions[0].regression.relu(), predictions[1].regression)
    assert torch.equal(predictions[0].quality, predictions[1].quality)
    assert torch.equal(predictions[0].logits, predictions[1].logits)


# -- layers of other kinds -------------------------------------------------------------------------


class Fully(nn.Module):
    """Linear layers on pooled features, or on a row of locations."""

    def __init__(self, width: int = 8, *, space: tuple[int, ...], blocks: int = 2, seed: int = 0) -> None:
        super().__init__()
        self.space = space
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Linear(3 * 16 * 16, width * torch.tensor(space).prod().int().item())
            layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(blocks)]
            self.tower = nn.Sequential(*layers)
            self.cls, self.box = nn.Linear(width, 2 * CLASSES), nn.Linear(width, 2 * 4)

    def features(self, images: Tensor) -> Tensor:
        return self.stem(images.flatten(1)).view(len(images), *self.space, -1)

    def forward(self, images: Tensor) -> Any:
        features = self.tower(self.features(images))
        return self.cls(features), self.box(features)


def fully_adapter(**options: Any) -> generic:
    settings: dict[str, Any] = {
        "features": lambda detector, images: detector.features(images),
        "rows": "grid",
        "towers": {"both": "tower"},
        "predictors": {"both": {"logits": "cls", "regression": "box"}},
        "losses": own_losses,
        "decode": as_boxes,
    }
    return generic(**{**settings, **options})


def fully_by_hand(teacher: Fully, student: Fully) -> dict[str, Tensor]:
    outputs: list[list[Tensor]] = []
    features = teacher.tower[0](teacher.features(pixels())).detach()
    own = student.tower[0](student.features(pixels()))
    dims = tuple(range(own.ndim - 1))
    (mean, std), (our_mean, our_std) = ((f.mean(dims), f.std(dims, correction=1)) for f in (features, own))
    aligned = ((own - our_mean) / (our_std + 1e-6) * std + mean).relu()
    for taken in (features, aligned):
        rest = teacher.tower[1](taken)
        outputs.append(
            [predictor(rest).reshape(2, -1, n) for predictor, n in ((teacher.cls, 3), (teacher.box, 4))]
        )
    (logits, sides), (cross_logits, cross_sides) = outputs
    positives = float(logits.shape[:2].numel() / 2)
    boxes = as_boxes(None, cross_sides, None), as_boxes(None, sides.detach(), None)
    return {
        "kd_cls": quality_focal_loss(cross_logits, logits.detach(), beta=1.0, normalizer=positives),
        "kd_reg": giou_loss(*boxes, weight=logits.amax(-1).sigmoid().detach(), normalizer=positives),
    }


SPACES = pytest.mark.parametrize("space", [(), (5,), (3, 4)], ids=["pooled", "a row", "a map, channels last"])


@SPACES
def test_towers_of_linear_layers(space):
    teacher, student = Fully(space=space), Fully(space=space, seed=1)
    losses = losses_of(teacher, student, fully_adapter())
    assert_close(losses, fully_by_hand(teacher, student))
    (losses["kd_cls"] + losses["kd_reg"]).backward()
    assert student.stem.weight.grad.abs().max() > 0
    assert student.tower[1][0].weight.grad is None


@SPACES
def test_towers_of_linear_layers_of_other_widths(space):
    student = Fully(6, space=space, seed=1)
    distiller = Distiller(Fully(space=space), student, CrossKD(), fully_adapter())
    (projection,) = distiller.methods["crosskd"].projections.values()
    assert (projection.student_width, projection.teacher_width) == (6, 8)
    losses = distiller(pixels(), [])
    (losses["kd_cls"] + losses["kd_reg"]).backward()
    assert projection.convolution.weight.grad.abs().max() > 0
    assert student.stem.weight.grad.abs().max() > 0
    # A projection that keeps the channels that there are changes nothing.
    twin = Fully(space=space, seed=1)
    with torch.no_grad():
        projection.convolution.weight.copy_(torch.eye(8, 6)[..., None, None])
        for layer in (twin.stem, twin.tower[0][0]):
            layer.weight.zero_()
            layer.bias.zero_()
        _widen(twin.stem, student.stem, space)
        twin.tower[0][0].weight[:6, :6] = student.tower[0][0].weight
        twin.tower[0][0].bias[:6] = student.tower[0][0].bias
    assert_close(
        {name: loss.detach() for name, loss in distiller(pixels(), []).items() if name != "own"},
        {name: loss.detach() for name, loss in fully_by_hand(Fully(space=space), twin).items()},
    )


def _widen(wide: nn.Linear, narrow: nn.Linear, space: tuple[int, ...]) -> None:
    """Gives a stem of 8 channels the 6 of a narrower one."""
    count = narrow.bias.numel() // 6
    wide.weight.view(count, 8, -1)[:, :6] = narrow.weight.view(count, 6, -1)
    wide.bias.view(count, 8)[:, :6] = narrow.bias.view(count, 6)


@SPACES
def test_linear_predictors_without_a_tower(space):
    teacher, student = Fully(space=space, blocks=0), Fully(space=space, blocks=0, seed=1)
    nothing = fully_adapter(towers={"both": None})
    losses = losses_of(teacher, student, nothing)
    assert_close(losses, losses_of(teacher, student, fully_adapter(), CrossKD(position=0)))
    dims = tuple(range(len(space) + 1))
    theirs, ours = teacher.features(pixels()), student.features(pixels())
    aligned = (ours - ours.mean(dims)) / (ours.std(dims) + 1e-6) * theirs.std(dims) + theirs.mean(dims)
    logits = [teacher.cls(features).reshape(2, -1, CLASSES) for features in (aligned, theirs)]
    expected = quality_focal_loss(
        logits[0], logits[1].detach(), beta=1.0, normalizer=logits[0].shape[:2].numel() / 2
    )
    torch.testing.assert_close(losses["kd_cls"], expected)


def test_a_map_with_its_channels_last_is_resized_where_asked_for():
    teacher, student = Fully(space=(6, 8)), Fully(6, space=(3, 4), seed=1)
    with pytest.raises(
        ValueError, match=r"the levels differ: \[\(6, 8\)\] \(teacher\), \[\(3, 4\)\] \(student"
    ):
        losses_of(teacher, student, fully_adapter())
    losses = losses_of(teacher, student, fully_adapter(), resize_levels=True)
    assert all(loss.isfinite() for loss in losses.values())
    with pytest.raises(ValueError, match=r"levels differ: \[\(7,\)\] \(teacher\), .*where they are maps"):
        losses_of(Fully(space=(7,)), Fully(space=(5,)), fully_adapter(), resize_levels=True)


def test_predictors_without_a_tower_per_level():
    """As in SSD: each level has a width and predictors of its own."""
    teacher, student = PerLevel(12), PerLevel(8, seed=1)
    adapter = adapter_for("heads.*.", towers={"cls": None, "box": None})
    # The detectors' own forward has towers.
    distiller = Distiller(teacher, student, CrossKD(), adapter, prove=False)
    assert sorted(distiller.methods["crosskd"].projections) == [
        f"{branch}_level{level}" for branch in ("box", "cls") for level in (0, 1)
    ]
    losses = distiller(pixels(), [])
    sum(losses.values()).backward()
    assert student.heads[0].cls_tower[0][0].weight.grad is None
    assert all(stage.weight.grad.abs().max() > 0 for stage in student.backbone.stages)


# -- what else heads are like ----------------------------------------------------------------------


def test_distributions_without_decode():
    adapter = adapter_for(bins=5, decode=None)
    teacher, student = Shared(bins=5, anchors=2), Shared(bins=5, anchors=2, seed=1)
    distiller = Distiller(teacher, student, CrossKD(), adapter)
    comparison = distiller.methods["crosskd"].comparison
    assert (comparison.regression, comparison.reg_weight) == ("distribution_kl", 4.0)
    losses = distiller(pixels(), [])
    assert losses["kd_reg"] > 0
    features = teacher.backbone(pixels())[0]
    towers = {"cls": teacher.head.cls_tower(features), "box": teacher.head.box_tower(features)}
    predictions = adapter(teacher).heads[0].predict(0, towers)
    assert predictions.regression.shape == (2, 8 * 8 * 2, 4, 5)
    # Location (3, 2), its second anchor, third side: channels 4 * 5 + 2 * 5 and on.
    expected = teacher.head.box(towers["box"])[:, 30:35, 3, 2]
    torch.testing.assert_close(predictions.regression[:, (3 * 8 + 2) * 2 + 1, 2], expected)
    with pytest.raises(ValueError, match=r'regression="giou".* pass it decode='):
        losses_of(teacher, student, adapter, CrossKD(regression="giou"))


def test_distributions_with_decode_may_be_compared_as_boxes():
    def expected_boxes(detector, regression, anchors):
        distance = (regression.softmax(-1) * torch.arange(5.0)).sum(-1)
        return torch.cat([-distance[..., :2], distance[..., 2:]], dim=-1)

    teacher, student = Shared(bins=5), Shared(bins=5, seed=1)
    adapter = adapter_for(bins=5, decode=expected_boxes)
    distiller = Distiller(teacher, student, CrossKD(), adapter)
    assert distiller.methods["crosskd"].comparison.regression == "giou"
    assert distiller(pixels(), [])["kd_reg"] > 0


def test_a_predict_of_ones_own_may_have_one_predictor_for_all():
    """As in many one-stage heads: one convolution gives boxes and classes."""

    class Joint(Shared):
        def __init__(self, **options):
            super().__init__(**options)
            self.out = nn.Conv2d(8, 4 + CLASSES, 1)

        def forward(self, images):
            return [self.out(self.head.cls_tower(feature_map)) for feature_map in self.backbone(images)]

    def split(detector, level, towers):
        rows = detector.out(towers["cls"]).flatten(2).mT
        return Predictions(rows[..., 4:], rows[..., :4], None)

    options: dict[str, Any] = {
        "towers": {"cls": "head.cls_tower"},
        "predictors": {"cls": {"all": "out"}},
        "predict": split,
    }
    with pytest.raises(ValueError, match=r"\['all'\]: name them so, or pass predict= and num_classes="):
        adapter_for(**options)
    for classes in (CLASSES, lambda detector: detector.out.out_channels - 4):
        adapter = adapter_for(**options, num_classes=classes)
        losses = losses_of(Joint(), Joint(seed=1), adapter)
        assert losses["kd_cls"] > 0
        assert losses["kd_reg"] > 0


def test_towers_of_other_width_and_depth():
    distiller = Distiller(
        Shared(12, blocks=3), Shared(8, blocks=1, seed=1), CrossKD(position=(1, 2)), adapter_for()
    )
    assert sorted(distiller.methods["crosskd"].projections) == ["box", "cls"]
    losses = distiller(pixels(), [])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.methods.parameters())


def test_levels_by_stride():
    adapter = adapter_for(
        strides=lambda detector: [2 ** (n + 1) for n in range(len(detector.backbone.stages))]
    )
    teacher, student = Shared(levels=3), Shared(levels=2, seed=1)
    losses = losses_of(teacher, student, adapter)
    shorter = copy.deepcopy(teacher)
    del shorter.backbone.stages[2]
    assert_close(losses, losses_of(shorter, student, adapter))
    with pytest.raises(
        ValueError, match=r"levels differ: \[\(8, 8\), \(4, 4\), \(2, 2\)\] \(teacher\), \[\(8"
    ):
        losses_of(teacher, student, adapter_for())
    assert losses_of(Shared(), student, adapter_for(strides=[2, 4])).keys() == losses.keys()


def test_a_head_per_level_by_stride():
    def strides(detector):
        return [2 ** (n + 1) for n in range(len(detector.heads))]

    teacher, student = PerLevel(levels=3, anchors=(1, 1, 1)), PerLevel(seed=1)
    losses = losses_of(teacher, student, adapter_for("heads.*.", strides=strides))
    assert_close(losses, by_hand(_without_last_level(teacher), student, lambda d, n: d.heads[n]))


def _without_last_level(detector: PerLevel) -> PerLevel:
    shorter = copy.deepcopy(detector)
    del shorter.backbone.stages[-1], shorter.heads[-1]
    return shorter


def test_other_classes():
    """CrossKD's teacher judges both sides; mimicking compares column by column."""
    teacher, student = Shared(classes=5), Shared(seed=1)
    assert losses_of(teacher, student, adapter_for())["kd_cls"] > 0
    with pytest.raises(ValueError, match="teacher predicts 5 classes and the student 3: give class_map="):
        losses_of(teacher, student, adapter_for(), PredictionMimicking())
    losses = losses_of(teacher, student, adapter_for(), class_map=[4, 0, 2])
    chosen = copy.deepcopy(teacher)
    chosen.head.cls = nn.Conv2d(8, 3, 1)
    chosen.head.cls.weight.data = teacher.head.cls.weight.data[[4, 0, 2]]
    chosen.head.cls.bias.data = teacher.head.cls.bias.data[[4, 0, 2]]
    assert_close(losses, losses_of(chosen, student, adapter_for()))


def test_an_assignment_says_what_counts():
    def half(detector, predictions, anchors, targets):
        losses, positive = own_losses(detector, predictions, anchors, targets)
        return losses, Assignment(positive.float(), positive, torch.tensor(2.0))

    teacher, student = Shared(), Shared(seed=1)
    for options, normalizer in (({}, 80.0), ({"losses": half}, 2.0)):

        class Seen(CrossKD):
            def forward(self, step):
                assert step.assignment.normalizer == normalizer  # noqa: B023
                assert (step.assignment.label_weights is None) == (not options)  # noqa: B023
                return super().forward(step)

        assert losses_of(teacher, student, adapter_for(**options), Seen())["kd_cls"] > 0


def test_an_image_without_objects_counts_as_one_with_one():
    spec = adapter_for(losses=lambda d, p, *_: ({}, torch.zeros(p.logits.shape[:2], dtype=torch.bool)))
    predictions = Predictions(torch.zeros(3, 5, 3), torch.zeros(3, 5, 4), None)
    _, assignment = spec(Shared()).head.losses(predictions, Anchors(None, (5,)), Batch(pixels(), ()))
    assert assignment.normalizer == 3


def test_prepare_and_detect():
    teacher, student = Shared(), Shared(seed=1)
    calls = []

    def prepare(detector, images, targets):
        calls.append("prepare")
        return Batch(images * 2, ((16, 16),) * 2, targets=targets)

    adapter = adapter_for(
        prepare=prepare,
        own_losses=lambda detector, images, targets: detector(2 * images) and None,
        detect=lambda student, images: ("detected", student.training),
    )
    distiller = Distiller(teacher, student, CrossKD(), adapter)
    losses = distiller(pixels(), [])
    assert calls == ["prepare", "prepare"]  # once by the proof
    assert_close(losses, Distiller(teacher, student, CrossKD(), adapter_for())(2 * pixels(), []))
    assert distiller.eval()(pixels()) == ("detected", False)
    plain = Shared().eval()
    assert len(adapter_for()(plain).detect(pixels(), None)) == 2


def test_pixels_are_recoded():
    """Where both codings are known; where one is, nothing tells how to make one of the other."""
    double = PixelCoding((0.0,) * 3, (0.5,) * 3)
    specs = adapter_for(pixel_coding=double), adapter_for(pixel_coding=PixelCoding((0.0,) * 3, (1.0,) * 3))
    teacher, student = Shared(), Shared(seed=1)
    doubled = copy.deepcopy(teacher)
    doubled.backbone.stages[0].weight.data *= 2
    found = losses_of(teacher, student, specs[1], teacher_adapter=specs[0])
    assert_close(found, losses_of(doubled, student, adapter_for()))
    with pytest.raises(ValueError, match="how the student's pixels are coded, .* pixel_coding="):
        losses_of(teacher, student, adapter_for(), teacher_adapter=specs[0])


def test_what_the_sides_differ_in_may_be_a_function_of_the_detector():
    """The coding of the pixels, and the column that means no object."""
    codings = {"teacher": PixelCoding((0.0,) * 3, (0.5,) * 3), "student": PixelCoding((0.0,) * 3, (1.0,) * 3)}
    teacher, student = Shared(classes=5), Shared(seed=1)
    teacher.side, student.side = "teacher", "student"
    both = adapter_for(
        pixel_coding=lambda detector: codings[detector.side],
        background=lambda detector: detector.head.cls.out_channels - 1,
    )
    apart = {
        name: adapter_for(pixel_coding=codings[name], background=column)
        for name, column in (("teacher", 4), ("student", 2))
    }
    expected = losses_of(
        teacher, student, apart["student"], teacher_adapter=apart["teacher"], class_map=[1, 0, 4]
    )
    assert_close(losses_of(teacher, student, both, class_map=[1, 0, 4]), expected)
    with pytest.raises(ValueError, match=r"class_map\[2\] = 2.*background is wrong"):
        losses_of(teacher, student, adapter_for(background=2), class_map=[1, 0, 4])


# -- objects and label assignment -------------------------------------------------------------------


def located(detector, batch, maps) -> Tensor:
    """The centre of each location, shape (locations, 2)."""
    strides = [2 * getattr(detector, "offset", 1.0) ** 0, 4]
    levels = []
    for stride, feature_map in zip(strides, maps, strict=True):
        y, x = ((torch.arange(n) + 0.5) * stride for n in feature_map.shape[2:])
        levels.append(torch.cartesian_prod(y, x).flip(-1) + getattr(detector, "offset", 0.0))
    return torch.cat(levels)


def inside(detector, predictions, anchors, targets) -> Tensor:
    """Which points (batch, points) stand in a box."""
    found = []
    for target in targets:
        boxes = target["boxes"]
        after, before = anchors[:, None] > boxes[:, :2], anchors[:, None] < boxes[:, 2:]
        found.append((after & before).all(-1).any(-1))
    return torch.stack(found)


def inside_losses(detector, predictions, anchors, targets):
    positive = inside(detector, predictions, anchors, targets)
    return {"own": F.binary_cross_entropy_with_logits(predictions.logits[..., 0], positive.float())}, positive


def two_targets() -> list[dict[str, Tensor]]:
    boxes = torch.tensor([[0.0, 0.0, 6.0, 6.0]]), torch.tensor([[8.0, 4.0, 16.0, 12.0]])
    return [{"boxes": of_image, "labels": torch.tensor([1])} for of_image in boxes]


def test_objects_are_read_off_dicts_or_given():
    adapter = adapter_for()(Shared())
    targets = two_targets()
    batch = adapter.prepare(pixels(), targets)
    assert batch.image_sizes == ((16, 16), (16, 16))
    assert all(
        o.boxes is t["boxes"] and o.labels is t["labels"] for o, t in zip(batch.objects, targets, strict=True)
    )
    assert adapter.prepare(pixels(), None).objects is None
    assert adapter.prepare(pixels(), "annotations.json").objects is None
    rows = torch.tensor([[0, 1, 0.0, 0.0, 6.0, 6.0], [1, 2, 8.0, 4.0, 16.0, 12.0]])  # image, class, box
    given = adapter_for(
        objects=lambda rows: [(rows[rows[:, 0] == n, 2:], rows[rows[:, 0] == n, 1].long()) for n in (0, 1)]
    )
    objects = given(Shared()).prepare(pixels(), rows).objects
    assert [o.labels.tolist() for o in objects] == [[1], [2]]
    assert torch.equal(objects[1].boxes, targets[1]["boxes"])
    with pytest.raises(ValueError, match="got 2 images, but targets for 0"):
        adapter_for(objects=list)(Shared()).prepare(pixels(), [])
    with pytest.raises(ValueError, match="got 2 images, but targets for 1"):
        adapter.prepare(pixels(), targets[:1])
    targets[1]["boxes"][0, 2] = float("nan")
    with pytest.raises(ValueError, match=r"targets\[1\] has boxes that are not finite.*nan"):
        adapter.prepare(pixels(), targets)


def test_objects_may_be_lists():
    lists = [{name: part.tolist() for name, part in target.items()} for target in two_targets()]
    lists[1] = {"boxes": [], "labels": []}
    first, second = adapter_for()(Shared()).prepare(pixels(), lists).objects
    assert torch.equal(first.boxes, two_targets()[0]["boxes"])
    assert (first.labels.tolist(), second.boxes.shape, second.labels.dtype) == ([1], (0, 4), torch.int64)


def test_a_derived_class_stands_at_the_same_places():
    """Its predictions can be compared row by row; labels are assigned alike where the user says so."""

    class Derived(Shared):
        """Of another class than its teacher, and nothing else."""

    options = {"anchors": located, "losses": inside_losses}
    teacher, student, plain = Shared(), Derived(seed=1), Shared(seed=1)
    found, expected = (
        Distiller(teacher, one, PredictionMimicking(), adapter_for(**options))(pixels(), two_targets())
        for one in (student, plain)
    )
    assert_close(found, expected)
    with pytest.raises(ValueError, match=r"\[64, 16\] per level of .*Shared head .*Derived head"):
        losses_of(teacher, student, adapter_for(), PredictionMimicking())  # neither tells its places
    given = adapter_for(**options, objects=lambda targets: targets)
    with pytest.raises(ValueError, match=r"is of another type.*assign=.*head_type="):
        Distiller(teacher, student, CrossKD(), given)(pixels(), two_targets())
    named = adapter_for(**options, objects=lambda targets: targets, head_type="mine")
    assert Distiller(teacher, student, CrossKD(), named)(pixels(), two_targets())["kd_cls"] > 0


def test_error_losses_that_cannot_be_asked_for_the_teachers_assignment():
    def losses(detector, predictions, anchors, targets):
        return inside_losses(detector, predictions, anchors, [target.found for target in targets])

    def prepare(detector, images, targets):
        objects = None if targets is None else tuple(Objects(**target.found) for target in targets)
        return Batch(images, ((16, 16),) * len(images), targets=targets, objects=objects)

    teacher, student = Shared(), Shared(seed=1)
    teacher.offset = 4.0
    adapter = adapter_for(anchors=located, losses=losses, prepare=prepare)
    targets = [SimpleNamespace(found=target) for target in two_targets()]
    with pytest.raises(ValueError, match=r"teacher, a Shared, .*\(AttributeError: 'dict' .*found.*assign="):
        Distiller(teacher, student, CrossKD(), adapter)(pixels(), targets)


class Judged(Shared):
    """With a branch of its own for how well a box fits."""

    def __init__(self, width: int = 8, seed: int = 0) -> None:
        super().__init__(width, seed=seed)
        self.fit_tower = nn.Sequential(block(width), block(width))
        self.fit = nn.Conv2d(width, 1, 1)

    def forward(self, images: Tensor) -> Any:
        maps = self.backbone(images)
        return [(*self.head(level), self.fit(self.fit_tower(level))) for level in maps]


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_branch_of_quality_alone_is_tapped_where_quality_is_compared(weight):
    spec = adapter_for()
    adapter = replace(
        spec,
        towers={**spec.towers, "fit": "fit_tower"},
        predictors={**spec.predictors, "fit": {"quality": "fit"}},
    )
    method = CrossKD(position=1, quality_weight=weight)
    distiller = Distiller(Judged(12), Judged(8, seed=1), method, adapter)
    sum(distiller(pixels(), []).values()).backward()
    projections = distiller.methods["crosskd"].projections
    assert set(projections) == {"cls", "box", *["fit"] * (weight > 0)}
    assert all(parameter.grad is not None for parameter in projections.parameters())


def test_a_student_may_have_a_further_branch_without_a_tower():
    spec = adapter_for()
    further = replace(
        spec,
        towers={**spec.towers, "fit": None},
        predictors={**spec.predictors, "fit": {"quality": "fit"}},
    )
    student = Judged(seed=1)
    student.fit_tower = nn.Sequential()
    options = {"method": CrossKD(position=1), "teacher_adapter": spec}
    losses = losses_of(Judged(), student, further, **options)
    assert_close(losses, losses_of(Judged(), Judged(seed=1), spec, CrossKD(position=1)))


def test_a_teacher_at_other_places_assigns_labels_itself():
    """By what losses= returns, or by assign=; and predictions can't be compared row by row."""
    teacher, student = Shared(), Shared(seed=1)
    teacher.offset = 4.0
    expected = inside(teacher, None, located(teacher, None, teacher.backbone(pixels())), two_targets())
    own = inside(student, None, located(student, None, student.backbone(pixels())), two_targets())
    assert not torch.equal(expected, own)

    class Seen(CrossKD):
        def forward(self, step):
            seen.append((step.teacher_assignment(), step.assignment))
            return super().forward(step)

    options = {"anchors": located, "losses": inside_losses}
    for assign in (None, inside):
        seen: list[Any] = []
        distiller = Distiller(teacher, student, Seen(), adapter_for(**options, assign=assign))
        losses = distiller(pixels(), two_targets())
        theirs, ours = seen[0]
        assert torch.equal(theirs.positive, expected)
        assert torch.equal(ours.positive, own)
        normalizer = expected.sum(1).clamp(min=1).sum()
        assert theirs.normalizer == normalizer
        by_number = by_hand(teacher, student, lambda d, _: d.head)["kd_cls"] * 80 / normalizer
        torch.testing.assert_close(losses["kd_cls"], by_number)
    with pytest.raises(ValueError, match=r"on the first batch.*first \[5.0, 5.0\].*first \[1.0, 1.0\]"):
        Distiller(teacher, student, PredictionMimicking(), adapter_for(**options))(pixels(), two_targets())
    alone = adapter_for(anchors=located, losses=None)
    with pytest.raises(ValueError, match=r"teacher, a Shared, has other anchors .* generic\(\) assign="):
        Distiller(teacher, student, CrossKD(), adapter_for(**options), teacher_adapter=alone)(
            pixels(), two_targets()
        )


def test_a_teacher_of_a_class_that_an_adapter_knows():
    """torchvision's RetinaNet teaches a detector of one's own, whose boxes are distances around points."""
    teacher = tiny_retinanet()
    student = Strided(32, seed=1)
    spec = generic(
        features=lambda detector, images: detector.features(images),
        towers={"classification": "head.cls_tower", "regression": "head.box_tower"},
        predictors={"classification": {"logits": "head.cls"}, "regression": {"regression": "head.box"}},
        strides=(8, 16, 32),
        losses=own_losses,
        pixel_coding=PixelCoding((0.0,) * 3, (1.0,) * 3),
    )
    distiller = Distiller(
        teacher, student, [CrossKD(position=1), PKD()], spec, teacher_adapter=TorchvisionRetinaNet
    )
    losses = distiller(*batch_of_64())
    assert sorted(losses) == ["kd_cls", "kd_pkd", "kd_reg", "own"]
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    back = Distiller(student, teacher, PKD(), teacher_adapter=spec)
    assert back(*batch_of_64())["kd_pkd"] > 0


class Strided(Shared):
    """With levels of strides 8, 16 and 32."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width, levels=5, **options)

    def forward(self, images: Tensor) -> Any:
        return [self.head(feature_map) for feature_map in self.features(images)]

    def features(self, images: Tensor) -> list[Tensor]:
        return self.backbone(images)[2:]


def batch_of_64() -> tuple[Tensor, list[dict[str, Tensor]]]:
    images, targets = tiny_batch()
    return torch.stack([image[:, :64, :64] for image in images]), targets


# -- anchors in any form, of some levels alone ------------------------------------------------------


def strides_of(detector: Shared) -> list[int]:
    return [2 ** (level + 1) for level in range(len(detector.backbone.stages))]


def numbered(detector, batch, maps) -> list[Tensor]:
    """A row (level, level) for each location."""
    return [torch.full((m.shape[2:].numel(), 2), float(level)) for level, m in enumerate(maps)]


@pytest.mark.parametrize("form", ["tensor", "list", "list of anything", "nothing"])
def test_anchors_of_some_levels(form):
    """The teacher has a level that the student lacks: decode= gets the anchors of the others alone."""
    forms = {
        "tensor": lambda *arguments: torch.cat(numbered(*arguments)),
        "list": numbered,
        "list of anything": lambda d, batch, maps: [{"level": n} for n, _ in enumerate(maps)],
        "nothing": None,
    }
    teacher, student = Shared(levels=3), Shared(seed=1)
    adapter = adapter_for(anchors=forms[form], strides=strides_of)
    head = adapter(teacher).head
    maps = teacher.backbone(pixels())
    anchors = head.anchors(Batch(pixels(), ((16, 16),) * 2), maps)
    assert anchors.per_level == (64, 16, 4)
    fewer = anchors.of_levels([1, 2])
    assert fewer.per_level == (16, 4)
    levels = [1.0] * 16 + [2.0] * 4
    if form == "tensor":
        assert fewer.extra[:, 0].tolist() == fewer.boxes[:, 0].tolist() == levels
    elif form == "list":
        assert torch.cat(fewer.extra)[:, 0].tolist() == fewer.boxes[:, 0].tolist() == levels
    elif form == "list of anything":
        assert (fewer.extra, fewer.boxes) == ([{"level": 1}, {"level": 2}], None)
    else:
        assert fewer.extra is fewer.boxes is None
    assert losses_of(teacher, student, adapter)["kd_reg"] > 0


def test_anchors_that_can_not_be_taken_apart():
    adapter = adapter_for(anchors=lambda *_: {"places": torch.zeros(84, 2)}, strides=strides_of)
    assert losses_of(Shared(), Shared(seed=1), adapter)["kd_reg"] > 0
    with pytest.raises(ValueError, match="2 of the teacher's 3 levels .* dict, can't be found: .* 84 rows"):
        losses_of(Shared(levels=3), Shared(seed=1), adapter)


def test_a_predict_of_ones_own_with_several_anchors():
    """What anchors= returns tells how many a location has."""

    def predict(detector, level, towers):
        rows = [detector.head.cls(towers["cls"]), detector.head.box(towers["box"])]
        logits, regression = (r.flatten(2).mT.unflatten(2, (2, -1)).flatten(1, 2) for r in rows)
        return Predictions(logits, regression, None)

    def twice(detector, batch, maps):
        return [of_level.repeat_interleave(2, 0) for of_level in numbered(detector, batch, maps)]

    for form in (twice, lambda *arguments: torch.cat(twice(*arguments))):
        adapter = adapter_for(predict=predict, anchors=form, num_classes=CLASSES)
        anchors = adapter(Shared(anchors=2)).head.anchors(
            Batch(pixels(), ((16, 16),) * 2), Shared().backbone(pixels())
        )
        assert (anchors.per_level, anchors.boxes.shape) == ((128, 32), (160, 2))
        assert losses_of(Shared(anchors=2), Shared(anchors=2, seed=1), adapter)["kd_cls"] > 0


# -- rows that are a set ----------------------------------------------------------------------------


class Transformer(nn.Module):
    """A tiny DETR: a decoder's queries look at a map."""

    def __init__(self, width: int = 8, *, queries: int = 6, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = Backbone(width, 2)
            self.queries = nn.Parameter(torch.randn(queries, width))
            layer = nn.TransformerDecoderLayer(width, 2, 16, dropout=0.0, batch_first=True)
            self.decoder = nn.TransformerDecoder(layer, 1)
            self.tower = nn.Sequential(nn.Linear(width, width), nn.ReLU())
            self.cls, self.box = nn.Linear(width, CLASSES), nn.Linear(width, 4)

    def decode(self, maps: list[Tensor]) -> Tensor:
        memory = maps[-1].flatten(2).mT
        return self.decoder(self.queries.expand(len(memory), -1, -1), memory)

    def forward(self, images: Tensor) -> Any:
        features = self.tower(self.decode(self.backbone(images)))
        return self.cls(features), self.box(features)


def transformer_adapter(**options: Any) -> generic:
    settings: dict[str, Any] = {
        "features": "backbone",
        "strides": (2, 4),
        "widths": lambda detector: [stage.out_channels for stage in detector.backbone.stages],
        "queries": lambda detector, maps: detector.decode(maps),
        "towers": {"both": "tower"},
        "predictors": {"both": {"logits": "cls", "regression": "box"}},
        "losses": own_losses,
        "decode": as_boxes,
    }
    return generic(**{**settings, **options})


def permuted(detector: Transformer, order: list[int]) -> Transformer:
    """The same detector, its queries in another order."""
    other = copy.deepcopy(detector)
    other.queries.data = detector.queries.data[order]
    return other


FORMS: dict[str, dict[str, Any]] = {
    "queries=": {},
    "predict=": {
        "queries": None,
        "rows": "queries",
        "features": lambda d, images: d.backbone(images)[1:],
        "strides": (4,),
        "widths": lambda detector: [detector.backbone.stages[1].out_channels],
        "towers": {"both": None},
        "num_classes": CLASSES,
        "predict": lambda d, level, maps: Predictions(
            d.cls(d.tower(d.decode([maps["both"]]))), d.box(d.tower(d.decode([maps["both"]]))), None
        ),
    },
}


class MapDistance(Method):
    requires = frozenset({"maps"})

    def forward(self, step):
        pairs = zip(step.student.maps, step.teacher.maps, strict=True)
        return {"kd_maps": sum((ours - theirs).abs().mean() for ours, theirs in pairs)}


@pytest.mark.parametrize("form", FORMS)
def test_no_loss_that_is_accepted_depends_on_the_order_of_queries(form):
    spec = transformer_adapter(**FORMS[form])
    student = Transformer(seed=1)
    teachers = Transformer(), permuted(Transformer(), [3, 5, 0, 1, 4, 2])
    outputs = [teacher(pixels())[0] for teacher in teachers]
    torch.testing.assert_close(outputs[0][:, [3, 5, 0, 1, 4, 2]], outputs[1])
    assert not torch.allclose(*outputs)
    for method in (CrossKD(), CrossKD(position=0), PredictionMimicking()):
        with pytest.raises(ValueError, match="teacher's rows .* are a set of queries in no order"):
            Distiller(teachers[0], student, method, spec)
    for method in (PKD(), MapDistance(name="maps")):
        prove = form == "queries="  # the other form runs what is behind the maps twice
        losses, others = (
            Distiller(teacher, student, method, spec, prove=prove)(pixels(), []) for teacher in teachers
        )
        assert losses.keys() == others.keys() > {"own"}
        assert_close(losses, others)
        sum(losses.values()).backward()


@pytest.mark.parametrize("features", ["decode", "decode, transposed"])
def test_a_set_does_not_pass_as_a_grid(features):
    def queries(detector, images):
        found = detector.decode(detector.backbone(images))
        return found if features == "decode" else found.mT

    options: dict[str, Any] = {"features": queries, "queries": None, "strides": (4,), "widths": (8,)}
    teacher, student = Transformer(), Transformer(seed=1)
    with pytest.raises(ValueError, match=r'teacher: the both tower .* rows="grid" .* rows="queries"'):
        Distiller(teacher, student, CrossKD(), transformer_adapter(**options))
    # Nor do queries pass as feature maps.
    for method in (PKD(), MapDistance(name="maps")):
        distiller = Distiller(teacher, student, method, transformer_adapter(**options, rows="queries"))
        with pytest.raises(ValueError, match=r"made \[\(2, \d, \d\)\] for Transformer, .* queries="):
            distiller(pixels(), [])


def test_a_row_of_locations_under_convolutions_needs_rows_too():
    class Row(Shared):
        def __init__(self, **options):
            super().__init__(levels=1, **options)
            self.head.cls_tower = nn.Sequential(nn.Conv1d(8, 8, 1), nn.ReLU())
            self.head.box_tower = nn.Sequential(nn.Conv1d(8, 8, 1), nn.ReLU())
            self.head.cls, self.head.box = nn.Conv1d(8, CLASSES, 1), nn.Conv1d(8, 4, 1)

        def features(self, images):
            return self.backbone(images)[0].flatten(2)

        def forward(self, images):
            return self.head(self.features(images))

    def features(detector, images):
        return detector.features(images)

    with pytest.raises(ValueError, match=r"features= made \[\(2, 8, 64\)\] for Row, .* rows=\"grid\""):
        losses_of(Row(), Row(seed=1), adapter_for(features=features), prove=False)
    assert losses_of(Row(), Row(seed=1), adapter_for(features=features, rows="grid"))["kd_cls"] > 0


# -- the face ---------------------------------------------------------------------------------------


def test_images_may_be_a_list():
    teacher, student = Shared(), Shared(seed=1)
    distiller = Distiller(teacher, student, CrossKD(), adapter_for())
    assert_close(distiller(list(pixels()), []), distiller(pixels(), []))
    assert sorted(distiller(pixels())) == ["kd_cls", "kd_reg"]


def test_what_is_read_off_a_detector():
    adapter = adapter_for("heads.*.", strides=(2, 4))(PerLevel(anchors=(1, 2)))
    head = adapter.head
    assert (adapter.strides, adapter.widths) == ((2.0, 4.0), (8, 8))
    assert (head.num_classes, head.per_location, head.rows, head.decodes) == (CLASSES, (1, 2), "grid", True)
    assert head.head_type == "tests.adapters.test_generic.PerLevel"
    assert [len(branch.towers) for branch in head.branches] == [2, 2]
    assert sorted(head.branches[0].predictors) == ["logits[0]", "logits[1]"]
    assert adapter_for(head_type="GFL")(Shared()).head.head_type == "GFL"


def module_features(detector: Shared, images: Tensor) -> Any:
    return detector.backbone(images)


def test_a_spec_is_copied_and_pickled():
    spec = adapter_for(features=module_features)
    for twin in (copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))):
        losses = losses_of(Shared(), Shared(seed=1), twin)
        assert_close(losses, losses_of(Shared(), Shared(seed=1), spec))
    distiller = Distiller(Shared(), Shared(seed=1), CrossKD(), spec)
    for twin in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        assert twin.student_adapter.detector is twin.student
        assert_close(twin(pixels(), []), losses_of(Shared(), Shared(seed=1), spec))


def losses_alone(detector: Shared, images: Tensor, targets: Any) -> dict[str, Tensor]:
    levels = [detector.head(feature_map)[0] for feature_map in detector.backbone(images)]
    logits = torch.cat([of_level.flatten(2).mT for of_level in levels], dim=1)
    predictions = Predictions(logits, logits.new_zeros(*logits.shape[:2], 4), None)
    return own_losses(detector, predictions, None, targets)[0]


class Proper(Shared):
    """Called as a detector is, with losses in training."""

    def forward(self, images: Tensor, targets: Any = None) -> Any:
        return losses_alone(self, images, targets) if self.training else super().forward(images)


def doubled_losses(*arguments: Any) -> Any:
    losses, positive = own_losses(*arguments)
    return {"own": 2 * losses["own"]}, positive


@pytest.mark.parametrize("way", ["its own", "given"])
def test_the_pieces_are_compared_with_the_detectors_own_losses(way):
    options: dict[str, Any] = {} if way == "its own" else {"own_losses": losses_alone}
    build = Proper if way == "its own" else Shared
    assert losses_of(build(), build(seed=1), adapter_for(**options))["own"] > 0
    with pytest.raises(ValueError, match="student: .* own is .* alone and .* by its pieces"):
        losses_of(build(), build(seed=1), adapter_for(losses=doubled_losses, **options))


class Doubling(Shared):
    def forward(self, images: Tensor) -> Any:
        return [self.head(2 * feature_map) for feature_map in self.backbone(images)]


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_forward_of_another_kind_is_compared_by_its_layers(side):
    student = Doubling(seed=1) if side == "student" else Shared(seed=1)
    teacher = Doubling() if side == "teacher" else Shared()
    with pytest.raises(ValueError, match=f"{side}: .* part at head.cls_tower.0.0"):
        Distiller(teacher, student, CrossKD(), adapter_for())(pixels(), two_targets())
    losses = Distiller(teacher, student, CrossKD(), adapter_for(), prove=False)(pixels(), two_targets())
    assert losses["kd_cls"] > 0


def test_the_student_stays_plain_and_the_teacher_untouched():
    teacher, student = Shared(), Shared(seed=1)
    before, names = copy.deepcopy(teacher.state_dict()), list(student.state_dict())
    distiller = Distiller(teacher, student, CrossKD(), adapter_for())
    sum(distiller(pixels(), []).values()).backward()
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert list(distiller.student.state_dict()) == names
    assert isinstance(distiller.student_adapter, GenericAdapter)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"towers": {"cls": "head.cls_tower"}},
            r"same branches, .* got \['cls'\] and \{'cls': \['logits'\], 'b",
        ),
        ({"towers": {}, "predictors": {}}, "must name the same branches"),
        (
            {"predictors": {"cls": {"logits": "head.cls"}, "box": {}}},
            r"each with a predictor, got \['cls', 'box'\] and",
        ),
        (
            {"predictors": {"cls": {"logits": "head.cls"}, "box": {"boxes": "head.box"}}},
            r"one of regression .* got \['logits', 'boxes'\]: name them so, or pass predict=",
        ),
        (
            {"predictors": {"cls": {"logits": "head.cls"}, "box": {"logits": "head.box"}}},
            r"two predictors have one name: \['logits', 'logits'\]",
        ),
        ({"bins": 0}, "bins must be at least 1, got 0"),
        ({"rows": "regions"}, r"rows must be .* got 'regions'"),
        ({"rows": "grid", "queries": lambda *_: None}, r"with queries= the latter, got 'grid'"),
    ],
)
def test_settings_that_do_not_fit_together(options, message):
    with pytest.raises(ValueError, match=message):
        adapter_for(**options)


def test_decode_is_not_missed_where_no_boxes_are_compared():
    adapter = adapter_for(decode=None)
    with pytest.raises(ValueError, match='regression="giou".*pass it decode='):
        losses_of(Shared(), Shared(seed=1), adapter)
    losses = losses_of(Shared(), Shared(seed=1), adapter, CrossKD(reg_weight=0.0))
    assert sorted(losses) == ["kd_cls", "own"]


def named(branch: str, where: Any) -> dict[str, Any]:
    return {"towers": {"cls": "head.cls_tower", "box": "head.box_tower", branch: where}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"features": "backbon"},
            r"teacher: features: there is no module 'backbon' in Shared: Shared has no 'ba",
        ),
        (
            named("cls", "head.cls_towr"),
            r"towers\['cls'\]: there is no module 'head.cls_towr' in Shared: head has no 'cls_towr', but "
            r"\['cls_tower', 'box_tower', 'cls', 'box', 'quality'\]",
        ),
        (
            named("cls", "head.cls_tower.0.weight"),
            "head.cls_tower.0 has no 'weight', but 'no modules at all'|no mod",
        ),
        (
            named("box", "head.cls_tower.0.0.*"),
            r"towers\['box'\] must be a module of Shared or a list .* of \[\]",
        ),
        (named("cls", "head[0]"), r"no module 'head\[0\]' in Shared: Shared has no 'head\[0\]', but \['ba"),
        (
            {"features": "backbone.stages.*.*"},
            r"features: there is no module 'backbone.stages.\*.\*' in Shared: backbone.stages.\* has no '\*'",
        ),
        (named("box", lambda d: d.neck), r"towers\['box'\]: the function failed on Shared: AttributeError"),
        (named("box", lambda d: [1, 2]), r"one per level, got a list of \['int', 'int'\]"),
        (named("box", lambda d: None), "one per level, got NoneType"),
        (named("cls", "head.cls_tower.0.0"), "teacher: cls tower is a Conv2d, which cannot be split"),
        (
            named("cls", "head"),
            "teacher: cls tower is a Head, which cannot be split: expected an nn.Sequential",
        ),
        (
            {"predictors": {"cls": {"logits": "head.clss"}, "box": {"regression": "head.box"}}},
            r"teacher: predictors\['cls'\]\['logits'\]: there is no module 'head.clss' in Shared: head has",
        ),
        (
            {"predictors": {"cls": {"logits": "head.cls"}, "box": {"regression": "head.box_tower.0.1"}}},
            "teacher: the predictor ReLU has neither out_channels nor out_features, nor has a layer of it",
        ),
        (
            {"predictors": {"cls": {"logits": "head.cls"}, "box": {"regression": "head.quality"}}},
            r"teacher: the predictors of Shared give \{'logits': 3, 'regression': 1\} numbers per location",
        ),
        (
            {"bins": 8},
            "'regression': 4} .* don't fit 8 bins for each of 4 sides of each anchor.*: pass bins=",
        ),
        (
            {
                "predictors": {
                    "cls": {"logits": "head.cls"},
                    "box": {"regression": "head.box", "quality": "head.cls"},
                }
            },
            r"\{'logits': 3, 'regression': 4, 'quality': 3\} numbers .* and one quality: pass bins=",
        ),
        (
            {"towers": {"cls": "head.cls_tower", "box": lambda d: [d.head.box_tower] * 3}, "strides": [2, 4]},
            r"teacher: Shared has different numbers of levels: \{'strides': 2, 'towers of box': 3\}",
        ),
    ],
)
def test_what_a_detector_has_not_is_told_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        Distiller(Shared(), Shared(seed=1), CrossKD(), adapter_for(**options))


def test_the_side_that_lacks_a_module_is_named():
    student = Shared(seed=1)
    del student.head.box
    message = r"student: predictors\['box'\]\['regression'\]: there is no module 'head.box' in Shared"
    with pytest.raises(ValueError, match=message):
        Distiller(Shared(), student, CrossKD(), adapter_for())
    with pytest.raises(
        ValueError, match="student: .*there is no module 'heads.*' in Shared: Shared has no 'h"
    ):
        Distiller(PerLevel(), Shared(), CrossKD(), adapter_for("heads.*."))


def test_levels_of_one_head_that_know_other_classes():
    teacher = PerLevel()
    teacher.heads[1].cls = nn.Conv2d(8, 5, 1)
    with pytest.raises(
        ValueError, match=r"teacher: the predictors of PerLevel give \[3, 5\] classes.* each level must"
    ):
        Distiller(teacher, PerLevel(), CrossKD(), adapter_for("heads.*."))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"features": lambda d, images: d.backbone(images)[:1], "strides": [2, 4]},
            "features= made 1 feature maps for Shared, but its strides, towers or predictors are those of 2",
        ),
        ({"losses": lambda s, p, *_: {"a": 1, "b": 2}}, "losses= must return two things, .* got dict"),
        ({"losses": lambda s, p, *_: (p.logits.sum(), None)}, "got a tuple of .'Tensor', 'NoneType'."),
        (
            {"losses": lambda s, p, *_: ({}, torch.ones(2, 7, dtype=torch.bool))},
            r"mask of type bool and shape \(2, 80\), .* or an Assignment .* got torch.bool \(2, 7\)",
        ),
        (
            {"losses": lambda s, p, *_: ({}, torch.ones(2, 80))},
            r"mask of type bool .* got torch.float32 \(2, 80\)",
        ),
        ({"losses": lambda s, p, *_: ({}, None)}, "mask of type bool .* got NoneType"),
        (
            {"decode": lambda d, regression, _: regression[:, 0]},
            r"decode= must return boxes of shape \(2, 80, 4\), \(batch, anchors, 4\), got \(2, 4\)",
        ),
        ({"decode": lambda *_: None}, "decode= must return boxes of shape .* got NoneType"),
    ],
)
def test_what_functions_return_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        losses_of(Shared(), Shared(seed=1), adapter_for(**options))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (
            [torch.rand(3, 16, 16), torch.rand(3, 8, 8)],
            ValueError,
            r"of one shape, got \[\(3, 8, 8\), \(3, 16, 16",
        ),
        (["a.jpg"], TypeError, r"images must be tensors, got \['str'\]: convert them, or pass prepare="),
        ([], TypeError, "images must be tensors, got none"),
        (None, TypeError, r"images must be tensors, got \['NoneType'\]"),
    ],
)
def test_images_that_are_no_batch(images, error, message):
    with pytest.raises(error, match=message):
        Distiller(Shared(), Shared(seed=1), CrossKD(), adapter_for())(images, [])
