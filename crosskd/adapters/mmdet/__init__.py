"""Adapter for mmdet's dense detectors, and `CrossKDDetector` to distil them from an mmdet config.

Importing this needs mmdet 3 with mmcv's compiled operators; `find_adapter` imports it for mmdet's
detectors only.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from crosskd.adapters.levels import LevelPairs, check_channels
from crosskd.adapters.protocol import Inputs
from crosskd.head import Branch
from crosskd.predictions import Assignment, Predictions

try:
    from mmdet.models.dense_heads import AnchorHead
    from mmdet.models.detectors import BaseDetector, SingleStageDetector
    from mmdet.models.utils import unpack_gt_instances
    from mmdet.structures import DetDataSample

    from crosskd.adapters._mmdet_detector import CrossKDDetector
    from crosskd.adapters._mmdet_heads import FAMILIES, HeadFamily, Locations, family_of
except ImportError as error:
    raise ImportError(
        f"mmdet's adapter needs mmdet 3 and mmcv with compiled operators, which can't be imported ({error}): "
        "run examples/mmdet/install_mmdet.py of the crosskd sources, which installs a set of versions that "
        "works with a current PyTorch (docs/mmdet.md)"
    ) from error

__all__ = ["CrossKDDetector", "MMDetAdapter"]


class MMDetAdapter:
    """Adapter for mmdet's ``SingleStageDetector`` with a GFL, ATSS, RetinaNet, FCOS or RTMDet (SepBN) head.

    Images are a batch (batch, channels, height, width) that the student's data preprocessor has made,
    targets mmdet's data samples: what mmdet hands to a detector's own ``loss``.

    Args:
        family: how the heads are taken apart.

    Attributes:
        recipe: the published settings for this family of heads.

    Example:
        >>> import pytest
        >>> mmdet = pytest.importorskip("mmdet")
        >>> MMDetAdapter.for_detectors(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        TypeError: the detector is a Linear...
    """

    def __init__(self, family: HeadFamily) -> None:
        self.family = family
        self.recipe = family.recipe

    @classmethod
    def for_detectors(cls, *detectors: nn.Module) -> MMDetAdapter:
        """The adapter for detectors whose heads are all of one family.

        Raises:
            ValueError: heads of different families.
            TypeError: heads that none of the families fits.
        """
        families = [_family_of(detector) for detector in detectors]
        if len(set(families)) > 1:
            names = [family.name for family in families]
            shown = f"{names[0]} (teacher), {names[1]} (student)" if len(names) == 2 else ", ".join(names)
            raise ValueError(
                f"the heads are of different families: {shown}. What one predicts means nothing to the "
                "other's predictors: take a teacher with a head of the student's family"
            )
        return cls(families[0])

    def supports(self, detector: nn.Module) -> bool:
        """Whether a detector is of one stage and has a head of this family."""
        return isinstance(detector, SingleStageDetector) and family_of(detector.bbox_head) is self.family

    # -- construction -------------------------------------------------------------------------

    def num_classes(self, detector: Any) -> int:
        """How many classes the head predicts."""
        return int(detector.bbox_head.num_classes)

    def strides(self, detector: Any) -> list[float]:
        """Pixels between neighbouring locations a level."""
        return [float(stride[0]) for stride in detector.bbox_head.prior_generator.strides]

    def check_pair(self, teacher: nn.Module, student: nn.Module, levels: LevelPairs) -> None:
        """Raises ``ValueError`` for a pair whose predictions can't be compared."""
        for side, detector in (("teacher", teacher), ("student", student)):
            self._check_head(side, cast(Any, detector).bbox_head)
        theirs, ours = cast(Any, teacher).bbox_head, cast(Any, student).bbox_head
        _check_trainable(ours)
        _check_pixels(cast(Any, teacher).data_preprocessor, cast(Any, student).data_preprocessor, levels)
        _check_priors(theirs.prior_generator, ours.prior_generator, levels)
        if levels.scale != 1 and self.family.in_pixels(ours):
            raise ValueError(
                f"{type(ours).__name__} predicts distances in pixels, so strides can't differ by a factor "
                f"({levels.scale:g} here): give both heads the same strides"
            )
        coding, other = self.family.box_coding(ours), self.family.box_coding(theirs)
        for name, value in coding.items():
            if value != other[name]:
                raise ValueError(
                    f"box coding differs, {name}: {other[name]} (teacher), {value} (student). The same "
                    "numbers would mean other boxes: give both heads the same, and train the teacher with it"
                )

    def _check_head(self, side: str, head: Any) -> None:
        for name in self.family.own_functions():
            if getattr(type(head), name) is not getattr(self.family.head, name) or name in vars(head):
                raise ValueError(
                    f"{side}: {type(head).__name__} has a {name} of its own, which this adapter, made for "
                    f"{self.family.name}, does not know: write an adapter for it (crosskd.adapters.Adapter) "
                    "and pass it as adapter="
                )
        if not head.use_sigmoid_cls:
            raise ValueError(
                f"{side}: {type(head).__name__} predicts classes by a softmax, but the distillation loss "
                "compares sigmoids: use a classification loss with use_sigmoid=True"
            )

    def branches(self, detector: nn.Module) -> tuple[Branch, ...]:
        """The classification and the regression branch."""
        return self.family.branches(cast(Any, detector).bbox_head)

    # -- one step -----------------------------------------------------------------------------

    def prepare(self, teacher: Any, student: Any, images: Any, targets: Any) -> Inputs:
        """Takes the student's pixels, and renormalises them where the teacher's preprocessor differs."""
        if not isinstance(images, Tensor) or images.ndim != 4:
            got = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(
                "images must be one tensor (batch, channels, height, width), as a detector's data "
                f"preprocessor returns it, got {got}: call detector.data_preprocessor(data, True) first"
            )
        if targets is not None:
            _check_samples(targets, len(images), student.bbox_head.num_classes)
        pixels = _renormalized(images, targets, student.data_preprocessor, teacher.data_preprocessor)
        return Inputs(images, pixels, targets)

    def features(self, detector: Any, pixels: Tensor) -> Sequence[Tensor]:
        """The detector's own ``extract_feat``."""
        maps: Sequence[Tensor] = detector.extract_feat(pixels)
        strides = detector.bbox_head.prior_generator.strides
        if len(maps) != len(strides):
            raise ValueError(
                f"{type(detector).__name__}.extract_feat gives {len(maps)} levels, its head has "
                f"{len(strides)} strides, {[s[0] for s in strides]}: build backbone, neck and "
                "head for the same levels"
            )
        return maps

    def predict(self, detector: Any, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Runs the head's own forward on a level's tower outputs."""
        return self.family.predict(detector.bbox_head, level, towers)

    def locations(self, detector: Any, inputs: Inputs, features: Sequence[Tensor]) -> Locations:
        """The head's anchors or points."""
        return self.family.locations(detector.bbox_head, features)

    def decode(self, detector: Any, predictions: Predictions, locations: Locations) -> Tensor:
        """Boxes by the head's own coder, in float32 at least."""
        return self.family.decode(detector.bbox_head, predictions, locations)

    def losses(
        self, student: Any, predictions: Predictions, locations: Locations, inputs: Inputs
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The head's own ``loss_by_feat``, its lists of levels summed as mmengine sums them."""
        instances, ignored, metas = unpack_gt_instances(inputs.targets)
        maps = self.family.as_maps(predictions, locations.level_sizes)
        losses, assignment = self.family.losses(student.bbox_head, maps, (instances, metas, ignored))
        return {name: _summed(loss) for name, loss in losses.items()}, assignment

    def detect(self, student: Any, images: Any, targets: Any) -> Any:
        """The student's own ``predict``: data samples with ``pred_instances``.

        Without data samples boxes are in the batch's pixels, for nothing tells another size.
        """
        if targets is None:
            height, width = images.shape[-2:]
            meta = {"img_shape": (height, width), "ori_shape": (height, width), "scale_factor": (1.0, 1.0)}
            targets = [DetDataSample(metainfo=meta) for _ in images]
        return student.predict(images, targets)

    def check_locations(self, teacher: Locations, student: Locations, levels: LevelPairs) -> None:
        """Raises ``ValueError`` where the priors of the two differ."""
        paired = [teacher.priors[level] for level in levels.of_teacher(len(teacher.priors))]
        for level, (theirs, ours) in enumerate(zip(paired, student.priors, strict=True)):
            if theirs.shape != ours.shape or not torch.allclose(theirs, levels.scale * ours.to(theirs)):
                raise ValueError(
                    f"the priors of the student's level {level} differ: {tuple(theirs.shape)} (teacher), "
                    f"{tuple(ours.shape)} (student), or other places or sizes: give both heads the same "
                    "anchor_generator"
                )


def _family_of(detector: nn.Module) -> HeadFamily:
    known = ", ".join(family.name for family in FAMILIES)
    name = type(detector).__name__
    if not isinstance(detector, BaseDetector):
        raise TypeError(f"the detector is a {name}, not one of mmdet's: teacher and student must both be")
    if not isinstance(detector, SingleStageDetector):
        stages = "a detector of two stages" if hasattr(detector, "roi_head") else "not a one-stage detector"
        raise TypeError(
            f"{name} is {stages}: mmdet's adapter distils a SingleStageDetector with one of the heads {known}"
        )
    family = family_of(detector.bbox_head)
    if family is not None:
        return family
    raise TypeError(
        f"{name} has a {type(detector.bbox_head).__name__}; mmdet's adapter knows the heads {known}. For "
        "another one write an adapter (crosskd.adapters.Adapter) and pass it as adapter="
    )


def _check_trainable(head: Any) -> None:
    if isinstance(head, AnchorHead) and not head.train_cfg:
        raise ValueError(
            f"student: {type(head).__name__} was built without a train_cfg, so it can't assign labels: build "
            "it with the train_cfg of its config"
        )


def _check_pixels(teacher: Any, student: Any, levels: LevelPairs) -> None:
    """Looks at what each detector's preprocessor makes of the same images, where both see the same.

    Raises:
        ValueError: images of other channels.
    """
    theirs, ours = (getattr(side, "mean", None) for side in (teacher, student))
    normalised = [bool(getattr(side, "_enable_normalize", False)) for side in (teacher, student)]
    if theirs is not None and ours is not None:
        check_channels(len(theirs), len(ours), levels, ", as each data_preprocessor's mean says")
    if normalised == [False, True] and not levels.own_view:
        warnings.warn(
            "the teacher's data preprocessor does not normalise, the student's does: the teacher gets pixels "
            "from 0 to 255. If it was trained on others, build it with the data_preprocessor of its config",
            stacklevel=5,
        )


def _check_priors(teacher: Any, student: Any, levels: LevelPairs) -> None:
    kinds = [
        (type(g).__name__, getattr(g, "offset", None) or getattr(g, "center_offset", 0))
        for g in (teacher, student)
    ]
    # Anchors of the paired levels, (anchors, 4), where the heads predict from anchors and not from points.
    theirs, ours = (getattr(g, "base_anchors", []) for g in (teacher, student))
    pairs = [(theirs[theirs_at], ours[ours_at]) for ours_at, theirs_at in levels] if len(ours) else []
    differing = [
        (a, b) for a, b in pairs if a.shape != b.shape or not torch.allclose(a, levels.scale * b, rtol=1e-4)
    ]
    if kinds[0] != kinds[1] or differing:
        shown = [f", {side.tolist()}" for side in differing[0]] if differing else ["", ""]
        raise ValueError(
            f"the anchors differ: {kinds[0]}{shown[0]} (teacher), {kinds[1]}{shown[1]} (student). Boxes "
            "predicted from different anchors can't be compared: build both heads with the same "
            "anchor_generator, and train the teacher with it"
        )


def _check_samples(samples: Any, images: int, classes: int) -> None:
    """Raises ``ValueError`` for data samples that the student's own loss would stumble over."""
    if len(samples) != images:
        raise ValueError(f"got {images} images but {len(samples)} data samples: one is needed for each")
    for index, sample in enumerate(samples):
        if not isinstance(sample, DetDataSample) or "gt_instances" not in sample:
            raise ValueError(
                f"data sample {index} must be a DetDataSample with gt_instances, got {type(sample).__name__}"
            )
        boxes, labels = sample.gt_instances.bboxes, sample.gt_instances.labels
        if tuple(boxes.shape) != (len(labels), 4):
            raise ValueError(
                f"data sample {index} must hold boxes of shape (objects, 4) and labels of shape (objects,), "
                f"got {tuple(boxes.shape)} and {tuple(labels.shape)}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(
                f"data sample {index} has labels from {int(labels.min())} to {int(labels.max())}, but the "
                f"student predicts {classes} classes, labelled 0 to {classes - 1}"
            )


def _summed(loss: Tensor | Sequence[Tensor]) -> Tensor:
    """A loss, or one a level, as mmengine's ``parse_losses`` adds them up."""
    if isinstance(loss, Tensor):
        return loss.mean()
    return torch.stack([level.mean() for level in loss]).sum()


def _pixel_coding(preprocessor: Any, like: Tensor) -> tuple[Tensor, Tensor, bool, float]:
    """Mean and deviation (channels, 1, 1), whether channels were swapped, and the padding's value."""
    if not getattr(preprocessor, "_enable_normalize", False):
        mean, std = like.new_zeros(1, 1, 1), like.new_ones(1, 1, 1)
    else:
        mean, std = preprocessor.mean.to(like), preprocessor.std.to(like)
    swapped = bool(getattr(preprocessor, "_channel_conversion", False))
    return mean, std, swapped, float(getattr(preprocessor, "pad_value", 0))


def _renormalized(pixels: Tensor, samples: Any, student: Any, teacher: Any) -> Tensor:
    """The student's pixels as the teacher's preprocessor would have made them, the padding included."""
    mean, std, swapped, _ = _pixel_coding(student, pixels)
    teacher_mean, teacher_std, teacher_swapped, padding = _pixel_coding(teacher, pixels)
    if swapped == teacher_swapped and torch.equal(mean, teacher_mean) and torch.equal(std, teacher_std):
        return pixels
    raw = pixels * std + mean
    own = ((raw.flip(1) if swapped != teacher_swapped else raw) - teacher_mean) / teacher_std
    for index, sample in enumerate(samples or ()):
        height, width = sample.metainfo.get("img_shape", pixels.shape[-2:])[:2]
        own[index, :, height:] = padding
        own[index, :, :, width:] = padding
    return own
