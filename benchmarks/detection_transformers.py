"""What a small RT-DETR of `transformers` learns alone, and what a larger one as its teacher adds.

On any data set in COCO's form; the table in ``benchmarks/results`` is of blood cells (BCCD). Both are
RT-DETRs on MobileNetV2; the student's transformer is narrower and has fewer layers. Images are brought to one
size, as RT-DETR's image processor does it, and mirrored at random.

The settings stand in this file, for all runs alike, and none was chosen for a method. Each run is a process
of its own. At every so many steps, ``--rung``, it keeps what its detector finds on the validation and the
test split; the learning rate is constant, so that any of them may be the last. The table is of the last rung
that all runs have reached. So the command may be stopped at any time, also by ``--minutes``; given again,
also with more ``--steps``, it goes on::

    python benchmarks/detection_transformers.py --data data/bccd --weights mobilenet_v2.pth --device cuda

``--weights`` is torchvision's file of ImageNet weights, ``mobilenet_v2-b0353104.pth``. The defaults are for a
GPU; the table's command has what a CPU can train. Tables are of the validation split unless ``--split test``
is given.
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
from torch import Tensor, nn
from torchvision.ops import box_convert
from transformers import RTDetrConfig, RTDetrForObjectDetection, TimmBackboneConfig

import crosskd
from crosskd.adapters import PixelCoding
from crosskd.adapters.transformers import TransformersDetr

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from evaluation import coco_metrics
from run_folder import save_atomically

CODING = PixelCoding((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's, as the backbone expects
FOUND = 50  # predictions that are kept of an image
WARMUP = 50  # steps
RATE, BACKBONE_RATE, DECAY, GRADIENT = 1e-3, 3e-4, 1e-4, 0.1
WIDTHS = {"teacher": 128, "student": 64}
LAYERS = {"teacher": 3, "student": 2}
METHODS = {
    "none": (),
    "queries": (crosskd.QueryDistillation,),
    "features": (crosskd.PKD,),
    "both": (crosskd.QueryDistillation, crosskd.PKD),
    "decoder_crosskd": (crosskd.DecoderCrossKD,),
}
NAMES = {
    "teacher": "teacher",
    "none": "student alone",
    "queries": "`QueryDistillation`",
    "features": "`PKD` of the encoder's maps",
    "both": "`QueryDistillation` and `PKD`",
    "decoder_crosskd": "`DecoderCrossKD`",
}
COLUMNS = ("AP", "AP50", "AP75")
Label = dict[str, Tensor]


class Images:
    """A split of the data.

    Args:
        path: what `cache` has written.
        device: where images are kept.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        kept = torch.load(path, weights_only=True)
        self.pixels = kept["pixels"].to(device)  # (images, 3, height, width), 0 to 255
        self.boxes = [boxes.to(device) for boxes in kept["boxes"]]  # centre, width and height, 0 to 1
        self.classes = [classes.to(device) for classes in kept["classes"]]
        self.names = kept["names"]

    def labels(self) -> list[Label]:
        """Of all images, as `transformers` has them."""
        pairs = zip(self.boxes, self.classes, strict=True)
        return [{"boxes": boxes, "class_labels": classes} for boxes, classes in pairs]

    def random(self, count: int, generator: np.random.Generator) -> tuple[Tensor, list[Label]]:
        """Random images, mirrored from left to right and from top to bottom at random."""
        pixels, labels = [], []
        for index in generator.integers(len(self.pixels), size=count):
            image, boxes = self.pixels[index], self.boxes[index].clone()
            for axis in np.flatnonzero(generator.random(2) < 0.5).tolist():
                image = image.flip(-1 - axis)
                boxes[:, axis] = 1 - boxes[:, axis]
            pixels.append(image)
            labels.append({"boxes": boxes, "class_labels": self.classes[index]})
        return torch.stack(pixels), labels


def cache(root: Path, split: str, path: Path, size: Sequence[int], most: int | None = None) -> None:
    """Decodes a split's images, once; the first ``most`` of them alone, if given."""
    if path.exists():
        return
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(root / "annotations" / f"{split}.json")
    categories = {category: index for index, category in enumerate(sorted(coco.cats))}
    kept: dict[str, list[Any]] = {"pixels": [], "boxes": [], "classes": []}
    for image in list(coco.imgs.values())[:most]:
        with Image.open(root / "images" / image["file_name"]) as file:
            pixels = np.array(file.convert("RGB").resize((size[1], size[0]), Image.Resampling.BILINEAR))
        objects = coco.imgToAnns[image["id"]]
        boxes = torch.tensor([of_object["bbox"] for of_object in objects]).reshape(-1, 4).float()
        scale = torch.tensor([image["width"], image["height"]] * 2)
        kept["pixels"].append(torch.from_numpy(pixels).permute(2, 0, 1))
        kept["boxes"].append(box_convert(boxes, "xywh", "cxcywh") / scale)
        kept["classes"].append(torch.tensor([categories[found["category_id"]] for found in objects]).long())
    names = [coco.cats[category]["name"] for category in categories]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_atomically({**kept, "pixels": torch.stack(kept["pixels"]), "names": names}, path)


def build(side: str, classes: int, weights: Path | None = None) -> RTDetrForObjectDetection:
    """An RT-DETR on MobileNetV2, whose batch norms are frozen: the ``"teacher"`` or the ``"student"``."""
    width = WIDTHS[side]
    backbone = TimmBackboneConfig(
        backbone="mobilenetv2_100", out_indices=[2, 3, 4], freeze_batch_norm_2d=True
    )
    config = RTDetrConfig(
        backbone_config=backbone, freeze_backbone_batch_norms=False, num_labels=classes,
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


def coded(images: Tensor) -> Tensor:
    """Images of 0 to 255 as the detectors expect them."""
    mean, deviation = (torch.tensor(values, device=images.device) for values in (CODING.mean, CODING.std))
    return (images / 255 - mean[:, None, None]) / deviation[:, None, None]


@torch.no_grad()
def detections(detector: nn.Module, images: Images) -> Tensor:
    """The surest predictions of each image, (images, 50, 6): a box from 0 to 1, probability, class."""
    found = []
    for part in images.pixels.split(100):
        output = detector.eval()(coded(part))
        scores, places = output.logits.sigmoid().flatten(1).topk(FOUND)
        classes = output.logits.shape[-1]
        chosen = output.pred_boxes.gather(1, (places // classes)[..., None].expand(-1, -1, 4))
        boxes = box_convert(chosen, "cxcywh", "xyxy")
        found.append(torch.cat([boxes, scores[..., None], (places % classes)[..., None]], dim=-1).cpu())
    return torch.cat(found)


def precision(found: Tensor, images: Images) -> dict[str, float]:
    """COCO's metrics of detections, in percent, in pixels of the images as the detectors see them."""
    height, width = images.pixels.shape[-2:]
    scale = torch.tensor([width, height, width, height])
    annotations: list[dict[str, Any]] = []
    for image, label in enumerate(images.labels(), start=1):
        boxes = box_convert(label["boxes"], "cxcywh", "xywh") * scale
        for box, kind in zip(boxes.tolist(), label["class_labels"].tolist(), strict=True):
            annotation = {"id": len(annotations) + 1, "image_id": image, "category_id": kind, "bbox": box}
            annotations.append({**annotation, "area": box[2] * box[3], "iscrowd": 0})
    ids = torch.arange(1, len(found) + 1)
    rows = found.flatten(0, 1).double()
    boxes = box_convert(rows[:, :4] * scale, "xyxy", "xywh")
    rows = torch.cat([ids.repeat_interleave(FOUND)[:, None], boxes, rows[:, 4:]], dim=1)
    categories = [{"id": kind} for kind in range(len(images.names))]
    listed = [{"id": image} for image in ids.tolist()]
    truth = {"info": {}, "images": listed, "categories": categories, "annotations": annotations}
    return dict(coco_metrics(truth, rows.numpy()))


# -- one run ------------------------------------------------------------------------------------------


def trained_of(name: str, student: nn.Module, options: argparse.Namespace, classes: int) -> nn.Module:
    """What is called in training: the detector alone, or a distiller. It waits for the teacher's weights."""
    methods = METHODS.get(name, ())
    if not methods:
        return student
    teacher = build("teacher", classes)
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
    )


def train(name: str, seed: int, options: argparse.Namespace) -> None:
    """Trains the teacher or a student from where it was left, until it is done or the time is over."""
    side = "teacher" if name == "teacher" else "student"
    folder = folder_of(name, seed, options)
    images = {split: Images(cached(split, options), options.device) for split in ("train", "val", "test")}
    classes = len(images["train"].names)
    torch.manual_seed(seed)
    detector = build(side, classes, options.weights).to(options.device)
    trained = trained_of(name, detector, options, classes)
    optimizer, warmup = optimizer_of(trained)
    parts = {"trained": trained, "optimizer": optimizer, "warmup": warmup}
    done = first = restored(folder, parts, options.device)
    began = time.time()
    steps, until = options.steps, options.until
    if side == "teacher":
        steps, until = options.teacher_steps, min(until, began + 60 * options.teacher_minutes)
    while done < steps and time.time() < until:
        torch.manual_seed(1_000_000 * (seed + 1) + done)  # a run that goes on is the run that was not stopped
        pixels, labels = images["train"].random(options.batch, np.random.default_rng([seed, done]))
        output = trained.train()(pixel_values=coded(pixels), labels=labels)
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
            keep_found(folder / f"{done}.pt", detector, images)
    state = {part: of_part.state_dict() for part, of_part in parts.items()}
    save_atomically({**state, "done": done}, folder / "state.pt")
    if side == "teacher" and (done == steps or until < options.until):
        keep_found(folder / "last.pt", detector, images)
        save_atomically(detector.state_dict(), folder / "detector.pt")


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


def keep_found(path: Path, detector: nn.Module, images: Mapping[str, Images]) -> None:
    """Writes what a detector finds on the validation and the test split."""
    save_atomically({split: detections(detector, images[split]) for split in ("val", "test")}, path)


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


def common_rungs(runs: Sequence[tuple[str, int]], options: argparse.Namespace) -> list[int]:
    """The numbers of steps at which all students have kept what they found."""
    students = [folder_of(*run, options) for run in runs if run[0] != "teacher"]
    reached = [{int(file.stem) for file in folder.glob("[0-9]*.pt")} for folder in students]
    return sorted(set.intersection(*reached))


def measured(name: str, seed: int, stem: str, options: argparse.Namespace) -> dict[str, float]:
    """Metrics of what a run has kept, each in a JSON file of its own, too."""
    folder = folder_of(name, seed, options)
    path = folder / f"{options.split}_{stem}.json"
    if not path.exists():
        found = torch.load(folder / f"{stem}.pt", weights_only=True)[options.split]
        images = Images(cached(options.split, options), torch.device("cpu"))
        path.write_text(json.dumps(precision(found, images)) + "\n")
    return dict(json.loads(path.read_text()))


def report(rungs: Sequence[int], options: argparse.Namespace) -> str:
    """The table of the last rung and that of all, with what is needed to repeat them."""
    teacher = measured("teacher", 0, "last", options)
    rows = [[NAMES["teacher"], "1", *(f"{teacher[column]:.1f}" for column in COLUMNS), "", ""]]
    later = []
    for name in options.methods:
        by_rung = [[measured(name, seed, str(rung), options) for seed in options.seeds] for rung in rungs]
        cells = [mean_and_deviation([run[column] for run in by_rung[-1]]) for column in COLUMNS]
        more = ["", ""]
        if name != "none" and "none" in options.methods:
            alone = [measured("none", seed, str(rungs[-1]), options)["AP"] for seed in options.seeds]
            gains = [run["AP"] - own for run, own in zip(by_rung[-1], alone, strict=True)]
            more = [mean_and_deviation(gains, "+"), ", ".join(f"{gain:+.1f}" for gain in gains)]
        rows.append([NAMES[name], str(len(options.seeds)), *cells, *more])
        later.append([NAMES[name], *(mean_and_deviation([run["AP"] for run in runs]) for runs in by_rung)])
    split = {"val": "validation", "test": "test"}[options.split]
    machine = json.loads((options.output / "machine.json").read_text())
    steps = torch.load(folder_of("teacher", 0, options) / "state.pt", weights_only=True)["done"]
    return "\n".join(
        [
            f"{options.data.name}, {split} split, images of {options.size[1]} x {options.size[0]} pixels. "
            f"Teacher: {WIDTHS['teacher']} channels, {LAYERS['teacher']} decoder layers, {steps} steps. "
            f"Student: {WIDTHS['student']} channels, {LAYERS['student']} layers, {rungs[-1]} steps. "
            f"{options.batch} images a step; both are RT-DETRs on MobileNetV2 with ImageNet weights, and the "
            "learning rate is constant. "
            "Mean ± standard deviation over seeds, which share one teacher.",
            "",
            table(["", "seeds", *COLUMNS, "AP over student alone", "seed by seed"], rows),
            "",
            "AP after so many steps of the student:",
            "",
            table(["", *map(str, rungs)], later),
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
    add("--steps", type=int, default=4000, help="of a student, at most")
    add("--teacher-steps", type=int, default=8000)
    add(
        "--teacher-minutes",
        type=float,
        default=math.inf,
        help="the teacher stops after so many at the latest",
    )
    add("--size", type=int, nargs=2, default=[256, 320], help="height and width, multiples of 32")
    add("--batch", type=int, default=16)
    add("--rung", type=int, default=500)
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
        cache(options.data, split, cached(split, options), options.size, options.images)
    runs = [("teacher", 0), *((name, seed) for seed in options.seeds for name in options.methods)]
    if options.only != "table":
        on_gpu = options.device.type == "cuda"
        device = torch.cuda.get_device_name(options.device) if on_gpu else processor()
        used = f"{versions()}, transformers {transformers.__version__}"
        command = " ".join(["python benchmarks/detection_transformers.py", *options.arguments])
        machine = {"command": command, "device": device, "versions": used}
        (options.output / "machine.json").write_text(json.dumps(machine) + "\n")
        run_all(runs, options)
    rungs = common_rungs(runs, options)
    print(f"all students have reached {max(rungs, default=0)} steps", flush=True)
    if rungs and is_done("teacher", 0, options) and options.only != "runs":
        write(report(rungs, options), options.results)


if __name__ == "__main__":
    main()
