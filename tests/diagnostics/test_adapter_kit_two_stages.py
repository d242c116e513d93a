"""The conformance kit on detectors of two stages: either head is checked, and named in what is found."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign

from crosskd import CrossKD
from crosskd.adapters import TorchvisionFasterRCNNAdapter
from crosskd.adapters._torchvision_two_stage import _BoxHead
from crosskd.predictions import Predictions
from crosskd.testing import AdapterError, check_adapter
from tests.conformance import assert_green, only
from tests.helpers.two_stages import POOLED, tiny_faster_rcnn, two_stage_batch


class Renamed(nn.Module):
    """A backbone's maps under other names."""

    def __init__(self, backbone: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.backbone, self.names, self.out_channels = backbone, names, backbone.out_channels

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, self.backbone(pixels).values(), strict=True))


def with_names(*names: str, **options: Any) -> nn.Module:
    """A Faster R-CNN whose maps are named so; its box head knows all but the coarsest."""
    pooling = MultiScaleRoIAlign(list(names[:-1]), POOLED, 2)
    detector = tiny_faster_rcnn(levels=(0, 1, 2)[: len(names)], box_roi_pool=pooling, **options)
    detector.backbone = Renamed(detector.backbone, names)
    return detector


PAIRS = {
    "v1": ({"width": 24, "vector": 32, "batch_norm": True}, {}),
    "v2": ({"v2": True, "width": 24, "vector": 32, "batch_norm": True}, {"v2": True}),
    "v1 from v2": ({"v2": True, "width": 24}, {}),
}


def found(second: _BoxHead, *checks: str, adapter: Any = None, **student: Any) -> AdapterError:
    """The error that a second stage gets, from all checks unless some are named."""
    adapter = TorchvisionFasterRCNNAdapter() if adapter is None else adapter
    adapter.second = second
    detectors = {"teacher": tiny_faster_rcnn(), "student": tiny_faster_rcnn(seed=1, **student)}
    skip = only(*checks) if checks else None
    with pytest.raises(AdapterError) as error:
        check_adapter(adapter, *two_stage_batch(), **detectors, skip=skip, steps=120)
    return error.value


@pytest.mark.parametrize(("teacher", "student"), PAIRS.values(), ids=PAIRS)
def test_faster_rcnns_adapter_is_green(teacher, student):
    pair = {
        "teacher": tiny_faster_rcnn(**teacher),
        "student": with_names("p3", "p4", "top", seed=1, **student),
    }
    assert_green(TorchvisionFasterRCNNAdapter(), *two_stage_batch(), **pair)


@pytest.mark.parametrize("part", ["rpn", "box"])
def test_one_part_may_be_distilled_alone(part):
    pair = {"teacher": tiny_faster_rcnn(), "student": tiny_faster_rcnn(seed=1)}
    skip = only("gradients through the tail", "student losses", "student gradients", "unlabelled images")
    method = CrossKD(part=part)
    report = check_adapter(
        TorchvisionFasterRCNNAdapter(), *two_stage_batch(), **pair, method=method, skip=skip
    )
    assert set(report.passed).isdisjoint(skip)
    assert len(report.passed) == 4


# -- broken second stages ------------------------------------------------------------------------


class PoolsFromTheTeacher(_BoxHead):
    """Hands the student what it has seen first: the teacher's maps."""

    def features(self, detector, maps, regions, inputs):
        if not detector.training:
            self.maps = maps
        return super().features(detector, self.maps, regions, inputs)


class DetachesTheTail(_BoxHead):
    def predict(self, detector, level, towers):
        with torch.set_grad_enabled(detector.training and torch.is_grad_enabled()):
            return super().predict(detector, level, towers)


class DrawsOfItsOwn(_BoxHead):
    def regions(self, *arguments):
        torch.rand(1)
        return super().regions(*arguments)


class HalvesItsLosses(_BoxHead):
    def losses(self, *arguments):
        losses, assignment = super().losses(*arguments)
        return {name: loss / 2 for name, loss in losses.items()}, assignment


class WakesTheTeacher(_BoxHead):
    def features(self, detector, maps, regions, inputs):
        return super().features(detector.train(), maps, regions, inputs)


class LooksAtTheMode(_BoxHead):
    def features(self, detector, maps, regions, inputs):
        (pooled,) = super().features(detector, maps, regions, inputs)
        return [pooled if detector.training else 2 * pooled]


@pytest.mark.parametrize(
    ("second", "check", "told"),
    [
        (PoolsFromTheTeacher, "gradients through the tail",
         r"box: what features\(\) pools for the student has no gradient at the student's own maps"),
        (PoolsFromTheTeacher, "student losses", "box: loss_classifier is .* through the adapter and"),
        (DetachesTheTail, "gradients through the tail",
         "box: kd_cls has no gradient at the student's features of the box branch at any level"),
        (DrawsOfItsOwn, "student losses", "box: loss_classifier is .* through the adapter and .* alone"),
        (HalvesItsLosses, "student losses", "box: loss_box_reg is .* through the adapter and .* alone"),
        (WakesTheTeacher, "teacher untouched", r"train mode: second.features\(\) left it so"),
        (LooksAtTheMode, "same path for both", r"box: features\(\) gives a teacher and a student of"),
    ],
)  # fmt: skip
def test_broken_second_stages_are_red_and_told_why(second, check, told):
    error = found(second(), check)
    assert {name for fault in error.faults for name in fault.checks} == {check}
    with pytest.raises(AdapterError, match=told):
        raise error
    assert "rpn: " not in str(error)


def turned(predictions: Predictions) -> Predictions:
    """Takes y before x."""
    return replace(predictions, regression=predictions.regression[..., [1, 0, 3, 2]])


class DecodesMixedUp(_BoxHead):
    def decode(self, detector, predictions, regions):
        return super().decode(detector, turned(predictions), regions)


class ProposesMixedUp(TorchvisionFasterRCNNAdapter):
    """Mixes up what the first head's boxes are compared by, while its proposals are right."""

    def decode(self, detector, predictions, locations):
        return super().decode(detector, turned(predictions), locations)


class Shifts(_BoxHead):
    """Hands something of each class out as the next one's, and knows it itself."""

    def __init__(self, name: str, dimension: int) -> None:
        self.name, self.dimension = name, dimension

    def rolled(self, predictions, by):
        values = getattr(predictions, self.name).roll(by, dims=self.dimension)
        return replace(predictions, **{self.name: values})

    def predict(self, detector, level, towers):
        return self.rolled(super().predict(detector, level, towers), 1)

    def losses(self, student, predictions, regions, inputs):
        return super().losses(student, self.rolled(predictions, -1), regions, inputs)


@pytest.mark.parametrize(
    ("second", "adapter", "told"),
    [
        (DecodesMixedUp(), None, "box: decoding: where the student's own losses are smallest, the decoded"),
        (
            _BoxHead(),
            ProposesMixedUp(),
            "rpn: decoding: where the student's own losses are smallest, the dec",
        ),
        (Shifts("logits", -1), None, r"box: classes: .*of the target's label \(mostly of label \+1\)"),
        (
            Shifts("regression", 2),
            None,
            "box: classes: .*another class's box than that of the target's label",
        ),
    ],
)
def test_boxes_and_classes_alone_are_blamed_where_they_are_mixed_up(second, adapter, told):
    error = found(second, adapter=adapter)
    assert [fault.checks for fault in error.faults] == [("decoding and classes",)]
    with pytest.raises(AdapterError, match=told):
        raise error


# -- what else each check finds ------------------------------------------------------------------


class Changed(_BoxHead):
    """Does one thing otherwise: a function that is given what the right one gives, and its arguments."""

    def __init__(self, name: str, change: Any) -> None:
        right = getattr(super(), name)
        setattr(self, name, lambda *arguments: change(right(*arguments), *arguments))


class RefusesOneImage(_BoxHead):
    def losses(self, student, predictions, regions, inputs):
        if len(regions.boxes) == 1:
            raise IndexError("no second image")
        return super().losses(student, predictions, regions, inputs)


def with_recipe(**changed: Any) -> _BoxHead:
    stage = _BoxHead()
    stage.recipe = replace(_BoxHead.recipe, **changed)
    return stage


def without_normalizer(result, *_):
    return result[0], replace(result[1], normalizer=0 * result[1].normalizer)


@pytest.mark.parametrize(
    ("check", "second", "told"),
    [
        ("structure", Changed("num_classes", lambda n, d: n if d.training else n - 1),
         r"box: teacher: num_classes\(\) says 4, the logits of level 0 are of 5"),
        ("structure", Changed("counts", lambda n, r: n[:1]),
         r"box: teacher: counts\(\) says \[16\] regions for 2 "),
        ("structure", Changed("features", lambda f, *_: [f[0][1:]]),
         r"for 2 images, features\(\) gives \[31\]"),
        ("structure", Changed("features", lambda f, *_: [f[0][:, 1:]]),
         "the box tower takes 16 channels, the m"),
        ("structure", with_recipe(background=None), "box: teacher: recipe.background is None, that of "),
        ("taps and tail", Changed("predict", lambda p, *_: replace(p, logits=p.logits + torch.rand(()))),
         r"box: box branch, level 0, position 0 .*predict\(\) gives other predictions for the same tower"),
        ("student losses", Changed("losses", without_normalizer), "box: assignment.normalizer is 0"),
        ("student gradients", Changed("branches", lambda b, d: copy.deepcopy(b)),
         "box: the distillation's gradient does not reach what stands before the split: block 1 of the box"),
        ("one image", RefusesOneImage(),
         r"box: losses\(\) of the adapter raised IndexError: no second image"),
        ("autocast", Changed("decode", lambda b, *_: b.bfloat16().double()), "box: kd_reg is torch.float64"),
    ],
)  # fmt: skip
def test_each_check_looks_at_the_second_stage(check, second, told):
    error = found(second, check)
    with pytest.raises(AdapterError, match=told):
        raise error


def test_functions_of_a_second_stage_that_are_missing():
    class Half:
        recipe = _BoxHead.recipe

        def regions(self, *arguments):
            return None

    class Unnamed(TorchvisionFasterRCNNAdapter):
        parts = ("head", "head")

    error = found(Half(), adapter=Unnamed())
    assert "Half has no function num_classes, check_pair, branches, counts, features, predict" in str(error)
    assert "Unnamed.parts is ('head', 'head')" in str(error)
    assert error.report.passed == ()
