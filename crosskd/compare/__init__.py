"""Finished students compared on the same ground truth.

`compare` takes COCO ground truth and each student's detections, and returns a `Comparison`, which prints and
saves: AP with intervals, per class and per size, what was gained and lost image by image, and cost.
`collect_detections` runs a detector, or a function such as that of an exported model. From a shell::

    python -m crosskd.compare truth.json alone=alone.json distilled=distilled.json --images val --output out
"""

from crosskd.compare.collect import Detections, collect_detections
from crosskd.compare.images import ImageResults
from crosskd.compare.report import Comparison, Estimate, compare

__all__ = ["Comparison", "Detections", "Estimate", "ImageResults", "collect_detections", "compare"]
