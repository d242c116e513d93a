"""Every method on every kind of detector: the table of docs/methods/index.md, cell by cell."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import crosskd
from crosskd import Distiller, Method, Schedule
from crosskd.adapters import generic
from tests.examples import conftest  # noqa: F401  # so that the examples' modules are found
from tests.examples.dense_heads.small import small
from tests.helpers import mmdet_heads, yolo
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet
from tests.helpers.two_stages import tiny_faster_rcnn, two_stage_batch

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "index.md"


def rows_of_the_table() -> dict[str, dict[str, str]]:
    """The cells of the page's second table by method and column."""
    text = PAGE.read_text(encoding="utf-8").split("## Which pairs")[1]
    lines = re.findall(r"^\| (.*) \|$", text.split("\n## ")[0], re.MULTILINE)
    header, _, *rows = [line.split(" | ") for line in lines]
    return {row[0].strip("`"): dict(zip(header[1:], row[1:], strict=True)) for row in rows}


TABLE = rows_of_the_table()


def method_of(label: str) -> Method:
    """The method as the table writes it."""
    made = eval(label, {name: getattr(crosskd, name) for name in crosskd.__all__})
    assert isinstance(made, Method)
    return made


@dataclass
class Kind:
    """A teacher and a student of one kind, of different widths, with a batch in their own form."""

    build: Callable[[int], nn.Module]
    images: Any
    targets: Any
    without_objects: Any
    options: dict[str, Any] = field(default_factory=dict)

    def distiller(self, methods: Any) -> Distiller:
        torch.manual_seed(0)
        return Distiller(self.build(1), self.build(0), methods, **self.options)


def emptied(targets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: tensor[:0] for name, tensor in target.items()} for target in targets]


def retinanet() -> Kind:
    images, targets = tiny_batch()
    return Kind(lambda t: tiny_retinanet(width=(32, 48)[t], seed=t), images, targets, emptied(targets))


def fcos() -> Kind:
    images, targets = tiny_batch()
    return Kind(lambda t: tiny_fcos(width=(32, 64)[t], seed=t), images, targets, emptied(targets))


def faster_rcnn() -> Kind:
    images, targets = two_stage_batch()
    return Kind(lambda t: tiny_faster_rcnn(width=(16, 24)[t], seed=t), images, targets, emptied(targets))


def plain_gfl() -> Kind:
    import dense_heads

    images, targets = tiny_batch()
    options = {"adapter": dense_heads.adapter_of}
    return Kind(lambda t: small("gfl", width=(32, 64)[t], seed=t), images, targets, emptied(targets), options)


def own() -> Kind:
    """The detector of docs/your_detector.md, which the library knows nothing of."""
    import your_detector

    def build(teacher: int) -> nn.Module:
        torch.manual_seed(teacher)
        detector = your_detector.SmallDetector(num_classes=4, width=(16, 32)[teacher])
        nn.init.constant_(detector.cls_out.bias, -1.0)
        return detector

    def adapter(teacher: int) -> Any:
        return generic(
            features="backbone",
            towers={"classification": "cls_tower", "regression": "box_tower"},
            predictors={"classification": {"logits": "cls_out"}, "regression": {"regression": "box_out"}},
            strides=(8, 16),
            widths=((16, 16), (32, 32))[teacher],
            anchors=lambda detector, batch, maps: detector.points(maps),
            losses=lambda detector, predictions, points, targets: detector.losses(
                predictions.logits, predictions.regression, points, targets
            ),
            decode=lambda detector, regression, points: detector.boxes(regression, points),
        )

    images, targets = tiny_batch()
    options = {"adapter": adapter(0), "teacher_adapter": adapter(1)}
    return Kind(build, torch.stack(images), targets, emptied(targets), options)


def of_mmdet(name: str) -> Kind:
    pixels, samples = mmdet_heads.batch_of()
    _, empty = mmdet_heads.batch_of(objects=0)

    def build(teacher: int) -> nn.Module:
        width = (32, 64)[teacher]
        settings = mmdet_heads.head_settings(name, in_channels=width, feat_channels=width)
        return mmdet_heads.detector_of(settings, mmdet_heads.SmallBackbone(width=width), seed=teacher)

    return Kind(build, pixels, samples, empty)


def yolo11() -> Kind:
    images, targets = yolo.batch_of()
    empty = {name: tensor[:0] for name, tensor in targets.items()}
    return Kind(lambda t: yolo.model_of("yolo11n", width=(0.125, 0.25)[t], seed=t), images, targets, empty)


KINDS: dict[str, Callable[[], Kind]] = {
    "RetinaNet": retinanet,
    "FCOS": fcos,
    "Faster R-CNN": faster_rcnn,
    "mmdet GFL": lambda: of_mmdet("gfl"),
    "mmdet ATSS": lambda: of_mmdet("atss"),
    "YOLO11": yolo11,
    "plain GFL": plain_gfl,
    "`generic`": own,
}
MARKS = {"mmdet GFL": pytest.mark.mmdet, "mmdet ATSS": pytest.mark.mmdet, "YOLO11": pytest.mark.ultralytics}
CELLS = [
    pytest.param(label, column, id=f"{label}-{column.strip('`')}", marks=MARKS.get(column, ()))
    for label in TABLE
    for column in KINDS
]


def of_methods(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: loss for name, loss in losses.items() if "kd_" in name}


def test_the_table_has_every_method_and_every_kind():
    """But for those of queries, which docs/transformers.md has a table of."""
    public = [getattr(crosskd, name) for name in crosskd.__all__]
    methods = [kind for kind in public if isinstance(kind, type) and issubclass(kind, Method)]
    named = {kind.__name__ for kind in methods if kind is not Method and "queries" not in kind.requires}
    assert {label.split("(")[0] for label in TABLE} == named
    assert all([*row] == [*KINDS, "without labels"] for row in TABLE.values())
    assert {cell for row in TABLE.values() for cell in row.values()} <= {"yes", "no"}


@pytest.mark.parametrize(("label", "column"), CELLS)
def test_every_cell_of_the_table(label, column):
    kind = KINDS[column]()
    if TABLE[label][column] == "no":
        with pytest.raises(ValueError, match=r"teacher|student|head") as refused:
            kind.distiller(method_of(label))
        assert re.search("choose|give|pass|build|take|leave", str(refused.value))  # what to do
        return
    distiller = kind.distiller(method_of(label))
    before = copy.deepcopy(distiller.teacher.state_dict())
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-4)
    for targets in (kind.targets, kind.without_objects):
        distillation = of_methods(distiller(kind.images, targets))
        assert all(loss.isfinite() and loss.ndim == 0 for loss in distillation.values())
        assert targets is kind.without_objects or sum(distillation.values()) > 0
        check_gradients(distiller, distillation, zero=targets is kind.without_objects)
        optimizer.step()
    if TABLE[label]["without labels"] == "yes":
        losses = distiller(kind.images)
        assert losses.keys() == distillation.keys()
        check_gradients(distiller, losses)
    else:
        with pytest.raises(ValueError, match="label"):
            distiller(kind.images)
    for name, tensor in distiller.teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    assert distiller.student.state_dict().keys() == names_of_the_student(column)


@functools.cache
def names_of_the_student(column: str) -> set[str]:
    """A plain student's weights and statistics."""
    return {*KINDS[column]().build(0).state_dict()}


def check_gradients(distiller: Distiller, losses: dict[str, Tensor], *, zero: bool = False) -> None:
    """The student learns, unless ``zero`` says that it may not; so does all that the methods train."""
    distiller.zero_grad()
    sum(losses.values()).backward()
    found = [parameter.grad for parameter in distiller.student.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in found)
    assert zero or any(gradient.abs().max() > 0 for gradient in found)
    # DistributedDataParallel waits for the gradient of each parameter, whatever the batch holds.
    assert all(parameter.grad is not None for parameter in distiller.methods.parameters())


# -- all at once, on the one kind of head that every method takes ------------------------------------


def all_methods(schedule: Schedule | None = None) -> list[Method]:
    """Every method of the table, under names that don't clash."""
    methods = [method_of(label) for label in TABLE if TABLE[label]["plain GFL"] == "yes"]
    for number, method in enumerate(methods):
        method.schedule, method.name = schedule, f"{number}_{method.name}"
    return methods


@pytest.fixture
def kind() -> Kind:
    return plain_gfl()


pytestmark = pytest.mark.filterwarnings("ignore:.*pulls the student's own predictions")


def test_a_run_that_is_resumed_goes_on_with_the_methods_parameters(kind):
    first = kind.distiller(all_methods())
    optimizer = torch.optim.SGD(first.parameters(), lr=1e-4)
    sum(first(kind.images, kind.targets).values()).backward()
    optimizer.step()
    second = kind.distiller(all_methods())
    second.load_state_dict(first.state_dict())
    assert any(name.startswith("methods.") for name in first.state_dict())
    losses = []
    for distiller in (first, second):
        torch.manual_seed(5)  # of the masks
        losses.append(distiller(kind.images, kind.targets))
    for name, loss in losses[0].items():
        assert torch.equal(loss, losses[1][name]), name


def test_under_autocast_the_losses_are_float32(kind):
    plain = kind.distiller(all_methods())
    other = copy.deepcopy(plain)
    torch.manual_seed(5)
    expected = of_methods(plain(kind.images, kind.targets))
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        losses = of_methods(other(kind.images, kind.targets))
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert loss.dtype == torch.float32, name
        assert loss.item() == pytest.approx(expected[name].item(), rel=0.2, abs=1e-3), name


def test_a_schedule_that_stops_leaves_the_losses_names(kind):
    distiller = kind.distiller(all_methods(Schedule(stop=1)))
    first, second = (of_methods(distiller(kind.images, kind.targets)) for _ in range(2))
    assert first.keys() == second.keys()
    assert sum(first.values()) > 0
    assert all(loss == 0 for loss in second.values())
    sum(second.values()).backward()
    assert all(parameter.grad is not None for parameter in distiller.methods.parameters())


@pytest.mark.slow
def test_compiled_they_give_the_eager_losses(kind):
    torch._dynamo.reset()
    plain = kind.distiller(all_methods()).double()
    images = [image.double() for image in kind.images]
    targets = [{"boxes": t["boxes"].double(), "labels": t["labels"]} for t in kind.targets]
    other = torch.compile(copy.deepcopy(plain), backend="eager")
    for _ in range(2):
        torch.manual_seed(5)
        expected = plain(images, targets)
        torch.manual_seed(5)
        losses = other(images, targets)
        for name, loss in losses.items():
            if "mgd" not in name:  # its masks are other random numbers
                assert loss.item() == pytest.approx(expected[name].item(), rel=1e-9), name
    torch._dynamo.reset()
