"""The scripts in the loops of accelerate and Lightning train as the plain loop does."""

from __future__ import annotations

from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import train_torchvision
from processes import Processes
from torchvision.models.detection import RetinaNet
from train_torchvision import parse, prepare_one, train

from tests.helpers.packages import package
from tests.helpers.tiny import tiny_retinanet

ALONE = Processes(0, 1, torch.device("cpu"))
ARGUMENTS = [
    *("--shapes-train", "10", "--shapes-val", "2", "--batch-size", "2", "--epochs", "2", "--device", "cpu"),
    *(
        "--teacher-weights",
        "teacher.pt",
        "--evaluate-every",
        "2",
        "--stop-distilling",
        "1",
        "--accumulate",
        "2",
    ),
]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Small detectors of random weights."""

    def detector(name: str, options: Namespace, classes: int, weights: Path | None = None) -> RetinaNet:
        return tiny_retinanet(classes, seed=weights is None, batch_norm=True)

    monkeypatch.setattr(train_torchvision, "new_detector", detector)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["accelerate", "lightning"])
def test_the_weights_are_those_of_the_plain_loop(name, tiny, capsys):
    """Five batches in parts of two: the last step of an epoch has one; a norm of 20 clips some of them."""
    package(name)
    arguments = [*ARGUMENTS, "--clip", "20", "--optimizer", "sgd"]
    options = parse(["--output", "plain", *arguments])
    model, _, data, _ = prepare_one(options, ALONE)
    plain, history = train(model, "crosskd", 2, options, data, ALONE, lambda *_: None)
    metrics = import_module(f"with_{name}").main(["--output", "other", *arguments])
    assert metrics == history[-1]["metrics"]
    assert "the student is other/crosskd.pt" in capsys.readouterr().out
    trained = torch.load("other/crosskd.pt", weights_only=True)
    # Lightning adds up the gradient's norm in another order.
    torch.testing.assert_close(trained, dict(plain.state_dict()), rtol=0, atol=1e-6)


def test_what_other_loops_do_not_do_is_refused(tiny):
    with pytest.raises(SystemExit, match="--resume, --ema: only the loop of train_torchvision.py"):
        prepare_one(parse([*ARGUMENTS, "--resume", "--ema", "0.9"]), ALONE)
    with pytest.raises(SystemExit, match="retinanet_resnet18 isn't trained.*--teacher-weights"):
        prepare_one(parse([*ARGUMENTS[:10], "--output", "run"]), ALONE)
