"""Teachers without a head: plain backbones, feature pyramids, vision transformers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18, vgg11, vit_b_16
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.feature_extraction import create_feature_extractor

from crosskd import PKD, CrossKD, Distiller
from crosskd.adapters import Batch, PixelCoding, backbone, find_adapter
from crosskd.losses import pkd_loss
from tests.helpers.packages import package
from tests.helpers.tiny import tiny_batch, tiny_retinanet

IMAGENET = PixelCoding((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a step must leave as it is: numbers, modes, gradients, hooks."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    now = state_of(model)
    assert all(torch.equal(value, now["state"][name]) for name, value in before.pop("state").items())
    assert all(now[name] == value for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def distiller_of(model: nn.Module, spec: backbone, student: Any = None, **options: Any) -> Distiller:
    student = tiny_retinanet(seed=1) if student is None else student
    return Distiller(model, student, PKD(weight=1.0, **options), teacher_adapter=spec)


def from_timm(name: str, **options: Any) -> nn.Module:
    return package("timm").create_model(name, pretrained=False, **options)


def vit(**options: Any) -> nn.Module:
    options = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 16, **options}
    return package("timm").models.VisionTransformer(**options)


class Names:
    """Builds each kind of teacher, and its adapter's spec."""

    LAYERS = ("layer2", "layer3", "layer4")

    @staticmethod
    def layers():
        return resnet18(), backbone(layers=Names.LAYERS)

    @staticmethod
    def extractor():
        nodes = {"layer2": "fine", "layer3": "coarse"}
        return create_feature_extractor(resnet18(), nodes), backbone()

    @staticmethod
    def pyramid():
        return resnet_fpn_backbone(backbone_name="resnet18", weights=None), backbone()

    @staticmethod
    def features_only():
        return from_timm("test_resnet", features_only=True), backbone()

    @staticmethod
    def timm_layers():
        return from_timm("test_resnet"), backbone(layers=("layer3", "layer4"))

    @staticmethod
    def tokens():
        return vit(img_size=64), backbone(layers=("blocks.0", "blocks.1"), image_size=64)

    @staticmethod
    def swin():
        timm = package("timm")
        model = timm.models.SwinTransformer(
            img_size=64, patch_size=4, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 1, 1), window_size=4
        )
        layers = ("layers.1", "layers.2")
        return model, backbone(layers=layers, image_size=64, channels_last=True)


KINDS = {
    "layers": ((8.0, 16.0, 32.0), (128, 256, 512)),
    "extractor": ((8.0, 16.0), (128, 256)),
    "pyramid": ((4.0, 8.0, 16.0, 32.0, 64.0), (256,) * 5),
    "features_only": ((2.0, 4.0, 8.0, 16.0, 32.0), (32, 32, 48, 192, 96)),
    "timm_layers": ((16.0, 32.0), (192, 96)),
    "tokens": ((16.0, 16.0), (16, 16)),
    "swin": ((8.0, 16.0), (16, 32)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_teaches_a_retinanet_and_stays_as_it_is(kind):
    model, spec = getattr(Names, kind)()
    assert model.training
    before = state_of(model)
    student = tiny_retinanet(seed=1)
    distiller = distiller_of(model, spec, student)
    adapter = distiller.teacher_adapter
    assert (adapter.strides, adapter.widths, adapter.heads) == (*KINDS[kind], ())
    losses = distiller(*tiny_batch())
    assert sorted(losses) == ["bbox_regression", "classification", "kd_pkd"]
    losses["kd_pkd"].backward()
    assert student.backbone.stem[0][0].weight.grad.abs().max() > 0
    assert_unchanged(model, before)
    assert_unchanged(distiller.teacher, {**state_of(distiller.teacher), "state": state_of(model)["state"]})
    assert not any("teacher" in name for name in distiller.state_dict())
    for twin in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        twin.teacher.eval()  # a copy of torch.fx's modules forgets its mode
        torch.testing.assert_close(twin(*tiny_batch()), distiller(*tiny_batch()))


def test_the_loss_of_layers_by_hand():
    """The student's pixels, coded as the backbone's; each layer against the level of its stride."""
    model, student = resnet18(), tiny_retinanet(seed=1)
    distiller = distiller_of(model, backbone(layers=("layer2", "layer3")), student)
    images, targets = tiny_batch()
    losses = distiller(images, targets)
    batch = student.transform(images)[0].tensors
    found = list(student.backbone(batch).values())[:2]
    model.eval()
    with torch.no_grad():
        stem = model.maxpool(model.relu(model.bn1(model.conv1(batch))))
        fine = model.layer2(model.layer1(stem))
        wanted = fine, model.layer3(fine)
    projections = distiller.methods["pkd"].projections
    expected = sum(
        pkd_loss(projections[f"level{level}"](ours), theirs)
        for level, (ours, theirs) in enumerate(zip(found, wanted, strict=True))
    )
    torch.testing.assert_close(losses["kd_pkd"], expected)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_tokens_are_folded_row_by_row(prefix, size):
    options = {0: {"class_token": False, "global_pool": "avg"}, 1: {}, 5: {"reg_tokens": 4}}[prefix]
    model = vit(img_size=64, dynamic_img_size=True, **options).eval()
    adapter = backbone(layers=("blocks.1",), image_size=64)(model)
    assert adapter.prefix_tokens == prefix
    pixels = torch.rand(2, 3, *size)
    (found,) = adapter.maps(pixels)
    tokens = []
    with torch.no_grad():
        handle = model.blocks[1].register_forward_hook(lambda _, __, output: tokens.append(output))
        model(pixels)
        handle.remove()
    assert tokens[0].shape == (2, prefix + size[0] * size[1] // 256, 16)
    assert found.shape == (2, 16, size[0] // 16, size[1] // 16)
    for row in range(found.shape[2]):
        for column in range(found.shape[3]):
            token = tokens[0][:, prefix + row * found.shape[3] + column]
            assert torch.equal(found[:, :, row, column], token)
    # What a place shows is what is there: the patches' own embeddings.
    embedded = backbone(layers=("patch_embed",), image_size=64, prefix_tokens=0)(vit(img_size=64).eval())
    pixels = torch.rand(1, 3, 64, 64)
    by_convolution = embedded.detector.patch_embed.proj(pixels)
    torch.testing.assert_close(embedded.maps(pixels)[0], by_convolution)


def test_torchvisions_vision_transformer():
    model = vit_b_16()
    model.encoder.layers = model.encoder.layers[:1]
    with pytest.raises(ValueError, match=r"Transformer failed on an image of \(256, 256\).* image_size="):
        backbone(layers=("encoder",))(model)
    with pytest.raises(ValueError, match=r"makes \(1, 197, 768\) .* \(224, 224\).* prefix_tokens="):
        backbone(layers=("encoder",), image_size=224)(model)
    adapter = backbone(layers=("encoder",), image_size=224, prefix_tokens=1)(model)
    assert (adapter.strides, adapter.widths) == ((16.0,), (768,))


def test_input_of_another_size_is_resized_for_a_model_of_one_size():
    model, images = vit(img_size=32), tiny_batch()
    with pytest.raises(ValueError, match=r"failed on an image of \(256, 256\) pixels"):
        backbone(layers=("blocks.1",))(model)
    spec = backbone(layers=("blocks.1",), image_size=32, resize_input=True)
    distiller = distiller_of(model, spec, resize=True)
    assert distiller(*images)["kd_pkd"] > 0
    (found,) = distiller.teacher_adapter.maps(torch.rand(2, 3, 48, 64))
    assert found.shape == (2, 16, 2, 2)
    with pytest.raises(ValueError, match=r"differ in size: \(2, 2\) \(teacher\), \(4, \d\) \(student\)"):
        distiller_of(model, spec)(*images)
    # timm knows the size itself.
    known = from_timm("test_vit")
    assert backbone(layers=("blocks.0",))(known).image_size == (160, 160)


def test_tokens_of_an_image_that_was_not_foreseen():
    class Cropping(nn.Module):
        """Looks at no more than 64 x 64 pixels."""

        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 16, 16)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.patches(pixels[..., :64, :64]).flatten(2).mT

    adapter = backbone(image_size=64)(Cropping())
    assert adapter.maps(torch.rand(1, 3, 64, 48))[0].shape == (1, 8, 4, 3)
    with pytest.raises(ValueError, match=r"16 tokens .* of \(64, 96\) pixels.* of 16: .* resize_input"):
        adapter.maps(torch.rand(1, 3, 64, 96))


def test_pixels_are_coded_as_the_backbone_knows_them():
    assert backbone(layers=("layer1",))(resnet18()).pixel_coding == IMAGENET
    half = PixelCoding((0.5,) * 3, (0.5,) * 3)
    model = from_timm("test_vit")
    assert backbone(layers=("blocks.0",))(model).pixel_coding == half
    assert backbone(layers=("layer1",), pixel_coding=half)(resnet18()).pixel_coding == half
    images = torch.rand(2, 3, 64, 64)
    batch = backbone(layers=("layer1",))(resnet18()).prepare(list(images), None)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET.mean, IMAGENET.std))
    torch.testing.assert_close(batch.pixels, (images - mean) / std)
    assert batch.image_sizes == ((64, 64), (64, 64))


def test_a_view_of_the_teachers_own():
    """Is prepared by itself: of the student's own images it is what the student's batch gives."""
    model, student = resnet18(), tiny_retinanet(seed=1)
    images, targets = torch.rand(2, 3, 64, 64), tiny_batch()[1]
    spec = backbone(layers=("layer2", "layer3"))
    losses = []
    for view in (None, lambda images, targets: images, lambda images, targets: torch.stack(images).flip(3)):
        torch.manual_seed(0)  # of the projections
        distiller = Distiller(model, student, PKD(), teacher_adapter=spec, teacher_view=view)
        losses.append(distiller(list(images), targets)["kd_pkd"])
    torch.testing.assert_close(losses[0], losses[1])
    assert abs(losses[0] - losses[2]) > 1e-3


def test_a_student_needs_a_head_and_crosskd_a_teachers():
    spec = backbone(layers=("layer2",))
    with pytest.raises(TypeError, match="student: a ResNet without a head can only be a teacher"):
        Distiller(resnet18(), resnet18(), PKD(), spec)
    with pytest.raises(ValueError, match=r"teacher, a ResNet, has no head\. Choose a method of f"):
        Distiller(resnet18(), tiny_retinanet(), CrossKD(), teacher_adapter=spec)


def test_the_library_names_it_for_what_no_adapter_understands():
    with pytest.raises(TypeError, match=r"no adapter understands a ResNet.*adapters.backbone\(\)"):
        find_adapter(resnet18())


class Two(nn.Module):
    """A layer that gives two things."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.MultiheadAttention(3, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.both(*[pixels.flatten(2)[0].mT] * 3)[0]


@pytest.mark.parametrize(
    ("model", "spec", "message"),
    [
        (resnet18, {}, r"ResNet gives \(1, 1000\), no map .* name layers="),
        (resnet18, {"layers": ("layer5",)}, r"no layer 'layer5' in ResNet, but \['conv1', .* 'layer4', 'av"),
        (resnet18, {"layers": ("layer3", "layer2")}, r"strides \[16.0, 8.0\]: name the finest first"),
        (resnet18, {"layers": ("avgpool",), "channels_last": True}, r"ResNet makes \(1, 512, 1, 1\)"),
        (Two, {"layers": ("both",), "image_size": 8}, "layer both gives a tuple, no tensor"),
        (vgg11, {"layers": ("features.3",)}, "layer features.3 were overwritten in place by a later layer"),
        (
            lambda: Names.swin()[0],
            {"layers": ("layers.1",), "image_size": 64},
            r"makes \(1, 8, 8, 16\) .* \(64, 64\) .* channels_last=True",
        ),
    ],
)
def test_what_is_no_map_is_refused(model, spec, message):
    with pytest.raises(ValueError, match=message):
        backbone(**spec)(model())


@pytest.mark.slow
def test_compiled_steps_have_the_same_losses():
    distiller = distiller_of(resnet18(), backbone(layers=("layer2", "layer3")))
    expected = distiller(*tiny_batch())
    found = torch.compile(distiller, backend="eager")(*tiny_batch())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_own_outputs_are_none():
    adapter = backbone(layers=("layer2",))(resnet18())
    assert adapter.own_outputs(Batch(torch.rand(1, 3, 64, 64), ((64, 64),))) == []
