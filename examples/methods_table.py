"""The methods of the training script, by the names that ``--method`` takes.

A method of your own is one more line in ``METHODS``. ``none`` stands for the student alone, ``a+b`` for
methods together. ``inherit`` among them starts the student's neck and head from the teacher's weights, and by
``pseudo``, alone or among them, the teacher's detections are labels of the images that have none.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

from crosskd import (
    BCKD,
    CWD,
    DRKD,
    FGD,
    LD,
    MGD,
    PKD,
    CosineAlignment,
    CrossKD,
    FeatureImitation,
    Method,
    PredictionMimicking,
    ResponseDistillation,
    Schedule,
    StructuralKD,
)

ALONE, INHERIT, PSEUDO, TEACHER = "none", "inherit", "pseudo", "teacher"


class Entry(NamedTuple):
    """A method's label in tables and pictures, and what makes it of the script's options."""

    label: str
    make: Callable[[Namespace], Method]


def schedule(options: Namespace) -> Schedule | None:
    """Stops every method at the epoch of ``--stop-distilling``."""
    stop = options.stop_distilling
    return None if stop is None else Schedule(stop=stop, unit="epoch")


def of_predictions(options: Namespace) -> dict[str, Any]:
    """What the two methods that compare predictions by the same losses take of the options."""
    weights = {"cls_weight": options.cls_weight, "reg_weight": options.reg_weight}
    return {**weights, "schedule": schedule(options)}


def of_maps(options: Namespace) -> dict[str, Any]:
    """What the methods that compare feature maps take of them: a teacher's of another size are resized."""
    return {"resize": options.teacher_short_side is not None, "schedule": schedule(options)}


METHODS: dict[str, Entry] = {
    "mimic": Entry("prediction mimicking", lambda o: PredictionMimicking(**of_predictions(o))),
    "crosskd": Entry("CrossKD", lambda o: CrossKD(o.position, o.tap, **of_predictions(o))),
    "pkd": Entry("PKD", lambda o: PKD(**of_maps(o))),
    "cwd": Entry("CWD", lambda o: CWD(**of_maps(o))),
    "ssim": Entry("SSIM", lambda o: StructuralKD(**of_maps(o))),
    "mgd": Entry("MGD", lambda o: MGD(**of_maps(o))),
    "fgd": Entry("FGD", lambda o: FGD(**of_maps(o))),
    "drkd": Entry("DRKD", lambda o: DRKD(**of_maps(o))),
    "cosine": Entry("cosine alignment", lambda o: CosineAlignment(schedule=schedule(o))),
    "imitation": Entry("feature imitation", lambda o: FeatureImitation(**of_maps(o))),
    "bckd": Entry("BCKD", lambda o: BCKD(schedule=schedule(o))),
    "ld": Entry("LD", lambda o: LD(schedule=schedule(o))),
    "response": Entry("response distillation", lambda o: ResponseDistillation(schedule=schedule(o))),
}


def check_name(name: str) -> None:
    """Raises ``ValueError`` for a name that is neither a method's nor made of them."""
    parts = name.split("+")
    unknown = [part for part in parts if part not in {ALONE, INHERIT, PSEUDO, *METHODS}]
    if unknown:
        raise ValueError(
            f"unknown method {unknown[0]!r}: choose from {', '.join((ALONE, *METHODS, PSEUDO))}, or several "
            f"joined by +, as crosskd+pkd; +{INHERIT} starts the student's neck and head from the teacher's"
        )
    if len(set(parts)) < len(parts):
        raise ValueError(f"{name} names a part twice")
    if name == INHERIT:
        raise ValueError(f"{INHERIT} alone names no method: {ALONE}+{INHERIT} trains the student on labels")
    if ALONE in parts and set(parts) & {PSEUDO, *METHODS}:
        raise ValueError(f"{name}: {ALONE} is the student alone, which learns nothing from a teacher")


def inherits(name: str) -> bool:
    """Whether the student starts from the teacher's neck and head."""
    return INHERIT in name.split("+")


def is_pseudo_labelled(name: str) -> bool:
    """Whether the teacher's detections are labels of the images that have none."""
    return PSEUDO in name.split("+")


def make_methods(name: str, options: Namespace) -> list[Method]:
    """The methods of a name such as ``"crosskd+pkd"``; none for ``"none"`` and ``"pseudo"``."""
    return [METHODS[part].make(options) for part in name.split("+") if part in METHODS]


def label_of(name: str) -> str:
    """What tables and pictures call a student that was trained so, or the teacher."""
    if name == TEACHER:
        return TEACHER
    label = " + ".join(METHODS[part].label for part in name.split("+") if part in METHODS)
    if is_pseudo_labelled(name):
        label = f"{label}, and detections as labels" if label else "the teacher's detections as labels"
    return (label or "student alone") + (", inherited" if inherits(name) else "")
