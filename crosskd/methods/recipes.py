"""The published settings of CrossKD, one recipe a head type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ATSS", "FCOS", "GFL", "RETINANET", "HeadRecipe"]

RegressionLoss = Literal["giou", "log_iou", "distribution_kl"]


@dataclass(frozen=True)
class HeadRecipe:
    """What a method does for a type of head unless it is told otherwise.

    Attributes:
        head: the head type's name.
        position: after how many blocks the teacher's head takes over; ``None`` for the last place in front
            of at least one of the teacher's blocks, where the features of the two are of the same kind.
        cls_weight: weight of the classification loss (quality focal).
        reg_weight: weight of the regression loss.
        regression: which loss that is.
        quality_weight: weight of the loss on a centerness or IoU prediction; 0 where none was published.
        quality_normalizer: the normaliser sums the positives' quality targets instead of counting them.
        times_batch: the detector's own losses are means over a batch times the number of its images, so the
            methods' are multiplied by it too, and the ratio of the two is the same for any batch size.
        background: the class that means no object, where the classes share a softmax.
    """

    head: str
    position: int | None
    cls_weight: float
    reg_weight: float
    regression: RegressionLoss
    quality_weight: float = 0.0
    quality_normalizer: bool = False
    times_batch: bool = False
    background: int | None = None


GFL = HeadRecipe("GFL", 3, cls_weight=1.0, reg_weight=4.0, regression="distribution_kl")
RETINANET = HeadRecipe("RetinaNet", 3, cls_weight=1.0, reg_weight=1.0, regression="giou")
ATSS = HeadRecipe("ATSS", 3, cls_weight=1.0, reg_weight=1.0, regression="giou", quality_weight=1.0)
FCOS = HeadRecipe("FCOS", 2, cls_weight=0.4, reg_weight=0.75, regression="log_iou", quality_normalizer=True)
