"""Detectors whose modules are named, and no class is written: paths, functions, layers of every kind."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from crosskd.methods.recipes import HeadRecipe
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.ops import box_iou

from crosskd import CrossKD, Distiller, PredictionMimicking, describe
from crosskd.adapters import (
    Adapter,
    GenericAdapter,
    Inputs,
    TorchvisionFCOSAdapter,
    TorchvisionRetinaNetAdapter,
)
from crosskd.adapters.torchvision import Locations, prepare_images
from crosskd.align import align_statistics
from crosskd.losses import giou_loss, quality_focal_loss
from crosskd.methods import recipes
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
    """One for all levels, or one of them a level."""

    def __init__(self, width: int, classes: int, anchors: int, bins: int, blocks: int) -> None:
        super().__init__()
        self.cls_tower = nn.Sequential(*(block(width) for _ in range(blocks)))
        self.box_tower = nn.Sequential(*(block(width) for _ in range(blocks)))
        self.cls = nn.Conv2d(width, anchors * classes, 1)
        self.box = nn.Conv2d(width, anchors * 4 * bins, 1)
        self.quality = nn.Conv2d(width, anchors, 1)


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


class PerLevel(nn.Module):
    """A detector with a head a level."""

    def __init__(self, width: int = 8, *, levels=2, anchors=(1, 1), seed=0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = Backbone(width, levels)
            self.heads = nn.ModuleList(Head(width, CLASSES, anchors[n], 1, 2) for n in range(levels))


def own_losses(student, predictions: Predictions, locations, targets) -> tuple[dict[str, Tensor], Tensor]:
    """Every second anchor holds an object of class 0."""
    positive = torch.arange(predictions.logits.shape[1]) % 2 == 0
    positive = positive.expand(predictions.logits.shape[:2])
    return {"own": F.binary_cross_entropy_with_logits(predictions.logits[..., 0], positive.float())}, positive


def as_boxes(detector, regression: Tensor, locations) -> Tensor:
    return torch.cat([-1 - regression[..., :2].exp(), 1 + regression[..., 2:].exp()], dim=-1)


def adapter_for(paths: str = "head.", **options: Any) -> GenericAdapter:
    settings: dict[str, Any] = {
        "features": "backbone",
        "towers": {"cls": f"{paths}cls_tower", "box": f"{paths}box_tower"},
        "predictors": {"cls": {"logits": f"{paths}cls"}, "box": {"regression": f"{paths}box"}},
        "losses": own_losses,
        "decode": as_boxes,
    }
    return GenericAdapter(**{**settings, **options})


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


# -- hand-written numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("anchors", [1, 3])
def test_a_head_for_all_levels_by_path(anchors):
    teacher, student = Shared(anchors=anchors), Shared(anchors=anchors, seed=1)
    losses = losses_of(teacher, student, adapter_for())
    assert sorted(losses) == ["kd_cls", "kd_reg", "own"]
    assert_close(losses, by_hand(teacher, student, lambda d, _: d.head, (anchors, anchors)))


@pytest.mark.parametrize("anchors", [(1, 1), (2, 3)])
def test_a_head_a_level_by_path(anchors):
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


def torchvision_adapter(family: str, **options: Any) -> GenericAdapter:
    """What torchvision's heads are made of, by name."""

    def prepare(teacher, student, images, targets):
        return prepare_images(teacher.transform, student.transform, images, targets, 4)

    def locations(detector, inputs, features):
        anchors = detector.anchor_generator(inputs.extra, list(features))
        return Locations(anchors, [f.shape[-2] * f.shape[-1] for f in features])

    return GenericAdapter(
        features="backbone",
        towers={n: f"head.{n}_head.conv" for n in ("classification", "regression")},
        prepare=prepare,
        locations=locations,
        recipe=getattr(recipes, family),
        **options,
    )


def retinanet_losses(student: RetinaNet, predictions, locations, targets):
    """Torchvision's loss, and the matches once more."""
    outputs = {"cls_logits": predictions.logits, "bbox_regression": predictions.regression}
    losses = student.compute_loss(targets, outputs, locations.anchors)
    matches = [
        student.proposal_matcher(box_iou(target["boxes"], anchors))
        for target, anchors in zip(targets, locations.anchors, strict=True)
    ]
    positive = torch.stack([match >= 0 for match in matches])
    counted = torch.stack(
        [(match != student.proposal_matcher.BETWEEN_THRESHOLDS).float() for match in matches]
    )
    return losses, Assignment(counted, positive, positive.sum(1).clamp(min=1).sum().float())


def retinanet_boxes(detector: RetinaNet, regression: Tensor, locations: Locations) -> Tensor:
    anchors = locations.stacked().flatten(0, 1)
    return detector.box_coder.decode_single(regression.flatten(0, 1), anchors).view_as(regression)


@pytest.mark.parametrize("method", [CrossKD(), CrossKD(position=2, tap="pre"), PredictionMimicking()])
@pytest.mark.parametrize("width", [32, 16])
def test_retinanet_by_paths_is_retinanet_by_its_adapter(method, width):
    named = torchvision_adapter(
        "RETINANET",
        predictors={
            "classification": {"logits": "head.classification_head.cls_logits"},
            "regression": {"regression": "head.regression_head.bbox_reg"},
        },
        losses=retinanet_losses,
        decode=retinanet_boxes,
    )
    results = []
    for adapter in (named, TorchvisionRetinaNetAdapter()):
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


def fcos_losses(student, predictions, locations, targets):
    return TorchvisionFCOSAdapter().losses(
        student, predictions, locations, Inputs(torch.empty(0), torch.empty(0), targets)
    )


def fcos_boxes(detector, regression: Tensor, locations: Locations) -> Tensor:
    return detector.head.box_coder.decode(regression, locations.stacked())


def fcos_adapter(**options: Any) -> GenericAdapter:
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
        for adapter in (fcos_adapter(predict=fcos_level), TorchvisionFCOSAdapter())
    )
    assert losses.keys() == expected.keys()
    assert_close(losses, expected)


def test_quality_as_it_comes():
    """FCOS's own numbers, but for the ReLU."""
    predictions = []
    towers = {name: torch.randn(2, 32, 4, 5) for name in ("classification", "regression")}
    detector = tiny_fcos()
    for adapter in (fcos_adapter(), fcos_adapter(predict=fcos_level)):
        predictions.append(adapter.predict(detector, 0, towers))
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


def fully_adapter(**options: Any) -> GenericAdapter:
    settings: dict[str, Any] = {
        "features": lambda detector, images: detector.features(images),
        "towers": {"both": "tower"},
        "predictors": {"both": {"logits": "cls", "regression": "box"}},
        "losses": own_losses,
        "decode": as_boxes,
    }
    return GenericAdapter(**{**settings, **options})


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
        projection.convolution.bias.zero_()
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
    assert nothing.recipe.position == 0
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
    with pytest.raises(ValueError, match=r"features \(2, 7, 8\) are no map of \(height, width\)"):
        losses_of(Fully(space=(7,)), Fully(space=(5,)), fully_adapter(), resize_levels=True)


def test_predictors_without_a_tower_a_level():
    """As in SSD: each level has a width and predictors of its own."""
    teacher, student = PerLevel(12), PerLevel(8, seed=1)
    adapter = adapter_for("heads.*.", towers={"cls": None, "box": None})
    distiller = Distiller(teacher, student, CrossKD(), adapter)
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
    assert (adapter.recipe.regression, adapter.recipe.reg_weight) == ("distribution_kl", 4.0)
    teacher, student = Shared(bins=5, anchors=2), Shared(bins=5, anchors=2, seed=1)
    distiller = Distiller(teacher, student, CrossKD(), adapter)
    losses = distiller(pixels(), [])
    assert losses["kd_reg"] > 0
    features = teacher.backbone(pixels())[0]
    towers = {"cls": teacher.head.cls_tower(features), "box": teacher.head.box_tower(features)}
    predictions = adapter.predict(teacher, 0, towers)
    assert predictions.regression.shape == (2, 8 * 8 * 2, 4, 5)
    # Location (3, 2), its second anchor, third side: channels 4 * 5 + 2 * 5 and on.
    expected = teacher.head.box(towers["box"])[:, 30:35, 3, 2]
    torch.testing.assert_close(predictions.regression[:, (3 * 8 + 2) * 2 + 1, 2], expected)
    with pytest.raises(ValueError, match=r"decode= is missing: .* leave the method's regression= and"):
        losses_of(teacher, student, adapter, CrossKD(regression="giou"))


def test_distributions_with_decode_may_be_compared_as_boxes():
    def expected_boxes(detector, regression, locations):
        distance = (regression.softmax(-1) * torch.arange(5.0)).sum(-1)
        return torch.cat([-distance[..., :2], distance[..., 2:]], dim=-1)

    teacher, student = Shared(bins=5), Shared(bins=5, seed=1)
    adapter = adapter_for(bins=5, decode=expected_boxes)
    assert adapter.recipe.regression == "giou"
    assert losses_of(teacher, student, adapter)["kd_reg"] > 0


def test_a_predict_of_ones_own_may_have_one_predictor_for_all():
    """As in many one-stage heads: one convolution gives boxes and classes."""

    class Joint(Shared):
        def __init__(self, **options):
            super().__init__(**options)
            self.out = nn.Conv2d(8, 4 + CLASSES, 1)

    def split(detector, level, towers):
        rows = detector.out(towers["cls"]).flatten(2).mT
        return Predictions(rows[..., 4:], rows[..., :4], None)

    options: dict[str, Any] = {
        "towers": {"cls": "head.cls_tower"},
        "predictors": {"cls": {"all": "out"}},
        "predict": split,
    }
    with pytest.raises(ValueError, match="can't be read off predictors named \\['all'\\]: pass num_classes="):
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


def test_a_head_a_level_by_stride():
    def strides(detector):
        return [2 ** (n + 1) for n in range(len(detector.heads))]

    teacher, student = PerLevel(levels=3, anchors=(1, 1, 1)), PerLevel(seed=1)
    losses = losses_of(teacher, student, adapter_for("heads.*.", strides=strides))
    assert_close(losses, by_hand(_without_last_level(teacher), student, lambda d, n: d.heads[n]))


def _without_last_level(detector: PerLevel) -> PerLevel:
    shorter = copy.deepcopy(detector)
    del shorter.backbone.stages[-1], shorter.heads[-1]
    return shorter


def test_class_map():
    teacher, student = Shared(classes=5), Shared(seed=1)
    with pytest.raises(ValueError, match="teacher predicts 5 classes and the student 3: give class_map="):
        losses_of(teacher, student, adapter_for())
    losses = losses_of(teacher, student, adapter_for(), class_map=[4, 0, 2])
    chosen = copy.deepcopy(teacher)
    chosen.head.cls = nn.Conv2d(8, 3, 1)
    chosen.head.cls.weight.data = teacher.head.cls.weight.data[[4, 0, 2]]
    chosen.head.cls.bias.data = teacher.head.cls.bias.data[[4, 0, 2]]
    assert_close(losses, losses_of(chosen, student, adapter_for()))


def test_an_assignment_says_what_counts():
    def half(student, predictions, locations, targets):
        losses, positive = own_losses(student, predictions, locations, targets)
        return losses, Assignment(positive.float(), positive, torch.tensor(2.0))

    teacher, student = Shared(), Shared(seed=1)
    for options, normalizer in (({}, 80.0), ({"losses": half}, 2.0)):

        class Seen(CrossKD):
            def forward(self, step):
                assert step.assignment.normalizer == normalizer  # noqa: B023
                assert (step.assignment.counted is None) == (not options)  # noqa: B023
                return super().forward(step)

        assert losses_of(teacher, student, adapter_for(**options), Seen())["kd_cls"] > 0


def test_an_image_without_objects_counts_as_one_with_one():
    adapter = adapter_for(losses=lambda s, p, *_: ({}, torch.zeros(p.logits.shape[:2], dtype=torch.bool)))
    predictions = Predictions(torch.zeros(3, 5, 1), torch.zeros(3, 5, 4), None)
    _, assignment = adapter.losses(Shared(), predictions, None, Inputs(pixels(), pixels(), []))
    assert assignment.normalizer == 3


def test_detect_prepare_check_and_the_detectors_class():
    teacher, student = Shared(), Shared(seed=1)
    calls = []

    def prepare(teacher, student, images, targets):
        calls.append("prepare")
        return Inputs(images * 2, images * 2, targets)

    adapter = adapter_for(
        prepare=prepare,
        detect=lambda student, images: ("detected", student.training),
        check=lambda teacher, student: calls.append("check"),
        detector=Shared,
    )
    distiller = Distiller(teacher, student, CrossKD(), adapter)
    losses = distiller(pixels(), [])
    assert calls == ["check", "prepare"]
    assert_close(losses, Distiller(teacher, student, CrossKD(), adapter_for())(2 * pixels(), []))
    assert distiller.eval()(pixels()) == ("detected", False)
    with pytest.raises(TypeError, match="GenericAdapter does not support the teacher, a PerLevel"):
        Distiller(PerLevel(), PerLevel(), CrossKD(), adapter)
    plain = nn.Sequential(nn.Flatten())
    assert torch.equal(adapter_for().detect(plain, pixels(), None), pixels().flatten(1))


def test_images_may_be_a_list():
    teacher, student = Shared(), Shared(seed=1)
    distiller = Distiller(teacher, student, CrossKD(), adapter_for())
    assert_close(distiller(list(pixels()), []), distiller(pixels(), []))
    assert sorted(distiller(pixels())) == ["kd_cls", "kd_reg"]


def test_the_protocol_and_a_description():
    adapter = adapter_for("heads.*.")
    assert isinstance(adapter, Adapter)
    text = describe(PerLevel(), adapter)
    assert "branch cls: 2 blocks, level 1, valid positions 0 to 2" in text
    assert "predictors: logits[0] (3 channels), logits[1] (3 channels)" in text
    assert "logits (6 channels), regression (8 channels)" in describe(Fully(space=()), fully_adapter())


def test_the_student_stays_plain_and_the_teacher_untouched():
    teacher, student = Shared(), Shared(seed=1)
    before, names = copy.deepcopy(teacher.state_dict()), list(student.state_dict())
    distiller = Distiller(teacher, student, CrossKD(), adapter_for())
    sum(distiller(pixels(), []).values()).backward()
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert list(distiller.student.state_dict()) == names
    assert isinstance(copy.deepcopy(distiller).adapter, GenericAdapter)


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
        (
            {"features": "backbone.*"},
            r"features: 'backbone.\*' is no attribute path, such as 'head.tower'; a",
        ),
        (
            {"towers": {"cls": "heads.*.*", "box": "head.box_tower"}},
            r"towers\['cls'\]: 'heads.\*.\*' is no .* or, with one \* for all levels, 'heads.\*.tower'; a",
        ),
        (
            {"towers": {"cls": "heads[0]", "box": "head"}},
            r"towers\['cls'\]: 'heads\[0\]' is no attribute path",
        ),
        ({"towers": {"cls": "tower*", "box": "head"}}, r"'tower\*' is no attribute path"),
        ({"bins": 0}, "bins must be at least 1, got 0"),
        ({"decode": None}, r"boxes are to be compared \(giou\), but decode= is missing: pass the function"),
        (
            {"decode": None, "bins": 3, "recipe": recipes.FCOS},
            r"compared \(log_iou\), but decode= is missing",
        ),
    ],
)
def test_settings_that_do_not_fit_together(options, message):
    with pytest.raises(ValueError, match=message):
        adapter_for(**options)


def test_decode_is_not_missed_where_no_boxes_are_compared():
    recipe = HeadRecipe("mine", 1, cls_weight=1.0, reg_weight=0.0, regression="giou")
    losses = losses_of(Shared(), Shared(seed=1), adapter_for(decode=None, recipe=recipe))
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
        (named("box", lambda d: d.neck), r"towers\['box'\]: the function failed on Shared: AttributeError"),
        (named("box", lambda d: [1, 2]), r"one a level, got a list of \['int', 'int'\]"),
        (named("box", lambda d: None), "one a level, got NoneType"),
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
            r"teacher: the predictors of Shared give \{'logits': 3, 'regression': 1\} numbers a location",
        ),
        (
            {"bins": 8},
            "'regression': 4} .* don't fit 8 bins for each of 4 sides of each anchor.*: tell bins=",
        ),
        (
            {
                "predictors": {
                    "cls": {"logits": "head.cls"},
                    "box": {"regression": "head.box", "quality": "head.cls"},
                }
            },
            r"\{'logits': 3, 'regression': 4, 'quality': 3\} numbers .* and one quality: tell bins=",
        ),
        (
            {"towers": {"cls": "head.cls_tower", "box": lambda d: [d.head.box_tower] * 3}, "strides": [2, 4]},
            r"teacher: Shared has not as many of each a level: \{'strides': 2, 'towers of box': 3\}",
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
        ValueError, match=r"teacher: PerLevel predicts \[3, 5\] classes, not as many on each lev"
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
            r"mask of type bool and shape \(2, 80\), .* or an Assignment, got torch.bool \(2, 7\)",
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
    ],
)
def test_images_that_are_no_batch(images, error, message):
    with pytest.raises(error, match=message):
        Distiller(Shared(), Shared(seed=1), CrossKD(), adapter_for())(images, [])


def test_the_pairs_own_check():
    def refuse(teacher, student):
        raise ValueError("anchors differ")

    with pytest.raises(ValueError, match="anchors differ"):
        Distiller(Shared(), Shared(seed=1), CrossKD(), adapter_for(check=refuse))


def points(detector, inputs, features) -> dict[str, Any]:
    """Places a level, an offset of the detector's own, and the levels' numbers."""
    numbers = torch.arange(len(features))
    return {"places": [torch.rand(5, 2) * 0 + getattr(detector, "offset", 1.0)], "numbers": numbers}


def test_places_that_differ_are_refused_on_the_first_step():
    teacher, student = Shared(), Shared(seed=1)
    adapter = adapter_for(locations=points)
    assert losses_of(teacher, student, adapter)["kd_cls"] > 0
    student.offset = 2.0
    with pytest.raises(ValueError, match=r"locations of the first batch, \(5, 2\), have other values for"):
        losses_of(teacher, student, adapter)


def test_places_of_another_scale():
    """A teacher of twice the strides sees images of twice the size."""
    teacher, student = Shared(), Shared(seed=1)
    teacher.backbone.stages[0].stride = (4, 4)
    teacher.offset = 2.0
    adapter = adapter_for(
        locations=points, strides=lambda d: [n * d.backbone.stages[0].stride[0] for n in (1, 2)]
    )

    def view(images, targets):
        return F.interpolate(images, scale_factor=2.0)

    assert losses_of(teacher, student, adapter, teacher_view=view)["kd_cls"] > 0
    teacher.offset = 3.0
    with pytest.raises(ValueError, match="have other values for the teacher"):
        losses_of(teacher, student, adapter, teacher_view=view)


def test_recipe_is_what_was_given():
    recipe = dataclasses.replace(recipes.RETINANET, position=2)
    distiller = Distiller(Shared(), Shared(seed=1), CrossKD(), adapter_for(recipe=recipe))
    assert distiller.methods["crosskd"].position == 2
