"""Distillation losses: typed functions on tensors, one idea a file.

Losses of predictions share three conventions; those of feature maps take maps as they are, and the last.

* **Rows.** A loss is first one number per row: the last dimension (classes, bins, box coordinates) is
  used up, whatever stands before it are rows, in any order and any number of dimensions.
* **Weight and normalizer.** ``weight`` holds one number per row. The result is
  ``sum(weight * row loss) / normalizer``; without a ``normalizer`` it is the mean over rows. No rows
  at all give a zero that can be back-propagated.
* **Constants.** The teacher's side, ``weight`` and ``normalizer`` never receive a gradient.

Arithmetic is float32 (float64 for float64 inputs), whatever autocast says.
"""

from __future__ import annotations

from crosskd.losses.boxes import giou_loss, iou_loss
from crosskd.losses.cosine import cosine_loss
from crosskd.losses.cwd import cwd_loss
from crosskd.losses.distributions import distribution_kl_loss
from crosskd.losses.drkd import InstanceRelation, PixelRelation
from crosskd.losses.features import pkd_loss
from crosskd.losses.fgd import GlobalContext, fgd_loss
from crosskd.losses.imitation import imitation_loss
from crosskd.losses.mgd import mgd_loss
from crosskd.losses.quality_focal import quality_focal_loss
from crosskd.losses.softmax_focal import softmax_focal_loss
from crosskd.losses.ssim import ssim_loss
from crosskd.losses.valuable_region import valuable_region

__all__ = [
    "GlobalContext",
    "InstanceRelation",
    "PixelRelation",
    "cosine_loss",
    "cwd_loss",
    "distribution_kl_loss",
    "fgd_loss",
    "giou_loss",
    "imitation_loss",
    "iou_loss",
    "mgd_loss",
    "pkd_loss",
    "quality_focal_loss",
    "softmax_focal_loss",
    "ssim_loss",
    "valuable_region",
]
