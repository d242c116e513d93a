"""Teachers and students that differ: depth, classes, levels, backbones, heads, and what they see."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_large, resnet18, swin_t
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork

from crosskd import PKD, CrossKD, Distiller, PredictionMimicking
from crosskd.adapters import TorchvisionRetinaNet, backbone
from tests.helpers.tiny import STRIDES, liven, tiny_batch, tiny_fcos, tiny_retinanet, tiny_ssd, with_levels


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
        points = method.tap_points(branch)
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


@pytest.mark.parametrize("class_map", [[0, 1], [0, 1, 2, 2], [0, 1, 2, 6], [0, 1, 2, -1]])
def test_class_maps_that_do_not_fit(build, class_map):
    message = (
        "class_map must name a class of the teacher's, 0 to 5, for each of the student's 4, none of them"
    )
    with pytest.raises(ValueError, match=message):
        Distiller(build(6), build(4), CrossKD(), class_map=class_map)


# -- levels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [[1, 2], [0, 1], [1], [0, 2]])
@pytest.mark.parametrize("method", [Watched(), PredictionMimicking()])
def test_a_student_may_lack_some_of_the_teachers_levels(build, levels, method, caplog):
    teacher, student = build(), with_levels(build, levels, seed=1)
    with caplog.at_level(logging.INFO, logger="crosskd"):
        distiller = Distiller(teacher, student, method)
        losses = distiller(*tiny_batch())
        distiller(*tiny_batch())
    left_out = [float(stride) for level, stride in enumerate(STRIDES) if level not in levels]
    (record,) = caplog.records
    message = f"the teacher's levels of strides {left_out} are left out: the student has none like them"
    if levels[0] == 0:
        assert (record.levelno, record.getMessage()) == (logging.INFO, message)
    else:  # small objects are lost
        assert record.levelno == logging.WARNING
        assert record.getMessage().startswith(f"{message}. Small objects that the teacher finds there are ba")
        assert f"finest level is of stride {STRIDES[levels[0]]}" in record.getMessage()
    # The same as with a teacher that never had the others.
    expected = Distiller(with_levels(build, levels, seed=0), student, method)(*tiny_batch())
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, msg=name)
    assert_reaches_the_student(distiller, losses)


def test_anchors_of_the_shared_levels_are_compared():
    """CrossKD takes the teacher's label assignment then; mimicking has nothing to compare."""
    student = with_levels(tiny_retinanet, [1, 2], seed=1)
    student.anchor_generator.sizes = ((32,), (64,))
    student.anchor_generator.cell_anchors = [
        student.anchor_generator.generate_anchors(sizes, ratios)
        for sizes, ratios in zip(
            student.anchor_generator.sizes, student.anchor_generator.aspect_ratios, strict=True
        )
    ]
    distiller = Distiller(tiny_retinanet(), copy.deepcopy(student), Watched())
    losses, method = step_of(distiller)
    assert not method.anchors_agree
    assert_reaches_the_student(distiller, losses)
    per_level = [3 * 4 * 4, 3 * 2 * 2]
    assert method.step.teacher_assignment().positive.shape == (2, sum(per_level))
    with pytest.raises(ValueError, match=r"\[48, 12\].*\(teacher\).*\[48, 12\].*\(student\)"):
        Distiller(tiny_retinanet(), student, PredictionMimicking())(*tiny_batch())


# -- backbones ------------------------------------------------------------------------------------


STAGES = {  # where the maps of strides 8, 16 and 32 are made, and how many channels they have
    swin_t: (("features.3", 192), ("features.5", 384), ("features.7", 768)),
    resnet18: (("layer2", 128), ("layer3", 256), ("layer4", 512)),
    mobilenet_v3_large: (("features.6", 40), ("features.12", 112), ("features.16", 960)),
}


class Pyramid(nn.Module):
    """A feature pyramid on one of torchvision's classification networks."""

    def __init__(self, network, width: int) -> None:
        super().__init__()
        names = {node: str(level) for level, (node, _) in enumerate(STAGES[network])}
        self.stages = create_feature_extractor(network(weights=None), names)
        self.channels_last = network is swin_t
        self.pyramid = FeaturePyramidNetwork([channels for _, channels in STAGES[network]], width)
        self.out_channels = width

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        maps = self.stages(pixels)
        return self.pyramid({n: m.permute(0, 3, 1, 2) if self.channels_last else m for n, m in maps.items()})


def on_pyramid(network, width: int) -> RetinaNet:
    plain = tiny_retinanet()
    head = RetinaNetHead(width, plain.anchor_generator.num_anchors_per_location()[0], 4)
    liven(head)
    return RetinaNet(Pyramid(network, width), 4, 64, 64, anchor_generator=plain.anchor_generator, head=head)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ((swin_t, 256), (mobilenet_v3_large, 64)),
        ((mobilenet_v3_large, 256), (mobilenet_v3_large, 64)),
        ((resnet18, 64), (swin_t, 64)),
        ((swin_t, 64), (resnet18, 128)),
    ],
    ids=lambda side: f"{side[0].__name__} of {side[1]}",
)
def test_backbones_of_every_kind(teacher, student):
    distiller = Distiller(on_pyramid(*teacher), on_pyramid(*student), Watched())
    losses, method = step_of(distiller)
    widths = {(p.student_width, p.teacher_width) for p in method.projections.values()}
    assert widths == ({(student[1], teacher[1])} if student[1] != teacher[1] else set())
    assert_reaches_the_student(distiller, losses)
    stages = distiller.student.backbone.stages.parameters()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in stages)
    assert method.step.student.predictions.logits.shape == (2, 3 * (8 * 8 + 4 * 4 + 2 * 2), 4)


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
    logits = [d.methods["crosskd"].step.teacher.predictions.logits for d in (plain, watched)]
    assert torch.equal(*logits)  # the teacher's predictions on clean images
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
    logits = [d.methods["crosskd"].step.teacher.predictions.logits for d in (distiller, expected)]
    assert torch.equal(*logits)


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
    assert method.step.teacher.predictions.logits.shape == method.step.student.predictions.logits.shape
    with pytest.raises(ValueError, match="strides differ"):
        Distiller(larger_teacher(build), build(seed=1), CrossKD())


def test_anchors_without_the_strides_factor_are_not_the_students():
    teacher = larger_teacher(tiny_retinanet)
    teacher.anchor_generator = tiny_retinanet().anchor_generator
    distiller = Distiller(teacher, tiny_retinanet(seed=1), Watched(), teacher_view=same)
    losses, method = step_of(distiller)
    assert not method.anchors_agree
    assert_reaches_the_student(distiller, losses)
    mimicking = Distiller(teacher, tiny_retinanet(seed=1), PredictionMimicking(), teacher_view=same)
    with pytest.raises(ValueError, match=r"anchors differ .*\(teacher\), .*\(student\)"):
        mimicking(*tiny_batch())


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
    assert method.step.teacher.predictions.logits.shape == method.step.student.predictions.logits.shape


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


@pytest.mark.parametrize(("teacher", "student"), [(tiny_retinanet, tiny_fcos), (tiny_fcos, tiny_retinanet)])
def test_detectors_of_different_families(teacher, student):
    """CrossKD and PKD are let through, mimicking is refused with both sides' anchors."""
    distiller = Distiller(teacher(), student(seed=1), [CrossKD(), PKD()])
    losses = distiller(*tiny_batch())
    assert_reaches_the_student(distiller, losses)
    assert losses["kd_pkd"] > 0
    count = {tiny_retinanet: r"\[192, 48, 12\] per level of a RetinaNet", tiny_fcos: r"\[64, 16, 4\] .*FCOS"}
    message = rf"{count[teacher]}.*\(teacher\), {count[student]}.*\(student\)"
    mimicking = Distiller(teacher(), student(seed=1), PredictionMimicking())
    with pytest.raises(ValueError, match=message):
        mimicking(*tiny_batch())


def test_classes_without_a_class_map():
    """The teacher's head judges both sides by its own classes; mimicking needs a class map."""
    distiller = Distiller(tiny_retinanet(7), tiny_retinanet(4, seed=1), CrossKD())
    assert_reaches_the_student(distiller, distiller(*tiny_batch()))
    refused(
        "teacher predicts 7 classes and the student 4",
        tiny_retinanet(7),
        tiny_retinanet(4, seed=1),
        PredictionMimicking(),
    )


class DoublingCoder(BoxCoder):
    def decode_single(self, rel_codes, boxes):
        return super().decode_single(2 * rel_codes, boxes)


class DoublingLinearCoder(BoxLinearCoder):
    def decode(self, rel_codes, boxes):
        return super().decode(2 * rel_codes, boxes)


def test_a_box_coder_of_another_class(build):
    """The teacher's coding is that of both sides in CrossKD; mimicking compares boxes of either coding."""
    teacher = build()
    if build is tiny_retinanet:
        coder = DoublingCoder((1.0, 1.0, 1.0, 1.0))
        teacher.box_coder = teacher.head.regression_head.box_coder = coder
    else:
        teacher.box_coder = teacher.head.box_coder = DoublingLinearCoder(normalize_by_size=True)
    distiller = Distiller(teacher, build(seed=1), CrossKD())
    assert_reaches_the_student(distiller, distiller(*tiny_batch()))
    mimicking = Distiller(teacher, build(seed=1), PredictionMimicking())
    with pytest.raises(ValueError, match=r"box coding differs: .*\(teacher\) and .* \(student\)"):
        mimicking(*tiny_batch())


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


def test_strides_are_read_whatever_the_channels():
    teacher, student = (with_channels(tiny_fcos, 6, seed=seed) for seed in range(2))
    student.backbone.stem[0][0].stride = (4, 4)
    refused(r"strides differ: \[8.0, 16.0, 32.0\] \(teacher\), \[16.0", teacher, student, CrossKD())


def test_a_class_map_between_heads_of_two_kinds():
    options = {"class_map": [0, 1, 2, 3]}
    with_background, without = tiny_ssd(num_classes=4), tiny_retinanet()
    message = r"class_map= .*no head \(teacher\), background column None \(student\)"
    backboned = {"adapter": TorchvisionRetinaNet, "teacher_adapter": backbone()}
    refused(message, tiny_retinanet().backbone, without, PKD(), class_map=[0], **backboned)
    message = r"class_map= .*background column 0 \(teacher\), background column None \(student\)"
    refused(message, with_background, without, PKD(), **options)
    message = r"class_map= .*background column None \(teacher\), background column 0 \(student\)"
    refused(message, without, with_background, PKD(), **options)


# -- what the first step finds ---------------------------------------------------------------------


def test_numbers_of_another_type():
    distiller = Distiller(tiny_retinanet().double(), tiny_retinanet(seed=1), CrossKD())
    message = r"the teacher's weights are torch.float64 and the student's torch.float32: cast both"
    with pytest.raises(ValueError, match=message):
        distiller(*tiny_batch())


def test_a_frozen_student_of_another_width():
    distiller = Distiller(tiny_retinanet(width=16), tiny_retinanet(width=8, seed=1), CrossKD())
    distiller.student.requires_grad_(False)
    distiller.student.head.regression_head.bbox_reg.requires_grad_(True)
    with pytest.raises(ValueError, match="tower, position 3 depend on no trainable parameter, so distilling"):
        distiller(*tiny_batch())
