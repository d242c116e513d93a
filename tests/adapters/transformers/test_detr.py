"""The adapter on the detection transformers of `transformers`, with random weights."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection import retinanet_resnet50_fpn

from crosskd import CWD, FGD, MGD, PKD, CosineAlignment, CrossKD, Distiller, FeatureImitation
from crosskd.adapters import find_adapter
from crosskd.adapters.base import Batch, DecoderHead
from crosskd.adapters.transformers import TransformersDetr
from tests.helpers.detr import CLASSES, KINDS, SIZE, batch_of, detector_of

pytestmark = pytest.mark.transformers


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


MAP_METHODS = (PKD, CWD, FGD, MGD, partial(FeatureImitation, weight=1.0), CosineAlignment)


def distiller_of(kind: str, method: Any = None, **options: Any) -> Distiller:
    teacher = detector_of(kind, 64, seed=1, layers=3, queries=12).eval()
    return Distiller(teacher, detector_of(kind), method or PKD(), **options).train()


def own_part(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(loss for name, loss in losses.items() if not name.startswith("kd_"))  # type: ignore[return-value]


def test_levels_and_queries_are_read_off(kind):
    adapter = find_adapter(detector_of(kind, queries=11))
    head = adapter.heads[0]
    assert isinstance(head, DecoderHead)
    assert (head.rows, head.width, head.num_queries, head.num_layers) == ("queries", 32, 11, 2)
    strides = {"rt": (8, 16, 32), "d_": (8, 16, 32), "de": (8, 16, 32, 64), "tw": (8, 16, 32, 64)}
    assert adapter.strides == ((32,) if kind in ("detr", "conditional_detr") else strides[kind[:2]])
    assert set(adapter.widths) == {32}
    assert head.num_classes == CLASSES + (kind == "detr")
    assert head.background == (CLASSES if kind == "detr" else None)
    backbone = TransformersDetr(detector_of(kind), maps="backbone")
    assert backbone.strides[-1] == 32


def test_own_losses_are_those_of_plain_training_to_the_bit(kind):
    alone = detector_of(kind).train()
    together = distiller_of(kind, prove=False)
    for step in range(2):
        torch.manual_seed(step)
        expected = alone(**batch_of(seed=step)).loss
        torch.manual_seed(step)
        losses = together(**batch_of(seed=step))
        assert torch.equal(own_part(losses), expected)
        if kind in ("rt_detr", "rt_detr_v2", "d_fine"):
            assert "loss_bbox_dn_0" in losses  # denoising is on
        expected.backward()
        own_part(losses).backward()
    for name, parameter in alone.named_parameters():
        gradient = together.student.get_parameter(name).grad
        assert (gradient is None) == (parameter.grad is None)
        if gradient is not None:
            assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-5), name


def test_the_proof_runs_on_the_first_step(kind):
    distiller = distiller_of(kind)
    distiller(**batch_of())
    assert distiller._proved == {"student", "teacher"}


def test_a_loss_of_the_detectors_own_is_found_out():
    distiller = distiller_of("rt_detr")
    own = distiller.student.loss_function

    def doubled(*arguments, **options):
        loss, parts, auxiliary = own(*arguments, **options)
        return 2 * loss, parts, auxiliary

    distiller.student.loss_function = doubled
    with pytest.raises(ValueError, match="the sum of the losses is"):
        distiller(**batch_of())


def test_the_decoder_answers_its_own_queries_as_before(kind):
    adapter = find_adapter(detector_of(kind).eval())
    head = adapter.heads[0]
    with torch.no_grad():
        batch = adapter.prepare(batch_of()["pixel_values"], None)
        adapter.maps_of(batch)
        layers, own = head.run(batch, head.own_queries(batch)), head.own_predictions(batch)
        assert len(layers) == 2
        torch.testing.assert_close(layers[-1].predictions.logits, own.logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layers[-1].predictions.regression, own.regression, atol=1e-5, rtol=1e-4)
        # A state of the first layer that is handed in goes on to the last.
        changed = head.run(batch, head.own_queries(batch), {0: layers[0].state.flip(-1)})
        assert not torch.allclose(changed[-1].predictions.logits, own.logits)
    output = adapter.detector(pixel_values=batch.pixels)
    torch.testing.assert_close(own.logits, output.logits)


def test_boxes_are_in_pixels_of_the_batch():
    adapter = find_adapter(detector_of("rt_detr"))
    batch = adapter.prepare(images=batch_of()["pixel_values"], targets=batch_of()["labels"])
    boxes = batch_of()["labels"][0]["boxes"] * SIZE
    torch.testing.assert_close(batch.objects[0].boxes[:, :2], boxes[:, :2] - boxes[:, 2:] / 2)
    torch.testing.assert_close(batch.objects[0].boxes[:, 2:], boxes[:, :2] + boxes[:, 2:] / 2)


def test_maps_of_padded_images(kind):
    inputs = batch_of()
    mask = torch.ones(2, SIZE, SIZE, dtype=torch.long)
    mask[1, :, 48:] = 0
    distiller = distiller_of(kind)
    losses = distiller(**inputs, pixel_mask=mask)
    assert all(loss.isfinite() for loss in losses.values())
    batch = distiller.student_adapter.prepare({**inputs, "pixel_mask": mask}, inputs["labels"])
    assert batch.image_sizes == ((SIZE, SIZE), (SIZE, 48))
    seen = distiller.teacher_batch(batch, None, None)
    assert torch.equal(seen.extra.mask, mask)


@pytest.mark.parametrize("method", MAP_METHODS)
@pytest.mark.parametrize("which", ["encoder", "backbone"])
def test_methods_of_feature_maps(method, which):
    spec = partial(TransformersDetr, maps=which)
    distiller = distiller_of("rt_detr", method(), adapter=spec)
    losses = distiller(**batch_of())
    sum(loss for name, loss in losses.items() if name.startswith("kd_")).backward()
    reached = [
        name for name, p in distiller.student.named_parameters() if p.grad is not None and p.grad.any()
    ]
    assert any(name.startswith("model.backbone") for name in reached)
    assert any(name.startswith("model.encoder") for name in reached) == (which == "encoder")
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())


def test_the_gradient_at_maps_is_all_that_reaches_the_encoder():
    # CosineAlignment measures the gradient of all other losses at the maps.
    method = CosineAlignment(gradient_share=0.3)
    for kind in ("rt_detr", "deformable_detr", "detr"):
        distiller = distiller_of(kind, method)
        for _ in range(2):
            sum(distiller(**batch_of()).values()).backward()
        assert distiller.methods["cosine"].balance.factor != 1


def test_a_dense_teacher_and_a_dense_student():
    dense = retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=SIZE, max_size=SIZE
    )
    losses = Distiller(dense.eval(), detector_of("deformable_detr"), PKD()).train()(**batch_of())
    assert losses["kd_pkd"] > 0
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}] * 2
    losses = Distiller(detector_of("deformable_detr").eval(), dense, PKD()).train()(
        list(batch_of()["pixel_values"]), targets
    )
    assert losses["kd_pkd"] > 0


def test_objects_of_unlabelled_images_are_the_teachers():
    distiller = distiller_of("rt_detr", FGD(), unlabelled_threshold=0.05)
    losses = distiller(pixel_values=batch_of()["pixel_values"])
    assert set(losses) == {"kd_fgd_focal", "kd_fgd_attention", "kd_fgd_global"}


def test_images_without_objects(kind):
    inputs = batch_of()
    for of_image in inputs["labels"]:
        of_image["class_labels"], of_image["boxes"] = torch.zeros(0, dtype=torch.long), torch.zeros(0, 4)
    losses = distiller_of(kind)(**inputs)
    assert all(loss.isfinite() for loss in losses.values())


def test_detections_are_the_students():
    distiller = distiller_of("d_fine").eval()
    inputs = batch_of()
    with torch.no_grad():
        output, alone = distiller(**inputs), distiller.student(**inputs)
    assert torch.equal(output.logits, alone.logits)
    assert output.loss > 0
    assert type(output) is type(alone)


def test_the_student_is_saved_as_a_plain_model(tmp_path):
    distiller = distiller_of("rt_detr")
    sum(distiller(**batch_of()).values()).backward()
    distiller.student.save_pretrained(tmp_path)
    loaded = type(distiller.student).from_pretrained(tmp_path)
    for name, parameter in distiller.student.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)


def test_copied_pickled_and_left_as_they_were(kind):
    teacher = detector_of(kind, seed=1).eval()
    before = copy.deepcopy(teacher.state_dict())
    distiller = Distiller(teacher, detector_of(kind), PKD()).train()
    torch.manual_seed(0)
    expected = distiller(**batch_of())
    for twin in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        torch.manual_seed(0)
        assert twin(**batch_of())["kd_pkd"] > 0
    assert expected["kd_pkd"] > 0
    after = teacher.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(module._forward_hooks for module in teacher.modules())


@pytest.mark.parametrize(("changed", "message"), [
    ({"labels": [{"class_labels": torch.tensor([3]), "boxes": torch.rand(1, 4)}] * 2}, "3 to 3.*3 classes"),
    ({"labels": [{"class_labels": torch.tensor([0]), "boxes": 60 * torch.ones(1, 4)}] * 2}, "reach 60"),
    ({"labels": [{"labels": torch.tensor([0]), "boxes": torch.rand(1, 4)}] * 2}, r"\['boxes', 'labels'\]"),
    ({"labels": batch_of()["labels"][:1]}, "2 images but labels of 1"),
    ({"pixel_values": torch.rand(3, 64, 64)}, r"\(batch, channels, height, width\), got \(3, 64, 64\)"),
    ({"pixel_mask": torch.ones(2, 32, 32)}, r"\(2, 32, 32\)"),
    ({"images_": 1}, r"\['images_'\]"),
])  # fmt: skip
def test_batches_that_are_not_the_librarys(changed, message):
    with pytest.raises(ValueError, match=message):
        distiller_of("rt_detr")(**{**batch_of(), **changed})


def test_calls_that_mix_two_forms():
    distiller, inputs = distiller_of("rt_detr"), batch_of()
    with pytest.raises(TypeError, match="beside the keywords"):
        distiller(inputs["pixel_values"], labels=inputs["labels"])
    with pytest.raises(ValueError, match="labels stand among the images"):
        distiller(inputs)
    dense = retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=SIZE, max_size=SIZE
    )
    with pytest.raises(TypeError, match="RetinaNet is called with images and targets"):
        Distiller(copy.deepcopy(dense), dense, PKD()).train()(**inputs)


def test_methods_of_rows_are_refused_and_say_what_to_take_instead():
    with pytest.raises(ValueError, match="QueryDistillation"):
        distiller_of("rt_detr", CrossKD())


def test_other_models_of_the_library():
    from transformers import ResNetConfig, ResNetForImageClassification

    small = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    with pytest.raises(ValueError, match="none of the detectors that this adapter knows"):
        find_adapter(small)
    with pytest.raises(ValueError, match='"encoder" or "backbone", got "neck"'.replace('"neck"', "'neck'")):
        TransformersDetr(detector_of("detr"), maps="neck")


def test_plain_maps_need_no_batch():
    adapter = TransformersDetr(detector_of("detr").eval())
    pixels = batch_of()["pixel_values"]
    with torch.no_grad():
        (found,) = adapter.maps(pixels)
        (again,) = adapter.maps_of(adapter.take(Batch(pixels, ((SIZE, SIZE),) * 2)))
    assert found.shape == (2, 32, 2, 2)
    assert torch.equal(found, again)


def test_compiled_steps_give_the_same_losses():
    torch._dynamo.reset()
    eager, other = distiller_of("rt_detr"), distiller_of("rt_detr")
    compiled = torch.compile(other, backend="eager")
    for step in range(2):
        torch.manual_seed(step)
        expected = eager(**batch_of())
        torch.manual_seed(step)
        losses = compiled(**batch_of())
        for name, loss in expected.items():
            assert torch.allclose(losses[name], loss, rtol=1e-5), name
    torch._dynamo.reset()


def test_a_detector_without_auxiliary_losses_predicts_at_one_layer():
    head = find_adapter(detector_of("detr", auxiliary_loss=False)).heads[0]
    assert isinstance(head, DecoderHead)
    assert head.num_layers == 1
    assert isinstance(head.detector, nn.Module)
