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
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torchvision
from augmentations import AUGMENTATIONS
from coco_data import CocoFolder, collate, same_images, teacher_images, training_loader
from dense_heads import adapter_of
from evaluation import METRICS, best_score, detect_together, evaluate
from loggers import LOGGERS, Log
from methods_table import (
    ALONE,
    INHERIT,
    TEACHER,
    check_name,
    inherits,
    is_pseudo_labelled,
    label_of,
    make_methods,
)
from models import (
    PUBLISHED,
    build_detector,
    first_label,
    is_of_mmdet,
    load_mmdet,
    load_published,
    load_weights,
    published_classes,
    read_state,
    replace_classes,
)
from options import (
    add_options,
    check_companions,
    check_data,
    check_ranges,
    check_teacher_images,
    shaping,
)
from pictures import draw_curves, draw_detections
from processes import Processes, start, stop
from report import write_comparison
from run_folder import claim, fingerprint, save_atomically
from shapes_data import write_shapes
from torch import Tensor, nn
from training import AMP_TYPES, History, Trainer, detected, memory_format, share_buffers

import crosskd
from crosskd import Distiller, TeacherCache

# What fits each kind of data; each is an option as well.
DEFAULTS: dict[str, dict[str, Any]] = {
    "shapes": {
        "teacher": "retinanet_resnet18",
        "student": "retinanet_mobilenet_v3_large",
        "head_norm": "group",
        "width": 64,
        "anchor_scale": 0.75,
        "short_side": [96],
        "teacher_epochs": 8,
        "epochs": 4,
        "batch_size": 8,
        "optimizer": "adamw",
        "learning_rate": 2e-3,
        "weight_decay": 0.02,
        "schedule": "cosine",
        "warmup_steps": 50,
        "clip": 5.0,
        "evaluate_every": 1,
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


# What the loop of this script alone does.
OWN_OPTIONS = (
    *("resume", "checkpoint_every", "evaluate_every", "logger"),
    *("ema", "compile", "unlabelled_images", "teacher_cache"),
)


def parse(
    arguments: list[str] | None = None,
    *,
    parents: Sequence[argparse.ArgumentParser] = (),
    refused: Sequence[str] = (),
) -> argparse.Namespace:
    """The options, with the defaults of the chosen data.

    Args:
        arguments: the command line's unless given.
        parents: further options, of a script with another loop.
        refused: options that it doesn't take.
    """
    parser = argparse.ArgumentParser(
        parents=parents,
        usage="%(prog)s [--help] [OPTION ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    options = parser.parse_args(arguments)
    refuse(refused, parser, arguments)
    for name, value in DEFAULTS[options.data].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.data == "coco" and options.root is None:
        parser.error("--data coco needs --root, the folder that holds images and annotations")
    if options.teacher_weights == "published" and options.teacher not in PUBLISHED:
        parser.error(f"torchvision publishes detection weights for {', '.join(PUBLISHED)} only")
    try:
        check_companions(options)
        check_ranges(options)
        for name in options.method:
            check_name(name)
        if options.data == "coco":
            check_data(options)
        check_teacher_images(options)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if options.method != [ALONE] and first_label(options.teacher) != first_label(options.student):
        parser.error(f"{options.student} can't learn from {options.teacher}: take two of one family")
    if len(set(options.method)) < len(options.method):
        parser.error("--method names a method twice")
    if options.inherit:
        options.method = [name if inherits(name) else f"{name}+{INHERIT}" for name in options.method]
    options.output = options.output or Path("runs") / options.data
    return options


def refuse(names: Sequence[str], parser: argparse.ArgumentParser, arguments: list[str] | None) -> None:
    """Ends the program if any of these options is given, be it as its default."""
    without_defaults = argparse.Namespace(**dict.fromkeys(names))
    options = vars(parser.parse_args(arguments, without_defaults))
    given = [f"--{name.replace('_', '-')}" for name in names if options[name] is not None]
    if given:
        parser.error(f"{', '.join(given)}: for the loop of train_torchvision.py alone")


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
        "published": published_classes(options.teacher) if options.teacher_weights == "published" else (),
        "first_label": first_label(options.student),
    }
    (train_images, train_file), (val_images, val_file) = names["train"], names["val"]
    train = CocoFolder(
        root / train_images,
        root / train_file,
        **labels,
        seed=options.seed,
        augment=[AUGMENTATIONS[name] for name in options.augment],
        keep_empty=not options.drop_empty,
        unlabelled=options.unlabelled_images,
        teacher_images=None if options.teacher_images is None else root / options.teacher_images,
        cache_images=options.cache_images,
        processes=processes,
    )
    val = CocoFolder(root / val_images, root / val_file, **labels, processes=processes)
    if (train.names, train.label_of) != (val.names, val.label_of):
        raise ValueError(f"training data knows the categories {train.names}, validation data {val.names}")
    processes.say(f"training   {train.summary()}\nvalidation {val.summary()}")
    return train, val


def new_detector(
    name: str, options: argparse.Namespace, classes: int, weights: Path | None = None
) -> nn.Module:
    """A detector with the weights of a file, or those that the seed gives."""
    fixed_norm = options.pretrained_backbone
    if weights is not None:  # batch norm that doesn't count its batches is fixed, as published detectors' is
        fixed_norm = not any(key.endswith("num_batches_tracked") for key in read_state(weights))
    torch.manual_seed(options.seed)
    detector = build_detector(
        name,
        classes,
        pretrained_backbone=options.pretrained_backbone and weights is None,
        fixed_norm=fixed_norm,
        width=options.width,
        head_norm=options.head_norm,
        anchor_scale=options.anchor_scale,
        regions=options.regions,
        short_side=options.short_side,
        long_side=options.long_side,
    )
    if weights is not None:
        load_weights(detector, weights)
    return detector


def teacher_options(options: argparse.Namespace) -> argparse.Namespace:
    """The options as the teacher takes them: with its own learning rate and size of images."""
    own = argparse.Namespace(**vars(options))
    own.learning_rate = options.teacher_learning_rate or options.learning_rate
    if options.teacher_short_side is not None:
        # The long side in proportion: of each image the teacher sees the same multiple of the student's.
        own.short_side = [options.teacher_short_side]
        own.long_side = round(options.long_side * options.teacher_short_side / options.short_side[-1])
    return own


def make_teacher(
    options: argparse.Namespace, data: CocoFolder, processes: Processes
) -> tuple[nn.Module, bool]:
    """The teacher, and whether it is to be trained first."""
    options = teacher_options(options)
    if options.teacher_weights == "published":
        teacher = load_published(options.teacher, options)
        if not data.is_published:
            torch.manual_seed(options.seed)
            replace_classes(teacher, data.num_classes)
            processes.say(
                f"{options.teacher}: published weights with a new classification layer for {len(data.names)} "
                f"categories, to be trained for {options.teacher_epochs} epochs"
            )
        return teacher, not data.is_published
    if options.teacher_weights is not None and is_of_mmdet(options.teacher, options.teacher_weights):
        return load_mmdet_teacher(options, data, processes), False
    weights = None if options.teacher_weights is None else Path(options.teacher_weights)
    return new_detector(options.teacher, options, data.num_classes, weights), weights is None


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
    return new_detector(options.student, options, classes, options.student_weights)


def with_method(
    name: str,
    student: nn.Module,
    teacher: nn.Module | None,
    options: argparse.Namespace,
    cache: TeacherCache | None = None,
) -> nn.Module:
    """The student in a distiller, or alone."""
    methods = make_methods(name, options)
    if not methods or teacher is None:
        return student
    # Of GFL and ATSS the library knows nothing: their adapters are in examples/dense_heads.
    dtype = AMP_TYPES[options.teacher_dtype]
    if options.fold_teacher:
        noise = torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0))
        teacher = crosskd.fold_batch_norm(teacher, [noise.to(next(teacher.parameters()).device)])
    view = None
    if options.teacher_images is not None:
        view = teacher_images
    elif options.teacher_short_side is not None:
        view = same_images
    distiller = Distiller(
        teacher,
        student,
        methods,
        adapter_of,
        teacher_view=view,
        resize_levels=options.teacher_short_side is not None,
        teacher_dtype=dtype,
        teacher_cache=cache,
    )
    if options.compile_teacher:
        distiller.teacher.get_submodule("backbone").compile()
    return distiller


def cache_for(name: str, options: argparse.Namespace) -> TeacherCache | None:
    """The folder in ``--teacher-cache`` that all runs of a method share; ``None`` without the option."""
    if options.teacher_cache is None or not make_methods(name, options):
        return None
    return TeacherCache(options.teacher_cache / name, dtype=AMP_TYPES[options.teacher_cache_dtype])


def train(
    model: nn.Module,
    name: str,
    epochs: int,
    options: argparse.Namespace,
    data: tuple[CocoFolder, CocoFolder],
    processes: Processes,
    log: Log,
    label: Callable[[list[Tensor]], list[dict[str, Tensor]]] | None = None,
) -> tuple[nn.Module, History]:
    """Trains one model and writes its weights, as the plain detector's, to ``OUTPUT/NAME.pt``."""
    train_data, val_data = data
    is_taught = isinstance(model, Distiller) or label is not None
    train_data.draws_unlabelled = bool(train_data.unlabelled) and is_taught
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
    trainer = Trainer(model, loader, folder, options, epochs, processes, log, label)
    history = trainer.run(lambda detector: measure(detector, val_data, options, processes))
    if processes.is_first:
        save_atomically(trainer.detector.state_dict(), options.output / f"{name}.pt")
    return trainer.detector, history


def try_out(
    options: argparse.Namespace, data: CocoFolder, teacher: nn.Module | None, processes: Processes
) -> None:
    """One forward of every student in its distiller: what can't work fails before anything is trained."""
    shown = data.counts.nonzero()[0][:2].tolist()
    images, targets = collate([data[index] for index in shown])
    images = [image.to(processes.device) for image in images]
    targets = [{name: value.to(processes.device) for name, value in target.items()} for target in targets]
    for method in options.method:
        student = make_student(options, data.num_classes)
        if inherits(method) and teacher is not None:
            crosskd.inherit(student, teacher)
        try:
            model = with_method(method, student, teacher, options).to(processes.device).train()
            if isinstance(model, Distiller):
                model.set_epoch(0)
            with warnings.catch_warnings():  # a teacher that is not trained yet is no reason to warn
                warnings.simplefilter("ignore")
                model(images, targets)
                if data.unlabelled and isinstance(model, Distiller):
                    model(images, None)
        except ValueError as error:
            raise ValueError(f"--method {method}: {error}") from error


def measure(
    detector: nn.Module, data: CocoFolder, options: argparse.Namespace, processes: Processes
) -> dict[str, float]:
    """COCO's metrics on the validation data."""
    size, workers = options.eval_batch_size, options.workers
    return evaluate(detector, data, batch_size=size, device=processes.device, workers=workers)


def labels_of(
    teacher: nn.Module, data: CocoFolder, options: argparse.Namespace, processes: Processes
) -> Callable[[list[Tensor]], list[dict[str, Tensor]]]:
    """Makes targets of what the teacher detects, from the score of ``--teacher-labels`` on."""
    score = options.teacher_labels
    if score is None:
        size, workers = options.eval_batch_size, options.workers
        results, _ = detect_together(teacher, data, batch_size=size, device=processes.device, workers=workers)
        score = processes.from_first(lambda: best_score(data.ground_truth(), results))
        if math.isinf(score):
            raise ValueError(
                "the teacher detects nothing on the validation images: there are no labels to take"
            )
        processes.say(f"the teacher's F1 on the validation images is best from a score of {score:.3f} on")
    return partial(detected, teacher, score=score)


# ---------------------------------------------------------------------------------------------


def prepare(
    options: argparse.Namespace, processes: Processes
) -> tuple[tuple[CocoFolder, CocoFolder], nn.Module | None, bool, BinaryIO | None]:
    """Everything that can go wrong before training: data, weights, the students, and the run's folder.

    Returns:
        The data, the teacher, whether it is to be trained, and the folder's lock.

    Raises:
        SystemExit: by one sentence.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    warn_of_slow_bfloat16(options, processes)
    try:
        return _prepare(options, processes)
    except (ValueError, OSError) as error:  # the user's to mend; of what fails later, the traceback helps
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {error}") from error


def _prepare(
    options: argparse.Namespace, processes: Processes
) -> tuple[tuple[CocoFolder, CocoFolder], nn.Module | None, bool, BinaryIO | None]:
    # A folder that is there is looked at first; a new one is made when all else is well.
    at_once = options.data == "shapes" or options.output.exists()
    lock = take_folder(options, processes) if at_once else None
    data = make_data(options, processes)
    teacher, untrained = None, False
    if options.method != [ALONE]:
        teacher, untrained = make_teacher(options, data[0], processes)
    if untrained and options.teacher_images is not None:
        raise ValueError(
            f"--teacher-images {options.teacher_images}: {options.teacher} isn't trained, and would be on "
            f"the student's images. Train it by itself (--train-images {options.teacher_images} --method "
            f"none --student {options.teacher}), and name its file by --teacher-weights"
        )
    try_out(options, data[0], teacher, processes)
    for method in options.method:
        cache_for(method, options)  # whose folder may be none
    return data, teacher, untrained, lock if at_once else take_folder(options, processes)


def take_folder(options: argparse.Namespace, processes: Processes) -> BinaryIO | None:
    """The lock of the run's folder, which the first process holds."""
    if not processes.is_first:
        return None
    return claim(options.output, settings(options, processes), resume=options.resume)


def run(options: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """The whole job; returns what is written to ``metrics.json``."""
    started = time.perf_counter()
    data, teacher, untrained, lock = prepare(options, processes)
    log = LOGGERS[options.logger if processes.is_first else "none"](options.output / "logs")
    models: dict[str, nn.Module] = {}
    histories: dict[str, History] = {}
    results: dict[str, dict[str, float]] = {}
    if teacher is not None:
        histories["teacher"] = []
        if untrained:
            own = teacher_options(options)
            teacher, histories["teacher"] = train(
                teacher, "teacher", options.teacher_epochs, own, data, processes, log
            )
        teacher.to(processes.device, memory_format=memory_format(options))
        if options.teacher_images is not None:
            processes.say("the teacher isn't measured: the validation images are those that students see")
        else:
            models["teacher"] = teacher
            results["teacher"] = _final(histories["teacher"]) or measure(teacher, data[1], options, processes)
    label = None
    if teacher is not None and any(is_pseudo_labelled(method) for method in options.method):
        label = labels_of(teacher.eval(), data[1], options, processes)
    for method in options.method:
        student = make_student(options, data[0].num_classes)
        if inherits(method) and teacher is not None:
            processes.say(f"{method}: {crosskd.inherit(student, teacher)}")
        model = with_method(method, student, teacher, options, cache_for(method, options))
        trained, histories[method] = train(
            *(model, method, options.epochs, options, data, processes, log),
            label if is_pseudo_labelled(method) else None,
        )
        models[method] = trained
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
    if lock is not None:
        lock.close()
    return metrics


def prepare_one(
    options: argparse.Namespace, processes: Processes
) -> tuple[nn.Module, nn.Module, tuple[CocoFolder, CocoFolder], BinaryIO | None]:
    """What another loop than `Trainer` trains: the last of ``--method``.

    Returns:
        The distiller, or the student alone; the student; training and validation data; the folder's lock.
    """
    options.method = options.method[-1:]
    data, teacher, untrained, lock = prepare(options, processes)
    if untrained:
        raise SystemExit(f"{options.teacher} isn't trained: name its weights by --teacher-weights")
    student = make_student(options, data[0].num_classes)
    if inherits(options.method[0]) and teacher is not None:
        crosskd.inherit(student, teacher)
    model = with_method(options.method[0], student, teacher, options)
    return model.to(processes.device, memory_format=memory_format(options)), student, data, lock


def finish(
    student: nn.Module,
    val: CocoFolder,
    options: argparse.Namespace,
    processes: Processes,
    lock: BinaryIO | None,
) -> dict[str, float]:
    """Evaluates the student that another loop has trained, and writes its weights; returns the metrics."""
    share_buffers(student)
    metrics = measure(student, val, options, processes)
    path = options.output / f"{options.method[0]}.pt"
    if processes.is_first:
        save_atomically(student.state_dict(), path)
    processes.say(f"AP {metrics['AP']:.1f}; the student is {path}")
    if lock is not None:
        lock.close()
    return metrics


def settings(options: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """What decides a run's weights: options, the number of processes, and the contents of the files named."""
    found = {**shaping(options), "nproc_per_node": processes.ranks}
    for name in ("teacher_weights", "student_weights"):
        found[name] = fingerprint(getattr(options, name))
    if options.data == "coco":
        for name in ("train_annotations", "val_annotations"):
            found[name] = fingerprint(options.root / getattr(options, name))
    return found


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
    save_atomically(metrics, options.output / "metrics.json")
    draw_curves({name: h for name, h in metrics["histories"].items() if h}, options.output / "curves.png")
    draw_detections(models, val, options.output / "detections.png", device=processes.device)
    for name, result in metrics["results"].items():
        if result["unreadable_images"]:
            print(f"{name}: {result['unreadable_images']} of {result['images']} images can't be read")
    write_comparison(models, val, options.output, batch_size=options.eval_batch_size, device=processes.device)
    width = max(20, *(len(label_of(name)) + 2 for name in metrics["results"]))
    print(f"\n{'':<{width}}{'model':<30}" + "".join(f"{name:>11}" for name in METRICS))
    for name, result in metrics["results"].items():
        model = options.teacher if name == TEACHER else options.student
        values = [f"{result[m]:.1f}" if m in result else "-" for m in METRICS]
        print(f"{label_of(name):<{width}}{model:<30}" + "".join(f"{value:>11}" for value in values))
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
