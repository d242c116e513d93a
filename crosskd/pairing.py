"""What a method may demand of a pair of detectors: one function each, one error each.

Some facts are known when the `crosskd.Distiller` is made, and a method demands them in its ``setup``, which
gets a `Pair`. Others need a batch, and a method demands them in its ``check``, which gets the first
`crosskd.step.Step`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crosskd.adapters.base import Adapter, DecoderHead, Head
from crosskd.step import Step

__all__ = [
    "ClassMap",
    "Pair",
    "anchors_agree",
    "class_columns",
    "classes_agree",
    "match_levels",
    "require_all_levels",
    "require_branches",
    "require_classes",
    "require_decoders",
    "require_detections",
    "require_grid",
    "require_heads",
    "require_predictions_alike",
    "require_rows_alike",
    "require_same_anchors",
    "require_same_bins",
    "require_same_boxes",
    "require_same_regions",
    "require_same_shares",
    "require_shared_queries",
]

_SAME_SHARE = 0.02  # sizes are rounded to whole pixels
ClassMap = Sequence[int] | Mapping[int, int]
"""The teacher's class for each of the student's: a sequence, or a mapping with the keys 0 to n - 1."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A teacher and a student, as a method's ``setup`` sees them.

    Attributes:
        teacher: the teacher's adapter.
        student: the student's.
        teacher_head: the heads that the method distils; ``None`` for methods of feature maps.
        student_head: likewise.
        levels: (student's level, teacher's level) of equal strides; ``None`` if nothing says how many
            levels there are, and the two go level by level.
        scale: the teacher's strides over the student's. Other than 1 where the teacher sees the images at
            another resolution.
        class_map: the teacher's column of the logits for each of the student's, where the user gave one.
        resize_levels: the teacher's predictions are resized to the student's levels.
        teacher_dtype: what the teacher's own forward calculates in; ``None`` for what the student's does.
    """

    teacher: Adapter
    student: Adapter
    teacher_head: Head | None = None
    student_head: Head | None = None
    levels: tuple[tuple[int, int], ...] | None = None
    scale: float = 1.0
    class_map: tuple[int, ...] | None = None
    resize_levels: bool = False
    teacher_dtype: torch.dtype | None = None

    def left_out(self) -> tuple[list[float], list[float]]:
        """The strides of levels without a counterpart: (the teacher's, the student's)."""
        if self.levels is None or self.teacher.strides is None or self.student.strides is None:
            return [], []
        ours, theirs = [{pair[side] for pair in self.levels} for side in (0, 1)]
        return (
            [stride for level, stride in enumerate(self.teacher.strides) if level not in theirs],
            [stride for level, stride in enumerate(self.student.strides) if level not in ours],
        )


# -- when the distiller is made ------------------------------------------------------------------


def match_levels(
    teacher: Sequence[float], student: Sequence[float], *, rescaled: bool = False, scale: float | None = None
) -> tuple[tuple[tuple[int, int], ...], float]:
    """Matches levels of equal strides; each detector may have levels that the other lacks.

    Args:
        teacher: pixels between neighbouring locations, one per level, finest first.
        student: likewise.
        rescaled: the teacher sees images of its own, maybe at another resolution, so that all strides may
            differ by one factor. The factor that matches most levels is taken, 1 before any other.
        scale: that factor, where it is known.

    Returns:
        (student's level, teacher's level) of each match, and the teacher's strides over the student's.

    Example:
        >>> match_levels([8, 16, 32, 64], [16, 32])
        (((0, 1), (1, 2)), 1.0)
        >>> match_levels([32, 64], [16, 32], rescaled=True)
        (((0, 0), (1, 1)), 2.0)
        >>> match_levels([16, 32, 64], [16, 32], scale=2.0)
        (((0, 1), (1, 2)), 2.0)
    """
    factors = [1.0]
    if rescaled:
        factors += [theirs / ours for ours in student for theirs in teacher]
    if scale is not None:
        factors = [scale]
    best: tuple[tuple[tuple[int, int], ...], float] = ((), factors[0])
    for factor in factors:
        found: list[tuple[int, int]] = []
        for level, stride in enumerate(student):
            # Two levels may have one stride: they are matched in order.
            first = found[-1][1] + 1 if found else 0
            for other in range(first, len(teacher)):
                if math.isclose(teacher[other], factor * stride, rel_tol=1e-6):
                    found.append((level, other))
                    break
        if len(found) > len(best[0]):
            best = (tuple(found), factor)
    return best


def class_columns(
    class_map: ClassMap | None, teacher: int, student: int, backgrounds: tuple[int | None, int | None]
) -> tuple[int, ...] | None:
    """A ``class_map`` as the teacher's column of the logits for each of the student's.

    Args:
        class_map: as the user gave it.
        teacher: columns of the teacher's logits.
        student: likewise.
        backgrounds: the (teacher's, student's) column that means no object, ``None`` where none does.

    Returns:
        The columns; ``None`` where none was given.

    Raises:
        ValueError: columns that the teacher doesn't have, one of them twice, too few or too many.
        TypeError: something else than whole numbers.

    Example:
        >>> class_columns({0: 4, 1: 3}, teacher=5, student=2, backgrounds=(None, None))
        (4, 3)
    """
    if class_map is None:
        return None
    expected = (
        f"class_map must name a class of the teacher's, 0 to {teacher - 1}, for each of the student's "
        f"{student}, none of them twice, as a sequence or as a mapping with the student's classes as keys"
    )
    values: list[Any] = list(class_map)
    if isinstance(class_map, Mapping):
        if set(class_map) != set(range(student)) or any(isinstance(key, bool) for key in class_map):
            raise ValueError(f"{expected}; got the keys {list(class_map)}")
        values = [class_map[key] for key in range(student)]
    columns = []
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{expected}; got {value!r}, a {type(value).__name__}")
        columns.append(operator.index(value))
    in_range = all(0 <= column < teacher for column in columns)
    if len(columns) != student or not in_range or len(set(columns)) < len(columns):
        raise ValueError(f"{expected}; got {len(columns)}: {columns}")
    theirs, ours = backgrounds
    if theirs is not None and ours is not None and columns[ours] != theirs:
        raise ValueError(
            f"class {theirs} of the teacher and class {ours} of the student mean no object, so class_map "
            f"must have class_map[{ours}] = {theirs}; got {columns}. Where one of the two is a class of "
            "objects, its adapter's background is wrong"
        )
    return tuple(columns)


def require_heads(pair: Pair) -> tuple[Head, Head]:
    """The (teacher's, student's) head; raises ``ValueError`` where the teacher has none to compare."""
    if pair.teacher_head is None or pair.student_head is None:
        names = [head.name for head in pair.teacher.heads]
        theirs = f"the heads {', '.join(names)}" if len(names) > 1 else "one head" if names else "no head"
        name = "" if pair.student_head is None else pair.student_head.name
        raise ValueError(
            f"the student's {name or 'only'} head has no counterpart: the teacher, a "
            f"{type(pair.teacher.detector).__name__}, has {theirs}. Choose a method of feature maps, such as "
            "crosskd.PKD(), or a teacher with such a head"
        )
    return pair.teacher_head, pair.student_head


def require_all_levels(pair: Pair) -> None:
    """Raises ``ValueError`` where one of the student's levels has no counterpart of the same stride.

    Heads that answer for regions have no levels: each pools from whatever maps it has.
    """
    if pair.student_head is not None and pair.student_head.rows == "regions":
        return
    strides = pair.teacher.strides, pair.student.strides
    if pair.levels is None or strides[0] is None or strides[1] is None:
        return
    if len(pair.levels) < len(strides[1]):
        raise ValueError(
            f"strides differ: {list(strides[0])} (teacher), {list(strides[1])} (student). Each of the "
            "student's levels needs one of the teacher's with the same stride, while the teacher may have "
            "more: build both with the same pyramid levels, and for images of one size where they resize "
            "them to a fixed one"
        )


def require_grid(pair: Pair) -> None:
    """Raises ``ValueError`` where a row of one head means nothing to the other: rows that are a set."""
    made_for_queries = ""
    if pair.student_head is not None and pair.student_head.rows == "queries":
        made_for_queries = ", or one made for queries, such as crosskd.QueryDistillation()"
    for side, head in (("teacher", pair.teacher_head), ("student", pair.student_head)):
        if head is not None and head.rows == "queries":
            raise ValueError(
                f"the {side}'s rows of predictions are a set of queries in no order, so comparing them row "
                "by row with another detector's compares unrelated objects: choose a method of feature maps, "
                f"such as crosskd.PKD(){made_for_queries}"
            )


def require_decoders(pair: Pair) -> tuple[DecoderHead, DecoderHead]:
    """The (teacher's, student's) decoder; raises ``ValueError`` where one of the two has none."""
    heads = require_heads(pair)
    for side, head in zip(("teacher", "student"), heads, strict=True):
        if not isinstance(head, DecoderHead):
            detector = type(getattr(pair, side).detector).__name__
            raise ValueError(
                f"the {side}, a {detector}, has no decoder of queries, which this method needs: choose a "
                "method of feature maps, such as crosskd.PKD(), or a detection transformer that an adapter "
                "knows as one (docs/transformers.md)"
            )
    return heads  # type: ignore[return-value]


def require_shared_queries(pair: Pair) -> tuple[DecoderHead, DecoderHead]:
    """The (teacher's, student's) decoder; raises ``ValueError`` where the two can't share queries."""
    teacher, student = require_decoders(pair)
    if teacher.kind != student.kind:
        matching = ""
        if (teacher.background is None) == (student.background is None):
            matching = ", or crosskd.MatchedQueries(), which matches predictions"
        raise ValueError(
            f"a decoder's queries are {teacher.kind} (teacher, {teacher.head_type}), {student.kind} "
            f"(student, {student.head_type}), so the two can't be run with the same ones. Take detectors of "
            f"one kind, or a method of feature maps, such as crosskd.PKD(){matching}"
        )
    if pair.teacher_dtype is not None:
        raise ValueError(
            f"teacher_dtype={pair.teacher_dtype} is for the teacher's own forward, but with shared queries "
            "its decoder runs again, in the type of its weights, on what that forward has left: leave it "
            "out, or put torch.autocast around the whole step"
        )
    return teacher, student


def require_detections(pair: Pair) -> DecoderHead:
    """The student's decoder, where a dense teacher's detections can be its queries; else ``ValueError``."""
    teacher, student = require_heads(pair)
    name = type(pair.teacher.detector).__name__
    if not isinstance(student, DecoderHead):
        require_decoders(pair)
    elif student.kind != "boxes":
        raise ValueError(
            f"the teacher, a {name}, has no decoder, and its boxes can't be the queries of a "
            f"{student.head_type}, which are {student.kind}. Take a student whose queries are boxes alone, "
            "such as RT-DETR, D-FINE or DINO, or a method of feature maps, such as crosskd.PKD()"
        )
    elif teacher.rows != "grid" or not teacher.decodes or teacher.background != student.background:
        raise ValueError(
            f"the detections of a {name} can't be queries: its head must be dense, decode boxes and predict "
            "classes as the student does, by a sigmoid each. Take another teacher, or a method of feature "
            "maps, such as crosskd.PKD()"
        )
    require_classes(pair)
    return student  # type: ignore[return-value]


def require_branches(pair: Pair) -> None:
    """Raises ``ValueError`` where one of the teacher's branches has no counterpart in the student's head."""
    teacher, student = require_heads(pair)
    theirs, ours = ([branch.name for branch in head.branches] for head in (teacher, student))
    if not set(theirs) <= set(ours):
        raise ValueError(
            f"the towers can't be joined: branches {theirs} (teacher), {ours} (student). Each of the "
            "teacher's branches needs one of the student's with the same name: take a student whose head has "
            "them, as an end-to-end teacher needs an end-to-end student, or name them alike in the adapters "
            "where they mean the same"
        )


def classes_agree(teacher: Head, student: Head) -> bool:
    """Whether two heads have as many classes, and the same names for them where both have names."""
    if teacher.num_classes != student.num_classes:
        return False
    theirs, ours = teacher.class_names, student.class_names
    return theirs is None or ours is None or list(map(str.casefold, theirs)) == list(map(str.casefold, ours))


def require_same_regions(pair: Pair) -> None:
    """Raises ``ValueError`` where the heads' maps of a region are of different sizes."""
    theirs, ours = (getattr(head, "pooled", None) for head in (pair.teacher_head, pair.student_head))
    if None not in (theirs, ours) and theirs != ours:
        raise ValueError(
            f"regions are pooled to {theirs} (teacher), {ours} (student) as (height, width), so the "
            "teacher's head can't read the student's maps of them: give both the same output_size, and train "
            "the teacher with it, or give a position where the features are vectors"
        )


def require_classes(pair: Pair) -> None:
    """Raises ``ValueError`` where the classes of the two can't be compared column by column."""
    teacher, student = require_heads(pair)
    if pair.class_map is not None or classes_agree(teacher, student):
        return
    if teacher.num_classes != student.num_classes:
        raise ValueError(
            f"the teacher predicts {teacher.num_classes} classes and the student {student.num_classes}: give "
            "class_map=, the teacher's class index for each of the student's, or train a teacher for the "
            "student's classes"
        )
    names = list(zip(teacher.class_names or (), student.class_names or (), strict=True))
    column = next(column for column, (a, b) in enumerate(names) if a.casefold() != b.casefold())
    raise ValueError(
        f"the names of the classes differ: class {column} is {names[column][0]!r} (teacher), "
        f"{names[column][1]!r} (student). Give class_map=, the teacher's class index for each of the "
        f"student's; class_map=range({len(names)}) if they mean the same"
    )


def require_predictions_alike(pair: Pair) -> None:
    """Raises ``ValueError`` where the two heads' numbers are of different kinds."""
    teacher, student = require_heads(pair)
    method = "DecoderCrossKD" if isinstance(teacher, DecoderHead) else "CrossKD"
    other = f"crosskd.{method}(), where the teacher's head judges both sides"
    if isinstance(teacher, DecoderHead) and teacher.kind != getattr(student, "kind", None):
        other = "a method of feature maps, such as crosskd.PKD()"
    kinds = []
    for head in (teacher, student):
        objectness = ", times an objectness" if head.objectness else ""
        background = head.background
        if background is not None and pair.class_map is not None:
            background = student.background  # which the class map gives the teacher's for
        softmax = f"a softmax whose class {background} is no object"
        kinds.append(f"a sigmoid per class{objectness}" if background is None else softmax)
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"the classes have {kinds[0]} (teacher), {kinds[1]} (student): probabilities of one kind can't "
            f"be compared with those of the other. Build both heads alike, or choose {other}"
        )
    if teacher.bins != student.bins:
        raise ValueError(
            f"the sides of boxes are predicted as distributions over {teacher.bins} (teacher), "
            f"{student.bins} (student) bins, 1 for plain numbers, which can't be compared. Build both heads "
            f"alike, or choose {other}"
        )


def require_rows_alike(pair: Pair) -> tuple[Head, Head]:
    """The (teacher's, student's) head; raises ``ValueError`` where their rows can't be compared one by one.

    For methods of the student's own predictions: rows on a grid, all levels, equal classes, one kind of
    numbers. What only a batch shows, `require_same_anchors` and `require_same_boxes`, is left.
    """
    heads = require_heads(pair)
    require_grid(pair)
    require_all_levels(pair)
    require_classes(pair)
    require_predictions_alike(pair)
    return heads


# -- on the first step ---------------------------------------------------------------------------


def anchors_agree(step: Step) -> bool:
    """Whether the two heads are of one type and stand at the same anchors.

    The student's own label assignment says then which of the teacher's anchors count.
    """
    return _same_type(step) and _same_places(step)


def _same_type(step: Step) -> bool:
    teacher, student = step.teacher.head, step.student.head
    return teacher.rows == student.rows == "regions" or teacher.head_type == student.head_type


def _same_places(step: Step) -> bool:
    """Whether the two heads stand at the same anchors; where they are unknown, heads of one type do."""
    teacher, student = step.teacher, step.student
    if teacher.head.rows == "regions" and student.head.rows == "regions":
        return True
    theirs, ours = teacher.anchors, student.anchors
    if theirs.per_level != ours.per_level:
        return False
    if theirs.boxes is None or ours.boxes is None or step.resized:
        return _same_type(step)
    scaled = step.scale * ours.boxes.to(theirs.boxes)
    # Anchors may be rounded to whole pixels, which a factor enlarges.
    rounding = 1e-3 if step.scale == 1 else max(step.scale, 1.0)
    return theirs.boxes.shape == scaled.shape and torch.allclose(
        theirs.boxes, scaled, rtol=1e-5, atol=rounding
    )


def require_same_anchors(step: Step) -> None:
    """Raises ``ValueError`` where teacher and student predict boxes at different anchors."""
    if _same_places(step):
        return
    texts = []
    for side in (step.teacher, step.student):
        anchors = side.anchors
        boxes = "" if anchors.boxes is None else f", the first {_rounded(anchors.boxes[0])}"
        texts.append(f"{list(anchors.per_level)} per level of a {side.head.head_type} head{boxes}")
    raise ValueError(
        f"the anchors differ on the first batch: {texts[0]} (teacher), {texts[1]} (student). Predictions at "
        "different anchors can't be compared row by row: build both detectors with the same anchors and "
        "train the teacher with them, or choose crosskd.CrossKD(), where the teacher's head judges both sides"
    )


def require_same_bins(step: Step) -> None:
    """Raises ``ValueError`` where the bins of the sides' distributions are other pixels to the teacher."""
    if step.resized:
        raise ValueError(
            "the sides of boxes are compared as distributions over bins, but the teacher sees the images at "
            f"another size, {list(step.teacher.batch.image_sizes)} against the student's "
            f"{list(step.image_sizes)} as (height, width), where a bin is another length: give both images "
            'of one size, or compare boxes, regression="giou" in PredictionMimicking, or choose '
            "crosskd.CrossKD(), where the teacher's head judges both sides"
        )


def require_same_shares(step: Step) -> None:
    """Raises ``ValueError`` where the two decoders' boxes are shares of other parts of the padded images."""
    sides = (step.teacher, step.student)
    images = [side.batch.image_sizes for side in sides]
    sizes = [side.decoder.box_sizes(side.batch) for side in sides]
    for image, whole, other_image, other_whole in zip(images[0], sizes[0], images[1], sizes[1], strict=True):
        parts = zip(image, whole, other_image, other_whole, strict=True)
        if any(abs(a / of_a - b / of_b) > _SAME_SHARE for a, of_a, b, of_b in parts):
            raise ValueError(
                f"the decoders' boxes are shares of {whole} for an image of {image} (teacher), of "
                f"{other_whole} for {other_image} (student), as (height, width), so the same numbers are "
                "other boxes: transformers counts the batch's padding in, mmdet leaves it out. Pad both "
                "alike, and a pair of the two not at all"
            )


def require_same_boxes(step: Step) -> None:
    """Raises ``ValueError`` where one prediction is another box to the teacher than to the student."""
    teacher, student = step.teacher, step.student
    if not (teacher.head.decodes and student.head.decodes) or step.resized:
        return
    with torch.no_grad():
        theirs, ours = (
            side.head.decode(teacher.predictions, side.anchors).flatten(0, -2) for side in (teacher, student)
        )
    # Where the teacher sees the images at another resolution, its boxes are larger by the strides' factor.
    ours = step.scale * ours.to(theirs)
    rounding = 1e-2 if step.scale == 1 else 2 * max(step.scale, 1.0)  # of anchors to whole pixels
    if torch.allclose(theirs, ours, rtol=1e-3, atol=rounding, equal_nan=True):
        return
    at = int((theirs - ours).abs().amax(dim=-1).argmax())
    raise ValueError(
        f"box coding differs: one prediction is the box {_rounded(theirs[at])} (teacher) and "
        f"{_rounded(ours[at])} (student), xyxy in pixels. Give both the same means, deviations, scale or "
        "strides and train the teacher with them, or choose crosskd.CrossKD(), where the teacher's head "
        "judges both sides"
    )


def _rounded(box: Tensor) -> list[float]:
    return [round(value, 2) for value in box.tolist()]
