"""The student alone, mimicking and CrossKD with one budget and several seeds, on the BCCD blood cells.

Every run is an ordinary run of ``examples/train_torchvision.py`` in a folder of its own: one that was
finished is not repeated, one that was killed goes on after its last epoch. So the command can be stopped
at any time and given again::

    python benchmarks/bccd.py --root data/bccd

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

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "examples" / "train_torchvision.py"
METHODS = {"none": "student alone", "mimic": "prediction mimicking", "crosskd": "CrossKD"}
COLUMNS = ("AP", "AP50", "AP75")


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
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
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
    return parser.parse_known_args(arguments)


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
        jobs.append(("crosskd_pre", options.output / f"crosskd_pre_seed{seed}", arguments))
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


def table(results: dict[str, list[dict[str, Any]]], options: argparse.Namespace, command: str) -> str:
    """The results as Markdown, with everything needed to repeat them."""
    names = {"teacher": f"teacher ({options.teacher})", **METHODS, "crosskd_pre": 'CrossKD, tap="pre"'}
    lines = [f"| {' | '.join(('', 'seeds', *COLUMNS))} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, runs in results.items():
        metrics = [final(run) for run in runs]
        cells = [mean_and_deviation([m[column] for m in metrics]) for column in COLUMNS]
        lines.append(f"| {names[name]} | {len(runs)} | {' | '.join(cells)} |")
    gains = paired_gains(results)
    versions = results["teacher"][0]["versions"]
    about = [
        f"BCCD {options.split} split, {options.student} from {options.teacher}, all from scratch, short side "
        f"{options.short_side} pixels, towers of {options.width} channels, {options.epochs} epochs (teacher "
        f"{options.teacher_epochs}); mean ± standard deviation over seeds.",
        "",
        *lines,
        "",
        *([gains, ""] if gains else []),
        "Made by",
        "",
        f"    {command}",
        "",
        f"on {os.cpu_count()} cores of {processor()} with "
        + ", ".join(f"{k} {v}" for k, v in versions.items() if k not in ("device", "processes")),
        f"(seeds {', '.join(map(str, options.seeds))}).",
    ]
    return "\n".join(about) + "\n"


def paired_gains(results: dict[str, list[dict[str, Any]]]) -> str:
    """CrossKD's AP over the others' with the same seed."""
    if "crosskd" not in results:
        return ""
    own = [final(run)["AP"] for run in results["crosskd"]]
    parts = []
    for other, label in METHODS.items():
        if other != "crosskd" and other in results:
            differences = [a - final(run)["AP"] for a, run in zip(own, results[other], strict=True)]
            parts.append(f"{mean_and_deviation(differences)} AP over {label}")
    return "Seed by seed CrossKD is ahead by " + " and by ".join(parts) + "." if parts else ""


def draw(results: dict[str, list[dict[str, Any]]], path: Path, options: argparse.Namespace) -> None:
    """Validation AP by epoch, the mean over seeds and their range, and the final AP of every seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"none": "#1f77b4", "mimic": "#ff7f0e", "crosskd": "#d62728"}
    figure, (curves, finals) = plt.subplots(
        1, 2, figsize=(10, 4), layout="constrained", width_ratios=(1.5, 1)
    )
    for place, (name, label) in enumerate(METHODS.items()):
        if name not in results:
            continue
        histories = [run["histories"][name] for run in results[name]]
        evaluated = [[entry for entry in history if "metrics" in entry] for history in histories]
        epochs = [entry["epoch"] for entry in evaluated[0]]
        values = [[entry["metrics"]["AP"] for entry in history] for history in evaluated]
        columns = list(zip(*values, strict=True))
        curves.plot(
            epochs, [statistics.mean(c) for c in columns], marker="o", ms=4, color=colours[name], label=label
        )
        curves.fill_between(
            epochs, [min(c) for c in columns], [max(c) for c in columns], color=colours[name], alpha=0.15
        )
        last = [final(run)["AP"] for run in results[name]]
        finals.bar(place, statistics.mean(last), color=colours[name], alpha=0.35, width=0.65)
        finals.scatter([place] * len(last), last, color=colours[name], zorder=3, s=22)
    teacher = final(results["teacher"][0])["AP"]
    for axes in (curves, finals):
        axes.axhline(teacher, color="#7f7f7f", ls="--", lw=1.2, label=f"teacher ({teacher:.1f})")
        axes.grid(alpha=0.3, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
    curves.set(
        xlabel="epoch",
        ylabel=f"AP on BCCD {options.split}",
        title=f"{options.student} from {options.teacher}",
    )
    curves.legend(frameon=False)
    finals.set(title="after the last epoch, every seed", ylabel="AP")
    finals.set_xticks(range(len(METHODS)), [label.replace(" ", "\n") for label in METHODS.values()])
    finals.margins(y=0.15)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_pictures(results: dict[str, list[dict[str, Any]]], path: Path, options: argparse.Namespace) -> None:
    """Detections of the teacher and of the first seed's students, side by side."""
    sys.path.insert(0, str(SCRIPT.parent))
    import torch
    from coco_data import CocoFolder
    from models import build_detector, load_weights
    from pictures import draw_detections

    data = CocoFolder(options.root / "images", options.root / "annotations" / f"{options.split}.json")
    files = {"teacher": options.output / "teacher" / "none.pt"}
    for method in options.methods:
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
