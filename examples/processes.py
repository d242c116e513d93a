"""One process or several: what ``torchrun`` set up."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those of a run.

    Attributes:
        rank: this process, from 0.
        ranks: how many there are.
        device: what this process computes on.
    """

    rank: int
    ranks: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Prints a line, once."""
        if self.is_first:
            print(text, flush=True)

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.ranks > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The values that all processes have, by rank."""
        values = [value] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What the first process makes, in every process; a ``ValueError`` or ``OSError`` of it too."""
        if self.ranks == 1:
            return make()
        made: list[Any] = [None, None]
        if self.is_first:
            try:
                made[0] = make()
            except (ValueError, OSError) as error:
                made[1] = error
        dist.broadcast_object_list(made, 0)
        if made[1] is not None:
            raise made[1]
        found: Value = made[0]
        return found


SINGLE = Processes(0, 1, torch.device("cpu"))


def start(device: str) -> Processes:
    """Joins the process group that ``torchrun`` announces, or stays alone.

    Args:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    own = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(own)
    if "RANK" not in os.environ:
        return Processes(0, 1, own)
    dist.init_process_group("nccl" if cuda else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size(), own)


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
