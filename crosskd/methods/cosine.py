"""Cosine alignment: a map of the student's takes on the directions of a foundation model's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crosskd._checks import compute_dtype
from crosskd.losses import cosine_loss
from crosskd.methods.maps import MapMethod
from crosskd.pairing import Pair
from crosskd.predictions import mean_over_ranks
from crosskd.schedule import Schedule
from crosskd.step import Step, outside_graph

__all__ = ["CosineAlignment", "GradientShare"]

# 5 to 20 is published, by the size of the student. 10 for all of them is ours.
_WEIGHT = 10.0

# Published: the map of this stride, the deepest that the student's backbone gives.
_STRIDE = 32.0

# Ours: of the factor that balances the gradients, what a step keeps of it, and its range.
_KEPT = 0.9
_LARGEST = 1000.0


class CosineAlignment(MapMethod):
    r"""A map of the student's takes on the directions of the teacher's vectors, position by position.

    .. math::
        w \sum_l \frac{1}{P_l} \sum_p \bigl(1 - \cos(s_{lp}, t_{lp})\bigr)

    over the :math:`P_l` positions of each map that is used. Made for teachers that are no detectors: a
    vision transformer that was trained without labels, or any other backbone behind
    `crosskd.adapters.backbone`. The student's map is projected to the teacher's width, the teacher's is
    resized to the student's size, and the strides may be any.

    Published for the student's map of stride 32, and for a weight between 5 and 20 that depends on the
    student. The weight of 10 is ours, and so is what happens where there is no such map: the level of the
    nearest stride is taken, on either side.

    With ``gradient_share`` the weight is balanced as training goes on. In each backward pass the gradient of
    this loss at the student's maps and that of all other losses there are measured, and a factor on the
    loss moves towards

    .. math::
        f \leftarrow f \, \frac{r}{1 - r} \, \frac{\|g_\mathrm{other}\|}{\|g_\mathrm{own}\|}

    so that the share of its own, in the sum of both norms, becomes r. Each step moves the factor a tenth of
    the way there, on a logarithmic scale; it stays between 1/1000 and 1000. The norms are averaged over
    processes, so the factor is the same on all of them. It is published that the weight follows the ratio of
    gradient norms; the formula is ours.

    Args:
        weight: of ``kd_cosine``; 10 unless given. Where the gradient is balanced, the weight to begin with.
        levels: the student's levels to use, counted from 0, the finest, each with the teacher's map of the
            nearest stride; that of stride 32 alone unless given.
        gradient_share: the share that this loss's gradient shall have at the student's maps, between 0 and 1;
            the weight stays as it is unless given.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the loss's name where two methods' would clash.

    Attributes:
        balance: measures the gradients and holds the factor; ``None`` without ``gradient_share``.

    Raises:
        ValueError: a weight that is not above 0, no levels, a share that is not between 0 and 1, or one
            together with a schedule that warms up or decays, which the balance would undo.

    References:
        RT-DETRv4: Painlessly Furthering Real-Time Object Detection with Vision Foundation Models (Liao et
        al., 2025, arXiv 2510.25257).

    Example:
        >>> CosineAlignment(gradient_share=0.3).extra_repr()
        'weight=None, levels=None, gradient_share=0.3'
    """

    def __init__(
        self,
        weight: float | None = None,
        levels: Sequence[int] | None = None,
        *,
        gradient_share: float | None = None,
        schedule: Schedule | None = None,
        name: str = "cosine",
    ) -> None:
        super().__init__(weight, levels, resize=True, schedule=schedule, name=name)
        if gradient_share is not None and schedule is not None and (schedule.warmup or schedule.decay):
            raise ValueError(
                "gradient_share= holds the gradient's share whatever a schedule multiplies the loss by, so a "
                "warm-up or decay would have no effect: give a schedule that has a stop alone, or no share"
            )
        self.gradient_share = gradient_share
        self.balance = None if gradient_share is None else GradientShare(gradient_share)
        self.watches_maps = gradient_share is not None

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"weight={self.weight}, levels={self.levels}, gradient_share={self.gradient_share}"

    def weight_for(self, head_type: str) -> float:
        """10 for all."""
        return _WEIGHT

    def loss_names(self) -> tuple[str, ...]:
        """The only loss."""
        return ("kd_cosine",)

    def _matched(self, pair: Pair) -> tuple[tuple[int, int], ...]:
        """(student's level, teacher's level) of those that are compared; one where no levels were given."""
        matches = super()._matched(pair)
        if self.levels is not None or pair.student.strides is None or pair.teacher.strides is None:
            return matches
        level = _nearest(pair.student.strides, _STRIDE)
        return ((level, _nearest(pair.teacher.strides, pair.scale * pair.student.strides[level])),)

    def of_student(self, features: Tensor) -> Tensor:
        """The map itself, or the same numbers on a branch whose gradient is measured."""
        return features if self.balance is None else self.balance.branch(features)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Compares the maps position by position."""
        factor = None if self.balance is None else self.balance.advance()
        losses = [cosine_loss(student, teacher) for _, student, teacher in self.compared(step)]
        assert self.weight is not None
        loss = self.weight * torch.stack(losses).sum()
        return {"kd_cosine": loss if factor is None else loss * factor}


def _nearest(strides: Sequence[float], wanted: float) -> int:
    """The level of the nearest stride, the last of several: the deepest of a transformer's blocks."""
    ratios = [max(stride / wanted, wanted / stride) for stride in strides]
    return max(level for level, ratio in enumerate(ratios) if ratio == min(ratios))


class GradientShare(nn.Module):
    """A factor on a loss that gives its gradient a share of all gradient at some tensors.

    Each step: `advance`, then `branch` for every tensor that the loss is made of, then the backward pass.

    Args:
        share: the norm of the loss's own gradient over the sum of it and the norm of all others'.

    Attributes:
        factor: a buffer, shape (); 1 at first.

    Raises:
        ValueError: a share that is not between 0 and 1.

    Example:
        >>> balance, leaf = GradientShare(0.5), torch.ones(2, requires_grad=True)
        >>> for _ in range(100):
        ...     factor = balance.advance()
        ...     (factor * balance.branch(leaf).sum() + 4 * leaf.sum()).backward()
        >>> round(balance.factor.item(), 3)
        4.0
    """

    factor: Tensor

    def __init__(self, share: float) -> None:
        super().__init__()
        if not 0 < share < 1:
            raise ValueError(f"gradient_share must be between 0 and 1, got {share}")
        self.share = share
        self.register_buffer("factor", torch.ones(()))
        # Squared norms since the last step: the loss's own gradient, all others'. No buffer, for
        # DistributedDataParallel gives every process the first one's buffers.
        self.squares = torch.zeros(2)

    def get_extra_state(self) -> Tensor:
        """What was measured since the last step, so that a resumed run goes on as it would have."""
        return self.squares

    def set_extra_state(self, state: Tensor) -> None:
        """Takes what `get_extra_state` gave."""
        self.squares = state

    @outside_graph
    def branch(self, tensor: Tensor) -> Tensor:
        """The same numbers, for the loss alone, so that its gradient can be told from the others'."""
        if not torch.is_grad_enabled() or not tensor.requires_grad:
            return tensor
        branch = tensor.view_as(tensor)
        own: list[Tensor] = []
        branch.register_hook(own.append)  # type: ignore[no-untyped-call, unused-ignore]
        tensor.register_hook(lambda total: self._measure(own, total))  # type: ignore[no-untyped-call, unused-ignore]
        return branch

    def _measure(self, own: list[Tensor], total: Tensor) -> None:
        """Runs in the backward pass, behind everything that the tensor went into."""
        if not own:  # another loss was back-propagated alone
            return
        gradient = own.pop().detach()
        norms = torch.stack([_norm(gradient), _norm(total.detach() - gradient)])
        self.squares = self.squares.to(norms.device) + norms.square()

    @outside_graph
    def advance(self) -> Tensor:
        """Moves the factor by what the last backward pass has shown; returns a copy of it.

        Without gradients (under ``no_grad``), or where one of the two was 0 or not finite, it stays.
        Every process must call it as often as the others.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                self.factor.copy_(self._moved())
        # A copy, because the backward pass needs the number as it is now.
        return self.factor.clone()

    def _moved(self) -> Tensor:
        norms = self.squares.to(self.factor.device).sqrt()
        self.squares = torch.zeros_like(norms)
        own, others = mean_over_ranks(torch.where(norms.isfinite().all(), norms, 0.0)).unbind()
        wanted = self.factor * others / own * (self.share / (1 - self.share))
        wanted = wanted.clamp(1 / _LARGEST, _LARGEST)
        moved = self.factor**_KEPT * wanted ** (1 - _KEPT)
        return torch.where((own > 0) & (others > 0), moved, self.factor)


def _norm(gradient: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=compute_dtype(gradient))
    return norm
