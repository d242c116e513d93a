"""CWD on feature maps and on class logits."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator

from crosskd import CWD, CrossKD, Distiller
from crosskd.adapters import Anchors
from crosskd.methods.cwd import class_maps
from crosskd.predictions import Predictions
from tests.helpers.slow_crosskd import float64_batch
from tests.helpers.steps import PlainHead, make_pair, make_predictions, make_side
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet
from tests.helpers.two_stages import tiny_faster_rcnn


def plain_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The loss of one level (batch, channels, locations), channel by channel."""
    total = student.new_zeros(())
    for image in range(student.shape[0]):
        for channel in range(student.shape[1]):
            ours, theirs = ((x[image, channel] / temperature).exp() for x in (student, teacher))
            ours, theirs = ours / ours.sum(), theirs / theirs.sum()
            total = total + (theirs * (theirs / ours).log()).sum()
    return temperature**2 * total / (student.shape[0] * student.shape[1])


def pyramid(detector: nn.Module, images: list[Tensor]) -> list[Tensor]:
    return list(detector.backbone(detector.transform(images)[0].tensors).values())


def class_logits(detector: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    """What torchvision's own layers answer, (batch, anchors x classes, height, width) per level."""
    head = detector.head.classification_head
    return [head.cls_logits(head.conv(of_level)) for of_level in maps]


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "weight", "normalize"),
    [
        ({}, 10, False),
        ({"temperature": 4.0}, 10, False),
        ({"normalize": True}, 1, True),
        ({"weight": 0.5, "levels": (1,)}, 0.5, False),
    ],
)
def test_feature_maps_of_a_whole_detector(settings, weight, normalize):
    teacher, student = tiny_fcos(seed=1).double().eval(), tiny_retinanet(seed=2).double()
    images, targets = float64_batch()
    distiller = Distiller(teacher, student, CWD(**settings))
    loss = distiller(images, targets)["kd_cwd"]

    def scaled(feature_map: Tensor) -> Tensor:
        if not normalize:
            return feature_map.flatten(2)
        channels = feature_map.transpose(0, 1).flatten(1)
        mean, std = channels.mean(dim=1), channels.std(dim=1)
        return ((feature_map - mean[:, None, None]) / (std[:, None, None] + 1e-6)).flatten(2)

    expected = torch.zeros((), dtype=torch.float64)
    ours, theirs = pyramid(student, images), pyramid(teacher, images)
    for level in settings.get("levels", range(3)):
        expected = expected + plain_kl(
            scaled(ours[level]), scaled(theirs[level].detach()), settings.get("temperature", 1.0)
        )
    torch.testing.assert_close(loss, weight * expected, rtol=1e-9, atol=0)
    stem = student.backbone.stem[0][0].weight
    found, wanted = (torch.autograd.grad(of, stem)[0] for of in (loss, weight * expected))
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9 * wanted.abs().max().item())


@pytest.mark.parametrize("build", [tiny_retinanet, tiny_fcos], ids=["retinanet", "fcos"])
@pytest.mark.parametrize("levels", [None, (0, 2)])
def test_class_logits_of_a_whole_detector(build, levels):
    teacher, student = build(seed=1).double().eval(), build(seed=2).double()
    images, targets = float64_batch()
    method = CWD(on="logits", temperature=2.0, levels=levels)
    losses = Distiller(teacher, student, method)(images, targets)
    assert set(losses) - {"kd_cwd_logits"} >= {"classification", "bbox_regression"}
    logits = [class_logits(detector, pyramid(detector, images)) for detector in (student, teacher)]
    expected = torch.zeros((), dtype=torch.float64)
    for level in levels or range(3):
        ours, theirs = (of_side[level].flatten(2) for of_side in logits)
        expected = expected + 5 * plain_kl(ours, theirs.detach(), 2.0)
    torch.testing.assert_close(losses["kd_cwd_logits"], expected, rtol=1e-9, atol=0)
    weight = student.head.classification_head.cls_logits.weight
    found, wanted = (torch.autograd.grad(of, weight)[0] for of in (losses["kd_cwd_logits"], expected))
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9 * wanted.abs().max().item())


def test_rows_of_logits_become_maps():
    """Each row holds a number of its own: its anchor, class and place are those of the map."""
    sizes, per_location, classes = ((2, 3), (1, 2)), 2, 4
    maps = [torch.randn(2, per_location * classes, *size) for size in sizes]
    rows = []
    for of_level in maps:
        for y in range(of_level.shape[2]):
            for x in range(of_level.shape[3]):
                for anchor in range(per_location):
                    rows.append(of_level[:, anchor * classes : (anchor + 1) * classes, y, x])
    logits = torch.stack(rows, dim=1)
    predictions = Predictions(logits, torch.zeros(2, logits.shape[1], 4), None)
    found = class_maps(predictions, Anchors(None, (12, 4), sizes=sizes))
    for ours, expected in zip(found, maps, strict=True):
        assert torch.equal(ours, expected)


def test_one_anchor_a_location_is_enough_for_logits():
    """An FCOS of one head type teaches another head type's grid of points."""
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    teacher, student = tiny_fcos(seed=1), tiny_retinanet(seed=2, anchor_generator=anchors)
    losses = Distiller(teacher, student, CWD(on="logits"))(*tiny_batch())
    assert losses["kd_cwd_logits"] > 0


# -- what a batch may lack ------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["maps", "logits"])
def test_unlabelled_images_and_images_without_objects(on):
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), CWD(on=on))
    images, targets = tiny_batch()
    key = "kd_cwd" if on == "maps" else "kd_cwd_logits"
    labelled = distiller(images, targets)[key]
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)} for _ in targets]
    assert torch.equal(distiller(images, empty)[key], labelled)
    assert torch.equal(distiller(images)[key], labelled)


def test_projections_belong_to_the_distiller_and_get_gradients():
    student = tiny_retinanet(width=32, seed=2)
    distiller = Distiller(tiny_fcos(width=64, seed=1), student, CWD())
    added = {key for key in distiller.state_dict() if not key.startswith("student.")}
    assert len(added) == 6
    assert not any("projection" in key for key in student.state_dict())
    distiller(*tiny_batch())["kd_cwd"].backward()
    assert all(p.grad is not None for p in distiller.methods["cwd"].parameters())


# -- what must agree ------------------------------------------------------------------------------


def test_logits_beside_crosskd_give_a_warning_and_maps_none():
    with pytest.warns(UserWarning, match="pulls the student's own predictions"):
        Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), [CrossKD(), CWD(on="logits")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), [CrossKD(), CWD()])


def test_both_kinds_compose():
    methods = [CWD(5.0), CWD(5.0, on="logits")]
    losses = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), methods)(*tiny_batch())
    assert {"kd_cwd", "kd_cwd_logits"} <= set(losses)


def test_a_two_stage_detector_is_distilled_at_its_first():
    teacher, student = tiny_faster_rcnn(seed=1), tiny_faster_rcnn(seed=2)
    with pytest.raises(ValueError, match=r'box head answers for regions.*head="rpn".*on="maps"'):
        Distiller(teacher, student, CWD(on="logits"))
    losses = Distiller(teacher, student, CWD(on="logits", head="rpn"))(*tiny_batch(first_label=1))
    assert losses["kd_rpn_cwd_logits"] > 0


def test_error_other_anchors():
    images, targets = tiny_batch()
    with pytest.raises(ValueError, match=r"\[1, 1, 1\] \(teacher\), \[3, 3, 3\] \(student\).*on=\"maps\""):
        Distiller(tiny_fcos(seed=1), tiny_retinanet(seed=2), CWD(on="logits"))(images, targets)
    anchors = AnchorGenerator(((9,), (18,), (36,)), ((0.5, 1.0, 2.0),) * 3)
    teacher = tiny_retinanet(seed=1, anchor_generator=anchors)
    with pytest.raises(ValueError, match="the anchors differ on the first batch"):
        Distiller(teacher, tiny_retinanet(seed=2), CWD(on="logits"))(images, targets)


def test_error_other_classes_or_kinds():
    with pytest.raises(ValueError, match="predicts 3 classes and the student 4: give class_map="):
        Distiller(tiny_retinanet(3, seed=1), tiny_retinanet(4, seed=2), CWD(on="logits"))
    with pytest.raises(ValueError, match="a softmax whose class 0 is no object"):
        CWD(on="logits").setup(make_pair(PlainHead(background=0), PlainHead()))
    with pytest.raises(ValueError, match="a set of queries"):
        CWD(on="logits").setup(make_pair(PlainHead(rows="queries"), PlainHead(rows="queries")))


def test_error_levels_of_unknown_size():
    predictions = make_predictions()
    side = make_side(predictions, anchors=Anchors(None, (6,)))
    step = type("AStep", (), {"student": side, "teacher": side})()
    with pytest.raises(ValueError, match=r"size of its levels.*sizes="):
        CWD(on="logits").check(step)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, "weight must be above 0, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": math.nan}, "temperature must be above 0, got nan"),
        ({"on": "boxes"}, 'on must be "maps" or "logits", got \'boxes\''),
        ({"head": "rpn"}, "head='rpn' chooses whose logits"),
        ({"on": "logits", "resize": True}, "resize_levels=True"),
        ({"levels": ()}, "levels is empty"),
    ],
)
def test_error_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CWD(**settings)


def test_settings_by_what_is_compared():
    maps, logits = CWD(), CWD(on="logits")
    assert (maps.requires, maps.teaches, maps.loss_names()) == ({"maps"}, "features", ("kd_cwd",))
    assert (logits.requires, logits.teaches) == ({"predictions"}, "predictions")
    assert logits.loss_names() == ("kd_cwd_logits",)
    assert CWD.teaches == "features"
    assert [m.weight_for("GFL") for m in (maps, logits, CWD(normalize=True))] == [10, 5, 1]
