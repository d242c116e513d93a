"""Adapters for mmdet's one-stage detectors, and for its Deformable DETR and DINO.

Importing this needs mmdet 3 with mmcv's compiled operators; `crosskd.adapters.find_adapter` imports it for
mmdet's detectors only.
"""

from __future__ import annotations

try:
    import mmdet.models  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"mmdet's adapter needs mmdet 3 and mmcv with compiled operators, which can't be imported ({error}): "
        "run examples/mmdet/install_mmdet.py of the crosskd sources, which installs a set of versions that "
        "works with a current PyTorch (docs/mmdet.md)"
    ) from error

from crosskd.adapters.mmdet.heads import MMDetHead
from crosskd.adapters.mmdet.single_stage import MMDetSingleStage
from crosskd.adapters.mmdet.transformer import MMDetTransformer

__all__ = ["MMDetHead", "MMDetSingleStage", "MMDetTransformer"]
