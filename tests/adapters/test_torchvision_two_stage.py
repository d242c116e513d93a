"""The adapter for torchvision's Faster R-CNN: both of its heads, on the student's own proposals."""

from __future__ import annotations

import copy
import importlib
import math
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import (
    FasterRCNN,
    KeypointRCNN,
    MaskRCNN,
    fasterrcnn_mobilenet_v3_large_320_fpn,
    fasterrcnn_resnet50_fpn_v2,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import roi_align

from crosskd import CrossKD, Distiller, PredictionMimicking, Schedule
from crosskd.adapters import TorchvisionFasterRCNNAdapter, find_adapter
from tests.blood_cells import average_precision, cells
from tests.helpers.tiny import STRIDES, tiny_retinanet
from tests.test_teacher_untouched import digest, flags
from tests.two_stages import ANCHORS, CLASSES, POOLED, REGIONS, tiny_faster_rcnn, two_stage_batch

OWN = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
RPN, BOX = ("kd_rpn_cls", "kd_rpn_reg"), ("kd_box_cls", "kd_box_reg")
NO_OBJECTS = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


class Watched(CrossKD):
    """CrossKD that remembers what it was given."""

    def forward(self, step):
        self.step = step
        return super().forward(step)


@pytest.fixture(params=[False, True], ids=["v1", "v2"])
def v2(request):
    """Which of torchvision's two forms."""
    return request.param


def pair(v2: bool = False, **options: Any) -> tuple[FasterRCNN, FasterRCNN]:
    """A teacher and a student of other weights."""
    return tiny_faster_rcnn(v2=v2, hidden=12, **options), tiny_faster_rcnn(v2=v2, seed=1, **options)


def seeded(model: nn.Module, *batch: Any) -> dict[str, Tensor]:
    """The losses with the random numbers, by which anchors and regions are sampled, of one seed."""
    torch.manual_seed(7)
    losses: dict[str, Tensor] = model(*batch)
    return losses


def of(losses: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    return torch.stack([losses[name] for name in names]).sum()


def has_gradient(module: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in module.parameters())


def assert_distils(teacher: nn.Module, student: nn.Module, methods: Any = None, **options: Any) -> Distiller:
    """One step in which every loss of the distillation is above 0 and reaches the student's backbone."""
    distiller = Distiller(teacher, student, methods or CrossKD(), **options)
    losses = seeded(distiller, *two_stage_batch())
    distilled = [loss for name, loss in losses.items() if "kd" in name]
    assert distilled
    assert all(loss.isfinite() for loss in losses.values())
    assert min(distilled) > 0
    torch.stack(distilled).sum().backward()
    assert has_gradient(student.backbone)
    return distiller


def test_the_adapter_is_found():
    assert isinstance(find_adapter(*pair()), TorchvisionFasterRCNNAdapter)
    assert not TorchvisionFasterRCNNAdapter().supports(tiny_retinanet())
    with pytest.raises(ValueError, match="of different families: torchvision's FasterRCNN"):
        Distiller(tiny_faster_rcnn(), tiny_retinanet(), CrossKD())


# -- the student's own losses -----------------------------------------------------------------------


@pytest.mark.parametrize("objects", [2, 1, 0], ids=["objects", "one image empty", "all images empty"])
@pytest.mark.parametrize("method", [CrossKD(), PredictionMimicking()])
def test_the_students_losses_are_those_of_plain_training(v2, objects, method):
    teacher, student = pair(v2, batch_norm=True)
    images, targets = two_stage_batch()
    batch = (images, [*targets[:objects], *[NO_OBJECTS] * (2 - objects)])
    expected = seeded(copy.deepcopy(student), *batch)
    losses = seeded(Distiller(teacher, student, method), *batch)
    assert losses.keys() == {*OWN, *RPN, *BOX}
    assert expected.keys() == OWN
    for name, loss in expected.items():
        assert torch.equal(losses[name], loss), name
    assert all(loss.isfinite() for loss in losses.values())


def test_their_gradients_are_those_of_plain_training(v2):
    teacher, student = pair(v2)
    twin = copy.deepcopy(student)
    of(seeded(twin, *two_stage_batch()), tuple(sorted(OWN))).backward()
    of(seeded(Distiller(teacher, student, CrossKD()), *two_stage_batch()), tuple(sorted(OWN))).backward()
    for (name, ours), plain in zip(student.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_in_eval_the_student_answers(v2):
    teacher, student = pair(v2)
    distiller = Distiller(teacher, student, CrossKD()).eval()
    images, _ = two_stage_batch()
    for ours, plain in zip(distiller(images), student(images), strict=True):
        assert all(torch.equal(ours[key], plain[key]) for key in plain)


def test_boxes_are_labelled_from_1_on():
    images, targets = two_stage_batch()
    targets[1]["labels"][0] = 0
    message = r"targets\[1\] has labels from 0 .* 4 classes, labelled 1 to 4 \(0 is the background\)"
    with pytest.raises(ValueError, match=message):
        Distiller(*pair(), CrossKD())(images, targets)


# -- a teacher that is the student's copy ------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_a_copy_of_the_teacher_has_nothing_to_learn(v2, position):
    """At every position its cross-head predictions are what the teacher predicts at the same places."""
    depths = {"rpn": 1 + v2, "box": 2 + v2}
    methods = [Watched(min(position, depth), part=part) for part, depth in depths.items()]
    teacher = tiny_faster_rcnn(v2=v2).double()
    distiller = Distiller(teacher, copy.deepcopy(teacher), methods)
    images, targets = two_stage_batch()
    losses = seeded(distiller, [image.double() for image in images], targets)
    assert all(losses[name] < 1e-5 for name in (*RPN, *BOX))
    for method in distiller.methods.values():
        # The alignment divides by a deviation to which 1e-6 is added.
        crossed, own = method.cross_head(method.step), method.step.teacher
        torch.testing.assert_close(crossed.logits, own.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(crossed.regression, own.regression, rtol=1e-4, atol=1e-5)


def test_the_teachers_own_predictions_are_torchvisions(v2):
    """On the same regions, bit for bit: towers and predictors run apart give what the heads give whole."""
    teacher, student = pair(v2)
    methods = [Watched(part="rpn"), Watched(part="box")]
    distiller = Distiller(teacher, student, methods)
    images, targets = two_stage_batch()
    seeded(distiller, images, targets)
    regions, sizes = regions_of(student, images, targets)
    teacher.eval()
    with torch.no_grad():
        maps = teacher.backbone(teacher.transform(images)[0].tensors)
        pooled = teacher.roi_heads.box_roi_pool(maps, regions, sizes)
        logits, deltas = teacher.roi_heads.box_predictor(teacher.roi_heads.box_head(pooled))
        objectness, rpn_deltas = teacher.rpn.head(list(maps.values()))
    rpn, box = (method.step.teacher for method in distiller.methods.values())
    assert torch.equal(box.logits[0], logits)
    assert torch.equal(box.regression[0].flatten(1), deltas)
    assert torch.equal(rpn.logits.squeeze(-1), by_location(objectness, 1).squeeze(-1))
    assert torch.equal(rpn.regression, by_location(rpn_deltas, 4))


def by_location(levels: list[Tensor], numbers: int) -> Tensor:
    """A level's (batch, anchors x numbers, height, width), all of them as (batch, anchors, numbers)."""
    rows = [
        level.unflatten(1, (-1, numbers)).permute(0, 3, 4, 1, 2).reshape(len(level), -1, numbers)
        for level in levels
    ]
    return torch.cat(rows, dim=1)


@torch.no_grad()
def regions_of(
    student: FasterRCNN, images: list[Tensor], targets: list[dict[str, Tensor]]
) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """The regions that plain training of the student samples after `seeded`, by torchvision's functions."""
    torch.manual_seed(7)
    batch, resized = student.transform(images, targets)
    proposals, _ = student.rpn(batch, student.backbone(batch.tensors), resized)
    regions, *_ = student.roi_heads.select_training_samples(proposals, resized)
    return regions, batch.image_sizes


# -- an independent calculation ----------------------------------------------------------------------


def aligned(student: Tensor, teacher: Tensor, dims: list[int]) -> Tensor:
    """The student's features with the teacher's mean and deviation over some dimensions."""
    own, theirs = student.mean(dims, keepdim=True), teacher.mean(dims, keepdim=True)
    deviation = student.std(dims, keepdim=True) + 1e-6
    return (student - own) / deviation * teacher.std(dims, keepdim=True) + theirs


def moved(boxes: Tensor, deltas: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Boxes (…, 4) moved and scaled by (…, 4) numbers."""
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    dx, dy, dw, dh = (deltas / torch.tensor(weights, dtype=deltas.dtype)).unbind(-1)
    x, y = boxes[..., 0] + width / 2 + dx * width, boxes[..., 1] + height / 2 + dy * height
    w, h = (side * d.clamp(max=math.log(1000 / 16)).exp() for side, d in ((width, dw), (height, dh)))
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    def area(low: Tensor, high: Tensor) -> Tensor:
        return (high - low).clamp(min=0).prod(-1)

    overlap = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - overlap
    hull = area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    return overlap / union - (hull - union) / hull


def pooled_by_hand(maps: list[Tensor], regions: list[Tensor]) -> Tensor:
    """Each region from the level that its size says, (regions, channels, POOLED, POOLED)."""
    rows = []
    for image, of_image in enumerate(regions):
        for region in of_image:
            size = math.sqrt(float((region[2] - region[0]) * (region[3] - region[1])))
            level = min(max(math.floor(4 + math.log2(size / 224) + 1e-6), 3), 5) - 3
            one = maps[level][image : image + 1]
            rows.append(roi_align(one, [region[None]], POOLED, 1 / STRIDES[level], sampling_ratio=2))
    return torch.cat(rows)


@pytest.fixture
def exact():
    """A pair in float64 with its batch."""
    teacher, student = (detector.double() for detector in pair())
    images, targets = two_stage_batch()
    images = [image.double() for image in images]
    targets = [{**target, "boxes": target["boxes"].double()} for target in targets]
    return teacher, student, images, targets


def test_the_box_heads_losses_by_hand(exact):
    """Features pooled from each model's own maps at the student's proposals, and the published formulas."""
    teacher, student, images, targets = exact
    distiller = Distiller(teacher, student, [CrossKD(part="box", cls_weight=0.5, reg_weight=2.0)])
    losses = seeded(distiller, images, targets)
    regions, _ = regions_of(student, images, targets)
    features = []
    for detector in (student, teacher):
        maps = list(detector.backbone(detector.transform(images)[0].tensors).values())
        head = detector.roi_heads.box_head
        features.append(F.relu(F.linear(pooled_by_hand(maps, regions).flatten(1), *head.fc6.parameters())))
    answers = []
    for vectors in (F.relu(aligned(features[0], features[1], [0])), features[1]):
        head, predictor = teacher.roi_heads.box_head, teacher.roi_heads.box_predictor
        last = F.relu(F.linear(vectors, *head.fc7.parameters()))
        deltas = F.linear(last, *predictor.bbox_pred.parameters()).view(-1, CLASSES, 4)
        boxes = moved(torch.cat(regions)[:, None], deltas, (10.0, 10.0, 5.0, 5.0))
        answers.append((F.linear(last, *predictor.cls_score.parameters()).softmax(-1), boxes))
    (p, boxes), (q, teacher_boxes) = answers
    count = sum(len(of_image) for of_image in regions)
    assert count == 2 * REGIONS
    cls = (0.5 * (p - q).abs().sum(-1) * -(q * p.log()).sum(-1)).sum() / count
    reg = (q[:, 1:] * (1 - generalized_iou(boxes, teacher_boxes)[:, 1:])).sum() / count
    torch.testing.assert_close(losses["kd_box_cls"], 0.5 * cls, rtol=1e-9, atol=0)
    torch.testing.assert_close(losses["kd_box_reg"], 2.0 * reg, rtol=1e-6, atol=0)


def test_the_rpns_losses_by_hand(exact):
    """Over the anchors that the student's own losses were sampled on, and divided by their number."""
    teacher, student, images, targets = exact
    sampled: list[Tensor] = []
    sampler = student.rpn.fg_bg_sampler

    def noting(labels: list[Tensor]) -> Any:
        chosen = sampler(labels)
        sampled[:] = [(a + b).bool() for a, b in zip(*chosen, strict=True)]
        return chosen

    student.rpn.fg_bg_sampler = noting
    losses = seeded(Distiller(teacher, student, CrossKD(part="rpn")), images, targets)
    assert student.rpn.fg_bg_sampler is noting
    batch = student.transform(images)[0]
    maps = [list(detector.backbone(batch.tensors).values()) for detector in (student, teacher)]
    head = teacher.rpn.head
    cls = reg = torch.zeros(())
    start = 0
    for ours, theirs in zip(*maps, strict=True):
        answers = []
        for features in (aligned(ours, theirs, [0, 2, 3]), theirs):
            tower = head.conv(features)
            answers.append((by_location([head.cls_logits(tower)], 1).squeeze(-1), head.bbox_pred(tower)))
        (own, deltas), (target, teacher_deltas) = answers
        stop = start + own.shape[1]
        counted = torch.stack(sampled)[:, start:stop]
        anchors = student.rpn.anchor_generator(batch, maps[0])[0][start:stop]
        p, q = own.sigmoid(), target.sigmoid()
        entropy = -(q * p.log() + (1 - q) * (1 - p).log())
        cls = cls + (counted * (p - q).abs() * entropy).sum()
        boxes = [moved(anchors, by_location([d], 4), (1.0,) * 4) for d in (deltas, teacher_deltas)]
        reg = reg + (counted * q * (1 - generalized_iou(*boxes))).sum()
        start = stop
    count = torch.stack(sampled).sum()
    assert count == 2 * ANCHORS
    torch.testing.assert_close(losses["kd_rpn_cls"], cls / count, rtol=1e-9, atol=0)
    torch.testing.assert_close(losses["kd_rpn_reg"], reg / count, rtol=1e-6, atol=0)


# -- what learns, and what doesn't -------------------------------------------------------------------


def test_the_box_heads_losses_reach_the_backbone_and_no_layer_behind_the_split(v2):
    teacher, student = pair(v2)
    of(seeded(Distiller(teacher, student, CrossKD()), *two_stage_batch()), BOX).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.backbone.parameters())
    assert has_gradient(student.backbone)
    head = student.roi_heads.box_head
    before, behind = (list(head.modules())[1], head[-2]) if v2 else (head.fc6, head.fc7)
    assert has_gradient(before)
    for module in (behind, student.roi_heads.box_predictor, student.rpn):
        assert not has_gradient(module)


def test_the_rpns_losses_reach_the_backbone_alone(v2):
    """At their default position of v1, 0, which is the tower's input; of v2 it is 1."""
    teacher, student = pair(v2)
    of(seeded(Distiller(teacher, student, CrossKD()), *two_stage_batch()), RPN).backward()
    assert has_gradient(student.backbone)
    assert [has_gradient(block) for block in student.rpn.head.conv] == ([True, False] if v2 else [False])
    for module in (student.rpn.head.cls_logits, student.rpn.head.bbox_pred, student.roi_heads):
        assert not has_gradient(module)


def test_mimicking_reaches_the_students_own_predictors(v2):
    teacher, student = pair(v2)
    losses = seeded(Distiller(teacher, student, PredictionMimicking()), *two_stage_batch())
    of(losses, (*RPN, *BOX)).backward()
    head, predictor = student.rpn.head, student.roi_heads.box_predictor
    modules = (head.cls_logits, head.bbox_pred, predictor.cls_score, predictor.bbox_pred, student.backbone)
    assert all(has_gradient(module) for module in modules)


@pytest.mark.parametrize("method", [CrossKD(), PredictionMimicking()])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_training_changes_nothing_of_the_teacher(v2, method, training):
    teacher, student = pair(v2, batch_norm=True)
    teacher.train(training)
    pool = vars(teacher.roi_heads.box_roi_pool).copy()
    cells = teacher.rpn.anchor_generator.cell_anchors
    before, flags_before, own = digest(teacher), flags(teacher), digest(student)
    distiller = Distiller(teacher, student, method)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
    for step in range(2):
        sum(distiller(*two_stage_batch(seed=step)).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert digest(teacher) == before == digest(distiller.teacher)
    assert flags(teacher) == flags_before
    assert vars(teacher.roi_heads.box_roi_pool) == pool
    assert teacher.rpn.anchor_generator.cell_anchors is cells
    changed = {name for name, value in digest(student).items() if value != own[name]}
    assert changed >= {name for name, _ in student.named_parameters()}


# -- parts ------------------------------------------------------------------------------------------


def test_each_part_has_its_weights_and_position(v2):
    teacher, student = pair(v2)
    plain = seeded(Distiller(teacher, student, CrossKD()), *two_stage_batch())
    methods = [CrossKD(part="rpn", cls_weight=0.5), CrossKD(part="box", position=0, reg_weight=3.0)]
    distiller = Distiller(teacher, student, methods)
    losses = seeded(distiller, *two_stage_batch())
    assert losses.keys() == plain.keys()
    torch.testing.assert_close(losses["kd_rpn_cls"], 0.5 * plain["kd_rpn_cls"])
    assert torch.equal(losses["kd_rpn_reg"], plain["kd_rpn_reg"])
    alone = seeded(Distiller(teacher, student, CrossKD(position=0)), *two_stage_batch())
    assert torch.equal(losses["kd_box_cls"], alone["kd_box_cls"])
    torch.testing.assert_close(losses["kd_box_reg"], 3.0 * alone["kd_box_reg"])
    assert losses["kd_box_cls"] != plain["kd_box_cls"]
    assert [m.part for m in methods] == ["rpn", "box"]


@pytest.mark.parametrize(("part", "position"), [("rpn", (0, 0)), ("box", (1, 1))])
def test_by_default_the_last_block_is_left_to_the_teacher(part, position):
    assert Distiller(*pair(), CrossKD(part=part)).methods[f"crosskd_{part}"].position == position


def test_the_two_forms_teach_each_other():
    """A vector can't be read as a map: v1's student ends before its first layer where the teacher is v2."""
    v1, v2 = tiny_faster_rcnn(), tiny_faster_rcnn(v2=True, seed=1)
    position = {}
    for name, (teacher, student) in {"v2 from v1": (v1, v2), "v1 from v2": (v2, v1)}.items():
        distiller = assert_distils(teacher, copy.deepcopy(student), [CrossKD(part="box")])
        position[name] = distiller.methods["crosskd_box"].position
    assert position == {"v2 from v1": (3, 1), "v1 from v2": (0, 2)}


def test_a_map_is_not_read_as_a_vector():
    message = r"box branch is split where features are maps \(teacher, after block 2\) and vectors \(student"
    with pytest.raises(ValueError, match=message):
        Distiller(tiny_faster_rcnn(v2=True), tiny_faster_rcnn(), CrossKD(position=(1, 2), part="box"))


class Calls:
    """Counts how often a module is run."""

    def __init__(self, module: nn.Module) -> None:
        self.number = 0
        module.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.number += 1


@pytest.mark.parametrize("part", ["rpn", "box"])
@pytest.mark.parametrize("method", [CrossKD, PredictionMimicking])
def test_the_teachers_other_head_is_not_run(part, method):
    teacher, student = pair()
    distiller = Distiller(teacher, student, method(part=part))
    rpn, box = distiller.teacher.rpn.head.cls_logits, distiller.teacher.roi_heads.box_predictor.cls_score
    calls = {"rpn": Calls(rpn), "box": Calls(box)}
    losses = seeded(distiller, *two_stage_batch())
    assert losses.keys() == {*OWN, *(RPN if part == "rpn" else BOX)}
    assert [name for name, counted in calls.items() if counted.number] == [part]
    both = seeded(Distiller(teacher, student, method()), *two_stage_batch())
    assert all(torch.equal(loss, both[name]) for name, loss in losses.items())


def other_anchors(teacher: bool = False) -> AnchorGenerator:
    return AnchorGenerator(tuple((3 * stride,) for stride in STRIDES), ((0.5, 1.0),) * 3)


def test_for_the_box_head_alone_neither_anchors_nor_levels_must_agree():
    teacher = tiny_faster_rcnn(hidden=12, levels=(1, 2), rpn_anchor_generator=two_levels_of_anchors())
    assert_distils(teacher, tiny_faster_rcnn(seed=1), CrossKD(part="box"))
    with pytest.raises(ValueError, match=r"strides differ: \[16.0, 32.0\] \(teacher\), \[8.0, 16.0, 32.0\]"):
        Distiller(teacher, tiny_faster_rcnn(seed=1), CrossKD())


def two_levels_of_anchors() -> AnchorGenerator:
    return AnchorGenerator(((20,), (40,)), ((1.0,),) * 2)


def test_for_the_rpn_alone_the_box_heads_may_differ_in_everything():
    teacher = tiny_faster_rcnn(CLASSES + 3, hidden=12, pooled=2, bbox_reg_weights=(1.0, 1.0, 1.0, 1.0))
    teacher.roi_heads.box_predictor = nn.Linear(24, 5)
    assert_distils(teacher, tiny_faster_rcnn(seed=1), CrossKD(part="rpn"))


def test_classes_have_no_map_where_the_rpn_alone_is_distilled():
    with pytest.raises(ValueError, match="class_map= is for the 'box' head, which no method distils"):
        Distiller(*pair(), CrossKD(part="rpn"), class_map=range(CLASSES))


def test_parts_that_are_none():
    with pytest.raises(ValueError, match="part='roi' is none of this detector's; choose from rpn, box"):
        Distiller(*pair(), CrossKD(part="roi"))
    with pytest.raises(ValueError, match="part='rpn' is none of this detector's; it has one head alone"):
        Distiller(tiny_retinanet(), tiny_retinanet(seed=1), CrossKD(part="rpn"))


def test_names_of_losses_where_methods_share_a_part():
    methods = [CrossKD(), PredictionMimicking(part="box", name="mimic")]
    losses = seeded(Distiller(*pair(), methods), *two_stage_batch())
    box = {f"{prefix}_{name}" for prefix in ("crosskd", "mimic") for name in BOX}
    assert losses.keys() == {*OWN, *RPN, *box}


@pytest.mark.parametrize("name", ["rpn", "my_rpn", "my_rpn_kd", "crosskd_box_2"])
def test_names_that_hold_a_part_stay_as_they_are(name):
    methods = [CrossKD(part="rpn", name=name), CrossKD(part="rpn", name="other")]
    losses = seeded(Distiller(*pair(), methods), *two_stage_batch())
    assert losses.keys() - OWN == {f"{prefix}_{key}" for prefix in (name, "other") for key in RPN}


def test_each_part_has_its_schedule():
    stopped = CrossKD(part="rpn", schedule=Schedule(stop=1))
    distiller = Distiller(*pair(), [stopped, CrossKD(part="box")])
    calls = Calls(distiller.teacher.rpn.head.cls_logits)
    first, second = (distiller(*two_stage_batch()) for _ in range(2))
    levels = len(STRIDES)
    assert calls.number == 2 * levels  # the teacher's own predictions and the cross-head's, once
    for name in RPN:
        assert first[name] > 0
        assert second[name] == 0
    assert min(second[name] for name in BOX) > 0
    sum(second.values()).backward()


def test_with_every_part_stopped_the_student_trains_alone():
    teacher, student = pair()
    expected = seeded(copy.deepcopy(student), *two_stage_batch())
    distiller = Distiller(teacher, student, CrossKD(schedule=Schedule(stop=1)))
    distiller(*two_stage_batch())
    losses = seeded(distiller, *two_stage_batch())
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
    assert all(losses[name] == 0 for name in (*RPN, *BOX))


# -- batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [CrossKD, PredictionMimicking])
def test_images_without_labels(v2, method):
    teacher, student = pair(v2)
    losses = seeded(Distiller(teacher, student, method()), two_stage_batch()[0])
    assert losses.keys() == {*RPN, *BOX}
    assert all(loss.isfinite() for loss in losses.values())
    assert min(losses.values()) > 0
    sum(losses.values()).backward()
    assert has_gradient(student.backbone)


def test_images_without_labels_are_sampled_as_labelled_ones():
    distiller = Distiller(*pair(), [Watched(part="rpn"), Watched(part="box")], unlabelled_threshold=0.5)
    seeded(distiller, two_stage_batch(3)[0])
    rpn, box = (method.step for method in distiller.methods.values())
    counted = rpn.assignment.counted
    assert counted.sum(dim=1).tolist() == [ANCHORS] * 3
    assert rpn.assignment.normalizer == 3 * ANCHORS
    sure = rpn.teacher.confidence() >= 0.5
    assert torch.equal(rpn.assignment.positive, sure)
    assert all(((counted > 0) & sure).sum(dim=1) <= ANCHORS // 2)
    assert all(0 < count <= REGIONS for count in box.counts)
    assert box.assignment.normalizer == sum(box.counts) == box.student.logits.shape[1]
    assert torch.equal(box.assignment.positive, box.teacher.confidence() >= 0.5)


def test_labelled_regions_are_counted_by_image():
    distiller = Distiller(*pair(), [Watched(part="rpn"), Watched(part="box")])
    seeded(distiller, *two_stage_batch(3))
    rpn, box = (method.step for method in distiller.methods.values())
    assert rpn.counts is None
    assert box.counts == (REGIONS,) * 3
    assert box.student.logits.shape == (1, 3 * REGIONS, CLASSES)
    assert 0 < box.assignment.positive.sum() < 3 * REGIONS


def test_a_batch_of_one(v2):
    distiller = Distiller(*pair(v2), CrossKD())
    losses = seeded(distiller, *two_stage_batch(1))
    assert all(loss.isfinite() for loss in losses.values())
    assert min(losses[name] for name in (*RPN, *BOX)) > 0


def test_images_of_several_sizes(v2):
    images, targets = two_stage_batch()
    teacher, student = pair(v2)
    batch = ([images[0][:, :40], images[1][:, :, :48]], targets)
    expected = seeded(copy.deepcopy(student), *batch)
    losses = seeded(Distiller(teacher, student, CrossKD()), *batch)
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
    assert min(losses[name] for name in (*RPN, *BOX)) > 0


def test_each_detector_has_its_own_normalisation_of_pixels():
    teacher, student = pair()
    teacher.transform.image_mean, teacher.transform.image_std = [0.0] * 3, [1.0] * 3
    seen: list[Tensor] = []
    distiller = Distiller(teacher, student, CrossKD())
    distiller.teacher.backbone.register_forward_pre_hook(lambda _, pixels: seen.append(pixels[0]))
    images, targets = two_stage_batch()
    seeded(distiller, images, targets)
    torch.testing.assert_close(seen[0], torch.stack(images), rtol=1e-5, atol=1e-5)


# -- pairs that differ --------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", [(24, 24), (32, 24), (24, 32)])
@pytest.mark.parametrize("widths", [(16, 16), (32, 16), (16, 32)])
def test_widths_that_differ_are_projected(v2, widths, vectors):
    teacher = tiny_faster_rcnn(v2=v2, width=widths[0], vector=vectors[0], hidden=12)
    student = tiny_faster_rcnn(v2=v2, width=widths[1], vector=vectors[1], seed=1)
    distiller = assert_distils(teacher, student)
    projected = [name for name, method in distiller.methods.items() if len(method.projections)]
    # The box head's split is behind a linear layer (v1) or behind convolutions (v2).
    at_the_split = widths if v2 else vectors
    expected = {"crosskd_rpn": widths[0] != widths[1], "crosskd_box": at_the_split[0] != at_the_split[1]}
    assert projected == [name for name, differs in expected.items() if differs]


def test_a_student_may_lack_some_of_the_teachers_levels():
    teacher = tiny_faster_rcnn(hidden=12)
    assert_distils(teacher, tiny_faster_rcnn(levels=(1, 2), seed=1))


def with_classes(detector: FasterRCNN, order: list[int]) -> FasterRCNN:
    """The same detector with its classes in another order."""
    twin = copy.deepcopy(detector)
    predictor = twin.roi_heads.box_predictor
    rows = torch.tensor([4 * index + side for index in order for side in range(4)])
    for layer, kept in ((predictor.cls_score, torch.tensor(order)), (predictor.bbox_pred, rows)):
        layer.weight, layer.bias = nn.Parameter(layer.weight[kept]), nn.Parameter(layer.bias[kept])
        layer.out_features = len(kept)
    return twin


@pytest.mark.parametrize("method", [CrossKD(), PredictionMimicking()])
def test_a_class_map_is_the_teacher_with_its_classes_so_ordered(method):
    teacher, student = pair()
    order = [0, 3, 1, 4, 2]
    expected = seeded(Distiller(with_classes(teacher, order), student, method), *two_stage_batch())
    losses = seeded(Distiller(teacher, student, method, class_map=order), *two_stage_batch())
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, msg=name)


@pytest.mark.parametrize("method", [Watched(part="box"), PredictionMimicking(part="box")])
def test_what_the_student_does_not_know_is_background_to_it(method):
    """A region of a class that the student lacks has no object for it, however sure the teacher is."""
    teacher, student = tiny_faster_rcnn(CLASSES + 2, hidden=12), tiny_faster_rcnn(seed=1)
    order = [0, 5, 2, 6, 1]
    with torch.no_grad():
        teacher.roi_heads.box_predictor.cls_score.bias[3:5] = 6.0
    distiller = Distiller(teacher, student, method, class_map=order)
    losses = seeded(distiller, *two_stage_batch())
    assert min(losses[name] for name in BOX) > 0
    if isinstance(method, Watched):
        images, targets = two_stage_batch()
        regions, sizes = regions_of(student, images, targets)
        teacher.eval()
        maps = teacher.backbone(teacher.transform(images)[0].tensors)
        pooled = teacher.roi_heads.box_roi_pool(maps, regions, sizes)
        logits, _ = teacher.roi_heads.box_predictor(teacher.roi_heads.box_head(pooled))
        q = logits.softmax(-1)
        expected = torch.cat([q[:, [0, 3, 4]].sum(-1, keepdim=True), q[:, order[1:]]], dim=-1)
        step = distiller.methods["crosskd_box"].step
        torch.testing.assert_close(step.teacher.logits[0].softmax(-1), expected)
        assert step.teacher.confidence().max() < 0.5


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        (None, "the teacher predicts 7 classes and the student 5: give class_map="),
        ([1, 0, 2, 3, 4], r"class 0 means no object, .*class_map\[0\] = 0; got \[1, 0, 2, 3, 4\]"),
        ([0, 1, 2, 3], "class_map must name a class of the teacher's, 0 to 6, for each of the student's 5"),
    ],
)
def test_class_maps_that_are_refused(class_map, message):
    with pytest.raises(ValueError, match=message):
        Distiller(tiny_faster_rcnn(7), tiny_faster_rcnn(), CrossKD(), class_map=class_map)


def same(images: Any, targets: Any) -> Any:
    return images


def test_the_teacher_may_see_the_images_larger():
    """Its own maps are of twice the size, and so are the regions in them."""
    teacher = tiny_faster_rcnn(side=128, hidden=12)
    student = tiny_faster_rcnn(seed=1)
    distiller = Distiller(teacher, student, CrossKD(part="box"), teacher_view=same)
    pooled: list[Any] = []
    for detector in (distiller.teacher, student):
        detector.roi_heads.box_roi_pool.register_forward_pre_hook(lambda _, given: pooled.append(given))
    images, targets = two_stage_batch()
    losses = seeded(distiller, [images[0], images[1][:, :48]], targets)
    assert min(losses[name] for name in BOX) > 0
    (maps, regions, sizes), (own_maps, own_regions, own_sizes) = pooled
    assert maps["0"].shape[-1] == 2 * own_maps["0"].shape[-1]
    assert sizes == [(128, 128), (96, 128)]
    assert own_sizes == [(64, 64), (48, 64)]
    assert all(torch.equal(a, 2 * b) for a, b in zip(regions, own_regions, strict=True))


def test_a_view_of_the_same_size_changes_nothing():
    teacher, student = pair()
    losses = [
        seeded(Distiller(teacher, student, CrossKD(), teacher_view=view), *two_stage_batch())
        for view in (None, same)
    ]
    assert all(torch.equal(loss, losses[1][name]) for name, loss in losses[0].items())


def test_levels_of_twice_the_stride_at_twice_the_size():
    """Both heads: anchors and regions of the teacher are the student's times two."""
    teacher = tiny_faster_rcnn(side=128, levels=(1, 2), hidden=12)
    assert_distils(teacher, tiny_faster_rcnn(levels=(0, 1), seed=1), teacher_view=same)


def test_levels_of_another_size_are_resized_if_asked():
    """The RPN's features are resized to the student's; regions are scaled to the teacher's images."""
    teacher = tiny_faster_rcnn(side=96, hidden=12)
    with pytest.raises(ValueError, match="levels differ: .* or have the teacher's resized by resize_levels"):
        assert_distils(teacher, tiny_faster_rcnn(seed=1), teacher_view=same)
    assert_distils(teacher, tiny_faster_rcnn(seed=1), teacher_view=same, resize_levels=True)


@pytest.mark.slow
def test_torchvisions_own_builders():
    """Full-size backbones with random weights: v2 on a ResNet-50 from MobileNet's, the box head alone."""
    options = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
    sizes = {"min_size": 64, "max_size": 64, "box_batch_size_per_image": 32}
    teacher = fasterrcnn_resnet50_fpn_v2(**options, **sizes)
    student = fasterrcnn_mobilenet_v3_large_320_fpn(**options, **sizes)
    for detector in (teacher, student):
        nn.init.normal_(detector.roi_heads.box_predictor.cls_score.weight, std=0.3)
    assert_distils(teacher, student, CrossKD(part="box"))
    assert_distils(teacher, fasterrcnn_resnet50_fpn_v2(**options, **sizes), PredictionMimicking())


# -- refused at construction --------------------------------------------------------------------------


def refused(teacher: nn.Module, student: nn.Module, message: str, methods: Any = None) -> None:
    with pytest.raises(ValueError, match=message):
        Distiller(teacher, student, methods or CrossKD())


def derived(kind: type[FasterRCNN], **heads: bool) -> FasterRCNN:
    """A Faster R-CNN that has become one of another class, with its further head."""
    detector = tiny_faster_rcnn()
    detector.__class__ = kind
    for name in heads:
        for suffix in ("roi_pool", "head", "predictor"):
            setattr(detector.roi_heads, f"{name}_{suffix}", nn.Identity())
    return detector


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("part", [None, "rpn", "box"])
@pytest.mark.parametrize(("kind", "name"), [(MaskRCNN, "mask"), (KeypointRCNN, "keypoint")])
def test_detectors_with_further_heads(side, part, kind, name):
    detectors = {"teacher": tiny_faster_rcnn(), "student": tiny_faster_rcnn()}
    detectors[side] = derived(kind, **{name: True})
    message = f"{side}: a {kind.__name__}, whose {name} head this adapter does not train: use a FasterRCNN"
    refused(detectors["teacher"], detectors["student"], message, CrossKD(part=part))


def test_anchors_that_differ():
    student = tiny_faster_rcnn(rpn_anchor_generator=other_anchors())
    message = r"anchor sizes differ: \(\(16.0,\), .* \(teacher\), \(\(24.0,\).* \(student\).*anchor_generator"
    refused(tiny_faster_rcnn(), student, message)
    student = tiny_faster_rcnn()
    student.rpn.anchor_generator.aspect_ratios = ((1.0,),) * 3
    refused(tiny_faster_rcnn(), student, r"anchor aspect_ratios differ: .* \(teacher\), .* \(student\)")


def test_channels_of_images_that_differ():
    student = tiny_faster_rcnn(image_mean=[0.5], image_std=[0.5])
    student.backbone.backbone.stem[0][0] = nn.Conv2d(1, 8, 3, stride=2, padding=1)
    message = r"images' channels differ: 3 \(teacher\), 1 \(student\)"
    refused(tiny_faster_rcnn(), student, message)
    # For the box head alone anchors needn't agree, but the pixels must: seen with the first of them.
    images, targets = two_stage_batch()
    distiller = Distiller(tiny_faster_rcnn(seed=1), student, CrossKD(part="box"))
    with pytest.raises(ValueError, match=message):
        distiller([image[:1] for image in images], targets)


class ShiftedAnchors(AnchorGenerator):
    """Of the same sizes and ratios, at other places."""

    def forward(self, image_list, feature_maps):
        return [anchors + 1 for anchors in super().forward(image_list, feature_maps)]


def test_anchors_at_other_places_are_refused_on_the_first_step():
    student = tiny_faster_rcnn()
    student.rpn.anchor_generator.__class__ = ShiftedAnchors
    with pytest.raises(ValueError, match="anchors differ on the first batch"):
        Distiller(tiny_faster_rcnn(), student, CrossKD())(*two_stage_batch())
    assert_distils(tiny_faster_rcnn(hidden=12), student, CrossKD(part="box"))


@pytest.mark.parametrize("v2", [False, True])
def test_regions_pooled_to_another_size(v2):
    message = (
        r"regions are pooled to \(3, 3\) \(teacher\), \(2, 2\) \(student\) as \(height, width\): give both"
    )
    refused(tiny_faster_rcnn(v2=v2), tiny_faster_rcnn(v2=v2, pooled=2), message)


@pytest.mark.parametrize("path", ["rpn", "roi_heads"])
def test_box_coding_that_differs(path):
    student = tiny_faster_rcnn()
    student.get_submodule(path).box_coder.weights = (2.0, 2.0, 1.0, 1.0)
    refused(
        tiny_faster_rcnn(), student, r"box coding differs: .* \(teacher\), .*2\.0, 2\.0.* \(student\).*train"
    )


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_predictors_of_another_kind(side):
    detectors = {"teacher": tiny_faster_rcnn(), "student": tiny_faster_rcnn()}
    detectors[side].roi_heads.box_predictor = nn.Linear(24, 5)
    message = (
        f"{side}: roi_heads.box_predictor is a Linear: this adapter knows torchvision's FastRCNNPredictor"
    )
    refused(detectors["teacher"], detectors["student"], message)


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize(
    "path", ["", "rpn", "rpn.head", "roi_heads", "roi_heads.box_head", "roi_heads.box_predictor"]
)
@pytest.mark.parametrize("part", [None, "rpn", "box"])
def test_parts_with_a_forward_of_their_own(side, path, part):
    """The student runs both heads, whichever is distilled; the teacher's other one doesn't matter."""
    detectors = {"teacher": tiny_faster_rcnn(), "student": tiny_faster_rcnn()}
    module = detectors[side].get_submodule(path)
    module.forward = types.MethodType(type(module).forward, module)
    head = {"rpn.head": "rpn", "roi_heads.box_head": "box", "roi_heads.box_predictor": "box"}.get(path)
    if side == "teacher" and None not in (part, head) and part != head:
        Distiller(detectors["teacher"], detectors["student"], CrossKD(part=part))
        return
    message = f"{side}: {path or 'the detector'} is a {type(module).__name__} with a forward of its own"
    refused(detectors["teacher"], detectors["student"], message, CrossKD(part=part))


@pytest.mark.parametrize("part", ["rpn", "box", None])
def test_positions_that_a_tower_does_not_have(part):
    message = "position 3 does not fit the rpn tower of 1 blocks"
    if part == "box":
        message = "position 3 does not fit the box tower of 2 blocks"
    refused(*pair(), message, CrossKD(position=3, part=part))


class SilentNetwork(RegionProposalNetwork):
    """Samples no anchors."""

    def compute_loss(self, objectness, deltas, labels, targets):
        return objectness.mean(), deltas.mean()


def test_a_network_that_samples_in_its_own_way_is_refused():
    student = tiny_faster_rcnn(seed=1)
    student.rpn.__class__ = SilentNetwork
    message = "student: SilentNetwork.compute_loss did not call fg_bg_sampler, so.*write an adapter"
    with pytest.raises(ValueError, match=message):
        Distiller(tiny_faster_rcnn(), student, CrossKD())(*two_stage_batch())


def test_derived_parts_without_a_forward_of_their_own_distil():
    student = tiny_faster_rcnn(seed=1)
    predictor = student.roi_heads.box_predictor
    predictor.__class__ = type("Derived", (FastRCNNPredictor,), {})
    student.__class__ = type("Derived", (FasterRCNN,), {})
    assert_distils(tiny_faster_rcnn(hidden=12), student)


# -- a module like any other --------------------------------------------------------------------------


def test_the_state_is_the_students_and_the_projections():
    student = tiny_faster_rcnn(seed=1)
    distiller = Distiller(tiny_faster_rcnn(width=32, vector=32), student, CrossKD())
    projections = {
        f"methods.crosskd_{part}.projections.{part}.convolution.{name}"
        for part in ("rpn", "box")
        for name in ("weight", "bias")
    }
    state = distiller.state_dict()
    assert state.keys() == {*(f"student.{key}" for key in tiny_faster_rcnn().state_dict()), *projections}
    plain = tiny_faster_rcnn()
    plain.load_state_dict(student.state_dict())


def test_a_saved_distiller_goes_on_where_it_was(tmp_path):
    teacher = tiny_faster_rcnn(width=32, hidden=12)
    distiller = Distiller(teacher, tiny_faster_rcnn(seed=1), CrossKD())
    torch.save(distiller.state_dict(), tmp_path / "distiller.pt")
    other = Distiller(teacher, tiny_faster_rcnn(seed=2), CrossKD())
    other.load_state_dict(torch.load(tmp_path / "distiller.pt", weights_only=True))
    expected, losses = (seeded(d, *two_stage_batch()) for d in (distiller, other))
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())


def test_a_deep_copy_is_a_distiller_of_its_own():
    distiller = Distiller(*pair(), CrossKD())
    twin = copy.deepcopy(distiller)
    expected, losses = (seeded(d, *two_stage_batch()) for d in (distiller, twin))
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
    of(losses, BOX).backward()
    assert not has_gradient(distiller.student)


@pytest.mark.parametrize("method", [CrossKD, PredictionMimicking])
def test_autocast(v2, method):
    teacher, student = pair(v2, batch_norm=True)
    twin = copy.deepcopy(student)
    distiller = Distiller(teacher, student, method())
    with torch.autocast("cpu", torch.bfloat16):
        expected = seeded(twin, *two_stage_batch())
        losses = seeded(distiller, *two_stage_batch())
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
    assert {losses[name].dtype for name in (*RPN, *BOX)} == {torch.float32}
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert has_gradient(student.backbone)


@pytest.mark.slow
def test_compiled_it_gives_the_same_losses():
    teacher, student = pair()
    distiller = Distiller(teacher, student, CrossKD())
    expected = seeded(distiller, *two_stage_batch())
    torch._dynamo.reset()
    losses = seeded(torch.compile(distiller, backend="aot_eager"), *two_stage_batch())
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-4, atol=1e-6, msg=name)
    sum(losses.values()).backward()
    assert has_gradient(student.backbone)
    torch._dynamo.reset()


# -- on real images -----------------------------------------------------------------------------------


def trained(model: nn.Module, images: Tensor, targets: list[dict[str, Tensor]], steps: int) -> nn.Module:
    """A model after some steps of four images each."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (4,)).tolist()
        optimizer.zero_grad()
        losses = model(images[batch], [targets[index] for index in batch])
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return model


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_student_gets_better_on_real_images():
    """From random weights, on 64 images, measured on 36 others; docs/two_stages.md has the numbers."""
    _, images, targets = cells("train", 64, first_label=1)
    dataset, test_images, _ = cells("test", 36, first_label=1)
    build_detector = importlib.import_module("models").build_detector

    def build(width: int) -> nn.Module:
        torch.manual_seed(0)
        options = {"anchor_scale": 0.25, "regions": 32, "short_side": [96]}
        return build_detector("fasterrcnn_resnet18", 4, width=width, **options)

    teacher = trained(build(64), images, targets, steps=160)
    student = build(32)
    measured = {"teacher": average_precision(teacher, dataset, test_images)}
    measured["start"] = average_precision(student, dataset, test_images)
    alone = trained(copy.deepcopy(student), images, targets, steps=80)
    measured["alone"] = average_precision(alone, dataset, test_images)
    trained(Distiller(teacher, student, CrossKD()), images, targets, steps=80)
    measured["distilled"] = average_precision(student, dataset, test_images)
    for name, metrics in measured.items():
        print(name, {key: round(metrics[key], 1) for key in ("AP", "AP50")})
    assert measured["distilled"]["AP50"] > measured["start"]["AP50"] + 5
