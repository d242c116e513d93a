"""Detection data in COCO form: images in a folder, boxes in a JSON file."""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.functional import pil_to_tensor

Sample = tuple[Tensor, dict[str, Tensor]]


class CocoFolder(Dataset[Sample]):
    """Images with their boxes and labels.

    Crowd boxes are left out of the targets (evaluation ignores what is found in them), boxes without
    area are left out and counted, images without boxes stay. An image that can't be read is replaced by
    the next one that can and counted, in training; in evaluation it is an image without detections.

    Args:
        images: the folder that file names are relative to.
        annotations: a JSON file in COCO form.
        raw_labels: labels are the category ids themselves, as torchvision's published weights have them;
            otherwise categories are numbered in the order of their ids.
        first_label: where that begins: 1 for detectors that keep 0 for the background.
        seed: of the horizontal flips, which depend on it, the epoch and the image alone.
        flip: how likely a training image is flipped; 0 for evaluation.
        keep_empty: keep images without boxes.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path,
        *,
        raw_labels: bool = False,
        first_label: int = 0,
        seed: int = 0,
        flip: float = 0.0,
        keep_empty: bool = True,
    ) -> None:
        for path in (images, annotations):
            if not path.exists():
                raise FileNotFoundError(f"no such data: {path}")
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            self.coco = COCO(str(annotations))
        self.images, self.seed, self.flip, self.epoch = images, seed, flip, 0
        categories = sorted(self.coco.getCatIds())
        self.names = [category["name"] for category in self.coco.loadCats(categories)]
        self.label_of = {c: c if raw_labels else n for n, c in enumerate(categories, first_label)}
        self.category_of = {label: category for category, label in self.label_of.items()}
        self.num_classes = max(self.category_of) + 1
        self.ids = sorted(self.coco.getImgIds())
        self.crowds = self.degenerate = 0
        self.boxes, self.labels = self._read_targets()
        if not keep_empty:
            self.ids = [i for i in self.ids if len(self.boxes[i])]
        self._broken = multiprocessing.Value("i", 0)

    def _read_targets(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        boxes, labels = {}, {}
        for image_id in self.ids:
            info = self.coco.imgs[image_id]
            kept = []
            for annotation in self.coco.imgToAnns[image_id]:
                if annotation.get("iscrowd", 0):
                    self.crowds += 1
                    continue
                x, y, width, height = annotation["bbox"]
                left, top = max(0.0, x), max(0.0, y)
                right, bottom = min(info["width"], x + width), min(info["height"], y + height)
                if right - left < 1e-3 or bottom - top < 1e-3:
                    self.degenerate += 1
                    continue
                label = self.label_of[annotation["category_id"]]
                kept.append(([left, top, right, bottom], label))
            boxes[image_id] = torch.tensor([b for b, _ in kept], dtype=torch.float32).reshape(-1, 4)
            labels[image_id] = torch.tensor([n for _, n in kept], dtype=torch.int64)
        return boxes, labels

    @property
    def broken(self) -> int:
        """How many times an image could not be read, over all workers."""
        return int(self._broken.value)

    def __len__(self) -> int:
        return len(self.ids)

    def summary(self) -> str:
        """How much there is, and what was left out, in a line."""
        boxes = [len(self.boxes[i]) for i in self.ids]
        left_out = f", {self.crowds} crowd and {self.degenerate} empty boxes left out"
        return (
            f"{len(boxes)} images, {boxes.count(0)} without objects, {sum(boxes)} boxes of "
            f"{len(self.names)} categories" + (left_out if self.crowds or self.degenerate else "")
        )

    def is_landscape(self, index: int) -> bool:
        """Whether an image is at least as wide as high."""
        info = self.coco.imgs[self.ids[index]]
        return bool(info["width"] >= info["height"])

    def read(self, index: int) -> Tensor | None:
        """An image as RGB bytes, shape (3, height, width), or ``None`` if it can't be read."""
        path = self.images / self.coco.imgs[self.ids[index]]["file_name"]
        try:
            with Image.open(path) as image:
                return pil_to_tensor(image.convert("RGB"))
        # Once ultralytics was imported, Pillow looks for a module for more formats before it gives up.
        except (OSError, UnidentifiedImageError, SyntaxError, ModuleNotFoundError):
            with self._broken.get_lock():
                self._broken.value += 1
            return None

    def __getitem__(self, index: int) -> Sample:
        for offset in range(len(self)):
            chosen = (index + offset) % len(self)
            image = self.read(chosen)
            if image is not None:
                return self._augmented(image, self.ids[chosen])
        raise OSError(f"not one of the {len(self)} images under {self.images} can be read")

    def _augmented(self, image: Tensor, image_id: int) -> Sample:
        boxes, labels = self.boxes[image_id].clone(), self.labels[image_id].clone()
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch, image_id)) % 2**63)
        if torch.rand((), generator=generator) < self.flip:
            image = image.flip(-1)
            boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
        target = {"boxes": boxes, "labels": labels, "image_id": torch.tensor(image_id)}
        return image.float() / 255, target


class AspectBatches(Sampler[list[int]]):
    """Shuffled batches of images that are all landscape or all portrait, so that little is padded.

    Every process of a distributed run makes the same batches and takes its own share of each; what is
    left over at the end is filled up from the start, so that all take equally many steps.

    Args:
        dataset: the data.
        batch_size: images a process.
        seed: the order depends on it and on the epoch (``dataset.epoch``) alone.
        rank: this process.
        ranks: how many there are.
    """

    def __init__(
        self, dataset: CocoFolder, batch_size: int, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / (self.batch_size * self.ranks))

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.dataset.epoch)) % 2**63)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        size = self.batch_size * self.ranks
        groups: dict[bool, list[int]] = {True: [], False: []}
        for index in order:
            group = groups[self.dataset.is_landscape(index)]
            group.append(index)
            if len(group) == size:
                yield self._share(group)
                group.clear()
        rest = groups[True] + groups[False]
        for start in range(0, len(rest), size):
            batch = rest[start : start + size]
            missing = size - len(batch) if self.ranks > 1 else 0
            yield self._share(batch + [order[n % len(order)] for n in range(missing)])

    def _share(self, batch: list[int]) -> list[int]:
        return batch[self.rank :: self.ranks]


def collate(samples: list[Sample]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images and targets of a batch as two lists: the sizes differ."""
    return [image for image, _ in samples], [target for _, target in samples]


def training_loader(
    dataset: CocoFolder, batch_size: int, *, seed: int, workers: int, rank: int = 0, ranks: int = 1
) -> DataLoader[Any]:
    """Batches for training; set ``dataset.epoch`` before going through it."""
    batches = AspectBatches(dataset, batch_size, seed, rank, ranks)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )
