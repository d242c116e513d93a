"""Adapter for ultralytics' YOLO detectors.

Importing this needs ``ultralytics`` 8.4.190 or newer, whose licence is the AGPL-3.0 unless you have bought
another one: using it is your choice, and nothing of it is part of this package. `find_adapter` imports this
module for ultralytics' models only.
"""

from __future__ import annotations

try:
    from crosskd.adapters.ultralytics.detect import DetectHead, UltralyticsDetect
except ImportError as error:
    raise ImportError(
        f"ultralytics' adapter needs ultralytics 8.4.190 or newer, which can't be imported ({error}): "
        "pip install 'ultralytics>=8.4.190'. Read docs/yolo.md on its licence, the AGPL-3.0, first"
    ) from error

__all__ = ["DetectHead", "UltralyticsDetect"]
