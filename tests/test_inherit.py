"""Neck and head of the teacher in the student: what is taken, what is left, and what is said of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import crosskd
from tests.helpers.tiny import tiny_fcos, tiny_retinanet, tiny_ssd


def state(detector: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in detector.state_dict().items()}


class WithPyramid(nn.Module):
    """Named as torchvision's: the neck is in the backbone."""

    def __init__(self, width: int = 8, classes: int = 3, inner: int = 4) -> None:
        super().__init__()
        body, fpn = nn.Conv2d(3, inner, 3), nn.Sequential(nn.Conv2d(inner, width, 1), nn.BatchNorm2d(width))
        self.backbone = nn.ModuleDict({"body": body, "fpn": fpn})
        self.head = nn.ModuleDict(
            {"tower": nn.Conv2d(width, width, 3), "logits": nn.Conv2d(width, classes, 1)}
        )


def test_the_head_is_the_teachers_and_the_backbone_is_the_students_own():
    student, teacher = tiny_retinanet(seed=1), tiny_retinanet(seed=2)
    before, theirs = state(student), state(teacher)
    taken = crosskd.inherit(student, teacher)
    for name, value in student.state_dict().items():
        expected = before if name.startswith("backbone.") else theirs
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    assert taken.taken == tuple(name for name in before if name.startswith("head."))
    assert taken.skipped == tuple(name for name in before if name.startswith("backbone."))
    assert not taken.absent
    assert not taken.other_shape


def test_the_teacher_is_not_changed_and_nothing_is_shared():
    student, teacher = tiny_retinanet(seed=1), tiny_retinanet(seed=2)
    before = state(teacher)
    crosskd.inherit(student, teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in student.parameters())


def test_the_pyramid_within_torchvisions_backbone_is_the_neck_and_its_statistics_are_taken():
    student, teacher = WithPyramid(), WithPyramid()
    with torch.no_grad():
        teacher.backbone["fpn"][1].running_mean.fill_(3.0)
        teacher.backbone["fpn"][1].num_batches_tracked.fill_(7)
    taken = crosskd.inherit(student, teacher)
    assert student.backbone["fpn"][1].running_mean.eq(3.0).all()
    assert int(student.backbone["fpn"][1].num_batches_tracked) == 7
    assert taken.skipped == ("backbone.body.weight", "backbone.body.bias")


def test_what_differs_in_shape_or_is_not_there_is_left_and_named():
    student, teacher = WithPyramid(inner=4, classes=3), WithPyramid(inner=6, classes=5)
    student.head["quality"] = nn.Conv2d(8, 1, 1)
    before = state(student)
    taken = crosskd.inherit(student, teacher)
    assert taken.other_shape == {
        "backbone.fpn.0.weight": ((8, 6, 1, 1), (8, 4, 1, 1)),
        "head.logits.weight": ((5, 8, 1, 1), (3, 8, 1, 1)),
        "head.logits.bias": ((5,), (3,)),
    }
    assert taken.absent == ("head.quality.weight", "head.quality.bias")
    for name in (*taken.other_shape, *taken.absent, *taken.skipped):
        assert torch.equal(student.state_dict()[name], before[name])
    assert str(taken).splitlines() == [
        "8 of the student's 15 weights and statistics are the teacher's now",
        "  taken: backbone.fpn (6), head.tower (2)",
        "  left, of another shape: backbone.fpn.0.weight (8, 6, 1, 1) (teacher), (8, 4, 1, 1) (student), "
        "head.logits.weight (5, 8, 1, 1) (teacher), (3, 8, 1, 1) (student), "
        "head.logits.bias (5,) (teacher), (3,) (student)",
        "  left, not in the teacher: head.quality (2)",
        "  left, not asked for: backbone.body (2)",
    ]


def test_prefixes_and_skip_say_what_to_take_by_whole_names():
    student, teacher = WithPyramid(), WithPyramid()
    student.header, teacher.header = nn.Linear(1, 1), nn.Linear(1, 1)
    only = crosskd.inherit(student, teacher, prefixes=["head"])
    assert {name.split(".")[0] for name in only.taken} == {"head"}
    without = crosskd.inherit(student, teacher, prefixes=["head"], skip=["head.logits."])
    assert {name.split(".")[1] for name in without.taken} == {"tower"}
    everything = crosskd.inherit(student, teacher, skip=[])
    assert everything.taken == tuple(student.state_dict())
    body = crosskd.inherit(student, teacher, prefixes=["backbone.body"])
    assert body.taken == ("backbone.body.weight", "backbone.body.bias")


def test_weights_of_another_type_are_cast():
    student, teacher = WithPyramid(), WithPyramid().double()
    crosskd.inherit(student, teacher)
    weight = student.head["tower"].weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, teacher.head["tower"].weight.float())


def test_a_compiled_detector_is_taken_out_of_its_wrapper():
    student, teacher = WithPyramid(), WithPyramid()
    with pytest.warns(UserWarning, match="student was compiled as a whole"):
        taken = crosskd.inherit(torch.compile(student), teacher)
    assert taken.taken[-1] == "head.logits.bias"
    assert torch.equal(student.head["logits"].bias, teacher.head["logits"].bias)


def test_a_student_that_has_inherited_is_distilled():
    student, teacher = tiny_fcos(seed=1), tiny_fcos(seed=2, hidden=16)
    crosskd.inherit(student, teacher)
    distiller = crosskd.Distiller(teacher, student, crosskd.CrossKD())
    assert distiller.student.head.state_dict().keys() == teacher.head.state_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prefixes": "head"}, TypeError, r"pass prefixes=\['head'\]"),
        (
            {"prefixes": ["neck"]},
            ValueError,
            "prefixes: the student has nothing under 'neck'; its",
        ),
        ({"skip": ["back"]}, ValueError, "skip: the student has nothing under 'back'"),
        (
            {"prefixes": ["head.logits"]},
            ValueError,
            r"no name and shape agree. The student has head.logits.weight, ",
        ),
    ],
)
def test_what_can_not_be_taken_is_an_error(arguments, error, message):
    with pytest.raises(error, match=message):
        crosskd.inherit(WithPyramid(), WithPyramid(classes=5), **arguments)


def test_another_type_of_detector_has_nothing_to_inherit():
    with pytest.raises(ValueError, match=r"nothing to inherit: .* outside of backbone\. The student"):
        crosskd.inherit(tiny_ssd(), tiny_fcos())
    numbered = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match=r"no module named backbone, only 0 \(2\), 1 \(2\): say by skip="):
        crosskd.inherit(numbered, copy.deepcopy(numbered))
    with pytest.raises(ValueError, match="are one object"):
        crosskd.inherit(numbered, numbered)


def test_a_teacher_with_folded_batch_norms_is_refused():
    student, teacher = WithPyramid(), WithPyramid()
    fpn = crosskd.fold_batch_norm(teacher.backbone["fpn"], torch.rand(1, 4, 5, 5))
    folded = copy.deepcopy(teacher)
    folded.backbone["fpn"] = fpn
    before = state(student)
    with pytest.raises(ValueError, match=r"an Identity for the student's batch norm backbone\.fpn\.1"):
        crosskd.inherit(student, folded)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    # What has no norms fits all the same.
    assert len(crosskd.inherit(student, folded, prefixes=["head"]).taken) == 4
    assert "backbone.fpn.1.running_mean" in crosskd.inherit(student, teacher).taken


@pytest.mark.ultralytics
def test_of_a_yolo_the_yaml_file_says_which_layers_are_the_backbone():
    from tests.helpers.yolo import model_of

    student, teacher = (model_of("yolo11n", seed=seed) for seed in (1, 2))
    backbone = [f"model.{number}" for number in range(len(student.yaml["backbone"]))]
    taken = crosskd.inherit(student, teacher, skip=backbone)
    assert {name.split(".")[1] for name in taken.skipped} == {path.split(".")[1] for path in backbone}
    head = student.model[-1].state_dict()
    assert all(torch.equal(value, head[name]) for name, value in teacher.model[-1].state_dict().items())
