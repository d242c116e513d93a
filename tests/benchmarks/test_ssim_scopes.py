"""The comparison of what SSIM's minimum and maximum are of."""

from __future__ import annotations

import re
from itertools import product

import pytest

from tests.benchmarks.test_benchmarks import load
from tests.helpers.reference_files import bccd_folder

scopes = load("ssim_scopes")


def test_effects_compare_trainings_that_differ_in_one_thing():
    """A scope that adds 3 to whatever seed and weight give, and a weight that adds 1."""
    found = {}
    for scope, weight in product(scopes.SCOPES, scopes.WEIGHTS):
        more = 3 * (scope == "map") + (weight == 4)
        found[scope, weight] = [10.0 + more, 30.0 + more]
    rows = dict(re.findall(r"^\| (.+?) \| (.+? ± .+?) \|", scopes.effects(found), flags=re.MULTILINE))
    assert rows == {
        '"channel"': "-0.75 ± 0.00",
        '"batch"': "-0.75 ± 0.00",
        '"map"': "+2.25 ± 0.00",
        '"all"': "-0.75 ± 0.00",
        "weight 2": "-0.50 ± 0.00",
        "weight 4": "+0.50 ± 0.00",
    }


@pytest.mark.usefixtures("one_thread")
def test_every_variant_is_trained_from_the_same_weights(tmp_path, monkeypatch):
    started = []

    def trained(model, images, targets, steps):
        student = getattr(model, "student", model)
        started.append((steps, next(student.parameters()).detach().sum().item()))

    page = {**scopes.page_code(), "train": trained}
    monkeypatch.setattr(scopes, "page_code", lambda: page)
    monkeypatch.setattr(scopes, "average_precision", lambda *_: {"AP": float(len(started))})
    options = ["--root", str(bccd_folder()), "--images", "2", "--validation-images", "2", "--seeds", "2"]
    output = tmp_path / "scopes.md"
    scopes.main([*options, "--steps", "3", "--teacher-steps", "5", "--threads", "1", "--output", str(output)])
    assert [steps for steps, _ in started] == [5] + [3] * 18
    students = [start for _, start in started[1:]]
    assert students == students[:2] * 9
    assert students[0] != students[1]
    text = output.read_text()
    assert "| alone | 2.0 | 3.0 | 2.5 ± 0.7 |" in text
    assert '| "all", weight 4 | 18.0 | 19.0 | 18.5 ± 0.7 |' in text
