"""GFL and ATSS weights under mmdet's names, without mmdet."""

from __future__ import annotations

from backbones import build_backbone
from dense_heads import ATSS, GFL
from dense_heads.mmdet_weights import mmdet_name
from torch import Tensor

CLASSES = 5


def mmdet_state(family: str, name: str = "resnet18", classes: int = CLASSES) -> dict[str, Tensor]:
    """The state dict of a small detector on random weights.

    Args:
        family: ``"gfl"`` or ``"atss"``.
        name: of the backbone.
        classes: how many it knows.
    """
    backbone = build_backbone(name, False, 64, "mmdet", fixed_norm=True)
    detector = {"gfl": GFL, "atss": ATSS}[family](backbone, classes)
    return {mmdet_name(key, family): value for key, value in detector.state_dict().items()}
