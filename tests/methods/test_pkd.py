"""PKD: feature maps imitated level by level, whatever the two heads are."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor, nn

from crosskd import PKD, CrossKD, Distiller
from crosskd.losses import pkd_loss
from crosskd.pairing import Pair, match_levels
from crosskd.step import Step
from tests.helpers.reference_files import load_parity
from tests.helpers.steps import PlainAdapter, PlainHead, make_side
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet, with_levels


def pair_of(
    teacher: tuple[float, ...] | None,
    student: tuple[float, ...] | None,
    *,
    widths: tuple[tuple[int, ...] | None, tuple[int, ...] | None] | None = None,
    head_type: str = "RetinaNet",
    rescaled: bool = False,
) -> Pair:
    """Two detectors of some strides, of 6 channels each level unless ``widths`` says otherwise."""
    sides = (teacher, student)
    if widths is None:
        widths = tuple((6,) * len(strides or ()) for strides in sides)
    theirs = PlainAdapter(strides=teacher, widths=widths[0])
    ours = PlainAdapter(PlainHead(head_type=head_type), strides=student, widths=widths[1])
    levels, scale = None, 1.0
    if teacher is not None and student is not None:
        levels, scale = match_levels(teacher, student, rescaled=rescaled)
    return Pair(theirs, ours, levels=levels, scale=scale)


def method_for(pair: Pair, **settings) -> PKD:
    method = PKD(**settings)
    method.setup(pair)
    return method


def step_of(teacher: list[Tensor], student: list[Tensor]) -> Step:
    return Step(make_side(maps=teacher), make_side(maps=student))


# -- numbers --------------------------------------------------------------------------------------


def test_published_value_and_gradient_through_the_method():
    published = load_parity("losses.pt")["pkd"]
    student = published["student_features"].requires_grad_()
    method = method_for(pair_of((8.0,), (8.0,)))
    loss = method(step_of([published["teacher_features"]], [student]))["kd_pkd"]
    assert loss.item() == pytest.approx(10 * published["loss"], rel=1e-6)
    loss.backward()
    expected = 10 * published["grad_student_features"]
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("head_type", "weight"), [("RPN", 6), ("RetinaNet", 10), ("FCOS", 10), ("other", 10)]
)
def test_the_weight_is_that_of_the_students_type(head_type, weight):
    assert method_for(pair_of((8.0,), (8.0,), head_type=head_type)).weight == weight
    assert method_for(pair_of((8.0,), (8.0,), head_type=head_type), weight=0.5).weight == 0.5


def test_the_loss_is_the_sum_over_levels_of_equal_strides():
    teacher = [torch.randn(2, 6, side, side).double() for side in (16, 8, 4)]
    student = [torch.randn(2, 6, side, side).double().requires_grad_() for side in (8, 4, 2)]
    method = method_for(pair_of((4.0, 8.0, 16.0), (8.0, 16.0, 32.0)), weight=3.0)
    expected = 3 * (pkd_loss(student[0], teacher[1]) + pkd_loss(student[1], teacher[2]))
    torch.testing.assert_close(method(step_of(teacher, student))["kd_pkd"], expected, rtol=1e-12, atol=0)


def test_it_is_the_loss_of_the_plain_detectors_maps():
    """An FCOS teaches a RetinaNet, whose widths agree: only strides must."""
    teacher, student = tiny_fcos(seed=1).eval(), tiny_retinanet(seed=2)
    images, targets = tiny_batch()
    losses = Distiller(teacher, student, PKD())(images, targets)
    assert set(losses) == {"classification", "bbox_regression", "kd_pkd"}
    pixels = student.transform(images)[0].tensors
    pairs = zip(student.backbone(pixels).values(), teacher.backbone(pixels).values(), strict=True)
    expected = 10 * sum(pkd_loss(ours, theirs) for ours, theirs in pairs)
    torch.testing.assert_close(losses["kd_pkd"], expected)
    losses["kd_pkd"].backward()
    assert student.backbone.stem[0][0].weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in student.head.parameters())


def test_own_teacher_has_no_loss():
    maps = [torch.randn(2, 6, 8, 8)]
    method = method_for(pair_of((8.0,), (8.0,)))
    assert method(step_of(maps, [maps[0].clone().requires_grad_()]))["kd_pkd"].item() == 0


# -- levels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [(0,), (1, 2), (2, 0)])
def test_some_levels_alone(levels):
    student = tiny_retinanet(seed=2)
    method = PKD(levels=levels, weight=1.0)
    distiller = Distiller(tiny_fcos(seed=1), student, method)
    assert distiller.methods["pkd"].matches == tuple((level, level) for level in levels)
    loss = distiller(*tiny_batch())["kd_pkd"]
    loss.backward()
    reached = [lateral.weight.grad is not None for lateral in student.backbone.laterals]
    assert reached == [level in levels for level in range(3)]


def test_levels_left_out_are_named_once(caplog):
    with caplog.at_level(logging.INFO, logger="crosskd"):
        distiller = Distiller(with_levels(tiny_fcos, [1, 2], seed=1), tiny_retinanet(seed=2), PKD())
        distiller(*tiny_batch())
        distiller(*tiny_batch())
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("crosskd")]
    assert len(messages) == 1
    assert "8.0" in messages[0]
    assert not any(stride in messages[0] for stride in ("16.0", "32.0"))
    assert distiller.methods["pkd"].matches == ((1, 0), (2, 1))


@pytest.mark.parametrize("levels", [(0, 3), (-1,), (7,)])
def test_error_levels_that_the_student_lacks(levels):
    with pytest.raises(ValueError, match=rf"levels=\({levels[0]}.*the student has 3 levels"):
        method_for(pair_of((8.0, 16.0, 32.0), (8.0, 16.0, 32.0)), levels=levels)


def test_error_levels_without_a_counterpart():
    pair = pair_of((8.0, 16.0), (16.0, 32.0, 64.0))
    with pytest.raises(ValueError, match=r"\[32.0\] have no counterpart .*\[8.0, 16.0\].*resize=True"):
        method_for(pair, levels=(0, 1))
    with pytest.raises(ValueError, match=r"strides \[32.0, 64.0\] have no counterpart"):
        method_for(pair_of((8.0, 16.0), (32.0, 64.0)))


def test_error_unknown_strides():
    for strides in (((8.0,), None), (None, (8.0,))):
        with pytest.raises(ValueError, match="matches levels by their strides, which .* strides="):
            method_for(pair_of(*strides))


# -- resizing -------------------------------------------------------------------------------------


def test_resized_levels_take_the_teachers_nearest():
    method = method_for(pair_of((8.0, 16.0), (4.0, 8.0, 32.0)), resize=True, weight=1.0)
    assert method.matches == ((0, 0), (1, 0), (2, 1))
    teacher = [torch.randn(2, 6, side, side).double() for side in (8, 4)]
    student = [torch.randn(2, 6, side, side).double().requires_grad_() for side in (16, 8, 2)]
    resized = [
        nn.functional.interpolate(teacher[0], size=(16, 16), mode="bilinear", align_corners=False),
        teacher[0],
        nn.functional.interpolate(teacher[1], size=(2, 2), mode="bilinear", align_corners=False),
    ]
    expected = sum(pkd_loss(ours, theirs) for ours, theirs in zip(student, resized, strict=True))
    torch.testing.assert_close(method(step_of(teacher, student))["kd_pkd"], expected, rtol=1e-12, atol=0)


def test_the_nearest_is_that_at_the_teachers_resolution():
    """The teacher sees images of twice the side: the student's stride 44 is 88 there."""
    pair = pair_of((16.0, 32.0, 80.0), (8.0, 16.0, 44.0), rescaled=True)
    assert pair.scale == 2
    assert method_for(pair, resize=True).matches == ((0, 0), (1, 1), (2, 2))


def test_error_maps_of_another_size():
    method = method_for(pair_of((8.0, 16.0), (8.0, 16.0)))
    teacher, student = ([torch.randn(2, 6, side, side) for side in sides] for sides in ((8, 6), (8, 4)))
    with pytest.raises(ValueError, match=r"level 1 .*\(6, 6\) \(teacher\), \(4, 4\) \(student\).*resize="):
        method(step_of(teacher, student))


# -- widths ---------------------------------------------------------------------------------------


def test_projections_are_made_where_widths_differ_and_trained():
    pair = pair_of((8.0, 16.0), (8.0, 16.0), widths=((6, 9), (6, 4)))
    method = method_for(pair)
    assert {key: (p.student_width, p.teacher_width) for key, p in method.projections.items()} == {
        "level1": (4, 9)
    }
    maps = [torch.randn(2, width, 4, 4) for width in (6, 9)]
    student = [torch.randn(2, width, 4, 4, requires_grad=True) for width in (6, 4)]
    method(step_of(maps, student))["kd_pkd"].backward()
    assert method.projections["level1"].convolution.weight.grad.abs().max() > 0
    assert all(feature_map.grad.abs().max() > 0 for feature_map in student)


def test_projections_are_part_of_the_distillers_state_and_not_of_the_students():
    student = tiny_retinanet(width=32, seed=2)
    distiller = Distiller(tiny_fcos(width=64, seed=1), student, PKD())
    added = {key for key in distiller.state_dict() if not key.startswith("student.")}
    assert added == {f"methods.pkd.projections.level{level}.convolution.weight" for level in range(3)}
    assert not any("projection" in key for key in student.state_dict())


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_error_unknown_widths(side):
    widths = (None, (6,)) if side == "teacher" else ((6,), None)
    with pytest.raises(ValueError, match=rf"channels the {side}'s maps have: .*widths="):
        method_for(pair_of((8.0,), (8.0,), widths=widths))


def test_error_projections_that_would_be_trained_alone():
    student = tiny_retinanet(width=32, seed=2)
    student.backbone.requires_grad_(False)
    distiller = Distiller(tiny_fcos(width=64, seed=1), student, PKD())
    with pytest.raises(ValueError, match="map of level 0 depends on no trainable parameter"):
        distiller(*tiny_batch())


# -- in a distiller -------------------------------------------------------------------------------


def calls_of(detector: nn.Module) -> list[str]:
    """Gets the names of the parts that run from now on."""
    calls: list[str] = []
    for name in ("backbone", "head.classification_head.conv.0.0", "head.classification_head.cls_logits"):
        detector.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


def test_the_teachers_head_is_not_run_where_nothing_requires_it():
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), PKD(), prove=False)
    teacher, student = calls_of(distiller.teacher), calls_of(distiller.student)
    images, targets = tiny_batch()
    distiller(images, targets)
    assert teacher == ["backbone"]
    assert len(student) == 1 + 2 * 3
    student.clear()
    losses = distiller(images)
    assert set(losses) == {"kd_pkd"}
    assert student == ["backbone"]  # without targets nothing needs the student's either


def test_it_composes_with_crosskd():
    images, targets = tiny_batch()

    def losses_of(*methods) -> dict[str, Tensor]:
        return Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), methods)(images, targets)

    both, crosskd, pkd = losses_of(CrossKD(), PKD()), losses_of(CrossKD()), losses_of(PKD())
    assert set(both) == set(crosskd) | set(pkd)
    for name, loss in both.items():
        assert torch.equal(loss, crosskd[name] if name in crosskd else pkd[name]), name


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, "weight must be above 0, got 0"),
        ({"weight": -1.0}, "weight must be above 0, got -1.0"),
        ({"weight": math.nan}, "weight must be above 0, got nan"),
        ({"levels": ()}, "levels is empty"),
    ],
)
def test_error_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PKD(**settings)


def test_printing_shows_the_settings():
    assert repr(PKD(2.0, levels=[0, 1])).startswith("PKD(\n  weight=2.0, levels=(0, 1), resize=False")
    assert PKD().loss_names() == ("kd_pkd",)
