r"""Distils a student in a loop of accelerate's, on as many devices as ``accelerate launch`` is told.

Data, detectors, methods and options are those of ``train_torchvision.py``, of whose ``--method`` the last is
taken, and whose teacher must be trained; options of its own loop, such as ``--resume``, are refused. It
evaluates at the end and writes ``OUTPUT/METHOD.pt``.
It needs ``pip install accelerate``::

    accelerate launch examples/with_accelerate.py --teacher-weights runs/shapes/teacher.pt --output runs/again
"""

from __future__ import annotations

import math
from argparse import Namespace

import torch
from accelerate import Accelerator
from coco_data import training_loader
from processes import Processes
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from train_torchvision import OWN_OPTIONS, finish, parse, prepare_one
from training import learning_rate_factor, make_optimizer, parts_of_step

from crosskd import Distiller

PRECISION = {"none": "no", "bfloat16": "bf16", "float16": "fp16"}


def train(model: nn.Module, loader: DataLoader[object], options: Namespace, accelerator: Accelerator) -> None:
    """Trains a distiller, or a detector alone."""
    batches = accelerator.prepare(loader)
    total = math.ceil(len(batches) / options.accumulate) * options.epochs
    optimizer = make_optimizer(model, options)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, total, options))
    # The distiller is prepared, neither detector by itself.
    prepared, optimizer = accelerator.prepare(model, optimizer)
    prepared.train()
    for epoch in range(options.epochs):
        loader.dataset.epoch = epoch
        if isinstance(model, Distiller):
            model.set_epoch(epoch)
        for index, (images, targets) in enumerate(batches):
            with accelerator.accumulate(prepared):
                losses = prepared(images, targets)
                # accelerate divides by --accumulate; the last step of an epoch may have fewer parts.
                weight = options.accumulate / parts_of_step(index, len(batches), options.accumulate)
                accelerator.backward(weight * torch.stack(list(losses.values())).sum())
                if accelerator.sync_gradients and options.clip:
                    accelerator.clip_grad_norm_(prepared.parameters(), options.clip)
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    schedule.step()
        shown = "  ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
        accelerator.print(f"epoch {epoch + 1}/{options.epochs}  {shown}")


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Runs the script; returns the student's metrics."""
    options = parse(arguments, refused=OWN_OPTIONS)
    accelerator = Accelerator(
        cpu=options.device == "cpu",
        mixed_precision=PRECISION[options.amp],
        gradient_accumulation_steps=options.accumulate,
    )
    processes = Processes(accelerator.process_index, accelerator.num_processes, accelerator.device)
    model, student, (train_data, val_data), lock = prepare_one(options, processes)
    loader = training_loader(train_data, options.batch_size, seed=options.seed, workers=options.workers)
    train(model, loader, options, accelerator)
    metrics = finish(student, val_data, options, processes, lock)
    accelerator.end_training()
    return metrics


if __name__ == "__main__":
    main()
