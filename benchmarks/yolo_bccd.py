"""A YOLO alone, with ultralytics' own distillation and with CrossKD, one budget and several seeds, on BCCD.

Every run is an ordinary training of ultralytics' in a folder and a process of its own: one that was finished
is not repeated, one that was killed goes on after its last epoch. So the command can be stopped at any time
and given again::

    python benchmarks/yolo_bccd.py --root data/bccd

``--root`` holds ``images`` and ``annotations/{train,val,test}.json``. Everything is trained from scratch on
the training split and reported, after the last epoch, on the test split; ``--split val`` reports on the
validation split instead, which is for choosing settings. Needs ``pip install crosskd[ultralytics]``, see
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
import time
from pathlib import Path
from typing import Any

from measure import processor

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
    import torch
    from ultralytics import YOLO

    if one["threads"]:
        torch.set_num_threads(one["threads"])
    folder = Path(one["folder"])
    further: dict[str, Any] = {}
    if one["method"] == "builtin":
        further["distill_model"] = one["teacher"]
    if one["method"] == "crosskd":
        from crosskd.adapters.ultralytics import trainer

        further["trainer"] = trainer(teacher=one["teacher"])
    last = folder / "weights" / "last.pt"
    yolo = YOLO(last if last.exists() else one["model"])
    note_costs(yolo, folder / "costs.jsonl", one["settings"]["device"])
    if last.exists():
        if yolo.ckpt["epoch"] >= 0:  # else it was killed between its last epoch and metrics.json
            yolo.train(resume=True, device=one["settings"]["device"], **further)
    else:
        yolo.train(**one["settings"], **further, project=str(folder.parent), name=folder.name, exist_ok=True)
    settings = {name: one["settings"][name] for name in ("data", "imgsz", "batch", "device")}
    found = YOLO(last).val(**settings, split=one["split"], plots=False, verbose=False).box
    costs = [json.loads(line) for line in (folder / "costs.jsonl").read_text().splitlines()]
    metrics = {
        **{
            name: 100 * float(value)
            for name, value in zip(COLUMNS, (found.map, found.map50, found.map75), strict=True)
        },
        "seconds": statistics.median(epoch["seconds"] for epoch in costs),
        "mebibytes": max(epoch["mebibytes"] for epoch in costs),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))


def note_costs(yolo: Any, path: Path, device: str) -> None:
    """Writes down each epoch's training time and the peak of memory, so that they outlive the process."""
    started = [0.0]

    def start(trainer: Any) -> None:
        started[0] = time.perf_counter()

    def end(trainer: Any) -> None:
        entry = {"seconds": time.perf_counter() - started[0], "mebibytes": peak_mebibytes(device)}
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


def mean_and_deviation(values: list[float], digits: int = 1) -> str:
    """As it stands in a table."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(results: dict[str, list[dict[str, float]]], options: argparse.Namespace, command: str) -> str:
    """The results as Markdown, with everything needed to repeat them."""
    import torch
    import ultralytics

    import crosskd

    names = {"teacher": f"teacher ({options.teacher})", **METHODS}
    heading = ("", "seeds", *COLUMNS, "seconds an epoch", "peak memory, MiB")
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for name, runs in results.items():
        cells = [mean_and_deviation([one[column] for one in runs]) for column in (*COLUMNS, "seconds")]
        peak = max(one["mebibytes"] for one in runs)
        lines.append(f"| {names[name]} | {len(runs)} | {' | '.join(cells)} | {peak:.0f} |")
    gains = paired_gains(results)
    memory = "the process's" if options.device == "cpu" else "CUDA's"
    return "\n".join(
        [
            f"BCCD {options.split} split, {options.student} from {options.teacher}, all from scratch, images "
            f"of {options.size} pixels, batches of {options.batch_size}, {options.epochs} epochs (teacher "
            f"{options.teacher_epochs}); after the last epoch; mean ± standard deviation over seeds. "
            f"Seconds: the median epoch's training alone. Memory: {memory}, the highest of all seeds.",
            "",
            *lines,
            "",
            *([gains, ""] if gains else []),
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


def paired_gains(results: dict[str, list[dict[str, float]]]) -> str:
    """CrossKD's AP over the others' with the same seed."""
    gains = []
    for other, label in METHODS.items():
        if other != "crosskd" and other in results and "crosskd" in results:
            pairs = zip(results["crosskd"], results[other], strict=True)
            gains.append(
                f"{mean_and_deviation([ours['AP'] - its['AP'] for ours, its in pairs])} AP over {label}"
            )
    return "Seed by seed CrossKD is ahead by " + " and by ".join(gains) + "." if gains else ""


def main(arguments: list[str] | None = None) -> None:
    """Runs everything that has not been run yet, then writes the table."""
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
    print(text)


if __name__ == "__main__":
    main()
