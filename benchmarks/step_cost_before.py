"""What a step costs now beside what it cost in another version, in one run.

    git worktree add ../before REVISION
    python benchmarks/step_cost_before.py --before ../before --threads 1 --clock cpu

Each version runs in a process of its own with its own ``examples`` and ``benchmarks/step_cost.py``, and they
take turns, round by round. ``a`` is the student's plain step and ``d`` the distillation step, as there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import measure
import torch
from measure import ratios

HERE = Path(__file__).resolve().parent
NOW, BEFORE = "now", "before"
# Families and methods that both versions know.
ROWS = (
    ("retinanet", "crosskd"),
    ("fcos", "crosskd"),
    ("gfl", "crosskd"),
    ("gfl", "mimic"),
    ("gfl", "pkd"),
    ("gfl", "ssim"),
    ("gfl", "fgd"),
)


def turns(
    roots: dict[str, Path], family: str, method: str, rounds: int, arguments: list[str]
) -> dict[str, dict[str, list[float]]]:
    """Seconds of both steps by version, the versions taking turns; a first round is not counted."""
    workers = {}
    for name, root in roots.items():
        command = [sys.executable, str(HERE / "step_cost_worker.py"), str(root), family, method]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        workers[name] = subprocess.Popen(
            [*command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
    found: dict[str, dict[str, list[float]]] = {name: {"a": [], "d": []} for name in roots}
    for number in range(rounds + 1):
        names = list(roots) if number % 2 else list(roots)[::-1]
        for name in names:
            answer = ask(workers[name])
            for step, seconds in answer.items():
                if number:
                    found[name][step].append(seconds)
    for worker in workers.values():
        worker.communicate()
    return found


def ask(worker: subprocess.Popen[str]) -> dict[str, float]:
    """One measurement of a version's process."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"a version's process ended with {worker.wait()}: its error stands above")
    answer: dict[str, float] = json.loads(line)
    return answer


def revision(root: Path) -> str:
    """The commit that a folder holds."""
    command = ["git", "-C", str(root), "log", "-1", "--format=%h of %as"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: list[str] | None = None) -> None:
    """Measures all rows and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measure.add_options(parser)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the other version")
    parser.add_argument("--rows", nargs="+", default=["/".join(row) for row in ROWS], help="family/method")
    parser.add_argument("--size", default="256x320", help="height x width of the images")
    parser.add_argument("--batch", default="2")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    load = os.getloadavg()
    roots = {BEFORE: options.before.resolve(), NOW: HERE.parent}
    shared = {"--threads": options.threads, "--clock": options.clock, "--seed": options.seed}
    shared |= {"--size": options.size, "--batch": options.batch, "--device": options.device}
    given = [str(part) for pair in shared.items() for part in pair]
    rows = []
    for row in options.rows:
        family, method = row.split("/")
        seconds = turns(roots, family, method, options.rounds, given)
        rows.append(_row(f"{family}, {method}", seconds))
        print(rows[-1], flush=True)
    parts = [
        "# Cost of a step, now and before",
        measure.environment("benchmarks/step_cost_before.py", options, load)
        + f"\n- versions of crosskd: now {revision(roots[NOW])}, before {revision(roots[BEFORE])}"
        + f"\n- setting: resnet18 from resnet50, untrained, batch {options.batch} of {options.size}",
        "a: the student's plain step, which should cost the same; d: the distillation step. Ratios are taken "
        "round by round, with their quartiles in brackets.",
        measure.table(("", "a, now / before", "d, now / before", "d / a before", "d / a now"), rows),
    ]
    measure.write("\n\n".join(parts), options.output)


def _row(label: str, seconds: dict[str, dict[str, list[float]]]) -> list[str]:
    now, before = seconds[NOW], seconds[BEFORE]
    pairs: tuple[Any, ...] = (
        (now["a"], before["a"]),
        (now["d"], before["d"]),
        (before["d"], before["a"]),
        (now["d"], now["a"]),
    )
    return [label, *(ratios(*pair).text() for pair in pairs)]


if __name__ == "__main__":
    main()
