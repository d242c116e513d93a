"""What torchvision's detectors have in common: preprocessing, maps, anchors, box coding, the student's own
losses.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from crosskd._checks import compute_dtype
from crosskd._unchanged import probing
from crosskd.adapters.base import Adapter, Anchors, Batch, Objects, PixelCoding
from crosskd.adapters.replacing import replaced
from crosskd.adapters.torchvision.images import check_boxes, check_images, check_targets
from crosskd.predictions import Predictions

__all__ = [
    "AsGiven",
    "TorchvisionAdapter",
    "decode_deltas",
    "grid_anchors",
    "image_list",
    "predictors_of",
    "targets_of",
    "widened",
]

_logger = logging.getLogger("crosskd")
_PROBE_PIXELS = 256


class TorchvisionAdapter(Adapter):
    """What the adapters of torchvision's detectors have in common.

    Args:
        detector: a detector with a ``transform`` and a ``backbone``.

    Attributes:
        first_label: the smallest label of an object: 1 where 0 is the background.
        map_names: what the backbone calls the maps of its levels; none where they couldn't be read.
    """

    first_label = 0
    map_names: tuple[str, ...] = ()

    def __init__(self, detector: Any) -> None:
        self.detector: Any = detector
        self.pixel_coding = _coding_of(detector.transform)
        self._read_levels()

    def _read_levels(self) -> None:
        """Reads strides, widths and names off what the backbone makes of an image.

        Strides are those of the size that all images are resized to, where there is one.
        """
        backbone = self.detector.backbone
        parameter = next(backbone.parameters(), torch.empty(0))
        fixed = getattr(self.detector.transform, "fixed_size", None)
        width, height = (_PROBE_PIXELS, _PROBE_PIXELS) if fixed is None else map(int, fixed)
        pixels = parameter.new_zeros(1, len(self.detector.transform.image_mean), height, width)
        try:
            # Not on a copy: pruned or weight-normalised layers can't be copied.
            with probing(backbone):
                maps = _named(backbone(pixels))
        except Exception as error:  # noqa: BLE001  # a backbone may refuse this size in any way
            _logger.info("the strides are unknown: the backbone refused an image of zeros: %s", error)
            return
        self.map_names = tuple(maps)
        self.strides = tuple(width / feature_map.shape[-1] for feature_map in maps.values())
        self.widths = tuple(int(feature_map.shape[1]) for feature_map in maps.values())

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
        return list(_named(self.detector.backbone(pixels)).values())

    def own_head_outputs(self, batch: Batch, modules: Sequence[nn.Module]) -> list[tuple[Any, Any]]:
        """The last inputs and output of some modules while the detector's own forward runs on a batch.

        The transform gives the batch as it is: what the teacher makes of its pixels is to be seen, not how it
        would have resized them.
        """
        seen: dict[int, tuple[Any, Any]] = {}

        def keep(module: nn.Module, given: Any, output: Any) -> None:
            seen[id(module)] = given, output

        with ExitStack() as hooks:
            for module in modules:
                hooks.enter_context(module.register_forward_hook(keep))
            as_given = AsGiven(self.detector.transform, batch.image_sizes)
            hooks.enter_context(replaced(self.detector, transform=as_given))
            self.detector(list(batch.pixels.unbind()))
        missing = [type(module).__name__ for module in modules if id(module) not in seen]
        if missing:
            raise ValueError(
                f"{type(self.detector).__name__}'s own forward never called its {', '.join(missing)}: write "
                "an adapter for it (docs/adapters.md), or pass prove=False"
            )
        return [seen[id(module)] for module in modules]


class AsGiven:
    """Stands in for a detector's transform: a batch of the images that it is given, as they are.

    Where the detector's own forward has changed them before, the proof sees it.
    """

    def __init__(self, transform: Any, sizes: Sequence[tuple[int, int]]) -> None:
        self._transform, self._sizes = transform, sizes

    def __call__(self, images: Any, targets: Any = None) -> tuple[ImageList, Any]:
        return ImageList(torch.stack(list(images)), list(self._sizes)), targets

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transform, name)


def _coding_of(transform: Any) -> PixelCoding | None:
    """How a transform codes pixels by its own ``normalize``; ``None`` where its mean and std don't say it."""
    mean, std = (tuple(map(float, numbers)) for numbers in (transform.image_mean, transform.image_std))
    image = torch.linspace(0.1, 0.9, 4 * len(mean)).view(len(mean), 2, 2)
    with torch.no_grad():
        found = transform.normalize(image)
    for bgr in (False, True):
        channels = image.flip(0) if bgr else image
        expected = (channels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        if found.shape == expected.shape and torch.allclose(found.to(expected), expected, atol=1e-5):
            return PixelCoding(mean, std, bgr)
    return None


def _named(maps: Any) -> Mapping[str, Tensor]:
    """A backbone's maps by name; torchvision calls an only one "0"."""
    return {"0": maps} if isinstance(maps, Tensor) else maps


def image_list(batch: Batch) -> ImageList:
    """A batch in torchvision's form."""
    return ImageList(batch.pixels, list(batch.image_sizes))


def targets_of(batch: Batch, first_label: int) -> list[dict[str, Tensor]]:
    """A batch's objects in torchvision's form; where their class is unknown, any class of an object."""
    assert batch.objects is not None
    return [{"boxes": o.boxes, "labels": o.labels.clamp(min=first_label)} for o in batch.objects]


def predictors_of(head: nn.Module, **replacements: Any) -> Any:
    """One of torchvision's heads without its tower: what its own forward does behind it.

    Args:
        head: stays as it is; its predictors are shared.
        replacements: what stands in the place of the tower, by its name; an identity for ``conv`` unless
            given.

    Returns:
        A module whose forward takes a list of one level's tower output, and is the head's own.
    """
    rest = copy.copy(head)
    rest._modules = dict(head._modules)
    for name, replacement in (replacements or {"conv": nn.Identity()}).items():
        setattr(rest, name, replacement)
    return rest


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
