"""RT-DETR, D-FINE, Deformable DETR, Conditional DETR and DETR as ``transformers`` builds them.

Nothing of ``transformers`` is imported here: a detector is called as its users call it. Its own forward runs
as a whole, once a step, and what it hands from backbone to encoder, decoder and predictors is taken down on
the way. So matching, denoising, auxiliary losses and everything else are the library's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from crosskd._unchanged import unchanged
from crosskd.adapters.base import (
    Adapter,
    Batch,
    DecoderHead,
    DecoderLayer,
    Objects,
    OwnOutput,
    PixelCoding,
    Queries,
)
from crosskd.adapters.decoders import folded, layer_states
from crosskd.adapters.replacing import replaced
from crosskd.predictions import Predictions

__all__ = ["TransformersDetr"]

_KNOWN = ("RTDetr", "RTDetrV2", "DFine", "DeformableDetr", "ConditionalDetr", "Detr")
_PROBE_PIXELS = 256
_IMAGENET = PixelCoding((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_RGB = PixelCoding((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(eq=False)
class _OwnForward:
    """What the detector's own forward leaves of a batch, in the batch's ``extra``.

    Attributes:
        mask: shape (batch, height, width), 0 where an image is padded; ``None`` for images without padding.
        output: what the detector returned; ``None`` before it ran.
        model_output: what its model, in front of the predictors, returned.
        decoder_inputs: what the decoder was called with.
        maps: by ``"backbone"`` and ``"encoder"``, the feature maps.
    """

    mask: Tensor | None = None
    output: Any = None
    model_output: Any = None
    decoder_inputs: dict[str, Any] = field(default_factory=dict)
    maps: dict[str, list[Tensor]] = field(default_factory=dict)


class TransformersDetr(Adapter):
    """A detection transformer of ``transformers``, called as the library calls it.

    `crosskd.Distiller` is then called with the detector's own keywords, ``distiller(pixel_values=…,
    pixel_mask=…, labels=…)``, or with ``distiller(pixel_values, labels)``. Labels are the library's: each
    image's ``class_labels`` (objects,) and ``boxes`` (objects, 4), centre, width and height from 0 to 1.

    Args:
        detector: an ``RTDetrForObjectDetection``, ``RTDetrV2…``, ``DFine…``, ``DeformableDetr…``,
            ``ConditionalDetr…`` or ``Detr…``.
        maps: which feature maps methods compare: ``"encoder"``, the memory that the decoder reads (RT-DETR's
            and D-FINE's fused maps), or ``"backbone"``.
        pixel_coding: how the image processor codes pixels. Unless given, as the published processors do:
            values from 0 to 1 for RT-DETR and D-FINE, else ImageNet's mean and deviation.

    Raises:
        TypeError: another model.
        ValueError: other maps than these.

    Example:
        >>> from functools import partial
        >>> backbone_maps = partial(TransformersDetr, maps="backbone")  # to be passed as adapter=
    """

    strides: tuple[float, ...]

    def __init__(
        self,
        detector: nn.Module,
        maps: Literal["encoder", "backbone"] = "encoder",
        pixel_coding: PixelCoding | None = None,
    ) -> None:
        family = _family(detector)
        if maps not in ("encoder", "backbone"):
            raise ValueError(f'maps must be "encoder" or "backbone", got {maps!r}')
        self.detector: Any = detector
        config: Any = detector.config
        if not config.return_dict:
            raise ValueError(
                f"the {type(detector).__name__} answers with tuples, whose entries have no names: set its "
                "config.return_dict to True"
            )
        self.which = maps
        plain = family in ("RTDetr", "RTDetrV2", "DFine")
        self.pixel_coding = pixel_coding or (_RGB if plain else _IMAGENET)
        run = self._probed()
        self.strides = tuple(self.probe_size / level.shape[-1] for level in run.maps[maps])
        self.widths = tuple(level.shape[1] for level in run.maps[maps])
        self.heads = (_Decoder(detector, family, run),)

    @property
    def probe_size(self) -> int:
        """Height and width of the image that levels and queries are read off."""
        fixed = getattr(self.detector.config, "anchor_image_size", None)
        return int(fixed[0]) if fixed else _PROBE_PIXELS

    def _probed(self) -> _OwnForward:
        """What the detector leaves of an image of zeros."""
        like, size = next(self.detector.parameters()), self.probe_size
        batch = self.prepare(like.new_zeros(1, 3, size, size), None)
        with torch.no_grad(), unchanged(self.detector):
            return _forward(self.detector.eval(), batch)

    def from_keywords(self, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
        """The detector's own keywords: all but the labels are images."""
        return {name: value for name, value in inputs.items() if name != "labels"}, inputs.get("labels")

    def prepare(self, images: Any, targets: Any) -> Batch:
        """Checks pixels and labels, which the library's image processor has made.

        Args:
            images: ``pixel_values`` (batch, 3, height, width), or a mapping that holds them and maybe a
                ``pixel_mask`` (batch, height, width).
            targets: ``labels``, or ``None``.
        """
        pixels, mask = _pixels(images, targets)
        height, width = pixels.shape[-2:]
        sizes = ((int(height), int(width)),) * len(pixels)
        if mask is not None:
            rows, columns = mask.bool().any(dim=2).sum(dim=1), mask.bool().any(dim=1).sum(dim=1)
            sizes = tuple(zip(rows.tolist(), columns.tolist(), strict=True))
        objects = None
        if targets is not None:
            _check_labels(targets, len(pixels), self.detector.config.num_labels)
            scale = pixels.new_tensor([width, height, width, height])
            objects = tuple(
                Objects(box_convert(of_image["boxes"], "cxcywh", "xyxy") * scale, of_image["class_labels"])
                for of_image in targets
            )
        return Batch(pixels, sizes, objects, targets, _OwnForward(mask))

    def take(self, batch: Batch) -> Batch:
        """Another detector's batch with a mask of its padding."""
        mask = None
        if any(size != batch.size for size in batch.image_sizes):
            mask = torch.zeros(len(batch.pixels), *batch.size, dtype=torch.long, device=batch.pixels.device)
            for of_image, (height, width) in zip(mask, batch.image_sizes, strict=True):
                of_image[:height, :width] = 1
        return Batch(batch.pixels, batch.image_sizes, extra=_OwnForward(mask))

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """The feature maps of images without padding and labels."""
        maps: list[Tensor] = self.maps_of(self.prepare(pixels, None))
        return maps

    # Hooks come and go, which the compiler doesn't follow.
    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def maps_of(self, batch: Batch) -> list[Tensor]:
        """Runs the detector's own forward, and gives the feature maps that it made on the way."""
        return _forward(self.detector, batch).maps[self.which]

    def detect(self, images: Any, targets: Any) -> Any:
        """The detector's own output; with labels it holds its loss."""
        return self.detector(**_called_with(images), labels=targets)

    def own_losses(self, images: Any, targets: Any) -> Tensor:
        """Its loss, the sum of all."""
        loss: Tensor = self.detector(**_called_with(images), labels=targets).loss
        return loss

    def own_outputs(self, batch: Batch) -> list[OwnOutput]:
        """The last layer's predictions."""
        output = self.detector(pixel_values=batch.pixels, pixel_mask=batch.extra.mask)
        background = self.heads[0].background
        return [OwnOutput(Predictions(output.logits, output.pred_boxes, None, background))]


class _Decoder(DecoderHead):
    """The decoder of a detection transformer, with its predictors.

    Args:
        detector: the detector.
        family: its type's name.
        run: what its own forward has left of an image.
    """

    def __init__(self, detector: Any, family: str, run: _OwnForward) -> None:
        self.detector, self.head_type = detector, family
        inputs, config = run.decoder_inputs, detector.config
        # RT-DETR's kin make position embeddings of boxes, which they hand on before the sigmoid, and their
        # attention mask is that of denoising queries; the others' is that of padding.
        self.from_boxes = "object_queries_position_embeddings" not in inputs
        boxes = inputs.get("reference_points")
        parts = [] if boxes is None else ["boxes" if boxes.shape[-1] == 4 else "points"]
        self.kind = " and ".join(parts + ["position embeddings"] * (not self.from_boxes))
        self.num_queries, self.width = inputs["inputs_embeds"].shape[1:]
        self.num_classes = run.output.logits.shape[-1]
        self.background = self.num_classes - 1 if self.num_classes > config.num_labels else None
        names = [str(config.id2label[column]) for column in range(config.num_labels)]
        if names != [f"LABEL_{column}" for column in range(config.num_labels)]:  # which nobody has given
            self.class_names = (*names, *["no object"] * (self.background is not None))
        layers = len(detector.model.decoder.layers)
        self.num_layers = layers if getattr(config, "auxiliary_loss", True) or self.from_boxes else 1

    def own_predictions(self, batch: Batch) -> Predictions:
        """The last layer's; denoising queries stand in front of the others."""
        output, count = batch.extra.output, self.num_queries
        return Predictions(output.logits[:, -count:], output.pred_boxes[:, -count:], None, self.background)

    def own_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The library's losses, times its weights where it hands them on without."""
        losses: dict[str, Tensor] = batch.extra.output.loss_dict
        if self.from_boxes:
            return dict(losses)
        config = self.detector.config
        bbox, giou = config.bbox_loss_coefficient, config.giou_loss_coefficient
        weights = {"loss_ce": 1, "loss_bbox": bbox, "loss_giou": giou}
        weighted = {}
        for name, loss in losses.items():  # loss_ce, loss_ce_0…; the others are no losses
            weight = next((weights[key] for key in weights if name.startswith(key)), None)
            if weight is not None:
                weighted[name] = loss * weight
        return weighted

    def own_queries(self, batch: Batch) -> Queries:
        """Without denoising queries, which stand in front of the others."""
        inputs, count = batch.extra.decoder_inputs, self.num_queries
        content = inputs["inputs_embeds"][:, -count:].detach()
        if self.from_boxes:
            return Queries(content, boxes=inputs["reference_points"][:, -count:].detach().sigmoid())
        boxes = inputs.get("reference_points")
        position = inputs["object_queries_position_embeddings"].detach()
        return Queries(content, position, None if boxes is None else boxes.detach())

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def run(
        self, batch: Batch, queries: Queries, states: Mapping[int, Tensor] | None = None
    ) -> list[DecoderLayer]:
        """Runs the decoder, and the library's own lines from there to the predictions."""
        decoder, own = self.detector.model.decoder, batch.extra
        with ExitStack() as stack:
            if hasattr(decoder, "eval_idx"):  # D-FINE predicts at its last layer alone in eval mode
                stack.enter_context(replaced(decoder, training=True))
            given = stack.enter_context(layer_states(decoder.layers, self.num_layers, states or {}))
            decoded = decoder(**self._decoder_inputs(own, queries))
        predicted = self._predicted(batch, decoded, queries)
        # D-FINE predicts once more, in front of its first layer.
        pairs = zip(given, predicted[-len(given) :], strict=True)
        return [DecoderLayer(state, predictions) for state, predictions in pairs]

    def _decoder_inputs(self, own: _OwnForward, queries: Queries) -> dict[str, Any]:
        """What the decoder was called with, and other queries."""
        inputs = {**own.decoder_inputs, "inputs_embeds": queries.content}
        if self.from_boxes:
            assert queries.boxes is not None
            boxes = torch.logit(queries.boxes, eps=1e-5)
            return {**inputs, "reference_points": boxes, "encoder_attention_mask": None}
        inputs["object_queries_position_embeddings"] = queries.position
        if queries.boxes is not None:
            inputs["reference_points"] = queries.boxes
        return inputs

    def _predicted(self, batch: Batch, decoded: Any, queries: Queries) -> list[Predictions]:
        """What the detector's forward hands to its loss, layer by layer.

        It runs once more, with a model that only returns what the decoder has made.
        """
        of_model = batch.extra.model_output
        made = {**of_model, **{name: value for name, value in decoded.items() if hasattr(of_model, name)}}
        if "init_reference_points" in made:
            made["init_reference_points"] = queries.boxes
        made.pop("denoising_meta_values", None)
        predicted: list[Predictions] = []

        def take_down(
            logits: Tensor, labels: Any, device: Any, boxes: Tensor, config: Any, *of_layers: Any, **_: Any
        ) -> tuple[None, None, None]:
            if self.num_layers > 1:
                by_layer = [
                    of_layer.transpose(0, 1) if self.from_boxes else of_layer for of_layer in of_layers
                ]
                for pair in zip(by_layer[0][:-1], by_layer[1][:-1], strict=True):
                    predicted.append(Predictions(*pair, None, self.background))
            # Not the last of those: DETR normalises its last state once more.
            predicted.append(Predictions(logits, boxes, None, self.background))
            return None, None, None

        stand_in = type(of_model)(**made)
        with (
            replaced(self.detector.model, forward=lambda *_, **__: stand_in),
            replaced(self.detector, _loss_function=take_down),
        ):
            self.detector(pixel_values=batch.pixels, labels=())
        return predicted

    def box_sizes(self, batch: Batch) -> Sequence[tuple[int, int]]:
        """The batch's, padding included, as the image processors make boxes."""
        return [batch.size] * len(batch.pixels)


def _family(detector: Any) -> str:
    """The name of a detector's type without ``ForObjectDetection``; raises for one that isn't known."""
    for base in type(detector).__mro__:
        family = base.__name__.removesuffix("ForObjectDetection")
        if family != base.__name__ and family in _KNOWN:
            return family
    raise TypeError(
        f"a {type(detector).__name__} is none of the detectors that this adapter knows: "
        + ", ".join(f"{family}ForObjectDetection" for family in _KNOWN)
        + ". A backbone may be a teacher: crosskd.adapters.backbone(), as teacher_adapter="
    )


def _called_with(images: Any) -> dict[str, Any]:
    """The keywords of what `TransformersDetr.prepare` takes as images."""
    return dict(images) if isinstance(images, Mapping) else {"pixel_values": images}


def _pixels(images: Any, targets: Any) -> tuple[Tensor, Tensor | None]:
    """Pixels and mask; raises ``ValueError`` for what the detector isn't called with."""
    given = _called_with(images)
    if targets is None and given.get("labels") is not None:
        raise ValueError("the labels stand among the images: call distiller(**inputs) or (inputs, labels)")
    others = given.keys() - {"pixel_values", "pixel_mask", "labels"}
    if others:
        raise ValueError(f"expected pixel_values, pixel_mask and labels, got {sorted(others)} too")
    pixels, mask = given.get("pixel_values"), given.get("pixel_mask")
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or not len(pixels):
        got = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ValueError(
            f"pixel_values must be a tensor (batch, channels, height, width) of an image or more, got {got}"
        )
    if mask is not None and mask.shape != (len(pixels), *pixels.shape[-2:]):
        raise ValueError(
            f"pixel_mask must be (batch, height, width) of pixel_values {tuple(pixels.shape)}, got "
            f"{tuple(mask.shape)}"
        )
    return pixels, mask


def _check_labels(labels: Any, images: int, classes: int) -> None:
    """Raises ``ValueError`` for labels that the detector itself would stumble over."""
    if not isinstance(labels, Sequence):
        raise ValueError(
            f"labels must be a list of dicts with class_labels and boxes, one for each image, got a "
            f"{type(labels).__name__}"
        )
    if len(labels) != images:
        raise ValueError(f"there are {images} images but labels of {len(labels)}")
    for index, of_image in enumerate(labels):
        if not {"class_labels", "boxes"} <= set(of_image):
            raise ValueError(
                f"labels of image {index} must have class_labels and boxes, got {sorted(of_image)}: have "
                "the detector's image processor make them"
            )
        boxes, found = of_image["boxes"], of_image["class_labels"]
        if boxes.shape != (len(found), 4):
            raise ValueError(
                f"boxes of image {index} must be ({len(found)}, 4) as class_labels have it, got "
                f"{tuple(boxes.shape)}"
            )
    together = [
        torch.cat([of_image[name].flatten() for of_image in labels]) for name in ("class_labels", "boxes")
    ]
    if not len(together[0]):
        return
    extremes = torch.stack([together[0].min(), together[0].max(), together[1].max()])
    lowest, highest, reach = extremes.tolist()  # the only wait for an accelerator
    if 0 <= lowest <= highest < classes and reach <= 2:
        return
    for index, of_image in enumerate(labels):
        boxes, found = of_image["boxes"], of_image["class_labels"]
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < classes:
            raise ValueError(
                f"image {index} has class_labels from {int(found.min())} to {int(found.max())}, but the "
                f"detector predicts {classes} classes"
            )
        if len(found) and float(boxes.max()) > 2:
            raise ValueError(
                f"boxes of image {index} reach {float(boxes.max()):g}: they must be centre, width and height "
                "from 0 to 1, as the image processor makes them"
            )


def _forward(detector: Any, batch: Batch) -> _OwnForward:
    """Runs a detector's own forward; what it leaves is in the batch's ``extra``, too."""
    run: _OwnForward = batch.extra
    model = detector.model

    def of_backbone(_: nn.Module, __: Any, output: Any) -> None:
        run.maps["backbone"] = [level[0] for level in output]

    def of_encoder(_: nn.Module, __: Any, inputs: dict[str, Any], output: Any) -> None:
        memory = output.last_hidden_state
        if not isinstance(memory, Tensor):
            run.maps["encoder"] = list(memory)
            return
        sizes = inputs.get("spatial_shapes_list") or [run.maps["backbone"][-1].shape[-2:]]
        maps = folded(memory, sizes)
        # The decoder reads these maps, so that gradients at them are all that reach the encoder.
        output.last_hidden_state = torch.cat([level.flatten(2).mT for level in maps], dim=1)
        run.maps["encoder"] = maps

    def of_decoder(_: nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        run.decoder_inputs = dict(inputs)

    def of_model(_: nn.Module, __: Any, output: Any) -> None:
        run.model_output = output

    with (
        model.backbone.register_forward_hook(of_backbone),
        model.encoder.register_forward_hook(of_encoder, with_kwargs=True),
        model.decoder.register_forward_pre_hook(of_decoder, with_kwargs=True),
        model.register_forward_hook(of_model),
    ):
        run.output = detector(pixel_values=batch.pixels, pixel_mask=run.mask, labels=batch.targets)
    return run
