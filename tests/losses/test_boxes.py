"""The losses of boxes: against torchvision, by hand, and what holds for all boxes."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crosskd.losses import giou_loss, iou_loss
from tests.helpers.loss_cases import assert_published, every_box_loss, gradient, make_boxes

# Compiled kernels of older PyTorch versions leave the processor unable to represent subnormal numbers.
coordinates = st.floats(-500, 500, width=32, allow_subnormal=False)
extents = st.floats(0.125, 1000, width=32)
box_pairs = st.tuples(*[st.tuples(coordinates, coordinates, extents, extents)] * 2)


@pytest.mark.parametrize(("name", "function"), [("giou", giou_loss), ("log_iou", iou_loss)])
def test_published_value_and_gradient(name, function):
    assert_published(name, function)


def test_values_by_hand():
    # A box over the left half of its target: IoU 1/2, and nothing outside of the union is enclosed.
    box, target = torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[0.0, 0.0, 4.0, 2.0]])
    assert giou_loss(box, target).item() == pytest.approx(0.5)
    assert iou_loss(box, target).item() == pytest.approx(math.log(2))
    # Two unit squares whose corners are one unit apart: union 2 in an enclosing square of 9.
    apart = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[2.0, 2.0, 3.0, 3.0]])
    assert giou_loss(*apart).item() == pytest.approx(1 + 7 / 9)


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


def test_boxes_agree_with_torchvision():
    boxes, targets = make_boxes(20)
    expected = torchvision.ops.generalized_box_iou_loss(boxes, targets, reduction="mean", eps=0)
    torch.testing.assert_close(giou_loss(boxes, targets), expected, rtol=1e-12, atol=0)
    iou = torchvision.ops.box_iou(boxes, targets).diagonal()
    log = -iou.clamp(min=1e-6).log().mean()
    torch.testing.assert_close(iou_loss(boxes, targets), log, rtol=1e-12, atol=0)


def as_box(numbers: tuple[float, float, float, float]) -> Tensor:
    x, y, width, height = numbers
    return torch.tensor([[x, y, x + width, y + height]], dtype=torch.float64)


@given(pair=box_pairs)
@settings(max_examples=100, deadline=None)
def test_box_losses_are_symmetric_and_bounded(pair):
    first, second = map(as_box, pair)
    for loss, largest in ((giou_loss, 2.0), (iou_loss, -math.log(1e-6))):
        value = loss(first, second).item()
        assert value == pytest.approx(loss(second, first).item(), rel=1e-9, abs=1e-9)
        assert -1e-9 <= value <= largest + 1e-9
    # GIoU is at most the IoU.
    assert giou_loss(first, second) >= 1 - (-iou_loss(first, second)).exp() - 1e-9


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
    for loss in (giou_loss(box, box), iou_loss(box, box)):
        assert loss.item() == pytest.approx(0, abs=1e-9)


@every_box_loss
def test_error_boxes_of_five_numbers(case):
    with pytest.raises(
        ValueError, match=r"boxes must have shape \(\.\.\., 4\), xyxy in pixels, got \(2, 5\)"
    ):
        case(torch.zeros(2, 5), torch.zeros(2, 4))
