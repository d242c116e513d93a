"""Images of a data set in one block of memory, and batches of crops that are made of it on a device.

Decoding takes a processor longer than a small detector's step takes a GPU. So every image is decoded once,
shrunk to a square canvas that all of a set share, and kept as uint8; scale, crop and flips of a whole batch
are one sampling on the device. What a step is given depends on the seed and the step's number alone, so a
run that was stopped goes on with the batches that it would have had.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from coco_data import CocoFolder

Target = dict[str, Tensor]
SMALLEST = 2.0  # pixels; what is left of a box at a crop's edge must not be narrower


@dataclass(frozen=True)
class DataSet:
    """A data set in COCO form, and how crops for training are made of it.

    Attributes:
        name: of its folder, which holds ``images`` and ``annotations/{train,val,test}.json``.
        classes: how many.
        side: of the canvas in pixels, which an image's longer side is brought to.
        crop: side of the crops for training, a multiple of 32.
        shown: pixels that a detector is shown per pixel of the canvas; below 1 a teacher that sees images of
            twice the size sees more.
        scales: crops are drawn at a scale between these two, times ``shown``.
        flips: "" for none, "h" for left and right, "hv" for up and down too.
        colour: brightness and contrast change by at most this share.
        pair: folder of the same scenes as a teacher sees them, under the same names.
        anchor_scale: side of GFL's anchors, in strides.
    """

    name: str
    classes: int
    side: int
    crop: int
    shown: float = 1.0
    scales: tuple[float, float] = (0.75, 1.33)
    flips: str = "h"
    colour: float = 0.0
    pair: str | None = None
    anchor_scale: float = 4.0


class Images(NamedTuple):
    """A split's images and objects.

    Attributes:
        pixels: shape (images, 3, side, side), uint8, RGB; an image begins in the upper left corner.
        sizes: shape (images, 2), height and width of each in it.
        factors: shape (images,), canvas pixels per pixel of the file.
        boxes: of each image, shape (objects, 4), xyxy in canvas pixels.
        labels: of each image, shape (objects,), from 0.
    """

    pixels: Tensor
    sizes: Tensor
    factors: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]

    def to(self, device: torch.device) -> Images:
        """The same with the pixels on a device."""
        return self._replace(pixels=self.pixels.to(device))


class Window(NamedTuple):
    """Where a batch's crops lie.

    Attributes:
        theta: shape (batch, 2, 3), as ``affine_grid`` takes it.
        gain: shape (batch,), by which each crop's values are multiplied.
        offset: shape (batch,), what is added to them.
    """

    theta: Tensor
    gain: Tensor
    offset: Tensor


def coco_folder(root: Path, data: DataSet, split: str, images: str = "images") -> CocoFolder:
    """A split of a data set as it lies on the disk."""
    return CocoFolder(root / data.name / images, root / data.name / "annotations" / f"{split}.json")


def load_images(root: Path, data: DataSet, split: str, cache: Path, images: str = "images") -> Images:
    """A split's images, decoded once into ``cache`` and mapped from there afterwards.

    Args:
        root: folder of the data sets.
        data: which.
        split: ``"train"``, ``"val"`` or ``"test"``.
        cache: folder for the decoded images, one file of each set, folder and split.
        images: folder in that of the data set.

    Raises:
        FileNotFoundError: no such data.
        OSError: an image that can't be read.
    """
    folder = coco_folder(root, data, split, images)
    path = cache / f"{data.name}_{images}_{split}_{data.side}.pt"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        torch.save(_decoded(folder, data.side), unfinished)
        os.replace(unfinished, path)
    kept = torch.load(path, mmap=True, weights_only=True)
    factors = kept["factors"].tolist()
    objects = [folder.objects(index) for index in range(len(folder))]
    boxes = [of_image * factor for (of_image, _), factor in zip(objects, factors, strict=True)]
    return Images(**kept, boxes=boxes, labels=[labels for _, labels in objects])


def _decoded(folder: CocoFolder, side: int) -> dict[str, Tensor]:
    pixels = torch.zeros(len(folder), 3, side, side, dtype=torch.uint8)
    sizes, factors = torch.zeros(len(folder), 2, dtype=torch.int64), torch.ones(len(folder))
    for index in range(len(folder)):
        image = folder.read(index)
        if image is None:
            raise OSError(f"image {folder.ids[index]} under {folder.images} can't be read")
        longer = max(image.shape[1:])
        height, width = (max(1, round(length * side / longer)) for length in image.shape[1:])
        if longer != side:
            shrunk = F.interpolate(
                image[None].float(), (height, width), mode="bilinear", antialias=True, align_corners=False
            )
            image = shrunk[0].round().clamp(0, 255).to(torch.uint8)
        pixels[index, :, :height, :width] = image
        sizes[index], factors[index] = torch.tensor([height, width]), side / longer
    return {"pixels": pixels, "sizes": sizes, "factors": factors}


def chosen_images(count: int, batch: int, seed: int, step: int) -> list[int]:
    """The images of a step: all of them once in each round, in an order of the round's own."""
    chosen = []
    for place in range(step * batch, (step + 1) * batch):
        generator = torch.Generator().manual_seed(hash((seed, place // count)) % 2**63)
        chosen.append(int(torch.randperm(count, generator=generator)[place % count]))
    return chosen


def draw_windows(
    images: Images, chosen: Sequence[int], data: DataSet, generator: torch.Generator
) -> tuple[Window, list[Target]]:
    """Crops of some images at random, and the objects in them.

    Returns:
        The crops, and of each ``boxes`` (objects, 4), xyxy in its pixels, and ``labels``: the objects whose
        centre it shows.
    """
    low, high = torch.tensor(data.scales).log().tolist()
    thetas, gains, offsets, targets = [], [], [], []
    for index in chosen:
        draw = torch.rand(7, generator=generator).tolist()
        scale = data.shown * float(torch.tensor(low + (high - low) * draw[0]).exp())
        window = data.crop / scale  # canvas pixels
        height, width = images.sizes[index].tolist()
        left, top = (
            min(0.0, room) + abs(room) * share
            for room, share in ((width - window, draw[1]), (height - window, draw[2]))
        )
        if scale == 1:  # whole pixels, as sharp as the images that are measured
            left, top = float(round(left)), float(round(top))
        signs = [
            -1.0 if axis in data.flips and share < 0.5 else 1.0
            for axis, share in (("h", draw[3]), ("v", draw[4]))
        ]
        share = window / data.side
        x, y = ((2 * start + window) / data.side - 1 for start in (left, top))
        thetas.append([[signs[0] * share, 0.0, x], [0.0, signs[1] * share, y]])
        gains.append(1 + data.colour * (2 * draw[5] - 1))
        offsets.append(data.colour * (2 * draw[6] - 1))
        boxes = (images.boxes[index] - torch.tensor([left, top, left, top])) * scale
        targets.append(_in_crop(boxes, images.labels[index], data.crop, signs))
    return Window(torch.tensor(thetas), torch.tensor(gains), torch.tensor(offsets)), targets


def _in_crop(boxes: Tensor, labels: Tensor, crop: int, signs: Sequence[float]) -> Target:
    if signs[0] < 0:
        boxes = torch.stack([crop - boxes[:, 2], boxes[:, 1], crop - boxes[:, 0], boxes[:, 3]], dim=1)
    if signs[1] < 0:
        boxes = torch.stack([boxes[:, 0], crop - boxes[:, 3], boxes[:, 2], crop - boxes[:, 1]], dim=1)
    centres, clipped = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes.clamp(0, crop)
    seen = ((centres > 0) & (centres < crop)).all(dim=1)
    kept = seen & ((clipped[:, 2:] - clipped[:, :2]) >= SMALLEST).all(dim=1)
    return {"boxes": clipped[kept], "labels": labels[kept]}


def crops(
    pixels: Tensor,
    chosen: Sequence[int],
    window: Window,
    size: int,
    device: torch.device,
    *,
    finer: int = 1,
) -> list[Tensor]:
    """A batch's crops, each (3, size, size), values from 0 to 1.

    Called twice with the same window it gives the same part of two aligned images, or of one at two sizes.

    Args:
        pixels: of `Images`.
        chosen: which of them.
        window: what `draw_windows` returned.
        size: in pixels.
        device: where to make them.
        finer: they are sampled at so many times the size, and averaged: where the canvas is finer than they.
    """
    window = Window(*(part.to(device, non_blocking=True) for part in window))
    rows = torch.tensor(chosen, device=pixels.device)
    canvases = pixels[rows].to(device, non_blocking=True).float() / 255
    side = size * finer
    grid = F.affine_grid(window.theta, [len(chosen), 3, side, side], align_corners=False)
    sampled = F.grid_sample(canvases, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    sampled = F.avg_pool2d(sampled, finer) if finer > 1 else sampled
    coloured = sampled * window.gain[:, None, None, None] + window.offset[:, None, None, None]
    return list(coloured.clamp(0, 1))


def whole_images(
    images: Images, chosen: Sequence[int], device: torch.device, scale: float = 1.0
) -> list[Tensor]:
    """Images without the canvas around them, each (3, height, width), values from 0 to 1.

    Args:
        images: of a split.
        chosen: which of them.
        device: where to make them.
        scale: times the canvas's size.
    """
    whole = []
    for index in chosen:
        height, width = images.sizes[index].tolist()
        image = images.pixels[index, :, :height, :width].to(device).float() / 255
        if scale != 1:
            size = (round(height * scale), round(width * scale))
            image = F.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
        whole.append(image)
    return whole
