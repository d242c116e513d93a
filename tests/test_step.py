"""A step shows a method what it requires, and refuses the rest by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from crosskd import Distiller, Method
from crosskd.adapters import Objects
from crosskd.predictions import Predictions
from crosskd.step import Step, resized_boxes, run_head, shape_only, space
from crosskd.towers import Branch, Tapped, TapPoint, Tower
from tests.helpers.steps import PlainHead, make_predictions, make_side, make_step
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet

READERS = {
    "maps": [lambda step: step.student.maps, lambda step: step.teacher.maps],
    "towers": [lambda step: step.student.taps, lambda step: step.teacher.taps],
    "predictions": [
        lambda step: step.student.predictions,
        lambda step: step.teacher.predictions,
        lambda step: step.student.anchors,
        lambda step: step.teacher.anchors,
        lambda step: step.assignment,
        lambda step: step.teacher_assignment(),
    ],
    "objects": [lambda step: step.objects],
}


class Reading(Method):
    """Requires some things, and reads whatever it is given to read."""

    def __init__(self, requires: set[str], read: Any) -> None:
        super().__init__(name="reading")
        self.requires, self.read = frozenset(requires), read

    def tap_points(self, branch: str) -> tuple[TapPoint, TapPoint]:
        return (TapPoint(1, "post"),) * 2

    def forward(self, step: Step) -> dict[str, Tensor]:
        self.found = self.read(step)
        weights = next(iter(step.student.adapter.detector.parameters()))
        return {"kd": weights.square().sum()}


class OfHead(Reading):
    """Distils a head, whatever it requires."""

    @classmethod
    def distils_heads(cls) -> bool:
        return True


class OfMaps(Reading):
    """Distils no head."""

    @classmethod
    def distils_heads(cls) -> bool:
        return False


def read(method: Reading, **options: Any) -> Any:
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), method, **options)
    distiller(*tiny_batch())
    return distiller.methods["reading"].found


@pytest.mark.parametrize(
    ("required", "reader"),
    [(name, number) for name, readers in READERS.items() for number in range(len(readers))],
)
def test_what_is_required_can_be_read_and_what_is_not_is_refused(required, reader):
    others = set(READERS) - {required}
    assert read(OfHead({required}, READERS[required][reader])) is not None
    message = rf"reading reads {required}, but its requires is \['.*add '{required}'"
    with pytest.raises(AttributeError, match=message):
        read(OfHead(others, READERS[required][reader]))


def test_a_method_of_maps_reads_no_head():
    for reader in (lambda step: step.student.head, lambda step: step.teacher.levels):
        with pytest.raises(AttributeError, match=r"reading reads a head, but its requires is \['maps'\]"):
            read(OfMaps({"maps"}, reader))


def test_what_every_method_may_read():
    found = read(
        OfMaps(
            {"maps"},
            lambda step: (
                step.image_sizes,
                step.student.strides,
                step.teacher.strides,
                step.student.batch.size,
                type(step.teacher.adapter.detector),
                step.scale,
                step.class_map,
            ),
        )
    )
    strides = (8.0, 16.0, 32.0)
    assert found == (((64, 64),) * 2, strides, strides, (64, 64), type(tiny_retinanet()), 1.0, None)


def test_taps_of_a_method_that_taps_nothing_are_none():
    class Nothing(OfHead):
        def tap_points(self, branch: str) -> None:
            return None

    assert read(Nothing({"towers"}, lambda step: (step.student.taps, step.teacher.taps))) == ({}, {})


def test_objects_are_those_of_the_batch():
    images, targets = tiny_batch(side=32)  # the transform doubles them
    method = OfMaps({"objects"}, lambda step: step.objects)
    distiller = Distiller(tiny_fcos(seed=1), tiny_fcos(seed=2), method)
    distiller(images, targets)
    objects = distiller.methods["reading"].found
    assert all(isinstance(of_image, Objects) for of_image in objects)
    for of_image, target in zip(objects, targets, strict=True):
        torch.testing.assert_close(of_image.boxes, 2 * target["boxes"])
        assert torch.equal(of_image.labels, target["labels"])
    distiller(images)
    assert distiller.methods["reading"].found is None


def test_the_teachers_side_is_a_constant_and_the_students_is_not():
    def reader(step: Step) -> Any:
        return step

    step = read(OfHead({"maps", "towers", "predictions"}, reader))
    for side, grad in ((step.teacher, False), (step.student, True)):
        assert {m.requires_grad for m in side.maps} == {grad}
        assert side.predictions.logits.requires_grad is grad
        assert side.predictions.regression.requires_grad is grad
    assert not any(t.requires_grad for taps in step.teacher.taps.values() for t in taps)
    assert all(t.read().requires_grad for taps in step.student.taps.values() for t in taps)


def test_boxes_of_whole_numbers_are_resized():
    boxes = torch.tensor([[2, 4, 6, 8]])
    assert resized_boxes(boxes, (8, 8), (4, 12)).tolist() == [[3.0, 2.0, 9.0, 4.0]]


def test_a_step_can_be_made_by_hand():
    step = make_step()
    assert step.assignment.normalizer == 5
    assert step.objects is None
    side = make_side(make_predictions(), levels=(1, 2), requires=frozenset({"predictions"}))
    assert side.levels == (1, 2)
    with pytest.raises(AttributeError, match="reads maps"):
        _ = side.maps


# -- running a head --------------------------------------------------------------------------------


class Summing(PlainHead):
    """Predicts its tower's output as logits, and its first channel plus the level as boxes."""

    def predict(self, level: int, towers: Any) -> Predictions:
        (features,) = towers.values()
        rows = features.flatten(2).mT
        return Predictions(rows, rows[..., :1].expand(-1, -1, 4) + level, None)


def head_of_levels() -> Summing:
    tower = Tower.of([torch.nn.Conv2d(3, 3, 1), torch.nn.ReLU()], "tower")
    return Summing([Branch("both", (tower,), {})])


def test_levels_run_in_the_order_given_and_are_joined():
    head, maps = head_of_levels(), [torch.randn(2, 3, side, side) for side in (4, 2)]
    run = run_head(head, maps, [3, 1])
    assert run.levels == (3, 1)
    expected = [head.branches[0].towers[0].run(m, ())[0].flatten(2).mT for m in maps]
    torch.testing.assert_close(run.predictions.logits, torch.cat(expected, dim=1))
    assert torch.equal(run.predictions.regression[:, 16:, 0], expected[1][..., 0] + 1)
    assert run.taps == {}


def test_methods_tap_where_they_ask_and_keep_what_they_choose():
    head, feature_map = head_of_levels(), torch.randn(2, 3, 4, 4)
    points = {"both": {"one": TapPoint(0, "post"), "two": TapPoint(1, "pre")}}
    run = run_head(head, [feature_map], [0], points)
    assert torch.equal(run.taps["one"]["both"][0].read(), feature_map)
    assert isinstance(run.taps["two"]["both"][0], Tapped)
    kept = run_head(head, [feature_map], [0], points, lambda name, tapped: (name, tapped.read().shape)).taps
    assert kept == {name: {"both": [(name, (2, 3, 4, 4))]} for name in ("one", "two")}


def test_classes_are_chosen():
    head, feature_map = head_of_levels(), torch.randn(2, 3, 4, 4)
    run = run_head(head, [feature_map], [0], class_map=(2, 0))
    whole = run_head(head, [feature_map], [0]).predictions.logits
    assert torch.equal(run.predictions.logits, whole[..., [2, 0]])


def test_shapes_without_memory():
    tensor = shape_only(torch.randn(2, 3, 4, 5))
    assert tensor.shape == (2, 3, 4, 5)
    assert tensor.untyped_storage().nbytes() == 4
    assert space(tensor, channels_last=False) == (4, 5)
    assert space(tensor, channels_last=True) == (3, 4)


class Found(Method):
    """Keeps the foreground that a step gives."""

    requires = frozenset({"maps", "objects"})

    def forward(self, step: Step) -> dict[str, Tensor]:
        self.found = step.foreground(0.3)
        return {"kd_maps": step.student.maps[0].square().mean()}


def sure_teacher(**options: Any) -> Any:
    return tiny_retinanet(1, score_thresh=0.3, nms_thresh=0.5, detections_per_img=1000, seed=1, **options)


def found_in(images: list[Tensor], targets: Any = None, **options: Any) -> tuple[Objects, ...]:
    view = {"teacher_view": lambda images, targets: images} if options else {}
    distiller = Distiller(sure_teacher(**options), tiny_retinanet(1), Found(name="found"), **view)
    distiller(images, targets)
    return distiller.methods["found"].found


@pytest.mark.parametrize("options", [{}, {"side": 128}], ids=["", "the teacher sees them enlarged"])
def test_without_targets_the_foreground_is_what_the_teacher_itself_finds(options):
    images, _ = tiny_batch(num_classes=1)
    expected = sure_teacher(**options).eval()(images)
    for objects, of_image in zip(found_in(images, **options), expected, strict=True):
        assert len(objects.boxes) > 5
        torch.testing.assert_close(objects.boxes, of_image["boxes"], rtol=1e-4, atol=1e-3)
        assert objects.labels.eq(0).all()


def test_with_targets_the_foreground_is_the_batchs_objects():
    images, targets = tiny_batch(num_classes=1)
    for objects, target in zip(found_in(images, targets), targets, strict=True):
        torch.testing.assert_close(objects.boxes, target["boxes"])
