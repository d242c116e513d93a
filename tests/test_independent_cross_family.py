"""CrossKD between families against the slow float64 calculation, which asks nothing of the student's head.

Which anchors count and what the losses are divided by are the teacher's own label assignment on the objects,
in the slow calculation by rules written out there.
"""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator

from crosskd import CrossKD, Distiller
from crosskd.step import Step
from tests.helpers.slow_crosskd import (
    assert_losses_and_gradients_agree,
    fcos_amount,
    float64_batch,
    locations_of,
    retinanet_assignment,
    slow_losses,
)
from tests.helpers.tiny import STRIDES, tiny_fcos, tiny_retinanet

GROUPS = {tiny_retinanet: 0, tiny_fcos: 32}
PAIRS = [(tiny_retinanet, tiny_fcos), (tiny_fcos, tiny_retinanet)]
every_pair = pytest.mark.parametrize(
    ("theirs", "ours"), PAIRS, ids=["RetinaNet teaches FCOS", "FCOS teaches RetinaNet"]
)


@every_pair
@pytest.mark.parametrize(("position", "tap"), [(0, "post"), (2, "post"), (3, "pre"), (4, "post")])
def test_losses_and_gradient_agree(theirs, ours, position, tap):
    teacher = theirs(seed=1, image_mean=[0.5, 0.4, 0.3], image_std=[0.25, 0.2, 0.3]).double()
    distiller = Distiller(teacher, ours(seed=2).double(), CrossKD(position, tap))
    images, targets = float64_batch()
    losses = distiller(images, targets)
    expected = slow_losses(
        distiller, images, targets, position=position, tap=tap, groups=(GROUPS[ours], GROUPS[theirs])
    )
    assert_losses_and_gradients_agree(distiller, losses, expected)


@every_pair
def test_published_settings_are_those_of_the_teacher(theirs, ours):
    distiller = Distiller(theirs(seed=1).double(), ours(seed=2).double(), CrossKD())
    images, targets = float64_batch()
    position = 3 if theirs is tiny_retinanet else 2
    losses = distiller(images, targets)
    expected = slow_losses(
        distiller, images, targets, position=position, groups=(GROUPS[ours], GROUPS[theirs])
    )
    assert_losses_and_gradients_agree(distiller, losses, expected)


@every_pair
@pytest.mark.parametrize("class_map", [None, (5, 0, 2)], ids=["all classes", "class map"])
def test_other_classes(theirs, ours, class_map):
    """The teacher of 7 classes judges both sides by all of them, or by those that a class map names."""
    teacher, student = theirs(7, seed=1).double(), ours(3, seed=2).double()
    distiller = Distiller(teacher, student, CrossKD(2), class_map=class_map)
    images, targets = float64_batch(num_classes=3)
    losses = distiller(images, targets)
    expected = slow_losses(
        distiller, images, targets, position=2, groups=(GROUPS[ours], GROUPS[theirs]), columns=class_map
    )
    assert_losses_and_gradients_agree(distiller, losses, expected)


def test_one_family_with_other_anchors():
    """The student's anchors are half as large and of one ratio: the teacher's assignment decides."""
    anchors = AnchorGenerator(tuple((2 * stride,) for stride in STRIDES), ((1.0,),) * len(STRIDES))
    student = tiny_retinanet(seed=2, anchor_generator=anchors).double()
    distiller = Distiller(tiny_retinanet(seed=1).double(), student, CrossKD(3))
    images, targets = float64_batch()
    losses = distiller(images, targets)
    expected = slow_losses(distiller, images, targets, position=3)
    assert_losses_and_gradients_agree(distiller, losses, expected)


# -- the teacher's assignment ----------------------------------------------------------------------


class Watching(CrossKD):
    """Keeps the step."""

    def forward(self, step: Step) -> dict[str, torch.Tensor]:
        self.step = step
        return super().forward(step)


def step_of(theirs, ours, targets, images) -> Step:
    distiller = Distiller(theirs(seed=1).double(), ours(seed=2).double(), Watching(1))
    distiller(images, targets)
    return distiller.methods["crosskd"].step


def test_a_retinanets_assignment_for_an_fcos():
    images, targets = float64_batch()
    assignment = step_of(tiny_retinanet, tiny_fcos, targets, images).teacher_assignment()
    places = locations_of(64, 4, (0.5, 1.0, 2.0))
    expected = [retinanet_assignment(places, target["boxes"].tolist()) for target in targets]
    assert assignment.label_weights.tolist() == [label_weights for label_weights, _ in expected]
    assert assignment.normalizer.item() == sum(positives for _, positives in expected)
    assert (assignment.label_weights == 0).sum() > 0


def test_an_fcoss_assignment_for_a_retinanet():
    images, targets = float64_batch()
    assignment = step_of(tiny_fcos, tiny_retinanet, targets, images).teacher_assignment()
    places = locations_of(64, 1, (1.0,))
    amounts = [fcos_amount(places, target["boxes"].tolist()) for target in targets]
    assert assignment.label_weights is None
    assert assignment.normalizer.item() == pytest.approx(sum(amounts), rel=1e-6)
    assert assignment.positive.shape == (2, len(places))


@every_pair
def test_images_without_objects(theirs, ours):
    """One positive per image at least, or a sum of 1: the loss stays finite and has a gradient."""
    images, targets = float64_batch()
    targets = [{name: tensor[:0] for name, tensor in target.items()} for target in targets]
    step = step_of(theirs, ours, targets, images)
    assignment = step.teacher_assignment()
    assert assignment.normalizer.item() == (2 if theirs is tiny_retinanet else 1)
    assert not assignment.positive.any()


@every_pair
def test_images_without_targets(theirs, ours):
    """What the teacher is sure of takes the place of objects."""
    images, _ = float64_batch()
    distiller = Distiller(theirs(seed=1).double(), ours(seed=2).double(), Watching(1))
    losses = distiller(images)
    assert set(losses) == {"kd_cls", "kd_reg"}
    step = distiller.methods["crosskd"].step
    sure = step.teacher.predictions.logits.sigmoid().amax(-1) >= 0.5
    assert torch.equal(step.teacher_assignment().positive, sure)
    sum(losses.values()).backward()
    assert distiller.student.backbone.stem[0][0].weight.grad.abs().max() > 0
