"""ATSS: a RetinaNet of one anchor a location, with centerness (arXiv 1912.02424)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from crosskd.predictions import mean_over_ranks
from dense_heads.detector import OUTSIDE, STRIDES, DenseDetector, DenseHead, Grid, Outputs, Target

# What a regression of 1 means: a shift by a tenth of the anchor's side, growth by exp(1/5).
SHIFT, GROWTH = 0.1, 0.2
_LARGEST_GROWTH = math.log(1000 / 16)


class ATSS(DenseDetector):
    """Adaptive training sample selection detector, with the settings of mmdet's ``atss_r50_fpn_1x_coco``.

    Args:
        backbone: gives an ordered dict of feature maps, finest first; ``out_channels`` wide.
        num_classes: how many classes there are, labelled from 0.
        blocks: convolutions a tower.
        options: further arguments of `DenseDetector`.
    """

    def __init__(self, backbone: Any, num_classes: int, *, blocks: int = 4, **options: Any) -> None:
        levels = len(options.get("strides", STRIDES))
        head = DenseHead(backbone.out_channels, num_classes, levels, centerness=True, blocks=blocks)
        super().__init__(backbone, head, **options)

    def decode(self, regression: Tensor, grid: Grid) -> Tensor:
        """Boxes by shifting and stretching the anchors."""
        return moved(grid.anchors, regression)

    def losses(
        self, outputs: Outputs, grid: Grid, matches: Tensor, targets: list[Target]
    ) -> dict[str, Tensor]:
        """Focal loss, GIoU loss by centerness, and centerness."""
        logits, regression, centerness = outputs.widened()
        assert centerness is not None
        image, anchor, labels, boxes = self.positives(matches, targets)
        wanted = torch.zeros_like(logits)
        wanted[image, anchor, labels] = 1
        classification = sigmoid_focal_loss(logits, wanted).sum(dim=-1) * (matches != OUTSIDE)

        predicted = moved(grid.anchors[anchor], regression[image, anchor])
        central = centerness_of(grid.centers[anchor], boxes).to(logits.dtype)
        overlap = generalized_box_iou_loss(predicted, boxes)
        total = mean_over_ranks(central.sum()).clamp(min=1)
        quality = F.binary_cross_entropy_with_logits(centerness[image, anchor], central, reduction="sum")
        normalizer = self.normalizer(matches)
        return {
            "classification": classification.sum() / normalizer,
            "bbox_regression": 2.0 * (overlap * central).sum() / total,
            "bbox_ctrness": quality / normalizer,
        }


def moved(anchors: Tensor, deltas: Tensor) -> Tensor:
    """Boxes (..., 4), xyxy, from anchors (..., 4), xyxy, and what the head says about them, (..., 4)."""
    sizes = anchors[..., 2:] - anchors[..., :2]
    growth = (GROWTH * deltas[..., 2:]).clamp(-_LARGEST_GROWTH, _LARGEST_GROWTH)
    centers = (anchors[..., :2] + anchors[..., 2:]) / 2 + SHIFT * deltas[..., :2] * sizes
    half = sizes * growth.exp() / 2
    return torch.cat([centers - half, centers + half], dim=-1)


def centerness_of(points: Tensor, boxes: Tensor) -> Tensor:
    """How central points (rows, 2) are in their boxes (rows, 4): 1 in the middle, 0 at a side."""
    before, behind = points - boxes[:, :2], boxes[:, 2:] - points
    ratios = torch.minimum(before, behind) / torch.maximum(before, behind)
    return ratios.prod(dim=-1).sqrt()
