"""The adapter on ultralytics' own models: v8, 11 (distributions), 26 (distances, end to end), 10 (both)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from crosskd import CrossKD, Distiller, PredictionMimicking, describe
from crosskd.adapters import find_adapter
from crosskd.head import TapPoint
from crosskd.predictions import Predictions, join_levels
from crosskd.testing import check_adapter
from tests.yolo import KINDS, WIDTHS, batch_of, model_of

pytestmark = pytest.mark.ultralytics
END_TO_END = ("yolo26n", "yolov10n")
HALVES = {False: ("cv2", "cv3"), True: ("cv2", "cv3", "one2one_cv2", "one2one_cv3")}


def teacher_of(kind: str, **options: Any) -> Any:
    return model_of(kind, **{"width": WIDTHS["teacher"], "seed": 1, **options}).eval()


def distiller_of(kind: str, method: Any = None, **options: Any) -> Distiller:
    return Distiller(teacher_of(kind), model_of(kind), method or CrossKD(), **options)


def settings() -> Any:
    from ultralytics.cfg import get_cfg

    return get_cfg()


def split(losses: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The student's own losses, and the distillation's."""
    own = {name: loss for name, loss in losses.items() if not name.startswith("kd_")}
    return own, {name: loss for name, loss in losses.items() if name not in own}


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def all_predictions(adapter: Any, model: Any, maps: Any) -> Predictions:
    return join_levels(
        adapter.predict(
            model, level, {b.name: b.tower(level).run(one, ())[0] for b in adapter.branches(model)}
        )
        for level, one in enumerate(maps)
    )


# -- what the model itself calculates -------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_own_losses_are_ultralytics_own_to_the_last_bit(kind):
    distiller = distiller_of(kind)
    plain = copy.deepcopy(distiller.student)
    plain.args = settings()
    images, targets = batch_of(batch=3)
    own, distilled = split(distiller(images, targets))
    losses, logged = plain.loss({"img": images, **targets})
    assert torch.equal(torch.stack(list(own.values())), losses)
    assert (
        list(own) == list(logged) == ["box_loss", "cls_loss", "l1_loss" if kind == "yolo26n" else "dfl_loss"]
    )
    assert all(loss > 0 for loss in distilled.values())
    torch.stack(list(own.values())).sum().backward()
    losses.sum().backward()
    ours, theirs = gradients(distiller.student), gradients(plain)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    for mine, its in zip(distiller.student.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_and_boxes_are_the_heads_own(kind):
    model = teacher_of(kind)
    adapter = find_adapter(model)
    images, _ = batch_of()
    maps = adapter.features(model, images)
    with torch.no_grad():
        decoded, raw = model(images)
        predictions = all_predictions(adapter, model, maps)
    halves = [raw["one2many"], raw["one2one"]] if kind in END_TO_END else [raw]
    locations = adapter.locations(model, None, maps)
    logits, sides, boxes = (
        locations.by_half(rows)
        for rows in (
            predictions.logits,
            predictions.regression,
            adapter.decode(model, predictions, locations),
        )
    )
    for half, its in enumerate(halves):
        assert torch.equal(logits[half].transpose(1, 2), its["scores"])
        assert torch.equal(sides[half].flatten(2).transpose(1, 2), its["boxes"])
    assert torch.equal(locations.joined(logits), predictions.logits)
    # What it decodes in eval is centre and size of its one-to-many half.
    centre, size = decoded[:, :4].transpose(1, 2).split(2, dim=-1)
    torch.testing.assert_close(
        boxes[0], torch.cat([centre - size / 2, centre + size / 2], -1), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_tail_on_its_own_models_taps_gives_its_own_predictions(kind):
    model = teacher_of(kind)
    adapter = find_adapter(model)
    for level, features in enumerate(adapter.features(model, batch_of()[0])):
        for branch in adapter.branches(model):
            points = [TapPoint(position, "post") for position in range(3)]
            output, taps = branch.tower(level).run(features, points)
            for point in points:
                assert torch.equal(branch.tower(level).tail(taps[point].read(), point), output)


@pytest.mark.parametrize("kind", ["yolo11n", "yolo26n"])
def test_eval_answers_what_the_student_alone_would(kind):
    distiller = distiller_of(kind).eval()
    images, _ = batch_of()
    with torch.no_grad():
        assert torch.equal(distiller(images)[0], distiller.student(images)[0])


# -- the distillation -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", [1, 2])
def test_gradients_reach_the_towers_before_the_split_alone(kind, position):
    distiller = distiller_of(kind, CrossKD(position=position))
    _, distilled = split(distiller(*batch_of()))
    sum(distilled.values()).backward()
    reached = gradients(distiller.student)
    head = f"model.{len(distiller.student.model) - 1}"
    for half in HALVES[kind in END_TO_END]:
        for level in range(3):
            inside = {name.split(".")[4] for name in reached if name.startswith(f"{head}.{half}.{level}.")}
            assert inside == {str(block) for block in range(position)}
    assert any(name.startswith("model.0.") for name in reached)
    assert all(p.grad.any() for p in distiller.methods.parameters())


def test_the_one_to_one_half_leaves_the_features_alone():
    distiller = distiller_of("yolo26n")
    images, targets = batch_of()
    distiller(images, targets)
    distiller.student.criterion.o2m = 0.0
    _, distilled = split(distiller(images, targets))
    sum(distilled.values()).backward()
    head = f"model.{len(distiller.student.model) - 1}.one2one_"
    assert gradients(distiller.student)
    assert all(name.startswith(head) for name in gradients(distiller.student))


def test_halves_count_as_they_do_in_the_models_own_losses():
    """kd_cls of both halves is gain times kd_cls of each, normalised by its own summed target scores."""
    images, targets = batch_of()
    distiller = distiller_of("yolo26n")
    distiller(images, targets)
    values = []
    for many, one in ((0.8, 0.0), (0.0, 0.2), (0.8, 0.2)):
        distiller.student.criterion.o2m, distiller.student.criterion.o2o = many, one
        student = copy.deepcopy(distiller.student.state_dict())
        values.append(split(distiller(images, targets))[1])
        distiller.student.load_state_dict(student)
    for name in ("kd_cls", "kd_reg"):
        torch.testing.assert_close(values[0][name] + values[1][name], values[2][name])


def test_the_assignment_is_what_the_assigner_said():
    distiller = distiller_of("yolo11n")
    student, adapter = distiller.student, distiller.adapter
    images, targets = batch_of()
    heard = []
    distiller(images, targets)
    student.criterion.assigner.register_forward_hook(lambda module, given, result: heard.append(result))
    inputs = adapter.prepare(distiller.teacher, student, images, targets)
    maps = adapter.features(student, images)
    predictions = all_predictions(adapter, student, maps)
    _, assignment = adapter.losses(student, predictions, adapter.locations(student, inputs, maps), inputs)
    (result,) = heard
    assert torch.equal(assignment.positive, result[3].bool())
    assert assignment.positive.any()
    assert assignment.counted is None
    assert assignment.normalizer == result[2].sum().clamp(min=1)
    # Nothing listens any more once the losses are there.
    assert len(student.criterion.assigner._forward_hooks) == 1


def test_without_objects_the_losses_are_finite():
    images, targets = batch_of()
    nothing = {name: value[:0] for name, value in targets.items()}
    for kind in ("yolo11n", "yolo26n"):
        losses = distiller_of(kind)(images, nothing)
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()


@pytest.mark.parametrize("kind", ["yolo11n", "yolo26n"])
def test_unlabelled_images(kind):
    losses = distiller_of(kind)(batch_of()[0])
    assert sorted(losses) == ["kd_cls", "kd_reg"]
    assert all(loss > 0 for loss in losses.values())


@pytest.mark.parametrize("kind", ["yolo11n", "yolo26n"])
def test_the_teacher_is_untouched(kind):
    teacher = teacher_of(kind)
    images, targets = batch_of()
    with torch.no_grad():
        teacher(images)  # caches anchors on its head
    head = teacher.model[-1]
    state, shape, anchors = copy.deepcopy(teacher.state_dict()), head.shape, head.anchors.clone()
    teacher.train()
    distiller = Distiller(teacher, model_of(kind), CrossKD())
    larger, more = batch_of(side=96)
    for batch in ((images, targets), (larger, more)):
        sum(distiller(*batch).values()).backward()
    assert teacher.training
    assert not distiller.teacher.training
    assert all(p.requires_grad and p.grad is None for n, p in teacher.named_parameters() if ".dfl." not in n)
    assert head.shape == shape
    assert torch.equal(head.anchors, anchors)
    assert distiller.teacher.model[-1].shape == shape
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_the_student_stays_plain():
    distiller = distiller_of("yolo11n")
    before = set(vars(distiller.student))
    distiller(*batch_of())
    assert set(vars(distiller.student)) - before == {"criterion"}  # as ultralytics' own loss leaves it
    assert list(distiller.student.state_dict()) == list(model_of("yolo11n").state_dict())


def test_methods_take_turns_and_mimicking_works():
    losses = distiller_of("yolo26n", [CrossKD(), PredictionMimicking()])(*batch_of())
    assert {"crosskd_kd_cls", "mimicking_kd_cls", "crosskd_kd_reg", "mimicking_kd_reg"} < set(losses)


def test_autocast():
    images, targets = batch_of()
    for kind in ("yolo11n", "yolo26n"):
        distiller = distiller_of(kind)
        with torch.autocast("cpu", torch.bfloat16):
            losses = distiller(images, targets)
        assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
        sum(losses.values()).backward()


# -- the conformance kit --------------------------------------------------------------------------


def plain_losses(model: Any, images: Tensor, targets: Any) -> dict[str, Tensor]:
    model.args = settings()
    losses, logged = model.loss({"img": images, **targets})
    return dict(zip(logged, losses, strict=True))


def objects_in(inputs: Any) -> list[dict[str, Tensor]]:
    targets, (height, width) = inputs.targets, inputs.student_pixels.shape[2:]
    found = []
    for image in range(len(inputs.student_pixels)):
        own = targets["batch_idx"] == image
        centre, size = targets["bboxes"][own].split(2, dim=1)
        boxes = torch.cat([centre - size / 2, centre + size / 2], dim=1)
        boxes = boxes * torch.tensor([width, height, width, height])
        found.append({"boxes": boxes, "labels": targets["cls"][own].flatten().long()})
    return found


def first(count: int) -> Any:
    """A variation of a batch with the objects of its first images alone."""

    def vary(images: Tensor, targets: Any) -> tuple[Tensor, Any]:
        kept = targets["batch_idx"] < count
        return images[:count] if count else images, {name: value[kept] for name, value in targets.items()}

    return vary


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_conforms(kind):
    report = check_adapter(
        find_adapter(model_of(kind)),
        *batch_of(),
        teacher=teacher_of(kind),
        student=model_of(kind),
        own_losses=plain_losses,
        truth=objects_in,
        one_image=first(1),
        without_objects=first(0),
        odd_size=lambda images, targets: (images[:, :, :32], None),
    )
    # Ultralytics' criterion can't train in float64 itself.
    assert set(report.skipped) <= {"float64", "other device"}


# -- pairs ----------------------------------------------------------------------------------------


def test_recipes_are_chosen_by_the_head(capsys):
    for kind, regression in (("yolo11n", "distribution_kl"), ("yolo26n", "giou")):
        recipe = find_adapter(model_of(kind)).recipe
        assert (recipe.regression, recipe.position, recipe.times_batch) == (regression, 1, True)
    assert "one2one_regression: 2 blocks, level 2" in describe(model_of("yolo26n"))


def test_projections_are_made_for_each_level_where_widths_differ():
    names = set(distiller_of("yolo26n").methods["crosskd"].projections)
    assert {f"{half}classification_level{level}" for half in ("", "one2one_") for level in range(3)} <= names


def test_a_teacher_with_other_classes_needs_a_map():
    teacher, student = teacher_of("yolo11n", classes=5), model_of("yolo11n")
    with pytest.raises(ValueError, match="the teacher predicts 5 classes and the student 3: give class_map"):
        Distiller(teacher, student, CrossKD())
    distiller = Distiller(teacher, student, CrossKD(), class_map=[4, 0, 2])
    own, distilled = split(distiller(*batch_of()))
    assert len(own) == 3
    assert all(loss > 0 for loss in distilled.values())


def test_a_teacher_with_a_level_more(caplog):
    with caplog.at_level("INFO", "crosskd"):
        distiller = Distiller(teacher_of("yolov8n-p2"), model_of("yolov8n"), CrossKD())
    assert "strides [4.0] are left out" in caplog.text
    assert all(loss > 0 for loss in split(distiller(*batch_of()))[1].values())


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ({"kind": "yolov8n"}, {"kind": "yolov8n-p2"}, r"strides differ: \[8.0, 16.0, 32.0\] \(teacher\)"),
        (
            {"kind": "yolo11n", "reg_max": 8},
            {"kind": "yolo11n"},
            r"reg_max differs: 8 \(teacher\), 16 \(student\)",
        ),
        ({"kind": "yolo11n"}, {"kind": "yolo26n"}, r"reg_max differs: 16 \(teacher\), 1 \(student\)"),
        ({"kind": "yolo11n"}, {"kind": "yolov10n"}, r"one-to-many alone \(teacher\), end to end"),
        (
            {"kind": "yolo26n"},
            {"kind": "yolo26n", "end2end": False},
            r"end to end.*\(teacher\), one-to-many alone",
        ),
        ({"kind": "yolo11n", "ch": 1}, {"kind": "yolo11n"}, r"channels differ: 1 \(teacher\), 3 \(student\)"),
    ],
)
def test_pairs_that_cannot_be_distilled(teacher, student, message):
    with pytest.raises(ValueError, match=message):
        Distiller(teacher_of(**teacher), model_of(**student), CrossKD())


def test_a_fused_teacher_is_refused():
    with pytest.raises(ValueError, match="teacher: the model was fused for inference"):
        Distiller(teacher_of("yolo11n").fuse(verbose=False), model_of("yolo11n"), CrossKD())


def test_other_models_are_refused():
    from ultralytics import YOLO
    from ultralytics.nn.tasks import SegmentationModel

    with pytest.raises(
        TypeError, match=r"a YOLO, not one of ultralytics' DetectionModels: hand in .* YOLO.model"
    ):
        Distiller(YOLO("yolo11n.yaml"), model_of("yolo11n"), CrossKD())
    with pytest.raises(TypeError, match="the teacher, a SegmentationModel, ends in a Segment"):
        Distiller(SegmentationModel("yolo11n-seg.yaml", verbose=False), model_of("yolo11n"), CrossKD())
    with pytest.raises(TypeError, match="the student is a Linear"):
        Distiller(teacher_of("yolo11n"), torch.nn.Linear(2, 2), CrossKD())


@pytest.mark.parametrize("tap", [CrossKD(tap="pre"), CrossKD(position=3)])
def test_splits_that_do_not_fit_are_refused(tap):
    with pytest.raises(ValueError, match="tower of level 0"):
        distiller_of("yolo11n", tap)


# -- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "divide what the data loader gives by 255"),
        ([torch.rand(3, 64, 64)], "got list"),
        (torch.rand(2, 3, 64, 72), "multiples of the coarsest stride, 32"),
    ],
)
def test_images_that_it_cannot_take(images, message):
    with pytest.raises(ValueError, match=message):
        distiller_of("yolov8n")(images, batch_of()[1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cls": torch.full((4, 1), 3.0)}, "classes from 3 to 3, but the student predicts 3 classes"),
        ({"batch_idx": torch.tensor([0.0, 0.0, 1.0, 2.0])}, "batch_idx from 0 to 2, but there are 2 images"),
        ({"bboxes": torch.full((4, 4), 32.0)}, "fractions of the image"),
        ({"bboxes": torch.rand(3, 4)}, r"got \(4,\), \(4, 1\) and \(3, 4\)"),
        ({"bboxes": None}, "a dict with the tensors batch_idx, cls, bboxes"),
    ],
)
def test_targets_that_it_cannot_take(changed, message):
    images, targets = batch_of()
    with pytest.raises(ValueError, match=message):
        distiller_of("yolov8n")(images, {**targets, **changed})
