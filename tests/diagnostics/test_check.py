"""The look before a long run: what it reports, what it refuses, and that it changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator

import crosskd
from crosskd import PKD, CrossKD, Distiller, PredictionMimicking, Schedule, check
from crosskd.adapters import Objects, TorchvisionRetinaNet, backbone
from crosskd.diagnostics._detections import Seen, fit_of
from crosskd.towers import TapPoint
from tests.helpers.tiny import STRIDES, TinyBackbone, tiny_batch, tiny_fcos, tiny_retinanet
from tests.helpers.two_stages import POOLED, REGIONS, SomeLevels, tiny_faster_rcnn, two_stage_batch
from tests.test_teacher_untouched import digest, flags

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
def test_taps_levels_and_projections(build):
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
    assert report.projections == (
        "crosskd.classification: 32 to 64 channels",
        "crosskd.regression: 32 to 64 channels",
    )
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
    assert "differs in" not in str(report)


def test_classes_levels_and_normalisation_that_differ():
    teacher = sure_of(tiny_retinanet(13, image_mean=[0.5, 0.5, 0.5]), *range(13))
    student = tiny_retinanet(
        12, seed=1, anchor_generator=AnchorGenerator(((64,), (128,)), ((0.5, 1.0, 2.0),) * 2)
    )
    student.backbone = SomeLevels(student.backbone, (1, 2))
    images, targets = tiny_batch()
    for target in targets:
        target["boxes"] = torch.tensor([[2.0, 4.0, 60.0, 62.0], [0.0, 0.0, 40.0, 60.0]])
    report = check(teacher, student, images, targets, class_map=[12, *range(11)])
    classes, levels, pixels = report.differences
    assert classes == (
        "classes: 13 (teacher), 12 (student), which are the teacher's 12, 0, 1, 2, 3, 4, 5, 6, 7, 8, …"
    )
    assert levels == "levels: the teacher's of strides [8.0] are left out"
    assert pixels == (
        "pixels: RGB, mean (0.5, 0.5, 0.5), deviation (0.229, 0.224, 0.225) (teacher), "
        "RGB, mean (0.485, 0.456, 0.406), deviation (0.229, 0.224, 0.225) (student)"
    )


def test_a_view_of_the_teachers_own():
    anchors = AnchorGenerator(tuple((2 * stride,) for stride in STRIDES), ((1.0,),) * len(STRIDES))
    teacher = tiny_fcos(side=128, anchor_generator=anchors)
    teacher.backbone.stem[0][0].stride = (4, 4)
    report = check(teacher, tiny_fcos(seed=1), *tiny_batch(), teacher_view=lambda images, targets: images)
    assert report.differences == (
        "scale: the teacher's strides are 2 times the student's",
        "pixels: (2, 3, 128, 128) (teacher), (2, 3, 64, 64) (student)",
    )


def test_a_teacher_of_another_family_and_other_classes():
    images, targets = tiny_batch()
    report = check(tiny_fcos(6), tiny_retinanet(seed=1), images, targets)
    assert report.differences == (
        "heads: FCOS (teacher), RetinaNet (student)",
        "a centerness or IoU is predicted by the teacher alone",
        "classes: 6 (teacher), 4 (student), without a class_map",
    )
    assert report.head_types == ("FCOS",)
    assert report.distillation_losses.keys() == {"kd_cls", "kd_reg"}
    assert report.fit.classless
    assert report.fit.objects == 4
    assert f"finds {report.fit.found} of 4 objects (score 0.3, IoU 0.5, any class)" in str(report)
    mapped = check(tiny_fcos(6), tiny_retinanet(seed=1), images, targets, class_map=[5, 0, 1, 3])
    assert not mapped.fit.classless
    assert "classes: 6 (teacher), 4 (student), which are the teacher's 5, 0, 1, 3" in mapped.differences


def test_methods_of_feature_maps_alone():
    pair, batch = (tiny_fcos(width=64), tiny_retinanet(seed=1)), tiny_batch()
    report = check(*pair, *batch, PKD())
    assert report.distillation_losses.keys() == {"kd_pkd"}
    assert report.splits == ()
    assert report.head_types == ()
    assert report.projections == tuple(f"pkd.level{level}: 32 to 64 channels" for level in range(3))
    assert report.differences == ("maps: [64, 64, 64] channels per level (teacher), [32, 32, 32] (student)",)
    # The teacher's head is run for it, with the same result as in a distillation of its predictions.
    whole = check(*pair, *batch)
    assert report.confidence == whole.confidence
    assert report.fit == whole.fit


def test_a_backbone_as_the_teacher():
    plain = TinyBackbone(width=24, hidden=8, batch_norm=False)
    report = check(plain, tiny_retinanet(seed=1), *tiny_batch(), PKD(), teacher_adapter=backbone())
    assert report.confidence is None
    assert report.fit is None
    assert report.teacher.endswith("adapter BackboneAdapter")
    assert any("a backbone without a head" in remark for remark in report.remarks)
    assert "largest class probability" not in str(report)


def test_levels_of_the_students_that_are_left_out():
    teacher = tiny_retinanet()
    teacher.backbone = SomeLevels(teacher.backbone, (1, 2))
    teacher.anchor_generator = AnchorGenerator(((64,), (128,)), ((0.5, 1.0, 2.0),) * 2)
    report = check(teacher, tiny_retinanet(seed=1), *tiny_batch(), PKD())
    assert "levels: the student's of strides [8.0] are left out" in report.differences


def test_a_bad_head_is_only_remarked_on_where_feature_maps_alone_are_distilled():
    report = check(sure_of(tiny_retinanet()), tiny_retinanet(seed=1), *tiny_batch(), PKD())
    assert report.fit.found == 0
    (unsure,) = report.remarks
    assert unsure.startswith("the teacher is sure of nothing on these images")


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
    assert "AP50" not in str(report)
    assert str(report).startswith("no fault found, but without objects")


def test_the_text_says_what_the_fields_do():
    report = check(tiny_fcos(width=64), tiny_fcos(seed=1), *tiny_batch())
    text = str(report)
    teacher = sum(parameter.numel() for parameter in tiny_fcos(width=64).parameters())
    assert f"teacher: FCOS, {teacher / 1e6:.2f} million parameters, adapter TorchvisionFCOS\n" in text
    assert "settings of FCOS\n" in text
    assert (
        "classification and regression branches: student after block 2, teacher after block 2 (post)" in text
    )
    shapes = "(2, 32, 8, 8), (2, 32, 4, 4), (2, 32, 2, 2)"
    assert text.count(f"levels 0 to 2: {shapes}; the teacher's width is 64") == 1
    assert "projection crosskd.regression: 32 to 64 channels" in text
    kd = report.losses["kd_cls"]
    assert f"  {'kd_cls':<24} {kd.value:>10.4g} {kd.gradient:>24.4g}" in text
    lowest, highest = min(report.confidence.highest), max(report.confidence.highest)
    assert f"largest class probability per image {lowest:.3f} to {highest:.3f} " in text
    fit = report.fit
    assert f"AP {fit.ap:.1f}, AP50 {fit.ap50:.1f} " in text
    assert f"finds {fit.found} of 4 objects (score 0.3, IoU 0.5, right class)" in text
    ratio = math.dist([0, 0], [report.losses[key].gradient for key in ("kd_cls", "kd_reg")]) / math.hypot(
        *(size.gradient for size in report.own_losses.values())
    )
    assert report.gradient_ratio == pytest.approx(ratio)
    assert f"gradient is {ratio:.3g} times" in text
    assert repr(report) == text


# -- the teacher's worth -------------------------------------------------------------------------


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
    assert not report.fit.classless
    assert report.fit.found_in_any_class > 0


# -- a teacher that has learned ------------------------------------------------------------------


def squares(count: int, seed: int) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Two red, green or blue squares, classes 0, 1 and 2, on grey."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for _ in range(count):
        image, boxes = torch.full((3, 64, 64), 0.5), []
        labels = torch.randint(0, 3, (2,), generator=generator)
        for label, left in zip(labels.tolist(), (2, 36), strict=True):
            x, y = (
                left + int(torch.randint(0, 8, (), generator=generator)),
                int(torch.randint(0, 40, (), generator=generator)),
            )
            image[:, y : y + 18, x : x + 18] = 0.05
            image[label, y : y + 18, x : x + 18] = 0.95
            boxes.append([x, y, x + 18, y + 18])
        images.append(image)
        targets.append({"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": labels})
    return images, targets


@pytest.fixture(scope="module")
def learned() -> nn.Module:
    """A RetinaNet that has learned eight images of squares by heart, in seconds."""
    anchors = AnchorGenerator(((18,), (32,), (64,)), ((1.0,),) * 3)
    teacher = tiny_retinanet(3, norm="group", blocks=1, hidden=16, anchor_generator=anchors)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=5e-3)
    images, targets = squares(8, seed=0)
    for _ in range(80):
        losses = teacher.train()(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(teacher.parameters(), 5.0)
        optimizer.step()
    return teacher


def beginner() -> nn.Module:
    anchors = AnchorGenerator(((18,), (32,), (64,)), ((1.0,),) * 3)
    return tiny_retinanet(3, norm="group", blocks=1, seed=1, anchor_generator=anchors)


def judged(teacher: nn.Module, *batch, methods=None, **options) -> crosskd.diagnostics.CheckReport:
    methods = CrossKD(position=0) if methods is None else methods
    return check(teacher, beginner(), *batch, methods=methods, **options)


def test_a_good_teacher_is_ready(learned):
    report = judged(learned, *squares(8, seed=0))
    fit = report.fit
    assert (fit.images, fit.objects) == (8, 16)
    assert fit.ap50 > 80
    assert fit.ap50 > fit.ap > 20
    assert min(fit.found, fit.found_in_any_class, fit.right) >= 15
    assert max(fit.false_alarms, fit.duplicates) < 2
    assert report.remarks == ()
    first, *_, last = str(report).splitlines()
    assert first == report.verdict == "ready: no fault found"
    assert "distiller.parameters()" in last
    assert "16 objects say little" in str(report)


def test_its_average_precision_is_that_of_its_own_detections(learned):
    images, targets = squares(8, seed=0)
    own = copy.deepcopy(learned).eval()(images)
    seen = [
        Seen(1.0, 1, of["boxes"], of["scores"], of["labels"], Objects(**target), torch.full((2,), -1))
        for of, target in zip(own, targets, strict=True)
    ]
    fit, alone = judged(learned, images, targets).fit, fit_of(seen, classless=False)
    assert (fit.ap, fit.ap50) == (pytest.approx(alone.ap, abs=2), pytest.approx(alone.ap50, abs=2))


@pytest.mark.parametrize("shift", [1, 2])
def test_every_class_in_another_place_is_refused_with_the_map_that_mends_it(learned, shift):
    images, targets = squares(8, seed=0)
    for target in targets:
        target["labels"] = (target["labels"] + shift) % 3
    mended = [(label - shift) % 3 for label in range(3)]
    message = rf"over 16 objects .* class_map=\[{', '.join(map(str, mended))}\] would put these right"
    with pytest.raises(ValueError, match=message):
        judged(learned, images, targets)
    assert judged(learned, images, targets, class_map=mended).remarks == ()


def test_two_classes_that_are_swapped_are_refused(learned):
    images, targets = squares(8, seed=0)
    for target in targets:
        target["labels"] = torch.tensor([1, 0, 2])[target["labels"]]
    with pytest.raises(ValueError, match=r"class_map=\[1, 0, 2\] would put these right"):
        judged(learned, images, targets)


def test_a_weak_teacher_is_no_good_one(learned):
    """On squares of other places it finds some: the verdict says how few, and what is usual."""
    images, targets = squares(8, seed=0)
    noisy = [
        0.2 * image + 0.8 * torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
        for image in images
    ]
    report = judged(learned, noisy, targets, methods=PKD())
    assert 0 <= report.fit.ap50 < 25
    assert report.verdict.startswith("look at ")


@pytest.mark.parametrize(
    ("change", "numbers"), [(lambda p: 255 * p, "12.8 to 242"), (lambda p: p / 255, "0.000")]
)
def test_pixels_of_another_range(learned, change, numbers):
    images, targets = squares(8, seed=0)
    images = [change(image) for image in images]
    try:
        found = judged(learned, images, targets).remarks[0]
    except ValueError as error:
        found = str(error)
    assert f"the images have pixels from {numbers}" in found
    assert "255" in found


def test_pixels_that_were_normalised_before():
    images = [(image - 0.45) / 0.225 for image in squares(2, seed=0)[0]]
    with pytest.raises(ValueError, match="pixels from -1.78 to 2.22, .* they look normalised already"):
        check(tiny_retinanet(), tiny_retinanet(seed=1), images)


def test_a_teacher_built_for_larger_images(learned):
    larger = copy.deepcopy(learned)
    larger.transform.min_size, larger.transform.max_size = (128,), 256
    report = judged(larger, *squares(8, seed=0))
    assert report.remarks[0].startswith("the teacher was built for images 2 times as large (")
    assert "min_size=(128,)" in report.remarks[0]
    assert "64 by 64" in report.remarks[0]


# -- several batches -----------------------------------------------------------------------------


class Counting:
    """A loader that counts what was taken of it."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self):
        for seed in range(9):
            self.taken += 1
            yield squares(2, seed=seed)


@pytest.mark.parametrize(("limits", "expected"), [({}, 4), ({"batches": 2}, 2), ({"seconds": 0.0}, 1)])
def test_a_loader(learned, limits, expected):
    loader = Counting()
    report = check(learned, beginner(), loader, methods=PKD(), **limits)
    assert loader.taken == expected
    assert report.images == report.fit.images == 2 * expected
    assert report.fit.objects == 4 * expected
    assert f"the teacher on {2 * expected} images" in str(report)
    # The losses are the first batch's.
    assert report.own_losses == check(learned, beginner(), *squares(2, seed=0), PKD()).own_losses


def test_loaders_of_something_else():
    pair = tiny_retinanet(), tiny_retinanet(seed=1)
    with pytest.raises(TypeError, match="pairs .images, targets. .* got a Tensor"):
        check(*pair, iter(tiny_batch()[0]))
    with pytest.raises(ValueError, match="the loader gives no batch"):
        check(*pair, iter([]))
    report = check(*pair, [(images, None) for images in (tiny_batch()[0], tiny_batch(seed=1)[0])])
    assert (report.images, report.fit) == (4, None)


def test_no_other_process_is_waited_for(monkeypatch):
    def asked(*_, **__):
        raise AssertionError("a collective call, which other processes would have to make, too")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", asked)
    monkeypatch.setattr(torch.distributed, "all_reduce", asked)
    for build in BUILD.values():
        check(build(), build(seed=1), *tiny_batch())
    assert torch.distributed.is_initialized()


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
    message = "finds none of the 4 objects in the targets, 0 in any class, AP50 0.0. Check its weights, that"
    with pytest.raises(ValueError, match=message):
        check(teacher, build(seed=1), *tiny_batch())


def test_a_teacher_with_its_classes_in_another_order():
    images, targets = tiny_batch()
    for target in targets:
        target["labels"] = torch.ones_like(target["labels"])
    message = r"over 4 objects .* right one 0 times, class 1 for 2 \(4 of 4\) .*: check the order of classes"
    with pytest.raises(ValueError, match=message):
        check(sure_of(tiny_retinanet(), 2), tiny_retinanet(seed=1), images, targets)


def test_a_student_without_a_gradient():
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
    mimicking = PredictionMimicking()
    with pytest.raises(ValueError, match="the teacher predicts 5 classes and the student 4: give class_map="):
        check(tiny_retinanet(5), tiny_retinanet(), *tiny_batch(), mimicking)
    with pytest.raises(ValueError, match="the anchors differ on the first batch"):
        check(tiny_retinanet(), tiny_fcos(), *tiny_batch(), mimicking)
    frozen = tiny_retinanet(seed=1).requires_grad_(False)
    with pytest.raises(ValueError, match="none of the student's parameters is trainable"):
        check(tiny_retinanet(), frozen, *tiny_batch())


def test_a_student_whose_own_forward_is_another():
    student = tiny_retinanet(seed=1)
    forward = student.forward
    student.forward = lambda *arguments: {name: loss / 2 for name, loss in forward(*arguments).items()}
    with pytest.raises(ValueError, match="student: RetinaNet's own forward computes something else"):
        check(tiny_retinanet(), student, *tiny_batch())


# -- what is remarked on -------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "times"), [(1e3, "e"), (1e-5, "e-")])
def test_losses_out_of_proportion(weight, times):
    method = CrossKD(cls_weight=weight, reg_weight=weight)
    *_, remark = check(tiny_retinanet(), tiny_retinanet(seed=1), *tiny_batch(), method).remarks
    assert remark.startswith("the distillation's gradient is ")
    assert remark.endswith(" times that of the student's own losses: look at the methods' weights")


def test_a_teacher_that_misses_most():
    images, targets = tiny_batch()
    for target in targets:
        target["labels"][:] = torch.tensor([1, 0])
    targets[0]["labels"][:] = 0
    report = check(sure_of(tiny_retinanet(), 1), tiny_retinanet(seed=1), images, targets)
    assert (report.fit.found, report.fit.found_in_any_class) == (1, 4)
    weak, *_ = [remark for remark in report.remarks if f"AP50 {report.fit.ap50:.1f}" in remark]
    assert "finds 1 of 4 objects" in weak


def test_targets_without_objects():
    images, targets = tiny_batch()
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in targets]
    report = check(tiny_fcos(), tiny_fcos(seed=1), images, empty)
    assert report.fit is None
    assert "the targets hold no object" in report.remarks[0]


class WithoutObjects(TorchvisionRetinaNet):
    """Gives no objects of its targets."""

    def prepare(self, images, targets):
        return dataclasses.replace(super().prepare(images, targets), objects=None)


def test_an_adapter_without_objects():
    report = check(tiny_retinanet(), tiny_retinanet(seed=1), *tiny_batch(), adapter=WithoutObjects)
    assert report.fit is None
    (remark,) = report.remarks
    assert remark.startswith("the student's adapter gives no objects of the targets")


def test_a_loss_that_does_not_reach_the_student():
    class Detached(PKD):
        def forward(self, step):
            return {"kd_pkd": super().forward(step)["kd_pkd"].detach()}

    report = check(tiny_retinanet(), tiny_retinanet(seed=1), *tiny_batch(), [CrossKD(), Detached()])
    assert report.losses["kd_pkd"].gradient == 0
    assert report.remarks[-1].startswith("no gradient of kd_pkd reaches the student")


@pytest.mark.mmdet
def test_mmdets_samples_hold_objects():
    from tests.helpers.mmdet_heads import batch_of, detector_of, head_settings

    teacher, student = (detector_of(head_settings("gfl"), seed=seed) for seed in (0, 1))
    nn.init.normal_(teacher.bbox_head.gfl_cls.weight, std=1e-3)
    teacher.bbox_head.gfl_cls.bias.data[:] = torch.eye(len(teacher.bbox_head.gfl_cls.bias))[1] * 6 - 3
    images, samples = batch_of()
    for sample in samples:
        sample.gt_instances.labels[:] = 1
    # Distances of about two strides to each side, whatever the features.
    nn.init.normal_(teacher.bbox_head.gfl_reg.weight, std=1e-3)
    teacher.bbox_head.gfl_reg.bias.data.view(4, 17)[:, 2] = 8.0
    report = check(teacher, student, images, samples)
    assert report.fit.objects == 4
    assert report.fit.right == report.fit.seen > 0


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


def test_both_heads_of_a_detector_of_two_stages():
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
    assert report.projections == (
        "crosskd_rpn.rpn: 16 to 24 channels",
        "crosskd_box.box: 16 to 24 channels",
    )
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
    assert "settings of RPN, box head" in text
    assert "crosskd_box, box branch: student after block 0, teacher after block 2 (post)" in text


def test_the_box_head_is_held_against_the_objects_at_the_teachers_own_proposals():
    report = check(sure_in_two_stages(), tiny_faster_rcnn(seed=1), *anchor_batch(1))
    sure = torch.tensor([0.0, 3.0, 0.0, 0.0, 0.0]).softmax(0)[1].item()
    assert report.confidence.highest == pytest.approx((sure, sure), abs=1e-2)
    assert min(report.confidence.sure) > REGIONS
    assert (report.fit.found, report.fit.objects, report.fit.right, report.fit.seen) == (4, 4, 4, 4)
    # Among the regions that the student trains on are the objects themselves, which this one never proposes.
    with pytest.raises(ValueError, match="the teacher finds none of the 4 objects"):
        check(sure_in_two_stages(size=0.2), tiny_faster_rcnn(seed=1), *anchor_batch(1))
    with pytest.raises(ValueError, match=r"class 1 for 2 \(4 of 4\) .*: check the order of"):
        check(sure_in_two_stages(label=2), tiny_faster_rcnn(seed=1), *anchor_batch(1))


def test_the_whole_teacher_is_judged_where_its_proposals_alone_are_distilled():
    report = check(sure_in_two_stages(), tiny_faster_rcnn(seed=1), *anchor_batch(1), CrossKD(head="rpn"))
    assert report.distillation_losses.keys() == {"kd_rpn_cls", "kd_rpn_reg"}
    assert (report.fit.found, report.fit.objects, report.fit.right) == (4, 4, 4)


def test_a_larger_view_of_two_stages_and_images_without_labels():
    def doubled(images, targets):
        return [nn.functional.interpolate(image[None], scale_factor=2)[0] for image in images]

    teacher = sure_in_two_stages(min_size=128, max_size=128)
    student = tiny_faster_rcnn(seed=1)
    settings = {"methods": CrossKD(head="box"), "teacher_view": doubled}
    images, targets = anchor_batch(1)
    for target in targets:  # half of a side of any anchor, which the teacher's are in the student's pixels
        target["boxes"] = torch.tensor([[20.0, 20.0, 28.0, 28.0], [4.0, 36.0, 12.0, 44.0]])
    report = check(teacher, student, images, targets, **settings)
    assert (report.fit.right, report.fit.objects) == (4, 4)
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
