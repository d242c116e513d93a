"""What a method may demand of a pair: each demand, and the error that names the side and the numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from crosskd.adapters import Anchors
from crosskd.pairing import (
    Pair,
    anchors_agree,
    class_columns,
    match_levels,
    require_all_levels,
    require_branches,
    require_classes,
    require_grid,
    require_heads,
    require_predictions_alike,
    require_same_anchors,
    require_same_boxes,
)
from crosskd.step import Step
from crosskd.towers import Branch, Tower
from tests.helpers.steps import PlainAdapter, PlainHead, make_pair, make_predictions, make_side

STRIDES = st.lists(st.sampled_from([4.0, 8.0, 16.0, 32.0, 64.0, 128.0]), min_size=1, unique=True).map(sorted)


# -- levels ---------------------------------------------------------------------------------------


@given(teacher=STRIDES, student=STRIDES)
def test_levels_of_equal_strides_are_matched_and_no_others(teacher, student):
    matches, scale = match_levels(teacher, student)
    assert scale == 1
    assert [student[ours] for ours, _ in matches] == sorted(set(teacher) & set(student))
    assert all(teacher[theirs] == student[ours] for ours, theirs in matches)


@example(teacher=[16.0, 32.0], student=[4.0, 16.0, 32.0], factor=2.0)  # the student's finest has none
@given(teacher=STRIDES, student=STRIDES, factor=st.sampled_from([0.25, 0.5, 1.5, 2.0, 3.0]))
def test_one_factor_between_all_strides_needs_rescaled_images(teacher, student, factor):
    scaled = [factor * stride for stride in teacher]
    matches, scale = match_levels(scaled, student, rescaled=True)
    assert all(scaled[theirs] == pytest.approx(scale * student[ours]) for ours, theirs in matches)
    assert all(a < b for side in zip(*matches, strict=True) for a, b in pairwise(side))
    # No factor of two of the strides matches more, and 1 goes before any that matches as many.
    best = max(
        len(
            {round(stride * ours / theirs, 6) for stride in scaled} & {round(stride, 6) for stride in student}
        )
        for ours in student
        for theirs in scaled
    )
    unscaled = len(set(scaled) & set(student))
    assert len(matches) == max(best, unscaled)
    if unscaled == len(matches):
        assert scale == 1


def test_a_teacher_at_twice_the_resolution():
    assert match_levels([8, 16, 32], [4, 8], rescaled=True) == (((0, 0), (1, 1)), 2)
    # As many levels agree at factor 1 as at 2: the images may well be of the same size.
    assert match_levels([16, 32, 64], [16, 32], rescaled=True) == (((0, 0), (1, 1)), 1)


def test_two_levels_of_one_stride_are_matched_in_order():
    assert match_levels([32, 32, 64], [32, 32, 64])[0] == ((0, 0), (1, 1), (2, 2))
    assert match_levels([16, 32, 32, 64], [32, 64])[0] == ((0, 1), (1, 3))
    assert match_levels([8, 16, 32], [16, 16])[0] == ((0, 1),)


def pair_of_strides(teacher: list[float] | None, student: list[float] | None) -> Pair:
    levels = None if teacher is None or student is None else match_levels(teacher, student)[0]
    adapters = [PlainAdapter(strides=strides and tuple(strides)) for strides in (teacher, student)]
    return Pair(*adapters, levels=levels)


@pytest.mark.parametrize(
    ("teacher", "student"), [([8, 16], [4, 8]), ([8, 16], [8, 16, 32]), ([8, 16, 32], [16, 16])]
)
def test_error_a_level_of_the_students_without_counterpart(teacher, student):
    numbers = rf"strides differ: \[{', '.join(map(str, teacher))}\] \(teacher\), "
    numbers += rf"\[{', '.join(map(str, student))}\] \(student\)"
    with pytest.raises(ValueError, match=numbers):
        require_all_levels(pair_of_strides(teacher, student))


def test_the_teacher_may_have_more_levels_and_unknown_strides_pass():
    require_all_levels(pair_of_strides([4, 8, 16, 32], [8, 32]))
    assert pair_of_strides([4, 8, 16, 32], [8, 32, 64]).left_out() == ([4, 16], [64])
    for strides in ((None, [8]), ([8], None), (None, None)):
        require_all_levels(pair_of_strides(*strides))
        assert pair_of_strides(*strides).left_out() == ([], [])


# -- classes --------------------------------------------------------------------------------------


@given(order=st.permutations(range(6)), count=st.integers(1, 6))
def test_a_sequence_and_a_mapping_name_the_same_columns(order, count):
    columns = tuple(order[:count])
    backwards = {student: columns[student] for student in reversed(range(count))}
    for class_map in (columns, list(columns), backwards, torch.tensor(columns), range(count)):
        expected = tuple(range(count)) if isinstance(class_map, range) else columns
        assert class_columns(class_map, teacher=6, student=count, backgrounds=(None, None)) == expected


def test_no_class_map_is_none():
    assert class_columns(None, teacher=80, student=3, backgrounds=(None, None)) is None


@pytest.mark.parametrize(
    ("class_map", "got"),
    [
        ([0, 1], r"got 2: \[0, 1\]"),
        ([0, 1, 2, 2], r"got 4: \[0, 1, 2, 2\]"),
        ([0, 1, 2, 6], r"got 4: \[0, 1, 2, 6\]"),
        ([0, 1, 2, -1], r"got 4: \[0, 1, 2, -1\]"),
        ([], r"got 0: \[\]"),
        ({0: 4, 1: 3, 2: 0}, r"got the keys \[0, 1, 2\]"),
        ({0: 4, 1: 3, 2: 0, 4: 1}, r"got the keys \[0, 1, 2, 4\]"),
        ({0: 4, 1: 3, 2: 0, 3: 4}, r"got 4: \[4, 3, 0, 4\]"),
        ({"cat": 4, "dog": 3, "cow": 0, "pig": 1}, r"got the keys \['cat'"),
        ({False: 4, True: 3, 2: 0, 3: 1}, r"got the keys \[False, True, 2, 3\]"),
    ],
)
def test_error_class_map(class_map, got):
    message = rf"class of the teacher's, 0 to 5, for each of the student's 4.*{got}"
    with pytest.raises(ValueError, match=message):
        class_columns(class_map, teacher=6, student=4, backgrounds=(None, None))


@pytest.mark.parametrize(
    ("value", "got"), [(True, "True, a bool"), (1.0, "1.0, a float"), ("1", "'1', a str"), (None, "None")]
)
@pytest.mark.parametrize("as_mapping", [False, True])
def test_error_class_map_of_something_else_than_whole_numbers(value, got, as_mapping):
    listed = [0, value, 2, 3]
    with pytest.raises(TypeError, match=f"0 to 5, for each of the student's 4.*got {got}"):
        class_columns(
            dict(enumerate(listed)) if as_mapping else listed, teacher=6, student=4, backgrounds=(None, None)
        )


def test_the_background_stays_the_background():
    assert class_columns([0, 3, 1], teacher=4, student=3, backgrounds=(0, 0)) == (0, 3, 1)
    with pytest.raises(
        ValueError,
        match=r"class 0 of the teacher .*class 0 of the student .*class_map\[0\] = 0; got \[1, 0, 2\]",
    ):
        class_columns([1, 0, 2], teacher=4, student=3, backgrounds=(0, 0))
    assert class_columns([1, 0, 5], teacher=6, student=3, backgrounds=(5, 2)) == (1, 0, 5)
    with pytest.raises(
        ValueError,
        match=r"class 5 of the teacher .*class 2 of the student .*class_map\[2\] = 5; got \[1, 0, 2\]",
    ):
        class_columns([1, 0, 2], teacher=6, student=3, backgrounds=(5, 2))


def test_error_numbers_of_classes():
    teacher, student = PlainHead(num_classes=80), PlainHead(num_classes=3)
    with pytest.raises(ValueError, match="teacher predicts 80 classes and the student 3: give class_map="):
        require_classes(make_pair(teacher, student))
    require_classes(make_pair(teacher, student, class_map=(1, 2, 3)))


# -- heads ----------------------------------------------------------------------------------------


def test_error_a_teacher_without_such_a_head():
    backbone, named = PlainAdapter(), PlainHead(name="box")
    student = PlainAdapter(named)
    pair = Pair(backbone, student, student_head=named)
    with pytest.raises(ValueError, match=r"student's box .*no counterpart: .*Identity, has no head"):
        require_heads(pair)
    other = PlainAdapter(PlainHead(name="rpn"))
    with pytest.raises(ValueError, match="student's box .*no counterpart: .* head"):
        require_heads(Pair(other, student, student_head=named))
    pair = make_pair(PlainHead(), named)
    assert require_heads(pair) == (pair.teacher_head, named)


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_error_rows_that_are_a_set(side):
    heads = {"teacher": PlainHead(), "student": PlainHead()}
    require_grid(make_pair(**heads))
    heads[side] = PlainHead(rows="queries")
    with pytest.raises(ValueError, match=f"the {side}'s rows of predictions are a set of queries"):
        require_grid(make_pair(**heads))


def branches(*names: str) -> list[Branch]:
    return [Branch(name, (Tower.of([], name, width_in=4),), {}) for name in names]


def test_error_branches():
    teacher = PlainHead(branches("classification", "regression"))
    require_branches(make_pair(teacher, PlainHead(branches("regression", "mask", "classification"))))
    message = r"branches \['classification', 'regression'\] \(teacher\), \['both'\] \(student\)"
    with pytest.raises(ValueError, match=message):
        require_branches(make_pair(teacher, PlainHead(branches("both"))))


@pytest.mark.parametrize(
    ("teacher", "student", "numbers"),
    [
        (
            {"background": 0},
            {},
            r"a softmax whose class 0 is no object \(teacher\), a sigmoid per class \(",
        ),
        (
            {},
            {"background": 3},
            r"a sigmoid per class \(teacher\), a softmax whose class 3 is no object",
        ),
        (
            {"objectness": True},
            {},
            r"a sigmoid per class, times an objectness \(teacher\), a sigmoid per class \(",
        ),
        ({"background": 0}, {"background": 3}, r"class 0 is no object \(teacher\), .*class 3 is no object"),
        ({"bins": 17}, {}, r"over 17 \(teacher\), 1 \(student\) bins"),
        ({"bins": 17}, {"bins": 8}, r"over 17 \(teacher\), 8 \(student\) bins"),
    ],
)
def test_error_predictions_of_another_kind(teacher, student, numbers):
    with pytest.raises(ValueError, match=numbers):
        require_predictions_alike(make_pair(PlainHead(**teacher), PlainHead(**student)))
    require_predictions_alike(make_pair(PlainHead(**teacher), PlainHead(**teacher)))


# -- anchors and boxes, on the first step ------------------------------------------------------------


def anchors_of(*sizes: float, count: int = 2) -> Anchors:
    boxes = torch.tensor([[0.0, 0.0, size, size] for size in sizes for _ in range(count)])
    return Anchors(boxes, (count,) * len(sizes))


def step_of(
    teacher: Any, student: Any, heads: tuple[PlainHead, PlainHead] | None = None, **fields: Any
) -> Step:
    heads = heads or (PlainHead(), PlainHead())
    sides = [
        make_side(make_predictions(), head=head, anchors=anchors)
        for head, anchors in zip(heads, (teacher, student), strict=True)
    ]
    return Step(*sides, **fields)


@pytest.mark.parametrize(
    ("student", "fields", "agree"),
    [
        (anchors_of(8, 16), {}, True),
        (anchors_of(8, 16.0001), {}, True),
        (anchors_of(8, 17), {}, False),
        (anchors_of(8), {}, False),
        (anchors_of(8, 16, count=3), {}, False),
        (Anchors(None, (2, 2)), {}, True),
        (Anchors(None, (4,)), {}, False),
        (anchors_of(4, 8), {"scale": 2.0}, True),
        (anchors_of(8, 16), {"scale": 2.0}, False),
        (anchors_of(8, 17), {"resized": True}, True),
        (anchors_of(8, 17, count=3), {"resized": True}, False),
    ],
)
def test_anchors_of_one_type_of_head(student, fields, agree):
    step = step_of(anchors_of(8, 16), student, **fields)
    assert anchors_agree(step) is agree
    if agree:
        require_same_anchors(step)
        return
    per_level = list(student.per_level)
    with pytest.raises(ValueError, match=r"the anchors differ.*\[2, 2\] per level of a other head") as caught:
        require_same_anchors(step)
    assert f"{per_level} per level" in str(caught.value)
    assert "(teacher)" in str(caught.value)


def test_heads_of_other_types_may_stand_at_the_same_anchors():
    """They assign labels in other ways, and say nothing of each other where one doesn't tell its anchors."""
    heads = PlainHead(head_type="RetinaNet"), PlainHead(head_type="FCOS")
    step = step_of(anchors_of(8), anchors_of(8), heads)
    assert not anchors_agree(step)
    require_same_anchors(step)
    message = r"of a RetinaNet head, the first \[0.0, 0.0, 8.0, 8.0\] \(teacher\), .* of a FCOS head"
    with pytest.raises(ValueError, match=message):
        require_same_anchors(step_of(anchors_of(8), replace(anchors_of(8), boxes=None), heads))


def test_regions_are_the_students_on_both_sides():
    heads = PlainHead(rows="regions", head_type="a"), PlainHead(rows="regions", head_type="b")
    assert anchors_agree(step_of(object(), object(), heads))


class Doubling(PlainHead):
    """Makes boxes of twice the size of what it predicts."""

    def decode(self, predictions: Any, anchors: Any) -> Tensor:
        return 2 * predictions.regression


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_error_box_coding(side):
    heads = {"teacher": PlainHead(), "student": PlainHead()}
    require_same_boxes(step_of(None, None, tuple(heads.values())))
    heads[side] = Doubling()
    step = step_of(None, None, tuple(heads.values()))
    with pytest.raises(ValueError, match="box coding differs: one prediction is the box") as caught:
        require_same_boxes(step)
    decoded = step.teacher.predictions.regression.flatten(0, -2)
    at = int(decoded.amax(dim=1).argmax())
    for name, factor in (("teacher", 1 + (side == "teacher")), ("student", 1 + (side == "student"))):
        assert f"{[round(factor * v, 2) for v in decoded[at].tolist()]} ({name})" in str(caught.value)


def test_boxes_of_a_teacher_at_another_resolution_are_larger_by_the_factor():
    require_same_boxes(step_of(None, None, (Doubling(), PlainHead()), scale=2.0))
    with pytest.raises(ValueError, match="box coding differs"):
        require_same_boxes(step_of(None, None, (PlainHead(), Doubling()), scale=2.0))


def test_box_coding_is_not_compared_where_levels_were_resized_or_nothing_decodes():
    require_same_boxes(step_of(None, None, (PlainHead(), Doubling()), resized=True))
    require_same_boxes(step_of(None, None, (PlainHead(decodes=False), Doubling())))
