"""What `crosskd.check_adapter` runs: each check yields what is wrong, its docstring says what is expected."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from crosskd._checks import compute_dtype
from crosskd.adapters.base import Adapter, Batch, Head, Objects, RegionHead
from crosskd.diagnostics._objects import counts_of, overlaps, rows_of_images
from crosskd.distiller import Distiller
from crosskd.predictions import Assignment, Predictions
from crosskd.proof import prove_student, prove_teacher, same_random_numbers
from crosskd.step import Trace, run_head, space
from crosskd.towers import TapPoint

__all__ = ["CHECKS", "Bench", "Skipped", "Variation", "moved", "run_heads"]

Variation = Callable[[Any, Any], tuple[Any, Any]]  # makes another batch of images and targets
# A head, what it was fed per level, what it predicted, and at which anchors or regions.
HeadRun = tuple[Head, list[Tensor], Predictions, Any]

# Numbers that are calculated twice by the same operators differ by no more than this, relatively.
_ROUNDING, _GRADIENT_ROUNDING, _DEVICE_ROUNDING = 1e-5, 1e-3, 1e-2
# What free predictions must reach, and at how many of the positive anchors: not at all of them, for an
# assignment may follow the predictions, and give an anchor another object at the last moment.
_OVERLAP, _SHARE = 0.9, 0.75
# Steps of Adam in logits and in sides; the nudge that shows a slope, the least slope; proposals' shift.
_LOGIT_STEP, _BOX_STEP, _NUDGE, _FLATTEST, _OFF = 0.2, 0.05, 1e-2, 1e-3, 0.15


class Skipped(Exception):  # noqa: N818  # it is no error
    """A check can't be run here; the message says why."""


@dataclass(frozen=True, eq=False)
class Bench:
    """What `check_adapter` was given; checks work on copies of it."""

    teacher: nn.Module
    student: nn.Module
    batch: tuple[Any, Any]
    settings: Mapping[str, Any]  # of the distiller
    variations: Mapping[str, Variation | None]
    steps: int

    def of_student(self) -> Adapter:
        """An adapter of a copy of the student, in train mode."""
        adapter: Adapter = self.settings["adapter"](copy.deepcopy(self.student).train())
        return adapter

    def distiller(self) -> Distiller:
        """A distiller of copies, in train mode."""
        return Distiller(*copy.deepcopy((self.teacher, self.student)), **self.settings).train()

    def step(self, images: Any, targets: Any) -> tuple[Distiller, Trace]:
        """A new distiller, and its first step."""
        with same_random_numbers(self.student):
            distiller = self.distiller()
        with same_random_numbers(self.student):
            return distiller, distiller.trace(*copy.deepcopy((images, targets)))

    def sides(self) -> tuple[tuple[str, Adapter, Batch], ...]:
        """The frozen teacher and the student in train mode, each with the batch as it takes it."""
        distiller, given = self.distiller(), copy.deepcopy(self.batch)
        batch = distiller.student_adapter.prepare(*given)
        seen = distiller.teacher_batch(batch, *given)
        return ("teacher", distiller.teacher_adapter, seen), ("student", distiller.student_adapter, batch)

    def varied(self, name: str, otherwise: Variation) -> tuple[Any, Any]:
        """Another batch: what the argument of that name makes, or a function that may not know how."""
        try:
            return (self.variations[name] or otherwise)(*copy.deepcopy(self.batch))
        except (TypeError, LookupError, AttributeError) as error:
            raise Skipped(f"no such batch can be made of these ({error!r}): pass {name}=") from error

    def converted(self, **to: Any) -> Bench:
        """The same on another ``device``, or with floating-point numbers of another ``dtype``."""
        teacher, student = (copy.deepcopy(detector).to(**to) for detector in (self.teacher, self.student))
        return replace(self, teacher=teacher, student=student, batch=moved(self.batch, **to))


def moved(value: Any, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
    """A batch on another device, or with floating-point numbers of another type."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {key: moved(item, device, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([moved(item, device, dtype) for item in value])
    # A framework's own sample: how its numbers would be cast is not for us to know.
    return value.to(device) if device is not None and hasattr(value, "to") else value


@torch.no_grad()
def run_heads(adapter: Adapter, batch: Batch, maps: Any = None, fitted: Any = ()) -> Iterator[HeadRun]:
    """Runs each head as a step does; one that answers for regions on its own, or on fitted ones."""
    maps, runs = adapter.maps(batch.pixels) if maps is None else maps, list[HeadRun]()
    for head in adapter.heads:
        if not isinstance(head, RegionHead):
            anchors, feed = head.anchors(batch, maps), list(maps)
        else:
            before, _, made, at = runs[-1]
            if batch.targets is not None:  # regions are asked for after the losses, as in training
                before.losses(made, at, batch)
            anchors = fitted[-1].regions_of(head) if fitted else head.regions(made, at, batch)
            feed = [head.pool(maps, anchors, batch)]
        predictions = run_head(head, [level.clone() for level in feed], range(len(feed))).predictions
        runs.append((head, feed, predictions, anchors))
        yield runs[-1]


def _predicted(head: Head, level: int, towers: Mapping[str, Tensor]) -> Tensor:
    """All numbers that are predicted from copies of the towers' outputs, which predict() may write over."""
    made = head.predict(level, {name: output.clone() for name, output in towers.items()})
    parts = (made.logits, made.regression, made.quality)
    return torch.cat([part.flatten() for part in parts if part is not None])


def _differ(theirs: Tensor, ours: Tensor, tolerance: float = _ROUNDING) -> bool:
    """Whether two tensors differ by more than a share of the largest number."""
    if theirs.shape != ours.shape or not theirs.numel():
        return theirs.shape != ours.shape
    a, b = theirs.detach().double(), ours.detach().double().to(theirs.device)
    return not bool((a - b).abs().max() <= tolerance * a.abs().max().clamp(min=1e-12))


def _gradients(losses: Iterable[Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a sum of losses at those tensors that it depends on; the graph stays."""
    learning = [loss for loss in losses if loss.requires_grad]
    at = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad and learning}
    found = torch.autograd.grad(learning, [*at.values()], retain_graph=True, allow_unused=True) if at else ()
    return {name: gradient for name, gradient in zip(at, found, strict=True) if gradient is not None}


def construction(bench: Bench) -> Iterable[str]:
    """Both specs make a crosskd.adapters.Adapter with all its attributes, and the pair can be distilled."""
    bench.distiller()
    return ()


def structure(bench: Bench) -> Iterator[str]:
    """Levels (finest first), strides, widths, classes, bins, anchors and regions are those of the maps."""
    for side, adapter, batch in bench.sides():
        with torch.no_grad():
            maps = adapter.maps(batch.pixels)
        yield from (f"{side}: {found}" for found in _level_findings(adapter, maps, batch.size))
        for run in run_heads(adapter, batch, maps):
            wrong = _head_findings(run, len(batch.pixels))
            yield from (f"{side}: {run[0].name or 'head'}: {found}" for found in wrong)


def _level_findings(adapter: Adapter, maps: Sequence[Tensor], size: tuple[int, int]) -> Iterator[str]:
    shapes = [tuple(level.shape[2:]) for level in maps]
    if shapes != sorted(shapes, key=math.prod, reverse=True):
        yield f"the levels are {shapes}, as (height, width)"
    widths, strides = adapter.widths, adapter.strides
    if widths is not None and list(widths) != [level.shape[1] for level in maps]:
        yield f"widths says {list(widths)}, the maps have {[level.shape[1] for level in maps]}"
    if strides is not None:
        expected = [tuple(side / stride for side in size) for stride in strides]
        pairs = [pair for two in zip(expected, shapes, strict=False) for pair in zip(*two, strict=True)]
        if len(strides) != len(maps) or any(abs(a - b) > 1 for a, b in pairs):
            yield f"strides says {list(strides)}, the maps are {shapes} of {size} pixels"


def _head_findings(run: HeadRun, images: int) -> Iterator[str]:
    head, feed, predictions, anchors = run
    rows, classes = predictions.logits.shape[1:]
    bins = 1 if predictions.box_per_class else (*predictions.regression.shape, 1)[3]
    for name, found in (("num_classes", classes), ("background", predictions.background), ("bins", bins)):
        if getattr(head, name) != found:
            yield f"{name} says {getattr(head, name)}, the predictions have {found}"
    if head.rows == "queries":
        return  # they stand at nothing
    last = head.branches[0].tower(0).channels_last
    widths = [features.shape[-1 if last else 1] for features in feed]
    for branch in head.branches:
        takes = [branch.tower(level).width_in for level in range(len(feed))]
        if takes != widths:
            yield f"the {branch.name} towers take {takes} channels, the maps have {widths}"
    if isinstance(head, RegionHead):
        counts, units, totals = list(head.counts(anchors)), [1] * images, {len(feed[0])}
    else:
        counts, units = list(anchors.per_level), [math.prod(space(f, channels_last=last)) for f in feed]
        totals = set() if anchors.boxes is None else {len(anchors.boxes)}
    uneven = len(counts) != len(units) or any(n % unit for n, unit in zip(counts, units, strict=True))
    if uneven or {sum(counts), *totals} != {rows}:
        what = f"regions of {images} images, pooled" if isinstance(head, RegionHead) else "anchors, boxes"
        yield f"there are {counts} {what} {sorted(totals)}, {units} locations and {rows} rows of predictions"


def same_path(bench: Bench) -> Iterable[str]:
    """The teacher's pieces predict what its own forward does, layer by layer."""
    (_, teacher, batch), _ = bench.sides()
    prove_teacher(teacher, batch)
    return ()


@torch.no_grad()
def taps_and_tail(bench: Bench) -> Iterator[str]:
    """Features tapped after each block, and the rest run on them, give exactly the teacher's predictions."""
    (_, teacher, batch), _ = bench.sides()
    if not teacher.heads or any(head.rows == "queries" for head in teacher.heads):
        raise Skipped("its rows are a set of queries" if teacher.heads else "the teacher has no head")
    for head, feed, _, _ in run_heads(teacher, batch):
        for level, features in enumerate(feed):
            outputs = {b.name: b.tower(level).run(features.clone(), ())[0] for b in head.branches}
            whole = _predicted(head, level, outputs)
            for branch in head.branches:
                tower = branch.tower(level)
                for position in range(len(tower.blocks) + 1):
                    _, taps = tower.run(features.clone(), {TapPoint(position, "post")})
                    (rest,) = [tapped.read().clone() for tapped in taps.values()]
                    rest = rest.movedim(1, -1) if tower.channels_last else rest
                    # Tower.tail would activate again, which only some activations can be without effect.
                    for block in tower.blocks[position:]:
                        rest = block(rest)
                    at = f"{head.name or 'head'}: {branch.name} branch, level {level}, position {position}"
                    if _differ(outputs[branch.name], rest):
                        yield f"{at}: the blocks behind the split make another tower output"
                    elif _differ(whole, _predicted(head, level, {**outputs, branch.name: rest})):
                        yield f"{at}: predict() gives other predictions for the same tower output"


def gradients_through_the_tail(bench: Bench) -> Iterator[str]:
    """Each kd_* has a gradient in the student, their sum one at its features of each branch and level."""
    if "towers" not in bench.settings["methods"].requires:
        raise Skipped(f"{type(bench.settings['methods']).__name__} taps no features")
    distiller, trace = bench.step(*bench.batch)
    for name, step in trace.steps.items():
        losses, head = trace.losses[name], step.student.head.name or "head"
        for key, loss in losses.items():
            gradients = _gradients([loss], dict(distiller.student.named_parameters()))
            if not any(bool(gradient.any()) for gradient in gradients.values()):
                yield f"{head}: {key} has no gradient in the student"
        for branch, taps in step.student.taps.items():
            levels = {f"level {level}": tap.read() for level, tap in enumerate(taps)}
            lost = sorted(levels.keys() - _gradients(losses.values(), levels).keys())
            if lost:
                yield f"{head}: {' + '.join(losses)} has no gradient at {branch} features of {lost}"


def _plain_losses(adapter: Adapter, images: Any, targets: Any) -> Mapping[str, Tensor] | None:
    """The losses of a detector by its own forward; raises `Skipped` where it can't train on such a batch."""
    try:
        with same_random_numbers(adapter.detector):
            plain = adapter.own_losses(*copy.deepcopy((images, targets)))
    except Exception as error:
        raise Skipped(f"the student alone can't train on it ({type(error).__name__}: {error})") from error
    if not isinstance(plain, Mapping | None):
        raise TypeError(f"own_losses() gives a {type(plain).__name__} and not a dict of scalar tensors")
    if plain and not all(loss.isfinite() for loss in plain.values()):
        raise Skipped("the losses of the student alone are not finite on it")
    return plain


def _step_findings(bench: Bench, images: Any, targets: Any) -> Iterator[str]:
    """What is wrong with a step, whose losses are plain training's, finite, and of no narrow type."""
    alone = bench.of_student()
    plain = {} if targets is None else _plain_losses(alone, images, targets)
    distiller, trace = bench.step(images, targets)
    own, losses = trace.own_losses, distiller.named_losses(trace)
    parameters = dict(distiller.student.named_parameters())
    if plain is not None:
        if plain.keys() != own.keys() or any(_differ(plain[name], own[name]) for name in own):
            values = [{name: f"{float(loss):.6g}" for name, loss in side.items()} for side in (own, plain)]
            yield f"the student's own losses are {values[0]} through the adapter and {values[1]} alone"
        expected = _gradients(plain.values(), dict(alone.detector.named_parameters()))
        ours = _gradients(own.values(), parameters)
        wrong = [n for n, g in expected.items() if _differ(g, ours.get(n, 0 * g), _GRADIENT_ROUNDING)]
        if wrong:
            yield f"gradients of the student's own losses are not plain training's at {', '.join(wrong[:3])}"
    runs = [run.predictions for run in trace.student.heads.values()]
    wide = {compute_dtype(part) for run in runs for part in (run.logits, run.regression)}
    for name in losses.keys() - own.keys():
        if wide and losses[name].dtype not in wide:
            yield f"{name} is {losses[name].dtype}, the predictions' type or float32 is {wide}"
    for what, tensors in (("losses", losses), ("gradients", _gradients(losses.values(), parameters))):
        infinite = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
        if infinite:
            yield f"{what} that are not finite: {', '.join(infinite[:3])}"


def student_losses(bench: Bench) -> Iterator[str]:
    """The student's own losses and gradients are those of plain training: distillation adds to them."""
    try:
        yield from _step_findings(bench, *bench.batch)
    except Skipped as reason:
        raise ValueError(f"{reason}: hand in a batch that it can train on") from reason
    prove_student(bench.of_student(), *bench.batch)


@torch.no_grad()
def label_assignment(bench: Bench) -> Iterator[str]:
    """The assignment is (batch, anchors), its normalizer above 0; assign() gives that of the losses."""
    _, (_, adapter, batch) = bench.sides()
    for head, _, predictions, anchors in run_heads(adapter, batch):
        with same_random_numbers(adapter.detector):
            _, own = head.losses(predictions, anchors, batch)
        name, shape = f"{head.name or 'head'}: assignment", predictions.logits.shape[:2]
        for part, tensor in (("positive", own.positive), ("label_weights", own.label_weights)):
            if tensor is not None and tensor.shape != shape:
                yield f"{name}.{part} is {tensor.dtype} {tuple(tensor.shape)}, not {tuple(shape)}"
        if own.normalizer.ndim or not 0 < float(own.normalizer) < math.inf:
            yield f"{name}.normalizer is {own.normalizer.tolist()}"
        elif head.rows == "grid" and batch.objects is not None:
            try:
                with same_random_numbers(adapter.detector):
                    other = head.assign(predictions, anchors, replace(batch, targets=None))
            except ValueError as error:
                raise Skipped(f"assign() refuses: {error}") from error
            if not torch.equal(own.positive, other.positive) or _differ(own.normalizer, other.normalizer):
                counts = [(int(each.positive.sum()), float(each.normalizer)) for each in (own, other)]
                yield f"{name} of losses() and of assign() differ: (positives, normalizer) are {counts}"


def teacher_untouched(bench: Bench) -> Iterator[str]:
    """No parameter, buffer, flag or mode of the teacher changes; it stays frozen and in eval mode."""
    distiller, _ = bench.step(*bench.batch)
    before = copy.deepcopy(bench.teacher).eval().requires_grad_(False)
    yield from _changes("the teacher", before, distiller.teacher)


def _changes(what: str, before: nn.Module, after: nn.Module) -> Iterator[str]:
    """Names of parameters, buffers, flags and modes that differ."""
    states: list[dict[str, Tensor]] = []
    for detector in (before, after):
        state = {f"mode of {name}": torch.tensor(m.training) for name, m in detector.named_modules()}
        for name, tensor in [*detector.named_parameters(), *detector.named_buffers()]:
            state |= {name: tensor, f"requires_grad of {name}": torch.tensor(tensor.requires_grad)}
        states.append(state)
    a, b = states
    names = [name for name in a | b if name not in a or name not in b or not torch.equal(a[name], b[name])]
    if names:
        yield f"{what} has changed in {len(names)} places: {', '.join(names[:3])}"


@torch.no_grad()
def rows_permuted(bench: Bench) -> Iterator[str]:
    """The boxes of a grid depend on the places of its rows; a set, whose rows have none, is "queries"."""
    runs = [run for _, adapter, batch in bench.sides() for run in run_heads(adapter, batch)]
    grids = [run for run in runs if run[0].rows == "grid" and run[0].decodes]
    if not grids:
        raise Skipped("no head decodes boxes of a grid")
    for head, _, own, anchors in grids:
        order = torch.randperm(own.logits.shape[1], device=own.logits.device)
        permuted = replace(own, logits=own.logits[:, order], regression=own.regression[:, order])
        boxes = head.decode(own, anchors)[:, order]
        if len(order) > 1 and not _differ(boxes, head.decode(permuted, anchors)):
            yield f'{head.name or "head"}: rows is "grid", but permuted predictions decode to the same boxes'


def decoding_and_classes(bench: Bench) -> Iterator[str]:
    """Predictions that minimise the student's own losses decode to the objects' boxes, of their labels."""
    _, (_, adapter, batch) = bench.sides()
    if not all(head.decodes for head in adapter.heads):
        raise Skipped("the adapter decodes no boxes")
    if batch.objects is None or not any(len(of_image.labels) for of_image in batch.objects):
        raise Skipped(f"the {'adapter gives' if batch.objects is None else 'targets hold'} no objects")
    fitted: list[FreePredictions] = []
    for run in run_heads(adapter, batch, fitted=fitted):
        # An earlier head, of one class, separates objects from background.
        classless = run[0] is not adapter.heads[-1] and run[0].num_classes == 1
        fitted.append(FreePredictions(run, batch, classless, bench.steps))
        yield from (f"{run[0].name or 'head'}: {found}" for found in fitted[-1].findings())


class FreePredictions:
    """Predictions that are free numbers instead of a network's outputs.

    Minimising a head's own losses over them leads to the objects' own boxes and labels (all of class 0 if
    ``classless``), off which decoding and the order of classes are read, without a trained network.
    """

    assignment: Assignment

    def __init__(self, run: HeadRun, batch: Batch, classless: bool, steps: int) -> None:
        self.head, _, start, self.anchors = run
        self.batch, self.counts = batch, counts_of(self.head, self.anchors)
        self.objects = [Objects(o.boxes, o.labels * (not classless)) for o in batch.objects or ()]
        # Losses of boxes far apart may have no gradient. Zeros are an anchor itself where anchors are shifted
        # and stretched, and no box at all where distances are predicted, for which ones are a small box.
        starts = torch.zeros_like(start.regression), torch.ones_like(start.regression), start.regression
        candidates = [replace(start, regression=regression) for regression in starts]
        self.predictions = max(candidates, key=self._overlap).detach()
        self.scale = self._scale(self.predictions)
        self._fit(self.predictions, steps)

    def _decoded(self, predictions: Predictions) -> tuple[Tensor, ...]:
        return rows_of_images(self.head.decode(predictions, self.anchors), self.counts)

    def _overlap(self, predictions: Predictions) -> float:
        pairs = zip(self._decoded(predictions), self.objects, strict=True)
        return sum(float(overlaps(boxes.reshape(-1, 4), o.boxes).sum()) for boxes, o in pairs)

    def _scale(self, start: Predictions) -> Tensor | float:
        """By how much each number, in whatever unit, must change to change its box by an object's size."""
        if start.regression.ndim == 4 and not start.box_per_class:
            return _LOGIT_STEP / _BOX_STEP  # the logits of a distribution
        boxes = torch.cat([of_image.boxes for of_image in self.objects])
        side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1).mean().to(start.regression)
        at_start, slopes = self.head.decode(start, self.anchors), []
        for nudge in _NUDGE * torch.eye(4).to(start.regression):
            nudged = replace(start, regression=start.regression + nudge)
            slopes.append((self.head.decode(nudged, self.anchors) - at_start).abs().amax(dim=-1) / _NUDGE)
        return side / torch.stack(slopes, dim=-1).clamp(min=_FLATTEST).to(start.regression)

    def _fit(self, start: Predictions, steps: int) -> None:
        logits = torch.full_like(start.logits, -2.0).requires_grad_()
        offset = torch.zeros_like(start.regression).requires_grad_()
        # Losses may weigh an object next to nothing, but its numbers are to arrive as well.
        groups = [{"params": [logits], "lr": _LOGIT_STEP}, {"params": [offset], "lr": _BOX_STEP}]
        optimizer = torch.optim.Adam(groups, eps=1e-12)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            predictions = replace(start, logits=logits, regression=start.regression + self.scale * offset)
            losses, self.assignment = self.head.losses(predictions, self.anchors, self.batch)
            optimizer.zero_grad()
            torch.autograd.backward([loss for loss in losses.values() if loss.requires_grad])
            optimizer.step()
            schedule.step()
            self.predictions = predictions.detach()

    def regions_of(self, head: RegionHead) -> Any:
        """The regions that follow, somewhat off: proposals that are the objects leave nothing to decode."""
        offset = torch.empty_like(self.predictions.regression).uniform_(-_OFF, _OFF)
        moved = replace(self.predictions, regression=self.predictions.regression + self.scale * offset)
        self.head.losses(moved, self.anchors, self.batch)  # regions are asked for after them
        return head.regions(moved, self.anchors, self.batch)

    def findings(self) -> Iterator[str]:
        """What is wrong with boxes and classes at the positive anchors."""
        rows = [rows_of_images(t, self.counts) for t in (self.predictions.logits, self.assignment.positive)]
        images = zip(self._decoded(self.predictions), *rows, self.objects, strict=True)
        seen = [_compared(b[p], logits[p], o) for b, logits, p, o in images if p.any() and len(o.labels)]
        if not seen:
            yield "no anchor is responsible for any object of the targets"
            return
        best, shifts, own = (torch.cat(column) for column in zip(*seen, strict=True))
        right = best >= _OVERLAP  # only there is it clear whose label an anchor was to learn
        shifted = shifts[right & (shifts != 0)]
        label = f"{int(shifted.mode().values) if len(shifted) else 0:+d}"
        for wrong, what in (
            (~right, f"decoding: the decoded boxes of % overlap no object by an IoU of {_OVERLAP}"),
            (shifts[right] != 0, f"classes: the largest logit of % is not its object's (label {label})"),
            (own[right] < _OVERLAP, "classes: another class's box than the object's label's fits at %"),
        ):
            if int(wrong.sum()) > (1 - _SHARE) * len(wrong):
                count = f"{int(wrong.sum())} of {len(wrong)} positive anchors"
                yield f"{what.replace('%', count)}, where the student's own losses are smallest"


def _compared(boxes: Tensor, logits: Tensor, objects: Objects) -> tuple[Tensor, ...]:
    """(best overlap with an object, by how much the label is off, the overlap of the label's own box)."""
    boxes = boxes if boxes.ndim == 3 else boxes[:, None]  # (positives, classes, 4)
    by_class = overlaps(boxes.flatten(0, 1), objects.boxes).view(*boxes.shape[:2], -1)
    overlap, labels, found = by_class.amax(dim=1), objects.labels, logits.argmax(dim=-1)
    fits = ((overlap >= _OVERLAP) & (found[:, None] == labels)).any(dim=1)  # (positives,)
    shifts = (found - labels[overlap.argmax(dim=1)]) % logits.shape[-1]
    own = by_class[:, labels if boxes.shape[1] > 1 else 0 * labels, torch.arange(len(labels)).to(labels)]
    return overlap.amax(dim=1), torch.where(fits, 0, shifts), own.amax(dim=1)


def detections(bench: Bench) -> Iterator[str]:
    """In eval mode the student detects, and stays as it is."""
    distiller = bench.distiller().eval()
    before = copy.deepcopy(distiller.student)
    with torch.no_grad():
        distiller(bench.batch[0])
    yield from _changes("by detect() the student", before, distiller.student)


def unlabelled_images(bench: Bench) -> Iterator[str]:
    """Without targets the distillation losses stand alone, and are finite."""
    yield from _step_findings(bench, bench.batch[0], None)


def one_image(bench: Bench) -> Iterator[str]:
    """A batch of one image gives the losses of plain training, and they are finite."""
    batch = bench.varied("one_image", lambda images, targets: (images[:1], targets[:1]))
    yield from _step_findings(bench, *batch)


def no_objects(bench: Bench) -> Iterator[str]:
    """Images whose targets hold no object give the losses of plain training, and they are finite."""
    yield from _step_findings(bench, *bench.varied("without_objects", _without_objects))


def _without_objects(images: Any, targets: Any) -> tuple[Any, Any]:
    def emptied(value: Any, boxes: Tensor) -> Any:
        return value[:0] if isinstance(value, Tensor) and value.shape[:1] == boxes.shape[:1] else value

    return images, [{key: emptied(value, t["boxes"]) for key, value in t.items()} for t in targets]


def odd_image_size(bench: Bench) -> Iterator[str]:
    """Images whose sides are multiples of nothing give the losses of plain training, and they are finite."""
    yield from _step_findings(bench, *bench.varied("odd_size", _cropped))


def _cropped(images: Any, targets: Any) -> tuple[Any, Any]:
    """Images without their last rows and columns; without targets, unless those are dicts of boxes."""
    cut = images[..., :-5, :-3] if isinstance(images, Tensor) else [image[..., :-5, :-3] for image in images]
    plain = isinstance(targets, list | tuple) and all(isinstance(target, Mapping) for target in targets)
    return cut, targets if plain else None


def autocast(bench: Bench) -> Iterable[str]:
    """Under bfloat16 autocast losses are finite, and the distillation's in float32."""
    with torch.autocast(next(bench.student.parameters()).device.type, dtype=torch.bfloat16):
        return list(_step_findings(bench, *bench.batch))


def float64(bench: Bench) -> Iterator[str]:
    """Detectors and images in float64, on the CPU, give finite losses in float64."""
    wide = bench.converted(device=torch.device("cpu"), dtype=torch.float64)
    yield from _step_findings(wide, *wide.batch)


def other_device(bench: Bench) -> Iterator[str]:
    """The losses are the same on a CUDA device, or on the CPU where the detectors are on one."""
    here = next(bench.student.parameters()).device.type
    if here == "cpu" and not torch.cuda.is_available():
        raise Skipped("there is no CUDA device here")
    there, sides = "cuda" if here == "cpu" else "cpu", []
    for at in (bench, bench.converted(device=torch.device(there))):
        distiller, trace = at.step(*at.batch)
        sides.append(distiller.named_losses(trace))
    for name, loss in sides[0].items():
        if _differ(loss, sides[1][name], _DEVICE_ROUNDING):
            yield f"{name} is {float(loss):.6g} on {here} and {float(sides[1][name]):.6g} on {there}"


CHECKS: dict[str, Callable[[Bench], Iterable[str]]] = {
    check.__name__.replace("_", " "): check
    for check in (
        construction, structure, same_path, taps_and_tail, gradients_through_the_tail, student_losses,
        label_assignment, teacher_untouched, rows_permuted, decoding_and_classes,
        detections, unlabelled_images, one_image, no_objects, odd_image_size, autocast, float64, other_device,
    )
}  # fmt: skip
