"""PKD on real images: a teacher of another family and a plain backbone, random weights all of them."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import resnet18

from crosskd import PKD, Distiller
from crosskd.adapters import backbone, find_adapter
from tests.helpers.blood_cells import cells
from tests.helpers.tiny import tiny_fcos, tiny_retinanet

SIZE = (96, 128)


def of_size(detector):
    """The detector for the images as they are."""
    detector.transform.min_size, detector.transform.max_size = (SIZE[0],), SIZE[1]
    return detector


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["fcos", "resnet18"])
def test_the_loss_falls(kind):
    torch.manual_seed(3)
    teacher, spec = of_size(tiny_fcos(seed=1)), find_adapter
    if kind == "resnet18":
        teacher, spec = resnet18(), backbone(layers=("layer2", "layer3", "layer4"), image_size=SIZE)
    student = of_size(tiny_retinanet(seed=2))
    distiller = Distiller(teacher, student, PKD(), teacher_adapter=spec)
    optimizer = torch.optim.AdamW(distiller.parameters(), 2e-3)
    _, images, targets = cells("train", 16)
    seen = []
    for step in range(40):
        start = 4 * (step % 4)
        losses = distiller(list(images[start : start + 4]), targets[start : start + 4])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        seen.append(losses["kd_pkd"].item())
    first, last = sum(seen[:4]) / 4, sum(seen[-4:]) / 4
    print(f"kd_pkd {first:.1f} to {last:.1f}")
    assert last < 0.7 * first
