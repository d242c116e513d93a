"""The students of a run compared on the validation data, by ``crosskd.compare``."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from coco_data import CocoFolder
from evaluation import detect
from methods_table import TEACHER, label_of
from torch import nn

import crosskd
from crosskd.compare import Detections


def write_comparison(
    models: dict[str, nn.Module], data: CocoFolder, folder: Path, *, batch_size: int, device: torch.device
) -> None:
    """Writes ``comparison.md`` and ``comparison.png`` of the students, if there are two or more.

    Args:
        models: by name; the first student is the one to compare with, the teacher is left out.
        data: what they are compared on.
        folder: for the two files.
        batch_size: images at a time.
        device: what the models are on.
    """
    students = {name: model for name, model in models.items() if name != TEACHER}
    if len(students) < 2:
        return
    found: dict[str, Detections] = {}
    costs: dict[str, dict[str, float]] = {}
    for name, student in students.items():
        begun = time.perf_counter()
        by_image = detect(student, data, batch_size=batch_size, device=device)
        seconds = (time.perf_counter() - begun) / len(data)
        results = [result for of_image in by_image.values() for result in of_image]
        parameters = sum(parameter.numel() for parameter in student.parameters())
        found[label_of(name)] = Detections(results, tuple(by_image), parameters, None)
        costs[label_of(name)] = {"seconds per image, with reading": seconds}
    crosskd.compare(data.ground_truth(), found, images=data.images, costs=costs).save(folder)
