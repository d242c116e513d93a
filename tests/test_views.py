"""A teacher that sees the images at another size: what it says must lie where it lies on the image."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from crosskd import PKD, CrossKD, Distiller, Method, PredictionMimicking
from crosskd.losses import giou_loss
from crosskd.step import run_head
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet, tiny_ssd


class Look(Method):
    """Keeps the step."""

    def __init__(self, *requires: str) -> None:
        super().__init__(name="look")
        self.requires = frozenset(requires or ("predictions", "objects"))

    def forward(self, step: Any) -> dict[str, Tensor]:
        self.step = step
        return {"kd_look": sum(m.square().mean() for m in step.student._trace.maps)}


def same(images: Any, targets: Any) -> Any:
    return images


def look(teacher: nn.Module, student: nn.Module, images: Any, targets: Any, **options: Any) -> Any:
    options = {"teacher_view": same, **options}
    distiller = Distiller(teacher, student, Look(), **options)
    distiller(images, targets)
    return distiller, distiller.methods["look"].step


# -- padded images --------------------------------------------------------------------------------


class Mean(nn.Module):
    """Maps that are the image, smaller."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.out_channels, self.stride = 3, stride
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.weight * F.avg_pool2d(pixels, self.stride)


def brightness(side: int, longest: int, stride: int = 8) -> RetinaNet:
    """Its only logit at a place is the brightness there; its boxes are its anchors."""
    anchors = AnchorGenerator(((4 * stride,),), ((1.0,),))
    detector = RetinaNet(
        Mean(stride),
        1,
        min_size=side,
        max_size=longest,
        anchor_generator=anchors,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    )
    heads = detector.head.classification_head, detector.head.regression_head
    for head, predictor in zip(heads, ("cls_logits", "bbox_reg"), strict=True):
        head.conv = nn.Sequential()
        nn.init.zeros_(getattr(head, predictor).weight)
        nn.init.zeros_(getattr(head, predictor).bias)
    heads[0].cls_logits.weight.data[0, :, 1, 1] = 1
    return detector


def bright_square() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """In the corner that a shift moves most, of an image that no batch leaves unpadded."""
    image = torch.zeros(3, 48, 64)
    image[:, 40:46, 54:60] = 1
    target = {"boxes": torch.tensor([[54.0, 40.0, 60.0, 46.0]]), "labels": torch.tensor([0])}
    return [image], [target]


@pytest.mark.parametrize(
    ("teacher", "resize"),
    [((240, 400), True), ((320, 533), True), ((100, 200), True), ((320, 533, 16), False)],
    ids=["half as large again", "twice", "smaller", "twice, with strides of twice"],
)
def test_what_the_teacher_sees_lies_where_the_student_sees_it(teacher, resize):
    images, targets = bright_square()
    _, step = look(brightness(*teacher), brightness(160, 267), images, targets, resize_levels=resize)
    width = step.student.batch.size[1] // 8
    places = []
    for side in (step.teacher, step.student):
        likely = side.predictions.logits[0, :, 0].clamp(min=0)
        index = torch.arange(len(likely))
        where = torch.stack([index % width, index // width], dim=1)
        places.append((likely[:, None] * where).sum(0) / likely.sum())
    assert places[0].sub(places[1]).abs().max() < 0.2  # of a location
    assert step.resized is resize
    if resize:
        boxes = step.teacher_boxes()[0]
        ratio = step.student.batch.image_sizes[0][1] / step.teacher.batch.image_sizes[0][1]
        widths = boxes[:, 2] - boxes[:, 0]
        torch.testing.assert_close(widths, torch.full_like(widths, 32 * ratio), rtol=2e-2, atol=0)
    else:
        assert torch.equal(step.teacher.anchors.boxes, 2 * step.student.anchors.boxes)


def test_maps_are_resized_by_the_size_of_the_images():
    images, targets = bright_square()
    method = PKD(resize=True)
    distiller = Distiller(brightness(240, 400), brightness(160, 267), method, teacher_view=same)
    trace = distiller.trace(images, targets)
    ((_, student, teacher),) = distiller.methods["pkd"].compared(trace.steps["pkd"])
    weights = [maps[0].sum(dim=0) for maps in (student, teacher)]
    for axis in (0, 1):
        means = []
        for weight in weights:
            of_places = weight.sum(dim=1 - axis)
            means.append((of_places * torch.arange(len(of_places))).sum() / of_places.sum())
        assert abs(means[0] - means[1]) < 0.2  # of a location


def test_maps_that_differ_in_padding_alone_are_compared():
    images, targets = bright_square()
    teacher, student = brightness(320, 533, 16), brightness(160, 267)
    losses = Distiller(teacher, student, [PKD(), CrossKD(position=0)], teacher_view=same)(images, targets)
    assert all(loss.isfinite() for loss in losses.values())


# -- boxes ----------------------------------------------------------------------------------------


def of_torchvision(build: Any) -> Any:
    images, targets = tiny_batch(first_label=int(build is tiny_ssd))
    return build(side=128), build(seed=1), images, targets, {}


def of_ultralytics(kind: str) -> Any:
    pytest.importorskip("ultralytics")
    from tests.helpers.yolo import batch_of, model_of

    images, targets = batch_of()
    return model_of(kind), model_of(kind, seed=1), images, targets, {"teacher_view": doubled}


def of_mmdet(name: str) -> Any:
    pytest.importorskip("mmdet")
    from tests.helpers.mmdet_heads import batch_of, detector_of, head_settings

    images, targets = batch_of()
    teacher, student = (detector_of(head_settings(name), seed=seed) for seed in (0, 1))
    return teacher, student, images, targets, {"teacher_view": doubled}


def doubled(images: Tensor, targets: Any) -> Tensor:
    return F.interpolate(images, scale_factor=2, mode="nearest")


PAIRS = {
    "retinanet": lambda: of_torchvision(tiny_retinanet),
    "fcos": lambda: of_torchvision(tiny_fcos),
    "ssd": lambda: of_torchvision(tiny_ssd),
    "yolov8n": lambda: of_ultralytics("yolov8n"),
    "yolo26n": lambda: of_ultralytics("yolo26n"),
    "gfl": lambda: of_mmdet("gfl"),
    "mmdet's fcos": lambda: of_mmdet("fcos"),
}
FAMILIES = pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=getattr(pytest.mark, mark) if mark else ())
        for name, mark in zip(
            PAIRS, ("", "", "", "ultralytics", "ultralytics", "mmdet", "mmdet"), strict=True
        )
    ],
)


@FAMILIES
def test_boxes_of_a_teacher_at_twice_the_size_are_its_own_in_the_students_pixels(family):
    """Each of the student's locations lies in the middle of four of the teacher's."""
    teacher, student, images, targets, view = PAIRS[family]()
    distiller, step = look(teacher, student, images, targets, resize_levels=True, **view)
    head, batch = step.teacher.head, step.teacher.batch
    adapter = distiller.teacher_adapter
    pixels = adapter.prepare(distiller.teacher_view(images, targets), None).pixels
    with torch.no_grad():
        maps = adapter.maps(pixels)
        run = run_head(head, maps, range(len(maps)))
        anchors = head.anchors(batch, maps)
        own = head.decode(run.predictions, anchors) / 2
    expected = []
    for boxes, size in zip(torch.split(own, list(anchors.per_level), dim=1), anchors.sizes, strict=True):
        if size[0] % 2 or size[1] % 2:
            break
        grid = boxes.reshape(len(boxes), head.copies, *size, -1).permute(0, 1, 4, 2, 3)
        pooled = F.avg_pool2d(grid.flatten(1, 2), 2).unflatten(1, (head.copies, -1))
        expected.append(pooled.permute(0, 1, 3, 4, 2).reshape(len(boxes), -1, 4))
    wanted = torch.cat(expected, dim=1).float()
    torch.testing.assert_close(step.teacher_boxes()[:, : wanted.shape[1]], wanted, rtol=1e-4, atol=1e-3)
    assert step.teacher.predictions.logits.shape == step.student.predictions.logits.shape
    losses = Distiller(
        teacher, student, CrossKD(), resize_levels=True, teacher_view=view.get("teacher_view", same)
    )(images, targets)
    assert all(loss.isfinite() for loss in losses.values())


def test_mimicked_boxes_are_those_in_the_students_pixels():
    teacher, student, images, targets, _ = of_torchvision(tiny_retinanet)
    _, step = look(teacher, student, images, targets, resize_levels=True)
    mimicking = Distiller(
        teacher, student, PredictionMimicking(regression="giou"), teacher_view=same, resize_levels=True
    )
    own = step.student.head.decode(step.student.predictions, step.student.anchors)
    weight = step.teacher.predictions.confidence() * step.assignment.label_weights
    expected = giou_loss(own, step.teacher_boxes(), weight=weight, normalizer=step.assignment.normalizer)
    weighted = mimicking.methods["mimicking"].comparison.reg_weight * expected
    torch.testing.assert_close(mimicking(images, targets)["kd_reg"], weighted)


@pytest.mark.mmdet
def test_distributions_over_other_lengths_are_refused():
    teacher, student, images, targets, view = of_mmdet("gfl")
    method = PredictionMimicking(regression="distribution_kl")
    with pytest.raises(ValueError, match=r"distributions.*another size.*giou"):
        Distiller(teacher, student, method, resize_levels=True, **view)(images, targets)


@pytest.mark.parametrize("build", [tiny_retinanet, tiny_fcos])
def test_the_teachers_label_assignment_lies_at_its_objects(build):
    """The positives are around the object, in the student's pixels."""
    images, _ = tiny_batch(1)
    targets = [{"boxes": torch.tensor([[10.0, 30.0, 34.0, 54.0]]), "labels": torch.tensor([1])}]
    other = tiny_fcos if build is tiny_retinanet else tiny_retinanet
    _, step = look(build(side=128), other(seed=1), images, targets, resize_levels=True)
    assignment = step.teacher_assignment()
    assert assignment.positive.shape == step.teacher.predictions.logits.shape[:2]
    places = torch.cat(
        [
            8 * 2**level * torch.cartesian_prod(torch.arange(size), torch.arange(size)).float().flip(1)
            for level, size in enumerate((8, 4, 2))
        ]
    ).repeat_interleave(assignment.positive.shape[1] // 84, dim=0)
    found = places[assignment.positive[0]]
    assert len(found) > 0
    assert (found >= torch.tensor([2.0, 18.0])).all()
    assert (found <= torch.tensor([40.0, 60.0])).all()
    assert assignment.normalizer > 0


# -- what is refused ------------------------------------------------------------------------------


def test_error_maps_of_one_size_of_images_of_several():
    """58 x 58 pixels are padded to 64 x 64, which makes them no 64 x 64 pixels."""
    refused = [
        (CrossKD(), r"levels differ.*\(58, 58\).*\(64, 64\).*are 1 times as large"),
        (PKD(), r"level 0 differ.*\(58, 58\).*\(64, 64\)"),
    ]
    for method, message in refused:
        distiller = Distiller(tiny_retinanet(side=58), tiny_retinanet(seed=1), method, teacher_view=same)
        with pytest.raises(ValueError, match=message):
            distiller(*tiny_batch())


def cropped(images, targets):
    return [image[:, :, :48] for image in images]


def one_too_few(images, targets):
    return images[1:]


@pytest.mark.parametrize("view", [cropped, one_too_few])
def test_error_a_view_of_other_images(view):
    options = {"teacher_view": view, "resize_levels": True}
    distiller = Distiller(tiny_retinanet(), tiny_retinanet(seed=1), CrossKD(), **options)
    with pytest.raises(ValueError, match=r"as many images.*got sizes .*\(64, .*student's .*\(64, 64\)"):
        distiller(*tiny_batch())


@pytest.mark.mmdet
def test_padding_of_a_tensor_is_that_of_the_students():
    teacher, student, images, samples, view = of_mmdet("fcos")
    height, width = images.shape[-2:]
    for sample in samples:
        sample.set_metainfo({"img_shape": (height - 10, width - 20)})
    _, step = look(teacher, student, images, samples, resize_levels=True, **view)
    assert set(step.teacher.batch.image_sizes) == {(2 * height - 20, 2 * width - 40)}
    assert step.teacher.batch.extra[0]["img_shape"] == (2 * height - 20, 2 * width - 40)


def strided(strides: tuple[int, ...], side: int) -> RetinaNet:
    detector = tiny_retinanet()
    levels = [int(math.log2(stride)) - 3 for stride in strides]

    class Levels(nn.Module):
        out_channels = 32

        def __init__(self) -> None:
            super().__init__()
            self.whole = detector.backbone
            self.next = nn.Conv2d(32, 32, 3, 2, 1)

        def forward(self, pixels: Tensor) -> dict[str, Tensor]:
            maps = list(self.whole(pixels).values())
            maps.append(self.next(maps[-1]))
            return {str(level): maps[level] for level in levels}

    anchors = AnchorGenerator(tuple((4 * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides))
    return RetinaNet(Levels(), 4, min_size=side, max_size=side, anchor_generator=anchors, head=detector.head)


def test_the_factor_of_the_sizes_may_be_given_where_strides_allow_several():
    images, targets = tiny_batch()
    teacher, student = strided((16, 32, 64), 128), strided((16, 32), 64)
    for resize in (False, True):
        with pytest.raises(ValueError, match=r"\[16.0, 32.0, 64.0\].*1 or 2 times.*pass view_scale=2,"):
            look(teacher, student, images, targets, resize_levels=resize)
    _, step = look(teacher, student, images, targets, view_scale=2)
    assert step.teacher.levels == (1, 2)
    anchors = [side.anchors.boxes for side in (step.teacher, step.student)]
    torch.testing.assert_close(anchors[0], 2 * anchors[1], rtol=0, atol=1)  # they are rounded
    for options in ({"view_scale": 2, "teacher_view": None}, {"view_scale": 0}):
        with pytest.raises(ValueError, match="view_scale is how many times as large"):
            look(teacher, student, images, targets, **options)


@pytest.mark.parametrize(
    ("view", "facts"),
    [
        (lambda images, targets: None, "teacher_view's images: .*NoneType"),
        (lambda images, targets: [(255 * i).byte() for i in images], "teacher_view's images: .*uint8"),
        (lambda images: images, r"teacher_view= failed on \(images, targets\): .*2 were given"),
    ],
)
def test_what_is_wrong_with_a_view_is_said_of_the_view(view, facts):
    distiller = Distiller(tiny_retinanet(), tiny_retinanet(seed=1), CrossKD(), teacher_view=view)
    with pytest.raises((TypeError, ValueError), match=facts):
        distiller(*tiny_batch())
