"""Adapters are found by the detectors' types, and a user's own is an object with the protocol's functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from crosskd.head import Branch, Tower
from crosskd.methods.recipes import RETINANET
from torch import nn

from crosskd import CrossKD, Distiller
from crosskd.adapters import (
    Adapter,
    Inputs,
    TorchvisionFCOSAdapter,
    TorchvisionRetinaNetAdapter,
    find_adapter,
)
from crosskd.predictions import Assignment, Predictions
from tests.helpers.tiny import tiny_fcos, tiny_retinanet


@pytest.mark.parametrize(
    ("build", "adapter"),
    [(tiny_retinanet, TorchvisionRetinaNetAdapter), (tiny_fcos, TorchvisionFCOSAdapter)],
)
def test_adapter_is_found_from_the_type_or_a_class_derived_from_it(build, adapter):
    detector = build()
    derived = type("Derived", (type(detector),), {})
    assert isinstance(find_adapter(detector), adapter)
    detector.__class__ = derived
    assert isinstance(find_adapter(build(), detector), adapter)
    assert isinstance(find_adapter(detector), Adapter)


def test_types_that_no_adapter_understands_are_refused():
    message = "no adapter understands FCOS with Conv2d.*RetinaNet, FCOS.*write one.*pass it as adapter="
    with pytest.raises(TypeError, match=message):
        Distiller(tiny_fcos(), nn.Conv2d(1, 1, 1), CrossKD())


class Segmenter(nn.Module):
    """A toy detector: one level, one box of one size at each pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, width, 3, padding=1)
        self.tower = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()
        )
        self.logits = nn.Conv2d(width, 2, 1)
        self.sides = nn.Conv2d(width, 4, 1)


class SegmenterAdapter:
    """The protocol, implemented without deriving from anything."""

    recipe = RETINANET

    def supports(self, detector):
        return isinstance(detector, Segmenter)

    def num_classes(self, detector):
        return detector.logits.out_channels

    def strides(self, detector):
        return [1]

    def check_pair(self, teacher, student, levels):
        pass

    def branches(self, detector):
        tower = Tower.of(detector.tower, "tower")
        return (Branch("both", (tower,), {"logits": detector.logits, "sides": detector.sides}),)

    def prepare(self, teacher, student, images, targets):
        return Inputs(images, images, targets)

    def features(self, detector, pixels):
        return [detector.backbone(pixels)]

    def predict(self, detector, level, towers):
        features = towers["both"]
        rows = [p(features).flatten(2).transpose(1, 2) for p in (detector.logits, detector.sides)]
        return Predictions(rows[0], rows[1], quality=None)

    def locations(self, detector, inputs, features):
        return torch.tensor([-2.0, -2.0, 2.0, 2.0])

    def decode(self, detector, predictions, locations):
        return predictions.regression + locations

    def losses(self, student, predictions, locations, inputs):
        loss = F.binary_cross_entropy_with_logits(predictions.logits, inputs.targets)
        positive = inputs.targets.amax(2) > 0
        return {"own": loss}, Assignment(None, positive, positive.sum().float())

    def detect(self, student, images, targets):
        return student(images)

    def check_locations(self, teacher, student, levels):
        assert torch.equal(teacher, student)


def test_an_adapter_of_a_users_own_distils_a_detector_of_their_own():
    assert isinstance(SegmenterAdapter(), Adapter)
    teacher, student = Segmenter(8), Segmenter(6)
    distiller = Distiller(teacher, student, CrossKD(position=1), SegmenterAdapter())
    images, targets = torch.rand(2, 3, 5, 5), torch.ones(2, 25, 2)
    losses = distiller(images, targets)
    assert sorted(losses) == ["kd_cls", "kd_reg", "own"]
    (losses["kd_cls"] + losses["kd_reg"]).backward()
    assert student.tower[0].weight.grad.abs().max() > 0
    assert student.tower[2].weight.grad is None
    assert student.logits.weight.grad is None


def test_in_eval_the_adapter_says_how_the_student_answers():
    class Scored(SegmenterAdapter):
        def detect(self, student, images, targets):
            assert not student.training
            return len(images), targets

    distiller = Distiller(Segmenter(8), Segmenter(6), CrossKD(position=1), Scored())
    assert distiller.eval()(torch.rand(2, 3, 5, 5), "sizes") == (2, "sizes")
