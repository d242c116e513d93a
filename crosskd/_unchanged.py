"""Runs code that must leave a module as it was."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["probing", "unchanged"]


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Puts back what runs inside has changed: buffers, attributes, modes, hooks, of all submodules.

    It works on no copy, because a forward that was replaced on the module may be bound to the module itself,
    and because there are modules that can't be copied, such as pruned ones.

    Args:
        module: whose parameters nothing inside changes: they alone are not put back.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with unchanged(norm):
        ...     _ = norm(torch.rand(4, 2))
        >>> norm.num_batches_tracked
        tensor(0)
    """
    modules = list(module.modules())
    attributes = [dict(vars(child)) for child in modules]
    contents: dict[int, tuple[Any, Any]] = {}
    for of_child in attributes:
        for value in of_child.values():
            _save(value, contents)
    try:
        yield
    finally:
        for child, of_child in zip(modules, attributes, strict=True):
            vars(child).clear()
            vars(child).update(of_child)
        for value, content in contents.values():
            _restore(value, content)


@contextmanager
def probing(module: nn.Module) -> Iterator[None]:
    """For a run that leaves no trace: in eval mode, without gradients, and without the user's hooks.

    Args:
        module: as for `unchanged`.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with probing(norm):
        ...     norm.training
        False
        >>> norm.training
        True
    """
    with torch.no_grad(), unchanged(module):
        module.eval()
        for inner in module.modules():
            inner._forward_hooks.clear()
            inner._forward_pre_hooks.clear()
        yield


def _save(value: Any, contents: dict[int, tuple[Any, Any]]) -> None:
    """Keeps what a tensor or a container holds."""
    if id(value) in contents:
        return
    if isinstance(value, dict | list | set | deque):
        contents[id(value)] = value, value.copy()
        for inner in value.values() if isinstance(value, dict) else value:
            _save(inner, contents)
    elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        contents[id(value)] = value, value.detach().clone()


def _restore(value: Any, content: Any) -> None:
    if isinstance(value, Tensor):
        # Not by its version, which batch norm doesn't count up. Nor is all of it written without need, for a
        # graph that was recorded before may hold it.
        if value.shape != content.shape:
            with torch.no_grad():
                value.resize_(content.shape)
        if not (value.is_meta or torch.equal(value, content)):
            # By .data, which doesn't count the version up: a graph may hold it with this very content.
            value.data.copy_(content)
        return
    value.clear()
    if isinstance(value, dict | set):
        value.update(content)
    else:
        value.extend(content)
