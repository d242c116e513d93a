"""DRKD: relations between all locations of a map, and between its objects."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crosskd._checks import compute_dtype, require_floating, require_same_shape, shape_text

__all__ = ["GraphReasoning", "InstanceRelation", "PixelRelation", "spread_of"]

_EPSILON = 1e-6


class GraphReasoning(nn.Module):
    r"""What a map's locations have to do with each other, by way of a few nodes (a GloRe unit).

    .. math::
        B = P x / \mathrm{rms}(x), \qquad V = \tfrac{1}{HW} S x B^\top, \qquad Z = W (V - V A), \qquad
        U(x) = E Z B

    A map x of C channels at HW locations is gathered into C/4 nodes of C/2 numbers each (V), the nodes are
    mixed with each other (A) and changed (W), and what comes out is given back to the locations. All of
    P, S, A, W and E are learned; E is zero at first, so that the unit adds nothing.

    The widths are GloRe's. That B is divided by the image's root mean square and V by the number of locations
    is ours: the answer grows as the map does, whatever the size of the image.

    Args:
        channels: of the map.

    References:
        Graph-Based Global Reasoning Networks (Chen et al., CVPR 2019).

    Example:
        >>> unit = GraphReasoning(8)
        >>> unit(torch.randn(2, 8, 30)).abs().max().item()  # E is still zero
        0.0
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        nodes, states = max(channels // 4, 1), max(channels // 2, 1)
        self.project = nn.Linear(channels, nodes, bias=False)
        self.state = nn.Linear(channels, states, bias=False)
        self.adjacency = nn.Linear(nodes, nodes, bias=False)
        self.update = nn.Linear(states, states, bias=False)
        self.extend = nn.Linear(states, channels, bias=False)
        nn.init.zeros_(self.extend.weight)

    def forward(self, features: Tensor) -> Tensor:
        """What is added to a map.

        Args:
            features: shape (batch, channels, locations).
        """
        wide = features.to(self.project.weight.dtype)
        scale = (wide.square().mean(dim=(1, 2), keepdim=True) + _EPSILON).rsqrt()
        shares = self.project(wide.mT).mT * scale  # (batch, nodes, locations)
        # S and E are applied to the nodes, of which there are few, and not to the locations.
        nodes = self.state(shares @ wide.mT / features.shape[2])  # (batch, nodes, states)
        nodes = self.update(nodes - self.adjacency(nodes.mT).mT)
        added: Tensor = self.extend(nodes).mT @ shares
        return added.to(features.dtype)


class PixelRelation(nn.Module):
    r"""The pixel relation of DRKD on one level: both maps are compared with their relations added.

    .. math::
        \frac{1}{M \, \mathrm{var}(t)} \sum \bigl(t + U_T(t) - s - U_S(s)\bigr)^2

    over all M elements, where U is `GraphReasoning`. Each side has a unit of its own, ``student`` and
    ``teacher``, and both are trained, as the relations of FGD and FBKD are. Dividing by the variance of the
    teacher's map, a constant, is ours: a weight then means the same for maps of any scale.

    How the teacher's unit is trained is not known of DRKD. If only the units' outputs were compared, both
    would learn to output 0. So the maps are added: a unit adds a sum of C/4 patterns, which can't cancel a
    map of C channels, and the loss falls where a unit adds to its map what the other one shows.

    Args:
        channels: of both maps.

    References:
        Dual Relation Knowledge Distillation for Object Detection (Ni et al., IJCAI 2023), pixel-wise
        relation.

    Example:
        >>> relation = PixelRelation(8)
        >>> maps = torch.randn(2, 8, 4, 4)
        >>> relation(maps, maps).item()
        0.0
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.student = GraphReasoning(channels)
        self.teacher = GraphReasoning(channels)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The mean of squared differences, a scalar, float32 (float64 for float64 maps).

        Nothing of the size of the maps is kept for the gradient but the maps themselves.

        Args:
            student: shape (batch, channels, height, width).
            teacher: of the same shape, a constant.

        Raises:
            ValueError: shapes that differ, or that are no maps'.
            TypeError: maps that are not floating point.
        """
        require_floating(student=student, teacher=teacher)
        require_same_shape(student=student, teacher=teacher)
        if student.ndim != 4:
            raise ValueError(
                f"maps must have shape (batch, channels, height, width), got {shape_text(student)}"
            )
        loss: Tensor = checkpoint(
            self._loss, student, teacher.detach(), use_reentrant=False, preserve_rng_state=False
        )
        return loss

    def _loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        dtype = compute_dtype(student, teacher)
        ours, theirs = student.to(dtype).flatten(2), teacher.to(dtype).flatten(2)
        with torch.autocast(student.device.type, enabled=False):
            difference = theirs - ours + self.teacher(theirs) - self.student(ours)
            loss: Tensor = difference.square().mean() / spread_of(theirs)
        return loss


def spread_of(teacher: Tensor) -> Tensor:
    """What squared differences from a teacher's map are divided by: its variance, or 1 if it is constant.

    Args:
        teacher: of any shape.

    Example:
        >>> spread_of(torch.tensor([1.0, 3.0, 5.0])).item(), spread_of(torch.ones(3)).item()
        (2.6666667461395264, 1.0)
    """
    variance = teacher.detach().to(compute_dtype(teacher)).var(correction=0)
    return torch.where(variance > 0, variance, 1.0)


class InstanceRelation(nn.Module):
    r"""The instance relation of DRKD: how similar each object is to the others of its image.

    .. math::
        \sum_j \sum_i (\psi_T(i, j) - \psi_S(i, j))^2, \qquad
        \psi_S(i, j) = \mathrm{softmax}_i \bigl(w_{ij} \, g_1(s_i) \cdot g_2(s_j) / \tau \bigr), \qquad
        \psi_T(i, j) = \mathrm{softmax}_i \bigl(t_i \cdot t_j / \tau \bigr)

    for unit vectors s and t of the objects, i and j of one image. :math:`g_1` and :math:`g_2` (``first`` and
    ``second``) are linear maps, the identity at first; w is the relation filter (``filter``), two linear
    functions of i and of j, summed and squashed to between 0 and 2, 1 at first.

    The embedded Gaussian and the filter inside it are DRKD's. Their exact form is ours, and so is leaving
    them out of the teacher: learned on both sides, they would make all relations equal, and the loss 0.

    Args:
        channels: of the vectors.
        temperature: of the softmax; 0.1 is ours.

    References:
        Dual Relation Knowledge Distillation for Object Detection (Ni et al., IJCAI 2023), instance-wise
        relation.

    Example:
        >>> relation = InstanceRelation(8)
        >>> objects = torch.randn(5, 8)
        >>> relation(objects, 3 * objects, torch.tensor([0, 0, 0, 1, 1])).item() < 1e-6
        True
    """

    def __init__(self, channels: int, *, temperature: float = 0.1) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.temperature = temperature
        self.first = nn.Linear(channels, channels, bias=False)
        self.second = nn.Linear(channels, channels, bias=False)
        self.filter = nn.Linear(channels, 2)
        for identity in (self.first, self.second):
            nn.init.eye_(identity.weight)
        for zero in (self.filter.weight, self.filter.bias):
            nn.init.zeros_(zero)

    def forward(self, student: Tensor, teacher: Tensor, images: Tensor) -> Tensor:
        """The sum over all objects, a scalar, float32 (float64 for float64 vectors); 0 without objects.

        Args:
            student: shape (objects, channels), of all images one behind the other.
            teacher: of the same shape, a constant.
            images: shape (objects,), the number of the image that each is in: only objects of one image are
                related.

        Raises:
            ValueError: shapes that don't belong together.
            TypeError: vectors that are not floating point.
        """
        require_floating(student=student, teacher=teacher)
        require_same_shape(student=student, teacher=teacher)
        if student.ndim != 2 or images.shape != student.shape[:1]:
            raise ValueError(
                f"student must have shape (objects, channels) and images (objects,), got "
                f"{shape_text(student)} and {shape_text(images)}"
            )
        apart = images[:, None] != images
        dtype = compute_dtype(student, teacher)
        with torch.autocast(student.device.type, enabled=False):
            ours, theirs = _unit(student.to(dtype)), _unit(teacher.detach().to(dtype))
            learned = ours.to(self.filter.weight.dtype)
            of_first, of_second = self.filter(learned).to(dtype).unbind(dim=1)
            weight = 2 * (of_first[:, None] + of_second).sigmoid()
            similar = weight * (self.first(learned).to(dtype) @ self.second(learned).to(dtype).mT)
            found = self._normalized(similar, apart)
            return (found - self._normalized(theirs @ theirs.mT, apart)).square().sum()

    def _normalized(self, similar: Tensor, apart: Tensor) -> Tensor:
        """Each column a distribution over the objects of its image."""
        return (similar / self.temperature).masked_fill(apart, -torch.inf).softmax(dim=0)


def _unit(vectors: Tensor) -> Tensor:
    """Vectors of length 1; those near 0 stay near it, where the direction means nothing."""
    return vectors * (vectors.square().sum(dim=1, keepdim=True) + _EPSILON).rsqrt()
