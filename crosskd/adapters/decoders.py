"""What the adapters of detection transformers share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["folded", "layer_states"]


def folded(memory: Tensor, sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Memory (batch, locations, channels) of all levels as one map (batch, channels, height, width) each.

    Example:
        >>> import torch
        >>> [tuple(level.shape) for level in folded(torch.rand(2, 20, 8), [(4, 4), (2, 2)])]
        [(2, 8, 4, 4), (2, 8, 2, 2)]
    """
    parts = torch.split(memory, [int(height) * int(width) for height, width in sizes], dim=1)
    return [
        part.mT.reshape(len(part), -1, int(height), int(width))
        for part, (height, width) in zip(parts, sizes, strict=True)
    ]


@contextmanager
def layer_states(
    layers: Sequence[nn.Module], count: int, states: Mapping[int, Tensor]
) -> Iterator[list[Tensor]]:
    """Records the outputs of the last layers while the body runs, some replaced by states.

    Args:
        layers: a decoder's.
        count: how many of them, the last ones, are meant.
        states: outputs to use instead, by a layer's index among those.

    Example:
        >>> import torch
        >>> layers = nn.ModuleList([nn.Identity(), nn.Identity()])
        >>> with layer_states(layers, 2, {0: torch.ones(1)}) as given:
        ...     last = layers[1](layers[0](torch.zeros(1)))
        >>> given
        [tensor([1.]), tensor([1.])]
    """
    given: list[Tensor] = []

    def keep(index: int, _: nn.Module, __: Any, state: Tensor) -> Tensor:
        given.append(states.get(index, state))
        return given[-1]

    with ExitStack() as hooks:
        for index, layer in enumerate(layers[-count:]):
            hooks.enter_context(layer.register_forward_hook(partial(keep, index)))
        yield given
