"""mmdet's own heads on feature maps of their own, and batches in mmdet's form. Imports mmdet when called."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

STRIDES = [8, 16, 32, 64, 128]
SIZE = (128, 160)
CLASSES = 5
WIDTH = 32

ANCHOR_TRAINING = {"allowed_border": -1, "pos_weight": -1, "debug": False}
ATSS_TRAINING = {"assigner": {"type": "ATSSAssigner", "topk": 9}, **ANCHOR_TRAINING}
SQUARE_ANCHORS = {
    "type": "AnchorGenerator",
    "ratios": [1.0],
    "octave_base_scale": 8,
    "scales_per_octave": 1,
    "strides": STRIDES,
}
COMMON = {"num_classes": CLASSES, "in_channels": WIDTH, "feat_channels": WIDTH, "stacked_convs": 4}
TESTING = {
    "nms_pre": 1000,
    "min_bbox_size": 0,
    "score_thr": 0.05,
    "nms": {"type": "nms", "iou_threshold": 0.6},
    "max_per_img": 100,
}
SIGMOID = {"use_sigmoid": True, "loss_weight": 1.0}
FOCAL = {"type": "FocalLoss", "gamma": 2.0, "alpha": 0.25, **SIGMOID}

GFL = {
    "type": "GFLHead",
    **COMMON,
    "anchor_generator": SQUARE_ANCHORS,
    "loss_cls": {"type": "QualityFocalLoss", "beta": 2.0, **SIGMOID},
    "loss_dfl": {"type": "DistributionFocalLoss", "loss_weight": 0.25},
    "loss_bbox": {"type": "GIoULoss", "loss_weight": 2.0},
    "reg_max": 16,
    "train_cfg": ATSS_TRAINING,
}
ATSS = {
    "type": "ATSSHead",
    **COMMON,
    "anchor_generator": SQUARE_ANCHORS,
    "bbox_coder": {"type": "DeltaXYWHBBoxCoder", "target_stds": [0.1, 0.1, 0.2, 0.2]},
    "loss_cls": FOCAL,
    "loss_bbox": {"type": "GIoULoss", "loss_weight": 2.0},
    "loss_centerness": {"type": "CrossEntropyLoss", **SIGMOID},
    "train_cfg": ATSS_TRAINING,
}
RETINANET = {
    "type": "RetinaHead",
    **COMMON,
    "anchor_generator": {
        "type": "AnchorGenerator",
        "octave_base_scale": 4,
        "scales_per_octave": 3,
        "ratios": [0.5, 1.0, 2.0],
        "strides": STRIDES,
    },
    "bbox_coder": {"type": "DeltaXYWHBBoxCoder"},
    "loss_cls": FOCAL,
    "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
    "train_cfg": {
        "assigner": {
            "type": "MaxIoUAssigner",
            "pos_iou_thr": 0.5,
            "neg_iou_thr": 0.4,
            "min_pos_iou": 0,
            "ignore_iof_thr": -1,
        },
        "sampler": {"type": "PseudoSampler"},
        **ANCHOR_TRAINING,
    },
}
FCOS = {
    "type": "FCOSHead",
    **COMMON,
    "strides": STRIDES,
    "loss_cls": FOCAL,
    "loss_bbox": {"type": "IoULoss", "loss_weight": 1.0},
    "loss_centerness": {"type": "CrossEntropyLoss", **SIGMOID},
}
RTMDET = {
    "type": "RTMDetSepBNHead",
    **COMMON,
    "stacked_convs": 2,
    "anchor_generator": {"type": "MlvlPointGenerator", "offset": 0, "strides": STRIDES},
    "bbox_coder": {"type": "DistancePointBBoxCoder"},
    "loss_cls": {"type": "QualityFocalLoss", "beta": 2.0, **SIGMOID},
    "loss_bbox": {"type": "GIoULoss", "loss_weight": 2.0},
    "with_objectness": False,
    "train_cfg": {"assigner": {"type": "DynamicSoftLabelAssigner", "topk": 13}, **ANCHOR_TRAINING},
}
HEADS = {"gfl": GFL, "atss": ATSS, "retinanet": RETINANET, "fcos": FCOS, "rtmdet": RTMDET}


class FixedMaps(nn.Module):
    """A backbone that hands out feature maps, which are its parameters, whatever the image."""

    def __init__(self, features: Sequence[Tensor]) -> None:
        super().__init__()
        self.features = nn.ParameterList([nn.Parameter(f.clone()) for f in features])

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.features)


class SmallBackbone(nn.Module):
    """One strided convolution per level, so that features follow the image."""

    def __init__(self, strides: Sequence[int] = STRIDES, width: int = WIDTH) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(3, width, 3, stride=s, padding=1) for s in strides)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(level(pixels) for level in self.levels)


def head_settings(name: str, **changed: Any) -> dict[str, Any]:
    """The settings of a head as mmdet's configs write them, some of them changed."""
    return {**copy.deepcopy(HEADS[name]), "test_cfg": TESTING, **changed}


def detector_of(
    head: dict[str, Any], backbone: nn.Module | None = None, seed: int = 0, **options: Any
) -> Any:
    """mmdet's ``SingleStageDetector`` with a head of its own, on a backbone of ours.

    Args:
        head: the head's settings.
        backbone: gives one feature map per level.
        seed: of the weights, which are livened up so that towers don't vanish.
        options: further settings of the detector.
    """
    from mmdet.models import SingleStageDetector
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()
    head = copy.deepcopy(head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trained, tested = head.pop("train_cfg", None), head.pop("test_cfg", None)
        detector = SingleStageDetector(
            backbone={"type": "ResNet", "depth": 18, "base_channels": 4, "init_cfg": None},  # replaced below
            bbox_head=head,
            train_cfg=_config(trained),
            test_cfg=_config(tested),
            **options,
        )
        detector.backbone = SmallBackbone() if backbone is None else backbone
        liven(detector.bbox_head)
    assert MODELS.get(head["type"]) is type(detector.bbox_head)
    return detector


def _config(settings: dict[str, Any] | None) -> Any:
    from mmengine.config import ConfigDict

    return None if settings is None else ConfigDict(settings)


def liven(head: nn.Module) -> None:
    """Weights that keep features alive over an untrained tower, and boxes of about the strides' size."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.uniform_(module.bias, -0.1, 0.1)
    for name, module in head.named_modules():
        if isinstance(module, nn.Conv2d) and name.split(".")[0] in (
            "retina_reg",
            "atss_reg",
            "conv_reg",
            "rtm_reg",
        ):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.constant_(module.bias, 1.0 if name.startswith(("conv", "rtm")) else 0.0)


def samples_of(targets: Sequence[dict[str, Tensor]], size: tuple[int, int] = SIZE) -> list[Any]:
    """mmdet's data samples for boxes (objects, 4) and labels (objects,) of each image."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    samples = []
    for target in targets:
        meta = {"img_shape": size, "pad_shape": size, "batch_input_shape": size, "ori_shape": size}
        sample = DetDataSample(metainfo={**meta, "scale_factor": (1.0, 1.0)})
        sample.gt_instances = InstanceData(bboxes=target["boxes"], labels=target["labels"])
        samples.append(sample)
    return samples


def batch_of(images: int = 2, objects: int = 2) -> tuple[Tensor, list[Any]]:
    """Pixels of noise with some objects each, in mmdet's form."""
    generator = torch.Generator().manual_seed(0)
    targets = []
    for _ in range(images):
        corner = torch.rand(objects, 2, generator=generator) * 60
        extent = 24 + torch.rand(objects, 2, generator=generator) * 40
        labels = torch.randint(CLASSES, (objects,), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + extent], dim=1), "labels": labels})
    return torch.randn(images, 3, *SIZE, generator=generator), samples_of(targets)
