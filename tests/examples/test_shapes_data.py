from __future__ import annotations

import json

import numpy as np
import pytest
import shapes_data
from coco_data import CocoFolder
from shapes_data import _COLOURS, SHAPES, SIDE, _mask, _outline, draw_image, write_shapes


def test_the_same_seed_makes_the_same_image():
    (first, objects), (second, same) = (draw_image(np.random.default_rng(4)) for _ in range(2))
    assert np.array_equal(first, second)
    assert objects == same
    assert not np.array_equal(first, draw_image(np.random.default_rng(5))[0])


def test_boxes_lie_within_the_image_and_labels_are_shapes():
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(20):
        pixels, objects = draw_image(random)
        assert pixels.shape == (SIDE, SIDE, 3)
        for label, (x, y, width, height) in objects:
            seen.add(label)
            assert 0 <= x < x + width <= SIDE
            assert 0 <= y < y + height <= SIDE
    assert seen == set(range(len(SHAPES)))


@pytest.mark.parametrize(("shift", "drawn"), [(29, 1), (31, 2)])
def test_a_shape_that_would_cover_more_than_a_quarter_of_another_is_left_out(monkeypatch, shift, drawn):
    first, others = (np.zeros((SIDE, SIDE), bool) for _ in range(2))
    first[10:50, 10:50] = True
    others[10:50, 10 + shift : 50 + shift] = True
    masks = iter([first, *[others] * 4])
    monkeypatch.setattr(shapes_data, "_mask", lambda random, shape: next(masks))
    _, objects = draw_image(np.random.default_rng(0))
    boxes = [[10, 10, shift, 40], [10 + shift, 10, 40, 40]] if drawn == 2 else [[10, 10, 40, 40]]
    assert [box for _, box in objects] == boxes


def test_a_shape_has_its_own_colours():
    random = np.random.default_rng(0)
    nearest = []
    for _ in range(20):
        pixels, objects = draw_image(random)
        for label, (x, y, width, height) in objects:
            middle = pixels[y + height // 2 - 2 :, x + width // 2 - 2 :][:5, :5].mean(axis=(0, 1)) / 255
            nearest.append(np.abs(np.array(_COLOURS) - middle).sum(axis=1).argmin() == label)
    assert np.mean(nearest) > 0.9


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_covers_an_area_of_its_own(shape):
    mask = _mask(np.random.default_rng(1), shape)
    assert 100 < mask.sum() < SIDE**2 / 4


def test_a_triangle_has_three_corners_and_a_cross_twelve():
    assert [len(_outline(shape)) for shape in ("triangle", "cross")] == [3, 12]


def test_a_written_set_is_coco_and_is_not_written_twice(tmp_path):
    write_shapes(tmp_path, train=3, val=2, seed=0)
    train = CocoFolder(tmp_path / "train", tmp_path / "annotations/train.json")
    assert (len(train), train.names) == (3, list(SHAPES))
    assert train[0][0].shape == (3, SIDE, SIDE)
    image = tmp_path / "train" / "00001.png"
    image.write_bytes(b"touched")
    write_shapes(tmp_path, train=3, val=2, seed=0)
    assert image.read_bytes() == b"touched"
    write_shapes(tmp_path, train=3, val=2, seed=1)
    assert image.read_bytes() != b"touched"
    assert json.loads((tmp_path / "settings.json").read_text())["seed"] == 1


def test_a_half_written_set_is_written_again(tmp_path):
    write_shapes(tmp_path, train=2, val=1, seed=0)
    (tmp_path / "settings.json").unlink()
    (tmp_path / "train" / "00001.png").unlink()
    write_shapes(tmp_path, train=2, val=1, seed=0)
    assert (tmp_path / "train" / "00001.png").exists()


def test_a_set_that_was_being_overwritten_is_made_anew(tmp_path, monkeypatch):
    write_shapes(tmp_path, train=1, val=1, seed=0)
    first = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    write_split = shapes_data._write_split

    def killed(folder, split, *arguments):
        if split == "val":
            raise KeyboardInterrupt
        write_split(folder, split, *arguments)

    monkeypatch.setattr(shapes_data, "_write_split", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path, train=1, val=1, seed=1)
    monkeypatch.undo()
    assert any(path.read_bytes() != pixels for path, pixels in first.items())
    write_shapes(tmp_path, train=1, val=1, seed=0)
    assert all(path.read_bytes() == pixels for path, pixels in first.items())
