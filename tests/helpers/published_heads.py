"""What the published heads need to run inside torchvision's detectors: fixed features and exact anchors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator

from crosskd import CrossKD, Distiller
from crosskd.adapters import AdapterSpec


class FixedBackbone(nn.Module):
    """Hands out the feature maps that the published numbers were computed from."""

    def __init__(self, features: list[Tensor]) -> None:
        super().__init__()
        self.out_channels = features[0].shape[1]
        self.features = nn.ParameterList([nn.Parameter(f.clone()) for f in features])

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {str(level): feature for level, feature in enumerate(self.features)}


class FixedFeatures:
    """For torchvision's adapters: where the maps don't depend on the image, they give no strides."""

    def _read_levels(self) -> None:
        self.strides = self.widths = None


class ExactAnchors(AnchorGenerator):
    """Anchors of exact size at exact strides: torchvision rounds the sizes and divides the image.

    Args:
        strides: pixels between locations, one per level.
        sizes: anchor sizes per level.
        ratios: height over width.
        offset: where the first location stands, in strides.
    """

    def __init__(self, strides: list[int], sizes: Any, ratios: tuple[float, ...], offset: float) -> None:
        super().__init__(sizes, (ratios,) * len(strides))
        self.strides, self.offset = strides, offset

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device="cpu"):
        scales = torch.as_tensor(scales, dtype=dtype, device=device)
        ratios = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        widths, heights = (1 / ratios[:, None] * scales).view(-1), (ratios[:, None] * scales).view(-1)
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def grid_anchors(self, grid_sizes, strides):
        exact = [[torch.tensor(stride), torch.tensor(stride)] for stride in self.strides]
        levels = super().grid_anchors(grid_sizes, exact)
        # Always float32, as published: which anchors overlap an object by just a half depends on it.
        return [(a + self.offset * stride).float() for a, stride in zip(levels, self.strides, strict=True)]


class Watched(CrossKD):
    """CrossKD that remembers what it was given."""

    def forward(self, step):
        self.step = step
        return super().forward(step)


def distil(
    case: dict[str, Any],
    build: Any,
    adapter: AdapterSpec,
    dtype: torch.dtype = torch.float32,
    *,
    prove: bool = True,
) -> tuple[Distiller, dict[str, Tensor], Watched]:
    """One step on a published case: the distiller, its losses, and the method with the step it saw."""
    method = Watched(position=case["position"])
    distiller = Distiller(build(case, "teacher"), build(case, "student"), method, adapter, prove=prove).to(
        dtype
    )
    images = [torch.rand(3, *case["image_size"], dtype=dtype) for _ in case["targets"]]
    losses = distiller(images, [dict(target) for target in case["targets"]])
    return distiller, losses, distiller.methods["crosskd"]


def rows(levels: list[Tensor], last: int) -> Tensor:
    """Maps (batch, anchors * last, height, width) as rows (batch, all anchors, last)."""
    return torch.cat([x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, last) for x in levels], dim=1)


def gradient_errors(distiller: Distiller, losses: dict[str, Tensor], case: dict[str, Any]) -> list[float]:
    """How far the distillation's gradient at the student's features is from the published one.

    Over a few locations, normalising leaves gradients that are nearly cancelled. In float32 they depend on
    the processor; of a step in float64 the errors are those of the published gradient, the same anywhere.

    Returns:
        One number per level: the largest difference, over the largest published gradient.
    """
    (losses["kd_cls"] + losses["kd_reg"]).backward()
    expected = case["expected"]["kd_grad_student_features"]
    return [
        float((feature.grad - gradient).abs().max() / gradient.abs().max())
        for feature, gradient in zip(distiller.student.backbone.features, expected, strict=True)
    ]
