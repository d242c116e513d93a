"""The student trains as it would alone, and the teacher stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crosskd._conformance.bench import (
    Batch,
    Bench,
    Finding,
    Heard,
    Skipped,
    Taken,
    backward,
    same_random_numbers,
    told,
)
from crosskd._conformance.compare import alike, kinds, near, some
from crosskd._noting import noting

__all__ = [
    "finite_findings",
    "loss_findings",
    "plain_losses",
    "same",
    "state_of",
    "student_gradients",
    "student_losses",
    "teacher_untouched",
]

_GRADIENT_ROUNDING = 1e-3


def student_losses(bench: Bench) -> Iterator[Finding]:
    """The student's own losses are those of plain training."""
    try:
        yield from loss_findings(bench, bench.batch)
    except Skipped as reason:
        raise ValueError(f"{reason}: hand in a batch that it can train on, or own_losses=") from reason
    for heard in bench.step().heard:
        yield from told(heard.part, _assignment_findings(heard))


def plain_losses(bench: Bench, batch: Batch, student: nn.Module | None = None) -> Mapping[str, Tensor]:
    """The losses of the student alone, with which the adapter has nothing to do.

    Raises:
        Skipped: it can't train on such a batch itself.
        TypeError: it gives something else than losses.
    """
    student = copy.deepcopy(bench.student) if student is None else student
    try:
        with same_random_numbers():
            plain = bench.own_losses(student.train(), *copy.deepcopy(batch))
    except Exception as error:
        raise Skipped(f"the student alone can't train on it ({type(error).__name__}: {error})") from error
    if not isinstance(plain, Mapping) or not all(
        isinstance(v, Tensor) and not v.ndim for v in plain.values()
    ):
        raise TypeError(
            f"in training the student alone gives {kinds(plain)}, not a dict of scalar tensors: pass "
            "own_losses=, a function (student, images, targets) that gives such a dict"
        )
    if not all(loss.isfinite() for loss in plain.values()):
        raise Skipped("the losses of the student alone are not finite on it")
    return plain


def loss_findings(bench: Bench, batch: Batch) -> Iterator[Finding]:
    """What differs between the student's own losses and the distiller's; the losses must be finite."""
    plain, taken = plain_losses(bench, batch), bench.step(batch)
    yield from _own_loss_findings(plain, taken)
    yield from finite_findings(taken)


def _own_loss_findings(plain: Mapping[str, Tensor], taken: Taken) -> Iterator[Finding]:
    own = taken.own
    if plain.keys() != own.keys():
        yield Finding(
            f"the student's own losses are {sorted(own)} through the adapter and {sorted(plain)} alone",
            "the same names",
            "losses() leaves one out or names it otherwise; where the detector itself gives other things "
            "than losses, pass own_losses=",
        )
    for name in plain.keys() & own.keys():
        if not alike([plain[name]], [own[name]]):
            finding = Finding(
                f"{name} is {float(own[name].detach()):.6g} through the adapter and "
                f"{float(plain[name].detach()):.6g} alone",
                "the same loss: distillation adds losses, it changes none",
                "predictions, locations or levels stand in another order than the detector's losses want; "
                "prepare() preprocesses otherwise; a branch is fed something else than in the detector's own "
                "forward; or random numbers are drawn that the detector doesn't draw, or in another order",
            )
            yield from told(taken.parts[name], [finding])


def finite_findings(taken: Taken) -> Iterator[Finding]:
    """Losses or gradients of a step that are not finite."""
    losses = {**taken.own, **taken.distilled}
    infinite = [name for name, loss in losses.items() if not bool(loss.isfinite())]
    if infinite:
        yield Finding(
            f"not finite: {', '.join(infinite)}",
            "finite losses",
            "a division by a number of positives that may be 0: the assignment's normalizer must be at least "
            "1",
        )
        return
    backward(losses)
    wrong = [
        name
        for name, parameter in taken.distiller.student.named_parameters()
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
    ]
    if wrong:
        yield Finding(
            f"gradients that are not finite at {some(wrong)}",
            "finite gradients",
            "a square root, logarithm or division at 0 in decode() or losses()",
        )


def _assignment_findings(heard: Heard) -> Iterator[Finding]:
    assignment, shape = heard.seen.assignment, tuple(heard.seen.student.logits.shape[:2])
    if tuple(assignment.positive.shape) != shape or assignment.positive.dtype != torch.bool:
        yield Finding(
            f"assignment.positive is {assignment.positive.dtype} {tuple(assignment.positive.shape)}",
            f"torch.bool {shape}, (batch, anchors)",
            "levels, images or anchors stand in another order than in the predictions",
        )
    if assignment.counted is not None and tuple(assignment.counted.shape) != shape:
        yield Finding(
            f"assignment.counted is {tuple(assignment.counted.shape)}",
            f"{shape}, (batch, anchors), or None",
            "levels, images or anchors stand in another order than in the predictions",
        )
    normalizer = assignment.normalizer
    if normalizer.ndim or not bool(normalizer.isfinite()) or float(normalizer) <= 0:
        yield Finding(
            f"assignment.normalizer is {normalizer.tolist()}",
            "one finite number above 0",
            "it counts no images without objects, which are to count as one positive",
        )


def student_gradients(bench: Bench) -> Iterator[Finding]:
    """Gradients reach what plain training reaches, and the distillation's the blocks before the split."""
    student = copy.deepcopy(bench.student)
    backward(plain_losses(bench, bench.batch, student))
    alone = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    taken = bench.step()
    distiller = taken.distiller
    backward(taken.own)
    ours = {name: p.grad for name, p in distiller.student.named_parameters() if p.grad is not None}
    lost = [name for name in alone if alone[name].any() and (name not in ours or not ours[name].any())]
    if lost:
        yield Finding(
            f"the student's own losses have no gradient at {some(lost)}, which plain training reaches",
            "a gradient wherever plain training has one",
            "features, towers or predictions of the student are detached, or another copy of a module is run",
        )
    other = [n for n in alone if n not in lost and not near(alone[n], ours.get(n), _GRADIENT_ROUNDING)]
    if other:
        yield Finding(
            f"the gradients of the student's own losses differ from plain training's at {some(other)}",
            "the same gradients",
            "part of the student's graph is detached, or scaled on its way",
        )
    distiller.student.zero_grad()
    backward(taken.distilled)
    for heard in taken.heard:
        yield from told(heard.part, _tower_gradient_findings(heard, distiller.student))


def _tower_gradient_findings(heard: Heard, student: nn.Module) -> Iterator[Finding]:
    """The distillation's gradient reaches every block before the split and none behind it."""
    missed, strayed = list[str](), list[str]()
    for branch in heard.source.branches(student):
        points = heard.method.points(branch.name)
        for tower in () if points is None else branch.towers:
            for number, block in enumerate(tower.blocks, 1):
                parameters = [p for layer in block.layers for p in layer.parameters() if p.requires_grad]
                reached = any(p.grad is not None and bool(p.grad.any()) for p in parameters)
                before = points is not None and number <= points[0].position
                if parameters and reached != before:
                    (missed if before else strayed).append(f"block {number} of the {tower.name}")
    if missed:
        yield Finding(
            f"the distillation's gradient does not reach what stands before the split: {some(missed)}",
            "a gradient in each of the student's blocks before the split",
            "branches() gives other modules than the student trains, or the teacher's tail is detached",
        )
    if strayed:
        yield Finding(
            f"the distillation's gradient reaches what stands behind the split: {some(strayed)}",
            "a gradient of exactly none in the student's blocks behind the split",
            "the cross-head predictions are made by the student's blocks instead of the teacher's",
        )


def teacher_untouched(bench: Bench) -> Iterator[Finding]:
    """Neither the teacher that was handed in nor its frozen copy is changed, or runs in train mode."""
    teacher = copy.deepcopy(bench.teacher)
    before, woken, ran = state_of(teacher), list[str](), set[str]()

    def note(name: str, arguments: tuple[Any, ...], result: Any) -> None:
        if not woken and any(module.training for module in distiller.teacher.modules()):
            woken.append(name)

    distiller = bench.distiller(teacher, noting(bench.adapter, note))
    for name, module in distiller.teacher.named_modules():
        if not any(True for _ in module.children()):
            module.register_forward_pre_hook(lambda m, _, name=name: ran.add(name) if m.training else None)
    with same_random_numbers():
        backward(distiller(*bench.batch))
    if woken or ran:
        where = f"{woken[0]}() left it so" if woken else f"{some(sorted(ran))} ran in it"
        yield Finding(
            f"the teacher in train mode: {where}",
            "the teacher in eval mode from beginning to end: in train mode its batch norm would change",
            "the adapter calls detector.train(): modes are not its business",
        )
    else:
        distiller.eval()(bench.batch[0])
    yield from _touched_findings(teacher, distiller.teacher, before)


def _touched_findings(
    teacher: nn.Module, frozen: nn.Module, before: dict[str, tuple[Any, ...]]
) -> Iterator[Finding]:
    after = state_of(teacher)
    changed = [name for name in before.keys() | after.keys() if not same(before.get(name), after.get(name))]
    if changed:
        yield Finding(
            f"the teacher has changed: {some(sorted(changed))}",
            "each parameter, buffer, flag and mode as it was",
            "the adapter runs the teacher in train mode, works in place on its weights, or sets something of "
            "it",
        )
    learning = [
        name
        for name, parameter in frozen.named_parameters()
        if parameter.requires_grad or parameter.grad is not None
    ]
    if learning:
        yield Finding(
            f"the frozen teacher has parameters with a gradient: {some(learning)}",
            "none",
            "the adapter calls requires_grad_()",
        )


def state_of(detector: nn.Module) -> dict[str, tuple[Any, ...]]:
    """All that must not change, by name."""
    state: dict[str, tuple[Any, ...]] = {
        f"mode of {name or 'the detector'}": (module.training,) for name, module in detector.named_modules()
    }
    for name, parameter in detector.named_parameters():
        state[name] = (parameter.detach().clone(), parameter.requires_grad, parameter.grad is None)
    for name, buffer in detector.named_buffers():
        state[name] = (buffer.detach().clone(),)
    return state


def same(before: tuple[Any, ...] | None, after: tuple[Any, ...] | None) -> bool:
    if before is None or after is None or len(before) != len(after):
        return False
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, after, strict=True)
    )
