"""The BCCD benchmark: what is run, what is not run twice, and what the table says."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from tests.benchmarks.test_benchmarks import load
from tests.examples.coco_files import write_coco
from tests.helpers import forked

bccd = load("bccd")
METHODS = ("none", "mimic", "crosskd", "pkd", "cwd")


def run(name: str, precision: float) -> dict[str, Any]:
    metrics = {"AP": precision, "AP50": 2 * precision, "AP75": precision / 2}
    history = [{"epoch": 1, "metrics": metrics, "losses": {}, "cpu_seconds": 6 * precision}]
    return {
        "results": {"teacher": {"AP": 99.0}, name: metrics} if name != "none" else {name: metrics},
        "histories": {name: history},
        "versions": {"torch": "2.9", "device": "CPU", "processes": "1"},
    }


RESULTS = {
    "teacher": [run("none", 50.0)],
    "none": [run("none", 30.0), run("none", 32.0)],
    "crosskd": [run("crosskd", 33.0), run("crosskd", 37.0)],
}


def options(*arguments: str) -> Any:
    return bccd.parse(["--root", "data", "--seeds", "0", "1", *arguments])[0]


def test_the_table_has_mean_and_deviation_of_each_method_and_how_it_was_made():
    text = bccd.table(RESULTS, options(), "python benchmarks/bccd.py")
    header = "|  | seeds | AP | AP50 | AP75 | AP over student alone | AP over CrossKD | CPU minutes |"
    assert text.splitlines()[2] == header
    assert "| student alone | 2 | 31.0 ± 1.4 | 62.0 ± 2.8 | 15.5 ± 0.7 |  | -4.0 ± 1.4 | 3.1 ± 0.1 |" in text
    assert "| CrossKD | 2 | 35.0 ± 2.8 | 70.0 ± 5.7 | 17.5 ± 1.4 | +4.0 ± 1.4 |  | 3.5 ± 0.3 |" in text
    assert "| teacher (retinanet_resnet50) | 1 | 50.0 | 100.0 | 25.0 |  |  | 5.0 |" in text
    assert "    python benchmarks/bccd.py\n" in text
    assert "torch 2.9" in text


def test_no_difference_is_shown_where_nothing_stands_beside_or_seeds_differ():
    alone = {"teacher": RESULTS["teacher"], "crosskd": RESULTS["crosskd"]}
    assert "| AP75 | CPU minutes |" in bccd.table(alone, options(), "")
    fewer = {**RESULTS, "crosskd_pre": RESULTS["crosskd"][:1]}
    assert '| CrossKD, tap="pre" | 1 | 33.0 | 66.0 | 16.5 |  |  | 3.3 |' in bccd.table(fewer, options(), "")


def test_no_minutes_are_shown_for_runs_that_did_not_count_them():
    old = run("none", 30.0)
    del old["histories"]["none"][0]["cpu_seconds"]
    assert bccd.minutes([run("none", 30.0), old]) == ""


def test_methods_are_those_of_the_training_script_together_and_inheriting(capsys):
    names = ["none", "none+inherit", "crosskd+pkd", "cwd+inherit"]
    assert options("--methods", *names).methods == names
    for wrong, message in (
        (["--methods", "pdk"], "--methods: unknown method 'pdk': choose from none"),
        (["--methods", "pkd", "--inherit"], "write METHOD+inherit"),
    ):
        with pytest.raises(SystemExit):
            options(*wrong)
        assert message in capsys.readouterr().err


def test_the_figure_is_drawn(tmp_path):
    many = {f"{name}{start}": [run(name, 30.0 + len(name))] for name in METHODS for start in ("", "+inherit")}
    for name, results in (("few", RESULTS), ("many", {"teacher": RESULTS["teacher"], **many})):
        bccd.draw(results, tmp_path / f"{name}.png", options())
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_not_repeated_and_a_failed_one_names_its_log(tmp_path, monkeypatch):
    script = tmp_path / "fails.py"  # at once: the real one imports for seconds
    script.write_text("import sys\nsys.exit(f'unknown: {sys.argv[1]}')\n")
    monkeypatch.setattr(bccd, "SCRIPT", script)
    (tmp_path / "metrics.json").write_text(json.dumps({"results": {"none": {"AP": 1.0}}}))
    assert bccd.train(tmp_path, ["--no-such-option"]) == {"results": {"none": {"AP": 1.0}}}
    with pytest.raises(RuntimeError, match="a run failed, see .*log.txt"):
        bccd.train(tmp_path / "other", ["--no-such-option"])
    assert (tmp_path / "other" / "log.txt").read_text() == "unknown: --no-such-option\n"


def test_options_it_does_not_know_go_to_the_training_script():
    known, further = bccd.parse(["--root", "data", "--head-norm", "group", "--jobs", "2"])
    arguments = bccd.training_arguments(known, further)
    assert arguments[-2:] == ["--head-norm", "group"]
    assert arguments[arguments.index("--threads") + 1] == "1"
    assert "--resume" in arguments
    assert arguments[arguments.index("--val-annotations") + 1] == "annotations/test.json"


@pytest.mark.slow
def test_everything_is_run_once_and_the_shown_command_names_no_folder_of_this_machine(
    tmp_path, capsys, monkeypatch
):
    """A teacher, which is trained without a method, and a student: a process each."""
    monkeypatch.setattr(bccd, "subprocess", forked)
    _, annotations = write_coco(tmp_path / "data")
    (tmp_path / "data" / "annotations").mkdir()
    for split in ("train", "test"):
        shutil.copy(annotations, tmp_path / "data" / "annotations" / f"{split}.json")
    places = {"--root": "data", "--output": "runs", "--results": "table"}
    arguments = [
        *(part for option, name in places.items() for part in (option, str(tmp_path / name))),
        *("--methods", "crosskd", "--ablate-tap", "--seeds", "5", "--short-side", "64", "--width", "32"),
        *("--teacher", "retinanet_resnet18", "--student", "retinanet_mobilenet_v3_large"),
        *("--epochs", "1", "--teacher-epochs", "1", "--jobs", "2"),
    ]
    bccd.main(arguments)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["crosskd_seed5", "teacher"]
    text = (tmp_path / "table.md").read_text()
    assert "python benchmarks/bccd.py --root data/bccd --methods crosskd --ablate-tap --seeds 5" in text
    assert str(tmp_path) not in text
    assert (tmp_path / "table.png").exists()
    assert (tmp_path / "table_detections.png").exists()
    capsys.readouterr()
    bccd.main(arguments)
    assert "done" not in capsys.readouterr().out
