"""The process of one version, for step_cost_before.py: it measures a step each time that it reads a line."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def work(root: Path, family: str, method: str, arguments: list[str]) -> None:
    """Measures both steps of one version each time that a line is read, until there are no more."""
    sys.path[:0] = [str(root / folder) for folder in ("", "benchmarks", "examples")]
    import measure
    import step_cost
    import torch

    import crosskd

    if Path(crosskd.__file__).resolve().parents[1] != root:
        raise SystemExit(f"measured {crosskd.__file__} instead of {root}: is crosskd on PYTHONPATH?")
    options = step_cost.parse_options(arguments)
    torch.set_num_threads(options.threads)
    pieces = step_cost.Pieces(family, options, method)
    cases = {"a": pieces.student_step, "d": pieces.distillation_step}
    for _ in sys.stdin:
        seconds = measure.timed_rounds(cases, 1, options.device, warmup=0, clock=options.clock)
        print(json.dumps({name: values[0] for name, values in seconds.items()}), flush=True)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
