"""The anchors around an object that overlap it too little to be positive: the region of LD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from crosskd._checks import compute_dtype, require_floating, require_last_dimension

__all__ = ["valuable_region"]


def valuable_region(
    anchors: Tensor,
    boxes: Tensor,
    anchors_per_level: Sequence[int],
    *,
    candidates: int = 9,
    fraction: float = 0.25,
) -> Tensor:
    r"""The weight of each anchor in the valuable localisation region of the objects of an image.

    An object's threshold :math:`a` is that of ATSS: of its nearest anchors of each level, by the distance of
    the centres, the mean IoU with the object and its standard deviation, added. An anchor belongs to the
    region of the object if

    .. math::
        \mathrm{fraction} \cdot a \le \mathrm{DIoU} < a

    whether its centre lies inside of the object or not, and its weight is the IoU with the object. Where
    several objects claim an anchor the largest counts. An anchor that is positive may belong to the region
    too: one whose IoU reaches the threshold while its DIoU, which is smaller by the distance of the centres,
    doesn't.

    Args:
        anchors: shape (anchors, 4), xyxy in pixels, level by level.
        boxes: shape (objects, 4), xyxy in pixels, of one image; there may be none.
        anchors_per_level: how many anchors each level has; a level with fewer than ``candidates`` gives all.
        candidates: how many anchors of each level an object's threshold is made of.
        fraction: of the threshold, where the region begins.

    Returns:
        Shape (anchors,), 0 outside of the region; float32 (float64 for float64 inputs), a constant.

    Raises:
        ValueError: shapes that don't end in 4, numbers per level that don't add up to the anchors.
        TypeError: boxes that are not floating point.

    References:
        Localization Distillation (Zheng et al., CVPR 2022), valuable localization region; ATSS (Zhang et al.,
        CVPR 2020), algorithm 1.

    Example:
        >>> anchors = torch.tensor([[0.0, 0.0, 8.0, 8.0], [4.0, 0.0, 12.0, 8.0], [40.0, 0.0, 48.0, 8.0]])
        >>> valuable_region(anchors, torch.tensor([[0.0, 0.0, 8.0, 8.0]]), [3])
        tensor([0.0000, 0.3333, 0.0000])
    """
    require_floating(anchors=anchors, boxes=boxes)
    require_last_dimension(4, "xyxy in pixels", anchors=anchors, boxes=boxes)
    if sum(anchors_per_level) != len(anchors):
        raise ValueError(
            f"anchors_per_level must add up to the {len(anchors)} anchors, got {list(anchors_per_level)}"
        )
    dtype = compute_dtype(anchors, boxes)
    anchors, boxes = anchors.detach().to(dtype), boxes.detach().to(anchors.device, dtype)
    if not len(anchors) or not len(boxes):
        return anchors.new_zeros(len(anchors))
    overlap: Tensor = box_iou(anchors, boxes)  # (anchors, objects), as all that follows
    distance = _squared_distances(anchors, boxes)
    corners = (
        torch.minimum(anchors[:, None, :2], boxes[:, :2]),
        torch.maximum(anchors[:, None, 2:], boxes[:, 2:]),
    )
    diagonal = (corners[1] - corners[0]).square().sum(dim=-1)
    distance_overlap = overlap - distance / diagonal.clamp(min=torch.finfo(dtype).eps)
    threshold = _thresholds(overlap, distance, anchors_per_level, candidates)
    claimed = (distance_overlap >= fraction * threshold) & (distance_overlap < threshold)
    return (overlap * claimed).amax(dim=1)


def _squared_distances(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Between the centres of anchors (anchors, 4) and of boxes (objects, 4), shape (anchors, objects)."""
    centers, box_centers = ((corners[:, :2] + corners[:, 2:]) / 2 for corners in (anchors, boxes))
    return (centers[:, None] - box_centers).square().sum(dim=-1)


def _thresholds(
    overlap: Tensor, distance: Tensor, anchors_per_level: Sequence[int], candidates: int
) -> Tensor:
    """Mean and deviation of the IoUs of each object's nearest anchors, added, shape (objects,)."""
    chosen = []
    levels = (torch.split(values, list(anchors_per_level)) for values in (overlap, distance))
    for of_level, distance_of_level in zip(*levels, strict=True):
        count = min(candidates, len(of_level))
        nearest = distance_of_level.topk(count, dim=0, largest=False).indices
        chosen.append(of_level.gather(0, nearest))
    of_nearest = torch.cat(chosen)  # (candidates of all levels, objects)
    # Unbiased, as ATSS's own; of a single anchor there is no deviation.
    deviation = of_nearest.std(dim=0) if len(of_nearest) > 1 else torch.zeros_like(of_nearest[0])
    return of_nearest.mean(dim=0) + deviation
