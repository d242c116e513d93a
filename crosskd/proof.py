"""Holds the pieces that a step runs against the detector's own forward, once.

A detector is distilled piece by piece: maps, towers, predictors, losses. Whether the pieces are the detector
is not guessed from types and attributes but measured: the detector's own forward and its pieces run on the
same batch under the same random numbers, and what they compute must agree: the outputs of its layers, the
teacher's predictions, the student's own losses. Both detectors are left as they were.
"""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from crosskd._unchanged import unchanged
from crosskd.adapters.base import Adapter, Batch, RegionHead
from crosskd.pairing import Pair
from crosskd.predictions import Predictions, of_this_rank
from crosskd.running import run_region_heads, with_own_losses
from crosskd.step import DetectorTrace, run_head

__all__ = [
    "COARSE",
    "SUM",
    "TOLERANCE",
    "differ",
    "losses_of_pieces",
    "paired",
    "parting_layer",
    "prove_student",
    "prove_teacher",
    "prove_unlabelled",
    "proving",
    "same_random_numbers",
]

# The same operators on the same numbers; under autocast, or where the two run in another order, rounding.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
COARSE = 2e-2

SUM = "the sum of the losses"  # of a detector whose own forward names none

Outputs = dict[str, list[tuple[torch.dtype, Tensor]]]
"""The type and a few sums of what each layer of a detector gave, call by call, by its path."""


def prove_student(adapter: Adapter, images: Any, targets: Any) -> None:
    """Raises ``ValueError`` where the student's pieces compute other losses than its own forward.

    Args:
        adapter: the student's, whose detector is in train mode.
        images: as the student takes them.
        targets: likewise.
    """
    name = f"student: {type(adapter.detector).__name__}"
    with proving(adapter.detector) as own_outputs, _own_forward(name):
        given = adapter.own_losses(*_copied((images, targets)))
    with proving(adapter.detector) as outputs:
        pieces = losses_of_pieces(adapter, *_copied((images, targets)))
    _check_types(name, own_outputs, outputs)
    place = parting_layer(own_outputs, outputs)
    missed = _learned(adapter.detector, own_outputs.keys() - outputs.keys())
    if isinstance(given, Tensor):  # their sum
        own, pieces = {SUM: given}, {SUM: torch.stack([loss.sum() for loss in pieces.values()]).sum()}
    else:
        own = {} if given is None else dict(given)
    if given is not None and own.keys() != pieces.keys():
        extra = ", ".join(sorted(own.keys() ^ pieces.keys()))
        lost = f"alone it has the losses {sorted(own)}, its pieces {sorted(pieces)}: {extra} would be lost"
        raise ValueError(_message(name, place, lost))
    for key, loss in own.items():
        if not _alike(loss.detach(), pieces[key].detach()):
            values = f"{key} is {float(loss):.6g} alone and {float(pieces[key]):.6g} by its pieces"
            raise ValueError(_message(name, place, values, missed))
    if place is not None:  # in eval mode other numbers may be other detections, though losses are the same
        raise ValueError(_message(name, place, "its layers give other numbers"))


def prove_unlabelled(adapter: Adapter, batch: Batch) -> None:
    """Raises ``ValueError`` where the student's pieces predict something else than its own forward.

    For images without labels, on which it has no losses: as a teacher is proved, in eval mode.

    Args:
        adapter: the student's.
        batch: as the student takes it.
    """
    with unchanged(adapter.detector):
        adapter.detector.eval()
        prove_teacher(adapter, batch, "student")


def prove_teacher(adapter: Adapter, batch: Batch, side: str = "teacher") -> None:
    """Raises ``ValueError`` where the teacher's pieces predict something else than its own forward.

    Buffers that the teacher writes even in eval mode become the frozen copy's own, so that the user's teacher
    keeps its numbers.

    Args:
        adapter: the frozen teacher's.
        batch: as the teacher takes it.
        side: what messages call it.
    """
    name = f"{side}: {type(adapter.detector).__name__}"
    with (
        proving(adapter.detector) as own_outputs,
        _own_forward(name),
        _behind_predictors(adapter) as behind,
    ):
        own = adapter.own_outputs(batch)
    runs = []
    before = {id(buffer): buffer.clone() for buffer in adapter.detector.buffers()}
    with proving(adapter.detector) as outputs:
        maps = adapter.maps_of(batch)
        for head, given in zip(adapter.heads, own, strict=False):
            if isinstance(head, RegionHead):
                feed, levels = [head.pool(given.maps, given.regions, batch)], [0]
            else:
                feed, levels = maps, list(range(len(maps)))
            runs.append((head, given, run_head(head, feed, levels, batch=batch).predictions))
        written = {id(b) for b in adapter.detector.buffers() if not _same(b, before.get(id(b)))}
    _unshare(adapter.detector, written)
    _check_types(name, own_outputs, outputs)
    place = parting_layer(own_outputs, outputs)
    for head, given, predictions in runs:
        if given.predictions is None:
            continue
        for what, theirs, ours in paired(given.predictions, predictions):
            if not _alike(theirs, ours):
                which = f"the {head.name or 'head'}'s {what} differ"
                raise ValueError(_message(name, place, f"{which}: {_difference(theirs, ours)}"))
    if any(given.predictions is None for _, given, _ in runs):
        if place is not None:
            raise ValueError(_message(name, place, "its layers give other numbers"))
        _check_missed(name, adapter.detector, own_outputs.keys() - outputs.keys(), behind)


@contextmanager
def _behind_predictors(adapter: Adapter) -> Iterator[dict[str, str]]:
    """Records which layers are given what a predictor has made as it is: by their path, the predictor's."""
    predictors = {
        layer
        for head in adapter.heads
        for branch in head.branches
        for predictor in branch.predictors.values()
        for layer in predictor.modules()
    }
    found: dict[str, str] = {}
    made: list[tuple[ref[Tensor], str]] = []

    def record(path: str, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        for value in given:
            for earlier, predictor in made:
                if earlier() is value:
                    found[path] = predictor
        if module in predictors and isinstance(output, Tensor):
            made.append((ref(output), path))

    with _watched(_layers(adapter.detector), record):
        yield found


def _check_missed(who: str, detector: nn.Module, missed: Set[str], behind: Mapping[str, str]) -> None:
    """Refuses pieces that leave out a layer behind a predictor, and warns of others that they leave out.

    Args:
        who: the side and the detector's type.
        detector: whose own forward runs the layers.
        missed: the layers that no piece runs, by their paths.
        behind: from `_behind_predictors`.
    """
    learned = _learned(detector, missed)
    for path in learned:
        if path in behind:
            raise ValueError(
                f"{who}'s own forward runs {path} on what {behind[path]} predicts, and no piece does, so "
                "that other predictions would be compared: let generic()'s predict= run it, or pass "
                "prove=False if it is no part of the predictions"
            )
    if learned:
        warnings.warn(
            f"{who}'s own forward runs layers that no piece does: {_listed(learned)}. Right where they are "
            "no part of the predictions, as a mask head; what the predictions go through has to be run by "
            "generic()'s predict=",
            stacklevel=6,
        )


def _learned(detector: nn.Module, paths: Set[str]) -> list[str]:
    """Those of the layers at some paths that have parameters, in the detector's order."""
    modules = [(path, module) for path, module in detector.named_modules() if path in paths]
    return [path for path, module in modules if any(True for _ in module.parameters())]


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


def _unshare(frozen: nn.Module, written: set[int]) -> None:
    """Gives a frozen copy memory of its own for some buffers."""
    for module in frozen.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if id(buffer) in written:
                module._buffers[name] = buffer.clone()


def _same(buffer: Tensor, before: Tensor | None) -> bool:
    return before is not None and torch.equal(buffer, before)


def _check_types(who: str, own: Outputs, pieces: Outputs) -> None:
    """Raises ``ValueError`` at the first layer whose outputs are of another type, as under an autocast."""
    for path, outputs in own.items():
        for (own_type, _), (type_of_pieces, _) in zip(outputs, pieces.get(path, []), strict=False):
            if own_type != type_of_pieces:
                what = f"its layers run in {own_type} alone and in {type_of_pieces} by its pieces"
                raise ValueError(_message(who, path, what))


def losses_of_pieces(adapter: Adapter, images: Any, targets: Any) -> dict[str, Tensor]:
    """The student's own losses by its pieces, without a teacher.

    Args:
        adapter: the student's.
        images: as the student takes them.
        targets: likewise.
    """
    batch = adapter.prepare(images, targets)
    student = DetectorTrace(adapter, batch, adapter.maps_of(batch), {})
    head = adapter.heads[0]
    run = run_head(head, student.maps, range(len(student.maps)), batch=batch)
    student.heads[head.name] = with_own_losses(run, batch, student.maps)
    run_region_heads(Pair(adapter, adapter), None, student, {})
    return {name: loss for run in student.heads.values() for name, loss in run.losses.items()}


def parting_layer(own: Outputs, pieces: Outputs) -> str | None:
    """The path of the first layer whose outputs differ, in the order of the detector's own forward.

    Args:
        own: recorded in the detector's own forward.
        pieces: recorded while its pieces ran.

    Returns:
        ``None`` where all that a layer gave in one of the two it gave in the other, too. Layers that the
        pieces don't call are passed over: they may be behind the predictions.
    """
    for path, outputs in own.items():
        theirs, ours = [numbers for _, numbers in outputs], [numbers for _, numbers in pieces.get(path, [])]
        # Either may call a layer more often, and in another order.
        if not _all_among(ours, theirs) and not _all_among(theirs, ours):
            return path
    return next((path for path in pieces if path not in own), None)


def _all_among(outputs: list[Tensor], others: list[Tensor]) -> bool:
    return all(any(_alike(other, output) for other in others) for output in outputs)


@contextmanager
def same_random_numbers(detector: nn.Module) -> Iterator[None]:
    """What is drawn inside, by torch, Python or numpy, is drawn again afterwards.

    Args:
        detector: on whose devices.
    """
    devices = sorted({p.device.index or 0 for p in detector.parameters() if p.is_cuda})
    numpy = sys.modules.get("numpy")
    of_python, of_numpy = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(of_python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


@contextmanager
def _own_forward(name: str) -> Iterator[None]:
    """Says of an error that it came out of a detector's own forward, which the user has not called."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{name}'s own forward, which the first step compares with its pieces, failed with "
            f"{type(error).__name__}: {error}. It fails on this batch without distillation, too: check the "
            "batch first. If it takes something else than images and targets, say how it is called "
            "(generic() takes own_losses= and detect=), or pass prove=False to the Distiller"
        ) from error


@contextmanager
def proving(detector: nn.Module) -> Iterator[Outputs]:
    """Records the outputs of a detector's layers; all else that runs inside leaves no trace.

    Args:
        detector: what runs inside, without gradients.
    """
    with (
        torch.no_grad(),
        unchanged(detector),
        same_random_numbers(detector),
        of_this_rank(),  # others may prove at another step
        _recorded(detector) as outputs,
    ):
        yield outputs


def _copied(value: Any) -> Any:
    """A copy of images and targets, which a detector may change; their tensors without a history."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return copy.deepcopy(value)


@contextmanager
def _recorded(detector: nn.Module) -> Iterator[Outputs]:
    """Records the outputs of a detector's layers, those without children, while it runs."""
    outputs: Outputs = {}

    def record(path: str, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            # A few numbers tell outputs apart, and all of them would not fit into memory.
            numbers = output.detach().double()
            sums = torch.stack([numbers.sum(), numbers.abs().sum(), numbers.square().sum()])
            outputs.setdefault(path, []).append((output.dtype, sums))

    # An activation that all blocks share stands at several places, and pieces call it in another order.
    places = Counter(id(module) for _, module in detector.named_modules(remove_duplicate=False))
    with _watched([layer for layer in _layers(detector) if places[id(layer[1])] == 1], record):
        yield outputs


def _layers(detector: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules without children, with their paths."""
    return [(path, m) for path, m in detector.named_modules() if not any(True for _ in m.children())]


@contextmanager
def _watched(
    layers: Sequence[tuple[str, nn.Module]], note: Callable[[str, nn.Module, tuple[Any, ...], Any], None]
) -> Iterator[None]:
    """Calls ``note(path, module, arguments, output)`` whenever one of the layers has run."""
    with ExitStack() as hooks:
        for path, module in layers:
            hooks.enter_context(module.register_forward_hook(partial(note, path)))
        yield


def paired(own: Predictions, pieces: Predictions) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What two runs of a head have both predicted, part by part, with the part's name.

    Args:
        own: of the one.
        pieces: of the other.
    """
    for what in ("logits", "regression", "quality"):
        theirs, ours = getattr(own, what), getattr(pieces, what)
        if theirs is not None and ours is not None:
            yield what, theirs, ours


def _alike(own: Tensor, pieces: Tensor) -> bool:
    narrow = torch.is_autocast_enabled(own.device.type) or own.dtype not in TOLERANCE
    tolerance = COARSE if narrow else max(TOLERANCE[own.dtype], TOLERANCE.get(pieces.dtype, COARSE))
    if own.shape == pieces.shape and not bool(own.isfinite().all()):
        return bool(torch.allclose(own.double(), pieces.double(), rtol=tolerance, equal_nan=True))
    return not differ(own, pieces, tolerance)


def differ(own: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two tensors differ by more than a share of the largest number, or in their shapes.

    Args:
        own: the one whose largest number counts.
        other: of any type, on any device; a number that is not finite differs from every other.
        tolerance: the share; unless given that of the same operators on the same numbers.
    """
    if own.shape != other.shape or not own.numel():
        return own.shape != other.shape
    a, b = own.detach().double(), other.detach().double().to(own.device)
    return not bool((a - b).abs().max() <= tolerance * a.abs().max().clamp(min=1e-12))


def _difference(own: Tensor, pieces: Tensor) -> str:
    if own.shape != pieces.shape:
        return f"shapes {tuple(own.shape)} alone and {tuple(pieces.shape)} by its pieces"
    largest = float((own.double() - pieces.double()).abs().max())
    return f"by up to {largest:.3g}, where the largest is {float(own.abs().max()):.3g}"


def _message(who: str, place: str | None, what: str, missed: Sequence[str] = ()) -> str:
    where = f"They part at {place}." if place is not None else "All layers that both run agree."
    if missed:
        where += f" No piece runs {_listed(missed)} (generic() takes predict= and losses=)."
    return (
        f"{who}'s own forward computes something else than the pieces that distillation runs: {what}. "
        f"{where} A forward, a loss or a wrapper of its own would be lost: put what wraps the detector "
        "(autocast, accelerate's prepare) around the distiller instead, write an adapter that runs what is "
        "special (docs/adapters.md), or pass prove=False if the difference is wanted"
    )
