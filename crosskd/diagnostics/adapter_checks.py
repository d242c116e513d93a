"""The checks that `crosskd.testing.check_adapter` runs: one function each, named as reports name them.

A check yields what it finds wrong, and raises `Skipped` where it can't be run.
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
from crosskd.adapters.base import Adapter, AdapterSpec, Batch, Head, Objects, RegionHead
from crosskd.diagnostics._objects import counts_of, overlaps, rows_of_images
from crosskd.distiller import Distiller
from crosskd.methods import CrossKD, Method
from crosskd.predictions import Assignment, Predictions
from crosskd.proof import prove_student, prove_teacher, same_random_numbers
from crosskd.step import Trace, run_head, space
from crosskd.towers import Tapped, TapPoint, Tower

__all__ = ["CHECKS", "Bench", "Finding", "Skipped", "Variation", "seeded"]

Variation = Callable[[Any, Any], tuple[Any, Any]]
"""Makes another batch of images and targets."""

_COMPARED = {"kd_cls": "logits", "kd_reg": "regression", "kd_quality": "quality"}
"""Which of the predictions a distillation loss compares."""

# Numbers that are calculated twice by the same operators differ by no more than this, relatively.
_ROUNDING, _GRADIENT_ROUNDING, _DEVICE_ROUNDING = 1e-5, 1e-3, 1e-2
# What free predictions must reach, and at how many of the positive anchors: not at all of them, for an
# assignment may follow the predictions, and give an anchor another object at the last moment.
_OVERLAP, _SHARE = 0.9, 0.75
# Steps of Adam, in logits and in a typical object's side.
_LOGIT_STEP, _BOX_STEP, _NUDGE, _FLATTEST = 0.2, 0.05, 1e-2, 1e-3
_SET = "its rows are a set of queries, which no method compares row by row"
# Of an object's side: proposals that far off are still that object's.
_OFF = 0.15


class Finding(NamedTuple):
    """Something that is wrong.

    Attributes:
        found: what was found.
        expected: what should have been.
        cause: what usually causes it.
    """

    found: str
    expected: str
    cause: str


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
        eval."""
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
            anchors, feed = None, maps
            if not isinstance(head, RegionHead):
                anchors = head.anchors(batch, maps)
            else:
                before = passes[-1]
                anchors = (
                    regions[place] if regions else head.regions(before.predictions, before.anchors, batch)
                )
                feed = [head.pool(maps, anchors, batch)]
            run = run_head(head, [level.clone() for level in feed], range(len(feed)))
            passes.append(Pass(head, feed, run.predictions.detach(), anchors))
            if batch.targets is not None:  # regions are asked for after the losses, as in training
                head.losses(passes[-1].predictions, anchors, batch)
    return passes


# -- comparing and reporting -----------------------------------------------------------------------


def numbers(predictions: Predictions) -> list[Tensor]:
    """Logits, regression and, where there is one, quality."""
    every = (predictions.logits, predictions.regression, predictions.quality)
    return [part for part in every if part is not None]


def alike(theirs: Sequence[Tensor], ours: Sequence[Tensor], tolerance: float = _ROUNDING) -> bool:
    """Whether two lists of tensors differ by no more than a share of the largest number of each."""
    if [t.shape for t in theirs] != [t.shape for t in ours]:
        return False
    for a, b in zip(theirs, ours, strict=True):
        first, second = a.detach().double(), b.detach().double().to(a.device)
        largest = first.abs().max().clamp(min=1e-12) if a.numel() else first.new_zeros(())
        if a.numel() and not bool((first - second).abs().max() <= tolerance * largest):
            return False
    return True


def difference(theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> str:
    """How two lists of tensors differ, in words."""
    shapes = [[tuple(t.shape) for t in side] for side in (theirs, ours)]
    if shapes[0] != shapes[1]:
        return f"shapes {shapes[0]} and {shapes[1]}"
    largest = max(float((a - b).abs().max()) for a, b in zip(theirs, ours, strict=True) if a.numel())
    return f"they differ by up to {largest:.3g}"


def some(names: Sequence[str]) -> str:
    """A few of some names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def of_head(head: Head, findings: Iterable[Finding]) -> Iterator[Finding]:
    """Findings about one head, with its name in front where it has one."""
    for finding in findings:
        yield finding._replace(found=f"{head.name}: {finding.found}") if head.name else finding


def backward(losses: Iterable[Tensor]) -> None:
    """Back-propagates the sum of the losses that have a gradient; the graph stays."""
    learning = [loss.float() for loss in losses if loss.requires_grad]
    if learning:
        torch.autograd.backward(torch.stack(learning).sum(), retain_graph=True)


# -- what an adapter has, and what it says of a detector -------------------------------------------


def construction(bench: Bench) -> Iterator[Finding]:
    """The specs make adapters of both detectors, and the pair can be distilled."""
    sides = ("teacher", bench.teacher_adapter, bench.teacher), ("student", bench.adapter, bench.student)
    for side, spec, detector in sides:
        adapter = spec(copy.deepcopy(detector))
        if not isinstance(adapter, Adapter):
            yield Finding(
                f"{side}: the spec makes a {type(adapter).__name__} of a {type(detector).__name__}",
                "a crosskd.adapters.Adapter",
                "it was given as an object instead of a class or a function of the detector",
            )
            return
        missing = [
            f"{head.name or 'head'}.{name}"
            for head in adapter.heads
            for name in ("num_classes", "branches")
            if not hasattr(head, name)
        ]
        if missing:
            yield Finding(
                f"{side}: there is no {some(missing)}", "all attributes of a Head", "it was left out"
            )
            return
    bench.distiller()


def structure(bench: Bench) -> Iterator[Finding]:
    """Classes, strides, levels, branches, towers and anchors fit each other and the feature maps."""
    for side, adapter, batch in bench.sides():
        with torch.no_grad():
            maps = adapter.maps(batch.pixels)
        wrong = _level_findings(adapter, maps, batch.size)
        for head in adapter.heads:
            if not isinstance(head, RegionHead):
                wrong += of_head(head, _tower_findings(head, head.feed(maps)))
        if not wrong:  # else the heads could not be run on these
            for each in run_heads(adapter, batch):
                wrong += of_head(each.head, _head_findings(each, batch))
        for finding in wrong:
            yield finding._replace(found=f"{side}: {finding.found}")


def _level_findings(adapter: Adapter, maps: Sequence[Tensor], size: tuple[int, int]) -> list[Finding]:
    wrong = []
    shapes = [tuple(level.shape[2:]) for level in maps]
    areas = [math.prod(shape) for shape in shapes]
    if areas != sorted(areas, reverse=True):
        wrong.append(
            Finding(
                f"the levels are {shapes}, as (height, width)",
                "the finest level first",
                "maps() gives the levels in another order",
            )
        )
    for name, given in (("strides", adapter.strides), ("widths", adapter.widths)):
        if given is not None and len(given) != len(maps):
            found = f"{name} are of {len(given)} levels and maps() gives {len(maps)}"
            wrong.append(Finding(found, f"{name} of each level", "one of them leaves a level out"))
    if wrong or (adapter.heads and adapter.heads[0].branches[0].towers[0].channels_last):
        return wrong
    for level, feature_map in enumerate(maps):
        if adapter.widths is not None and feature_map.shape[1] != adapter.widths[level]:
            found = (
                f"widths says {adapter.widths[level]} for level {level}, whose map has {feature_map.shape[1]}"
            )
            wrong.append(Finding(found, "the map's channels", "they are those of another layer"))
        if adapter.strides is None or len(shapes[level]) != 2:
            continue
        expected = tuple(side / adapter.strides[level] for side in size)
        if any(abs(a - b) > 1 for a, b in zip(shapes[level], expected, strict=True)):
            wrong.append(
                Finding(
                    f"strides says {adapter.strides[level]:g} for level {level}, whose map is "
                    f"{shapes[level]} for pixels of {size}",
                    f"a map of about {tuple(math.ceil(number) for number in expected)}",
                    "maps() and strides order the levels differently (finest first in both), or the strides "
                    "are those of another backbone",
                )
            )
    return wrong


def _tower_findings(head: Head, feed: Sequence[Tensor]) -> Iterator[Finding]:
    names = [branch.name for branch in head.branches]
    if len(set(names)) < len(names):
        yield Finding(f"the branches are {names}", "each name once", "a branch was added twice")
    for branch in head.branches:
        if len(branch.towers) not in (1, len(feed)):
            yield Finding(
                f"the {branch.name} branch has {len(branch.towers)} towers for {len(feed)} levels",
                "one tower for all levels, or one for each",
                "a level's tower was left out",
            )
            continue
        for level, features in enumerate(feed):
            tower = branch.tower(level)
            width = features.shape[-1 if tower.channels_last else 1]
            if width != tower.width_in:
                yield Finding(
                    f"the {tower.name} takes {tower.width_in} channels, the map of level {level} has {width}",
                    "the same width",
                    "the tower lacks its first layers, or the levels stand in another order than the towers",
                )


def _head_findings(run: Pass, batch: Batch) -> Iterator[Finding]:
    """What is wrong with a head's predictions and what they stand at."""
    head, predictions = run.head, run.predictions
    batch_size, rows, classes = predictions.logits.shape
    facts = {
        "num_classes": (head.num_classes, classes),
        "background": (head.background, predictions.background),
        "bins": (head.bins, predictions.regression.shape[3] if _is_distribution(predictions) else 1),
    }
    for name, (said, found) in facts.items():
        if said != found:
            yield Finding(
                f"{name} says {said}, the predictions have {found}",
                "the same",
                "one counts the background or the anchors of a location; or predict() leaves it out",
            )
    if isinstance(head, RegionHead):
        counts, pooled = list(head.counts(run.anchors)), len(run.feed[0])
        if len(counts) != len(batch.pixels) or {pooled, rows} != {sum(counts)}:
            yield Finding(
                f"counts() says {counts} regions for {len(batch.pixels)} images, pool() gives {pooled} and "
                f"predict() {rows}",
                "the regions of all images, one image behind the other",
                "pool() leaves regions out, or adds some",
            )
        yield from _tower_findings(head, run.feed)
        return
    last = head.branches[0].towers[0].channels_last
    locations = [math.prod(space(level, channels_last=last)) for level in run.feed]
    per_level = list(run.anchors.per_level)
    uneven = [n for n, each in zip(per_level, locations, strict=False) if head.rows == "grid" and n % each]
    boxes = rows if run.anchors.boxes is None else len(run.anchors.boxes)
    if len(per_level) != len(locations) or uneven or {sum(per_level), boxes} != {rows}:
        yield Finding(
            f"anchors() has {per_level} anchors per level and {boxes} boxes; the levels have {locations} "
            f"locations and {rows} rows of predictions",
            "one anchor for each row of predictions, as many at each location of a level",
            "predict() flattens other dimensions than those of the locations, or anchors are of other levels",
        )
    if batch_size != len(batch.pixels):
        found = f"{batch_size} images in the predictions, {len(batch.pixels)} in the batch"
        yield Finding(found, "the same", "predict() flattens the batch")


def _is_distribution(predictions: Predictions) -> bool:
    return predictions.regression.ndim == 4 and not predictions.box_per_class


# -- the head, split and put together again --------------------------------------------------------


def same_path(bench: Bench) -> Iterator[Finding]:
    """The teacher's pieces predict what its own forward does, layer by layer."""
    (_, teacher, batch), _ = bench.sides()
    try:
        prove_teacher(teacher, batch)
    except ValueError as error:
        yield Finding(
            str(error),
            "the pieces compute what the detector does",
            "a layer of the detector's own forward is left out, or the levels or anchors are in another "
            "order",
        )


@torch.no_grad()
def taps_and_tail(bench: Bench) -> Iterator[Finding]:
    """Features tapped after each block, and the rest run on them, are the teacher's own predictions."""
    queries = [each.head for each in bench.twins()[0] if each.head.rows == "queries"]
    if queries:
        raise Skipped(_SET)
    for own, twin in zip(*bench.twins(), strict=True):
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


def _split_findings(own: Pass, twin: Head, level: int, place: int, point: TapPoint) -> Iterator[Finding]:
    """What is wrong where one branch of a twin is tapped, and the rest run by the teacher's head."""
    head, branch = own.head, own.head.branches[place]
    whole, outputs = _outputs(head, own.feed[level], level)
    run = run_head(twin, [own.feed[level].clone()], [level], {twin.branches[place].name: {"": point}})
    where = f"{branch.name} branch, level {level}, position {point.position} ({point.tap})"
    try:
        features = run.taps[""][twin.branches[place].name][0].read()
    except ValueError as error:
        yield Finding(
            str(error),
            "features that stay as they were tapped",
            "a block or predict() works in place on what it is given (relu_(), inplace=True, +=) in a way "
            "that its layers don't show; the student's features would change after they were handed over",
        )
        return
    tower, rest = branch.tower(level), features
    if tower.channels_last:
        rest = rest.movedim(1, -1)
    if point.tap == "pre" and point.position:
        rest = tower.blocks[point.position - 1].activate(rest)
    # Behind "post" Tower.tail would activate again, which only some activations can be without effect.
    for block in tower.blocks[point.position :]:
        rest = block(rest)
    expected = "exactly the teacher's own numbers, with its copy as the student"
    if not alike([outputs[branch.name]], [rest]):
        yield Finding(
            f"{where}: the blocks behind the split make another tower output: "
            f"{difference([outputs[branch.name]], [rest])}",
            expected,
            "blocks in another order than the tower runs them, an activation that belongs to two blocks, or "
            "a tap overwritten in place",
        )
        return
    predictions = head.predict(level, {**_cloned(outputs), branch.name: rest.clone()})
    if not alike(numbers(whole), numbers(predictions)):
        yield Finding(
            f"{where}: predict() gives other predictions for the same tower output: "
            f"{difference(numbers(whole), numbers(predictions))}",
            expected,
            "predict() reads something else than the towers' outputs, or keeps something from call to call",
        )


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


def gradients_through_the_tail(bench: Bench) -> Iterator[Finding]:
    """Each distillation loss has a gradient at the student's features in every branch that it depends on."""
    distiller, trace = bench.step()
    if "towers" not in bench.method.requires:
        raise Skipped(f"{type(bench.method).__name__} taps no features")
    passes = {each.head.name: each for each in bench.twins()[0]}
    for name, step in trace.steps.items():
        depends = _dependencies(passes[step.teacher.head.name])
        taps = {b: [tap.read() for tap in levels] for b, levels in step.student.taps.items()}
        for key, loss in trace.losses[name].items():
            for branch in sorted(depends.get(_COMPARED.get(key, ""), set()) & taps.keys()):
                yield from of_head(step.teacher.head, _lost(key, loss, branch, taps[branch]))
    for head in distiller.student_adapter.heads:
        if isinstance(head, RegionHead):
            pooled = head.pool(
                trace.student.maps, trace.student.heads[head.name].anchors, trace.student.batch
            )
            if not any(gradient is not None for gradient in _gradients(pooled.sum(), trace.student.maps)):
                finding = Finding(
                    "what pool() makes for the student has no gradient at the student's own maps",
                    "each detector's features pooled from its own maps, at the student's regions",
                    "pool() pools from the teacher's maps for both, keeps maps from call to call, or "
                    "detaches",
                )
                yield from of_head(head, [finding])


def _lost(key: str, loss: Tensor, branch: str, features: Sequence[Tensor]) -> Iterator[Finding]:
    """The levels at whose features a loss has no gradient."""
    gradients = _gradients(loss, features)
    lost = [level for level, gradient in enumerate(gradients) if gradient is None]
    reached = any(gradient is not None and bool(gradient.any()) for gradient in gradients)
    if lost or not reached:
        levels = f"at level {', '.join(map(str, lost))}" if lost and reached else "at any level"
        yield Finding(
            f"{key} has no gradient at the student's features of the {branch} branch {levels}",
            "a gradient at every level: the teacher's tail is frozen, but the student learns through it",
            "the tail is detached: detach(), .data, torch.no_grad() or a copy by numpy in predict(), "
            "decode() or a tower",
        )


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


def loss_findings(bench: Bench, batch: tuple[Any, Any]) -> Iterator[Finding]:
    """What differs between the student's own losses and the distiller's; the losses must be finite."""
    plain = plain_losses(bench.of_student(), *batch)
    distiller, trace = bench.step(batch)
    own = trace.own_losses
    if plain is not None and plain.keys() != own.keys():
        yield Finding(
            f"the student's own losses are {sorted(own)} through the adapter and {sorted(plain)} alone",
            "the same names",
            "losses() leaves one out or names it otherwise",
        )
    for name in [] if plain is None else sorted(plain.keys() & own.keys()):
        if not alike([plain[name]], [own[name]]):
            yield Finding(
                f"{name} is {float(own[name].detach()):.6g} through the adapter and "
                f"{float(plain[name].detach()):.6g} alone",
                "the same loss: distillation adds losses, it changes none",
                "predictions, anchors or levels stand in another order than the detector's losses want; "
                "prepare() preprocesses otherwise; a branch is fed something else than in the detector's own "
                "forward; or random numbers are drawn that the detector doesn't draw, or in another order",
            )
    yield from finite_findings(distiller, trace)


def finite_findings(distiller: Distiller, trace: Trace) -> Iterator[Finding]:
    """Losses or gradients of a step that are not finite."""
    losses = distiller.named_losses(trace)
    infinite = [name for name, loss in losses.items() if not bool(loss.isfinite())]
    if infinite:
        yield Finding(
            f"not finite: {', '.join(infinite)}",
            "finite losses",
            "a division by a number of positives that may be 0: the assignment's normalizer must be at least "
            "1",
        )
        return
    backward(losses.values())
    wrong = [
        name
        for name, parameter in distiller.student.named_parameters()
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
    ]
    if wrong:
        yield Finding(
            f"gradients that are not finite at {some(wrong)}",
            "finite gradients",
            "a square root, logarithm or division at 0 in decode() or losses()",
        )


def student_losses(bench: Bench) -> Iterator[Finding]:
    """The student's own losses are those of plain training."""
    try:
        findings = list(loss_findings(bench, bench.batch))
    except Skipped as reason:
        raise ValueError(f"{reason}: hand in a batch that it can train on") from reason
    yield from findings
    if not findings:
        try:
            prove_student(bench.of_student(), *bench.batch)
        except ValueError as error:
            yield Finding(
                str(error), "the same layer outputs", "a layer is left out, or run in another order"
            )


def label_assignment(bench: Bench) -> Iterator[Finding]:
    """The assignment has the predictions' shape, and assign() gives the one that the losses are made with."""
    _, (_, adapter, batch) = bench.sides()
    for each in run_heads(adapter, batch):
        with torch.no_grad(), seeded(adapter.detector):
            _, assignment = each.head.losses(each.predictions, each.anchors, batch)
        wrong = list(_assignment_findings(assignment, tuple(each.predictions.logits.shape[:2])))
        yield from of_head(each.head, wrong)
        overridden = type(each.head).assign is not Head.assign
        if wrong or not overridden or batch.objects is None:
            continue
        with torch.no_grad(), seeded(adapter.detector):
            other = each.head.assign(each.predictions, each.anchors, replace(batch, targets=None))
        same = torch.equal(assignment.positive, other.positive)
        if not same or not alike([assignment.normalizer.double()], [other.normalizer.double()]):
            counts = [(int(a.positive.sum()), float(a.normalizer)) for a in (assignment, other)]
            finding = Finding(
                "the losses' assignment and that of assign() differ: (positives, normalizer) are "
                f"{counts[0]} and {counts[1]}",
                "the same assignment for the same predictions and objects",
                "batch.objects are other boxes or labels than the targets, or assign() leaves a step out",
            )
            yield from of_head(each.head, [finding])


def _assignment_findings(assignment: Assignment, shape: tuple[int, ...]) -> Iterator[Finding]:
    order = "levels, images or anchors stand in another order than in the predictions"
    positive, weights, normalizer = assignment.positive, assignment.label_weights, assignment.normalizer
    if tuple(positive.shape) != shape or positive.dtype != torch.bool:
        found = f"assignment.positive is {positive.dtype} {tuple(positive.shape)}"
        yield Finding(found, f"torch.bool {shape}, (batch, anchors)", order)
    if weights is not None and tuple(weights.shape) != shape:
        found = f"assignment.label_weights is {tuple(weights.shape)}"
        yield Finding(found, f"{shape}, (batch, anchors), or None", order)
    if normalizer.ndim or not bool(normalizer.isfinite()) or float(normalizer) <= 0:
        yield Finding(
            f"assignment.normalizer is {normalizer.tolist()}",
            "one finite number above 0",
            "it leaves out images without objects, which are to count as one positive",
        )


def student_gradients(bench: Bench) -> Iterator[Finding]:
    """Gradients reach what plain training reaches, and the distillation's the blocks before the split."""
    alone = bench.of_student()
    plain = plain_losses(alone, *bench.batch)
    distiller, trace = bench.step()
    if plain is not None:
        backward(plain.values())
        backward(trace.own_losses.values())
        expected, ours = _gradients_of(alone.detector), _gradients_of(distiller.student)
        lost = [name for name in expected if name not in ours]
        if lost:
            yield Finding(
                f"the student's own losses have no gradient at {some(lost)}, which plain training reaches",
                "a gradient wherever plain training has one",
                "features, towers or predictions are detached, or another copy of a module is run",
            )
        others = [
            n
            for n in expected.keys() & ours.keys()
            if not alike([expected[n]], [ours[n]], _GRADIENT_ROUNDING)
        ]
        if others:
            yield Finding(
                "the gradients of the student's own losses differ from plain training's at "
                f"{some(sorted(others))}",
                "the same gradients",
                "part of the student's graph is detached, or scaled on its way",
            )
    distiller.student.zero_grad()
    backward([loss for losses in trace.losses.values() for loss in losses.values()])
    for name, step in trace.steps.items():
        method = distiller.methods[name]
        if isinstance(method, CrossKD):
            yield from of_head(step.student.head, _tower_gradient_findings(step.student.head, method))


def _gradients_of(detector: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in detector.named_parameters() if p.grad is not None and bool(p.grad.any())}


def _tower_gradient_findings(head: Head, method: CrossKD) -> Iterator[Finding]:
    """The distillation's gradient reaches every block before the split and none behind it."""
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
        yield Finding(
            f"the distillation's gradient does not reach what stands before the split: {some(missed)}",
            "a gradient in each of the student's blocks before the split",
            "the branches hold other modules than the student trains, or the teacher's tail is detached",
        )
    if strayed:
        yield Finding(
            f"the distillation's gradient reaches what stands behind the split: {some(strayed)}",
            "no gradient in the student's blocks behind the split",
            "the cross-head predictions are made by the student's blocks instead of the teacher's",
        )


def teacher_untouched(bench: Bench) -> Iterator[Finding]:
    """Neither the teacher that was handed in nor its frozen copy is changed, or runs in train mode."""
    teacher = copy.deepcopy(bench.teacher)
    before, ran = state_of(teacher), set[str]()
    distiller = bench.distiller(teacher)

    def record(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, _: ran.add(name) if module.training else None

    for name, module in distiller.teacher.named_modules():
        if not any(True for _ in module.children()):
            module.register_forward_pre_hook(record(name))
    with seeded(bench.student):
        backward(distiller.named_losses(distiller.trace(*bench.batch)).values())
    if ran or distiller.teacher.training:
        yield Finding(
            f"the teacher in train mode: {some(sorted(ran))} ran in it"
            if ran
            else "the teacher left in train mode",
            "the teacher in eval mode from beginning to end: in train mode its batch norm would change",
            "the adapter calls detector.train(): modes are not its business",
        )
    changed = changes(before, state_of(teacher))
    if changed:
        yield Finding(
            f"the teacher has changed: {some(changed)}",
            "each parameter, buffer, flag and mode as it was",
            "the adapter runs the teacher in train mode, works in place on its weights, or sets something of "
            "it",
        )
    parameters = distiller.teacher.named_parameters()
    learning = [name for name, p in parameters if p.requires_grad or p.grad is not None]
    if learning:
        found = f"the frozen teacher has parameters with a gradient: {some(learning)}"
        yield Finding(found, "none", "the adapter calls requires_grad_()")


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
def rows_permuted(bench: Bench) -> Iterator[Finding]:
    """The boxes of a grid depend on the places of its rows; where they don't, the rows are queries."""
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
        if len(order) > 1 and alike([boxes], [each.head.decode(permuted, each.anchors)]):
            finding = Finding(
                'rows is "grid", but of permuted predictions decode() makes the same boxes, permuted',
                'rows = "queries" for a set of queries, whose rows have no place',
                "the head predicts a set, which methods must not compare row by row; or predict() gives "
                "boxes that are decoded already, which is for decode() to do",
            )
            yield from of_head(each.head, [finding])


def decoding_and_classes(bench: Bench) -> Iterator[Finding]:
    """Predictions that minimise the student's own losses decode to the objects' boxes, of their labels."""
    _, (_, adapter, batch) = bench.sides()
    if batch.objects is None:
        raise Skipped("the adapter's batches hold no objects")
    if not any(len(of_image.labels) for of_image in batch.objects):
        raise Skipped("the targets hold no object")
    with torch.no_grad():
        maps = adapter.maps(batch.pixels)
    fit: _Fit | None = None
    for head in adapter.heads:
        if not head.decodes:
            raise Skipped("the adapter decodes no boxes")
        objects = batch.objects
        if head is not adapter.heads[-1] and head.num_classes == 1:
            objects = tuple(Objects(o.boxes, torch.zeros_like(o.labels)) for o in objects)
        with torch.no_grad(), seeded(adapter.detector):
            anchors, feed = None, list(maps)
            if isinstance(head, RegionHead):
                assert fit is not None
                anchors = fit.regions_of(head)
                feed = [head.pool(maps, anchors, batch)]
            else:
                anchors = head.anchors(batch, maps)
            start = run_head(head, feed, range(len(feed))).predictions
        with seeded(adapter.detector):
            fit = _Fit(head, batch, anchors, objects, start)
            fit.run(bench.steps)
        yield from of_head(head, fit.findings())


class _Fit:
    """Predictions that are free numbers instead of a network's outputs, and what a head's own losses make of
    them.

    Minimising the losses over them leads to the objects' own boxes and labels, so that decoding and the order
    of classes can be read off the result, for any head and without a trained network.

    Args:
        head: whose losses and decoding are meant.
        batch: with objects.
        anchors: where the predictions stand, or the regions that they are for.
        objects: of each image, labelled as this head does.
        start: predictions of the detector, for their shapes and as one of the points to start from.
    """

    def __init__(
        self, head: Head, batch: Batch, anchors: Any, objects: Sequence[Objects], start: Predictions
    ) -> None:
        self.head, self.batch, self.anchors, self.objects = head, batch, anchors, objects
        self.counts = counts_of(head, anchors)
        # Losses of boxes far apart may have no gradient. Zeros are an anchor itself where anchors are shifted
        # and stretched, and no box at all where distances are predicted, for which ones are a small box.
        starts = [torch.zeros_like(start.regression), torch.ones_like(start.regression), start.regression]
        candidates = [replace(start, regression=regression) for regression in starts]
        self.predictions = max(candidates, key=self._overlap).detach()
        self.assignment: Assignment | None = None

    def run(self, steps: int) -> None:
        """Minimises the losses by Adam."""
        start, scale = self.predictions, self._scale()
        logits = torch.full_like(start.logits, -2.0).requires_grad_()
        offset = torch.zeros_like(start.regression).requires_grad_()
        quality = None if start.quality is None else torch.zeros_like(start.quality).requires_grad_()
        free = [logits, offset, *([] if quality is None else [quality])]
        groups = [{"params": [leaf], "lr": _BOX_STEP if leaf is offset else _LOGIT_STEP} for leaf in free]
        # Losses may weigh an object next to nothing, but its numbers are to arrive as well.
        optimizer = torch.optim.Adam(groups, eps=1e-12)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            regression = start.regression + scale * offset
            predictions = replace(start, logits=logits, regression=regression, quality=quality)
            losses, self.assignment = self.head.losses(predictions, self.anchors, self.batch)
            total = torch.stack([loss for loss in losses.values() if loss.requires_grad]).sum()
            for leaf, gradient in zip(free, torch.autograd.grad(total, free, allow_unused=True), strict=True):
                leaf.grad = gradient
            optimizer.step()
            schedule.step()
            self.predictions = predictions.detach()

    def regions_of(self, head: RegionHead) -> Any:
        """The regions that follow, somewhat off: proposals that are the objects leave nothing to decode."""
        offset = torch.empty_like(self.predictions.regression).uniform_(-_OFF, _OFF)
        moved = replace(self.predictions, regression=self.predictions.regression + self._scale() * offset)
        self.head.losses(moved, self.anchors, self.batch)  # regions are asked for after them
        return head.regions(moved, self.anchors, self.batch)

    def _decoded(self, predictions: Predictions) -> tuple[Tensor, ...]:
        return rows_of_images(self.head.decode(predictions, self.anchors), self.counts)

    def _overlap(self, predictions: Predictions) -> float:
        """How much predicted boxes overlap the objects."""
        pairs = zip(self._decoded(predictions), self.objects, strict=True)
        return sum(float(overlaps(boxes.reshape(-1, 4), o.boxes).sum()) for boxes, o in pairs)

    def _scale(self) -> Tensor | float:
        """By how much each number of the regression must change for its box to change by an object's size.

        A head may predict in pixels, strides, anchor sizes or their logarithms; so steps of one size suit
        all.
        """
        start = self.predictions
        if _is_distribution(start):
            return _LOGIT_STEP / _BOX_STEP  # the logits of a distribution
        boxes = torch.cat([of_image.boxes for of_image in self.objects])
        side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1).mean().to(start.regression)
        at_start, slopes = self.head.decode(start, self.anchors), []
        for index in range(4):
            nudged = start.regression.clone()
            nudged[..., index] += _NUDGE
            moved = self.head.decode(replace(start, regression=nudged), self.anchors) - at_start
            slopes.append(moved.abs().amax(dim=-1) / _NUDGE)  # (batch, anchors)
        return side / torch.stack(slopes, dim=-1).clamp(min=_FLATTEST).to(start.regression)

    def findings(self) -> Iterator[Finding]:
        """What is wrong with boxes and classes at the positive anchors."""
        assert self.assignment is not None
        whole = self.predictions.logits, self.assignment.positive
        columns = [rows_of_images(rows, self.counts) for rows in whole]
        seen = []
        for boxes, logits, positive, of_image in zip(
            self._decoded(self.predictions), *columns, self.objects, strict=True
        ):
            if bool(positive.any()) and len(of_image.labels):
                seen.append(self._compared(boxes[positive], logits[positive], of_image))
        if not seen:
            yield Finding(
                "no anchor is responsible for any object of the targets",
                "at least one",
                "assignment.positive is not that of the losses, or the objects are too small for this "
                "detector",
            )
            return
        best, right, shifts, own = (torch.cat(column) for column in zip(*seen, strict=True))
        smallest = "where the student's own losses are smallest"
        missed = int((best < _OVERLAP).sum())
        if missed > (1 - _SHARE) * len(best):
            yield Finding(
                f"decoding: {smallest}, the decoded boxes of {missed} of {len(best)} positive anchors "
                f"overlap no object by an IoU of {_OVERLAP} (median of the best {float(best.median()):.2f})",
                f"an IoU of at least {_OVERLAP} at three of four",
                "decode() takes the four numbers in another order or scale than the losses do, anchors stand "
                "in another order than the predictions, positive is not the losses' own, or batch.objects "
                "are not in pixels of the batch; or a box takes long to fit, and steps= should be more",
            )
        # Only where its box is right is it clear whose label an anchor was to learn.
        right, shifts, own = (column[best >= _OVERLAP] for column in (right, shifts, own))
        wrong = int((~right).sum())
        if wrong > (1 - _SHARE) * len(right):
            yield Finding(
                f"classes: {smallest}, the largest logit of {wrong} of {len(right)} positive anchors is not "
                f"that of the object's label (mostly of label {int(shifts[~right].mode().values):+d})",
                "the object's label: logit 0 belongs to label 0",
                "the logits stand in another order than the labels of batch.objects, a background class "
                "comes first, or labels are counted from 1",
            )
        wrong = int((own < _OVERLAP).sum())
        if wrong > (1 - _SHARE) * len(own):
            yield Finding(
                f"classes: {smallest}, it is another class's box than that of the object's label which fits "
                f"at {wrong} of {len(own)} positive anchors",
                "the box of the object's label",
                "predict() or decode() gives the boxes' classes in another order than the labels'",
            )

    def _compared(self, boxes: Tensor, logits: Tensor, objects: Objects) -> tuple[Tensor, ...]:
        """(best overlap, whether the label is right, by how much it is off, the label's box's overlap)."""
        labels = objects.labels
        boxes = boxes if boxes.ndim == 3 else boxes[:, None]  # (positives, classes, 4)
        by_class = overlaps(boxes.flatten(0, 1), objects.boxes).view(*boxes.shape[:2], -1)
        overlap = by_class.amax(dim=1)  # (positives, objects)
        found = logits.argmax(dim=-1)
        fitting = (overlap >= _OVERLAP) & (found[:, None] == labels)
        shifts = (found - labels[overlap.argmax(dim=1)]) % logits.shape[-1]
        of_labels = labels if self.predictions.box_per_class else torch.zeros_like(labels)
        own = by_class[:, of_labels, torch.arange(len(labels), device=labels.device)]
        return overlap.amax(dim=1), fitting.any(dim=1), shifts, own.amax(dim=1)


# -- other batches, types and devices --------------------------------------------------------------


def detections(bench: Bench) -> Iterator[Finding]:
    """In eval mode the student detects, and stays as it is."""
    distiller = bench.distiller().eval()
    before = state_of(distiller.student)
    with torch.no_grad():
        distiller(bench.batch[0])
    changed = changes(before, state_of(distiller.student))
    if changed:
        found = f"detect() has changed the student: {some(changed)}"
        yield Finding(found, "the student as it was", "detect() sets the mode or works in place")


def unlabelled_images(bench: Bench) -> Iterator[Finding]:
    """Without targets the distillation losses stand alone."""
    distiller, trace = bench.step((bench.batch[0], None))
    if trace.own_losses:
        yield Finding(
            f"losses of the student's own without targets: {sorted(trace.own_losses)}",
            "distillation losses alone",
            "prepare() makes targets where none were given",
        )
    yield from finite_findings(distiller, trace)


def one_image(bench: Bench) -> Iterator[Finding]:
    """A batch of one image."""
    yield from loss_findings(bench, bench.varied("one image", _first_image))


def no_objects(bench: Bench) -> Iterator[Finding]:
    """Images whose targets hold no object."""
    yield from loss_findings(bench, bench.varied("no objects", _without_objects))


def odd_image_size(bench: Bench) -> Iterator[Finding]:
    """Images whose sides are multiples of nothing."""
    images, targets = bench.varied("odd image size", _cropped)
    if targets is not None:
        yield from loss_findings(bench, (images, targets))
    else:
        yield from finite_findings(*bench.step((images, None)))


def autocast(bench: Bench) -> Iterator[Finding]:
    """Under bfloat16 autocast losses are finite, and the distillation's in float32."""
    device = next(bench.student.parameters()).device.type
    if device not in ("cpu", "cuda"):
        raise Skipped(f"nothing is known of autocast on {device}")
    with torch.autocast(device, dtype=torch.bfloat16):
        plain_losses(bench.of_student(), *bench.batch)
        distiller, trace = bench.step()
    yield from _type_findings(trace)
    yield from finite_findings(distiller, trace)


def float64(bench: Bench) -> Iterator[Finding]:
    """Detectors and images in float64, on the CPU."""
    if next(bench.student.parameters()).device.type != "cpu":
        raise Skipped("the detectors are not on the CPU")
    wide = bench.converted(dtype=torch.float64)
    plain_losses(wide.of_student(), *wide.batch)
    distiller, trace = wide.step()
    yield from _type_findings(trace)
    yield from finite_findings(distiller, trace)


def other_device(bench: Bench) -> Iterator[Finding]:
    """The same losses on a CUDA device, or on the CPU where the detectors are on one."""
    here = next(bench.student.parameters()).device
    there = _elsewhere(here)
    if there is None:
        raise Skipped("there is no CUDA device here")
    expected = (step := bench.step())[0].named_losses(step[1])
    distiller, trace = bench.converted(device=there).step()
    losses = distiller.named_losses(trace)
    for name, loss in expected.items():
        if not alike([loss], [losses[name]], _DEVICE_ROUNDING):
            yield Finding(
                f"{name} is {loss.item():.6g} on {here.type} and {losses[name].item():.6g} on {there.type}",
                "the same losses on every device",
                "something is read before it has been calculated, or kept on one device",
            )
    yield from finite_findings(distiller, trace)


def _elsewhere(device: torch.device) -> torch.device | None:
    """The CPU from anywhere else, a CUDA device from the CPU, if there is one."""
    if device.type != "cpu":
        return torch.device("cpu")
    return torch.device("cuda") if torch.cuda.is_available() else None


def _type_findings(trace: Trace) -> Iterator[Finding]:
    """Losses of a smaller type than float32, or than the head's own predictions."""
    for name, losses in trace.losses.items():
        for key in losses.keys() & _COMPARED.keys():
            step = trace.steps[name]
            expected = compute_dtype(getattr(step.student.predictions, _COMPARED[key]))
            if losses[key].dtype != expected:
                finding = Finding(
                    f"{key} is {losses[key].dtype}, of predictions that are {expected} or narrower",
                    f"{expected}",
                    "decode() casts to a type of its own",
                )
                yield from of_head(step.student.head, [finding])


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
    """Images without their last rows and columns; without targets where nothing tells how to cut those."""
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


CHECKS: dict[str, Callable[[Bench], Iterable[Finding]]] = {
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
