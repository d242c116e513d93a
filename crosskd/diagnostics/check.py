"""`check`: a look at a pair of detectors, on one batch, before a long run."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from crosskd.adapters.base import Adapter, AdapterSpec, Batch, Objects, PixelCoding, RegionHead
from crosskd.align import ChannelProjection
from crosskd.diagnostics._objects import counts_of, overlaps, rows_of_images
from crosskd.diagnostics.check_report import (
    LEAST_OVERLAP,
    SURE,
    CheckReport,
    Confidence,
    Fit,
    LossSize,
    Split,
)
from crosskd.distiller import Distiller
from crosskd.methods import CrossKD, Method
from crosskd.pairing import Pair, classes_agree
from crosskd.proof import same_random_numbers
from crosskd.step import HeadTrace, Trace, run_head

__all__ = ["check"]

# From this class probability on a prediction counts as one: below it a detector detects next to nothing.
_LEAST_SURE = 0.1
# Beyond these ratios the distillation drowns the student's own losses, or is drowned by them.
_LARGEST_RATIO, _SMALLEST_RATIO = 10.0, 0.01


def check(
    teacher: nn.Module,
    student: nn.Module,
    images: Any,
    targets: Any = None,
    methods: Method | Sequence[Method] | None = None,
    adapter: AdapterSpec | None = None,
    **distiller_options: Any,
) -> CheckReport:
    """Looks at a pair before a long run: runs one step and reports what distillation would do.

    Both detectors are copied for it and stay as they are: no gradient, buffer or mode changes. Schedules
    are ignored: the losses are those of full strength. How good the teacher is, is read off its last head
    that is distilled, or its last head where only feature maps are; a head that answers for regions is run
    on the teacher's own proposals.

    Args:
        teacher: as for `Distiller`.
        student: likewise.
        images: a batch, as the student takes it; best one of real images.
        targets: with them the teacher's predictions are compared with the objects.
        methods: ``CrossKD()`` unless given.
        adapter: as for `Distiller`.
        distiller_options: further arguments of the `Distiller`, such as ``class_map``.

    Returns:
        A report to read (``print``) or to take numbers from.

    Raises:
        ValueError: a run that would be worthless, saying what to do: what `Distiller` refuses; losses that
            are not finite; a distillation without a gradient; a teacher that is sure of nothing on these
            images, or that finds none of the objects.
        TypeError: no adapter understands a detector.

    Example:
        >>> from torchvision.models.detection import RetinaNet
        >>> from torchvision.models.detection.anchor_utils import AnchorGenerator
        >>> def detector(width):
        ...     backbone = nn.Conv2d(3, width, 3, stride=16, padding=1)
        ...     backbone.out_channels = width
        ...     anchors = AnchorGenerator(((32,),), ((1.0,),))
        ...     return RetinaNet(backbone, 3, min_size=64, max_size=64, anchor_generator=anchors)
        >>> check(detector(16), detector(8), [torch.rand(3, 64, 64)])
        Traceback (most recent call last):
        ValueError: the teacher is sure of nothing on these images: its largest class probability is 0.01...
    """
    methods = CrossKD() if methods is None else methods
    original = Distiller(teacher, student, methods, adapter, **distiller_options)
    # The view may hold whatever it likes, but no detector.
    distiller = copy.deepcopy(original, {id(original.teacher_view): original.teacher_view}).train()
    for method in distiller.methods.values():
        method.schedule = None  # type: ignore[assignment]
    with same_random_numbers(student), torch.enable_grad():
        trace = distiller.trace(images, targets)
        report = _report(distiller, trace)
    _refuse(report)
    return report


def _report(distiller: Distiller, trace: Trace) -> CheckReport:
    assert trace.teacher is not None
    sizes = {name: _size(loss, distiller.student) for name, loss in distiller.named_losses(trace).items()}
    own = {name: size for name, size in sizes.items() if name in trace.own_losses}
    distilled = {name: size for name, size in sizes.items() if name not in own}
    remarks = _remarks_on_losses(own, distilled)
    confidence, fit = None, None
    if distiller.teacher_adapter.heads:
        run = _teacher_run(distiller, trace)
        confidence = _confidence(run)
        if max(confidence.highest) < _LEAST_SURE:
            remarks.append(
                "the teacher is sure of nothing on these images: its largest class probability is "
                f"{max(confidence.highest):.3f}"
            )
        if trace.student.batch.targets is not None:
            fit = _fit(distiller, trace, run, remarks)
    else:
        remarks.append("the teacher is a backbone without a head: how good it is can't be read off its maps")
    if fit is not None and fit.found < fit.objects / 2:
        remarks.append(
            f"the teacher finds {fit.found} of {fit.objects} objects, less than half: the student will learn "
            "to miss the others"
        )
    return CheckReport(
        teacher=_kind(distiller.teacher_adapter),
        student=_kind(distiller.student_adapter),
        head_types=tuple(run.head.head_type for run in trace.teacher.heads.values()),
        splits=tuple(_splits(distiller, trace)),
        projections=tuple(_projections(distiller)),
        differences=tuple(_differences(distiller, trace)),
        own_losses=own,
        distillation_losses=distilled,
        confidence=confidence,
        fit=fit,
        remarks=tuple(remarks),
    )


def _kind(adapter: Adapter) -> str:
    count = sum(parameter.numel() for parameter in adapter.detector.parameters())
    name = type(adapter.detector).__name__
    return f"{name}, {count / 1e6:.2f} million parameters, adapter {type(adapter).__name__}"


# -- losses --------------------------------------------------------------------------------------


def _size(loss: Tensor, student: nn.Module) -> LossSize:
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    value = float(loss.detach())
    if not loss.requires_grad or not parameters:
        return LossSize(value, 0.0)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    norms = [gradient.double().norm() for gradient in gradients if gradient is not None]
    return LossSize(value, float(torch.stack(norms).norm()) if norms else 0.0)


def _remarks_on_losses(own: Mapping[str, LossSize], distilled: Mapping[str, LossSize]) -> list[str]:
    theirs, ours = (math.hypot(*(size.gradient for size in sizes.values())) for sizes in (distilled, own))
    remarks = []
    if ours and not _SMALLEST_RATIO <= theirs / ours <= _LARGEST_RATIO:
        remarks.append(
            f"the distillation's gradient is {theirs / ours:.2g} times that of the student's own losses: "
            "look at the methods' weights"
        )
    without = [name for name, size in distilled.items() if not size.gradient]
    if without and len(without) < len(distilled):
        remarks.append(f"no gradient of {', '.join(without)} reaches the student")
    return remarks


# -- where features are read ---------------------------------------------------------------------


def _splits(distiller: Distiller, trace: Trace) -> list[Split]:
    splits = []
    for name, step in trace.steps.items():
        method = distiller.methods[name]
        assert isinstance(method, Method)
        if "towers" not in method.requires:
            continue
        for branch in step.teacher.head.branches:
            points = method.tap_points(branch.name)
            if points is None:
                continue
            shapes = [tuple(tap.features.shape) for tap in step.student.taps[branch.name]]
            widths = [branch.tower(level).width(points[1].position) for level in step.teacher.levels]
            splits.append(Split(name, branch.name, *points, tuple(shapes), tuple(widths)))
    return splits


def _projections(distiller: Distiller) -> list[str]:
    projections = []
    for name, module in distiller.methods.named_modules():
        if isinstance(module, ChannelProjection):
            widths = f"{module.student_width} to {module.teacher_width} channels"
            projections.append(f"{name.replace('.projections', '')}: {widths}")
    return projections


# -- what differs --------------------------------------------------------------------------------


def _differences(distiller: Distiller, trace: Trace) -> list[str]:
    assert trace.teacher is not None
    differences = []
    pair = distiller.pair
    for name, theirs in trace.teacher.heads.items():
        differences += _head_differences(theirs, trace.student.heads[name])
    if pair.class_map is not None:
        shown = ", ".join(map(str, pair.class_map[:10])) + (", …" if len(pair.class_map) > 10 else "")
        differences.append(
            f"classes: {pair.teacher.heads[-1].num_classes} (teacher), {len(pair.class_map)} (student), "
            f"which are the teacher's {shown}"
        )
    elif trace.teacher.heads and not _comparable(pair):
        classes = [adapter.heads[-1].num_classes for adapter in (pair.teacher, pair.student)]
        names = " of other names" if classes[0] == classes[1] else ""
        differences.append(
            f"classes: {classes[0]} (teacher), {classes[1]} (student){names}, without a class_map"
        )
    if not trace.teacher.heads:
        differences += _map_differences(pair)
    for side, strides in zip(("teacher", "student"), pair.left_out(), strict=True):
        if strides:
            differences.append(f"levels: the {side}'s of strides {strides} are left out")
    if pair.scale != 1:
        differences.append(f"scale: the teacher's strides are {pair.scale:g} times the student's")
    shapes = [tuple(side.batch.pixels.shape) for side in (trace.teacher, trace.student)]
    codings = [adapter.pixel_coding for adapter in (pair.teacher, pair.student)]
    if shapes[0] != shapes[1]:
        differences.append(f"pixels: {shapes[0]} (teacher), {shapes[1]} (student)")
    elif codings[0] != codings[1] and codings[0] is not None and codings[1] is not None:
        differences.append(f"pixels: {_coding(codings[0])} (teacher), {_coding(codings[1])} (student)")
    return differences


def _head_differences(theirs: HeadTrace, ours: HeadTrace) -> list[str]:
    """What differs between two heads that are distilled."""
    differences = []
    if theirs.head.head_type != ours.head.head_type:
        differences.append(f"heads: {theirs.head.head_type} (teacher), {ours.head.head_type} (student)")
    own = {branch.name: branch.tower(0) for branch in ours.head.branches}
    for branch in theirs.head.branches:
        if branch.name not in own:
            continue
        towers = branch.tower(0), own[branch.name]
        for what, a, b in (
            ("blocks", *(len(tower.blocks) for tower in towers)),
            ("channels", *(tower.width_in for tower in towers)),
        ):
            if a != b:
                differences.append(f"{branch.name} tower: {a} {what} (teacher), {b} (student)")
    quality = [run.predictions.quality is not None for run in (theirs, ours)]
    if quality[0] != quality[1]:
        side = "teacher" if quality[0] else "student"
        differences.append(f"a centerness or IoU is predicted by the {side} alone")
    return differences


def _map_differences(pair: Pair) -> list[str]:
    widths = pair.teacher.widths, pair.student.widths
    if widths[0] is None or widths[1] is None or widths[0] == widths[1]:
        return []
    return [f"maps: {list(widths[0])} channels per level (teacher), {list(widths[1])} (student)"]


def _coding(coding: PixelCoding) -> str:
    numbers = [", ".join(f"{value:.3g}" for value in side) for side in (coding.mean, coding.std)]
    return f"{'BGR' if coding.bgr else 'RGB'}, mean ({numbers[0]}), deviation ({numbers[1]})"


# -- how good the teacher is ---------------------------------------------------------------------


def _comparable(pair: Pair) -> bool:
    """Whether the teacher's classes, by the class map, are the student's."""
    return pair.class_map is not None or classes_agree(pair.teacher.heads[-1], pair.student.heads[-1])


@torch.no_grad()
def _teacher_run(distiller: Distiller, trace: Trace) -> HeadTrace:
    """The run of the teacher's head by which the teacher is judged, its anchors included.

    In training there are the objects themselves among the student's regions, which any teacher finds: a head
    that answers for regions is run once more, on the teacher's own proposals.
    """
    teacher = trace.teacher
    assert teacher is not None
    heads = teacher.adapter.heads
    last = next((head for head in reversed(heads) if head.name in teacher.heads), heads[-1])
    if last.name in teacher.heads and not isinstance(last, RegionHead):
        return teacher.heads[last.name]
    batch = replace(teacher.batch, targets=None)
    run: HeadTrace | None = None
    for head in heads[: heads.index(last) + 1]:
        columns = distiller.pair.class_map if head is heads[-1] else None
        if isinstance(head, RegionHead):
            assert run is not None
            anchors = head.regions(run.predictions, run.anchors, batch)
            feed = [head.pool(teacher.maps, anchors, batch)]
        else:
            anchors, feed = head.anchors(batch, teacher.maps), list(teacher.maps)
        run = replace(run_head(head, feed, range(len(feed)), class_map=columns), anchors=anchors)
    assert run is not None
    return run


def _confidence(run: HeadTrace) -> Confidence:
    of_images = rows_of_images(run.predictions.confidence(), counts_of(run.head, run.anchors))
    highest = [float(confidence.max()) if len(confidence) else 0.0 for confidence in of_images]
    return Confidence(tuple(highest), tuple(int((c >= SURE).sum()) for c in of_images))


@torch.no_grad()
def _fit(distiller: Distiller, trace: Trace, run: HeadTrace, remarks: list[str]) -> Fit | None:
    """How well the teacher's predictions fit the objects; ``None``, with a remark, if that is unknown."""
    objects = trace.student.batch.objects
    if objects is None:
        remarks.append("the student's adapter gives no objects of the targets to compare the teacher with")
        return None
    if not any(len(of_image.labels) for of_image in objects):
        remarks.append("the targets hold no object, so how well the teacher finds them is unknown")
        return None
    if not run.head.decodes:
        remarks.append("the teacher's adapter decodes no boxes to compare with the objects")
        return None
    # The first of two heads separates objects from background.
    classless = run.head is not distiller.teacher_adapter.heads[-1] or not _comparable(distiller.pair)
    counts = counts_of(run.head, run.anchors)
    decoded = rows_of_images(run.head.decode(run.predictions, run.anchors), counts)
    probabilities = rows_of_images(run.predictions.probabilities(), counts)
    assert trace.teacher is not None
    boxes = _in_student_pixels(decoded, trace.teacher.batch, trace.student.batch)
    return _fit_of(boxes, probabilities, objects, classless)


def _in_student_pixels(boxes: Sequence[Tensor], teacher: Batch, student: Batch) -> list[Tensor]:
    """Boxes of each image in pixels of the student's batch, whose images may be of another size."""
    scaled = []
    for of_image, size, own in zip(boxes, teacher.image_sizes, student.image_sizes, strict=True):
        factors = of_image.new_tensor([own[1] / size[1], own[0] / size[0]] * 2)
        scaled.append(of_image * factors)
    return scaled


def _fit_of(
    boxes: Sequence[Tensor], probabilities: Sequence[Tensor], objects: Sequence[Objects], classless: bool
) -> Fit:
    """Compares predictions with objects, image by image.

    Args:
        boxes: shape (anchors, 4), or (anchors, classes, 4) with a box for each class.
        probabilities: shape (anchors, classes).
        objects: of each image.
        classless: any class counts as right.
    """
    right: list[Tensor] = []
    any_class: list[Tensor] = []
    for of_anchors, of_classes, of_image in zip(boxes, probabilities, objects, strict=True):
        # Where each class has a box, each box is a prediction, of that class alone.
        likely = of_classes if of_anchors.ndim == 2 else torch.diag_embed(of_classes).flatten(0, 1)
        found = overlaps(of_anchors.reshape(-1, 4), of_image.boxes)  # (predictions, objects)
        sure_of_any = likely.amax(dim=1, keepdim=True) >= _LEAST_SURE
        sure = sure_of_any if classless else likely[:, of_image.labels] >= _LEAST_SURE
        # A sum where there is no prediction, which has no largest one.
        for best, fitting in ((right, found * sure), (any_class, found * sure_of_any)):
            best.append(fitting.amax(dim=0) if len(fitting) else fitting.sum(dim=0))
    best_right, best_any = torch.cat(right), torch.cat(any_class)
    return Fit(
        objects=len(best_right),
        found=int((best_right >= LEAST_OVERLAP).sum()),
        found_in_any_class=int((best_any >= LEAST_OVERLAP).sum()),
        best_iou=float(best_right.mean()),
        classless=classless,
    )


def _refuse(report: CheckReport) -> None:
    """Raises ``ValueError`` where a run would be worthless."""
    infinite = [name for name, size in report.losses.items() if not math.isfinite(size.value + size.gradient)]
    if infinite:
        raise ValueError(
            f"{', '.join(infinite)}: the loss, or its gradient, is not finite on this batch: look for "
            "numbers that are not finite in images, targets and weights"
        )
    # Methods of feature maps alone don't need the teacher's head to be right: there are remarks on it.
    highest = max(report.confidence.highest) if report.confidence is not None else 1.0
    if report.head_types and highest < _LEAST_SURE:
        raise ValueError(
            f"the teacher is sure of nothing on these images: its largest class probability is {highest:.3f} "
            f"and should be at least {_LEAST_SURE}. Load its trained weights, give it images as it was "
            "trained with (size, order of channels, normalisation), and choose some that hold what it knows"
        )
    fit = report.fit
    if report.head_types and fit is not None and not fit.found:
        advice = (
            "Check its weights, that boxes are xyxy in pixels, and that it sees images as it was trained "
            "with; if these objects are too hard for it, look at other images, or for another teacher"
        )
        if fit.found_in_any_class:
            advice = (
                f"Of other classes its predictions fit {fit.found_in_any_class} of them: check the order of "
                "classes (class_map=), and whether labels are counted from 0"
            )
        raise ValueError(
            f"the teacher finds none of the {fit.objects} objects in the targets (best IoU "
            f"{fit.best_iou:.2f} on average among its predictions of their classes). {advice}"
        )
    if not any(size.gradient for size in report.distillation_losses.values()):
        raise ValueError(
            "the distillation has no gradient at the student's parameters, so nothing would be distilled: "
            "the student equals its teacher, its features vanish before the split, its parameters are "
            "frozen, or the teacher's head gives the same predictions for any features"
        )
