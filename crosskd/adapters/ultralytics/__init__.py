"""Adapter for ultralytics' YOLO detectors, and `trainer` to distil them from ultralytics' own training.

Importing this needs ``ultralytics`` 8.4.190 or newer, whose licence is the AGPL-3.0 unless you have bought
another one: using it is your choice, and nothing of it is part of this package. `find_adapter` imports this
module for ultralytics' models only.
"""

from __future__ import annotations

import importlib
from typing import Any

try:
    from crosskd.adapters.ultralytics.detect import DetectHead, UltralyticsDetect
except ImportError as error:
    raise ImportError(
        f"ultralytics' adapter needs ultralytics 8.4.190 or newer, which can't be imported ({error}): "
        "pip install 'crosskd[ultralytics]'. Read docs/yolo.md on its licence, the AGPL-3.0, first"
    ) from error

__all__ = ["DetectHead", "UltralyticsDetect"]

_INTEGRATION = "crosskd.integrations.ultralytics"


def __getattr__(name: str) -> Any:
    """``trainer`` and its class, which have moved to `crosskd.integrations.ultralytics`."""
    if name in ("CrossKDTrainer", "trainer"):
        # By its name, for nothing here depends on it: it stands above.
        return getattr(importlib.import_module(_INTEGRATION), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
