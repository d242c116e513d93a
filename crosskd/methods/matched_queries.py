"""The baseline for detection transformers: predictions that a matching gives one another are compared."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou

from crosskd.methods.queries import QueryMethod, corners_of
from crosskd.pairing import require_same_shares
from crosskd.predictions import Predictions
from crosskd.schedule import Schedule
from crosskd.step import Step, outside_graph

__all__ = ["MatchedQueries"]


class MatchedQueries(QueryMethod):
    """The student's own predictions imitate those of the teacher that a one-to-one matching gives them.

    The baseline: no queries are shared. In each image the teacher's surest predictions are matched with the
    student's by the least cost of classes, L1 and GIoU, weighted as the losses are, and only pairs are
    compared, in the last layer. The decoders may be of any two kinds.

    The logits' part of DETRDistill; the cost, the weights and how many are matched are ours. Needs scipy.

    Args:
        count: how many of the teacher's predictions, the surest first, are matched.
        cls_weight: of ``kd_cls``.
        l1_weight: of ``kd_l1``.
        giou_weight: of ``kd_giou``.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the losses' names where two methods' would clash.
        head: of a detector with several heads the one to distil.

    Raises:
        ValueError: a count below 1, weights below 0 or all 0.

    References:
        DETRDistill: A Universal Knowledge Distillation Framework for DETR-families (Chang et al., ICCV 2023,
        arXiv 2211.10156).

    Example:
        >>> MatchedQueries(count=20).count
        20
    """

    def __init__(
        self,
        count: int = 100,
        *,
        cls_weight: float = 1.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        schedule: Schedule | None = None,
        name: str = "matched_queries",
        head: str | None = None,
    ) -> None:
        weights = (cls_weight, l1_weight, giou_weight)
        super().__init__(weights, schedule=schedule, name=name, head=head)
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"count must be a whole number of predictions, 1 or more, got {count}")
        self.count = count

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"count={self.count}, weights={self.weights}"

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Matches the two sets of predictions, and compares pair by pair."""
        require_same_shares(step)  # on each step, for batches are padded as they come
        student, teacher = step.student.predictions, step.teacher.predictions
        size = step.student.batch.size
        theirs, ours = self._matched(student.detach(), teacher, size)
        return self.compared(_rows(student, ours), _rows(teacher, theirs), size)

    @outside_graph
    @torch.no_grad()
    def _matched(
        self, student: Predictions, teacher: Predictions, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """(the teacher's, the student's) rows that belong together, each (batch, pairs)."""
        from scipy.optimize import linear_sum_assignment

        count = min(self.count, teacher.logits.shape[1], student.logits.shape[1])
        surest = teacher.confidence().topk(count, dim=1).indices
        wanted, matched = _rows(teacher, surest), []
        for image in range(len(surest)):
            scores = [side.probabilities()[image].float() for side in (wanted, student)]
            classes = torch.cdist(scores[0], scores[1], p=1)
            boxes = [side.regression[image].float() for side in (wanted, student)]
            distance = torch.cdist(boxes[0], boxes[1], p=1)
            overlap = generalized_box_iou(*(corners_of(b, size) for b in boxes))
            parts = zip(self.weights.values(), (classes, distance, 1 - overlap), strict=True)
            cost = torch.stack([weight * part for weight, part in parts]).sum(dim=0)
            _, columns = linear_sum_assignment(cost.nan_to_num(1e6).cpu().numpy())
            matched.append(torch.as_tensor(columns, device=surest.device))
        return surest, torch.stack(matched)


def _rows(predictions: Predictions, rows: Tensor) -> Predictions:
    """Some rows (batch, rows) of predictions."""
    return Predictions(
        predictions.logits.take_along_dim(rows[..., None], dim=1),
        predictions.regression.take_along_dim(rows[..., None], dim=1),
        None,
        predictions.background,
    )
