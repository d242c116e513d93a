from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import build_detector
from processes import Processes
from train_torchvision import main, parse, warn_of_slow_bfloat16

from tests.examples.coco_files import write_coco
from tests.examples.mmdet_state import mmdet_state

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "train_torchvision.py"
SMALL = [
    *("--shapes-train", "8", "--shapes-val", "3", "--width", "32", "--short-side", "64", "--batch-size", "4"),
    *("--student", "retinanet_mobilenet_v3_large", "--teacher", "retinanet_resnet18", "--head-norm", "none"),
    *("--epochs", "2", "--teacher-epochs", "1", "--evaluate-every", "1", "--threads", "1"),
]


def command(*arguments: str, script: Path = SCRIPT, processes: int = 1) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*start, str(script), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def test_each_data_set_has_its_defaults_and_options_win(tmp_path):
    shapes = parse([])
    assert (shapes.student, shapes.method, shapes.output) == (
        "retinanet_mobilenet_v3_large",
        ["none", "crosskd"],
        Path("runs/shapes"),
    )
    coco = parse(["--data", "coco", "--root", str(tmp_path), "--epochs", "24"])
    assert (coco.short_side, coco.optimizer, coco.epochs, coco.learning_rate) == ([800], "sgd", 24, 0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "coco"], "--data coco needs --root"),
        (
            ["--teacher", "retinanet_resnet18", "--teacher-weights", "published"],
            "publishes detection weights for",
        ),
        (["--method", "none", "none"], "names a method twice"),
        (["--method", "none", "crosskd+pdk"], "unknown method 'pdk': choose from none, mimic, crosskd, pkd"),
        (["--student", "yolo"], "invalid choice: 'yolo'"),
        (
            ["--student", "fasterrcnn_resnet18"],
            "fasterrcnn_resnet18 can't learn from retinanet_resnet18: take two of one family",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def test_slow_emulated_types_are_said(capsys, tmp_path):
    alone = Processes(0, 1, torch.device("cpu"))
    warn_of_slow_bfloat16(parse([]), alone)
    assert capsys.readouterr().out == ""
    warn_of_slow_bfloat16(parse(["--amp", "bfloat16"]), alone)
    said = capsys.readouterr().out
    assert said == "" or "times slower than float32" in said


@pytest.mark.slow
def test_the_main_job_writes_everything(tmp_path, capsys):
    together = "crosskd+pkd+inherit"
    metrics = main(["--output", str(tmp_path), "--method", "none", "mimic", together, *SMALL])
    assert list(metrics["results"]) == ["teacher", "none", "mimic", together]
    assert all(result["images"] == 3 for result in metrics["results"].values())
    written = {path.name for path in tmp_path.iterdir()}
    weights = {f"{name}.pt" for name in metrics["results"]}
    assert {*weights, "metrics.json", "comparison.md", "curves.png", "detections.png"} <= written
    for picture in ("curves.png", "detections.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "metrics.json").read_text())["results"] == metrics["results"]
    printed = capsys.readouterr().out
    for row in ("teacher ", "student alone ", "prediction mimicking ", "CrossKD + PKD, inherited "):
        assert f"\n{row}" in printed
    assert f"{together}: 33 of the student's 344 weights and statistics are the teacher's now" in printed
    plain = build_detector("retinanet_mobilenet_v3_large", 3, width=32, anchor_scale=0.5)
    plain.load_state_dict(torch.load(tmp_path / f"{together}.pt", weights_only=True))
    assert {"kd_cls", "kd_reg", "kd_pkd"} <= metrics["histories"][together][0]["losses"].keys()


@pytest.mark.slow
def test_coco_folders_with_everything_in_them_train_from_a_given_teacher(tmp_path):
    teacher = build_detector("fcos_resnet18", 2, width=64)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    metrics = main(
        [
            *coco_arguments(tmp_path / "coco"),
            *("--output", str(tmp_path / "run")),
            *("--teacher", "fcos_resnet18", "--teacher-weights", str(tmp_path / "teacher.pt")),
            *("--student", "fcos_mobilenet_v3_large", "--method", "crosskd", "--epochs", "1"),
            *("--optimizer", "adamw", "--accumulate", "2"),
        ]
    )
    assert metrics["histories"]["crosskd"][0]["unreadable_images"] > 0
    assert metrics["results"]["teacher"]["images"] == 5


def coco_arguments(folder: Path) -> list[str]:
    """Options that train and test on a small data set with everything in it, of two categories."""
    images, annotations = write_coco(folder)
    split = [
        part
        for s in ("train", "val")
        for part in (f"--{s}-images", images.name, f"--{s}-annotations", annotations.name)
    ]
    sizes = ("--width", "64", "--short-side", "48", "64", "--workers", "0", "--threads", "1")
    return ["--data", "coco", "--root", str(images.parent), *split, *sizes]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gfl", "atss"])
def test_a_student_trains_from_a_file_of_mmdets(tmp_path, family):
    arguments = [
        *coco_arguments(tmp_path / "coco"),
        *("--output", str(tmp_path / "run"), "--method", "mimic", "crosskd", "--epochs", "1"),
        *("--teacher", f"{family}_resnet18", "--teacher-weights", str(tmp_path / "teacher.pth")),
        *("--student", f"{family}_mobilenet_v3_large"),
    ]
    torch.save({"meta": {}, "state_dict": mmdet_state(family, classes=80)}, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match=r"knows 80 classes, the data 2 categories \(cat, dog\)"):
        main(arguments)
    torch.save({"meta": {}, "state_dict": mmdet_state(family, classes=2)}, tmp_path / "teacher.pth")
    metrics = main(arguments)
    assert list(metrics["results"]) == ["teacher", "mimic", "crosskd"]
    assert {"classification", "bbox_regression", "kd_cls", "kd_reg"} <= metrics["histories"]["crosskd"][0][
        "losses"
    ].keys()
    plain = build_detector(f"{family}_mobilenet_v3_large", 2, width=64)
    plain.load_state_dict(torch.load(tmp_path / "run" / "crosskd.pt", weights_only=True))


@pytest.mark.slow
def test_faster_rcnns_train_on_labels_that_leave_0_to_the_background(tmp_path):
    """And what they detect is measured as the categories that it is."""
    teacher = build_detector("fasterrcnn_resnet18", 3, width=64)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    models = ("--teacher", "fasterrcnn_resnet18", "--student", "fasterrcnn_mobilenet_v3_large")
    metrics = main(
        [
            *coco_arguments(tmp_path / "coco"),
            *("--output", str(tmp_path / "run"), "--method", "mimic", "crosskd", "--epochs", "1"),
            *(*models, "--teacher-weights", str(tmp_path / "teacher.pt"), "--regions", "32"),
        ]
    )
    own = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    distilled = {f"kd_{part}_{kind}" for part in ("rpn", "box") for kind in ("cls", "reg")}
    assert metrics["histories"]["crosskd"][0]["losses"].keys() == {*own, *distilled}
    assert metrics["results"]["crosskd"]["images"] == 5
    plain = build_detector("fasterrcnn_mobilenet_v3_large", 3, width=64)
    plain.load_state_dict(torch.load(tmp_path / "run" / "crosskd.pt", weights_only=True))


@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    torch.manual_seed(1)
    torch.save(
        build_detector("retinanet_resnet18", 3, width=32, anchor_scale=0.5).state_dict(), tmp_path / "t.pt"
    )
    arguments = [*SMALL, "--method", "crosskd", "--teacher-weights", str(tmp_path / "t.pt"), "--epochs", "4"]
    whole, broken = (str(tmp_path / name) for name in ("whole", "broken"))
    main([*arguments, "--output", whole])

    killed = subprocess.Popen(command(*arguments, "--output", broken), env=environment())
    checkpoint = Path(broken) / "crosskd" / "checkpoint.pt"
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert checkpoint.exists()
    reached = torch.load(checkpoint, weights_only=True)["epoch"]
    assert 1 <= reached < 4
    subprocess.run(command(*arguments, "--output", broken, "--resume"), env=environment(), check=True)
    first, second = (torch.load(Path(run) / "crosskd.pt", weights_only=True) for run in (whole, broken))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


WRAPPER = """
import hashlib, json, sys
sys.path.insert(0, {examples!r})
import torch
import train_torchvision

class Noting(train_torchvision.Trainer):
    def run(self, evaluate):
        history = super().run(evaluate)
        digest = hashlib.sha256()
        for tensor in self.model.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        last = history[-1]
        note = {{"hash": digest.hexdigest(), "metrics": last["metrics"], "losses": last["losses"]}}
        open(f"{{self.folder}}_{{self.processes.rank}}.json", "w").write(json.dumps(note))
        return history

train_torchvision.Trainer = Noting
processes, stop = train_torchvision.start("cpu"), train_torchvision.stop
train_torchvision.start, train_torchvision.stop = lambda device: processes, lambda: None
for arguments in {runs!r}:
    train_torchvision.main(arguments)
stop()
"""


@pytest.mark.slow
def test_two_processes_end_with_equal_weights_and_count_each_image_once(tmp_path):
    """One start for both families, for starting takes longer than training."""
    further = {
        "retinanet": (),
        "gfl": ("--teacher", "gfl_resnet18", "--student", "gfl_resnet18", "--width", "64"),
    }
    runs = [
        ["--output", str(tmp_path / family), *SMALL, *models, "--method", "crosskd"]
        for family, models in further.items()
    ]
    script = tmp_path / "noting.py"
    script.write_text(WRAPPER.format(examples=str(SCRIPT.parent), runs=runs))
    subprocess.run(command(script=script, processes=2), env=environment(), check=True)
    for family in further:
        folder = tmp_path / family
        for model in ("teacher", "crosskd"):
            notes = [json.loads((folder / f"{model}_{rank}.json").read_text()) for rank in (0, 1)]
            assert notes[0]["hash"] == notes[1]["hash"]
            assert notes[0]["metrics"] == notes[1]["metrics"]
            assert notes[0]["metrics"]["images"] == 3
            for note in notes:
                assert all(0 < value < 100 for value in note["losses"].values())
        assert json.loads((folder / "metrics.json").read_text())["versions"]["processes"] == "2"
