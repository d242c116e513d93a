"""The losses of rows as one table, each with a reference in plain Python and inputs that suit it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from crosskd.losses import (
    distribution_kl_loss,
    giou_loss,
    iou_loss,
    quality_focal_loss,
    softmax_focal_loss,
)
from tests.helpers.plain_losses import giou_row, kl_row, log_iou_row, quality_focal_row, softmax_focal_row
from tests.helpers.reference_files import load_parity


@dataclass(frozen=True)
class Case:
    """A loss with some options, its reference, and inputs that suit it."""

    name: str
    function: Callable[..., Tensor]
    row: Callable[..., float]
    make: Callable[..., tuple[Tensor, Tensor]]
    options: dict[str, Any]

    def __call__(self, student: Tensor, teacher: Tensor, **kwargs: Any) -> Tensor:
        return self.function(student, teacher, **self.options, **kwargs)

    def reference(self, student: Tensor, teacher: Tensor) -> list[float]:
        pairs = zip(student.flatten(0, -2).tolist(), teacher.flatten(0, -2).tolist(), strict=True)
        return [self.row(s, t, **self.options) for s, t in pairs]


def make_logits(*shape: int) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(*shape, 5).double(), 3 * torch.randn(*shape, 5).double()


def make_boxes(*shape: int) -> tuple[Tensor, Tensor]:
    def draw() -> Tensor:
        corner = 20 * torch.rand(*shape, 2).double()
        return torch.cat([corner, corner + 5 + 30 * torch.rand(*shape, 2).double()], dim=-1)

    return draw(), draw()


BETAS = (0.0, 0.5, 1.0, 2.0)
CASES = [
    *(
        Case(f"quality_focal_beta{b:g}", quality_focal_loss, quality_focal_row, make_logits, {"beta": b})
        for b in BETAS
    ),
    *(
        Case(f"softmax_focal_beta{b:g}", softmax_focal_loss, softmax_focal_row, make_logits, {"beta": b})
        for b in BETAS
    ),
    *(
        Case(f"distribution_kl_T{t:g}", distribution_kl_loss, kl_row, make_logits, {"temperature": t})
        for t in (1.0, 10.0)
    ),
    Case("giou", giou_loss, giou_row, make_boxes, {}),
    Case("log_iou", iou_loss, log_iou_row, make_boxes, {}),
]
every_loss = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_box_loss = pytest.mark.parametrize(
    "case", [case for case in CASES if case.make is make_boxes], ids=lambda case: case.name
)
every_logit_loss = pytest.mark.parametrize(
    "case", [case for case in CASES if case.make is make_logits], ids=lambda case: case.name
)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, of)
    return found


def with_gradient(student: Tensor) -> Tensor:
    return student.detach().clone().requires_grad_()


def as_maps(rows: Tensor) -> Tensor:
    """The same numbers (batch, anchors, last) laid out as a head's maps, (batch, last, anchors)."""
    return rows.transpose(1, 2).contiguous().transpose(1, 2)


def assert_published(name: str, function: Callable[..., Tensor]) -> None:
    """Checks a loss and its gradient against published numbers, or skips the test."""
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
