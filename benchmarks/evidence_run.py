"""One run of evidence.py in a process of its own: a detector trained alone or distilled, then measured.

``run.json`` in the run's folder says everything about it; `evidence.py` writes it. A run that is stopped,
or that comes to its time limit, has kept ``state.pt`` and goes on from there. What it leaves: ``model.pt``,
``result.json`` with the metrics on the validation split, and, with ``--test``, ``test.json`` and
``detections_test.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from evidence_data import (
    DataSet,
    Images,
    Target,
    Window,
    chosen_images,
    coco_folder,
    crops,
    draw_windows,
    load_images,
    whole_images,
)
from evidence_pseudo import PseudoLabelled
from measure import versions
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import crosskd
from crosskd import Distiller, Schedule
from crosskd.methods import MapMethod

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from backbones import build_backbone
from dense_heads import ATSS, GFL, adapter_of
from evaluation import best_score, coco_metrics, coco_results
from methods_table import PSEUDO, inherits, is_pseudo_labelled, make_methods
from nanodet import NANODET, NanoDet, load_nanodet
from run_folder import locked
from training import save_atomically

STRIDES = (8, 16, 32, 64, 128)


class Variant(NamedTuple):
    """A method as it is not by default.

    Attributes:
        label: what tables call it.
        name: of `methods_table`.
        settings: of CrossKD, that are others.
        weight: of the method of feature maps, instead of its own.
        half: stops after half of the steps.
    """

    label: str
    name: str
    settings: Mapping[str, Any] = {}
    weight: float | None = None
    half: bool = False


VARIANTS = {
    # GFLs' towers have two blocks, torchvision's four.
    "crosskd-pre": Variant('CrossKD, tap="pre"', "crosskd", {"tap": "pre"}),
    "crosskd-0": Variant("CrossKD, position 0", "crosskd", {"position": 0}),
    "crosskd-2": Variant("CrossKD, position 2", "crosskd", {"position": 2}),
    "crosskd-half": Variant("CrossKD, until half of the steps", "crosskd", half=True),
    "mimic-half": Variant("prediction mimicking, until half of the steps", "mimic", half=True),
    # With these the gradients at the maps are about as large as CrossKD's, on the cells.
    "pkd-weak": Variant("PKD, weight 0.25", "pkd", weight=0.25),
    "crosskd+pkd-weak": Variant("CrossKD + PKD, weight 0.25", "crosskd+pkd", weight=0.25),
    "mimic+pkd-weak": Variant("prediction mimicking + PKD, weight 0.25", "mimic+pkd", weight=0.25),
    "cwd-weak": Variant("CWD, weight 0.13", "cwd", weight=0.13),
    "drkd-weak": Variant("DRKD, weight 0.005", "drkd", weight=0.005),
}
REG_MAX = 10  # of every GFL, as NanoDet-g has it: LD compares the distributions


@dataclass(frozen=True)
class Model:
    """A detector.

    Attributes:
        family: ``"gfl"``, ``"atss"``, ``"retinanet"``, ``"fcos"``; ``"nanodet"``, a GFL whose classes and
            boxes share a tower; or ``"nanodet_g"``, the whole COCO detector, which ``--nanodet`` names.
        backbone: one of `backbones.BACKBONES`.
        pretrained: ImageNet weights in the backbone.
        width: channels of pyramid and towers.
        blocks: convolutions a tower.
        levels: 3 or 5, from stride 8 on.
        finest: 16 leaves out the first of them.
    """

    family: str = "gfl"
    backbone: str = "mobilenet_v2"
    pretrained: bool = False
    width: int = 64
    blocks: int = 2
    levels: int = 3
    finest: int = 8


@dataclass(frozen=True)
class Run:
    """Everything about a run.

    Attributes:
        data: what is learned.
        model: what is trained.
        sees: ``"images"``, ``"pair"``, another folder of the same scenes, or ``"zoom"``, twice the size.
        method: a name of `methods_table` or of ``VARIANTS``; with ``PSEUDO`` alone or among its parts the
            teacher's detections are labels of the images without.
        seed: of weights, batches and crops.
        steps: how many.
        teacher: the teacher's run; ``None`` for a model that learns alone.
        begins: the finished run whose weights the student begins with; ``None`` for weights of its own.
        position: of CrossKD.
        batch: images a step.
        learning_rate: its highest, of AdamW; a cosine to 0 after ``warmup`` steps.
        warmup: steps.
        ema: decay of the averaged weights that are measured instead of the last ones; 0 for none.
        labelled: the share of the training images that have labels.
        draw: which ones they are.
        unlabelled: a teacher's student sees the others, too.
        person_only: the student's one class is the teacher's class 0.
    """

    data: DataSet
    model: Model
    sees: str = "images"
    method: str = "none"
    seed: int = 0
    steps: int = 1000
    teacher: Run | None = None
    begins: Run | None = None
    position: int | None = 1
    batch: int = 8
    learning_rate: float = 1e-3
    warmup: int = 100
    ema: float = 0.0
    labelled: float = 1.0
    draw: int = 0
    unlabelled: bool = True
    person_only: bool = False


def run_of(content: Mapping[str, Any]) -> Run:
    """The run that a ``run.json`` describes; a setting that it lacks has its default."""
    values = dict(content)
    data = {**values.pop("data")}
    data["scales"] = tuple(data["scales"])
    for name in ("teacher", "begins"):
        values[name] = None if values.get(name) is None else run_of(values[name])
    return Run(DataSet(**data), Model(**values.pop("model")), **values)


def name_of(run: Run) -> str:
    """The name of a run's folder."""
    teacher = [] if run.teacher is None else ["from", *_names(run.teacher)]
    labels = [f"labels{run.labelled:g}"] if run.labelled < 1 else []
    labels += [f"draw{run.draw}"] if run.draw else []
    labels += [] if run.unlabelled else ["only"]
    after = [] if run.begins is None else [f"after{run.begins.steps}"]
    after += [f"of{run.begins.seed}"] if run.begins is not None and run.begins.seed else []
    names = [*_names(run), *labels, *teacher, *after]
    parts = [run.data.name, *names, run.method, str(run.steps), f"seed{run.seed}"]
    return "_".join(parts)


def _names(run: Run) -> list[str]:
    model, sees = run.model, [run.sees] if run.sees != "images" else []
    if model.family == "nanodet_g":
        return [model.family, *sees]
    return [
        model.family,
        model.backbone.replace("_", "-"),
        *(["imagenet"] if model.pretrained else []),
        *([f"width{model.width}"] if model.width != Model.width else []),
        *([f"stride{model.finest}"] if model.finest != STRIDES[0] else []),
        *sees,
    ]


# -- detectors ------------------------------------------------------------------------------------


class Unresized(GeneralizedRCNNTransform):
    """Normalises images and leaves their size as it is."""

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Both as they are."""
        return image, target


def build(model: Model, data: DataSet, nanodet: Path | None) -> nn.Module:
    """A detector for images of any size, which are not resized.

    Args:
        model: which.
        data: whose classes, and objects of what size.
        nanodet: the file of NanoDet-g's weights, for a model of that family.
    """
    if model.family == "nanodet_g":
        if nanodet is None:
            raise ValueError("NanoDet-g teaches: give --nanodet, the file of its weights")
        detector: Any = load_nanodet(nanodet)
    else:
        backbone = build_backbone(
            model.backbone,
            model.pretrained,
            model.width,
            fixed_norm=False,
            levels=model.levels,
            finest=model.finest,
        )
        detector = _with_head(model, backbone, data)
    transform = detector.transform
    detector.transform = Unresized(0, 0, transform.image_mean, transform.image_std)
    return detector


def _with_head(model: Model, backbone: nn.Module, data: DataSet) -> nn.Module:
    strides, classes = STRIDES[STRIDES.index(model.finest) : model.levels], data.classes
    if model.family == "nanodet":
        return NanoDet(backbone, classes, group_norm=True)
    if model.family in ("gfl", "atss"):
        kind, more = (GFL, {"reg_max": REG_MAX}) if model.family == "gfl" else (ATSS, {})
        options = {"strides": strides, "blocks": model.blocks, "anchor_scale": data.anchor_scale}
        return kind(backbone, classes, **options, **more)
    if model.family == "fcos":
        anchors = AnchorGenerator(
            tuple((s * data.anchor_scale / 8,) for s in strides), ((1.0,),) * len(strides)
        )
        return FCOS(backbone, classes, anchor_generator=anchors)
    bases = [s * data.anchor_scale / 2 for s in strides]
    octaves = tuple(tuple(int(base * 2 ** (third / 3)) for third in range(3)) for base in bases)
    anchors = AnchorGenerator(octaves, ((0.5, 1.0, 2.0),) * len(strides))
    head = RetinaNetHead(model.width, 9, classes, norm_layer=partial(nn.GroupNorm, 32))
    return RetinaNet(backbone, classes, anchor_generator=anchors, head=head)


def adapter(detector: nn.Module) -> Any:
    """Takes a detector of any of the families apart."""
    return NANODET(detector) if isinstance(detector, NanoDet) else adapter_of(detector)


# -- training -------------------------------------------------------------------------------------


@dataclass
class Training:
    """A run on its way.

    Attributes:
        run: what is trained.
        options: of the process.
        student: the detector.
        trained: the distiller around it, or the detector itself.
        averaged: its averaged weights; ``None`` without.
        step: how many steps are done.
        seconds: they took, evaluations left out.
        history: what was measured on the way.
    """

    run: Run
    options: Namespace
    student: nn.Module
    trained: nn.Module
    averaged: AveragedModel | None
    view: dict[str, list[Tensor]]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """What is needed to go on."""
        parts = {"trained": self.trained, "optimizer": self.optimizer, "schedule": self.schedule}
        states = {name: part.state_dict() for name, part in parts.items()}
        averaged = None if self.averaged is None else self.averaged.state_dict()
        numbers = {"step": self.step, "seconds": self.seconds, "history": self.history}
        return {**states, "averaged": averaged, **numbers, "random": _random_states(self.options.device)}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        for name in ("trained", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        torch.set_rng_state(state["random"][0].cpu())
        if len(state["random"]) > 1:
            torch.cuda.set_rng_state(state["random"][1].cpu(), self.options.device)

    def measured(self) -> nn.Module:
        """The detector that is measured."""
        return self.student if self.averaged is None else self.averaged.module


def _random_states(device: torch.device) -> list[Tensor]:
    """Of the generators that a method draws from, MGD for its masks."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def start(run: Run, options: Namespace) -> Training:
    """A run before its first step."""
    torch.manual_seed(run.seed)
    device = options.device
    if run.begins is None:
        student = build(run.model, run.data, options.nanodet)
    else:
        student = finished_model(run.begins, options)
    student.to(device).train()
    view: dict[str, list[Tensor]] = {}
    trained = student
    if run.teacher is not None:
        teacher = _teacher(run, run.teacher, student, options)
        if run.method != PSEUDO:
            trained = _distiller(run, run.teacher, teacher, student, view).train()
        if is_pseudo_labelled(run.method):
            trained = _pseudo_labelled(run, run.teacher, teacher, trained, view, options).train()
    if options.channels_last:
        trained.to(memory_format=torch.channels_last)
    if options.compile:
        student.backbone.compile(dynamic=False)
    averaged = None
    if run.ema:
        averaging = get_ema_multi_avg_fn(run.ema)
        averaged = AveragedModel(student, multi_avg_fn=averaging, use_buffers=True)
    # Normalisations and biases are not decayed.
    weights = [p for p in trained.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": 0.02},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=run.learning_rate)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / run.warmup) * 0.5 * (1 + math.cos(math.pi * step / run.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return Training(run, options, student, trained, averaged, view, optimizer, schedule)


def _teacher(run: Run, of_teacher: Run, student: nn.Module, options: Namespace) -> nn.Module:
    """A finished teacher, from which the student has inherited what it is to inherit."""
    teacher = finished_model(of_teacher, options).to(options.device).eval()
    if inherits(run.method):
        print(crosskd.inherit(student, teacher), flush=True)
    if of_teacher.model.family == "nanodet_g":
        return teacher  # which has no batch norm; a third of a MobileNetV2's forward on a CPU
    return crosskd.fold_batch_norm(teacher, [torch.rand(3, 256, 256, device=options.device)])


def _pseudo_labelled(
    run: Run,
    of_teacher: Run,
    teacher: nn.Module,
    trained: nn.Module,
    view: dict[str, list[Tensor]],
    options: Namespace,
) -> PseudoLabelled:
    if run.person_only:
        raise ValueError(f"{name_of(run)}: pseudo labels take a teacher with the student's classes")
    images = load_images(options.root, run.data, "val", options.cache, seen_folder(of_teacher))
    _, results = measure(teacher, of_teacher, images, "val", options)
    truth = coco_folder(options.root, run.data, "val").ground_truth()
    threshold = best_score(truth, results)
    print(f"the teacher's detections are labels from a score of {threshold:.3f} on", flush=True)
    scale = 2.0 if of_teacher.sees == "zoom" else 1.0
    return PseudoLabelled(trained, teacher, threshold, view, scale)


def _distiller(
    run: Run, of_teacher: Run, teacher: nn.Module, student: nn.Module, view: dict[str, list[Tensor]]
) -> Distiller:
    variant = VARIANTS.get(run.method, Variant("", run.method))
    settings = {"position": run.position, "tap": "post", "cls_weight": None, "reg_weight": None}
    options_of = Namespace(stop_distilling=None, teacher_short_side=None, **{**settings, **variant.settings})
    methods = make_methods(variant.name, options_of)
    forwards = 2 if run.unlabelled and run.labelled < 1 else 1  # a step: images with labels, then the others
    for method in methods:
        if variant.half:
            method.schedule = Schedule(stop=forwards * run.steps // 2)
        if variant.weight is not None and isinstance(method, MapMethod):
            method.weight = variant.weight
    more: dict[str, Any] = {}
    if of_teacher.sees != "images":
        more["teacher_view"] = lambda images, targets: view["teacher"]
    if of_teacher.sees == "zoom":
        more["view_scale"] = 2.0
    if run.person_only:
        more["class_map"] = [0]
    return Distiller(teacher, student, methods, adapter, teacher_adapter=adapter, **more)


def finished_model(run: Run, options: Namespace) -> nn.Module:
    """What a finished run has left, on the CPU; NanoDet-g as it is."""
    detector = build(replace(run.model, pretrained=False), run.data, options.nanodet)
    if run.model.family != "nanodet_g":
        path = options.output / name_of(run) / "model.pt"
        detector.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return detector


def train(training: Training, images: dict[str, Images], folder: Path) -> bool:
    """Trains to the end, or to the time limit.

    Args:
        training: from `start`, or as it was stopped.
        images: ``"train"`` and ``"val"``; and ``"teacher"``, what it sees, where that is another folder.
        folder: where the state is kept.

    Returns:
        Whether the run is at its end.
    """
    run, options = training.run, training.options
    state = folder / "state.pt"
    if state.exists():
        training.load(torch.load(state, map_location=options.device, weights_only=True))
    every = max(1, run.steps // options.evaluations)
    saved = time.monotonic()
    while training.step < run.steps:
        if time.time() > options.until or (options.output / "stop").exists():
            save_atomically(training.state(), state)
            return False
        begun = time.perf_counter()
        loss = _one_step(training, images)
        training.seconds += time.perf_counter() - begun
        if training.step % every == 0 and training.step < run.steps:
            metrics = measure(training.measured(), run, images["val"], "val", options, options.curve_images)[
                0
            ]
            entry = {"step": training.step, "AP": metrics["AP"], "loss": float(loss)}
            training.history.append(entry)
            print(json.dumps({**entry, "seconds": round(training.seconds)}), flush=True)
        if time.monotonic() - saved > options.save_seconds:
            save_atomically(training.state(), state)
            saved = time.monotonic()
    return True


def batches(
    training: Training, images: dict[str, Images]
) -> Iterator[tuple[list[Tensor], list[Target] | None]]:
    """A step's images with their objects; then others without, if there is a teacher to tell of them.

    What the teacher sees of a batch is in ``training.view`` until the next.
    """
    run, device = training.run, training.options.device
    labelled, others = _shares(run, len(images["train"].labels))
    seen = [labelled, others] if run.teacher is not None and run.unlabelled else [labelled]
    for offset, among in enumerate(seen):
        if not among:
            continue
        seed = 2 * run.seed + offset
        chosen = [among[n] for n in chosen_images(len(among), run.batch, seed, training.step)]
        generator = torch.Generator().manual_seed(hash((seed, training.step, 1)) % 2**63)
        window, targets = draw_windows(images["train"], chosen, run.data, generator)
        of_student = images["teacher" if run.teacher is None and run.sees == "pair" else "train"]
        given = _crops(run, of_student, chosen, window, device)
        if run.teacher is not None and run.teacher.sees != "images":
            of_teacher = images["teacher" if run.teacher.sees == "pair" else "train"]
            training.view["teacher"] = _crops(run.teacher, of_teacher, chosen, window, device)
        factor = 2.0 if run.sees == "zoom" else 1.0
        objects = [
            {"boxes": factor * target["boxes"].to(device), "labels": target["labels"].to(device)}
            for target in targets
        ]
        yield given, objects if offset == 0 else None


def _one_step(training: Training, images: dict[str, Images]) -> Tensor:
    device = training.options.device
    autocast = torch.autocast(device.type, torch.bfloat16) if training.options.bf16 else nullcontext()
    losses: list[Tensor] = []
    for given, objects in batches(training, images):
        with autocast:
            losses += training.trained(given, objects).values()
    total = torch.stack([loss.float() for loss in losses]).sum()
    if training.step % 50 == 0 and not torch.isfinite(total):
        raise FloatingPointError(f"the loss is {float(total)} at step {training.step}")
    training.optimizer.zero_grad(set_to_none=True)
    total.backward()
    nn.utils.clip_grad_norm_(training.trained.parameters(), 5.0)
    training.optimizer.step()
    training.schedule.step()
    if training.averaged is not None:
        training.averaged.update_parameters(training.student)
    training.step += 1
    return total.detach()


def _crops(run: Run, images: Images, chosen: list[int], window: Window, device: torch.device) -> list[Tensor]:
    """A batch as the model of a run sees it."""
    zoom = 2 if run.sees == "zoom" else 1
    finer = max(1, round(1 / (run.data.shown * zoom)))
    return crops(images.pixels, chosen, window, run.data.crop * zoom, device, finer=finer)


def _shares(run: Run, count: int) -> tuple[list[int], list[int]]:
    """The images with labels and those without, the same for every seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(run.draw)).tolist()
    labelled = max(1, round(run.labelled * count))
    return order[:labelled], order[labelled:]


# -- measuring ------------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    detector: nn.Module, run: Run, images: Images, split: str, options: Namespace, count: int | None = None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """COCO's metrics on whole images of a split, and the detections in COCO's result form.

    Args:
        detector: what is measured.
        run: whose.
        images: of the split, as the detector sees them.
        split: its name.
        options: of the process.
        count: so many images alone, the first.
    """
    was_training = detector.training
    detector.eval()
    folder = coco_folder(options.root, run.data, split)
    folder.ids = folder.ids[:count]
    scale = run.data.shown * (2 if run.sees == "zoom" else 1)
    results = []
    for begin in range(0, len(folder.ids), run.batch):
        chosen = range(begin, min(begin + run.batch, len(folder.ids)))
        given = whole_images(images, chosen, options.device, scale)
        for index, output in zip(chosen, detector(given), strict=True):
            factor = float(images.factors[index]) * scale
            found = {**output, "boxes": output["boxes"] / factor}
            results += coco_results(folder, folder.ids[index], found)
    detector.train(was_training)
    return coco_metrics(folder.ground_truth(), results), results


def finish(training: Training, images: Images, folder: Path) -> None:
    """Measures a trained run on the validation split and writes what is left of it."""
    run, options = training.run, training.options
    detector = training.measured()
    save_atomically(detector.state_dict(), folder / "model.pt")
    metrics, results = measure(detector, run, images, "val", options)
    shown = coco_folder(options.root, run.data, "val")
    shown.ids = shown.ids[: options.curve_images]
    on_curve = coco_metrics(shown.ground_truth(), [r for r in results if r["image_id"] in shown.ids])
    training.history.append({"step": training.step, "AP": on_curve["AP"]})
    cuda = options.device.type == "cuda"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {
        "val": metrics,
        "history": training.history,
        "seconds": training.seconds,
        "memory": torch.cuda.max_memory_allocated() / 2**20 if cuda else peak,
        "parameters": sum(p.numel() for p in training.student.parameters()),
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    (folder / "state.pt").unlink(missing_ok=True)


def measure_on_test(run: Run, options: Namespace, folder: Path) -> None:
    """Looks at the test split, once."""
    detector = finished_model(run, options).to(options.device)
    images = load_images(options.root, run.data, "test", options.cache, seen_folder(run))
    metrics, results = measure(detector, run, images, "test", options)
    (folder / "detections_test.json").write_text(json.dumps(results))
    (folder / "test.json").write_text(json.dumps(metrics))


def seen_folder(run: Run) -> str:
    """The folder of what a run's model sees."""
    return run.data.pair or "images" if run.sees == "pair" else "images"


def work(folder: Path, options: Namespace) -> None:
    """Does what is not done yet of a run."""
    run = run_of(json.loads((folder / "run.json").read_text()))
    lock = locked(folder, wait=True)  # another call may be at this run: what it leaves is taken then
    if not (folder / "result.json").exists():
        splits = {"train": ("train", "images"), "val": ("val", seen_folder(run))}
        seer = run if run.teacher is None else run.teacher
        if seer.sees == "pair":
            splits["teacher"] = ("train", seen_folder(seer))
        images = {
            name: load_images(options.root, run.data, split, options.cache, where)
            for name, (split, where) in splits.items()
        }
        if options.device.type == "cuda":
            images = {name: of_split.to(options.device) for name, of_split in images.items()}
        training = start(run, options)
        if run.model.family != "nanodet_g" and not train(training, images, folder):
            print("stopped, to go on from here", flush=True)
            return
        finish(training, images["val"], folder)
    if options.test and not (folder / "test.json").exists():
        measure_on_test(run, options, folder)
    lock.close()


def parse(arguments: list[str] | None = None) -> Namespace:
    """The options of a process, which don't change what a run is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="of the run, with its run.json")
    add("--root", type=Path, required=True, help="folder of the data sets")
    add("--output", type=Path, required=True, help="folder of all runs")
    add("--cache", type=Path, required=True, help="folder of decoded images")
    add("--nanodet", type=Path, help="NanoDet-g's weights")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--threads", type=int, default=1)
    add("--until", type=float, default=math.inf, help="stop at this time, in seconds since 1970")
    add("--test", action="store_true", help="measure on the test split, too")
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--compile", action="store_true", help="compile the student's backbone")
    add("--channels-last", action="store_true")
    add("--evaluations", type=int, default=10, help="points of a learning curve")
    add("--curve-images", type=int, default=100, help="validation images of each point")
    add("--save-seconds", type=float, default=60.0, help="between two savings of the state")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Does a run."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.device.type == "cuda":
        # No search for the fastest convolutions: it takes longer than what it saves of so short a run.
        torch.set_float32_matmul_precision("high")
    work(options.folder, options)


def as_json(run: Run) -> str:
    """What stands in ``run.json``."""
    return json.dumps(asdict(run), indent=1, sort_keys=True)


if __name__ == "__main__":
    main()
