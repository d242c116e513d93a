"""A small COCO-format data set with everything that real ones hold: crowds, empty images, broken files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_coco(folder: Path) -> tuple[Path, Path]:
    """Writes five images and their annotations.

    Returns:
        The images' folder and the annotations' path.

    Image 1 is landscape with two boxes, one of them a crowd; 2 is portrait and grayscale with a box beyond
    its border and one without area; 3 shows nothing; 4 is a broken JPEG with a box; 5 is missing.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(images / "1.jpg")
    Image.fromarray(random.integers(0, 255, (60, 40), dtype=np.uint8)).save(images / "2.jpg")
    Image.fromarray(random.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(images / "3.png")
    (images / "4.jpg").write_bytes((images / "1.jpg").read_bytes()[:200])
    sizes = {1: (60, 40), 2: (40, 60), 3: (60, 40), 4: (60, 40), 5: (60, 40)}
    names = {1: "1.jpg", 2: "2.jpg", 3: "3.png", 4: "4.jpg", 5: "5.jpg"}
    boxes = [
        (1, 7, [5, 5, 20, 10], 0),
        (1, 3, [0, 0, 60, 40], 1),
        (2, 3, [30, 50, 20, 20], 0),
        (2, 3, [10, 10, 0, 5], 0),
        (4, 7, [1, 1, 9, 9], 0),
    ]
    content = {
        "images": [{"id": i, "file_name": names[i], "width": w, "height": h} for i, (w, h) in sizes.items()],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": crowd}
            for n, (i, c, b, crowd) in enumerate(boxes, 1)
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return images, path


def write_annotations(
    path: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]], **further: Any
) -> Path:
    """Writes a JSON file in COCO form with one category, unless others are given."""
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    path.write_text(json.dumps({**content, **further}))
    return path
