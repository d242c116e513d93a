"""Backbones with a feature pyramid of five levels, as torchvision's detectors have them and as mmdet's do."""

from __future__ import annotations

from typing import Literal

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d
from weights import downloading

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v3_large")
STRIDES = (8, 16, 32, 64, 128)
TWO_STAGE_STRIDES = (4, 8, 16, 32, 64)


class FixedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm by its running statistics, in training too; its weight and bias can be trained."""

    def forward(self, features: Tensor) -> Tensor:
        """Shape (batch, channels, height, width), in and out."""
        return F.batch_norm(
            features, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class PlainP6P7(ExtraFPNBlock):
    """P6 and P7 by strided convolutions, without the ReLU that torchvision has before P7."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, width, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """Adds the two levels behind the pyramid's own."""
        p6 = self.p6(results[-1])
        return [*results, p6, self.p7(p6)], [*names, "p6", "p7"]


def build_backbone(
    name: str,
    pretrained: bool,
    width: int,
    style: Literal["torchvision", "mmdet", "two_stage"] = "torchvision",
    *,
    fixed_norm: bool | None = None,
) -> BackboneWithFPN:
    """A backbone with a feature pyramid of levels P3 to P7, strides 8 to 128, or P2 to P6.

    Args:
        name: one of ``BACKBONES``.
        pretrained: start from ImageNet weights, with fixed batch statistics and the first stage of a
            ResNet frozen; from random numbers otherwise, with batch norm that trains.
        width: channels of each level.
        style: ``"torchvision"`` fixes the weights of pretrained batch norm too and has a ReLU before P7;
            ``"mmdet"`` trains them and has none. ``"two_stage"`` is torchvision's for Faster R-CNN: strides
            4 to 64, the last level a pooled one.
        fixed_norm: fixed batch statistics and a frozen first stage, whatever ``pretrained`` says: for
            weights that are loaded afterwards.
    """
    fixed = pretrained if fixed_norm is None else fixed_norm
    fixed_type = FixedBatchNorm2d if style == "mmdet" else FrozenBatchNorm2d
    norm = fixed_type if fixed else nn.BatchNorm2d
    tops = {"torchvision": LastLevelP6P7, "mmdet": PlainP6P7}
    pyramid_top = LastLevelMaxPool() if style == "two_stage" else tops[style](width, width)
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    with downloading(weights.url, "start from random numbers, without --pretrained-backbone"):
        layers = torchvision.models.get_model(name, weights=weights if pretrained else None, norm_layer=norm)
    if name == "mobilenet_v3_large":
        layers = layers.features
        # The last layers at strides 4, 8, 16 and 32, and their channels.
        stages = [("3", 24), ("6", 40), ("12", 112), ("16", 960)]
    else:
        if fixed:
            for part in (layers.conv1, layers.bn1, layers.layer1):
                part.requires_grad_(False)
        stages = [(f"layer{n}", layers.inplanes // 2 ** (4 - n)) for n in range(1, 5)]
    if style != "two_stage":
        del stages[0]
    levels = {layer: str(level) for level, (layer, _) in enumerate(stages)}
    return BackboneWithFPN(layers, levels, [w for _, w in stages], width, extra_blocks=pyramid_top)
