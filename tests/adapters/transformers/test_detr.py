"""The adapter on the detection transformers of `transformers`, with random weights."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crosskd import (
    BCKD,
    CWD,
    FGD,
    LD,
    MGD,
    PKD,
    CosineAlignment,
    CrossKD,
    Distiller,
    FeatureImitation,
    MatchedQueries,
    PredictionMimicking,
    ResponseDistillation,
)
from crosskd.adapters import find_adapter
from crosskd.adapters.base import Batch, DecoderHead
from crosskd.adapters.transformers import TransformersDetr
from crosskd.diagnostics.decoder_checks import DECODER_CHECKS
from crosskd.testing import check_adapter
from tests.helpers.conformance import assert_green, only
from tests.helpers.detr import (
    CLASSES,
    KINDS,
    SIZE,
    batch_of,
    detector_of,
    distilled,
    distiller_of,
    methods_of_queries,
)
from tests.helpers.packages import package
from tests.helpers.tiny import tiny_retinanet

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.filterwarnings("ignore:.*pulls the student's own predictions"),
]
NOT_OF_DECODERS = (
    "taps and tail",
    "gradients through the tail",
    "label assignment",
    "rows permuted",
    "decoding and classes",
)


def own_part(losses: dict[str, Tensor]) -> Tensor:
    return sum(loss for name, loss in losses.items() if "kd_" not in name)  # type: ignore[return-value]


def without_objects(labels: list[dict[str, Tensor]], *images: int) -> list[dict[str, Tensor]]:
    return [
        {name: part[:0] if image in images else part for name, part in of_image.items()}
        for image, of_image in enumerate(labels)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_kit_is_green(kind):
    batch = batch_of()
    pair = {"teacher": detector_of(kind, 64, seed=1, layers=3, queries=12), "student": detector_of(kind)}
    arguments = (TransformersDetr, batch["pixel_values"], batch["labels"])
    if kind == "detr":  # all checks for one, those of decoders, with all methods, for the others
        skipped = (*NOT_OF_DECODERS, "float64")  # its masks are float32
        assert_green(*arguments, **pair, method=methods_of_queries(), skipped=skipped, decoder=True)
        return
    names = (*DECODER_CHECKS, *(("autocast",) if kind == "rt_detr" else ()))
    if kind == "rt_detr_v2":  # but for its attention it is the RT-DETR
        names = ("queries permuted", "own teacher")
    report = check_adapter(*arguments, **pair, method=methods_of_queries(), skip=only(*names))
    assert set(report.passed) == set(names)


@pytest.mark.parametrize("kind", KINDS)
def test_levels_and_queries_are_read_off(kind):
    adapter = find_adapter(detector_of(kind, queries=11))
    head = adapter.heads[0]
    assert isinstance(head, DecoderHead)
    assert (head.rows, head.width, head.num_queries, head.num_layers) == ("queries", 32, 11, 2)
    strides = {
        "detr": (16,),
        "conditional_detr": (16,),
        "deformable_detr": (8, 16, 32),
        "two_stage": (8, 16, 32),
    }
    assert adapter.strides == strides.get(kind, (8, 16))
    assert set(adapter.widths) == {32}
    assert head.num_classes == CLASSES + (kind == "detr")
    assert head.background == (CLASSES if kind == "detr" else None)
    assert TransformersDetr(adapter.detector, maps="backbone").strides[-1] == 16


@pytest.mark.parametrize("kind", KINDS)
def test_own_losses_are_those_of_plain_training_to_the_bit(kind):
    alone, inputs = detector_of(kind).train(), batch_of()
    together = distiller_of(kind)
    mask = torch.ones(2, SIZE, SIZE, dtype=torch.long)
    mask[1, :, 48:] = 0
    batches = [
        inputs,
        {**inputs, "pixel_mask": mask},
        {**inputs, "labels": without_objects(inputs["labels"], 0)},
        {**inputs, "labels": without_objects(inputs["labels"], 0, 1)},
    ]
    for step, batch in enumerate(batches):
        torch.manual_seed(step)
        expected = alone(**batch).loss
        torch.manual_seed(step)
        losses = together(**batch)
        assert torch.equal(own_part(losses), expected), step
        assert all(loss.isfinite() for loss in losses.values())
        denoised = kind in ("rt_detr", "rt_detr_v2", "d_fine") and step < 3
        assert ("loss_bbox_dn_0" in losses) == denoised
        if step == 0:
            expected.backward()
            own_part(losses).backward()
    for name, parameter in alone.named_parameters():
        gradient = together.student.get_parameter(name).grad
        assert (gradient is None) == (parameter.grad is None)
        if gradient is not None:
            assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-5), name
    assert together._proved == {"student", "teacher"}


def test_batches_of_the_librarys_image_processor():
    from transformers import DetrImageProcessor

    processor = DetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 96})
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((60, 90), (80, 50))]
    box = {"bbox": [5, 5, 20, 30], "category_id": 1, "area": 600, "iscrowd": 0}  # x, y, width, height
    objects = [{"image_id": index, "annotations": [box]} for index in range(2)]
    inputs = processor(images=images, annotations=objects, return_tensors="pt")
    distiller = distiller_of("detr")
    assert all(loss > 0 for loss in distilled(distiller(**inputs)).values())
    adapter = distiller.student_adapter
    batch = adapter.prepare(*adapter.from_keywords(inputs))
    assert (batch.size, batch.image_sizes) == ((76, 72), ((48, 72), (76, 48)))
    torch.testing.assert_close(batch.objects[0].boxes, 0.8 * torch.tensor([[5.0, 5.0, 25.0, 35.0]]))


def test_padding_is_the_teachers_too():
    distiller, inputs = distiller_of("deformable_detr"), batch_of()
    mask = torch.ones(2, SIZE, SIZE, dtype=torch.long)
    mask[1, :, 48:] = 0
    batch = distiller.student_adapter.prepare({**inputs, "pixel_mask": mask}, inputs["labels"])
    assert batch.image_sizes == ((SIZE, SIZE), (SIZE, 48))
    assert torch.equal(distiller.teacher_batch(batch, None, None).extra.mask, mask)


def test_a_loss_of_the_detectors_own_is_found_out():
    distiller = distiller_of("detr")
    own = distiller.student.loss_function

    def doubled(*arguments, **options):
        loss, parts, auxiliary = own(*arguments, **options)
        return 2 * loss, parts, auxiliary

    distiller.student.loss_function = doubled
    with pytest.raises(ValueError, match="the sum of the losses is"):
        distiller(**batch_of())


def test_a_state_that_is_handed_in_goes_on_to_the_last_layer():
    adapter = find_adapter(detector_of("rt_detr").eval())
    head = adapter.heads[0]
    assert isinstance(head, DecoderHead)
    with torch.no_grad():
        batch = adapter.prepare(batch_of()["pixel_values"], None)
        adapter.maps_of(batch)
        queries = head.own_queries(batch)
        first, last = head.run(batch, queries)
        changed = head.run(batch, queries, {0: first.state.flip(-1)})
    assert torch.equal(changed[0].state, first.state.flip(-1))
    assert not torch.allclose(changed[1].predictions.logits, last.predictions.logits)


def test_boxes_are_in_pixels_of_the_batch():
    adapter = find_adapter(detector_of("detr"))
    batch = adapter.prepare(images=batch_of()["pixel_values"], targets=batch_of()["labels"])
    boxes = batch_of()["labels"][0]["boxes"] * SIZE
    torch.testing.assert_close(batch.objects[0].boxes[:, :2], boxes[:, :2] - boxes[:, 2:] / 2)
    torch.testing.assert_close(batch.objects[0].boxes[:, 2:], boxes[:, :2] + boxes[:, 2:] / 2)


@pytest.mark.parametrize("which", ["encoder", "backbone"])
def test_methods_of_feature_maps(which):
    methods = [PKD(), CWD(), FGD(), MGD(), FeatureImitation(weight=1.0), CosineAlignment()]
    distiller = distiller_of("rt_detr", methods, adapter=partial(TransformersDetr, maps=which))
    losses = distilled(distiller(**batch_of()))
    assert {name.split("_")[1] for name in losses} >= {"pkd", "cwd", "fgd", "mgd", "imitation", "cosine"}
    for name, loss in losses.items():
        parameters = dict(distiller.student.named_parameters())
        gradients = torch.autograd.grad(loss, parameters.values(), retain_graph=True, allow_unused=True)
        reached = {
            key.split(".")[1]
            for key, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None and gradient.any()
        }
        assert "backbone" in reached, name
        assert ("encoder" in reached) == (which == "encoder"), name
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())


@pytest.mark.parametrize("kind", ["rt_detr", "detr"])
def test_the_gradient_at_maps_is_all_that_reaches_the_encoder(kind):
    # CosineAlignment measures the gradient of all other losses at the maps.
    distiller = distiller_of(kind, CosineAlignment(gradient_share=0.3), prove=False)
    for _ in range(2):
        sum(distiller(**batch_of()).values()).backward()
    assert distiller.methods["cosine"].balance.factor != 1


def test_a_dense_teacher_and_a_dense_student():
    dense = tiny_retinanet(CLASSES)
    losses = Distiller(dense, detector_of("deformable_detr"), PKD()).train()(**batch_of())
    assert losses["kd_pkd"] > 0
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}] * 2
    distiller = Distiller(detector_of("deformable_detr"), copy.deepcopy(dense), PKD()).train()
    assert distiller([*batch_of()["pixel_values"]], targets)["kd_pkd"] > 0


def test_objects_of_unlabelled_images_are_the_teachers():
    distiller = distiller_of("rt_detr", FGD(), unlabelled_threshold=0.05, prove=False)
    losses = distiller(pixel_values=batch_of()["pixel_values"])
    assert set(losses) == {"kd_fgd_focal", "kd_fgd_attention", "kd_fgd_global"}


def test_detections_are_the_students():
    distiller = distiller_of("d_fine").eval()
    inputs = batch_of()
    with torch.no_grad():
        output, alone = distiller(**inputs), distiller.student(**inputs)
    assert torch.equal(output.logits, alone.logits)
    assert output.loss > 0
    assert type(output) is type(alone)


def test_a_trainer_trains_it_and_the_student_is_saved_as_a_plain_model(tmp_path):
    """A D-FINE: two names share the weights of its predictors."""
    package("accelerate")
    from transformers import AutoModelForObjectDetection, Trainer, TrainingArguments

    class DistillationTrainer(Trainer):  # as docs/transformers.md has it
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            outputs = model(**inputs)
            loss = sum(outputs.values()) if model.training else outputs.loss
            return (loss, outputs) if return_outputs else loss

        def save_model(self, output_dir=None, _internal_call=False):
            if self.args.should_save:
                folder = Path(output_dir or self.args.output_dir)
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(self.model.state_dict(), folder / "pytorch_model.bin")

    def collated(items):
        pixels = torch.stack([item["pixel_values"][0] for item in items])
        return {"pixel_values": pixels, "labels": [item["labels"][0] for item in items]}

    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, save_steps=2, per_device_train_batch_size=2, report_to=[],
        gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=3, label_names=["labels"],
        remove_unused_columns=False, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    images, weights = [batch_of(1, seed=seed) for seed in range(4)], []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        distiller = distiller_of("d_fine", prove=False)
        trainer = DistillationTrainer(
            model=distiller,
            args=settings,
            train_dataset=images,
            eval_dataset=images[:2],
            data_collator=collated,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        weights.append({name: value.clone() for name, value in distiller.state_dict().items()})
        assert trainer.state.log_history[-2]["eval_loss"] > 0
    predictor = "model.decoder.bbox_embed.0.layers.0.weight"
    assert not torch.equal(weights[0][f"student.{predictor}"], detector_of("d_fine").get_parameter(predictor))
    for name, value in weights[0].items():  # a run that was stopped goes on as it would have
        torch.testing.assert_close(weights[1][name], value)
    distiller.student.save_pretrained(tmp_path / "student")
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path / "student")
    assert type(loaded) is type(distiller.student)
    with torch.no_grad():
        outputs = [model.eval()(**batch_of()).logits for model in (loaded, distiller.student)]
    assert torch.equal(*outputs)


def test_copied_pickled_and_left_as_they_were():
    teacher = detector_of("detr", seed=1)
    before = copy.deepcopy(teacher.state_dict())
    distiller = Distiller(teacher, detector_of("detr"), PKD()).train()
    found = []
    for twin in (distiller, copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        torch.manual_seed(0)
        found.append(twin(**batch_of())["kd_pkd"])
    assert found[0] > 0
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    after = teacher.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(module._forward_hooks for module in distiller.teacher.modules())


@pytest.fixture(scope="module")
def strict() -> Distiller:
    """For calls that are refused before anything runs."""
    return distiller_of("detr")


@pytest.mark.parametrize(("changed", "message"), [
    ({"labels": [{"class_labels": torch.tensor([3]), "boxes": torch.rand(1, 4)}] * 2}, "3 to 3.*3 classes"),
    ({"labels": [{"class_labels": torch.tensor([0]), "boxes": 60 * torch.ones(1, 4)}] * 2}, "reach 60"),
    ({"labels": [{"class_labels": torch.tensor([0]), "boxes": torch.rand(2, 4)}] * 2}, r"\(1, 4\).*\(2, 4\)"),
    ({"labels": [{"labels": torch.tensor([0]), "boxes": torch.rand(1, 4)}] * 2}, r"\['boxes', 'labels'\]"),
    ({"labels": batch_of()["labels"][:1]}, "2 images but labels of 1"),
    ({"labels": batch_of()["labels"][0]}, "labels must be a list of dicts.*got a dict"),
    ({"labels": torch.zeros(2)}, "labels must be a list of dicts.*got a Tensor"),
    ({"pixel_values": torch.rand(3, 64, 64)}, r"\(batch, channels, height, width\).* got \(3, 64, 64\)"),
    ({"pixel_values": torch.rand(0, 3, 64, 64), "labels": []}, r"an image or more, got \(0, 3, 64, 64\)"),
    ({"pixel_values": [1]}, "got list"),
    ({"pixel_mask": torch.ones(2, 32, 32)}, r"\(2, 32, 32\)"),
    ({"images_": 1}, r"\['images_'\]"),
])  # fmt: skip
def test_batches_that_are_not_the_librarys(strict, changed, message):
    with pytest.raises(ValueError, match=message):
        strict(**{**batch_of(), **changed})


def test_calls_that_mix_two_forms(strict):
    inputs = batch_of()
    with pytest.raises(TypeError, match="beside the keywords"):
        strict(inputs["pixel_values"], labels=inputs["labels"])
    with pytest.raises(ValueError, match="labels stand among the images"):
        strict(inputs)
    with pytest.raises(TypeError, match="RetinaNet is called with images and targets"):
        Distiller(tiny_retinanet(seed=1), tiny_retinanet(), PKD()).train()(**inputs)


def test_methods_of_rows_are_refused_and_say_what_to_take_instead():
    teacher, student = detector_of("detr", seed=1), detector_of("detr")
    for method in (CrossKD(), PredictionMimicking(), ResponseDistillation(), BCKD(), LD()):
        with pytest.raises(ValueError, match="set of queries in no order.*QueryDistillation"):
            Distiller(teacher, student, method)


def test_other_models_of_the_library():
    from transformers import ResNetConfig, ResNetForImageClassification

    small = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    with pytest.raises(TypeError, match="none of the detectors that this adapter knows.*backbone"):
        find_adapter(small)
    with pytest.raises(ValueError, match='"encoder" or "backbone", got \'neck\''):
        TransformersDetr(detector_of("detr"), maps="neck")


def test_a_detector_that_answers_with_tuples_is_refused():
    with pytest.raises(ValueError, match="return_dict"):
        TransformersDetr(detector_of("detr", return_dict=False))


def test_names_that_nobody_gave_are_none():
    student = detector_of("rt_detr", id2label={0: "a", 1: "b", 2: "c"})
    unnamed = detector_of("rt_detr", seed=1)
    assert find_adapter(unnamed).heads[0].class_names is None
    assert find_adapter(student).heads[0].class_names == ("a", "b", "c")
    Distiller(unnamed, student, MatchedQueries())


def test_plain_maps_need_no_batch():
    adapter = TransformersDetr(detector_of("detr").eval())
    pixels = batch_of()["pixel_values"]
    with torch.no_grad():
        (found,) = adapter.maps(pixels)
        (again,) = adapter.maps_of(adapter.take(Batch(pixels, ((SIZE, SIZE),) * 2)))
    assert found.shape == (2, 32, 4, 4)
    assert torch.equal(found, again)


def test_a_detector_without_auxiliary_losses_predicts_at_one_layer():
    head = find_adapter(detector_of("detr", auxiliary_loss=False)).heads[0]
    assert isinstance(head, DecoderHead)
    assert head.num_layers == 1
