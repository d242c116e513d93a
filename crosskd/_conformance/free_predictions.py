"""What a detector would predict if nothing but its own losses had a say.

Logits and regression are free numbers here instead of a network's outputs. Minimising the detector's own
losses over them leads to the targets' own boxes and labels, so that decoding and the order of classes can be
read off the result, for any adapter and without a trained network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from crosskd._conformance.bench import Source
from crosskd._truth import overlaps, rows_of_images
from crosskd.adapters.protocol import Inputs, SecondStage
from crosskd.predictions import Assignment, Predictions

__all__ = ["counts_of", "fit_freely", "moved_about"]

# Of Adam's, which makes steps of about this size: in logits, and in a typical object's side.
_LOGIT_STEP, _BOX_STEP = 0.2, 0.05
_NUDGE = 1e-2
_FLATTEST = 1e-3
# Of an object's side: boxes that far off are still that object's.
_OFF = 0.15


def fit_freely(
    source: Source,
    student: nn.Module,
    inputs: Inputs,
    start: Predictions,
    locations: Any,
    objects: Sequence[Mapping[str, Tensor]],
    steps: int,
) -> tuple[Predictions, Assignment]:
    """Minimises a detector's own losses over predictions that are free numbers.

    Args:
        source: whose losses and decoding are meant.
        student: the detector.
        inputs: the batch.
        start: predictions of the detector, for their shapes and as one of the points to start from.
        locations: where they stand, or the regions that they are for.
        objects: ``boxes`` (objects, 4), xyxy in resized pixels, for each image.
        steps: of Adam.

    Returns:
        The predictions, and the assignment that they ended with.
    """
    start = _best_start(source, student, start.detach(), locations, objects)
    scale = _scale(source, student, start, locations, objects)
    logits = torch.full_like(start.logits, -2.0).requires_grad_()
    offset = torch.zeros_like(start.regression).requires_grad_()
    free = [logits, offset]
    groups: list[dict[str, Any]] = [{"params": [logits], "lr": _LOGIT_STEP}, {"params": [offset]}]
    quality = None
    if start.quality is not None:
        quality = torch.zeros_like(start.quality).requires_grad_()
        free.append(quality)
        groups.append({"params": [quality], "lr": _LOGIT_STEP})
    # Losses may weigh an object next to nothing, but its numbers are to arrive as well.
    optimizer = torch.optim.Adam(groups, lr=_BOX_STEP, eps=1e-12)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        regression = start.regression + scale * offset
        predictions = replace(start, logits=logits, regression=regression, quality=quality)
        losses, assignment = source.losses(student, predictions, locations, inputs)
        total = torch.stack([loss for loss in losses.values() if loss.requires_grad]).sum()
        for leaf, gradient in zip(free, torch.autograd.grad(total, free, allow_unused=True), strict=True):
            leaf.grad = gradient
        optimizer.step()
        schedule.step()
    return predictions.detach(), assignment


def moved_about(
    source: Source,
    student: nn.Module,
    predictions: Predictions,
    locations: Any,
    objects: Sequence[Mapping[str, Tensor]],
) -> Predictions:
    """The same predictions with each side of their boxes somewhat off, by chance."""
    scale = _scale(source, student, predictions, locations, objects)
    offset = torch.empty_like(predictions.regression).uniform_(-_OFF, _OFF)
    return replace(predictions, regression=predictions.regression + scale * offset)


def counts_of(source: Source, locations: Any) -> Sequence[int] | None:
    """How many regions each image has; ``None`` for a head that does not answer for regions."""
    return source.counts(locations) if isinstance(source, SecondStage) else None


def _best_start(
    source: Source,
    student: nn.Module,
    start: Predictions,
    locations: Any,
    objects: Sequence[Mapping[str, Tensor]],
) -> Predictions:
    """A regression whose boxes overlap the objects: losses of boxes far apart may have no gradient.

    Zeros are an anchor itself where anchors are shifted and stretched, and no box at all where distances
    are predicted, for which ones are a small box.
    """
    regression = start.regression
    candidates = [torch.zeros_like(regression), torch.ones_like(regression), regression]

    def overlap(values: Tensor) -> float:
        boxes = source.decode(student, replace(start, regression=values), locations)
        of_images = rows_of_images(boxes, counts_of(source, locations))
        best = [overlaps(b.view(-1, 4), o["boxes"]).sum() for b, o in zip(of_images, objects, strict=True)]
        return float(torch.stack(best).sum())

    return replace(start, regression=max(candidates, key=overlap))


def _scale(
    source: Source,
    student: nn.Module,
    start: Predictions,
    locations: Any,
    objects: Sequence[Mapping[str, Tensor]],
) -> Tensor | float:
    """By how much each number of the regression must change for its box to change by an object's size.

    A head may predict in pixels, strides, anchor sizes or their logarithms; so steps of one size suit all.
    """
    if start.regression.ndim == 4 and not start.box_per_class:
        return 1 / _BOX_STEP * _LOGIT_STEP  # the logits of a distribution
    boxes = torch.cat([o["boxes"] for o in objects])
    side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1).mean().to(start.regression)
    at_start = source.decode(student, start, locations)
    slopes = []
    for index in range(4):
        nudged = start.regression.clone()
        nudged[..., index] += _NUDGE
        moved = source.decode(student, replace(start, regression=nudged), locations) - at_start
        slopes.append(moved.abs().amax(dim=-1) / _NUDGE)  # (batch, anchors)
    return side / torch.stack(slopes, dim=-1).clamp(min=_FLATTEST).to(start.regression)
