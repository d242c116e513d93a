"""QueryDistillation, DecoderCrossKD and MatchedQueries, on small detection transformers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection import retinanet_resnet50_fpn

from crosskd import PKD, DecoderCrossKD, Distiller, MatchedQueries, QueryDistillation, Schedule
from crosskd.adapters.base import DecoderHead
from crosskd.predictions import Predictions
from tests.helpers.detr import CLASSES, KINDS, SIZE, batch_of, detector_of

pytestmark = pytest.mark.transformers
METHODS = (QueryDistillation, DecoderCrossKD, MatchedQueries)
NAMES = {"kd_cls", "kd_l1", "kd_giou"}


def method_of(kind: type, **options: Any) -> Any:
    return kind(**options) if kind is MatchedQueries else kind(general=8, **options)


def distilled(losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: loss for name, loss in losses.items() if name.startswith("kd_")}


def without_statistics(model: nn.Module) -> None:
    """Batch norms that answer as in eval mode, so that a student equals its copy."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_student_and_teacher_of_other_widths_layers_and_queries(kind, method):
    teacher = detector_of(kind, 64, seed=1, layers=3, queries=12).eval()
    student = detector_of(kind)
    distiller = Distiller(teacher, student, method_of(method)).train()
    losses = distilled(distiller(**batch_of()))
    assert set(losses) == NAMES
    assert all(loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    reached = [name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()]
    for part in ("model.backbone", "model.encoder", "model.decoder"):
        assert any(name.startswith(part) for name in reached), part
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    assert all(parameter.grad is not None for parameter in distiller.methods.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_its_own_teacher_has_no_loss(kind, method):
    teacher = detector_of(kind, layers=3).eval()
    student = copy.deepcopy(teacher)
    distiller = Distiller(teacher, student, method_of(method)).train()
    without_statistics(student)
    for name, loss in distilled(distiller(**batch_of())).items():
        assert abs(float(loss)) < 1e-4, name


def permuted(detector: Any, order: torch.Tensor) -> None:
    """Gives a detector its queries in another order."""
    head_queries = {"query_position_embeddings": detector.model}
    for name, owner in head_queries.items():
        embedding = getattr(owner, name)
        with torch.no_grad():
            embedding.weight.copy_(embedding.weight[order])


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("kind", ["deformable_detr", "conditional_detr", "detr"])
@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_queries_changes_no_loss(kind, method, side):
    found = []
    for order in (torch.arange(10), torch.randperm(10, generator=torch.Generator().manual_seed(1))):
        models = {"teacher": detector_of(kind, 64, seed=1).eval(), "student": detector_of(kind)}
        permuted(models[side], order)
        torch.manual_seed(5)
        distiller = Distiller(models["teacher"], models["student"], method_of(method), prove=False).train()
        torch.manual_seed(5)
        found.append(distilled(distiller(**batch_of())))
    for name in NAMES:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_handed_queries_changes_no_answer(kind):
    # RT-DETR's kin choose their queries on each image, so the decoder itself is asked.
    distiller = Distiller(detector_of(kind, seed=1).eval(), detector_of(kind), QueryDistillation(general=8))
    adapter = distiller.teacher_adapter
    head = adapter.heads[0]
    assert isinstance(head, DecoderHead)
    with torch.no_grad():
        batch = adapter.prepare(batch_of()["pixel_values"], None)
        adapter.maps_of(batch)
        queries, order = head.own_queries(batch), torch.randperm(10)
        parts = {"content": queries.content, "position": queries.position, "boxes": queries.boxes}
        moved = {name: part if part is None else part[:, order] for name, part in parts.items()}
        plain, other = head.run(batch, queries), head.run(batch, type(queries)(**moved))
    for layer, again in zip(plain, other, strict=True):
        torch.testing.assert_close(
            layer.predictions.logits[:, order], again.predictions.logits, atol=1e-4, rtol=1e-4
        )


def test_random_queries_are_drawn_anew_each_step():
    distiller = Distiller(
        detector_of("detr", seed=1).eval(), detector_of("detr"), QueryDistillation(own=False)
    )
    distiller.train()
    first, second = (distiller(**batch_of())["kd_l1"] for _ in range(2))
    assert first != second


@pytest.mark.parametrize(("options", "expected"), [
    ({"general": 0}, [10]), ({"own": False}, [100]), ({"general": 5}, [10, 5]),
])  # fmt: skip
def test_which_queries_are_shared(options, expected):
    method = QueryDistillation(**options)
    distiller = Distiller(detector_of("rt_detr", seed=1).eval(), detector_of("rt_detr"), method).train()
    trace = distiller.trace(batch_of()["pixel_values"], batch_of()["labels"])
    step = trace.steps["queries"]
    counts = [queries.content.shape[1] for queries in distiller.methods["queries"].shared(step)]
    assert (
        counts == {"{'general': 0}": [10], "{'own': False}": [100], "{'general': 5}": [10, 5]}[str(options)]
    )


def test_layers_are_counted_from_the_last():
    teacher, student = detector_of("rt_detr", layers=4).eval(), detector_of("rt_detr", layers=2)
    distiller = Distiller(teacher, student, [QueryDistillation(), DecoderCrossKD()])
    assert distiller.methods["queries"].layers == ((-2, -2), (-1, -1))
    cross = distiller.methods["decoder_crosskd"]
    assert cross.position == (0, 2)
    assert cross.layers == ((-2, -2), (-1, -1))
    with pytest.raises(ValueError, match="layer 2 is none of the student's.* at 2 layers"):
        Distiller(teacher, student, QueryDistillation(layers=[(2, 3)]))
    with pytest.raises(ValueError, match="layer -5 is none of the teacher's"):
        Distiller(teacher, student, DecoderCrossKD(position=(0, -5)))


def test_losses_are_weighted_by_the_teachers_confidence():
    method = QueryDistillation(cls_weight=2.0, l1_weight=3.0, giou_weight=0.0)
    assert method.loss_names() == ("kd_cls", "kd_l1")
    logits = torch.tensor([[[0.0, 4.0], [-3.0, -2.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]])
    teacher = Predictions(logits, boxes, None)
    student = Predictions(torch.zeros(1, 2, 2), boxes + 0.1, None)
    losses = method.compared(student, teacher, (SIZE, SIZE))
    weights = logits.sigmoid().amax(dim=-1)[0]
    scale = max(float(weights.sum()), 1.0)
    assert losses["kd_l1"].item() == pytest.approx(3 * 0.4 * float(weights.sum()) / scale)
    divergence = 0.0
    for row, weight in zip(logits[0].sigmoid().tolist(), weights.tolist(), strict=True):
        for q in row:
            divergence += weight * (q * math.log(q / 0.5) + (1 - q) * math.log((1 - q) / 0.5))
    assert losses["kd_cls"].item() == pytest.approx(2 * divergence / scale, rel=1e-5)


def test_two_families_share_boxes():
    losses = Distiller(
        detector_of("rt_detr", 64, seed=1).eval(), detector_of("d_fine"), QueryDistillation(general=5)
    ).train()(**batch_of())
    assert losses["kd_l1"] > 0


def test_pairs_that_cannot_be_distilled():
    with pytest.raises(ValueError, match=r"boxes \(teacher, RTDetr\), position embeddings \(student, Cond"):
        Distiller(detector_of("rt_detr").eval(), detector_of("conditional_detr"), QueryDistillation())
    with pytest.raises(ValueError, match="sigmoid per class.*softmax.*DecoderCrossKD"):
        Distiller(detector_of("rt_detr").eval(), detector_of("detr"), MatchedQueries())
    with pytest.raises(ValueError, match="predicts 5 classes and the student 3"):
        Distiller(detector_of("rt_detr", num_labels=5).eval(), detector_of("rt_detr"), QueryDistillation())
    dense = retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=SIZE, max_size=SIZE
    )
    with pytest.raises(ValueError, match="the teacher, a RetinaNet, has no decoder"):
        Distiller(dense, detector_of("rt_detr"), QueryDistillation())
    losses = Distiller(
        detector_of("rt_detr", seed=1).eval(), detector_of("conditional_detr"), MatchedQueries()
    ).train()(**batch_of())
    assert losses["kd_cls"] > 0  # any two kinds


def test_a_teacher_of_more_classes():
    teacher = detector_of("rt_detr", seed=1, num_labels=5).eval()
    for method in METHODS:
        distiller = Distiller(teacher, detector_of("rt_detr"), method_of(method), class_map=[4, 0, 2])
        assert distiller.train()(**batch_of())["kd_cls"] > 0


def test_settings_that_mean_nothing():
    with pytest.raises(ValueError, match="no queries to share"):
        QueryDistillation(general=0, own=False)
    with pytest.raises(ValueError, match=r"\[0, 0, 0\]"):
        QueryDistillation(cls_weight=0, l1_weight=0, giou_weight=0)
    with pytest.raises(ValueError, match="count must be 1 or more, got 0"):
        MatchedQueries(count=0)


def test_images_without_labels_and_without_objects():
    for method in METHODS:
        distiller = Distiller(detector_of("d_fine", seed=1).eval(), detector_of("d_fine"), method_of(method))
        assert set(distiller.train()(pixel_values=batch_of()["pixel_values"])) == NAMES


@pytest.mark.parametrize("kind", ["rt_detr", "d_fine", "deformable_detr"])
def test_autocast(kind):
    distiller = Distiller(
        detector_of(kind, 64, seed=1).eval(), detector_of(kind), [QueryDistillation(general=5), PKD()]
    ).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = distiller(**batch_of())
    assert all(loss.isfinite() for loss in losses.values())
    assert all(losses[name].dtype == torch.float32 for name in NAMES)
    sum(losses.values()).backward()


def test_a_stopped_run_goes_on_as_it_would_have():
    def made() -> Any:
        method = QueryDistillation(general=5, schedule=Schedule(warmup=4))
        distiller = Distiller(
            detector_of("rt_detr", 64, seed=1).eval(), detector_of("rt_detr"), method
        ).train()
        return distiller, torch.optim.AdamW(distiller.parameters(), lr=1e-3)

    def trained(distiller: Any, optimizer: Any, steps: range) -> list[float]:
        values = []
        for step in steps:
            torch.manual_seed(step)
            loss = sum(distiller(**batch_of(seed=step)).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(float(loss))
        return values

    distiller, optimizer = made()
    trained(distiller, optimizer, range(2))
    state = copy.deepcopy((distiller.state_dict(), optimizer.state_dict()))
    expected = trained(distiller, optimizer, range(2, 4))
    again, other = made()
    again.prove = False
    again.load_state_dict(state[0])
    other.load_state_dict(state[1])
    assert trained(again, other, range(2, 4)) == pytest.approx(expected, rel=1e-5)


def test_compiled_steps_give_the_same_losses():
    torch._dynamo.reset()
    sides = []
    for _ in range(2):
        torch.manual_seed(0)
        sides.append(
            Distiller(detector_of("rt_detr", 64, seed=1).eval(), detector_of("rt_detr"), QueryDistillation())
        )
    eager, compiled = sides[0].train(), torch.compile(sides[1].train(), backend="eager")
    for step in range(2):
        torch.manual_seed(step)
        expected = eager(**batch_of())
        torch.manual_seed(step)
        losses = compiled(**batch_of())
        for name, loss in expected.items():
            assert torch.allclose(losses[name], loss, rtol=1e-4), name
    torch._dynamo.reset()
