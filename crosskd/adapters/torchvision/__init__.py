"""Adapters for torchvision's detectors, any backbone."""

from crosskd.adapters.torchvision.dense import TorchvisionFCOS, TorchvisionRetinaNet
from crosskd.adapters.torchvision.faster_rcnn import TorchvisionFasterRCNN
from crosskd.adapters.torchvision.ssd import TorchvisionSSD

__all__ = ["TorchvisionFCOS", "TorchvisionFasterRCNN", "TorchvisionRetinaNet", "TorchvisionSSD"]
