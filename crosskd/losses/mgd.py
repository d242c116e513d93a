"""MGD: the teacher's map generated from the student's."""

from __future__ import annotations

from torch import Tensor

from crosskd._checks import compute_dtype, require_floating, require_same_shape

__all__ = ["mgd_loss"]


def mgd_loss(generated: Tensor, teacher: Tensor) -> Tensor:
    r"""The sum of squared differences over the number of images.

    .. math::
        \frac{1}{N} \sum (t - G(m \odot s))^2

    over all elements of a map and N images, where m is 0 at the masked locations of the student's map and
    :math:`G` generates from the others what the teacher's map shows everywhere.

    Args:
        generated: :math:`G(m \odot s)`, shape (batch, channels, height, width).
        teacher: the teacher's map, of the same shape, a constant.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that differ.
        TypeError: maps that are not floating point.

    References:
        Masked Generative Distillation (Yang et al., ECCV 2022).

    Example:
        >>> import torch
        >>> mgd_loss(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4))  # 3 x 4 x 4 differences of 1
        tensor(48.)
    """
    require_floating(generated=generated, teacher=teacher)
    require_same_shape(generated=generated, teacher=teacher)
    dtype = compute_dtype(generated, teacher)
    difference = generated.to(dtype) - teacher.detach().to(dtype)
    return difference.square().sum() / max(len(generated), 1)
