"""Methods of distillation, one file each; a list of them composes."""

from crosskd.methods.base import Method
from crosskd.methods.bckd import BCKD
from crosskd.methods.cosine import CosineAlignment
from crosskd.methods.crosskd import CrossKD
from crosskd.methods.cwd import CWD
from crosskd.methods.decoder_crosskd import DecoderCrossKD
from crosskd.methods.drkd import DRKD
from crosskd.methods.fgd import FGD
from crosskd.methods.imitation import FeatureImitation
from crosskd.methods.ld import LD
from crosskd.methods.maps import MapMethod
from crosskd.methods.matched_queries import MatchedQueries
from crosskd.methods.mgd import MGD
from crosskd.methods.mimicking import PredictionMimicking
from crosskd.methods.pkd import PKD
from crosskd.methods.queries import QueryDistillation
from crosskd.methods.response import ResponseDistillation
from crosskd.methods.ssim import StructuralKD
from crosskd.step import Step

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
    "FeatureImitation",
    "MapMethod",
    "MatchedQueries",
    "Method",
    "PredictionMimicking",
    "QueryDistillation",
    "ResponseDistillation",
    "Step",
    "StructuralKD",
]
