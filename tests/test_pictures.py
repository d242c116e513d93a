"""The documentation's pictures are what their script draws."""

from __future__ import annotations

import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

FOLDER = Path(__file__).parents[1] / "docs/pictures"
PICTURES = runpy.run_path(str(FOLDER / "draw.py"))["PICTURES"]


@pytest.mark.parametrize("name", PICTURES)
def test_committed_picture_is_the_drawn_one(name):
    assert (FOLDER / name).read_bytes() == PICTURES[name]().encode(), "run python docs/pictures/draw.py"


@pytest.mark.parametrize("name", PICTURES)
def test_picture_is_well_formed_and_described(name):
    picture = ElementTree.parse(FOLDER / name).getroot()
    svg = "{http://www.w3.org/2000/svg}"
    assert picture.tag == f"{svg}svg"
    for described in ("title", "desc"):
        assert picture.findtext(f"{svg}{described}")


def test_every_committed_picture_is_drawn():
    assert {path.name for path in FOLDER.glob("*.svg")} == set(PICTURES)


def test_running_the_script_writes_the_pictures(tmp_path):
    script = tmp_path / "draw.py"
    script.write_bytes((FOLDER / "draw.py").read_bytes())
    runpy.run_path(str(script), run_name="__main__")
    assert {path.name for path in tmp_path.glob("*.svg")} == set(PICTURES)
    for name in PICTURES:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
