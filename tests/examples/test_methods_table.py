"""The names of `--method`: all of the library's methods, and what is made of them."""

from __future__ import annotations

import pytest
from methods_table import METHODS, check_name, inherits, is_pseudo_labelled, label_of, make_methods
from train_torchvision import parse

import crosskd
from crosskd.methods.maps import MapMethod


def test_every_method_of_the_library_has_a_name():
    """But for those of queries: the script trains no detection transformer."""
    listed = [getattr(crosskd.methods, name) for name in crosskd.methods.__all__]
    kinds = {k for k in listed if issubclass(k, crosskd.Method) and k.forward is not crosskd.Method.forward}
    kinds = {kind for kind in kinds if "queries" not in kind.requires}
    made = {type(entry.make(parse([]))) for entry in METHODS.values()}
    assert made == kinds


def test_options_reach_the_methods_that_take_them():
    options = parse(["--position", "2", "--tap", "pre", "--cls-weight", "0.5", "--stop-distilling", "3"])
    cross = make_methods("crosskd+pkd", options)[0]
    assert (cross.position, cross.tap, cross.comparison.cls_weight) == (2, "pre", 0.5)
    for name in METHODS:
        (method,) = make_methods(name, options)
        assert method.schedule == crosskd.Schedule(stop=3, unit="epoch")
        assert method.schedule is not None


def test_maps_are_resized_for_a_teacher_that_sees_images_of_another_size():
    for name in METHODS:
        (method,) = make_methods(name, parse([]))
        (other,) = make_methods(name, parse(["--teacher-short-side", "64"]))
        if isinstance(method, MapMethod) and name != "cosine":  # which always resizes
            assert (method.resize, other.resize) == (False, True)


def test_none_pseudo_and_inherit_are_no_methods():
    for name in ("none", "none+inherit", "pseudo", "pseudo+inherit"):
        assert make_methods(name, parse([])) == []
    assert [name for name in ("none", "pkd", "pseudo", "pseudo+pkd") if is_pseudo_labelled(name)] == [
        "pseudo",
        "pseudo+pkd",
    ]
    assert [type(method) for method in make_methods("pkd+inherit", parse([]))] == [crosskd.PKD]
    assert [name for name in ("none", "pkd", "pkd+inherit") if inherits(name)] == ["pkd+inherit"]


def test_a_student_is_called_by_what_trained_it():
    names = ("teacher", "none", "crosskd+pkd", "none+inherit", "mimic+inherit", "pseudo", "pseudo+mimic")
    assert [label_of(name) for name in names] == [
        "teacher",
        "student alone",
        "CrossKD + PKD",
        "student alone, inherited",
        "prediction mimicking, inherited",
        "the teacher's detections as labels",
        "prediction mimicking, and detections as labels",
    ]
    assert len({label_of(name) for name in METHODS}) == len(METHODS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("crosskd+pdk", "unknown method 'pdk': choose from none, mimic, crosskd, pkd"),
        ("", "unknown method ''"),
        ("pkd+pkd", "names a part twice"),
        ("none+pkd", "none is the student alone"),
        ("none+pseudo", "none is the student alone"),
        ("inherit", "names no method: none[+]inherit"),
    ],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        check_name(name)


def test_inherit_is_for_all_students():
    options = parse(["--inherit", "--method", "none", "crosskd", "pkd+inherit"])
    assert options.method == ["none+inherit", "crosskd+inherit", "pkd+inherit"]
