"""COCO ground truth and detections, read and checked before anything is evaluated."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crosskd.compare.collect import Detections

if TYPE_CHECKING:
    from pycocotools.coco import COCO

__all__ = ["Source", "read_detections", "read_ground_truth"]

Source = str | Path | Sequence[Mapping[str, Any]] | Detections

_PARTS = ("images", "annotations", "categories")
_KEYS = ("image_id", "category_id", "bbox", "score")


def read_ground_truth(source: str | Path | Mapping[str, Any] | COCO) -> COCO:
    """Ground truth as a checked copy, in which missing ``area`` and ``iscrowd`` are filled in.

    Args:
        source: a JSON file in COCO form, its content, or a pycocotools ``COCO``, which is left as it is.

    Returns:
        A ``COCO`` whose annotations have ids from 1 on: COCOeval takes id 0 for "no match".

    Raises:
        ValueError: no COCO form, repeated ids, unknown images or categories, boxes that are none, no objects.
    """
    content = getattr(source, "dataset", None) or _read_json(source, "the ground truth")
    if not isinstance(content, Mapping) or any(not isinstance(content.get(part), list) for part in _PARTS):
        raise ValueError(
            "the ground truth must be in COCO form, with images, annotations and categories as lists, got "
            + (f"the keys {sorted(content)}" if isinstance(content, Mapping) else type(content).__name__)
        )
    for part in _PARTS:
        _check_ids(part, content[part])
    images, categories = ({entry["id"] for entry in content[part]} for part in ("images", "categories"))
    annotations = []
    for number, annotation in enumerate(content["annotations"], 1):
        what = f"annotation {annotation['id']} of the ground truth"
        image, category = (annotation.get(key) for key in ("image_id", "category_id"))
        if image not in images or category not in categories:
            raise ValueError(f"{what} is of image {image!r} and category {category!r}, which must both exist")
        box = _box(annotation.get("bbox"), what)
        area = annotation.get("area")
        if area is None:
            area = box[2] * box[3]
        if not np.isfinite(_number(area)):
            raise ValueError(f"{what} has the area {area!r}: a number of pixels is expected")
        copy = {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": _number(area)}
        annotations.append({**copy, "iscrowd": int(annotation.get("iscrowd") or 0)})
    if all(annotation["iscrowd"] for annotation in annotations):
        raise ValueError(f"the ground truth has {len(images)} images, but no object to find")
    return _indexed(content["images"], content["categories"], annotations)


def read_detections(name: str, source: Source, ground_truth: COCO) -> COCO:
    """The detections of one student, checked against the ground truth.

    Args:
        name: the student's, for messages.
        source: a list in COCO's result form (boxes xywh in pixels), the JSON file of one, or what
            `collect_detections` returned.
        ground_truth: what `read_ground_truth` returned.

    Raises:
        ValueError: another form, unknown images or categories, numbers that aren't finite, boxes in another
            format, images that the student was never shown.
    """
    results = source.results if isinstance(source, Detections) else _read_json(source, f"{name!r}")
    if isinstance(results, (str, bytes, Mapping)) or not isinstance(results, Sequence):
        raise ValueError(
            f"{name!r} must be a list of detections in COCO's result form, each with {', '.join(_KEYS)}, got "
            f"{type(results).__name__}"
        )
    images, categories = ground_truth.imgs, ground_truth.cats
    for number, result in enumerate(results):
        if not isinstance(result, Mapping) or any(key not in result for key in _KEYS):
            shown = sorted(result) if isinstance(result, Mapping) else type(result).__name__
            raise ValueError(f"detection {number} of {name!r} needs {', '.join(_KEYS)}, has {shown}")
    _check_known(name, "image", [result["image_id"] for result in results], images)
    _check_known(name, "category", [result["category_id"] for result in results], categories)
    _check_images(name, source, results, ground_truth)
    annotations = []
    for number, result in enumerate(results):
        box, score = _box(result["bbox"], f"detection {number} of {name!r}"), _number(result["score"])
        if not np.isfinite(score):
            raise ValueError(
                f"detection {number} of {name!r} has the score {result['score']!r}, expected a finite number"
            )
        copy = {"id": number + 1, "image_id": result["image_id"], "category_id": result["category_id"]}
        annotations.append({**copy, "bbox": box, "score": score, "area": box[2] * box[3], "iscrowd": 0})
    sizes = [[images[a["image_id"]].get(side, np.inf) for side in ("width", "height")] for a in annotations]
    if annotations:
        _check_format(name, np.array([a["bbox"] for a in annotations]), np.array(sizes, dtype=float))
    return _indexed(ground_truth.dataset["images"], ground_truth.dataset["categories"], annotations)


def _read_json(source: Any, what: str) -> Any:
    if not isinstance(source, (str, Path)):
        return source
    try:
        return json.loads(Path(source).read_text(encoding="utf-8"))
    except ValueError as error:  # malformed JSON, or no text at all
        raise ValueError(f"{what}: {source} can't be read as JSON ({error})") from error


def _check_ids(part: str, entries: Sequence[Mapping[str, Any]]) -> None:
    if any(not isinstance(entry, Mapping) or "id" not in entry for entry in entries):
        raise ValueError(f"each of the ground truth's {part} needs an id")
    repeated = [key for key, times in Counter(entry["id"] for entry in entries).items() if times > 1]
    if repeated:
        raise ValueError(
            f"the ground truth's {part} repeat {len(repeated)} ids, such as {repeated[0]!r}, which makes "
            "COCO's metrics wrong. Give each entry an id of its own, or delete the copy of an entry"
        )


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _box(box: Any, what: str) -> list[float]:
    numbers = [_number(number) for number in box] if isinstance(box, (Sequence, np.ndarray)) else []
    if len(numbers) != 4 or not np.isfinite(numbers).all() or min(numbers[2:]) < 0:
        raise ValueError(
            f"{what} has the box {box!r}: four finite numbers are expected, x, y, width and height in pixels"
        )
    return numbers


def _check_known(name: str, kind: str, found: Sequence[Any], known: Mapping[Any, Any]) -> None:
    unknown = [key for key in found if key not in known]
    if unknown:
        advice = "turn labels into category ids first" if kind == "category" else "is it another split?"
        raise ValueError(
            f"{len(unknown)} of the {len(found)} detections of {name!r} have an unknown {kind}_id, such as "
            f"{unknown[0]!r}; the ground truth's start with {list(known)[:5]}: {advice}"
        )


def _check_images(
    name: str, source: Source, results: Sequence[Mapping[str, Any]], ground_truth: COCO
) -> None:
    """Refuses images that a detector was never shown; a list of results can only make one suspicious."""
    if isinstance(source, Detections):
        missing = sorted(set(ground_truth.imgs) - set(source.image_ids))
        if missing:
            raise ValueError(
                f"{name!r} was never shown {len(missing)} of the {len(ground_truth.imgs)} images, such as "
                f"{missing[0]!r}: they would count as if nothing had been found there"
            )
        return
    with_objects = {a["image_id"] for a in ground_truth.anns.values() if not a["iscrowd"]}
    empty = with_objects - {result["image_id"] for result in results}
    if 5 * len(empty) > len(with_objects):
        warnings.warn(
            f"{name!r} has no detection on {len(empty)} of the {len(with_objects)} images that show objects, "
            f"such as {min(empty)!r}: if it was never shown them, the comparison is wrong",
            stacklevel=4,
        )


def _check_format(name: str, boxes: NDArray[np.float64], sizes: NDArray[np.float64]) -> None:
    """Refuses boxes that lie outside the images as they are, and inside when they are read in another way."""
    first, second = boxes[:, :2], boxes[:, 2:]
    outside = float((first + second > 1.05 * sizes).any(axis=1).mean())
    inside = {
        "x1, y1, x2, y2": (second > first) & (second <= sizes + 1),
        "centre x, centre y, width, height": (first >= second / 2 - 1) & (first + second / 2 <= sizes + 1),
    }
    readings = [text for text, fits in inside.items() if outside > 0.1 and fits.all(axis=1).mean() >= 0.99]
    if boxes.max() <= 1.01 and sizes.min() > 4:
        readings = ["shares of the image's sides"]
    if readings:
        raise ValueError(
            f"the boxes of {name!r} look like {readings[0]}, such as {boxes[0].round(2).tolist()}, expected "
            "x, y, width, height in pixels of the image"
        )


def _indexed(images: Any, categories: Any, annotations: list[dict[str, Any]]) -> COCO:
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco.createIndex()
    return coco
