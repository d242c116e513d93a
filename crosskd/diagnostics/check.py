"""`check`: a look at a pair of detectors, on one batch, before a long run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from crosskd._heads import Head
from crosskd._noting import noting
from crosskd._truth import Truth, overlaps, rows_of_images, truth_of, without_classes
from crosskd.adapters import Adapter, Inputs, SecondStage
from crosskd.adapters.levels import LevelPairs
from crosskd.align import ChannelProjection
from crosskd.distiller import Distiller
from crosskd.head import Branch, TapPoint
from crosskd.methods import CrossKD, Method, Step
from crosskd.predictions import Predictions

__all__ = ["CheckReport", "Confidence", "Fit", "LossSize", "Projection", "Split", "check"]

# From this class probability on a prediction counts as one: below it a detector answers next to nothing.
_LEAST_SURE = 0.1
_SURE = 0.5
_OVERLAP = 0.5
# Beyond these a distillation drowns the student's own losses, or is drowned by them.
_LOUD, _QUIET = 10.0, 0.01


@dataclass(frozen=True)
class Split:
    """Where a method reads a branch's features.

    Attributes:
        method: its name.
        branch: the branch's.
        student: where the student's tower is tapped.
        teacher: where the teacher's is.
        student_shapes: the student's features a level, (batch, channels, height, width); of a head that
            answers for regions (regions, channels, height, width) or (regions, channels).
        teacher_widths: the channels of the teacher's, a level.
    """

    method: str
    branch: str
    student: TapPoint
    teacher: TapPoint
    student_shapes: tuple[tuple[int, ...], ...]
    teacher_widths: tuple[int, ...]


@dataclass(frozen=True)
class Projection:
    """A projection that is made because widths differ.

    Attributes:
        name: the method's and the branch's.
        student_width: channels that it takes.
        teacher_width: channels that it gives.
    """

    name: str
    student_width: int
    teacher_width: int


@dataclass(frozen=True)
class LossSize:
    """How large a loss is, and how strongly it pulls.

    Attributes:
        value: the loss itself.
        gradient: the norm of its gradient over all of the student's parameters.
    """

    value: float
    gradient: float


@dataclass(frozen=True)
class Confidence:
    """How sure the teacher is of what it sees.

    Attributes:
        highest: each image's largest class probability.
        sure: how many anchors, or regions, of each image have one of at least 0.5.
    """

    highest: tuple[float, ...]
    sure: tuple[int, ...]


@dataclass(frozen=True)
class Fit:
    """How well the teacher's predictions of a probability of at least 0.1 fit the targets.

    Attributes:
        objects: in the targets.
        found: how many of them overlap a prediction of their class by an IoU of at least 0.5.
        found_in_any_class: how many overlap one of whatever class.
        best_iou: each object's largest IoU with a prediction of its class, on average.
        classless: the head that is distilled knows no classes, so that any counts as the right one.
    """

    objects: int
    found: int
    found_in_any_class: int
    best_iou: float
    classless: bool = False


@dataclass(frozen=True)
class CheckReport:
    """What `check` has found out; ``print`` shows it.

    Attributes:
        adapter: the adapter's name.
        head: the head type whose settings hold; of a detector of two stages those that are distilled.
        teacher: the teacher's type and size.
        student: the student's.
        splits: where features are read, by method and branch.
        projections: that are made because widths differ.
        differences: between the two, in words.
        own_losses: the student's own, by name.
        distillation_losses: the methods', by name.
        confidence: the teacher's, on these images.
        fit: of the teacher's predictions to the targets; ``None`` where there are none to compare.
        remarks: what deserves a second look, in words.
    """

    adapter: str
    head: str
    teacher: str
    student: str
    splits: tuple[Split, ...]
    projections: tuple[Projection, ...]
    differences: tuple[str, ...]
    own_losses: Mapping[str, LossSize]
    distillation_losses: Mapping[str, LossSize]
    confidence: Confidence
    fit: Fit | None
    remarks: tuple[str, ...]

    @property
    def losses(self) -> dict[str, LossSize]:
        """All of them."""
        return {**self.own_losses, **self.distillation_losses}

    def __str__(self) -> str:
        lines = [
            f"teacher: {self.teacher}",
            f"student: {self.student}",
            f"adapter: {self.adapter}, settings of {self.head}",
            *self._split_lines(),
            *_section("differences", self.differences or ("none",)),
            f"{'losses':<26} {'value':>10} {'gradient':>10}",
            *(
                f"  {name:<24} {loss.value:>10.4g} {loss.gradient:>10.4g}"
                for name, loss in self.losses.items()
            ),
            *self._teacher_lines(),
            *(_section("remarks", self.remarks) if self.remarks else ()),
        ]
        return "\n".join(lines)

    def _split_lines(self) -> Iterator[str]:
        for split in self.splits:
            yield (
                f"{split.method}, {split.branch} branch: student after block {split.student.position}, "
                f"teacher after block {split.teacher.position} ({split.student.tap})"
            )
            for level, (shape, width) in enumerate(
                zip(split.student_shapes, split.teacher_widths, strict=True)
            ):
                yield f"  level {level}: {shape}, the teacher's of {width} channels"
        for projection in self.projections:
            widths = f"{projection.student_width} to {projection.teacher_width} channels"
            yield f"projection {projection.name}: {widths}"

    def _teacher_lines(self) -> Iterator[str]:
        highest, sure = self.confidence.highest, self.confidence.sure
        yield (
            f"the teacher's largest class probability: {min(highest):.3f} to {max(highest):.3f} an image; "
            f"predictions of {_SURE} or more: {min(sure)} to {max(sure)} an image"
        )
        if self.fit is not None:
            fit = self.fit
            classes = (
                "whatever the class, for what is distilled knows none)"
                if fit.classless
                else f"right class), {fit.found_in_any_class} whatever the class"
            )
            yield (
                f"the teacher finds {fit.found} of {fit.objects} objects (IoU {_OVERLAP} or more, {classes}; "
                f"mean best IoU {fit.best_iou:.3f}"
            )


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [title, *(f"  {line}" for line in lines)]


def check(
    teacher: nn.Module,
    student: nn.Module,
    images: Any,
    targets: Any = None,
    methods: Method | Sequence[Method] | None = None,
    adapter: Adapter | None = None,
    *,
    truth: Truth | None = None,
    **distiller_options: Any,
) -> CheckReport:
    """Looks at a pair before a long run: runs one batch and tells what distillation would do.

    Both detectors are copied for it and stay as they are: no gradient, buffer or mode changes. Schedules
    are left out of account: the losses are those of full strength. Of a detector of two stages both heads
    are looked at. How good the teacher is, is read off the last one that is distilled: the second head at the
    teacher's own proposals, or the first one's proposals whatever their class.

    Args:
        teacher: as for `Distiller`.
        student: likewise.
        images: a batch, as the student takes it; best one of real images.
        targets: with them the teacher's predictions are held against the objects.
        methods: ``CrossKD()`` unless given.
        adapter: found from the detectors' types unless given.
        truth: gives each image's ``boxes`` (objects, 4), xyxy in resized pixels, and ``labels`` of a
            prepared batch (`crosskd.adapters.Inputs`), where targets are no dicts of ``boxes`` and
            ``labels`` and no samples of mmdet's.
        distiller_options: further arguments of the `Distiller`, such as ``class_map``.

    Returns:
        A report to read (``print``) or to take numbers from.

    Raises:
        ValueError: a run that would be worthless, saying what to do: what `Distiller` refuses; losses that
            are not finite; a distillation without a gradient; a teacher that is sure of nothing on these
            images, or that finds none of the objects in the targets.
        TypeError: no adapter understands the detectors.

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
    devices = sorted({p.device.index or 0 for p in student.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        look = _Look(_copy(original), truth_of if truth is None else truth)
        report = look.report(images, targets)
    _refuse(report)
    return report


def _copy(distiller: Distiller) -> Distiller:
    """A distiller that shares nothing with another but its adapter and its view, which hold no detector."""
    shared = {id(part): part for part in (distiller.adapter, distiller.teacher_view)}
    twin = copy.deepcopy(distiller, shared)
    for method in twin.methods.values():
        method.schedule = None  # type: ignore[assignment]
    return twin.train()


class _Answer(NamedTuple):
    """What the teacher answers to the images.

    Attributes:
        predictions: of its last head that is distilled.
        boxes: decodes them, into the student's resized pixels.
        counts: how many regions each image has, of a head that answers for regions.
    """

    predictions: Predictions
    boxes: Callable[[], Tensor]
    counts: Sequence[int] | None


class _Look:
    """One step of a distiller that may be used up, watched.

    Args:
        distiller: a copy.
        truth: tells the objects of a prepared batch.
    """

    def __init__(self, distiller: Distiller, truth: Truth) -> None:
        self.distiller, self.truth = distiller, truth
        self.adapter = distiller.adapter
        distiller.adapter = noting(self.adapter, self._note)
        self.prepared: list[Inputs] = []
        self.own: set[str] = set()
        self.steps: dict[str, Step] = {}
        self.remarks: list[str] = []
        for name, method in distiller.methods.items():
            method.register_forward_pre_hook(
                lambda _, arguments, name=name: self.steps.update({name: arguments[0]})
            )

    def _note(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        if name == "prepare":
            self.prepared.append(result)
        elif name in ("losses", "second.losses"):
            self.own.update(result[0])

    def report(self, images: Any, targets: Any) -> CheckReport:
        """Runs the step and tells about it."""
        losses = self.distiller(images, targets)
        sizes = {name: _size(loss, self.distiller.student) for name, loss in losses.items()}
        own = {name: sizes[name] for name in losses if name in self.own}
        distilled = {name: sizes[name] for name in losses if name not in self.own}
        heads = self._heads()
        last, step = heads[-1]
        answer = _answer(step) if step.counts is None else self._answer_of_two_stages(last)
        fit = None if targets is None else self._fit(last, answer)
        self._remark_on(own, distilled, fit)
        return CheckReport(
            adapter=type(self.adapter).__name__,
            head=" and ".join(head.source.recipe.head for head, _ in heads),
            teacher=_kind(self.distiller.teacher),
            student=_kind(self.distiller.student),
            splits=tuple(self._splits()),
            projections=tuple(self._projections()),
            differences=tuple(self._differences(heads)),
            own_losses=own,
            distillation_losses=distilled,
            confidence=_confidence(answer),
            fit=fit,
            remarks=tuple(self.remarks),
        )

    def _heads(self) -> list[tuple[Head, Step]]:
        """The heads that are distilled, in the order in which they run, each with what a method saw."""
        methods = self.distiller._methods()
        seen = {methods[name].part: step for name, step in self.steps.items()}
        return [(head, seen[head.part]) for head in self.distiller._heads if head.part in seen]

    # -- where features are read ----------------------------------------------------------------

    def _splits(self) -> Iterator[Split]:
        for name, step in self.steps.items():
            method = self.distiller.methods[name]
            for branch in step.teacher_branches:
                points = method.points(branch.name)  # type: ignore[operator]
                if points is None:
                    continue
                taps = step.student_taps[branch.name]
                widths = [branch.tower(level).width(points[1].position) for level in range(len(taps))]
                shapes = [tuple(tap.features.shape) for tap in taps]
                yield Split(name, branch.name, points[0], points[1], tuple(shapes), tuple(widths))

    def _projections(self) -> Iterator[Projection]:
        for name, module in self.distiller.methods.named_modules():
            if isinstance(module, ChannelProjection):
                yield Projection(name.replace(".projections", ""), module.student_width, module.teacher_width)

    # -- what differs ---------------------------------------------------------------------------

    def _differences(self, heads: Sequence[tuple[Head, Step]]) -> Iterator[str]:
        for head, step in heads:
            ours = head.source.branches(self.distiller.student)
            for theirs, own in zip(step.teacher_branches, ours, strict=True):
                yield from _tower_differences(theirs, own)
        for head, step in heads:
            yield from self._class_differences(head, step)
        yield from self._level_differences()
        yield from self._pixel_differences()

    def _class_differences(self, head: Head, step: Step) -> Iterator[str]:
        class_map = head.class_map
        if class_map is not None:
            classes = head.source.num_classes(self.distiller.teacher)
            yield (
                f"classes: {classes} (teacher), {len(class_map)} (student), which are the teacher's "
                f"{_shortened(class_map)}"
            )
        theirs, ours = (side.quality is not None for side in (step.teacher, step.student))
        if theirs != ours:
            yield f"a centerness or IoU is predicted by the {'teacher' if theirs else 'student'} alone"

    def _level_differences(self) -> Iterator[str]:
        levels = self.distiller._levels
        strides = self.adapter.strides(self.distiller.teacher)
        if levels.teacher is not None and strides is not None:
            left_out = [stride for at, stride in enumerate(strides) if at not in levels.teacher]
            if left_out:
                yield f"levels: the teacher's of strides {left_out} are left out"
        if levels.scale != 1:
            yield f"scale: the teacher's strides are {levels.scale:g} times the student's"

    def _pixel_differences(self) -> Iterator[str]:
        ours, theirs = self.prepared[0].student_pixels, self.prepared[-1].teacher_pixels
        if ours.shape != theirs.shape:
            yield f"pixels: {tuple(theirs.shape)} (teacher), {tuple(ours.shape)} (student)"
        elif not torch.equal(ours, theirs):
            yield f"pixels: {_pixel_text(theirs)} (teacher), {_pixel_text(ours)} (student), a channel"

    # -- the teacher's worth --------------------------------------------------------------------

    @torch.no_grad()
    def _answer_of_two_stages(self, last: Head) -> _Answer:
        """What the teacher answers for the regions that it proposes itself.

        In training there are the objects themselves among the student's regions, which any teacher finds.
        """
        adapter, teacher = self.adapter, self.distiller.teacher
        seen = replace(self.prepared[-1], targets=None)
        maps = adapter.features(teacher, seen.teacher_pixels)
        first = replace(self.distiller._heads[0], levels=LevelPairs(None))
        proposed = first.observe_teacher(maps, {}).predictions, adapter.locations(teacher, seen, maps)
        stage = cast(SecondStage, last.source)
        regions = stage.regions(teacher, *proposed, seen)
        predictions = last.observe_teacher(stage.features(teacher, maps, regions, seen), {}).predictions

        def boxes() -> Tensor:
            decoded = stage.decode(teacher, predictions, regions)
            # Of another size with a view of the teacher's own.
            height, width = self.prepared[0].student_pixels.shape[-2:]
            their_height, their_width = seen.student_pixels.shape[-2:]
            return decoded * decoded.new_tensor([width / their_width, height / their_height] * 2)

        return _Answer(predictions, boxes, stage.counts(regions))

    def _fit(self, head: Head, answer: _Answer) -> Fit | None:
        """How well the teacher's predictions fit the objects, where both can be told."""
        try:
            objects = self.truth(self.prepared[0])
            boxes = answer.boxes().detach()
        except ValueError as error:
            self.remarks.append(f"the teacher could not be held against the targets: {error}")
            return None
        if not any(len(of_image["labels"]) for of_image in objects):
            self.remarks.append(
                "the targets hold no object, so nothing tells how well the teacher finds them"
            )
            return None
        # The first of two heads tells objects from none: its one class is that of all labels.
        last = self.distiller._heads[-1].part
        classless = head.part != last and answer.predictions.logits.shape[-1] == 1
        if classless:
            objects = without_classes(objects)
        whole = boxes, answer.predictions.probabilities()
        boxes_of, likely = (rows_of_images(rows, answer.counts) for rows in whole)
        return replace(_fit_of(boxes_of, likely, objects), classless=classless)

    def _remark_on(
        self, own: Mapping[str, LossSize], distilled: Mapping[str, LossSize], fit: Fit | None
    ) -> None:
        theirs, ours = (math.hypot(*(s.gradient for s in side.values())) for side in (distilled, own))
        if ours and not _QUIET <= theirs / ours <= _LOUD:
            self.remarks.append(
                f"the distillation's gradient is {theirs / ours:.2g} times that of the student's own "
                "losses: look at cls_weight and reg_weight"
            )
        if fit is not None and fit.found < fit.objects / 2:
            self.remarks.append(
                f"the teacher finds {fit.found} of {fit.objects} objects, less than half: the student will "
                "learn to miss the others"
            )


def _tower_differences(theirs: Branch, own: Branch) -> Iterator[str]:
    depths = len(theirs.tower(0).blocks), len(own.tower(0).blocks)
    if depths[0] != depths[1]:
        yield f"{own.name} tower: {depths[0]} blocks (teacher), {depths[1]} (student)"
    widths = theirs.tower(0).width_in, own.tower(0).width_in
    if widths[0] != widths[1]:
        yield f"{own.name} tower: {widths[0]} channels (teacher), {widths[1]} (student)"


def _size(loss: Tensor, student: nn.Module) -> LossSize:
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    value = float(loss.detach())
    if not loss.requires_grad:
        return LossSize(value, 0.0)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    norms = [gradient.double().norm() for gradient in gradients if gradient is not None]
    return LossSize(value, float(torch.stack(norms).norm()) if norms else 0.0)


def _kind(detector: nn.Module) -> str:
    count = sum(parameter.numel() for parameter in detector.parameters())
    return f"{type(detector).__name__}, {count / 1e6:.2f} million parameters"


def _shortened(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:10]))
    return shown if len(numbers) <= 10 else f"{shown}, …"


def _pixel_text(pixels: Tensor) -> str:
    std, mean = torch.std_mean(pixels.detach().float(), dim=(0, 2, 3))
    numbers = [", ".join(f"{value:.3g}" for value in side.tolist()) for side in (mean, std)]
    return f"mean ({numbers[0]}), deviation ({numbers[1]})"


def _answer(step: Step) -> _Answer:
    return _Answer(step.teacher, lambda: step.boxes(step.teacher), None)


def _confidence(answer: _Answer) -> Confidence:
    of_images = rows_of_images(answer.predictions.confidence(), answer.counts)
    highest = [float(confidence.max()) if len(confidence) else 0.0 for confidence in of_images]
    return Confidence(tuple(highest), tuple(int((c >= _SURE).sum()) for c in of_images))


def _fit_of(
    boxes: Sequence[Tensor], probabilities: Sequence[Tensor], objects: Sequence[Mapping[str, Tensor]]
) -> Fit:
    """Holds predictions against objects, image by image.

    Args:
        boxes: shape (anchors, 4), or (anchors, classes, 4) with a box for each class.
        probabilities: shape (anchors, classes).
        objects: ``boxes`` and ``labels``.
    """
    right, any_class = [], []
    for of_anchors, of_classes, of_image in zip(boxes, probabilities, objects, strict=True):
        # Where each class has a box, each box is a prediction, of that class alone.
        likely = of_classes if of_anchors.ndim == 2 else torch.diag_embed(of_classes).flatten(0, 1)
        labels = of_image["labels"].to(likely.device)
        theirs = of_image["boxes"].to(of_anchors.device)
        found = overlaps(of_anchors.reshape(-1, 4), theirs)  # (predictions, objects)
        sure = likely[:, labels] >= _LEAST_SURE
        sure_of_any = likely.amax(dim=1, keepdim=True) >= _LEAST_SURE
        right.append(_largest(found * sure))
        any_class.append(_largest(found * sure_of_any))
    best, best_in_any = torch.cat(right), torch.cat(any_class)
    return Fit(
        objects=len(best),
        found=int((best >= _OVERLAP).sum()),
        found_in_any_class=int((best_in_any >= _OVERLAP).sum()),
        best_iou=float(best.mean()),
    )


def _largest(rows: Tensor) -> Tensor:
    """Each column's largest number; 0 where there are no rows."""
    return rows.amax(dim=0) if len(rows) else rows.sum(dim=0)


def _refuse(report: CheckReport) -> None:
    """Raises ``ValueError`` where a run would be worthless."""
    infinite = [name for name, loss in report.losses.items() if not math.isfinite(loss.value + loss.gradient)]
    if infinite:
        raise ValueError(
            f"{', '.join(infinite)}: the loss, or its gradient, is not finite on this batch: look for "
            "numbers that are not finite in images, targets and weights"
        )
    highest = max(report.confidence.highest)
    if highest < _LEAST_SURE:
        raise ValueError(
            f"the teacher is sure of nothing on these images: its largest class probability is {highest:.3f} "
            f"and should be at least {_LEAST_SURE}. Load its trained weights, give it images as it was "
            "trained with (size, order of channels, normalisation), and choose some that hold what it knows"
        )
    fit = report.fit
    if fit is not None and not fit.found:
        raise ValueError(
            f"the teacher finds none of the {fit.objects} objects in the targets (best IoU "
            f"{fit.best_iou:.2f} on average among its predictions of their classes). " + _advice(fit)
        )
    if not any(loss.gradient for loss in report.distillation_losses.values()):
        raise ValueError(
            "the distillation has no gradient at the student's parameters, so nothing would be distilled: "
            "the student equals its teacher, its features vanish before the split, or the teacher's head "
            "gives the same predictions for any features"
        )


def _advice(fit: Fit) -> str:
    if fit.found_in_any_class:
        return (
            f"Of other classes its predictions fit {fit.found_in_any_class} of them: check the order of "
            "classes (class_map=), and whether labels are counted from 0"
        )
    return (
        "Check its weights, that boxes are xyxy in pixels, and that it sees images as it was trained with; "
        "if these objects are too hard for it, look at other images, or for another teacher"
    )
