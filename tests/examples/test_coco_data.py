from __future__ import annotations

import pytest
import torch
from coco_data import AspectBatches, CocoFolder, training_loader

from tests.examples.coco_files import write_coco


@pytest.fixture
def files(tmp_path):
    return write_coco(tmp_path)


def test_targets_leave_crowds_and_boxes_without_area_out_and_count_them(files):
    dataset = CocoFolder(*files)
    assert dataset.boxes[1].tolist() == [[5, 5, 25, 15]]
    assert dataset.boxes[2].tolist() == [[30, 50, 40, 60]]  # cut at the image's border
    assert len(dataset.boxes[3]) == 0
    assert (dataset.crowds, dataset.degenerate) == (1, 1)
    summary = dataset.summary()
    assert (
        summary == "5 images, 2 without objects, 3 boxes of 2 categories, 1 crowd and 1 empty boxes left out"
    )


def test_labels_are_numbered_or_the_category_ids_themselves(files):
    numbered, raw = CocoFolder(*files), CocoFolder(*files, raw_labels=True)
    assert (numbered.labels[1].tolist(), numbered.num_classes) == ([1], 2)
    assert (raw.labels[1].tolist(), raw.num_classes) == ([7], 8)
    assert numbered.category_of[1] == raw.category_of[7] == 7
    behind_the_background = CocoFolder(*files, first_label=1)
    assert (behind_the_background.labels[1].tolist(), behind_the_background.num_classes) == ([2], 3)
    assert behind_the_background.category_of == {1: 3, 2: 7}
    assert torch.equal(CocoFolder(*files, raw_labels=True, first_label=1).labels[1], raw.labels[1])


def test_images_without_objects_stay_unless_they_are_not_wanted(files):
    assert len(CocoFolder(*files)) == 5
    assert CocoFolder(*files, keep_empty=False).ids == [1, 2, 4]


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
        CocoFolder(images, annotations)[0]


def test_missing_data_is_named(tmp_path, files):
    with pytest.raises(FileNotFoundError, match="no such data: .*nowhere"):
        CocoFolder(tmp_path / "nowhere", files[1])


def test_flips_move_boxes_with_pixels_and_depend_on_seed_and_epoch_alone(files):
    plain, flipped = CocoFolder(*files), CocoFolder(*files, flip=1.0)
    image, target = plain[0]
    mirrored, moved = flipped[0]
    assert torch.equal(mirrored, image.flip(-1))
    assert moved["boxes"].tolist() == [[35, 5, 55, 15]]
    assert target["boxes"].tolist() == [[5, 5, 25, 15]]
    sometimes = CocoFolder(*files, flip=0.5, seed=3)
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
    dataset = CocoFolder(*files, flip=0.5)

    def pixels(workers: int) -> list[float]:
        loader = training_loader(dataset, 2, seed=1, workers=workers)
        return [image.sum().item() for images, _ in loader for image in images]

    assert pixels(0) == pixels(2)
    assert dataset.broken >= 4  # counted over the workers too
