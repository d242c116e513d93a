"""What GFL and ATSS share: two towers over a feature pyramid, square anchors, how detections are chosen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import batched_nms, clip_boxes_to_image
from torchvision.ops.misc import Conv2dNormActivation

from crosskd.predictions import mean_over_ranks
from dense_heads.assignment import BACKGROUND, assign

STRIDES = (8, 16, 32, 64, 128)
# An anchor in the padding of the batch: it is neither an object nor background.
OUTSIDE = -2
_BATCH_STRIDE = 32

Target = dict[str, Tensor]


class Outputs(NamedTuple):
    """What the head predicts, all levels one behind the other.

    Attributes:
        logits: shape (batch, anchors, classes).
        regression: shape (batch, anchors, 4), or (batch, anchors, 4, bins) for distributions.
        centerness: shape (batch, anchors), logits; ``None`` where the head predicts none.
    """

    logits: Tensor
    regression: Tensor
    centerness: Tensor | None = None

    def widened(self) -> Outputs:
        """The same in float32 at least: losses and boxes are not for half precision."""
        return Outputs(*(x if x is None or x.dtype == torch.float64 else x.float() for x in self))


@dataclass(frozen=True, eq=False)
class Grid:
    """Where a batch's predictions stand.

    Attributes:
        anchors: shape (anchors, 4), xyxy in resized pixels, the same for all images.
        strides: shape (anchors,), pixels between an anchor and its neighbour.
        level_sizes: anchors a level.
        inside: shape (batch, anchors), false where an anchor's centre lies in the padding.
    """

    anchors: Tensor
    strides: Tensor
    level_sizes: list[int]
    inside: Tensor

    @property
    def centers(self) -> Tensor:
        """The anchors' centres, shape (anchors, 2), xy in resized pixels."""
        return (self.anchors[:, :2] + self.anchors[:, 2:]) / 2


class Positives(NamedTuple):
    """The anchors of a batch that are responsible for an object, one row each.

    Attributes:
        image: shape (positives,), whose anchor it is.
        anchor: shape (positives,), which.
        labels: shape (positives,), the object's class.
        boxes: shape (positives, 4), the object's box, xyxy in resized pixels.
    """

    image: Tensor
    anchor: Tensor
    labels: Tensor
    boxes: Tensor


class DenseHead(nn.Module):
    """Two towers of convolution, group norm and ReLU, and the predictors behind them.

    Args:
        width: channels of the feature maps and towers, a multiple of 32.
        num_classes: how many classes there are.
        levels: how many feature maps, each with a scale of its own for the regression.
        bins: of the distribution that each side is predicted as; ``None`` for plain numbers.
        centerness: whether centerness is predicted, too.
        blocks: convolutions a tower.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        levels: int,
        *,
        bins: int | None = None,
        centerness: bool = False,
        blocks: int = 4,
    ) -> None:
        super().__init__()
        block = partial(Conv2dNormActivation, width, width, norm_layer=partial(nn.GroupNorm, 32))
        predictor = partial(nn.Conv2d, width, kernel_size=3, padding=1)
        self.bins = bins
        self.classification_tower = nn.Sequential(*(block() for _ in range(blocks)))
        self.regression_tower = nn.Sequential(*(block() for _ in range(blocks)))
        self.logits = predictor(out_channels=num_classes)
        self.regression = predictor(out_channels=4 * (bins or 1))
        self.centerness = predictor(out_channels=1) if centerness else None
        self.scales = nn.ParameterList(torch.ones(()) for _ in range(levels))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.logits.bias, torch.tensor(0.01).logit().item())  # all is background at first

    def forward(self, features: Sequence[Tensor]) -> Outputs:
        """Predictions for feature maps (batch, width, height, width), finest first."""
        levels = [
            self.predict(level, self.classification_tower(f), self.regression_tower(f))
            for level, f in enumerate(features)
        ]
        values = zip(*levels, strict=True)
        return Outputs(*(None if parts[0] is None else torch.cat(parts, dim=1) for parts in values))

    def predict(self, level: int, classification: Tensor, regression: Tensor) -> Outputs:
        """Runs the predictors on the towers' outputs (batch, width, height, width) of one level."""
        sides = _as_rows(self.scales[level] * self.regression(regression))
        return Outputs(
            _as_rows(self.logits(classification)),
            sides if self.bins is None else sides.unflatten(-1, (4, self.bins)),
            None if self.centerness is None else _as_rows(self.centerness(regression)).squeeze(-1),
        )


def _as_rows(feature_map: Tensor) -> Tensor:
    """A map (batch, channels, height, width) as (batch, anchors, channels)."""
    return feature_map.flatten(2).transpose(1, 2)  # ONNX has no mT


class DenseDetector(nn.Module, ABC):
    """A detector with one square anchor a location; called as torchvision's detectors are.

    In training ``detector(images, targets)`` returns a dict of losses, in eval ``detector(images)`` a
    dict of ``boxes``, ``scores`` and ``labels`` an image. Images are tensors (3, height, width) with values
    from 0 to 1, targets dicts of ``boxes`` (objects, 4), xyxy in pixels, and ``labels`` from 0.

    Args:
        backbone: gives an ordered dict of feature maps, finest first; ``out_channels`` wide.
        head: a `DenseHead`.
        strides: pixels between locations, a level.
        anchor_scale: side of the anchors, in strides.
        center_offset: of the first location from the image's corner, in strides.
        min_size: images are resized to this short side; several for scale jitter, the last in eval.
        max_size: but their longer side is at most this.
        score_thresh: detections are at least this sure.
        topk_candidates: detections a level before non-maximum suppression.
        nms_thresh: two detections that overlap more than this are one.
        detections_per_img: at most this many.
    """

    def __init__(
        self,
        backbone: Any,
        head: DenseHead,
        *,
        strides: Sequence[int] = STRIDES,
        anchor_scale: float = 8.0,
        center_offset: float = 0.0,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        score_thresh: float = 0.05,
        topk_candidates: int = 1000,
        nms_thresh: float = 0.6,
        detections_per_img: int = 100,
    ) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.strides, self.anchor_scale, self.center_offset = tuple(strides), anchor_scale, center_offset
        # Images as ImageNet's backbones know them; batches padded to a multiple of 32.
        mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        self.transform = GeneralizedRCNNTransform(min_size, max_size, mean, deviation, _BATCH_STRIDE)
        self.score_thresh, self.topk_candidates = score_thresh, topk_candidates
        self.nms_thresh, self.detections_per_img = nms_thresh, detections_per_img

    @property
    def num_classes(self) -> int:
        """How many classes there are, labelled from 0."""
        return int(self.head.logits.out_channels)

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> Any:
        """Losses in training, detections in eval."""
        if self.training and targets is None:
            raise ValueError("targets are needed in training")
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        batch, targets = self.transform(images, targets)
        features = list(self.backbone(batch.tensors).values())
        self.check_strides(batch, features)
        outputs, grid = self.head(features), self.grid(batch, features)
        if self.training:
            return self.losses(outputs, grid, self.match(grid, targets), targets)
        detections = self.detections(outputs, grid, batch.image_sizes)
        return self.transform.postprocess(detections, batch.image_sizes, original_sizes)

    # -- what a family adds -------------------------------------------------------------------

    @abstractmethod
    def decode(self, regression: Tensor, grid: Grid) -> Tensor:
        """Boxes (batch, anchors, 4), xyxy in resized pixels, of the head's regression."""

    @abstractmethod
    def losses(
        self, outputs: Outputs, grid: Grid, matches: Tensor, targets: list[Target]
    ) -> dict[str, Tensor]:
        """The losses by name.

        Args:
            outputs: what the head predicted.
            grid: where.
            matches: shape (batch, anchors), what `match` answered.
            targets: in resized pixels.
        """

    # -- anchors ------------------------------------------------------------------------------

    def check_strides(self, batch: ImageList, features: Sequence[Tensor]) -> None:
        """Raises ``ValueError`` for feature maps of other strides than the detector's."""
        sizes = [tuple(feature_map.shape[-2:]) for feature_map in features]
        height, width = batch.tensors.shape[-2:]
        expected = [(-(-height // stride), -(-width // stride)) for stride in self.strides]
        if sizes != expected:
            raise ValueError(
                f"strides {self.strides} need feature maps of {expected} for an image of "
                f"{(height, width)}, the backbone gives {sizes}"
            )

    def grid(self, batch: ImageList, features: Sequence[Tensor]) -> Grid:
        """The anchors of a batch: squares around points ``stride`` apart, the first in or near the corner."""
        sizes = [tuple(feature_map.shape[-2:]) for feature_map in features]
        device = batch.tensors.device
        centers, strides = [], []
        for (rows, columns), stride in zip(sizes, self.strides, strict=True):
            y, x = torch.meshgrid(
                *(stride * (torch.arange(n, device=device) + self.center_offset) for n in (rows, columns)),
                indexing="ij",
            )
            centers.append(torch.stack([x, y], dim=-1).flatten(0, 1).float())
            strides.append(torch.full((rows * columns,), float(stride), device=device))
        points, spacing = torch.cat(centers), torch.cat(strides)
        half = self.anchor_scale / 2 * spacing[:, None]
        # An image's own pixels, up to the next multiple that it would be padded to by itself.
        own = torch.tensor(batch.image_sizes, device=device).flip(-1)
        own = (own + _BATCH_STRIDE - 1) // _BATCH_STRIDE * _BATCH_STRIDE  # (batch, 2), width and height
        inside = (points < own[:, None]).all(dim=-1)
        anchors = torch.cat([points - half, points + half], dim=-1)
        return Grid(anchors, spacing, [rows * columns for rows, columns in sizes], inside)

    @torch.no_grad()
    def match(self, grid: Grid, targets: list[Target]) -> Tensor:
        """The index of each anchor's object, or ``BACKGROUND`` or ``OUTSIDE``, shape (batch, anchors)."""
        matches = torch.full(grid.inside.shape, OUTSIDE, device=grid.inside.device)
        for image, (inside, target) in enumerate(zip(grid.inside, targets, strict=True)):
            sizes = [int(level.sum()) for level in inside.split(grid.level_sizes)]
            matches[image, inside] = assign(grid.anchors[inside], sizes, target["boxes"].float())
        return matches

    @staticmethod
    def positives(matches: Tensor, targets: list[Target]) -> Positives:
        """The anchors that are responsible for an object, and their objects."""
        image, anchor = (matches > BACKGROUND).nonzero(as_tuple=True)
        counts = torch.tensor([0, *(len(target["labels"]) for target in targets)], device=matches.device)
        row = counts.cumsum(0)[image] + matches[image, anchor]
        labels, boxes = (torch.cat([target[key] for target in targets])[row] for key in ("labels", "boxes"))
        return Positives(image, anchor, labels, boxes)

    @staticmethod
    def normalizer(matches: Tensor) -> Tensor:
        """The number of positive anchors, an image without any counting as 1, averaged over processes."""
        return mean_over_ranks((matches > BACKGROUND).sum(dim=1).clamp(min=1).sum().float())

    # -- detections ---------------------------------------------------------------------------

    def detections(
        self, outputs: Outputs, grid: Grid, image_sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """The detections of each image, boxes in resized pixels."""
        outputs = outputs.widened()
        boxes, scores = self.decode(outputs.regression, grid), outputs.logits.sigmoid()
        centerness = [None] * len(boxes) if outputs.centerness is None else outputs.centerness.sigmoid()
        return [
            self._chosen(*image, grid.level_sizes)
            for image in zip(boxes, scores, centerness, image_sizes, strict=True)
        ]

    def _chosen(
        self,
        boxes: Tensor,
        scores: Tensor,
        centerness: Tensor | None,
        image_size: tuple[int, int],
        level_sizes: list[int],
    ) -> dict[str, Tensor]:
        """One image's detections, of boxes (anchors, 4) and scores (anchors, classes)."""
        classes, kept, start = scores.shape[1], [], 0
        for level in scores.split(level_sizes):
            flat = level.flatten()
            sure = (flat > self.score_thresh).nonzero().squeeze(1)
            # Not topk: an exported model would keep this image's number of candidates.
            best = flat[sure].argsort(descending=True)[: self.topk_candidates]
            kept.append(start * classes + sure[best])
            start += len(level)
        chosen = torch.cat(kept)
        anchor, labels, found = chosen // classes, chosen % classes, scores.flatten()[chosen]
        boxes = clip_boxes_to_image(boxes[anchor], image_size)
        if centerness is not None:
            found = found * centerness[anchor]
        proper = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        boxes, found, labels = boxes[proper], found[proper], labels[proper]
        best = batched_nms(boxes, found, labels, self.nms_thresh)[: self.detections_per_img]
        return {"boxes": boxes[best], "scores": found[best], "labels": labels[best]}
