"""GFL: one score for class and quality, and a distribution over each side of a box (arXiv 2006.04388)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_area, generalized_box_iou_loss

from crosskd.predictions import mean_over_ranks
from dense_heads.detector import OUTSIDE, STRIDES, DenseDetector, DenseHead, Grid, Outputs, Target


class GFL(DenseDetector):
    """Generalized focal loss detector, with the settings of mmdet's ``gfl_r50_fpn_1x_coco``.

    Args:
        backbone: gives an ordered dict of feature maps, finest first; ``out_channels`` wide.
        num_classes: how many classes there are, labelled from 0.
        reg_max: the longest distance from an anchor's centre to a side, in strides; a side is predicted
            as a distribution over 0 to this.
        blocks: convolutions a tower.
        options: further arguments of `DenseDetector`.
    """

    def __init__(
        self, backbone: Any, num_classes: int, *, reg_max: int = 16, blocks: int = 4, **options: Any
    ) -> None:
        levels = len(options.get("strides", STRIDES))
        head = DenseHead(backbone.out_channels, num_classes, levels, bins=reg_max + 1, blocks=blocks)
        super().__init__(backbone, head, **options)
        self.reg_max = reg_max

    def decode(self, regression: Tensor, grid: Grid) -> Tensor:
        """Boxes by the distributions' expectations."""
        return boxes_around(grid.centers, self.distances(regression) * grid.strides[:, None])

    def distances(self, regression: Tensor) -> Tensor:
        """The expected distances (..., 4) to left, top, right and bottom, in strides."""
        bins = torch.arange(self.reg_max + 1, dtype=regression.dtype, device=regression.device)
        return regression.softmax(dim=-1) @ bins

    def losses(
        self, outputs: Outputs, grid: Grid, matches: Tensor, targets: list[Target]
    ) -> dict[str, Tensor]:
        """Quality focal loss, GIoU loss and distribution focal loss."""
        logits, regression, _ = outputs.widened()
        image, anchor, labels, boxes = self.positives(matches, targets)
        sides = regression[image, anchor]  # (positives, 4, bins)
        # In strides from here on.
        centers = grid.centers[anchor] / grid.strides[anchor, None]
        boxes = boxes / grid.strides[anchor, None]
        predicted = boxes_around(centers, self.distances(sides))

        qualities = torch.zeros_like(logits)
        qualities[image, anchor, labels] = paired_iou(predicted.detach(), boxes).to(logits.dtype)
        classification = quality_focal_loss(logits, qualities).sum(dim=-1) * (matches != OUTSIDE)

        # Boxes count as much as the detector is sure of them.
        sure = logits[image, anchor].detach().sigmoid().amax(dim=-1)
        total = mean_over_ranks(sure.sum()).clamp(min=1)
        overlap = generalized_box_iou_loss(predicted, boxes)
        distances = torch.cat([centers - boxes[:, :2], boxes[:, 2:] - centers], dim=-1)
        distribution = distribution_focal_loss(sides, distances.clamp(0, self.reg_max - 0.1))
        return {
            "classification": classification.sum() / self.normalizer(matches),
            "bbox_regression": 2.0 * (overlap * sure).sum() / total,
            "distribution": 0.25 * (distribution.mean(dim=-1) * sure).sum() / total,
        }


def boxes_around(centers: Tensor, distances: Tensor) -> Tensor:
    """Boxes (..., 4), xyxy, from centres (..., 2) and distances (..., 4) to left, top, right, bottom."""
    return torch.cat([centers - distances[..., :2], centers + distances[..., 2:]], dim=-1)


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of each box (rows, 4) with the other of its row."""
    corner = torch.maximum(boxes[:, :2], others[:, :2])
    extent = (torch.minimum(boxes[:, 2:], others[:, 2:]) - corner).clamp(min=0)
    intersection = extent.prod(dim=-1)
    return intersection / (box_area(boxes) + box_area(others) - intersection).clamp(min=1e-6)


def quality_focal_loss(logits: Tensor, qualities: Tensor) -> Tensor:
    """Binary cross entropy against a quality from 0 to 1, times the squared distance to it; elementwise."""
    distance = (qualities - logits.sigmoid()).abs()
    return F.binary_cross_entropy_with_logits(logits, qualities, reduction="none") * distance**2


def distribution_focal_loss(sides: Tensor, distances: Tensor) -> Tensor:
    """Cross entropy with the two bins around a distance, by how near they are.

    Args:
        sides: shape (rows, 4, bins), before the softmax.
        distances: shape (rows, 4), at least 0 and below the last bin.

    Returns:
        Shape (rows, 4).
    """
    lower = distances.floor()
    log_probabilities = sides.log_softmax(dim=-1)
    around = torch.stack([lower, lower + 1], dim=-1).long()
    weights = torch.stack([lower + 1 - distances, distances - lower], dim=-1)
    return -(log_probabilities.gather(-1, around) * weights).sum(dim=-1)
