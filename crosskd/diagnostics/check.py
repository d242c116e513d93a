"""`check`: a look at a pair of detectors, on a few batches, before a long run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from crosskd._unchanged import unchanged
from crosskd.adapters.base import Adapter, AdapterSpec, Batch, DecoderHead, PixelCoding
from crosskd.adapters.replacing import replaced
from crosskd.align import ChannelProjection
from crosskd.diagnostics._detections import Seen, fit_of, seen_in
from crosskd.diagnostics.adapter_checks import moved, run_heads
from crosskd.diagnostics.check_report import SURE_DETECTION, CheckReport, Confidence, Fit, LossSize, Split
from crosskd.distiller import Distiller
from crosskd.methods import CrossKD, Method
from crosskd.pairing import Pair, classes_agree
from crosskd.proof import same_random_numbers
from crosskd.step import DetectorTrace, HeadTrace, Trace

__all__ = ["check"]

# Below this class probability, or AP50, a detector detects nothing; below the other AP50 it teaches little.
_LEAST_SURE, _WORTHLESS_AP50, _LEAST_AP50 = 0.1, 1.0, 25.0
# The share of objects over which its likeliest class is right, at least; and that of a class, of several
# objects, that is taken for another one where the two are swapped; and how many objects prove a wrong order.
_LEAST_RIGHT, _MOSTLY, _SEVERAL, _MANY = 0.25, 2 / 3, 3, 8
# Beyond these ratios the distillation drowns the student's own losses, or is drowned by them.
_LARGEST_RATIO, _SMALLEST_RATIO = 200.0, 0.01
# How far pixels may lie outside 0 to 1, as interpolation leaves them; what an image that isn't black reaches.
_PIXEL_MARGIN, _DARK = 0.1, 0.02
_OTHER_SIZE = 1.3  # from this ratio on images are of another size than those a teacher was built for


def check(
    teacher: nn.Module,
    student: nn.Module,
    images: Any,
    targets: Any = None,
    methods: Method | Sequence[Method] | None = None,
    adapter: AdapterSpec | None = None,
    *,
    batches: int = 4,
    seconds: float = 60.0,
    **distiller_options: Any,
) -> CheckReport:
    """Looks at a pair before a long run: how good its teacher is, and what would be distilled how strongly.

    The teacher is judged as the distillation sees it: on the pixels that it would get, by the predictions of
    its last head, the best of them without duplicates. Losses are those of one training step on the first
    batch, at full strength whatever the schedules. Both detectors stay as they are. No other process is
    waited for, so one of several may call it alone.

    Args:
        teacher: as for `Distiller`.
        student: likewise.
        images: a batch, as the student takes it; or several, a loader or another iterable of (images,
            targets), or of the keywords that the student is called with. Best are some dozens of real images
            that the teacher wasn't trained on.
        targets: of a single batch. With them the teacher's detections are compared with the objects.
        methods: ``CrossKD()`` unless given.
        adapter: as for `Distiller`.
        batches: how many batches of a loader are looked at, at most.
        seconds: after this time no further batch is begun.
        distiller_options: further arguments of the `Distiller`, such as ``class_map``.

    Returns:
        A report that shows itself: the verdict first, what to do last.

    Raises:
        ValueError: a run that would be worthless: what `Distiller` refuses; losses that are not finite; a
            distillation without a gradient; a teacher that is sure of nothing, detects none of the objects or
            takes them for other classes; pixels outside 0 to 1, unless the teacher detects well in them.
        TypeError: no adapter understands a detector; a loader that gives something else than pairs.

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
    distiller = Distiller(teacher, student, given, adapter, **distiller_options)
    for method in distiller.methods.values():
        method.schedule = None  # type: ignore[assignment]
    looked_at = _batches_of(images, targets, batches, seconds, distiller.student_adapter)
    with (
        unchanged(distiller.student),
        unchanged(distiller.teacher),
        same_random_numbers(distiller.student),
        # Whatever averages over processes asks this first; the other ones may not be here.
        replaced(torch.distributed, is_initialized=lambda: False),
        torch.enable_grad(),
    ):
        return _report(distiller.train(), looked_at)


def _batches_of(
    images: Any, targets: Any, batches: int, seconds: float, student: Adapter
) -> Iterator[tuple[Any, Any]]:
    """The one batch; of a loader the first ones, on the student's device, as long as there is time."""
    if isinstance(images, list | tuple):
        several = bool(images) and isinstance(images[0], list | tuple | Mapping)
    else:
        several = isinstance(images, Iterable) and not isinstance(images, Mapping)
        several = several and not hasattr(images, "shape")
    if targets is None and isinstance(images, Mapping):
        images, targets = student.from_keywords(images)
    if targets is not None or not several:
        yield images, targets
        return
    device, end = next(student.detector.parameters()).device, time.monotonic() + seconds
    for given in islice(images, batches):
        batch = student.from_keywords(given) if isinstance(given, Mapping) else given
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise TypeError(
                "a loader must give pairs (images, targets) in the student's own form, or the keywords that "
                "it is called with, got a "
                f"{type(batch).__name__}: pass a generator that makes pairs of what yours gives"
            )
        yield moved(batch[0], device), moved(batch[1], device)
        if time.monotonic() > end:
            return


def _report(distiller: Distiller, batches: Iterator[tuple[Any, Any]]) -> CheckReport:
    """Makes a training step on the first batch, and judges the teacher by all."""
    first = next(batches, None)
    if first is None:
        raise ValueError("the loader gives no batch: hand in images, or a loader that gives some")
    pair, teacher = distiller.pair, distiller.teacher_adapter
    trace = distiller.trace(*first)
    assert trace.teacher is not None
    sizes = {name: _size(loss, distiller.student) for name, loss in distiller.named_losses(trace).items()}
    seen, labelled = list[Seen](), False
    faults, remarks, images_seen = list[str](), list[str](), 0  # faults are refused, remarks are not
    for images, targets in chain([first], batches):
        ours = distiller.student_adapter.prepare(images, targets)
        theirs = distiller.teacher_batch(ours, images, targets)
        faults = faults or _pixel_faults("the images", ours, pair.student.pixel_coding)
        if distiller.teacher_view is not None:
            faults = faults or _pixel_faults("teacher_view's images", theirs, teacher.pixel_coding)
        remarks = remarks or _size_remarks(teacher.detector, theirs)
        seen += _seen_by(pair, theirs, ours)
        images_seen += len(ours.image_sizes)
        labelled |= targets is not None
    fit, unknown = _fit(pair, seen, labelled)
    confidence = Confidence(tuple(s.highest for s in seen), tuple(s.sure for s in seen)) if seen else None
    if fit is not None and fit.ap50 >= _LEAST_AP50:  # pixels are as the teacher's were
        faults, remarks = [], faults + remarks
    of_teacher = _teacher_faults(pair, fit, confidence)
    # Methods of feature maps alone don't need the teacher's head to be right.
    (faults if trace.teacher.heads else remarks).extend(of_teacher)
    own = {name: size for name, size in sizes.items() if name in trace.own_losses}
    distilled = {name: size for name, size in sizes.items() if name not in own}
    _refuse(sizes, distilled, [*faults, *remarks] if faults else [])
    remarks += [] if fit is None or of_teacher else _fit_remarks(pair, fit)
    report = CheckReport(
        teacher=_kind(teacher),
        student=_kind(distiller.student_adapter),
        images=images_seen,
        head_types=tuple(
            run.head.head_type for run in trace.teacher.heads.values() if run.head.rows != "queries"
        ),
        splits=tuple(_splits(distiller, trace)),
        projections=tuple(_projections(distiller)),
        differences=tuple(_differences(pair, trace.teacher, trace.student)),
        own_losses=own,
        distillation_losses=distilled,
        confidence=confidence,
        fit=fit,
        remarks=(),
    )
    return replace(report, remarks=(*remarks, *unknown, *_loss_remarks(report)))


# -- the images ----------------------------------------------------------------------------------


def _pixel_faults(which: str, batch: Batch, coding: PixelCoding | None) -> list[str]:
    """Says of pixels outside 0 to 1, before they are normalised, what has probably happened to them."""
    if coding is None:
        return []
    mean, std = (torch.tensor(side)[:, None, None].to(batch.pixels) for side in (coding.mean, coding.std))
    ranges = []
    for pixels, (height, width) in zip(batch.pixels, batch.image_sizes, strict=True):
        image = pixels[:, :height, :width] * std + mean
        ranges += [float(image.min()), float(image.max())]
    lowest, highest = min(ranges), max(ranges)
    lie = f"{which} have pixels from {lowest:.3g} to {highest:.3g}, where the detector expects 0 to 1"
    if lowest < -_PIXEL_MARGIN:
        return [f"{lie}: they look normalised already, which the detector does itself. Leave it out before"]
    if highest > 1 + _PIXEL_MARGIN:
        return [f"{lie}: divide pixels of 0 to 255 by 255, once"]
    if highest < _DARK:
        return [f"{lie}: they are black, or were divided by 255 twice"]
    return []


def _size_remarks(teacher: nn.Module, batch: Batch) -> list[str]:
    """Compares the images with those that torchvision's transform, or ultralytics' ``imgsz``, says."""
    transform, args = getattr(teacher, "transform", None), getattr(teacher, "args", None)
    short, long = sorted(batch.image_sizes[0])
    fixed, least = getattr(transform, "fixed_size", None), getattr(transform, "min_size", None)
    imgsz = args.get("imgsz") if isinstance(args, Mapping) else getattr(args, "imgsz", None)
    if fixed is not None:
        scale, says = max(fixed) / long, f"its transform makes them {fixed[0]} wide and {fixed[1]} high"
    elif least is not None and transform is not None:
        sides = least if isinstance(least, list | tuple) else [least]
        scales = [min(side / short, transform.max_size / long) for side in sides]
        scale = min(scales, key=lambda value: abs(math.log(value)))
        says = f"its transform has min_size={least} and max_size={transform.max_size}"
    elif imgsz is not None:
        scale = max(imgsz if isinstance(imgsz, list | tuple) else [imgsz]) / long
        says = f"it was trained with imgsz={imgsz}"
    else:
        return []
    if 1 / _OTHER_SIZE < scale < _OTHER_SIZE:
        return []
    return [
        f"the teacher was built for images {scale:.2g} times as large ({says}; it gets {short} by {long} "
        "pixels from the student): give both the same sizes, or the teacher its own by teacher_view="
    ]


# -- the teacher ---------------------------------------------------------------------------------


def _comparable(pair: Pair) -> bool:
    return pair.class_map is not None or classes_agree(pair.teacher.heads[-1], pair.student.heads[-1])


def _seen_by(pair: Pair, theirs: Batch, ours: Batch) -> list[Seen]:
    """What the teacher's last head makes of a batch; one that answers for regions, of its own proposals."""
    if not pair.teacher.heads:
        return []
    *_, (head, _, predictions, anchors) = run_heads(pair.teacher, theirs)
    return [*seen_in(head, predictions.of_classes(pair.class_map), anchors, theirs, ours)]


def _fit(pair: Pair, seen: Sequence[Seen], labelled: bool) -> tuple[Fit | None, list[str]]:
    """How well the teacher's detections fit the objects, or why that is unknown."""
    with_objects = [image for image in seen if image.objects is not None]
    if not pair.teacher.heads:
        return None, ["the teacher is a backbone without a head: measure how good its detector is elsewhere"]
    if not labelled:
        return None, []
    if not with_objects:
        missing = "the student's adapter gives no objects of the targets to compare the teacher with"
        return None, [f"{missing}: give generic() objects=, a function of the targets"]
    if not pair.teacher.heads[-1].decodes:
        missing = "the teacher's adapter decodes no boxes to compare with the objects"
        return None, [f"{missing}: give generic() decode="]
    fit = fit_of(with_objects, classless=not _comparable(pair))
    if fit.objects:
        return fit, []
    return None, [
        "the targets hold no object, so how well the teacher finds them is unknown: try other images"
    ]


def _teacher_faults(pair: Pair, fit: Fit | None, confidence: Confidence | None) -> list[str]:
    """What makes a teacher worthless for a distillation of its predictions."""
    highest = 1.0 if confidence is None else max(confidence.highest)
    if highest < _LEAST_SURE:
        return [
            f"the teacher is sure of nothing on these images: its largest class probability is {highest:.3f} "
            f"and should be at least {_LEAST_SURE}. Load its trained weights, give it images as it was "
            "trained with (size, order of channels, normalisation), and choose some that hold what it knows"
        ]
    if fit is None:
        return []
    # Of few objects an untrained teacher may take all for others by chance, though it finds some.
    wrong = _class_fault(pair, fit)
    nothing = not fit.found and fit.ap50 < _WORTHLESS_AP50
    if wrong and (fit.seen >= _MANY or nothing):
        return [wrong]
    if nothing:
        return [
            f"the teacher finds {fit.found or 'none'} of the {fit.objects} objects in the targets, "
            f"{fit.found_in_any_class} in any class, AP50 {fit.ap50:.1f}. Check its weights, that boxes are "
            "in the form that the student takes, and that it sees images as it was trained with; if these "
            "objects are too hard, look at other images, or for another teacher"
        ]
    return []


def _clearly(fit: Fit) -> dict[int, int]:
    """For which class the objects of each are taken, where several and most of them are."""
    mostly = {}
    for label, other in fit.mostly().items():
        if fit.taken[label][other] >= max(_SEVERAL, _MOSTLY * sum(fit.taken[label].values())):
            mostly[label] = other
    return mostly


def _confused(fit: Fit) -> dict[int, int]:
    """Classes whose objects are mostly taken for another one, whose own are not taken for itself either.

    Where only the former is so, the teacher doesn't know a rare class, which is no wrong order.
    """
    mostly = _clearly(fit)
    return {label: other for label, other in mostly.items() if mostly.get(other, other) != other}


def _class_fault(pair: Pair, fit: Fit) -> str:
    """Says which classes are taken for which, and what class_map= would put it right; empty if none are."""
    if fit.right >= _LEAST_RIGHT * fit.seen and not _confused(fit):
        return ""
    mostly = fit.mostly()
    listed = []
    for label, other in [(label, other) for label, other in mostly.items() if label != other][:5]:
        of_class = fit.taken[label]
        listed.append(f"class {label} for {other} ({of_class[other]} of {sum(of_class.values())})")
    own = pair.student.heads[-1]
    columns = list(range(own.num_classes) if pair.class_map is None else pair.class_map)
    whole = mostly.keys() == set(range(own.num_classes)) - {own.background}
    advice = "check the order of classes (class_map=), where labels are counted from, and that it is trained"
    if whole and len(set(mostly.values())) == len(mostly):
        wanted = [columns[mostly.get(label, label)] for label in range(own.num_classes)]
        advice += f"; class_map={wanted} would put these right"
    return (
        f"the teacher takes objects for other classes: over {fit.seen} objects that it sees, its likeliest "
        f"class is the right one {fit.right} times, {', '.join(listed)} (AP50 {fit.ap50:.1f}): {advice}"
    )


def _fit_remarks(pair: Pair, fit: Fit) -> list[str]:
    wrong = _class_fault(pair, fit)
    remarks = [wrong] if wrong else []
    if fit.ap50 < _LEAST_AP50:
        remarks.append(
            f"the teacher is weak here: AP50 {fit.ap50:.1f} (AP {fit.ap:.1f}), it finds {fit.found} of "
            f"{fit.objects} objects. One that is worth its time mostly has an AP50 of 40 to 90, and a "
            "student learns what its teacher misses, too: train it for longer, take another, or look at "
            "images of the kind that it was trained on"
        )
    unsure = [
        f"class {label} is taken for {other} ({fit.taken[label][other]} of {sum(fit.taken[label].values())})"
        for label, other in _clearly(fit).items()
        if label != other
    ]
    if unsure and not wrong and fit.ap50 >= _LEAST_AP50:
        remarks.append(f"{', '.join(unsure[:5])}: see whether the teacher knows it, and by the same name")
    for what, number in (("false alarms", fit.false_alarms), ("duplicates", fit.duplicates)):
        objects = fit.objects / fit.images
        if number > max(2 * objects, 1):
            remarks.append(
                f"the teacher has {number:.1f} {what} per image with a score of {SURE_DETECTION} or more, "
                f"beside {objects:.1f} objects; usual are fewer than objects: look at its detections, "
                "and whether all objects are labelled"
            )
    return remarks


# -- the losses ----------------------------------------------------------------------------------


def _size(loss: Tensor, student: nn.Module) -> LossSize:
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not loss.requires_grad or not parameters:
        return LossSize(float(loss), 0.0)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    norms = [float(gradient.double().norm()) for gradient in gradients if gradient is not None]
    return LossSize(float(loss.detach()), math.hypot(*norms))


def _loss_remarks(report: CheckReport) -> list[str]:
    ratio, remarks = report.gradient_ratio, []
    if ratio is not None and not _SMALLEST_RATIO <= ratio <= _LARGEST_RATIO:
        times = f"{ratio:.3g} times that of the student's own losses"
        remarks.append(f"the distillation's gradient is {times}: look at the methods' weights")
    without = [name for name, size in report.distillation_losses.items() if not size.gradient]
    if without:
        remarks.append(f"no gradient of {', '.join(without)} reaches the student: leave it out, or mend it")
    return remarks


def _refuse(losses: Mapping[str, LossSize], distilled: Mapping[str, LossSize], faults: Sequence[str]) -> None:
    infinite = [name for name, size in losses.items() if not math.isfinite(size.value + size.gradient)]
    if infinite:
        found = f"{', '.join(infinite)}: the loss, or its gradient, is not finite on this batch"
        raise ValueError(f"{found}: look for numbers that are not finite in images, targets and weights")
    if faults:
        raise ValueError(". Besides, ".join(faults))
    if not any(size.gradient for size in distilled.values()):
        raise ValueError(
            "the distillation has no gradient at the student's parameters, so nothing would be distilled: "
            "the student equals its teacher, its features vanish before the split, or the teacher's head "
            "gives the same predictions for any features"
        )


# -- what is compared ----------------------------------------------------------------------------


def _kind(adapter: Adapter) -> str:
    millions = sum(parameter.numel() for parameter in adapter.detector.parameters()) / 1e6
    name = type(adapter.detector).__name__
    return f"{name}, {millions:.2f} million parameters, adapter {type(adapter).__name__}"


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
        elif isinstance(module, nn.Linear) and ".projections." in name:  # of queries
            widths = f"{module.in_features} to {module.out_features} channels"
        else:
            continue
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
    decoders = []
    for head in (theirs.head, ours.head):
        if isinstance(head, DecoderHead):
            decoders.append(f"{head.num_layers} layers, {head.num_queries} queries of width {head.width}")
    if len(set(decoders)) == 2:
        yield f"decoders: {decoders[0]} (teacher), {decoders[1]} (student)"
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
