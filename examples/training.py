"""A training loop that a person would trust: schedules, mixed precision, accumulation, exact resume."""

from __future__ import annotations

import contextlib
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import Processes
from run_folder import save_atomically
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.ops import remove_small_boxes
from tqdm import tqdm
from weights import read_weights

from crosskd import Distiller

History = list[dict[str, Any]]
AMP_TYPES = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_optimizer(model: nn.Module, options: Namespace) -> torch.optim.Optimizer:
    """SGD or AdamW; normalisations and biases are not decayed."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)


def learning_rate_factor(step: int, total: int, options: Namespace) -> float:
    """What the learning rate is multiplied by: a linear warm-up, then steps or a cosine."""
    warmup = min(options.warmup_steps, total // 4)
    if step < warmup:
        return 0.001 + 0.999 * step / warmup
    done = step / max(1, total)
    if options.schedule == "step":
        return float(0.1 ** sum(done >= milestone for milestone in options.milestones))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def parts_of_step(index: int, batches: int, accumulate: int) -> int:
    """How many batches the step has that an epoch's batch belongs to: at its end there may be fewer."""
    return min(accumulate, batches - index + index % accumulate)


@dataclass
class Part:
    """How far an epoch has come, as a checkpoint holds it.

    Attributes:
        batches: how many of the epoch's were trained on.
        sums: of the losses in them, by name.
        cpu_seconds: that they took.
        random: the states of each process's random generators behind them, by rank.
    """

    batches: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    random: list[list[Tensor]] = field(default_factory=list)


@torch.no_grad()
def detected(
    teacher: nn.Module, images: list[Tensor], score: float, smallest: float = 1.0
) -> list[dict[str, Tensor]]:
    """What a teacher detects with at least a score, as targets: boxes xyxy in pixels, and labels.

    Boxes with a side below ``smallest`` pixels are left out.
    """
    targets = []
    for found in teacher(images):
        sure = (found["scores"] >= score).nonzero()[:, 0]
        kept = sure[remove_small_boxes(found["boxes"][sure], smallest)]
        targets.append({"boxes": found["boxes"][kept], "labels": found["labels"][kept]})
    return targets


class Trainer:
    """Trains a detector, alone or in a distiller, and can go on where a killed run stopped.

    A checkpoint is written after every epoch, and within it after every ``--checkpoint-every`` steps. It
    holds everything that the next step depends on; the order of the images and their augmentations depend
    on the seed and the epoch alone. So an interrupted run ends with the weights of an unbroken one.

    Args:
        model: a detector, or a `Distiller` around it.
        loader: batches of (images, targets); its data set's ``epoch`` and its batch sampler's ``skip`` are
            set before each epoch.
        folder: where the checkpoint is kept.
        options: the script's options.
        epochs: how long to train.
        processes: one or several.
        log: is called with each epoch's entry of the history, and whose it is.
        label: makes targets for images that have none; without it they are distilled without labels.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: DataLoader[Any],
        folder: Path,
        options: Namespace,
        epochs: int,
        processes: Processes,
        log: Callable[[str, dict[str, Any]], None] = lambda name, entry: None,
        label: Callable[[list[Tensor]], list[dict[str, Tensor]]] | None = None,
    ) -> None:
        self.log, self.label = log, label
        self.loader, self.folder, self.options = loader, folder, options
        self.epochs, self.processes = epochs, processes
        self.model = model.to(processes.device, memory_format=memory_format(options))
        self.parallel: DistributedDataParallel | None = None
        if processes.ranks > 1:
            ids = [processes.device.index] if processes.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.model, device_ids=ids)
        self.forward: Any = self.model if self.parallel is None else self.parallel
        if options.compile:
            self.forward = torch.compile(self.forward)
        self.steps_per_epoch = math.ceil(len(loader) / options.accumulate)
        self.optimizer = make_optimizer(self.model, options)
        total = self.steps_per_epoch * epochs
        self.schedule = LambdaLR(self.optimizer, lambda step: learning_rate_factor(step, total, options))
        self.amp_type = AMP_TYPES[options.amp]
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=self.amp_type == torch.float16)
        self.average: AveragedModel | None = None
        if options.ema:
            average = get_ema_multi_avg_fn(options.ema)
            self.average = AveragedModel(self.trained, multi_avg_fn=average, use_buffers=True)
        self.epoch = 0
        self.part = Part()  # of the epoch that is being trained
        self.history: History = []

    @property
    def trained(self) -> nn.Module:
        """The plain detector that the optimizer moves."""
        return self.model.student if isinstance(self.model, Distiller) else self.model

    @property
    def detector(self) -> nn.Module:
        """The plain detector that is evaluated and kept: the average of the trained one with ``--ema``."""
        return self.trained if self.average is None else self.average.module

    @property
    def checkpoint(self) -> Path:
        """Where the run can be taken up from."""
        return self.folder / "checkpoint.pt"

    def run(self, evaluate: Callable[[nn.Module], dict[str, float]]) -> History:
        """Trains to the end, evaluating on the way.

        Args:
            evaluate: gives a detector's metrics.

        Returns:
            One entry an epoch: losses, learning rate, speed, and metrics where it was evaluated.
        """
        if self.options.resume:
            self._resume()
        while self.epoch < self.epochs or self._lacks_metrics():
            if not self._lacks_metrics():
                self.history.append(self._train_epoch())
                self._save()  # before the evaluation, which would lose the epoch if it failed
            if self._lacks_metrics():
                self.history[-1]["metrics"] = evaluate(self.detector)
                self._save()
            self._report(self.history[-1])
        return self.history

    def _lacks_metrics(self) -> bool:
        if not self.history or self.part.batches:
            return False
        due = self.epoch == self.epochs or self.epoch % self.options.evaluate_every == 0
        return due and "metrics" not in self.history[-1]

    # -- one epoch ------------------------------------------------------------------------------

    def _train_epoch(self) -> dict[str, Any]:
        self.loader.dataset.epoch = self.epoch  # type: ignore[attr-defined]
        self.loader.batch_sampler.skip = self.part.batches  # type: ignore[union-attr]
        torch.manual_seed(hash((self.options.seed, self.epoch, self.processes.rank)) % 2**63)
        if isinstance(self.model, Distiller):
            self.model.set_epoch(self.epoch)
        self.model.train()
        part, batches, images_seen = self.part, len(self.loader), 0
        started, worked = time.perf_counter(), time.process_time() - part.cpu_seconds
        cache = self.model.teacher_cache if isinstance(self.model, Distiller) else None
        read, missed = (0, 0) if cache is None else (cache.hits, cache.misses)
        coming = iter(self.loader)  # which draws a random number itself
        if part.random:
            self._set_generators(part.random[self.processes.rank])
        with self._bar(batches) as bar:
            for images, targets in coming:
                parts = parts_of_step(part.batches, batches, self.options.accumulate)
                is_last_part = part.batches % self.options.accumulate == parts - 1
                losses = self._backward(images, targets, parts, is_last_part)
                if is_last_part:
                    self._step()
                images_seen += len(images) * self.processes.ranks
                part.batches += 1
                for name, value in losses.items():
                    part.sums[name] = part.sums.get(name, 0.0) + value
                part.cpu_seconds = time.process_time() - worked
                if is_last_part:
                    self._save_within(batches)
                speed = images_seen / (time.perf_counter() - started)
                parts_text = {name: f"{value:.3f}" for name, value in losses.items()}
                bar.set_postfix({**parts_text, "images/s": f"{speed:.1f}"})
                bar.update()
        share_buffers(self.model)
        if self.average is not None:
            share_buffers(self.average)
        self.epoch, self.part = self.epoch + 1, Part()
        entry = {
            "epoch": self.epoch,
            "losses": {name: value / batches for name, value in part.sums.items()},
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images_per_second": images_seen / (time.perf_counter() - started),
            "cpu_seconds": part.cpu_seconds,
            "unreadable_images": self.loader.dataset.broken,  # type: ignore[attr-defined]
        }
        if cache is not None:  # of this process's images
            hits, misses = cache.hits - read, cache.misses - missed
            entry["teacher_from_disk"] = hits / max(1, hits + misses)  # none behind --stop-distilling
        return entry

    def _backward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]], parts: int, last: bool
    ) -> dict[str, float]:
        """Forward and backward, of unlabelled images and of labelled ones; returns the losses as numbers."""
        others = [target.pop("unlabelled_image") for target in targets if "unlabelled_image" in target]
        found = None
        if others and self.label is not None:
            others = [image.to(self.processes.device, non_blocking=True) for image in others]
            found = self.label(others)
        # Not the other way round: all weights have a gradient in the pass that DDP synchronises, the last.
        further = self._backward_of(others, found, parts, last=False) if others else {}
        losses = self._backward_of(images, targets, parts, last)
        return {**losses, **{f"unlabelled_{name}": value for name, value in further.items()}}

    def _backward_of(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None, parts: int, last: bool
    ) -> dict[str, float]:
        device = self.processes.device
        images = [image.to(device, non_blocking=True) for image in images]
        if targets is not None:
            targets = [
                {name: value.to(device, non_blocking=True) for name, value in target.items()}
                for target in targets
            ]
        with self._synchronised(last), torch.autocast(device.type, self.amp_type, self.amp_type is not None):
            losses: dict[str, Tensor] = self.forward(images, targets)
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
            self.scaler.scale(total / parts).backward()
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        if not all(math.isfinite(value) for value in values.values()):
            raise FloatingPointError(
                f"a loss is not finite in epoch {self.epoch + 1}: {values}. Lower --learning-rate, raise "
                "--warmup-steps, or use --amp none; --resume goes on from the last checkpoint"
            )
        return values

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Gradients are averaged over processes once a step, not once a part of it."""
        if self.parallel is not None and not last:
            with self.parallel.no_sync():
                yield
        else:
            yield

    def _step(self) -> None:
        if self.options.clip > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.trained)

    # -- what a person sees ---------------------------------------------------------------------

    def _bar(self, batches: int) -> Any:
        title = f"{self.folder.name} {self.epoch + 1}/{self.epochs}"
        # None: no bar where the output is a file; an epoch's line is enough there.
        hidden = None if self.processes.is_first else True
        done = self.part.batches
        return tqdm(total=batches, initial=done, desc=title, disable=hidden, leave=False, dynamic_ncols=True)

    def _report(self, entry: dict[str, Any]) -> None:
        losses = "  ".join(f"{name} {value:.3f}" for name, value in entry["losses"].items())
        metrics = f"  AP {entry['metrics']['AP']:.1f}" if "metrics" in entry else ""
        if "teacher_from_disk" in entry:
            metrics = f"  teacher {entry['teacher_from_disk']:.0%} from disk{metrics}"
        if self.processes.is_first:
            self.log(self.folder.name, entry)
        self.processes.say(
            f"{self.folder.name:<8} epoch {self.epoch:>3}/{self.epochs}  {losses}  "
            f"{entry['images_per_second']:.1f} images/s{metrics}"
        )

    # -- going on -------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.processes.is_first:
            save_atomically(self._state(), self.checkpoint)
        self.processes.wait()

    def _save_within(self, batches: int) -> None:
        """A checkpoint in the middle of an epoch of so many batches, where one is due."""
        step, every = self.part.batches // self.options.accumulate, self.options.checkpoint_every
        if every and step % every == 0 and self.part.batches < batches:
            self.part.random = self.processes.gather(self._generators())
            self._save()

    def _generators(self) -> list[Tensor]:
        """The states of this process's random generators."""
        device = self.processes.device
        on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return [torch.get_rng_state(), *on_device]

    def _set_generators(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, self.processes.device)

    def _state(self) -> dict[str, Any]:
        return {
            "average": None if self.average is None else self.average.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict()["last_epoch"],
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "part": vars(self.part),
            "epochs": self.epochs,
            "history": self.history,
        }

    def _resume(self) -> None:
        """Goes on from the checkpoint, if there is one, which all processes must find."""
        if self.checkpoint.exists():
            self._load()
        found = self.processes.gather((self.epoch, self.part.batches))
        if len(set(found)) > 1:
            raise ValueError(
                f"{self.checkpoint} isn't the same to all processes, which found these epochs and batches of "
                f"the next in it: {found}. --output must be a folder that all machines share"
            )
        if self.epoch or self.part.batches:
            where = f", batch {self.part.batches} of the next" if self.part.batches else ""
            self.processes.say(f"{self.folder.name}: going on after epoch {self.epoch}{where}")

    def _load(self) -> None:
        state = read_weights(self.checkpoint)
        if not isinstance(state, dict) or not self._state().keys() - {"average", "part"} <= state.keys():
            raise ValueError(f"{self.checkpoint} is no checkpoint of a run: delete it to train anew")
        if state["epochs"] != self.epochs:
            raise ValueError(
                f"{self.checkpoint} belongs to a run of {state['epochs']} epochs, not {self.epochs}: its "
                "learning rates would not fit; use the same number, or another --output"
            )
        if (state.get("average") is None) != (self.average is None):
            raise ValueError(f"{self.checkpoint}: --ema was {'not ' * (self.average is not None)}given then")
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = state["schedule"]
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.history = state["epoch"], state["history"]
        self.part = Part(**state.get("part", {}))


def share_buffers(module: nn.Module) -> None:
    """Gives all processes the first one's batch statistics, so that all evaluate the same detector."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def memory_format(options: Namespace) -> torch.memory_format:
    """The layout of weights and pixels that was asked for."""
    return torch.channels_last if options.channels_last else torch.contiguous_format
