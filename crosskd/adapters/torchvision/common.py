"""What torchvision's detectors have in common: preprocessing, maps, anchors, box coding, the student's own
losses.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from crosskd._checks import compute_dtype
from crosskd.adapters.base import Adapter, Anchors, Batch, Objects, PixelCoding
from crosskd.adapters.torchvision.images import check_boxes, check_images, check_targets
from crosskd.predictions import Predictions

__all__ = [
    "TorchvisionAdapter",
    "decode_deltas",
    "image_list",
    "predict_from_tower",
    "replaced",
    "targets_of",
    "widened",
]

_PROBE_PIXELS = 256


class TorchvisionAdapter(Adapter):
    """What the adapters of torchvision's detectors have in common.

    Args:
        detector: a detector with a ``transform`` and a ``backbone``.

    Attributes:
        first_label: the smallest label of an object: 1 where 0 is the background.
        probe: (height, width) in pixels of the image that the levels' strides are read off.
    """

    first_label = 0
    probe = (_PROBE_PIXELS, _PROBE_PIXELS)

    def __init__(self, detector: Any) -> None:
        self.detector: Any = detector
        transform = detector.transform
        self.pixel_coding = PixelCoding(
            tuple(map(float, transform.image_mean)), tuple(map(float, transform.image_std))
        )
        self._read_levels()

    def _read_levels(self) -> None:
        """Reads strides and widths off what the backbone makes of an image."""
        # A copy, without the user's hooks: nothing of the detector may change.
        backbone = copy.deepcopy(self.detector.backbone).eval()
        for module in backbone.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        parameter = next(backbone.parameters(), torch.empty(0))
        assert self.pixel_coding is not None
        with torch.no_grad():
            maps = backbone(parameter.new_zeros(1, len(self.pixel_coding.mean), *self.probe))
        listed = [maps] if isinstance(maps, Tensor) else list(maps.values())
        self.strides = tuple(self.probe[1] / feature_map.shape[-1] for feature_map in listed)
        self.widths = tuple(int(feature_map.shape[1]) for feature_map in listed)

    def prepare(self, images: Any, targets: Any) -> Batch:
        """The detector's own transform.

        Args:
            images: tensors (3, height, width) with values from 0 to 1.
            targets: dicts of ``boxes`` (objects, 4), xyxy in pixels, and ``labels`` (objects,), one per
                image; or ``None``.

        Raises:
            ValueError: images or targets in another form, labels that the detector doesn't know, boxes
                without area.
            TypeError: images that are no tensors.
        """
        check_images(images)
        if targets is not None:
            check_targets(targets, len(images), self.heads[-1].num_classes, self.first_label)
        batch, resized = self.detector.transform(list(images), targets)
        sizes = tuple((int(height), int(width)) for height, width in batch.image_sizes)
        if resized is None:
            return Batch(batch.tensors, sizes)
        check_boxes(resized)
        objects = tuple(Objects(target["boxes"], target["labels"]) for target in resized)
        return Batch(batch.tensors, sizes, objects, resized)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """The backbone's feature maps."""
        maps = self.detector.backbone(pixels)
        return [maps] if isinstance(maps, Tensor) else list(maps.values())

    def own_head_outputs(self, batch: Batch, modules: Sequence[nn.Module]) -> list[tuple[Any, Any]]:
        """The last inputs and output of some modules while the detector's own forward runs on a batch.

        The transform gives the batch as it is: what the teacher makes of its pixels is to be seen, not how it
        would have resized them.
        """
        seen: dict[int, tuple[Any, Any]] = {}
        handles = []
        for module in modules:
            handles.append(
                module.register_forward_hook(
                    lambda m, given, output: seen.__setitem__(id(m), (given, output))
                )
            )
        images = list(batch.pixels.unbind())
        try:
            with replaced(self.detector, transform=_Given(self.detector.transform, image_list(batch))):
                self.detector(images)
        finally:
            for handle in handles:
                handle.remove()
        missing = [type(module).__name__ for module in modules if id(module) not in seen]
        if missing:
            raise ValueError(
                f"{type(self.detector).__name__}'s own forward never called its {', '.join(missing)}: write "
                "an adapter for it (docs/adapters.md), or pass prove=False"
            )
        return [seen[id(module)] for module in modules]


class _Given:
    """Stands in for a detector's transform: gives a batch as it is."""

    def __init__(self, transform: Any, images: ImageList) -> None:
        self._transform, self._images = transform, images

    def __call__(self, images: Any, targets: Any = None) -> tuple[ImageList, Any]:
        return self._images, targets

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transform, name)


@contextmanager
def replaced(module: Any, **attributes: Any) -> Iterator[None]:
    """Replaces attributes of a module, submodules included, while the body runs.

    What the module's own functions keep on it during that time stays.
    """
    own = {name: vars(module)[name] for name in attributes if name in vars(module)}
    vars(module).update(attributes)  # in front of a submodule of that name
    try:
        yield
    finally:
        for name in attributes:
            del vars(module)[name]
        vars(module).update(own)


def image_list(batch: Batch) -> ImageList:
    """A batch in torchvision's form."""
    return ImageList(batch.pixels, list(batch.image_sizes))


def targets_of(batch: Batch, first_label: int) -> list[dict[str, Tensor]]:
    """A batch's objects in torchvision's form; where their class is unknown, any class of an object."""
    assert batch.objects is not None
    return [{"boxes": o.boxes, "labels": o.labels.clamp(min=first_label)} for o in batch.objects]


class _PredictorsOnly:
    """Stands in for one of torchvision's heads in its own forward, as one whose tower is done already."""

    def __init__(self, head: nn.Module) -> None:
        self._head = head

    def conv(self, tower_output: Tensor) -> Tensor:
        return tower_output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)


def predict_from_tower(head: nn.Module, tower_output: Tensor) -> Any:
    """What one of torchvision's heads, by its own forward, predicts from its tower's output of one level."""
    return type(head).forward(_PredictorsOnly(head), [tower_output])  # type: ignore[arg-type, unused-ignore]


def decode_deltas(box_coder: Any, predictions: Predictions, anchors: Anchors) -> Tensor:
    """Boxes (batch, anchors, 4), xyxy in pixels, by torchvision's ``BoxCoder``, in float32 at least."""
    assert anchors.boxes is not None
    deltas = widened(predictions.regression)
    boxes = anchors.boxes.to(deltas.dtype).expand(len(deltas), -1, -1)
    decoded: Tensor = box_coder.decode_single(deltas.flatten(0, 1), boxes.flatten(0, 1))
    return decoded.view_as(deltas)


def widened(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(compute_dtype(tensor))


def grid_anchors(
    generator: Any, batch: Batch, maps: Sequence[Tensor], per_location: Sequence[int] | None
) -> Anchors:
    """The anchors of one of torchvision's generators, which are the same for all images.

    Args:
        generator: the detector's own.
        batch: as the detector takes it.
        maps: one per level.
        per_location: anchors at each location of each level; ``None`` where all levels have as many.
    """
    boxes = generator(image_list(batch), list(maps))[0]
    sizes = tuple((int(m.shape[-2]), int(m.shape[-1])) for m in maps)
    locations = [height * width for height, width in sizes]
    if per_location is None:
        per_location = [len(boxes) // sum(locations)] * len(locations)
    per_level = tuple(n * each for n, each in zip(locations, per_location, strict=True))
    return Anchors(boxes, per_level, sizes=sizes)


def named_losses(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy, so that what is added to it isn't added to the detector's own."""
    return dict(losses)
