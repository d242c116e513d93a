"""CrossKD: the teacher's head reads the student's features, so only what stands before the split learns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from crosskd import CrossKD, Distiller, PredictionMimicking
from crosskd.align import align_statistics, feature_statistics
from crosskd.methods.settings import SETTINGS
from crosskd.predictions import Predictions
from crosskd.step import Step
from crosskd.towers import Branch, Tapped, TapPoint, Tower
from tests.helpers.steps import METHOD, PlainHead, make_pair, make_predictions, make_side
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet

BRANCHES = ("classification_head", "regression_head")
PREDICTORS = {"classification_head": ("cls_logits",), "regression_head": ("bbox_reg", "bbox_ctrness")}

every_family = pytest.mark.parametrize("build", [tiny_retinanet, tiny_fcos])
every_split = pytest.mark.parametrize(
    ("position", "tap"), [(p, tap) for p in range(5) for tap in ("post", "pre")]
)


def distillation(losses: dict[str, Tensor]) -> Tensor:
    return sum(loss for name, loss in losses.items() if name.startswith("kd_"))


def convolutions(head: nn.Module, branch: str) -> list[nn.Conv2d]:
    return [m for m in getattr(head, branch).conv.modules() if isinstance(m, nn.Conv2d)]


def tower_norms(head: nn.Module, branch: str) -> list[nn.GroupNorm]:
    return [m for m in getattr(head, branch).conv.modules() if isinstance(m, nn.GroupNorm)]


def felt(module: nn.Module) -> list[bool]:
    """Whether each parameter has a gradient that is not exactly zero."""
    return [p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters()]


# ---------------------------------------------------------------------------------------------
# What makes it CrossKD


@every_family
@every_split
def test_layers_after_the_split_feel_nothing_and_those_before_do(build, position, tap):
    distiller = Distiller(build(seed=1, norm="group"), build(seed=2, norm="group"), CrossKD(position, tap))
    distillation(distiller(*tiny_batch())).backward()
    head = distiller.student.head
    for branch in BRANCHES:
        for layers in (convolutions(head, branch), tower_norms(head, branch)):
            for layer in layers[:position]:
                assert felt(layer)[0], f"a weight of {branch} before the split feels nothing"
            for layer in layers[position:]:
                assert not any(felt(layer)), f"{branch} is pulled after the split"
        for predictor in PREDICTORS[branch]:
            assert not any(felt(getattr(getattr(head, branch), predictor, nn.Identity())))
    assert any(felt(distiller.student.backbone))


@every_family
def test_mimicking_fails_that_test(build):
    distiller = Distiller(build(seed=1), build(seed=2), PredictionMimicking())
    distillation(distiller(*tiny_batch())).backward()
    for branch in BRANCHES:
        assert felt(convolutions(distiller.student.head, branch)[3])[0]


@every_family
@every_split
def test_no_parameter_of_the_teacher_has_a_gradient(build, position, tap):
    teacher = build(seed=1)
    distiller = Distiller(teacher, build(seed=2), CrossKD(position, tap))
    sum(distiller(*tiny_batch()).values()).backward()
    for detector in (teacher, distiller.teacher):
        assert all(parameter.grad is None for parameter in detector.parameters())
    assert not any(parameter.requires_grad for parameter in distiller.teacher.parameters())


@every_family
@every_split
def test_own_teacher_has_nearly_no_loss(build, position, tap):
    student = build(seed=2)
    own = Distiller(deepcopy(student), student, CrossKD(position, tap))(*tiny_batch())
    other = Distiller(build(seed=1), student, CrossKD(position, tap))(*tiny_batch())
    for name in ("kd_cls", "kd_reg"):
        # Alignment divides by a deviation with 1e-6 added, so the features are not quite the same.
        assert own[name].item() < 1e-4 < 1e-2 < other[name].item()


@every_family
def test_own_teacher_has_nearly_no_gradient(build):
    """With beta 2, which is smooth; with 1, and for IoU, the loss has a kink where the two agree."""
    student, method = build(seed=2), CrossKD(reg_weight=0, beta=2.0)
    gradients = []
    for teacher in (deepcopy(student), build(seed=1)):
        student.zero_grad()
        Distiller(teacher, student, method)(*tiny_batch())["kd_cls"].backward()
        gradients.append(max(p.grad.abs().max().item() for p in student.parameters() if p.grad is not None))
    assert gradients[0] < 1e-2 * gradients[1]


@every_family
def test_distillation_lowers_its_own_loss(build):
    distiller = Distiller(build(seed=1), build(seed=2), CrossKD())
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-3)
    batch, values = tiny_batch(), []
    for _ in range(5):
        loss = distillation(distiller(*batch))
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < values[0]


# ---------------------------------------------------------------------------------------------
# The cross-head itself


@every_split
def test_cross_head_is_align_then_the_rest_of_the_teachers_tower(position, tap):
    """Written out once more, with plain modules, for one branch of a RetinaNet."""
    teacher, student = tiny_retinanet(seed=1).eval(), tiny_retinanet(seed=2)
    found: dict[str, Tensor] = {}

    class Watched(CrossKD):
        def forward(self, step):
            found["logits"] = self.cross_head(step).logits
            return super().forward(step)

    distiller = Distiller(teacher, student, Watched(position, tap))
    images, targets = tiny_batch()
    distiller(images, targets)

    pixels = student.transform(images)[0].tensors
    expected = []
    for feature_maps in zip(*(d.backbone(pixels).values() for d in (student, teacher)), strict=True):
        before = after = feature_maps
        for number in range(position):
            heads = (detector.head.classification_head for detector in (student, teacher))
            before = [head.conv[number][0](x) for head, x in zip(heads, after, strict=True)]
            after = [x.relu() for x in before]
        aligned = align_statistics(*(before if tap == "pre" else after))
        aligned = aligned.relu() if position else aligned
        head = teacher.head.classification_head
        logits = head.cls_logits(head.conv[position:](aligned))
        batch, _, height, width = logits.shape
        logits = logits.view(batch, 3, 4, height, width).permute(0, 3, 4, 1, 2)
        expected.append(logits.reshape(batch, -1, 4))
    torch.testing.assert_close(found["logits"], torch.cat(expected, dim=1), rtol=1e-5, atol=1e-6)


@every_family
def test_taps_before_and_after_the_activation_differ(build):
    values = [
        Distiller(build(seed=1), build(seed=2), CrossKD(2, tap))(*tiny_batch())["kd_cls"].item()
        for tap in ("post", "pre")
    ]
    assert values[0] != pytest.approx(values[1], rel=1e-3)


def test_the_input_of_the_tower_has_no_activation_to_tap_around():
    values = [
        Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), CrossKD(0, tap))(*tiny_batch())
        for tap in ("post", "pre")
    ]
    assert torch.equal(values[0]["kd_cls"], values[1]["kd_cls"])


def test_only_statistics_of_the_teacher_are_kept():
    features = torch.randn(2, 8, 5, 5)
    kept = CrossKD().keep_of_teacher(Tapped.at("here", features))
    expected = feature_statistics(features)
    assert torch.equal(kept.mean, expected.mean)
    assert torch.equal(kept.std, expected.std)
    assert kept.mean.numel() == kept.std.numel() == 8


# ---------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize("head_type", ["GFL", "RetinaNet", "ATSS", "FCOS"])
def test_settings_are_those_of_the_teachers_head_type_unless_given(head_type):
    teacher, student = PlainHead(head_type=head_type, bins=5), PlainHead()
    published, method = SETTINGS[head_type], CrossKD()
    method.setup(make_pair(teacher, student))
    assert method.split == (TapPoint(published.position, "post"),) * 2
    settled = method.comparison
    assert (settled.cls_weight, settled.reg_weight) == (published.cls_weight, published.reg_weight)
    assert (settled.quality_weight, settled.regression) == (published.quality_weight, published.regression)
    assert settled.beta == 1.0
    given = CrossKD(1, "pre", 0.1, 0.2, quality_weight=0.3, regression="giou", beta=2.0, temperature=3.0)
    before = given.comparison
    given.setup(make_pair(teacher, student))
    assert given.split == (TapPoint(1, "pre"),) * 2
    assert given.comparison == before


def test_printing_shows_the_settings():
    assert repr(CrossKD(2, cls_weight=0.5)) == (
        "CrossKD(\n  position=2, tap='post', cls_weight=0.5, reg_weight=None, quality_weight=None\n"
        "  (projections): ModuleDict()\n)"
    )


def test_losses_of_weight_0_are_neither_calculated_nor_named():
    method = CrossKD(reg_weight=0)
    losses = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), method)(*tiny_batch())
    assert "kd_reg" not in losses
    assert "kd_cls" in losses


def test_weights_scale_their_loss():
    def losses(**weights: float) -> dict[str, Tensor]:
        return Distiller(tiny_fcos(seed=1), tiny_fcos(seed=2), CrossKD(**weights))(*tiny_batch())

    published = losses()
    heavier = losses(cls_weight=0.8, reg_weight=0.25)
    torch.testing.assert_close(heavier["kd_cls"], 2 * published["kd_cls"])
    torch.testing.assert_close(heavier["kd_reg"], published["kd_reg"] / 3)


def test_quality_is_distilled_through_the_split_too():
    method = CrossKD(position=2, cls_weight=0, reg_weight=0, quality_weight=1.0)
    distiller = Distiller(tiny_fcos(seed=1), tiny_fcos(seed=2), method)
    losses = distiller(*tiny_batch())
    assert [name for name in losses if name.startswith("kd_")] == ["kd_quality"]
    losses["kd_quality"].backward()
    layers = convolutions(distiller.student.head, "regression_head")
    assert [felt(layer)[0] for layer in layers] == [True, True, False, False]
    assert not any(felt(distiller.student.head.regression_head.bbox_ctrness))


def test_names_that_clash_get_the_methods_name_in_front():
    methods = [CrossKD(), PredictionMimicking(reg_weight=0), CrossKD(1, cls_weight=0, name="early")]
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), methods)
    found = [name for name in distiller(*tiny_batch()) if "kd_" in name]
    assert found == ["crosskd_kd_cls", "crosskd_kd_reg", "mimicking_kd_cls", "early_kd_reg"]


# ---------------------------------------------------------------------------------------------
# Towers of other widths, and one a level


def tower(width: int, name: str = "tower", blocks: int = 2) -> Tower:
    layers = [layer for _ in range(blocks) for layer in (nn.Conv2d(width, width, 1), nn.ReLU())]
    return Tower.of(layers, name)


def branch(*towers: Tower, name: str = "regression") -> Branch:
    return Branch(name, towers, {})


def projections(teacher: Branch, student: Branch, position: int = 1) -> dict[str, tuple[int, int]]:
    method = CrossKD(position)
    method.setup(make_pair(PlainHead([teacher]), PlainHead([student])))
    return {key: (p.student_width, p.teacher_width) for key, p in method.projections.items()}


def test_projections_are_made_where_widths_differ():
    assert projections(branch(tower(8)), branch(tower(8))) == {}
    assert projections(branch(tower(8)), branch(tower(4))) == {"regression": (4, 8)}
    assert projections(branch(tower(8), tower(8)), branch(tower(8), tower(4))) == {
        "regression_level1": (4, 8)
    }
    assert projections(branch(tower(8)), branch(tower(4), tower(6))) == {
        "regression_level0": (4, 8),
        "regression_level1": (6, 8),
    }


def test_widths_are_those_at_the_split():
    growing = Tower.of([nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.ReLU()], "tower")
    shrinking = Tower.of([nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU()], "tower")
    sides = branch(shrinking), branch(growing)
    assert projections(*sides, position=0) == {"regression": (4, 8)}
    assert projections(*sides, position=2) == {"regression": (8, 4)}


@every_family
@pytest.mark.parametrize("position", [0, 2])
def test_projections_learn_from_the_distillation_alone(build, position):
    distiller = Distiller(build(width=64, seed=1), build(width=32, seed=2), CrossKD(position))
    projections = distiller.methods["crosskd"].projections
    assert set(projections) == {"classification", "regression"}
    losses = distiller(*tiny_batch())
    own = sum(loss for name, loss in losses.items() if not name.startswith("kd_"))
    own.backward(retain_graph=True)
    assert not any(felt(projections))
    distillation(losses).backward()
    # The alignment takes an offset away, so there is none: all that is there learns.
    assert [name.split(".")[-1] for name, _ in projections.named_parameters()] == ["weight", "weight"]
    assert all(felt(projections))


IDLE = {"reg_weight": "regression", "cls_weight": "classification"}


@every_family
@pytest.mark.parametrize("weight", IDLE)
def test_a_branch_without_a_loss_is_not_tapped_and_has_no_projection(build, weight):
    torch.manual_seed(0)
    whole = Distiller(build(width=64, seed=1), build(width=32, seed=2), CrossKD(1))
    distiller = Distiller(build(width=64, seed=1), build(width=32, seed=2), CrossKD(1, **{weight: 0}))
    method = distiller.methods["crosskd"]
    assert set(method.projections) == set(IDLE.values()) - {IDLE[weight]}
    assert method.tap_points(IDLE[weight]) is None
    method.load_state_dict(whole.methods["crosskd"].state_dict(), strict=False)
    losses, expected = distiller(*tiny_batch()), whole(*tiny_batch())
    (name,) = (name for name in losses if name.startswith("kd_"))
    assert name == {"reg_weight": "kd_cls", "cls_weight": "kd_reg"}[weight]
    assert torch.equal(losses[name], expected[name])
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters())


def test_a_branch_whose_quality_alone_is_distilled_is_tapped():
    """FCOS's centerness is predicted by the tower of the boxes."""
    method = CrossKD(1, cls_weight=1, reg_weight=0, quality_weight=1)
    distiller = Distiller(tiny_fcos(seed=1), tiny_fcos(seed=2), method)
    assert distiller.methods["crosskd"].idle == frozenset()
    assert {"kd_cls", "kd_quality"} <= set(distiller(*tiny_batch()))


def test_an_activation_that_cannot_be_told_is_told_of(caplog):
    class Functional(nn.Conv2d):
        def forward(self, features: Tensor) -> Tensor:
            return super().forward(features).relu()

    detectors = [tiny_retinanet(seed=seed) for seed in (1, 2)]
    for detector in detectors:
        detector.head.classification_head.conv[2] = nn.Sequential(Functional(32, 32, 3, padding=1))
    with caplog.at_level("INFO", logger="crosskd"):
        Distiller(*detectors, CrossKD(position=3))
    (told,) = [record.getMessage() for record in caplog.records if "second time" in record.getMessage()]
    assert "block 3 of the teacher's classification tower (Functional)" in told
    with pytest.raises(ValueError, match='tap="pre" at position 3'):
        Distiller(*detectors, CrossKD(position=3, tap="pre"))


def test_the_second_activation_of_ones_own_is_the_listed_ones():
    """An activation that nobody listed distils as the one that it computes."""

    class Own(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return features * features.sigmoid()

    found = []
    for activation in (nn.SiLU, Own):
        detectors = [tiny_retinanet(seed=seed) for seed in (1, 2)]
        for detector in detectors:
            for head in (detector.head.classification_head, detector.head.regression_head):
                for block in head.conv:
                    block[-1] = activation()
        for tap in ("post", "pre"):
            found.append(Distiller(*detectors, CrossKD(tap=tap))(*tiny_batch())["kd_cls"].item())
    assert found[:2] == pytest.approx(found[2:], rel=1e-5)
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def test_each_level_passes_its_own_tower_and_projection():
    outputs: list[Tensor] = []

    class Watching(PlainHead):
        def predict(self, level: int, towers: Mapping[str, Tensor]) -> Predictions:
            assert level == len(outputs)
            outputs.append(towers["regression"])
            return make_predictions()

    teacher, student = branch(tower(8), tower(8)), branch(tower(4), tower(4))
    heads = Watching([teacher]), PlainHead([student])
    method = CrossKD(1)
    method.setup(make_pair(*heads))
    taps: list[list[Tapped]] = []
    for of_side, width in ((teacher, 8), (student, 4)):
        taps.append([])
        for level, extent in enumerate((4, 2)):
            _, tapped = of_side.tower(level).run(torch.randn(2, width, extent, extent), {method.split[0]})
            taps[-1].append(tapped[method.split[0]])
    statistics = [method.keep_of_teacher(tapped) for tapped in taps[0]]
    sides = [
        make_side(make_predictions(), head=head, taps={"regression": of_side}, levels=(0, 1))
        for head, of_side in zip(heads, (statistics, taps[1]), strict=True)
    ]
    assert method.name == METHOD
    method.cross_head(Step(*sides))
    for level, output in enumerate(outputs):
        projected = method.projections[f"regression_level{level}"](taps[1][level].read())
        aligned = align_statistics(projected, statistics[level]).relu()
        torch.testing.assert_close(output, teacher.towers[level].blocks[1](aligned))
    assert len(outputs) == 2


# ---------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tap": "before"}, 'tap must be "post" or "pre", got \'before\''),
        ({"cls_weight": -1}, "cls_weight must be 0 or more, got -1"),
        ({"reg_weight": -1}, "reg_weight must be 0 or more, got -1"),
        ({"quality_weight": math.nan}, "quality_weight must be 0 or more, got nan"),
        ({"beta": -1}, "beta must be 0 or more, got -1"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"regression": "l1"}, "regression must be .* got 'l1'"),
        ({"cls_weight": 0, "reg_weight": 0}, "there is nothing to distil"),
    ],
)
def test_error_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CrossKD(**settings)


@pytest.mark.parametrize("position", [True, 1.0, "3", (1, 2, 3), (1,), (1, 2.0), [1, 2]])
def test_error_position_is_not_a_number_of_blocks(position):
    with pytest.raises(TypeError, match="position must be a whole number of blocks, or two"):
        CrossKD(position)


def test_error_position_is_not_settled():
    with pytest.raises(ValueError, match="the position is not settled yet: hand the method to a Distiller"):
        CrossKD().tap_points("classification")


@every_family
@pytest.mark.parametrize(("side", "blocks"), [("teacher", (2, 4)), ("student", (4, 2))])
def test_error_position_does_not_fit_names_side_and_branch(build, side, blocks):
    message = rf"{side}: position 3 does not fit the classification tower of 2 blocks: choose from 0 .* to 2"
    with pytest.raises(ValueError, match=message):
        Distiller(build(blocks=blocks[0], seed=1), build(blocks=blocks[1], seed=2), CrossKD(3))


def test_error_tap_before_an_activation_that_a_block_runs_itself():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(32, 32, 3, padding=1)

        def forward(self, features: Tensor) -> Tensor:
            return self.convolution(features).relu()

    student = tiny_retinanet(seed=2)
    student.head.regression_head.conv[1] = Own()
    message = r'student: tap="pre" at position 2: block 2 of the regression tower \(Own\)'
    with pytest.raises(ValueError, match=message):
        Distiller(tiny_retinanet(seed=1), student, CrossKD(2, "pre"))
    for position, tap in ((2, "post"), (3, "pre")):
        Distiller(tiny_retinanet(seed=1), student, CrossKD(position, tap))


def test_error_quality_of_a_head_without_any():
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), CrossKD(quality_weight=1.0))
    with pytest.raises(ValueError, match="quality_weight is set, but this head predicts no centerness"):
        distiller(*tiny_batch())


def test_error_distributions_of_a_teacher_without_any():
    with pytest.raises(ValueError, match="needs a teacher that predicts distributions"):
        Distiller(tiny_retinanet(), tiny_retinanet(seed=2), CrossKD(regression="distribution_kl"))
