"""The losses against published numbers, plain float64 calculations and torchvision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from crosskd import losses
from crosskd.losses import (
    distribution_kl_loss,
    giou_loss,
    iou_loss,
    pkd_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    softmax_focal_loss,
)
from tests.helpers.plain_losses import (
    focal_row,
    giou_row,
    iou_row,
    kl_row,
    log_iou_row,
    quality_focal_row,
    softmax_focal_row,
)
from tests.helpers.reference_files import load_parity

# ---------------------------------------------------------------------------------------------
# The losses as one table


@dataclass(frozen=True)
class Case:
    """A loss with some options, its module, its reference, and inputs that suit it."""

    name: str
    function: Callable[..., Tensor]
    module: nn.Module
    row: Callable[..., float]
    make: Callable[..., tuple[Tensor, Tensor]]
    options: dict[str, Any]

    def __call__(self, student: Tensor, teacher: Tensor, **kwargs: Any) -> Tensor:
        return self.function(student, teacher, **self.options, **kwargs)

    def reference(self, student: Tensor, teacher: Tensor) -> list[float]:
        pairs = zip(student.flatten(0, -2).tolist(), teacher.flatten(0, -2).tolist(), strict=True)
        return [self.row(s, t, **self.row_options) for s, t in pairs]

    @property
    def row_options(self) -> dict[str, Any]:
        return {key: value for key, value in self.options.items() if key != "log"}


def make_logits(*shape: int) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(*shape, 5).double(), 3 * torch.randn(*shape, 5).double()


def make_boxes(*shape: int) -> tuple[Tensor, Tensor]:
    def draw() -> Tensor:
        corner = 20 * torch.rand(*shape, 2).double()
        return torch.cat([corner, corner + 5 + 30 * torch.rand(*shape, 2).double()], dim=-1)

    return draw(), draw()


def make_targets(*shape: int) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(*shape, 5).double(), (torch.rand(*shape, 5) < 0.3).double()


CASES = [
    *(
        Case(
            f"quality_focal_beta{beta:g}",
            quality_focal_loss,
            losses.QualityFocalLoss(beta),
            quality_focal_row,
            make_logits,
            {"beta": beta},
        )
        for beta in (0.0, 0.5, 1.0, 2.0)
    ),
    *(
        Case(
            f"softmax_focal_beta{beta:g}",
            softmax_focal_loss,
            losses.SoftmaxFocalLoss(beta),
            softmax_focal_row,
            make_logits,
            {"beta": beta},
        )
        for beta in (0.0, 0.5, 1.0, 2.0)
    ),
    *(
        Case(
            f"distribution_kl_T{temperature:g}",
            distribution_kl_loss,
            losses.DistributionKLLoss(temperature),
            kl_row,
            make_logits,
            {"temperature": temperature},
        )
        for temperature in (1.0, 10.0)
    ),
    Case("giou", giou_loss, losses.GIoULoss(), giou_row, make_boxes, {}),
    Case("log_iou", iou_loss, losses.IoULoss(), log_iou_row, make_boxes, {"log": True}),
    Case("iou", iou_loss, losses.IoULoss(log=False), iou_row, make_boxes, {"log": False}),
    *(
        Case(
            f"sigmoid_focal_alpha{alpha:g}_gamma{gamma:g}",
            sigmoid_focal_loss,
            losses.SigmoidFocalLoss(alpha, gamma),
            focal_row,
            make_targets,
            {"alpha": alpha, "gamma": gamma},
        )
        for alpha, gamma in ((0.25, 2.0), (-1.0, 0.5))
    ),
]
every_loss = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_box_loss = pytest.mark.parametrize(
    "case", [case for case in CASES if case.make is make_boxes], ids=lambda case: case.name
)
LOGIT_CASES = [case for case in CASES if case.make is make_logits]
every_logit_loss = pytest.mark.parametrize("case", LOGIT_CASES, ids=lambda case: case.name)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, of)
    return found


def with_gradient(student: Tensor) -> Tensor:
    return student.detach().clone().requires_grad_()


# ---------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("quality_focal_beta1", quality_focal_loss),
        ("quality_focal_beta2", quality_focal_loss),
        ("distribution_kl_T1", distribution_kl_loss),
        ("distribution_kl_T2", distribution_kl_loss),
        ("distribution_kl_T10", distribution_kl_loss),
        ("giou", giou_loss),
        ("log_iou", iou_loss),
        ("pkd", pkd_loss),
    ],
)
def test_published_value_and_gradient(name, function):
    published = load_parity("losses.pt")[name]
    expected_loss = published.pop("loss")
    (gradient_name,) = (key for key in published if key.startswith("grad_"))
    expected_gradient = published.pop(gradient_name)
    student = with_gradient(published.pop(gradient_name.removeprefix("grad_")))
    teacher = published.pop(next(key for key in published if key.startswith(("teacher", "target"))))
    loss = function(student, teacher, **published)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    scale = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient(loss, student), expected_gradient, rtol=1e-6, atol=1e-6 * scale)


@every_loss
def test_mean_over_rows_agrees_with_a_plain_calculation(case):
    student, teacher = case.make(7)
    expected = math.fsum(case.reference(student, teacher)) / 7
    assert case(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@every_loss
@pytest.mark.parametrize("as_tensor", [False, True])
def test_weight_and_normalizer_agree_with_a_plain_calculation(case, as_tensor):
    student, teacher = case.make(2, 4)
    weight = torch.rand(2, 4).double()
    weight[0, 1] = 0
    rows = case.reference(student, teacher)
    expected = math.fsum(w * row for w, row in zip(weight.flatten().tolist(), rows, strict=True)) / 2.5
    normalizer = torch.tensor([2.5], dtype=torch.float64) if as_tensor else 2.5
    loss = case(student, teacher, weight=weight, normalizer=normalizer)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@every_loss
def test_weight_of_booleans_selects_rows(case):
    student, teacher = case.make(6)
    chosen = torch.tensor([True, False, False, True, True, False])
    selected, expected = (
        case(student, teacher, weight=chosen, normalizer=3.0),
        case(student[chosen], teacher[chosen]),
    )
    torch.testing.assert_close(selected, expected, rtol=1e-13, atol=0)


def test_values_by_hand():
    # A box over the left half of its target: IoU 1/2, and nothing outside of the union is enclosed.
    box, target = torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[0.0, 0.0, 4.0, 2.0]])
    assert giou_loss(box, target).item() == pytest.approx(0.5)
    assert iou_loss(box, target).item() == pytest.approx(math.log(2))
    # Two unit squares whose corners are one unit apart: union 2 in an enclosing square of 9.
    apart = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[2.0, 2.0, 3.0, 3.0]])
    assert giou_loss(*apart).item() == pytest.approx(1 + 7 / 9)
    # sigmoid(0) = 1/2 against sigmoid(log 3) = 3/4: distance 1/4, and the cross entropy is log 2.
    student, teacher = torch.zeros(1, 1), torch.full((1, 1), math.log(3))
    assert quality_focal_loss(student, teacher).item() == pytest.approx(math.log(2) / 4)
    # The student is undecided between three, the teacher sure of 3/5: the rest is 1/5 each. Half of the
    # differences, 4/15 and twice 2/15, is 4/15, and the cross entropy is log 3 whatever the teacher says.
    student, teacher = torch.zeros(1, 3), torch.tensor([[math.log(3), 0.0, 0.0]])
    assert softmax_focal_loss(student, teacher).item() == pytest.approx(4 / 15 * math.log(3))
    assert softmax_focal_loss(student, teacher, beta=0).item() == pytest.approx(math.log(3))
    # The teacher is sure of 3/4 and 1/4, the student undecided.
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distribution_kl_loss(student, teacher).item() == pytest.approx(expected)


@every_loss
def test_function_equals_module(case):
    student, teacher = case.make(3, 4)
    weight = torch.rand(3, 4)
    assert torch.equal(
        case.module(student, teacher, weight, 3.0), case(student, teacher, weight=weight, normalizer=3.0)
    )


# ---------------------------------------------------------------------------------------------
# Gradients


@every_loss
def test_gradcheck(case):
    student, teacher = case.make(6)
    weight = torch.rand(6).double()

    def loss(s: Tensor) -> Tensor:
        return case(s, teacher, weight=weight, normalizer=2.0)

    assert torch.autograd.gradcheck(loss, with_gradient(student))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_quality_focal_second_derivative(beta):
    student, teacher = make_logits(4)
    inputs = with_gradient(student)
    assert torch.autograd.gradgradcheck(lambda s: quality_focal_loss(s, teacher, beta=beta), inputs)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_quality_focal_equals_the_plain_composition(beta):
    student, teacher = make_logits(50)
    weight = torch.rand(50).double()
    student = with_gradient(student)
    target = teacher.sigmoid()
    elementwise = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    plain = ((student.sigmoid() - target).abs() ** beta * elementwise).sum(-1).mul(weight).sum() / 7
    loss = quality_focal_loss(student, teacher, beta=beta, weight=weight, normalizer=7)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(loss, student), gradient(plain, student), rtol=1e-12, atol=1e-15)


@every_logit_loss
@pytest.mark.parametrize("create_graph", [False, True])
def test_own_teacher_has_no_gradient(case, create_graph):
    teacher, _ = case.make(5)
    student = with_gradient(teacher)
    (found,) = torch.autograd.grad(case(student, teacher), student, create_graph=create_graph)
    torch.testing.assert_close(found.detach(), torch.zeros_like(found), rtol=0, atol=1e-15)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_quality_focal_second_derivative_is_finite_where_the_two_agree(beta):
    teacher, _ = make_logits(4)
    student = with_gradient(teacher)
    loss = quality_focal_loss(student, teacher, beta=beta)
    (first,) = torch.autograd.grad(loss, student, create_graph=True)
    assert gradient(first.square().sum() + first.sum(), student).isfinite().all()


@every_loss
def test_no_gradient_reaches_the_constants(case):
    student, teacher = (x.requires_grad_() for x in case.make(4))
    weight, normalizer = torch.rand(4, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    case(student, teacher, weight=weight, normalizer=normalizer).backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert weight.grad is None
    assert normalizer.grad is None


@every_loss
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_rows_give_zero_with_a_gradient(case, shape):
    student, teacher = (torch.zeros(*shape, 4) for _ in range(2))
    student.requires_grad_()
    for arguments in ({}, {"weight": torch.zeros(shape), "normalizer": 1.0}):
        loss = case(student, teacher, **arguments)
        assert loss.item() == 0
        loss.backward()
        assert student.grad.shape == student.shape


# ---------------------------------------------------------------------------------------------
# Numbers at the edge


@every_logit_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits_stay_finite(case, dtype):
    extremes = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4], dtype=dtype)
    student, teacher = torch.meshgrid(extremes, extremes, indexing="ij")
    student = with_gradient(student)
    loss = case(student, teacher)
    assert loss.isfinite()
    assert gradient(loss, student).isfinite().all()


def test_huge_logits_of_hard_targets_stay_finite():
    logits = torch.tensor([[-1e4, 1e4], [1e4, -1e4]], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert loss.isfinite()
    assert gradient(loss, logits).isfinite().all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_changes_nothing(case, dtype):
    student, teacher = (x.to(dtype) for x in case.make(6))
    student = with_gradient(student)
    expected = case(student.float(), teacher.float())
    with torch.autocast("cpu", torch.bfloat16):
        loss = case(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    found = gradient(loss, student)
    assert found.dtype == dtype
    torch.testing.assert_close(found, gradient(case(student.float(), teacher.float()), student))


@every_box_loss
def test_boxes_of_half_precision_do_not_overflow(case):
    boxes = torch.tensor([[0.0, 0.0, 1000.0, 1000.0]], dtype=torch.float16, requires_grad=True)
    target = torch.tensor([[0.0, 0.0, 1000.0, 500.0]], dtype=torch.float16)
    loss = case(boxes, target)
    assert loss.item() == pytest.approx(case.row(boxes[0].tolist(), target[0].tolist()), rel=1e-6)
    assert gradient(loss, boxes).isfinite().all()


@every_box_loss
def test_boxes_without_area_stay_finite(case):
    boxes = torch.tensor([[5.0, 5.0, 5.0, 9.0], [3.0, 3.0, 3.0, 3.0]], requires_grad=True)
    targets = torch.tensor([[0.0, 0.0, 4.0, 4.0], [3.0, 3.0, 3.0, 3.0]])
    loss = case(boxes, targets)
    expected = sum(case.reference(boxes.detach().double(), targets.double())) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert gradient(loss, boxes).isfinite().all()


# ---------------------------------------------------------------------------------------------
# Rows: any order, any number of dimensions, any layout


@every_loss
@given(order=st.permutations(range(6)), seed=st.integers(0, 2**16))
@settings(max_examples=15, deadline=None)
def test_order_of_rows_is_free(case, order, seed):
    torch.manual_seed(seed)
    student, teacher = case.make(6)
    weight = torch.rand(6).double()
    student, permuted = with_gradient(student), with_gradient(student[order])
    loss = case(student, teacher, weight=weight)
    other = case(permuted, teacher[order], weight=weight[order])
    torch.testing.assert_close(other, loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient(other, permuted), gradient(loss, student)[order], rtol=1e-13, atol=0)


@every_loss
@given(shape=st.lists(st.integers(1, 4), min_size=0, max_size=3), seed=st.integers(0, 2**16))
@settings(max_examples=15, deadline=None)
def test_flattening_to_rows_changes_nothing(case, shape, seed):
    torch.manual_seed(seed)
    student, teacher = case.make(*shape)
    weight = torch.rand(shape).double()
    student = with_gradient(student)
    loss = case(student, teacher, weight=weight)
    rows = (x.reshape(-1, x.shape[-1]) for x in (student, teacher))
    flat = case(*rows, weight=weight.reshape(-1))
    torch.testing.assert_close(flat, loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient(flat, student), gradient(loss, student), rtol=1e-13, atol=0)


def as_maps(rows: Tensor) -> Tensor:
    """The same numbers (batch, anchors, last) laid out as a head's maps, (batch, last, anchors)."""
    return rows.transpose(1, 2).contiguous().transpose(1, 2)


@every_loss
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
def test_layout_in_memory_changes_nothing(case, sides):
    contiguous = case.make(3, 4)
    student, teacher = (as_maps(x) if side else x for x, side in zip(contiguous, sides, strict=True))
    assert not (student.is_contiguous() and teacher.is_contiguous())
    student, plain = student.requires_grad_(), with_gradient(contiguous[0])
    loss, expected = case(student, teacher), case(plain, contiguous[1])
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient(loss, student), gradient(expected, plain), rtol=1e-13, atol=0)


@pytest.mark.parametrize("chunk", [1, 5, 7, 10, 54, 55, 56])
@pytest.mark.parametrize("layout", ["rows", "maps"])
def test_quality_focal_chunks_change_nothing(chunk, layout, monkeypatch):
    student, teacher = make_logits(1, 11)
    if layout == "maps":
        student, teacher = as_maps(student.expand(2, -1, -1)), as_maps(teacher.expand(2, -1, -1))
    student = with_gradient(student)
    expected = quality_focal_loss(student, teacher)
    expected_gradient = gradient(expected, student)
    monkeypatch.setattr(losses, "_CHUNK_CPU", chunk)
    loss = quality_focal_loss(student, teacher)
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient(loss, student), expected_gradient, rtol=1e-14, atol=0)


# ---------------------------------------------------------------------------------------------
# Memory of the quality focal loss


class Allocations(TorchDispatchMode):
    """Counts the tensors of at least some size that operators make, views of older ones aside."""

    def __init__(self, at_least: int) -> None:
        super().__init__()
        self.at_least = at_least
        self.storages: set[int] = set()
        self.count = 0

    def __torch_dispatch__(self, operator, types, arguments=(), kwargs=None):
        output = operator(*arguments, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in arguments if isinstance(x, Tensor)}
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                self.count += tensor.numel() >= self.at_least
        return output


@pytest.mark.parametrize("layout", ["rows", "maps"])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_quality_focal_makes_one_tensor_of_the_logits_size(layout, beta, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_CPU", 100)
    student, teacher = make_logits(2, 200)
    if layout == "maps":
        student, teacher = as_maps(student), as_maps(teacher)
    student.requires_grad_()
    with Allocations(student.numel() // 2) as made:
        loss = quality_focal_loss(student, teacher, beta=beta, weight=torch.rand(2, 200))
        assert made.count == 0
        loss.backward()
    assert made.count == 1


def test_quality_focal_keeps_nothing_but_its_inputs_for_backward():
    student, teacher = make_logits(40)
    student.requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        quality_focal_loss(student, teacher, weight=torch.rand(40))
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() >= student.numel()}
    assert large == {student.data_ptr(), teacher.data_ptr()}


# ---------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_quality_focal_compiled_agrees_with_eager(beta):
    student, teacher = (x.float() for x in make_logits(30))
    teacher[0] = student[0]  # where the two agree exactly, a power below 1 has no slope
    student = with_gradient(student)
    weight = torch.rand(30)

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return quality_focal_loss(s, t, beta=beta, weight=weight, normalizer=3.0)

    eager, compiled = loss(student, teacher), torch.compile(loss, fullgraph=True)(student, teacher)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient(compiled, student), gradient(eager, student), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------
# The softmax's focal loss, and what the sigmoid's says of it

every_beta = pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
logits_of_classes = st.integers(2, 6).flatmap(
    lambda classes: st.tuples(
        *[st.lists(st.floats(-20, 20, width=32), min_size=classes, max_size=classes)] * 2
    )
)


@every_beta
def test_softmax_focal_of_two_classes_is_quality_focal_of_their_difference(beta):
    """Two classes that share a softmax have the sigmoids of plus and minus the difference of their logits."""
    (student, teacher), weight = (3 * torch.randn(2, 8, 2).double()), torch.rand(8).double()
    student, alone = with_gradient(student), with_gradient(student[:, 1:] - student[:, :1])
    shared = softmax_focal_loss(student, teacher, beta=beta, weight=weight, normalizer=3.0)
    of_difference = quality_focal_loss(
        alone, teacher[:, 1:] - teacher[:, :1], beta=beta, weight=weight, normalizer=3.0
    )
    torch.testing.assert_close(shared, of_difference, rtol=1e-12, atol=0)
    expected = gradient(of_difference, alone)
    found = gradient(shared, student)
    torch.testing.assert_close(found, torch.cat([-expected, expected], dim=1), rtol=1e-10, atol=1e-14)


@given(logits=logits_of_classes, beta=st.sampled_from([0.0, 0.5, 1.0, 2.0]), shift=st.floats(-50, 50))
@example(logits=([1.0, 1.0, 0.0], [1.0, 1.0, 0.0]), beta=0.0, shift=0.485)
@settings(max_examples=60, deadline=None)
def test_softmax_focal_has_bounds_and_no_say_in_what_the_softmax_does_not_see(logits, beta, shift):
    student, teacher = (torch.tensor([side], dtype=torch.float64) for side in logits)
    value = softmax_focal_loss(student, teacher, beta=beta).item()
    cross_entropy = F.cross_entropy(student, teacher.softmax(-1)).item()
    assert -1e-12 <= value <= cross_entropy + 1e-9
    moved = softmax_focal_loss(student + shift, teacher - shift, beta=beta).item()
    # The root of a last bit is larger than the bit.
    assert moved == pytest.approx(value, rel=1e-6, abs=1e-6)
    turned = softmax_focal_loss(student.flip(-1), teacher.flip(-1), beta=beta).item()
    assert turned == pytest.approx(value, rel=1e-6, abs=1e-6)


@every_beta
def test_softmax_focal_without_the_focus_is_cross_entropy(beta):
    student, teacher = make_logits(9)
    expected = F.cross_entropy(student, teacher.softmax(-1))
    torch.testing.assert_close(softmax_focal_loss(student, teacher, beta=0), expected)
    # The distance is at most 1, and 1 where the two are sure of different classes.
    assert softmax_focal_loss(student, teacher, beta=beta) <= expected
    sure = 200 * torch.eye(5).double()
    apart = softmax_focal_loss(sure, sure.roll(1, 0), beta=beta)
    torch.testing.assert_close(apart, torch.tensor(200.0).double())


# ---------------------------------------------------------------------------------------------
# Boxes against torchvision, and what holds for all boxes


def test_boxes_agree_with_torchvision():
    boxes, targets = make_boxes(20)
    expected = torchvision.ops.generalized_box_iou_loss(boxes, targets, reduction="mean", eps=0)
    torch.testing.assert_close(giou_loss(boxes, targets), expected, rtol=1e-12, atol=0)
    iou = torchvision.ops.box_iou(boxes, targets).diagonal()
    torch.testing.assert_close(iou_loss(boxes, targets, log=False), (1 - iou).mean(), rtol=1e-12, atol=0)
    log = -iou.clamp(min=1e-6).log().mean()
    torch.testing.assert_close(iou_loss(boxes, targets), log, rtol=1e-12, atol=0)


def test_sigmoid_focal_agrees_with_torchvision():
    logits, targets = make_targets(6)
    expected = torchvision.ops.sigmoid_focal_loss(logits, targets, reduction="sum") / 6
    torch.testing.assert_close(sigmoid_focal_loss(logits, targets), expected, rtol=1e-12, atol=0)


# Compiled kernels of older PyTorch versions leave the processor unable to represent subnormal numbers.
coordinates = st.floats(-500, 500, width=32, allow_subnormal=False)
extents = st.floats(0.125, 1000, width=32)
box_pairs = st.tuples(*[st.tuples(coordinates, coordinates, extents, extents)] * 2)


def as_box(numbers: tuple[float, float, float, float]) -> Tensor:
    x, y, width, height = numbers
    return torch.tensor([[x, y, x + width, y + height]], dtype=torch.float64)


@given(pair=box_pairs)
@settings(max_examples=100, deadline=None)
def test_box_losses_are_symmetric_and_bounded(pair):
    first, second = map(as_box, pair)
    for loss, largest in (
        (giou_loss, 2.0),
        (iou_loss, -math.log(1e-6)),
        (lambda a, b: iou_loss(a, b, log=False), 1.0),
    ):
        value = loss(first, second).item()
        assert value == pytest.approx(loss(second, first).item(), rel=1e-9, abs=1e-9)
        assert -1e-9 <= value <= largest + 1e-9
    assert giou_loss(first, second) >= iou_loss(first, second, log=False) - 1e-9


@given(numbers=st.lists(coordinates, min_size=8, max_size=8))
@settings(max_examples=50, deadline=None)
def test_box_losses_are_bounded_for_boxes_that_are_inside_out(numbers):
    """Heads that predict plain distances may put a right side to the left of the left one."""
    boxes, targets = torch.tensor(numbers, dtype=torch.float64).reshape(2, 1, 4).unbind()
    boxes.requires_grad_()
    for loss, most in ((giou_loss, 2.0), (iou_loss, 20.0)):
        value = loss(boxes, targets)
        assert -1e-9 <= value.item() <= most + 1e-9
        value.backward()
        assert boxes.grad is not None
        assert boxes.grad.isfinite().all()


def test_a_box_inside_out_is_pulled_towards_its_target():
    box = torch.tensor([[5.0, 0.0, 3.0, 4.0]], requires_grad=True)
    giou_loss(box, torch.tensor([[10.0, 0.0, 14.0, 4.0]])).backward()
    assert box.grad is not None
    assert box.grad[0, 0] < 0  # its left side, the farthest from the target


@given(pair=box_pairs, shift=coordinates, scale=st.floats(0.5, 4))
@settings(max_examples=50, deadline=None)
def test_box_losses_are_free_of_place_and_scale(pair, shift, scale):
    first, second = map(as_box, pair)
    for loss in (giou_loss, iou_loss):
        moved = loss(first * scale + shift, second * scale + shift)
        torch.testing.assert_close(moved, loss(first, second), rtol=1e-6, atol=1e-6)


@given(pair=box_pairs)
@settings(max_examples=50, deadline=None)
def test_identical_boxes_have_no_loss(pair):
    box = as_box(pair[0])
    for loss in (giou_loss(box, box), iou_loss(box, box), iou_loss(box, box, log=False)):
        assert loss.item() == pytest.approx(0, abs=1e-9)


# ---------------------------------------------------------------------------------------------
# PKD, which compares whole feature maps


def test_pkd_agrees_with_a_plain_calculation():
    student, teacher = torch.randn(2, 3, 2, 4).double(), torch.randn(2, 3, 2, 4).double()

    def normalized(features: Tensor) -> list[float]:
        flat = []
        for channel in features.transpose(0, 1).flatten(1).tolist():
            mean = math.fsum(channel) / len(channel)
            variance = math.fsum((x - mean) ** 2 for x in channel) / (len(channel) - 1)
            flat += [(x - mean) / (math.sqrt(variance) + 1e-6) for x in channel]
        return flat

    pairs = list(zip(normalized(student), normalized(teacher), strict=True))
    expected = math.fsum((s - t) ** 2 / 2 for s, t in pairs) / len(pairs)
    assert pkd_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(losses.PKDLoss()(student, teacher), pkd_loss(student, teacher))


def test_pkd_gradient_reaches_the_student_alone():
    student, teacher = (torch.randn(2, 3, 2, 2).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda s: pkd_loss(s, teacher.detach()), student)
    pkd_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_pkd_is_float32_under_autocast():
    student, teacher = torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(2, 3, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = pkd_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, pkd_loss(student.float(), teacher.float()))


def test_pkd_of_constant_channels_is_finite():
    student = torch.zeros(1, 2, 3, 3, requires_grad=True)
    loss = pkd_loss(student, torch.randn(1, 2, 3, 3))
    assert loss.isfinite()
    assert gradient(loss, student).isfinite().all()


# ---------------------------------------------------------------------------------------------
# Errors


@every_loss
def test_error_shapes_differ(case):
    with pytest.raises(ValueError, match=r"expected tensors of one shape, got .* \(2, 4\), .* \(3, 4\)"):
        case(torch.zeros(2, 4), torch.zeros(3, 4))


@every_loss
@pytest.mark.parametrize("side", [0, 1])
def test_error_not_floating_point(case, side):
    arguments = [torch.zeros(2, 4), torch.zeros(2, 4)]
    arguments[side] = arguments[side].long()
    with pytest.raises(TypeError, match=r"must hold floating-point numbers, got torch\.int64"):
        case(*arguments)


@every_loss
def test_error_no_dimension(case):
    with pytest.raises(ValueError, match=r"must have shape \(\.\.\., (classes|4)\)"):
        case(torch.tensor(0.0), torch.tensor(0.0))


@every_loss
@pytest.mark.parametrize("shape", [(), (1,), (2,), (2, 3, 1), (3, 2)])
def test_error_weight_is_not_one_number_a_row(case, shape):
    message = rf"one number a row: expected \(2, 3\), got \({', '.join(map(str, shape))},?\)"
    with pytest.raises(ValueError, match=message):
        case(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), weight=torch.ones(shape))


@every_loss
@pytest.mark.parametrize("normalizer", [0, -1.0, math.nan])
def test_error_normalizer_not_above_zero(case, normalizer):
    with pytest.raises(ValueError, match=f"normalizer must be above 0, got {normalizer}"):
        case(torch.zeros(2, 4), torch.zeros(2, 4), normalizer=normalizer)


@every_loss
def test_error_normalizer_of_several_numbers(case):
    with pytest.raises(ValueError, match=r"normalizer must be one number, got shape \(2,\)"):
        case(torch.zeros(2, 4), torch.zeros(2, 4), normalizer=torch.ones(2))


@every_box_loss
def test_error_boxes_of_five_numbers(case):
    with pytest.raises(
        ValueError, match=r"boxes must have shape \(\.\.\., 4\), xyxy in pixels, got \(2, 5\)"
    ):
        case(torch.zeros(2, 5), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (quality_focal_loss, {"beta": -0.1}, "beta must be 0 or more, got -0.1"),
        (quality_focal_loss, {"beta": math.nan}, "beta must be 0 or more, got nan"),
        (softmax_focal_loss, {"beta": -0.1}, "beta must be 0 or more, got -0.1"),
        (distribution_kl_loss, {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        (sigmoid_focal_loss, {"gamma": -1.0}, "gamma must be 0 or more, got -1.0"),
        (sigmoid_focal_loss, {"alpha": 1.5}, "alpha must be between 0 and 1, or -1 for none, got 1.5"),
        (sigmoid_focal_loss, {"alpha": -0.5}, "alpha must be between 0 and 1, or -1 for none, got -0.5"),
    ],
)
def test_error_options_out_of_range(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(2, 4), torch.zeros(2, 4), **options)


def test_error_pkd():
    with pytest.raises(ValueError, match=r"student_features \(1, 2, 3, 3\), teacher_features \(1, 3, 3, 3\)"):
        pkd_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, 3))
    with pytest.raises(TypeError, match=r"teacher_features must hold floating-point numbers"):
        pkd_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3).int())
