"""A picture of the images where two students differ most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from pycocotools.coco import COCO

from crosskd.compare.images import ImageResults

_GREEN, _RED, _YELLOW = "#2ecc40", "#ff4136", "#ffdc00"
_WIDTH, _MARGIN, _CAPTION = 360, 8, 20  # pixels of a column, between columns, and of a line of text

Box = tuple[Sequence[float], str]


def draw_changes(
    rows: Sequence[tuple[str, Sequence[Any]]],
    students: Mapping[str, tuple[COCO, ImageResults]],
    ground_truth: COCO,
    folder: Path,
    path: Path,
    pictures: int,
) -> bool:
    """Draws images, a row each: the ground truth, the first student, and another.

    Args:
        rows: the other student's name and image ids, of which the first that can be read are drawn.
        students: by name, detections and the scores of the images.
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
    for name, image_ids in rows:
        left = pictures
        for image_id in image_ids:
            image = _read(folder, ground_truth.imgs[image_id]) if left else None
            if image is None:
                continue
            left -= 1
            objects = [a for a in ground_truth.imgToAnns[image_id] if not a["iscrowd"]]
            title = f"image {image_id}: {len(objects)} objects"
            tiles = [_tile(image, [(a["bbox"], _YELLOW) for a in objects], title)]
            for student in (first, name):
                detections, scores = students[student]
                boxes = _boxes(detections.imgToAnns[image_id], objects, scores)
                n = number_of[image_id]
                tiles.append(
                    _tile(
                        image,
                        boxes,
                        f"{student}: {scores.found[n]} of {len(objects)} found, {scores.false_alarms[n]} false",
                    )
                )
            drawn.append(tiles)
    if drawn:
        _paste(drawn).save(path)
    return bool(drawn)


def _read(folder: Path, entry: Mapping[str, Any]) -> Image.Image | None:
    try:
        with Image.open(folder / str(entry.get("file_name"))) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, ImportError, Image.DecompressionBombError):
        return None


def _boxes(
    detections: Sequence[Mapping[str, Any]], objects: Sequence[Mapping[str, Any]], scores: ImageResults
) -> list[Box]:
    boxes = [(a["bbox"], _YELLOW) for a in objects if a["id"] not in scores.found_ids]
    for detection in detections:
        if detection["id"] in scores.true_ids:
            boxes.append((detection["bbox"], _GREEN))
        elif detection["id"] in scores.false_ids:
            boxes.append((detection["bbox"], _RED))
    return boxes


def _tile(image: Image.Image, boxes: Sequence[Box], title: str) -> Image.Image:
    """An image as wide as a column, with boxes xywh, below a line of text."""
    scale = _WIDTH / image.width
    height = max(1, round(image.height * scale))
    tile = Image.new("RGB", (_WIDTH, _CAPTION + height), "white")
    tile.paste(image.resize((_WIDTH, height)), (0, _CAPTION))
    draw = ImageDraw.Draw(tile)
    for (x, y, width, high), colour in boxes:
        left, top = x * scale, _CAPTION + y * scale
        draw.rectangle((left, top, left + width * scale, top + high * scale), outline=colour, width=2)
    draw.rectangle((0, 0, _WIDTH, _CAPTION - 1), fill="white")
    draw.text((0, 2), title, fill="black", font=ImageFont.load_default(13))
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
