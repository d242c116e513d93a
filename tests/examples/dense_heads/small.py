"""Small detectors of ``examples/dense_heads``, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from dense_heads import ATSS, GFL, DenseDetector
from dense_heads.detector import Grid
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from tests.helpers.tiny import STRIDES, TinyBackbone, tiny_batch

FAMILIES = {"gfl": GFL, "atss": ATSS}
CLASSES = 4


def small(family: str, *, classes: int = CLASSES, width: int = 32, seed: int = 0, **options: Any) -> Any:
    """A detector on three levels whose predictions differ from place to place."""
    options = {"strides": STRIDES, "min_size": 64, "max_size": 128, "anchor_scale": 4.0, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = FAMILIES[family](TinyBackbone(width, 8, batch_norm=False), classes, **options)
        for module in (detector.head.logits, detector.head.regression):
            nn.init.normal_(module.weight, std=0.1)
        nn.init.constant_(detector.head.logits.bias, -1.0)
    return detector


def batch_with_and_without_objects() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images, the second wider and without objects."""
    images, targets = tiny_batch(1, num_classes=CLASSES)
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return [*images, torch.rand(3, 64, 120)], [*targets, none]


def grid_of(detector: DenseDetector, *sizes: tuple[int, int]) -> Grid:
    """The anchors for images of some sizes (height, width)."""
    height, width = (-(-max(side) // 32) * 32 for side in zip(*sizes, strict=True))
    maps = [torch.empty(1, 1, -(-height // s), -(-width // s)) for s in detector.strides]
    return detector.grid(ImageList(torch.empty(len(sizes), 3, height, width), list(sizes)), maps)


def random_boxes(count: int, side: float, seed: int = 0) -> Tensor:
    """Boxes (count, 4), xyxy, in an image of side pixels."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * side * 0.6
    return torch.cat([corner, corner + side * (0.1 + 0.3 * torch.rand(count, 2, generator=generator))], dim=1)
