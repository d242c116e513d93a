"""Whole CrossKD losses in a slow float64 calculation that shares no code with the package.

The backbones are the only thing run as they are; from their feature maps on everything is written out here:
convolutions, alignment, the rest of the teacher's towers, anchors, boxes, label assignment, losses and
normalizers. The teacher's head decides all of them, whatever the student's is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosskd import Distiller
from tests.helpers.tiny import STRIDES, tiny_batch

BRANCHES = ("classification", "regression")


# -- heads ----------------------------------------------------------------------------------------


@dataclass
class Weights:
    """What one block of a tower holds."""

    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None


def tower_weights(detector: nn.Module, branch: str) -> list[Weights]:
    """A tower's weights by block, from the state dict alone: each 4-d tensor starts a block."""
    prefix = f"head.{branch}_head.conv."
    blocks: list[list[Tensor]] = []
    for name, tensor in detector.state_dict().items():
        if name.startswith(prefix):
            if tensor.ndim == 4:
                blocks.append([])
            blocks[-1].append(tensor)
    # Three tensors are a convolution without a bias, and a normalisation.
    return [Weights(b[0], None, *b[1:]) if len(b) == 3 else Weights(*b) for b in blocks]


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    pieces = []
    for image in x:
        for group in image.split(x.shape[1] // groups):
            mean = group.sum() / group.numel()
            variance = ((group - mean) ** 2).sum() / group.numel()
            pieces.append((group - mean) / (variance + 1e-5).sqrt())
    return torch.cat(pieces).view_as(x) * weight[None, :, None, None] + bias[None, :, None, None]


def before_activation(x: Tensor, block: Weights, groups: int) -> Tensor:
    x = F.conv2d(x, block.weight, block.bias, padding=1)
    return x if block.norm_weight is None else group_norm(x, block.norm_weight, block.norm_bias, groups)


def relu(x: Tensor) -> Tensor:
    return x * (x > 0)


def features_at(x: Tensor, blocks, groups: int, position: int, tap: str) -> Tensor:
    for number, block in enumerate(blocks[:position], 1):
        x = before_activation(x, block, groups)
        if number < position or tap == "post":
            x = relu(x)
    return x


def mean_and_deviation(channel: Tensor) -> tuple[Tensor, Tensor]:
    """Over batch and space, unbiased; a channel that is constant (cut off by its ReLU) deviates by 0."""
    mean = channel.sum() / channel.numel()
    variance = ((channel - mean) ** 2).sum() / (channel.numel() - 1)
    return mean, variance.sqrt() if variance > 0 else torch.zeros_like(variance)


def aligned(student: Tensor, teacher: Tensor) -> Tensor:
    """Channel by channel: the teacher's mean and deviation."""
    channels = []
    for ours, theirs in zip(student.unbind(1), teacher.unbind(1), strict=True):
        mean, deviation = mean_and_deviation(ours)
        wanted_mean, wanted_deviation = mean_and_deviation(theirs)
        channels.append((ours - mean) / (deviation + 1e-6) * wanted_deviation + wanted_mean)
    return torch.stack(channels, dim=1)


def as_rows(maps: Tensor, last: int) -> Tensor:
    """(batch, anchors * last, height, width) → (batch, height * width * anchors, last)."""
    batch, channels, height, width = maps.shape
    return (
        maps.view(batch, channels // last, last, height * width).permute(0, 3, 1, 2).reshape(batch, -1, last)
    )


def cross_and_teacher_outputs(
    distiller: Distiller, maps, position: int, tap: str, groups: tuple[int, int]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """By branch: the tower outputs, per level, of the cross-head and of the teacher."""
    outputs = {}
    for branch in BRANCHES:
        ours, theirs = (tower_weights(d, branch) for d in (distiller.student, distiller.teacher))
        outputs[branch] = []
        for student_map, teacher_map in zip(*maps, strict=True):
            student = features_at(student_map, ours, groups[0], position, tap)
            teacher = features_at(teacher_map, theirs, groups[1], position, tap)
            crossed = aligned(student, teacher)
            if position:
                crossed, teacher = relu(crossed), relu(teacher)
            for block in theirs[position:]:
                crossed = relu(before_activation(crossed, block, groups[1]))
                teacher = relu(before_activation(teacher, block, groups[1]))
            outputs[branch].append((crossed, teacher))
    return outputs


def predictor(detector: nn.Module, path: str, x: Tensor, last: int) -> Tensor:
    state = detector.state_dict()
    maps = F.conv2d(x, state[f"head.{path}.weight"], state[f"head.{path}.bias"], padding=1)
    return as_rows(maps, last)


# -- losses on rows -------------------------------------------------------------------------------


def quality_focal(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = 1 / (1 + (-student).exp()), 1 / (1 + (-teacher).exp())
    entropy = -(t * s.log() + (1 - t) * (1 - s).log())
    return ((s - t).abs() * entropy).sum(-1)


def overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """IoU, area of the union and of the enclosing box, of two boxes (4,)."""
    width = (torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0])).clamp(min=0)
    height = (torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1])).clamp(min=0)
    intersection = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    union = union.clamp(min=1e-6)
    enclosing_width = torch.maximum(a[2], b[2]) - torch.minimum(a[0], b[0])
    enclosing_height = torch.maximum(a[3], b[3]) - torch.minimum(a[1], b[1])
    return intersection / union, union, (enclosing_width * enclosing_height).clamp(min=1e-6)


def giou_row(a: Tensor, b: Tensor) -> Tensor:
    iou, union, enclosing = overlap(a, b)
    return 1 - (iou - (enclosing - union) / enclosing)


def log_iou_row(a: Tensor, b: Tensor) -> Tensor:
    return -overlap(a, b)[0].clamp(min=1e-6).log()


# -- anchors, boxes, label assignment -----------------------------------------------------------------


@dataclass
class Location:
    """A place of prediction: its centre, its size, and the level's number."""

    x: float
    y: float
    width: float
    height: float
    level: int

    @property
    def box(self) -> list[float]:
        return [
            self.x - self.width / 2,
            self.y - self.height / 2,
            self.x + self.width / 2,
            self.y + self.height / 2,
        ]


def locations_of(side: int, scale: int, ratios: tuple[float, ...]) -> list[Location]:
    places = []
    for level, stride in enumerate(STRIDES):
        for row in range(side // stride):
            for column in range(side // stride):
                for ratio in ratios:
                    # torchvision keeps half the size, rounded to whole pixels (halves to even)
                    width = 2 * round(scale * stride / math.sqrt(ratio) / 2)
                    height = 2 * round(scale * stride * math.sqrt(ratio) / 2)
                    places.append(Location(column * stride, row * stride, width, height, level))
    return places


def iou_of(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def retinanet_assignment(places: list[Location], boxes: list[list[float]]) -> tuple[list[float], int]:
    """Which anchors count (IoU outside 0.4 to 0.5, or the best of a box), and how many are positive."""
    table = [[iou_of(box, place.box) for place in places] for box in boxes]
    best_of_boxes = {
        index for row in table for index, value in enumerate(row) if abs(value - max(row)) < 1e-12
    }
    label_weights, positives = [], 0
    for index in range(len(places)):
        best = max(row[index] for row in table)
        positive = best >= 0.5 or index in best_of_boxes
        label_weights.append(0.0 if 0.4 <= best < 0.5 and not positive else 1.0)
        positives += positive
    return label_weights, max(1, positives)


def fcos_amount(places: list[Location], boxes: list[list[float]]) -> float:
    """The sum of the positive points' centerness."""
    total = 0.0
    for place in places:
        matches = []
        for box in boxes:
            sides = [place.x - box[0], place.y - box[1], box[2] - place.x, box[3] - place.y]
            centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            near = max(abs(place.x - centre[0]), abs(place.y - centre[1])) < 1.5 * place.width
            low = 0 if place.level == 0 else 4 * place.width
            high = math.inf if place.level == len(STRIDES) - 1 else 8 * place.width
            if near and min(sides) > 0 and low < max(sides) < high:
                area = (box[2] - box[0]) * (box[3] - box[1])
                matches.append((area, sides))
        if matches:
            left, top, right, bottom = min(matches)[1]
            across, along = sorted((left, right)), sorted((top, bottom))
            total += math.sqrt(across[0] / across[1] * along[0] / along[1])
    return total


def retinanet_box(deltas: Tensor, place: Location) -> Tensor:
    x, y = deltas[0] * place.width + place.x, deltas[1] * place.height + place.y
    limit = math.log(1000 / 16)
    width = deltas[2].clamp(max=limit).exp() * place.width
    height = deltas[3].clamp(max=limit).exp() * place.height
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2])


def fcos_box(sides: Tensor, place: Location) -> Tensor:
    left, top, right, bottom = relu(sides) * place.width
    return torch.stack([place.x - left, place.y - top, place.x + right, place.y + bottom])


# -- the whole ------------------------------------------------------------------------------------


def slow_losses(
    distiller: Distiller,
    images: list[Tensor],
    targets: list[dict[str, Tensor]],
    *,
    position: int,
    tap: str = "post",
    groups: tuple[int, int] = (0, 0),
    columns: tuple[int, ...] | None = None,
) -> dict[str, Tensor]:
    """``kd_cls`` and ``kd_reg`` with the weights published for the teacher's type.

    Args:
        distiller: of two of the tiny RetinaNets and FCOSs.
        images: of 64 x 64 pixels, in float64.
        targets: of each image.
        position: after how many blocks the teacher's head takes over.
        tap: before or after the activation there.
        groups: of the GroupNorms in the student's towers and in the teacher's; 0 where there is none.
        columns: the teacher's classes that count, in the student's order; all of them unless given.
    """
    student, teacher = distiller.student, distiller.teacher
    retinanet = type(teacher).__name__ == "RetinaNet"
    maps = [list(d.backbone(normalized(d, images)).values()) for d in (student, teacher)]
    outputs = cross_and_teacher_outputs(distiller, maps, position, tap, groups)
    classes = teacher.head.classification_head.num_classes
    logits, regression = [], []
    for side in range(2):
        towers = {branch: [pair[side] for pair in outputs[branch]] for branch in BRANCHES}
        rows = [
            predictor(teacher, "classification_head.cls_logits", x, classes) for x in towers["classification"]
        ]
        logits.append([x if columns is None else x[..., list(columns)] for x in rows])
        regression.append(
            [predictor(teacher, "regression_head.bbox_reg", x, 4) for x in towers["regression"]]
        )
    crossed, wanted = (torch.cat(levels, dim=1) for levels in logits)
    crossed_reg, wanted_reg = (torch.cat(levels, dim=1) for levels in regression)

    places = locations_of(64, *((4, (0.5, 1.0, 2.0)) if retinanet else (1, (1.0,))))
    decode, row_loss = (retinanet_box, giou_row) if retinanet else (fcos_box, log_iou_row)
    rows = quality_focal(crossed, wanted)
    classification, boxes_loss, normalizer = 0.0, 0.0, 0.0
    for image, target in enumerate(targets):
        boxes = target["boxes"].tolist()
        label_weights = [1.0] * len(places)
        if retinanet:
            label_weights, positives = retinanet_assignment(places, boxes)
            normalizer += positives
        else:
            normalizer += fcos_amount(places, boxes)
        for index, place in enumerate(places):
            confidence = 1 / (1 + (-wanted[image, index].max()).exp())
            classification = classification + label_weights[index] * rows[image, index]
            pair = (decode(r[image, index], place) for r in (crossed_reg, wanted_reg))
            boxes_loss = boxes_loss + label_weights[index] * confidence * row_loss(*pair)
    cls_weight, reg_weight = (1.0, 1.0) if retinanet else (0.4, 0.75)
    normalizer = normalizer if retinanet else max(1.0, normalizer)
    return {
        "kd_cls": cls_weight * classification / normalizer,
        "kd_reg": reg_weight * boxes_loss / normalizer,
    }


def normalized(detector: nn.Module, images: list[Tensor]) -> Tensor:
    """Pixels as a detector's own mean and deviation code them."""
    mean, std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None]
        for values in (detector.transform.image_mean, detector.transform.image_std)
    )
    return torch.stack([(image - mean) / std for image in images])


def float64_batch(**options: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A tiny batch in float64; arguments as for `tiny_batch`."""
    images, targets = tiny_batch(**options)
    boxes = [{"boxes": t["boxes"].double(), "labels": t["labels"]} for t in targets]
    return [image.double() for image in images], boxes


def assert_losses_and_gradients_agree(
    distiller: Distiller, losses: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """Losses to 1e-10, and their gradients at the student's backbone to 1e-8."""
    parameters = [*distiller.student.backbone.parameters()]
    for name, loss in expected.items():
        assert losses[name].item() == pytest.approx(loss.item(), rel=1e-10), name
        ours = torch.autograd.grad(losses[name], parameters, retain_graph=True)
        theirs = torch.autograd.grad(loss, parameters, retain_graph=True)
        largest = max(gradient.abs().max().item() for gradient in theirs)
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-8, atol=1e-10 * largest)
