"""The adapter on ultralytics' own models: v8, 11 (distributions), 26 (distances, end to end), 10 (both)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import resnet18
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from crosskd import PKD, CrossKD, Distiller, PredictionMimicking, describe
from crosskd.adapters import find_adapter
from crosskd.adapters.base import Batch, Objects
from crosskd.diagnostics.decoder_checks import DECODER_CHECKS
from crosskd.predictions import Predictions
from crosskd.step import run_head
from crosskd.testing import check_adapter
from crosskd.towers import TapPoint
from tests.helpers.yolo import KINDS, WIDTHS, batch_of, model_of

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


def predictions_of(adapter: Any, images: Tensor) -> tuple[Predictions, list[Tensor]]:
    """A model's predictions by its pieces, and its maps."""
    maps = adapter.maps(images)
    return run_head(adapter.heads[0], maps, range(len(maps))).predictions, maps


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
    head = adapter.heads[0]
    images, _ = batch_of()
    with torch.no_grad():
        decoded, raw = model(images)
        predictions, maps = predictions_of(adapter, images)
    halves = [raw["one2many"], raw["one2one"]] if kind in END_TO_END else [raw]
    anchors = head.anchors(adapter.prepare(images, None), maps)
    logits, sides, boxes = (
        head.by_half(rows, anchors)
        for rows in (predictions.logits, predictions.regression, head.decode(predictions, anchors))
    )
    for half, its in enumerate(halves):
        assert torch.equal(logits[half].transpose(1, 2), its["scores"])
        assert torch.equal(sides[half].flatten(2).transpose(1, 2), its["boxes"])
    # What it decodes in eval is centre and size of its one-to-many half.
    centre, size = decoded[:, :4].transpose(1, 2).split(2, dim=-1)
    torch.testing.assert_close(
        boxes[0], torch.cat([centre - size / 2, centre + size / 2], -1), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_outputs_are_the_rows_of_the_pieces(kind):
    model = teacher_of(kind)
    adapter = find_adapter(model)
    images, _ = batch_of()
    model.model[-1].export = True  # as an exporter leaves it, which gives the detections alone
    with torch.no_grad():
        (own,) = adapter.own_outputs(adapter.prepare(images, None))
        predictions, _ = predictions_of(adapter, images)
    assert torch.equal(own.predictions.logits, predictions.logits)
    assert torch.equal(own.predictions.regression, predictions.regression)
    assert model.model[-1].export


@pytest.mark.parametrize("kind", KINDS)
def test_a_tail_on_its_own_models_taps_gives_its_own_predictions(kind):
    adapter = find_adapter(teacher_of(kind))
    for level, features in enumerate(adapter.maps(batch_of()[0])):
        for branch in adapter.heads[0].branches:
            points = [TapPoint(position, "post") for position in range(3)]
            output, taps = branch.tower(level).run(features, points)
            for point in points:
                assert torch.equal(branch.tower(level).tail(taps[point].read(), point), output)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_what_the_models_own_head_reads(kind):
    model = teacher_of(kind)
    adapter = find_adapter(model)
    read: list[Tensor] = []
    model.model[-1].register_forward_pre_hook(lambda module, given: read.extend(given[0]))
    images, _ = batch_of()
    with torch.no_grad():
        model(images)
        maps = adapter.maps(images)
    assert all(torch.equal(mine, its) for mine, its in zip(maps, read, strict=True))
    assert adapter.widths == tuple(one.shape[1] for one in maps)
    assert adapter.strides == tuple(images.shape[-1] / one.shape[-1] for one in maps)


def test_objects_are_boxes_in_pixels_image_by_image():
    images = torch.rand(3, 3, 64, 96)
    targets = {
        "batch_idx": torch.tensor([2.0, 0.0, 2.0]),
        "cls": torch.tensor([[1.0], [2.0], [0.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.25, 0.75, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]),
    }
    batch = find_adapter(model_of("yolov8n")).prepare(images, targets)
    assert [of_image.labels.tolist() for of_image in batch.objects] == [[2], [], [1, 0]]
    assert batch.objects[0].boxes.tolist() == [[0.0, 32.0, 48.0, 64.0]]
    assert batch.objects[1].boxes.shape == (0, 4)
    assert batch.objects[2].boxes.tolist() == [[24.0, 24.0, 72.0, 40.0], [0.0, 0.0, 96.0, 64.0]]
    assert batch.image_sizes == ((64, 96),) * 3


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
    student, adapter = distiller.student, distiller.student_adapter
    head = adapter.heads[0]
    images, targets = batch_of()
    results = []
    distiller(images, targets)
    student.criterion.assigner.register_forward_hook(lambda module, given, result: results.append(result))
    batch = adapter.prepare(images, targets)
    predictions, maps = predictions_of(adapter, images)
    _, assignment = head.losses(predictions, head.anchors(batch, maps), batch)
    (result,) = results
    assert torch.equal(assignment.positive, result[3].bool())
    assert assignment.positive.any()
    assert assignment.label_weights is None
    assert assignment.normalizer == result[2].sum().clamp(min=1)
    # The adapter's own hook is gone once the losses are there.
    assert len(student.criterion.assigner._forward_hooks) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_assignment_of_objects_is_that_of_the_losses(kind):
    model = teacher_of(kind)
    adapter = find_adapter(model)
    head = adapter.heads[0]
    images, targets = batch_of(batch=3)
    batch = adapter.prepare(images, targets)
    with torch.no_grad():
        predictions, maps = predictions_of(adapter, images)
        anchors = head.anchors(batch, maps)
        assignment = head.assign(predictions, anchors, batch)
        _, own = head.losses(predictions, anchors, batch)
    assert torch.equal(assignment.positive, own.positive)
    assert own.positive.any()
    torch.testing.assert_close(assignment.normalizer, own.normalizer)


def test_an_assignment_needs_known_classes_and_all_levels():
    adapter = find_adapter(teacher_of("yolo11n"))
    head = adapter.heads[0]
    images, targets = batch_of()
    batch = adapter.prepare(images, targets)
    predictions, maps = predictions_of(adapter, images)
    anchors = head.anchors(batch, maps)
    unknown = tuple(Objects(o.boxes, torch.full_like(o.labels, -1)) for o in batch.objects)
    with pytest.raises(ValueError, match="which of its 3 classes the objects are: give class_map="):
        head.assign(predictions, anchors, Batch(images, batch.image_sizes, unknown))
    first = run_head(head, maps[:2], range(2)).predictions
    with pytest.raises(ValueError, match=r"84 rows, but there are 80.*\[8.0, 16.0, 32.0\]"):
        head.assign(first, anchors, batch)


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
        find_adapter,
        *batch_of(),
        teacher=teacher_of(kind),
        student=model_of(kind),
        one_image=first(1),
        without_objects=first(0),
        odd_size=lambda images, targets: (images[:, :, :32], None),
        steps=100,  # as for the other adapters
    )
    # Ultralytics' criterion can't train in float64 itself.
    assert set(report.skipped) <= {"float64", "other device", *DECODER_CHECKS}


# -- pairs ----------------------------------------------------------------------------------------


def test_settings_are_chosen_by_the_head(capsys):
    for kind, regression in (("yolo11n", "distribution_kl"), ("yolo26n", "giou")):
        method = distiller_of(kind).methods["crosskd"]
        assert (method.comparison.regression, method.position) == (regression, 1)
    assert "one2one_regression: 2 blocks, level 2" in describe(model_of("yolo26n"))


def test_projections_are_made_for_each_level_where_widths_differ():
    names = set(distiller_of("yolo26n").methods["crosskd"].projections)
    assert {f"{half}classification_level{level}" for half in ("", "one2one_") for level in range(3)} <= names


def test_a_teacher_with_other_classes_needs_a_map_where_classes_are_compared():
    teacher, student = teacher_of("yolo11n", classes=5), model_of("yolo11n")
    with pytest.raises(ValueError, match="the teacher predicts 5 classes and the student 3: give class_map"):
        Distiller(teacher, student, PredictionMimicking())
    for method, class_map in ((PredictionMimicking(), [4, 0, 2]), (CrossKD(), [4, 0, 2]), (CrossKD(), None)):
        distiller = Distiller(teacher, student, method, class_map=class_map)
        own, distilled = split(distiller(*batch_of()))
        assert len(own) == 3
        assert all(loss > 0 for loss in distilled.values())


@pytest.mark.parametrize(
    ("theirs", "options", "message"),
    [
        (
            ["cat", "dog", "cow"],
            {},
            r"class 1 is 'dog' \(teacher\), 'cow' \(student.*range\(3\) if they mean",
        ),
        (["cat", "dog", "cow"], {"class_map": [0, 2, 1]}, None),
        (["Cat", "cow", "dog"], {}, None),
        (["0", "1", "2"], {}, None),
    ],
)
def test_classes_of_other_names(theirs, options, message):
    teacher, student = teacher_of("yolov8n"), model_of("yolov8n")
    teacher.names, student.names = dict(enumerate(theirs)), dict(enumerate(["cat", "cow", "dog"]))
    Distiller(teacher, student, [CrossKD(), PKD()], **options)
    if message is None:
        Distiller(teacher, student, PredictionMimicking(), **options)
        return
    with pytest.raises(ValueError, match=message):
        Distiller(teacher, student, PredictionMimicking(), **options)


def test_a_teacher_with_a_level_more():
    distiller = Distiller(teacher_of("yolov8n-p2"), model_of("yolov8n"), [CrossKD(), PKD()])
    assert distiller.pair.left_out() == ([4.0], [])
    assert all(loss > 0 for loss in split(distiller(*batch_of()))[1].values())


@pytest.mark.parametrize(
    ("teacher", "student", "method", "message"),
    [
        ("yolov8n", "yolov8n-p2", CrossKD(), r"strides differ: \[8.0, 16.0, 32.0\] \(teacher\)"),
        ("yolo11n", "yolo26n", PredictionMimicking(), r"over 16 \(teacher\), 1 \(student\) bins"),
        ("yolo26n", "yolo11n", CrossKD(), r"can't be joined.*'one2one_regression'\] \(teacher\)"),
    ],
)
def test_pairs_that_cannot_be_distilled(teacher, student, method, message):
    with pytest.raises(ValueError, match=message):
        Distiller(teacher_of(teacher), model_of(student), method)


def test_halves_that_the_other_lacks_are_other_anchors():
    distiller = Distiller(teacher_of("yolo11n"), model_of("yolov10n"), PredictionMimicking())
    with pytest.raises(ValueError, match=r"anchors differ.*\[64, 16, 4\].*\(teacher\), \[128, 32, 8\]"):
        distiller(*batch_of())


def test_channels_of_the_images():
    teacher, student = teacher_of("yolo11n", ch=1), model_of("yolo11n")
    with pytest.raises(ValueError, match=r"channels differ: 1 \(teacher\), 3 \(student\).*teacher_view="):
        Distiller(teacher, student, CrossKD())
    distiller = Distiller(teacher, student, CrossKD(), teacher_view=lambda images, _: images[:, :1])
    assert distiller(*batch_of())["kd_cls"] > 0


def test_images_too_small_for_a_coarser_level_of_the_teachers():
    distiller = Distiller(teacher_of("yolov8n-p6"), model_of("yolov8n"), CrossKD())
    with pytest.raises(ValueError, match=r"multiples of its coarsest stride, 64, got \(96, 96\)"):
        distiller(*batch_of(side=96))


# -- other families -------------------------------------------------------------------------------


def retinanet_of_three_levels() -> RetinaNet:
    """A RetinaNet with a YOLO's strides."""
    layers = {f"layer{number}": str(number) for number in (2, 3, 4)}
    backbone = BackboneWithFPN(resnet18(weights=None), layers, [128, 256, 512], 32)
    backbone.fpn.extra_blocks = None
    anchors = AnchorGenerator(((24,), (48,), (96,)), ((0.5, 1.0, 2.0),) * 3)
    return RetinaNet(backbone, 3, anchor_generator=anchors, min_size=64, max_size=64)


@pytest.mark.parametrize("kind", ["yolo11n", "yolo26n"])
def test_a_retinanet_teaches_a_yolo(kind):
    """The maps, and its own assignment on the batch's objects; losses grow with the batch as YOLO's do."""
    teacher, student = retinanet_of_three_levels(), model_of(kind)
    assert find_adapter(teacher.eval()).strides == find_adapter(student).strides
    images, targets = batch_of()
    distiller = Distiller(teacher, student, [PKD(), CrossKD(position=(1, 3))])
    plain = copy.deepcopy(student)
    plain.args = settings()
    trace = distiller.trace(images, targets)
    expected, _ = plain.loss({"img": images, **targets})
    assert torch.equal(torch.stack(list(trace.own_losses.values())), expected)
    step = trace.steps["crosskd"]
    matches = []
    teacher_head = distiller.teacher.head
    own = teacher_head.compute_loss
    teacher_head.compute_loss = lambda t, o, a, m: matches.extend(m) or own(t, o, a, m)
    distiller.teacher.train()
    distiller.teacher(
        list(distiller.teacher.transform.normalize(images)),
        [{"boxes": o.boxes, "labels": o.labels} for o in trace.student.batch.objects],
    )
    assert torch.equal(step.teacher_assignment().positive, torch.stack(matches) >= 0)
    assert step.teacher_assignment().positive.any()
    method = distiller.methods["crosskd"]
    assert method.comparison.regression == "giou"
    for key, loss in method(step).items():
        torch.testing.assert_close(trace.losses["crosskd"][key], 2 * loss)
    torch.testing.assert_close(
        trace.losses["pkd"]["kd_pkd"], 2 * distiller.methods["pkd"](trace.steps["pkd"])["kd_pkd"]
    )
    sum(loss for losses in trace.losses.values() for loss in losses.values()).backward()
    assert any(name.startswith("model.0.") for name in gradients(student))


@pytest.mark.parametrize(("classes", "class_map"), [(3, None), (5, [4, 0, 2])])
def test_a_yolo_teaches_a_retinanet(classes, class_map):
    """By its own assigner, which compares classes; with a map, on the columns that the student has."""
    teacher, student = teacher_of("yolo11n", classes=classes), retinanet_of_three_levels()
    images, _ = batch_of()
    targets = [
        {"boxes": torch.tensor([[5.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([label])} for label in (1, 2)
    ]
    distiller = Distiller(teacher, student, [PKD(), CrossKD(position=1)], class_map=class_map)
    trace = distiller.trace(list(images), targets)
    step = trace.steps["crosskd"]
    labels = torch.tensor([1.0, 2.0]) if class_map is None else torch.tensor(class_map)[[1, 2]].float()
    pixels = distiller.student.transform(list(images))[0].tensors
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (student.transform.image_mean, student.transform.image_std)
    )
    with torch.no_grad():
        criterion = model_of("yolo11n", classes=classes)
        criterion.args = settings()
        criterion = criterion.init_criterion()
        raw = teacher(pixels * std + mean)[1]
        results = []
        criterion.assigner.register_forward_hook(lambda module, given, result: results.append(result))
        boxes = torch.tensor([[22.5, 27.5, 35.0, 45.0]]).repeat(2, 1) / 64
        criterion(raw, {"batch_idx": torch.tensor([0.0, 1.0]), "cls": labels[:, None], "bboxes": boxes})
    assert torch.equal(step.teacher_assignment().positive, results[0][3].bool())
    torch.testing.assert_close(step.teacher_assignment().normalizer, results[0][2].sum().clamp(min=1))
    assert all(loss > 0 for losses in trace.losses.values() for loss in losses.values())


def test_a_yolo_of_other_classes_cannot_assign():
    distiller = Distiller(teacher_of("yolo11n", classes=5), retinanet_of_three_levels(), CrossKD(position=1))
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([1])}]
    with pytest.raises(ValueError, match="which of its 5 classes the objects are: give class_map="):
        distiller([torch.rand(3, 64, 64)], targets)


@pytest.mark.parametrize(
    ("teacher", "student"), [("yolo11n", "yolo26n"), ("yolo11n", "yolov10n"), ("yolov8n", "yolo11n")]
)
def test_yolos_of_other_heads_teach_each_other(teacher, student):
    """Without a one-to-one half, that of the student learns from the labels alone."""
    distiller = Distiller(teacher_of(teacher), model_of(student), [CrossKD(), PKD()])
    _, distilled = split(distiller(*batch_of()))
    assert all(loss > 0 for loss in distilled.values())
    sum(distilled.values()).backward()
    assert not any(".one2one_" in name for name in gradients(distiller.student))


# -- models of one's own --------------------------------------------------------------------------


def subclass(**functions: Any) -> Any:
    """A model of a class of the user's own."""
    student = model_of("yolo11n")
    student.__class__ = type("Special", (type(student),), functions)
    student.args = settings()
    return student


def test_a_loss_of_ones_own_is_refused():
    def loss(self: Any, batch: Any, preds: Any = None) -> Any:
        losses, logged = super(type(self), self).loss(batch, preds)
        return 100 * losses, logged

    distiller = Distiller(teacher_of("yolo11n"), subclass(loss=loss), CrossKD())
    with pytest.raises(ValueError, match=r"student: Special's own forward.*box_loss is .* alone and"):
        distiller(*batch_of())
    before = list(distiller.student.state_dict())
    distiller.prove = False
    assert distiller(*batch_of())["box_loss"] > 0
    assert list(distiller.student.state_dict()) == before


def test_losses_that_are_summed_are_refused():
    def loss(self: Any, batch: Any, preds: Any = None) -> Any:
        losses, logged = super(type(self), self).loss(batch, preds)
        return losses.sum(), logged

    with pytest.raises(ValueError, match=r"alone it has the losses \['sum'\], its pieces"):
        Distiller(teacher_of("yolo11n"), subclass(loss=loss), CrossKD())(*batch_of())


def test_a_criterion_of_ones_own_is_used():
    def init_criterion(self: Any) -> Any:
        criterion = super(type(self), self).init_criterion()
        criterion.hyp = type(criterion.hyp)(**{**vars(criterion.hyp), "box": 1.0})
        return criterion

    losses = Distiller(teacher_of("yolo11n"), subclass(init_criterion=init_criterion), CrossKD())(*batch_of())
    plain = distiller_of("yolo11n")(*batch_of())
    torch.testing.assert_close(losses["box_loss"], plain["box_loss"] / 7.5)


def test_a_forward_of_the_teachers_own_is_refused():
    teacher = teacher_of("yolo11n")

    class Brighter(type(teacher)):  # type: ignore[misc]
        def _predict_once(self, x: Tensor, *arguments: Any) -> Any:
            return super()._predict_once(1.5 * x, *arguments)

    teacher.__class__ = Brighter
    with pytest.raises(ValueError, match=r"teacher: Brighter's.*They part at model.0.conv"):
        Distiller(teacher, model_of("yolo11n"), CrossKD())(*batch_of())


def test_a_fused_teacher_is_refused():
    with pytest.raises(ValueError, match="teacher: the model was fused for inference"):
        Distiller(teacher_of("yolo11n").fuse(verbose=False), model_of("yolo11n"), CrossKD())


def test_other_models_are_refused():
    from ultralytics import YOLO
    from ultralytics.nn.tasks import SegmentationModel

    with pytest.raises(
        TypeError, match=r"teacher: a YOLO is not one of ultralytics' DetectionModels: hand in .* YOLO.model"
    ):
        Distiller(YOLO("yolo11n.yaml"), model_of("yolo11n"), CrossKD())
    with pytest.raises(TypeError, match="teacher: a SegmentationModel that ends in a Segment"):
        Distiller(SegmentationModel("yolo11n-seg.yaml", verbose=False), model_of("yolo11n"), CrossKD())
    with pytest.raises(TypeError, match="student: .*Linear"):
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
        (torch.rand(2, 3, 64, 72), "multiples of its coarsest stride, 32"),
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
