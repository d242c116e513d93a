"""What a batch's targets say, in one form, and how well predictions fit them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from crosskd.adapters.protocol import Inputs

__all__ = ["Truth", "overlaps", "rows_of_images", "truth_of", "without_classes"]

Truth = Callable[[Inputs], Sequence[Mapping[str, Tensor]]]
"""Tells an image's objects: ``boxes`` (objects, 4), xyxy in resized pixels, and ``labels`` (objects,)."""


def truth_of(inputs: Inputs) -> list[dict[str, Tensor]]:
    """The objects of each image, read off the prepared targets.

    Args:
        inputs: a prepared batch, its targets one mapping an image with ``boxes`` and ``labels``, one of
            mmdet's data samples an image, or one mapping for all of ultralytics' ``batch_idx``, ``cls`` and
            ``bboxes``.

    Raises:
        ValueError: targets in another form.
    """
    targets = inputs.targets
    if isinstance(targets, Mapping) and {"batch_idx", "cls", "bboxes"} <= targets.keys():
        return _by_image(targets, inputs.student_pixels)
    listed = targets if isinstance(targets, Sequence) and not isinstance(targets, str) else [targets]
    return [_objects(target) for target in listed]


def _objects(target: Any) -> dict[str, Tensor]:
    if isinstance(target, Mapping) and {"boxes", "labels"} <= target.keys():
        return {"boxes": target["boxes"], "labels": target["labels"]}
    instances = getattr(target, "gt_instances", None)
    if instances is not None:
        boxes = instances.bboxes
        return {"boxes": getattr(boxes, "tensor", boxes), "labels": instances.labels}
    raise ValueError(
        f"the prepared targets hold a {type(target).__name__}, of which nothing tells the boxes and labels: "
        "pass truth=, a function of the prepared batch (Inputs) that gives, for each image, a dict of boxes "
        "(objects, 4), xyxy in resized pixels, and labels (objects,)"
    )


def _by_image(targets: Mapping[str, Tensor], pixels: Tensor) -> list[dict[str, Tensor]]:
    """Objects of all images, their boxes (objects, 4) centre, width and height as fractions of the image."""
    height, width = pixels.shape[-2:]
    boxes = box_convert(targets["bboxes"], "cxcywh", "xyxy")
    boxes = boxes * boxes.new_tensor([width, height, width, height])
    index, labels = (targets[name].flatten().long() for name in ("batch_idx", "cls"))
    return [
        {"boxes": boxes[index == image], "labels": labels[index == image]} for image in range(len(pixels))
    ]


def without_classes(objects: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same objects for a head that only tells them from the background: all of label 0."""
    return [{**of_image, "labels": torch.zeros_like(of_image["labels"])} for of_image in objects]


def rows_of_images(rows: Tensor, counts: Sequence[int] | None) -> tuple[Tensor, ...]:
    """What belongs to each image, shape (rows, …).

    Args:
        rows: shape (batch, anchors, …); with ``counts`` shape (1, regions, …), image after image.
        counts: how many regions each image has, of a head that answers for regions.
    """
    return rows.unbind() if counts is None else torch.split(rows[0], list(counts))


def overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of each box (rows, 4) with each of others (columns, 4), shape (rows, columns), in float32 at least.

    Args:
        boxes: xyxy. One whose sides are in the wrong order has no area, and overlaps nothing.
        others: xyxy.
    """
    boxes = boxes.double()
    proper = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    iou: Tensor = box_iou(boxes, others.to(boxes))
    return iou * proper[:, None]
