"""What `crosskd.check_adapter` runs for decoders of queries beside its other checks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from crosskd._unchanged import unchanged
from crosskd.adapters.base import Adapter, DecoderHead, Queries
from crosskd.adapters.replacing import replaced
from crosskd.diagnostics.adapter_checks import Bench, Skipped, gradients_at
from crosskd.distiller import Distiller
from crosskd.predictions import Predictions
from crosskd.proof import differ, same_random_numbers

__all__ = ["DECODER_CHECKS"]

# Sums of many numbers in another order differ by no more than this; losses by no more than the other.
_ANSWERS, _LOSSES = 1e-4, 1e-5


def _decoders(adapter: Adapter) -> list[DecoderHead]:
    return [head for head in adapter.heads if isinstance(head, DecoderHead)]


def _require_decoder(bench: Bench) -> None:
    if not _decoders(bench.of_student()):
        raise Skipped("the student has no decoder of queries")


def _require_queries(bench: Bench) -> None:
    _require_decoder(bench)
    bench.demand("queries", "distils no queries")


@torch.no_grad()
def shared_queries(bench: Bench) -> Iterator[str]:
    """A decoder answers its own queries as the detector's own forward does, and in whatever order."""
    _require_decoder(bench)
    for side, adapter, labelled in bench.sides():
        adapter.detector.eval()
        batch = replace(labelled, targets=None)
        adapter.maps_of(batch)
        for head in _decoders(adapter):
            name = f"{side}: {head.name or 'head'}"
            own, queries = head.own_predictions(batch), head.own_queries(batch)
            layers = head.run(batch, queries)
            shapes = [tuple(layer.state.shape) for layer in layers]
            expected = [(len(batch.pixels), head.num_queries, head.width)] * head.num_layers
            if shapes != expected:
                yield f"{name}: states are {shapes}; num_queries, width and num_layers say {expected}"
                continue
            order = torch.randperm(head.num_queries, device=own.logits.device)
            again = head.run(batch, _in_order(queries, order))
            pairs = [(own, layers[-1].predictions, "of its own forward")]
            for plain, permuted in zip(layers, again, strict=True):
                rows = _rows_in_order(plain.predictions, order)
                pairs.append((rows, permuted.predictions, "to the same queries in another order"))
            for expected_one, found, what in pairs:
                for part in ("logits", "regression"):
                    if differ(getattr(expected_one, part), getattr(found, part), _ANSWERS):
                        yield f"{name}: run() gives other {part} than the answers {what}"


def _in_order(queries: Queries, order: Tensor) -> Queries:
    parts = (queries.content, queries.position, queries.boxes)
    return Queries(*(None if part is None else part[:, order] for part in parts))  # type: ignore[arg-type]


def _rows_in_order(predictions: Predictions, order: Tensor) -> Predictions:
    return replace(
        predictions, logits=predictions.logits[:, order], regression=predictions.regression[:, order]
    )


def queries_permuted(bench: Bench) -> Iterator[str]:
    """The order of the teacher's queries, and of the student's, changes no distillation loss."""
    _require_decoder(bench)
    distiller = bench.distiller()
    plain = _distilled(bench, distiller, [])
    for side, adapter in (("teacher", distiller.teacher_adapter), ("student", distiller.student_adapter)):
        for name, loss in _distilled(bench, distiller, _decoders(adapter)).items():
            if abs(float(loss - plain[name])) > _LOSSES * max(1.0, abs(float(loss))):
                values = f"{float(plain[name]):.6g} and {float(loss):.6g}"
                yield f"{name} is {values} with the {side}'s queries in another order"


@torch.no_grad()
def _distilled(bench: Bench, distiller: Distiller, permuted: Sequence[DecoderHead]) -> dict[str, Tensor]:
    """The distillation losses of a step, with the queries of some decoders in another order."""
    with ExitStack() as stack:
        for head in permuted:
            order = torch.randperm(head.num_queries, generator=torch.Generator().manual_seed(0))
            predictions, queries = head.own_predictions, head.own_queries
            in_order = {
                "own_predictions": lambda batch, own=predictions, order=order: _rows_in_order(
                    own(batch), order
                ),
                "own_queries": lambda batch, own=queries, order=order: _in_order(own(batch), order),
            }
            stack.enter_context(replaced(head, **in_order))
        stack.enter_context(unchanged(distiller))
        stack.enter_context(same_random_numbers(bench.student))
        trace = distiller.trace(*copy.deepcopy(bench.batch))
    losses = distiller.named_losses(trace)
    return {name: loss for name, loss in losses.items() if name not in trace.own_losses}


@torch.no_grad()
def own_teacher(bench: Bench) -> Iterator[str]:
    """A detector that is its own teacher has no loss on queries."""
    _require_queries(bench)
    method, spec = bench.settings["methods"], bench.settings["adapter"]
    settings = {"adapter": spec, "teacher_adapter": spec, "prove": False, "methods": method}
    distiller = replace(bench, teacher=copy.deepcopy(bench.student), settings=settings).distiller()
    distiller.student.eval()
    trace = distiller.trace(copy.deepcopy(bench.batch[0]), None)
    for name, loss in distiller.named_losses(trace).items():
        if not abs(float(loss)) <= _ANSWERS:
            yield f"{name} is {float(loss):.6g} between a detector and itself"


def gradients_in_the_decoder(bench: Bench) -> Iterable[str]:
    """Each kd_* has a gradient in the student in front of the maps, and one behind them, in its decoder."""
    _require_queries(bench)
    distiller, trace = bench.step(*bench.batch)
    parameters = dict(distiller.student.named_parameters())
    in_front = gradients_at([level.sum() for level in trace.student.maps], parameters).keys()
    for name, loss in distiller.named_losses(trace).items():
        if name in trace.own_losses:
            continue
        found = gradients_at([loss], parameters)
        reached = {key for key, gradient in found.items() if bool(gradient.any())}
        if not reached & in_front:
            yield f"{name} has no gradient in front of the maps"
        if not reached - in_front:
            yield f"{name} has no gradient in the decoder"


DECODER_CHECKS: dict[str, Callable[[Bench], Iterable[str]]] = {
    check.__name__.replace("_", " "): check
    for check in (shared_queries, queries_permuted, own_teacher, gradients_in_the_decoder)
}
