"""The recipes under ``examples/mmdet``, for tests. Importing this needs no mmdet, using it does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.helpers.mmdet_heads import samples_of

if TYPE_CHECKING:
    from mmengine.config import Config

FOLDER = Path(__file__).parents[2] / "examples" / "mmdet"
RECIPES = sorted(path.stem for path in FOLDER.glob("*_from_*.py"))
# Nothing is downloaded: teacher and student start from random weights.
WITHOUT_WEIGHTS = {
    "model.teacher_checkpoint": None,
    "model.teacher.backbone.init_cfg": None,
    "model.student.backbone.init_cfg": None,
}


def load_recipe(name: str, options: dict[str, Any] | None = None) -> Config:
    """A recipe's config with options in it, as ``--cfg-options`` puts them there; its weights are off."""
    from mmengine.config import Config

    config = Config.fromfile(FOLDER / f"{name}.py")
    config.merge_from_dict({**WITHOUT_WEIGHTS, **(options or {})})
    return config


def mmdet_batch() -> dict[str, Any]:
    """Two images as mmdet's data loader hands them over, the second without objects."""
    size = (64, 96)
    boxes = torch.tensor([[8.0, 8, 48, 40], [30, 20, 92, 60]])
    objects = [
        {"boxes": boxes, "labels": torch.tensor([0, 7])},
        {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.long)},
    ]
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for _ in objects]
    return {"inputs": images, "data_samples": samples_of(objects, size)}


def small_bccd(root: Path, models: tuple[str, ...] = ("model.teacher", "model.student")) -> dict[str, Any]:
    """Options that shrink a COCO config to a few small images of blood cells, and its models with it.

    Everything starts from random weights, so no layer is frozen, and no detection is too unsure to count.
    Images are not flipped: then a run that was resumed sees what an unbroken one sees.
    """
    options: dict[str, Any] = {
        "train_cfg.max_epochs": 2,
        "randomness.seed": 0,
        "param_scheduler.0.end": 4,  # of the warm-up
        "train_dataloader.dataset.pipeline.3.prob": 0.0,
        "default_hooks.logger.interval": 1,
    }
    for model in models:
        options |= {
            f"{model}.bbox_head.num_classes": 3,
            f"{model}.neck.out_channels": 64,
            f"{model}.bbox_head.in_channels": 64,
            f"{model}.bbox_head.feat_channels": 64,
            f"{model}.backbone.frozen_stages": -1,
            f"{model}.backbone.depth": 18,
            f"{model}.backbone.base_channels": 16,
            f"{model}.neck.in_channels": [16, 32, 64, 128],
            f"{model}.backbone.norm_eval": False,
            f"{model}.test_cfg.score_thr": 0.0,
        }
    for part, images, resize in (("train", 24, 2), ("val", 4, 1), ("test", 4, 1)):
        loader, split = f"{part}_dataloader", "train" if part == "train" else "val"
        options |= {
            f"{loader}.batch_size": 4,
            f"{loader}.num_workers": 0,
            f"{loader}.persistent_workers": False,
            f"{loader}.dataset.data_root": f"{root}/",
            f"{loader}.dataset.ann_file": f"annotations/{split}.json",
            f"{loader}.dataset.data_prefix.img": "images/",
            f"{loader}.dataset.metainfo.classes": ("RBC", "WBC", "Platelets"),
            f"{loader}.dataset.indices": images,
            f"{loader}.dataset.pipeline.{resize}.scale": (128, 96),
        }
        if part != "train":
            options[f"{part}_evaluator.ann_file"] = f"{root}/annotations/val.json"
    return options


def as_arguments(options: dict[str, Any]) -> list[str]:
    """Options in the form that mmdet's tools take after ``--cfg-options``."""
    return [f"{key}={value}".replace(" ", "").replace("'", "") for key, value in options.items()]
