"""Python scripts in forks of a server that has imported already what takes a new process seconds.

Not in forks of the test's own process: after a backward pass on a GPU, or a first one while `torch.compile`
traces, autograd refuses to work in those. The module stands for `subprocess` where a script starts others:
``setattr(script, "subprocess", forked)``.
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


def in_fork(work: Callable[..., None], *arguments: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """Starts a function of a module, without what the test has patched in it; the process."""
    process = multiprocessing.get_context("forkserver").Process(
        target=_in_environment, args=(dict(environment), work, *arguments)
    )
    process.start()
    return process


def _in_environment(environment: Mapping[str, str], work: Callable[..., None], *arguments: Any) -> None:
    os.environ.clear()  # of the server, which has that of the first test that used it
    os.environ.update(environment)
    work(*arguments)


def _script(command: Sequence[str], log: str) -> None:
    """Does what ``python script arguments`` would, and adds what it prints to a file."""
    _, script, *arguments = command
    with open(log, "a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv, sys.path[:0] = [script, *arguments], [str(Path(script).parent)]
    runpy.run_path(script, run_name="__main__")


class Popen:
    """Starts a script, as `subprocess.Popen` does."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdout: TextIOWrapper,
        stderr: TextIOWrapper,
        env: Mapping[str, str] = os.environ,
    ) -> None:
        self.process = in_fork(_script, command, stdout.name, environment=env)

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
    """Calls a function with the environment that ``torchrun`` gives each rank; their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        processes.append(in_fork(work, *arguments, environment=environment))
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]
