"""BCKD: the student's own classes as binary decisions, its boxes where the two disagree on them."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor

from crosskd import BCKD, CrossKD, Distiller
from crosskd.predictions import Assignment, Predictions
from tests.helpers.plain_losses import giou_row, quality_focal_row, sigmoid
from tests.helpers.reference_files import load_parity
from tests.helpers.slow_crosskd import (
    assert_losses_and_gradients_agree,
    float64_batch,
    locations_of,
    normalized,
    quality_focal,
    retinanet_assignment,
    retinanet_box,
)
from tests.helpers.slow_crosskd import giou_row as slow_giou_row
from tests.helpers.steps import (
    ANCHORS,
    BATCH,
    BINS,
    PlainHead,
    make_pair,
    make_step,
)
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet, tiny_ssd


def settled(head: dict[str, Any] | None = None, **settings: Any) -> BCKD:
    method = BCKD(**settings)
    fields = {"head_type": "GFL", **(head or {})}
    method.setup(make_pair(PlainHead(**fields), PlainHead(**fields)))
    return method


# -- numbers --------------------------------------------------------------------------------------


def test_published_values_and_gradients():
    published = load_parity("methods.pt")["bckd"]
    student = Predictions(
        published["student_logits"][None].requires_grad_(),
        published["student_boxes"][None].requires_grad_(),
        None,
    )
    teacher = Predictions(published["teacher_logits"][None], published["teacher_boxes"][None], None)
    counted = published["counted"][None]
    assignment = Assignment(counted, counted > 0, torch.tensor(published["normalizer"]))
    losses = settled()(make_step(student, teacher, assignment=assignment))
    assert list(losses) == ["kd_bckd_cls", "kd_bckd_box"]
    cases = (
        ("kd_bckd_cls", "loss_cls", student.logits, "grad_student_logits"),
        ("kd_bckd_box", "loss_reg", student.regression, "grad_student_boxes"),
    )
    for name, value, of, gradient in cases:
        assert losses[name].item() == pytest.approx(published[value], rel=1e-6)
        (found,) = torch.autograd.grad(losses[name], of)
        scale = published[gradient].abs().max().item()
        torch.testing.assert_close(found[0], published[gradient], rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("weighted", [True, False])
def test_values_by_hand(weighted):
    step = make_step(weighted=weighted)
    student, teacher, counted = step.student.predictions, step.teacher.predictions, step.assignment
    classes, boxes = 0.0, 0.0
    for image in range(BATCH):
        for anchor in range(ANCHORS):
            if weighted and not counted.label_weights[image, anchor]:
                continue
            ours, theirs = (p.logits[image, anchor].tolist() for p in (student, teacher))
            classes += quality_focal_row(ours, theirs)
            distance = max(abs(sigmoid(s) - sigmoid(t)) for s, t in zip(ours, theirs, strict=True))
            pair = (p.regression[image, anchor].tolist() for p in (student, teacher))
            boxes += distance * giou_row(*pair)
    losses = settled(cls_weight=0.5, reg_weight=3.0)(step)
    assert losses["kd_bckd_cls"].item() == pytest.approx(0.5 * classes / 5, rel=1e-10)
    assert losses["kd_bckd_box"].item() == pytest.approx(3.0 * boxes / 5, rel=1e-10)


def test_each_class_has_a_box_that_counts_by_its_own_distance():
    step = make_step(box_per_class=True)
    student, teacher, weights = step.student.predictions, step.teacher.predictions, step.assignment
    boxes = 0.0
    for image, anchor in weights.label_weights.nonzero().tolist():
        for column in range(3):
            ours, theirs = (p.logits[image, anchor, column].item() for p in (student, teacher))
            pair = (p.regression[image, anchor, column].tolist() for p in (student, teacher))
            boxes += abs(sigmoid(ours) - sigmoid(theirs)) * giou_row(*pair)
    losses = settled(cls_weight=0, reg_weight=1.0)(step)
    assert losses["kd_bckd_box"].item() == pytest.approx(boxes / 5, rel=1e-10)


def test_own_teacher_has_no_loss():
    step = make_step()
    losses = settled()(make_step(step.student.predictions, step.student.predictions))
    assert [loss.item() for loss in losses.values()] == [0, 0]


def of_plain_head(detector: Any, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and deltas of a RetinaNet's own head."""
    outputs = detector.head(maps)
    return outputs["cls_logits"], outputs["bbox_regression"]


def losses_by_hand(distiller: Distiller, images: Any, targets: Any) -> dict[str, Tensor]:
    """Both losses of two tiny RetinaNets, anchor by anchor."""
    sides = []
    for detector in (distiller.student, distiller.teacher):
        maps = list(detector.backbone(normalized(detector, images)).values())
        sides.append(of_plain_head(detector, maps))
    (logits, deltas), (wanted, wanted_deltas) = sides
    places = locations_of(64, 4, (0.5, 1.0, 2.0))
    classes, boxes, positives = 0.0, 0.0, 0
    for image, target in enumerate(targets):
        counted, of_image = retinanet_assignment(places, target["boxes"].tolist())
        positives += of_image
        for index, place in enumerate(places):
            ours, theirs = logits[image, index], wanted[image, index]
            classes = classes + counted[index] * quality_focal(ours, theirs)
            probabilities = [1 / (1 + (-side.detach()).exp()) for side in (ours, theirs)]
            distance = max((probabilities[0] - probabilities[1]).abs().tolist())
            pair = (retinanet_box(side[image, index], place) for side in (deltas, wanted_deltas))
            boxes = boxes + counted[index] * distance * slow_giou_row(*pair)
    return {"kd_bckd_cls": classes / positives, "kd_bckd_box": 4 * boxes / positives}


def test_losses_and_gradients_of_a_whole_detector():
    teacher, student = (tiny_retinanet(seed=seed, blocks=1).double() for seed in (1, 2))
    distiller = Distiller(teacher, student, BCKD())
    images, targets = float64_batch(batch=1)
    losses = distiller(images, targets)
    assert_losses_and_gradients_agree(distiller, losses, losses_by_hand(distiller, images, targets))


@pytest.mark.parametrize("build", [tiny_retinanet, tiny_fcos])
def test_it_teaches_the_students_own_predictors(build):
    distiller = Distiller(build(seed=1), build(seed=2), BCKD())
    losses = distiller(*tiny_batch())
    (losses["kd_bckd_cls"] + losses["kd_bckd_box"]).backward()
    head = distiller.student.head
    for predictor in (head.classification_head.cls_logits, head.regression_head.bbox_reg):
        assert predictor.weight.grad.abs().sum() > 0


# -- images ---------------------------------------------------------------------------------------


def test_images_without_objects_and_without_targets():
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), BCKD())
    images, _ = tiny_batch()
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in images]
    for given in (nothing, None):
        losses = distiller(images, given)
        assert losses["kd_bckd_cls"] > 0
        assert losses["kd_bckd_box"] > 0
        sum(losses.values()).backward()
    assert set(losses) == {"kd_bckd_cls", "kd_bckd_box"}  # without targets these alone


def test_half_precision_is_calculated_in_float32():
    step = make_step()
    halves = [
        Predictions(p.logits.detach().bfloat16(), p.regression.detach().bfloat16(), None)
        for p in (step.student.predictions, step.teacher.predictions)
    ]
    losses = settled()(make_step(*halves))
    wide = [Predictions(p.logits.float(), p.regression.float(), None) for p in halves]
    expected = settled()(make_step(*wide))
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name])


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_type", "weights"),
    [("GFL", (1, 4)), ("RetinaNet", (1, 4)), ("of one's own", (1, 4)), ("YOLO with distances", (0.5, 15))],
)
def test_weights_are_those_of_the_teachers_type_unless_given(head_type, weights):
    method = settled({"head_type": head_type})
    assert (method.cls_weight, method.reg_weight) == weights
    assert settled({"head_type": head_type}, reg_weight=0.5).reg_weight == 0.5


@pytest.mark.parametrize(
    ("settings", "names"), [({"reg_weight": 0}, ("kd_bckd_cls",)), ({"cls_weight": 0}, ("kd_bckd_box",))]
)
def test_losses_of_weight_0_are_left_out(settings, names):
    method = settled(**settings)
    assert tuple(method(make_step())) == method.loss_names() == names
    assert BCKD().loss_names() == ("kd_bckd_cls", "kd_bckd_box")


def test_a_class_map():
    """The teacher's other classes and their order don't matter."""
    teacher, student = tiny_retinanet(5, seed=1), tiny_retinanet(2, seed=2)
    predictor = teacher.head.classification_head.cls_logits
    fewer = tiny_retinanet(2, seed=1)
    state = OrderedDict(teacher.state_dict())
    for name in ("weight", "bias"):
        of_class = getattr(predictor, name).unflatten(0, (3, 5))  # (anchors of a location, classes, …)
        state[f"head.classification_head.cls_logits.{name}"] = of_class[:, [3, 1]].flatten(0, 1)
    fewer.load_state_dict(state)
    images, targets = tiny_batch(num_classes=2)
    mapped = Distiller(teacher, student, BCKD(), class_map=[3, 1])(images, targets)
    expected = Distiller(fewer, student, BCKD())(images, targets)
    for name, loss in expected.items():
        torch.testing.assert_close(mapped[name], loss)


def test_it_warns_beside_crosskd():
    with pytest.warns(UserWarning, match="bckd pulls the student's own predictions .* crosskd exists"):
        Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), [CrossKD(), BCKD()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cls_weight": -1}, "cls_weight must be 0 or more, got -1"),
        ({"reg_weight": math.nan}, "reg_weight must be 0 or more, got nan"),
        ({"beta": -1.0}, "beta must be 0 or more, got -1.0"),
        ({"cls_weight": 0, "reg_weight": 0}, "both 0: there is nothing to distil"),
    ],
)
def test_error_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        BCKD(**settings)


# -- pairs that can't be distilled so ---------------------------------------------------------------


def test_error_a_softmax():
    message = r"the teacher's classes share a softmax, in which class 0 .*CrossKD\(\) or .*Mimicking"
    with pytest.raises(ValueError, match=message):
        Distiller(tiny_ssd(seed=1), tiny_ssd(seed=2), BCKD())


def test_error_boxes_of_a_head_that_decodes_none():
    fields = {"decodes": False, "bins": BINS}
    with pytest.raises(ValueError, match=r"student's adapter decodes none: .*decode=, or set reg_weight=0"):
        settled(fields)
    assert settled(fields, reg_weight=0).loss_names() == ("kd_bckd_cls",)


def test_error_other_anchors_classes_or_boxes():
    with pytest.raises(ValueError, match="give class_map="):
        Distiller(tiny_retinanet(5), tiny_retinanet(4), BCKD())
    with pytest.raises(ValueError, match="the anchors differ on the first batch"):
        Distiller(tiny_fcos(seed=1), tiny_retinanet(seed=2), BCKD())(*tiny_batch())
    coded = tiny_retinanet(seed=1)
    coded.box_coder.weights = (10.0, 10.0, 5.0, 5.0)
    with pytest.raises(ValueError, match="box coding differs"):
        Distiller(coded, tiny_retinanet(seed=2), BCKD())(*tiny_batch())
