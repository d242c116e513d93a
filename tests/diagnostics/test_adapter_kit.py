"""The conformance kit: green for every adapter of ours, red for broken ones, in words that name the fault."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crosskd import PKD, CrossKD, PredictionMimicking
from crosskd.adapters import TorchvisionFCOS, TorchvisionRetinaNet, backbone, generic
from crosskd.diagnostics.adapter_checks import Bench
from crosskd.diagnostics.adapter_kit import CHECKS
from crosskd.predictions import Predictions
from crosskd.testing import AdapterError, check_adapter
from crosskd.towers import Block, Tower
from tests.helpers.conformance import assert_green, only
from tests.helpers.tiny import TinyBackbone, tiny_batch, tiny_fcos, tiny_retinanet

TINY = {"retinanet": (TorchvisionRetinaNet, tiny_retinanet), "fcos": (TorchvisionFCOS, tiny_fcos)}
families = pytest.mark.parametrize("family", TINY)


def found(adapter: Any, batch: Any = None, *, build=tiny_retinanet, student=None, **options) -> AdapterError:
    """The error that an adapter gets."""
    pair = {"teacher": build(batch_norm=True), "student": student or build(seed=1)}
    with pytest.raises(AdapterError) as error:
        check_adapter(adapter, *(batch or tiny_batch()), **pair, **{"steps": 60, **options})
    return error.value


# -- green ---------------------------------------------------------------------------------------


@families
def test_torchvisions_adapters_are_green(family):
    adapter, build = TINY[family]
    teacher, student = build(width=64, batch_norm=True), build(batch_norm=True, seed=1)
    assert_green(adapter, *tiny_batch(), teacher=teacher, student=student)


def test_two_adapters_of_a_pair_are_green():
    pair = {"teacher": tiny_fcos(6, batch_norm=True), "student": tiny_retinanet(seed=1, batch_norm=True)}
    assert_green(TorchvisionRetinaNet, *tiny_batch(), **pair, teacher_adapter=TorchvisionFCOS)


def test_a_backbone_as_the_teacher_leaves_the_tail_alone():
    pair = {"teacher": TinyBackbone(24, 8, batch_norm=True), "student": tiny_retinanet(seed=1)}
    report = assert_green(
        TorchvisionRetinaNet,
        *tiny_batch(),
        **pair,
        teacher_adapter=backbone(),
        method=PKD(),
        skipped=("gradients through the tail", "taps and tail"),
    )
    assert report.skipped["gradients through the tail"] == "PKD taps no features"
    assert report.skipped["taps and tail"] == "the teacher has no head"


@pytest.mark.mmdet
@pytest.mark.parametrize(
    "family",
    ["gfl", *(pytest.param(f, marks=pytest.mark.slow) for f in ("atss", "retinanet", "fcos", "rtmdet"))],
)
def test_mmdets_adapter_is_green(family):
    from crosskd.adapters.mmdet import MMDetSingleStage
    from tests.helpers.mmdet_heads import batch_of, detector_of, head_settings

    def without_objects(images, samples):
        for sample in samples:
            sample.gt_instances = sample.gt_instances[:0]
        return images, samples

    teacher, student = (detector_of(head_settings(family), seed=seed) for seed in (0, 1))
    assert_green(
        MMDetSingleStage,
        *batch_of(),
        teacher=teacher,
        student=student,
        without_objects=without_objects,
        steps=60,
        # mmdet's assigner of soft labels mixes float32 and float64.
        skipped=("float64",) if family == "rtmdet" else (),
    )


# -- broken adapters -----------------------------------------------------------------------------


class ActivatesItsInput(nn.Module):
    """A convolution that activates what it is given in place, which its layers don't show."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, features):
        return self.convolution(F.relu_(features))


class OverwritingHead(TorchvisionRetinaNet.head):
    """Cuts towers before the activations, which then overwrite the taps: every number is still right."""

    def __init__(self, detector):
        super().__init__(detector)
        branches = []
        for branch in self.branches:
            first, *others = (block.layers[0] for block in branch.towers[0].blocks)
            blocks = Block((first,)), *(Block((ActivatesItsInput(other),)) for other in others)
            tower = Tower(branch.towers[0].name, blocks, branch.towers[0].width_in)
            branches.append(replace(branch, towers=(tower,)))
        self.branches = tuple(branches)

    def predict(self, level, towers):
        return super().predict(level, {name: F.relu_(output) for name, output in towers.items()})


class OverwritesTaps(TorchvisionRetinaNet):
    head = OverwritingHead


class DetachingHead(TorchvisionRetinaNet.head):
    """Spares the teacher's predictors a graph."""

    def predict(self, level, towers):
        with torch.set_grad_enabled(self.detector.training and torch.is_grad_enabled()):
            return super().predict(level, towers)


class DetachesTheTail(TorchvisionRetinaNet):
    head = DetachingHead


class CoarsestFirst(TorchvisionRetinaNet):
    def maps(self, pixels):
        return super().maps(pixels)[::-1]


class WakesTheTeacher(TorchvisionRetinaNet):
    def maps(self, pixels):
        self.detector.train()
        return super().maps(pixels)


def decodes_mixed_up(base: type) -> type:
    class Turned(base.head):
        """Takes y before x."""

        def decode(self, predictions, anchors):
            turned = replace(predictions, regression=predictions.regression[..., [1, 0, 3, 2]])
            return super().decode(turned, anchors)

    return type("DecodesMixedUp", (base,), {"head": Turned})


def shifts_classes(base: type) -> type:
    class Shifted(base.head):
        """Hands the logits of each class out as the next one's, and is consistent about it."""

        def predict(self, level, towers):
            predictions = super().predict(level, towers)
            return replace(predictions, logits=predictions.logits.roll(1, dims=-1))

        def losses(self, predictions, anchors, batch):
            turned = replace(predictions, logits=predictions.logits.roll(-1, dims=-1))
            return super().losses(turned, anchors, batch)

    return type("ShiftsClasses", (base,), {"head": Shifted})


@pytest.mark.parametrize(
    ("adapter", "check", "told"),
    [
        (OverwritesTaps, "taps and tail", "position 1 were overwritten in place by a later layer"),
        (
            DetachesTheTail,
            "gradients through the tail",
            "has no gradient at classification features of ['level 0', 'level 1', 'level 2']",
        ),
        (CoarsestFirst, "structure", "the levels are [(2, 2), (4, 4), (8, 8)], as (height, width)"),
        (WakesTheTeacher, "teacher untouched", "places: mode of , mode of backbone, "),
    ],
)
def test_broken_adapters_are_red_with_the_fault_named(adapter, check, told):
    error = found(adapter, steps=1)
    assert check in {name for fault in error.faults for name in fault.checks}
    assert told in str(error)
    assert str(error).startswith(f"{adapter.__name__} fails ")
    assert all(fault.expected == CHECKS[fault.checks[0]].__doc__ for fault in error.faults)


@families
def test_boxes_alone_are_blamed_where_they_are_mixed_up(family):
    adapter, build = TINY[family]
    error = found(decodes_mixed_up(adapter), build=build)
    assert [fault.checks for fault in error.faults] == [("decoding and classes",)]
    assert "decoding: the decoded boxes of" in str(error)


@families
def test_classes_are_blamed_where_they_are_mixed_up(family):
    adapter, build = TINY[family]
    error = found(shifts_classes(adapter), build=build)
    # The teacher's own forward, too, gives its classes in another order than predict() does.
    assert [fault.checks for fault in error.faults] == [("same path",), ("decoding and classes",)]
    assert "is not its object's (label +1)" in str(error)
    assert "the head's logits differ" in str(error)


# -- what each check finds -----------------------------------------------------------------------


def of_head(name: str, change: Any) -> type:
    """An adapter whose head does one thing otherwise.

    Args:
        name: of the head's function.
        change: is given what the right function gives, the head, and the function's arguments.
    """
    right = getattr(TorchvisionRetinaNet.head, name)

    def changed(self, *arguments):
        return change(right(self, *arguments), self, *arguments)

    head = type("ChangedHead", (TorchvisionRetinaNet.head,), {name: changed})
    return type("Changed", (TorchvisionRetinaNet,), {"head": head})


def of_adapter(name: str, change: Any) -> type:
    """An adapter that does one thing itself otherwise; arguments as for `of_head`."""
    right = getattr(TorchvisionRetinaNet, name)

    def changed(self, *arguments):
        return change(right(self, *arguments), self, *arguments)

    return type("Changed", (TorchvisionRetinaNet,), {name: changed})


def after(change: Any) -> type:
    """An adapter that is changed once it has read the detector."""

    def init(self, detector):
        TorchvisionRetinaNet.__init__(self, detector)
        change(self)

    return type("Changed", (TorchvisionRetinaNet,), {"__init__": init})


def with_tower(change: Any) -> type:
    """Changes the classification branch's only tower, or makes several of it."""

    def changed(adapter):
        (head,) = adapter.heads
        first, *others = head.branches
        made = change(first.towers[0])
        head.branches = (replace(first, towers=made if isinstance(made, tuple) else (made,)), *others)

    return after(changed)


def with_head(**values: Any) -> type:
    return after(lambda adapter: vars(adapter.heads[0]).update(values))


def shaken(tower: Tower) -> Tower:
    """A tower with dropout that knows no mode."""

    class Noise(nn.Module):
        def forward(self, features):
            return features + torch.rand_like(features)

    first, *others = tower.blocks
    second = replace(others[0], layers=(*others[0].layers, Noise()))
    return replace(tower, blocks=(first, second, *others[1:]))


def of_teacher(value: Any, changed: Any, part: Any) -> Any:
    return value if part.detector.training else changed


def in_place(predictions: Predictions, head: Any, *_: Any) -> Predictions:
    if not head.detector.training:
        with torch.no_grad():
            head.detector.head.classification_head.cls_logits.bias.add_(1e-3)
    return predictions


def trained_for_a_moment(maps: Any, adapter: Any, pixels: Any) -> Any:
    if not adapter.detector.training:
        adapter.detector.train().backbone(pixels)
        adapter.detector.eval()
    return maps


def learning(maps: Any, adapter: Any, pixels: Any) -> Any:
    adapter.detector.requires_grad_(True)
    return maps


def copied(adapter: Any) -> None:
    adapter.heads[0].branches = copy.deepcopy(adapter.heads[0].branches)


class TailOfTheStudent(TorchvisionRetinaNet):
    """Gives the teacher's head the blocks of the student that is made after it."""

    teachers: list[Any] = []  # noqa: RUF012

    def __init__(self, detector):
        super().__init__(detector)
        if not detector.training:
            self.teachers.append(self)
        while detector.training and self.teachers:
            self.teachers.pop().heads[0].branches = self.heads[0].branches


def with_assignment(**changed: Any) -> Any:
    return lambda result, *_: (result[0], replace(result[1], **{k: f(result[1]) for k, f in changed.items()}))


def targets_out_of_nothing(batch: Any, adapter: Any, images: Any, targets: Any) -> Any:
    return batch if targets is not None else replace(batch, targets=tiny_batch(len(images))[1])


def refuses_one_image(result: Any, head: Any, predictions: Predictions, *_: Any) -> Any:
    if len(predictions.logits) == 1:
        raise IndexError("no second image")
    return result


def identity(boxes: Any, head: Any, predictions: Predictions, anchors: Any) -> Any:
    return predictions.regression * 8 + 20


STRUCTURE = [
    (with_head(num_classes=5), "num_classes says 5, the predictions have 4"),
    (with_head(bins=2), "bins says 2, the predictions have 1"),
    (with_head(background=0), "background says 0, the predictions have None"),
    (
        after(lambda a: setattr(a, "strides", (16.0, 32.0, 64.0))),
        r"strides says \[16.0, 32.0, 64.0\], the maps are \[\(8, 8\), \(4, 4\)",
    ),
    (
        after(lambda a: setattr(a, "strides", (8.0, 16.0))),
        r"strides says \[8.0, 16.0\], .*\(2, 2\)\] of \(64, 64\) pixels",
    ),
    (
        after(lambda a: setattr(a, "widths", (32, 40, 32))),
        r"widths says \[32, 40, 32\], the maps have \[32, 32, 32\]",
    ),
    (
        after(lambda a: setattr(a.heads[0], "branches", a.heads[0].branches[:1] * 2)),
        r"predict\(\) of _RetinaNetHead raised KeyError: 'regression'",
    ),
    (
        with_tower(lambda t: (t, t)),
        "the classification branch has towers for 2 levels, but there is a level 3",
    ),
    (
        with_tower(lambda t: replace(t, width_in=8)),
        r"the classification towers take \[8, 8, 8\] channels, the maps have \[32, 32, 32\]",
    ),
    (
        of_head("predict", lambda p, *_: Predictions(p.logits[:, 1:], p.regression[:, 1:], None)),
        r"\[192, 48, 12\] anchors, boxes \[252\], \[64, 16, 4\] locations and 249 rows",
    ),
    (
        of_head("anchors", lambda a, *_: a.of_levels([0, 1])),
        r"\[192, 48\] anchors, boxes \[240\], .*252 rows",
    ),
]
HEADS = [
    ("same path", of_adapter("maps", lambda m, a, _: of_teacher(m, [2 * f for f in m], a)),
     "teacher: RetinaNet's own forward computes something else .* They part at head"),
    ("same path", of_head("predict", lambda p, h, *_: of_teacher(p, replace(p, logits=2 * p.logits), h)),
     "the head's logits differ: by up to"),
    ("taps and tail", with_tower(shaken), "the blocks behind the split make another tower"),
    ("taps and tail", of_head("predict", lambda p, *_: replace(p, logits=p.logits + torch.rand(()))),
     r"predict\(\) gives other predictions for the same tower output"),
    ("same path", TailOfTheStudent, "logits differ: .* They part at head.classification_head.cls_logits"),
    ("gradients through the tail", of_head("decode", lambda b, *_: b.detach()),
     "kd_reg has no gradient in the student(.|\n)*no gradient at regression features of"),
    ("gradients through the tail",
     of_head("predict", lambda p, h, level, _: p if level != 1 or h.detector.training else p.detach()),
     r"kd_reg has no gradient at regression features of \['level 1'\]"),
    ("rows permuted", of_head("decode", identity), 'rows is "grid", but permuted predictions decode to'),
]  # fmt: skip
TRAINING = [
    ("student losses",
     of_head("losses", lambda r, *_: ({n: 2 * loss for n, loss in r[0].items()}, r[1])),
     r"'bbox_regression': '1.4.* through the adapter and \{.*'bbox_regression': '0.7.* alone"),
    ("student losses", of_head("losses", lambda r, *_: ({"cls": r[0]["classification"]}, r[1])),
     r"own losses are \{'cls': '.*'\} through the adapter and \{'classification': .* alone"),
    ("label assignment", of_head("losses", with_assignment(positive=lambda a: a.positive[:, 1:].float())),
     r"assignment.positive is torch.float32 \(2, 251\), not \(2, 252\)"),
    ("label assignment", of_head("losses", with_assignment(label_weights=lambda a: a.label_weights[:, 1:])),
     r"assignment.label_weights is torch.float32 \(2, 251\)"),
    ("label assignment", of_head("losses", with_assignment(normalizer=lambda a: -a.normalizer)),
     "assignment.normalizer is -"),
    ("label assignment", of_head("assign", lambda a, *_: replace(a, positive=~a.positive)),
     r"assignment of losses\(\) and of assign\(\) differ: .*\[\(20, 20.0\), \(484, 20.0\)\]"),
    ("student losses", of_adapter("maps", lambda m, *_: [f.detach() for f in m]),
     "gradients of the student's own losses are not plain training's at backbone"),
    ("student losses", of_adapter("maps", lambda m, *_: [(f + f.detach()) / 2 for f in m]),
     "gradients of the student's own losses are not plain training's at backbone"),
    ("student losses", after(copied),
     "gradients .* are not plain training's at head.classification_head.conv.0.0.weight"),
    ("teacher untouched", of_head("predict", in_place),
     "has changed in 1 places: head.classification_head.cls_logits.bias"),
    ("teacher untouched", of_adapter("maps", trained_for_a_moment),
     "the teacher has changed .*: backbone.stem.0.1.running_mean"),
    ("teacher untouched", of_adapter("maps", learning),
     "the teacher has changed .*: requires_grad of backbone"),
]  # fmt: skip
BATCHES = [
    ("decoding and classes", of_head("losses", with_assignment(positive=lambda a: a.positive & False)),
     "no anchor is responsible for any object"),
    ("detections", of_adapter("detect", lambda found, adapter, *_: adapter.detector.train() and found),
     r"by detect\(\) the student has changed .*: mode of"),
    ("unlabelled images", of_adapter("prepare", targets_out_of_nothing),
     r"own losses are \{.*'bbox_regression': .*\} through the adapter and \{\} alone"),
    ("one image", of_head("losses", refuses_one_image), "raised IndexError: no second image"),
    ("no objects", of_head("losses", with_assignment(normalizer=lambda a: 0 * a.normalizer)),
     "normalizer must be above 0, got 0.0"),
    ("odd image size", of_head("anchors", lambda a, *_: a.no_such_thing), "raised AttributeError: 'Anchors'"),
    ("autocast", of_head("decode", lambda b, *_: b.bfloat16().double()),
     "kd_reg is torch.float64, the predictions' .* {torch.float32}"),
    ("float64", of_head("decode", lambda b, *_: b.float()),
     "kd_reg is torch.float32, the predictions' .* {torch.float64}"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "adapter", "told"),
    [*(("structure", *case) for case in STRUCTURE), *HEADS, *TRAINING, *BATCHES],
)
def test_each_check_finds_what_it_is_there_for(check, adapter, told):
    error = found(adapter, skip=only(check))
    assert {name for fault in error.faults for name in fault.checks} == {check}
    with pytest.raises(AdapterError, match=told):
        raise error


def test_what_is_no_adapter_ends_it_there():
    class Half(TorchvisionRetinaNet):
        head = type("HalfAHead", (TorchvisionRetinaNet.head,), {"__init__": lambda self, detector: None})

    error = found(lambda detector: detector)
    assert "must make a crosskd.adapters.Adapter of a detector, got a RetinaNet" in str(error)
    assert set(error.report.skipped) == CHECKS.keys() - {"construction"}
    assert "'HalfAHead' object has no attribute" in str(found(Half))
    error = found(TorchvisionFCOS)
    assert "raised AttributeError" in str(error)
    assert set(error.report.skipped) == CHECKS.keys() - {"construction"}


def test_one_fault_that_several_checks_find_is_named_once():
    def divides(*_):
        raise ZeroDivisionError("so it goes")

    error = found(of_head("losses", divides), skip=only("autocast", "float64", "one image"))
    (fault,) = error.faults
    assert fault.checks == ("one image", "autocast", "float64")
    assert fault.found == "changed() of ChangedHead raised ZeroDivisionError: so it goes"
    assert isinstance(error.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("drifts", [False, True])
def test_losses_that_differ_on_another_device(monkeypatch, drifts):
    """The CPU stands in for the other device, and a head that changes from call to call for a fault."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Bench, "converted", lambda bench, **to: bench)
    calls = []

    def drifting(result, *_):
        calls.append(result)
        return {name: loss * len(calls) for name, loss in result[0].items()}, result[1]

    if not drifts:
        assert green(skip=only("other device")).passed == ("other device",)
        return
    error = found(of_head("losses", drifting), skip=only("other device"))
    with pytest.raises(AdapterError, match="classification is .* on cpu and .* on cuda"):
        raise error


# -- sets of queries -----------------------------------------------------------------------------


class SetDetector(nn.Module):
    """Predicts a set of six boxes, each from a learned query that attends to the map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, width, 3, stride=16, padding=1)
        self.embeddings = nn.Parameter(torch.randn(6, width))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.tower = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.logits, self.sides = nn.Linear(width, 4), nn.Linear(width, 4)

    def queries(self, maps):
        tokens = maps[0].flatten(2).mT
        queries = self.embeddings.expand(len(tokens), -1, -1)
        return queries + self.attention(queries, tokens, tokens)[0]

    def forward(self, images):
        features = self.tower(self.queries([self.backbone(torch.stack(list(images)))]))
        return self.logits(features), self.sides(features)


def decode_set(detector, regression, anchors):
    middle, size = (64 * regression.sigmoid()).chunk(2, dim=-1)
    return torch.cat([middle - size / 2, middle + size / 2], dim=-1)


def losses_of_set(detector, predictions, anchors, targets):
    """The first rows answer for the objects, one each."""
    positive = torch.zeros(predictions.logits.shape[:2], dtype=torch.bool)
    wanted, distances = torch.zeros_like(predictions.logits), [predictions.regression.sum() * 0]
    boxes = decode_set(detector, predictions.regression, anchors)
    for image, target in enumerate(targets):
        for row, (box, label) in enumerate(zip(target["boxes"], target["labels"], strict=True)):
            positive[image, row], wanted[image, row, label] = True, 1
            distances.append((boxes[image, row] - box).abs().mean() / 64)
    classes = F.binary_cross_entropy_with_logits(predictions.logits, wanted)
    return {"classes": classes, "boxes": torch.stack(distances).sum()}, positive


SET = generic(
    features="backbone",
    towers={"both": "tower"},
    predictors={"both": {"logits": "logits", "regression": "sides"}},
    queries=lambda detector, maps: detector.queries(maps),
    losses=losses_of_set,
    decode=decode_set,
    strides=(16,),
    widths=lambda detector: (detector.backbone.out_channels,),
)


def test_a_set_of_queries_skips_what_compares_row_by_row():
    pair = {"teacher": SetDetector(16), "student": SetDetector(8)}
    skipped = "taps and tail", "gradients through the tail", "rows permuted"
    report = assert_green(SET, *tiny_batch(), **pair, method=PKD(), skipped=skipped)
    assert "set of queries" in report.skipped["taps and tail"]
    assert report.skipped["rows permuted"] == "no head decodes boxes of a grid"
    assert report.skipped["gradients through the tail"] == "PKD taps no features"
    assert report.adapter == "generic"


def test_a_set_of_queries_that_is_declared_a_grid_is_red():
    def as_grid(detector):
        adapter = SET(detector)
        adapter.heads[0].rows = "grid"
        return adapter

    pair = {"teacher": SetDetector(16), "student": SetDetector(8)}
    with pytest.raises(AdapterError, match='rows is "grid", but permuted predictions decode to') as error:
        check_adapter(as_grid, *tiny_batch(), **pair, method=PKD(), skip=only("rows permuted"))
    (fault,) = error.value.faults
    assert fault.checks == ("rows permuted",)
    assert '"queries"' in fault.expected


# -- what a person gives -------------------------------------------------------------------------


def test_the_detectors_the_batch_and_the_random_numbers_stay_as_they_are():
    teacher, student = tiny_retinanet(batch_norm=True), tiny_retinanet(batch_norm=True, seed=1).eval()
    batch = tiny_batch()
    before = [digest(thing) for thing in (teacher, student, batch)]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    skip = only("student losses", "teacher untouched")
    check_adapter(TorchvisionRetinaNet, *batch, teacher=teacher, student=student, skip=skip)
    assert torch.equal(torch.rand(3), expected)
    assert [digest(thing) for thing in (teacher, student, batch)] == before
    assert teacher.training
    assert not student.training


def digest(thing: Any) -> str:
    """A hash of all tensors in a module or in a batch."""
    tensors = (
        [*thing.state_dict().values(), *(p.grad for p in thing.parameters() if p.grad is not None)]
        if isinstance(thing, nn.Module)
        else [*thing[0], *(tensor for target in thing[1] for tensor in target.values())]
    )
    return hashlib.sha256(b"".join(t.numpy(force=True).tobytes() for t in tensors)).hexdigest()


def green(**options: Any) -> Any:
    detectors = {"teacher": tiny_retinanet(), "student": tiny_retinanet(seed=1)}
    batch = options.pop("batch", tiny_batch())
    return check_adapter(TorchvisionRetinaNet, *batch, **{**detectors, **options})


def test_pairs_that_differ_take_the_distillers_options():
    report = green(
        teacher=tiny_retinanet(6),
        class_map=[5, 0, 1, 3],
        method=CrossKD(position=1),
        skip=only("structure", "student losses"),
    )
    assert report.passed == ("structure", "student losses")


@pytest.mark.parametrize("method", [PredictionMimicking, PKD])
def test_methods_without_taps_leave_the_tail_alone(method):
    report = green(method=method(), skip=only("gradients through the tail", "student losses"))
    assert report.skipped["gradients through the tail"] == f"{method.__name__} taps no features"
    assert report.passed == ("student losses",)


def test_batches_may_be_made_by_functions():
    calls = []

    def varied(images, targets):
        calls.append(len(images))
        return images[:1], targets[:1]

    green(
        one_image=varied,
        odd_size=lambda images, targets: (varied(images, targets)[0], None),
        without_objects=varied,
        skip=only("one image", "odd image size", "no objects"),
    )
    assert calls == [2, 2, 2]


class Nested(TorchvisionRetinaNet):
    """Takes targets in a form of its own."""

    def prepare(self, images, targets):
        return super().prepare(images, targets if targets is None else targets["all"])

    def own_losses(self, images, targets):
        return super().own_losses(images, targets["all"])


def test_targets_of_another_form_need_functions():
    images, targets = tiny_batch()
    detectors = {"teacher": tiny_retinanet(), "student": tiny_retinanet(seed=1)}
    names = ("one image", "no objects", "odd image size", "student losses")
    report = check_adapter(Nested, torch.stack(images), {"all": targets}, **detectors, skip=only(*names))
    assert report.passed == ("student losses", "odd image size")  # the latter without targets
    assert "pass one_image=" in report.skipped["one image"]
    assert "pass without_objects=" in report.skipped["no objects"]


def test_students_of_another_form_need_own_losses():
    skip = only("student losses")
    listed = of_adapter("own_losses", lambda *_: [torch.ones(())])
    assert r"own_losses() gives a list and not a dict of scalar tensors" in str(found(listed, skip=skip))

    def fails(*_):
        raise KeyError(0)

    assert "can't train on it (KeyError: 0): hand in a batch that it can train on" in str(
        found(of_adapter("own_losses", fails), skip=skip)
    )


def test_a_student_that_gives_no_losses_is_compared_layer_by_layer():
    silent = of_adapter("own_losses", lambda *_: None)
    assert green_of(silent, "student losses").passed == ("student losses",)

    class Doubled(silent):
        def maps(self, pixels):
            return [2 * level for level in super().maps(pixels)]

    error = found(Doubled, skip=only("student losses"))
    assert "its layers give other numbers. They part at head" in str(error)


def green_of(adapter: Any, *checks: str) -> Any:
    pair = {"teacher": tiny_retinanet(), "student": tiny_retinanet(seed=1)}
    return check_adapter(adapter, *tiny_batch(), **pair, skip=only(*checks))


def test_batches_without_objects_say_nothing_of_boxes():
    unknown = of_adapter("prepare", lambda batch, *_: replace(batch, objects=None))
    report = green_of(unknown, "decoding and classes")
    assert report.skipped["decoding and classes"] == "the adapter gives no objects"
    images, targets = tiny_batch()
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in targets]
    report = green(batch=(images, empty), skip=only("decoding and classes"))
    assert report.skipped["decoding and classes"] == "the targets hold no objects"


def test_heads_without_an_assignment_of_their_own():
    def refuses(*_):
        raise ValueError("only its losses know")

    report = green_of(of_head("assign", refuses), "label assignment")
    assert report.skipped["label assignment"] == "assign() refuses: only its losses know"


def test_what_was_found_before_a_check_can_not_go_on_is_kept():
    def refuses(*_):
        raise ValueError("only its losses know")

    adapter = of_head("assign", refuses)
    right, shorten = adapter.head.losses, with_assignment(positive=lambda a: a.positive[:, 1:])
    adapter.head.losses = lambda *arguments: shorten(right(*arguments))
    error = found(adapter, skip=only("label assignment"))
    assert "assignment.positive is torch.bool (2, 251), not (2, 252)" in str(error)
    assert error.report.skipped["label assignment"] == "assign() refuses: only its losses know"
    assert not error.report.passed


def test_names_of_no_check():
    with pytest.raises(ValueError, match=r"skip= names no check: \['colour'\]. The checks are construction"):
        green(skip={"colour": "it is late"})


def test_reports_can_be_read():
    report = green(skip=only("structure", "one image"))
    lines = str(report).splitlines()
    assert lines[0] == f"TorchvisionRetinaNet: 2 checks passed, {len(CHECKS) - 2} skipped"
    assert lines[1:3] == ["  passed   structure", "  passed   one image"]
    assert "  skipped  float64: not what this test is about" in lines
