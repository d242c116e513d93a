"""Where a student's locations lie in the maps of a teacher that saw the images at another size.

An image need not fill its batch: each detector pads a batch by itself. So places go by the images' own sizes:
a location of the student's is a point of the image, which is a point of the teacher's image and of its map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crosskd._checks import compute_dtype
from crosskd.adapters.base import Batch
from crosskd.predictions import Assignment, Predictions

__all__ = ["Placement", "check_same_scene", "lie_alike", "place_level", "sample", "unpadded"]

_ROUNDING = 1e-3  # of a place in the middle of two locations


@dataclass(frozen=True, eq=False)
class Placement:
    """The student's locations in the teacher's maps, of the levels that are compared.

    Attributes:
        sizes: (height, width) of each of the teacher's levels.
        per_level: how many of the teacher's anchors each has.
        grids: of each, shape (batch, height, width, 2): where the student's locations lie, as `sample` takes
            it.
        mixes: they lie between the teacher's, whose values are mixed; else the maps differ in padding alone.
        factors: shape (batch, 4), the student's pixels per pixel of the teacher's, along x, y, x, y.
        copies: a level's locations follow each other as often, `Head.copies <crosskd.adapters.Head>`.
    """

    sizes: tuple[tuple[int, ...], ...]
    per_level: tuple[int, ...]
    grids: tuple[Tensor, ...]
    mixes: bool
    factors: Tensor
    copies: int = 1

    def rows(self, rows: Tensor) -> Tensor:
        """Rows (batch, anchors, …) of the teacher's levels, level by level, at the student's locations."""
        parts = torch.split(rows, list(self.per_level), dim=1)
        placed = []
        for part, size, grid in zip(parts, self.sizes, self.grids, strict=True):
            numbers = part.reshape(len(part), self.copies, *size, -1).permute(0, 1, 4, 2, 3)
            maps = sample(numbers.flatten(1, 2), grid, mixes=self.mixes)
            maps = maps.reshape(len(part), self.copies, -1, *maps.shape[2:]).permute(0, 1, 3, 4, 2)
            placed.append(maps.reshape(len(part), -1, *part.shape[2:]))
        return torch.cat(placed, dim=1)

    def predictions(self, predictions: Predictions) -> Predictions:
        """The teacher's at the student's locations, boxes still as the teacher's head encodes them."""
        quality = None if predictions.quality is None else self.rows(predictions.quality)
        logits, regression = self.rows(predictions.logits), self.rows(predictions.regression)
        return replace(predictions, logits=logits, regression=regression, quality=quality)

    def boxes(self, boxes: Tensor) -> Tensor:
        """The teacher's boxes at the student's locations, in pixels of the student's batch."""
        return self.rows(boxes * self.factors.to(boxes).view(-1, *[1] * (boxes.ndim - 2), 4))

    def assignment(self, assignment: Assignment) -> Assignment:
        """The teacher's at the student's locations; the normalizer goes with the number of positives."""
        weights = None if assignment.label_weights is None else self.rows(assignment.label_weights)
        # Between locations of which one is positive, as well: few are, and none may get lost.
        positive = self.rows(assignment.positive.float()) > _ROUNDING
        normalizer = assignment.normalizer
        if self.mixes:
            before, after = (mask.sum().clamp(min=1) for mask in (assignment.positive, positive))
            normalizer = normalizer * after / before
        return Assignment(weights, positive, normalizer)


def check_same_scene(view: Any, images: Any, teacher: Batch, student: Batch) -> None:
    """Raises ``ValueError`` for a view of other images, or of a part of them: shapes that don't agree.

    Args:
        view: what the teacher is called with.
        images: what the student is called with.
        teacher: its batch of the view.
        student: its batch of the images.
    """
    raw = [_sizes_of(given) for given in (view, images)]
    theirs = teacher.image_sizes if raw[0] is None else raw[0]
    # The student's images as they are given, or as it resizes them, which may change their shape.
    choices = [student.image_sizes, *([] if raw[1] is None else [raw[1]])]
    if raw[0] is not None and raw[1] is not None:
        choices = [raw[1]]
    for ours in choices:
        if len(theirs) == len(ours) and all(map(_of_one_shape, theirs, ours)):
            return
    raise ValueError(
        f"teacher_view must give as many images as the student gets, of the same scenes in one frame, so "
        f"that boxes lie at the same shares of both: got sizes {list(theirs)} for the student's "
        f"{list(choices[-1])}, as (height, width). Crop, flip or pad both alike"
    )


def _sizes_of(images: Any) -> list[tuple[int, ...]] | None:
    """(height, width) of each of some images in a list; ``None`` for one tensor, which may be padded."""
    if not isinstance(images, list | tuple) or not all(isinstance(image, Tensor) for image in images):
        return None
    return [tuple(image.shape[-2:]) for image in images]


def _of_one_shape(theirs: Sequence[int], ours: Sequence[int]) -> bool:
    """Whether two (height, width) are in proportion, up to rounding to whole pixels."""
    return abs(theirs[0] * ours[1] - theirs[1] * ours[0]) <= sum(theirs) + sum(ours)


def unpadded(view: Any, images: Any, teacher: Batch, student: Batch) -> tuple[tuple[int, int], ...]:
    """The (height, width) of the teacher's images, where it got one tensor and took all of it for image.

    Its images then lie in the tensor as the student's lie in theirs.

    Args:
        view: what the teacher is called with.
        images: what the student is called with.
        teacher: its batch of the view.
        student: its batch of the images.
    """
    for given, batch in ((view, teacher), (images, student)):
        if not isinstance(given, Tensor) or tuple(given.shape[-2:]) != batch.size:
            return teacher.image_sizes
    if any(size != teacher.size for size in teacher.image_sizes):
        return teacher.image_sizes
    factors = [a / b for a, b in zip(teacher.size, student.size, strict=True)]
    return tuple((round(h * factors[0]), round(w * factors[1])) for h, w in student.image_sizes)


def lie_alike(teacher: Batch, student: Batch, scale: float) -> bool:
    """Whether every image of the teacher's is ``scale`` times the student's, up to rounding to whole pixels.

    Args:
        teacher: its batch.
        student: likewise.
        scale: the teacher's pixels per pixel of the student's.
    """
    for theirs, ours in zip(teacher.image_sizes, student.image_sizes, strict=True):
        if any(abs(a - scale * b) > 1 + scale for a, b in zip(theirs, ours, strict=True)):
            return False
    return True


def place_level(
    batches: tuple[Batch, Batch],
    sizes: Sequence[Sequence[int]],
    strides: Sequence[float | None],
    scale: float,
    like: Tensor,
) -> tuple[Tensor, bool]:
    """Where the student's locations of one level lie in the teacher's map, as `sample` takes it.

    Args:
        batches: the teacher's and the student's.
        sizes: (height, width) of the map, of either side.
        strides: of the level, of either side; ``None`` if unknown.
        scale: the teacher's pixels per pixel of the student's, by the strides of the levels.
        like: a tensor of the device wanted.

    Returns:
        Shape (batch, height, width, 2), x and y, from -1 to 1 within the teacher's map; and whether each lies
        on one of the teacher's locations, so that the maps differ in padding alone.
    """
    theirs, ours = strides
    fits = theirs is not None and ours is not None and math.isclose(theirs, scale * ours, rel_tol=1e-6)
    exact, covered = fits and lie_alike(*batches, scale), []
    for batch, size, stride in zip(batches, sizes, strides, strict=True):
        for count, pixels in zip(size, batch.size, strict=True):
            # A map of a fixed size stands for the whole batch, whatever the stride.
            by_stride = stride is not None and abs(count - pixels / stride) <= 1
            exact = exact and by_stride
            covered.append(count * stride if by_stride and stride is not None else pixels)
    images = []
    of_images = zip(batches[0].image_sizes, batches[1].image_sizes, strict=True)
    for (height, width), (own_height, own_width) in of_images:
        y, x = (scale, scale) if exact else (height / own_height, width / own_width)
        y, x = y * covered[2] / covered[0], x * covered[3] / covered[1]
        images.append([[x, 0.0, x - 1], [0.0, y, y - 1]])
    affine = torch.tensor(images, dtype=torch.float64, device=like.device)
    return F.affine_grid(affine, [len(images), 1, *sizes[1]], align_corners=False), exact


def sample(maps: Tensor, grid: Tensor, *, mixes: bool) -> Tensor:
    """Maps (batch, channels, height, width) at the places of a grid; beyond the edge the value at the edge.

    Args:
        maps: the teacher's.
        grid: shape (batch, height, width, 2), of `place_level`.
        mixes: between locations their values are mixed; else that of the nearest is taken.
    """
    numbers = maps.to(compute_dtype(maps))
    mode = "bilinear" if mixes else "nearest"
    placed = F.grid_sample(
        numbers, grid.to(numbers.dtype), mode=mode, padding_mode="border", align_corners=False
    )
    return placed.to(maps.dtype)
