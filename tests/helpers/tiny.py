"""Detectors small enough to train a step in milliseconds: torchvision's own heads on a tiny backbone."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead

STRIDES = (8, 16, 32)
SIDE = 64

Norm = Literal["none", "group"]


class TinyBackbone(nn.Module):
    """Plain convolutions that give levels of strides 8, 16 and 32.

    Args:
        width: channels of each level, the tower's width; one per level, from stride 8 on, for SSD.
        hidden: channels inside, so that teacher and student may differ.
        batch_norm: puts a BatchNorm behind each strided convolution.
    """

    def __init__(self, width: int | Sequence[int], hidden: int, batch_norm: bool) -> None:
        super().__init__()
        widths = [width] * len(STRIDES) if isinstance(width, int) else width

        def stage(channels: int) -> nn.Sequential:
            layers: list[nn.Module] = [nn.Conv2d(channels, hidden, 3, stride=2, padding=1)]
            if batch_norm:
                layers.append(nn.BatchNorm2d(hidden))
            return nn.Sequential(*layers, nn.ReLU())

        self.out_channels = width
        self.stem = nn.Sequential(stage(3), stage(hidden))
        self.stages = nn.ModuleList(stage(hidden) for _ in widths)
        self.laterals = nn.ModuleList(nn.Conv2d(hidden, of_level, 1) for of_level in widths)

    def forward(self, pixels: Tensor) -> OrderedDict[str, Tensor]:
        features = self.stem(pixels)
        levels = OrderedDict()
        for level, (stage, lateral) in enumerate(zip(self.stages, self.laterals, strict=True)):
            features = stage(features)
            levels[str(level)] = lateral(features)
        return levels


def liven(head: nn.Module) -> None:
    """Weights that keep features alive: torchvision's own make them vanish over an untrained tower."""
    for branch in (head.classification_head, head.regression_head):
        for module in branch.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.uniform_(module.bias, -0.1, 0.1)
    nn.init.normal_(head.classification_head.cls_logits.bias, mean=-1.0)
    nn.init.normal_(head.regression_head.bbox_reg.weight, std=0.02)


def tiny_retinanet(
    num_classes: int = 4,
    *,
    width: int = 32,
    norm: Norm = "none",
    seed: int = 0,
    side: int = SIDE,
    blocks: int = 4,
    hidden: int = 8,
    batch_norm: bool = False,
    **options: Any,
) -> RetinaNet:
    """A RetinaNet of 3 anchors at each location on three levels.

    Args:
        num_classes: classes, labelled from 0.
        width: channels of the feature maps and towers; a multiple of 8.
        norm: what stands behind each of the towers' convolutions.
        seed: of the weights.
        side: images are resized to this many pixels.
        blocks: convolutions in each tower.
        hidden: channels of the backbone.
        batch_norm: whether the backbone has BatchNorm layers.
        options: further arguments of torchvision's ``RetinaNet``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = tuple((4 * stride,) for stride in STRIDES)
        anchors = options.pop("anchor_generator", AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)))
        per_location = anchors.num_anchors_per_location()[0]
        norm_layer = partial(nn.GroupNorm, 8) if norm == "group" else None
        head = RetinaNetHead(width, per_location, num_classes, norm_layer=norm_layer)
        _shorten(head, blocks)
        liven(head)
        return RetinaNet(
            TinyBackbone(width, hidden, batch_norm),
            num_classes,
            min_size=side,
            max_size=side,
            anchor_generator=anchors,
            head=head,
            **options,
        )


def tiny_detector(name: str, options: Namespace, classes: int, weights: Path | None = None) -> RetinaNet:
    """Stands for ``new_detector`` of the training script: a student where there are no weights."""
    return tiny_retinanet(classes, seed=weights is None, batch_norm=True)


def tiny_fcos(
    num_classes: int = 4,
    *,
    width: int = 32,
    norm: Norm = "group",
    seed: int = 0,
    side: int = SIDE,
    blocks: int = 4,
    hidden: int = 8,
    batch_norm: bool = False,
    **options: Any,
) -> FCOS:
    """An FCOS on three levels; arguments as for `tiny_retinanet`, ``width`` a multiple of 32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = tuple((stride,) for stride in STRIDES)
        anchors = options.pop("anchor_generator", AnchorGenerator(sizes, ((1.0,),) * len(sizes)))
        per_location = anchors.num_anchors_per_location()[0]
        head = FCOSHead(width, per_location, num_classes, num_convs=blocks)
        if norm == "none":
            for branch in (head.classification_head, head.regression_head):
                branch.conv = nn.Sequential(*(m for m in branch.conv if not isinstance(m, nn.GroupNorm)))
        liven(head)
        # Distances of about 1.5 strides to each side: the boxes have an area, and a gradient.
        nn.init.constant_(head.regression_head.bbox_reg.bias, 1.5)
        return FCOS(
            TinyBackbone(width, hidden, batch_norm),
            num_classes,
            min_size=side,
            max_size=side,
            anchor_generator=anchors,
            head=head,
            **options,
        )


def with_levels(
    build: Callable[..., nn.Module], levels: Sequence[int], seed: int, **options: Any
) -> nn.Module:
    """A RetinaNet or FCOS that has only some of the three levels.

    Args:
        build: `tiny_retinanet` or `tiny_fcos`.
        levels: which, counted from 0.
        seed: of the weights.
        options: further arguments of ``build``.
    """
    scale, ratios = (4, (0.5, 1.0, 2.0)) if build is tiny_retinanet else (1, (1.0,))
    sizes = tuple((scale * STRIDES[level],) for level in levels)
    anchors = AnchorGenerator(sizes, (ratios,) * len(levels))
    detector = build(seed=seed, anchor_generator=anchors, **options)

    def some(backbone: TinyBackbone, pixels: Tensor) -> dict[str, Tensor]:
        maps = TinyBackbone.forward(backbone, pixels)
        return {str(level): maps[str(level)] for level in levels}

    detector.backbone.forward = MethodType(some, detector.backbone)
    return detector


def tiny_ssd(
    num_classes: int = 4,
    *,
    widths: Sequence[int] = (16, 24, 8),
    lite: bool = False,
    seed: int = 0,
    side: int = SIDE,
    hidden: int = 8,
    batch_norm: bool = False,
    anchors: DefaultBoxGenerator | None = None,
    kind: type[SSD] = SSD,
    **options: Any,
) -> SSD:
    """An SSD of 6 anchors at each location on the second level and 4 on the others.

    Args:
        num_classes: classes, of which 0 is the background.
        widths: channels of the feature maps, of strides 8, 16, 32, 64 and so on.
        lite: with SSDlite's head.
        seed: of the weights.
        side: images are resized to this many pixels.
        hidden: channels of the backbone.
        batch_norm: whether the backbone has BatchNorm layers.
        anchors: other anchors than those.
        kind: SSD, or a class derived from it.
        options: further arguments of torchvision's ``SSD``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ratios = [[2, 3] if level == 1 else [2] for level in range(len(widths))]
        generator = DefaultBoxGenerator(ratios, min_ratio=0.25) if anchors is None else anchors
        per_location = generator.num_anchors_per_location()
        head: nn.Module = SSDHead(list(widths), per_location, num_classes)
        if lite:
            head = SSDLiteHead(list(widths), per_location, num_classes, nn.BatchNorm2d)
        for module in head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.uniform_(module.bias, -0.1, 0.1)
        backbone = TinyBackbone(widths, hidden, batch_norm)
        return kind(backbone, generator, (side, side), num_classes, head=head, **options)


def _shorten(head: nn.Module, blocks: int) -> None:
    for branch in (head.classification_head, head.regression_head):
        branch.conv = branch.conv[:blocks]


def tiny_batch(
    batch: int = 2, *, num_classes: int = 4, side: int = SIDE, seed: int = 0, first_label: int = 0
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images of noise with two objects each, in torchvision's form, labelled from ``first_label`` on."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, side, side, generator=generator) for _ in range(batch)]
    targets = []
    for _ in range(batch):
        corner = torch.rand(2, 2, generator=generator) * side / 3
        extent = side / 4 + torch.rand(2, 2, generator=generator) * side / 3
        labels = torch.randint(first_label, num_classes, (2,), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + extent], dim=1), "labels": labels})
    return images, targets
