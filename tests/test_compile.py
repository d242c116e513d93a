"""Compiled and channels-last distillation gives the eager losses; graph breaks are counted."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from crosskd import CrossKD, Distiller, PredictionMimicking
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=[tiny_retinanet, tiny_fcos], ids=["retinanet", "fcos"])
def build(request):
    """Builds a detector of a family."""
    return request.param


def distiller_of(build, method=None) -> Distiller:
    """With a projection, a BatchNorm and a block on either side of the split, and no more to compile.

    In float64: group norm over the two locations of the coarsest level nearly cancels the gradient,
    and what float32 leaves of it depends on the processor.
    """
    teacher = build(width=64, seed=1, blocks=2)
    student = build(width=32, seed=2, blocks=2, batch_norm=True)
    return Distiller(teacher, student, method or CrossKD(position=1)).double()


def double_batch(**options) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images, targets = tiny_batch(**options)
    targets = [{"boxes": t["boxes"].double(), "labels": t["labels"]} for t in targets]
    return [image.double() for image in images], targets


def step(distiller: nn.Module, batch=None) -> dict[str, Tensor]:
    losses = distiller(*(batch or double_batch()))
    sum(losses.values()).backward()
    return losses


def assert_steps_agree(eager: Distiller, other: nn.Module, others_distiller: Distiller, batch=None) -> None:
    """Two steps: losses, and the student's gradients."""
    for _ in range(2):
        expected, losses = step(eager), step(other, batch)
        assert losses.keys() == expected.keys()
        for name, loss in losses.items():
            assert loss.item() == pytest.approx(expected[name].item(), rel=1e-10), name
    largest = max(parameter.grad.abs().max().item() for parameter in eager.parameters())
    for ours, theirs in zip(others_distiller.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10 * largest)


def test_channels_last_gives_the_same_losses(build):
    eager = distiller_of(build)
    other = copy.deepcopy(eager).to(memory_format=torch.channels_last)
    assert other.teacher.backbone.stem[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    images, targets = double_batch()
    images = torch.stack(images).contiguous(memory_format=torch.channels_last)
    assert_steps_agree(eager, other, other, (images, targets))


@pytest.mark.slow
def test_compiled_distiller_gives_the_same_losses(build):
    # One family through what differentiates graphs, both through what traces them. What makes code of them
    # knows nothing of us, and takes a minute for a C++ compiler; one loss goes through it.
    backend = "aot_eager" if build is tiny_retinanet else "eager"
    eager = distiller_of(build)
    other = copy.deepcopy(eager)
    assert_steps_agree(eager, torch.compile(other, backend=backend), other)


@pytest.mark.slow
def test_compiled_distiller_gives_the_same_detections():
    distiller = distiller_of(tiny_fcos).eval()
    images, _ = double_batch()
    compiled = torch.compile(distiller, backend="eager")
    for ours, theirs in zip(compiled(images), distiller.student(images), strict=True):
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=1e-8, atol=1e-10)


def compile_in_place(detector: nn.Module) -> None:
    detector.backbone.compile(backend="eager")
    detector.head.compile(backend="eager")


def compile_and_replace(detector: nn.Module) -> None:
    detector.backbone = torch.compile(detector.backbone, backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("compile_parts", [compile_in_place, compile_and_replace])
def test_compiled_parts_of_teacher_and_student_give_the_same_losses(compile_parts):
    """A compiled backbone runs compiled; a compiled head runs as the layers it is made of."""
    eager = distiller_of(tiny_retinanet)
    teacher, student = copy.deepcopy(eager.teacher), copy.deepcopy(eager.student)
    compile_parts(teacher)
    compile_parts(student)
    other = Distiller(teacher, student, CrossKD(position=1))
    other.methods.load_state_dict(eager.methods.state_dict())
    assert_steps_agree(eager, other, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "method"),
    [(tiny_retinanet, CrossKD(position=1)), (tiny_fcos, PredictionMimicking())],
    ids=["retinanet-crosskd", "fcos-mimicking"],
)
def test_graph_breaks(build, method):
    """Two graphs: both detectors' forwards, then the distillation and its losses.

    Around and between them run, uncompiled: the schedule's step count, the preprocessing of images of
    any size, the label assignment with the student's own losses, and the check of the first step.
    """
    counter = CompileCounter()
    compiled = torch.compile(distiller_of(build, method), backend=counter)
    for seed in range(3):
        compiled(*double_batch(seed=seed))
    assert counter.frame_count == 2
    reasons = counters["graph_break"]
    assert reasons  # four with PyTorch 2.14; how they are grouped changes from version to version
    assert all("torch.compiler.disable" in reason for reason in reasons)


@pytest.mark.slow
def test_images_of_another_size_give_the_eager_losses():
    eager = distiller_of(tiny_retinanet)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, backend="eager")
    for side in (64, 96):
        batch = double_batch(side=side)
        for distiller in (eager, other):
            distiller.student.transform.min_size, distiller.student.transform.max_size = (side,), side
        expected, losses = eager(*batch), compiled(*batch)
        for name, loss in losses.items():
            assert loss.item() == pytest.approx(expected[name].item(), rel=1e-10), name
