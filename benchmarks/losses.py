"""Time and peak memory of the losses against the plain compositions of PyTorch operators.

    python benchmarks/losses.py
    python benchmarks/losses.py --device cuda --sizes 1x100000x80 8x200000x80 --dtype float16

Forward, and forward and backward, all implementations side by side in one run. Times are medians of
rounds, their ratios are taken within a round. Memory is counted above the two inputs, in units of one.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial

import measure
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from crosskd.losses import distribution_kl_loss, giou_loss, quality_focal_loss, softmax_focal_loss

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def plain_quality_focal_loss(student: Tensor, teacher: Tensor, weight: Tensor, normalizer: float) -> Tensor:
    """The formula as one would write it down, in float32, differentiated by autograd."""
    student, target = student.float(), teacher.float().sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    loss = cross_entropy * (student.sigmoid() - target).abs()
    return (loss.sum(-1) * weight).sum() / normalizer


def plain_distribution_kl_loss(student: Tensor, teacher: Tensor, weight: Tensor, normalizer: float) -> Tensor:
    """The formula as one would write it down, in float32, differentiated by autograd."""
    target = teacher.float().softmax(-1)
    loss = target * (target.log() - student.float().softmax(-1).log())
    return (loss.sum(-1) * weight).sum() / normalizer


def plain_softmax_focal_loss(student: Tensor, teacher: Tensor, weight: Tensor, normalizer: float) -> Tensor:
    """The formula as one would write it down, in float32, differentiated by autograd."""
    target, log_probabilities = teacher.float().softmax(-1), student.float().log_softmax(-1)
    distance = 0.5 * (log_probabilities.exp() - target).abs().sum(-1)
    return (distance * -(target * log_probabilities).sum(-1) * weight).sum() / normalizer


def plain_giou_loss(student: Tensor, teacher: Tensor, weight: Tensor, normalizer: float) -> Tensor:
    """torchvision's operator."""
    loss = generalized_box_iou_loss(student.float(), teacher.float(), reduction="none")
    return (loss * weight).sum() / normalizer


def own(loss: Callable[..., Tensor]) -> Loss:
    """A loss of the package with its weight and normaliser as positional arguments."""

    def call(student: Tensor, teacher: Tensor, weight: Tensor, normalizer: float) -> Tensor:
        return loss(student, teacher, weight=weight, normalizer=normalizer)

    return call


LOSSES: dict[str, tuple[Loss, Loss]] = {
    "quality_focal": (plain_quality_focal_loss, own(quality_focal_loss)),
    "distribution_kl": (plain_distribution_kl_loss, own(distribution_kl_loss)),
    "giou": (plain_giou_loss, own(giou_loss)),
    "softmax_focal": (plain_softmax_focal_loss, own(softmax_focal_loss)),
}
WIDTHS = {"distribution_kl": 17, "giou": 4}  # of a row; all others have a number for each class
HEADER = (
    "loss",
    "images x anchors x width",
    "implementation",
    "forward, ms",
    "over plain",
    "forward + backward, ms",
    "over plain",
    "kept for backward",
    "peak memory",
)


def make_inputs(name: str, size: tuple[int, int, int], options: argparse.Namespace) -> list[Tensor]:
    """Student's and teacher's side, the student's with a gradient, and a weight a row."""
    generator = torch.Generator(options.device).manual_seed(options.seed)
    settings = {"generator": generator, "device": options.device}
    images, anchors, width = size
    if name == "giou":
        corners = torch.rand(2, images, anchors, 4, **settings) * 400
        corners[..., 2:] += corners[..., :2] + 1
        sides = corners
    else:
        # Logits as a detector's: most classes improbable nearly everywhere.
        sides = torch.randn(2, images, anchors, width, **settings) * 2 - 3
    weight = torch.rand(images, anchors, **settings)
    student, teacher = (side.to(getattr(torch, options.dtype)) for side in sides)
    return [student.requires_grad_(), teacher, weight]


def measure_loss(name: str, size: tuple[int, int, int], options: argparse.Namespace) -> list[list[str]]:
    """The table's rows for one loss at one size, one row an implementation."""
    inputs = make_inputs(name, size, options)
    plain, ours = LOSSES[name]
    implementations: dict[str, Loss] = {"plain": plain, "crosskd": ours}
    if options.compiled:
        torch._dynamo.reset()
        implementations["crosskd compiled"] = torch.compile(ours, dynamic=False)

    def forward(loss: Loss) -> Tensor:
        return loss(*inputs, 100.0)

    def both(loss: Loss) -> None:
        inputs[0].grad = None
        forward(loss).backward()

    device = options.device
    times = [
        measure.timed_rounds(
            {key: partial(function, loss) for key, loss in implementations.items()},
            options.rounds,
            device,
            clock=options.clock,
        )
        for function in (forward, both)
    ]
    unit = inputs[0].numel() * inputs[0].element_size()
    rows = []
    for key, loss in implementations.items():
        inputs[0].grad = None
        kept = measure.memory(partial(forward, loss), device).kept
        peak = measure.memory(partial(both, loss), device).peak
        cells = [name, "x".join(map(str, size)), key]
        for seconds in times:
            milliseconds = measure.Spread.of([1000 * value for value in seconds[key]])
            cells += [f"{milliseconds.median:.1f}", measure.ratios(seconds[key], seconds["plain"]).text()]
        rows.append([*cells, f"{kept / unit:.2f}", f"{peak / unit:.2f}"])
    return rows


def size_of(text: str) -> tuple[int, int, int]:
    """Reads ``images x anchors x classes``, for example ``2x200000x80``."""
    numbers = tuple(int(part) for part in text.split("x"))
    if len(numbers) != 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected images x anchors x classes, as 2x200000x80, got {text!r}")
    return numbers


def sizes_of(name: str, options: argparse.Namespace) -> list[tuple[int, int, int]]:
    """The sizes of one loss: as asked for the classes, the same anchors for bins and boxes."""
    sizes = [(images, anchors, WIDTHS.get(name, classes)) for images, anchors, classes in options.sizes]
    return sizes if name == "quality_focal" else sizes[-1:]


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measure.add_options(parser)
    parser.add_argument(
        "--sizes",
        type=size_of,
        nargs="+",
        default=[(1, 20_000, 80), (1, 100_000, 80), (2, 200_000, 80)],
        help="images x anchors x classes; bins and boxes are measured at the last one's anchors",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    load = os.getloadavg()
    rows = [
        row
        for name in LOSSES
        for size in sizes_of(name, options)
        for row in measure_loss(name, size, options)
    ]
    text = "\n\n".join(
        [
            f"# Losses: time and peak memory, {options.device.type}, {options.dtype}",
            measure.environment("benchmarks/losses.py", options, load),
            "Times are medians over the rounds; ratios are taken round by round, with their quartiles in "
            "brackets. Memory is what is allocated beside the two inputs, in units of one input: what "
            "is held between forward and backward, and the most at any moment of both.",
            measure.table(HEADER, rows),
        ]
    )
    measure.write(text, options.output)


if __name__ == "__main__":
    main()
