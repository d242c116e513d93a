"""Does distillation make detectors better? Data sets, pairs, methods and seeds, from one table to another.

``PAIRS`` says what is run. Each run is a process with a folder and a log of its own; none is run twice, one
that was stopped goes on, and several run side by side. First the budget is chosen, on the validation split:
the number of steps from which on twice as many bring the student *alone* less than ``FLAT`` AP. It is
written down, and no method runs before that::

    python benchmarks/evidence.py --root data --pairs boards boards_small --budget

Then teachers and students, and the tables, whose numbers are those of the test split, measured once a run::

    python benchmarks/evidence.py --root data --pairs boards boards_small --minutes 60 --jobs 2

Given again, either goes on. ``touch OUTPUT/stop`` stops everything at the next step, too. On a GPU::

    python benchmarks/evidence.py --root data --pairs boards --device cuda --jobs 6 --minutes 9

``--toy`` makes images of coloured squares and goes through both in a minute: the rehearsal.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from evidence_data import DataSet, load_images
from evidence_report import write_report
from evidence_run import VARIANTS, Model, Run, as_json, name_of, run_of, seen_folder
from evidence_toy import make_toy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from methods_table import PSEUDO, check_name

HERE = Path(__file__).resolve().parent
FLAT = 1.0  # AP on the validation split
ALONE = "none"
MAIN = (ALONE, "crosskd", "pkd", "mimic", "crosskd+pkd")
WITH_PSEUDO = (f"{PSEUDO}+crosskd", f"{PSEUDO}+mimic")
CONTROL = (ALONE, "crosskd", "mimic")
OTHER_FAMILY = (ALONE, "crosskd", "pkd", "crosskd+pkd")  # whose boxes are of another kind: nothing to mimic
ABLATIONS = ("crosskd+mimic", "crosskd-pre", "crosskd-0", "crosskd-2")
ALL = (*MAIN, *ABLATIONS, "cwd", "ssim", "mgd", "fgd", "drkd", "bckd", "ld", "crosskd+fgd")


@dataclass(frozen=True)
class Pair:
    """One teacher and one student.

    Attributes:
        question: what the pair is to answer, as the table's heading.
        student: the student's run, whose ``steps`` are the budget; ``teacher``, ``method`` and ``seed`` are
            filled in.
        teacher: the teacher's run. Without ``steps`` it is trained ``teacher_times`` as long.
        methods: as `methods_table` names them.
        ladder: the budgets to choose from, each twice the one before.
        teacher_times: see ``teacher``.
        unlabelled: students of a teacher see the images without labels, too.
        own: each seed has labelled images of its own, and a finished student to begin with.
        longer: steps of further students alone, from where the finished one began, as rows of their own.
    """

    question: str
    student: Run
    teacher: Run
    methods: tuple[str, ...] = MAIN
    ladder: tuple[int, ...] = (1200, 2400, 4800, 9600)
    teacher_times: float = 1.0
    unlabelled: bool = True
    own: bool = False
    longer: tuple[int, ...] = ()


# Boards are all of one scale, and so sharp that a resized one looks like another: a student that had learned
# from those drew the boxes of whole images too small.
BOARDS = DataSet(
    "deeppcb", 6, side=320, crop=160, scales=(1.0, 1.0), flips="hv", pair="images_pair", anchor_scale=3.0
)
PERSONS = DataSet("coco_person", 1, side=320, crop=224, colour=0.2, anchor_scale=5.0)
CELLS = DataSet("bccd", 3, side=640, crop=256, shown=0.5, colour=0.1, anchor_scale=5.0)
CELLS_SMALL = replace(CELLS, side=320, crop=128, anchor_scale=3.0)
AQUARIUM = DataSet("aquarium", 7, side=320, crop=256, colour=0.1, anchor_scale=4.0)

MOBILE = Model("gfl", "mobilenet_v2", pretrained=True)
HALF = Model("gfl", "mobilenet_v2_half")
LITE2 = Model("gfl", "efficientnet_lite2", pretrained=True, width=128)
BOARDS_ALONE = Run(BOARDS, MOBILE, steps=4800)
BOARDS_TEACHER = replace(BOARDS_ALONE, sees="pair")
CELLS_TEACHER = Run(CELLS_SMALL, MOBILE, steps=600)
ZOOMED = replace(CELLS_TEACHER, model=replace(MOBILE, levels=5), sees="zoom")
ZOOMED_STRIDE16 = replace(ZOOMED, model=replace(ZOOMED.model, finest=16))
# Larger in its backbone alone: heads of one width need no projection, as in the published pairs.
ZOOMED_LITE2 = replace(ZOOMED_STRIDE16, model=replace(ZOOMED_STRIDE16.model, backbone="efficientnet_lite2"))
AQUARIUM_ALONE = Run(replace(AQUARIUM, crop=192), MOBILE, steps=1200)
AQUARIUM_FEW = replace(AQUARIUM_ALONE, labelled=0.1)
AQUARIUM_TEACHER = replace(AQUARIUM_ALONE, model=replace(LITE2, width=MOBILE.width))
NANODET_G = Run(PERSONS, Model("nanodet_g"), steps=1)


def of_nanodet(backbone: str, *, pretrained: bool) -> Model:
    """A student of NanoDet-g's, whose head has the branch of its teacher's."""
    return Model("nanodet", backbone, pretrained, width=64)


def _share(labelled: float) -> str:
    return f", {100 * labelled:g} % of the labels" if labelled < 1 else ""


def _boards(
    student: Model,
    methods: tuple[str, ...] = ALL,
    labelled: float = 1.0,
    ladder: tuple[int, ...] = Pair.ladder,
) -> Pair:
    # The teacher has the labels of the student, and no others.
    teacher = Run(BOARDS, MOBILE, sees="pair", steps=0, labelled=labelled)
    question = "A teacher that sees the defect-free board, too" + _share(labelled)
    return Pair(question, Run(BOARDS, student, labelled=labelled), teacher, methods, ladder, teacher_times=2)


def _persons(student: Model, labelled: float = 1.0, ladder: tuple[int, ...] = Pair.ladder) -> Pair:
    run = Run(PERSONS, student, person_only=True, labelled=labelled)
    question = "A COCO detector as it is" + _share(labelled)
    # mimicking compares boxes location by location, and both have the same locations
    methods = (*MAIN, "crosskd-pre", "cwd", "ssim", "mgd", "fgd", "drkd", "bckd", "ld")
    return Pair(question, run, NANODET_G, methods, ladder)


def _persons_finished(question: str, student: Model) -> Pair:
    begins = Run(PERSONS, student, steps=2400, person_only=True)
    run = replace(begins, begins=begins, learning_rate=3e-4)
    return Pair(question, run, NANODET_G, (*MAIN, "crosskd+mimic"), (300, 600, 1200), longer=(4800,))


def _cells_few(
    question: str, student: Model, teacher: Run, methods: tuple[str, ...], before: int = 1200, **more: Any
) -> Pair:
    # 3 images with labels, small ones: what a CPU learns in minutes.
    run = Run(CELLS_SMALL, student, labelled=0.015, warmup=25)
    begins = replace(run, learning_rate=3e-3, steps=before)
    question += _share(run.labelled)
    return Pair(question, replace(run, begins=begins), teacher, methods, (300, 600, 1200), **more)


def _boards_few(
    question: str, student: Model, methods: tuple[str, ...], before: int = 1200, **more: Any
) -> Pair:
    begins = replace(BOARDS_ALONE, model=student, steps=before, labelled=0.03)
    run = replace(begins, begins=begins, learning_rate=3e-4)
    question += _share(run.labelled)
    return Pair(question, run, BOARDS_TEACHER, methods, (300, 600, 1200), **more)


PAIRS: dict[str, Pair] = {
    "boards": _boards(MOBILE),
    "boards_small": _boards(HALF),
    "boards_retinanet": _boards(replace(MOBILE, family="retinanet"), OTHER_FAMILY),
    "boards_fcos": _boards(replace(MOBILE, family="fcos"), OTHER_FAMILY),
    "boards_finished": Pair(
        "A finished student goes on, from a teacher that sees the defect-free board, too",
        replace(BOARDS_ALONE, begins=BOARDS_ALONE, learning_rate=3e-4),
        BOARDS_TEACHER,
        ALL,
        (300, 600, 1200, 2400),
    ),
    "boards_few_finished": _boards_few(
        "The same teacher, and a student", MOBILE, (*ALL, PSEUDO, *WITH_PSEUDO), longer=(2400,)
    ),
    "boards_few_labelled": _boards_few(
        "The same, of images with labels alone", MOBILE, CONTROL, unlabelled=False
    ),
    "boards_few_longer": _boards_few(
        "The same, of a student that was trained twice as long before", MOBILE, CONTROL, 2400, longer=(4800,)
    ),
    "boards_few_small": _boards_few("A student of half the width, from scratch", HALF, MAIN),
    # 27 boards with labels are learned sooner than 900.
    "boards_few": _boards(MOBILE, ALL, 0.03, (150, 300, 600, 1200, 2400)),
    "persons": _persons(of_nanodet("mobilenet_v2", pretrained=True)),
    # Two cores climb no further in half an hour.
    "persons_scratch": _persons(of_nanodet("mobilenet_v2_half", pretrained=False), ladder=(1200, 2400, 4800)),
    # 120 images with labels are learned soon.
    "persons_few": _persons(
        of_nanodet("mobilenet_v2", pretrained=True), 0.1, (150, 300, 600, 1200, 2400, 4800)
    ),
    "persons_finished": _persons_finished(
        "A COCO detector as it is, and a finished student with all labels",
        of_nanodet("mobilenet_v2", pretrained=True),
    ),
    "persons_scratch_finished": _persons_finished(
        "The same teacher, and a student of half the width, from scratch",
        of_nanodet("mobilenet_v2_half", pretrained=False),
    ),
    "cells": Pair(
        "A pretrained teacher at twice the size",
        Run(CELLS, Model("gfl", "resnet18", width=128)),
        # From stride 16 on, which is the student's stride 8: a finer level would have no match.
        Run(CELLS, replace(LITE2, levels=5, finest=16), sees="zoom", steps=0),
        ladder=(300, 600, 1200, 2400, 4800),
    ),
    "cells_few": _cells_few(
        "A finished student goes on, from a teacher with all labels, at twice the size",
        MOBILE,
        ZOOMED,
        (*ALL, PSEUDO, *WITH_PSEUDO),
        longer=(2400,),
    ),
    "cells_few_labelled": _cells_few(
        "The same, of images with labels alone", MOBILE, ZOOMED, CONTROL, unlabelled=False
    ),
    "cells_few_longer": _cells_few(
        "A student that was trained twice as long before",
        MOBILE,
        ZOOMED_STRIDE16,
        CONTROL,
        2400,
        longer=(4800,),
    ),
    "cells_few_own": _cells_few(
        "Other images with labels and another finished student for each seed",
        MOBILE,
        ZOOMED,
        CONTROL,
        own=True,
    ),
    "cells_few_stride16": _cells_few(
        "The same teacher, trained without the level that its student lacks",
        MOBILE,
        ZOOMED_STRIDE16,
        (*MAIN, "crosskd+mimic", PSEUDO),
    ),
    "cells_few_stride16_labelled": _cells_few(
        "The same, of images with labels alone", MOBILE, ZOOMED_STRIDE16, CONTROL, unlabelled=False
    ),
    "cells_few_lite2": _cells_few(
        "A larger teacher, an EfficientNet-Lite2, without the level that its student lacks",
        MOBILE,
        ZOOMED_LITE2,
        (*MAIN, "crosskd+mimic"),
    ),
    "cells_few_same": _cells_few("A teacher of the student's own network", MOBILE, CELLS_TEACHER, MAIN),
    "cells_few_small": _cells_few("A student of half the width, from scratch", HALF, ZOOMED, MAIN),
    "cells_few_resnet": _cells_few(
        "A ResNet-18, from scratch", Model("gfl", "resnet18"), ZOOMED_STRIDE16, MAIN
    ),
    "cells_few_resnet_lite2": _cells_few(
        "The same student, and the EfficientNet-Lite2", Model("gfl", "resnet18"), ZOOMED_LITE2, MAIN
    ),
    "cells_few_retinanet": _cells_few(
        "The same teacher, a GFL, and a RetinaNet", replace(MOBILE, family="retinanet"), ZOOMED, OTHER_FAMILY
    ),
    "cells_few_fcos": _cells_few(
        "The same teacher, a GFL, and an FCOS", replace(MOBILE, family="fcos"), ZOOMED, OTHER_FAMILY
    ),
    "aquarium_few": Pair(
        "A larger pretrained teacher with all labels, and a finished student, 10 % of the labels",
        replace(AQUARIUM_FEW, begins=AQUARIUM_FEW, learning_rate=3e-4),
        AQUARIUM_TEACHER,
        (*MAIN, "crosskd+mimic", PSEUDO),
        (300, 600, 1200),
    ),
    "aquarium_finished": Pair(
        "The same teacher, and a finished student with all labels, too",
        replace(AQUARIUM_ALONE, begins=AQUARIUM_ALONE, learning_rate=3e-4),
        AQUARIUM_TEACHER,
        (*MAIN, "crosskd+mimic"),
        (300, 600, 1200),
    ),
    "aquarium": Pair(
        "A larger pretrained teacher", Run(AQUARIUM, replace(HALF, width=128)), Run(AQUARIUM, LITE2, steps=0)
    ),
    "aquarium_resnet": Pair(
        "A larger pretrained teacher",
        Run(AQUARIUM, Model("gfl", "resnet18", width=128)),
        Run(AQUARIUM, LITE2, steps=0),
    ),
}
TOY = DataSet("toy", 2, side=64, crop=64, pair="images_pair", anchor_scale=4.0)
TOY_PAIR = Pair(
    "The rehearsal",
    Run(TOY, replace(HALF, width=32, blocks=1), batch=4, warmup=2, position=0, ema=0.9),
    Run(TOY, replace(HALF, width=32, blocks=1), sees="pair", steps=0, batch=4, warmup=2, ema=0.9),
    (ALONE, "crosskd", "pkd"),
    ladder=(6, 12),
    teacher_times=2,
)


def alone_run(pair: Pair, steps: int, seed: int) -> Run:
    """The student alone."""
    run = replace(pair.student, steps=steps, seed=seed)
    if pair.own and run.begins is not None:
        run = replace(run, draw=seed, begins=replace(run.begins, seed=seed, draw=seed))
    return run


def begun(pair: Pair, seeds: Sequence[int] = (0,)) -> list[Run]:
    """The finished runs that the students of a pair begin with, if they do."""
    runs = (alone_run(pair, 0, seed).begins for seed in seeds)
    return [run for run in dict.fromkeys(runs) if run is not None]


def teacher_run(pair: Pair, steps: int) -> Run:
    """The teacher, for a student of so many steps."""
    if pair.teacher.steps:
        return pair.teacher
    return replace(pair.teacher, steps=round(pair.teacher_times * steps))


def table_runs(pair: Pair, steps: int, seeds: Sequence[int], methods: Sequence[str]) -> list[Run]:
    """All runs of a pair in the order in which they are done: every method with a seed, then the next."""
    teacher, begins = teacher_run(pair, steps), begun(pair, seeds)
    runs = [teacher, *begins]
    for seed in seeds:
        for method in methods:
            run = alone_run(pair, steps, seed)
            if method != ALONE:
                run = replace(run, method=method, teacher=teacher, unlabelled=pair.unlabelled)
            runs.append(run)
    return runs + [replace(run, steps=longer) for longer in pair.longer for run in begins]


# -- running --------------------------------------------------------------------------------------


def is_done(run: Run, options: Namespace, test: bool) -> bool:
    """Whether nothing is left to do of a run.

    Raises:
        ValueError: its folder holds a run with other settings.
    """
    folder = options.output / name_of(run)
    written = folder / "run.json"
    if written.exists() and run_of(json.loads(written.read_text())) != run:
        raise ValueError(f"{folder} holds a run with other settings than the table's: move it away")
    return (folder / ("test.json" if test else "result.json")).exists()


def launch(run: Run, options: Namespace, test: bool) -> subprocess.Popen[bytes]:
    """Starts a run's process."""
    folder = options.output / name_of(run)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(as_json(run))
    given = {
        "root": options.root,
        "output": options.output,
        "cache": options.cache,
        "device": options.device,
        "threads": options.threads,
        "until": options.until,
        "evaluations": options.evaluations,
        "nanodet": options.nanodet,
    }
    command = [sys.executable, str(HERE / "evidence_run.py"), str(folder)]
    for name, value in given.items():
        command += [] if value is None else [f"--{name}", str(value)]
    flags = {"--test": test, "--bf16": options.bf16, "--compile": options.compile, "--channels-last": True}
    command += [flag for flag, wanted in flags.items() if wanted]
    paths = [str(HERE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def run_all(runs: Sequence[Run], options: Namespace, *, test: bool) -> bool:
    """Does what isn't done, ``--jobs`` at a time, a teacher before its students, until the time is over.

    Returns:
        Whether everything is done.

    Raises:
        RuntimeError: runs that failed, with their logs; the others are done first.
    """
    waiting = list(dict.fromkeys(run for run in runs if not is_done(run, options, test)))
    for run in waiting:
        for split in ("train", "val", *(["test"] if test else [])):
            load_images(options.root, run.data, split, options.cache, seen_folder(run))
    running: dict[Run, subprocess.Popen[bytes]] = {}
    failed: list[Path] = []
    stopped = False
    while waiting or running:
        for run, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[run]
            done = is_done(run, options, test)
            if process.returncode or not (done or stop_asked(options)):
                failed.append(options.output / name_of(run) / "log.txt")
                waiting = [other for other in waiting if run not in (other.teacher, other.begins)]
            print(f"{time.strftime('%H:%M:%S')} {name_of(run)}: {'done' if done else 'not done'}", flush=True)
        stopped = stopped or stop_asked(options)
        ready = [] if stopped else [run for run in waiting if needed_there(run, options)]
        for run in ready[: options.jobs - len(running)]:
            waiting.remove(run)
            running[run] = launch(run, options, test)
        if stopped and not running:
            return False
        if waiting and not running and not ready:
            break  # what they need failed
        time.sleep(0.5)
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed, see {', '.join(map(str, failed))}")
    return all(is_done(run, options, test) for run in runs)


def stop_asked(options: Namespace) -> bool:
    """Whether time is over, or somebody wants to stop."""
    return time.time() > options.until or (options.output / "stop").exists()


def needed_there(run: Run, options: Namespace) -> bool:
    """Whether a run has the weights of its teacher and those that it begins with, if it takes any."""
    needed = (other for other in (run.teacher, run.begins) if other is not None)
    return all(is_done(other, options, test=False) for other in needed)


# -- the budget -----------------------------------------------------------------------------------


def validation_precision(run: Run, options: Namespace) -> float:
    """A finished run's AP on the validation split."""
    return float(json.loads((options.output / name_of(run) / "result.json").read_text())["val"]["AP"])


def flat_at(precision: dict[int, float]) -> int | None:
    """The first budget from which twice as many steps bring less than ``FLAT`` AP, and less than a tenth."""
    for steps, value in sorted(precision.items()):
        if 2 * steps in precision and precision[2 * steps] - value < min(FLAT, 0.1 * value):
            return steps
    return None


def choose_budget(name: str, pair: Pair, options: Namespace) -> bool:
    """Climbs the ladder with the student alone and writes down what is chosen, once.

    Returns:
        Whether it is: the time may have been over before.
    """
    if name in read_budgets(options.budgets):
        return True
    precision: dict[int, float] = {}
    for steps in pair.ladder:
        runs = [alone_run(pair, steps, seed) for seed in options.budget_seeds]
        if not run_all([*begun(pair), *runs], options, test=False):
            return False
        values = [validation_precision(run, options) for run in runs]
        precision[steps] = sum(values) / len(values)
        chosen = flat_at(precision)
        if chosen is not None:
            break
    # A ladder that is too short ends where twice as much could still be compared.
    steps = chosen or sorted(precision)[-2]
    budgets = read_budgets(options.budgets)  # others may have been written down meanwhile
    budgets[name] = {
        "steps": steps,
        "flat": chosen is not None,
        "alone": {str(k): round(v, 2) for k, v in precision.items()},
        "seeds": list(options.budget_seeds),
    }
    options.budgets.parent.mkdir(parents=True, exist_ok=True)
    options.budgets.write_text(json.dumps(budgets, indent=1) + "\n")
    print(f"{name}: {budgets[name]}", flush=True)
    return True


def climb_together(options: Namespace) -> None:
    """Trains the student alone on all rungs of all pairs' ladders, the short ones first."""
    there = read_budgets(options.budgets)
    rungs = []
    for pair in (options.pair_table[name] for name in options.pairs if name not in there):
        rungs += begun(pair)
        rungs += [alone_run(pair, steps, seed) for steps in pair.ladder for seed in options.budget_seeds]
    run_all(sorted(rungs, key=lambda run: run.steps), options, test=False)


def read_budgets(path: Path) -> dict[str, dict[str, object]]:
    """The budgets that were written down."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


# -- the command ----------------------------------------------------------------------------------


def add_folders(parser: argparse.ArgumentParser, *, root_required: bool = True) -> None:
    """Adds the options that say where data, runs and tables are."""
    add = parser.add_argument
    add("--root", type=Path, required=root_required, help="folder of the data sets")
    add("--output", type=Path, default=Path("runs/evidence"), help="folder of all runs")
    add("--cache", type=Path, help="folder of decoded images; in --output unless given")
    add("--results", type=Path, default=HERE / "results" / "evidence", help="folder of tables and budgets")
    add("--nanodet", type=Path, help="file of NanoDet-g's weights")


def parse(arguments: list[str] | None = None) -> Namespace:
    """The options, with ``until``, when the time is over, in seconds since 1970."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_folders(parser, root_required=False)
    add = parser.add_argument
    add("--pairs", nargs="+", choices=PAIRS, default=["boards"], help="which pairs")
    add("--methods", nargs="+", help="some methods alone, or others than the table's")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--budget", action="store_true", help="choose the budgets, and stop")
    add("--budget-seeds", type=int, nargs="+", default=[0])
    add("--minutes", type=float, default=math.inf, help="stop after so many; the same command goes on")
    add("--jobs", type=int, default=1, help="runs side by side")
    add("--threads", type=int, default=1, help="of each run")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--compile", action="store_true", help="compile students' backbones; pays for long runs alone")
    add("--evaluations", type=int, default=10, help="points of a learning curve")
    add("--resamples", type=int, default=1000, help="for the intervals")
    add("--report", action="store_true", help="run nothing, write the tables of what there is")
    add("--toy", action="store_true", help="the rehearsal, with images of its own")
    options = parser.parse_args(arguments)
    if options.root is None and not options.toy:
        parser.error("--root: the folder of the data sets is needed")
    try:
        for method in options.methods or ():
            if method not in VARIANTS:
                check_name(method)
    except ValueError as error:
        parser.error(f"--methods: {error}")
    options.pair_table = {"toy": TOY_PAIR} if options.toy else PAIRS
    if options.toy:
        options.pairs, options.root = ["toy"], options.output / "toy_data"
        options.evaluations = 2
        make_toy(options.root / TOY.name)
    options.cache = options.cache or options.output / "cache"
    options.budgets = options.results / "budgets.json"
    options.until = time.time() + 60 * options.minutes
    options.bf16 = options.device.type == "cuda"
    return options


def main(arguments: list[str] | None = None) -> None:
    """Chooses budgets, or runs what they are there for and writes the tables."""
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.budget or options.toy:
        if options.jobs > 1:  # the longer rungs, which may not be needed, beside the others
            climb_together(options)
        finished = [choose_budget(name, options.pair_table[name], options) for name in options.pairs]
        if options.budget or not all(finished):
            return
    budgets = read_budgets(options.budgets)
    missing = [name for name in options.pairs if name not in budgets]
    if missing:
        raise SystemExit(f"{options.budgets} has no budget for {', '.join(missing)}: run --budget first")
    wanted: dict[str, list[Run]] = {}
    for name in options.pairs:
        pair = options.pair_table[name]
        methods = tuple(options.methods or pair.methods)
        wanted[name] = table_runs(pair, int(str(budgets[name]["steps"])), options.seeds, methods)
    # One after the other, so that a pair is done before the next begins.
    everything = [run for runs in wanted.values() for run in runs]
    if not options.report and not run_all(everything, options, test=True):
        print("not done yet: the same command goes on, --report makes tables of what there is", flush=True)
        return
    for name, runs in wanted.items():
        there = [run for run in runs if is_done(run, options, test=True)]
        write_report(name, options.pair_table[name].question, there, budgets[name], options)


if __name__ == "__main__":
    main()
