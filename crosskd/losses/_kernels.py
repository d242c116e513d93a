"""Dense losses of a GPU in one kernel forward and one backward, written in Triton, which PyTorch brings.

Imported by those that call it, so that nothing else waits for Triton. Numbers of any type are read, and all
is calculated in float32.

The width of a row is a constant: a kernel is compiled for each, and dividing by it is cheap. Where a program
begins takes 64 bits, offsets from there 32.
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
def _log1p(number):
    """From 0 to 1, by log1p(x) / x in Chebyshev's nodes: 3e-7 of it, where log(1 + x) is 0 below 6e-8."""
    series = -0.0083711529 * number + 0.0434939004
    series = series * number - 0.1068500280
    series = series * number + 0.1768747717
    series = series * number - 0.2447477430
    series = series * number + 0.3327192962
    series = series * number - 0.4999717474
    return (series * number + 0.9999997616) * number


@triton.jit
def _compared(student, teacher):
    """Both probabilities, and the student's cross entropy, with three of a GPU's slow operations."""
    small, other = tl.exp(-tl.abs(student)), tl.exp(-tl.abs(teacher))
    inverse = 1 / ((1 + small) * (1 + other))
    probability = inverse * (1 + other) * tl.where(student >= 0, 1.0, small)
    target = inverse * (1 + small) * tl.where(teacher >= 0, 1.0, other)
    return probability, target, tl.maximum(student, 0.0) - student * target + _log1p(small)


@triton.jit
def _power(distance, exponent: tl.constexpr):
    """As `crosskd.losses._rows.power`: 0 stays 0 where the exponent is below 1, too."""
    equal = distance == 0
    return tl.where(equal, 0.0, tl.exp(exponent * tl.log(tl.where(equal, 1.0, distance))))


@triton.jit
def _quality_focal_rows(
    students,
    teachers,
    sums,
    rows,
    width: tl.constexpr,
    beta: tl.constexpr,
    height: tl.constexpr,
    block: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * height
    row = tl.arange(0, height)
    there = row < rows - first
    total = tl.zeros((height, block), tl.float32)
    for begin in range(0, width, block):
        column = begin + tl.arange(0, block)
        inside = there[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        student = tl.load(students + first * width + place, inside, 0.0).to(tl.float32)
        teacher = tl.load(teachers + first * width + place, inside, 0.0).to(tl.float32)
        probability, target, loss = _compared(student, teacher)
        if beta == 1:
            loss *= tl.abs(probability - target)
        elif beta != 0:
            loss *= _power(tl.abs(probability - target), beta)
        total += tl.where(inside, loss, 0.0)
    tl.store(sums + first + row, tl.sum(total, 1), there)


@triton.jit
def _quality_focal_gradient(
    students,
    teachers,
    row_gradients,
    gradients,
    count,
    width: tl.constexpr,
    beta: tl.constexpr,
    block: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * block
    place = tl.arange(0, block)
    inside = place < count - first
    student = tl.load(students + first + place, inside, 0.0).to(tl.float32)
    teacher = tl.load(teachers + first + place, inside, 0.0).to(tl.float32)
    probability, target, cross_entropy = _compared(student, teacher)
    difference = probability - target
    derivative = difference
    if beta != 0:
        sign = tl.where(difference > 0, 1.0, 0.0) - tl.where(difference < 0, 1.0, 0.0)
        slope = sign * probability * (1 - probability) * cross_entropy
        distance = tl.abs(difference)
        if beta == 1:
            derivative = distance * difference + slope
        else:
            derivative = _power(distance, beta) * difference + beta * _power(distance, beta - 1) * slope
    row = first // width
    begun = (first - row * width).to(tl.int32)  # numbers of that row before this program's
    row_gradient = tl.load(row_gradients + row + (begun + place) // width, inside, 0.0)
    tl.store(gradients + first + place, derivative * row_gradient, inside)


@triton.jit
def _rows_from(first, rows, width: tl.constexpr, height: tl.constexpr, block: tl.constexpr):
    """Where the numbers of whole rows stand, from the first row on, and which columns there are."""
    column = tl.arange(0, block)
    # Rows beyond the last are read as the last: of nothing but -inf a softmax is NaN.
    row = tl.minimum(tl.arange(0, height), (rows - first - 1).to(tl.int32))
    return row[:, None] * width + column[None, :], (column < width)[None, :]


@triton.jit
def _shifted(logits, place, inside, inverse_temperature):
    """Logits over the temperature, the largest of each row 0."""
    values = tl.load(logits + place, inside, float("-inf")).to(tl.float32) * inverse_temperature
    return values - tl.max(values, 1)[:, None]


@triton.jit
def _softmax(logits, place, inside, inverse_temperature):
    exponentials = tl.exp(_shifted(logits, place, inside, inverse_temperature))
    return exponentials * (1 / tl.sum(exponentials, 1))[:, None]


@triton.jit
def _log_softmax(logits, place, inside, inverse_temperature):
    values = _shifted(logits, place, inside, inverse_temperature)
    return values - tl.log(tl.sum(tl.exp(values), 1))[:, None]


@triton.jit
def _distribution_kl_rows(
    students,
    teachers,
    sums,
    rows,
    width: tl.constexpr,
    inverse_temperature,
    height: tl.constexpr,
    block: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * height
    row = tl.arange(0, height)
    place, inside = _rows_from(first, rows, width, height, block)
    student = _log_softmax(students + first * width, place, inside, inverse_temperature)
    teacher = _log_softmax(teachers + first * width, place, inside, inverse_temperature)
    # A bin that the teacher rules out adds nothing.
    bins = tl.where(inside & (teacher != float("-inf")), tl.exp(teacher) * (teacher - student), 0.0)
    tl.store(sums + first + row, tl.sum(bins, 1), row < rows - first)


@triton.jit
def _distribution_kl_gradient(
    students,
    teachers,
    row_gradients,
    gradients,
    rows,
    width: tl.constexpr,
    inverse_temperature,
    height: tl.constexpr,
    block: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * height
    row = tl.arange(0, height)
    there = row < rows - first
    place, inside = _rows_from(first, rows, width, height, block)
    student = _softmax(students + first * width, place, inside, inverse_temperature)
    teacher = _softmax(teachers + first * width, place, inside, inverse_temperature)
    row_gradient = tl.load(row_gradients + first + row, there, 0.0) * inverse_temperature
    gradient = (student - teacher) * row_gradient[:, None]
    tl.store(gradients + first * width + place, gradient, inside & there[:, None])


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
    # So many columns at a time as leave the fewest lanes without work: 16 of 80 classes, 32 of 91.
    block = min((32, 16, 8), key=lambda columns: triton.cdiv(width, columns) * columns)
    block = min(block, triton.next_power_of_2(width))
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
