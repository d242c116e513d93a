"""The GPU script: its measurements at toy sizes on a CPU, their order, and what becomes of failed ones."""

from __future__ import annotations

import contextlib
import json
import sys
import time

import pytest
import torch

from tests.benchmarks.test_benchmarks import FOLDER, load, tables
from tests.helpers.imports import forgotten

pytestmark = pytest.mark.usefixtures("frozen_objects")
TOY = """--device cpu --size 64x64 --batch 1 --classes 3 --objects 2 --teacher resnet18 --student resnet18
--anchors 500 --rounds 1 --threads 1 --backend eager"""
LOSSES = ("loss-giou-eager-float32", "loss-distribution_kl-eager-float32")


@pytest.fixture
def gpu():
    """The script."""
    return load("gpu")


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(gpu, folder, *options):
    """Runs the script at its smallest and returns its tables."""
    output = folder / "gpu.md"
    gpu.main([*TOY.split(), "--folder", str(folder / "cells"), "--output", str(output), *options])
    return tables(output)


def test_tables(gpu, tmp_path, monkeypatch):
    # Which is counted for real in test_benchmarks.py, and takes longer than all else here.
    monkeypatch.setattr(gpu.measure, "memory", lambda function, device: gpu.measure.Memory(2**20, 0))
    names = ["step-retinanet-crosskd-eager-none-channels_last-bf", "teacher-retinanet-eager", LOSSES[1]]
    steps, teachers, losses = run(gpu, tmp_path, "--only", *names)
    (step,) = steps
    assert step["method"] == "CrossKD"
    assert step["how"] == "eager, float32, channels last, teacher in bfloat16"
    assert float(step["distilled, ms"]) > float(step["teacher, ms"]) > 0
    assert 0 < float(step["teacher / distilled"]) < 1
    assert float(step["plain, MiB"]) > 0
    assert len(teachers) == 8
    assert all(float(row["forward, ms"]) > 0 for row in teachers)
    # What each of them does to the losses: rounding of float32, of narrower types, and fewer pixels.
    *means, smaller = teachers[1:]
    for row in means:
        tolerance = 0.1 if "16" in row["teacher"] else 1e-4
        assert max(abs(float(row[key])) for key in ("kd_cls", "kd_reg")) < tolerance, row
    assert smaller["teacher"] == "images of half the size"
    assert abs(float(smaller["kd_cls"])) > 0.1
    implementations = ["a copy", "plain", "crosskd", "crosskd without its kernels"]
    assert [row["implementation"] for row in losses] == implementations
    assert all(float(row["forward + backward, ms"]) >= 0 for row in losses)
    assert losses[1]["loss"] == "distribution_kl 1x500x17"


@pytest.fixture
def _compiler_that_does_nothing(monkeypatch) -> None:
    """`test_compiled` has the real one."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.slow
def test_compiled(gpu, tmp_path):
    names = ["step-retinanet-crosskd-compiled-bfloat16", "loss-distribution_kl-compiled-float32"]
    (step,), losses = run(gpu, tmp_path, "--only", *names)
    implementations = ["a copy", "plain", "crosskd", "crosskd compiled", "compiled for any size"]
    assert [row["implementation"] for row in losses] == implementations
    assert step["how"] == "compiled, bfloat16, channels last"
    assert float(step["first calls, s"]) > 0
    assert step["teacher, ms"] == ""  # it would have to be compiled by itself


def test_what_matters_most_comes_first(gpu):
    cells = gpu.planned([])
    # All losses and steps that start at once, before the first that is compiled for a minute and more.
    first = cells[: next(place for place, cell in enumerate(cells) if cell.mode == "compiled")]
    assert {(cell.kind, cell.subject) for cell in first} == {
        *(("loss", loss) for loss in gpu.LOSSES),
        *(("step", family) for family in gpu.FAMILIES),
        ("teacher", "retinanet"),
    }
    assert cells[len(first)].name == "step-retinanet-crosskd-compiled-bfloat16-channels_last-same"
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.subject for cell in cells if cell.method == "ld"} == {"gfl"}
    for family in gpu.FAMILIES:
        eager = {cell.method for cell in cells if cell.subject == family and cell.mode == "eager"}
        assert eager == gpu.METHODS.keys() - ({"ld"} if family != "gfl" else set())


@pytest.mark.usefixtures("_compiler_that_does_nothing")
def test_a_failed_measurement_is_a_row_and_the_next_one_is_made(gpu, tmp_path, monkeypatch):
    calls = []

    def fail_once(cell, options):
        calls.append(cell.name)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory\nand more of it")
        return gpu.measure_loss(cell, options)

    monkeypatch.setitem(gpu.MEASURES, "loss", fail_once)
    losses, failed = run(gpu, tmp_path, "--only", *LOSSES)
    assert {row["loss"] for row in losses} == {"giou 1x500x4"}
    assert failed == [{"measurement": LOSSES[1], "error": "OutOfMemoryError: out of memory"}]
    # Made again, nothing is measured twice; without its file the failed one is.
    assert run(gpu, tmp_path, "--only", *LOSSES) == [losses, failed]
    (tmp_path / "cells" / f"{LOSSES[1]}.json").unlink()
    assert len(run(gpu, tmp_path, "--only", *LOSSES)) == 1
    assert len(calls) == 3


def test_time(gpu, tmp_path, monkeypatch):
    def endless(cell, options):
        while True:
            with contextlib.suppress(Exception):  # as a compiler might
                time.sleep(0.01)

    monkeypatch.setitem(gpu.MEASURES, "loss", endless)
    (failed,) = run(gpu, tmp_path, "--only", LOSSES[0], "--cell-seconds", "0.1")
    assert failed == [{"measurement": LOSSES[0], "error": "not done in 0 s"}]
    # The script's own time is no failure of what it interrupts.
    begin = time.monotonic()
    assert run(gpu, tmp_path, "--only", LOSSES[1], "--minutes", "0.005") == []
    assert time.monotonic() - begin < 5
    assert f"Not measured, for the minutes were over: {LOSSES[1]}" in (tmp_path / "gpu.md").read_text()


def test_a_process_that_died_is_not_sent_into_it_again(gpu, tmp_path, monkeypatch):
    def die(cell, options):
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu.MEASURES, "loss", die)
    with pytest.raises(KeyboardInterrupt):
        run(gpu, tmp_path, "--only", LOSSES[0])
    (failed,) = run(gpu, tmp_path, "--only", LOSSES[0])
    assert failed == [{"measurement": LOSSES[0], "error": "the process ended in it"}]


def test_a_folder_of_other_options_is_refused(gpu, tmp_path):
    run(gpu, tmp_path, "--only", LOSSES[0], "--minutes", "0")
    with pytest.raises(ValueError, match=r"cells holds measurements with batch 1, and this is 2"):
        run(gpu, tmp_path, "--only", LOSSES[0], "--batch", "2")
    assert json.loads((tmp_path / "cells" / "settings.json").read_text())["batch"] == "1"


def test_the_command_names_no_folder_of_the_machines(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--minutes", "0", "--folder", str(tmp_path), "--device=cpu"])
    run(gpu, tmp_path, "--only", LOSSES[0], "--minutes", "0")
    text = (tmp_path / "gpu.md").read_text()
    assert "`python benchmarks/gpu.py --minutes 0 --device=cpu`" in text
    assert str(tmp_path) not in text


def test_names_that_are_none(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.parse_options(["--only", "tail"])
    assert "--only tail" in capsys.readouterr().err


def test_it_needs_no_pycocotools():
    beside = {
        path.stem for folder in (FOLDER, FOLDER.parent / "examples") for path in folder.glob("*.py")
    } | {"dense_heads"}
    with forgotten("pycocotools", "crosskd", *beside):
        sys.modules["pycocotools"] = None
        load("gpu")
