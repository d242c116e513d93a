"""The adapters for torchvision's RetinaNet and FCOS: pairs, what is refused, pixels, batches."""

from __future__ import annotations

import copy
import logging
import types

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet, fcos_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.tv_tensors import BoundingBoxes

from crosskd import PKD, CrossKD, Distiller, PredictionMimicking
from crosskd.adapters import find_adapter
from crosskd.adapters.base import recoded
from crosskd.step import run_head
from tests.helpers.tiny import STRIDES, liven, tiny_batch, tiny_fcos, tiny_retinanet


@pytest.fixture(params=[tiny_retinanet, tiny_fcos], ids=["retinanet", "fcos"])
def build(request):
    """Builds a detector of a family."""
    return request.param


def assert_distils(teacher: nn.Module, student: nn.Module, method=None) -> None:
    """One step, in which the distillation reaches the student's backbone."""
    distiller = Distiller(teacher, student, method or CrossKD())
    losses = distiller(*tiny_batch())
    assert all(loss.isfinite() for loss in losses.values())
    assert min(losses["kd_cls"], losses["kd_reg"]) > 0
    (losses["kd_cls"] + losses["kd_reg"]).backward()
    gradients = [p.grad for p in student.backbone.parameters() if p.grad is not None]
    assert any(gradient.abs().max() > 0 for gradient in gradients)


# -- pairings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher_norm", ["none", "group"])
@pytest.mark.parametrize("student_norm", ["none", "group"])
@pytest.mark.parametrize("widths", [(32, 32), (64, 32), (32, 64)])
def test_any_norms_and_widths_pair(build, teacher_norm, student_norm, widths):
    teacher = build(width=widths[0], norm=teacher_norm, hidden=12)
    assert_distils(teacher, build(width=widths[1], norm=student_norm, seed=1, batch_norm=True))


@pytest.mark.parametrize("method", [CrossKD(position=1), CrossKD(position=0), PredictionMimicking()])
def test_towers_of_different_depth_pair(build, method):
    assert_distils(build(blocks=4), build(blocks=2, seed=1), method)
    assert_distils(build(blocks=1), build(blocks=3, seed=1), method)


def test_heads_that_are_a_single_convolution_distil_at_position_0(build):
    assert_distils(build(blocks=0), build(blocks=0, seed=1), CrossKD(position=0))


def lively(detector: nn.Module) -> nn.Module:
    """Statistics and weights of the head under which an untrained detector's features don't vanish."""
    liven(detector.head)
    for module in detector.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        detector.backbone(torch.rand(4, 3, 64, 64))
    return detector


def full_size(head: str, backbone: str) -> nn.Module:
    """A detector of real size with an untrained backbone: ResNet-18 or MobileNetV3, five levels or three."""
    if backbone == "resnet18":
        extractor = resnet_fpn_backbone(
            backbone_name="resnet18",
            weights=None,
            returned_layers=[2, 3, 4],
            extra_blocks=LastLevelP6P7(256, 256),
            norm_layer=nn.BatchNorm2d,
        )
        levels = 5
    else:
        extractor = mobilenet_backbone(
            backbone_name=backbone, weights=None, fpn=True, norm_layer=nn.BatchNorm2d
        )
        levels = 3
    sizes = tuple((8 * 2**level,) for level in range(levels))
    if head == "fcos":
        anchors = AnchorGenerator(sizes, ((1.0,),) * levels)
        return FCOS(extractor, 4, min_size=64, max_size=64, anchor_generator=anchors)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * levels)
    return RetinaNet(
        extractor,
        4,
        min_size=64,
        max_size=64,
        anchor_generator=anchors,
        head=RetinaNetHead(256, 3, 4, norm_layer=nn.BatchNorm2d),
    )


@pytest.mark.parametrize("head", ["retinanet", "fcos"])
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v3_large"])
def test_torchvisions_own_backbones_distil(head, backbone):
    assert_distils(lively(full_size(head, backbone)), lively(full_size(head, backbone)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "published"), [("retinanet", retinanet_resnet50_fpn_v2), ("fcos", fcos_resnet50_fpn)]
)
def test_torchvisions_own_builders_teach_a_resnet18(head, published):
    """Different backbones, head norms and anchors as published: 9 a location for RetinaNet."""
    teacher = published(weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=64)
    student = full_size(head, "resnet18")
    student.anchor_generator = copy.deepcopy(teacher.anchor_generator)
    if head == "retinanet":
        student.head = RetinaNetHead(256, 9, 4)
    assert_distils(lively(teacher), lively(student))


def test_a_backbone_that_returns_one_tensor_is_one_level():
    def one_level(seed: int) -> RetinaNet:
        torch.manual_seed(seed)
        backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU())
        backbone.out_channels = 8
        anchors = AnchorGenerator(((16, 32),), ((1.0,),))
        return lively(RetinaNet(backbone, 4, min_size=64, max_size=64, anchor_generator=anchors))

    assert_distils(one_level(0), one_level(1))


# -- refused ----------------------------------------------------------------------------------------


def refused(teacher: nn.Module, student: nn.Module, message: str, method=None, error=ValueError) -> None:
    """When the distiller is made, or on the first step."""
    with pytest.raises(error, match=message):
        Distiller(teacher, student, method or CrossKD())(*tiny_batch())


def test_strides_that_differ(build):
    student = build()
    student.backbone.stem[0][0].stride = (1, 1)
    message = r"\[8.0, 16.0, 32.0\] \(teacher\), \[4.0, 8.0, 16.0\] \(student\)"
    refused(build(), student, message)


def test_a_student_with_more_levels_than_its_teacher(build):
    teacher = build()
    del teacher.backbone.stages[2:], teacher.backbone.laterals[2:]
    teacher.backbone.forward = types.MethodType(two_levels, teacher.backbone)
    refused(teacher, build(), r"\[8.0, 16.0\] \(teacher\), \[8.0, 16.0, 32.0\] \(student\)")


def two_levels(backbone, pixels):
    features = backbone.stem(pixels)
    levels = {}
    for level in range(2):
        features = backbone.stages[level](features)
        levels[str(level)] = backbone.laterals[level](features)
    return levels


def test_a_tower_that_cannot_be_split(build):
    student = build()
    student.head.regression_head.conv.insert(0, nn.ReLU())
    refused(build(), student, "student: regression tower starts with ReLU")


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_positions_that_a_tower_does_not_have(build, side):
    detectors = {"teacher": build(), "student": build(), side: build(blocks=1)}
    refused(**detectors, message=rf"{side}: position [23] does not fit the classification tower of 1")


def other_anchors(build) -> AnchorGenerator:
    """As many as the tiny detectors have, of other sizes."""
    ratios = ((0.5, 1.0, 2.0),) if build is tiny_retinanet else ((1.0,),)
    return AnchorGenerator(tuple((5 * stride,) for stride in STRIDES), ratios * 3)


def test_mimicking_needs_the_same_anchors(build):
    student = build(anchor_generator=other_anchors(build))
    message = r"anchors differ .* per level of a (RetinaNet|FCOS) head.* \(teacher\), .* \(student\)"
    refused(build(), student, message, PredictionMimicking())


def test_mimicking_needs_the_same_classes(build):
    refused(build(4), build(5), "teacher predicts 4 classes and the student 5", PredictionMimicking())


def test_mimicking_needs_the_same_box_coding(build):
    student = build(seed=1)
    if build is tiny_retinanet:
        student.box_coder.weights = (10.0, 10.0, 5.0, 5.0)
    else:
        student.head.box_coder.normalize_by_size = False
    refused(build(), student, r"box coding differs: .* \(teacher\) .* \(student\)", PredictionMimicking())


# -- what is proved on the first step -----------------------------------------------------------------


def with_forward(module: nn.Module, where: str) -> None:
    """Squares what a module is fed, by a class of its own or on the instance alone."""
    kind = type(module)

    def forward(self, x):
        return kind.forward(self, [features.square() for features in x])

    if where == "class":
        module.__class__ = type("Squaring", (kind,), {"forward": forward})
    else:
        module.forward = types.MethodType(forward, module)


@pytest.mark.parametrize("path", ["head", "head.classification_head", "head.regression_head"])
@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_head_with_a_forward_of_its_own(build, path, side, where):
    detectors = {"teacher": build(), "student": build(seed=1)}
    with_forward(detectors[side].get_submodule(path), where)
    refused(**detectors, message=rf"{side}: .*own forward.* part at head.\w+_head.conv.0")
    losses = Distiller(**detectors, methods=CrossKD(), prove=False)(*tiny_batch())
    assert losses["kd_cls"] > 0


def test_what_a_head_does_behind_its_tower_is_run(build):
    """A subclass may change its predictions, and call what it derives from."""
    student = build(seed=1)
    head = student.head.classification_head

    class Doubled(type(head)):
        def forward(self, x):
            return 2 * super().forward(x)

    head.__class__ = Doubled
    expected = copy.deepcopy(student)(*tiny_batch())
    losses = Distiller(build(), student, CrossKD())(*tiny_batch())
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
    teacher = copy.deepcopy(student)
    assert_distils(teacher, build(seed=2))


def test_a_detector_that_changes_its_images(build):
    student = build(seed=1)
    kind = type(student)

    def forward(self, images, targets=None):
        return kind.forward(self, [image / 2 for image in images], targets)

    student.__class__ = type("Darker", (kind,), {"forward": forward})
    refused(build(), student, r"student: Darker's own forward.* part at backbone.stem.0.0")


def test_a_loss_of_the_detectors_own_runs_on_the_detector(build):
    student = build(seed=1)
    kind = type(student)

    def compute_loss(self, *arguments):
        self.calls += 1
        return {name: self.calls * loss for name, loss in kind.compute_loss(self, *arguments).items()}

    student.__class__ = type("Counting", (kind,), {"compute_loss": compute_loss})
    student.calls = 0
    plain = copy.deepcopy(student)
    distiller = Distiller(build(), student, CrossKD())
    for _ in range(2):
        expected, losses = plain(*tiny_batch()), distiller(*tiny_batch())
        assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
    assert student.calls == 2


@pytest.mark.parametrize("times", [0, 2])
def test_a_loss_that_does_not_share_its_assignment_once(build, times):
    student = build()
    kind = type(student)

    def compute_loss(self, *arguments):
        return [{}, *(kind.compute_loss(self, *arguments) for _ in range(times))][-1]

    student.__class__ = type("Other", (kind,), {"compute_loss": compute_loss})
    refused(build(seed=1), student, "Other.compute_loss did not call head.compute_loss once")


def test_a_teacher_whose_own_forward_changes_the_images(build):
    teacher = build(seed=1)
    kind = type(teacher)

    def forward(self, images, targets=None):
        return kind.forward(self, [image.flip(0) for image in images], targets)

    teacher.__class__ = type("Flipping", (kind,), {"forward": forward})
    refused(teacher, build(), "teacher: Flipping's own forward.* part at backbone")


# -- strides, pixels --------------------------------------------------------------------------------


def test_a_backbone_that_refuses_the_probe(build, caplog):
    """Strides stay unknown, and the levels are compared in order."""
    student = build(seed=1)
    student.backbone.forward = types.MethodType(only_small_images, student.backbone)
    with caplog.at_level(logging.INFO, logger="crosskd"):
        assert find_adapter(student).strides is None
    assert "too large" in caplog.text
    assert_distils(build(), student)
    with pytest.raises(ValueError, match="strides"):
        Distiller(build(), student, PKD())


def only_small_images(backbone, pixels):
    if pixels.shape[-1] > 64:
        raise RuntimeError("too large")
    return type(backbone).forward(backbone, pixels)


def test_strides_are_those_of_the_size_that_images_are_resized_to(build):
    detector = build()
    assert find_adapter(detector).strides == (8, 16, 32)
    detector.transform.fixed_size = (72, 64)  # (width, height): levels of 9, 5 and 3 columns
    assert find_adapter(detector).strides == (8, 72 / 5, 24)


def test_reading_strides_neither_runs_hooks_nor_moves_statistics(build):
    detector = build(batch_norm=True)
    calls = []
    for module in detector.backbone.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(detector.state_dict())
    find_adapter(detector)
    assert not calls
    assert all(torch.equal(before[name], value) for name, value in detector.state_dict().items())


def pixels_of(teacher: nn.Module, student: nn.Module, images) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's and the student's."""
    theirs, ours = find_adapter(teacher), find_adapter(student)
    batch = ours.prepare(images, None)
    return recoded(batch, ours.pixel_coding, theirs.pixel_coding), batch.pixels


def test_each_detector_sees_the_same_pixels_under_its_own_normalisation(build):
    """Images of two sizes, so that the smaller is padded; the teacher's own transform is the reference."""
    teacher = build(image_mean=[0.1, 0.5, 0.9], image_std=[0.5, 1.0, 2.0]).eval()
    student = build()
    images = [torch.rand(3, 40, 64), torch.rand(3, 64, 48)]
    theirs, ours = pixels_of(teacher, student, images)
    assert torch.equal(ours, student.transform(images)[0].tensors)
    torch.testing.assert_close(theirs, teacher.transform(images)[0].tensors, rtol=1e-5, atol=1e-5)
    assert theirs[0, :, 40:].eq(0).all()
    assert theirs[1, :, :, 48:].eq(0).all()


class BlueFirst(GeneralizedRCNNTransform):
    def normalize(self, image):
        return super().normalize(image.flip(0))


class Squared(GeneralizedRCNNTransform):
    def normalize(self, image):
        return super().normalize(image.square())


def test_a_teacher_whose_transform_takes_blue_first_gets_blue_first(build):
    teacher, student = build(), build(seed=1)
    teacher.transform.__class__ = BlueFirst
    images = [torch.rand(3, 64, 64)]
    theirs, _ = pixels_of(teacher, student, images)
    torch.testing.assert_close(theirs, teacher.transform(images)[0].tensors)


def test_a_teacher_whose_normalisation_is_not_its_mean_and_deviation_is_refused(build):
    teacher, student = build(), build(seed=1)
    teacher.transform.__class__ = Squared
    with pytest.raises(ValueError, match=r"how the teacher's pixels are coded.*teacher_view="):
        Distiller(teacher, student, CrossKD())
    student.transform.__class__ = Squared  # both get the same pixels
    Distiller(teacher, student, CrossKD())


def test_pixels_are_resized_as_the_student_wants_them(build):
    theirs, ours = pixels_of(build(side=128), build(side=32), [torch.rand(3, 64, 64)])
    assert theirs.shape == ours.shape == (1, 3, 32, 32)


def test_one_tensor_serves_both_where_the_normalisation_is_the_same(build):
    theirs, ours = pixels_of(build(), build(), [torch.rand(3, 64, 64)])
    assert theirs is ours


def test_the_teacher_sees_what_it_was_trained_on(build):
    """Pre-scaling a teacher's normalisation and its first layer alike changes nothing."""
    student = build(seed=1)
    plain, scaled = build(), build(image_mean=[0.0] * 3, image_std=[1.0] * 3)
    mean, std = (torch.tensor(v) for v in (plain.transform.image_mean, plain.transform.image_std))
    first = scaled.backbone.stem[0][0]
    first.padding_mode = "replicate"  # zero padding means another colour under another mean
    plain.backbone.stem[0][0].padding_mode = "replicate"
    first._reversed_padding_repeated_twice = (1, 1, 1, 1)
    plain.backbone.stem[0][0]._reversed_padding_repeated_twice = (1, 1, 1, 1)
    with torch.no_grad():
        first.bias -= (first.weight * (mean / std)[None, :, None, None]).sum((1, 2, 3))
        first.weight /= std[None, :, None, None]
    losses = [Distiller(teacher, student, CrossKD())(*tiny_batch()) for teacher in (plain, scaled)]
    for name in ("kd_cls", "kd_reg"):
        assert losses[1][name].item() == pytest.approx(losses[0][name].item(), rel=1e-4)


# -- batches --------------------------------------------------------------------------------------


@pytest.fixture
def distiller(build):
    return Distiller(build(), build(seed=1), CrossKD())


def boxes(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).reshape(-1, 4)


def target(box: list[float], label: int = 0) -> dict[str, torch.Tensor]:
    return {"boxes": boxes(box), "labels": torch.tensor([label])}


NO_OBJECTS = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def test_images_may_be_a_list_a_tuple_or_a_tensor(distiller):
    images, targets = tiny_batch()
    expected = distiller(images, targets)
    for form in (tuple(images), torch.stack(images)):
        losses = distiller(form, targets)
        assert all(torch.equal(losses[name], expected[name]) for name in expected)


def test_images_of_several_sizes(distiller):
    images, targets = tiny_batch()
    losses = distiller([images[0][:, :40], images[1][:, :, :48]], targets)
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("empty", [1, 2])
def test_images_without_objects_are_finite_and_give_a_gradient(build, distiller, empty):
    images, targets = tiny_batch()
    losses = distiller(images, [*targets[empty:], *[NO_OBJECTS] * empty])
    expected = build(seed=1)(images, [*targets[empty:], *[NO_OBJECTS] * empty])
    for name, loss in expected.items():
        assert torch.equal(losses[name], loss)
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["kd_cls"] > 0
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in distiller.parameters())


def test_a_batch_without_objects_is_normalised_by_1_an_image_or_1(build, distiller):
    """RetinaNet counts at least one positive an image; FCOS's sum is at least 1 over the batch."""
    images, _ = tiny_batch()
    once = distiller(images, [NO_OBJECTS] * 2)["kd_cls"].item()
    twice = distiller(images * 2, [NO_OBJECTS] * 4)["kd_cls"].item()
    assert twice == pytest.approx(once * (1 if build is tiny_retinanet else 2), rel=1e-5)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(3, 64, 64), ValueError, r"images must be a list .* got shape \(3, 64, 64\)"),
        (torch.rand(0, 3, 64, 64), ValueError, "images is empty"),
        ([], ValueError, "images is empty"),
        ("image.png", TypeError, "images must be a list of tensors .* got a str"),
        (None, TypeError, "images must be .* got a NoneType"),
        ([np.zeros((3, 64, 64))], TypeError, r"images must be .* got a list with a numpy\.ndarray"),
        ([[1, 2], [3, 4]], TypeError, "images must be a list of tensors .* got a list with a list"),
    ],
)
def test_error_images(distiller, images, error, message):
    with pytest.raises(error, match=message):
        distiller(images, tiny_batch()[1])


@pytest.mark.parametrize("name", ["boxes", "labels"])
def test_error_targets_that_are_no_tensors(distiller, name):
    images, targets = tiny_batch()
    targets[0][name] = targets[0][name].tolist()
    with pytest.raises(TypeError, match=rf"targets\[0\]\['{name}'\] must be a tensor, got a list"):
        distiller(images, targets)
    with pytest.raises(TypeError, match="targets must be a list of dicts .* got a generator"):
        distiller(images, (target for target in targets))


FIT = target([1.0, 1.0, 30.0, 30.0])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([FIT], "got 2 images but 1 targets: one is needed for each"),
        ([FIT, FIT, FIT], "got 2 images but 3 targets"),
        ([FIT, {"boxes": boxes()}], r'targets\[1\] must be a dict with "boxes" and "labels"'),
        ([FIT, [1]], r'targets\[1\] must be a dict with "boxes" and "labels", got \[1\]'),
        (
            [{**FIT, "boxes": torch.rand(1, 5)}, FIT],
            r"targets\[0\] must hold boxes of shape .* got \(1, 5\) and",
        ),
        ([{**FIT, "boxes": torch.rand(4)}, FIT], r"shape \(objects, 4\) .* got \(4,\) and \(1,\)"),
        ([{**FIT, "boxes": torch.zeros(0)}, FIT], r"shape \(objects, 4\) .* got \(0,\) and \(1,\)"),
        (
            [FIT, {**FIT, "labels": torch.tensor([0, 1])}],
            r"targets\[1\] must hold .* got \(1, 4\) and \(2,\)",
        ),
        ([FIT, {**FIT, "labels": torch.tensor([[0]])}], r"got \(1, 4\) and \(1, 1\)"),
        (
            [FIT, {**FIT, "labels": torch.tensor([0.0])}],
            r"targets\[1\] must hold labels of type torch.int64, got",
        ),
        (
            [FIT, target([1.0, 1, 9, 9], 4)],
            r"targets\[1\] has labels from 4 to 4, .* 4 classes, labelled 0 to 3",
        ),
        (
            [FIT, {**FIT, "boxes": BoundingBoxes([[8.0, 8, 4, 4]], format="CXCYWH", canvas_size=(64, 64))}],
            r'targets\[1\] has boxes that say they are CXCYWH, .* xyxy.*"XYXY"',
        ),
        ([FIT, target([1.0, 1, 9, 9], -1)], r"targets\[1\] has labels from -1 to -1"),
        ([target([9.0, 1, 9, 9]), FIT], r"targets\[0\] has 1 box\(es\) without .* \[9.0, 1.0, 9.0, 9.0\]"),
        ([target([1.0, 9, 9, 2]), FIT], r"targets\[0\] has 1 box\(es\) without a positive, finite width"),
        ([target([1.0, 1, 9, float("nan")]), FIT], r"targets\[0\] has 1 box\(es\) without .* nan\]"),
        ([target([1.0, 1, 9, float("inf")]), FIT], r"targets\[0\] has 1 box\(es\) without .* inf\]"),
    ],
)
def test_error_targets(distiller, targets, message):
    with pytest.raises(ValueError, match=message):
        distiller(tiny_batch()[0], targets)


def test_predictions_are_those_of_the_detectors_own_head(build):
    """Towers and predictors, run apart, give what the head gives as a whole, bit for bit."""
    detector = build(norm="group").eval()
    adapter = find_adapter(detector)
    with torch.no_grad():
        maps = adapter.maps(adapter.prepare(tiny_batch()[0], None).pixels)
        predictions = run_head(adapter.heads[0], maps, range(3)).predictions
        expected = detector.head(maps)
    assert torch.equal(predictions.logits, expected["cls_logits"])
    assert torch.equal(predictions.regression, expected["bbox_regression"])
    if build is tiny_fcos:
        assert torch.equal(predictions.quality, expected["bbox_ctrness"].squeeze(2))
    else:
        assert predictions.quality is None
