"""Adapters for torchvision's detectors, any backbone."""

from crosskd.adapters.torchvision.dense import TorchvisionFCOS, TorchvisionRetinaNet

__all__ = ["TorchvisionFCOS", "TorchvisionRetinaNet"]
