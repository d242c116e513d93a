"""Cosine alignment: a backbone's map teaches, and the weight follows the share of the gradient."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosskd import CosineAlignment, Distiller, Schedule
from crosskd.adapters import backbone
from crosskd.losses import cosine_loss
from crosskd.methods import cosine
from crosskd.methods.cosine import GradientShare
from crosskd.pairing import Pair, match_levels
from crosskd.step import Step
from tests.helpers.steps import PlainAdapter, PlainHead, make_side
from tests.helpers.tiny import tiny_batch, tiny_retinanet

STRIDES = (8.0, 16.0, 32.0)


def method_for(
    teacher: tuple[float, ...], student: tuple[float, ...] = STRIDES, *, rescaled: bool = False, **settings
) -> CosineAlignment:
    sides = [
        PlainAdapter(*heads, strides=strides, widths=(6,) * len(strides))
        for heads, strides in (((), teacher), ((PlainHead(),), student))
    ]
    levels, scale = match_levels(teacher, student, rescaled=rescaled)
    method = CosineAlignment(**settings)
    method.setup(Pair(*sides, levels=levels, scale=scale))
    return method


def distiller_of(**settings) -> Distiller:
    """A transformer's patches of 16 pixels teach a RetinaNet of 32 channels."""
    torch.manual_seed(0)
    teacher, spec = nn.Conv2d(3, 24, 16, stride=16), backbone(image_size=64)
    return Distiller(
        teacher, tiny_retinanet(seed=1, blocks=1), CosineAlignment(**settings), teacher_adapter=spec
    )


# -- which maps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "student", "matches"),
    [
        ((32.0,), STRIDES, ((2, 0),)),
        ((14.0,), STRIDES, ((2, 0),)),  # a patch of 14 pixels
        ((16.0, 16.0), STRIDES, ((2, 1),)),  # two blocks of a vision transformer: the later
        ((8.0, 16.0, 32.0, 64.0, 128.0), (8.0, 16.0, 32.0, 64.0, 128.0), ((2, 2),)),
        ((4.0, 8.0), STRIDES, ((2, 1),)),
        ((64.0, 128.0), STRIDES, ((2, 0),)),
        ((16.0, 32.0), (4.0, 8.0, 16.0), ((2, 0),)),
    ],
)
def test_one_map_unless_levels_are_given(teacher, student, matches):
    assert method_for(teacher, student).matches == matches


def test_the_stride_is_that_at_the_students_resolution():
    """The teacher sees images of twice the side: its stride 64 is 32 there."""
    assert method_for((16.0, 32.0, 64.0), rescaled=True).matches == ((2, 2),)


def test_levels_that_are_given_take_the_teachers_nearest():
    assert method_for((14.0,), levels=(0, 1, 2)).matches == ((0, 0), (1, 0), (2, 0))
    assert method_for((8.0, 16.0), levels=(2, 0)).matches == ((2, 1), (0, 0))


def test_error_levels_that_the_student_lacks():
    with pytest.raises(ValueError, match=r"levels=\(3,\), but the student has 3"):
        method_for((16.0,), levels=(3,))


# -- numbers --------------------------------------------------------------------------------------


def by_hand(student: nn.Module, teacher: Tensor, projection: nn.Conv2d, level: int, pixels: Tensor):
    """The student's map and the loss on it, position by position, in float64."""
    found = list(student.backbone(pixels).values())[level]
    leaf = found.detach().double().requires_grad_()
    weight, bias = projection.weight.detach().double()[:, :, 0, 0], projection.bias.detach().double()
    wanted = F.interpolate(teacher.double(), size=leaf.shape[2:], mode="bilinear", align_corners=False)
    losses = []
    for image in range(leaf.shape[0]):
        for y in range(leaf.shape[2]):
            for x in range(leaf.shape[3]):
                s, t = weight @ leaf[image, :, y, x] + bias, wanted[image, :, y, x]
                losses.append(1 - (s @ t) / (s.square().sum().sqrt() * t.square().sum().sqrt()))
    return leaf, torch.stack(losses).mean()


@pytest.mark.parametrize(("settings", "levels"), [({}, (2,)), ({"levels": (0, 2)}, (0, 2))])
def test_the_loss_and_its_gradient_on_a_whole_detector(settings, levels):
    distiller = distiller_of(**settings)
    images, targets = tiny_batch()
    trace = distiller.trace(images, targets)
    losses = distiller.named_losses(trace)
    assert set(losses) == {"bbox_regression", "classification", "kd_cosine"}
    method = distiller.methods["cosine"]
    assert [level for level, _ in method.matches] == list(levels)
    assert set(method.projections) == {f"level{level}" for level in levels}
    pixels = distiller.student.transform(images)[0].tensors
    (teacher,) = distiller.teacher_adapter.maps(pixels)
    total = torch.zeros((), dtype=torch.float64)
    found = torch.autograd.grad(losses["kd_cosine"], [trace.student.maps[level] for level in levels])
    for level, gradient in zip(levels, found, strict=True):
        projection = method.projections[f"level{level}"].convolution
        leaf, loss = by_hand(distiller.student, teacher, projection, level, pixels)
        (expected,) = torch.autograd.grad(10 * loss, leaf)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
        total += 10 * loss.detach()
    assert losses["kd_cosine"].item() == pytest.approx(total.item(), rel=1e-5)


def test_unlabelled_images_are_distilled():
    distiller = distiller_of()
    losses = distiller(tiny_batch()[0])
    assert set(losses) == {"kd_cosine"}
    losses["kd_cosine"].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in distiller.methods.parameters())


def test_what_is_trained_is_the_distillers_and_not_the_students():
    distiller = distiller_of(gradient_share=0.3)
    added = {key for key in distiller.state_dict() if not key.startswith("student.")}
    assert added == {
        "methods.cosine.projections.level2.convolution.weight",
        "methods.cosine.projections.level2.convolution.bias",
        "methods.cosine.balance.factor",
        "methods.cosine.balance._extra_state",
    }
    plain = distiller_of()
    assert not any("balance" in key for key in plain.state_dict())
    assert plain.student.state_dict().keys() == tiny_retinanet(seed=1, blocks=1).state_dict().keys()


# -- the share of the gradient --------------------------------------------------------------------


class Toy:
    """Maps of two sizes, a loss of the student's own on them, and the method that balances."""

    def __init__(self, share: float, scale: float = 1.0, **settings) -> None:
        generator = torch.Generator().manual_seed(0)
        settings = {"levels": (0, 1), "weight": 2.0, **settings}
        self.method = method_for((8.0, 16.0), STRIDES[:2], gradient_share=share, **settings)
        self.sources = [torch.randn(2, 6, side, side, generator=generator) for side in (4, 2)]
        self.teacher = [torch.randn(2, 6, side, side, generator=generator) for side in (4, 2)]
        self.pull = [0.05 * torch.randn(2, 6, side, side, generator=generator) for side in (4, 2)]
        self.scale = scale

    def maps(self) -> list[Tensor]:
        return [2 * source.clone().requires_grad_() for source in self.sources]

    def losses(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        own = sum((m * pull).sum() for m, pull in zip(maps, self.pull, strict=True))
        step = Step(make_side(maps=self.teacher), make_side(maps=maps))
        return self.method(step)["kd_cosine"], own

    def step(self) -> None:
        distillation, own = self.losses(self.maps())
        (self.scale * (distillation + own)).backward()

    @property
    def factor(self) -> float:
        return self.method.balance.factor.item()

    def share(self) -> float:
        """By two gradients of their own."""
        maps = self.maps()
        norms = [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, maps, retain_graph=True)]).norm().item()
            for loss in self.losses(maps)
        ]
        return norms[0] / sum(norms)


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_the_share_is_reached_and_kept(share):
    toy = Toy(share)
    assert abs(toy.share() - share) > 0.05
    shares = []
    for _ in range(100):
        toy.step()
        shares.append(toy.share())
    assert shares[-1] == pytest.approx(share, rel=1e-3)
    distances = [abs(found - share) for found in shares]
    assert all(after <= before + 1e-6 for before, after in pairwise(distances))  # no overshoot


def test_the_share_is_reached_in_a_distiller(monkeypatch):
    monkeypatch.setattr(cosine, "_KEPT", 0.5)
    distiller = distiller_of(gradient_share=0.3)
    batch = tiny_batch()
    for _ in range(12):
        distiller.zero_grad()
        sum(distiller(*batch).values()).backward()
    trace = distiller.trace(*batch)
    losses = distiller.named_losses(trace)
    own = losses["bbox_regression"] + losses["classification"]
    level = trace.student.maps[2]
    gradients = [torch.autograd.grad(x, level, retain_graph=True)[0] for x in (losses["kd_cosine"], own)]
    norms = torch.stack([gradient.norm() for gradient in gradients])
    assert (norms[0] / norms.sum()).item() == pytest.approx(0.3, rel=0.01)


def test_a_scale_of_the_gradients_does_not_matter():
    """A GradScaler multiplies all of them."""
    plain, scaled = Toy(0.4), Toy(0.4, scale=2.0**16)
    for toy in (plain, scaled):
        for _ in range(3):
            toy.step()
    assert plain.factor != 1
    assert scaled.factor == pytest.approx(plain.factor, rel=1e-5)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-5), (torch.bfloat16, 0.01)])
def test_maps_of_another_type(dtype, rel):
    plain, other = Toy(0.4), Toy(0.4)
    other.sources = [source.to(dtype) for source in other.sources]
    for toy in (plain, other):
        for _ in range(3):
            toy.step()
    assert other.factor == pytest.approx(plain.factor, rel=rel)


def test_the_factor_is_applied_from_the_next_step_on():
    toy = Toy(0.4)
    first = toy.losses(toy.maps())
    sum(first).backward()
    assert toy.factor == 1
    second, _ = toy.losses(toy.maps())
    assert toy.factor != 1
    assert second.item() == pytest.approx(first[0].item() * toy.factor, rel=1e-6)


def test_the_factor_stays_within_bounds(monkeypatch):
    toy = Toy(0.4)
    toy.pull = [1e8 * pull for pull in toy.pull]
    toy.step()
    toy.step()
    assert toy.factor == pytest.approx(1000**0.1, rel=1e-4)  # no jump
    monkeypatch.setattr(cosine, "_KEPT", 0.5)
    for _ in range(20):
        toy.step()
    assert toy.factor == pytest.approx(1000, rel=1e-4)
    toy.pull = [1e-13 * pull for pull in toy.pull]
    for _ in range(20):
        toy.step()
    assert toy.factor == pytest.approx(0.001, rel=1e-4)


@pytest.mark.parametrize("what", ["no_grad", "no backward", "own alone", "others alone", "infinite", "zero"])
def test_steps_that_show_nothing_keep_the_factor(what):
    toy = Toy(0.4)
    for _ in range(3):
        toy.step()
    toy.losses(toy.maps())  # takes in what the last of them has shown
    before = toy.factor
    if what == "no_grad":
        with torch.no_grad():
            assert not toy.losses(toy.maps())[0].requires_grad
    elif what == "infinite":
        toy.scale = math.inf
        toy.step()
    elif what != "no backward":
        distillation, own = toy.losses(toy.maps())
        losses = {"own alone": distillation, "others alone": own, "zero": 0 * (distillation + own)}
        losses[what].backward()
    toy.losses(toy.maps())
    assert toy.factor == before


def test_two_forwards_before_one_backward():
    """Labelled and unlabelled images of one step: what both have shown counts together."""
    toy = Toy(0.4)
    first, second = toy.losses(toy.maps()), toy.losses(toy.maps())
    sum((*first, *second)).backward()
    once = Toy(0.4)
    once.step()
    for each in (toy, once):
        each.losses(each.maps())
    assert toy.factor == pytest.approx(once.factor, rel=1e-5)


def test_processes_agree_on_the_factor(monkeypatch):
    """Each gets the mean of both's norms, once a step."""
    ranks = [Toy(0.4), Toy(0.4)]
    ranks[1].pull = [7 * pull for pull in ranks[1].pull]
    alone = Toy(0.4)
    for toy in (*ranks, alone):
        toy.step()
    means = sum(toy.method.balance.squares.sqrt() for toy in ranks) / 2
    calls = []
    monkeypatch.setattr(cosine, "mean_over_ranks", lambda norms: calls.append(norms) or means)
    for toy in ranks:
        toy.losses(toy.maps())
    assert len(calls) == 2
    assert ranks[0].factor == ranks[1].factor
    own, others = means.tolist()
    assert ranks[0].factor == pytest.approx((others / own * 0.4 / 0.6) ** 0.1, rel=1e-5)
    monkeypatch.undo()
    alone.losses(alone.maps())
    assert alone.factor != ranks[0].factor


def test_a_resumed_run_goes_on_as_the_unbroken_one():
    whole, first, second = Toy(0.4), Toy(0.4), Toy(0.4)
    for _ in range(4):
        whole.step()
        first.step()
    second.method.load_state_dict(first.method.state_dict())
    for toy in (whole, second):
        toy.step()
        toy.losses(toy.maps())
    assert whole.factor == second.factor != first.factor


@pytest.mark.slow
def test_compiled_steps_have_the_same_losses_and_factor():
    eager, other = (distiller_of(gradient_share=0.3) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager")
    for _ in range(3):
        for distiller, call in ((eager, eager), (other, compiled)):
            losses = call(*tiny_batch())
            sum(losses.values()).backward()
            distiller.zero_grad()
    factors = [distiller.methods["cosine"].balance.factor.item() for distiller in (eager, other)]
    assert factors[0] != 1
    assert factors[1] == pytest.approx(factors[0], rel=1e-4)
    torch._dynamo.reset()


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 1, -0.1, math.nan])
def test_error_share(share):
    with pytest.raises(ValueError, match=f"gradient_share must be between 0 and 1, got {share}"):
        CosineAlignment(gradient_share=share)


def test_a_schedule_beside_a_share_may_only_stop():
    for schedule in (Schedule(warmup=2), Schedule(decay=(2, 4))):
        with pytest.raises(ValueError, match="gradient_share= holds .* warm-up or decay"):
            CosineAlignment(gradient_share=0.3, schedule=schedule)
        CosineAlignment(schedule=schedule)
    assert CosineAlignment(gradient_share=0.3, schedule=Schedule(stop=2)).watches_maps
    assert not CosineAlignment().watches_maps


def test_printing_shows_the_settings():
    assert repr(CosineAlignment(2.0)).startswith(
        "CosineAlignment(\n  weight=2.0, levels=None, gradient_share=None"
    )
    assert CosineAlignment().loss_names() == ("kd_cosine",)
    assert method_for((16.0,)).weight == 10
    assert isinstance(CosineAlignment(gradient_share=0.2).balance, GradientShare)


def test_own_map_has_no_loss():
    maps = [torch.randn(2, 6, 8, 8)]
    method = method_for((8.0,), (8.0,))
    student = maps[0].clone().requires_grad_()
    loss = method(Step(make_side(maps=maps), make_side(maps=[student])))["kd_cosine"]
    assert loss.item() == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(loss, 10 * cosine_loss(student, maps[0]))
