"""The recipes under ``examples/mmdet``, for tests. Importing this needs no mmdet, using it does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmengine.config import Config

FOLDER = Path(__file__).parents[1] / "examples" / "mmdet"
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
