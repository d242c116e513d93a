"""How each of mmdet's dense heads is taken apart. A new family of heads is one class here.

A head's own ``forward`` runs its predictors, and its own ``loss_by_feat`` makes its losses: each on a
shallow copy of the head, in which the towers hand out features that have passed them already, or in which
``get_targets`` is listened to. Neither the head nor its code is changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from mmdet.models.dense_heads import ATSSHead, FCOSHead, GFLHead, RetinaHead, RTMDetSepBNHead
from torch import Tensor, nn

from crosskd._checks import compute_dtype
from crosskd.head import Block, Branch, Tower, split_tower
from crosskd.methods import recipes
from crosskd.methods.recipes import HeadRecipe
from crosskd.predictions import Assignment, Predictions, mean_over_ranks

__all__ = ["FAMILIES", "HeadFamily", "Locations", "family_of"]


@dataclass(frozen=True, eq=False)
class Locations:
    """Where a batch's predictions stand, the same for all its images.

    Attributes:
        priors: one tensor a level, as the head's prior generator makes them: anchors (anchors, 4), xyxy
            in pixels, or points (points, 2).
        level_sizes: (height, width) of each level's feature map.
        strides: one a row of the priors, shape (anchors,), pixels.
    """

    priors: list[Tensor]
    level_sizes: list[tuple[int, int]]
    strides: Tensor


class HeadFamily:
    """What heads of one kind have in common; this class is right for heads on anchors.

    Attributes:
        head: mmdet's class.
        recipe: the published settings.
        predictors: the predictors' names by branch.
        labels_at: where in what ``get_targets`` returns the labels stand; their weights follow.
        by_level: lists of the head that hold one thing a level.
        settings: attributes of a head that change what its numbers mean, so both heads must share them.
    """

    head: ClassVar[type]
    recipe: ClassVar[HeadRecipe]
    predictors: ClassVar[dict[str, tuple[str, ...]]]
    labels_at: ClassVar[int] = 1
    by_level: ClassVar[tuple[str, ...]] = ("scales",)
    settings: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """The head's name, for messages."""
        return self.head.__name__

    # -- structure ----------------------------------------------------------------------------

    def branches(self, head: Any) -> tuple[Branch, ...]:
        """The classification and the regression branch."""
        return tuple(
            Branch(name, self._towers(head, name), {p: getattr(head, p) for p in names})
            for name, names in self.predictors.items()
        )

    def _towers(self, head: Any, branch: str) -> tuple[Tower, ...]:
        """One tower that all levels share."""
        return (_tower(_convolutions(head, branch), f"{branch} tower", head.in_channels),)

    def own_functions(self) -> tuple[str, ...]:
        """The functions by which a head is taken apart, which a subclass must not have changed."""
        return tuple(f for f in ("forward", "forward_single", "loss", "get_targets") if hasattr(self.head, f))

    def box_coding(self, head: Any) -> dict[str, Any]:
        """What two heads must share for the same numbers to mean the same box."""
        coder = {k: v for k, v in vars(head.bbox_coder).items() if k not in ("clip_border", "use_box_type")}
        return {
            "bbox_coder": (type(head.bbox_coder).__name__, coder),
            **{name: getattr(head, name) for name in self.settings},
        }

    def in_pixels(self, head: Any) -> bool:
        """Whether the same numbers mean the same pixels, whatever the stride."""
        return False

    # -- predictions --------------------------------------------------------------------------

    def predict(self, head: Any, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Runs the head's own forward for one level, its towers replaced by their outputs."""
        outputs = {name: _HandOut(features) for name, features in towers.items()}
        view = _copy(
            head,
            **self.at_level(head, level),
            cls_convs=self._stand_in(outputs["classification"]),
            reg_convs=self._stand_in(outputs["regression"]),
        )
        # In eval mode FCOS gives pixels instead of strides. No layer of the head sees this.
        view.training = True
        # No features: the towers' stand-ins don't look at them.
        return self.as_predictions(head, *view.forward((None,)))

    def at_level(self, head: Any, level: int) -> dict[str, Any]:
        """What a head of one level alone has in place of its lists over all levels."""
        return {name: [getattr(head, name)[level]] for name in self.by_level if hasattr(head, name)}

    def _stand_in(self, outputs: _HandOut) -> list[Any]:
        """What takes a tower's place."""
        return [outputs]

    def as_predictions(
        self, head: Any, logits: Sequence[Tensor], regression: Sequence[Tensor], *quality: Sequence[Tensor]
    ) -> Predictions:
        """Maps (batch, anchors · values, height, width) a level as rows an anchor."""
        rows = _rows(quality[0], 1).squeeze(-1) if quality else None
        return Predictions(_rows(logits, head.cls_out_channels), _rows(regression, 4), rows)

    def as_maps(self, predictions: Predictions, sizes: Sequence[tuple[int, int]]) -> tuple[list[Tensor], ...]:
        """The other way round, as the head's ``loss_by_feat`` takes them."""
        quality = predictions.quality
        rows = [predictions.logits, predictions.regression.flatten(2)]
        return tuple(_maps(r, sizes) for r in (*rows, *([] if quality is None else [quality.unsqueeze(-1)])))

    # -- boxes and assignment -----------------------------------------------------------------

    def locations(self, head: Any, features: Sequence[Tensor]) -> Locations:
        """The priors of feature maps (batch, channels, height, width), by the head's own generator."""
        sizes = [(int(f.shape[-2]), int(f.shape[-1])) for f in features]
        device = features[0].device
        # As the head asks for them itself: it leaves the type out.
        priors = head.prior_generator.grid_priors(sizes, device=device)
        strides = [p.new_full((len(p),), stride) for p, stride in zip(priors, _strides(head), strict=True)]
        return Locations(list(priors), sizes, torch.cat(strides))

    def decode(self, head: Any, predictions: Predictions, locations: Locations) -> Tensor:
        """Boxes of shape (batch, anchors, 4), xyxy in pixels, in float32 at least."""
        regression = predictions.regression.to(compute_dtype(predictions.regression))
        batch = regression.shape[0]
        priors, values = self.decoder_inputs(head, regression, locations)
        priors = priors.to(values.dtype).expand(batch, -1, -1).flatten(0, 1)
        boxes: Tensor = head.bbox_coder.decode(priors, values.flatten(0, 1))
        return boxes.view(batch, -1, 4)

    def decoder_inputs(self, head: Any, regression: Tensor, locations: Locations) -> tuple[Tensor, Tensor]:
        """Priors (anchors, 2 or 4) and values (batch, anchors, 4) as the head's box coder takes them."""
        return torch.cat(locations.priors), regression

    def assignment(self, head: Any, targets: Sequence[Any], batch: int) -> Assignment:
        """What the head's ``get_targets`` returned for a number of images, as the methods need it."""
        labels, weights = (_by_image(targets[at], batch) for at in (self.labels_at, self.labels_at + 1))
        positive = (labels >= 0) & (labels < head.num_classes)
        positives = positive.sum(dim=1).clamp(min=1).sum().float()
        return Assignment((weights > 0).float(), positive, mean_over_ranks(positives))

    def losses(
        self, head: Any, maps: tuple[list[Tensor], ...], truth: tuple[Any, ...]
    ) -> tuple[dict[str, Any], Assignment]:
        """The head's own losses, and the assignment that it made on the way.

        Args:
            head: the student's.
            maps: its predictions, as `as_maps` gives them.
            truth: instances, image metas and ignored instances, as ``loss_by_feat`` takes them.
        """
        noted: list[Any] = []

        def note(*arguments: Any, **named: Any) -> Any:
            noted.append(head.get_targets(*arguments, **named))
            return noted[-1]

        losses = _copy(head, get_targets=note).loss_by_feat(*maps, *truth)
        if len(noted) != 1 or noted[0] is None:
            raise ValueError(
                f"student: {type(head).__name__}.loss_by_feat called get_targets {len(noted)} times instead "
                "of once, or no anchor lay inside the images, so the label assignment can't be shared: "
                "write an adapter for this head (crosskd.adapters.Adapter) and pass it as adapter="
            )
        return dict(losses), self.assignment(head, noted[0], batch=len(maps[0][0]))


class RetinaNetFamily(HeadFamily):
    """mmdet's ``RetinaHead``."""

    head = RetinaHead
    recipe = recipes.RETINANET
    predictors: ClassVar = {"classification": ("retina_cls",), "regression": ("retina_reg",)}
    labels_at = 0
    by_level = ()


class ATSSFamily(HeadFamily):
    """mmdet's ``ATSSHead``."""

    head = ATSSHead
    recipe = recipes.ATSS
    predictors: ClassVar = {"classification": ("atss_cls",), "regression": ("atss_reg", "atss_centerness")}


class GFLFamily(HeadFamily):
    """mmdet's ``GFLHead``: a distribution over each side, in strides."""

    head = GFLHead
    recipe = recipes.GFL
    predictors: ClassVar = {"classification": ("gfl_cls",), "regression": ("gfl_reg",)}
    settings = ("reg_max",)

    def as_predictions(self, head: Any, *maps: Sequence[Tensor]) -> Predictions:
        """The sides' distributions have a dimension of their own."""
        logits, sides = maps
        bins = head.reg_max + 1
        rows = _rows(sides, 4 * bins)
        regression = rows.view(*rows.shape[:2], 4, bins)
        return Predictions(_rows(logits, head.cls_out_channels), regression, quality=None)

    def decoder_inputs(self, head: Any, regression: Tensor, locations: Locations) -> tuple[Tensor, Tensor]:
        """The distributions' means, from the anchors' centres."""
        sides = head.integral(regression).view(*regression.shape[:2], 4)
        return head.anchor_center(torch.cat(locations.priors)), sides * locations.strides[:, None]


class FCOSFamily(HeadFamily):
    """mmdet's ``FCOSHead``, whose losses are normalised by the sum of centerness targets."""

    head = FCOSHead
    recipe = recipes.FCOS
    predictors: ClassVar = {"classification": ("conv_cls",), "regression": ("conv_reg", "conv_centerness")}
    by_level = ("scales", "strides")
    settings = ("norm_on_bbox",)

    def in_pixels(self, head: Any) -> bool:
        """Unless the head normalises them."""
        return not head.norm_on_bbox

    def decoder_inputs(self, head: Any, regression: Tensor, locations: Locations) -> tuple[Tensor, Tensor]:
        """Distances from the points, in strides where the head normalises them."""
        scale = locations.strides[:, None] if head.norm_on_bbox else 1
        return torch.cat(locations.priors), regression * scale

    def assignment(self, head: Any, targets: Sequence[Any], batch: int) -> Assignment:
        """All points count; their distances tell the centerness that the published loss is divided by."""
        labels, distances = targets
        positive = [(level >= 0) & (level < head.num_classes) for level in labels]
        total = head.centerness_target(torch.cat(distances)[torch.cat(positive)]).sum()
        # At least 1: on a batch without objects the published 1e-6 makes the loss a million times larger.
        return Assignment(None, _by_image(positive, batch), mean_over_ranks(total).clamp(min=1))


class RTMDetFamily(HeadFamily):
    """mmdet's ``RTMDetSepBNHead``: a tower and predictors for each level, distances in pixels."""

    head = RTMDetSepBNHead
    # Nothing is published for it: half of its two blocks, and the losses that RetinaNet's boxes have.
    recipe = HeadRecipe("RTMDet", 1, cls_weight=1.0, reg_weight=1.0, regression="giou")
    predictors: ClassVar = {"classification": ("rtm_cls",), "regression": ("rtm_reg",)}
    by_level = ("rtm_cls", "rtm_reg", "rtm_obj")
    settings = ("exp_on_reg", "with_objectness")

    def _towers(self, head: Any, branch: str) -> tuple[Tower, ...]:
        levels = enumerate(_convolutions(head, branch))
        return tuple(_tower(level, f"{branch} tower of level {n}", head.in_channels) for n, level in levels)

    def in_pixels(self, head: Any) -> bool:
        """The head multiplies what its predictor gives by the stride."""
        return True

    def at_level(self, head: Any, level: int) -> dict[str, Any]:
        """The strides stand in the prior generator."""
        priors = copy.copy(head.prior_generator)
        priors.strides = [priors.strides[level]]
        return {**super().at_level(head, level), "prior_generator": priors}

    def _stand_in(self, outputs: _HandOut) -> list[Any]:
        return [[outputs]]


FAMILIES: tuple[HeadFamily, ...] = (
    GFLFamily(),
    ATSSFamily(),
    RetinaNetFamily(),
    FCOSFamily(),
    RTMDetFamily(),
)


def family_of(head: nn.Module) -> HeadFamily | None:
    """The family whose class a head is nearest to: mmdet derives RTMDet's head from ATSS's."""
    fitting = [family for family in FAMILIES if isinstance(head, family.head)]
    return max(fitting, key=lambda family: len(family.head.__mro__), default=None)


class ConvBody(nn.Module):
    """An mmcv ``ConvModule`` without its activation, run by its own forward."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, features: Tensor) -> Tensor:
        """Convolution and normalisation."""
        body: Tensor = self.module(features, activate=False)
        return body


class _HandOut:
    """Stands in for a tower: gives its output, whatever it is called with."""

    def __init__(self, output: Tensor) -> None:
        self.output = output

    def __call__(self, features: Any) -> Tensor:
        return self.output


def _copy(head: Any, **replaced: Any) -> Any:
    """A shallow copy of a head with some of its modules or functions replaced; the head stays as it is."""
    view = copy.copy(head)
    modules = {name: replaced.pop(name, module) for name, module in head._modules.items()}
    view.__dict__.update(replaced, _modules=modules)
    return view


def _convolutions(head: Any, branch: str) -> Any:
    return head.cls_convs if branch == "classification" else head.reg_convs


def _tower(modules: Iterable[nn.Module], name: str, width_in: int) -> Tower:
    return Tower(name, tuple(_block(module) for module in modules), width_in)


def _block(module: nn.Module) -> Block:
    """One of mmcv's convolutions with its normalisation and activation."""
    if isinstance(module, ConvModule) and module.with_activation and module.order[-1] == "act":
        return Block((ConvBody(module),), module.activate)
    if isinstance(module, DepthwiseSeparableConvModule):
        return Block((module,), _block(module.pointwise_conv).activation, opaque=True)
    return split_tower([module])[0]


def _strides(head: Any) -> list[int]:
    """Pixels between neighbouring locations, a level."""
    return [int(stride[0]) for stride in head.prior_generator.strides]


def _rows(maps: Sequence[Tensor], values: int) -> Tensor:
    """Maps (batch, anchors · values, height, width) as rows (batch, all anchors, values)."""
    return torch.cat([m.permute(0, 2, 3, 1).reshape(len(m), -1, values) for m in maps], dim=1)


def _maps(rows: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Rows (batch, all anchors, values) as maps (batch, anchors · values, height, width)."""
    anchors = rows.shape[1] // sum(height * width for height, width in sizes)
    levels = torch.split(rows, [height * width * anchors for height, width in sizes], dim=1)
    return [
        level.reshape(len(level), *size, -1).permute(0, 3, 1, 2)
        for level, size in zip(levels, sizes, strict=True)
    ]


def _by_image(levels: Sequence[Tensor], batch: int) -> Tensor:
    """Values that stand image after image within each level, as (batch, anchors)."""
    return torch.cat([level.reshape(batch, -1) for level in levels], dim=1)
