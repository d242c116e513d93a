"""CrossKD between torchvision's detectors whose heads differ: the teacher's head judges both sides.

What the student's own predictors are must not matter then: students of the same backbone and towers get the
same losses, whatever their anchors, their classes, or the family that they are of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator

from crosskd import PKD, CrossKD, Distiller, PredictionMimicking
from tests.helpers.tiny import STRIDES, tiny_batch, tiny_fcos, tiny_retinanet, tiny_ssd
from tests.helpers.two_stages import tiny_faster_rcnn

BUILDERS = {"retinanet": tiny_retinanet, "fcos": tiny_fcos}


def with_layers_of(student: nn.Module, other: nn.Module) -> nn.Module:
    """A student with another's backbone, and the convolutions of its towers."""
    student.backbone.load_state_dict(other.backbone.state_dict())
    for branch in ("classification_head", "regression_head"):
        towers = [
            [m for m in detector.head.get_submodule(branch).conv.modules() if isinstance(m, nn.Conv2d)]
            for detector in (student, other)
        ]
        for ours, theirs in zip(*towers, strict=True):
            ours.load_state_dict(theirs.state_dict())
    return student


def distilled(teacher: nn.Module, student: nn.Module, batch: Any = None, **options: Any) -> list[Tensor]:
    """The losses of CrossKD, in a step in which the student's own are those of plain training."""
    batch = batch or tiny_batch()
    expected = copy.deepcopy(student)(*batch)
    losses = Distiller(teacher, student, CrossKD(position=2), **options)(*batch)
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
    return [losses["kd_cls"], losses["kd_reg"]]


@pytest.mark.parametrize("family", BUILDERS)
def test_a_student_of_the_other_family_gets_the_same_losses(family):
    build, (other,) = BUILDERS[family], [b for name, b in BUILDERS.items() if name != family]
    teacher, student = build(hidden=12), build(seed=1, norm="none")
    expected = distilled(teacher, student)
    student = with_layers_of(other(seed=2, norm="none"), student)
    losses = distilled(teacher, student)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    sum(losses).backward()
    gradients = [parameter.grad for parameter in student.backbone.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    for branch in (student.head.classification_head, student.head.regression_head):
        assert all(p.grad is None for name, p in branch.named_parameters() if not name.startswith("conv"))


@pytest.mark.parametrize("family", BUILDERS)
def test_images_without_objects_and_without_targets(family):
    build, (other,) = BUILDERS[family], [b for name, b in BUILDERS.items() if name != family]
    images, targets = tiny_batch()
    empty = [{name: value[:0] for name, value in target.items()} for target in targets]
    losses = distilled(build(), other(seed=1), (images, empty))
    assert all(loss.isfinite() and loss > 0 for loss in losses)
    unlabelled = Distiller(build(), other(seed=1), CrossKD())(images)
    assert unlabelled.keys() == {"kd_cls", "kd_reg"}
    assert all(loss.isfinite() and loss > 0 for loss in unlabelled.values())


@pytest.mark.parametrize("build", [tiny_retinanet, tiny_fcos])
def test_a_student_with_other_anchors_gets_the_same_losses(build):
    teacher, student = build(hidden=12), build(seed=1)
    expected = distilled(teacher, student)
    ratios = ((0.5, 1.0, 2.0),) if build is tiny_retinanet else ((1.0,),)
    student.anchor_generator = AnchorGenerator(tuple((5 * stride,) for stride in STRIDES), ratios * 3)
    assert all(map(torch.equal, distilled(teacher, student), expected))


@pytest.mark.parametrize("build", [tiny_retinanet, tiny_fcos])
def test_a_student_of_other_classes_gets_the_same_losses(build):
    teacher, student = build(7, hidden=12), build(7, seed=1)
    expected = distilled(teacher, student)
    student = with_layers_of(build(4, seed=1), student)
    assert all(map(torch.equal, distilled(teacher, student), expected))


def test_a_class_map_still_chooses_among_the_teachers_classes():
    teacher, student = tiny_retinanet(7, hidden=12), tiny_fcos(4, seed=1)
    whole, mapped = distilled(teacher, student), distilled(teacher, student, class_map=[6, 0, 3, 1])
    assert mapped[0] < whole[0]  # a sum over fewer classes


def test_an_ssds_anchors_and_classes_do_not_matter_either():
    def step(student: nn.Module) -> list[Tensor]:
        losses = Distiller(tiny_ssd(6, hidden=12), student, CrossKD())(*tiny_batch(first_label=1))
        return [losses["kd_cls"], losses["kd_reg"]]

    student = tiny_ssd(6, seed=1)
    expected = step(student)
    student.anchor_generator = DefaultBoxGenerator([[2], [2, 3], [2]], min_ratio=0.3)
    assert all(map(torch.equal, step(student), expected))
    fewer = tiny_ssd(4, seed=1)
    fewer.backbone.load_state_dict(student.backbone.state_dict())
    assert all(map(torch.equal, step(fewer), expected))


def test_an_ssd_and_a_retinanet_teach_each_other():
    """The one has a softmax and no tower, the other a sigmoid per class and four blocks."""
    ssd = tiny_ssd(widths=(32, 32, 32))
    for teacher, student, first in ((ssd, tiny_retinanet(), 0), (tiny_retinanet(), ssd, 1)):
        distiller = Distiller(teacher, student, CrossKD(position=0))
        losses = distiller(*tiny_batch(first_label=first))
        assert all(loss.isfinite() for loss in losses.values())
        assert min(losses["kd_cls"], losses["kd_reg"]) > 0


@pytest.mark.parametrize(
    ("teacher", "student"), [("retinanet", "fcos"), ("fcos", "retinanet")], ids=lambda name: name
)
def test_mimicking_is_refused_across_families(teacher, student):
    distiller = Distiller(BUILDERS[teacher](), BUILDERS[student](), PredictionMimicking())
    with pytest.raises(ValueError, match=r"RetinaNet head.* FCOS head|FCOS head.* RetinaNet head"):
        distiller(*tiny_batch())


def tiny_ssdlite(**options: Any) -> nn.Module:
    return tiny_ssd(lite=True, **options)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (tiny_fcos, tiny_retinanet),
        (tiny_faster_rcnn, tiny_retinanet),
        (tiny_ssd, tiny_retinanet),
        (tiny_retinanet, tiny_faster_rcnn),
        (tiny_faster_rcnn, tiny_faster_rcnn),
        (tiny_ssd, tiny_ssdlite),
    ],
)
def test_maps_are_imitated_across_families(
    teacher: Callable[..., nn.Module], student: Callable[..., nn.Module]
):
    """The student keeps its own losses, and learns in a few steps on one batch what PKD asks for."""
    images, targets = tiny_batch(first_label=0 if student is tiny_retinanet else 1)
    learner = student(seed=1)
    distiller = Distiller(teacher(hidden=12), learner, PKD())
    twin = copy.deepcopy(learner)
    torch.manual_seed(7)  # Faster R-CNN samples
    expected = twin(images, targets)
    torch.manual_seed(7)
    losses = distiller(images, targets)
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
    optimizer = torch.optim.Adam(distiller.parameters(), lr=5e-3)
    for _ in range(15):
        optimizer.zero_grad()
        distiller(images)["kd_pkd"].backward()
        optimizer.step()
    assert distiller(images)["kd_pkd"] < 0.8 * losses["kd_pkd"]
