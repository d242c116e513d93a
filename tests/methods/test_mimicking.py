"""Prediction mimicking: the same losses on the student's own predictions, so the predictors feel them."""

from __future__ import annotations

import math

import pytest
import torch

from crosskd import Distiller, PredictionMimicking
from tests.helpers.steps import PlainHead, make_pair, make_predictions, make_step
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet


def settled(head_type: str = "ATSS", **settings) -> PredictionMimicking:
    method = PredictionMimicking(**settings)
    method.setup(make_pair(PlainHead(head_type=head_type), PlainHead(head_type=head_type)))
    return method


def test_settings_are_those_of_the_teachers_head_type_unless_given():
    method = settled("FCOS", reg_weight=2.0, regression="giou")
    assert method.loss_names() == ("kd_cls", "kd_reg")
    assert (method.comparison.cls_weight, method.comparison.reg_weight) == (0.4, 2.0)
    assert method.comparison.regression == "giou"


def test_forward_compares_the_students_own_predictions():
    step, method = make_step(quality=True), settled()
    losses = method(step)
    assert tuple(losses) == method.loss_names() == ("kd_cls", "kd_reg", "kd_quality")
    own = step.student.predictions
    expected = method.comparison.losses(own, step.teacher, step.student, step.assignment)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)


def test_own_teacher_has_nearly_no_loss():
    student = make_predictions()
    losses = settled(quality_weight=0)(make_step(student, student))
    assert sum(losses.values()).item() == pytest.approx(0, abs=1e-12)


def test_it_taps_nothing_and_holds_no_weights():
    method = settled()
    assert method.tap_points("classification") is None
    assert list(method.parameters()) == []


@pytest.mark.parametrize("build", [tiny_retinanet, tiny_fcos])
def test_gradient_reaches_the_predictors(build):
    """What CrossKD avoids: the predictors are pulled by the teacher too."""
    distiller = Distiller(build(seed=1), build(seed=2), PredictionMimicking())
    losses = distiller(*tiny_batch())
    (losses["kd_cls"] + losses["kd_reg"]).backward()
    head = distiller.student.head
    for predictor in (head.classification_head.cls_logits, head.regression_head.bbox_reg):
        assert predictor.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cls_weight": -1}, "cls_weight must be 0 or more, got -1"),
        ({"beta": math.nan}, "beta must be 0 or more, got nan"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"cls_weight": 0, "reg_weight": 0}, "there is nothing to distil"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        PredictionMimicking(**settings)
