"""`Distiller`: a student, its frozen teacher, and the methods between them."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from crosskd._heads import Head, Observed, check_anchors, loss_name, shape_only
from crosskd.adapters import Adapter, Inputs, SecondStage, find_adapter
from crosskd.adapters.levels import LevelPairs, pair_levels
from crosskd.adapters.protocol import heads_of
from crosskd.frozen import frozen_copy
from crosskd.head import Branch
from crosskd.methods.base import Method
from crosskd.predictions import Assignment, Predictions, assignment_from_teacher

__all__ = ["Distiller"]

_logger = logging.getLogger("crosskd")

ItemT = TypeVar("ItemT")
CallableT = TypeVar("CallableT", bound=Callable[..., Any])


TeacherView = Callable[[Any, Any], Any]
"""Makes the teacher's images of a batch's (images, targets)."""


def _outside_graph(function: CallableT) -> CallableT:
    """Keeps a function out of compiled graphs: `torch.compiler.disable` that keeps its type."""
    return cast(CallableT, torch.compiler.disable(function))  # type: ignore[no-untyped-call, unused-ignore]


class Distiller(nn.Module):
    """Wraps a student so that calling it in training also distils the teacher into it.

    In training ``distiller(images, targets)`` returns the student's own losses under their own names,
    exactly as the student alone would, and the methods' losses (``kd_cls``, ``kd_reg``,
    ``kd_quality``); ``distiller(images)`` returns the methods' losses alone, for images without labels.
    In eval it answers what the student alone would. A detector of two stages has each of the methods'
    losses twice, under the names of its parts (``kd_rpn_cls``, ``kd_box_cls``).

    The student is trained in place and stays the plain detector that it was. The teacher is never
    touched: the distiller works on a frozen copy, always in eval mode, that shares its weights' memory.
    ``parameters()`` and ``state_dict()`` hold the student and the methods' projections, never the
    teacher; ``to()``, ``DistributedDataParallel``, ``copy.deepcopy`` and pickling work as for any module.

    Args:
        teacher: a trained detector.
        student: the detector to train, of the same family.
        methods: one method or several. They are copied, so one object may serve several distillers. Of a
            detector of two stages a method distils both, or the one that its ``part`` names.
        adapter: how to take the detectors apart; found from their types unless given.
        class_map: for a teacher that knows more classes, or the same in another order: the teacher's
            class index for each of the student's, the background included where the classes share a
            softmax. The teacher's other classes are left out.
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
        named = _named(methods, list(heads_of(self.adapter)))
        self.teacher_view = teacher_view
        self.resize_levels = resize_levels
        self._pair_up(teacher, student, {method.part for method in named.values()}, class_map)
        _check_shared(teacher, student)
        self.unlabelled_threshold = unlabelled_threshold
        self.student = student
        # In tuples, so that the module machinery (parameters, state_dict, train) doesn't see them.
        self._teacher = (frozen_copy(teacher),)
        self._checked_student = (student,)
        self.methods = nn.ModuleDict(named)
        for head in self._heads:
            for method in head.of(self._methods()).values():
                method.setup(head.teacher_branches(), head.source.branches(student), head.source.recipe)
        self._checked = False
        scheduled = any(method.schedule is not None for method in self._methods().values())
        # (training forwards so far, epoch or -1): saved with the state, so that a resumed run goes on.
        self.register_buffer("progress", torch.tensor([0, -1]) if scheduled else None)
        parameter = next(student.parameters())
        self.methods.to(device=parameter.device, dtype=parameter.dtype)

    def _pair_up(
        self,
        teacher: nn.Module,
        student: nn.Module,
        distilled: set[str | None],
        class_map: Sequence[int] | None,
    ) -> None:
        """Settles levels and classes of the pair; raises ``ValueError`` for heads that can't be compared.

        A head that no method distils is run for the student alone, which is then held against itself.

        Args:
            teacher: as the user gave it.
            student: the detector to train.
            distilled: the parts that methods distil; ``None`` stands for the only one.
            class_map: as the user gave it.
        """
        heads = list(heads_of(self.adapter).items())
        first_part, (last_part, last) = heads[0][0], heads[-1]
        self._levels, self._class_map = LevelPairs(None), None
        if first_part in distilled:
            strides = _of_each(self.adapter.strides, teacher, student)
            self._levels = pair_levels(*strides, rescaled=self.teacher_view is not None)
            _tell_of_left_out_levels(self._levels, strides[0])
        if last_part in distilled:
            classes = _of_each(last.num_classes, teacher, student)
            self._class_map = _checked_class_map(class_map, *classes, last.recipe.background)
        elif class_map is not None:
            raise ValueError(
                f"class_map= is for the {last_part!r} head, which no method distils: the {first_part!r} head "
                "has no classes of its own; leave it out"
            )
        self.adapter.check_pair(teacher if first_part in distilled else student, student, self._levels)
        if self._second is not None:
            self._second.check_pair(teacher if last_part in distilled else student, student)

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
        for name, key, loss in _flat(distillation, losses, self._methods()):
            losses[key] = loss * factors[name] if factors[name] != 1 else loss
        return losses

    # -- one training step ----------------------------------------------------------------------

    def _training_losses(
        self, images: Any, targets: Any, active: Mapping[str, Method]
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """The student's own losses, and each active method's."""
        inputs, seen = self._prepare(images, targets)
        head = self._heads[0]
        methods = head.of(active)
        # The teacher runs first, so that what it needed is freed; but where its features are resized to
        # the student's, those sizes must be known for it.
        student_first = self.resize_levels or not active
        maps = self.adapter.features(self.student, inputs.student_pixels) if student_first else ()
        teacher_maps, teacher = self._run_teacher(head, seen, active, maps)
        inputs, seen = _without_teacher_pixels(inputs, seen)
        maps = maps if student_first else self.adapter.features(self.student, inputs.student_pixels)
        student = head.run_student(maps, methods)
        if teacher is not None:
            head.check_levels(teacher_maps, maps, resized=self.resize_levels)
            check_anchors(teacher.predictions, student.predictions)
        losses, assignment, locations = self._assign(inputs, maps, student, seen, teacher_maps, teacher)
        distillation = {}
        if teacher is not None:
            assert assignment is not None  # without targets the teacher's predictions give one
            distillation = head.distil(methods, teacher, student, assignment, locations, len(maps))
        if self._second is not None:
            before = (student.predictions, locations)
            own, distilled = self._run_second(
                self._second, before, (inputs, maps), (seen, teacher_maps), active
            )
            losses, distillation = {**losses, **own}, {**distillation, **distilled}
        return losses, distillation

    def _run_teacher(
        self, head: Head, seen: Inputs, active: Mapping[str, Method], student_maps: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Observed | None]:
        """The teacher's feature maps and what its first head makes of them.

        Args:
            head: the first.
            seen: the teacher's images.
            active: the methods of all heads; without any the teacher isn't run, without one of the first
                head that isn't.
            student_maps: the student's, where the teacher's are resized to them.
        """
        if not active:
            return (), None
        with torch.no_grad():
            maps = self.adapter.features(self.teacher, seen.teacher_pixels)
        methods = head.of(active)
        if methods:
            observed = head.observe_teacher(maps, methods, student_maps if self.resize_levels else None)
        # A second head pools from the maps; otherwise their shapes are all that is still asked for.
        kept = maps if len(methods) < len(active) else [shape_only(m) for m in maps]
        return kept, observed if methods else None

    def _run_second(
        self,
        stage: SecondStage,
        proposed: tuple[Predictions, Any],
        student: tuple[Inputs, Sequence[Tensor]],
        teacher: tuple[Inputs, Sequence[Tensor]],
        active: Mapping[str, Method],
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """The losses of a second head, for the regions that the student's first head proposes.

        Args:
            stage: takes it apart.
            proposed: the first head's predictions and their locations.
            student: the student's inputs and feature maps.
            teacher: the teacher's.
            active: the methods of all heads.
        """
        head, inputs = self._heads[1], student[0]
        methods = head.of(active)
        if inputs.targets is None and not methods:
            return {}, {}
        regions = self._regions(stage, *proposed, inputs)
        observed = None
        if methods:
            with torch.no_grad():
                pooled = stage.features(self.teacher, teacher[1], regions, teacher[0])
            observed = head.observe_teacher(pooled, methods)
        pooled = stage.features(self.student, student[1], regions, inputs)
        run = head.run_student(pooled, methods)
        losses, assignment = self._assign_regions(stage, run, regions, inputs, observed)
        if observed is None:
            return losses, {}
        assert assignment is not None  # without targets the teacher's predictions give one
        check_anchors(observed.predictions, run.predictions)
        return losses, head.distil(methods, observed, run, assignment, regions, len(pooled))

    @property
    def _heads(self) -> tuple[Head, ...]:
        """The detectors' heads, in the order in which they run."""
        sides = self.teacher, self.student
        (part, source), *second = heads_of(self.adapter).items()
        class_map = None if second else self._class_map
        return (
            Head(part, source, *sides, self._levels, class_map),
            *(Head(name, stage, *sides, LevelPairs(None), self._class_map) for name, stage in second),
        )

    @property
    def _second(self) -> SecondStage | None:
        """What takes a second head apart, of an adapter for detectors that have one."""
        return getattr(self.adapter, "second", None)

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
            distilled = [head for head in self._heads if head.of(self._methods())]
            for side, detector, heads in (
                ("teacher", self.teacher, distilled),
                ("student", self.student, self._heads),
            ):
                branches = [branch for head in heads for branch in head.source.branches(detector)]
                _warn_about_hooks(side, detector, branches)
        if self.teacher_view is None:
            inputs = self.adapter.prepare(self.teacher, self.student, images, targets)
            return inputs, inputs
        # Neither sees the other's images, which may even have other channels.
        view = self.teacher_view(images, targets)
        inputs = self.adapter.prepare(self.student, self.student, images, targets)
        return inputs, self.adapter.prepare(self.teacher, self.teacher, view, None)

    @_outside_graph
    def _assign(
        self,
        inputs: Inputs,
        maps: Sequence[Tensor],
        student: Observed,
        seen: Inputs,
        teacher_maps: Sequence[Tensor],
        teacher: Observed | None,
    ) -> tuple[dict[str, Tensor], Assignment | None, Any]:
        """The student's own losses, the assignment that they share with the methods, the locations."""
        locations = self.adapter.locations(self.student, inputs, maps)
        if teacher is not None and not self._checked and not self._resizes(teacher_maps, maps):
            theirs = self.adapter.locations(self.teacher, seen, teacher_maps)
            self.adapter.check_locations(theirs, locations, self._levels)
            if self._levels.scale == 1:
                self._heads[0].check_decoding(teacher.predictions, locations)
        if inputs.targets is not None:
            losses, assignment = self.adapter.losses(self.student, student.predictions, locations, inputs)
            return losses, assignment, locations
        if teacher is None:
            return {}, None, locations
        return {}, self._assignment_from(teacher, self.adapter), locations

    def _resizes(self, teacher_maps: Sequence[Tensor], maps: Sequence[Tensor]) -> bool:
        """Whether levels of the teacher's are resized, so that the two predict at other places."""
        theirs, ours = self._heads[0].level_sizes(teacher_maps, maps)
        return self.resize_levels and theirs != ours

    @_outside_graph
    def _regions(self, stage: SecondStage, predictions: Predictions, locations: Any, inputs: Inputs) -> Any:
        """The student's regions, which are constants."""
        with torch.no_grad():
            return stage.regions(self.student, predictions.detach(), locations, inputs)

    @_outside_graph
    def _assign_regions(
        self, stage: SecondStage, student: Observed, regions: Any, inputs: Inputs, teacher: Observed | None
    ) -> tuple[dict[str, Tensor], Assignment | None]:
        """The student's own losses of its second head, and the assignment that they share."""
        if teacher is not None and not self._checked:
            self._heads[1].check_decoding(teacher.predictions, regions)
        if inputs.targets is not None:
            return stage.losses(self.student, student.predictions, regions, inputs)
        return {}, None if teacher is None else self._assignment_from(teacher, stage)

    def _assignment_from(self, teacher: Observed, source: Adapter | SecondStage) -> Assignment:
        """What the teacher makes of images without targets."""
        own = getattr(source, "assign_unlabelled", None)
        if own is not None:
            assignment: Assignment = own(self.student, teacher.predictions, self.unlabelled_threshold)
            return assignment
        by_quality = source.recipe.quality_normalizer
        return assignment_from_teacher(teacher.predictions, self.unlabelled_threshold, quality=by_quality)

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


def _check_shared(teacher: nn.Module, student: nn.Module) -> None:
    if teacher is student:
        raise ValueError(
            "teacher and student are one object, so there is nothing to distil: to distil a detector into "
            "itself pass copy.deepcopy(student) as the teacher"
        )
    theirs = {parameter.data_ptr() for parameter in teacher.parameters() if parameter.numel()}
    if any(parameter.data_ptr() in theirs for parameter in student.parameters()):
        warnings.warn(
            "teacher and student share weights, so the teacher will change as the student trains: pass "
            "copy.deepcopy(student) as the teacher",
            stacklevel=3,
        )


def _named(methods: Method | Sequence[Method], parts: Sequence[str | None]) -> dict[str, Method]:
    """Copies of the methods under names that differ, each for one of a detector's heads if it has several."""
    listed = [methods] if isinstance(methods, nn.Module) else list(methods)
    if not listed:
        raise ValueError("methods is empty: there is nothing to distil; pass crosskd.CrossKD()")
    named: dict[str, Method] = {}
    for method in listed:
        if not isinstance(method, Method):
            raise TypeError(
                f"methods must be crosskd.Method objects such as crosskd.CrossKD(), got "
                f"{type(method).__name__}"
            )
        for part in _parts_of(method, parts):
            base = method.name if part is None else f"{method.name}_{part}"
            name, number = base, 2
            while name in named:
                name, number = f"{base}_{number}", number + 1
            named[name] = deepcopy(method)
            named[name].part = part
    return named


def _parts_of(method: Method, parts: Sequence[str | None]) -> Sequence[str | None]:
    """Which of a detector's heads a method distils; ``None`` for a detector's only one."""
    if method.part is None:
        return parts
    if method.part not in parts:
        names = [part for part in parts if part is not None]
        choice = f"choose from {', '.join(names)}" if names else "it has one head alone: leave part= out"
        raise ValueError(f"{method.name}: part={method.part!r} is none of this detector's; {choice}")
    return (method.part,)


def _flat(
    distillation: Mapping[str, Mapping[str, Tensor]], own: Mapping[str, Tensor], methods: Mapping[str, Method]
) -> list[tuple[str, str, Tensor]]:
    """(method, key, loss) of every loss, with the method's name in front of keys that clash.

    Args:
        distillation: the losses by method and name.
        own: the student's own losses, whose names are taken.
        methods: the methods, by name.
    """
    named = [
        (name, loss_name(key, methods[name].part), loss)
        for name, losses in distillation.items()
        for key, loss in losses.items()
    ]
    taken = [*own, *(full for _, full, _ in named)]
    flat = []
    for name, full, loss in named:
        part = methods[name].part
        # The key names the part already.
        prefix = name if part is None else "".join(name.rpartition(f"_{part}")[::2])
        flat.append((name, f"{prefix}_{full}" if taken.count(full) > 1 else full, loss))
    return flat


def _nothing(method: Method, student: nn.Module) -> dict[str, Tensor]:
    """Zero losses of a method that its schedule has stopped, with a gradient into its projections.

    DistributedDataParallel waits for every parameter's gradient, so the projections get one of zero.
    """
    parameters = list(method.parameters()) or [next(student.parameters())]
    zero = torch.stack([parameter.sum() * 0.0 for parameter in parameters]).sum()
    return dict.fromkeys(method.loss_names(), zero)


def _without_teacher_pixels(inputs: Inputs, seen: Inputs) -> tuple[Inputs, Inputs]:
    """The student's inputs and the teacher's, of which no more than shapes are needed once it has run."""
    # Where the teacher has pixels of its own, they are as large as the batch.
    same = seen is inputs
    inputs = replace(inputs, teacher_pixels=shape_only(inputs.teacher_pixels))
    if same:
        return inputs, inputs
    shapes = shape_only(seen.student_pixels)
    return inputs, replace(seen, student_pixels=shapes, teacher_pixels=shapes)


def _check_devices(teacher: nn.Module, student: nn.Module) -> None:
    theirs, ours = (next(detector.parameters()) for detector in (teacher, student))
    if theirs.device != ours.device:
        raise ValueError(
            f"the teacher is on {theirs.device} and the student on {ours.device}: move both with "
            "distiller.to(device)"
        )
    if theirs.dtype != ours.dtype and not torch.is_autocast_enabled(ours.device.type):
        raise ValueError(
            f"the teacher's weights are {theirs.dtype} and the student's {ours.dtype}: cast both with "
            "distiller.to(dtype), or run the step under torch.autocast"
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


def _checked_class_map(
    class_map: Sequence[int] | None, teacher: int, student: int, background: int | None
) -> tuple[int, ...] | None:
    """The teacher's class for each of the student's; ``None`` where they are the same ones.

    Args:
        class_map: as the user gave it.
        teacher: how many classes it predicts.
        student: likewise.
        background: the class of either that means no object, where there is one.
    """
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
    if background is not None and indices[background] != background:
        raise ValueError(
            f"class {background} means no object, to the teacher and to the student: class_map must "
            f"leave it where it is, class_map[{background}] = {background}; got {list(indices)}"
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
