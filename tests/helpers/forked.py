"""Python scripts in forks of the test's process, which has imported already what takes a new one seconds.

The module stands for `subprocess` where a script starts others: ``setattr(script, "subprocess", forked)``.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any


def in_fork(work: Callable[..., None], *arguments: Any) -> Any:
    """Starts a function in a fork; the process."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def _script(command: Sequence[str], log: TextIOWrapper, environment: Mapping[str, str]) -> None:
    """Does what ``python script arguments`` would, and writes what it prints to a file."""
    _, script, *arguments = command
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    sys.stdout = sys.stderr = log
    sys.argv, sys.path[:0] = [script, *arguments], [str(Path(script).parent)]
    os.environ.update(environment)
    log.reconfigure(line_buffering=True)
    runpy.run_path(script, run_name="__main__")
    os._exit(0)  # else a fork that a thread made would wait for that thread, which is itself


class Popen:
    """Starts a script, as `subprocess.Popen` does."""

    def __init__(
        self, command: Sequence[str], *, stdout: TextIOWrapper, stderr: TextIOWrapper, env: Any
    ) -> None:
        self.process = in_fork(_script, command, stdout, env)

    def poll(self) -> int | None:
        return self.returncode

    @property
    def returncode(self) -> int | None:
        code: int | None = self.process.exitcode
        return code


def run(command: Sequence[str], *, check: bool, **streams: Any) -> Popen:
    """Runs a script to its end, as `subprocess.run` does with ``check=False``."""
    started = Popen(command, **streams)
    started.process.join()
    return started


def on_ranks(work: Callable[..., None], *arguments: Any, ranks: int = 2) -> list[int]:
    """Calls a function in forks with the environment that ``torchrun`` gives each rank; their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def on_rank(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        work(*arguments)

    processes = [in_fork(on_rank, rank) for rank in range(ranks)]
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]
