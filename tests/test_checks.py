"""What the checks of arguments let pass, and how they refuse."""

from __future__ import annotations

import pytest
import torch

from crosskd import LD, PKD, CrossKD, QueryDistillation, Schedule
from crosskd._checks import (
    compute_dtype,
    require_floating,
    require_last_dimension,
    require_rows,
    require_same_shape,
    shape_text,
)


def test_shape_text():
    assert shape_text(torch.zeros(2, 5)) == "(2, 5)"
    assert shape_text(torch.tensor(0.0)) == "()"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_passes(dtype):
    require_floating(a=torch.zeros(1, dtype=dtype), b=torch.zeros(2))


@pytest.mark.parametrize(("method", "weight"), [
    (PKD, "weight"), (CrossKD, "cls_weight"), (LD, "main_weight"), (QueryDistillation, "l1_weight"),
])  # fmt: skip
def test_a_weight_that_is_a_schedule_is_refused_and_says_where_it_belongs(method, weight):
    with pytest.raises(TypeError, match=r"must be a number, got a Schedule: .* schedule="):
        method(**{weight: Schedule(warmup=3)})


def test_not_floating_point():
    with pytest.raises(
        TypeError, match=r"boxes must hold .* got torch\.int32: convert it with boxes\.float\(\)"
    ):
        require_floating(logits=torch.zeros(1), boxes=torch.zeros(1).int())
    with pytest.raises(TypeError, match="logits must be a tensor, got list"):
        require_floating(logits=[0.0])


def test_same_shape():
    require_same_shape(a=torch.zeros(2, 3), b=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"expected tensors of one shape, got a \(2, 3\), b \(3, 2\)"):
        require_same_shape(a=torch.zeros(2, 3), b=torch.zeros(3, 2))


def test_last_dimension():
    require_last_dimension(4, "xyxy", boxes=torch.zeros(3, 4), targets=torch.zeros(4))
    with pytest.raises(ValueError, match=r"targets must have shape \(\.\.\., 4\), xyxy, got \(4, 3\)"):
        require_last_dimension(4, "xyxy", boxes=torch.zeros(3, 4), targets=torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"boxes must have shape \(\.\.\., 4\), xyxy, got \(\)"):
        require_last_dimension(4, "xyxy", boxes=torch.tensor(0.0))


def test_rows():
    require_rows("logits", torch.zeros(3))
    with pytest.raises(ValueError, match=r"logits must have shape \(\.\.\., classes\), got a tensor without"):
        require_rows("logits", torch.tensor(0.0))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float16], torch.float32),
        ([torch.bfloat16, torch.float32], torch.float32),
        ([torch.float16, torch.float64], torch.float64),
    ],
)
def test_compute_dtype_is_never_narrower_than_float32(dtypes, expected):
    assert compute_dtype(*(torch.zeros(1, dtype=dtype) for dtype in dtypes)) == expected
