"""`check`: a look at a pair of detectors, on one batch, before a long run."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from crosskd.adapters.base import Adapter, AdapterSpec, Objects, PixelCoding, RegionHead
from crosskd.align import ChannelProjection
from crosskd.diagnostics._objects import counts_of, overlaps, rows_of_images
from crosskd.diagnostics.adapter_checks import run_heads
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
from crosskd.step import DetectorTrace, HeadTrace, Trace

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

    Both detectors are copied and stay as they are. Schedules are ignored: losses are those of full strength.
    How good the teacher is, is read off its last head that is distilled, or its last head where only feature
    maps are; a head that answers for regions is run on the teacher's own proposals.

    Args:
        teacher: as for `Distiller`.
        student: likewise.
        images: a batch, as the student takes it; best one of real images.
        targets: with them the teacher's predictions are compared with the objects.
        methods: ``CrossKD()`` unless given.
        adapter: as for `Distiller`.
        distiller_options: further arguments of the `Distiller`, such as ``class_map``.

    Raises:
        ValueError: a run that would be worthless: what `Distiller` refuses; losses that are not finite; a
            distillation without a gradient; a teacher that is sure of nothing, or finds none of the objects.
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
    given = CrossKD() if methods is None else methods
    original = Distiller(teacher, student, given, adapter, **distiller_options)
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
        run = _teacher_run(distiller.pair, trace.teacher)
        confidence = _confidence(run)
        if max(confidence.highest) < _LEAST_SURE:
            unsure = f"its largest class probability is {max(confidence.highest):.3f}"
            remarks.append(f"the teacher is sure of nothing on these images: {unsure}")
        if trace.student.batch.targets is not None:
            fit = _fit(distiller.pair, trace.teacher, trace.student, run, remarks)
    else:
        remarks.append("the teacher is a backbone without a head: how good it is can't be read off its maps")
    if fit is not None and fit.found < fit.objects / 2:
        finds = f"the teacher finds {fit.found} of {fit.objects} objects, less than half"
        remarks.append(f"{finds}: the student will learn to miss the others")
    return CheckReport(
        teacher=_kind(distiller.teacher_adapter),
        student=_kind(distiller.student_adapter),
        head_types=tuple(run.head.head_type for run in trace.teacher.heads.values()),
        splits=tuple(_splits(distiller, trace)),
        projections=tuple(_projections(distiller)),
        differences=tuple(_differences(distiller.pair, trace.teacher, trace.student)),
        own_losses=own,
        distillation_losses=distilled,
        confidence=confidence,
        fit=fit,
        remarks=tuple(remarks),
    )


def _kind(adapter: Adapter) -> str:
    millions = sum(parameter.numel() for parameter in adapter.detector.parameters()) / 1e6
    name = type(adapter.detector).__name__
    return f"{name}, {millions:.2f} million parameters, adapter {type(adapter).__name__}"


def _size(loss: Tensor, student: nn.Module) -> LossSize:
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not loss.requires_grad or not parameters:
        return LossSize(float(loss), 0.0)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    norms = [float(gradient.double().norm()) for gradient in gradients if gradient is not None]
    return LossSize(float(loss.detach()), math.hypot(*norms))


def _remarks_on_losses(own: Mapping[str, LossSize], distilled: Mapping[str, LossSize]) -> list[str]:
    theirs, ours = (math.hypot(*(size.gradient for size in sizes.values())) for sizes in (distilled, own))
    remarks = []
    if ours and not _SMALLEST_RATIO <= theirs / ours <= _LARGEST_RATIO:
        times = f"{theirs / ours:.2g} times that of the student's own losses"
        remarks.append(f"the distillation's gradient is {times}: look at the methods' weights")
    without = [name for name, size in distilled.items() if not size.gradient]
    if without and len(without) < len(distilled):
        remarks.append(f"no gradient of {', '.join(without)} reaches the student")
    return remarks


def _splits(distiller: Distiller, trace: Trace) -> Iterator[Split]:
    for name, step in trace.steps.items():
        method = distiller.methods[name]
        assert isinstance(method, Method)
        for branch in step.teacher.head.branches if "towers" in method.requires else ():
            points = method.tap_points(branch.name)
            if points is not None:
                shapes = [tuple(tap.features.shape) for tap in step.student.taps[branch.name]]
                widths = [branch.tower(level).width(points[1].position) for level in step.teacher.levels]
                yield Split(name, branch.name, *points, tuple(shapes), tuple(widths))


def _projections(distiller: Distiller) -> Iterator[str]:
    for name, module in distiller.methods.named_modules():
        if isinstance(module, ChannelProjection):
            widths = f"{module.student_width} to {module.teacher_width} channels"
            yield f"{name.replace('.projections', '')}: {widths}"


def _differences(pair: Pair, teacher: DetectorTrace, student: DetectorTrace) -> Iterator[str]:
    for name, theirs in teacher.heads.items():
        yield from _head_differences(theirs, student.heads[name])
    if pair.class_map is not None:
        shown = ", ".join(map(str, pair.class_map[:10])) + (", …" if len(pair.class_map) > 10 else "")
        classes = f"{pair.teacher.heads[-1].num_classes} (teacher), {len(pair.class_map)} (student)"
        yield f"classes: {classes}, which are the teacher's {shown}"
    elif teacher.heads and not _comparable(pair):
        theirs_count, ours_count = (side.heads[-1].num_classes for side in (pair.teacher, pair.student))
        names = " of other names" if theirs_count == ours_count else ""
        yield f"classes: {theirs_count} (teacher), {ours_count} (student){names}, without a class_map"
    widths = pair.teacher.widths, pair.student.widths
    if not teacher.heads and widths[0] and widths[1] and widths[0] != widths[1]:
        yield f"maps: {list(widths[0])} channels per level (teacher), {list(widths[1])} (student)"
    for side, strides in zip(("teacher", "student"), pair.left_out(), strict=True):
        if strides:
            yield f"levels: the {side}'s of strides {strides} are left out"
    if pair.scale != 1:
        yield f"scale: the teacher's strides are {pair.scale:g} times the student's"
    shapes = [tuple(side.batch.pixels.shape) for side in (teacher, student)]
    codings = pair.teacher.pixel_coding, pair.student.pixel_coding
    if shapes[0] != shapes[1]:
        yield f"pixels: {shapes[0]} (teacher), {shapes[1]} (student)"
    elif codings[0] != codings[1] and codings[0] is not None and codings[1] is not None:
        yield f"pixels: {_coding(codings[0])} (teacher), {_coding(codings[1])} (student)"


def _head_differences(theirs: HeadTrace, ours: HeadTrace) -> Iterator[str]:
    if theirs.head.head_type != ours.head.head_type:
        yield f"heads: {theirs.head.head_type} (teacher), {ours.head.head_type} (student)"
    own = {branch.name: branch.tower(0) for branch in ours.head.branches}
    for branch in theirs.head.branches:
        teacher, student = branch.tower(0), own.get(branch.name, branch.tower(0))
        if len(teacher.blocks) != len(student.blocks):
            blocks = f"{len(teacher.blocks)} blocks (teacher), {len(student.blocks)} (student)"
            yield f"{branch.name} tower: {blocks}"
        if teacher.width_in != student.width_in:
            yield f"{branch.name} tower: {teacher.width_in} channels (teacher), {student.width_in} (student)"
    quality = theirs.predictions.quality
    if (quality is None) != (ours.predictions.quality is None):
        yield f"a centerness or IoU is predicted by the {'student' if quality is None else 'teacher'} alone"


def _coding(coding: PixelCoding) -> str:
    mean, std = (", ".join(f"{value:.3g}" for value in side) for side in (coding.mean, coding.std))
    return f"{'BGR' if coding.bgr else 'RGB'}, mean ({mean}), deviation ({std})"


def _comparable(pair: Pair) -> bool:
    return pair.class_map is not None or classes_agree(pair.teacher.heads[-1], pair.student.heads[-1])


def _teacher_run(pair: Pair, teacher: DetectorTrace) -> HeadTrace:
    """The run of the teacher's head by which the teacher is judged, its anchors included.

    Among the student's regions are the objects themselves, which any teacher finds: a head that answers for
    regions is run once more, on the teacher's own proposals.
    """
    heads = teacher.adapter.heads
    last = next((head for head in reversed(heads) if head.name in teacher.heads), heads[-1])
    if last.name in teacher.heads and not isinstance(last, RegionHead):
        return teacher.heads[last.name]
    runs = run_heads(teacher.adapter, replace(teacher.batch, targets=None), teacher.maps)
    predictions, anchors = next((made, at) for head, _, made, at in runs if head is last)
    columns = pair.class_map if last is heads[-1] else None
    return HeadTrace(last, predictions.of_classes(columns), (), {}, anchors)


def _confidence(run: HeadTrace) -> Confidence:
    of_images = rows_of_images(run.predictions.confidence(), counts_of(run.head, run.anchors))
    highest = [float(confidence.max()) if len(confidence) else 0.0 for confidence in of_images]
    return Confidence(tuple(highest), tuple(int((c >= SURE).sum()) for c in of_images))


@torch.no_grad()
def _fit(
    pair: Pair, teacher: DetectorTrace, student: DetectorTrace, run: HeadTrace, remarks: list[str]
) -> Fit | None:
    """How well the teacher's predictions fit the objects; ``None``, with a remark, if that is unknown."""
    objects = student.batch.objects
    if objects is None:
        remarks.append("the student's adapter gives no objects of the targets to compare the teacher with")
    elif not any(len(of_image.labels) for of_image in objects):
        remarks.append("the targets hold no object, so how well the teacher finds them is unknown")
    elif not run.head.decodes:
        remarks.append("the teacher's adapter decodes no boxes to compare with the objects")
    else:
        # The first of two heads separates objects from background.
        classless = run.head is not teacher.adapter.heads[-1] or not _comparable(pair)
        counts = counts_of(run.head, run.anchors)
        boxes = list(rows_of_images(run.head.decode(run.predictions, run.anchors), counts))
        sizes = zip(teacher.batch.image_sizes, student.batch.image_sizes, strict=True)
        for image, ((height, width), (own_height, own_width)) in enumerate(
            sizes
        ):  # the teacher's view may differ
            boxes[image] = boxes[image] * boxes[image].new_tensor(
                [own_width / width, own_height / height] * 2
            )
        return _fit_of(boxes, rows_of_images(run.predictions.probabilities(), counts), objects, classless)
    return None


def _fit_of(
    boxes: Sequence[Tensor], probabilities: Sequence[Tensor], objects: Sequence[Objects], classless: bool
) -> Fit:
    """Compares boxes (anchors, 4) or (anchors, classes, 4) and probabilities with objects, image by image."""
    best: tuple[list[Tensor], list[Tensor]] = [], []  # per object, among its class's predictions, among all
    for of_anchors, of_classes, of_image in zip(boxes, probabilities, objects, strict=True):
        # Where each class has a box, each box is a prediction, of that class alone.
        likely = of_classes if of_anchors.ndim == 2 else torch.diag_embed(of_classes).flatten(0, 1)
        found = overlaps(of_anchors.reshape(-1, 4), of_image.boxes)  # (predictions, objects)
        sure_of_any = likely.amax(dim=1, keepdim=True) >= _LEAST_SURE
        sure = sure_of_any if classless else likely[:, of_image.labels] >= _LEAST_SURE
        for column, fitting in zip(best, (found * sure, found * sure_of_any), strict=True):
            # A sum where there is no prediction, which has no largest one.
            column.append(fitting.amax(dim=0) if len(fitting) else fitting.sum(dim=0))
    right, any_class = (torch.cat(column) for column in best)
    found_right, found_any = (int((column >= LEAST_OVERLAP).sum()) for column in (right, any_class))
    return Fit(len(right), found_right, found_any, float(right.mean()), classless)


def _refuse(report: CheckReport) -> None:
    infinite = [name for name, size in report.losses.items() if not math.isfinite(size.value + size.gradient)]
    if infinite:
        found = f"{', '.join(infinite)}: the loss, or its gradient, is not finite on this batch"
        raise ValueError(f"{found}: look for numbers that are not finite in images, targets and weights")
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
            if not fit.found_in_any_class
            else f"Of other classes its predictions fit {fit.found_in_any_class} of them: check the order of "
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
