"""NanoDet-g in plain PyTorch: what it finds, and that ``generic`` takes it apart without changing it."""

from __future__ import annotations

import copy

import pytest
import torch
from backbones import build_backbone
from coco_data import CocoFolder
from dense_heads import GFL, adapter_of
from evaluation import evaluate
from nanodet import NANODET, NanoBackbone, NanoDet, load_nanodet

from crosskd import LD, PKD, CrossKD, Distiller, PredictionMimicking
from crosskd.step import run_head
from tests.helpers.reference_files import data_path
from tests.helpers.tiny import TinyBackbone, tiny_batch

BOTH = {"kd_cls", "kd_reg"}


def small(classes: int = 5, seed: int = 0, *, width: int = 32, **options) -> NanoDet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"group_norm": True, "min_size": 64, "max_size": 128, **options}
        detector = NanoDet(TinyBackbone(width, 8, batch_norm=False), classes, **options)
        for predictor in detector.head.predictors:
            torch.nn.init.normal_(predictor.weight, std=0.1)
    return detector


def test_the_adapter_predicts_what_the_detector_predicts():
    detector = small().eval()
    adapter = NANODET(detector)
    images, _ = tiny_batch(2)
    batch = adapter.prepare(images, None)
    maps = adapter.maps(batch.pixels)
    assert [each.shape[-1] * stride for each, stride in zip(maps, adapter.strides, strict=True)] == [
        batch.pixels.shape[-1]
    ] * 3
    run = run_head(adapter.head, maps, range(3))
    own = detector.head(maps)
    torch.testing.assert_close(run.predictions.logits, own.logits, rtol=0, atol=0)
    torch.testing.assert_close(run.predictions.regression, own.regression, rtol=0, atol=0)
    anchors = adapter.head.anchors(batch, maps)
    assert anchors.boxes[0].tolist() == [-16.0, -16.0, 24.0, 24.0]  # 40 pixels around (4, 4)
    assert anchors.per_level == tuple(each.shape[-1] * each.shape[-2] for each in maps)


@pytest.mark.parametrize("method", [CrossKD(position=1), CrossKD(position=0), PredictionMimicking(), LD()])
def test_one_class_of_the_teachers_is_distilled_beside_the_students_own_losses(method):
    student = small(classes=1, seed=1)
    images, targets = tiny_batch(2, num_classes=1)
    alone = copy.deepcopy(student)(images, copy.deepcopy(targets))
    distiller = Distiller(small(), student, method, NANODET, class_map=[3])
    losses = distiller(images, targets)
    for name, loss in alone.items():
        torch.testing.assert_close(losses[name], loss, rtol=0, atol=0)
    added = losses.keys() - alone.keys()
    assert added
    sum(losses[name] for name in added).backward()
    moved = [p for p in student.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert moved


def test_a_gfl_learns_from_its_maps_and_from_unlabelled_images():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        student = GFL(TinyBackbone(32, 8, batch_norm=False), 2, strides=(8, 16, 32), min_size=64)
    distiller = Distiller(small(), student, PKD(), adapter_of, teacher_adapter=NANODET)
    assert distiller(tiny_batch(2)[0]).keys() == {"kd_pkd"}
    distiller = Distiller(small(), small(classes=2, seed=1), CrossKD(position=1), NANODET, class_map=[0, 4])
    assert distiller(tiny_batch(2)[0]).keys() == BOTH


def test_a_file_of_another_network_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_nanodet(tmp_path / "nowhere.pt")
    state = NanoBackbone().state_dict()
    torch.save(state, tmp_path / "backbone.pt")
    with pytest.raises(ValueError, match="head.predictors.0.bias"):
        load_nanodet(tmp_path / "backbone.pt")


def test_a_student_on_a_backbone_of_three_levels():
    backbone = build_backbone("mobilenet_v2", False, 32, levels=3)
    detector = NanoDet(backbone, 1, group_norm=True, min_size=64).train()
    losses = detector(*tiny_batch(2, num_classes=1))
    assert losses.keys() == {"classification", "bbox_regression", "distribution"}


@pytest.mark.slow
def test_its_ap_on_persons():
    """33.1 was measured elsewhere with another preparation of the images."""
    detector = load_nanodet(data_path("weights/nanodet_g_fp16.pt"), min_size=256)
    folder = data_path("coco_person")
    data = CocoFolder(folder / "images", folder / "annotations" / "test.json")
    metrics = evaluate(detector, data, batch_size=1, device=torch.device("cpu"))
    assert abs(metrics["AP"] - 33.1) < 0.4
