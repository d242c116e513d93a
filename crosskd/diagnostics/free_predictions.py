"""What a head would predict if nothing but its own losses had a say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from crosskd.adapters.base import Adapter, Batch, Head, Objects, RegionHead
from crosskd.diagnostics._objects import counts_of, overlaps, rows_of_images
from crosskd.predictions import Assignment, Predictions

__all__ = ["FreePredictions", "is_distribution", "objects_for"]

# What they must reach, and at how many of the positive anchors: not at all of them, for an assignment may
# follow the predictions, and give an anchor another object at the last moment.
_OVERLAP, _SHARE = 0.9, 0.75
# Steps of Adam, in logits and in a typical object's side.
_LOGIT_STEP, _BOX_STEP, _NUDGE, _FLATTEST = 0.2, 0.05, 1e-2, 1e-3
# Of an object's side: proposals that far off are still that object's.
_OFF = 0.15


def is_distribution(predictions: Predictions) -> bool:
    """Whether each side of a box is predicted as a distribution."""
    return predictions.regression.ndim == 4 and not predictions.box_per_class


def objects_for(head: Head, adapter: Adapter, batch: Batch) -> tuple[Objects, ...]:
    """A batch's objects; all of class 0 for an earlier head, which separates objects from background."""
    assert batch.objects is not None
    if head is adapter.heads[-1] or head.num_classes > 1:
        return batch.objects
    return tuple(Objects(o.boxes, torch.zeros_like(o.labels)) for o in batch.objects)


class FreePredictions:
    """Predictions that are free numbers instead of a network's outputs, and what a head's own losses make of
    them.

    Minimising the losses over them leads to the objects' own boxes and labels, so that decoding and the order
    of classes can be read off the result, for any head and without a trained network.

    Args:
        head: whose losses and decoding are meant.
        batch: with objects.
        anchors: where the predictions stand, or the regions that they are for.
        objects: of each image, labelled as this head does.
        start: predictions of the detector, for their shapes and as one of the points to start from.
    """

    def __init__(
        self, head: Head, batch: Batch, anchors: Any, objects: Sequence[Objects], start: Predictions
    ) -> None:
        self.head, self.batch, self.anchors, self.objects = head, batch, anchors, objects
        self.counts = counts_of(head, anchors)
        # Losses of boxes far apart may have no gradient. Zeros are an anchor itself where anchors are shifted
        # and stretched, and no box at all where distances are predicted, for which ones are a small box.
        starts = [torch.zeros_like(start.regression), torch.ones_like(start.regression), start.regression]
        candidates = [replace(start, regression=regression) for regression in starts]
        self.predictions = max(candidates, key=self._overlap).detach()
        self.assignment: Assignment | None = None

    def fit(self, steps: int) -> None:
        """Minimises the losses by Adam."""
        start, scale = self.predictions, self._scale()
        logits = torch.full_like(start.logits, -2.0).requires_grad_()
        offset = torch.zeros_like(start.regression).requires_grad_()
        quality = None if start.quality is None else torch.zeros_like(start.quality).requires_grad_()
        free = [logits, offset, *([] if quality is None else [quality])]
        groups = [{"params": [leaf], "lr": _BOX_STEP if leaf is offset else _LOGIT_STEP} for leaf in free]
        # Losses may weigh an object next to nothing, but its numbers are to arrive as well.
        optimizer = torch.optim.Adam(groups, eps=1e-12)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            regression = start.regression + scale * offset
            predictions = replace(start, logits=logits, regression=regression, quality=quality)
            losses, self.assignment = self.head.losses(predictions, self.anchors, self.batch)
            total = torch.stack([loss for loss in losses.values() if loss.requires_grad]).sum()
            for leaf, gradient in zip(free, torch.autograd.grad(total, free, allow_unused=True), strict=True):
                leaf.grad = gradient
            optimizer.step()
            schedule.step()
            self.predictions = predictions.detach()

    def regions_of(self, head: RegionHead) -> Any:
        """The regions that follow, somewhat off: proposals that are the objects leave nothing to decode."""
        offset = torch.empty_like(self.predictions.regression).uniform_(-_OFF, _OFF)
        moved = replace(self.predictions, regression=self.predictions.regression + self._scale() * offset)
        self.head.losses(moved, self.anchors, self.batch)  # regions are asked for after them
        return head.regions(moved, self.anchors, self.batch)

    def _decoded(self, predictions: Predictions) -> tuple[Tensor, ...]:
        return rows_of_images(self.head.decode(predictions, self.anchors), self.counts)

    def _overlap(self, predictions: Predictions) -> float:
        """How much predicted boxes overlap the objects."""
        pairs = zip(self._decoded(predictions), self.objects, strict=True)
        return sum(float(overlaps(boxes.reshape(-1, 4), o.boxes).sum()) for boxes, o in pairs)

    def _scale(self) -> Tensor | float:
        """By how much each number of the regression must change for its box to change by an object's size.

        A head may predict in pixels, strides, anchor sizes or their logarithms; so steps of one size suit
        all.
        """
        start = self.predictions
        if is_distribution(start):
            return _LOGIT_STEP / _BOX_STEP  # the logits of a distribution
        boxes = torch.cat([of_image.boxes for of_image in self.objects])
        side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1).mean().to(start.regression)
        at_start, slopes = self.head.decode(start, self.anchors), []
        for index in range(4):
            nudged = start.regression.clone()
            nudged[..., index] += _NUDGE
            moved = self.head.decode(replace(start, regression=nudged), self.anchors) - at_start
            slopes.append(moved.abs().amax(dim=-1) / _NUDGE)  # (batch, anchors)
        return side / torch.stack(slopes, dim=-1).clamp(min=_FLATTEST).to(start.regression)

    def findings(self) -> Iterator[str]:
        """What is wrong with boxes and classes at the positive anchors."""
        assert self.assignment is not None
        whole = self.predictions.logits, self.assignment.positive
        columns = [rows_of_images(rows, self.counts) for rows in whole]
        seen = []
        for boxes, logits, positive, of_image in zip(
            self._decoded(self.predictions), *columns, self.objects, strict=True
        ):
            if bool(positive.any()) and len(of_image.labels):
                seen.append(self._compared(boxes[positive], logits[positive], of_image))
        if not seen:
            yield ("no anchor is responsible for any object of the targets")
            return
        best, right, shifts, own = (torch.cat(column) for column in zip(*seen, strict=True))
        smallest = "where the student's own losses are smallest"
        missed = int((best < _OVERLAP).sum())
        if missed > (1 - _SHARE) * len(best):
            yield (
                f"decoding: {smallest}, the decoded boxes of {missed} of {len(best)} positive anchors "
                f"overlap no object by an IoU of {_OVERLAP} (median of the best {float(best.median()):.2f})"
            )
        # Only where its box is right is it clear whose label an anchor was to learn.
        right, shifts, own = (column[best >= _OVERLAP] for column in (right, shifts, own))
        wrong = int((~right).sum())
        if wrong > (1 - _SHARE) * len(right):
            yield (
                f"classes: {smallest}, the largest logit of {wrong} of {len(right)} positive anchors is not "
                f"that of the object's label (mostly of label {int(shifts[~right].mode().values):+d})"
            )
        wrong = int((own < _OVERLAP).sum())
        if wrong > (1 - _SHARE) * len(own):
            yield (
                f"classes: {smallest}, it is another class's box than that of the object's label which fits "
                f"at {wrong} of {len(own)} positive anchors"
            )

    def _compared(self, boxes: Tensor, logits: Tensor, objects: Objects) -> tuple[Tensor, ...]:
        """(best overlap, whether the label is right, by how much it is off, the label's box's overlap)."""
        labels = objects.labels
        boxes = boxes if boxes.ndim == 3 else boxes[:, None]  # (positives, classes, 4)
        by_class = overlaps(boxes.flatten(0, 1), objects.boxes).view(*boxes.shape[:2], -1)
        overlap = by_class.amax(dim=1)  # (positives, objects)
        found = logits.argmax(dim=-1)
        fitting = (overlap >= _OVERLAP) & (found[:, None] == labels)
        shifts = (found - labels[overlap.argmax(dim=1)]) % logits.shape[-1]
        of_labels = labels if self.predictions.box_per_class else torch.zeros_like(labels)
        own = by_class[:, of_labels, torch.arange(len(labels), device=labels.device)]
        return overlap.amax(dim=1), fitting.any(dim=1), shifts, own.amax(dim=1)
