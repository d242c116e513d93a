from __future__ import annotations

import argparse
import copy
import json
import os
import re
import shlex
import signal
import socket
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import URLError

import coco_data
import evaluation
import image_memory
import pytest
import torch
import torchvision
import train_torchvision
from methods_table import check_name
from models import build_detector
from options import add_options
from PIL import Image
from processes import Processes, start
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import elastic_launch
from torchvision.models.detection import RetinaNet
from train_torchvision import (
    cache_for,
    main,
    new_detector,
    parse,
    settings,
    teacher_options,
    warn_of_slow_bfloat16,
    with_method,
)
from training import Trainer

import crosskd.checkpoints
from crosskd import Distiller
from tests.examples.coco_files import write_coco
from tests.examples.mmdet_state import mmdet_state
from tests.helpers import forked
from tests.helpers.tiny import tiny_detector, tiny_retinanet

SMALL = [
    *("--shapes-train", "8", "--shapes-val", "3", "--width", "32", "--short-side", "64", "--batch-size", "4"),
    *("--student", "retinanet_mobilenet_v3_large", "--teacher", "retinanet_resnet18", "--head-norm", "none"),
    *("--epochs", "1", "--teacher-epochs", "1", "--evaluate-every", "1", "--threads", "1"),
]


def test_each_data_set_has_its_defaults_and_options_win(tmp_path):
    shapes = parse([])
    assert (shapes.student, shapes.method, shapes.output) == (
        "retinanet_mobilenet_v3_large",
        ["none", "crosskd"],
        Path("runs/shapes"),
    )
    coco = parse([*coco_arguments(tmp_path), "--epochs", "24"])
    assert (coco.student, coco.optimizer, coco.epochs, coco.learning_rate) == (
        "retinanet_resnet18",
        "sgd",
        24,
        0.01,
    )


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
        (["--epochs", "0"], "--epochs must be from 1"),
        (["--learning-rate", "nan"], "--learning-rate must be from"),
        (["--ema", "1"], "--ema must be from 0"),
        (["--short-side", "64", "0"], "--short-side must be from 32"),
        (["--width", "48"], "--width must be a multiple of 32"),
        (["--augment", "flip", "mosaik"], "invalid choice: 'mosaik'"),
        (["--logger", "wandb"], "invalid choice: 'wandb'"),
        (["--student", "yolo"], "invalid choice: 'yolo'"),
        (["--teacher-cache-dtype", "bfloat16"], "--teacher-cache-dtype needs --teacher-cache"),
        (["--method", "pseudo+pkd"], "--method pseudo+pkd needs --unlabelled-images"),
        (
            ["--teacher-labels", "0.5", "--unlabelled-images", "more", "--method", "none", "pkd"],
            "--teacher-labels 0.5 is for the method pseudo, alone or beside others (pseudo+crosskd), got "
            "--method none pkd",
        ),
        (
            ["--teacher-short-side", "64", "--method", "none"],
            "--teacher-short-side 64: --method none learns nothing from a teacher",
        ),
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


@pytest.mark.parametrize(
    ("option", "given", "missing"),
    [
        ("--root", "nowhere/deeper", "nowhere/deeper"),
        ("--train-images", "imgs", "coco/imgs"),
        ("--val-images", "annotations.json", "coco/annotations.json"),
        ("--train-annotations", "coco/annotations.json", "coco/coco/annotations.json"),
        ("--val-annotations", "images", "coco/images"),
    ],
)
def test_data_that_is_not_there_is_named_with_what_is(option, given, missing, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = coco_arguments(Path("coco"))
    with pytest.raises(SystemExit):
        parse([*arguments, option, given])
    said = capsys.readouterr().err
    shown = {
        "--root": f"{tmp_path} holds coco/",
        "--val-annotations": f"{tmp_path}/coco/images holds 1.jpg, ",
    }
    for fact in (
        f"{option} {given}",
        missing,
        shown.get(option, f"{tmp_path}/coco holds annotations.json, images/"),
    ):
        assert fact in said
    assert len(said.splitlines()) < 5  # without a page of options in front


def test_the_commands_of_the_pages_have_options_that_there_are():
    repository, seen = Path(__file__).parents[2], 0
    for page in [*sorted(repository.glob("docs/**/*.md")), repository / "README.md"]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for command in re.findall(r"train_torchvision\.py (--.*)", text):
            parser = argparse.ArgumentParser(allow_abbrev=False)
            add_options(parser)
            options = parser.parse_args(shlex.split(command.split("`")[0], comments=True))
            for method in options.method:
                check_name(method)
            seen += 1
    assert seen > 5


def test_a_gpu_that_is_not_there_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        parse(["--device", "cuda"])
    assert f"--device cuda: PyTorch {torch.__version__} finds no GPU" in capsys.readouterr().err


GFL = ["--teacher", "gfl_resnet18", "--student", "gfl_resnet18"]


def no_network(*_, **__):
    raise URLError("Name or service not known")


@pytest.mark.parametrize(
    ("further", "facts"),
    [
        (["--teacher-weights", "published"], ["retinanet_resnet50_fpn_coco-", "--teacher-weights PATH"]),
        (["--method", "none", "--pretrained-backbone"], ["resnet18-f37072fd.pth", "--pretrained-backbone"]),
        (
            [*GFL, "--teacher-weights", "https://models.example/gfl_r18.pth"],
            ["https://models.example/gfl_r18.pth", "/gfl_r18.pth, ", "--teacher-weights PATH"],
        ),
    ],
)
def test_without_a_network_it_says_where_the_weights_belong(tmp_path, monkeypatch, further, facts):
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(crosskd.checkpoints, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(SystemExit) as exit_of:
        main([*coco_arguments(tmp_path / "coco"), "--output", str(tmp_path / "run"), *further])
    for fact in ("Name or service not known", f"{tmp_path}/hub/checkpoints/", *facts):
        assert fact in exit_of.value.code
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"<html>404</html>"])
def test_a_damaged_download_ends_the_script_by_the_file_to_remove(tmp_path, monkeypatch, content):
    damaged = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(content)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    arguments = [*coco_arguments(tmp_path / "coco"), "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as exit_of:
        main([*arguments, "--method", "none", "--pretrained-backbone"])
    assert f"{damaged} is damaged" in exit_of.value.code


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda content: content["annotations"][0].update(category_id=9), "category 9"),
        (
            lambda content: [i.update(file_name="images/" + i["file_name"]) for i in content["images"]],
            "missing",
        ),
    ],
)
def test_data_that_cannot_be_used_ends_the_script_by_one_sentence_and_leaves_no_folder(
    tmp_path, change, fact
):
    arguments = coco_arguments(tmp_path / "coco")
    path = tmp_path / "coco" / "annotations.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as exit_of:
        main([*arguments, "--output", str(tmp_path / "run")])
    assert str(path) in exit_of.value.code
    assert fact in exit_of.value.code
    assert not (tmp_path / "run").exists()


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
    # No object of the three images is larger than 96 x 96.
    assert "AP_large" not in metrics["results"]["teacher"]
    assert re.search(r"^teacher .* -$", printed, flags=re.MULTILINE)
    for row in ("teacher ", "student alone ", "prediction mimicking ", "CrossKD + PKD, inherited "):
        assert f"\n{row}" in printed
    assert f"{together}: 33 of the student's 344 weights and statistics are the teacher's now" in printed
    plain = build_detector("retinanet_mobilenet_v3_large", 3, width=32, anchor_scale=0.5)
    plain.load_state_dict(torch.load(tmp_path / f"{together}.pt", weights_only=True))
    assert {"kd_cls", "kd_reg", "kd_pkd"} <= metrics["histories"][together][0]["losses"].keys()


def sure_teacher(*arguments: Any, bias: float) -> RetinaNet:
    """`tiny_detector`, whose teacher is so sure of everything."""
    detector = tiny_detector(*arguments)
    if arguments[-1] is not None:  # its weights
        torch.nn.init.constant_(detector.head.classification_head.cls_logits.bias, bias)
    return detector


def test_the_teachers_detections_may_be_labels(tmp_path, monkeypatch, capsys):
    """Alone or beside a method; the student alone doesn't see the images that they are of."""
    monkeypatch.setattr(train_torchvision, "new_detector", partial(sure_teacher, bias=0.5))
    monkeypatch.setattr(train_torchvision, "write_report", lambda *_: None)
    arguments = [*coco_arguments(tmp_path / "coco"), "--teacher-weights", "teacher.pt", "--epochs", "1"]
    arguments += ["--unlabelled-images", str(tmp_path / "coco" / "images")]
    arguments += ["--method", "none", "pseudo", "pseudo+pkd"]
    metrics = main([*arguments, "--output", str(tmp_path / "best")])
    own = {"classification", "bbox_regression"}
    both = own | {f"unlabelled_{name}" for name in own}
    losses = {name: history[0]["losses"] for name, history in metrics["histories"].items() if history}
    assert {name: found.keys() for name, found in losses.items()} == {
        "none": own,
        "pseudo": both,
        "pseudo+pkd": both | {"kd_pkd", "unlabelled_kd_pkd"},
    }
    score = float(re.search(r"best from a score of (0\.\d+) on", capsys.readouterr().out)[1])
    assert 0.5 < score < 0.75
    metrics = main([*arguments, "--output", str(tmp_path / "given"), "--teacher-labels", "1"])
    none_sure = metrics["histories"]["pseudo"][0]["losses"]  # nothing is as sure, so nothing is labelled
    assert none_sure["unlabelled_bbox_regression"] == 0 < losses["pseudo"]["unlabelled_bbox_regression"]
    assert "best from a score" not in capsys.readouterr().out
    monkeypatch.setattr(train_torchvision, "new_detector", partial(sure_teacher, bias=-9.0))
    with pytest.raises(ValueError, match="the teacher detects nothing"):
        main([*arguments, "--output", str(tmp_path / "nothing")])


@pytest.mark.slow
def test_a_published_teacher_learns_the_classes_of_a_folder_with_everything_in_it(
    tmp_path, monkeypatch, capsys
):
    published = build_detector("fcos_resnet18", 91, width=64, short_side=[48, 64])
    tower = published.head.classification_head.conv[0].weight.detach().clone()

    def without_download(name, get_model=torchvision.models.get_model, **options):
        return copy.deepcopy(published) if name == "fcos_resnet50_fpn" else get_model(name, **options)

    monkeypatch.setattr(torchvision.models, "get_model", without_download)
    metrics = main(
        [
            *coco_arguments(tmp_path / "coco"),
            *("--output", str(tmp_path / "run"), "--epochs", "1", "--teacher-epochs", "1"),
            *("--teacher", "fcos_resnet50", "--teacher-weights", "published"),
            *("--student", "fcos_mobilenet_v3_large", "--method", "crosskd"),
            *("--optimizer", "adamw", "--learning-rate", "4e-4", "--teacher-learning-rate", "1e-4"),
            *("--accumulate", "2", "--ema", "0.5"),
            *("--augment", "flip", "mosaic"),
        ]
    )
    assert metrics["histories"]["crosskd"][0]["unreadable_images"] > 0
    assert [metrics["results"][name]["images"] for name in ("teacher", "crosskd")] == [5, 5]
    teacher = torch.load(tmp_path / "run" / "teacher.pt", weights_only=True)
    assert teacher["head.classification_head.cls_logits.weight"].shape[0] == 2
    moved = (teacher["head.classification_head.conv.0.weight"] - tower).abs()
    assert 0 < moved.max() < 0.001  # trained from the published weights, not anew
    rates = [metrics["histories"][name][-1]["learning_rate"] for name in ("teacher", "crosskd")]
    assert rates[0] == pytest.approx(rates[1] / 4)
    printed = capsys.readouterr().out
    assert "new classification layer for 2 categories" in printed
    assert "teacher: 2 of 5 images can't be read" in printed


def test_a_published_detectors_file_loads_as_it_was(tmp_path):
    """With batch norm that is fixed, though no ImageNet weights were asked for."""
    options = parse(["--width", "32", "--head-norm", "none", "--anchor-scale", "1", "--short-side", "800"])
    published = build_detector("retinanet_resnet18", 3, width=32, fixed_norm=True)
    torch.save(published.state_dict(), tmp_path / "teacher.pt")
    loaded = new_detector("retinanet_resnet18", options, 3, tmp_path / "teacher.pt")
    assert loaded.state_dict().keys() == published.state_dict().keys()
    assert not loaded.backbone.body.conv1.weight.requires_grad
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in published.state_dict().items())
    plain = build_detector("retinanet_resnet18", 3, width=32)
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    for further in ([], ["--pretrained-backbone"]):  # which is for those that have no file
        options = parse(["--width", "32", "--head-norm", "none", "--anchor-scale", "1", *further])
        loaded = new_detector("retinanet_resnet18", options, 3, tmp_path / "plain.pt")
        assert loaded.backbone.body.conv1.weight.requires_grad


def test_running_again_says_how_to_go_on(tmp_path):
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(SystemExit, match="--resume.*--output"):
        main(["--output", str(tmp_path), "--device", "cpu"])
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "metrics.json"}


def test_what_cannot_work_fails_before_the_teacher_is_trained(tmp_path, monkeypatch):
    def fails(*_):
        raise ValueError("in training")

    monkeypatch.setattr(train_torchvision, "train", fails)
    arguments = ["--output", str(tmp_path), *SMALL, "--method", "none", "pkd", "crosskd", "--position", "9"]
    with pytest.raises(SystemExit, match="--method crosskd: .*position.*9"):
        main(arguments)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=f"{tmp_path}/file"):
        main([*arguments[:-1], "2", "--teacher-cache", str(tmp_path / "file")])
    with pytest.raises(ValueError, match="in training"):  # with its traceback
        main([*arguments[:-1], "2"])


def test_the_teachers_long_side_is_in_proportion():
    options = parse(["--short-side", "640", "800", "--teacher-short-side", "400", "--long-side", "1333"])
    own = teacher_options(options)
    assert (own.short_side, own.long_side) == ([400], 666)
    assert (options.short_side, options.long_side) == ([640, 800], 1333)


def test_another_seed_batch_size_or_annotation_is_another_run(tmp_path):
    """And how it runs is not."""

    def of(*further: str) -> dict[str, object]:
        return settings(parse([*coco, *further]), Processes(0, 1, torch.device("cpu")))

    coco = coco_arguments(tmp_path / "coco")
    first = of()
    changed = {
        "--seed": "1",
        "--batch-size": "3",
        "--learning-rate": "0.1",
        "--position": "2",
        "--ema": "0.9",
    }
    for option, value in changed.items():
        now = of(option, value)
        assert [key for key in now if now[key] != first[key]] == [option[2:].replace("-", "_")]
    free = ("--workers", "3", "--output", "elsewhere", "--method", "pkd", "--checkpoint-every", "7")
    free = (*free, "--cache-images")
    assert of(*free) == first
    path = tmp_path / "coco" / "annotations.json"
    path.write_text(path.read_text() + " ")
    assert [key for key, value in of().items() if value != first[key]] == [
        "train_annotations",
        "val_annotations",
    ]


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


# -- what the teacher sees ------------------------------------------------------------------------


def paired_arguments(folder: Path, *further: str) -> list[str]:
    """Options of `coco_arguments`, and the teacher's images: each of one colour, by the image's id."""
    arguments = coco_arguments(folder / "coco")
    views = folder / "coco" / "views"
    views.mkdir()
    for number, path in enumerate(sorted((folder / "coco" / "images").iterdir())[:3], 1):
        with Image.open(path) as image:
            Image.new("RGB", image.size, (40 * number,) * 3).save(views / path.name, quality=100)
    models = ("--teacher", "retinanet_resnet18", "--student", "retinanet_resnet18", "--short-side", "64")
    weights = ("--teacher-weights", str(folder / "teacher.pt"))
    sizes = ("--batch-size", "2", "--epochs", "1", "--output", str(folder / "run"), "--device", "cpu")
    return [*arguments, "--teacher-images", "views", *models, *weights, *sizes, *further]


def test_the_teacher_sees_its_own_images(tmp_path, monkeypatch):
    """By a method of feature maps and by CrossKD; the student alone trains beside them."""

    def tiny(name: str, options: Namespace, classes: int, weights: Path | None = None) -> RetinaNet:
        return tiny_retinanet(classes, seed=int(weights is None))

    seen, measured = [], []
    teacher_batch, evaluated = Distiller.teacher_batch, train_torchvision.evaluate

    def watched(distiller, batch, images, targets):
        found = teacher_batch(distiller, batch, images, targets)
        assert found.image_sizes == batch.image_sizes
        assert found.pixels.shape == batch.pixels.shape
        mean, std = (distiller.teacher.transform.__dict__[name] for name in ("image_mean", "image_std"))
        for target, pixels, (height, width) in zip(targets, found.pixels, found.image_sizes, strict=True):
            shown = pixels[:, :height, :width] * torch.tensor(std)[:, None, None]
            values = (255 * (shown + torch.tensor(mean)[:, None, None])).round().unique().tolist()
            seen.append((int(target["image_id"]), values))
        return found

    def noted(detector, *arguments, **options):
        measured.append(detector)
        return evaluated(detector, *arguments, **options)

    monkeypatch.setattr(Distiller, "teacher_batch", watched)
    monkeypatch.setattr(train_torchvision, "evaluate", noted)
    monkeypatch.setattr(train_torchvision, "new_detector", tiny)
    further = ["--method", "none", "pkd", "crosskd", "--augment", "flip", "crop", "--workers", "2"]
    metrics = main(paired_arguments(tmp_path, *further, "--cache-images"))
    assert list(metrics["results"]) == ["none", "pkd", "crosskd"]  # the teacher can't be measured here
    assert len(measured) == 3
    assert {"kd_pkd"} < metrics["histories"]["pkd"][0]["losses"].keys()
    assert {"kd_cls", "kd_reg"} < metrics["histories"]["crosskd"][0]["losses"].keys()
    assert {image_id for image_id, _ in seen} == {1, 2, 3}
    assert all(values == [40.0 * image_id] for image_id, values in seen)


@pytest.mark.parametrize("family", ["retinanet", "gfl"])
@pytest.mark.parametrize("side", [32, 64])
def test_the_teacher_sees_the_images_at_its_own_size(family, side, tmp_path, monkeypatch):
    """It is trained, measured and learned from so, by predictions and by feature maps."""
    seen, trained = [], []
    teacher_batch, train = Distiller.teacher_batch, train_torchvision.train

    def watched(distiller, batch, images, targets):
        found = teacher_batch(distiller, batch, images, targets)
        seen.extend(zip(found.image_sizes, batch.image_sizes, strict=True))
        return found

    def noted(model, name, *arguments):
        trained.append((name, getattr(model, "student", model).transform.min_size))
        return train(model, name, *arguments)

    monkeypatch.setattr(Distiller, "teacher_batch", watched)
    monkeypatch.setattr(train_torchvision, "train", noted)
    models = ("--teacher", f"{family}_resnet18", "--student", f"{family}_resnet18", "--width", "64")
    sizes = ("--short-side", "48", "--teacher-short-side", str(side))
    arguments = ["--output", str(tmp_path), *SMALL, *models, *sizes, "--method", "crosskd", "pkd"]
    metrics = main(arguments)
    assert set(seen) == {((side, side), (48, 48))}
    assert trained == [("teacher", (side,)), ("crosskd", (48,)), ("pkd", (48,))]
    assert list(metrics["results"]) == ["teacher", "crosskd", "pkd"]


@pytest.mark.parametrize(
    ("further", "facts"),
    [
        (["--method", "none", "none+inherit"], ["--method none none+inherit learns nothing"]),
        (["--unlabelled-images", "{folder}/coco/images"], ["--unlabelled-images can't go with it"]),
        (["--short-side", "48", "64"], ["--short-side 48 64"]),
        (["--data", "shapes"], ["--data shapes"]),
        (
            ["--teacher-images", "thermal"],
            ["{folder}/coco/thermal", "holds annotations.json, images/, views/"],
        ),
    ],
)
def test_options_that_do_not_fit_the_teachers_images_are_refused(tmp_path, further, facts, capsys):
    further = [part.format(folder=tmp_path) for part in further]
    with pytest.raises(SystemExit):
        parse(paired_arguments(tmp_path, *further))
    said = capsys.readouterr().err
    for fact in ("--teacher-images", *facts):
        assert fact.format(folder=tmp_path) in said


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda views: (views / "2.jpg").unlink(), ["1 of the student's 5 images", "views/2.jpg"]),
        (
            lambda views: Image.new("RGB", (40, 61)).save(views / "2.jpg"),
            ["views/2.jpg is (40, 61)", "images/2.jpg (40, 60)"],
        ),
    ],
)
def test_images_of_the_teacher_that_do_not_fit_end_the_script_and_leave_no_folder(tmp_path, change, facts):
    arguments = paired_arguments(tmp_path)
    change(tmp_path / "coco" / "views")
    with pytest.raises(SystemExit) as exit_of:
        main(arguments)
    for fact in facts:
        assert fact in exit_of.value.code
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_images_must_be_trained(tmp_path):
    arguments = paired_arguments(tmp_path)
    place = arguments.index("--teacher-weights")
    with pytest.raises(SystemExit) as exit_of:
        main(arguments[:place] + arguments[place + 2 :])
    for fact in ("retinanet_resnet18 isn't trained", "--train-images views", "--teacher-weights"):
        assert fact in exit_of.value.code
    assert not (tmp_path / "run").exists()


def test_images_that_do_not_fit_into_memory_end_the_script_and_leave_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(image_memory, "free_memory", lambda: 1000)
    with pytest.raises(SystemExit) as exit_of:
        main([*paired_arguments(tmp_path), "--cache-images"])
    needed = 2 * 3 * 3 * 40 * 60  # three images of both
    assert f"--cache-images: the decoded images take {needed:,} bytes" in exit_of.value.code
    assert "1,000 bytes are free" in exit_of.value.code
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_student_trains_from_a_file_of_mmdets(tmp_path):
    family = "gfl"
    arguments = [
        *coco_arguments(tmp_path / "coco"),
        *("--output", str(tmp_path / "run"), "--method", "crosskd", "--epochs", "1"),
        *("--teacher", f"{family}_resnet18", "--teacher-weights", str(tmp_path / "teacher.pth")),
        *("--student", f"{family}_mobilenet_v3_large"),
    ]
    torch.save({"meta": {}, "state_dict": mmdet_state(family, classes=80)}, tmp_path / "teacher.pth")
    with pytest.raises(SystemExit, match=r"knows 80 classes, the data 2 categories \(cat, dog\)"):
        main(arguments)
    torch.save({"meta": {}, "state_dict": mmdet_state(family, classes=2)}, tmp_path / "teacher.pth")
    metrics = main(arguments)
    assert list(metrics["results"]) == ["teacher", "crosskd"]
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
            *("--output", str(tmp_path / "run"), "--method", "crosskd", "--epochs", "1"),
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
    arguments = [*SMALL, "--method", "crosskd", "--teacher-weights", str(tmp_path / "t.pt"), "--epochs", "3"]
    whole, broken = (str(tmp_path / name) for name in ("whole", "broken"))
    main([*arguments, "--output", whole])

    killed = forked.in_fork(main, [*arguments, "--output", broken])
    checkpoint = Path(broken) / "crosskd" / "checkpoint.pt"
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and killed.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.kill()
    killed.join()
    assert checkpoint.exists()
    reached = torch.load(checkpoint, weights_only=True)["epoch"]
    assert 1 <= reached < 3
    main([*arguments, "--output", broken, "--resume"])
    first, second = (torch.load(Path(run) / "crosskd.pt", weights_only=True) for run in (whole, broken))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


class Mortal(Trainer):
    """Notes what each rank begins and ends with; rank 1 is killed in the epoch's third step, once."""

    calls: ClassVar[list[str]] = []  # of what the first process alone has to do

    def _train_epoch(self):
        self.began = self.part.batches
        return super()._train_epoch()

    def run(self, evaluate):
        (last,) = super().run(evaluate)
        weights = [value.numpy().tobytes() for value in self.model.state_dict().values()]
        note = {"began": self.began, "weights": sha256(b"".join(weights)).hexdigest(), **last}
        note["calls"] = self.calls
        Path(f"{self.folder}_{self.processes.rank}.json").write_text(json.dumps(note))
        return [last]

    def _step(self):
        died = Path("died")
        if (self.processes.rank, self.part.batches) == (1, 2) and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super()._step()


def noted(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    Mortal.calls.append(name)
    return function(*arguments)


def train_twice() -> None:
    """One rank's work: a run that is broken, and a whole one."""
    train_torchvision.Trainer = Mortal
    train_torchvision.write_report = lambda *_: None
    train_torchvision.new_detector = tiny_detector
    coco_data.read_annotations = partial(noted, "read_annotations", coco_data.read_annotations)
    evaluation.coco_stats = partial(noted, "coco_stats", evaluation.coco_stats)
    arguments = [*SMALL, "--method", "crosskd", "--teacher-weights", "teacher.pt", "--checkpoint-every", "1"]
    arguments += ["--batch-size", "1", "--resume"]
    processes = start("cpu")
    for output in ("broken", "whole"):
        train_torchvision.run(parse(["--output", output, *arguments]), processes)


def one_of_two_machines(endpoint: str) -> None:
    """What torchrun does, but that it doesn't start Python anew: importing takes longer than all the rest."""
    command = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=2", "--rdzv-backend=c10d"]
    command += [f"--rdzv-endpoint={endpoint}", "--start-method=fork", "train_torchvision.py"]
    config, *_ = torchrun.config_from_args(torchrun.parse_args(command))
    elastic_launch(config, train_twice)()


@pytest.mark.slow
def test_a_rank_lost_on_one_of_two_machines_changes_no_weight(tmp_path, monkeypatch):
    """And all ranks end with equal weights and count each image once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # as the page says
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    machines = [forked.in_fork(one_of_two_machines, endpoint) for _ in range(2)]
    for machine in machines:
        machine.join(300)
        machine.kill()
    assert [machine.exitcode for machine in machines] == [0, 0]
    notes = [
        json.loads(Path(output, f"crosskd_{rank}.json").read_text())
        for output in ("broken", "whole")
        for rank in (0, 1)
    ]
    assert [note["began"] for note in notes] == [2, 2, 0, 0]
    assert len({note["weights"] for note in notes}) == 1
    assert all(note["metrics"] == notes[0]["metrics"] for note in notes)
    assert notes[0]["metrics"]["images"] == 3
    assert notes[0]["losses"] == notes[2]["losses"]
    # Both files are read, and the ground truth is made, by the first process alone.
    assert [set(note["calls"]) for note in notes] == [{"read_annotations", "coco_stats"}, set()] * 2
    assert all(0 < value < 100 for note in notes for value in note["losses"].values())


def test_the_teacher_may_be_cheaper():
    options = parse(["--teacher-dtype", "bfloat16", "--fold-teacher", "--compile-teacher"])
    pair = [build_detector("retinanet_resnet18", 3, width=32, short_side=[64]) for _ in range(2)]
    drawn = torch.get_rng_state()
    cheap, plain = (with_method("crosskd", *pair, chosen) for chosen in (options, parse([])))
    assert torch.equal(torch.get_rng_state(), drawn)  # training goes on with the same random numbers
    assert (cheap.teacher_dtype, plain.teacher_dtype) == (torch.bfloat16, None)
    norms = [sum(isinstance(m, torch.nn.BatchNorm2d) for m in d.teacher.modules()) for d in (cheap, plain)]
    assert norms == [0, 20]
    compiled = [d.teacher.backbone._compiled_call_impl is not None for d in (cheap, plain)]
    assert compiled == [True, False]


@pytest.mark.slow
def test_a_run_that_reads_the_teachers_outputs_ends_with_the_weights_of_the_one_that_wrote(
    tmp_path, monkeypatch
):
    """To the last bit, and to rounding with those of a run without a cache."""
    monkeypatch.setattr(train_torchvision, "new_detector", tiny_detector)
    monkeypatch.setattr(train_torchvision, "write_report", lambda *_: None)
    arguments = [*SMALL, "--method", "crosskd", "--teacher-weights", "teacher.pt", "--epochs", "2"]
    arguments += ["--optimizer", "sgd"]  # AdamW would divide rounding by itself
    cached = ["--teacher-cache", str(tmp_path / "cache")]
    weights, read = {}, {}
    for name, further in {"without": [], "writes": cached, "reads": cached}.items():
        metrics = main([*arguments, *further, "--output", str(tmp_path / name)])
        read[name] = [epoch.get("teacher_from_disk") for epoch in metrics["histories"]["crosskd"]]
        weights[name] = torch.load(tmp_path / name / "crosskd.pt", weights_only=True)
    assert (read["without"], read["writes"][0], read["reads"]) == ([None, None], 0, [1, 1])
    for key, value in weights["writes"].items():
        assert torch.equal(value, weights["reads"][key]), key
        torch.testing.assert_close(value, weights["without"][key], rtol=1e-6, atol=1e-6)
    logits = "head.classification_head.cls_logits.bias"
    assert (
        weights["reads"][logits] - tiny_detector("", Namespace(), 3).state_dict()[logits]
    ).abs().max() > 1e-3


def test_a_cache_that_rounds_decides_a_runs_weights(tmp_path):
    """Of one that doesn't, a run that is taken up again may do without, or have another."""
    cache = ["--teacher-cache", str(tmp_path)]
    alone, kept, rounded = (
        settings(parse(options), Processes(0, 1, torch.device("cpu")))
        for options in ([], cache, [*cache, "--teacher-cache-dtype", "bfloat16"])
    )
    assert alone == kept
    assert [name for name, value in rounded.items() if kept[name] != value] == ["teacher_cache_dtype"]


def test_each_method_has_a_folder_of_the_teachers_outputs(tmp_path):
    options = parse(["--teacher-cache", str(tmp_path), "--teacher-cache-dtype", "bfloat16"])
    cache = cache_for("crosskd", options)
    assert (cache.folder, cache.dtype) == (tmp_path / "crosskd", torch.bfloat16)
    assert cache_for("none", options) is None
    assert cache_for("pseudo", options) is None
    assert cache_for("crosskd", parse([])) is None
