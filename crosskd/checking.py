"""`check`: a look at a pair of detectors, on one batch, before a long run."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crosskd._noting import noting
from crosskd._truth import Truth, overlaps, truth_of
from crosskd.adapters import Adapter, Inputs
from crosskd.align import ChannelProjection
from crosskd.distiller import Distiller
from crosskd.head import TapPoint
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
        student_shapes: the student's features a level, (batch, channels, height, width).
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
        sure: how many anchors of each image have one of at least 0.5.
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
    """

    objects: int
    found: int
    found_in_any_class: int
    best_iou: float


@dataclass(frozen=True)
class CheckReport:
    """What `check` has found out; ``print`` shows it.

    Attributes:
        adapter: the adapter's name.
        head: the head type whose published settings hold.
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
            f"adapter: {self.adapter}, published settings of {self.head}",
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
            f"anchors of {_SURE} or more: {min(sure)} to {max(sure)} an image"
        )
        if self.fit is not None:
            fit = self.fit
            yield (
                f"the teacher finds {fit.found} of {fit.objects} objects (IoU {_OVERLAP} or more, right "
                f"class), {fit.found_in_any_class} whatever the class; mean best IoU {fit.best_iou:.3f}"
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
    are left out of account: the losses are those of full strength.

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
        elif name == "losses":
            self.own.update(result[0])

    def report(self, images: Any, targets: Any) -> CheckReport:
        """Runs the step and tells about it."""
        losses = self.distiller(images, targets)
        sizes = {name: _size(loss, self.distiller.student) for name, loss in losses.items()}
        own = {name: sizes[name] for name in losses if name in self.own}
        distilled = {name: sizes[name] for name in losses if name not in self.own}
        step = next(iter(self.steps.values()))
        fit = None if targets is None else self._fit(step)
        self._remark_on(own, distilled, fit)
        return CheckReport(
            adapter=type(self.adapter).__name__,
            head=self.adapter.recipe.head,
            teacher=_kind(self.distiller.teacher),
            student=_kind(self.distiller.student),
            splits=tuple(self._splits()),
            projections=tuple(self._projections()),
            differences=tuple(self._differences(step)),
            own_losses=own,
            distillation_losses=distilled,
            confidence=_confidence(step.teacher),
            fit=fit,
            remarks=tuple(self.remarks),
        )

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

    def _differences(self, step: Step) -> Iterator[str]:
        ours = self.adapter.branches(self.distiller.student)
        for theirs, own in zip(step.teacher_branches, ours, strict=True):
            depths = len(theirs.tower(0).blocks), len(own.tower(0).blocks)
            if depths[0] != depths[1]:
                yield f"{own.name} tower: {depths[0]} blocks (teacher), {depths[1]} (student)"
            widths = theirs.tower(0).width_in, own.tower(0).width_in
            if widths[0] != widths[1]:
                yield f"{own.name} tower: {widths[0]} channels (teacher), {widths[1]} (student)"
        yield from self._class_differences(step)
        yield from self._level_differences()
        yield from self._pixel_differences()

    def _class_differences(self, step: Step) -> Iterator[str]:
        class_map = self.distiller._class_map
        if class_map is not None:
            classes = self.adapter.num_classes(self.distiller.teacher)
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

    def _fit(self, step: Step) -> Fit | None:
        """How well the teacher's predictions fit the objects, where both can be told."""
        try:
            objects = self.truth(self.prepared[0])
            boxes = step.boxes(step.teacher).detach()
        except ValueError as error:
            self.remarks.append(f"the teacher could not be held against the targets: {error}")
            return None
        if not any(len(of_image["labels"]) for of_image in objects):
            self.remarks.append(
                "the targets hold no object, so nothing tells how well the teacher finds them"
            )
            return None
        return _fit_of(boxes, step.teacher.logits.float().sigmoid(), objects)

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


def _confidence(teacher: Predictions) -> Confidence:
    confidence = teacher.confidence()  # (batch, anchors)
    sure = (confidence >= _SURE).sum(dim=1)
    return Confidence(tuple(confidence.amax(dim=1).tolist()), tuple(sure.tolist()))


def _fit_of(boxes: Tensor, probabilities: Tensor, objects: Sequence[Mapping[str, Tensor]]) -> Fit:
    """Holds boxes (batch, anchors, 4) and class probabilities (batch, anchors, classes) against objects."""
    right, any_class = [], []
    for image, of_image in enumerate(objects):
        labels = of_image["labels"].to(probabilities.device)
        found = overlaps(boxes[image], of_image["boxes"].to(boxes.device))  # (anchors, objects)
        sure = probabilities[image][:, labels] >= _LEAST_SURE
        sure_of_any = probabilities[image].amax(dim=1, keepdim=True) >= _LEAST_SURE
        right.append((found * sure).amax(dim=0))
        any_class.append((found * sure_of_any).amax(dim=0))
    best, best_in_any = torch.cat(right), torch.cat(any_class)
    return Fit(
        objects=len(best),
        found=int((best >= _OVERLAP).sum()),
        found_in_any_class=int((best_in_any >= _OVERLAP).sum()),
        best_iou=float(best.mean()),
    )


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
