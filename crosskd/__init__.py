"""Knowledge distillation of object detectors, built around CrossKD.

``Distiller(teacher, student, CrossKD())`` wraps a detector; call it, back-propagate, keep the student.
"""

from crosskd import adapters, align, checkpoints, head, losses, methods, predictions, testing
from crosskd.checking import check
from crosskd.describe import describe
from crosskd.distiller import Distiller
from crosskd.methods import CrossKD, Method, PredictionMimicking
from crosskd.schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "CrossKD",
    "Distiller",
    "Method",
    "PredictionMimicking",
    "Schedule",
    "adapters",
    "align",
    "check",
    "checkpoints",
    "describe",
    "head",
    "losses",
    "methods",
    "predictions",
    "testing",
]
