"""Distillation losses: typed functions on tensors, each with a ``torch.nn.Module`` twin.

All of them share three conventions.

* **Rows.** A loss is first one number a row: the last dimension (classes, bins, box coordinates) is
  used up, whatever stands before it are rows, in any order and any number of dimensions.
* **Weight and normaliser.** ``weight`` holds one number a row. The result is
  ``sum(weight * row loss) / normalizer``; without a ``normalizer`` it is the mean over rows. No rows
  at all give a zero that can be back-propagated.
* **Constants.** The teacher's side, ``weight`` and ``normalizer`` never receive a gradient.

Arithmetic is float32 (float64 for float64 inputs), whatever autocast says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss as _torchvision_focal_loss

from crosskd._checks import (
    compute_dtype,
    require_floating,
    require_last_dimension,
    require_rows,
    require_same_shape,
    shape_text,
)
from crosskd._statistics import feature_statistics

__all__ = [
    "DistributionKLLoss",
    "GIoULoss",
    "IoULoss",
    "PKDLoss",
    "QualityFocalLoss",
    "SigmoidFocalLoss",
    "SoftmaxFocalLoss",
    "distribution_kl_loss",
    "giou_loss",
    "iou_loss",
    "pkd_loss",
    "quality_focal_loss",
    "sigmoid_focal_loss",
    "softmax_focal_loss",
]

_SMALLEST_AREA = 1e-6
_SMALLEST_IOU = 1e-6

# How many numbers the quality focal loss works on at a time: on a CPU as many a thread as fit its cache,
# on a GPU enough to keep the number of kernel launches low. A few temporary tensors of this size are
# alive at once, so it is also kept to a small part of the logits.
_CHUNK_CPU = 2**16
_CHUNK_ACCELERATOR = 2**22
_CHUNKS_AT_LEAST = 32


def _weighted(row_losses: Tensor, weight: Tensor | None, normalizer: Tensor | float | None) -> Tensor:
    """Turns one loss a row into a scalar: the only place that weights and normalises.

    Args:
        row_losses: one loss a row, any shape.
        weight: one number a row, of the same shape, or ``None`` for ones.
        normalizer: what the sum is divided by, or ``None`` for the number of rows.
    """
    if weight is not None:
        if weight.shape != row_losses.shape:
            raise ValueError(
                f"weight must hold one number a row: expected {shape_text(row_losses)}, "
                f"got {shape_text(weight)}"
            )
        row_losses = row_losses * weight.detach().to(row_losses.dtype)
    total = row_losses.sum()
    if normalizer is None:
        return total / max(row_losses.numel(), 1)
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must be one number, got shape {shape_text(normalizer)}")
        return total / normalizer.detach().to(total.dtype).reshape(())
    if not normalizer > 0:
        raise ValueError(f"normalizer must be above 0, got {normalizer}")
    return total / normalizer


def _check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    require_floating(student_logits=student_logits, teacher_logits=teacher_logits)
    require_rows("student_logits", student_logits)
    require_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)


def _check_beta(beta: float) -> None:
    if not beta >= 0:
        raise ValueError(f"beta must be 0 or more, got {beta}")


# ---------------------------------------------------------------------------------------------
# Quality focal loss


def _power(distance: Tensor, exponent: float) -> Tensor:
    """A power whose slope at 0 counts as 0, the minimum, where below 1 it would be infinite."""
    if exponent >= 1:
        return distance if exponent == 1 else distance.pow(exponent)
    equal = distance == 0
    return distance.masked_fill(equal, 1.0).pow(exponent).masked_fill(equal, 0.0)


def _quality_focal_value(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """|sigmoid(s) - sigmoid(t)|^beta * BCE(s, sigmoid(t)), elementwise."""
    target = teacher.sigmoid()
    loss = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    if beta == 0:
        return loss
    return loss * _power((student.sigmoid() - target).abs(), beta)


def _quality_focal_derivative(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The derivative of `_quality_focal_value` by the student's logits, elementwise."""
    probability, target = student.sigmoid(), teacher.sigmoid()
    difference = probability - target
    if beta == 0:
        return difference
    # Cross entropy as softplus(s) - s * target: two passes over the numbers instead of four. For a large
    # s it cancels, but the sigmoid's slope that multiplies it is smaller still.
    cross_entropy = torch.addcmul(F.softplus(student, threshold=50), student, target, value=-1)
    slope = torch.addcmul(probability, probability, probability, value=-1) * cross_entropy
    if beta == 1:
        return torch.addcmul(slope, difference, difference) * difference.sign()
    distance = difference.abs()
    slope = slope * difference.sign()
    return _power(distance, beta) * difference + beta * _power(distance, beta - 1) * slope


def _chunk_size(logits: Tensor) -> int:
    """How many numbers to work on at a time."""
    largest = _CHUNK_CPU * torch.get_num_threads() if logits.device.type == "cpu" else _CHUNK_ACCELERATOR
    return min(largest, max(logits.numel() // _CHUNKS_AT_LEAST, _CHUNK_CPU))


def _row_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields matching (rows, K) pieces of tensors of one shape (..., K), without copying them."""
    first = tensors[0]
    if first.numel() == 0:
        return
    if first.ndim != 2:
        try:
            tensors = tuple(tensor.view(-1, first.shape[-1]) for tensor in tensors)
        except RuntimeError:
            # Not viewable as rows: copying it would cost the memory that chunks are there to save.
            for pieces in zip(*(tensor.unbind(0) for tensor in tensors), strict=True):
                yield from _row_chunks(*pieces)
            return
    rows = max(1, _chunk_size(first) // first.shape[-1])
    yield from zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


class _QualityFocalRows(torch.autograd.Function):
    """Quality focal loss summed over the last dimension, in chunks.

    The plain composition of operators keeps about five tensors of the logits' size for its backward.
    This one keeps none, and its backward makes one, the gradient itself.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, beta: float) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.beta = beta
        dtype = compute_dtype(student, teacher)
        rows = [
            _quality_focal_value(s.to(dtype), t.to(dtype), beta).sum(-1)
            for s, t in _row_chunks(student, teacher)
        ]
        shape = student.shape[:-1]
        if not rows:
            return torch.zeros(shape, dtype=dtype, device=student.device)
        return torch.cat(rows).reshape(shape)

    @staticmethod
    def backward(ctx: Any, *row_gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (row_gradient,) = row_gradients
        student, teacher = ctx.saved_tensors
        dtype = row_gradient.dtype
        if torch.is_grad_enabled():
            # create_graph=True: the same formula in one piece, so that autograd can differentiate it.
            derivative = _quality_focal_derivative(student.to(dtype), teacher.to(dtype), ctx.beta)
            return (derivative * row_gradient.unsqueeze(-1)).to(student.dtype), None, None
        gradient = torch.empty_like(student)
        expanded = row_gradient.unsqueeze(-1).expand(student.shape)
        for s, t, g, out in _row_chunks(student, teacher, expanded, gradient):
            out.copy_(_quality_focal_derivative(s.to(dtype), t.to(dtype), ctx.beta).mul_(g))
        return gradient, None, None


def quality_focal_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    r"""Quality focal loss of the student's logits against the teacher's probabilities.

    .. math::
        \frac{1}{Z} \sum_i w_i \sum_k |\sigma(s_{ik}) - \sigma(t_{ik})|^\beta \;
        \mathrm{BCE}(s_{ik}, \sigma(t_{ik}))

    Forward and backward keep at most one tensor of the logits' size beside the two inputs, so that
    100,000 anchors of 80 classes fit. It can be differentiated twice.

    Args:
        student_logits: shape (..., classes), before the sigmoid.
        teacher_logits: shape (..., classes), a constant.
        beta: how strongly rows where the two already agree are damped; 0 or more. With 0 this is
            binary cross entropy against the teacher's probabilities.
        weight: one number a row, shape (...).
        normalizer: what the weighted sum is divided by; the number of rows without it.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that differ, a weight that is not one number a row, ``beta`` below 0, a
            normaliser that is not above 0.
        TypeError: logits that are not floating point.

    References:
        Generalized Focal Loss (Li et al., NeurIPS 2020), equation 5, with the teacher's probability
        as the quality; CrossKD (Wang et al., CVPR 2024), section 3.3.

    Example:
        >>> student = torch.zeros(2, 3, requires_grad=True)
        >>> loss = quality_focal_loss(student, torch.ones(2, 3))
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.4805, torch.Size([2, 3]))
    """
    _check_logits(student_logits, teacher_logits)
    _check_beta(beta)
    teacher_logits = teacher_logits.detach()
    if torch.compiler.is_compiling():
        # The compiler fuses the plain composition by itself and chooses what to keep for backward.
        dtype = compute_dtype(student_logits, teacher_logits)
        value = _quality_focal_value(student_logits.to(dtype), teacher_logits.to(dtype), beta)
        return _weighted(value.sum(-1), weight, normalizer)
    rows = _QualityFocalRows.apply(student_logits, teacher_logits, beta)
    return _weighted(rows, weight, normalizer)


def softmax_focal_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    r"""Quality focal loss for classes that share a softmax, one of them the background.

    With :math:`p` the student's and :math:`q` the teacher's probabilities,

    .. math::
        \frac{1}{Z} \sum_i w_i \Big( \tfrac{1}{2} \sum_k |p_{ik} - q_{ik}| \Big)^\beta \;
        \Big( - \sum_k q_{ik} \log p_{ik} \Big)

    The distance in front is the total variation, which for two classes is the difference of their
    probabilities: for those this is `quality_focal_loss` of the difference of the two logits.

    Args:
        student_logits: shape (..., classes), before the softmax.
        teacher_logits: shape (..., classes), a constant.
        beta: how strongly rows where the two already agree are damped; 0 or more. With 0 this is
            cross entropy against the teacher's probabilities.
        weight: one number a row, shape (...).
        normalizer: what the weighted sum is divided by; the number of rows without it.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that differ, a weight that is not one number a row, ``beta`` below 0, a
            normaliser that is not above 0.
        TypeError: logits that are not floating point.

    References:
        Ours: Generalized Focal Loss (Li et al., NeurIPS 2020), equation 5, for several classes at once.

    Example:
        >>> student = torch.zeros(2, 3, requires_grad=True)
        >>> loss = softmax_focal_loss(student, torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.3468, torch.Size([2, 3]))
    """
    _check_logits(student_logits, teacher_logits)
    _check_beta(beta)
    dtype = compute_dtype(student_logits, teacher_logits)
    student = F.log_softmax(student_logits.to(dtype), dim=-1)
    # By the same operators as the student's: where the two agree they are the same to the last bit, and the
    # distance's slope, which is 1 however small the distance, counts as 0.
    teacher = F.log_softmax(teacher_logits.detach().to(dtype), dim=-1).exp()
    rows = -(teacher * student).sum(-1)
    if beta != 0:  # with 0 rows count in full even where the two agree
        rows = _power(0.5 * (student.exp() - teacher).abs().sum(-1), beta) * rows
    return _weighted(rows, weight, normalizer)


# ---------------------------------------------------------------------------------------------
# Distributions over bins


def distribution_kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence from the teacher's distribution over bins to the student's.

    .. math::
        \frac{1}{Z} \sum_i w_i \, T^2 \,
        \mathrm{KL}(\mathrm{softmax}(t_i / T) \,\|\, \mathrm{softmax}(s_i / T))

    Used for detectors that predict each side of a box as a distribution (GFL): one row a side.

    Args:
        student_logits: shape (..., bins), before the softmax.
        teacher_logits: shape (..., bins), a constant.
        temperature: softens both distributions; above 0.
        weight: one number a row, shape (...).
        normalizer: what the weighted sum is divided by; the number of rows without it.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that differ, a weight that is not one number a row, a temperature or a
            normaliser that is not above 0.
        TypeError: logits that are not floating point.

    References:
        Localization Distillation (Zheng et al., CVPR 2022), equation 3; CrossKD, section 3.3.

    Example:
        >>> student = torch.zeros(1, 4, 17, requires_grad=True)
        >>> loss = distribution_kl_loss(student, torch.randn(1, 4, 17))
        >>> loss.backward()
        >>> bool(loss > 0)
        True
    """
    _check_logits(student_logits, teacher_logits)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    dtype = compute_dtype(student_logits, teacher_logits)
    student = F.log_softmax(student_logits.to(dtype) / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().to(dtype) / temperature, dim=-1)
    rows = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return _weighted(rows * temperature**2, weight, normalizer)


# ---------------------------------------------------------------------------------------------
# Boxes


def _intersection_and_union(boxes: Tensor, target_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union of matching boxes, the union never below 1e-6.

    A box whose right side is to the left of its left one, as heads that predict plain distances may give,
    has no area: the product of its sides would be a negative one, or a positive one of nothing.
    """
    sides = (
        torch.minimum(boxes[..., 2:], target_boxes[..., 2:])
        - torch.maximum(boxes[..., :2], target_boxes[..., :2])
    ).clamp(min=0)
    intersection = sides[..., 0] * sides[..., 1]
    size, target_size = ((b[..., 2:] - b[..., :2]).clamp(min=0) for b in (boxes, target_boxes))
    union = size[..., 0] * size[..., 1] + target_size[..., 0] * target_size[..., 1] - intersection
    return intersection, union.clamp(min=_SMALLEST_AREA)


def _checked_boxes(boxes: Tensor, target_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of boxes in the type to calculate in, the targets as constants."""
    require_floating(boxes=boxes, target_boxes=target_boxes)
    require_last_dimension(4, "xyxy in pixels", boxes=boxes, target_boxes=target_boxes)
    require_same_shape(boxes=boxes, target_boxes=target_boxes)
    dtype = compute_dtype(boxes, target_boxes)
    return boxes.to(dtype), target_boxes.detach().to(dtype)


def giou_loss(
    boxes: Tensor,
    target_boxes: Tensor,
    *,
    weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    r"""Generalised IoU loss, :math:`\frac{1}{Z} \sum_i w_i (1 - \mathrm{GIoU}_i)`.

    Boxes of zero area count as areas of 1e-6 and give no gradient through their union.

    Args:
        boxes: the student's boxes, shape (..., 4), xyxy in pixels.
        target_boxes: the teacher's boxes, shape (..., 4), xyxy in pixels, a constant.
        weight: one number a row, shape (...).
        normalizer: what the weighted sum is divided by; the number of rows without it.

    Returns:
        A scalar, float32 (float64 for float64 inputs), between 0 and 2 a row.

    Raises:
        ValueError: shapes that differ or don't end in 4, a weight that is not one number a row, a
            normaliser that is not above 0.
        TypeError: boxes that are not floating point.

    References:
        Generalized Intersection over Union (Rezatofighi et al., CVPR 2019), algorithm 1.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]], requires_grad=True)
        >>> giou_loss(boxes, torch.tensor([[0.0, 0.0, 2.0, 4.0]])).item()
        0.5
    """
    boxes, target_boxes = _checked_boxes(boxes, target_boxes)
    intersection, union = _intersection_and_union(boxes, target_boxes)
    sides = (
        torch.maximum(boxes[..., 2:], target_boxes[..., 2:])
        - torch.minimum(boxes[..., :2], target_boxes[..., :2])
    ).clamp(min=0)
    enclosing = (sides[..., 0] * sides[..., 1]).clamp(min=_SMALLEST_AREA)
    giou = intersection / union - (enclosing - union) / enclosing
    return _weighted(1 - giou, weight, normalizer)


def iou_loss(
    boxes: Tensor,
    target_boxes: Tensor,
    *,
    log: bool = True,
    weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    r"""IoU loss, :math:`\frac{1}{Z} \sum_i w_i (-\log \mathrm{IoU}_i)`, or 1 - IoU.

    Args:
        boxes: the student's boxes, shape (..., 4), xyxy in pixels.
        target_boxes: the teacher's boxes, shape (..., 4), xyxy in pixels, a constant.
        log: minus the logarithm of the IoU, which is at least 1e-6 there; ``False`` for 1 - IoU.
        weight: one number a row, shape (...).
        normalizer: what the weighted sum is divided by; the number of rows without it.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that differ or don't end in 4, a weight that is not one number a row, a
            normaliser that is not above 0.
        TypeError: boxes that are not floating point.

    References:
        UnitBox (Yu et al., ACM MM 2016), section 3; used by FCOS (Tian et al., ICCV 2019).

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]], requires_grad=True)
        >>> round(iou_loss(boxes, torch.tensor([[0.0, 0.0, 2.0, 4.0]])).item(), 4)
        0.6931
    """
    boxes, target_boxes = _checked_boxes(boxes, target_boxes)
    intersection, union = _intersection_and_union(boxes, target_boxes)
    iou = intersection / union
    rows = -iou.clamp(min=_SMALLEST_IOU).log() if log else 1 - iou
    return _weighted(rows, weight, normalizer)


# ---------------------------------------------------------------------------------------------
# Hard targets and features


def sigmoid_focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    r"""Sigmoid focal loss of logits against targets of 0 and 1, summed over classes.

    torchvision's operator under this module's conventions for rows, weight and normaliser.

    Args:
        logits: shape (..., classes), before the sigmoid.
        targets: shape (..., classes), 1 at a row's class, else 0; a constant.
        alpha: weight of the ones against the zeros, between 0 and 1, or -1 for none.
        gamma: how strongly well-classified entries are damped; 0 or more.
        weight: one number a row, shape (...).
        normalizer: what the weighted sum is divided by; the number of rows without it.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that differ, a weight that is not one number a row, ``alpha`` or ``gamma``
            out of range, a normaliser that is not above 0.
        TypeError: arguments that are not floating point.

    References:
        Focal Loss for Dense Object Detection (Lin et al., ICCV 2017), equation 5.

    Example:
        >>> logits = torch.zeros(1, 2, requires_grad=True)
        >>> round(sigmoid_focal_loss(logits, torch.tensor([[1.0, 0.0]])).item(), 4)
        0.1733
    """
    require_floating(logits=logits, targets=targets)
    require_rows("logits", logits)
    require_same_shape(logits=logits, targets=targets)
    if not (0 <= alpha <= 1 or alpha == -1):
        raise ValueError(f"alpha must be between 0 and 1, or -1 for none, got {alpha}")
    if not gamma >= 0:
        raise ValueError(f"gamma must be 0 or more, got {gamma}")
    dtype = compute_dtype(logits, targets)
    elementwise = _torchvision_focal_loss(
        logits.to(dtype), targets.detach().to(dtype), alpha=alpha, gamma=gamma
    )
    return _weighted(elementwise.sum(-1), weight, normalizer)


def pkd_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Half the mean squared difference of features normalised per channel.

    .. math::
        \frac{1}{M} \sum \tfrac{1}{2} (\mathrm{norm}(s) - \mathrm{norm}(t))^2

    over all M elements, where norm takes away each channel's mean over batch and space and divides by
    its standard deviation (unbiased, 1e-6 added).

    Args:
        student_features: shape (batch, channels, \*space).
        teacher_features: shape (batch, channels, \*space), a constant.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that differ.
        TypeError: features that are not floating point.

    References:
        PKD (Cao et al., NeurIPS 2022), equation 3.

    Example:
        >>> features = torch.randn(2, 3, 4, 4)
        >>> bool(pkd_loss(features, 5 * features + 1) < 1e-6)  # scale and offset don't matter
        True
    """
    require_floating(student_features=student_features, teacher_features=teacher_features)
    require_same_shape(student_features=student_features, teacher_features=teacher_features)
    dtype = compute_dtype(student_features, teacher_features)
    student, teacher = student_features.to(dtype), teacher_features.detach().to(dtype)
    difference = feature_statistics(student).normalize(student) - feature_statistics(teacher).normalize(
        teacher
    )
    return _weighted(difference.square() / 2, None, None)


# ---------------------------------------------------------------------------------------------
# Modules: configuration, and a forward of one call


class QualityFocalLoss(nn.Module):
    """`quality_focal_loss` with its ``beta`` kept.

    Example:
        >>> QualityFocalLoss(beta=2.0)(torch.zeros(2, 3), torch.zeros(2, 3)).item()
        0.0
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = beta

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """Calls `quality_focal_loss`."""
        return quality_focal_loss(
            student_logits, teacher_logits, beta=self.beta, weight=weight, normalizer=normalizer
        )


class SoftmaxFocalLoss(nn.Module):
    """`softmax_focal_loss` with its ``beta`` kept.

    Example:
        >>> round(SoftmaxFocalLoss(beta=2.0)(torch.zeros(2, 3), torch.zeros(2, 3)).item(), 4)
        0.0
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = beta

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """Calls `softmax_focal_loss`."""
        return softmax_focal_loss(
            student_logits, teacher_logits, beta=self.beta, weight=weight, normalizer=normalizer
        )


class DistributionKLLoss(nn.Module):
    """`distribution_kl_loss` with its ``temperature`` kept.

    Example:
        >>> DistributionKLLoss(temperature=2.0)(torch.zeros(2, 17), torch.zeros(2, 17)).item()
        0.0
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """Calls `distribution_kl_loss`."""
        return distribution_kl_loss(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            weight=weight,
            normalizer=normalizer,
        )


class GIoULoss(nn.Module):
    """`giou_loss` as a module.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        >>> GIoULoss()(boxes, boxes).item()
        0.0
    """

    def forward(
        self,
        boxes: Tensor,
        target_boxes: Tensor,
        weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """Calls `giou_loss`."""
        return giou_loss(boxes, target_boxes, weight=weight, normalizer=normalizer)


class IoULoss(nn.Module):
    """`iou_loss` with the choice of ``log`` kept.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        >>> IoULoss(log=False)(boxes, boxes).item()
        0.0
    """

    def __init__(self, log: bool = True) -> None:
        super().__init__()
        self.log = log

    def forward(
        self,
        boxes: Tensor,
        target_boxes: Tensor,
        weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """Calls `iou_loss`."""
        return iou_loss(boxes, target_boxes, log=self.log, weight=weight, normalizer=normalizer)


class SigmoidFocalLoss(nn.Module):
    """`sigmoid_focal_loss` with ``alpha`` and ``gamma`` kept.

    Example:
        >>> round(SigmoidFocalLoss(gamma=0.0)(torch.zeros(1, 1), torch.ones(1, 1)).item(), 4)
        0.1733
    """

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """Calls `sigmoid_focal_loss`."""
        return sigmoid_focal_loss(
            logits,
            targets,
            alpha=self.alpha,
            gamma=self.gamma,
            weight=weight,
            normalizer=normalizer,
        )


class PKDLoss(nn.Module):
    """`pkd_loss` as a module.

    Example:
        >>> features = torch.randn(1, 2, 3, 3)
        >>> PKDLoss()(features, features).item()
        0.0
    """

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        """Calls `pkd_loss`."""
        return pkd_loss(student_features, teacher_features)
