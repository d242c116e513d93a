"""A folder belongs to one run: nothing in it is overwritten or mixed without a word."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tracemalloc
from hashlib import sha256

import pytest
import torch
from run_folder import claim, fingerprint, save_atomically

SETTINGS = {"seed": 0, "batch_size": 2, "short_side": (64, 96)}


def hold(folder, ready) -> None:
    lock = claim(folder, SETTINGS, resume=False)
    ready.set()
    signal.pause()
    lock.close()


def test_a_folder_in_use_is_refused_and_free_once_its_process_is_killed(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(SystemExit, match="in use by another run"):
        claim(tmp_path, SETTINGS, resume=True)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    claim(tmp_path, SETTINGS, resume=False).close()


@pytest.mark.parametrize("result", ["metrics.json", "teacher/checkpoint.pt"])
def test_results_are_overwritten_by_nobody(tmp_path, result):
    claim(tmp_path, SETTINGS, resume=False).close()
    claim(tmp_path, {**SETTINGS, "seed": 1}, resume=False).close()  # nothing was made yet
    (tmp_path / result).parent.mkdir(exist_ok=True)
    (tmp_path / result).write_text("")
    with pytest.raises(SystemExit, match=f"{result}.*--resume.*--output"):
        claim(tmp_path, {**SETTINGS, "seed": 1}, resume=False)
    claim(tmp_path, {**SETTINGS, "seed": 1}, resume=True).close()


def test_a_run_goes_on_with_its_own_options_alone(tmp_path):
    claim(tmp_path, SETTINGS, resume=False).close()
    (tmp_path / "metrics.json").write_text("")
    claim(tmp_path, {**SETTINGS, "new_option": 3}, resume=True).close()
    with pytest.raises(SystemExit, match="--seed 0, now 1; --batch-size 2, now 4"):
        claim(tmp_path, {**SETTINGS, "seed": 1, "batch_size": 4}, resume=True)
    (tmp_path / "run.json").write_text('{"seed":')
    with pytest.raises(SystemExit, match=r"run.json.*can't be read"):
        claim(tmp_path, SETTINGS, resume=True)


def test_files_are_compared_by_what_they_hold(tmp_path):
    path = tmp_path / "teacher.pt"
    assert fingerprint(path) == str(path)
    path.write_bytes(b"a")
    first = fingerprint(path)
    path.write_bytes(b"b")
    assert first != fingerprint(path) != str(path)
    assert (fingerprint("published"), fingerprint(None)) == ("published", None)


def test_links_are_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("whole")
    (tmp_path / "weights.pt.unfinished").symlink_to(victim)
    save_atomically({"a": torch.ones(1)}, tmp_path / "weights.pt")
    assert victim.read_text() == "whole"
    assert torch.load(tmp_path / "weights.pt", weights_only=True)["a"] == 1


def test_a_full_disk_names_the_file_and_keeps_what_it_held(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    save_atomically({"a": torch.ones(1)}, path)

    def full(content, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"weights.pt can't be written.*No space left"):
        save_atomically({"a": torch.zeros(1)}, path)
    assert torch.load(path, weights_only=True)["a"] == 1


def test_a_large_file_is_not_held_in_memory_to_be_told_from_others(tmp_path):
    tmp_path.joinpath("large.json").write_bytes(b"[0]" * 2**22)
    tracemalloc.start()
    found = fingerprint(tmp_path / "large.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == f"a file of contents {sha256(b'[0]' * 2**22).hexdigest()[:12]}"
    assert peak < 2**22
