"""Detectors by name, on the backbones that torchvision has, with the same five levels in each family."""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from backbones import BACKBONES, STRIDES, TWO_STAGE_STRIDES, build_backbone
from dense_heads import ATSS, GFL, load_mmdet_checkpoint
from torch import Tensor, nn
from torchvision.models.detection import (
    FCOS,
    FasterRCNN,
    FasterRCNN_ResNet50_FPN_Weights,
    FCOS_ResNet50_FPN_Weights,
    RetinaNet,
    RetinaNet_ResNet50_FPN_Weights,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetHead
from weights import downloading, misfit, read_weights

DENSE_HEADS = {"gfl": GFL, "atss": ATSS}
FAMILIES = ("retinanet", "fcos", "fasterrcnn", *DENSE_HEADS)
MODEL_NAMES = tuple(f"{family}_{backbone}" for family in FAMILIES for backbone in BACKBONES)
# Names of torchvision's builders, and their weights, by the names used here.
PUBLISHED = {
    "retinanet_resnet50": ("retinanet_resnet50_fpn", RetinaNet_ResNet50_FPN_Weights.COCO_V1),
    "fcos_resnet50": ("fcos_resnet50_fpn", FCOS_ResNet50_FPN_Weights.COCO_V1),
    "fasterrcnn_resnet50": ("fasterrcnn_resnet50_fpn", FasterRCNN_ResNet50_FPN_Weights.COCO_V1),
}


class ExactAnchors(AnchorGenerator):
    """Anchors in float32 at least; torchvision's own have the feature maps' type, bfloat16 under autocast."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """Casts the anchors around a location, which those of a batch get their type from."""
        super().set_cell_anchors(torch.promote_types(dtype, torch.float32), device)


def build_detector(
    name: str,
    num_classes: int,
    *,
    pretrained_backbone: bool = False,
    fixed_norm: bool | None = None,
    width: int = 256,
    head_norm: str = "none",
    anchor_scale: float = 1.0,
    regions: int = 512,
    short_side: list[int] | None = None,
    long_side: int = 1333,
) -> nn.Module:
    """Builds a detector of torchvision's own classes, or one of ``dense_heads``.

    Args:
        name: one of ``MODEL_NAMES``.
        num_classes: how many labels there are, from 0 on; see ``first_label``.
        pretrained_backbone: ImageNet weights in the backbone.
        fixed_norm: fixed batch statistics and a frozen first stage, as with these weights; for others.
        width: channels of the pyramid's levels and of the head's towers, a multiple of 32; Faster R-CNN's box
            head is four times as wide.
        head_norm: ``"group"`` for group norm in RetinaNet's towers, as torchvision's v2 has; those of FCOS,
            GFL and ATSS always have it.
        anchor_scale: multiplies the anchors' sizes (FCOS: the size ranges); small images have small objects.
        regions: how many of an image's regions train Faster R-CNN's box head.
        short_side: images are resized to this; several for scale jitter, the last for evaluation.
        long_side: but their longer side is at most this.
    """
    if name not in MODEL_NAMES:
        raise ValueError(f"unknown model {name!r}: choose from {', '.join(MODEL_NAMES)}")
    family, _, backbone_name = name.partition("_")
    style = "mmdet" if family in DENSE_HEADS else "two_stage" if family == "fasterrcnn" else "torchvision"
    backbone = build_backbone(backbone_name, pretrained_backbone, width, style, fixed_norm=fixed_norm)
    sizes = {"min_size": tuple(short_side or [800]), "max_size": long_side}
    if family in DENSE_HEADS:
        return DENSE_HEADS[family](backbone, num_classes, anchor_scale=8 * anchor_scale, **sizes)
    if family == "fasterrcnn":
        bases = tuple((int(8 * stride * anchor_scale),) for stride in TWO_STAGE_STRIDES)
        anchors = ExactAnchors(bases, ((0.5, 1.0, 2.0),) * len(bases))
        head = TwoMLPHead(width * 7**2, 4 * width)
        predictor = FastRCNNPredictor(4 * width, num_classes)
        parts = {"rpn_anchor_generator": anchors, "box_head": head, "box_predictor": predictor}
        return FasterRCNN(backbone, None, box_batch_size_per_image=regions, **parts, **sizes)
    if family == "fcos":
        anchors = ExactAnchors(tuple((s * anchor_scale,) for s in STRIDES), ((1.0,),) * len(STRIDES))
        return FCOS(backbone, num_classes, anchor_generator=anchors, **sizes)
    bases = [4 * stride * anchor_scale for stride in STRIDES]
    octaves = tuple(tuple(int(base * 2 ** (third / 3)) for third in range(3)) for base in bases)
    anchors = ExactAnchors(octaves, ((0.5, 1.0, 2.0),) * len(STRIDES))
    norm = partial(nn.GroupNorm, 32) if head_norm == "group" else None
    head = RetinaNetHead(width, anchors.num_anchors_per_location()[0], num_classes, norm_layer=norm)
    return RetinaNet(backbone, num_classes, anchor_generator=anchors, head=head, **sizes)


def first_label(name: str) -> int:
    """The smallest label of an object: torchvision's Faster R-CNN keeps 0 for the background."""
    return 1 if name.startswith("fasterrcnn") else 0


def load_published(name: str, options: argparse.Namespace) -> nn.Module:
    """A detector with torchvision's published COCO weights, which know 91 labels: COCO's own ids."""
    if name not in PUBLISHED:
        raise ValueError(
            f"torchvision publishes no detection weights for {name!r}, only for {', '.join(PUBLISHED)}: "
            "train a teacher, or give the path of a checkpoint"
        )
    if options.anchor_scale != 1.0:
        raise ValueError("published weights were trained with --anchor-scale 1")
    builder, weights = PUBLISHED[name]
    sizes = {"min_size": tuple(options.short_side), "max_size": options.long_side}
    with downloading(weights.url, "give a trained teacher by --teacher-weights PATH"):
        detector: nn.Module = torchvision.models.get_model(builder, weights=weights, **sizes)
    owner = detector.rpn if isinstance(detector, FasterRCNN) else detector
    owner.anchor_generator = ExactAnchors(owner.anchor_generator.sizes, owner.anchor_generator.aspect_ratios)
    return detector


def published_classes(name: str) -> list[str]:
    """The names of the classes of torchvision's published weights, by label."""
    return list(PUBLISHED[name][1].meta["categories"])


def replace_classes(detector: nn.Module, num_classes: int) -> None:
    """Gives a torchvision detector a new layer, which is not trained, that predicts other classes.

    Args:
        detector: a Faster R-CNN, whose boxes are each class's own and begin anew too, a RetinaNet or an FCOS.
        num_classes: how many labels there are, from 0 on.
    """
    if isinstance(detector, FasterRCNN):
        width = detector.roi_heads.box_predictor.cls_score.in_features
        detector.roi_heads.box_predictor = FastRCNNPredictor(width, num_classes)
        return
    head = detector.head.classification_head
    anchors = head.cls_logits.out_channels // head.num_classes
    head.cls_logits = nn.Conv2d(head.cls_logits.in_channels, anchors * num_classes, 3, padding=1)
    nn.init.normal_(head.cls_logits.weight, std=0.01)
    nn.init.constant_(head.cls_logits.bias, -math.log(0.99 / 0.01))  # all scores begin at 0.01
    head.num_classes = num_classes


def load_mmdet(name: str, source: str, options: argparse.Namespace) -> nn.Module:
    """A GFL or ATSS with the weights of an mmdet file, whose labels are numbered from 0.

    Args:
        name: which of ``MODEL_NAMES`` it must be.
        source: a path or an http(s) address.
        options: the script's options.
    """
    sizes = {"min_size": tuple(options.short_side), "max_size": options.long_side}
    with downloading(source, "give a copy of it by --teacher-weights PATH"):
        detector = load_mmdet_checkpoint(source, anchor_scale=8 * options.anchor_scale, **sizes)
    expected = build_detector(name, detector.num_classes).state_dict()
    differing = sorted(expected.keys() ^ detector.state_dict().keys())
    if differing:
        raise ValueError(f"{source} holds a {type(detector).__name__}, but no {name}: {differing[:3]} differ")
    return detector


def is_of_mmdet(name: str, weights: str) -> bool:
    """Whether a model's weights are named as mmdet's are: by an address, or ``.pth``."""
    return name.partition("_")[0] in DENSE_HEADS and (
        weights.startswith(("http://", "https://")) or weights.endswith(".pth")
    )


def load_weights(detector: nn.Module, path: Path) -> None:
    """Loads a plain detector's file, one written by the training script, or a distiller's.

    Raises:
        ValueError: weights that don't fit, naming the keys or shapes that differ.
        FileNotFoundError: no such file.
    """
    state = read_state(path)
    difference = misfit(detector.state_dict(), state)
    if difference:
        raise ValueError(
            f"{path} doesn't fit this model: {difference}. Choose the model, the number of classes, "
            "--width and --head-norm that it was trained with"
        )
    detector.load_state_dict(state)


def read_state(path: Path) -> dict[str, Tensor]:
    """The state of the plain detector in whatever a file holds."""
    loaded: Any = read_weights(path)
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not the weights of a detector by name")
    for key in ("model", "state_dict"):
        if isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    loaded = {key.removeprefix("module."): value for key, value in loaded.items()}
    student = {k.removeprefix("student."): v for k, v in loaded.items() if k.startswith("student.")}
    return student or loaded
