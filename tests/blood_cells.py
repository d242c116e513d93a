"""Real images for tests that train: the blood cells of BCCD, small."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.examples import conftest  # noqa: F401  # so that the examples' modules are found
from tests.helpers.reference_files import bccd_folder

SIZE = (96, 128)  # of images of 480 x 640


def cells(split: str, count: int, first_label: int = 0) -> tuple[Any, Tensor, list[dict[str, Tensor]]]:
    """The data set, the images (count, 3, height, width), their targets.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        count: how many images.
        first_label: the smallest label, of three.
    """
    folder = bccd_folder()
    data = importlib.import_module("coco_data")
    dataset = data.CocoFolder(
        folder / "images", folder / "annotations" / f"{split}.json", first_label=first_label
    )
    dataset.ids = dataset.ids[:count]
    images = [dataset.read(index).float()[None] / 255 for index in range(count)]
    assert {image.shape[2:] for image in images} == {torch.Size((480, 640))}
    resized = [F.interpolate(image, SIZE, mode="bilinear", antialias=True) for image in images]
    scale = SIZE[1] / 640
    targets = [{"boxes": scale * dataset.boxes[i], "labels": dataset.labels[i]} for i in dataset.ids]
    return dataset, torch.cat(resized), targets


@torch.no_grad()
def average_precision(detector: nn.Module, dataset: Any, images: Tensor) -> dict[str, float]:
    """COCO's metrics of what a detector finds in the images of `cells`."""
    evaluation = importlib.import_module("evaluation")
    results = []
    for image_id, output in zip(dataset.ids, detector.eval()(images), strict=True):
        at_full_size = {**output, "boxes": output["boxes"] * 640 / SIZE[1]}
        results += evaluation.coco_results(dataset, image_id, at_full_size)
    return evaluation.coco_metrics(dataset, results)
