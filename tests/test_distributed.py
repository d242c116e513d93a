"""Two processes under DistributedDataParallel, on gloo."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from crosskd import PKD, CrossKD, Distiller, PredictionMimicking, Schedule, TeacherCache, check
from crosskd.predictions import mean_over_ranks, of_this_rank
from tests.helpers.tiny import tiny_batch, tiny_fcos, tiny_retinanet, tiny_ssd
from tests.helpers.two_stages import CLASSES, tiny_faster_rcnn, two_stage_batch
from tests.methods.test_every_method import all_methods, emptied, plain_gfl

pytestmark = pytest.mark.slow
RANKS = 2


def distiller_of(build, method, teacher_seed: int = 1) -> Distiller:
    """In float64: group norm over few locations nearly cancels gradients, more than float32 can tell."""
    torch.manual_seed(3)
    return Distiller(build(width=64, seed=teacher_seed), build(width=32, seed=2), method).double()


def batch_of(rank: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A rank's share: the second has an object fewer, so that the ranks' normalisers differ."""
    images, targets = tiny_batch(batch=2, seed=rank)
    if rank == 1:
        targets[0] = {name: tensor[:1] for name, tensor in targets[0].items()}
    targets = [{"boxes": t["boxes"].double(), "labels": t["labels"]} for t in targets]
    return [image.double() for image in images], targets


def joined_batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    (images, targets), (more_images, more_targets) = (batch_of(rank) for rank in range(RANKS))
    return images + more_images, targets + more_targets


def gradients(distiller: Distiller) -> dict[str, Tensor]:
    return {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}


def distillation(losses: dict[str, Tensor]) -> Tensor:
    return losses["kd_cls"] + losses["kd_reg"]


def _in_process(rank: int, folder: str, job, *arguments: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    try:
        torch.save(job(rank, *arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_two_ranks(folder: Path, job, *arguments: Any) -> list[Any]:
    """Runs ``job(rank, *arguments)`` in two processes; what each returned."""
    # A server that has imported torch once hands out processes at once, and has no threads to lose.
    arguments = (str(folder), job, *arguments)
    mp.start_processes(_in_process, args=arguments, nprocs=RANKS, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def mean_job(rank: int) -> Tensor:
    value = torch.tensor(float(rank + 1), requires_grad=True)
    mean = mean_over_ranks(value)
    assert not mean.requires_grad
    assert value.item() == rank + 1
    return mean


def test_mean_over_ranks(tmp_path):
    assert [mean.item() for mean in on_two_ranks(tmp_path, mean_job)] == [1.5, 1.5]


def check_job(rank: int) -> Tensor:
    if rank == 0:
        check(tiny_retinanet(), tiny_retinanet(seed=1), *tiny_batch())
    return mean_over_ranks(torch.tensor(rank + 1.0))


def test_one_process_may_check_alone(tmp_path):
    assert [mean.item() for mean in on_two_ranks(tmp_path, check_job)] == [1.5, 1.5]


def test_mean_over_one_process_is_the_value_itself(tmp_path):
    value = torch.tensor(3.0)
    assert mean_over_ranks(value) is value
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        assert mean_over_ranks(value) is value
    finally:
        dist.destroy_process_group()


def cache_job(rank: int, folder: str) -> list[dict[str, float]]:
    """Losses of both ranks on one batch, of each on its own, and of both on what rank 1 has written alone."""
    torch.manual_seed(3)
    cache = TeacherCache(folder, keep_free=0)
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(), [CrossKD(), PKD()], teacher_cache=cache)
    parallel = DistributedDataParallel(distiller)
    rows = []
    for batch in (0, rank, 1):
        read = cache.hits
        losses = parallel(*tiny_batch(seed=batch))
        sum(losses.values()).backward()
        rows.append({**{name: loss.item() for name, loss in losses.items()}, "read": cache.hits - read})
        dist.barrier()
    return rows


def test_ranks_write_and_read_one_cache(tmp_path):
    first, second = on_two_ranks(tmp_path, cache_job, str(tmp_path / "cache"))
    assert first[2] == second[2]  # entries are read to the last bit, whoever wrote them
    assert [row["read"] for row in (*first[1:], *second[1:])] == [2, 2, 0, 2]
    assert len(list((tmp_path / "cache").glob("??/*.pt"))) == 4
    assert not list(tmp_path.rglob("*.unfinished"))
    torch.manual_seed(3)
    alone = Distiller(tiny_retinanet(seed=1), tiny_retinanet(), [CrossKD(), PKD()])
    for seed, row in ((0, first[0]), (1, first[2])):
        losses = {name: loss.item() for name, loss in alone(*tiny_batch(seed=seed)).items()}
        assert losses == pytest.approx({name: row[name] for name in losses}, rel=1e-5)


def step_job(rank: int, build, method, only_distillation: bool) -> dict[str, Any]:
    """One step, with a teacher of other weights on each rank where it is only watched."""
    distiller = distiller_of(build, method)
    parallel = DistributedDataParallel(distiller, find_unused_parameters=only_distillation)
    losses = parallel(*batch_of(rank))
    (distillation(losses) if only_distillation else sum(losses.values())).backward()
    return {
        "losses": {name: loss.detach() for name, loss in losses.items()},
        "gradients": gradients(distiller),
    }


@pytest.mark.parametrize("build", [tiny_retinanet, tiny_fcos])
def test_gradients_are_equal_on_the_ranks(tmp_path, build):
    first, second = on_two_ranks(tmp_path, step_job, build, CrossKD(), False)
    assert first["losses"]["kd_cls"] != second["losses"]["kd_cls"]
    assert len(first["gradients"]) == len(list(distiller_of(build, CrossKD()).parameters()))
    for name, gradient in first["gradients"].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, second["gradients"][name]), name


@pytest.mark.parametrize("build", [tiny_retinanet, tiny_fcos])
def test_prediction_mimicking_matches_one_process_on_the_joined_batch(tmp_path, build):
    """The averaged normaliser makes the mean of the ranks the joined batch's loss, and its gradient."""
    ranks = on_two_ranks(tmp_path, step_job, build, PredictionMimicking(), True)
    alone = distiller_of(build, PredictionMimicking())
    losses = alone(*joined_batch())
    distillation(losses).backward()
    for name in ("kd_cls", "kd_reg"):
        mean = sum(rank["losses"][name].item() for rank in ranks) / RANKS
        assert mean == pytest.approx(losses[name].item(), rel=1e-10)
    expected = gradients(alone)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(ranks[0]["gradients"][name], gradient, rtol=1e-8, atol=1e-10 * largest)


@pytest.mark.parametrize("build", [tiny_retinanet, tiny_fcos])
def test_crosskd_is_near_one_process_on_the_joined_batch(tmp_path, build):
    """Not equal: features are aligned by the statistics of each rank's own batch."""
    ranks = on_two_ranks(tmp_path, step_job, build, CrossKD(), True)
    losses = distiller_of(build, CrossKD())(*joined_batch())
    for name in ("kd_cls", "kd_reg"):
        mean = sum(rank["losses"][name].item() for rank in ranks) / RANKS
        assert mean == pytest.approx(losses[name].item(), rel=0.1)
        assert mean != pytest.approx(losses[name].item(), rel=1e-6)


def teacher_job(rank: int, build) -> list[Tensor]:
    """A teacher of other weights on each rank stays as it was; the student's are rank 0's."""
    distiller = distiller_of(build, CrossKD(), teacher_seed=rank + 1)
    torch.nn.init.constant_(distiller.student.head.regression_head.bbox_reg.bias, rank)
    parallel = DistributedDataParallel(distiller)
    assert distiller.student.head.regression_head.bbox_reg.bias.eq(0).all()
    held = {id(parameter) for parameter in parallel.parameters()}
    assert held.isdisjoint(id(parameter) for parameter in distiller.teacher.parameters())
    optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        sum(parallel(*batch_of(rank)).values()).backward()
        optimizer.step()
    expected = build(width=64, seed=rank + 1).double().state_dict()
    for name, tensor in distiller.teacher.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    return [parameter.detach() for parameter in distiller.parameters()]


@pytest.mark.parametrize("build", [tiny_retinanet, tiny_fcos])
def test_the_teacher_is_neither_broadcast_nor_reduced(tmp_path, build):
    first, second = on_two_ranks(tmp_path, teacher_job, build)
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)


def schedule_job(rank: int) -> list[float]:
    """DDP would refuse the second step after one in which a projection got no gradient."""
    parallel = DistributedDataParallel(distiller_of(tiny_fcos, CrossKD(schedule=Schedule(stop=1))))
    values = []
    for _ in range(3):
        losses = parallel(*batch_of(rank))
        sum(losses.values()).backward()
        values.append(losses["kd_cls"].item())
    return values


def test_a_method_that_stops_does_not_stall_the_ranks(tmp_path):
    for first, *later in on_two_ranks(tmp_path, schedule_job):
        assert first > 0
        assert later == [0.0, 0.0]


def weights_job(rank: int, settings: dict[str, float]) -> Tensor:
    """Two steps with a loss of weight 0: DDP waits on the second for a gradient that never came."""
    parallel = DistributedDataParallel(distiller_of(tiny_retinanet, CrossKD(1, **settings)))
    for _ in range(2):
        sum(parallel(*batch_of(rank)).values()).backward()
    return parallel.module.student.backbone.laterals[0].weight.grad


@pytest.mark.parametrize("settings", [{"reg_weight": 0.0}, {"cls_weight": 0.0}])
def test_a_loss_of_weight_0_does_not_stop_the_ranks(tmp_path, settings):
    first, second = on_two_ranks(tmp_path, weights_job, settings)
    assert torch.equal(first, second)


def unlabelled_job(rank: int) -> Tensor:
    """The student's predictors get no gradient from unlabelled images, which DDP must know of."""
    distiller = distiller_of(tiny_retinanet, CrossKD())
    parallel = DistributedDataParallel(distiller, find_unused_parameters=True)
    for _ in range(2):
        sum(parallel(batch_of(rank)[0]).values()).backward()
    return distiller.student.backbone.laterals[0].weight.grad


def test_unlabelled_images(tmp_path):
    first, second = on_two_ranks(tmp_path, unlabelled_job)
    assert first.abs().max() > 0
    assert torch.equal(first, second)


def one_without_targets_job(rank: int, teacher, method) -> Tensor:
    """The first rank's images have targets, the second's don't."""
    distiller = Distiller(teacher(seed=1), tiny_retinanet(seed=2), method)
    parallel = DistributedDataParallel(distiller, find_unused_parameters=True)
    for _ in range(2):
        images, targets = tiny_batch(batch=2, seed=rank)
        sum(parallel(images, None if rank else targets).values()).backward()
        assert mean_over_ranks(torch.tensor(float(rank))) == 0.5  # nothing is left of another reduction
    return distiller.student.backbone.laterals[0].weight.grad


@pytest.mark.parametrize(
    ("teacher", "method"),
    [(tiny_retinanet, CrossKD()), (tiny_retinanet, PKD()), (tiny_fcos, CrossKD())],
)
def test_one_rank_may_have_images_without_targets(tmp_path, teacher, method):
    """PKD reads no label assignment, CrossKD of another type's teacher reads two."""
    first, second = on_two_ranks(tmp_path, one_without_targets_job, teacher, method)
    assert first.abs().max() > 0
    assert torch.equal(first, second)


def faster_rcnns() -> Distiller:
    torch.manual_seed(3)
    teacher, student = (tiny_faster_rcnn(width=width, seed=width) for width in (24, 16))
    return Distiller(teacher, student, CrossKD())


def ssds() -> Distiller:
    torch.manual_seed(3)
    teacher, student = (
        tiny_ssd(CLASSES, widths=widths, seed=widths[0]) for widths in ((24, 24, 8), (16, 8, 8))
    )
    return Distiller(teacher, student, CrossKD())


def softmax_job(rank: int, build) -> dict[str, Any]:
    """One step of a head whose labels start at 1; the second rank's images have no object."""
    distiller = build()
    parallel = DistributedDataParallel(distiller)
    images, targets = two_stage_batch(batch=2, seed=rank)
    if rank == 1:
        targets = [{name: tensor[:0] for name, tensor in target.items()} for target in targets]
    torch.manual_seed(rank)  # each rank draws samples of its own
    losses = parallel(images, targets)
    sum(losses.values()).backward()
    return {"losses": {n: v.detach() for n, v in losses.items()}, "gradients": gradients(distiller)}


@pytest.mark.parametrize("build", [faster_rcnns, ssds])
def test_heads_with_a_softmax(tmp_path, build):
    first, second = on_two_ranks(tmp_path, softmax_job, build)
    for rank in (first, second):
        assert all(loss.isfinite() for loss in rank["losses"].values())
        assert all(loss > 0 for name, loss in rank["losses"].items() if name.startswith("kd_"))
    assert len(first["gradients"]) == len(list(build().parameters()))
    for name, gradient in first["gradients"].items():
        assert torch.equal(gradient, second["gradients"][name]), name


def every_method_job(rank: int) -> dict[str, Any]:
    """Three steps with all methods at once; in the second, one rank's images have no object."""
    kind = plain_gfl()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of methods that are better not combined
        distiller = kind.distiller(all_methods())
    before = {name: tensor.clone() for name, tensor in distiller.state_dict().items()}
    parallel = DistributedDataParallel(distiller)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-4)
    torch.manual_seed(rank)  # each rank draws masks of its own
    for step in range(3):
        images, targets = tiny_batch(seed=10 * rank + step)
        losses = parallel(images, emptied(targets) if rank == 1 and step == 1 else targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return {"before": before, "after": distiller.state_dict()}


def test_every_method_ends_with_equal_weights(tmp_path):
    first, second = on_two_ranks(tmp_path, every_method_job)
    before, after = first["before"], first["after"]
    for name, tensor in after.items():
        assert torch.equal(tensor, second["after"][name]), name
    trained = {name.split(".")[1] for name in after if name.startswith("methods.") and ".weight" in name}
    changed = {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}
    assert trained <= changed  # the methods' names
    assert len(trained) > 5


def queries_job(rank: int) -> dict[str, Any]:
    """One step of a detection transformer; the second rank's images hold no object."""
    from tests.helpers import detr

    torch.manual_seed(rank)  # each rank's random queries are its own
    distiller = detr.distiller_of("rt_detr", [*detr.methods_of_queries(), PKD()], prove=False)
    parallel = DistributedDataParallel(distiller, find_unused_parameters=True)  # denoising needs objects
    inputs = detr.batch_of(seed=rank)
    if rank:
        inputs["labels"] = [{name: part[:0] for name, part in label.items()} for label in inputs["labels"]]
    for _ in range(2):
        parallel.zero_grad()
        losses = parallel(**inputs)
        sum(losses.values()).backward()
    return {
        "losses": {name: loss.detach() for name, loss in losses.items()},
        "gradients": gradients(distiller),
    }


@pytest.mark.transformers
def test_detection_transformers(tmp_path):
    first, second = on_two_ranks(tmp_path, queries_job)
    assert first["losses"]["queries_kd_cls"] != second["losses"]["queries_kd_cls"]
    assert any(name.startswith("methods") for name in first["gradients"])
    for name, gradient in first["gradients"].items():
        assert torch.equal(gradient, second["gradients"][name]), name


def uneven_job(rank: int, joined: bool) -> Tensor:
    """One rank has a batch more than the other; or, after the stop, no targets."""
    method = CrossKD(schedule=None if joined else Schedule(stop=1))
    parallel = DistributedDataParallel(
        distiller_of(tiny_retinanet, method), find_unused_parameters=not joined
    )
    if joined:
        with parallel.join():
            for _ in range(2 + rank):
                sum(parallel(*batch_of(rank)).values()).backward()
    else:
        for step in range(4):
            images, targets = batch_of(rank)
            sum(parallel(images, None if rank and step else targets).values()).backward()
            assert mean_over_ranks(torch.tensor(float(rank))) == 0.5  # nothing is left of another reduction
    return next(parallel.module.student.backbone.parameters()).grad


@pytest.mark.parametrize("joined", [True, False], ids=["join", "mixed after the stop"])
def test_ranks_of_uneven_batches(tmp_path, joined):
    first, second = on_two_ranks(tmp_path, uneven_job, joined)
    if not joined:
        assert torch.equal(first, second)


def group_job(rank: int) -> list[float]:
    """Each rank has a DDP of its own group: a normalizer is averaged over that, not over the world."""
    groups = [dist.new_group([number]) for number in range(RANKS)]
    parallel = DistributedDataParallel(distiller_of(tiny_retinanet, CrossKD()), process_group=groups[rank])
    alone = distiller_of(tiny_retinanet, CrossKD())
    with of_this_rank():
        expected = alone(*batch_of(rank))["kd_cls"].item()
    return [parallel(*batch_of(rank))["kd_cls"].item(), expected]


def test_normalizers_are_those_of_the_process_group(tmp_path):
    for found, expected in on_two_ranks(tmp_path, group_job):
        assert found == pytest.approx(expected, rel=1e-12)


def wrapped_job(rank: int) -> str:
    student = DistributedDataParallel(tiny_fcos(seed=1))
    with pytest.raises(ValueError, match="student is wrapped in DistributedDataParallel") as caught:
        Distiller(tiny_fcos(), student, CrossKD())
    return str(caught.value)


def test_a_student_wrapped_inside_is_refused(tmp_path):
    for message in on_two_ranks(tmp_path, wrapped_job):
        assert "wrap the distiller instead" in message


# -- fully_shard ------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


SHARDED = {
    "head": lambda distiller: [distiller.student.head],
    "blocks": lambda distiller: list(distiller.student.head.classification_head.conv),
    "student": lambda distiller: [distiller.student],
    None: lambda distiller: [
        distiller.student.backbone,
        distiller.student.head.classification_head.cls_logits,
        distiller,
    ],
}


@pytest.mark.parametrize("refused", SHARDED)
def test_what_may_be_sharded(one_process, refused):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("fully_shard came with PyTorch 2.6")
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), CrossKD())
    expected = distiller(*tiny_batch())
    distiller._checked.clear()
    for module in SHARDED[refused](distiller):
        fsdp.fully_shard(module, mesh=one_process)
    if refused is not None:
        with pytest.raises(ValueError, match=r"student: .*(head|RetinaNet).* fully_shard\(distiller\)"):
            distiller(*tiny_batch())
        return
    losses = distiller(*tiny_batch())
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])
    sum(losses.values()).backward()
