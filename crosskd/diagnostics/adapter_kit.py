"""A conformance kit for adapters: run it on one that you wrote, before you train with it."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from crosskd.adapters.base import Adapter, AdapterSpec, Head
from crosskd.diagnostics import adapter_checks
from crosskd.diagnostics.adapter_checks import Bench, Skipped, Variation
from crosskd.diagnostics.decoder_checks import DECODER_CHECKS
from crosskd.methods import CrossKD, Method
from crosskd.proof import same_random_numbers

__all__ = ["CHECKS", "AdapterError", "AdapterReport", "Fault", "check_adapter"]

CHECKS = adapter_checks.CHECKS | DECODER_CHECKS


@dataclass(frozen=True)
class Fault:
    """What is wrong: which checks found it, what they found, and what the first of them expects."""

    checks: tuple[str, ...]
    found: str
    expected: str | None


@dataclass(frozen=True)
class AdapterReport:
    """Whose adapter was checked, which checks passed, and why others, by name, were not run."""

    adapter: str
    passed: tuple[str, ...]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.adapter}: {len(self.passed)} checks passed, {len(self.skipped)} skipped"]
        lines += [f"  passed   {name}" for name in self.passed]
        return "\n".join(lines + [f"  skipped  {name}: {reason}" for name, reason in self.skipped.items()])


class AdapterError(AssertionError):
    """An adapter failed some checks: its ``faults``, and the ``report`` of the other checks."""

    def __init__(self, faults: tuple[Fault, ...], report: AdapterReport) -> None:
        self.faults, self.report = faults, report
        failed = len({name for fault in faults for name in fault.checks})
        lines = [f"{report.adapter} fails {failed} of {failed + len(report.passed)} checks"]
        lines += [f"- {', '.join(f.checks)}: {f.found}\n    expected: {f.expected}" for f in faults]
        super().__init__("\n".join(lines))


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
    method: Method | Sequence[Method] | None = None,
    skip: Mapping[str, str] | None = None,
    steps: int = 200,
    **distiller_options: Any,
) -> AdapterReport:
    """Runs an adapter through everything that distillation will ask of it.

    Small detectors with random weights, small images and a handful of objects will do. All checks, which
    `CHECKS` lists by name, are run on copies before anything is raised; of several heads each is checked.

    Args:
        adapter: makes the adapter to check: an adapter's class, or what `generic` returns.
        images: a batch of at least two images, as the student takes it.
        targets: with some objects that the student's own assignment finds anchors for.
        teacher: a detector; its towers' width may differ from the student's.
        student: another one.
        teacher_adapter: makes the teacher's adapter, where that is another.
        without_objects: gives, of images and targets, a batch without objects; for targets without ``boxes``.
        one_image: likewise, a batch of one image, where images and targets can't be sliced.
        odd_size: likewise, of an odd size, with targets ``None`` if they can't follow; needed for cropping.
        method: ``CrossKD()`` unless given; or several. Decoders need methods of queries such as
            ``QueryDistillation()``; other heads of queries, and teachers without a head, need ``PKD()``.
        skip: by name, checks to leave out, and why.
        steps: of the optimisation in ``decoding and classes``.
        distiller_options: further arguments of the `Distiller`, such as ``class_map``.

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
        >>> target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
        >>> batch = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)], [target, target]
        >>> check_adapter(TorchvisionRetinaNet, *batch, teacher=detector(16), student=detector(8)).passed[:3]
        ('construction', 'structure', 'same path')
    """
    skipped = dict(skip or {})
    unknown = sorted(skipped.keys() - CHECKS.keys())
    if unknown:
        raise ValueError(f"skip= names no check: {unknown}. The checks are {', '.join(CHECKS)}")
    settings = {"adapter": adapter, "teacher_adapter": teacher_adapter or adapter, "prove": False}
    settings |= {"methods": method or CrossKD(), **distiller_options}
    variations = {"without_objects": without_objects, "one_image": one_image, "odd_size": odd_size}
    bench = Bench(*copy.deepcopy((teacher, student, (images, targets))), settings, variations, steps)
    passed, findings, first = list[str](), dict[str, list[str]](), None
    for name, check in CHECKS.items():
        if name in skipped:
            continue
        found: list[str] = []
        try:
            with same_random_numbers(bench.student), torch.enable_grad():
                torch.manual_seed(0)
                found.extend(check(bench) or ())
        except Skipped as reason:
            skipped[name] = str(reason)
        except Exception as error:  # noqa: BLE001  # whatever it is, the other checks still say something
            found, first = [*found, _raised(error)], first or error
        for finding in dict.fromkeys(found):
            findings.setdefault(finding, []).append(name)
        if not found and name not in skipped:
            passed.append(name)
        elif name == "construction":
            skipped = dict.fromkeys([*CHECKS][1:], "no distiller could be made") | skipped
    report = AdapterReport(getattr(adapter, "__name__", type(adapter).__name__), tuple(passed), skipped)
    if findings:
        faults = [Fault(tuple(names), found, CHECKS[names[0]].__doc__) for found, names in findings.items()]
        raise AdapterError(tuple(faults), report) from first
    return report


def _raised(error: Exception) -> str:
    """An exception, and which function of an adapter or a head it came out of."""
    where = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        inside = frame.f_locals.get("self")
        if isinstance(inside, Adapter | Head):
            name = getattr(inside, "name", "")
            where = f"{name}: " * bool(name) + f"{frame.f_code.co_name}() of {type(inside).__name__} raised "
    return f"{where}{type(error).__name__}: {error}"
