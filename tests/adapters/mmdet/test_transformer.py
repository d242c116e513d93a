"""The adapter on mmdet's Deformable DETR and DINO, with random weights."""

from __future__ import annotations

import pytest
import torch

from crosskd import PKD, DecoderCrossKD, Distiller, MatchedQueries, QueryDistillation
from crosskd.adapters import find_adapter
from crosskd.adapters.base import DecoderHead
from crosskd.testing import check_adapter
from tests.helpers.conformance import only
from tests.helpers.mmdet_detr import batch_of, detector_of

pytestmark = pytest.mark.mmdet
KINDS = {"deformable_detr": "points and position embeddings", "dino": "boxes"}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_own_losses_are_mmdets_to_the_bit_with_denoising(kind):
    alone = detector_of(kind).train()
    distiller = Distiller(detector_of(kind, seed=1), detector_of(kind), PKD(), prove=False).train()
    torch.manual_seed(0)
    losses = distiller(*batch_of())
    torch.manual_seed(0)
    expected = alone.parse_losses(alone.loss(*batch_of()))[1]
    expected.pop("loss")
    assert {name for name in losses if not name.startswith("kd_")} == expected.keys()
    assert ("dn_loss_cls" in losses) == (kind == "dino")
    for name, loss in expected.items():
        assert torch.equal(losses[name].detach(), loss), name


@pytest.mark.parametrize("method", [QueryDistillation, DecoderCrossKD, MatchedQueries])
def test_methods_of_queries(kind, method):
    teacher = detector_of(kind, 64, seed=1, layers=3, queries=12)
    distiller = Distiller(teacher, detector_of(kind), method()).train()
    head = distiller.student_adapter.heads[0]
    assert isinstance(head, DecoderHead)
    assert head.kind == KINDS[kind]
    losses = distiller(*batch_of())
    assert all(losses[name] > 0 for name in ("kd_cls", "kd_l1", "kd_giou"))
    sum(losses.values()).backward()
    assert set(distiller(batch_of()[0])) == {"kd_cls", "kd_l1", "kd_giou"}  # without targets


def test_the_kits_checks_of_decoders(kind):
    checks = only("structure", "same path", "shared queries", "queries permuted", "own teacher")
    pair = {"teacher": detector_of(kind, seed=1), "student": detector_of(kind)}
    report = check_adapter(find_adapter, *batch_of(), **pair, method=QueryDistillation(), skip=checks)
    assert len(report.passed) == 5


def test_other_detectors_are_refused():
    from crosskd.adapters.mmdet import MMDetTransformer

    with pytest.raises(TypeError, match="Linear is neither"):
        MMDetTransformer(torch.nn.Linear(2, 2))
    settings = detector_of("dino")
    del settings.bbox_head.assigner
    with pytest.raises(ValueError, match="without a train_cfg"):
        find_adapter(settings).prepare(*batch_of())
