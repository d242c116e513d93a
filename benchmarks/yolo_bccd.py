"""A YOLO alone, with ultralytics' own distillation and with CrossKD, one budget and several seeds, on BCCD.

Every run is an ordinary training of ultralytics' in a folder and a process of its own: one that was finished
is not repeated, one that was killed goes on after its last epoch. So the command can be stopped at any time
and given again::

    python benchmarks/yolo_bccd.py --root data/bccd

``--root`` holds ``images`` and ``annotations/{train,val,test}.json``. Everything is trained from scratch on
the training split and reported, after the last epoch, on the test split; ``--split val`` reports on the
validation split instead, which is for choosing settings. Needs ``pip install '.[ultralytics]'``, see
docs/yolo.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import CLOCKS, mean_and_deviation, processor

REPOSITORY = Path(__file__).resolve().parent.parent
METHODS = {"none": "student alone", "builtin": "ultralytics' `distill_model=`", "crosskd": "CrossKD"}
COLUMNS = ("AP", "AP50", "AP75")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--root", type=Path, required=True, help="folder of the data")
    parser.add_argument("--output", type=Path, default=Path("runs/yolo_bccd"))
    parser.add_argument(
        "--results", type=Path, default=REPOSITORY / "benchmarks" / "results" / "yolo_bccd.md"
    )
    parser.add_argument("--split", choices=("val", "test"), default="test", help="what is reported on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--teacher", default="yolo11s", help="a yaml of ultralytics'")
    parser.add_argument("--student", default="yolo11n")
    parser.add_argument("--size", type=int, default=160, help="pixels of an image's longer side")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--teacher-epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the training images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a run; 0 for as many as cores")
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="cpu: the seconds that the process worked, to be used with --threads 1 where others work too",
    )
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)  # the settings of one run's process
    return parser.parse_args(arguments)


# -- data -----------------------------------------------------------------------------------------


def as_yolo_rows(annotations: list[dict[str, Any]], image: dict[str, Any]) -> list[str]:
    """An image's objects as ultralytics reads them: class, and the box's centre and size as fractions."""
    width, height = image["width"], image["height"]
    rows = []
    for one in annotations:
        x, y, w, h = one["bbox"]
        numbers = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
        rows.append(" ".join([str(one["category_id"] - 1), *(f"{number:.6f}" for number in numbers)]))
    return rows


def convert(root: Path, folder: Path) -> Path:
    """Writes the splits as ultralytics wants them, the images as links; the file that describes them."""
    names: list[str] = []
    for split in ("train", "val", "test"):
        coco = json.loads((root / "annotations" / f"{split}.json").read_text())
        names = [one["name"] for one in sorted(coco["categories"], key=lambda one: one["id"])]
        by_image: dict[int, list[dict[str, Any]]] = {}
        for one in coco["annotations"]:
            by_image.setdefault(one["image_id"], []).append(one)
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for image in coco["images"]:
            link = folder / "images" / split / image["file_name"]
            if not link.exists():
                link.symlink_to((root / "images" / image["file_name"]).resolve())
            rows = as_yolo_rows(by_image.get(image["id"], []), image)
            (folder / "labels" / split / link.name).with_suffix(".txt").write_text("\n".join(rows) + "\n")
    splits = [f"{split}: images/{split}" for split in ("train", "val", "test")]
    file = folder / "data.yaml"
    file.write_text("\n".join([f"path: {folder.resolve()}", *splits, f"names: {json.dumps(names)}"]) + "\n")
    return file


# -- one run, in a process of its own -------------------------------------------------------------


def peak_mebibytes(device: str) -> float:
    """Of the process so far: what CUDA allocated, or all of its memory on a CPU."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes / (2**20 if platform.system() == "Darwin" else 2**10)


def train_one(one: dict[str, Any]) -> None:
    """Trains, or goes on, and writes metrics.json."""
    from ultralytics import YOLO

    folder = Path(one["folder"])
    further: dict[str, Any] = {}
    if one["method"] == "builtin":
        further["distill_model"] = one["teacher"]
    if one["method"] == "crosskd":
        from crosskd.integrations.ultralytics import trainer

        further["trainer"] = trainer(teacher=one["teacher"])
    last = folder / "weights" / "last.pt"
    yolo = YOLO(last if last.exists() else one["model"])
    set_threads(yolo, one["threads"])
    note_costs(yolo, folder / "costs.jsonl", one["settings"]["device"])
    place = {"project": str(folder.parent), "exist_ok": True}
    if last.exists():
        if yolo.ckpt["epoch"] >= 0:  # else it was killed between its last epoch and metrics.json
            yolo.train(resume=True, device=one["settings"]["device"], **further)
    else:
        yolo.train(**one["settings"], **further, **place, name=folder.name)
    settings = {name: one["settings"][name] for name in ("data", "imgsz", "batch", "device")}
    reported = {"split": one["split"], "plots": False, "verbose": False, "name": f"{folder.name}/reported"}
    found = YOLO(last).val(**settings, **reported, **place).box
    costs = [json.loads(line) for line in (folder / "costs.jsonl").read_text().splitlines()]
    metrics = {
        **{
            name: 100 * float(value)
            for name, value in zip(COLUMNS, (found.map, found.map50, found.map75), strict=True)
        },
        **{clock: statistics.median(epoch[clock] for epoch in costs) for clock in CLOCKS},
        "mebibytes": max(epoch["mebibytes"] for epoch in costs),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))


def set_threads(yolo: Any, threads: int) -> None:
    """Sets the CPU threads once training starts: before, ultralytics sets its own number."""

    def start(trainer: Any) -> None:
        import torch

        torch.set_num_threads(threads)

    if threads:
        yolo.add_callback("on_train_start", start)


def note_costs(yolo: Any, path: Path, device: str) -> None:
    """Writes down each epoch's training time and the peak of memory, so that they outlive the process."""
    import torch

    started: dict[str, float] = {}

    def start(trainer: Any) -> None:
        started.update({name: now() for name, now in CLOCKS.items()})

    def end(trainer: Any) -> None:
        seconds = {name: now() - started[name] for name, now in CLOCKS.items()}
        entry = {**seconds, "mebibytes": peak_mebibytes(device), "threads": torch.get_num_threads()}
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    yolo.add_callback("on_train_epoch_start", start)
    yolo.add_callback("on_train_epoch_end", end)


# -- all of them ----------------------------------------------------------------------------------


def run(
    options: argparse.Namespace, data: Path, name: str, method: str, model: str, epochs: int, seed: int
) -> Any:
    """One run in a process of its own, unless its metrics are there already."""
    folder = options.output.resolve() / name
    metrics = folder / "metrics.json"
    if metrics.exists():
        return json.loads(metrics.read_text())
    settings = {
        "data": str(data.resolve()),
        "imgsz": options.size,
        "epochs": epochs,
        "batch": options.batch_size,
        "nbs": options.batch_size,  # a step for each batch: by default ultralytics would take 3 an epoch
        "device": options.device,
        "seed": seed,
        "fraction": options.fraction,
        "pretrained": False,
        "val": False,
        "plots": False,
        "workers": 0,
    }
    one = {
        "folder": str(folder),
        "method": method,
        "model": f"{model}.yaml",
        "teacher": str(options.output.resolve() / "teacher" / "weights" / "last.pt"),
        "split": options.split,
        "threads": options.threads,
        "settings": settings,
    }
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, __file__, "--root", str(options.root), "--one", json.dumps(one)]
    with (folder / "log.txt").open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"a run failed, see {folder / 'log.txt'}")
    print(f"{name}: done", flush=True)
    return json.loads(metrics.read_text())


def run_all(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """The teacher, then all students; by method, one entry a seed."""
    data = convert(options.root, options.output / "data")
    results = {"teacher": [run(options, data, "teacher", "none", options.teacher, options.teacher_epochs, 0)]}
    for seed in options.seeds:
        for method in options.methods:
            found = run(options, data, f"{method}_seed{seed}", method, options.student, options.epochs, seed)
            results.setdefault(method, []).append(found)
    return results


def table(results: dict[str, list[dict[str, float]]], options: argparse.Namespace, command: str) -> str:
    """The results as Markdown, with everything needed to repeat them."""
    import torch
    import ultralytics

    import crosskd

    names = {"teacher": f"teacher ({options.teacher})", **METHODS}
    heading = ("", "seeds", *COLUMNS, "seconds an epoch", "peak memory, MiB")
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for name, runs in results.items():
        cells = [mean_and_deviation([one[column] for one in runs]) for column in (*COLUMNS, options.clock)]
        peak = max(one["mebibytes"] for one in runs)
        lines.append(f"| {names[name]} | {len(runs)} | {' | '.join(cells)} | {peak:.0f} |")
    clock = {"wall": "by the wall clock", "cpu": "in seconds that the process worked"}[options.clock]
    memory = "the process's" if options.device == "cpu" else "CUDA's"
    return "\n".join(
        [
            f"BCCD {options.split} split, {options.student} from {options.teacher}, all from scratch, images "
            f"of {options.size} pixels, a step for each batch of {options.batch_size}, {options.epochs} "
            f"epochs (teacher {options.teacher_epochs}); after the last epoch; AP as ultralytics computes "
            "it; mean ± standard deviation over seeds. Seconds: the median epoch's training alone, "
            f"{clock}. Memory: {memory} peak in training, the highest of all seeds.",
            "",
            *lines,
            "",
            *paired_differences(results, options.clock),
            "Made by",
            "",
            f"    {command}",
            "",
            f"on {os.cpu_count()} cores of {processor()} with crosskd {crosskd.__version__}, ultralytics "
            f"{ultralytics.__version__}, torch {torch.__version__}, python {platform.python_version()} "
            f"(seeds {', '.join(map(str, options.seeds))}).",
            "",
        ]
    )


def paired_differences(results: dict[str, list[dict[str, float]]], clock: str) -> list[str]:
    """Each distillation against the others with the same seed, a line each: AP in points, time as a ratio."""
    lines = []
    for method, other in (("builtin", "none"), ("crosskd", "none"), ("crosskd", "builtin")):
        if method not in results or other not in results:
            continue
        pairs = list(zip(results[method], results[other], strict=True))
        differences = [ours["AP"] - its["AP"] for ours, its in pairs]
        each = ", ".join(f"{difference:+.1f}" for difference in differences)
        mean = mean_and_deviation(differences, sign="+")
        times = mean_and_deviation([ours[clock] / its[clock] for ours, its in pairs])
        names = f"{METHODS[method]} against {METHODS[other]}"
        lines.append(f"- {names}: {mean} AP ({each}), {times} times the seconds")
    return ["Seed by seed:", "", *lines, ""] if lines else []


def draw(results: dict[str, list[dict[str, float]]], path: Path, options: argparse.Namespace) -> None:
    """The AP of every seed and their mean, and the seconds an epoch, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [name for name in METHODS if name in results]
    colours = {"none": "#1f77b4", "builtin": "#ff7f0e", "crosskd": "#d62728"}
    figure, both = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    teacher = results["teacher"][0]["AP"]
    precision = f"AP on BCCD {options.split} (dashed: the teacher, {teacher:.1f})"
    halves = (("AP", precision), (options.clock, "seconds an epoch"))
    for axes, (column, title) in zip(both, halves, strict=True):
        for place, name in enumerate(shown):
            values = [one[column] for one in results[name]]
            axes.bar(place, statistics.mean(values), color=colours[name], alpha=0.35, width=0.65)
            axes.scatter([place] * len(values), values, color=colours[name], zorder=3, s=22)
        axes.set_xticks(range(len(shown)), [METHODS[name].replace("`", "") for name in shown], fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
    both[0].axhline(teacher, color="#7f7f7f", ls="--", lw=1.2)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Runs everything that has not been run yet, then writes the table and the figure."""
    options = parse(arguments)
    if options.one is not None:
        train_one(options.one)
        return
    results = run_all(options)
    given = list(sys.argv[1:] if arguments is None else arguments)
    hidden = {"--root", "--output", "--results"}
    rest = [
        part for k, part in enumerate(given) if part not in hidden and (k == 0 or given[k - 1] not in hidden)
    ]
    text = table(results, options, " ".join(["python benchmarks/yolo_bccd.py --root data/bccd", *rest]))
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(text)
    draw(results, options.results.with_suffix(".png"), options)
    print(text)


if __name__ == "__main__":
    main()
