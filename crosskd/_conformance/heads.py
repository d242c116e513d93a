"""The head, split and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from crosskd._conformance.bench import PARTS, Bench, Finding, Heard, Part, Skipped, cloned, run_head, told
from crosskd._conformance.compare import alike, difference, numbers
from crosskd.head import TapPoint, Tower
from crosskd.predictions import Predictions, join_levels

__all__ = ["gradients_through_the_tail", "same_path_for_both", "taps_and_tail"]


@torch.no_grad()
def same_path_for_both(bench: Bench) -> list[Finding]:
    """Teacher and student of the same weights are given the same numbers at every stage."""
    teacher, twin = bench.twins()
    for part in bench.parts(teacher, twin):
        for name, theirs, ours in _stages(part, teacher, twin):
            if not alike(theirs, ours):
                finding = Finding(
                    f"{name}() gives a teacher and a student of the same weights other numbers: "
                    f"{difference(theirs, ours)}",
                    "the same for both",
                    f"{name}() looks at the detector's mode, treats the student otherwise than the teacher, "
                    "or keeps something from call to call",
                )
                return list(told(part.name, [finding]))  # what follows differs because of this
    return []


def _stages(
    part: Part, teacher: nn.Module, student: nn.Module
) -> Iterator[tuple[str, Sequence[Tensor], Sequence[Tensor]]]:
    """The functions that a head's way leads through, with what they give the teacher and the student."""
    if part.regions is None:
        yield "prepare", [part.inputs.teacher_pixels], [part.inputs.student_pixels]
    yield "features", part.teacher_maps, part.student_maps
    sides = (teacher, part.teacher_maps), (student, part.student_maps)
    theirs, ours = (run_head(part.source, detector, maps) for detector, maps in sides)
    yield "predict", numbers(theirs.levels), numbers(ours.levels)
    boxes = [
        part.source.decode(detector, join_levels(run.levels), part.locations(detector, run.maps))
        for detector, run in ((teacher, theirs), (student, ours))
    ]
    yield "decode", boxes[:1], boxes[1:]


@torch.no_grad()
def taps_and_tail(bench: Bench) -> list[Finding]:
    """Features taken up after each block, and the rest run on them, are the teacher's own predictions."""
    teacher, twin = bench.twins()
    return [
        finding
        for part in bench.parts(teacher, twin)
        for finding in told(part.name, _tap_findings(part, teacher, twin))
    ]


def _tap_findings(part: Part, teacher: nn.Module, twin: nn.Module) -> list[Finding]:
    """The first thing that is wrong with each of a head's branches."""
    source, own = part.source, run_head(part.source, teacher, part.teacher_maps)
    findings: dict[str, Finding] = {}
    for level, feature_map in enumerate(own.maps):
        for branch, of_twin in zip(own.branches, source.branches(twin), strict=True):
            for point in _points(branch.tower(level)):
                output, taps = of_twin.tower(level).run(feature_map.clone(), {point})
                source.predict(twin, level, {**cloned(own.outputs[level]), branch.name: output})
                where = f"{branch.name} branch, level {level}, position {point.position} ({point.tap})"
                try:
                    features = taps[point].read()
                except ValueError as error:
                    findings.setdefault(branch.name, _overwritten(str(error)))
                    continue
                rest = _rest(branch.tower(level), features, point)
                towers = {**cloned(own.outputs[level]), branch.name: rest.clone()}
                predictions = source.predict(teacher, level, towers)
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
    heard = {each.part: each for each in bench.step().heard if each.seen.student_taps}
    if not heard:
        raise Skipped(f"{type(bench.method).__name__} taps no features")
    teacher, twin = bench.twins()
    for part in bench.parts(teacher, twin):
        if part.name in heard:
            findings = _gradient_findings(heard[part.name], _dependencies(part, teacher))
            yield from told(part.name, findings)
        yield from told(part.name, _pooling_findings(part))


def _pooling_findings(part: Part) -> Iterator[Finding]:
    """Whether what the student's second head is fed comes from the student's own maps."""
    if not part.origin:
        return
    pooled = torch.stack([pooled.sum() for pooled in part.student_maps]).sum()
    if not any(gradient is not None for gradient in _gradients(pooled, part.origin)):
        yield Finding(
            "what features() pools for the student has no gradient at the student's own maps",
            "each detector's features pooled from its own maps, at the student's regions",
            "features() pools from the teacher's maps for both, keeps maps from call to call, or detaches",
        )


def _gradient_findings(heard: Heard, depends: Mapping[str, set[str]]) -> Iterator[Finding]:
    """What is lost between a head's distillation losses and the student's features.

    Args:
        heard: the head's part of a step.
        depends: which branches each part of the predictions depends on.
    """
    taps = {name: [tap.read() for tap in levels] for name, levels in heard.seen.student_taps.items()}
    for name, loss in heard.losses.items():
        for branch in sorted(depends[PARTS[name]] & taps.keys()):
            gradients = _gradients(loss, taps[branch])
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
def _dependencies(part: Part, teacher: nn.Module) -> dict[str, set[str]]:
    """Which branches each part of the predictions depends on, found by disturbing the towers' outputs."""
    own = run_head(part.source, teacher, part.teacher_maps)
    depends: dict[str, set[str]] = {compared: set() for compared in PARTS.values()}
    for level, (outputs, predictions) in enumerate(zip(own.outputs, own.levels, strict=True)):
        for branch, output in outputs.items():
            disturbed = output + output.std(correction=0).clamp(min=1e-3) * torch.randn_like(output)
            others = part.source.predict(teacher, level, {**cloned(outputs), branch: disturbed})
            for compared, branches in depends.items():
                before, after = getattr(predictions, compared), getattr(others, compared)
                if before is not None and not torch.equal(before, after):
                    branches.add(branch)
    return depends


def _gradients(loss: Tensor, at: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    if not loss.requires_grad:
        return (None,) * len(at)
    return torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True)
