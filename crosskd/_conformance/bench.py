"""What the checks of an adapter work on: copies of the detectors, variations of the batch, one step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crosskd._noting import noting
from crosskd._truth import Truth
from crosskd.adapters.protocol import Adapter, Inputs
from crosskd.distiller import Distiller
from crosskd.frozen import frozen_copy
from crosskd.head import Branch
from crosskd.methods.base import Method, Step
from crosskd.predictions import Predictions

__all__ = [
    "PARTS",
    "Batch",
    "Bench",
    "Finding",
    "Pass",
    "Skipped",
    "Taken",
    "Variation",
    "backward",
    "cloned",
    "run_through",
    "same_random_numbers",
]

PARTS = {"kd_cls": "logits", "kd_reg": "regression", "kd_quality": "quality"}
"""Which of the predictions a distillation loss compares."""

Batch = tuple[Any, Any]
Variation = Callable[[Any, Any], Batch]


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
    """A detector's way through the adapter.

    Attributes:
        maps: a feature map a level.
        branches: the head's.
        outputs: a level's tower outputs, by branch name.
        levels: a level's predictions.
    """

    maps: list[Tensor]
    branches: tuple[Branch, ...]
    outputs: list[dict[str, Tensor]]
    levels: list[Predictions]


class Taken(NamedTuple):
    """A training step that was taken.

    Attributes:
        distiller: it was a new one.
        method: its method.
        own: the student's own losses.
        distilled: the method's.
        seen: what the method saw.
    """

    distiller: Distiller
    method: Method
    own: dict[str, Tensor]
    distilled: dict[str, Tensor]
    seen: Step


def run_through(adapter: Adapter, detector: nn.Module, pixels: Tensor) -> Pass:
    """Runs a detector as distillation does, piece by piece.

    Args:
        adapter: takes it apart.
        detector: in the mode that it is to run in.
        pixels: shape (batch, channels, height, width).
    """
    maps, branches = list(adapter.features(detector, pixels)), adapter.branches(detector)
    outputs = [
        {branch.name: branch.tower(level).run(feature_map.clone(), ())[0] for branch in branches}
        for level, feature_map in enumerate(maps)
    ]
    levels = [adapter.predict(detector, level, cloned(towers)) for level, towers in enumerate(outputs)]
    return Pass(maps, branches, outputs, levels)


def cloned(towers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, for a function that may write over what it is given."""
    return {name: output.clone() for name, output in towers.items()}


def backward(losses: Mapping[str, Tensor]) -> None:
    """Back-propagates the sum of the losses that have a gradient; the graph stays."""
    learning = [loss.float() for loss in losses.values() if loss.requires_grad]
    if learning:
        torch.autograd.backward(torch.stack(learning).sum(), retain_graph=True)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Whatever is drawn inside is drawn again the next time; outside nothing has been drawn."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


class _Heedless(Distiller):
    """Goes on where distillation has no effect: why it has none is for the checks to tell."""

    def _check_first_step(self, distillation: Mapping[str, Mapping[str, Tensor]]) -> None:
        return


@dataclass(frozen=True, eq=False)
class Bench:
    """What `crosskd.testing.check_adapter` was given, and what the checks need of it.

    Attributes:
        adapter: the adapter to check.
        images: a batch, as the student takes it.
        targets: with objects.
        teacher: never run or changed itself; copies are.
        student: likewise.
        method: distils in the checks that take a whole step.
        own_losses: what the student alone would train on.
        truth: tells the objects of a prepared batch.
        variations: by the check's name, how to make its batch of the whole one, where given.
        steps: of the optimisation of free predictions.
        options: further arguments of the `Distiller`.
    """

    adapter: Adapter
    images: Any
    targets: Any
    teacher: nn.Module
    student: nn.Module
    method: Method
    own_losses: Callable[[nn.Module, Any, Any], Mapping[str, Tensor]]
    truth: Truth
    variations: Mapping[str, Variation]
    steps: int
    options: Mapping[str, Any]

    @property
    def batch(self) -> Batch:
        """A copy of images and targets, for a step that may change them."""
        return copy.deepcopy((self.images, self.targets))

    def sides(self) -> tuple[tuple[str, nn.Module], ...]:
        """Copies: the teacher in eval mode, the student in train mode."""
        return (
            ("teacher", frozen_copy(copy.deepcopy(self.teacher))),
            ("student", copy.deepcopy(self.student).train()),
        )

    def twins(self) -> tuple[nn.Module, nn.Module]:
        """The teacher, and its copy in train mode, whose layers compute what they do in eval mode."""
        twin = copy.deepcopy(self.teacher).train()
        for module in twin.modules():
            if not any(True for _ in module.children()):
                module.eval()  # batch norm and dropout are such layers; what has children asks for its mode
        return frozen_copy(copy.deepcopy(self.teacher)), twin

    def prepare(self, teacher: nn.Module, student: nn.Module) -> Inputs:
        """The whole batch."""
        with same_random_numbers():
            return self.adapter.prepare(teacher, student, *self.batch)

    def distiller(self, teacher: nn.Module | None = None, adapter: Adapter | None = None) -> Distiller:
        """A distiller of copies, in train mode.

        Args:
            teacher: handed in itself instead of a copy.
            adapter: used in the steps instead of the one to check.
        """
        teacher = copy.deepcopy(self.teacher) if teacher is None else teacher
        student = copy.deepcopy(self.student)
        with same_random_numbers():
            distiller = _Heedless(teacher, student, self.method, self.adapter, **self.options)
        distiller.adapter = self.adapter if adapter is None else adapter
        return distiller.train()

    def step(self, batch: Batch | None = None) -> Taken:
        """One training step of a new distiller."""
        own, seen = set[str](), list[Step]()

        def note(name: str, arguments: tuple[Any, ...], result: Any) -> None:
            if name == "losses":
                own.update(result[0])

        distiller = self.distiller(adapter=noting(self.adapter, note))
        (method,) = distiller.methods.values()
        assert isinstance(method, Method)
        method.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        with same_random_numbers():
            losses = distiller(*copy.deepcopy(self.batch if batch is None else batch))
        distilled = {name: losses.pop(name) for name in list(losses) if name not in own}
        return Taken(distiller, method, own=losses, distilled=distilled, seen=seen[0])

    def varied(self, check: str, otherwise: Variation) -> Batch:
        """The batch of a check that wants another one."""
        return self.variations.get(check, otherwise)(*self.batch)

    def converted(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Bench:
        """The same on another device, or with numbers of another type."""
        detectors = copy.deepcopy((self.teacher, self.student))
        teacher, student = (detector.to(device=device, dtype=dtype) for detector in detectors)
        images, targets = (_moved(part, device, dtype) for part in self.batch)
        return replace(self, images=images, targets=targets, teacher=teacher, student=student)


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
