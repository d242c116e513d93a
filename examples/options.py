"""The options of the training script, and what numbers they may have."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from augmentations import AUGMENTATIONS
from coco_data import require
from loggers import LOGGERS
from methods_table import ALONE, METHODS, PSEUDO, is_pseudo_labelled, make_methods
from models import MODEL_NAMES
from training import AMP_TYPES

# The smallest and the largest number that an option takes.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("shapes_train", "shapes_val", "epochs", "teacher_epochs"), (1, 1e9)),
    **dict.fromkeys(("batch_size", "accumulate", "evaluate_every", "eval_batch_size"), (1, 1e9)),
    **dict.fromkeys(("regions", "threads"), (1, 1e9)),
    **dict.fromkeys(("position", "stop_distilling", "workers", "warmup_steps", "seed"), (0, 2**62)),
    "checkpoint_every": (0, 1e9),
    **dict.fromkeys(("cls_weight", "reg_weight", "weight_decay", "clip"), (0, 1e9)),
    **dict.fromkeys(("learning_rate", "teacher_learning_rate"), (1e-12, 1e3)),
    "anchor_scale": (1e-3, 1e3),
    **dict.fromkeys(("short_side", "teacher_short_side"), (32, 1e5)),
    "long_side": (100, 1e5),
    **dict.fromkeys(("milestones", "teacher_labels"), (0, 1)),
    "ema": (0, 0.999999),
}
# What may differ where a run is taken up again: it decides no weight, or is looked at by its contents.
FREE = (
    *("output", "resume", "workers", "threads", "device", "compile", "compile_teacher", "logger"),
    *("evaluate_every", "checkpoint_every", "eval_batch_size", "method", "inherit", "root"),
    "teacher_cache",  # --teacher-cache-dtype, which rounds, is none without it
    "cache_images",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds all options; those without a default get it by the data."""
    _add_data_options(parser.add_argument_group("data"))
    _add_model_options(parser.add_argument_group("models"))
    _add_distillation_options(parser.add_argument_group("distillation"))
    _add_training_options(parser.add_argument_group("training"))
    _add_run_options(parser.add_argument_group("run"))


def check_ranges(options: Namespace) -> None:
    """Raises ``ValueError`` for a number, or a device, that an option can't have."""
    for name, (low, high) in RANGES.items():
        given = getattr(options, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not low <= value <= high:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} must be from {low:g} to {high:g}, got {value}")
    if options.width < 32 or options.width % 32:
        raise ValueError(f"--width must be a multiple of 32, got {options.width}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: PyTorch {torch.__version__} finds no GPU")


def check_data(options: Namespace) -> None:
    """Raises ``FileNotFoundError`` for a folder or file of the data that isn't there, saying what is."""
    require(options.root, folder=True, named=f"--root {options.root}: ")
    for name in ("train_images", "train_annotations", "val_images", "val_annotations"):
        given = getattr(options, name)
        named = f"--{name.replace('_', '-')} {given}, which is relative to --root: "
        require(options.root / given, folder=name.endswith("images"), named=named)
    if options.teacher_images is not None:
        named = f"--teacher-images {options.teacher_images}, which is relative to --root: "
        require(options.root / options.teacher_images, folder=True, named=named)


def check_companions(options: Namespace) -> None:
    """Raises ``ValueError`` for an option that does nothing without another one that isn't given."""
    methods = " ".join(options.method)
    pseudo = [method for method in options.method if is_pseudo_labelled(method)]
    if pseudo and options.unlabelled_images is None:
        raise ValueError(f"--method {pseudo[0]} needs --unlabelled-images, for the teacher to label")
    if options.teacher_labels is not None and not pseudo:
        raise ValueError(
            f"--teacher-labels {options.teacher_labels} is for the method {PSEUDO}, alone or beside others "
            f"({PSEUDO}+crosskd), got --method {methods}"
        )
    if options.teacher_cache_dtype != "none" and options.teacher_cache is None:
        raise ValueError("--teacher-cache-dtype needs --teacher-cache, the folder whose entries are kept so")
    taught = pseudo or any(make_methods(method, options) for method in options.method)
    for name in ("teacher_images", "teacher_short_side"):
        given = getattr(options, name)
        if given is not None and not taught:
            option = f"--{name.replace('_', '-')} {given}"
            raise ValueError(f"{option}: --method {methods} learns nothing from a teacher")


def check_teacher_images(options: Namespace) -> None:
    """Raises ``ValueError`` where ``--teacher-images`` stands beside options that it can't go with."""
    if options.teacher_images is None:
        return
    fault = None
    if options.data == "shapes":
        fault = "--data shapes makes images for the student alone: take --data coco"
    elif options.unlabelled_images is not None:
        fault = "--unlabelled-images can't go with it, for they have no second image"
    elif len(options.short_side) > 1:
        # The teacher resizes its own images, always to the last; the student's go to one that is drawn.
        sizes = " ".join(str(side) for side in options.short_side)
        fault = f"--short-side {sizes} would resize the student's images otherwise: take one"
    if fault is not None:
        raise ValueError(f"--teacher-images {options.teacher_images}: {fault}")


def shaping(options: Namespace) -> dict[str, Any]:
    """The options that decide a run's weights, as JSON can keep them."""
    chosen = {name: value for name, value in vars(options).items() if name not in FREE}
    return {name: str(value) if isinstance(value, Path) else value for name, value in chosen.items()}


def _add_data_options(group: Any) -> None:
    group.add_argument(
        "--data", choices=("shapes", "coco"), default="shapes", help="shapes are made, not downloaded"
    )
    group.add_argument(
        "--root", type=Path, help="folder of a COCO-format data set; the paths below are in it"
    )
    group.add_argument("--train-images", default="train2017")
    group.add_argument("--train-annotations", default="annotations/instances_train2017.json")
    group.add_argument("--val-images", default="val2017")
    group.add_argument("--val-annotations", default="annotations/instances_val2017.json")
    group.add_argument("--drop-empty", action="store_true", help="train without images that show no object")
    group.add_argument(
        "--unlabelled-images",
        type=Path,
        metavar="FOLDER",
        help="further images without labels, for all methods but none: as many a step as labelled",
    )
    group.add_argument(
        "--teacher-labels",
        type=float,
        metavar="SCORE",
        help="from which score on the teacher's detections are labels, with pseudo among --method; unless "
        "given, where its F1 is best on the validation images",
    )
    group.add_argument(
        "--teacher-images",
        metavar="FOLDER",
        help="in --root: the same scenes as the teacher sees them, under the file names of --train-images",
    )
    group.add_argument(
        "--cache-images",
        action="store_true",
        help="decode the training images once, into memory that the workers share; each process of several "
        "holds its own",
    )
    group.add_argument("--shapes-train", type=int, default=400, help="how many training images to make")
    group.add_argument("--shapes-val", type=int, default=100)


def _add_model_options(group: Any) -> None:
    group.add_argument("--teacher", choices=MODEL_NAMES)
    group.add_argument("--student", choices=MODEL_NAMES)
    group.add_argument(
        "--teacher-weights",
        metavar="published|PATH",
        help="torchvision's published weights, trained on if the data's classes aren't COCO's; a file of a "
        "detector or distiller; for GFL and ATSS, a .pth file of mmdet's or its address. Trained if left out",
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
    group.add_argument(
        "--teacher-short-side",
        type=int,
        metavar="PIXELS",
        help="of the same images as the teacher sees them, its long side in proportion; as --short-side",
    )


def _add_distillation_options(group: Any) -> None:
    group.add_argument(
        "--method",
        nargs="+",
        metavar="METHOD",
        default=[ALONE, "crosskd"],
        help=f"one student each: {ALONE} (the student alone), {', '.join(METHODS)}, {PSEUDO} (the teacher's "
        "detections are labels of --unlabelled-images), or several joined by +",
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
    group.add_argument("--teacher-learning-rate", type=float, help="while it is trained, if another")
    group.add_argument("--weight-decay", type=float)
    group.add_argument("--schedule", choices=("step", "cosine"))
    group.add_argument(
        "--milestones", type=float, nargs="+", default=[2 / 3, 11 / 12], help="share of the run"
    )
    group.add_argument("--warmup-steps", type=int)
    group.add_argument("--clip", type=float, help="largest norm of the gradient; 0 for no limit")
    group.add_argument(
        "--augment",
        nargs="*",
        choices=tuple(AUGMENTATIONS),
        default=["flip"],
        help="in this order",
    )
    group.add_argument("--ema", type=float, default=0.0, help="decay of the averaged weights, as 0.999")
    group.add_argument("--amp", choices=tuple(AMP_TYPES), default="none")
    group.add_argument(
        "--teacher-dtype",
        choices=tuple(AMP_TYPES),
        default="none",
        help="what the teacher calculates in beside students in float32",
    )
    group.add_argument(
        "--fold-teacher", action="store_true", help="fold its batch norms into its convolutions"
    )
    group.add_argument("--compile-teacher", action="store_true", help="torch.compile its backbone alone")
    group.add_argument(
        "--teacher-cache",
        type=Path,
        metavar="FOLDER",
        help="keep what each method reads of the teacher, and read it where the same pixels come again",
    )
    group.add_argument(
        "--teacher-cache-dtype",
        choices=tuple(AMP_TYPES),
        default="none",
        help="what maps and predictions are kept in; as they were calculated if left out",
    )
    group.add_argument("--channels-last", action=argparse.BooleanOptionalAction)
    group.add_argument("--compile", action="store_true", help="torch.compile the training step")


def _add_run_options(group: Any) -> None:
    group.add_argument(
        "--output", type=Path, help="folder for everything that is written; runs/DATA without it"
    )
    group.add_argument("--resume", action="store_true", help="go on with what --output already holds")
    group.add_argument(
        "--checkpoint-every",
        type=int,
        default=1000,
        metavar="STEPS",
        help="within an epoch; 0 for its end alone",
    )
    group.add_argument("--evaluate-every", type=int, help="epochs")
    group.add_argument("--logger", choices=tuple(LOGGERS), default="none", help="of losses and metrics")
    group.add_argument("--eval-batch-size", type=int, default=8)
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--workers", type=int, help="processes that read images")
    group.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
