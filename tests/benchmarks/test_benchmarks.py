"""Each benchmark, at its smallest size, writes a table with the rows that it should."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import crosskd

pytestmark = pytest.mark.usefixtures("frozen_objects")
FOLDER = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    """Imports a script as it finds itself when it is run: with its own folder on the path."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


def tables(path: Path) -> list[list[dict[str, str]]]:
    """The Markdown tables of a file, one dict a row."""
    found: list[list[dict[str, str]]] = []
    header: list[str] = []
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells
            found.append([])
        elif set(line) != set("| -"):
            found[-1].append(dict(zip(header, cells, strict=True)))
    return found


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_losses_table(tmp_path):
    output = tmp_path / "losses.md"
    script = load("losses")
    sizes = ["1x20000x20", "2x3000x80"]
    script.main(["--sizes", *sizes, "--rounds", "1", "--no-compiled", "--output", str(output)])
    (rows,) = tables(output)
    assert [(row["loss"], row["images x anchors x width"], row["implementation"]) for row in rows] == [
        (loss, size, implementation)
        for loss, size in [
            *(("quality_focal", size) for size in sizes),
            ("distribution_kl", "2x3000x17"),
            ("giou", "2x3000x4"),
            ("softmax_focal", "2x3000x80"),
        ]
        for implementation in ("plain", "crosskd")
    ]
    plain, chunked = rows[:2]
    assert float(chunked["kept for backward"]) < 0.1
    assert float(plain["kept for backward"]) > 3
    # 400,000 logits are few chunks, so the temporary ones weigh more than at sizes that matter.
    assert 1 <= float(chunked["peak memory"]) < 2.5 < 5 < float(plain["peak memory"])


@pytest.mark.parametrize("name", ["quality_focal", "distribution_kl", "giou", "softmax_focal"])
def test_plain_losses_say_the_same(name):
    script = load("losses")
    options = script.parse_options([])
    student, teacher, weight = script.make_inputs(name, (2, 30, {"giou": 4}.get(name, 9)), options)
    values = [loss(student, teacher, weight, 7.0) for loss in script.LOSSES[name]]
    gradients = [torch.autograd.grad(value, student)[0] for value in values]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


def test_step_cost_table(tmp_path):
    output, families = tmp_path / "step_cost.md", ["gfl"]
    options = "--teacher resnet18 --size 64x64 --batch 1 --classes 3 --objects 2 --rounds 1 --threads 1"
    load("step_cost").main([*options.split(), "--families", *families, "--output", str(output)])
    times, memories = tables(output)
    for rows in (times, memories):
        assert [row["detector"] for row in rows] == families
    for row in times:
        assert all(float(row[f"{letter}, ms"]) > 0 for letter in "abcd")
    for row in memories:
        assert float(row["d, MiB"]) >= float(row["a, MiB"]) > float(row["b, MiB"]) > 0
        # The statistics of 2 branches of 5 levels of 256 channels, mean and deviation, are 20 KiB.
        left = float(row["alive after the teacher, MiB"]) - float(row["teacher's predictions, MiB"])
        assert 0 <= left < 0.05
    text = output.read_text()
    for fact in ("command: `python benchmarks/step_cost.py", "threads: 1", "seed: 0", "torch"):
        assert fact in text
    assert str(tmp_path) not in text


def test_step_cost_has_a_row_for_each_method(tmp_path):
    output, names = tmp_path / "methods.md", ["pkd", "bckd"]
    options = "--teacher resnet18 --size 64x64 --batch 1 --classes 3 --objects 2 --rounds 1 --threads 1"
    arguments = [*options.split(), "--families", "gfl", "--methods", *names, "--output", str(output)]
    load("step_cost").main(arguments)
    times, memories = tables(output)
    for rows in (times, memories):
        assert [row["method"] for row in rows] == ["PKD", "BCKD"]
    assert all(float(row[f"{letter}, ms"]) > 0 for row in times for letter in "abcd")
    read = {row["method"]: float(row["the teacher's that it reads, MiB"]) for row in memories}
    # Maps of 64, 16, 4, 1 and 1 locations and 256 channels; 86 anchors, 3 logits and 4 distributions of 17.
    assert read == pytest.approx({"PKD": 0.1, "BCKD": 0.02}, abs=0.06)
    for row in memories:
        assert float(row["floor, MiB"]) >= float(row["a, MiB"]) > 0
        assert float(row["d, MiB"]) >= float(row["floor, MiB"]) - 0.2
        assert float(row["alive after the teacher, MiB"]) < read[row["method"]] + 0.2


def test_teacher_cache_tables(tmp_path, monkeypatch):
    output = tmp_path / "teacher_cache.md"
    options = "--student mobilenet_v3_large --classes 3 --objects 2 --rounds 1 --threads 1"
    cell = "fcos:mobilenet_v3_large:crosskd:bfloat16:64x64:1"
    arguments = [*options.split(), "--cells", cell, "--folder", str(tmp_path), "--output", str(output)]
    script = load("teacher_cache")
    monkeypatch.setattr(script, "take_first_steps", lambda *_: None)  # they take half of the time
    script.main(arguments)
    (teacher,), (step,) = tables(output)
    for row in (teacher, step):
        assert (row["teacher"], row["method"], row["kept in"]) == (
            "fcos_mobilenet_v3_large",
            "CrossKD",
            "bfloat16",
        )
    assert teacher["images"] == "1 of 64x64"
    assert all(float(step[f"{name}, steps/s"]) > 0 for name in ("plain", "with the teacher", "reading"))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_memory_counts_what_is_allocated_and_what_is_kept():
    measure = load("measure")
    tensor = torch.ones(100_000)

    def twice_then_one() -> torch.Tensor:
        more = tensor + 1
        return more + 1

    counted = measure.memory(twice_then_one, torch.device("cpu"))
    assert counted.kept == 400_000
    assert counted.peak == pytest.approx(800_000, abs=100)  # the number 1 is a tensor too, for a moment


def test_rounds_run_every_case_and_start_at_another_each_time():
    measure = load("measure")
    calls: list[str] = []
    cases = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = measure.timed_rounds(cases, rounds=2, device=torch.device("cpu"), warmup=1)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_spread_is_median_and_quartiles():
    measure = load("measure")
    assert measure.Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]).text(1) == "3.0 (2.0 to 4.0)"
    assert measure.Spread.of([2.0]).text(1) == "2.0 (2.0 to 2.0)"


@pytest.mark.parametrize(("name", "text"), [("losses", "2x3"), ("losses", "0x3x4"), ("step_cost", "320x256")])
def test_sizes_that_make_no_sense_are_refused(name, text, capsys):
    flag = "--sizes" if name == "losses" else "--size"
    with pytest.raises(SystemExit):
        load(name).parse_options([flag, text])
    assert f"got '{text}'" in capsys.readouterr().err


def test_tables_name_the_commit_and_what_was_changed_since(tmp_path, monkeypatch):
    measure = load("measure")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    script = tmp_path / "measure.py"
    script.write_text("")
    monkeypatch.setattr(measure, "__file__", str(script))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert measure.versions().endswith(f"crosskd {crosskd.__version__}")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
    assert measure.versions().endswith(f"crosskd {crosskd.__version__} ({commit})")
    script.write_text("changed")
    assert measure.versions().endswith(f"({commit}-dirty)")
    monkeypatch.setenv("PATH", "")
    assert measure.versions().endswith(f"crosskd {crosskd.__version__}")
