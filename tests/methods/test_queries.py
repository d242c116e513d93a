"""QueryDistillation, DecoderCrossKD and MatchedQueries, on small detection transformers.

That the order of queries and a teacher of one's own make no loss, and where gradients go, is seen by the
kit's checks, which the adapters' tests run with all three methods.
"""

from __future__ import annotations

import copy
import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crosskd import (
    PKD,
    CrossKD,
    DecoderCrossKD,
    Distiller,
    MatchedQueries,
    QueryDistillation,
    Schedule,
    check,
    describe,
)
from crosskd.predictions import Predictions
from tests.helpers.detr import (
    CLASSES,
    SIZE,
    batch_of,
    detector_of,
    distilled,
    distiller_of,
    methods_of_queries,
)
from tests.helpers.tiny import tiny_retinanet

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.filterwarnings("ignore:.*pulls the student's own predictions"),
]
METHODS = (QueryDistillation, DecoderCrossKD, MatchedQueries)
NAMES = {"kd_cls", "kd_l1", "kd_giou"}


def test_gradients_reach_all_of_the_student_and_none_of_the_teacher():
    distiller = distiller_of("rt_detr", methods_of_queries())
    losses = distilled(distiller(**batch_of()))
    assert len(losses) == 9
    assert all(loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    reached = [
        name for name, p in distiller.student.named_parameters() if p.grad is not None and p.grad.any()
    ]
    for part in ("model.backbone", "model.encoder", "model.decoder"):
        assert any(name.startswith(part) for name in reached), part
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    assert all(parameter.grad is not None for parameter in distiller.methods.parameters())


def test_random_queries_are_drawn_anew_each_step():
    distiller = distiller_of("detr", QueryDistillation(own=False))
    first, second = (distiller(**batch_of())["kd_l1"] for _ in range(2))
    assert first != second


@pytest.mark.parametrize(("options", "expected"), [
    ({"general": 0}, [12]), ({"own": False}, [100]), ({"general": 5}, [12, 5]),
])  # fmt: skip
def test_which_queries_are_shared(options, expected):
    distiller = distiller_of("rt_detr", QueryDistillation(**options), prove=False)
    step = distiller.trace(batch_of()["pixel_values"], None).steps["queries"]
    shared = distiller.methods["queries"].shared(step)
    assert [queries.content.shape[1] for queries in shared] == expected


@pytest.mark.parametrize(("method", "teacher"), [
    (QueryDistillation(general=5), "wider"),
    (DecoderCrossKD(general=5), "wider"),
    (QueryDistillation(), "dense"),
])  # fmt: skip
def test_a_student_whose_decoder_is_frozen_is_refused_though_queries_are_trained(method, teacher):
    teachers = {"wider": detector_of("rt_detr", 64, seed=1), "dense": tiny_retinanet(CLASSES)}
    distiller = Distiller(teachers[teacher], detector_of("rt_detr"), method).train()
    distiller.student.requires_grad_(False)
    distiller.student.model.enc_score_head.requires_grad_(True)  # which no decoder reads
    with pytest.warns(UserWarning, match="gradient is 0"):
        distiller(**batch_of())
    distiller(**batch_of())
    with pytest.raises(ValueError, match="kd_cls is .* gradient is 0 .* first 3 steps"):
        distiller(**batch_of())


def test_layers_are_counted_from_the_last():
    teacher, student = detector_of("detr", layers=4), detector_of("detr", layers=2)
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


def test_pairs_of_two_families():
    for method, teacher, student in (
        (QueryDistillation(general=5), "rt_detr", "d_fine"),  # both start from boxes
        (MatchedQueries(), "rt_detr", "conditional_detr"),  # of any two kinds
    ):
        assert distiller_of(student, method, teacher)(**batch_of())["kd_l1"] > 0


def test_a_dense_teachers_detections_are_queries():
    distiller = Distiller(
        tiny_retinanet(CLASSES), detector_of("rt_detr"), QueryDistillation(general=6)
    ).train()
    losses = distilled(distiller(**batch_of()))
    assert losses.keys() == NAMES
    assert losses["kd_l1"] > 0
    sum(losses.values()).backward()
    assert distiller.methods["queries"].content.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_all_levels_of_a_dense_teacher_count_in_any_type(dtype):
    """The student's maps have strides of 8 and 16, the teacher's of 8, 16 and 32."""
    distiller = Distiller(
        tiny_retinanet(CLASSES), detector_of("rt_detr"), QueryDistillation(general=6), prove=False
    )
    distiller.train().to(dtype)
    inputs = {**batch_of(), "pixel_values": batch_of()["pixel_values"].to(dtype)}
    step = distiller.trace(inputs["pixel_values"], None).steps["queries"]
    assert step.teacher.levels == (0, 1, 2)
    assert step.teacher.predictions.logits.shape[1] == 3 * (8 * 8 + 4 * 4 + 2 * 2)
    losses = distiller(inputs["pixel_values"])
    sum(losses.values()).backward()
    assert all(losses[name].isfinite() for name in NAMES)


def test_an_objectness_counts_once_in_a_dense_teachers_detections():
    """Of two places far from each other the first is surer: 0.9 * 0.5 against 0.5 * 0.8."""
    classes, objectness = torch.tensor([[[0.9], [0.5]]]), torch.tensor([[0.5, 0.8]])
    boxes = torch.tensor([[[0.0, 0.0, 16.0, 16.0], [32.0, 32.0, 64.0, 64.0]]])
    predictions = Predictions(classes.logit(), boxes, objectness.logit(), objectness=True)
    batch = SimpleNamespace(image_sizes=((SIZE, SIZE),))
    head = SimpleNamespace(decode=lambda made, _: made.regression)
    teacher = SimpleNamespace(predictions=predictions, head=head, anchors=None, batch=batch)
    decoder = SimpleNamespace(box_sizes=lambda _: batch.image_sizes)
    step: Any = SimpleNamespace(teacher=teacher, student=SimpleNamespace(decoder=decoder, batch=batch))
    found = QueryDistillation(general=1).detections(step)
    assert found.probabilities().item() == pytest.approx(0.45, abs=1e-5)
    assert found.regression[0, 0].tolist() == pytest.approx([0.125, 0.125, 0.25, 0.25])


def test_pairs_that_cannot_be_distilled():
    rt_detr, detr, conditional = (detector_of(kind) for kind in ("rt_detr", "detr", "conditional_detr"))
    with pytest.raises(ValueError, match=r"boxes \(teacher, RTDetr\), position embeddings \(student, Cond"):
        Distiller(rt_detr, conditional, QueryDistillation())
    # What a message recommends must serve the pair.
    with pytest.raises(ValueError, match=r"sigmoid per class.*softmax.*crosskd\.PKD\(\)"):
        Distiller(rt_detr, detr, MatchedQueries())
    with pytest.raises(ValueError, match=r"position embeddings \(student, Detr\)") as caught:
        Distiller(rt_detr, detr, DecoderCrossKD())
    assert "MatchedQueries" not in str(caught.value)
    Distiller(rt_detr, detr, PKD())
    with pytest.raises(ValueError, match=r"sigmoid per class.*softmax.*crosskd\.DecoderCrossKD\(\)"):
        Distiller(conditional, detr, MatchedQueries())
    Distiller(conditional, detr, DecoderCrossKD())
    with pytest.raises(ValueError, match="predicts 5 classes and the student 3"):
        Distiller(detector_of("rt_detr", num_labels=5), rt_detr, QueryDistillation())
    dense = tiny_retinanet(CLASSES)
    with pytest.raises(ValueError, match="the teacher, a RetinaNet, has no decoder"):
        Distiller(dense, rt_detr, DecoderCrossKD())
    with pytest.raises(ValueError, match="the student, a RetinaNet, has no decoder"):
        Distiller(rt_detr, dense, MatchedQueries())
    with pytest.raises(ValueError, match="teacher's rows .* queries") as caught:
        Distiller(rt_detr, dense, CrossKD())
    assert "QueryDistillation" not in str(caught.value)
    with pytest.raises(ValueError, match="can't be the queries of a ConditionalDetr"):
        Distiller(dense, conditional, QueryDistillation())
    with pytest.raises(ValueError, match="general=0"):
        Distiller(dense, rt_detr, QueryDistillation(general=0))
    with pytest.raises(ValueError, match="teacher_dtype=torch.bfloat16"):
        Distiller(rt_detr, detector_of("rt_detr"), DecoderCrossKD(), teacher_dtype=torch.bfloat16)


def test_matched_queries_and_maps_of_a_teacher_in_half_precision():
    teacher, student = detector_of("rt_detr", seed=1), detector_of("rt_detr", seed=2)
    losses = []
    for dtype in (None, torch.bfloat16):
        methods = [MatchedQueries(), PKD()]
        distiller = Distiller(teacher, copy.deepcopy(student), methods, teacher_dtype=dtype).train()
        losses.append(distilled(distiller(**batch_of())))
    assert losses[0].keys() == losses[1].keys()
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=0.05, atol=0)


def test_images_that_are_padded_otherwise_for_the_teacher():
    def wider(pixels: torch.Tensor, labels: Any) -> torch.Tensor:
        mask = torch.ones(2, SIZE, 2 * SIZE, dtype=torch.long)
        mask[:, :, SIZE:] = 0
        return {"pixel_values": torch.cat([pixels, pixels], dim=3), "pixel_mask": mask}

    distiller = distiller_of("detr", teacher_view=wider, prove=False)
    with pytest.raises(ValueError, match=r"\(64, 128\).*\(64, 64\).*\(teacher\).*\(64, 64\).*\(student\)"):
        distiller(batch_of()["pixel_values"], batch_of()["labels"])


@pytest.mark.parametrize(("kind", "columns"), [("rt_detr", [4, 0, 2]), ("detr", [4, 0, 2, 5])])
def test_a_teacher_of_more_classes(kind, columns):
    """DETR's last class is no object: the teacher's is 5, the student's 3."""
    teacher = detector_of(kind, seed=1, num_labels=5)
    distiller = Distiller(teacher, detector_of(kind), methods_of_queries(), class_map=columns)
    losses = distiller.train()(**batch_of())
    assert all(losses[f"{name}_kd_cls"] > 0 for name in distiller.methods)


def test_settings_that_mean_nothing():
    with pytest.raises(ValueError, match="no queries to share"):
        QueryDistillation(general=0, own=False)
    with pytest.raises(ValueError, match=r"\[0, 0, 0\]"):
        QueryDistillation(cls_weight=0, l1_weight=0, giou_weight=0)
    for count in (0, 2.5):
        with pytest.raises(ValueError, match=f"count.* 1 or more, got {count}"):
            MatchedQueries(count=count)  # type: ignore[arg-type]
    for general in (-1, 2.5):
        with pytest.raises(ValueError, match=f"general.* 0 or more, got {general}"):
            QueryDistillation(general=general)  # type: ignore[arg-type]
    unpaired: Any
    for unpaired in ([], 1, [1], (-1, -1), [(-1, -1), (0, 1, 2)], [(0, 0.5)]):
        with pytest.raises(TypeError, match=r"layers.*\(student's, teacher's\)"):
            QueryDistillation(layers=unpaired)
    for unpaired in (1, (1,), "01"):
        with pytest.raises(TypeError, match=r"position.*\(student's, teacher's\)"):
            DecoderCrossKD(position=unpaired)


@pytest.mark.parametrize("method", METHODS)
def test_predictors_that_begin_with_zeros_are_no_fault(method):
    distiller = distiller_of("detr", method())
    for parameter in distiller.student.bbox_predictor.layers[-1].parameters():
        torch.nn.init.zeros_(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller(**batch_of())


def test_a_stopped_run_goes_on_as_it_would_have_with_accumulated_gradients():
    def made() -> Any:
        method = QueryDistillation(general=5, schedule=Schedule(warmup=4))
        distiller = distiller_of("rt_detr", method, prove=False)
        return distiller, torch.optim.AdamW(distiller.parameters(), lr=1e-3)

    def trained(distiller: Any, optimizer: Any, steps: range) -> list[float]:
        values = []
        for step in steps:
            torch.manual_seed(step)
            loss = sum(distiller(**batch_of(seed=step)).values())
            loss.backward()
            values.append(loss.item())
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
        return values

    distiller, optimizer = made()
    trained(distiller, optimizer, range(2))
    state = copy.deepcopy((distiller.state_dict(), optimizer.state_dict()))
    expected = trained(distiller, optimizer, range(2, 5))
    again, other = made()
    again.load_state_dict(state[0])
    other.load_state_dict(state[1])
    assert trained(again, other, range(2, 5)) == pytest.approx(expected, rel=1e-5)


def test_compiled_steps_give_the_same_losses():
    torch._dynamo.reset()
    sides = []
    for _ in range(2):
        torch.manual_seed(0)
        sides.append(distiller_of("d_fine", [*methods_of_queries(), PKD()], prove=False))
    compiled = torch.compile(sides[1], backend="eager")
    for step in range(2):
        torch.manual_seed(step)
        expected = sides[0](**batch_of())
        torch.manual_seed(step)
        losses = compiled(**batch_of())
        assert losses.keys() == expected.keys()
        for name, loss in expected.items():
            assert torch.allclose(losses[name], loss, rtol=1e-4), name
    torch._dynamo.reset()


# -- what a person reads before training ------------------------------------------------------------


def seen_by(teacher: Any, pixels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Labels that a teacher detects: its own surest predictions."""
    with torch.no_grad():
        output = teacher.eval()(pixel_values=pixels)
    labels = []
    for logits, boxes in zip(output.logits, output.pred_boxes, strict=True):
        scores, classes = logits[:, :CLASSES].max(dim=-1)
        best = scores.topk(2).indices
        labels.append({"class_labels": classes[best], "boxes": boxes[best]})
    return labels


def test_check_reports_on_decoders():
    teacher, student = detector_of("detr", 64, seed=1, layers=3, queries=12), detector_of("detr")
    inputs = batch_of()
    inputs["labels"] = seen_by(teacher, inputs["pixel_values"])
    torch.manual_seed(0)  # of the projections
    report = check(teacher, student, [inputs, inputs], None, QueryDistillation(general=5))
    assert (report.images, report.fit.objects) == (4, 8)
    assert report.fit.found_in_any_class > 0
    assert report.head_types == ()
    assert report.projections == ("queries.content: 64 to 32 channels", "queries.position: 64 to 32 channels")
    (decoders, *_) = report.differences
    assert "3 layers, 12 queries of width 64 (teacher), 2 layers, 10 queries of width 32" in decoders
    assert all(report.distillation_losses[name].gradient > 0 for name in NAMES)
    torch.manual_seed(0)
    again = check(teacher, student, inputs, methods=QueryDistillation(general=5))
    assert again.distillation_losses == report.distillation_losses
    with pytest.raises(TypeError, match="RetinaNet is called with images and targets, got the keywords"):
        check(tiny_retinanet(CLASSES), tiny_retinanet(CLASSES, seed=1), [inputs])


def test_describe_says_what_queries_are():
    lines = describe(detector_of("two_stage")).splitlines()
    assert lines[3] == "head: DeformableDetr, 3 classes"
    assert "10 queries of width 32" in lines[4]
    assert "boxes and position embeddings" in lines[4]
    assert "at 2 layers" in lines[4]
    assert "QueryDistillation" in lines[5]
