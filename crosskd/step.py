"""One training step: how a head is run, what a method sees of it, and the trace that it leaves.

`Distiller.forward <crosskd.Distiller>` runs a step and reads its `Trace`; so do `crosskd.check`,
`crosskd.check_adapter` and the benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from crosskd.adapters.base import Adapter, Batch, DecoderHead, DecoderLayer, Head, Objects, Queries
from crosskd.predictions import Assignment, Predictions, join_levels
from crosskd.towers import Tapped, TapPoint

__all__ = [
    "DetectorTrace",
    "HeadTrace",
    "Side",
    "Step",
    "Trace",
    "between_graphs",
    "distinct_objects",
    "outside_graph",
    "resized_boxes",
    "run_head",
    "shape_only",
    "space",
]

CallableT = TypeVar("CallableT", bound=Callable[..., Any])

Points = Mapping[str, Mapping[str, TapPoint]]
"""Where to tap a head's towers: by branch name, each method's point by its name."""

Taps = dict[str, dict[str, list[Any]]]
"""What was tapped: by method and branch name, one entry per level."""


def outside_graph(function: CallableT) -> CallableT:
    """Keeps a function out of compiled graphs: `torch.compiler.disable` that keeps its type."""
    return cast(CallableT, torch.compiler.disable(function))  # type: ignore[no-untyped-call, unused-ignore]


@outside_graph
def between_graphs(maps: list[Tensor]) -> list[Tensor]:
    """The same maps, as what one compiled graph gives and the next one takes."""
    return maps


@dataclass(frozen=True, eq=False)
class HeadTrace:
    """What one head's run on one side has left.

    Attributes:
        head: the head.
        predictions: of the levels that were run.
        levels: which levels those are.
        taps: by method and branch name, one entry per level.
        anchors: of those levels, or the regions.
        all_anchors: of all levels.
        losses: the student's own losses of this head.
        assignment: the student's own label assignment; ``None`` without targets.
        boxes: of a teacher that was resized to the student's levels, its boxes at the student's locations, in
            pixels of the student's batch.
    """

    head: Head
    predictions: Predictions
    levels: tuple[int, ...]
    taps: Taps
    anchors: Any = None
    all_anchors: Any = None
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    assignment: Assignment | None = None
    boxes: Tensor | None = None


@dataclass(frozen=True, eq=False)
class DetectorTrace:
    """What a step has left of one detector.

    Attributes:
        adapter: takes the detector apart.
        batch: as the detector took it; the teacher's pixels may be no more than their shape.
        maps: its feature maps, all levels; the teacher's are no more than their shapes where no method asked
            for them.
        heads: what was run of its heads, by name.
    """

    adapter: Adapter
    batch: Batch
    maps: Sequence[Tensor]
    heads: dict[str, HeadTrace]


@dataclass(frozen=True, eq=False)
class Trace:
    """What one training step has left.

    Attributes:
        teacher: of the teacher; ``None`` where no method was active.
        student: of the student.
        steps: what each active method saw, by its name.
        losses: what it returned.
    """

    teacher: DetectorTrace | None
    student: DetectorTrace
    steps: dict[str, Step]
    losses: dict[str, dict[str, Tensor]]

    @property
    def own_losses(self) -> dict[str, Tensor]:
        """The student's own losses under their own names."""
        return {name: loss for run in self.student.heads.values() for name, loss in run.losses.items()}


class Side:
    """One side of a `Step`: what a method's ``requires`` asked for.

    Attributes:
        adapter: takes the detector apart.
        batch: as the detector took it: image sizes, the pixels' shape.
        class_map: of the teacher's side, the columns of the logits that are compared, where there is a map.
    """

    def __init__(
        self,
        trace: DetectorTrace,
        run: HeadTrace | None,
        requires: frozenset[str],
        method: str,
        class_map: tuple[int, ...] | None = None,
    ) -> None:
        self.adapter, self.batch, self.class_map = trace.adapter, trace.batch, class_map
        self._trace, self._run, self._requires, self._method = trace, run, requires, method

    def require(self, name: str) -> None:
        """Raises ``AttributeError`` for what the method's ``requires`` doesn't name."""
        if name not in self._requires:
            raise AttributeError(
                f"{self._method} reads {name}, but its requires is {sorted(self._requires)}: add {name!r} to "
                "it"
            )

    @property
    def strides(self) -> tuple[float, ...] | None:
        """Pixels between neighbouring locations of each level's map."""
        return self.adapter.strides

    @property
    def maps(self) -> Sequence[Tensor]:
        """Feature maps (batch, channels, height, width), one per level, finest first (``"maps"``)."""
        self.require("maps")
        return self._trace.maps

    @property
    def _head_run(self) -> HeadTrace:
        if self._run is None:
            raise AttributeError(
                f"{self._method} reads a head, but its requires is {sorted(self._requires)}: add "
                "'predictions' or 'towers' to it"
            )
        return self._run

    @property
    def head(self) -> Head:
        """The head that the method distils."""
        return self._head_run.head

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels that are compared, in the same order on both sides."""
        return self._head_run.levels

    @property
    def taps(self) -> Mapping[str, Sequence[Any]]:
        """By branch name, one entry per compared level (``"towers"``).

        The student's are `crosskd.towers.Tapped` features at the method's point, the teacher's what
        `Method.keep_of_teacher` made of its features.
        """
        self.require("towers")
        return self._head_run.taps.get(self._method, {})

    @property
    def predictions(self) -> Predictions:
        """Of the compared levels (``"predictions"``); the teacher's are constants."""
        self.require("predictions")
        return self._head_run.predictions

    @property
    def anchors(self) -> Any:
        """What the predictions stand at (``"predictions"``)."""
        self.require("predictions")
        return self._head_run.anchors

    @property
    def decoder(self) -> DecoderHead:
        """The decoder that the method distils (``"queries"``); `pairing.require_decoders` has seen to it."""
        self.require("queries")
        assert isinstance(self.head, DecoderHead)
        return self.head

    def queries(self) -> Queries:
        """What the decoder started from in the detector's own forward, as constants (``"queries"``)."""
        return self.decoder.own_queries(self.batch)

    def decoded(self, queries: Queries, states: Mapping[int, Tensor] | None = None) -> list[DecoderLayer]:
        """Runs the decoder once more, with queries of the method's own (``"queries"``).

        Args:
            queries: of this decoder's width.
            states: by a layer's index, what goes on instead of the layer's own state.

        Returns:
            One entry a layer; the teacher's classes are those of the ``class_map``.
        """
        layers = self.decoder.run(self.batch, queries, states)
        columns = self.class_map
        return [replace(layer, predictions=layer.predictions.of_classes(columns)) for layer in layers]

    @property
    def resized_boxes(self) -> Tensor | None:
        """The teacher's, where they were brought to the student's locations: `Step.teacher_boxes`."""
        return self._head_run.boxes


class Step:
    """One training step, as a method sees it.

    Attributes:
        teacher: the teacher's side.
        student: the student's side.
        class_map: the teacher's column of the logits for each of the student's, where the user gave one: the
            teacher's predictions are of those columns alone.
        scale: the teacher's pixels per pixel of the student's, by their strides.
        alike: every image of the teacher's is ``scale`` times the student's.
        resized: the teacher saw the images at a size that is no multiple of the student's by the strides'
            factor, and its predictions were brought to the student's locations.
        assignment: the student's own label assignment; without targets that which the teacher's predictions
            give.
    """

    def __init__(
        self,
        teacher: Side,
        student: Side,
        *,
        class_map: tuple[int, ...] | None = None,
        scale: float = 1.0,
        alike: bool = True,
        resized: bool = False,
        assignment: Assignment | None = None,
        assign_by_teacher: Callable[[], Assignment] | None = None,
        found_by_teacher: Callable[[float], tuple[Objects, ...]] | None = None,
    ) -> None:
        self.teacher, self.student = teacher, student
        self.class_map, self.scale, self.alike, self.resized = class_map, scale, alike, resized
        self._assignment, self._assign_by_teacher = assignment, assign_by_teacher
        self._found_by_teacher = found_by_teacher

    @property
    def objects(self) -> tuple[Objects, ...] | None:
        """Each image's, boxes in pixels of the student's batch; ``None`` without targets (``"objects"``)."""
        self.student.require("objects")
        return self.student.batch.objects

    def foreground(self, threshold: float) -> tuple[Objects, ...]:
        """Each image's objects; without targets what the teacher itself finds (``"objects"``, ``"maps"``).

        Args:
            threshold: the class probability from which on a box of the teacher's counts as an object, after
                suppression of those that overlap by more than half.

        Returns:
            Boxes in pixels of the student's batch.

        Raises:
            ValueError: targets without objects, or no targets and a teacher that finds no boxes.
        """
        if self.objects is not None:
            return self.objects
        if self.student.batch.targets is not None:
            raise ValueError(
                "the student's adapter gives no objects of the targets: give generic() objects=, a function "
                "of the targets"
            )
        self.teacher.require("maps")
        assert self._found_by_teacher is not None
        return self._found_by_teacher(threshold)

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each image in the student's batch, without padding."""
        return self.student.batch.image_sizes

    @property
    def assignment(self) -> Assignment:
        """Which of the student's anchors count, and the losses' normalizer (``"predictions"``)."""
        self.student.require("predictions")
        assert self._assignment is not None
        return self._assignment

    def teacher_boxes(self) -> Tensor:
        """The teacher's boxes at the student's anchors (``"predictions"``).

        Returns:
            Shape (batch, anchors, 4), or (batch, anchors, classes, 4): xyxy in pixels of the student's batch.
        """
        self.student.require("predictions")
        if self.teacher.resized_boxes is not None:
            return self.teacher.resized_boxes
        # A teacher of the same coding at another resolution needs no rescaling.
        return self.student.head.decode(self.teacher.predictions, self.student.anchors)

    def teacher_assignment(self) -> Assignment:
        """Likewise of the teacher's, by its own label assignment on the objects (``"predictions"``)."""
        self.teacher.require("predictions")
        assert self._assign_by_teacher is not None
        return self._assign_by_teacher()


def run_head(
    head: Head,
    maps: Sequence[Tensor],
    levels: Sequence[int],
    points: Points | None = None,
    keep: Callable[[str, Tapped], Any] | None = None,
    class_map: tuple[int, ...] | None = None,
    batch: Batch | None = None,
) -> HeadTrace:
    r"""Runs a head's towers and predictors, tapping the towers on the way.

    A `DecoderHead` has run already, with the maps.

    Args:
        head: the head.
        maps: what it is fed: one (batch, channels, \*space) per level in ``levels``.
        levels: which levels those are.
        points: where to tap.
        keep: makes of a method's name and features what is kept of them; the features themselves without it.
        class_map: keeps these columns of the logits.
        batch: whose maps they are, for a `DecoderHead`.
    """
    if isinstance(head, DecoderHead):
        assert batch is not None
        return HeadTrace(head, head.own_predictions(batch).of_classes(class_map), (0,), {})
    taps: Taps = {}
    predictions = []
    fed = head.feed(maps)
    if head.rows == "queries":  # of all levels
        levels = range(len(fed))
    for place, level in enumerate(levels):
        towers = {}
        for branch in head.branches:
            wanted = {} if points is None else points.get(branch.name, {})
            output, tapped = branch.tower(level).run(fed[place], set(wanted.values()))
            for method, point in wanted.items():
                kept = tapped[point] if keep is None else keep(method, tapped[point])
                taps.setdefault(method, {}).setdefault(branch.name, []).append(kept)
            towers[branch.name] = output
        predictions.append(head.predict(level, towers).of_classes(class_map))
    return HeadTrace(head, join_levels(predictions), tuple(levels), taps)


def space(feature_map: Tensor, *, channels_last: bool) -> tuple[int, ...]:
    """A map's shape without batch and channels: (height, width), (locations,) or ()."""
    return tuple(feature_map.shape[1:-1] if channels_last else feature_map.shape[2:])


def resized_boxes(boxes: Tensor, size: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Boxes (objects, 4), xyxy in pixels, of an image of one (height, width) as they are at another."""
    (height, width), (wanted_height, wanted_width) = size, wanted
    boxes = boxes if boxes.is_floating_point() else boxes.float()
    return boxes * boxes.new_tensor([wanted_width / width, wanted_height / height] * 2)


def distinct_objects(boxes: Tensor, scores: Tensor, labels: Tensor, size: tuple[int, int]) -> Objects:
    """An image's boxes after non-maximum suppression within each class, at an IoU of 0.5.

    Args:
        boxes: shape (boxes, 4), xyxy in pixels, cut to the image first.
        scores: shape (boxes,).
        labels: likewise.
        size: (height, width) of the image.
    """
    boxes = clip_boxes_to_image(boxes, size)
    kept = batched_nms(boxes, scores, labels, iou_threshold=0.5)
    return Objects(boxes[kept], labels[kept])


def shape_only(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A stand-in of the same shape and no memory, so that what the teacher has used can be freed.

    Args:
        tensor: what it stands for.
        dtype: the tensor's unless given.
    """
    return tensor.new_empty((), dtype=dtype).expand(tensor.shape)
