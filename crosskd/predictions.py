"""What every dense head predicts, in one form, and which of its locations count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosskd._checks import compute_dtype, shape_text

__all__ = ["Assignment", "Predictions", "assignment_from_teacher", "join_levels", "mean_over_ranks"]


@dataclass(frozen=True, eq=False)
class Predictions:
    """A head's predictions for a batch, all levels one behind the other.

    Attributes:
        logits: shape (batch, anchors, classes), before the sigmoid.
        regression: shape (batch, anchors, 4) as the head encodes boxes, or
            (batch, anchors, 4, bins) for a distribution over each side.
        quality: shape (batch, anchors), the logits of a centerness or IoU prediction, or ``None``.

    Raises:
        ValueError: other shapes than these.
    """

    logits: Tensor
    regression: Tensor
    quality: Tensor | None

    def __post_init__(self) -> None:
        if self.logits.ndim != 3:
            raise ValueError(
                f"logits must have shape (batch, anchors, classes), got {shape_text(self.logits)}"
            )
        batch, anchors = self.logits.shape[:2]
        if self.regression.ndim not in (3, 4) or self.regression.shape[:3] != (batch, anchors, 4):
            raise ValueError(
                f"regression must have shape ({batch}, {anchors}, 4) or ({batch}, {anchors}, 4, bins), "
                f"(batch, anchors) as the logits have, got {shape_text(self.regression)}"
            )
        if self.quality is not None and self.quality.shape != (batch, anchors):
            raise ValueError(
                f"quality must have shape ({batch}, {anchors}), (batch, anchors) as the logits have, "
                f"got {shape_text(self.quality)}"
            )

    def confidence(self) -> Tensor:
        """The largest class probability at each anchor, shape (batch, anchors), in float32 at least."""
        return self.logits.amax(dim=-1).to(compute_dtype(self.logits)).sigmoid()

    def of_classes(self, indices: Sequence[int] | None) -> Predictions:
        """The same with the logits of some classes alone, in the given order; ``None`` for all."""
        if indices is None:
            return self
        return Predictions(self.logits[..., list(indices)], self.regression, self.quality)

    def detach(self) -> Predictions:
        """The same numbers without their history."""
        quality = None if self.quality is None else self.quality.detach()
        return Predictions(self.logits.detach(), self.regression.detach(), quality)


def join_levels(levels: Iterable[Predictions]) -> Predictions:
    """The predictions of several levels, one behind the other.

    Args:
        levels: each level's predictions, finest first.
    """
    listed = list(levels)
    quality = [level.quality for level in listed if level.quality is not None]
    return Predictions(
        torch.cat([level.logits for level in listed], dim=1),
        torch.cat([level.regression for level in listed], dim=1),
        torch.cat(quality, dim=1) if quality else None,
    )


@dataclass(frozen=True, eq=False)
class Assignment:
    """Which anchors count, which hold an object, and what losses over them are divided by.

    Attributes:
        counted: shape (batch, anchors), 1 where an anchor counts at all, else 0; ``None`` for all.
            Heads of several halves that their own losses weight give their anchors these weights.
        positive: shape (batch, anchors), true where an anchor is responsible for an object.
        normalizer: shape (), the number of positives (RetinaNet, GFL, ATSS) or the sum of their
            centerness targets (FCOS); at least 1, averaged over processes.
    """

    counted: Tensor | None
    positive: Tensor
    normalizer: Tensor


def assignment_from_teacher(teacher: Predictions, threshold: float, *, quality: bool) -> Assignment:
    """An assignment for images without targets: the teacher's confident anchors are the positives.

    With targets the normaliser is the number of anchors that the label assignment holds responsible for
    an object. Without them the best estimate of it is the number that the teacher itself would answer
    with, so an unlabelled image weighs about what a labelled one does, and the two may be mixed in one
    run without another weight. All anchors count. An image of which the teacher is confident nowhere
    counts as one positive, as an image without boxes does.

    Args:
        teacher: the teacher's predictions.
        threshold: an anchor is positive from this class probability on.
        quality: sum the positives' predicted quality, as heads normalised by centerness do, where the
            head predicts it, instead of counting them.
    """
    positive = teacher.confidence() >= threshold
    amount = positive.float()
    if quality and teacher.quality is not None:
        amount = amount * teacher.quality.float().sigmoid()
    normalizer = mean_over_ranks(amount.sum(dim=1).clamp(min=1).sum())
    return Assignment(counted=None, positive=positive, normalizer=normalizer)


def mean_over_ranks(value: Tensor) -> Tensor:
    """A number averaged over the processes of a distributed run; itself where there is one process.

    Every process must call it as often as the others.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    ranks = torch.distributed.get_world_size()
    if ranks == 1:
        return value
    value = value.detach().clone()
    torch.distributed.all_reduce(value)
    return value / ranks
