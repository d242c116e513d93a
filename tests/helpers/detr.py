"""Small detection transformers of `transformers`, with random weights."""

from __future__ import annotations

from typing import Any

import torch

from crosskd import DecoderCrossKD, Distiller, MatchedQueries, Method, QueryDistillation

CLASSES = 3
SIZE = 64
KINDS = ("rt_detr", "rt_detr_v2", "d_fine", "deformable_detr", "two_stage", "conditional_detr", "detr")


def backbone_of(kind: str, width: int) -> Any:
    """A ResNet of three stages, whose maps have strides of 4, 8 and 16."""
    from transformers import ResNetConfig, RTDetrResNetConfig

    hybrid, single = kind in ("rt_detr", "rt_detr_v2", "d_fine"), kind in ("conditional_detr", "detr")
    return (RTDetrResNetConfig if hybrid else ResNetConfig)(
        embedding_size=8, hidden_sizes=[8, width, width], depths=[1, 1, 1], layer_type="basic",
        out_features=["stage3"] if single else ["stage2", "stage3"],
    )  # fmt: skip


def config_of(kind: str, width: int = 32, layers: int = 2, queries: int = 10, **changed: Any) -> Any:
    """The configuration of a kind of detector: d_model, decoder layers and queries may be chosen."""
    import transformers as t

    shared = {
        "backbone_config": backbone_of(kind, width), "num_labels": CLASSES, "d_model": width,
        "decoder_layers": layers, "num_queries": queries, "decoder_attention_heads": 2,
        "encoder_attention_heads": 2, "decoder_ffn_dim": 2 * width, "encoder_ffn_dim": 2 * width,
        "encoder_layers": 1, "decoder_n_points": 2,
    }  # fmt: skip
    hybrid = {
        "encoder_hidden_dim": width, "encoder_in_channels": [width] * 2, "num_denoising": 8,
        "decoder_in_channels": [width] * 2, "feat_strides": [8, 16], "num_feature_levels": 2,
        "hidden_expansion": 0.5, "encode_proj_layers": [1],
    }  # fmt: skip
    fine = {"decoder_n_points": [2, 2], "max_num_bins": 8, "depth_mult": 0.34, "lqe_hidden_dim": 8}
    plain = {"auxiliary_loss": True, "dropout": 0.0}
    deformable = {**plain, "num_feature_levels": 3, "encoder_n_points": 2}
    two_stage = {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": queries}
    build, more = {
        "rt_detr": (t.RTDetrConfig, hybrid),
        "rt_detr_v2": (t.RTDetrV2Config, {**hybrid, "decoder_n_levels": 2}),
        "d_fine": (t.DFineConfig, {**hybrid, **fine}),
        "deformable_detr": (t.DeformableDetrConfig, deformable),
        "two_stage": (t.DeformableDetrConfig, {**deformable, **two_stage}),
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
    lively = {"bbox": 0.3, "class": 0.3, "query_position": 0.3, "norm.weight": 0.3}
    if kind in ("conditional_detr", "detr"):
        lively |= {"query_position": 5.0, "decoder.layers": 0.3}
    with torch.no_grad():  # a new model answers all queries alike: predictors of boxes begin with zeros
        for name, parameter in model.named_parameters():
            scale = max(scale for part, scale in {"": 0.0, **lively}.items() if part in name)
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
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


def methods_of_queries() -> list[Method]:
    """All of them, few random queries."""
    return [QueryDistillation(general=5), DecoderCrossKD(general=5), MatchedQueries()]


def distiller_of(
    kind: str, methods: Any = None, teacher_kind: str | None = None, **options: Any
) -> Distiller:
    """A student taught by a detector of another width, with more layers and queries; in train mode."""
    teacher = detector_of(teacher_kind or kind, 64, seed=1, layers=3, queries=12)
    return Distiller(teacher, detector_of(kind), methods or QueryDistillation(general=5), **options).train()


def distilled(losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The distillation's part of all losses."""
    return {name: loss for name, loss in losses.items() if "kd_" in name}
