"""One of several processes that ultralytics trains together, without a GPU, for torchrun to start.

Ultralytics starts processes for several GPUs alone. What it would start, the script that it has written
for them, runs here as it is, but for what ties it to GPUs: process group, device, number
of processes, and the validation after the last epoch. Importing this needs no ultralytics: pytest looks
for doctests in every file.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

RANKS = 2


class OnTheCPU(nn.parallel.DistributedDataParallel):
    """Takes no number of a device, which there isn't."""

    def __init__(self, module: nn.Module, device_ids: Any = None, **options: Any) -> None:
        super().__init__(module, **options)


def set_up(trainer: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")


def train(trainer: Any) -> None:
    """Trains as ultralytics' own `train` does in such a process; then looks at all students.

    Raises:
        SystemExit: the processes' students differ.
    """
    from ultralytics.utils.torch_utils import unwrap_model

    trainer.world_size = RANKS
    trainer.final_eval = lambda: None  # asks CUDA for this process's device
    trainer._do_train()
    model = unwrap_model(trainer.model)
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    others = [torch.empty_like(flat) for _ in range(RANKS)]
    dist.all_gather(others, flat)
    dist.destroy_process_group()
    if not all(torch.equal(flat, other) for other in others):
        raise SystemExit("the processes' students differ")
    if not any(name.startswith("distillation.") for name, _ in model.named_parameters()):
        raise SystemExit("no projection was trained with the student")


if __name__ == "__main__":
    from ultralytics.engine.trainer import BaseTrainer

    nn.parallel.DistributedDataParallel = OnTheCPU
    BaseTrainer._setup_ddp = set_up
    BaseTrainer.train = train
    runpy.run_path(sys.argv[1], run_name="__main__")
