"""The adapters for torchvision's detectors: pairings, checks at construction, batches."""

from __future__ import annotations

import copy
import logging
import types

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet, fcos_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from crosskd import CrossKD, Distiller, PredictionMimicking
from crosskd.adapters import TorchvisionFCOSAdapter, TorchvisionRetinaNetAdapter
from crosskd.predictions import join_levels
from tests.helpers.tiny import STRIDES, liven, tiny_batch, tiny_fcos, tiny_retinanet

ADAPTERS = {tiny_retinanet: TorchvisionRetinaNetAdapter(), tiny_fcos: TorchvisionFCOSAdapter()}
BRANCHES = ("classification_head", "regression_head")


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


def test_widths_that_differ_are_logged(build, caplog):
    with caplog.at_level(logging.INFO, logger="crosskd"):
        Distiller(build(width=64), build(width=32), CrossKD())
    messages = [record.getMessage() for record in caplog.records]
    expected = "differ in width, 32 (student) and 64 (teacher): a 1x1 projection is made and trained"
    assert [message.split(":")[0] for message in messages] == ["classification", "regression"]
    assert all(expected in message for message in messages)


def test_widths_that_are_equal_are_not_logged(build, caplog):
    with caplog.at_level(logging.INFO, logger="crosskd"):
        Distiller(build(), build(seed=1), CrossKD())
    assert not caplog.records


# -- checks at construction -----------------------------------------------------------------------


def refused(teacher: nn.Module, student: nn.Module, message: str, error=ValueError, adapter=None) -> None:
    with pytest.raises(error, match=message):
        Distiller(teacher, student, CrossKD(), adapter)


def test_classes_that_differ(build):
    refused(build(4), build(5), r"teacher predicts 4 classes and the student 5: give class_map=")


def test_anchor_sizes_that_differ():
    sizes = tuple((5 * stride,) for stride in STRIDES)
    student = tiny_retinanet(anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 3))
    message = (
        r"anchor sizes differ: \(\(32\.0,\), .* \(teacher\), \(\(40\.0,\).* \(student\).*same\s+anchor_gen"
    )
    refused(tiny_retinanet(), student, message)


def test_anchor_ratios_that_differ():
    sizes = tuple((4 * stride,) for stride in STRIDES)
    student = tiny_retinanet(anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 3.0),) * 3))
    refused(
        tiny_retinanet(), student, r"anchor aspect_ratios differ: .*2\.0.* \(teacher\), .*3\.0.* \(student\)"
    )


def test_numbers_of_anchor_levels_that_differ(build):
    student = build()
    generator = student.anchor_generator
    generator.sizes, generator.aspect_ratios = generator.sizes[:2], generator.aspect_ratios[:2]
    refused(build(), student, "anchors have 3 levels and the student's 2, of which 3 are to be compared")


def test_a_student_with_more_levels_than_its_teacher(build):
    teacher = build()
    del teacher.backbone.stages[2:], teacher.backbone.laterals[2:]
    teacher.backbone.forward = types.MethodType(two_levels, teacher.backbone)
    message = r"strides differ: \[8.0, 16.0\] \(teacher\), \[8.0, 16.0, 32.0\] \(student\). Each of the"
    refused(teacher, build(), message)


def two_levels(backbone, pixels):
    features = backbone.stem(pixels)
    levels = {}
    for level in range(2):
        features = backbone.stages[level](features)
        levels[str(level)] = backbone.laterals[level](features)
    return levels


def test_strides_that_differ(build):
    student = build()
    student.backbone.stem[0][0].stride = (1, 1)
    message = r"strides differ: \[8.0, 16.0, 32.0\] \(teacher\), \[4.0, 8.0, 16.0\] \(student\). Each of"
    refused(build(), student, message)


def test_box_coding_that_differs_in_weights():
    student = tiny_retinanet()
    student.box_coder.weights = (10.0, 10.0, 5.0, 5.0)
    refused(
        tiny_retinanet(),
        student,
        r"box coding differs: .*1\.0.* \(teacher\), .*10\.0.* \(student\).*train the",
    )


def test_box_coding_that_differs_in_normalisation():
    teacher = tiny_fcos()
    teacher.head.box_coder.normalize_by_size = False
    refused(teacher, tiny_fcos(), r"box coding differs: .*normalize_by_size': \[True, False\].* \(teacher\)")


@pytest.mark.parametrize("path", ["head", "head.classification_head", "head.regression_head"])
@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("own", ["class", "instance"])
def test_heads_with_a_forward_of_their_own(build, path, side, own):
    detectors = {"teacher": build(), "student": build()}
    module = detectors[side].get_submodule(path)
    kind = type(module)

    def forward(self, x):
        return kind.forward(self, [features * 2 for features in x])

    if own == "class":
        module.__class__ = type("OwnHead", (kind,), {"forward": forward})
    else:
        module.forward = types.MethodType(forward, module)
    name = type(module).__name__
    message = (
        f"{side}: {path} is a {name} with a forward of its own.*made for {kind.__name__}.*write an adapter"
    )
    refused(detectors["teacher"], detectors["student"], message)


def test_heads_derived_without_a_forward_of_their_own_distil(build):
    student = build(seed=1)
    student.head.__class__ = type("Derived", (type(student.head),), {})
    assert_distils(build(), student)


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_an_adapter_for_another_family(build, side):
    other = tiny_fcos if build is tiny_retinanet else tiny_retinanet
    detectors = {"teacher": build(), "student": build()}
    detectors[side] = other()
    adapter, got = type(ADAPTERS[build]).__name__, type(other()).__name__
    message = f"{adapter} does not support the {side}, a {got}: leave adapter= out"
    refused(**detectors, message=message, error=TypeError, adapter=ADAPTERS[build])


def test_a_tower_that_cannot_be_split(build):
    student = build()
    student.head.regression_head.conv.insert(0, nn.ReLU())
    refused(build(), student, "regression tower starts with ReLU")


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_positions_that_a_tower_does_not_have(build, side):
    detectors = {"teacher": build(), "student": build(), side: build(blocks=1)}
    message = f"{side}: position {ADAPTERS[build].recipe.position} does not fit the classification tower of 1"
    refused(**detectors, message=message)


def test_backbones_that_the_probe_image_does_not_pass_are_logged(build, caplog):
    student = build(seed=1)
    student.backbone.forward = types.MethodType(only_small_images, student.backbone)
    with caplog.at_level(logging.INFO, logger="crosskd"):
        assert_distils(build(), student)
    assert "strides not checked at construction, the probe image failed: too large" in caplog.text


def only_small_images(backbone, pixels):
    if pixels.shape[-1] > 64:
        raise RuntimeError("too large")
    return type(backbone).forward(backbone, pixels)


def test_a_backbone_without_parameters_is_probed():
    class Pool(nn.Module):
        out_channels = 3

        def forward(self, pixels):
            return {"0": nn.functional.avg_pool2d(pixels, 8)}

    anchors = AnchorGenerator(((16,),), ((1.0,),))
    teacher, student = (
        lively(
            RetinaNet(
                Pool(), 4, min_size=64, max_size=64, anchor_generator=anchors, head=RetinaNetHead(3, 1, 4)
            )
        )
        for _ in range(2)
    )
    distiller = Distiller(teacher, student, CrossKD())
    assert distiller(*tiny_batch())["kd_cls"] > 0


# -- anchors that can't be compared before the first step -------------------------------------------


class ShiftedAnchors(AnchorGenerator):
    """Of the same sizes and ratios, at other places."""

    def forward(self, image_list, feature_maps):
        return [anchors + 1 for anchors in super().forward(image_list, feature_maps)]


def test_anchors_at_other_places_are_refused_on_the_first_step(build):
    student = build()
    student.anchor_generator.__class__ = ShiftedAnchors
    distiller = Distiller(build(), student, CrossKD())
    with pytest.raises(
        ValueError, match=r"anchors differ on the first batch: \(\d+, 4\).*the same anchor_generator"
    ):
        distiller(*tiny_batch())


class OpaqueAnchors(AnchorGenerator):
    """Says nothing of its sizes and ratios."""

    def forward(self, image_list, feature_maps):
        self.__dict__.update(self.hidden)
        anchors = super().forward(image_list, feature_maps)
        del self.sizes, self.aspect_ratios
        return anchors


def test_generators_that_do_not_tell_their_sizes_are_compared_by_their_anchors(build):
    def opaque(scale: int, seed: int) -> nn.Module:
        detector = build(seed=seed)
        generator = detector.anchor_generator
        generator.__class__ = OpaqueAnchors
        generator.hidden = {"sizes": generator.sizes, "aspect_ratios": generator.aspect_ratios}
        generator.cell_anchors = [anchors * scale for anchors in generator.cell_anchors]
        del generator.sizes, generator.aspect_ratios
        return detector

    assert_distils(opaque(1, 0), opaque(1, 1))
    with pytest.raises(ValueError, match="anchors differ on the first batch"):
        assert_distils(opaque(1, 0), opaque(2, 1))


# -- pixels ---------------------------------------------------------------------------------------


def test_each_detector_sees_the_same_pixels_under_its_own_normalisation(build):
    """Images of two sizes, so that the smaller is padded; the teacher's own transform is the reference."""
    statistics = {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.5, 1.0, 2.0]}
    teacher, student = build(**statistics).eval(), build()
    images = [torch.rand(3, 40, 64), torch.rand(3, 64, 48)]
    inputs = ADAPTERS[build].prepare(teacher, student, images, None)
    assert torch.equal(inputs.student_pixels, student.transform(images)[0].tensors)
    torch.testing.assert_close(
        inputs.teacher_pixels, teacher.transform(images)[0].tensors, rtol=1e-5, atol=1e-5
    )
    assert inputs.teacher_pixels[0, :, 40:].eq(0).all()
    assert inputs.teacher_pixels[1, :, :, 48:].eq(0).all()
    assert inputs.targets is None


def test_pixels_are_resized_as_the_student_wants_them(build):
    teacher, student = build(side=128), build(side=32)
    inputs = ADAPTERS[build].prepare(teacher, student, [torch.rand(3, 64, 64)], None)
    assert inputs.teacher_pixels.shape == inputs.student_pixels.shape == (1, 3, 32, 32)


def test_one_tensor_serves_both_where_the_normalisation_is_the_same(build):
    inputs = ADAPTERS[build].prepare(build(), build(), [torch.rand(3, 64, 64)], None)
    assert inputs.teacher_pixels is inputs.student_pixels


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
        ("image.png", TypeError, "images must be a list of tensors .* got str"),
        ([[1, 2], [3, 4]], TypeError, "images must be a list of tensors .* got list"),
    ],
)
def test_images_that_are_refused(distiller, images, error, message):
    with pytest.raises(error, match=message):
        distiller(images, tiny_batch()[1])


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
        ([FIT, target([1.0, 1, 9, 9], -1)], r"targets\[1\] has labels from -1 to -1"),
        ([target([9.0, 1, 9, 9]), FIT], r"targets\[0\] has 1 box\(es\) without .* \[9.0, 1.0, 9.0, 9.0\]"),
        ([target([1.0, 9, 9, 2]), FIT], r"targets\[0\] has 1 box\(es\) without a positive, finite width"),
        ([target([1.0, 1, 9, float("nan")]), FIT], r"targets\[0\] has 1 box\(es\) without .* nan\]"),
        ([target([1.0, 1, 9, float("inf")]), FIT], r"targets\[0\] has 1 box\(es\) without .* inf\]"),
    ],
)
def test_targets_that_are_refused(distiller, targets, message):
    with pytest.raises(ValueError, match=message):
        distiller(tiny_batch()[0], targets)


def test_a_loss_that_does_not_share_its_assignment_is_refused(build):
    student = build()
    kind = type(student)
    student.__class__ = type("Silent", (kind,), {"compute_loss": lambda self, *_: {}})
    distiller = Distiller(build(seed=1), student, CrossKD())
    message = (
        "student: Silent.compute_loss did not call head.compute_loss once with its matches.*write an adapter"
    )
    with pytest.raises(ValueError, match=message):
        distiller(*tiny_batch())


def test_a_loss_that_assigns_twice_is_refused(build):
    student = build()
    kind = type(student)

    def compute_loss(self, *arguments):
        kind.compute_loss(self, *arguments)
        return kind.compute_loss(self, *arguments)

    student.__class__ = type("Twice", (kind,), {"compute_loss": compute_loss})
    with pytest.raises(ValueError, match="Twice.compute_loss did not call head.compute_loss once"):
        Distiller(build(seed=1), student, CrossKD())(*tiny_batch())


def test_predictions_are_those_of_the_detectors_own_head(build):
    """Towers and predictors, run apart, give what the head gives as a whole, bit for bit."""
    detector, adapter = build(norm="group").eval(), ADAPTERS[build]
    with torch.no_grad():
        inputs = adapter.prepare(detector, detector, tiny_batch()[0], None)
        maps = adapter.features(detector, inputs.student_pixels)
        branches = adapter.branches(detector)
        towers = [{b.name: b.tower(level).run(m, ())[0] for b in branches} for level, m in enumerate(maps)]
        predictions = join_levels(adapter.predict(detector, *level) for level in enumerate(towers))
        expected = detector.head(maps)
    assert torch.equal(predictions.logits, expected["cls_logits"])
    assert torch.equal(predictions.regression, expected["bbox_regression"])
    if build is tiny_fcos:
        assert torch.equal(predictions.quality, expected["bbox_ctrness"].squeeze(2))
    else:
        assert predictions.quality is None


def test_fcos_heads_have_their_published_settings():
    distiller = Distiller(tiny_fcos(), tiny_fcos(seed=1), CrossKD())
    comparison = distiller.methods["crosskd"].comparison
    assert (comparison.cls_weight, comparison.reg_weight, comparison.regression) == (0.4, 0.75, "log_iou")
    assert distiller.methods["crosskd"].position == 2
