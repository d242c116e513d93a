from __future__ import annotations

import copy
import json
import math
import os

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from crosskd import compare
from crosskd.compare import Estimate
from crosskd.compare.report import _plain, _signed
from tests.compare.scenes import SIDE, make_scene


def write_images(folder, truth, *, skip=()):
    folder.mkdir()
    for image in truth["images"]:
        if image["id"] not in skip:
            Image.new("RGB", (SIDE, SIDE), "gray").save(folder / image["file_name"])
    return folder


def test_the_same_seed_gives_the_same_intervals_and_another_one_others():
    truth, weak, strong = make_scene()
    students = {"alone": weak, "distilled": strong}
    first, again, other = (compare(truth, students, resamples=50, seed=seed) for seed in (0, 0, 1))
    assert str(first) == str(again) != str(other)
    assert first.metrics["alone"]["AP"].value == other.metrics["alone"]["AP"].value


def test_a_better_student_is_better_and_a_student_is_no_better_than_itself():
    truth, weak, strong = make_scene()
    comparison = compare(truth, {"alone": weak, "distilled": strong, "again": weak}, resamples=200)
    difference = comparison.differences["distilled"]["AP"]
    ours, theirs = (comparison.metrics[name]["AP"].value for name in ("distilled", "alone"))
    assert difference.value == pytest.approx(ours - theirs)
    assert 0 < difference.low < difference.value < difference.high
    assert comparison.differences["again"]["AP"] == (0, 0, 0)
    assert comparison.class_differences["distilled"]["cat"].value > 0
    text = str(comparison)
    assert "distilled beside alone: AP +" in text
    assert text.count("0 lies outside") == text.count("0 lies inside") == 1


def test_intervals_of_differences_are_of_paired_images():
    """Two students that differ by a constant in each image: unpaired, the interval would be a wide one."""
    truth, _, strong = make_scene()
    lowered = [{**result, "score": result["score"] / 2} for result in strong]
    comparison = compare(truth, {"a": strong, "b": lowered}, resamples=100)
    assert comparison.metrics["a"]["AP"].high > comparison.metrics["a"]["AP"].low + 1
    assert comparison.differences["b"]["AP"] == pytest.approx((0, 0, 0))


def test_sizes_and_classes_that_do_not_occur_have_no_number():
    truth, weak, strong = make_scene()
    for annotation in truth["annotations"]:
        annotation["area"] = 40.0**2
    comparison = compare(truth, {"alone": weak, "distilled": strong}, resamples=20)
    assert comparison.objects == {
        "cat": comparison.objects["cat"],
        "dog": comparison.objects["dog"],
        "owl": 0,
    }
    for estimate in (comparison.metrics["alone"]["AP small"], comparison.classes["distilled"]["owl"]):
        assert all(math.isnan(number) for number in estimate)
    rows = {line.split("|")[1].strip(): line for line in str(comparison).splitlines() if line.startswith("|")}
    for name, empty in (("AP small", 3), ("AP large", 3), ("owl", 3), ("AP medium", 0), ("cat", 0)):
        assert [cell.strip() for cell in rows[name].split("|")].count("-") == empty


def test_a_class_in_one_image_has_an_interval_of_the_resamplings_that_hold_it():
    truth, weak, strong = make_scene()
    box = {"image_id": 12, "category_id": 9, "bbox": [10.0, 10.0, 50.0, 50.0]}
    truth["annotations"].append({"id": 999, **box})
    comparison = compare(truth, {"a": [*weak, {**box, "score": 1.0}], "b": strong}, resamples=50)
    assert comparison.classes["a"]["owl"] == pytest.approx((100, 100, 100))
    assert comparison.classes["b"]["owl"] == (0, 0, 0)


def test_ground_truth_and_detections_may_be_files(tmp_path):
    truth, weak, strong = make_scene()
    expected = compare(truth, {"a": weak, "b": strong}, resamples=10)
    for name, content in (("truth", truth), ("a", weak), ("b", strong)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = {"a": tmp_path / "a.json", "b": str(tmp_path / "b.json")}
    assert str(compare(tmp_path / "truth.json", files, resamples=10)) == str(expected)
    coco = COCO(str(tmp_path / "truth.json"))
    before = copy.deepcopy(coco.dataset)
    assert str(compare(coco, files, resamples=10)) == str(expected)
    assert coco.dataset == before


def test_numbers_that_are_none_are_dashes_and_nothing_is_minus_zero():
    truth, weak, _ = make_scene()
    with pytest.warns(UserWarning, match="no detection"):
        text = str(compare(truth, {"alone": weak, "blind": []}, resamples=20))
    (score,) = (line for line in text.splitlines() if line.startswith("| score at least"))
    assert score.split("|")[3].strip() == "-"
    assert "inf" not in text
    minus = Estimate(-0.04, -0.06, 0.04)
    assert (_plain(minus), _signed(minus)) == ("0.0 (-0.1 to 0.0)", "+0.0 (-0.1 to +0.0)")


def test_what_is_no_comparison_is_refused(tmp_path):
    truth, weak, strong = make_scene()
    with pytest.raises(ValueError, match=r"two students or more .*\['a'\]"):
        compare(truth, {"a": weak})
    with pytest.raises(ValueError, match="resamples .*0"):
        compare(truth, {"a": weak, "b": strong}, resamples=0)
    with pytest.raises(ValueError, match=r"\['c'\].*\['a', 'b'\]"):
        compare(truth, {"a": weak, "b": strong}, costs={"c": {"parameters": 1}})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        compare(truth, {"a": weak, "b": strong}, images=tmp_path / "nowhere")


def test_markdown_and_picture_are_written(tmp_path):
    truth, weak, strong = make_scene(images=40, seed=1)
    images = write_images(tmp_path / "images", truth)
    students = {"alone": weak, "distilled": strong}
    comparison = compare(truth, students, images=images, resamples=10)
    assert [change for _, change in comparison.changes("distilled")][-2] < 0
    comparison.save(tmp_path / "new" / "out", pictures=2)
    text = (tmp_path / "new" / "out" / "comparison.md").read_text()
    assert text.startswith(comparison.markdown())
    assert "(comparison.png)" in text
    with Image.open(tmp_path / "new" / "out" / "comparison.png") as picture:
        # Three columns of 360 pixels; four rows, of two gains and two losses, each below a line of text.
        assert picture.size == (3 * 368 + 8, 4 * (360 + 20 + 8) + 8)
    compare(truth, students, resamples=10).save(tmp_path / "plain")
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["comparison.md"]


def test_images_that_cannot_be_read_are_passed_over(tmp_path):
    truth, weak, strong = make_scene()
    comparison = compare(truth, {"alone": weak, "distilled": strong}, resamples=2)
    best = comparison.changes("distilled")[0][0]
    second = comparison.changes("distilled")[1][0]
    images = write_images(tmp_path / "images", truth, skip=[best, second])
    (images / f"{best}.png").write_bytes(b"no picture")
    os.mkfifo(images / f"{second}.png")
    compare(truth, {"alone": weak, "distilled": strong}, images=images, resamples=2).save(tmp_path / "out")
    assert (tmp_path / "out" / "comparison.png").exists()
    (tmp_path / "empty").mkdir()
    compare(truth, {"a": weak, "b": strong}, images=tmp_path / "empty", resamples=2).save(tmp_path / "none")
    assert "comparison.png" not in (tmp_path / "none" / "comparison.md").read_text()


def test_the_largest_changes_come_first():
    truth, weak, strong = make_scene()
    comparison = compare(truth, {"alone": weak, "distilled": strong}, resamples=2)
    changes = comparison.changes("distilled")
    assert sorted(image for image, _ in changes) == list(comparison.image_ids)
    values = [round(change, 6) for _, change in changes]
    assert values == sorted(values, reverse=True)
    fewer = comparison.images["alone"].mistakes - comparison.images["distilled"].mistakes
    assert changes[0][1] == pytest.approx(np.max(fewer))


def test_names_cannot_break_the_tables():
    truth, weak, strong = make_scene()
    truth["categories"][1]["name"] = "cat"
    text = str(compare(truth, {"a|b": weak, "c": strong}, resamples=2))
    assert r"a\|b" in text
    assert {"cat (3)", "cat (7)"} <= {cell.strip() for cell in text.split("|")}


def test_narrow_images_do_not_become_long_pictures(tmp_path):
    truth, weak, strong = make_scene()
    images = write_images(tmp_path / "images", truth)
    for file in images.iterdir():
        Image.new("RGB", (2, 3000)).save(file)
    compare(truth, {"alone": weak, "distilled": strong}, images=images, resamples=2).save(
        tmp_path, pictures=1
    )
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.height <= 2 * (2 * 360 + 20 + 8) + 8
