"""A few real images for short trainings: the blood cells of BCCD, small."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from coco_data import CocoFolder
from evaluation import coco_metrics, coco_results

SIZE = (96, 128)  # of images of 480 x 640


def cells(
    root: Path, split: str, count: int, first_label: int = 0
) -> tuple[Any, Tensor, list[dict[str, Tensor]]]:
    """The data set, the images (count, 3, height, width), their targets.

    Args:
        root: holds ``images`` and ``annotations/{train,val,test}.json``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        count: how many images.
        first_label: the smallest label, of three.
    """
    annotations = root / "annotations" / f"{split}.json"
    dataset = CocoFolder(root / "images", annotations, first_label=first_label)
    dataset.ids = dataset.ids[:count]
    images = [dataset.read(index).float()[None] / 255 for index in range(count)]
    assert {image.shape[2:] for image in images} == {torch.Size((480, 640))}
    resized = [F.interpolate(image, SIZE, mode="bilinear", antialias=True) for image in images]
    scale = SIZE[1] / 640
    objects = [dataset.objects(index) for index in range(len(dataset))]
    targets = [{"boxes": scale * boxes, "labels": labels} for boxes, labels in objects]
    return dataset, torch.cat(resized), targets


@torch.no_grad()
def average_precision(detector: nn.Module, dataset: Any, images: Tensor) -> dict[str, float]:
    """COCO's metrics of what a detector finds in the images of `cells`."""
    results = []
    for image_id, output in zip(dataset.ids, detector.eval()(images), strict=True):
        at_full_size = {**output, "boxes": output["boxes"] * 640 / SIZE[1]}
        results += coco_results(dataset, image_id, at_full_size)
    metrics: dict[str, float] = coco_metrics(dataset.ground_truth(), results)
    return metrics
