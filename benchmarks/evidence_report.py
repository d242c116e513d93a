"""Tables and a picture of evidence.py's runs: how good, how sure, how flat, at what cost."""

from __future__ import annotations

import json
import statistics
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence_data import coco_folder
from evidence_run import STRIDES, VARIANTS, Run, name_of
from measure import mean_and_deviation, processor, table
from numpy.typing import NDArray

from crosskd.compare.data import read_detections, read_ground_truth
from crosskd.compare.precision import METRICS, class_precision, evaluate, over_classes, resampled_precision

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from methods_table import label_of

ALONE, CROSSKD, TEACHER, BEGUN = "none", "crosskd", "teacher", "begun"
OTHERS = (TEACHER, BEGUN)  # rows that are no method's
LONGER = "alone from the beginning"
Samples = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Finished:
    """A run with what it left.

    Attributes:
        run: the run.
        result: of ``result.json``.
        metrics: by name, of the test images as they are, then of each resampling.
        classes: AP of each class, likewise.
    """

    run: Run
    result: dict[str, Any]
    metrics: Samples
    classes: Samples


def read(runs: Sequence[Run], options: Namespace) -> dict[str, dict[int, Finished]]:
    """Finished runs by method, then seed; the same resampled images for all."""
    found: dict[str, dict[int, Finished]] = {}
    if not runs:
        return found
    truth = read_ground_truth(coco_folder(options.root, runs[0].data, "test").ground_truth())
    number = len(truth.imgs)
    counts = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=options.resamples)
    for run in runs:
        folder = options.output / name_of(run)
        coco = read_detections(name_of(run), json.loads((folder / "detections_test.json").read_text()), truth)
        evaluation = evaluate(truth, coco)
        drawn = resampled_precision(evaluation, torch.from_numpy(counts))
        of_class = {k: 100 * np.concatenate([v, drawn[k]]) for k, v in class_precision(evaluation).items()}
        names = [str(truth.cats[category]["name"]) for category in evaluation.params.catIds]
        finished = Finished(
            run,
            json.loads((folder / "result.json").read_text()),
            {key: over_classes(rows) for key, rows in of_class.items()},
            dict(zip(names, of_class["AP"].T, strict=True)),
        )
        found.setdefault(row_of(run, runs), {})[run.seed] = finished
    return found


def row_of(run: Run, runs: Sequence[Run]) -> str:
    """The row of a pair's tables in which a run stands: its method, unless it is no method's.

    Args:
        run: one of them.
        runs: those of the pair.
    """
    if any(run == other.teacher for other in runs):
        return TEACHER
    if any(run == other.begins for other in runs):
        return BEGUN
    if run.begins is None and any(other.begins is not None for other in runs):
        return f"{LONGER}, {run.steps} steps"
    return run.method


def difference(
    method: Mapping[int, Finished], alone: Mapping[int, Finished], metric: str = "AP"
) -> tuple[list[float], float, float]:
    """What a method brings over the student alone with the same seed, and an interval of 95 % of the mean.

    The interval resamples the test images, the same for both, and the seeds: it says how much depends on
    either. With one seed it is that of the images alone.

    Returns:
        The differences seed by seed, and the interval's ends.
    """
    seeds = sorted(method.keys() & alone.keys())
    rows = np.stack([method[seed].metrics[metric] - alone[seed].metrics[metric] for seed in seeds])
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(seeds), size=(len(seeds), rows.shape[1] - 1))
    means = np.take_along_axis(rows[:, 1:], drawn, axis=0).mean(axis=0)
    low, high = np.nanquantile(means, (0.025, 0.975))
    return rows[:, 0].tolist(), float(low), float(high)


def write_report(
    name: str, question: str, runs: Sequence[Run], budget: Mapping[str, Any], options: Namespace
) -> None:
    """Writes ``NAME.md`` and ``NAME.png`` of what is done of a pair.

    Args:
        name: of the pair.
        question: its heading.
        runs: which are done, the teacher among them.
        budget: what was written down of the student alone.
        options: of the script.
    """
    found = read(runs, options)
    if ALONE not in found:
        print(f"{name}: no student alone is finished yet, so there is no table", flush=True)
        return
    parts = [
        f"# {question}",
        _about(found, budget),
        table(
            ["", "seeds", *METRICS, "AP over alone", "95 % of it", "minutes", "MB"],
            [_row(label, by_seed, found[ALONE]) for label, by_seed in found.items()],
        ),
        "Test split, mean ± standard deviation over seeds. Differences go seed by seed, their interval "
        f"is of {options.resamples} resamplings of images and seeds together, of images alone with one seed. "
        "Minutes are those of training, with whatever else the machine did meanwhile; MB is the peak of the "
        "process, on a GPU of the allocator.",
        *_of_classes(found),
        *_beside_crosskd(found),
        f"## Is the student alone flat?\n\n{_flatness(budget)}",
        f"![Learning curves, and every seed]({name}.png)",
    ]
    options.results.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(parts) + "\n"
    (options.results / f"{name}.md").write_text(text)
    draw(found, options.results / f"{name}.png")
    print(text, flush=True)


def _of_classes(found: Mapping[str, Mapping[int, Finished]]) -> list[str]:
    """A table of AP by class; of one class it would say the first one again."""
    names = list(next(iter(found[ALONE].values())).classes)
    if len(names) == 1:
        return []
    rows = [_class_row(label, by_seed, found[ALONE]) for label, by_seed in found.items()]
    return ["## AP of each class", table(["", *names], rows)]


def title(method: str) -> str:
    """What a method is called in tables."""
    if method in VARIANTS:
        return VARIANTS[method].label
    if method == BEGUN:
        return "the finished student"
    return method if method.startswith(LONGER) else label_of(method)


def _about(found: Mapping[str, Mapping[int, Finished]], budget: Mapping[str, Any]) -> str:
    alone = next(iter(found[ALONE].values()))
    run, result = alone.run, alone.result
    teacher = next((f.run.teacher for m in found.values() for f in m.values() if f.run.teacher), None)
    sees = {"pair": run.data.pair, "zoom": "images of twice the size"}
    of_teacher = ""
    if teacher is not None:
        seen = f", sees {sees[teacher.sees]}" if teacher.sees in sees else ""
        length = "as it is" if teacher.model.family == "nanodet_g" else f"{teacher.steps} steps"
        of_teacher = f" Teacher: {_model(teacher)}{seen}, {length}."
    labels = f", {100 * run.labelled:g} % of the labels" if run.labelled < 1 else ""
    crops = f"crops of {run.data.crop} pixels, {run.batch} a step, {budget['steps']} steps{labels}"
    student = f"Student: {_model(run)}, {result['parameters'] / 1e6:.1f} M."
    if run.begins is not None:
        own = any(f.run.begins != run.begins for f in found[ALONE].values())
        one = "Each seed goes on from one of its own" if own else "All go on from one"
        student += f" {one} that was trained alone for {run.begins.steps} steps."
    device = (
        f"{processor()}, {result['threads']} thread(s)" if result["device"] == "CPU" else result["device"]
    )
    machine = f"{device}, {result['versions']}."
    return f"{run.data.name}, {crops}. {student}{of_teacher} {machine}"


def _model(run: Run) -> str:
    model = run.model
    if model.family == "nanodet_g":
        return "NanoDet-g, trained on COCO"
    start = "ImageNet weights" if model.pretrained else "from scratch"
    finest = f", levels from stride {model.finest}" if model.finest != STRIDES[0] else ""
    return f"{model.family} on {model.backbone}, {start}{finest}"


def _row(label: str, by_seed: Mapping[int, Finished], alone: Mapping[int, Finished]) -> list[str]:
    runs = list(by_seed.values())
    cells = []
    for metric in METRICS:
        values = [float(run.metrics[metric][0]) for run in runs]
        cells.append("-" if np.isnan(values).any() else mean_and_deviation(values))
    gain = ["", ""] if label in (ALONE, *OTHERS) else _ahead(by_seed, alone)
    minutes = mean_and_deviation([run.result["seconds"] / 60 for run in runs])
    return [
        title(label),
        str(len(runs)),
        *cells,
        *gain,
        minutes,
        f"{max(r.result['memory'] for r in runs):.0f}",
    ]


def _ahead(method: Mapping[int, Finished], other: Mapping[int, Finished]) -> list[str]:
    """What a method brings over another, and its interval; nothing where they share no seed."""
    if not method.keys() & other.keys():
        return ["", ""]
    values, low, high = difference(method, other)
    each = f" ({', '.join(f'{value:+.1f}' for value in values)})" if len(values) > 1 else ""
    return [mean_and_deviation(values, "+") + each, f"{low:+.1f} to {high:+.1f}"]


def _beside_crosskd(found: Mapping[str, Mapping[int, Finished]]) -> list[str]:
    """A table of AP on the validation split, and of how far ahead of CrossKD each method is on test."""
    if CROSSKD not in found:
        return []
    rows = []
    for label, by_seed in found.items():
        if label not in OTHERS:
            validation = mean_and_deviation([run.result["val"]["AP"] for run in by_seed.values()])
            ahead = ["", ""] if label == CROSSKD else _ahead(by_seed, found[CROSSKD])
            rows.append([title(label), validation, *ahead])
    header = ["", "AP on val", "AP over CrossKD on test", "95 % of it"]
    return ["## Beside CrossKD", table(header, rows)]


def _class_row(label: str, by_seed: Mapping[int, Finished], alone: Mapping[int, Finished]) -> list[str]:
    cells = []
    for name in next(iter(by_seed.values())).classes:
        mean = statistics.mean(float(run.classes[name][0]) for run in by_seed.values())
        shared = sorted(by_seed.keys() & alone.keys())
        cell = f"{mean:.1f}"
        if label not in (ALONE, *OTHERS) and shared:
            gains = [float(by_seed[s].classes[name][0] - alone[s].classes[name][0]) for s in shared]
            cell += f" ({statistics.mean(gains):+.1f})"
        cells.append(cell)
    return [title(label), *cells]


def _flatness(budget: Mapping[str, Any]) -> str:
    """The ladder on which the budget was chosen."""
    rows, before = [], None
    for steps, value in budget["alone"].items():
        rows.append([steps, f"{value:.1f}", "" if before is None else f"{value - before:+.1f}"])
        before = value
    verdict = "" if budget["flat"] else " The ladder ended before it was flat."
    return (
        table(["steps", "AP on val", "than with half"], rows)
        + f"\n\nChosen before any method ran: {budget['steps']} steps (seeds {budget['seeds']}).{verdict}"
    )


def draw(found: Mapping[str, Mapping[int, Finished]], path: Path) -> None:
    """AP by step on the validation images of the curves, and every seed's AP on the test split."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from pictures import colours

    shown = [name for name in found if name not in OTHERS]
    order = sorted(shown, key=lambda name: _mean_precision(found[name]))
    colour = colours(shown)
    figure, (curves, finals) = plt.subplots(
        1, 2, figsize=(11, max(4.0, 1.3 + 0.34 * len(order))), layout="constrained", width_ratios=(1.2, 1)
    )
    for name in order:
        if name.startswith(LONGER):  # which would leave the others no room
            continue
        histories = [run.result["history"] for run in found[name].values()]
        points = list(zip(*histories, strict=False))
        means = [statistics.mean(entry["AP"] for entry in point) for point in points]
        width = 3 if name == ALONE else 1.5
        curves.plot([point[0]["step"] for point in points], means, lw=width, color=colour[name])
    _draw_test(finals, found, order, colour)
    curves.set(xlabel="step", ylabel="AP on some validation images", title="learning curves, alone thick")
    for axes, grid in ((curves, "y"), (finals, "x")):
        axes.grid(alpha=0.3, axis=grid)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_test(
    axes: Any, found: Mapping[str, Mapping[int, Finished]], order: Sequence[str], colour: Mapping[str, Any]
) -> None:
    alone = _mean_precision(found[ALONE])
    for place, name in enumerate(order):
        by_seed, style = found[name], {"color": colour[name]}
        if name != ALONE and by_seed.keys() & found[ALONE].keys():
            _, *ends = difference(by_seed, found[ALONE])
            axes.plot([alone + end for end in ends], [place] * 2, lw=7, alpha=0.25, **style)
        axes.plot(_mean_precision(by_seed), place, marker="|", ms=18, mew=2.5, **style)
        values = [float(run.metrics["AP"][0]) for run in by_seed.values()]
        axes.scatter(values, [place] * len(values), s=22, alpha=0.8, **style)
    for name, line in ((TEACHER, "--"), (BEGUN, ":")):
        for other in found.get(name, {}).values():
            axes.axvline(float(other.metrics["AP"][0]), color="#7f7f7f", ls=line, lw=1.2)
    dotted = ", finished student dotted" if BEGUN in found else ""
    axes.set_title(f"test: seeds, mean, 95 % of the gain,\nteacher dashed{dotted}", fontsize=10)
    axes.set_xlabel("AP")
    axes.set_yticks(range(len(order)), [title(name) for name in order])


def _mean_precision(by_seed: Mapping[int, Finished]) -> float:
    return statistics.mean(float(run.metrics["AP"][0]) for run in by_seed.values())
