"""FGD: feature maps compared where the teacher attends, objects and background apart, and as wholes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from crosskd._checks import (
    compute_dtype,
    require_floating,
    require_last_dimension,
    require_same_shape,
    shape_text,
)

__all__ = ["GlobalContext", "attention", "fgd_loss", "fgd_terms", "object_masks"]


class GlobalContext(nn.Module):
    r"""The global part of FGD: both maps are compared after each location was given its map's context.

    .. math::
        \frac{1}{N} \sum (R_T(t) - R_S(s))^2, \qquad
        R(f) = f + W_2\, \mathrm{ReLU}(\mathrm{LayerNorm}(W_1 \sum_j \mathrm{softmax}_j(W_k f_j)\, f_j))

    over all locations j of an image's map, N images and a sum over all elements. The student's :math:`R_S`
    and the teacher's :math:`R_T` have weights of their own, and both are trained; the maps of the teacher
    are constants.

    The parameters, with ``_s`` for the student's and ``_t`` for the teacher's:

    - ``conv_mask_s``, a 1x1 convolution to one channel: :math:`W_k`;
    - ``channel_add_conv_s.0``, a 1x1 convolution to half of the channels, one at least: :math:`W_1`;
    - ``channel_add_conv_s.1``, the layer norm, over those channels;
    - ``channel_add_conv_s.3``, a 1x1 convolution back: :math:`W_2`, zero at first, so that R(f) = f.

    Args:
        channels: of both maps.

    References:
        FGD (Yang et al., CVPR 2022), global distillation; the context block is that of GCNet (Cao et al.,
        2019).

    Example:
        >>> context = GlobalContext(8)
        >>> maps = torch.randn(2, 8, 4, 4)
        >>> context(maps, maps).item()  # W_2 is still zero
        0.0
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_mask_s = nn.Conv2d(channels, 1, kernel_size=1)
        self.conv_mask_t = nn.Conv2d(channels, 1, kernel_size=1)
        self.channel_add_conv_s = _bottleneck(channels)
        self.channel_add_conv_t = _bottleneck(channels)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The sum of squared differences over the number of images, a scalar, float32 (float64 for float64).

        Args:
            student: shape (batch, channels, height, width).
            teacher: of the same shape, a constant.

        Raises:
            ValueError: shapes that differ.
        """
        require_same_shape(student=student, teacher=teacher)
        dtype = compute_dtype(student, teacher)
        student, teacher = student.to(dtype), teacher.detach().to(dtype)
        with torch.autocast(student.device.type, enabled=False):
            added = _added(teacher, self.conv_mask_t, self.channel_add_conv_t)
            added = added - _added(student, self.conv_mask_s, self.channel_add_conv_s)
        return (teacher - student + added).square().sum() / max(len(student), 1)


def _bottleneck(channels: int) -> nn.Sequential:
    """What makes of a context what is added to each location; zero at first."""
    hidden = max(channels // 2, 1)
    last = nn.Conv2d(hidden, channels, kernel_size=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]  # it has one
    return nn.Sequential(
        nn.Conv2d(channels, hidden, kernel_size=1), nn.LayerNorm([hidden, 1, 1]), nn.ReLU(), last
    )


def _added(features: Tensor, conv_mask: nn.Conv2d, bottleneck: nn.Sequential) -> Tensor:
    """What R adds to each location of a map, shape (batch, channels, 1, 1)."""
    wide = features.to(conv_mask.weight.dtype)
    where = conv_mask(wide).flatten(2).softmax(dim=-1)  # (batch, 1, locations)
    context = wide.flatten(2) @ where.transpose(1, 2)  # (batch, channels, 1)
    added: Tensor = bottleneck(context.unsqueeze(-1))
    return added.to(features.dtype)


def attention(features: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Where, and in which channels, features are large.

    Args:
        features: shape (batch, channels, height, width).
        temperature: what the mean absolute values are divided by before the softmax.

    Returns:
        The attention of locations, (batch, 1, height, width), 1 on average, and of channels, (batch,
        channels, 1, 1), likewise.

    References:
        FGD (Yang et al., CVPR 2022), attention masks.

    Example:
        >>> space, channel = attention(torch.ones(2, 8, 4, 4), temperature=0.5)
        >>> space.unique(), channel.unique()
        (tensor([1.]), tensor([1.]))
    """
    batch, channels, height, width = features.shape
    size = features.abs()
    space = (size.mean(dim=1).flatten(1) / temperature).softmax(dim=1) * (height * width)
    channel = (size.mean(dim=(2, 3)) / temperature).softmax(dim=1) * channels
    return space.view(batch, 1, height, width), channel.view(batch, channels, 1, 1)


def object_masks(boxes: Sequence[Tensor], features: Tensor, stride: float) -> tuple[Tensor, Tensor]:
    """How much each location counts as foreground and as background, whatever the sizes of the objects.

    A box covers the cells from the floor of its near corner to the ceiling of its far corner, both included,
    each with 1 over the number of them; where boxes overlap, the smaller one's, which is larger. The cells
    that no box covers have 1 over their number, and together 1.

    Args:
        boxes: each image's, shape (boxes, 4), xyxy in pixels.
        features: shape (batch, channels, height, width): size, type and device of the masks.
        stride: pixels between neighbouring locations.

    Returns:
        Foreground and background, (batch, 1, height, width).

    Raises:
        ValueError: another number of images, or boxes of another shape.

    References:
        FGD (Yang et al., CVPR 2022), binary and scale mask.

    Example:
        >>> boxes = [torch.tensor([[0.0, 0.0, 8.0, 8.0]])]
        >>> foreground, background = object_masks(boxes, torch.zeros(1, 8, 3, 3), stride=8)
        >>> foreground[0, 0], background[0, 0]
        (tensor([[0.2500, 0.2500, 0.0000],
                [0.2500, 0.2500, 0.0000],
                [0.0000, 0.0000, 0.0000]]), tensor([[0.0000, 0.0000, 0.2000],
                [0.0000, 0.0000, 0.2000],
                [0.2000, 0.2000, 0.2000]]))
    """
    if len(boxes) != len(features):
        raise ValueError(f"boxes must hold one tensor for each of {len(features)} images, got {len(boxes)}")
    height, width = features.shape[2:]
    for of_image in boxes:
        require_last_dimension(4, "xyxy in pixels", boxes=of_image)
    dtype, device = compute_dtype(features), features.device
    # Rows of NaN cover nothing: as many boxes for each image as the most have, and one at least.
    nowhere = torch.full((1, 4), torch.nan, dtype=dtype, device=device)
    same_type = [of_image.detach().to(device, dtype) for of_image in boxes]
    cells = pad_sequence([*same_type, nowhere], batch_first=True, padding_value=torch.nan)[:-1] / stride
    left, top = cells[..., :2, None].floor().unbind(dim=2)  # (images, boxes, 1)
    right, bottom = cells[..., 2:, None].ceil().unbind(dim=2)
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    in_columns = ((columns >= left) & (columns <= right)).to(dtype)  # (images, boxes, width)
    # The wrong way round a box has no rows or no columns, and nothing must be divided by that.
    weight = 1 / ((right - left + 1).clamp(min=1) * (bottom - top + 1).clamp(min=1))
    weighted = torch.where((rows >= top) & (rows <= bottom), weight, 0.0)  # (images, boxes, height)
    foreground = torch.zeros(len(boxes), 1, height, width, dtype=dtype, device=device)
    # One image after the other: the boxes of all at all locations may be larger than the features.
    for image in range(len(boxes)):
        foreground[image, 0] = (weighted[image, :, :, None] * in_columns[image, :, None]).amax(dim=0)
    background = (foreground == 0).to(dtype)
    return foreground, background / background.sum(dim=(2, 3), keepdim=True).clamp(min=1)


def fgd_terms(
    student: Tensor,
    teacher: Tensor,
    places: Tensor,
    *,
    temperature: float,
    context: GlobalContext | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The three parts of FGD on one level, without their weights.

    Nothing of the size of the maps is kept for the gradient but the maps themselves: what is made of them is
    made again in the backward pass.

    Args:
        student: shape (batch, channels, height, width).
        teacher: of the same shape, a constant.
        places: how much each location's squared difference counts, shape (batch, 1, height, width), a
            constant: :math:`\alpha M + \beta B` of `object_masks`.
        temperature: of the attention.
        context: the global part.

    Returns:
        The focal part, the difference of the attention, and the global part (0 without a ``context``), each a
        scalar, float32 (float64 for float64 inputs).
    """
    dtype = compute_dtype(student, teacher)
    their_space, their_channel = attention(teacher.detach().to(dtype), temperature)
    weight = places.detach().to(dtype) * their_space

    def terms(student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = max(len(student), 1)
        ours, theirs = student.to(dtype), teacher.detach().to(dtype)
        space, channel = attention(ours, temperature)
        focal = (weight * (theirs - ours).square()).sum(dim=(2, 3), keepdim=True) * their_channel
        attended = (space - their_space).abs().sum() + (channel - their_channel).abs().sum()
        whole = attended.new_zeros(()) if context is None else context(student, teacher)
        return focal.sum() / images, attended / images, whole

    parts: tuple[Tensor, Tensor, Tensor] = checkpoint(
        terms, student, use_reentrant=False, preserve_rng_state=False
    )
    return parts


def fgd_loss(
    student: Tensor,
    teacher: Tensor,
    boxes: Sequence[Tensor],
    *,
    stride: float,
    temperature: float,
    alpha: float,
    beta: float,
    gamma: float,
    context: GlobalContext | None = None,
    lambda_: float = 5e-6,
) -> Tensor:
    r"""Focal and global distillation of one level of the feature pyramid, weighted.

    .. math::
        \frac{1}{N} \sum (\alpha M + \beta B)\, A^{space} A^{channel}\, (t - s)^2
        + \frac{\gamma}{N} \sum (|A^{space} - A^{space}_s| + |A^{channel} - A^{channel}_s|)
        + \frac{\lambda}{N} \sum (R_T(t) - R_S(s))^2

    for N images, where M and B are what `object_masks` gives, A is the teacher's `attention` and
    :math:`A_s` the student's, and R is that of `GlobalContext`.

    Args:
        student: shape (batch, channels, height, width).
        teacher: of the same shape, a constant.
        boxes: each image's objects, shape (objects, 4), xyxy in pixels.
        stride: pixels between neighbouring locations of the maps.
        temperature: of the attention.
        alpha: weight of the foreground.
        beta: weight of the background.
        gamma: weight of the difference of the attention.
        context: the global part, a `GlobalContext`, whose parameters are named there; without one it is
            left out.
        lambda_: weight of the global part.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that differ, another number of images, boxes of another shape, a temperature or
            stride that is not above 0.
        TypeError: maps that are not floating point.

    References:
        FGD: Focal and Global Knowledge Distillation for Detectors (Yang et al., CVPR 2022).

    Example:
        >>> student = torch.randn(2, 8, 4, 4, requires_grad=True)
        >>> teacher = torch.randn(2, 8, 4, 4)
        >>> boxes = [torch.tensor([[0.0, 0.0, 16.0, 16.0]]), torch.zeros(0, 4)]
        >>> weights = {"alpha": 1e-3, "beta": 5e-4, "gamma": 5e-4}
        >>> fgd_loss(student, teacher, boxes, stride=8, temperature=0.5, **weights).backward()
        >>> student.grad.shape
        torch.Size([2, 8, 4, 4])
    """
    require_floating(student=student, teacher=teacher)
    require_same_shape(student=student, teacher=teacher)
    if student.ndim != 4:
        raise ValueError(f"maps must have shape (batch, channels, height, width), got {shape_text(student)}")
    if not (0 < temperature < math.inf and stride > 0):
        raise ValueError(f"temperature and stride must be above 0, got {temperature} and {stride}")
    foreground, background = object_masks(boxes, student, stride)
    places = alpha * foreground + beta * background
    focal, attended, whole = fgd_terms(student, teacher, places, temperature=temperature, context=context)
    return focal + gamma * attended + lambda_ * whole
