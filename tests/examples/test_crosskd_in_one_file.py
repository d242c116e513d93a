"""The whole method on one page gives what the library gives."""

from __future__ import annotations

import ast
import runpy
from typing import Any

import crosskd_in_one_file
import pytest
import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet

import crosskd
from tests.helpers.tiny import Norm, tiny_batch, tiny_retinanet

OWN = ("classification", "bbox_regression")
KD = ("kd_cls", "kd_reg")


def pair(**options: Any) -> tuple[RetinaNet, RetinaNet]:
    """A teacher and a student in float64, with backbones of different widths."""
    teacher = tiny_retinanet(seed=1, hidden=12, **options).double()
    student = tiny_retinanet(seed=2, hidden=8, **options).double()
    return teacher.eval().requires_grad_(False), student.train()


def batch_with_an_empty_image() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images of different sizes, so that some are padded, the second of them without objects."""
    images, targets = tiny_batch(3)
    images[2] = images[2][:, :48]
    targets[1] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    targets[2]["boxes"] = targets[2]["boxes"].clamp(max=48)
    return (
        [image.double() for image in images],
        [{"boxes": target["boxes"].double(), "labels": target["labels"]} for target in targets],
    )


def gradients(loss: Tensor, student: RetinaNet) -> dict[str, Tensor]:
    """A loss's gradient by each of the student's parameters that it reaches."""
    names, parameters = zip(*student.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Gradients of one loss are equal; the alignment makes some of them 0 but for rounding."""
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9 * largest)


@pytest.mark.parametrize("norm", ["none", "group"])
@pytest.mark.parametrize("position", [0, 2, 4])
def test_losses_and_gradients_are_the_librarys(position: int, norm: Norm):
    teacher, student = pair(norm=norm)
    images, targets = batch_with_an_empty_image()
    distiller = crosskd.Distiller(teacher, student, crosskd.CrossKD(position=position)).train()
    expected = distiller(images, targets)
    losses = crosskd_in_one_file.crosskd_losses(teacher, student, images, targets, position)
    assert losses.keys() == expected.keys() == {*OWN, *KD}
    for name in losses:
        assert losses[name].dtype == torch.float64
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=1e-6)
        assert losses[name].item() > 1e-3
        assert_same(gradients(losses[name], student), gradients(expected[name], student))


def test_every_parameter_gets_the_librarys_gradient_of_the_sum():
    teacher, student = pair()
    images, targets = batch_with_an_empty_image()
    distiller = crosskd.Distiller(teacher, student, crosskd.CrossKD(position=3)).train()
    expected = gradients(sum(distiller(images, targets).values()), student)
    sum(crosskd_in_one_file.crosskd_losses(teacher, student, images, targets).values()).backward()
    assert_same({name: parameter.grad for name, parameter in student.named_parameters()}, expected)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_students_predictors_are_trained_on_the_ground_truth_alone():
    teacher, student = pair()
    losses = crosskd_in_one_file.crosskd_losses(teacher, student, *batch_with_an_empty_image(), position=3)
    reached = gradients(losses["kd_cls"], student).keys() | gradients(losses["kd_reg"], student).keys()
    assert not [name for name in reached if "cls_logits" in name or "bbox_reg" in name or "conv.3" in name]
    assert any("conv.2" in name for name in reached)


def test_the_script_runs_and_needs_nothing_of_the_library(capsys):
    path = crosskd_in_one_file.__file__
    with open(path) as file:
        nodes = list(ast.walk(ast.parse(file.read())))
    imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    assert {name.split(".")[0] for name in imported} <= {
        "__future__",
        "functools",
        "torch",
        "torchvision",
        "typing",
    }
    runpy.run_path(path, run_name="__main__")
    steps = capsys.readouterr().out.splitlines()
    assert len(steps) == 5
    assert all(name in step for step in steps for name in (*OWN, *KD))
    assert "nan" not in "".join(steps)
