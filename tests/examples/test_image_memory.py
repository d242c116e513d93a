"""Decoded images in memory: samples are what they are without, and what doesn't fit is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import image_memory
import numpy as np
import pytest
import torch
from augmentations import AUGMENTATIONS
from coco_data import CocoFolder, training_loader
from image_memory import check_memory, free_memory
from PIL import Image
from processes import SINGLE

from tests.examples.coco_files import write_annotations, write_coco

BYTES = 4 * 3 * 40 * 60  # of the fifth image there is no file


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    """And their negatives beside them, as the teacher's. One of each breaks off in its pixels."""
    images, annotations = write_coco(tmp_path)
    negatives = tmp_path / "negatives"
    negatives.mkdir()
    for name in ("1.jpg", "2.jpg", "3.png"):
        Image.open(images / name).point(lambda value: 255 - value).save(negatives / name, quality=95)
    broken = (images / "1.jpg", images / "4.jpg"), (images / "1.jpg", negatives / "4.jpg")
    for whole, half in (*broken, (images / "2.jpg", negatives / "2.jpg")):
        half.write_bytes(whole.read_bytes()[:1000])
    return images, annotations


def batches(dataset: CocoFolder, workers: int) -> list[tuple[list[torch.Tensor], list[dict]]]:
    found = []
    for dataset.epoch in range(2):
        found += training_loader(dataset, 2, seed=1, workers=workers)
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("further", ["teacher_images", "unlabelled"])
def test_samples_are_the_same_to_the_bit_and_no_file_is_read_again(files, tmp_path, workers, further):
    names = ("flip", "mosaic", "jitter", "crop", "colour")
    settings = {"augment": [AUGMENTATIONS[name] for name in names], "seed": 2}
    settings[further] = tmp_path / "negatives"
    datasets = [CocoFolder(*files, **settings, cache_images=kept) for kept in (False, True)]
    for dataset in datasets:
        dataset.draws_unlabelled = further == "unlabelled"
    expected = batches(datasets[0], workers)
    shutil.rmtree(files[0])
    shutil.rmtree(tmp_path / "negatives")
    found = batches(datasets[1], workers)
    assert len(found) == len(expected) == 6
    for (images, targets), (own_images, own_targets) in zip(expected, found, strict=True):
        assert all(map(torch.equal, images, own_images))
        for target, own in zip(targets, own_targets, strict=True):
            assert target.keys() == own.keys() >= {"boxes", "labels"}
            assert all(torch.equal(target[key], own[key]) for key in target)
    assert datasets[1].broken == datasets[0].broken > 0
    assert datasets[1].read(3) is datasets[1].read(4) is None


def test_what_is_read_is_a_copy(files):
    dataset = CocoFolder(*files, cache_images=True)
    image = dataset.read(0)
    image.zero_()
    assert dataset.read(0).any()


def test_sixteen_bits_are_resized_alike(tmp_path):
    """Though they are decoded to another layout than colours."""
    values = np.random.default_rng(0).integers(0, 65535, (40, 60), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "1.png")
    info = {"id": 1, "file_name": "1.png", "width": 60, "height": 40}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 40, 30]}
    annotations = write_annotations(tmp_path / "a.json", [info], [box])
    settings = {"augment": [AUGMENTATIONS[name] for name in ("mosaic", "jitter", "colour")]}
    plain, kept = (CocoFolder(tmp_path, annotations, **settings, cache_images=on) for on in (False, True))
    for plain.epoch in range(8):
        kept.epoch = plain.epoch
        assert torch.equal(plain[0][0], kept[0][0])


def test_the_summary_says_how_much_it_is(files, tmp_path):
    assert f"; 3 images in memory, {BYTES:,} bytes" in CocoFolder(*files, cache_images=True).summary()
    both = CocoFolder(*files, teacher_images=tmp_path / "negatives", cache_images=True)
    assert both.memory.size == 2 * BYTES


def test_what_does_not_fit_is_refused_before_anything_is_decoded(files, monkeypatch):
    monkeypatch.setattr(image_memory, "ThreadPoolExecutor", None)  # that decodes
    monkeypatch.setattr(image_memory, "free_memory", lambda: BYTES - 1)
    with pytest.raises(
        ValueError, match=rf"--cache-images: .* {BYTES:,} bytes, and {BYTES - 1:,} bytes are free"
    ):
        CocoFolder(*files, cache_images=True)


def test_each_process_of_a_machine_needs_as_much(monkeypatch):
    monkeypatch.setattr(image_memory, "free_memory", lambda: 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_memory(500, SINGLE)
    with pytest.raises(ValueError, match="501 bytes in each of a machine's 2 processes, and 1,000 bytes"):
        check_memory(501, SINGLE)
    monkeypatch.setattr(image_memory, "free_memory", lambda: None)  # a system that doesn't tell
    check_memory(2**60, SINGLE)


def test_free_memory_is_what_linux_says(monkeypatch):
    text = "MemTotal:       24684096 kB\nMemFree:   1 kB\nMemAvailable:   2048 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert free_memory() == 2 * 2**20

    def nowhere(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", nowhere)
    assert free_memory() is None
