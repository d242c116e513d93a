"""Methods by the names of their classes: what a config's words become."""

from __future__ import annotations

import inspect

import pytest

import crosskd
from crosskd.integrations.named import named_methods

NAMES = [
    name
    for name in crosskd.methods.__all__
    if issubclass(kind := getattr(crosskd.methods, name), crosskd.Method) and not inspect.isabstract(kind)
]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_of_the_library_is_made_by_its_name_and_takes_a_schedule(name):
    plain, scheduled = named_methods([name, {"type": name, "schedule": {"stop": 3, "unit": "epoch"}}])
    assert type(plain) is type(scheduled) is getattr(crosskd.methods, name)
    assert plain.schedule is None
    assert scheduled.schedule == crosskd.Schedule(stop=3, unit="epoch")


def test_one_alone_several_and_none():
    ready = crosskd.PKD()
    assert named_methods(ready) == [ready]
    assert [type(m) for m in named_methods(None)] == [crosskd.CrossKD]
    config = {"type": crosskd.CrossKD, "position": 2}
    (cross,) = named_methods(config)
    assert cross.position == 2
    assert config == {"type": crosskd.CrossKD, "position": 2}
    assert [type(m) for m in named_methods(("PKD", ready))] == [crosskd.PKD, crosskd.PKD]


def test_a_name_may_stand_elsewhere_too():
    class Mine(crosskd.CrossKD):
        """A method that the library doesn't know."""

    (mine,) = named_methods("Mine", {"Mine": Mine}.get)
    assert type(mine) is Mine
    (pkd,) = named_methods("PKD", {"PKD": Mine}.get)
    assert type(pkd) is crosskd.PKD


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ("Unknown", ValueError, "'Unknown' is no method .* CrossKD, .*, or pass an object"),
        ("MapMethod", ValueError, "'MapMethod' is no method"),
        ({"position": 3}, ValueError, "type None is no method"),
        ({"type": "PKD", "mass": 3}, TypeError, "mass"),
        ([3], TypeError, "expected a method, the name of one, or a dict .*, got 3"),
        (crosskd.PKD, TypeError, "expected a method, .*PKD"),
    ],
)
def test_what_is_no_method_is_refused(config, error, message):
    with pytest.raises(error, match=message):
        named_methods(config)
