"""An adapter for a detector of one's own, made by naming its modules and passing a few functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crosskd.adapters.levels import LevelPairs
from crosskd.adapters.protocol import Inputs
from crosskd.head import Branch, Tower
from crosskd.methods.recipes import HeadRecipe
from crosskd.predictions import Assignment, Predictions, mean_over_ranks

__all__ = ["GenericAdapter"]

Where = str | Callable[[nn.Module], Any]
"""A module of a detector: its path, ``"head.cls_tower"``, or a function that finds it."""

_ROLES = ("logits", "regression", "quality")


class GenericAdapter:
    """Takes apart any detector with a feature extractor and a head of towers and predictors.

    Modules are named by their attribute path, the same for teacher and student, or found by a function of
    the detector. A path with a ``*`` stands for one module a level: ``"heads.*.cls_tower"`` are
    ``heads[0].cls_tower``, ``heads[1].cls_tower``…

    Args:
        features: the module that makes feature maps of pixels, or a function ``(detector, pixels)``:
            a tensor (batch, channels, height, width), a sequence or a dict of them, finest first.
        towers: by branch name, the tower: an ``nn.Sequential`` or ``nn.ModuleList`` of blocks.
        predictors: by branch name, the predictors behind its tower, by what they predict: ``"logits"``,
            ``"regression"``, ``"quality"``. Each gives channels (or, behind linear layers, numbers) of
            all of a location's anchors, one anchor after the other.
        losses: ``(student, predictions, locations, targets)`` gives the student's own losses, and
            either an `Assignment` or a mask (batch, anchors) of the anchors that hold an object.
        decode: ``(detector, regression, locations)`` gives boxes (batch, anchors, 4), xyxy in pixels. It
            may be left out where distributions are compared (``regression="distribution_kl"``).
        predict: ``(detector, level, towers)``, where the predictors' outputs are not yet predictions: gives
            `Predictions` of one level. Without it they are taken as they come.
        locations: ``(detector, inputs, features)``, whatever `losses` and `decode` want to know of
            anchors or points; nothing unless given.
        strides: pixels between locations a level, or a function of the detector.
        prepare: ``(teacher, student, images, targets)`` gives `Inputs`. Without it images are one tensor,
            or tensors of one size, which both detectors take as they are.
        detect: ``(student, images)``, the student's answer in eval; ``student(images)`` unless given.
        check: ``(teacher, student)`` raises ``ValueError`` for whatever else must agree.
        bins: of the distribution that each side is predicted as; 1 for plain numbers.
        detector: the class that this adapter is for; any unless given.
        recipe: settings of the methods for this head, unless they are told otherwise.

    Raises:
        ValueError: branches whose names differ, predictors without logits or regression.

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
        towers: Mapping[str, Where],
        predictors: Mapping[str, Mapping[str, Where]],
        losses: Callable[[Any, Predictions, Any, Any], tuple[dict[str, Tensor], Assignment | Tensor]],
        decode: Callable[[Any, Tensor, Any], Tensor] | None = None,
        predict: Callable[[Any, int, Mapping[str, Tensor]], Predictions] | None = None,
        locations: Callable[[Any, Inputs, Sequence[Tensor]], Any] | None = None,
        strides: Sequence[float] | Callable[[Any], Sequence[float] | None] | None = None,
        prepare: Callable[[Any, Any, Any, Any], Inputs] | None = None,
        detect: Callable[[Any, Any], Any] | None = None,
        check: Callable[[Any, Any], None] | None = None,
        bins: int = 1,
        detector: type[nn.Module] = nn.Module,
        recipe: HeadRecipe = HeadRecipe("own detector", 1, 1.0, 1.0, "giou"),  # noqa: B008  # immutable
    ) -> None:
        if towers.keys() != predictors.keys():
            raise ValueError(
                f"towers and predictors must name the same branches, got {sorted(towers)} and "
                f"{sorted(predictors)}"
            )
        roles = [role for behind in predictors.values() for role in behind]
        if not {"logits", "regression"} <= set(roles) or len(set(roles)) < len(roles):
            raise ValueError(
                f"the predictors must be one of logits, one of regression and at most one of quality, "
                f"got {roles}"
            )
        unknown = sorted(set(roles) - set(_ROLES))
        if unknown and predict is None:
            raise ValueError(
                f"predictors of {unknown} are unknown: name them logits, regression and quality, or pass "
                "predict="
            )
        self._features, self._towers, self._predictors = features, towers, predictors
        self._losses, self._decode, self._predict = losses, decode, predict
        self._locations, self._strides, self._prepare = locations, strides, prepare
        self._detect, self._check = detect, check
        self.bins, self.detector, self.recipe = bins, detector, recipe

    def supports(self, detector: nn.Module) -> bool:
        """Whether a detector is of the class that this adapter is for."""
        return isinstance(detector, self.detector)

    # -- construction -------------------------------------------------------------------------

    def num_classes(self, detector: nn.Module) -> int:
        """How many classes the logits' predictor has, by its width and the regression's."""
        logits, regression = (_width(self._predictor(detector, role, 0)) for role in ("logits", "regression"))
        anchors = regression // (4 * self.bins)
        if regression % (4 * self.bins) or not anchors or logits % anchors:
            raise ValueError(
                f"{type(detector).__name__}: a regression predictor of {regression} channels and one of "
                f"{logits} for logits don't fit {self.bins} bins for each of 4 sides: tell bins="
            )
        return logits // anchors

    def strides(self, detector: nn.Module) -> Sequence[float] | None:
        """What was given."""
        return self._strides(detector) if callable(self._strides) else self._strides

    def check_pair(self, teacher: nn.Module, student: nn.Module, levels: LevelPairs) -> None:
        """Finds every module that was named, and calls what was given as ``check``."""
        for side, detector in (("teacher", teacher), ("student", student)):
            try:
                self.branches(detector)
                if isinstance(self._features, str):
                    detector.get_submodule(self._features)
            except (AttributeError, IndexError, KeyError) as error:
                raise ValueError(f"{side}: {type(detector).__name__} has no such module: {error}") from None
        if self._check is not None:
            self._check(teacher, student)

    def branches(self, detector: nn.Module) -> tuple[Branch, ...]:
        """The branches that were named."""
        branches = []
        for name, where in self._towers.items():
            found = _found(detector, where)
            towers = found if isinstance(found, list) else [found]
            behind = {role: self._predictor(detector, role, None) for role in self._predictors[name]}
            built = []
            for level, tower in enumerate(towers):
                title = f"{name} tower" + (f" of level {level}" if isinstance(found, list) else "")
                width = None if len(tower) else _width_in(next(iter(behind.values())), level)
                built.append(Tower.of(tower, title, width_in=width))
            modules = {role: p for role, p in behind.items() if isinstance(p, nn.Module)}
            branches.append(Branch(name, tuple(built), modules))
        return tuple(branches)

    def _predictor(self, detector: nn.Module, role: str, level: int | None) -> Any:
        """The predictor of a role: that of a level, or, for ``None``, all that there are."""
        where = next(behind[role] for behind in self._predictors.values() if role in behind)
        found = _found(detector, where)
        return found[level] if isinstance(found, list) and level is not None else found

    # -- one step -----------------------------------------------------------------------------

    def prepare(self, teacher: nn.Module, student: nn.Module, images: Any, targets: Any) -> Inputs:
        """What was given, or the images as they are."""
        if self._prepare is not None:
            return self._prepare(teacher, student, images, targets)
        if not isinstance(images, Tensor):
            shapes = {tuple(image.shape) for image in images}
            if len(shapes) != 1:
                raise ValueError(
                    f"images must be one tensor or tensors of one shape, got {sorted(shapes)}: batch them "
                    "beforehand, or pass prepare="
                )
            images = torch.stack(list(images))
        return Inputs(images, images, targets)

    def features(self, detector: nn.Module, pixels: Tensor) -> list[Tensor]:
        """The feature extractor's maps."""
        if isinstance(self._features, str):
            maps = detector.get_submodule(self._features)(pixels)
        else:
            maps = self._features(detector, pixels)
        if isinstance(maps, Tensor):
            return [maps]
        return list(maps.values()) if isinstance(maps, Mapping) else list(maps)

    def predict(self, detector: nn.Module, level: int, towers: Mapping[str, Tensor]) -> Predictions:
        """What was given, or the predictors' outputs as they are."""
        if self._predict is not None:
            return self._predict(detector, level, towers)
        rows = {}
        for branch, behind in self._predictors.items():
            for role in behind:
                rows[role] = _rows(self._predictor(detector, role, level)(towers[branch]))
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
            ValueError: nothing was.
        """
        if self._decode is None:
            raise ValueError(
                "boxes are to be compared, but the adapter was given no decode=: pass it, or "
                'choose CrossKD(regression="distribution_kl") for a head that predicts distributions'
            )
        return self._decode(detector, predictions.regression, locations)

    def losses(
        self, student: nn.Module, predictions: Predictions, locations: Any, inputs: Inputs
    ) -> tuple[dict[str, Tensor], Assignment]:
        """What was given; a mask becomes an assignment in which every anchor counts."""
        losses, assigned = self._losses(student, predictions, locations, inputs.targets)
        if isinstance(assigned, Assignment):
            return losses, assigned
        if assigned.shape != predictions.logits.shape[:2] or assigned.dtype != torch.bool:
            raise ValueError(
                f"losses= must return a mask of type bool and shape {tuple(predictions.logits.shape[:2])}, "
                f"(batch, anchors), or an Assignment, got {assigned.dtype} {tuple(assigned.shape)}"
            )
        positives = assigned.sum(dim=1).clamp(min=1).sum().float()
        return losses, Assignment(None, assigned, mean_over_ranks(positives))

    def detect(self, student: nn.Module, images: Any, targets: Any) -> Any:
        """What was given, or ``student(images)``."""
        return student(images) if self._detect is None else self._detect(student, images)

    def check_locations(self, teacher: Any, student: Any, levels: LevelPairs) -> None:
        """Raises ``ValueError`` where locations that are tensors differ."""
        for theirs, ours in zip(_tensors(teacher), _tensors(student), strict=False):
            # Where levels are left out there are more of the teacher's, and nothing tells which these are.
            if theirs.shape == ours.shape and not torch.allclose(theirs, levels.scale * ours.to(theirs)):
                raise ValueError(
                    f"the locations of the first batch, {tuple(ours.shape)}, have other values for the "
                    "teacher than for the student: both must predict boxes at the same places"
                )


def _found(detector: nn.Module, where: Where) -> Any:
    """A module, or a list of one a level."""
    if not isinstance(where, str):
        found = where(detector)
        return list(found) if isinstance(found, tuple) else found
    before, star, after = where.partition("*")
    if not star:
        return detector.get_submodule(where)
    levels = detector.get_submodule(before.rstrip("."))
    return [level.get_submodule(after.lstrip(".")) for level in levels.children()]


def _width(predictor: Any) -> int:
    """How many numbers a predictor gives at a location."""
    return _integer_of(reversed(list(predictor.modules())), "out_channels", "out_features")


def _width_in(predictor: Any, level: int) -> int:
    """How many channels a predictor takes."""
    module = predictor[level] if isinstance(predictor, list) else predictor
    return _integer_of(module.modules(), "in_channels", "in_features")


def _integer_of(modules: Iterable[nn.Module], *names: str) -> int:
    values = (getattr(module, name, None) for module in modules for name in names)
    found = next((value for value in values if isinstance(value, int)), None)
    if found is None:
        raise ValueError(f"a predictor tells none of {names}: it must have a convolution or a linear layer")
    return found


def _rows(output: Tensor) -> Tensor:
    """A predictor's output as (batch, locations, numbers)."""
    if output.ndim == 4:
        return output.flatten(2).mT
    return output.unsqueeze(1) if output.ndim == 2 else output


def _by_anchor(rows: Tensor, anchors: int) -> Tensor:
    """Rows (batch, locations, anchors · values) as (batch, locations · anchors, values)."""
    return rows.reshape(rows.shape[0], rows.shape[1] * anchors, -1)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a nest of sequences and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from _tensors(part)
