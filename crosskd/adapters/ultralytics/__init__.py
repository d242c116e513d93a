"""Adapter for ultralytics' YOLO detectors, and `trainer` to distil them from ultralytics' own training.

Importing this needs ``ultralytics`` 8.4.190 or newer, whose licence is the AGPL-3.0 unless you have bought
another one: using it is your choice, and nothing of it is part of this package. `find_adapter` imports this
module for ultralytics' models only.
"""

from __future__ import annotations

try:
    from crosskd.adapters._ultralytics_detect import UltralyticsAdapter
    from crosskd.adapters._ultralytics_trainer import CrossKDTrainer, trainer
except ImportError as error:
    raise ImportError(
        f"ultralytics' adapter needs ultralytics 8.4.190 or newer, which can't be imported ({error}): "
        "pip install 'crosskd[ultralytics]'. Read docs/yolo.md on its licence, the AGPL-3.0, first"
    ) from error

__all__ = ["CrossKDTrainer", "UltralyticsAdapter", "trainer"]
