"""A small data set for the rehearsal: squares and discs on noise, and the same scenes without the noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
COUNTS = {"train": 16, "val": 6, "test": 6}


def make_toy(folder: Path) -> None:
    """Writes ``images``, ``images_pair`` and ``annotations`` in COCO form, unless they are there."""
    if (folder / "annotations" / "test.json").exists():
        return
    random = np.random.default_rng(0)
    for name in ("images", "images_pair", "annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for split, count in COUNTS.items():
        images, annotations = [], []
        for number in range(1, count + 1):
            file = f"{split}_{number}.png"
            scene, boxes = _scene(random)
            scene.save(folder / "images_pair" / file)
            noise = random.integers(-60, 60, (SIDE, SIDE, 3))
            noisy = (np.asarray(scene).astype(int) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / "images" / file)
            images.append({"id": number, "file_name": file, "width": SIDE, "height": SIDE})
            for category, (x, y, side) in boxes:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": category,
                        "bbox": [x, y, side, side],
                        "area": side * side,
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": 1, "name": "square"}, {"id": 2, "name": "disc"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))


def _scene(random: np.random.Generator) -> tuple[Image.Image, list[tuple[int, tuple[int, int, int]]]]:
    """One square and one disc, in the left and the right half."""
    scene, boxes = Image.new("RGB", (SIDE, SIDE), (70, 70, 70)), []
    pen = ImageDraw.Draw(scene)
    for category, left in ((1, 0), (2, SIDE // 2)):
        side = int(random.integers(12, 28))
        x = left + int(random.integers(0, SIDE // 2 - side))
        y = int(random.integers(0, SIDE - side))
        draw = pen.rectangle if category == 1 else pen.ellipse
        draw((x, y, x + side - 1, y + side - 1), fill=(200, 60, 60) if category == 1 else (60, 60, 200))
        boxes.append((category, (x, y, side)))
    return scene, boxes
