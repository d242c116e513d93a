r"""Distils a RetinaNet, FCOS, Faster R-CNN, GFL or ATSS: trains or loads a teacher, then students.

Without options it makes a small data set of textured shapes, trains a teacher, the student alone and the
student distilled by CrossKD, and writes metrics, curves and pictures to ``runs/shapes``::

    python examples/train_torchvision.py

On COCO 2017, eight GPUs, from torchvision's published RetinaNet-R50::

    torchrun --nproc_per_node=8 examples/train_torchvision.py --data coco --root data/coco \
        --teacher retinanet_resnet50 --teacher-weights published --student retinanet_resnet18 \
        --pretrained-backbone --method crosskd --epochs 12 --batch-size 2 --learning-rate 0.01 \
        --optimizer sgd --schedule step --amp bfloat16

The published headline, GFL-R50 from mmdet's GFL-R101 (its file, or the address of it)::

    torchrun --nproc_per_node=8 examples/train_torchvision.py --data coco --root data/coco \
        --teacher gfl_resnet101 --teacher-weights path/to/gfl_r101_fpn_mstrain_2x_coco.pth \
        --student gfl_resnet50 --pretrained-backbone --method crosskd --drop-empty --clip 0
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from coco_data import CocoFolder, training_loader
from dense_heads import adapter_of
from evaluation import METRICS, evaluate
from methods_table import (
    ALONE,
    INHERIT,
    METHODS,
    TEACHER,
    check_name,
    inherits,
    label_of,
    make_methods,
)
from models import (
    MODEL_NAMES,
    PUBLISHED,
    build_detector,
    first_label,
    is_of_mmdet,
    load_mmdet,
    load_published,
    load_weights,
)
from pictures import draw_curves, draw_detections
from processes import Processes, start, stop
from report import write_comparison
from shapes_data import write_shapes
from torch import nn
from training import AMP_TYPES, History, Trainer, memory_format, save_atomically

import crosskd
from crosskd import Distiller

# What fits each kind of data; each is an option as well.
DEFAULTS: dict[str, dict[str, Any]] = {
    "shapes": {
        "teacher": "retinanet_resnet18",
        "student": "retinanet_mobilenet_v3_large",
        "head_norm": "group",
        "width": 64,
        "anchor_scale": 0.5,
        "short_side": [80],
        "teacher_epochs": 7,
        "epochs": 5,
        "batch_size": 4,
        "optimizer": "adamw",
        "learning_rate": 1.5e-3,
        "weight_decay": 0.02,
        "schedule": "cosine",
        "warmup_steps": 50,
        "clip": 5.0,
        "evaluate_every": 2,
        "workers": 0,
        "channels_last": True,
    },
    "coco": {
        "teacher": "retinanet_resnet50",
        "student": "retinanet_resnet18",
        "head_norm": "none",
        "width": 256,
        "anchor_scale": 1.0,
        "short_side": [800],
        "teacher_epochs": 12,
        "epochs": 12,
        "batch_size": 2,
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "weight_decay": 1e-4,
        "schedule": "step",
        "warmup_steps": 500,
        "clip": 10.0,
        "evaluate_every": 4,
        "workers": 4,
        "channels_last": False,
    },
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, with the defaults of the chosen data."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    _add_data_options(parser.add_argument_group("data"))
    _add_model_options(parser.add_argument_group("models"))
    _add_distillation_options(parser.add_argument_group("distillation"))
    _add_training_options(parser.add_argument_group("training"))
    _add_run_options(parser.add_argument_group("run"))
    options = parser.parse_args(arguments)
    for name, value in DEFAULTS[options.data].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.data == "coco" and options.root is None:
        parser.error("--data coco needs --root, the folder that holds images and annotations")
    if options.teacher_weights == "published" and options.teacher not in PUBLISHED:
        parser.error(f"torchvision publishes detection weights for {', '.join(PUBLISHED)} only")
    try:
        for name in options.method:
            check_name(name)
    except ValueError as error:
        parser.error(f"--method: {error}")
    if options.method != [ALONE] and first_label(options.teacher) != first_label(options.student):
        parser.error(f"{options.student} can't learn from {options.teacher}: take two of one family")
    if len(set(options.method)) < len(options.method):
        parser.error("--method names a method twice")
    if options.inherit:
        options.method = [name if inherits(name) else f"{name}+{INHERIT}" for name in options.method]
    options.output = options.output or Path("runs") / options.data
    return options


def _add_data_options(group: Any) -> None:
    group.add_argument(
        "--data", choices=tuple(DEFAULTS), default="shapes", help="shapes are made, not downloaded"
    )
    group.add_argument(
        "--root", type=Path, help="folder of a COCO-format data set; the paths below are in it"
    )
    group.add_argument("--train-images", default="train2017")
    group.add_argument("--train-annotations", default="annotations/instances_train2017.json")
    group.add_argument("--val-images", default="val2017")
    group.add_argument("--val-annotations", default="annotations/instances_val2017.json")
    group.add_argument("--drop-empty", action="store_true", help="train without images that show no object")
    group.add_argument("--shapes-train", type=int, default=400, help="how many training images to make")
    group.add_argument("--shapes-val", type=int, default=100)


def _add_model_options(group: Any) -> None:
    group.add_argument("--teacher", choices=MODEL_NAMES)
    group.add_argument("--student", choices=MODEL_NAMES)
    group.add_argument(
        "--teacher-weights",
        metavar="published|PATH",
        help="torchvision's published weights; the file of a detector or a distiller; or, for GFL and ATSS, "
        "a .pth file of mmdet's or its address. Trained if left out",
    )
    group.add_argument("--student-weights", type=Path, metavar="PATH", help="start the student from a file")
    group.add_argument(
        "--pretrained-backbone", action="store_true", help="torchvision's ImageNet weights (download)"
    )
    group.add_argument("--head-norm", choices=("none", "group"), help="of RetinaNet's towers")
    group.add_argument("--width", type=int, help="channels of pyramid and towers")
    group.add_argument("--anchor-scale", type=float, help="multiplies the anchors' sizes")
    group.add_argument(
        "--regions", type=int, default=512, help="an image's that train Faster R-CNN's box head"
    )
    group.add_argument(
        "--short-side", type=int, nargs="+", help="pixels; several for scale jitter, the last to test"
    )
    group.add_argument("--long-side", type=int, default=1333, help="pixels, at most")


def _add_distillation_options(group: Any) -> None:
    group.add_argument(
        "--method",
        nargs="+",
        metavar="METHOD",
        default=[ALONE, "crosskd"],
        help=f"one student each: {ALONE} (the student alone), {', '.join(METHODS)}, or several joined by +",
    )
    group.add_argument(
        "--inherit",
        action="store_true",
        help="start every student's neck and head from the teacher's weights, as METHOD+inherit does for one",
    )
    group.add_argument("--position", type=int, help="of the split; without it the published or the last one")
    group.add_argument("--tap", choices=("post", "pre"), default="post")
    group.add_argument("--cls-weight", type=float)
    group.add_argument("--reg-weight", type=float)
    group.add_argument(
        "--stop-distilling", type=int, metavar="EPOCH", help="from this epoch on, ground truth alone"
    )


def _add_training_options(group: Any) -> None:
    group.add_argument("--epochs", type=int, help="of each student")
    group.add_argument("--teacher-epochs", type=int)
    group.add_argument("--batch-size", type=int, help="images a process and step part")
    group.add_argument("--accumulate", type=int, default=1, help="step parts whose gradients are added up")
    group.add_argument("--optimizer", choices=("sgd", "adamw"))
    group.add_argument("--learning-rate", type=float)
    group.add_argument("--weight-decay", type=float)
    group.add_argument("--schedule", choices=("step", "cosine"))
    group.add_argument(
        "--milestones", type=float, nargs="+", default=[2 / 3, 11 / 12], help="share of the run"
    )
    group.add_argument("--warmup-steps", type=int)
    group.add_argument("--clip", type=float, help="largest norm of the gradient; 0 for no limit")
    group.add_argument("--flip", type=float, default=0.5, help="how likely an image is flipped")
    group.add_argument("--amp", choices=tuple(AMP_TYPES), default="none")
    group.add_argument("--channels-last", action=argparse.BooleanOptionalAction)
    group.add_argument("--compile", action="store_true", help="torch.compile the training step")


def _add_run_options(group: Any) -> None:
    group.add_argument(
        "--output", type=Path, help="folder for everything that is written; runs/DATA without it"
    )
    group.add_argument("--resume", action="store_true", help="go on with what --output already holds")
    group.add_argument("--evaluate-every", type=int, help="epochs")
    group.add_argument("--eval-batch-size", type=int, default=8)
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--workers", type=int, help="processes that read images")
    group.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


# ---------------------------------------------------------------------------------------------


def make_data(options: argparse.Namespace, processes: Processes) -> tuple[CocoFolder, CocoFolder]:
    """Training and validation data."""
    names = {
        "train": (options.train_images, options.train_annotations),
        "val": (options.val_images, options.val_annotations),
    }
    root = options.root
    if options.data == "shapes":
        root = options.output / "data"
        if processes.is_first:
            write_shapes(root, train=options.shapes_train, val=options.shapes_val, seed=options.seed)
        processes.wait()
        names = {split: (split, f"annotations/{split}.json") for split in names}
    labels: dict[str, Any] = {
        "raw_labels": options.teacher_weights == "published",
        "first_label": first_label(options.student),
    }
    (train_images, train_file), (val_images, val_file) = names["train"], names["val"]
    train = CocoFolder(
        root / train_images,
        root / train_file,
        **labels,
        seed=options.seed,
        flip=options.flip,
        keep_empty=not options.drop_empty,
    )
    val = CocoFolder(root / val_images, root / val_file, **labels)
    if train.names != val.names:
        raise ValueError(f"training data knows the categories {train.names}, validation data {val.names}")
    processes.say(f"training   {train.summary()}\nvalidation {val.summary()}")
    return train, val


def new_detector(name: str, options: argparse.Namespace, classes: int) -> nn.Module:
    """A detector with the weights that the seed gives."""
    torch.manual_seed(options.seed)
    return build_detector(
        name,
        classes,
        pretrained_backbone=options.pretrained_backbone,
        width=options.width,
        head_norm=options.head_norm,
        anchor_scale=options.anchor_scale,
        regions=options.regions,
        short_side=options.short_side,
        long_side=options.long_side,
    )


def make_teacher(
    options: argparse.Namespace, data: tuple[CocoFolder, CocoFolder], processes: Processes
) -> tuple[nn.Module, History]:
    """Loads a teacher, or trains one on the ground truth."""
    if options.teacher_weights == "published":
        return load_published(options.teacher, options), []
    if options.teacher_weights is not None and is_of_mmdet(options.teacher, options.teacher_weights):
        return load_mmdet_teacher(options, data[0], processes), []
    teacher = new_detector(options.teacher, options, data[0].num_classes)
    if options.teacher_weights is not None:
        load_weights(teacher, Path(options.teacher_weights))
        return teacher, []
    return teacher, train(teacher, "teacher", options.teacher_epochs, options, data, processes)


def load_mmdet_teacher(options: argparse.Namespace, data: CocoFolder, processes: Processes) -> nn.Module:
    """A teacher with the weights of an mmdet file, which one process downloads."""
    if not processes.is_first:
        processes.wait()
    teacher = load_mmdet(options.teacher, options.teacher_weights, options)
    if processes.is_first:
        processes.wait()
    if teacher.num_classes != data.num_classes:
        shown = ", ".join(data.names[:5]) + (", ..." if len(data.names) > 5 else "")
        raise ValueError(
            f"{options.teacher_weights} knows {teacher.num_classes} classes, the data {data.num_classes} "
            f"categories ({shown}): it must have been trained on the same ones, "
            "numbered in the order of their ids"
        )
    return teacher


def make_student(options: argparse.Namespace, classes: int) -> nn.Module:
    """The student, the same for every method."""
    student = new_detector(options.student, options, classes)
    if options.student_weights is not None:
        load_weights(student, options.student_weights)
    return student


def with_method(
    name: str, student: nn.Module, teacher: nn.Module | None, options: argparse.Namespace
) -> nn.Module:
    """The student in a distiller, or alone."""
    methods = make_methods(name, options)
    if not methods or teacher is None:
        return student
    # Of GFL and ATSS the library knows nothing: their adapters are in examples/dense_heads.
    return Distiller(teacher, student, methods, adapter_of)


def train(
    model: nn.Module,
    name: str,
    epochs: int,
    options: argparse.Namespace,
    data: tuple[CocoFolder, CocoFolder],
    processes: Processes,
) -> History:
    """Trains one model and writes its weights, as the plain detector's, to ``OUTPUT/NAME.pt``."""
    train_data, val_data = data
    folder = options.output / name
    if processes.is_first:
        folder.mkdir(parents=True, exist_ok=True)
    loader = training_loader(
        train_data,
        options.batch_size,
        seed=options.seed,
        workers=options.workers,
        rank=processes.rank,
        ranks=processes.ranks,
    )
    trainer = Trainer(model, loader, folder, options, epochs, processes)
    history = trainer.run(lambda detector: measure(detector, val_data, options, processes))
    if processes.is_first:
        save_atomically(trainer.detector.state_dict(), options.output / f"{name}.pt")
    return history


def measure(
    detector: nn.Module, data: CocoFolder, options: argparse.Namespace, processes: Processes
) -> dict[str, float]:
    """COCO's metrics on the validation data."""
    return evaluate(detector, data, batch_size=options.eval_batch_size, device=processes.device)


# ---------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """The whole job; returns what is written to ``metrics.json``."""
    if options.threads:
        torch.set_num_threads(options.threads)
    warn_of_slow_bfloat16(options, processes)
    options.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    data = make_data(options, processes)
    models: dict[str, nn.Module] = {}
    histories: dict[str, History] = {}
    results: dict[str, dict[str, float]] = {}
    teacher = None
    if options.method != [ALONE]:
        teacher, histories["teacher"] = make_teacher(options, data, processes)
        models["teacher"] = teacher.to(processes.device, memory_format=memory_format(options))
        results["teacher"] = _final(histories["teacher"]) or measure(teacher, data[1], options, processes)
    for method in options.method:
        student = make_student(options, data[0].num_classes)
        if inherits(method) and teacher is not None:
            processes.say(f"{method}: {crosskd.inherit(student, teacher)}")
        model = with_method(method, student, teacher, options)
        histories[method] = train(model, method, options.epochs, options, data, processes)
        models[method] = student
        results[method] = _final(histories[method])
    metrics = {
        "results": results,
        "histories": histories,
        "options": {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()},
        "versions": versions(processes),
        "seconds": time.perf_counter() - started,
    }
    if processes.is_first:
        write_report(metrics, models, data[1], options, processes)
    return metrics


def _final(history: History) -> dict[str, float]:
    return dict(history[-1]["metrics"]) if history else {}


def write_report(
    metrics: dict[str, Any],
    models: dict[str, nn.Module],
    val: CocoFolder,
    options: argparse.Namespace,
    processes: Processes,
) -> None:
    """Writes metrics, curves and pictures, and prints the table."""
    (options.output / "metrics.json").write_text(json.dumps(metrics, indent=2))
    draw_curves({name: h for name, h in metrics["histories"].items() if h}, options.output / "curves.png")
    draw_detections(models, val, options.output / "detections.png", device=processes.device)
    write_comparison(models, val, options.output, batch_size=options.eval_batch_size, device=processes.device)
    width = max(20, *(len(label_of(name)) + 2 for name in metrics["results"]))
    print(f"\n{'':<{width}}{'model':<30}" + "".join(f"{name:>11}" for name in METRICS))
    for name, result in metrics["results"].items():
        model = options.teacher if name == TEACHER else options.student
        print(f"{label_of(name):<{width}}{model:<30}" + "".join(f"{result[m]:>11.1f}" for m in METRICS))
    print(f"\n{metrics['seconds']:.0f} s; weights, metrics, curves and pictures are in {options.output}/")


def versions(processes: Processes) -> dict[str, str]:
    """What the numbers were made with."""
    device = processes.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return {
        "crosskd": crosskd.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "device": name,
        "processes": str(processes.ranks),
    }


def warn_of_slow_bfloat16(options: argparse.Namespace, processes: Processes) -> None:
    """Says so where a CPU only emulates bfloat16: it is then hundreds of times slower than float32."""
    if options.amp == "none" or processes.device.type != "cpu":
        return
    left, seconds = torch.rand(256, 256), {}
    for dtype in (torch.float32, AMP_TYPES[options.amp]):
        operand = left.to(dtype)
        operand @ operand
        begun = time.perf_counter()
        operand @ operand
        seconds[dtype] = time.perf_counter() - begun
    ratio = seconds[AMP_TYPES[options.amp]] / seconds[torch.float32]
    if ratio > 4:
        processes.say(
            f"this CPU multiplies {options.amp} matrices {ratio:.0f} times slower than float32: --amp none "
            "will train faster"
        )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the script with its command line, or with the given arguments."""
    options = parse(arguments)
    processes = start(options.device)
    try:
        return run(options, processes)
    finally:
        stop()


if __name__ == "__main__":
    main()
