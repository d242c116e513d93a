"""A teacher comes out of distillation bit for bit as it went in."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import nn

from crosskd import PKD, CrossKD, Distiller, PredictionMimicking
from crosskd.adapters import backbone
from crosskd.frozen import frozen_copy
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet


def digest(module: nn.Module) -> dict[str, str]:
    """A hash of every parameter's and buffer's bytes."""
    return {
        name: hashlib.sha256(tensor.numpy(force=True).tobytes()).hexdigest()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


def flags(module: nn.Module) -> tuple[dict[str, bool], dict[str, bool]]:
    """Each parameter's ``requires_grad`` and each module's mode."""
    return (
        {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        {name: child.training for name, child in module.named_modules()},
    )


@pytest.mark.parametrize("build", [tiny_retinanet, tiny_fcos], ids=["retinanet", "fcos"])
@pytest.mark.parametrize("method", [CrossKD(), CrossKD(position=0), PredictionMimicking()])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_training_changes_no_bit_mode_or_flag_of_the_teacher(build, method, training):
    teacher = build(width=64, batch_norm=True, seed=1).train(training)
    teacher.head.regression_head.bbox_reg.weight.requires_grad_(False)
    before, flags_before = digest(teacher), flags(teacher)
    student = build(width=32, batch_norm=True)
    student_before = digest(student)
    distiller = Distiller(teacher, student, method)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        distiller.train()
        sum(distiller(*tiny_batch(seed=step)).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        distiller.eval()(tiny_batch()[0])
    changed = {name for name, value in digest(student).items() if value != student_before[name]}
    assert changed >= {name for name, _ in student.named_parameters()}
    assert digest(teacher) == before == digest(distiller.teacher)
    assert flags(teacher) == flags_before
    for module in (teacher, distiller.teacher):
        assert all(parameter.grad is None for parameter in module.parameters())


def test_frozen_copies_share_memory_and_follow_in_place_changes():
    teacher = tiny_fcos(batch_norm=True)
    frozen = frozen_copy(teacher)
    for ours, theirs in zip(frozen.state_dict().values(), teacher.state_dict().values(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
    teacher.load_state_dict(tiny_fcos(batch_norm=True, seed=5).state_dict())
    assert digest(frozen) == digest(teacher)


def test_frozen_copies_keep_ties_between_parameters():
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    frozen = frozen_copy(tied)
    assert frozen[0].weight is frozen[1].weight
    assert not frozen[0].weight.requires_grad
    assert tied[0].weight.requires_grad


def test_moving_and_casting_the_distiller_leaves_the_teacher_where_it_was():
    teacher = tiny_retinanet(batch_norm=True)
    before = digest(teacher)
    Distiller(teacher, tiny_retinanet(seed=1), CrossKD()).double().to(memory_format=torch.channels_last)
    assert digest(teacher) == before
    assert teacher.head.classification_head.cls_logits.weight.is_contiguous()


class Counting(nn.Module):
    """Counts its calls in eval mode, too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, features):
        self.calls += 1
        return features


def test_buffers_that_the_teacher_writes_in_eval_mode_are_the_copys_own():
    teacher, student = tiny_retinanet(batch_norm=True), tiny_retinanet(seed=1)
    teacher.backbone.stem.append(Counting())
    distiller = Distiller(teacher, student, CrossKD())
    for _ in range(2):
        distiller(*tiny_batch())
    assert teacher.backbone.stem[-1].calls == 0
    assert distiller.teacher.backbone.stem[-1].calls == 2
    # All others are shared as before.
    norms = (detector.backbone.stem[0][1] for detector in (teacher, distiller.teacher))
    assert len({norm.running_mean.data_ptr() for norm in norms}) == 1


def test_making_an_adapter_of_a_backbone_writes_nothing():
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3, stride=8, padding=1), Counting())
    distiller = Distiller(
        teacher, tiny_retinanet(seed=1), PKD(levels=(0,)), teacher_adapter=backbone(image_size=(64, 64))
    )
    assert teacher[1].calls == 0
    distiller(*tiny_batch())
    assert teacher[1].calls == 0
