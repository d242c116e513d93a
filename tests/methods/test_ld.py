"""LD: the student's own distributions on positive anchors and around objects, and its classes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from crosskd import LD, Distiller
from crosskd.adapters import Anchors, Objects
from crosskd.losses import valuable_region
from crosskd.predictions import Assignment, Predictions
from crosskd.step import Step
from tests.helpers.plain_losses import kl_row, sigmoid
from tests.helpers.reference_files import load_parity
from tests.helpers.steps import PlainAdapter, PlainHead, make_pair, make_side
from tests.helpers.tiny import tiny_retinanet
from tests.helpers.yolo import batch_of, model_of

BATCH, CLASSES, BINS = 2, 3, 5
# Two levels, of 16 and of 4 places.
POINTS = torch.cat([s / 2 + s * torch.cartesian_prod(*[torch.arange(64 // s)] * 2) for s in (16, 32)]).float()
STRIDES = torch.tensor([16.0] * 16 + [32.0] * 4)
PER_LEVEL = (16, 4)
SQUARES = torch.cat([POINTS - STRIDES[:, None], POINTS + STRIDES[:, None]], dim=1)  # of two strides


class Decoding(PlainHead):
    """Boxes whose sides are the expected bin, in strides, from the points."""

    def decode(self, predictions: Predictions, anchors: Any) -> Tensor:
        bins = torch.arange(BINS).to(predictions.regression)
        sides = predictions.regression.softmax(-1) @ bins * STRIDES[:, None].to(predictions.regression)
        points = POINTS.to(sides)
        return torch.cat([points - sides[..., :2], points + sides[..., 2:]], dim=-1)


def head_of(**fields: Any) -> PlainHead:
    return Decoding(**{"head_type": "GFL", "bins": BINS, "num_classes": CLASSES, **fields})


def predictions_of() -> Predictions:
    logits = 2 * torch.randn(BATCH, len(POINTS), CLASSES).double()
    regression = 2 * torch.randn(BATCH, len(POINTS), 4, BINS).double()
    return Predictions(logits.requires_grad_(), regression.requires_grad_(), None)


def assignment_of(*, weighted: bool = True) -> Assignment:
    positive = torch.zeros(BATCH, len(POINTS), dtype=torch.bool)
    positive[0, [2, 5, 17]] = positive[1, 9] = True
    weights = torch.ones(BATCH, len(POINTS))
    weights[1, 12:16] = 0
    return Assignment(weights if weighted else None, positive, torch.tensor(4.0))


def objects_of() -> tuple[Objects, ...]:
    boxes = torch.tensor([[5.0, 8.0, 31.0, 40.0], [30.0, 22.0, 62.0, 51.0]])
    return Objects(boxes, torch.tensor([0, 1])), Objects(boxes[:1], torch.tensor([2]))


def step_of(
    student: Predictions | None = None,
    teacher: Predictions | None = None,
    *,
    head: PlainHead | None = None,
    anchors: Anchors | None = None,
    assignment: Assignment | None = None,
    objects: tuple[Objects, ...] | None = (),
    strides: tuple[float, ...] | None = (16.0, 32.0),
) -> Step:
    head = head or head_of()
    anchors = anchors or Anchors(SQUARES, PER_LEVEL)
    adapter = PlainAdapter(head, strides=strides)
    sides = [
        make_side(
            p,
            head=head,
            adapter=adapter,
            anchors=anchors,
            levels=(0, 1),
            objects=objects_of() if objects == () else objects,
        )
        for p in ((teacher or predictions_of()).detach(), student or predictions_of())
    ]
    for side in sides:
        side.batch = replace(side.batch, image_sizes=((64, 64),) * BATCH)
    return Step(*sides, assignment=assignment or assignment_of())


def settled(head: dict[str, Any] | None = None, **settings: Any) -> LD:
    method = LD(**settings)
    method.setup(make_pair(*(head_of(**(head or {})) for _ in range(2))))
    return method


# -- numbers --------------------------------------------------------------------------------------


def test_published_values_and_gradient():
    published = load_parity("methods.pt")["ld"]
    regression = published["student_regression"][None].requires_grad_()
    student = Predictions(published["student_logits"][None], regression, None)
    teacher = Predictions(published["student_logits"][None], published["teacher_regression"][None], None)
    anchors = Anchors(published["anchors"], tuple(published["anchors_per_level"]))
    positive = published["positive"][None]
    boxes = published["gt_boxes"]
    sides = [
        make_side(p, anchors=anchors, objects=(Objects(boxes, torch.zeros(len(boxes)).long()),))
        for p in (teacher, student)
    ]
    method = LD(cls_weight=0)
    method.setup(make_pair(*(head_of(bins=17, num_classes=5) for _ in range(2))))
    losses = method(Step(*sides, assignment=Assignment(None, positive, torch.tensor(1.0))))
    assert list(losses) == ["kd_ld_main", "kd_ld_region"]
    assert losses["kd_ld_main"].item() == pytest.approx(published["loss_main"], rel=1e-6)
    assert losses["kd_ld_region"].item() == pytest.approx(published["loss_vlr"], rel=1e-6)
    (found,) = torch.autograd.grad(sum(losses.values()), regression)
    expected = published["grad_student_regression"]
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def by_hand(step: Step, reduction: str) -> dict[str, float]:
    """All three losses without their weights, row by row."""
    student, teacher = step.student.predictions, step.teacher.predictions
    assignment = step.assignment
    main, main_amount, region, region_amount, classes, of_level = 0.0, 0.0, 0.0, 0.0, [0.0, 0.0], [0, 0]
    for image in range(BATCH):
        counted = torch.ones(len(POINTS)).bool()
        if assignment.label_weights is not None:
            counted = assignment.label_weights[image].bool()
        per_level = [int(counted[:16].sum()), int(counted[16:].sum())]
        values = torch.zeros(len(POINTS))
        values[counted] = valuable_region(SQUARES[counted], step.objects[image].boxes, per_level)
        for index in range(len(POINTS)):
            pairs = zip(*(p.regression[image, index].tolist() for p in (student, teacher)), strict=True)
            sides = sum(kl_row(ours, theirs, 10.0) / BINS for ours, theirs in pairs)
            region += values[index].item() * sides
            region_amount += values[index].item()
            if assignment.positive[image, index]:
                logits = [p.logits[image, index].tolist() for p in (student, teacher)]
                sure = sigmoid(max(logits[0]))
                main += sure * sides
                main_amount += sure
                classes[index >= 16] += kl_row(*logits, 2.0) / CLASSES
                of_level[index >= 16] += 1
    if reduction == "sum":
        averaged = sum(total / count for total, count in zip(classes, of_level, strict=True))
        return {"main": main / 4, "region": region / 16, "cls": averaged}
    return {
        "main": main / (4 * main_amount),
        "region": region / (4 * region_amount),
        "cls": sum(classes) / sum(of_level),
    }


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_values_by_hand(reduction, weighted):
    step = step_of(assignment=assignment_of(weighted=weighted))
    losses = settled(main_weight=2.0, region_weight=3.0, cls_weight=0.5, reduction=reduction)(step)
    for name, value in by_hand(step, reduction).items():
        expected = {"main": 2.0, "region": 3.0, "cls": 0.5}[name] * value
        assert losses[f"kd_ld_{name}"].item() == pytest.approx(expected, rel=1e-6), (
            name
        )  # anchors are float32


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradients_stay_where_they_belong(reduction):
    step = step_of()
    positive, student = step.assignment.positive, step.student.predictions
    losses = settled(reduction=reduction)(step)
    grads = {
        name: torch.autograd.grad(loss, (student.logits, student.regression), allow_unused=True)
        for name, loss in losses.items()
    }
    assert grads["kd_ld_main"][0] is None  # the student's certainty is a constant
    assert torch.equal(grads["kd_ld_main"][1].flatten(2).any(-1), positive)
    around = grads["kd_ld_region"][1].flatten(2).any(-1)
    assert around.any()
    assert not around[step.assignment.label_weights == 0].any()
    assert torch.equal(grads["kd_ld_cls"][0].any(-1), positive)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_own_teacher_has_no_loss(reduction):
    own = predictions_of()
    losses = settled(reduction=reduction)(step_of(own, own))
    assert all(abs(loss.item()) < 1e-12 for loss in losses.values())


def test_a_mean_does_not_depend_on_how_often_an_image_is_given():
    """What the published sums do."""
    step = step_of()
    twice = [
        Predictions(torch.cat([p.logits] * 2), torch.cat([p.regression] * 2), None)
        for p in (step.student.predictions, step.teacher.predictions)
    ]
    a = step.assignment
    double = Assignment(torch.cat([a.label_weights] * 2), torch.cat([a.positive] * 2), 2 * a.normalizer)
    again = step_of(*twice, assignment=double, objects=objects_of() * 2)
    for reduction, factor in (("sum", 2), ("mean", 1)):
        method = settled(cls_weight=0, reduction=reduction)
        for name, loss in method(step).items():
            torch.testing.assert_close(method(again)[name], factor * loss)


def test_half_precision_is_calculated_in_float32():
    halves = [
        Predictions(p.logits.detach().bfloat16(), p.regression.detach().bfloat16(), None)
        for p in (predictions_of(), predictions_of())
    ]
    wide = [Predictions(p.logits.float(), p.regression.float(), None) for p in halves]
    expected = settled()(step_of(*wide))
    for name, loss in settled()(step_of(*halves)).items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name])


# -- anchors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("told_by", ["anchors", "adapter"])
def test_points_become_squares_of_some_strides(told_by):
    points = Anchors(POINTS, PER_LEVEL, strides=STRIDES if told_by == "anchors" else None)
    own = predictions_of(), predictions_of()
    expected = settled()(step_of(*own))
    found = settled(anchor_size=2.0)(step_of(*own, anchors=points))
    assert found["kd_ld_region"] > 0
    assert torch.equal(found["kd_ld_region"], expected["kd_ld_region"])
    larger = settled()(step_of(*own, anchors=points))  # of 8 strides
    assert larger["kd_ld_region"] != expected["kd_ld_region"]


def test_points_that_stand_twice_are_counted_once():
    """A head with two halves predicts at each point twice: what is nearest to an object stays the same."""
    once = step_of(anchors=Anchors(POINTS, PER_LEVEL, STRIDES, ((4, 4), (2, 2))))
    rows = torch.tensor([*range(16), *range(16), *range(16, 20), *range(16, 20)])
    twice = [
        Predictions(p.logits[:, rows], p.regression[:, rows], None)
        for p in (once.student.predictions, once.teacher.predictions)
    ]
    a = once.assignment
    double = Assignment(a.label_weights[:, rows], a.positive[:, rows], 2 * a.normalizer)
    anchors = Anchors(POINTS[rows], (32, 8), STRIDES[rows], ((4, 4), (2, 2)))
    again = step_of(*twice, assignment=double, anchors=anchors)
    method = settled(anchor_size=2.0)
    torch.testing.assert_close(method(again)["kd_ld_region"], 2 * method(once)["kd_ld_region"])


def test_error_unknown_anchors_or_strides():
    with pytest.raises(ValueError, match="made of anchors, which .* anchors=, .* region_weight=0"):
        settled().check(step_of(anchors=Anchors(None, PER_LEVEL)))
    with pytest.raises(ValueError, match="its adapter gives no strides: .* strides="):
        settled().check(step_of(anchors=Anchors(POINTS, PER_LEVEL), strides=None))
    settled(region_weight=0).check(step_of(anchors=Anchors(None, PER_LEVEL)))


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_images_without_objects(reduction):
    nothing = (Objects(torch.zeros(0, 4), torch.zeros(0).long()),) * BATCH
    none = Assignment(None, torch.zeros(BATCH, len(POINTS)).bool(), torch.tensor(2.0))
    step = step_of(objects=nothing, assignment=none)
    losses = settled(reduction=reduction)(step)
    assert [loss.item() for loss in losses.values()] == [0, 0, 0]
    sum(losses.values()).backward()  # other processes wait for a gradient
    for of in (step.student.predictions.logits, step.student.predictions.regression):
        assert torch.equal(of.grad, torch.zeros_like(of))


def test_without_targets_the_objects_are_the_boxes_that_the_teacher_is_sure_of():
    teacher = predictions_of()
    step = step_of(teacher=teacher, objects=None, assignment=assignment_of(weighted=False))
    boxes = head_of().decode(teacher.detach(), None).clamp(0, 64)
    positive = step.assignment.positive
    labels = torch.zeros(4).long()
    given = tuple(Objects(boxes[image][positive[image]], labels) for image in range(BATCH))
    expected = step_of(
        step.student.predictions, teacher, objects=given, assignment=assignment_of(weighted=False)
    )
    for name, loss in settled()(step).items():
        torch.testing.assert_close(loss, settled()(expected)[name])


def test_the_teachers_boxes_of_one_object_are_one():
    teacher = predictions_of().detach()
    regression = teacher.regression.clone()
    regression[0, 5] = regression[0, 2] = 0
    regression[0, 2, :, 2] = regression[0, 5, :, 2] = 20  # two strides to each side
    positive = torch.zeros(BATCH, len(POINTS)).bool()
    positive[0, [5, 6]] = True
    regression[0, 6] = regression[0, 5]
    regression[0, 6, 1, 1] = 40  # the next point's box, moved to overlap the first by most
    regression[0, 6, 3] = -20
    regression[0, 6, 3, 3] = 20
    logits = teacher.logits.clone()
    logits[0, 5:7] = torch.tensor([3.0, 0.0, 0.0], dtype=logits.dtype)
    logits[0, 6, 0] = 2.0
    sure = Predictions(logits, regression, None)
    boxes = head_of().decode(sure, None)[0]
    student = predictions_of()

    def region(columns: list[int], given: tuple[Objects, ...] | None) -> Tensor:
        chosen = torch.zeros_like(positive)
        chosen[0, columns] = True
        step = step_of(student, sure, objects=given, assignment=Assignment(None, chosen, torch.tensor(1.0)))
        return settled()(step)["kd_ld_region"]

    nothing = Objects(torch.zeros(0, 4), torch.zeros(0).long())
    kept, both = (
        (Objects(boxes[5:end].clamp(0, 64), torch.zeros(end - 5).long()), nothing) for end in (6, 7)
    )
    assert region([5], kept) > 0
    torch.testing.assert_close(region([5, 6], None), region([5], kept))
    assert region([5], both) != region([5], kept)


def test_error_targets_without_objects_or_a_head_that_decodes_none():
    step = step_of(objects=None)
    step.student.batch = replace(step.student.batch, targets=["theirs"])
    with pytest.raises(ValueError, match=r"gives none of the targets: give generic\(\) objects="):
        settled()(step)
    with pytest.raises(ValueError, match=r"are the teacher's boxes, but .* decodes none: pass it decode="):
        settled()(step_of(objects=None, head=head_of(decodes=False)))
    losses = settled(region_weight=0)(step_of(objects=None, head=head_of(decodes=False)))
    assert list(losses) == ["kd_ld_main", "kd_ld_cls"]


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_type", "given", "reduction", "weights"),
    [
        ("GFL", None, "sum", (0.25, 0.25, 10)),
        ("GFL", "mean", "mean", (15, 25, 50 * CLASSES / 80)),
        ("YOLO with distributions", None, "mean", (15, 25, 50 * CLASSES / 80)),
        ("of one's own", "sum", "sum", (0.25, 0.25, 10)),
    ],
)
def test_sums_are_published_for_gfl_and_means_are_ours(head_type, given, reduction, weights):
    method = settled({"head_type": head_type}, reduction=given)
    assert method.reduction == reduction
    assert (method.main_weight, method.region_weight, method.cls_weight) == pytest.approx(weights)
    assert settled({"head_type": head_type}, main_weight=0.5).main_weight == 0.5


def test_what_is_not_needed_is_not_required():
    assert LD().requires == {"predictions", "objects"}
    assert LD(region_weight=0).requires == {"predictions"}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ("kd_ld_main", "kd_ld_region", "kd_ld_cls")),
        ({"region_weight": 0, "cls_weight": 0}, ("kd_ld_main",)),
        ({"main_weight": 0}, ("kd_ld_region", "kd_ld_cls")),
    ],
)
def test_losses_of_weight_0_are_left_out(settings, names):
    method = settled(**settings)
    assert tuple(method(step_of())) == method.loss_names() == names


def test_a_single_class_has_no_softmax():
    assert settled({"num_classes": 1}).loss_names() == ("kd_ld_main", "kd_ld_region")
    with pytest.raises(ValueError, match="cls_weight is set, but a softmax over a single class"):
        settled({"num_classes": 1}, cls_weight=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"main_weight": -1}, "main_weight must be 0 or more, got -1"),
        ({"region_weight": math.nan}, "region_weight must be 0 or more, got nan"),
        ({"main_weight": 0, "region_weight": 0, "cls_weight": 0}, "all three weights are 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"cls_temperature": -2.0}, "cls_temperature must be above 0, got -2.0"),
        ({"anchor_size": 0}, "anchor_size must be above 0, got 0"),
        ({"reduction": "none"}, 'reduction must be "sum" or "mean", got \'none\''),
    ],
)
def test_error_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LD(**settings)


def test_printing_shows_the_settings():
    assert repr(LD(1.0)) == "LD(main_weight=1.0, region_weight=None, cls_weight=None, reduction=None)"


# -- pairs -----------------------------------------------------------------------------------------


def test_error_heads_without_distributions():
    message = r"the teacher's RetinaNet head predicts plain numbers: choose crosskd.CrossKD\(\), or .*BCKD"
    with pytest.raises(ValueError, match=message):
        Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), LD())
    with pytest.raises(ValueError, match="the student's GFL head predicts plain numbers"):
        LD().setup(make_pair(head_of(), head_of(bins=1)))


def test_error_other_bins_or_classes():
    with pytest.raises(ValueError, match=r"distributions over 7 \(teacher\), 5 \(student\) bins"):
        LD().setup(make_pair(head_of(bins=7), head_of()))
    with pytest.raises(ValueError, match="give class_map="):
        LD().setup(make_pair(head_of(num_classes=4), head_of()))


@pytest.mark.ultralytics
def test_yolos_points_and_halves():
    teacher, student = model_of("yolov10n", seed=1), model_of("yolov10n", seed=2)
    distiller = Distiller(teacher, student, LD())
    images, targets = batch_of()
    losses = distiller(images, targets)
    distilled = {name: loss for name, loss in losses.items() if name.startswith("kd_")}
    assert set(distilled) == {"kd_ld_main", "kd_ld_region", "kd_ld_cls"}
    assert all(loss > 0 for loss in distilled.values())
    sum(distilled.values()).backward()
    head = student.model[-1]
    for convolutions in (head.cv2[0], head.one2one_cv2[0], head.cv3[0], head.one2one_cv3[0]):
        assert convolutions[-1].weight.grad.abs().sum() > 0
    assert set(distiller(images)) == set(distilled)  # without targets
