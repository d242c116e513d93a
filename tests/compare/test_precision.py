from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch
from pycocotools.cocoeval import COCOeval

from crosskd.compare.data import read_detections, read_ground_truth
from crosskd.compare.precision import METRICS, class_precision, evaluate, over_classes, resampled_precision
from tests.compare.scenes import make_scene


def evaluation_of(results, truth) -> COCOeval:
    truth = read_ground_truth(truth)
    return evaluate(truth, read_detections("student", results, truth))


def repeated(evaluation: COCOeval, times: np.ndarray) -> COCOeval:
    """The evaluation with each image there as many times, as many images in all as before, by COCOeval."""
    images = len(evaluation.params.imgIds)
    assert times.sum() == images
    result = copy.copy(evaluation)
    chosen = np.repeat(np.arange(images), times)
    blocks = range(0, len(evaluation.evalImgs), images)
    result.evalImgs = [evaluation.evalImgs[start + n] for start in blocks for n in chosen]
    result.accumulate()
    return result


@pytest.mark.parametrize("seed", range(4))
def test_resampled_images_give_what_cocoeval_accumulates(seed):
    truth, weak, _ = make_scene(images=12, seed=seed)
    evaluation = evaluation_of(weak, truth)
    counts = np.random.default_rng(seed).multinomial(12, np.full(12, 1 / 12), size=30)
    drawn = resampled_precision(evaluation, torch.from_numpy(counts))
    for row, times in enumerate(counts):
        expected = class_precision(repeated(evaluation, times))
        for metric in METRICS:
            np.testing.assert_allclose(drawn[metric][row], expected[metric][0], rtol=0, atol=1e-12)


def test_equal_scores_count_in_cocoevals_order():
    truth, weak, _ = make_scene(images=30)
    evaluation = evaluation_of([{**result, "score": round(result["score"], 1)} for result in weak], truth)
    expected = class_precision(evaluation)
    as_it_is = resampled_precision(evaluation, torch.ones(1, 30, dtype=torch.int64))
    for metric in METRICS:
        np.testing.assert_allclose(as_it_is[metric], expected[metric], rtol=0, atol=1e-12)


def test_chunks_change_nothing(monkeypatch):
    truth, weak, _ = make_scene(images=12)
    evaluation = evaluation_of(weak, truth)
    counts = torch.from_numpy(np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), size=7))
    whole = resampled_precision(evaluation, counts)
    monkeypatch.setattr(sys.modules["crosskd.compare.precision"], "_CHUNK", 1)
    for metric, rows in resampled_precision(evaluation, counts).items():
        np.testing.assert_array_equal(rows, whole[metric])


def test_metrics_are_what_cocoeval_summarizes(capsys):
    truth, weak, _ = make_scene()
    evaluation = evaluation_of(weak, truth)
    assert capsys.readouterr().out == ""
    usual = COCOeval(evaluation.cocoGt, evaluation.cocoDt, "bbox")
    usual.evaluate()
    usual.accumulate()
    usual.summarize()
    means = [over_classes(rows)[0] for rows in class_precision(evaluation).values()]
    np.testing.assert_allclose(means, usual.stats[:6], rtol=0, atol=1e-12)


def test_a_class_that_never_occurs_has_no_precision():
    truth, weak, _ = make_scene()
    of_class = class_precision(evaluation_of(weak, truth))["AP"][0]
    assert np.isnan(of_class).tolist() == [False, False, True]
    assert np.isnan(over_classes(np.full((2, 3), np.nan))).all()


def test_no_detections_at_all_are_zero():
    truth, _, _ = make_scene()
    truth = read_ground_truth(truth)
    with pytest.warns(UserWarning, match="no detection"):
        nothing = read_detections("student", [], truth)
    evaluation = evaluate(truth, nothing)
    drawn = resampled_precision(evaluation, torch.ones(2, 20, dtype=torch.int64))
    np.testing.assert_array_equal(class_precision(evaluation)["AP"], [[0, 0, np.nan]])
    np.testing.assert_array_equal(drawn["AP"], [[0, 0, np.nan]] * 2)
