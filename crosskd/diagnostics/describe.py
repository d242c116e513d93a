"""A look at a detector's head before choosing where to split it."""

from __future__ import annotations

from torch import nn

from crosskd.adapters import Adapter, find_adapter
from crosskd.adapters.protocol import heads_of
from crosskd.head import Block, Branch

__all__ = ["describe"]


def describe(detector: nn.Module, adapter: Adapter | None = None) -> str:
    """Prints a detector's branches, blocks, widths, levels and the positions it can be split at.

    Args:
        detector: a detector that an adapter understands.
        adapter: the adapter, where it can't be found from the detector's type.

    Returns:
        The printed text.

    Raises:
        TypeError: no adapter understands the detector.
        ValueError: a tower that can't be split, by name.

    Example:
        >>> from torchvision.models.detection import fcos_resnet50_fpn
        >>> detector = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
        >>> print(describe(detector).splitlines()[0])  # doctest: +ELLIPSIS
        FCOS ...
    """
    adapter = find_adapter(detector) if adapter is None else adapter
    lines = [f"{type(detector).__name__} (settings: {adapter.recipe.head})"]
    for part, source in heads_of(adapter).items():
        lines += [f"part {part}"] if part else []
        for branch in source.branches(detector):
            lines += _branch_lines(branch)
        lines.append(_position_text(source.recipe.position))
    text = "\n".join(lines)
    print(text)
    return text


def _position_text(position: int | None) -> str:
    if position is None:
        return "position unless given: the last that leaves the teacher's tower a block"
    return f"position unless given: {position}"


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
    predictors = ", ".join(
        f"{name} ({getattr(module, 'out_channels', getattr(module, 'out_features', '?'))} channels)"
        for name, module in branch.predictors.items()
    )
    return [*lines, f"  predictors: {predictors}"]


def _block_text(block: Block) -> str:
    modules = [*block.layers, *([] if block.activation is None or block.opaque else [block.activation])]
    return ", ".join(type(module).__name__ for module in modules)
