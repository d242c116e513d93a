"""The rival of distillation where labels are few: the teacher's detections as labels of the other images."""

from __future__ import annotations

import sys
from pathlib import Path

from evidence_data import SMALLEST, Target
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from training import detected


class PseudoLabelled(nn.Module):
    """A student that learns from labels, and on images without from what its teacher detects in them.

    Args:
        student: the detector, or a distiller around it.
        teacher: a finished one with the same classes. Its weights are neither trained nor kept with the
            student's.
        threshold: detections with a lower score are no labels.
        view: ``"teacher"`` in it is the batch as the teacher sees it, where that is another view.
        scale: pixels of the teacher's view per pixel of the student's.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        threshold: float,
        view: dict[str, list[Tensor]],
        scale: float,
    ) -> None:
        super().__init__()
        self.student, self.threshold, self.view, self.scale = student, threshold, view, scale
        self._teacher = (teacher,)  # in a tuple it is no part of this module

    def forward(self, images: list[Tensor], targets: list[Target] | None) -> dict[str, Tensor]:
        """The student's losses."""
        losses: dict[str, Tensor] = self.student(images, self.labels(images) if targets is None else targets)
        return losses

    def labels(self, images: list[Tensor]) -> list[Target]:
        """What the teacher detects, in the student's pixels."""
        (teacher,) = self._teacher
        seen = self.view.get("teacher", images)
        found = detected(teacher, seen, self.threshold, SMALLEST * self.scale)
        return [{**target, "boxes": target["boxes"] / self.scale} for target in found]
