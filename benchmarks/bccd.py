"""Methods with one budget and several seeds, on the BCCD blood cells: a table, curves and detections.

Every run is an ordinary run of ``examples/train_torchvision.py`` in a folder of its own: one that was
finished is not repeated, one that was killed goes on after its last epoch. So the command can be stopped
at any time and given again::

    python benchmarks/bccd.py --root data/bccd
    python benchmarks/bccd.py --root data/bccd --methods none crosskd pkd crosskd+pkd none+inherit fgd+inherit

``--root`` holds ``images`` and ``annotations/{train,val,test}.json``. The teacher is trained on the
training split; students are trained on it too and reported on the test split. ``--split val`` reports on
the validation split instead, which is for choosing settings.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measure import mean_and_deviation, processor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from methods_table import ALONE, METHODS, check_name, label_of

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "examples" / "train_torchvision.py"
COLUMNS = ("AP", "AP50", "AP75")
BEFORE = "crosskd_pre"  # CrossKD that taps features in front of the block's activation
PICTURED = 3  # so many methods' detections are drawn beside the student's alone


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Options of this script, and the rest, which goes to the training script as it is."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any other option goes to examples/train_torchvision.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--root", type=Path, required=True, help="folder of the data")
    parser.add_argument("--output", type=Path, default=Path("runs/bccd"))
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results" / "bccd")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="what is reported on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        default=[ALONE, "mimic", "crosskd"],
        help=f"{ALONE}, {', '.join(METHODS)}, several joined by +, and any of them with +inherit",
    )
    parser.add_argument("--ablate-tap", type=int, nargs="*", default=[0], help='seeds to run tap="pre" with')
    parser.add_argument("--teacher", default="retinanet_resnet50")
    parser.add_argument("--student", default="retinanet_resnet18")
    parser.add_argument("--short-side", type=int, default=240, help="pixels")
    parser.add_argument("--width", type=int, default=256, help="channels of pyramid and towers")
    parser.add_argument("--anchor-scale", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--teacher-epochs", type=int, default=36)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs side by side, with one thread each if above 1"
    )
    options, further = parser.parse_known_args(arguments)
    try:
        for name in options.methods:
            check_name(name)
    except ValueError as error:
        parser.error(f"--methods: {error}")
    if "--inherit" in further:
        parser.error("--inherit would be for all students: write METHOD+inherit for those that it is for")
    return options, further


def training_arguments(options: argparse.Namespace, further: list[str]) -> list[str]:
    """What all runs have in common."""
    images = str(Path("images"))
    settings: dict[str, Any] = {
        "data": "coco",
        "root": options.root,
        "train-images": images,
        "train-annotations": "annotations/train.json",
        "val-images": images,
        "val-annotations": f"annotations/{options.split}.json",
        "teacher": options.teacher,
        "student": options.student,
        "short-side": options.short_side,
        "width": options.width,
        "anchor-scale": options.anchor_scale,
        "batch-size": options.batch_size,
        "learning-rate": options.learning_rate,
        "optimizer": "adamw",
        "weight-decay": 0.02,
        "schedule": "cosine",
        "warmup-steps": 50,
        "clip": 5,
        "workers": 0,
    }
    named = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    threads = ["--threads", "1"] if options.jobs > 1 else []
    return [*named, "--channels-last", "--resume", *threads, *further]


def train(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """One run of the training script, unless its metrics are there already."""
    metrics = folder / "metrics.json"
    if not metrics.exists():
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        with (folder / "log.txt").open("a") as log:
            command = [sys.executable, str(SCRIPT), *arguments, "--output", str(folder)]
            done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"a run failed, see {folder / 'log.txt'}")
        print(f"{folder.name}: done", flush=True)
    return dict(json.loads(metrics.read_text()))


def run_all(options: argparse.Namespace, further: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The teacher, then all students; by name, one entry a seed."""
    common = training_arguments(options, further)
    epochs = ["--epochs", str(options.teacher_epochs), "--student", options.teacher]
    teacher = train(
        options.output / "teacher", [*common, "--method", "none", *epochs, "--evaluate-every", "6"]
    )
    weights = ["--teacher-weights", str(options.output / "teacher" / "none.pt")]
    jobs: list[tuple[str, Path, list[str]]] = []
    for seed in options.seeds:
        for method in options.methods:
            jobs.append(
                (method, options.output / f"{method}_seed{seed}", ["--method", method, "--seed", str(seed)])
            )
    for seed in options.ablate_tap if "crosskd" in options.methods else ():
        arguments = ["--method", "crosskd", "--tap", "pre", "--seed", str(seed)]
        jobs.append((BEFORE, options.output / f"{BEFORE}_seed{seed}", arguments))
    students = ["--epochs", str(options.epochs), "--evaluate-every", "2"]
    results: dict[str, list[dict[str, Any]]] = {"teacher": [teacher]}
    with ThreadPoolExecutor(options.jobs) as pool:
        started = [
            (name, pool.submit(train, folder, [*common, *weights, *students, *arguments]))
            for name, folder, arguments in jobs
        ]
        for name, job in started:
            results.setdefault(name, []).append(job.result())
    return results


# ---------------------------------------------------------------------------------------------


def final(run: dict[str, Any]) -> dict[str, float]:
    """The metrics of the model that a run trained."""
    return dict(next(value for name, value in run["results"].items() if name != "teacher"))


def history(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The epochs of the model that a run trained."""
    return list(next(value for name, value in run["histories"].items() if name != "teacher"))


def table(results: dict[str, list[dict[str, Any]]], options: argparse.Namespace, command: str) -> str:
    """The results as Markdown, with everything needed to repeat them."""
    names = {name: label_of(name) for name in results}
    names |= {"teacher": f"teacher ({options.teacher})", BEFORE: 'CrossKD, tap="pre"'}
    others = [other for other in (ALONE, "crosskd") if other in results and len(results) > 2]
    header = ["", "seeds", *COLUMNS, *(f"AP over {names[other]}" for other in others), "CPU minutes"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, runs in results.items():
        metrics = [final(run) for run in runs]
        cells = [mean_and_deviation([m[column] for m in metrics]) for column in COLUMNS]
        cells += [gain(results, name, other) for other in others]
        lines.append(f"| {names[name]} | {len(runs)} | {' | '.join(cells)} | {minutes(runs)} |")
    versions = results["teacher"][0]["versions"]
    about = [
        f"BCCD {options.split} split, {options.student} from {options.teacher}, all from scratch, short side "
        f"{options.short_side} pixels, towers of {options.width} channels, {options.epochs} epochs (teacher "
        f"{options.teacher_epochs}); mean ± standard deviation over seeds; differences are taken seed "
        "by seed. Minutes are those of training alone.",
        "",
        *lines,
        "",
        "Made by",
        "",
        f"    {command}",
        "",
        f"on {os.cpu_count()} cores of {processor()} with "
        + ", ".join(f"{k} {v}" for k, v in versions.items() if k not in ("device", "processes")),
        f"(seeds {', '.join(map(str, options.seeds))}).",
    ]
    return "\n".join(about) + "\n"


def gain(results: dict[str, list[dict[str, Any]]], name: str, other: str) -> str:
    """How far a method's AP is above another's with the same seed; empty where they share no seeds."""
    if name in (other, "teacher") or len(results[name]) != len(results[other]):
        return ""
    pairs = zip(results[name], results[other], strict=True)
    return mean_and_deviation([final(run)["AP"] - final(base)["AP"] for run, base in pairs], sign="+")


def minutes(runs: list[dict[str, Any]]) -> str:
    """How long the processor worked on a training; empty where a run didn't write it down."""
    seconds = [[entry.get("cpu_seconds") for entry in history(run)] for run in runs]
    if any(value is None for run in seconds for value in run):
        return ""
    return mean_and_deviation([sum(run) / 60 for run in seconds])


def draw(results: dict[str, list[dict[str, Any]]], path: Path, options: argparse.Namespace) -> None:
    """AP by epoch, the mean over seeds, and the final AP of every seed, the best method on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from pictures import colours

    names = sorted(_drawn(results), key=lambda name: mean_ap(results[name]))
    colour = colours(_drawn(results))
    height = max(4.0, 1.3 + 0.34 * len(names))
    figure, (curves, finals) = plt.subplots(
        1, 2, figsize=(11, height), layout="constrained", width_ratios=(1.2, 1)
    )
    for place, name in enumerate(names):
        evaluated = [[entry for entry in history(run) if "metrics" in entry] for run in results[name]]
        epochs = [entry["epoch"] for entry in evaluated[0]]
        columns = list(zip(*([e["metrics"]["AP"] for e in entries] for entries in evaluated), strict=True))
        means = [statistics.mean(column) for column in columns]
        curves.plot(epochs, means, marker="o", ms=4, lw=1.5, color=colour[name])
        if len(names) <= 4:  # more ranges would cover one another
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            curves.fill_between(epochs, low, high, color=colour[name], alpha=0.15)
        last = [final(run)["AP"] for run in results[name]]
        finals.plot(mean_ap(results[name]), place, marker="|", ms=18, mew=2.5, color=colour[name])
        finals.scatter(last, [place] * len(last), color=colour[name], s=22, alpha=0.8)
    teacher = final(results["teacher"][0])["AP"]
    line = {"color": "#7f7f7f", "ls": "--", "lw": 1.2, "label": f"teacher ({teacher:.1f})"}
    curves.axhline(teacher, **line)
    finals.axvline(teacher, **line)
    for axes, grid in ((curves, "y"), (finals, "x")):
        axes.grid(alpha=0.3, axis=grid)
        axes.spines[["top", "right"]].set_visible(False)
    curves.set(xlabel="epoch", ylabel=f"AP on BCCD {options.split}, mean over seeds")
    curves.set_title(f"{options.student} from {options.teacher}")
    curves.set_xticks(epochs)
    curves.legend(frameon=False, loc="lower right")
    finals.set(title="last epoch: every seed, and the mean", xlabel="AP")
    finals.set_yticks(range(len(names)), [label_of(name) for name in names])
    for tick, name in zip(finals.get_yticklabels(), names, strict=True):
        tick.set_color(colour[name])
    finals.margins(y=0.5 / len(names))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _drawn(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    return [name for name in results if name not in ("teacher", BEFORE)]


def mean_ap(runs: list[dict[str, Any]]) -> float:
    """The final AP, averaged over seeds."""
    return statistics.mean(final(run)["AP"] for run in runs)


def draw_pictures(results: dict[str, list[dict[str, Any]]], path: Path, options: argparse.Namespace) -> None:
    """Detections of the teacher and of the first seed's students, side by side: alone, and the best."""
    import torch
    from coco_data import CocoFolder
    from models import build_detector, load_weights
    from pictures import draw_detections

    data = CocoFolder(options.root / "images", options.root / "annotations" / f"{options.split}.json")
    files = {"teacher": options.output / "teacher" / "none.pt"}
    best = sorted(_drawn(results), key=lambda name: -mean_ap(results[name]))
    chosen = {ALONE, *[name for name in best if name != ALONE][:PICTURED]}
    for method in (name for name in options.methods if name in chosen):
        files[method] = options.output / f"{method}_seed{options.seeds[0]}" / f"{method}.pt"
    detectors: dict[str, torch.nn.Module] = {}
    for name, file in files.items():
        settings = results[name][0]["options"]
        detector = build_detector(
            options.teacher if name == "teacher" else options.student,
            data.num_classes,
            width=options.width,
            head_norm=settings["head_norm"],
            anchor_scale=options.anchor_scale,
            short_side=[options.short_side],
        )
        load_weights(detector, file)
        detectors[name] = detector
    draw_detections(detectors, data, path, device=torch.device("cpu"), images=3)


def main(arguments: list[str] | None = None) -> None:
    """Runs everything that has not been run yet, then writes table, figure and pictures."""
    options, further = parse(arguments)
    results = run_all(options, further)
    shown = ["--root", "data/bccd"]
    given = list(sys.argv[1:] if arguments is None else arguments)
    hidden = {"--root", "--output", "--results", "--jobs"}
    rest = [
        part for k, part in enumerate(given) if part not in hidden and (k == 0 or given[k - 1] not in hidden)
    ]
    text = table(results, options, " ".join(["python benchmarks/bccd.py", *shown, *rest]))
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.with_suffix(".md").write_text(text)
    draw(results, options.results.with_suffix(".png"), options)
    draw_pictures(results, options.results.with_name(f"{options.results.name}_detections.png"), options)
    print(text)


if __name__ == "__main__":
    main()
