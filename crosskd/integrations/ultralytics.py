"""`trainer`: ultralytics' own training of a student, with a teacher distilled into it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from crosskd.adapters.ultralytics.detect import Criterion, DetectHead, UltralyticsDetect

# isort: split
# Behind the adapter, whose import says what to install where ultralytics is missing or too old.
from ultralytics.engine.model import Model
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel, torch_safe_load
from ultralytics.utils import DEFAULT_CFG, LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from crosskd.adapters import find_adapter
from crosskd.adapters.base import Anchors
from crosskd.distiller import Distiller
from crosskd.integrations.named import MethodConfig, named_methods
from crosskd.methods import Method
from crosskd.predictions import Predictions

__all__ = ["CrossKDTrainer", "trainer"]

# What is trained or counted beside the student: its name in the student while that is trained, and the
# stem of the file beside the checkpoints.
_EXTRAS = "distillation"
_OPTIONS = (
    "teacher_adapter",
    "class_map",
    "teacher_view",
    "view_scale",
    "resize_levels",
    "teacher_dtype",
    "prove",
)


@dataclass(frozen=True)
class Settings:
    """What `trainer` was given.

    Attributes:
        teacher: a model, or the path of a checkpoint.
        methods: one or several.
        options: further arguments of `Distiller`.
    """

    teacher: nn.Module | str
    methods: Method | Sequence[Method]
    options: Mapping[str, Any] = field(default_factory=dict)


def trainer(
    teacher: nn.Module | str | Path,
    methods: MethodConfig | Sequence[MethodConfig] | None = None,
    **options: Any,
) -> type[CrossKDTrainer]:
    """A trainer class for ``YOLO(…).train(trainer=…)`` that distils a teacher into the model it trains.

    Data, augmentations, AMP, EMA, several GPUs, checkpoints and resuming are ultralytics' own. The losses
    are logged beside its own (``kd_cls``, ``kd_reg``); the checkpoints hold the plain student.

    A path of a checkpoint is read by ultralytics' loader in its restricted mode, ``weights_only=True`` with a
    list of ultralytics' and PyTorch's classes, for such files hold pickled models; a file with other objects
    is refused. PyTorch before 2.6 has no such mode, and there reading a file executes what it says. A name
    such as ``"yolo11x.pt"`` is downloaded by ultralytics if it isn't there. To decide yourself how a
    teacher is read, pass a model.

    Args:
        teacher: a ``YOLO`` object, a detector or backbone that an adapter understands, or the path
            of one of ultralytics' checkpoints.
        methods: one or several: methods, the names of their classes, ``"FGD"``, or dicts of a class as
            ``type`` and its arguments, ``dict(type="CrossKD", position=2)``. `CrossKD` unless given.
        options: further arguments of `Distiller`: ``teacher_adapter``, ``class_map``, ``teacher_view``,
            ``view_scale``, ``resize_levels``, ``teacher_dtype``, ``prove``.

    Raises:
        TypeError: a teacher that no adapter understands, or another option.
        ValueError: the name of no method.

    Example:
        >>> from ultralytics import YOLO
        >>> from crosskd import CrossKD
        >>> kind = trainer(teacher=YOLO("yolo11s.yaml"), methods=CrossKD(reg_weight=3.0))
        >>> # YOLO("yolo11n.yaml").train(data="coco.yaml", trainer=kind)
        >>> kind.__mro__[2].__name__
        'DetectionTrainer'
    """
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown:
        raise TypeError(
            f"trainer() got {', '.join(unknown)}, but takes {', '.join(_OPTIONS)} beside teacher and methods"
        )
    given: nn.Module | str = str(teacher)
    if isinstance(teacher, nn.Module):
        given = _model_in(teacher)
        (options.get("teacher_adapter") or find_adapter)(given)  # to be refused now, not after the data
    settings = Settings(given, named_methods(methods), options)
    # A class of its own for these settings. For several GPUs ultralytics pickles it as a whole, settings
    # included, for the processes that it starts.
    return cast(type[CrossKDTrainer], type("CrossKDTrainer", (CrossKDTrainer,), {"settings": settings}))


class CrossKDTrainer(DetectionTrainer):  # type: ignore[misc, unused-ignore]
    """Ultralytics' ``DetectionTrainer`` with a teacher: made by `trainer`, which gives it its settings.

    Losses are scaled as ultralytics scales its own: what is logged is a mean over the batch, what is
    minimised is that times the number of images. For a head end to end ultralytics logs its one-to-one half's
    own losses alone; that is left as it is.

    Where towers differ in width the projections between them, and the count of a schedule, are
    written to ``distillation.pt`` beside the checkpoints, from which a resumed run goes on.

    Raises:
        ValueError: ``compile=``, ``distill_model=`` or ``classes=``, a pair that can't be distilled, a run to
            resume whose ``distillation.pt`` is gone.
        TypeError: a teacher or student that is no detection model.
    """

    settings: ClassVar[Settings | None] = None

    def __init__(
        self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: Any = None
    ) -> None:
        if self.settings is None:
            raise TypeError(
                "CrossKDTrainer has no teacher: pass what crosskd.integrations.ultralytics.trainer() gives"
            )
        super().__init__(cfg, overrides, _callbacks)
        for name in ("compile", "distill_model"):
            if getattr(self.args, name, None):
                raise ValueError(
                    f"{name}={getattr(self.args, name)!r} can't go together with crosskd's trainer: leave it "
                    "out"
                )
        if self.args.classes is not None:
            raise ValueError(
                f"classes={self.args.classes} leaves labels out, while the teacher goes on teaching all of "
                "its classes: leave it out, or train on data of those classes alone and pass class_map=, the "
                "teacher's class index for each of the student's"
            )

    def set_model_attributes(self) -> None:
        """Puts the teacher beside the student, once that is built and on its device."""
        super().set_model_attributes()
        assert self.settings is not None
        teacher = self.settings.teacher
        if isinstance(teacher, str):
            teacher = _load(teacher)
        _distil(self.model, teacher, self.settings, self.device)
        methods = ", ".join(self._distilled().distiller.methods)
        LOGGER.info(
            f"crosskd: {methods} from {_title(self.settings.teacher)}. To resume, pass trainer= again: "
            "without it the run goes on undistilled"
        )

    def train(self) -> None:
        """Trains; whatever happens, the model is left as the plain student."""
        try:
            super().train()
        finally:
            if isinstance(self.model, nn.Module):
                _undo(unwrap_model(self.model))

    def label_loss_items(self, loss_items: Any = None, prefix: str = "train") -> Any:
        """Names of the losses; in validation nothing is distilled, so there are none of ``kd_*``."""
        labelled = super().label_loss_items(loss_items, prefix)
        if prefix == "train":
            return labelled
        own = {f"{prefix}/{name}" for name in self._distilled().logged}
        if isinstance(labelled, dict):
            return {name: value for name, value in labelled.items() if name in own}
        return [name for name in labelled if name in own]

    def save_model(self) -> Any:
        """Saves checkpoints of the plain student, and beside them what is trained or counted besides."""
        saved = super().save_model()
        extras = self._distilled().extras()
        if extras:
            torch.save({"epoch": self.epoch, **extras}, self.wdir / f"{_EXTRAS}.pt")
        return saved

    def _distilled(self) -> _DistilledModel:
        return cast(_DistilledModel, unwrap_model(self.model))

    def _model_train(self) -> None:
        super()._model_train()
        self._distilled().distiller.set_epoch(self.epoch)

    def _load_checkpoint_state(self, ckpt: Any) -> None:
        super()._load_checkpoint_state(ckpt)
        if not self._distilled().extras():
            return
        folders = [self.wdir, *([Path(str(self.args.resume)).parent] if self.args.resume else [])]
        found = next((path for f in folders if (path := f / f"{_EXTRAS}.pt").is_file()), None)
        if found is None:
            raise ValueError(
                f"the run can't be resumed without {_EXTRAS}.pt, which stood beside its checkpoint: looked "
                f"in {', '.join(map(str, folders))}"
            )
        extras = torch.load(found, map_location=self.device, weights_only=True)
        if extras["epoch"] != ckpt.get("epoch"):
            LOGGER.warning(
                f"{found} is of epoch {extras['epoch'] + 1}, the checkpoint of {ckpt.get('epoch', -1) + 1}"
            )
        self._distilled().load_extras(extras)


class _LoggingHead(DetectHead):
    """Keeps what the criterion logs, which may be something else than its losses."""

    def __init__(self, detector: Any) -> None:
        super().__init__(detector)
        self.logged: dict[str, Tensor] = {}

    def run_criterion(
        self, predictions: Predictions, anchors: Anchors, targets: Mapping[str, Tensor]
    ) -> Criterion:
        answer = super().run_criterion(predictions, anchors, targets)
        self.logged = answer.logged
        return answer


class _LoggingDetect(UltralyticsDetect):
    head = _LoggingHead

    def own_losses(self, images: Any, targets: Any) -> Mapping[str, Tensor]:
        with _own_class(self.detector):
            return super().own_losses(images, targets)


class _DistilledModel(DetectionModel):  # type: ignore[misc, unused-ignore]
    """What the student is while it is trained: the same object, of a class made of this one and its own.

    It stays one object, so whatever ultralytics sets on its model or reads from it is the student's. Copies
    of it, as the averaged one that checkpoints hold, are plain.
    """

    @classmethod
    def wrap(cls, student: nn.Module, distiller: Distiller) -> None:
        """Makes a student one that distils, in place."""
        own = type(student)
        student.__class__ = type(own.__name__, (cls, own), {})
        # In a tuple, where the module machinery doesn't see it: the distiller holds the student itself.
        student.__dict__["_distiller"] = (distiller, own)
        # What the methods train belongs to the model, so that optimizer and processes treat it as the rest.
        student.add_module(_EXTRAS, distiller.methods)
        student.train(student.training)

    def unwrap(self) -> None:
        """Makes it the plain student again, in place."""
        own = self.own_class
        del self._modules[_EXTRAS], self.__dict__["_distiller"]
        self.__class__ = own

    @property
    def distiller(self) -> Distiller:
        distiller: Distiller = self.__dict__["_distiller"][0]
        return distiller

    @property
    def own_class(self) -> Any:
        """The student's class when it isn't distilled."""
        return self.__dict__["_distiller"][1]

    @property
    def logged(self) -> dict[str, Tensor]:
        """What the criterion logged of the student's own losses last."""
        return cast(_LoggingHead, self.distiller.student_adapter.heads[0]).logged

    def loss(self, batch: Any, preds: Any = None) -> Any:
        """The criterion's losses and the methods', as ultralytics' models give them: (losses, logged)."""
        if preds is not None or not self.training:
            return super().loss(batch, preds)
        losses = self.distiller(batch["img"], batch)
        images = len(batch["img"])
        distilled = {name: loss.detach() / images for name, loss in losses.items() if name not in self.logged}
        return torch.stack(list(losses.values())), {**self.logged, **distilled}

    def train(self, mode: bool = True) -> _DistilledModel:
        """Sets the mode of the distiller too, whose student this is."""
        super().train(mode)
        self.distiller.training = mode
        return self

    def extras(self) -> dict[str, Any]:
        """State beside the student's: of what methods train, and the steps so far; empty without any."""
        methods = self.distiller.methods.state_dict()
        progress = self.distiller.progress
        return {"methods": methods, "progress": progress} if methods or progress is not None else {}

    def load_extras(self, extras: Mapping[str, Any]) -> None:
        """Takes up what `extras` gave."""
        self.distiller.methods.load_state_dict(extras["methods"])
        if self.distiller.progress is not None and extras["progress"] is not None:
            self.distiller.progress.copy_(extras["progress"])

    def load_state_dict(self, state_dict: Mapping[str, Any], *arguments: Any, **options: Any) -> Any:
        """Loads a plain student's state too, which the trainer does when it goes back to a checkpoint."""
        own = {k: v for k, v in self.state_dict().items() if k.startswith(f"{_EXTRAS}.")}
        return super().load_state_dict({**own, **state_dict}, *arguments, **options)

    def plain(self) -> DetectionModel:
        """The plain student, of its own class, which shares everything with this one."""
        student: DetectionModel = self.own_class.__new__(self.own_class)
        modules = {name: module for name, module in self._modules.items() if name != _EXTRAS}
        student.__dict__.update({**self.__dict__, "_modules": modules})
        del student.__dict__["_distiller"]
        return student

    def __deepcopy__(self, memo: dict[int, Any]) -> DetectionModel:
        return copy.deepcopy(self.plain(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copy.copy, (self.plain(),)  # pickle refuses the plain one's own way, for the class differs


@contextmanager
def _own_class(student: nn.Module) -> Iterator[None]:
    """While it is open, a student that is distilled computes what it would alone."""
    distilled = type(student)
    if isinstance(student, _DistilledModel):
        student.__class__ = student.own_class
    try:
        yield
    finally:
        student.__class__ = distilled


def _distil(student: nn.Module, teacher: nn.Module, settings: Settings, device: torch.device) -> None:
    """Makes a student one that distils, in place."""
    options = {"teacher_adapter": find_adapter, **settings.options}
    distiller = Distiller(teacher, student, settings.methods, _LoggingDetect, **options).to(device)
    _DistilledModel.wrap(student, distiller)


def _undo(student: nn.Module) -> None:
    if isinstance(student, _DistilledModel):
        student.unwrap()


def _model_in(teacher: nn.Module) -> nn.Module:
    """The model itself, where it is inside a ``YOLO`` object."""
    inside = teacher.model if isinstance(teacher, Model) else teacher
    if not isinstance(inside, nn.Module):
        raise TypeError(
            f"the teacher's model is {inside!r}, not a PyTorch model: load it from a .pt or a yaml"
        )
    return inside


def _load(path: str) -> nn.Module:
    """The model in one of ultralytics' checkpoints, averaged weights first, as ultralytics would use it."""
    try:
        checkpoint, _ = torch_safe_load(path, safe_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"teacher: {error}") from error
    model = checkpoint.get("ema") or checkpoint.get("model") if isinstance(checkpoint, Mapping) else None
    if not isinstance(model, nn.Module):
        raise ValueError(f"teacher: {path} holds no model")
    return _model_in(model).float()


def _title(teacher: nn.Module | str) -> str:
    return teacher if isinstance(teacher, str) else type(teacher).__name__
