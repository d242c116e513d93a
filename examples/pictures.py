"""Curves of a run, and detections of several models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from coco_data import CocoFolder
from methods_table import label_of
from torch import Tensor, nn

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
    """Draws training losses and validation AP by epoch of each model; the student's own losses only."""
    figure, (losses, precision) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colour = colours(list(histories))
    for name, history in histories.items():
        style = {"label": label_of(name), "color": colour[name], "lw": 1.8}
        own = [sum(v for k, v in entry["losses"].items() if "kd_" not in k) for entry in history]
        losses.plot([entry["epoch"] for entry in history], own, **style)
        evaluated = [entry for entry in history if "metrics" in entry]
        values = [entry["metrics"]["AP"] for entry in evaluated]
        precision.plot([entry["epoch"] for entry in evaluated], values, marker="o", ms=4, **style)
    losses.set(xlabel="epoch", ylabel="loss against the ground truth", title="training loss", yscale="log")
    precision.set(xlabel="epoch", ylabel="AP", title="validation")
    for axes in (losses, precision):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if histories:
        precision.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


@torch.no_grad()
def draw_detections(
    detectors: dict[str, nn.Module],
    dataset: CocoFolder,
    path: Path,
    *,
    device: torch.device,
    threshold: float = 0.3,
    images: int = 4,
) -> None:
    """Draws the ground truth and each model's detections side by side, a row an image.

    Args:
        detectors: by name.
        dataset: the images, in the order of how many objects they show; those in the middle are drawn.
        path: the PNG file.
        device: what the detectors are on.
        threshold: detections of at least this score are drawn.
        images: how many rows.
    """
    chosen = _busy_images(dataset, images)
    columns = len(detectors) + 1
    shapes = [image.shape for _, image in chosen]
    heights = [3.1 * height / width for _, height, width in shapes]
    figure, grid = plt.subplots(
        len(chosen),
        columns,
        figsize=(3.1 * columns, sum(heights) + 0.8),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for row, (index, image) in zip(grid, chosen, strict=True):
        image_id = dataset.ids[index]
        _show(row[0], image, dataset.boxes[image_id], dataset.labels[image_id], None)
        for axes, detector in zip(row[1:], detectors.values(), strict=True):
            was_training = detector.training
            (output,) = detector.eval()([image.to(device).float() / 255])
            detector.train(was_training)
            kept = output["scores"] >= threshold
            boxes, labels, scores = (output[key][kept].cpu() for key in ("boxes", "labels", "scores"))
            _show(axes, image, boxes, labels, scores)
    for axes, name in zip(grid[0], ("ground truth", *(label_of(name) for name in detectors)), strict=True):
        axes.set_title(name)
    names = [dataset.names[k] for k in range(len(dataset.names))]
    handles = [
        Rectangle((0, 0), 1, 1, color=_class_colour(dataset.label_of[c])) for c in sorted(dataset.label_of)
    ]
    if len(names) <= 12:
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _busy_images(dataset: CocoFolder, count: int) -> list[tuple[int, Tensor]]:
    order = sorted(range(len(dataset)), key=lambda index: -len(dataset.boxes[dataset.ids[index]]))
    start = max(0, min(len(order) // 8, len(order) - count))
    pictures = ((index, dataset.read(index)) for index in order[start:])
    readable = ((index, image) for index, image in pictures if image is not None)
    return [pair for pair, _ in zip(readable, range(count), strict=False)]


def _class_colour(label: int) -> Any:
    return plt.get_cmap("Set1")(label % 9)


def _show(axes: Axes, image: Tensor, boxes: Tensor, labels: Tensor, scores: Tensor | None) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set_axis_off()
    for number, (box, label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
        left, top, right, bottom = box
        colour = _class_colour(label)
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=colour, lw=1.6))
        if scores is not None:
            text = f"{scores[number]:.2f}"
            box_style = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
            axes.text(left, top, text, fontsize=6, color="white", bbox=box_style, va="bottom", clip_on=True)
