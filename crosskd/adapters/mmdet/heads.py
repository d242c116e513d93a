"""Heads of mmdet's one-stage detectors. A new family of heads is one class here.

A head's own ``forward`` runs its predictors, its own ``loss_by_feat`` makes its losses, and its own
``get_targets`` assigns labels. They run on the head itself; while they do, the towers hand out features that
have passed them already, or what ``get_targets`` returns is recorded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from mmdet.models.dense_heads import ATSSHead, FCOSHead, GFLHead, RetinaHead, RTMDetSepBNHead
from mmdet.models.dense_heads.anchor_head import AnchorHead
from mmdet.models.utils import unpack_gt_instances
from mmdet.structures.bbox import get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor, nn

from crosskd._checks import compute_dtype
from crosskd.adapters.base import Anchors, Batch, Head
from crosskd.adapters.replacing import replaced
from crosskd.predictions import Assignment, Predictions, positives_of_teacher
from crosskd.towers import Block, Branch, Tower, split_tower

__all__ = ["ATSS", "FCOS", "GFL", "HEADS", "MMDetHead", "RTMDet", "RetinaNet", "head_class_of"]


class MMDetHead(Head):
    """What mmdet's dense heads have in common; right as it is for heads on anchors.

    Args:
        module: the detector's ``bbox_head``.

    Attributes:
        module: the same.
        mmdet_class: which of mmdet's classes a family is made for.
        predictors: names of the predictors, by branch.
        labels_at: where in what ``get_targets`` returns the labels stand; their weights follow.
        per_level: lists of the module that hold one thing per level.

    Raises:
        ValueError: a head without the towers or predictors that this family has, or one whose classes share a
            softmax.
    """

    mmdet_class: ClassVar[type]
    predictors: ClassVar[dict[str, tuple[str, ...]]]
    labels_at: ClassVar[int] = 1
    per_level: ClassVar[tuple[str, ...]] = ("scales",)

    def __init__(self, module: Any) -> None:
        predictors = [name for names in self.predictors.values() for name in names]
        missing = [name for name in ("cls_convs", "reg_convs", *predictors) if not hasattr(module, name)]
        if missing:
            raise ValueError(
                f"a {type(module).__name__} has no {', '.join(missing)}, of which a "
                f"{self.mmdet_class.__name__} consists: write an adapter for it (docs/adapters.md)"
            )
        if not module.use_sigmoid_cls:
            raise ValueError(
                f"{type(module).__name__} predicts classes by a softmax, but mmdet's adapter is made for a "
                "sigmoid per class: use a classification loss with use_sigmoid=True"
            )
        self.module = module
        self.num_classes = int(module.num_classes)
        self.strides = tuple(int(stride[0]) for stride in module.prior_generator.strides)
        branches = []
        for name, names in self.predictors.items():
            convolutions = module.cls_convs if name == "classification" else module.reg_convs
            towers = self.towers(convolutions, f"{name} tower")
            branches.append(Branch(name, towers, {p: getattr(module, p) for p in names}))
        self.branches = tuple(branches)

    def towers(self, convolutions: Any, title: str) -> tuple[Tower, ...]:
        """One tower that all levels share."""
        return (Tower(title, _blocks(convolutions), self.module.in_channels),)

    # -- predictions --------------------------------------------------------------------------

    def predict(self, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Runs the head's own forward for one level, its towers replaced by their outputs."""
        changed = self.of_one_level(level)
        changed["cls_convs"] = self.stand_in(_Output(towers["classification"]))
        changed["reg_convs"] = self.stand_in(_Output(towers["regression"]))
        # In eval mode FCOS gives pixels instead of strides. No layer of the head sees this.
        with replaced(self.module, training=True, **changed):
            # No features: what stands in for the towers doesn't look at them.
            return self.as_predictions(*self.module.forward((None,)))

    def of_one_level(self, level: int) -> dict[str, Any]:
        """What a head of one level alone has in place of its lists over all levels."""
        return {
            name: [getattr(self.module, name)[level]] for name in self.per_level if hasattr(self.module, name)
        }

    def stand_in(self, output: Any) -> list[Any]:
        """What takes the place of a tower's convolutions."""
        return [output]

    def as_predictions(
        self, logits: Sequence[Tensor], regression: Sequence[Tensor], *quality: Sequence[Tensor]
    ) -> Predictions:
        """One map (batch, anchors * values, height, width) per level as rows, one per anchor."""
        rows = _rows(quality[0], 1).squeeze(-1) if quality else None
        return Predictions(_rows(logits, self.num_classes), _rows(regression, 4), rows)

    def as_maps(self, predictions: Predictions, sizes: Sequence[tuple[int, ...]]) -> list[list[Tensor]]:
        """The other way round, as the head's ``loss_by_feat`` takes them."""
        rows = [predictions.logits, predictions.regression.flatten(2)]
        if predictions.quality is not None:
            rows.append(predictions.quality.unsqueeze(-1))
        return [_maps(each, sizes) for each in rows]

    # -- boxes --------------------------------------------------------------------------------

    def anchors(self, batch: Batch, maps: Sequence[Tensor]) -> Anchors:
        """The head's own priors: anchors, or points."""
        sizes = tuple((int(m.shape[-2]), int(m.shape[-1])) for m in maps)
        # As the head asks for them itself: it leaves the type out.
        levels = self.module.prior_generator.grid_priors(list(sizes), device=maps[0].device)
        priors = [get_box_tensor(level) for level in levels]
        strides = [p.new_full((len(p),), stride) for p, stride in zip(priors, self.strides, strict=True)]
        per_level = tuple(len(level) for level in priors)
        return Anchors(torch.cat(priors), per_level, strides=torch.cat(strides), sizes=sizes)

    def decode(self, predictions: Predictions, anchors: Anchors) -> Tensor:
        """Boxes by the head's own coder, in float32 at least."""
        regression = predictions.regression.to(compute_dtype(predictions.regression))
        batch = len(regression)
        priors, values = self.coder_inputs(regression, anchors)
        priors = priors.to(values.dtype).expand(batch, -1, -1).flatten(0, 1)
        boxes: Tensor = get_box_tensor(self.module.bbox_coder.decode(priors, values.flatten(0, 1)))
        return boxes.view(batch, -1, 4)

    def coder_inputs(self, regression: Tensor, anchors: Anchors) -> tuple[Tensor, Tensor]:
        """Priors (anchors, 2 or 4) and values (batch, anchors, 4) as the head's box coder takes them."""
        assert anchors.boxes is not None
        return anchors.boxes, regression

    # -- losses and label assignment ----------------------------------------------------------

    def losses(
        self, predictions: Predictions, anchors: Anchors, batch: Batch
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The head's own ``loss_by_feat``, and the assignment that it makes on the way.

        Losses of several levels are summed as mmengine sums them.
        """
        instances, ignored, metas = unpack_gt_instances(batch.targets)
        recorded: list[Any] = []
        get_targets = self.module.get_targets

        def record(*arguments: Any, **named: Any) -> Any:
            recorded.append(get_targets(*arguments, **named))
            return recorded[-1]

        maps = self.as_maps(predictions, anchors.sizes)
        with replaced(self.module, get_targets=record):
            losses = self.module.loss_by_feat(*maps, instances, metas, ignored)
        if len(recorded) != 1 or recorded[0] is None:
            raise ValueError(
                f"student: {type(self.module).__name__}.loss_by_feat called get_targets {len(recorded)} "
                "times instead of once, or no anchor lay inside the images, so the label assignment can't be "
                "shared: write an adapter for this head (docs/adapters.md)"
            )
        return summed(losses), self.assignment(recorded[0], anchors, len(instances))

    def assign(self, predictions: Predictions, anchors: Anchors, batch: Batch) -> Assignment:
        """What the head's own ``get_targets`` makes of a batch's `Objects`."""
        self.require_assigner("teacher")
        assert batch.objects is not None
        # Where classes are unknown any will do: these assigners look at places alone.
        instances = [InstanceData(bboxes=o.boxes, labels=o.labels.clamp(min=0)) for o in batch.objects]
        targets = self.targets(predictions, anchors, batch, instances)
        return self.assignment(targets, anchors, len(instances))

    def require_assigner(self, side: str) -> None:
        """Raises ``ValueError`` for a head that can't assign labels."""
        if isinstance(self.module, AnchorHead) and not self.module.train_cfg:
            raise ValueError(
                f"the {side}'s {type(self.module).__name__} was built without a train_cfg, so it can't "
                "assign labels: build it with the train_cfg of its config"
            )

    def targets(
        self, predictions: Predictions, anchors: Anchors, batch: Batch, instances: list[Any]
    ) -> Sequence[Any]:
        """What the head's ``get_targets`` returns for objects in mmdet's form, one item per image."""
        assert anchors.boxes is not None
        metas = batch.extra
        priors, inside = self.module.get_anchors(list(anchors.sizes), metas, device=anchors.boxes.device)
        targets: Sequence[Any] = self.module.get_targets(priors, inside, instances, metas)
        return targets

    def assignment(self, targets: Sequence[Any], anchors: Anchors, images: int) -> Assignment:
        """What ``get_targets`` returned for a number of images, as methods need it."""
        labels, weights = (
            self.per_image(targets[at], anchors, images) for at in (self.labels_at, self.labels_at + 1)
        )
        positive = self.positive(labels)
        positives = positive.sum(dim=1).clamp(min=1).sum().float()
        return Assignment((weights > 0).float(), positive, positives)

    def positive(self, labels: Tensor) -> Tensor:
        """Which labels are a class of objects."""
        if labels.is_floating_point():
            raise ValueError(self._unknown_targets(f"labels of type {labels.dtype}"))
        return (labels >= 0) & (labels < self.num_classes)

    def per_image(self, levels: Sequence[Tensor], anchors: Anchors, images: int) -> Tensor:
        """Values that stand image after image within each level, as (batch, anchors)."""
        counts = [level.numel() for level in levels]
        expected = [images * count for count in anchors.per_level]
        if counts != expected:
            raise ValueError(self._unknown_targets(f"{counts} values per level instead of {expected}"))
        return torch.cat([level.reshape(images, -1) for level in levels], dim=1)

    def _unknown_targets(self, what: str) -> str:
        return (
            f"{type(self.module).__name__}.get_targets returns something else than that of a "
            f"{self.mmdet_class.__name__}, {what}, so the label assignment can't be read off it: write an "
            "adapter for this head (docs/adapters.md)"
        )


class RetinaNet(MMDetHead):
    """mmdet's ``RetinaHead``."""

    head_type = "RetinaNet"
    mmdet_class = RetinaHead
    predictors: ClassVar = {"classification": ("retina_cls",), "regression": ("retina_reg",)}
    labels_at = 0
    per_level = ()


class ATSS(MMDetHead):
    """mmdet's ``ATSSHead``."""

    head_type = "ATSS"
    mmdet_class = ATSSHead
    predictors: ClassVar = {"classification": ("atss_cls",), "regression": ("atss_reg", "atss_centerness")}


class GFL(MMDetHead):
    """mmdet's ``GFLHead``: a distribution over each side, in strides."""

    head_type = "GFL"
    mmdet_class = GFLHead
    predictors: ClassVar = {"classification": ("gfl_cls",), "regression": ("gfl_reg",)}

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.bins = int(module.reg_max) + 1

    def as_predictions(
        self, logits: Sequence[Tensor], regression: Sequence[Tensor], *quality: Sequence[Tensor]
    ) -> Predictions:
        """The sides' distributions have a dimension of their own."""
        rows = _rows(regression, 4 * self.bins)
        sides = rows.view(*rows.shape[:2], 4, self.bins)
        return Predictions(_rows(logits, self.num_classes), sides, quality=None)

    def coder_inputs(self, regression: Tensor, anchors: Anchors) -> tuple[Tensor, Tensor]:
        """The distributions' means, from the anchors' centres."""
        assert anchors.strides is not None
        sides = self.module.integral(regression).view(*regression.shape[:2], 4)
        return self.module.anchor_center(anchors.boxes), sides * anchors.strides[:, None]


class FCOS(MMDetHead):
    """mmdet's ``FCOSHead``, whose losses are normalized by the sum of centerness targets."""

    head_type = "FCOS"
    mmdet_class = FCOSHead
    predictors: ClassVar = {"classification": ("conv_cls",), "regression": ("conv_reg", "conv_centerness")}
    per_level = ("scales", "strides")

    def coder_inputs(self, regression: Tensor, anchors: Anchors) -> tuple[Tensor, Tensor]:
        """Distances from the points, in strides where the head normalizes them."""
        assert anchors.boxes is not None
        assert anchors.strides is not None
        scale = anchors.strides[:, None] if self.module.norm_on_bbox else 1
        return anchors.boxes, regression * scale

    def targets(
        self, predictions: Predictions, anchors: Anchors, batch: Batch, instances: list[Any]
    ) -> Sequence[Any]:
        """Points have no border that they could lie beyond."""
        assert anchors.boxes is not None
        points = torch.split(anchors.boxes, list(anchors.per_level))
        targets: Sequence[Any] = self.module.get_targets(points, instances)
        return targets

    def assignment(self, targets: Sequence[Any], anchors: Anchors, images: int) -> Assignment:
        """All points count; their distances give the centerness that the published loss is divided by."""
        labels, distances = targets[0], targets[1]
        positive = self.positive(self.per_image(labels, anchors, images))
        at = self.positive(torch.cat(list(labels)))
        total = self.module.centerness_target(torch.cat(list(distances))[at]).sum()
        # At least 1: on a batch without objects the published 1e-6 makes the loss a million times larger.
        return Assignment(None, positive, total.clamp(min=1))

    def assign_unlabelled(self, predictions: Predictions, threshold: float) -> Assignment:
        """The teacher's confident points, whose predicted centerness is summed."""
        return positives_of_teacher(predictions, threshold, sum_quality=True)


class RTMDet(MMDetHead):
    """mmdet's ``RTMDetSepBNHead``: a tower and predictors for each level, distances in pixels."""

    head_type = "RTMDet"
    mmdet_class = RTMDetSepBNHead
    predictors: ClassVar = {"classification": ("rtm_cls",), "regression": ("rtm_reg",)}
    per_level = ("rtm_cls", "rtm_reg", "rtm_obj")

    def towers(self, convolutions: Any, title: str) -> tuple[Tower, ...]:
        """One tower per level."""
        width = self.module.in_channels
        return tuple(
            Tower(f"{title} of level {level}", _blocks(blocks), width)
            for level, blocks in enumerate(convolutions)
        )

    def of_one_level(self, level: int) -> dict[str, Any]:
        """The strides stand in the prior generator."""
        priors = copy.copy(self.module.prior_generator)
        priors.strides = [priors.strides[level]]
        return {**super().of_one_level(level), "prior_generator": priors}

    def stand_in(self, output: Any) -> list[Any]:
        """The convolutions stand in one list per level."""
        return [[output]]

    def targets(
        self, predictions: Predictions, anchors: Anchors, batch: Batch, instances: list[Any]
    ) -> Sequence[Any]:
        """The assigner looks at classes and predictions of all levels, besides places."""
        assert anchors.boxes is not None
        assert batch.objects is not None
        if any(bool((o.labels < 0).any()) for o in batch.objects):
            raise ValueError(
                f"the teacher's {type(self.module).__name__} assigns labels by classes, but which of its "
                f"{self.num_classes} classes the objects are is unknown: give class_map=, the teacher's "
                "class for each of the student's, or take a teacher with the student's classes or head"
            )
        rows, expected = predictions.logits.shape[1], sum(anchors.per_level)
        if rows != expected:
            raise ValueError(
                f"the teacher's {type(self.module).__name__} assigns labels by its predictions of all "
                f"levels, {expected} rows, but {rows} are compared with the student's: take a student of the "
                f"same strides, {list(self.strides)}, or with the same head and anchors, whose own "
                "assignment is used"
            )
        device, metas = anchors.boxes.device, batch.extra
        priors, inside = self.module.get_anchors(list(anchors.sizes), metas, device=device)
        boxes = self.decode(predictions, anchors)
        targets = self.module.get_targets(predictions.logits, boxes, priors, inside, instances, metas)
        if targets is None:
            raise ValueError(f"teacher: no anchor of {type(self.module).__name__} lies inside the images")
        found: Sequence[Any] = targets
        return found


HEADS: tuple[type[MMDetHead], ...] = (GFL, ATSS, RetinaNet, FCOS, RTMDet)


def head_class_of(module: nn.Module) -> type[MMDetHead] | None:
    """The family whose class a head is nearest to: mmdet derives RTMDet's head from ATSS's."""
    fitting = [family for family in HEADS if isinstance(module, family.mmdet_class)]
    return max(fitting, key=lambda family: len(family.mmdet_class.__mro__), default=None)


def summed(losses: Mapping[str, Any]) -> dict[str, Tensor]:
    """Losses, some of them lists of one per level, as mmengine's ``parse_losses`` adds them up."""
    total = {}
    for name, loss in losses.items():
        means = [level.mean() for level in ([loss] if isinstance(loss, Tensor) else loss)]
        total[name] = sum(means[1:], means[0])  # one by one: another order may round the last bit otherwise
    return total


class _ConvBody(nn.Module):
    """An mmcv ``ConvModule`` without its activation, run by its own forward."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, features: Tensor) -> Tensor:
        """Convolution and normalisation."""
        body: Tensor = self.module(features, activate=False)
        return body


class _Output:
    """Stands in for a tower: gives its output, whatever it is called with."""

    def __init__(self, output: Tensor) -> None:
        self.output = output

    def __call__(self, features: Any) -> Tensor:
        return self.output


def _blocks(modules: Iterable[nn.Module]) -> tuple[Block, ...]:
    return tuple(_block(module) for module in modules)


def _block(module: nn.Module) -> Block:
    """One of mmcv's convolutions with its normalisation and activation."""
    if isinstance(module, ConvModule) and module.with_activation and module.order[-1] == "act":
        return Block((_ConvBody(module),), module.activate)
    if isinstance(module, DepthwiseSeparableConvModule):
        return Block((module,), _block(module.pointwise_conv).activation, opaque=True)
    return split_tower([module])[0]


def _rows(maps: Sequence[Tensor], values: int) -> Tensor:
    """Maps (batch, anchors * values, height, width) as rows (batch, all anchors, values)."""
    return torch.cat([m.permute(0, 2, 3, 1).reshape(len(m), -1, values) for m in maps], dim=1)


def _maps(rows: Tensor, sizes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Rows (batch, all anchors, values) as maps (batch, anchors * values, height, width)."""
    anchors = rows.shape[1] // sum(height * width for height, width in sizes)
    levels = torch.split(rows, [height * width * anchors for height, width in sizes], dim=1)
    return [
        level.reshape(len(level), *size, -1).permute(0, 3, 1, 2)
        for level, size in zip(levels, sizes, strict=True)
    ]
