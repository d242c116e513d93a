"""The benchmark of a large data set, on a small one and in this process."""

from __future__ import annotations

import json
import sys

import torch

from tests.benchmarks.test_benchmarks import load, tables


def test_tables_of_a_small_set(tmp_path, monkeypatch):
    script = load("coco_scale")
    folder = str(script.Path(script.__file__).parents[1] / "examples")
    monkeypatch.syspath_prepend(folder)
    import evaluation

    monkeypatch.setattr(evaluation, "detect", evaluation.detect)  # both are put back at the end
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.setattr(
        script,
        "run",
        lambda part, examples, options, ranks=1, slow=False: [script.PARTS[part](options)] * ranks,
    )
    root, output = tmp_path / "data", tmp_path / "scale.md"
    small = ["--records", "40", "--val", "4", "--images", "4", "--detections", "20", "--workers", "1"]
    threads = ["--threads", str(torch.get_num_threads())]
    script.main(["--root", str(root), "--rounds", "1", *small, *threads, "--output", str(output)])
    startups, workers, reading, evaluations = tables(output)
    assert [row["processes"] for row in startups] == ["1", "2"]
    assert all(float(row["worker, USS"].replace(",", "")) > 0 for row in workers)
    assert float(reading[0]["CPU ms an image"]) > 0
    assert [(row["evaluator"], row["processes"]) for row in evaluations] == [
        ("pycocotools", "1"),
        ("pycocotools", "2"),
    ]
    assert len({row["AP"] for row in evaluations}) == 1
    content = json.loads((root / "annotations/instances_train2017.json").read_text())
    assert len(content["images"]) == 40
    assert (
        400
        < (root / "annotations/instances_train2017.json").stat().st_size / len(content["annotations"])
        < 700
    )
