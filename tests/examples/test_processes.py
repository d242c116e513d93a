from __future__ import annotations

import pytest
import torch
from processes import SINGLE, Processes
from torch import distributed


def test_what_the_first_process_makes_or_raises_all_do(monkeypatch):
    sent = []

    def broadcast(values, source):
        if values == [None, None]:
            values[:] = sent
        else:
            sent[:] = values

    def fail():
        raise ValueError("annotation 7")

    monkeypatch.setattr(distributed, "broadcast_object_list", broadcast)
    first, second = (Processes(rank, 2, torch.device("cpu")) for rank in (0, 1))
    assert SINGLE.from_first(lambda: 5) == first.from_first(lambda: 5) == second.from_first(lambda: 6) == 5
    for process, make in ((first, fail), (second, lambda: 3)):
        with pytest.raises(ValueError, match="annotation 7"):
            process.from_first(make)
    assert SINGLE.gather(3) == [3]
