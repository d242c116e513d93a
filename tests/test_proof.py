"""What the pieces of a detector would lose is refused on the first step, with the place, no more."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models.detection import FCOS, RetinaNet

from crosskd import PKD, CrossKD, Distiller, PredictionMimicking
from crosskd.adapters import generic
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet

SIDES = ("teacher", "student")
every_side = pytest.mark.parametrize("side", SIDES)
every_family = pytest.mark.parametrize("build", [tiny_retinanet, tiny_fcos], ids=["retinanet", "fcos"])


def pair_with(
    build: Callable[..., nn.Module], side: str, change: Callable[[Any], Any]
) -> dict[str, nn.Module]:
    """A teacher and a student, one of them changed."""
    detectors = {"teacher": build(seed=1).eval(), "student": build(seed=2)}
    change(detectors[side])
    return detectors


def refused(detectors: dict[str, nn.Module], side: str, *facts: str) -> str:
    """Checks that the first step is refused and names the side, the facts, and the way out."""
    name = type(detectors[side]).__name__
    distiller = Distiller(**detectors, methods=CrossKD())
    with pytest.raises(ValueError, match=rf"^{side}: {name}.*prove=False") as caught:
        distiller(*tiny_batch())
    message = str(caught.value)
    for fact in facts:
        assert fact in message
    # The same pair runs where nothing is compared.
    losses = Distiller(**detectors, methods=CrossKD(), prove=False)(*tiny_batch())
    assert losses["kd_cls"] > 0
    return message


# -- what the pieces would lose --------------------------------------------------------------------


class Residual(nn.Sequential):
    """A tower with a forward of its own."""

    def forward(self, features: Tensor) -> Tensor:
        for layer in self:
            features = features + layer(features)
        return features


def with_residual_tower(detector: Any) -> None:
    for head in (detector.head.classification_head, detector.head.regression_head):
        head.conv = Residual(*head.conv)


@every_side
def test_a_tower_with_a_forward_of_its_own(side):
    detectors = pair_with(tiny_retinanet, side, with_residual_tower)
    refused(detectors, side, "They part at head.classification_head.conv.1.0.")


def with_head_of_its_own(detector: Any) -> None:
    class Tempered(type(detector.head)):
        def forward(self, features: Any) -> dict[str, Tensor]:
            outputs = super().forward(features)
            return {**outputs, "cls_logits": 0.5 * outputs["cls_logits"]}

    detector.head.__class__ = Tempered


@every_side
@every_family
def test_a_head_with_a_forward_of_its_own(build, side):
    message = refused(pair_with(build, side, with_head_of_its_own), side, "All layers that both run agree")
    if side == "teacher":
        assert "the head's logits differ: by up to" in message
    else:
        assert "classification is" in message


def with_forward_of_its_own(detector: Any, base: type) -> None:
    class Inverting(base):
        def forward(self, images: list[Tensor], targets: Any = None) -> Any:
            return super().forward([1 - image for image in images], targets)

    detector.__class__ = Inverting


@pytest.mark.parametrize(("build", "base"), [(tiny_retinanet, RetinaNet), (tiny_fcos, FCOS)])
def test_a_detector_with_a_forward_of_its_own(build, base):
    """The first layer is named, which is given other pixels."""
    detectors = pair_with(build, "student", partial(with_forward_of_its_own, base=base))
    refused(detectors, "student", "They part at backbone.stem.0.0.", "classification is")


def with_extra_loss(detector: Any, base: type) -> None:
    class Extended(base):
        def forward(self, images: Any, targets: Any = None) -> Any:
            answer = super().forward(images, targets)
            if self.training:
                answer["domain"] = sum(p.square().sum() for p in self.backbone.parameters())
            return answer

    detector.__class__ = Extended


@pytest.mark.parametrize(("build", "base"), [(tiny_retinanet, RetinaNet), (tiny_fcos, FCOS)])
def test_a_loss_that_a_forward_adds(build, base):
    detectors = pair_with(build, "student", partial(with_extra_loss, base=base))
    refused(detectors, "student", "domain", "'bbox_regression'", "'classification'")


def with_replaced_tower_forward(detector: Any) -> None:
    tower = detector.head.classification_head.conv
    own = tower.forward
    tower.forward = lambda features: 0 * own(features)


def test_a_forward_replaced_on_an_instance():
    refused(pair_with(tiny_retinanet, "student", with_replaced_tower_forward), "student", "classification is")


def with_hook_that_changes_numbers(detector: Any) -> None:
    detector.head.classification_head.register_forward_hook(lambda _, inputs, output: 2 * output)


@every_side
def test_a_hook_that_changes_numbers_on_a_module_that_the_pieces_never_call(side):
    refused(pair_with(tiny_retinanet, side, with_hook_that_changes_numbers), side)


def autocast_closure(detector: Any) -> None:
    """A forward that is bound to this very object, as closures are."""
    own = detector.forward

    def forward(*arguments: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return own(*arguments)

    detector.forward = forward


def autocast_method(detector: Any) -> None:
    """What accelerate's ``prepare`` does."""
    own = detector.forward.__func__

    def forward(self: Any, *arguments: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return own(self, *arguments)

    detector.forward = MethodType(forward, detector)


@pytest.mark.parametrize("wrap", [autocast_closure, autocast_method])
@every_family
def test_an_autocast_around_the_students_forward(build, wrap):
    detectors = pair_with(build, "student", wrap)
    refused(
        detectors,
        "student",
        "They part at backbone.stem.0.0.",
        "torch.bfloat16 alone",
        "torch.float32 by its pieces",
        "around the distiller",
    )


def test_an_autocast_around_the_distiller_is_let_through():
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), CrossKD())
    with torch.autocast("cpu", torch.bfloat16):
        assert distiller(*tiny_batch())["kd_cls"] > 0


# -- what the pieces run as it is ------------------------------------------------------------------


def keeps_a_norm(detector: Any, base: type) -> None:
    class Normed(base):
        norm = 100.0

        def compute_loss(self, targets: Any, *arguments: Any) -> dict[str, Tensor]:
            self.norm = 0.9 * self.norm + 0.1 * len(targets)
            return {k: v / self.norm for k, v in super().compute_loss(targets, *arguments).items()}

    detector.__class__ = Normed


@pytest.mark.parametrize(("build", "base"), [(tiny_retinanet, RetinaNet), (tiny_fcos, FCOS)])
def test_state_that_compute_loss_keeps_stays(build, base):
    student = pair_with(build, "student", partial(keeps_a_norm, base=base))["student"]
    plain = copy.deepcopy(student)
    distiller = Distiller(build(seed=1), student, [CrossKD(), PKD()])
    for seed in range(5):
        expected, losses = plain(*tiny_batch(seed=seed)), distiller(*tiny_batch(seed=seed))
        for name, loss in expected.items():
            assert torch.equal(losses[name], loss)
        assert student.norm == plain.norm < 100


def with_patched_loss(detector: Any) -> None:
    own = detector.compute_loss
    detector.compute_loss = lambda *arguments: {name: 3 * loss for name, loss in own(*arguments).items()}


def with_patched_loss_of_the_head(detector: Any) -> None:
    own = detector.head.compute_loss
    detector.head.compute_loss = lambda *arguments: {name: 3 * loss for name, loss in own(*arguments).items()}


@pytest.mark.parametrize("patch", [with_patched_loss, with_patched_loss_of_the_head])
@every_family
def test_a_loss_patched_into_the_student(build, patch):
    student = pair_with(build, "student", patch)["student"]
    losses, expected = Distiller(build(seed=1), student, CrossKD())(*tiny_batch()), student(*tiny_batch())
    for name, loss in expected.items():
        assert torch.equal(losses[name], loss)
    assert losses["classification"] > 2 * build(seed=2)(*tiny_batch())["classification"]


def pruned(detector: Any) -> None:
    for module in list(detector.modules()):
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, "weight", 0.3)


def weight_normalised(detector: Any) -> None:
    for module in list(detector.modules()):
        if isinstance(module, nn.Conv2d):
            nn.utils.weight_norm(module)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", [pruned, weight_normalised])
def test_a_student_that_cannot_be_copied(change):
    student = tiny_retinanet(seed=2)
    distiller = Distiller(tiny_retinanet(seed=1), student, CrossKD())
    change(student)
    losses = distiller(*tiny_batch())
    for name, loss in student(*tiny_batch()).items():
        assert torch.equal(losses[name], loss)
    sum(losses.values()).backward()


def test_images_with_a_history():
    scale = torch.ones((), requires_grad=True)
    images, targets = tiny_batch()
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), CrossKD())
    sum(distiller([scale * image for image in images], targets).values()).backward()
    assert scale.grad.abs() > 0


def restless(detector: Any) -> None:
    """Draws random numbers of torch and of Python."""

    class Noisy(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return random.uniform(0.5, 2) * features * torch.rand(features.shape[1], 1, 1)

    detector.backbone.stem.append(Noisy())


@every_side
def test_detectors_that_draw_random_numbers(side):
    detectors = pair_with(tiny_retinanet, side, restless)
    assert Distiller(**detectors, methods=CrossKD())(*tiny_batch())["kd_cls"] > 0


# -- nothing changes -------------------------------------------------------------------------------


class Counting(nn.Module):
    """Keeps numbers in a buffer, an attribute, a list and a tensor, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("times", torch.zeros(()))
        self.calls, self.sizes, self.memory = 0, [], {"sum": torch.zeros(())}

    def forward(self, features: Tensor) -> Tensor:
        self.times += 1
        self.calls += 1
        self.sizes.append(features.shape)
        self.memory["sum"] += features.detach().sum()
        self.last = features.shape
        return features


def state_of(detector: nn.Module) -> dict[str, Any]:
    """Numbers, modes, hooks and plain attributes of all submodules, as values to be compared."""
    return {
        f"{path}: {name}": _value(attribute)
        for path, module in detector.named_modules()
        for name, attribute in vars(module).items()
    }


def _value(attribute: Any) -> Any:
    if isinstance(attribute, Tensor):
        return attribute.tolist()
    if isinstance(attribute, dict):
        return [_value(item) for item in attribute.values()]
    if isinstance(attribute, list | tuple):
        return [_value(item) for item in attribute]
    return attribute if isinstance(attribute, str | int | float) else type(attribute).__name__


@every_family
@pytest.mark.parametrize("method", [CrossKD(), PredictionMimicking(), PKD()], ids=lambda method: method.name)
def test_the_proof_changes_nothing_in_either_detector(build, method):
    """A step with the proof leaves what one without it leaves."""
    left = []
    for prove in (True, False):
        torch.manual_seed(5)
        random.seed(5)
        teacher, student = build(seed=1, batch_norm=True).eval(), build(seed=2, batch_norm=True)
        for detector in (teacher, student):
            detector.backbone.stem.append(Counting())
            detector.backbone.stem.append(nn.Dropout(0.5))
            detector.head.eval()
        student.head.train()
        before = state_of(teacher)
        distiller = Distiller(teacher, student, method, prove=prove)
        losses = distiller(*tiny_batch())
        if prove:  # what a teacher writes in eval mode is found, and written to the frozen copy alone
            assert state_of(teacher) == before
        states = [state_of(detector) for detector in (student, distiller.teacher)]
        left.append((losses, states, torch.get_rng_state(), random.getstate()))
    (losses, *of_proof), (expected, *of_none) = left
    assert losses.keys() == expected.keys()
    for name, loss in expected.items():
        assert torch.equal(losses[name], loss)
    for ours, theirs in zip(of_proof[0], of_none[0], strict=True):
        assert ours.keys() == theirs.keys()
        assert [key for key, value in ours.items() if value != theirs[key]] == []
    assert torch.equal(of_proof[1], of_none[1])
    assert of_proof[2] == of_none[2]


def test_a_refused_step_changes_nothing():
    student = pair_with(tiny_retinanet, "student", with_residual_tower)["student"]
    student.backbone.stem.append(Counting())
    distiller = Distiller(tiny_retinanet(seed=1), student, CrossKD())
    before = state_of(student)
    for _ in range(2):  # it is not let through the second time either
        with pytest.raises(ValueError, match="student: RetinaNet"):
            distiller(*tiny_batch())
    after = state_of(student)
    assert [key for key, value in before.items() if value != after[key]] == []
    assert after.keys() == before.keys()


# -- when ------------------------------------------------------------------------------------------


def forwards_of(detector: nn.Module) -> list[int]:
    """Counts the detector's own forward from now on."""
    calls: list[int] = []
    own = detector.forward

    def forward(*arguments: Any) -> Any:
        calls.append(1)
        return own(*arguments)

    detector.forward = forward
    return calls


def test_both_are_proved_once():
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), CrossKD())
    teacher, student = forwards_of(distiller.teacher), forwards_of(distiller.student)
    for seed in range(3):
        distiller(*tiny_batch(seed=seed))
    assert len(teacher) == len(student) == 1
    twin = copy.deepcopy(distiller)
    twin(*tiny_batch())
    assert len(teacher) == len(student) == 1


def test_prove_false_switches_it_off():
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), CrossKD(), prove=False)
    teacher, student = forwards_of(distiller.teacher), forwards_of(distiller.student)
    distiller(*tiny_batch())
    assert teacher == student == []


def test_without_targets_the_student_is_proved_by_its_predictions():
    student = pair_with(tiny_retinanet, "student", with_residual_tower)["student"]
    with pytest.raises(ValueError, match=r"student: RetinaNet.*They part at head\.classification_head"):
        Distiller(tiny_retinanet(seed=1), student, CrossKD())(tiny_batch()[0])
    assert student.training
    assert all(module.training for module in student.modules())


def test_by_its_losses_it_is_proved_on_the_first_labelled_batch():
    student = pair_with(tiny_retinanet, "student", partial(with_extra_loss, base=RetinaNet))["student"]
    distiller = Distiller(tiny_retinanet(seed=1), student, CrossKD())
    calls = forwards_of(distiller.teacher), forwards_of(student)
    images, targets = tiny_batch()
    for _ in range(2):
        distiller(images)
    assert [len(of_side) for of_side in calls] == [1, 1]
    with pytest.raises(ValueError, match=r"student: .*domain"):
        distiller(images, targets)


# -- detectors of one's own ------------------------------------------------------------------------


class Small(nn.Module):
    """A detector whose batch norm hides the scale of its pixels from its losses.

    Args:
        scale: its own forward multiplies the pixels by this.
        gain: its own forward multiplies the second loss by this.
        total: its own forward gives the sum of the losses.
        twice: its own forward runs the backbone twice.
        behind: what its own forward runs on the predicted sides.
    """

    def __init__(
        self,
        scale: float = 1.0,
        gain: float = 1.0,
        *,
        total: bool = False,
        twice: bool = False,
        behind: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scale, self.gain, self.total, self.twice = scale, gain, total, twice
        self.behind = behind
        norm = nn.BatchNorm2d(8, eps=1e-12)
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 8, 1, bias=False), norm)
        self.tower = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())
        self.logits, self.sides = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 4, 1)

    def losses(self, logits: Tensor, sides: Tensor) -> dict[str, Tensor]:
        return {"classes": logits.sigmoid().mean(), "sides": sides.square().mean()}

    def forward(self, images: Tensor, targets: Any = None) -> Any:
        if self.twice:
            self.backbone(images)
        features = self.tower(self.backbone(self.scale * images))
        sides = self.sides(features)
        losses = self.losses(self.logits(features), sides if self.behind is None else self.behind(sides))
        losses["sides"] = self.gain * losses["sides"]
        if not self.training:
            return features
        return torch.stack(list(losses.values())).sum() if self.total else losses


def small_losses(detector: Small, predictions: Any, anchors: Any, targets: Any) -> Any:
    losses = detector.losses(predictions.logits, predictions.regression)
    return losses, predictions.logits.amax(dim=-1) > 0


SMALL = generic(
    features="backbone",
    towers={"both": "tower"},
    predictors={"both": {"logits": "logits", "regression": "sides"}},
    losses=small_losses,
    decode=lambda detector, sides, anchors: torch.cat([-sides[..., :2].exp(), sides[..., 2:].exp()], dim=-1),
)


def small_step(
    student: Small, teacher: Small | None = None, targets: Any = (), **options: Any
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    distiller = Distiller(teacher or Small(), student, CrossKD(position=1), SMALL, **options)
    return distiller(torch.rand(2, 3, 32, 32), targets)


class Scale(nn.Module):
    """One learned factor, as FCOS has for the sides of boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(3.0))

    def forward(self, sides: Tensor) -> Tensor:
        return sides * self.value


@every_side
@pytest.mark.parametrize("behind", [Scale(), nn.Conv2d(4, 4, 1)])
def test_a_layer_behind_a_predictor_that_no_piece_runs(side, behind):
    """It is told by what it is given: of a teacher, and of a student without labels, there are no losses."""
    detectors = {"teacher": Small(), "student": Small(), side: Small(behind=behind)}
    message = rf"^{side}: Small's own forward runs behind on what sides predicts.*predict=.*prove=False"
    with pytest.raises(ValueError, match=message):
        small_step(**detectors, targets=None)
    assert small_step(**detectors, targets=None, prove=False)["kd_reg"] > 0
    if side == "student":
        with pytest.raises(ValueError, match=r"sides is .* by its pieces.*No piece runs behind .*predict="):
            small_step(**detectors)


def test_other_layers_that_no_piece_runs_are_warned_of():
    """A mask head is no part of the predictions; a factor behind an operation may be one."""

    class Masks(Small):
        def forward(self, images: Tensor, targets: Any = None) -> Any:
            self.masks(self.backbone(images))
            return super().forward(images, targets)

    teacher = Masks()
    teacher.masks = nn.Sequential(Scale(), nn.ReLU(), nn.Conv2d(8, 1, 1))
    with pytest.warns(UserWarning, match=r"teacher: Masks's own forward .*: masks\.0, masks\.2\. Right"):
        small_step(copy.deepcopy(teacher), teacher)


def test_a_student_with_equal_losses_and_other_layers():
    """In eval mode, where batch norm hides nothing, such a student is not the one that was trained."""
    with pytest.raises(ValueError, match=r"^student: Small.*They part at backbone\.0\."):
        small_step(Small(scale=1 / 255))


def test_the_sum_of_the_losses_is_enough():
    assert small_step(Small(total=True)).keys() == {"classes", "sides", "kd_cls", "kd_reg"}
    message = r"^student: Small.*the sum of the losses is .* alone and .* by its pieces"
    with pytest.raises(ValueError, match=message):
        small_step(Small(gain=5.0, total=True))


def test_a_layer_that_the_own_forward_runs_more_often():
    assert small_step(Small(twice=True), Small(twice=True))["kd_cls"] > 0


def test_an_own_forward_that_cannot_be_called():
    class Demanding(Small):
        def forward(self, images: Tensor, targets: Any = None) -> Any:
            raise KeyError("meta")

    with pytest.raises(ValueError, match=r"^student: Demanding's own forward.*KeyError: 'meta'.*prove=False"):
        small_step(Demanding())
