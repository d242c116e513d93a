"""DRKD's two relations, as modules on maps and on vectors of objects."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from crosskd.losses import InstanceRelation, PixelRelation
from crosskd.losses.drkd import GraphReasoning


def livened(module: nn.Module) -> nn.Module:
    """In float64, with no weight left at zero or at the identity."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double()


def maps(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape).double().requires_grad_(), torch.randn(*shape).double()


# -- pixels ---------------------------------------------------------------------------------------


def product(matrix: list[list[float]], other: list[list[float]]) -> list[list[float]]:
    columns = [*zip(*other, strict=True)]
    return [[math.fsum(a * b for a, b in zip(row, c, strict=True)) for c in columns] for row in matrix]


def added_by_hand(unit: GraphReasoning, features: Tensor) -> Tensor:
    """The unit's formula number by number, on one image (channels, locations)."""
    matrices = {name.removesuffix(".weight"): p.tolist() for name, p in unit.named_parameters()}
    x, locations = features.tolist(), features.shape[1]
    rms = math.sqrt(math.fsum(number**2 for row in x for number in row) / features.numel() + 1e-6)
    shares = [[number / rms for number in row] for row in product(matrices["project"], x)]
    gathered = product(product(matrices["state"], x), [*zip(*shares, strict=True)])
    nodes = [[number / locations for number in row] for row in gathered]
    mixed = product(nodes, [*zip(*matrices["adjacency"], strict=True)])  # the layer's weight is transposed
    kept = [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(nodes, mixed, strict=True)]
    changed = product(matrices["extend"], product(matrices["update"], kept))
    return torch.tensor(product(changed, shares), dtype=torch.float64)


def test_the_graph_by_hand():
    unit, features = livened(GraphReasoning(8)), torch.randn(2, 8, 6).double()
    for image, found in zip(features, unit(features), strict=True):
        torch.testing.assert_close(found, added_by_hand(unit, image), rtol=1e-10, atol=1e-12)


def test_the_answer_grows_as_the_map_does_whatever_its_size():
    unit, features = livened(GraphReasoning(8)), torch.randn(1, 8, 6).double()
    torch.testing.assert_close(unit(100 * features), 100 * unit(features), rtol=1e-4, atol=0)
    torch.testing.assert_close(unit(features.repeat(1, 1, 2)), unit(features).repeat(1, 1, 2))


def test_the_pixel_relation_is_of_both_maps_with_what_the_units_add():
    relation = livened(PixelRelation(8))
    student, teacher = maps(2, 8, 3, 4)
    both = [
        side + torch.stack([added_by_hand(unit, image) for image in side.flatten(2)]).view_as(side)
        for side, unit in ((student, relation.student), (teacher, relation.teacher))
    ]
    expected = (both[0] - both[1]).square().mean() / (teacher - teacher.mean()).square().mean()
    torch.testing.assert_close(relation(student, teacher), expected)


def test_the_pixel_relation_begins_as_the_difference_of_the_maps():
    student, teacher = maps(2, 8, 3, 4)
    relation = PixelRelation(8).double()
    loss = relation(student, teacher)
    expected = (student - teacher).square().mean() / teacher.var(correction=0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    assert all(parameter.grad is not None for parameter in relation.parameters())
    assert relation.student.extend.weight.grad.abs().max() > 0


def test_the_scale_of_the_maps_does_not_matter():
    """Nor does a teacher's map without any deviation make the loss infinite."""
    student, teacher = maps(2, 8, 3, 4)
    relation = livened(PixelRelation(8))
    torch.testing.assert_close(
        relation(student, teacher), relation(50 * student, 50 * teacher), rtol=1e-4, atol=0
    )
    assert relation(student, torch.ones_like(teacher)).isfinite()


def test_the_pixel_relation_trains_the_student_and_both_units():
    relation = livened(PixelRelation(4))
    student, teacher = maps(2, 4, 2, 3)
    assert torch.autograd.gradcheck(lambda s: relation(s, teacher), student)
    relation(student, teacher.requires_grad_()).backward()
    assert teacher.grad is None
    assert all(parameter.grad.abs().max() > 0 for parameter in relation.parameters())


def test_the_units_cannot_take_the_maps_away():
    """Trained for nothing but agreement, maps of noise stay as far apart as their rank says."""
    torch.manual_seed(0)
    relation = PixelRelation(8)
    student, teacher = torch.randn(1, 8, 8, 8), torch.randn(1, 8, 8, 8)
    optimizer = torch.optim.Adam(relation.parameters(), lr=0.05)
    before = relation(student, teacher).item()
    for _ in range(40):
        loss = relation(student, teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before * 0.5 < loss.item() < before * 0.95


def test_nothing_of_a_maps_size_is_kept_but_the_maps():
    relation, kept = PixelRelation(8), []
    student, teacher = torch.randn(2, 8, 16, 16, requires_grad=True), torch.randn(2, 8, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        relation(student, teacher)
    own = {student.data_ptr(), teacher.data_ptr(), *(p.data_ptr() for p in relation.parameters())}
    assert sum(t.numel() for t in kept if t.data_ptr() not in own) <= 16


def test_the_pixel_relation_is_float32_under_autocast():
    relation = PixelRelation(8)
    for unit in (relation.student, relation.teacher):
        nn.init.normal_(unit.extend.weight)
    student, teacher = torch.randn(2, 8, 4, 4).bfloat16(), torch.randn(2, 8, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = relation(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, relation(student.float(), teacher.float()))


# -- objects --------------------------------------------------------------------------------------


def related_by_hand(relation: InstanceRelation, student: Tensor, teacher: Tensor, images: Tensor) -> Tensor:
    """Pair by pair."""
    s = student / (student.square().sum(dim=1, keepdim=True) + 1e-6).sqrt()
    t = teacher / (teacher.square().sum(dim=1, keepdim=True) + 1e-6).sqrt()
    total = torch.zeros((), dtype=torch.float64)
    for j in range(len(s)):
        others = [i for i in range(len(s)) if images[i] == images[j]]
        ours, theirs = [], []
        for i in others:
            passed = (
                relation.filter.weight[0] @ s[i]
                + relation.filter.weight[1] @ s[j]
                + relation.filter.bias.sum()
            )
            weight = 2 / (1 + torch.exp(-passed))
            embedded = (relation.first.weight @ s[i]) @ (relation.second.weight @ s[j])
            ours.append(torch.exp(weight * embedded / 0.1))
            theirs.append(torch.exp(t[i] @ t[j] / 0.1))
        for a, b in zip(ours, theirs, strict=True):
            total = total + (a / sum(ours) - b / sum(theirs)) ** 2
    return total


def test_the_instance_relation_pair_by_pair():
    relation, images = livened(InstanceRelation(5)), torch.tensor([0, 2, 0, 0, 2, 3])
    student, teacher = maps(6, 5)
    expected = related_by_hand(relation, student, teacher, images)
    found = relation(student, teacher, images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, student)[0],
        torch.autograd.grad(expected, student)[0],
        rtol=1e-8,
        atol=1e-12,
    )


def test_it_begins_at_zero_for_objects_that_are_alike():
    """As the teacher's own, whatever the lengths of the vectors."""
    relation, images = InstanceRelation(5).double(), torch.zeros(4, dtype=torch.long)
    student, teacher = maps(4, 5)
    assert relation(student, teacher, images) > 1e-3
    assert relation(5 * teacher, teacher, images) < 1e-10


def test_images_do_not_see_each_other():
    relation, (student, teacher) = livened(InstanceRelation(5)), maps(5, 5)
    images = torch.tensor([0, 0, 0, 1, 1])
    parts = relation(student[:3], teacher[:3], images[:3]) + relation(student[3:], teacher[3:], images[3:])
    torch.testing.assert_close(relation(student, teacher, images), parts)


@pytest.mark.parametrize("count", [0, 1])
def test_one_object_or_none_has_no_relation_and_a_gradient_of_zero(count):
    relation, (student, teacher) = livened(InstanceRelation(5)), maps(count, 5)
    loss = relation(student, teacher, torch.zeros(count, dtype=torch.long))
    assert loss.item() == 0
    loss.backward()
    assert all((parameter.grad == 0).all() for parameter in [*relation.parameters(), student])


def test_the_instance_relation_reaches_the_student_alone():
    relation, (student, teacher) = livened(InstanceRelation(3)), maps(4, 3)
    images = torch.tensor([0, 0, 0, 1])
    assert torch.autograd.gradcheck(lambda s: relation(s, teacher, images), student)
    relation(student, teacher.requires_grad_(), images).backward()
    assert teacher.grad is None
    assert all(parameter.grad.abs().max() > 0 for parameter in relation.parameters())


def test_objects_of_which_nothing_is_seen_have_a_finite_gradient():
    relation, student = InstanceRelation(3), torch.zeros(3, 3, requires_grad=True)
    relation(student, torch.randn(3, 3), torch.zeros(3)).backward()
    assert student.grad.isfinite().all()


def test_the_instance_relation_is_float32_under_autocast():
    relation, images = InstanceRelation(8), torch.zeros(4)
    student, teacher = torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = relation(student, teacher, images)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, relation(student.float(), teacher.float(), images))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: PixelRelation(2)(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4)),
            ValueError,
            r"student \(1, 2, 3, 3\), teacher \(1, 2, 3, 4\)",
        ),
        (
            lambda: PixelRelation(2)(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)),
            ValueError,
            r"\(batch, channels, height, width\), got \(1, 2, 3\)",
        ),
        (
            lambda: InstanceRelation(2)(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2)),
            ValueError,
            r"\(objects, channels\) and images \(objects,\), got \(3, 2\) and \(2,\)",
        ),
        (lambda: InstanceRelation(2, temperature=0), ValueError, "temperature must be above 0, got 0"),
        (lambda: InstanceRelation(2, temperature=float("inf")), ValueError, "above 0, got inf"),
        (
            lambda: InstanceRelation(2)(torch.zeros(1, 2), torch.zeros(1, 2).int(), torch.zeros(1)),
            TypeError,
            "teacher must hold floating-point",
        ),
    ],
)
def test_error_drkd(call, error, message):
    with pytest.raises(error, match=message):
        call()
