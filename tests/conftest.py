"""Fixtures of all tests."""

import gc
import multiprocessing

import pytest
import torch
from hypothesis import settings

# What an example may take says nothing on a machine that other work keeps busy.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

# Imported once by the server that forks the processes which tests start, where they are installed.
multiprocessing.set_forkserver_preload(["torchvision", "crosskd", "mmdet.apis", "lightning", "ultralytics"])


@pytest.fixture
def frozen_objects():
    """For code that collects garbage by itself: it need not look at what the tests have imported."""
    gc.freeze()


@pytest.fixture
def one_thread():
    """On a CPU that other work keeps busy, threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
