"""The tutorial of a detector of one's own: its page runs, and its detectors learn from real images."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch

from crosskd import CrossKD, Distiller
from tests.helpers.blood_cells import average_precision, cells
from tests.test_docs import EXAMPLES, ROOT, python_blocks

PAGE = ROOT / "docs/your_detector.md"
# As much as teaches the teacher something, which `check` insists on; else no more than runs a line.
SHORT = {"draw(200, ": "draw(8, ", "draw(60, ": "draw(3, ", "steps=300": "steps=60", "steps=100": "steps=2"}


@pytest.fixture(autouse=True)
def _examples(monkeypatch) -> None:
    """The page imports the detector from the file that it shows."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])


def shown(*parts: str) -> dict[str, Any]:
    """What the page's blocks define, run in order: all of them, or those with one of some parts in them."""
    defined: dict[str, Any] = {"__name__": PAGE.name}
    for line, block in python_blocks(PAGE):
        if parts and not any(part in block for part in parts):
            continue
        source = "\n" * line + block
        for long, brief in SHORT.items():
            source = source.replace(long, brief)
        exec(compile(source, str(PAGE), "exec"), defined)
    return defined


def test_the_page_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    assert all(page.count(long) for long in SHORT)
    defined = shown()
    printed = capsys.readouterr().out
    for name in ("teacher", "distilled", "alone"):
        assert f"{name} 0." in printed
    assert sorted(defined["detections"][0]) == ["boxes", "labels", "scores"]
    images, student = defined["test_images"], defined["student"]
    for plain, distilled in zip(defined["detections"], student.eval()(images), strict=True):
        assert all(torch.equal(plain[key], distilled[key]) for key in plain)
    described = page.split("```text\n", 1)[1].split("```", 1)[0]
    assert described in printed


def test_the_page_keeps_what_it_promises():
    """What matters stands first, in at most 18 lines, and the adapter is at most 15 of them."""
    (_, first), *_ = python_blocks(PAGE)
    adapter = first[first.index("adapter = generic(") : first.index("\n)\n") + 2]
    assert len(first.splitlines()) <= 18
    assert len(adapter.splitlines()) <= 15
    page = PAGE.read_text(encoding="utf-8")
    file = (EXAMPLES / "your_detector.py").read_text(encoding="utf-8")
    for marker in ("# -- the detector", "# -- its training", "# -- images"):
        assert marker in page
        assert file.count(marker) == 1


# -- on real images --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("detector", "adapter"), [("SmallDetector", "adapter"), ("ObjectnessDetector", "with_objectness")]
)
def test_the_pages_detectors_on_blood_cells(detector, adapter):
    """A teacher of 48 channels and a student of 16, with and without it: seed 0 of those in docs/runs.md."""
    page = shown("adapter = generic(", "with_objectness = generic(")
    train, build = page["train"], page[detector]
    _, images, targets = cells("train", 48)
    dataset, test_images, _ = cells("test", 36)
    torch.manual_seed(0)
    teacher = build(3, width=48)
    train(teacher, images, targets, steps=200)
    torch.manual_seed(0)
    start = build(3, width=16)
    alone, student = copy.deepcopy(start), copy.deepcopy(start)
    train(Distiller(teacher, student, CrossKD(position=1), page[adapter]), images, targets, steps=80)
    distilled = average_precision(student, dataset, test_images)["AP50"]
    assert distilled > average_precision(start, dataset, test_images)["AP50"] + 5
    if adapter == "adapter":
        train(alone, images, targets, steps=80)
        assert distilled > average_precision(alone, dataset, test_images)["AP50"]
