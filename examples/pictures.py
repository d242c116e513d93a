"""Curves of a run, and detections of several models side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from coco_data import CocoFolder
from methods_table import label_of
from torch import Tensor, nn
from torchvision.ops import box_iou

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

_COLOURS = {"teacher": "#7f7f7f", "none": "#1f77b4", "mimic": "#ff7f0e", "crosskd": "#d62728"}


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each model: those that are always there have one of their own."""
    palette = [to_hex(c) for name in ("tab10", "Dark2", "tab20") for c in plt.get_cmap(name).colors]
    free = [colour for colour in palette if colour not in _COLOURS.values()]
    others = [name for name in names if name not in _COLOURS]
    return {**_COLOURS, **{name: free[k % len(free)] for k, name in enumerate(others)}}


def draw_curves(histories: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws training losses, a model's own summed and each of distillation, and validation AP by epoch."""
    figure, (losses, precision) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colour = colours(list(histories))
    for name, history in histories.items():
        label, style = label_of(name), {"color": colour[name], "lw": 1.8}
        epochs = [entry["epoch"] for entry in history]
        own = [sum(v for k, v in entry["losses"].items() if "kd_" not in k) for entry in history]
        losses.plot(epochs, own, label=label, **style)
        distilling = sorted({k for entry in history for k in entry["losses"] if "kd_" in k})
        for key, line in zip(distilling, itertools.cycle(("--", ":", "-.")), strict=False):
            values = [entry["losses"].get(key, math.nan) for entry in history]
            losses.plot(epochs, values, ls=line, label=f"{label}: {key}", **style)
        evaluated = [entry for entry in history if "metrics" in entry]
        values = [entry["metrics"]["AP"] for entry in evaluated]
        precision.plot(
            [entry["epoch"] for entry in evaluated], values, marker="o", ms=4, label=label, **style
        )
    losses.set(xlabel="epoch", ylabel="loss", title="own losses, and those of distillation", yscale="log")
    precision.set(xlabel="epoch", ylabel="AP", title="validation")
    for axes in (losses, precision):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if histories:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


@torch.no_grad()
def draw_detections(
    detectors: dict[str, nn.Module],
    dataset: CocoFolder,
    path: Path,
    *,
    device: torch.device,
    threshold: float = 0.4,
    images: int = 4,
) -> None:
    """Draws the ground truth and each model's detections side by side, a row an image.

    A right detection is the first on an object of its class, with an IoU of at least 0.5. Its box is a solid
    line, that of a wrong one dotted; the columns' titles count both.

    Args:
        detectors: by name.
        dataset: the images, in the order of how many objects they show; those in the middle are drawn.
        path: the PNG file.
        device: what the detectors are on.
        threshold: detections of at least this score are drawn.
        images: how many rows.
    """
    chosen = _busy_images(dataset, images)
    heights = [3.1 * image.shape[1] / image.shape[2] for _, image in chosen]
    figure, grid = plt.subplots(
        len(chosen),
        len(detectors) + 1,
        figsize=(3.1 * (len(detectors) + 1), sum(heights) + 1),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    truths = [dataset.objects(index) for index, _ in chosen]
    for axes, (_, image), (boxes, labels) in zip(grid[:, 0], chosen, truths, strict=True):
        _show(axes, image, boxes, labels)
    grid[0, 0].set_title(f"ground truth\n{sum(len(boxes) for boxes, _ in truths)} objects")
    for column, (name, detector) in zip(grid[:, 1:].T, detectors.items(), strict=True):
        was_training = detector.training
        detector.eval()
        right: list[bool] = []
        for axes, (_, image), truth in zip(column, chosen, truths, strict=True):
            (output,) = detector([image.to(device).float() / 255])
            kept = output["scores"] >= threshold
            boxes, labels, scores = (output[key][kept].cpu() for key in ("boxes", "labels", "scores"))
            hits = _right(boxes, labels, *truth)
            _show(axes, image, boxes, labels, scores, hits)
            right += hits
        detector.train(was_training)
        column[0].set_title(f"{label_of(name)}\n{sum(right)} right, {len(right) - sum(right)} wrong")
    names = [dataset.names[k] for k in range(len(dataset.names))]
    handles = [
        Rectangle((0, 0), 1, 1, color=_class_colour(dataset.label_of[c])) for c in sorted(dataset.label_of)
    ]
    if len(names) <= 12:
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _busy_images(dataset: CocoFolder, count: int) -> list[tuple[int, Tensor]]:
    order = sorted(range(len(dataset)), key=lambda index: -dataset.counts[index])
    start = max(0, min(len(order) // 8, len(order) - count))
    pictures = ((index, dataset.read(index)) for index in order[start:])
    readable = ((index, image) for index, image in pictures if image is not None)
    return [pair for pair, _ in zip(readable, range(count), strict=False)]


def _class_colour(label: int) -> Any:
    return plt.get_cmap("Set1")(label % 9)


def _right(boxes: Tensor, labels: Tensor, true_boxes: Tensor, true_labels: Tensor) -> list[bool]:
    """Whether each detection, the most confident first, is the first on an object of its class."""
    overlaps = box_iou(boxes, true_boxes) * (labels[:, None] == true_labels)
    right = []
    for overlap in overlaps:
        right.append(bool((overlap >= 0.5).any()))
        if right[-1]:
            overlaps[:, overlap.argmax()] = 0
    return right


def _show(
    axes: Axes,
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    scores: Tensor | None = None,
    right: list[bool] | None = None,
) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set_axis_off()
    for number, ((x1, y1, x2, y2), label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
        colour = _class_colour(label)
        line = "-" if right is None or right[number] else ":"
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, lw=1.8, ls=line))
        if scores is not None:
            text = f"{scores[number]:.2f}"
            box_style = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
            axes.text(x1, y1, text, fontsize=6, color="white", bbox=box_style, va="bottom", clip_on=True)
