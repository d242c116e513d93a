"""Training steps of made-up predictions, for tests of methods without a detector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from crosskd.methods import Step
from crosskd.predictions import Assignment, Predictions

BATCH, ANCHORS, CLASSES, BINS = 2, 6, 3, 5


def make_predictions(
    *, bins: int | None = None, quality: bool = False, box_per_class: bool = False
) -> Predictions:
    """Random predictions in float64; boxes are regressed as they are."""
    shape = (BATCH, ANCHORS, CLASSES, 2) if box_per_class else (BATCH, ANCHORS, 2)
    corner = 10 * torch.rand(shape).double()
    regression = torch.cat([corner, corner + 2 + 10 * torch.rand(shape).double()], dim=-1)
    if bins is not None:
        regression = 2 * torch.randn(BATCH, ANCHORS, 4, bins).double()
    logits = 2 * torch.randn(BATCH, ANCHORS, CLASSES).double()
    return Predictions(
        logits.requires_grad_(),
        regression.requires_grad_(),
        torch.randn(BATCH, ANCHORS).double().requires_grad_() if quality else None,
        box_per_class=box_per_class,
    )


def make_assignment(*, counted: bool = True) -> Assignment:
    """Five of the twelve anchors are positive, three others don't count."""
    positive = torch.zeros(BATCH, ANCHORS, dtype=torch.bool)
    positive[0, :3] = positive[1, 4:] = True
    counts = torch.ones(BATCH, ANCHORS)
    counts[0, 4] = counts[1, :2] = 0
    return Assignment(counts if counted else None, positive, torch.tensor(5.0))


def make_step(
    student: Predictions | None = None,
    teacher: Predictions | None = None,
    *,
    counted: bool = True,
    **options: Any,
) -> Step:
    """A step whose boxes are the regression itself, for predictions that are boxes already."""
    boxes: Callable[[Predictions], Tensor] = lambda predictions: predictions.regression  # noqa: E731
    return Step(
        student=make_predictions(**options) if student is None else student,
        teacher=(make_predictions(**options) if teacher is None else teacher).detach(),
        assignment=make_assignment(counted=counted),
        teacher_branches=(),
        student_taps={},
        teacher_taps={},
        predict_as_teacher=lambda towers: make_predictions(**options),
        boxes=boxes,
    )
