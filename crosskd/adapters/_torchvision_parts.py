"""What torchvision's detectors have in common: forwards, levels, anchors, and what of them must agree."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crosskd._checks import compute_dtype
from crosskd.adapters.levels import LevelPairs, check_channels
from crosskd.frozen import frozen_copy
from crosskd.predictions import Predictions

__all__ = [
    "Forwards",
    "Locations",
    "as_list",
    "check_anchor_settings",
    "check_box_coding",
    "check_forwards",
    "check_image_channels",
    "check_same_anchors",
    "decode_deltas",
    "delta_coder_settings",
    "predict_from_tower",
    "probed_strides",
    "widened",
]

Forwards = Sequence[tuple[str, type[nn.Module]]]

_logger = logging.getLogger("crosskd")
_PROBE_PIXELS = 256


@dataclass(frozen=True, eq=False)
class Locations:
    """Where a batch's predictions stand.

    Attributes:
        anchors: one tensor (anchors, 4) an image, xyxy in resized pixels.
        level_sizes: feature locations a level, without counting the anchors at each.
        per_location: anchors at each location, a level; ``None`` where all levels have as many.
    """

    anchors: list[Tensor]
    level_sizes: list[int]
    per_location: list[int] | None = None

    def stacked(self) -> Tensor:
        """All images' anchors, shape (batch, anchors, 4)."""
        return torch.stack(self.anchors)

    def per_level(self) -> list[int]:
        """How many anchors each level has."""
        alike = [len(self.anchors[0]) // sum(self.level_sizes)] * len(self.level_sizes)
        pairs = zip(self.level_sizes, self.per_location or alike, strict=True)
        return [size * per_location for size, per_location in pairs]

    def of_levels(self, image: int, levels: LevelPairs) -> Tensor:
        """An image's anchors (anchors, 4) on the teacher's levels that are used."""
        by_level = torch.split(self.anchors[image], self.per_level())
        return torch.cat([by_level[index] for index in levels.of_teacher(len(by_level))])


def check_forwards(side: str, detector: nn.Module, forwards: Forwards) -> None:
    """Raises ``ValueError`` for a part of a detector that computes otherwise than torchvision's own.

    Args:
        side: how to call the detector.
        detector: the detector.
        forwards: by path, the class whose forward a part must have.
    """
    for path, known in forwards:
        module = detector.get_submodule(path) if path else detector
        own: Any = type(module).forward
        if own is not known.forward or "forward" in vars(module):
            raise ValueError(
                f"{side}: {path or 'the detector'} is a {type(module).__name__} with a forward of its own, "
                f"which this adapter, made for {known.__name__}, does not know: write an adapter for it "
                "(crosskd.adapters.Adapter) and pass it as adapter="
            )


def check_anchor_settings(
    teacher: Any, student: Any, settings: Mapping[str, bool], levels: LevelPairs
) -> None:
    """Raises ``ValueError`` where the settings of two anchor generators differ.

    Args:
        teacher: the teacher's generator.
        student: the student's.
        settings: the names of the settings, one value a level, and whether they are in pixels.
        levels: which of the teacher's levels belongs to each of the student's.
    """
    for name, in_pixels in settings.items():
        scale = levels.scale if in_pixels else 1.0
        theirs, ours = (_plain(getattr(generator, name, None)) for generator in (teacher, student))
        if theirs is None or ours is None:
            continue  # a generator of the user's own: compared by its anchors on the first step
        paired = [theirs[i] for i in levels.of_teacher(len(theirs)) if i < len(theirs)]
        expected = len(ours) if levels.teacher is None else len(levels.teacher)
        if not len(paired) == len(ours) == expected:
            raise ValueError(
                f"the teacher's anchors have {len(theirs)} levels and the student's {len(ours)}, of "
                f"which {expected} are to be compared: build each with anchors for each of its own "
                "levels, the shared ones the same"
            )
        if not _scaled_alike(paired, ours, scale):
            times = "" if scale == 1 else f" times {scale:g}, as the strides are"
            raise ValueError(
                f"anchor {name} differ: {tuple(paired)} (teacher), {ours} (student){times}. Boxes "
                "predicted from different anchors can't be compared: build both detectors with the same "
                "anchor_generator, and train the teacher with it"
            )


def delta_coder_settings(*coders: Any) -> dict[str, list[Any]]:
    """What makes the same deltas the same boxes to torchvision's ``BoxCoder``, of each of some coders."""
    return {
        "coder": [type(coder).__qualname__ for coder in coders],
        "weights": [tuple(coder.weights) for coder in coders],
        "bbox_xform_clip": [coder.bbox_xform_clip for coder in coders],
    }


def check_box_coding(teacher: Any, student: Any) -> None:
    """Raises ``ValueError`` where what two box coders are set to differs."""
    if teacher != student:
        raise ValueError(
            f"box coding differs: {teacher} (teacher), {student} (student). Give both the same box "
            "coder, and train the teacher with it"
        )


def check_image_channels(teacher: Any, student: Any, levels: LevelPairs) -> None:
    """Raises ``ValueError`` where one's images have other channels than the other's, whose pixels it gets.

    Args:
        teacher: the teacher's transform, whose mean and deviation have one value a channel.
        student: the student's.
        levels: tell whether the teacher sees images of its own.
    """
    theirs, ours = (len(transform.image_mean) for transform in (teacher, student))
    check_channels(theirs, ours, levels, ", as the image_mean of each says")


def check_same_anchors(teacher: Locations, student: Locations, levels: LevelPairs) -> None:
    """Raises ``ValueError`` where the anchors of the two differ."""
    for image, ours in enumerate(student.anchors):
        theirs = teacher.of_levels(image, levels)
        # torchvision rounds anchors to whole pixels, which a factor enlarges.
        rounding = 1e-5 if levels.scale == 1 else max(levels.scale, 1.0)
        scaled = (levels.scale * ours).to(theirs)
        if theirs.shape != ours.shape or not torch.allclose(theirs, scaled, atol=rounding):
            times = "" if levels.scale == 1 else f" times {levels.scale:g}, as the strides are"
            raise ValueError(
                f"the anchors differ on the first batch: {tuple(theirs.shape)} (teacher), "
                f"{tuple(ours.shape)} (student){times}, or other places or sizes: give both detectors "
                "the same anchor_generator"
            )


def probed_strides(
    detector: Any, size: tuple[int, int] = (_PROBE_PIXELS, _PROBE_PIXELS)
) -> list[float] | None:
    """Pixels between neighbouring locations a level, or ``None`` where a probe does not pass.

    Args:
        detector: whose backbone gives a feature map, or a dict of them, finest first.
        size: (height, width) of the image to probe it with, in pixels.
    """
    backbone = frozen_copy(detector.backbone)
    parameter = next(backbone.parameters(), torch.empty(0))
    pixels = parameter.new_zeros(1, len(detector.transform.image_mean), *size)
    try:
        with torch.no_grad():
            maps = as_list(backbone(pixels))
    except Exception as error:  # noqa: BLE001  # a backbone may refuse this size in any way
        _logger.info("strides not checked at construction, the probe image failed: %s", error)
        return None
    return [size[1] / feature_map.shape[-1] for feature_map in maps]


class _PredictorsOnly:
    """Stands in for one of torchvision's heads in its own forward, as one whose tower is done already."""

    def __init__(self, head: nn.Module) -> None:
        self._head = head

    def conv(self, tower_output: Tensor) -> Tensor:
        return tower_output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)


def predict_from_tower(head: nn.Module, tower_output: Tensor) -> Any:
    """What one of torchvision's heads, by its own forward, predicts from its tower's output of one level."""
    return type(head).forward(_PredictorsOnly(head), [tower_output])  # type: ignore[arg-type, unused-ignore]


def decode_deltas(box_coder: Any, predictions: Predictions, locations: Locations) -> Tensor:
    """Boxes (batch, anchors, 4), xyxy in pixels, by torchvision's ``BoxCoder``, in float32 at least."""
    deltas = widened(predictions.regression)
    anchors = locations.stacked().to(deltas.dtype)
    boxes: Tensor = box_coder.decode_single(deltas.flatten(0, 1), anchors.flatten(0, 1))
    return boxes.view_as(deltas)


def widened(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(compute_dtype(tensor))


def as_list(features: Any) -> list[Tensor]:
    """A backbone's feature maps, finest first."""
    return [features] if isinstance(features, Tensor) else list(features.values())


def _plain(values: Any) -> Any:
    """Nested tuples of numbers, so that settings compare by value."""
    if isinstance(values, list | tuple):
        return tuple(_plain(value) for value in values)
    return float(values) if isinstance(values, int | float) else values


def _scaled_alike(theirs: Sequence[Any], ours: Sequence[Any], scale: float) -> bool:
    """Whether the teacher's numbers a level are the student's times a factor, which anchors round."""
    if scale == 1:
        return tuple(theirs) == tuple(ours)
    pairs = zip(theirs, ours, strict=True)
    return all(
        len(a) == len(b) and all(math.isclose(x, scale * y, rel_tol=0.03) for x, y in zip(a, b, strict=True))
        for a, b in pairs
    )
