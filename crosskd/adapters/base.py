"""What an adapter is. Read this file first when you bring a detector of your own.

An `Adapter` is bound to one detector, whose structure it reads once, when it is made. The `Distiller` has two
of them, one on either side, of any two types. One training step uses them in this order::

    student    prepare     images, targets → `Batch`: pixels, objects, image sizes
    teacher    maps        pixels          → one feature map per level
               heads       towers, predictions                  (only as far as a method requires them)
    student    maps
               heads       towers, predictions, anchors, own losses and label assignment

A detector with several heads has one `Head` for each, in the order in which they run; one without a head, a
plain backbone, has none and can be a teacher of feature maps. Heads and adapters know nothing of methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from crosskd.predictions import Assignment, Predictions, positives_of_teacher
from crosskd.towers import Branch

__all__ = [
    "Adapter",
    "AdapterSpec",
    "Anchors",
    "Batch",
    "DecoderHead",
    "DecoderLayer",
    "Head",
    "Objects",
    "OwnOutput",
    "PixelCoding",
    "Queries",
    "RegionHead",
    "Rows",
    "recoded",
]

Rows = Literal["grid", "regions", "queries"]
"""What the rows of a head's predictions stand for: places on a grid, regions, or a set in no order."""


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of one image.

    Attributes:
        boxes: shape (objects, 4), xyxy in pixels of the batch.
        labels: shape (objects,), each the class's column of the logits.
    """

    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class PixelCoding:
    """How a detector's pixels are made of an RGB image of values from 0 to 1: ``(image - mean) / std``.

    Attributes:
        mean: one number per channel, in the order of the detector's channels.
        std: likewise.
        bgr: the detector takes blue first.
        padding: value of the pixels beyond an image's own size.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False
    padding: float = 0.0


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch as one detector takes it.

    Attributes:
        pixels: shape (batch, channels, height, width), coded as the detector wants them.
        image_sizes: (height, width) of each image in the batch, without padding.
        objects: of each image; ``None`` where there are no targets, or if unknown.
        targets: in the detector's own form, in pixels of the batch; ``None`` for unlabelled images.
        extra: whatever else the adapter's own functions need.
    """

    pixels: Tensor
    image_sizes: tuple[tuple[int, int], ...]
    objects: tuple[Objects, ...] | None = None
    targets: Any = None
    extra: Any = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pixels, padding included."""
        return int(self.pixels.shape[-2]), int(self.pixels.shape[-1])


@dataclass(frozen=True, eq=False)
class Anchors:
    """What a head's predictions stand at, the same for all images of a batch.

    Attributes:
        boxes: shape (anchors, 4), xyxy in pixels of the batch, or (anchors, 2) for points, xy; level by
            level, in the order of the predictions. ``None`` if unknown.
        per_level: how many anchors each level has.
        strides: shape (anchors,), pixels between neighbouring locations of the anchor's level, where the
            head's box coding needs them.
        sizes: (height, width) of each level.
        extra: whatever else the head's own functions need, of all levels.
    """

    boxes: Tensor | None
    per_level: tuple[int, ...]
    strides: Tensor | None = None
    sizes: tuple[tuple[int, ...], ...] = ()
    extra: Any = None

    def of_levels(self, levels: Sequence[int]) -> Anchors:
        """Those of some levels alone, in the given order."""
        if list(levels) == list(range(len(self.per_level))):
            return self
        rows = self.rows(levels)
        return replace(
            self,
            boxes=None if self.boxes is None else self.boxes[rows],
            per_level=tuple(self.per_level[level] for level in levels),
            strides=None if self.strides is None else self.strides[rows],
            sizes=tuple(self.sizes[level] for level in levels) if self.sizes else (),
        )

    def rows(self, levels: Sequence[int]) -> Tensor:
        """The indices (anchors,) of some levels' rows."""
        device = None if self.boxes is None else self.boxes.device
        starts = [sum(self.per_level[:level]) for level in levels]
        counts = [self.per_level[level] for level in levels]
        ranges = [torch.arange(s, s + n, device=device) for s, n in zip(starts, counts, strict=True)]
        return torch.cat(ranges)


@dataclass(frozen=True, eq=False)
class OwnOutput:
    """What a detector's own forward shows of one of its heads.

    Attributes:
        predictions: of all levels; ``None`` where the forward doesn't show them, and only the outputs of the
            detector's layers are compared.
        regions: of a `RegionHead`, those that it answered for.
        maps: of a `RegionHead`, those that it pooled from.
    """

    predictions: Predictions | None
    regions: Any = None
    maps: Sequence[Tensor] = ()


class Head(ABC):
    """One head of a detector: towers, predictors, box coding, label assignment.

    Attributes:
        name: tells a detector's heads apart; empty for its only one.
        head_type: by which methods look up published settings, ``"GFL"``, ``"RetinaNet"``…; a name of your
            own means the general settings.
        num_classes: columns of the logits, the background included.
        class_names: their names, one per column; ``None`` if unknown.
        background: the column that means no object, where the classes share a softmax.
        objectness: whether its `Predictions <crosskd.predictions.Predictions>` have ``objectness``.
        branches: the head's towers with their predictors.
        rows: what a row of predictions stands for. Rows of ``"queries"`` have no order, and methods that
            compare row by row refuse them.
        copies: the rows of a level are so many copies of its locations, one behind the other; of a location
            its anchors follow each other.
        bins: of the distribution that each side of a box is predicted as; 1 for plain numbers.
        times_batch: the detector's own losses are means over a batch times the number of its images, so the
            losses of methods that distil into it are multiplied by it too.
        decodes: whether `decode` can be called.
    """

    name: str = ""
    head_type: str = "other"
    num_classes: int
    class_names: tuple[str, ...] | None = None
    background: int | None = None
    objectness: bool = False
    branches: tuple[Branch, ...]
    rows: Rows = "grid"
    copies: int = 1
    bins: int = 1
    times_batch: bool = False
    decodes: bool = True

    def feed(self, maps: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the towers are fed: the maps, or the queries that are made of all of them.

        Args:
            maps: of the levels that are run.
        """
        return maps

    @abstractmethod
    def predict(self, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Runs the predictors on the tower outputs of one level.

        Args:
            level: whose outputs they are, counted as in `Adapter.maps`.
            towers: by branch name, the tower's output (batch, channels, height, width); vectors or channels
                last where the tower's layers make such.

        Returns:
            The level's predictions, its locations row by row, a location's anchors one behind the other.
        """

    @abstractmethod
    def anchors(self, batch: Batch, maps: Sequence[Tensor]) -> Anchors:
        """What the predictions of a batch stand at.

        Args:
            batch: as this detector takes it.
            maps: of all levels; no more than their shapes, type and device may be read.
        """

    @abstractmethod
    def decode(self, predictions: Predictions, anchors: Anchors) -> Tensor:
        """Boxes (batch, anchors, 4), or (batch, anchors, classes, 4): xyxy in pixels of the batch, unclipped.

        Args:
            predictions: of some or all levels.
            anchors: of the same levels.
        """

    @abstractmethod
    def losses(
        self, predictions: Predictions, anchors: Anchors, batch: Batch
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The detector's own losses under their own names, and the label assignment they were made with."""

    def assign(self, predictions: Predictions, anchors: Anchors, batch: Batch) -> Assignment:
        """The label assignment alone, of a batch's `Objects`: a teacher's, whose anchors are its own.

        Args:
            predictions: constants, for an assigner that looks at them.
            anchors: of all levels.
            batch: with ``objects``.

        Raises:
            ValueError: this head has no label assignment apart from its losses.
        """
        raise ValueError(
            f"the teacher's {self.head_type} head has other anchors than the student's, and its adapter "
            f"({type(self).__name__}) has no label assignment of its own: implement its assign(), or take "
            "a teacher with the student's anchors"
        )

    def assign_unlabelled(self, predictions: Predictions, threshold: float) -> Assignment:
        """The assignment for images without targets: the teacher's confident anchors are the positives.

        Args:
            predictions: the teacher's.
            threshold: an anchor is positive from this class probability on.
        """
        return positives_of_teacher(predictions, threshold)


class RegionHead(Head):
    """A head that answers for regions, which an earlier head of the student proposes.

    Teacher and student answer for the same regions, the student's, each with features pooled from its own
    maps. All images' regions stand one behind the other, in one level: towers take (regions, channels,
    height, width) or (regions, channels), and predictions have the shape (1, regions, …). What `Head` calls
    anchors are the regions, in whatever form `regions` gives them.

    Attributes:
        pooled: (height, width) of what is pooled at a region; ``None`` if unknown.
    """

    rows: Rows = "regions"
    pooled: tuple[int, int] | None = None

    @abstractmethod
    def regions(self, predictions: Predictions, anchors: Anchors, batch: Batch) -> Any:
        """The regions of a batch that the student proposes, as constants.

        Called after the earlier head's losses, so that random numbers are drawn in the detector's own order.

        Args:
            predictions: the earlier head's.
            anchors: the earlier head's.
            batch: with targets the regions are those that the student's own losses are made on; without, as
                many of its best.
        """

    @abstractmethod
    def counts(self, regions: Any) -> tuple[int, ...]:
        """How many regions each image has."""

    @abstractmethod
    def pool(self, maps: Sequence[Tensor], regions: Any, batch: Batch) -> Tensor:
        """What the head is fed, shape (regions, channels, height, width).

        Args:
            maps: this detector's, of all levels.
            regions: the student's.
            batch: this detector's; with a view of the teacher's own its images may be of another size than
                those that the regions belong to.
        """

    def anchors(self, batch: Batch, maps: Sequence[Tensor]) -> Anchors:
        """Regions have none; they are what `regions` gives."""
        raise TypeError(f"{type(self).__name__} answers for regions: call regions()")


@dataclass(frozen=True, eq=False)
class Queries:
    """What a decoder starts from, in the order of its rows; which parts there are is the decoder's ``kind``.

    Attributes:
        content: shape (batch, queries, width), what the decoder's layers turn into predictions.
        position: shape (batch, queries, width), an embedding that is added in each layer; ``None`` where
            the decoder makes it of the boxes.
        boxes: where the queries look, as shares of `DecoderHead.box_sizes`: shape (batch, queries, 4),
            centre, width and height, or (batch, queries, 2), the centre alone; ``None`` where only
            ``position`` says.
    """

    content: Tensor
    position: Tensor | None = None
    boxes: Tensor | None = None


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """What one layer of a decoder has made of queries.

    Attributes:
        state: shape (batch, queries, width), what the layer gives to the next.
        predictions: of the layer's predictors, one row a query; ``regression`` holds boxes (batch, queries,
            4), centre, width and height as shares of `DecoderHead.box_sizes`.
    """

    state: Tensor
    predictions: Predictions


class DecoderHead(Head):
    """A decoder of queries: its rows are a set in no order, and it can be run with queries handed to it.

    It isn't taken apart. The detector's own forward runs once a step, as a whole, in `Adapter.maps_of`, with
    denoising and auxiliary losses where there are any, and leaves in the batch what the head is asked for.
    So its predictions and losses are the detector's own.

    Attributes:
        kind: what its queries are made of, such as ``"boxes"``: decoders of one kind can share queries.
        width: channels of a query.
        num_queries: how many it has of its own.
        num_layers: how many of its layers predict.
    """

    rows: Rows = "queries"
    branches: tuple[Branch, ...] = ()
    kind: str
    width: int
    num_queries: int
    num_layers: int

    @abstractmethod
    def own_predictions(self, batch: Batch) -> Predictions:
        """What the last layer predicted in the detector's own forward, without denoising queries."""

    @abstractmethod
    def own_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of the detector's own forward by their own names, weighted: their sum is its loss."""

    @abstractmethod
    def own_queries(self, batch: Batch) -> Queries:
        """What the decoder started from in the detector's own forward, as constants."""

    @abstractmethod
    def run(
        self, batch: Batch, queries: Queries, states: Mapping[int, Tensor] | None = None
    ) -> list[DecoderLayer]:
        """Runs decoder and predictors once more, on the memory of the detector's own forward.

        Args:
            batch: that has gone through `Adapter.maps_of`.
            queries: of this head's kind and width.
            states: by a layer's index, what goes on instead of the layer's own state.

        Returns:
            One entry a layer, first layer first.
        """

    @abstractmethod
    def box_sizes(self, batch: Batch) -> Sequence[tuple[int, int]]:
        """(height, width) in pixels of what boxes are shares of, one an image: with or without padding."""

    def anchors(self, batch: Batch, maps: Sequence[Tensor]) -> Anchors:
        """Queries stand at no fixed place; what boxes are shares of is kept for `decode`."""
        return Anchors(None, (self.num_queries,), extra=self.box_sizes(batch))

    def decode(self, predictions: Predictions, anchors: Anchors) -> Tensor:
        """Boxes in pixels of the batch."""
        boxes: Tensor = box_convert(predictions.regression, "cxcywh", "xyxy")
        scale = [[width, height, width, height] for height, width in anchors.extra]
        return boxes * boxes.new_tensor(scale)[:, None]

    def predict(self, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """There are no towers; predictions are what `own_predictions` and `run` give."""
        raise TypeError(f"{type(self).__name__} has no towers: call own_predictions() or run()")

    def losses(
        self, predictions: Predictions, anchors: Anchors, batch: Batch
    ) -> tuple[dict[str, Tensor], Assignment]:
        """They belong to the detector's own forward: `own_losses`."""
        raise TypeError(f"{type(self).__name__} has no losses of its own: call own_losses()")


class Adapter(ABC):
    """One detector, taken apart.

    Attributes:
        detector: the detector.
        heads: in the order in which they run; none for a backbone.
        strides: pixels between neighbouring locations of each level's map, finest first; ``None`` where only
            an image shows.
        widths: channels of each level's map; ``None`` if unknown.
        pixel_coding: how its pixels are coded; ``None`` if unknown, and both detectors are given the
            same pixels.
        untrained: what the detector has beside these heads, by name: its losses would be lost, so that it
            can only be a teacher.
    """

    detector: nn.Module
    untrained: tuple[str, ...] = ()
    heads: tuple[Head, ...] = ()
    strides: tuple[float, ...] | None = None
    widths: tuple[int, ...] | None = None
    pixel_coding: PixelCoding | None = None

    @abstractmethod
    def prepare(self, images: Any, targets: Any) -> Batch:
        """The detector's own preprocessing of what it is called with.

        Raises:
            ValueError: images or targets that the detector's own training would refuse.
        """

    @abstractmethod
    def maps(self, pixels: Tensor) -> list[Tensor]:
        """What the heads are fed: one map (batch, channels, height, width) per level, finest first."""

    def maps_of(self, batch: Batch) -> list[Tensor]:
        """The maps of a batch: those of its pixels, unless the detector's own forward needs more of it.

        Args:
            batch: as `prepare` or `take` gave it. An adapter with a `DecoderHead` leaves in its ``extra``
                what the head is asked for.
        """
        return self.maps(batch.pixels)

    def from_keywords(self, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
        """(images, targets) of what the detector itself is called with by keywords.

        Raises:
            TypeError: this detector is called with images and targets.
        """
        raise TypeError(
            f"a {type(self.detector).__name__} is called with images and targets, got the keywords "
            f"{sorted(inputs)}: call distiller(images, targets)"
        )

    def take(self, batch: Batch) -> Batch:
        """Another detector's batch in the form that this one's own functions need: the pixels are recoded.

        Args:
            batch: the student's, its pixels recoded to this detector's `pixel_coding`, with no targets.
        """
        return batch

    def detect(self, images: Any, targets: Any) -> Any:
        """What the detector answers to images in eval mode: ``detector(images)`` unless overridden.

        Args:
            images: as `prepare` takes them.
            targets: what was given beside the images, ``None`` mostly.
        """
        return self.detector(images)

    # -- what the pieces are proved against ------------------------------------------------------

    def own_losses(self, images: Any, targets: Any) -> Mapping[str, Tensor] | Tensor | None:
        """What the detector's own forward in train mode makes of labelled images.

        Returns:
            Its losses, by the names that `Head.losses` gives them, or their sum; ``None`` where it gives
            none, and only the outputs of its layers are compared.
        """
        losses: Mapping[str, Tensor] = self.detector(images, targets)
        return losses

    @abstractmethod
    def own_outputs(self, batch: Batch) -> list[OwnOutput]:
        """What the detector's own forward in eval mode computes for a batch, head by head.

        Called on the frozen teacher, and on a student whose first images have no targets. May replace parts
        of the detector while it runs, if it puts them back.

        Args:
            batch: as `prepare` or `take` gave it.
        """


AdapterSpec = Callable[[nn.Module], Adapter]
"""Makes an adapter of a detector: an adapter's class, or what `generic` returns."""


def recoded(batch: Batch, own: PixelCoding | None, wanted: PixelCoding | None) -> Tensor:
    """A batch's pixels (batch, channels, height, width) as another detector's preprocessing would code them.

    Args:
        batch: of a detector whose pixels are coded by ``own``.
        own: its coding.
        wanted: the other's; the same pixels where either is unknown.
    """
    if own is None or wanted is None or own == wanted:
        return batch.pixels
    pixels = batch.pixels
    means, stds = (
        [
            torch.tensor(getattr(coding, name), dtype=pixels.dtype, device=pixels.device)
            for coding in (own, wanted)
        ]
        for name in ("mean", "std")
    )
    if own.bgr != wanted.bgr:  # in the order of the wanted channels
        pixels, means[0], stds[0] = pixels.flip(1), means[0].flip(0), stds[0].flip(0)
    scale = (stds[0] / stds[1])[:, None, None]
    shift = ((means[0] - means[1]) / stds[1])[:, None, None]
    result = torch.full_like(pixels, wanted.padding)
    for index, (height, width) in enumerate(batch.image_sizes):
        result[index, :, :height, :width] = pixels[index, :, :height, :width] * scale + shift
    return result
