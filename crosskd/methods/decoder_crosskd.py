"""CrossKD for detection transformers: the teacher's decoder judges the student's queries."""

from __future__ import annotations

from torch import nn

from crosskd.adapters.base import DecoderLayer, Queries
from crosskd.methods.base import Taught
from crosskd.methods.queries import GENERAL, QueryDistillation, check_layer, layer_pairs
from crosskd.pairing import Pair, require_decoders
from crosskd.schedule import Schedule
from crosskd.step import Step

__all__ = ["DecoderCrossKD"]


class DecoderCrossKD(QueryDistillation):
    """CrossKD for decoders: the teacher's last layers judge the student's queries in the middle.

    Both decoders are run with the same queries, as for `QueryDistillation`. The student's state behind one of
    its layers, brought to the teacher's width by a linear layer where the two differ, then goes through the
    rest of the teacher's decoder, in the place of the teacher's own state, and the predictions of that layer
    and of all behind it are held against the teacher's own.

    Published for Deformable DETR; which layers, the weights and the queries are ours.

    Args:
        position: (student's, teacher's) layer behind which the states change places, counted from 0 or, by
            negative numbers, from the last; the last but one of both unless given.
        general: how many random queries; 0 for none.
        own: whether the teacher's own queries are shared, too.
        cls_weight: of ``kd_cls``.
        l1_weight: of ``kd_l1``.
        giou_weight: of ``kd_giou``.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the losses' names where two methods' would clash.
        head: of a detector with several heads the one to distil.

    Raises:
        ValueError: no queries, weights below 0 or all 0.
        TypeError: a position that is no pair.

    References:
        CrossKD (Wang et al., CVPR 2024, arXiv 2306.11369).

    Example:
        >>> DecoderCrossKD(position=(1, 4)).position
        (1, 4)
    """

    teaches: Taught = "cross-head predictions"

    def __init__(
        self,
        position: tuple[int, int] | None = None,
        general: int = GENERAL,
        own: bool = True,
        *,
        cls_weight: float = 1.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        schedule: Schedule | None = None,
        name: str = "decoder_crosskd",
        head: str | None = None,
    ) -> None:
        super().__init__(
            general, own, cls_weight=cls_weight, l1_weight=l1_weight, giou_weight=giou_weight,
            schedule=schedule, name=name, head=head,
        )  # fmt: skip
        self.position = None if position is None else layer_pairs("position", [position])[0]

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"position={self.position}, {super().extra_repr()}"

    def setup(self, pair: Pair) -> None:
        """Settles the position, and makes one projection more, of the student's states."""
        teacher, student = require_decoders(pair)
        if self.position is None:
            self.position = (max(student.num_layers - 2, 0), max(teacher.num_layers - 2, 0))
        check_layer(self.position[0], student, "student")
        check_layer(self.position[1], teacher, "teacher")
        first = self.position[1] % teacher.num_layers
        self.position = (self.position[0] % student.num_layers, first)
        # Both sides' layers are the teacher's.
        self.layers = tuple((layer - teacher.num_layers,) * 2 for layer in range(first, teacher.num_layers))
        super().setup(pair)
        if teacher.width != student.width:
            self.projections["state"] = nn.Linear(student.width, teacher.width)

    def answers(self, step: Step, queries: Queries) -> tuple[list[DecoderLayer], list[DecoderLayer]]:
        """The teacher's layers on the student's state, and on its own."""
        ours, theirs = super().answers(step, queries)
        assert self.position is not None
        state = ours[self.position[0]].state
        if "state" in self.projections:
            state = self.projections["state"](state)
        return step.teacher.decoded(queries, {self.position[1]: state}), theirs
