"""The detectors of ``examples/dense_heads`` in a distiller, within a family and across families."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense_heads import ATSSAdapter, GFLAdapter, adapter_of
from dense_heads.detector import OUTSIDE
from torch import Tensor, nn
from torchvision.ops import box_iou, generalized_box_iou_loss

from crosskd import PKD, CrossKD, Distiller, PredictionMimicking
from crosskd.adapters import Adapter, TorchvisionRetinaNet, find_adapter
from crosskd.step import run_head
from tests.examples.dense_heads.small import CLASSES, FAMILIES, batch_with_and_without_objects, small
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet

families = pytest.mark.parametrize("family", FAMILIES)
ADAPTERS = {"gfl": GFLAdapter, "atss": ATSSAdapter}
OWN = {
    "gfl": {"classification", "bbox_regression", "distribution"},
    "atss": {"classification", "bbox_regression", "bbox_ctrness"},
}
DISTILLED = {"gfl": {"kd_cls", "kd_reg"}, "atss": {"kd_cls", "kd_reg", "kd_quality"}}


def distiller_of(family: str, method=None, **teacher) -> Distiller:
    return Distiller(small(family, seed=1, **teacher), small(family), method or CrossKD(), adapter_of)


@families
def test_an_adapter_is_found_by_type(family):
    adapter = adapter_of(small(family))
    assert type(adapter) is ADAPTERS[family]
    assert isinstance(adapter, Adapter)
    assert (adapter.strides, adapter.widths) == ((8.0, 16.0, 32.0), (32, 32, 32))
    (head,) = adapter.heads
    assert (head.head_type, head.num_classes) == (family.upper(), CLASSES)
    assert head.bins == {"gfl": 17, "atss": 1}[family]
    assert type(adapter_of(tiny_retinanet())) is TorchvisionRetinaNet
    with pytest.raises(TypeError, match="no adapter understands"):
        find_adapter(small(family))


@families
@pytest.mark.parametrize("method", [CrossKD, PredictionMimicking])
def test_the_students_own_losses_are_its_own(family, method):
    images, targets = batch_with_and_without_objects()
    distiller = distiller_of(family, method())
    alone = copy.deepcopy(distiller.student)(images, copy.deepcopy(targets))
    losses = distiller(images, targets)
    assert losses.keys() == OWN[family] | DISTILLED[family]
    assert alone.keys() == OWN[family]
    for name, loss in alone.items():
        torch.testing.assert_close(losses[name], loss, rtol=0, atol=0)
    assert all(losses[name] > 0 for name in DISTILLED[family])


@families
@pytest.mark.parametrize("batch", [1, 2])
def test_distillation_reaches_the_tower_before_the_split_and_nothing_behind_it(family, batch):
    distiller = distiller_of(family, CrossKD(position=2))
    losses = distiller(*tiny_batch(batch))
    sum(losses[name] for name in DISTILLED[family]).backward()
    head = distiller.student.head
    for name, parameter in head.named_parameters():
        part = re.match(r"(classification|regression)_tower\.([01])\.", name)
        moved = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert moved == bool(part), name
    assert next(distiller.student.backbone.parameters()).grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:crosskd. kd_quality is exactly 0")  # no positive anchor, no centerness
@families
def test_images_without_objects_are_distilled_too(family):
    images, targets = batch_with_and_without_objects()
    losses = distiller_of(family)(images[1:], targets[1:])
    assert losses["kd_cls"] > 0
    assert losses["kd_reg"] > 0
    sum(losses.values()).backward()


@families
def test_the_padding_of_smaller_images_does_not_count(family):
    """Neither in the losses' assignment nor in a teacher's, which is made of the batch's objects."""
    images, targets = batch_with_and_without_objects()
    student = small(family)
    adapter = adapter_of(student)
    (head,) = adapter.heads
    batch = adapter.prepare(images, targets)
    maps = adapter.maps(batch.pixels)
    predictions, anchors = run_head(head, maps, range(3)).predictions, head.anchors(batch, maps)
    matches = student.match(student.grid(student.transform(images)[0], maps), batch.targets)
    for assignment in (head.losses(predictions, anchors, batch)[1], head.assign(predictions, anchors, batch)):
        assert torch.equal(assignment.label_weights == 0, matches == OUTSIDE)
        assert (assignment.label_weights == 0).any(dim=1).tolist() == [True, False]
        assert torch.equal(assignment.positive, matches >= 0)
        assert assignment.normalizer == assignment.positive.sum(1).clamp(min=1).sum()


@families
def test_towers_and_predictors_together_are_the_head(family):
    detector = small(family)
    features = list(detector.backbone(torch.rand(2, 3, 64, 96)).values())
    predictions = run_head(adapter_of(detector).heads[0], features, range(3)).predictions
    outputs = detector.head(features)
    found = (predictions.logits, predictions.regression, predictions.quality)
    for mine, own in zip(found, outputs, strict=True):
        assert (mine is None) == (own is None)
        if own is not None:
            torch.testing.assert_close(mine, own, rtol=0, atol=0)


@families
def test_a_teacher_of_another_width_and_an_unlabelled_batch(family):
    distiller = distiller_of(family, width=64)
    assert set(distiller.methods["crosskd"].projections) == {"classification", "regression"}
    assert distiller(tiny_batch()[0]).keys() == DISTILLED[family]


@families
@torch.no_grad()
def test_eval_and_state_are_the_students(family):
    distiller = distiller_of(family)
    images = tiny_batch()[0]
    expected = copy.deepcopy(distiller.student).eval()(images)
    for found, wanted in zip(distiller.eval()(images), expected, strict=True):
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    small(family).load_state_dict(distiller.student.state_dict())
    assert not any("teacher" in key for key in distiller.state_dict())


@families
def test_autocast(family):
    with torch.autocast("cpu", torch.bfloat16):
        losses = distiller_of(family)(*batch_with_and_without_objects())
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


@pytest.mark.slow
@families
def test_compiled_steps_have_the_same_losses(family):
    distiller, batch = distiller_of(family), tiny_batch()
    expected = distiller(*batch)
    found = torch.compile(distiller, backend="eager")(*batch)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("teacher", "student", "complaint"),
    [
        ({"classes": 5}, {}, "the teacher predicts 5 classes and the student 4: give class_map="),
        (
            {},
            {"strides": (8, 16, 32, 64)},
            r"strides differ: \[8.0, 16.0, 32.0\] \(teacher\), \[8.0, 16.0, 32.0, 64.0\] \(student\)",
        ),
        ({}, {"anchor_scale": 8.0}, r"anchors differ .* \[-16.0, -16.0, 16.0, 16.0\].* \[-32.0, -32.0, 32"),
        ({"reg_max": 8}, {}, r"over 9 \(teacher\), 17 \(student\) bins"),
    ],
)
def test_pairs_that_can_not_be_compared_row_by_row_are_refused(teacher, student, complaint):
    teacher, student = small("gfl", **teacher), small("gfl", seed=1, **student)
    with pytest.raises(ValueError, match=complaint):
        Distiller(teacher, student, PredictionMimicking(), adapter_of)(*tiny_batch())


def test_crosskd_takes_other_classes_anchors_and_bins():
    teacher = small("gfl", classes=7, anchor_scale=8.0, reg_max=8)
    losses = Distiller(teacher, small("gfl", seed=1), CrossKD(), adapter_of)(*tiny_batch())
    assert losses.keys() == OWN["gfl"] | DISTILLED["gfl"]
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


@families
def test_a_student_may_lack_the_teachers_coarsest_level(family):
    student = small(family, strides=(8, 16))
    del student.backbone.stages[2:], student.backbone.laterals[2:]
    distiller = Distiller(small(family, seed=1), student, [CrossKD(), PKD()], adapter_of)
    losses = distiller(*tiny_batch())
    assert losses.keys() == OWN[family] | DISTILLED[family] | {"kd_pkd"}
    assert all(loss.isfinite() for loss in losses.values())


@families
def test_targets_that_do_not_fit_are_refused(family):
    images, targets = tiny_batch()
    targets[0]["labels"][0] = 4
    with pytest.raises(
        ValueError, match=r"targets\[0\] has labels from \d to 4, but the detector predicts 4"
    ):
        distiller_of(family)(images, targets)


@families
def test_a_forward_of_another_kind_is_refused(family):
    """On the first step, on either side, with the place where it parts from the pieces."""

    class Louder(type(small(family).head)):
        def forward(self, features):
            return super().forward([2 * feature_map for feature_map in features])

    for side in ("teacher", "student"):
        distiller = distiller_of(family)
        getattr(distiller, side).head.__class__ = Louder
        with pytest.raises(ValueError, match=f"{side}: .* part at head.classification_tower.0.0"):
            distiller(*tiny_batch())


# -- across families, against a calculation of its own in float64 -------------------------------------


def tower_of(detector: Any, branch: str) -> nn.Sequential:
    if hasattr(detector.head, f"{branch}_head"):
        return getattr(detector.head, f"{branch}_head").conv
    return getattr(detector.head, f"{branch}_tower")


def predicted(detector: Any, level: int, towers: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits (batch, rows, classes), regression (batch, rows, ...), centerness (batch, rows)."""
    head = detector.head
    if not hasattr(head, "classification_head"):
        sides = (head.scales[level] * head.regression(towers["regression"])).flatten(2).mT
        sides = sides.unflatten(2, (4, -1)) if head.bins else sides
        quality = None if head.centerness is None else head.centerness(towers["regression"]).flatten(1)
        return head.logits(towers["classification"]).flatten(2).mT, sides, quality
    outputs = (
        head.classification_head.cls_logits(towers["classification"]),
        head.regression_head.bbox_reg(towers["regression"]),
    )
    anchors = outputs[1].shape[1] // 4
    logits, sides = (o.unflatten(1, (anchors, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3) for o in outputs)
    return logits, sides, None


def both_predictions(teacher: Any, student: Any, pixels: Tensor) -> Any:
    """The teacher's predictions and those of its head on the student's features, with three blocks each."""
    sides: Any = [[], []]
    maps = [detector.backbone(pixels).values() for detector in (teacher, student)]
    for level, (theirs, ours) in enumerate(zip(*maps, strict=True)):
        towers: Any = [{}, {}]
        for branch in ("classification", "regression"):
            blocks, own = tower_of(teacher, branch), tower_of(student, branch)
            after, before = blocks[:3](theirs), own[:3](ours)
            dims = (0, 2, 3)
            mean, std = (f(after, dims, keepdim=True) for f in (torch.mean, torch.std))
            own_mean, own_std = (f(before, dims, keepdim=True) for f in (torch.mean, torch.std))
            aligned = ((before - own_mean) / (own_std + 1e-6) * std + mean).relu()
            for side, features in zip(towers, (after, aligned), strict=True):
                side[branch] = blocks[3:](features)
        for side, of_level in zip(sides, towers, strict=True):
            side.append(predicted(teacher, level, of_level))
    joined = []
    for side in sides:
        parts = zip(*side, strict=True)
        joined.append([None if part[0] is None else torch.cat(part, dim=1) for part in parts])
    return joined


def assigned(teacher: Any, batch: Any, maps: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor, Any]:
    """Which of the teacher's anchors count and which are positive, (batch, anchors); decodes boxes."""
    if hasattr(teacher, "grid"):
        grid = teacher.grid(batch, maps)
        matches = teacher.match(grid, [{"boxes": of_image} for of_image in boxes])
        return matches != OUTSIDE, matches >= 0, lambda regression: teacher.decode(regression, grid)
    anchors = teacher.anchor_generator(batch, maps)[0]
    matches = torch.stack([teacher.proposal_matcher(box_iou(of_image, anchors)) for of_image in boxes])

    def decode(regression):
        rows = [teacher.box_coder.decode_single(of_image, anchors) for of_image in regression]
        return torch.stack(rows)

    return matches != teacher.proposal_matcher.BETWEEN_THRESHOLDS, matches >= 0, decode


def losses_by_hand(teacher: Any, student: Any, images: Any, targets: Any) -> dict[str, Tensor]:
    batch, resized = student.transform(images, targets)
    boxes = [target["boxes"] for target in resized]
    theirs, cross = both_predictions(teacher, student, batch.tensors)
    maps = list(teacher.backbone(batch.tensors).values())
    counts, positive, decode = assigned(teacher, batch, maps, boxes)
    normalizer = positive.sum(1).clamp(min=1).sum()
    scores = theirs[0].sigmoid()
    entropy = F.binary_cross_entropy_with_logits(cross[0], scores, reduction="none")
    focal = (cross[0].sigmoid() - scores).abs() * entropy * counts[..., None]
    weights = scores.amax(-1) * counts
    losses = {"kd_cls": focal.sum() / normalizer}
    if theirs[1].ndim == 4:
        log, target = cross[1].log_softmax(-1), theirs[1].softmax(-1)
        divergence = (target * (target.log() - log)).sum(-1)
        losses["kd_reg"] = 4 * (divergence * weights[..., None]).sum() / (4 * weights.sum())
    else:
        pairs = (decode(regression).flatten(0, 1) for regression in (cross[1], theirs[1]))
        losses["kd_reg"] = (generalized_box_iou_loss(*pairs) * weights.flatten()).sum() / normalizer
    if theirs[2] is not None:
        entropy = F.binary_cross_entropy_with_logits(cross[2], theirs[2].sigmoid(), reduction="none")
        losses["kd_quality"] = (entropy * positive).sum() / normalizer
    return losses


TEACHERS = {
    "gfl": lambda classes: small("gfl", classes=classes, seed=3),
    "atss": lambda classes: small("atss", classes=classes, seed=3),
    "retinanet": lambda classes: tiny_retinanet(classes, seed=3),
}


@pytest.mark.parametrize("classes", [CLASSES, 7])
@pytest.mark.parametrize(
    ("teacher", "student"), [("retinanet", "gfl"), ("retinanet", "atss"), ("gfl", "atss"), ("atss", "gfl")]
)
def test_a_teacher_of_another_family(teacher, student, classes):
    theirs, ours = TEACHERS[teacher](classes).double(), small(student, seed=1).double()
    images, targets = tiny_batch(num_classes=CLASSES)
    images = [image.double() for image in images]
    targets = [{**target, "boxes": target["boxes"].double()} for target in targets]
    distiller = Distiller(theirs, ours, [CrossKD(), PKD()], adapter_of)
    losses = distiller(images, copy.deepcopy(targets))
    expected = losses_by_hand(theirs, ours, images, copy.deepcopy(targets))
    assert losses.keys() == OWN[student] | expected.keys() | {"kd_pkd"}
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-9, atol=1e-12)
    alone = copy.deepcopy(ours)(images, copy.deepcopy(targets))
    assert all(torch.equal(losses[name], loss) for name, loss in alone.items())
    sum(losses.values()).backward()
    assert next(ours.backbone.parameters()).grad.abs().max() > 0


@families
def test_the_other_way_round(family):
    """They teach torchvision's detectors, and are taught by FCOS."""
    teacher, batch = small(family, seed=3), tiny_batch(num_classes=CLASSES)
    for student in (tiny_retinanet(), tiny_fcos()):
        losses = Distiller(teacher, student, CrossKD(), adapter_of)(*batch)
        assert DISTILLED[family] <= losses.keys()
        assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    losses = Distiller(tiny_fcos(), teacher, CrossKD(), adapter_of)(*batch)
    assert losses.keys() >= {"kd_cls", "kd_reg"}
