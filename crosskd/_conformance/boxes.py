"""Boxes and classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from crosskd._conformance.bench import Bench, Finding, Skipped, run_through, same_random_numbers
from crosskd._conformance.free_predictions import fit_freely
from crosskd._truth import overlaps
from crosskd.predictions import Assignment, join_levels

__all__ = ["decoding_and_classes"]

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
        run = run_through(adapter, student, inputs.student_pixels)
        start, locations = join_levels(run.levels), adapter.locations(student, inputs, run.maps)
    with same_random_numbers():
        predictions, assignment = fit_freely(adapter, student, inputs, start, locations, objects, bench.steps)
    boxes = adapter.decode(student, predictions, locations)
    yield from _fit_findings(boxes, predictions.logits, assignment, objects)


def _fit_findings(
    boxes: Tensor, logits: Tensor, assignment: Assignment, objects: Sequence[Mapping[str, Tensor]]
) -> Iterator[Finding]:
    best, right, shifts = [], [], []
    for image, of_image in enumerate(objects):
        positive = assignment.positive[image]
        if not bool(positive.any()) or not len(of_image["labels"]):
            continue
        labels = of_image["labels"].to(logits.device)
        overlap = overlaps(
            boxes[image, positive], of_image["boxes"].to(logits.device)
        )  # (positives, objects)
        found = logits[image, positive].argmax(dim=-1)
        best.append(overlap.amax(dim=1))
        fitting = (overlap >= _OVERLAP) & (found[:, None] == labels)
        right.append(fitting.any(dim=1))
        shifts.append((found - labels[overlap.argmax(dim=1)]) % logits.shape[-1])
    if not best:
        yield Finding(
            "no anchor is responsible for any object of the targets",
            "at least one",
            "assignment.positive is not that of the losses, or the objects are too small for this detector: "
            "give targets that it can learn",
        )
        return
    yield from _box_findings(torch.cat(best))
    # Only where its box is right is it clear whose label an anchor was to learn.
    sure = torch.cat(best) >= _OVERLAP
    yield from _class_findings(torch.cat(right)[sure], torch.cat(shifts)[sure])


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
