"""What every dense head predicts, in one form, and which of its locations count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from crosskd._checks import compute_dtype, shape_text

__all__ = [
    "Assignment",
    "Predictions",
    "join_levels",
    "mean_over_ranks",
    "of_this_rank",
    "positives_of_teacher",
]


@dataclass(frozen=True, eq=False)
class Predictions:
    """A head's predictions for a batch, all levels one behind the other.

    A head that answers for regions of all images at once (a second stage) gives them as one batch of one:
    shape (1, regions, classes).

    Attributes:
        logits: shape (batch, anchors, classes), before the sigmoid; before the softmax where ``background``
            is given.
        regression: shape (batch, anchors, 4) as the head encodes boxes,
            (batch, anchors, 4, bins) for a distribution over each side, or
            (batch, anchors, classes, 4) with ``box_per_class``.
        quality: shape (batch, anchors), the logits of a centerness, an IoU or an objectness, or ``None``.
        background: the class that means no object, of heads whose classes share a softmax; ``None`` for
            heads with a sigmoid a class.
        box_per_class: each class has a box of its own.
        objectness: ``quality`` says whether there is an object at all, and the classes which one: a class's
            probability is the product of the two sigmoids, as in YOLOX and in YOLOv3 to v7.

    Raises:
        ValueError: other shapes than these, a background that is none of the classes, objectness without
            ``quality`` or beside a background.
    """

    logits: Tensor
    regression: Tensor
    quality: Tensor | None = None
    background: int | None = None
    box_per_class: bool = False
    objectness: bool = False

    def __post_init__(self) -> None:
        if self.logits.ndim != 3:
            raise ValueError(
                f"logits must have shape (batch, anchors, classes), got {shape_text(self.logits)}"
            )
        batch, anchors, classes = self.logits.shape
        if self.box_per_class:
            if self.regression.shape != (batch, anchors, classes, 4):
                raise ValueError(
                    f"regression must have shape ({batch}, {anchors}, {classes}, 4), a box for each class "
                    f"that the logits have, got {shape_text(self.regression)}"
                )
        elif self.regression.ndim not in (3, 4) or self.regression.shape[:3] != (batch, anchors, 4):
            raise ValueError(
                f"regression must have shape ({batch}, {anchors}, 4) or ({batch}, {anchors}, 4, bins), "
                f"(batch, anchors) as the logits have, got {shape_text(self.regression)}"
            )
        if self.quality is not None and self.quality.shape != (batch, anchors):
            raise ValueError(
                f"quality must have shape ({batch}, {anchors}), (batch, anchors) as the logits have, "
                f"got {shape_text(self.quality)}"
            )
        if self.background is not None and not 0 <= self.background < classes:
            raise ValueError(
                f"background must be one of the {classes} classes, 0 to {classes - 1}, got {self.background}"
            )
        if self.objectness and (self.quality is None or self.background is not None):
            raise ValueError(
                "objectness=True says that quality, the logits of whether there is an object, multiplies a "
                f"sigmoid per class; got quality {self.quality if self.quality is None else 'given'} and "
                f"background {self.background}"
            )

    def class_logits(self) -> Tensor:
        r"""The logits of the classes' probabilities, shape (batch, anchors, classes).

        They are ``logits``, except with ``objectness``: of a class's logit :math:`a` and the objectness's
        :math:`b` the product of the sigmoids has the logit
        :math:`-\log(e^{-a} + e^{-b} + e^{-a-b})`; float32 at least.
        """
        if not self.objectness or self.quality is None:
            return self.logits
        dtype = compute_dtype(self.logits, self.quality)
        a, b = -self.logits.to(dtype), -self.quality.to(dtype).unsqueeze(-1)
        return -torch.logaddexp(torch.logaddexp(a, b), a + b)  # large numbers don't overflow

    def probabilities(self) -> Tensor:
        """Each class's probability, shape (batch, anchors, classes), the background's 0; float32 at least."""
        logits = self.class_logits()
        logits = logits.to(compute_dtype(logits))
        if self.background is None:
            return logits.sigmoid()
        column = torch.tensor(self.background, device=logits.device)
        return logits.softmax(dim=-1).index_fill(-1, column, 0.0)

    def confidence(self) -> Tensor:
        """The largest class probability at each anchor, shape (batch, anchors), in float32 at least."""
        if self.background is None:  # the same with one sigmoid an anchor
            largest = self.logits.amax(dim=-1).to(compute_dtype(self.logits)).sigmoid()
            if self.objectness and self.quality is not None:
                return largest * self.quality.to(largest.dtype).sigmoid()
            return largest
        return self.probabilities().amax(dim=-1)

    def scores(self) -> Tensor:
        """What detections are ranked by, shape (batch, anchors, classes), in float32 at least.

        The class probabilities, which hold an objectness already. A centerness or an IoU counts as in FCOS:
        the geometric mean of the two.
        """
        probabilities = self.probabilities()
        if self.quality is None or self.objectness:
            return probabilities
        return (probabilities * self.quality.to(probabilities.dtype).sigmoid()[..., None]).sqrt()

    def box_confidence(self) -> Tensor:
        """How sure each box is: `confidence`, or with ``box_per_class`` the box's class's probability."""
        return self.probabilities() if self.box_per_class else self.confidence()

    def of_classes(self, indices: Sequence[int] | None) -> Predictions:
        """The same with some classes alone, in the given order; ``None`` for all.

        Where the classes share a softmax the others count as background, and those that are kept have the
        probabilities that they had.

        Raises:
            ValueError: the background is left out.
        """
        if indices is None:
            return self
        listed = list(indices)
        if self.background is not None and self.background not in listed:
            raise ValueError(
                f"the classes {listed} leave out {self.background}, which means no object: without it the "
                "others' probabilities mean nothing; give it the place of the student's background"
            )
        return replace(
            self,
            logits=self._logits_of(listed),
            regression=self.regression[..., listed, :] if self.box_per_class else self.regression,
            background=None if self.background is None else listed.index(self.background),
        )

    def _logits_of(self, listed: list[int]) -> Tensor:
        """The logits of some classes, with whatever else there is in the background's."""
        kept = self.logits[..., listed]
        others = sorted(set(range(self.logits.shape[-1])) - set(listed))
        if self.background is None or not others:
            return kept
        together = self.logits[..., [self.background, *others]]
        together = together.to(compute_dtype(together)).logsumexp(dim=-1, keepdim=True)
        place = listed.index(self.background)
        return torch.cat([kept[..., :place], together.to(kept.dtype), kept[..., place + 1 :]], dim=-1)

    def detach(self) -> Predictions:
        """The same numbers without their history."""
        return self._by(Tensor.detach)

    def to(self, dtype: torch.dtype) -> Predictions:
        """The same numbers in another type."""
        return self._by(lambda tensor: tensor.to(dtype))

    def _by(self, function: Callable[[Tensor], Tensor]) -> Predictions:
        quality = None if self.quality is None else function(self.quality)
        return replace(
            self, logits=function(self.logits), regression=function(self.regression), quality=quality
        )


def join_levels(levels: Iterable[Predictions]) -> Predictions:
    """The predictions of several levels, one behind the other.

    Args:
        levels: each level's predictions, finest first.
    """
    listed = list(levels)
    quality = [level.quality for level in listed if level.quality is not None]
    return replace(
        listed[0],
        logits=torch.cat([level.logits for level in listed], dim=1),
        regression=torch.cat([level.regression for level in listed], dim=1),
        quality=torch.cat(quality, dim=1) if quality else None,
    )


@dataclass(frozen=True, eq=False)
class Assignment:
    """Which anchors count, which hold an object, and what losses over them are divided by.

    Attributes:
        label_weights: shape (batch, anchors), 1 where an anchor counts at all, else 0; ``None`` for all.
            Heads whose own losses weight parts of them differently give their anchors these weights.
        positive: shape (batch, anchors), true where an anchor is responsible for an object.
        normalizer: shape (), the number of positives (RetinaNet, GFL, ATSS) or the sum of their
            centerness targets (FCOS); at least 1. An adapter's is that of this process's images, a `Step`'s
            is averaged over processes.
    """

    label_weights: Tensor | None
    positive: Tensor
    normalizer: Tensor


def positives_of_teacher(teacher: Predictions, threshold: float, *, sum_quality: bool = False) -> Assignment:
    """An assignment for images without targets: the teacher's confident anchors are the positives.

    With targets the normalizer is the number of anchors that the label assignment holds responsible for
    an object. Without them the best estimate of it is the number that the teacher itself would answer
    with, so an unlabelled image weighs about what a labelled one does, and the two may be mixed in one
    run without another weight. All anchors count. An image of which the teacher is confident nowhere
    counts as one positive, as an image without boxes does.

    Args:
        teacher: the teacher's predictions.
        threshold: an anchor is positive from this class probability on.
        sum_quality: sum the positives' predicted quality, as heads normalized by centerness do, where the
            head predicts it, instead of counting them.
    """
    positive = teacher.confidence() >= threshold
    amount = positive.float()
    if sum_quality and teacher.quality is not None:
        amount = amount * teacher.quality.float().sigmoid()
    normalizer = amount.sum(dim=1).clamp(min=1).sum()
    return Assignment(label_weights=None, positive=positive, normalizer=normalizer)


_alone = False


@contextmanager
def of_this_rank() -> Iterator[None]:
    """Inside, `mean_over_ranks` takes this process for the only one: for what other processes may not run.

    Example:
        >>> with of_this_rank():
        ...     mean_over_ranks(torch.tensor(2.0))
        tensor(2.)
    """
    global _alone  # noqa: PLW0603  # a step is run by one thread of a process
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def mean_over_ranks(value: Tensor) -> Tensor:
    """A number averaged over the processes of a distributed run; itself where there is one process.

    Under `DistributedDataParallel` they are those of its group. Every process must call it as often as the
    others; inside DDP's ``join()``, where a process may have run out of batches, each has its own number.
    """
    if _alone or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    group = None
    # The one whose forward runs, which the compiler can't ask for.
    parallel = None if torch.compiler.is_compiling() else DistributedDataParallel._active_ddp_module
    if parallel is not None:
        if parallel._join_config.enable:
            return value
        group = parallel.process_group
    ranks = torch.distributed.get_world_size(group)
    if ranks == 1:
        return value
    value = value.detach().clone()
    torch.distributed.all_reduce(value, group=group)
    return value / ranks
