"""Adapter for mmdet's Deformable DETR and DINO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from mmdet.models.dense_heads import DeformableDETRHead, DINOHead
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor

from crosskd._unchanged import unchanged
from crosskd.adapters.base import Batch, DecoderHead, DecoderLayer, OwnOutput, Queries
from crosskd.adapters.decoders import folded, layer_states
from crosskd.adapters.mmdet.heads import summed
from crosskd.adapters.mmdet.single_stage import MMDetSingleStage, pixel_coding
from crosskd.adapters.replacing import replaced
from crosskd.predictions import Predictions

__all__ = ["MMDetTransformer"]

_PROBE_PIXELS = 256
_DINO_WIDTH = 256  # coordinate_to_encoding() gives 4 * 128 numbers, of which an MLP wants twice the width


@dataclass(eq=False)
class _OwnForward:
    """What the detector's own forward leaves of a batch, in the batch's ``extra``.

    Attributes:
        metas: of the images.
        maps: the memory that the decoder reads, level by level.
        decoder_inputs: what the decoder was called with.
        outputs: the head's logits and boxes (layers, batch, queries, values), denoising queries in front.
        losses: the detector's, where there are targets.
    """

    metas: list[dict[str, Any]]
    maps: list[Tensor] = field(default_factory=list)
    decoder_inputs: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[Tensor, Tensor] | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)


class MMDetTransformer(MMDetSingleStage):
    """Adapter for mmdet's ``DeformableDETR`` and ``DINO``; images and targets are as for `MMDetSingleStage`.

    Methods of feature maps compare the memory that the decoder reads.

    Args:
        detector: the detector.

    Raises:
        TypeError: another kind of detector, or one with another head.
        ValueError: a DINO of another width than 256.

    Example:
        >>> import pytest
        >>> mmdet = pytest.importorskip("mmdet")
        >>> MMDetTransformer(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        TypeError: a Linear is neither a DeformableDETR nor a DINO of mmdet
    """

    def __init__(self, detector: Any) -> None:
        # Not by isinstance: those that derive from these two want texts, or choose among their queries.
        if type(getattr(detector, "bbox_head", None)) not in (DeformableDETRHead, DINOHead):
            raise TypeError(f"a {type(detector).__name__} is neither a DeformableDETR nor a DINO of mmdet")
        if type(detector.bbox_head) is DINOHead and detector.embed_dims != _DINO_WIDTH:
            raise ValueError(
                f"this {type(detector).__name__} has a width of {detector.embed_dims}: mmdet's own forward "
                f"knows {_DINO_WIDTH} alone, for its decoder embeds boxes in {2 * _DINO_WIDTH} numbers, "
                f"whatever embed_dims says. Build it with embed_dims={_DINO_WIDTH}"
            )
        self.detector = detector
        self.pixel_coding = pixel_coding(detector)
        self.pad_divisor = int(getattr(detector.data_preprocessor, "pad_size_divisor", 1))
        pixels = next(detector.parameters()).new_zeros(1, 3, _PROBE_PIXELS, _PROBE_PIXELS)
        with torch.no_grad(), unchanged(detector):
            run = _forward(detector.eval(), self.prepare(pixels, None))
        self.strides = tuple(_PROBE_PIXELS / level.shape[-1] for level in run.maps)
        self.widths = tuple(level.shape[1] for level in run.maps)
        self.head: Any = _Decoder(detector, run)
        self.heads = (self.head,)

    def prepare(self, images: Any, targets: Any) -> Batch:
        """As `MMDetSingleStage` does."""
        batch = super().prepare(images, targets)
        return batch if targets is None else replace(batch, extra=_OwnForward(batch.extra))

    def take(self, batch: Batch) -> Batch:
        """A batch with image metas, by which mmdet distinguishes padding from images."""
        batch = super().take(batch)
        return replace(batch, extra=_OwnForward(batch.extra))

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """The memory of images without padding."""
        maps: list[Tensor] = self.maps_of(self.prepare(pixels, None))
        return maps

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def maps_of(self, batch: Batch) -> list[Tensor]:
        """Runs the detector's own forward, and gives the memory that it made on the way."""
        return _forward(self.detector, batch).maps

    def own_outputs(self, batch: Batch) -> list[OwnOutput]:
        """The last layer's, without denoising."""
        with replaced(self.detector, training=False):
            logits, boxes = self.detector(batch.pixels, _samples(batch), mode="tensor")
        return [OwnOutput(Predictions(logits[-1], boxes[-1], None, self.head.background))]


class _Decoder(DecoderHead):
    """The decoder of a detector, with its head.

    Args:
        detector: the detector.
        run: what its own forward has left of an image.
    """

    def __init__(self, detector: Any, run: _OwnForward) -> None:
        self.detector, self.head_type = detector, type(detector).__name__
        inputs = run.decoder_inputs
        boxes = "boxes" if inputs["reference_points"].shape[-1] == 4 else "points"
        self.kind = boxes + " and position embeddings" * ("query_pos" in inputs)
        self.num_queries, self.width = inputs["query"].shape[1:]
        assert run.outputs is not None
        self.num_layers, self.num_classes = len(run.outputs[0]), run.outputs[0].shape[-1]
        known = int(detector.bbox_head.num_classes)
        self.background = known if self.num_classes > known else None

    def require_assigner(self, side: str) -> None:
        """Raises ``ValueError`` for a head that can't match queries with objects."""
        if not hasattr(self.detector.bbox_head, "assigner"):
            raise ValueError(
                f"the {side}'s {type(self.detector.bbox_head).__name__} was built without a train_cfg, so it "
                "can't match queries with objects: build it with the train_cfg of its config"
            )

    def own_predictions(self, batch: Batch) -> Predictions:
        """The last layer's; denoising queries stand in front of the others."""
        logits, boxes = (output[-1][:, -self.num_queries :] for output in batch.extra.outputs)
        return Predictions(logits, boxes, None, self.background)

    def own_losses(self, batch: Batch) -> dict[str, Tensor]:
        """mmdet's losses by its names."""
        return dict(batch.extra.losses)

    def own_queries(self, batch: Batch) -> Queries:
        """Without denoising queries."""
        inputs = batch.extra.decoder_inputs
        names = ("query", "query_pos", "reference_points")
        parts = [None if name not in inputs else inputs[name].detach() for name in names]
        content, position, boxes = (None if part is None else part[:, -self.num_queries :] for part in parts)
        assert content is not None
        return Queries(content, position, boxes)

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def run(
        self, batch: Batch, queries: Queries, states: Mapping[int, Tensor] | None = None
    ) -> list[DecoderLayer]:
        """Runs the detector's ``forward_decoder``, and its head on what that gives."""
        inputs = {**batch.extra.decoder_inputs, "query": queries.content, "reference_points": queries.boxes}
        if queries.position is not None:
            inputs["query_pos"] = queries.position
        if "dn_mask" in inputs:
            inputs["dn_mask"] = None  # of denoising queries
        detector = self.detector
        with layer_states(detector.decoder.layers, self.num_layers, states or {}) as given:
            decoded = detector.forward_decoder(**inputs)
        outputs = detector.bbox_head(decoded["hidden_states"], decoded["references"])
        layers = []
        for state, logits, boxes in zip(given, *outputs, strict=True):
            layers.append(DecoderLayer(state, Predictions(logits, boxes, None, self.background)))
        return layers

    def box_sizes(self, batch: Batch) -> Sequence[tuple[int, int]]:
        """The images', without padding."""
        return batch.image_sizes


def _samples(batch: Batch) -> list[Any]:
    """Data samples of a batch without objects."""
    samples = []
    for meta in batch.extra.metas:
        none = batch.pixels.new_zeros(0, 4)
        instances = InstanceData(bboxes=none, labels=none.new_zeros(0, dtype=torch.long))
        samples.append(DetDataSample(metainfo=meta, gt_instances=instances))
    return samples


def _forward(detector: Any, batch: Batch) -> _OwnForward:
    """Runs a detector's own forward; what it leaves is in the batch's ``extra``, too."""
    run: _OwnForward = batch.extra
    encoder, decoder, head = detector.forward_encoder, detector.forward_decoder, detector.bbox_head.forward

    def of_encoder(**inputs: Any) -> dict[str, Any]:
        output = encoder(**inputs)
        run.maps = folded(output["memory"], output["spatial_shapes"].tolist())
        # The decoder reads these maps, so that gradients at them are all that reach the encoder.
        return {**output, "memory": torch.cat([level.flatten(2).mT for level in run.maps], dim=1)}

    def of_decoder(**inputs: Any) -> dict[str, Any]:
        run.decoder_inputs = inputs
        decoded: dict[str, Any] = decoder(**inputs)
        return decoded

    def of_head(*inputs: Any) -> tuple[Tensor, Tensor]:
        run.outputs = head(*inputs)
        return run.outputs

    with (
        replaced(detector, forward_encoder=of_encoder, forward_decoder=of_decoder),
        replaced(detector.bbox_head, forward=of_head),
    ):
        if batch.targets is None:
            inputs = detector.forward_transformer(detector.extract_feat(batch.pixels), _samples(batch))
            detector.bbox_head(inputs["hidden_states"], inputs["references"])
        else:
            run.losses = summed(detector(batch.pixels, batch.targets, mode="loss"))
    return run
