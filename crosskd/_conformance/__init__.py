"""The checks that `crosskd.testing.check_adapter` runs: one function each, named as reports name them.

A check yields what it finds wrong, and raises `Skipped` where it can't be run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from crosskd._conformance.batches import (
    autocast,
    detections,
    float64,
    no_objects,
    odd_image_size,
    one_image,
    other_device,
    unlabelled_images,
)
from crosskd._conformance.bench import Bench, Finding
from crosskd._conformance.boxes import decoding_and_classes
from crosskd._conformance.heads import gradients_through_the_tail, same_path_for_both, taps_and_tail
from crosskd._conformance.structure import functions, structure
from crosskd._conformance.training import student_gradients, student_losses, teacher_untouched

__all__ = ["CHECKS"]

CHECKS: dict[str, Callable[[Bench], Iterable[Finding]]] = {
    check.__name__.replace("_", " "): check
    for check in (
        functions,
        structure,
        same_path_for_both,
        taps_and_tail,
        gradients_through_the_tail,
        student_losses,
        student_gradients,
        teacher_untouched,
        decoding_and_classes,
        detections,
        unlabelled_images,
        one_image,
        no_objects,
        odd_image_size,
        autocast,
        float64,
        other_device,
    )
}
