"""NanoDet-g, a detector of COCO's 80 classes with 3.8 million weights, and its adapter made by ``generic``.

Its head is a GFL's with another build: one tower per level, shared by classes and boxes, and behind it one
predictor of both. So it stands for detectors of one's own whose branches aren't apart. `load_nanodet` reads
the file of weights that it is given, in which batch norm is folded into the convolutions::

    from crosskd import CrossKD, Distiller
    from nanodet import NANODET, NanoDet, load_nanodet

    teacher = load_nanodet("nanodet_g_fp16.pt", min_size=256)
    student = NanoDet(backbone, num_classes=1, group_norm=True, min_size=256)
    distiller = Distiller(teacher, student, CrossKD(position=1), NANODET, class_map=[0])  # persons alone

A student may also be any detector that the library knows, for methods of feature maps and mimicking; CrossKD
needs a head with the teacher's branch. Network: RangiLyu's NanoDet (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from dense_heads import GFL, DenseDetector
from dense_heads.detector import Grid, Outputs, Target
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from weights import misfit

from crosskd.adapters import Batch, PixelCoding, generic
from crosskd.predictions import Assignment, Predictions

STRIDES = (8, 16, 32)
COCO_CLASSES = 80
WIDTH = 128  # channels of the pyramid and the towers
REG_MAX = 10  # the longest distance from a location to a side of its box, in strides
ANCHOR_SCALE = 5.0  # of the squares by which objects are assigned
SLOPE = 0.1  # of LeakyReLU below 0


class Stage(nn.Module):
    """A convolution, two or more that are joined with their inputs, one more, joined with the first.

    Args:
        width_in: channels that it takes.
        width: of each convolution; twice as many go out.
        blocks: of two convolutions of half the width each.
        stride: of the first convolution.
    """

    def __init__(self, width_in: int, width: int, blocks: int, stride: int) -> None:
        super().__init__()
        self.first = block(width_in, width, stride=stride)
        half = width // 2
        pairs = (nn.ModuleList([block(width, half), block(half, half)]) for _ in range(blocks))
        self.blocks = nn.ModuleList(pairs)
        self.last = block(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """Shape (batch, width_in, height, width) to (batch, 2 width, height / stride, width / stride)."""
        first = features = self.first(features)
        for narrow, second in self.blocks:
            features = narrow(features)
            features = torch.cat([second(features), features], dim=1)
        return torch.cat([self.last(features), first], dim=1)


class NanoBackbone(nn.Module):
    """Four stages, and a pyramid of the last three that adds its levels downwards, then upwards."""

    out_channels = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 32, stride=2)
        shapes = [(32, 32, 1, 1), (64, 64, 2, 2), (128, 128, 2, 2), (256, 256, 3, 2)]
        self.stages = nn.ModuleList(Stage(*shape) for shape in shapes)
        self.laterals = nn.ModuleList(nn.Conv2d(width, WIDTH, 1) for width in (128, 256, 512))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Maps of the strides 8, 16 and 32, by level, of RGB pixels; the weights are for BGR."""
        features = F.max_pool2d(self.stem(pixels.flip(1)), 3, stride=2, padding=1)
        features = self.stages[0](features)
        levels = []
        for stage, lateral in zip(self.stages[1:], self.laterals, strict=True):
            features = stage(features)
            levels.append(lateral(features))
        for level in (1, 0):
            levels[level] = levels[level] + resized(levels[level + 1], levels[level])
        for level in (1, 2):
            levels[level] = levels[level] + resized(levels[level - 1], levels[level])
        return {str(level): features for level, features in enumerate(levels)}


class NanoHead(nn.Module):
    """One tower and one predictor per level.

    Args:
        width: channels of the maps and towers.
        num_classes: how many classes there are.
        bins: of the distribution that each side is predicted as.
        group_norm: in the towers, for training from the start.
    """

    def __init__(self, width: int, num_classes: int, bins: int, group_norm: bool) -> None:
        super().__init__()
        self.num_classes, self.bins = num_classes, bins
        self.towers = nn.ModuleList(block(width, width, group_norm=group_norm) for _ in STRIDES)
        self.predictors = nn.ModuleList(nn.Conv2d(width, num_classes + 4 * bins, 1) for _ in STRIDES)
        for predictor in self.predictors:
            nn.init.normal_(predictor.weight, std=0.01)
            nn.init.zeros_(predictor.bias)
            # All is background at first.
            nn.init.constant_(predictor.bias[:num_classes], torch.tensor(0.01).logit().item())

    def forward(self, features: Sequence[Tensor]) -> Outputs:
        """Predictions for feature maps (batch, width, height, width), finest first."""
        levels = [self.predict(level, self.towers[level](f)) for level, f in enumerate(features)]
        return Outputs(*(torch.cat(parts, dim=1) for parts in zip(*(o[:2] for o in levels), strict=True)))

    def predict(self, level: int, tower: Tensor) -> Outputs:
        """Runs the predictor on a level's tower output (batch, width, height, width)."""
        rows = self.predictors[level](tower).flatten(2).mT
        logits, sides = rows.split([self.num_classes, 4 * self.bins], dim=-1)
        return Outputs(logits, sides.unflatten(-1, (4, self.bins)))


class NanoDet(GFL):
    """A GFL with NanoDet's head, on any backbone with maps of the strides 8, 16 and 32.

    It is trained by GFL's losses, with ATSS for NanoDet's own assignment of that time. Padding of a batch
    counts as background.

    Args:
        backbone: gives a dict of three feature maps, finest first; ``out_channels`` wide.
        num_classes: how many classes there are, labelled from 0.
        group_norm: in the towers, for training from the start. The file of weights has none.
        options: of `DenseDetector`, for example ``min_size``.

    Example:
        >>> detector = NanoDet(NanoBackbone(), num_classes=3, min_size=64).eval()
        >>> (found,) = detector([torch.rand(3, 64, 96)])
        >>> sorted(found)
        ['boxes', 'labels', 'scores']
    """

    def __init__(self, backbone: Any, num_classes: int, *, group_norm: bool = False, **options: Any) -> None:
        head = NanoHead(backbone.out_channels, num_classes, REG_MAX + 1, group_norm)
        options = {"anchor_scale": ANCHOR_SCALE, "center_offset": 0.5, **options}
        DenseDetector.__init__(self, backbone, head, strides=STRIDES, **options)
        self.reg_max = REG_MAX

    @property
    def num_classes(self) -> int:
        """How many classes there are, labelled from 0."""
        return int(self.head.num_classes)

    def grid(self, batch: ImageList, features: Sequence[Tensor]) -> Grid:
        """The anchors of a batch, those in the padding as well."""
        grid = super().grid(batch, features)
        return replace(grid, inside=torch.ones_like(grid.inside))


def load_nanodet(path: str | Path, **options: Any) -> NanoDet:
    """NanoDet-g with its COCO weights, in eval mode; label 0 is a person.

    Args:
        path: the file, a dict of weights, of half precision or another.
        options: of `DenseDetector`, for example ``min_size``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights of another network, naming keys or shapes.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no weights of NanoDet-g at {path}")
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    state = {}
    for name, value in loaded.items():
        part = "head" if name.startswith(("towers.", "predictors.")) else "backbone"
        state[f"{part}.{name}"] = value.float()
    detector = NanoDet(NanoBackbone(), COCO_CLASSES, **options)
    difference = misfit(detector.state_dict(), state)
    if difference:
        raise ValueError(f"{path} holds no NanoDet-g of {COCO_CLASSES} classes: {difference}")
    detector.load_state_dict(state)
    return detector.eval()


def block(
    width_in: int, width: int, *, size: int = 3, stride: int = 1, group_norm: bool = False
) -> nn.Sequential:
    """Convolution, group norm if wanted, and LeakyReLU."""
    layers: list[nn.Module] = [nn.Conv2d(width_in, width, size, stride, size // 2)]
    if group_norm:
        layers.append(nn.GroupNorm(32, width))
    return nn.Sequential(*layers, nn.LeakyReLU(SLOPE))


def resized(features: Tensor, like: Tensor) -> Tensor:
    """A map (batch, channels, height, width) at the height and width of another."""
    return F.interpolate(features, size=like.shape[-2:], mode="bilinear", align_corners=False)


# -- what crosskd is told -----------------------------------------------------------------------


def _classes(detector: NanoDet) -> int:
    return detector.num_classes


def _features(detector: NanoDet, pixels: Tensor) -> list[Tensor]:
    return list(detector.backbone(pixels).values())


def _prepare(detector: NanoDet, images: list[Tensor], targets: list[Target] | None) -> Batch:
    pixels, resized_targets = detector.transform(images, targets)
    return Batch(pixels.tensors, tuple(pixels.image_sizes), targets=resized_targets)


def _anchors(detector: NanoDet, batch: Batch, maps: Sequence[Tensor]) -> list[Tensor]:
    grid = detector.grid(ImageList(batch.pixels, list(batch.image_sizes)), maps)
    return list(grid.anchors.split(grid.level_sizes))


def _predict(detector: NanoDet, level: int, towers: Mapping[str, Tensor]) -> Predictions:
    outputs = detector.head.predict(level, towers["both"])
    return Predictions(outputs.logits, outputs.regression, None)


def _decode(detector: NanoDet, regression: Tensor, anchors: list[Tensor]) -> Tensor:
    return detector.decode(regression.float(), _grid(detector, anchors, len(regression)))


def _losses(
    detector: NanoDet, predictions: Predictions, anchors: list[Tensor], targets: list[Target]
) -> tuple[dict[str, Tensor], Assignment]:
    grid = _grid(detector, anchors, len(targets))
    matches = detector.match(grid, targets)
    outputs = Outputs(predictions.logits, predictions.regression)
    return detector.losses(outputs, grid, matches, targets), _assignment(detector, matches)


def _assign(
    detector: NanoDet, predictions: Predictions, anchors: list[Tensor], targets: list[Target]
) -> Assignment:
    return _assignment(detector, detector.match(_grid(detector, anchors, len(targets)), targets))


def _assignment(detector: NanoDet, matches: Tensor) -> Assignment:
    return Assignment(None, matches >= 0, detector.normalizer(matches))


def _grid(detector: NanoDet, anchors: list[Tensor], batch: int) -> Grid:
    """The detector's own form of a batch's anchors, which are given level by level."""
    boxes, sizes = torch.cat(anchors), [len(level) for level in anchors]
    strides = [boxes.new_full((size,), stride) for stride, size in zip(detector.strides, sizes, strict=True)]
    inside = torch.ones(batch, len(boxes), dtype=torch.bool, device=boxes.device)
    return Grid(boxes, torch.cat(strides), sizes, inside)


NANODET = generic(
    features=_features,
    towers={"both": "head.towers.*"},
    predictors={"both": {"both": "head.predictors.*"}},
    predict=_predict,
    num_classes=_classes,
    bins=REG_MAX + 1,
    strides=STRIDES,
    prepare=_prepare,
    anchors=_anchors,
    decode=_decode,
    losses=_losses,
    assign=_assign,
    pixel_coding=PixelCoding((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    head_type="GFL",
)
