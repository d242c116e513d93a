"""What a student finds in each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pycocotools.cocoeval import COCOeval

__all__ = ["ImageResults", "look_at_images"]


@dataclass(frozen=True, eq=False)
class ImageResults:
    """A student image by image, with its detections of at least ``threshold``.

    Attributes:
        threshold: the score at which the student's F1 over all images is best; infinite without detections.
        mistakes: missed objects and false alarms of each image, the mean over COCO's IoU thresholds, shape
            (images,).
        objects: how many each image shows, crowds left out.
        found: how many of them are found at an IoU of 0.5.
        false_alarms: detections that are no object at an IoU of 0.5.
        found_ids: annotation ids of the objects found.
        true_ids: ids of the detections that are objects.
        false_ids: ids of the false alarms.
    """

    threshold: float
    mistakes: NDArray[np.float64]
    objects: NDArray[np.int64]
    found: NDArray[np.int64]
    false_alarms: NDArray[np.int64]
    found_ids: frozenset[int]
    true_ids: frozenset[int]
    false_ids: frozenset[int]


def look_at_images(evaluation: COCOeval) -> ImageResults:
    """Counts in each image by the matches of COCO's evaluation, all classes together.

    Args:
        evaluation: a ``COCOeval`` of boxes after ``evaluate()``, with COCO's IoU thresholds and areas.
    """
    images = len(evaluation.params.imgIds)
    number_of = {image: number for number, image in enumerate(evaluation.params.imgIds)}
    all_areas = evaluation.params.areaRng[0]
    entries = [e for e in evaluation.evalImgs if e is not None and e["aRng"] == all_areas]
    objects = np.zeros(images, dtype=np.int64)
    for entry in entries:
        objects[number_of[entry["image_id"]]] += np.count_nonzero(entry["gtIgnore"] == 0)
    scores = np.concatenate([entry["dtScores"] for entry in entries])
    image_of = np.repeat(
        [number_of[entry["image_id"]] for entry in entries], [len(entry["dtScores"]) for entry in entries]
    )
    ids = np.concatenate([np.array(entry["dtIds"], dtype=np.int64) for entry in entries])
    counted = ~np.concatenate([entry["dtIgnore"] for entry in entries], axis=1).astype(bool)
    right = (np.concatenate([entry["dtMatches"] for entry in entries], axis=1) > 0) & counted
    threshold = _best_threshold(scores, right, counted, int(objects.sum()))
    right, counted = right & (scores >= threshold), counted & (scores >= threshold)
    found, all_found = (
        np.stack([np.bincount(image_of[row], minlength=images) for row in rows]) for rows in (right, counted)
    )
    true_ids = frozenset(ids[right[0]].tolist())
    return ImageResults(
        threshold=threshold,
        mistakes=(objects + all_found - 2 * found).mean(axis=0),
        objects=objects,
        found=found[0],
        false_alarms=all_found[0] - found[0],
        found_ids=_found_ids(entries, true_ids),
        true_ids=true_ids,
        false_ids=frozenset(ids[counted[0] & ~right[0]].tolist()),
    )


def _best_threshold(
    scores: NDArray[np.float64], right: NDArray[np.bool_], counted: NDArray[np.bool_], objects: int
) -> float:
    if not len(scores):
        return float("inf")
    order = np.argsort(-scores, kind="mergesort")
    true, seen = (rows[:, order].cumsum(axis=1) for rows in (right, counted))
    f1 = (2 * true / (seen + objects)).mean(axis=0)
    # Of equal scores only the last is a threshold: it lets all of them through.
    last = np.append(np.diff(scores[order]) != 0, True)
    return float(scores[order][np.argmax(np.where(last, f1, -1.0))])


def _found_ids(entries: list[dict[str, Any]], true_ids: frozenset[int]) -> frozenset[int]:
    found = set()
    for entry in entries:
        for object_id, detection in zip(entry["gtIds"], entry["gtMatches"][0].tolist(), strict=True):
            if int(detection) in true_ids:
                found.add(object_id)
    return frozenset(found)
