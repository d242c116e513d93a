"""What saying that a head has an objectness changes: students of a YOLOX-like detector on real blood cells.

The detector is examples/objectness.py, the adapter that of docs/your_detector.md::

    python benchmarks/objectness_bccd.py --root data/bccd --threads 1
    python benchmarks/objectness_bccd.py --root data/bccd --threads 1 --steps 600 300

``--root`` holds BCCD, as ``images`` and ``annotations/{train,val,test}.json``.
"""

from __future__ import annotations

import argparse
import copy
import os
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import measure
import torch
from blood_cells import average_precision, cells
from torch import nn
from tutorial import PAGE, page_code

from crosskd import CrossKD, Distiller, Method, PredictionMimicking

WAYS: dict[str, tuple[bool, Method] | None] = {
    "alone": None,
    "distilled, the classes taken for confidence": (False, CrossKD(position=1)),
    "distilled, `objectness=True`": (True, CrossKD(position=1)),
    "the same without `kd_quality`": (True, CrossKD(position=1, quality_weight=0)),
    "prediction mimicking, `objectness=True`": (True, PredictionMimicking()),
}


def page_adapter(page: dict[str, Any]) -> Any:
    """The adapter that the page's section on objectness shows."""
    text = PAGE.read_text()
    start = text.index("from objectness import")
    exec(compile(text[start : text.index("```", start)], PAGE.name, "exec"), page)
    return page["with_objectness"]


def scores(root: Path, steps: tuple[int, int], seeds: int) -> tuple[float, dict[str, list[float]]]:
    """AP50, from 0 to 100, of the teacher and of each way's students, a seed each."""
    page = page_code()
    adapter, train = page_adapter(page), page["train"]
    _, images, targets = cells(root, "train", 48)
    dataset, test_images, _ = cells(root, "test", 36)

    def weights(seed: int, width: int) -> nn.Module:
        torch.manual_seed(seed)
        detector: nn.Module = page["ObjectnessDetector"](3, width=width)
        return detector

    teacher = weights(0, width=48)
    train(teacher, images, targets, steps=steps[0])
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        start = weights(seed, width=16)
        for way, settings in WAYS.items():
            model = student = copy.deepcopy(start)
            if settings is not None:
                said, method = settings
                model = Distiller(teacher, student, copy.deepcopy(method), replace(adapter, objectness=said))
            train(model, images, targets, steps=steps[1])
            found[way].append(average_precision(student, dataset, test_images)["AP50"])
    return average_precision(teacher, dataset, test_images)["AP50"], found


def main(arguments: list[str] | None = None) -> None:
    """Trains all of them and writes their table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--root", type=Path, required=True, help="folder of the data")
    parser.add_argument("--steps", type=int, nargs=2, default=[200, 80], help="the teacher's, a student's")
    parser.add_argument("--seeds", type=int, default=3, help="how many students of each way")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="the Markdown file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    teacher, found = scores(options.root, tuple(options.steps), options.seeds)
    rows = [[way, *(f"{score:.1f}" for score in of), f"{mean(of):.1f}"] for way, of in found.items()]
    text = (
        "Blood cells, 48 training and 36 test images of 128 x 96 pixels, AP50 from 0 to 100; teacher "
        f"{options.steps[0]} steps, students {options.steps[1]}. The teacher has {teacher:.1f}."
    )
    made = (
        f"Made by `python benchmarks/objectness_bccd.py --root data/bccd --threads {options.threads} --steps "
        f"{options.steps[0]} {options.steps[1]}` on {os.cpu_count()} cores of {measure.processor()} with "
        f"{measure.versions()}."
    )
    table = measure.table(["weights", *map(str, range(options.seeds)), "mean"], rows)
    measure.write("\n\n".join([text, table, made]), options.output)


if __name__ == "__main__":
    main()
