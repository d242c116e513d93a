"""How predictions are held against objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from crosskd.adapters.base import Head, RegionHead

__all__ = ["counts_of", "overlaps", "rows_of_images"]


def counts_of(head: Head, anchors: Any) -> Sequence[int] | None:
    """How many regions each image has; ``None`` for a head that predicts for anchors or queries.

    Args:
        head: whose predictions are meant.
        anchors: what they stand at, or the regions.
    """
    return head.counts(anchors) if isinstance(head, RegionHead) else None


def rows_of_images(rows: Tensor, counts: Sequence[int] | None) -> tuple[Tensor, ...]:
    """Each image's rows, shape (rows, …).

    Args:
        rows: shape (batch, anchors, …); with ``counts`` shape (1, regions, …), image after image.
        counts: how many regions each image has.
    """
    return rows.unbind() if counts is None else torch.split(rows[0], list(counts))


def overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of each box (rows, 4) with each of others (columns, 4), shape (rows, columns), in float64.

    Args:
        boxes: xyxy. One whose sides are in the wrong order has no area, and overlaps nothing.
        others: xyxy.
    """
    boxes = boxes.double()
    proper = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    iou: Tensor = box_iou(boxes, others.to(boxes))
    return iou * proper[:, None]
