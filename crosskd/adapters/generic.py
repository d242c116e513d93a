"""An adapter of a detector of one's own, made by naming its modules and passing a few functions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from crosskd.adapters.base import Adapter, Anchors, Batch, Head, Objects, OwnOutput, PixelCoding, Rows
from crosskd.adapters.modules import (
    Where,
    ends_in_a_layer,
    find_modules,
    is_linear,
    kinds_of,
    of_level,
    width_of,
)
from crosskd.predictions import Assignment, Predictions
from crosskd.towers import Branch, Tower

__all__ = ["GenericAdapter", "GenericHead", "generic", "stacked_images"]

Assigned = Tensor | Assignment
"""Which anchors hold an object: a mask (batch, anchors) of type bool, or an `Assignment`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class generic:  # noqa: N801  # called as a function is, like functools.partial
    """Makes an adapter of any detector that has a feature extractor and a head of towers and predictors.

    What it returns is handed to the `crosskd.Distiller` as ``adapter=`` or ``teacher_adapter=``. It can be
    pickled if the functions can.

    A module is named by its attribute path, ``"head.cls_tower"``. A ``*`` in the path stands for one module
    per level: ``"heads.*.cls_tower"`` are ``heads[0].cls_tower``, ``heads[1].cls_tower``… Where a path does
    not do, pass a function of the detector that returns the module, or a list of them, one per level:
    ``lambda detector: [stack[:-1] for stack in detector.stacks]``.

    Args:
        features: the module that makes feature maps of pixels, or a function ``(detector, pixels)``. They
            are one tensor, a sequence or a dict of them, finest first: (batch, channels, height, width);
            for towers of linear layers (batch, channels), (batch, locations, channels) or (batch, height,
            width, channels).
        towers: by branch name, the blocks in front of the predictors, an ``nn.Sequential`` or
            ``nn.ModuleList``; ``None`` where the predictors read the feature maps themselves.
        predictors: by branch name, the predictors behind its tower, by what they predict: ``"logits"``
            (before the sigmoid), ``"regression"``, ``"quality"`` (logits of a centerness, an IoU or an
            objectness). Each gives the numbers of all of a location's anchors, one anchor behind the other.
        losses: ``(detector, predictions, anchors, targets)`` returns the detector's own losses by name, and
            which anchors hold an object: a mask (batch, anchors) of type bool, or an `Assignment` where some
            anchors don't count, or where losses are divided by something else than their number. A detector
            that is a teacher only needs none.
        decode: ``(detector, regression, anchors)`` returns boxes (batch, anchors, 4), xyxy in pixels. It may
            be left out where distributions are compared instead of boxes.
        anchors: ``(detector, batch, maps)`` returns what the predictions stand at. `losses`, `decode` and
            `assign` get it as it is, or ``None`` without it. A tensor (anchors, 4) of boxes, (anchors, 2) of
            points, or a list of them, one per level, is compared with the other detector's.
        strides: pixels between neighbouring locations, one number per level, or a function of the detector.
            Needed where one detector has levels that the other lacks, and by methods of feature maps.
        widths: channels of the maps, one number per level, or a function of the detector; those of the
            towers' inputs unless given.
        predict: ``(detector, level, towers)`` returns a level's `Predictions`, where the predictors' outputs
            are not those yet. ``towers`` holds the level's tower output by branch name. The predictors may
            then have any names.
        num_classes: classes that the detector predicts, or a function of it. Read off the predictors' widths
            unless given.
        bins: of the distribution that each side of a box is predicted as; 1 for plain numbers.
        background: the column of the logits that means no object, where the classes share a softmax, or a
            function of the detector, where teacher and student have other numbers of classes.
        objectness: what the ``"quality"`` predictor predicts is whether there is an object at all, and the
            classes are trained where there is one alone: a class's probability is the product of both (YOLOX,
            YOLOv3 to v7).
        prepare: ``(detector, images, targets)`` returns a `Batch`. Without it images are a tensor (batch,
            channels, height, width), or a list of tensors of one size, which the detector takes as one.
        objects: ``(targets)`` returns, for each image, a pair of boxes (objects, 4), xyxy in pixels, and
            labels (objects,), or a dict of both. Read off a list of dicts of ``boxes`` and ``labels`` unless
            given.
        assign: ``(detector, predictions, anchors, targets)`` returns what `losses` returns beside the losses,
            for a teacher whose anchors are not the student's; ``targets`` is a list of dicts of ``boxes`` and
            ``labels``. Unless given, `losses` is called and what it returns beside the losses is taken.
        detect: ``(detector, images)`` returns what the detector answers in eval mode;
            ``detector(images)`` unless given.
        own_losses: ``(detector, images, targets)`` returns the losses that the detector's own forward gives
            in train mode, or their sum, which the first step compares with those of its pieces. Unless given,
            those of ``detector(images, targets)``; where it takes or returns something else, the outputs of
            its layers are compared.
        pixel_coding: how its pixels are coded, where the other detector's are coded in another way, or a
            function of the detector.
        head_type: by which methods look up published settings: ``"GFL"``, ``"RetinaNet"``, ``"ATSS"``,
            ``"FCOS"``. Unless given, the general ones hold.
        rows: ``"grid"`` where the rows of predictions are places, ``"queries"`` where they are a set in no
            order. Must be given for towers of linear layers, which could be either.
        queries: ``(detector, maps)`` returns what the towers are fed where that is a set: the outputs
            (batch, queries, channels) of a transformer's decoder, or a list of them.

    Raises:
        ValueError: branches, predictors or rows that don't fit together.

    Example:
        >>> class Detector(nn.Module):
        ...     def __init__(self, width: int) -> None:
        ...         super().__init__()
        ...         self.backbone = nn.Conv2d(3, width, 3, stride=8, padding=1)
        ...         self.tower = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        ...         self.logits, self.sides = nn.Conv2d(width, 2, 1), nn.Conv2d(width, 4, 1)
        ...     def forward(self, images, targets=None):
        ...         features = self.tower(self.backbone(images))
        ...         logits, sides = self.logits(features), self.sides(features)
        ...         return {"own": logits.mean()} if self.training else (logits, sides)
        >>> def losses(detector, predictions, anchors, targets):
        ...     return {"own": predictions.logits.mean()}, predictions.logits.amax(-1) > 0
        >>> adapter = generic(
        ...     features="backbone",
        ...     towers={"both": "tower"},
        ...     predictors={"both": {"logits": "logits", "regression": "sides"}},
        ...     losses=losses,
        ...     decode=lambda detector, regression, anchors: regression.exp() * torch.tensor([-1, -1, 1, 1]),
        ... )
        >>> from crosskd import CrossKD, Distiller
        >>> distiller = Distiller(Detector(16), Detector(8), CrossKD(position=1), adapter)
        >>> sorted(distiller(torch.rand(2, 3, 32, 32), []))
        ['kd_cls', 'kd_reg', 'own']
    """

    features: str | Callable[[Any, Tensor], Any]
    towers: Mapping[str, Where | None]
    predictors: Mapping[str, Mapping[str, Where]]
    losses: Callable[[Any, Predictions, Any, Any], tuple[Mapping[str, Tensor], Assigned]] | None = None
    decode: Callable[[Any, Tensor, Any], Tensor] | None = None
    anchors: Callable[[Any, Batch, Sequence[Tensor]], Any] | None = None
    strides: Sequence[float] | Callable[[Any], Sequence[float] | None] | None = None
    widths: Sequence[int] | Callable[[Any], Sequence[int] | None] | None = None
    predict: Callable[[Any, int, Mapping[str, Tensor]], Predictions] | None = None
    num_classes: int | Callable[[Any], int] | None = None
    bins: int = 1
    background: int | Callable[[Any], int | None] | None = None
    objectness: bool = False
    prepare: Callable[[Any, Any, Any], Batch] | None = None
    objects: Callable[[Any], Iterable[Any]] | None = None
    assign: Callable[[Any, Predictions, Any, Any], Assigned] | None = None
    detect: Callable[[Any, Any], Any] | None = None
    own_losses: Callable[[Any, Any, Any], Mapping[str, Tensor] | Tensor | None] | None = None
    pixel_coding: PixelCoding | Callable[[Any], PixelCoding | None] | None = None
    head_type: str | None = None
    rows: Literal["grid", "queries"] | None = None
    queries: Callable[[Any, Sequence[Tensor]], Any] | None = None

    def __post_init__(self) -> None:
        named = {name: list(behind) for name, behind in self.predictors.items()}
        if not self.towers or self.towers.keys() != named.keys() or not all(named.values()):
            raise ValueError(
                "towers and predictors must name the same branches, each with a predictor, got "
                f"{list(self.towers)} and {named}"
            )
        roles = [role for behind in named.values() for role in behind]
        if len(set(roles)) < len(roles):
            raise ValueError(f"two predictors have one name: {roles}")
        usual = {"logits", "regression"} <= set(roles) <= {"logits", "regression", "quality"}
        if not usual and (self.predict is None or self.num_classes is None):
            raise ValueError(
                "the predictors must be one of logits, one of regression and at most one of quality, got "
                f"{roles}: name them so, or pass predict= and num_classes="
            )
        if self.objectness and self.predict is None and "quality" not in roles:
            raise ValueError(
                "objectness=True says that the predictor of quality predicts whether there is an object, but "
                f'the predictors are those of {roles}: name the objectness\'s predictor "quality"'
            )
        if self.bins < 1:
            raise ValueError(f"bins must be at least 1, got {self.bins}")
        if self.rows not in (None, "grid", "queries") or (self.queries is not None and self.rows == "grid"):
            raise ValueError(f'rows must be "grid" or "queries", with queries= the latter, got {self.rows!r}')

    def __call__(self, detector: nn.Module) -> GenericAdapter:
        """The adapter of a detector."""
        return GenericAdapter(detector, self)


class GenericAdapter(Adapter):
    """A detector whose parts a `generic` names.

    Raises:
        ValueError: modules that aren't there, or that don't fit together.
    """

    def __init__(self, detector: nn.Module, spec: generic) -> None:
        self.detector, self.spec = detector, spec
        self._features: Callable[[Tensor], Any]
        if isinstance(spec.features, str):
            self._features = find_modules(detector, spec.features, "features")[0]
        strides = spec.strides(detector) if callable(spec.strides) else spec.strides
        if isinstance(strides, int | float):
            raise ValueError(f"strides= must be one number per level, got {strides}")
        self.strides = None if strides is None else tuple(map(float, strides))
        self.head = GenericHead(detector, spec, self.strides)
        self.heads = (self.head,)
        self.pixel_coding = spec.pixel_coding(detector) if callable(spec.pixel_coding) else spec.pixel_coding
        widths = spec.widths(detector) if callable(spec.widths) else spec.widths
        if widths is None and self.strides is not None and self.head.rows == "grid":
            branch = self.head.branches[0]
            widths = [branch.tower(level).width_in for level in range(len(self.strides))]
        self.widths = None if widths is None else tuple(widths)
        if self.widths and self.strides and len(self.widths) != len(self.strides):
            raise ValueError(
                f"widths= {list(self.widths)} and strides= {list(self.strides)} are of different numbers of "
                "levels: give one of each per level"
            )

    def prepare(self, images: Any, targets: Any) -> Batch:
        """What was given, or the images as they are."""
        if self.spec.prepare is not None:
            batch = self.spec.prepare(self.detector, images, targets)
        else:
            pixels = stacked_images(images, "prepare=")
            batch = Batch(pixels, sizes_of(pixels), targets=targets)
        if batch.objects is None and batch.targets is not None:
            batch = replace(batch, objects=self._objects_of(batch.targets, batch.pixels.device))
        if batch.objects is not None and len(batch.objects) != len(batch.pixels):
            raise ValueError(f"got {len(batch.pixels)} images, but targets for {len(batch.objects)}")
        return batch

    def _objects_of(self, targets: Any, device: torch.device) -> tuple[Objects, ...] | None:
        if self.spec.objects is not None:
            listed = [_object_dict(of_image) for of_image in self.spec.objects(targets)]
        else:
            listed = list(targets) if isinstance(targets, list | tuple) else []
            known = [isinstance(t, Mapping) and {"boxes", "labels"} <= t.keys() for t in listed]
            if not listed or not all(known):
                return None
        objects = []
        for image, target in enumerate(listed):
            boxes, labels = target["boxes"], target["labels"]
            if not isinstance(boxes, Tensor):
                boxes = torch.as_tensor(boxes, dtype=torch.float32, device=device).reshape(-1, 4)
            if not bool(boxes.isfinite().all()):
                raise ValueError(f"targets[{image}] has boxes that are not finite: {boxes}")
            labels = labels if isinstance(labels, Tensor) else torch.as_tensor(labels, device=device).long()
            objects.append(Objects(boxes, labels))
        return tuple(objects)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """The feature extractor's maps.

        Raises:
            ValueError: maps that the head can't be fed.
        """
        features = self.spec.features
        maps = features(self.detector, pixels) if callable(features) else self._features(pixels)
        listed, name, head = _as_list(maps), type(self.detector).__name__, self.head
        shapes = [tuple(feature_map.shape) for feature_map in listed]
        if head.levels not in (None, len(listed)):
            raise ValueError(
                f"features= made {len(listed)} feature maps for {name}, but its strides, towers or "
                f"predictors are those of {head.levels} levels: give one feature map per level, finest first"
            )
        if self.spec.rows is None and head.rows == "grid" and any(len(shape) == 3 for shape in shapes):
            raise ValueError(_unknown_rows(f"features= made {shapes} for {name}"))
        if head.rows == "queries" and any(len(shape) != 4 for shape in shapes):
            raise ValueError(
                f"features= made {shapes} for {name}, no maps (batch, channels, height, width), so methods "
                "of feature maps would compare queries, a set in no order. Let features= give the maps that "
                "the queries are made of, and queries= the queries"
            )
        return listed

    def detect(self, images: Any, targets: Any) -> Any:
        """What was given, or ``detector(images)``."""
        return self.detector(images) if self.spec.detect is None else self.spec.detect(self.detector, images)

    def own_losses(self, images: Any, targets: Any) -> Mapping[str, Tensor] | Tensor | None:
        """What was given, or what the detector's forward returns where that is a scalar or a dict of them."""
        if self.spec.own_losses is not None:
            return self.spec.own_losses(self.detector, images, targets)
        if self.spec.prepare is None:
            images = stacked_images(images, "prepare=")
        try:
            inspect.signature(self.detector.forward).bind(images, targets)
        except TypeError:
            self.detector(images)
            return None
        returned = self.detector(images, targets)
        if isinstance(returned, Tensor) and not returned.ndim:
            return returned
        if not isinstance(returned, Mapping):
            return None
        scalars = all(isinstance(loss, Tensor) and not loss.ndim for loss in returned.values())
        return returned if scalars else None

    def own_outputs(self, batch: Batch) -> list[OwnOutput]:
        """Runs the detector, so that the outputs of its layers are compared.

        With ``prepare`` there is nothing to compare, for a batch would be prepared a second time.
        """
        if self.spec.prepare is not None:
            return []
        self.detect(batch.pixels, None)
        return [OwnOutput(None)]


class GenericHead(Head):
    """The head of a detector whose parts a `generic` names.

    Attributes:
        predictors: by what they predict, one for all levels or one per level.
        per_location: anchors per location, one number for all levels or one per level; ``None`` if unknown.
        levels: how many levels there are; ``None`` if unknown.
    """

    def __init__(self, detector: Any, spec: generic, strides: Sequence[float] | None) -> None:
        self.detector, self.spec = detector, spec
        # With the module's name, so that a class that happens to be called FCOS gets no published settings.
        self.head_type = spec.head_type or f"{type(detector).__module__}.{type(detector).__qualname__}"
        self.bins, self.decodes = spec.bins, spec.decode is not None
        self.background = spec.background(detector) if callable(spec.background) else spec.background
        self.objectness = spec.objectness
        self.predictors: dict[str, tuple[nn.Module, ...]] = {}
        for name, behind in spec.predictors.items():
            for role, where in behind.items():
                self.predictors[role] = find_modules(detector, where, f"predictors[{name!r}][{role!r}]")
        self.branches = tuple(self._branch(name) for name in spec.towers)
        self.rows = self._read_rows()
        self.levels = self._read_levels(strides)
        self.num_classes, self.per_location = self._read_predictors()

    def _branch(self, name: str) -> Branch:
        behind = {role: self.predictors[role] for role in self.spec.predictors[name]}
        first, where = next(iter(behind.values())), self.spec.towers[name]
        found: tuple[nn.Module, ...] = tuple(nn.Sequential() for _ in first)
        if where is not None:
            found = find_modules(self.detector, where, f"towers[{name!r}]")
        towers, predictors = [], {}
        for level, blocks in enumerate(found):
            title = f"{name} tower" + (f" of level {level}" if len(found) > 1 else "")
            width = linear = None
            if isinstance(blocks, nn.Sequential | nn.ModuleList) and not len(blocks):
                predictor = of_level(first, level)
                width, linear = width_of(predictor, "in"), is_linear(predictor)
            towers.append(Tower.of(blocks, title, width, channels_last=linear))
        for role, modules in behind.items():
            for level, module in enumerate(modules):
                predictors[role + (f"[{level}]" if len(modules) > 1 else "")] = module
        return Branch(name, tuple(towers), predictors)

    def _read_rows(self) -> Rows:
        """What a row stands for; raises ``ValueError`` if that is unknown."""
        if self.spec.queries is not None:
            return "queries"
        towers = [tower for branch in self.branches for tower in branch.towers]
        linear = next((tower.name for tower in towers if tower.channels_last), None)
        if linear is not None and self.spec.rows is None:
            raise ValueError(_unknown_rows(f"the {linear} is made of linear layers"))
        return self.spec.rows or "grid"

    def _read_levels(self, strides: Sequence[float] | None) -> int | None:
        """How many levels there are, by the strides or by modules per level; ``None`` if unknown."""
        if self.rows == "queries":
            return None
        counts = {} if strides is None else {"strides": len(strides)}
        counts |= {f"towers of {b.name}": len(b.towers) for b in self.branches if len(b.towers) > 1}
        counts |= {f"predictors of {role}": len(m) for role, m in self.predictors.items() if len(m) > 1}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"{type(self.detector).__name__} has different numbers of levels: {counts}. Name one module "
                "per level, or a single one for all"
            )
        return next(iter(counts.values()), None)

    def _read_predictors(self) -> tuple[int, tuple[int, ...] | None]:
        """The classes, and the anchors per location where the predictors' widths determine them."""
        given, name = self.spec.num_classes, type(self.detector).__name__
        given = given(self.detector) if callable(given) else given
        modules = [module for found in self.predictors.values() for module in found]
        plain = self.spec.predict is None and all(ends_in_a_layer(module) for module in modules)
        if given is not None and not plain:
            return given, None
        classes, per_location = set(), []
        for level in range(max(map(len, self.predictors.values()))):
            widths = {role: width_of(of_level(m, level), "out") for role, m in self.predictors.items()}
            anchors, rest = divmod(widths["regression"], 4 * self.bins)
            if not anchors or rest or widths["logits"] % anchors or widths.get("quality", anchors) != anchors:
                raise ValueError(
                    f"the predictors of {name} give {widths} numbers per location, which don't fit "
                    f"{self.bins} bins for each of 4 sides of each anchor, and one quality: pass bins=, or "
                    "num_classes= and predict="
                )
            per_location.append(anchors)
            classes.add(widths["logits"] // anchors)
        if len(classes | {given} - {None}) > 1:
            raise ValueError(
                f"the predictors of {name} give {sorted(classes)} classes, num_classes= is {given}: each "
                "level must have as many, and where teacher and student differ num_classes= must be a "
                "function of the detector"
            )
        return classes.pop(), tuple(per_location) if plain else None

    # -- one step -----------------------------------------------------------------------------

    def feed(self, maps: Sequence[Tensor]) -> Sequence[Tensor]:
        """The maps, or the queries that are made of them."""
        return maps if self.spec.queries is None else _as_list(self.spec.queries(self.detector, maps))

    def predict(self, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """What was given, or the predictors' outputs as they are.

        Raises:
            ValueError: other classes, background or objectness than the adapter knows of.
        """
        if self.spec.predict is None:
            return self._predicted(level, towers)
        predictions = self.spec.predict(self.detector, level, towers)
        classes = predictions.logits.shape[-1]
        given = classes, predictions.background, predictions.objectness
        if given != (self.num_classes, self.background, self.objectness):
            raise ValueError(
                "predict= gives logits of {} classes with background {} and objectness {} for ".format(*given)
                + f"{type(self.detector).__name__}, but generic() has num_classes={self.num_classes}, "
                f"background={self.background} and objectness={self.objectness}"
            )
        return predictions

    def _predicted(self, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """The predictors' outputs as they are."""
        rows = {}
        for branch, behind in self.spec.predictors.items():
            for role in behind:
                predictor = of_level(self.predictors[role], level)
                output = predictor(towers[branch])
                # One row per location, (batch, locations, numbers); linear layers give the numbers last.
                last = is_linear(predictor)
                rows[role] = (
                    output.reshape(len(output), -1, output.shape[-1]) if last else output.flatten(2).mT
                )
        batch, locations, sides = rows["regression"].shape
        anchors = locations * (sides // (4 * self.bins))
        regression = rows["regression"].reshape(batch, anchors, 4, self.bins)
        return Predictions(
            rows["logits"].reshape(batch, anchors, -1),
            regression.squeeze(-1) if self.bins == 1 else regression,
            rows["quality"].reshape(batch, anchors) if "quality" in rows else None,
            self.background,
            objectness=self.objectness,
        )

    def anchors(self, batch: Batch, maps: Sequence[Tensor]) -> Anchors:
        """What was given, in ``extra``; as boxes, too, where it is boxes or points."""
        given = None if self.spec.anchors is None else self.spec.anchors(self.detector, batch, maps)
        parts = list(given) if isinstance(given, list | tuple) else [given]
        tensors = [part for part in parts if isinstance(part, Tensor) and part.ndim == 2]
        lengths = tuple(len(part) for part in tensors)
        per_level = lengths if self.rows == "queries" else self._per_level(maps, lengths)
        proper = len(tensors) == len(parts) and all(part.shape[1] in (2, 4) for part in tensors)
        boxes = torch.cat(tensors) if proper and sum(lengths) == sum(per_level) else None
        sizes = () if self.rows == "queries" else self._sizes(maps)
        return _OwnAnchors(boxes, per_level, sizes=sizes, extra=given)

    def _sizes(self, maps: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
        """Each map's shape without batch and channels."""
        last = self.branches[0].towers[0].channels_last
        return tuple(tuple(each.shape[1:-1] if last else each.shape[2:]) for each in maps)

    def _per_level(self, maps: Sequence[Tensor], lengths: tuple[int, ...]) -> tuple[int, ...]:
        """How many anchors each level has.

        Args:
            maps: of all levels.
            lengths: of the tensors that the detector's own anchors are.
        """
        locations = [math.prod(size) for size in self._sizes(maps)]
        each = self.per_location
        if each is None:
            if len(lengths) == len(maps) > 1:
                return lengths
            # A predict= of one's own: the anchors tell how many a location has, if there is one per row.
            each = (max(1, sum(lengths) // sum(locations)),)
        each = each if len(each) > 1 else each * len(maps)
        return tuple(number * of_location for number, of_location in zip(locations, each, strict=True))

    def decode(self, predictions: Predictions, anchors: Anchors) -> Tensor:
        """What was given.

        Raises:
            ValueError: nothing was, or what it returns are no boxes.
        """
        if self.spec.decode is None:
            raise ValueError("boxes are to be compared, but the adapter has no decode=")
        boxes = self.spec.decode(self.detector, predictions.regression, anchors.extra)
        wanted = (*predictions.logits.shape[: 3 if predictions.box_per_class else 2], 4)
        if not isinstance(boxes, Tensor) or tuple(boxes.shape) != wanted:
            got = tuple(boxes.shape) if isinstance(boxes, Tensor) else type(boxes).__name__
            raise ValueError(f"decode= must return boxes of shape {wanted}, (batch, anchors, 4), got {got}")
        return boxes

    def losses(
        self, predictions: Predictions, anchors: Anchors, batch: Batch
    ) -> tuple[dict[str, Tensor], Assignment]:
        """What was given; with a mask every anchor counts, and an image without objects as one with one."""
        if self.spec.losses is None:
            raise ValueError("losses= is missing: a detector without it can only be a teacher")
        returned = self.spec.losses(self.detector, predictions, anchors.extra, batch.targets)
        if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[0], Mapping):
            raise ValueError(
                "losses= must return two things, a dict of losses and which anchors hold an object, got "
                f"{kinds_of(returned)}"
            )
        losses, assigned = returned
        return dict(losses), _assignment("losses=", assigned, tuple(predictions.logits.shape[:2]))

    def assign(self, predictions: Predictions, anchors: Anchors, batch: Batch) -> Assignment:
        """What was given, or what `losses` returns beside the losses."""
        assert batch.objects is not None
        # Where an object's class is unknown, any class of an object.
        first = 1 if self.background == 0 else 0
        targets = [{"boxes": o.boxes, "labels": o.labels.clamp(min=first)} for o in batch.objects]
        rows = sum(anchors.per_level)
        if self.spec.assign is not None:
            assigned = self.spec.assign(self.detector, predictions, anchors.extra, targets)
            return _assignment("assign=", assigned, (len(targets), rows))
        # Targets of another form, or predictions of some levels alone, are nothing for losses=.
        if self.spec.losses is None or self.spec.objects or predictions.logits.shape[1] != rows:
            raise ValueError(
                f"the teacher, a {type(self.detector).__name__}, has other anchors than the student or is of "
                "another type, and its losses= can't be called for its label assignment: pass generic() "
                "assign=, or one head_type= for both where they assign labels alike"
            )
        try:
            return self.losses(predictions, anchors, replace(batch, targets=targets))[1]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"losses= failed on targets of the form [{{boxes, labels}}], which the teacher, a "
                f"{type(self.detector).__name__}, is given for its label assignment "
                f"({type(error).__name__}: {error}): pass generic() assign="
            ) from error


@dataclass(frozen=True, eq=False)
class _OwnAnchors(Anchors):
    """Anchors in whatever form a function gave them, which stands in ``extra``."""

    def of_levels(self, levels: Sequence[int]) -> Anchors:
        """Those of some levels alone, in the given order."""
        fewer, extra = super().of_levels(levels), self.extra
        if fewer is self or extra is None:
            return fewer
        if isinstance(extra, Tensor) and len(extra) == sum(self.per_level):
            return replace(fewer, extra=extra[self.rows(levels).to(extra.device)])
        if isinstance(extra, list | tuple) and len(extra) == len(self.per_level):
            return replace(fewer, extra=[extra[level] for level in levels])
        raise ValueError(
            f"{len(levels)} of the teacher's {len(self.per_level)} levels are used, and those of anchors=, "
            f"{kinds_of(extra)}, can't be found: let it return a tensor of {sum(self.per_level)} rows, one "
            "per anchor, or a list of one thing per level"
        )


def stacked_images(images: Any, instead: str) -> Tensor:
    """Images as one tensor (batch, channels, height, width).

    Args:
        images: a tensor, or a list of tensors of one size.
        instead: what to pass for images of another form.

    Raises:
        TypeError: images that are no tensors.
        ValueError: tensors of more than one size.
    """
    if isinstance(images, Tensor):
        return images
    listed = list(images) if isinstance(images, Iterable) else [images]
    if not listed or not all(isinstance(image, Tensor) for image in listed):
        kinds = sorted({type(image).__name__ for image in listed})
        raise TypeError(f"images must be tensors, got {kinds or 'none'}: convert them, or pass {instead}")
    if len({image.shape for image in listed}) > 1:
        shapes = sorted({tuple(image.shape) for image in listed})
        raise ValueError(f"images must be of one shape, got {shapes}: batch them, or pass {instead}")
    return torch.stack(listed)


def sizes_of(pixels: Tensor) -> tuple[tuple[int, int], ...]:
    """The (height, width) of each image of a batch without padding."""
    return ((int(pixels.shape[-2]), int(pixels.shape[-1])),) * len(pixels)


def _assignment(name: str, assigned: Any, wanted: tuple[int, ...]) -> Assignment:
    """What a function returned as an `Assignment` of a shape (batch, anchors)."""
    mask = assigned.positive if isinstance(assigned, Assignment) else assigned
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != wanted:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{name} must return a mask of type bool and shape {wanted}, (batch, anchors), or an Assignment "
            f"with such a mask, got {got}"
        )
    if isinstance(assigned, Assignment):
        return assigned
    positives = mask.sum(dim=1).clamp(min=1).sum().float()
    return Assignment(None, mask, positives)


def _unknown_rows(what: str) -> str:
    return (
        f"{what}, and it isn't known what a row of predictions stands for: a place, the same for teacher and "
        "student, or one of a set of queries in no order, which can't be compared row by row. Pass "
        'rows="grid" for a flattened map or pooled features, rows="queries" for a set, such as a detection '
        "transformer's"
    )


def _as_list(maps: Any) -> list[Tensor]:
    if isinstance(maps, Tensor):
        return [maps]
    return list(maps.values() if isinstance(maps, Mapping) else maps)


def _object_dict(of_image: Any) -> Any:
    """One image's objects as a dict, of a pair or a dict of boxes and labels."""
    if isinstance(of_image, tuple | list) and len(of_image) == 2:
        return dict(zip(("boxes", "labels"), of_image, strict=True))
    return of_image
