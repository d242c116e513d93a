"""The conformance kit on detectors of two stages: either head is checked, and named in what is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign

from crosskd import CrossKD
from crosskd.adapters import TorchvisionFasterRCNN
from crosskd.adapters.torchvision.faster_rcnn import _RPN, _BoxHead
from crosskd.predictions import Predictions
from crosskd.testing import AdapterError, check_adapter
from tests.helpers.conformance import assert_green, only
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


def with_heads(box: type[_BoxHead] = _BoxHead, rpn: type[_RPN] = _RPN) -> type:
    """An adapter with other heads."""

    class Changed(TorchvisionFasterRCNN):
        def __init__(self, detector):
            super().__init__(detector)
            self.heads = (rpn(detector), box(detector, self.map_names))

    return Changed


def found(adapter: Any, *checks: str) -> AdapterError:
    """The error that an adapter gets, from all checks unless some are named."""
    detectors = {"teacher": tiny_faster_rcnn(), "student": tiny_faster_rcnn(seed=1)}
    skip = only(*checks) if checks else None
    with pytest.raises(AdapterError) as error:
        check_adapter(adapter, *two_stage_batch(), **detectors, skip=skip, steps=120)
    return error.value


def test_faster_rcnns_adapter_is_green_from_one_form_to_the_other():
    teacher = tiny_faster_rcnn(v2=True, width=24, vector=32, batch_norm=True)
    student = with_names("p3", "p4", "top", seed=1)
    assert_green(TorchvisionFasterRCNN, *two_stage_batch(), teacher=teacher, student=student)


@pytest.mark.parametrize("head", ["rpn", "box"])
def test_one_head_may_be_distilled_alone(head):
    pair = {"teacher": tiny_faster_rcnn(), "student": tiny_faster_rcnn(seed=1)}
    checks = "gradients through the tail", "student losses", "unlabelled images"
    report = check_adapter(
        TorchvisionFasterRCNN, *two_stage_batch(), **pair, method=CrossKD(head=head), skip=only(*checks)
    )
    assert report.passed == checks


# -- broken box heads ----------------------------------------------------------------------------


class PoolsFromTheTeacher(_BoxHead):
    """Hands the student what was pooled from first: the teacher's maps."""

    maps: Sequence[Tensor] = ()

    def pool(self, maps, regions, batch):
        if not self.roi_heads.training:
            PoolsFromTheTeacher.maps = maps
        return super().pool(PoolsFromTheTeacher.maps, regions, batch)


class DetachesTheTail(_BoxHead):
    def predict(self, level, towers):
        with torch.set_grad_enabled(self.roi_heads.training and torch.is_grad_enabled()):
            return super().predict(level, towers)


class DrawsOfItsOwn(_BoxHead):
    def regions(self, *arguments):
        torch.rand(1)
        return super().regions(*arguments)


class HalvesItsLosses(_BoxHead):
    def losses(self, *arguments):
        losses, assignment = super().losses(*arguments)
        return {name: loss / 2 for name, loss in losses.items()}, assignment


class WakesTheTeacher(_BoxHead):
    def pool(self, maps, regions, batch):
        self.roi_heads.train()
        return super().pool(maps, regions, batch)


class LooksAtTheMode(_BoxHead):
    def pool(self, maps, regions, batch):
        pooled = super().pool(maps, regions, batch)
        return pooled if self.roi_heads.training else 2 * pooled


@pytest.mark.parametrize(
    ("box", "check", "told"),
    [
        (PoolsFromTheTeacher, "student losses", "'loss_classifier': .* through the adapter and"),
        (DetachesTheTail, "gradients through the tail",
         r"box: kd_cls has no gradient in the student(.|\n)*box: .* no gradient at box features of"),
        (DrawsOfItsOwn, "student losses", "'loss_classifier': .* through the adapter and .* alone"),
        (HalvesItsLosses, "student losses", "'loss_box_reg': .* through the adapter and .* alone"),
        (WakesTheTeacher, "teacher untouched", "the teacher has changed in .*: mode of roi_heads"),
        (LooksAtTheMode, "same path", "the box's logits differ"),
    ],
)  # fmt: skip
def test_broken_box_heads_are_red_with_the_fault_named(box, check, told):
    error = found(with_heads(box), check)
    assert {name for fault in error.faults for name in fault.checks} == {check}
    with pytest.raises(AdapterError, match=told):
        raise error
    assert "rpn: " not in str(error)


def turned(predictions: Predictions) -> Predictions:
    """Takes y before x."""
    return replace(predictions, regression=predictions.regression[..., [1, 0, 3, 2]])


class DecodesMixedUp(_BoxHead):
    def decode(self, predictions, anchors):
        return super().decode(turned(predictions), anchors)


class ProposesMixedUp(_RPN):
    """Mixes up what the first head's boxes are compared by, while its proposals are right."""

    def decode(self, predictions, anchors):
        return super().decode(turned(predictions), anchors)


class Shifts(_BoxHead):
    """Hands something of each class out as the next one's, and is consistent about it."""

    part, dimension = "logits", -1

    def rolled(self, predictions, by):
        values = getattr(predictions, self.part).roll(by, dims=self.dimension)
        return replace(predictions, **{self.part: values})

    def predict(self, level, towers):
        return self.rolled(super().predict(level, towers), 1)

    def losses(self, predictions, anchors, batch):
        return super().losses(self.rolled(predictions, -1), anchors, batch)


class ShiftsBoxes(Shifts):
    part, dimension = "regression", 2


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        (with_heads(DecodesMixedUp), "box: decoding: the decoded boxes of"),
        (with_heads(rpn=ProposesMixedUp), "rpn: decoding: the decoded boxes of"),
        (with_heads(Shifts), r"box: classes: .* is not its object's \(label \+1\)"),
        (with_heads(ShiftsBoxes), "box: classes: another class's box than the object's label's fits"),
    ],
)
def test_boxes_and_classes_that_are_mixed_up(adapter, told):
    error = found(adapter, "decoding and classes")
    assert len(error.faults) == 1
    with pytest.raises(AdapterError, match=told):
        raise error


# -- what else each check finds ------------------------------------------------------------------


def of_box(name: str, change: Any) -> type:
    """An adapter whose box head does one thing otherwise, given what is right, the head, the arguments."""
    right = getattr(_BoxHead, name)

    def changed(self, *arguments):
        return change(right(self, *arguments), self, *arguments)

    return with_heads(type("ChangedBox", (_BoxHead,), {name: changed}))


def with_box(**values: Any) -> type:
    class Valued(_BoxHead):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            vars(self).update(values)

    return with_heads(Valued)


def refuses_one_image(result, head, predictions, regions, batch):
    if len(regions.boxes) == 1:
        raise IndexError("no second image")
    return result


def without_normalizer(result, *_):
    return result[0], replace(result[1], normalizer=0 * result[1].normalizer)


@pytest.mark.parametrize(
    ("check", "adapter", "told"),
    [
        ("structure", with_box(background=None),
         "teacher: box: background says None, the predictions have 0"),
        ("structure", of_box("counts", lambda n, *_: n[:1]),
         r"teacher: box: there are \[.*\] regions of 2 images, pooled \[32\]"),
        ("structure", of_box("pool", lambda f, *_: f[1:]), r"pooled \[31\], .* and 31 rows"),
        ("taps and tail", of_box("predict", lambda p, *_: replace(p, logits=p.logits + torch.rand(()))),
         r"box: box branch, level 0, position 0: predict\(\) gives other predictions for the same tower"),
        ("label assignment", of_box("losses", without_normalizer), "box: assignment.normalizer is 0"),
        ("one image", of_box("losses", refuses_one_image),
         r"box: changed\(\) of ChangedBox raised IndexError: no second image"),
        ("autocast", of_box("decode", lambda b, *_: b.bfloat16().double()), "kd_box_reg is torch.float64"),
    ],
)  # fmt: skip
def test_each_check_looks_at_the_box_head(check, adapter, told):
    error = found(adapter, check)
    with pytest.raises(AdapterError, match=told):
        raise error


def test_functions_of_a_box_head_that_are_missing():
    class Half(_BoxHead):
        pool = None

    Half.__abstractmethods__ = frozenset({"pool"})
    error = found(with_heads(Half))
    assert "TypeError: teacher: Can't instantiate abstract class Half" in str(error)
    assert error.report.passed == ()
