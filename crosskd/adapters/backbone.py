"""An adapter of a teacher without a head: a backbone, a feature pyramid, a vision transformer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosskd._unchanged import unchanged
from crosskd.adapters.base import Adapter, Batch, OwnOutput, PixelCoding, recoded
from crosskd.adapters.generic import sizes_of, stacked_images
from crosskd.frozen import frozen_copy
from crosskd.towers import Tapped

__all__ = ["BackboneAdapter", "backbone"]

_IMAGENET = PixelCoding((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_RGB = PixelCoding((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
_PROBE_PIXELS = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class backbone:  # noqa: N801  # called as a function is, like functools.partial
    """Makes an adapter of a module that gives feature maps, as the teacher of `crosskd.PKD` and its like.

    What it returns is handed to the `crosskd.Distiller` as ``teacher_adapter=``. The module gives maps
    (batch, channels, height, width), finest first, as one tensor, a list or a dict, as torchvision's feature
    pyramids and ``create_feature_extractor`` do, and timm's models with ``features_only=True``. Of a
    classification model ``layers`` names those whose outputs are taken. Tokens (batch, tokens, channels) of a
    vision transformer are folded to a map.

    Args:
        layers: paths of the layers to take, ``("layer2", "layer3")``; what the module itself returns without
            them.
        image_size: (height, width) in pixels, or both in one number, of the image by which strides and
            widths are measured; a multiple of every stride. Unless given, the size that timm knows
            for a model of fixed size, else 256.
        resize_input: resize the images to ``image_size``, for a model that takes no other size. The strides
            are those at that size.
        prefix_tokens: how many tokens stand in front of the patches': class token, registers. Unless given,
            what a timm model says, else none.
        channels_last: the maps are (batch, height, width, channels), as those of Swin transformers.
        pixel_coding: unless given, timm's for the model, else ImageNet's mean and deviation.

    Example:
        >>> from torchvision.models import resnet18
        >>> adapter = backbone(layers=("layer2", "layer3"))(resnet18())
        >>> adapter.strides, adapter.widths
        ((8.0, 16.0), (128, 256))
    """

    layers: Sequence[str] = ()
    image_size: int | tuple[int, int] | None = None
    resize_input: bool = False
    prefix_tokens: int | None = None
    channels_last: bool = False
    pixel_coding: PixelCoding | None = None

    def __call__(self, model: nn.Module) -> BackboneAdapter:
        """The adapter of a model."""
        return BackboneAdapter(model, self)


class BackboneAdapter(Adapter):
    """A module that gives feature maps.

    Attributes:
        image_size: (height, width) of the image that the levels were read off.

    Raises:
        ValueError: layers that aren't there, outputs that are no maps.
    """

    strides: tuple[float, ...]
    pixel_coding: PixelCoding

    def __init__(self, model: nn.Module, spec: backbone) -> None:
        self.detector, self.spec = model, spec
        # timm's models tell their images' size and coding.
        known: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        coding = PixelCoding(tuple(known["mean"]), tuple(known["std"])) if "mean" in known else _IMAGENET
        self.pixel_coding = spec.pixel_coding or coding
        fixed = tuple(known["input_size"][1:]) if known.get("fixed_input_size") else _PROBE_PIXELS
        size = spec.image_size or fixed
        self.image_size = (size, size) if isinstance(size, int) else size
        prefix = spec.prefix_tokens
        self.prefix_tokens = int(getattr(model, "num_prefix_tokens", 0)) if prefix is None else prefix
        self._read_levels()

    def _read_levels(self) -> None:
        """Reads strides and widths off what the model makes of an image."""
        name = type(self.detector).__name__
        parameter = next(self.detector.parameters(), torch.empty(0))
        pixels = parameter.new_zeros(1, len(self.pixel_coding.mean), *self.image_size)
        try:
            with torch.no_grad(), unchanged(self.detector):  # the copy shares its buffers
                outputs = self._outputs(frozen_copy(self.detector), pixels)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"{name} failed on an image of {self.image_size} pixels, (height, width): {error}. Pass "
                "backbone() the image_size= that it takes, with resize_input=True if it takes no other"
            ) from error
        height, width = self.image_size
        strides, widths = [], []
        for output in outputs:
            places, channels = self._places(output)
            stride = math.sqrt(height * width / places[0]) if len(places) == 1 else width / places[1]
            if not stride.is_integer() or (len(places) == 2 and height / places[0] != stride):
                raise ValueError(
                    f"{name} makes {tuple(output.shape)} of an image of {self.image_size} pixels, (height, "
                    "width), which is no map of square cells. Pass backbone() layers= that give (batch, "
                    "channels, height, width), channels_last=True, or prefix_tokens=, how many tokens are no "
                    "patch"
                )
            strides.append(stride)
            widths.append(channels)
        if strides != sorted(strides):
            raise ValueError(f"layers have the strides {strides}: name the finest first")
        self.strides, self.widths = tuple(strides), tuple(widths)

    def _places(self, output: Tensor) -> tuple[tuple[int, ...], int]:
        """The (height, width) of a map, or the number (patches,) of tokens; the channels of either."""
        if output.ndim == 3:
            return (output.shape[1] - self.prefix_tokens,), output.shape[2]
        if output.ndim != 4:
            raise ValueError(
                f"{type(self.detector).__name__} gives {tuple(output.shape)}, no map (batch, channels, "
                "height, width) and no tokens (batch, tokens, channels): name layers= that do"
            )
        shape = output.movedim(-1, 1).shape if self.spec.channels_last else output.shape
        return tuple(shape[2:]), shape[1]

    def _outputs(self, model: nn.Module, pixels: Tensor) -> list[Tensor]:
        """What the named layers give, or the model itself."""
        if self.spec.layers:
            with _tapped(model, self.spec.layers) as tapped:
                model(pixels)
            return [tapped[layer].read() for layer in self.spec.layers]
        outputs = model(pixels)
        if isinstance(outputs, Tensor):
            return [outputs]
        return list(outputs.values() if isinstance(outputs, Mapping) else outputs)

    def prepare(self, images: Any, targets: Any) -> Batch:
        """Normalises images, as of a ``teacher_view``.

        Args:
            images: RGB with values from 0 to 1, a tensor (batch, 3, height, width) or a list of tensors of
                one size.
            targets: are left out.
        """
        pixels = stacked_images(images, "a teacher_view= that gives such")
        batch = Batch(pixels, sizes_of(pixels))
        return Batch(recoded(batch, _RGB, self.pixel_coding), batch.image_sizes)

    # Hooks come and go, which the compiler doesn't follow.
    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def maps(self, pixels: Tensor) -> list[Tensor]:
        """The feature maps, with tokens folded."""
        if self.spec.resize_input and tuple(pixels.shape[-2:]) != self.image_size:
            pixels = F.interpolate(
                pixels, size=self.image_size, mode="bilinear", align_corners=False, antialias=True
            )
        outputs = self._outputs(self.detector, pixels)
        maps = []
        for output, stride in zip(outputs, self.strides, strict=True):
            if output.ndim == 3:
                maps.append(self._folded(output, tuple(pixels.shape[-2:]), stride))
            else:
                maps.append(output.movedim(-1, 1) if self.spec.channels_last else output)
        return maps

    def _folded(self, tokens: Tensor, size: tuple[int, ...], stride: float) -> Tensor:
        """Tokens (batch, tokens, channels) as a map (batch, channels, height, width)."""
        patches = tokens[:, self.prefix_tokens :]
        # Models cut an incomplete patch off, or pad it.
        for rounded in (math.floor, math.ceil):
            rows, columns = (rounded(side / stride) for side in size)
            if rows * columns == patches.shape[1]:
                return patches.mT.reshape(len(patches), -1, rows, columns)
        raise ValueError(
            f"{patches.shape[1]} tokens are no map of an image of {size} pixels, (height, width), in patches "
            f"of {stride:g}: pass backbone() resize_input=True if the model takes images of one size only"
        )

    def own_outputs(self, batch: Batch) -> list[OwnOutput]:
        """There is no head whose predictions could be compared."""
        return []


@contextmanager
def _tapped(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tapped]]:
    """Takes down what some layers give while the body runs."""
    modules = dict(model.named_modules())
    missing = [layer for layer in layers if layer not in modules]
    if missing:
        raise ValueError(
            f"there is no layer {missing[0]!r} in {type(model).__name__}, but "
            f"{[name for name, _ in model.named_children()]}, and what they hold"
        )
    outputs: dict[str, Tapped] = {}

    def keep(path: str, _: nn.Module, __: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise ValueError(f"layer {path} gives a {type(output).__name__}, no tensor: name another")
        outputs[path] = Tapped.at(f"layer {path}", output)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(modules[layer].register_forward_hook(partial(keep, layer)))
        yield outputs
