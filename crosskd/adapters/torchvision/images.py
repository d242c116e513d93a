"""Checks of images and targets in torchvision's form, before a detector's own transform stumbles over
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

__all__ = ["check_boxes", "check_images", "check_targets"]


def check_images(images: Any) -> None:
    """Raises ``ValueError`` or ``TypeError`` for images that aren't in torchvision's form."""
    if isinstance(images, Tensor):
        if images.ndim != 4:
            raise ValueError(
                "images must be a list of tensors (3, height, width) with values from 0 to 1, or one "
                f"tensor (batch, 3, height, width), got shape {tuple(images.shape)}"
            )
    else:
        got = f"a {_type_of(images)}"
        others: list[Any] = [images]
        if isinstance(images, list | tuple):
            others = [image for image in images if not isinstance(image, Tensor)]
            got += f" with a {_type_of(others[0])}" if others else ""
        if others:
            raise TypeError(
                f"images must be a list of tensors (3, height, width) with values from 0 to 1, got {got}: "
                "torchvision.transforms.v2.functional.to_image makes a tensor of a PIL image or an array, "
                "to_dtype(image, torch.float32, scale=True) its values 0 to 1"
            )
    if len(images) == 0:
        raise ValueError("images is empty: a batch needs at least one image")


def check_targets(targets: Any, images: int, classes: int, first_label: int) -> None:
    """Raises ``ValueError`` for targets that aren't in torchvision's form, before they are resized."""
    if not isinstance(targets, list | tuple):
        raise TypeError(
            f'targets must be a list of dicts with "boxes" and "labels", one per image, or None, got a '
            f"{_type_of(targets)}"
        )
    if len(targets) != images:
        raise ValueError(f"got {images} images but {len(targets)} targets: one is needed for each")
    for index, target in enumerate(targets):
        if not isinstance(target, Mapping) or not {"boxes", "labels"} <= target.keys():
            raise ValueError(f'targets[{index}] must be a dict with "boxes" and "labels", got {target!r}')
        for name in ("boxes", "labels"):
            if not isinstance(target[name], Tensor):
                raise TypeError(
                    f"targets[{index}][{name!r}] must be a tensor, got a {_type_of(target[name])}: "
                    f"torch.as_tensor({name}) makes one of a list or an array"
                )
        boxes, labels = target["boxes"], target["labels"]
        if isinstance(boxes, BoundingBoxes) and boxes.format != BoundingBoxFormat.XYXY:
            raise ValueError(
                f"targets[{index}] has boxes that say they are {boxes.format.value}, but the detectors read "
                'xyxy: transform them by torchvision.transforms.v2.ConvertBoundingBoxFormat("XYXY")'
            )
        if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
            raise ValueError(
                f"targets[{index}] must hold boxes of shape (objects, 4) and labels of shape "
                f"(objects,), got {tuple(boxes.shape)} and {tuple(labels.shape)}"
            )
        if labels.dtype != torch.int64:
            raise ValueError(f"targets[{index}] must hold labels of type torch.int64, got {labels.dtype}")
    _check_labels([target["labels"] for target in targets], classes, first_label)


def _check_labels(labels: list[Tensor], classes: int, first_label: int) -> None:
    together = torch.cat(labels)
    if not ((together < first_label) | (together >= classes)).any():  # a GPU is waited for once a batch
        return
    for index, of_image in enumerate(labels):
        if of_image.numel() and not first_label <= int(of_image.min()) <= int(of_image.max()) < classes:
            raise ValueError(
                f"targets[{index}] has labels from {int(of_image.min())} to {int(of_image.max())}, but the "
                f"detector predicts {classes - first_label} classes, labelled {first_label} to {classes - 1}"
                f"{' (0 is the background)' if first_label else ''}"
            )


def check_boxes(targets: list[dict[str, Tensor]]) -> None:
    """Raises ``ValueError`` for boxes, after resizing, that a detector can't learn from."""
    if _proper(torch.cat([target["boxes"] for target in targets])).all():  # a GPU is waited for once a batch
        return
    for index, target in enumerate(targets):
        boxes = target["boxes"]
        proper = _proper(boxes)
        if not proper.all():
            box = [round(value, 2) for value in boxes[~proper][0].tolist()]
            raise ValueError(
                f"targets[{index}] has {int((~proper).sum())} box(es) without a positive, finite width and "
                f"height, the first, after resizing, {box}: leave them out (boxes are xyxy, in pixels)"
            )


def _proper(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1) & boxes.isfinite().all(dim=1)


def _type_of(value: Any) -> str:
    """A type's name with its module, where that is none of Python's own: ``numpy.ndarray``."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
