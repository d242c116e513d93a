"""Losses of boxes against boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from crosskd._checks import compute_dtype, require_floating, require_last_dimension, require_same_shape
from crosskd.losses._rows import weighted

__all__ = ["giou_loss", "iou_loss"]

_SMALLEST_AREA = 1e-6
_SMALLEST_IOU = 1e-6


def _intersection_and_union(boxes: Tensor, target_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union of matching boxes, the union never below 1e-6.

    A box whose right side is to the left of its left one, as heads that predict plain distances may give,
    has no area: the product of its sides would be a negative one, or a positive one of nothing.
    """
    sides = (
        torch.minimum(boxes[..., 2:], target_boxes[..., 2:])
        - torch.maximum(boxes[..., :2], target_boxes[..., :2])
    ).clamp(min=0)
    intersection = sides[..., 0] * sides[..., 1]
    size, target_size = ((b[..., 2:] - b[..., :2]).clamp(min=0) for b in (boxes, target_boxes))
    union = size[..., 0] * size[..., 1] + target_size[..., 0] * target_size[..., 1] - intersection
    return intersection, union.clamp(min=_SMALLEST_AREA)


def _checked_boxes(boxes: Tensor, target_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of boxes in the type to calculate in, the targets as constants."""
    require_floating(boxes=boxes, target_boxes=target_boxes)
    require_last_dimension(4, "xyxy in pixels", boxes=boxes, target_boxes=target_boxes)
    require_same_shape(boxes=boxes, target_boxes=target_boxes)
    dtype = compute_dtype(boxes, target_boxes)
    return boxes.to(dtype), target_boxes.detach().to(dtype)


def giou_loss(
    boxes: Tensor,
    target_boxes: Tensor,
    *,
    weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    r"""Generalised IoU loss, :math:`\frac{1}{Z} \sum_i w_i (1 - \mathrm{GIoU}_i)`.

    Boxes of zero area count as areas of 1e-6 and give no gradient through their union.

    Args:
        boxes: the student's boxes, shape (..., 4), xyxy in pixels.
        target_boxes: the teacher's boxes, shape (..., 4), xyxy in pixels, a constant.
        weight: one number per row, shape (...).
        normalizer: what the weighted sum is divided by; the number of rows without it.

    Returns:
        A scalar, float32 (float64 for float64 inputs), between 0 and 2 a row.

    Raises:
        ValueError: shapes that differ or don't end in 4, a weight that is not one number per row, a
            normalizer that is not above 0.
        TypeError: boxes that are not floating point.

    References:
        Generalized Intersection over Union (Rezatofighi et al., CVPR 2019), algorithm 1.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]], requires_grad=True)
        >>> giou_loss(boxes, torch.tensor([[0.0, 0.0, 2.0, 4.0]])).item()
        0.5
    """
    boxes, target_boxes = _checked_boxes(boxes, target_boxes)
    intersection, union = _intersection_and_union(boxes, target_boxes)
    sides = (
        torch.maximum(boxes[..., 2:], target_boxes[..., 2:])
        - torch.minimum(boxes[..., :2], target_boxes[..., :2])
    ).clamp(min=0)
    enclosing = (sides[..., 0] * sides[..., 1]).clamp(min=_SMALLEST_AREA)
    giou = intersection / union - (enclosing - union) / enclosing
    return weighted(1 - giou, weight, normalizer)


def iou_loss(
    boxes: Tensor,
    target_boxes: Tensor,
    *,
    weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    r"""IoU loss, :math:`\frac{1}{Z} \sum_i w_i (-\log \mathrm{IoU}_i)`, with IoUs of at least 1e-6.

    Args:
        boxes: the student's boxes, shape (..., 4), xyxy in pixels.
        target_boxes: the teacher's boxes, shape (..., 4), xyxy in pixels, a constant.
        weight: one number per row, shape (...).
        normalizer: what the weighted sum is divided by; the number of rows without it.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that differ or don't end in 4, a weight that is not one number per row, a
            normalizer that is not above 0.
        TypeError: boxes that are not floating point.

    References:
        UnitBox (Yu et al., ACM MM 2016), section 3; used by FCOS (Tian et al., ICCV 2019).

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]], requires_grad=True)
        >>> round(iou_loss(boxes, torch.tensor([[0.0, 0.0, 2.0, 4.0]])).item(), 4)
        0.6931
    """
    boxes, target_boxes = _checked_boxes(boxes, target_boxes)
    intersection, union = _intersection_and_union(boxes, target_boxes)
    rows = -(intersection / union).clamp(min=_SMALLEST_IOU).log()
    return weighted(rows, weight, normalizer)
