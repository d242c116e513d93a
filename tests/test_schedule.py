"""The factor on a method's losses over time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosskd import Schedule


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(), [1, 1, 1, 1, 1, 1, 1]),
        (Schedule(warmup=1), [1, 1, 1, 1, 1, 1, 1]),
        (Schedule(warmup=4), [0.25, 0.5, 0.75, 1, 1, 1, 1]),
        (Schedule(decay=(1, 5)), [1, 1, 0.75, 0.5, 0.25, 0, 0]),
        (Schedule(decay=(0, 2)), [1, 0.5, 0, 0, 0, 0, 0]),
        (Schedule(stop=3), [1, 1, 1, 0, 0, 0, 0]),
        (Schedule(warmup=2, decay=(2, 6), stop=5), [0.5, 1, 1, 0.75, 0.5, 0, 0]),
        (Schedule(stop=1, unit="epoch"), [1, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_factors(schedule, expected):
    assert [schedule.factor(now) for now in range(7)] == expected


@given(
    warmup=st.integers(0, 10),
    plateau=st.integers(0, 10),
    fall=st.integers(1, 10),
    stop=st.none() | st.integers(1, 20),
    now=st.integers(0, 60),
)
def test_factor_rises_then_falls_within_0_and_1(warmup, plateau, fall, stop, now):
    start = warmup + plateau
    end = None if stop is None else warmup + stop
    schedule = Schedule(warmup=warmup, decay=(start, start + fall), stop=end)
    factor, following = schedule.factor(now), schedule.factor(now + 1)
    assert 0 <= factor <= 1
    if now < warmup:
        assert factor > 0
        assert following >= factor or now + 1 > warmup
    else:
        assert following <= factor
    if now >= start + fall or (end is not None and now >= end):
        assert factor == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": 2.5}, "warmup counts steps or epochs, in whole numbers, got 2.5"),
        ({"warmup": float("nan")}, "warmup counts .* got nan"),
        ({"stop": float("inf")}, "stop counts .* got inf"),
        ({"decay": (1, 2.5)}, r"decay counts .* got \(1, 2.5\)"),
        ({"warmup": -1}, "warmup must be 0 or more, got -1"),
        ({"decay": (4, 4)}, r"decay must be \(start, end\) .* got \(4, 4\) with a warmup of 0"),
        ({"decay": (-2, 4)}, r"warmup <= start < end, got \(-2, 4\)"),
        ({"warmup": 5, "decay": (4, 8)}, r"got \(4, 8\) with a warmup of 5"),
        ({"stop": 0}, "stop must come after the warmup of 0, got 0"),
        ({"warmup": 5, "stop": 5}, "stop must come after the warmup of 5, got 5"),
        ({"unit": "iteration"}, 'unit must be "step" or "epoch", got \'iteration\''),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)
