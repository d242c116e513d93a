"""Methods of distillation, one file each; a list of them composes."""

from crosskd.methods.base import Method, Step
from crosskd.methods.crosskd import CrossKD
from crosskd.methods.mimicking import PredictionMimicking
from crosskd.methods.recipes import ATSS, FCOS, GFL, RETINANET, HeadRecipe

__all__ = [
    "ATSS",
    "FCOS",
    "GFL",
    "RETINANET",
    "CrossKD",
    "HeadRecipe",
    "Method",
    "PredictionMimicking",
    "Step",
]
