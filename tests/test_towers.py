"""Towers: how layers are grouped into blocks, tapped on the way, and taken up again behind a split."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from crosskd.towers import Block, Branch, Tapped, TapPoint, Tower, split_tower

WIDTH = 8


def convolution(width_in: int = WIDTH, width_out: int = WIDTH) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, padding=1)


def torchvision_blocks(count: int = 3, norm: bool = False) -> nn.Sequential:
    """As in RetinaNet: a module a block, its ReLU in place."""
    norm_layer = partial(nn.GroupNorm, 4) if norm else None
    return nn.Sequential(*(Conv2dNormActivation(WIDTH, WIDTH, norm_layer=norm_layer) for _ in range(count)))


def flat_run(count: int = 3, inplace: bool = False) -> nn.Sequential:
    """As in FCOS: convolution, GroupNorm, ReLU, all in one row."""
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [convolution(), nn.GroupNorm(4, WIDTH), nn.ReLU(inplace=inplace)]
    return nn.Sequential(*layers)


class OwnBlock(nn.Module):
    """A user's block, which only its own forward can run."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = convolution()
        self.gate = nn.Parameter(torch.ones(1))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        return self.activation(self.gate * self.convolution(features) + 0.5)


class FunctionalBlock(nn.Module):
    """A user's block without a module for its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = convolution()

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.convolution(features))


def linear_tower() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, WIDTH), nn.ReLU())


TOWERS = {
    "torchvision blocks": torchvision_blocks,
    "torchvision blocks with norm": partial(torchvision_blocks, norm=True),
    "flat run": flat_run,
    "flat run, in place": partial(flat_run, inplace=True),
    "own blocks": lambda: nn.ModuleList(OwnBlock() for _ in range(3)),
    "functional blocks": lambda: nn.ModuleList(FunctionalBlock() for _ in range(3)),
    "no activation": lambda: nn.Sequential(convolution(), convolution()),
    "mixed": lambda: nn.Sequential(convolution(), nn.ReLU(inplace=True), *torchvision_blocks(1), OwnBlock()),
    "linear": linear_tower,
}
every_tower = pytest.mark.parametrize("name", TOWERS)


def features_for(name: str) -> Tensor:
    return torch.randn(5, WIDTH) if name == "linear" else torch.randn(2, WIDTH, 6, 7)


def plain(modules: nn.Module, features: Tensor) -> Tensor:
    """What the detector itself computes."""
    features = features.clone()
    for module in modules:
        features = module(features)
    return features


def points_of(tower: Tower) -> list[TapPoint]:
    points = [TapPoint(n, "post") for n in range(len(tower.blocks) + 1)]
    return points + [
        TapPoint(n, "pre") for n in range(len(tower.blocks) + 1) if not n or tower.blocks[n - 1].has_pre
    ]


# ---------------------------------------------------------------------------------------------
# Grouping


@pytest.mark.parametrize(
    ("name", "layers", "activations"),
    [
        ("torchvision blocks", [["Conv2d"]] * 3, ["ReLU"] * 3),
        ("torchvision blocks with norm", [["Conv2d", "GroupNorm"]] * 3, ["ReLU"] * 3),
        ("flat run", [["Conv2d", "GroupNorm"]] * 3, ["ReLU"] * 3),
        ("own blocks", [["OwnBlock"]] * 3, ["ReLU"] * 3),
        ("functional blocks", [["FunctionalBlock"]] * 3, [None] * 3),
        ("no activation", [["Conv2d"]] * 2, [None] * 2),
        ("mixed", [["Conv2d"], ["Conv2d"], ["OwnBlock"]], ["ReLU"] * 3),
        ("linear", [["Linear", "LayerNorm"], ["Linear"]], ["GELU", "ReLU"]),
    ],
)
def test_blocks(name, layers, activations):
    blocks = split_tower(TOWERS[name]())
    assert [[type(layer).__name__ for layer in block.layers] for block in blocks] == layers
    found = [block.activation and type(block.activation).__name__ for block in blocks]
    assert found == activations


@pytest.mark.parametrize("make", [list, tuple, nn.ModuleList, lambda modules: nn.Sequential(*modules)])
def test_any_sequence_of_modules_is_a_tower(make):
    modules = [convolution(), nn.ReLU(), convolution()]
    assert [len(block.layers) for block in split_tower(make(modules))] == [1, 1]


def test_layers_behind_a_composite_block_belong_to_it():
    own, relu, norm = OwnBlock(), nn.ReLU(), nn.GroupNorm(4, WIDTH)
    linear = nn.Sequential(convolution(), nn.GroupNorm(4, WIDTH))
    (block,) = split_tower([linear, relu])
    assert block.activation is relu
    assert block.has_pre
    (block,) = split_tower([nn.Sequential(convolution(), nn.ReLU()), norm])
    assert block.layers[-1] is norm
    assert not block.has_pre
    (block,) = split_tower([own, norm, relu])
    assert block.layers == (own, norm)
    assert block.activation is relu
    features = torch.randn(1, WIDTH, 4, 4)
    torch.testing.assert_close(block(features), relu(norm(own(features))))


@pytest.mark.parametrize(
    ("modules", "has_pre"),
    [
        ([convolution(), nn.ReLU()], True),
        ([convolution(), nn.GroupNorm(4, WIDTH)], True),
        ([nn.Sequential(convolution(), nn.GroupNorm(4, WIDTH))], True),
        ([convolution(), nn.ReLU(), nn.Dropout()], False),
        ([nn.Sequential(convolution(), nn.ReLU(), nn.Dropout())], False),
        ([OwnBlock()], False),
        ([OwnBlock(), nn.Dropout()], False),
        ([FunctionalBlock()], False),
        ([FunctionalBlock(), nn.Dropout()], False),
        ([nn.Sequential(FunctionalBlock(), nn.Dropout())], False),
        ([FunctionalBlock(), nn.Dropout(), nn.ReLU()], True),
    ],
)
def test_where_a_tap_before_the_activation_can_be_taken(modules, has_pre):
    (block,) = split_tower(modules)
    assert block.has_pre is has_pre


def test_a_layer_may_stand_in_a_tower_twice():
    """Activations are often shared; ``children()`` would name them but once."""
    relu = nn.ReLU()
    layers = [convolution(), relu, convolution(), relu]
    features = torch.randn(1, WIDTH, 5, 5)
    for modules in (nn.Sequential(*layers), nn.Sequential(nn.Sequential(*layers))):
        tower = Tower.of(modules, "tower")
        assert torch.equal(tower.run(features, ())[0], modules(features))
        assert sum(block.activation is relu for block in tower.blocks) == len(tower.blocks)


def test_widths():
    tower = Tower.of([convolution(8, 4), nn.ReLU(), convolution(4, 6), nn.ReLU()], "regression tower")
    assert [tower.width(position) for position in range(3)] == [8, 4, 6]
    assert Tower.of(linear_tower(), "tower").width(1) == 6
    assert Tower.of([], "tower", width_in=16).width(0) == 16


class Scale(nn.Module):
    """Has a weight of two dimensions, and no attribute for a width."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, 1))

    def forward(self, features: Tensor) -> Tensor:
        return features * self.weight[..., None]


def test_width_is_that_of_the_last_block_that_has_one():
    tower = Tower.of([convolution(4, WIDTH), Scale()], "tower")
    assert tower.width(2) == WIDTH
    with pytest.raises(ValueError, match="regression tower: no layer .* its input width; hand in width_in"):
        Tower.of([Scale()], "regression tower")
    assert Tower.of([Scale()], "tower", width_in=WIDTH).width(1) == WIDTH


# ---------------------------------------------------------------------------------------------
# Running


@every_tower
def test_run_is_the_detectors_own_forward(name):
    modules, features = TOWERS[name](), features_for(name)
    tower = Tower.of(modules, name)
    expected = plain(modules, features)
    for points in ((), points_of(tower)):
        output, taps = tower.run(features.clone(), points)
        assert torch.equal(output, expected)
        assert set(taps) == set(points)


@every_tower
def test_taps_hold_what_stands_at_their_place(name):
    modules, features = TOWERS[name](), features_for(name)
    tower = Tower.of(modules, name)
    _, taps = tower.run(features.clone(), points_of(tower))
    for position in range(len(tower.blocks) + 1):
        post = features.clone()
        for block in tower.blocks[:position]:
            post = block(post)
        assert torch.equal(taps[TapPoint(position, "post")].read(), post)
        if TapPoint(position, "pre") in taps:
            pre = taps[TapPoint(position, "pre")].read()
            activation = tower.blocks[position - 1].activation if position else None
            assert torch.equal(activation(pre.clone()) if activation else pre, post)


@every_tower
def test_tail_takes_up_where_the_run_was_tapped(name):
    modules, features = TOWERS[name](), features_for(name)
    tower = Tower.of(modules, name)
    for point in points_of(tower):
        output, taps = tower.run(features.clone(), [point])
        tapped = taps[point].read()
        activation = tower.blocks[point.position - 1].activation if point.position else None
        if point.tap == "pre" or activation is None or isinstance(activation, nn.ReLU):
            # A second ReLU changes nothing, so the tail repeats the rest of the tower exactly.
            assert torch.equal(tower.tail(tapped, point), output)
        else:
            rest = activation(tapped.clone())
            for block in tower.blocks[point.position :]:
                rest = block(rest)
            assert torch.equal(tower.tail(tapped, point), rest)


@every_tower
def test_tail_activates_what_alignment_made_negative(name):
    tower = Tower.of(TOWERS[name](), name)
    last = TapPoint(len(tower.blocks), "post")
    features = features_for(name)
    activation = tower.blocks[-1].activation
    before = features.clone()
    expected = features.relu() if activation else features
    assert torch.equal(tower.tail(features, last), expected)
    assert torch.equal(features, before)


def test_tail_lets_gradients_through_to_the_tap():
    tower = Tower.of(torchvision_blocks(), "tower")
    for point in points_of(tower):
        features = torch.randn(1, WIDTH, 4, 4, requires_grad=True)
        tower.tail(features * 1, point).sum().backward()
        assert features.grad.abs().sum() > 0


def test_an_in_place_layer_overwrites_no_tap():
    """Not the block's own ReLU, nor a block that starts with one, in any combination of taps."""
    modules = [convolution(), nn.Sequential(nn.ReLU(inplace=True), convolution()), OwnBlock()]
    tower = Tower.of(modules, "tower")
    features = torch.randn(1, WIDTH, 4, 4)
    middle = modules[0](features)
    for points in ([TapPoint(1, "post")], [TapPoint(1, "pre")], [TapPoint(1, "pre"), TapPoint(1, "post")]):
        output, taps = tower.run(features, points)
        for tapped in taps.values():
            assert torch.equal(tapped.read(), middle)
        assert torch.equal(output, plain(modules, features))


def test_input_tapped_at_position_0_is_not_overwritten():
    first = nn.Sequential(nn.ReLU(inplace=True), convolution())
    features = torch.randn(1, WIDTH, 4, 4)
    before = features.clone()
    _, taps = Tower.of([first], "tower").run(features, [TapPoint(0, "post")])
    assert torch.equal(taps[TapPoint(0, "post")].read(), before)


class Overwriting(nn.Module):
    """Works in place where no attribute says so."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = convolution()

    def forward(self, features: Tensor) -> Tensor:
        return self.convolution(features.mul_(2))


def test_a_hidden_overwrite_is_an_error():
    tower = Tower.of([convolution(), Overwriting()], "regression tower")
    with torch.no_grad():
        _, taps = tower.run(torch.randn(1, WIDTH, 4, 4), [TapPoint(1, "post")])
    message = "tapped at the regression tower, position 1 were overwritten in place by a later layer"
    with pytest.raises(ValueError, match=message):
        taps[TapPoint(1, "post")].read()


def test_inference_mode_keeps_no_versions():
    with torch.inference_mode():
        tapped = Tapped.at("here", torch.ones(1))
    assert tapped.read().item() == 1


def test_a_block_without_activation_passes_features_through():
    features = torch.randn(1, WIDTH, 3, 3)
    assert Block((convolution(),)).activate(features) is features


# ---------------------------------------------------------------------------------------------
# Channels last


class Attending(nn.Module):
    """A transformer's block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, features: Tensor) -> Tensor:
        normed = self.norm(features)
        return features + self.attention(normed, normed, normed)[0]


@pytest.mark.parametrize(
    ("modules", "space"),
    [*((linear_tower(), space) for space in ((), (7,), (4, 3))), (nn.ModuleList([Attending()] * 2), (7,))],
)
def test_towers_that_take_channels_last_are_tapped_with_channels_first(modules, space):
    tower = Tower.of(modules, "tower")
    assert tower.channels_last
    features = torch.randn(2, *space, WIDTH)
    output, taps = tower.run(features, points_of(tower))
    assert torch.equal(output, plain(modules, features))
    assert torch.equal(taps[TapPoint(0, "post")].read(), features.movedim(-1, 1))
    for position in range(len(tower.blocks) + 1):
        tapped = taps[TapPoint(position, "post")].read()
        assert tapped.shape == (2, tower.width(position), *space)
        if position != 1 or isinstance(modules[0], Attending):  # a second GELU would change it
            torch.testing.assert_close(tower.tail(tapped, TapPoint(position, "post")), output)


def test_a_tower_of_no_layers_is_given_where_its_channels_are():
    point, features = TapPoint(0, "post"), torch.randn(2, 7, WIDTH)
    tower = Tower.of([], "tower", width_in=WIDTH, channels_last=True)
    output, taps = tower.run(features, [point])
    assert output is features
    assert torch.equal(taps[point].read(), features.mT)
    assert torch.equal(tower.tail(features.mT, point), features)
    assert not Tower.of([], "tower", width_in=WIDTH).channels_last
    assert not Tower.of(torchvision_blocks(), "tower").channels_last


# ---------------------------------------------------------------------------------------------
# Maps that become vectors


def flattening(*, composite: bool = False) -> nn.Sequential:
    """As in torchvision's second box head: convolutions, then linear layers."""
    linear = [nn.Flatten(), nn.Linear(WIDTH * 3 * 3, 5), nn.ReLU(inplace=True)]
    behind = [nn.Sequential(*linear)] if composite else linear
    return nn.Sequential(convolution(), nn.ReLU(), *behind, nn.Linear(5, 6), nn.ReLU(inplace=True))


@pytest.mark.parametrize("composite", [False, True])
def test_a_flatten_belongs_to_the_linear_layer_behind_it(composite):
    modules = flattening(composite=composite)
    tower = Tower.of(modules, "box tower")
    assert [len(block.layers) for block in tower.blocks] == [1, 2, 1]
    assert not tower.channels_last
    assert tower.width_in == WIDTH
    assert [tower.width(position) for position in range(4)] == [WIDTH, WIDTH, 5, 6]
    assert [tower.is_flat(position) for position in range(4)] == [False, False, True, True]
    features = torch.randn(2, WIDTH, 3, 3)
    output, taps = tower.run(features, points_of(tower))
    assert torch.equal(output, plain(modules, features))
    for position, shape in enumerate([(WIDTH, 3, 3), (WIDTH, 3, 3), (5,), (6,)]):
        tapped = taps[TapPoint(position, "post")].read()
        assert tapped.shape == (2, *shape)
        assert torch.equal(tower.tail(tapped, TapPoint(position, "post")), output)


def test_a_tower_that_starts_with_a_flatten_is_given_its_width():
    layers = [nn.Flatten(), nn.Linear(WIDTH * 3 * 3, 5), nn.ReLU()]
    with pytest.raises(ValueError, match="box tower: no layer .* its input width; hand in width_in"):
        Tower.of(layers, "box tower")
    tower = Tower.of(layers, "box tower", width_in=WIDTH)
    assert (tower.width(0), tower.width(1)) == (WIDTH, 5)
    assert (tower.is_flat(0), tower.is_flat(1)) == (False, True)
    assert not tower.channels_last
    features = torch.randn(2, WIDTH, 3, 3)
    output, taps = tower.run(features, points_of(tower))
    assert torch.equal(taps[TapPoint(0, "post")].read(), features)
    assert torch.equal(tower.tail(features, TapPoint(0, "post")), output)


def test_a_tower_that_ends_in_a_flatten_is_refused():
    with pytest.raises(ValueError, match=r"box tower ends in an nn\.Flatten, .*: leave it to the predictors"):
        Tower.of([convolution(), nn.ReLU(), nn.Flatten()], "box tower")


def test_towers_without_a_flatten_are_never_flat():
    for modules in (torchvision_blocks(), linear_tower()):
        tower = Tower.of(modules, "tower")
        assert not any(tower.is_flat(position) for position in range(len(tower.blocks) + 1))


# ---------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("position", [-1, 4])
def test_error_position_does_not_fit(position):
    tower = Tower.of(torchvision_blocks(), "classification tower")
    message = (
        rf"position {position} does not fit the classification tower of 3 blocks: "
        r"choose from 0 \(its input\) to 3 \(its output\)"
    )
    with pytest.raises(ValueError, match=message):
        tower.check(TapPoint(position, "post"))


def test_error_unknown_tap():
    with pytest.raises(ValueError, match=re.escape('tap must be "post" or "pre", got \'middle\'')):
        Tower.of(torchvision_blocks(), "tower").check(TapPoint(1, "middle"))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            [convolution(), nn.ReLU(), OwnBlock()],
            r'tap="pre" at position 2: block 2 of the regression tower \(OwnBlock\) .* position of \[0, 1\]',
        ),
        (
            [convolution(), nn.ReLU(), nn.Dropout(), convolution()],
            r'tap="pre" at position 1: block 1 of the regression tower \(Conv2d, ReLU, Dropout\) .* \[0, 2\]',
        ),
    ],
)
def test_error_tap_before_a_hidden_activation(modules, message):
    tower = Tower.of(modules, "regression tower")
    position = next(n for n, block in enumerate(tower.blocks, 1) if not block.has_pre)
    with pytest.raises(ValueError, match=message):
        tower.check(TapPoint(position, "pre"))
    tower.check(TapPoint(position, "post"))
    tower.check(TapPoint(0, "pre"))


def test_error_tower_that_is_one_module():
    message = "regression tower is a Conv2d, which cannot be split: expected an nn.Sequential"
    with pytest.raises(ValueError, match=message):
        Tower.of(convolution(), "regression tower")
    with pytest.raises(ValueError, match=r"^tower is a OwnBlock, which cannot be split"):
        split_tower(OwnBlock())


@pytest.mark.parametrize(
    ("first", "name"),
    [(nn.ReLU(), "ReLU"), (nn.GroupNorm(4, WIDTH), "GroupNorm"), (nn.Sequential(nn.ReLU()), "ReLU")],
)
def test_error_tower_starts_without_a_convolution(first, name):
    message = f"classification tower starts with {name}, before any convolution or linear layer"
    with pytest.raises(ValueError, match=message):
        split_tower([first, convolution()], "classification tower")


def test_error_something_else_than_modules():
    with pytest.raises(TypeError, match=r"regression tower: layer 1 is a str, expected an nn\.Module"):
        split_tower([convolution(), "relu"], "regression tower")


# ---------------------------------------------------------------------------------------------
# Branches


def branch_of(*towers: Tower) -> Branch:
    return Branch("regression", towers, {"bbox_reg": convolution()})


def test_a_branch_shares_one_tower_or_has_one_a_level():
    first, second = (Tower.of(flat_run(count), f"tower {count}") for count in (3, 2))
    shared, own = branch_of(first), branch_of(first, second)
    assert [shared.tower(level) for level in range(3)] == [first] * 3
    assert [own.tower(level) for level in range(2)] == [first, second]
    own.check(TapPoint(2, "post"))
    with pytest.raises(ValueError, match="position 3 does not fit the tower 2 of 2 blocks"):
        own.check(TapPoint(3, "post"))


def test_error_level_without_a_tower():
    first = Tower.of(flat_run(), "tower")
    with pytest.raises(
        ValueError, match="the regression branch has towers for 2 levels, but there is a level 3"
    ):
        branch_of(first, first).tower(2)
