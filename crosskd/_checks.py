"""Checks of tensors and numbers: every message names the argument, what it is and what was expected."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor


def shape_text(tensor: Tensor) -> str:
    """Writes a tensor's shape the way error messages show it, ``(2, 5)``."""
    return str(tuple(tensor.shape))


def require_floating(**tensors: Tensor) -> None:
    """Raises ``TypeError`` for the first argument that is not a floating-point tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(
                f"{name} must hold floating-point numbers, got {tensor.dtype}: "
                f"convert it with {name}.float() first"
            )


def require_same_shape(**tensors: Tensor) -> None:
    """Raises ``ValueError`` unless all arguments have one shape."""
    first, *others = [tensor.shape for tensor in tensors.values()]
    if any(shape != first for shape in others):  # not a set: sizes that torch.jit.trace records don't hash
        shapes = ", ".join(f"{name} {shape_text(tensor)}" for name, tensor in tensors.items())
        raise ValueError(f"expected tensors of one shape, got {shapes}")


def require_last_dimension(size: int, meaning: str, **tensors: Tensor) -> None:
    """Raises ``ValueError`` unless the last dimension of each argument is ``size``."""
    for name, tensor in tensors.items():
        if tensor.ndim == 0 or tensor.shape[-1] != size:
            raise ValueError(f"{name} must have shape (..., {size}), {meaning}, got {shape_text(tensor)}")


def require_rows(name: str, tensor: Tensor) -> None:
    """Raises ``ValueError`` unless a tensor has at least the dimension that a row runs along."""
    if tensor.ndim == 0:
        raise ValueError(f"{name} must have shape (..., classes), got a tensor without dimensions")


def require_numbers(**numbers: float | None) -> None:
    """Raises ``TypeError`` for the first argument that is no number; ``None`` is not given."""
    for name, number in numbers.items():
        if not isinstance(number, Real | Tensor | None):
            raise TypeError(
                f"{name} must be a number, got a {type(number).__name__}: what changes a method's weights "
                "over the run is its schedule="
            )


def require_not_negative(**numbers: float | None) -> None:
    """Raises ``ValueError`` for the first argument that is below 0 or not finite; ``None`` is not given."""
    require_numbers(**numbers)
    for name, number in numbers.items():
        if number is not None and not 0 <= number < math.inf:
            raise ValueError(f"{name} must be 0 or more, got {number}")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The type to calculate in: float32, or float64 where an input has it, never less.

    Half-precision inputs are widened because a box area of 300 x 300 pixels already overflows float16.
    """
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32
