"""The scripts in the loops of accelerate and Lightning train as the plain loop does."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from shutil import copytree

import pytest
import torch
import train_torchvision
from processes import Processes, start
from train_torchvision import parse, prepare_one, train

from tests.helpers import forked
from tests.helpers.packages import package
from tests.helpers.tiny import tiny_detector

ALONE = Processes(0, 1, torch.device("cpu"))
SCRIPTS = pytest.mark.parametrize("name", ["accelerate", "lightning"])
ARGUMENTS = [
    *("--shapes-train", "10", "--shapes-val", "2", "--batch-size", "2", "--epochs", "2", "--device", "cpu"),
    *(
        "--teacher-weights",
        "teacher.pt",
        "--stop-distilling",
        "1",
        "--accumulate",
        "2",
    ),
]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Small detectors of random weights."""
    monkeypatch.setattr(train_torchvision, "new_detector", tiny_detector)
    monkeypatch.chdir(tmp_path)


@SCRIPTS
def test_the_weights_are_those_of_the_plain_loop(name, tiny, capsys):
    """Five batches in parts of two: the last step of an epoch has one; a norm of 20 clips some of them."""
    package(name)
    arguments = [*ARGUMENTS, "--clip", "20", "--optimizer", "sgd"]
    options = parse(["--output", "plain", "--evaluate-every", "2", *arguments])
    model, _, data, _ = prepare_one(options, ALONE)
    plain, history = train(model, "crosskd", 2, options, data, ALONE, lambda *_: None)
    metrics = import_module(f"with_{name}").main(["--output", "other", *arguments])
    assert metrics == history[-1]["metrics"]
    assert "the student is other/crosskd.pt" in capsys.readouterr().out
    trained = torch.load("other/crosskd.pt", weights_only=True)
    # Lightning adds up the gradient's norm in another order.
    torch.testing.assert_close(trained, dict(plain.state_dict()), rtol=0, atol=1e-6)


@SCRIPTS
def test_what_other_loops_do_not_do_is_refused(name, tiny, capsys):
    package(name)
    given = ["--resume", "--ema=0.9", "--evaluate-every=1", "--checkpoint-every=1000", "--logger=tensorboard"]
    with pytest.raises(SystemExit):
        import_module(f"with_{name}").main([*ARGUMENTS, *given])
    said = capsys.readouterr().err
    assert all(option.partition("=")[0] in said for option in given)
    assert "--epochs" not in said
    assert not Path("runs").exists()


@SCRIPTS
def test_other_loops_take_threads_and_end_by_one_sentence(name, tiny, one_thread):
    package(name)
    main = import_module(f"with_{name}").main
    torch.set_num_threads(2)
    with pytest.raises(SystemExit, match="retinanet_resnet18 isn't trained.*--teacher-weights"):
        main([*ARGUMENTS[:10], "--output", "run", "--threads", "1"])
    assert torch.get_num_threads() == 1
    with pytest.raises(SystemExit, match="position.*9"):
        main([*ARGUMENTS, "--output", "other", "--position", "9"])


def lightnings_loop(arguments: list[str]) -> None:
    train_torchvision.new_detector = tiny_detector
    import_module("with_lightning").main(arguments)


def plain_loop(arguments: list[str]) -> None:
    train_torchvision.new_detector = tiny_detector
    processes = start("cpu")
    options = parse(["--output", "plain", "--evaluate-every", "2", *arguments])
    model, _, data, _ = prepare_one(options, processes)
    train(model, "crosskd", 2, options, data, processes, lambda *_: None)


@pytest.mark.slow
def test_two_processes_of_lightnings_train_as_two_of_torchruns(tiny):
    package("lightning")
    arguments = [*ARGUMENTS, "--batch-size", "1", "--clip", "0", "--optimizer", "sgd"]
    assert forked.on_ranks(plain_loop, arguments) == [0, 0]
    copytree("plain/data", "other/data")  # which Lightning's second process, started in fit(), finds there
    assert forked.on_ranks(lightnings_loop, ["--output", "other", "--devices", "2", *arguments]) == [0, 0]
    plain, other = (torch.load(f"{folder}/crosskd.pt", weights_only=True) for folder in ("plain", "other"))
    torch.testing.assert_close(other, plain, rtol=0, atol=1e-6)
