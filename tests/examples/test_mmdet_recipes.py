"""Each recipe for mmdet is built and trained for a step, from random weights on small images."""

from __future__ import annotations

import re

import pytest
import torch

from tests.helpers.mmdet_recipes import FOLDER, RECIPES, load_recipe, mmdet_batch

pytestmark = pytest.mark.mmdet


@pytest.fixture(autouse=True)
def _mmdet_scope():
    """The scope that an mmdet config's Runner works in."""
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")


def without_scopes(value):
    """A part of a config without the package's name that mmengine adds to what comes from a package."""
    if isinstance(value, dict):
        return {key: without_scopes(part) for key, part in value.items() if key != "_scope_"}
    return [without_scopes(part) for part in value] if isinstance(value, list) else value


def plain_student(config):
    from mmdet.registry import MODELS

    return MODELS.build(config.model.student)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_a_step(name):
    from mmdet.registry import MODELS
    from mmengine.optim import build_optim_wrapper

    config, batch = load_recipe(name), mmdet_batch()
    detector = MODELS.build(config.model).train()
    optimizer = build_optim_wrapper(detector, config.optim_wrapper)
    teacher = {key: value.clone() for key, value in detector.teacher.state_dict().items()}
    before = {key: value.clone() for key, value in detector.state_dict().items()}

    losses = detector.train_step(batch, optimizer)

    assert {"loss", "loss_cls", "loss_bbox", "loss_kd_cls", "loss_kd_reg"} <= losses.keys()
    assert ("loss_kd_quality" in losses) == name.startswith("atss")
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["loss"].item() == pytest.approx(
        sum(loss.item() for key, loss in losses.items() if key.startswith("loss_")), rel=1e-5
    )
    after = detector.state_dict()
    for part in ("backbone", "neck", "bbox_head"):
        assert any(not torch.equal(after[key], before[key]) for key in after if key.startswith(part)), part
    assert all(torch.equal(value, teacher[key]) for key, value in detector.teacher.state_dict().items())

    student = plain_student(config)
    assert list(after) == list(student.state_dict())
    student.load_state_dict(after, strict=True)
    for model in (student, detector):
        model.eval()
    theirs, ours = (model.test_step(batch) for model in (detector, student))
    for left, right in zip(theirs, ours, strict=True):
        assert torch.equal(left.pred_instances.bboxes, right.pred_instances.bboxes)
        assert torch.equal(left.pred_instances.scores, right.pred_instances.scores)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_agrees_with_what_mmdet_publishes(name):
    from mmengine.config import Config
    from mmengine.hub import get_config

    source = (FOLDER / f"{name}.py").read_text()
    base = re.search(r'^_base_ = "(mmdet::.*)"$', source, re.MULTILINE)[1]
    teacher = re.search(r'teacher=get_config\("(mmdet::.*)"\)', source)[1]
    recipe, plain = (
        without_scopes(config.to_dict())
        for config in (Config.fromfile(FOLDER / f"{name}.py"), get_config(base))
    )
    model = recipe.pop("model")
    assert recipe.pop("custom_imports")["imports"] == ["crosskd.integrations.mmdet"]
    assert model["student"]["bbox_head"] == plain.pop("model")["bbox_head"]
    assert recipe == plain  # data, schedule and optimizer are those of the student's own config
    assert model["teacher"] == get_config(teacher).model.to_dict()
    if "swin" in teacher:  # mmdet publishes no weights for it
        assert model["teacher_checkpoint"] == f"work_dirs/{teacher.split('/')[1][:-3]}/epoch_12.pth"
    else:
        assert model["teacher_checkpoint"] == get_config(teacher, pretrained=True).model_path


def test_a_config_of_ones_own_goes_on_from_a_recipe(tmp_path):
    """The lines that docs/mmdet.md shows."""
    from mmengine.config import Config

    page = (FOLDER.parents[1] / "docs" / "mmdet.md").read_text()
    shown, plain = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for block in (shown, plain):
        (tmp_path / "own.py").write_text(block.replace("examples/mmdet", str(FOLDER)))
        config = Config.fromfile(tmp_path / "own.py")
        assert config.train_cfg.max_epochs == 12
        if block is shown:
            assert [hook.type for hook in config.custom_hooks] == ["EMAHook"]
            assert config.model.methods == {"type": "CrossKD", "position": 2}
            recipe = Config.fromfile(FOLDER / "gfl_r50_from_r101.py")
            assert config.model.teacher == recipe.model.teacher
            assert config.model.teacher_checkpoint == recipe.model.teacher_checkpoint
        else:
            assert config.model.type == "GFL"
