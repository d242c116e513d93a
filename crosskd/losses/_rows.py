"""What the losses share: their conventions for rows, weights and normalizers, and their checks."""

from __future__ import annotations

import math
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active

from crosskd._checks import require_floating, require_rows, require_same_shape, shape_text

__all__ = ["check_beta", "check_logits", "has_kernel", "is_followed", "power", "weighted"]


def weighted(row_losses: Tensor, weight: Tensor | None, normalizer: Tensor | float | None) -> Tensor:
    """Turns one loss per row into a scalar, weighted and normalised.

    Args:
        row_losses: one loss per row, any shape.
        weight: one number per row, of the same shape, or ``None`` for ones.
        normalizer: what the sum is divided by, or ``None`` for the number of rows.
    """
    if weight is not None:
        if weight.shape != row_losses.shape:
            raise ValueError(
                f"weight must hold one number per row: expected {shape_text(row_losses)}, "
                f"got {shape_text(weight)}"
            )
        row_losses = row_losses * weight.detach().to(row_losses.dtype)
    total = row_losses.sum()
    if normalizer is None:
        return total / max(row_losses.numel(), 1)
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must be one number, got shape {shape_text(normalizer)}")
        # Elsewhere reading it would make the device wait, or can't be followed.
        if normalizer.device.type == "cpu" and not is_followed() and not float(normalizer) > 0:
            hint = ": look for predictions that are not finite" if normalizer.isnan() else ""
            raise ValueError(f"normalizer must be above 0, got {float(normalizer)}{hint}")
        return total / normalizer.detach().to(total.dtype).reshape(())
    if not 0 < normalizer < math.inf:
        raise ValueError(f"normalizer must be above 0, got {normalizer}")
    return total / normalizer


def is_followed() -> bool:
    """Whether operators are recorded or transformed: by a compiler, ``torch.jit.trace``, ``torch.func``."""
    # The compiler is asked first: it can't follow the other two.
    if torch.compiler.is_compiling():
        return True
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
    return bool(tracing or _are_functorch_transforms_active())


def has_kernel(student_logits: Tensor, teacher_logits: Tensor) -> bool:
    """Whether Triton's kernels take these: both on one GPU, contiguous, of 32 bits or less."""
    if not student_logits.is_cuda or student_logits.device != teacher_logits.device:
        return False
    sides = (student_logits, teacher_logits)
    read = all(side.dtype in _OF_KERNELS and side.is_contiguous() for side in sides)
    return read and student_logits.numel() > 0 and _has_triton(student_logits.device)


_OF_KERNELS = (torch.float32, torch.float16, torch.bfloat16)


@lru_cache
def _has_triton(device: torch.device) -> bool:
    # Not on Windows; and older GPUs than these are none of Triton's.
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)


def check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    require_floating(student_logits=student_logits, teacher_logits=teacher_logits)
    require_rows("student_logits", student_logits)
    require_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)


def check_beta(beta: float) -> None:
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be 0 or more, got {beta}")


def power(distance: Tensor, exponent: float) -> Tensor:
    """A power whose slope at 0 counts as 0, the minimum, where below 1 it would be infinite."""
    if exponent >= 1:
        return distance if exponent == 1 else distance.pow(exponent)
    equal = distance == 0
    return distance.masked_fill(equal, 1.0).pow(exponent).masked_fill(equal, 0.0)
