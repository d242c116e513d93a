"""What the checks of an adapter work on: copies of the detectors, their heads, one step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crosskd._heads import loss_name
from crosskd._noting import noting
from crosskd._truth import Truth
from crosskd.adapters.protocol import Adapter, Inputs, SecondStage, heads_of
from crosskd.distiller import Distiller
from crosskd.frozen import frozen_copy
from crosskd.head import Branch
from crosskd.methods.base import Method, Step
from crosskd.predictions import Predictions, join_levels

__all__ = [
    "PARTS",
    "Batch",
    "Bench",
    "Finding",
    "Heard",
    "Part",
    "Pass",
    "Skipped",
    "Source",
    "Taken",
    "Variation",
    "backward",
    "cloned",
    "propose",
    "run_head",
    "same_random_numbers",
    "told",
]

PARTS = {"kd_cls": "logits", "kd_reg": "regression", "kd_quality": "quality"}
"""Which of the predictions a distillation loss compares."""

Source = Adapter | SecondStage
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


def told(part: str | None, findings: Iterable[Finding]) -> Iterator[Finding]:
    """Findings about one head, with its name in front where there are several."""
    for finding in findings:
        yield finding if part is None else finding._replace(found=f"{part}: {finding.found}")


class Pass(NamedTuple):
    """A detector's way through one of its heads.

    Attributes:
        maps: a feature map a level.
        branches: the head's.
        outputs: a level's tower outputs, by branch name.
        levels: a level's predictions.
    """

    maps: Sequence[Tensor]
    branches: tuple[Branch, ...]
    outputs: list[dict[str, Tensor]]
    levels: list[Predictions]


@dataclass(frozen=True, eq=False)
class Part:
    """One of the detectors' heads, and what it is fed.

    Attributes:
        name: its name among several; ``None`` for the only one.
        source: takes it apart.
        inputs: the batch.
        teacher_maps: the teacher's feature maps, or what it pools at the regions.
        student_maps: the student's.
        origin: for what is pooled, the student's maps that it was pooled from.
        regions: of a head that answers for regions.
    """

    name: str | None
    source: Source
    inputs: Inputs
    teacher_maps: Sequence[Tensor]
    student_maps: Sequence[Tensor]
    origin: Sequence[Tensor] = ()
    regions: Any = None

    def locations(self, detector: nn.Module, maps: Sequence[Tensor]) -> Any:
        """Where a detector predicts: its anchors or points, or the regions."""
        if self.regions is not None:
            return self.regions
        return self.source.locations(detector, self.inputs, maps)  # type: ignore[union-attr]


class Heard(NamedTuple):
    """What one head's method has seen and said in a training step.

    Attributes:
        part: the head's name among several; ``None`` for the only one.
        source: takes the head apart.
        method: the method.
        seen: what it saw.
        losses: those of `PARTS` that it gave, under these names.
    """

    part: str | None
    source: Source
    method: Method
    seen: Step
    losses: dict[str, Tensor]


class Taken(NamedTuple):
    """A training step that was taken.

    Attributes:
        distiller: it was a new one.
        own: the student's own losses.
        distilled: the methods'.
        heard: by head, what its method has seen and said.
        parts: which head each of the student's own losses is of.
    """

    distiller: Distiller
    own: dict[str, Tensor]
    distilled: dict[str, Tensor]
    heard: list[Heard]
    parts: dict[str, str | None]


def run_head(source: Source, detector: nn.Module, maps: Sequence[Tensor]) -> Pass:
    """Runs a head as distillation does, piece by piece.

    Args:
        source: takes it apart.
        detector: in the mode that it is to run in.
        maps: what the head is fed.
    """
    branches = source.branches(detector)
    outputs = [
        {branch.name: branch.tower(level).run(feature_map.clone(), ())[0] for branch in branches}
        for level, feature_map in enumerate(maps)
    ]
    levels = [source.predict(detector, level, cloned(towers)) for level, towers in enumerate(outputs)]
    return Pass(maps, branches, outputs, levels)


@torch.no_grad()
def propose(
    adapter: Adapter, student: nn.Module, predictions: Predictions, locations: Any, inputs: Inputs
) -> Any:
    """The regions that follow from a first head's predictions, asked for after its losses as in training."""
    with same_random_numbers():
        adapter.losses(student, predictions, locations, inputs)
        return adapter.second.regions(student, predictions, locations, inputs)  # type: ignore[attr-defined]


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

    @property
    def sources(self) -> dict[str | None, Source]:
        """What takes each head apart, by the head's name, in the order in which they run."""
        return heads_of(self.adapter)

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

    def parts(self, teacher: nn.Module, student: nn.Module) -> Iterator[Part]:
        """Each head of two detectors; a second one is fed when its turn comes, by the first one's student.

        Args:
            teacher: in the mode that it is to run in.
            student: likewise.
        """
        inputs, adapter = self.prepare(teacher, student), self.adapter
        theirs = adapter.features(teacher, inputs.teacher_pixels)
        ours = adapter.features(student, inputs.student_pixels)
        (first, _), *others = self.sources.items()
        yield Part(first, adapter, inputs, theirs, ours)
        for name, second in others:
            predictions = join_levels(run_head(adapter, student, ours).levels).detach()
            regions = propose(adapter, student, predictions, adapter.locations(student, inputs, ours), inputs)
            pooled = [
                second.features(detector, maps, regions, inputs)  # type: ignore[call-arg, arg-type]
                for detector, maps in ((teacher, theirs), (student, ours))
            ]
            yield Part(name, second, inputs, pooled[0], pooled[1], ours, regions)

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
        own, seen, sources = dict[str, str | None](), dict[str, Step](), self.sources

        def note(name: str, arguments: tuple[Any, ...], result: Any) -> None:
            if name in ("losses", "second.losses"):
                own.update(dict.fromkeys(result[0], list(sources)[name == "second.losses"]))

        distiller = self.distiller(adapter=noting(self.adapter, note))
        for name, method in distiller.methods.items():
            method.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
        with same_random_numbers():
            losses = distiller(*copy.deepcopy(self.batch if batch is None else batch))
        distilled = {name: losses.pop(name) for name in list(losses) if name not in own}
        heard = []
        for name, step in seen.items():
            method = distiller.methods[name]
            assert isinstance(method, Method)
            full = {key: loss_name(key, method.part) for key in PARTS}
            said = {key: distilled[loss] for key, loss in full.items() if loss in distilled}
            heard.append(Heard(method.part, sources[method.part], method, step, said))
        return Taken(distiller, losses, distilled, heard, own)

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
