"""Knowledge distillation of object detectors: any teacher, any student, any method.

``Distiller(teacher, student, CrossKD())`` wraps a detector; call it, back-propagate, keep the student.
"""

from crosskd.diagnostics import check, describe
from crosskd.distiller import Distiller
from crosskd.methods import PKD, CrossKD, Method, PredictionMimicking
from crosskd.schedule import Schedule

__version__ = "0.1.0"
