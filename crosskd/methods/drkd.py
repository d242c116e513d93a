"""DRKD: relations between all locations of a map, relations between objects, and the objects' features."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from crosskd._checks import compute_dtype, require_not_negative
from crosskd.losses.drkd import InstanceRelation, PixelRelation, spread_of
from crosskd.methods.base import Requirement
from crosskd.methods.maps import MapMethod
from crosskd.pairing import Pair
from crosskd.schedule import Schedule
from crosskd.step import Step, outside_graph, resized_boxes

__all__ = ["DRKD", "Pooled", "levels_of", "pool"]

_logger = logging.getLogger("crosskd")

# Ours, for all students: none were found published. Of maps that have one deviation the pixel relation counts
# as much as PKD does with its published 10 for four levels (10 times a half, summed over them). The other two
# have a gradient of about the same size at the student's maps: benchmarks/results/loss_scales.md.
_WEIGHTS = {"kd_drkd_pixel": 20.0, "kd_drkd_relation": 20.0, "kd_drkd_instance": 20.0}

# Ours: (height, width) to which an object is pooled, as a box head of Faster R-CNN pools its regions.
_SIZE = 7


class DRKD(MapMethod):
    r"""Dual relation distillation of the feature pyramid.

    .. math::
        \frac{\lambda_1}{L} \sum_l \frac{1}{M_l \mathrm{var}(t_l)} \sum (R_T(t_l) - R_S(s_l))^2
        + \frac{\lambda_2}{n} \sum_j \sum_i (\psi_T(i, j) - \psi_S(i, j))^2
        + \frac{\lambda_3}{n} \sum_i \overline{(t_i - s_i)^2} / \mathrm{var}(t_l)

    over L levels of :math:`M_l` elements and n objects of the batch, l the level of object i: each map with
    the relations between its locations added (R, `crosskd.losses.drkd.PixelRelation`), the similarity of each
    object to the others of its image (:math:`\psi`, `crosskd.losses.drkd.InstanceRelation`), and the objects'
    features themselves.
    An object's features are pooled from the one level that its size belongs to, by the rule of feature
    pyramids (224 pixels to stride 16). The parameters of R and :math:`\psi` are the method's own. The strides
    of the levels must agree and nothing else.

    The objects are those of the batch, and for unlabelled images those that the teacher is sure of. An image
    with one object has no relations, a batch without any has the pixel relation alone. Where the levels
    differ in the teacher's width, only objects of one level are related.

    Published are the three parts, GloRe units, the embedded Gaussian with its filter, and pooling by RoI
    align. All else is ours: the weights, the widths and form of the units, and what keeps them from learning
    to answer nothing (see there); means instead of sums over elements, and dividing by the variance of the
    teacher's map, so that a weight means the same for images of any size and maps of any scale; the size and
    level of what is pooled.

    Args:
        weight: on top of the three of the parts; 1 unless given.
        levels: the student's levels to use, counted from 0, the finest; all that have a counterpart unless
            given.
        pixel_weight: of ``kd_drkd_pixel``, 20 unless given; 0 leaves it out. Alone it needs no objects.
        relation_weight: of ``kd_drkd_relation``, 20 unless given; 0 leaves it out.
        instance_weight: of ``kd_drkd_instance``, 20 unless given; 0 leaves it out.
        threshold: for images without targets, the class probability from which on a box of the teacher's
            counts as an object.
        most_objects: of an image with more than these as many are taken, spread evenly over them: memory
            grows with their number, and for relations with its square.
        resize: resizes the teacher's maps to the student's where they differ, and takes the teacher's level
            of the nearest stride where none is equal. Without it other sizes are refused.
        schedule: how strongly the method counts as training goes on.
        name: what stands in front of the losses' names where two methods' would clash.

    Attributes:
        pixels: the pixel relations, by ``level0``….
        relations: the instance relation, ``all``, or one for each level's objects, ``level0``….

    Raises:
        ValueError: a weight, threshold or number that is out of range, no part at all, no levels.

    References:
        Dual Relation Knowledge Distillation for Object Detection (Ni et al., IJCAI 2023, arXiv 2302.05637).

    Example:
        >>> DRKD(pixel_weight=2.0, relation_weight=0).loss_names()
        ('kd_drkd_pixel', 'kd_drkd_instance')
    """

    def __init__(
        self,
        weight: float | None = None,
        levels: Sequence[int] | None = None,
        *,
        pixel_weight: float | None = None,
        relation_weight: float | None = None,
        instance_weight: float | None = None,
        threshold: float = 0.5,
        most_objects: int = 64,
        resize: bool = False,
        schedule: Schedule | None = None,
        name: str = "drkd",
    ) -> None:
        super().__init__(weight, levels, resize=resize, schedule=schedule, name=name)
        weights = {"pixel": pixel_weight, "relation": relation_weight, "instance": instance_weight}
        require_not_negative(**{f"{part}_weight": value for part, value in weights.items()})
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is a probability between 0 and 1, got {threshold}")
        if most_objects < 1:
            raise ValueError(f"most_objects must be 1 or more, got {most_objects}")
        given = {f"kd_drkd_{part}": value for part, value in weights.items()}
        settled = {key: _WEIGHTS[key] if value is None else value for key, value in given.items()}
        self.weights = {key: value for key, value in settled.items() if value}
        if not self.weights:
            raise ValueError("all three weights are 0: there is nothing to distil; raise one of them")
        self.threshold, self.most_objects = threshold, most_objects
        objects: set[Requirement] = {"objects"} if self.weights.keys() != {"kd_drkd_pixel"} else set()
        self.requires = frozenset({"maps", *objects})
        self.pixels = nn.ModuleDict()
        self.relations = nn.ModuleDict()

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        parts = [f"{key.removeprefix('kd_drkd_')}_weight={self.weights.get(key, 0)}" for key in _WEIGHTS]
        return ", ".join([super().extra_repr(), *parts])

    def weight_for(self, head_type: str) -> float:
        """1: the parts have weights of their own."""
        return 1.0

    def setup(self, pair: Pair) -> None:
        """Matches the levels, makes projections and what reasons about relations."""
        super().setup(pair)
        widths = {level: width for level, _, width in self.widths(pair)}
        if "kd_drkd_pixel" in self.weights:
            for level, width in widths.items():
                self.pixels[f"level{level}"] = PixelRelation(width)
        if "kd_drkd_relation" not in self.weights:
            return
        if len(set(widths.values())) == 1:
            self.relations["all"] = InstanceRelation(next(iter(widths.values())))
            return
        _logger.info(
            "%s: the teacher's levels differ in width, so only objects of one level are related", self.name
        )
        for level, width in widths.items():
            self.relations[f"level{level}"] = InstanceRelation(width)

    def loss_names(self) -> tuple[str, ...]:
        """The losses whose weight is not 0."""
        return tuple(self.weights)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Compares the maps level by level, then the objects on them."""
        compared = self.compared(step)
        losses = {}
        if "kd_drkd_pixel" in self.weights:
            pixels = [self.pixels[f"level{level}"](student, teacher) for level, student, teacher in compared]
            losses["kd_drkd_pixel"] = torch.stack(pixels).mean()
        if "objects" in self.requires:
            losses |= self._of_objects(step, {level: student for level, student, _ in compared})
        assert self.weight is not None
        return {name: self.weight * weight * losses[name] for name, weight in self.weights.items()}

    @outside_graph
    def _of_objects(self, step: Step, student: dict[int, Tensor]) -> dict[str, Tensor]:
        """The two losses of objects.

        Args:
            step: gives the objects and the teacher's maps.
            student: the student's maps by level, as wide as the teacher's.
        """
        pooled = self._pooled(step, student)
        count = max(sum(len(p.images) for p in pooled.values()), 1)
        differences = [
            (p.student - p.teacher).square().mean(dim=(1, 2, 3)).sum() / p.spread for p in pooled.values()
        ]
        losses = {"kd_drkd_instance": torch.stack(differences).sum() / count}
        if self.relations:
            vectors = {f"level{level}": p.vectors() for level, p in pooled.items()}
            if "all" in self.relations:
                vectors = {"all": [torch.cat(each) for each in zip(*vectors.values(), strict=True)]}
            related = [self.relations[name](*of_name) for name, of_name in vectors.items()]
            losses["kd_drkd_relation"] = torch.stack(related).sum() / count
        return losses

    def _pooled(self, step: Step, student: dict[int, Tensor]) -> dict[int, Pooled]:
        """The objects of each level as they are on both sides' maps."""
        strides, theirs = step.student.strides, step.teacher.strides
        assert strides is not None
        assert theirs is not None
        boxes, their_boxes, images = self._objects(step)
        levels = levels_of(boxes, {level: strides[level] for level, _ in self.matches})
        pooled = {}
        # Levels without an object too, so that their projections have a gradient at every step.
        for level, other in self.matches:
            here = levels == level
            ours = pool(student[level], boxes[here], images[here], strides[level])
            teacher = pool(step.teacher.maps[other], their_boxes[here], images[here], theirs[other])
            pooled[level] = Pooled(ours, teacher, images[here], spread_of(step.teacher.maps[other]))
        return pooled

    def _objects(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes of the batch in pixels of the student's and of the teacher's, and the images they are in."""
        boxes, their_boxes, images = [], [], []
        found = step.foreground(self.threshold)
        sizes = zip(step.student.batch.image_sizes, step.teacher.batch.image_sizes, strict=True)
        for image, (objects, (own, theirs)) in enumerate(zip(found, sizes, strict=True)):
            of_image = _spread(objects.boxes, self.most_objects)
            boxes.append(of_image)
            # The teacher may see the images at another size.
            their_boxes.append(resized_boxes(of_image, own, theirs))
            images.append(torch.full((len(of_image),), image, device=of_image.device))
        return torch.cat(boxes), torch.cat(their_boxes), torch.cat(images)


@dataclass(frozen=True, eq=False)
class Pooled:
    """Objects as they are on the maps of one level.

    Attributes:
        student: shape (objects, channels, height, width).
        teacher: of the same shape.
        images: shape (objects,), the number of the image that each is in.
        spread: the variance of the teacher's map, shape ().
    """

    student: Tensor
    teacher: Tensor
    images: Tensor
    spread: Tensor

    def vectors(self) -> list[Tensor]:
        """The student's and the teacher's means over space, (objects, channels), and the images."""
        return [self.student.mean(dim=(2, 3)), self.teacher.mean(dim=(2, 3)), self.images]


def levels_of(boxes: Tensor, strides: dict[int, float]) -> Tensor:
    """The level that each box's size belongs to, shape (objects,): a side of 224 pixels to stride 16.

    Args:
        boxes: shape (objects, 4), xyxy in pixels.
        strides: by level.

    References:
        Feature Pyramid Networks for Object Detection (Lin et al., CVPR 2017), equation 1.

    Example:
        >>> levels_of(torch.tensor([[0.0, 0, 30, 30], [0, 0, 224, 224]]), {0: 8, 1: 16, 2: 32})
        tensor([0, 1])
    """
    ordered = sorted(strides, key=lambda level: strides[level])
    width, height = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).double().unbind(dim=1)
    wanted = 16 * (width * height).sqrt() / 224
    edges = wanted.new_tensor([strides[level] for level in ordered[1:]])
    places = torch.bucketize(wanted * (1 + 1e-6), edges, right=True)
    return torch.tensor(ordered, device=boxes.device)[places]


def pool(feature_map: Tensor, boxes: Tensor, images: Tensor, stride: float) -> Tensor:
    """What a map shows of some objects, by RoI align: shape (objects, channels, 7, 7).

    `torchvision.ops.MultiScaleRoIAlign` does the same but for the scale, which it guesses from the size of
    the map and rounds to a power of two.

    Args:
        feature_map: shape (batch, channels, height, width).
        boxes: shape (objects, 4), xyxy in pixels.
        images: shape (objects,), the number of each object's image in the batch.
        stride: pixels between neighbouring locations of the map.
    """
    features = feature_map.to(compute_dtype(feature_map))
    regions = torch.cat([images[:, None].to(features), boxes.detach().to(features)], dim=1)
    pooled: Tensor = roi_align(features, regions, _SIZE, spatial_scale=1 / stride, sampling_ratio=2)
    return pooled


def _spread(boxes: Tensor, most: int) -> Tensor:
    """Some of the boxes, spread evenly over them, where there are too many."""
    if len(boxes) <= most:
        return boxes
    return boxes[torch.linspace(0, len(boxes) - 1, most, device=boxes.device).round().long()]
