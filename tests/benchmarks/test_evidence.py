"""The evidence: batches that agree with their boxes, runs that go on, budgets before methods, tables."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.benchmarks.test_benchmarks import FOLDER, load, tables
from tests.helpers import forked

sys.path.insert(0, str(FOLDER.parent / "examples"))
data, pseudo, run, evidence, report, toy = (
    load(f"evidence{part}") for part in ("_data", "_pseudo", "_run", "", "_report", "_toy")
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evidence")
    toy.make_toy(folder / "toy")
    return folder


def options_of(root: Path, output: Path, **changed) -> Namespace:
    given = {"--root": root, "--output": output, "--cache": root / "cache", "--evaluations": 2}
    arguments = [str(part) for pair in given.items() for part in pair]
    options = run.parse([str(output), *arguments, "--curve-images", "2", "--channels-last"])
    more = {"budgets": output / "budgets.json", "jobs": 1, "resamples": 20, "budget_seeds": [0]}
    return Namespace(**{**vars(options), **more, "bf16": False, **changed})


@pytest.mark.parametrize("flips", ["", "h", "hv"])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, 2.0)])
def test_a_crops_boxes_are_where_its_objects_are(root, flips, scales):
    """The toy's clean scenes are grey but for its objects."""
    settings = replace(evidence.TOY, flips=flips, scales=scales, crop=96)
    images = data.load_images(root, settings, "train", root / "cache", "images_pair")
    chosen = list(range(8))
    window, targets = data.draw_windows(images, chosen, settings, torch.Generator().manual_seed(0))
    for size in (96, 192):
        for crop, target in zip(data.crops(images.pixels, chosen, window, size, CPU), targets, strict=True):
            factor = size / 96
            assert crop.shape == (3, size, size)
            for box, label in zip(factor * target["boxes"], target["labels"], strict=True):
                x, y = ((box[:2] + box[2:]) / 2).long().tolist()
                assert crop[0, y, x].gt(0.7) if label == 0 else crop[2, y, x].gt(0.7)
                outside = box[2].ceil().int() + 3
                if outside < size:
                    assert (crop[:, y, outside] - crop[:, y, x]).abs().max() > 0.3


def test_a_detector_is_shown_half_the_size_and_a_teacher_all_of_it(root):
    settings = replace(evidence.TOY, crop=32, shown=0.5, scales=(1.0, 1.0), flips="")
    images = data.load_images(root, settings, "train", root / "cache")
    window, targets = data.draw_windows(images, [3], settings, torch.Generator().manual_seed(0))
    torch.testing.assert_close(targets[0]["boxes"], images.boxes[3] / 2)
    (half,) = run._crops(small_run(data=settings), images, [3], window, CPU)
    (whole,) = run._crops(small_run(data=settings, sees="zoom"), images, [3], window, CPU)
    torch.testing.assert_close(whole, images.pixels[3] / 255)
    torch.testing.assert_close(half, torch.nn.functional.avg_pool2d(whole[None], 2)[0])
    assert data.whole_images(images, [3], CPU, 0.5)[0].shape == half.shape


def test_crops_at_scale_1_are_as_sharp_as_the_images(root):
    settings = replace(evidence.TOY, crop=24, scales=(1.0, 1.0), flips="")
    images = data.load_images(root, settings, "train", root / "cache")
    window, _ = data.draw_windows(images, [3], settings, torch.Generator().manual_seed(0))
    (crop,) = data.crops(images.pixels, [3], window, 24, CPU)
    parts = (images.pixels[3] / 255).unfold(1, 24, 1).unfold(2, 24, 1)  # all that lie on whole pixels
    assert float((parts - crop[:, None, None]).abs().amax(dim=(0, 3, 4)).min()) < 1e-4


def test_a_smaller_image_stands_whole_in_a_larger_crop(root):
    settings = replace(evidence.TOY, crop=128, scales=(1.0, 1.0), flips="")
    images = data.load_images(root, settings, "val", root / "cache")
    _, targets = data.draw_windows(images, [0, 1], settings, torch.Generator().manual_seed(0))
    assert [len(target["boxes"]) for target in targets] == [2, 2]


def test_images_are_shrunk_to_the_canvas_with_their_boxes(root):
    whole, half = (
        data.load_images(root, replace(evidence.TOY, side=side), "val", root / "cache") for side in (64, 32)
    )
    assert half.pixels.shape[2:] == (32, 32)
    assert half.factors.tolist() == [0.5] * 6
    torch.testing.assert_close(half.boxes[0], whole.boxes[0] / 2)


def test_every_round_shows_every_image_once_whatever_was_done_before():
    steps = [data.chosen_images(10, 4, 3, step) for step in range(5)]
    shown = [image for step in steps for image in step]
    assert sorted(shown[:10]) == sorted(shown[10:]) == list(range(10))
    assert shown[:10] != shown[10:]
    assert data.chosen_images(10, 4, 3, 2) == steps[2] != data.chosen_images(10, 4, 4, 2)


def small_run(**changed):
    return replace(evidence.TOY_PAIR.student, **{"steps": 4, "ema": 0.0, **changed})


def work(one, options, folder_of: Path) -> dict:
    folder = folder_of / run.name_of(one)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(run.as_json(one))
    run.work(folder, options)
    return torch.load(folder / "model.pt", weights_only=True) if (folder / "model.pt").exists() else {}


@pytest.mark.parametrize("method", ["none", "mgd"])
def test_a_stopped_run_ends_where_one_in_one_go_does(root, tmp_path, monkeypatch, method):
    """MGD draws masks from PyTorch's own generator."""
    one = small_run(ema=0.5)
    if method != "none":
        one = replace(one, method=method, teacher=small_run(seed=1))
        for part in ("whole", "parts"):
            work(one.teacher, options_of(root, tmp_path / part), tmp_path / part)
    whole = work(one, options_of(root, tmp_path / "whole"), tmp_path / "whole")
    options, one_step = options_of(root, tmp_path / "parts"), run._one_step

    def step_and_stop(training, images):
        if training.step == 1:
            (options.output / "stop").touch()
        return one_step(training, images)

    with monkeypatch.context() as patched:
        patched.setattr(run, "_one_step", step_and_stop)
        assert work(one, options, tmp_path / "parts") == {}
    (options.output / "stop").unlink()
    folder = tmp_path / "parts" / run.name_of(one)
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 2
    parts = work(one, options, tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    result = json.loads((folder / "result.json").read_text())
    assert [entry["step"] for entry in result["history"]] == [2, 4]
    assert not (folder / "test.json").exists()
    assert not (folder / "state.pt").exists()


@pytest.mark.parametrize(
    ("sees", "method", "labelled"),
    [
        ("pair", "crosskd+pkd", 1.0),
        ("images", "crosskd-pre", 0.5),
        ("images", "crosskd-0", 0.5),
        ("zoom", "pkd", 1.0),
        ("pair", "fgd", 0.5),
        ("zoom", "pseudo", 0.5),
        ("pair", "pseudo+pkd", 0.5),
        ("images", "mimic-half", 0.5),
        ("images", "pkd-weak", 0.5),
    ],
)
def test_a_teacher_of_each_kind_teaches(root, tmp_path, sees, method, labelled):
    options = options_of(root, tmp_path, test=True)
    levels = 5 if sees == "zoom" else 3
    teacher = small_run(sees=sees)
    teacher = replace(teacher, model=replace(teacher.model, levels=levels))
    student = small_run(method=method, teacher=teacher, labelled=labelled)
    assert work(teacher, options, tmp_path)
    assert work(student, options, tmp_path)
    folder = tmp_path / run.name_of(student)
    assert {"AP", "AP50"} <= json.loads((folder / "test.json").read_text()).keys()
    assert isinstance(json.loads((folder / "detections_test.json").read_text()), list)


def test_a_student_goes_on_from_a_finished_one(root, tmp_path):
    options = options_of(root, tmp_path)
    first = small_run(ema=0.0, steps=2)
    finished = work(first, options, tmp_path)
    begun = run.start(small_run(begins=first, seed=5), options).student.state_dict()
    assert all(torch.equal(value, finished[name]) for name, value in begun.items())
    own = run.start(small_run(seed=5), options).student.state_dict()
    assert not all(torch.equal(value, finished[name]) for name, value in own.items())


def test_what_students_begin_with_is_run_before_the_ladder_and_has_a_row_of_its_own(
    root, tmp_path, monkeypatch
):
    names = launched(monkeypatch)
    options = options_of(root, tmp_path, jobs=3)
    first = replace(evidence.TOY_PAIR.student, steps=3, seed=7)
    pair = replace(evidence.TOY_PAIR, student=replace(evidence.TOY_PAIR.student, begins=first))
    assert evidence.choose_budget("toy", pair, options)
    assert [seed for _, seed, _ in names] == [7, 0, 0]
    runs = evidence.table_runs(pair, 6, [0], ["none", "crosskd"])
    assert runs[:2] == [evidence.teacher_run(pair, 6), first]
    assert evidence.run_all(runs, options, test=True)
    for one in runs:
        (options.output / run.name_of(one) / "detections_test.json").write_text("[]")
    found = report.read(runs, options)
    assert [(label, list(by_seed)) for label, by_seed in found.items()] == [
        ("teacher", [0]),
        ("begun", [7]),
        ("none", [0]),
        ("crosskd", [0]),
    ]


def test_runs_have_names_of_their_own_and_are_read_back():
    runs = []
    for pair in evidence.PAIRS.values():
        runs += evidence.table_runs(pair, 1200, [0, 1], pair.methods)
    assert len({run.name_of(each) for each in runs}) == len(set(runs))
    for each in runs:
        assert run.run_of(json.loads(run.as_json(each))) == each


def test_few_labels_are_the_same_for_every_seed():
    labelled, others = run._shares(small_run(labelled=0.25, seed=3), 16)
    assert len(labelled) == 4
    assert sorted(labelled + others) == list(range(16))
    assert run._shares(small_run(labelled=0.25, seed=5), 16)[0] == labelled


def test_another_draw_has_other_labels_and_a_student_of_its_own():
    draws = [run._shares(small_run(labelled=0.25, draw=draw), 16)[0] for draw in range(3)]
    assert len(set(map(tuple, draws))) == 3
    pair = evidence.PAIRS["cells_few_own"]
    _, *begins, alone, of_zero, other, of_one = evidence.table_runs(pair, 300, [0, 1], ["none", "mimic"])
    assert [(one.seed, one.draw) for one in begins] == [(0, 0), (1, 1)]
    assert [one.begins for one in (alone, of_zero, other, of_one)] == [begins[0]] * 2 + [begins[1]] * 2
    assert [one.draw for one in (alone, of_zero, other, of_one)] == [0, 0, 1, 1]
    shared = evidence.table_runs(evidence.PAIRS["cells_few"], 300, [0], ["none", "mimic"])
    assert alone in shared
    assert of_zero in shared


@pytest.mark.parametrize(("unlabelled", "expected"), [(True, [4, 12]), (False, [4])])
def test_a_student_sees_the_images_without_labels_or_not(root, tmp_path, monkeypatch, unlabelled, expected):
    options = options_of(root, tmp_path)
    teacher = small_run(seed=1)
    work(teacher, options, tmp_path)
    shares, chosen_images = [], run.chosen_images

    def chosen(count, *others):
        shares.append(count)
        return chosen_images(count, *others)

    monkeypatch.setattr(run, "chosen_images", chosen)
    monkeypatch.setattr(run, "_shares", lambda one, count: (list(range(4)), list(range(4, count))))
    work(small_run(method="pkd", teacher=teacher, unlabelled=unlabelled, steps=1), options, tmp_path)
    expected = [4] if not unlabelled else [4, len(data.coco_folder(root, small_run().data, "train")) - 4]
    assert shares == expected


def test_detections_are_labels_in_the_students_pixels_from_a_score_on():
    found = {
        "boxes": torch.tensor([[4.0, 8, 20, 28], [0, 0, 10, 10], [2, 2, 5, 20]]),
        "scores": torch.tensor([0.5, 0.49, 0.9]),
        "labels": torch.tensor([1, 0, 1]),
    }

    class Fixed(torch.nn.Module):
        def forward(self, images, targets=None):
            return [found] * len(images) if targets is None else {"seen": targets}

    view = {"teacher": [torch.rand(3, 32, 32)]}
    student = pseudo.PseudoLabelled(Fixed(), Fixed(), 0.5, view, 2.0)
    (labels,) = student([torch.rand(3, 16, 16)], None)["seen"]
    # The second is not sure enough, the third 1.5 pixels wide in the student's image.
    assert (labels["boxes"].tolist(), labels["labels"].tolist()) == ([[2, 4, 10, 14]], [1])
    assert student([torch.rand(3, 16, 16)], [{}])["seen"] == [{}]
    assert not list(student.parameters())


def test_two_processes_do_a_run_once(root, tmp_path):
    """The second waits for the first, and finds what it left."""
    one = small_run()
    folder = tmp_path / run.name_of(one)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(run.as_json(one))
    lock = run.locked(folder)
    given = {"--root": root, "--output": tmp_path, "--cache": root / "cache"}
    arguments = [str(part) for pair in given.items() for part in pair]
    process = subprocess.Popen([sys.executable, FOLDER / "evidence_run.py", folder, *arguments])
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(8)
    (folder / "result.json").write_text("{}")
    lock.close()
    assert process.wait(60) == 0
    assert not (folder / "model.pt").exists()


def test_a_budget_is_flat_where_twice_as_much_brings_little():
    assert evidence.flat_at({100: 20.0, 200: 30.0, 400: 30.9}) == 200
    assert evidence.flat_at({100: 20.0, 200: 30.0}) is None
    assert evidence.flat_at({100: 0.0, 200: 0.0, 400: 0.5}) is None  # it learned nothing yet
    assert evidence.flat_at({100: 5.0, 200: 5.6, 400: 6.1}) == 200  # 0.6 AP are more than a tenth of 5


class Process:
    """Stands for a run's process: done at once, or failed."""

    def __init__(self, one, options, test, fails=()) -> None:
        folder = options.output / run.name_of(one)
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(run.as_json(one))
        self.returncode = int(one.method in fails)
        if not self.returncode:
            (folder / "result.json").write_text(json.dumps({"val": {"AP": float(one.steps)}}))
            (folder / "test.json").write_text("{}")

    def poll(self) -> int:
        return self.returncode


def launched(monkeypatch, fails=()) -> list[str]:
    names: list[str] = []

    def launch(one, options, test):
        names.append((one.method, one.seed, one.sees))
        return Process(one, options, test, fails)

    monkeypatch.setattr(evidence, "launch", launch)
    monkeypatch.setattr(evidence.time, "sleep", lambda seconds: None)
    return names


def test_nothing_is_run_twice_and_teachers_come_first(root, tmp_path, monkeypatch):
    names = launched(monkeypatch)
    options = options_of(root, tmp_path, jobs=3)
    runs = evidence.table_runs(evidence.TOY_PAIR, 6, [0, 1], ["none", "crosskd"])
    assert evidence.run_all(runs, options, test=True)
    assert set(names) == {("none", s, "images") for s in (0, 1)} | {
        ("crosskd", 0, "images"),
        ("crosskd", 1, "images"),
        ("none", 0, "pair"),
    }
    assert names.index(("none", 0, "pair")) < names.index(("crosskd", 0, "images"))
    count = len(names)
    assert evidence.run_all(runs, options, test=True)
    assert len(names) == count
    folder = tmp_path / run.name_of(runs[-1])
    (folder / "run.json").write_text(run.as_json(replace(runs[-1], learning_rate=1.0)))
    with pytest.raises(ValueError, match="other settings"):
        evidence.run_all(runs, options, test=True)


def test_a_setting_that_is_new_since_leaves_finished_runs_finished(root, tmp_path):
    options, finished = options_of(root, tmp_path), small_run()
    folder = tmp_path / run.name_of(finished)
    folder.mkdir()
    content = json.loads(run.as_json(finished))
    del content["begins"], content["model"]["finest"]
    (folder / "run.json").write_text(json.dumps(content))
    (folder / "result.json").touch()
    assert evidence.is_done(finished, options, test=False)
    with pytest.raises(ValueError, match="other settings"):
        evidence.is_done(replace(finished, batch=7), options, test=False)


def test_a_run_that_fails_is_told_and_the_others_are_done(root, tmp_path, monkeypatch):
    names = launched(monkeypatch, fails=["pkd"])
    runs = evidence.table_runs(evidence.TOY_PAIR, 6, [0], ["pkd", "none", "crosskd"])
    with pytest.raises(RuntimeError, match=r"1 runs failed, see .*pkd_6_seed0.log.txt"):
        evidence.run_all(runs, options_of(root, tmp_path), test=True)
    assert len(names) == 4


def test_when_time_is_over_nothing_is_started(root, tmp_path, monkeypatch):
    names = launched(monkeypatch)
    runs = evidence.table_runs(evidence.TOY_PAIR, 6, [0], ["none"])
    assert not evidence.run_all(runs, options_of(root, tmp_path, until=0.0), test=True)
    (tmp_path / "stop").touch()
    assert not evidence.run_all(runs, options_of(root, tmp_path), test=True)
    assert names == []


def test_a_budget_is_written_down_once_and_no_method_runs_without(root, tmp_path, monkeypatch):
    names = launched(monkeypatch)
    options = options_of(root, tmp_path)
    assert evidence.choose_budget("toy", evidence.TOY_PAIR, options)
    kept = json.loads(options.budgets.read_text())
    assert kept == {"toy": {"steps": 6, "flat": False, "alone": {"6": 6.0, "12": 12.0}, "seeds": [0]}}
    assert evidence.choose_budget("toy", evidence.TOY_PAIR, options)
    assert len(names) == 2
    arguments = ["--root", str(root), "--output", str(tmp_path), "--results", str(tmp_path / "none")]
    with pytest.raises(SystemExit, match="no budget for boards"):
        evidence.main(arguments)


def test_a_budget_keeps_what_another_process_has_written_down_meanwhile(root, tmp_path, monkeypatch):
    options = options_of(root, tmp_path)

    def run_all(runs, options, *, test):
        options.budgets.write_text(json.dumps({"other": {"steps": 3}}))
        return True

    monkeypatch.setattr(evidence, "run_all", run_all)
    monkeypatch.setattr(evidence, "validation_precision", lambda run, options: 20.0)
    assert evidence.choose_budget("toy", evidence.TOY_PAIR, options)
    assert evidence.read_budgets(options.budgets).keys() == {"other", "toy"}


def test_differences_go_seed_by_seed_with_an_interval_of_images_and_seeds():
    def finished(values):
        return report.Finished(small_run(), {}, {"AP": np.array(values)}, {})

    generator = np.random.default_rng(0)
    noise = generator.normal(size=1000)
    alone = {seed: finished([20.0, *(20 + noise)]) for seed in (0, 1, 2)}
    method = {seed: finished([20.0 + seed, *(20.0 + seed + noise)]) for seed in (0, 1, 2, 3)}
    gains, low, high = report.difference(method, alone)
    assert gains == [0.0, 1.0, 2.0]
    assert (low, high) == (0.0, 2.0)  # the images cancel, what is left are the seeds


@pytest.mark.slow
def test_the_rehearsal(tmp_path, monkeypatch):
    """Every process for real: budget, teacher, students, tables, picture."""
    monkeypatch.setattr(evidence, "subprocess", forked)
    arguments = ["--toy", "--output", str(tmp_path), "--results", str(tmp_path / "results"), "--seeds", "0"]
    arguments += ["--resamples", "20", "--methods", "none", "crosskd", "--jobs", "2"]
    evidence.main(arguments)
    rows, classes, beside, ladder = tables(tmp_path / "results" / "toy.md")
    assert [row[""] for row in rows] == ["teacher", "student alone", "CrossKD"]
    assert [row["steps"] for row in ladder] == ["6", "12"]
    assert set(classes[0]) == {"", "square", "disc"}
    alone, crosskd = beside
    lead = float(alone["AP over CrossKD on test"])
    assert lead == pytest.approx(float(rows[1]["AP"]) - float(rows[2]["AP"]), abs=0.11)
    assert (crosskd[""], crosskd["AP over CrossKD on test"]) == ("CrossKD", "")
    assert (tmp_path / "results" / "toy.png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("toy_*/result.json")}
    assert len(before) == 4
    evidence.main([*arguments, "--report"])
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_each_run_of_a_pair_has_its_row():
    runs = evidence.table_runs(evidence.PAIRS["cells_few"], 300, [0, 1], ["none", "crosskd"])
    rows = [(report.row_of(a_run, runs), a_run.seed) for a_run in runs]
    assert rows[:4] == [("teacher", 0), ("begun", 0), ("none", 0), ("crosskd", 0)]
    assert rows[4:] == [("none", 1), ("crosskd", 1), ("alone from the beginning, 2400 steps", 0)]
