"""The adapter for mmdet's one-stage detectors: mmdet's own losses and boxes, pairs, checks, batches."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from crosskd import CrossKD, Distiller, PredictionMimicking
from crosskd.adapters import find_adapter
from crosskd.step import run_head
from tests.helpers.mmdet_heads import (
    CLASSES,
    HEADS,
    SIZE,
    STRIDES,
    SmallBackbone,
    batch_of,
    detector_of,
    head_settings,
    samples_of,
)

pytestmark = pytest.mark.mmdet

PREPROCESSOR = {
    "type": "DetDataPreprocessor",
    "mean": [123.675, 116.28, 103.53],
    "std": [58.395, 57.12, 57.375],
    "bgr_to_rgb": True,
    "pad_size_divisor": 32,
}


@pytest.fixture(params=list(HEADS))
def family(request) -> str:
    return request.param


def pair_of(family: str, **changed) -> tuple[nn.Module, nn.Module]:
    """A teacher and a student of one family, with other weights each."""
    return tuple(detector_of(head_settings(family, **changed), seed=seed) for seed in (1, 2))


def one_step(family: str, method=None, batch=None, **changed) -> tuple[Distiller, dict[str, Tensor]]:
    distiller = Distiller(*pair_of(family, **changed), method or CrossKD()).train()
    return distiller, distiller(*(batch or batch_of()))


# -- mmdet's own numbers --------------------------------------------------------------------------


def test_the_students_losses_are_mmdets_to_the_last_bit(family):
    distiller = Distiller(*pair_of(family), CrossKD()).train()
    plain = copy.deepcopy(distiller.student)
    images, samples = batch_of()
    losses = distiller(images, samples)
    _, expected = plain.parse_losses(plain.loss(images, samples))
    expected.pop("loss")
    assert {name for name in losses if not name.startswith("kd_")} == expected.keys()
    for name, loss in expected.items():
        assert torch.equal(losses[name].detach(), loss), name
    for name, buffer in plain.named_buffers():  # RTMDet's batch norm saw the batch once
        assert torch.equal(buffer, distiller.student.get_buffer(name)), name


def test_the_students_gradient_is_mmdets(family):
    distiller = Distiller(*pair_of(family), CrossKD()).train()
    plain = copy.deepcopy(distiller.student)
    images, samples = batch_of()
    losses = distiller(images, samples)
    sum(loss for name, loss in losses.items() if not name.startswith("kd_")).backward()
    plain.parse_losses(plain.loss(images, samples))[0].backward()
    for (name, own), expected in zip(distiller.student.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad, msg=name)


def test_in_eval_the_distiller_predicts_as_the_student(family):
    distiller = Distiller(*pair_of(family), CrossKD()).eval()
    images, samples = batch_of()
    answers = distiller(images, copy.deepcopy(samples))
    plain = distiller.student.predict(images, copy.deepcopy(samples))
    for ours, theirs in zip(answers, plain, strict=True):
        assert torch.equal(ours.pred_instances.bboxes, theirs.pred_instances.bboxes)
        assert torch.equal(ours.pred_instances.scores, theirs.pred_instances.scores)
    without = distiller(images)  # boxes in the batch's own pixels, which these samples have too
    assert torch.equal(without[0].pred_instances.bboxes, plain[0].pred_instances.bboxes)


@pytest.mark.parametrize(
    ("family", "changed"), [*((name, {}) for name in HEADS), ("fcos", {"norm_on_bbox": True})]
)
def test_boxes_are_those_that_the_head_itself_decodes(family, changed):
    detector = detector_of(head_settings(family, num_classes=1, **changed)).eval()
    adapter, images = find_adapter(detector), batch_of(images=1)[0]
    batch, maps = adapter.prepare(images, None), adapter.maps(images)
    predictions = run_head(adapter.head, maps, range(len(maps))).predictions
    found = adapter.head.decode(predictions, adapter.head.anchors(batch, maps))
    everything = {"nms_pre": 10**6, "min_bbox_size": -1, "score_thr": -1.0, "max_per_img": -1}
    large = {"img_shape": (10**6, 10**6), "scale_factor": (1.0, 1.0)}
    head = detector.bbox_head
    with torch.no_grad():
        (expected,) = head.predict_by_feat(
            *head(maps), batch_img_metas=[large], cfg=head.test_cfg.__class__(everything), with_nms=False
        )

    # The head's own come in the order of their scores: each box must be one of the others.
    distances = torch.cdist(found[0].detach().clamp(min=0).double(), expected.bboxes.double())
    assert len(found[0]) == len(expected.bboxes)
    assert distances.amin(dim=0).max() < 1e-2
    assert distances.amin(dim=1).max() < 1e-2


def test_features_and_assignment_are_made_once_a_step(family):
    distiller = Distiller(*pair_of(family), CrossKD()).train()
    distiller(*batch_of())  # the first step is compared with the detectors' own forward, too
    calls: list[str] = []

    def counted(owner: nn.Module, name: str, label: str) -> None:
        function = getattr(owner, name)

        def count(*arguments, **named):
            calls.append(label)
            return function(*arguments, **named)

        setattr(owner, name, count)

    counted(distiller.student, "extract_feat", "student")
    counted(distiller.teacher, "extract_feat", "teacher")
    counted(distiller.student.bbox_head, "get_targets", "targets")
    counted(distiller.teacher.bbox_head, "get_targets", "teacher's targets")
    distiller(*batch_of())
    assert sorted(calls) == ["student", "targets", "teacher"]


# -- what distilling does -------------------------------------------------------------------------


def test_a_student_that_is_its_own_teacher_differs_in_nothing(family):
    # At the tower's end, before the last activation is run once more, cross-head and teacher are one.
    detector = detector_of(head_settings(family))
    position = HEADS[family]["stacked_convs"]
    distiller = Distiller(copy.deepcopy(detector).eval(), detector, CrossKD(position, tap="pre"))
    detector.bbox_head.eval()
    with torch.no_grad():
        losses = distiller(*batch_of())
    assert losses["kd_cls"].item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("tap", ["post", "pre"])
def test_every_position_distils_into_the_blocks_before_it(family, tap):
    blocks = HEADS[family]["stacked_convs"]
    for position in range(blocks + 1):
        distiller, losses = one_step(family, CrossKD(position, tap=tap))
        sum(loss for name, loss in losses.items() if name.startswith("kd_")).backward()
        head = distiller.student.bbox_head
        for convolutions in (head.cls_convs, head.reg_convs):
            towers = convolutions if family == "rtmdet" else [convolutions]
            for tower in towers:
                reached = [any(p.grad is not None for p in block.bn.parameters()) if family == "rtmdet"
                           else block.conv.weight.grad is not None for block in tower]  # fmt: skip
                assert reached == [number < position for number in range(blocks)]
        predictors = [
            p for branch in distiller.student_adapter.head.branches for p in branch.predictors.values()
        ]
        assert all(p.grad is None for predictor in predictors for p in predictor.parameters())
        assert distiller.student.backbone.levels[0].weight.grad.abs().max() > 0


def test_the_teacher_stays_as_it_is(family):
    teacher, student = pair_of(family)
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    modes = {name: module.training for name, module in teacher.named_modules()}
    distiller = Distiller(teacher, student, CrossKD()).train()
    sum(distiller(*batch_of()).values()).backward()
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert {name: module.training for name, module in teacher.named_modules()} == modes
    assert all(p.grad is None for p in teacher.parameters())


def test_prediction_mimicking_works_too(family):
    distiller, losses = one_step(family, PredictionMimicking())
    losses["kd_cls"].backward()
    assert any(p.grad is not None for p in distiller.student.bbox_head.parameters())


def test_atss_distils_centerness_as_published():
    distiller = Distiller(*pair_of("atss"), CrossKD()).train()
    seen = {}
    method = distiller.methods["crosskd"]
    forward = method.forward
    method.forward = lambda step: seen.update(step=step) or forward(step)
    losses = distiller(*batch_of())
    step = seen["step"]
    cross = method.cross_head(step).quality.double()
    target = step.teacher.predictions.quality.double().sigmoid()
    each = -(target * cross.sigmoid().log() + (1 - target) * (1 - cross.sigmoid()).log())
    positive = step.assignment.positive
    assert positive.any()
    expected = each[positive].sum() / positive.sum(dim=1).clamp(min=1).sum()
    assert losses["kd_quality"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("family", "names"), [
    ("gfl", {"kd_cls", "kd_reg"}),
    ("atss", {"kd_cls", "kd_reg", "kd_quality"}),
    ("fcos", {"kd_cls", "kd_reg"}),
])  # fmt: skip
def test_losses_are_those_published_for_the_head(family, names):
    _, losses = one_step(family)
    assert {name for name in losses if name.startswith("kd_")} == names


def test_fcos_distils_centerness_where_asked():
    _, losses = one_step("fcos", CrossKD(quality_weight=1.0))
    assert losses["kd_quality"] > 0


def test_classification_towers_of_depthwise_convolutions_are_blocks():
    distiller, losses = one_step("rtmdet", use_depthwise=True, share_conv=False)
    assert losses["kd_cls"].isfinite()
    tower = distiller.student_adapter.head.branches[0].tower(0)
    assert [type(block.activation) for block in tower.blocks] == [nn.SiLU, nn.SiLU]
    assert [block.has_pre for block in tower.blocks] == [False, False]


# -- batches --------------------------------------------------------------------------------------


def nothing() -> dict[str, Tensor]:
    return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def test_images_without_boxes_count_as_one(family):
    images, samples = batch_of()
    empty = samples_of([nothing(), nothing()])
    _, losses = one_step(family, batch=(images, [samples[0], empty[0]]))
    assert all(loss.isfinite() for loss in losses.values())
    distiller, losses = one_step(family, batch=(images, empty))
    assert all(loss.isfinite() for loss in losses.values())
    # The published FCOS loss is a million times larger here.
    assert losses["kd_reg"] < 1e4
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in distiller.student.parameters() if p.grad is not None)


def test_one_image_and_another_size(family):
    target = {"boxes": torch.tensor([[8.0, 8.0, 60.0, 50.0]]), "labels": torch.tensor([1])}
    size = (96, 160)
    _, losses = one_step(family, batch=(torch.randn(1, 3, *size), samples_of([target], size)))
    assert all(loss.isfinite() for loss in losses.values())


def test_images_without_labels_distil(family):
    _, losses = one_step(family, batch=(batch_of()[0],))
    assert all(name.startswith("kd_") for name in losses)
    sum(losses.values()).backward()


def test_padding_beyond_the_anchors_counts_nowhere():
    # Half of the batch's width is padding: the head itself marks the anchors there as invalid.
    images, samples = batch_of()
    samples[1].set_metainfo({"img_shape": (128, 80), "pad_shape": (128, 80)})
    seen = {}
    distiller = Distiller(*pair_of("gfl"), CrossKD()).train()
    method = distiller.methods["crosskd"]
    forward = method.forward
    method.forward = lambda step: seen.update(step=step) or forward(step)
    distiller(images, samples)
    weights = seen["step"].assignment.label_weights
    assert weights[0].all()
    assert not weights[1].all()
    assert weights[1].any()


@pytest.mark.parametrize("teacher_settings", [
    {"mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0], "bgr_to_rgb": False},
    {"mean": [0.0, 0.0, 0.0], "std": [255.0, 255.0, 255.0], "pad_value": 114},
])  # fmt: skip
def test_the_teacher_sees_the_same_pixels_as_its_own_preprocessor_makes(teacher_settings):
    teacher, student = (
        detector_of(head_settings("gfl"), data_preprocessor={**PREPROCESSOR, **settings})
        for settings in (teacher_settings, {})
    )
    raw = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in [(128, 160), (96, 130)]]
    batches = {}
    for name, detector in (("teacher", teacher), ("student", student)):
        samples = samples_of([nothing(), nothing()])
        for sample, image in zip(samples, raw, strict=True):
            sample.set_metainfo({"img_shape": tuple(image.shape[-2:])})
        batches[name] = detector.data_preprocessor({"inputs": list(raw), "data_samples": samples}, True)
    distiller = Distiller(teacher, student, CrossKD())
    batch = distiller.student_adapter.prepare(*batches["student"].values())
    assert torch.equal(batch.pixels, batches["student"]["inputs"])
    seen = distiller.teacher_batch(batch, None, None)
    torch.testing.assert_close(seen.pixels, batches["teacher"]["inputs"], atol=1e-3, rtol=1e-4)
    padded = [sample.pad_shape for sample in batches["teacher"]["data_samples"]]
    assert [meta["pad_shape"] for meta in seen.extra] == padded == [(128, 160), (96, 160)]


def test_autocast_keeps_losses_in_float32():
    distiller = Distiller(*pair_of("gfl"), CrossKD()).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = distiller(*batch_of(images=1))
    assert {losses[name].dtype for name in ("kd_cls", "kd_reg")} == {torch.float32}
    sum(losses.values()).backward()


def test_compiled_steps_give_the_same_losses_and_gradients():
    """Of RTMDet, whose levels, here two, share convolutions and have batch norms of their own."""
    torch._dynamo.reset()
    strides = STRIDES[:2]
    points = {"type": "MlvlPointGenerator", "offset": 0, "strides": strides}
    settings = head_settings("rtmdet", anchor_generator=points)
    teacher, student = (detector_of(settings, SmallBackbone(strides), seed=seed) for seed in (1, 2))
    eager = Distiller(teacher, student, CrossKD()).train()
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, backend="eager")
    for _ in range(2):  # the detectors are held against their own forward on the first step alone
        expected, losses = eager(*batch_of()), compiled(*batch_of())
        assert losses.keys() == expected.keys()
        for name, loss in expected.items():
            assert torch.allclose(losses[name], loss, rtol=1e-5), name
    sum(expected.values()).backward()
    sum(losses.values()).backward()
    for name, parameter in eager.student.named_parameters():
        gradient = other.student.get_parameter(name).grad
        if parameter.grad is None:
            assert gradient is None, name
        else:
            difference = (gradient - parameter.grad).norm()
            assert difference <= 1e-3 * parameter.grad.norm(), (name, difference, parameter.grad.norm())
    torch._dynamo.reset()


def test_a_distiller_is_copied_and_pickled():
    distiller = Distiller(*pair_of("gfl"), CrossKD()).train()
    expected = distiller(*batch_of())
    for twin in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        losses = twin(*batch_of())
        assert all(torch.equal(losses[name], expected[name]) for name in expected)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "changed", "message"), [
    ("gfl", {"num_classes": 4}, "5 classes and the student 4: give class_map="),
    ("gfl", {"reg_max": 8}, r"17 .teacher., 9 .student. bins"),
    ("gfl", {"anchor_generator": {**HEADS["gfl"]["anchor_generator"], "octave_base_scale": 4}},
     r"the first \[-32.0, .* .teacher., .* the first \[-16.0, .* .student."),
    ("retinanet", {"anchor_generator": {**HEADS["retinanet"]["anchor_generator"], "ratios": [1.0]}},
     r"\[2880, .* .teacher., \[960, .* .student."),
    ("atss", {"bbox_coder": {"type": "DeltaXYWHBBoxCoder", "target_stds": [1.0, 1.0, 1.0, 1.0]}},
     "box coding differs"),
    ("fcos", {"norm_on_bbox": True}, "box coding differs"),
    ("fcos", {"strides": [4, 8, 16, 32, 64]}, r"\[8.0, 16.0, .* .teacher., \[4.0, 8.0"),
    ("rtmdet", {"anchor_generator": {**HEADS["rtmdet"]["anchor_generator"], "offset": 0.5}},
     r"the first \[0.0, 0.0\] .teacher., .* the first \[4.0, 4.0\] .student."),
])  # fmt: skip
def test_mimicking_compares_rows_of_one_meaning_alone(family, changed, message):
    teacher = detector_of(head_settings(family))
    student = detector_of(head_settings(family, **changed))
    with pytest.raises(ValueError, match=message):
        Distiller(teacher, student, PredictionMimicking())(*batch_of())


def test_a_two_stage_detector():
    from mmdet.registry import MODELS
    from mmengine.hub import get_config

    config = get_config("mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py").model
    config.backbone.update(depth=18, init_cfg=None)
    config.neck.in_channels = [64, 128, 256, 512]
    detector = MODELS.build(config)
    with pytest.raises(TypeError, match="student: FasterRCNN is a detector of two stages"):
        Distiller(detector_of(head_settings("gfl")), detector, CrossKD())


def test_a_detector_that_is_not_mmdets_beside_one_that_is():
    with pytest.raises(TypeError, match="teacher: no adapter understands a Linear"):
        Distiller(nn.Linear(2, 2), detector_of(head_settings("gfl")), CrossKD())


def test_a_head_with_another_label_assignment():
    # PAA's is image after image, not level after level.
    training = HEADS["retinanet"]["train_cfg"]
    teacher = detector_of(head_settings("atss", type="PAAHead", train_cfg=training))
    with pytest.raises(
        ValueError, match="PAAHead.get_targets returns something else than that of a ATSSHead"
    ):
        Distiller(teacher, detector_of(head_settings("gfl")), CrossKD())(*batch_of())


def test_a_head_with_other_predictors():
    settings = head_settings("atss", type="VFNetHead")
    settings["anchor_generator"]["center_offset"] = 0.0
    del settings["loss_centerness"], settings["bbox_coder"]
    detector = detector_of(settings)
    with pytest.raises(ValueError, match="teacher: a VFNetHead has no atss_cls, atss_reg, atss_centerness"):
        Distiller(copy.deepcopy(detector), detector, CrossKD())


@pytest.mark.parametrize("levels", [[0, 1, 2, 3], [1, 2, 3, 4], [1, 2]])
def test_a_student_may_lack_some_of_the_teachers_levels(family, levels):
    strides = [STRIDES[level] for level in levels]
    changed = {"strides": strides} if family == "fcos" else {}
    if family == "fcos":
        ranges = [(-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8)]
        changed["regress_ranges"] = tuple(ranges[level] for level in levels)
    else:
        changed["anchor_generator"] = {**HEADS[family]["anchor_generator"], "strides": strides}
    student = detector_of(head_settings(family, **changed), SmallBackbone(strides), seed=2)
    distiller = Distiller(detector_of(head_settings(family), seed=1), student, CrossKD()).train()
    losses = distiller(*batch_of())
    assert all(loss.isfinite() for loss in losses.values())
    sum(loss for name, loss in losses.items() if name.startswith("kd_")).backward()
    assert all(level.weight.grad.abs().max() > 0 for level in student.backbone.levels)


def test_a_class_map_leaves_out_the_teachers_other_classes(family):
    teacher = detector_of(head_settings(family), seed=1)
    student = detector_of(head_settings(family, num_classes=2), seed=2)
    images, samples = batch_of()
    for sample in samples:
        sample.gt_instances.labels %= 2
    losses = Distiller(teacher, student, CrossKD(), class_map=[3, 1]).train()(images, samples)
    assert all(loss.isfinite() for loss in losses.values())


def test_a_head_without_sigmoid():
    softmax = {"type": "CrossEntropyLoss", "use_sigmoid": False}
    detector = detector_of(head_settings("retinanet", loss_cls=softmax))
    with pytest.raises(ValueError, match="teacher: RetinaHead predicts classes by a softmax"):
        Distiller(copy.deepcopy(detector), detector, CrossKD())


def test_a_student_that_cannot_assign_labels():
    teacher, student = detector_of(head_settings("gfl")), detector_of(head_settings("gfl", train_cfg=None))
    with pytest.raises(ValueError, match="the student's GFLHead was built without a train_cfg"):
        Distiller(teacher, student, CrossKD())(*batch_of())
    losses = Distiller(student, teacher, CrossKD())(*batch_of())  # a teacher need not
    assert losses["kd_cls"] > 0


def test_a_teacher_that_cannot_assign_labels_where_it_must():
    teacher = detector_of(head_settings("gfl", train_cfg=None))
    with pytest.raises(ValueError, match="the teacher's GFLHead was built without a train_cfg"):
        Distiller(teacher, detector_of(head_settings("fcos")), CrossKD())(*batch_of())
    # FCOS's assignment needs none.
    distiller = Distiller(
        detector_of(head_settings("fcos", train_cfg=None)), detector_of(head_settings("gfl")), CrossKD()
    )
    assert distiller(*batch_of())["kd_cls"] > 0


def test_a_backbone_of_other_levels():
    teacher = detector_of(head_settings("gfl"))
    student = detector_of(head_settings("gfl"), SmallBackbone(STRIDES[:4]))
    with pytest.raises(ValueError, match="gives 4 levels, its head has 5 strides"):
        Distiller(teacher, student, CrossKD())(*batch_of())
    student = detector_of(head_settings("gfl"), SmallBackbone([4, *STRIDES[1:]]))
    with pytest.raises(ValueError, match=r"student: the stride of level 0 is 8, but its map is \(32, 40\)"):
        Distiller(teacher, student, CrossKD())(*batch_of())


def test_a_student_with_other_towers_than_those_that_the_methods_were_set_up_for():
    teacher, student = pair_of("gfl")
    distiller = Distiller(teacher, student, CrossKD()).train()
    student.bbox_head.cls_convs = student.bbox_head.cls_convs[:3]
    with pytest.raises(ValueError, match="the student's bbox_head.cls_convs.* was replaced"):
        distiller(*batch_of())


def test_batches_that_are_not_mmdets():
    distiller = Distiller(*pair_of("gfl"), CrossKD()).train()
    images, samples = batch_of()
    with pytest.raises(ValueError, match="one tensor .batch, channels, height, width.*got list"):
        distiller(list(images), samples)
    with pytest.raises(ValueError, match="2 images but 1 data samples"):
        distiller(images, samples[:1])
    with pytest.raises(ValueError, match="must be a DetDataSample with gt_instances, got dict"):
        distiller(images, [{}, {}])
    samples[1].gt_instances.labels += CLASSES
    with pytest.raises(ValueError, match="data sample 1 has labels from .*predicts 5 classes"):
        distiller(images, samples)
    with pytest.raises(ValueError, match="boxes of shape"):
        distiller(images, samples_of([{"boxes": torch.zeros(2, 5), "labels": torch.zeros(2)}] * 2, SIZE))


def test_a_teacher_that_answers_not_a_number():
    teacher, student = pair_of("gfl")
    nn.init.constant_(teacher.bbox_head.gfl_cls.bias, math.nan)
    with pytest.raises(ValueError, match="got nan: look for predictions that are not finite"):
        Distiller(teacher, student, CrossKD())(*batch_of())
