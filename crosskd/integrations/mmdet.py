"""`CrossKDDetector`: a `Distiller` in the form of an mmdet detector, for mmdet's configs and its Runner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import crosskd.adapters.mmdet  # says what to install where mmdet can't be imported

# isort: split
import torch
from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MessageHub
from torch import Tensor, nn

import crosskd.integrations.mmdet_resume  # noqa: F401, registers its loader with mmengine
from crosskd.checkpoints import read_mmdet_checkpoint
from crosskd.distiller import Distiller
from crosskd.integrations.named import MethodConfig, named_methods

__all__ = ["CrossKDDetector"]

_NOT_GIVEN = "a checkpoint must be named"
# Where projections and the schedules' step count stand in the state, beside the student's own keys.
_EXTRAS = "distillation"


@MODELS.register_module()
class CrossKDDetector(BaseDetector):  # type: ignore[misc, unused-ignore]
    """Trains a student under mmdet's own Runner while a teacher is distilled into it.

    To the Runner it is the student: the same submodules, parameters and ``state_dict`` keys, so its
    checkpoints load into the student's plain config, and hooks, AMP, EMA, resuming and launchers work as
    they do for the student. The teacher stands beside and is neither saved, reduced nor averaged. (What a
    method learns or counts of its own, projections or a schedule's steps, is saved under
    ``distillation.``, which mmengine leaves out with a message when it loads the plain student.)

    In training it gives the student's own losses and ``loss_kd_cls``, ``loss_kd_reg`` and, where the head
    has a centerness, ``loss_kd_quality``.

    Args:
        teacher: a model's config, or a whole config: as a dict, as the path of a file, or by the name of
            one of mmdet's own, ``"mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py"``.
        student: likewise.
        teacher_checkpoint: path or http(s) address of the teacher's weights. ``None`` leaves them as
            the teacher's own config initialises them (``init_cfg``), and must be said.
        methods: one or several, ``"FGD"`` or ``dict(type="CrossKD", position=3)``: the name of a class in
            `crosskd.methods`, a class, or the name of one registered in mmdet's ``MODELS``; a ``schedule`` is
            a dict of `crosskd.Schedule`'s arguments. CrossKD as published unless given.
        data_preprocessor: for a student whose config has none.
        unlabelled_threshold: as for `Distiller`.
        class_map: likewise, for a teacher that knows more classes, or the same in another order.
        teacher_view: likewise: the teacher's images, as its own data preprocessor would make them.
        view_scale: likewise.
        resize_levels: likewise.
        teacher_dtype: likewise; its name in a config, ``"bfloat16"`` or ``"float16"``.
        prove: likewise.

    Raises:
        ValueError: a pair that can't be distilled, no checkpoint named, or one that doesn't fit.
        TypeError: a two-stage detector, or another kind of head than those that are known.
        FileNotFoundError: no such checkpoint.

    Example:
        A config that trains GFL-R50 from GFL-R101::

            _base_ = "mmdet::gfl/gfl_r50_fpn_1x_coco.py"
            custom_imports = dict(imports=["crosskd.integrations.mmdet"], allow_failed_imports=False)
            model = dict(
                _delete_=True,
                type="CrossKDDetector",
                student="mmdet::gfl/gfl_r50_fpn_1x_coco.py",
                teacher="mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py",
                teacher_checkpoint="gfl_r101.pth",
            )
    """

    def __init__(
        self,
        teacher: Mapping[str, Any] | str | Path,
        student: Mapping[str, Any] | str | Path,
        teacher_checkpoint: str | Path | None = _NOT_GIVEN,
        methods: MethodConfig | Sequence[MethodConfig] | None = None,
        data_preprocessor: Mapping[str, Any] | None = None,
        unlabelled_threshold: float = 0.5,
        class_map: Sequence[int] | None = None,
        teacher_view: Callable[[Any, Any], Any] | None = None,
        view_scale: float | None = None,
        resize_levels: bool = False,
        teacher_dtype: torch.dtype | str | None = None,
        prove: bool = True,
    ) -> None:
        if teacher_checkpoint == _NOT_GIVEN:
            raise ValueError(
                "teacher_checkpoint is missing: name the path or address of the teacher's weights, or say "
                "teacher_checkpoint=None to leave them as the teacher's own config initialises them"
            )
        built = _build("student", student, data_preprocessor)
        super().__init__(data_preprocessor=built.data_preprocessor, init_cfg=built.init_cfg)
        distiller = Distiller(
            _load_teacher(teacher, teacher_checkpoint),
            built,
            named_methods(
                methods, MODELS.get, "register a class derived from crosskd.Method in mmdet's MODELS"
            ),
            unlabelled_threshold=unlabelled_threshold,
            class_map=class_map,
            teacher_view=teacher_view,
            view_scale=view_scale,
            resize_levels=resize_levels,
            # A type itself, or a word that names none, is left to the distiller.
            teacher_dtype=getattr(torch, str(teacher_dtype), teacher_dtype),  # type: ignore[arg-type]
            prove=prove,
        )
        # In a tuple, where the module machinery sees neither a second copy of the student nor the teacher.
        self._distiller = (distiller,)
        self._modules.update(built._modules)
        # A detection transformer holds parameters itself, outside of any layer.
        self._parameters, self._buffers = built._parameters, built._buffers
        if distiller.progress is not None or any(True for _ in distiller.methods.parameters()):
            extras = nn.Module()
            extras.methods = distiller.methods
            extras.register_buffer("progress", distiller.progress)
            self.add_module(_EXTRAS, extras)

    @property
    def distiller(self) -> Distiller:
        """What runs a training step."""
        return self._distiller[0]

    @property
    def student(self) -> nn.Module:
        """The plain detector that is trained."""
        return self.distiller.student

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self.distiller.teacher

    # -- modes, devices, initialisation -------------------------------------------------------

    def train(self, mode: bool = True) -> CrossKDDetector:
        """Sets the student's mode by its own ``train``, which may keep parts of it frozen."""
        self.training = mode
        self.distiller.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CrossKDDetector:
        """Moves and casts the student, whose modules are this one's, the teacher and the methods."""
        self.distiller._apply(fn, recurse)
        if _EXTRAS in self._modules:
            self.get_submodule(_EXTRAS).progress = self.distiller.progress
        return self

    def init_weights(self) -> None:
        """Initialises the student as its own config says."""
        cast(Any, self.student).init_weights()

    # -- a detector's functions ---------------------------------------------------------------

    def loss(self, batch_inputs: Tensor, batch_data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """The student's own losses and the distillation's, all named so that mmengine sums them."""
        if self.distiller.progress is not None:
            # The Runner's own count, which also goes on when a run is resumed.
            epoch = MessageHub.get_current_instance().get_info("epoch")
            self.distiller.set_epoch(int(epoch or 0))
        losses = self.distiller(batch_inputs, batch_data_samples)
        return {name if "loss" in name else f"loss_{name}": loss for name, loss in losses.items()}

    def predict(self, batch_inputs: Tensor, batch_data_samples: Sequence[Any], **options: Any) -> Any:
        """What the student predicts."""
        return cast(Any, self.student).predict(batch_inputs, batch_data_samples, **options)

    def extract_feat(self, batch_inputs: Tensor) -> Any:
        """The student's features."""
        return cast(Any, self.student).extract_feat(batch_inputs)

    def _forward(self, batch_inputs: Tensor, batch_data_samples: Any = None) -> Any:
        return cast(Any, self.student)._forward(batch_inputs, batch_data_samples)


def _model_config(side: str, source: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """The model's part of a config, whatever form the config is given in."""
    config: Any = source
    if isinstance(source, str | Path):
        config = get_config(str(source)) if "::" in str(source) else Config.fromfile(source)
    if "type" not in config and "model" in config:
        config = config["model"]
    if "type" not in config:
        raise ValueError(
            f'{side}: expected a model\'s config, a dict with a "type", or a whole config with a "model", '
            f"got the keys {sorted(config)}"
        )
    return dict(config)


def _build(
    side: str, source: Mapping[str, Any] | str | Path, data_preprocessor: Mapping[str, Any] | None = None
) -> Any:
    config = _model_config(side, source)
    if data_preprocessor is not None:
        config.setdefault("data_preprocessor", data_preprocessor)
    return MODELS.build(config)


def _load_teacher(source: Mapping[str, Any] | str | Path, checkpoint: str | Path | None) -> nn.Module:
    """Builds the teacher, and loads its weights with every key checked."""
    teacher: nn.Module = _build("teacher", source)
    if checkpoint is None:
        cast(Any, teacher).init_weights()
        return teacher
    own = teacher.state_dict()
    state = {
        key: value
        for key, value in read_mmdet_checkpoint(checkpoint).items()
        if not key.startswith(f"{_EXTRAS}.")  # a student that was distilled itself
    }
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in sorted(own.keys() & state.keys())
        if state[key].shape != own[key].shape
    ]
    if missing or unknown or shapes:
        raise ValueError(
            f"{checkpoint} doesn't fit the teacher: {len(missing)} keys missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}, {len(shapes)} of another shape {shapes[:3]}. "
            "Give the config that it was trained with"
        )
    teacher.load_state_dict(state)
    return teacher
