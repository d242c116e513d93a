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
from torchvision.models.detection import roi_heads as torchvision_roi_heads
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign, roi_align

from crosskd import PKD, CrossKD, Distiller, PredictionMimicking, Schedule
from crosskd.adapters import TorchvisionFasterRCNN, find_adapter
from crosskd.step import Step
from tests.helpers.blood_cells import average_precision, cells
from tests.helpers.conformance import assert_green
from tests.helpers.tiny import STRIDES, tiny_retinanet
from tests.helpers.two_stages import ANCHORS, CLASSES, POOLED, REGIONS, tiny_faster_rcnn, two_stage_batch

OWN = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
RPN, BOX = ("kd_rpn_cls", "kd_rpn_reg"), ("kd_box_cls", "kd_box_reg")
NO_OBJECTS = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


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


def steps_of(distiller: Distiller, images: Any, targets: Any = None) -> tuple[Step, ...]:
    """What each method sees of a step with the random numbers of `seeded`."""
    torch.manual_seed(7)
    return tuple(distiller.trace(images, targets).steps.values())


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


def test_the_adapter_kit_is_green(v2):
    assert_green(
        TorchvisionFasterRCNN,
        *two_stage_batch(),
        teacher=tiny_faster_rcnn(v2=v2, width=32, vector=32, hidden=12, batch_norm=True),
        student=tiny_faster_rcnn(v2=v2, batch_norm=True, seed=1),
    )


def test_what_it_reads_off_a_detector(v2):
    adapter = find_adapter(tiny_faster_rcnn(v2=v2, vector=20))
    assert isinstance(adapter, TorchvisionFasterRCNN)
    rpn, box = adapter.heads
    assert (rpn.name, rpn.head_type, rpn.num_classes, rpn.rows) == ("rpn", "RPN", 1, "grid")
    assert (box.name, box.head_type, box.num_classes, box.rows) == ("box", "box head", CLASSES, "regions")
    assert (rpn.background, box.background, box.pooled) == (None, 0, (POOLED, POOLED))
    assert (adapter.strides, adapter.widths) == ((8, 16, 32), (16, 16, 16))
    towers = [head.branches[0].towers[0] for head in adapter.heads]
    assert [len(tower.blocks) for tower in towers] == [1 + v2, 2 + v2]
    assert [tower.width(len(tower.blocks)) for tower in towers] == [16, 20]


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


def test_boxes_are_labelled_from_1_on():
    images, targets = two_stage_batch()
    targets[1]["labels"][0] = 0
    message = r"targets\[1\] has labels from 0 .* 4 classes, labelled 1 to 4 \(0 is the background\)"
    with pytest.raises(ValueError, match=message):
        Distiller(*pair(), CrossKD())(images, targets)


class Counting(RegionProposalNetwork):
    """Weights its loss by the number of its steps."""

    steps = 0

    def compute_loss(self, objectness, deltas, labels, targets):
        self.steps += 1
        return tuple(self.steps * loss for loss in super().compute_loss(objectness, deltas, labels, targets))


def test_losses_of_the_detectors_own_run_on_the_detector(monkeypatch):
    """A loss of the network's own, and one that is patched into torchvision."""
    torchvisions = torchvision_roi_heads.fastrcnn_loss
    monkeypatch.setattr(
        torchvision_roi_heads, "fastrcnn_loss", lambda *a: tuple(3 * loss for loss in torchvisions(*a))
    )
    student = tiny_faster_rcnn(seed=1)
    student.rpn.__class__ = Counting
    plain = copy.deepcopy(student)
    distiller = Distiller(tiny_faster_rcnn(), student, CrossKD())
    for step in (1, 2):
        expected, losses = (seeded(model, *two_stage_batch()) for model in (plain, distiller))
        assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
        assert student.rpn.steps == step
    assert not {"box_head", "box_predictor", "box_roi_pool"} & vars(student.roi_heads).keys()


# -- a teacher that is the student's copy ------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_a_copy_of_the_teacher_has_nothing_to_learn(v2, position):
    """At every position its cross-head predictions are what the teacher predicts at the same places."""
    depths = {"rpn": 1 + v2, "box": 2 + v2}
    methods = [CrossKD(min(position, depth), head=head) for head, depth in depths.items()]
    teacher = tiny_faster_rcnn(v2=v2).double()
    distiller = Distiller(teacher, copy.deepcopy(teacher), methods)
    images, targets = two_stage_batch()
    batch = [image.double() for image in images], targets
    losses = seeded(distiller, *batch)
    assert all(losses[name] < 1e-5 for name in (*RPN, *BOX))
    for method, step in zip(distiller.methods.values(), steps_of(distiller, *batch), strict=True):
        # The alignment divides by a deviation to which 1e-6 is added.
        crossed, own = method.cross_head(step), step.teacher.predictions
        torch.testing.assert_close(crossed.logits, own.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(crossed.regression, own.regression, rtol=1e-4, atol=1e-5)


def test_the_teachers_own_predictions_are_torchvisions(v2):
    """On the same regions, bit for bit: towers and predictors run apart give what the heads give whole."""
    teacher, student = pair(v2)
    images, targets = two_stage_batch()
    steps = steps_of(Distiller(teacher, student, CrossKD()), images, targets)
    regions, sizes = regions_of(student, images, targets)
    teacher.eval()
    with torch.no_grad():
        maps = teacher.backbone(teacher.transform(images)[0].tensors)
        pooled = teacher.roi_heads.box_roi_pool(maps, regions, sizes)
        logits, deltas = teacher.roi_heads.box_predictor(teacher.roi_heads.box_head(pooled))
        objectness, rpn_deltas = teacher.rpn.head(list(maps.values()))
    rpn, box = (step.teacher.predictions for step in steps)
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
    distiller = Distiller(teacher, student, [CrossKD(head="box", cls_weight=0.5, reg_weight=2.0)])
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
    losses = seeded(Distiller(teacher, student, CrossKD(head="rpn")), images, targets)
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


# -- one head or both -----------------------------------------------------------------------------


def test_each_head_has_its_weights_and_position(v2):
    teacher, student = pair(v2)
    plain = seeded(Distiller(teacher, student, CrossKD()), *two_stage_batch())
    methods = [CrossKD(head="rpn", cls_weight=0.5), CrossKD(head="box", position=0, reg_weight=3.0)]
    distiller = Distiller(teacher, student, methods)
    losses = seeded(distiller, *two_stage_batch())
    assert losses.keys() == plain.keys()
    torch.testing.assert_close(losses["kd_rpn_cls"], 0.5 * plain["kd_rpn_cls"])
    assert torch.equal(losses["kd_rpn_reg"], plain["kd_rpn_reg"])
    alone = seeded(Distiller(teacher, student, CrossKD(position=0)), *two_stage_batch())
    assert torch.equal(losses["kd_box_cls"], alone["kd_box_cls"])
    torch.testing.assert_close(losses["kd_box_reg"], 3.0 * alone["kd_box_reg"])
    assert losses["kd_box_cls"] != plain["kd_box_cls"]
    assert [m.head for m in methods] == ["rpn", "box"]


def test_two_methods_of_one_head_have_their_names_in_front():
    methods = [CrossKD(head="rpn"), CrossKD(head="box"), PredictionMimicking(head="box")]
    with pytest.warns(UserWarning, match="mimicking_box .* crosskd_box"):
        losses = Distiller(*pair(), methods)(*two_stage_batch())
    assert {name for name in losses if "kd" in name} == {
        *("kd_rpn_cls", "kd_rpn_reg", "crosskd_kd_box_cls", "crosskd_kd_box_reg"),
        *("mimicking_kd_box_cls", "mimicking_kd_box_reg"),
    }


@pytest.mark.parametrize(("head", "position"), [("rpn", (0, 0)), ("box", (1, 1))])
def test_by_default_the_last_block_is_left_to_the_teacher(head, position):
    assert Distiller(*pair(), CrossKD(head=head)).methods[f"crosskd_{head}"].position == position


def test_the_two_forms_teach_each_other():
    """A vector can't be read as a map: v1's student ends before its first layer where the teacher is v2."""
    v1, v2 = tiny_faster_rcnn(), tiny_faster_rcnn(v2=True, seed=1)
    position = {}
    for name, (teacher, student) in {"v2 from v1": (v1, v2), "v1 from v2": (v2, v1)}.items():
        distiller = assert_distils(teacher, copy.deepcopy(student), [CrossKD(head="box")])
        position[name] = distiller.methods["crosskd_box"].position
    assert position == {"v2 from v1": (3, 1), "v1 from v2": (0, 2)}


def test_a_map_is_not_read_as_a_vector():
    message = r"box branch is split where features are maps \(teacher, after block 2\) and vectors \(student"
    with pytest.raises(ValueError, match=message):
        Distiller(tiny_faster_rcnn(v2=True), tiny_faster_rcnn(), CrossKD(position=(1, 2), head="box"))


class Calls:
    """Counts how often a module is run."""

    def __init__(self, module: nn.Module) -> None:
        self.number = 0
        module.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.number += 1


@pytest.mark.parametrize("head", ["rpn", "box"])
@pytest.mark.parametrize("method", [CrossKD, PredictionMimicking])
def test_the_teachers_other_head_is_not_run(head, method):
    teacher, student = pair()
    distiller = Distiller(teacher, student, method(head=head), prove=False)
    rpn, box = distiller.teacher.rpn.head.cls_logits, distiller.teacher.roi_heads.box_predictor.cls_score
    calls = {"rpn": Calls(rpn), "box": Calls(box)}
    losses = seeded(distiller, *two_stage_batch())
    assert losses.keys() == {*OWN, *(RPN if head == "rpn" else BOX)}
    assert [name for name, counted in calls.items() if counted.number] == [head]
    both = seeded(Distiller(teacher, student, method()), *two_stage_batch())
    assert all(torch.equal(loss, both[name]) for name, loss in losses.items())


def test_for_the_box_head_alone_neither_anchors_nor_levels_must_agree():
    teacher = tiny_faster_rcnn(hidden=12, levels=(1, 2), rpn_anchor_generator=two_levels_of_anchors())
    assert_distils(teacher, tiny_faster_rcnn(seed=1), CrossKD(head="box"))
    wider = tiny_faster_rcnn(hidden=12, levels=(1, 2), width=32, rpn_anchor_generator=two_levels_of_anchors())
    distiller = assert_distils(wider, tiny_faster_rcnn(seed=1), CrossKD(position=0, head="box"))
    assert list(distiller.methods["crosskd_box"].projections) == ["box"]
    with pytest.raises(ValueError, match=r"strides differ: \[16.0, 32.0\] \(teacher\), \[8.0, 16.0, 32.0\]"):
        Distiller(teacher, tiny_faster_rcnn(seed=1), CrossKD())


def two_levels_of_anchors() -> AnchorGenerator:
    return AnchorGenerator(((20,), (40,)), ((1.0,),) * 2)


def test_for_the_rpn_alone_the_box_heads_may_differ_in_everything():
    teacher = tiny_faster_rcnn(CLASSES + 3, hidden=12, pooled=2, bbox_reg_weights=(1.0, 1.0, 1.0, 1.0))
    for method in (CrossKD(head="rpn"), PredictionMimicking(head="rpn")):
        assert_distils(teacher, tiny_faster_rcnn(seed=1), method)


def test_error_heads_that_are_none():
    with pytest.raises(ValueError, match="head='roi' .*rpn, box"):
        Distiller(*pair(), CrossKD(head="roi"))
    with pytest.raises(ValueError, match="head='rpn' .*one head"):
        Distiller(tiny_retinanet(), tiny_retinanet(seed=1), CrossKD(head="rpn"))


@pytest.mark.parametrize("method", [CrossKD(), PredictionMimicking()])
def test_error_a_teacher_of_one_head(method):
    with pytest.raises(ValueError, match="the student's rpn head .* a RetinaNet, has one head.*PKD"):
        Distiller(tiny_retinanet(), tiny_faster_rcnn(), method)
    with pytest.raises(ValueError, match="a FasterRCNN, has the heads rpn, box.*PKD"):
        Distiller(tiny_faster_rcnn(), tiny_retinanet(), method)


def test_names_of_losses_where_methods_share_a_head():
    methods = [CrossKD(), PredictionMimicking(head="box", name="mimic")]
    losses = seeded(Distiller(*pair(), methods), *two_stage_batch())
    box = {f"{prefix}_{name}" for prefix in ("crosskd", "mimic") for name in BOX}
    assert losses.keys() == {*OWN, *RPN, *box}


@pytest.mark.parametrize("name", ["rpn", "my_rpn", "my_rpn_kd", "crosskd_box_2"])
def test_names_that_hold_a_head_stay_as_they_are(name):
    methods = [CrossKD(head="rpn", name=name), CrossKD(head="rpn", name="other")]
    losses = seeded(Distiller(*pair(), methods), *two_stage_batch())
    assert losses.keys() - OWN == {f"{prefix}_{key}" for prefix in (name, "other") for key in RPN}


def test_each_head_has_its_schedule():
    stopped = CrossKD(head="rpn", schedule=Schedule(stop=1))
    distiller = Distiller(*pair(), [stopped, CrossKD(head="box")], prove=False)
    calls = Calls(distiller.teacher.rpn.head.cls_logits)
    first, second = (distiller(*two_stage_batch()) for _ in range(2))
    levels = len(STRIDES)
    assert calls.number == 2 * levels  # the teacher's own predictions and the cross-head's, once
    for name in RPN:
        assert first[name] > 0
        assert second[name] == 0
    assert min(second[name] for name in BOX) > 0
    sum(second.values()).backward()


def test_with_both_heads_stopped_the_student_trains_alone():
    teacher, student = pair()
    expected = seeded(copy.deepcopy(student), *two_stage_batch())
    distiller = Distiller(teacher, student, CrossKD(schedule=Schedule(stop=1)))
    distiller(*two_stage_batch())
    losses = seeded(distiller, *two_stage_batch())
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
    assert all(losses[name] == 0 for name in (*RPN, *BOX))


# -- batches ----------------------------------------------------------------------------------------


def test_images_without_labels_are_sampled_as_labelled_ones():
    methods = [CrossKD(), PredictionMimicking(head="rpn")]
    rpn, box, other = steps_of(Distiller(*pair(), methods), two_stage_batch(3)[0])
    weights = rpn.assignment.label_weights
    assert weights.sum(dim=1).tolist() == [ANCHORS] * 3
    assert rpn.assignment.normalizer == 3 * ANCHORS
    assert other.assignment is rpn.assignment  # one sample for all methods of a head
    sure = rpn.teacher.predictions.confidence() >= 0.5
    assert torch.equal(rpn.assignment.positive, sure)
    assert all(((weights > 0) & sure).sum(dim=1) <= ANCHORS // 2)
    counts = box.student.head.counts(box.student.anchors)
    assert all(0 < count <= REGIONS for count in counts)
    assert box.assignment.normalizer == sum(counts) == box.student.predictions.logits.shape[1]
    assert torch.equal(box.assignment.positive, box.teacher.predictions.confidence() >= 0.5)


def test_labelled_regions_are_counted_by_image():
    _, box = steps_of(Distiller(*pair(), CrossKD()), *two_stage_batch(3))
    assert box.student.head.counts(box.student.anchors) == (REGIONS,) * 3
    assert box.student.anchors is box.teacher.anchors
    assert box.student.predictions.logits.shape == (1, 3 * REGIONS, CLASSES)
    assert 0 < box.assignment.positive.sum() < 3 * REGIONS


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


@pytest.mark.parametrize("method", [CrossKD(head="box"), PredictionMimicking(head="box")])
def test_what_the_student_does_not_know_is_background_to_it(method):
    """A region of a class that the student lacks has no object for it, however sure the teacher is."""
    teacher, student = tiny_faster_rcnn(CLASSES + 2, hidden=12), tiny_faster_rcnn(seed=1)
    order = [0, 5, 2, 6, 1]
    with torch.no_grad():
        teacher.roi_heads.box_predictor.cls_score.bias[3:5] = 6.0
    distiller = Distiller(teacher, student, method, class_map=order)
    losses = seeded(distiller, *two_stage_batch())
    assert min(losses[name] for name in BOX) > 0
    if isinstance(method, CrossKD):
        images, targets = two_stage_batch()
        regions, sizes = regions_of(student, images, targets)
        teacher.eval()
        maps = teacher.backbone(teacher.transform(images)[0].tensors)
        pooled = teacher.roi_heads.box_roi_pool(maps, regions, sizes)
        logits, _ = teacher.roi_heads.box_predictor(teacher.roi_heads.box_head(pooled))
        q = logits.softmax(-1)
        expected = torch.cat([q[:, [0, 3, 4]].sum(-1, keepdim=True), q[:, order[1:]]], dim=-1)
        (step,) = steps_of(distiller, images, targets)
        torch.testing.assert_close(step.teacher.predictions.logits[0].softmax(-1), expected)
        assert step.teacher.predictions.confidence().max() < 0.5


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        (
            [1, 0, 2, 3, 4],
            r"class 0 of the teacher .*mean no object.*class_map\[0\] = 0; got \[1, 0, 2, 3, 4\]",
        ),
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
    distiller = Distiller(teacher, student, CrossKD(head="box"), teacher_view=same, prove=False)
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
    assert_distils(teacher, student, CrossKD(head="box"))


def test_other_classes_are_read_by_the_teachers_head_and_not_mimicked():
    teacher = tiny_faster_rcnn(7, hidden=12)
    assert_distils(teacher, tiny_faster_rcnn(seed=1), CrossKD())
    with pytest.raises(ValueError, match="teacher predicts 7 classes and the student 5"):
        Distiller(teacher, tiny_faster_rcnn(seed=1), PredictionMimicking())


def other_anchors() -> AnchorGenerator:
    return AnchorGenerator(tuple((3 * stride,) for stride in STRIDES), ((0.5, 1.0),) * 3)


def test_at_other_anchors_the_teachers_own_are_sampled():
    student = tiny_faster_rcnn(seed=1, rpn_anchor_generator=other_anchors())
    plain = copy.deepcopy(student)
    distiller = Distiller(tiny_faster_rcnn(hidden=12), student, CrossKD())
    expected, losses = (seeded(model, *two_stage_batch()) for model in (plain, distiller))
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
    assert min(losses[name] for name in (*RPN, *BOX)) > 0
    rpn, _ = steps_of(distiller, *two_stage_batch())
    assignment = rpn.teacher_assignment()
    assert assignment.label_weights.shape == rpn.teacher.predictions.logits.shape[:2]
    assert assignment.normalizer == assignment.label_weights.sum() == 2 * ANCHORS
    assert assignment.positive.any(dim=1).all()
    assert min(loss for loss in seeded(distiller, two_stage_batch()[0]).values()) > 0


@pytest.mark.parametrize("v2", [False, True])
def test_regions_pooled_to_another_size(v2):
    """Vectors are read whatever they were made of, maps of a region are not."""
    teacher, student = tiny_faster_rcnn(v2=v2, hidden=12), tiny_faster_rcnn(v2=v2, pooled=2, seed=1)
    position = len(find_adapter(student).heads[1].branches[0].towers[0].blocks)
    assert_distils(teacher, student, CrossKD(position=position, head="box"))
    assert_distils(teacher, student, PredictionMimicking())
    with pytest.raises(ValueError, match=r"pooled to \(3, 3\) \(teacher\), \(2, 2\) \(student\)"):
        Distiller(teacher, student, CrossKD(position=0, head="box"))


def test_the_pyramid_is_imitated(v2):
    """Beside both heads, each through a projection of its own; the published weight is 6."""
    teacher, student = pair(v2)
    distiller = assert_distils(teacher, student, [PKD(), CrossKD()])
    assert distiller.methods["pkd"].weight == 6
    alone = seeded(Distiller(teacher, student, PKD()), *two_stage_batch())
    both = seeded(Distiller(teacher, student, [PKD(), CrossKD()]), *two_stage_batch())
    assert alone.keys() == {*OWN, "kd_pkd"}
    assert all(torch.equal(both[name], loss) for name, loss in alone.items())


# -- refused ------------------------------------------------------------------------------------------


def refused(
    teacher: nn.Module, student: nn.Module, message: str, methods: Any = None, error: Any = ValueError
) -> None:
    """When the distiller is made, or on the first step."""
    with pytest.raises(error, match=message):
        Distiller(teacher, student, methods or CrossKD())(*two_stage_batch())


def derived(kind: type[FasterRCNN], **heads: bool) -> FasterRCNN:
    """A Faster R-CNN that has become one of another class, with its further head."""
    detector = tiny_faster_rcnn()
    detector.__class__ = kind
    for name in heads:
        for suffix in ("roi_pool", "head", "predictor"):
            setattr(detector.roi_heads, f"{name}_{suffix}", nn.Identity())
    return detector


@pytest.mark.parametrize(("kind", "name"), [(MaskRCNN, "mask"), (KeypointRCNN, "keypoint")])
def test_students_with_further_heads(kind, name):
    student = derived(kind, **{name: True})
    refused(tiny_faster_rcnn(), student, f"student: a {kind.__name__} has a {name} head", error=TypeError)


def test_a_mask_rcnn_teaches_what_its_two_heads_would_teach_alone():
    plain, student = tiny_faster_rcnn(seed=1), tiny_faster_rcnn(seed=2)
    masks = copy.deepcopy(plain)
    masks.__class__ = MaskRCNN
    width = masks.backbone.out_channels
    names = list(masks.roi_heads.box_roi_pool.featmap_names)
    masks.roi_heads.mask_roi_pool = MultiScaleRoIAlign(names, 4, 2)
    masks.roi_heads.mask_head = MaskRCNNHeads(width, (8,), 1)
    masks.roi_heads.mask_predictor = MaskRCNNPredictor(8, 8, CLASSES)
    losses = []
    for teacher in (plain, masks):
        torch.manual_seed(0)
        losses.append(Distiller(teacher, copy.deepcopy(student), CrossKD())(*two_stage_batch()))
    assert {name: loss.item() for name, loss in losses[0].items()} == {
        name: loss.item() for name, loss in losses[1].items()
    }


def test_mimicking_needs_the_same_anchors():
    student = tiny_faster_rcnn(seed=1, rpn_anchor_generator=other_anchors())
    message = r"anchors differ .* of a RPN head.* \(teacher\), .* \(student\)"
    refused(tiny_faster_rcnn(), student, message, PredictionMimicking())
    assert_distils(tiny_faster_rcnn(hidden=12), student, PredictionMimicking(head="box"))


@pytest.mark.parametrize(("path", "head"), [("rpn", "rpn"), ("roi_heads", "box")])
def test_mimicking_needs_the_same_box_coding(path, head):
    student = tiny_faster_rcnn(seed=1)
    student.get_submodule(path).box_coder.weights = (2.0, 2.0, 1.0, 1.0)
    message = r"box coding differs: .* \(teacher\) .* \(student\)"
    refused(tiny_faster_rcnn(), student, message, PredictionMimicking(head=head))
    assert_distils(tiny_faster_rcnn(hidden=12), student, CrossKD(head=head))


def test_channels_of_images_that_differ():
    student = tiny_faster_rcnn(image_mean=[0.5], image_std=[0.5])
    student.backbone.backbone.stem[0][0] = nn.Conv2d(1, 8, 3, stride=2, padding=1)
    refused(tiny_faster_rcnn(), student, r"images' channels differ: 3 \(teacher\), 1 \(student\)")


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize(
    ("path", "kind"), [("roi_heads.box_predictor", "FastRCNNPredictor"), ("rpn.head", "RPNHead")]
)
def test_parts_of_another_kind(side, path, kind):
    detectors = {"teacher": tiny_faster_rcnn(), "student": tiny_faster_rcnn()}
    parent, _, name = path.rpartition(".")
    setattr(detectors[side].get_submodule(parent), name, nn.Linear(24, 5))
    refused(**detectors, message=f"{side}: {path} is a Linear.*{kind}")


def doubled(value: Any) -> Any:
    """All numbers in what a forward gives, twice as large."""
    if isinstance(value, Tensor):
        return 2 * value
    if isinstance(value, dict):
        return {key: doubled(inside) for key, inside in value.items()}
    return type(value)(doubled(inside) for inside in value)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("", "All layers that both run agree"),
        ("rpn", "part at roi_heads"),
        ("rpn.head", "part at rpn.head."),
        ("roi_heads.box_head", "part at roi_heads.box_predictor"),
    ],
)
def test_a_part_of_the_students_with_a_forward_of_its_own(path, parts):
    """Proposals that are decoded otherwise are seen where they are pooled."""
    student = tiny_faster_rcnn(seed=1)
    module = student.get_submodule(path)
    kind = type(module)
    module.forward = types.MethodType(lambda self, *given: doubled(kind.forward(self, *given)), module)
    refused(tiny_faster_rcnn(), student, f"student: FasterRCNN's own forward.*{parts}")


@pytest.mark.parametrize(("path", "head"), [("rpn.head", "rpn"), ("roi_heads.box_head", "box")])
def test_a_part_of_the_teachers_with_a_forward_of_its_own(path, head):
    teacher = tiny_faster_rcnn()
    module = teacher.get_submodule(path)
    kind = type(module)
    module.forward = types.MethodType(lambda self, *given: doubled(kind.forward(self, *given)), module)
    refused(teacher, tiny_faster_rcnn(seed=1), f"teacher: FasterRCNN's own forward.* the {head}'s logits")


def test_what_a_predictor_or_the_box_heads_forward_does_is_run():
    student = tiny_faster_rcnn(seed=1)
    for module in (student.roi_heads.box_predictor, student.roi_heads):
        kind = type(module)

        def forward(self, *given, kind=kind):
            return doubled(kind.forward(self, *given))

        module.__class__ = type("Doubled", (kind,), {"forward": forward})
    expected = seeded(copy.deepcopy(student), *two_stage_batch())
    losses = seeded(assert_distils(tiny_faster_rcnn(hidden=12), student), *two_stage_batch())
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())


def test_a_backbone_that_refuses_the_probe():
    student = tiny_faster_rcnn(seed=1)
    student.backbone.forward = types.MethodType(only_small_images, student.backbone)
    refused(tiny_faster_rcnn(), student, "student: the backbone of a FasterRCNN.*256 x 256.*fixed_size")
    student.transform.fixed_size = (64, 64)
    assert_distils(tiny_faster_rcnn(hidden=12), student)


def only_small_images(backbone, pixels):
    if pixels.shape[-1] > 64:
        raise RuntimeError("too large")
    return type(backbone).forward(backbone, pixels)


class Silent(RegionProposalNetwork):
    """Samples no anchors."""

    def compute_loss(self, objectness, deltas, labels, targets):
        return objectness.mean(), deltas.mean()


def test_a_network_that_samples_in_its_own_way():
    student = tiny_faster_rcnn(seed=1)
    student.rpn.__class__ = Silent
    refused(tiny_faster_rcnn(), student, "Silent.compute_loss did not call fg_bg_sampler once")


# -- a module like any other --------------------------------------------------------------------------


def test_the_state_is_the_students_and_the_projections():
    student = tiny_faster_rcnn(seed=1)
    distiller = Distiller(tiny_faster_rcnn(width=32, vector=32), student, CrossKD())
    projections = {f"methods.crosskd_{head}.projections.{head}.convolution.weight" for head in ("rpn", "box")}
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


@pytest.mark.slow
def test_compiled_it_gives_the_same_losses():
    teacher, student = pair()
    distiller = Distiller(teacher, student, CrossKD())
    expected = seeded(distiller, *two_stage_batch())
    torch._dynamo.reset()
    losses = seeded(torch.compile(distiller, backend="eager"), *two_stage_batch())
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-4, atol=1e-6, msg=name)
    sum(losses.values()).backward()
    assert has_gradient(student.backbone)
    torch._dynamo.reset()


# -- on real images -----------------------------------------------------------------------------------


def trained(model: nn.Module, images: Tensor, targets: list[dict[str, Tensor]], steps: int) -> nn.Module:
    """A model after some steps of four images each."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
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
    """From random weights, on 64 images, measured on 24 others."""
    _, images, targets = cells("train", 64, first_label=1)
    dataset, test_images, _ = cells("test", 24, first_label=1)
    build_detector = importlib.import_module("models").build_detector

    def build(width: int) -> nn.Module:
        torch.manual_seed(0)
        options = {"anchor_scale": 0.25, "regions": 32, "short_side": [96]}
        detector = build_detector("fasterrcnn_resnet18", 4, width=width, **options)
        detector.rpn._pre_nms_top_n = {"training": 300, "testing": 300}  # a tenth of the time goes into NMS
        return detector

    teacher, student = trained(build(64), images, targets, steps=30), build(32)
    before = average_precision(student, dataset, test_images)
    trained(Distiller(teacher, student, CrossKD()), images, targets, steps=40)
    after = average_precision(student, dataset, test_images)
    assert after["AP50"] > before["AP50"] + 5
