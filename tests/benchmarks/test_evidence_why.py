"""Gradients beside the student's own, and how many of a teacher's detections are right."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from crosskd import PKD
from tests.benchmarks.test_benchmarks import load, tables
from tests.benchmarks.test_cross_head import root, with_weights  # noqa: F401 - a fixture
from tests.benchmarks.test_evidence import data, evidence, options_of, run

why = load("evidence_why")


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """A finished student and a teacher that sees another image, both untrained."""
    first = replace(evidence.TOY_PAIR.student, steps=3, ema=0.0, labelled=0.5)
    found = replace(evidence.TOY_PAIR, student=replace(first, begins=first))
    monkeypatch.setitem(why.PAIRS, "toy", found)
    (tmp_path / "budgets.json").write_text(json.dumps({"toy": {"steps": 6}}))
    for a_run, seed in ((evidence.teacher_run(found, 6), 1), (first, 2)):
        with_weights(tmp_path, a_run, seed)
    return found


def test_twice_the_weight_is_twice_the_ratio(root, tmp_path, monkeypatch, pair):  # noqa: F811
    options = options_of(root, tmp_path, batches=2)
    a_run = replace(evidence.alone_run(pair, 6, 0), method="pkd", teacher=evidence.teacher_run(pair, 6))
    images = {
        name: data.load_images(root, evidence.TOY, "train", options.cache, folder)
        for name, folder in (("train", "images"), ("teacher", evidence.TOY.pair))
    }
    found = []
    for weight in (1.0, 2.0):
        monkeypatch.setattr(run, "make_methods", lambda *_, w=weight: [PKD(weight=w)])
        found.append(why.ratios(a_run, images, options))
    for once, twice in zip(*found, strict=True):
        assert len(once) == 2
        assert min(once) > 0
        assert twice == pytest.approx([2 * ratio for ratio in once], rel=1e-3)


def test_right_detections_are_counted_by_their_scores(root, tmp_path, monkeypatch, pair):  # noqa: F811
    folder = data.coco_folder(root, evidence.TOY, "val")
    first = folder.ground_truth()["annotations"][0]
    kept = {key: first[key] for key in ("image_id", "category_id", "bbox")}
    away = {**kept, "bbox": [0, 0, 2, 2]}
    results = [{**kept, "score": 0.64}, {**away, "score": 0.62}, {**away, "score": 0.25}]
    monkeypatch.setattr(why, "measure", lambda *_: ({}, results))
    rows = why.calibration_rows(evidence.teacher_run(pair, 6), options_of(root, tmp_path))
    assert rows == [["0.2 to 0.3", "1", "0.25", "0.00"], ["0.6 to 0.7", "2", "0.63", "0.50"]]


def test_the_anchors_of_each_class_are_counted(root, tmp_path, monkeypatch, pair):  # noqa: F811
    """As the student's assignment has them for one object alone."""
    options = options_of(root, tmp_path, batches=1)
    a_run = replace(evidence.alone_run(pair, 6, 0), method="mimic", teacher=evidence.teacher_run(pair, 6))
    one = {"boxes": torch.tensor([[8.0, 8.0, 24.0, 40.0]]), "labels": torch.tensor([1])}
    image = [torch.rand(3, 64, 64)]

    def a_batch(training, images):
        training.view["teacher"] = image
        yield image, [one]

    monkeypatch.setattr(why, "batches_of", a_batch)
    ((name, objects, size, ours, theirs),) = why.assignment_rows(a_run, options)
    training = run.start(a_run, options)
    training.view["teacher"] = image
    (compared,) = training.trained.trace(image, [one]).steps.values()
    assert (name, objects, size) == (data.coco_folder(root, evidence.TOY, "train").names[1], "1", "23")
    assert ours == theirs == f"{compared.assignment.positive.sum():.1f}"


def test_all_tables_are_written(root, tmp_path, pair):  # noqa: F811
    places = ["--root", str(root), "--output", str(tmp_path), "--results", str(tmp_path)]
    why.main([*places, "--pair", "toy", "--methods", "pkd", "crosskd", "--batches", "1"])
    (first, second), _, assigned = tables(tmp_path / "toy_why.md")
    assert (first["method"], second["method"]) == ("PKD", "CrossKD")
    assert float(first["images with labels"]) > 0
    assert float(second["the others"]) > 0
    assert all(float(row["student's anchors"]) > 0 for row in assigned)
