"""The pieces of one training step, which `crosskd.Distiller` puts together in its ``trace``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from crosskd.adapters.base import Adapter, Anchors, Batch, DecoderHead, Head, Objects, RegionHead
from crosskd.methods.base import Method
from crosskd.pairing import Pair, classes_agree
from crosskd.predictions import Assignment, mean_over_ranks
from crosskd.step import (
    DetectorTrace,
    HeadTrace,
    Side,
    Step,
    distinct_objects,
    outside_graph,
    resized_boxes,
    run_head,
    shape_only,
    space,
)
from crosskd.towers import Tapped, TapPoint
from crosskd.views import Placement, lie_alike, place_level

__all__ = [
    "first_head",
    "points_of",
    "reads_maps",
    "run_region_heads",
    "run_teacher",
    "steps_of",
    "teacher_autocast",
    "with_own_losses",
]

Methods = Mapping[str, Method]
"""Active methods by their names."""


def _of_head(methods: Methods, name: str) -> dict[str, Method]:
    """Those of some methods that distil the head of a name."""
    return {key: method for key, method in methods.items() if method.head == name}


def points_of(head: Head, methods: Methods, side: int) -> dict[str, dict[str, TapPoint]]:
    """Where methods tap a head's towers, by branch and method.

    Args:
        head: the student's or the teacher's.
        methods: the active ones.
        side: 0 for the student's points, 1 for the teacher's.
    """
    points: dict[str, dict[str, TapPoint]] = {}
    for branch in head.branches:
        for name, method in _of_head(methods, head.name).items():
            both = method.tap_points(branch.name) if "towers" in method.requires else None
            if both is not None:
                points.setdefault(branch.name, {})[name] = both[side]
    return points


# -- the teacher ---------------------------------------------------------------------------------


def teacher_autocast(pair: Pair) -> AbstractContextManager[object]:
    """Autocast for the teacher's own forward, where it has a type of its own; else whatever is there already.

    Args:
        pair: the two detectors.
    """
    if pair.teacher_dtype is None:
        return nullcontext()
    return torch.autocast(next(pair.teacher.detector.parameters()).device.type, dtype=pair.teacher_dtype)


def first_head(pair: Pair, methods: Methods) -> Head | None:
    """The teacher's head that runs on the grid of its maps, where a method distils it.

    Args:
        pair: the two detectors.
        methods: those that are asked.
    """
    head = _head_named(pair.teacher, pair.student.heads[0].name)
    return head if head is not None and _of_head(methods, head.name) else None


def reads_maps(methods: Methods, first: Head | None) -> bool:
    """Whether a method reads the teacher's maps, or distils a head that runs on them later.

    Args:
        methods: those that are asked.
        first: their `first_head`.
    """
    run = None if first is None else first.name
    return any("maps" in method.requires or method.head not in (None, run) for method in methods.values())


def run_teacher(pair: Pair, batch: Batch, methods: Methods, *, each_image: bool = False) -> DetectorTrace:
    """The teacher's maps and its first head's run, as far as methods require them.

    Args:
        pair: the two detectors.
        batch: as the teacher takes it.
        methods: the active ones, one at least.
        each_image: of the features that methods tap, keep a list of what they keep of each image.
    """
    adapter = pair.teacher
    # No decorator: the compiler doesn't follow a decorated function into no_grad and out again.
    with torch.no_grad(), teacher_autocast(pair):
        maps = adapter.maps_of(batch)
        heads = {}
        head = first_head(pair, methods)
        if head is not None:
            levels = list(range(len(maps)))
            if pair.levels is not None and not isinstance(pair.student.heads[0], DecoderHead):
                levels = [level for _, level in pair.levels]
            fed = [maps[level] for level in levels]
            heads[head.name] = _observed(pair, head, fed, levels, methods, batch, each_image=each_image)
    batch = replace(batch, pixels=shape_only(batch.pixels))
    dtype = _dtype_for_methods(pair)
    if not reads_maps(methods, head):
        maps = [shape_only(feature_map, dtype) for feature_map in maps]
    elif dtype is not None:
        maps = [feature_map.to(dtype) for feature_map in maps]
    return DetectorTrace(adapter, batch, maps, heads)


def _dtype_for_methods(pair: Pair) -> torch.dtype | None:
    """What a teacher's maps and predictions are given on in where it calculates in a type of its own.

    It is that of the weights: losses needn't mix types, and anchors, which torchvision makes in the type of
    the maps, aren't rounded to 8 bits.
    """
    return None if pair.teacher_dtype is None else next(pair.teacher.detector.parameters()).dtype


def _observed(
    pair: Pair,
    head: Head,
    maps: Sequence[Tensor],
    levels: Sequence[int],
    methods: Methods,
    batch: Batch,
    *,
    each_image: bool = False,
) -> HeadTrace:
    """A run of one of the teacher's heads: predictions, and what each method keeps of its features."""

    def keep(name: str, tapped: Tapped) -> Any:
        if not each_image:
            return methods[name].keep_of_teacher(tapped)
        images = [replace(tapped, features=image) for image in torch.split(tapped.features, 1)]
        return [methods[name].keep_of_teacher(image) for image in images]

    points, columns = points_of(head, methods, 1), _columns(pair, head)
    run = run_head(head, maps, levels, points, keep, columns, batch)
    dtype = _dtype_for_methods(pair)
    return run if dtype is None else replace(run, predictions=run.predictions.to(dtype))


def _columns(pair: Pair, head: Head) -> tuple[int, ...] | None:
    """The teacher's columns of the logits that count: the classes are those of its last head."""
    return pair.class_map if head is pair.teacher.heads[-1] else None


def _head_named(adapter: Adapter, name: str) -> Head | None:
    return next((head for head in adapter.heads if head.name == name), None)


# -- the student ---------------------------------------------------------------------------------


@outside_graph
def with_own_losses(run: HeadTrace, batch: Batch, maps: Sequence[Tensor]) -> HeadTrace:
    """A run of one of the student's heads with its anchors, own losses and label assignment.

    Args:
        run: the head's run; of a `RegionHead` with its regions as anchors.
        batch: as the student takes it.
        maps: the student's.
    """
    anchors = run.head.anchors(batch, maps) if run.anchors is None else run.anchors
    run = replace(run, anchors=anchors, all_anchors=anchors)
    if batch.targets is None:
        return run
    if isinstance(run.head, DecoderHead):
        return replace(run, losses=run.head.own_losses(batch))
    losses, assignment = run.head.losses(run.predictions, anchors, batch)
    return replace(run, losses=losses, assignment=assignment)


def run_region_heads(
    pair: Pair, teacher: DetectorTrace | None, student: DetectorTrace, methods: Methods
) -> None:
    """Runs what comes after the student's first head, on the regions that it proposes, on both sides.

    Args:
        pair: the two detectors.
        teacher: gets the runs of its heads that methods distil; ``None`` without active methods.
        student: gets the runs of its heads.
        methods: the active ones.
    """
    previous = student.heads[student.adapter.heads[0].name]
    for head in student.adapter.heads[1:]:
        assert isinstance(head, RegionHead)
        distilled = bool(_of_head(methods, head.name))
        if student.batch.targets is None and not distilled:
            return
        regions = _regions(head, previous, student.batch)
        if teacher is not None and distilled:
            theirs = _head_named(pair.teacher, head.name)
            assert isinstance(theirs, RegionHead)
            with torch.no_grad(), teacher_autocast(pair):
                pooled = theirs.pool(teacher.maps, regions, teacher.batch)
                observed = _observed(pair, theirs, [pooled], [0], methods, teacher.batch)
            teacher.heads[head.name] = replace(observed, anchors=regions, all_anchors=regions)
        pooled = head.pool(student.maps, regions, student.batch)
        run = replace(run_head(head, [pooled], [0], points_of(head, methods, 0)), anchors=regions)
        previous = with_own_losses(run, student.batch, student.maps)
        student.heads[head.name] = previous


@outside_graph
def _regions(head: RegionHead, previous: HeadTrace, batch: Batch) -> Any:
    """The student's regions, which are constants."""
    with torch.no_grad():
        return head.regions(previous.predictions.detach(), previous.anchors, batch)


# -- what methods see ----------------------------------------------------------------------------


def steps_of(
    pairs: Mapping[str, Pair],
    teacher: DetectorTrace,
    student: DetectorTrace,
    methods: Methods,
    unlabelled_threshold: float,
) -> dict[str, Step]:
    """What each method sees of a step.

    Args:
        pairs: each method's.
        teacher: its run.
        student: its run.
        methods: the active ones.
        unlabelled_threshold: the class probability from which on the teacher's anchors are positives, for
            images without targets.
    """
    steps = {}
    unlabelled: dict[str, Assignment] = {}  # one per head: an assigner that samples does so once
    averaged: dict[str, Assignment] = {}
    placed: dict[str, tuple[HeadTrace, Placement | None]] = {}
    for name, method in methods.items():
        pair, theirs, ours = pairs[name], None, None
        assignment, assign, placement = None, None, None
        if method.head is not None:
            head, ours = method.head, student.heads[method.head]
            if head not in placed:
                teacher.heads[head] = _with_anchors(teacher.heads[head], teacher)
                placement = _placement(pair, teacher, student, teacher.heads[head])
                placed[head] = _placed(pair, teacher, student, teacher.heads[head], placement), placement
            theirs, placement = placed[head]
            decoders = isinstance(ours.head, DecoderHead)
            if student.batch.targets is None and head not in unlabelled and not decoders:
                unlabelled[head] = theirs.head.assign_unlabelled(theirs.predictions, unlabelled_threshold)
            assignment = unlabelled.get(head, ours.assignment)
            if assignment is not None and "predictions" in method.requires:
                if head not in averaged:
                    averaged[head] = _averaged(assignment)
                assignment = averaged[head]
            assign = _teacher_assigner(
                pair, teacher.heads[head], teacher, student, unlabelled.get(head), placement
            )
        required = frozenset(method.requires)
        steps[name] = Step(
            Side(teacher, theirs, required, name, pair.class_map),
            Side(student, ours, required, name),
            class_map=pair.class_map,
            scale=pair.scale,
            alike=lie_alike(teacher.batch, student.batch, pair.scale),
            resized=placement is not None and placement.mixes,
            assignment=assignment,
            assign_by_teacher=assign,
            found_by_teacher=partial(_found_by_teacher, pair, teacher, student),
        )
    return steps


def _averaged(assignment: Assignment) -> Assignment:
    """With a normalizer that is the same on all processes.

    The one place for it: adapters aren't asked as often in a process whose images have no targets, and each
    process must take part in each mean.
    """
    return replace(assignment, normalizer=mean_over_ranks(assignment.normalizer))


def _with_anchors(run: HeadTrace, teacher: DetectorTrace) -> HeadTrace:
    """A run of one of the teacher's heads with its own anchors."""
    if run.anchors is not None:
        return run
    anchors = run.head.anchors(teacher.batch, [shape_only(feature_map) for feature_map in teacher.maps])
    return replace(run, anchors=anchors.of_levels(run.levels), all_anchors=anchors)


def _placement(
    pair: Pair, teacher: DetectorTrace, student: DetectorTrace, run: HeadTrace
) -> Placement | None:
    """Where the student's locations lie in the teacher's levels; ``None`` where they are the same.

    Raises:
        ValueError: the two lie otherwise than by the strides' factor, without ``resize_levels``.
    """
    if run.head.rows == "regions" or any(
        isinstance(head, DecoderHead) for head in (run.head, pair.student_head)
    ):
        return None
    last = run.head.branches[0].towers[0].channels_last
    theirs = [space(teacher.maps[level], channels_last=last) for level in run.levels]
    ours = [space(feature_map, channels_last=last) for feature_map in student.maps]
    alike = lie_alike(teacher.batch, student.batch, pair.scale)
    if theirs == ours and (alike or pair.levels is None):  # without strides no factor is known
        return None
    batches, grids, exact = (teacher.batch, student.batch), [], True
    if len(theirs) != len(ours) or any(len(size) != 2 for size in (*theirs, *ours)):
        _refuse_levels(pair, batches, theirs, ours)
    for place, level in enumerate(run.levels):
        strides = (_stride(pair.teacher, level), _stride(pair.student, place))
        sizes = theirs[place], ours[place]
        grid, fits = place_level(batches, sizes, strides, pair.scale, run.predictions.logits)
        grids.append(grid)
        exact = exact and fits
    if not exact and not pair.resize_levels:
        _refuse_levels(pair, batches, theirs, ours)
    per_level = run.anchors.per_level
    return Placement(tuple(theirs), per_level, tuple(grids), not exact, _factors(batches), run.head.copies)


def _stride(adapter: Adapter, level: int) -> float | None:
    return None if adapter.strides is None else adapter.strides[level]


def _factors(batches: tuple[Batch, Batch]) -> Tensor:
    """The student's pixels per pixel of the teacher's, shape (batch, 4), along x, y, x, y."""
    theirs, ours = (torch.tensor(batch.image_sizes, dtype=torch.float64) for batch in batches)
    return (ours / theirs).flip(1).repeat(1, 2)


def _refuse_levels(
    pair: Pair, batches: tuple[Batch, Batch], theirs: Sequence[Any], ours: Sequence[Any]
) -> NoReturn:
    """Raises ``ValueError`` for levels that don't lie on each other."""
    images = [list(batch.image_sizes) for batch in batches]
    raise ValueError(
        f"the levels differ: {theirs} (teacher), {ours} (student) as (height, width), of images of "
        f"{images[0]} (teacher), {images[1]} (student). The levels that belong together say by their strides "
        f"that the teacher's images are {pair.scale:g} times as large as the student's. Give it such images; "
        "pass the factor that they really have as view_scale=; build both with the same pyramid levels; or "
        "have the teacher's resized by resize_levels=True, where they are maps"
    )


def _placed(
    pair: Pair, teacher: DetectorTrace, student: DetectorTrace, run: HeadTrace, placement: Placement | None
) -> HeadTrace:
    """A run of one of the teacher's heads at the student's locations."""
    if placement is None:
        return run
    maps = [shape_only(feature_map) for feature_map in teacher.maps]
    last = run.head.branches[0].towers[0].channels_last
    for place, level in enumerate(run.levels):
        size = space(student.maps[place], channels_last=last)
        whole = maps[level][:, :1, :1] if last else maps[level][:, :, :1, :1]
        shape = (-1, *size, -1) if last else (-1, -1, *size)
        maps[level] = whole.expand(*shape)
    batch = teacher.batch
    if not placement.mixes:  # the teacher's batch, padded as the student's is
        padded = [round(pair.scale * pixels) for pixels in student.batch.size]
        batch = replace(batch, pixels=batch.pixels[:, :, :1, :1].expand(-1, -1, *padded))
    anchors = run.head.anchors(batch, maps)
    boxes = None
    if placement.mixes and run.head.decodes:
        with torch.no_grad():
            boxes = placement.boxes(run.head.decode(run.predictions, run.anchors))
    return replace(
        run,
        predictions=placement.predictions(run.predictions),
        anchors=anchors.of_levels(run.levels),
        all_anchors=anchors,
        boxes=boxes,
    )


def _teacher_assigner(
    pair: Pair,
    run: HeadTrace,
    teacher: DetectorTrace,
    student: DetectorTrace,
    unlabelled: Assignment | None,
    placement: Placement | None,
) -> Callable[[], Assignment]:
    """What gives the teacher's own label assignment at the levels that are compared.

    Without targets that is what its predictions have given already, ``unlabelled``.
    """

    @outside_graph
    def assign() -> Assignment:
        if unlabelled is not None:
            return _averaged(unlabelled)
        with torch.no_grad():
            batch = replace(teacher.batch, objects=_teacher_objects(pair, teacher, student))
            found = run.head.assign(run.predictions, run.all_anchors, batch)
        if run.anchors is not run.all_anchors:
            rows = cast(Anchors, run.all_anchors).rows(run.levels).to(found.positive.device)
            weights = None if found.label_weights is None else found.label_weights[:, rows]
            found = Assignment(weights, found.positive[:, rows], found.normalizer)
        return _averaged(found if placement is None else placement.assignment(found))

    return assign


def _teacher_objects(pair: Pair, teacher: DetectorTrace, student: DetectorTrace) -> tuple[Objects, ...]:
    """The batch's objects in pixels of the teacher's batch, labelled by the columns of its predictions."""
    if student.batch.objects is None:
        raise ValueError(
            "the student's adapter gives no objects of the targets, which the teacher's label assignment "
            "needs: give generic() objects=, a function of the targets"
        )
    same = classes_agree(pair.teacher.heads[-1], pair.student.heads[-1])
    objects = []
    sizes = zip(teacher.batch.image_sizes, student.batch.image_sizes, strict=True)
    for of_image, (size, own) in zip(student.batch.objects, sizes, strict=True):
        labels = of_image.labels
        # With a class map the teacher's predictions are of the student's classes, in the student's order.
        if pair.class_map is None and not same:
            # Most assigners look at places alone; those that look at classes refuse this.
            labels = torch.full_like(labels, -1)
        objects.append(Objects(resized_boxes(of_image.boxes, own, size), labels))
    return tuple(objects)


@outside_graph
@torch.no_grad()
def _found_by_teacher(
    pair: Pair, teacher: DetectorTrace, student: DetectorTrace, threshold: float
) -> tuple[Objects, ...]:
    """What the teacher's first head finds, boxes in pixels of the student's batch."""
    head = teacher.adapter.heads[0] if teacher.adapter.heads else None
    if head is None or not head.decodes:
        raise ValueError(
            f"the objects of unlabelled images are those that the teacher finds, but a "
            f"{type(teacher.adapter.detector).__name__} "
            + ("has no head" if head is None else "decodes no boxes: pass its adapter decode=")
            + ". Give images with targets, or another method for those without"
        )
    with teacher_autocast(pair):
        columns = _columns(pair, head)
        run = run_head(head, teacher.maps, range(len(teacher.maps)), class_map=columns, batch=teacher.batch)
    boxes = head.decode(run.predictions, head.anchors(teacher.batch, teacher.maps)).float()
    scores, labels = run.predictions.probabilities().float().max(dim=-1)
    found = []
    for index, (size, own) in enumerate(
        zip(teacher.batch.image_sizes, student.batch.image_sizes, strict=True)
    ):
        sure = scores[index] >= threshold
        of_image = distinct_objects(boxes[index][sure], scores[index][sure], labels[index][sure], size)
        found.append(replace(of_image, boxes=resized_boxes(of_image.boxes, size, own)))
    return tuple(found)
