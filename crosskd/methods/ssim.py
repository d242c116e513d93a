"""Structural distillation: the student's feature maps look like the teacher's around each location."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crosskd.losses import ssim_loss
from crosskd.losses.ssim import MinMax, check_minmax, check_window
from crosskd.methods.maps import MapMethod
from crosskd.schedule import Schedule
from crosskd.step import Step

__all__ = ["StructuralKD"]

# Both 2 and 4 were published; that it is this one, whatever the student's type, is ours. In
# benchmarks/results/ssim_scopes.md the two don't differ by more than chance.
_WEIGHT = 4.0


class StructuralKD(MapMethod):
    r"""Imitation of the feature pyramid by the structural similarity (SSIM) of each channel.

    .. math::
        w \sum_l \frac{1}{M_l} \sum \tfrac{1}{2} \bigl(1 - \mathrm{SSIM}(\hat{s}_l, \hat{t}_l)\bigr)

    over all :math:`M_l` elements of level l, where the hat scales a map from 0, its minimum, to 1, its
    maximum. Means, variances and covariance of the SSIM are those of a Gaussian window around each location.
    The strides of the levels must agree and nothing else.

    Published: the window, its deviation, and the weights 2 and 4. Ours: what has one minimum and maximum
    (``"channel"`` did best of the four in a small comparison), that the gradient passes through them, maps
    that are mirrored at their border (coarse levels are smaller than the window), and 4 of the two weights.

    Args:
        weight: of ``kd_ssim``; 4 unless given.
        levels: the student's levels to use, counted from 0, the finest; all that have a counterpart unless
            given.
        window_size: side of the window in cells, odd.
        sigma: the window's standard deviation in cells, above 0.
        minmax: what has one minimum and maximum: ``"channel"``, each channel of each image; ``"batch"``, each
            channel of all images; ``"map"``, all channels of each image; ``"all"``, everything. Of a level
            with a single location nothing is left to compare with ``"channel"``.
        resize: resizes the teacher's maps to the student's where they differ, and takes the teacher's level
            of the nearest stride where none is equal. Without it other sizes are refused.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the loss's name where two methods' would clash.

    Raises:
        ValueError: a weight or sigma that is not above 0, no levels, an even window, an unknown ``minmax``.

    References:
        Structural Knowledge Distillation for Object Detection (de Rijk et al., NeurIPS 2022).

    Example:
        >>> StructuralKD(2.0, minmax="map").extra_repr()
        "weight=2.0, levels=None, resize=False, window_size=11, sigma=1.5, minmax='map'"
    """

    def __init__(
        self,
        weight: float | None = None,
        levels: Sequence[int] | None = None,
        *,
        window_size: int = 11,
        sigma: float = 1.5,
        minmax: MinMax = "channel",
        resize: bool = False,
        schedule: Schedule | None = None,
        name: str = "ssim",
    ) -> None:
        super().__init__(weight, levels, resize=resize, schedule=schedule, name=name)
        check_window(window_size, sigma)
        check_minmax(minmax)
        self.window_size, self.sigma, self.minmax = window_size, sigma, minmax

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        own = f"window_size={self.window_size}, sigma={self.sigma}, minmax={self.minmax!r}"
        return f"{super().extra_repr()}, {own}"

    def weight_for(self, head_type: str) -> float:
        """One of the two published weights, whatever the student's type."""
        return _WEIGHT

    def loss_names(self) -> tuple[str, ...]:
        """The only loss."""
        return ("kd_ssim",)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Compares the maps level by level."""
        losses = []
        for _, student, teacher in self.compared(step):
            losses.append(
                ssim_loss(
                    student, teacher, window_size=self.window_size, sigma=self.sigma, minmax=self.minmax
                )
            )
        assert self.weight is not None
        return {"kd_ssim": self.weight * torch.stack(losses).sum()}
