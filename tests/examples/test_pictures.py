from __future__ import annotations

import matplotlib.pyplot as plt
import pictures
import pytest
import torch
from coco_data import CocoFolder
from pictures import draw_curves, draw_detections
from shapes_data import write_shapes
from torch import nn


class Fixed(nn.Module):
    """Answers the same detections for every image."""

    def __init__(self, boxes: list[list[float]], labels: list[int], scores: list[float]) -> None:
        super().__init__()
        self.output = {
            "boxes": torch.tensor(boxes).reshape(-1, 4),
            "labels": torch.tensor(labels),
            "scores": torch.tensor(scores),
        }

    def forward(self, images):
        assert not self.training
        return [self.output for _ in images]


@pytest.fixture
def figure(monkeypatch):
    """What is drawn, kept open."""
    monkeypatch.setattr(pictures.plt, "close", lambda figure: None)
    yield plt.gcf
    monkeypatch.undo()
    plt.close("all")


def test_curves_show_own_losses_those_of_distillation_and_ap(tmp_path, figure):
    losses = {"classification": 1.0, "bbox_regression": 0.5}
    alone = [{"epoch": 1, "losses": losses}, {"epoch": 2, "losses": losses, "metrics": {"AP": 7.0}}]
    first = {"epoch": 1, "losses": {**losses, "kd_cls": 3.0, "kd_reg": 2.0}}
    distilled = [first, {"epoch": 2, "losses": {**losses, "kd_cls": 1.5}, "metrics": {"AP": 9.0}}]
    draw_curves({"none": alone, "crosskd": distilled}, tmp_path / "curves.png")
    left, right = figure().axes
    drawn = {line.get_label(): [float(v) for v in line.get_ydata()] for line in left.lines}
    assert drawn["student alone"] == drawn["CrossKD"] == [1.5, 1.5]
    assert drawn["CrossKD: kd_cls"] == [3.0, 1.5]
    assert drawn["CrossKD: kd_reg"][0] == 2.0
    assert len({line.get_linestyle() for line in left.lines if line.get_color() == "#d62728"}) == 3
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in right.lines] == [
        ([2], [7]),
        ([2], [9]),
    ]
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_detections_that_are_right_are_counted_and_solid(tmp_path, figure):
    write_shapes(tmp_path, train=1, val=1, seed=0)
    dataset = CocoFolder(tmp_path / "train", tmp_path / "annotations/train.json")
    boxes, labels = (of_all.tolist() for of_all in dataset.objects(0))
    # The first object twice, then as another class; the second too unsure to be drawn.
    seen = Fixed(
        [boxes[0], boxes[0], boxes[0], boxes[1]],
        [*labels[:1] * 2, labels[0] + 1, labels[1]],
        [0.9, 0.8, 0.7, 0.1],
    )
    draw_detections(
        {"none": seen, "crosskd": Fixed([], [], [])}, dataset, tmp_path / "p.png", device=torch.device("cpu")
    )
    truth, alone, distilled = figure().axes
    assert truth.get_title() == f"ground truth\n{len(boxes)} objects"
    assert alone.get_title() == "student alone\n1 right, 2 wrong"
    assert distilled.get_title() == "CrossKD\n0 right, 0 wrong"
    assert [patch.get_linestyle() for patch in alone.patches] == ["-", ":", ":"]
    assert [text.get_text() for text in alone.texts] == ["0.90", "0.80", "0.70"]
    assert len(truth.patches) == len(boxes)
