"""What layers do, measured: activations that nobody listed, or that are called as functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from crosskd._measured import bends, ending_activation, is_elementwise, measured_widths
from crosskd.towers import TapPoint, Tower, split_tower

WIDTH = 8


class Swish(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features * features.sigmoid()


class Bounded(nn.Module):
    """Odd, as a normalisation is."""

    def forward(self, features: Tensor) -> Tensor:
        return features.tanh()


class Clipped(nn.Module):
    """A hard sigmoid, which is straight from -3 to 3."""

    def forward(self, features: Tensor) -> Tensor:
        return ((features + 3) / 6).clamp(0, 1)


class PerChannel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.linspace(0.1, 0.9, WIDTH))

    def forward(self, features: Tensor) -> Tensor:
        return torch.maximum(features, self.slope[:, None, None] * features)


class OwnNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(WIDTH))

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=1) + self.bias[:, None, None]


class NormAndActivation(nn.GroupNorm):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features).relu()


class ActiveConvolution(nn.Conv2d):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features).tanh()


class OwnConvolution(nn.Conv2d):
    def forward(self, features: Tensor) -> Tensor:
        return 2 * super().forward(features)


def convolution(width_in: int = WIDTH, width_out: int = WIDTH) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, padding=1)


class Lora(nn.Module):
    """Its children stand in another order than they run in."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.up = nn.Conv2d(2, base.out_channels, 1)
        self.down = nn.Conv2d(base.in_channels, 2, 1)
        self.base = base

    def forward(self, features: Tensor) -> Tensor:
        return self.act(self.base(features) + self.up(self.down(features)))


class Residual(Lora):
    def forward(self, features: Tensor) -> Tensor:
        return features + super().forward(features)


ACTIVATIONS = [Swish(), Bounded(), Clipped(), PerChannel(), nn.Threshold(0.1, 0.0), nn.Hardshrink()]
OTHERS = [OwnNorm(), FrozenBatchNorm2d(WIDTH), nn.Softmax(dim=1), nn.Identity(), nn.Dropout()]


@pytest.mark.parametrize("layer", ACTIVATIONS, ids=repr)
def test_an_activation_is_found_by_what_it_does(layer):
    assert is_elementwise(layer, WIDTH)
    assert bends(layer, WIDTH)
    for layers in ([convolution(), layer], [nn.Sequential(convolution(), layer)]):
        (block,) = split_tower(layers)
        assert block.activation is layer
        assert block.has_pre
        features = torch.randn(1, WIDTH, 5, 5)
        torch.testing.assert_close(block.activate(block.body(features)), block(features))
    tower = Tower.of([convolution(), layer, convolution()], "tower")
    _, taps = tower.run(features, {TapPoint(1, "pre"), TapPoint(1, "post")})
    assert not torch.equal(taps[TapPoint(1, "pre")].read(), taps[TapPoint(1, "post")].read())


@pytest.mark.parametrize("layer", OTHERS, ids=repr)
def test_what_is_no_activation_is_taken_for_none(layer):
    (block,) = split_tower([convolution(), layer])
    assert block.activation is None
    assert block.layers[-1] is layer


@pytest.mark.parametrize(
    ("layer", "hides"),
    [
        (ActiveConvolution(WIDTH, WIDTH, 3, padding=1), True),
        (OwnConvolution(WIDTH, WIDTH, 3, padding=1), False),
        (convolution(), False),
    ],
    ids=repr,
)
def test_an_activation_inside_a_layer_is_found(layer, hides):
    (block,) = split_tower([layer])
    assert block.has_pre is not hides


@pytest.mark.parametrize(
    ("layer", "hides"), [(NormAndActivation(2, WIDTH), True), (OwnNorm(), False), (nn.GELU(), True)], ids=repr
)
def test_an_activation_inside_a_normalisation_is_found(layer, hides):
    (block,) = split_tower([convolution(), layer, nn.Dropout()])
    assert block.has_pre is not hides


def test_a_forward_replaced_on_a_layer_is_measured():
    layer = convolution()
    own = layer.forward
    layer.forward = lambda features: own(features).relu()
    (block,) = split_tower([layer])
    assert not block.has_pre


def test_a_composites_activation_is_the_one_that_it_ends_in():
    (block,) = split_tower([Lora(convolution(4, 6))])
    assert isinstance(block.activation, nn.ReLU)
    assert block.widths == (4, 6)
    (block,) = split_tower([nn.Sequential(Lora(convolution(4, 6)), nn.Dropout())])
    assert block.widths == (4, 6)
    (block,) = split_tower([Residual(convolution())])
    assert block.activation is None


def test_measuring_leaves_no_trace():
    module = Lora(convolution())
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    norm = nn.BatchNorm2d(WIDTH)
    before = norm.running_mean.clone()
    state = torch.random.get_rng_state()
    split_tower([module, norm])
    bends(norm, WIDTH)
    assert not calls
    assert module.training
    assert len(module._forward_hooks) == 1
    assert not module.act._forward_hooks
    assert torch.equal(norm.running_mean, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_modules_that_refuse_the_input_are_not_measured():
    class Picky(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            raise RuntimeError("never")

    assert bends(Picky(), WIDTH) is None
    assert not is_elementwise(Picky(), WIDTH)
    assert measured_widths(Picky(), [4, 8], channels_last=False) is None
    assert ending_activation(Picky(), [], WIDTH, channels_last=False) == (False, None)
    (block,) = split_tower([convolution(), Picky()])
    assert block.activation is None
    assert not block.has_pre
