from __future__ import annotations

import json

import torch
from coco_data import CocoFolder
from report import write_comparison

from tests.examples.coco_files import write_coco
from tests.helpers.tiny import tiny_retinanet


def students(*names: str):
    return {name: tiny_retinanet(2, seed=n, detections_per_img=10) for n, name in enumerate(names)}


def options():
    return {"batch_size": 2, "device": torch.device("cpu")}


def test_students_are_compared_and_the_teacher_is_not(tmp_path, recwarn):
    data = CocoFolder(*write_coco(tmp_path))
    models = students("teacher", "none", "crosskd")
    write_comparison(models, data, tmp_path, **options())
    text = (tmp_path / "comparison.md").read_text()
    assert text.startswith("# student alone and CrossKD, compared on 5 images\n")
    assert "teacher" not in text
    for model in list(models.values())[1:]:
        assert f"{sum(parameter.numel() for parameter in model.parameters()):,}" in text
    assert (tmp_path / "comparison.png").exists()


def test_annotations_of_other_images_do_not_end_a_finished_run(tmp_path):
    images, annotations = write_coco(tmp_path)
    content = json.loads(annotations.read_text())
    content["images"] = content["images"][:3]
    annotations.write_text(json.dumps(content))
    write_comparison(students("none", "pkd"), CocoFolder(images, annotations), tmp_path, **options())
    assert "compared on 3 images" in (tmp_path / "comparison.md").read_text()


def test_one_student_is_no_comparison(tmp_path):
    data = CocoFolder(*write_coco(tmp_path))
    write_comparison(students("teacher", "crosskd"), data, tmp_path, **options())
    assert not (tmp_path / "comparison.md").exists()
