"""The YOLO benchmark: data in ultralytics' form, what is not run twice, and what the table says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.benchmarks.test_benchmarks import load
from tests.reference_files import bccd_folder

yolo_bccd = load("yolo_bccd")


def run(precision: float, seconds: float = 2.0, mebibytes: float = 500.0) -> dict[str, float]:
    metrics = {"AP": precision, "AP50": 2 * precision, "AP75": precision / 2}
    return {**metrics, "seconds": seconds, "mebibytes": mebibytes}


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
    assert (
        "ahead by 4.0 ± 1.4 AP over student alone and by 3.5 ± 2.1 AP over ultralytics' `distill_model=`."
        in text
    )
    assert "    python benchmarks/yolo_bccd.py\n" in text


def test_no_gain_is_said_where_nothing_stands_beside():
    assert yolo_bccd.paired_gains({"teacher": RESULTS["teacher"], "crosskd": RESULTS["crosskd"]}) == ""


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


def test_a_finished_run_is_not_repeated_and_a_failed_one_names_its_log(tmp_path):
    settings = options("--output", str(tmp_path))
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "metrics.json").write_text(json.dumps(run(1.0)))
    arguments = (settings, tmp_path / "data.yaml")
    assert yolo_bccd.run(*arguments, "done", "none", "no_such_model", 1, 0) == run(1.0)
    with pytest.raises(RuntimeError, match=r"a run failed, see .*log.txt"):
        yolo_bccd.run(*arguments, "failed", "none", "no_such_model", 1, 0)
