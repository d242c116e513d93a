from __future__ import annotations

import json
import subprocess
import sys

import pytest

from crosskd.compare.__main__ import main
from tests.compare.scenes import make_scene


@pytest.fixture
def files(tmp_path):
    for name, content in zip(("truth", "a", "b"), make_scene(), strict=True):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_files_are_compared_and_written(files, capsys):
    main(
        [
            *(str(files / "truth.json"), f"alone={files}/a.json", f"distilled={files}/b.json"),
            *("--output", str(files / "out"), "--resamples", "5"),
        ]
    )
    shown = capsys.readouterr().out
    assert (files / "out" / "comparison.md").read_text() == shown.removesuffix("\n")
    assert "distilled - alone" in shown


@pytest.mark.parametrize(
    ("students", "fact"),
    [
        (["alone"], "NAME=FILE, got alone"),
        (["a=a.json", "a=b.json"], "each student once"),
        (["a=a.json", "b=nowhere.json"], "nowhere.json"),
        (["a=a.json"], "two students or more"),
    ],
)
def test_wrong_arguments_are_one_sentence(files, capsys, monkeypatch, students, fact):
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit):
        main(["truth.json", *students])
    assert fact in capsys.readouterr().err


@pytest.mark.slow
def test_the_module_runs_without_a_warning():
    run = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "crosskd.compare", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "NAME=FILE" in run.stdout
    assert run.stderr == ""
