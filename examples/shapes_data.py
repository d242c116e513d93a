"""A small detection data set that needs no download: coloured, textured shapes in COCO form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from run_folder import save_atomically

SHAPES = ("disc", "triangle", "cross")
# Red, green and blue: each shape's colours lie about one.
_COLOURS = ((0.7, 0.65, 0.3), (0.65, 0.35, 0.65), (0.3, 0.6, 0.65))
SIDE = 192
_MOST_COVERED = 0.25
_VERSION = 2

Pixels = NDArray[np.float64]


def write_shapes(folder: Path, *, train: int, val: int, seed: int) -> None:
    """Writes images and COCO annotations of a training and a validation split, unless they are there.

    Args:
        folder: gets ``train/``, ``val/`` and ``annotations/{train,val}.json``.
        train: how many training images.
        val: how many validation images.
        seed: the same seed makes the same images.
    """
    settings = {"version": _VERSION, "train": train, "val": val, "seed": seed, "side": SIDE}
    marker = folder / "settings.json"
    if marker.exists() and json.loads(marker.read_text()) == settings:
        return
    marker.unlink(missing_ok=True)  # from here on the set is whole no more
    for number, (split, count) in enumerate((("train", train), ("val", val))):
        _write_split(folder, split, count, np.random.default_rng([seed, number]))
    # Last and in one move, so that a killed run leaves no half-written set that looks whole.
    save_atomically(settings, marker)


def _write_split(folder: Path, split: str, count: int, random: np.random.Generator) -> None:
    for path in (folder / split, folder / "annotations"):
        path.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, count + 1):
        pixels, objects = draw_image(random)
        name = f"{image_id:05d}.png"
        Image.fromarray(pixels).save(folder / split / name)
        images.append({"id": image_id, "file_name": name, "width": SIDE, "height": SIDE})
        for label, (x, y, width, height) in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(SHAPES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))


def draw_image(random: np.random.Generator) -> tuple[NDArray[np.uint8], list[tuple[int, list[int]]]]:
    """Draws one image and tells where its shapes are.

    Returns:
        Pixels of shape (height, width, 3), and (label, box) of each shape; boxes are x, y, width, height
        of the visible part, in pixels.
    """
    background = random.uniform(0.3, 0.7) + random.uniform(-0.1, 0.1, size=3)
    canvas = _texture(random, background, contrast=0.1)
    owner = np.full((SIDE, SIDE), -1)
    labels: list[int] = []
    for _ in range(int(random.integers(2, 6))):
        label = int(random.integers(len(SHAPES)))
        mask = _mask(random, SHAPES[label])
        if any((owner[mask] == n).sum() > _MOST_COVERED * (owner == n).sum() for n in range(len(labels))):
            continue
        shadow = np.pad(mask, ((3, 0), (3, 0)))[:SIDE, :SIDE] & ~mask
        canvas[shadow] *= 0.7
        colour = _COLOURS[label] + random.uniform(-0.15, 0.15, size=3)
        canvas[mask] = _texture(random, colour, contrast=0.15)[mask]
        owner[mask] = len(labels)
        labels.append(label)
    canvas = canvas + random.normal(0, 0.03, canvas.shape)
    objects = []
    for number, label in enumerate(labels):
        rows, columns = np.nonzero(owner == number)
        x, y = int(columns.min()), int(rows.min())
        objects.append((label, [x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y]))
    return (canvas.clip(0, 1) * 255).astype(np.uint8), objects


def _mask(random: np.random.Generator, shape: str) -> NDArray[np.bool_]:
    """Where a shape of random size, place and turn lies."""
    radius = random.uniform(26, 48)
    x, y = random.uniform(radius * 0.6, SIDE - radius * 0.6, size=2)
    turn = random.uniform(0, 2 * math.pi)
    image = Image.new("1", (SIDE, SIDE))
    draw = ImageDraw.Draw(image)
    if shape == "disc":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    else:
        corners = [
            (x + radius * distance * math.cos(turn + angle), y + radius * distance * math.sin(turn + angle))
            for distance, angle in _outline(shape)
        ]
        draw.polygon(corners, fill=1)
    return np.asarray(image)


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners as (distance from the centre, angle)."""
    if shape == "cross":
        arm, inner = math.atan2(0.3, 1.0), 0.3 * math.sqrt(2)
        quarter = [(1.0, -arm), (1.0, arm), (inner, math.pi / 4)]
        return [(d, angle + side * math.pi / 2) for side in range(4) for d, angle in quarter]
    return [(1.0, corner * 2 * math.pi / 3) for corner in range(3)]


def _texture(random: np.random.Generator, base: Pixels, contrast: float) -> Pixels:
    """A picture of (SIDE, SIDE, 3): a colour mixed with one near it by stripes, checks, waves or blotches."""
    other = (base + random.uniform(-contrast, contrast, size=3)).clip(0, 1)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    angle, frequency = random.uniform(0, math.pi), random.uniform(4, 16)
    along = (columns * math.cos(angle) + rows * math.sin(angle)) * frequency
    across = (rows * math.cos(angle) - columns * math.sin(angle)) * frequency
    kind = int(random.integers(4))
    if kind == 0:
        mix = (along % 1 < 0.5).astype(float)
    elif kind == 1:
        mix = ((along % 1 < 0.5) ^ (across % 1 < 0.5)).astype(float)
    elif kind == 2:
        mix = 0.5 + 0.5 * np.sin(2 * math.pi * along) * np.sin(2 * math.pi * across)
    else:
        coarse = Image.fromarray(random.uniform(0, 255, size=(12, 12)).astype(np.uint8))
        mix = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255
    return base + (other - base) * mix[..., None]
