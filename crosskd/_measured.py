"""What a layer does, measured on a small input, because types and attributes don't tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crosskd._unchanged import probing

__all__ = ["bends", "ending_activation", "is_elementwise", "measured_widths"]

_SIDE = 8

Hooks = Mapping[nn.Module, Callable[[nn.Module, Any, Tensor], None]]


def measured_widths(
    module: nn.Module, candidates: Iterable[int], *, channels_last: bool
) -> tuple[int, int] | None:
    """Channels in and out of a module; ``None`` if it takes none of the widths.

    Args:
        module: whose layers say different widths.
        candidates: what they say, the first that it takes is its own.
        channels_last: whether it takes (batch, height, width, channels).
    """
    for width in candidates:
        outputs = _outputs(module, [_features(width, channels_last)])
        if outputs is not None:
            return width, outputs[0].shape[-1 if channels_last else 1]
    return None


def is_elementwise(module: nn.Module, width: int) -> bool:
    """Whether each number of a module's output is made of the one at its place alone.

    Args:
        module: a single layer.
        width: channels of its input.
    """
    features = _features(width)
    changed = (2.3 * torch.arange(features.numel())).sin() > 0  # in no order of channels or places
    other = features + changed.view(features.shape)
    outputs = _outputs(module, [features, other])
    if outputs is None or any(output.shape != features.shape for output in outputs):
        return False
    one, two = (output.reshape(-1)[~changed.to(output.device)] for output in outputs)
    return torch.equal(one, two)


def bends(module: nn.Module, width: int, *, channels_last: bool = False) -> bool | None:
    """Whether a module is no straight line, as an activation isn't; ``None`` where that can't be measured.

    A normalisation counts as straight: negating its input negates its output. Odd activations do that, too,
    but those are known by working element by element.

    Args:
        module: a single layer.
        width: channels of its input.
        channels_last: likewise.
    """
    features = _features(width, channels_last)
    outputs = _outputs(module, [features, -features, 0 * features, features / 2])
    if outputs is None or any(output.shape != outputs[0].shape for output in outputs):
        return None
    plus, minus, zero, half = (output.double() for output in outputs)
    size = plus.abs().max().clamp(min=1e-6)
    mirrored = (plus + minus - 2 * zero).abs().max() <= 1e-4 * size
    halved = (plus + zero - 2 * half).abs().max() <= 1e-4 * size
    mixes = any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))
    straight = mirrored & halved if mixes or is_elementwise(module, width) else mirrored
    return not bool(straight)


def ending_activation(
    module: nn.Module, activations: Sequence[nn.Module], width: int, *, channels_last: bool
) -> tuple[bool, nn.Module | None]:
    """Whether it could be measured, and which of some activations gives a module's output, if one does.

    Args:
        module: with children and a forward of its own.
        activations: inside it.
        width: channels of its input.
        channels_last: likewise.
    """
    seen: dict[int, Tensor] = {}

    def keep(activation: nn.Module, _: Any, output: Tensor) -> None:
        seen[id(activation)] = output.clone()

    outputs = _outputs(module, [_features(width, channels_last)], dict.fromkeys(activations, keep))
    if outputs is None:
        return False, None
    ends = [a for a in activations if id(a) in seen and torch.equal(seen[id(a)], outputs[0])]
    return True, ends[-1] if ends else None


def _features(width: int, channels_last: bool = False) -> Tensor:
    """Numbers between -8 and 8, where activations that are clipped are bent, without drawing any."""
    shape = (1, _SIDE, _SIDE, width) if channels_last else (1, width, _SIDE, _SIDE)
    return 8 * (1.7 * torch.arange(1, 1 + width * _SIDE**2, dtype=torch.float64)).sin().view(shape)


def _outputs(module: nn.Module, inputs: Sequence[Tensor], hooks: Hooks | None = None) -> list[Tensor] | None:
    """A module's outputs in eval mode; ``None`` where it refuses an input. Leaves no trace."""
    like = next(module.parameters(), torch.empty(0))
    try:
        with probing(module):
            for inner, hook in (hooks or {}).items():
                inner.register_forward_hook(hook)
            outputs = [module(features.to(like.device, like.dtype)) for features in inputs]
    except Exception:  # noqa: BLE001  # a module may refuse this input in any way
        return None
    return [output.clone() for output in outputs] if all(isinstance(o, Tensor) for o in outputs) else None
