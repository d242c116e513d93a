"""How time and memory of a step grow with images, pixels, classes, levels and ranks.

    python benchmarks/growth.py --output benchmarks/results/growth.md
    python benchmarks/growth.py --families gfl --axes images classes

A student's plain step, and CrossKD's. One number is changed at a time, the others stay as the options say.
Each axis has a file in ``--folder`` when it is done; started again with the same options the script goes on
with what is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import measure
import torch
from gpu import Cell, Steps, median
from measure import MIB
from step_cost import FAMILIES, size_of
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

Measured = dict[str, dict[str, list[Any]]]
"""Of the plain and the distilled step: at each point of an axis the seconds of each round, and the bytes."""

KINDS = ("plain", "distilled")
AXES = {
    "images": (1, 2, 4, 8),
    "pixels": ((96, 128), (192, 256), (384, 512), (800, 1333)),
    "classes": (20, 80, 320),
    "levels": (1, 2, 3, 5),
    "ranks": (1, 2),
}
HEADER = ("detector", "of", "at", "plain, ms", "distilled, ms", "plain, MiB", "distilled, MiB")
FIT_HEADER = (
    *("detector", "of", "plain, time", "distilled, time", "distilled, time, last two points"),
    *("plain, memory", "distilled, memory"),
)


def keep_levels(detector: Any, levels: int) -> None:
    """Leaves a detector only the finest of its levels."""

    def finest(backbone: Any, pixels: Tensor) -> dict[str, Tensor]:
        return dict(list(type(backbone).forward(backbone, pixels).items())[:levels])

    # No hook: adapters look at a backbone's levels without the hooks on it.
    detector.backbone.forward = MethodType(finest, detector.backbone)
    if hasattr(detector, "strides"):  # of examples/dense_heads
        detector.strides = detector.strides[:levels]
        detector.head.scales = nn.ParameterList(list(detector.head.scales)[:levels])
        return
    generator = detector.anchor_generator
    detector.anchor_generator = type(generator)(generator.sizes[:levels], generator.aspect_ratios[:levels])


def steps_at(family: str, axis: str, value: Any, options: argparse.Namespace) -> Steps:
    """The two steps at one point of an axis."""
    names = {"images": "batch", "pixels": "size", "classes": "classes"}
    at = argparse.Namespace(**{**vars(options), names.get(axis, "at"): value})
    cell = Cell("step", family, mode="eager", dtype="none", layout="contiguous")
    return Steps(cell, at, partial(keep_levels, levels=value) if axis == "levels" else lambda detector: None)


def accumulate(function: Any, steps: Steps) -> None:
    """A step on top of the gradients that are there: they are neither allocated nor counted again."""
    torch.stack(list(function(steps.images, steps.targets).values())).sum().backward()


def measure_axis(family: str, axis: str, options: argparse.Namespace) -> Measured:
    """All points of an axis in turn."""
    if axis == "ranks":
        return measure_ranks(family, options)
    steps = [steps_at(family, axis, value, options) for value in AXES[axis]]
    cases = {}
    for number, at in enumerate(steps):
        cases[f"plain {number}"] = partial(accumulate, at.plain, at)
        cases[f"distilled {number}"] = partial(accumulate, at.distiller, at)
    for case in cases.values():
        case()  # makes the gradients
    peaks = {name: float(measure.memory(case, options.device).peak) for name, case in cases.items()}
    seconds = measure.timed_rounds(cases, options.rounds, options.device, warmup=0, clock=options.clock)
    points = range(len(steps))
    return {
        kind: {
            "seconds": [seconds[f"{kind} {number}"] for number in points],
            "bytes": [peaks[f"{kind} {number}"] for number in points],
        }
        for kind in KINDS
    }


def measure_ranks(family: str, options: argparse.Namespace) -> Measured:
    """The first rank's numbers, with as many processes as the axis says, each with a batch of its own."""
    found: Measured = {kind: {"seconds": [], "bytes": []} for kind in KINDS}
    for ranks in AXES["ranks"]:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(run_rank, (ranks, family, options, Path(folder)), nprocs=ranks)
            result = json.loads((Path(folder) / "0.json").read_text())
        for kind in KINDS:
            for what in ("seconds", "bytes"):
                found[kind][what].append(result[kind][what])
    return found


def run_rank(rank: int, ranks: int, family: str, options: argparse.Namespace, folder: Path) -> None:
    """One process: both steps in `DistributedDataParallel`, whose buckets count as memory."""
    torch.set_num_threads(options.threads)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=ranks)
    steps = steps_at(family, "ranks", ranks, options)
    modules = {"plain": steps.plain, "distilled": steps.distiller}
    result: dict[str, dict[str, Any]] = {}
    for name, module in modules.items():
        accumulate(module, steps)
        peak = measure.memory(lambda m=module: accumulate(DistributedDataParallel(m), steps), options.device)
        result[name] = {"bytes": peak.peak}
    wrapped = {name: DistributedDataParallel(module) for name, module in modules.items()}
    cases = {name: partial(accumulate, module, steps) for name, module in wrapped.items()}
    seconds = measure.timed_rounds(cases, options.rounds, options.device, clock=options.clock)
    for name in modules:
        result[name]["seconds"] = seconds[name]
    (folder / f"{rank}.json").write_text(json.dumps(result))
    distributed.destroy_process_group()


def exponent(amounts: Sequence[float], costs: Sequence[float]) -> float:
    """The power of the amount that the cost grows with, by least squares on logarithms.

    Example:
        >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
        2.0
    """
    return statistics.linear_regression(list(map(math.log, amounts)), list(map(math.log, costs))).slope


def amounts_of(axis: str) -> list[float]:
    """An axis as numbers: images of some size by their pixels."""
    return [math.prod(value) if isinstance(value, tuple) else float(value) for value in AXES[axis]]


def rows_of(family: str, axis: str, measured: Measured) -> list[list[str]]:
    """A row for each point of an axis."""
    rows = []
    for number, value in enumerate(AXES[axis]):
        at = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
        times = [f"{1000 * median(measured[kind]['seconds'][number]):.0f}" for kind in KINDS]
        peaks = [f"{measured[kind]['bytes'][number] / MIB:.0f}" for kind in KINDS]
        rows.append([family, axis, at, *times, *peaks])
    return rows


def fit_row(family: str, axis: str, measured: Measured) -> list[str]:
    """The exponents of an axis; of time their spread over the rounds."""
    amounts, row = amounts_of(axis), [family, axis]
    for kind, points in (("plain", 0), ("distilled", 0), ("distilled", -2)):
        rounds = zip(*measured[kind]["seconds"], strict=True)
        fits = [exponent(amounts[points:], seconds[points:]) for seconds in rounds]
        row.append(measure.Spread.of(fits).text())
    for kind in KINDS:
        row.append(f"{exponent(amounts, measured[kind]['bytes']):.2f}")
    return row


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measure.add_options(parser)
    parser.add_argument("--families", choices=FAMILIES, nargs="+", default=["retinanet", "gfl"])
    parser.add_argument("--axes", choices=AXES, nargs="+", default=list(AXES))
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/growth"), help="of the axes' files; what has one is kept"
    )
    parser.add_argument("--teacher", default="resnet50", help="the teacher's backbone")
    parser.add_argument("--student", default="resnet18", help="the student's backbone")
    parser.add_argument("--size", type=size_of, default=(192, 256), help="height x width of the images")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--objects", type=int, default=8, help="boxes per image")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    load = os.getloadavg()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows, fits = [], []
    for family in options.families:
        for axis in options.axes:
            path = options.folder / f"{family}-{axis}.json"
            if not path.exists():
                path.write_text(json.dumps(measure_axis(family, axis, options)))
            measured = json.loads(path.read_text())
            rows += rows_of(family, axis, measured)
            fits.append(fit_row(family, axis, measured))
            print(" ".join(fits[-1]), flush=True)
    height, width = options.size
    setting = (
        f"{options.student} from {options.teacher}, untrained, CrossKD, batch {options.batch} of "
        f"{height}x{width}, {options.classes} classes, 5 levels, {options.objects} boxes per image, "
        "unless the row says otherwise"
    )
    text = "\n\n".join(
        [
            "# How a step's cost grows",
            f"{measure.environment('benchmarks/growth.py', options, load)}\n- setting: {setting}",
            FIT_EXPLANATION,
            measure.table(FIT_HEADER, fits),
            EXPLANATION,
            measure.table(HEADER, rows),
        ]
    )
    measure.write(text, options.output)


FIT_EXPLANATION = """\
The exponent: 1 means twice the cost for twice the amount, 0 none more. By least squares on the logarithms, of
time round by round: the median, with the quartiles in brackets. Fixed costs keep exponents below 1, least so
between the two largest points. Levels are counted from the finest on, and each has a
quarter of the locations of the one before. Ranks: each process has a batch and a thread of its own, so 0 is
the goal; the costs are those of the first."""

EXPLANATION = """\
Medians over rounds that run all points of an axis in turn, forward and backward without an optimizer's step.
Peak memory is what is allocated above the weights and their gradients; with ranks the buckets of
DistributedDataParallel, as large as the gradients, are in it."""


if __name__ == "__main__":
    main()
