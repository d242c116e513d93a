"""A teacher without batch norms: folded into the convolutions in front of them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from crosskd.proof import COARSE, TOLERANCE, Outputs, proving

__all__ = ["fold_batch_norm"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

Pairs = dict[nn.Conv2d, nn.Module]
"""The batch norm behind each convolution."""


def fold_batch_norm(detector: ModuleT, *inputs: Any, **keywords: Any) -> ModuleT:
    """A frozen copy of a teacher whose batch norms are folded into the convolutions in front of them.

    In eval mode a batch norm multiplies each channel by one number and adds another, which the convolution
    in front of it can do by its own weights. Which ones belong together is seen while the copy runs: a norm
    whose every input is an output of one convolution. Afterwards the copy runs once more, and each of its
    layers must give the numbers of before, but for rounding. Norms behind anything else stay, and those
    behind a convolution of a derived class that makes its weights anew on each call.

    The copy has weights of its own: what is loaded into the detector later doesn't reach it. For
    `crosskd.inherit` take the detector itself.

    Args:
        detector: a trained detector or backbone, which is not changed.
        inputs: what it is called with in eval mode; images of 256 pixels of noise will do.
        keywords: likewise.

    Returns:
        The copy, in eval mode, without gradients, with an ``nn.Identity`` for each folded norm.

    Raises:
        TypeError: no inputs.
        ValueError: nothing can be folded, or folding changes what a layer gives, which is named.

    References:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference", CVPR 2018, section 3.2.

    Example:
        >>> import torch
        >>> teacher = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        >>> folded = fold_batch_norm(teacher, torch.rand(1, 3, 8, 8))
        >>> folded[1], folded[0].bias.shape, teacher[0].bias
        (Identity(), torch.Size([4]), None)
    """
    name = type(detector).__name__
    if not inputs and not keywords:
        raise TypeError(
            f"fold_batch_norm runs the {name}, to see which norm follows which convolution: give what it is "
            "called with in eval mode, too, such as [torch.rand(3, 256, 256)] for torchvision's detectors"
        )
    folded = copy.deepcopy(detector).eval().requires_grad_(False)
    with _without_tf32(), proving(folded) as before, _pairs(folded) as pairs_of:
        folded(*inputs, **keywords)
    with _without_tf32():
        pairs = pairs_of()
    if not pairs:
        norms = sum(map(_is_batch_norm, folded.modules()))
        raise ValueError(
            f"nothing to fold: of the {name}'s {norms} batch norms none directly follows, when it runs, an "
            "nn.Conv2d of its own that uses the weights it holds. Distil with it as it is"
        )
    for convolution, norm in pairs.items():
        _fold(convolution, norm)
    for path, module in list(folded.named_modules(remove_duplicate=False)):
        if module in pairs.values():
            parent, _, own_name = path.rpartition(".")
            setattr(folded.get_submodule(parent), own_name, nn.Identity())
    with _without_tf32(), proving(folded) as after:
        folded(*inputs, **keywords)
    place = _changed(before, after, {path for path, module in folded.named_modules() if module in pairs})
    if place is not None:
        raise ValueError(
            f"folding the {name}'s batch norms changes what {place} gives: it, or what runs before it, reads "
            "a convolution's output beside the norm, or a norm calculates something else than "
            "nn.BatchNorm2d, or the images are so small that rounding alone is left of a level (try 256 "
            "pixels). Else distil with it as it is"
        )
    return folded


@contextmanager
def _without_tf32() -> Iterator[None]:
    """A GPU's float32 as it is: a hundred convolutions in TF32 round more than the check allows."""
    settings: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    name: str = "allow_tf32"
    off: bool | str = False
    if hasattr(torch.backends.cudnn, "conv"):  # since 2.9; where a program sets these, reading those fails
        settings[0], name, off = torch.backends.cudnn.conv, "fp32_precision", "ieee"
    before = [getattr(each, name) for each in settings]
    try:
        for each in settings:
            setattr(each, name, off)
        yield
    finally:
        for each, value in zip(settings, before, strict=True):
            setattr(each, name, value)


@contextmanager
def _pairs(detector: nn.Module) -> Iterator[Callable[[], Pairs]]:
    """Watches a detector run; what it gives tells which norms took each output of one convolution alone."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # with the tensors, so that no other one gets their id
    inputs: dict[nn.Conv2d, tuple[Any, ...]] = {}
    calls: Counter[nn.Module] = Counter()
    reads: Counter[tuple[nn.Conv2d, nn.Module]] = Counter()

    def of_convolution(convolution: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(convolution, nn.Conv2d)
        made[id(output)] = convolution, output
        if type(convolution) is not nn.Conv2d:
            inputs[convolution] = arguments
        calls[convolution] += 1

    def of_norm(norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        calls[norm] += 1
        if arguments and id(arguments[0]) in made:
            reads[made[id(arguments[0])][0], norm] += 1

    def found() -> Pairs:
        own = {c: norm for (c, norm), number in reads.items() if number == calls[c] == calls[norm]}
        return {c: norm for c, norm in own.items() if c not in inputs or _uses_its_own(c, inputs[c])}

    with ExitStack() as hooks:
        for module in detector.modules():
            if isinstance(module, nn.Conv2d):
                hooks.enter_context(module.register_forward_hook(of_convolution))
            elif _is_batch_norm(module):
                hooks.enter_context(module.register_forward_pre_hook(of_norm))
        yield found


def _uses_its_own(convolution: nn.Conv2d, arguments: tuple[Any, ...]) -> bool:
    """Whether one of a derived class uses the weights that it holds: with twice those it gives twice as much.

    One with a parametrization, or that standardizes its weights on each call, doesn't.
    """
    given = convolution(*arguments)
    for parameter in convolution.parameters(recurse=False):
        parameter.mul_(2)
    doubled = convolution(*arguments)
    for parameter in convolution.parameters(recurse=False):
        parameter.div_(2)
    # Not to the last bit: two calls on a GPU may sum in another order.
    return float((doubled - 2 * given).abs().max()) <= 1e-3 * float(doubled.abs().max())


def _is_batch_norm(module: nn.Module) -> bool:
    """Whether it has running statistics: frozen norms of torchvision and others are classes of their own."""
    statistics = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return all(isinstance(tensor, Tensor) for tensor in statistics)


def _fold(convolution: nn.Conv2d, norm: Any) -> None:
    """Gives a convolution the weights with which it does the norm's work, too."""
    eps = getattr(norm, "eps", 1e-5)  # some frozen ones have it in their forward
    weight, bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, eps, norm.weight, norm.bias
    )
    convolution.weight = nn.Parameter(weight.detach(), requires_grad=False)
    convolution.bias = nn.Parameter(bias.detach(), requires_grad=False)


def _changed(before: Outputs, after: Outputs, folded: set[str]) -> str | None:
    """The path of the first layer that gives other numbers than before; folded convolutions give others."""
    for path, outputs in before.items():
        for (dtype, own), (_, now) in zip(outputs, after.get(path, []), strict=False):
            tolerance = TOLERANCE.get(dtype, COARSE) * float(own.abs().max())
            if path not in folded and not float((own - now).abs().max()) <= tolerance:
                return path
    return None
