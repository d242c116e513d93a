"""PKD: the student's feature maps imitate the teacher's up to scale and offset of each channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crosskd.losses import pkd_loss
from crosskd.methods.maps import MapMethod
from crosskd.schedule import Schedule
from crosskd.step import Step

__all__ = ["PKD"]

# Published for these students; ours for all others, which is the more frequent of the two.
_WEIGHTS = {"RPN": 6.0}
_WEIGHT = 10.0


class PKD(MapMethod):
    r"""Imitation of the feature pyramid by the Pearson correlation of each channel.

    .. math::
        w \sum_l \frac{1}{M_l} \sum \tfrac{1}{2} (\mathrm{norm}(s_l) - \mathrm{norm}(t_l))^2

    over all :math:`M_l` elements of level l, where norm takes away each channel's mean over batch and space
    and divides by its standard deviation. The strides of the levels must agree and nothing else: an FCOS
    teaches a RetinaNet, a Faster R-CNN or a plain backbone teaches anything. Levels are matched by stride;
    those without a counterpart are left out and named once. Where widths differ, a 1x1 projection of the
    student's map is trained with the student and thrown away with the `crosskd.Distiller`.

    Published for the first four levels with the weights 6 (Faster R-CNN) and 10 (RetinaNet, RepPoints, and an
    FCOS teaching a RetinaNet). For other students nothing was published, and 10 is our choice.

    Args:
        weight: of ``kd_pkd``; what was published for the student's type unless given.
        levels: the student's levels to use, counted from 0, the finest; all that have a counterpart unless
            given.
        resize: resizes the teacher's maps to the student's where they differ, and takes the teacher's level
            of the nearest stride where none is equal. Without it other sizes are refused.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the loss's name where two methods' would clash.

    Raises:
        ValueError: a weight of 0 or less, no levels.
        TypeError: a weight that is no number.

    References:
        PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient (Cao et
        al., NeurIPS 2022), equation 3 and section 4.1.

    Example:
        >>> PKD(levels=(0, 1)).extra_repr()
        'weight=None, levels=(0, 1), resize=False'
    """

    projection_bias = False  # the correlation takes away every channel's mean

    def __init__(
        self,
        weight: float | None = None,
        levels: Sequence[int] | None = None,
        *,
        resize: bool = False,
        schedule: Schedule | None = None,
        name: str = "pkd",
    ) -> None:
        super().__init__(weight, levels, resize=resize, schedule=schedule, name=name)

    def weight_for(self, head_type: str) -> float:
        """What was published for the student's type, else 10."""
        return _WEIGHTS.get(head_type, _WEIGHT)

    def loss_names(self) -> tuple[str, ...]:
        """The only loss."""
        return ("kd_pkd",)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Compares the maps level by level."""
        losses = [pkd_loss(student, teacher) for _, student, teacher in self.compared(step)]
        assert self.weight is not None
        return {"kd_pkd": self.weight * torch.stack(losses).sum()}
