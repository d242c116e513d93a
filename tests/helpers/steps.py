"""Training steps of made-up predictions, for tests of methods without a detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crosskd.adapters import Adapter, Anchors, Batch, Head, Objects
from crosskd.pairing import Pair
from crosskd.predictions import Assignment, Predictions
from crosskd.step import DetectorTrace, HeadTrace, Side, Step
from crosskd.towers import Branch

BATCH, ANCHORS, CLASSES, BINS = 2, 6, 3, 5
METHOD = "crosskd"
EVERYTHING = frozenset({"maps", "towers", "predictions", "objects", "queries"})


class PlainHead(Head):
    """A head that predicts boxes as they are; every field of a `Head` may be given."""

    def __init__(self, branches: Sequence[Branch] = (), **fields: Any) -> None:
        self.branches, self.num_classes = tuple(branches), CLASSES
        vars(self).update(fields)

    def predict(self, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        raise NotImplementedError

    def anchors(self, batch: Batch, maps: Sequence[Tensor]) -> Anchors:
        return Anchors(None, (ANCHORS,))

    def decode(self, predictions: Predictions, anchors: Any) -> Tensor:
        return predictions.regression

    def losses(self, predictions: Predictions, anchors: Anchors, batch: Batch) -> Any:
        raise NotImplementedError


class PlainAdapter(Adapter):
    """An adapter of no detector; every field of an `Adapter` may be given."""

    def __init__(self, *heads: Head, **fields: Any) -> None:
        self.detector, self.heads = nn.Identity(), heads
        vars(self).update(fields)

    def prepare(self, images: Any, targets: Any) -> Batch:
        raise NotImplementedError

    def maps(self, pixels: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def own_outputs(self, batch: Batch) -> list[Any]:
        raise NotImplementedError


def make_predictions(
    *,
    bins: int | None = None,
    quality: bool = False,
    box_per_class: bool = False,
    background: int | None = None,
    objectness: bool = False,
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
        torch.randn(BATCH, ANCHORS).double().requires_grad_() if quality or objectness else None,
        background=background,
        box_per_class=box_per_class,
        objectness=objectness,
    )


def make_assignment(*, weighted: bool = True) -> Assignment:
    """Five of the twelve anchors are positive, three others don't count."""
    positive = torch.zeros(BATCH, ANCHORS, dtype=torch.bool)
    positive[0, :3] = positive[1, 4:] = True
    weights = torch.ones(BATCH, ANCHORS)
    weights[0, 4] = weights[1, :2] = 0
    return Assignment(weights if weighted else None, positive, torch.tensor(5.0))


def make_side(
    predictions: Predictions | None = None,
    *,
    head: Head | None = None,
    adapter: Adapter | None = None,
    maps: Sequence[Tensor] = (),
    taps: Mapping[str, Sequence[Any]] | None = None,
    levels: Sequence[int] = (0,),
    anchors: Any = None,
    objects: tuple[Objects, ...] | None = None,
    requires: frozenset[str] = EVERYTHING,
) -> Side:
    """One side of a step, of a method called `METHOD`; without predictions no head was run."""
    head = head or PlainHead()
    batch = Batch(torch.zeros(BATCH, 3, 8, 8), ((8, 8),) * BATCH, objects)
    run = None
    if predictions is not None:
        run = HeadTrace(head, predictions, tuple(levels), {METHOD: dict(taps or {})}, anchors, anchors)
    trace = DetectorTrace(adapter or PlainAdapter(head), batch, maps, {})
    return Side(trace, run, requires, METHOD)


def make_step(
    student: Predictions | None = None,
    teacher: Predictions | None = None,
    *,
    weighted: bool = True,
    assignment: Assignment | None = None,
    **options: Any,
) -> Step:
    """A step whose boxes are the regression itself; ``options`` are those of `make_predictions`."""
    theirs = (make_predictions(**options) if teacher is None else teacher).detach()
    ours = make_predictions(**options) if student is None else student
    return Step(
        make_side(theirs), make_side(ours), assignment=assignment or make_assignment(weighted=weighted)
    )


def make_pair(teacher: Head, student: Head, **fields: Any) -> Pair:
    """Two detectors of one head each; ``fields`` are those of `Pair`."""
    return Pair(
        PlainAdapter(teacher), PlainAdapter(student), teacher_head=teacher, student_head=student, **fields
    )
