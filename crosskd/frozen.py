"""A frozen stand-in for a detector, which shares its numbers and leaves the detector itself alone."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

__all__ = ["frozen_copy", "sharing_memo"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def frozen_copy(detector: ModuleT) -> ModuleT:
    """A copy in eval mode whose parameters need no gradient; its tensors share the original's memory.

    The original keeps its mode and its parameters' ``requires_grad``: nothing of it is touched, and no
    memory is spent on a second set of weights.

    Args:
        detector: any module.

    Raises:
        TypeError: a module that ``copy.deepcopy`` can't copy.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> frozen = frozen_copy(layer)
        >>> frozen.weight.requires_grad, frozen.training, layer.weight.requires_grad, layer.training
        (False, False, True, True)
        >>> frozen.weight.data_ptr() == layer.weight.data_ptr()
        True
    """
    try:
        frozen = copy.deepcopy(detector, sharing_memo(detector))
    except Exception as error:
        raise TypeError(
            f"this {type(detector).__name__} can't be copied ({error}): the teacher is held as a frozen "
            "copy that shares its weights, so its attributes must allow copy.deepcopy"
        ) from error
    return frozen.eval()


def sharing_memo(detector: nn.Module) -> dict[int, Any]:
    """A memo for ``copy.deepcopy`` with which a copy's tensors are frozen and share the original's memory.

    Args:
        detector: whose parameters and buffers are shared.
    """
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
        for parameter in detector.parameters()
    }
    memo.update({id(buffer): buffer.detach() for buffer in detector.buffers()})
    return memo
