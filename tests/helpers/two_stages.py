"""Faster R-CNNs small enough to train a step in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

from tests.helpers.tiny import SIDE, STRIDES, TinyBackbone, tiny_batch

CLASSES = 5  # the background, which is 0, is one of them
POOLED = 3
ANCHORS = 32
REGIONS = 16


class SomeLevels(nn.Module):
    """A backbone that keeps some of another's levels."""

    def __init__(self, backbone: TinyBackbone, levels: Sequence[int]) -> None:
        super().__init__()
        self.backbone, self.levels, self.out_channels = backbone, levels, backbone.out_channels

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(pixels)
        return {str(level): maps[str(level)] for level in self.levels}


def tiny_faster_rcnn(
    num_classes: int = CLASSES,
    *,
    v2: bool = False,
    width: int = 16,
    vector: int = 24,
    hidden: int = 8,
    batch_norm: bool = False,
    levels: Sequence[int] = (0, 1, 2),
    pooled: int = POOLED,
    seed: int = 0,
    side: int = SIDE,
    **options: Any,
) -> FasterRCNN:
    """A Faster R-CNN of 3 anchors a location.

    Args:
        num_classes: classes, the background included.
        v2: two convolutions in the RPN, and a box head of two convolutions and a linear layer, instead of
            one and of two linear layers.
        width: channels of the feature maps.
        vector: channels of the box head's vectors.
        hidden: channels of the backbone.
        batch_norm: whether the backbone, and the box head of v2, have BatchNorm layers.
        levels: which of the strides 8, 16 and 32 there are.
        pooled: pixels along a side of what is pooled at a region.
        seed: of the weights.
        side: images are resized to this many pixels.
        options: further arguments of torchvision's ``FasterRCNN``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = tuple((2 * STRIDES[level],) for level in levels)
        anchors = options.pop("rpn_anchor_generator", None)
        anchors = anchors or AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        names = [str(level) for level in levels]
        box_head: nn.Module = TwoMLPHead(width * pooled**2, vector)
        if v2:
            norm = nn.BatchNorm2d if batch_norm else None
            box_head = FastRCNNConvFCHead((width, pooled, pooled), [width, width], [vector], norm)
        rpn_head = RPNHead(width, anchors.num_anchors_per_location()[0], 1 + v2)
        settings = {
            "min_size": side,
            "max_size": side,
            "rpn_anchor_generator": anchors,
            "rpn_head": rpn_head,
            "rpn_pre_nms_top_n_train": 64,
            "rpn_post_nms_top_n_train": 40,
            "rpn_batch_size_per_image": ANCHORS,
            "box_roi_pool": MultiScaleRoIAlign(names, pooled, 2),
            "box_head": box_head,
            "box_predictor": FastRCNNPredictor(vector, num_classes),
            "box_batch_size_per_image": REGIONS,
        }
        backbone = SomeLevels(TinyBackbone(width, hidden, batch_norm), levels)
        detector = FasterRCNN(backbone, **{**settings, **options})
        _liven(detector)
        return detector


def _liven(detector: FasterRCNN) -> None:
    """Weights that keep features alive and predictions apart: torchvision's own make them vanish."""
    for layer in detector.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -0.1, 0.1)
    for predictor in (detector.rpn.head.bbox_pred, detector.roi_heads.box_predictor.bbox_pred):
        nn.init.normal_(predictor.weight, std=0.05)


def two_stage_batch(batch: int = 2, **options: Any) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images of noise with two objects each, labelled from 1 on."""
    return tiny_batch(batch, num_classes=CLASSES, first_label=1, **options)
