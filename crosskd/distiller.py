"""`Distiller`: a student, its frozen teacher, and the methods between them."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from crosskd._guards import (
    GradientWatch,
    TrainingWatch,
    bare,
    check_devices,
    check_effect,
    check_frozen,
    check_same_pixels,
    check_scale,
    check_sharding,
    check_shared,
    check_strides,
    check_trainable,
    is_sharded,
)
from crosskd.adapters import find_adapter
from crosskd.adapters.base import Adapter, AdapterSpec, Batch, Head, recoded
from crosskd.cache import TeacherCache
from crosskd.frozen import frozen_copy, sharing_memo
from crosskd.methods.base import Method
from crosskd.pairing import ClassMap, Pair, class_columns, match_levels
from crosskd.proof import prove_student, prove_teacher, prove_unlabelled
from crosskd.running import (
    points_of,
    run_region_heads,
    run_teacher,
    steps_of,
    teacher_autocast,
    with_own_losses,
)
from crosskd.step import DetectorTrace, Step, Trace, between_graphs, outside_graph, run_head
from crosskd.views import check_same_scene, unpadded

__all__ = ["Distiller"]

_logger = logging.getLogger("crosskd")

TeacherView = Callable[[Any, Any], Any]
"""Makes the teacher's images of a batch's (images, targets)."""


class Distiller(nn.Module):
    """Wraps a student so that calling it in training also distils the teacher into it.

    In training ``distiller(images, targets)`` returns the student's own losses under their own names,
    exactly as the student alone would, and the methods' losses (``kd_cls``, ``kd_reg``…);
    ``distiller(images)`` returns the methods' losses alone, for images without labels. In eval it returns
    what the student alone would. Of a detector with two heads each loss of a method has the head's name in
    its own (``kd_rpn_cls``, ``kd_box_cls``).

    The student is trained in place and stays the plain detector that it was. The teacher is never
    changed: the distiller works on a frozen copy, always in eval mode, that shares its weights' memory.
    Weights that are loaded into the teacher later take effect, except by ``load_state_dict(assign=True)``,
    which replaces its tensors; the distiller warns of that.
    ``parameters()`` and ``state_dict()`` hold the student and what the methods train, never the teacher;
    ``to()``, ``DistributedDataParallel``, ``copy.deepcopy`` and pickling work as for any module; a deep copy
    shares the teacher's weights' memory too, a pickle holds them.

    Both detectors are run piece by piece. On the first step the pieces are compared with the detectors' own
    forward, once: the teacher's predictions, and the student's own losses under the same random numbers.

    Args:
        teacher: a trained detector or backbone of any type that an adapter understands.
        student: the detector to train.
        methods: one method or several. They are copied, so one object may serve several distillers. Of a
            detector with two heads a method distils both, or the one that its ``head`` names.
        adapter: makes the adapter of the student, and of the teacher unless ``teacher_adapter`` is given: an
            adapter's class, or what `crosskd.adapters.generic` returns. Found from the type unless given.
        teacher_adapter: makes the teacher's.
        class_map: for a teacher that knows more classes, or the same in another order: the teacher's
            class index for each of the student's, the background included where the classes share a
            softmax. The teacher's other classes are left out.
        teacher_view: called with (images, targets), gives the images that the teacher sees instead of
            the student's: the same scenes at another resolution, in another modality, without
            augmentation. The teacher preprocesses them itself. Its strides may differ from the student's
            by one factor, as the resolution does.
        view_scale: how many times as large as the student's the teacher's images are, where the strides allow
            several answers; else it is the factor by which most levels have equal strides.
        resize_levels: bring the teacher's predictions to the student's locations where its images are of
            another size than the strides say, which is an error otherwise.
        teacher_dtype: ``torch.bfloat16`` or ``torch.float16``: what the teacher's own forward calculates in,
            by autocast, while the student stays in float32. Its weights, and the part of it that the
            student's features pass in the cross-head, stay as they are. Under autocast the teacher is cheap
            already: leave it out.
        teacher_cache: a folder on disk from which what the methods read of the teacher is taken, where it has
            seen the same pixels before: `crosskd.cache.TeacherCache`.
        unlabelled_threshold: without targets, an anchor of which the teacher is at least this sure
            (class probability) counts as one object in the losses' normalizer.
        prove: compare the pieces with the detectors' own forward on the first step. To be switched off for a
            detector whose own forward can't be called on its own.

    Attributes:
        pair: the two adapters, the levels that belong together, the class map.
        unscheduled: the losses of the last training step by name, detached and before the schedules' factors;
            0 for a method at rest, whose teacher was not run.

    Raises:
        ValueError: a pair that can't be distilled, or settings that don't fit it, saying what differs.
        TypeError: no adapter understands a detector, or something that is not a method.

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
        adapter: AdapterSpec | None = None,
        *,
        teacher_adapter: AdapterSpec | None = None,
        class_map: ClassMap | None = None,
        teacher_view: TeacherView | None = None,
        view_scale: float | None = None,
        resize_levels: bool = False,
        teacher_dtype: torch.dtype | None = None,
        teacher_cache: TeacherCache | None = None,
        unlabelled_threshold: float = 0.5,
        prove: bool = True,
    ) -> None:
        super().__init__()
        teacher, student = bare("teacher", teacher), bare("student", student)
        _check_settings(teacher_view, view_scale, teacher_dtype, teacher_cache, unlabelled_threshold)
        check_shared(teacher, student)
        self.teacher_view, self.view_scale, self.resize_levels = teacher_view, view_scale, resize_levels
        self.teacher_dtype, self.teacher_cache = teacher_dtype, teacher_cache
        self.unlabelled_threshold, self.prove = unlabelled_threshold, prove
        hint = ""
        if adapter is not None and teacher_adapter is None and type(teacher) is not type(student):
            hint = (
                ". adapter= serves both sides unless teacher_adapter= is given: for a "
                f"{type(teacher).__name__} pass teacher_adapter=, such as crosskd.adapters.find_adapter for "
                "a type that the library knows"
            )
        spec = teacher_adapter or adapter or find_adapter
        theirs = _bound("teacher", spec, frozen_copy(teacher), hint)
        if teacher_cache is not None:
            teacher_cache.check(theirs)
        self._student_spec = adapter or find_adapter
        ours = _bound("student", self._student_spec, student)
        _check_student(ours)
        self.student = student
        # In plain objects, so that the module machinery (parameters, state_dict, train) doesn't see the
        # teacher.
        self.pair = self._paired(theirs, ours, class_map)
        self._structure = dict(student.named_modules())
        # The user's own teacher, and which parameters it had; a copy of the distiller knows of none.
        self._given: tuple[Any, list[int]] | None = (ref(teacher), [id(p) for p in teacher.parameters()])
        self._own_names: set[str] = set()
        self._proved: set[str] = set()
        self._checked: set[str] = set()
        self._gradients = GradientWatch()
        self.methods = nn.ModuleDict(_named(methods, ours.heads))
        self._pairs = {name: _of_method(method, self.pair) for name, method in self._methods().items()}
        for name, method in self._methods().items():
            method.setup(self._pairs[name])
        _warn_of_conflicts(self._methods())
        scheduled = any(method.schedule is not None for method in self._methods().values())
        # (training forwards with gradients so far, epoch or -1): saved with the state, for a resumed run.
        self.register_buffer("progress", torch.tensor([0, -1]) if scheduled else None)
        parameter = next(student.parameters())
        self.methods.to(device=parameter.device, dtype=parameter.dtype)
        # Until an optimizer is seen to move what the methods train.
        trains = next(self.methods.parameters(), None) is not None
        self._watch: TrainingWatch | None = TrainingWatch() if trains else None
        self.unscheduled: dict[str, Tensor] = {}

    def _paired(self, teacher: Adapter, student: Adapter, class_map: ClassMap | None) -> Pair:
        """The two adapters, with levels of equal strides and the class map checked."""
        view = self.teacher_view is not None
        if not view:
            check_same_pixels(teacher, student)
        levels, scale = None, 1.0
        if teacher.strides is not None and student.strides is not None:
            levels, scale = match_levels(
                teacher.strides, student.strides, rescaled=view, scale=self.view_scale
            )
        columns = None
        if class_map is not None:
            last, own = teacher.heads[-1:], student.heads[-1]
            theirs, ours = last[0].background if last else None, own.background
            if not last or (theirs is None) != (ours is None):
                background = f"background column {theirs}" if last else "no head"
                raise ValueError(
                    f"class_map= maps the classes of two heads of one kind: {background} (teacher), "
                    f"background column {ours} (student), None for a sigmoid per class. Leave it out: "
                    "crosskd.CrossKD(), or crosskd.DecoderCrossKD() between decoders, compares all of the "
                    "teacher's own classes, crosskd.PKD() none"
                )
            columns = class_columns(class_map, last[0].num_classes, own.num_classes, (theirs, ours))
        pair = Pair(
            teacher,
            student,
            levels=levels,
            scale=scale,
            class_map=columns,
            resize_levels=self.resize_levels,
            teacher_dtype=self.teacher_dtype,
        )
        left_out, _ = pair.left_out()
        if left_out and levels:
            message = "the teacher's levels of strides %s are left out: the student has none like them"
            strides = teacher.strides or ()
            finest = min(strides[level] for _, level in levels)
            if left_out[0] < finest:
                # Measured: it cost a class of small objects up to 14 of its 15 AP (docs/benchmarks.md).
                _logger.warning(
                    f"{message}. Small objects that the teacher finds there are background to the levels "
                    "that teach the student: better take a teacher whose finest level is of stride %g",
                    left_out,
                    finest,
                )
            else:
                _logger.info(message, left_out)
        return pair

    # -- the module's face ----------------------------------------------------------------------

    @property
    def teacher(self) -> nn.Module:
        """The frozen copy of the teacher, in eval mode; it shares the teacher's weights."""
        return self.teacher_adapter.detector

    @property
    def teacher_adapter(self) -> Adapter:
        """Takes the frozen teacher apart."""
        return self.pair.teacher

    @property
    def student_adapter(self) -> Adapter:
        """Takes the student apart."""
        return self.pair.student

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of schedules with ``unit="epoch"``, counted from 0."""
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        if self.progress is not None:
            self.progress[1] = epoch

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        """Moves and casts the teacher along with the student, under ``to``, ``cuda``, ``half``."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call, unused-ignore]
        self.teacher._apply(fn)  # type: ignore[no-untyped-call, unused-ignore]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Refuses the file of a student alone; steps count from 0 where a schedule is new."""
        strict = arguments[1]
        wrapped = f"module.{prefix}student."
        if strict and any(key.startswith(wrapped) for key in state_dict):
            raise ValueError(
                "this is the state of a distiller inside DistributedDataParallel, whose keys start with "
                "module. Load it into such a one, or leave that beginning out"
            )
        if strict and state_dict and not any(key.startswith(f"{prefix}student.") for key in state_dict):
            raise ValueError(
                "this is no distiller's state, for it has no key that starts with student., the first is "
                f"{next(iter(state_dict))}: load a student's own by distiller.student.load_state_dict(), and "
                "the student's part of a distiller's without that beginning"
            )
        key = f"{prefix}progress"
        if self.progress is not None and key not in state_dict:
            warnings.warn(
                "the state was saved by a distiller without a schedule, so the schedules of this one start "
                "anew: their steps are counted from 0",
                stacklevel=2,
            )
            state_dict[key] = self.progress.new_tensor([0, -1])
        if self.progress is None and state_dict.pop(key, None) is not None:
            warnings.warn(
                "the state was saved by a distiller with a schedule and this one has none, so its methods "
                "count fully from now on",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __getstate__(self) -> dict[str, Any]:
        """All but the reference to the user's teacher, which can't be pickled."""
        return vars(self) | {"_given": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Distiller:
        """Copies the student and the methods; the copy's teacher shares this one's weights."""
        memo.update(sharing_memo(self.teacher))
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        state = {name: deepcopy(value, memo) for name, value in self.__getstate__().items()}
        copied.__setstate__(state)  # type: ignore[no-untyped-call, unused-ignore]
        return copied

    def forward(self, images: Any = None, targets: Any = None, **inputs: Any) -> Any:
        """Losses in training, the student's detections in eval.

        Args:
            images: what the student itself takes; for torchvision a list of tensors
                (3, height, width), values from 0 to 1.
            targets: what the student itself takes; for torchvision a list of dicts of ``boxes``
                (objects, 4), xyxy in pixels, and ``labels`` (objects,). ``None`` for unlabelled images.
            inputs: what the student itself is called with by keywords, instead of the two: of a model of
                ``transformers`` its ``pixel_values``, ``pixel_mask`` and ``labels``.

        Returns:
            In training a flat dict of scalar tensors to be summed; in eval the student's detections.

        Raises:
            ValueError: images or targets that the student would refuse, a detector whose own forward computes
                something else than its pieces, or a distillation that would have no effect.
        """
        if inputs and (images is not None or targets is not None):
            raise TypeError(f"images and targets were given beside the keywords {sorted(inputs)}")
        if inputs:
            images, targets = self.student_adapter.from_keywords(inputs)
        if not self.training and self.student.training:
            raise ValueError(
                "the distiller is in eval mode and its student in train mode, which would train it without "
                "distilling: call distiller.train(), or distiller.student.eval() for detections"
            )
        if not self.training:
            self._check_student()
            return self.student_adapter.detect(images, targets)
        if not self.student.training:
            raise ValueError(
                "the distiller is in train mode and its student in eval mode: call distiller.train()"
            )
        factors = self._advance()
        trace = self.trace(images, targets, _active(self._methods(), factors))
        self._finish(trace, torch.compiler.is_compiling())
        return self.named_losses(trace, factors)

    def named_losses(self, trace: Trace, factors: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        """All losses of a step by the names that `forward` gives them, the student's own first.

        Args:
            trace: what the step left.
            factors: what each method's losses are multiplied by, by its name; 1 unless given.
        """
        factors = dict.fromkeys(self.methods, 1.0) if factors is None else factors
        return _flat(trace, self._methods(), factors, self.student, self._own_names)

    # -- one training step ----------------------------------------------------------------------

    def trace(self, images: Any, targets: Any = None, methods: Mapping[str, Method] | None = None) -> Trace:
        """Runs one training step and returns all that it leaves; `forward` reads the losses off it.

        Args:
            images: as for `forward`.
            targets: likewise.
            methods: those that are active, by name; all of them unless given.
        """
        active = self._methods() if methods is None else methods
        batch, seen = self._prepare(images, targets, active)
        pair, student = self.pair, self.pair.student  # which a change of the student's has made anew
        # The teacher runs first, so that what it needed is freed.
        theirs, cache = None, self.teacher_cache
        if active and cache is None:
            theirs = run_teacher(pair, seen, active)
        elif active and cache is not None:  # its entries are complete, whatever is at rest
            theirs = cache.run(pair, seen, self._methods(), self._proved)
        del seen  # pixels of the teacher's own coding are freed before the student runs
        maps = student.maps_of(batch)
        if any(method.watches_maps for method in active.values()):
            maps = between_graphs(maps)
        ours = DetectorTrace(student, batch, maps, {})
        if targets is not None or _needs_heads(active):
            head = student.heads[0]
            run = run_head(head, ours.maps, range(len(ours.maps)), points_of(head, active, 0), batch=batch)
            ours.heads[head.name] = with_own_losses(run, batch, ours.maps)
            if len(student.heads) > 1:
                run_region_heads(pair, theirs, ours, active)
        steps = {} if theirs is None else self._steps(theirs, ours, active)
        return Trace(theirs, ours, steps, _losses_of(active, steps, ours))

    def _methods(self) -> dict[str, Method]:
        return dict(self.methods.items())  # type: ignore[arg-type]

    # -- what runs outside a compiled graph: it depends on the data, or happens once ---------------

    @outside_graph
    def _prepare(self, images: Any, targets: Any, active: Mapping[str, Method]) -> tuple[Batch, Batch]:
        """The batch as the student takes it and as the teacher does; on the first step the proofs."""
        self._check_unchanged()
        if active and torch.is_grad_enabled():
            check_trainable(self.student)
        teacher, student = self.pair.teacher, self.pair.student
        batch = student.prepare(images, targets)  # first: it refuses what the detector itself stumbles over
        if self.prove and targets is not None and "student" not in self._proved:
            prove_student(student, images, targets)
            self._proved.add("student")
        elif self.prove and not self._proved & {"student", "student without labels"}:
            prove_unlabelled(student, batch)
            self._proved.add("student without labels")
        if not active:
            return batch, batch
        seen = self.teacher_batch(batch, images, targets)
        if self.prove and "teacher" not in self._proved:
            with teacher_autocast(self.pair):
                prove_teacher(teacher, seen)
            self._proved.add("teacher")
        return batch, seen

    def teacher_batch(self, batch: Batch, images: Any, targets: Any) -> Batch:
        """A batch as the teacher takes it.

        Args:
            batch: as the student takes it.
            images: what it was made of, for a ``teacher_view``.
            targets: likewise.
        """
        teacher, student = self.pair.teacher, self.pair.student
        if self.teacher_view is not None:
            view = self._view(images, targets)
            try:
                seen = teacher.prepare(view, None)
            except (TypeError, ValueError) as error:
                raise type(error)(f"teacher_view's images: {error}") from error
            sizes = unpadded(view, images, seen, batch)
            if sizes != seen.image_sizes:
                seen = teacher.take(replace(seen, image_sizes=sizes))
            check_same_scene(view, images, seen, batch)
            return seen
        pixels = recoded(batch, student.pixel_coding, teacher.pixel_coding)
        return teacher.take(Batch(pixels, batch.image_sizes))

    def _view(self, images: Any, targets: Any) -> Any:
        """What ``teacher_view`` makes of a batch; says so where it needs the targets and there are none."""
        assert self.teacher_view is not None
        try:
            return self.teacher_view(images, targets)
        except (TypeError, AttributeError) as error:
            if targets is not None:
                called = f"teacher_view= failed on (images, targets): {type(error).__name__}: {error}"
                raise TypeError(called) from error
            raise TypeError(
                f"teacher_view= failed on images without targets: {error}. It is called with (images, None) "
                "there: let it do without targets, or give it what it needs in the images"
            ) from error

    def _check_student(self) -> None:
        """Raises ``ValueError`` where the student isn't the detector that the adapter was made for."""
        made_for = self.student_adapter.detector
        if self.student is not made_for:
            raise ValueError(
                f"distiller.student, a {type(made_for).__name__}, was replaced by a "
                f"{type(self.student).__name__}: make a new Distiller for it"
            )

    def _check_unchanged(self) -> None:
        """Raises ``ValueError`` where something has changed that the methods were set up by."""
        self._check_student()
        if self._given is not None:
            teacher, before = self._given[0](), self._given[1]
            if teacher is not None and [id(parameter) for parameter in teacher.parameters()] != before:
                self._given = None
                warnings.warn(
                    f"the teacher, a {type(teacher).__name__}, was given other parameters since the "
                    "distiller was made, by load_state_dict(assign=True) or another layer: the distiller "
                    "goes on with those that it had. Make it after such a change",
                    stacklevel=5,
                )
        now = dict(self.student.named_modules())
        for path, module in self._structure.items():
            if now.get(path) is not module:
                self._read_again(path)
                break
        if self.teacher.training:
            raise ValueError(
                "distiller.teacher is in train mode, in which its answers change: call "
                "distiller.teacher.eval(), or leave its mode alone"
            )
        if not self._checked:
            check_devices(self.teacher, self.student)
            check_sharding(self.student_adapter)

    def _read_again(self, path: str) -> None:
        """Reads the student once more, some of whose layers were replaced.

        ``SyncBatchNorm.convert_sync_batchnorm(distiller)`` does so, and mmengine's Runner to any model.

        Raises:
            ValueError: its heads are no longer what the methods were set up for.
        """
        student = _bound("student", self._student_spec, self.student)
        before, now = ([_form(head) for head in side.heads] for side in (self.pair.student, student))
        if before != now:
            raise ValueError(
                f"the student's {path} was replaced since the distiller was made, and its heads differ now "
                "in classes, towers or widths from those that the methods were set up for: make the "
                "distiller after such a change"
            )
        self.pair = replace(self.pair, student=student)
        self._pairs = {name: _of_method(method, self.pair) for name, method in self._methods().items()}
        self._structure = dict(self.student.named_modules())
        self._proved -= {"student", "student without labels"}

    @outside_graph
    def _advance(self) -> dict[str, float]:
        """Each method's factor at this step."""
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
                    f"{name} has a schedule in epochs, but the distiller doesn't know the epoch: call "
                    "distiller.set_epoch(epoch) at the start of each"
                )
            factors[name] = method.schedule.factor(epoch if method.schedule.unit == "epoch" else step)
        return factors

    @outside_graph
    def _steps(
        self, teacher: DetectorTrace, student: DetectorTrace, active: Mapping[str, Method]
    ) -> dict[str, Step]:
        """What each active method sees; on its first step it demands what only a batch shows."""
        if not self._checked:
            check_strides("teacher", teacher)
            check_strides("student", student)
            if self.teacher_view is not None and self.view_scale is None:
                check_scale(self.pair, teacher.batch, student.batch)
        steps = steps_of(self._pairs, teacher, student, active, self.unlabelled_threshold)
        for name in steps.keys() - self._checked:
            active[name].check(steps[name])
        return steps

    @outside_graph
    def _finish(self, trace: Trace, compiled: bool) -> None:
        """Refuses, on a method's first step, a distillation that would silently do nothing; counts steps."""
        losses = trace.losses
        self._own_names.update(trace.own_losses)
        if torch.is_grad_enabled():
            check_frozen(losses, self._checked)
        for name in losses.keys() - self._checked:
            check_effect(name, losses[name])
            # Without gradients it can't be seen whether the student would learn: check again when there are.
            if torch.is_grad_enabled():
                # A compiled graph may be gone through once, and so may sharded weights. A method that watches
                # gradients would take this for one of training.
                watches = self._methods()[name].watches_maps
                if not (compiled or watches or is_sharded(self.student)):
                    self._gradients.add(name)
                self._checked.add(name)
        if not torch.is_grad_enabled():
            return  # no training step: of a validation, say
        if not compiled:
            self._gradients.look(losses, trace.student.maps, self.student)
        self.unscheduled = {name: loss.detach() for name, loss in self.named_losses(trace).items()}
        if self.progress is not None:
            self.progress[0] += 1
        if self._watch is not None and self._watch.found(self.student, self._methods(), set(losses)):
            self._watch = None


def _check_settings(
    teacher_view: TeacherView | None,
    view_scale: float | None,
    teacher_dtype: torch.dtype | None,
    teacher_cache: TeacherCache | None,
    unlabelled_threshold: float,
) -> None:
    """Raises for arguments of a `Distiller` that can't be right, whatever the detectors are."""
    if not 0 < unlabelled_threshold < 1:
        raise ValueError(f"unlabelled_threshold is a probability between 0 and 1, got {unlabelled_threshold}")
    if teacher_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(
            "teacher_dtype is what the teacher's own forward calculates in, torch.bfloat16 or "
            f"torch.float16, got {teacher_dtype}: leave it out for the type of the weights"
        )
    if not isinstance(teacher_cache, TeacherCache | None):
        raise TypeError(f"teacher_cache must be a crosskd.TeacherCache(folder), got {teacher_cache!r}")
    if view_scale is not None and (teacher_view is None or not 0 < view_scale < math.inf):
        raise ValueError(
            "view_scale is how many times as large as the student's images those of teacher_view= are, a "
            f"number above 0; got {view_scale} {'without' if teacher_view is None else 'with'} a view"
        )


def _check_student(student: Adapter) -> None:
    """Raises ``TypeError`` for a detector that can only be a teacher."""
    name = type(student.detector).__name__
    if not student.heads:
        raise TypeError(f"student: a {name} without a head can only be a teacher")
    if student.untrained:
        raise TypeError(
            f"student: a {name} has {' and '.join(student.untrained)}, which its adapter does not train, and "
            "can only be a teacher: take a student without, or write an adapter for it (docs/adapters.md)"
        )


def _bound(side: str, spec: AdapterSpec, detector: nn.Module, hint: str = "") -> Adapter:
    """An adapter of a detector, whose errors say which side it is on."""
    if isinstance(spec, Adapter):
        raise TypeError(
            f"{side}: adapter= makes an adapter of a detector, got a {type(spec).__name__} that is bound to "
            "one: pass the class, or what crosskd.adapters.generic() returns, without calling it"
        )
    try:
        adapter = spec(detector)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{side}: {error}{hint}") from error
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"adapter= must make a crosskd.adapters.Adapter of a detector, got a {type(adapter).__name__}: "
            "pass an adapter's class, or what crosskd.adapters.generic() returns"
        )
    return adapter


def _form(head: Head) -> tuple[Any, ...]:
    """What methods are set up by: a head's classes, and its towers' widths at each position."""
    branches = []
    for branch in head.branches:
        widths = [[tower.width(at) for at in range(len(tower.blocks) + 1)] for tower in branch.towers]
        branches.append((branch.name, widths))
    return head.name, head.head_type, head.num_classes, branches


def _of_method(method: Method, pair: Pair) -> Pair:
    """A pair with the heads that a method distils."""
    if method.head is None:
        return pair
    teacher, student = (
        next((head for head in adapter.heads if head.name == method.head), None)
        for adapter in (pair.teacher, pair.student)
    )
    # The classes are those of the last head; an earlier one separates objects from background.
    columns = pair.class_map if teacher is not None and teacher is pair.teacher.heads[-1] else None
    return replace(pair, teacher_head=teacher, student_head=student, class_map=columns)


def _needs_heads(methods: Mapping[str, Method]) -> bool:
    return any(method.distils_heads() for method in methods.values())


def _active(methods: Mapping[str, Method], factors: Mapping[str, float]) -> dict[str, Method]:
    return {name: method for name, method in methods.items() if factors[name] > 0}


def _losses_of(
    methods: Mapping[str, Method], steps: Mapping[str, Step], student: DetectorTrace
) -> dict[str, dict[str, Tensor]]:
    """What each method returns; times the number of images where the student's own losses are."""
    images = len(student.batch.pixels) if any(head.times_batch for head in student.adapter.heads) else 1
    losses: dict[str, dict[str, Tensor]] = {}
    for name, method in methods.items():
        returned = method(steps[name])
        if not isinstance(returned, Mapping):
            raise TypeError(
                f"{name}: {type(method).__name__}.forward must return a dict of scalar losses by name, got a "
                f"{type(returned).__name__}"
            )
        losses[name] = {key: loss * images if images > 1 else loss for key, loss in returned.items()}
    return losses


def _named(methods: Method | Sequence[Method], heads: Sequence[Head]) -> dict[str, Method]:
    """Copies of the methods under names that differ, each for one of the student's heads if it distils
    heads.
    """
    listed = list(methods) if isinstance(methods, Sequence) else [methods]
    if not listed:
        raise ValueError("methods is empty: there is nothing to distil; pass crosskd.CrossKD()")
    named: dict[str, Method] = {}
    for method in listed:
        if not isinstance(method, Method):
            got = f"a {type(method).__name__}" if method is not None else "None"
            if isinstance(method, type):
                got = f"the class {method.__name__}: call it, {method.__name__}()"
            raise TypeError(f"methods must be crosskd.Method objects such as crosskd.CrossKD(), got {got}")
        for head in _heads_of(method, [head.name for head in heads]):
            base = f"{method.name}_{head}" if head else method.name
            name, number = base, 2
            while name in named:
                name, number = f"{base}_{number}", number + 1
            named[name] = deepcopy(method)
            named[name].head = head
    return named


def _warn_of_conflicts(methods: Mapping[str, Method]) -> None:
    """Warns of methods that are known to do worse together than alone."""
    for name, method in methods.items():
        for other, cross in methods.items():
            kinds = method.teaches, cross.teaches
            if kinds == ("predictions", "cross-head predictions") and method.head == cross.head:
                warnings.warn(
                    f"{name} pulls the student's own predictions towards the teacher's and away from the "
                    f"labels, which {other} exists to avoid: the two together were reported to do worse than "
                    "CrossKD alone (of dense heads: 38.1 against 38.7 AP, GFL with a ResNet-18). Take one of "
                    "them, and a method of feature maps beside it",
                    stacklevel=3,
                )


def _heads_of(method: Method, names: Sequence[str]) -> Sequence[str | None]:
    """The names of the heads that a method distils; ``None`` for one that distils none."""
    if not method.distils_heads():
        return (None,)
    if method.head is None:
        return names
    if method.head not in names:
        several = [name for name in names if name]
        choice = f"choose from {', '.join(several)}" if several else "it has one head alone: leave head= out"
        raise ValueError(f"{method.name}: head={method.head!r} is none of the student's; {choice}")
    return (method.head,)


def _flat(
    trace: Trace,
    methods: Mapping[str, Method],
    factors: Mapping[str, float],
    student: nn.Module,
    own_names: set[str],
) -> dict[str, Tensor]:
    """All losses of a step by name, the methods' multiplied by their factors.

    A method's name stands in front of a loss whose name another method or the student uses, too; the
    student's are remembered, for on images without targets it has none.
    """
    own = trace.own_losses
    named: list[tuple[str, str, Tensor]] = []
    for name, method in methods.items():
        losses = trace.losses[name] if name in trace.losses else _nothing(method, student)
        for key, loss in losses.items():
            named.append((name, _loss_name(key, method.head), loss))
    taken = [*{*own_names, *own}, *(key for _, key, _ in named)]
    flat = dict(own)
    for name, key, loss in named:
        head = methods[name].head
        # The key names the head already, which stands behind the method's own name.
        own_name = methods[name].name
        prefix = own_name + name.removeprefix(f"{own_name}_{head}") if head else name
        factor = factors[name]
        flat[f"{prefix}_{key}" if taken.count(key) > 1 else key] = loss * factor if factor != 1 else loss
    return flat


def _loss_name(key: str, head: str | None) -> str:
    """A loss's name with the head's in it: ``kd_cls`` of ``"rpn"`` is ``kd_rpn_cls``."""
    if not head:
        return key
    return f"kd_{head}_{key[3:]}" if key.startswith("kd_") else f"{head}_{key}"


def _nothing(method: Method, student: nn.Module) -> dict[str, Tensor]:
    """Zero losses of a method that its schedule has stopped, with a gradient into its projections.

    DistributedDataParallel waits for every parameter's gradient, so the projections get one of zero.
    """
    # One that is trained, for images without targets, where these losses are all that there is.
    of_student = sorted(student.parameters(), key=lambda parameter: not parameter.requires_grad)
    parameters = list(method.parameters()) or of_student[:1]
    zero = torch.stack([parameter.sum() * 0.0 for parameter in parameters]).sum()
    return dict.fromkeys(method.loss_names(), zero)
