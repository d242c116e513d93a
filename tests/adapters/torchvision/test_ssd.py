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
from torchvision.models.detection.ssd import SSD, SSDClassificationHead
from torchvision.ops import box_iou

import crosskd
from crosskd import PKD, CrossKD, Distiller, PredictionMimicking
from crosskd.adapters import TorchvisionSSD, find_adapter
from crosskd.losses import giou_loss, softmax_focal_loss
from crosskd.step import run_head
from tests.helpers.conformance import assert_green
from tests.helpers.tiny import tiny_batch, tiny_ssd

WIDER = (32, 24, 16)
TO_ONE_LOCATION = (8, 8, 8, 8)
heads = pytest.mark.parametrize("lite", [False, True], ids=["ssd", "ssdlite"])


def batch(images: int = 2, **options: Any) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    return tiny_batch(images, first_label=1, **options)


def without_objects() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images, targets = batch()
    return images, [{name: values[:0] for name, values in target.items()} for target in targets]


def assert_distils(distiller: Distiller, *of_step: Any) -> dict[str, Tensor]:
    """The losses of a step that reaches the student's backbone."""
    losses = distiller(*(of_step or batch()))
    assert all(loss.isfinite() for loss in losses.values())
    assert min(losses["kd_cls"], losses["kd_reg"]) > 0
    (losses["kd_cls"] + losses["kd_reg"]).backward()
    gradients = [p.grad for p in distiller.student.backbone.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    return losses


@pytest.mark.parametrize(
    ("teacher", "student", "position"),
    [(False, False, None), (True, True, 1), (False, True, None), (True, False, None)],
    ids=["ssd", "ssdlite after its block", "ssd teaches ssdlite", "ssdlite teaches ssd"],
)
def test_the_adapter_kit_is_green(teacher, student, position):
    assert_green(
        TorchvisionSSD,
        *batch(),
        teacher=tiny_ssd(widths=WIDER, lite=teacher, batch_norm=True),
        student=tiny_ssd(lite=student, batch_norm=True, seed=1),
        method=CrossKD(position=position),
    )


# -- what it reads off a detector --------------------------------------------------------------------


@heads
def test_classes_count_the_background_and_strides_are_of_its_own_size(lite):
    adapter = find_adapter(tiny_ssd(5, lite=lite, side=72))  # levels of 9, 5 and 3 locations
    assert isinstance(adapter, TorchvisionSSD)
    (head,) = adapter.heads
    assert (head.num_classes, head.background, head.head_type) == (5, 0, "SSD")
    assert adapter.strides == (8, 72 / 5, 24)
    assert adapter.widths == (16, 24, 8)


def test_an_ssds_towers_have_no_block():
    for branch, name in zip(
        find_adapter(tiny_ssd()).heads[0].branches, ("classification", "regression"), strict=True
    ):
        assert branch.name == name
        assert [(len(tower.blocks), tower.width_in) for tower in branch.towers] == [(0, 16), (0, 24), (0, 8)]
        assert list(branch.predictors) == ["module_list.0", "module_list.1", "module_list.2"]
        assert [p.in_channels for p in branch.predictors.values()] == [16, 24, 8]
    with pytest.raises(ValueError, match="position 1 does not fit the classification tower of level 0 of 0"):
        Distiller(tiny_ssd(), tiny_ssd(seed=1), CrossKD(position=1))


def test_an_ssdlites_towers_have_one():
    for branch in find_adapter(tiny_ssd(lite=True)).heads[0].branches:
        found = [(len(tower.blocks), tower.width_in, tower.width(1)) for tower in branch.towers]
        assert found == [(1, 16, 16), (1, 24, 24), (1, 8, 8)]
        assert list(branch.predictors) == ["module_list.0.1", "module_list.1.1", "module_list.2.1"]


@heads
def test_predictions_and_anchors_are_the_detectors_own(lite):
    detector = tiny_ssd(lite=lite, widths=TO_ONE_LOCATION).eval()
    adapter = find_adapter(detector)
    (head,) = adapter.heads
    images = adapter.prepare(batch()[0], None)
    maps = adapter.maps(images.pixels)
    found, own = run_head(head, maps, range(4)).predictions, detector.head(maps)
    assert torch.equal(found.logits, own["cls_logits"])
    assert torch.equal(found.regression, own["bbox_regression"])
    assert found.background == 0
    anchors = head.anchors(images, maps)
    assert anchors.per_level == (4 * 64, 6 * 16, 4 * 4, 4)
    assert anchors.boxes.shape == (found.logits.shape[1], 4)
    assert torch.equal(anchors.of_levels((1, 3)).boxes, anchors.boxes[[*range(256, 352), *range(368, 372)]])


def test_boxes_are_those_that_it_detects():
    """With no threshold and no suppression the detections of one class are all decoded boxes."""
    detector = tiny_ssd(score_thresh=0.0, nms_thresh=1.0, detections_per_img=10_000).eval()
    detector.topk_candidates = 10_000
    adapter = find_adapter(detector)
    (head,) = adapter.heads
    with torch.no_grad():
        images = adapter.prepare(batch(1)[0], None)
        maps = adapter.maps(images.pixels)
        predictions = run_head(head, maps, range(3)).predictions
        boxes = head.decode(predictions, head.anchors(images, maps))
        (found,) = detector(batch(1)[0])
    own = found["boxes"][found["labels"] == 2]
    order = predictions.logits[0].softmax(-1)[:, 2].argsort(descending=True)
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


class Counting(SSD):
    """Weights its losses by the number of its steps, in the loss and in the forward."""

    steps = 0

    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
        self.steps += 1
        losses = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        return {**losses, "bbox_regression": losses["bbox_regression"] / self.steps}

    def forward(self, images, targets=None):
        answers = super().forward(images, targets)
        return {**answers, "further": answers["classification"] / 2} if self.training else answers


def test_a_subclass_computes_its_losses_itself_and_keeps_its_state():
    student = tiny_ssd(kind=Counting, seed=1)
    plain = copy.deepcopy(student).train()
    distiller = Distiller(tiny_ssd(), student, CrossKD())
    for step in (1, 2):
        expected, losses = plain(*batch()), distiller(*batch())
        assert expected.keys() == {"bbox_regression", "classification", "further"}
        assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
        assert student.steps == step
    assert not {"compute_loss", "head", "backbone", "transform"} & vars(student).keys()


def test_the_assignment_is_its_own_as_a_student_and_as_a_teacher():
    images, targets = batch()
    targets[1] = {name: values[:0] for name, values in targets[1].items()}
    student = tiny_ssd(seed=1)
    distiller = Distiller(tiny_ssd(), student, CrossKD())
    step = distiller.trace(images, targets).steps["crosskd"]
    resized = distiller.student_adapter.prepare(images, targets).objects
    overlaps = box_iou(resized[0].boxes, step.student.anchors.boxes)
    positive = student.proposal_matcher(overlaps) >= 0
    assert positive.sum() > 1
    for assignment in (step.assignment, step.teacher_assignment()):
        assert torch.equal(assignment.positive[0], positive)
        assert not assignment.positive[1].any()
        assert assignment.label_weights is None
        assert assignment.normalizer == positive.sum()
    assert not distiller.teacher.training


def test_without_objects_it_is_normalised_by_one():
    distiller = Distiller(tiny_ssd(), tiny_ssd(seed=1), CrossKD())
    assignment = distiller.trace(*without_objects()).steps["crosskd"].assignment
    assert assignment.normalizer == 1
    assert not assignment.positive.any()


@heads
def test_distillation_losses_are_the_formulas(lite):
    distiller = Distiller(tiny_ssd(lite=lite), tiny_ssd(lite=lite, seed=1), CrossKD())
    trace = distiller.trace(*batch())
    losses, step = trace.losses["crosskd"], trace.steps["crosskd"]
    teacher, positives = step.teacher.predictions, step.assignment.positive.sum()
    crossed = distiller.methods["crosskd"].cross_head(step)
    cls = softmax_focal_loss(crossed.logits, teacher.logits, normalizer=positives)
    sure = teacher.logits.softmax(-1)[..., 1:].amax(-1)
    boxes = [step.teacher.head.decode(p, step.teacher.anchors) for p in (crossed, teacher)]
    torch.testing.assert_close(losses["kd_cls"], cls)
    torch.testing.assert_close(losses["kd_reg"], giou_loss(*boxes, weight=sure, normalizer=positives))


def test_unlabelled_images_and_prediction_mimicking():
    teacher, student = tiny_ssd(), tiny_ssd(seed=1)
    losses = Distiller(teacher, student, CrossKD())(batch()[0])
    assert losses.keys() == {"kd_cls", "kd_reg"}
    assert_distils(Distiller(teacher, student, PredictionMimicking()))


@pytest.mark.parametrize("images", [1, 2])
def test_a_level_of_one_location(images):
    """With one image its features have no deviation: they become the teacher's, and get no gradient."""
    teacher, student = tiny_ssd(widths=TO_ONE_LOCATION), tiny_ssd(widths=TO_ONE_LOCATION, seed=1)
    distiller = Distiller(teacher, student, CrossKD())
    step = distiller.trace(*batch(images)).steps["crosskd"]
    crossed, own = distiller.methods["crosskd"].cross_head(step), step.teacher.predictions
    assert torch.allclose(crossed.logits[:, -4:], own.logits[:, -4:], rtol=1e-5, atol=1e-6) is (images == 1)
    assert_distils(distiller, *batch(images))
    assert bool(student.backbone.laterals[-1].weight.grad.any()) is (images > 1)


def test_error_labels_that_mean_the_background():
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
    assert_distils(distiller)
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
    whole = Distiller(tiny_ssd(), tiny_ssd(seed=1), CrossKD()).trace(*batch()).steps["crosskd"]
    distiller = Distiller(tiny_ssd(), from_stride_16(tiny_ssd(seed=1)), CrossKD())
    assert_distils(distiller)
    step = distiller.trace(*batch()).steps["crosskd"]
    for name in ("logits", "regression"):
        ours, all_levels = (getattr(s.teacher.predictions, name) for s in (step, whole))
        assert torch.equal(ours, all_levels[:, 4 * 64 :])


def test_a_teacher_of_more_classes():
    teacher, student = tiny_ssd(6), tiny_ssd(3, seed=1)
    distiller = Distiller(teacher, student, CrossKD(), class_map=[0, 5, 2])
    assert_distils(distiller, *batch(num_classes=3))
    predictions = distiller.trace(*batch(num_classes=3)).steps["crosskd"].teacher.predictions
    assert predictions.background == 0
    with torch.no_grad():
        own = teacher.head(list(teacher.backbone(teacher.transform(batch()[0])[0].tensors).values()))
    logits = own["cls_logits"]
    assert torch.equal(predictions.logits[..., 1:], logits[..., [5, 2]])
    # Of its other classes the student is to see no object.
    torch.testing.assert_close(predictions.probabilities()[..., 1:], logits.softmax(-1)[..., [5, 2]])
    with pytest.raises(ValueError, match=r"class_map\[0\] = 0; got \[1, 0, 2\]"):
        Distiller(teacher, student, CrossKD(), class_map=[1, 0, 2])


def as_they_are(images: Any, targets: Any) -> Any:
    return images


@pytest.mark.parametrize("resize", [False, True], ids=["coarser strides", "resized levels"])
def test_a_teacher_for_larger_images_has_a_view_of_its_own(resize):
    """Anchors are shares of the image: the same ones at twice the size."""
    teacher, student = tiny_ssd(side=128), tiny_ssd(seed=1)
    if not resize:
        teacher.backbone.stem[0][0].stride = (4, 4)
    distiller = Distiller(teacher, student, CrossKD(), teacher_view=as_they_are, resize_levels=resize)
    assert_distils(distiller)
    step = distiller.trace(*batch()).steps["crosskd"]
    assert step.teacher.predictions.logits.shape == step.student.predictions.logits.shape


@pytest.mark.parametrize("method", [CrossKD(), PredictionMimicking()])
def test_error_a_teacher_for_images_of_another_size(method):
    distiller = Distiller(tiny_ssd(side=128), tiny_ssd(seed=1), method)
    with pytest.raises(ValueError, match=r"\(128, 128\) .* a batch of \(64, 64\)"):
        distiller(*batch())
    # Levels of 9, 5 and 3 locations have other strides.
    with pytest.raises(ValueError, match=r"strides differ: .* 24.0\] \(teacher\), .* 32.0\] \(student\)"):
        Distiller(tiny_ssd(side=72), tiny_ssd(), method)


def test_maps_of_a_teacher_for_another_size_are_imitated():
    losses = Distiller(tiny_ssd(side=128), tiny_ssd(seed=1), PKD())(*batch())
    assert losses["kd_pkd"] > 0


def generator(**options: Any) -> DefaultBoxGenerator:
    return DefaultBoxGenerator(options.pop("ratios", [[2], [2, 3], [2]]), **{"min_ratio": 0.25, **options})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"ratios": [[2], [2, 4], [2]]}, {}),
        # The scale behind the last level's shapes its larger square.
        ({"scales": [0.2, 0.4, 0.6, 0.8]}, {"scales": [0.2, 0.4, 0.6, 0.9]}),
        ({"clip": False}, {}),
        ({"steps": [8, 16, 30]}, {}),
    ],
    ids=["ratios", "scales", "clip", "steps"],
)
def test_error_mimicking_at_other_anchors(theirs, ours):
    pair = tiny_ssd(anchors=generator(**theirs)), tiny_ssd(anchors=generator(**ours), seed=1)
    if "clip" in theirs:  # torchvision clips centres and sides, which matters for boxes of a whole image
        for detector in pair:
            detector.anchor_generator.scales[-2:] = [1.2, 1.4]
            detector.anchor_generator._wh_pairs = detector.anchor_generator._generate_wh_pairs(3)
    with pytest.raises(ValueError, match=r"anchors differ .*SSD head.* \(teacher\), .* \(student\)"):
        Distiller(*pair, PredictionMimicking())(*batch())


def test_steps_may_say_what_the_levels_do():
    steps = tiny_ssd(anchors=generator(steps=[8, 16, 32]))
    assert_distils(Distiller(steps, tiny_ssd(seed=1), PredictionMimicking()))


def test_error_mimicking_with_other_box_coding():
    student = tiny_ssd(seed=1)
    student.box_coder.weights = (1.0, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"box coding differs: .* \(teacher\) .* \(student\)"):
        Distiller(tiny_ssd(), student, PredictionMimicking())(*batch())


# -- what is proved on the first step -----------------------------------------------------------------


class Brighter(SSD):
    def forward(self, images, targets=None):
        return super().forward([image + 1 for image in images], targets)


class OwnLevels(SSDClassificationHead):
    def _get_result_from_module_list(self, x, idx):
        return 2 * super()._get_result_from_module_list(x, idx)


def of_class(path: str, kind: type) -> SSD:
    """A detector with a part that another class computes."""
    detector = tiny_ssd(seed=1)
    detector.get_submodule(path).__class__ = kind
    return detector


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_error_levels_that_are_computed_otherwise(side):
    detectors = {"teacher": tiny_ssd(), "student": tiny_ssd(seed=1)}
    detectors[side] = of_class("head.classification_head", OwnLevels)
    message = {"teacher": "teacher: SSD's own forward .* the head's logits", "student": "student: SSD's own"}
    with pytest.raises(ValueError, match=message[side]):
        Distiller(**detectors, methods=CrossKD())(*batch())


def test_error_a_forward_that_changes_its_images():
    with pytest.raises(ValueError, match="student: Brighter's own forward.* part at backbone.stem.0.0"):
        Distiller(tiny_ssd(), of_class("", Brighter), CrossKD())(*batch())


class Silent(SSD):
    def forward(self, images, targets=None):
        images, _ = self.transform(images, targets)
        return {"loss": self.head(list(self.backbone(images.tensors).values()))["cls_logits"].sum()}


def test_error_a_forward_without_matches():
    with pytest.raises(ValueError, match="Silent.forward did not call compute_loss once with its matches"):
        Distiller(tiny_ssd(), of_class("", Silent), CrossKD())(*batch())


def test_error_parts_of_another_kind():
    student = tiny_ssd()
    student.head.classification_head.module_list[1] = nn.Sequential(nn.Conv2d(24, 24, 1), nn.ReLU())
    with pytest.raises(ValueError, match="student: module_list.1.1 of a SSDClassificationHead is a ReLU"):
        Distiller(tiny_ssd(), student, CrossKD())
    student.head.classification_head = nn.Identity()
    with pytest.raises(ValueError, match="student: head.classification_head is a Identity"):
        Distiller(tiny_ssd(), student, CrossKD())


def test_predictors_of_several_blocks_are_towers():
    def deeper(seed: int) -> SSD:
        detector = tiny_ssd(seed=seed)
        for branch in (detector.head.classification_head, detector.head.regression_head):
            for level, (predictor, width) in enumerate(zip(branch.module_list, (16, 24, 8), strict=True)):
                block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
                branch.module_list[level] = nn.Sequential(block, predictor)
        return detector

    distiller = Distiller(deeper(0), deeper(1), CrossKD(position=1))
    assert_distils(distiller)


# -- check -------------------------------------------------------------------------------------------


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


def test_check_tells_confidence_and_fit():
    report = crosskd.check(sure_of(2), tiny_ssd(seed=1), *of_anchors(2))
    anchors = 4 * 64 + 6 * 16 + 4 * 4
    assert report.confidence.sure == (anchors, anchors)
    assert report.confidence.highest == pytest.approx(
        [1 / (1 + 3 * torch.tensor(-8.0).exp().item())] * 2, 1e-2
    )
    assert report.fit is not None
    assert (report.fit.objects, report.fit.found, report.fit.right) == (2, 2, 2)
    assert len(report.splits[0].student_shapes) == 3
    with pytest.raises(ValueError, match=r"over 2 objects .* 0 times, class 1 for 2 \(2 of 2\)"):
        crosskd.check(sure_of(2), tiny_ssd(seed=1), *of_anchors(1))


def test_check_does_not_take_the_background_for_an_object():
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
    assert [tower.width_in for tower in find_adapter(student).heads[0].branches[0].towers] == widths
    # SSDlite's batch norm over its 1x1 level needs two images; a VGG takes seconds for each.
    images, targets = batch(1 if build is ssd300_vgg16 else 2)
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
