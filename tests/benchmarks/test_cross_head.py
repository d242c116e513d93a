"""A student's two heads compared: the detections are the detector's own, and each side is what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.benchmarks.test_benchmarks import load, tables
from tests.benchmarks.test_evidence import data, evidence, options_of, run, toy

cross_head = load("cross_head")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cross_head")
    toy.make_toy(folder / "toy")
    return folder


def with_weights(output: Path, a_run, seed: int) -> None:
    folder = output / run.name_of(a_run)
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    detector = run.build(a_run.model, a_run.data, None)
    torch.nn.init.zeros_(detector.head.logits.bias)  # so that there are detections without any training
    torch.save(detector.state_dict(), folder / "model.pt")


def test_detections_are_those_of_the_detector_itself(root):
    torch.manual_seed(0)
    student = run.build(evidence.TOY_PAIR.student.model, evidence.TOY, None).eval()
    torch.nn.init.zeros_(student.head.logits.bias)
    images = data.load_images(root, evidence.TOY, "val", root / "cache")
    given = data.whole_images(images, range(3), torch.device("cpu"))
    distiller = cross_head.Distiller(
        run.build(evidence.TOY_PAIR.student.model, evidence.TOY, None),
        student,
        cross_head.CrossKD(0),
        run.adapter,
    )
    with torch.no_grad():
        side = distiller.trace(given).steps["crosskd"].student
        found = cross_head.detections(side, side.predictions, given)
        expected = student(given)
    for of_image, own in zip(found, expected, strict=True):
        assert len(own["boxes"]) >= 5
        for key, value in own.items():
            torch.testing.assert_close(of_image[key], value)


def test_of_a_student_that_is_the_teacher_both_heads_say_the_same(root, tmp_path, monkeypatch):
    """Seen through the teacher's head an equal student's features give what its own head gives."""
    pair = replace(evidence.TOY_PAIR, teacher=replace(evidence.TOY_PAIR.teacher, sees="images"))
    monkeypatch.setitem(cross_head.PAIRS, "toy", pair)
    (tmp_path / "budgets.json").write_text(json.dumps({"toy": {"steps": 6}}))
    teacher, alone, other = evidence.table_runs(pair, 6, [0], ["none", "crosskd"])
    for a_run, seed in ((teacher, 1), (alone, 1), (other, 2)):
        with_weights(tmp_path, a_run, seed)
    # Untrained, they find nothing: how much they say tells them apart.
    monkeypatch.setattr(
        cross_head, "coco_metrics", lambda truth, found: {"AP": sum(f["score"] for f in found)}
    )
    options = options_of(root, tmp_path)
    options.batch_sizes = [3, 8]
    own, cross, of_teacher, taught = cross_head.compare(alone, teacher, options)
    assert of_teacher.keys() == taught.keys()
    assert list(of_teacher.values()) == pytest.approx(list(taught.values()))  # the student has all levels
    assert own > 1
    assert cross.keys() == {3, 8}
    assert own == pytest.approx(cross[8], rel=1e-4) == pytest.approx(cross[3], rel=1e-4)
    assert cross_head.compare(other, teacher, options)[0] != pytest.approx(own, rel=1e-2)
    places = ["--root", str(root), "--output", str(tmp_path), "--results", str(tmp_path)]
    cross_head.main([*places, "--pair", "toy", "--seeds", "0", "--methods", "none", "crosskd"])
    rows, _ = tables(tmp_path / "toy_cross_head.md")
    assert [(row["student"], row["seeds"]) for row in rows] == [("student alone", "1"), ("CrossKD", "1")]
    assert rows[0]["its own predictors"] == rows[0]["the teacher's, batches of 8"] == f"{own:.1f}"


def test_a_teacher_that_sees_twice_the_size(root, tmp_path, monkeypatch):
    """The student is measured as evidence.py measures it, and boxes of both are in the files' pixels."""
    settings = replace(evidence.TOY, shown=0.5)
    model = evidence.TOY_PAIR.student.model
    student = replace(evidence.TOY_PAIR.student, data=settings, steps=6, ema=0.0)
    teacher = replace(student, model=replace(model, levels=5), sees="zoom", steps=7)
    for a_run, seed in ((teacher, 1), (student, 2)):
        with_weights(tmp_path, a_run, seed)
    options, kept = options_of(root, tmp_path), []
    options.batch_sizes = [8]

    def sum_of_scores(truth, found):
        kept.append(found)
        return {"AP": sum(f["score"] for f in found)}

    monkeypatch.setattr(cross_head, "coco_metrics", sum_of_scores)
    own, *_ = cross_head.compare(student, teacher, options)
    images = data.load_images(root, settings, "val", options.cache)
    _, expected = run.measure(run.finished_model(student, options), student, images, "val", options)
    assert own == pytest.approx(sum(f["score"] for f in expected), rel=1e-4)
    assert kept[0][0]["bbox"] == pytest.approx(expected[0]["bbox"], rel=1e-4)
    widest = max(f["bbox"][0] + f["bbox"][2] for f in kept[1])
    assert 48 < widest <= 64.001
