"""The checks that `crosskd.testing.check_adapter` runs: one function each, named as reports name them.

A check yields what it finds wrong, and raises `Skipped` where it can't be run. The first paragraph of its
docstring says what is expected, the second what usually causes a fault; reports show both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crosskd._checks import compute_dtype
from crosskd.adapters.base import Adapter, AdapterSpec, Batch, Head, RegionHead
from crosskd.diagnostics.free_predictions import FreePredictions, is_distribution, objects_for
from crosskd.distiller import Distiller
from crosskd.methods import CrossKD, Method
from crosskd.predictions import Assignment, Predictions
from crosskd.proof import prove_student, prove_teacher, same_random_numbers
from crosskd.step import Trace, run_head, space
from crosskd.towers import Tapped, TapPoint, Tower

__all__ = ["CHECKS", "Bench", "Skipped", "Variation", "seeded"]

Variation = Callable[[Any, Any], tuple[Any, Any]]
"""Makes another batch of images and targets."""

_COMPARED = {"kd_cls": "logits", "kd_reg": "regression", "kd_quality": "quality"}
"""Which of the predictions a distillation loss compares."""

# Numbers that are calculated twice by the same operators differ by no more than this, relatively.
_ROUNDING, _GRADIENT_ROUNDING, _DEVICE_ROUNDING = 1e-5, 1e-3, 1e-2
_SET = "its rows are a set of queries, which no method compares row by row"


class Skipped(Exception):  # noqa: N818  # it is no error
    """A check can't be run here; the message says why."""


class Pass(NamedTuple):
    """One head of a detector, run alone.

    Attributes:
        head: the head.
        feed: what it was fed, per level.
        predictions: of all levels.
        anchors: what they stand at, or the regions.
    """

    head: Head
    feed: list[Tensor]
    predictions: Predictions
    anchors: Any


@contextmanager
def seeded(detector: nn.Module) -> Iterator[None]:
    """Whatever is drawn inside is drawn again the next time; outside nothing has been drawn."""
    with same_random_numbers(detector):
        torch.manual_seed(0)
        yield


@dataclass(frozen=True, eq=False)
class Bench:
    """What `check_adapter` was given, and what the checks make of it. The detectors are copied for each
    check.

    Attributes:
        adapter: makes the student's adapter.
        teacher_adapter: makes the teacher's.
        images: a batch, as the student takes it.
        targets: with objects.
        teacher: the teacher.
        student: the student.
        method: distils in the checks that take a whole step.
        variations: by the check's name, how to make its batch of the whole one, where given.
        steps: of the optimisation of free predictions.
        options: further arguments of the `Distiller`.
    """

    adapter: AdapterSpec
    teacher_adapter: AdapterSpec
    images: Any
    targets: Any
    teacher: nn.Module
    student: nn.Module
    method: Method
    variations: Mapping[str, Variation]
    steps: int
    options: Mapping[str, Any]

    @property
    def batch(self) -> tuple[Any, Any]:
        """A copy of images and targets, for a step that may change them."""
        return copy.deepcopy((self.images, self.targets))

    def of_student(self) -> Adapter:
        """An adapter of a copy of the student, in train mode."""
        return self.adapter(copy.deepcopy(self.student).train())

    def distiller(self, teacher: nn.Module | None = None) -> Distiller:
        """A distiller of copies, in train mode; the teacher itself where one is given."""
        teacher = copy.deepcopy(self.teacher) if teacher is None else teacher
        settings = {"teacher_adapter": self.teacher_adapter, "prove": False, **self.options}
        with seeded(self.student):
            student = copy.deepcopy(self.student)
            return Distiller(teacher, student, self.method, self.adapter, **settings).train()

    def step(self, batch: tuple[Any, Any] | None = None) -> tuple[Distiller, Trace]:
        """One training step of a new distiller."""
        distiller = self.distiller()
        with seeded(self.student):
            return distiller, distiller.trace(*copy.deepcopy(self.batch if batch is None else batch))

    def sides(self) -> tuple[tuple[str, Adapter, Batch], ...]:
        """The frozen teacher and the student in train mode, each with the batch as it takes it."""
        distiller, given = self.distiller(), self.batch
        with seeded(self.student), torch.no_grad():
            batch = distiller.student_adapter.prepare(*given)
            seen = distiller.teacher_batch(batch, *given)
        return ("teacher", distiller.teacher_adapter, seen), ("student", distiller.student_adapter, batch)

    def twins(self) -> tuple[list[Pass], list[Pass]]:
        """The heads of the teacher, and of its copy in train mode whose layers compute what they do in
        eval.
        """
        (_, teacher, batch), _ = self.sides()
        copied = copy.deepcopy(self.teacher).train()
        for module in copied.modules():
            if not any(True for _ in module.children()):
                module.eval()  # batch norm and dropout are such layers; what has children asks for its mode
        passes = run_heads(teacher, batch)
        return passes, run_heads(self.teacher_adapter(copied), batch, [each.anchors for each in passes])

    def varied(self, check: str, otherwise: Variation) -> tuple[Any, Any]:
        """The batch of a check that wants another one."""
        return self.variations.get(check, otherwise)(*self.batch)

    def converted(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Bench:
        """The same on another device, or with numbers of another type."""
        teacher, student = (
            copy.deepcopy(detector).to(device=device, dtype=dtype)
            for detector in (self.teacher, self.student)
        )
        images, targets = (_moved(part, device, dtype) for part in self.batch)
        return replace(self, images=images, targets=targets, teacher=teacher, student=student)


@torch.no_grad()
def run_heads(adapter: Adapter, batch: Batch, regions: Sequence[Any] | None = None) -> list[Pass]:
    """Each head of a detector, run as in a step; one that answers for regions on the detector's own.

    Args:
        adapter: of the detector, in the mode that it is to run in.
        batch: as it takes it.
        regions: instead of its own, one entry per head.
    """
    passes: list[Pass] = []
    with seeded(adapter.detector):
        maps = adapter.maps(batch.pixels)
        for place, head in enumerate(adapter.heads):
            feed, anchors = list(maps), None if regions is None else regions[place]
            if isinstance(head, RegionHead):
                before = passes[-1]
                if batch.targets is not None:  # regions are asked for after the losses, as in training
                    before.head.losses(before.predictions, before.anchors, batch)
                if anchors is None:
                    anchors = head.regions(before.predictions, before.anchors, batch)
                feed = [head.pool(maps, anchors, batch)]
            else:
                anchors = head.anchors(batch, maps)
            run = run_head(head, [level.clone() for level in feed], range(len(feed)))
            passes.append(Pass(head, feed, run.predictions.detach(), anchors))
    return passes


# -- comparing and reporting -----------------------------------------------------------------------


def numbers(predictions: Predictions) -> list[Tensor]:
    """Logits, regression and, where there is one, quality."""
    every = (predictions.logits, predictions.regression, predictions.quality)
    return [part for part in every if part is not None]


def difference(theirs: Sequence[Tensor], ours: Sequence[Tensor], tolerance: float = _ROUNDING) -> str | None:
    """How two lists of tensors differ, in words; ``None`` where they don't.

    Args:
        theirs: the ones.
        ours: the others.
        tolerance: what doesn't count, as a share of each tensor's largest number.
    """
    shapes = [[tuple(t.shape) for t in side] for side in (theirs, ours)]
    if shapes[0] != shapes[1]:
        return f"shapes {shapes[0]} and {shapes[1]}"
    for a, b in zip(theirs, ours, strict=True):
        first, second = a.detach().double(), b.detach().double().to(a.device)
        largest = float((first - second).abs().max()) if a.numel() else 0.0
        if a.numel() and not largest <= tolerance * max(float(first.abs().max()), 1e-12):
            return f"they differ by up to {largest:.3g}"
    return None


def some(names: Sequence[str]) -> str:
    """A few of some names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def of_head(head: Head, findings: Iterable[str]) -> Iterator[str]:
    """Findings about one head, with its name in front where it has one."""
    for finding in findings:
        yield f"{head.name}: {finding}" if head.name else finding


def backward(losses: Iterable[Tensor]) -> None:
    """Back-propagates the sum of the losses that have a gradient; the graph stays."""
    learning = [loss.float() for loss in losses if loss.requires_grad]
    if learning:
        torch.autograd.backward(torch.stack(learning).sum(), retain_graph=True)


# -- what an adapter has, and what it says of a detector -------------------------------------------


def construction(bench: Bench) -> Iterator[str]:
    """Both specs make a crosskd.adapters.Adapter with all its attributes, and the pair can be distilled.

    The spec is an object instead of a class or a function of the detector, or an attribute was left out.
    """
    sides = ("teacher", bench.teacher_adapter, bench.teacher), ("student", bench.adapter, bench.student)
    for side, spec, detector in sides:
        adapter: Any = spec(copy.deepcopy(detector))
        if not isinstance(adapter, Adapter):
            yield f"{side}: the spec makes a {type(adapter).__name__} of a {type(detector).__name__}"
            return
        for head in adapter.heads:
            missing = [n for n in ("num_classes", "branches") if not hasattr(head, n)]
            if missing:
                yield f"{side}: there is no {', '.join(missing)}"
                return
    bench.distiller()


def structure(bench: Bench) -> Iterator[str]:
    """Classes, strides, widths, levels (finest first), towers and anchors fit the maps and each other.

    maps() gives the levels in another order, or leaves one out; a tower lacks its first layers; one number
    counts the background or the anchors of a location; predict() flattens other dimensions.
    """
    for side, adapter, batch in bench.sides():
        with torch.no_grad():
            maps = adapter.maps(batch.pixels)
        wrong = list(_level_findings(adapter, maps, batch.size))
        for head in adapter.heads:
            if not isinstance(head, RegionHead):
                wrong += of_head(head, _tower_findings(head, head.feed(maps)))
        if not wrong:  # else the heads could not be run on these
            for each in run_heads(adapter, batch):
                wrong += of_head(each.head, _head_findings(each, batch))
        yield from (f"{side}: {found}" for found in wrong)


def _level_findings(adapter: Adapter, maps: Sequence[Tensor], size: tuple[int, int]) -> Iterator[str]:
    shapes = [tuple(level.shape[2:]) for level in maps]
    areas = [math.prod(shape) for shape in shapes]
    if areas != sorted(areas, reverse=True):
        yield f"the levels are {shapes}, as (height, width)"
    for name, given in (("strides", adapter.strides), ("widths", adapter.widths)):
        if given is not None and len(given) != len(maps):
            yield f"{name} has {len(given)} levels and maps() gives {len(maps)}"
            return
    for level, feature_map in enumerate(maps):
        if feature_map.ndim != 4:
            continue
        if adapter.widths is not None and feature_map.shape[1] != adapter.widths[level]:
            width = adapter.widths[level]
            yield f"widths says {width} for level {level}, whose map has {feature_map.shape[1]}"
        if adapter.strides is None:
            continue
        expected = [side / adapter.strides[level] for side in size]
        if any(abs(a - b) > 1 for a, b in zip(shapes[level], expected, strict=True)):
            where = f"level {level}, whose map is {shapes[level]} for pixels of {size}"
            yield f"strides says {adapter.strides[level]:g} for {where}"


def _tower_findings(head: Head, feed: Sequence[Tensor]) -> Iterator[str]:
    names = [branch.name for branch in head.branches]
    if len(set(names)) < len(names):
        yield f"the branches are {names}, not each with a name of its own"
    for branch in head.branches:
        if len(branch.towers) not in (1, len(feed)):
            yield f"the {branch.name} branch has {len(branch.towers)} towers for {len(feed)} levels"
            continue
        for level, features in enumerate(feed):
            tower = branch.tower(level)
            width = features.shape[-1 if tower.channels_last else 1]
            if width != tower.width_in:
                takes = f"the {tower.name} takes {tower.width_in} channels"
                yield f"{takes}, the map of level {level} has {width}"


def _head_findings(run: Pass, batch: Batch) -> Iterator[str]:
    """What is wrong with a head's predictions and what they stand at."""
    head, predictions = run.head, run.predictions
    rows, classes = predictions.logits.shape[1:]
    bins = predictions.regression.shape[3] if is_distribution(predictions) else 1
    for name, said, found in (
        ("num_classes", head.num_classes, classes),
        ("background", head.background, predictions.background),
        ("bins", head.bins, bins),
    ):
        if said != found:
            yield f"{name} says {said}, the predictions have {found}"
    if isinstance(head, RegionHead):
        counts, pooled = list(head.counts(run.anchors)), len(run.feed[0])
        if len(counts) != len(batch.pixels) or {pooled, rows} != {sum(counts)}:
            images = f"{len(batch.pixels)} images"
            yield f"counts() says {counts} regions for {images}, pool() gives {pooled} and predict() {rows}"
        yield from _tower_findings(head, run.feed)
        return
    if head.rows == "queries":
        return  # they stand at nothing
    last = head.branches[0].towers[0].channels_last
    locations = [math.prod(space(level, channels_last=last)) for level in run.feed]
    per_level, boxes = list(run.anchors.per_level), run.anchors.boxes
    uneven = [n for n, each in zip(per_level, locations, strict=False) if n % each]
    several = len({rows, sum(per_level), rows if boxes is None else len(boxes)}) > 1
    if len(per_level) != len(locations) or uneven or several:
        yield (
            f"anchors() has {per_level} anchors per level and {'no' if boxes is None else len(boxes)} boxes; "
            f"there are {locations} locations and {rows} rows of predictions"
        )


# -- the head, split and put together again --------------------------------------------------------


def same_path(bench: Bench) -> Iterator[str]:
    """The teacher's pieces predict what its own forward does, layer by layer.

    A layer of the detector's own forward is left out, levels or anchors are in another order, or a function
    looks at the detector's mode.
    """
    (_, teacher, batch), _ = bench.sides()
    try:
        prove_teacher(teacher, batch)
    except ValueError as error:
        yield str(error)


@torch.no_grad()
def taps_and_tail(bench: Bench) -> Iterator[str]:
    """Features tapped after each block, and the rest run on them, give exactly the teacher's predictions.

    Blocks in another order than the tower runs them; an activation that belongs to two blocks; predict()
    reads something else than the towers' outputs, or keeps something from call to call; a block or predict()
    works in place on what it is given (relu_(), inplace=True, +=) in a way that its layers don't show.
    """
    passes, twins = bench.twins()
    if not passes:
        raise Skipped("the teacher has no head")
    if any(each.head.rows == "queries" for each in passes):
        raise Skipped(_SET)
    for own, twin in zip(passes, twins, strict=True):
        for place, branch in enumerate(own.head.branches):
            findings = (
                finding
                for level in range(len(own.feed))
                for point in _points(branch.tower(level))
                for finding in _split_findings(own, twin.head, level, place, point)
            )
            yield from of_head(own.head, list(findings)[:1])  # the first of a branch says it all


def _points(tower: Tower) -> Iterator[TapPoint]:
    yield TapPoint(0, "post")
    for number, block in enumerate(tower.blocks, 1):
        yield TapPoint(number, "post")
        if block.has_pre:
            yield TapPoint(number, "pre")


def _split_findings(own: Pass, twin: Head, level: int, place: int, point: TapPoint) -> Iterator[str]:
    """What is wrong where one branch of a twin is tapped, and the rest run by the teacher's head."""
    head, branch = own.head, own.head.branches[place]
    whole, outputs = _outputs(head, own.feed[level], level)
    name = twin.branches[place].name
    run = run_head(twin, [own.feed[level].clone()], [level], {name: {"": point}})
    try:
        rest = run.taps[""][name][0].read()
    except ValueError as error:
        yield str(error)
        return
    tower = branch.tower(level)
    if tower.channels_last:
        rest = rest.movedim(1, -1)
    if point.tap == "pre" and point.position:
        rest = tower.blocks[point.position - 1].activate(rest)
    # Behind "post" Tower.tail would activate again, which only some activations can be without effect.
    for block in tower.blocks[point.position :]:
        rest = block(rest)
    where = f"{branch.name} branch, level {level}, position {point.position} ({point.tap})"
    differ = difference([outputs[branch.name]], [rest])
    if differ:
        yield f"{where}: the blocks behind the split make another tower output: {differ}"
        return
    predictions = head.predict(level, {**_cloned(outputs), branch.name: rest.clone()})
    differ = difference(numbers(whole), numbers(predictions))
    if differ:
        yield f"{where}: predict() gives other predictions for the same tower output: {differ}"


def _outputs(head: Head, features: Tensor, level: int) -> tuple[Predictions, dict[str, Tensor]]:
    """A head's predictions of one level, and its towers' outputs."""
    ends = {b.name: {"": TapPoint(len(b.tower(level).blocks), "post")} for b in head.branches}

    def keep(_: str, tapped: Tapped) -> Tensor:
        return tapped.features.clone()

    run = run_head(head, [features.clone()], [level], ends, keep)
    outputs = {}
    for branch in head.branches:
        output = run.taps[""][branch.name][0]
        outputs[branch.name] = output.movedim(1, -1) if branch.tower(level).channels_last else output
    return run.predictions, outputs


def _cloned(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, for a function that may write over what it is given."""
    return {name: output.clone() for name, output in outputs.items()}


def gradients_through_the_tail(bench: Bench) -> Iterator[str]:
    """Each distillation loss has a gradient at the student's features of each level, in every branch that it
    depends on, and what is pooled at regions has one at the student's own maps.

    The tail is detached: detach(), .data, torch.no_grad() or a copy by numpy in predict(), decode() or a
    tower; or pool() pools from the teacher's maps for both, or keeps maps from call to call.
    """
    if "towers" not in bench.method.requires:
        raise Skipped(f"{type(bench.method).__name__} taps no features")
    distiller, trace = bench.step()
    passes = {each.head.name: each for each in bench.twins()[0]}
    for name, step in trace.steps.items():
        depends = _dependencies(passes[step.teacher.head.name])
        for key, loss in trace.losses[name].items():
            for branch in sorted(depends.get(_COMPARED.get(key, ""), set()) & step.student.taps.keys()):
                taps = [tap.read() for tap in step.student.taps[branch]]
                yield from of_head(step.teacher.head, _lost(key, loss, branch, taps))
    student = trace.student
    for head in distiller.student_adapter.heads:
        if isinstance(head, RegionHead):
            pooled = head.pool(student.maps, student.heads[head.name].anchors, student.batch)
            if not any(gradient is not None for gradient in _gradients(pooled.sum(), student.maps)):
                found = "what pool() makes for the student has no gradient at the student's own maps"
                yield from of_head(head, [found])


def _lost(key: str, loss: Tensor, branch: str, features: Sequence[Tensor]) -> Iterator[str]:
    """The levels at whose features a loss has no gradient."""
    gradients = _gradients(loss, features)
    lost = [level for level, gradient in enumerate(gradients) if gradient is None]
    reached = any(gradient is not None and bool(gradient.any()) for gradient in gradients)
    if lost or not reached:
        levels = f"at level {', '.join(map(str, lost))}" if lost and reached else "at any level"
        yield f"{key} has no gradient at the student's features of the {branch} branch {levels}"


@torch.no_grad()
def _dependencies(run: Pass) -> dict[str, set[str]]:
    """Which branches each part of the predictions depends on, found by disturbing the towers' outputs."""
    depends: dict[str, set[str]] = {part: set() for part in _COMPARED.values()}
    for level, features in enumerate(run.feed):
        whole, outputs = _outputs(run.head, features, level)
        for branch, output in outputs.items():
            disturbed = output + output.std(correction=0).clamp(min=1e-3) * torch.randn_like(output)
            others = run.head.predict(level, {**_cloned(outputs), branch: disturbed})
            for part, branches in depends.items():
                before, after = getattr(whole, part), getattr(others, part)
                if before is not None and not torch.equal(before, after):
                    branches.add(branch)
    return depends


def _gradients(loss: Tensor, at: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    if not loss.requires_grad:
        return (None,) * len(at)
    return torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True)


# -- the student trains as it would alone, and the teacher stays as it is ---------------------------


def plain_losses(adapter: Adapter, images: Any, targets: Any) -> Mapping[str, Tensor] | None:
    """The losses of a detector by its own forward, with whose pieces the adapter has nothing to do.

    Raises:
        Skipped: it can't train on such a batch itself.
        TypeError: it gives something else than losses.
    """
    try:
        with seeded(adapter.detector):
            plain = adapter.own_losses(*copy.deepcopy((images, targets)))
    except Exception as error:
        raise Skipped(f"the student alone can't train on it ({type(error).__name__}: {error})") from error
    if plain is None:
        return None
    scalars = isinstance(plain, Mapping) and all(isinstance(v, Tensor) and not v.ndim for v in plain.values())
    if not scalars:
        raise TypeError(
            f"own_losses() gives a {type(plain).__name__} and not a dict of scalar tensors: override it in "
            "the adapter where the detector's own forward gives something else"
        )
    if not all(loss.isfinite() for loss in plain.values()):
        raise Skipped("the losses of the student alone are not finite on it")
    return plain


def loss_findings(bench: Bench, batch: tuple[Any, Any]) -> Iterator[str]:
    """What differs between the student's own losses and the distiller's; the losses must be finite."""
    plain = plain_losses(bench.of_student(), *batch)
    distiller, trace = bench.step(batch)
    own = trace.own_losses
    if plain is not None and plain.keys() != own.keys():
        yield f"the student's own losses are {sorted(own)} through the adapter and {sorted(plain)} alone"
    for name, loss in {} if plain is None else plain.items():
        if name in own and difference([loss], [own[name]]):
            numbers = (
                f"{float(own[name].detach()):.6g} through the adapter and {float(loss.detach()):.6g} alone"
            )
            yield f"{name} is {numbers}"
    yield from finite_findings(distiller, trace)


def finite_findings(distiller: Distiller, trace: Trace) -> Iterator[str]:
    """Losses or gradients of a step that are not finite."""
    losses = distiller.named_losses(trace)
    infinite = [name for name, loss in losses.items() if not bool(loss.isfinite())]
    if infinite:
        yield f"not finite: {', '.join(infinite)}"
        return
    backward(losses.values())
    parameters = distiller.student.named_parameters()
    wrong = [n for n, p in parameters if p.grad is not None and not bool(p.grad.isfinite().all())]
    if wrong:
        yield f"gradients that are not finite at {some(wrong)}"


def student_losses(bench: Bench) -> Iterator[str]:
    """The student's own losses are those of plain training: distillation adds losses, it changes none.

    Predictions, anchors or levels stand in another order than the detector's losses want; losses() leaves one
    out or names it otherwise; prepare() preprocesses otherwise; a branch is fed something else than in the
    detector's own forward; or random numbers are drawn that the detector doesn't draw, or in another order.
    """
    try:
        findings = list(loss_findings(bench, bench.batch))
    except Skipped as reason:
        raise ValueError(f"{reason}: hand in a batch that it can train on") from reason
    yield from findings
    if not findings:
        try:
            prove_student(bench.of_student(), *bench.batch)
        except ValueError as error:
            yield str(error)


def label_assignment(bench: Bench) -> Iterator[str]:
    """The assignment is (batch, anchors) with one normalizer above 0, and assign() gives that of the losses.

    Levels, images or anchors stand in another order than in the predictions; the normalizer leaves out images
    without objects, which count as one positive; batch.objects are other boxes than the targets.
    """
    _, (_, adapter, batch) = bench.sides()
    for each in run_heads(adapter, batch):
        shape = tuple(each.predictions.logits.shape[:2])
        with torch.no_grad(), seeded(adapter.detector):
            _, own = each.head.losses(each.predictions, each.anchors, batch)
        wrong = []
        if tuple(own.positive.shape) != shape or own.positive.dtype != torch.bool:
            wrong.append(
                f"assignment.positive is {own.positive.dtype} {tuple(own.positive.shape)}, not {shape}"
            )
        if own.label_weights is not None and tuple(own.label_weights.shape) != shape:
            wrong.append(f"assignment.label_weights is {tuple(own.label_weights.shape)}, not {shape}")
        if own.normalizer.ndim or not 0 < float(own.normalizer) < math.inf:
            wrong.append(f"assignment.normalizer is {own.normalizer.tolist()}")
        if not wrong and each.head.rows == "grid" and batch.objects is not None:
            wrong += _assign_findings(each, adapter, batch, own)
        yield from of_head(each.head, wrong)


def _assign_findings(run: Pass, adapter: Adapter, batch: Batch, own: Assignment) -> Iterator[str]:
    """How assign() differs from the assignment of the losses, where the head has one apart from them."""
    try:
        with torch.no_grad(), seeded(adapter.detector):
            other = run.head.assign(run.predictions, run.anchors, replace(batch, targets=None))
    except ValueError as error:
        raise Skipped(f"assign() refuses: {error}") from error
    facts = [(int(a.positive.sum()), round(float(a.normalizer), 4)) for a in (own, other)]
    if facts[0] != facts[1] or not torch.equal(own.positive, other.positive):
        both = f"(positives, normalizer) are {facts[0]} and {facts[1]}"
        yield f"the losses' assignment and that of assign() differ: {both}"


def student_gradients(bench: Bench) -> Iterator[str]:
    """Gradients are those of plain training, and the distillation's reach the student's blocks before the
    split and none behind it.

    Features, towers or predictions of the student are detached; another copy of a module is run; the
    teacher's tail is detached, or the cross-head predictions are made by the student's blocks instead.
    """
    alone = bench.of_student()
    plain = plain_losses(alone, *bench.batch)
    distiller, trace = bench.step()
    if plain is not None:
        backward(plain.values())
        backward(trace.own_losses.values())
        expected, ours = _gradients_of(alone.detector), _gradients_of(distiller.student)
        lost = [name for name in expected if name not in ours]
        if lost:
            yield f"the student's own losses have no gradient at {some(lost)}, which plain training reaches"
        both = [name for name in expected if name in ours]
        others = [n for n in both if difference([expected[n]], [ours[n]], _GRADIENT_ROUNDING)]
        if others:
            yield f"the gradients of the student's own losses differ from plain training's at {some(others)}"
    distiller.student.zero_grad()
    backward([loss for losses in trace.losses.values() for loss in losses.values()])
    for name, step in trace.steps.items():
        method = distiller.methods[name]
        if isinstance(method, CrossKD):
            yield from of_head(step.student.head, _tower_gradient_findings(step.student.head, method))


def _gradients_of(detector: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in detector.named_parameters() if p.grad is not None and bool(p.grad.any())}


def _tower_gradient_findings(head: Head, method: CrossKD) -> Iterator[str]:
    missed, strayed = list[str](), list[str]()
    for branch in head.branches:
        position = method.tap_points(branch.name)[0].position
        for tower in branch.towers:
            for number, block in enumerate(tower.blocks, 1):
                parameters = [p for layer in block.layers for p in layer.parameters() if p.requires_grad]
                reached = any(p.grad is not None and bool(p.grad.any()) for p in parameters)
                if parameters and reached != (number <= position):
                    (strayed if reached else missed).append(f"block {number} of the {tower.name}")
    if missed:
        yield f"the distillation's gradient does not reach what stands before the split: {some(missed)}"
    if strayed:
        yield f"the distillation's gradient reaches what stands behind the split: {some(strayed)}"


def teacher_untouched(bench: Bench) -> Iterator[str]:
    """Each parameter, buffer, flag and mode of the teacher stays as it was, and it runs in eval mode alone.

    The adapter calls train() or requires_grad_(), works in place on weights, or sets something of the
    detector.
    """
    teacher = copy.deepcopy(bench.teacher)
    before, ran = state_of(teacher), list[str]()
    distiller = bench.distiller(teacher)

    def record(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, _: ran.append(name) if module.training else None

    for name, module in distiller.teacher.named_modules():
        if not any(True for _ in module.children()):
            module.register_forward_pre_hook(record(name))
    with seeded(bench.student):
        backward(distiller.named_losses(distiller.trace(*bench.batch)).values())
    if ran or distiller.teacher.training:
        yield f"the teacher in train mode: {some(list(dict.fromkeys(ran))) or 'no layer'} ran in it"
    changed = changes(before, state_of(teacher))
    if changed:
        yield f"the teacher has changed: {some(changed)}"
    parameters = distiller.teacher.named_parameters()
    learning = [name for name, p in parameters if p.requires_grad or p.grad is not None]
    if learning:
        yield f"the frozen teacher has parameters with a gradient: {some(learning)}"


def state_of(detector: nn.Module) -> dict[str, Any]:
    """All that must not change, by name."""
    state: dict[str, Any] = {
        f"mode of {n or 'the detector'}": m.training for n, m in detector.named_modules()
    }
    for name, parameter in detector.named_parameters():
        state[name] = parameter.detach().clone()
        state[f"flags of {name}"] = (parameter.requires_grad, parameter.grad is None)
    for name, buffer in detector.named_buffers():
        state[name] = buffer.detach().clone()
    return state


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names of what differs between two states."""
    changed = before.keys() ^ after.keys()
    for name in before.keys() & after.keys():
        a, b = before[name], after[name]
        if not (torch.equal(a, b) if isinstance(a, Tensor) else a == b):
            changed.add(name)
    return sorted(changed)


# -- boxes and classes -----------------------------------------------------------------------------


@torch.no_grad()
def rows_permuted(bench: Bench) -> Iterator[str]:
    """The boxes of a grid depend on the places of its rows; a set, whose rows have none, has rows "queries".

    The head predicts a set, which methods must not compare row by row; or predict() gives boxes that are
    decoded already, which is for decode() to do.
    """
    runs = [each for _, adapter, batch in bench.sides() for each in run_heads(adapter, batch)]
    grids = [each for each in runs if each.head.rows == "grid" and each.head.decodes]
    if not grids:
        raise Skipped(_SET if any(e.head.rows == "queries" for e in runs) else "the adapter decodes no boxes")
    for each in grids:
        own = each.predictions
        order = torch.randperm(own.logits.shape[1], device=own.logits.device)
        quality = None if own.quality is None else own.quality[:, order]
        permuted = Predictions(own.logits[:, order], own.regression[:, order], quality, own.background)
        boxes = each.head.decode(own, each.anchors)[:, order]
        if len(order) > 1 and not difference([boxes], [each.head.decode(permuted, each.anchors)]):
            found = 'rows is "grid", but of permuted predictions decode() makes the same boxes, permuted'
            yield from of_head(each.head, [found])


def decoding_and_classes(bench: Bench) -> Iterator[str]:
    """Predictions that minimise the student's own losses decode to the objects' boxes, of their labels.

    decode() takes the four numbers in another order or scale than the losses do; anchors stand in another
    order than the predictions; positive is not the losses' own; batch.objects are not in pixels of the batch.
    Logits or boxes of classes stand in another order than the labels, or labels are counted from 1. Objects
    are too small for this detector, or a box takes long to fit: more steps=.
    """
    _, (_, adapter, batch) = bench.sides()
    if batch.objects is None:
        raise Skipped("the adapter's batches hold no objects")
    if not any(len(of_image.labels) for of_image in batch.objects):
        raise Skipped("the targets hold no object")
    with torch.no_grad():
        maps = adapter.maps(batch.pixels)
    free: FreePredictions | None = None
    for head in adapter.heads:
        if not head.decodes:
            raise Skipped("the adapter decodes no boxes")
        with torch.no_grad(), seeded(adapter.detector):
            if isinstance(head, RegionHead):
                assert free is not None
                anchors: Any = free.regions_of(head)
                feed = [head.pool(maps, anchors, batch)]
            else:
                anchors, feed = head.anchors(batch, maps), list(maps)
            start = run_head(head, feed, range(len(feed))).predictions
        with seeded(adapter.detector):
            free = FreePredictions(head, batch, anchors, objects_for(head, adapter, batch), start)
            free.fit(bench.steps)
        yield from of_head(head, free.findings())


# -- other batches, types and devices --------------------------------------------------------------


def detections(bench: Bench) -> Iterator[str]:
    """In eval mode the student detects, and stays as it is.

    detect() sets the mode or works in place.
    """
    distiller = bench.distiller().eval()
    before = state_of(distiller.student)
    with torch.no_grad():
        distiller(bench.batch[0])
    changed = changes(before, state_of(distiller.student))
    if changed:
        yield f"detect() has changed the student: {some(changed)}"


def unlabelled_images(bench: Bench) -> Iterator[str]:
    """Without targets the distillation losses stand alone, and are finite.

    prepare() makes targets where none were given.
    """
    distiller, trace = bench.step((bench.batch[0], None))
    if trace.own_losses:
        yield f"losses of the student's own without targets: {sorted(trace.own_losses)}"
    yield from finite_findings(distiller, trace)


def one_image(bench: Bench) -> Iterator[str]:
    """A batch of one image gives the losses of plain training, and they are finite.

    Something is squeezed, or taken from a second image.
    """
    yield from loss_findings(bench, bench.varied("one image", _first_image))


def no_objects(bench: Bench) -> Iterator[str]:
    """Images whose targets hold no object give the losses of plain training, and they are finite.

    A division by a number of positives that may be 0: the assignment's normalizer must be at least 1.
    """
    yield from loss_findings(bench, bench.varied("no objects", _without_objects))


def odd_image_size(bench: Bench) -> Iterator[str]:
    """Images whose sides are multiples of nothing give the losses of plain training, and they are finite.

    Sizes of levels are calculated from strides instead of read off the maps.
    """
    images, targets = bench.varied("odd image size", _cropped)
    if targets is not None:
        yield from loss_findings(bench, (images, targets))
    else:
        yield from finite_findings(*bench.step((images, None)))


def autocast(bench: Bench) -> Iterator[str]:
    """Under bfloat16 autocast losses are finite, and the distillation's in float32.

    decode() casts to a type of its own.
    """
    device = next(bench.student.parameters()).device.type
    if device not in ("cpu", "cuda"):
        raise Skipped(f"nothing is known of autocast on {device}")
    with torch.autocast(device, dtype=torch.bfloat16):
        plain_losses(bench.of_student(), *bench.batch)
        distiller, trace = bench.step()
    yield from _type_findings(trace)
    yield from finite_findings(distiller, trace)


def float64(bench: Bench) -> Iterator[str]:
    """Detectors and images in float64, on the CPU, give finite losses in float64.

    decode() casts to a type of its own.
    """
    if next(bench.student.parameters()).device.type != "cpu":
        raise Skipped("the detectors are not on the CPU")
    wide = bench.converted(dtype=torch.float64)
    plain_losses(wide.of_student(), *wide.batch)
    distiller, trace = wide.step()
    yield from _type_findings(trace)
    yield from finite_findings(distiller, trace)


def other_device(bench: Bench) -> Iterator[str]:
    """The losses are the same on a CUDA device, or on the CPU where the detectors are on one.

    Something is read before it has been calculated, or kept on one device.
    """
    here = next(bench.student.parameters()).device
    there = _elsewhere(here)
    if there is None:
        raise Skipped("there is no CUDA device here")
    distiller, trace = bench.step()
    expected = distiller.named_losses(trace)
    distiller, trace = bench.converted(device=there).step()
    losses = distiller.named_losses(trace)
    for name, loss in expected.items():
        if difference([loss], [losses[name]], _DEVICE_ROUNDING):
            yield f"{name} is {loss.item():.6g} on {here.type} and {losses[name].item():.6g} on {there.type}"
    yield from finite_findings(distiller, trace)


def _elsewhere(device: torch.device) -> torch.device | None:
    """The CPU from anywhere else, a CUDA device from the CPU, if there is one."""
    if device.type != "cpu":
        return torch.device("cpu")
    return torch.device("cuda") if torch.cuda.is_available() else None


def _type_findings(trace: Trace) -> Iterator[str]:
    """Losses of a smaller type than float32, or than the head's own predictions."""
    for name, losses in trace.losses.items():
        step = trace.steps[name]
        for key in losses.keys() & _COMPARED.keys():
            expected = compute_dtype(getattr(step.student.predictions, _COMPARED[key]))
            if losses[key].dtype != expected:
                found = f"{key} is {losses[key].dtype}, of predictions that are {expected} or narrower"
                yield from of_head(step.student.head, [found])


def _first_image(images: Any, targets: Any) -> tuple[Any, Any]:
    if not all(isinstance(part, Tensor | list | tuple) for part in (images, targets)):
        raise Skipped(
            f"images are a {type(images).__name__} and targets a {type(targets).__name__}: pass one_image="
        )
    return images[:1], targets[:1]


def _without_objects(images: Any, targets: Any) -> tuple[Any, Any]:
    if not _hold_boxes(targets):
        raise Skipped("targets are no dicts of boxes and labels: pass without_objects=")
    return images, [_chosen(t, torch.zeros(len(t["boxes"]), dtype=torch.bool)) for t in targets]


def _cropped(images: Any, targets: Any) -> tuple[Any, Any]:
    """Images without their last rows and columns; without targets if it is unknown how to cut those."""
    listed = isinstance(images, list | tuple) and all(isinstance(image, Tensor) for image in images)
    if not listed and not isinstance(images, Tensor):
        raise Skipped(f"images are a {type(images).__name__}: pass odd_size=")
    sides = [min(int(image.shape[at]) for image in images) for at in (-2, -1)]
    height, width = (side - max(side // 8, 1) | 1 for side in sides)  # odd numbers
    cut: Any = [image[..., :height, :width] for image in images]
    if isinstance(images, Tensor):
        cut = images[..., :height, :width]
    if not _hold_boxes(targets):
        return cut, None
    inside = []
    for target in targets:
        boxes = torch.minimum(target["boxes"], target["boxes"].new_tensor([width, height] * 2))
        inside.append(_chosen({**target, "boxes": boxes}, ((boxes[:, 2:] - boxes[:, :2]) > 1).all(dim=1)))
    return cut, inside


def _hold_boxes(targets: Any) -> bool:
    listed = isinstance(targets, list | tuple)
    return listed and all(isinstance(t, Mapping) and {"boxes", "labels"} <= t.keys() for t in targets)


def _chosen(target: Mapping[str, Any], kept: Tensor) -> dict[str, Any]:
    """A target with some of its objects alone."""
    chosen = dict(target)
    for key, value in target.items():
        if isinstance(value, Tensor) and value.shape[:1] == (len(kept),):
            chosen[key] = value[kept.to(value.device)]
    return chosen


def _moved(value: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """A nest of containers with its tensors on another device, its floating-point ones of another type."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {key: _moved(item, device, dtype) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        moved = [_moved(item, device, dtype) for item in value]
        return tuple(moved) if isinstance(value, tuple) else moved
    # A framework's own sample: how its numbers would be cast is not for us to know.
    return value.to(device) if device is not None and hasattr(value, "to") else value


CHECKS: dict[str, Callable[[Bench], Iterator[str]]] = {
    check.__name__.replace("_", " "): check
    for check in (
        construction,
        structure,
        same_path,
        taps_and_tail,
        gradients_through_the_tail,
        student_losses,
        label_assignment,
        student_gradients,
        teacher_untouched,
        rows_permuted,
        decoding_and_classes,
        detections,
        unlabelled_images,
        one_image,
        no_objects,
        odd_image_size,
        autocast,
        float64,
        other_device,
    )
}
