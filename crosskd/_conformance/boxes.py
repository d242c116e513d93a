"""Boxes and classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crosskd._conformance.bench import (
    Bench,
    Finding,
    Skipped,
    Source,
    propose,
    run_head,
    same_random_numbers,
    told,
)
from crosskd._conformance.free_predictions import counts_of, fit_freely, moved_about
from crosskd._truth import overlaps, rows_of_images, without_classes
from crosskd.adapters.protocol import Inputs
from crosskd.predictions import Assignment, Predictions, join_levels

__all__ = ["decoding_and_classes"]

Objects = Sequence[Mapping[str, Tensor]]

# What free predictions must reach, and at how many of the positive anchors: not at all of them, for an
# assignment may follow the predictions, and give an anchor another object at the last moment.
_OVERLAP, _SHARE = 0.9, 0.75


def decoding_and_classes(bench: Bench) -> Iterator[Finding]:
    """Predictions that minimise the student's own losses decode to the targets' boxes, of their labels."""
    adapter, ((_, teacher), (_, student)) = bench.adapter, bench.sides()
    inputs = bench.prepare(teacher, student)
    objects = list(bench.truth(inputs))
    if not any(len(of_image["labels"]) for of_image in objects):
        raise Skipped("the targets hold no object")
    with torch.no_grad():
        maps = adapter.features(student, inputs.student_pixels)
        locations = adapter.locations(student, inputs, maps)
    (first, _), *others = bench.sources.items()
    wanted = without_classes(objects) if others and adapter.num_classes(student) == 1 else objects
    fit = _Fit.of(adapter, student, inputs, maps, locations, wanted, bench.steps)
    yield from told(first, fit.findings(wanted))
    for name, second in others:
        with torch.no_grad(), same_random_numbers():
            # Proposals that are the objects themselves would leave nothing to decode.
            proposed = moved_about(adapter, student, fit.predictions, locations, objects)
            regions = propose(adapter, student, proposed, locations, inputs)
            pooled = second.features(student, maps, regions, inputs)  # type: ignore[call-arg, arg-type]
        fit = _Fit.of(second, student, inputs, pooled, regions, objects, bench.steps)
        yield from told(name, fit.findings(objects))


@dataclass(frozen=True, eq=False)
class _Fit:
    """Free predictions, and where they have arrived.

    Attributes:
        predictions: they themselves.
        boxes: decoded, shape (batch, anchors, 4), or (batch, anchors, classes, 4) with a box a class.
        assignment: that they ended with.
        counts: how many regions each image has, of a head that answers for regions.
    """

    predictions: Predictions
    boxes: Tensor
    assignment: Assignment
    counts: Sequence[int] | None

    @classmethod
    def of(
        cls,
        source: Source,
        student: nn.Module,
        inputs: Inputs,
        maps: Sequence[Tensor],
        locations: Any,
        objects: Objects,
        steps: int,
    ) -> _Fit:
        """Fits a head's predictions, for what it is fed at some locations, or regions, to the objects."""
        with torch.no_grad():
            start = join_levels(run_head(source, student, maps).levels)
        with same_random_numbers():
            predictions, assignment = fit_freely(source, student, inputs, start, locations, objects, steps)
        boxes = source.decode(student, predictions, locations)
        return cls(predictions, boxes, assignment, counts_of(source, locations))

    def findings(self, objects: Objects) -> Iterator[Finding]:
        """What is wrong with boxes and classes at the positive anchors."""
        seen = [found for found in self._by_image(objects) if found is not None]
        if not seen:
            yield Finding(
                "no anchor is responsible for any object of the targets",
                "at least one",
                "assignment.positive is not that of the losses, or the objects are too small for this "
                "detector: give targets that it can learn",
            )
            return
        best, right, shifts, own = (torch.cat(column) for column in zip(*seen, strict=True))
        yield from _box_findings(best)
        # Only where its box is right is it clear whose label an anchor was to learn.
        sure = best >= _OVERLAP
        yield from _class_findings(right[sure], shifts[sure])
        yield from _own_box_findings(own[sure])

    def _by_image(self, objects: Objects) -> Iterator[tuple[Tensor, ...] | None]:
        """(best overlap, whether the label is right, by how much it is off, the label's box's overlap)."""
        whole = self.boxes, self.predictions.logits, self.assignment.positive
        columns = (rows_of_images(rows, self.counts) for rows in whole)
        for boxes, logits, positive, of_image in zip(*columns, objects, strict=True):
            labels = of_image["labels"].to(logits.device)
            if not bool(positive.any()) or not len(labels):
                yield None
                continue
            by_class = _overlaps_by_class(boxes[positive], of_image["boxes"].to(logits.device))
            overlap = by_class.amax(dim=1)  # (positives, objects)
            found = logits[positive].argmax(dim=-1)
            fitting = (overlap >= _OVERLAP) & (found[:, None] == labels)
            shifts = (found - labels[overlap.argmax(dim=1)]) % logits.shape[-1]
            columns_of_labels = labels if self.predictions.box_per_class else torch.zeros_like(labels)
            own = by_class[:, columns_of_labels, torch.arange(len(labels), device=labels.device)]
            yield overlap.amax(dim=1), fitting.any(dim=1), shifts, own.amax(dim=1)


def _overlaps_by_class(boxes: Tensor, objects: Tensor) -> Tensor:
    """Shape (positives, classes, objects), of boxes (positives, classes, 4), or (positives, 4): one class."""
    boxes = boxes if boxes.ndim == 3 else boxes[:, None]
    return overlaps(boxes.flatten(0, 1), objects).view(*boxes.shape[:2], -1)


def _box_findings(best: Tensor) -> Iterator[Finding]:
    missed = int((best < _OVERLAP).sum())
    if missed > (1 - _SHARE) * len(best):
        yield Finding(
            f"decoding: where the student's own losses are smallest, the decoded boxes of {missed} of "
            f"{len(best)} positive anchors overlap no target by an IoU of {_OVERLAP} (median of the best "
            f"{float(best.median()):.2f})",
            f"an IoU of at least {_OVERLAP} at three of four",
            "decode() takes the four numbers in another order or scale than the losses do, locations stand "
            "in another order than the predictions, positive is not the losses' own, or truth= is not in "
            "resized pixels; or a box takes long to fit, and steps= should be more",
        )


def _class_findings(right: Tensor, shifts: Tensor) -> Iterator[Finding]:
    wrong = int((~right).sum())
    if wrong > (1 - _SHARE) * len(right):
        shift = int(shifts[~right].mode().values)
        yield Finding(
            f"classes: where the student's own losses are smallest, the largest logit of {wrong} of "
            f"{len(right)} positive anchors is not that of the target's label (mostly of label {shift:+d})",
            "the target's label: logit 0 belongs to label 0",
            "the logits stand in another order than the labels, a background class comes first, or labels "
            "are counted from 1 (truth= tells them as the logits count them)",
        )


def _own_box_findings(own: Tensor) -> Iterator[Finding]:
    wrong = int((own < _OVERLAP).sum())
    if wrong > (1 - _SHARE) * len(own):
        yield Finding(
            f"classes: where the student's own losses are smallest, it is another class's box than that of "
            f"the target's label which fits at {wrong} of {len(own)} positive anchors",
            "the box of the target's label",
            "predict() or decode() gives the boxes' classes in another order than the labels'",
        )
