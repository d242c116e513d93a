"""For detection transformers: both decoders answer the same queries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, clip_boxes_to_image, nms

from crosskd._checks import compute_dtype, require_numbers
from crosskd.adapters.base import DecoderHead, DecoderLayer, Queries
from crosskd.losses.boxes import giou_loss
from crosskd.methods.base import Method, Requirement, Taught
from crosskd.pairing import (
    Pair,
    require_classes,
    require_decoders,
    require_detections,
    require_predictions_alike,
    require_same_shares,
    require_shared_queries,
)
from crosskd.predictions import Predictions, join_levels, mean_over_ranks
from crosskd.schedule import Schedule
from crosskd.step import Step, outside_graph, resized_boxes

__all__ = ["GENERAL", "QueryDistillation", "QueryMethod", "check_layer", "corners_of", "layer_pairs"]

# Ours, among the 10 to 300 that were reported to help.
GENERAL = 100
# A dense teacher's candidates, and from which overlap on the surest of them stands for the others.
_CANDIDATES, _NMS = 1000, 0.5


class QueryMethod(Method):
    """What methods of queries share: weights, and the losses of rows that belong together.

    Args:
        weights: of ``kd_cls``, ``kd_l1`` and ``kd_giou``.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the losses' names where two methods' would clash.
        head: of a detector with several heads the one to distil.

    Raises:
        ValueError: weights below 0 or all 0.
    """

    requires: frozenset[Requirement] = frozenset({"queries", "predictions"})
    teaches: Taught = "predictions"

    def __init__(
        self,
        weights: Sequence[float],
        *,
        schedule: Schedule | None,
        name: str,
        head: str | None,
    ) -> None:
        super().__init__(schedule=schedule, name=name, head=head)
        require_numbers(**dict(zip(("cls_weight", "l1_weight", "giou_weight"), weights, strict=True)))
        self.weights = dict(zip(("kd_cls", "kd_l1", "kd_giou"), weights, strict=True))
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ValueError(f"the weights must be 0 or more, one of them above 0; got {list(weights)}")

    def setup(self, pair: Pair) -> None:
        """Demands two decoders; with equal classes, predicted alike, where the student's own are compared."""
        require_decoders(pair)
        if self.teaches == "predictions":
            require_predictions_alike(pair)
            require_classes(pair)

    def loss_names(self) -> tuple[str, ...]:
        """The losses whose weight is not 0."""
        return tuple(name for name, weight in self.weights.items() if weight)

    def compared(
        self, student: Predictions, teacher: Predictions, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Losses of rows that belong together, each weighted by the teacher's confidence in it.

        Args:
            student: its predictions, boxes as centre, width and height from 0 to 1.
            teacher: likewise, the same number of rows.
            size: (height, width) of the pixels.
        """
        weight = teacher.confidence().detach()
        normalizer = mean_over_ranks(weight.sum()).clamp(min=1)  # about the number of objects
        dtype = compute_dtype(student.logits, teacher.logits)
        ours, theirs = student.regression.to(dtype), teacher.regression.detach().to(dtype)
        corners = [corners_of(boxes, size) for boxes in (ours, theirs)]
        losses = {
            "kd_cls": (weight * _divergence(student, teacher)).sum() / normalizer,
            "kd_l1": (weight * (ours - theirs).abs().sum(dim=-1)).sum() / normalizer,
            "kd_giou": giou_loss(*corners, weight=weight, normalizer=normalizer),
        }
        return {name: self.weights[name] * losses[name] for name in self.loss_names()}


class QueryDistillation(QueryMethod):
    r"""KD-DETR: both decoders answer the same queries, so that their rows belong together one by one.

    .. math::
        \sum_l \frac{1}{Z} \sum_i w_i \bigl( \lambda_c \, \mathrm{KL}(t_i \,\|\, s_i) + \lambda_1 \, |b^t_i -
        b^s_i|_1 + \lambda_g \, (1 - \mathrm{GIoU}(b^t_i, b^s_i)) \bigr), \qquad w_i = \max_c t_{ic}

    over layers l and queries i. The queries are random ones, drawn anew each step, and those that the
    teacher's own forward starts from; the two sets are run apart, for queries see each other. Each decoder
    reads the memory of its own detector. The student may have other layers, queries and widths than the
    teacher: where the widths differ a linear layer is trained with the student that brings queries to its
    width, and is thrown away with the `crosskd.Distiller`.

    A dense teacher has no decoder. Its surest detections, as many as ``general``, are the boxes of the
    student's queries then, of one content that is trained with the student, and their class probabilities
    and boxes are what the student's answers are held against. The student's queries must be boxes alone.

    Ours: the normalizer Z, the sum of all w but 1 at least; the number of random queries, and what they are
    drawn from (embeddings from a normal distribution, centres uniformly, sides as squares of uniform
    numbers); that a student's layer is compared with the teacher's at the same distance from the last; that
    sides of less than a pixel count as one in GIoU. The weights are from third parties' notes on the paper.
    With a sigmoid a class the divergence is the sum of those of all classes.

    Args:
        general: how many random queries; 0 for none. Of a dense teacher how many detections.
        own: whether the teacher's own queries are shared, too; without a meaning for a dense teacher.
        layers: (student's, teacher's) layers to compare, counted from 0, or from the last by negative
            numbers; unless given all that have a counterpart, counted from the last.
        cls_weight: of ``kd_cls``.
        l1_weight: of ``kd_l1``.
        giou_weight: of ``kd_giou``.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the losses' names where two methods' would clash.
        head: of a detector with several heads the one to distil.

    Raises:
        ValueError: no queries, weights below 0 or all 0.
        TypeError: layers that are no pairs.

    References:
        KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation Points Sampling
        (Wang et al., CVPR 2024, arXiv 2211.08071).

    Example:
        >>> QueryDistillation(general=50, layers=[(-1, -1)]).extra_repr()
        "general=50, own=True, layers=((-1, -1),), weights={'kd_cls': 1.0, 'kd_l1': 5.0, 'kd_giou': 2.0}"
    """

    def __init__(
        self,
        general: int = GENERAL,
        own: bool = True,
        layers: Sequence[tuple[int, int]] | None = None,
        *,
        cls_weight: float = 1.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        schedule: Schedule | None = None,
        name: str = "queries",
        head: str | None = None,
    ) -> None:
        weights = (cls_weight, l1_weight, giou_weight)
        super().__init__(weights, schedule=schedule, name=name, head=head)
        if not isinstance(general, int) or general < 0:
            raise ValueError(f"general must be a whole number of queries, 0 or more, got {general}")
        if not (general or own):
            raise ValueError(f"general={general} and own={own}: there are no queries to share")
        self.general, self.own = general, own
        self.layers = None if layers is None else layer_pairs("layers", layers)
        self.projections = nn.ModuleDict()
        self.content: nn.Parameter | None = None

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"general={self.general}, own={self.own}, layers={self.layers}, weights={self.weights}"

    def setup(self, pair: Pair) -> None:
        """Demands decoders that can share queries, settles the layers, makes projections."""
        if pair.teacher_head is not None and not isinstance(pair.teacher_head, DecoderHead):
            self._setup_dense(pair)
            return
        super().setup(pair)
        teacher, student = require_shared_queries(pair)
        if self.layers is None:
            count = min(teacher.num_layers, student.num_layers)
            self.layers = tuple((-place, -place) for place in range(count, 0, -1))
        for ours, theirs in self.layers:
            check_layer(ours, student, "student")
            check_layer(theirs, teacher, "teacher")
        if teacher.width != student.width:
            self.projections["content"] = nn.Linear(teacher.width, student.width)
            if "position" in teacher.kind:
                self.projections["position"] = nn.Linear(teacher.width, student.width)

    def _setup_dense(self, pair: Pair) -> None:
        """Demands a student whose queries may be a dense teacher's boxes, and makes their content."""
        student = require_detections(pair)
        if not self.general:
            raise ValueError("general=0: of a dense teacher it is the number of detections that are queries")
        if self.layers is None:
            self.layers = tuple((-place, -place) for place in range(student.num_layers, 0, -1))
        for layer, _ in self.layers:
            check_layer(layer, student, "student")
        self.layers = tuple((layer, layer) for layer, _ in self.layers)  # there is one answer for all
        self.content = nn.Parameter(torch.randn(student.width))

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Compares what both decoders answer to the same queries."""
        if self.content is None:
            require_same_shares(step)
            answers = [self.answers(step, queries) for queries in self.shared(step)]
        else:
            wanted = self.detections(step)
            content = self.content.expand(*wanted.logits.shape[:2], -1)
            ours = step.student.decoded(Queries(content, boxes=wanted.regression.to(content.dtype)))
            answers = [(ours, [DecoderLayer(content, wanted)] * len(ours))]
        assert self.layers is not None
        losses: dict[str, list[Tensor]] = {name: [] for name in self.loss_names()}
        for pair_of_layers in self.layers:
            sides = []
            for side, layer in enumerate(pair_of_layers):
                sides.append(join_levels(answer[side][layer].predictions for answer in answers))
            for name, loss in self.compared(sides[0], sides[1], step.student.batch.size).items():
                losses[name].append(loss)
        return {name: torch.stack(of_layers).sum() for name, of_layers in losses.items()}

    @outside_graph
    @torch.no_grad()
    def detections(self, step: Step) -> Predictions:
        """A dense teacher's surest detections, one of those that overlap, in the student's form.

        Returns:
            As many for each image, those that are missing of next to no probability.
        """
        teacher, student = step.teacher, step.student
        probabilities = teacher.predictions.probabilities().float()
        boxes = teacher.head.decode(teacher.predictions, teacher.anchors).float()
        scores = teacher.predictions.scores().float().amax(dim=-1)
        found = probabilities.new_zeros(len(boxes), self.general, probabilities.shape[-1])
        scale = boxes.new_tensor(student.decoder.box_sizes(student.batch)).flip(-1).repeat(1, 2)[:, None]
        corners = (scale * scale.new_tensor([0.0, 0.0, 1.0, 1.0])).repeat(1, self.general, 1)
        for index, size in enumerate(teacher.batch.image_sizes):
            best, rows = scores[index].topk(min(_CANDIDATES, scores.shape[1]))
            candidates = clip_boxes_to_image(boxes[index][rows], size)
            kept = nms(candidates, best, _NMS)[: self.general]
            found[index, : len(kept)] = probabilities[index][rows[kept]]
            own = student.batch.image_sizes[index]
            corners[index, : len(kept)] = resized_boxes(candidates[kept], size, own)
        regression = box_convert(corners / scale, "xyxy", "cxcywh")
        return Predictions(torch.logit(found, eps=1e-6), regression, None)

    def answers(self, step: Step, queries: Queries) -> tuple[list[DecoderLayer], list[DecoderLayer]]:
        """(the student's, the teacher's) layers on the same queries, which are of the teacher's width."""
        with torch.no_grad():
            theirs = step.teacher.decoded(queries)
        return step.student.decoded(self.of_student(queries)), theirs

    def of_student(self, queries: Queries) -> Queries:
        """The teacher's queries in the student's width."""
        content, position = queries.content, queries.position
        if "content" in self.projections:
            content = self.projections["content"](content)
        if position is not None and "position" in self.projections:
            position = self.projections["position"](position)
        return Queries(content, position, queries.boxes)

    @outside_graph
    @torch.no_grad()
    def shared(self, step: Step) -> list[Queries]:
        """The queries of a step, of the teacher's width: random ones, and the teacher's own."""
        own = step.teacher.queries()
        sets = [own] if self.own else []
        if self.general:
            shape = (len(own.content), self.general, own.content.shape[-1])
            position = None if own.position is None else own.position.new_empty(shape).normal_()
            boxes = None
            if own.boxes is not None:
                boxes = own.boxes.new_empty(*shape[:2], own.boxes.shape[-1]).uniform_()
                boxes[..., 2:] = boxes[..., 2:].square()  # objects are mostly small
            sets.append(Queries(own.content.new_empty(shape).normal_(), position, boxes))
        return sets


def corners_of(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes xyxy in pixels, with sides of one at least, as GIoU needs them.

    Args:
        boxes: shape (…, 4), centre, width and height from 0 to 1.
        size: (height, width) in pixels of what they are shares of.

    Example:
        >>> corners_of(torch.tensor([0.5, 0.5, 0.5, 0.0]), (10, 20))
        tensor([ 5.0000,  4.5000, 15.0000,  5.5000])
    """
    boxes = boxes * boxes.new_tensor([size[1], size[0], size[1], size[0]])
    sides = boxes[..., 2:].clamp(min=1)  # those of less than a pixel have no overlap to speak of
    corners: Tensor = box_convert(torch.cat([boxes[..., :2], sides], dim=-1), "cxcywh", "xyxy")
    return corners


def _divergence(student: Predictions, teacher: Predictions) -> Tensor:
    """KL of the classes (batch, rows), from the teacher's probabilities to the student's."""
    dtype = compute_dtype(student.logits, teacher.logits)
    ours, theirs = student.logits.to(dtype), teacher.logits.detach().to(dtype)
    if teacher.background is not None:
        logs = [F.log_softmax(logits, dim=-1) for logits in (ours, theirs)]
        return F.kl_div(logs[0], logs[1], reduction="none", log_target=True).sum(dim=-1)
    target = theirs.sigmoid()
    entropies = [
        F.binary_cross_entropy_with_logits(logits, target, reduction="none") for logits in (ours, theirs)
    ]
    return (entropies[0] - entropies[1]).sum(dim=-1)


def layer_pairs(name: str, pairs: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Pairs of layers as they were given under a name; raises ``TypeError`` for anything else."""
    listed = list(pairs) if isinstance(pairs, Sequence) else []
    found = [tuple(pair) for pair in listed if isinstance(pair, Sequence)]
    whole = [len(pair) == 2 and all(isinstance(layer, int) for layer in pair) for pair in found]
    if not listed or len(found) < len(listed) or not all(whole):
        raise TypeError(
            f"{name}: layers are named in pairs, (student's, teacher's), such as (-1, -1), got {pairs!r}"
        )
    return tuple((pair[0], pair[1]) for pair in found)


def check_layer(layer: int, head: DecoderHead, side: str) -> None:
    """Raises ``ValueError`` for a layer that a side's decoder doesn't predict at."""
    if not -head.num_layers <= layer < head.num_layers:
        raise ValueError(
            f"layer {layer} is none of the {side}'s: its decoder predicts at {head.num_layers} layers, "
            "counted from 0, or from the last by negative numbers"
        )
