"""Ground truth and detections made by chance: objects, crowds, images without either, boxes that are off."""

from __future__ import annotations

from typing import Any

import numpy as np

Results = list[dict[str, Any]]

SIDE = 200


def make_scene(images: int = 20, *, seed: int = 0) -> tuple[dict[str, Any], Results, Results]:
    """Ground truth of three classes, the last of which never occurs, and detections of two students.

    The second student's boxes are closer, and it misses fewer objects.
    """
    random = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    weak: Results = []
    strong: Results = []
    for image in range(10, 10 + images):
        for _ in range(random.integers(0, 5)):
            extent = random.integers(8, 110, 2)
            box = np.concatenate([random.integers(0, SIDE - extent), extent]).astype(float)
            key = {"image_id": image, "category_id": int(random.choice([3, 7]))}
            crowd = int(random.random() < 0.1)
            annotation = {"id": len(annotations), **key, "bbox": box.tolist(), "iscrowd": crowd}
            annotations.append({**annotation, "area": float(extent.prod())})
            for results, noise, missed in ((weak, 0.1, 0.4), (strong, 0.04, 0.2)):
                if random.random() > missed:
                    moved = box + random.normal(0, noise, 4) * extent.max()
                    moved[2:] = moved[2:].clip(2)
                    results.append({**key, "bbox": moved.tolist(), "score": random.uniform(0.2, 1)})
        for results in (weak, strong):
            for _ in range(random.integers(0, 4)):
                false = [*random.integers(0, 80, 2).tolist(), *random.integers(8, 100, 2).tolist()]
                key = {"image_id": image, "category_id": int(random.choice([3, 7, 9]))}
                results.append({**key, "bbox": false, "score": random.uniform(0, 0.6)})
    truth = {
        "images": [
            {"id": n, "file_name": f"{n}.png", "width": SIDE, "height": SIDE} for n in range(10, 10 + images)
        ],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 9, "name": "owl"}],
    }
    return truth, weak, strong
