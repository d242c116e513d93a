"""The benchmark of detection transformers: images, metrics, what is not run twice, and the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import mobilenet_v2

from tests.benchmarks.test_benchmarks import load, tables
from tests.helpers import detr
from tests.helpers.packages import package
from tests.helpers.reference_files import bccd_folder

pytestmark = pytest.mark.transformers
SMALL = "--size 64 64 --batch 2 --images 4 --seeds 0 --steps 2 --teacher-steps 2 --rung 1"


@pytest.fixture(scope="module")
def script() -> Any:
    package("timm")
    return load("detection_transformers")


def arguments(folder: Path, *more: str) -> list[str]:
    given = ["--data", str(bccd_folder()), "--output", str(folder / "runs")]
    return [*given, *SMALL.split(), "--results", str(folder / "table.md"), *more]


def cached_images(script: Any, folder: Path) -> Any:
    path = folder / "images.pt"
    script.cache(bccd_folder(), "val", path, (64, 96), 4)
    return script.Images(path, torch.device("cpu"))


def test_images_are_mirrored_with_their_boxes(script, tmp_path):
    """An image whose objects are painted, and nothing else, shows them where the labels say."""
    images = cached_images(script, tmp_path)
    assert images.pixels.shape == (4, 3, 64, 96)
    images.pixels = torch.zeros(4, 3, 640, 960)
    for image, boxes in zip(images.pixels, images.boxes, strict=True):
        for x, y, width, height in (boxes * torch.tensor([960, 640, 960, 640])).tolist():
            rows = slice(round(y - height / 2), round(y + height / 2))
            image[:, rows, round(x - width / 2) : round(x + width / 2)] = 1
    pixels, labels = images.random(12, script.np.random.default_rng(0))
    assert len({tuple(image.flatten()[::997].tolist()) for image in pixels}) > 4  # some are mirrored
    for image, label in zip(pixels, labels, strict=True):
        centres = (label["boxes"][:, :2] * torch.tensor([960, 640])).long().T
        assert image[0, centres[1], centres[0]].min() == 1
        assert image.sum() > 0


def test_perfect_detections_have_a_precision_of_100(script, tmp_path):
    images = cached_images(script, tmp_path)
    found = torch.zeros(4, script.FOUND, 6)
    for rows, label in zip(found, images.labels(), strict=True):
        count = len(label["boxes"])
        rows[:count, :4] = script.box_convert(label["boxes"], "cxcywh", "xyxy")
        rows[:count, 4] = 1
        rows[:count, 5] = label["class_labels"]
    assert script.precision(found, images)["AP"] == pytest.approx(100)
    found[..., 5] = (found[..., 5] + 1) % 3
    assert script.precision(found, images)["AP"] < 5


def test_the_backbone_has_torchvisions_weights(script, tmp_path):
    network, pixels = mobilenet_v2(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        network.train()(torch.rand(4, 3, 64, 64))  # running means of its own
        torch.save(network.state_dict(), tmp_path / "weights.pth")
        detector = script.build("student", 3, tmp_path / "weights.pth").eval()
        found, expected = detector.model.backbone.model(pixels).feature_maps, []
        for number, layer in enumerate(network.eval().features):
            pixels = layer(pixels)
            expected += [pixels] if number in (6, 13, 17) else []
    torch.testing.assert_close(list(found), expected)
    widths = script.WIDTHS["student"], script.WIDTHS["teacher"]
    assert (detector.config.d_model, script.build("teacher", 3).config.d_model) == widths


def test_a_stopped_run_goes_on_and_the_table_has_every_rung(script, tmp_path, monkeypatch):
    """With tiny detectors, in this process, as they would be in processes of their own."""

    def build(side: str, classes: int, weights: Path | None = None) -> Any:
        width = {"teacher": 64, "student": 32}[side]
        return detr.detector_of("rt_detr", width, torch.initial_seed(), queries=20, num_labels=classes)

    class Finished:
        returncode = 0

        def poll(self) -> int:
            return 0

    started = []

    def launch(name: str, seed: int, options: Any) -> Finished:
        started.append(name)
        script.folder_of(name, seed, options).mkdir(parents=True, exist_ok=True)
        script.train(name, seed, options)
        return Finished()

    monkeypatch.setattr(script, "build", build)
    monkeypatch.setattr(script, "launch", launch)
    methods = ["--methods", "none", "both"]
    script.main(arguments(tmp_path, *methods, "--steps", "1"))
    state = torch.load(tmp_path / "runs/both-0/state.pt", weights_only=True)
    assert state["done"] == 1
    script.main(arguments(tmp_path, *methods))
    script.main(arguments(tmp_path, *methods))  # nothing is left to do
    assert started == ["teacher", "none", "both", "none", "both"]
    metrics, later = tables(tmp_path / "table.md")
    names = ["teacher", "student alone", "`QueryDistillation` and `PKD`"]
    assert [row[""] for row in metrics] == names
    assert [row[""] for row in later] == names[1:]
    assert list(later[0]) == ["", "1", "2"]
    text = (tmp_path / "table.md").read_text()
    for fact in ("bccd, validation split", "64 x 64 pixels", "3 decoder layers, 2 steps", "2 images a step"):
        assert fact in text
    stopped = torch.load(tmp_path / "runs/both-0/2.pt", weights_only=True)["val"]
    other = tmp_path / "other"
    script.main(arguments(other, "--methods", "both"))
    assert torch.equal(torch.load(other / "runs/both-0/2.pt", weights_only=True)["val"], stopped)
