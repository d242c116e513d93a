"""Ultralytics' models, small and not fallen asleep, with batches in its own form."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

WIDTHS = {"student": 0.125, "teacher": 0.25}
KINDS = ("yolov8n", "yolo11n", "yolo26n", "yolov10n")
SIDE = 64


@functools.cache
def _config(kind: str) -> dict[str, Any]:
    from ultralytics.nn.tasks import yaml_model_load

    return yaml_model_load(f"{kind}.yaml")


def model_of(kind: str, *, width: float = 0.125, classes: int = 3, seed: int = 0, **changed: Any) -> Any:
    """A detection model of ultralytics' own parts, as narrow as they allow.

    Args:
        kind: the name of its yaml, of scale n.
        width: factor on its channels; 0.25 is n itself.
        classes: how many.
        seed: of the weights.
        changed: other values for the yaml, ``ch`` for the images' channels.
    """
    from ultralytics.nn.tasks import DetectionModel

    channels = changed.pop("ch", 3)
    config = {**_config(kind), "scale": "n", "scales": {"n": [0.33, width, 1024]}, **changed}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DetectionModel(config, ch=channels, nc=classes, verbose=False)
        liven(model, channels)
    return model


@torch.no_grad()
def liven(model: Any, channels: int = 3) -> None:
    """Gives an untrained model answers that differ from place to place.

    Its BatchNorm layers know no statistics yet, so in eval mode what passes them vanishes.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(std=0.3)
    model.train()
    model(torch.rand(4, channels, SIDE, SIDE))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
    head = model.model[-1]
    maps: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, given: maps.extend(given[0]))
    model(torch.rand(4, channels, SIDE, SIDE))
    handle.remove()
    for name in ("cv2", "cv3", "one2one_cv2", "one2one_cv3"):
        for sequence, features in zip(getattr(head, name, None) or (), maps, strict=False):
            *_, predictor = sequence
            predictor.bias.zero_()
            predictor.weight /= sequence(features).std()
            predictor.bias.fill_(-1.0 if name.endswith("cv3") else 2.0)
    model.train()


def batch_of(batch: int = 2, *, side: int = SIDE, classes: int = 3, seed: int = 0) -> tuple[Tensor, Any]:
    """Images of noise, and targets of two objects each."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, 3, side, side, generator=generator)
    middle = 0.3 + 0.4 * torch.rand(2 * batch, 2, generator=generator)
    size = 0.2 + 0.3 * torch.rand(2 * batch, 2, generator=generator)
    return images, {
        "batch_idx": torch.arange(batch).repeat_interleave(2).float(),
        "cls": torch.randint(classes, (2 * batch, 1), generator=generator).float(),
        "bboxes": torch.cat([middle, size], dim=1),
    }
