"""`TeacherCache`: what methods read of the teacher, kept on disk instead of calculated again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosskd._entries import Entry, entry_of, joined, parting_place
from crosskd._version import __version__
from crosskd.adapters.base import Adapter, Batch
from crosskd.methods.base import Method
from crosskd.pairing import Pair
from crosskd.proof import proving
from crosskd.running import first_head, points_of, reads_maps, run_teacher
from crosskd.step import DetectorTrace, outside_graph

__all__ = ["TeacherCache"]

FORMAT = 1  # of an entry: to be counted up when its parts change
# What an entry may differ by from the same teacher's answer on another machine, as a share of the largest
# number. A ResNet-50's answers move by 0.002 under a GPU's TF32, by 0.02 in bfloat16; another answer differs
# by far more somewhere.
ROUNDING, COARSE = 0.01, 0.1


class TeacherCache:
    """Keeps on disk what a run's methods read of the teacher, so that it isn't run on the same pixels twice.

    An image's entry is found by its pixels as the teacher sees them: augmented, resized, normalised, and with
    the batch's padding. So no key is handed in, and what is read is what the teacher would answer: an image
    that is seen flipped, padded to another size or under autocast has an entry of its own. An augmentation
    that never gives the same pixels twice makes the cache useless, but not wrong; ``hits`` and ``misses``
    count.

    The folder belongs to one teacher and one set of methods, by a fingerprint in ``cache.json``. A change
    that it can't show, such as one in the adapter, is found by a comparison: the first entry that a distiller
    reads must equal what the teacher answers now. An entry is
    a file of its own that is renamed when it is whole and read by memory map, so several processes can write
    and read one folder at once. One that is unfinished, damaged or of another fingerprint is calculated and
    written again.

    Args:
        folder: where the entries are; made if it isn't there.
        dtype: what maps and predictions are kept in: ``torch.bfloat16`` halves the disk of a teacher in
            float32, and rounds. As they were calculated unless given.
        keep_free: gigabytes that are left free on the disk; when there are fewer, nothing more is written.

    Attributes:
        hits: images that were read from disk, by this process.
        misses: images that the teacher was run on.

    Raises:
        ValueError: another type than these; on the first batch, a folder that is another teacher's or other
            methods'; on the first image that is found, an entry that is not the teacher's answer.

    Example:
        >>> import tempfile
        >>> from torchvision.models.detection import retinanet_resnet50_fpn
        >>> from crosskd import CrossKD, Distiller
        >>> sizes = {"weights_backbone": None, "num_classes": 4, "min_size": 64, "max_size": 64}
        >>> teacher, student = (retinanet_resnet50_fpn(**sizes) for _ in range(2))
        >>> folder = tempfile.TemporaryDirectory()
        >>> cache = TeacherCache(folder.name, keep_free=0)
        >>> distiller = Distiller(teacher, student, CrossKD(), teacher_cache=cache)
        >>> targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}]
        >>> image = torch.rand(3, 64, 64)
        >>> for _ in range(3):
        ...     losses = distiller([image], targets)
        >>> cache.hits, cache.misses
        (2, 1)
    """

    def __init__(
        self, folder: str | Path, *, dtype: torch.dtype | None = None, keep_free: float = 10.0
    ) -> None:
        if dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                "dtype is what the teacher's maps and predictions are kept in, torch.bfloat16 or "
                f"torch.float16, got {dtype}: leave it out to keep them as they were calculated"
            )
        self.folder, self.dtype, self.keep_free = Path(folder), dtype, keep_free
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hits = self.misses = 0
        self._writes = True
        self._fingerprint = ""
        self._opened_for: tuple[Any, ...] = ()
        self._written: set[str] | None = None  # buffers that the teacher itself writes
        self._hashed: tuple[Any, str] = (None, "")  # what was looked at, and its hash

    def check(self, teacher: Adapter) -> None:
        """Raises ``ValueError`` for a teacher that can't be left out of a step.

        Args:
            teacher: its adapter.
        """
        if type(teacher).maps_of is not Adapter.maps_of:
            raise ValueError(
                "teacher_cache= keeps maps and predictions of a teacher, but the forward of this "
                f"{type(teacher.detector).__name__} runs as a whole and leaves more than these, such as what "
                "its decoder reads: leave teacher_cache= out"
            )

    @outside_graph
    def run(self, pair: Pair, batch: Batch, methods: Mapping[str, Method], proved: set[str]) -> DetectorTrace:
        """What `crosskd.running.run_teacher` gives, of entries; the teacher is run on images without one.

        Args:
            pair: the two detectors.
            batch: as the teacher takes it.
            methods: all that the folder is for, also those at rest.
            proved: gets ``"teacher_cache"`` once an entry has been compared with the teacher's answer.
        """
        self._open(pair, batch, methods)
        keys, head = _keys(batch), first_head(pair, methods)
        entries = [self._read(key) for key in keys]
        missing = [index for index, entry in enumerate(entries) if entry is None]
        if len(missing) < len(keys) and "teacher_cache" not in proved:
            self._compare(pair, batch, methods, entries)
            proved.add("teacher_cache")
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if missing:
            trace = _run_on(missing, pair, batch, methods)
            for place, index in enumerate(missing):
                entry = entries[index] = entry_of(trace, place, self.dtype, maps=reads_maps(methods, head))
                self._write(keys[index], entry)
        return joined(pair.teacher, batch, head, [entry for entry in entries if entry is not None])

    def _compare(
        self, pair: Pair, batch: Batch, methods: Mapping[str, Method], entries: list[Entry | None]
    ) -> None:
        """Raises ``ValueError`` where the first entry of a batch is not what the teacher answers now."""
        index, kept = next((index, entry) for index, entry in enumerate(entries) if entry is not None)
        with proving(pair.teacher.detector):
            trace = _run_on([index], pair, batch, methods)
        now = entry_of(trace, 0, self.dtype, maps=reads_maps(methods, first_head(pair, methods)))
        narrow = self.dtype or pair.teacher_dtype or torch.is_autocast_enabled(batch.pixels.device.type)
        whole = not narrow and batch.pixels.dtype in (torch.float32, torch.float64)
        place = parting_place(kept, now, ROUNDING if whole else COARSE)
        if place is not None:
            raise ValueError(
                f"the teacher cache in {self.folder}: what it holds for image {index} of this batch is not "
                f"what the teacher answers now. They differ in {place}. It was written with another adapter, "
                "or before a change of code that the teacher or a method runs. Delete the folder, or give "
                "this run one of its own. If the same comes again, the teacher's answer to an image depends "
                "on more than its pixels, such as the other images of its batch: leave teacher_cache= out"
            )

    # -- the folder ------------------------------------------------------------------------------

    def _open(self, pair: Pair, batch: Batch, methods: Mapping[str, Method]) -> None:
        """Compares the folder's fingerprint with this run's, once, and again where weights have changed."""
        if self._written is None:
            self._written = _written_by(pair, batch, methods)
        teacher = pair.teacher.detector
        tensors = dict(chain(teacher.named_parameters(), teacher.named_buffers()))
        weights = {name: tensor for name, tensor in tensors.items() if name not in self._written}
        state = [(tensor.data_ptr(), tensor._version) for tensor in weights.values()]
        opened_for = (state, pair, list(methods.values()))
        if opened_for == self._opened_for:
            return
        if state != self._hashed[0]:
            self._hashed = state, _hash_of(weights)
        found = _fingerprint(pair, methods, self.dtype) | {"weights": self._hashed[1]}
        record = self.folder / "cache.json"
        try:
            kept = dict(json.loads(record.read_text()))
        except (
            OSError,
            ValueError,
            TypeError,
        ):  # none, or a damaged one: each entry bears the fingerprint as well
            kept = found
            _write_whole(record, json.dumps(found, indent=2).encode())
        differing = [f"{n}: {kept.get(n)}, now {now}" for n, now in found.items() if kept.get(n) != now]
        if differing:
            raise ValueError(
                f"the teacher cache in {self.folder} was written for another teacher, other methods or "
                f"settings: {'; '.join(differing)}. Delete the folder, or give this run one of its own"
            )
        self._fingerprint = _digest([json.dumps(found, sort_keys=True).encode()])
        self._opened_for = opened_for

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.pt"

    def _read(self, key: str) -> Entry | None:
        """An entry by memory map; ``None`` where there is none that is whole and of this fingerprint."""
        path = self._path(key)
        try:
            with zipfile.ZipFile(path) as file:
                if file.testzip() is not None:  # the checksum of one of its tensors
                    return None
            entry: Entry = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        except Exception:  # noqa: BLE001 - none, or a damaged one, of which the readers raise anything
            return None
        return entry if entry.get("fingerprint") == self._fingerprint else None

    def _write(self, key: str, entry: Entry) -> None:
        """Writes an entry, if there is room for it."""
        if not self._writes:
            return
        file = BytesIO()
        torch.save({**entry, "fingerprint": self._fingerprint}, file)
        try:
            free = shutil.disk_usage(self.folder).free - file.tell()
            if free < self.keep_free * 1e9:
                raise OSError(f"{free / 1e9:.1f} GB would be free, keep_free is {self.keep_free:g}")
            _write_whole(self._path(key), file.getvalue())
        except OSError as error:
            self._writes = False
            warnings.warn(
                f"the teacher cache in {self.folder} takes no more entries: {error}. The teacher runs on "
                f"what it lacks. {self.hits} images were in it so far, {self.misses} were not: with few hits "
                "random augmentation or padding gives other pixels each time, and a cache is no use",
                stacklevel=5,
            )


def _write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; of several processes that do so the last one's stays."""
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(f".{uuid.uuid4().hex}.unfinished")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)  # a part, where the disk is full


def _run_on(images: Sequence[int], pair: Pair, batch: Batch, methods: Mapping[str, Method]) -> DetectorTrace:
    """The teacher's run on some images of a batch."""
    sizes = tuple(batch.image_sizes[index] for index in images)
    part = replace(batch, pixels=batch.pixels[list(images)], image_sizes=sizes)
    return run_teacher(pair, pair.teacher.take(part), methods, each_image=True)


# -- fingerprint and keys ------------------------------------------------------------------------


def _written_by(pair: Pair, batch: Batch, methods: Mapping[str, Method]) -> set[str]:
    """The buffers that the teacher writes when it answers, such as a count of its calls: seen in a run."""
    teacher = pair.teacher.detector
    before = {name: (buffer.data_ptr(), buffer._version) for name, buffer in teacher.named_buffers()}
    with proving(teacher):
        _run_on([0], pair, batch, methods)
        after = {name: (buffer.data_ptr(), buffer._version) for name, buffer in teacher.named_buffers()}
    return {name for name, state in after.items() if before.get(name) != state}


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _digest(parts: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:32]


def _hash_of(named: Mapping[str, Tensor]) -> str:
    return _digest(part for name, tensor in named.items() for part in (name.encode(), _bytes(tensor)))


def _fingerprint(pair: Pair, methods: Mapping[str, Method], dtype: torch.dtype | None) -> dict[str, Any]:
    """What an entry depends on beside pixels and weights, as JSON can keep it."""
    teacher, head = pair.teacher.detector, first_head(pair, methods)
    points = {} if head is None else points_of(head, methods, 1)
    taps = {
        f"{name}, {branch}": [type(methods[name]).__name__, *point]
        for branch, of_branch in points.items()
        for name, point in of_branch.items()
    }
    found = {
        "format": FORMAT,
        "teacher": type(teacher).__name__,
        "layers": _digest([repr(teacher).encode()]),
        "teacher_dtype": str(pair.teacher_dtype),
        "dtype": str(dtype),
        "maps": reads_maps(methods, head),
        "head": None if head is None else head.name,
        "levels": pair.levels,
        "class_map": pair.class_map,
        "taps": taps,
        "crosskd": __version__,
    }
    return dict(json.loads(json.dumps(found)))


def _keys(batch: Batch) -> list[str]:
    """A name for each image: of all that the teacher's answer to it depends on."""
    device = batch.pixels.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    settings = [repr((size, batch.size, batch.pixels.dtype, autocast)).encode() for size in batch.image_sizes]
    return [_digest([text, _bytes(image)]) for text, image in zip(settings, batch.pixels, strict=True)]
