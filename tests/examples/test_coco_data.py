from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from augmentations import flip
from coco_data import AspectBatches, CocoFolder, collate, teacher_images, training_loader
from evaluation import coco_metrics
from PIL import Image
from torchvision.transforms import v2

from tests.examples.coco_files import write_annotations, write_coco

PUBLISHED = ["background", "", "", "cat", "", "", "", "dog", "mouse"]


@pytest.fixture
def files(tmp_path):
    return write_coco(tmp_path)


def test_targets_leave_crowds_and_boxes_without_area_out_and_count_them(files):
    dataset = CocoFolder(*files)
    boxes = [dataset.objects(index)[0] for index in range(3)]
    assert boxes[0].tolist() == [[5, 5, 25, 15]]
    assert boxes[1].tolist() == [[30, 50, 40, 60]]  # cut at the image's border
    assert boxes[2].shape == (0, 4)
    assert dataset.counts.tolist() == [1, 1, 0, 1, 0]
    assert (dataset.left_out["crowd"], dataset.left_out["empty"]) == (1, 1)
    summary = dataset.summary()
    assert summary == (
        "5 images, 2 without objects, 3 boxes of 2 categories; boxes left out: 1 crowd, 1 empty; "
        "missing images: 1 (5.jpg); images that can't be read: 1 (4.jpg)"
    )


def test_labels_are_numbered_or_the_category_ids_themselves(files):
    numbered, raw = CocoFolder(*files), CocoFolder(*files, published=PUBLISHED)
    assert (numbered.objects(0)[1].tolist(), numbered.num_classes) == ([1], 2)
    assert (raw.objects(0)[1].tolist(), raw.num_classes) == ([7], 9)
    assert numbered.category_of[1] == raw.category_of[7] == 7
    behind_the_background = CocoFolder(*files, first_label=1)
    assert (behind_the_background.objects(0)[1].tolist(), behind_the_background.num_classes) == ([2], 3)
    assert behind_the_background.category_of == {1: 3, 2: 7}
    published = CocoFolder(*files, published=PUBLISHED, first_label=1)
    assert torch.equal(published.objects(0)[1], raw.objects(0)[1])


def test_images_without_objects_stay_unless_they_are_not_wanted(files):
    assert len(CocoFolder(*files)) == 5
    fewer = CocoFolder(*files, keep_empty=False)
    assert (fewer.ids, fewer.counts.tolist()) == ([1, 2, 4], [1, 1, 1])
    assert fewer.objects(2)[0].tolist() == [[1, 1, 10, 10]]
    assert fewer[1][1]["image_id"] == 2
    assert [image["file_name"] for image in fewer.ground_truth()["images"]] == ["1.jpg", "2.jpg", "4.jpg"]


def test_grayscale_becomes_three_channels(files):
    image, target = CocoFolder(*files)[1]
    assert image.shape == (3, 60, 40)
    assert 0 <= image.min() <= image.max() <= 1
    assert torch.equal(image[0], image[1])
    assert target["boxes"].shape == (1, 4)


def test_an_unreadable_image_is_replaced_and_counted(files):
    dataset = CocoFolder(*files)
    _, target = dataset[3]  # 4 is broken, 5 is missing: the next one is the first
    assert target["image_id"] == 1
    assert dataset.broken == 2
    assert dataset.read(3) is None


def test_nothing_readable_is_an_error(files):
    images, annotations = files
    for path in images.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(OSError, match="not one of the 5 images"):
        CocoFolder(images, annotations)


def test_missing_data_is_named_with_what_is_there(tmp_path, files):
    with pytest.raises(
        FileNotFoundError, match=f"nowhere/at/all: {tmp_path} holds annotations.json, images/"
    ):
        CocoFolder(tmp_path / "nowhere" / "at" / "all", files[1])
    for number in range(9):
        (files[0] / f"{number}.txt").touch()
    with pytest.raises(FileNotFoundError, match="a.json: .* holds 0.txt, 1.jpg, 1.txt, 2.jpg, 2.txt, ..."):
        CocoFolder(files[0], files[0] / "a.json")


def test_where_most_images_are_missing_the_folder_is_another_one(tmp_path, files):
    """One level up, in this case."""
    facts = f"5 images, of which 5 are missing.* as {tmp_path}/1.jpg: .* holds annotations.json, images/"
    with pytest.raises(FileNotFoundError, match=facts):
        CocoFolder(tmp_path, files[1])


def test_flips_move_boxes_with_pixels_and_depend_on_seed_and_epoch_alone(files):
    def always(dataset, image, target):
        return v2.RandomHorizontalFlip(1.0)(image, target)

    plain, flipped = CocoFolder(*files), CocoFolder(*files, augment=[always])
    image, target = plain[0]
    mirrored, moved = flipped[0]
    assert torch.equal(mirrored, image.flip(-1))
    assert moved["boxes"].tolist() == [[35, 5, 55, 15]]
    assert target["boxes"].tolist() == [[5, 5, 25, 15]]
    sometimes = CocoFolder(*files, augment=[flip], seed=3)
    outcomes = []
    for epoch in range(12):
        sometimes.epoch = epoch
        first, again = sometimes[0][0], sometimes[0][0]
        assert torch.equal(first, again)
        outcomes.append(torch.equal(first, image))
    assert 0 < sum(outcomes) < 12


def test_batches_hold_each_image_once_and_one_orientation(files):
    dataset = CocoFolder(*files)
    batches = AspectBatches(dataset, 2, seed=0)
    drawn = list(batches)
    assert len(drawn) == len(batches) == 3
    assert sorted(index for batch in drawn for index in batch) == [0, 1, 2, 3, 4]
    full = [batch for batch in drawn if len(batch) == 2]
    assert sum(len({dataset.is_landscape(i) for i in batch}) == 1 for batch in full) == 2
    batches.skip = 2  # an epoch that is taken up in the middle
    assert list(batches) == drawn[2:]
    assert len(batches) == 3


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_take_equally_many_steps_and_miss_no_image(files, ranks):
    dataset = CocoFolder(*files)
    shares = [list(AspectBatches(dataset, 1, seed=5, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert {len(batch) for share in shares for batch in share} == {1}
    assert {index for share in shares for batch in share for index in batch} == set(range(5))


def test_the_order_changes_with_the_epoch_and_can_be_repeated(files):
    dataset = CocoFolder(*files)
    orders = []
    for epoch in (0, 1, 2, 3, 0):
        dataset.epoch = epoch
        orders.append([i for batch in AspectBatches(dataset, 2, seed=0) for i in batch])
    assert orders[0] == orders[4]
    assert len({tuple(order) for order in orders}) > 1


def test_worker_processes_give_the_same_batches(files):
    frozen = gc.get_freeze_count()

    def note(dataset, image, target):
        return image, {**target, "objects left to themselves": torch.tensor(gc.get_freeze_count() > frozen)}

    dataset = CocoFolder(*files, augment=[flip, note])

    def pixels(workers: int) -> list[float]:
        batches = list(training_loader(dataset, 2, seed=1, workers=workers))
        notes = [target["objects left to themselves"] for _, targets in batches for target in targets]
        assert all(notes) == any(notes) == (workers > 0)
        return [image.sum().item() for images, _ in batches for image in images]

    assert pixels(0) == pixels(2)
    assert dataset.broken >= 4  # counted over the workers too


# -- what the teacher sees ------------------------------------------------------------------------


@pytest.fixture
def views(files) -> Path:
    """The teacher's images: single colours, of those that the student can read."""
    folder = files[0].parent / "views"
    folder.mkdir()
    for number, (name, size) in enumerate((("1.jpg", (60, 40)), ("2.jpg", (40, 60)), ("3.png", (60, 40)))):
        Image.new("RGB", size, (50 * number, 100, 0)).save(folder / name)
    return folder


def test_what_the_teacher_sees_comes_with_the_image(files, views):
    dataset = CocoFolder(*files, teacher_images=views)
    for index, name in enumerate(("1.jpg", "2.jpg", "3.png", "1.jpg")):  # the fourth can't be read
        image, target = dataset[index]
        with Image.open(views / name) as view:
            expected = torch.from_numpy(np.array(view)).permute(2, 0, 1) / 255
        assert torch.equal(target["teacher_image"], expected)
        assert target["teacher_image"].shape == image.shape
    images, targets = collate([dataset[0], dataset[1]])
    for seen, target in zip(teacher_images(images, targets), targets, strict=True):
        assert seen is target["teacher_image"]


def test_missing_images_of_the_teacher_are_counted_and_named(files, views):
    for name in ("2.jpg", "3.png"):
        (views / name).unlink()
    facts = f"2 of the student's 5 images .* as {views}/2.jpg: {views} holds 1.jpg"
    with pytest.raises(FileNotFoundError, match=facts):
        CocoFolder(*files, teacher_images=views)
    with pytest.raises(FileNotFoundError, match="1 of the student's 3 images"):  # 3.png shows nothing
        CocoFolder(*files, teacher_images=views, keep_empty=False)
    with pytest.raises(FileNotFoundError, match=f"{views}/deeper"):
        CocoFolder(*files, teacher_images=views / "deeper")


def test_images_of_the_teacher_of_another_size_are_named_with_both(files, views):
    Image.new("RGB", (80, 120)).save(views / "2.jpg")
    facts = rf"1 of the teacher's .*: {views}/2.jpg is \(80, 120\), {files[0]}/2.jpg \(40, 60\)"
    with pytest.raises(ValueError, match=facts):
        CocoFolder(*files, teacher_images=views)


def test_a_pair_is_replaced_where_the_teachers_image_cannot_be_read(files, views):
    (views / "2.jpg").write_bytes(b"no image")
    dataset = CocoFolder(*files, teacher_images=views)
    assert "; images of the teacher's that can't be read: 1 (2.jpg)" in dataset.summary()
    assert dataset[1][1]["image_id"] == 3
    assert dataset.broken == 1
    for path in views.iterdir():
        path.write_bytes(b"no image")
    dataset = CocoFolder(*files, teacher_images=views)
    with pytest.raises(OSError, match=f"not one of the 5 images under {files[0]} or {views}"):
        dataset[0]


# -- files that would end a run late, or be trained on wrongly -----------------------------------

IMAGE = {"id": 1, "file_name": "1.png", "width": 60, "height": 40}
BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 10]}


def one_image(folder: Path, image: Image.Image | None = None, **further) -> tuple[Path, Path]:
    (image or Image.new("RGB", (60, 40))).save(folder / "1.png")
    parts = {"images": [IMAGE], "annotations": [dict(BOX)], **further}
    return folder, write_annotations(folder / "a.json", **parts)


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"annotations": [BOX, BOX]}, r"ids of annotations are there more than once, such as \[1\]"),
        ({"images": [IMAGE, IMAGE]}, r"ids of images are there more than once"),
        ({"annotations": [{**BOX, "id": "a"}]}, r"ids of annotations are no whole numbers, such as \['a'\]"),
        ({"annotations": [{**BOX, "bbox": [5, 5, float("nan"), 10]}]}, "annotation 1: bbox .*nan"),
        ({"annotations": [{**BOX, "bbox": [5, 5, 20]}]}, r"annotation 1: bbox .*\[5, 5, 20\]"),
        ({"annotations": [{**BOX, "bbox": [5, 5, -1, 10]}]}, r"annotation 1: bbox .*-1"),
        ({"annotations": [{**BOX, "category_id": 7}]}, r"annotation 1 is of category 7.*\[1\]"),
        ({"annotations": [{**BOX, "iscrowd": "no"}]}, "annotation 1: iscrowd"),
        ({"annotations": [{"id": 1, "image_id": 1, "category_id": 1}]}, "'bbox' is missing"),
        ({"annotations": []}, "no box of an object"),
        ({"images": []}, "it holds no images"),
        ({"categories": []}, "it holds no categories"),
        ({"images": [{**IMAGE, "width": None}]}, "a.json can't be used"),
        ({"images": [{**IMAGE, "width": 40, "height": 60}]}, r"1.png is \(60, 40\), annotated as \(40, 60\)"),
    ],
)
def test_annotations_that_cannot_be_used_are_refused(tmp_path, further, message):
    with pytest.raises(ValueError, match=message) as error:
        CocoFolder(*one_image(tmp_path, **further))
    assert "a.json" in str(error.value) or "1.png" in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"images": 3}', "\x00"])
def test_malformed_json_names_the_file(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match="a.json"):
        CocoFolder(tmp_path, tmp_path / "a.json")


def test_what_cocos_measure_needs_is_filled_in(tmp_path):
    """Without area and iscrowd, and with number 0, which pycocotools takes for no match."""
    dataset = CocoFolder(*one_image(tmp_path, annotations=[{**BOX, "id": 0, "area": None}]))
    found = [{"image_id": 1, "category_id": 1, "bbox": BOX["bbox"], "score": 0.9}]
    assert coco_metrics(dataset.ground_truth(), found)["AP"] == pytest.approx(100)


@pytest.mark.parametrize(("width", "turned"), [(40, True), (60, False)])
def test_images_are_turned_as_exif_says_unless_annotated_as_stored(tmp_path, width, turned):
    image = Image.new("RGB", (60, 40))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "1.png", exif=exif)
    info = {**IMAGE, "width": width, "height": 100 - width}
    pixels = CocoFolder(tmp_path, write_annotations(tmp_path / "a.json", [info], [BOX])).read(0)
    assert pixels.shape == (3, 100 - width, width)
    assert pixels[0, 0, -1 if turned else 0] == 255


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    values = np.full((40, 60), 257 * 100, dtype=np.uint16)
    dataset = CocoFolder(*one_image(tmp_path, Image.fromarray(values)))
    assert dataset.read(0).unique().tolist() == [100]


def test_files_that_would_end_or_hang_a_run_are_counted(tmp_path, monkeypatch):
    folder, _ = one_image(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6500)
    Image.new("RGB", (200, 200)).save(folder / "bomb.png")
    Image.new("RGB", (2, 3000)).save(folder / "narrow.png")
    os.mkfifo(folder / "pipe.png")
    Image.new("F", (60, 40)).save(folder / "float.tiff")
    names = ["bomb.png", "narrow.png", "pipe.png", "float.tiff", "nul\0.png", "."]
    others = [{**IMAGE, "id": n, "file_name": name} for n, name in enumerate(names, 2)]
    boxes = [BOX, {**BOX, "id": 2, "image_id": 99}]
    dataset = CocoFolder(folder, write_annotations(folder / "a.json", [IMAGE, *others], boxes))
    assert (dataset.missing, dataset.unreadable) == (["nul\0.png"], [*names[:4], "."])
    assert "can't be read: 5 (bomb.png, narrow.png, pipe.png)" in dataset.summary()
    assert "1 of no image" in dataset.summary()
    assert dataset[3][1]["image_id"] == 1
    assert [dataset.read(index) for index in range(1, 7)] == [None] * 6
