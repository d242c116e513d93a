"""The head, split and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from crosskd._conformance.bench import PARTS, Bench, Finding, Skipped, cloned, run_through
from crosskd._conformance.compare import alike, difference, numbers
from crosskd.head import TapPoint, Tower
from crosskd.predictions import Predictions, join_levels

__all__ = ["gradients_through_the_tail", "same_path_for_both", "taps_and_tail"]


@torch.no_grad()
def same_path_for_both(bench: Bench) -> list[Finding]:
    """Teacher and student of the same weights are given the same numbers at every stage."""
    adapter, (teacher, twin) = bench.adapter, bench.twins()
    inputs = bench.prepare(teacher, twin)
    stages: list[tuple[str, list[Tensor], list[Tensor]]]
    stages = [("prepare", [inputs.teacher_pixels], [inputs.student_pixels])]
    as_teacher = run_through(adapter, teacher, inputs.teacher_pixels)
    as_student = run_through(adapter, twin, inputs.student_pixels)
    stages.append(("features", as_teacher.maps, as_student.maps))
    stages.append(("predict", numbers(as_teacher.levels), numbers(as_student.levels)))
    theirs, ours = (
        [adapter.decode(detector, join_levels(run.levels), adapter.locations(detector, inputs, run.maps))]
        for detector, run in ((teacher, as_teacher), (twin, as_student))
    )
    stages.append(("decode", theirs, ours))
    findings = []
    for name, theirs, ours in stages:
        if not alike(theirs, ours):
            findings.append(
                Finding(
                    f"{name}() gives a teacher and a student of the same weights other numbers: "
                    f"{difference(theirs, ours)}",
                    "the same for both",
                    f"{name}() looks at the detector's mode, treats the student otherwise than the teacher, "
                    "or keeps something from call to call",
                )
            )
            break  # what follows differs because of this
    return findings


@torch.no_grad()
def taps_and_tail(bench: Bench) -> list[Finding]:
    """Features taken up after each block, and the rest run on them, are the teacher's own predictions."""
    adapter, (teacher, twin) = bench.adapter, bench.twins()
    inputs = bench.prepare(teacher, twin)
    own = run_through(adapter, teacher, inputs.teacher_pixels)
    findings: dict[str, Finding] = {}
    for level, feature_map in enumerate(own.maps):
        for branch, of_twin in zip(own.branches, adapter.branches(twin), strict=True):
            for point in _points(branch.tower(level)):
                output, taps = of_twin.tower(level).run(feature_map.clone(), {point})
                adapter.predict(twin, level, {**cloned(own.outputs[level]), branch.name: output})
                where = f"{branch.name} branch, level {level}, position {point.position} ({point.tap})"
                try:
                    features = taps[point].read()
                except ValueError as error:
                    findings.setdefault(branch.name, _overwritten(str(error)))
                    continue
                rest = _rest(branch.tower(level), features, point)
                towers = {**cloned(own.outputs[level]), branch.name: rest.clone()}
                predictions = adapter.predict(teacher, level, towers)
                output = own.outputs[level][branch.name]
                for finding in _split_findings(where, output, rest, own.levels[level], predictions):
                    findings.setdefault(branch.name, finding)
    return list(findings.values())


def _points(tower: Tower) -> Iterator[TapPoint]:
    yield TapPoint(0, "post")
    for number, block in enumerate(tower.blocks, 1):
        yield TapPoint(number, "post")
        if block.has_pre:
            yield TapPoint(number, "pre")


def _rest(tower: Tower, features: Tensor, point: TapPoint) -> Tensor:
    """What follows a tap point, on the very features that were tapped.

    Behind ``"post"`` `Tower.tail` runs the activation a second time, for aligned features have to pass it.
    These have passed it, and only some activations can be run twice with no effect.
    """
    if point.tap == "pre":
        return tower.tail(features, point)
    features = features.movedim(1, -1) if tower.channels_last else features
    for block in tower.blocks[point.position :]:
        features = block(features)
    return features


def _overwritten(message: str) -> Finding:
    return Finding(
        message,
        "features that stay as they were tapped",
        "a block or predict() works in place on what it is given (relu_(), inplace=True, += ) in a way that "
        "its layers don't tell; the student's features would be changed after they were handed over",
    )


def _split_findings(
    where: str, output: Tensor, rest: Tensor, own: Predictions, predictions: Predictions
) -> Iterator[Finding]:
    expected = "exactly the teacher's own numbers, with its copy as the student"
    if not alike([output], [rest]):
        yield Finding(
            f"{where}: the blocks behind the split make another tower output: {difference([output], [rest])}",
            expected,
            "blocks in another order than the tower runs them, an activation that belongs to two blocks, or "
            "a tap overwritten in place",
        )
        return
    theirs, ours = numbers([own]), numbers([predictions])
    if not alike(theirs, ours):
        yield Finding(
            f"{where}: predict() gives other predictions for the same tower output: "
            f"{difference(theirs, ours)}",
            expected,
            "predict() reads something else than the towers' outputs, or keeps something from call to call",
        )


def gradients_through_the_tail(bench: Bench) -> Iterator[Finding]:
    """Each distillation loss has a gradient at the student's features in every branch that it hears of."""
    taken = bench.step()
    step, losses = taken.seen, taken.distilled
    names = [name for name in PARTS if name in losses]
    taps = {name: [tap.read() for tap in levels] for name, levels in step.student_taps.items()}
    if not taps:
        raise Skipped(f"{type(bench.method).__name__} taps no features")
    depends = _dependencies(bench)
    for name in names:
        for branch in sorted(depends[PARTS[name]] & taps.keys()):
            gradients = _gradients(losses[name], taps[branch])
            lost = [level for level, gradient in enumerate(gradients) if gradient is None]
            reached = any(gradient is not None and bool(gradient.any()) for gradient in gradients)
            if lost or not reached:
                levels = f"at level {', '.join(map(str, lost))}" if lost and reached else "at any level"
                yield Finding(
                    f"{name} has no gradient at the student's features of the {branch} branch {levels}",
                    "a gradient at every level: the teacher's tail is frozen, but the student learns through "
                    "it",
                    "the tail is detached: detach(), .data, torch.no_grad() or a copy by numpy in predict(), "
                    "decode() or a tower",
                )


@torch.no_grad()
def _dependencies(bench: Bench) -> dict[str, set[str]]:
    """Which branches each part of the predictions depends on, found by disturbing the towers' outputs."""
    adapter, (teacher, twin) = bench.adapter, bench.twins()
    own = run_through(adapter, teacher, bench.prepare(teacher, twin).teacher_pixels)
    depends: dict[str, set[str]] = {part: set() for part in PARTS.values()}
    for level, (outputs, predictions) in enumerate(zip(own.outputs, own.levels, strict=True)):
        for branch, output in outputs.items():
            disturbed = output + output.std(correction=0).clamp(min=1e-3) * torch.randn_like(output)
            others = adapter.predict(teacher, level, {**cloned(outputs), branch: disturbed})
            for part, branches in depends.items():
                before, after = getattr(predictions, part), getattr(others, part)
                if before is not None and not torch.equal(before, after):
                    branches.add(branch)
    return depends


def _gradients(loss: Tensor, at: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    if not loss.requires_grad:
        return (None,) * len(at)
    return torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True)
