"""What the benchmarks share: timing in rounds, peak memory, and tables that say how they were made."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # before torch is imported: the profiler logs each start

import torch
import torchvision
from torch._subclasses.fake_tensor import FakeTensor

import crosskd

MIB = 2**20
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
AMP_TYPES = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Spread:
    """The middle of repeated measurements and how far they spread.

    Attributes:
        median: half the measurements lie below.
        low: a quarter lie below.
        high: a quarter lie above.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarises at least one value."""
        low, median, high = statistics.quantiles([*values, *values], n=4, method="inclusive")
        return cls(median, low, high)

    def text(self, digits: int = 2) -> str:
        """The median, with the quartiles in brackets."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class Memory:
    """Bytes that torch's allocator handed out, above what was held before.

    Attributes:
        peak: the most at any moment.
        kept: what was still held at the end, the result being alive.
    """

    peak: int
    kept: int


def timed_rounds(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    warmup: int = 1,
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Seconds of each case in each round.

    Every round runs every case once, starting at another one each time. A machine that slows down for a
    while slows all of them, so ratios within a round hold where times do not.

    Args:
        cases: what to time, by name.
        rounds: how many times.
        device: on an accelerator, work is waited for before and after each case.
        warmup: rounds that are run before and not counted.
        clock: ``"wall"``, or ``"cpu"`` for the seconds that this process worked: the one to trust on a
            machine that others use too, with one thread (several wait for each other by working).
    """
    now = CLOCKS[clock]
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            _wait(device)
            begin = now()
            cases[name]()
            _wait(device)
            if number >= warmup:
                seconds[name].append(now() - begin)
    return seconds


def ratios(numerator: Iterable[float], denominator: Iterable[float]) -> Spread:
    """The spread of the ratios round by round."""
    return Spread.of([top / bottom for top, bottom in zip(numerator, denominator, strict=True)])


def memory(function: Callable[[], object], device: torch.device) -> Memory:
    """Runs a function and counts what torch's allocator hands out meanwhile.

    On the CPU the profiler's allocation events are added up: exact, and the same on every run, unlike a
    process's resident memory. On CUDA the allocator keeps count itself.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        kept = torch.cuda.memory_allocated(device) - before
        del result
        return Memory(peak, kept)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    del result
    allocations = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"
    )
    peak = held = 0
    for _, size in allocations:
        held += size
        peak = max(peak, held)
    return Memory(peak, held)


def tensor_bytes_alive() -> int:
    """Bytes of all tensors that Python can reach, each storage counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.layout == torch.strided:
            if isinstance(thing, FakeTensor):
                continue  # the compiler's stand-ins have no memory
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def mean_and_deviation(values: list[float], sign: str = "") -> str:
    """As it stands in a table."""
    mean = f"{statistics.mean(values):{sign}.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all scripts have."""
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: seconds that this process worked, for one thread on a machine that others use too",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="the Markdown file to write")


def autocast(device: torch.device, amp: str) -> AbstractContextManager[object]:
    """Autocast of one of ``AMP_TYPES``, or nothing."""
    dtype = AMP_TYPES[amp]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def environment(script: str, options: argparse.Namespace, load: Sequence[float]) -> str:
    """How a table was made, as a Markdown list.

    Args:
        script: the script's path in the repository.
        options: those of `add_options`.
        load: the machine's load averages before the start: above 0, others were running too.
    """
    device = options.device
    clocks = {"wall": "wall clock", "cpu": "CPU seconds of the process"}
    facts = {
        "command": f"`{_command(script)}`",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": str(torch.get_num_threads()),
        "time": f"{clocks[options.clock]}, {options.rounds} rounds",
        "load before the start (1, 5, 15 minutes)": ", ".join(f"{value:.1f}" for value in load),
        "versions": versions(),
        "seed": str(options.seed),
    }
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


def versions() -> str:
    """What the numbers were made with."""
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, crosskd {crosskd.__version__}{revision()}"
    )


def revision() -> str:
    """The commit, with ``-dirty`` where files of it were changed since; nothing outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f" ({run.stdout.strip()})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(text: str, output: Path | None) -> None:
    """Prints a result, and keeps it in a file if one is named."""
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _command(script: str) -> str:
    """The command line without the names of what it writes, which tell nothing about the numbers."""
    arguments = iter(sys.argv[1:])
    kept = []
    for argument in arguments:
        if argument in ("--output", "--folder"):
            next(arguments, None)
        elif not argument.startswith(("--output=", "--folder=")):
            kept.append(argument)
    return " ".join(["python", script, *kept])


def processor() -> str:
    """The processor, by its own name."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"
