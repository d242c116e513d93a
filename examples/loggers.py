"""Loggers of the training script, by the names that ``--logger`` takes.

One of your own is one more function and its line in ``LOGGERS``. It gets a folder, and returns what is told
each epoch's entry of a model's history: losses, learning rate, speed, and metrics where it was evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Log = Callable[[str, dict[str, Any]], None]


def none(folder: Path) -> Log:
    """Tells nobody."""
    return lambda name, entry: None


def tensorboard(folder: Path) -> Log:
    """Scalars for TensorBoard, a run for each model: ``tensorboard --logdir FOLDER``."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SystemExit(f"--logger tensorboard: pip install tensorboard ({error})") from error
    writers: dict[str, Any] = {}

    def log(name: str, entry: dict[str, Any]) -> None:
        if name not in writers:  # what a killed run told of later epochs is dropped
            writers[name] = SummaryWriter(str(folder / name), purge_step=entry["epoch"])
        scalars = {f"loss/{key}": value for key, value in entry["losses"].items()}
        scalars |= {f"metrics/{key}": value for key, value in entry.get("metrics", {}).items()}
        scalars |= {key: entry[key] for key in ("learning_rate", "images_per_second")}
        for key, value in scalars.items():
            writers[name].add_scalar(key, value, entry["epoch"])
        writers[name].flush()

    return log


LOGGERS: dict[str, Callable[[Path], Log]] = {"none": none, "tensorboard": tensorboard}
