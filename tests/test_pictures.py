"""The documentation's pictures are what their script draws."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

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


@pytest.fixture(scope="module")
def of_methods():
    """The pictures that draw_methods.py draws; it finds the examples by their folder on the path."""
    path = list(sys.path)
    yield runpy.run_path(str(FOLDER / "draw_methods.py"))["PICTURES"]
    sys.path[:] = path


def test_each_picture_of_a_method_is_committed_and_small(of_methods):
    # That of the comparison shows students that the page's reader trains.
    assert {path.name for path in FOLDER.glob("*.png")} == {*of_methods, "compare.png"}
    for name in of_methods:
        assert (FOLDER / name).stat().st_size < 60_000
        with Image.open(FOLDER / name) as picture:
            assert picture.width == 900


def test_each_picture_of_a_method_is_on_its_page_and_described(of_methods):
    for name in of_methods:
        page = (FOLDER.parent / "methods" / name).with_suffix(".md").read_text(encoding="utf-8")
        shown = re.findall(r"^!\[(.+)\]\(../pictures/(.+\.png)\)$", page, flags=re.MULTILINE)
        assert [file for _, file in shown] == [name]
        assert len(shown[0][0].split()) >= 8, "what is to be seen, for those who can't"
