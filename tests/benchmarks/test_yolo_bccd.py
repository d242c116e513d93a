"""The YOLO benchmark: data in ultralytics' form, what is not run twice, and what the table says."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.test_benchmarks import load
from tests.helpers import forked
from tests.helpers.reference_files import bccd_folder
from tests.helpers.yolo import model_of

yolo_bccd = load("yolo_bccd")


def run(precision: float, seconds: float = 2.0, mebibytes: float = 500.0) -> dict[str, float]:
    metrics = {"AP": precision, "AP50": 2 * precision, "AP75": precision / 2}
    return {**metrics, "wall": seconds, "cpu": seconds / 2, "mebibytes": mebibytes}


RESULTS = {
    "teacher": [run(50.0)],
    "none": [run(30.0), run(32.0)],
    "builtin": [run(31.0, seconds=4.0), run(32.0, seconds=4.0)],
    "crosskd": [run(33.0, mebibytes=700.0), run(37.0, mebibytes=800.0)],
}


def options(*arguments: str) -> Any:
    return yolo_bccd.parse(["--root", "data", "--seeds", "0", "1", *arguments])


@pytest.mark.ultralytics
def test_the_table_has_costs_beside_precision_and_how_it_was_made():
    text = yolo_bccd.table(RESULTS, options(), "python benchmarks/yolo_bccd.py")
    assert "| student alone | 2 | 31.0 ± 1.4 | 62.0 ± 2.8 | 15.5 ± 0.7 | 2.0 ± 0.0 | 500 |" in text
    assert "| CrossKD | 2 | 35.0 ± 2.8 | 70.0 ± 5.7 | 17.5 ± 1.4 | 2.0 ± 0.0 | 800 |" in text
    assert "- CrossKD against student alone: +4.0 ± 1.4 AP (+3.0, +5.0), 1.0 ± 0.0 times the seconds" in text
    assert "`distill_model=`: +3.5 ± 2.1 AP (+2.0, +5.0), 0.5 ± 0.0 times the seconds" in text
    assert "    python benchmarks/yolo_bccd.py\n" in text


@pytest.mark.ultralytics
def test_the_table_says_by_which_clock_it_was_timed():
    text = yolo_bccd.table(RESULTS, options("--clock", "cpu", "--threads", "1"), "python")
    assert "| student alone | 2 | 31.0 ± 1.4 | 62.0 ± 2.8 | 15.5 ± 0.7 | 1.0 ± 0.0 | 500 |" in text
    assert "alone, in seconds that the process worked." in text
    assert "alone, by the wall clock." in yolo_bccd.table(RESULTS, options(), "python")


def test_a_loss_is_said_as_plainly_as_a_gain():
    *_, line, _ = yolo_bccd.paired_differences(
        {"none": [run(30.0)], "crosskd": [run(29.0, seconds=3.0)]}, "wall"
    )
    assert line == "- CrossKD against student alone: -1.0 AP (-1.0), 1.5 times the seconds"


def test_no_difference_is_said_where_nothing_stands_beside():
    alone = {name: RESULTS[name] for name in ("teacher", "crosskd")}
    assert yolo_bccd.paired_differences(alone, "wall") == []


def test_the_figure_is_drawn(tmp_path):
    yolo_bccd.draw(RESULTS, tmp_path / "figure.png", options())
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_boxes_become_centres_and_sizes_as_fractions():
    objects = [{"category_id": 2, "bbox": [10, 20, 40, 60]}]
    assert yolo_bccd.as_yolo_rows(objects, {"width": 100, "height": 200}) == [
        "1 0.300000 0.250000 0.400000 0.300000"
    ]


def test_the_data_is_converted_once_and_found_again(tmp_path):
    root = bccd_folder()
    for _ in range(2):
        file = yolo_bccd.convert(root, tmp_path)
    assert 'names: ["RBC", "WBC", "Platelets"]' in file.read_text()
    counts = {split: len(list((tmp_path / "images" / split).iterdir())) for split in ("train", "val", "test")}
    assert counts == {"train": 205, "val": 87, "test": 72}
    rows = [
        line for label in (tmp_path / "labels" / "test").iterdir() for line in label.read_text().split("\n")
    ]
    assert len([row for row in rows if row]) == 945


def test_a_finished_run_is_not_repeated_and_a_failed_one_names_its_log(tmp_path, monkeypatch):
    script = tmp_path / "fails.py"  # at once: the real one imports for seconds
    script.write_text("import sys\nsys.exit(f'no model in {sys.argv[-1]}')\n")
    monkeypatch.setattr(yolo_bccd, "__file__", str(script))
    settings = options("--output", str(tmp_path))
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "metrics.json").write_text(json.dumps(run(1.0)))
    arguments = (settings, tmp_path / "data.yaml")
    assert yolo_bccd.run(*arguments, "done", "none", "no_such_model", 1, 0) == run(1.0)
    with pytest.raises(RuntimeError, match=r"a run failed, see .*log.txt"):
        yolo_bccd.run(*arguments, "failed", "none", "no_such_model", 1, 0)
    assert '"model": "no_such_model.yaml"' in (tmp_path / "failed" / "log.txt").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All students for an epoch of eight images, a single step, from a teacher that has something to say."""
    from ultralytics import YOLO

    folder = tmp_path_factory.mktemp("runs")
    teacher = YOLO("yolo11n.yaml")
    teacher.model = model_of("yolo11n", width=0.375, seed=1)
    (folder / "teacher" / "weights").mkdir(parents=True)
    teacher.save(folder / "teacher" / "weights" / "last.pt")
    (folder / "teacher" / "metrics.json").write_text(json.dumps(run(1.0)))
    places = ["--root", str(bccd_folder()), "--output", str(folder), "--results", str(folder / "table.md")]
    shown = ["--size", "64", "--fraction", "0.04", "--epochs", "1", "--seeds", "1", "--threads", "3"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(yolo_bccd, "subprocess", forked)
        yolo_bccd.main([*places, *shown])
    return folder


def first_losses(run: Path) -> dict[str, float]:
    with (run / "results.csv").open() as file:
        row = next(csv.DictReader(file))
    return {name.removeprefix("train/"): float(row[name]) for name in row if name.startswith("train/")}


@pytest.mark.slow
@pytest.mark.ultralytics
def test_all_methods_start_from_the_same_weights_and_images_and_each_distillation_counts(runs):
    alone, builtin, ours = (first_losses(runs / f"{method}_seed1") for method in yolo_bccd.METHODS)
    assert set(alone) == {"box_loss", "cls_loss", "dfl_loss"}
    for distilled, names in ((builtin, {"dis_loss"}), (ours, {"kd_cls", "kd_reg"})):
        assert {name: distilled[name] for name in alone} == pytest.approx(alone, rel=1e-4)
        assert set(distilled) - set(alone) == names
        assert all(distilled[name] > 0 for name in names)


@pytest.mark.slow
@pytest.mark.ultralytics
def test_all_runs_have_the_threads_and_the_steps_asked_for(runs):
    for method in yolo_bccd.METHODS:
        folder = runs / f"{method}_seed1"
        (epoch,) = map(json.loads, (folder / "costs.jsonl").read_text().splitlines())
        assert epoch["threads"] == 3
        assert epoch["wall"] > 0
        assert epoch["cpu"] > 0
        assert "\nnbs: 8\n" in (folder / "args.yaml").read_text()


@pytest.mark.slow
@pytest.mark.ultralytics
def test_the_shown_command_names_no_folder_of_this_machine(runs):
    text = (runs / "table.md").read_text()
    assert "--root data/bccd --size 64 --fraction 0.04" in text
    assert str(runs) not in text
    assert (runs / "table.png").exists()
