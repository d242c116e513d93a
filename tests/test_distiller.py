"""The Distiller: what it returns, holds, survives and refuses."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead

from crosskd import PKD, CrossKD, Distiller, Method, PredictionMimicking, Schedule
from crosskd.adapters import TorchvisionRetinaNet
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet
from tests.helpers.two_stages import tiny_faster_rcnn

OWN_LOSSES = {
    tiny_retinanet: {"classification", "bbox_regression"},
    tiny_fcos: {"classification", "bbox_regression", "bbox_ctrness"},
}
DISTILLATION_LOSSES = {"kd_cls", "kd_reg"}


@pytest.fixture(params=[tiny_retinanet, tiny_fcos], ids=["retinanet", "fcos"])
def build(request):
    """Builds a detector of a family."""
    return request.param


def distiller_of(build, methods=None, **options) -> Distiller:
    """A Distiller whose student is narrower than its teacher, so that it has projections."""
    teacher, student = build(width=64, seed=1), build(width=32, seed=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)  # the same projections each time
        return Distiller(teacher, student, CrossKD(position=1) if methods is None else methods, **options)


def train(distiller: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        sum(distiller(*tiny_batch(seed=step)).values()).backward()
        optimizer.step()


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


# -- what it returns ------------------------------------------------------------------------------


def test_training_returns_a_flat_dict_of_scalars(build):
    losses = distiller_of(build)(*tiny_batch())
    assert losses.keys() == OWN_LOSSES[build] | DISTILLATION_LOSSES
    for loss in losses.values():
        assert loss.shape == ()
        assert loss.isfinite()
        assert loss > 0
        assert loss.requires_grad


def restless(build) -> nn.Module:
    """A detector whose losses depend on random numbers: one scale per batch, and dropout."""
    detector = build(batch_norm=True)
    detector.transform.min_size = (48, 64)
    detector.backbone.stem.append(nn.Dropout(0.5))
    return detector


def with_batch_norm_in_the_head(build) -> nn.Module:
    detector = build(norm="group")
    for branch in (detector.head.classification_head, detector.head.regression_head):
        for parent in list(branch.modules()):
            for name, module in parent.named_children():
                if isinstance(module, nn.GroupNorm):
                    setattr(parent, name, nn.BatchNorm2d(module.num_channels))
    return detector


@pytest.mark.parametrize(
    "make",
    [
        lambda build: build(),
        lambda build: build(batch_norm=True),
        lambda build: build(norm="group"),
        restless,
        with_batch_norm_in_the_head,
    ],
    ids=["plain", "batch-norm", "group-norm", "random", "head-batch-norm"],
)
@pytest.mark.parametrize("method", [CrossKD(), PredictionMimicking()], ids=["crosskd", "mimicking"])
def test_own_losses_and_statistics_are_bit_identical_with_the_plain_detectors(build, make, method):
    student = make(build)
    plain = copy.deepcopy(student)
    distiller = Distiller(build(norm="group", seed=1), student, method)
    for seed in range(2):
        images, targets = tiny_batch(seed=seed)
        torch.manual_seed(seed)
        expected = plain(images, targets)
        torch.manual_seed(seed)
        losses = distiller(images, targets)
        assert_same({name: losses[name] for name in expected}, expected)
    assert_same(dict(student.named_buffers()), dict(plain.named_buffers()))


def test_own_losses_have_the_plain_detectors_gradient(build):
    student = build(batch_norm=True)
    plain = copy.deepcopy(student)
    losses = Distiller(build(seed=1), student, CrossKD())(*tiny_batch())
    sum(losses[name] for name in OWN_LOSSES[build]).backward()
    sum(plain(*tiny_batch()).values()).backward()
    for ours, theirs in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_images_and_targets_are_left_as_they_were(build):
    images, targets = tiny_batch(side=48)
    distiller_of(build)(images, targets)
    expected_images, expected_targets = tiny_batch(side=48)
    for index in range(len(images)):
        assert torch.equal(images[index], expected_images[index])
        assert_same(targets[index], expected_targets[index])


def test_eval_answers_what_the_student_alone_would(build):
    distiller = distiller_of(build).eval()
    images, _ = tiny_batch()
    plain = build(width=32, seed=2).eval()
    for ours, theirs in zip(distiller(images), plain(images), strict=True):
        assert len(theirs["boxes"]) > 0
        assert_same(ours, theirs)


def test_losses_whose_names_clash_carry_their_methods_name(build):
    methods = [CrossKD(), PredictionMimicking(name="mimic"), CrossKD(reg_weight=0)]
    losses = Distiller(build(), build(seed=1), methods)(*tiny_batch())
    expected = {"crosskd_kd_cls", "crosskd_kd_reg", "mimic_kd_cls", "mimic_kd_reg", "crosskd_2_kd_cls"}
    assert losses.keys() == OWN_LOSSES[build] | expected
    assert torch.equal(losses["crosskd_kd_cls"], losses["crosskd_2_kd_cls"])


def test_methods_are_copied_so_that_one_object_serves_two_distillers():
    method = CrossKD()
    first, second = Distiller(tiny_fcos(), tiny_fcos(seed=1), method), distiller_of(tiny_retinanet, method)
    assert method.position is None
    assert [d.methods["crosskd"].position for d in (first, second)] == [2, 3]


# -- images without targets -----------------------------------------------------------------------


def teachers_amount(build, threshold: float) -> float:
    """The normaliser of unlabelled images, from the plain teacher's own head."""
    teacher = build(width=64, seed=1).eval()
    with torch.no_grad():
        batch, _ = teacher.transform(tiny_batch()[0])
        outputs = teacher.head(list(teacher.backbone(batch.tensors).values()))
    confident = outputs["cls_logits"].sigmoid().amax(2) >= threshold
    assert confident.any(1).all()
    if build is tiny_retinanet:
        return float(confident.sum(1).clamp(min=1).sum())
    return float((confident * outputs["bbox_ctrness"].squeeze(2).sigmoid()).sum(1).clamp(min=1).sum())


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_without_targets_the_teachers_confident_anchors_normalise(build, threshold):
    """The sum over all anchors, which doesn't depend on the threshold, is the loss times the normaliser."""
    images, _ = tiny_batch()
    losses = distiller_of(build, unlabelled_threshold=threshold)(images)
    assert losses.keys() == DISTILLATION_LOSSES
    reference = distiller_of(build, unlabelled_threshold=0.2)(images)
    ratio = teachers_amount(build, 0.2) / teachers_amount(build, threshold)
    assert ratio > 1
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(reference[name].item() * ratio, rel=1e-5)


def test_without_targets_the_sum_over_anchors_is_that_with_targets():
    """FCOS counts every anchor with targets too, so that only the normaliser differs."""
    images, targets = tiny_batch()
    normalizers = []

    class Watched(CrossKD):
        def forward(self, step):
            normalizers.append(step.assignment.normalizer.item())
            return super().forward(step)

    distiller = distiller_of(tiny_fcos, Watched())
    labelled, unlabelled = distiller(images, targets), distiller(images)
    assert normalizers[1] == pytest.approx(teachers_amount(tiny_fcos, 0.5))
    for name in DISTILLATION_LOSSES:
        assert labelled[name].item() * normalizers[0] == pytest.approx(
            unlabelled[name].item() * normalizers[1], rel=1e-5
        )


@pytest.mark.parametrize("threshold", [0, 1, -0.5, 1.5])
def test_a_threshold_that_is_no_probability_is_refused(threshold):
    with pytest.raises(ValueError, match=f"between 0 and 1, got {threshold}"):
        distiller_of(tiny_fcos, unlabelled_threshold=threshold)


def test_a_view_that_reads_targets_says_so_on_images_without():
    view = {"teacher_view": lambda images, targets: [image for image, _ in zip(images, targets, strict=True)]}
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), CrossKD(), **view)
    images, targets = tiny_batch()
    assert "kd_cls" in distiller(images, targets)
    with pytest.raises(TypeError, match=r"teacher_view= failed .*\(images, None\)"):
        distiller(images)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, features):
        return self.inner(features)


@pytest.mark.parametrize("change", [torch.compile, Wrapped])
@pytest.mark.parametrize("tower", ["head.classification_head.conv", "rpn.head.conv"])
def test_towers_that_are_no_sequence_are_refused(change, tower):
    build = tiny_retinanet if tower.startswith("head") else tiny_faster_rcnn
    student = build(seed=2)
    *path, name = tower.split(".")
    parent = student.get_submodule(".".join(path))
    setattr(parent, name, change(getattr(parent, name)))
    what = r"was compiled .*torch.compile\(distiller\)" if change is torch.compile else "is a Wrapped"
    with pytest.raises(ValueError, match=f"student: .*tower {what}"):
        Distiller(build(seed=1), student, CrossKD())


# -- what it holds --------------------------------------------------------------------------------


def test_parameters_and_state_hold_student_and_projections_never_the_teacher(build):
    distiller = distiller_of(build)
    student = [f"student.{name}" for name in build(width=32).state_dict()]
    projections = [
        f"methods.crosskd.projections.{branch}.convolution.weight"
        for branch in ("classification", "regression")
    ]
    assert sorted(distiller.state_dict()) == sorted(student + projections)
    assert sorted(dict(distiller.named_parameters())) == sorted(student + projections)
    theirs = {id(parameter) for parameter in distiller.teacher.parameters()}
    assert theirs.isdisjoint(id(parameter) for parameter in distiller.parameters())
    assert distiller.teacher not in list(distiller.modules())


def test_students_of_the_teachers_width_need_no_projection(build):
    distiller = Distiller(build(), build(seed=1), CrossKD())
    assert all(name.startswith("student.") for name in distiller.state_dict())


def test_student_comes_out_the_plain_detector_that_it_was(build):
    student = build(width=32, batch_norm=True)
    kind, keys = type(student), list(student.state_dict())
    distiller = Distiller(build(width=64), student, CrossKD())
    train(distiller)
    assert distiller.student is student
    assert type(student) is kind
    assert type(student.head) is type(build().head)
    assert list(student.state_dict()) == keys
    assert "compute_loss" not in vars(student) | vars(student.head)
    plain = build(width=32, batch_norm=True, seed=9)
    plain.load_state_dict(student.state_dict())
    images, _ = tiny_batch()
    for ours, theirs in zip(student.eval()(images), plain.eval()(images), strict=True):
        assert_same(ours, theirs)


def test_train_and_eval_never_wake_the_teacher(build):
    distiller = distiller_of(build)
    for mode in (True, False, True):
        distiller.train(mode)
        assert distiller.student.training is mode
        assert not any(module.training for module in distiller.teacher.modules())


def test_state_loads_into_another_distiller(build):
    trained, fresh = distiller_of(build), distiller_of(build)
    train(trained)
    assert not torch.equal(trained(*tiny_batch())["kd_cls"], fresh(*tiny_batch())["kd_cls"])
    fresh.load_state_dict(trained.state_dict())
    assert_same(fresh(*tiny_batch()), trained(*tiny_batch()))


# -- what it survives -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("steps", [0, 1])
def test_copies_give_the_same_losses_and_go_their_own_way(build, duplicate, steps):
    distiller = distiller_of(build)
    train(distiller, steps)
    twin = duplicate(distiller)
    before = distiller(*tiny_batch())
    assert_same(twin(*tiny_batch()), before)
    assert not any(parameter.requires_grad for parameter in twin.teacher.parameters())
    train(twin, steps=2)
    assert_same(distiller(*tiny_batch()), before)
    assert not torch.equal(twin(*tiny_batch())["kd_cls"], before["kd_cls"])


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def test_a_deep_copy_shares_the_teachers_weights_and_moves_them_alone(build):
    distiller = Distiller(build(seed=1, batch_norm=True), build(seed=2), CrossKD())
    twin = copy.deepcopy(distiller)
    for ours, theirs in zip(tensors_of(twin.teacher), tensors_of(distiller.teacher), strict=True):
        assert ours is not theirs
        assert ours.data_ptr() == theirs.data_ptr()
    of_students = zip(twin.student.parameters(), distiller.student.parameters(), strict=True)
    assert all(ours.data_ptr() != theirs.data_ptr() for ours, theirs in of_students)
    assert twin.student_adapter.detector is twin.student
    twin.double()
    assert {parameter.dtype for parameter in distiller.teacher.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in twin.teacher.parameters()} == {torch.float64}


def test_the_students_average_is_that_of_its_steps_and_holds_no_teacher(build):
    distiller = distiller_of(build)
    average = torch.optim.swa_utils.AveragedModel(distiller.student)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-3)
    seen = []
    for step in range(2):
        optimizer.zero_grad()
        sum(distiller(*tiny_batch(seed=step)).values()).backward()
        optimizer.step()
        average.update_parameters(distiller.student)
        seen.append([parameter.detach().clone() for parameter in distiller.student.parameters()])
    for mean, first, second in zip(average.module.parameters(), *seen, strict=True):
        torch.testing.assert_close(mean, (first + second) / 2)
    assert type(average.module) is type(distiller.student)
    whole = torch.optim.swa_utils.AveragedModel(distiller).module
    assert tensors_of(whole.teacher)[0].data_ptr() == tensors_of(distiller.teacher)[0].data_ptr()


def warnings_of_steps(distiller: Distiller, trained: Iterable[Any], every: int = 1) -> list[str]:
    """What five steps warn of, an optimizer's step after ``every`` batches."""
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 6):
            sum(distiller(*tiny_batch(seed=step)).values()).backward()
            if step % every == 0:
                optimizer.step()
                optimizer.zero_grad()
    return [str(warning.message) for warning in caught if "distiller.parameters()" in str(warning.message)]


@pytest.mark.parametrize("every", [1, 4])
def test_projections_that_no_optimizer_holds_are_warned_of_once(build, every):
    distiller = distiller_of(build)
    (message,) = warnings_of_steps(distiller, distiller.student.parameters(), every)
    assert "not the parameters of crosskd" in message


def test_projections_that_an_optimizer_holds_are_not_warned_of(build):
    distiller = distiller_of(build)
    assert warnings_of_steps(distiller, distiller.parameters()) == []
    without = Distiller(build(seed=1), build(seed=2), CrossKD())
    assert warnings_of_steps(without, without.student.parameters()) == []


def test_a_warmup_that_begins_with_the_biases_is_not_warned_of(build):
    """Ultralytics' first step has a learning rate of 0 for all but the biases; projections have none."""
    distiller = distiller_of(build)
    kinds: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in distiller.parameters():
        kinds[parameter.ndim > 1].append(parameter)
    groups = [{"params": kinds[False], "lr": 0.01}, {"params": kinds[True], "lr": 0.0}]
    assert warnings_of_steps(distiller, groups) == []


def test_schedules_count_neither_forwards_without_gradients_nor_failed_ones(build):
    distiller = distiller_of(build, CrossKD(schedule=Schedule(warmup=4)))
    images, targets = tiny_batch()
    with torch.no_grad():
        distiller(images, targets)
    with pytest.raises(ValueError, match="boxes"):
        distiller(images, [{}, {}])
    assert distiller.progress.tolist() == [0, -1]
    distiller(images, targets)
    assert distiller.progress.tolist() == [1, -1]


def test_torch_save_round_trip(build):
    distiller = distiller_of(build)
    file = io.BytesIO()
    torch.save(distiller, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=False)(*tiny_batch()), distiller(*tiny_batch()))


def test_to_casts_student_projections_and_the_teachers_copy(build):
    teacher = build(width=64)
    distiller = Distiller(teacher, build(width=32), CrossKD()).to(torch.float64)
    for module in (distiller, distiller.teacher):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    images, targets = tiny_batch()
    targets = [{"boxes": t["boxes"].double(), "labels": t["labels"]} for t in targets]
    losses = distiller([image.double() for image in images], targets)
    assert {loss.dtype for loss in losses.values()} == {torch.float64}


def test_to_moves_the_teachers_copy(build):
    teacher = build()
    distiller = Distiller(teacher, build(width=64), CrossKD(schedule=Schedule(warmup=2))).to("meta")
    for module in (distiller, distiller.teacher):
        assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    assert {parameter.device.type for parameter in teacher.parameters()} == {"cpu"}


def test_projections_are_made_in_the_students_type(build):
    teacher, student = build(width=64).double(), build(width=32).double()
    distiller = Distiller(teacher, student, CrossKD())
    assert {parameter.dtype for parameter in distiller.methods.parameters()} == {torch.float64}


def test_bfloat16_autocast_gives_about_the_same_losses(build):
    distiller = distiller_of(build)
    expected = distiller(*tiny_batch())
    with torch.autocast("cpu", torch.bfloat16):
        losses = distiller(*tiny_batch())
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=0.05), name
    assert all(
        parameter.grad.isfinite().all() for parameter in distiller.parameters() if parameter.grad is not None
    )


# -- schedules ------------------------------------------------------------------------------------


def test_schedule_scales_the_losses_and_stops_the_teacher(build):
    images, targets = tiny_batch()
    full = distiller_of(build)(images, targets)
    method = CrossKD(position=1, schedule=Schedule(warmup=2, stop=3))
    scheduled = distiller_of(build, method, prove=False)
    teacher_runs = []
    scheduled.teacher.backbone.register_forward_hook(lambda *_: teacher_runs.append(1))
    factors = [0.5, 1.0, 1.0, 0.0]
    for factor in factors:
        losses = scheduled(images, targets)
        for name in OWN_LOSSES[build]:
            assert torch.equal(losses[name], full[name])
        assert losses.keys() == full.keys()
        for name in DISTILLATION_LOSSES:
            assert (losses[name].item() > 0) == (factor > 0)
    assert len(teacher_runs) == 3


def test_schedule_factor_multiplies(build):
    images, targets = tiny_batch()
    distiller = distiller_of(build, CrossKD(position=1, schedule=Schedule(warmup=4)))
    first, second = distiller(images, targets), distiller(images, targets)
    for name in DISTILLATION_LOSSES:
        assert second[name].item() == pytest.approx(2 * first[name].item(), rel=1e-6)


def test_unscheduled_losses_are_the_last_steps_without_factors(build):
    images, targets = tiny_batch()
    distiller = distiller_of(build, CrossKD(position=1, schedule=Schedule(warmup=2, stop=3)))
    assert distiller.unscheduled == {}
    full = distiller_of(build)(images, targets)
    for factor in (0.5, 1.0, 1.0, 0.0):
        losses = distiller(images, targets)
        assert losses.keys() == distiller.unscheduled.keys()
        for name, raw in distiller.unscheduled.items():
            assert not raw.requires_grad
            kd = name in DISTILLATION_LOSSES
            assert raw.item() == (full[name].item() if factor or not kd else 0.0)
            assert losses[name].item() == pytest.approx(raw.item() * (factor if kd else 1.0), rel=1e-6)


def test_a_stopped_method_gives_its_projections_a_gradient_of_zero(build):
    """DistributedDataParallel waits for every parameter."""
    distiller = distiller_of(build, CrossKD(schedule=Schedule(stop=1)))
    distiller(*tiny_batch())
    sum(distiller(*tiny_batch()).values()).backward()
    for parameter in distiller.methods.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_without_targets_a_stopped_method_is_zero_and_can_be_back_propagated(build):
    distiller = Distiller(build(), build(seed=1), CrossKD(schedule=Schedule(stop=1)))
    images, _ = tiny_batch()
    assert distiller(images).keys() == DISTILLATION_LOSSES
    losses = distiller(images)
    assert {name: loss.item() for name, loss in losses.items()} == dict.fromkeys(DISTILLATION_LOSSES, 0.0)
    sum(losses.values()).backward()


def test_schedules_in_epochs_follow_set_epoch(build):
    distiller = distiller_of(build, CrossKD(schedule=Schedule(stop=1, unit="epoch")))
    with pytest.raises(ValueError, match=r"crosskd has a schedule in epochs.*call distiller.set_epoch"):
        distiller(*tiny_batch())
    distiller.set_epoch(0)
    assert distiller(*tiny_batch())["kd_cls"] > 0
    distiller.set_epoch(1)
    assert distiller(*tiny_batch())["kd_cls"] == 0
    with pytest.raises(ValueError, match="epoch must be 0 or more, got -1"):
        distiller.set_epoch(-1)


def test_progress_is_saved_so_that_a_resumed_run_goes_on():
    method = CrossKD(schedule=Schedule(stop=2))
    distiller, resumed = distiller_of(tiny_fcos, method), distiller_of(tiny_fcos, method)
    distiller(*tiny_batch())
    distiller(*tiny_batch())
    resumed.load_state_dict(distiller.state_dict())
    assert resumed(*tiny_batch())["kd_cls"] == 0
    distiller_of(tiny_fcos).set_epoch(3)  # without a schedule it does nothing


def test_a_schedule_may_come_or_go_when_a_run_is_resumed(build):
    scheduled = distiller_of(build, CrossKD(1, schedule=Schedule(stop=9)))
    plain = distiller_of(build, CrossKD(1))
    scheduled(*tiny_batch())
    with pytest.warns(UserWarning, match="with a schedule and this one has none"):
        plain.load_state_dict(scheduled.state_dict())
    with pytest.warns(UserWarning, match="counted from 0"):
        scheduled.load_state_dict(plain.state_dict())
    assert scheduled.progress.tolist() == [0, -1]


def test_the_state_of_a_wrapped_distiller_is_refused_in_one_sentence(build):
    distiller = distiller_of(build)
    state = {f"module.{key}": value for key, value in distiller.state_dict().items()}
    with pytest.raises(ValueError, match="DistributedDataParallel, whose keys start with module"):
        distiller.load_state_dict(state)


def test_a_students_file_is_refused_in_one_sentence(build):
    distiller = distiller_of(build)
    with pytest.raises(
        ValueError, match=r"no key that starts with student\..*distiller.student.load_state_dict"
    ):
        distiller.load_state_dict(distiller.student.state_dict())


def test_without_targets_a_stopped_method_and_a_frozen_stem_can_be_back_propagated(build):
    student = build(seed=1)
    student.backbone.stem.requires_grad_(False)
    distiller = Distiller(build(), student, CrossKD(schedule=Schedule(stop=1)))
    images, _ = tiny_batch()
    distiller(images)
    losses = distiller(images)
    sum(losses.values()).backward()
    assert sum(losses.values()) == 0


def pruned(detector: nn.Module) -> None:
    for module in list(detector.modules()):
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, "weight", 0.3)


def weight_normalised(detector: nn.Module) -> None:
    for module in list(detector.modules()):
        if isinstance(module, nn.Conv2d):
            nn.utils.weight_norm(module)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("change", [pruned, weight_normalised])
def test_students_that_cannot_be_copied_are_distilled(build, change):
    student = build(seed=1)
    change(student)
    images, targets = tiny_batch()
    expected = student(images, targets)
    sum(expected.values()).backward()
    losses = Distiller(build(), student, CrossKD())(images, targets)
    sum(losses.values()).backward()
    for name, loss in expected.items():
        assert torch.equal(losses[name], loss)


def test_one_of_two_methods_may_stop(build):
    methods = [CrossKD(), PredictionMimicking(schedule=Schedule(stop=1))]
    distiller = distiller_of(build, methods)
    first, second = distiller(*tiny_batch()), distiller(*tiny_batch())
    assert first.keys() == second.keys()
    assert second["mimicking_kd_cls"] == 0
    assert torch.equal(first["crosskd_kd_cls"], second["crosskd_kd_cls"])


# -- what it refuses: construction ----------------------------------------------------------------


def test_something_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"teacher must be an nn\.Module, got str"):
        Distiller("resnet", tiny_fcos(), CrossKD())


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_wrapped_detectors_are_refused(side):
    detectors = {"teacher": tiny_fcos(), "student": tiny_fcos(seed=1)}
    detectors[side] = nn.DataParallel(detectors[side])
    message = f"{side} is wrapped in DataParallel: hand in the detector itself, and wrap the distiller"
    with pytest.raises(ValueError, match=message):
        Distiller(**detectors, methods=CrossKD())


@pytest.mark.parametrize(
    "compiled",
    [lambda d: torch.compile(d, backend="eager"), lambda d: d.compile(backend="eager") or d],
    ids=["wrapped", "in place"],
)
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_detectors_compiled_as_a_whole_are_unwrapped_with_a_warning(side, compiled):
    detectors = {"teacher": tiny_fcos(), "student": tiny_fcos(seed=1)}
    plain = detectors[side]
    detectors[side] = compiled(plain)
    with pytest.warns(UserWarning, match=f"{side} was compiled as a whole, but") as caught:
        distiller = Distiller(**detectors, methods=CrossKD())
    assert caught[0].filename == __file__
    assert side == "teacher" or distiller.student is plain
    eager = Distiller(tiny_fcos(), tiny_fcos(seed=1), CrossKD())
    assert_same(distiller(*tiny_batch()), eager(*tiny_batch()))


def test_shared_weights_are_warned_of():
    teacher, student = tiny_fcos(), tiny_fcos(seed=1)
    student.backbone = teacher.backbone
    with pytest.warns(UserWarning, match="teacher and student share weights"):
        Distiller(teacher, student, CrossKD())


def test_one_detector_can_not_teach_itself():
    detector = tiny_fcos()
    with pytest.raises(ValueError, match="teacher and student are one object, so there is nothing to distil"):
        Distiller(detector, detector, CrossKD())


@pytest.mark.parametrize(("methods", "got"), [(None, "got None"), (CrossKD, r"call it, CrossKD\(\)")])
def test_methods_forgotten_or_not_made_are_named(methods, got):
    with pytest.raises(TypeError, match=rf"methods must be .* {got}"):
        Distiller(tiny_fcos(), tiny_fcos(seed=1), methods)


def test_no_methods_are_refused():
    with pytest.raises(ValueError, match="methods is empty"):
        distiller_of(tiny_fcos, [])


@pytest.mark.parametrize("methods", [[nn.Linear(1, 1)], nn.Linear(1, 1), [CrossKD]])
def test_things_that_are_no_methods_are_refused(methods):
    with pytest.raises(TypeError, match=r"methods must be crosskd\.Method objects"):
        distiller_of(tiny_fcos, methods)


def test_teachers_that_cannot_be_copied_are_refused(build):
    teacher = build()
    teacher.last_features = torch.ones(1, requires_grad=True) * 2
    with pytest.raises(TypeError, match=r"can't be copied .*: the teacher is held as a frozen copy"):
        Distiller(teacher, build(seed=1), CrossKD())


# -- what changes after construction ---------------------------------------------------------------


def test_a_students_layer_that_is_replaced_by_its_like_is_trained_from_the_first_step_on(build):
    """Its classes and widths are as before."""
    distiller = distiller_of(build)
    distiller(*tiny_batch())
    head = distiller.student.head.classification_head
    head.cls_logits = nn.Conv2d(head.cls_logits.in_channels, head.cls_logits.out_channels, 3, padding=1)
    sum(distiller(*tiny_batch()).values()).backward()
    assert head.cls_logits.weight.grad.abs().max() > 0


def test_a_students_head_of_other_classes_is_refused(build):
    distiller = distiller_of(build)
    distiller(*tiny_batch())
    distiller.student.head = build(num_classes=7, width=distiller.student.backbone.out_channels).head
    with pytest.raises(ValueError, match=r"student's head\S* was replaced .* differ now in classes"):
        distiller(*tiny_batch())


@pytest.mark.parametrize("change", ["assign", "layer"])
def test_a_teacher_of_other_parameters_is_warned_of_once(build, change):
    teacher, batch = build(seed=1), tiny_batch()
    distiller = Distiller(teacher, build(seed=2), CrossKD())
    before = distiller(*batch)
    if change == "assign":
        teacher.load_state_dict(build(seed=5).state_dict(), assign=True)
    else:
        teacher.head.classification_head.cls_logits = nn.Conv2d(1, 1, 1)
    with pytest.warns(UserWarning, match=r"load_state_dict\(assign=True\).*goes on with those that it had"):
        found = distiller(*batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller(*batch)
    assert torch.equal(found["kd_cls"], before["kd_cls"])


def test_a_teacher_that_is_loaded_in_place_is_followed_without_a_word(build):
    teacher = build(seed=1)
    distiller = Distiller(teacher, build(seed=2), CrossKD())
    teacher.load_state_dict(build(seed=5).state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = distiller(*tiny_batch())
    expected = Distiller(build(seed=5), build(seed=2), CrossKD())(*tiny_batch())
    assert torch.equal(found["kd_cls"], expected["kd_cls"])


def test_a_student_frozen_after_the_first_step_is_refused(build):
    distiller = Distiller(build(seed=1), build(seed=2), CrossKD())
    distiller(*tiny_batch())
    distiller.student.backbone.requires_grad_(False)
    distiller(*tiny_batch())  # the towers train
    distiller.requires_grad_(False)
    with pytest.raises(ValueError, match=r"none of the student's .* trainable.*requires_grad_\(True\)"):
        distiller(*tiny_batch())
    with torch.no_grad():
        distiller(*tiny_batch())
    distiller.student.head.classification_head.cls_logits.requires_grad_(True)
    with pytest.raises(ValueError, match="crosskd: kd_cls, kd_reg depends on .* frozen since the last step"):
        distiller(*tiny_batch())


def test_a_student_without_a_trainable_parameter_is_refused_though_projections_train(build):
    distiller = distiller_of(build)  # of two widths
    distiller.student.requires_grad_(False)
    with pytest.raises(ValueError, match=r"none of the student's .* trainable.*requires_grad_\(True\)"):
        distiller(*tiny_batch())


def test_images_with_targets_and_without_have_one_backward_on_the_first_step():
    """Proving the student by its own forward leaves the graph of what ran before as it was."""
    options = {"batch_norm": True, "norm": "none"}
    found = []
    for prove in (True, False):
        torch.manual_seed(0)
        distiller = Distiller(
            tiny_retinanet(seed=1, **options), tiny_retinanet(seed=2, **options), PKD(), prove=prove
        )
        images, targets = tiny_batch()
        unlabelled = sum(distiller([image.flip(-1) for image in images]).values())
        (unlabelled + sum(distiller(images, targets).values())).backward()
        found.append([p.grad for p in distiller.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_a_student_that_is_replaced_is_refused(training):
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), CrossKD()).train(training)
    distiller.student = tiny_retinanet(seed=3).train(training)
    with pytest.raises(ValueError, match="was replaced by a RetinaNet"):
        distiller(*tiny_batch())


def test_losses_have_one_name_with_targets_and_without():
    """Of the student's own loss of the same name images without targets tell nothing."""
    student = tiny_retinanet(seed=2)
    own = student.compute_loss
    student.compute_loss = lambda *given: {"kd_cls": sum(own(*given).values())}
    distiller = Distiller(tiny_retinanet(seed=1), student, CrossKD(), prove=False)
    images, targets = tiny_batch()
    labelled = distiller(images, targets)
    assert set(labelled) == {"kd_cls", "crosskd_kd_cls", "kd_reg"}
    assert set(distiller(images)) == {"crosskd_kd_cls", "kd_reg"}


# -- what it refuses: distillation that would silently do nothing -----------------------------------


def test_frozen_student_features_are_refused(build):
    distiller = distiller_of(build, CrossKD(position=1))
    distiller.student.backbone.requires_grad_(False)
    for branch in (distiller.student.head.classification_head, distiller.student.head.regression_head):
        branch.conv.requires_grad_(False)
    for _ in range(2):
        with pytest.raises(ValueError, match="tower, position 1 depend on no trainable parameter"):
            distiller(*tiny_batch())


class Rounded(nn.Module):
    """Its output requires a gradient, and the gradient is 0, as that of dynamically quantised layers."""

    passes = False

    def forward(self, features: Tensor) -> Tensor:
        return features if self.passes else features.round()


def rounding_pair() -> tuple[nn.Module, nn.Module]:
    teacher, student = tiny_retinanet(), tiny_retinanet(seed=1)
    teacher.head.classification_head.conv[3].append(Rounded())
    return teacher, student


def test_a_teacher_that_passes_no_gradient_on_is_refused():
    distiller = Distiller(*rounding_pair(), CrossKD(position=3))
    with pytest.warns(UserWarning, match=r"crosskd: kd_cls is .* gradient is 0 at every feature map"):
        distiller(*tiny_batch())
    distiller(*tiny_batch())
    with pytest.raises(ValueError, match=r"crosskd: kd_cls is .* gradient is 0 .* first 3 steps"):
        distiller(*tiny_batch())


def test_a_gradient_that_is_0_on_one_step_is_not_refused(monkeypatch):
    distiller = Distiller(*rounding_pair(), CrossKD(position=3))
    with pytest.warns(UserWarning, match="gradient is 0"):
        distiller(*tiny_batch())
    monkeypatch.setattr(Rounded, "passes", True)
    for _ in range(3):
        distiller(*tiny_batch())


def test_predictors_that_begin_with_zeros_are_not_refused():
    # On the first step they pass nothing on to the maps, but move themselves.
    student = tiny_retinanet(seed=1)
    for predictor in (student.head.classification_head.cls_logits, student.head.regression_head.bbox_reg):
        torch.nn.init.zeros_(predictor.weight)
    distiller = Distiller(tiny_retinanet(), student, PredictionMimicking())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            distiller(*tiny_batch())


def test_the_student_is_searched_for_sharded_weights_on_the_first_step_alone(monkeypatch):
    searched = []
    monkeypatch.setattr("crosskd.distiller.is_sharded", lambda student: bool(searched.append(student)))
    distiller = Distiller(tiny_retinanet(), tiny_retinanet(seed=1), CrossKD(position=3))
    for _ in range(3):
        distiller(*tiny_batch())
    assert searched.count(distiller.student) == 1


def test_frozen_features_are_found_after_a_step_without_gradients(build):
    distiller = Distiller(build(), build(seed=1), CrossKD())
    with torch.no_grad():
        distiller(*tiny_batch())
    distiller.student.requires_grad_(False)
    distiller.student.head.classification_head.cls_logits.requires_grad_(True)
    with pytest.raises(ValueError, match="depends on no trainable parameter"):
        distiller(*tiny_batch())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(build, value):
    teacher = build()
    with torch.no_grad():
        teacher.head.classification_head.cls_logits.bias.fill_(value)
    distiller = Distiller(teacher, build(seed=1), CrossKD())
    with pytest.raises(ValueError, match=r"crosskd: kd_\w+ is (nan|inf) on the first step"):
        distiller(*tiny_batch())


def test_zero_on_the_first_step_is_warned_of_once(build):
    student = build()
    distiller = Distiller(copy.deepcopy(student), student, PredictionMimicking())
    with pytest.warns(UserWarning, match="is exactly 0 on the first step") as caught:
        distiller(*tiny_batch())
    messages = [str(warning.message) for warning in caught]
    for name, message in zip(("kd_cls", "kd_reg"), messages, strict=True):
        assert message.startswith(f"mimicking: {name} is exactly 0 on the first step")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller(*tiny_batch())


class Returning(Method):
    """A method of a user's own, which returns what it is given to return."""

    def __init__(self, make_losses) -> None:
        super().__init__(name="own")
        self.make_losses = make_losses

    def forward(self, step):
        return self.make_losses(step)


def test_no_loss_at_all_is_refused(build):
    with pytest.raises(ValueError, match="own returned no loss at all"):
        distiller_of(build, Returning(lambda step: {}))(*tiny_batch())


@pytest.mark.parametrize(
    ("make_losses", "got"),
    [
        (lambda step: {"kd": step.student.predictions.logits.sum((0, 1))}, r"shape \(4,\)"),
        (lambda step: {"kd": 0.5}, "float"),
    ],
)
def test_losses_that_are_no_scalars_are_refused(make_losses, got):
    with pytest.raises(ValueError, match=f"own: kd must be a scalar tensor.*got {got}"):
        distiller_of(tiny_fcos, Returning(make_losses))(*tiny_batch())


def test_a_loss_named_like_the_students_own_does_not_replace_it(build):
    images, targets = tiny_batch()
    method = Returning(lambda step: {"classification": step.student.predictions.logits.square().mean()})
    losses = distiller_of(build, method)(images, targets)
    assert losses.keys() == OWN_LOSSES[build] | {"own_classification"}
    expected = build(width=32, seed=2)(images, targets)
    assert torch.equal(losses["classification"], expected["classification"])


def test_zero_weight_everywhere_is_refused():
    with pytest.raises(ValueError, match="there is nothing to distil"):
        distiller_of(tiny_fcos, CrossKD(cls_weight=0, reg_weight=0))


@pytest.mark.parametrize("replace", [lambda d: tiny_fcos(seed=3), nn.DataParallel, torch.compile])
def test_a_student_replaced_after_construction_is_refused(replace):
    distiller = Distiller(tiny_fcos(), tiny_fcos(seed=1), CrossKD())
    distiller(*tiny_batch())
    distiller.student = replace(distiller.student)
    with pytest.raises(
        ValueError, match=r"distiller.student, a FCOS, was replaced by a \w+: make a new Distiller for it"
    ):
        distiller(*tiny_batch())


@pytest.mark.parametrize("steps", [0, 1])
def test_a_layer_replaced_by_one_of_its_form_is_followed(build, steps):
    distiller = distiller_of(build)
    for _ in range(steps):
        distiller(*tiny_batch())
    head = distiller.student.head.classification_head
    head.cls_logits = copy.deepcopy(head.cls_logits)
    nn.init.normal_(head.cls_logits.bias)
    own = copy.deepcopy(distiller.student)(*tiny_batch())
    losses = distiller(*tiny_batch())
    for name, loss in own.items():
        assert torch.equal(losses[name], loss)
    losses["classification"].backward()
    assert head.cls_logits.bias.grad is not None


# What the quickstart says of changes to the teacher: the copy keeps the weights that it had.
def load_by_assignment(teacher: nn.Module) -> None:
    teacher.load_state_dict(tiny_retinanet(width=64, seed=9).state_dict(), assign=True)


def replace_the_head(teacher: nn.Module) -> None:
    teacher.head = tiny_retinanet(2, width=64).head


@pytest.mark.parametrize("change", [load_by_assignment, replace_the_head, nn.Module.double, nn.Module.train])
def test_changes_of_the_teacher_have_no_effect(change):
    teacher, student = tiny_retinanet(width=64, seed=1), tiny_retinanet(width=64, seed=2)
    distiller = Distiller(teacher, student, CrossKD(position=1))
    before = distiller(*tiny_batch())
    change(teacher)
    assert_same(distiller(*tiny_batch()), before)


def test_weights_loaded_into_the_teacher_are_followed():
    teacher, student = tiny_retinanet(width=64, seed=1), tiny_retinanet(width=64, seed=2)
    distiller, other = Distiller(teacher, student, CrossKD(position=1)), tiny_retinanet(width=64, seed=9)
    teacher.load_state_dict(other.state_dict())
    assert_same(distiller(*tiny_batch()), Distiller(other, student, CrossKD(position=1))(*tiny_batch()))


def test_a_teacher_in_train_mode_is_refused(build):
    distiller = distiller_of(build)
    distiller.teacher.train()
    with pytest.raises(ValueError, match=r"distiller.teacher is in train mode.*call distiller.teacher.eval"):
        distiller(*tiny_batch())


def test_a_student_alone_in_train_mode_is_refused(build):
    distiller = distiller_of(build).eval()
    distiller.student.train()
    with pytest.raises(ValueError, match=r"eval mode and its student in train mode.*distiller.train\(\)"):
        distiller(*tiny_batch())


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_weights_made_under_inference_mode_are_refused(side):
    detectors = {"teacher": tiny_fcos(), "student": tiny_fcos(seed=1)}
    with torch.inference_mode():
        detectors[side] = tiny_fcos(seed=2)
    with pytest.raises(ValueError, match=rf"{side}'s weights were made under torch.inference_mode\(\)"):
        Distiller(**detectors, methods=CrossKD())


def test_detectors_inside_another_module_are_named():
    average = torch.optim.swa_utils.AveragedModel(tiny_fcos())
    with pytest.raises(TypeError, match=r"teacher: .* a AveragedModel, but its \.module is a FCOS"):
        Distiller(average, tiny_fcos(seed=1), CrossKD())


def test_a_student_in_eval_mode_is_refused(build):
    distiller = distiller_of(build)
    distiller.student.eval()
    with pytest.raises(ValueError, match=r"its student in eval mode: call distiller\.train"):
        distiller(*tiny_batch())


def test_detectors_on_different_devices_are_refused(build):
    distiller = distiller_of(build)
    distiller.teacher.to("meta")
    with pytest.raises(
        ValueError, match=r"teacher is on meta and the student on cpu: move both with distiller.to"
    ):
        distiller(*tiny_batch())


class OwnStrides(TorchvisionRetinaNet):
    """As for a backbone that the probe image does not pass."""

    def __init__(self, detector):
        super().__init__(detector)
        self.strides = None


def test_levels_that_differ_are_refused_where_no_probe_could_tell():
    student = tiny_retinanet(seed=1)
    student.backbone.stem[0][0].stride = (1, 1)
    distiller = Distiller(tiny_retinanet(), student, CrossKD(), OwnStrides)
    message = r"levels differ: \[\(8, 8\), \(4, 4\), \(2, 2\)\] \(teacher\), \[\(16, 16\)"
    with pytest.raises(ValueError, match=message):
        distiller(*tiny_batch())


@pytest.mark.parametrize(
    "path",
    ["backbone", "backbone.stem", "head.classification_head.conv.0.0", "head.regression_head.bbox_reg"],
)
def test_hooks_on_what_is_called_are_run(path):
    distiller = distiller_of(tiny_retinanet)
    calls = []
    distiller.student.get_submodule(path).register_forward_hook(lambda *_: calls.append(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller(*tiny_batch())
    assert calls


# -- one assignment -------------------------------------------------------------------------------


def test_label_assignment_is_computed_once_per_image():
    student = tiny_retinanet(seed=1)
    matcher, calls = student.proposal_matcher, []

    class CountedMatcher(type(matcher)):
        def __call__(self, quality):
            calls.append(quality.shape)
            return super().__call__(quality)

    student.proposal_matcher = CountedMatcher(0.5, 0.4, allow_low_quality_matches=True)
    methods = [CrossKD(), PredictionMimicking()]
    Distiller(tiny_retinanet(), student, methods, prove=False)(*tiny_batch(batch=3))
    assert len(calls) == 3


@pytest.mark.parametrize("build", [tiny_retinanet, tiny_fcos])
def test_compute_loss_is_called_once_and_a_subclass_keeps_its_own(build):
    calls = []

    class Doubled(type(build())):
        def compute_loss(self, *arguments):
            calls.append(1)
            return {name: 2 * loss for name, loss in super().compute_loss(*arguments).items()}

    plain, student = build(seed=1), build(seed=1)
    student.__class__ = Doubled
    losses = Distiller(build(), student, CrossKD(), prove=False)(*tiny_batch())
    assert calls == [1]
    for name, loss in plain(*tiny_batch()).items():
        assert torch.equal(losses[name], 2 * loss)


def test_a_head_of_a_users_own_norms_distils():
    """A RetinaNet built by hand, around a head with another normalisation."""
    student = tiny_retinanet(seed=1)
    head = RetinaNetHead(32, 3, 4, norm_layer=nn.InstanceNorm2d)
    built = RetinaNet(student.backbone, 4, 64, 64, anchor_generator=student.anchor_generator, head=head)
    losses = Distiller(tiny_retinanet(norm="group"), built, CrossKD())(*tiny_batch())
    assert losses["kd_cls"] > 0
