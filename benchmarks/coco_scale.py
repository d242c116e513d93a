"""What a data set of COCO's size costs: start-up, memory of every process, reading, evaluation.

It makes annotations as many and as long as COCO's, polygons included, whose images are a few files under many
names, and measures `examples/train_torchvision.py`'s own functions on them, each in a new process. With
``--before`` those of another version take turns with the present ones.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from PIL import Image

CLASSES = 80
IMAGES = 16  # distinct files
SIZES = ((640, 480), (640, 427), (480, 640), (500, 375))  # width and height; COCO's most frequent ones
PER_IMAGE = 7.27  # COCO's mean number of annotations
CROWDS = 0.012  # COCO's share of crowds
NUMBERS = 55  # the mean length of a polygon that brings annotations to COCO's 520 bytes
NEED = (
    58  # images/s of an H100: batch 8, R50 from R101, compiled, bfloat16, 137 ms (step_cost_h100_compiled.md)
)

# -- the data -------------------------------------------------------------------------------------


def make_data(root: Path, records: int, val: int, seed: int) -> None:
    """Writes COCO's folders and files, unless they are there.

    Args:
        root: for ``train2017``, ``val2017`` and ``annotations``.
        records: how many training images there are.
        val: how many validation images.
        seed: of pixels and boxes.
    """
    random = np.random.default_rng(seed)
    for split, count in (("train", records), ("val", val)):
        folder, path = root / f"{split}2017", root / f"annotations/instances_{split}2017.json"
        if path.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(IMAGES):
            width, height = SIZES[number % len(SIZES)]
            rough = random.integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
            image = Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)
            image.save(folder / f"{number:012d}.jpg", quality=95)
        path.parent.mkdir(exist_ok=True)
        path.write_text(annotations(count, random))


def annotations(count: int, random: np.random.Generator) -> str:
    """A JSON file in COCO form, as long as COCO's of so many images."""
    images = []
    for number in range(1, count + 1):
        width, height = SIZES[number % len(SIZES)]
        name = f"{number % IMAGES:012d}.jpg"
        images.append(
            f'{{"license": 4,"file_name": "{name}","coco_url": "http://images.cocodataset.org/train2017/{name}",'
            f'"height": {height},"width": {width},"date_captured": "2013-11-14 11:18:45",'
            f'"flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg","id": {number}}}'
        )
    shapes = [
        json.dumps(random.uniform(0, 640, n).round(2).tolist())
        for n in 2 * random.integers(4, NUMBERS - 4, 999)
    ]
    runs = json.dumps({"counts": random.integers(0, 99, 500).tolist(), "size": [480, 640]})
    boxes = []
    for image, extent in enumerate(random.poisson(PER_IMAGE, count), 1):
        width, height = SIZES[image % len(SIZES)]
        for x, y, w, h, chance in (random.uniform(0, 1, (extent, 5)) ** (1, 1, 2, 2, 1)).tolist():
            number, crowd = len(boxes) + 1, chance < CROWDS
            box = [
                round(v, 2)
                for v in (x * width * 0.9, y * height * 0.9, 2 + w * width / 2, 2 + h * height / 2)
            ]
            category = int(chance * 1e6) % CLASSES + 1
            shape = runs if crowd else f"[{shapes[number % len(shapes)]}]"
            boxes.append(
                f'{{"segmentation": {shape},"area": {0.6 * box[2] * box[3]},"iscrowd": {int(crowd)},'
                f'"image_id": {image},"bbox": {box},"category_id": {category},"id": {number}}}'
            )
    categories = [{"supercategory": "thing", "id": n, "name": f"thing {n}"} for n in range(1, CLASSES + 1)]
    return (
        f'{{"info": {{}},"licenses": [],"images": [{",".join(images)}],"annotations": [{",".join(boxes)}],'
        f'"categories": {json.dumps(categories)}}}'
    )


def detections(path: Path, per_image: int, seed: int) -> list[dict[str, Any]]:
    """Results in COCO's form: every object, moved a little, and boxes of nothing up to a number an image."""
    random = np.random.default_rng(seed)
    content = json.loads(path.read_text())
    found = []
    for a in content["annotations"]:
        moved = (np.array(a["bbox"]) + random.normal(0, 4, 4)).clip(1)
        found.append((a["image_id"], a["category_id"], moved.tolist(), float(random.uniform(0.2, 1))))
    noise = per_image * len(content["images"]) - len(found)
    images = random.integers(1, len(content["images"]) + 1, noise).tolist()
    labels = random.integers(1, CLASSES + 1, noise).tolist()
    boxes = random.uniform(1, 300, (noise, 4)).tolist()
    found += zip(images, labels, boxes, (0.5 * random.uniform(0, 1, noise) ** 3).tolist(), strict=True)
    return [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in found]


# -- what is measured, each in a process of its own -------------------------------------------------


def memory(process: int | str = "self") -> dict[str, float]:
    """MiB of a process: all that is resident, its share of it (PSS), and what no other process has (USS)."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(value.split()[0]) / 1024 for name, value in (line.split(":") for line in lines)}
    return {"rss": sizes["Rss"], "pss": sizes["Pss"], "uss": sizes["Private_Clean"] + sizes["Private_Dirty"]}


def peak() -> float:
    """MiB that this process has had resident at most, since the last call; begins anew."""
    (line,) = (li for li in Path("/proc/self/status").read_text().splitlines() if li.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) / 1024


def cpu_seconds(process: int) -> float:
    """What another process has worked."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def started(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """Training and validation data as the script makes them, and what that took."""
    import processes
    import train_torchvision

    script = train_torchvision.parse(["--data", "coco", "--root", str(options.root)])
    group = processes.start("cpu")
    group.wait()
    before, begun, worked = memory(), time.perf_counter(), time.process_time()
    train, val = train_torchvision.make_data(script, group)
    took = {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - worked}
    group.wait()
    took |= {"peak": peak() - before["rss"], "kept": memory()["uss"] - before["uss"]}
    group.wait()  # nobody leaves before the others have looked
    processes.stop()
    return train, val, took


def startup(options: argparse.Namespace) -> dict[str, Any]:
    """Start-up alone, for one of several processes."""
    return started(options)[2]


def epoch(options: argparse.Namespace) -> dict[str, Any]:
    """Start-up, memory after a part of an epoch whose images are not decoded, and what decoding costs."""
    import coco_data

    train, _, took = started(options)
    decode, coco_data.decode = coco_data.decode, lambda path, size: torch.zeros(3, 8, 8, dtype=torch.uint8)
    whole = coco_data.training_loader(train, 16, seed=0, workers=options.workers)
    for number, _ in enumerate(whole, 1):
        if number == min(len(whole), max(1, options.touched // 16)):
            workers = [memory(child.pid) for child in multiprocessing.active_children()]
            main = memory()
            break
    coco_data.decode = decode
    loader = coco_data.training_loader(train, 2, seed=0, workers=options.workers)
    spent = []
    for number, _ in enumerate(loader):
        spent.append(sum(cpu_seconds(child.pid) for child in multiprocessing.active_children()))
        if number == options.images // 2:
            break
    of_worker = {name: statistics.mean(worker[name] for worker in workers) for name in main}
    milliseconds = 1000 * (spent[-1] - spent[0]) / (2 * number)
    return {**took, "main": main, "worker": of_worker, "milliseconds": milliseconds}


def evaluation(options: argparse.Namespace) -> dict[str, Any]:
    """COCO's metrics of the validation data, whose detections the processes share."""
    if options.slow:
        sys.modules["faster_coco_eval"] = None  # type: ignore[assignment]
    import coco_data
    import evaluation as examples
    import processes

    group = processes.start("cpu")
    path = options.root / "annotations/instances_val2017.json"
    data = coco_data.CocoFolder(options.root / "val2017", path)
    share: dict[int, list[dict[str, Any]]] = {i: [] for i in list(data.ids)[group.rank :: group.ranks]}
    for result in detections(path, options.detections, options.seed):
        if result["image_id"] in share:
            share[result["image_id"]].append(result)
    examples.detect = lambda *_, **__: share
    peak()
    group.wait()
    before, begun, worked = memory()["rss"], time.perf_counter(), time.process_time()
    metrics = examples.evaluate(torch.nn.Identity(), data, batch_size=1, device=group.device)
    took = {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - worked, "AP": metrics["AP"]}
    group.wait()
    processes.stop()
    return {**took, "peak": peak() - before}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "startup": startup,
    "epoch": epoch,
    "evaluation": evaluation,
}

# -- together -------------------------------------------------------------------------------------


def run(
    part: str, examples: Path, options: argparse.Namespace, ranks: int = 1, slow: bool = False
) -> list[Any]:
    """Measures one part by one version, in as many processes as there are ranks; what each of them says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--part", part, *["--slow"] * slow]
    for name in ("root", "workers", "touched", "images", "detections", "seed"):
        command += [f"--{name}", str(getattr(options, name))]
    found = [str(examples), str(examples.parent), os.environ.get("PYTHONPATH", "")]
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(found),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    children = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        children.append(subprocess.Popen(command, env={**shared, **own}, stdout=subprocess.PIPE, text=True))
    texts = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise RuntimeError(f"{part} of {examples} failed: {texts}")
    return [json.loads(text.splitlines()[-1]) for text in texts]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    measure.add_options(parser)
    parser.set_defaults(rounds=3)
    add = parser.add_argument
    add("--root", type=Path, default=Path("runs/coco_scale"), help="where the data is made, about 0.5 GB")
    add("--records", type=int, default=100_000, help="training images")
    add("--val", type=int, default=1000, help="validation images")
    add("--detections", type=int, default=100, help="of a validation image")
    add("--touched", type=int, default=20_000, help="of how many images the workers give the boxes")
    add("--images", type=int, default=400, help="how many are decoded to measure what that costs")
    add("--workers", type=int, default=2)
    add("--ranks", type=int, default=2)
    add("--before", type=Path, help="the folder examples of another version, beside its crosskd")
    add("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    add("--slow", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def mid(values: Iterable[float], digits: int = 0) -> str:
    """The median, as it stands in a table."""
    return f"{statistics.median(values):,.{digits}f}"


def main(arguments: list[str] | None = None) -> None:
    """Measures all parts in turn and writes the tables."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.part:
        print(json.dumps(PARTS[options.part](options)))
        return
    load = os.getloadavg()
    make_data(options.root, options.records, options.val, options.seed)
    here = Path(__file__).resolve().parents[1] / "examples"
    versions = {**({"before": options.before.resolve()} if options.before else {}), "now": here}
    found: dict[tuple[str, ...], list[Any]] = {}
    for _ in range(options.rounds):
        for version, folder in versions.items():
            found.setdefault((version, "epoch"), []).append(run("epoch", folder, options))
            found.setdefault((version, "startup"), []).append(run("startup", folder, options, options.ranks))
            for ranks in (1, options.ranks):
                kept = found.setdefault((version, "evaluation", "pycocotools", str(ranks)), [])
                kept.append(run("evaluation", folder, options, ranks, slow=True))
        if importlib.util.find_spec("faster_coco_eval"):
            kept = found.setdefault(("now", "evaluation", "faster-coco-eval", "1"), [])
            kept.append(run("evaluation", here, options))
    measure.write(report(found, options, load), options.output)


def report(
    found: dict[tuple[str, ...], list[Any]], options: argparse.Namespace, load: tuple[float, ...]
) -> str:
    """The tables; ``found`` has, by version and part, what each process of each round said."""
    startups, workers, reading, evaluations = [], [], [], []
    for (version, part, *how), rounds in found.items():
        first = [processes[0] for processes in rounds]
        if part == "evaluation":
            evaluations.append([version, *how, *spent(rounds), mid((r["AP"] for r in first), 6)])
            continue
        startups.append(
            [version, str(len(rounds[0])), *spent(rounds), mid(sum(p["kept"] for p in ps) for ps in rounds)]
        )
        if part == "epoch":
            numbers = [
                mid(r[of][kind] for r in first) for of in ("main", "worker") for kind in ("pss", "uss")
            ]
            workers.append([version, *numbers])
            milliseconds = statistics.median(r["milliseconds"] for r in first)
            need = NEED * milliseconds / 1000
            reading.append([version, f"{milliseconds:.1f}", f"{1000 / milliseconds:.0f}", f"{need:.1f}"])
    cost = ["seconds", "CPU seconds, of all together", "peak of each, added up"]
    try:
        fast = metadata.version("faster-coco-eval")
    except metadata.PackageNotFoundError:
        fast = "not installed"
    parts = [
        "# A data set of COCO's size",
        measure.environment("benchmarks/coco_scale.py", options, load)
        + f"\n- evaluators: pycocotools {metadata.version('pycocotools')}, faster-coco-eval {fast}"
        + f"\n- data: {options.records:,} training and {options.val:,} validation images, "
        f"{sizes(options)} of JSON",
        "Medians over the rounds. Seconds are the wall clock's. Memory is resident, in MiB: of the pages\n"
        "that a process shares with others, PSS counts its share and USS nothing.",
        "Start-up: both JSON files read and checked, and the header of every image. Memory is what it added\n"
        "to that of the imported modules.",
        measure.table(["version", "processes", *cost, "kept, added up"], startups),
        f"Memory of the main process and of each of {options.workers} workers, after {options.touched:,} "
        "images that were not decoded;\nPyTorch and the other modules, which all share, are in it.",
        measure.table(["version", "main, PSS", "main, USS", "worker, PSS", "worker, USS"], workers),
        f"Reading, decoding, flipping and handing over {options.images} of the images. An H100 needs {NEED} "
        "images/s (batch 8,\nRetinaNet-R50 from R101, compiled, bfloat16: step_cost_h100_compiled.md).",
        measure.table(
            ["version", "CPU ms an image", "images/s of a worker", f"workers for {NEED} images/s"], reading
        ),
        f"Evaluation of {options.detections} detections of each validation image. Memory is above what was "
        "resident before.",
        measure.table(["version", "evaluator", "processes", *cost, "AP"], evaluations),
    ]
    return "\n\n".join(parts)


def spent(rounds: list[Any]) -> list[str]:
    """Seconds, CPU seconds and peak memory of all processes together."""
    seconds = [max(p["seconds"] for p in processes) for processes in rounds]
    worked = [sum(p["cpu"] for p in processes) for processes in rounds]
    peaks = [sum(p["peak"] for p in processes) for processes in rounds]
    return [mid(seconds, 1), mid(worked, 1), mid(peaks)]


def sizes(options: argparse.Namespace) -> str:
    """Of the JSON files."""
    paths = [options.root / f"annotations/instances_{split}2017.json" for split in ("train", "val")]
    return " and ".join(f"{path.stat().st_size / 1e6:.0f} MB" for path in paths)


if __name__ == "__main__":
    main()
