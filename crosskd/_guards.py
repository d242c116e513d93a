"""What a `crosskd.Distiller` refuses or warns of: detectors that can't be a pair, losses without effect."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
import torch.distributed.fsdp
from torch import Tensor, nn

from crosskd.adapters.base import Adapter, Batch
from crosskd.pairing import Pair, match_levels
from crosskd.step import DetectorTrace

__all__ = [
    "GradientWatch",
    "TrainingWatch",
    "bare",
    "check_devices",
    "check_effect",
    "check_frozen",
    "check_same_pixels",
    "check_scale",
    "check_sharding",
    "check_shared",
    "check_strides",
    "check_trainable",
    "is_sharded",
]


def bare(side: str, detector: nn.Module) -> nn.Module:
    """A detector without the wrapper that ``torch.compile`` puts around it."""
    if not isinstance(detector, nn.Module):
        raise TypeError(f"{side} must be an nn.Module, got {type(detector).__name__}")
    if isinstance(detector, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ValueError(
            f"{side} is wrapped in {type(detector).__name__}: hand in the detector itself, and wrap the "
            "distiller instead"
        )
    if any(parameter.is_inference() for parameter in detector.parameters()):
        raise ValueError(
            f"{side}'s weights were made under torch.inference_mode(), so that no gradient can pass them: "
            "build it outside, under torch.no_grad() if need be, and load its state there"
        )
    compiled = getattr(detector, "_orig_mod", None)
    if isinstance(compiled, nn.Module) or getattr(detector, "_compiled_call_impl", None) is not None:
        warnings.warn(
            f"{side} was compiled as a whole, but distillation runs it stage by stage, so in training it "
            "runs uncompiled: call torch.compile(distiller) instead",
            stacklevel=3,
        )
    return compiled if isinstance(compiled, nn.Module) else detector


def check_shared(teacher: nn.Module, student: nn.Module) -> None:
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


def check_same_pixels(teacher: Adapter, student: Adapter) -> None:
    """Raises ``ValueError`` where the teacher's pixels can't be made of the student's."""
    theirs, ours = teacher.pixel_coding, student.pixel_coding
    if (theirs is None) != (ours is None):
        raise ValueError(
            f"it is unknown how the {'teacher' if theirs is None else 'student'}'s pixels are coded, so the "
            "teacher's can't be made of the student's: pass generic() the pixel_coding= "
            "(crosskd.adapters.PixelCoding), or the distiller a teacher_view="
        )
    if theirs is not None and ours is not None and len(theirs.mean) != len(ours.mean):
        raise ValueError(
            f"the images' channels differ: {len(theirs.mean)} (teacher), {len(ours.mean)} (student). Both "
            "get the same pixels: give the teacher images of its own by teacher_view=, or train one for the "
            "student's"
        )


def check_devices(teacher: nn.Module, student: nn.Module) -> None:
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


_SHARDED = getattr(torch.distributed.fsdp, "FSDPModule", ())  # since PyTorch 2.6


def is_sharded(detector: nn.Module) -> bool:
    """Whether ``fully_shard`` gathers weights of a detector, and lets go of them in a backward pass."""
    return any(isinstance(module, _SHARDED) for module in detector.modules())


def check_sharding(student: Adapter) -> None:
    """Raises ``ValueError`` where ``fully_shard`` gathers weights for a module that is never called."""
    if not is_sharded(student.detector):
        return
    called: set[nn.Module] = set()
    for head in student.heads:
        for branch in head.branches:
            blocks = [block for tower in branch.towers for block in tower.blocks]
            called.update(layer for block in blocks for layer in block.layers)
            called.update(branch.predictors.values())
    for path, module in student.detector.named_modules():
        inside = set(module.modules()) - {module}
        if isinstance(module, _SHARDED) and module not in called and called & inside:
            raise ValueError(
                f"student: {path or type(module).__name__} was sharded by fully_shard, which gathers its "
                "weights when it is called, but distillation calls the layers in it one by one. Shard the "
                "backbone, if need be single layers of the head, and last the distiller as a whole: "
                "fully_shard(distiller)"
            )


def check_trainable(student: nn.Module) -> None:
    """Raises ``ValueError`` for a student that can't learn, though a method's own parameters could."""
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            f"none of the student's parameters is trainable: the {type(student).__name__} was frozen, or is "
            "from a checkpoint that holds it so, as ultralytics' do. Call student.requires_grad_(True), or "
            "freeze parts of it alone"
        )


def check_frozen(losses: Mapping[str, Mapping[str, Tensor]], checked: set[str]) -> None:
    """Raises ``ValueError`` for a method that had an effect and has none any more.

    Args:
        losses: each method's.
        checked: the methods that have trained the student.
    """
    for name in losses.keys() & checked:
        still = [key for key, loss in losses[name].items() if not loss.requires_grad]
        if still:
            raise ValueError(
                f"{name}: {', '.join(still)} depends on no trainable parameter of the student any more: what "
                "it distils was frozen since the last step. Leave it trainable, or let a schedule stop it"
            )


def check_effect(name: str, losses: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` for anything but finite scalars with a gradient; warns of a loss of exactly 0."""
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
                "images, the targets, the teacher's weights or the student's"
            )
        if value == 0:
            warnings.warn(
                f"{name}: {key} is exactly 0 on the first step. That is right if the student equals its "
                "teacher; otherwise nothing is being distilled: an untrained teacher's features may vanish",
                stacklevel=5,
            )


def _without_gradient(losses: Mapping[str, Tensor], maps: Sequence[Tensor], student: nn.Module) -> list[str]:
    """The losses above 0 whose gradient is 0 at all of the student's feature maps, and of its parameters."""
    reached = [feature_map for feature_map in maps if feature_map.requires_grad]
    stuck = []
    for key, loss in losses.items():
        if float(loss.detach()) == 0 or any(bool(gradient.any()) for gradient in _gradients(loss, reached)):
            continue
        # Predictors of boxes that begin with zeros pass nothing on before they have moved themselves. And of
        # frozen maps the layers behind them may be all that is trained.
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        if not any(bool(gradient.any()) for gradient in _gradients(loss, trained)):
            stuck.append(key)
    return stuck


def _gradients(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a loss at those tensors that it depends on."""
    if not tensors:
        return []
    # Enlarged as a GradScaler does it, or float16 would round what is small to 0.
    gradients = torch.autograd.grad(loss * 2.0**16, tensors, retain_graph=True, allow_unused=True)
    return [gradient for gradient in gradients if gradient is not None]


class GradientWatch:
    """Refuses a method with a loss that moves nothing on each of its first three steps.

    On a single step that happens by chance: an empty box and a ReLU that is 0 everywhere pass no gradient on,
    as in detectors that are small or hardly trained.
    """

    steps = 3

    def __init__(self) -> None:
        self._looked: dict[str, int] = {}

    def add(self, name: str) -> None:
        """Watches a method until each of its losses has moved something on one step."""
        self._looked[name] = 0

    def look(
        self, losses: Mapping[str, Mapping[str, Tensor]], maps: Sequence[Tensor], student: nn.Module
    ) -> None:
        """Warns on a method's first step, raises ``ValueError`` on its third.

        Args:
            losses: of each method that was active.
            maps: the student's, which the losses were calculated from.
            student: whose parameters may get a gradient where the maps get none.
        """
        for name in self._looked.keys() & losses.keys():
            stuck = _without_gradient(losses[name], maps, student)
            if not stuck:
                del self._looked[name]
                continue
            self._looked[name] += 1
            values = " and ".join(f"{key} is {float(losses[name][key].detach()):.4g}" for key in stuck)
            message = (
                f"{name}: {values}, but the gradient is 0 at every feature map of the student, so distilling "
                "has no effect: a layer between the split and the teacher's predictions passes no gradient "
                "on, as rounding and dynamically quantised layers do, or all of the predicted boxes are empty"
            )
            if self._looked[name] == self.steps:
                raise ValueError(f"{message}. So it was on each of the first {self.steps} steps")
            if self._looked[name] == 1:
                warnings.warn(f"{message}. Two more such steps are refused", stacklevel=5)


class TrainingWatch:
    """Looks, over the first steps, whether an optimizer moves the methods' own parameters with the student's.

    The first step's numbers are held against those of the third, or of the first later one at which the
    student has changed: with accumulated gradients, or a first step that was skipped, it takes longer.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.student: list[Tensor] = []
        self.methods: dict[str, list[Tensor]] = {}

    def found(self, student: nn.Module, methods: Mapping[str, nn.Module], active: set[str]) -> bool:
        """Whether it is known; warns where the student has changed and what a method trains has not.

        Args:
            student: the detector that is trained.
            methods: all of them, by name.
            active: the names of those whose losses this step has: a method at rest need not change.
        """
        self.steps += 1
        trained = {
            name: [parameter.detach() for parameter in method.parameters() if parameter.requires_grad]
            for name, method in methods.items()
        }
        # One number each, for all of the student's parameters would cost its memory again. Not of biases: a
        # warmup may begin with those alone, as ultralytics' does.
        now = [
            parameter.detach().double().sum()
            for parameter in student.parameters()
            if parameter.requires_grad and parameter.ndim > 1
        ]
        if self.steps == 1:
            self.student = now
            self.methods = {name: [p.clone() for p in trained[name]] for name in active if trained[name]}
            return not self.methods
        self.methods = {name: before for name, before in self.methods.items() if name in active}
        if not self.methods:
            return True
        if self.steps < 3 or _equal(now, self.student):
            return False
        still = [name for name, before in self.methods.items() if _equal(trained[name], before)]
        if still:
            warnings.warn(
                f"an optimizer trains the student, but not the parameters of {', '.join(still)}: projections "
                "between widths stay random, and their gradients grow from step to step. Give the optimizer "
                "distiller.parameters(), which are the student's and the methods', not student.parameters()",
                stacklevel=5,
            )
        return True


def _equal(now: list[Tensor], before: list[Tensor]) -> bool:
    """Whether two lists of tensors hold the same numbers; of other lengths or places they don't."""
    return len(now) == len(before) and all(
        a.device == b.device and torch.equal(a, b) for a, b in zip(now, before, strict=True)
    )


def check_scale(pair: Pair, teacher: Batch, student: Batch) -> None:
    """Raises ``ValueError`` where levels were matched by a factor that the images' sizes speak against.

    Args:
        pair: its levels matched by the strides alone, which allow several factors where a level is left out.
        teacher: its batch of the view.
        student: its batch.
    """
    theirs, ours = pair.teacher.strides, pair.student.strides
    if pair.levels is None or theirs is None or ours is None:
        return
    found = teacher.image_sizes[0][0] / student.image_sizes[0][0]
    factors = [a / b for a in theirs for b in ours]
    nearest = min([pair.scale, *factors], key=lambda factor: abs(math.log(factor / found)))
    levels, _ = match_levels(theirs, ours, scale=nearest)
    if nearest != pair.scale and len(levels) >= len(pair.levels):
        raise ValueError(
            f"strides {list(theirs)} (teacher) and {list(ours)} (student) match with images of the teacher's "
            f"that are {pair.scale:g} or {nearest:g} times as large as the student's, and these are "
            f"{found:.3g} times: pass view_scale={nearest:g}, or view_scale={pair.scale:g} if levels are to "
            "be matched so"
        )


def check_strides(side: str, trace: DetectorTrace) -> None:
    """Raises ``ValueError`` where a level's map is of another size than its stride says."""
    strides = trace.adapter.strides
    if (
        strides is None or not trace.adapter.heads
    ):  # a backbone's are read off a map, at the size that it takes
        return
    for level, (stride, feature_map) in enumerate(zip(strides, trace.maps, strict=False)):
        if feature_map.ndim != 4:
            continue
        found, size = tuple(feature_map.shape[2:]), trace.batch.size
        expected = [pixels / stride for pixels in size]
        if any(abs(a - b) > 1 for a, b in zip(found, expected, strict=True)):
            raise ValueError(
                f"{side}: the stride of level {level} is {stride:g}, but its map is {found} for pixels of "
                f"{size}, as (height, width): give strides= as many pixels as lie between neighbouring "
                "locations, finest level first"
            )
