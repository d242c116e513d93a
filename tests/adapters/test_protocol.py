"""Adapters are found by the detectors' types; a user's own is a class that binds one detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosskd import PKD, CrossKD, Distiller, PredictionMimicking
from crosskd.adapters import (
    Adapter,
    Anchors,
    Batch,
    Head,
    OwnOutput,
    TorchvisionFCOS,
    TorchvisionRetinaNet,
    find_adapter,
)
from crosskd.predictions import Assignment, Predictions
from crosskd.towers import Branch, Tower
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet


@pytest.mark.parametrize(
    ("build", "adapter"), [(tiny_retinanet, TorchvisionRetinaNet), (tiny_fcos, TorchvisionFCOS)]
)
def test_adapter_is_found_from_the_type_or_a_class_derived_from_it(build, adapter):
    detector = build()
    assert type(find_adapter(detector)) is adapter
    detector.__class__ = type("Derived", (type(detector),), {})
    assert type(find_adapter(detector)) is adapter
    assert find_adapter(detector).detector is detector


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_error_types_that_no_adapter_understands(side):
    detectors = {"teacher": tiny_fcos(), "student": tiny_fcos(seed=1)}
    detectors[side] = nn.Conv2d(1, 1, 1)
    message = f"{side}: no adapter understands a Conv2d.*RetinaNet, FCOS"
    with pytest.raises(TypeError, match=message):
        Distiller(**detectors, methods=CrossKD())


@pytest.mark.parametrize("made", [None, "adapter", nn.Identity()])
def test_error_specs_that_make_no_adapter(made):
    with pytest.raises(
        TypeError, match=f"must make a crosskd.adapters.Adapter.* got a {type(made).__name__}"
    ):
        Distiller(tiny_fcos(), tiny_fcos(seed=1), CrossKD(), lambda detector: made)


class Segmenter(nn.Module):
    """A toy detector: one level, one box of one size at each pixel."""

    def __init__(self, width: int, classes: int = 2, stride: int = 1) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, width, 3, padding=1, stride=stride)
        self.tower = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()
        )
        self.logits = nn.Conv2d(width, classes, 1)
        self.sides = nn.Conv2d(width, 4, 1)

    def forward(self, images: Tensor, targets: Any = None) -> Any:
        features = self.tower(self.backbone(images))
        logits, sides = (p(features).flatten(2).mT for p in (self.logits, self.sides))
        if targets is None:
            return {"logits": logits, "sides": sides}
        return {"own": F.binary_cross_entropy_with_logits(logits, targets)}


class SegmenterHead(Head):
    def __init__(self, detector: Segmenter) -> None:
        self.detector = detector
        self.num_classes = detector.logits.out_channels
        predictors = {"logits": detector.logits, "sides": detector.sides}
        self.branches = (Branch("both", (Tower.of(detector.tower, "tower"),), predictors),)

    def predict(self, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        predictors = self.detector.logits, self.detector.sides
        return Predictions(*(p(towers["both"]).flatten(2).mT for p in predictors), quality=None)

    def anchors(self, batch: Batch, maps: Sequence[Tensor]) -> Anchors:
        height, width = maps[0].shape[2:]
        stride = batch.size[0] / height
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centers = stride * torch.stack([x, y, x, y], dim=-1).view(-1, 4).to(batch.pixels)
        return Anchors(centers + centers.new_tensor([-2, -2, 2, 2]), (height * width,))

    def decode(self, predictions: Predictions, anchors: Anchors) -> Tensor:
        assert anchors.boxes is not None
        return predictions.regression + anchors.boxes

    def losses(
        self, predictions: Predictions, anchors: Anchors, batch: Batch
    ) -> tuple[dict[str, Tensor], Assignment]:
        loss = F.binary_cross_entropy_with_logits(predictions.logits, batch.targets)
        positive = batch.targets.amax(2) > 0
        return {"own": loss}, Assignment(None, positive, positive.sum().float())


class SegmenterAdapter(Adapter):
    def __init__(self, detector: nn.Module) -> None:
        assert isinstance(detector, Segmenter)
        self.detector = detector
        self.heads = (SegmenterHead(detector),)
        self.strides = (float(detector.backbone.stride[0]),)
        self.widths = (detector.backbone.out_channels,)

    def prepare(self, images: Any, targets: Any) -> Batch:
        return Batch(images, (tuple(images.shape[2:]),) * len(images), targets=targets)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        return [self.detector.backbone(pixels)]

    def own_outputs(self, batch: Batch) -> list[OwnOutput]:
        outputs = self.detector(batch.pixels)
        return [OwnOutput(Predictions(outputs["logits"], outputs["sides"], quality=None))]


IMAGES, TARGETS = torch.rand(2, 3, 5, 5), torch.ones(2, 25, 2)


def test_an_adapter_of_a_users_own_distils_a_detector_of_their_own():
    teacher, student = Segmenter(8), Segmenter(6)
    distiller = Distiller(teacher, student, [CrossKD(position=1), PKD()], SegmenterAdapter)
    losses = distiller(IMAGES, TARGETS)
    assert sorted(losses) == ["kd_cls", "kd_pkd", "kd_reg", "own"]
    (losses["kd_cls"] + losses["kd_reg"]).backward()
    assert student.tower[0].weight.grad.abs().max() > 0
    assert student.tower[2].weight.grad is None
    assert student.logits.weight.grad is None


def test_an_adapter_for_either_side():
    """A teacher of a user's own and a student of torchvision's: the two have no stride in common."""
    options = {"adapter": find_adapter, "teacher_adapter": SegmenterAdapter}
    with pytest.raises(ValueError, match="teacher's pixels are coded"):
        Distiller(Segmenter(8), tiny_retinanet(), PKD(), **options)
    options["teacher_view"] = lambda images, targets: torch.stack(images)
    teacher = Segmenter(32, stride=8)
    distiller = Distiller(teacher, tiny_retinanet(), PKD(levels=(0,)), **options)
    assert distiller(*tiny_batch())["kd_pkd"] > 0


def test_an_adapter_whose_pieces_are_not_the_detector_is_refused():
    class Halved(SegmenterHead):
        def predict(self, level: int, towers: Mapping[str, Tensor]) -> Predictions:
            predictions = super().predict(level, towers)
            return Predictions(predictions.logits / 2, predictions.regression, quality=None)

    class Wrong(SegmenterAdapter):
        def __init__(self, detector: nn.Module) -> None:
            super().__init__(detector)
            self.heads = (Halved(self.detector),)

    pair = Segmenter(8), Segmenter(8)
    with pytest.raises(ValueError, match="student: Segmenter.* own is"):
        Distiller(*pair, PredictionMimicking(), Wrong)(IMAGES, TARGETS)
    distiller = Distiller(*pair, PredictionMimicking(), SegmenterAdapter, teacher_adapter=Wrong)
    with pytest.raises(ValueError, match="teacher: Segmenter.* logits differ"):
        distiller(IMAGES, TARGETS)


def test_error_a_teacher_at_other_anchors_without_an_assignment_of_its_own():
    class Other(SegmenterHead):
        head_type = "another"

    class OtherAdapter(SegmenterAdapter):
        def __init__(self, detector: nn.Module) -> None:
            super().__init__(detector)
            self.heads = (Other(self.detector),)

        def prepare(self, images: Any, targets: Any) -> Batch:
            batch = super().prepare(images, targets)
            return Batch(batch.pixels, batch.image_sizes, (), targets)

    method = CrossKD(position=1)
    distiller = Distiller(Segmenter(8), Segmenter(8), method, SegmenterAdapter, teacher_adapter=OtherAdapter)
    with pytest.raises(ValueError, match="objects of the targets"):
        distiller(IMAGES, TARGETS)
    distiller(IMAGES)  # without targets the teacher's own confidence decides


def test_in_eval_the_adapter_says_how_the_student_answers():
    class Scored(SegmenterAdapter):
        def detect(self, images: Any, targets: Any) -> Any:
            assert not self.detector.training
            return len(images), targets

    distiller = Distiller(Segmenter(8), Segmenter(6), CrossKD(position=1), Scored)
    assert distiller.eval()(IMAGES, "sizes") == (2, "sizes")
