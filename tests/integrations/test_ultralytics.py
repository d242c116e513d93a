"""`trainer`: ultralytics' own training with a teacher; those that train are slow and use real images."""

from __future__ import annotations

import copy
import csv
import json
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from crosskd import PKD, CrossKD, PredictionMimicking, Schedule
from tests.benchmarks.test_benchmarks import load
from tests.helpers.packages import package
from tests.helpers.reference_files import bccd_folder
from tests.helpers.yolo import batch_of, model_of

pytestmark = pytest.mark.ultralytics
ROOT = Path(__file__).parents[2]
NAMES = {0: "RBC", 1: "WBC", 2: "Platelets"}
SETTINGS = {"imgsz": 64, "batch": 4, "device": "cpu", "workers": 0, "plots": False, "optimizer": "SGD"}


def trainer_of(teacher: Any, *methods: Any, **options: Any) -> Any:
    from crosskd.integrations.ultralytics import trainer

    return trainer(teacher, list(methods) or None, **options)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight real images of blood cells, four of them to validate on, as ultralytics reads them."""
    source, folder = bccd_folder(), tmp_path_factory.mktemp("bccd")
    coco = json.loads((source / "annotations" / "train.json").read_text())
    for number, image in enumerate(coco["images"][:12]):
        split = "train" if number < 8 else "val"
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        (folder / "images" / split / image["file_name"]).symlink_to(source / "images" / image["file_name"])
        objects = [one for one in coco["annotations"] if one["image_id"] == image["id"]]
        rows = load("yolo_bccd").as_yolo_rows(objects, image)
        (folder / "labels" / split / f"{Path(image['file_name']).stem}.txt").write_text("\n".join(rows))
    file = folder / "data.yaml"
    file.write_text(
        f"path: {folder}\ntrain: images/train\nval: images/val\nnames: {json.dumps(list(NAMES.values()))}\n"
    )
    return file


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as ultralytics writes them, its teacher wider than the student."""
    from ultralytics import YOLO

    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    yolo = YOLO("yolo11s.yaml")
    yolo.model = model_of("yolo11n", width=0.375, seed=1)
    yolo.save(path)
    return path


def log_of(folder: Path) -> list[dict[str, float]]:
    """What results.csv says of each epoch."""
    with (folder / "results.csv").open() as lines:
        return [{name.strip(): float(value) for name, value in row.items()} for row in csv.DictReader(lines)]


def assert_plain(checkpoint: Path) -> None:
    """No class or function that a checkpoint is pickled with is of this package's."""
    with zipfile.ZipFile(checkpoint) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        pickled = archive.read(name)
    used = {argument for code, argument, _ in pickletools.genops(pickled) if code.name == "GLOBAL"}
    assert "ultralytics.nn.tasks DetectionModel" in used
    assert not [one for one in used if "crosskd" in one]


def run_python(code: str, **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# -- settings -------------------------------------------------------------------------------------


def test_each_call_gives_a_class_of_its_own():
    from ultralytics import YOLO
    from ultralytics.models.yolo.detect import DetectionTrainer

    teacher = model_of("yolo11n")
    one, other = trainer_of(teacher), trainer_of("yolo11x.pt", CrossKD(position=2), class_map=[0])
    assert issubclass(one, DetectionTrainer)
    assert one.settings.teacher is teacher
    assert (other.settings.teacher, other.settings.options) == ("yolo11x.pt", {"class_map": [0]})
    yolo = YOLO("yolo11n.yaml")
    assert trainer_of(yolo).settings.teacher is yolo.model


def test_teachers_and_options_that_are_refused():
    from crosskd.integrations.ultralytics import CrossKDTrainer

    with pytest.raises(TypeError, match="no adapter understands a Linear"):
        trainer_of(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"trainer\(\) got position, but takes teacher_adapter, class_map"):
        trainer_of("teacher.pt", position=2)
    with pytest.raises(TypeError, match="CrossKDTrainer has no teacher"):
        CrossKDTrainer()


def test_options_of_ultralytics_that_do_not_go_together(tmp_path, data):
    kind = trainer_of(model_of("yolo11n"))
    reasons = {
        "compile": "can't go together",
        "distill_model": "can't go together",
        "classes": "the teacher goes on teaching all",
    }
    for option in ({"compile": True}, {"distill_model": "yolo11s.pt"}, {"classes": [0]}):
        overrides = {
            "model": "yolo11n.yaml",
            "data": str(data),
            "project": str(tmp_path),
            **SETTINGS,
            **option,
        }
        name = next(iter(option))
        with pytest.raises(ValueError, match=f"{name}=.* {reasons[name]}"):
            kind(overrides=overrides)


def test_checkpoints_are_read_without_running_what_they_say(tmp_path, teacher_file):
    from crosskd.integrations.ultralytics import _load

    class Harmful:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "harm",)

    file = tmp_path / "harmful.pt"
    torch.save({"model": Harmful()}, file)
    with pytest.raises(Exception, match=r"(?i)unsupported|weights_only|blocked|support"):
        _load(str(file))
    assert not (tmp_path / "harm").exists()
    torch.save({"model": None}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="holds no model"):
        _load(str(tmp_path / "empty.pt"))
    with pytest.raises(FileNotFoundError):
        _load(str(tmp_path / "gone.pt"))
    model = _load(str(teacher_file))
    assert next(model.parameters()).dtype == torch.float32


def test_methods_are_named_as_words_or_dicts():
    teacher = model_of("yolo11n")
    pkd, cwd = trainer_of(teacher, "PKD", {"type": "CWD", "schedule": {"stop": 9}}).settings.methods
    assert [type(method).__name__ for method in (pkd, cwd)] == ["PKD", "CWD"]
    assert cwd.schedule == Schedule(stop=9)
    assert [type(method) for method in trainer_of(teacher).settings.methods] == [CrossKD]
    with pytest.raises(ValueError, match="'Unknown' is no method"):
        trainer_of(teacher, "Unknown")


# -- the model while it is trained ----------------------------------------------------------------


def distilled(*methods: Any, student: Any = None, **options: Any) -> Any:
    from ultralytics.cfg import get_cfg

    from crosskd.integrations.ultralytics import Settings, _distil

    student = student or model_of("yolo11n")
    student.args = get_cfg()
    teacher = model_of("yolo11n", width=0.25, seed=1)
    _distil(student, teacher, Settings(teacher, list(methods) or CrossKD(), options), torch.device("cpu"))
    return student


def test_copies_of_it_are_the_plain_student():
    from ultralytics.nn.tasks import DetectionModel

    from crosskd.integrations.ultralytics import _undo

    student = distilled()
    plain = model_of("yolo11n")
    plain.args = student.args
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert type(other) is DetectionModel
        assert list(other.state_dict()) == list(plain.state_dict())
        assert vars(other).keys() == vars(plain).keys()
    assert any(name.startswith("distillation.") for name in student.state_dict())
    student.load_state_dict(plain.state_dict())
    _undo(student)
    assert type(student) is DetectionModel
    assert vars(student).keys() == vars(plain).keys()
    assert list(student.state_dict()) == list(plain.state_dict())


def test_modes_follow_and_eval_distils_nothing():
    student = distilled()
    images, targets = batch_of()
    batch = {"img": images, **targets}
    losses, logged = student(batch)
    assert list(logged) == ["box_loss", "cls_loss", "dfl_loss", "kd_cls", "kd_reg"]
    torch.testing.assert_close(torch.stack(list(logged.values())) * 2, losses.detach())
    student.eval()
    assert not student.distiller.training
    losses, logged = student(batch)
    assert list(logged) == ["box_loss", "cls_loss", "dfl_loss"]
    student.train()
    assert student.distiller.training
    assert not student.distiller.teacher.training


def test_the_teacher_may_calculate_in_half_precision():
    trainer_of("yolo11x.pt", teacher_dtype=torch.bfloat16)
    images, targets = batch_of()
    seen: dict[Any, list[torch.dtype]] = {}
    for given in (None, torch.bfloat16):
        student = distilled(teacher_dtype=given)
        teacher = student.distiller.teacher
        seen[given] = []
        # The last layer before the head; the first comparison of the pieces runs without autocast.
        teacher.model[-2].register_forward_hook(lambda m, i, o, to=seen[given]: to.append(o.dtype))
        losses, _ = student({"img": images, **targets})
        assert torch.isfinite(losses).all()
        assert losses.dtype == torch.float32
    assert set(seen[None]) == {torch.float32}
    assert seen[torch.bfloat16][-1] == torch.bfloat16


def special(**functions: Any) -> Any:
    """A student of a class of the user's own."""
    student = model_of("yolo11n")
    student.__class__ = type("Special", (type(student),), functions)
    return student


def test_a_class_of_ones_own_stays_and_is_a_students_again_in_the_end():
    from crosskd.integrations.ultralytics import _undo

    student = special(hello=lambda self: "hello")
    own = type(student)
    distilled(student=student)
    images, targets = batch_of()
    losses, _ = student({"img": images, **targets})
    assert len(losses) == 5
    assert student.hello() == "hello"
    assert type(copy.deepcopy(student)) is own
    _undo(student)
    assert type(student) is own


def test_a_loss_of_ones_own_is_refused():
    def loss(self: Any, batch: Any, preds: Any = None) -> Any:
        losses, logged = super(own, self).loss(batch, preds)
        return 100 * losses, logged

    student = special(loss=loss)
    own = type(student)
    distilled(student=student)
    images, targets = batch_of()
    with pytest.raises(ValueError, match=r"student: Special's own forward.*box_loss is .* alone"):
        student({"img": images, **targets})


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("kind", ["yolo11n", "yolo26n"])
def test_the_first_step_compares_it_with_its_own_forward_once(monkeypatch, kind, amp):
    from crosskd import distiller as module

    compared = []
    prove = module.prove_student

    def record(adapter: Any, images: Any, targets: Any) -> None:
        compared.append(type(adapter.detector).__mro__[1].__name__)
        prove(adapter, images, targets)

    monkeypatch.setattr(module, "prove_student", record)
    images, targets = batch_of()
    batch = {"img": images, **targets}
    student = distilled(PKD(), student=model_of(kind))
    averaged = copy.deepcopy(student)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        student.eval()(batch)
        averaged(batch)
        assert compared == []
        for _ in range(2):
            losses, _ = student.train()(batch)
            assert losses.isfinite().all()
    assert compared == ["_DistilledModel"]


def test_its_extras_come_back():
    student = distilled(CrossKD(schedule=Schedule(warmup=5)))
    student.distiller.progress[0] = 7
    extras = copy.deepcopy(student.extras())
    other = distilled(CrossKD(schedule=Schedule(warmup=5)))
    other.load_extras(extras)
    assert other.distiller.progress[0] == 7
    for name, value in other.distiller.methods.state_dict().items():
        assert torch.equal(value, extras["methods"][name])


# -- training -------------------------------------------------------------------------------------


class StopError(Exception):
    """Ends a run in the middle."""


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed(tmp_path, data, teacher_file):
    from ultralytics import YOLO
    from ultralytics.nn.tasks import DetectionModel

    def stop(trainer: Any) -> None:
        if trainer.epoch == 1:
            raise StopError

    kind = trainer_of(str(teacher_file), CrossKD(schedule=Schedule(warmup=3)), PredictionMimicking())
    yolo = YOLO("yolo11n.yaml")
    yolo.add_callback("on_train_epoch_start", stop)
    with pytest.raises(StopError):
        yolo.train(data=str(data), trainer=kind, epochs=2, project=str(tmp_path), name="run", **SETTINGS)
    folder = tmp_path / "run"
    assert type(yolo.trainer.model) is DetectionModel
    last, extras = folder / "weights" / "last.pt", folder / "weights" / "distillation.pt"
    assert_plain(last)
    saved = torch.load(extras, weights_only=True)
    assert (saved["epoch"], saved["progress"].tolist()) == (0, [2, 0])

    moved = extras.rename(tmp_path / "moved.pt")
    with pytest.raises(ValueError, match=r"can't be resumed without distillation.pt"):
        YOLO(last).train(resume=True, trainer=kind, device="cpu")
    moved.rename(extras)
    resumed = YOLO(last)
    resumed.train(resume=True, trainer=kind, device="cpu")
    log = log_of(folder)
    assert [row["epoch"] for row in log] == [1, 2]
    names = ("crosskd_kd_cls", "crosskd_kd_reg", "mimicking_kd_cls", "mimicking_kd_reg")
    assert all(row[f"train/{name}"] > 0 for row in log for name in names)
    assert not any(name.startswith("val/") and "kd_" in name for name in log[0])
    saved = torch.load(extras, weights_only=True)
    assert (saved["epoch"], saved["progress"].tolist()) == (1, [4, 1])
    assert type(resumed.model) is DetectionModel
    assert not [name for name in resumed.model.state_dict() if "distillation" in name]
    for checkpoint in (last, folder / "weights" / "best.pt"):
        assert_plain(checkpoint)
    # The file loads where this package is not installed at all.
    image = next((data.parent / "images" / "val").iterdir())
    shown = run_python(
        "import sys; sys.modules['crosskd'] = None\n"
        "from ultralytics import YOLO\n"
        f"yolo = YOLO({str(last)!r}); yolo.predict({str(image)!r}, imgsz=64, device='cpu', verbose=False)\n"
        "print(type(yolo.model).__name__, sorted(yolo.names.values()))"
    )
    assert f"DetectionModel {sorted(NAMES.values())}" in shown


@pytest.mark.slow
def test_an_end_to_end_student_trains_and_exports(tmp_path, data):
    from ultralytics import YOLO

    yolo = YOLO("yolo26n.yaml")
    teacher = model_of("yolo26n", width=0.375, seed=1)
    before = copy.deepcopy(teacher.state_dict())
    yolo.train(
        data=str(data), trainer=trainer_of(teacher), epochs=1, project=str(tmp_path), name="run", **SETTINGS
    )
    (row,) = log_of(tmp_path / "run")
    assert row["train/kd_cls"] > 0
    assert row["train/kd_reg"] > 0
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    package("onnx")
    package("onnxslim")
    onnxruntime = package("onnxruntime")
    import numpy as np

    file = YOLO(tmp_path / "run" / "weights" / "last.pt").export(format="onnx", imgsz=64, device="cpu")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    (found,) = session.run(None, {given.name: np.full(given.shape, 0.5, dtype=np.float32)})
    assert np.isfinite(found).all()


@pytest.mark.slow
def test_a_student_gets_better_on_real_images(tmp_path):
    """From nothing, on 32 images, measured on 32 others; docs/runs.md has a longer run's numbers."""
    from ultralytics import YOLO

    data = load("yolo_bccd").convert(bccd_folder(), tmp_path / "data")
    few = sorted((tmp_path / "data" / "images" / "val").iterdir())[:32]
    (tmp_path / "data" / "few.txt").write_text("\n".join(map(str, few)))
    data.write_text(data.read_text().replace("val: images/val", "val: few.txt"))
    common = {"data": str(data), "imgsz": 128, "batch": 4, "device": "cpu", "workers": 0, "plots": False}
    settings = {"fraction": 0.16, "val": False, "optimizer": "AdamW", "lr0": 0.003, "warmup_epochs": 1}
    settings = {**settings, "mosaic": 0.0, "nbs": 4, "epochs": 14, "project": str(tmp_path)}
    settings |= {"pretrained": False, "save": False}  # but for the last epoch

    def precision(yolo: YOLO) -> float:
        return float(yolo.val(**common, split="val").box.map50)

    teacher, student = YOLO("yolo11n.yaml"), YOLO("yolo11n.yaml")
    before = precision(student)
    teacher.train(**common, **settings, name="teacher")
    student.train(**common, **settings, name="student", trainer=trainer_of(teacher))
    first, *_, last = log_of(tmp_path / "student")
    assert before < 0.02
    assert precision(student) > 0.1
    for name in ("box_loss", "cls_loss", "dfl_loss", "kd_cls", "kd_reg"):
        assert last[f"train/{name}"] < 0.8 * first[f"train/{name}"]


@pytest.mark.slow
def test_two_processes(tmp_path, data, teacher_file):
    """The script that ultralytics writes for several GPUs, on two CPU processes."""
    package("cloudpickle")
    from ultralytics.utils.dist import generate_ddp_file

    kind = trainer_of(str(teacher_file), CrossKD(reg_weight=2.5))
    overrides = {"model": "yolo11n.yaml", "data": str(data), "project": str(tmp_path), "name": "run"}
    file = generate_ddp_file(kind(overrides={**overrides, **SETTINGS, "epochs": 1, "exist_ok": True}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "helpers" / "yolo_process.py"), file],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (row,) = log_of(tmp_path / "run")
    assert row["train/kd_cls"] > 0
    assert row["train/kd_reg"] > 0
    assert_plain(tmp_path / "run" / "weights" / "last.pt")
