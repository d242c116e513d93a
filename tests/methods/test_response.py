"""Response distillation: the teacher's predictions in place of labels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from crosskd import CrossKD, Distiller, ResponseDistillation
from crosskd.predictions import Predictions
from tests.helpers.plain_losses import giou_row, quality_focal_row, sigmoid, softmax, softmax_focal_row
from tests.helpers.slow_crosskd import (
    assert_losses_and_gradients_agree,
    float64_batch,
    locations_of,
    normalized,
    retinanet_box,
)
from tests.helpers.slow_crosskd import giou_row as slow_giou_row
from tests.helpers.steps import (
    ANCHORS,
    BATCH,
    BINS,
    CLASSES,
    PlainHead,
    make_assignment,
    make_pair,
    make_predictions,
    make_step,
)
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet

ROWS = [(image, anchor) for image in range(BATCH) for anchor in range(ANCHORS)]


def settled(**settings) -> ResponseDistillation:
    method = ResponseDistillation(**settings)
    method.setup(make_pair(PlainHead(), PlainHead()))
    return method


def teacher_that_is_often_unsure(**options) -> Predictions:
    """Random predictions, half of whose logits are so low that their classes don't count."""
    predictions = make_predictions(**options).detach()
    low = torch.rand(predictions.logits.shape) < 0.7
    return replace(predictions, logits=torch.where(low, -4.0, predictions.logits))


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.1, 0.6])
def test_values_by_hand(threshold):
    student, teacher = make_predictions(), teacher_that_is_often_unsure()
    classes = boxes = 0.0
    likely = counted = 0
    for row in ROWS:
        ours, theirs = (p.logits[row].tolist() for p in (student, teacher))
        classes += quality_focal_row(ours, theirs, beta=2.0)
        likely += sum(sigmoid(t) > threshold for t in theirs)
        together = sum(sigmoid(t) for t in theirs)
        if together > threshold:
            counted += 1
            boxes += together * giou_row(*(p.regression[row].tolist() for p in (student, teacher)))
    assert 0 < likely < BATCH * ANCHORS * CLASSES
    assert 0 < counted < BATCH * ANCHORS
    losses = settled(threshold=threshold)(make_step(student, teacher))
    assert list(losses) == ["kd_response_cls", "kd_response_box"]
    assert losses["kd_response_cls"].item() == pytest.approx(2 * classes / likely, rel=1e-10)
    assert losses["kd_response_box"].item() == pytest.approx(2 * boxes / counted, rel=1e-10)


def test_classes_that_share_a_softmax_by_hand():
    student, teacher = (make_predictions(background=1) for _ in range(2))
    classes = boxes = 0.0
    likely = counted = 0
    for row in ROWS:
        ours, theirs = (p.logits[row].tolist() for p in (student, teacher))
        classes += softmax_focal_row(ours, theirs, beta=2.0)
        objects = [p for column, p in enumerate(softmax(theirs)) if column != 1]
        likely += sum(p > 0.1 for p in objects)
        if sum(objects) > 0.1:
            counted += 1
            boxes += sum(objects) * giou_row(*(p.regression[row].tolist() for p in (student, teacher)))
    losses = settled(cls_weight=1.0, reg_weight=1.0)(make_step(student, teacher))
    assert losses["kd_response_cls"].item() == pytest.approx(classes / likely, rel=1e-10)
    assert losses["kd_response_box"].item() == pytest.approx(boxes / counted, rel=1e-10)


def test_each_class_has_a_box_that_counts_by_its_own_probability():
    student = make_predictions(box_per_class=True)
    teacher = teacher_that_is_often_unsure(box_per_class=True)
    boxes, counted = 0.0, 0
    for row in ROWS:
        for column in range(CLASSES):
            probability = sigmoid(teacher.logits[row][column].item())
            if probability > 0.1:
                counted += 1
                pair = (p.regression[row][column].tolist() for p in (student, teacher))
                boxes += probability * giou_row(*pair)
    losses = settled(cls_weight=0, reg_weight=1.0)(make_step(student, teacher))
    assert losses["kd_response_box"].item() == pytest.approx(boxes / counted, rel=1e-10)


def rows_of(detector, images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and deltas of a RetinaNet's own backbone and head."""
    maps = list(detector.backbone(normalized(detector, images)).values())
    outputs = detector.head(maps)
    return outputs["cls_logits"], outputs["bbox_regression"]


def test_losses_and_gradients_of_a_whole_detector():
    teacher, student = (tiny_retinanet(seed=seed, blocks=1).double() for seed in (1, 2))
    distiller = Distiller(teacher, student, ResponseDistillation())
    images, targets = float64_batch(batch=1)
    losses = distiller(images, targets)
    (logits, deltas), (wanted, wanted_deltas) = (
        rows_of(detector, images) for detector in (student, distiller.teacher)
    )
    classes = boxes = 0.0
    likely = counted = 0
    for index, place in enumerate(locations_of(64, 4, (0.5, 1.0, 2.0))):
        ours = 1 / (1 + (-logits[0, index]).exp())
        theirs = 1 / (1 + (-wanted[0, index].detach()).exp())
        entropy = -(theirs * ours.log() + (1 - theirs) * (1 - ours).log())
        classes = classes + ((ours - theirs) ** 2 * entropy).sum()
        likely += int((theirs > 0.1).sum())
        if theirs.sum() > 0.1:
            counted += 1
            pair = (retinanet_box(side[0, index], place) for side in (deltas, wanted_deltas))
            boxes = boxes + theirs.sum() * slow_giou_row(*pair)
    expected = {"kd_response_cls": 2 * classes / likely, "kd_response_box": 2 * boxes / counted}
    assert_losses_and_gradients_agree(distiller, losses, expected)


def test_own_teacher_has_no_loss():
    student = make_predictions()
    assert [loss.item() for loss in settled()(make_step(student, student)).values()] == [0, 0]


def test_half_precision_is_calculated_in_float32():
    halves = [
        Predictions(p.logits.detach().bfloat16(), p.regression.detach().bfloat16(), None)
        for p in (make_predictions(), make_predictions())
    ]
    wide = [Predictions(p.logits.float(), p.regression.float(), None) for p in halves]
    expected = settled()(make_step(*wide))
    for name, loss in settled()(make_step(*halves)).items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name])


# -- labels ---------------------------------------------------------------------------------------


def test_labels_make_no_difference():
    student, teacher = make_predictions(), make_predictions()
    assigned = [make_assignment(weighted=weighted) for weighted in (True, False)]
    assigned[1].positive.fill_(False)
    first, second = (settled()(make_step(student, teacher, assignment=a)) for a in assigned)
    assert first == second
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), ResponseDistillation())
    images, targets = tiny_batch()
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in images]
    labelled, empty, unlabelled = (distiller(images, given) for given in (targets, nothing, None))
    assert set(unlabelled) == {"kd_response_cls", "kd_response_box"}
    for name, loss in unlabelled.items():
        assert torch.equal(loss, labelled[name])
        assert torch.equal(loss, empty[name])


def test_a_teacher_that_is_sure_of_nothing_leaves_a_loss_on_the_classes_alone():
    student = make_predictions()
    teacher = replace(make_predictions(), logits=torch.full((BATCH, ANCHORS, CLASSES), -20.0).double())
    losses = settled()(make_step(student, teacher))
    assert losses["kd_response_cls"].item() > 0
    assert losses["kd_response_box"].item() == 0
    sum(losses.values()).backward()
    assert student.logits.grad.abs().sum() > 0
    assert student.regression.grad.abs().sum() == 0


@pytest.mark.parametrize("build", [tiny_retinanet, tiny_fcos])
def test_it_teaches_the_students_own_predictors(build):
    distiller = Distiller(build(seed=1), build(seed=2), ResponseDistillation())
    losses = distiller(tiny_batch()[0])
    sum(losses.values()).backward()
    head = distiller.student.head
    for predictor in (head.classification_head.cls_logits, head.regression_head.bbox_reg):
        assert predictor.weight.grad.abs().sum() > 0


def test_what_counts_is_averaged_over_processes(monkeypatch):
    student, teacher = make_predictions(), teacher_that_is_often_unsure()
    alone = settled()(make_step(student, teacher))
    # Another process whose teacher finds nothing: the average is half.
    monkeypatch.setattr("crosskd.methods.response.mean_over_ranks", lambda value: value / 2)
    for name, loss in settled()(make_step(student, teacher)).items():
        torch.testing.assert_close(loss, 2 * alone[name])


# -- what it demands ------------------------------------------------------------------------------


def test_error_other_anchors_on_the_first_step():
    distiller = Distiller(tiny_fcos(seed=1), tiny_retinanet(seed=2), ResponseDistillation())
    with pytest.raises(ValueError, match="the anchors differ on the first batch"):
        distiller(*tiny_batch())


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ({}, {"num_classes": 4}, "predicts 3 classes and the student 4: give class_map="),
        ({"background": 0}, {}, "a softmax whose class 0 is no object .* a sigmoid per class"),
        ({"bins": BINS}, {"bins": 1}, "distributions over 5 .*, 1 "),
        ({"rows": "queries"}, {"rows": "queries"}, "a set of queries in no order"),
        ({"decodes": False}, {}, "decodes none: pass it decode=, or set reg_weight=0"),
    ],
)
def test_error_pairs(teacher, student, message):
    with pytest.raises(ValueError, match=message):
        ResponseDistillation().setup(make_pair(PlainHead(**teacher), PlainHead(**student)))


def test_a_head_without_boxes_can_be_distilled_by_its_classes():
    method = ResponseDistillation(reg_weight=0)
    method.setup(make_pair(PlainHead(decodes=False), PlainHead(decodes=False)))
    assert tuple(method(make_step())) == method.loss_names() == ("kd_response_cls",)


def test_with_crosskd_it_warns():
    with pytest.warns(UserWarning, match="response pulls the student's own predictions"):
        Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), [CrossKD(), ResponseDistillation()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cls_weight": -1}, "cls_weight must be 0 or more, got -1"),
        ({"reg_weight": math.nan}, "reg_weight must be 0 or more, got nan"),
        ({"beta": -0.5}, "beta must be 0 or more, got -0.5"),
        ({"threshold": 1.0}, "threshold is a probability, 0 to below 1, got 1.0"),
        ({"cls_weight": 0, "reg_weight": 0}, "there is nothing to distil"),
    ],
)
def test_error_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ResponseDistillation(**settings)
