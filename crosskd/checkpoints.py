"""Reading the checkpoints that mmdet publishes and mmengine writes, without either of them installed."""

from __future__ import annotations

import contextlib
import pickle
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.hub import HASH_REGEX, download_url_to_file, get_dir

__all__ = ["read_mmdet_checkpoint"]


class _LeftOut:
    """Takes the place of an object that a checkpoint holds beside its weights, and keeps nothing of it."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What mmengine's training history (``message_hub``) and its best score are pickled with. None of it is
# called or built: every name stands for a class of its own that leaves out whatever it is given.
_HARMLESS = {
    "mmengine.logging.history_buffer": ("HistoryBuffer",),
    "numpy": ("ndarray", "dtype"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),  # written with numpy 1
    "numpy._core.multiarray": ("_reconstruct", "scalar"),  # written with numpy 2
    # The buffer's statistics are methods of its class, pickled as getattr(HistoryBuffer, "mean").
    "builtins": ("getattr",),
    "__builtin__": ("getattr",),  # as protocol 2 spells it; some PyTorch versions translate it
}
_STAND_INS: list[Any] = [
    type(name, (_LeftOut,), {"__module__": module, "__qualname__": name})
    for module, names in _HARMLESS.items()
    for name in names
]
_ALLOWING = threading.Lock()


def read_mmdet_checkpoint(source: str | Path) -> dict[str, Tensor]:
    """The detector's weights in a checkpoint of mmdet or mmengine.

    The file is read by ``torch.load(..., weights_only=True)``: nothing in it is executed. The objects that
    mmengine writes beside the weights, its ``HistoryBuffer`` and the numpy arrays in it, are left out
    by name; any other object makes the file one that can't be trusted.

    Args:
        source: a path, or an http(s) address. What an address names is downloaded once, into torch.hub's
            folder of checkpoints, and its hash checked where its name ends in one, as published files' do.

    Returns:
        The state dict, on the CPU, keys as mmdet names them (``backbone.…``, ``neck.…``, ``bbox_head.…``).
        Where a file holds averaged weights (EMA) and plain ones, the ones that mmdet would test with.

    Raises:
        FileNotFoundError: no file at the path.
        ValueError: a file that holds other objects, naming one; or no weights; or is no checkpoint.
        RuntimeError: a download whose hash is not the one in its name.
        OSError: an address that can't be reached.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"meta": {}, "state_dict": {"neck.bias": torch.ones(2)}}, f"{folder}/epoch_12.pth")
        ...     read_mmdet_checkpoint(f"{folder}/epoch_12.pth")
        {'neck.bias': tensor([1., 1.])}
    """
    path = _downloaded(str(source)) if str(source).startswith(("http://", "https://")) else Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    return _weights_in(_load(path), path)


def _downloaded(address: str) -> Path:
    name = Path(urlsplit(address).path).name
    folder = Path(get_dir()) / "checkpoints"
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        hash_in_name = HASH_REGEX.search(name)
        download_url_to_file(address, str(path), hash_in_name.group(1) if hash_in_name else None)
    return path


def _load(path: Path) -> Any:
    try:
        with also_allowing(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise ValueError(f"{path} is no checkpoint of PyTorch's: {error}") from error
        raise ValueError(
            f"{path} holds a {refused.group(1)}, which is neither a weight nor anything that mmengine writes "
            "beside weights, so it is not loaded: reading it could run code of the file's own. If you trust "
            "the file, load it with the packages that wrote it and save its state_dict alone"
        ) from None
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is no checkpoint of PyTorch's, or only a part of one: {error}") from error


def _allowed_name(entry: Any) -> str:
    """What a file calls an entry of the safe globals, which may be a pair of an object and its name."""
    return str(entry[1]) if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"


@contextlib.contextmanager
def also_allowing(classes: list[Any]) -> Iterator[None]:
    """Adds classes to PyTorch's safe globals, which are one list for the process, for a while.

    Those that another library has allowed under the same names are left out meanwhile: of two, PyTorch would
    take either. PyTorch 2.4 has no ``safe_globals`` context yet.
    """
    names = {_allowed_name(entry) for entry in classes}
    with _ALLOWING:
        before = list(torch.serialization.get_safe_globals())
        others = [entry for entry in before if _allowed_name(entry) not in names]
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([*others, *classes])
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def _weights_in(loaded: Any, path: Path) -> dict[str, Tensor]:
    weights = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(weights, Mapping) or not weights:
        held = sorted(map(str, loaded)) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise ValueError(f"{path} holds no weights: expected a state_dict of tensors, got {held}")
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            kind = "an object of numpy or mmengine" if isinstance(value, _LeftOut) else type(value).__name__
            raise ValueError(f"{path}: the state_dict's {key!r} must be a tensor, got {kind}")
    # A detector saved while DistributedDataParallel was around it.
    return {key.removeprefix("module."): value for key, value in weights.items()}
