"""How cost grows: the fit, and both tables at the smallest size."""

from __future__ import annotations

import json

import pytest
import torch

from tests.benchmarks.test_benchmarks import load, tables

TOY = """--teacher resnet18 --student resnet18 --size 32x64 --classes 3 --objects 2 --rounds 1 --threads 1
--families retinanet"""


@pytest.fixture
def growth(monkeypatch):
    """The script, without the steps that come first."""
    monkeypatch.setattr(load("gpu"), "take_first_steps", lambda *arguments: None)
    return load("growth")


def test_tables(growth, tmp_path, monkeypatch):
    calls = []

    def quadratic(family, axis, options):
        calls.append(axis)
        amounts = growth.amounts_of(axis)
        rounds = [[n**2, n**2, 5 * n**2, n**2] for n in amounts]
        numbers = {"seconds": rounds, "bytes": [2**21 * n for n in amounts]}
        return dict.fromkeys(growth.KINDS, numbers)

    monkeypatch.setattr(growth, "measure_axis", quadratic)
    options = [*TOY.split(), "--axes", "images", "pixels", "--folder", str(tmp_path)]
    for _ in range(2):  # what has a file isn't measured again
        growth.main([*options, "--output", str(tmp_path / "growth.md")])
    assert calls == ["images", "pixels"]
    fits, rows = tables(tmp_path / "growth.md")
    for fit in fits:
        assert (fit["plain, time"], fit["distilled, memory"]) == ("2.00 (2.00 to 2.00)", "1.00")
        assert fit["distilled, time, last two points"] == "2.00 (2.00 to 2.00)"
    sizes = ["96x128", "192x256", "384x512", "800x1333"]
    assert [row["at"] for row in rows] == ["1", "2", "4", "8", *sizes]
    assert rows[1] | {"distilled, ms": "4000", "plain, MiB": "4"} == rows[1]


def shapes_given(head):
    """The sizes of the maps that a head is given from now on."""
    shapes = []
    head.register_forward_pre_hook(lambda _, given: shapes.extend(m.shape[2:] for m in given[0]))
    return shapes


@pytest.mark.slow
def test_fewer_levels_and_a_rank(growth, tmp_path, one_thread):
    script = load("step_cost")
    for family in ("gfl", "retinanet"):
        detector = script.build_detector(f"{family}_resnet18", 3, width=32, short_side=[32], long_side=64)
        growth.keep_levels(detector, 2)
        shapes = shapes_given(detector.head)
        target = {"boxes": torch.tensor([[1.0, 1.0, 9.0, 9.0]]), "labels": torch.tensor([1])}
        detector.train()([torch.rand(3, 32, 64)] * 2, [target] * 2)
        assert shapes == [(4, 8), (2, 4)]
        assert script.adapter_of(detector).strides == (8, 16)
    growth.run_rank(0, 1, "retinanet", growth.parse_options(TOY.split()), tmp_path)
    result = json.loads((tmp_path / "0.json").read_text())
    assert result["distilled"]["bytes"] > result["plain"]["bytes"] > 4 * 11e6  # the buckets of a ResNet-18
    assert result["distilled"]["seconds"][0] > result["plain"]["seconds"][0] > 0
    assert not torch.distributed.is_initialized()
