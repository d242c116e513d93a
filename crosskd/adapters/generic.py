"""An adapter for a detector of one's own, made by naming its modules and passing a few functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from crosskd.adapters.levels import LevelPairs
from crosskd.adapters.protocol import Inputs
from crosskd.head import Branch, Tower
from crosskd.methods.recipes import HeadRecipe
from crosskd.predictions import Assignment, Predictions, mean_over_ranks

__all__ = ["GenericAdapter"]

Where = str | Callable[[Any], Any]
"""A module of a detector: its path, ``"head.cls_tower"``, or a function that finds it."""

_ROLES = ("logits", "regression", "quality")
_WIDTHS_OUT = ("out_channels", "out_features")
_BOXES = HeadRecipe("own detector", 1, cls_weight=1.0, reg_weight=1.0, regression="giou")
_DISTRIBUTIONS = HeadRecipe(
    "own detector", 1, cls_weight=1.0, reg_weight=4.0, regression="distribution_kl"
)  # the weight that was published for GFL


class GenericAdapter:
    """Takes apart any detector with a feature extractor and a head of towers and predictors.

    A module is named by its attribute path, ``"head.cls_tower"``. A ``*`` in the path stands for one module
    a level: ``"heads.*.cls_tower"`` are ``heads[0].cls_tower``, ``heads[1].cls_tower``… Where a path does
    not do, pass a function of the detector that returns the module, or a list of them, one a level:
    ``lambda detector: [stack[:-1] for stack in detector.stacks]``. Paths and functions serve teacher and
    student alike.

    Args:
        features: the module that makes feature maps of pixels, or a function ``(detector, pixels)``. They
            are one tensor, a sequence or a dict of them, finest first: (batch, channels, height, width);
            for towers of linear layers (batch, channels) or (batch, locations, channels).
        towers: by branch name, the blocks in front of the predictors, an ``nn.Sequential`` or
            ``nn.ModuleList``; ``None`` where the predictors read the feature maps themselves.
        predictors: by branch name, the predictors behind its tower, by what they predict: ``"logits"``
            (before the sigmoid), ``"regression"``, ``"quality"`` (logits of a centerness or an IoU). Each
            gives the numbers of all of a location's anchors, one anchor behind the other.
        losses: ``(student, predictions, locations, targets)`` returns the student's own losses by name,
            and which anchors hold an object: a mask (batch, anchors) of type bool, or an `Assignment` where
            some anchors don't count, or where losses are divided by something else than their number.
        decode: ``(detector, regression, locations)`` returns boxes (batch, anchors, 4), xyxy in pixels. It
            may be left out where distributions are compared instead of boxes.
        locations: ``(detector, inputs, features)`` returns whatever `losses` and `decode` want to know of
            anchors or points; they get ``None`` without it.
        strides: pixels between neighbouring locations, one number a level, or a function of the detector.
            Needed where the teacher has levels that the student lacks.
        predict: ``(detector, level, towers)`` returns a level's `Predictions`, where the predictors' outputs
            are not those yet. ``towers`` holds the level's tower output by branch name. The predictors may
            then have any names.
        num_classes: classes that a detector predicts, or a function of it. Read off the predictors' widths
            unless given.
        bins: of the distribution that each side of a box is predicted as; 1 for plain numbers.
        prepare: ``(teacher, student, images, targets)`` returns `Inputs`. Without it images are a tensor
            (batch, channels, height, width), or a list of tensors of one size, for both detectors alike.
        detect: ``(student, images)`` returns what the student answers in eval; ``student(images)`` unless
            given.
        check: ``(teacher, student)`` raises ``ValueError`` unless anchors, box coding and whatever else
            decides what a prediction means agree.
        detector: the class that this adapter is for; any unless given.
        recipe: what methods do for this head unless told otherwise. Unless given, they split after the
            first block (where there are towers), with weights of 1 and the GIoU loss; with ``bins`` and
            without ``decode``, distributions are compared as for GFL.

    Raises:
        ValueError: branches or predictors that don't fit together, a path that can't be one, a comparison of
            boxes without ``decode``.

    Example:
        >>> class Detector(nn.Module):
        ...     def __init__(self, width: int) -> None:
        ...         super().__init__()
        ...         self.backbone = nn.Conv2d(3, width, 3, stride=8, padding=1)
        ...         self.tower = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        ...         self.logits, self.sides = nn.Conv2d(width, 2, 1), nn.Conv2d(width, 4, 1)
        >>> def losses(student, predictions, locations, targets):
        ...     return {"own": predictions.logits.mean()}, predictions.logits.amax(-1) > 0
        >>> adapter = GenericAdapter(
        ...     features="backbone",
        ...     towers={"both": "tower"},
        ...     predictors={"both": {"logits": "logits", "regression": "sides"}},
        ...     losses=losses,
        ...     decode=lambda detector, regression, locations: regression,
        ... )
        >>> from crosskd import CrossKD, Distiller
        >>> distiller = Distiller(Detector(16), Detector(8), CrossKD(position=1), adapter)
        >>> sorted(distiller(torch.rand(2, 3, 32, 32), []))
        ['kd_cls', 'kd_reg', 'own']
    """

    def __init__(
        self,
        *,
        features: str | Callable[[Any, Tensor], Any],
        towers: Mapping[str, Where | None],
        predictors: Mapping[str, Mapping[str, Where]],
        losses: Callable[[Any, Predictions, Any, Any], tuple[dict[str, Tensor], Assignment | Tensor]],
        decode: Callable[[Any, Tensor, Any], Tensor] | None = None,
        locations: Callable[[Any, Inputs, Sequence[Tensor]], Any] | None = None,
        strides: Sequence[float] | Callable[[Any], Sequence[float] | None] | None = None,
        predict: Callable[[Any, int, Mapping[str, Tensor]], Predictions] | None = None,
        num_classes: int | Callable[[Any], int] | None = None,
        bins: int = 1,
        prepare: Callable[[Any, Any, Any, Any], Inputs] | None = None,
        detect: Callable[[Any, Any], Any] | None = None,
        check: Callable[[Any, Any], None] | None = None,
        detector: type[nn.Module] = nn.Module,
        recipe: HeadRecipe | None = None,
    ) -> None:
        _check_branches(towers, predictors)
        _check_roles([role for behind in predictors.values() for role in behind], predict, num_classes)
        _check_path("features", features, level=False)
        for name, where in towers.items():
            _check_path(f"towers[{name!r}]", where)
            for role, place in predictors[name].items():
                _check_path(f"predictors[{name!r}][{role!r}]", place)
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        if recipe is None:
            recipe = _DISTRIBUTIONS if bins > 1 and decode is None else _BOXES
            if all(tower is None for tower in towers.values()):
                recipe = replace(recipe, position=0)
        if decode is None and recipe.reg_weight and recipe.regression != "distribution_kl":
            raise ValueError(
                f"boxes are to be compared ({recipe.regression}), but decode= is missing: pass the function "
                "that makes boxes of the regression, or a recipe= whose reg_weight is 0"
            )
        self._features, self._towers, self._predictors = features, towers, predictors
        self._losses, self._decode, self._predict = losses, decode, predict
        self._locations, self._strides, self._num_classes = locations, strides, num_classes
        self._prepare, self._detect, self._check = prepare, detect, check
        self.bins, self.detector, self.recipe = bins, detector, recipe

    def supports(self, detector: nn.Module) -> bool:
        """Whether a detector is of the class that this adapter is for."""
        return isinstance(detector, self.detector)

    # -- construction -------------------------------------------------------------------------

    def num_classes(self, detector: nn.Module) -> int:
        """What was given, or what the widths of the predictors tell.

        Raises:
            ValueError: predictors that aren't there, that tell no width, or whose widths don't fit together,
                or don't fit the number that was given.
        """
        given = self._num_classes(detector) if callable(self._num_classes) else self._num_classes
        if given is not None and (self._predict is not None or not self._tells_widths(detector)):
            return given
        counts = {self._classes_of(widths, detector) for widths in self._widths(detector)}
        if len(counts) > 1:
            raise ValueError(
                f"{type(detector).__name__} predicts {sorted(counts)} classes, not as many on each level: "
                "pass num_classes= and predict="
            )
        counted = counts.pop()
        if given not in (None, counted):
            raise ValueError(
                f"num_classes= is {given} for {type(detector).__name__}, whose predictors give {counted} "
                "classes at each anchor: leave it out, or pass a function of the detector"
            )
        return counted

    def _tells_widths(self, detector: nn.Module) -> bool:
        """Whether each predictor surely gives as many numbers as its last layer says."""
        found = self._named_predictors(detector).values()
        return all(_ends_in_a_layer(module) for modules in found for module in _as_list(modules))

    def _widths(self, detector: nn.Module) -> list[dict[str, int]]:
        """How many numbers the predictors give at a location, by role, a level or for all of them."""
        by_role = self._named_predictors(detector)
        levels = max(len(_as_list(found)) for found in by_role.values())
        return [
            {role: _width_out(_of_level(found, level)) for role, found in by_role.items()}
            for level in range(levels)
        ]

    def _classes_of(self, widths: Mapping[str, int], detector: nn.Module) -> int:
        anchors = widths["regression"] // (4 * self.bins)
        fits = anchors and widths["regression"] % (4 * self.bins) == 0 and widths["logits"] % anchors == 0
        if not fits or widths.get("quality", anchors) != anchors:
            raise ValueError(
                f"the predictors of {type(detector).__name__} give {dict(widths)} numbers a location, which "
                f"don't fit {self.bins} bins for each of 4 sides of each anchor, and one quality: tell "
                "bins=, or pass num_classes= and predict="
            )
        return widths["logits"] // anchors

    def strides(self, detector: nn.Module) -> Sequence[float] | None:
        """What was given."""
        return self._strides(detector) if callable(self._strides) else self._strides

    def check_pair(self, teacher: nn.Module, student: nn.Module, levels: LevelPairs) -> None:
        """Finds every module that was named, compares what they tell, calls what was given as ``check``.

        Raises:
            ValueError: modules that aren't there, other anchors a location, towers of another kind of layers.
        """
        counts = []
        for side, detector in (("teacher", teacher), ("student", student)):
            try:
                self.branches(detector)
                counts.append(self._levels(detector))
                if isinstance(self._features, str):
                    _at_path(detector, self._features, "features")
            except (ValueError, TypeError) as error:
                raise ValueError(f"{side}: {error}") from error
        if levels.teacher is None and None not in counts and counts[0] != counts[1]:
            raise ValueError(
                f"the levels differ: {counts[0]} (teacher), {counts[1]} (student), by the modules of each. "
                "Pass strides=, by which the student's are found among the teacher's, which may have more"
            )
        self._check_layouts(teacher, student)
        self._check_anchors(teacher, student, levels)
        if self._check is not None:
            self._check(teacher, student)

    def _check_layouts(self, teacher: nn.Module, student: nn.Module) -> None:
        for theirs, ours in zip(self.branches(teacher), self.branches(student), strict=True):
            last = [branch.tower(0).channels_last for branch in (theirs, ours)]
            if last[0] != last[1]:
                kinds = ["linear layers, channels last" if side else "convolutions" for side in last]
                raise ValueError(
                    f"the {ours.name} tower differs in kind: {kinds[0]} (teacher), {kinds[1]} (student). "
                    "Features of one can't be read by the other: build both of the same kind of layers"
                )

    def _check_anchors(self, teacher: nn.Module, student: nn.Module, levels: LevelPairs) -> None:
        """Compares how many anchors each location has, where predictors tell; else the first step does."""
        sides = teacher, student
        if self._predict is not None or not all(self._tells_widths(detector) for detector in sides):
            return
        theirs, ours = (
            [widths["regression"] // (4 * self.bins) for widths in self._widths(detector)]
            for detector in sides
        )
        pairs = list(levels)
        if levels.teacher is None:
            pairs = [(level, level) for level in range(max(len(theirs), len(ours)))]
        paired = [(theirs[t % len(theirs)], ours[s % len(ours)]) for s, t in pairs]
        if any(a != b for a, b in paired):
            counts = [list(side) for side in zip(*paired, strict=True)]
            raise ValueError(
                f"anchors a location differ, level by level: {counts[0]} (teacher), {counts[1]} (student), "
                "by the widths of the predictors of regression. Boxes are compared anchor by anchor: build "
                "both heads for the same anchors, and train the teacher with them"
            )

    def _levels(self, detector: nn.Module) -> int | None:
        """How many levels a detector has, where strides or modules a level tell."""
        counts = {}
        strides = self.strides(detector)
        if strides is not None:
            counts["strides"] = len(strides)
        for branch in self.branches(detector):
            if len(branch.towers) > 1:
                counts[f"towers of {branch.name}"] = len(branch.towers)
        for role, found in self._named_predictors(detector).items():
            if isinstance(found, list):
                counts[f"predictors of {role}"] = len(found)
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"{type(detector).__name__} has not as many of each a level: {counts}. Name one module a "
                "level, or a single one for all"
            )
        return next(iter(counts.values()), None)

    def branches(self, detector: nn.Module) -> tuple[Branch, ...]:
        """The branches that were named."""
        return tuple(self._branch(detector, name) for name in self._towers)

    def _branch(self, detector: nn.Module, name: str) -> Branch:
        behind = {role: self._predictors_of(detector, name, role) for role in self._predictors[name]}
        where = self._towers[name]
        first = next(iter(behind.values()))
        found: Any
        if where is None:
            found = [nn.Sequential() for _ in first] if isinstance(first, list) else nn.Sequential()
        else:
            found = _found(detector, where, f"towers[{name!r}]")
        towers = []
        for level, blocks in enumerate(_as_list(found)):
            title = f"{name} tower" + (f" of level {level}" if isinstance(found, list) else "")
            towers.append(_tower(blocks, title, _of_level(first, level)))
        predictors = {
            role + (f"[{level}]" if isinstance(modules, list) else ""): module
            for role, modules in behind.items()
            for level, module in enumerate(_as_list(modules))
        }
        return Branch(name, tuple(towers), predictors)

    def _named_predictors(self, detector: nn.Module) -> dict[str, nn.Module | list[nn.Module]]:
        """By role, the predictor, or one a level."""
        return {
            role: self._predictors_of(detector, name, role)
            for name, behind in self._predictors.items()
            for role in behind
        }

    def _predictors_of(self, detector: nn.Module, branch: str, role: str) -> nn.Module | list[nn.Module]:
        return _found(detector, self._predictors[branch][role], f"predictors[{branch!r}][{role!r}]")

    # -- one step -----------------------------------------------------------------------------

    def prepare(self, teacher: nn.Module, student: nn.Module, images: Any, targets: Any) -> Inputs:
        """What was given, or the images as they are."""
        if self._prepare is not None:
            return self._prepare(teacher, student, images, targets)
        if not isinstance(images, Tensor):
            listed = list(images)
            if not listed or not all(isinstance(image, Tensor) for image in listed):
                kinds = sorted({type(image).__name__ for image in listed})
                raise TypeError(
                    f"images must be tensors, got {kinds or 'none'}: convert them, or pass prepare="
                )
            if len({image.shape for image in listed}) > 1:
                shapes = sorted({tuple(image.shape) for image in listed})
                raise ValueError(
                    f"images must be one tensor or tensors of one shape, got {shapes}: batch them "
                    "beforehand, or pass prepare="
                )
            images = torch.stack(listed)
        return Inputs(images, images, targets)

    def features(self, detector: nn.Module, pixels: Tensor) -> list[Tensor]:
        """The feature extractor's maps."""
        if isinstance(self._features, str):
            maps = _at_path(detector, self._features, "features")(pixels)
        else:
            maps = self._features(detector, pixels)
        if not isinstance(maps, Tensor):
            maps = list(maps.values() if isinstance(maps, Mapping) else maps)
        listed = [maps] if isinstance(maps, Tensor) else maps
        levels = self._levels(detector)
        if levels not in (None, len(listed)):
            raise ValueError(
                f"features= made {len(listed)} feature maps for {type(detector).__name__}, but its strides, "
                f"towers or predictors are those of {levels} levels: give one feature map a level, "
                "finest first"
            )
        return listed

    def predict(self, detector: nn.Module, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """What was given, or the predictors' outputs as they are."""
        predict = self._predict or self._predicted
        predictions = predict(detector, level, towers)
        classes, given = predictions.logits.shape[-1], self._num_classes
        if isinstance(given, int) and classes != given:
            raise ValueError(
                f"num_classes= is {given}, but {type(detector).__name__} gives logits of {classes} classes: "
                "pass a function of the detector, for teacher and student may differ"
            )
        return predictions

    def _predicted(self, detector: nn.Module, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """The predictors' outputs as they are."""
        rows = {}
        for branch, behind in self._predictors.items():
            for role in behind:
                found = self._predictors_of(detector, branch, role)
                predictor = _of_level(found, level)
                rows[role] = _rows(predictor(towers[branch]), last=_is_linear(predictor))
        anchors = rows["regression"].shape[-1] // (4 * self.bins)
        logits, regression = (_by_anchor(rows[role], anchors) for role in ("logits", "regression"))
        if self.bins > 1:
            regression = regression.reshape(*regression.shape[:2], 4, self.bins)
        quality = _by_anchor(rows["quality"], anchors).squeeze(-1) if "quality" in rows else None
        return Predictions(logits, regression, quality)

    def locations(self, detector: nn.Module, inputs: Inputs, features: Sequence[Tensor]) -> Any:
        """What was given, or nothing."""
        return None if self._locations is None else self._locations(detector, inputs, features)

    def decode(self, detector: nn.Module, predictions: Predictions, locations: Any) -> Tensor:
        """What was given.

        Raises:
            ValueError: nothing was, or what it returns are no boxes.
        """
        if self._decode is None:
            raise ValueError(
                "boxes are to be compared, but decode= is missing: pass it to the adapter, or leave "
                "the method's regression= and reg_weight= as its recipe has them"
            )
        boxes = self._decode(detector, predictions.regression, locations)
        wanted = (*predictions.logits.shape[:2], 4)
        if not isinstance(boxes, Tensor) or tuple(boxes.shape) != wanted:
            got = tuple(boxes.shape) if isinstance(boxes, Tensor) else type(boxes).__name__
            raise ValueError(f"decode= must return boxes of shape {wanted}, (batch, anchors, 4), got {got}")
        return boxes

    def losses(
        self, student: nn.Module, predictions: Predictions, locations: Any, inputs: Inputs
    ) -> tuple[dict[str, Tensor], Assignment]:
        """What was given; with a mask every anchor counts, and an image without objects as one with one."""
        returned = self._losses(student, predictions, locations, inputs.targets)
        if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[0], Mapping):
            raise ValueError(
                "losses= must return two things, a dict of losses and which anchors hold an object, got "
                f"{_kinds(returned)}"
            )
        losses, assigned = returned
        if isinstance(assigned, Assignment):
            return dict(losses), assigned
        wanted = tuple(predictions.logits.shape[:2])
        if not isinstance(assigned, Tensor) or assigned.dtype != torch.bool or assigned.shape != wanted:
            tensor = isinstance(assigned, Tensor)
            got = f"{assigned.dtype} {tuple(assigned.shape)}" if tensor else type(assigned).__name__
            raise ValueError(
                f"losses= must return, beside the losses, a mask of type bool and shape {wanted}, "
                f"(batch, anchors), or an Assignment, got {got}"
            )
        positives = assigned.sum(dim=1).clamp(min=1).sum().float()
        return dict(losses), Assignment(None, assigned, mean_over_ranks(positives))

    def detect(self, student: nn.Module, images: Any, targets: Any) -> Any:
        """What was given, or ``student(images)``."""
        return student(images) if self._detect is None else self._detect(student, images)

    def check_locations(self, teacher: Any, student: Any, levels: LevelPairs) -> None:
        """Raises ``ValueError`` where tensors in the locations differ.

        They may stand in sequences, dicts and dataclasses. Of a sequence of one thing a level those of the
        levels that are used are compared.
        """
        for theirs, ours in _pairs(teacher, student, levels):
            # A tensor of all levels has other rows where levels are left out: nothing tells which these are.
            # Where strides differ by a factor so do places and sizes, but not what else may be counted.
            if theirs.shape != ours.shape or (levels.scale != 1 and not ours.is_floating_point()):
                continue
            if not torch.allclose(theirs.float(), levels.scale * ours.to(theirs.device).float()):
                raise ValueError(
                    f"the locations of the first batch, {tuple(ours.shape)}, have other values for the "
                    "teacher than for the student: both must predict boxes at the same places"
                )


def _check_branches(towers: Mapping[str, Any], predictors: Mapping[str, Mapping[str, Any]]) -> None:
    if not towers or towers.keys() != predictors.keys() or not all(predictors.values()):
        raise ValueError(
            "towers and predictors must name the same branches, each with a predictor, got "
            f"{list(towers)} and { ({name: list(behind) for name, behind in predictors.items()}) }"
        )


def _check_roles(roles: Sequence[str], predict: Any, num_classes: Any) -> None:
    if len(set(roles)) < len(roles):
        raise ValueError(f"two predictors have one name: {list(roles)}")
    usual = {"logits", "regression"} <= set(roles) <= set(_ROLES)
    if predict is None and not usual:
        raise ValueError(
            f"the predictors must be one of logits, one of regression and at most one of quality, got "
            f"{list(roles)}: name them so, or pass predict="
        )
    if num_classes is None and not usual:
        raise ValueError(
            f"the number of classes can't be read off predictors named {list(roles)}: pass num_classes="
        )


def _check_path(name: str, where: Any, *, level: bool = True) -> None:
    """Raises ``ValueError`` for a path that no detector could have."""
    if not isinstance(where, str):
        return
    parts = where.split(".")
    stars = parts.count("*")
    if not all(part == "*" or part.isidentifier() or part.isdecimal() for part in parts) or stars > level:
        raise ValueError(
            f"{name}: {where!r} is no attribute path, such as 'head.tower'"
            + (" or, with one * for all levels, 'heads.*.tower'" if level else "")
            + "; a function of the detector may find what a path can't"
        )


def _found(detector: nn.Module, where: Where, name: str) -> nn.Module | list[nn.Module]:
    """The module that a path or a function names, or a list of one a level."""
    if isinstance(where, str):
        found = _at_path(detector, where, name)
    else:
        try:
            found = where(detector)
        except (AttributeError, IndexError, KeyError) as error:
            raise ValueError(
                f"{name}: the function failed on {type(detector).__name__}: {error!r}"
            ) from error
    found = list(found) if isinstance(found, tuple) else found
    if not _as_list(found) or not all(isinstance(module, nn.Module) for module in _as_list(found)):
        raise ValueError(
            f"{name} must be a module of {type(detector).__name__} or a list of them, one a level, got "
            f"{_kinds(found)}"
        )
    return found


def _at_path(detector: nn.Module, path: str, name: str) -> Any:
    modules = [detector]
    before = type(detector).__name__
    for part in path.split("."):
        if part == "*":
            modules = [child for child in modules[0]._modules.values() if child is not None]
        else:
            missing = [m for m in modules if not isinstance(getattr(m, part, None), nn.Module)]
            if missing:
                raise ValueError(
                    f"{name}: there is no module {path!r} in {type(detector).__name__}: {before} has no "
                    f"{part!r}, but {list(missing[0]._modules) or 'no modules at all'}"
                )
            modules = [getattr(module, part) for module in modules]
        before = part if before == type(detector).__name__ else f"{before}.{part}"
    return modules if "*" in path else modules[0]


def _tower(blocks: Any, title: str, predictor: nn.Module) -> Tower:
    """A tower; where it has no layers, its predictor tells what it is fed."""
    if isinstance(blocks, nn.Sequential | nn.ModuleList) and not len(blocks):
        return Tower.of(blocks, title, _width_in(predictor), channels_last=_is_linear(predictor))
    return Tower.of(blocks, title)


def _as_list(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]


def _of_level(found: nn.Module | list[nn.Module], level: int) -> nn.Module:
    """The module of a level; of too few for all levels any, for `features` refuses those."""
    return found[level % len(found)] if isinstance(found, list) else found


def _kinds(value: Any) -> str:
    """The types of what somebody returned."""
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {[type(part).__name__ for part in value]}"
    return type(value).__name__


def _width_out(predictor: nn.Module) -> int:
    """How many numbers a predictor gives at a location."""
    return _integer_of(predictor, reversed(list(predictor.modules())), *_WIDTHS_OUT)


def _width_in(predictor: nn.Module) -> int:
    """How many channels a predictor takes."""
    return _integer_of(predictor, predictor.modules(), "in_channels", "in_features")


def _ends_in_a_layer(predictor: nn.Module) -> bool:
    while isinstance(predictor, nn.Sequential) and len(predictor):
        predictor = predictor[-1]
    return _integer_in([predictor], *_WIDTHS_OUT) is not None


def _integer_in(modules: Iterable[nn.Module], *names: str) -> int | None:
    values = (getattr(module, name, None) for module in modules for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _integer_of(predictor: nn.Module, modules: Iterable[nn.Module], *names: str) -> int:
    found = _integer_in(modules, *names)
    if found is None:
        raise ValueError(
            f"the predictor {type(predictor).__name__} has neither {' nor '.join(names)}, nor has a layer of "
            "it: make it of convolutions or linear layers"
        )
    return found


def _is_linear(predictor: nn.Module) -> bool:
    """Whether a predictor gives (batch, …, numbers), as linear layers do."""
    layers = [m for m in predictor.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    return bool(layers) and isinstance(layers[-1], nn.Linear)


def _rows(output: Tensor, *, last: bool) -> Tensor:
    """A predictor's output as (batch, locations, numbers)."""
    if last:
        return output.reshape(output.shape[0], -1, output.shape[-1])
    return output.flatten(2).mT


def _by_anchor(rows: Tensor, anchors: int) -> Tensor:
    """Rows (batch, locations, anchors · values) as (batch, locations · anchors, values)."""
    return rows.reshape(rows.shape[0], rows.shape[1] * anchors, -1)


def _pairs(teacher: Any, student: Any, levels: LevelPairs) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors of two nests of sequences, dicts and dataclasses that stand at the same places."""
    if isinstance(teacher, Tensor) and isinstance(student, Tensor):
        yield teacher, student
        return
    theirs, ours = _parts(teacher), _parts(student)
    used = levels.teacher or ()
    if isinstance(student, Sequence) and len(ours) == len(used) and max(used) < len(theirs) != len(ours):
        theirs = {place: theirs[index] for place, index in enumerate(used)}
    for place in ours:
        if place in theirs:
            yield from _pairs(theirs[place], ours[place], levels)


def _parts(value: Any) -> dict[Any, Any]:
    """What a container holds, by place."""
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return dict(enumerate(value)) if listed else {}
