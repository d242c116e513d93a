"""A look at a detector's heads before choosing where to split them."""

from __future__ import annotations

from torch import nn

from crosskd.adapters import find_adapter
from crosskd.adapters.base import Adapter, AdapterSpec, Head
from crosskd.methods.settings import settings_for
from crosskd.towers import Block, Branch

__all__ = ["Description", "describe"]


class Description(str):
    """A text that shows itself as it is by ``print``, in a notebook and in the interpreter."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def describe(detector: nn.Module, adapter: AdapterSpec | None = None) -> Description:
    """A detector's levels, heads, branches, blocks, and the positions where it can be split.

    Args:
        detector: a detector that an adapter understands.
        adapter: makes the adapter of the detector; found from its type unless given.

    Returns:
        A text that shows itself.

    Raises:
        TypeError: no adapter understands the detector.
        ValueError: a tower that can't be split, by name.

    Example:
        >>> from torchvision.models.detection import fcos_resnet50_fpn
        >>> detector = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
        >>> describe(detector)
        FCOS, adapter TorchvisionFCOS
        strides per level: 8, 16, 32, 64, 128
        ...
    """
    bound = find_adapter(detector) if adapter is None else adapter(detector)
    lines = [f"{type(detector).__name__}, adapter {type(bound).__name__}", *_level_lines(bound)]
    for head in bound.heads:
        lines += _head_lines(head)
    if not bound.heads:
        lines.append("no head: it can be the teacher of methods of feature maps, such as crosskd.PKD()")
    return Description("\n".join(lines))


def _level_lines(adapter: Adapter) -> list[str]:
    lines = []
    for name, values in (("strides", adapter.strides), ("channels", adapter.widths)):
        numbers = "unknown" if values is None else ", ".join(f"{value:g}" for value in values)
        lines.append(f"{name} per level: {numbers}")
    return lines


def _head_lines(head: Head) -> list[str]:
    """A head, its branches, and what methods do for it unless they are given something else."""
    name = f"head {head.name}" if head.name else "head"
    background = "" if head.background is None else f", of which {head.background} is the background"
    lines = [f"{name}: {head.head_type}, {head.num_classes} classes{background}"]
    if head.rows == "queries":
        lines.append("its predictions are a set of queries, which no method compares row by row")
    for branch in head.branches:
        lines += _branch_lines(branch)
    if head.rows != "queries":
        known = settings_for(head)
        position = known.position
        weights = [
            f"cls_weight {known.cls_weight:g}",
            f"reg_weight {known.reg_weight:g} ({known.regression})",
        ]
        if known.quality_weight:
            weights.append(f"quality_weight {known.quality_weight:g}")
        split = "the last that leaves the teacher's tower a block" if position is None else str(position)
        origin = "published" if known.published else "ours, none are published"
        lines.append(f"settings unless given ({origin}): position {split}, {', '.join(weights)}")
    return lines


def _branch_lines(branch: Branch) -> list[str]:
    shared = len(branch.towers) == 1
    lines = []
    for level, tower in enumerate(branch.towers):
        levels = "shared by all levels" if shared else f"level {level}"
        count = len(tower.blocks)
        lines += [
            f"branch {branch.name}: {count} blocks, {levels}, valid positions 0 to {count}",
            f"  {'position':>8}  {'channels':>8}  {'taps':<9}  features after",
            f"  {0:>8}  {tower.width(0):>8}  {'post':<9}  (the tower's input)",
        ]
        for number, block in enumerate(tower.blocks, 1):
            taps = "post, pre" if block.has_pre else "post"
            lines.append(f"  {number:>8}  {tower.width(number):>8}  {taps:<9}  {_block_text(block)}")
    predictors = []
    for name, module in branch.predictors.items():
        width = getattr(module, "out_channels", getattr(module, "out_features", "?"))
        predictors.append(f"{name} ({width} channels)")
    return [*lines, f"  predictors: {', '.join(predictors)}"]


def _block_text(block: Block) -> str:
    modules = [*block.layers, *([] if block.activation is None or block.opaque else [block.activation])]
    return ", ".join(type(module).__name__ for module in modules)
