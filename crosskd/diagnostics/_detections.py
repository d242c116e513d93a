"""What a teacher finds in images, and how well that fits their objects: how `crosskd.check` judges it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from crosskd.adapters.base import Batch, Head, Objects
from crosskd.diagnostics._objects import counts_of, overlaps, rows_of_images
from crosskd.diagnostics.check_report import LEAST_OVERLAP, SURE, SURE_DETECTION, Fit
from crosskd.predictions import Predictions
from crosskd.step import resized_boxes

__all__ = ["Seen", "fit_of", "seen_in"]

# As torchvision's detectors do: a detection's least score, how many are compared, how many are left.
_LEAST_SCORE, _CANDIDATES, _DETECTIONS, _NMS = 0.05, 3000, 100, 0.5


@dataclass(frozen=True, eq=False)
class Seen:
    """What a teacher makes of one image.

    Attributes:
        highest: its largest class probability.
        sure: how many of its predictions have one of at least 0.5.
        boxes: its detections (detections, 4), xyxy in pixels of the student's batch.
        scores: likewise (detections,).
        labels: likewise, columns of the logits.
        objects: those in the image; ``None`` if unknown.
        likeliest: of each object, the class of the surest prediction over it, -1 where there is none.
    """

    highest: float
    sure: int
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    objects: Objects | None
    likeliest: Tensor


@torch.no_grad()
def seen_in(head: Head, predictions: Predictions, anchors: Any, theirs: Batch, ours: Batch) -> Iterator[Seen]:
    """What a head's predictions say of each image, as a detector would answer: the best, without duplicates.

    Args:
        head: the teacher's last one.
        predictions: of the columns that are compared.
        anchors: what they stand at.
        theirs: the batch as the teacher took it.
        ours: likewise the student, in whose pixels boxes are compared.
    """
    counts = counts_of(head, anchors)
    scores = predictions.scores().float()
    # A head that decodes no boxes has none to compare: at each place a box of no area.
    decoded = head.decode(predictions, anchors) if head.decodes else scores.new_zeros(*scores.shape[:2], 4)
    confidence = rows_of_images(predictions.confidence(), counts)
    for index, (of_rows, boxes) in enumerate(
        zip(rows_of_images(scores, counts), rows_of_images(decoded.float(), counts), strict=True)
    ):
        best, places = of_rows.flatten().topk(min(_CANDIDATES, of_rows.numel()))
        best, places = best[best >= _LEAST_SCORE], places[best >= _LEAST_SCORE]
        rows, labels = places // max(of_rows.shape[-1], 1), places % max(of_rows.shape[-1], 1)
        candidates = boxes[rows] if boxes.ndim == 2 else boxes[rows, labels]
        size = ours.image_sizes[index]
        candidates = clip_boxes_to_image(resized_boxes(candidates, theirs.image_sizes[index], size), size)
        kept = batched_nms(candidates, best, labels, _NMS)[:_DETECTIONS]
        objects = None if ours.objects is None else ours.objects[index]
        sure = confidence[index]
        yield Seen(
            float(sure.max()) if len(sure) else 0.0,
            int((sure >= SURE).sum()),
            candidates[kept],
            best[kept],
            labels[kept],
            objects,
            _likeliest(candidates, labels, objects),
        )


def _likeliest(candidates: Tensor, labels: Tensor, objects: Objects | None) -> Tensor:
    """Of each object the class of the first of the candidates over it, -1 where there is none."""
    if objects is None or not len(objects.labels) or not len(candidates):
        return labels.new_full((0 if objects is None else len(objects.labels),), -1)
    over = overlaps(candidates, objects.boxes) >= LEAST_OVERLAP  # (candidates, objects), surest first
    return torch.where(over.any(dim=0), labels[over.int().argmax(dim=0)], -1)


def fit_of(images: Sequence[Seen], *, classless: bool) -> Fit:
    """How well detections fit the objects.

    Args:
        images: with objects.
        classless: classes can't be compared, and any counts as right.
    """
    objects = found = found_in_any_class = duplicates = false_alarms = 0
    taken: dict[int, dict[int, int]] = {}
    for seen in images:
        assert seen.objects is not None
        labels = seen.objects.labels.to(seen.labels)
        sure = seen.scores >= SURE_DETECTION
        iou = overlaps(seen.boxes[sure], seen.objects.boxes)  # (detections, objects)
        over = iou >= LEAST_OVERLAP
        right = over & (classless | (seen.labels[sure][:, None] == labels))
        objects += len(labels)
        found += int(right.any(dim=0).sum())
        found_in_any_class += int(over.any(dim=0).sum())
        covering = over.any(dim=1)
        over_objects = iou[covering].argmax(dim=1).tolist() if len(labels) else []
        false_alarms += len(covering) - len(over_objects)
        duplicates += len(over_objects) - len(set(over_objects))
        for label, likeliest in zip(labels.tolist(), seen.likeliest.tolist(), strict=True):
            if likeliest >= 0 and not classless:
                of_label = taken.setdefault(label, {})
                of_label[likeliest] = of_label.get(likeliest, 0) + 1
    ap, ap50 = _average_precision(images, classless)
    count = len(images)
    return Fit(
        count,
        objects,
        found,
        found_in_any_class,
        ap,
        ap50,
        duplicates / count,
        false_alarms / count,
        taken,
        classless,
    )


def _average_precision(images: Sequence[Seen], classless: bool) -> tuple[float, float]:
    """COCO's AP and AP50, from 0 to 100."""
    # Not before it is needed: importing the library takes torch and torchvision alone.
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations, results = list[dict[str, Any]](), list[dict[str, Any]]()
    for index, seen in enumerate(images):
        assert seen.objects is not None
        certain = torch.ones(len(seen.objects.labels))
        _list_boxes(annotations, index, seen.objects.boxes, seen.objects.labels, certain)
        _list_boxes(results, index, seen.boxes, seen.labels, seen.scores)
    if not results:
        return 0.0, 0.0
    truth = COCO()
    truth.dataset = {
        "images": [{"id": index} for index in range(len(images))],
        "annotations": annotations,
        "categories": [{"id": label} for label in sorted({o["category_id"] for o in annotations + results})],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.useCats = int(not classless)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * max(0.0, float(evaluation.stats[0])), 100 * max(0.0, float(evaluation.stats[1]))


def _list_boxes(
    listed: list[dict[str, Any]], image: int, boxes: Tensor, labels: Tensor, scores: Tensor
) -> None:
    """Appends an image's boxes in COCO's form."""
    sizes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    for box, label, score in zip(sizes.tolist(), labels.tolist(), scores.tolist(), strict=True):
        one = {"id": len(listed) + 1, "image_id": image, "category_id": label, "bbox": box, "score": score}
        listed.append({**one, "area": box[2] * box[3], "iscrowd": 0})
