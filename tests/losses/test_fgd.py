"""FGD's loss: attention, masks of objects and background, and the global part."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crosskd.losses import GlobalContext, fgd_loss
from crosskd.losses.fgd import attention, object_masks
from tests.helpers.loss_cases import gradient, with_gradient
from tests.helpers.reference_files import load_parity

WEIGHTS = {"alpha": 1e-3, "beta": 5e-4, "gamma": 5e-4}
CASES = ("fgd_plain", "fgd_overlapping_and_tiny")


def known_of(case: str) -> tuple[dict, GlobalContext, dict]:
    """A case of published numbers, its global part, and the loss's settings without weights."""
    known = load_parity("methods.pt")[case]
    context = GlobalContext(known["student"].shape[1]).double()
    context.load_state_dict(known["state"])
    return known, context, {"stride": known["stride"], "temperature": known["temperature"]}


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_agree_with_numbers_of_others(case):
    known, context, options = known_of(case)
    student = with_gradient(known["student"])
    weights = dict(known["weights"])
    options |= {"context": context, "lambda_": weights.pop("lambda")}
    loss = fgd_loss(student, known["teacher"], known["boxes"], **options, **weights)
    assert loss.item() == pytest.approx(float(known["loss"]), rel=1e-6)
    expected = known["grad_student"]
    scale = expected.abs().max().item()
    torch.testing.assert_close(gradient(loss, student), expected, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("part", ["alpha", "beta", "gamma", "lambda"])
@pytest.mark.parametrize("case", CASES)
def test_each_part_agrees_with_numbers_of_others(case, part):
    known, context, options = known_of(case)
    weights = {name: float(name == part) for name in WEIGHTS}
    options |= {"context": context, "lambda_": float(part == "lambda")}
    loss = fgd_loss(known["student"], known["teacher"], known["boxes"], **options, **weights)
    assert loss.item() == pytest.approx(float(known["unweighted"][part]), rel=1e-6)


def test_the_attention_of_a_map_by_hand():
    features = torch.tensor([[[[0.0, -math.log(4)]], [[0.0, math.log(4)]]]])  # two channels, two locations
    space, channel = attention(features, temperature=1.0)
    torch.testing.assert_close(space, torch.tensor([[[[0.4, 1.6]]]]))
    torch.testing.assert_close(channel, torch.ones(1, 2, 1, 1))


# -- masks ----------------------------------------------------------------------------------------


def plain_foreground(boxes: list[list[float]], height: int, width: int, stride: float) -> list[list[float]]:
    """Cell by cell, box by box."""
    mask = [[0.0] * width for _ in range(height)]
    for x1, y1, x2, y2 in boxes:
        left, top = math.floor(x1 / stride), math.floor(y1 / stride)
        right, bottom = math.ceil(x2 / stride), math.ceil(y2 / stride)
        for row in range(max(top, 0), min(bottom, height - 1) + 1):
            for column in range(max(left, 0), min(right, width - 1) + 1):
                weight = 1 / ((right + 1 - left) * (bottom + 1 - top))
                mask[row][column] = max(mask[row][column], weight)
    return mask


box = st.tuples(*(st.floats(-20, 60, width=32) for _ in range(2)), *(st.floats(0, 40, width=32),) * 2)


@given(boxes=st.lists(box, max_size=4), size=st.tuples(st.integers(1, 6), st.integers(1, 6)))
@settings(max_examples=50)
def test_masks_agree_with_a_plain_calculation(boxes, size):
    """Boxes may lie on each other, on a point, beyond the image or outside it."""
    corners = [[x, y, x + width, y + height] for x, y, width, height in boxes]
    of_images = [torch.tensor(corners, dtype=torch.float64).reshape(-1, 4), torch.zeros(0, 4).double()]
    foreground, background = object_masks(of_images, torch.zeros(2, 3, *size).double(), stride=8)
    expected = torch.tensor(plain_foreground(corners, *size, 8), dtype=torch.float64)
    torch.testing.assert_close(foreground[0, 0], expected, rtol=1e-12, atol=0)
    outside = int((expected == 0).sum())
    torch.testing.assert_close(background[0, 0], (expected == 0).double() / max(outside, 1))
    assert not foreground[1].any()
    torch.testing.assert_close(background[1, 0], torch.full_like(expected, 1 / expected.numel()))


def test_an_inverted_box_covers_nothing():
    """Whose number of cells may be 0, by which nothing must be divided."""
    foreground, _ = object_masks([torch.tensor([[16.0, 0.0, 7.9, 8.0]])], torch.zeros(1, 3, 4, 4), stride=8)
    assert not foreground.any()


def test_the_focal_part_does_not_depend_on_the_size_of_the_image():
    """Twice the image, with its objects: what ``alpha`` and ``beta`` need not be adapted to."""
    student, teacher = torch.randn(2, 2, 3, 1, 1).double()  # constant maps
    box = torch.tensor([[0.0, 0.0, 56.0, 120.0]])
    losses = [
        fgd_loss(
            student.expand(2, 3, side, side),
            teacher.expand(2, 3, side, side),
            [box, box],
            stride=stride,
            temperature=0.5,
            alpha=1.0,
            beta=1.0,
            gamma=0.0,
        )
        for side, stride in ((16, 8), (32, 4))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.1, atol=0)


# -- the global part ------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 7])
def test_all_parameters_of_the_global_part_get_a_gradient(channels):
    context = GlobalContext(channels)
    assert context.channel_add_conv_s[0].out_channels == max(channels // 2, 1)
    student, teacher = torch.randn(2, channels, 3, 3), torch.randn(2, channels, 3, 3)
    loss = context(student, teacher)
    torch.testing.assert_close(loss, (student - teacher).square().sum() / 2)  # the context is zero at first
    loss.backward()
    assert all(parameter.grad is not None for parameter in context.parameters())
    assert context.channel_add_conv_s[3].bias.grad.abs().max() > 0
    assert context.channel_add_conv_t[3].bias.grad.abs().max() > 0


# -- gradient and types ---------------------------------------------------------------------------


def case(images: int = 2, channels: int = 4, dtype: torch.dtype = torch.float64) -> tuple:
    """Maps of 4 x 3 cells, boxes, and a global part that does something."""
    student, teacher = (torch.randn(images, channels, 4, 3).to(dtype) for _ in range(2))
    boxes = [torch.tensor([[0.0, 0.0, 12.0, 20.0], [2.0, 9.0, 7.0, 15.0]])] * images
    context = GlobalContext(channels)
    for parameter in context.parameters():
        torch.nn.init.normal_(parameter)
    return student, teacher, boxes, context


def loss_of(student: Tensor, teacher: Tensor, boxes: list[Tensor], context: GlobalContext | None) -> Tensor:
    weights = {"alpha": 0.7, "beta": 0.5, "gamma": 0.2, "lambda_": 0.1}
    return fgd_loss(student, teacher, boxes, stride=8, temperature=0.5, context=context, **weights)


def test_gradient_reaches_the_student_and_the_global_part_alone():
    student, teacher, boxes, context = case()
    context = context.double()
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss_of(s, teacher, boxes, context), student)
    teacher.requires_grad_()
    loss_of(student, teacher, boxes, context).backward()
    assert teacher.grad is None
    assert all(parameter.grad is not None for parameter in context.parameters())


def test_it_is_float32_under_autocast():
    student, teacher, boxes, context = case(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(student.requires_grad_(), teacher, boxes, context)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, loss_of(student.float(), teacher.float(), boxes, context))
    loss.backward()
    assert student.grad.dtype == torch.bfloat16


def test_a_global_part_in_half_precision():
    student, teacher, boxes, context = case(dtype=torch.bfloat16)
    loss = loss_of(student, teacher, boxes, context.bfloat16())
    expected = loss_of(student.float(), teacher.float(), boxes, context.float())
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)


def test_nothing_of_the_maps_size_is_kept_for_the_gradient():
    student, teacher, boxes, context = case(dtype=torch.bfloat16)
    student = student.requires_grad_() * 1  # as a layer gives it
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(student, teacher, boxes, context)
    copies = [tensor for tensor in kept if isinstance(tensor, Tensor) and tensor.numel() >= student.numel()]
    assert all(tensor.data_ptr() in (student.data_ptr(), teacher.data_ptr()) for tensor in copies)
    loss.backward()


def test_no_images_give_a_zero_with_a_gradient():
    student, teacher, boxes, context = case(images=0)
    loss = loss_of(student.requires_grad_(), teacher, boxes, context.double())
    assert loss.item() == 0
    assert gradient(loss, student).shape == student.shape


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": torch.zeros(1, 3, 4, 4)}, ValueError, r"student \(1, 2, 4, 4\), teacher \(1, 3, 4, 4\)"),
        ({"teacher": torch.zeros(1, 2, 4, 4).int()}, TypeError, "teacher must hold floating-point numbers"),
        ({"boxes": []}, ValueError, "one tensor for each of 1 images, got 0"),
        ({"boxes": [torch.zeros(3, 5)]}, ValueError, r"\(..., 4\), xyxy in pixels, got \(3, 5\)"),
        ({"temperature": 0.0}, ValueError, "temperature and stride must be above 0, got 0.0 and 8"),
        ({"temperature": math.inf}, ValueError, "temperature and stride must be above 0, got inf and 8"),
        ({"stride": math.nan}, ValueError, "temperature and stride must be above 0, got 0.5 and nan"),
    ],
)
def test_errors(changes, error, message):
    maps = {name: torch.zeros(1, 2, 4, 4) for name in ("student", "teacher")}
    given = {**maps, "boxes": [torch.zeros(0, 4)], "stride": 8, "temperature": 0.5, **WEIGHTS}
    with pytest.raises(error, match=message):
        fgd_loss(**(given | changes))


def test_error_maps_without_space():
    maps = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"\(batch, channels, height, width\), got \(2, 3\)"):
        fgd_loss(maps, maps, [torch.zeros(0, 4)] * 2, stride=8, temperature=0.5, **WEIGHTS)


def test_error_contexts_of_other_shapes():
    with pytest.raises(ValueError, match=r"\(2, 8, 4, 4\).*\(2, 8, 1, 1\)"):
        GlobalContext(8)(torch.ones(2, 8, 4, 4), torch.ones(2, 8, 1, 1))
