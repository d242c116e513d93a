"""Levels are paired by their strides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosskd.adapters.levels import LevelPairs, pair_levels

STRIDES = st.lists(st.sampled_from([4.0, 8.0, 16.0, 32.0, 64.0, 128.0]), min_size=1, unique=True).map(sorted)


@given(teacher=STRIDES, kept=st.data())
def test_every_student_level_gets_the_teachers_of_its_stride(teacher, kept):
    student = sorted(kept.draw(st.lists(st.sampled_from(teacher), min_size=1, unique=True)))
    pairs = pair_levels(teacher, student)
    assert [teacher[theirs] for _, theirs in pairs] == student
    assert pairs.scale == 1
    assert pair_levels(teacher, student, rescaled=True) == pairs


@given(teacher=STRIDES, factor=st.sampled_from([0.5, 1.5, 2.0]))
def test_one_factor_between_all_strides_needs_a_rescaled_view(teacher, factor):
    student = [stride / factor for stride in teacher]
    pairs = pair_levels(teacher, student, rescaled=True)
    assert pairs.of_teacher(len(teacher)) == tuple(range(len(teacher))) or pairs.scale == 1
    assert all(teacher[theirs] == pytest.approx(pairs.scale * student[ours]) for ours, theirs in pairs)


def test_a_student_at_half_the_resolution():
    pairs = pair_levels([8, 16, 32], [4, 8], rescaled=True)
    assert (pairs.teacher, pairs.scale) == ((0, 1), 2)


def test_two_levels_of_one_stride_are_paired_in_order():
    assert pair_levels([32, 32, 64], [32, 32, 64]).teacher == (0, 1, 2)
    assert pair_levels([16, 32, 32, 64], [32, 64]).teacher == (1, 3)


@pytest.mark.parametrize(
    ("teacher", "student"), [([8, 16], [4, 8]), ([8, 16], [8, 16, 32]), ([8, 16, 32], [16, 16])]
)
def test_a_level_without_counterpart_is_refused(teacher, student):
    with pytest.raises(ValueError, match="strides differ: .*Each of the student's levels needs one"):
        pair_levels(teacher, student)


def test_unknown_strides_go_level_by_level():
    pairs = pair_levels(None, [8, 16])
    assert pairs == LevelPairs(None) == pair_levels([8], None)
    assert list(pairs.of_teacher(3)) == [0, 1, 2]
    assert list(pairs) == []
