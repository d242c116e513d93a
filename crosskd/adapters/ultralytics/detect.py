"""Takes ultralytics' ``DetectionModel`` apart: towers, predictions, boxes, and its own criterion.

A detection head has, for each level, a sequence of convolutions for boxes (``cv2``) and one for classes
(``cv3``). All but the last are the tower, the last is the predictor. Heads that are trained end to end have
both twice: one copy is trained on one-to-many assignments, the other (``one2one_cv2``, ``one2one_cv3``),
without gradients into the features, on one-to-one assignments.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import ultralytics
from torch import Tensor, nn
from ultralytics.nn.modules.head import Detect, v10Detect
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG_DICT, IterableSimpleNamespace

from crosskd._checks import compute_dtype
from crosskd.adapters.levels import LevelPairs, check_channels
from crosskd.adapters.protocol import Inputs
from crosskd.head import Block, Branch, Tower
from crosskd.methods.recipes import HeadRecipe
from crosskd.predictions import Assignment, Predictions, mean_over_ranks

__all__ = ["UltralyticsAdapter"]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


# The oldest that this was run with: in earlier ones heads, criteria and trainers hand over other things.
_OLDEST = "8.4.190"
if _numbers(ultralytics.__version__) < _numbers(_OLDEST):
    raise ImportError(f"{ultralytics.__version__} is installed, which is older than {_OLDEST}")

# Ours, not published: each weight is that of the head's own loss of the same kind in ultralytics' defaults
# (``cls``, ``dfl``, ``box``), so that the teacher counts as much as the ground truth does.
_DISTRIBUTIONS = HeadRecipe(
    "YOLO with distributions",
    1,
    cls_weight=0.5,
    reg_weight=1.5,
    regression="distribution_kl",
    times_batch=True,
)
_DISTANCES = HeadRecipe(
    "YOLO with distances",
    1,
    cls_weight=0.5,
    reg_weight=7.5,
    regression="giou",
    times_batch=True,
)

_HEADS = (Detect, v10Detect)


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


@dataclass(frozen=True, eq=False)
class Locations:
    """Where a head predicts, in the order of its predictions.

    Attributes:
        sizes: (height, width) of each level.
        halves: how many copies of the head predict at each place, their rows one behind the other.
        points: shape (anchors, 2), xy in pixels.
        strides: shape (anchors, 1), pixels.
    """

    sizes: tuple[tuple[int, int], ...]
    halves: int
    points: Tensor
    strides: Tensor

    def by_half(self, rows: Tensor) -> list[Tensor]:
        """Rows (batch, anchors, …) of each half, of shape (batch, anchors / halves, …), level by level."""
        counts = [height * width for height, width in self.sizes for _ in range(self.halves)]
        parts = torch.split(rows, counts, dim=1)
        return [torch.cat(parts[half :: self.halves], dim=1) for half in range(self.halves)]

    def joined(self, halves: Sequence[Tensor]) -> Tensor:
        """The reverse of `by_half`."""
        counts = [height * width for height, width in self.sizes]
        levels = zip(*(torch.split(rows, counts, dim=1) for rows in halves), strict=True)
        return torch.cat([rows for level in levels for rows in level], dim=1)


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


class UltralyticsAdapter:
    """Adapter for ultralytics' ``DetectionModel`` with a ``Detect`` head: YOLOv8, 11, 26 and their like.

    Images are a batch (batch, channels, height, width) of values from 0 to 1, targets ultralytics' own batch:
    a dict of ``batch_idx`` (objects,), ``cls`` (objects, 1) and ``bboxes`` (objects, 4), centre, width and
    height as fractions of the image. Its data loader and its trainer's ``preprocess_batch`` give both.

    The student's own losses come under ultralytics' names (``box_loss``, ``cls_loss``, ``dfl_loss`` or
    ``l1_loss``). Their sum is exactly what its own training minimises: a mean over the batch times the number
    of its images. So the methods' losses are multiplied by it too.

    The settings of the methods are ours, nothing is published for these heads: after the first of two blocks,
    each loss weighted as ultralytics weights the head's own of that kind (0.5 for classes, 1.5 for
    distributions of sides or 7.5 for boxes), normalised as that one is, by the summed target scores.

    Args:
        distributions: whether the heads predict a distribution for each side (``reg_max`` above 1).

    Attributes:
        recipe: the settings for such heads.

    Example:
        >>> from crosskd import CrossKD, Distiller
        >>> teacher = DetectionModel("yolov8s.yaml", nc=3, verbose=False)
        >>> student = DetectionModel("yolov8n.yaml", nc=3, verbose=False)
        >>> distiller = Distiller(teacher, student, CrossKD())
        >>> batch = {
        ...     "batch_idx": torch.tensor([0.0]),
        ...     "cls": torch.tensor([[2.0]]),
        ...     "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.6]]),
        ... }
        >>> sorted(distiller(torch.rand(1, 3, 64, 64), batch))
        ['box_loss', 'cls_loss', 'dfl_loss', 'kd_cls', 'kd_reg']
    """

    def __init__(self, distributions: bool = True) -> None:
        self.recipe = _DISTRIBUTIONS if distributions else _DISTANCES

    @classmethod
    def for_detectors(cls, *detectors: nn.Module) -> UltralyticsAdapter:
        """The adapter for some models, by the last one's head: (teacher, student).

        Raises:
            TypeError: something else than a detection model with a head that is known.
        """
        sides = ("the teacher", "the student") if len(detectors) == 2 else ("the detector",) * len(detectors)
        for side, detector in zip(sides, detectors, strict=True):
            _check_type(side, detector)
        return cls(distributions=_head(detectors[-1]).reg_max > 1)

    def supports(self, detector: nn.Module) -> bool:
        """Whether a detector is a ``DetectionModel`` with a ``Detect`` head (of YOLOv10 too)."""
        return isinstance(detector, DetectionModel) and type(detector.model[-1]) in _HEADS

    # -- construction -------------------------------------------------------------------------

    def num_classes(self, detector: nn.Module) -> int:
        """How many classes the head predicts."""
        return int(_head(detector).nc)

    def strides(self, detector: nn.Module) -> list[float]:
        """Pixels between neighbouring locations a level."""
        strides: list[float] = _head(detector).stride.tolist()
        return strides

    def check_pair(self, teacher: nn.Module, student: nn.Module, levels: LevelPairs) -> None:
        """Raises ``ValueError`` for a pair whose predictions can't be compared."""
        for side, detector in (("teacher", teacher), ("student", student)):
            if detector.is_fused():  # type: ignore[operator, unused-ignore]
                raise ValueError(
                    f"{side}: the model was fused for inference, so its normalisations, or a half of its "
                    "head, are gone: load the checkpoint anew, and don't predict, validate or export with "
                    "that object before you distil"
                )
        theirs, ours = _head(teacher), _head(student)
        if theirs.reg_max != ours.reg_max:
            raise ValueError(
                f"reg_max differs: {theirs.reg_max} (teacher), {ours.reg_max} (student). It is the number of "
                "bins of each side's distribution, 1 for a plain distance, and predictions of two kinds "
                "can't be compared: take a teacher of the student's family, YOLOv8 or 11 (16 bins) or "
                "YOLO26 (1)"
            )
        halves = [len(_halves(head)) for head in (theirs, ours)]
        if halves[0] != halves[1]:
            kinds = ["end to end, with a one-to-one half" if n == 2 else "one-to-many alone" for n in halves]
            raise ValueError(
                f"the heads differ: {kinds[0]} (teacher), {kinds[1]} (student). Build both with the same "
                "end2end in their yaml, or take a teacher of the student's family"
            )
        check_channels(_channels(teacher), _channels(student), levels)

    def branches(self, detector: nn.Module) -> tuple[Branch, ...]:
        """Classification and regression; for a head end to end, both for its one-to-one half too."""
        head = _head(detector)
        branches = []
        for half in _halves(head):
            # As in the head's own forward. At position 0 the library taps before it: the features themselves.
            detached = half is _ONE_TO_ONE and head.training
            for name, attribute in (("classification", half.classes), ("regression", half.boxes)):
                branches.append(_branch(half.prefix + name, attribute, head, detached=detached))
        return tuple(branches)

    # -- one step -----------------------------------------------------------------------------

    def prepare(self, teacher: nn.Module, student: nn.Module, images: Any, targets: Any) -> Inputs:
        """Takes images and targets as they are: both models see the same pixels."""
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            got = (
                f"{images.dtype} {tuple(images.shape)}"
                if isinstance(images, Tensor)
                else type(images).__name__
            )
            raise ValueError(
                "images must be one floating point tensor (batch, channels, height, width) of values from 0 "
                f"to 1, got {got}: divide what the data loader gives by 255, as its trainer's "
                "preprocess_batch does"
            )
        strides, theirs = self.strides(student), self.strides(teacher)
        # A teacher of other strides sees images of its own.
        coarsest = int(max(theirs if set(strides) <= set(theirs) else strides))
        if any(side % coarsest for side in images.shape[2:]):
            raise ValueError(
                f"images must have sides that are multiples of the coarsest stride, {coarsest}, got "
                f"{tuple(images.shape[2:])}: pad them, as ultralytics' data loader does"
            )
        if targets is not None:
            _check_targets(targets, len(images), self.num_classes(student))
        return Inputs(images, images, targets)

    def features(self, detector: nn.Module, pixels: Tensor) -> list[Tensor]:
        """Runs all of the model's layers but the head; each says itself which outputs it reads (``f``)."""
        *layers, head = detector.model  # type: ignore[misc, union-attr, unused-ignore]
        readers = {index: number for number, layer in enumerate(layers) for index in _sources(layer, number)}
        wanted = _sources(head, len(layers))
        outputs: dict[int, Any] = {-1: pixels}
        for number, layer in enumerate(layers):
            read = [outputs[index] for index in _sources(layer, number)]
            outputs[number] = layer(read[0] if isinstance(layer.f, int) else read)
            done = [i for i in outputs if i not in wanted and i < number and readers.get(i, i) <= number]
            for index in done:  # the teacher's are not needed for a backward pass, so this frees them
                del outputs[index]
        return [outputs[index] for index in wanted]

    def predict(self, detector: nn.Module, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """Runs the last convolutions; of a head end to end, the one-to-one half's rows come second."""
        head = _head(detector)
        logits, regression = [], []
        for half in _halves(head):
            classes, boxes = getattr(head, half.classes)[level][-1], getattr(head, half.boxes)[level][-1]
            logits.append(_rows(classes(towers[f"{half.prefix}classification"])))
            regression.append(_rows(boxes(towers[f"{half.prefix}regression"])))
        sides = torch.cat(regression, dim=1)  # (batch, anchors, 4 * bins)
        if head.reg_max > 1:
            sides = sides.reshape(*sides.shape[:2], 4, head.reg_max)
        return Predictions(torch.cat(logits, dim=1), sides, None)

    def locations(self, detector: nn.Module, inputs: Inputs, features: Sequence[Tensor]) -> Locations:
        """The middle of each cell."""
        head = _head(detector)
        halves = len(_halves(head))
        points, strides = [], []
        for stride, feature in zip(self.strides(detector), features, strict=True):
            height, width = feature.shape[2:]
            y, x = torch.meshgrid(
                torch.arange(height, device=feature.device),
                torch.arange(width, device=feature.device),
                indexing="ij",
            )
            middles = (torch.stack([x, y], dim=-1).reshape(-1, 2) + 0.5) * stride
            points.append(middles.repeat(halves, 1))
            strides.append(torch.full((halves * height * width, 1), stride, device=feature.device))
        sizes = tuple((int(feature.shape[2]), int(feature.shape[3])) for feature in features)
        return Locations(sizes, halves, torch.cat(points), torch.cat(strides))

    def decode(self, detector: nn.Module, predictions: Predictions, locations: Locations) -> Tensor:
        """Distances in strides from each point to the four sides; of a distribution, its mean."""
        sides = predictions.regression.to(compute_dtype(predictions.regression))
        if sides.ndim == 4:
            sides = sides.softmax(dim=-1) @ torch.arange(
                sides.shape[-1], dtype=sides.dtype, device=sides.device
            )
        left_top, right_bottom = torch.split(sides * locations.strides.to(sides), 2, dim=-1)
        points = locations.points.to(sides)
        return torch.cat([points - left_top, points + right_bottom], dim=-1)

    def losses(
        self, student: nn.Module, predictions: Predictions, locations: Locations, inputs: Inputs
    ) -> tuple[dict[str, Tensor], Assignment]:
        """The model's own criterion, run once; its assigner is listened to.

        The criterion is kept on the student, ``student.criterion``, as ultralytics itself keeps it: that of a
        head end to end counts epochs (``student.criterion.update()`` at the end of each, which ultralytics'
        trainer calls).
        """
        answer = self.run_criterion(student, predictions, locations, inputs)
        return dict(zip(answer.logged, answer.losses, strict=True)), answer.assignment

    def run_criterion(
        self, student: Any, predictions: Predictions, locations: Locations, inputs: Inputs
    ) -> Criterion:
        """What the model's own criterion makes of predictions."""
        if getattr(student, "criterion", None) is None:
            student.criterion = _new_criterion(student)
        criterion = student.criterion
        halves = _halves(_head(student))
        outputs = _as_outputs(predictions, locations)
        parts = [getattr(criterion, half.output) if len(halves) > 1 else criterion for half in halves]
        with ExitStack() as stack:
            heard = [stack.enter_context(_listening(part.assigner)) for part in parts]
            given = dict(zip((half.output for half in halves), outputs, strict=True))
            losses, logged = criterion(given if len(halves) > 1 else outputs[0], inputs.targets)
        gains = [criterion.o2m, criterion.o2o] if len(halves) > 1 else [1.0]
        return Criterion(losses, dict(logged), _assignment([one[-1] for one in heard], gains, locations))

    def detect(self, student: nn.Module, images: Any, targets: Any) -> Any:
        """``student(images)``: raw outputs in ultralytics' own form, before non-maximum suppression."""
        return student(images)

    def check_locations(self, teacher: Locations, student: Locations, levels: LevelPairs) -> None:
        """Raises ``ValueError`` where the points of the two differ."""
        used = levels.of_teacher(len(teacher.sizes))
        theirs = tuple(teacher.sizes[level] for level in used)
        # Strides were paired at construction, so points on grids of one size are the same places.
        if theirs != student.sizes:
            raise ValueError(f"the levels differ: {theirs} (teacher), {student.sizes} (student)")


class _Detach(nn.Module):
    """Stops gradients: a head's one-to-one half trains without moving the features."""

    def forward(self, features: Tensor) -> Tensor:
        return features.detach()


def _head(detector: nn.Module) -> Any:
    return detector.model[-1]  # type: ignore[index, unused-ignore]


def _halves(head: Any) -> tuple[_Half, ...]:
    if getattr(head, _ONE_TO_ONE.boxes, None) is None:
        return (_ONE_TO_MANY,)
    return (_ONE_TO_MANY, _ONE_TO_ONE)


def _channels(detector: Any) -> int:
    return int(detector.yaml.get("channels", 3))


def _check_type(side: str, detector: nn.Module) -> None:
    name = type(detector).__name__
    if not isinstance(detector, DetectionModel):
        inside = getattr(detector, "model", None)
        advice = (
            f"hand in what is inside it, {name}.model"
            if isinstance(inside, DetectionModel)
            else "build one from a yaml or a checkpoint for detection"
        )
        raise TypeError(f"{side} is a {name}, not one of ultralytics' DetectionModels: {advice}")
    head = type(detector.model[-1])
    if head not in _HEADS:
        raise TypeError(
            f"{side}, a {name}, ends in a {head.__name__}; ultralytics' adapter knows the heads "
            f"{', '.join(known.__name__ for known in _HEADS)}. For another one write an adapter "
            "(crosskd.adapters.Adapter) and pass it as adapter="
        )


def _branch(name: str, attribute: str, head: Any, *, detached: bool) -> Branch:
    towers, predictors = [], {}
    for level, sequence in enumerate(getattr(head, attribute)):
        *layers, predictor = sequence
        # One module each, its activation included: SiLU, unlike ReLU, changes what has passed it once, so a
        # tail that ran it again would not be the teacher's.
        blocks = [Block((layer,), opaque=True) for layer in layers]
        if detached and blocks:
            blocks[0] = Block((_Detach(), *blocks[0].layers), opaque=True)
        first = blocks[0].widths if blocks else None
        title = f"{name.replace('_', ' ')} tower of level {level}"
        towers.append(Tower(title, tuple(blocks), first[0] if first else predictor.in_channels))
        predictors[f"{attribute}.{level}"] = predictor
    return Branch(name, tuple(towers), predictors)


def _sources(layer: Any, number: int) -> list[int]:
    """The numbers of the layers whose outputs a layer reads; -1 is the image."""
    indices = [layer.f] if isinstance(layer.f, int) else list(layer.f)
    return [index if index >= 0 else number + index for index in indices]


def _rows(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)  # (batch, height * width, channels)


def _as_outputs(predictions: Predictions, locations: Locations) -> list[dict[str, Any]]:
    """Predictions in the form that a head's own forward gives each half's in.

    Of the features a criterion reads no more than shape, type and device.
    """
    scores = locations.by_half(predictions.logits)
    sides = locations.by_half(predictions.regression)
    like = predictions.logits
    stand_ins = [like.new_empty(()).expand(len(like), 1, *size) for size in locations.sizes]
    return [
        {"boxes": side.flatten(2).transpose(1, 2), "scores": score.transpose(1, 2), "feats": stand_ins}
        for side, score in zip(sides, scores, strict=True)
    ]


def _new_criterion(student: Any) -> Any:
    """The model's own criterion; where no trainer gave the model settings, with ultralytics' defaults."""
    settings = getattr(student, "args", None) or {}
    if not isinstance(settings, Mapping):
        return student.init_criterion()
    # Outside of a trainer models hold a dict, which criteria can't read. The model's own is left alone.
    stand_in = copy.copy(student)
    stand_in.args = IterableSimpleNamespace(**{**DEFAULT_CFG_DICT, **settings})
    return stand_in.init_criterion()


@contextmanager
def _listening(assigner: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Notes (target scores, mask of positive anchors) of each of an assigner's calls."""
    heard: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, arguments: Any, result: Any) -> None:
        _, _, target_scores, positive, _ = result
        heard.append((target_scores, positive))

    handle = assigner.register_forward_hook(note)
    try:
        yield heard
    finally:
        handle.remove()


def _assignment(
    heard: Sequence[tuple[Tensor, Tensor]], gains: Sequence[float], locations: Locations
) -> Assignment:
    """The assignment of all halves.

    Each half's own losses are divided by its summed target scores and multiplied by its gain. One number
    normalises all anchors here, the halves' sum, so what is left of both stands in the anchors' weights.

    Args:
        heard: of each half, target scores (batch, anchors, classes) and positive anchors (batch, anchors).
        gains: how much each half counts in the model's own losses.
        locations: of the predictions.
    """
    positive = locations.joined([mask.bool() for _, mask in heard])
    sums = [mean_over_ranks(scores.sum().float().clamp(min=1)) for scores, _ in heard]
    normalizer = torch.stack(sums).sum()
    if len(heard) == 1:
        return Assignment(None, positive, normalizer)
    counted = [
        (gain * normalizer / total).expand(mask.shape)
        for gain, total, (_, mask) in zip(gains, sums, heard, strict=True)
    ]
    return Assignment(locations.joined(counted), positive, normalizer)


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
