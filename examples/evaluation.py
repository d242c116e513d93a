"""Detections of a data set and their COCO metrics, over one process or several."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
import torch.distributed as dist
from coco_data import CocoFolder, keep_pages_shared
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from crosskd.compare import Detections
from crosskd.compare.data import read_detections, read_ground_truth
from crosskd.compare.images import look_at_images
from crosskd.compare.precision import evaluate as evaluate_matches

METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


class Pixels(Dataset[Tensor | None]):
    """The images of a data set as they are; ``None`` for one that can't be read."""

    def __init__(self, dataset: CocoFolder) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Tensor | None:
        return self.dataset.read(index)


@torch.no_grad()
def detect(
    detector: nn.Module,
    dataset: CocoFolder,
    *,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
) -> dict[int, list[dict[str, Any]]]:
    """Detections by image id, in COCO's result form, of this process's share of the images."""
    was_training = detector.training
    detector.eval()
    found: dict[int, list[dict[str, Any]]] = {}
    indices = range(rank, len(dataset), ranks)
    batches = [list(indices[n : n + batch_size]) for n in range(0, len(indices), batch_size)]
    loader = DataLoader(
        Pixels(dataset),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=keep_pages_shared,
        generator=torch.Generator(),  # the seed of workers isn't taken from the training's random numbers
    )
    for chosen, images in zip(batches, loader, strict=True):
        pairs = zip(chosen, images, strict=True)
        readable = {i: image.to(device).float() / 255 for i, image in pairs if image is not None}
        outputs = detector(list(readable.values())) if readable else []
        for index in chosen:
            found[dataset.ids[index]] = []
        for index, output in zip(readable, outputs, strict=True):
            found[dataset.ids[index]] = coco_results(dataset, dataset.ids[index], output)
    detector.train(was_training)
    return found


def coco_results(dataset: CocoFolder, image_id: int, output: dict[str, Tensor]) -> list[dict[str, Any]]:
    """One image's detections in COCO's result form (xywh); labels that are no category are left out."""
    boxes, scores, labels = (output[key].cpu() for key in ("boxes", "scores", "labels"))
    sizes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    return [
        {"image_id": image_id, "category_id": dataset.category_of[label], "bbox": box, "score": score}
        for box, score, label in zip(sizes.tolist(), scores.tolist(), labels.tolist(), strict=True)
        if label in dataset.category_of
    ]


def evaluate(
    detector: nn.Module, dataset: CocoFolder, *, batch_size: int, device: torch.device, workers: int = 0
) -> dict[str, float]:
    """COCO's box metrics, from 0 to 100, and the numbers of images and of those that can't be read.

    Args:
        detector: answers a list of images with boxes, scores and labels.
        dataset: what it is measured on; of several processes each detects in its share.
        batch_size: images at a time.
        device: what the detector is on.
        workers: processes that read images.
    """
    results, numbers = detect_together(
        detector, dataset, batch_size=batch_size, device=device, workers=workers
    )
    metrics: list[Any] = [None]
    if numbers:
        metrics = [{**coco_metrics(dataset.ground_truth(), results), **numbers}]
    if dist.is_initialized():
        dist.broadcast_object_list(metrics, 0)
    measured: dict[str, float] = metrics[0]
    return measured


def detect_together(
    detector: nn.Module, dataset: CocoFolder, *, batch_size: int, device: torch.device, workers: int = 0
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Detections in COCO's result form, each process's in its share of the images, for the first process.

    Returns:
        The detections, and the numbers of images and of those that can't be read; nothing in the others.
    """
    before = dataset.broken
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = {"rank": rank, "ranks": ranks, "workers": workers}
    found = detect(detector, dataset, batch_size=batch_size, device=device, **share)
    shares: list[Any] = [(found, dataset.broken - before)] * ranks
    if ranks > 1:
        dist.gather_object(shares[0], shares if rank == 0 else None)
    if rank > 0:
        return [], {}
    found = {image_id: results for share, _ in shares for image_id, results in share.items()}
    results = [result for image_id in sorted(found) for result in found[image_id]]
    return results, {"images": len(found), "unreadable_images": sum(count for _, count in shares)}


def best_score(truth: dict[str, Any], results: list[dict[str, Any]]) -> float:
    """The score from which on a detector's F1 is best, at an IoU of 0.5; infinite without detections.

    All classes count together.

    Args:
        truth: of the validation images, in COCO form.
        results: its detections there, in COCO's result form.
    """
    ground_truth = read_ground_truth(truth)
    found = Detections(results, tuple(ground_truth.imgs), None, None)
    matches = evaluate_matches(ground_truth, read_detections("teacher", found, ground_truth))
    return look_at_images(matches).threshold


def coco_metrics(truth: dict[str, Any], results: Any) -> dict[str, float]:
    """COCO's box metrics of results, from 0 to 100, without those of sizes that no object has.

    Args:
        truth: the content of a file in COCO form.
        results: detections in COCO's result form, or rows of image, x, y, width, height, score and category.
    """
    # COCO answers -1 where there is no object of a size, or none at all.
    metrics = dict(zip(METRICS, coco_stats(truth, results), strict=False))
    return {name: 100 * max(0.0, v) for name, v in metrics.items() if v >= 0 or name in METRICS[:3]}


def coco_stats(truth: dict[str, Any], results: Any) -> list[float]:
    """COCO's twelve numbers, by ``faster-coco-eval`` where it is installed, otherwise by pycocotools."""
    try:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    except ImportError:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        found = coco.loadRes(results) if len(results) else COCO()  # loadRes takes no empty list
        evaluation = COCOeval(coco, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats[:12]]  # NumPy's are not loaded with weights_only=True
