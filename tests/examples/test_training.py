from __future__ import annotations

import copy
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from augmentations import crop, flip, mosaic
from coco_data import CocoFolder, collate, training_loader
from processes import Processes
from run_folder import save_atomically
from torch import nn
from train_torchvision import parse
from training import Trainer, detected, learning_rate_factor, make_optimizer

from crosskd import CrossKD, Distiller
from tests.examples.coco_files import write_coco
from tests.helpers.tiny import tiny_retinanet

ALONE = Processes(0, 1, torch.device("cpu"))


def options(*arguments: str, folder: Path):
    chosen = ["--workers", "0", "--batch-size", "2", "--short-side", "64", *arguments]
    return parse(["--output", str(folder), *chosen])


@pytest.fixture
def dataset(tmp_path):
    return CocoFolder(*write_coco(tmp_path / "data"), augment=[flip])


def make_trainer(dataset, folder, model=None, epochs=3, *arguments: str) -> Trainer:
    chosen = options("--evaluate-every", "2", *arguments, folder=folder)
    folder.mkdir(exist_ok=True)
    loader = training_loader(dataset, chosen.batch_size, seed=chosen.seed, workers=chosen.workers)
    return Trainer(model or tiny_retinanet(2, seed=3), loader, folder, chosen, epochs, ALONE)


def no_evaluation(detector: nn.Module) -> dict[str, float]:
    return {"AP": 0.0}


def equal_states(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[key]) for key, value in first.state_dict().items())


def test_warm_up_then_steps(tmp_path):
    chosen = options(
        "--schedule", "step", "--milestones", "0.5", "0.75", "--warmup-steps", "10", folder=tmp_path
    )
    factors = [learning_rate_factor(step, 100, chosen) for step in (0, 5, 10, 49, 50, 75)]
    assert factors == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.01])


def test_warm_up_then_cosine(tmp_path):
    chosen = options("--schedule", "cosine", "--warmup-steps", "10", folder=tmp_path)
    factors = [learning_rate_factor(step, 110, chosen) for step in (10, 60, 110)]
    assert factors == pytest.approx([1, 0.505, 0.01])


def test_warm_up_never_takes_more_than_a_quarter(tmp_path):
    chosen = options("--warmup-steps", "1000", folder=tmp_path)
    assert learning_rate_factor(25, 100, chosen) == pytest.approx(1)


def test_norms_and_biases_are_not_decayed(tmp_path):
    model = tiny_retinanet(2, norm="group", batch_norm=True)
    for name, kind in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        optimizer = make_optimizer(model, options("--optimizer", name, folder=tmp_path))
        assert isinstance(optimizer, kind)
        decayed, kept = optimizer.param_groups
        assert kept["weight_decay"] == 0 < decayed["weight_decay"]
        assert min(p.ndim for p in decayed["params"]) == 4
        assert sum(len(group["params"]) for group in (decayed, kept)) == len(list(model.parameters()))


def test_a_failed_write_leaves_the_previous_file(tmp_path):
    path = tmp_path / "weights.pt"
    save_atomically({"a": torch.ones(1)}, path)
    with pytest.raises(Exception, match="pickle"):
        save_atomically({"a": lambda: None}, path)
    assert torch.load(path, weights_only=True)["a"] == 1


def test_training_lowers_the_loss_and_notes_it(dataset, tmp_path, capsys):
    trainer = make_trainer(
        dataset, tmp_path / "run", None, 8, "--evaluate-every", "4", "--learning-rate", "0.003"
    )
    history = trainer.run(no_evaluation)
    losses = [sum(entry["losses"].values()) for entry in history]
    assert losses[-1] < 0.8 * losses[0]
    assert [entry["epoch"] for entry in history if "metrics" in entry] == [4, 8]
    assert history[-1]["learning_rate"] == pytest.approx(0.01 * 0.003)
    assert history[-1]["unreadable_images"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert "epoch   8/8" in lines[-1]
    assert "images/s" in lines[-1]


def test_distilled_students_learn_from_unlabelled_images_too(tmp_path):
    """The labelled ones are the same with and without, and the gradient is the sum of both passes'."""
    images, annotations = write_coco(tmp_path / "data")
    teacher, student = tiny_retinanet(2, seed=1), tiny_retinanet(2, seed=2)
    data = CocoFolder(images, annotations, augment=[flip, crop], unlabelled=images)
    plain = [data[index] for index in range(len(data))]
    data.draws_unlabelled = True
    drawn = [data[index] for index in range(len(data))]
    for (image, target), (same_image, with_another) in zip(plain, drawn, strict=True):
        assert torch.equal(image, same_image)
        assert target.keys() ^ with_another.keys() == {"unlabelled_image"}
    again, first = data[0][1]["unlabelled_image"], drawn[0][1]["unlabelled_image"]
    data.epoch = 1
    other = [data[index][1]["unlabelled_image"] for index in range(len(data))]
    assert torch.equal(again, first)
    assert not all(torch.equal(a, b[1]["unlabelled_image"]) for a, b in zip(other, drawn, strict=True))

    trainer = make_trainer(data, tmp_path / "run", Distiller(teacher, student, CrossKD()), 1, "--clip", "0")
    given, targets = collate(drawn[:2])
    unlabelled = [target["unlabelled_image"] for target in targets]
    losses = trainer._backward(given, [dict(target) for target in targets], 1, True)
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    trainer.optimizer.zero_grad(set_to_none=True)
    own = [target.copy() for target in targets]
    expected = trainer.model(given, [{k: t[k] for k in ("boxes", "labels")} for t in own])
    further = trainer.model(unlabelled, None)
    sum([*expected.values(), *further.values()]).backward()
    assert losses.keys() == expected.keys() | {f"unlabelled_{name}" for name in further}
    assert losses["unlabelled_kd_cls"] == pytest.approx(further["kd_cls"].item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_what_the_teacher_detects_are_labels_of_unlabelled_images(tmp_path):
    """As if they stood in the annotations, and the distillation losses as before."""
    images, annotations = write_coco(tmp_path / "data")
    teacher, student = tiny_retinanet(2, seed=1), tiny_retinanet(2, seed=2)
    torch.nn.init.constant_(teacher.head.classification_head.cls_logits.bias, 0.5)  # so that it finds much
    data = CocoFolder(images, annotations, unlabelled=images)
    data.draws_unlabelled = True
    distiller = Distiller(teacher, student, CrossKD())
    trainer = make_trainer(data, tmp_path / "run", distiller, 1, "--clip", "0")
    trainer.label = partial(detected, teacher.eval(), score=0.6)
    given, targets = collate([data[index] for index in range(2)])
    unlabelled = [target["unlabelled_image"] for target in targets]
    losses = trainer._backward(given, [dict(target) for target in targets], 1, True)
    with torch.no_grad():
        found = teacher(unlabelled)
    labels = []
    for of_image in found:
        boxes = of_image["boxes"]
        sides = boxes[:, 2:] - boxes[:, :2]
        kept = (of_image["scores"] >= 0.6) & (sides >= 1).all(dim=1)
        assert 0 < kept.sum() < len(boxes)
        labels.append({"boxes": boxes[kept], "labels": of_image["labels"][kept]})
    expected = distiller(unlabelled, labels)
    for name, loss in expected.items():
        assert losses[f"unlabelled_{name}"] == pytest.approx(loss.item(), rel=1e-5)
    assert {"unlabelled_classification", "unlabelled_kd_cls"} <= losses.keys()


def test_unlabelled_images_that_are_not_there_are_named(tmp_path):
    images, annotations = write_coco(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        with pytest.raises(FileNotFoundError, match=folder):
            CocoFolder(images, annotations, unlabelled=tmp_path / folder)


def test_accumulated_parts_step_as_one_batch_does(dataset, tmp_path):
    dataset.augment = []
    once = make_trainer(
        dataset, tmp_path / "once", tiny_retinanet(2), 1, "--batch-size", "4", "--optimizer", "sgd"
    )
    parts = make_trainer(
        dataset, tmp_path / "parts", tiny_retinanet(2), 1, "--batch-size", "2", "--accumulate", "2",
        "--optimizer", "sgd",
    )  # fmt: skip
    batch = [dataset[i] for i in (0, 1, 2, 0)]
    for trainer, size in ((once, 4), (parts, 2)):
        trainer.loader = _Batches([batch[i : i + size] for i in range(0, 4, size)], dataset)
        trainer.run(no_evaluation)
    theirs = parts.model.state_dict()
    for name, value in once.model.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)


class _Batches:
    def __init__(self, batches, dataset):
        self.batches, self.dataset, self.batch_sampler = batches, dataset, Namespace()

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            yield [image for image, _ in batch], [dict(target) for _, target in batch]


class KilledError(Exception):
    pass


def test_a_run_stopped_in_its_evaluation_goes_on_to_the_same_weights(dataset, tmp_path):
    whole = make_trainer(dataset, tmp_path / "whole", tiny_retinanet(2, batch_norm=True), 3)
    whole.run(no_evaluation)

    def killed(detector):
        if broken.epoch == 2:
            raise KilledError
        return {"AP": 0.0}

    broken = make_trainer(dataset, tmp_path / "broken", tiny_retinanet(2, batch_norm=True), 3)
    broken.options.evaluate_every = 1
    with pytest.raises(KilledError):
        broken.run(killed)
    resumed = make_trainer(dataset, tmp_path / "broken", tiny_retinanet(2, batch_norm=True), 3, "--resume")
    history = resumed.run(no_evaluation)
    assert equal_states(whole.model, resumed.model)
    assert [entry["epoch"] for entry in history] == [1, 2, 3]


def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_to_the_same_weights(dataset, tmp_path, capsys):
    """Whatever the workers, augmentations, random numbers of the model, and averages."""
    dataset.augment = [flip, mosaic]
    chosen = ["--checkpoint-every", "1", "--batch-size", "1", "--accumulate", "2"]
    chosen += ["--workers", "2", "--ema", "0.9"]

    def trainer(name: str, *further: str) -> Trainer:
        torch.manual_seed(0)
        student = tiny_retinanet(2, seed=3, batch_norm=True)
        student.backbone.stem.append(nn.Dropout(0.2))
        model = Distiller(tiny_retinanet(2, seed=4, width=64), student, CrossKD())
        torch.manual_seed(99)  # what drew random numbers before must not matter
        return make_trainer(dataset, tmp_path / name, model, 2, *chosen, *further)

    whole = trainer("whole", "--workers", "0")
    # Epochs of five batches and three steps: it is killed in the second epoch's second step.
    broken, steps = trainer("broken"), []
    expected = whole.run(no_evaluation)

    def killed(*_):
        steps.append(0)
        if len(steps) == 5:
            raise KilledError

    broken.optimizer.register_step_pre_hook(killed)
    with pytest.raises(KilledError):
        broken.run(no_evaluation)
    resumed = trainer("broken", "--resume")
    history = resumed.run(no_evaluation)
    assert "broken: going on after epoch 1, batch 2 of the next" in capsys.readouterr().out
    assert equal_states(whole.model, resumed.model)
    assert equal_states(whole.detector, resumed.detector)
    assert [entry["losses"] for entry in history] == [entry["losses"] for entry in expected]


def test_a_checkpoint_that_is_not_on_every_machine_is_refused(dataset, tmp_path):
    make_trainer(dataset, tmp_path / "run", None, 1).run(no_evaluation)
    resumed = make_trainer(dataset, tmp_path / "run", None, 1, "--resume")
    resumed.processes = Namespace(**vars(ALONE), gather=lambda value: [value, (0, 0)])
    with pytest.raises(ValueError, match=r"run/checkpoint.pt .*\[\(1, 0\), \(0, 0\)\].*all machines share"):
        resumed.run(no_evaluation)


def test_a_checkpoint_of_another_length_is_refused(dataset, tmp_path):
    make_trainer(dataset, tmp_path / "run", None, 1).run(no_evaluation)
    with pytest.raises(ValueError, match="belongs to a run of 1 epochs, not 2"):
        make_trainer(dataset, tmp_path / "run", None, 2, "--resume").run(no_evaluation)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(dataset, tmp_path):
    model = tiny_retinanet(2)
    trainer = make_trainer(dataset, tmp_path / "run", model, 1)
    with torch.no_grad():
        model.head.classification_head.cls_logits.bias[0] = float("nan")
    before = copy.deepcopy(model.backbone.state_dict())
    with pytest.raises(FloatingPointError, match="not finite in epoch 1: .*classification.*nan"):
        trainer.run(no_evaluation)
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())


def test_bfloat16_and_channels_last_train(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path / "run", None, 1, "--amp", "bfloat16", "--channels-last")
    history = trainer.run(no_evaluation)
    assert all(value > 0 for value in history[0]["losses"].values())
    weight = trainer.model.backbone.stem[0][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_gradient_is_clipped(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path / "run", None, 1, "--clip", "0.01", "--optimizer", "sgd")
    norms = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: norms.append(
            torch.stack([p.grad.norm() for g in optimizer.param_groups for p in g["params"]]).norm().item()
        )
    )
    trainer.run(no_evaluation)
    assert norms
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


def test_the_average_is_evaluated_kept_and_taken_up_again(dataset, tmp_path):
    """And it is the average of the student alone, that the optimizer's steps make."""

    def model():
        return Distiller(tiny_retinanet(2, seed=4, width=64), tiny_retinanet(2, seed=3), CrossKD())

    torch.manual_seed(0)
    whole = make_trainer(dataset, tmp_path / "whole", model(), 2, "--ema", "0.9")
    key = "head.classification_head.cls_logits.weight"
    weights, evaluated = [], []
    whole.optimizer.register_step_post_hook(
        lambda *_: weights.append(whole.trained.state_dict()[key].detach().clone())
    )

    def seen(detector):
        evaluated.append(detector)
        return {"AP": 0.0}

    whole.run(seen)
    expected = weights[0]
    for weight in weights[1:]:
        expected = 0.9 * expected + 0.1 * weight
    torch.testing.assert_close(whole.detector.state_dict()[key], expected)
    assert evaluated == [whole.detector]
    assert type(whole.detector) is type(whole.trained)

    torch.manual_seed(0)
    broken = make_trainer(dataset, tmp_path / "broken", model(), 2, "--ema", "0.9")
    broken.history.append(broken._train_epoch())
    broken._save()
    resumed = make_trainer(dataset, tmp_path / "broken", model(), 2, "--ema", "0.9", "--resume")
    resumed.run(no_evaluation)
    assert equal_states(whole.detector, resumed.detector)
    with pytest.raises(ValueError, match=r"checkpoint.pt: --ema was given"):
        make_trainer(dataset, tmp_path / "broken", model(), 2, "--resume").run(no_evaluation)


def test_an_evaluation_that_fails_loses_no_epoch(dataset, tmp_path):
    def fails(detector):
        raise RuntimeError("evaluation")

    with pytest.raises(RuntimeError, match="evaluation"):
        make_trainer(dataset, tmp_path / "run", None, 1).run(fails)
    resumed = make_trainer(dataset, tmp_path / "run", None, 1, "--resume")
    resumed._train_epoch = fails
    (entry,) = resumed.run(no_evaluation)
    assert entry["metrics"] == {"AP": 0.0}


@pytest.mark.parametrize("content", [b"", b"PK", None])
def test_a_damaged_checkpoint_is_named(dataset, tmp_path, content):
    trainer = make_trainer(dataset, tmp_path / "run", None, 1)
    if content is None:
        save_atomically({"epoch": 1}, trainer.checkpoint)
    else:
        trainer.checkpoint.write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint.pt is (damaged|no checkpoint)"):
        make_trainer(dataset, tmp_path / "run", None, 1, "--resume").run(no_evaluation)


def test_the_log_is_told_every_epoch(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path / "run", None, 2)
    told = []
    trainer.log = lambda name, entry: told.append((name, entry["epoch"], "metrics" in entry))
    trainer.run(no_evaluation)
    assert told == [("run", 1, False), ("run", 2, True)]
