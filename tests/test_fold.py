"""A teacher whose batch norms are folded: the same numbers without them, and what is not folded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from crosskd import PKD, CrossKD, Distiller, fold_batch_norm
from tests.helpers.tiny import tiny_batch, tiny_retinanet
from tests.test_teacher_dtype import step
from tests.test_teacher_untouched import digest, flags


def with_norms() -> nn.Module:
    """A teacher with batch norms in backbone and towers, one of them frozen, whose statistics differ."""
    teacher = tiny_retinanet(seed=1, batch_norm=True, norm="group")
    for tower in (teacher.head.classification_head.conv, teacher.head.regression_head.conv):
        for block in tower:
            block[1] = nn.BatchNorm2d(32)
    teacher.backbone.stem[0][1] = FrozenBatchNorm2d(8)
    generator = torch.Generator().manual_seed(0)
    for module in norms_of(teacher):
        for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
            tensor.data += 0.5 * torch.rand(tensor.shape, generator=generator)
    return teacher


def norms_of(detector: nn.Module) -> list[nn.Module]:
    return [module for module in detector.modules() if hasattr(module, "running_mean")]


def test_a_folded_teacher_distils_as_the_teacher_and_stands_apart_from_it():
    teacher, student = with_norms().train(), tiny_retinanet(seed=2, batch_norm=True)
    before, flags_before = digest(teacher), flags(teacher)
    folded = fold_batch_norm(teacher, [torch.rand(3, 64, 64)])
    assert digest(teacher) == before
    assert flags(teacher) == flags_before
    assert (len(norms_of(teacher)), norms_of(folded)) == (13, [])
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    memory = {tensor.data_ptr() for tensor in teacher.state_dict().values()}
    assert not memory & {tensor.data_ptr() for tensor in folded.state_dict().values()}
    # Both the teacher's own forward and the student's features on their way through its towers.
    methods = [CrossKD(position=1), PKD()]
    plain = Distiller(teacher, copy.deepcopy(student), methods)
    cheap = Distiller(folded, copy.deepcopy(student), methods)
    expected, gradient = step(plain, tiny_batch())
    losses, of_folded = step(cheap, tiny_batch())
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(of_folded, gradient, rtol=1e-3, atol=1e-6 * float(gradient.abs().max()))
    assert cheap.student.state_dict().keys() == student.state_dict().keys()


def test_a_gpu_that_rounds_convolutions_folds_in_whole_float32(monkeypatch):
    # TF32 keeps 10 of 23 bits: after a hundred layers other numbers than the unfolded ones'.
    whole, rounded = nn.Conv2d._conv_forward, []

    def of_gpu(convolution, pixels, weight, bias):
        rounds = tf32_settings()[0] not in (False, "ieee")
        rounded.append(rounds)
        return whole(convolution, pixels, weight.bfloat16().float() if rounds else weight, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", of_gpu)
    before = tf32_settings()
    fold_batch_norm(with_norms(), [torch.rand(3, 64, 64)])
    assert rounded
    assert not any(rounded)
    assert tf32_settings() == before


def tf32_settings() -> list[bool | str]:
    """Of convolutions and matrix products, as this version of PyTorch has them."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(cudnn, "conv"):
        return [cudnn.conv.fp32_precision, matmul.fp32_precision]
    return [cudnn.allow_tf32, matmul.allow_tf32]


class SharedConvolution(nn.Module):
    """A convolution with a norm of its own for each of two levels, and one that nothing shares."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.shared, self.norms = nn.Conv2d(3, 3, 1), nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))
        self.own_statistics = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))

    def forward(self, pixels):
        pixels = self.own_statistics(self.stem(pixels))
        return [norm(self.shared(pixels)) for norm in self.norms]


def test_norms_behind_anything_else_stay():
    backbone, pixels = SharedConvolution(), torch.rand(2, 3, 4, 4)
    for norm in norms_of(backbone):
        if norm.running_mean is not None:
            norm.running_mean += torch.rand(3)
    folded = fold_batch_norm(backbone, pixels)
    kept = [path for path, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert kept == ["norms.0", "norms.1", "own_statistics.1"]
    torch.testing.assert_close(folded(pixels), backbone.eval()(pixels))


class PadsItself(nn.Conv2d):
    """As EfficientNet's convolutions do."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(pixels, (0, 1, 0, 1)))


class Standardized(nn.Conv2d):
    """Makes its weights anew on each call."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(pixels, self.weight / self.weight.std(), self.bias)


def test_a_convolution_of_a_derived_class_folds_if_it_uses_the_weights_that_it_holds():
    detector = nn.Sequential()
    for kind in (PadsItself, Standardized):
        detector.append(nn.Sequential(kind(3, 3, 3, padding=1), nn.BatchNorm2d(3)))
    other = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3, padding=1))
    detector.append(nn.Sequential(other, nn.BatchNorm2d(3)))
    for norm in norms_of(detector):
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    pixels, held = torch.rand(2, 3, 8, 8), copy.deepcopy(detector[0][0].state_dict())
    folded = fold_batch_norm(detector, pixels)
    assert [type(part[1]).__name__ for part in folded] == ["Identity", "BatchNorm2d", "BatchNorm2d"]
    torch.testing.assert_close(folded(pixels), detector.eval()(pixels))
    assert all(torch.equal(value, held[name]) for name, value in detector[0][0].state_dict().items())


class ReadTwice(nn.Module):
    """Something else reads the convolution's output, too."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, pixels):
        maps = self.convolution(pixels)
        return self.last(maps + self.norm(maps))


def test_what_folding_would_change_is_refused():
    backbone, pixels = ReadTwice(), torch.rand(1, 3, 4, 4)
    backbone.norm.running_mean -= 3
    with pytest.raises(ValueError, match=r"ReadTwice's batch norms changes what last gives"):
        fold_batch_norm(backbone, pixels)
    with pytest.raises(ValueError, match=r"of the Sequential's 1 batch norms none directly follows"):
        fold_batch_norm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)), pixels)
    with pytest.raises(TypeError, match=r"runs the ReadTwice, .*\[torch.rand\(3, 256, 256\)\]"):
        fold_batch_norm(backbone)


@pytest.mark.slow
def test_channels_last_folded_and_compiled_at_once():
    """From the first step on, which compares the compiled backbone with its pieces, too."""
    teacher, student = with_norms(), tiny_retinanet(seed=2, batch_norm=True)
    expected, gradient = step(Distiller(teacher, copy.deepcopy(student), CrossKD()), tiny_batch())
    folded = fold_batch_norm(teacher, [torch.rand(3, 64, 64)]).to(memory_format=torch.channels_last)
    distiller = Distiller(folded, student, CrossKD())
    torch._dynamo.reset()
    distiller.teacher.backbone.compile(backend="eager")
    losses, of_cheap = step(distiller, tiny_batch())
    torch._dynamo.reset()
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(of_cheap, gradient, rtol=1e-3, atol=1e-6 * float(gradient.abs().max()))
    assert teacher.backbone.stem[1][0].weight.is_contiguous()
