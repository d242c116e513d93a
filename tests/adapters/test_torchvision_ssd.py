"""The adapter for torchvision's SSD and SSDlite: rows, losses, pairs, and what is refused."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import ssd300_vgg16, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD, SSDClassificationHead, SSDHead
from torchvision.ops import box_iou

import crosskd
from crosskd import CrossKD, Distiller, PredictionMimicking
from crosskd.adapters import LevelPairs, TorchvisionSSDAdapter, find_adapter
from crosskd.adapters.torchvision import Locations
from crosskd.losses import giou_loss, softmax_focal_loss
from crosskd.methods import Step
from crosskd.predictions import join_levels
from tests.conformance import assert_green
from tests.helpers.tiny import tiny_batch, tiny_retinanet, tiny_ssd

ADAPTER = TorchvisionSSDAdapter()
WIDER = (32, 24, 16)
TO_ONE_LOCATION = (8, 8, 8, 8)
heads = pytest.mark.parametrize("lite", [False, True], ids=["ssd", "ssdlite"])


def batch(images: int = 2, **options: Any) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    return tiny_batch(images, first_label=1, **options)


def without_objects() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images, targets = batch()
    return images, [{name: values[:0] for name, values in target.items()} for target in targets]


def watched(distiller: Distiller, images: Any, targets: Any = None) -> tuple[dict[str, Tensor], Step]:
    """A step's losses, and what the method saw."""
    seen: list[Step] = []
    (method,) = distiller.methods.values()
    method.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    return distiller(images, targets), seen[0]


def assert_reaches_the_student(distiller: Distiller, losses: dict[str, Tensor]) -> None:
    assert all(loss.isfinite() for loss in losses.values())
    assert min(losses["kd_cls"], losses["kd_reg"]) > 0
    (losses["kd_cls"] + losses["kd_reg"]).backward()
    gradients = [p.grad for p in distiller.student.backbone.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


# -- the conformance kit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "student", "position"),
    [(False, False, None), (True, True, None), (True, True, 1), (False, True, None), (True, False, None)],
    ids=["ssd", "ssdlite", "ssdlite after its block", "ssd teaches ssdlite", "ssdlite teaches ssd"],
)
def test_it_is_green(teacher, student, position):
    assert_green(
        ADAPTER,
        *batch(),
        teacher=tiny_ssd(widths=WIDER, lite=teacher, batch_norm=True),
        student=tiny_ssd(lite=student, batch_norm=True, seed=1),
        method=CrossKD(position=position),
    )


# -- what it says of a detector --------------------------------------------------------------------


def test_it_is_found():
    assert isinstance(find_adapter(tiny_ssd(), tiny_ssd(lite=True)), TorchvisionSSDAdapter)
    with pytest.raises(ValueError, match=r"torchvision's SSD \(teacher\), torchvision's RetinaNet"):
        find_adapter(tiny_ssd(), tiny_retinanet())


@heads
def test_classes_count_the_background_and_strides_are_of_its_own_size(lite):
    detector = tiny_ssd(5, lite=lite, side=72)  # levels of 9, 5 and 3 locations
    assert ADAPTER.num_classes(detector) == 5
    assert ADAPTER.strides(detector) == [8, 72 / 5, 24]


def test_strides_of_images_that_are_wider_than_high():
    detector = tiny_ssd()
    detector.transform.fixed_size = (72, 64)
    assert ADAPTER.strides(detector) == [8, 72 / 5, 24]
    detector.transform.fixed_size = None
    assert ADAPTER.strides(detector) is None


def test_an_ssds_towers_have_no_block():
    for branch, head in zip(ADAPTER.branches(tiny_ssd()), ("classification", "regression"), strict=True):
        assert branch.name == head
        assert [(len(tower.blocks), tower.width_in) for tower in branch.towers] == [(0, 16), (0, 24), (0, 8)]
        assert list(branch.predictors) == ["module_list.0", "module_list.1", "module_list.2"]
        assert [p.in_channels for p in branch.predictors.values()] == [16, 24, 8]
    with pytest.raises(ValueError, match="position 1 does not fit the classification tower of level 0 of 0"):
        Distiller(tiny_ssd(), tiny_ssd(seed=1), CrossKD(position=1))


def test_an_ssdlites_towers_have_one(capsys):
    detector = tiny_ssd(lite=True)
    for branch in ADAPTER.branches(detector):
        assert [(len(t.blocks), t.width_in, t.width(1)) for t in branch.towers] == [
            (1, 16, 16),
            (1, 24, 24),
            (1, 8, 8),
        ]
        assert list(branch.predictors) == ["module_list.0.1", "module_list.1.1", "module_list.2.1"]
    text = crosskd.describe(detector)
    assert "branch regression: 1 blocks, level 2, valid positions 0 to 1" in text
    assert "1        16  post, pre  Conv2d, BatchNorm2d, ReLU6" in text


@heads
def test_predictions_are_the_heads_own(lite):
    detector = tiny_ssd(lite=lite, widths=TO_ONE_LOCATION).eval()
    maps = ADAPTER.features(detector, torch.rand(2, 3, 64, 64))
    branches = ADAPTER.branches(detector)
    found = join_levels(
        ADAPTER.predict(detector, level, {b.name: b.tower(level).run(m, ())[0] for b in branches})
        for level, m in enumerate(maps)
    )
    own = detector.head(maps)
    assert torch.equal(found.logits, own["cls_logits"])
    assert torch.equal(found.regression, own["bbox_regression"])
    assert found.background == 0
    assert found.logits.shape[1] == 4 * 8 * 8 + 6 * 4 * 4 + 4 * 2 * 2 + 4


def test_anchors_are_told_by_level():
    student = tiny_ssd()
    inputs = ADAPTER.prepare(student, student, batch()[0], None)
    locations = ADAPTER.locations(student, inputs, ADAPTER.features(student, inputs.student_pixels))
    assert locations.level_sizes == [64, 16, 4]
    assert locations.per_location == [4, 6, 4]
    anchors = locations.anchors[1]
    assert torch.equal(locations.of_levels(1, LevelPairs((1, 2))), anchors[4 * 64 :])
    assert torch.equal(locations.of_levels(1, LevelPairs((1,))), anchors[4 * 64 : 4 * 64 + 6 * 16])
    with_as_many = Locations([anchors[:84]], [64, 16, 4])
    assert torch.equal(with_as_many.of_levels(0, LevelPairs((0, 2))), anchors[[*range(64), *range(80, 84)]])


def test_boxes_are_those_that_it_detects():
    """With no threshold and no suppression the detections of one class are all decoded boxes."""
    detector = tiny_ssd(score_thresh=0.0, nms_thresh=1.0, detections_per_img=10_000).eval()
    detector.topk_candidates = 10_000
    with torch.no_grad():
        inputs = ADAPTER.prepare(detector, detector, batch(1)[0], None)
        maps = ADAPTER.features(detector, inputs.student_pixels)
        outputs = detector.head(maps)
        predictions = join_levels(
            ADAPTER.predict(detector, level, {"classification": m, "regression": m})
            for level, m in enumerate(maps)
        )
        boxes = ADAPTER.decode(detector, predictions, ADAPTER.locations(detector, inputs, maps))
        (found,) = detector(batch(1)[0])
    own = found["boxes"][found["labels"] == 2]
    order = outputs["cls_logits"][0].softmax(-1)[:, 2].argsort(descending=True)
    torch.testing.assert_close(own, boxes[0, order].clamp(0, 64), rtol=1e-5, atol=1e-4)


# -- one step --------------------------------------------------------------------------------------


@heads
@pytest.mark.parametrize("make", [batch, without_objects], ids=["objects", "none"])
def test_own_losses_and_statistics_are_those_of_plain_training(lite, make):
    student = tiny_ssd(lite=lite, batch_norm=True, seed=1)
    plain = copy.deepcopy(student).train()
    expected = plain(*make())
    sum(expected.values()).backward()
    losses = Distiller(tiny_ssd(widths=WIDER, lite=lite), student, CrossKD())(*make())
    assert losses.keys() == {"bbox_regression", "classification", "kd_cls", "kd_reg"}
    own = {name: losses[name] for name in expected}
    assert all(torch.equal(own[name], loss) for name, loss in expected.items())
    sum(own.values()).backward()
    for (name, ours), theirs in zip(student.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
    for (name, ours), theirs in zip(student.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


class Halves(SSD):
    """Counts boxes half, and each object's first anchor alone."""

    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
        losses = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        return {**losses, "bbox_regression": losses["bbox_regression"] / 2}


def test_a_subclass_computes_its_losses_itself():
    student = tiny_ssd(kind=Halves, seed=1)
    expected = copy.deepcopy(student).train()(*batch())
    plain = copy.deepcopy(tiny_ssd(seed=1)).train()(*batch())
    losses = Distiller(tiny_ssd(), student, CrossKD())(*batch())
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
    assert losses["bbox_regression"] == plain["bbox_regression"] / 2 > 0
    assert "compute_loss" not in vars(student)


def test_the_assignment_is_its_own():
    images, targets = batch()
    targets[1] = {name: values[:0] for name, values in targets[1].items()}
    student = tiny_ssd(seed=1)
    _, step = watched(Distiller(tiny_ssd(), student, CrossKD()), images, targets)
    inputs = ADAPTER.prepare(student, student, images, targets)
    anchors = ADAPTER.locations(student, inputs, ADAPTER.features(student, inputs.student_pixels)).anchors
    positive = student.proposal_matcher(box_iou(inputs.targets[0]["boxes"], anchors[0])) >= 0
    assert positive.sum() > 1
    assert torch.equal(step.assignment.positive[0], positive)
    assert not step.assignment.positive[1].any()
    assert step.assignment.counted is None
    assert step.assignment.normalizer == positive.sum()


def test_without_objects_it_is_normalised_by_one():
    _, step = watched(Distiller(tiny_ssd(), tiny_ssd(seed=1), CrossKD()), *without_objects())
    assert step.assignment.normalizer == 1
    assert not step.assignment.positive.any()


@heads
def test_distillation_losses_are_the_formulas(lite):
    teacher, student = tiny_ssd(lite=lite), tiny_ssd(lite=lite, seed=1)
    distiller = Distiller(teacher, student, CrossKD())
    losses, step = watched(distiller, *batch())
    (method,) = distiller.methods.values()
    crossed, positives = method.cross_head(step), step.assignment.positive.sum()
    cls = softmax_focal_loss(crossed.logits, step.teacher.logits, normalizer=positives)
    sure = step.teacher.logits.softmax(-1)[..., 1:].amax(-1)
    reg = giou_loss(step.boxes(crossed), step.boxes(step.teacher), weight=sure, normalizer=positives)
    torch.testing.assert_close(losses["kd_cls"], cls)
    torch.testing.assert_close(losses["kd_reg"], reg)


def test_unlabelled_images_and_prediction_mimicking():
    teacher, student = tiny_ssd(), tiny_ssd(seed=1)
    losses = Distiller(teacher, student, CrossKD())(batch()[0])
    assert losses.keys() == {"kd_cls", "kd_reg"}
    distiller = Distiller(teacher, student, PredictionMimicking())
    assert_reaches_the_student(distiller, distiller(*batch()))


def test_in_eval_the_student_answers_alone():
    student = tiny_ssd(seed=1)
    distiller = Distiller(tiny_ssd(), student, CrossKD()).eval()
    with torch.no_grad():
        found, expected = distiller(batch()[0]), student(batch()[0])
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ("boxes", "labels", "scores"))


@pytest.mark.parametrize("images", [1, 2])
def test_a_level_of_one_location(images):
    """With one image its features have no deviation: they become the teacher's, and get no gradient."""
    teacher, student = tiny_ssd(widths=TO_ONE_LOCATION), tiny_ssd(widths=TO_ONE_LOCATION, seed=1)
    distiller = Distiller(teacher, student, CrossKD())
    losses, step = watched(distiller, *batch(images))
    assert step.student.logits.shape[1] == 4 * 64 + 6 * 16 + 4 * 4 + 4
    (method,) = distiller.methods.values()
    crossed = method.cross_head(step)
    torch.testing.assert_close(crossed.logits[:, -4:], step.teacher.logits[:, -4:]) if images == 1 else None
    assert_reaches_the_student(distiller, losses)
    coarsest = student.backbone.laterals[-1].weight.grad
    assert bool(coarsest.any()) is (images > 1)


def test_labels_that_mean_the_background_are_refused():
    images, targets = batch()
    targets[0]["labels"][1] = 0
    with pytest.raises(ValueError, match=r"labelled 1 to 3 \(0 is the background\)"):
        Distiller(tiny_ssd(), tiny_ssd(seed=1), CrossKD())(images, targets)


# -- pairs -----------------------------------------------------------------------------------------


def test_each_level_whose_width_differs_gets_its_projections(caplog):
    with caplog.at_level(logging.INFO, logger="crosskd"):
        distiller = Distiller(tiny_ssd(widths=WIDER), tiny_ssd(seed=1), CrossKD())
    projections = distiller.methods["crosskd"].projections
    widths = {name: (p.student_width, p.teacher_width) for name, p in projections.items()}
    assert widths == {
        f"{branch}_level{level}": pair
        for branch in ("classification", "regression")
        for level, pair in ((0, (16, 32)), (2, (8, 16)))
    }
    assert len(caplog.records) == 4
    losses = distiller(*batch())
    assert_reaches_the_student(distiller, losses)
    assert all(p.convolution.weight.grad.any() for p in projections.values())


def from_stride_16(detector: SSD) -> SSD:
    """The same detector without its finest level."""
    detector.backbone.stem.append(detector.backbone.stages[0])
    del detector.backbone.stages[0], detector.backbone.laterals[0]
    for branch in (detector.head.classification_head, detector.head.regression_head):
        del branch.module_list[0]
    anchors = detector.anchor_generator
    detector.anchor_generator = DefaultBoxGenerator(anchors.aspect_ratios[1:], scales=anchors.scales[1:])
    return detector


def test_a_student_without_the_finest_level():
    whole = Distiller(tiny_ssd(), tiny_ssd(seed=1), CrossKD())
    _, expected = watched(whole, *batch())
    distiller = Distiller(tiny_ssd(), from_stride_16(tiny_ssd(seed=1)), CrossKD())
    losses, step = watched(distiller, *batch())
    assert_reaches_the_student(distiller, losses)
    for name in ("logits", "regression"):
        ours, all_levels = (getattr(s.teacher, name) for s in (step, expected))
        assert torch.equal(ours, all_levels[:, 4 * 64 :])


def test_a_teacher_of_more_classes():
    teacher, student = tiny_ssd(6), tiny_ssd(3, seed=1)
    distiller = Distiller(teacher, student, CrossKD(), class_map=[0, 5, 2])
    losses, step = watched(distiller, *batch(num_classes=3))
    assert step.teacher.background == 0
    with torch.no_grad():
        inputs = ADAPTER.prepare(teacher, student, batch()[0], None)
        own = teacher.head(ADAPTER.features(teacher, inputs.teacher_pixels))["cls_logits"]
    assert torch.equal(step.teacher.logits[..., 1:], own[..., [5, 2]])
    # Of its other classes the student is to see no object.
    torch.testing.assert_close(step.teacher.probabilities()[..., 1:], own.softmax(-1)[..., [5, 2]])
    assert_reaches_the_student(distiller, losses)
    with pytest.raises(ValueError, match="class_map=, the"):
        Distiller(teacher, student, CrossKD())
    with pytest.raises(ValueError, match=r"class 0 means no object.*class_map\[0\] = 0; got \[1, 0, 2\]"):
        Distiller(teacher, student, CrossKD(), class_map=[1, 0, 2])


def as_they_are(images: Any, targets: Any) -> Any:
    return images


@pytest.mark.parametrize("resize", [False, True], ids=["coarser strides", "resized levels"])
def test_a_teacher_for_larger_images_has_a_view_of_its_own(resize):
    """Anchors are shares of the image: the same ones at twice the size."""
    teacher, student = tiny_ssd(side=128), tiny_ssd(seed=1)
    if not resize:
        teacher.backbone.stem[0][0].stride = (4, 4)
    options = {"teacher_view": as_they_are, "resize_levels": resize}
    distiller = Distiller(teacher, student, CrossKD(), **options)
    losses, step = watched(distiller, *batch())
    assert step.teacher.logits.shape == step.student.logits.shape
    assert_reaches_the_student(distiller, losses)


def refused(teacher: nn.Module, student: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distiller(teacher, student, CrossKD())


def test_error_sizes():
    message = r"images are resized to 128 x 128 pixels \(teacher\), 64 x 64 pixels \(student\).*teacher_view="
    refused(tiny_ssd(side=128), tiny_ssd(), message)
    # Levels of 9, 5 and 3 locations: strides that differ are told first.
    refused(tiny_ssd(side=72), tiny_ssd(), "strides differ: .* and for images of one size where they resize")
    anyhow = tiny_ssd()
    anyhow.transform.fixed_size = None
    refused(anyhow, tiny_ssd(), r"resized to no fixed size \(teacher\), 64 x 64")


def generator(**options: Any) -> DefaultBoxGenerator:
    return DefaultBoxGenerator(options.pop("ratios", [[2], [2, 3], [2]]), **{"min_ratio": 0.25, **options})


@pytest.mark.parametrize(
    ("theirs", "ours", "name"),
    [
        ({"ratios": [[2], [2, 4], [2]]}, {}, "aspect_ratios"),
        ({"min_ratio": 0.2}, {}, "scales"),
        # The scale behind the last level's shapes its larger square.
        ({"scales": [0.2, 0.4, 0.6, 0.8]}, {"scales": [0.2, 0.4, 0.6, 0.9]}, "scales"),
        ({"clip": False}, {}, "clip"),
        ({"steps": [8, 16, 30]}, {"steps": [8, 16, 32]}, "steps"),
    ],
)
def test_error_anchors(theirs, ours, name):
    pair = tiny_ssd(anchors=generator(**theirs)), tiny_ssd(anchors=generator(**ours))
    refused(*pair, rf"anchor {name} differ: .* \(teacher\), .* \(student\).*same\s+anchor_generator")


def test_steps_may_say_what_the_levels_do():
    steps = tiny_ssd(anchors=generator(steps=[8, 16, 32]))
    distiller = Distiller(steps, tiny_ssd(seed=1), CrossKD())
    assert_reaches_the_student(distiller, distiller(*batch()))
    others = tiny_ssd(anchors=generator(steps=[8, 16, 30]))
    with pytest.raises(ValueError, match="the anchors differ on the first batch"):
        Distiller(others, tiny_ssd(seed=1), CrossKD())(*batch())


class OwnGenerator(nn.Module):
    """Makes anchors without telling how."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.inside, self.shift = generator(), shift

    def forward(self, images, maps):
        return [anchors + self.shift for anchors in self.inside(images, maps)]


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_anchors_of_a_generator_of_ones_own_are_compared_on_the_first_step(shift):
    teacher, student = tiny_ssd(), tiny_ssd(seed=1)
    teacher.anchor_generator, student.anchor_generator = OwnGenerator(shift), OwnGenerator(0.0)
    distiller = Distiller(teacher, student, CrossKD())
    if shift:
        with pytest.raises(ValueError, match="the anchors differ on the first batch"):
            distiller(*batch())
        return
    assert_reaches_the_student(distiller, distiller(*batch()))


def test_error_box_coding():
    student = tiny_ssd()
    student.box_coder.weights = (1.0, 1.0, 1.0, 1.0)
    refused(tiny_ssd(), student, r"box coding differs: .*10\.0.* \(teacher\), .*1\.0.* \(student\)")


class OwnSSD(SSD):
    def forward(self, images, targets=None):
        return super().forward(images, targets)


class OwnHead(SSDHead):
    def forward(self, x):
        return super().forward(x)


class OwnScores(SSDClassificationHead):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnLevels(SSDClassificationHead):
    def _get_result_from_module_list(self, x, idx):
        return 2 * super()._get_result_from_module_list(x, idx)


def of_class(path: str, kind: type) -> SSD:
    """A detector with a part that another class computes."""
    detector = tiny_ssd()
    detector.get_submodule(path).__class__ = kind
    return detector


@pytest.mark.parametrize(
    ("path", "kind", "told"),
    [
        ("", OwnSSD, "the detector is a OwnSSD with a forward of its own"),
        ("head", OwnHead, "head is a OwnHead with a forward of its own"),
        ("head.classification_head", OwnScores, "classification_head is a OwnScores with a forward"),
        ("head.classification_head", OwnLevels, "is a OwnLevels with a _get_result_from_module_list of its"),
    ],
)
def test_error_parts_that_compute_otherwise(path, kind, told):
    refused(of_class(path, kind), tiny_ssd(), f"teacher: .*{told}")
    refused(tiny_ssd(), of_class(path, kind), f"student: .*{told}")


def test_error_parts_of_another_kind():
    student = tiny_ssd()
    student.head.classification_head.module_list[1] = nn.Sequential(nn.Conv2d(24, 24, 1), nn.ReLU())
    refused(
        tiny_ssd(), student, "student: module_list.1.1 of a SSDClassificationHead is a ReLU: this adapter"
    )
    student.head.classification_head = nn.Identity()
    refused(tiny_ssd(), student, "student: head.classification_head is a Identity: this adapter knows")


def test_error_a_head_for_other_anchors():
    student = tiny_ssd()
    student.head = SSDHead([16, 24, 8], [4, 4, 4], 4)
    message = r"student: head.classification_head predicts for \[4, 4, 4\] anchors .*there are \[4, 6, 4\]"
    refused(tiny_ssd(), student, message)


def test_predictors_of_several_blocks_are_towers():
    def deeper(seed: int) -> SSD:
        detector = tiny_ssd(seed=seed)
        for branch in (detector.head.classification_head, detector.head.regression_head):
            for level, (predictor, width) in enumerate(zip(branch.module_list, (16, 24, 8), strict=True)):
                block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
                branch.module_list[level] = nn.Sequential(block, predictor)
        return detector

    distiller = Distiller(deeper(0), deeper(1), CrossKD(position=1))
    assert_reaches_the_student(distiller, distiller(*batch()))


# -- the look before a run -------------------------------------------------------------------------


def sure_of(label: int) -> SSD:
    """Everywhere sure of one class, its boxes the anchors themselves."""
    detector = tiny_ssd()
    for predictor in detector.head.regression_head.module_list:
        nn.init.normal_(predictor.weight, std=1e-4)
        nn.init.zeros_(predictor.bias)
    for predictor in detector.head.classification_head.module_list:
        nn.init.normal_(predictor.weight, std=1e-4)
        nn.init.zeros_(predictor.bias)
        predictor.bias.data[label::4] = 8.0
    return detector


def of_anchors(label: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Targets that stand on an anchor."""
    images, _ = batch()
    box = torch.tensor([[12.0, 12.0, 28.0, 28.0]])  # a quarter of the image's side, around a location
    return images, [{"boxes": box, "labels": torch.tensor([label])} for _ in images]


def test_the_look_tells_confidence_and_fit():
    report = crosskd.check(sure_of(2), tiny_ssd(seed=1), *of_anchors(2))
    anchors = 4 * 64 + 6 * 16 + 4 * 4
    assert report.confidence.sure == (anchors, anchors)
    assert report.confidence.highest == pytest.approx(
        [1 / (1 + 3 * torch.tensor(-8.0).exp().item())] * 2, 1e-2
    )
    assert report.fit is not None
    assert (report.fit.objects, report.fit.found, report.fit.best_iou) == (2, 2, pytest.approx(1, abs=1e-3))
    assert len(report.splits[0].student_shapes) == 3
    with pytest.raises(
        ValueError, match="finds none of the 2 objects.*Of other classes its predictions fit 2"
    ):
        crosskd.check(sure_of(2), tiny_ssd(seed=1), *of_anchors(1))


def test_the_look_does_not_take_the_background_for_an_object():
    with pytest.raises(ValueError, match="the teacher is sure of nothing on these images"):
        crosskd.check(sure_of(0), tiny_ssd(seed=1), *of_anchors(2))


# -- torchvision's own -----------------------------------------------------------------------------


def with_statistics_of(detector: SSD, images: Any, targets: Any) -> None:
    """An untrained detector's features vanish in eval mode: its statistics are those of no image."""
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        detector.train()(images, targets)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "widths"),
    [
        (ssd300_vgg16, [512, 1024, 512, 256, 256, 256]),
        (ssdlite320_mobilenet_v3_large, [672, 480, 512, 256, 256, 128]),
    ],
    ids=["ssd300", "ssdlite320"],
)
def test_torchvisions_own_builders_distil(build, widths):
    def detector(seed: int) -> SSD:
        torch.manual_seed(seed)
        return build(weights=None, weights_backbone=None, num_classes=4)

    teacher, student = detector(0), detector(1)
    assert [tower.width_in for tower in ADAPTER.branches(student)[0].towers] == widths
    images, targets = batch()
    with_statistics_of(teacher, images, targets)
    plain = copy.deepcopy(student).train()
    expected = plain(images, targets)
    distiller = Distiller(teacher, student, CrossKD())
    losses = distiller(images, targets)
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
    assert all(loss.isfinite() for loss in losses.values())
    assert min(losses["kd_cls"], losses["kd_reg"]) > 0
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
    for (name, ours), theirs in zip(student.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
