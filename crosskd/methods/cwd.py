"""CWD: each channel of the student is active where the teacher's is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from crosskd._checks import compute_dtype
from crosskd.adapters.base import Anchors
from crosskd.align import EPSILON, feature_statistics
from crosskd.losses import cwd_loss
from crosskd.methods.maps import MapMethod
from crosskd.pairing import (
    Pair,
    require_heads,
    require_rows_alike,
    require_same_anchors,
)
from crosskd.predictions import Predictions
from crosskd.schedule import Schedule
from crosskd.step import Side, Step

__all__ = ["CWD", "class_maps"]

# Published for feature maps alone; where class logits are compared as well, both have 5.
_MAPS = 10.0
_LOGITS = 5.0
# RTMDet's own recipe, temperature 1.
_NORMALIZED = 1.0
# The paper has one student for each; we take them for all students.


class CWD(MapMethod):
    r"""Channel-wise distillation: each channel as a distribution over the locations of its map.

    .. math::
        w \sum_l \frac{\tau^2}{C_l N} \sum_{n, c}
        \mathrm{KL}(\mathrm{softmax}(t_{lnc} / \tau) \,\|\, \mathrm{softmax}(s_{lnc} / \tau))

    where the softmax of a channel is over all of its locations. On feature maps only the strides of the
    levels must agree. On class logits each class of each of a location's anchors is a channel, so anchors,
    classes and the kind of the predictions must agree.

    Published on feature maps with the weight 10 and the temperature 1; with class logits beside them, 5 for
    either: ``[CWD(5.0), CWD(on="logits")]``. RTMDet was distilled with ``normalize=True``, weight 1 and
    temperature 1. That these hold for every type of student, and 5 for class logits alone, is our choice.

    Args:
        weight: of the loss; 10 on feature maps, 5 on class logits and 1 with ``normalize`` unless given.
        levels: the student's levels to use, counted from 0, the finest; all that have a counterpart unless
            given.
        on: what is compared, feature maps (``"maps"``) or class logits (``"logits"``).
        temperature: spreads the distributions over more locations; above 0.
        normalize: divides each channel by its deviation over batch and space first, on both sides. The mean,
            which PKD takes away as well, makes no difference to a softmax.
        resize: resizes the teacher's maps to the student's where they differ, and takes the teacher's level
            of the nearest stride where none is equal. Without it other sizes are refused.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the loss's name where two methods' would clash.
        head: with ``on="logits"``, of a detector with several heads the one to distil.

    Raises:
        ValueError: a weight or temperature that is not above 0, no levels, ``head`` without logits,
            ``resize`` with them.

    References:
        Channel-wise Knowledge Distillation for Dense Prediction (Shu et al., ICCV 2021).

    Example:
        >>> CWD(levels=(0, 1), temperature=4.0).extra_repr()
        "weight=None, levels=(0, 1), resize=False, on='maps', temperature=4.0, normalize=False"
    """

    def __init__(
        self,
        weight: float | None = None,
        levels: Sequence[int] | None = None,
        *,
        on: Literal["maps", "logits"] = "maps",
        temperature: float = 1.0,
        normalize: bool = False,
        resize: bool = False,
        schedule: Schedule | None = None,
        name: str = "cwd",
        head: str | None = None,
    ) -> None:
        super().__init__(weight, levels, resize=resize, schedule=schedule, name=name)
        if on not in ("maps", "logits"):
            raise ValueError(f'on must be "maps" or "logits", got {on!r}')
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if on == "maps" and head is not None:
            raise ValueError(f'head={head!r} chooses whose logits are compared: it needs on="logits"')
        if on == "logits" and resize:
            raise ValueError(
                "resize=True resizes feature maps; where logits are compared, leave it out and have the "
                "teacher's levels resized by Distiller(..., resize_levels=True)"
            )
        self.on, self.temperature, self.normalize, self.head = on, temperature, normalize, head
        if on == "logits":
            self.requires, self.teaches = frozenset({"predictions"}), "predictions"

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        own = f"on={self.on!r}, temperature={self.temperature}, normalize={self.normalize}"
        return f"{super().extra_repr()}, {own}"

    def weight_for(self, head_type: str) -> float:
        """The published weight of what is compared, whatever the student's type."""
        if self.normalize:
            return _NORMALIZED
        return _LOGITS if self.on == "logits" else _MAPS

    def setup(self, pair: Pair) -> None:
        """Matches the levels and settles the weight; makes projections, or demands heads that agree."""
        if self.on == "maps":
            super().setup(pair)
            return
        teacher, student = require_heads(pair)
        if "regions" in (teacher.rows, student.rows):
            raise ValueError(
                f"the {student.name or student.head_type} head answers for regions, whose logits are no map "
                'over the image: choose the head of a grid, head="rpn" in torchvision\'s detectors, or '
                'feature maps, on="maps"'
            )
        require_rows_alike(pair)
        self.matches = self._matched(pair)
        if self.weight is None:
            self.weight = self.weight_for(student.head_type)

    def check(self, step: Step) -> None:
        """With logits, demands as many anchors at a location, and the same if they are several."""
        if self.on == "maps":
            return
        theirs, ours = (_per_location(side) for side in (step.teacher, step.student))
        if theirs != ours:
            raise ValueError(
                f"the anchors at a location of each level are {theirs} (teacher), {ours} (student): the "
                "logits of one have no counterpart. Build both detectors with the same anchors and train the "
                'teacher with them, or choose feature maps, on="maps"'
            )
        if max(ours) > 1:
            require_same_anchors(step)

    def loss_names(self) -> tuple[str, ...]:
        """The only loss."""
        return ("kd_cwd",) if self.on == "maps" else ("kd_cwd_logits",)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Compares the maps level by level."""
        compared = self.compared(step) if self.on == "maps" else self._class_maps(step)
        losses = []
        for _, *maps in compared:
            student, teacher = map(_normalized, maps) if self.normalize else maps
            losses.append(cwd_loss(student, teacher, temperature=self.temperature))
        assert self.weight is not None
        return {self.loss_names()[0]: self.weight * torch.stack(losses).sum()}

    def _class_maps(self, step: Step) -> list[tuple[int, Tensor, Tensor]]:
        """(level, student's class logits, teacher's) as maps of each level that is compared."""
        anchors = step.student.anchors
        student = class_maps(step.student.predictions, anchors)
        teacher = class_maps(step.teacher.predictions, anchors)
        return [(level, student[level], teacher[level]) for level, _ in self.matches]


def class_maps(predictions: Predictions, anchors: Anchors) -> list[Tensor]:
    """Class logits as maps (batch, anchors of a location times classes, height, width), one per level.

    Args:
        predictions: of all levels, a location's anchors one behind the other, locations row by row.
        anchors: of the same levels, with their sizes.
    """
    levels = torch.split(predictions.class_logits(), list(anchors.per_level), dim=1)
    maps = []
    for rows, size in zip(levels, anchors.sizes, strict=True):
        channels = rows.reshape(rows.shape[0], math.prod(size), -1).transpose(1, 2)
        maps.append(channels.reshape(*channels.shape[:2], *size))
    return maps


def _normalized(features: Tensor) -> Tensor:
    """Features over each channel's deviation; their mean would cancel in the softmax over space."""
    dtype = compute_dtype(features)
    return features.to(dtype) / (feature_statistics(features).std + EPSILON)


def _per_location(side: Side) -> list[int]:
    """How many anchors a location has, level by level."""
    anchors = side.anchors
    if not anchors.sizes:
        raise ValueError(
            f"the {side.head.head_type} head's adapter doesn't give the size of its levels, so its logits "
            "can't be laid out as maps: give its Anchors sizes=, (height, width) of each level"
        )
    levels = zip(anchors.per_level, anchors.sizes, strict=True)
    return [count // math.prod(size) for count, size in levels]
