r"""Distils a student under Lightning's ``Trainer``, on all GPUs of the machine, or the CPU, or ``--devices``.

Data, detectors, methods and options are those of ``train_torchvision.py``, of whose ``--method`` the last is
taken, and whose teacher must be trained; options of its own loop, such as ``--resume``, are refused. It
evaluates at the end and writes ``OUTPUT/METHOD.pt``.
It needs ``pip install lightning``::

    python examples/with_lightning.py --teacher-weights runs/shapes/teacher.pt --output runs/again
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

import lightning
import torch
from coco_data import CocoFolder, training_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from processes import Processes
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from train_torchvision import OWN_OPTIONS, finish, parse, prepare_one
from training import learning_rate_factor, make_optimizer, parts_of_step

from crosskd import Distiller

PRECISION = {"none": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
OPTIONS = ArgumentParser(add_help=False)
OPTIONS.add_argument("--devices", type=int, help="as many processes; one for each GPU unless given")
ACCELERATOR = {"auto": "auto", "cpu": "cpu", "cuda": "gpu"}


class Distillation(lightning.LightningModule):
    """A distiller, or a detector alone, and its data; the teacher moves along and stands in no checkpoint."""

    def __init__(self, model: nn.Module, data: CocoFolder, options: Namespace) -> None:
        super().__init__()
        self.model, self.data, self.options = model, data, options

    def train_dataloader(self) -> DataLoader[Any]:
        """Each process's share of the batches."""
        return training_loader(
            self.data,
            self.options.batch_size,
            seed=self.options.seed,
            workers=self.options.workers,
            rank=self.trainer.global_rank,
            ranks=self.trainer.world_size,
        )

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule, which goes by steps."""
        optimizer = make_optimizer(self.model, self.options)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, total, self.options))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_epoch_start(self) -> None:
        """Augmentations and schedules in epochs follow."""
        self.data.epoch = self.current_epoch
        if isinstance(self.model, Distiller):
            self.model.set_epoch(self.current_epoch)

    def training_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], index: int) -> Tensor:
        """The sum of all losses, for Lightning to divide by ``--accumulate``."""
        images, targets = batch
        losses = self.model(images, targets)
        self.log_dict(losses, batch_size=len(images), prog_bar=True)
        # The last step of an epoch may have fewer parts.
        parts = parts_of_step(index, self.trainer.num_training_batches, self.options.accumulate)
        return self.options.accumulate / parts * torch.stack(list(losses.values())).sum()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Runs the script; returns the student's metrics."""
    options = parse(arguments, parents=[OPTIONS], refused=OWN_OPTIONS)
    try:
        trainer = lightning.Trainer(
            accelerator=ACCELERATOR[options.device],
            devices=options.devices or "auto",
            max_epochs=options.epochs,
            precision=PRECISION[options.amp],
            gradient_clip_val=options.clip or None,
            accumulate_grad_batches=options.accumulate,
            use_distributed_sampler=False,  # the loader shares the batches out itself
            enable_checkpointing=False,
            logger=False,
        )
    except MisconfigurationException as error:  # fewer GPUs than --devices
        raise SystemExit(f"with_lightning.py: error: {error}") from error
    # Lightning starts the other processes in fit().
    processes = Processes(trainer.global_rank, 1, trainer.strategy.root_device)
    model, student, (train_data, val_data), lock = prepare_one(options, processes)
    trainer.fit(Distillation(model, train_data, options))
    return finish(student.to(processes.device), val_data, options, processes, lock)


if __name__ == "__main__":
    main()
