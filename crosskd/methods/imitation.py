"""Feature imitation: the student's maps, through a block of its own, come close to the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crosskd.losses import imitation_loss
from crosskd.losses.imitation import check_active
from crosskd.methods.maps import MapMethod
from crosskd.schedule import Schedule
from crosskd.step import Step

__all__ = ["FeatureImitation"]

# Ours, for all students: nothing published is known to hold for a pyramid's maps.
_WEIGHT = 1.0
# Of the published implementation.
_INACTIVE_WEIGHT = 0.05


class FeatureImitation(MapMethod):
    r"""Plain squared error of the feature pyramids, behind one adaptation block per level.

    .. math::
        w \sum_l \frac{1}{M_l} \sum_{n, c, x} a_{nx} \, (\phi_l(s_l) - t_l)_{ncx}^2

    over all :math:`M_l` elements of a level. :math:`\phi_l` is a 3x3 convolution, a ReLU and a 1x1
    convolution, trained with the student and thrown away with the `crosskd.Distiller`: what only the
    teacher's modality shows the student can't copy, so its own maps need not equal the teacher's; the
    teacher's must follow from them. :math:`a` is 1, or with ``active_above`` smaller where the teacher's map
    is not active. The strides of the levels must agree and nothing else.

    The feature part of CMKD, made for a teacher that sees another modality of the scene by
    ``Distiller(teacher_view=…)``. The squared error, the block and the weight 0.05 are those of the published
    implementation, which differs from the paper, for maps that are views from above; the block's form, the
    weight of the loss and the share are ours.

    Args:
        weight: of ``kd_imitation``; 1 unless given.
        levels: the student's levels to use, counted from 0, the finest; all that have a counterpart unless
            given.
        adapt: whether there is an adaptation block; without it only widths that differ are bridged, by a 1x1
            projection.
        active_above: weight locations by the teacher's map: active are those whose mean absolute value is
            above this share of the image's largest. 0 takes whatever is not zero, which in the maps of a
            pyramid is everything; 0.1 to 0.5 makes a difference there. ``None`` counts all alike.
        inactive_weight: weight of the locations that are not active.
        resize: resizes the teacher's maps to the student's where they differ, and takes the teacher's level
            of the nearest stride where none is equal. Without it other sizes are refused.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the loss's name where two methods' would clash.

    Raises:
        ValueError: a weight that is not above 0, no levels, a share or weight that is out of range.

    References:
        Cross-Modality Knowledge Distillation Network for Monocular 3D Object Detection (Hong et al., ECCV
        2022), feature distillation.

    Example:
        >>> FeatureImitation(active_above=0.2).extra_repr()
        'weight=None, levels=None, resize=False, adapt=True, active_above=0.2, inactive_weight=0.05'
    """

    def __init__(
        self,
        weight: float | None = None,
        levels: Sequence[int] | None = None,
        *,
        adapt: bool = True,
        active_above: float | None = None,
        inactive_weight: float = _INACTIVE_WEIGHT,
        resize: bool = False,
        schedule: Schedule | None = None,
        name: str = "imitation",
    ) -> None:
        super().__init__(weight, levels, resize=resize, schedule=schedule, name=name)
        check_active(active_above, inactive_weight)
        self.adapt, self.active_above, self.inactive_weight = adapt, active_above, inactive_weight

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        own = f"adapt={self.adapt}, active_above={self.active_above}, inactive_weight={self.inactive_weight}"
        return f"{super().extra_repr()}, {own}"

    def weight_for(self, head_type: str) -> float:
        """1 for every type."""
        return _WEIGHT

    def projection(self, width: int, teacher_width: int) -> nn.Module | None:
        """The adaptation block; without ``adapt`` a 1x1 projection where the widths differ."""
        if not self.adapt:
            return super().projection(width, teacher_width)
        return nn.Sequential(
            nn.Conv2d(width, teacher_width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher_width, teacher_width, kernel_size=1),
        )

    def loss_names(self) -> tuple[str, ...]:
        """The only loss."""
        return ("kd_imitation",)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Compares the maps level by level."""
        losses = [
            imitation_loss(
                student, teacher, active_above=self.active_above, inactive_weight=self.inactive_weight
            )
            for _, student, teacher in self.compared(step)
        ]
        assert self.weight is not None
        return {"kd_imitation": self.weight * torch.stack(losses).sum()}
