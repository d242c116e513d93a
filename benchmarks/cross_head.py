"""Where does a student fall behind, in its features or in its own predictors? And what is it taught?

CrossKD hands the student's features to the rest of the teacher's head, and leaves the student's own
predictors to the labels. Both make detections of the same features, so their APs on the validation split
say which of the two holds a student back. A teacher is compared on the levels alone that the student has:
what it finds on the others is not taught, and a second table has its AP with and without them. The students
are those that `evidence.py` has trained::

    python benchmarks/cross_head.py --root data --output runs/evidence --pair cells_few

The student's features take the teacher's statistics, which are those of a batch; ``--batch-sizes`` says of
how many images.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from evidence import MAIN, PAIRS, add_folders, read_budgets, table_runs
from evidence_data import coco_folder, load_images, whole_images
from evidence_report import row_of, title
from evidence_run import Run, adapter, finished_model, name_of, seen_folder
from measure import mean_and_deviation, processor, table
from pycocotools.coco import COCO
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from crosskd import CrossKD, Distiller
from crosskd.compare.data import read_detections, read_ground_truth
from crosskd.compare.precision import class_precision, evaluate
from crosskd.predictions import Predictions
from crosskd.step import Side

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from evaluation import coco_metrics, coco_results

CPU = torch.device("cpu")
CANDIDATES, LEAST, OVERLAP, MOST = 1000, 0.05, 0.6, 100
Detections = list[dict[str, Tensor]]


def detections(side: Side, predictions: Predictions, images: list[Tensor]) -> Detections:
    """Detections of an image from predictions at a side's anchors, the same way for both heads.

    Args:
        side: whose anchors and box coding they are of.
        predictions: shape (batch, anchors, …).
        images: what that side saw, each (3, height, width).

    Returns:
        Of each image ``boxes`` (detections, 4), xyxy in its pixels, ``labels`` and ``scores``.
    """
    found = []
    all_boxes = side.head.decode(predictions, side.anchors)
    for boxes, scores, image in zip(all_boxes, predictions.scores(), images, strict=True):
        values, places = scores.flatten().topk(min(CANDIDATES, scores.numel()))
        places, values = places[values > LEAST], values[values > LEAST]
        rows, labels = places // scores.shape[1], places % scores.shape[1]
        chosen = clip_boxes_to_image(boxes[rows], (image.shape[1], image.shape[2]))
        kept = batched_nms(chosen, values, labels, OVERLAP)[:MOST]
        found.append({"boxes": chosen[kept], "labels": labels[kept], "scores": values[kept]})
    return found


class Compared(NamedTuple):
    """What was measured of one student, AP from 0 to 100.

    Attributes:
        own: of the student's own head.
        cross: of the teacher's head on the student's features, by the images of a batch.
        teacher: of the teacher itself, by class.
        taught: of the teacher on the levels that the student has, by class.
    """

    own: float
    cross: dict[int, float]
    teacher: dict[str, float]
    taught: dict[str, float]


@torch.no_grad()
def compare(run: Run, teacher_run: Run, options: Namespace) -> Compared:
    """Measures both heads of a student, and its teacher, on the validation split."""
    images = load_images(options.root, run.data, "val", options.cache)
    seen = load_images(options.root, run.data, "val", options.cache, seen_folder(teacher_run))
    zoom = 2 if teacher_run.sees == "zoom" else 1
    view: dict[str, list[Tensor]] = {}
    teacher, method = finished_model(teacher_run, options).eval(), CrossKD(run.position)
    distiller = Distiller(
        teacher,
        finished_model(run, options).eval(),
        method,
        adapter,
        teacher_adapter=adapter,
        teacher_view=lambda images, targets: view["teacher"],
        view_scale=float(zoom),
    )
    if len(method.projections):
        raise ValueError(f"{name_of(run)} needs projections, which aren't kept: take a pair of equal widths")
    folder = coco_folder(options.root, run.data, "val")
    own: list[dict[str, Any]] = []
    of_teacher: list[dict[str, Any]] = []
    taught: list[dict[str, Any]] = []
    cross: dict[int, list[dict[str, Any]]] = {size: [] for size in options.batch_sizes}
    for size in options.batch_sizes:
        for begin in range(0, len(folder.ids), size):
            chosen = range(begin, min(begin + size, len(folder.ids)))
            given = whole_images(images, chosen, CPU, run.data.shown)
            view["teacher"] = whole_images(seen, chosen, CPU, run.data.shown * zoom)
            step = distiller.trace(given).steps["crosskd"]
            found = [(cross[size], detections(step.teacher, method.cross_head(step), view["teacher"]), zoom)]
            if size == options.batch_sizes[-1]:  # by batches of any size the same
                on_levels = detections(step.teacher, step.teacher.predictions, view["teacher"])
                found.append((own, detections(step.student, step.student.predictions, given), 1))
                found += [(of_teacher, teacher(view["teacher"]), zoom), (taught, on_levels, zoom)]
            for results, of_images, times in found:
                for index, of_image in zip(chosen, of_images, strict=True):
                    boxes = of_image["boxes"] / (float(images.factors[index]) * run.data.shown * times)
                    results.extend(coco_results(folder, folder.ids[index], {**of_image, "boxes": boxes}))
    own_precision = coco_metrics(folder.ground_truth(), own)["AP"]
    precision = {size: coco_metrics(folder.ground_truth(), kept)["AP"] for size, kept in cross.items()}
    truth = read_ground_truth(folder.ground_truth())
    return Compared(own_precision, precision, _by_class(truth, of_teacher), _by_class(truth, taught))


def _by_class(truth: COCO, found: list[dict[str, Any]]) -> dict[str, float]:
    evaluation = evaluate(truth, read_detections("the teacher", found, truth))
    names = [str(truth.cats[category]["name"]) for category in evaluation.params.catIds]
    return dict(zip(names, (100 * class_precision(evaluation)["AP"][0]).tolist(), strict=True))


def main(arguments: list[str] | None = None) -> None:
    """Compares the two heads of each finished student and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_folders(parser)
    add = parser.add_argument
    add("--pair", choices=PAIRS, default="cells_few")
    add("--methods", nargs="+", default=[*MAIN])
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--batch-sizes", type=int, nargs="+", default=[8], help="images whose statistics are taken together")
    options = parser.parse_args(arguments)
    options.cache = options.cache or options.output / "cache"
    pair = PAIRS[options.pair]
    steps = int(str(read_budgets(options.results / "budgets.json")[options.pair]["steps"]))
    teacher, *students = table_runs(pair, steps, options.seeds, options.methods)
    found: dict[str, list[Compared]] = {}
    for run in students:
        if (options.output / name_of(run) / "model.pt").exists():
            label = row_of(run, students)
            found.setdefault(label, []).append(compare(run, teacher, options))
            print(label, run.seed, found[label][-1][:2], flush=True)
    rows = []
    for method, values in found.items():
        row = [title(method), str(len(values)), mean_and_deviation([value.own for value in values])]
        for size in options.batch_sizes:
            row.append(mean_and_deviation([value.cross[size] for value in values]))
        rows.append(row)
    columns = [f"the teacher's, batches of {size}" for size in options.batch_sizes]
    last = next(iter(found.values()))[0]
    taught = [
        [label, *(f"{value:.1f}" for value in by_class.values())]
        for label, by_class in (("on all its levels", last.teacher), ("on the student's", last.taught))
    ]
    parts = [
        f"# Whose predictors, of {options.pair}",
        "AP on the validation split of detections that the student's own head and the teacher's head make of "
        f"the student's features, which take the teacher's statistics as in training; {steps} steps, mean ± "
        f"standard deviation over seeds. CPU, {processor()}.",
        table(["student", "seeds", "its own predictors", *columns], rows),
        "AP of the teacher itself there, on all of its levels and on those that match one of the student's:",
        table(["teacher", *last.teacher], taught),
    ]
    text = "\n\n".join(parts) + "\n"
    (options.results / f"{options.pair}_cross_head.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
