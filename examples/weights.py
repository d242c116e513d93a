"""Files of weights, and whether they fit a model."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

import torch
from torch import Tensor


def read_weights(path: Path) -> Any:
    """What a file of ``torch.save`` holds, on the CPU, without running any code in it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, cut off, or something else.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose text advises to load it with weights_only=False
        raise ValueError(
            f"{path} is damaged, or holds more than weights: expected what torch.save writes of tensors in "
            "dicts and lists, such as a detector's state_dict()"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged, cut off or no file of weights: {error}") from error


@contextlib.contextmanager
def downloading(address: str, otherwise: str) -> Iterator[None]:
    """Says where weights belong that can't be downloaded, and which file to remove if it is damaged.

    Args:
        address: of the file.
        otherwise: what the user can do without it.

    Raises:
        ConnectionError: there is no network, or no such file in it.
        ValueError: the file, downloaded now or before, can't be read.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(address).path).name)
    try:
        yield
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged or cut off, remove it and start again: {error}") from error
    except (URLError, ConnectionError, TimeoutError) as error:
        raise ConnectionError(
            f"{address} can't be downloaded ({getattr(error, 'reason', error)}). Copy the file to {path}, "
            f"where it is looked for first, or {otherwise}"
        ) from error


def misfit(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What keeps given weights from fitting a model's own, by key; an empty text if nothing does."""
    missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    shapes = [
        f"{key} {tuple(given[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in sorted(own.keys() & given.keys())
        if given[key].shape != own[key].shape
    ]
    if not (missing or unknown or shapes):
        return ""
    return (
        f"{len(missing)} keys missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}, {len(shapes)} of "
        f"another shape {shapes[:3]}"
    )
