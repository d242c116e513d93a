"""What a detection head is made of: branches of towers and predictors, split after any block.

A *branch* (classification, regression) is a *tower* of *blocks*, shared by all levels or one per level,
followed by *predictors*. `Tower.run` passes features through a whole tower and keeps them at *tap
points*; `Tower.tail` takes features up at a tap point and passes them through the rest. Neither changes
a module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from crosskd._measured import bends, ending_activation, is_elementwise, measured_widths

__all__ = ["Block", "Branch", "Tap", "TapPoint", "Tapped", "Tower", "split_tower"]

Tap = Literal["post", "pre"]

_ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.GLU,
)


class TapPoint(NamedTuple):
    """A place in a tower: after ``position`` blocks, after or before the last one's activation.

    Attributes:
        position: how many blocks the features have passed; 0 is the tower's input.
        tap: ``"post"`` for after the block's activation, ``"pre"`` for before it. At position 0 there
            is no activation and the two are the same place.
    """

    position: int
    tap: Tap


@dataclass(frozen=True, eq=False)
class Tapped:
    r"""Features kept at a tap point, refusing to be read once something has written over them.

    Attributes:
        place: how errors call the tap point.
        features: shape (batch, channels, \*space).
        version: the tensor's in-place version when it was tapped.
    """

    place: str
    features: Tensor
    version: int

    @classmethod
    def at(cls, place: str, features: Tensor) -> Tapped:
        """Features as they are now, tapped at a place."""
        return cls(place, features, _version(features))

    def read(self) -> Tensor:
        """The features.

        Raises:
            ValueError: a later layer has overwritten them in place.
        """
        if _version(self.features) != self.version:
            raise ValueError(
                f"the features tapped at {self.place} were overwritten in place by a later layer: "
                "make that layer work out of place (inplace=False)"
            )
        return self.features


def _version(tensor: Tensor) -> int:
    # Neither the compiler nor inference mode keeps versions; eager training, which does, finds the fault.
    if torch.compiler.is_compiling() or tensor.is_inference():
        return 0
    return tensor._version


@dataclass(frozen=True, eq=False)
class Block:
    """A convolution (or linear layer) with its normalisation and activation.

    Attributes:
        layers: what runs before the activation, in order.
        activation: the activation that ends the block, if it has one.
        opaque: one module runs as a whole, activation included: a tap before it cannot be taken.
    """

    layers: tuple[nn.Module, ...]
    activation: nn.Module | None = None
    opaque: bool = False

    def body(self, features: Tensor) -> Tensor:
        """Runs everything but the activation (everything, for an opaque block)."""
        for layer in self.layers:
            features = layer(features)
        return features

    def activate(self, features: Tensor) -> Tensor:
        """Runs the activation, on a copy if it works in place: what it is given stays as it is."""
        if self.activation is None:
            return features
        if getattr(self.activation, "inplace", False):
            features = features.clone()
        activated: Tensor = self.activation(features)
        return activated

    def __call__(self, features: Tensor) -> Tensor:
        """Runs the whole block, as the detector itself would."""
        features = self.body(features)
        if self.activation is None or self.opaque:
            return features
        activated: Tensor = self.activation(features)
        return activated

    @cached_property
    def has_pre(self) -> bool:
        """Whether a tap before the activation can be taken: none is, or may be, hidden in the layers."""
        if self.opaque or self.activation is not None:
            return not self.opaque
        inside = [module for layer in self.layers for module in layer.modules()]
        width = self.widths[1] if self.widths else 0
        return not any(_is_activation(m, width) or _runs_its_own_way(m) or _hides(m, width) for m in inside)

    @property
    def starts_in_place(self) -> bool:
        """Whether the first layer would overwrite the block's input."""
        first = next((m for m in self.layers[0].modules() if not list(m.children())), None)
        return bool(getattr(first, "inplace", False))

    @cached_property
    def widths(self) -> tuple[int, int] | None:
        """Channels in and out, where a layer says so."""
        leaves = [leaf for layer in self.layers for leaf in layer.modules()]
        ins = [_first_integer(leaf, "in_channels", "in_features") for leaf in leaves]
        outs = [_first_integer(leaf, "out_channels", "out_features") for leaf in leaves]
        known_ins, known_outs = ([width for width in side if width is not None] for side in (ins, outs))
        if not known_ins or not known_outs:
            return None
        found, several = None, len({*known_ins, *known_outs}) > 1
        # Layers may stand in another order than they run in, as a LoRA's do.
        if several and any(_runs_its_own_way(layer) for layer in self.layers):
            whole, last = nn.Sequential(*self.layers), _takes_channels_last([self])
            found = measured_widths(whole, dict.fromkeys(known_ins), channels_last=last)
        return found or (known_ins[0], known_outs[-1])


def _first_integer(module: nn.Module, *names: str) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _is_weighted_leaf(module: nn.Module) -> bool:
    """A layer that mixes channels: normalisations and activations have at most 1-d parameters."""
    return any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))


def _runs_its_own_way(module: nn.Module) -> bool:
    """A module with children and a forward that is more than one child after the other."""
    own = type(module).forward is not nn.Sequential.forward or "forward" in vars(module)
    return any(True for _ in module.children()) and own


def _is_torchs(layer: nn.Module) -> bool:
    """One of PyTorch's layers, which does what it is called, and is no activation unless it is listed."""
    kind = type(layer).__module__
    known = kind.startswith("torch.nn.modules.") and not kind.endswith(".activation")
    return known and "forward" not in vars(layer)


def _is_activation(layer: nn.Module, width: int) -> bool:
    """Whether a layer is an activation, also one that nobody has listed.

    Args:
        layer: any module.
        width: channels of its input.
    """
    if isinstance(layer, _ACTIVATIONS):
        return True
    if not width or _is_torchs(layer) or any(True for _ in layer.children()) or _is_weighted_leaf(layer):
        return False
    return is_elementwise(layer, width) and bool(bends(layer, width))


def _hides(layer: nn.Module, width: int) -> bool:
    """Whether a layer that isn't an activation may apply one inside its own forward."""
    if _is_torchs(layer) or any(True for _ in layer.children()):
        return False
    given = _first_integer(layer, "in_channels", "in_features") or width
    return not given or bends(layer, given, channels_last=isinstance(layer, nn.Linear)) is not False


def _composite_block(module: nn.Module) -> Block:
    """A block that stands in the tower as one module with children."""
    # children() would name a module that stands there twice but once.
    children = [child for child in module._modules.values() if child is not None]
    if not _runs_its_own_way(module):
        return _flat_block(children)
    block = Block((module,), opaque=True)
    activations = [inner for inner in module.modules() if isinstance(inner, _ACTIVATIONS)]
    if not activations or block.widths is None:
        return block
    last, width = _takes_channels_last([block]), block.widths[0]
    measured, ending = ending_activation(module, activations, width, channels_last=last)
    if not measured and isinstance(children[-1], _ACTIVATIONS):
        ending = children[-1]
    return Block((module,), ending, opaque=True)


def _flat_block(layers: list[nn.Module]) -> Block:
    """A block of layers that run one after the other."""
    *body, last = layers
    before = Block(tuple(body)) if body else None
    if before is not None and _is_activation(last, before.widths[1] if before.widths else 0):
        return replace(before, activation=last)
    return Block(tuple(layers))


def split_tower(tower: nn.Module | Iterable[nn.Module], name: str = "tower") -> tuple[Block, ...]:
    """Groups a tower's layers into blocks.

    A child with children of its own (torchvision's ``Conv2dNormActivation``, mmdet's ``ConvModule``, a
    user's class) is one block. Among flat layers each convolution or linear layer starts a block, and
    the normalisations and activations behind it belong to it; so does an ``nn.Flatten`` in front of it.

    Args:
        tower: an ``nn.Sequential``, an ``nn.ModuleList`` or any sequence of modules, run in order.
        name: what to call the tower in an error.

    Raises:
        ValueError: a single module of its own kind, layers before the first convolution, or an
            ``nn.Flatten`` behind the last.
        TypeError: something in the sequence that is not a module.

    Example:
        >>> blocks = split_tower(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
        >>> [len(block.layers) for block in blocks], blocks[0].activation
        ([1, 1], ReLU())
    """
    if isinstance(getattr(tower, "_orig_mod", None), nn.Module):
        raise ValueError(
            f"{name} was compiled on its own, but distillation runs it block by block: leave it uncompiled, "
            "and call torch.compile(distiller) instead"
        )
    if isinstance(tower, nn.Module) and not isinstance(tower, nn.Sequential | nn.ModuleList):
        raise ValueError(
            f"{name} is a {type(tower).__name__}, which cannot be split: expected an nn.Sequential, "
            "an nn.ModuleList or a sequence of modules that run one after the other"
        )
    blocks: list[Block] = []
    flat: list[nn.Module] = []

    def close() -> None:
        if flat:
            blocks.append(_flat_block(flat))
            flat.clear()

    for number, layer in enumerate(tower):  # ModuleList and Sequential both iterate
        if not isinstance(layer, nn.Module):
            raise TypeError(f"{name}: layer {number} is a {type(layer).__name__}, expected an nn.Module")
        if any(True for _ in layer.children()):
            close()
            blocks.append(_composite_block(layer))
        elif isinstance(layer, nn.Flatten):
            close()
            flat.append(layer)
        elif _is_weighted_leaf(layer):
            if not all(isinstance(before, nn.Flatten) for before in flat):
                close()
            flat.append(layer)
        elif flat or not blocks:
            flat.append(layer)
        else:
            # A loose normalisation or activation behind a composite block: part of that block.
            previous = blocks.pop()
            joined = (*previous.layers, *([previous.activation] if previous.activation else []))
            blocks.append(_rejoin(previous, joined, layer))
    close()
    first = blocks[0].layers if blocks else ()
    if blocks and not any(_is_weighted_leaf(m) for layer in first for m in layer.modules()):
        raise ValueError(
            f"{name} starts with {type(first[0]).__name__}, before any convolution or "
            "linear layer: move it out of the tower, or hand in the blocks yourself"
        )
    if blocks and all(isinstance(layer, nn.Flatten) for layer in blocks[-1].layers):
        raise ValueError(
            f"{name} ends in an nn.Flatten, with no convolution or linear layer behind it: leave it to the "
            "predictors"
        )
    return tuple(blocks)


def _takes_channels_last(blocks: Iterable[Block]) -> bool:
    layers = (leaf for block in blocks for layer in block.layers for leaf in layer.modules())
    first = next((leaf for leaf in layers if _is_weighted_leaf(leaf) or isinstance(leaf, nn.Flatten)), None)
    return isinstance(first, nn.Linear | nn.MultiheadAttention)


def _rejoin(previous: Block, joined: tuple[nn.Module, ...], layer: nn.Module) -> Block:
    layers = previous.layers if previous.opaque else joined
    if _is_activation(layer, previous.widths[1] if previous.widths else 0):
        return Block(layers, activation=layer)
    return Block((*layers, layer))


@dataclass(frozen=True, eq=False)
class Tower:
    """Blocks that run one after the other.

    Attributes:
        name: how errors call it, for example ``"classification tower"``.
        blocks: the blocks in order; none for a head that is a single convolution.
        width_in: channels of the tower's input.
        channels_last: whether it takes (batch, …, channels), as linear layers do, and not
            (batch, channels, …), as convolutions do.
    """

    name: str
    blocks: tuple[Block, ...]
    width_in: int
    channels_last: bool = False

    @classmethod
    def of(
        cls,
        modules: nn.Module | Iterable[nn.Module],
        name: str,
        width_in: int | None = None,
        channels_last: bool | None = None,
    ) -> Tower:
        """Splits modules into a tower.

        Args:
            modules: as for `split_tower`.
            name: how errors call the tower.
            width_in: channels of the input; read off the first block unless given.
            channels_last: whether the input's channels come last; so they do, unless this is given,
                where the first layer with weights is a linear or an attention layer.

        Raises:
            ValueError: no layer has the input's width, or modules that can't be split.
        """
        blocks = split_tower(modules, name)
        if width_in is None:
            widths = blocks[0].widths if blocks and not isinstance(blocks[0].layers[0], nn.Flatten) else None
            if widths is None:
                raise ValueError(f"{name}: no layer has its input width; hand in width_in")
            width_in = widths[0]
        if channels_last is None:
            channels_last = _takes_channels_last(blocks)
        return cls(name, blocks, width_in, channels_last)

    def width(self, position: int) -> int:
        """Channels of the features after ``position`` blocks."""
        for block in reversed(self.blocks[:position]):
            if block.widths is not None:
                return block.widths[1]
        return self.width_in

    def is_flat(self, position: int) -> bool:
        """Whether the features after ``position`` blocks are vectors, which an ``nn.Flatten`` has made."""
        layers = [layer for block in self.blocks[:position] for layer in block.layers]
        return any(isinstance(leaf, nn.Flatten) for layer in layers for leaf in layer.modules())

    def check(self, point: TapPoint) -> None:
        """Raises ``ValueError``, naming the tower and what would fit, unless it can be split there."""
        if point.tap not in ("post", "pre"):
            raise ValueError(f'tap must be "post" or "pre", got {point.tap!r}')
        if not 0 <= point.position <= len(self.blocks):
            raise ValueError(
                f"position {point.position} does not fit the {self.name} of {len(self.blocks)} "
                f"blocks: choose from 0 (its input) to {len(self.blocks)} (its output)"
            )
        if point.tap == "pre" and point.position and not self.blocks[point.position - 1].has_pre:
            layers = ", ".join(type(layer).__name__ for layer in self.blocks[point.position - 1].layers)
            fitting = [0, *(n for n, b in enumerate(self.blocks, 1) if b.has_pre)]
            raise ValueError(
                f'tap="pre" at position {point.position}: block {point.position} of the {self.name} '
                f"({layers}) does not end in an activation that can be left out; "
                f'choose tap="post", or a position of {fitting}'
            )

    def run(self, features: Tensor, points: Collection[TapPoint]) -> tuple[Tensor, dict[TapPoint, Tapped]]:
        r"""Passes features through the whole tower, keeping them at some points on the way.

        A tapped tensor is never overwritten: what would work on it in place works on a copy.

        Args:
            features: shape (batch, channels, \*space); (batch, \*space, channels) for linear layers.
            points: where to tap the features.

        Returns:
            The tower's output, and the features (batch, channels, \*space) at each of the points.
        """
        place = f"the {self.name}, position"

        def tap(number: int) -> Tapped:
            tapped = features.movedim(-1, 1) if self.channels_last else features
            return Tapped.at(f"{place} {number}", tapped)

        taps = {p: tap(0) for p in points if p.position == 0}
        tapped = bool(taps)
        for number, block in enumerate(self.blocks, 1):
            if tapped and block.starts_in_place:
                features = features.clone()
            before, after = TapPoint(number, "pre"), TapPoint(number, "post")
            if before in points:
                features = block.body(features)
                taps[before] = tap(number)
                features = block.activate(features)
            else:
                features = block(features)
            if after in points:
                taps[after] = tap(number)
            tapped = after in points or (before in points and block.activation is None)
        return features, taps

    def tail(self, features: Tensor, point: TapPoint) -> Tensor:
        r"""Takes features up at a tap point, as the CrossKD head does, and passes them through the rest.

        The activation of the block before the split is run in either case: for ``"pre"`` it is the one
        that the features have not had yet; for ``"post"`` they have been aligned since, so that they
        pass it once more. At position 0 there is none, nor can one be run again that is no module but
        part of the block's own forward.

        Args:
            features: shape (batch, channels, \*space), aligned to this tower.
            point: where they were tapped.
        """
        if self.channels_last:
            features = features.movedim(1, -1)
        if point.position:
            features = self.blocks[point.position - 1].activate(features)
        for block in self.blocks[point.position :]:
            features = block(features)
        return features


@dataclass(frozen=True, eq=False)
class Branch:
    """One tower over all levels, or one per level, and the predictors that follow it.

    Attributes:
        name: ``"classification"``, ``"regression"``…
        towers: one that all levels share, or one per level.
        predictors: the modules behind the towers, for their names and widths.
    """

    name: str
    towers: tuple[Tower, ...]
    predictors: Mapping[str, nn.Module]

    def tower(self, level: int) -> Tower:
        """The tower that a level's features pass.

        Raises:
            ValueError: there are several towers, but none for this level.
        """
        if len(self.towers) == 1:
            return self.towers[0]
        if level >= len(self.towers):
            raise ValueError(
                f"the {self.name} branch has towers for {len(self.towers)} levels, but there is a level "
                f"{level + 1}: give it one tower per level, or a single one for all"
            )
        return self.towers[level]

    def check(self, point: TapPoint) -> None:
        """Raises ``ValueError`` unless each tower can be split at a point."""
        for tower in self.towers:
            tower.check(point)
