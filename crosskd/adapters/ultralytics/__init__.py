"""Adapter for ultralytics' YOLO detectors, and `trainer` to distil them from ultralytics' own training.

Importing this needs ``ultralytics`` 8.4.190 or newer, whose licence is the AGPL-3.0 unless you have bought
another one: using it is your choice, and nothing of it is part of this package. `find_adapter` imports this
module for ultralytics' models only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from crosskd.adapters.ultralytics.detect import DetectHead, UltralyticsDetect
except ImportError as error:
    raise ImportError(
        f"ultralytics' adapter needs ultralytics 8.4.190 or newer, which can't be imported ({error}): "
        "pip install 'crosskd[ultralytics]'. Read docs/yolo.md on its licence, the AGPL-3.0, first"
    ) from error

if TYPE_CHECKING:
    from crosskd.integrations.ultralytics import CrossKDTrainer, trainer

__all__ = ["CrossKDTrainer", "DetectHead", "UltralyticsDetect", "trainer"]


def __getattr__(name: str) -> Any:
    """`trainer` and its class stand above the `Distiller`, which imports adapters: they are found late."""
    if name not in ("CrossKDTrainer", "trainer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from crosskd.integrations import ultralytics

    return getattr(ultralytics, name)
