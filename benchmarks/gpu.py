"""Steps, losses and the teacher on one GPU, in ten minutes.

    python benchmarks/gpu.py --output benchmarks/results/gpu_h100.md
    python benchmarks/gpu.py --only loss teacher
    python benchmarks/gpu.py --device cpu --size 256x320 --batch 2 --teacher resnet50 --student resnet18 \
        --anchors 20000 --minutes 60 --threads 1 --clock cpu

Needs PyTorch, torchvision and this repository, no network and no data. The measurements come in the order of
what matters most, and each is written to a file of its own in ``--folder`` as soon as it is made. Started
again with the same options the script goes on with what is missing; ``--minutes 0`` only makes the table. A
measurement that fails (memory, compiler, time) is a row that says so; to repeat it, delete its file.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import measure
import torch
from losses import LOSSES, WIDTHS, make_inputs
from measure import MIB
from step_cost import DEFAULTS, build_pair, make_batch, size_of, take_first_steps
from torch import Tensor, nn

from crosskd import Distiller, fold_batch_norm
from crosskd.losses import distributions, quality_focal
from crosskd.running import run_teacher

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from dense_heads import adapter_of
from methods_table import METHODS

Result = dict[str, Any]

FAMILIES = ("retinanet", "gfl", "fcos")
# A loss reads the student's and the teacher's numbers in forward and in backward, and writes a gradient.
LEAST_PASSES, COPY_PASSES = 5, 2
REPEATS = 5  # of a loss within one measurement: one alone is over before the clock is read
STEP_HEADER = (
    "detector",
    "method",
    "how",
    "plain, ms",
    "distilled, ms",
    "distilled / plain",
    "teacher, ms",
    "teacher / distilled",
    "plain, MiB",
    "distilled, MiB",
    "distilled / plain",
    "first calls, s",
)
TEACHER_HEADER = ("detector", "teacher", "forward, ms", "over the first", "peak, MiB", "kd_cls", "kd_reg")
LOSS_HEADER = (
    "loss",
    "dtype",
    "implementation",
    "forward + backward, ms",
    "over plain",
    "GB/s",
    "of a copy's",
    "peak memory",
)


class OutOfTime(BaseException):
    """A measurement has taken its time. No ``Exception``, for compilers catch those."""


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        kind: ``"step"``, ``"teacher"`` or ``"loss"``.
        subject: the family of detectors, or the loss.
        method: what is distilled by.
        mode: ``"eager"`` or ``"compiled"``.
        dtype: of autocast, ``"none"`` for float32; a loss's inputs.
        layout: ``"channels_last"`` or ``"contiguous"``.
        teacher: the type that the teacher calculates in, ``"same"`` for the student's.
    """

    kind: str
    subject: str
    method: str = "crosskd"
    mode: str = "compiled"
    dtype: str = "bfloat16"
    layout: str = "channels_last"
    teacher: str = "same"

    @property
    def name(self) -> str:
        """What its file is called."""
        facts = {"step": list(vars(self).values()), "teacher": [self.kind, self.subject, self.mode]}
        return "-".join(facts.get(self.kind, [self.kind, self.subject, self.mode, self.dtype]))

    @property
    def how(self) -> str:
        """Its settings as they stand in a table."""
        settings = [self.mode, self.dtype.replace("none", "float32"), self.layout.replace("_", " ")]
        return ", ".join(settings if self.teacher == "same" else [*settings, f"teacher in {self.teacher}"])


def planned(only: list[str]) -> list[Cell]:
    """All measurements, what matters most first.

    Args:
        only: the beginnings of the names of those that are wanted; all of them if empty.
    """
    teachers = [Cell("teacher", "retinanet", mode=mode) for mode in ("eager", "compiled")]
    methods = {
        mode: [
            Cell("step", family, method, mode)
            for family in FAMILIES
            for method in METHODS
            if method != "ld" or family == "gfl"  # which alone predicts distributions
        ]
        for mode in ("eager", "compiled")
    }
    types = [
        Cell("step", family, mode=mode, dtype=dtype, teacher=teacher)
        for mode in ("eager", "compiled")
        for dtype, teacher in (("none", "same"), ("none", "bfloat16"), ("float16", "same"))
        for family in FAMILIES
    ]
    contiguous = [Cell("step", family, mode="eager", layout="contiguous") for family in FAMILIES]
    losses = {
        mode: [
            Cell("loss", loss, mode=mode, dtype=dtype) for dtype in ("float32", "bfloat16") for loss in LOSSES
        ]
        for mode in ("eager", "compiled")
    }
    # Compiling a step takes over a minute, in which ten others can be measured eager.
    cells = [
        *losses["eager"],
        *(Cell("step", family, mode="eager") for family in FAMILIES),
        teachers[0],
        *(Cell("step", family) for family in FAMILIES[:2]),
        *methods["eager"],
        *losses["compiled"],
        *types,
        *contiguous,
        Cell("step", FAMILIES[2]),
        teachers[1],
        *methods["compiled"],
    ]
    unique = list(dict.fromkeys(cells))
    return [cell for cell in unique if not only or cell.name.startswith(tuple(only))]


# -- steps ---------------------------------------------------------------------------------------


class Steps:
    """A plain student, the same student distilled, and its teacher, on one batch.

    Args:
        cell: what is measured.
        options: the script's.
        change: done to both detectors first.
    """

    def __init__(
        self,
        cell: Cell,
        options: argparse.Namespace,
        change: Callable[[nn.Module], object] = lambda detector: None,
    ) -> None:
        torch.manual_seed(options.seed)
        self.device, self.dtype = options.device, cell.dtype
        self.images, self.targets = make_batch(options)
        teacher, student = build_pair(cell.subject, laid_out(options, cell.layout), self.images)
        change(teacher)
        change(student)
        self.plain = copy.deepcopy(student)
        method = METHODS[cell.method].make(DEFAULTS)
        # That the pieces are the detector is proved elsewhere, and costs a step of its own.
        dtype = measure.AMP_TYPES["none" if cell.teacher == "same" else cell.teacher]
        self.distiller = Distiller(teacher, student, method, adapter_of, prove=False, teacher_dtype=dtype)
        with self._autocast():
            take_first_steps(self.distiller, self.images, self.targets)
        batch = self.distiller.student_adapter.prepare(self.images, self.targets)
        self.seen = self.distiller.teacher_batch(batch, self.images, self.targets)
        self.distilled: Callable[..., dict[str, Tensor]] = self.distiller
        if cell.mode == "compiled":
            # As much of the student as the distiller compiles: no preprocessing, no losses of its own.
            self.plain.backbone.compile(backend=options.backend)
            self.plain.head.compile(backend=options.backend)
            self.distilled = torch.compile(self.distiller, backend=options.backend)

    def _autocast(self) -> Any:
        return measure.autocast(self.device, self.dtype)

    def _step(self, function: Callable[..., dict[str, Tensor]], trained: nn.Module) -> None:
        trained.zero_grad()
        with self._autocast():
            loss = torch.stack(list(function(self.images, self.targets).values())).sum()
        loss.backward()

    def plain_step(self) -> None:
        """The student's step without a teacher."""
        self._step(self.plain, self.plain)

    def distilled_step(self) -> None:
        """The step with one."""
        self._step(self.distilled, self.distiller)

    def teacher_forward(self) -> None:
        """What a step runs of the teacher."""
        with self._autocast():
            run_teacher(self.distiller.pair, self.seen, dict(self.distiller.methods.items()))


def laid_out(options: argparse.Namespace, layout: str) -> argparse.Namespace:
    """The options with one memory layout of the detectors."""
    return argparse.Namespace(**{**vars(options), "channels_last": layout == "channels_last"})


def measure_steps(cell: Cell, options: argparse.Namespace) -> Result:
    """Plain and distilled steps in turn, and their peak memory; eager, the teacher's forward, too.

    Compiled it would be compiled once more for that, which takes longer than all else.
    """
    steps = Steps(cell, options)
    cases = {"plain": steps.plain_step, "distilled": steps.distilled_step}
    if cell.mode == "eager":
        cases["teacher"] = steps.teacher_forward
    begin = time.perf_counter()
    for case in cases.values():
        case()
    first = time.perf_counter() - begin
    peaks = {}
    for name in ("plain", "distilled"):
        steps.plain.zero_grad()
        steps.distiller.zero_grad()
        peaks[name] = measure.memory(cases[name], options.device).peak
    return {"seconds": timed(cases, options), "peak": peaks, "first": first}


def timed(cases: dict[str, Callable[[], object]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Each case's seconds, round by round."""
    return measure.timed_rounds(cases, options.rounds, options.device, warmup=2, clock=options.clock)


# -- the teacher ---------------------------------------------------------------------------------


def cheaper_teachers(
    cell: Cell, options: argparse.Namespace, teacher: nn.Module, images: list[Tensor]
) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """A teacher by several means: what the distiller is given, and its further arguments."""
    folded = fold_batch_norm(teacher, images[:1])
    last, both = (copy.deepcopy(each).to(memory_format=torch.channels_last) for each in (teacher, folded))
    half = {"teacher_dtype": torch.bfloat16}
    if cell.mode == "compiled":
        return {
            "float32": (teacher, {}),
            "compiled": (teacher, {}),
            "bfloat16, channels last, batch norm folded": (both, half),
            "all of these, compiled": (both, half),
        }
    small = copy.deepcopy(teacher)
    small.transform.min_size = (options.size[0] // 2,)
    small.transform.max_size = max(options.size) // 2
    return {
        "float32": (teacher, {}),
        "channels last": (last, {}),
        "batch norm folded": (folded, {}),
        "bfloat16": (teacher, half),
        "float16": (teacher, {"teacher_dtype": torch.float16}),
        "bfloat16, channels last": (last, half),
        "bfloat16, channels last, batch norm folded": (both, half),
        "images of half the size": (
            small,
            {"teacher_view": lambda images, targets: images, "resize_levels": True},
        ),
    }


def measure_teacher(cell: Cell, options: argparse.Namespace) -> Result:
    """What a step runs of the teacher, by several means in turn, its peak memory, and the losses with it."""
    torch.manual_seed(options.seed)
    images, targets = make_batch(options)
    teacher, student = build_pair(cell.subject, laid_out(options, "contiguous"), images)
    for module in [*teacher.head.modules(), *student.head.modules()]:
        if isinstance(module, nn.Conv2d):  # new ones answer alike everywhere, and all losses are near 0
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    cases, losses = {}, {}
    for name, (cheap, further) in cheaper_teachers(cell, options, teacher, images).items():
        method = METHODS["crosskd"].make(DEFAULTS)
        distiller = Distiller(cheap, student, method, adapter_of, prove=False, **further)
        if name.endswith("compiled"):
            distiller.teacher.backbone.compile(backend=options.backend)
        with torch.no_grad():
            given = distiller(images, targets)
        losses[name] = {key: float(loss) for key, loss in given.items() if key.startswith("kd_")}
        batch = distiller.student_adapter.prepare(images, targets)
        seen = distiller.teacher_batch(batch, images, targets)
        cases[name] = partial(run_teacher, distiller.pair, seen, dict(distiller.methods.items()))
    seconds = timed(cases, options)
    peak = {name: measure.memory(function, options.device).peak for name, function in cases.items()}
    return {"seconds": seconds, "peak": peak, "losses": losses}


# -- losses --------------------------------------------------------------------------------------


def measure_loss(cell: Cell, options: argparse.Namespace) -> Result:
    """The present loss beside the plain formula and a copy of memory; eager also without kernels."""
    width = WIDTHS.get(cell.subject, options.classes)
    settings = argparse.Namespace(**{**vars(options), "dtype": cell.dtype})
    inputs = make_inputs(cell.subject, (options.batch, options.anchors, width), settings)
    plain, ours = LOSSES[cell.subject]
    implementations = {"plain": plain, "crosskd": ours}
    if cell.mode == "compiled":
        # The compiler is handed the plain formula. Batches of many sizes would want it for all of them.
        compiled = {"crosskd compiled": False, "compiled for any size": True}
        for name, dynamic in compiled.items():
            implementations[name] = torch.compile(ours, dynamic=dynamic, backend=options.backend)
    source, target = inputs[1], torch.empty_like(inputs[1])

    def both(loss: Callable[..., Tensor]) -> None:
        inputs[0].grad = None
        loss(*inputs, 100.0).backward()

    def repeated(function: Callable[[], object]) -> None:
        for _ in range(REPEATS):
            function()

    def in_operators() -> None:
        off = {"has_kernel": lambda *_: False}
        with patch.multiple(quality_focal, **off), patch.multiple(distributions, **off):
            both(ours)

    cases = {name: partial(both, loss) for name, loss in implementations.items()}
    if cell.mode == "eager":
        cases["crosskd without its kernels"] = in_operators
    peaks = {}
    for name, case in cases.items():
        case()
        inputs[0].grad = None
        peaks[name] = measure.memory(case, options.device).peak
    size = source.numel() * source.element_size()
    timings = timed(
        {
            "copy": partial(repeated, partial(target.copy_, source)),
            **{name: partial(repeated, case) for name, case in cases.items()},
        },
        options,
    )
    seconds = {name: [value / REPEATS for value in values] for name, values in timings.items()}
    return {"seconds": seconds, "peak": peaks, "bytes": size, "shape": list(source.shape)}


# -- one after the other -------------------------------------------------------------------------

MEASURES = {"step": measure_steps, "teacher": measure_teacher, "loss": measure_loss}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` in what runs inside after some seconds."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measured(cell: Cell, options: argparse.Namespace, left: float) -> Result | None:
    """A measurement's result, or what it failed with; ``None`` where the script's own minutes ended.

    Args:
        cell: what to measure.
        options: the script's.
        left: seconds until the script has to end.
    """
    seconds = min(left, options.cell_seconds)
    try:
        with limited(seconds):
            return MEASURES[cell.kind](cell, options)
    except OutOfTime:
        return None if left <= options.cell_seconds else {"error": f"not done in {seconds:.0f} s"}
    except Exception as error:  # noqa: BLE001
        # Whatever it is, the next measurement may well work.
        first_line = next(iter(str(error).splitlines()), "")
        return {"error": f"{type(error).__name__}: {first_line[:160]}"}


def clear(device: torch.device) -> None:
    """Frees what a measurement has left behind, before the next one."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)


def run(cells: list[Cell], options: argparse.Namespace) -> None:
    """Measures what has no file yet, until the time is over."""
    deadline = time.monotonic() + 60 * options.minutes
    for cell in cells:
        path = options.folder / f"{cell.name}.json"
        left = deadline - time.monotonic()
        if left <= 0:
            return
        if path.exists():
            continue
        # Should the process die in it, the next one goes on behind it.
        path.write_text(json.dumps({"error": "the process ended in it"}))
        begin = time.monotonic()
        result = measured(cell, options, left)
        if result is None:
            path.unlink()
            return
        path.write_text(json.dumps({"cell": asdict(cell), **result}))
        print(f"{cell.name}: {result.get('error', 'done')}, {time.monotonic() - begin:.0f} s", flush=True)
        try:
            clear(options.device)
        except RuntimeError as error:  # a kernel that failed so leaves the process without its GPU
            print(f"the GPU is gone after {cell.name}: {error}. Start the script again", file=sys.stderr)
            return


def check_folder(options: argparse.Namespace) -> None:
    """Raises ``ValueError`` for a folder with measurements that were made with other options."""
    decide = (
        "teacher",
        "student",
        "size",
        "batch",
        "classes",
        "objects",
        "anchors",
        "seed",
        "threads",
        "clock",
    )
    settings = {
        "versions": measure.versions(),
        "device": device_name(options.device),
        "backend": options.backend,
    }
    settings |= {name: str(getattr(options, name)) for name in decide}
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(settings))
    before = json.loads(path.read_text())
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{options.folder} holds measurements with {name} {before.get(name)}, and this is {value}: "
                "name another --folder, or delete it"
            )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


# -- the tables ----------------------------------------------------------------------------------


def median(values: list[float]) -> float:
    return measure.Spread.of(values).median


def step_rows(cell: Cell, result: Result) -> list[list[str]]:
    """The row of one measurement of steps."""
    seconds, peak = result["seconds"], result["peak"]
    teacher = ["", ""]
    if "teacher" in seconds:
        share = measure.ratios(seconds["teacher"], seconds["distilled"])
        teacher = [f"{1000 * median(seconds['teacher']):.1f}", f"{share.median:.2f}"]
    return [
        [
            cell.subject,
            METHODS[cell.method].label,
            cell.how,
            *(f"{1000 * median(seconds[name]):.1f}" for name in ("plain", "distilled")),
            measure.ratios(seconds["distilled"], seconds["plain"]).text(),
            *teacher,
            *(f"{peak[name] / MIB:.0f}" for name in ("plain", "distilled")),
            f"{peak['distilled'] / peak['plain']:.2f}",
            f"{result['first']:.0f}",
        ]
    ]


def teacher_rows(cell: Cell, result: Result) -> list[list[str]]:
    """The rows of one measurement of the teacher."""
    first = next(iter(result["seconds"].values()))
    plain, *_ = result["losses"].values()
    rows = []
    for name, seconds in result["seconds"].items():
        own = result["losses"][name]
        changes = [f"{own[key] / plain[key] - 1:+.1e}" for key in plain]
        rows.append(
            [
                cell.subject,
                name,
                f"{1000 * median(seconds):.1f}",
                measure.ratios(seconds, first).text(),
                f"{result['peak'][name] / MIB:.0f}",
                *(changes if own is not plain else [f"{loss:.4g}" for loss in plain.values()]),
            ]
        )
    return rows


def loss_rows(cell: Cell, result: Result) -> list[list[str]]:
    """The rows of one measurement of a loss."""
    seconds, size = result["seconds"], result["bytes"]
    copied = COPY_PASSES * size / median(seconds["copy"])
    label = f"{cell.subject} {'x'.join(map(str, result['shape']))}"
    rows = [
        [
            label,
            cell.dtype,
            "a copy",
            f"{1000 * median(seconds['copy']):.2f}",
            "",
            f"{copied / 1e9:.0f}",
            "",
            "",
        ]
    ]
    for name, peak in result["peak"].items():
        speed = LEAST_PASSES * size / median(seconds[name])
        rows.append(
            [
                label,
                cell.dtype,
                name,
                f"{1000 * median(seconds[name]):.2f}",
                measure.ratios(seconds[name], seconds["plain"]).text(),
                f"{speed / 1e9:.0f}",
                f"{speed / copied:.2f}",
                f"{peak / size:.2f}",
            ]
        )
    return rows


def tables(cells: list[Cell], folder: Path) -> list[str]:
    """What was measured, as Markdown, and what was not."""
    rows: dict[str, list[list[str]]] = {kind: [] for kind in MEASURES}
    makers = {"step": step_rows, "teacher": teacher_rows, "loss": loss_rows}
    failed, missing = [], []
    for cell in cells:
        path = folder / f"{cell.name}.json"
        result = json.loads(path.read_text()) if path.exists() else None
        if result is None:
            missing.append(cell.name)
        elif "error" in result:
            failed.append([cell.name, result["error"].replace("|", "/")])
        else:
            rows[cell.kind] += makers[cell.kind](cell, result)
    parts = []
    for kind, (header, explanation) in EXPLANATIONS.items():
        if rows[kind]:
            parts += [explanation, measure.table(header, rows[kind])]
    if failed:
        parts += ["Failed:", measure.table(("measurement", "error"), failed)]
    if missing:
        parts += [f"Not measured, for the minutes were over: {', '.join(missing)}."]
    return parts


STEP_EXPLANATION = """\
The student's plain step and the distilled one, in turn, forward and backward, without an optimizer's step.
Compiled: of the plain student backbone and head, of the distiller all; preprocessing, label assignment and
the student's own losses are eager in both. The teacher's forward is what a step runs of it. Times are medians
over the rounds; ratios are taken round by round, with their quartiles in brackets. Peak memory is what is
allocated above the weights. The last column: the first call of each, where the compiler works."""

TEACHER_EXPLANATION = """\
What a distilled step beside a student in float32 runs of the teacher, by several means, in turn; compiled:
its backbone. The last two columns: CrossKD's losses in the first row, below it their relative changes; the
weights are untrained, the heads' drawn anew so that answers differ from place to place. Images of half the
size: the teacher resizes them so, and its predictions are brought to the student's locations."""

LOSS_EXPLANATION = f"""\
Losses, forward and backward. GB/s: {LEAST_PASSES} times the bytes of one input, which is the least to be
read and written, over the time; of a copy, twice its bytes. Peak memory is counted beside the two inputs, in
units of one."""

EXPLANATIONS = {
    "step": (STEP_HEADER, STEP_EXPLANATION),
    "teacher": (TEACHER_HEADER, TEACHER_EXPLANATION),
    "loss": (LOSS_HEADER, LOSS_EXPLANATION),
}


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measure.add_options(parser)
    parser.set_defaults(device=torch.device("cuda"), rounds=8)
    parser.add_argument("--minutes", type=float, default=9.5, help="no measurement goes on for longer")
    parser.add_argument(
        "--cell-seconds", type=float, default=200, help="what one may take, compiling included"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"), help="of the measurements' files")
    parser.add_argument("--only", nargs="+", default=[], help="beginnings of names: loss, step-gfl-crosskd")
    parser.add_argument("--teacher", default="resnet101", help="the teacher's backbone")
    parser.add_argument("--student", default="resnet50", help="the student's backbone")
    parser.add_argument("--size", type=size_of, default=(800, 1333), help="height x width of the images")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--objects", type=int, default=8, help="boxes per image")
    parser.add_argument("--anchors", type=int, default=200_000, help="of an image, for the losses")
    parser.add_argument("--backend", default="inductor", help="torch.compile's")
    options = parser.parse_args(arguments)
    if not planned(options.only):
        parser.error(f"--only {' '.join(options.only)} begins no name; they begin with {', '.join(MEASURES)}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    load = os.getloadavg()
    check_folder(options)
    cells = planned(options.only)
    run(cells, options)
    height, width = options.size
    setting = (
        f"{options.student} from {options.teacher}, untrained, batch {options.batch} of {height}x{width}, "
        f"{options.classes} classes, {options.objects} boxes per image"
    )
    text = "\n\n".join(
        [
            f"# Steps, teacher and losses, {options.device.type}",
            f"{measure.environment('benchmarks/gpu.py', options, load)}\n- setting: {setting}",
            *tables(cells, options.folder),
        ]
    )
    measure.write(text, options.output)


if __name__ == "__main__":
    main()
