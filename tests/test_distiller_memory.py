"""What a distillation step keeps alive of the teacher, and for how long."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from crosskd import CrossKD, Distiller, PredictionMimicking
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet

FAMILIES = {"retinanet": tiny_retinanet, "fcos": tiny_fcos}


@dataclass
class Watched:
    """Weak references to the memory of tensors, each with a name and a size in bytes."""

    storages: list[tuple[str, StorageWeakRef, int]] = field(default_factory=list)

    def add(self, name: str, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.storages.append((name, StorageWeakRef(storage), storage.nbytes()))

    def alive(self) -> list[str]:
        """Names of those whose memory is still held by anything, in Python or in a graph."""
        return [name for name, storage, _ in self.storages if not storage.expired()]

    def watch_layers(self, module: nn.Module, stack: ExitStack) -> None:
        """Adds whatever the layers with weights, and activations, put out from now on."""
        for name, layer in module.named_modules():
            if not isinstance(layer, nn.Conv2d | nn.GroupNorm | nn.ReLU):
                continue

            def watch(_module: nn.Module, _inputs: object, output: Tensor, name: str = name) -> None:
                self.add(name, output)

            stack.callback(layer.register_forward_hook(watch).remove)


def make_distiller(
    family: str, method: CrossKD | PredictionMimicking, **teacher_options: object
) -> Distiller:
    build = FAMILIES[family]
    # The proof would run the teacher's own forward once more.
    return Distiller(build(hidden=16, seed=1, **teacher_options), build(), method, prove=False)


@pytest.mark.parametrize(
    "method",
    [CrossKD(), CrossKD(tap="pre"), PredictionMimicking()],
    ids=["crosskd", "crosskd before the activation", "mimicking"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_feature_map_of_the_teacher_is_alive_when_the_student_starts(family, method):
    distiller = make_distiller(family, method)
    images, targets = tiny_batch()
    watched, alive = Watched(), []
    with ExitStack() as stack:
        watched.watch_layers(distiller.teacher, stack)
        hook = distiller.student.backbone.register_forward_pre_hook(
            lambda *_: alive.append((len(watched.storages), watched.alive()))
        )
        stack.callback(hook.remove)
        distiller(images, targets)
    ((count, names),) = alive
    assert count > 3 * len(list(distiller.teacher.head.classification_head.conv))
    assert names == []


@pytest.mark.parametrize("family", FAMILIES)
def test_only_channel_statistics_of_the_teachers_features_are_kept(family):
    kept: list[Tensor] = []

    class Watching(CrossKD):
        def forward(self, step):
            for levels in step.teacher.taps.values():
                kept.extend(x for statistics in levels for x in (statistics.mean, statistics.std))
            return super().forward(step)

    make_distiller(family, Watching())(*tiny_batch())
    assert len(kept) == 2 * 2 * 3  # branches, mean and deviation, levels
    assert {tuple(x.shape) for x in kept} == {(1, 32, 1, 1)}
    assert all(x.untyped_storage().nbytes() <= 32 * 4 for x in kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_backward_frees_the_tail_while_the_losses_are_still_held(family):
    distiller = make_distiller(family, CrossKD())
    watched = Watched()
    with ExitStack() as stack:
        hook = distiller.student.backbone.register_forward_hook(
            lambda *_: watched.watch_layers(distiller.teacher.head, stack)
        )
        stack.callback(hook.remove)
        losses = distiller(*tiny_batch())
    assert any("conv" in name for name in watched.alive())
    sum(losses.values()).backward()
    assert watched.alive() == []
    assert set(losses) >= {"kd_cls", "kd_reg"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teachers_own_pixels_are_freed_before_the_student_starts(family):
    distiller = make_distiller(family, CrossKD(), image_mean=[0.5] * 3, image_std=[0.25] * 3)
    watched, alive = Watched(), []
    with ExitStack() as stack:
        for backbone, watch in (
            (distiller.teacher.backbone, lambda _, inputs: watched.add("the teacher's pixels", inputs[0])),
            (distiller.student.backbone, lambda *_: alive.append(watched.alive())),
        ):
            stack.callback(backbone.register_forward_pre_hook(watch).remove)
        distiller(*tiny_batch())
    assert len(watched.storages) == 1
    assert alive == [[]]


def test_a_step_leaves_nothing_of_the_teacher_behind():
    distiller = make_distiller("retinanet", CrossKD())
    watched = Watched()
    with ExitStack() as stack:
        watched.watch_layers(distiller.teacher, stack)
        losses = distiller(*tiny_batch())
        sum(losses.values()).backward()
    del losses
    assert watched.storages
    assert watched.alive() == []


@torch.no_grad()
def test_watched_memory_is_alive_as_long_as_a_view_of_it():
    watched = Watched()
    tensor = torch.rand(4)
    watched.add("tensor", tensor)
    view = tensor[:1]
    del tensor
    assert watched.alive() == ["tensor"]
    del view
    assert watched.alive() == []
