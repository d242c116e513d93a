"""A teacher that calculates in half precision beside a student in float32: what it changes, and what not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torchvision.models.detection import RetinaNet

from crosskd import (
    BCKD,
    CWD,
    DRKD,
    FGD,
    MGD,
    PKD,
    CosineAlignment,
    CrossKD,
    Distiller,
    FeatureImitation,
    PredictionMimicking,
    ResponseDistillation,
    StructuralKD,
)
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet
from tests.helpers.two_stages import tiny_faster_rcnn, two_stage_batch
from tests.test_teacher_untouched import digest, flags

METHODS = [
    CrossKD(),
    PredictionMimicking(),
    BCKD(),
    ResponseDistillation(),
    PKD(),
    CWD(),
    StructuralKD(),
    MGD(),
    FGD(),
    DRKD(),
    CosineAlignment(),
    FeatureImitation(),
]
# Of the distillation losses, against float64. bfloat16 keeps 8 bits of each number, float16 keeps 11.
TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.005}


def distillers(method, dtype, build=tiny_retinanet):
    """The same pair with a teacher in a type of its own, and as it is."""
    teacher, student = build(seed=1, batch_norm=True), build(seed=2, batch_norm=True)
    torch.manual_seed(0)  # of what the method trains
    plain = Distiller(teacher, student, method)
    narrow = Distiller(teacher, copy.deepcopy(student), method, teacher_dtype=dtype)
    narrow.methods.load_state_dict(plain.methods.state_dict())
    return narrow, plain


def step(distiller: nn.Module, batch) -> tuple[dict[str, float], Tensor]:
    """Losses, and the student's gradient as one vector."""
    torch.manual_seed(3)
    losses = distiller(*batch)
    torch.stack(list(losses.values())).sum().backward()
    gradients = [p.grad.flatten().double() for p in distiller.student.parameters() if p.grad is not None]
    return {name: loss.item() for name, loss in losses.items()}, torch.cat(gradients)


def in_float64(distiller: Distiller, batch):
    images, targets = batch
    targets = [{**target, "boxes": target["boxes"].double()} for target in targets]
    return step(copy.deepcopy(distiller).double(), ([image.double() for image in images], targets))


@pytest.mark.parametrize("method", METHODS, ids=[type(method).__name__ for method in METHODS])
def test_losses_and_gradients_are_those_of_float64_but_for_rounding(method):
    narrow, plain = distillers(method, torch.bfloat16)
    batch = tiny_batch()
    exact, exact_gradient = in_float64(plain, batch)
    expected, _ = step(plain, batch)
    losses, gradient = step(narrow, batch)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        if name.startswith("kd_"):
            assert loss == pytest.approx(exact[name], rel=TOLERANCE[torch.bfloat16]), name
        else:
            assert loss == expected[name], name  # the student's own, to the last bit
    assert torch.cosine_similarity(gradient, exact_gradient, dim=0) > 0.99


@pytest.mark.parametrize("build", [tiny_retinanet, tiny_fcos], ids=["retinanet", "fcos"])
def test_float16_rounds_less(build):
    narrow, plain = distillers(CrossKD(), torch.float16, build)
    exact, _ = in_float64(plain, tiny_batch())
    losses, _ = step(narrow, tiny_batch())
    for name in ("kd_cls", "kd_reg"):
        assert losses[name] == pytest.approx(exact[name], rel=TOLERANCE[torch.float16])


def test_both_heads_of_a_two_stage_teacher():
    narrow, plain = distillers(CrossKD(), torch.bfloat16, tiny_faster_rcnn)
    expected, _ = step(plain, two_stage_batch())
    losses, _ = step(narrow, two_stage_batch())
    assert {"kd_rpn_cls", "kd_box_cls"} < losses.keys() == expected.keys()
    for name, loss in losses.items():
        tolerance = TOLERANCE[torch.bfloat16] if name.startswith("kd_") else 0
        assert loss == pytest.approx(expected[name], rel=tolerance), name


def test_what_the_teacher_finds_in_unlabelled_images():
    narrow, plain = distillers(FGD(), torch.bfloat16)
    narrow.unlabelled_threshold = plain.unlabelled_threshold = 0.3
    losses, expected = step(narrow, (tiny_batch()[0], None))[0], step(plain, (tiny_batch()[0], None))[0]
    assert losses == pytest.approx(expected, rel=TOLERANCE[torch.bfloat16])


def types_of(module: nn.Module) -> list[torch.dtype]:
    """The types of what a layer gives from now on."""
    types: list[torch.dtype] = []
    module.register_forward_hook(lambda _, __, output: types.append(output.dtype))
    return types


def test_only_the_teachers_own_forward_is_in_the_narrow_type():
    narrow, _ = distillers([CrossKD(), PKD()], torch.bfloat16)
    narrow(*tiny_batch())  # the first step runs both once more
    teacher, student = narrow.teacher, narrow.student
    of_backbone = types_of(teacher.backbone.stem[0][0])
    of_predictor = types_of(teacher.head.classification_head.cls_logits)
    of_student = types_of(student.head.classification_head.cls_logits)
    trace = narrow.trace(*tiny_batch())
    assert of_backbone == [torch.bfloat16]
    # Three levels of its own features, then three of the student's, the cross-head.
    assert of_predictor == [torch.bfloat16] * 3 + [torch.float32] * 3
    assert of_student == [torch.float32] * 3
    assert trace.steps["crosskd"].teacher.anchors.boxes.dtype == torch.float32
    # Methods get what they would get of a teacher in float32.
    assert {feature_map.dtype for feature_map in trace.teacher.maps} == {torch.float32}
    predictions = trace.steps["crosskd"].teacher.predictions
    assert predictions.logits.dtype == predictions.regression.dtype == torch.float32


def test_anchors_are_not_rounded():
    """torchvision makes them in the type of the maps: 269 pixels would be 268 or 270 in bfloat16."""
    narrow, _ = distillers(PredictionMimicking(), torch.bfloat16)
    for detector in (narrow.teacher, narrow.student):
        cells = detector.anchor_generator.cell_anchors
        detector.anchor_generator.cell_anchors = [cell + 269 for cell in cells]
    (seen,) = narrow.trace(*tiny_batch()).steps.values()
    torch.testing.assert_close(seen.teacher.anchors.boxes, seen.student.anchors.boxes, rtol=0, atol=0)


def test_the_users_teacher_is_not_touched():
    teacher = tiny_retinanet(seed=1, batch_norm=True)
    before, flags_before = digest(teacher), flags(teacher)
    distiller = Distiller(teacher, tiny_retinanet(), CrossKD(), teacher_dtype=torch.bfloat16)
    step(distiller, tiny_batch())
    assert digest(teacher) == before
    assert flags(teacher) == flags_before
    for ours, theirs in zip(distiller.teacher.parameters(), teacher.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()  # no second set of weights, and changes are followed


def test_state_copies_and_pickles():
    narrow, plain = distillers(CrossKD(), torch.bfloat16)
    assert narrow.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(narrow.state_dict())
    losses, _ = step(narrow, tiny_batch())
    for other in (copy.deepcopy(narrow), pickle.loads(pickle.dumps(narrow))):
        assert step(other, tiny_batch())[0] == losses


def test_beside_autocast_of_the_step():
    narrow, plain = distillers(CrossKD(), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = step(narrow, tiny_batch())
        expected, _ = step(plain, tiny_batch())
    assert losses == pytest.approx(expected, rel=1e-5)


class WithoutAutocast(RetinaNet):
    """Runs itself in float32, whatever is around it."""

    def forward(self, images, targets=None):
        with torch.autocast("cpu", enabled=False):
            return super().forward(images, targets)


def test_the_proof_is_of_what_runs():
    teacher = tiny_retinanet(seed=1)
    teacher.__class__ = WithoutAutocast
    distiller = Distiller(teacher, tiny_retinanet(), CrossKD(), teacher_dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"teacher: WithoutAutocast's .* torch.float32 alone and in torch.bfloat16"
    ):
        distiller(*tiny_batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, "bfloat16"])
def test_other_types_are_refused(dtype):
    with pytest.raises(ValueError, match=f"torch.bfloat16 or torch.float16, got {dtype}"):
        Distiller(tiny_retinanet(), tiny_retinanet(seed=1), CrossKD(), teacher_dtype=dtype)


@pytest.mark.slow
def test_compiled():
    torch._dynamo.reset()
    narrow, _ = distillers(CrossKD(), torch.bfloat16)
    counter = CompileCounter()
    compiled = torch.compile(copy.deepcopy(narrow), backend=counter)
    for seed in range(2):
        batch = tiny_batch(seed=seed)
        assert step(compiled, batch)[0] == pytest.approx(step(narrow, batch)[0], rel=1e-4)
    assert counter.frame_count == 2  # as without a type of its own
    torch._dynamo.reset()
    losses = step(narrow, tiny_batch())[0]
    narrow.teacher.backbone.compile(backend="eager")  # the teacher alone
    for distiller in (narrow, copy.deepcopy(narrow)):
        assert step(distiller, tiny_batch())[0] == pytest.approx(losses, rel=1e-4)
    torch._dynamo.reset()
