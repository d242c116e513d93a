"""What keeping a teacher's outputs on disk saves, and what it takes: steps per second, megabytes per image.

    python benchmarks/teacher_cache.py
    python benchmarks/teacher_cache.py --cells gfl:resnet50:pkd:bfloat16:512x640:2 --folder /data/cache

A cell is FAMILY:TEACHER:METHOD:DTYPE:SIZE:BATCH, with ``none`` for maps and predictions in the type that they
were calculated in. All that is compared runs in turn, in one process:

* the teacher's run as a step needs it;
* its entries read from memory, where the operating system keeps what was read or written lately (and, by
  the wall clock, the same files read from the disk after it was told to forget them);
* pixels that come for the first time: hashed, run and written, which is every step of a run whose
  augmentation never gives the same pixels twice;
* up to ``--largest-step`` pixels an image, whole steps, forward and backward: the student's plain one, the
  distilled one, and the distilled one that reads.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import measure
import torch
from step_cost import DEFAULTS, METHODS, adapter_of, build_pair, make_batch, take_first_steps

from crosskd import Distiller, TeacherCache
from crosskd.running import run_teacher

CELLS = (
    "retinanet:resnet50:crosskd:none:256x320:1",
    "retinanet:resnet50:crosskd:bfloat16:256x320:1",
    "gfl:resnet50:crosskd:bfloat16:256x320:1",
    "retinanet:resnet50:pkd:bfloat16:256x320:1",
    "retinanet:mobilenet_v3_large:pkd:none:256x320:1",
    "retinanet:resnet50:crosskd:bfloat16:800x1333:1",
    "retinanet:resnet50:pkd:bfloat16:800x1333:1",
)
TEACHER_HEADER = (
    "teacher",
    "method",
    "kept in",
    "images",
    "MB per image",
    "teacher, ms",
    "reading / teacher",
    "new pixels / teacher",
    "the file from disk, ms",
)
STEP_HEADER = (
    "teacher",
    "method",
    "kept in",
    "plain, steps/s",
    "with the teacher, steps/s",
    "reading, steps/s",
    "reading / with the teacher",
)


class Cell:
    """A pair with a folder of entries, and what is timed of it.

    Args:
        text: FAMILY:TEACHER:METHOD:DTYPE:SIZE:BATCH.
        options: the script's.
        folder: for the entries.
    """

    def __init__(self, text: str, options: argparse.Namespace, folder: Path) -> None:
        family, teacher, self.method, self.dtype, self.size, batch = text.split(":")
        self.name, self.folder = f"{family}_{teacher}", folder
        size = tuple(int(side) for side in self.size.split("x"))
        own = {"size": size, "batch": int(batch), "teacher": teacher, "device": torch.device("cpu")}
        options = argparse.Namespace(**{**vars(options), **own})
        self.images, self.targets = make_batch(options)
        self.label = f"{batch} of {self.size}"
        self.pixels = size[0] * size[1]
        given, self.student = build_pair(family, options, self.images)
        methods = METHODS[self.method].make(DEFAULTS)
        self.cache = TeacherCache(folder, dtype=measure.AMP_TYPES[self.dtype], keep_free=1)
        self.running = Distiller(given, self.student, methods, adapter_of)
        self.reading = Distiller(given, self.student, methods, adapter_of, teacher_cache=self.cache)
        self.pair, self.methods = self.running.pair, dict(self.running.methods.items())
        prepared = self.pair.student.prepare(self.images, self.targets)
        self.seen = self.running.teacher_batch(prepared, self.images, self.targets)
        self.proved: set[str] = set()
        for _ in range(2):  # what is found first is compared with the teacher, once
            self.read()
        self.entries = sorted(folder.glob("??/*.pt"))
        self.megabytes = sum(path.stat().st_size for path in self.entries) / len(self.entries) / 1e6
        self.number = 0

    def run(self) -> None:
        """The teacher's run."""
        run_teacher(self.pair, self.seen, self.methods)

    def read(self) -> None:
        """Its entries, which the operating system keeps in memory."""
        self.cache.run(self.pair, self.seen, self.methods, self.proved)

    def milliseconds_from_disk(self) -> float:
        """How long the disk takes for the bytes of one image that the operating system doesn't have."""
        seconds = []
        for _ in range(9):
            for path in self.entries:
                file = os.open(path, os.O_RDONLY)
                os.fsync(file)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                begin = time.perf_counter()
                path.read_bytes()
                seconds.append(time.perf_counter() - begin)
                os.close(file)
        return 1e3 * median(seconds)

    def new_pixels(self) -> None:
        """Entries of images that come for the first time."""
        self.number += 1
        seen = replace(self.seen, pixels=self.seen.pixels + 1e-3 * self.number)
        self.cache.run(self.pair, seen, self.methods, self.proved)

    def step(self, model: torch.nn.Module) -> None:
        """A model's forward and backward."""
        model.zero_grad()
        torch.stack(list(model(self.images, self.targets).values())).sum().backward()

    def teacher_row(self, options: argparse.Namespace) -> list[str]:
        """The teacher's part alone."""
        cases: dict[str, Callable[[], object]] = {"run": self.run, "read": self.read, "new": self.new_pixels}
        found = measure.timed_rounds(cases, options.rounds, torch.device("cpu"), clock=options.clock)
        over = [measure.ratios(found[name], found["run"]).text() for name in ("read", "new")]
        teacher, disk = f"{1e3 * median(found['run']):.0f}", f"{self.milliseconds_from_disk():.1f}"
        return [*self.names(), self.label, f"{self.megabytes:.1f}", teacher, *over, disk]

    def step_row(self, options: argparse.Namespace) -> list[str]:
        """Whole steps."""
        for model in (self.running, self.reading):
            take_first_steps(model, self.images, self.targets)
        cases: dict[str, Callable[[], object]] = {
            "plain": lambda: self.step(self.student),
            "with": lambda: self.step(self.running),
            "reading": lambda: self.step(self.reading),
        }
        found = measure.timed_rounds(cases, options.rounds, torch.device("cpu"), clock=options.clock)
        rates = [f"{1 / median(seconds):.2f}" for seconds in found.values()]
        return [*self.names(), *rates, measure.ratios(found["with"], found["reading"]).text()]

    def names(self) -> list[str]:
        """What a row begins with."""
        kept = "float32" if self.dtype == "none" else self.dtype
        return [self.name, METHODS[self.method].label, kept]


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    measure.add_options(parser)
    parser.add_argument("--cells", nargs="+", default=CELLS)
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--objects", type=int, default=8)
    parser.add_argument("--largest-step", type=int, default=300_000, metavar="PIXELS")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to be measured; a temporary one unless given"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    options.channels_last = False
    torch.set_num_threads(options.threads)
    load, teachers, steps = os.getloadavg(), [], []
    for text in options.cells:
        torch.manual_seed(options.seed)
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            cell = Cell(text, options, folder)
            teachers.append(cell.teacher_row(options))
            if cell.pixels <= options.largest_step:
                steps.append(cell.step_row(options))
        finally:
            shutil.rmtree(folder)
        print(teachers[-1], flush=True)
    parts = [
        "# A teacher's outputs on disk",
        measure.environment("benchmarks/teacher_cache.py", options, load)
        + f"\n- setting: {options.student} from each teacher, untrained, {options.classes} classes",
        TEACHER_EXPLANATION,
        measure.table(TEACHER_HEADER, teachers),
    ]
    if steps:
        parts += [STEP_EXPLANATION, measure.table(STEP_HEADER, steps)]
    measure.write("\n\n".join(parts), options.output)


TEACHER_EXPLANATION = """\
The teacher's part of a step: its run as the method needs it, and what stands in its place. Reading: pixels
hashed, entries found, checked and joined, which the operating system has in memory; the last column is what
the disk takes, by the wall clock, for one image's file that it doesn't have there. New pixels: hashed, run
and written, as in every step of a run whose pixels never come twice. Times are medians over rounds that run
all three; ratios are taken round by round, with their quartiles in brackets."""

STEP_EXPLANATION = """\
Whole steps, forward and backward, without an optimizer's: the student's plain one, the distilled one, and the
one that reads from memory. The last column: how many of its steps fit into one with the teacher."""


if __name__ == "__main__":
    main()
