"""What an adapter has, and what it says of a detector."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crosskd._conformance.bench import Bench, Finding, Part, run_head, told
from crosskd._heads import space
from crosskd.adapters.protocol import Adapter, SecondStage, TwoStageAdapter
from crosskd.head import Branch
from crosskd.methods.recipes import HeadRecipe
from crosskd.predictions import Predictions

__all__ = ["functions", "structure"]


def functions(bench: Bench) -> Iterator[Finding]:
    """Everything in the protocol is there, and both detectors are supported."""
    adapter = bench.adapter
    second = getattr(adapter, "second", None)
    yield from _lacks(adapter, Adapter, [] if second is None else [TwoStageAdapter])
    if second is not None:
        yield from _lacks(second, SecondStage)
        parts = getattr(adapter, "parts", None)
        if not (isinstance(parts, tuple) and len(parts) == 2 and len(set(parts)) == 2):
            yield Finding(
                f"{type(adapter).__name__}.parts is {parts!r}",
                "two names, of the first head and of the second",
                "it was left out, or names them alike",
            )
    for side, detector in (("teacher", bench.teacher), ("student", bench.student)):
        if callable(getattr(adapter, "supports", None)) and not adapter.supports(detector):
            yield Finding(
                f"supports() refuses the {side}, a {type(detector).__name__}",
                "true for both detectors",
                "it compares with another class",
            )


def _lacks(source: Any, protocol: type, further: Sequence[type] = ()) -> Iterator[Finding]:
    """The functions and the recipe of a protocol that something lacks."""
    names = [name for kind in (protocol, *further) for name in vars(kind) if not name.startswith("_")]
    missing = [name for name in names if not callable(getattr(source, name, None))]
    if missing:
        yield Finding(
            f"{type(source).__name__} has no function {', '.join(missing)}",
            f"every function of crosskd.adapters.{(protocol, *further)[-1].__name__}",
            "it was left out, or has another name",
        )
    if not isinstance(getattr(source, "recipe", None), HeadRecipe):
        yield Finding(
            f"{type(source).__name__} has no recipe",
            "an attribute recipe, a crosskd.methods.HeadRecipe",
            "it was left out",
        )


@torch.no_grad()
def structure(bench: Bench) -> list[Finding]:
    """Classes, strides, levels, branches and towers fit each other and the feature maps."""
    (_, teacher), (_, student) = bench.sides()
    for part in bench.parts(teacher, student):
        wrong = list(told(part.name, _structure_of(part, teacher, student)))
        if wrong:
            return wrong  # what a second head is fed depends on it
    return []


def _structure_of(part: Part, teacher: nn.Module, student: nn.Module) -> Iterator[Finding]:
    names = []
    for side, detector, maps, pixels in (
        ("teacher", teacher, part.teacher_maps, part.inputs.teacher_pixels),
        ("student", student, part.student_maps, part.inputs.student_pixels),
    ):
        names.append([branch.name for branch in part.source.branches(detector)])
        yield from _side_findings(part, side, detector, maps, pixels)
    if names[0] != names[1] or len(set(names[0])) < len(names[0]):
        yield Finding(
            f"the branches are {names[0]} (teacher) and {names[1]} (student)",
            "the same names in the same order, each of them once",
            "branches() goes through something without an order, or names a branch by its detector",
        )


def _side_findings(
    part: Part, side: str, detector: nn.Module, maps: Sequence[Tensor], pixels: Tensor
) -> Iterator[Finding]:
    source, branches = part.source, part.source.branches(detector)
    if isinstance(source, SecondStage):
        wrong, rows = list(_region_findings(source, part, side, maps)), [len(m) for m in maps]
    else:
        last = branches[0].towers[0].channels_last
        sizes = [space(m, last) for m in maps]
        wrong = [*_level_findings(source.strides(detector), side, sizes, tuple(pixels.shape[-2:]))]
        rows = [math.prod(size) for size in sizes]
    for branch in branches:
        wrong += _tower_findings(side, branch, maps)
    yield from wrong
    if wrong:
        return  # the head could not be run on these
    yield from _prediction_findings(part, side, detector, run_head(source, detector, maps).levels, rows)


def _prediction_findings(
    part: Part, side: str, detector: nn.Module, levels: Sequence[Predictions], rows: Sequence[int]
) -> Iterator[Finding]:
    """What is wrong with the predictions of each level.

    Args:
        part: the head.
        side: whose.
        detector: that one.
        levels: its predictions.
        rows: how many locations each level has, or how many regions.
    """
    classes = part.source.num_classes(detector)
    for level, predictions in enumerate(levels):
        anchors, found = predictions.logits.shape[1:]
        if found != classes:
            yield Finding(
                f"{side}: num_classes() says {classes}, the logits of level {level} are of {found}",
                "the same number",
                "one of them counts the background, or the anchors at a location",
            )
        if anchors % rows[level] or not anchors:
            yield Finding(
                f"{side}: level {level} has {rows[level]} locations and {anchors} rows of predictions",
                "as many rows at each location, one for each anchor",
                "predict() flattens other dimensions than those of the locations",
            )
        if predictions.background != part.source.recipe.background:
            yield Finding(
                f"{side}: recipe.background is {part.source.recipe.background}, that of the predictions of "
                f"level {level} {predictions.background}",
                "the same class, or None in both for a sigmoid a class",
                "predict() or the recipe leaves it out",
            )


def _region_findings(
    stage: SecondStage, part: Part, side: str, pooled: Sequence[Tensor]
) -> Iterator[Finding]:
    """What is wrong with what is pooled at the regions."""
    counts, images = list(stage.counts(part.regions)), len(part.inputs.student_pixels)
    rows = [len(features) for features in pooled]
    if len(counts) != images or rows != [sum(counts)]:
        yield Finding(
            f"{side}: counts() says {counts} regions for {images} images, features() gives {rows}",
            "one level, whose rows are the regions of all images, one image behind the other",
            "features() leaves regions out, adds some, or gives several levels",
        )


def _level_findings(
    strides: Sequence[float] | None, side: str, sizes: Sequence[tuple[int, ...]], pixels: tuple[int, ...]
) -> Iterator[Finding]:
    """What is wrong with levels of some sizes, (height, width), or (locations,) where those are listed."""
    areas = [math.prod(size) for size in sizes]
    if areas != sorted(areas, reverse=True):
        yield Finding(
            f"{side}: the levels are {list(sizes)}, as (height, width)",
            "the finest level first",
            "features() gives the levels in another order",
        )
    if strides is None:
        return
    if len(strides) != len(sizes):
        yield Finding(
            f"{side}: strides() gives {len(strides)} levels and features() {len(sizes)}",
            "one stride a level",
            "one of them leaves a level out",
        )
        return
    for level, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        expected = tuple(side / stride for side in pixels)
        if len(size) == len(expected) and any(abs(a - b) > 1 for a, b in zip(size, expected, strict=True)):
            yield Finding(
                f"{side}: strides() says {stride:g} for level {level}, whose map is {size} for pixels of "
                f"{pixels}",
                f"a map of about {tuple(math.ceil(number) for number in expected)}",
                "features() and strides() order the levels differently (finest first in both), or the "
                "strides are those of another backbone",
            )


def _tower_findings(side: str, branch: Branch, maps: Sequence[Tensor]) -> Iterator[Finding]:
    if len(branch.towers) not in (1, len(maps)):
        yield Finding(
            f"{side}: the {branch.name} branch has {len(branch.towers)} towers for {len(maps)} levels",
            "one tower for all levels, or one for each",
            "a level's tower was left out",
        )
        return
    for level, feature_map in enumerate(maps):
        tower = branch.tower(level)
        width = feature_map.shape[-1 if tower.channels_last else 1]
        if width != tower.width_in:
            yield Finding(
                f"{side}: the {tower.name} takes {tower.width_in} channels, the map of level {level} has "
                f"{width}",
                "the same width",
                "the tower lacks its first layers, or the levels stand in another order than the towers",
            )
