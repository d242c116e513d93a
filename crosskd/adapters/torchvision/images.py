"""Checks of images and targets in torchvision's form, before a detector's own transform stumbles over
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_boxes", "check_images", "check_targets"]


def check_images(images: Any) -> None:
    """Raises ``ValueError`` or ``TypeError`` for images that aren't in torchvision's form."""
    if isinstance(images, Tensor):
        if images.ndim != 4:
            raise ValueError(
                "images must be a list of tensors (3, height, width) with values from 0 to 1, or one "
                f"tensor (batch, 3, height, width), got shape {tuple(images.shape)}"
            )
    elif not isinstance(images, list | tuple) or not all(isinstance(i, Tensor) for i in images):
        raise TypeError(
            "images must be a list of tensors (3, height, width) with values from 0 to 1, got "
            f"{type(images).__name__}"
        )
    if len(images) == 0:
        raise ValueError("images is empty: a batch needs at least one image")


def check_targets(targets: Any, images: int, classes: int, first_label: int) -> None:
    """Raises ``ValueError`` for targets that aren't in torchvision's form, before they are resized."""
    if len(targets) != images:
        raise ValueError(f"got {images} images but {len(targets)} targets: one is needed for each")
    for index, target in enumerate(targets):
        if not isinstance(target, Mapping) or not {"boxes", "labels"} <= target.keys():
            raise ValueError(f'targets[{index}] must be a dict with "boxes" and "labels", got {target!r}')
        boxes, labels = target["boxes"], target["labels"]
        if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
            raise ValueError(
                f"targets[{index}] must hold boxes of shape (objects, 4) and labels of shape "
                f"(objects,), got {tuple(boxes.shape)} and {tuple(labels.shape)}"
            )
        if labels.dtype != torch.int64:
            raise ValueError(f"targets[{index}] must hold labels of type torch.int64, got {labels.dtype}")
        if labels.numel() and not first_label <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(
                f"targets[{index}] has labels from {int(labels.min())} to {int(labels.max())}, but the "
                f"detector predicts {classes - first_label} classes, labelled {first_label} to {classes - 1}"
                f"{' (0 is the background)' if first_label else ''}"
            )


def check_boxes(targets: list[dict[str, Tensor]]) -> None:
    """Raises ``ValueError`` for boxes, after resizing, that a detector can't learn from."""
    for index, target in enumerate(targets):
        boxes = target["boxes"]
        proper = (boxes[:, 2:] > boxes[:, :2]).all(dim=1) & boxes.isfinite().all(dim=1)
        if not proper.all():
            box = [round(value, 2) for value in boxes[~proper][0].tolist()]
            raise ValueError(
                f"targets[{index}] has {int((~proper).sum())} box(es) without a positive, finite width and "
                f"height, the first, after resizing, {box}: leave them out (boxes are xyxy, in pixels)"
            )
