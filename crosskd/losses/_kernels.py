"""Dense losses of a GPU in one kernel forward and one backward, written in Triton, which PyTorch brings.

Imported by those that call it, so that nothing else waits for Triton. Numbers of any type are read, and all
is calculated in float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "distribution_kl_gradient",
    "distribution_kl_rows",
    "quality_focal_gradient",
    "quality_focal_rows",
]

_BLOCK = 2048  # numbers a program works on: 16 for each of its 128 threads


@triton.jit
def _cross_entropy(student, target):
    """Of a probability against a logit. log1p by hand, for log(1 + e) is 0 where e is below 1e-7."""
    small = tl.exp(-tl.abs(student))
    above_one = 1 + small
    rest = tl.where(above_one == 1, 1.0, above_one - 1)
    log1p = tl.where(above_one == 1, small, tl.log(above_one) * (small / rest))
    return tl.maximum(student, 0.0) - student * target + log1p


@triton.jit
def _power(distance, exponent: tl.constexpr):
    """As `crosskd.losses._rows.power`: 0 stays 0 where the exponent is below 1, too."""
    equal = distance == 0
    return tl.where(equal, 0.0, tl.exp(exponent * tl.log(tl.where(equal, 1.0, distance))))


@triton.jit
def _quality_focal_rows(
    students, teachers, sums, rows, width, beta: tl.constexpr, height: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * height + tl.arange(0, height)
    total = tl.zeros((height,), tl.float32)
    for begin in range(0, width, block):
        column = begin + tl.arange(0, block)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        student = tl.load(students + place, inside, 0.0).to(tl.float32)
        target = tl.sigmoid(tl.load(teachers + place, inside, 0.0).to(tl.float32))
        loss = _cross_entropy(student, target)
        if beta == 1:
            loss *= tl.abs(tl.sigmoid(student) - target)
        elif beta != 0:
            loss *= _power(tl.abs(tl.sigmoid(student) - target), beta)
        total += tl.sum(tl.where(inside, loss, 0.0), 1)
    tl.store(sums + row, total, row < rows)


@triton.jit
def _quality_focal_gradient(
    students, teachers, row_gradients, gradients, count, width, beta: tl.constexpr, block: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < count
    student = tl.load(students + place, inside, 0.0).to(tl.float32)
    target = tl.sigmoid(tl.load(teachers + place, inside, 0.0).to(tl.float32))
    probability = tl.sigmoid(student)
    difference = probability - target
    derivative = difference
    if beta != 0:
        sign = tl.where(difference > 0, 1.0, 0.0) - tl.where(difference < 0, 1.0, 0.0)
        slope = sign * probability * (1 - probability) * _cross_entropy(student, target)
        distance = tl.abs(difference)
        if beta == 1:
            derivative = distance * difference + slope
        else:
            derivative = _power(distance, beta) * difference + beta * _power(distance, beta - 1) * slope
    row_gradient = tl.load(row_gradients + place // width, inside, 0.0)
    tl.store(gradients + place, derivative * row_gradient, inside)


@triton.jit
def _log_softmax(logits, places, inside, inverse_temperature):
    values = tl.load(logits + places, inside, float("-inf")).to(tl.float32) * inverse_temperature
    values -= tl.max(values, 1)[:, None]
    return values - tl.log(tl.sum(tl.exp(values), 1))[:, None]


@triton.jit
def _distribution_kl_rows(
    students, teachers, sums, rows, width, inverse_temperature, height: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * height + tl.arange(0, height)
    column = tl.arange(0, block)
    # Rows beyond the last are read as the last: of nothing but -inf a softmax is NaN.
    place = tl.minimum(row, rows - 1)[:, None] * width + column[None, :]
    inside = (column < width)[None, :]
    student = _log_softmax(students, place, inside, inverse_temperature)
    teacher = _log_softmax(teachers, place, inside, inverse_temperature)
    # A bin that the teacher rules out adds nothing.
    bins = tl.where(inside & (teacher != float("-inf")), tl.exp(teacher) * (teacher - student), 0.0)
    tl.store(sums + row, tl.sum(bins, 1), row < rows)


@triton.jit
def _distribution_kl_gradient(
    students,
    teachers,
    row_gradients,
    gradients,
    rows,
    width,
    inverse_temperature,
    height: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * height + tl.arange(0, height)
    column = tl.arange(0, block)
    place = tl.minimum(row, rows - 1)[:, None] * width + column[None, :]
    inside = (column < width)[None, :]
    student = tl.exp(_log_softmax(students, place, inside, inverse_temperature))
    teacher = tl.exp(_log_softmax(teachers, place, inside, inverse_temperature))
    row_gradient = tl.load(row_gradients + row, row < rows, 0.0) * inverse_temperature
    tl.store(gradients + place, (student - teacher) * row_gradient[:, None], inside & (row < rows)[:, None])


def _device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton starts its kernels on the current device, which needs not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _whole_rows(width: int) -> tuple[int, int]:
    """How many rows, and columns of each, a program works on that needs rows whole: powers of 2."""
    block = triton.next_power_of_2(width)
    return max(_BLOCK // block, 1), block


def quality_focal_rows(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The loss summed over the last dimension: shape (..., classes) to (...), float32."""
    width = student.shape[-1]
    sums = torch.empty(student.shape[:-1], dtype=torch.float32, device=student.device)
    block = min(triton.next_power_of_2(width), _BLOCK)
    height = _BLOCK // block
    with _device_of(student):
        _quality_focal_rows[(triton.cdiv(sums.numel(), height),)](
            student, teacher, sums, sums.numel(), width, beta, height, block
        )
    return sums


def quality_focal_gradient(student: Tensor, teacher: Tensor, row_gradient: Tensor, beta: float) -> Tensor:
    """The student's gradient for that of the rows, in the student's type."""
    gradient = torch.empty_like(student)
    count, width = student.numel(), student.shape[-1]
    with _device_of(student):
        _quality_focal_gradient[(triton.cdiv(count, _BLOCK),)](
            student, teacher, row_gradient.contiguous(), gradient, count, width, beta, _BLOCK
        )
    return gradient


def distribution_kl_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The divergence of each row: shape (..., bins) to (...), float32."""
    width = student.shape[-1]
    sums = torch.empty(student.shape[:-1], dtype=torch.float32, device=student.device)
    height, block = _whole_rows(width)
    with _device_of(student):
        _distribution_kl_rows[(triton.cdiv(sums.numel(), height),)](
            student, teacher, sums, sums.numel(), width, 1 / temperature, height, block
        )
    return sums


def distribution_kl_gradient(
    student: Tensor, teacher: Tensor, row_gradient: Tensor, temperature: float
) -> Tensor:
    """The student's gradient for that of the rows, in the student's type."""
    gradient = torch.empty_like(student)
    width = student.shape[-1]
    height, block = _whole_rows(width)
    rows = row_gradient.numel()
    with _device_of(student):
        _distribution_kl_gradient[(triton.cdiv(rows, height),)](
            student, teacher, row_gradient.contiguous(), gradient, rows, width, 1 / temperature, height, block
        )
    return gradient
