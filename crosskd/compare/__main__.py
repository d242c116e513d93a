"""``python -m crosskd.compare``: compares files of detections."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from crosskd.compare.report import compare


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a comparison, and writes it where ``--output`` says so."""
    parser = argparse.ArgumentParser(
        prog="python -m crosskd.compare", description="Compares students' detections by COCO's metrics."
    )
    parser.add_argument("ground_truth", type=Path, help="a JSON file in COCO form")
    parser.add_argument(
        "detections",
        nargs="+",
        metavar="NAME=FILE",
        help="a student's detections, a JSON list in COCO's result form; all are compared with the first",
    )
    parser.add_argument("--images", type=Path, help="the images' folder, for the picture")
    parser.add_argument("--output", type=Path, help="folder for comparison.md and comparison.png")
    parser.add_argument("--resamples", type=int, default=1000, help="of the images, for the intervals")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    files = dict(item.partition("=")[::2] for item in options.detections)
    if len(files) < len(options.detections) or not all(files.values()):
        parser.error(f"each student once, as NAME=FILE, got {' '.join(options.detections)}")
    try:
        comparison = compare(
            options.ground_truth, files, images=options.images, resamples=options.resamples, seed=options.seed
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(comparison)
    if options.output is not None:
        comparison.save(options.output)


if __name__ == "__main__":
    main()
