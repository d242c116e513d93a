"""What an adapter has, and what it says of a detector."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from crosskd._conformance.bench import Bench, Finding, run_through
from crosskd.adapters.protocol import Adapter
from crosskd.head import Branch
from crosskd.methods.recipes import HeadRecipe

__all__ = ["functions", "structure"]


def functions(bench: Bench) -> Iterator[Finding]:
    """Everything in the protocol is there, and both detectors are supported."""
    adapter = bench.adapter
    wanted = [name for name in vars(Adapter) if not name.startswith("_")]
    missing = [name for name in wanted if not callable(getattr(adapter, name, None))]
    if missing:
        yield Finding(
            f"{type(adapter).__name__} has no function {', '.join(missing)}",
            "every function of crosskd.adapters.Adapter",
            "it was left out, or has another name",
        )
    if not isinstance(getattr(adapter, "recipe", None), HeadRecipe):
        yield Finding(
            f"{type(adapter).__name__} has no recipe",
            "an attribute recipe, a crosskd.methods.HeadRecipe",
            "it was left out",
        )
    for side, detector in (("teacher", bench.teacher), ("student", bench.student)):
        if not missing and not adapter.supports(detector):
            yield Finding(
                f"supports() refuses the {side}, a {type(detector).__name__}",
                "true for both detectors",
                "it compares with another class",
            )


def structure(bench: Bench) -> Iterator[Finding]:
    """Classes, strides, levels, branches and towers fit each other and the feature maps."""
    (_, teacher), (_, student) = sides = bench.sides()
    inputs = bench.prepare(teacher, student)
    names = []
    with torch.no_grad():
        for (side, detector), pixels in zip(
            sides, (inputs.teacher_pixels, inputs.student_pixels), strict=True
        ):
            names.append([branch.name for branch in bench.adapter.branches(detector)])
            yield from _structure_of(bench.adapter, side, detector, pixels)
    if names[0] != names[1] or len(set(names[0])) < len(names[0]):
        yield Finding(
            f"the branches are {names[0]} (teacher) and {names[1]} (student)",
            "the same names in the same order, each of them once",
            "branches() goes through something without an order, or names a branch by its detector",
        )


def _structure_of(adapter: Adapter, side: str, detector: nn.Module, pixels: Tensor) -> Iterator[Finding]:
    maps, branches = list(adapter.features(detector, pixels)), adapter.branches(detector)
    last = branches[0].towers[0].channels_last
    sizes = [tuple(m.shape[1:-1] if last else m.shape[2:]) for m in maps]
    wrong = [*_level_findings(adapter.strides(detector), side, sizes, tuple(pixels.shape[-2:]))]
    for branch in branches:
        wrong += _tower_findings(side, branch, maps)
    yield from wrong
    if wrong:
        return  # the head could not be run on these
    classes = adapter.num_classes(detector)
    for level, predictions in enumerate(run_through(adapter, detector, pixels).levels):
        anchors, found = predictions.logits.shape[1:]
        if found != classes:
            yield Finding(
                f"{side}: num_classes() says {classes}, the logits of level {level} are of {found}",
                "the same number",
                "one of them counts the background, or the anchors at a location",
            )
        if anchors % math.prod(sizes[level]) or not anchors:
            yield Finding(
                f"{side}: level {level} has {math.prod(sizes[level])} locations and {anchors} rows of "
                "predictions",
                "as many rows at each location, one for each anchor",
                "predict() flattens other dimensions than those of the locations",
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
