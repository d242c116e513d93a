"""The table of a head's blocks and split positions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crosskd import describe
from crosskd.adapters import TorchvisionRetinaNet, backbone
from crosskd.towers import Branch, Tower
from tests.helpers.tiny import TinyBackbone, tiny_fcos, tiny_retinanet, tiny_ssd
from tests.helpers.two_stages import tiny_faster_rcnn

RETINANET_TABLE = """\
RetinaNet, adapter TorchvisionRetinaNet
strides per level: 8, 16, 32
channels per level: 32, 32, 32
head: RetinaNet, 4 classes
branch classification: 2 blocks, shared by all levels, valid positions 0 to 2
  position  channels  taps       features after
         0        32  post       (the tower's input)
         1        32  post, pre  Conv2d, GroupNorm, ReLU
         2        32  post, pre  Conv2d, GroupNorm, ReLU
  predictors: cls_logits (12 channels)
branch regression: 2 blocks, shared by all levels, valid positions 0 to 2
  position  channels  taps       features after
         0        32  post       (the tower's input)
         1        32  post, pre  Conv2d, GroupNorm, ReLU
         2        32  post, pre  Conv2d, GroupNorm, ReLU
  predictors: bbox_reg (12 channels)
settings unless given (published): position 3, cls_weight 1, reg_weight 1 (giou)"""


def test_table_of_a_retinanet(capsys):
    """Shown by print, in a notebook and in the interpreter, and not otherwise."""
    text = describe(tiny_retinanet(norm="group", blocks=2))
    assert capsys.readouterr().out == ""
    assert text == str(text) == repr(text) == RETINANET_TABLE


def test_table_of_an_fcos():
    lines = describe(tiny_fcos(width=64)).splitlines()
    assert lines[0] == "FCOS, adapter TorchvisionFCOS"
    assert lines[4] == "branch classification: 4 blocks, shared by all levels, valid positions 0 to 4"
    assert lines[10] == "         4        64  post, pre  Conv2d, GroupNorm, ReLU"
    assert lines[-2] == "  predictors: bbox_reg (4 channels), bbox_ctrness (1 channels)"
    assert (
        lines[-1]
        == "settings unless given (published): position 2, cls_weight 0.4, reg_weight 0.75 (log_iou)"
    )


FASTER_RCNN_TABLE = """\
FasterRCNN, adapter TorchvisionFasterRCNN
strides per level: 8, 16, 32
channels per level: 16, 16, 16
head rpn: RPN, 1 classes
branch rpn: 2 blocks, shared by all levels, valid positions 0 to 2
  position  channels  taps       features after
         0        16  post       (the tower's input)
         1        16  post, pre  Conv2d, ReLU
         2        16  post, pre  Conv2d, ReLU
  predictors: cls_logits (3 channels), bbox_pred (12 channels)
settings unless given (ours, none are published): position LAST, cls_weight 1, reg_weight 1 (giou)
head box: box head, 5 classes, of which 0 is the background
branch box: 3 blocks, shared by all levels, valid positions 0 to 3
  position  channels  taps       features after
         0        16  post       (the tower's input)
         1        16  post, pre  Conv2d, ReLU
         2        16  post, pre  Conv2d, ReLU
         3        24  post, pre  Flatten, Linear, ReLU
  predictors: cls_score (5 channels), bbox_pred (20 channels)
settings unless given (ours, none are published): position LAST, cls_weight 1, reg_weight 1 (giou)""".replace(
    "LAST", "the last that leaves the teacher's tower a block"
)


def test_both_heads_of_a_detector_of_two_stages():
    assert describe(tiny_faster_rcnn(v2=True)) == FASTER_RCNN_TABLE
    lines = describe(tiny_faster_rcnn()).splitlines()
    assert lines[4] == "branch rpn: 1 blocks, shared by all levels, valid positions 0 to 1"
    assert lines[-4:-2] == [
        "         1        24  post, pre  Flatten, Linear, ReLU",
        "         2        24  post, pre  Linear, ReLU",
    ]


def test_head_without_towers():
    text = describe(tiny_retinanet(blocks=0))
    assert "branch regression: 0 blocks, shared by all levels, valid positions 0 to 0" in text


def test_towers_of_each_level():
    lines = describe(tiny_ssd()).splitlines()
    assert "branch classification: 0 blocks, level 2, valid positions 0 to 0" in lines
    assert "channels per level: 16, 24, 8" in lines


def test_a_backbone():
    text = describe(TinyBackbone(24, 8, batch_norm=False), backbone())
    assert text.splitlines()[:3] == [
        "TinyBackbone, adapter BackboneAdapter",
        "strides per level: 8, 16, 32",
        "channels per level: 24, 24, 24",
    ]
    assert text.splitlines()[3].startswith("no head")


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(8, 4, 3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.convolution(features).sigmoid()


class OfItsOwn(TorchvisionRetinaNet):
    """Another structure, whose levels nothing tells, and which predicts a set."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__(detector)
        self.strides = self.widths = None
        towers = (
            Tower.of([Gate()], "first"),
            Tower.of([Gate(), nn.Conv2d(4, 6, 1), nn.ReLU()], "second"),
        )
        self.heads[0].branches = (Branch("sides", towers, {"bins": nn.Identity()}),)
        self.heads[0].rows = "queries"


def test_an_adapter_of_ones_own():
    lines = describe(tiny_retinanet(), OfItsOwn).splitlines()
    assert lines == [
        "RetinaNet, adapter OfItsOwn",
        "strides per level: unknown",
        "channels per level: unknown",
        "head: RetinaNet, 4 classes",
        "its predictions are a set of queries, which no method compares row by row",
        "branch sides: 1 blocks, level 0, valid positions 0 to 1",
        "  position  channels  taps       features after",
        "         0         8  post       (the tower's input)",
        "         1         4  post       Gate",
        "branch sides: 2 blocks, level 1, valid positions 0 to 2",
        "  position  channels  taps       features after",
        "         0         8  post       (the tower's input)",
        "         1         4  post       Gate",
        "         2         6  post, pre  Conv2d, ReLU",
        "  predictors: bins (? channels)",
    ]


def test_error_unknown_detector():
    with pytest.raises(TypeError, match="no adapter understands a Linear"):
        describe(nn.Linear(2, 2))


def test_error_tower_that_cannot_be_split():
    detector = tiny_retinanet()
    detector.head.regression_head.conv = nn.Sequential(nn.ReLU(), nn.Conv2d(32, 32, 3))
    with pytest.raises(ValueError, match="regression tower starts with ReLU"):
        describe(detector)
