"""DRKD: relations between locations and between objects, on whole detectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign

from crosskd import DRKD, Distiller
from crosskd.adapters import Objects, backbone
from crosskd.losses import InstanceRelation, PixelRelation
from crosskd.losses.drkd import GraphReasoning
from crosskd.methods.drkd import levels_of, pool
from crosskd.pairing import Pair
from tests.helpers.steps import PlainAdapter, PlainHead
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet

NAMES = ("kd_drkd_pixel", "kd_drkd_relation", "kd_drkd_instance")
SIDE = 256
# Of either size: the finest level's, and the next one's from a side of 224 pixels on.
BOXES = (
    [[10.0, 20, 60, 90], [100, 100, 230, 150], [0, 0, 250, 255], [200, 100, 225, 120]],
    [[100.0, 10, 220, 100], [5, 5, 240, 250]],
)


def batch_of(boxes=BOXES, side: int = SIDE) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images in float64, with a few boxes."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, side, side, generator=generator).double() for _ in boxes]
    targets = [
        {"boxes": torch.tensor(b).double().view(-1, 4), "labels": torch.ones(len(b), dtype=torch.long)}
        for b in boxes
    ]
    return images, targets


def distiller_of(*, width: int = 16, side: int = SIDE, **settings) -> Distiller:
    """In float64, with every weight of the method's away from where it begins."""
    torch.manual_seed(0)
    teacher = tiny_fcos(width=32, seed=1, side=side, blocks=1)
    student = tiny_retinanet(width=width, seed=2, side=side, blocks=1)
    distiller = Distiller(teacher, student, DRKD(**settings), prove=False)
    for parameter in distiller.methods.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return distiller.double()


def of_three_widths() -> tuple[nn.Module, backbone]:
    """A backbone whose maps have 8, 12 and 16 channels."""
    layers = [nn.Conv2d(3, 8, 8, stride=8), nn.Conv2d(8, 12, 2, stride=2), nn.Conv2d(12, 16, 2, stride=2)]
    return nn.Sequential(*layers), backbone(layers=("0", "1", "2"), image_size=64)


# -- numbers --------------------------------------------------------------------------------------


def with_relations(unit: GraphReasoning, maps: Tensor) -> Tensor:
    x = maps.flatten(2)
    shares = (
        torch.einsum("nc,bcp->bnp", unit.project.weight, x)
        / (x.square().mean(dim=(1, 2)) + 1e-6).sqrt()[:, None, None]
    )
    nodes = torch.einsum("sc,bcp,bnp->bsn", unit.state.weight, x, shares) / x.shape[2]
    nodes = nodes - torch.einsum("bsm,nm->bsn", nodes, unit.adjacency.weight)
    return maps + torch.einsum(
        "cs,st,btn,bnp->bcp", unit.extend.weight, unit.update.weight, nodes, shares
    ).view_as(maps)


def relation_by_hand(relation: InstanceRelation, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Of the objects of one image."""
    s, t = ([v / (v @ v + 1e-6).sqrt() for v in side] for side in (student, teacher))
    total = torch.zeros(()).double()
    for j in range(len(s)):
        ours, theirs = [], []
        for i in range(len(s)):
            passed = (
                relation.filter.weight[0] @ s[i]
                + relation.filter.weight[1] @ s[j]
                + relation.filter.bias.sum()
            )
            embedded = (relation.first.weight @ s[i]) @ (relation.second.weight @ s[j])
            ours.append(torch.exp(20 * embedded / (1 + torch.exp(-passed))))
            theirs.append(torch.exp(10 * (t[i] @ t[j])))
        for a, b in zip(ours, theirs, strict=True):
            total = total + (a / sum(ours) - b / sum(theirs)) ** 2
    return total


def by_hand(
    distiller: Distiller, student: list[Tensor], teacher: list[Tensor], boxes: list[Tensor]
) -> dict[str, Tensor]:
    """The three losses of maps and boxes, objects pooled by torchvision's own pooler."""
    method = distiller.methods["drkd"]
    wide = [
        method.projections[f"level{level}"].convolution(m) if method.projections else m
        for level, m in enumerate(student)
    ]
    pixels = [
        (with_relations(units.student, ours) - with_relations(units.teacher, theirs)).square().mean()
        / theirs.var(correction=0)
        for units, ours, theirs in zip(method.pixels.values(), wide, teacher, strict=True)
    ]
    pooled = []
    for maps in (wide, teacher):
        pooler = MultiScaleRoIAlign(["0", "1", "2"], 7, 2)
        named = {str(level): m for level, m in enumerate(maps)}
        pooled.append(pooler(named, boxes, [(SIDE, SIDE)] * len(boxes)))
    levels = levels_of(torch.cat(boxes), {0: 8, 1: 16, 2: 32}).tolist()
    assert set(levels) == {0, 1}
    differences = [
        (ours - theirs).square().mean() / teacher[level].var(correction=0)
        for ours, theirs, level in zip(*pooled, levels, strict=True)
    ]
    related, start = [], 0
    for of_image in boxes:
        vectors = [[o.mean(dim=(1, 2)) for o in side[start : start + len(of_image)]] for side in pooled]
        related.append(relation_by_hand(method.relations["all"], *vectors))
        start += len(of_image)
    return {
        "kd_drkd_pixel": sum(pixels) / len(pixels),
        "kd_drkd_relation": sum(related) / start,
        "kd_drkd_instance": sum(differences) / start,
    }


@pytest.mark.parametrize("width", [32, 16])  # of the teacher's width, and narrower
def test_losses_and_gradients_on_a_whole_detector(width):
    weights = {"pixel_weight": 2.0, "relation_weight": 3.0, "instance_weight": 5.0}
    distiller = distiller_of(width=width, **weights)
    images, targets = batch_of()
    trace = distiller.trace(images, targets)
    losses = distiller.named_losses(trace)
    assert tuple(losses)[2:] == NAMES
    leaves = [m.detach().requires_grad_() for m in trace.student.maps]
    boxes = [target["boxes"] for target in targets]
    expected = by_hand(distiller, leaves, list(trace.teacher.maps), boxes)
    for name, weight in zip(NAMES, (2, 3, 5), strict=True):
        torch.testing.assert_close(losses[name], weight * expected[name], rtol=1e-9, atol=0)
        found = torch.autograd.grad(losses[name], list(trace.student.maps), retain_graph=True)
        wanted = torch.autograd.grad(weight * expected[name], leaves, retain_graph=True)
        for level, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
            assert (ours.abs().max() > 0) == (level < 2 or name == "kd_drkd_pixel")
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9 * theirs.abs().max().item())


@pytest.mark.filterwarnings("ignore:.*is exactly 0 on the first step")
def test_own_teacher_has_no_loss():
    losses = Distiller(tiny_retinanet(seed=2), tiny_retinanet(seed=2), DRKD())(*tiny_batch())
    assert all(losses[name].item() == pytest.approx(0, abs=1e-6) for name in NAMES)


def test_it_trains_in_bfloat16():
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), DRKD(), prove=False)
    distiller.bfloat16()
    images, targets = tiny_batch()
    losses = distiller([image.bfloat16() for image in images], targets)
    sum(losses.values()).backward()
    assert all(losses[name].isfinite() and losses[name] > 0 for name in NAMES)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.methods.parameters())


def test_the_teacher_may_see_the_images_at_another_size():
    """Of twice the side: the boxes are twice as far."""

    def larger(images, targets):
        return [nn.functional.interpolate(i[None], scale_factor=2, mode="bilinear")[0] for i in images]

    teacher, student = tiny_fcos(seed=1, side=128), tiny_retinanet(seed=2, side=64)
    method = DRKD(pixel_weight=0, resize=True)
    images, targets = tiny_batch()
    trace = Distiller(teacher, student, method, teacher_view=larger, prove=False).trace(images, targets)
    assert trace.teacher.batch.image_sizes == ((128, 128),) * 2
    boxes = torch.cat([target["boxes"] for target in targets])
    numbers = torch.tensor([0, 0, 1, 1])
    ours, theirs = (  # all of them are of the finest level
        pool(side.maps[0], factor * boxes, numbers, 8.0)
        for side, factor in ((trace.student, 1), (trace.teacher, 2))
    )
    expected = (ours - theirs).square().mean() / trace.teacher.maps[0].var(correction=0)
    torch.testing.assert_close(trace.losses["drkd"]["kd_drkd_instance"], 20 * expected)


# -- objects --------------------------------------------------------------------------------------


def test_levels_and_pooling_are_those_of_torchvisions_pooler():
    sides = (4 + 60 * torch.rand(40, 2)) ** 1.5
    corners = torch.rand(40, 2) * (512 - sides).clamp(min=0)
    boxes = torch.cat([corners, corners + sides], dim=1).double()
    maps = [torch.randn(2, 3, 512 // s, 512 // s).double() for s in (4, 8, 16, 32)]
    pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    expected = pooler({str(n): m for n, m in enumerate(maps)}, [boxes[:25], boxes[25:]], [(512, 512)] * 2)
    levels = levels_of(boxes, dict(enumerate((4.0, 8.0, 16.0, 32.0))))
    assert set(levels.tolist()) == {0, 1, 2, 3}
    images = (torch.arange(40) >= 25).long()
    for level, stride in enumerate((4, 8, 16, 32)):
        here = levels == level
        torch.testing.assert_close(pool(maps[level], boxes[here], images[here], stride), expected[here])


def test_levels_with_gaps_in_any_order():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 224, 224], [0, 0, 700, 400], [5, 5, 5, 5]])
    assert levels_of(boxes, {2: 32, 0: 8}).tolist() == [0, 0, 2, 0]
    assert levels_of(boxes, {1: 14.0}).tolist() == [1] * 4
    assert levels_of(boxes[:0], {0: 8, 1: 16}).tolist() == []


@pytest.mark.filterwarnings("ignore:.*is exactly 0 on the first step")
@pytest.mark.parametrize("boxes", [([], []), ([], [[10.0, 20, 60, 50]])])
def test_images_with_one_object_or_none(boxes):
    """There is no relation; what there is of objects is one object's features."""
    distiller = distiller_of(side=64)
    images, targets = batch_of(boxes, side=64)
    losses = distiller(images, targets)
    assert losses["kd_drkd_relation"].item() == 0
    assert (losses["kd_drkd_instance"] > 0) == bool(boxes[1])
    assert losses["kd_drkd_pixel"] > 0
    sum(losses[name] for name in NAMES).backward()
    assert all(parameter.grad is not None for parameter in distiller.methods.parameters())


@pytest.mark.parametrize("part", ["pixel", "relation", "instance"])
def test_each_part_alone(part):
    settings = {f"{other}_weight": 0 for other in ("pixel", "relation", "instance") if other != part}
    method = DRKD(**settings)
    assert method.loss_names() == (f"kd_drkd_{part}",)
    assert ("objects" in method.requires) == (part != "pixel")
    distiller = Distiller(tiny_fcos(seed=1), tiny_retinanet(width=16, seed=2), method, prove=False)
    images, targets = tiny_batch()
    for boxes in (2, 0):
        distiller.zero_grad()
        less = [{key: value[:boxes] for key, value in target.items()} for target in targets]
        losses = distiller(images, less)
        assert {name for name in losses if "kd" in name} == {f"kd_drkd_{part}"}
        losses[f"kd_drkd_{part}"].backward()
        assert all(parameter.grad is not None for parameter in distiller.methods.parameters())
    kinds = {type(module) for module in distiller.methods.modules()}
    assert (PixelRelation in kinds, InstanceRelation in kinds) == (part == "pixel", part == "relation")


def test_images_with_many_objects_are_thinned_out_evenly(monkeypatch):
    method, counted = DRKD(most_objects=3), []
    found = InstanceRelation.forward
    monkeypatch.setattr(InstanceRelation, "forward", lambda *a: counted.append(a[3]) or found(*a))
    distiller = Distiller(tiny_fcos(seed=1), tiny_retinanet(seed=2), method, prove=False)
    images, targets = tiny_batch()
    lines = torch.arange(9.0)[:, None] * torch.tensor([2.0, 2, 2, 2]) + torch.tensor([0.0, 0, 20, 20])
    targets[1] = {"boxes": lines, "labels": torch.zeros(9, dtype=torch.long)}
    loss = distiller(images, targets)["kd_drkd_instance"]
    assert counted[0].tolist() == [0, 0, 1, 1, 1]
    targets[1] = {name: value[[0, 4, 8]] for name, value in targets[1].items()}
    assert torch.equal(distiller(images, targets)["kd_drkd_instance"], loss)


# -- unlabelled images ----------------------------------------------------------------------------


def test_unlabelled_images_have_the_objects_that_the_teacher_finds(monkeypatch):
    distiller = distiller_of(side=64)
    images, targets = batch_of(([[10.0, 20, 60, 50], [0, 0, 30, 20]], [[10.0, 5, 40, 50]]), side=64)
    expected = distiller(images, targets)
    found = tuple(Objects(target["boxes"], target["labels"]) for target in targets)
    thresholds = []
    monkeypatch.setattr(
        "crosskd.step.Step.foreground", lambda self, threshold: thresholds.append(threshold) or found
    )
    losses = distiller(images)
    assert set(losses) == set(NAMES)
    assert thresholds == [0.5]
    for name in NAMES:
        torch.testing.assert_close(losses[name], expected[name])
    monkeypatch.undo()
    assert distiller(images)["kd_drkd_pixel"] > 0


def test_a_teacher_without_a_head_needs_targets():
    teacher, spec = of_three_widths()
    images, targets = tiny_batch()
    for settings, needs in (({}, True), ({"relation_weight": 0, "instance_weight": 0}, False)):
        distiller = Distiller(teacher, tiny_retinanet(seed=1), DRKD(**settings), teacher_adapter=spec)
        assert distiller(images, targets)["kd_drkd_pixel"] > 0
        if needs:
            with pytest.raises(ValueError, match=r"a Sequential has no head\. Give images with targets"):
                distiller(images)
        else:
            assert set(distiller(images)) == {"kd_drkd_pixel"}


# -- widths and parameters ------------------------------------------------------------------------


def test_levels_of_other_widths_relate_objects_of_one_level(caplog):
    teacher, spec = of_three_widths()
    student = tiny_retinanet(seed=1, side=SIDE, blocks=1)
    with caplog.at_level("INFO", logger="crosskd"):
        distiller = Distiller(teacher, student, DRKD(), teacher_adapter=spec, prove=False).double()
    assert "only objects of one level are related" in caplog.text
    method = distiller.methods["drkd"]
    widths = {name: relation.first.in_features for name, relation in method.relations.items()}
    assert widths == {"level0": 8, "level1": 12, "level2": 16}
    losses = distiller(*batch_of())
    assert losses["kd_drkd_relation"] > 0  # three of the first image's are of the finest level
    sum(losses[name] for name in NAMES).backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    apart = distiller(*batch_of(([BOXES[0][0], BOXES[0][2]], BOXES[1])))
    assert apart["kd_drkd_relation"].item() == pytest.approx(0, abs=1e-12)


def test_what_is_trained_is_the_distillers_and_not_the_students():
    distiller = distiller_of()
    kinds = {name.split(".")[2] for name in distiller.state_dict() if name.startswith("methods.drkd.")}
    assert kinds == {"projections", "pixels", "relations"}
    plain = tiny_retinanet(width=16, seed=2, side=SIDE, blocks=1)
    assert distiller.student.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.requires_grad for parameter in distiller.methods.parameters())


def test_error_unknown_widths():
    pair = Pair(PlainAdapter(strides=(8.0,)), PlainAdapter(PlainHead(), strides=(8.0,)), levels=((0, 0),))
    with pytest.raises(ValueError, match="how many channels the teacher's maps have"):
        DRKD().setup(pair)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pixel_weight": -1}, "pixel_weight must be 0 or more, got -1"),
        ({"instance_weight": math.nan}, "instance_weight must be 0 or more, got nan"),
        ({"relation_weight": math.inf}, "relation_weight must be 0 or more, got inf"),
        ({"pixel_weight": 0, "relation_weight": 0, "instance_weight": 0}, "all three weights are 0"),
        ({"threshold": 1}, "threshold is a probability between 0 and 1, got 1"),
        ({"most_objects": 0}, "most_objects must be 1 or more, got 0"),
        ({"weight": 0}, "weight must be above 0, got 0"),
        ({"levels": ()}, "levels is empty"),
    ],
)
def test_error_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DRKD(**settings)


def test_printing_shows_the_settings():
    shown = DRKD(2.0, pixel_weight=3.0, relation_weight=0).extra_repr()
    assert shown.startswith("weight=2.0, levels=None, resize=False, pixel_weight=3.0, relation_weight=0, ")
    losses = Distiller(tiny_fcos(seed=1), tiny_retinanet(seed=2), DRKD(2.0, pixel_weight=3.0))(*tiny_batch())
    half = Distiller(tiny_fcos(seed=1), tiny_retinanet(seed=2), DRKD(pixel_weight=3.0))(*tiny_batch())
    for name in NAMES:
        torch.testing.assert_close(losses[name], 2 * half[name])
