"""Students compared on the same ground truth: numbers, intervals, Markdown and a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from crosskd.compare.collect import Detections
from crosskd.compare.data import Source, read_detections, read_ground_truth
from crosskd.compare.images import ImageResults, look_at_images
from crosskd.compare.picture import draw_changes
from crosskd.compare.precision import class_precision, evaluate, over_classes, resampled_precision

if TYPE_CHECKING:
    from pycocotools.coco import COCO

__all__ = ["Comparison", "Estimate", "compare"]

Samples = NDArray[np.float64]  # of the images as they are, then of each resampling

_QUANTILES = (0.025, 0.975)


class Estimate(NamedTuple):
    """A number with its bootstrap interval of 95 %; NaN where there is nothing to measure it on."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, repr=False, eq=False)
class Comparison:
    """What `compare` found; ``print`` it, or `save` it. Precision is from 0 to 100.

    Attributes:
        names: of the students; all others are compared with the first.
        metrics: by name, then ``"AP"``, ``"AP50"``, ``"AP75"``, ``"AP small"``, ``"AP medium"`` or
            ``"AP large"``.
        differences: the same of each other student minus the first, over the same resampled images.
        classes: AP by name, then class.
        class_differences: differences of it.
        objects: how many there are of each class, crowds left out.
        images: by name, what it finds in each image, in the order of ``image_ids``.
        image_ids: of the ground truth, ascending.
        costs: by name, then what it is called; empty without costs.
        resamples: how many resamplings the intervals are of.
    """

    names: tuple[str, ...]
    metrics: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    classes: dict[str, dict[str, Estimate]]
    class_differences: dict[str, dict[str, Estimate]]
    objects: dict[str, int]
    images: dict[str, ImageResults]
    image_ids: tuple[Any, ...]
    costs: dict[str, dict[str, float]]
    resamples: int
    _ground_truth: COCO
    _detections: dict[str, COCO]
    _folder: Path | None

    def __repr__(self) -> str:
        return self.markdown()

    def markdown(self) -> str:
        """The whole comparison as Markdown, whose tables can be read as plain text too."""
        first, *others = self.names
        differences = [f"{name} - {first}" for name in others]
        parts = [
            f"# {' and '.join(self.names)}, compared on {len(self.image_ids)} images",
            "\n".join(f"- {self._verdict(name)}" for name in others),
            _table(["", *self.names, *differences], self._rows(self.metrics, self.differences)),
            f"In brackets: the 95 % bootstrap interval over {self.resamples:,} resamplings of the images, "
            "the same ones for every student. That is how much depends on the choice of images, not how much "
            'another training run would differ. "-": the ground truth has no such objects.',
            "## AP of each class",
            _table(["class", "objects", *self.names, *differences], self._class_rows()),
            "## Image by image",
            _table(["", *self.names], self._image_rows()),
            "Each student's detections count from the score on at which its F1 over all images is best. An "
            "object is found if a detection of its class has an IoU of 0.5 with it. An image is better if it "
            "has fewer mistakes, missed objects and false alarms, in the mean over AP's IoU thresholds.",
        ]
        if self.costs:
            parts += ["## Cost", _table(["", *self.names], self._cost_rows())]
        return "\n\n".join(parts) + "\n"

    def save(self, folder: str | Path, *, pictures: int = 3) -> None:
        """Writes ``comparison.md`` and, where the images were given, ``comparison.png``.

        Args:
            folder: is made where it isn't there.
            pictures: at most so many images with the largest gains of each student over the first, and so
                many with the largest losses; images whose file can't be read are passed over.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = self.markdown()
        if self._folder is not None and self._draw(folder / "comparison.png", pictures):
            text += (
                "\n## The largest changes\n\nGreen: an object found. Red: a false alarm. Yellow: an object "
                "missed, or, in the first column, the ground truth.\n\n"
                "![The largest changes](comparison.png)\n"
            )
        (folder / "comparison.md").write_text(text, encoding="utf-8")

    def changes(self, name: str) -> list[tuple[Any, float]]:
        """Images with how many mistakes fewer a student makes than the first, the largest gain first.

        Args:
            name: one of ``names``.

        Returns:
            Image ids and differences of ``mistakes`` in ``images``.
        """
        change = self.images[self.names[0]].mistakes - self.images[name].mistakes
        order = np.argsort(-change.round(6), kind="stable")
        return [(self.image_ids[n], float(change[n])) for n in order]

    def _verdict(self, name: str) -> str:
        difference = self.differences[name]["AP"]
        clear = difference.low > 0 or difference.high < 0
        return f"{name} beside {self.names[0]}: AP {_signed(difference)}. " + (
            "0 lies outside this interval, so the choice of images alone doesn't explain it."
            if clear
            else "0 lies inside this interval, so the choice of images may explain it."
        )

    def _rows(
        self, values: Mapping[str, Mapping[str, Estimate]], differences: Mapping[str, Mapping[str, Estimate]]
    ) -> list[list[str]]:
        return [
            [
                key,
                *(_plain(values[name][key]) for name in self.names),
                *(_signed(difference[key]) for difference in differences.values()),
            ]
            for key in values[self.names[0]]
        ]

    def _class_rows(self) -> list[list[str]]:
        rows = self._rows(self.classes, self.class_differences)
        return [[name, str(self.objects[name]), *cells] for name, *cells in rows]

    def _image_rows(self) -> list[list[str]]:
        first, *others = self.names
        found = {name: self.images[name].found_ids for name in self.names}
        total = sum(self.objects.values())
        rows = [
            ["score at least", *(_number(self.images[name].threshold) for name in self.names)],
            [f"objects found, of {total}", *(str(len(found[name])) for name in self.names)],
            ["false alarms", *(str(self.images[name].false_alarms.sum()) for name in self.names)],
            [f"found, not by {first}", "", *(str(len(found[name] - found[first])) for name in others)],
            [f"missed, found by {first}", "", *(str(len(found[first] - found[name])) for name in others)],
        ]
        changes = {name: np.array([change for _, change in self.changes(name)]) for name in others}
        for text, sign in (("better", 1), ("worse", -1)):
            counts = [str(np.count_nonzero(sign * changes[name] > 1e-6)) for name in others]
            rows.append([f"images {text} than {first}", "", *counts])
        return rows

    def _cost_rows(self) -> list[list[str]]:
        keys = dict.fromkeys(key for costs in self.costs.values() for key in costs)
        return [[key, *(_number(self.costs.get(name, {}).get(key)) for name in self.names)] for key in keys]

    def _draw(self, path: Path, pictures: int) -> bool:
        assert self._folder is not None
        rows = []
        for name in self.names[1:]:
            changes = self.changes(name)
            gains = [image for image, change in changes if change > 1e-6]
            losses = [image for image, change in reversed(changes) if change < -1e-6]
            rows += [(name, "gain", gains), (name, "loss", losses)]
        columns = {name: (self._detections[name], self.images[name]) for name in self.names}
        return draw_changes(rows, columns, self._ground_truth, self._folder, path, pictures)


def compare(
    ground_truth: str | Path | Mapping[str, Any] | COCO,
    detections: Mapping[str, Source],
    *,
    images: str | Path | None = None,
    costs: Mapping[str, Mapping[str, float]] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Compares finished students on the same ground truth, with COCO's metrics by pycocotools.

    Args:
        ground_truth: a JSON file in COCO form, its content, or a pycocotools ``COCO``.
        detections: by the student's name, two or more: what `collect_detections` returned, a list in COCO's
            result form (boxes xywh in pixels), or the JSON file of one. All are compared with the first.
        images: the folder that the images' file names are relative to, for the picture of `Comparison.save`.
        costs: by name, then what it is called: numbers for the table of costs. What `collect_detections`
            measured stands there anyway.
        resamples: how many times the images are drawn anew, with replacement, for the intervals.
        seed: of these draws. All students are measured on the same ones, so intervals of differences
            are those of paired images.

    Raises:
        ValueError: fewer than two students, ground truth or detections that COCO's metrics would be wrong on.
        FileNotFoundError: a file or folder that isn't there.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), percentile intervals.

    Example:
        >>> box = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 40]}
        >>> truth = {
        ...     "images": [{"id": 1, "width": 100, "height": 100, "file_name": "1.jpg"}],
        ...     "annotations": [{"id": 1, **box}],
        ...     "categories": [{"id": 1, "name": "cell"}],
        ... }
        >>> shifted = {**box, "bbox": [14, 10, 40, 40], "score": 0.9}
        >>> comparison = compare(truth, {"alone": [shifted], "distilled": [{**box, "score": 0.8}]})
        >>> {name: round(of_name["AP"].value) for name, of_name in comparison.metrics.items()}
        {'alone': 70, 'distilled': 100}
    """
    if len(detections) < 2:
        raise ValueError(f"two students or more are compared, got {list(detections)}")
    if resamples < 1:
        raise ValueError(f"resamples must be 1 or more, got {resamples}")
    unknown = sorted(set(costs or {}) - set(detections))
    if unknown:
        raise ValueError(f"costs name {unknown}, the students are {list(detections)}")
    folder = None if images is None else Path(images)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"images: there is no folder {folder}")
    truth = read_ground_truth(ground_truth)
    found: dict[str, COCO] = {}
    for name, source in detections.items():
        found[name] = read_detections(name, source, truth)
    number = len(truth.imgs)
    counts = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=resamples)
    first, *others = found
    overall: dict[str, dict[str, Samples]] = {}
    classes: dict[str, dict[str, Samples]] = {}
    scores: dict[str, ImageResults] = {}
    for name, coco in found.items():
        evaluation = evaluate(truth, coco)
        labels = _class_names(truth, evaluation.params.catIds)
        drawn = resampled_precision(evaluation, torch.from_numpy(counts))
        of_class = {k: 100 * np.concatenate([v, drawn[k]]) for k, v in class_precision(evaluation).items()}
        overall[name] = {key: over_classes(rows) for key, rows in of_class.items()}
        classes[name] = dict(zip(labels.values(), of_class["AP"].T, strict=True))
        scores[name] = look_at_images(evaluation)
    objects = Counter(a["category_id"] for a in truth.anns.values() if not a["iscrowd"])
    return Comparison(
        names=tuple(found),
        metrics={name: _estimates(rows) for name, rows in overall.items()},
        differences={name: _estimates(_minus(overall[name], overall[first])) for name in others},
        classes={name: _estimates(rows) for name, rows in classes.items()},
        class_differences={name: _estimates(_minus(classes[name], classes[first])) for name in others},
        objects={label: objects[category] for category, label in labels.items()},
        images=scores,
        image_ids=tuple(sorted(truth.imgs)),
        costs=_all_costs(detections, costs or {}),
        resamples=resamples,
        _ground_truth=truth,
        _detections=found,
        _folder=folder,
    )


def _minus(left: Mapping[str, Samples], right: Mapping[str, Samples]) -> dict[str, Samples]:
    return {key: left[key] - right[key] for key in left}


def _estimates(samples: Mapping[str, Samples]) -> dict[str, Estimate]:
    """Of each array: its first number, which is of the images as they are, and quantiles of the others."""
    estimates = {}
    for key, (value, *drawn) in samples.items():
        there = np.array(drawn)[~np.isnan(drawn)]
        low, high = np.quantile(there, _QUANTILES) if len(there) else (np.nan, np.nan)
        estimates[key] = Estimate(float(value), float(low), float(high))
    return estimates


def _class_names(ground_truth: COCO, categories: Sequence[int]) -> dict[int, str]:
    """A name for each category, in the order given; with its id where two are called the same."""
    names = {category: str(ground_truth.cats[category].get("name", category)) for category in categories}
    times = Counter(names.values())
    return {c: name if times[name] == 1 else f"{name} ({c})" for c, name in names.items()}


def _all_costs(
    detections: Mapping[str, Source], costs: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, source in detections.items():
        measured: dict[str, float | None] = {}
        if isinstance(source, Detections):
            measured = {"parameters": source.parameters, "seconds per image": source.seconds_per_image}
        known = {key: float(value) for key, value in measured.items() if value is not None}
        found[name] = {**known, **costs.get(name, {})}
    return found if any(found.values()) else {}


def _plain(estimate: Estimate, sign: str = "") -> str:
    if np.isnan(estimate.value):
        return "-"
    # Adding 0 makes 0.0 of -0.0.
    value, low, high = (f"{round(number, 1) + 0.0:{sign}.1f}" for number in estimate)
    return f"{value} ({low} to {high})"


def _signed(estimate: Estimate) -> str:
    return _plain(estimate, "+")


def _number(value: float | None) -> str:
    if value is None or not np.isfinite(value):
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns of one width, the first one to the left."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[n]) for row in cells)) for n in range(len(header))]
    lines = []
    for row in cells:
        padded = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("| " + " | ".join(padded) + " |")
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])
