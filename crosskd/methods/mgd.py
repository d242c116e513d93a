"""MGD: from the student's map, masked at random, the teacher's whole map is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from crosskd.losses import mgd_loss
from crosskd.methods.maps import MapMethod
from crosskd.pairing import Pair
from crosskd.schedule import Schedule
from crosskd.step import Step

__all__ = ["MGD"]


@dataclass(frozen=True)
class _Settings:
    """Weight of the sum, share of masked locations, and locations of an image's five levels.

    The locations are those at the published size, 800 x 1333 pixels padded to 800 x 1344. Times the published
    256 channels they make of the weight of a sum that of a mean.
    """

    alpha: float
    mask_ratio: float
    locations: int


# Published, but for the locations: on strides 8 to 128, and on strides 4 to 64.
_ONE_STAGE = _Settings(2e-5, 0.65, locations=100 * 168 + 50 * 84 + 25 * 42 + 13 * 21 + 7 * 11)
_TWO_STAGES = _Settings(5e-7, 0.45, locations=200 * 336 + 100 * 168 + 50 * 84 + 25 * 42 + 13 * 21)
_CHANNELS = 256


def _settings_for(head_type: str) -> _Settings:
    return _TWO_STAGES if head_type == "RPN" else _ONE_STAGE


class MGD(MapMethod):
    r"""Masked generative distillation: the student's map must hold enough to generate the teacher's from.

    .. math::
        w \sum_l \frac{1}{N} \sum (t_l - G_l(m_l \odot s_l))^2

    over the levels l and N images. The mask m is drawn anew at each step for each level and image; each
    location is 0, in all channels, with the probability ``mask_ratio``. The generator :math:`G` is a 3x3
    convolution, ReLU and another 3x3 convolution, one for each level. It is a part of the method, trained
    with the student and thrown away with the `crosskd.Distiller`. The strides of the levels must agree and
    nothing else. No labels are read.

    Published for the sum, with the weight 2e-5 and the mask ratio 0.65 for students with one stage, 5e-7 and
    0.45 for those with two. The weight of a sum is tied to the size of the images, about 800 x 1333 pixels,
    and to 256 channels. ``reduction="mean"`` divides by the number of elements of an image's maps on all
    levels together, so its weight, ours, is not: 114.688 and 11.459 equal the published weights at that size.

    The masks are drawn from torch's global random generator of the maps' device, which
    ``torch.manual_seed`` seeds.

    Args:
        weight: of ``kd_mgd``; for the student's type and the ``reduction`` unless given.
        levels: the student's levels to use, counted from 0, the finest; all that have a counterpart unless
            given.
        mask_ratio: the probability that a location is masked; what was published for the student's type
            unless given.
        reduction: ``"sum"`` over an image's maps, as published, or the ``"mean"`` over all their elements.
        resize: resizes the teacher's maps to the student's where they differ, and takes the teacher's level
            of the nearest stride where none is equal. Without it other sizes are refused.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the loss's name where two methods' would clash.

    Attributes:
        generators: by ``level0``….

    Raises:
        ValueError: a weight or mask ratio that is out of range, another reduction, no levels.

    References:
        Masked Generative Distillation (Yang et al., ECCV 2022).

    Example:
        >>> MGD(reduction="mean").extra_repr()
        "weight=None, levels=None, resize=False, mask_ratio=None, reduction='mean'"
    """

    def __init__(
        self,
        weight: float | None = None,
        levels: Sequence[int] | None = None,
        *,
        mask_ratio: float | None = None,
        reduction: Literal["sum", "mean"] = "sum",
        resize: bool = False,
        schedule: Schedule | None = None,
        name: str = "mgd",
    ) -> None:
        super().__init__(weight, levels, resize=resize, schedule=schedule, name=name)
        if mask_ratio is not None and not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio is a probability from 0 to below 1, got {mask_ratio}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f'reduction must be "sum" or "mean", got {reduction!r}')
        self.mask_ratio = mask_ratio
        self.reduction = reduction
        self.generators = nn.ModuleDict()

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"{super().extra_repr()}, mask_ratio={self.mask_ratio}, reduction={self.reduction!r}"

    def weight_for(self, head_type: str) -> float:
        """What was published for a student with one stage or two; of a mean, what equals it."""
        known = _settings_for(head_type)
        return known.alpha if self.reduction == "sum" else known.alpha * known.locations * _CHANNELS

    def setup(self, pair: Pair) -> None:
        """Matches the levels, settles the weight, makes projections and generators."""
        super().setup(pair)
        if self.mask_ratio is None:
            head_type = pair.student.heads[0].head_type if pair.student.heads else ""
            self.mask_ratio = _settings_for(head_type).mask_ratio
        for level, _, width in self.widths(pair):
            self.generators[f"level{level}"] = nn.Sequential(
                nn.Conv2d(width, width, kernel_size=3, padding=1),
                nn.ReLU(inplace=True),  # nothing else reads what the convolution gives
                nn.Conv2d(width, width, kernel_size=3, padding=1),
            )

    def loss_names(self) -> tuple[str, ...]:
        """The only loss."""
        return ("kd_mgd",)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Masks the student's maps, generates the teacher's and compares them."""
        assert self.weight is not None
        losses, elements = [], 0
        for level, student, teacher in self.compared(step):
            generated = self.generators[f"level{level}"](self._masked(student))
            losses.append(mgd_loss(generated, teacher))
            elements += teacher.shape[1:].numel()
        loss = torch.stack(losses).sum()
        return {"kd_mgd": self.weight * (loss / elements if self.reduction == "mean" else loss)}

    def _masked(self, features: Tensor) -> Tensor:
        """A map with some of its locations set to 0, those of each image its own."""
        assert self.mask_ratio is not None
        batch, _, height, width = features.shape
        kept = torch.rand(batch, 1, height, width, device=features.device) >= self.mask_ratio
        return features * kept
