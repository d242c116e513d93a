"""A conformance kit for adapters: run it on one that you wrote, before you train with it."""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from crosskd.adapters.base import Adapter, AdapterSpec, Head
from crosskd.diagnostics.adapter_checks import CHECKS, Bench, Skipped, Variation, seeded
from crosskd.methods import PKD, CrossKD, Method

__all__ = ["AdapterError", "AdapterReport", "Fault", "check_adapter"]

_RAISED = " raised "


@dataclass(frozen=True)
class Fault:
    """Something that an adapter does wrong.

    Attributes:
        checks: the names of the checks that found it.
        found: what was found.
        expected: what should have been.
        cause: what usually causes it.
    """

    checks: tuple[str, ...]
    found: str
    expected: str
    cause: str

    def __str__(self) -> str:
        return (
            f"{', '.join(self.checks)}: {self.found}\n    expected: {self.expected}\n"
            f"    usual cause: {self.cause}"
        )


@dataclass(frozen=True)
class AdapterReport:
    """What `check_adapter` has looked at.

    Attributes:
        adapter: the name of what makes the adapter.
        passed: the names of the checks that found nothing wrong.
        skipped: by name, why a check was not run.
    """

    adapter: str
    passed: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.adapter}: {len(self.passed)} checks passed, {len(self.skipped)} skipped"]
        lines += [f"  passed   {name}" for name in self.passed]
        lines += [f"  skipped  {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


class AdapterError(AssertionError):
    """An adapter failed some checks; the message names each fault.

    Attributes:
        faults: what is wrong.
        report: what passed, and what was skipped.
    """

    def __init__(self, faults: tuple[Fault, ...], report: AdapterReport) -> None:
        self.faults, self.report = faults, report
        failed = {name for fault in faults for name in fault.checks}
        checks = len(failed) + len(report.passed)
        heading = f"{report.adapter} fails {len(failed)} of {checks} checks"
        super().__init__("\n".join([heading, *(f"- {fault}" for fault in faults)]))


def check_adapter(
    adapter: AdapterSpec,
    images: Any,
    targets: Any,
    *,
    teacher: nn.Module,
    student: nn.Module,
    teacher_adapter: AdapterSpec | None = None,
    without_objects: Variation | None = None,
    one_image: Variation | None = None,
    odd_size: Variation | None = None,
    method: Method | None = None,
    skip: Mapping[str, str] | None = None,
    steps: int = 200,
    **distiller_options: Any,
) -> AdapterReport:
    """Runs an adapter through everything that distillation will ask of it.

    Small detectors, small images and a handful of objects will do: what is checked is how the adapter takes
    the detectors apart, for which random weights serve as well as trained ones. All checks are run before
    anything is raised. The detectors are copied, and stay as they are. Of a detector with several heads each
    is checked; what is found names the head.

    ============================== ==============================================================
    check                          what it makes sure of
    ============================== ==============================================================
    ``construction``               adapters are made of both detectors, which can be distilled
    ``structure``                  classes, strides, levels, towers and anchors fit each other
    ``same path``                  the teacher's pieces predict what its own forward does
    ``taps and tail``              after each block, the rest gives the teacher's own predictions
    ``gradients through the tail`` each ``kd_*`` has a gradient at the student's features
    ``student losses``             the student's own losses are those of plain training
    ``label assignment``           ``assign()`` gives the assignment that the losses are made with
    ``student gradients``          gradients reach all that plain training reaches
    ``teacher untouched``          no parameter, buffer or mode of the teacher changes
    ``rows permuted``              rows of a grid have a place; those that have none are queries
    ``decoding and classes``       where the own losses are smallest, boxes and labels are right
    ``detections``                 in eval mode the student detects
    ``unlabelled images``          a batch without targets
    ``one image``                  a batch of one
    ``no objects``                 targets without an object
    ``odd image size``             sides that are multiples of nothing
    ``autocast``                   bfloat16
    ``float64``                    detectors in float64, on the CPU
    ``other device``               CUDA, where there is a device
    ============================== ==============================================================

    Args:
        adapter: makes the adapter to check: an adapter's class, or what `generic` returns.
        images: a batch of at least two images, as the student takes it.
        targets: with some objects that the student's own assignment finds anchors for.
        teacher: a detector; its towers' width may differ from the student's.
        student: another one.
        teacher_adapter: makes the teacher's adapter, where it is another one.
        without_objects: ``(images, targets)`` gives a batch without objects; needed where targets are no
            list of dicts of ``boxes`` and ``labels``.
        one_image: likewise, a batch of one image, where images and targets can't be sliced.
        odd_size: likewise, a batch of an odd size, its targets ``None`` if they can't follow; images are
            cropped unless it is given.
        method: what is distilled with; ``CrossKD()`` unless given, and ``PKD()`` for heads of queries and
            teachers without a head.
        skip: by name, checks to leave out, and why.
        steps: of the optimisation in ``decoding and classes``.
        distiller_options: further arguments of the `Distiller`, such as ``class_map``.

    Returns:
        Which checks passed, and which were skipped, with the reason.

    Raises:
        AdapterError: an ``AssertionError``, with every fault that was found.
        ValueError: ``skip`` names no check.

    Example:
        >>> from torchvision.models.detection import RetinaNet
        >>> from torchvision.models.detection.anchor_utils import AnchorGenerator
        >>> from crosskd.adapters import TorchvisionRetinaNet
        >>> def detector(width):
        ...     backbone = nn.Conv2d(3, width, 3, stride=16, padding=1)
        ...     backbone.out_channels = width
        ...     anchors = AnchorGenerator(((32,),), ((1.0,),))
        ...     return RetinaNet(backbone, 3, min_size=64, max_size=64, anchor_generator=anchors)
        >>> targets = [
        ...     {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([label])}
        ...     for label in (1, 2)
        ... ]
        >>> report = check_adapter(
        ...     TorchvisionRetinaNet,
        ...     [torch.rand(3, 64, 64), torch.rand(3, 64, 64)],
        ...     targets,
        ...     teacher=detector(16),
        ...     student=detector(8),
        ...     skip={"other device": "it is the CPU's turn"},
        ... )
        >>> report.skipped
        {'other device': "it is the CPU's turn"}
        >>> print(report)
        TorchvisionRetinaNet: 18 checks passed, 1 skipped
          passed   construction
        ...
    """
    skipped = dict(skip or {})
    unknown = sorted(skipped.keys() - CHECKS.keys())
    if unknown:
        raise ValueError(f"skip= names no check: {unknown}. The checks are {', '.join(CHECKS)}")
    specs = teacher_adapter or adapter, adapter
    teacher, student, images, targets = copy.deepcopy((teacher, student, images, targets))
    variations = {"no objects": without_objects, "one image": one_image, "odd image size": odd_size}
    bench = Bench(
        adapter=adapter,
        teacher_adapter=teacher_adapter or adapter,
        images=images,
        targets=targets,
        teacher=teacher,
        student=student,
        method=method or _method_for(specs, (teacher, student)),
        variations={name: given for name, given in variations.items() if given is not None},
        steps=steps,
        options=distiller_options,
    )
    with seeded(student), torch.enable_grad():
        return _run(bench, skipped)


def _method_for(specs: tuple[AdapterSpec, AdapterSpec], detectors: tuple[nn.Module, nn.Module]) -> Method:
    """A method that can distil what adapters make of two detectors."""
    for spec, detector in zip(specs, detectors, strict=True):
        try:
            heads = spec(copy.deepcopy(detector)).heads
        except Exception:  # noqa: BLE001  # what is wrong with the adapter is for the checks to find
            continue
        if not heads or any(head.rows == "queries" for head in heads):
            return PKD()
    return CrossKD()


def _run(bench: Bench, skipped: dict[str, str]) -> AdapterReport:
    passed, findings, first = list[str](), dict[str, list[str]](), None
    for name, check in CHECKS.items():
        if name in skipped:
            continue
        try:
            found = list(check(bench))
        except Skipped as reason:
            skipped[name] = str(reason)
            continue
        except Exception as error:  # noqa: BLE001  # whatever it is, the other checks still say something
            found, first = [_raised(error)], first or error
        for finding in dict.fromkeys(found):
            findings.setdefault(finding, []).append(name)
        if not found:
            passed.append(name)
        elif name == "construction":
            later = [other for other in CHECKS if other != name and other not in skipped]
            skipped.update(dict.fromkeys(later, "no distiller could be made"))
    spec = getattr(bench.adapter, "__name__", type(bench.adapter).__name__)
    report = AdapterReport(spec, tuple(passed), skipped)
    if findings:
        faults = tuple(_fault(tuple(checks), found) for found, checks in findings.items())
        raise AdapterError(faults, report) from first
    return report


def _fault(checks: tuple[str, ...], found: str) -> Fault:
    """A fault with what the first check that found it expects, and what usually causes it."""
    expected, _, cause = inspect.cleandoc(CHECKS[checks[0]].__doc__ or "").partition("\n\n")
    if _RAISED in found:
        cause = "the message says; the traceback of the first such error stands above"
    return Fault(checks, found, *(" ".join(text.split()) for text in (expected, cause)))


def _raised(error: Exception) -> str:
    """An exception, and which function of an adapter or a head it came out of."""
    where = "the step"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        inside = frame.f_locals.get("self")
        if isinstance(inside, Adapter | Head):
            name = getattr(inside, "name", "")
            where = f"{name}: " * bool(name) + f"{frame.f_code.co_name}() of {type(inside).__name__}"
    return f"{where}{_RAISED}{type(error).__name__}: {error}"
