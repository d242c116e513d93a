"""Time and peak memory of a distillation step against its parts.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --device cuda --amp bfloat16 --size 800x1333 --batch 8 --channels-last
    python benchmarks/step_cost.py --families gfl --methods crosskd pkd fgd

The parts, each bit of work in one of them only:

* a: the student's plain step: preprocessing, forward, its own losses, backward;
* b: the teacher's forward: backbone and head, without gradients;
* c: the tail: the teacher's statistics, alignment, the rest of its towers, predictors, decoding, the
  distillation losses, and backward to the student's tapped features; of another method than CrossKD all
  that it does, and backward to the student's maps or predictions;
* d: the whole distillation step: what `Distiller` does, and backward.

An optimizer's step is the same with and without distillation and is left out. With ``--methods`` there is a
row for each method; the teacher's head is part of b only where the method needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import torch
from measure import MIB
from torch import Tensor, nn

from crosskd import CrossKD, Distiller, Method
from crosskd.methods import MapMethod
from crosskd.predictions import Predictions
from crosskd.running import steps_of
from crosskd.step import Side, Step, Trace
from crosskd.towers import Tapped

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from dense_heads import adapter_of
from methods_table import METHODS
from models import FAMILIES, build_detector

TIME_HEADER = ("detector", "a, ms", "b, ms", "c, ms", "d, ms", "d / (a + b + c)", "d / a")
MEMORY_HEADER = (
    "detector",
    "a, MiB",
    "b, MiB",
    "c, MiB",
    "d, MiB",
    "d / a",
    "teacher's predictions, MiB",
    "alive after the teacher, MiB",
)
METHOD_MEMORY_HEADER = (
    "method",
    "a, MiB",
    "the teacher's that it reads, MiB",
    "floor, MiB",
    "d, MiB",
    "d / floor",
    "alive after the teacher, MiB",
)
# What the table of methods makes them of: nothing is set.
DEFAULTS = argparse.Namespace(
    position=None, tap="post", cls_weight=None, reg_weight=None, stop_distilling=None, teacher_short_side=None
)


class RecordingCrossKD(CrossKD):
    """CrossKD that keeps the teacher's features, so that the tail can be run again by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher_features: list[Tapped] = []

    def keep_of_teacher(self, tapped: Tapped) -> Any:
        """Keeps the teacher's features, and returns their statistics."""
        self.teacher_features.append(tapped)
        return super().keep_of_teacher(tapped)


class Tail:
    """The work of a distillation step that is neither the student's nor the teacher's own.

    Args:
        trace: of a step of a distiller with the method.
        method: has kept the teacher's features of that step.
    """

    def __init__(self, trace: Trace, method: RecordingCrossKD) -> None:
        assert trace.teacher is not None
        self.trace, self.method = trace, method
        (self.run,) = trace.student.heads.values()
        (self.teacher_run,) = trace.teacher.heads.values()
        self.student_features = {}
        self.teacher_features = {}
        levels = len(self.run.levels)
        # In the order in which the towers are run: level by level, branch by branch.
        names = [branch.name for branch in self.teacher_run.head.branches]
        for number, name in enumerate(names):
            taps = self.run.taps["crosskd"][name]
            self.student_features[name] = [tap.read().detach() for tap in taps]
            self.teacher_features[name] = method.teacher_features[number :: len(names)]
            assert len(self.teacher_features[name]) == levels

    def losses(self) -> dict[str, Tensor]:
        """The distillation losses, with a gradient into leaves in the place of the tapped features."""
        leaves, statistics = {}, {}
        for name, features in self.student_features.items():
            leaves[name] = [Tapped.at("a leaf", f.detach().requires_grad_()) for f in features]
            statistics[name] = [CrossKD.keep_of_teacher(self.method, f) for f in self.teacher_features[name]]
        assert self.trace.teacher is not None
        required = frozenset(self.method.requires)
        run = replace(self.run, taps={"crosskd": leaves}, predictions=self.run.predictions.detach())
        teacher_run = replace(
            self.teacher_run,
            taps={"crosskd": statistics},
            anchors=self.trace.steps["crosskd"].teacher.anchors,
        )
        step = Step(
            Side(self.trace.teacher, teacher_run, required, "crosskd"),
            Side(self.trace.student, run, required, "crosskd"),
            assignment=self.run.assignment,
        )
        return self.method(step)


class MethodTail:
    """The work of a method that reads maps and predictions, not what is inside a head.

    Args:
        distiller: with that method alone.
        trace: of one of its steps.
    """

    def __init__(self, distiller: Distiller, trace: Trace) -> None:
        ((self.name, self.method),) = distiller.methods.items()
        self.distiller, self.trace = distiller, trace

    def losses(self) -> dict[str, Tensor]:
        """The distillation losses, with a gradient into leaves in the place of what the student gave."""
        student = self.trace.student
        maps = [feature_map.detach().requires_grad_() for feature_map in student.maps]
        heads = {
            name: replace(run, predictions=_as_leaves(run.predictions)) for name, run in student.heads.items()
        }
        leaves = replace(student, maps=maps, heads=heads)
        methods = {self.name: self.method}
        steps = steps_of(self.distiller._pairs, self.trace.teacher, leaves, methods, 0.5)
        losses: dict[str, Tensor] = self.method(steps[self.name])
        return losses


def _as_leaves(predictions: Predictions) -> Predictions:
    constants = predictions.detach()
    for tensor in (constants.logits, constants.regression, constants.quality):
        if tensor is not None:
            tensor.requires_grad_()
    return constants


class Pieces:
    """A student, its teacher, a batch, and the parts of a step as functions without arguments.

    Args:
        family: of both detectors.
        options: the script's.
        method: its name in the training script's table.
    """

    def __init__(self, family: str, options: argparse.Namespace, method: str = "crosskd") -> None:
        torch.manual_seed(options.seed)
        self.device, self.amp = options.device, options.amp
        self.images, self.targets = make_batch(options)
        self.teacher, self.student = build_pair(family, options, self.images)
        self.distiller = Distiller(self.teacher, self.student, METHODS[method].make(DEFAULTS), adapter_of)
        with self._autocast():
            take_first_steps(self.distiller, self.images, self.targets)
        self.tail = self._tail()
        self.distillation = torch.compile(self.distiller) if options.compiled else self.distiller
        self.pixels = self._pixels()

    @property
    def method(self) -> Method:
        """What is distilled by."""
        (method,) = self.distiller.methods.children()
        assert isinstance(method, Method)
        return method

    def _tail(self) -> Tail | MethodTail:
        if not isinstance(self.method, CrossKD):
            with self._autocast():
                return MethodTail(self.distiller, self.distiller.trace(self.images, self.targets))
        recording = Distiller(self.teacher, self.student, RecordingCrossKD(), adapter_of)
        with self._autocast():
            trace = recording.trace(self.images, self.targets)
        return Tail(trace, recording.methods["crosskd"])  # type: ignore[arg-type]

    def _pixels(self) -> Tensor:
        pixels: Tensor = self.student.transform(self.images)[0].tensors
        return pixels

    def _autocast(self) -> Any:
        return measure.autocast(self.device, self.amp)

    def _forward_backward(self, forward: Callable[[], dict[str, Tensor]]) -> None:
        self.distiller.zero_grad()
        with self._autocast():
            loss = torch.stack(list(forward().values())).sum()
        loss.backward()

    def student_step(self) -> None:
        """The student's plain step."""
        self._forward_backward(lambda: self.student(self.images, self.targets))

    @torch.no_grad()
    def teacher_forward(self) -> list[Tensor]:
        """The teacher's predictions, or its maps where the method doesn't distil a head."""
        with self._autocast():
            features = list(self.teacher.backbone(self.pixels).values())
            if not self.method.distils_heads():
                return features
            predictions = self.teacher.head(features)
        named = isinstance(predictions, dict)  # torchvision's are, those of examples/dense_heads a tuple
        return [p for p in (predictions.values() if named else predictions) if p is not None]

    def tail_step(self) -> None:
        """The tail's forward and backward."""
        self._forward_backward(self.tail.losses)

    def distillation_step(self) -> None:
        """The whole step."""
        self._forward_backward(lambda: self.distillation(self.images, self.targets))

    def parts(self) -> dict[str, Callable[[], object]]:
        """The functions by the letter that stands for them."""
        return {
            "a": self.student_step,
            "b": self.teacher_forward,
            "c": self.tail_step,
            "d": self.distillation_step,
        }

    def read_of_teacher(self) -> int:
        """Bytes of the teacher's maps and predictions that the method reads."""
        results = self.teacher_forward()
        if isinstance(self.method, MapMethod) and not self.method.distils_heads():
            results = [results[level] for _, level in self.method.matches]
        return sum(result.untyped_storage().nbytes() for result in results)

    def alive_after_teacher(self) -> int:
        """Bytes of tensors that a distillation step has made when the student's forward begins."""
        self.distiller.zero_grad()
        alive = []
        before = measure.tensor_bytes_alive()
        with (
            _before_forward(
                self.student.backbone, lambda: alive.append(measure.tensor_bytes_alive() - before)
            ),
            self._autocast(),
        ):
            self.distiller(self.images, self.targets)
        # The pixels are the student's, not the teacher's.
        return alive[0] - self.pixels.untyped_storage().nbytes()


@contextmanager
def _before_forward(module: nn.Module, function: Callable[[], object]) -> Iterator[None]:
    hook = module.register_forward_pre_hook(lambda *_: function() and None)
    try:
        yield
    finally:
        hook.remove()


def build_pair(family: str, options: argparse.Namespace, images: list[Tensor]) -> tuple[nn.Module, nn.Module]:
    """An untrained teacher in eval mode, whose features are in range all the same, and a student.

    Args:
        family: of both.
        options: the script's.
        images: what the statistics of the teacher's batch norms are taken from.
    """
    height, width = options.size
    detectors = []
    for backbone in (options.teacher, options.student):
        with torch.device(options.device):  # initialising a large detector on the CPU takes seconds
            name = f"{family}_{backbone}"
            detector = build_detector(
                name, options.classes, short_side=[height], long_side=max(height, width)
            )
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        detectors.append(detector.to(memory_format=layout))
    teacher, student = detectors
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average over all batches seen
    with torch.no_grad():
        teacher.train().backbone(teacher.transform(images)[0].tensors)
    return teacher.eval(), student.train()


def take_first_steps(distiller: Distiller, images: list[Tensor], targets: list[dict[str, Tensor]]) -> None:
    """Trains for a few steps, after which the distiller has checked all that it checks at first."""
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-4)
    for _ in range(4):
        optimizer.zero_grad()
        torch.stack(list(distiller(images, targets).values())).sum().backward()
        optimizer.step()
    optimizer.zero_grad()


def make_batch(options: argparse.Namespace) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Random images of the size that the detectors resize to, and a few boxes on each."""
    generator = torch.Generator().manual_seed(options.seed)
    height, width = options.size
    images, targets = [], []
    for _ in range(options.batch):
        corners = torch.rand(options.objects, 2, 2, generator=generator).sort(dim=1).values
        sides = torch.tensor([width, height])
        corners[:, 1] = corners[:, 1] * 0.9 + 0.1  # no box without a width
        boxes = (corners * sides).flatten(1)
        labels = torch.randint(options.classes, (options.objects,), generator=generator)
        images.append(torch.rand(3, height, width, generator=generator).to(options.device))
        targets.append({"boxes": boxes.to(options.device), "labels": labels.to(options.device)})
    return images, targets


def time_row(label: str, pieces: Pieces, options: argparse.Namespace) -> list[str]:
    """Medians, and the ratios' spread over the rounds."""
    seconds = measure.timed_rounds(pieces.parts(), options.rounds, options.device, clock=options.clock)
    apart = [sum(parts) for parts in zip(seconds["a"], seconds["b"], seconds["c"], strict=True)]
    medians = [f"{1000 * measure.Spread.of(values).median:.0f}" for values in seconds.values()]
    ratios = measure.ratios(seconds["d"], apart), measure.ratios(seconds["d"], seconds["a"])
    return [label, *medians, *(ratio.text() for ratio in ratios)]


def peaks_of(pieces: Pieces, letters: str, device: torch.device) -> dict[str, int]:
    """The peak memory of some of a step's parts."""
    peaks = {}
    for letter in letters:
        pieces.distiller.zero_grad()
        peaks[letter] = measure.memory(pieces.parts()[letter], device).peak
    return peaks


def memory_row(family: str, pieces: Pieces, options: argparse.Namespace) -> list[str]:
    """Peaks, and what the teacher's forward leaves behind."""
    peaks = peaks_of(pieces, "abcd", options.device)
    predictions, alive = pieces.read_of_teacher(), pieces.alive_after_teacher()
    return [
        family,
        *(f"{peak / MIB:.0f}" for peak in peaks.values()),
        f"{peaks['d'] / peaks['a']:.2f}",
        f"{predictions / MIB:.2f}",
        f"{alive / MIB:.2f}",
    ]


def method_memory_row(label: str, pieces: Pieces, options: argparse.Namespace) -> list[str]:
    """The peak of a step beside the least that it can be."""
    peaks = peaks_of(pieces, "ad", options.device)
    read, alive = pieces.read_of_teacher(), pieces.alive_after_teacher()
    floor = peaks["a"] + read
    sizes = [f"{size / MIB:.1f}" for size in (peaks["a"], read, floor, peaks["d"])]
    return [label, *sizes, f"{peaks['d'] / floor:.2f}", f"{alive / MIB:.1f}"]


def size_of(text: str) -> tuple[int, int]:
    """Reads ``height x width``, for example ``800x1333``."""
    numbers = [int(part) for part in text.split("x")]
    if len(numbers) != 2 or min(numbers) < 1 or numbers[0] > numbers[1]:
        raise argparse.ArgumentTypeError(
            f"expected height x width, the height the shorter, as 800x1333, got {text!r}"
        )
    return numbers[0], numbers[1]


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measure.add_options(parser)
    parser.add_argument("--families", choices=FAMILIES, nargs="+", default=["retinanet", "fcos"])
    parser.add_argument(
        "--methods", choices=METHODS, nargs="+", default=[], help="a row each, for the first family"
    )
    parser.add_argument("--teacher", default="resnet50", help="the teacher's backbone")
    parser.add_argument("--student", default="resnet18", help="the student's backbone")
    parser.add_argument("--size", type=size_of, default=(256, 320), help="height x width of the images")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--objects", type=int, default=8, help="boxes per image")
    parser.add_argument("--amp", choices=measure.AMP_TYPES, default="none")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compiled", action="store_true", help="compile the distillation step (d)")
    return parser.parse_args(arguments)


def family_tables(options: argparse.Namespace) -> list[str]:
    """CrossKD's cost, a row for each family of detectors."""
    times, memories = [], []
    for family in options.families:
        pieces = Pieces(family, options)
        times.append(time_row(family, pieces, options))
        memories.append(memory_row(family, pieces, options))
    return [
        EXPLANATION,
        measure.table(TIME_HEADER, times),
        MEMORY_EXPLANATION,
        measure.table(MEMORY_HEADER, memories),
    ]


def method_tables(options: argparse.Namespace) -> list[str]:
    """A family's cost, a row for each method."""
    times, memories = [], []
    for name in options.methods:
        pieces = Pieces(options.families[0], options, name)
        times.append(time_row(METHODS[name].label, pieces, options))
        memories.append(method_memory_row(METHODS[name].label, pieces, options))
    return [
        METHODS_EXPLANATION,
        measure.table(("method", *TIME_HEADER[1:]), times),
        FLOOR_EXPLANATION,
        measure.table(METHOD_MEMORY_HEADER, memories),
    ]


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    load = os.getloadavg()
    parts = method_tables(options) if options.methods else family_tables(options)
    height, width = options.size
    settings = [
        f"{' and '.join(options.families[:1] if options.methods else options.families)}, "
        f"{options.student} from {options.teacher}, untrained, batch {options.batch} of {height}x{width}, "
        f"{options.classes} classes, {options.objects} boxes per image",
        f"amp {options.amp}",
        "channels last" if options.channels_last else "contiguous",
    ]
    text = "\n\n".join(
        [
            f"# Cost of a distillation step, {options.device.type}, amp {options.amp}",
            measure.environment("benchmarks/step_cost.py", options, load)
            + f"\n- setting: {', '.join(settings)}",
            *parts,
        ]
    )
    measure.write(text, options.output)


EXPLANATION = """\
a: the student's plain step; b: the teacher's forward; c: the tail (statistics, alignment, the rest of the
teacher's head, decoding, distillation losses), forward and backward; d: the whole distillation step. No
optimizer step in any of them. Times are medians over rounds that run all four; ratios are taken round by
round, with their quartiles in brackets."""

MEMORY_EXPLANATION = """\
Peak memory is what is allocated above the weights (for c also above the tapped features). The last two
columns: the teacher's predictions, and all that is alive of the teacher's forward when the student's
begins. The difference is the statistics of its channels."""

METHODS_EXPLANATION = """\
a: the student's plain step; b: the teacher's forward, without its head where the method compares maps; c:
what the method does, forward and backward to the student's maps or predictions; d: the whole distillation
step. No optimizer step in any of them. Times are medians over rounds that run all four; ratios are taken
round by round, with their quartiles in brackets."""

FLOOR_EXPLANATION = """\
Peak memory is what is allocated above the weights. The floor is the student's plain step and beside it the
teacher's maps or predictions that the method reads, which have to outlive the student's forward. Above it
are the method's own intermediate results and the gradients of what it trains. (A step can come out just
below: where the plain step's peak is late in the backward pass, the teacher's are freed by then.) The last
column: all that is alive of the teacher's forward when the student's begins."""


if __name__ == "__main__":
    main()
