"""The look before a long run: what it reports, what it refuses, and that it changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import math
import types

import pytest
import torch
from crosskd.checking import Fit, _fit_of
from crosskd.head import TapPoint
from torch import nn

import crosskd
from crosskd import CrossKD, Distiller, PredictionMimicking, Schedule, check
from crosskd._truth import truth_of
from crosskd.adapters import Inputs, TorchvisionFCOSAdapter, TorchvisionRetinaNetAdapter
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet
from tests.test_mismatched_pairs import larger_teacher, same, with_levels
from tests.test_teacher_untouched import digest, flags
from tests.two_stages import POOLED, REGIONS, tiny_faster_rcnn, two_stage_batch

BUILD = {"retinanet": tiny_retinanet, "fcos": tiny_fcos}
families = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
OWN = {
    tiny_retinanet: {"classification", "bbox_regression"},
    tiny_fcos: {"classification", "bbox_regression", "bbox_ctrness"},
}


# -- what is reported ----------------------------------------------------------------------------


@families
def test_losses_and_gradients_are_those_of_a_step(build):
    teacher, student = build(), build(seed=1)
    report = check(teacher, student, *tiny_batch())
    distiller = Distiller(teacher, copy.deepcopy(student), CrossKD())
    losses = distiller(*tiny_batch())
    assert report.losses.keys() == losses.keys()
    assert report.own_losses.keys() == OWN[build]
    assert report.distillation_losses.keys() == {"kd_cls", "kd_reg"}
    for name, loss in losses.items():
        distiller.student.zero_grad()
        loss.backward(retain_graph=True)
        gradients = [p.grad.flatten() for p in distiller.student.parameters() if p.grad is not None]
        assert report.losses[name].value == loss.item()
        assert report.losses[name].gradient == pytest.approx(torch.cat(gradients).norm().item(), rel=1e-5)


@families
def test_taps_levels_and_projections_are_told(build):
    report = check(
        build(width=64, blocks=3), build(seed=1), *tiny_batch(), CrossKD(position=(2, 1), tap="pre")
    )
    assert [(split.method, split.branch) for split in report.splits] == [
        ("crosskd", "classification"),
        ("crosskd", "regression"),
    ]
    for split in report.splits:
        assert (split.student, split.teacher) == (TapPoint(2, "pre"), TapPoint(1, "pre"))
        assert split.student_shapes == ((2, 32, 8, 8), (2, 32, 4, 4), (2, 32, 2, 2))
        assert split.teacher_widths == (64, 64, 64)
    assert [dataclasses.astuple(projection) for projection in report.projections] == [
        ("crosskd.classification", 32, 64),
        ("crosskd.regression", 32, 64),
    ]
    assert report.differences == (
        "classification tower: 3 blocks (teacher), 4 (student)",
        "classification tower: 64 channels (teacher), 32 (student)",
        "regression tower: 3 blocks (teacher), 4 (student)",
        "regression tower: 64 channels (teacher), 32 (student)",
    )


@families
def test_a_pair_that_differs_in_nothing_has_no_differences(build):
    report = check(build(), build(seed=1), *tiny_batch())
    assert report.differences == ()
    assert report.projections == ()
    assert report.remarks == ()
    assert "differences\n  none\n" in str(report)


def test_classes_levels_and_normalisation_that_differ():
    teacher = sure_of(tiny_retinanet(13, image_mean=[0.5, 0.5, 0.5]), *range(13))
    student = with_levels(tiny_retinanet, [1, 2], seed=1, num_classes=12)
    images, targets = tiny_batch()
    for target in targets:
        target["boxes"] = torch.tensor([[2.0, 4.0, 60.0, 62.0], [0.0, 0.0, 40.0, 60.0]])
    report = check(teacher, student, images, targets, class_map=[12, *range(11)])
    classes, levels, pixels = report.differences
    assert classes == (
        "classes: 13 (teacher), 12 (student), which are the teacher's 12, 0, 1, 2, 3, 4, 5, 6, 7, 8, …"
    )
    assert levels == "levels: the teacher's of strides [8.0] are left out"
    assert pixels.startswith(
        "pixels: mean (-0.00571, 0.0123, 0.0204), deviation (1.26, 1.28, 1.29) (teacher)"
    )


def test_a_view_of_the_teachers_own(caplog):
    report = check(larger_teacher(tiny_fcos), tiny_fcos(seed=1), *tiny_batch(), teacher_view=same)
    assert report.differences == (
        "scale: the teacher's strides are 2 times the student's",
        "pixels: (2, 3, 128, 128) (teacher), (2, 3, 64, 64) (student)",
    )


class WithoutQuality(TorchvisionFCOSAdapter):
    """Leaves out the student's centerness in predictions, but not in its losses."""

    def predict(self, detector, level, towers):
        predictions = super().predict(detector, level, towers)
        return predictions if not detector.training else dataclasses.replace(predictions, quality=None)


def test_a_quality_that_one_side_predicts():
    report = check(tiny_fcos(), tiny_fcos(seed=1), tiny_batch()[0], adapter=WithoutQuality())
    assert report.differences == ("a centerness or IoU is predicted by the teacher alone",)


def test_several_methods_and_a_schedule_at_full_strength():
    methods = [CrossKD(schedule=Schedule(warmup=5, unit="epoch")), PredictionMimicking(name="mimic")]
    report = check(tiny_retinanet(), tiny_retinanet(seed=1), *tiny_batch(), methods)
    names = {f"{method}_{key}" for method in ("crosskd", "mimic") for key in ("kd_cls", "kd_reg")}
    assert report.distillation_losses.keys() == names
    alone = check(tiny_retinanet(), tiny_retinanet(seed=1), *tiny_batch())
    assert report.losses["crosskd_kd_cls"] == alone.losses["kd_cls"]
    assert {split.method for split in report.splits} == {"crosskd"}


def test_images_without_labels():
    report = check(tiny_fcos(), tiny_fcos(seed=1), tiny_batch()[0])
    assert report.own_losses == {}
    assert report.fit is None
    assert report.remarks == ()
    assert "objects" not in str(report)


def test_the_text_says_what_the_fields_do():
    report = check(tiny_fcos(width=64), tiny_fcos(seed=1), *tiny_batch())
    text = str(report)
    teacher = sum(parameter.numel() for parameter in tiny_fcos(width=64).parameters())
    assert f"teacher: FCOS, {teacher / 1e6:.2f} million parameters\nstudent: FCOS" in text
    assert "adapter: TorchvisionFCOSAdapter, settings of FCOS" in text
    assert "crosskd, regression branch: student after block 2, teacher after block 2 (post)" in text
    assert "  level 2: (2, 32, 2, 2), the teacher's of 64 channels" in text
    assert "projection crosskd.regression: 32 to 64 channels" in text
    kd = report.losses["kd_cls"]
    assert f"  {'kd_cls':<24} {kd.value:>10.4g} {kd.gradient:>10.4g}" in text
    lowest, highest = min(report.confidence.highest), max(report.confidence.highest)
    assert f"largest class probability: {lowest:.3f} to {highest:.3f} an image" in text
    fit = report.fit
    assert f"the teacher finds {fit.found} of 4 objects (IoU 0.5 or more, right class)" in text


# -- the teacher's worth -------------------------------------------------------------------------


def test_the_fit_by_hand():
    """Of three objects one is found, one under another class, and one by nothing that is sure."""
    boxes = torch.tensor(
        [
            [[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0], [50.0, 50.0, 60.0, 60.0]],
            [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]],
        ]
    )
    probabilities = torch.tensor(
        [
            [[0.9, 0.0], [0.0, 0.8], [0.05, 0.05]],
            [[0.0, 0.9], [0.0, 0.0], [0.0, 0.0]],
        ]
    )
    objects = [
        {
            # IoU with the first box 5 x 10 / 10 x 10; the second exact but for its class; the third exact.
            "boxes": torch.tensor(
                [[0.0, 0.0, 5.0, 10.0], [20.0, 20.0, 40.0, 40.0], [50.0, 50.0, 60.0, 60.0]]
            ),
            "labels": torch.tensor([0, 0, 1]),
        },
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    fit = _fit_of(boxes, probabilities, objects)
    assert fit == Fit(objects=3, found=1, found_in_any_class=2, best_iou=pytest.approx(0.5 / 3))


def test_the_fit_of_a_box_for_each_class_by_hand():
    """Each class's box counts with its own probability alone, and an image may have no region at all."""
    exact, off = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 1.0, 1.0]
    # (regions, classes, 4) an image, class 0 the background, whose probability is given as 0.
    boxes = [torch.tensor([[exact, off, exact], [off, exact, off]]), torch.zeros(0, 3, 4)]
    probabilities = [torch.tensor([[0.0, 0.9, 0.3], [0.0, 0.05, 0.6]]), torch.zeros(0, 3)]
    square = torch.tensor([exact])
    objects = [
        {"boxes": square.repeat(2, 1), "labels": torch.tensor([1, 2])},
        {"boxes": square, "labels": torch.tensor([1])},
    ]
    fit = _fit_of(boxes, probabilities, objects)
    # Of class 1 the sure box fits 1 of 100 pixels, and the one that fits is not sure; class 2's is both.
    assert fit == Fit(objects=3, found=1, found_in_any_class=2, best_iou=pytest.approx((0.01 + 1) / 3))


def sure_of(detector: nn.Module, *labels: int) -> nn.Module:
    """Everywhere sure of some classes, and of no other."""
    bias = detector.head.classification_head.cls_logits.bias
    nn.init.normal_(detector.head.classification_head.cls_logits.weight, std=1e-4)
    classes = detector.head.classification_head.num_classes
    values = torch.tensor([2.0 if label in labels else -8.0 for label in range(classes)])
    bias.data = values.repeat(len(bias) // classes)
    return detector


@families
def test_confidence_is_counted_an_image(build):
    report = check(sure_of(build(), 0, 1, 2, 3), build(seed=1), *tiny_batch())
    anchors = (64 + 16 + 4) * (3 if build is tiny_retinanet else 1)
    sure = torch.tensor(2.0).sigmoid().item()
    assert report.confidence.highest == pytest.approx((sure, sure), abs=1e-3)
    assert report.confidence.sure == (anchors, anchors)


def test_classes_that_are_mapped_are_looked_at_as_the_students():
    """The teacher knows the student's classes as its last ones."""
    teacher = sure_of(tiny_retinanet(8), 4, 5, 6, 7)
    report = check(teacher, tiny_retinanet(seed=1), *tiny_batch(), class_map=[4, 5, 6, 7])
    assert report.fit.found == report.fit.found_in_any_class > 0


# -- what is refused -----------------------------------------------------------------------------


@families
def test_a_teacher_that_is_sure_of_nothing(build):
    teacher = sure_of(build())
    message = "sure of nothing on these images: its largest class probability is 0.000 and should be at"
    for batch in (tiny_batch(), tiny_batch()[:1]):
        with pytest.raises(ValueError, match=message):
            check(teacher, build(seed=1), *batch)


@families
def test_a_teacher_that_finds_nothing(build):
    teacher = sure_of(build(), 0, 1, 2, 3)
    nn.init.normal_(teacher.head.regression_head.bbox_reg.weight, std=1e-4)
    # Boxes of a point's size: distances of nearly 0, and anchors shrunk to an e⁻⁴th.
    bias = teacher.head.regression_head.bbox_reg.bias
    shrunk = torch.tensor([0.0, 0.0, -4.0, -4.0]) if build is tiny_retinanet else torch.full((4,), 0.05)
    bias.data = shrunk.repeat(len(bias) // 4)
    message = "finds none of the 4 objects in the targets .best IoU 0.0. on average .*Check its weights, that"
    with pytest.raises(ValueError, match=message):
        check(teacher, build(seed=1), *tiny_batch())


def test_a_teacher_with_its_classes_in_another_order():
    images, targets = tiny_batch()
    for target in targets:
        target["labels"] = torch.ones_like(target["labels"])
    message = (
        "finds none of the 4 .* Of other classes its predictions fit 4 of them: check the order of class"
    )
    with pytest.raises(ValueError, match=message):
        check(sure_of(tiny_retinanet(), 2), tiny_retinanet(seed=1), images, targets)


def test_a_student_that_hears_nothing():
    student = tiny_retinanet(seed=1)
    for sub_head in (student.head.classification_head, student.head.regression_head):
        for module in sub_head.conv.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.weight)
                nn.init.constant_(module.bias, -1.0)
    with pytest.raises(ValueError, match="no gradient at the student's parameters, so nothing would be dist"):
        check(tiny_retinanet(), student, *tiny_batch())


def test_a_student_with_numbers_that_are_not_finite():
    student = tiny_retinanet(seed=1)
    student.head.classification_head.cls_logits.bias.data[0] = torch.nan
    with pytest.raises(
        ValueError, match="^classification: the loss, or its gradient, is not finite on this b"
    ):
        check(tiny_retinanet(), student, *tiny_batch())


def test_what_the_distiller_refuses():
    with pytest.raises(ValueError, match="the teacher predicts 5 classes and the student 4: give class_map="):
        check(tiny_retinanet(5), tiny_retinanet(), *tiny_batch())
    with pytest.raises(ValueError, match="of different families: torchvision's RetinaNet"):
        check(tiny_retinanet(), tiny_fcos(), *tiny_batch())
    frozen = tiny_retinanet(seed=1).requires_grad_(False)
    with pytest.raises(ValueError, match="depends on no trainable parameter of the student"):
        check(tiny_retinanet(), frozen, *tiny_batch())


# -- what is remarked on -------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "times"), [(1e3, "e"), (1e-5, "e-")])
def test_losses_out_of_proportion(weight, times):
    method = CrossKD(cls_weight=weight, reg_weight=weight)
    (remark,) = check(tiny_retinanet(), tiny_retinanet(seed=1), *tiny_batch(), method).remarks
    assert remark.startswith("the distillation's gradient is ")
    assert remark.endswith(" times that of the student's own losses: look at cls_weight and reg_weight")


def test_a_teacher_that_misses_most():
    images, targets = tiny_batch()
    for target in targets:
        target["labels"][:] = torch.tensor([1, 0])
    targets[0]["labels"][:] = 0
    report = check(sure_of(tiny_retinanet(), 1), tiny_retinanet(seed=1), images, targets)
    assert (report.fit.found, report.fit.found_in_any_class) == (1, 4)
    assert report.remarks == (
        "the teacher finds 1 of 4 objects, less than half: the student will learn to miss the others",
    )
    assert str(report).endswith(f"remarks\n  {report.remarks[0]}")


def test_targets_without_objects():
    images, targets = tiny_batch()
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in targets]
    report = check(tiny_fcos(), tiny_fcos(seed=1), images, empty)
    assert report.fit is None
    assert "the targets hold no object, so nothing tells how well the teacher finds them" in report.remarks


class OfItsOwn(TorchvisionRetinaNetAdapter):
    """Keeps targets in a form of its own, and decodes nothing."""

    def prepare(self, *arguments):
        inputs = super().prepare(*arguments)
        return dataclasses.replace(inputs, targets=types.SimpleNamespace(all=inputs.targets))

    def losses(self, student, predictions, locations, inputs):
        inputs = dataclasses.replace(inputs, targets=inputs.targets.all)
        return super().losses(student, predictions, locations, inputs)


def test_targets_of_another_form_need_the_truth_told():
    pair = tiny_retinanet(), tiny_retinanet(seed=1)
    report = check(*pair, *tiny_batch(), adapter=OfItsOwn())
    assert report.fit is None
    (remark,) = report.remarks
    assert remark.startswith(
        "the teacher could not be held against the targets: the prepared targets hold a "
    )
    told = check(*pair, *tiny_batch(), adapter=OfItsOwn(), truth=lambda inputs: inputs.targets.all)
    assert told.fit == check(*pair, *tiny_batch()).fit


@pytest.mark.mmdet
def test_mmdets_samples_tell_the_truth():
    from tests.mmdet_heads import batch_of, detector_of, head_settings

    teacher, student = (detector_of(head_settings("gfl"), seed=seed) for seed in (0, 1))
    nn.init.constant_(teacher.bbox_head.gfl_cls.bias, 3.0)
    # Distances of about two strides to each side, whatever the features.
    nn.init.normal_(teacher.bbox_head.gfl_reg.weight, std=1e-3)
    teacher.bbox_head.gfl_reg.bias.data.view(4, 17)[:, 2] = 8.0
    report = check(teacher, student, *batch_of())
    assert report.adapter == "MMDetAdapter"
    assert report.fit.objects == 4
    assert report.fit.found > 0


def test_boxes_and_classes_of_one_dict_for_all_images():
    targets = {
        "batch_idx": torch.tensor([1.0, 0.0, 1.0]),
        "cls": torch.tensor([[2.0], [0.0], [1.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.25]]),
    }
    pixels = torch.zeros(3, 3, 40, 80)
    first, second, third = truth_of(Inputs(pixels, pixels, targets))
    assert first["labels"].tolist() == [0]
    assert first["boxes"].tolist() == [[0, 10, 40, 30]]
    assert second["labels"].tolist() == [2, 1]
    assert second["boxes"].tolist() == [[0, 0, 80, 40], [20, 15, 60, 25]]
    assert third["labels"].tolist() == []


# -- what stays as it was ------------------------------------------------------------------------


@families
@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_detectors_changes(build, training):
    teacher, student = build(batch_norm=True), build(batch_norm=True, seed=1)
    teacher.train(not training)
    student.train(training)
    student.head.regression_head.bbox_reg.weight.requires_grad_(False)
    images, targets = tiny_batch()
    pair = teacher, student
    before = [(digest(d), flags(d), len(d._forward_hooks)) for d in pair]
    method, torch_state = CrossKD(), torch.get_rng_state()
    with torch.no_grad():  # it needs gradients all the same
        report = check(teacher, student, images, targets, method)
    assert report.losses["kd_cls"].gradient > 0
    assert [(digest(d), flags(d), len(d._forward_hooks)) for d in pair] == before
    assert all(parameter.grad is None for detector in pair for parameter in detector.parameters())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert method.position is None
    expected = tiny_batch()
    assert all(map(torch.equal, images, expected[0]))
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, expected[1], strict=True))


# -- two stages ----------------------------------------------------------------------------------


def sure_in_two_stages(label: int = 1, size: float = 1.0, **options) -> nn.Module:
    """Sure of one class at whatever region, and proposing all of its anchors, changed in size."""
    detector = tiny_faster_rcnn(box_batch_size_per_image=2000, **options)
    rpn, predictor = detector.rpn.head, detector.roi_heads.box_predictor
    for layer in (rpn.cls_logits, rpn.bbox_pred, predictor.bbox_pred, predictor.cls_score):
        nn.init.normal_(layer.weight, std=1e-4)
        nn.init.zeros_(layer.bias)
    predictor.cls_score.bias.data[label] = 3.0
    rpn.bbox_pred.bias.data[:] = torch.tensor([0.0, 0.0, math.log(size), math.log(size)]).repeat(3)
    return detector


def anchor_batch(label: int):
    """Objects that are anchors of the tiny detectors, about (24, 24) and (32, 16) of the first two levels."""
    images, _ = two_stage_batch()
    boxes = torch.tensor([[16.0, 16.0, 32.0, 32.0], [16.0, 0.0, 48.0, 32.0]])
    return images, [{"boxes": boxes, "labels": torch.tensor([label, label])} for _ in images]


def test_both_parts_of_a_detector_of_two_stages_are_told():
    teacher = sure_in_two_stages(width=24, vector=32, v2=True)
    student = tiny_faster_rcnn(seed=1)
    report = check(teacher, student, *anchor_batch(1))
    assert [(split.method, split.branch) for split in report.splits] == [
        ("crosskd_rpn", "rpn"),
        ("crosskd_box", "box"),
    ]
    rpn, box = report.splits
    assert (rpn.student, rpn.teacher) == (TapPoint(0, "post"), TapPoint(1, "post"))
    assert rpn.student_shapes == ((2, 16, 8, 8), (2, 16, 4, 4), (2, 16, 2, 2))
    assert (box.student, box.teacher) == (TapPoint(0, "post"), TapPoint(2, "post"))
    assert box.student_shapes == ((2 * REGIONS, 16, POOLED, POOLED),)
    assert (rpn.teacher_widths, box.teacher_widths) == ((24, 24, 24), (24,))
    assert [dataclasses.astuple(projection) for projection in report.projections] == [
        ("crosskd_rpn.rpn", 16, 24),
        ("crosskd_box.box", 16, 24),
    ]
    assert report.differences == (
        "rpn tower: 2 blocks (teacher), 1 (student)",
        "rpn tower: 24 channels (teacher), 16 (student)",
        "box tower: 3 blocks (teacher), 2 (student)",
        "box tower: 24 channels (teacher), 16 (student)",
    )
    own = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    assert report.own_losses.keys() == own
    assert report.distillation_losses.keys() == {"kd_rpn_cls", "kd_rpn_reg", "kd_box_cls", "kd_box_reg"}
    assert all(loss.gradient > 0 for loss in report.losses.values())
    text = str(report)
    assert "settings of Faster R-CNN's RPN and Faster R-CNN's box head" in text
    assert "crosskd_box, box branch: student after block 0, teacher after block 2 (post)" in text


def test_the_box_head_is_held_against_the_objects_at_the_teachers_own_proposals():
    report = check(sure_in_two_stages(), tiny_faster_rcnn(seed=1), *anchor_batch(1))
    sure = torch.tensor([0.0, 3.0, 0.0, 0.0, 0.0]).softmax(0)[1].item()
    assert report.confidence.highest == pytest.approx((sure, sure), abs=1e-2)
    assert min(report.confidence.sure) > REGIONS
    assert report.fit == Fit(4, 4, 4, pytest.approx(1, abs=1e-2))
    # Among the regions that the student trains on are the objects themselves, which this one never proposes.
    with pytest.raises(ValueError, match="the teacher finds none of the 4 objects"):
        check(sure_in_two_stages(size=0.2), tiny_faster_rcnn(seed=1), *anchor_batch(1))
    with pytest.raises(
        ValueError, match="Of other classes its predictions fit 4 of them: check the order of"
    ):
        check(sure_in_two_stages(label=2), tiny_faster_rcnn(seed=1), *anchor_batch(1))


def test_proposals_alone_are_held_against_objects_of_any_class():
    for label in (1, 3):
        batch = anchor_batch(label)
        report = check(sure_in_two_stages(), tiny_faster_rcnn(seed=1), *batch, CrossKD(part="rpn"))
        assert report.distillation_losses.keys() == {"kd_rpn_cls", "kd_rpn_reg"}
        assert report.fit == Fit(4, 4, 4, pytest.approx(1, abs=1e-2), classless=True)
        text = "the teacher finds 4 of 4 objects (IoU 0.5 or more, whatever the class, for what is distilled"
        assert text in str(report)


def test_a_larger_view_of_two_stages_and_images_without_labels():
    def doubled(images, targets):
        return [nn.functional.interpolate(image[None], scale_factor=2)[0] for image in images]

    teacher = sure_in_two_stages(min_size=128, max_size=128)
    student = tiny_faster_rcnn(seed=1)
    settings = {"methods": CrossKD(part="box"), "teacher_view": doubled}
    images, targets = anchor_batch(1)
    for target in targets:  # half of a side of any anchor, which the teacher's are in the student's pixels
        target["boxes"] = torch.tensor([[20.0, 20.0, 28.0, 28.0], [4.0, 36.0, 12.0, 44.0]])
    report = check(teacher, student, images, targets, **settings)
    assert report.fit == Fit(4, 4, 4, pytest.approx(1, abs=1e-2))
    report = check(teacher, student, images, **settings)
    assert report.fit is None
    assert report.own_losses == {}


def test_weights_that_are_shared_are_warned_of():
    teacher, student = tiny_retinanet(), tiny_retinanet(seed=1)
    student.backbone = teacher.backbone
    with pytest.warns(UserWarning, match="share weights"):
        check(teacher, student, *tiny_batch())


def test_it_stands_in_the_packages_face():
    assert crosskd.check is check
