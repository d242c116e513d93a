"""Images and targets in torchvision's form, for both detectors at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from crosskd.adapters._torchvision_parts import check_image_channels
from crosskd.adapters.levels import LevelPairs
from crosskd.adapters.protocol import Inputs

__all__ = ["prepare_images"]


def prepare_images(
    teacher: Any, student: Any, images: Any, targets: Any, num_classes: int, *, first_label: int = 0
) -> Inputs:
    """Images and targets in torchvision's form, resized once for both detectors.

    For adapters of detectors that preprocess by torchvision's ``GeneralizedRCNNTransform``.

    Args:
        teacher: the teacher's transform; its mean and deviation alone are used.
        student: the student's transform, which normalises, resizes and batches.
        images: tensors (3, height, width) with values from 0 to 1.
        targets: dicts of ``boxes`` (objects, 4), xyxy in pixels, and ``labels`` (objects,), one an image;
            or ``None``.
        num_classes: how many the student predicts, labelled from 0.
        first_label: the smallest label of an object: 1 where 0 is the background.

    Returns:
        Both detectors' pixels and the resized targets; ``extra`` is the student's ``ImageList``.

    Raises:
        ValueError: images or targets in another form, labels that the student doesn't know, boxes
            without area, a teacher for images of other channels.
        TypeError: images that are no tensors.
    """
    check_image_channels(teacher, student, LevelPairs(None))
    _check_images(images)
    if targets is not None:
        _check_targets(targets, len(images), num_classes, first_label)
    batch, resized_targets = student(list(images), targets)
    if resized_targets is not None:
        _check_boxes(resized_targets)
    teacher_pixels = _renormalized(batch, student, teacher)
    return Inputs(batch.tensors, teacher_pixels, resized_targets, extra=batch)


def _renormalized(batch: ImageList, student: Any, teacher: Any) -> Tensor:
    """The student's pixels under the teacher's mean and deviation, the padding still zero."""
    pixels: Tensor = batch.tensors
    means, stds = (
        [torch.as_tensor(getattr(t, name), dtype=pixels.dtype, device=pixels.device)
         for t in (student, teacher)]
        for name in ("image_mean", "image_std")
    )  # fmt: skip
    if torch.equal(means[0], means[1]) and torch.equal(stds[0], stds[1]):
        return pixels
    scale = (stds[0] / stds[1])[:, None, None]
    shift = ((means[0] - means[1]) / stds[1])[:, None, None]
    renormalized = torch.zeros_like(pixels)
    for index, (height, width) in enumerate(batch.image_sizes):
        own = pixels[index, :, :height, :width]
        renormalized[index, :, :height, :width] = own * scale + shift
    return renormalized


def _check_images(images: Any) -> None:
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


def _check_targets(targets: Any, images: int, classes: int, first_label: int) -> None:
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
                f"student predicts {classes - first_label} classes, labelled {first_label} to {classes - 1}"
                f"{' (0 is the background)' if first_label else ''}"
            )


def _check_boxes(targets: list[dict[str, Tensor]]) -> None:
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
