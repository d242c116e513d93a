"""mmengine's checkpoints, read without mmengine: what is let in, what is refused, and what stays behind."""

from __future__ import annotations

import collections
import fractions
import subprocess
import sys
import types
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from crosskd.checkpoints import read_mmdet_checkpoint


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "backbone.conv1.weight": torch.randn(4, 3, 7, 7, generator=generator),
        "backbone.bn1.num_batches_tracked": torch.tensor(7),
        "bbox_head.scales.0.scale": torch.tensor(1.5),
    }


@pytest.fixture
def history_buffer(monkeypatch):
    """A class that pickles as mmengine's HistoryBuffer does: numpy arrays, and its own methods by name."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self):
            self.max_length = 1000000
            self._log_history = np.array([0.5, 0.25])
            self._count_history = np.array([1, 1])

        def mean(self):
            return self._log_history.mean()

        def __getstate__(self):
            return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return HistoryBuffer


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)


def safe_globals() -> set:
    return set(torch.serialization.get_safe_globals())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "as PyTorch before 1.6 wrote"])
def test_reads_what_mmengine_writes(tmp_path, weights, history_buffer, legacy):
    checkpoint = {
        "meta": {"cfg": "model = dict()", "dataset_meta": {"classes": ("cell",), "palette": {(1, 2, 3)}}},
        "state_dict": collections.OrderedDict(weights),
        "message_hub": {
            "log_scalars": collections.OrderedDict({"train/loss": history_buffer()}),
            "runtime_info": {"best_score": np.float64(0.4)},
        },
        "optimizer": torch.optim.AdamW([nn.Parameter(torch.ones(2))]).state_dict(),
    }
    path = tmp_path / "epoch_1.pth"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    before = safe_globals()
    assert_same(read_mmdet_checkpoint(path), weights)
    assert safe_globals() == before


def test_what_others_allowed_under_the_same_names_is_not_called(tmp_path, weights, history_buffer):
    """As ultralytics allows a getattr of its own, and leaves it allowed, where it has read a file safely."""

    def rival() -> object:
        def getattr_of_theirs(*_: object) -> None:
            raise AssertionError("another library's getattr was called")

        getattr_of_theirs.__module__, getattr_of_theirs.__qualname__ = "builtins", "getattr"
        return getattr_of_theirs

    path = tmp_path / "epoch_1.pth"
    history = {"log_scalars": {"train/loss": history_buffer()}}
    torch.save({"state_dict": weights, "message_hub": history}, path)
    before = safe_globals()
    try:
        # The list is a set, so of two with one name either may win: among many, one of theirs does.
        torch.serialization.add_safe_globals([rival() for _ in range(16)])
        with_theirs = safe_globals()
        assert_same(read_mmdet_checkpoint(path), weights)
        assert safe_globals() == with_theirs
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(before))


@pytest.mark.mmdet
def test_reads_the_files_of_a_real_mmengine(tmp_path, weights):
    from mmengine.logging import HistoryBuffer, MessageHub
    from mmengine.runner import save_checkpoint

    hub = MessageHub.get_instance("test_checkpoints")
    hub.update_scalar("train/loss", 0.5)
    hub.update_info("best_score", np.float32(0.4))
    assert isinstance(hub.get_scalar("train/loss"), HistoryBuffer)
    path = tmp_path / "epoch_1.pth"
    save_checkpoint({"meta": {"epoch": 1}, "state_dict": weights, "message_hub": hub.state_dict()}, str(path))
    assert_same(read_mmdet_checkpoint(path), weights)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights},
        lambda weights: {"state_dict": {f"module.{key}": value for key, value in weights.items()}},
    ],
    ids=["weights alone", "state_dict", "of a parallel module"],
)
def test_forms(tmp_path, weights, wrap):
    torch.save(wrap(weights), tmp_path / "weights.pth")
    assert_same(read_mmdet_checkpoint(str(tmp_path / "weights.pth")), weights)


def test_any_other_object_is_refused_by_name(tmp_path, weights):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": weights, "meta": fractions.Fraction(1, 2)}, path)
    before = safe_globals()
    with pytest.raises(ValueError, match="weights.pth holds a fractions.Fraction, which is neither a weight"):
        read_mmdet_checkpoint(path)
    assert safe_globals() == before


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [exec, subprocess.call, Path.touch], ids=lambda f: f.__qualname__)
def test_nothing_in_a_file_is_run(tmp_path, weights, function):
    mark = tmp_path / "mark"
    argument = {
        "exec": f"open({str(mark)!r}, 'w')",
        "call": ["touch", str(mark)],
        "Path.touch": mark,
    }[function.__qualname__]
    torch.save({"state_dict": weights, "meta": Malicious(function, argument)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights.pth holds a "):
        read_mmdet_checkpoint(tmp_path / "weights.pth")
    assert not mark.exists()


def test_getattr_is_let_in_by_name_and_never_called(tmp_path, weights):
    payload = Malicious(getattr, "text", "no_such_name")  # would raise if it were called
    torch.save({"state_dict": weights, "meta": payload}, tmp_path / "weights.pth")
    assert_same(read_mmdet_checkpoint(tmp_path / "weights.pth"), weights)
    torch.save({"state_dict": {**weights, "bias": payload}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="'bias' must be a tensor, got an object of numpy or mmengine"):
        read_mmdet_checkpoint(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"state_dict": {}}, r"holds no weights.*got \['state_dict'\]"),
        ({}, "holds no weights"),
        (torch.ones(2), "holds no weights: expected a state_dict of tensors, got Tensor"),
        ({"state_dict": {"neck.bias": np.ones(2)}}, "'neck.bias' must be a tensor, got an object of numpy"),
        ({"meta": {}, "epoch": 3}, "'meta' must be a tensor, got dict"),
    ],
)
def test_files_without_weights(tmp_path, content, complaint):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=complaint):
        read_mmdet_checkpoint(tmp_path / "weights.pth")


@pytest.mark.parametrize("keep", [0, 40, 1000])
def test_files_that_are_no_checkpoint(tmp_path, weights, keep):
    whole, path = tmp_path / "whole.pth", tmp_path / "part.pth"
    torch.save(weights, whole)
    path.write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(ValueError, match="part.pth is no checkpoint"):
        read_mmdet_checkpoint(path)
    path.write_text("<html>404</html>")
    with pytest.raises(ValueError, match="part.pth is no checkpoint"):
        read_mmdet_checkpoint(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*epoch_9.pth"):
        read_mmdet_checkpoint(tmp_path / "epoch_9.pth")


class TestAddresses:
    @pytest.fixture
    def served(self, tmp_path, monkeypatch, weights):
        """Puts a file behind an address, and notes what is asked for."""
        asked = []
        monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))

        def download(address, path, hash_prefix):
            asked.append((address, hash_prefix))
            torch.save(weights, path)

        monkeypatch.setattr("crosskd.checkpoints.download_url_to_file", download)
        return asked

    def test_downloaded_once_with_the_hash_in_its_name(self, tmp_path, served, weights):
        address = "https://example.org/gfl/gfl_r101_fpn_2x_coco_20200629_200126-dd12f847.pth?download=1"
        for _ in range(2):
            assert_same(read_mmdet_checkpoint(address), weights)
        assert served == [(address, "dd12f847")]
        kept = tmp_path / "hub" / "checkpoints" / "gfl_r101_fpn_2x_coco_20200629_200126-dd12f847.pth"
        assert kept.is_file()

    def test_without_a_hash(self, served, weights):
        assert_same(read_mmdet_checkpoint("http://example.org/epoch_12.pth"), weights)
        assert served == [("http://example.org/epoch_12.pth", None)]

    def test_a_wrong_hash_is_an_error(self, tmp_path, monkeypatch, weights):
        monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
        served = tmp_path / "served.pth"
        torch.save(weights, served)
        monkeypatch.setattr(torch.hub, "urlopen", lambda request: urllib.request.urlopen(served.as_uri()))
        with pytest.raises(RuntimeError, match="invalid hash"):
            read_mmdet_checkpoint("https://example.org/gfl-dd12f847.pth")
        assert not (tmp_path / "hub" / "checkpoints" / "gfl-dd12f847.pth").exists()
