"""A picture of the images where two students differ most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from crosskd.compare.images import ImageResults

if TYPE_CHECKING:
    from pycocotools.coco import COCO

__all__ = ["draw_changes"]

_GREEN, _RED, _YELLOW = "#2ecc40", "#ff4136", "#ffdc00"
_WIDTH, _MARGIN, _CAPTION = 360, 8, 20  # pixels of a column, between columns, and of a line of text

Box = tuple[Mapping[str, Any], str]  # an annotation or detection, and its colour


def draw_changes(
    rows: Sequence[tuple[str, str, Sequence[Any]]],
    students: Mapping[str, tuple[COCO, ImageResults]],
    ground_truth: COCO,
    folder: Path,
    path: Path,
    pictures: int,
) -> bool:
    """Draws images, a row each: the ground truth, the first student, and another.

    Args:
        rows: the other student's name, a title, and image ids, of which the first that can be read are drawn.
        students: by name, detections and what is made of them in each image.
        ground_truth: the objects.
        folder: of the images.
        path: the PNG file.
        pictures: how many images of each list are drawn.

    Returns:
        Whether there was anything to draw.
    """
    first = next(iter(students))
    number_of = {image: number for number, image in enumerate(sorted(ground_truth.imgs))}
    drawn = []
    for name, title, image_ids in rows:
        readable = ((i, _read(folder, ground_truth.imgs[i])) for i in image_ids)
        for image_id, image in islice(((i, image) for i, image in readable if image is not None), pictures):
            objects = [a for a in ground_truth.imgToAnns[image_id] if not a["iscrowd"]]
            truth = [(annotation, _YELLOW) for annotation in objects]
            tiles = [_tile(image, truth, f"{title}: image {image_id}, {len(objects)} objects", ground_truth)]
            for student in (first, name):
                detections, results = students[student]
                number = number_of[image_id]
                text = f"{results.found[number]} found, {results.false_alarms[number]} false"
                boxes = _boxes(detections.imgToAnns[image_id], objects, results)
                tiles.append(_tile(image, boxes, f"{student}: {text}", ground_truth))
            drawn.append(tiles)
    if drawn:
        _paste(drawn).save(path)
    return bool(drawn)


def _read(folder: Path, entry: Mapping[str, Any]) -> Image.Image | None:
    path = folder / str(entry.get("file_name"))
    try:
        if not path.is_file():  # opening a named pipe would wait for ever
            return None
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, ImportError, Image.DecompressionBombError):
        return None


def _boxes(
    detections: Sequence[Mapping[str, Any]], objects: Sequence[Mapping[str, Any]], results: ImageResults
) -> list[Box]:
    boxes = [(a, _YELLOW) for a in objects if a["id"] not in results.found_ids]
    for detection in detections:
        if detection["id"] in results.true_ids:
            boxes.append((detection, _GREEN))
        elif detection["id"] in results.false_ids:
            boxes.append((detection, _RED))
    return boxes


def _tile(image: Image.Image, boxes: Sequence[Box], title: str, ground_truth: COCO) -> Image.Image:
    """An image as wide as a column, or twice as high, with boxes and their classes, below a line of text."""
    scale = min(_WIDTH / image.width, 2 * _WIDTH / image.height)
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    tile = Image.new("RGB", (_WIDTH, _CAPTION + height), "white")
    tile.paste(image.resize((width, height)), (0, _CAPTION))
    draw = ImageDraw.Draw(tile)
    for entry, colour in boxes:
        left, top, across, down = (side * scale for side in entry["bbox"])
        top += _CAPTION
        draw.rectangle((left, top, left + across, top + down), outline=colour, width=2)
        label = str(ground_truth.cats[entry["category_id"]].get("name", entry["category_id"]))
        font = ImageFont.load_default(11)
        draw.text((left + 3, top + 1), label, "white", font, stroke_width=1, stroke_fill="black")
    draw.rectangle((0, 0, _WIDTH, _CAPTION - 1), fill="white")
    draw.text((0, 2), title, "black", ImageFont.load_default(13))
    return tile


def _paste(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    heights = [row[0].height + _MARGIN for row in rows]
    sheet = Image.new("RGB", (len(rows[0]) * (_WIDTH + _MARGIN) + _MARGIN, sum(heights) + _MARGIN), "white")
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for n, tile in enumerate(row):
            sheet.paste(tile, (_MARGIN + n * (_WIDTH + _MARGIN), top))
        top += height
    return sheet
