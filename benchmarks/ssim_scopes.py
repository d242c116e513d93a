"""What `crosskd.StructuralKD` should take minimum and maximum of, and which of its two published weights.

Short trainings on images of blood cells, judged by the validation split::

    python benchmarks/ssim_scopes.py --root data/bccd --threads 1

The detectors and their adapter are the tutorial's. ``--root`` holds BCCD, as ``images`` and
``annotations/{train,val,test}.json``.
"""

from __future__ import annotations

import argparse
import os
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, get_args

import measure
import torch
from blood_cells import average_precision, cells
from torch import nn
from tutorial import page_code

from crosskd import Distiller, StructuralKD
from crosskd.losses.ssim import MinMax

WEIGHTS = (2.0, 4.0)
SCOPES: tuple[MinMax, ...] = get_args(MinMax)

Scores = dict[tuple[MinMax, float], list[float]]
"""AP from 0 to 100 by scope and weight, one number for each seed."""


def scores(options: argparse.Namespace, page: dict[str, Any]) -> tuple[float, list[float], Scores]:
    """The AP of the teacher, of the students alone, and of those that were distilled."""
    _, images, targets = cells(options.root, "train", options.images)
    dataset, validation, _ = cells(options.root, "val", options.validation_images)
    seeds = range(1, options.seeds + 1)

    def trained(seed: int, width: int, steps: int, method: StructuralKD | None = None) -> nn.Module:
        torch.manual_seed(seed)
        detector: nn.Module = page["SmallDetector"](3, width=width)
        model = detector if method is None else Distiller(teacher, detector, method, page["adapter"])
        page["train"](model, images, targets, steps=steps)
        return detector

    def judged(detector: nn.Module) -> float:
        return average_precision(detector, dataset, validation)["AP"]

    teacher = trained(0, 48, options.teacher_steps)
    alone = [judged(trained(seed, 16, options.steps)) for seed in seeds]
    found: Scores = {}
    for scope, weight in product(SCOPES, WEIGHTS):
        method = StructuralKD(weight, minmax=scope)
        found[scope, weight] = [judged(trained(seed, 16, options.steps, method)) for seed in seeds]
    return judged(teacher), alone, found


def single_scores(alone: list[float], found: Scores) -> str:
    """All scores as a table."""
    seeds = [f"seed {seed}" for seed in range(1, len(alone) + 1)]
    named = {"alone": alone} | {f'"{scope}", weight {weight:g}': of for (scope, weight), of in found.items()}
    rows = [
        [name, *(f"{score:.1f}" for score in of), measure.mean_and_deviation(of)]
        for name, of in named.items()
    ]
    return measure.table(["minimum and maximum of", *seeds, "mean ± deviation"], rows)


def effects(found: Scores) -> str:
    """How far each scope, and each weight, is ahead of the mean of all, as a table.

    Compared are trainings from the same weights that differ in nothing else.
    """
    seeds = range(len(next(iter(found.values()))))
    gaps: dict[str, list[float]] = {}
    for scope in SCOPES:
        gaps[f'"{scope}"'] = [
            found[scope, weight][seed] - mean(found[other, weight][seed] for other in SCOPES)
            for weight, seed in product(WEIGHTS, seeds)
        ]
    for weight in WEIGHTS:
        gaps[f"weight {weight:g}"] = [
            found[scope, weight][seed] - mean(found[scope, other][seed] for other in WEIGHTS)
            for scope, seed in product(SCOPES, seeds)
        ]
    rows = [
        [name, f"{mean(of):+.2f} ± {stdev(of) / len(of) ** 0.5:.2f}", str(len(of))]
        for name, of in gaps.items()
    ]
    return measure.table(["", "ahead of the mean by, ± standard error", "trainings"], rows)


def main(arguments: list[str] | None = None) -> None:
    """Trains all variants and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--root", type=Path, required=True, help="folder of the data")
    parser.add_argument("--images", type=int, default=205, help="of the training split, all of them")
    parser.add_argument("--validation-images", type=int, default=87, help="likewise")
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=300, help="of a student's training")
    parser.add_argument("--seeds", type=int, default=3, help="students of each variant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="the Markdown file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    teacher, alone, found = scores(options, page_code())
    made = (
        f"The tutorial's detector, 128 x 96 pixels, teacher 48 channels and {options.teacher_steps} steps, "
        f"students 16 channels and {options.steps} steps of 8 images. Made by `python "
        f"benchmarks/ssim_scopes.py --root data/bccd --steps {options.steps} --seeds {options.seeds} "
        f"--threads {options.threads}` on {os.cpu_count()} cores of {measure.processor()} with "
        f"{measure.versions()}; seeds of the students' weights 1 to {options.seeds}, of the teacher's 0."
    )
    parts = [
        "# What SSIM's minimum and maximum are of",
        f"AP from 0 to 100 on the validation split of BCCD. The teacher has {teacher:.1f}.",
        single_scores(alone, found),
        "Scopes over both weights and weights over all scopes, trainings from the same weights compared:",
        effects(found),
        made,
    ]
    measure.write("\n\n".join(parts), options.output)


if __name__ == "__main__":
    main()
