"""The augmentations of the training script, by the names that ``--augment`` takes, in the order given.

One of your own is one more function and its line in ``AUGMENTATIONS``. It gets the data set, from which
`mosaic` draws further images, the image and its target as `tv_tensors`, and returns both. Random numbers
come from PyTorch's own generator, which is seeded by seed, epoch and image.

Where the teacher sees another image of the scene, it is ``target["teacher_image"]``, of the same size and of
`tv_tensors` as well. A transform of ``v2`` that gets image and target in one call changes both images by the
same random numbers; what takes the image alone must do the same to the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

Target = dict[str, Tensor]
Sample = tuple[Tensor, Target]
Augmentation = Callable[[Any, Tensor, Target], Sample]

GREY = 114  # what is seen beyond an image's border


def flip(dataset: Any, image: Tensor, target: Target) -> Sample:
    """Left and right exchanged, half of the time."""
    flipped: Sample = v2.RandomHorizontalFlip()(image, target)
    return flipped


def colour(dataset: Any, image: Tensor, target: Target) -> Sample:
    """Brightness, contrast, saturation and hue, as SSD had them."""
    changed: Sample = v2.RandomPhotometricDistort()(image, target)
    return changed


def crop(dataset: Any, image: Tensor, target: Target) -> Sample:
    """A part in which objects overlap it by a random least IoU, as SSD had it."""
    if not len(target["boxes"]):
        return image, target
    cropped: Sample = v2.SanitizeBoundingBoxes()(*v2.RandomIoUCrop()(image, target))
    return cropped


def jitter(dataset: Any, image: Tensor, target: Target) -> Sample:
    """Half to twice as large, cropped or padded to the size it had."""
    window = v2.RandomCrop(v2.functional.get_size(image), pad_if_needed=True, fill=GREY)
    jittered: Sample = v2.SanitizeBoundingBoxes()(*window(*_zoomed(image, target, 0.5, 2.0)))
    return jittered


def mosaic(dataset: Any, image: Tensor, target: Target) -> Sample:
    """Parts of four images around a random point; the other three are drawn from the data set."""
    height, width = v2.functional.get_size(image)
    y, x = (int(side * (0.25 + 0.5 * torch.rand(()))) for side in (height, width))
    places = [(0, 0, y, x), (0, x, y, width - x), (y, 0, height - y, x), (y, x, height - y, width - x)]
    others = [dataset.plain(int(torch.randint(len(dataset), ()))) for _ in range(3)]
    canvas = torch.empty_like(image.as_subclass(Tensor))
    of_teacher = torch.empty_like(canvas) if "teacher_image" in target else None
    boxes, labels = [], []
    for (top, left, rows, columns), sample in zip(places, [(image, target), *others], strict=True):
        window = v2.RandomCrop((rows, columns), pad_if_needed=True, fill=GREY)
        part, its = window(*_zoomed(*sample, 0.5, 1.0))
        canvas[:, top : top + rows, left : left + columns] = part
        if of_teacher is not None:
            of_teacher[:, top : top + rows, left : left + columns] = its["teacher_image"]
        boxes.append(its["boxes"].as_subclass(Tensor) + torch.tensor([left, top, left, top]))
        labels.append(its["labels"])
    joined = tv_tensors.BoundingBoxes(torch.cat(boxes), format="XYXY", canvas_size=(height, width))
    found = {**target, "boxes": joined, "labels": torch.cat(labels)}
    if of_teacher is not None:
        found["teacher_image"] = tv_tensors.Image(of_teacher)
    whole: Sample = v2.SanitizeBoundingBoxes()(tv_tensors.Image(canvas), found)
    return whole


def _zoomed(image: Tensor, target: Target, least: float, most: float) -> Sample:
    factor = float(torch.empty(()).uniform_(least, most))
    size = [max(1, round(side * factor)) for side in v2.functional.get_size(image)]
    resized: Sample = v2.Resize(size)(image, target)
    return resized


AUGMENTATIONS: dict[str, Augmentation] = {
    "flip": flip,
    "mosaic": mosaic,
    "jitter": jitter,
    "crop": crop,
    "colour": colour,
}
