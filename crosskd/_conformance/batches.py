"""Other batches, types and devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from crosskd._checks import compute_dtype
from crosskd._conformance.bench import PARTS, Batch, Bench, Finding, Skipped, Taken, told
from crosskd._conformance.compare import near, some
from crosskd._conformance.training import finite_findings, loss_findings, plain_losses, same, state_of

__all__ = [
    "autocast",
    "detections",
    "float64",
    "no_objects",
    "odd_image_size",
    "one_image",
    "other_device",
    "unlabelled_images",
]

_DEVICE_ROUNDING = 1e-2


def detections(bench: Bench) -> Iterator[Finding]:
    """In eval mode the student answers, and stays as it is."""
    distiller = bench.distiller().eval()
    before = state_of(distiller.student)
    with torch.no_grad():
        distiller(bench.batch[0])
    after = state_of(distiller.student)
    changed = [name for name in before if not same(before[name], after.get(name))]
    if changed:
        yield Finding(
            f"detect() has changed the student: {some(sorted(changed))}",
            "the student as it was",
            "detect() sets the mode or works in place",
        )


def unlabelled_images(bench: Bench) -> Iterator[Finding]:
    """Without targets the distillation losses stand alone."""
    taken = bench.step((bench.batch[0], None))
    if taken.own:
        yield Finding(
            f"losses of the student's own without targets: {sorted(taken.own)}",
            "distillation losses alone",
            "prepare() makes targets where none were given",
        )
    yield from finite_findings(taken)


def one_image(bench: Bench) -> Iterator[Finding]:
    """A batch of one image."""
    yield from loss_findings(bench, bench.varied("one image", _first_image))


def no_objects(bench: Bench) -> Iterator[Finding]:
    """Images whose targets hold no object."""
    yield from loss_findings(bench, bench.varied("no objects", _without_objects))


def odd_image_size(bench: Bench) -> Iterator[Finding]:
    """Images whose sides are multiples of nothing."""
    images, targets = bench.varied("odd image size", _cropped)
    if targets is not None:
        yield from loss_findings(bench, (images, targets))
        return
    yield from finite_findings(bench.step((images, None)))


def autocast(bench: Bench) -> Iterator[Finding]:
    """Under bfloat16 autocast losses are finite, and the distillation's in float32."""
    device = next(bench.student.parameters()).device.type
    if device not in ("cpu", "cuda"):
        raise Skipped(f"nothing is known of autocast on {device}")
    with torch.autocast(device, dtype=torch.bfloat16):
        plain_losses(bench, bench.batch)
        taken = bench.step()
    yield from _type_findings(taken)
    yield from finite_findings(taken)


def float64(bench: Bench) -> Iterator[Finding]:
    """Detectors and images in float64, on the CPU."""
    if next(bench.student.parameters()).device.type != "cpu":
        raise Skipped("the detectors are not on the CPU")
    wide = bench.converted(dtype=torch.float64)
    plain_losses(wide, wide.batch)
    taken = wide.step()
    yield from _type_findings(taken)
    yield from finite_findings(taken)


def other_device(bench: Bench) -> Iterator[Finding]:
    """The same losses on a CUDA device, or on the CPU where the detectors are on one."""
    here = next(bench.student.parameters()).device
    there = _elsewhere(here)
    if there is None:
        raise Skipped("there is no CUDA device here")
    expected, taken = bench.step(), bench.converted(device=there).step()
    losses = {**taken.own, **taken.distilled}
    for name, loss in {**expected.own, **expected.distilled}.items():
        if not near(loss, losses[name].to(loss.device), _DEVICE_ROUNDING):
            yield Finding(
                f"{name} is {loss.item():.6g} on {here.type} and {losses[name].item():.6g} on {there.type}",
                "the same losses on every device",
                "something is read before it has been calculated, or kept on one device",
            )
    yield from finite_findings(taken)


def _elsewhere(device: torch.device) -> torch.device | None:
    """The CPU from anywhere else, a CUDA device from the CPU, if there is one."""
    if device.type != "cpu":
        return torch.device("cpu")
    return torch.device("cuda") if torch.cuda.is_available() else None


def _type_findings(taken: Taken) -> Iterator[Finding]:
    """Losses of a smaller type than float32, or than the head's own predictions."""
    for heard in taken.heard:
        for name, loss in heard.losses.items():
            expected = compute_dtype(getattr(heard.seen.student, PARTS[name]))
            finding = Finding(
                f"{name} is {loss.dtype}, of predictions that are {expected} or narrower",
                f"{expected}",
                "decode() casts to a type of its own",
            )
            yield from told(heard.part, [finding] if loss.dtype != expected else [])


def _first_image(images: Any, targets: Any) -> Batch:
    if not all(isinstance(part, Tensor | list | tuple) for part in (images, targets)):
        raise Skipped(
            f"images are a {type(images).__name__} and targets a {type(targets).__name__}: pass one_image="
        )
    return images[:1], targets[:1]


def _without_objects(images: Any, targets: Any) -> Batch:
    _require_boxes(targets, "without_objects=")
    return images, [
        _chosen(target, torch.zeros(len(target["boxes"]), dtype=torch.bool)) for target in targets
    ]


def _cropped(images: Any, targets: Any) -> Batch:
    """Images without their last rows and columns; without targets where nothing tells how to cut those."""
    listed = isinstance(images, list | tuple) and all(isinstance(image, Tensor) for image in images)
    if not listed and not isinstance(images, Tensor):
        raise Skipped(f"images are a {type(images).__name__}: pass odd_size=")
    height, width = (min(int(image.shape[at]) for image in images) for at in (-2, -1))
    height, width = (side - max(side // 8, 1) | 1 for side in (height, width))  # odd numbers
    cut = (
        images[..., :height, :width]
        if isinstance(images, Tensor)
        else [i[..., :height, :width] for i in images]
    )
    try:
        _require_boxes(targets, "odd_size=")
    except Skipped:
        return cut, None
    limit = torch.tensor([width, height, width, height])
    inside = []
    for target in targets:
        boxes = torch.minimum(target["boxes"], limit.to(target["boxes"]))
        inside.append(_chosen({**target, "boxes": boxes}, ((boxes[:, 2:] - boxes[:, :2]) > 1).all(dim=1)))
    return cut, inside


def _require_boxes(targets: Any, argument: str) -> None:
    listed = isinstance(targets, list | tuple)
    if not listed or not all(isinstance(t, Mapping) and {"boxes", "labels"} <= t.keys() for t in targets):
        raise Skipped(f"targets are no dicts of boxes and labels: pass {argument}")


def _chosen(target: Mapping[str, Any], kept: Tensor) -> dict[str, Any]:
    """A target with some of its objects alone."""
    rows = len(kept)
    return {
        key: value[kept.to(value.device)]
        if isinstance(value, Tensor) and value.shape[:1] == (rows,)
        else value
        for key, value in target.items()
    }
