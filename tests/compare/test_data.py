from __future__ import annotations

import copy
import json

import pytest

from crosskd.compare import Detections, compare
from crosskd.compare.data import read_detections, read_ground_truth
from tests.compare.scenes import SIDE, make_scene


@pytest.fixture
def scene():
    return make_scene()


def read(results, truth):
    return read_detections("student", results, read_ground_truth(truth))


def test_area_and_crowd_are_filled_in_on_a_copy(scene):
    truth, weak, strong = scene
    expected = compare(truth, {"a": weak, "b": strong}, resamples=20)
    bare = copy.deepcopy(truth)
    bare["annotations"] = [a for a in bare["annotations"] if not a["iscrowd"]]
    for number, annotation in enumerate(bare["annotations"]):
        if number % 2:
            annotation.update(area=None, iscrowd=None)
        else:
            del annotation["area"], annotation["iscrowd"]
    whole = {**truth, "annotations": [a for a in truth["annotations"] if not a["iscrowd"]]}
    before = copy.deepcopy((bare, weak))
    found = compare(bare, {"a": weak, "b": strong}, resamples=20)
    assert found.metrics == compare(whole, {"a": weak, "b": strong}, resamples=20).metrics != expected.metrics
    assert (bare, weak) == before


def test_an_annotation_of_id_0_can_be_found(scene):
    """COCOeval takes id 0 for no match, so that what is found there counts as a false alarm."""
    truth, _, _ = scene
    annotation = next(a for a in truth["annotations"] if not a["iscrowd"])
    truth["annotations"] = [{**annotation, "id": 0}]
    keys = ("image_id", "category_id", "bbox")
    perfect = [{**{key: annotation[key] for key in keys}, "score": 1.0}]
    comparison = compare(truth, {"a": perfect, "b": perfect}, resamples=5)
    assert comparison.metrics["a"]["AP"].value == pytest.approx(100)


def test_repeated_ids_are_refused(scene):
    """COCOeval would give perfect detections of repeated annotations an AP of 2."""
    for part in ("images", "annotations", "categories"):
        truth = copy.deepcopy(scene[0])
        truth[part][1]["id"] = truth[part][0]["id"]
        with pytest.raises(ValueError, match=rf"{part} repeat 1 ids, such as {truth[part][0]['id']}"):
            read_ground_truth(truth)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"image_id": 99}, "annotation 0 of the ground truth is of image 99"),
        ({"category_id": 4}, "category 4"),
        ({"bbox": [1, 2, 3]}, r"annotation 0 .*\[1, 2, 3\]"),
        ({"bbox": [1, 2, float("nan"), 3]}, "annotation 0 .*nan"),
        ({"bbox": [1, 2, -3, 3]}, "annotation 0 .*-3"),
        ({"bbox": None}, "annotation 0 .*None"),
        ({"bbox": [1, 2, "3", None]}, r"annotation 0 .*\[1, 2, '3', None\]"),
        ({"area": float("inf")}, "annotation 0 .*area inf"),
        ({"area": "large"}, "annotation 0 .*area 'large'"),
    ],
)
def test_annotations_that_are_none_are_refused(scene, change, facts):
    truth = scene[0]
    truth["annotations"][0].update(change)
    with pytest.raises(ValueError, match=facts):
        read_ground_truth(truth)


def test_ground_truth_in_another_form_is_refused(scene, tmp_path):
    for other, facts in (
        ([], "got list"),
        ({"images": []}, r"keys \['images'\]"),
        ({**scene[0], "annotations": []}, "no object"),
        ({**scene[0], "images": [{"file_name": "1.jpg"}]}, "images needs an id"),
    ):
        with pytest.raises(ValueError, match=facts):
            read_ground_truth(other)
    (tmp_path / "truth.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"truth\.json"):
        read_ground_truth(tmp_path / "truth.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read_ground_truth(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"image_id": 5}, "1 of the .* detections of 'student' have an unknown image_id, such as 5; .*10"),
        ({"category_id": 0}, r"unknown category_id, such as 0; .* \[3, 7, 9\]: .*labels"),
        ({"score": float("nan")}, "detection 2 of 'student' has the score nan"),
        ({"score": float("inf")}, "detection 2 .*inf"),
        ({"score": None}, "detection 2 .*None"),
        ({"bbox": [0, 0, float("inf"), 3]}, "detection 2 .*inf"),
        ({"bbox": [0, 0, -1, 3]}, "detection 2 .*-1"),
    ],
)
def test_detections_that_are_wrong_are_refused(scene, change, facts):
    truth, weak, _ = scene
    weak[2].update(change)
    with pytest.raises(ValueError, match=facts):
        read(weak, truth)


def test_detections_in_another_form_are_refused(scene, tmp_path):
    truth, weak, _ = scene
    (tmp_path / "weak.json").write_text(json.dumps(weak)[:-4])
    for other, facts in (
        (truth, "'student' .*got dict"),
        ([{"boxes": 1}], r"detection 0 of 'student' .*\['boxes'\]"),
        ([[1, 2]], "detection 0 .*list"),
        (tmp_path / "weak.json", r"weak\.json"),
    ):
        with pytest.raises(ValueError, match=facts):
            read(other, truth)


@pytest.mark.parametrize(
    ("convert", "facts"),
    [
        (lambda x, y, w, h: [x, y, x + w, y + h], "x1, y1, x2, y2"),
        (lambda x, y, w, h: [x + w / 2, y + h / 2, w, h], "centre"),
        (lambda x, y, w, h: [side / SIDE for side in (x, y, w, h)], "shares"),
    ],
)
def test_boxes_in_another_format_are_refused(scene, convert, facts):
    truth, _, _ = scene
    keys = ("image_id", "category_id")
    results = [
        {**{key: a[key] for key in keys}, "bbox": convert(*a["bbox"]), "score": 0.5}
        for a in truth["annotations"]
    ]
    with pytest.raises(ValueError, match=f"'student' look like {facts}"):
        read(results, truth)


def test_boxes_over_the_image_border_are_taken(scene):
    truth, weak, _ = scene
    weak = [{**w, "bbox": [w["bbox"][0] - 30, w["bbox"][1], w["bbox"][2] + 200, w["bbox"][3]]} for w in weak]
    assert len(read(weak, truth).anns) == len(weak)


def test_images_that_were_never_shown_are_refused_and_many_empty_ones_warned_of(scene):
    truth, weak, _ = scene
    ids = [image["id"] for image in truth["images"]]
    some = [result for result in weak if result["image_id"] not in (10, 11, 12)]
    read(Detections(some, tuple(ids), None, 0.1), truth)
    with pytest.raises(ValueError, match="'student' was never shown 3 of the 20 images, such as 10"):
        read(Detections(some, tuple(ids[3:]), None, 0.1), truth)
    few = [result for result in weak if result["image_id"] > 20]
    with pytest.warns(UserWarning, match=r"'a' has no detection on \d+ of the \d+ images") as caught:
        compare(truth, {"a": few, "b": weak}, resamples=1)
    assert [warning.filename for warning in caught] == [__file__]
