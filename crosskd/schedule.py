"""How strongly a method counts as training goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """The factor on a method's losses: a warm-up, a plateau of 1, a decay, a stop; each optional.

    Distillation often speeds training up early and may hold the student back, or overfit, late; decay or
    stop is for that. From the stop on the teacher is not even run.

    Args:
        warmup: how long the factor rises linearly to 1; the first one is ``1 / warmup``, never 0.
        decay: ``(start, end)``, between which the factor falls linearly from 1 to 0.
        stop: from when on the factor is 0.
        unit: ``"step"`` counts the training forwards of the `Distiller` with gradients (each part of an
            accumulated batch is one); ``"epoch"`` takes what `Distiller.set_epoch` was given.

    Raises:
        ValueError: negative numbers, numbers that are not whole, a decay that ends before it starts, a stop
            before the warm-up's end, an unknown unit.

    Example:
        >>> schedule = Schedule(warmup=4, decay=(8, 12))
        >>> [schedule.factor(step) for step in (0, 1, 4, 8, 10, 12)]
        [0.25, 0.5, 1.0, 1.0, 0.5, 0.0]
    """

    warmup: int = 0
    decay: tuple[int, int] | None = None
    stop: int | None = None
    unit: Literal["step", "epoch"] = "step"

    def __post_init__(self) -> None:
        numbers = {"warmup": (self.warmup,), "decay": self.decay or (), "stop": (self.stop or 0,)}
        for name, values in numbers.items():
            if any(isinstance(value, bool) or not hasattr(value, "__index__") for value in values):
                raise ValueError(
                    f"{name} counts steps or epochs, in whole numbers, got {getattr(self, name)!r}"
                )
        if self.warmup < 0:
            raise ValueError(f"warmup must be 0 or more, got {self.warmup}")
        if self.decay is not None and not self.warmup <= self.decay[0] < self.decay[1]:
            raise ValueError(
                f"decay must be (start, end) with warmup <= start < end, got {self.decay} with a "
                f"warmup of {self.warmup}"
            )
        if self.stop is not None and self.stop <= self.warmup:
            raise ValueError(f"stop must come after the warmup of {self.warmup}, got {self.stop}")
        if self.unit not in ("step", "epoch"):
            raise ValueError(f'unit must be "step" or "epoch", got {self.unit!r}')

    def factor(self, now: int) -> float:
        """The factor at a step or an epoch, both counted from 0."""
        if self.stop is not None and now >= self.stop:
            return 0.0
        if now < self.warmup:
            return (now + 1) / self.warmup
        if self.decay is not None:
            start, end = self.decay
            return min(1.0, max(0.0, (end - now) / (end - start)))
        return 1.0
