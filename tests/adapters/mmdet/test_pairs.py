"""CrossKD between heads of different families, and between mmdet's detectors and torchvision's."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crosskd import CrossKD, Distiller
from tests.helpers.mmdet_heads import (
    HEADS,
    SmallBackbone,
    batch_of,
    detector_of,
    head_settings,
    samples_of,
)
from tests.helpers.published_heads import Watched
from tests.helpers.tiny import SIDE, tiny_batch, tiny_fcos, tiny_retinanet
from tests.helpers.tiny import STRIDES as TINY_STRIDES

pytestmark = pytest.mark.mmdet

FAMILIES = ("gfl", "atss", "retinanet", "fcos")
PREPROCESSOR = {
    "type": "DetDataPreprocessor",
    "mean": [103.53, 116.28, 123.675],
    "std": [57.375, 57.12, 58.395],
    "bgr_to_rgb": False,
    "pad_size_divisor": 32,
}


def batch_with(classes: int) -> tuple[Tensor, list[Any]]:
    """Images whose labels are some classes alone; the second one ends before the batch does."""
    images, samples = batch_of()
    for sample in samples:
        sample.gt_instances.labels %= classes
    samples[1].set_metainfo({"img_shape": (120, 130), "pad_shape": (120, 130)})
    return images, samples


def own_targets(detector: nn.Module, images: Tensor, samples: list[Any]) -> Any:
    """What a detector's own get_targets returns while it computes its own loss."""
    recorded = []
    detector = copy.deepcopy(detector)
    get_targets = detector.bbox_head.get_targets

    def record(*arguments, **named):
        recorded.append(get_targets(*arguments, **named))
        return recorded[-1]

    detector.bbox_head.get_targets = record
    detector.loss(images, samples)
    return recorded[0]


def labels_of(family: str, targets: Any, images: int) -> Tensor:
    """Labels (batch, anchors) in what get_targets returned; they stand level by level."""
    at = {"retinanet": 0, "fcos": 0}.get(family, 1)
    return torch.cat([level.reshape(images, -1) for level in targets[at]], dim=1)


@pytest.mark.parametrize(("teaching", "learning"), list(itertools.permutations(FAMILIES, 2)))
def test_heads_of_any_two_families_of_other_classes(teaching, learning):
    teacher = detector_of(head_settings(teaching), seed=1)
    student = detector_of(head_settings(learning, num_classes=3), seed=2)
    distiller = Distiller(teacher, student, Watched()).train()
    images, samples = batch_with(classes=3)
    losses = distiller(images, samples)
    distilled = [loss for name, loss in losses.items() if name.startswith("kd_")]
    assert all(loss > 0 and loss.isfinite() for loss in distilled)
    sum(distilled).backward()
    assert all(level.weight.grad.abs().max() > 0 for level in student.backbone.levels)
    # The teacher's own label assignment on these objects, as its own loss makes it.
    assignment = distiller.methods["crosskd"].step.teacher_assignment()
    targets = own_targets(teacher, images, samples)
    labels = labels_of(teaching, targets, len(images))
    assert torch.equal(assignment.positive, labels < 5)
    if teaching == "fcos":
        inside = torch.cat(targets[0]) < 5
        total = teacher.bbox_head.centerness_target(torch.cat(targets[1])[inside]).sum()
        assert assignment.normalizer == total
        return
    assert assignment.normalizer == (labels < 5).sum(dim=1).clamp(min=1).sum()
    weights = labels_of(teaching, targets[1:], len(images))
    assert torch.equal(assignment.label_weights, (weights > 0).float())
    assert weights.min() == 0  # anchors beyond the second image, or between RetinaNet's thresholds


@pytest.mark.parametrize(("teaching", "learning"), list(itertools.permutations(("gfl", "atss", "fcos"), 2)))
def test_a_student_with_the_teachers_towers_differs_in_nothing(teaching, learning):
    # At the towers' end, before the last activation is run once more, the teacher's predictors are fed what
    # they are fed by the teacher itself, whatever the student predicts from it.
    teacher, student = (detector_of(head_settings(family)) for family in (teaching, learning))
    for name in ("backbone", "bbox_head.cls_convs", "bbox_head.reg_convs"):
        student.get_submodule(name).load_state_dict(teacher.get_submodule(name).state_dict())
    losses = Distiller(teacher, student, CrossKD(4, tap="pre")).train()(*batch_of())
    assert losses["kd_cls"].item() == pytest.approx(0, abs=1e-4)
    assert losses["kd_reg"].item() == pytest.approx(0, abs=1e-4)


def test_students_own_losses_beside_a_teacher_of_another_family():
    teacher, student = detector_of(head_settings("gfl"), seed=1), detector_of(head_settings("fcos"), seed=2)
    plain = copy.deepcopy(student)
    losses = Distiller(teacher, student, CrossKD()).train()(*batch_of())
    _, expected = plain.parse_losses(plain.loss(*batch_of()))
    expected.pop("loss")
    assert all(torch.equal(losses[name].detach(), loss) for name, loss in expected.items())


def test_one_family_with_other_anchors_takes_the_teachers_assignment():
    changed = {"anchor_generator": {**HEADS["gfl"]["anchor_generator"], "octave_base_scale": 4}}
    teacher = detector_of(head_settings("gfl"), seed=1)
    student = detector_of(head_settings("gfl", **changed), seed=2)
    images, samples = batch_of()
    distiller = Distiller(teacher, student, Watched()).train()
    distiller(images, samples)
    step = distiller.methods["crosskd"].step
    labels = labels_of("gfl", own_targets(teacher, images, samples), len(images))
    assert not distiller.methods["crosskd"].anchors_agree
    assert torch.equal(step.teacher_assignment().positive, labels < 5)
    assert not torch.equal(step.assignment.positive, labels < 5)


def test_rtmdet_teaches_where_it_can_assign_labels():
    teacher = detector_of(head_settings("rtmdet"), seed=1)
    same, fewer = (detector_of(head_settings("atss", num_classes=n), seed=2) for n in (5, 2))
    images, samples = batch_of()
    distiller = Distiller(teacher, same, Watched()).train()
    distiller(images, samples)
    # It looks at its predictions, in train mode for its own loss: batch norm as the frozen teacher's.
    frozen = copy.deepcopy(teacher).eval()
    labels = labels_of("rtmdet", own_targets(frozen, images, samples), len(images))
    assert torch.equal(distiller.methods["crosskd"].step.teacher_assignment().positive, labels < 5)

    with pytest.raises(ValueError, match="RTMDetSepBNHead assigns labels by classes.* of its 5 classes"):
        Distiller(teacher, fewer, CrossKD())(*batch_with(classes=2))


def test_rtmdet_assigns_labels_by_the_classes_of_a_class_map():
    teacher, student = (
        detector_of(head_settings("rtmdet"), seed=3),
        detector_of(head_settings("atss"), seed=2),
    )
    columns = [3, 1, 0, 4, 2]
    images, samples = batch_of()
    distiller = Distiller(teacher, student, Watched(), class_map=columns).train()
    distiller(images, samples)
    assignment = distiller.methods["crosskd"].step.teacher_assignment()
    frozen = copy.deepcopy(teacher).eval()
    unmapped = labels_of("rtmdet", own_targets(frozen, images, samples), len(images))
    for sample in samples:
        sample.gt_instances.labels = torch.tensor(columns)[sample.gt_instances.labels]
    labels = labels_of("rtmdet", own_targets(frozen, images, samples), len(images))
    assert torch.equal(assignment.positive, labels < 5)
    assert not torch.equal(assignment.positive, unmapped < 5)


def test_rtmdet_does_not_assign_labels_by_some_of_its_levels():
    strides = [8, 16, 32]
    anchors = {**HEADS["atss"]["anchor_generator"], "strides": strides}
    student = detector_of(head_settings("atss", anchor_generator=anchors), SmallBackbone(strides))
    with pytest.raises(ValueError, match="predictions of all levels, 428 rows, but 420 are compared"):
        Distiller(detector_of(head_settings("rtmdet")), student, CrossKD())(*batch_of())


def test_a_teacher_of_more_levels_assigns_on_all_of_them():
    strides = [16, 32, 64]
    anchors = {**HEADS["atss"]["anchor_generator"], "strides": strides}
    student = detector_of(head_settings("atss", anchor_generator=anchors), SmallBackbone(strides))
    teacher = detector_of(head_settings("gfl"), seed=1)
    images, samples = batch_of()
    distiller = Distiller(teacher, student, Watched()).train()
    distiller(images, samples)
    assignment = distiller.methods["crosskd"].step.teacher_assignment()
    targets = own_targets(teacher, images, samples)
    every, some = (torch.cat([x.reshape(2, -1) for x in targets[1][levels]], dim=1) < 5
                   for levels in (slice(None), slice(1, 4)))  # fmt: skip
    assert torch.equal(assignment.positive, some)
    assert assignment.normalizer == every.sum() > some.sum()


# -- with torchvision -----------------------------------------------------------------------------


def small(family: str, **options: Any) -> Any:
    """An mmdet detector with the levels of the tiny torchvision ones."""
    strides = list(TINY_STRIDES)
    if family == "fcos":
        changed = {"strides": strides, "regress_ranges": ((-1, 32), (32, 64), (64, 1e8))}
    else:
        changed = {"anchor_generator": {**HEADS[family]["anchor_generator"], "strides": strides}}
    head = head_settings(family, num_classes=4, **changed)
    return detector_of(head, SmallBackbone(strides), data_preprocessor=PREPROCESSOR, **options)


def mmdet_batch() -> tuple[Tensor, Tensor, list[Any]]:
    """RGB images from 0 to 1, and what mmdet's data preprocessor makes of them."""
    images, targets = tiny_batch()
    raw = [(image * 255).round().to(torch.uint8) for image in images]
    samples = samples_of(targets, (SIDE, SIDE))
    data = {"inputs": [image.flip(0) for image in raw], "data_samples": samples}
    prepared = small("gfl").data_preprocessor(data, True)
    return torch.stack(raw).float() / 255, prepared["inputs"], prepared["data_samples"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("build", [tiny_retinanet, tiny_fcos])
def test_torchvision_teaches_mmdet(build, family):
    rgb, pixels, samples = mmdet_batch()
    teacher = build(4)
    distiller = Distiller(teacher, small(family), Watched()).train()
    losses = distiller(pixels, samples)
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["kd_cls"] > 0
    batch = distiller.student_adapter.prepare(pixels, samples)
    expected, _ = teacher.transform(list(rgb))
    seen = distiller.teacher_batch(batch, pixels, samples)
    torch.testing.assert_close(seen.pixels, expected.tensors, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("build", [tiny_retinanet, tiny_fcos])
def test_mmdet_teaches_torchvision(build, family):
    rgb, pixels, _ = mmdet_batch()
    _, targets = tiny_batch()
    distiller = Distiller(small(family), build(4), Watched()).train()
    losses = distiller(list(rgb), targets)
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["kd_cls"] > 0
    batch = distiller.student_adapter.prepare(list(rgb), targets)
    seen = distiller.teacher_batch(batch, rgb, targets)
    torch.testing.assert_close(seen.pixels, pixels, atol=1e-4, rtol=1e-4)


def test_pixels_of_a_detector_without_a_data_preprocessor_are_unknown():
    _, pixels, samples = mmdet_batch()
    bare = detector_of(head_settings("gfl"))
    with pytest.raises(ValueError, match="how the teacher's pixels are coded"):
        Distiller(bare, small("gfl"), CrossKD())(pixels, samples)
    Distiller(bare, detector_of(head_settings("gfl")), CrossKD())


def test_pixels_without_normalisation_and_of_one_channel():
    from crosskd.adapters import PixelCoding
    from crosskd.adapters.mmdet import MMDetSingleStage

    plain = {"type": "DetDataPreprocessor", "bgr_to_rgb": True, "pad_value": 114}
    coding = MMDetSingleStage(detector_of(head_settings("gfl"), data_preprocessor=plain)).pixel_coding
    assert coding == PixelCoding((0.0,) * 3, (1 / 255,) * 3, bgr=False, padding=114.0)
    grey = {"type": "DetDataPreprocessor", "mean": [127.5], "std": [51.0]}
    backbone = SmallBackbone()
    backbone.levels = nn.ModuleList(nn.Conv2d(1, 32, 3, stride=s, padding=1) for s in (8, 16, 32, 64, 128))
    detector = detector_of(head_settings("gfl"), backbone, data_preprocessor=grey)
    assert MMDetSingleStage(detector).pixel_coding == PixelCoding((0.5,), (0.2,))
