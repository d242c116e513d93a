"""The example of a teacher that sees another modality: pairs of crops, and the whole job."""

from __future__ import annotations

import json
from pathlib import Path

import cross_modality
import numpy as np
import pytest
import torch
from cross_modality import Pairs, build_detector, cropped, main, methods_of
from PIL import Image

from crosskd import FeatureImitation, ResponseDistillation


@pytest.fixture
def data(tmp_path) -> Path:
    """Four pairs of 48 x 40 pixels; the teacher's image is the negative of the student's."""
    root = tmp_path / "data"
    random = np.random.default_rng(0)
    for folder in ("images", "images_pair", "annotations"):
        (root / folder).mkdir(parents=True)
    for number in range(4):
        pixels = random.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        Image.fromarray(255 - pixels).save(root / "images_pair" / f"{number}.png")
    boxes = [[4, 4, 12, 10], [30, 20, 16, 18], [10, 12, 20, 20], [1, 1, 9, 9]]
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 48, "height": 40} for n in range(len(boxes))],
        "annotations": [
            {"id": n + 1, "image_id": n, "category_id": 1 + n % 2, "bbox": box, "area": 100, "iscrowd": 0}
            for n, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "open"}, {"id": 2, "name": "short"}],
    }
    for split, number in (("train", 4), ("val", 4), ("test", 3)):
        of_split = {
            "images": content["images"][:number],
            "annotations": content["annotations"][:number],
            "categories": content["categories"],
        }
        (root / "annotations" / f"{split}.json").write_text(json.dumps(of_split))
    return root


@pytest.fixture
def small(monkeypatch) -> None:
    """Narrow pyramids, so that a step takes a moment."""
    monkeypatch.setattr(cross_modality, "WIDTH", 32)


# -- pairs ----------------------------------------------------------------------------------------


def test_both_images_of_a_pair_are_cropped_and_flipped_alike(data):
    pairs = Pairs(data, ["images", "images_pair"], crop=16, seed=0)
    seen = set()
    for epoch in range(3):
        pairs.epoch = epoch
        for index in range(len(pairs)):
            image, target = pairs[index]
            assert image.shape == target["teacher_image"].shape == (3, 16, 16)
            torch.testing.assert_close(target["teacher_image"], 1 - image)
            again, _ = pairs[index]
            assert torch.equal(image, again)
            seen.add(image.sum().item())
    assert len(seen) == 12  # another crop in each epoch


def test_the_student_alone_sees_the_same_crops(data):
    both, alone = (
        Pairs(data, folders, crop=16, seed=3) for folders in (["images", "images_pair"], ["images"])
    )
    for index in range(len(both)):
        (image, target), (own_image, own_target) = both[index], alone[index]
        assert torch.equal(image, own_image)
        assert torch.equal(target["boxes"], own_target["boxes"])
        assert "teacher_image" not in own_target


def test_images_smaller_than_the_crop_stay_whole(data):
    image, target = Pairs(data, ["images"], crop=100, seed=0)[0]
    assert image.shape == (3, 40, 48)
    assert len(target["boxes"]) == 1


def test_boxes_are_cut_at_the_crop_and_dropped_where_their_centre_is_outside():
    boxes = torch.tensor([[0.0, 0, 30, 30], [8, 8, 14, 12], [25, 2, 60, 8], [30, 30, 40, 40]])
    target = {"boxes": boxes, "labels": torch.arange(4)}
    found = cropped(target, left=10, top=4, width=20, height=16)
    assert found["boxes"].tolist() == [[0, 0, 20, 16], [0, 4, 4, 8]]
    assert found["labels"].tolist() == [0, 1]


def test_error_images_of_a_pair_that_differ_in_size(data):
    Image.new("RGB", (48, 20)).save(data / "images_pair" / "2.png")
    facts = r"images_pair/2.png is \(48, 20\), .*images/2.png \(48, 40\)"
    with pytest.raises(ValueError, match=facts):
        Pairs(data, ["images", "images_pair"], crop=16, seed=0)


# -- detectors and methods -----------------------------------------------------------------------


def test_images_are_not_resized_in_training_or_after(small):
    detector = build_detector(3, pretrained=False, seed=0)
    images = [torch.rand(3, 48, 64), torch.rand(3, 40, 40)]
    for training in (True, False):
        batch, _ = detector.train(training).transform(images)
        assert batch.image_sizes == [(48, 64), (40, 40)]
    maps = detector.backbone(torch.rand(1, 3, 64, 64)).values()
    assert [tuple(features.shape[1:]) for features in maps] == [(32, side, side) for side in (8, 4, 2, 1, 1)]


def test_the_seed_decides_all_weights(small):
    first, second, other = (build_detector(3, pretrained=False, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    key = "head.classification_head.conv.0.0.weight"
    assert not torch.equal(first[key], other[key])


def test_features_come_first_and_responses_then():
    assert methods_of("alone", 100) == []
    (features,) = methods_of("features", 100)
    assert isinstance(features, FeatureImitation)
    assert features.schedule is None
    features, responses = methods_of("features+responses", 100)
    assert isinstance(responses, ResponseDistillation)
    factors = [(features.schedule.factor(step), responses.schedule.factor(step)) for step in (0, 24, 50, 75)]
    assert factors == [(1.0, 0.02), (1.0, 0.5), (1.0, 1.0), (0.5, 1.0)]


# -- the whole job --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:response. kd_response_box is exactly 0")  # a teacher of one step
def test_the_job_trains_all_of_them_and_goes_on_where_it_was(data, small, tmp_path, capsys):
    output = tmp_path / "out"
    options = ["--data", str(data), "--output", str(output), "--crop", "32", "--random-backbone"]
    options += ["--epochs", "1", "--teacher-epochs", "1", "--threads", "1", "--device", "cpu"]
    first = main([*options, "--students", "alone"])
    assert list(first) == ["teacher", "alone-0"]
    capsys.readouterr()
    chosen = ["--students", "alone", "features+responses", "--split", "test"]
    results = main([*options, *chosen])
    said = capsys.readouterr().out
    assert list(results) == ["teacher", "alone-0", "features+responses-0"]
    assert "teacher  epoch" not in said  # it was trained already
    assert "kd_imitation" in said
    assert "kd_response_cls" in said
    assert [first["teacher"]["images"], results["teacher"]["images"]] == [4, 3]
    assert all(result["images"] == 3 for result in results.values())
    assert json.loads((output / "metrics.json").read_text())["results"] == results
    plain = build_detector(2, pretrained=False, seed=0)
    plain.load_state_dict(torch.load(output / "features+responses-0.pt", weights_only=True))


def test_a_teacher_can_be_loaded(data, small, tmp_path):
    teacher = build_detector(2, pretrained=False, seed=5)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    options = ["--data", str(data), "--output", str(tmp_path / "out"), "--random-backbone", "--device", "cpu"]
    results = main([*options, "--teacher-weights", str(tmp_path / "teacher.pt"), "--students"])
    assert list(results) == ["teacher"]
    assert not (tmp_path / "out" / "teacher").exists()
