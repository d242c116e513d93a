"""Predictions in one form, and what counts where there are no targets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributed

from crosskd.predictions import Predictions, join_levels, mean_over_ranks, positives_of_teacher
from tests.helpers.plain_losses import sigmoid


def predictions(logits: torch.Tensor, quality: torch.Tensor | None = None, **fields) -> Predictions:
    return Predictions(logits, torch.zeros(*logits.shape[:2], 4), quality, **fields)


def with_a_box_a_class(classes: int, background: int | None = 0, anchors: int = 5) -> Predictions:
    logits, regression = torch.randn(2, anchors, classes), torch.randn(2, anchors, classes, 4)
    return Predictions(logits, regression, None, background, box_per_class=True)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_confidence_is_the_largest_probability(dtype, expected):
    logits = torch.tensor([[[-1.0, 2.0], [0.0, -3.0]]], dtype=dtype)
    confidence = predictions(logits).confidence()
    assert confidence.dtype == expected
    torch.testing.assert_close(confidence, torch.tensor([[2.0, 0.0]], dtype=expected).sigmoid())


def test_detach_cuts_the_history_of_all_three():
    tensors = (torch.randn(2, 5, 3), torch.randn(2, 5, 4, 7), torch.randn(2, 5))
    whole = Predictions(*(tensor.requires_grad_() for tensor in tensors))
    detached = whole.detach()
    for name in ("logits", "regression", "quality"):
        assert torch.equal(getattr(detached, name), getattr(whole, name))
        assert not getattr(detached, name).requires_grad
    assert predictions(tensors[0]).detach().quality is None


# -- objectness: a class's probability is the product of two sigmoids --------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_with_objectness_a_probability_is_the_product(dtype):
    logits, quality = (3 * torch.randn(2, 5, 3)).to(dtype), (3 * torch.randn(2, 5)).to(dtype)
    found = predictions(logits, quality, objectness=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = logits.to(wide).sigmoid() * quality.to(wide).sigmoid().unsqueeze(-1)
    assert found.probabilities().dtype == wide
    torch.testing.assert_close(found.probabilities(), expected)
    torch.testing.assert_close(found.confidence(), expected.amax(-1))
    torch.testing.assert_close(found.of_classes([2, 0]).probabilities(), expected[..., [2, 0]])
    for kept in (found.detach(), join_levels([found])):
        torch.testing.assert_close(kept.probabilities(), expected)
    plain = predictions(logits, quality)
    assert plain.class_logits() is logits  # a centerness multiplies nothing
    torch.testing.assert_close(plain.confidence(), logits.to(wide).amax(-1).sigmoid())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 20.0, 90.0, 600.0, 1e4])
def test_logits_and_gradients_of_the_product_are_sound(size, dtype):
    """Of probabilities that round to 0 and 1, too."""
    values = size * torch.tensor([-1.0, 1.0, 0.5, 0.0, 0.9])
    a, b = (n.to(dtype).requires_grad_() for n in torch.cartesian_prod(values, values).unbind(1))
    found = predictions(a.view(1, -1, 1), b.view(1, -1), objectness=True).class_logits()
    found.sum().backward()
    rows = torch.stack([n.detach() for n in (a, b, found.flatten(), a.grad, b.grad)], dim=1).tolist()
    for x, y, logit, of_x, of_y in rows:
        if size <= 600:  # 1 / p - 1 is expm1 of this
            amount = softplus(-x) + softplus(-y)
            expected = -math.log(math.expm1(amount)) if amount < 30 else -amount
            assert logit == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert of_x == pytest.approx(sigmoid(softplus(y) - x), rel=1e-3, abs=1e-6)
        assert of_y == pytest.approx(sigmoid(softplus(x) - y), rel=1e-3, abs=1e-6)


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def test_error_objectness():
    with pytest.raises(ValueError, match="got quality None and background None"):
        predictions(torch.zeros(2, 5, 3), objectness=True)
    with pytest.raises(ValueError, match="got quality given and background 0"):
        predictions(torch.zeros(2, 5, 3), torch.zeros(2, 5), background=0, objectness=True)


# -- a softmax over all classes --------------------------------------------------------------------


@pytest.mark.parametrize("background", [0, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_of_a_softmax_leave_out_the_background(background, dtype):
    logits = torch.randn(2, 5, 3).to(dtype)
    found = predictions(logits, background=background)
    wide = logits.to(torch.float64 if dtype == torch.float64 else torch.float32)
    expected = wide.softmax(-1)
    expected[..., background] = 0
    assert found.probabilities().dtype == wide.dtype
    torch.testing.assert_close(found.probabilities(), expected)
    torch.testing.assert_close(found.confidence(), expected.amax(-1))
    assert torch.equal(found.box_confidence(), found.confidence())


def test_an_anchor_that_is_sure_of_the_background_is_confident_of_nothing():
    logits = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]]])
    confidence = predictions(logits, background=0).confidence()
    assert confidence[0, 0] < 1e-3
    assert confidence[0, 1] > 0.99
    assignment = positives_of_teacher(predictions(logits, background=0), 0.5)
    assert assignment.positive.tolist() == [[False, True]]
    assert assignment.normalizer == 1


def test_probabilities_of_sigmoids():
    logits = torch.randn(2, 5, 3)
    assert torch.equal(predictions(logits).probabilities(), logits.sigmoid())


def test_each_box_of_a_class_is_as_sure_as_the_class():
    whole = with_a_box_a_class(3)
    assert torch.equal(whole.box_confidence(), whole.probabilities())
    assert whole.confidence().shape == (2, 5)
    assert not whole.box_confidence()[..., 0].any()


def test_classes_may_be_chosen_and_turned_round():
    whole = with_a_box_a_class(4)
    chosen = whole.of_classes([3, 0, 1])
    assert torch.equal(chosen.logits[..., [0, 2]], whole.logits[..., [3, 1]])
    assert torch.equal(chosen.regression, whole.regression[:, :, [3, 0, 1]])
    assert chosen.background == 1
    assert chosen.box_per_class
    assert whole.of_classes(None) is whole
    shared = predictions(torch.randn(2, 5, 4)).of_classes((2, 1))
    assert shared.logits.shape == (2, 5, 2)
    assert shared.regression.shape == (2, 5, 4)
    assert shared.background is None
    with pytest.raises(ValueError, match=r"the classes \[1, 2\] leave out 0, which means no object"):
        whole.of_classes([1, 2])


@pytest.mark.parametrize("listed", [[0, 2], [3, 0], [2, 4, 0, 1], [4, 3, 2, 1, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_that_are_left_out_of_a_softmax_count_as_background(listed, dtype):
    whole = predictions(torch.randn(2, 5, 5).to(dtype), background=0)
    chosen = whole.of_classes(listed)
    assert chosen.logits.dtype == dtype
    torch.testing.assert_close(chosen.probabilities(), whole.probabilities()[..., listed])
    if len(listed) == 5:
        assert torch.equal(chosen.logits, whole.logits[..., listed])


def test_joined_and_detached_they_stay_of_their_kind():
    levels = [with_a_box_a_class(3, background=2, anchors=anchors) for anchors in (5, 2)]
    for level in levels:
        level.logits.requires_grad_()
    joined = join_levels(levels)
    assert joined.logits.shape == (2, 7, 3)
    assert torch.equal(joined.regression[:, 5:], levels[1].regression)
    for found in (joined, joined.detach()):
        assert (found.background, found.box_per_class) == (2, True)
    assert joined.logits.requires_grad
    assert not joined.detach().logits.requires_grad


@pytest.mark.parametrize("background", [-1, 3])
def test_error_background(background):
    with pytest.raises(ValueError, match=f"one of the 3 classes, 0 to 2, got {background}"):
        predictions(torch.zeros(2, 5, 3), background=background)


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 5, 4, 4), (2, 5, 12), (2, 4, 3, 4)])
def test_error_boxes_of_classes(shape):
    message = r"regression must have shape \(2, 5, 3, 4\), a box for each class that the logits have, got"
    with pytest.raises(ValueError, match=message):
        Predictions(torch.zeros(2, 5, 3), torch.zeros(shape), None, box_per_class=True)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 5), (2, 5, 4), None), r"logits must have shape \(batch, anchors, classes\), got \(2, 5\)"),
        (((2, 5, 3), (2, 6, 4), None), r"regression must have shape \(2, 5, 4\) or .*, got \(2, 6, 4\)"),
        (((2, 5, 3), (2, 5, 68), None), r"regression must .* or \(2, 5, 4, bins\), .* got \(2, 5, 68\)"),
        (((2, 5, 3), (2, 5, 4, 7, 1), None), r"regression must .*, got \(2, 5, 4, 7, 1\)"),
        (((2, 5, 3), (2, 5, 4), (2, 4)), r"quality must have shape \(2, 5\), .* got \(2, 4\)"),
        (((2, 5, 3), (2, 5, 4), (2, 5, 1)), r"quality must have shape \(2, 5\), .* got \(2, 5, 1\)"),
    ],
)
def test_error_shapes(shapes, message):
    tensors = [None if shape is None else torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        Predictions(*tensors)


def logit(probability: float) -> float:
    return torch.tensor(probability).logit().item()


def test_assignment_from_a_confident_teacher():
    logits = torch.full((2, 4, 3), -5.0)
    logits[0, 1, 2], logits[0, 3, 0], logits[1, 0, 1] = logit(0.6), logit(0.9), logit(0.4)
    assignment = positives_of_teacher(predictions(logits), 0.5)
    assert assignment.label_weights is None
    assert assignment.positive.tolist() == [[False, True, False, True], [False] * 4]
    # Two in the first image; the second, without any, counts as one.
    assert assignment.normalizer.item() == 3
    lower = positives_of_teacher(predictions(logits), 0.3)
    assert lower.positive[1, 0]
    assert lower.normalizer.item() == 3


def test_assignment_sums_quality_where_the_head_is_normalised_by_it():
    logits, quality = torch.full((1, 4, 2), 3.0), torch.tensor([[0.5, 0.8, 0.9, 0.1]]).logit()
    summed = positives_of_teacher(predictions(logits, quality), 0.5, sum_quality=True)
    assert summed.normalizer.item() == pytest.approx(2.3)
    number = positives_of_teacher(predictions(logits, quality), 0.5)
    assert number.normalizer.item() == 4
    without = positives_of_teacher(predictions(logits), 0.5, sum_quality=True)
    assert without.normalizer.item() == 4


def test_mean_over_ranks_of_one_process():
    value = torch.tensor(3.0)
    assert mean_over_ranks(value) is value
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert mean_over_ranks(value) is value
    finally:
        distributed.destroy_process_group()
