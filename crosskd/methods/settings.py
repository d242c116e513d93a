"""What is published for CrossKD and prediction mimicking, by the type of the teacher's head, and our own
settings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from crosskd.adapters.base import Head

__all__ = ["OTHER", "OTHER_DISTRIBUTIONS", "SETTINGS", "HeadSettings", "RegressionLoss", "settings_for"]

RegressionLoss = Literal["giou", "log_iou", "distribution_kl"]


@dataclass(frozen=True)
class HeadSettings:
    """What a method of predictions does for a type of head unless it is given otherwise.

    Attributes:
        position: after how many blocks the teacher's head takes over; ``None`` for the last place in front of
            at least one of the teacher's blocks where the features of the two are of the same kind.
        cls_weight: weight of the classification loss (quality focal).
        reg_weight: weight of the regression loss.
        regression: which loss that is.
        quality_weight: weight of the loss on a centerness or IoU prediction; 0 where none was published, 1
            for a head with objectness.
        published: whether these are the paper's settings; else they are ours.
    """

    position: int | None
    cls_weight: float
    reg_weight: float
    regression: RegressionLoss
    quality_weight: float = 0.0
    published: bool = False


SETTINGS: dict[str, HeadSettings] = {
    "GFL": HeadSettings(3, 1.0, 4.0, "distribution_kl", published=True),
    "RetinaNet": HeadSettings(3, 1.0, 1.0, "giou", published=True),
    "ATSS": HeadSettings(3, 1.0, 1.0, "giou", quality_weight=1.0, published=True),
    "FCOS": HeadSettings(2, 0.4, 0.75, "log_iou", published=True),
    # Ours from here on. Half of RTMDet's two blocks, and the losses of RetinaNet's boxes.
    "RTMDet": HeadSettings(1, 1.0, 1.0, "giou"),
    # The weights of the head's own losses of the same kind in ultralytics' defaults (cls, dfl, box), so that
    # the teacher counts as much as the labels do.
    "YOLO with distributions": HeadSettings(1, 0.5, 1.5, "distribution_kl"),
    "YOLO with distances": HeadSettings(1, 0.5, 7.5, "giou"),
    "SSD": HeadSettings(0, 1.0, 1.0, "giou"),
    "RPN": HeadSettings(None, 1.0, 1.0, "giou"),
    "box head": HeadSettings(None, 1.0, 1.0, "giou"),
}
"""By `crosskd.adapters.Head.head_type`."""

OTHER = HeadSettings(1, 1.0, 1.0, "giou")
"""Ours, for a head of any other type; position 0 where it has no tower."""

OTHER_DISTRIBUTIONS = HeadSettings(1, 1.0, 4.0, "distribution_kl")
"""Ours, for a head of any other type that predicts distributions and decodes no boxes: GFL's weights."""


def settings_for(head: Head) -> HeadSettings:
    """The settings that hold for a teacher's head.

    Args:
        head: the teacher's, for it judges both sides.
    """
    if head.head_type in SETTINGS:
        return SETTINGS[head.head_type]
    settings = OTHER_DISTRIBUTIONS if head.bins > 1 and not head.decodes else OTHER
    if head.objectness:
        settings = replace(settings, quality_weight=1.0)
    shortest = min((len(tower.blocks) for branch in head.branches for tower in branch.towers), default=0)
    return replace(settings, position=0) if shortest == 0 else settings
