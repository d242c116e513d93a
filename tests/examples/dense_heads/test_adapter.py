"""The detectors of ``examples/dense_heads`` in a distiller, through the public protocol."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from dense_heads import ATSSAdapter, GFLAdapter, adapter_of
from dense_heads.detector import OUTSIDE

from crosskd import CrossKD, Distiller, PredictionMimicking
from crosskd.adapters import Adapter, find_adapter
from crosskd.predictions import join_levels
from tests.examples.dense_heads.small import FAMILIES, batch_with_and_without_objects, small
from tests.helpers.tiny import tiny_batch, tiny_retinanet

families = pytest.mark.parametrize("family", FAMILIES)
ADAPTERS = {"gfl": GFLAdapter(), "atss": ATSSAdapter()}
OWN = {
    "gfl": {"classification", "bbox_regression", "distribution"},
    "atss": {"classification", "bbox_regression", "bbox_ctrness"},
}
DISTILLED = {"gfl": {"kd_cls", "kd_reg"}, "atss": {"kd_cls", "kd_reg", "kd_quality"}}


def distiller_of(family: str, method=None, **teacher) -> Distiller:
    return Distiller(small(family, seed=1, **teacher), small(family), method or CrossKD(), ADAPTERS[family])


@families
def test_the_adapter_follows_the_protocol_and_is_found_by_family(family):
    adapter = ADAPTERS[family]
    assert isinstance(adapter, Adapter)
    assert type(adapter_of(small(family), small(family))) is type(adapter)
    assert adapter_of(small("gfl"), small("atss")) is None
    assert adapter_of(tiny_retinanet()) is None
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
    images, targets = batch_with_and_without_objects()
    adapter, teacher, student = ADAPTERS[family], small(family, seed=1), small(family)
    inputs = adapter.prepare(teacher, student, images, targets)
    features = adapter.features(student, inputs.student_pixels)
    grid = adapter.locations(student, inputs, features)
    _, assignment = adapter.losses(student, adapter_predictions(adapter, student, features), grid, inputs)
    matches = student.match(grid, inputs.targets)
    assert torch.equal(assignment.counted == 0, matches == OUTSIDE)
    assert (assignment.counted == 0).any(dim=1).tolist() == [True, False]
    assert torch.equal(assignment.positive, matches >= 0)
    assert assignment.normalizer == assignment.positive.sum(1).clamp(min=1).sum()


def adapter_predictions(adapter, detector, features):
    branches = adapter.branches(detector)
    return join_levels(
        adapter.predict(detector, level, {b.name: b.tower(level).run(feature, ())[0] for b in branches})
        for level, feature in enumerate(features)
    )


@families
def test_towers_and_predictors_together_are_the_head(family):
    adapter, detector = ADAPTERS[family], small(family)
    features = list(detector.backbone(torch.rand(2, 3, 64, 96)).values())
    predictions, outputs = adapter_predictions(adapter, detector, features), detector.head(features)
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
            r"strides differ: \[8, 16, 32\] \(teacher\), \[8, 16, 32, 64\] \(student\)",
        ),
        (
            {},
            {"anchor_scale": 8.0},
            r"anchor_scale differs: 4.0 \(teacher\), 8.0 \(student\).*the same",
        ),
        ({"reg_max": 8}, {}, r"reg_max differs: 8 \(teacher\), 16 \(student\): distributions over different"),
    ],
)
def test_pairs_that_can_not_be_compared_are_refused(teacher, student, complaint):
    with pytest.raises(ValueError, match=complaint):
        Distiller(small("gfl", **teacher), small("gfl", **student), CrossKD(), GFLAdapter())


def test_another_family_is_refused():
    with pytest.raises(TypeError, match="GFLAdapter does not support the teacher, a ATSS"):
        Distiller(small("atss"), small("gfl"), CrossKD(), GFLAdapter())


@families
def test_a_student_may_lack_the_teachers_coarsest_level(family):
    student = small(family, strides=(8, 16))
    del student.backbone.stages[2:], student.backbone.laterals[2:]
    distiller = Distiller(small(family, seed=1), student, CrossKD(), ADAPTERS[family])
    losses = distiller(*tiny_batch())
    assert losses.keys() == OWN[family] | DISTILLED[family]
    assert all(loss.isfinite() for loss in losses.values())


@families
def test_targets_that_do_not_fit_are_refused(family):
    images, targets = tiny_batch()
    targets[0]["labels"][0] = 4
    with pytest.raises(ValueError, match=r"targets\[0\] has labels from \d to 4, but the student predicts 4"):
        distiller_of(family)(images, targets)
