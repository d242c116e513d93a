"""Decoded images in memory, for training data that fits into it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import torch
from processes import Processes
from torch import Tensor

Size = tuple[int, int]
File = tuple[Path, Size | None]
"""A path, and the width and height that the image's boxes go by, if it has any."""


class ImageMemory:
    """Images that were decoded once, all in one tensor, which the loader's workers share.

    Workers that are forked share its pages, because nobody writes to them; where workers are started anew,
    PyTorch moves the tensor to shared memory. Each process of a distributed run has its own.

    Args:
        files: what to decode, and how many bytes each takes; 0 for what can't be read.
        decode: makes the image of a file, bytes of shape (3, height, width), or ``None`` if it can't be read.
        threads: how many of them decode.
    """

    def __init__(
        self,
        files: Mapping[File, int],
        decode: Callable[[Path, Size | None], Tensor | None],
        threads: int,
    ) -> None:
        self._numbers = {file: number for number, file in enumerate(files)}
        self._starts = [0, *accumulate(files.values())]
        self._bytes = torch.empty(self._starts[-1], dtype=torch.uint8)

        def decoded(file: File) -> tuple[int, int] | None:
            image = decode(*file)
            if image is None:
                return None
            height, width = image.shape[1:]
            self._place(file).view(height, width, 3).copy_(image.permute(1, 2, 0))
            return height, width

        with ThreadPoolExecutor(threads) as pool:
            self._shapes = list(pool.map(decoded, files))

    def __len__(self) -> int:
        return sum(shape is not None for shape in self._shapes)

    @property
    def size(self) -> int:
        """How many bytes all images take."""
        return len(self._bytes)

    def _place(self, file: File) -> Tensor:
        number = self._numbers[file]
        return self._bytes[self._starts[number] : self._starts[number + 1]]

    def read(self, path: Path, size: Size | None) -> Tensor | None:
        """A copy of a file's image, shape (3, height, width), or ``None`` if it couldn't be read.

        A pixel's colours lie side by side in it, as in what Pillow decodes.
        """
        shape = self._shapes[self._numbers[path, size]]
        if shape is None:
            return None
        return self._place((path, size)).view(*shape, 3).clone().permute(2, 0, 1)


def check_memory(needed: int, processes: Processes) -> None:
    """Raises ``ValueError``, in all processes, where decoded images don't fit into what is free now.

    Args:
        needed: bytes, by each process.
        processes: of which those on this machine all need as many.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as torchrun says
    free = free_memory()
    short = None if free is None or here * needed <= free else (here, free)
    # No process begins to decode before all have looked.
    found = [answer for answer in processes.gather(short) if answer is not None]
    if found:
        here, free = found[0]
        each = f" in each of a machine's {here} processes" if here > 1 else ""
        raise ValueError(
            f"--cache-images: the decoded images take {needed:,} bytes{each}, and {free:,} bytes are free: "
            "leave it out, or take fewer or smaller images"
        )


def free_memory() -> int | None:
    """Bytes that processes can still take, as Linux tells; ``None`` on a system that doesn't."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return None
