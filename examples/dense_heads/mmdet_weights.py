"""mmdet's published GFL and ATSS weights, by the names that the detectors here have for them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from backbones import build_backbone
from torch import Tensor
from weights import misfit

from crosskd.checkpoints import read_mmdet_checkpoint
from dense_heads.atss import ATSS
from dense_heads.gfl import GFL

# A ResNet's depth, by whether its blocks are bottlenecks and how many the third stage has.
_DEPTHS = {(False, 2): 18, (False, 6): 34, (True, 6): 50, (True, 23): 101}
# What a name starts with here, and in mmdet.
_RENAMED = (
    (r"backbone\.body\.", "backbone."),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
    (r"backbone\.fpn\.extra_blocks\.p6\.", "neck.fpn_convs.3.conv."),
    (r"backbone\.fpn\.extra_blocks\.p7\.", "neck.fpn_convs.4.conv."),
    (r"head\.classification_tower\.(\d+)\.0\.", r"bbox_head.cls_convs.\1.conv."),
    (r"head\.classification_tower\.(\d+)\.1\.", r"bbox_head.cls_convs.\1.gn."),
    (r"head\.regression_tower\.(\d+)\.0\.", r"bbox_head.reg_convs.\1.conv."),
    (r"head\.regression_tower\.(\d+)\.1\.", r"bbox_head.reg_convs.\1.gn."),
    (r"head\.scales\.(\d)$", r"bbox_head.scales.\1.scale"),
    (r"head\.logits\.", "bbox_head.FAMILY_cls."),
    (r"head\.regression\.", "bbox_head.FAMILY_reg."),
    (r"head\.centerness\.", "bbox_head.FAMILY_centerness."),
)
# The numbers of the bins, which mmdet keeps with its weights.
_BINS = "bbox_head.integral.project"


def load_mmdet_checkpoint(source: str | Path, **options: Any) -> GFL | ATSS:
    """A detector with the weights of an mmdet checkpoint.

    Family, backbone, classes and width are read from the weights. Batch norm keeps its statistics and
    the first stage is frozen, as in mmdet's own training.

    Args:
        source: a path, or an http(s) address to download from.
        options: of the detector, for example ``min_size``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that doesn't hold such a detector, naming keys or shapes.
    """
    weights = read_mmdet_checkpoint(source)
    detector, family = _new_detector(weights, source, options)
    names = {own: mmdet_name(own, family) for own in detector.state_dict()}
    own = {names[key]: value for key, value in detector.state_dict().items()}
    difference = misfit(own, {key: value for key, value in weights.items() if key != _BINS})
    if difference:
        raise ValueError(
            f"{source} doesn't fit a detector of this package: {difference}. It takes GFL and ATSS with an "
            "ordinary ResNet, a pyramid of five levels on its last three stages, and group norm in towers"
        )
    detector.load_state_dict({own: weights[name] for own, name in names.items()})
    return detector


def _new_detector(
    weights: dict[str, Tensor], source: str | Path, options: dict[str, Any]
) -> tuple[GFL | ATSS, str]:
    """A detector of the shape that the weights are of, and the family's name in their keys."""
    family = next((f for f in ("gfl", "atss") if f"bbox_head.{f}_cls.weight" in weights), None)
    if family is None:
        predictors = sorted(key for key in weights if re.fullmatch(r"\w+_head\.\w+\.weight", key))
        raise ValueError(
            f"{source} holds no GFL or ATSS detector: expected bbox_head.gfl_cls.weight or "
            f"bbox_head.atss_cls.weight, got {predictors or sorted(weights)[:3]}"
        )
    name = f"resnet{_depth(weights, source)}"
    width = _shape(weights, "neck.lateral_convs.0.conv.weight", source)[0]
    classes = _shape(weights, f"bbox_head.{family}_cls.weight", source)[0]
    sides = _shape(weights, f"bbox_head.{family}_reg.weight", source)[0]
    blocks = len([key for key in weights if re.fullmatch(r"bbox_head\.cls_convs\.\d+\.conv\.weight", key)])
    backbone = build_backbone(name, False, width, "mmdet", fixed_norm=True)
    if family == "gfl":
        return GFL(backbone, classes, reg_max=sides // 4 - 1, blocks=blocks, **options), family
    return ATSS(backbone, classes, blocks=blocks, **options), family


def _depth(weights: dict[str, Tensor], source: str | Path) -> int:
    third = {match[1] for key in weights if (match := re.match(r"backbone\.layer3\.(\d+)\.", key))}
    found = ("backbone.layer1.0.conv3.weight" in weights, len(third))
    if found not in _DEPTHS:
        kind = "bottlenecks" if found[0] else "basic blocks"
        raise ValueError(
            f"{source} has a backbone of {found[1]} {kind} in backbone.layer3, which is no ResNet of "
            f"{', '.join(map(str, _DEPTHS.values()))} layers"
        )
    return _DEPTHS[found]


def _shape(weights: dict[str, Tensor], key: str, source: str | Path) -> torch.Size:
    if key not in weights:
        raise ValueError(f"{source} holds no {key}: expected a ResNet with a feature pyramid, as published")
    return weights[key].shape


def mmdet_name(own: str, family: str) -> str:
    """What mmdet calls a weight of a detector here.

    Args:
        own: its name here.
        family: ``"gfl"`` or ``"atss"``.
    """
    for pattern, name in _RENAMED:
        renamed, found = re.subn(f"^{pattern}", name.replace("FAMILY", family), own)
        if found:
            return renamed
    raise AssertionError(f"no name for {own}")
