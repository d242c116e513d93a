"""Recipes under mmdet's own Runner and tools, on a few small images of blood cells."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.helpers import forked, mmdet_process
from tests.helpers.mmdet_recipes import FOLDER, as_arguments, load_recipe, small_bccd
from tests.helpers.reference_files import bccd_folder

pytestmark = [pytest.mark.mmdet, pytest.mark.slow, pytest.mark.usefixtures("frozen_objects")]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """On a machine that other work keeps busy, threads that wait for one another take twice the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def _configs_as_they_are():
    """A Runner lays its config out by yapf at every checkpoint, which takes longer than to train here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mmengine.config.config.FormatCode", lambda text, **style: (text, False))
        yield


@pytest.fixture(scope="module")
def bccd() -> Path:
    return bccd_folder()


def config_of(name: str, folder: Path, options: dict):
    """A recipe's config that works in a folder of its own, under a name that no other run has."""
    return load_recipe(name, {"work_dir": str(folder), "experiment_name": str(folder), **options})


def trained(config, *hooks):
    """The Runner, after it has trained."""
    from mmengine.runner import Runner

    runner = Runner.from_cfg(config)
    for hook in hooks:
        runner.register_hook(hook)
    runner.train()
    return runner


def loss_curve(runner) -> list[float]:
    return runner.message_hub.get_scalar("train/loss").data[0].tolist()


def assert_same_state(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    different = [
        key for key in left if not torch.equal(torch.as_tensor(left[key]), torch.as_tensor(right[key]))
    ]
    assert different == []


def saved_by_mmengine(path: Path) -> dict:
    """What mmengine saved, by the loader that the adapter gives it."""
    from mmengine.runner import CheckpointLoader

    import crosskd.integrations.mmdet  # noqa: F401

    return CheckpointLoader.load_checkpoint(str(path), map_location="cpu")


def stopping_hook(epoch: int, iteration: int):
    """A hook that ends a run in the middle of an epoch, as Ctrl-C does."""
    from mmengine.hooks import Hook

    class Stop(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if (runner.epoch, batch_idx) == (epoch, iteration):
                raise KeyboardInterrupt

    return Stop()


@pytest.fixture(scope="module")
def teacher_checkpoint(bccd, tmp_path_factory) -> Path:
    """What mmdet's Runner saves of the recipe's teacher, trained by itself."""
    folder = tmp_path_factory.mktemp("teacher")
    config = config_of("gfl_r18_from_r50", folder, {**small_bccd(bccd), "train_cfg.max_epochs": 1})
    config.model = config.model.teacher
    trained(config)
    return folder / "epoch_1.pth"


def test_two_epochs_stopped_and_resumed_end_as_unbroken(bccd, teacher_checkpoint, tmp_path):
    """With averaged weights (EMA); what is saved is tested under the plain student's config."""
    from mmengine.runner import Runner

    options = {
        **small_bccd(bccd),
        "model.teacher_checkpoint": str(teacher_checkpoint),
        "custom_hooks": [{"type": "EMAHook", "momentum": 0.1}],
    }
    unbroken = trained(config_of("gfl_r18_from_r50", tmp_path / "unbroken", options))
    losses = loss_curve(unbroken)
    assert len(losses) == 12
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])

    with pytest.raises(KeyboardInterrupt):
        trained(config_of("gfl_r18_from_r50", tmp_path / "stopped", options), stopping_hook(1, 3))
    resumed = trained(config_of("gfl_r18_from_r50", tmp_path / "stopped", {**options, "resume": True}))
    assert loss_curve(resumed) == losses
    ends = [saved_by_mmengine(tmp_path / run / "epoch_2.pth") for run in ("unbroken", "stopped")]
    for part in ("state_dict", "ema_state_dict"):
        assert_same_state(ends[0][part], ends[1][part])
    averaged, last = ends[0]["state_dict"], ends[0]["ema_state_dict"]
    key = "bbox_head.gfl_cls.weight"
    assert not torch.equal(averaged[key], last[f"module.{key}"])

    config = config_of("gfl_r18_from_r50", tmp_path / "plain", small_bccd(bccd))
    config.model = config.model.student
    config.load_from = str(tmp_path / "unbroken" / "epoch_2.pth")
    plain = Runner.from_cfg(config)
    measured = plain.test()
    assert list(plain.model.state_dict()) == list(averaged)
    assert_same_state(plain.model.state_dict(), averaged)
    assert "coco/bbox_mAP" in measured
    history = unbroken.message_hub.log_scalars
    for name, value in measured.items():
        assert history[f"val/{name}"].current() == pytest.approx(value, abs=1e-6)


def tool(name: str, output: Path, *arguments: str) -> str:
    """Runs one of mmdet's installed tools; what it printed. In a fork, for importing mmdet takes longest."""
    import mmdet

    script = Path(mmdet.__file__).parent / ".mim" / "tools" / name
    with output.open("w") as file:
        ended = forked.run(["python", str(script), *arguments], check=False, stdout=file, stderr=file)
    printed = output.read_text()
    assert ended.returncode == 0, printed[-6000:]
    return printed


def test_mmdets_tools_train_resume_and_test_by_options_alone(bccd, tmp_path):
    recipe, work = FOLDER / "retinanet_r18_from_r50.py", ("--work-dir", str(tmp_path))
    weights_off = {"model.teacher_checkpoint": None}
    for side in ("teacher", "student"):
        weights_off[f"model.{side}.backbone.init_cfg"] = None
    options = as_arguments({**weights_off, **small_bccd(bccd)})
    log = tmp_path / "printed.txt"
    tool("train.py", log, str(recipe), *work, "--cfg-options", *options, "train_cfg.max_epochs=1")
    shown = tool("train.py", log, str(recipe), *work, "--resume", "--cfg-options", *options)
    losses = [float(loss) for loss in re.findall(r"Epoch\(train\) \[2\].* loss: ([\d.]+)", shown)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert "loss_kd_cls" in shown
    assert "resumed epoch: 1" in shown

    plain = tmp_path / "plain.py"
    plain.write_text(
        '_base_ = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"\n'
        'custom_imports = dict(imports=["crosskd.integrations.mmdet"], allow_failed_imports=False)\n'
    )
    tested = tool(
        *("test.py", log, str(plain), str(tmp_path / "epoch_2.pth"), "--work-dir", str(tmp_path / "plain")),
        *("--cfg-options", "model.backbone.init_cfg=None", *as_arguments(small_bccd(bccd, ("model",)))),
    )
    assert "coco/bbox_mAP" in tested
    assert "do not match" not in tested
    validated = re.findall(r"coco/bbox_mAP: ([\d.]+)", shown)[-1]
    assert re.findall(r"coco/bbox_mAP: ([\d.]+)", tested) == [validated]


def test_two_processes_end_with_the_same_student(bccd, tmp_path):
    options = {
        **small_bccd(bccd),
        "train_cfg.max_epochs": 1,
        "train_dataloader.batch_size": 2,
        "train_dataloader.dataset.indices": 8,
        "val_dataloader.dataset.indices": 2,
        "launcher": "pytorch",
        "model_wrapper_cfg": {"type": "MMDistributedDataParallel", "device_ids": None},
    }
    config = config_of("gfl_r18_from_r50", tmp_path / "run", options)
    config.dump(tmp_path / "config.py")
    assert forked.on_ranks(mmdet_process.main, str(tmp_path / "config.py")) == [0, 0]
    saved = saved_by_mmengine(tmp_path / "run" / "epoch_1.pth")
    assert saved["meta"]["iter"] == 2
    assert not any("teacher" in key or key.startswith("module.") for key in saved["state_dict"])


def test_a_step_under_mmengines_mixed_precision(bccd, tmp_path, monkeypatch):
    """mmengine asks for a GPU before it wraps; what it then does to a step is done here on the CPU."""
    from mmengine.optim.optimizer import amp_optimizer_wrapper
    from mmengine.runner import Runner

    monkeypatch.setattr(amp_optimizer_wrapper, "is_cuda_available", lambda: True)
    options = {
        **small_bccd(bccd),
        "optim_wrapper.type": "AmpOptimWrapper",
        "optim_wrapper.dtype": "bfloat16",
        "train_dataloader.batch_size": 1,
        "train_dataloader.dataset.indices": 1,
        "train_dataloader.dataset.pipeline.2.scale": (64, 64),
    }
    runner = Runner.from_cfg(config_of("gfl_r18_from_r50", tmp_path, options))
    model = runner.model.train()
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    (data,) = runner.build_dataloader(runner._train_dataloader)
    features = []
    model.backbone.register_forward_hook(lambda module, inputs, maps: features.extend(maps))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    losses = model.train_step(data, runner.optim_wrapper)
    assert {feature.dtype for feature in features} == {torch.bfloat16}
    assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    moved = model.state_dict()["bbox_head.gfl_cls.weight"]
    assert not torch.equal(moved, before["bbox_head.gfl_cls.weight"])
