"""Detections of a detector, or of an exported model, in COCO's result form."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["Detections", "collect_detections"]


@dataclass(frozen=True)
class Detections:
    """What a detector found in images, and what that cost.

    Attributes:
        results: a dict for each detection, in COCO's result form: ``image_id``, ``category_id``, ``bbox``
            (x, y, width, height in pixels) and ``score``. ``json.dump`` writes them to a file.
        image_ids: every image that the detector was shown, with detections or without.
        parameters: how many the detector has; ``None`` where it is a function.
        seconds_per_image: the median over the batches; ``None`` where it isn't known.
    """

    results: list[dict[str, Any]]
    image_ids: tuple[int, ...]
    parameters: int | None
    seconds_per_image: float | None


@torch.no_grad()
def collect_detections(
    detector: Callable[[list[Tensor]], Sequence[Mapping[str, Any]]],
    loader: Iterable[tuple[Sequence[Tensor], Sequence[Mapping[str, Any]]]],
    categories: Mapping[int, int] | None = None,
) -> Detections:
    """Runs a detector over a data set, in eval mode, and keeps what it finds.

    Args:
        detector: a detector of torchvision's form, or any function of a list of images (of an exported
            model, say; docs/yolo.md and docs/transformers.md have those of their detectors). It answers with
            a dict for each image: ``boxes`` of shape (detections, 4), xyxy in pixels of the image that it was
            given, ``scores`` and ``labels`` of shape (detections,).
        loader: batches of images, each of shape (3, height, width) and of the size that the ground truth
            knows, and targets, dicts that hold ``image_id``.
        categories: label to category id. Without it labels are taken for category ids.

    Returns:
        The detections in COCO's result form, for `crosskd.compare`.

    Raises:
        ValueError: no target with ``image_id``, an image that comes twice, an answer of another form, a label
            that ``categories`` doesn't have.

    Example:
        >>> import torch
        >>> def detector(images):
        ...     box, score, label = torch.tensor([[10.0, 20.0, 40.0, 80.0]]), torch.ones(1), torch.tensor([1])
        ...     return [{"boxes": box, "scores": score, "labels": label} for _ in images]
        >>> loader = [([torch.rand(3, 100, 100)], [{"image_id": 7}])]
        >>> found = collect_detections(detector, loader, categories={1: 18})
        >>> {key: found.results[0][key] for key in ("image_id", "category_id", "bbox")}
        {'image_id': 7, 'category_id': 18, 'bbox': [10.0, 20.0, 30.0, 60.0]}
    """
    module = detector if isinstance(detector, nn.Module) else nn.Module()
    was_training = {part: part.training for part in module.modules()}
    module.eval()
    device = next((parameter.device for parameter in module.parameters()), None)
    results: list[dict[str, Any]] = []
    seconds: list[float] = []
    image_ids: dict[int, None] = {}
    try:
        for images, targets in loader:
            batch = [image if device is None else image.to(device) for image in images]
            begun = time.perf_counter()
            outputs = detector(batch)
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append((time.perf_counter() - begun) / max(1, len(batch)))
            if len(outputs) != len(batch) or len(targets) != len(batch):
                raise ValueError(
                    f"{len(batch)} images came with {len(targets)} targets and {len(outputs)} answers, "
                    "expected one target and one dict of detections for each image"
                )
            for target, output in zip(targets, outputs, strict=True):
                image_id = _image_id(target)
                if image_id in image_ids:
                    raise ValueError(
                        f"the loader shows image {image_id} twice: what is found would count twice"
                    )
                image_ids[image_id] = None
                results += _coco_results(image_id, output, categories)
    finally:
        for part, mode in was_training.items():
            part.training = mode
    parameters = sum(parameter.numel() for parameter in module.parameters()) if module is detector else None
    median = statistics.median(seconds) if seconds else None
    return Detections(results, tuple(image_ids), parameters, median)


def _image_id(target: Any) -> int:
    if not isinstance(target, Mapping) or "image_id" not in target:
        raise ValueError(
            f"each target must be a dict with image_id, got {type(target).__name__}: of torchvision's "
            "CocoDetection, torchvision.datasets.wrap_dataset_for_transforms_v2 makes such"
        )
    return int(target["image_id"])


def _array(values: Any) -> NDArray[Any]:
    if isinstance(values, Tensor) and values.dtype == torch.bfloat16:  # which NumPy doesn't have
        values = values.float()
    return values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _coco_results(
    image_id: int, output: Mapping[str, Any], categories: Mapping[int, int] | None
) -> list[dict[str, Any]]:
    keys = ("boxes", "scores", "labels")
    if not isinstance(output, Mapping) or any(key not in output for key in keys):
        shown = sorted(output) if isinstance(output, Mapping) else type(output).__name__
        raise ValueError(f"detections of an image must be a dict with {', '.join(keys)}, got {shown}")
    boxes, scores, labels = (_array(output[key]) for key in keys)
    if boxes.shape != (len(scores), 4) or scores.shape != labels.shape:
        raise ValueError(
            "boxes, scores and labels of an image must have shapes (n, 4), (n,) and (n,), got "
            f"{boxes.shape}, {scores.shape} and {labels.shape}"
        )
    results = []
    for (left, top, right, bottom), score, label in zip(
        boxes.tolist(), scores.tolist(), labels.tolist(), strict=True
    ):
        if categories is not None and label not in categories:
            raise ValueError(f"the detector answers label {label}, categories has {sorted(categories)}")
        category = label if categories is None else categories[label]
        box = [left, top, right - left, bottom - top]
        results.append({"image_id": image_id, "category_id": category, "bbox": box, "score": score})
    return results
