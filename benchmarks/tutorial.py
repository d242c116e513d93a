"""What the tutorial's detectors learn: its drawn shapes, several students, and real images of blood cells.

Detector and training are examples/your_detector.py, the adapter is that of docs/your_detector.md::

    python benchmarks/tutorial.py --root data/bccd --threads 1

``--root`` holds BCCD, as ``images`` and ``annotations/{train,val,test}.json``.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import measure
import torch
from blood_cells import average_precision, cells
from torch import nn

from crosskd import CrossKD, Distiller

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

PAGE = Path(__file__).resolve().parent.parent / "docs" / "your_detector.md"
WHO = ("before training", "alone", "distilled")


def page_code() -> dict[str, Any]:
    """What the page's first block imports and defines: the detector, its training, its images, its
    adapter.
    """
    block = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)[0]
    defined: dict[str, Any] = {"__name__": PAGE.name}
    exec(compile(block, PAGE.name, "exec"), defined)
    return defined


@dataclass(frozen=True)
class Case:
    """A teacher, and students from some random weights each, on one kind of images.

    Attributes:
        name: what stands above its table.
        classes: how many there are.
        images: shape (images, 3, height, width), to train on.
        targets: theirs.
        score: how good a detector is.
        digits: of a score in the table.
        steps: of the teacher's training, and of a student's.
        seeds: of the students' weights.
    """

    name: str
    classes: int
    images: torch.Tensor
    targets: list[dict[str, torch.Tensor]]
    score: Callable[[nn.Module], float]
    digits: int
    steps: tuple[int, int]
    seeds: Sequence[int]


def measured(case: Case, page: dict[str, Any]) -> str:
    """Trains a case's teacher and students; their scores as a table."""
    train, build = page["train"], page["SmallDetector"]

    def weights(seed: int, width: int) -> nn.Module:
        torch.manual_seed(seed)
        detector: nn.Module = build(case.classes, width=width)
        return detector

    teacher = weights(0, width=48)
    train(teacher, case.images, case.targets, steps=case.steps[0])
    scores: dict[str, list[float]] = {name: [] for name in WHO}
    for seed in case.seeds:
        start = weights(seed, width=16)
        alone, student = copy.deepcopy(start), copy.deepcopy(start)
        train(alone, case.images, case.targets, steps=case.steps[1])
        distiller = Distiller(teacher, student, CrossKD(position=1), page["adapter"])
        train(distiller, case.images, case.targets, steps=case.steps[1])
        for name, detector in zip(WHO, (start, alone, student), strict=True):
            scores[name].append(case.score(detector))
    text = f"{case.name}; teacher {case.steps[0]} steps, students {case.steps[1]}. "
    rows = [
        [name, *(f"{score:.{case.digits}f}" for score in of), f"{mean(of):.{case.digits}f}"]
        for name, of in scores.items()
    ]
    header = ["weights", *map(str, case.seeds), "mean"]
    return f"{text}The teacher has {case.score(teacher):.{case.digits}f}.\n\n{measure.table(header, rows)}"


def cases(root: Path, page: dict[str, Any]) -> list[Case]:
    """All that the page tells of."""
    shapes = page["draw"](200, seed=0)
    test_shapes = page["draw"](60, seed=1)
    _, images, targets = cells(root, "train", 48)
    dataset, test_images, _ = cells(root, "test", 36)

    def right_shapes(detector: nn.Module) -> float:
        score: float = page["f1"](detector, *test_shapes)
        return score

    def right_cells(detector: nn.Module) -> float:
        return average_precision(detector, dataset, test_images)["AP50"]

    real = "Blood cells, 48 training and 36 test images of 128 x 96 pixels, AP50 from 0 to 100"
    return [
        Case("Drawn shapes, F1", 2, *shapes, right_shapes, 3, (300, 100), range(1, 6)),
        Case(real, 3, images, targets, right_cells, 1, (200, 80), range(3)),
        Case(real, 3, images, targets, right_cells, 1, (600, 300), range(3)),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measures all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--root", type=Path, required=True, help="folder of the data")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="the Markdown file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    page = page_code()
    parts = [measured(case, page) for case in cases(options.root, page)]
    made = (
        f"Made by `python benchmarks/tutorial.py --root data/bccd --threads {options.threads}` on "
        f"{os.cpu_count()} cores of {measure.processor()} with {measure.versions()}."
    )
    measure.write("\n\n".join([*parts, made]), options.output)


if __name__ == "__main__":
    main()
