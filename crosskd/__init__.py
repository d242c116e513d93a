"""Knowledge distillation of object detectors: any teacher, any student, any method.

``Distiller(teacher, student, CrossKD())`` wraps a detector; call it, back-propagate, keep the student.
"""

from crosskd import (
    adapters,
    align,
    cache,
    checkpoints,
    losses,
    methods,
    pairing,
    predictions,
    schedule,
    step,
    testing,
    towers,
)
from crosskd._version import __version__ as __version__
from crosskd.cache import TeacherCache
from crosskd.compare import collect_detections, compare
from crosskd.diagnostics import check, check_adapter, describe
from crosskd.distiller import Distiller
from crosskd.fold import fold_batch_norm
from crosskd.inherit import inherit
from crosskd.methods import BCKD, CWD, FGD, LD, MGD, PKD, CrossKD, Method, PredictionMimicking, StructuralKD
from crosskd.methods.cosine import CosineAlignment
from crosskd.methods.decoder_crosskd import DecoderCrossKD
from crosskd.methods.drkd import DRKD
from crosskd.methods.imitation import FeatureImitation
from crosskd.methods.matched_queries import MatchedQueries
from crosskd.methods.queries import QueryDistillation
from crosskd.methods.response import ResponseDistillation
from crosskd.schedule import Schedule

__all__ = [
    "BCKD",
    "CWD",
    "DRKD",
    "FGD",
    "LD",
    "MGD",
    "PKD",
    "CosineAlignment",
    "CrossKD",
    "DecoderCrossKD",
    "Distiller",
    "FeatureImitation",
    "MatchedQueries",
    "Method",
    "PredictionMimicking",
    "QueryDistillation",
    "ResponseDistillation",
    "Schedule",
    "StructuralKD",
    "TeacherCache",
    "adapters",
    "align",
    "cache",
    "check",
    "check_adapter",
    "checkpoints",
    "collect_detections",
    "compare",
    "describe",
    "fold_batch_norm",
    "inherit",
    "losses",
    "methods",
    "pairing",
    "predictions",
    "schedule",
    "step",
    "testing",
    "towers",
]
