"""The table of a head's blocks and split positions."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from crosskd.head import Branch, Tower
from torch import nn

from crosskd import describe
from crosskd.methods import GFL, HeadRecipe
from tests.helpers.tiny import tiny_fcos, tiny_retinanet
from tests.two_stages import tiny_faster_rcnn

RETINANET_TABLE = """\
RetinaNet (settings: RetinaNet)
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
position unless given: 3"""


def test_table_of_a_retinanet(capsys):
    text = describe(tiny_retinanet(norm="group", blocks=2))
    assert text == RETINANET_TABLE
    assert capsys.readouterr().out == text + "\n"


def test_table_of_an_fcos():
    lines = describe(tiny_fcos(width=64)).splitlines()
    assert lines[0] == "FCOS (settings: FCOS)"
    assert lines[1] == "branch classification: 4 blocks, shared by all levels, valid positions 0 to 4"
    assert lines[7] == "         4        64  post, pre  Conv2d, GroupNorm, ReLU"
    assert lines[-2] == "  predictors: bbox_reg (4 channels), bbox_ctrness (1 channels)"
    assert lines[-1] == "position unless given: 2"


FASTER_RCNN_TABLE = """\
FasterRCNN (settings: Faster R-CNN's RPN)
part rpn
branch rpn: 2 blocks, shared by all levels, valid positions 0 to 2
  position  channels  taps       features after
         0        16  post       (the tower's input)
         1        16  post, pre  Conv2d, ReLU
         2        16  post, pre  Conv2d, ReLU
  predictors: cls_logits (3 channels), bbox_pred (12 channels)
position unless given: the last that leaves the teacher's tower a block
part box
branch box: 3 blocks, shared by all levels, valid positions 0 to 3
  position  channels  taps       features after
         0        16  post       (the tower's input)
         1        16  post, pre  Conv2d, ReLU
         2        16  post, pre  Conv2d, ReLU
         3        24  post, pre  Flatten, Linear, ReLU
  predictors: cls_score (5 channels), bbox_pred (20 channels)
position unless given: the last that leaves the teacher's tower a block"""


def test_both_parts_of_a_detector_of_two_stages():
    assert describe(tiny_faster_rcnn(v2=True)) == FASTER_RCNN_TABLE
    lines = describe(tiny_faster_rcnn()).splitlines()
    assert lines[2] == "branch rpn: 1 blocks, shared by all levels, valid positions 0 to 1"
    assert lines[-4:-2] == [
        "         1        24  post, pre  Flatten, Linear, ReLU",
        "         2        24  post, pre  Linear, ReLU",
    ]


def test_head_without_towers():
    text = describe(tiny_retinanet(blocks=0))
    assert "branch regression: 0 blocks, shared by all levels, valid positions 0 to 0" in text


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(8, 4, 3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.convolution(features).sigmoid()


@dataclass
class PerLevelAdapter:
    """An adapter of a user's own, for a head with a tower a level."""

    recipe: HeadRecipe = GFL

    def branches(self, detector: nn.Module) -> tuple[Branch, ...]:
        towers = (Tower.of([Gate()], "first"), Tower.of([Gate(), nn.Conv2d(4, 6, 1), nn.ReLU()], "second"))
        return (Branch("sides", towers, {"bins": nn.Identity()}),)


def test_towers_of_each_level_and_an_adapter_of_ones_own():
    lines = describe(nn.Linear(2, 2), PerLevelAdapter()).splitlines()
    assert lines == [
        "Linear (settings: GFL)",
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
        "position unless given: 3",
    ]


def test_error_unknown_detector():
    with pytest.raises(TypeError, match="no adapter understands Linear"):
        describe(nn.Linear(2, 2))


def test_error_tower_that_cannot_be_split():
    detector = tiny_retinanet()
    detector.head.regression_head.conv = nn.Sequential(nn.ReLU(), nn.Conv2d(32, 32, 3))
    with pytest.raises(ValueError, match="regression tower starts with ReLU"):
        describe(detector)
