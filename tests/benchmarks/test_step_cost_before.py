"""A step's cost in two versions: each runs its own code, and they take turns."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.benchmarks.test_benchmarks import FOLDER, load, tables

step_cost_before = load("step_cost_before")
ROOT = FOLDER.parent
GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-C")


@pytest.fixture
def before(tmp_path):
    """A copy of this version, with another step."""
    root = tmp_path / "before"
    for folder in ("crosskd", "benchmarks", "examples"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    path = root / "benchmarks" / "step_cost.py"
    text = path.read_text().replace("    def student_step(self) -> None:\n", SLOW, 1)
    path.write_text(text)
    subprocess.run([*GIT, str(root), "init", "-q"], check=True)
    subprocess.run([*GIT, str(root), "add", "-A"], check=True)
    subprocess.run([*GIT, str(root), "commit", "-qm", "before"], check=True)
    return root


SLOW = """    def student_step(self) -> None:
        import time
        time.sleep(1.5)
        self.step_of_the_student()

    def step_of_the_student(self) -> None:
"""


def test_each_version_runs_its_own_code(before, tmp_path):
    written = tmp_path / "table.md"
    step_cost_before.main(
        [
            *("--before", str(before), "--rows", "gfl/pkd", "--size", "32x64", "--batch", "1"),
            *("--rounds", "1", "--threads", "1", "--output", str(written)),
        ]
    )
    ((row,),) = tables(written)
    plain, step = (float(row[name].split()[0]) for name in ("a, now / before", "d, now / before"))
    assert plain < 0.6 < step  # the other version waits in its plain step alone
    commit = subprocess.run(
        [*GIT, str(before), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    assert f"before {commit.stdout.strip()}" in written.read_text()


def test_a_version_that_cannot_be_measured_ends_the_script(before, tmp_path):
    (before / "benchmarks" / "step_cost.py").write_text("raise ValueError('nothing to measure')")
    with pytest.raises(SystemExit, match="ended with 1"):
        step_cost_before.turns({"before": before}, "gfl", "pkd", 1, [])
