"""The direction of a map's vectors against another's."""

from __future__ import annotations

from torch import Tensor

from crosskd._checks import compute_dtype, require_floating, require_same_shape, shape_text

__all__ = ["cosine_loss"]

_SHORTEST = 1e-8


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""One minus the cosine between the two vectors at each position, the mean over positions.

    .. math::
        \frac{1}{P} \sum_p \Bigl(1 - \frac{s_p \cdot t_p}{\|s_p\| \, \|t_p\|}\Bigr)

    over the P positions of the batch. A vector shorter than 1e-8 on either side has no direction: its
    position counts as 1 and has no gradient.

    Args:
        student: shape (batch, channels, \*space).
        teacher: shape (batch, channels, \*space), a constant.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that differ, fewer than two dimensions, or no element.
        TypeError: maps that are not floating point.

    References:
        RT-DETRv4 (Liao et al., 2025, arXiv 2510.25257), whose student learns a foundation model's map so.

    Example:
        >>> import torch
        >>> features = torch.randn(2, 8, 4, 4)
        >>> bool(cosine_loss(features, 3 * features) < 1e-6)  # lengths don't matter
        True
        >>> round(cosine_loss(features, -features).item(), 5)
        2.0
    """
    require_floating(student=student, teacher=teacher)
    require_same_shape(student=student, teacher=teacher)
    if student.ndim < 2 or student.numel() == 0:
        raise ValueError(
            f"maps must have shape (batch, channels, *space) and at least one element, got "
            f"{shape_text(student)}"
        )
    dtype = compute_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    # The maps are not divided by their lengths, which would keep a second copy of both for the gradient.
    lengths, theirs = student.norm(dim=1), teacher.norm(dim=1)
    short = (lengths < _SHORTEST) | (theirs < _SHORTEST)
    products = (student * teacher).sum(dim=1) / lengths.masked_fill(short, 1) / theirs.masked_fill(short, 1)
    cosines: Tensor = products.masked_fill(short, 0)
    return (1 - cosines).mean()
