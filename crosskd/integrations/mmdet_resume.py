"""Lets mmengine read its own checkpoints back.

Since PyTorch 2.6 ``torch.load`` takes nothing but weights unless it is asked to, and mmengine 0.10 writes its
log history, numpy arrays among it, into every checkpoint: no run could be resumed. The loader here allows
exactly those classes, for the time of one file. It takes the place of mmengine's loader of local files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from crosskd.checkpoints import also_allowing

__all__ = ["load_from_local"]

_DEFAULT_STATISTICS = ("min", "max", "current", "mean")


def _statistic(owner: object, name: str) -> Any:
    """Stands in for the ``getattr`` that a history is pickled with, and knows its statistics alone."""
    known = {*_DEFAULT_STATISTICS, *HistoryBuffer._statistics_methods}
    if owner is not HistoryBuffer or name not in known:
        raise ValueError(
            f"a checkpoint asked for {name!r} of {owner!r}, which no history of mmengine's needs"
        )
    return getattr(HistoryBuffer, name)


_statistic.__module__, _statistic.__qualname__ = "builtins", "getattr"

try:
    from numpy._core.multiarray import _reconstruct, scalar
except ImportError:  # numpy 1
    from numpy.core.multiarray import (  # type: ignore[no-redef, unused-ignore]
        _reconstruct,
        scalar,
    )

_NUMBERS = (np.float64, np.float32, np.int64, np.int32)
_HISTORY: list[Any] = [
    *(HistoryBuffer, _statistic, _reconstruct, scalar, np.ndarray, np.dtype),
    *(type(np.dtype(number)) for number in _NUMBERS),
]


@CheckpointLoader.register_scheme(prefixes="", force=True)  # type: ignore[untyped-decorator, unused-ignore]
def load_from_local(filename: str, map_location: Any) -> Any:
    """Loads a local checkpoint: weights, plain values, and mmengine's log history.

    Raises:
        FileNotFoundError: no file of this name.
        pickle.UnpicklingError: a file that holds anything else.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with also_allowing(_HISTORY):
        return torch.load(path, map_location=map_location, weights_only=True)
