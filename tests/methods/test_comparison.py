"""The losses that methods share, against the formulas in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from crosskd.methods import Step
from crosskd.methods.comparison import Comparison
from crosskd.methods.settings import SETTINGS
from crosskd.predictions import Assignment, Predictions
from tests.helpers.plain_losses import (
    cross_entropy,
    giou_row,
    kl_row,
    log_iou_row,
    quality_focal_row,
    sigmoid,
    softmax,
    softmax_focal_row,
)
from tests.helpers.steps import (
    ANCHORS,
    BATCH,
    BINS,
    PlainHead,
    make_assignment,
    make_predictions,
    make_step,
)

every_published_head = pytest.mark.parametrize("head_type", ["GFL", "RetinaNet", "ATSS", "FCOS"])


def head_of(head_type: str = "RetinaNet", **fields: Any) -> PlainHead:
    return PlainHead(head_type=head_type, bins=BINS, **fields)


def comparison(**settings: Any) -> Comparison:
    unset = dict.fromkeys(("cls_weight", "reg_weight", "quality_weight", "regression"))
    return Comparison(**{**unset, "beta": 1.0, "temperature": 1.0, **settings})


def losses_of(settled: Comparison, step: Step) -> dict[str, Tensor]:
    return settled.losses(step.student.predictions, step.teacher, step.student, step.assignment)


def compare(step: Step, **settings: Any) -> dict[str, Tensor]:
    return losses_of(comparison(**settings).settled(head_of()), step)


def weighted_sum(step: Step, weight: Callable[[int, int], float], loss: Callable[[int, int], float]) -> float:
    weighted = step.assignment.label_weights
    return math.fsum(
        weight(image, anchor) * loss(image, anchor)
        for image in range(BATCH)
        for anchor in range(ANCHORS)
        if weighted is None or weighted[image, anchor]
    )


def confidence(step: Step) -> Callable[[int, int], float]:
    return lambda image, anchor: sigmoid(max(step.teacher.predictions.logits[image, anchor].tolist()))


def rows_of(step: Step, name: str, row: Callable[..., float], **options: Any) -> Callable[[int, int], float]:
    student, teacher = (getattr(side.predictions, name) for side in (step.student, step.teacher))
    return lambda i, a: row(student[i, a].tolist(), teacher[i, a].tolist(), **options)


# ---------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_classification(weighted, beta):
    step = make_step(weighted=weighted)
    found = compare(step, cls_weight=0.4, reg_weight=0, beta=beta)
    rows = rows_of(step, "logits", quality_focal_row, beta=beta)
    expected = 0.4 * weighted_sum(step, lambda i, a: 1.0, rows) / 5
    assert found.keys() == {"kd_cls"}
    assert found["kd_cls"].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("regression", "row"), [("giou", giou_row), ("log_iou", log_iou_row)])
def test_regression_of_boxes(weighted, regression, row):
    step = make_step(weighted=weighted)
    found = compare(step, cls_weight=0, reg_weight=0.75, regression=regression)
    expected = 0.75 * weighted_sum(step, confidence(step), rows_of(step, "regression", row)) / 5
    assert found.keys() == {"kd_reg"}
    assert found["kd_reg"].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_regression_of_distributions(weighted, temperature):
    step = make_step(weighted=weighted, bins=BINS)
    found = compare(step, cls_weight=0, reg_weight=4, regression="distribution_kl", temperature=temperature)
    student, teacher = step.student.predictions.regression, step.teacher.predictions.regression

    def sides(image: int, anchor: int) -> float:
        pairs = zip(student[image, anchor].tolist(), teacher[image, anchor].tolist(), strict=True)
        return math.fsum(kl_row(s, t, temperature) for s, t in pairs)

    amount = 4 * weighted_sum(step, confidence(step), lambda i, a: 1.0)
    expected = 4 * weighted_sum(step, confidence(step), sides) / amount
    assert found["kd_reg"].item() == pytest.approx(expected, rel=1e-10)


def test_quality_is_cross_entropy_on_positive_anchors():
    step = make_step(quality=True)
    found = compare(step, cls_weight=0, reg_weight=0, quality_weight=0.5)
    student, teacher, positive = (
        step.student.predictions.quality,
        step.teacher.predictions.quality,
        step.assignment.positive,
    )
    expected = 0.5 * math.fsum(
        cross_entropy(student[i, a].item(), sigmoid(teacher[i, a].item()))
        for i in range(BATCH)
        for a in range(ANCHORS)
        if positive[i, a]
    )
    assert found.keys() == {"kd_quality"}
    assert found["kd_quality"].item() == pytest.approx(expected / 5, rel=1e-10)
    found["kd_quality"].backward()
    assert torch.equal(step.student.predictions.quality.grad != 0, positive)


def products(predictions: Predictions, image: int, anchor: int) -> list[float]:
    """The logits of the classes' probabilities, each times that of an object."""
    there = sigmoid(predictions.quality[image, anchor].item())
    found = [there * sigmoid(logit) for logit in predictions.logits[image, anchor].tolist()]
    return [math.log(probability / (1 - probability)) for probability in found]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_classification_with_objectness_compares_products(weighted, beta):
    step = make_step(weighted=weighted, objectness=True)
    found = compare(step, cls_weight=0.4, reg_weight=0, beta=beta)
    student, teacher = step.student.predictions, step.teacher.predictions

    def row(i: int, a: int) -> float:
        return quality_focal_row(products(student, i, a), products(teacher, i, a), beta=beta)

    assert found["kd_cls"].item() == pytest.approx(
        0.4 * weighted_sum(step, lambda i, a: 1.0, row) / 5, rel=1e-10
    )
    found["kd_cls"].backward()
    assert student.quality.grad.abs().sum() > 0


def test_boxes_count_by_the_teachers_objectness():
    """Class logits that are large where nothing is weigh nothing."""
    teacher = make_predictions(objectness=True)
    teacher.quality.data.fill_(-30.0)
    found = compare(make_step(teacher=teacher, objectness=True), cls_weight=0, reg_weight=1)
    assert found["kd_reg"].item() < 1e-9


@pytest.mark.parametrize("weighted", [True, False])
def test_objectness_is_compared_on_all_anchors_that_count(weighted):
    step = make_step(weighted=weighted, objectness=True)
    settled = comparison(cls_weight=0, reg_weight=0, quality_weight=1.0).settled(head_of())
    found = losses_of(settled, step)
    quality = [side.predictions.quality.tolist() for side in (step.student, step.teacher)]

    def row(i: int, a: int) -> float:
        return cross_entropy(quality[0][i][a], sigmoid(quality[1][i][a]))

    assert found["kd_quality"].item() == pytest.approx(
        weighted_sum(step, lambda i, a: 1.0, row) / 5, rel=1e-10
    )


def test_objectness_is_distilled_unless_said_otherwise():
    head = PlainHead(objectness=True)
    assert comparison().settled(head).names == ("kd_cls", "kd_reg", "kd_quality")
    assert comparison(quality_weight=0).settled(head).names == ("kd_cls", "kd_reg")


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_classification_of_a_softmax(weighted, beta):
    step = make_step(weighted=weighted, background=0)
    found = compare(step, cls_weight=0.4, reg_weight=0, beta=beta)
    rows = rows_of(step, "logits", softmax_focal_row, beta=beta)
    expected = 0.4 * weighted_sum(step, lambda i, a: 1.0, rows) / 5
    assert found["kd_cls"].item() == pytest.approx(expected, rel=1e-10)


def test_boxes_of_a_softmax_count_by_the_classes_that_mean_an_object():
    step = make_step(background=0)
    found = compare(step, cls_weight=0, reg_weight=0.75)

    def sure(image: int, anchor: int) -> float:
        return max(softmax(step.teacher.predictions.logits[image, anchor].tolist())[1:])

    expected = 0.75 * weighted_sum(step, sure, rows_of(step, "regression", giou_row)) / 5
    assert found["kd_reg"].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("weighted", [True, False])
def test_each_class_has_a_box_that_counts_by_its_probability(weighted):
    step = make_step(weighted=weighted, box_per_class=True, background=0)
    found = compare(step, cls_weight=0, reg_weight=1)
    student, teacher = step.student.predictions.regression, step.teacher.predictions.regression

    def boxes(image: int, anchor: int) -> float:
        probabilities = softmax(step.teacher.predictions.logits[image, anchor].tolist())
        pairs = zip(student[image, anchor].tolist(), teacher[image, anchor].tolist(), strict=True)
        rows = [giou_row(ours, theirs) for ours, theirs in pairs]
        return math.fsum(p * row for p, row in list(zip(probabilities, rows, strict=True))[1:])

    expected = weighted_sum(step, lambda i, a: 1.0, boxes) / 5
    assert found["kd_reg"].item() == pytest.approx(expected, rel=1e-10)
    found["kd_reg"].backward()
    assert not step.student.predictions.regression.grad[:, :, 0].any()  # nobody asks for the background's box
    assert step.student.predictions.regression.grad[0, 0, 1:].any(dim=-1).all()


def test_own_teacher_has_nearly_no_loss():
    student = make_predictions()
    losses = compare(make_step(student, student))
    assert losses["kd_cls"].item() == 0
    assert losses["kd_reg"].item() == pytest.approx(0, abs=1e-12)


def test_boxes_count_by_the_teachers_confidence():
    step = make_step()
    with torch.no_grad():
        step.teacher.predictions.logits[0, 0] = -1e4  # the teacher sees nothing there
    compare(step)["kd_reg"].backward()
    gradient = step.student.predictions.regression.grad
    assert torch.equal(gradient[0, 0], torch.zeros(4).double())
    assert (gradient[0, 1:4].abs().sum(-1) > 0).all()


def test_uncounted_anchors_have_no_gradient():
    step = make_step()
    sum(compare(step).values()).backward()
    weighted = step.assignment.label_weights.bool()
    for gradient in (step.student.predictions.logits.grad, step.student.predictions.regression.grad):
        assert torch.equal(gradient.abs().sum(-1) > 0, weighted)


@pytest.mark.parametrize("regression", ["giou", "log_iou", "distribution_kl"])
@pytest.mark.parametrize("why", ["none weighted", "teacher sees nothing"])
def test_nothing_to_compare_is_zero_with_a_gradient(regression, why):
    step = make_step(bins=BINS if regression == "distribution_kl" else None)
    if why == "none weighted":
        nothing = Assignment(torch.zeros(BATCH, ANCHORS), make_assignment().positive, torch.tensor(1.0))
        step = make_step(step.student.predictions, step.teacher.predictions, assignment=nothing)
    else:
        step.teacher.predictions.logits.fill_(-1e4)
    loss = compare(step, cls_weight=0, reg_weight=1, regression=regression)["kd_reg"]
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(
        step.student.predictions.regression.grad, torch.zeros_like(step.student.predictions.regression)
    )


# ---------------------------------------------------------------------------------------------
# Settings


@every_published_head
def test_open_settings_take_the_published(head_type):
    settled = comparison(beta=2.0, temperature=3.0).settled(head_of(head_type))
    for name in ("cls_weight", "reg_weight", "quality_weight", "regression"):
        assert getattr(settled, name) == getattr(SETTINGS[head_type], name)
    assert (settled.beta, settled.temperature) == (2.0, 3.0)


@every_published_head
def test_given_settings_stay(head_type):
    given = comparison(cls_weight=0.1, reg_weight=0.2, quality_weight=0.3, regression="log_iou")
    assert given.settled(head_of(head_type)) == given


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        ((1, 1, 0), ("kd_cls", "kd_reg")),
        ((0, 1, 0), ("kd_reg",)),
        ((1, 0, 1), ("kd_cls", "kd_quality")),
        ((0, 0, 1), ("kd_quality",)),
    ],
)
def test_losses_of_weight_0_are_left_out(weights, names):
    cls_weight, reg_weight, quality_weight = weights
    settings = {"cls_weight": cls_weight, "reg_weight": reg_weight, "quality_weight": quality_weight}
    step = make_step(quality=True)
    assert tuple(compare(step, **settings)) == names
    assert comparison(**settings).names == names


# ---------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cls_weight": -1.0}, "cls_weight must be 0 or more, got -1.0"),
        ({"reg_weight": math.nan}, "reg_weight must be 0 or more, got nan"),
        ({"quality_weight": -0.5}, "quality_weight must be 0 or more, got -0.5"),
        ({"beta": -1.0}, "beta must be 0 or more, got -1.0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"regression": "iou"}, 'regression must be "giou", "log_iou" or "distribution_kl", got \'iou\''),
        ({"cls_weight": 0, "reg_weight": 0}, "cls_weight and reg_weight are both 0: there is nothing"),
        ({"cls_weight": 0, "reg_weight": 0, "quality_weight": 0}, "there is nothing to distil"),
    ],
)
def test_error_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        comparison(**settings)


def test_error_distributions_of_a_head_without_any():
    with pytest.raises(ValueError, match="needs a teacher that predicts distributions"):
        comparison(regression="distribution_kl").settled(PlainHead(bins=1))
    comparison(regression="distribution_kl", reg_weight=0).settled(PlainHead(bins=1))


def test_error_boxes_of_a_head_that_decodes_none():
    with pytest.raises(ValueError, match=r'regression="log_iou".*teacher\'s adapter decodes none: .*decode='):
        comparison(regression="log_iou").settled(head_of(decodes=False))
    comparison(regression="distribution_kl").settled(head_of(decodes=False))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_error_quality_of_a_head_without_any(side):
    sides = {"student": make_predictions(quality=True), "teacher": make_predictions(quality=True)}
    plain = sides[side]
    sides[side] = Predictions(plain.logits, plain.regression, None)
    with pytest.raises(ValueError, match="quality_weight is set, but this head predicts no centerness"):
        compare(make_step(**sides), quality_weight=1.0)
