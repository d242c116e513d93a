"""The conformance kit: green for every adapter of ours, red for broken ones, in words that name the fault."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from crosskd.head import Block, Branch, Tower
from crosskd.testing import AdapterError, check_adapter
from torch import nn

from crosskd import CrossKD, PredictionMimicking
from crosskd._conformance import CHECKS
from crosskd.adapters import GenericAdapter, Inputs, TorchvisionFCOSAdapter, TorchvisionRetinaNetAdapter
from crosskd.predictions import Predictions
from tests.conformance import assert_green, only
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet
from tests.test_docs import ROOT, python_blocks

TINY = {
    "retinanet": (TorchvisionRetinaNetAdapter, tiny_retinanet),
    "fcos": (TorchvisionFCOSAdapter, tiny_fcos),
}
families = pytest.mark.parametrize("family", TINY)


def found(adapter: Any, batch: Any = None, *, build=tiny_retinanet, student=None, **options) -> AdapterError:
    """The error that an adapter gets."""
    images, targets = batch or tiny_batch()
    teacher = build(batch_norm=True)
    with pytest.raises(AdapterError) as error:
        check_adapter(
            adapter, images, targets, teacher=teacher, student=student or build(seed=1), steps=60, **options
        )
    return error.value


# -- green ---------------------------------------------------------------------------------------


@families
def test_torchvisions_adapters_are_green(family):
    adapter, build = TINY[family]
    teacher, student = build(width=64, batch_norm=True), build(batch_norm=True, seed=1)
    assert_green(adapter(), *tiny_batch(), teacher=teacher, student=student)


@pytest.fixture(scope="module")
def grid() -> dict[str, Any]:
    """The detector and the adapter that the documentation shows."""
    page = ROOT / "docs/adapters.md"
    shown: dict[str, Any] = {"__name__": page.name}
    for line, block in python_blocks(page)[:3]:
        exec(compile("\n" * line + block, str(page), "exec"), shown)
    return shown


def generic_grid(shown: dict[str, Any]) -> GenericAdapter:
    def losses(student, predictions, points, targets):
        return student.losses(predictions.logits, sides(student, predictions.regression), points, targets)

    def sides(detector, regression):
        """In pixels: the predictors' outputs are in strides, before the softplus, level after level."""
        fine = regression.shape[1] * 4 // 5  # the coarse level has a quarter of the fine one's points
        strides = torch.cat([torch.full((fine,), 8.0), torch.full((regression.shape[1] - fine,), 16.0)])
        return strides.to(regression)[:, None] * F.softplus(regression)

    return GenericAdapter(
        features=lambda detector, pixels: detector.levels(pixels),
        towers={"classification": "cls_tower", "box": "box_tower"},
        predictors={"classification": {"logits": "cls_out"}, "box": {"regression": "box_out"}},
        losses=losses,
        decode=lambda detector, regression, points: detector.boxes(sides(detector, regression), points),
        locations=lambda detector, inputs, levels: detector.points(levels),
        strides=lambda detector: detector.strides,
        detector=shown["GridDetector"],
    )


@pytest.mark.parametrize("generic", [False, True], ids=["documented", "generic"])
def test_the_documented_detector_is_green_and_told_what_it_can_not_do_itself(grid, generic):
    adapter = generic_grid(grid) if generic else grid["GridAdapter"]()
    images, targets = tiny_batch(num_classes=3)
    detectors = {"teacher": grid["GridDetector"](3, width=48), "student": grid["GridDetector"](3)}
    # Odd sizes have another share of points on the coarse level than this adapter counts with.
    ours = {"odd image size": "the adapter wants multiples of 16"} if generic else {}
    theirs = ("no objects", "autocast")
    report = assert_green(
        adapter, torch.stack(images), targets, skipped=(*theirs, *ours), skip=ours, **detectors
    )
    for name in theirs:
        assert report.skipped[name].startswith("the student alone can't train on it (")
    assert {name: report.skipped[name] for name in ours} == ours


@pytest.mark.mmdet
@pytest.mark.parametrize("family", ["gfl", "atss", "retinanet", "fcos", "rtmdet"])
def test_mmdets_adapter_is_green(family):
    from crosskd.adapters.mmdet import MMDetAdapter
    from tests.helpers.mmdet_heads import batch_of, detector_of, head_settings

    def losses(student, images, samples):
        by_level = student.loss(images, samples)
        return {k: sum(v) if isinstance(v, list | tuple) else v for k, v in by_level.items()}

    def without_objects(images, samples):
        for sample in samples:
            sample.gt_instances = sample.gt_instances[:0]
        return images, samples

    teacher, student = (detector_of(head_settings(family), seed=seed) for seed in (0, 1))
    assert_green(
        MMDetAdapter.for_detectors(teacher, student),
        *batch_of(),
        teacher=teacher,
        student=student,
        own_losses=losses,
        without_objects=without_objects,
        # mmdet's assigner of soft labels mixes float32 and float64.
        skipped=("float64",) if family == "rtmdet" else (),
    )


# -- six broken adapters -------------------------------------------------------------------------


class ActivatesItsInput(nn.Module):
    """A convolution that activates what it is given in place, which its layers don't tell."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, features):
        return self.convolution(F.relu_(features))


class OverwritesTaps(TorchvisionRetinaNetAdapter):
    """Cuts towers before the activations, which then overwrite the taps: every number is still right."""

    def branches(self, detector):
        branches = []
        for branch in super().branches(detector):
            first, *others = (block.layers[0] for block in branch.towers[0].blocks)
            blocks = Block((first,)), *(Block((ActivatesItsInput(other),)) for other in others)
            tower = Tower(branch.towers[0].name, blocks, branch.towers[0].width_in)
            branches.append(replace(branch, towers=(tower,)))
        return tuple(branches)

    def predict(self, detector, level, towers):
        return super().predict(detector, level, {name: F.relu_(output) for name, output in towers.items()})


class DetachesTheTail(TorchvisionRetinaNetAdapter):
    """Spares the teacher's predictors a graph."""

    def predict(self, detector, level, towers):
        with torch.set_grad_enabled(detector.training and torch.is_grad_enabled()):
            return super().predict(detector, level, towers)


class CoarsestFirst(TorchvisionRetinaNetAdapter):
    def features(self, detector, pixels):
        return super().features(detector, pixels)[::-1]


class WakesTheTeacher(TorchvisionRetinaNetAdapter):
    def features(self, detector, pixels):
        return super().features(detector.train(), pixels)


def decodes_mixed_up(base: type) -> type:
    class DecodesMixedUp(base):
        """Takes y before x."""

        def decode(self, detector, predictions, locations):
            turned = replace(predictions, regression=predictions.regression[..., [1, 0, 3, 2]])
            return super().decode(detector, turned, locations)

    return DecodesMixedUp


def shifts_classes(base: type) -> type:
    class ShiftsClasses(base):
        """Hands the logits of each class out as the next one's, and knows it itself."""

        def predict(self, detector, level, towers):
            predictions = super().predict(detector, level, towers)
            return replace(predictions, logits=predictions.logits.roll(1, dims=-1))

        def losses(self, student, predictions, locations, inputs):
            turned = replace(predictions, logits=predictions.logits.roll(-1, dims=-1))
            return super().losses(student, turned, locations, inputs)

    return ShiftsClasses


@pytest.mark.parametrize(
    ("adapter", "check", "told"),
    [
        (OverwritesTaps, "taps and tail", "position 1 were overwritten in place by a later layer"),
        (
            DetachesTheTail,
            "gradients through the tail",
            "kd_cls has no gradient at the student's features of the classification branch at any level",
        ),
        (CoarsestFirst, "structure", "(2, 2), (4, 4), (8, 8)], as (height, width)\n    expected: the finest"),
        (WakesTheTeacher, "teacher untouched", "the teacher in train mode: features() left it so"),
    ],
)
def test_broken_adapters_are_red_and_told_why(adapter, check, told):
    error = found(adapter())
    assert check in {name for fault in error.faults for name in fault.checks}
    assert told in str(error)
    assert str(error).startswith(f"{adapter.__name__} fails ")
    assert all(fault.expected and fault.cause for fault in error.faults)


@families
@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (decodes_mixed_up, "decoding: where the student's own losses are smallest, the decoded boxes of"),
        (shifts_classes, "not that of the target's label (mostly of label +1)"),
    ],
)
def test_boxes_and_classes_alone_are_blamed_where_they_are_mixed_up(family, broken, told):
    adapter, build = TINY[family]
    error = found(broken(adapter)(), build=build)
    assert [fault.checks for fault in error.faults] == [("decoding and classes",)]
    assert told in str(error)


# -- what each check finds -----------------------------------------------------------------------


class Changed(TorchvisionRetinaNetAdapter):
    """Does one thing otherwise: a function that is given what the right one gives, and its arguments."""

    def __init__(self, name: str, change: Any) -> None:
        right = getattr(super(), name)
        setattr(self, name, lambda *arguments: change(right(*arguments), *arguments))


def with_tower(change: Any) -> Any:
    """Changes the classification branch's only tower, or makes several of it."""

    def changed(branches: tuple[Branch, ...], detector: nn.Module) -> tuple[Branch, ...]:
        made = change(branches[0].towers[0], detector)
        towers = made if isinstance(made, tuple) else (made,)
        return replace(branches[0], towers=towers), *branches[1:]

    return changed


def shaken(tower: Tower, detector: nn.Module) -> Tower:
    """A tower with dropout that knows no mode."""

    class Noise(nn.Module):
        def forward(self, features):
            return features + torch.rand_like(features)

    first, *others = tower.blocks
    return replace(
        tower, blocks=(first, replace(others[0], layers=(*others[0].layers, Noise())), *others[1:])
    )


def of_teacher(value: Any, changed: Any, detector: nn.Module) -> Any:
    return value if detector.training else changed


def in_place(predictions: Predictions, detector: nn.Module, *_: Any) -> Predictions:
    if not detector.training:
        with torch.no_grad():
            detector.head.classification_head.cls_logits.bias.add_(1e-3)
    return predictions


def trained_for_a_moment(maps: Any, detector: nn.Module, pixels: Any) -> Any:
    if not detector.training:
        detector.train().backbone(pixels)
        detector.eval()
    return maps


def learning(maps: Any, detector: nn.Module, pixels: Any) -> Any:
    detector.requires_grad_(True)
    return maps


def of_the_student(branches: Any, detector: nn.Module, seen: list[Any] = []) -> Any:  # noqa: B006
    """The student's branches, once it was seen, whoever is asked about."""
    if detector.training:
        seen[:] = [branches]
    return (seen or [branches])[0]


def with_assignment(**changed: Any) -> Any:
    return lambda result, *_: (result[0], replace(result[1], **{k: f(result[1]) for k, f in changed.items()}))


def targets_out_of_nothing(inputs: Inputs, teacher: Any, student: Any, images: Any, targets: Any) -> Inputs:
    return inputs if targets is not None else replace(inputs, targets=tiny_batch(len(images))[1])


def refuses_one_image(result: Any, student: nn.Module, predictions: Predictions, *_: Any) -> Any:
    if len(predictions.logits) == 1:
        raise IndexError("no second image")
    return result


STRUCTURE = [
    ("num_classes", lambda n, d: n + 1, r"num_classes\(\) says 5, the logits of level 0 are of 4"),
    ("strides", lambda s, d: [2 * n for n in s], r"strides\(\) says 16 for level 0, whose map is \(8, 8\)"),
    ("strides", lambda s, d: s[:2], r"strides\(\) gives 2 levels and features\(\) 3"),
    ("branches", lambda b, d: of_teacher(b, b[::-1], d), r"the branches are \['regression', 'classif"),
    ("branches", with_tower(lambda t, d: (t, t)), "classification branch has 2 towers for 3 levels"),
    ("branches", with_tower(lambda t, d: replace(t, width_in=8)), "takes 8 channels, the map of level 0 has"),
    (
        "predict",
        lambda p, *_: Predictions(p.logits[:, 1:], p.regression[:, 1:], None),
        "level 0 has 64 locations and 191 rows",
    ),
]
HEADS = [
    ("same path for both", "features", lambda m, d, _: of_teacher(m, [2 * f for f in m], d),
     r"features\(\) gives a teacher and a student of the same weights other numbers: they differ by up to"),
    ("same path for both", "predict", lambda p, d, *_: of_teacher(p, replace(p, logits=2 * p.logits), d),
     r"predict\(\) gives a teacher and a student"),
    ("taps and tail", "branches", with_tower(shaken), "the blocks behind the split make another tower"),
    ("taps and tail", "predict", lambda p, *_: replace(p, logits=p.logits + torch.rand(())),
     r"predict\(\) gives other predictions for the same tower output"),
    ("gradients through the tail", "decode", lambda b, *_: b.detach(),
     "kd_reg has no gradient at the student's features of the regression branch at any level"),
    ("gradients through the tail", "predict",
     lambda p, d, level, _: p if level != 1 or d.training else p.detach(),
     "kd_reg has no gradient at the student's features of the regression branch at level 1"),
]  # fmt: skip
TRAINING = [
    ("student losses", "losses", lambda r, *_: ({n: 2 * loss for n, loss in r[0].items()}, r[1]),
     "bbox_regression is .* through the adapter and .* alone"),
    ("student losses", "losses", lambda r, *_: ({"cls": r[0]["classification"]}, r[1]),
     r"own losses are \['cls'\] through the adapter and \['bbox_regression', 'classification'\] alone"),
    ("student losses", "losses", with_assignment(positive=lambda a: a.positive[:, 1:].float()),
     "assignment.positive is torch.float32"),
    ("student losses", "losses", with_assignment(counted=lambda a: a.counted[:1, 1:].expand(2, -1)),
     "assignment.counted is|raised ValueError"),
    ("student losses", "losses", with_assignment(normalizer=lambda a: -a.normalizer),
     "assignment.normalizer is -"),
    ("student gradients", "features", lambda m, d, _: [f.detach() for f in m],
     "no gradient at backbone.* and .. more, which plain training reaches"),
    ("student gradients", "features", lambda m, d, _: [2 * f - f.detach() for f in m],
     "the gradients of the student's own losses differ from plain training's at backbone"),
    ("student gradients", "branches", lambda b, d: copy.deepcopy(b),
     "gradient does not reach what stands before the split: block 1 of the classification tower"),
    ("student gradients", "branches", of_the_student,
     "gradient reaches what stands behind the split: block 4 of the classification tower"),
    ("teacher untouched", "predict", in_place, "has changed: head.classification_head.cls_logits.bias"),
    ("teacher untouched", "features", trained_for_a_moment, "teacher in train mode: backbone.* ran in it"),
    ("teacher untouched", "features", learning, "the frozen teacher has parameters with a gradient"),
]  # fmt: skip
BATCHES = [
    ("decoding and classes", "losses", with_assignment(positive=lambda a: a.positive & False),
     "no anchor is responsible for any object"),
    ("detections", "detect", lambda found, student, *_: student.train() and found,
     "has changed the student: mode of"),
    ("unlabelled images", "prepare", targets_out_of_nothing, "own without targets: .'bbox_regression', 'cla"),
    ("one image", "losses", refuses_one_image, "raised IndexError: no second image"),
    ("no objects", "losses", with_assignment(normalizer=lambda a: 0 * a.normalizer), "not finite: kd_cls"),
    ("odd image size", "locations", lambda g, *_: g.no_such_thing, "raised AttributeError: 'Locations'"),
    ("autocast", "decode", lambda b, *_: b.bfloat16().double(), "kd_reg is torch.float64, of predictions"),
    ("float64", "decode", lambda b, *_: b.float(), "kd_reg is torch.float32, of predictions that are torch"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "name", "change", "told"),
    [*(("structure", *case) for case in STRUCTURE), *HEADS, *TRAINING, *BATCHES],
)
def test_each_check_finds_what_it_is_there_for(check, name, change, told):
    error = found(Changed(name, change), skip=only(check))
    assert {name for fault in error.faults for name in fault.checks} == {check}
    with pytest.raises(AdapterError, match=told):
        raise error


def test_functions_that_are_missing_end_it_there():
    class Half:
        def supports(self, detector):
            return True

    error = found(Half())
    assert "Half has no function num_classes, strides, check_pair, branches, prepare" in str(error)
    assert "Half has no recipe" in str(error)
    assert set(error.report.skipped) == CHECKS.keys() - {"functions"}
    error = found(TorchvisionFCOSAdapter(), skip=only("functions"))
    assert "supports() refuses the teacher, a RetinaNet" in str(error)


def test_one_fault_that_several_checks_find_is_told_once():
    class Divides(TorchvisionRetinaNetAdapter):
        def losses(self, *arguments):
            raise ZeroDivisionError("so it goes")

    error = found(Divides(), skip=only("autocast", "float64", "one image"))
    (fault,) = error.faults
    assert fault.checks == ("one image", "autocast", "float64")
    assert fault.found == "losses() of the adapter raised ZeroDivisionError: so it goes"
    assert isinstance(error.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("drifts", [False, True])
def test_losses_that_differ_on_another_device(monkeypatch, drifts):
    """The CPU stands in for the other device, and an adapter that changes from call to call for a fault."""
    monkeypatch.setattr("crosskd._conformance.batches._elsewhere", lambda device: torch.device("cpu"))
    calls = []

    def drifting(result, *_):
        calls.append(result)
        return {name: loss * len(calls) for name, loss in result[0].items()}, result[1]

    if not drifts:
        assert green(skip=only("other device")).passed == ("other device",)
        return
    error = found(Changed("losses", drifting), skip=only("other device"))
    with pytest.raises(AdapterError, match="classification is .* on cpu and .* on cpu"):
        raise error


# -- what a person gives -------------------------------------------------------------------------


def test_the_detectors_the_batch_and_the_random_numbers_stay_as_they_are():
    teacher, student = tiny_retinanet(batch_norm=True), tiny_retinanet(batch_norm=True, seed=1).eval()
    batch = tiny_batch()
    before = [digest(thing) for thing in (teacher, student, batch)]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    skip = only("student losses", "teacher untouched")
    check_adapter(TorchvisionRetinaNetAdapter(), *batch, teacher=teacher, student=student, skip=skip)
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
    return check_adapter(TorchvisionRetinaNetAdapter(), *batch, **{**detectors, **options})


def test_pairs_that_differ_take_the_distillers_options():
    report = green(
        teacher=tiny_retinanet(6),
        class_map=[5, 0, 1, 3],
        method=CrossKD(position=1),
        skip=only("structure", "student losses", "student gradients"),
    )
    assert report.passed == ("structure", "student losses", "student gradients")


def test_methods_without_taps_leave_the_tail_alone():
    report = green(method=PredictionMimicking(), skip=only("gradients through the tail", "student gradients"))
    assert report.skipped["gradients through the tail"] == "PredictionMimicking taps no features"
    assert report.passed == ("student gradients",)


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


def test_targets_of_another_form_need_functions():
    batch = tiny_batch()
    images, targets = torch.stack(batch[0]), {"all": batch[1]}
    own = {"own_losses": lambda student, images, targets: student(images, targets["all"])}

    class Nested(TorchvisionRetinaNetAdapter):
        def prepare(self, teacher, student, images, targets):
            inner = targets if targets is None else targets["all"]
            return super().prepare(teacher, student, images, inner)

    detectors = {"teacher": tiny_retinanet(), "student": tiny_retinanet(seed=1)}
    names = ("one image", "no objects", "odd image size", "student losses")
    report = check_adapter(Nested(), images, targets, **detectors, **own, skip=only(*names))
    assert report.passed == ("student losses", "odd image size")  # the latter without targets
    assert "targets a dict: pass one_image=" in report.skipped["one image"]
    assert "pass without_objects=" in report.skipped["no objects"]


def test_students_of_another_form_need_own_losses():
    skip = only("student losses")
    message = "the student alone gives a list, not a dict of scalar tensors: pass own_losses="
    with pytest.raises(AdapterError, match=message):
        green(own_losses=lambda *_: [torch.ones(())], skip=skip)
    message = "can't train on it .KeyError: 0.: hand in a batch that it can train on, or own_losses="
    with pytest.raises(AdapterError, match=message):
        green(own_losses=lambda *_: {}[0], skip=skip)


def test_the_truth_may_be_told():
    class Alien(TorchvisionRetinaNetAdapter):
        """Keeps its targets in a form of its own."""

        def prepare(self, *arguments):
            inputs = super().prepare(*arguments)
            return replace(inputs, targets=[list(t.values()) for t in inputs.targets])

        def losses(self, student, predictions, locations, inputs):
            return super().losses(student, predictions, locations, replace(inputs, targets=told(inputs)))

    def told(inputs):
        return [dict(zip(("boxes", "labels"), target, strict=True)) for target in inputs.targets]

    skip = only("decoding and classes")
    detectors = {"teacher": tiny_retinanet(), "student": tiny_retinanet(seed=1)}
    assert check_adapter(Alien(), *tiny_batch(), **detectors, truth=told, skip=skip).passed
    assert "hold a list, of which nothing tells the boxes and labels: pass truth=" in str(
        found(Alien(), skip=skip)
    )


def test_targets_without_objects_tell_nothing_of_boxes():
    images, targets = tiny_batch()
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in targets]
    report = green(batch=(images, empty), skip=only("decoding and classes"))
    assert report.skipped["decoding and classes"] == "the targets hold no object"


def test_names_of_no_check():
    with pytest.raises(
        ValueError, match=r"skip= names no check: \['colour'\]. The checks are functions, str"
    ):
        green(skip={"colour": "it is late"})


def test_reports_can_be_read():
    report = green(skip=only("structure", "one image"))
    lines = str(report).splitlines()
    assert lines[0] == f"TorchvisionRetinaNetAdapter: 2 checks passed, {len(CHECKS) - 2} skipped"
    assert lines[1:3] == ["  passed   structure", "  passed   one image"]
    assert "  skipped  float64: not what this test is about" in lines
