"""Detection data in COCO form: images in a folder, boxes in a JSON file."""

from __future__ import annotations

import gc
import itertools
import json
import math
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from augmentations import Augmentation, Sample
from image_memory import File, ImageMemory, check_memory
from numpy.typing import NDArray
from PIL import Image, ImageOps
from processes import SINGLE, Processes
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor

ORIENTATION = 0x0112  # the EXIF tag; from 5 on, width and height are exchanged
LEAST_SIDE, MOST_RATIO = 8, 100  # pixels; what is smaller or narrower vanishes where images are resized
THREADS = 16  # that look at images: on a network's disk each waits for its answer


class Annotations(NamedTuple):
    """A JSON file in COCO form as arrays, its annotations in the order of the images.

    Lists of dicts take many times the memory, some of it once more in every worker: to read a Python object
    is to write its reference count, which copies the page that it shares with the main process.

    Attributes:
        categories: names by id, in the order of the ids.
        ids: of the images, in order.
        file_names: shape (images,).
        sizes: shape (images, 2), width and height.
        rows: shape (images, 2), where an image's annotations begin and end.
        boxes: shape (annotations, 4), x, y, width and height as the file has them.
        areas: shape (annotations,).
        category_ids: shape (annotations,).
        crowd: shape (annotations,), which are crowds.
        of_no_image: how many annotations were left out because their image isn't listed.
    """

    categories: dict[int, str]
    ids: list[int]
    file_names: NDArray[np.str_]
    sizes: NDArray[np.int64]
    rows: NDArray[np.int64]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    category_ids: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    of_no_image: int


class CocoFolder(Dataset[Sample]):
    """Images with their boxes and labels.

    Crowd boxes are left out of the targets (evaluation ignores what is found in them), boxes without
    area are left out and counted, images without boxes stay. An image that can't be read is replaced by
    the next one that can and counted, in training; in evaluation it is an image without detections.

    Everything that would end a run late, or be trained on or measured wrongly, is looked for here: ids,
    boxes, categories, and the size of every image against the file's. Of several processes the first reads
    the JSON file, and all look at a share of the images.

    Args:
        images: the folder that file names are relative to.
        annotations: a JSON file in COCO form.
        published: names of the classes of published weights, by label. Where all categories have these ids
            and names, labels are the ids themselves; otherwise categories are numbered in the order of
            their ids.
        first_label: where that begins: 1 for detectors that keep 0 for the background.
        seed: of the augmentations, which depend on it, the epoch and the image alone.
        augment: what is done to training images, in this order; see ``augmentations.py``.
        keep_empty: keep images without boxes.
        unlabelled: a folder of further images, in it or below it. While ``draws_unlabelled`` is set, every
            target has one of them, drawn by seed, epoch and image and augmented, as ``"unlabelled_image"``.
        teacher_images: a folder that holds, under the same file names, images of the same scenes and sizes as
            the teacher sees them. Every target then has the image's own as ``"teacher_image"``, augmented
            by the same random numbers.
        cache_images: decode all images now, the teacher's and the unlabelled too, and read them from memory
            from then on; each process of a distributed run has its own.
        processes: those that all make this data set now, if there are several.

    Attributes:
        ids: of the images.
        counts: shape (images,), how many objects each shows.

    Raises:
        FileNotFoundError: no such folder or file, no image in it, or most images are missing; or one of the
            teacher's is.
        ValueError: annotations that can't be used, saying which; a teacher's image of another size; images to
            be cached that don't fit into memory.
        OSError: not one image can be read.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path,
        *,
        published: Sequence[str] = (),
        first_label: int = 0,
        seed: int = 0,
        augment: Sequence[Augmentation] = (),
        keep_empty: bool = True,
        unlabelled: Path | None = None,
        teacher_images: Path | None = None,
        cache_images: bool = False,
        processes: Processes = SINGLE,
    ) -> None:
        require(images, folder=True)
        require(annotations, folder=False)
        self.images, self.seed, self.augment, self.epoch = images, seed, list(augment), 0
        self.unlabelled = [] if unlabelled is None else image_files(unlabelled)
        self.draws_unlabelled = False
        self.teacher_images, self.teachers_unreadable = teacher_images, list[str]()
        self.annotations = processes.from_first(lambda: read_annotations(annotations))
        self.ids = self.annotations.ids
        categories = self.annotations.categories
        self.names = list(categories.values())
        named = dict(enumerate(published))
        self.is_published = bool(published) and all(named.get(c) == n for c, n in categories.items())
        numbered = {c: n for n, c in enumerate(categories, first_label)}
        self.label_of = {c: c for c in categories} if self.is_published else numbered
        self.category_of = {label: category for category, label in self.label_of.items()}
        self.num_classes = len(published) if self.is_published else max(self.category_of) + 1
        self._make_targets()
        self._check_files(processes)
        if 2 * len(self.missing) > len(self.ids):
            path = self.images / self.missing[0]
            raise FileNotFoundError(
                f"{annotations} names {len(self.ids)} images, of which {len(self.missing)} are missing. The "
                f"first was looked for as {path}: {what_is_there(path)}. Is the images folder one level off?"
            )
        if not keep_empty:
            self._keep(self.counts > 0)
        if not self.counts.any():
            raise ValueError(f"{annotations} holds no box of an object, so nothing to train on or measure by")
        if teacher_images is not None:
            self._check_teacher_images(teacher_images, processes)
        if all(decode_or_none(self._path(i), self._size(i)) is None for i in range(len(self))):
            raise OSError(f"not one of the {len(self)} images under {images} can be read")
        self._broken = multiprocessing.Value("i", 0)
        self.memory = self._decode_all(processes) if cache_images else None

    def _make_targets(self) -> None:
        """Boxes as xyxy, cut at the images' borders, labels, and which of them are targets."""
        source = self.annotations
        extents = source.rows[:, 1] - source.rows[:, 0]
        owners = np.repeat(np.arange(len(self.ids)), extents)
        corners = np.concatenate([source.boxes[:, :2], source.boxes[:, :2] + source.boxes[:, 2:]], axis=1)
        corners = corners.clip(0, np.tile(source.sizes[owners], 2))
        empty = ((corners[:, 2:] - corners[:, :2]) < 1e-3).any(axis=1) & ~source.crowd
        self.is_target = ~(source.crowd | empty)
        self.boxes = corners.astype(np.float32)
        place = np.searchsorted(list(self.label_of), source.category_ids)
        self.labels = np.array(list(self.label_of.values()))[place]
        self.counts = np.bincount(owners[self.is_target], minlength=len(self.ids))
        self.left_out = {
            "of no image": source.of_no_image,
            "crowd": int(source.crowd.sum()),
            "empty": int(empty.sum()),
        }

    def _check_files(self, processes: Processes) -> None:
        """Notes which images are missing or can't be read; raises for other sizes than annotated."""
        found = self._faults(self.images, processes)
        differing = [i for i, fault in found.items() if not isinstance(fault, str)]
        if differing:
            shown = [f"{self._path(i)} is {found[i]}, annotated as {self._size(i)}" for i in differing[:3]]
            raise ValueError(
                f"{len(differing)} images have another size (width, height) than their annotations say: "
                f"{'; '.join(shown)}. Boxes would be elsewhere: correct the JSON file or the images"
            )
        names = self.annotations.file_names
        self.missing = [str(names[i]) for i, fault in found.items() if fault == "missing"]
        self.unreadable = [str(names[i]) for i, fault in found.items() if fault == "unreadable"]

    def _check_teacher_images(self, folder: Path, processes: Processes) -> None:
        """Notes which of the teacher's images can't be read; raises for those missing or of another size."""
        require(folder, folder=True)
        names = self.annotations.file_names
        unseen = {*self.missing, *self.unreadable}  # by the student, so that the teacher's aren't needed
        faults = self._faults(folder, processes)
        found = {i: fault for i, fault in faults.items() if str(names[i]) not in unseen}
        missing = [i for i, fault in found.items() if fault == "missing"]
        if missing:
            path = self._path(missing[0], folder)
            raise FileNotFoundError(
                f"{len(missing)} of the student's {len(self)} images are missing among the teacher's, which "
                f"must have the same file names. The first was looked for as {path}: {what_is_there(path)}"
            )
        differing = [i for i, fault in found.items() if not isinstance(fault, str)]
        if differing:
            first = differing[:3]
            shown = [f"{self._path(i, folder)} is {found[i]}, {self._path(i)} {self._size(i)}" for i in first]
            raise ValueError(
                f"{len(differing)} of the teacher's images have another size (width, height) than the "
                f"student's: {'; '.join(shown)}. Both must show the same at the same place: resize them"
            )
        self.teachers_unreadable = [str(names[i]) for i in found]

    def _faults(self, folder: Path, processes: Processes) -> dict[int, tuple[int, int] | str]:
        """What is wrong with the images in a folder, by index: another size, "missing" or "unreadable"."""

        def looked_at(index: int) -> tuple[int, int] | str | None:
            try:
                return other_size(self._path(index, folder), self._size(index))
            except FileNotFoundError:
                return "missing"
            except Exception:  # noqa: BLE001 - Pillow's readers raise anything
                return "unreadable"

        def faults(indices: Sequence[int]) -> list[tuple[int, tuple[int, int] | str]]:
            return [(index, fault) for index in indices if (fault := looked_at(index))]

        # Under Lightning a process has its rank before it knows of the others.
        share = range(processes.rank % processes.ranks, len(self.ids), processes.ranks)
        with ThreadPoolExecutor(THREADS) as pool:
            parts = list(pool.map(faults, [share[n::THREADS] for n in range(THREADS)]))
        return dict(sorted(pair for seen in processes.gather(parts) for part in seen for pair in part))

    def _decode_all(self, processes: Processes) -> ImageMemory:
        """All images that samples are made of, decoded, if they fit into memory."""
        folders = [self.images] if self.teacher_images is None else [self.images, self.teacher_images]
        files: list[File] = [
            (self._path(index, folder), self._size(index)) for folder in folders for index in range(len(self))
        ]
        files += [(path, None) for path in self.unlabelled]
        with ThreadPoolExecutor(THREADS) as pool:
            extents = dict(zip(files, pool.map(bytes_of, [path for path, _ in files]), strict=True))
        check_memory(sum(extents.values()), processes)
        return ImageMemory(extents, decode_or_none, THREADS)

    def _keep(self, chosen: NDArray[np.bool_]) -> None:
        source = self.annotations
        self.ids, self.counts = np.array(source.ids)[chosen].tolist(), self.counts[chosen]
        self.annotations = source._replace(
            ids=self.ids,
            file_names=source.file_names[chosen],
            sizes=source.sizes[chosen],
            rows=source.rows[chosen],
        )

    def _path(self, index: int, folder: Path | None = None) -> Path:
        return (folder or self.images) / str(self.annotations.file_names[index])

    def _size(self, index: int) -> tuple[int, int]:
        width, height = self.annotations.sizes[index].tolist()
        return width, height

    def _read(self, path: Path, size: tuple[int, int] | None) -> Tensor | None:
        """An image of a file, or of memory; one that can't be read is counted."""
        memory = self.memory
        image = decode_or_none(path, size) if memory is None else memory.read(path, size)
        if image is None:
            with self._broken.get_lock():
                self._broken.value += 1
        return image

    @property
    def broken(self) -> int:
        """How many times an image could not be read, over all workers."""
        return int(self._broken.value)

    def __len__(self) -> int:
        return len(self.ids)

    def summary(self) -> str:
        """How much there is, and what was left out or can't be read, in a line."""
        text = (
            f"{len(self)} images, {(self.counts == 0).sum()} without objects, {self.counts.sum()} boxes of "
            f"{len(self.names)} categories"
        )
        left_out = [f"{count} {kind}" for kind, count in self.left_out.items() if count]
        if left_out:
            text += f"; boxes left out: {', '.join(left_out)}"
        faults = {
            "missing images": self.missing,
            "images that can't be read": self.unreadable,
            "images of the teacher's that can't be read": self.teachers_unreadable,
        }
        for fault, names in faults.items():
            if names:
                text += f"; {fault}: {len(names)} ({', '.join(Path(name).name for name in names[:3])})"
        if self.memory is not None:
            text += f"; {len(self.memory)} images in memory, {self.memory.size:,} bytes"
        return text

    def is_landscape(self, index: int) -> bool:
        """Whether an image is at least as wide as high."""
        width, height = self._size(index)
        return width >= height

    def objects(self, index: int) -> tuple[Tensor, Tensor]:
        """Boxes of an image's objects, shape (objects, 4), xyxy in pixels, and their labels."""
        rows = slice(*self.annotations.rows[index])
        chosen = self.is_target[rows]
        return torch.from_numpy(self.boxes[rows][chosen]), torch.from_numpy(self.labels[rows][chosen])

    def ground_truth(self) -> dict[str, list[dict[str, Any]]]:
        """The content of a file in COCO form: all boxes as they were annotated, those of crowds too.

        Annotations have new ids, from 1 on: pycocotools takes a match with number 0 for none.
        """
        source = self.annotations
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index, image_id in enumerate(self.ids):
            width, height = self._size(index)
            name = str(source.file_names[index])
            images.append({"id": image_id, "file_name": name, "width": width, "height": height})
            rows = slice(*source.rows[index])
            facts = (source.boxes, source.areas, source.category_ids, source.crowd.view(np.uint8))
            for box, area, category, crowd in zip(*(of_all[rows].tolist() for of_all in facts), strict=True):
                number = len(annotations) + 1
                entry = {"id": number, "image_id": image_id, "category_id": category, "bbox": box}
                annotations.append({**entry, "area": area, "iscrowd": crowd})
        categories = [{"id": number, "name": name} for number, name in source.categories.items()]
        return {"images": images, "annotations": annotations, "categories": categories}

    def read(self, index: int) -> Tensor | None:
        """An image as RGB bytes, shape (3, height, width), or ``None`` if it can't be read."""
        return self._read(self._path(index), self._size(index))

    def read_teachers(self, index: int) -> Tensor | None:
        """What the teacher sees of an image, as `read` gives it."""
        return self._read(self._path(index, self.teacher_images), self._size(index))

    def plain(self, index: int) -> Sample:
        """The next image that can be read, as bytes, and its target: `tv_tensors`, not augmented."""
        for offset in range(len(self)):
            chosen = (index + offset) % len(self)
            image = self.read(chosen)
            if image is None:
                continue
            boxes, labels = self.objects(chosen)
            size = tuple(image.shape[-2:])
            boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
            target = {"boxes": boxes, "labels": labels, "image_id": torch.tensor(self.ids[chosen])}
            if self.teacher_images is not None:
                of_teacher = self.read_teachers(chosen)
                if of_teacher is None:
                    continue
                target["teacher_image"] = tv_tensors.Image(of_teacher)
            return tv_tensors.Image(image), target
        folders = " or ".join(str(folder) for folder in (self.images, self.teacher_images) if folder)
        raise OSError(f"not one of the {len(self)} images under {folders} can be read")

    def __getitem__(self, index: int) -> Sample:
        image, target = self.plain(index)
        with torch.random.fork_rng(devices=[]):
            seed = hash((self.seed, self.epoch, int(target["image_id"]))) % 2**63
            torch.default_generator.manual_seed(seed)
            for augmentation in self.augment:
                image, target = augmentation(self, image, target)
            if self.draws_unlabelled:  # last, for the labelled ones are to be the same with and without
                target["unlabelled_image"] = self._draw_unlabelled()
        target["boxes"] = target["boxes"].as_subclass(Tensor)
        if "teacher_image" in target:
            target["teacher_image"] = as_numbers(target["teacher_image"])
        return as_numbers(image), target

    def _draw_unlabelled(self) -> Tensor:
        drawn = int(torch.randint(len(self.unlabelled), ()))
        for path in self.unlabelled[drawn:] + self.unlabelled[:drawn]:
            decoded = self._read(path, None)
            if decoded is None:
                continue
            image: Tensor = tv_tensors.Image(decoded)
            size = tuple(image.shape[-2:])
            boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size)
            target: dict[str, Tensor] = {"boxes": boxes, "labels": torch.zeros(0, dtype=torch.int64)}
            for augmentation in self.augment:
                image, target = augmentation(self, image, target)
            return as_numbers(image)
        raise OSError(
            f"not one of {len(self.unlabelled)} unlabelled images can be read: {self.unlabelled[:3]}"
        )


def read_annotations(path: Path) -> Annotations:
    """A JSON file in COCO form, checked.

    Raises:
        ValueError: it can't be used, saying why.
    """
    collects = gc.isenabled()
    gc.disable()  # looking for cycles among millions of new objects takes as long as reading them
    try:
        content = json.loads(path.read_bytes(), object_hook=_without_polygons)
        check_annotations(content)
        return _as_arrays(content)
    except KeyError as error:
        raise ValueError(f"{path} isn't in COCO form: {error} is missing") from error
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path} can't be used: {error}") from error
    finally:
        if collects:
            gc.enable()


def _without_polygons(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)  # most of the file, which nobody reads
    return entry


def _as_arrays(content: dict[str, Any]) -> Annotations:
    images = sorted(content["images"], key=lambda info: info["id"])
    place = {info["id"]: number for number, info in enumerate(images)}
    annotations = content["annotations"]
    owners = np.array([place.get(a["image_id"], -1) for a in annotations], dtype=np.int64)
    order = np.argsort(owners, kind="stable")
    first = int((owners < 0).sum())  # behind those of no image
    order, owners = order[first:], owners[order[first:]]
    numbers = np.arange(len(images))
    rows = [np.searchsorted(owners, numbers, side) for side in ("left", "right")]
    return Annotations(
        categories={c["id"]: c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])},
        ids=list(place),
        file_names=np.array([info["file_name"] for info in images]),
        sizes=np.array([(info["width"], info["height"]) for info in images], dtype=np.int64),
        rows=np.stack(rows, axis=1),
        boxes=np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)[order],
        areas=np.array([a["area"] for a in annotations], dtype=np.float64)[order],
        category_ids=np.array([a["category_id"] for a in annotations], dtype=np.int64)[order],
        crowd=np.array([a["iscrowd"] for a in annotations], dtype=np.bool_)[order],
        of_no_image=first,
    )


def check_annotations(content: dict[str, Any]) -> None:
    """Refuses annotations that would be trained on or measured wrongly; adds what COCO's measure needs.

    Raises:
        ValueError: ids that are there more than once, boxes that aren't four finite numbers or have a
            negative side, categories or sizes that don't exist.
        KeyError: what is missing.
    """
    for kind in ("images", "categories", "annotations"):
        ids = Counter(entry["id"] for entry in content[kind])
        if not ids and kind != "annotations":
            raise ValueError(f"it holds no {kind}")
        foreign = [i for i in ids if type(i) is not int]
        repeated = [i for i, count in ids.items() if count > 1]
        if foreign or repeated:
            fault = "are no whole numbers" if foreign else "are there more than once"
            raise ValueError(f"ids of {kind} {fault}, such as {(foreign or repeated)[:3]}")
    for info in content["images"]:
        if not (isinstance(info["file_name"], str) and info["width"] > 0 and info["height"] > 0):
            raise ValueError(f"image {info['id']} needs a file_name, and width and height above 0")
    known = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        box, number = annotation["bbox"], annotation["id"]
        numbers = isinstance(box, list) and len(box) == 4 and all(_is_finite(value) for value in box)
        if not numbers or min(box[2:]) < 0:
            fault = f"bbox must be x, y, width, height, four finite numbers, got {box}"
            raise ValueError(f"annotation {number}: {fault}")
        if annotation["category_id"] not in known:
            fault = f"which isn't among the ids in categories, {sorted(known)[:10]}"
            raise ValueError(f"annotation {number} is of category {annotation['category_id']}, {fault}")
        annotation["iscrowd"] = annotation.get("iscrowd") or 0
        if annotation["iscrowd"] not in (0, 1):
            raise ValueError(f"annotation {number}: iscrowd must be 0 or 1, got {annotation['iscrowd']}")
        if not _is_finite(annotation.get("area")):
            annotation["area"] = box[2] * box[3]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def require(path: Path, *, folder: bool, named: str = "") -> None:
    """Raises ``FileNotFoundError`` for a folder or file that isn't there, saying what is.

    Args:
        path: of the folder or file.
        folder: which of the two it must be.
        named: what the user called it, for the message.
    """
    if not (path.is_dir() if folder else path.is_file()):
        kind = "folder" if folder else "file"
        raise FileNotFoundError(f"{named}there is no {kind} {path}: {what_is_there(path)}")


def what_is_there(path: Path) -> str:
    """The nearest folder on the way to a path that exists, and the first names in it."""
    folder = next(part for part in (path.absolute(), *path.absolute().parents) if part.is_dir())
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    return f"{folder} holds {', '.join(names[:5]) or 'nothing'}" + ", ..." * (len(names) > 5)


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and below it, in the order of their names.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
    """
    require(folder, folder=True)
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not found:
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(IMG_EXTENSIONS)})")
    return found


def open_image(path: Path) -> Image.Image:
    """Opens an image without reading its pixels; raises for one that a detector can't use."""
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    if not path.is_file():  # reading from a pipe would never end
        raise ValueError(f"{path} is no file")
    image = Image.open(path)
    if min(image.size) < LEAST_SIDE or max(image.size) > MOST_RATIO * min(image.size):
        raise ValueError(f"{path} is too small or too narrow: {image.size}")
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise ValueError(f"{path} has pixels of 32 bits, of which nobody knows how bright they are")
    return image


def decode(path: Path, size: tuple[int, int] | None) -> Tensor:
    """An image as RGB bytes, shape (3, height, width); what 16 bits say is scaled to 8.

    Args:
        path: the file.
        size: width and height that its boxes go by, if it has any. The image is turned as its EXIF says,
            unless it has this size only as it is stored.
    """
    with open_image(path) as image:
        turned = ImageOps.exif_transpose(image)
        if turned.size != size == image.size:
            turned = image
        if not turned.mode.startswith("I"):
            return pil_to_tensor(turned.convert("RGB"))
        bytes_of = (np.asarray(turned).astype(np.float64) / 257).round().astype(np.uint8)
        return torch.from_numpy(bytes_of).expand(3, -1, -1)


def decode_or_none(path: Path, size: tuple[int, int] | None) -> Tensor | None:
    """As `decode`; ``None`` for an image that can't be read."""
    try:
        return decode(path, size)
    except Exception:  # noqa: BLE001 - Pillow's readers raise anything
        return None


def bytes_of(path: Path) -> int:
    """How many bytes an image takes when it is decoded; 0 for one that can't be read."""
    try:
        with open_image(path) as image:
            return 3 * image.width * image.height
    except Exception:  # noqa: BLE001 - Pillow's readers raise anything
        return 0


def other_size(path: Path, expected: tuple[int, int]) -> tuple[int, int] | None:
    """The width and height of an image, if they aren't those expected as it is stored or as EXIF turns it."""
    with open_image(path) as image:
        if expected == image.size:
            return None
        turned = image.getexif().get(ORIENTATION, 1) >= 5
        return None if turned and expected == image.size[::-1] else image.size


def as_numbers(image: Tensor) -> Tensor:
    """An image's bytes as detectors take them, from 0 to 1."""
    numbers: Tensor = image.as_subclass(Tensor).float() / 255
    return numbers


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

    Attributes:
        skip: how many batches are left out at the start, which a run taken up again has had.
    """

    def __init__(
        self, dataset: CocoFolder, batch_size: int, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.ranks, self.skip = rank, ranks, 0

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / (self.batch_size * self.ranks))

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self._batches(), self.skip, None)

    def _batches(self) -> Iterator[list[int]]:
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


def teacher_images(images: list[Tensor], targets: list[dict[str, Tensor]]) -> list[Tensor]:
    """What the teacher sees of a batch, as ``Distiller(teacher_view=...)`` takes it."""
    return [target["teacher_image"] for target in targets]


def same_images(images: list[Tensor], targets: object) -> list[Tensor]:
    """The student's images, for a teacher that resizes them to another size."""
    return images


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
        worker_init_fn=keep_pages_shared,
    )


def keep_pages_shared(worker: int) -> None:
    """Keeps a new worker from looking for garbage in what it shares: that writes to every object's page."""
    gc.freeze()
