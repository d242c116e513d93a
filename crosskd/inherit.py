"""Starting a student's neck and head from the teacher's weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from crosskd._guards import bare, check_shared

__all__ = ["Inherited", "inherit"]

_SHOWN = 5  # names of a kind in a message


@dataclass(frozen=True)
class Inherited:
    """What `inherit` took and what it left, by the names of the student's ``state_dict``; ``print`` it.

    Attributes:
        taken: copied from the teacher.
        other_shape: left, because the teacher's shape differs: name to (teacher's, student's).
        absent: left, because the teacher has no such name.
        skipped: left, because they are of the backbone, or were not to be taken.
    """

    taken: tuple[str, ...]
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    absent: tuple[str, ...]
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        total = len(self.taken) + len(self.other_shape) + len(self.absent) + len(self.skipped)
        lines = [f"{len(self.taken)} of the student's {total} weights and statistics are the teacher's now"]
        shapes = [
            f"{name} {theirs} (teacher), {ours} (student)"
            for name, (theirs, ours) in self.other_shape.items()
        ]
        parts = (
            ("taken", _modules(self.taken)),
            ("left, of another shape", shapes),
            ("left, not in the teacher", _modules(self.absent)),
            ("left, not asked for", _modules(self.skipped)),
        )
        lines += [f"  {title}: {_some(names)}" for title, names in parts if names]
        return "\n".join(lines)


@torch.no_grad()
def inherit(
    student: nn.Module,
    teacher: nn.Module,
    *,
    prefixes: Sequence[str] | None = None,
    skip: Sequence[str] | None = None,
) -> Inherited:
    """Copies the weights of the teacher's neck and head into the student where names and shapes agree.

    FGD, MGD and SSIM reported their best results for students that start so. Buffers of the
    ``state_dict``, such as the statistics of batch norm, are copied too. The teacher is not changed, and the
    two share no memory afterwards. Tensors are compared one by one: of a layer whose weight has another shape
    the bias may be taken alone. Call it after the student's backbone has its pretrained weights.

    The backbone is left alone unless you ask for it. What it is is read off the names: all under
    ``backbone.body`` where there is such a module, as in torchvision's detectors with a feature pyramid
    (whose neck is ``backbone.fpn``), else all under ``backbone``, as in mmdet. A detector with neither
    needs ``skip`` or ``prefixes``. ultralytics numbers its layers, and its YAML file says how many of
    them are the backbone: ``skip=[f"model.{n}" for n in range(len(student.yaml["backbone"]))]``.

    Args:
        student: is changed in place.
        teacher: a detector of any type; only names and shapes count.
        prefixes: take nothing but what is under these modules, such as ``["neck", "bbox_head"]``. Nothing is
            skipped then unless ``skip`` says so.
        skip: leave what is under these modules, instead of the backbone. ``[]`` takes everything.

    Returns:
        What was taken, what was left and why.

    Raises:
        ValueError: nothing agrees, no backbone can be found, a name that is no module of the student's, or a
            teacher whose batch norms are folded.
        TypeError: something else than two modules.

    References:
        FGD (Yang et al., CVPR 2022, arXiv 2111.11837).

    Example:
        >>> def detector(classes):
        ...     head = nn.ModuleDict({"tower": nn.Conv2d(8, 8, 3), "logits": nn.Conv2d(8, classes, 1)})
        ...     parts = {"backbone": nn.Conv2d(3, 8, 3), "neck": nn.Conv2d(8, 8, 1), "head": head}
        ...     return nn.ModuleDict(parts)
        >>> student = detector(classes=3)
        >>> print(inherit(student, detector(classes=5), skip=["backbone", "head.logits.bias"]))
        4 of the student's 8 weights and statistics are the teacher's now
          taken: neck (2), head.tower (2)
          left, of another shape: head.logits.weight (5, 8, 1, 1) (teacher), (3, 8, 1, 1) (student)
          left, not asked for: backbone (2), head.logits (1)
    """
    student, teacher = bare("student", student), bare("teacher", teacher)
    check_shared(teacher, student)
    own, theirs = student.state_dict(), teacher.state_dict()
    for argument, given in (("prefixes", prefixes), ("skip", skip)):
        _check_modules(argument, given, own)
    if skip is None:
        skip = _backbone(own) if prefixes is None else ()
    asked = {n for n in own if not _under(n, skip) and (prefixes is None or _under(n, prefixes))}
    _check_folded(asked, teacher)
    taken, other_shape, absent, skipped = [], {}, [], []
    for name, value in own.items():
        if name not in asked:
            skipped.append(name)
        elif name not in theirs:
            absent.append(name)
        elif theirs[name].shape != value.shape:
            other_shape[name] = (tuple(theirs[name].shape), tuple(value.shape))
        else:
            value.copy_(theirs[name])
            taken.append(name)
    if not taken:
        wanted = [*other_shape, *absent]
        raise ValueError(
            f"there is nothing to inherit: no name and shape agree{' outside of ' if skip else ''}"
            f"{', '.join(skip)}. The student has {_some(wanted)}; the teacher has "
            f"{_some([name for name in theirs if not _under(name, skip)])}. Take a teacher of the same type "
            "and width, or say by prefixes= or skip= what to take"
        )
    return Inherited(tuple(taken), other_shape, tuple(absent), tuple(skipped))


def _under(name: str, modules: Iterable[str]) -> bool:
    """Whether a name is that of a module, or of something in it."""
    return any(f"{name}.".startswith(f"{module.rstrip('.')}.") for module in modules)


def _check_modules(argument: str, given: Sequence[str] | None, names: Iterable[str]) -> None:
    if isinstance(given, str):
        raise TypeError(f"{argument} is a list of names, got a str: pass {argument}=[{given!r}]")
    for module in given or ():
        if not any(_under(name, [module]) for name in names):
            raise ValueError(
                f"{argument}: the student has nothing under {module!r}; its modules are "
                f"{', '.join(_modules(names))}"
            )


def _check_folded(names: Iterable[str], teacher: nn.Module) -> None:
    """Refuses weights that hold a batch norm's work as well, which the student's own norm would do again."""
    layers = dict(teacher.named_modules())
    for name in names:
        path, _, tensor = name.rpartition(".")
        if tensor == "running_mean" and type(layers.get(path)) is nn.Identity:
            raise ValueError(
                f"the teacher has an Identity for the student's batch norm {path}: its norms are folded into "
                "its convolutions, whose weights don't fit the student's. Inherit from the teacher as it was "
                "before fold_batch_norm"
            )


def _backbone(names: Iterable[str]) -> tuple[str, ...]:
    """The module that is the backbone."""
    for module in ("backbone.body", "backbone"):
        if any(_under(name, [module]) for name in names):
            return (module,)
    raise ValueError(
        f"the student has no module named backbone, only {', '.join(_modules(names))}: say by skip= which of "
        "them are the backbone, or by prefixes= which are neck and head"
    )


def _modules(names: Iterable[str]) -> list[str]:
    """Modules with how many tensors are in each, by the first two parts of the names."""
    counts = Counter(".".join(name.split(".")[:-1][:2]) or name for name in names)
    return [f"{module} ({count})" for module, count in counts.items()]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
