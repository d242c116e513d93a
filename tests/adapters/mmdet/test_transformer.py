"""The adapter on mmdet's Deformable DETR and DINO, with random weights."""

from __future__ import annotations

import pytest
import torch

from crosskd import PKD, Distiller, QueryDistillation
from crosskd.adapters import find_adapter
from crosskd.adapters.base import DecoderHead
from crosskd.diagnostics.decoder_checks import DECODER_CHECKS
from crosskd.testing import check_adapter
from tests.helpers.conformance import only
from tests.helpers.detr import detector_of as of_transformers
from tests.helpers.detr import methods_of_queries
from tests.helpers.mmdet_detr import batch_of, detector_of
from tests.helpers.mmdet_heads import CLASSES

pytestmark = pytest.mark.mmdet
KINDS = {"deformable_detr": "points and position embeddings", "dino": "boxes"}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_own_losses_are_mmdets_to_the_bit_with_denoising(kind):
    alone = detector_of(kind).train()
    distiller = Distiller(detector_of(kind, seed=1), detector_of(kind), PKD()).train()
    torch.manual_seed(0)
    for images, samples in (batch_of(), (batch_of()[0], [without_objects(each) for each in batch_of()[1]])):
        torch.manual_seed(0)
        losses = distiller(images, samples)
        torch.manual_seed(0)
        expected = alone.parse_losses(alone.loss(images, samples))[1]
        expected.pop("loss")
        assert {name for name in losses if not name.startswith("kd_")} == expected.keys()
        assert ("dn_loss_cls" in losses) == (kind == "dino")
        for name, loss in expected.items():
            assert torch.equal(losses[name].detach(), loss), name


def test_what_it_reads_off(kind):
    head = find_adapter(detector_of(kind, queries=11)).heads[0]
    assert isinstance(head, DecoderHead)
    assert (head.kind, head.num_queries, head.num_layers) == (KINDS[kind], 11, 2)
    assert head.width == (256 if kind == "dino" else 32)


@pytest.mark.filterwarnings("ignore:.*pulls the student's own predictions")
def test_the_kits_checks(kind):
    names = DECODER_CHECKS.keys()
    pair = {"teacher": detector_of(kind, 64, seed=1, layers=3, queries=12), "student": detector_of(kind)}
    methods = methods_of_queries()
    report = check_adapter(find_adapter, *batch_of(), **pair, method=methods, skip=only(*names))
    assert set(report.passed) == set(names)


def without_objects(sample):
    sample = sample.clone()
    sample.gt_instances = sample.gt_instances[:0]
    return sample


@pytest.mark.transformers
def test_a_pair_with_transformers_must_see_no_padding():
    """There boxes are shares of the padded batch, here of each image."""
    teacher = of_transformers("rt_detr", num_labels=CLASSES)
    distiller = Distiller(teacher, detector_of("dino"), QueryDistillation(general=5), prove=False).train()
    images, samples = batch_of()
    assert distiller(images, samples)["kd_l1"] > 0
    samples[1].set_metainfo({"img_shape": (64, 48)})
    with pytest.raises(
        ValueError, match=r"\(64, 64\) for an image of \(64, 48\) .*\(64, 48\) for \(64, 48\)"
    ):
        distiller(images, samples)


def test_a_dino_of_another_width_than_mmdet_knows():
    narrow = detector_of("dino")
    narrow.embed_dims = 128
    with pytest.raises(ValueError, match="width of 128.*embed_dims=256"):
        find_adapter(narrow)


def test_other_detectors_are_refused():
    from crosskd.adapters.mmdet import MMDetTransformer

    with pytest.raises(TypeError, match="Linear is neither"):
        MMDetTransformer(torch.nn.Linear(2, 2))
    settings = detector_of("dino")
    del settings.bbox_head.assigner
    with pytest.raises(ValueError, match="without a train_cfg"):
        find_adapter(settings).prepare(*batch_of())
