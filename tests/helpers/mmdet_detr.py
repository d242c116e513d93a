"""mmdet's Deformable DETR and DINO, small and with random weights. Imports mmdet when called."""

from __future__ import annotations

from typing import Any

import torch

from tests.helpers.mmdet_heads import CLASSES, SIGMOID, SmallBackbone, samples_of

SIZE = (64, 64)
STRIDES = (8, 16, 32)


def settings_of(kind: str, width: int = 32, layers: int = 2, queries: int = 10) -> dict[str, Any]:
    """The settings of a detector as mmdet's configs write them."""
    attention = {"embed_dims": width, "num_heads": 2, "batch_first": True, "dropout": 0.0}
    layer = {
        "self_attn_cfg": attention,
        "ffn_cfg": {"embed_dims": width, "feedforward_channels": 64, "ffn_drop": 0.0},
    }
    deformable = {**attention, "num_levels": 4, "num_points": 2}
    focal = {"type": "FocalLoss", "gamma": 2.0, "alpha": 0.25, **SIGMOID, "loss_weight": 2.0}
    costs = [
        {"type": "FocalLossCost", "weight": 2.0},
        {"type": "BBoxL1Cost", "weight": 5.0, "box_format": "xywh"},
        {"type": "IoUCost", "iou_mode": "giou", "weight": 2.0},
    ]
    dino = {
        "with_box_refine": True,
        "as_two_stage": True,
        "dn_cfg": {
            "label_noise_scale": 0.5,
            "box_noise_scale": 1.0,
            "group_cfg": {"dynamic": True, "num_groups": None, "num_dn_queries": 8},
        },
    }
    return {
        # Pixels from 0 to 1, in RGB.
        "data_preprocessor": {"type": "DetDataPreprocessor", "mean": [0.0] * 3, "std": [255.0] * 3},
        "backbone": {"type": "ResNet", "depth": 18, "init_cfg": None},
        "neck": {
            "type": "ChannelMapper", "in_channels": [width] * 3, "kernel_size": 1, "out_channels": width,
            "act_cfg": None, "norm_cfg": {"type": "GN", "num_groups": 4}, "num_outs": 4,
        },
        "num_queries": queries,
        "num_feature_levels": 4,
        "encoder": {"num_layers": 1, "layer_cfg": {**layer, "self_attn_cfg": deformable}},
        "decoder": {
            "num_layers": layers, "return_intermediate": True,
            "layer_cfg": {**layer, "cross_attn_cfg": deformable}, "post_norm_cfg": None,
        },
        "positional_encoding": {"num_feats": width // 2, "normalize": True, "offset": -0.5},
        "bbox_head": {
            "type": "DINOHead" if kind == "dino" else "DeformableDETRHead", "num_classes": CLASSES,
            "embed_dims": width, "sync_cls_avg_factor": True, "loss_cls": focal,
            "loss_bbox": {"type": "L1Loss", "loss_weight": 5.0},
            "loss_iou": {"type": "GIoULoss", "loss_weight": 2.0},
        },
        "train_cfg": {"assigner": {"type": "HungarianAssigner", "match_costs": costs}},
        "test_cfg": {"max_per_img": 10},
        **(dino if kind == "dino" else {}),
    }  # fmt: skip


def detector_of(kind: str, width: int = 32, seed: int = 0, **options: Any) -> Any:
    """A detector of a kind, ``"deformable_detr"`` or ``"dino"``, as mmdet builds it.

    A DINO has a width of 256, whatever is asked for: its embeddings of boxes know no other.
    """
    from mmdet.models import DINO, DeformableDETR
    from mmdet.utils import register_all_modules
    from mmengine.config import ConfigDict

    register_all_modules()
    width = 256 if kind == "dino" else width
    settings = ConfigDict(settings_of(kind, width, **options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = (DINO if kind == "dino" else DeformableDETR)(**settings)
        detector.backbone = SmallBackbone(STRIDES, width)
        torch.nn.init.normal_(detector.level_embed)
    return detector


def batch_of(images: int = 2) -> tuple[torch.Tensor, list[Any]]:
    """Images (images, 3, 64, 64) and mmdet's data samples."""
    generator = torch.Generator().manual_seed(0)
    targets = []
    for image in range(images):
        corners = 30 * torch.rand(image + 1, 2, generator=generator)
        sides = 10 + 20 * torch.rand(image + 1, 2, generator=generator)
        labels = torch.randint(CLASSES, (image + 1,), generator=generator)
        targets.append({"boxes": torch.cat([corners, corners + sides], dim=1), "labels": labels})
    return torch.rand(images, 3, *SIZE, generator=generator), samples_of(targets, SIZE)
