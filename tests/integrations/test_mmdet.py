"""`CrossKDDetector`: the student's keys and modes, losses for mmengine, configs, checkpoints, errors."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from crosskd import CrossKD, Method, Schedule
from tests.helpers.mmdet_detr import settings_of
from tests.helpers.mmdet_heads import GFL, TESTING, batch_of, head_settings

pytestmark = pytest.mark.mmdet


def model_of(width: int = 32, **head: Any) -> dict[str, Any]:
    """A small GFL detector's config, of mmdet's own parts."""
    settings = {**copy.deepcopy(GFL), "in_channels": width, "feat_channels": width, **head}
    return {
        "type": "GFL",
        "data_preprocessor": {"type": "DetDataPreprocessor", "pad_size_divisor": 32},
        "backbone": {"type": "ResNet", "depth": 18, "norm_eval": True, "frozen_stages": 1},
        "neck": {
            "type": "FPN",
            "in_channels": [64, 128, 256, 512],
            "out_channels": width,
            "start_level": 1,
            "add_extra_convs": "on_output",
            "num_outs": 5,
        },
        "train_cfg": settings.pop("train_cfg"),
        "test_cfg": TESTING,
        "bbox_head": settings,
    }


def build(config: dict[str, Any]) -> Any:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import ConfigDict

    import crosskd.integrations.mmdet  # noqa: F401  # what custom_imports does in a config

    register_all_modules()
    return MODELS.build(ConfigDict(copy.deepcopy(config)))


def config_of(**changed: Any) -> dict[str, Any]:
    config = {"teacher": model_of(), "student": model_of(), "teacher_checkpoint": None, **changed}
    return {"type": "CrossKDDetector", **config}


@pytest.fixture
def detector() -> Any:
    built = build(config_of())
    built.init_weights()
    return built


def data_of(**options: Any) -> dict[str, Any]:
    """What a data loader hands over: raw images, and samples."""
    images, samples = batch_of(**options)
    return {"inputs": [(image * 50 + 100).clamp(0, 255).byte() for image in images], "data_samples": samples}


def step(detector: Any, data: dict[str, Any]) -> dict[str, float]:
    """One training step as mmengine's loop makes it; its log."""
    from mmengine.optim import OptimWrapper

    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3)
    return {k: float(v) for k, v in detector.train_step(data, OptimWrapper(optimizer)).items()}


# -- it is the student ----------------------------------------------------------------------------


def test_its_state_is_the_plain_students(detector):
    plain = build(model_of())
    assert list(detector.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in detector.named_parameters()] == [n for n, _ in plain.named_parameters()]
    plain.load_state_dict(detector.state_dict())
    images, samples = batch_of()
    detector.eval(), plain.eval()
    for ours, theirs in zip(
        detector.predict(images, copy.deepcopy(samples)), plain.predict(images, samples), strict=True
    ):
        assert torch.equal(ours.pred_instances.bboxes, theirs.pred_instances.bboxes)
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(
            itertools.chain(*detector(images, mode="tensor")),
            itertools.chain(*plain(images, mode="tensor")),
            strict=True,
        )
    )
    assert torch.equal(detector.extract_feat(images)[0], plain.extract_feat(images)[0])


def test_its_modes_are_the_students(detector):
    detector.train()
    assert detector.training
    assert detector.student.training
    assert detector.distiller.training
    assert not detector.backbone.layer2[0].bn1.training  # norm_eval
    assert not detector.backbone.layer1[0].conv1.weight.requires_grad  # frozen_stages
    assert not detector.teacher.training
    detector.eval()
    assert not detector.student.training
    assert not detector.distiller.training


def test_it_initialises_the_student_and_not_the_teacher():
    detector = build(config_of())
    teacher = copy.deepcopy(detector.teacher.state_dict())
    nn.init.zeros_(detector.bbox_head.gfl_cls.weight)
    detector.init_weights()
    assert detector.bbox_head.gfl_cls.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert all(torch.equal(value, teacher[key]) for key, value in detector.teacher.state_dict().items())


def test_student_teacher_and_methods_move_and_cast_together():
    detector = build(
        config_of(student=model_of(width=64), methods={"type": "CrossKD", "schedule": {"stop": 9}})
    )
    detector.to(torch.float64)
    parameters = [*detector.parameters(), *detector.teacher.parameters(), *detector.distiller.parameters()]
    assert {parameter.dtype for parameter in parameters} == {torch.float64}
    assert detector.distillation.progress is detector.distiller.progress


def test_a_deep_copy_as_for_ema_shares_nothing_with_it(detector):
    twin = copy.deepcopy(detector)
    assert twin.student.backbone is twin.backbone
    nn.init.zeros_(twin.bbox_head.gfl_cls.weight)
    assert twin.student.bbox_head.gfl_cls.weight.abs().max() == 0
    assert detector.bbox_head.gfl_cls.weight.abs().max() > 0


def test_layers_that_the_runner_replaces_are_trained():
    """Without several processes mmengine's Runner turns SyncBatchNorm into BatchNorm in any model."""
    from mmengine.model import revert_sync_batchnorm

    student = model_of(norm_cfg={"type": "SyncBN"})
    student["data_preprocessor"] |= {"mean": [0.0] * 3, "std": [255.0] * 3}
    teacher = copy.deepcopy(student)
    detector = build(config_of(student=student, teacher=teacher))
    detector.init_weights()
    before = detector.bbox_head.cls_convs[0].bn
    detector = revert_sync_batchnorm(detector)
    norm = detector.bbox_head.cls_convs[0].bn
    assert norm is not before
    weight = norm.weight.clone()
    step(detector.train(), data_of())
    assert norm.num_batches_tracked == 5  # once per level
    assert not torch.equal(norm.weight, weight)


def test_parameters_outside_of_any_layer_are_trained_and_saved():
    """A detection transformer holds the embedding of its levels itself."""
    model = {**settings_of("deformable_detr"), "type": "DeformableDETR"}
    model["backbone"] |= {"base_channels": 8, "out_indices": [1, 2, 3]}
    model["neck"] |= {"in_channels": [16, 32, 64]}
    detector = build(config_of(student=model, teacher=model, methods="QueryDistillation"))
    torch.manual_seed(0)
    for parameter in detector.parameters():  # as mmdet initialises them no gradient reaches the embedding
        nn.init.normal_(parameter, std=0.1)
    assert list(detector.state_dict()) == list(detector.student.state_dict())
    before = detector.level_embed.clone()
    assert step(detector.train(), data_of())["loss_kd_cls"] > 0
    assert detector.level_embed is detector.student.level_embed
    assert not torch.equal(detector.level_embed, before)
    twin = copy.deepcopy(detector).to(torch.float64)
    assert twin.level_embed is twin.student.level_embed
    assert twin.level_embed.dtype == torch.float64
    assert detector.level_embed.dtype == torch.float32


# -- training -------------------------------------------------------------------------------------


def test_mmengine_sums_all_losses_and_trains_the_student(detector):
    detector.train()
    before = detector.bbox_head.gfl_cls.weight.clone()
    teacher = copy.deepcopy(detector.teacher.state_dict())
    log = step(detector, data_of())
    named = {"loss_cls", "loss_bbox", "loss_dfl", "loss_kd_cls", "loss_kd_reg"}
    assert log.keys() == named | {"loss"}
    assert log["loss"] == pytest.approx(sum(log[name] for name in named), rel=1e-5)
    assert min(log["loss_kd_cls"], log["loss_kd_reg"]) > 0
    assert not torch.equal(detector.bbox_head.gfl_cls.weight, before)
    assert all(torch.equal(value, teacher[key]) for key, value in detector.teacher.state_dict().items())


def test_projections_are_trained_and_saved_apart_from_the_students_keys(tmp_path):
    from mmengine.runner import load_checkpoint, save_checkpoint

    detector = build(config_of(student=model_of(width=64)))
    extra = {key for key in detector.state_dict() if key.startswith("distillation.")}
    projections = "distillation.methods.crosskd.projections"  # as in checkpoints of earlier versions
    assert extra == {
        f"{projections}.{branch}.convolution.weight" for branch in ("classification", "regression")
    }
    weight = next(p for name, p in detector.named_parameters() if name.startswith("distillation."))
    before = weight.clone()
    step(detector.train(), data_of())
    assert not torch.equal(weight, before)
    save_checkpoint({"state_dict": detector.state_dict()}, str(tmp_path / "student.pth"))
    plain = build(model_of(width=64))
    load_checkpoint(plain, str(tmp_path / "student.pth"))
    assert torch.equal(plain.bbox_head.gfl_cls.weight, detector.bbox_head.gfl_cls.weight)
    # It may be the next student's teacher.
    next_one = build(config_of(teacher=model_of(width=64), teacher_checkpoint=tmp_path / "student.pth"))
    assert torch.equal(next_one.teacher.bbox_head.gfl_cls.weight, plain.bbox_head.gfl_cls.weight)


def test_a_schedule_in_epochs_follows_the_runner():
    from mmengine.logging import MessageHub

    methods = [{"type": "CrossKD", "schedule": {"stop": 1, "unit": "epoch"}}, {"type": "PredictionMimicking"}]
    detector = build(config_of(methods=methods)).train()
    images, samples = batch_of(images=1)
    hub = MessageHub.get_current_instance()
    try:
        hub.update_info("epoch", 0)
        assert detector.loss(images, samples)["loss_crosskd_kd_cls"] > 0
        hub.update_info("epoch", 1)
        losses = detector.loss(images, samples)
        assert losses["loss_crosskd_kd_cls"] == 0
        assert losses["loss_mimicking_kd_cls"] > 0
    finally:
        hub.pop_info("epoch")
    assert detector.state_dict()["distillation.progress"].tolist() == [2, 1]


# -- configs --------------------------------------------------------------------------------------


def test_settings_reach_the_method():
    methods = [{"type": "CrossKD", "position": 2, "cls_weight": 0.5}, CrossKD(position=1, name="early")]
    detector = build(config_of(methods=methods, unlabelled_threshold=0.3))
    assert [m.position for m in detector.distiller.methods.values()] == [2, 1]
    assert detector.distiller.methods["crosskd"].comparison.cls_weight == 0.5
    assert detector.distiller.unlabelled_threshold == 0.3
    assert [m.position for m in build(config_of()).distiller.methods.values()] == [3]  # as published


def test_the_teacher_calculates_in_a_type_that_the_config_names():
    detector = build(config_of(teacher_dtype="bfloat16", prove=False)).train()
    types = []
    detector.teacher.bbox_head.gfl_cls.register_forward_hook(lambda _, __, out: types.append(out.dtype))
    images, samples = batch_of(images=1)
    assert detector.loss(images, samples)["loss_kd_cls"] > 0
    assert types == 5 * [torch.bfloat16] + 5 * [torch.float32]  # its own levels, and the student's features
    with pytest.raises(ValueError, match=r"torch.bfloat16 or torch.float16, got bf16"):
        build(config_of(teacher_dtype="bf16"))


def test_methods_are_named_as_words_or_dicts():
    methods = ["PKD", {"type": "CWD", "weight": 2.0, "schedule": {"stop": 1, "unit": "epoch"}}]
    detector = build(config_of(methods=methods))
    made = detector.distiller.methods
    assert [type(method).__name__ for method in made.values()] == ["PKD", "CWD"]
    assert made["cwd"].weight == 2.0
    assert made["cwd"].schedule == Schedule(stop=1, unit="epoch")


def test_a_method_of_ones_own_is_found_in_mmdets_registry():
    from mmdet.registry import MODELS

    class Nothing(Method):
        def __init__(self) -> None:
            super().__init__(name="nothing")

        def forward(self, step):
            return {"kd_nothing": step.student.predictions.logits.sum() * 0}

    MODELS.register_module(module=Nothing)
    try:
        detector = build(config_of(methods={"type": "Nothing"}))
        assert isinstance(detector.distiller.methods["nothing"], Nothing)
    finally:
        MODELS._module_dict.pop("Nothing")
    with pytest.raises(ValueError, match="'FPN' is no method .* CrossKD, .*mmdet's MODELS"):
        build(config_of(methods={"type": "FPN"}))
    with pytest.raises(ValueError, match="'Unknown' is no method"):
        build(config_of(methods={"type": "Unknown"}))


def test_models_are_given_in_any_form(tmp_path):
    from mmengine.config import Config

    path = tmp_path / "student.py"
    Config({"model": model_of(), "lr": 1}).dump(path)
    for student in (path, str(path), {"model": model_of()}):
        assert build(config_of(student=student)).bbox_head.num_classes == 5
    with pytest.raises(ValueError, match=r"student: expected a model's config.*got the keys \['lr'\]"):
        build(config_of(student={"lr": 1}))


def test_a_preprocessor_may_stand_beside_the_student():
    student = model_of()
    preprocessor = {"type": "DetDataPreprocessor", "pad_value": 7}
    assert build(config_of(student=student, data_preprocessor=preprocessor)).data_preprocessor.pad_value == 0
    student.pop("data_preprocessor")
    assert build(config_of(student=student, data_preprocessor=preprocessor)).data_preprocessor.pad_value == 7


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture
def teacher_file(tmp_path) -> Path:
    """A teacher's checkpoint, as mmengine writes it."""
    from mmengine.runner import save_checkpoint

    path = tmp_path / "teacher.pth"
    save_checkpoint({"meta": {"epoch": 1}, "state_dict": build(model_of()).state_dict()}, str(path))
    return path


def test_the_teachers_weights_are_loaded(teacher_file):
    detector = build(config_of(teacher_checkpoint=str(teacher_file)))
    saved = torch.load(teacher_file, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[key]) for key, value in detector.teacher.state_dict().items())


def test_no_checkpoint_is_an_error_unless_said():
    config = config_of()
    del config["teacher_checkpoint"]
    with pytest.raises(ValueError, match="teacher_checkpoint is missing"):
        build(config)


def test_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.pth"):
        build(config_of(teacher_checkpoint=tmp_path / "no.pth"))


@pytest.mark.parametrize(("teacher", "message"), [
    (model_of(stacked_convs=3), r"0 keys missing .*6 unknown \['bbox_head.cls_convs.3"),
    (model_of(stacked_convs=5), r"6 keys missing \['bbox_head.cls_convs.4.*0 unknown"),
    (model_of(num_classes=4), r"2 of another shape \['bbox_head.gfl_cls.bias \(5,\) in the file, \(4,\)"),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit_names_the_keys(teacher_file, teacher, message):
    with pytest.raises(ValueError, match=message):
        build(config_of(teacher=teacher, teacher_checkpoint=teacher_file))


def test_a_pair_that_cannot_be_distilled_is_refused_when_it_is_built():
    mimicking = {"type": "PredictionMimicking"}
    with pytest.raises(ValueError, match="teacher predicts 4 classes and the student 5"):
        build(config_of(teacher=model_of(num_classes=4), methods=mimicking))


def test_a_teacher_of_another_family_and_of_other_classes():
    teacher = model_of(num_classes=7)
    teacher["type"] = "SingleStageDetector"
    teacher["bbox_head"] = head_settings("atss", num_classes=7)
    teacher["train_cfg"] = teacher["bbox_head"].pop("train_cfg")
    teacher["test_cfg"] = teacher["bbox_head"].pop("test_cfg")
    log = step(build(config_of(teacher=teacher)).train(), data_of())
    assert min(log["loss_kd_cls"], log["loss_kd_reg"], log["loss_kd_quality"]) > 0


def test_a_two_stage_teacher_is_refused_when_it_is_built():
    from mmengine.hub import get_config

    # By name, as mmdet's own configs are given; without the download of its backbone.
    config = get_config("mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py")
    config.model.backbone.init_cfg = None
    with pytest.raises(TypeError, match="two stages"):
        build(config_of(teacher=config))
    with pytest.raises(TypeError, match="two stages"):
        build(config_of(teacher=model_of(), student="mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"))
