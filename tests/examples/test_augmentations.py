"""The augmentations: boxes stay on what they are around, and every one can be repeated."""

from __future__ import annotations

import pytest
import torch
from augmentations import AUGMENTATIONS, GREY
from coco_data import CocoFolder
from PIL import Image

from tests.examples.coco_files import write_annotations

BOXES = {1: [20, 30, 24, 16], 2: [70, 40, 30, 20], 3: [10, 8, 40, 60], 4: [50, 60, 20, 30]}


@pytest.fixture
def files(tmp_path):
    """Four black images, each with a white rectangle, and a box around it."""
    for number, (x, y, width, height) in BOXES.items():
        image = Image.new("RGB", (128, 96))
        image.paste((255, 255, 255), (x, y, x + width, y + height))
        image.save(tmp_path / f"{number}.png")
    images = [{"id": n, "file_name": f"{n}.png", "width": 128, "height": 96} for n in BOXES]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": box} for n, box in BOXES.items()]
    return tmp_path, write_annotations(tmp_path / "a.json", images, boxes)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_boxes_follow_what_they_are_around_and_everything_can_be_repeated(files, name):
    dataset = CocoFolder(*files, augment=[AUGMENTATIONS[name]], seed=1)
    plain = CocoFolder(*files)[0][0]
    changed = 0
    for dataset.epoch in range(12):
        state = torch.get_rng_state()
        image, target = dataset[0]
        assert torch.equal(state, torch.get_rng_state())
        again, same = dataset[0]
        assert torch.equal(image, again)
        assert torch.equal(target["boxes"], same["boxes"])
        assert type(image) is type(target["boxes"]) is torch.Tensor
        assert len(target["boxes"]) == len(target["labels"])
        changed += not torch.equal(image, plain)
        bright = image.mean(0) > 0.8
        inside = torch.zeros_like(bright)
        for left, top, right, bottom in target["boxes"].tolist():
            inside[max(0, int(top) - 1) : int(bottom) + 2, max(0, int(left) - 1) : int(right) + 2] = True
        assert not (bright & ~inside).sum() > 4 * 96  # at most slivers, whose boxes are dropped
        for left, top, right, bottom in target["boxes"].round().int().tolist():
            if name != "colour" and min(right - left, bottom - top) > 5:
                assert bright[top:bottom, left:right].float().mean() > 0.7
    assert changed > 3


@pytest.mark.parametrize("names", [*([name] for name in AUGMENTATIONS), list(AUGMENTATIONS)])
def test_what_the_teacher_sees_is_changed_alike(files, names):
    """Where its images are the student's own, so are they after each augmentation, and after all of them."""
    augment = [AUGMENTATIONS[name] for name in names]
    alone, copied = CocoFolder(*files, augment=augment), CocoFolder(*files, augment=augment)
    copied.teacher_images = files[0]
    for alone.epoch in range(8):
        copied.epoch = alone.epoch
        image, target = copied[1]
        assert torch.equal(target["teacher_image"], image)
        assert type(target["teacher_image"]) is torch.Tensor
        same, own = alone[1]  # and the student's are what they are without
        assert torch.equal(image, same)
        assert target.keys() - own.keys() == {"teacher_image"}
        assert all(torch.equal(target[key], value) for key, value in own.items())


@pytest.mark.parametrize("names", [["flip", "mosaic", "crop"], ["crop", "jitter", "flip"]])
def test_the_teachers_pixels_are_those_of_its_own_images(files, names):
    """A negative stays one wherever it lies; what is beyond the border is grey in both."""
    negatives = files[0] / "negatives"
    negatives.mkdir()
    for number in BOXES:
        image = Image.open(files[0] / f"{number}.png")
        image.point(lambda value: 255 - value).save(negatives / f"{number}.png")
    augment = [AUGMENTATIONS[name] for name in names]
    dataset = CocoFolder(*files, augment=augment, teacher_images=negatives)
    for dataset.epoch in range(8):
        image, target = dataset[2]
        grey = (image - GREY / 255).abs() < 1e-3
        expected = torch.where(grey, image, 1 - image)
        torch.testing.assert_close(target["teacher_image"], expected, rtol=0, atol=0.01)  # bytes are rounded


def test_mosaic_shows_four_images(files):
    dataset = CocoFolder(*files, augment=[AUGMENTATIONS["mosaic"]])
    counts = []
    for dataset.epoch in range(12):
        image, target = dataset[0]
        assert image.shape == (3, 96, 128)
        counts.append(len(target["boxes"]))
    assert max(counts) >= 3
