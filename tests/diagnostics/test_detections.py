"""What a teacher finds in images and how well it fits, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crosskd.adapters import Objects
from crosskd.adapters.base import Anchors, Batch
from crosskd.diagnostics._detections import Seen, fit_of, seen_in
from crosskd.predictions import Predictions
from tests.helpers.steps import PlainHead

SQUARES = torch.tensor([[0.0, 0.0, 20.0, 20.0], [40.0, 40.0, 60.0, 60.0]])


def seen(
    boxes: Tensor, scores: list[float], labels: list[int], objects: Objects, likeliest: list[int]
) -> Seen:
    return Seen(0.9, 1, boxes, torch.tensor(scores), torch.tensor(labels), objects, torch.tensor(likeliest))


def images() -> list[Seen]:
    """Of three objects one is found twice, one under another class, one by nothing; one false alarm."""
    first, second = SQUARES
    elsewhere = torch.tensor([70.0, 0.0, 90.0, 20.0])
    boxes = torch.stack([first, first + 2, second, elsewhere])
    two = Objects(SQUARES, torch.tensor([0, 1]))
    one = Objects(SQUARES[:1], torch.tensor([0]))
    return [
        seen(boxes, [0.9, 0.8, 0.7, 0.6], [0, 0, 2, 1], two, [0, 2]),
        seen(SQUARES[:1], [0.1], [0], one, [0]),  # too unsure to be one of the false alarms or the found
    ]


def test_the_fit_by_hand():
    fit = fit_of(images(), classless=False)
    assert (fit.images, fit.objects, fit.found, fit.found_in_any_class) == (2, 3, 1, 2)
    assert (fit.false_alarms, fit.duplicates) == (0.5, 0.5)
    assert (fit.right, fit.seen) == (2, 3)
    assert fit.taken == {0: {0: 2}, 1: {2: 1}}
    assert fit.mostly() == {0: 0, 1: 2}
    # Class 0: found at a recall of 1/2 with precision 1, and at 1 with 2/3, after a duplicate; class 1: none.
    # Of 101 points of recall 51 are up to 1/2.
    assert fit.ap50 == pytest.approx(100 * (51 + 50 * 2 / 3) / 101 / 2)


def test_whatever_the_class():
    fit = fit_of(images(), classless=True)
    assert (fit.found, fit.found_in_any_class, fit.seen) == (2, 2, 0)
    assert fit.classless


def test_images_without_objects_or_detections():
    nothing = Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    empty = seen(torch.zeros(0, 4), [], [], Objects(SQUARES, torch.tensor([0, 1])), [-1, -1])
    fit = fit_of([seen(SQUARES, [0.9, 0.2], [0, 0], nothing, []), empty], classless=False)
    assert (fit.objects, fit.found, fit.ap, fit.ap50, fit.seen) == (2, 0, 0, 0, 0)
    assert (fit.false_alarms, fit.duplicates) == (0.5, 0)
    assert fit_of([empty], classless=False).ap == 0


def batch(side: int, objects: Objects | None = None) -> Batch:
    return Batch(torch.zeros(1, 3, side, side), ((side, side),), None if objects is None else (objects,))


def test_detections_are_the_best_without_duplicates_in_the_students_pixels():
    """The teacher's image is twice as large; its quality halves a score."""
    probabilities = torch.tensor([[0.9, 0.01], [0.8, 0.01], [0.01, 0.64], [0.001, 0.002]])
    boxes = 2 * torch.stack([SQUARES[0], SQUARES[0] + 1, SQUARES[1], SQUARES[1]])
    quality = torch.tensor([[1.0, 1.0, 0.25, 1.0]]).logit(1e-6)
    predictions = Predictions(probabilities.logit()[None], boxes[None], quality)
    objects = Objects(torch.cat([SQUARES, SQUARES[:1] + 60]), torch.tensor([0, 0, 1]))
    (found,) = seen_in(PlainHead(), predictions, Anchors(None, (4,)), batch(200), batch(100, objects))
    kept = found.scores > 0.3
    assert torch.allclose(found.boxes[kept], SQUARES)
    assert found.labels[kept].tolist() == [0, 1]
    assert found.scores[kept].tolist() == pytest.approx([0.9**0.5, 0.4], abs=1e-3)
    assert (found.highest, found.sure) == (pytest.approx(0.9), 3)
    assert found.likeliest.tolist() == [0, 1, -1]
    unlabelled = next(seen_in(PlainHead(), predictions, Anchors(None, (4,)), batch(100), batch(100)))
    assert (unlabelled.objects, unlabelled.likeliest.tolist()) == (None, [])


def test_an_objectness_is_in_the_class_probabilities_already():
    predictions = Predictions(
        torch.tensor([[[0.8]]]).logit(), SQUARES[:1][None], torch.tensor([[0.5]]).logit(), objectness=True
    )
    (found,) = seen_in(PlainHead(), predictions, Anchors(None, (1,)), batch(100), batch(100))
    assert (found.highest, found.scores.item()) == pytest.approx((0.4, 0.4))


def test_a_box_for_each_class():
    """Each class's box counts with its own probability; the background's with none."""
    logits = torch.tensor([[[0.0, 2.0, 1.0]]])
    boxes = torch.stack([SQUARES[0] + 50, SQUARES[0], SQUARES[1]])[None, None]
    predictions = Predictions(logits, boxes, None, background=0, box_per_class=True)
    (found,) = seen_in(
        PlainHead(),
        predictions,
        Anchors(None, (1,)),
        batch(100),
        batch(100, Objects(SQUARES, torch.tensor([1, 2]))),
    )
    assert found.labels.tolist() == found.likeliest.tolist() == [1, 2]
    assert torch.equal(found.boxes, SQUARES)
    assert found.scores.tolist() == pytest.approx(logits.softmax(-1)[0, 0, 1:].tolist())
