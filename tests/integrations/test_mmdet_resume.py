"""mmengine's own checkpoints are read back, and nothing else than such files hold."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.mmdet


@pytest.fixture
def load():
    """mmengine's loading of a checkpoint, as its Runner calls it."""
    from mmengine.runner import CheckpointLoader

    import crosskd.integrations.mmdet  # noqa: F401

    return lambda path: CheckpointLoader.load_checkpoint(str(path), map_location="cpu", logger="silent")


class Stranger:
    """What no checkpoint of mmengine's holds."""


def test_a_log_history_comes_back_as_it_was(load, tmp_path):
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer([3.0, 2.5], [1, 1])
    torch.save(
        {
            "message_hub": {"log_scalars": {"train/loss": history}},
            "meta": {"best_score": np.float64(0.25), "array": np.arange(3), "classes": ("a", "b")},
            "state_dict": {"weight": torch.ones(2)},
        },
        tmp_path / "epoch_1.pth",
    )
    loaded = load(tmp_path / "epoch_1.pth")
    back = loaded["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(back, HistoryBuffer)
    back.update(2.0)
    assert (back.mean(), back.statistics("min"), back.current()) == (2.5, 2.0, 2.0)
    assert loaded["meta"]["best_score"] == 0.25
    assert loaded["meta"]["array"].tolist() == [0, 1, 2]
    assert torch.equal(loaded["state_dict"]["weight"], torch.ones(2))


def test_any_other_object_is_refused(load, tmp_path):
    torch.save({"state_dict": {}, "meta": Stranger()}, tmp_path / "epoch_1.pth")
    with pytest.raises(pickle.UnpicklingError, match="Stranger"):
        load(tmp_path / "epoch_1.pth")


class Attribute:
    """Pickled as ``getattr(owner, name)``."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


@pytest.mark.parametrize("name", ["__init__", "__dict__", "update", "_set_default_statistics"])
def test_getattr_reaches_a_historys_statistics_alone(load, tmp_path, name):
    from mmengine.logging import HistoryBuffer

    torch.save({"meta": Attribute(HistoryBuffer, name)}, tmp_path / "epoch_1.pth")
    with pytest.raises((pickle.UnpicklingError, ValueError), match=name):
        load(tmp_path / "epoch_1.pth")
    torch.save({"meta": Attribute(torch.Tensor, "__init__")}, tmp_path / "epoch_2.pth")
    with pytest.raises((pickle.UnpicklingError, ValueError), match="__init__|Tensor"):
        load(tmp_path / "epoch_2.pth")


def test_nothing_stays_allowed(load, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "epoch_1.pth")
    before = set(torch.serialization.get_safe_globals())
    load(tmp_path / "epoch_1.pth")
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_missing_file_is_named(load, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*epoch_9"):
        load(tmp_path / "epoch_9.pth")
