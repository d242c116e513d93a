"""Adaptive training sample selection: which anchors are responsible for which object (arXiv 1912.02424)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

BACKGROUND = -1


def assign(anchors: Tensor, level_sizes: list[int], boxes: Tensor, candidates: int = 9) -> Tensor:
    """Matches anchors to the boxes of one image.

    A box's candidates are the anchors nearest to its centre, equally many of each level. Those are
    positive that overlap it by more than its candidates do on average, by a standard deviation, and whose
    centre lies inside of it. An anchor that is positive for several boxes takes the one it overlaps most.

    Args:
        anchors: shape (anchors, 4), xyxy, level by level.
        level_sizes: anchors a level.
        boxes: shape (objects, 4), xyxy.
        candidates: anchors a level and box.

    Returns:
        Shape (anchors,), the index of each anchor's box, or ``BACKGROUND``.
    """
    if len(boxes) == 0:
        return torch.full((len(anchors),), BACKGROUND, device=anchors.device)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    box_centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    distances = (centers[:, None] - box_centers).pow(2).sum(-1).sqrt()  # (anchors, objects)
    nearest, start = [], 0
    for level in distances.split(level_sizes):
        chosen = level.topk(min(candidates, len(level)), dim=0, largest=False).indices
        nearest.append(start + chosen)
        start += len(level)
    chosen = torch.cat(nearest)  # (candidates of all levels, objects)

    overlaps = box_iou(anchors, boxes).gather(0, chosen)
    enough = overlaps >= overlaps.mean(dim=0) + overlaps.std(dim=0)
    to_sides = torch.cat([centers[chosen] - boxes[:, :2], boxes[:, 2:] - centers[chosen]], dim=-1)
    positive = enough & (to_sides.amin(dim=-1) > 0.01)

    none = overlaps.new_full(distances.shape, -1.0)
    best, box = none.scatter(0, chosen, overlaps.where(positive, -1.0)).max(dim=1)
    return box.where(best >= 0, BACKGROUND)
