"""How large each method's gradient is at the student's feature maps, beside that of the student's own losses.

    python benchmarks/loss_scales.py --root data/bccd --threads 1

For the choice of weights where none was published: a loss whose gradient at the maps is of about the size
that a published weight gives another method, for the same teacher and student. Images are those of BCCD's
training split, small. The teacher is trained shortly on them, unless its weights are given, which is better;
the student is fresh, and then trained on labels alone, shortly or by given weights. ``--root`` holds
``images`` and ``annotations/train.json``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

import measure
import torch
from blood_cells import SIZE, cells
from torch import Tensor, nn

import crosskd
from crosskd import Distiller, Method
from crosskd.step import Trace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from dense_heads import adapter_of
from models import FAMILIES, build_detector, first_label, load_weights

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
Ratios = dict[str, list[float]]
"""By loss, one number for each batch."""


def all_methods() -> dict[str, type[Method]]:
    """The classes that the package exports, by name."""
    named = {name: getattr(crosskd, name) for name in crosskd.__all__}
    return {
        name: found
        for name, found in named.items()
        if isinstance(found, type) and issubclass(found, Method) and found is not Method
    }


def batches_of(family: str, options: argparse.Namespace) -> list[Batch]:
    """The images, cut into batches."""
    _, images, targets = cells(options.root, "train", options.images, first_label(family))
    starts = range(0, options.images, options.batch)
    return [(list(images[s : s + options.batch]), targets[s : s + options.batch]) for s in starts]


def built(family: str, backbone: str, seed: int, options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(seed)
    return build_detector(
        f"{family}_{backbone}",
        3 + first_label(family),
        width=options.width,
        anchor_scale=options.anchor_scale,
        short_side=[SIZE[0]],
        long_side=SIZE[1],
    )


def train(detector: nn.Module, batches: list[Batch], steps: int) -> None:
    """A short training on labels."""
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    for step in range(steps):
        losses = detector.train()(*batches[step % len(batches)])
        optimizer.zero_grad()
        torch.stack([loss.sum() for loss in losses.values()]).sum().backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 5)
        optimizer.step()


def gradient_norm(loss: Tensor, trace: Trace, levels: int) -> float:
    """The norm of a loss's gradient at the finest of the student's maps together."""
    maps = list(trace.student.maps)[:levels]
    gradients = torch.autograd.grad(loss, maps, retain_graph=True, allow_unused=True)
    found = [gradient.flatten() for gradient in gradients if gradient is not None]
    return torch.cat(found).norm().item() if found else 0.0


def ratios(distiller: Distiller, batches: list[Batch], levels: int) -> Ratios:
    """Each of a method's losses' gradient over that of the student's own losses, batch by batch."""
    found: Ratios = {}
    for batch in batches:
        trace = distiller.trace(*batch)
        losses = distiller.named_losses(trace)
        own = gradient_norm(torch.stack(list(trace.own_losses.values())).sum(), trace, levels)
        for name in losses.keys() - trace.own_losses.keys():
            found.setdefault(name, []).append(gradient_norm(losses[name], trace, levels) / own)
    return found


def of_family(family: str, options: argparse.Namespace) -> dict[tuple[str, str], Ratios | str]:
    """By method and moment what was measured, or why the pair can't be distilled so."""
    batches = batches_of(family, options)
    teacher = built(family, options.teacher, options.seed, options)
    if options.teacher_weights is not None:
        load_weights(teacher, options.teacher_weights)
    else:
        train(teacher, batches, options.teacher_steps)
    student = built(family, options.student, options.seed + 1, options)
    found: dict[tuple[str, str], Ratios | str] = {}
    for moment in ("fresh", "trained"):
        if moment == "trained" and options.student_weights is not None:
            load_weights(student, options.student_weights)
        elif moment == "trained":
            train(student, batches, options.student_steps)
        for name in options.methods:
            torch.manual_seed(options.seed)  # of projections and masks
            try:
                distiller = Distiller(teacher, student, all_methods()[name](), adapter_of, prove=False)
            except ValueError as error:
                found[name, moment] = str(error).partition(":")[0]
                continue
            found[name, moment] = ratios(distiller.train(), batches[: options.measured], options.levels)
    return found


def text_of(value: float) -> str:
    """Two digits."""
    rounded = f"{value:.2g}"
    return rounded if value < 100 else f"{float(rounded):.0f}"


def rows_of(families: dict[str, dict[tuple[str, str], Ratios | str]]) -> list[list[str]]:
    """A row for each loss of each method; a cell has the medians at both moments."""
    rows = []
    for name in all_methods():
        losses: dict[str, dict[str, list[str]]] = {}
        for family, found in families.items():
            for (method, _), measured in found.items():
                if method == name and not isinstance(measured, str):
                    for loss, values in measured.items():
                        cell = losses.setdefault(loss, {}).setdefault(family, [])
                        cell.append(text_of(statistics.median(values)))
        for loss in sorted(losses):
            cells_of = [", ".join(losses[loss].get(family, ["no"])) for family in families]
            rows.append([name, f"`{loss}`", *cells_of])
    return rows


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--root", type=Path, required=True, help="folder of the data")
    methods = all_methods()
    parser.add_argument("--methods", choices=methods, nargs="+", default=list(methods))
    parser.add_argument("--families", choices=FAMILIES, nargs="+", default=["retinanet", "fcos", "gfl"])
    parser.add_argument("--teacher", default="resnet34", help="the teacher's backbone")
    parser.add_argument("--teacher-weights", type=Path, help="of the teacher, for one family")
    parser.add_argument("--student", default="resnet18", help="the student's backbone")
    parser.add_argument("--student-weights", type=Path, help="of a student trained on labels, likewise")
    parser.add_argument("--weights-are", default="given weights", help="what the result says of them")
    parser.add_argument("--width", type=int, default=64, help="channels of pyramid and towers")
    parser.add_argument("--anchor-scale", type=float, default=0.25)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--measured", type=int, default=3, help="batches to measure on")
    parser.add_argument("--levels", type=int, default=3, help="to measure at, from the finest on")
    parser.add_argument("--teacher-steps", type=int, default=100)
    parser.add_argument("--student-steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="the Markdown file to write")
    options = parser.parse_args(arguments)
    if (options.teacher_weights or options.student_weights) and len(options.families) > 1:
        parser.error("weights are of one family: name it by --families")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measures all methods and writes the table."""
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    families = {family: of_family(family, options) for family in options.families}
    weights = {"teacher": options.teacher_weights, "student": options.student_weights}
    steps = {"teacher": options.teacher_steps, "student": options.student_steps}
    trained = [f"the {side} for {steps[side]} steps" for side, path in weights.items() if path is None]
    if len(trained) < len(weights):
        trained.append(options.weights_are)
    made = (
        f"- setting: {options.student} from {options.teacher}, {options.width} channels, anchor scale "
        f"{options.anchor_scale}; {options.measured} batches of {options.batch} images of BCCD's training "
        f"split, {SIZE[1]} x {SIZE[0]} pixels\n"
        f"- trained, {'; '.join(trained)}\n"
        f"- made by `benchmarks/loss_scales.py`, seed {options.seed}, on {os.cpu_count()} cores of "
        f"{measure.processor()} with {measure.versions()}"
    )
    text = "\n\n".join(
        [
            "# The methods' gradients at the student's maps",
            made,
            EXPLANATION.format(levels=options.levels),
            measure.table(["method", "loss", *families], rows_of(families)),
        ]
    )
    measure.write(text, options.output)


EXPLANATION = """\
The norm of each loss's gradient at the student's {levels} finest feature maps together, with its default
weight, over the norm of the gradient of the student's own losses there: the median over batches, for a fresh
student and for one that was trained on labels. "no": the method can't be used for such a pair. The coarser
maps of such small images are a pixel or two wide, and would outweigh all others in losses that are means
over a map."""


if __name__ == "__main__":
    main()
