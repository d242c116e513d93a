"""GFL and ATSS in plain PyTorch, and how crosskd is told about a detector that it doesn't know.

Read `detector` and one of `gfl` and `atss` for the detector, `adapter` for what distilling it takes.
"""

from dense_heads.adapter import ATSSAdapter, GFLAdapter, adapter_of
from dense_heads.atss import ATSS
from dense_heads.detector import DenseDetector
from dense_heads.gfl import GFL
from dense_heads.mmdet_weights import load_mmdet_checkpoint

__all__ = ["ATSS", "GFL", "ATSSAdapter", "DenseDetector", "GFLAdapter", "adapter_of", "load_mmdet_checkpoint"]
