"""`Distiller`: a student, its frozen teacher, and the methods between them."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosskd.adapters import Adapter, Inputs, find_adapter
from crosskd.adapters.levels import LevelPairs, pair_levels
from crosskd.frozen import frozen_copy
from crosskd.head import Branch, Tapped, TapPoint
from crosskd.methods.base import Method, Step
from crosskd.predictions import Assignment, Predictions, assignment_from_teacher, join_levels

__all__ = ["Distiller"]

_logger = logging.getLogger("crosskd")

Taps = dict[str, list[Any]]
"""One method's taps: by branch name, one entry a level."""


ItemT = TypeVar("ItemT")
CallableT = TypeVar("CallableT", bound=Callable[..., Any])


TeacherView = Callable[[Any, Any], Any]
"""Makes the teacher's images of a batch's (images, targets)."""


class _Observed(NamedTuple):
    """What is kept of the teacher's forward.

    Attributes:
        maps: stand-ins for its feature maps, of their shapes.
        predictions: at the student's levels and of the student's classes.
        taps: each method's, by its name.
    """

    maps: Sequence[Tensor]
    predictions: Predictions
    taps: dict[str, Taps]


def _outside_graph(function: CallableT) -> CallableT:
    """Keeps a function out of compiled graphs: `torch.compiler.disable` that keeps its type."""
    return cast(CallableT, torch.compiler.disable(function))  # type: ignore[no-untyped-call, unused-ignore]


class Distiller(nn.Module):
    """Wraps a student so that calling it in training also distils the teacher into it.

    In training ``distiller(images, targets)`` returns the student's own losses under their own names,
    exactly as the student alone would, and the methods' losses (``kd_cls``, ``kd_reg``,
    ``kd_quality``); ``distiller(images)`` returns the methods' losses alone, for images without labels.
    In eval it answers what the student alone would.

    The student is trained in place and stays the plain detector that it was. The teacher is never
    touched: the distiller works on a frozen copy, always in eval mode, that shares its weights' memory.
    ``parameters()`` and ``state_dict()`` hold the student and the methods' projections, never the
    teacher; ``to()``, ``DistributedDataParallel``, ``copy.deepcopy`` and pickling work as for any module.

    Args:
        teacher: a trained detector.
        student: the detector to train, of the same family.
        methods: one method or several. They are copied, so one object may serve several distillers.
        adapter: how to take the detectors apart; found from their types unless given.
        class_map: for a teacher that knows more classes, or the same in another order: the teacher's
            class index for each of the student's. The teacher's other classes are left out.
        teacher_view: called with (images, targets), gives the images that the teacher sees instead of
            the student's: the same scenes at another resolution, in another modality, without
            augmentation. The teacher preprocesses them itself. Its strides may differ from the student's
            by one factor, as the resolution does.
        resize_levels: resize the teacher's features where its levels differ in size from the student's,
            which is an error otherwise.
        unlabelled_threshold: without targets, an anchor of which the teacher is at least this sure
            (class probability) counts as one object in the losses' normaliser.

    Raises:
        ValueError: a pair that can't be distilled, or settings that don't fit it, saying what differs.
        TypeError: no adapter understands the detectors, or something that is not a method.

    References:
        CrossKD (Wang et al., CVPR 2024, arXiv 2306.11369).

    Example:
        >>> from torchvision.models.detection import retinanet_resnet50_fpn
        >>> from crosskd import CrossKD
        >>> def detector():
        ...     return retinanet_resnet50_fpn(
        ...         weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=64
        ...     )
        >>> distiller = Distiller(detector(), detector(), CrossKD())
        >>> targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}]
        >>> losses = distiller([torch.rand(3, 64, 64)], targets)
        >>> sorted(losses)
        ['bbox_regression', 'classification', 'kd_cls', 'kd_reg']
        >>> sum(losses.values()).backward()
    """

    student: nn.Module
    progress: Tensor | None

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        methods: Method | Sequence[Method],
        adapter: Adapter | None = None,
        *,
        class_map: Sequence[int] | None = None,
        teacher_view: TeacherView | None = None,
        resize_levels: bool = False,
        unlabelled_threshold: float = 0.5,
    ) -> None:
        super().__init__()
        teacher, student = _bare("teacher", teacher), _bare("student", student)
        if not 0 < unlabelled_threshold < 1:
            raise ValueError(
                f"unlabelled_threshold is a probability between 0 and 1, got {unlabelled_threshold}"
            )
        self.adapter: Adapter = find_adapter(teacher, student) if adapter is None else adapter
        _check_types(self.adapter, teacher, student)
        self._class_map = _checked_class_map(class_map, *_of_each(self.adapter.num_classes, teacher, student))
        self.teacher_view = teacher_view
        self.resize_levels = resize_levels
        strides = _of_each(self.adapter.strides, teacher, student)
        self._levels = pair_levels(*strides, rescaled=teacher_view is not None)
        _tell_of_left_out_levels(self._levels, strides[0])
        self.adapter.check_pair(teacher, student, self._levels)
        _warn_if_shared(teacher, student)
        self.unlabelled_threshold = unlabelled_threshold
        self.student = student
        # In tuples, so that the module machinery (parameters, state_dict, train) doesn't see them.
        self._teacher = (frozen_copy(teacher),)
        self._checked_student = (student,)
        self.methods = nn.ModuleDict(_named(methods))
        branches = self._teacher_branches(), self.adapter.branches(student)
        for method in self._methods().values():
            method.setup(*branches, self.adapter.recipe)
        self._checked = False
        scheduled = any(method.schedule is not None for method in self._methods().values())
        # (training forwards so far, epoch or -1): saved with the state, so that a resumed run goes on.
        self.register_buffer("progress", torch.tensor([0, -1]) if scheduled else None)
        parameter = next(student.parameters())
        self.methods.to(device=parameter.device, dtype=parameter.dtype)

    # -- the module's face ----------------------------------------------------------------------

    @property
    def teacher(self) -> nn.Module:
        """The frozen copy of the teacher, in eval mode; it shares the teacher's weights."""
        return self._teacher[0]

    def set_epoch(self, epoch: int) -> None:
        """Tells schedules with ``unit="epoch"`` which epoch it is, counted from 0."""
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        if self.progress is not None:
            self.progress[1] = epoch

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        """Moves and casts the teacher along with the student, under ``to``, ``cuda``, ``half``."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call, unused-ignore]
        self.teacher._apply(fn)  # type: ignore[no-untyped-call, unused-ignore]
        return self

    def forward(self, images: Any, targets: Any = None) -> Any:
        """Losses in training, the student's detections in eval.

        Args:
            images: what the student itself takes; for torchvision a list of tensors
                (3, height, width), values from 0 to 1.
            targets: what the student itself takes; for torchvision a list of dicts of ``boxes``
                (objects, 4), xyxy in pixels, and ``labels`` (objects,). ``None`` for unlabelled images.

        Returns:
            In training a flat dict of scalar tensors to be summed; in eval the student's detections.

        Raises:
            ValueError: images or targets that the student would refuse, levels or anchors that differ,
                or a distillation that would have no effect.
        """
        if not self.training:
            return self.adapter.detect(self.student, images, targets)
        if not self.student.training:
            raise ValueError(
                "the distiller is in train mode and its student in eval mode: call distiller.train()"
            )
        factors = self._advance()
        active = {name: m for name, m in self._methods().items() if factors[name] > 0}
        losses, distillation = self._training_losses(images, targets, active)
        self._check_first_step(distillation)
        for name, method in self._methods().items():
            if name not in active:
                distillation[name] = _nothing(method, self.student)
        for name, key, loss in _flat(distillation, losses):
            losses[key] = loss * factors[name] if factors[name] != 1 else loss
        return losses

    # -- one training step ----------------------------------------------------------------------

    def _training_losses(
        self, images: Any, targets: Any, active: Mapping[str, Method]
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """The student's own losses, and each active method's."""
        inputs, seen = self._prepare(images, targets)
        if not active:
            maps = self.adapter.features(self.student, inputs.student_pixels)
            student, _ = self._run_student(maps, active)
            losses, _, _ = self._assign(inputs, maps, student, None)
            return losses, {}
        # The teacher runs first, so that what it needed is freed; but its features are resized to the
        # student's, whose sizes must be known for that.
        first = self.adapter.features(self.student, inputs.student_pixels) if self.resize_levels else None
        view = self._observe_teacher(seen, active, first)
        # Where the teacher has pixels of its own, they are as large as the batch.
        same = seen is inputs
        inputs = replace(inputs, teacher_pixels=_shape_only(inputs.teacher_pixels))
        seen = inputs if same else _without_pixels(seen)
        maps = self.adapter.features(self.student, inputs.student_pixels) if first is None else first
        _check_levels(self._used(view.maps), maps, self._channels_last(), resized=self.resize_levels)
        student, taps = self._run_student(maps, active)
        _check_anchors(view.predictions, student)
        losses, assignment, locations = self._assign(inputs, maps, student, (seen, view))
        assert assignment is not None  # without targets the teacher's predictions give one
        distillation = {
            name: method(
                Step(
                    student=student,
                    teacher=view.predictions,
                    assignment=assignment,
                    teacher_branches=self._teacher_branches(),
                    student_taps=taps[name],
                    teacher_taps=view.taps[name],
                    predict_as_teacher=lambda towers: self._predict_as_teacher(towers, len(maps)),
                    boxes=lambda predictions: self._decode(predictions, locations),
                )
            )
            for name, method in active.items()
        }
        return losses, distillation

    @torch.no_grad()
    def _observe_teacher(
        self, seen: Inputs, active: Mapping[str, Method], student_maps: Sequence[Tensor] | None
    ) -> _Observed:
        """The teacher's predictions, and what each method keeps of its features: no more."""
        maps = self.adapter.features(self.teacher, seen.teacher_pixels)
        last = self._channels_last()
        sizes = None if student_maps is None else [_space(m, last) for m in student_maps]

        def keep(name: str, tapped: Tapped) -> Any:
            return active[name].observe_teacher(tapped.read())

        towers, taps = self._run_towers(self._teacher_branches(), self._used(maps), active, 1, keep)
        if sizes is not None:
            towers = {name: _resized(outputs, sizes, last) for name, outputs in towers.items()}
        predictions = self._predict_as_teacher(towers, len(self._used(maps)))
        return _Observed([_shape_only(m) for m in maps], predictions.detach(), taps)

    def _run_student(
        self, maps: Sequence[Tensor], active: Mapping[str, Method]
    ) -> tuple[Predictions, dict[str, Taps]]:
        branches = self.adapter.branches(self.student)
        towers, taps = self._run_towers(branches, maps, active, 0, lambda _, tapped: tapped)
        predictions = join_levels(
            self.adapter.predict(self.student, level, outputs)
            for level, outputs in _by_level(towers, range(len(maps)))
        )
        return predictions, taps

    def _predict_as_teacher(self, towers: Mapping[str, Iterable[Tensor]], levels: int) -> Predictions:
        """The teacher's predictors on outputs of its towers, of the student's classes alone.

        Args:
            towers: by branch name, one output for each of the student's levels.
            levels: how many the student has.
        """
        indices = self._levels.of_teacher(levels)
        return join_levels(
            self.adapter.predict(self.teacher, level, outputs).of_classes(self._class_map)
            for level, outputs in _by_level(towers, indices)
        )

    def _run_towers(
        self,
        branches: Sequence[Branch],
        maps: Sequence[Tensor],
        active: Mapping[str, Method],
        side: int,
        keep: Callable[[str, Tapped], Any],
    ) -> tuple[dict[str, Iterator[Tensor]], dict[str, Taps]]:
        """Runs a head's towers, tapping them for each method on the way.

        Args:
            branches: of the head.
            maps: a feature map (batch, channels, height, width) a level.
            active: the methods that want taps, by name.
            side: which of a method's two points to tap: 0 the student's, 1 the teacher's.
            keep: what to make of a method's tapped features.

        Returns:
            By branch name, the outputs a level, each made when it is asked for; and the taps, which are
            there once the outputs have been.
        """
        taps: dict[str, Taps] = {name: {} for name in active}

        def outputs(branch: Branch, points: dict[str, TapPoint]) -> Iterator[Tensor]:
            wanted = set(points.values())
            for level, feature_map in enumerate(maps):
                output, noted = branch.tower(level).run(feature_map, wanted)
                for name, point in points.items():
                    taps[name].setdefault(branch.name, []).append(keep(name, noted[point]))
                yield output

        towers = {}
        for branch in branches:
            both = {name: method.points(branch.name) for name, method in active.items()}
            points = {name: pair[side] for name, pair in both.items() if pair is not None}
            towers[branch.name] = outputs(branch, points)
        return towers, taps

    def _used(self, of_levels: Sequence[ItemT]) -> list[ItemT]:
        """Of something for each of the teacher's levels, what is there for the student's."""
        return [of_levels[level] for level in self._levels.of_teacher(len(of_levels))]

    def _teacher_branches(self) -> tuple[Branch, ...]:
        """The teacher's head, with towers for the levels that the student has."""
        return tuple(
            branch if len(branch.towers) == 1 else replace(branch, towers=tuple(self._used(branch.towers)))
            for branch in self.adapter.branches(self.teacher)
        )

    def _channels_last(self) -> bool:
        """Whether the head takes (batch, …, channels): its first tower tells."""
        return self._teacher_branches()[0].towers[0].channels_last

    def _methods(self) -> dict[str, Method]:
        return dict(self.methods.items())  # type: ignore[arg-type]

    # -- what runs outside a compiled graph: it depends on the data, or happens once ---------------

    @_outside_graph
    def _prepare(self, images: Any, targets: Any) -> tuple[Inputs, Inputs]:
        """The batch as the student takes it, and as the teacher does: the same one, without a view."""
        if self.student is not self._checked_student[0]:
            raise ValueError(
                f"distiller.student was replaced by another {type(self.student).__name__}, which was never "
                "checked against the teacher: make a new Distiller for it"
            )
        if self.teacher.training:
            raise ValueError(
                "distiller.teacher is in train mode, in which its answers change: call "
                "distiller.teacher.eval(), or leave its mode alone"
            )
        if not self._checked:
            _check_devices(self.teacher, self.student)
            for side, detector in (("teacher", self.teacher), ("student", self.student)):
                _warn_about_hooks(side, detector, self.adapter.branches(detector))
        inputs = self.adapter.prepare(self.teacher, self.student, images, targets)
        if self.teacher_view is None:
            return inputs, inputs
        view = self.teacher_view(images, targets)
        return inputs, self.adapter.prepare(self.teacher, self.teacher, view, None)

    @_outside_graph
    def _assign(
        self,
        inputs: Inputs,
        maps: Sequence[Tensor],
        student: Predictions,
        teacher: tuple[Inputs, _Observed] | None,
    ) -> tuple[dict[str, Tensor], Assignment | None, Any]:
        """The student's own losses, the assignment that they share with the methods, the locations."""
        locations = self.adapter.locations(self.student, inputs, maps)
        if teacher is not None and not self._checked:
            seen, view = teacher
            if not self.resize_levels:  # else the places differ, as was asked for
                theirs = self.adapter.locations(self.teacher, seen, view.maps)
                self.adapter.check_locations(theirs, locations, self._levels)
        if inputs.targets is not None:
            losses, assignment = self.adapter.losses(self.student, student, locations, inputs)
            return losses, assignment, locations
        if teacher is None:
            return {}, None, locations
        by_quality = self.adapter.recipe.quality_normalizer
        threshold = self.unlabelled_threshold
        return {}, assignment_from_teacher(teacher[1].predictions, threshold, quality=by_quality), locations

    def _decode(self, predictions: Predictions, locations: Any) -> Tensor:
        return self.adapter.decode(self.student, predictions, locations)

    @_outside_graph
    def _advance(self) -> dict[str, float]:
        """Each method's factor at this step; moves the step count on."""
        if self.progress is None:
            return dict.fromkeys(self.methods, 1.0)
        step, epoch = self.progress.tolist()
        factors = {}
        for name, method in self._methods().items():
            if method.schedule is None:
                factors[name] = 1.0
                continue
            if method.schedule.unit == "epoch" and epoch < 0:
                raise ValueError(
                    f"{name} has a schedule in epochs, but the distiller was never told the epoch: call "
                    "distiller.set_epoch(epoch) at the start of each"
                )
            factors[name] = method.schedule.factor(epoch if method.schedule.unit == "epoch" else step)
        self.progress[0] += 1
        return factors

    @_outside_graph
    def _check_first_step(self, distillation: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Refuses, once, a distillation that would silently do nothing."""
        if self._checked or not distillation:
            return
        for name, losses in distillation.items():
            _check_effect(name, losses)
        # Without gradients it can't be seen whether the student would learn: check again when there are.
        self._checked = torch.is_grad_enabled()


def _bare(side: str, detector: nn.Module) -> nn.Module:
    """A detector without the wrapper that ``torch.compile`` puts around it."""
    if not isinstance(detector, nn.Module):
        raise TypeError(f"{side} must be an nn.Module, got {type(detector).__name__}")
    if isinstance(detector, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ValueError(
            f"{side} is wrapped in {type(detector).__name__}: hand in the detector itself, and wrap the "
            "distiller instead"
        )
    compiled = getattr(detector, "_orig_mod", None)
    if isinstance(compiled, nn.Module) or getattr(detector, "_compiled_call_impl", None) is not None:
        warnings.warn(
            f"{side} was compiled as a whole, but distillation runs it stage by stage, so in training it "
            "runs uncompiled: call torch.compile(distiller) instead",
            stacklevel=3,
        )
    return compiled if isinstance(compiled, nn.Module) else detector


def _warn_if_shared(teacher: nn.Module, student: nn.Module) -> None:
    theirs = {parameter.data_ptr() for parameter in teacher.parameters() if parameter.numel()}
    if any(parameter.data_ptr() in theirs for parameter in student.parameters()):
        warnings.warn(
            "teacher and student share weights, so the teacher will change as the student trains: pass "
            "copy.deepcopy(student) as the teacher",
            stacklevel=3,
        )


def _named(methods: Method | Sequence[Method]) -> dict[str, nn.Module]:
    """Copies of the methods under names that differ."""
    listed = [methods] if isinstance(methods, nn.Module) else list(methods)
    if not listed:
        raise ValueError("methods is empty: there is nothing to distil; pass crosskd.CrossKD()")
    named: dict[str, nn.Module] = {}
    for method in listed:
        if not isinstance(method, Method):
            raise TypeError(
                f"methods must be crosskd.Method objects such as crosskd.CrossKD(), got "
                f"{type(method).__name__}"
            )
        name, number = method.name, 2
        while name in named:
            name, number = f"{method.name}_{number}", number + 1
        named[name] = deepcopy(method)
    return named


def _flat(
    distillation: Mapping[str, Mapping[str, Tensor]], own: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, Tensor]]:
    """(method, key, loss) of every loss, with the method's name in front of keys that clash.

    Args:
        distillation: the losses by method and name.
        own: the student's own losses, whose names are taken.
    """
    keys = [*own, *(key for losses in distillation.values() for key in losses)]
    for name, losses in distillation.items():
        for key, loss in losses.items():
            yield name, f"{name}_{key}" if keys.count(key) > 1 else key, loss


def _nothing(method: Method, student: nn.Module) -> dict[str, Tensor]:
    """Zero losses of a method that its schedule has stopped, with a gradient into its projections.

    DistributedDataParallel waits for every parameter's gradient, so the projections get one of zero.
    """
    parameters = list(method.parameters()) or [next(student.parameters())]
    zero = torch.stack([parameter.sum() * 0.0 for parameter in parameters]).sum()
    return dict.fromkeys(method.loss_names(), zero)


def _without_pixels(inputs: Inputs) -> Inputs:
    """What the teacher saw, of which no more than shapes are needed once it has run."""
    shapes = _shape_only(inputs.student_pixels)
    return replace(inputs, student_pixels=shapes, teacher_pixels=shapes)


def _shape_only(tensor: Tensor) -> Tensor:
    """A stand-in of the same shape and no memory, so that what the teacher has used can be freed."""
    return tensor.new_empty(()).expand(tensor.shape)


def _check_devices(teacher: nn.Module, student: nn.Module) -> None:
    theirs, ours = (next(detector.parameters()).device for detector in (teacher, student))
    if theirs != ours:
        raise ValueError(
            f"the teacher is on {theirs} and the student on {ours}: move both with distiller.to(device)"
        )


def _warn_about_hooks(side: str, detector: nn.Module, branches: Iterable[Branch]) -> None:
    """Warns of hooks on modules that distillation doesn't call as a whole, but piece by piece."""
    towers = [tower for branch in branches for tower in branch.towers]
    called = {id(module) for branch in branches for module in branch.predictors.values()}
    called |= {id(layer) for tower in towers for block in tower.blocks for layer in block.layers}
    for path, module in detector.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        inside = (id(child) for child in module.modules() if child is not module)
        if any(hooks) and id(module) not in called and not called.isdisjoint(inside):
            warnings.warn(
                f"{side}: hooks on {path or 'the detector itself'} are not run in training, because "
                "distillation runs it piece by piece: register them on the backbone, on the layers of a "
                "tower or on a predictor",
                stacklevel=4,
            )


def _check_types(adapter: Adapter, teacher: nn.Module, student: nn.Module) -> None:
    for side, detector in (("teacher", teacher), ("student", student)):
        if not adapter.supports(detector):
            raise TypeError(
                f"{type(adapter).__name__} does not support the {side}, a {type(detector).__name__}: leave "
                "adapter= out, or pass one that supports both"
            )


def _checked_class_map(class_map: Sequence[int] | None, teacher: int, student: int) -> tuple[int, ...] | None:
    """The teacher's class for each of the student's; ``None`` where they are the same ones."""
    if class_map is None:
        if teacher != student:
            raise ValueError(
                f"the teacher predicts {teacher} classes and the student {student}: give class_map=, the "
                "teacher's class index for each of the student's, or train a teacher for the student's "
                "classes"
            )
        return None
    indices = tuple(class_map)
    whole = all(isinstance(index, int) and 0 <= index < teacher for index in indices)
    if len(indices) != student or not whole or len(set(indices)) < len(indices):
        raise ValueError(
            f"class_map must name a class of the teacher's, 0 to {teacher - 1}, for each of the student's "
            f"{student}, none of them twice; got {len(indices)}: {list(indices)}"
        )
    return None if indices == tuple(range(teacher)) else indices


def _tell_of_left_out_levels(levels: LevelPairs, strides: Sequence[float] | None) -> None:
    if strides is None or levels.teacher is None:
        return
    left_out = [stride for level, stride in enumerate(strides) if level not in levels.teacher]
    if left_out:
        _logger.info(
            "the teacher's levels of strides %s are left out: the student has none like them", left_out
        )


def _by_level(
    towers: Mapping[str, Iterable[Tensor]], levels: Iterable[int]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The towers' outputs level by level, each asked for when its turn comes."""
    outputs = {name: iter(tower) for name, tower in towers.items()}
    for level in levels:
        yield level, {name: next(tower) for name, tower in outputs.items()}


def _of_each(
    function: Callable[[nn.Module], ItemT], teacher: nn.Module, student: nn.Module
) -> tuple[ItemT, ItemT]:
    """What an adapter says of either detector; its errors say of which."""
    answers = []
    for side, detector in (("teacher", teacher), ("student", student)):
        try:
            answers.append(function(detector))
        except ValueError as error:
            raise ValueError(f"{side}: {error}") from error
    return answers[0], answers[1]


def _space(feature_map: Tensor, channels_last: bool) -> tuple[int, ...]:
    """A level's size without batch and channels: (height, width), (locations,) or ()."""
    return tuple(feature_map.shape[1:-1] if channels_last else feature_map.shape[2:])


def _resized(
    outputs: Iterable[Tensor], sizes: Sequence[tuple[int, ...]], channels_last: bool
) -> Iterator[Tensor]:
    """Feature maps, resized where they have another (height, width)."""
    for output, size in zip(outputs, sizes, strict=True):
        if _space(output, channels_last) == size:
            yield output
            continue
        if output.ndim != 4 or len(size) != 2:
            raise ValueError(
                f"resize_levels=True, but the teacher's features {tuple(output.shape)} are no map of "
                "(height, width): what the student predicts at must be given to the teacher as it is"
            )
        features = output.movedim(-1, 1) if channels_last else output
        features = F.interpolate(features, size=size, mode="bilinear", align_corners=False)
        yield features.movedim(1, -1) if channels_last else features


def _check_levels(
    teacher: Sequence[Tensor], student: Sequence[Tensor], channels_last: bool, *, resized: bool
) -> None:
    theirs, ours = ([_space(m, channels_last) for m in maps] for maps in (teacher, student))
    if theirs != ours and not (resized and len(theirs) == len(ours)):
        raise ValueError(
            f"the levels differ: {theirs} (teacher), {ours} (student) as (height, width). Both need the "
            "same strides, and images of the same size; build them with the same pyramid levels, or have the "
            "teacher's resized by resize_levels=True"
        )


def _check_anchors(teacher: Predictions, student: Predictions) -> None:
    theirs, ours = (p.regression.shape for p in (teacher, student))
    if theirs != ours:
        raise ValueError(
            f"the teacher's predictions are {tuple(theirs)} and the student's {tuple(ours)}, as (batch, "
            "anchors, 4 or 4 x bins): both need as many anchors at each location, and as many bins"
        )


def _check_effect(name: str, losses: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` for losses that are none, warns for one that is zero."""
    if not losses:
        raise ValueError(f"{name} returned no loss at all: give one of its weights a value above 0")
    for key, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"{name}: {key} must be a scalar tensor, shape (), got {got}")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                f"{name}: {key} depends on no trainable parameter of the student, so distilling it has no "
                "effect: the student's features are frozen or detached before the split"
            )
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(
                f"{name}: {key} is {value} on the first step: look for numbers that are not finite in the "
                "images, the teacher's weights or the student's"
            )
        if value == 0:
            warnings.warn(
                f"{name}: {key} is exactly 0 on the first step. That is right if the student equals its "
                "teacher; otherwise nothing is being distilled: an untrained teacher's features may vanish",
                stacklevel=5,
            )
