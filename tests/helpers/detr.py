"""Small detection transformers of `transformers`, with random weights."""

from __future__ import annotations

from typing import Any

import torch

CLASSES = 3
SIZE = 64
KINDS = ("rt_detr", "rt_detr_v2", "d_fine", "deformable_detr", "two_stage", "conditional_detr", "detr")


def backbone_of(kind: str, width: int) -> Any:
    from transformers import ResNetConfig, RTDetrResNetConfig

    if kind in ("rt_detr", "rt_detr_v2", "d_fine"):
        return RTDetrResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, width, width], depths=[1, 1, 1, 1], layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        )  # fmt: skip
    features = ["stage2", "stage3", "stage4"] if kind in ("deformable_detr", "two_stage") else ["stage4"]
    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, width, width], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=features,
    )  # fmt: skip


def config_of(kind: str, width: int = 32, layers: int = 2, queries: int = 10, **changed: Any) -> Any:
    """The configuration of a kind of detector: d_model, decoder layers and queries may be chosen."""
    import transformers as t

    backbone = backbone_of(kind, width)
    shared = {
        "backbone_config": backbone, "num_labels": CLASSES, "d_model": width, "decoder_layers": layers,
        "num_queries": queries, "decoder_attention_heads": 2, "encoder_attention_heads": 2,
        "decoder_ffn_dim": 2 * width, "encoder_ffn_dim": 2 * width, "encoder_layers": 1,
    }  # fmt: skip
    hybrid = {
        "encoder_hidden_dim": width, "encoder_in_channels": [8, width, width], "num_denoising": 8,
        "decoder_in_channels": [width] * 3, "feat_strides": [8, 16, 32], "num_feature_levels": 3,
        "decoder_n_points": 2, "hidden_expansion": 0.5,
    }  # fmt: skip
    plain = {"auxiliary_loss": True, "dropout": 0.0}
    deformable = {"num_feature_levels": 4, "encoder_n_points": 2, "decoder_n_points": 2}
    two_stage = {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": queries}
    build, more = {
        "rt_detr": (t.RTDetrConfig, hybrid),
        "rt_detr_v2": (t.RTDetrV2Config, {**hybrid, "decoder_n_levels": 3}),
        "d_fine": (t.DFineConfig, {**hybrid, "decoder_n_points": [2, 2, 2], "max_num_bins": 8}),
        "deformable_detr": (t.DeformableDetrConfig, {**plain, **deformable}),
        "two_stage": (t.DeformableDetrConfig, {**plain, **deformable, **two_stage}),
        "conditional_detr": (t.ConditionalDetrConfig, plain),
        "detr": (t.DetrConfig, plain),
    }[kind]
    return build(**{**shared, **more, **changed})


def detector_of(kind: str, width: int = 32, seed: int = 0, **options: Any) -> Any:
    """A detector of a kind, as `transformers` builds it."""
    import transformers as t

    models = {
        "rt_detr": t.RTDetrForObjectDetection, "rt_detr_v2": t.RTDetrV2ForObjectDetection,
        "d_fine": t.DFineForObjectDetection, "deformable_detr": t.DeformableDetrForObjectDetection,
        "two_stage": t.DeformableDetrForObjectDetection, "detr": t.DetrForObjectDetection,
        "conditional_detr": t.ConditionalDetrForObjectDetection,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = models[kind](config_of(kind, width, **options))
    # The DETRs freeze a backbone of ResNetConfig, whose layers they look for under other names.
    model.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # a new model's answers are all alike: predictors of boxes begin with zeros
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("bbox", "class", "query_position", "norm.weight")):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def batch_of(images: int = 2, seed: int = 0, size: int = SIZE) -> dict[str, Any]:
    """Pixels, and labels as the library's own processors give them."""
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for image in range(images):
        boxes = 0.2 + 0.3 * torch.rand(image + 1, 4, generator=generator)
        classes = torch.randint(CLASSES, (image + 1,), generator=generator)
        labels.append({"class_labels": classes, "boxes": boxes})
    return {"pixel_values": torch.rand(images, 3, size, size, generator=generator), "labels": labels}
