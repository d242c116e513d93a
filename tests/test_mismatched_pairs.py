"""Teachers and students that differ: depth, classes, levels, backbones, and what they see."""

from __future__ import annotations

import copy
import logging
import types
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator

from crosskd import CrossKD, Distiller, PredictionMimicking
from crosskd.predictions import Predictions
from tests.adapters.test_generic import Fully, PerLevel, Shared, adapter_for, fully_adapter, pixels
from tests.helpers.tiny import STRIDES, TinyBackbone, liven, tiny_batch, tiny_fcos, tiny_retinanet
from tests.test_docs import ROOT, python_blocks


@pytest.fixture(params=[tiny_retinanet, tiny_fcos], ids=["retinanet", "fcos"])
def build(request):
    """Builds a detector of a family."""
    return request.param


class Watched(CrossKD):
    """CrossKD that remembers what it was given."""

    def forward(self, step):
        self.step = step
        return super().forward(step)


def step_of(distiller: Distiller, batch=None) -> tuple[dict[str, Tensor], Watched]:
    losses = distiller(*(batch or tiny_batch()))
    return losses, distiller.methods["crosskd"]


def assert_reaches_the_student(distiller: Distiller, losses: dict[str, Tensor]) -> None:
    assert all(loss.isfinite() for loss in losses.values())
    (losses["kd_cls"] + losses["kd_reg"]).backward()
    assert max(p.grad.abs().max() for p in distiller.student.backbone.parameters() if p.grad is not None) > 0


# -- depth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "teacher"), [((2, 1), (4, 3)), ((4, 4), (2, 0)), ((1, 0), (4, 4))])
def test_each_tower_is_split_at_its_own_position(build, student, teacher):
    distiller = Distiller(
        build(blocks=teacher[0]), build(blocks=student[0], seed=1), Watched(position=(student[1], teacher[1]))
    )
    losses, method = step_of(distiller)
    assert_reaches_the_student(distiller, losses)
    for branch, sub_head in (("classification", "classification_head"), ("regression", "regression_head")):
        tower = getattr(distiller.student.head, sub_head).conv
        grads = [layer.weight.grad for layer in tower.modules() if isinstance(layer, nn.Conv2d)]
        assert [grad is not None for grad in grads] == [n < student[1] for n in range(student[0])]
        points = method.points(branch)
        assert (points[0].position, points[1].position) == (student[1], teacher[1])


def test_a_position_that_fits_one_side_only_names_the_other(build):
    with pytest.raises(ValueError, match="student: position 3 does not fit the classification tower of 2 bl"):
        Distiller(build(blocks=4), build(blocks=2), CrossKD(position=(3, 3)))
    with pytest.raises(ValueError, match="teacher: position 5 does not fit the classification tower of 4 bl"):
        Distiller(build(blocks=4), build(blocks=2), CrossKD(position=(2, 5)))


# -- classes --------------------------------------------------------------------------------------


def permuted(detector: nn.Module, order: list[int], anchors: int) -> nn.Module:
    """The same detector with its classes in another order, and some of them left out."""
    twin = copy.deepcopy(detector)
    head = twin.head.classification_head
    classes = head.num_classes
    rows = torch.tensor([anchor * classes + index for anchor in range(anchors) for index in order])
    head.cls_logits.weight = nn.Parameter(head.cls_logits.weight[rows])
    head.cls_logits.bias = nn.Parameter(head.cls_logits.bias[rows])
    head.num_classes = len(order)
    return twin


@pytest.mark.parametrize("order", [[2, 0, 1, 3], [3, 1], [4, 0, 2]])
@pytest.mark.parametrize("method", [CrossKD(), PredictionMimicking()])
def test_a_class_map_is_the_teacher_with_its_classes_so_ordered(build, order, method):
    anchors = 3 if build is tiny_retinanet else 1
    teacher, student = build(max(order) + 1), build(len(order), seed=1)
    batch = tiny_batch(num_classes=len(order))
    expected = Distiller(permuted(teacher, order, anchors), copy.deepcopy(student), method)(*batch)
    losses = Distiller(teacher, student, method, class_map=order)(*batch)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, msg=name)
    unlabelled = Distiller(teacher, student, method, class_map=order)(batch[0])
    assert all(loss.isfinite() for loss in unlabelled.values())


def test_a_class_map_that_changes_nothing_changes_nothing(build):
    losses = [
        Distiller(build(), build(seed=1), CrossKD(), class_map=m)(*tiny_batch()) for m in (None, range(4))
    ]
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])


@pytest.mark.parametrize("class_map", [[0, 1], [0, 1, 2, 2], [0, 1, 2, 6], [0, 1, 2, -1], [0, 1, 2, 1.0]])
def test_class_maps_that_do_not_fit(build, class_map):
    message = (
        "class_map must name a class of the teacher's, 0 to 5, for each of the student's 4, none of them"
    )
    with pytest.raises(ValueError, match=message):
        Distiller(build(6), build(4), CrossKD(), class_map=class_map)


# -- levels ---------------------------------------------------------------------------------------


def with_levels(build, levels: list[int], seed: int, **options) -> nn.Module:
    """A detector that has only some of the three levels."""
    sizes = tuple(((4 if build is tiny_retinanet else 1) * STRIDES[level],) for level in levels)
    ratios = (0.5, 1.0, 2.0) if build is tiny_retinanet else (1.0,)
    anchors = AnchorGenerator(sizes, (ratios,) * len(levels))
    detector = build(seed=seed, anchor_generator=anchors, **options)
    full = TinyBackbone.forward

    def some(backbone, pixels):
        maps = full(backbone, pixels)
        return {str(level): maps[str(level)] for level in levels}

    detector.backbone.forward = types.MethodType(some, detector.backbone)
    return detector


@pytest.mark.parametrize("levels", [[1, 2], [0, 1], [1], [0, 2]])
@pytest.mark.parametrize("method", [Watched(), PredictionMimicking()])
def test_a_student_may_lack_some_of_the_teachers_levels(build, levels, method, caplog):
    teacher, student = build(), with_levels(build, levels, seed=1)
    with caplog.at_level(logging.INFO, logger="crosskd"):
        distiller = Distiller(teacher, student, method)
        losses = distiller(*tiny_batch())
        distiller(*tiny_batch())
    left_out = [float(stride) for level, stride in enumerate(STRIDES) if level not in levels]
    assert [record.getMessage() for record in caplog.records] == [
        f"the teacher's levels of strides {left_out} are left out: the student has none like them"
    ]
    # The same as with a teacher that never had the others.
    expected = Distiller(with_levels(build, levels, seed=0), student, method)(*tiny_batch())
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, msg=name)
    assert_reaches_the_student(distiller, losses)


def test_anchors_of_the_shared_levels_must_agree():
    student = with_levels(tiny_retinanet, [1, 2], seed=1)
    student.anchor_generator.sizes = ((32,), (64,))
    with pytest.raises(
        ValueError, match=r"anchor sizes differ: \(\(64.0,\), \(128.0,\)\) \(teacher\), \(\(32"
    ):
        Distiller(tiny_retinanet(), student, CrossKD())


# -- backbones ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs_page():
    """What the documentation's page of pairs defines: networks, and a RetinaNet on a pyramid of each."""
    (line, block), *_ = python_blocks(ROOT / "docs/pairs.md")
    shown = {"__name__": "pairs.md"}
    exec(compile("\n" * line + block, str(ROOT / "docs/pairs.md"), "exec"), shown)
    return shown


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (("swin_t", 256), ("mobilenet_v3_large", 64)),
        (("mobilenet_v3_large", 256), ("mobilenet_v3_large", 64)),
        (("resnet18", 64), ("swin_t", 64)),
        (("swin_t", 64), ("resnet18", 128)),
    ],
    ids=lambda side: f"{side[0]} of {side[1]}",
)
def test_backbones_of_every_kind(pairs_page, teacher, student):
    def build(network, width):
        detector = pairs_page["detector"](pairs_page[network], width, num_classes=4)
        liven(detector.head)
        return detector

    distiller = Distiller(build(*teacher), build(*student), Watched())
    losses, method = step_of(distiller)
    widths = {(p.student_width, p.teacher_width) for p in method.projections.values()}
    assert widths == ({(student[1], teacher[1])} if student[1] != teacher[1] else set())
    assert_reaches_the_student(distiller, losses)
    stages = distiller.student.backbone.stages.parameters()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in stages)
    assert method.step.student.logits.shape == (2, 3 * (8 * 8 + 4 * 4 + 2 * 2), 4)


# -- what the teacher sees ------------------------------------------------------------------------


def clean(images, targets):
    """The images as they were before the student's were darkened."""
    return [image * 2 for image in images]


def test_the_teacher_sees_its_own_view_of_the_batch(build):
    teacher, student = build(), build(seed=1)
    images, targets = tiny_batch()
    dark = [image / 2 for image in images]
    losses = Distiller(teacher, copy.deepcopy(student), CrossKD(), teacher_view=clean)(dark, targets)
    plain = Distiller(teacher, copy.deepcopy(student), Watched())
    plain(images, targets)
    watched = Distiller(teacher, copy.deepcopy(student), Watched(), teacher_view=clean)
    watched(dark, targets)
    seen = [d.methods["crosskd"].step.teacher.logits for d in (plain, watched)]
    assert torch.equal(*seen)  # the teacher's predictions on clean images
    own = student.train()(dark, targets)  # the student's own losses on dark ones
    assert all(torch.equal(losses[name], loss) for name, loss in own.items())
    assert losses["kd_cls"] != Distiller(teacher, student, CrossKD())(dark, targets)["kd_cls"]


def test_a_view_may_come_with_the_targets():
    images, targets = tiny_batch()
    for image, target in zip(images, targets, strict=True):
        target["thermal"] = image.flip(0)
    distiller = Distiller(
        tiny_retinanet(),
        tiny_retinanet(seed=1),
        Watched(),
        teacher_view=lambda images, targets: [target["thermal"] for target in targets],
    )
    distiller(images, targets)
    expected = Distiller(tiny_retinanet(), tiny_retinanet(seed=1), Watched())
    expected([image.flip(0) for image in images], targets)
    seen = [d.methods["crosskd"].step.teacher.logits for d in (distiller, expected)]
    assert torch.equal(*seen)


def same(images, targets):
    """The teacher resizes the images by itself."""
    return images


def larger_teacher(build) -> nn.Module:
    """A teacher for images of twice the side, on strides and anchors of twice the size."""
    scale = 4 if build is tiny_retinanet else 1
    sizes = tuple((2 * scale * stride,) for stride in STRIDES)
    ratios = (0.5, 1.0, 2.0) if build is tiny_retinanet else (1.0,)
    teacher = build(side=128, anchor_generator=AnchorGenerator(sizes, (ratios,) * len(sizes)))
    first = teacher.backbone.stem[0][0]
    first.stride = (4, 4)
    return teacher


def test_a_teacher_at_a_higher_resolution_with_matching_strides(build):
    distiller = Distiller(larger_teacher(build), build(seed=1), Watched(), teacher_view=same)
    losses, method = step_of(distiller)
    assert_reaches_the_student(distiller, losses)
    assert method.step.teacher.logits.shape == method.step.student.logits.shape
    with pytest.raises(ValueError, match="strides differ"):
        Distiller(larger_teacher(build), build(seed=1), CrossKD())


def test_anchors_must_have_the_strides_factor():
    teacher = larger_teacher(tiny_retinanet)
    teacher.anchor_generator = tiny_retinanet().anchor_generator
    with pytest.raises(ValueError, match="anchor sizes differ: .* times 2, as the strides are"):
        Distiller(teacher, tiny_retinanet(seed=1), CrossKD(), teacher_view=same)


@pytest.mark.parametrize("resize", [False, True])
def test_levels_of_another_size_are_resized_where_asked_for(build, resize):
    teacher = build(side=96)  # the same strides on larger images
    distiller = Distiller(teacher, build(seed=1), Watched(), teacher_view=same, resize_levels=resize)
    if not resize:
        with pytest.raises(ValueError, match=r"levels differ: \[\(12, 12\).*\(student\).*resize_levels=True"):
            distiller(*tiny_batch())
        return
    losses, method = step_of(distiller)
    assert_reaches_the_student(distiller, losses)
    assert method.step.teacher.logits.shape == method.step.student.logits.shape


def test_resizing_changes_nothing_where_sizes_agree(build):
    losses = [
        Distiller(build(), build(seed=1), CrossKD(), resize_levels=resize)(*tiny_batch())
        for resize in (False, True)
    ]
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])


# -- what is refused ------------------------------------------------------------------------------

METHODS = pytest.mark.parametrize("method", [CrossKD(), PredictionMimicking()], ids=lambda m: m.name)


def refused(message: str, teacher: nn.Module, student: nn.Module, *arguments, **options) -> None:
    """Checks that a pair is refused when the distiller is made."""
    with pytest.raises(ValueError, match=message):
        Distiller(teacher, student, *arguments, **options)


def with_new_predictor(detector: nn.Module, name: str, numbers: int) -> nn.Module:
    """As after a change of one predictor that the rest of the head was not told of."""
    branch = "classification" if name == "cls_logits" else "regression"
    head = detector.head.get_submodule(f"{branch}_head")
    setattr(head, name, nn.Conv2d(32, numbers, 3, padding=1))
    return detector


@METHODS
@pytest.mark.parametrize(("name", "numbers"), [("cls_logits", 24), ("bbox_reg", 36)])
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_head_whose_predictors_do_not_fit_its_classes_or_anchors(build, method, name, numbers, side):
    pair = {"teacher": build(), "student": build(seed=1)}
    with_new_predictor(pair[side], name, numbers)
    refused(
        rf"{side}: head\.\w+\.{name} gives {numbers} numbers a location, but \d anchors",
        *pair.values(),
        method,
    )


@METHODS
def test_detectors_of_different_families(method):
    message = (
        r"families: torchvision's RetinaNet \(teacher\), torchvision's FCOS \(student\).*student's family"
    )
    refused(message, tiny_retinanet(), tiny_fcos(seed=1), method)


class DoublingCoder(BoxCoder):
    def decode_single(self, rel_codes, boxes):
        return super().decode_single(2 * rel_codes, boxes)


class DoublingLinearCoder(BoxLinearCoder):
    def decode(self, rel_codes, boxes):
        return super().decode(2 * rel_codes, boxes)


@METHODS
def test_a_box_coder_of_another_class(build, method):
    teacher = build()
    if build is tiny_retinanet:
        coder = teacher.box_coder = teacher.head.regression_head.box_coder = DoublingCoder(
            (1.0, 1.0, 1.0, 1.0)
        )
    else:
        coder = teacher.box_coder = teacher.head.box_coder = DoublingLinearCoder(normalize_by_size=True)
    message = (
        rf"box coding differs: .*{type(coder).__name__}.* \(teacher\), .*'Box(Linear)?Coder'.* \(student\)"
    )
    refused(message, teacher, build(seed=1), method)


def with_channels(build, channels: int, **options) -> nn.Module:
    """A detector for images of other channels than three."""
    detector = build(image_mean=[0.5] * channels, image_std=[0.2] * channels, **options)
    detector.backbone.stem[0][0] = nn.Conv2d(channels, 8, 3, stride=2, padding=1)
    return detector


@METHODS
@pytest.mark.parametrize("channels", [(1, 3), (3, 1), (6, 3)])
def test_images_of_other_channels(build, method, channels):
    teacher, student = (with_channels(build, n, seed=seed) for seed, n in enumerate(channels))
    message = rf"channels differ: {channels[0]} \(teacher\), {channels[1]} \(student\).*teacher_view="
    refused(message, teacher, student, method)


@pytest.mark.parametrize(("theirs", "ours"), [(1, 3), (3, 1)])
def test_a_view_of_other_channels(theirs, ours):
    def view(images, targets):
        return [image[:1].expand(theirs, -1, -1) for image in images]

    pair = with_channels(tiny_retinanet, theirs), with_channels(tiny_retinanet, ours, seed=1)
    distiller = Distiller(*pair, CrossKD(), teacher_view=view)
    images, targets = tiny_batch()
    assert_reaches_the_student(distiller, distiller([image[:ours] for image in images], targets))


def test_levels_are_told_whatever_the_channels():
    teacher, student = (with_channels(tiny_fcos, 6, seed=seed) for seed in range(2))
    student.backbone.stem[0][0].stride = (4, 4)
    refused(r"strides differ: \[8.0, 16.0, 32.0\] \(teacher\), \[16.0", teacher, student, CrossKD())


# -- what is refused of detectors that are named, not written -------------------------------------


@METHODS
@pytest.mark.parametrize(
    ("teacher", "student", "options", "message"),
    [
        (
            Shared(anchors=3),
            Shared(seed=1),
            {},
            r"differ, .*: \[3\] \(teacher\), \[1\] \(student\).*build both heads",
        ),
        # As many boxes in all, 144, but at other places.
        (
            PerLevel(anchors=(1, 5)),
            PerLevel(anchors=(2, 1), seed=1),
            {"paths": "heads.*."},
            r"anchors a location differ, level by level: \[1, 5\] \(teacher\), \[2, 1\] \(student\)",
        ),
        (
            PerLevel(levels=3, anchors=(1, 2, 1)),
            PerLevel(anchors=(1, 1), seed=1),
            {"paths": "heads.*.", "strides": lambda d: [2, 4, 8] if len(d.heads) == 3 else [4, 8]},
            r"anchors a location differ, level by level: \[2, 1\] \(teacher\), \[1, 1\] \(student\)",
        ),
        (
            PerLevel(levels=3, anchors=(1, 1, 1)),
            PerLevel(seed=1),
            {"paths": "heads.*."},
            r"levels differ: 3 \(teacher\), 2 \(student\).*Pass strides=",
        ),
        (
            Shared(classes=5),
            Shared(seed=1),
            {"num_classes": 3},
            "teacher: num_classes= is 3 for Shared, whose predictors give 5 classes at each anchor: leave it",
        ),
    ],
)
def test_predictors_of_named_detectors(method, teacher, student, options, message):
    refused(message, teacher, student, method, adapter_for(**options))


@METHODS
def test_towers_of_other_kinds_of_layers(method):
    student = Fully(space=(3, 4), seed=1)
    student.tower = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()))
    student.cls, student.box = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 8, 1)
    message = r"both tower differs in kind: linear layers, channels last \(teacher\), convolutions \(student"
    refused(message, Fully(space=(3, 4)), student, method, fully_adapter())


@METHODS
def test_classes_that_only_predict_tells(method):
    """Seen on the first step, before anything is compared."""

    def predict(detector, level, towers):
        outputs = detector.head.cls(towers["cls"]), detector.head.box(towers["box"])
        return Predictions(*(output.flatten(2).mT for output in outputs), None)

    distiller = Distiller(
        Shared(classes=5), Shared(seed=1), method, adapter_for(predict=predict, num_classes=3)
    )
    with pytest.raises(
        ValueError, match="num_classes= is 3, but Shared gives logits of 5 classes: pass a fun"
    ):
        distiller(pixels(), [])


@dataclass
class Places:
    """Where boxes are, a level."""

    by_level: list[Tensor]


@METHODS
@pytest.mark.parametrize("form", [Places, list, lambda places: {"by_level": places}])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_places_are_compared_in_whatever_form_they_come(method, form, offset):
    """The teacher has a level more: the others are compared."""

    def places(detector, inputs, features):
        shift = offset if len(features) == 3 else 0.0
        return form([torch.full((level[0, 0].numel(), 2), level.shape[-1] + shift) for level in features])

    teacher, student = Shared(levels=3), Shared(seed=1)
    strides = {3: [2, 4, 8], 2: [2, 4]}
    adapter = adapter_for(locations=places, strides=lambda d: strides[len(d.backbone.stages)])
    distiller = Distiller(teacher, student, method, adapter)
    if not offset:
        assert distiller(pixels(), [])["kd_cls"] > 0
        return
    with pytest.raises(ValueError, match=r"locations of the first batch, \(64, 2\), have other values for"):
        distiller(pixels(), [])


# -- what is refused of mmdet's detectors, and of ultralytics' ------------------------------------


def of_mmdet(seed: int, *channels: float) -> nn.Module:
    """A detector of mmdet's whose images have so many channels, by their mean; none that it normalises."""
    from tests.mmdet_heads import detector_of, head_settings

    normalising = {"mean": [127.0 for _ in channels], "std": list(channels)} if channels else {}
    preprocessor = {"type": "DetDataPreprocessor", **normalising}
    return detector_of(head_settings("gfl"), seed=seed, data_preprocessor=preprocessor)


# -- what the first step sees -----------------------------------------------------------------------


def test_boxes_that_the_two_decode_otherwise():
    def decode(detector, regression, locations):
        return (
            adapter_for().decode(detector, Predictions(regression, regression, None), locations)
            * detector.scale
        )

    teacher, student = Shared(), Shared(seed=1)
    teacher.scale, student.scale = 2.0, 1.0
    distiller = Distiller(teacher, student, CrossKD(), adapter_for(decode=decode))
    with pytest.raises(
        ValueError, match=r"box coding differs: one prediction is the box .* \(teacher\) and .*"
    ):
        distiller(pixels())


def test_numbers_of_another_type():
    distiller = Distiller(tiny_retinanet().double(), tiny_retinanet(seed=1), CrossKD())
    message = r"the teacher's weights are torch.float64 and the student's torch.float32: cast both"
    with pytest.raises(ValueError, match=message):
        distiller(*tiny_batch())


def test_a_frozen_student_of_another_width():
    distiller = Distiller(tiny_retinanet(width=16), tiny_retinanet(width=8, seed=1), CrossKD())
    distiller.student.requires_grad_(False)
    with pytest.raises(ValueError, match="tower, position 3 depend on no trainable parameter, so distilling"):
        distiller(*tiny_batch())


@pytest.mark.mmdet
def test_one_detector_of_mmdets_and_one_of_torchvisions():
    message = r"torchvision's RetinaNet \(teacher\), mmdet's SingleStageDetector \(student\)"
    refused(message, tiny_retinanet(), of_mmdet(2), CrossKD())


@pytest.mark.mmdet
def test_channels_of_mmdets_images():
    teacher, student = of_mmdet(1, 60.0), of_mmdet(2, 60.0, 60.0, 60.0)
    refused(r"channels differ: 1 \(teacher\), 3 \(student\).*teacher_view=", teacher, student, CrossKD())
    Distiller(teacher, student, CrossKD(), teacher_view=lambda images, _: images[:, :1])


@pytest.mark.mmdet
def test_a_teacher_of_mmdets_that_does_not_normalise_alone():
    with pytest.warns(
        UserWarning, match="teacher's data preprocessor does not normalise, the student's does"
    ):
        Distiller(of_mmdet(1), of_mmdet(2, 60.0, 60.0, 60.0), CrossKD())


@pytest.mark.mmdet
def test_a_config_says_what_bridges_a_pair():
    from tests.adapters.test_mmdet_detector import build, config_of, model_of

    settings = {"teacher": model_of(num_classes=7)}
    with pytest.raises(ValueError, match="the teacher predicts 7 classes and the student 5: give class_map="):
        build(config_of(**settings))
    bridged = build(config_of(**settings, class_map=[6, 0, 1, 2, 3], resize_levels=True)).distiller
    assert (bridged._class_map, bridged.resize_levels) == ((6, 0, 1, 2, 3), True)


@pytest.mark.ultralytics
def test_a_yolo_and_one_of_torchvisions():
    from tests.yolo import model_of

    message = r"ultralytics's DetectionModel \(teacher\), torchvision's FCOS \(student\)"
    refused(message, model_of("yolov8n"), tiny_fcos(seed=1), CrossKD())


@pytest.mark.ultralytics
def test_a_yolo_that_sees_other_channels_by_a_view():
    from tests.yolo import batch_of, model_of

    teacher, student = model_of("yolov8n", ch=1, seed=1).eval(), model_of("yolov8n")
    refused(r"channels differ: 1 \(teacher\), 3 \(student\).*teacher_view=", teacher, student, CrossKD())
    distiller = Distiller(teacher, student, CrossKD(), teacher_view=lambda images, _: images[:, :1])
    assert distiller(*batch_of())["kd_cls"] > 0


@pytest.mark.ultralytics
def test_images_too_small_for_a_coarser_level_of_the_teachers():
    from tests.yolo import batch_of, model_of

    distiller = Distiller(model_of("yolov8n-p6", seed=1).eval(), model_of("yolov8n"), CrossKD())
    with pytest.raises(ValueError, match=r"multiples of the coarsest stride, 64, got \(96, 96\)"):
        distiller(*batch_of(side=96))


@pytest.mark.ultralytics
@pytest.mark.parametrize(
    ("theirs", "options", "message"),
    [
        (
            ["cat", "dog", "cow"],
            {},
            r"class 1 is 'dog' \(teacher\), 'cow' \(student.*range\(3\) if they mean",
        ),
        (["cat", "dog", "cow"], {"class_map": [0, 2, 1]}, None),
        (["Cat", "cow", "dog"], {}, None),
        (["0", "1", "2"], {}, None),
    ],
)
def test_yolos_classes_of_other_names(theirs, options, message):
    from crosskd.adapters._ultralytics_trainer import Settings, _distil, _undo

    from tests.yolo import model_of

    teacher, student = model_of("yolov8n", seed=1).eval(), model_of("yolov8n")
    teacher.names, student.names = dict(enumerate(theirs)), dict(enumerate(["cat", "cow", "dog"]))
    settings = Settings(teacher, CrossKD(), options)
    if message is None:
        _distil(student, teacher, settings, torch.device("cpu"))
        _undo(student)
        return
    with pytest.raises(ValueError, match=message):
        _distil(student, teacher, settings, torch.device("cpu"))
