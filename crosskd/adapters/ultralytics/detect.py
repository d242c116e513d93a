"""Takes ultralytics' ``DetectionModel`` apart: maps, towers, predictions, boxes, and its own criterion.

A detection head has, for each level, a sequence of convolutions for boxes (``cv2``) and one for classes
(``cv3``). All but the last are the tower, the last is the predictor. Heads that are trained end to end have
both twice: one half is trained on one-to-many assignments, the other (``one2one_cv2``, ``one2one_cv3``),
without gradients into the maps, on one-to-one assignments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import ultralytics
from torch import Tensor, nn
from ultralytics.nn.modules.head import Detect, v10Detect
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG_DICT, IterableSimpleNamespace

from crosskd._checks import compute_dtype
from crosskd.adapters.base import Adapter, Anchors, Batch, Head, Objects, OwnOutput, PixelCoding
from crosskd.adapters.replacing import replaced
from crosskd.predictions import Assignment, Predictions
from crosskd.towers import Block, Branch, Tower

__all__ = ["Criterion", "DetectHead", "UltralyticsDetect"]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


# The oldest that this was run with: in earlier ones heads, criteria and trainers hand over other things.
_OLDEST = "8.4.190"
if _numbers(ultralytics.__version__) < _numbers(_OLDEST):
    raise ImportError(f"{ultralytics.__version__} is installed, which is older than {_OLDEST}")

_HEADS = (Detect, v10Detect)
_GREY = 114 / 255  # what ultralytics' data loader pads images with
_NO_LOGIT = -100.0  # a class that the teacher's predictions leave out


class _Half(NamedTuple):
    """One of the copies of a head's towers and predictors.

    Attributes:
        prefix: in front of its branches' names.
        boxes: the name of the head's attribute that holds the sequences for boxes.
        classes: of the one that holds those for classes.
        output: what ultralytics calls the half's predictions.
    """

    prefix: str
    boxes: str
    classes: str
    output: str


_ONE_TO_MANY = _Half("", "cv2", "cv3", "one2many")
_ONE_TO_ONE = _Half("one2one_", "one2one_cv2", "one2one_cv3", "one2one")


class Criterion(NamedTuple):
    """What a model's own criterion answered.

    Attributes:
        losses: shape (parts,), what its training minimises the sum of.
        logged: what it logs of each part, by name, in the same order.
        assignment: the one that it was made with.
    """

    losses: Tensor
    logged: dict[str, Tensor]
    assignment: Assignment


class DetectHead(Head):
    """The head of a `UltralyticsDetect`; of a head end to end, the one-to-one half's rows come second.

    Rows stand level by level; in each level one half stands behind the other.
    """

    times_batch = True

    def __init__(self, detector: Any) -> None:
        self.detector, self.detect = detector, detector.model[-1]
        self.num_classes = int(self.detect.nc)
        self.class_names = _class_names(detector, self.num_classes)
        self.bins = int(self.detect.reg_max)
        self.head_type = "YOLO with distributions" if self.bins > 1 else "YOLO with distances"
        end_to_end = getattr(self.detect, _ONE_TO_ONE.boxes, None) is not None
        self.halves = (_ONE_TO_MANY, _ONE_TO_ONE) if end_to_end else (_ONE_TO_MANY,)
        self.copies = len(self.halves)
        branches = []
        for half in self.halves:
            branches.append(_branch(f"{half.prefix}classification", half.classes, self.detect))
            branches.append(_branch(f"{half.prefix}regression", half.boxes, self.detect))
        self.branches = tuple(branches)

    def predict(self, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Runs the last convolutions."""
        logits, regression = [], []
        for half in self.halves:
            classes = getattr(self.detect, half.classes)[level][-1]
            boxes = getattr(self.detect, half.boxes)[level][-1]
            logits.append(_rows(classes(towers[f"{half.prefix}classification"])))
            regression.append(_rows(boxes(towers[f"{half.prefix}regression"])))
        return self._predictions(torch.cat(logits, dim=1), torch.cat(regression, dim=1))

    def _predictions(self, logits: Tensor, sides: Tensor) -> Predictions:
        """Predictions of logits (batch, anchors, classes) and sides (batch, anchors, 4 * bins)."""
        if self.bins > 1:
            sides = sides.reshape(*sides.shape[:2], 4, self.bins)
        return Predictions(logits, sides, None)

    def anchors(self, batch: Batch, maps: Sequence[Tensor]) -> Anchors:
        """The middle of each cell, xy; once for each half."""
        points, strides, sizes = [], [], []
        for stride, feature_map in zip(self.detect.stride.tolist(), maps, strict=True):
            height, width = int(feature_map.shape[2]), int(feature_map.shape[3])
            y, x = torch.meshgrid(
                torch.arange(height, device=feature_map.device),
                torch.arange(width, device=feature_map.device),
                indexing="ij",
            )
            middles = (torch.stack([x, y], dim=-1).reshape(-1, 2) + 0.5) * stride
            points.append(middles.repeat(len(self.halves), 1))
            strides.append(middles.new_full((len(self.halves) * height * width,), stride))
            sizes.append((height, width))
        per_level = tuple(len(of_level) for of_level in points)
        return Anchors(torch.cat(points), per_level, torch.cat(strides), tuple(sizes))

    def decode(self, predictions: Predictions, anchors: Anchors) -> Tensor:
        """Distances in strides from each point to the four sides; of a distribution, its mean."""
        assert anchors.boxes is not None
        assert anchors.strides is not None
        sides = predictions.regression.to(compute_dtype(predictions.regression))
        if sides.ndim == 4:
            bins = torch.arange(sides.shape[-1], dtype=sides.dtype, device=sides.device)
            sides = sides.softmax(dim=-1) @ bins
        left_top, right_bottom = torch.split(sides * anchors.strides.to(sides)[:, None], 2, dim=-1)
        points = anchors.boxes.to(sides)
        return torch.cat([points - left_top, points + right_bottom], dim=-1)

    def losses(
        self, predictions: Predictions, anchors: Anchors, batch: Batch
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The model's own criterion, run once, and the assignment that its assigner made for it.

        The criterion is kept on the model, ``model.criterion``, as ultralytics itself keeps it: that of a
        head end to end counts epochs (``model.criterion.update()`` at the end of each, which ultralytics'
        trainer calls).
        """
        answer = self.run_criterion(predictions, anchors, batch.targets)
        return dict(zip(answer.logged, answer.losses, strict=True)), answer.assignment

    def assign(self, predictions: Predictions, anchors: Anchors, batch: Batch) -> Assignment:
        """What the model's own assigner makes of a batch's objects, by predictions of all levels.

        Raises:
            ValueError: objects of unknown classes, predictions of some levels alone: the assigner compares
                what all of them predict for an object's class.
        """
        assert batch.objects is not None
        if any(bool((of_image.labels < 0).any()) for of_image in batch.objects):
            raise ValueError(
                f"the {self.head_type} head's label assignment compares what it predicts for each object's "
                f"class, but it isn't known which of its {self.num_classes} classes the objects are: give "
                "class_map=, the teacher's class index for each of the student's"
            )
        rows, needed = predictions.logits.shape[1], sum(anchors.per_level)
        if rows != needed:
            raise ValueError(
                f"the {self.head_type} head's label assignment compares the predictions of all its levels, "
                f"{needed} rows, but there are {rows}: take a student whose levels have the same strides, "
                f"{self.detect.stride.tolist()}"
            )
        return self.run_criterion(predictions, anchors, _targets_of(batch)).assignment

    def run_criterion(
        self, predictions: Predictions, anchors: Anchors, targets: Mapping[str, Tensor]
    ) -> Criterion:
        """What the model's own criterion makes of predictions of all levels.

        Args:
            predictions: of as many classes as the head has, or fewer.
            anchors: of all levels.
            targets: ultralytics' own batch.
        """
        if getattr(self.detector, "criterion", None) is None:
            with settings_of(self.detector):
                self.detector.criterion = self.detector.init_criterion()
        criterion = self.detector.criterion
        both = len(self.halves) > 1
        parts = [getattr(criterion, half.output, None) for half in self.halves] if both else [criterion]
        outputs = self._as_outputs(predictions, anchors)
        given = dict(zip((half.output for half in self.halves), outputs, strict=True)) if both else outputs[0]
        with ExitStack() as stack:
            calls = [stack.enter_context(_assigner_calls(part)) for part in parts]
            losses, logged = criterion(given, targets)
        gains = [criterion.o2m, criterion.o2o] if both else [1.0]
        return Criterion(losses, dict(logged), self._assignment([of[-1] for of in calls], gains, anchors))

    def _as_outputs(self, predictions: Predictions, anchors: Anchors) -> list[dict[str, Any]]:
        """Predictions in the form that a head's own forward gives each half's in.

        Of the maps a criterion reads no more than shape, type and device.
        """
        logits = predictions.logits
        left_out = self.num_classes - logits.shape[-1]
        if left_out:
            logits = F.pad(logits, (0, left_out), value=_NO_LOGIT)
        scores, sides = self.by_half(logits, anchors), self.by_half(predictions.regression, anchors)
        stand_ins = [logits.new_empty(()).expand(len(logits), 1, *size) for size in anchors.sizes]
        return [
            {"boxes": side.flatten(2).transpose(1, 2), "scores": score.transpose(1, 2), "feats": stand_ins}
            for side, score in zip(sides, scores, strict=True)
        ]

    def predictions_of(self, raw: Mapping[str, Any]) -> Predictions:
        """What a head's own forward gave, as predictions of all levels."""
        halves = [raw[half.output] for half in self.halves] if len(self.halves) > 1 else [raw]
        counts = [feature_map.shape[2] * feature_map.shape[3] for feature_map in halves[0]["feats"]]
        logits = _joined([half["scores"].transpose(1, 2) for half in halves], counts)
        sides = _joined([half["boxes"].transpose(1, 2) for half in halves], counts)
        return self._predictions(logits, sides)

    def by_half(self, rows: Tensor, anchors: Anchors) -> list[Tensor]:
        """Rows (batch, anchors, …) of each half, shape (batch, anchors / halves, …), level by level."""
        count = len(self.halves)
        per_half = [rows // count for rows in anchors.per_level for _ in self.halves]
        parts = torch.split(rows, per_half, dim=1)
        return [torch.cat(parts[half::count], dim=1) for half in range(count)]

    def _assignment(
        self, calls: Sequence[tuple[Tensor, Tensor]], gains: Sequence[float], anchors: Anchors
    ) -> Assignment:
        """The assignment of all halves.

        Each half's own losses are divided by its summed target scores and multiplied by its gain. One number
        normalises all anchors here, the halves' sum, so what is left of both stands in the anchors' weights.

        Args:
            calls: of each half, target scores (batch, anchors, classes) and its positives (batch, anchors).
            gains: how much each half counts in the model's own losses.
            anchors: of all levels.
        """
        counts = [height * width for height, width in anchors.sizes]
        positive = _joined([mask.bool() for _, mask in calls], counts)
        sums = [scores.sum().float().clamp(min=1) for scores, _ in calls]
        normalizer = torch.stack(sums).sum()
        if len(calls) == 1:
            return Assignment(None, positive, normalizer)
        weights = []
        for gain, total, (_, mask) in zip(gains, sums, calls, strict=True):
            weights.append((gain * normalizer / total).expand(mask.shape))
        return Assignment(_joined(weights, counts), positive, normalizer)


class UltralyticsDetect(Adapter):
    """Adapter for ultralytics' ``DetectionModel`` with a ``Detect`` head: YOLOv8, 11, 26 and their like.

    Images are a batch (batch, channels, height, width) of values from 0 to 1, targets ultralytics' own batch:
    a dict of ``batch_idx`` (objects,), ``cls`` (objects, 1) and ``bboxes`` (objects, 4), centre, width and
    height as fractions of the image. Its data loader and its trainer's ``preprocess_batch`` give both.

    The student's own losses come under ultralytics' names (``box_loss``, ``cls_loss``, ``dfl_loss`` or
    ``l1_loss``). Their sum is exactly what its own training minimises: a mean over the batch times the number
    of its images. So the methods' losses are multiplied by it too.

    Args:
        detector: a detection model that was not fused for inference.

    Raises:
        TypeError: something else, or a head of another type.
        ValueError: a fused model, whose normalisations or a half of its head are gone.

    Example:
        >>> adapter = UltralyticsDetect(DetectionModel("yolov8n.yaml", nc=3, verbose=False))
        >>> adapter.strides, adapter.heads[0].head_type
        ((8.0, 16.0, 32.0), 'YOLO with distributions')
    """

    head: type[DetectHead] = DetectHead

    def __init__(self, detector: Any) -> None:
        _check_type(detector)
        self.detector: Any = detector
        head = self.head(detector)
        self.heads: tuple[DetectHead] = (head,)
        self.strides = tuple(map(float, detector.model[-1].stride.tolist()))
        self.widths = tuple(tower.width_in for tower in head.branches[0].towers)
        channels = int(detector.yaml.get("channels", 3))
        self.pixel_coding = PixelCoding((0.0,) * channels, (1.0,) * channels, padding=_GREY)
        self._sources, self._unread = _reading_plan(detector.model)

    def prepare(self, images: Any, targets: Any) -> Batch:
        """Takes images and targets as they are.

        Args:
            images: shape (batch, channels, height, width), values from 0 to 1.
            targets: ultralytics' own batch, or ``None``.

        Raises:
            ValueError: images or targets in another form, or that the model can't take.
        """
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            got = type(images).__name__
            if isinstance(images, Tensor):
                got = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(
                "images must be one floating point tensor (batch, channels, height, width) of values from 0 "
                f"to 1, got {got}: divide what the data loader gives by 255, as its trainer's "
                "preprocess_batch does"
            )
        self._check_sides(images)
        height, width = int(images.shape[2]), int(images.shape[3])
        sizes = ((height, width),) * len(images)
        if targets is None:
            return Batch(images, sizes)
        _check_targets(targets, len(images), self.heads[0].num_classes)
        return Batch(images, sizes, _objects_of(targets, images), targets)

    def take(self, batch: Batch) -> Batch:
        """Another detector's batch as it is, if the model's coarsest stride divides its sides."""
        self._check_sides(batch.pixels)
        return batch

    def _check_sides(self, pixels: Tensor) -> None:
        assert self.strides is not None
        coarsest = int(max(self.strides))
        if any(side % coarsest for side in pixels.shape[2:]):
            raise ValueError(
                f"a {type(self.detector).__name__} takes images with sides that are multiples of its "
                f"coarsest stride, {coarsest}, got {tuple(pixels.shape[2:])}: pad them, as ultralytics' data "
                "loader does; a teacher can have images of its own by teacher_view="
            )

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Runs all of the model's layers but the head; each says itself which outputs it reads (``f``)."""
        outputs: dict[int, Any] = {-1: pixels}
        for number, layer in enumerate(self.detector.model[:-1]):
            read = [outputs[source] for source in self._sources[number]]
            outputs[number] = layer(read[0] if isinstance(layer.f, int) else read)
            for index in self._unread[number]:
                del outputs[index]  # the teacher's are not needed for a backward pass, so this frees them
        return [outputs[source] for source in self._sources[-1]]

    def own_losses(self, images: Any, targets: Any) -> Mapping[str, Tensor]:
        """What the model's own forward makes of a batch in train mode, by the names that it logs."""
        with settings_of(self.detector):
            losses, logged = self.detector({**targets, "img": images})
        if losses.shape != (len(logged),):
            return {"sum": losses.sum()}
        return dict(zip(logged, losses, strict=True))

    def own_outputs(self, batch: Batch) -> list[OwnOutput]:
        """The raw predictions that the model's own forward gives beside its detections."""
        with replaced(self.detector.model[-1], export=False):
            output = self.detector(batch.pixels)
        raw = output[1] if isinstance(output, tuple) and len(output) == 2 else None
        if not isinstance(raw, Mapping):
            raise ValueError(
                f"{type(self.detector).__name__}'s own forward doesn't give a pair of detections and raw "
                f"predictions, as ultralytics' models do, but a {type(output).__name__}: write an adapter "
                "for it (docs/adapters.md), or pass prove=False"
            )
        return [OwnOutput(self.heads[0].predictions_of(raw))]


class _DetachInTraining(nn.Module):
    """Stops gradients while a head trains: its one-to-one half trains without moving the maps."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self._head = (head,)  # in a tuple: the head contains the tower, and not the tower the head

    def forward(self, features: Tensor) -> Tensor:
        return features.detach() if self._head[0].training else features


@contextmanager
def settings_of(model: Any) -> Iterator[None]:
    """While it is open, a model that no trainer gave settings has ultralytics' defaults.

    Outside of a trainer models hold a dict, or nothing, which criteria can't read.
    """
    settings = getattr(model, "args", None) or {}
    if isinstance(settings, Mapping):
        settings = IterableSimpleNamespace(**{**DEFAULT_CFG_DICT, **settings})
    with replaced(model, args=settings):
        yield


def _check_type(detector: nn.Module) -> None:
    name = type(detector).__name__
    if not isinstance(detector, DetectionModel):
        inside = getattr(detector, "model", None)
        advice = "build one from a yaml or a checkpoint for detection"
        if isinstance(inside, DetectionModel):
            advice = f"hand in what is inside it, {name}.model"
        raise TypeError(f"a {name} is not one of ultralytics' DetectionModels: {advice}")
    head = type(detector.model[-1])
    if head not in _HEADS:
        raise TypeError(
            f"a {name} that ends in a {head.__name__}; ultralytics' adapter knows the heads "
            f"{', '.join(known.__name__ for known in _HEADS)}. For another one write an adapter "
            "(crosskd.adapters.Adapter) and pass it as adapter="
        )
    if detector.is_fused():
        raise ValueError(
            "the model was fused for inference, so its normalisations, or a half of its head, are gone: load "
            "the checkpoint anew, and don't predict, validate or export with that object before you distil"
        )


def _class_names(detector: Any, classes: int) -> tuple[str, ...] | None:
    """The classes' names; ``None`` for a model that has numbers in their place."""
    names = getattr(detector, "names", None) or {}
    listed = [str(names.get(index, index)) for index in range(classes)]
    unnamed = listed == [str(index) for index in range(classes)]
    return None if unnamed else tuple(listed)


def _branch(name: str, attribute: str, head: Any) -> Branch:
    """A tower per level with its last convolution as predictor."""
    towers, predictors = [], {}
    for level, sequence in enumerate(getattr(head, attribute)):
        *layers, predictor = sequence
        # One module each, its activation included: SiLU, unlike ReLU, changes what has passed it once, so a
        # tail that ran it again would not be the teacher's.
        blocks = [Block((layer,), opaque=True) for layer in layers]
        if blocks and name.startswith(_ONE_TO_ONE.prefix):
            # As in the head's own forward. At position 0 the library taps before it: the map itself.
            blocks[0] = Block((_DetachInTraining(head), *blocks[0].layers), opaque=True)
        first = blocks[0].widths if blocks else None
        title = f"{name.replace('_', ' ')} tower of level {level}"
        towers.append(Tower(title, tuple(blocks), first[0] if first else predictor.in_channels))
        predictors[f"{attribute}.{level}"] = predictor
    return Branch(name, tuple(towers), predictors)


def _reading_plan(layers: Sequence[Any]) -> tuple[list[list[int]], list[list[int]]]:
    """For each layer the numbers of the layers that it reads, and of those that nothing reads after it.

    -1 is the image. What the last layer, the head, reads is kept.
    """
    sources, last_reader = [], {}
    for number, layer in enumerate(layers):
        indices = [layer.f] if isinstance(layer.f, int) else list(layer.f)
        sources.append([index if index >= 0 else number + index for index in indices])
        last_reader.update(dict.fromkeys(sources[-1], number))
        last_reader[number] = number
    unread: list[list[int]] = [[] for _ in layers]
    for index, number in last_reader.items():
        if index not in sources[-1]:
            unread[number].append(index)
    return sources, unread


def _rows(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)  # (batch, height * width, channels)


def _joined(halves: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Each half's rows (batch, locations, …) as one tensor: level by level, one half behind the other.

    Args:
        halves: their rows, level by level.
        counts: locations of each level.
    """
    parts = [torch.split(rows, list(counts), dim=1) for rows in halves]
    return torch.cat([half[level] for level in range(len(counts)) for half in parts], dim=1)


@contextmanager
def _assigner_calls(criterion: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Records (target scores, mask of positive anchors) of the one call of a criterion's assigner."""
    assigner = getattr(criterion, "assigner", None)
    if not isinstance(assigner, nn.Module):
        raise ValueError(
            f"the model's criterion, a {type(criterion).__name__}, has no assigner as ultralytics' own have, "
            "so its label assignment can't be shared: write an adapter for this model (docs/adapters.md)"
        )
    calls: list[tuple[Tensor, Tensor]] = []

    def record(module: nn.Module, arguments: Any, result: Any) -> None:
        _, _, target_scores, positive, _ = result
        calls.append((target_scores, positive))

    with assigner.register_forward_hook(record):
        yield calls
    if len(calls) != 1:
        raise ValueError(
            f"the model's criterion, a {type(criterion).__name__}, called its assigner {len(calls)} times "
            "for a batch, and not once: write an adapter for this model (docs/adapters.md)"
        )


def _objects_of(targets: Mapping[str, Tensor], images: Tensor) -> tuple[Objects, ...]:
    """The objects of each image of a batch in ultralytics' form."""
    height, width = images.shape[2:]
    index = targets["batch_idx"].flatten().long()
    order = index.argsort(stable=True)
    counts = torch.bincount(index, minlength=len(images)).tolist()
    centres, sizes = torch.split(targets["bboxes"][order].to(images.device), 2, dim=1)
    scale = centres.new_tensor([width, height, width, height])
    boxes = torch.cat([centres - sizes / 2, centres + sizes / 2], dim=1) * scale
    labels = targets["cls"].flatten()[order].long().to(images.device)
    return tuple(map(Objects, torch.split(boxes, counts), torch.split(labels, counts)))


def _targets_of(batch: Batch) -> dict[str, Tensor]:
    """A batch's objects in ultralytics' form."""
    assert batch.objects is not None
    height, width = batch.size
    boxes = torch.cat([of_image.boxes for of_image in batch.objects])
    labels = torch.cat([of_image.labels for of_image in batch.objects])
    counts = torch.tensor([len(of_image.boxes) for of_image in batch.objects], device=boxes.device)
    corners = boxes / boxes.new_tensor([width, height, width, height])
    middles, sizes = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    index = torch.arange(len(counts), device=boxes.device).repeat_interleave(counts)
    return {
        "batch_idx": index.to(boxes.dtype),
        "cls": labels[:, None].to(boxes.dtype),
        "bboxes": torch.cat([middles, sizes], dim=1),
    }


def _check_targets(targets: Any, images: int, classes: int) -> None:
    """Raises ``ValueError`` for targets that the criterion would stumble over, or misread."""
    wanted = ("batch_idx", "cls", "bboxes")
    if not isinstance(targets, Mapping) or not all(isinstance(targets.get(key), Tensor) for key in wanted):
        held = sorted(map(str, targets)) if isinstance(targets, Mapping) else type(targets).__name__
        raise ValueError(
            f"targets must be ultralytics' batch, a dict with the tensors {', '.join(wanted)}, got {held}"
        )
    index, labels, boxes = (targets[key] for key in wanted)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not index.numel() == labels.numel() == len(boxes):
        raise ValueError(
            "targets must hold batch_idx (objects,), cls (objects, 1) and bboxes (objects, 4), got "
            f"{tuple(index.shape)}, {tuple(labels.shape)} and {tuple(boxes.shape)}"
        )
    if not len(boxes):
        return
    # One transfer for all of them: each would wait for the device.
    ends = torch.stack([*labels.aminmax(), *index.aminmax(), *boxes.aminmax()]).float().tolist()
    if not 0 <= ends[0] <= ends[1] < classes:
        raise ValueError(
            f"targets have classes from {ends[0]:g} to {ends[1]:g}, but the student predicts {classes} "
            f"classes, labelled 0 to {classes - 1}"
        )
    if not 0 <= ends[2] <= ends[3] < images:
        raise ValueError(
            f"targets have batch_idx from {ends[2]:g} to {ends[3]:g}, but there are {images} images"
        )
    if not -0.01 <= ends[4] <= ends[5] <= 1.01:
        raise ValueError(
            f"targets have bboxes from {ends[4]:g} to {ends[5]:g}: they must be centre, width and height as "
            "fractions of the image, 0 to 1"
        )
