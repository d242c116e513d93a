"""FGD: feature maps compared where the teacher attends, objects and background apart, and as wholes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from crosskd._checks import require_not_negative
from crosskd.losses.fgd import GlobalContext, fgd_terms, object_masks
from crosskd.methods.base import Requirement
from crosskd.methods.maps import MapMethod
from crosskd.pairing import Pair
from crosskd.schedule import Schedule
from crosskd.step import Step, outside_graph

__all__ = ["FGD"]


@dataclass(frozen=True)
class _Settings:
    """Temperature of the attention, and the weights of the parts."""

    temperature: float
    alpha: float
    beta: float
    gamma: float
    lambda_: float


# Published for these students, Faster R-CNN's ("RPN") for the first four levels of its pyramid.
_PUBLISHED = {
    "RetinaNet": _Settings(0.5, alpha=1e-3, beta=5e-4, gamma=5e-4, lambda_=5e-6),
    "GFL": _Settings(0.5, alpha=1e-3, beta=5e-4, gamma=5e-4, lambda_=5e-6),
    "FCOS": _Settings(0.8, alpha=1.6e-3, beta=8e-4, gamma=8e-4, lambda_=8e-6),
    "RPN": _Settings(0.5, alpha=5e-5, beta=2.5e-5, gamma=5e-5, lambda_=5e-7),
}
# Ours for all others: those that two of the three published one-stage students share.
_OTHERS = _PUBLISHED["RetinaNet"]


class FGD(MapMethod):
    r"""Focal and global distillation of the feature pyramid.

    .. math::
        \sum_l \frac{1}{N} \Bigl[ \sum (\alpha M + \beta B)\, A^{space} A^{channel}\, (t - s)^2
        + \gamma \sum (|A^{space} - A^{space}_s| + |A^{channel} - A^{channel}_s|)
        + \lambda \sum (R_T(t) - R_S(s))^2 \Bigr]

    over the levels l and N images: the maps are compared where objects are (M) and where none is (B), each as
    far as the teacher attends to the location and the channel (A), the student's attention follows the
    teacher's, and the maps are compared once more after each location was given the context of the whole (R,
    `crosskd.losses.fgd.GlobalContext`, whose weights are the method's own and are trained with the student).
    The strides of the levels must agree and nothing else.

    The foreground is made of the objects of the batch, and for unlabelled images of the boxes that the
    teacher is sure of. Boxes are scaled by the level's stride; in the published implementation they are
    scaled by the image without its padding, which puts them beside their objects in padded batches.

    Published for RetinaNet, GFL, FCOS and Faster R-CNN students, the last for the first four levels. For
    other students nothing was published, and RetinaNet's settings are our choice. The weights belong to sums
    over an image: ``alpha`` and ``beta`` to sums over channels alone, for each object counts as one, and so
    does the background; ``lambda_`` to sums over channels and locations and ``gamma`` to sums over either, so
    these two are tied to the size of the images as well.

    Args:
        weight: on top of the four of the parts; 1 unless given.
        levels: the student's levels to use, counted from 0, the finest; all that have a counterpart unless
            given.
        temperature: of the attention; what was published for the student's type unless given, like the four
            weights.
        alpha: weight of the foreground in ``kd_fgd_focal``.
        beta: weight of the background in ``kd_fgd_focal``.
        gamma: weight of the difference of the attention, ``kd_fgd_attention``.
        lambda_: weight of the global part, ``kd_fgd_global``.
        threshold: for images without targets, the class probability from which on a box of the teacher's
            counts as an object.
        resize: resizes the teacher's maps to the student's where they differ, and takes the teacher's level
            of the nearest stride where none is equal. Without it other sizes are refused.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the losses' names where two methods' would clash.

    Attributes:
        settings: temperature and weights that hold, by the names above, once the student is known.
        contexts: the global parts, by ``level0``….

    Raises:
        ValueError: a weight, temperature or threshold that is out of range, no part at all, no levels.

    References:
        Focal and Global Knowledge Distillation for Detectors (Yang et al., CVPR 2022).

    Example:
        >>> FGD(temperature=0.8, lambda_=0).extra_repr()
        'weight=None, levels=None, resize=False, temperature=0.8, lambda_=0'
    """

    requires: frozenset[Requirement] = frozenset({"maps", "objects"})

    def __init__(
        self,
        weight: float | None = None,
        levels: Sequence[int] | None = None,
        *,
        temperature: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        lambda_: float | None = None,
        threshold: float = 0.5,
        resize: bool = False,
        schedule: Schedule | None = None,
        name: str = "fgd",
    ) -> None:
        super().__init__(weight, levels, resize=resize, schedule=schedule, name=name)
        if temperature is not None and not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is a probability between 0 and 1, got {threshold}")
        weights = {"alpha": alpha, "beta": beta, "gamma": gamma, "lambda_": lambda_}
        require_not_negative(**weights)
        if not any(value is None or value for value in weights.values()):
            raise ValueError("all four weights are 0: there is nothing to distil; raise one of them")
        self.threshold = threshold
        given = {"temperature": temperature, **weights}
        self._given = {key: value for key, value in given.items() if value is not None}
        self.settings = replace(_OTHERS, **self._given)  # those of the student's type follow in setup
        self.contexts = nn.ModuleDict()

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        known = asdict(self.settings) if self.matches else self._given
        return ", ".join([super().extra_repr(), *(f"{key}={value}" for key, value in known.items())])

    def weight_for(self, head_type: str) -> float:
        """1: the parts have weights of their own."""
        return 1.0

    def setup(self, pair: Pair) -> None:
        """Matches the levels, settles the weights, makes projections and the global parts."""
        super().setup(pair)
        head_type = pair.student.heads[0].head_type if pair.student.heads else ""
        self.settings = replace(_PUBLISHED.get(head_type, _OTHERS), **self._given)
        if self.settings.lambda_:
            for level, _, teacher_width in self.widths(pair):
                self.contexts[f"level{level}"] = GlobalContext(teacher_width)

    def _weights(self) -> dict[str, float]:
        """Those of the losses; the focal part is weighted already, where objects and where background are."""
        settings = self.settings
        weights = {
            "kd_fgd_focal": 1.0 if settings.alpha or settings.beta else 0.0,
            "kd_fgd_attention": settings.gamma,
            "kd_fgd_global": settings.lambda_,
        }
        return {name: weight for name, weight in weights.items() if weight}

    def loss_names(self) -> tuple[str, ...]:
        """The losses whose weight is not 0."""
        return tuple(self._weights())

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Compares the maps level by level."""
        assert self.weight is not None
        places = self._places(step)
        levels = []
        for level, student, teacher in self.compared(step):
            context = self.contexts[f"level{level}"] if self.settings.lambda_ else None
            assert context is None or isinstance(context, GlobalContext)
            temperature = self.settings.temperature
            levels.append(
                fgd_terms(student, teacher, places[level], temperature=temperature, context=context)
            )
        parts = torch.stack([torch.stack(of_level) for of_level in levels]).sum(dim=0)
        named = dict(zip(("kd_fgd_focal", "kd_fgd_attention", "kd_fgd_global"), parts, strict=True))
        return {name: self.weight * weight * named[name] for name, weight in self._weights().items()}

    @outside_graph
    def _places(self, step: Step) -> dict[int, Tensor]:
        """By level, how much each location's squared difference counts, (batch, 1, height, width)."""
        boxes = [objects.boxes for objects in step.foreground(self.threshold)]
        strides = step.student.strides
        assert strides is not None
        places = {}
        for level, _ in self.matches:
            foreground, background = object_masks(boxes, step.student.maps[level], strides[level])
            places[level] = self.settings.alpha * foreground + self.settings.beta * background
        return places
