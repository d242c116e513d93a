"""What a teacher that sees more than the student is worth: the runs of examples/cross_modality.py as a table.

A run that was finished is not repeated and one that was stopped goes on after its last epoch, so the command
can be stopped and given again::

    python benchmarks/paired_images.py --data data/deeppcb --seeds 0 1 2

All options are the example's, beside ``--results``. The numbers are those of the test split: choose settings
by running the example, which evaluates on the validation split.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure import mean_and_deviation, processor, table, versions

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "examples" / "cross_modality.py"
NAMES = {
    "teacher": "teacher, on its own images",
    "alone": "student alone",
    "features": "features",
    "features+responses": "features, then responses",
}
COLUMNS = ("AP", "AP50", "AP75")


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """This script's options, and those of the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = REPOSITORY / "benchmarks" / "results" / "cross_modality.md"
    parser.add_argument("--output", type=Path, default=Path("runs/cross_modality"))
    parser.add_argument("--results", type=Path, default=default)
    return parser.parse_known_args(arguments)


def by_student(results: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """Metrics by student and seed; the teacher's seed is 0."""
    found: dict[str, dict[int, Any]] = {}
    for run, metrics in results.items():
        name, _, seed = run.partition("-")
        found.setdefault(name, {})[int(seed or 0)] = metrics
    return found


def report(metrics: Mapping[str, Any], further: list[str]) -> str:
    """The table with what is needed to repeat it."""
    options, students = metrics["options"], by_student(metrics["results"])
    rows = []
    for name, runs in students.items():
        cells = [mean_and_deviation([run[column] for run in runs.values()]) for column in COLUMNS]
        gain = ""
        if name not in ("teacher", "alone") and "alone" in students:
            gain = mean_and_deviation(
                [run["AP"] - students["alone"][s]["AP"] for s, run in runs.items()], "+"
            )
        rows.append([NAMES[name], str(len(runs)), *cells, gain])
    backbone = "random weights" if options["random_backbone"] else "ImageNet weights"
    data = Path(options["data"]).name
    shown = [f"data/{data}" if part == options["data"] else part for part in further]
    return "\n".join(
        [
            f"{data}, test split, whole images: the teacher sees `{options['teacher_images']}`, the students "
            f"`{options['images']}`. All are RetinaNets on MobileNetV2 with {backbone}, trained on "
            f"{options['batch_size']} crops of {options['crop']} pixels a step, the teacher for "
            f"{options['teacher_epochs']} epochs, each student for {options['epochs']} ({metrics['steps']} "
            "steps). Mean ± standard deviation over seeds; differences are taken seed by seed.",
            "",
            table(["", "seeds", *COLUMNS, "AP over student alone"], rows),
            "",
            "Made by",
            "",
            f"    {' '.join(['python benchmarks/paired_images.py', *shown])}",
            "",
            f"on {processor()} with {versions()} (seeds {', '.join(map(str, options['seeds']))}).",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs what has not been run yet, then writes the table."""
    options, further = parse(arguments)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(SCRIPT), "--split", "test", "--output", str(options.output), *further]
    subprocess.run(command, env=environment, check=True)
    metrics = json.loads((options.output / "metrics.json").read_text())
    text = report(metrics, further)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
