"""Average precision by pycocotools, and the same over resampled images."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

__all__ = ["METRICS", "class_precision", "evaluate", "over_classes", "resampled_precision"]

# Which of COCO's IoU thresholds (0.5, 0.55 to 0.95) and which of its areas a metric is the mean over.
METRICS = {
    "AP": (slice(None), 0),
    "AP50": (slice(0, 1), 0),
    "AP75": (slice(5, 6), 0),
    "AP small": (slice(None), 1),
    "AP medium": (slice(None), 2),
    "AP large": (slice(None), 3),
}

_CHUNK = 2**22  # numbers in memory at a time


def evaluate(ground_truth: COCO, detections: COCO) -> COCOeval:
    """COCO's evaluation of boxes, at most 100 detections of a class and image."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(ground_truth, detections, "bbox")
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def class_precision(evaluation: COCOeval) -> dict[str, NDArray[np.float64]]:
    """Each metric of each class, shape (1, classes), from 0 to 1; NaN where there is no such object."""
    precision = evaluation.eval["precision"][..., 0]  # thresholds, recalls, classes, areas
    means = {}
    for metric, (thresholds, area) in METRICS.items():
        of_class = precision[thresholds, :, :, area].mean(axis=(0, 1))
        means[metric] = np.where(of_class < 0, np.nan, of_class)[None]
    return means


def resampled_precision(evaluation: COCOeval, counts: Tensor) -> dict[str, NDArray[np.float64]]:
    """What `class_precision` would be if each image were there as often as ``counts`` says.

    It is what ``COCOeval.accumulate`` gives for ``evalImgs`` with each entry repeated, for all resamplings
    at once: precision and recall are read where a detection is right, for recall grows nowhere else.

    Args:
        evaluation: what `evaluate` returned.
        counts: how often each image is there, shape (resamplings, images).

    Returns:
        Each metric of each class, shape (resamplings, classes); NaN where no such object is left.
    """
    parameters = evaluation.params
    images, areas, classes = len(parameters.imgIds), len(parameters.areaRng), len(parameters.catIds)
    recalls = torch.from_numpy(parameters.recThrs)
    shape = (len(counts), len(parameters.iouThrs), classes, areas)
    means = torch.full(shape, torch.nan, dtype=torch.float64)
    for number in range(classes):
        for area in range(areas):
            start = (number * areas + area) * images
            present = [n for n in range(images) if evaluation.evalImgs[start + n] is not None]
            entries = [evaluation.evalImgs[start + n] for n in present]
            if entries:
                means[:, :, number, area] = _resample(entries, counts[:, present], recalls)
    return {
        metric: means[:, thresholds, :, area].mean(dim=1).numpy()
        for metric, (thresholds, area) in METRICS.items()
    }


def over_classes(of_class: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over the classes that there are, shape (resamplings,); NaN where there is none."""
    there = ~np.isnan(of_class)
    with np.errstate(invalid="ignore"):
        mean: NDArray[np.float64] = np.nansum(of_class, axis=1) / there.sum(axis=1)
    return mean


def _resample(entries: list[dict[str, Any]], counts: Tensor, recalls: Tensor) -> Tensor:
    """Mean precision of one class and area, shape (resamplings, thresholds)."""
    objects = torch.tensor([np.count_nonzero(entry["gtIgnore"] == 0) for entry in entries])
    total = counts.double() @ objects.double()
    scores = np.concatenate([entry["dtScores"] for entry in entries])
    order = np.argsort(-scores, kind="mergesort")
    image_of = np.repeat(np.arange(len(entries)), [len(entry["dtScores"]) for entry in entries])[order]
    matched = np.concatenate([entry["dtMatches"] for entry in entries], axis=1)[:, order] > 0
    ignored = np.concatenate([entry["dtIgnore"] for entry in entries], axis=1)[:, order].astype(bool)
    kept = ~ignored.all(axis=0)
    image_of, matched, ignored = image_of[kept], matched[:, kept], ignored[:, kept]
    means = []
    for chunk, objects_there in _chunks(counts, total, len(image_of)):
        times = chunk[:, image_of].double()
        seen = times.cumsum(dim=1)
        per_threshold = []
        for hit, left_out in zip(matched & ~ignored, ignored, strict=True):
            right, skipped = np.flatnonzero(hit), np.flatnonzero(left_out)
            true = times[:, right].cumsum(dim=1)
            before = torch.nn.functional.pad(times[:, skipped].cumsum(dim=1), (1, 0))
            counted = seen[:, right] - before[:, np.searchsorted(skipped, right)]
            precision = true / (counted + np.spacing(1))
            best = precision.flip(1).cummax(dim=1).values.flip(1)
            # Contiguous, which a plain expand isn't: searchsorted would warn of a copy.
            reached = torch.searchsorted(true / objects_there, recalls.repeat(len(chunk), 1))
            at_recalls = torch.nn.functional.pad(best, (0, 1)).gather(1, reached)
            per_threshold.append(at_recalls.mean(dim=1))
        means.append(torch.stack(per_threshold, dim=1))
    return torch.cat(means).masked_fill(total[:, None] == 0, torch.nan)


def _chunks(counts: Tensor, total: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, _CHUNK // max(1, width))
    for start in range(0, len(counts), rows):
        # Where no object is left the result is NaN whatever this is divided by.
        yield counts[start : start + rows], total[start : start + rows, None].clamp(min=1)
