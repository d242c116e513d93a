"""The loggers of `--logger`."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from loggers import LOGGERS

ENTRY = {"epoch": 3, "losses": {"kd_cls": 0.5}, "learning_rate": 0.1, "images_per_second": 9.0}


def test_tensorboard_is_told_losses_and_metrics(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, key: str, value: float, step: int) -> None:
            written.append((key, value, step))

        def flush(self) -> None:
            pass

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    LOGGERS["tensorboard"](tmp_path)("crosskd", {**ENTRY, "metrics": {"AP": 40.0}})
    assert written[0] == (str(tmp_path / "crosskd"), 3)
    assert {("loss/kd_cls", 0.5, 3), ("metrics/AP", 40.0, 3), ("learning_rate", 0.1, 3)} <= set(written)


def test_tensorboard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit, match="pip install tensorboard"):
        LOGGERS["tensorboard"](tmp_path)


def test_none_writes_nothing(tmp_path):
    LOGGERS["none"](tmp_path / "logs")("crosskd", ENTRY)
    assert not list(tmp_path.iterdir())
