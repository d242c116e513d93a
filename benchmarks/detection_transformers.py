"""What a small RT-DETR of `transformers` learns alone, and what a teacher that sees more adds.

On DeepPCB with pairs: the teacher sees the board, its defect-free template and their difference, the student
the board alone. Both are RT-DETRs on MobileNetV2; the student's transformer is narrower and has fewer layers.
They are trained on random crops of 160 pixels, and measured on the four quarters of each image.

The settings stand in this file, for all runs alike, and none was chosen for a method. Each run is a process
of its own. At every so many steps, `RUNG`, it keeps what its detector finds on the validation and the test
split; the learning rate is constant, so that any of them may be the last. The table is of the last rung that
all runs have reached. So the command may be stopped at any time, also by ``--minutes``; given
again, it goes on::

    python benchmarks/detection_transformers.py --data data/deeppcb --weights mobilenet_v2-b0353104.pth

``--weights`` is torchvision's file of ImageNet weights. Tables are of the validation split unless ``--split
test`` is given.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from measure import mean_and_deviation, processor, table, versions, write
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.ops import box_convert
from transformers import RTDetrConfig, RTDetrForObjectDetection, TimmBackboneConfig

import crosskd
from crosskd.adapters import PixelCoding
from crosskd.adapters.transformers import TransformersDetr

CLASSES = ("open", "short", "mousebite", "spur", "copper", "pin-hole")
CODING = PixelCoding((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's, as the backbone expects
CROP = 160
RUNG = 200  # steps
FOUND = 20  # predictions that are kept of a crop
WARMUP = 50  # steps
RATE, BACKBONE_RATE, DECAY, GRADIENT = 1e-3, 3e-4, 1e-4, 0.1
WIDTHS = {"teacher": 128, "student": 96}
LAYERS = {"teacher": 3, "student": 2}
METHODS = {
    "none": (),
    "queries": (crosskd.QueryDistillation,),
    "features": (crosskd.PKD,),
    "both": (crosskd.QueryDistillation, crosskd.PKD),
    "decoder_crosskd": (crosskd.DecoderCrossKD,),
}
NAMES = {
    "teacher": "teacher, on its own images",
    "none": "student alone",
    "queries": "`QueryDistillation`",
    "features": "`PKD` of the encoder's maps",
    "both": "`QueryDistillation` and `PKD`",
    "decoder_crosskd": "`DecoderCrossKD`",
}
COLUMNS = ("AP", "AP50", "AP75")
Label = dict[str, Tensor]


class Boards:
    """A split of the data.

    Args:
        path: what `cache` has written.
        device: where images are kept and crops are cut.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        kept = torch.load(path, weights_only=True)
        self.images = kept["images"].to(device)  # (images, height, width, 3), 0 to 255
        self.objects = [of_image.numpy() for of_image in kept["objects"]]  # x1, y1, x2, y2, class

    def crops(self, index: np.ndarray, corners: np.ndarray, flips: np.ndarray) -> tuple[Tensor, list[Label]]:
        """Crops (crops, 3, 160, 160) of what the teacher sees, and labels as `transformers` has them.

        Args:
            index: (crops,), of which images.
            corners: (crops, 2), left and top.
            flips: (crops, 2), whether a crop is mirrored from left to right, from top to bottom.
        """
        places = corners[:, :, None] + np.arange(CROP)
        places = np.where(flips[:, :, None], places[:, :, ::-1], places)
        device = self.images.device
        columns, rows = torch.from_numpy(places.transpose(1, 0, 2).copy()).to(device)
        which = torch.from_numpy(index).to(device)[:, None, None]
        pixels = self.images[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        objects = [
            _cut(self.objects[image], corner, flip)
            for image, corner, flip in zip(index, corners, flips, strict=True)
        ]
        together = torch.from_numpy(np.concatenate(objects)).float().to(device)  # all at once
        boxes = box_convert(together[:, :4] / CROP, "xyxy", "cxcywh")
        counts = [len(of_crop) for of_crop in objects]
        parts = zip(boxes.split(counts), together[:, 4].long().split(counts), strict=True)
        return pixels, [{"boxes": of_crop, "class_labels": classes} for of_crop, classes in parts]

    def random(self, count: int, generator: np.random.Generator) -> tuple[Tensor, list[Label]]:
        """Random crops of random images."""
        index = generator.integers(len(self.images), size=count)
        corners = generator.integers(self.images.shape[1] - CROP + 1, size=(count, 2))
        return self.crops(index, corners, generator.random((count, 2)) < 0.5)

    def quarters(self) -> tuple[Tensor, list[Label]]:
        """The four quarters of each image."""
        count = len(self.images)
        corners = np.tile(np.array([[0, 0], [CROP, 0], [0, CROP], [CROP, CROP]]), (count, 1))
        return self.crops(np.arange(count).repeat(4), corners, np.zeros((4 * count, 2), dtype=bool))


def _cut(objects: np.ndarray, corner: np.ndarray, flip: np.ndarray) -> np.ndarray:
    """A crop's objects: those of which at least half is in it."""
    whole = objects[:, :4] - np.tile(corner, 2)
    cut = whole.clip(0, CROP)
    areas, inside = ((box[:, 2:] - box[:, :2]).prod(axis=1) for box in (whole, cut))
    kept = np.concatenate([cut, objects[:, 4:]], axis=1)[inside >= areas / 2]
    for axis in np.flatnonzero(flip):
        kept[:, [axis, axis + 2]] = CROP - kept[:, [axis + 2, axis]]
    return kept


def cache(root: Path, split: str, path: Path, most: int | None = None) -> None:
    """Decodes a split's images, once; the first ``most`` of them alone, if given."""
    if path.exists():
        return
    coco = json.loads((root / "annotations" / f"{split}.json").read_text())
    chosen = coco["images"][:most]
    objects: dict[int, list[list[float]]] = {image["id"]: [] for image in chosen}
    for annotation in coco["annotations"]:
        if annotation["image_id"] not in objects:
            continue
        x, y, width, height = annotation["bbox"]
        kind = annotation["category_id"] - 1
        objects[annotation["image_id"]].append([x, y, x + width, y + height, kind])
    images = []
    for image in chosen:
        with Image.open(root / "images_pair" / image["file_name"]) as file:
            images.append(torch.from_numpy(np.array(file.convert("RGB"))))
    kept = [torch.tensor(of_image, dtype=torch.float64).reshape(-1, 5) for of_image in objects.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"images": torch.stack(images), "objects": kept}, path)


def build(side: str, weights: Path | None) -> RTDetrForObjectDetection:
    """An RT-DETR on MobileNetV2, for the ``"teacher"`` or the ``"student"``."""
    width = WIDTHS[side]
    backbone = TimmBackboneConfig(
        backbone="mobilenetv2_100", out_indices=[2, 3, 4], freeze_batch_norm_2d=False
    )
    config = RTDetrConfig(
        backbone_config=backbone, freeze_backbone_batch_norms=False, num_labels=len(CLASSES),
        encoder_in_channels=[32, 96, 320], encoder_hidden_dim=width, encoder_ffn_dim=2 * width,
        encoder_attention_heads=4, hidden_expansion=0.5, d_model=width, decoder_in_channels=[width] * 3,
        decoder_layers=LAYERS[side], decoder_ffn_dim=4 * width, decoder_attention_heads=4, num_queries=60,
        num_denoising=60, initializer_bias_prior_prob=0.01,
    )  # fmt: skip
    detector = RTDetrForObjectDetection(config)
    if weights is not None:
        # timm has torchvision's layers in the same order, under other names.
        own, theirs = detector.model.backbone.model, torch.load(weights, weights_only=True)
        names = [name for name in own.state_dict() if not name.endswith("num_batches_tracked")]
        values = [value for name, value in theirs.items() if not name.endswith("num_batches_tracked")]
        own.load_state_dict(dict(zip(names, values, strict=False)), strict=False)
    return detector


def pixels_of(crops: Tensor, side: str) -> Tensor:
    """What a side sees of crops: everything, or the board alone."""
    seen = crops if side == "teacher" else crops[:, :1].expand(-1, 3, -1, -1)
    mean, deviation = (torch.tensor(values, device=crops.device) for values in (CODING.mean, CODING.std))
    return (seen / 255 - mean[:, None, None]) / deviation[:, None, None]


@torch.no_grad()
def detections(detector: nn.Module, crops: Tensor, side: str) -> Tensor:
    """The surest predictions of each crop, (crops, 20, 6): x1, y1, x2, y2, probability, class."""
    found = []
    for part in crops.split(200):
        output = detector.eval()(pixels_of(part, side))
        scores, places = output.logits.sigmoid().flatten(1).topk(FOUND)
        queries, classes = places // len(CLASSES), places % len(CLASSES)
        boxes = box_convert(output.pred_boxes, "cxcywh", "xyxy") * CROP
        chosen = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
        found.append(torch.cat([chosen, scores[..., None], classes[..., None]], dim=-1).cpu())
    return torch.cat(found)


def precision(found: Tensor, labels: Sequence[Label]) -> dict[str, float]:
    """AP, AP50 and AP75 of detections, in percent."""
    annotations: list[dict[str, Any]] = []
    for image, label in enumerate(labels, start=1):
        boxes = box_convert(label["boxes"], "cxcywh", "xywh") * CROP
        for box, kind in zip(boxes.tolist(), label["class_labels"].tolist(), strict=True):
            annotation = {"id": len(annotations) + 1, "image_id": image, "category_id": kind, "bbox": box}
            annotations.append({**annotation, "area": box[2] * box[3], "iscrowd": 0})
    image_ids = torch.arange(1, len(labels) + 1).repeat_interleave(FOUND)[:, None]
    rows = found.flatten(0, 1).double()
    rows = torch.cat([image_ids, box_convert(rows[:, :4], "xyxy", "xywh"), rows[:, 4:]], dim=1)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": image} for image in range(1, len(labels) + 1)],
            "categories": [{"id": kind} for kind in range(len(CLASSES))],
            "annotations": annotations,
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(rows.numpy()), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(COLUMNS, (100 * evaluation.stats[:3]).tolist(), strict=True))


# -- one run ------------------------------------------------------------------------------------------


def trained_of(
    name: str, student: nn.Module, options: argparse.Namespace, seen: dict[str, Tensor]
) -> nn.Module:
    """What is called in training: the detector alone, or a distiller. It waits for the teacher's weights."""
    methods = METHODS.get(name, ())
    if not methods:
        return student
    teacher = build("teacher", None)
    path = folder_of("teacher", 0, options) / "detector.pt"
    while not path.exists():
        if time.time() > options.until:
            raise SystemExit(0)
        time.sleep(0.5)
    teacher.load_state_dict(torch.load(path, weights_only=True))
    return crosskd.Distiller(
        teacher.to(options.device),
        student,
        [method() for method in methods],
        adapter=partial(TransformersDetr, pixel_coding=CODING),
        teacher_view=lambda *_: seen["teacher"],
    )


def train(name: str, seed: int, options: argparse.Namespace) -> None:
    """Trains the teacher or a student from where it was left, until it is done or the time is over."""
    side = "teacher" if name == "teacher" else "student"
    folder = folder_of(name, seed, options)
    boards = {split: Boards(cached(split, options), options.device) for split in ("train", "val", "test")}
    torch.manual_seed(seed)
    detector = build(side, options.weights).to(options.device)
    seen: dict[str, Tensor] = {}
    trained = trained_of(name, detector, options, seen)
    optimizer, warmup = optimizer_of(trained)
    parts = {"trained": trained, "optimizer": optimizer, "warmup": warmup}
    done = first = restored(folder, parts, options.device)
    began = time.time()
    steps, until = options.steps, options.until
    if side == "teacher":
        steps, until = options.teacher_steps, min(until, began + 60 * options.teacher_minutes)
    while done < steps and time.time() < until:
        torch.manual_seed(1_000_000 * (seed + 1) + done)  # a run that goes on is the run that was not stopped
        crops, labels = boards["train"].random(options.batch, np.random.default_rng([seed, done]))
        seen["teacher"] = pixels_of(crops, "teacher")
        output = trained.train()(pixel_values=pixels_of(crops, side), labels=labels)
        loss = output.loss if trained is detector else sum(output.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), GRADIENT)
        optimizer.step()
        warmup.step()
        done += 1
        if done % options.rung == 0 or done == steps:
            seconds = (time.time() - began) / (done - first)
            print(f"{done} steps, loss {loss.item():.2f}, {seconds:.3f} s a step", flush=True)
            keep_found(folder / f"{done}.pt", detector, boards, side)
    state = {part: of_part.state_dict() for part, of_part in parts.items()}
    save({**state, "done": done}, folder / "state.pt")
    if side == "teacher" and (done == steps or until < options.until):
        keep_found(folder / "last.pt", detector, boards, side)
        save(detector.state_dict(), folder / "detector.pt")


def optimizer_of(trained: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with a lower rate for the backbone, and a few steps of warmup."""
    parameters: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in trained.named_parameters():
        parameters["backbone" in name].append(parameter)
    rates = {True: BACKBONE_RATE, False: RATE}
    groups = [{"params": of_rate, "lr": rates[backbone]} for backbone, of_rate in parameters.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=DECAY)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / WARMUP))


def restored(folder: Path, parts: Mapping[str, Any], device: torch.device) -> int:
    """Loads what a stopped run has kept; gives the steps that were done."""
    path = folder / "state.pt"
    if not path.exists():
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["done"])


def keep_found(path: Path, detector: nn.Module, boards: Mapping[str, Boards], side: str) -> None:
    """Writes what a detector finds on the validation and the test split."""
    found = {}
    for split in ("val", "test"):
        found[split] = detections(detector, boards[split].quarters()[0], side)
    save(found, path)


def save(what: Any, path: Path) -> None:
    """Writes a file as a whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(what, unfinished)
    unfinished.replace(path)


# -- all runs -----------------------------------------------------------------------------------------


def folder_of(name: str, seed: int, options: argparse.Namespace) -> Path:
    """A run's folder."""
    return Path(options.output / f"{name}-{seed}")


def cached(split: str, options: argparse.Namespace) -> Path:
    """The file of a split's decoded images."""
    return Path(options.output / f"images_{split}.pt")


def is_done(name: str, seed: int, options: argparse.Namespace) -> bool:
    """Whether nothing is left to do of a run."""
    last = "detector" if name == "teacher" else options.steps
    return (folder_of(name, seed, options) / f"{last}.pt").exists()


def run_all(runs: Sequence[tuple[str, int]], options: argparse.Namespace) -> None:
    """Starts a process for each run that isn't done, ``--jobs`` at a time, in order.

    Raises:
        RuntimeError: runs that failed, with their logs.
    """
    waiting = [run for run in runs if not is_done(*run, options)]
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    failed = []
    while waiting or running:
        while waiting and len(running) < options.jobs and time.time() < options.until:
            run = waiting.pop(0)
            running[run] = launch(*run, options)
        if not running:
            break
        time.sleep(0.2)
        for run, process in list(running.items()):
            if process.poll() is not None:
                del running[run]
                if process.returncode:
                    failed.append(str(folder_of(*run, options) / "log.txt"))
                    if run[0] == "teacher":
                        options.until = 0.0  # nothing more is started
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed, see {', '.join(failed)}")


def launch(name: str, seed: int, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Starts a run's process."""
    folder = folder_of(name, seed, options)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, *options.arguments, "--run", name, str(seed)]
    command += ["--until", str(options.until)]
    paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.setdefault("OMP_NUM_THREADS", "1")
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def common_rung(runs: Sequence[tuple[str, int]], options: argparse.Namespace) -> int:
    """The last number of steps at which all students have kept what they found; 0 if there is none."""
    students = [folder_of(*run, options) for run in runs if run[0] != "teacher"]
    reached = [{int(file.stem) for file in folder.glob("[0-9]*.pt")} for folder in students]
    return max(set.intersection(*reached), default=0)


def measured(
    runs: Sequence[tuple[str, int]], rung: int, options: argparse.Namespace
) -> dict[str, dict[int, Any]]:
    """Metrics by name and seed, each in a JSON file of its own, too."""
    labels = Boards(cached(options.split, options), torch.device("cpu")).quarters()[1]
    results: dict[str, dict[int, Any]] = {}
    for name, seed in runs:
        stem = "last" if name == "teacher" else str(rung)
        folder = folder_of(name, seed, options)
        path = folder / f"{options.split}_{stem}.json"
        if not path.exists():
            found = torch.load(folder / f"{stem}.pt", weights_only=True)[options.split]
            path.write_text(json.dumps(precision(found, labels)) + "\n")
        results.setdefault(name, {})[seed] = json.loads(path.read_text())
    return results


def report(results: Mapping[str, Mapping[int, Any]], rung: int, options: argparse.Namespace) -> str:
    """The table, with what is needed to repeat it."""
    rows = []
    for name, by_seed in results.items():
        cells = [mean_and_deviation([run[column] for run in by_seed.values()]) for column in COLUMNS]
        more = ["", ""]
        if name not in ("teacher", "none") and "none" in results:
            gains = [run["AP"] - results["none"][seed]["AP"] for seed, run in by_seed.items()]
            more = [mean_and_deviation(gains, "+"), ", ".join(f"{gain:+.1f}" for gain in gains)]
        rows.append([NAMES[name], str(len(by_seed)), *cells, *more])
    header = ["", "seeds", *COLUMNS, "AP over student alone", "seed by seed"]
    split = {"val": "validation", "test": "test"}[options.split]
    machine = json.loads((options.output / "machine.json").read_text())
    return "\n".join(
        [
            f"DeepPCB, {split} split, quarters of 160 pixels. Teacher: {WIDTHS['teacher']} channels, "
            f"{LAYERS['teacher']} decoder layers, sees board, template and difference. Student: "
            f"{WIDTHS['student']} channels, {LAYERS['student']} layers, sees the board; {rung} steps of "
            f"{options.batch} crops. Both: RT-DETR on MobileNetV2 with ImageNet weights. "
            "The learning rate is constant. Mean ± standard deviation over seeds.",
            "",
            table(header, rows),
            "",
            "Made by",
            "",
            f"    {machine['command']}",
            "",
            f"on {machine['device']}, {machine['versions']}.",
        ]
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, with ``until``, when the time is over, in seconds since 1970."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the data set")
    add("--weights", type=Path, help="torchvision's file of MobileNetV2; random ones unless given")
    add("--output", type=Path, default=Path("runs/detection_transformers"))
    add("--results", type=Path, help="the Markdown file to write")
    add("--methods", nargs="+", choices=METHODS, default=["none", "queries", "features", "both"])
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--steps", type=int, default=2000, help="of a student, at most")
    add("--teacher-steps", type=int, default=3000)
    add(
        "--teacher-minutes",
        type=float,
        default=math.inf,
        help="the teacher stops after so many at the latest",
    )
    add("--batch", type=int, default=32)
    add("--rung", type=int, default=RUNG)
    add("--minutes", type=float, default=math.inf, help="stop after so many; the same command goes on")
    add("--jobs", type=int, default=1, help="runs side by side")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--split", choices=["val", "test"], default="val", help="what the table is of")
    add("--only", choices=["runs", "table"], help="leave the other out")
    add("--images", type=int, help="of each split at most; for a rehearsal")
    add("--run", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    add("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    options.until = options.until or time.time() + 60 * options.minutes
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs what isn't done, then writes the table of what is there."""
    options = parse(arguments)
    if options.run:
        train(options.run[0], int(options.run[1]), options)
        return
    for split in ("train", "val", "test"):
        cache(options.data, split, cached(split, options), options.images)
    runs = [("teacher", 0), *((name, seed) for name in options.methods for seed in options.seeds)]
    if options.only != "table":
        on_gpu = options.device.type == "cuda"
        device = torch.cuda.get_device_name(options.device) if on_gpu else processor()
        used = f"{versions()}, transformers {transformers.__version__}"
        command = " ".join(["python benchmarks/detection_transformers.py", *options.arguments])
        machine = {"command": command, "device": device, "versions": used}
        (options.output / "machine.json").write_text(json.dumps(machine) + "\n")
        run_all(runs, options)
    rung = common_rung(runs, options)
    (options.output / "reached").write_text(f"{rung}\n")
    print(f"all students have reached {rung} steps", flush=True)
    if rung and is_done("teacher", 0, options) and options.only != "runs":
        write(report(measured(runs, rung, options), rung, options), options.results)


if __name__ == "__main__":
    main()
