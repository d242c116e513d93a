"""What `crosskd.check_adapter` runs: checks yield or raise what is wrong, docstrings say what is expected."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from crosskd._checks import compute_dtype
from crosskd.adapters.base import Adapter, Batch, DecoderHead, Head, Objects, RegionHead
from crosskd.diagnostics._objects import counts_of, overlaps, rows_of_images
from crosskd.distiller import Distiller
from crosskd.methods.base import Method, Requirement
from crosskd.predictions import Predictions
from crosskd.proof import SUM, differ, paired, prove_student, prove_teacher, same_random_numbers
from crosskd.step import Trace, run_head, space
from crosskd.towers import TapPoint

__all__ = ["CHECKS", "Bench", "Skipped", "Variation", "gradients_at", "moved", "run_heads"]

Variation = Callable[[Any, Any], tuple[Any, Any]]  # makes another batch of images and targets
# A head, what it was fed per level, what it predicted, and at which anchors or regions.
HeadRun = tuple[Head, list[Tensor], Predictions, Any]

# Gradients that are calculated twice differ by no more than this, relatively, and losses on two devices.
_GRADIENT_ROUNDING, _DEVICE_ROUNDING = 1e-3, 1e-2
# What free predictions must reach, and at how many of the positive anchors: not at all of them, for an
# assignment may follow the predictions, and give an anchor another object at the last moment.
_OVERLAP, _SHARE = 0.9, 0.75
# Adam's step in logits; in boxes it is that many times _SHIFT of an object's size, and so is how far off
# proposals are. The nudge that shows a slope, and the least slope.
_STEP, _SHIFT, _OFF, _NUDGE, _FLATTEST = 0.2, 0.25, 0.6, 1e-2, 1e-3


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
        return cast(Adapter, self.settings["adapter"](copy.deepcopy(self.student).train()))

    def demand(self, part: Requirement, otherwise: str) -> None:
        """Raises ``Skipped`` where no method asks for a part of a step."""
        given = self.settings["methods"]
        methods = [given] if isinstance(given, Method) else given
        if not any(part in method.requires for method in methods):
            raise Skipped(f"{' + '.join(type(method).__name__ for method in methods)} {otherwise}")

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
def run_heads(adapter: Adapter, batch: Batch, fitted: Sequence[FreePredictions] = ()) -> Iterator[HeadRun]:
    """Runs each head as a step does; regions are those of the earlier head, or near its fitted boxes."""
    maps, runs = adapter.maps_of(batch), list[HeadRun]()
    for head in adapter.heads:
        if not isinstance(head, RegionHead):
            anchors, feed = head.anchors(batch, maps), list(maps)
        else:
            before, _, made, at = runs[-1]
            made = fitted[-1].somewhat_off() if fitted else made
            if batch.targets is not None:  # regions are asked for after the losses, as in training
                before.losses(made, at, batch)
            anchors = head.regions(made, at, batch)
            feed = [head.pool(maps, anchors, batch)]
        run = run_head(head, [level.clone() for level in feed], range(len(feed)), batch=batch)
        runs.append((head, feed, run.predictions, anchors))
        yield runs[-1]


def gradients_at(losses: Iterable[Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a sum of losses at those tensors that it depends on; the graph stays."""
    learning = [loss for loss in losses if loss.requires_grad]
    at = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad and learning}
    found = torch.autograd.grad(learning, [*at.values()], retain_graph=True, allow_unused=True) if at else ()
    return {name: gradient for name, gradient in zip(at, found, strict=True) if gradient is not None}


def construction(bench: Bench) -> None:
    """Both specs make a crosskd.adapters.Adapter with all its attributes, and the pair can be distilled."""
    bench.distiller()


@torch.no_grad()
def structure(bench: Bench) -> Iterator[str]:
    """Levels (finest first), strides, widths, classes, bins, anchors and regions are those of the maps."""
    for side, adapter, batch in bench.sides():
        maps, widths, strides = adapter.maps_of(batch), adapter.widths, adapter.strides
        shapes, found = [tuple(level.shape[2:]) for level in maps], [level.shape[1] for level in maps]
        if shapes != sorted(shapes, key=math.prod, reverse=True):
            yield f"{side}: the levels are {shapes}, as (height, width)"
        if widths is not None and list(widths) != found:
            yield f"{side}: widths says {list(widths)}, the maps have {found}"
        levels = zip(shapes, strides or (), strict=False)
        off = [abs(shape[i] - batch.size[i] / stride) for shape, stride in levels for i in (0, 1)]
        if strides is not None and (len(strides) != len(maps) or any(pixels > 1 for pixels in off)):
            yield f"{side}: strides says {list(strides)}, the maps are {shapes} of {batch.size} pixels"
        for run in run_heads(adapter, batch):
            wrong = _head_findings(run, len(batch.pixels))
            yield from (f"{side}: {run[0].name or 'head'}: {each}" for each in wrong)


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


def same_path(bench: Bench) -> None:
    """The teacher's pieces predict what its own forward does, layer by layer."""
    (_, teacher, batch), _ = bench.sides()
    prove_teacher(teacher, batch)


@torch.no_grad()
def taps_and_tail(bench: Bench) -> Iterator[str]:
    """Features tapped after each block, and the rest run on them, give exactly the teacher's predictions."""
    (_, teacher, batch), _ = bench.sides()
    if not teacher.heads or any(head.rows == "queries" for head in teacher.heads):
        raise Skipped("its rows are a set of queries" if teacher.heads else "the teacher has no head")
    for head, feed, _, _ in run_heads(teacher, batch):
        for level, features in enumerate(feed):
            outputs = {b.name: b.tower(level).run(features.clone(), ())[0] for b in head.branches}
            # predict() may write over what it is given.
            whole = head.predict(level, {name: output.clone() for name, output in outputs.items()})
            for branch in head.branches:
                tower = branch.tower(level)
                for position in range(len(tower.blocks) + 1):
                    point, rest = TapPoint(position, "post"), replace(tower, blocks=tower.blocks[position:])
                    tapped = tower.run(features.clone(), {point})[1][point].read()
                    # The whole tower's tail would activate again, which only some activations bear.
                    output = rest.tail(tapped.clone(), TapPoint(0, "post"))
                    given = {name: other.clone() for name, other in {**outputs, branch.name: output}.items()}
                    at = f"{head.name or 'head'}: {branch.name} branch, level {level}, position {position}"
                    if differ(outputs[branch.name], output):
                        yield f"{at}: the blocks behind the split make another tower output"
                    elif any(differ(a, b) for _, a, b in paired(whole, head.predict(level, given))):
                        yield f"{at}: predict() gives other predictions for the same tower output"


def gradients_through_the_tail(bench: Bench) -> Iterator[str]:
    """Each kd_* has a gradient in the student, their sum one at its features of each branch and level."""
    bench.demand("towers", "taps no features")
    distiller, trace = bench.step(*bench.batch)
    for name, step in trace.steps.items():
        losses, head = trace.losses[name], step.student.head.name or "head"
        for key, loss in losses.items():
            gradients = gradients_at([loss], dict(distiller.student.named_parameters()))
            if not any(bool(gradient.any()) for gradient in gradients.values()):
                yield f"{head}: {key} has no gradient in the student"
        for branch, taps in step.student.taps.items():
            levels = {f"level {level}": tap.read() for level, tap in enumerate(taps)}
            lost = sorted(levels.keys() - gradients_at(losses.values(), levels).keys())
            if lost:
                yield f"{head}: {' + '.join(losses)} has no gradient at {branch} features of {lost}"


def _plain_losses(adapter: Adapter, images: Any, targets: Any) -> Mapping[str, Tensor] | None:
    """The losses of a detector by its own forward; raises `Skipped` where it can't train on such a batch."""
    try:
        with same_random_numbers(adapter.detector):
            plain = adapter.own_losses(*copy.deepcopy((images, targets)))
    except Exception as error:
        raise Skipped(f"the student alone can't train on it ({type(error).__name__}: {error})") from error
    plain = {SUM: plain} if isinstance(plain, Tensor) else plain
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
    losses, own = distiller.named_losses(trace), trace.own_losses
    parameters = dict(distiller.student.named_parameters())
    if plain is not None:
        own = {SUM: torch.stack([*own.values()]).sum()} if plain.keys() == {SUM} else own
        if plain.keys() != own.keys() or any(differ(plain[name], own[name]) for name in own):
            values = [{name: f"{float(loss):.6g}" for name, loss in side.items()} for side in (own, plain)]
            yield f"the student's own losses are {values[0]} through the adapter and {values[1]} alone"
        expected = gradients_at(plain.values(), dict(alone.detector.named_parameters()))
        ours = gradients_at(own.values(), parameters)
        wrong = [n for n, g in expected.items() if differ(g, ours.get(n, 0 * g), _GRADIENT_ROUNDING)]
        if wrong:
            yield f"gradients of the student's own losses are not plain training's at {', '.join(wrong[:3])}"
    runs = [run.predictions for run in trace.student.heads.values()]
    wide = {compute_dtype(part) for run in runs for part in (run.logits, run.regression)}
    for name in losses.keys() - trace.own_losses.keys():
        if wide and losses[name].dtype not in wide:
            yield f"{name} is {losses[name].dtype}, the predictions' type or float32 is {wide}"
    for what, tensors in (("losses", losses), ("gradients", gradients_at(losses.values(), parameters))):
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


def _require_losses_of_pieces(student: Adapter) -> None:
    if any(isinstance(head, DecoderHead) for head in student.heads):
        raise Skipped("matching and losses of a decoder are part of the detector's own forward")


@torch.no_grad()
def label_assignment(bench: Bench) -> Iterator[str]:
    """The assignment is (batch, anchors), its normalizer above 0; assign() gives that of the losses."""
    _, (_, adapter, batch) = bench.sides()
    _require_losses_of_pieces(adapter)
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
            if not torch.equal(own.positive, other.positive) or differ(own.normalizer, other.normalizer):
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
        if len(order) > 1 and not differ(boxes, head.decode(permuted, anchors)):
            yield f'{head.name or "head"}: rows is "grid", but permuted predictions decode to the same boxes'


def decoding_and_classes(bench: Bench) -> Iterator[str]:
    """Predictions that minimise the student's own losses decode to the objects' boxes, of their labels."""
    _, (_, adapter, batch) = bench.sides()
    _require_losses_of_pieces(adapter)
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
        self.steps = steps
        self._fit(self.predictions, steps)

    def _overlap(self, predictions: Predictions) -> float:
        decoded = rows_of_images(self.head.decode(predictions, self.anchors), self.counts)
        pairs = zip(decoded, self.objects, strict=True)
        return sum(float(overlaps(boxes.reshape(-1, 4), o.boxes).sum()) for boxes, o in pairs)

    def _scale(self, start: Predictions) -> Tensor | float:
        """By how much each number, in whatever unit, must change to shift its box by a share of an object."""
        if start.regression.ndim == 4 and not start.box_per_class:
            return 1.0  # the logits of a distribution
        side = torch.cat([o.boxes[:, 2:] - o.boxes[:, :2] for o in self.objects]).clamp(min=1).mean()
        at_start, slopes = self.head.decode(start, self.anchors), []
        for nudge in _NUDGE * torch.eye(4).to(start.regression):
            nudged = replace(start, regression=start.regression + nudge)
            slopes.append((self.head.decode(nudged, self.anchors) - at_start).abs().amax(dim=-1) / _NUDGE)
        return (_SHIFT * side / torch.stack(slopes, dim=-1).clamp(min=_FLATTEST)).to(start.regression)

    def _fit(self, start: Predictions, steps: int) -> None:
        logits = torch.full_like(start.logits, -2.0).requires_grad_()
        offset = torch.zeros_like(start.regression).requires_grad_()
        # Losses may weigh an object next to nothing, but its numbers are to arrive as well.
        optimizer = torch.optim.Adam([logits, offset], lr=_STEP, eps=1e-12)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            predictions = replace(start, logits=logits, regression=start.regression + self.scale * offset)
            losses, self.assignment = self.head.losses(predictions, self.anchors, self.batch)
            optimizer.zero_grad()
            torch.autograd.backward([loss for loss in losses.values() if loss.requires_grad])
            optimizer.step()
            schedule.step()
            self.predictions = predictions.detach()

    def somewhat_off(self) -> Predictions:
        """Of boxes beside the objects: proposals that are the objects leave nothing to decode."""
        offset = torch.empty_like(self.predictions.regression).uniform_(-_OFF, _OFF)
        return replace(self.predictions, regression=self.predictions.regression + self.scale * offset)

    def findings(self) -> Iterator[str]:
        """What is wrong with boxes and classes at the positive anchors."""
        boxes = self.head.decode(self.predictions, self.anchors)
        parts = (boxes, self.predictions.logits, self.assignment.positive)
        images = zip(*(rows_of_images(part, self.counts) for part in parts), self.objects, strict=True)
        seen = [_compared(b[p], logits[p], o) for b, logits, p, o in images if p.any() and len(o.labels)]
        if not seen:
            yield "no anchor is responsible for any object of the targets"
            return
        best, shifts, own = (torch.cat(column) for column in zip(*seen, strict=True))
        right = best >= _OVERLAP  # only there is it clear whose label an anchor was to learn
        label = 1 + int(shifts[right].bincount(minlength=2)[1:].argmax())  # the commonest that is not 0
        for wrong, what in (
            (~right, f"decoding: the decoded boxes of % overlap no object by an IoU of {_OVERLAP}"),
            (shifts[right] != 0, f"classes: the largest logit of % is not its object's (label {label:+d})"),
            (own[right] < _OVERLAP, "classes: another class's box than the object's label's fits at %"),
        ):
            if int(wrong.sum()) > (1 - _SHARE) * len(wrong):
                count = f"{int(wrong.sum())} of {len(wrong)} positive anchors"
                found = f"{what.replace('%', count)}, where the student's own losses are smallest"
                yield f"{found} after {self.steps} steps (if those are too few, raise steps=)"


def _compared(boxes: Tensor, logits: Tensor, objects: Objects) -> tuple[Tensor, ...]:
    """(best overlap with an object, by how much the label is off, the overlap of the label's own box)."""
    boxes = boxes if boxes.ndim == 3 else boxes[:, None]  # (positives, classes, 4)
    by_class = overlaps(boxes.flatten(0, 1), objects.boxes).view(*boxes.shape[:2], -1)
    overlap, labels, found = by_class.amax(dim=1), objects.labels, logits.argmax(dim=-1)
    fits = (overlap >= _OVERLAP) & (found[:, None] == labels)  # of objects in one place it may be any
    shifts = (found - labels[(overlap + fits).argmax(dim=1)]) % logits.shape[-1]
    own = by_class[:, labels if boxes.shape[1] > 1 else 0 * labels, torch.arange(len(labels)).to(labels)]
    return overlap.amax(dim=1), shifts, own.amax(dim=1)


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
    there = "cuda" if here == "cpu" else "cpu"
    steps = [at.step(*at.batch) for at in (bench, bench.converted(device=torch.device(there)))]
    ours, theirs = (distiller.named_losses(trace) for distiller, trace in steps)
    for name, loss in ours.items():
        if differ(loss, theirs[name], _DEVICE_ROUNDING):
            yield f"{name} is {float(loss):.6g} on {here} and {float(theirs[name]):.6g} on {there}"


CHECKS: dict[str, Callable[[Bench], Iterable[str] | None]] = {
    check.__name__.replace("_", " "): check
    for check in (
        construction, structure, same_path, taps_and_tail, gradients_through_the_tail, student_losses,
        label_assignment, teacher_untouched, rows_permuted, decoding_and_classes,
        detections, unlabelled_images, one_image, no_objects, odd_image_size, autocast, float64, other_device,
    )
}  # fmt: skip
