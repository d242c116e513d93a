"""Why does one method help and another not? Gradients, a teacher's scores, and who answers for an object.

Of a pair of `evidence.py` with a finished student, before its first step::

    python benchmarks/evidence_why.py --root data --output runs/evidence --pair cells_few

The gradient of each method's loss at the student's feature maps, over that of the student's own losses on
the images with labels; of the teacher's detections on the validation split, how many are right at each
score; and how many anchors label assignment gives an object of each class. Nothing is trained.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from evidence import PAIRS, add_folders, alone_run, read_budgets, teacher_run
from evidence_data import Images, coco_folder, load_images
from evidence_report import title
from evidence_run import Run, finished_model, measure, seen_folder, start
from evidence_run import batches as batches_of
from evidence_run import parse as parse_run
from loss_scales import gradient_norm, text_of
from measure import processor, table

from crosskd.compare.data import read_detections, read_ground_truth
from crosskd.compare.precision import evaluate

METHODS = ("crosskd", "mimic", "bckd", "ld", "pkd", "cwd", "ssim", "mgd", "fgd", "drkd")
EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0)


def ratios(run: Run, images: dict[str, Images], options: Namespace) -> tuple[list[float], list[float]]:
    """A method's gradient over the student's own, batch by batch: with labels, and of the other images."""
    training = start(run, options)
    levels = run.model.levels
    labelled, others = [], []
    for step in range(options.batches):
        training.step = step
        own = 0.0
        for given, objects in batches_of(training, images):
            trace = training.trained.trace(given, objects)
            losses = training.trained.named_losses(trace)
            of_method = [loss for name, loss in losses.items() if name not in trace.own_losses]
            size = gradient_norm(torch.stack(of_method).sum(), trace, levels)
            if objects is None:
                others.append(size / own)
            else:
                own = gradient_norm(torch.stack(list(trace.own_losses.values())).sum(), trace, levels)
                labelled.append(size / own)
    return labelled, others


def gradient_rows(runs: Sequence[Run], options: Namespace) -> list[list[str]]:
    """A row of each method: the medians of `ratios`."""
    images = training_images(runs[0], options)
    rows = []
    for run in runs:
        medians = [statistics.median(values) if values else 0.0 for values in ratios(run, images, options)]
        rows.append([title(run.method), *map(text_of, medians)])
        print(rows[-1], flush=True)
    return rows


def training_images(run: Run, options: Namespace) -> dict[str, Images]:
    """The training images, and those that the teacher sees where they are others."""
    assert run.teacher is not None
    images = {"train": load_images(options.root, run.data, "train", options.cache)}
    if run.teacher.sees == "pair":
        images["teacher"] = load_images(
            options.root, run.data, "train", options.cache, seen_folder(run.teacher)
        )
    return images


def assignment_rows(run: Run, options: Namespace) -> list[list[str]]:
    """Of each class the objects in some batches, their median size, and the anchors that one is given."""
    images = training_images(run, options)
    training = start(run, options)
    names = coco_folder(options.root, run.data, "train").names
    sizes: list[list[float]] = [[] for _ in names]
    positive = [[0, 0] for _ in names]
    for step in range(options.batches):
        training.step = step
        given, objects = next(iter(batches_of(training, images)))
        assert objects is not None
        for label, of_label in enumerate(sizes):
            alone = [
                {key: value[target["labels"] == label] for key, value in target.items()} for target in objects
            ]
            boxes = torch.cat([target["boxes"] for target in alone])
            if not len(boxes):
                continue
            of_label.extend((boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt().tolist())
            (compared,) = training.trained.trace(given, alone).steps.values()
            for side, found in enumerate((compared.assignment, compared.teacher_assignment())):
                positive[label][side] += int(found.positive.sum())
    rows = []
    for name, of_label, counts in zip(names, sizes, positive, strict=True):
        if of_label:
            each = [f"{count / len(of_label):.1f}" for count in counts]
            rows.append([name, str(len(of_label)), f"{statistics.median(of_label):.0f}", *each])
    return rows


def calibration_rows(teacher: Run, options: Namespace) -> list[list[str]]:
    """How many detections of the teacher have a score in a range, its mean, and the share that is right."""
    images = load_images(options.root, teacher.data, "val", options.cache, seen_folder(teacher))
    _, results = measure(finished_model(teacher, options).eval(), teacher, images, "val", options)
    truth = read_ground_truth(coco_folder(options.root, teacher.data, "val").ground_truth())
    evaluation = evaluate(truth, read_detections("the teacher", results, truth))
    all_areas = evaluation.params.areaRng[0]
    entries = [e for e in evaluation.evalImgs if e is not None and e["aRng"] == all_areas]
    scores = np.concatenate([entry["dtScores"] for entry in entries])
    right = np.concatenate([entry["dtMatches"][0] > 0 for entry in entries])
    rows = []
    for low, high in itertools.pairwise(EDGES):
        chosen = (scores >= low) & (scores < high)
        if chosen.any():
            shares = [f"{scores[chosen].mean():.2f}", f"{right[chosen].mean():.2f}"]
            rows.append([f"{low:g} to {high:g}", str(np.count_nonzero(chosen)), *shares])
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measures all and writes the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_folders(parser)
    add = parser.add_argument
    add("--pair", choices=[name for name in PAIRS if PAIRS[name].student.begins], default="cells_few")
    add("--methods", nargs="+", default=METHODS)
    add("--batches", type=int, default=8)
    given = parser.parse_args(arguments)
    cache = given.cache or given.output / "cache"
    folders = ["--root", str(given.root), "--output", str(given.output), "--cache", str(cache)]
    options = parse_run([str(given.output), *folders])  # without --bf16: ratios of gradients, in float32
    options.nanodet, options.batches = given.nanodet, given.batches
    pair = PAIRS[given.pair]
    steps = int(str(read_budgets(given.results / "budgets.json")[given.pair]["steps"]))
    teacher, alone = teacher_run(pair, steps), alone_run(pair, steps, 0)
    runs = [replace(alone, method=method, teacher=teacher) for method in given.methods]
    all_labels = replace(runs[0], method="crosskd", labelled=1.0)
    parts = [
        f"# Gradients, scores and label assignment, of {given.pair}",
        "The gradient of a method's losses at the student's maps, over that of the student's own losses on "
        "the images with labels, before the finished student's first step; medians of "
        f"{options.batches} batches, seed 0. CPU, {processor()}.",
        table(["method", "images with labels", "the others"], gradient_rows(runs, options)),
        "The teacher's detections on the validation split: how many of those with a score in a range are "
        "right, at an IoU of 0.5.",
        table(
            ["score", "detections", "mean score", "share that is right"], calibration_rows(teacher, options)
        ),
        f"Label assignment in {options.batches} batches of training images, as if all had labels: root of an "
        "object's area in the student's pixels, median; and the anchors that hold an object, by the "
        "student's assignment and by the teacher's, for each object.",
        table(
            ["class", "objects", "size", "student's anchors", "teacher's anchors"],
            assignment_rows(all_labels, options),
        ),
    ]
    text = "\n\n".join(parts) + "\n"
    (given.results / f"{given.pair}_why.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
