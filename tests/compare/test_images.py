from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from crosskd.compare.data import read_detections, read_ground_truth
from crosskd.compare.images import look_at_images
from crosskd.compare.precision import evaluate
from tests.compare.scenes import make_scene

TRUTH = {
    "images": [{"id": n, "width": 100, "height": 100} for n in (1, 2, 3)],
    "annotations": [
        {"id": 5, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]},
        {"id": 6, "image_id": 1, "category_id": 1, "bbox": [50, 50, 10, 10]},
        {"id": 7, "image_id": 2, "category_id": 1, "bbox": [0, 0, 10, 10], "iscrowd": 1},
    ],
    "categories": [{"id": 1, "name": "cell"}],
}


def found(*results: tuple[int, list[float], float]):
    truth = read_ground_truth(TRUTH)
    rows = [{"image_id": i, "category_id": 1, "bbox": box, "score": score} for i, box, score in results]
    return look_at_images(evaluate(truth, read_detections("student", rows, truth)))


def test_objects_found_missed_and_false_alarms_are_counted():
    # An IoU of 0.8 on the first object, nothing on the second, one box in the crowd, one on an empty image.
    results = found(
        (1, [0, 0, 10, 8], 0.9), (2, [1, 1, 5, 5], 0.8), (3, [5, 5, 9, 9], 0.95), (3, [1, 1, 9, 9], 0.1)
    )
    assert results.threshold == 0.9
    assert results.objects.tolist() == [2, 0, 0]
    assert results.found.tolist() == [1, 0, 0]
    assert results.false_alarms.tolist() == [0, 0, 1]
    # At the IoU thresholds 0.5 to 0.8 one object is missed; at 0.85 to 0.95 both are, and the box is false.
    np.testing.assert_allclose(results.mistakes, [(7 * 1 + 3 * 3) / 10, 0, 1])
    assert (results.found_ids, results.true_ids, results.false_ids) == ({1}, {1}, {3})


def test_the_threshold_lets_all_equal_scores_through():
    results = found((1, [0, 0, 10, 10], 0.5), (3, [5, 5, 9, 9], 0.5), (1, [50, 50, 10, 10], 0.5))
    assert (results.threshold, results.found.tolist(), results.false_alarms.tolist()) == (
        0.5,
        [2, 0, 0],
        [0, 0, 1],
    )


def test_nothing_found_is_counted_as_missed():
    with pytest.warns(UserWarning, match="no detection on 1 of the 1"):
        results = found()
    assert results.threshold == math.inf
    assert results.mistakes.tolist() == [2, 0, 0]


def test_no_other_threshold_has_a_higher_f1():
    scene, weak, _ = make_scene()
    truth = read_ground_truth(scene)

    def f1(threshold: float) -> float:
        kept = [result for result in weak if result["score"] >= threshold]
        evaluation = evaluate(truth, read_detections("student", kept, truth))
        entries = [e for e in evaluation.evalImgs if e and e["aRng"] == evaluation.params.areaRng[0]]
        objects = sum((e["gtIgnore"] == 0).sum() for e in entries)
        seen = sum((~e["dtIgnore"]).sum(axis=1) for e in entries)
        true = sum(((e["dtMatches"] > 0) & ~e["dtIgnore"]).sum(axis=1) for e in entries)
        return (2 * true / (seen + objects)).mean()

    best = look_at_images(evaluate(truth, read_detections("student", weak, truth))).threshold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = {result["score"]: f1(result["score"]) for result in weak}
    assert max(values, key=values.get) == best
