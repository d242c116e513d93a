"""mmdet's weights in the plain detectors: the numbers of mmdet itself, and what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_heads import ATSS, GFL, load_mmdet_checkpoint
from dense_heads.mmdet_weights import mmdet_name
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.examples.mmdet_state import CLASSES, mmdet_state

DETECTORS = [("gfl", 18), ("gfl", 50), ("atss", 18), ("atss", 50)]
# Three sizes, none of which needs resizing; the last image shows no object.
SIZES = [(96, 128), (128, 96), (96, 96)]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


# -- the real detectors ---------------------------------------------------------------------------


def build_in_mmdet(family: str, depth: int) -> Any:
    """mmdet's published config with another ResNet and fewer classes, weights and statistics random."""
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules()
    folder = Path(mmdet.__file__).parent / ".mim" / "configs" / family
    config = Config.fromfile(folder / f"{family}_r50_fpn_1x_coco.py").model
    widths = [64, 128, 256, 512] if depth < 50 else [256, 512, 1024, 2048]
    config.backbone.update(depth=depth, init_cfg=None)
    config.neck.in_channels, config.bbox_head.num_classes = widths, CLASSES
    detector = MODELS.build(config)
    detector.init_weights()
    liven(detector)
    return detector.train()  # which puts its batch norm into eval mode


def liven(detector: nn.Module) -> None:
    """Normalisation as training leaves it, and predictions that differ from place to place."""
    for name, module in detector.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            module.num_batches_tracked.fill_(1000)
        if name.startswith("bbox_head.scales."):
            nn.init.uniform_(module.scale, 0.5, 1.5)
        if name.startswith(("bbox_head.gfl_", "bbox_head.atss_")):
            nn.init.normal_(module.weight, std=0.03)
    head = detector.bbox_head
    nn.init.normal_((head.gfl_cls if hasattr(head, "gfl_cls") else head.atss_cls).bias, mean=-2.0)


def save_as_mmdet_does(detector: nn.Module, folder: Path) -> Path:
    """A checkpoint of mmengine's Runner, after a step, with everything that it keeps for resuming."""
    from mmengine.optim import OptimWrapper
    from mmengine.runner import Runner

    optimizer = torch.optim.SGD(detector.parameters(), lr=0.0, momentum=0.9)
    runner = Runner(
        detector,
        str(folder),
        train_dataloader=DataLoader([]),
        train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper=OptimWrapper(optimizer),
        experiment_name=folder.name,
        default_scope="mmdet",
    )
    runner.message_hub.update_scalar("train/loss", 0.5)
    runner.message_hub.update_info("best_score", torch.tensor(0.25))
    sum(parameter.sum() for parameter in detector.parameters() if parameter.requires_grad).backward()
    optimizer.step()
    optimizer.zero_grad()
    runner.save_checkpoint(str(folder), "epoch_1.pth")
    with pytest.raises(pickle.UnpicklingError):  # it holds more than weights
        torch.load(folder / "epoch_1.pth", weights_only=True)
    return folder / "epoch_1.pth"


def some_batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images of whole bytes, shape (3, height, width), RGB from 0 to 255, and targets."""
    images, targets = [], []
    for number, (height, width) in enumerate(SIZES):
        images.append(torch.randint(256, (3, height, width)).float())
        count = 3 if number < 2 else 0
        corner = torch.rand(count, 2) * torch.tensor([width, height]) / 2
        extent = 12 + torch.rand(count, 2) * (torch.tensor([width, height]) / 2 - 12)
        boxes = torch.cat([corner, corner + extent], dim=1)
        targets.append({"boxes": boxes, "labels": torch.randint(CLASSES, (count,))})
    return images, targets


def as_mmdet_takes_it(detector: Any, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Any:
    """The same batch after mmdet's own preprocessing."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    samples = []
    for image, target in zip(images, targets, strict=True):
        shape = tuple(image.shape[1:])
        sample = DetDataSample(metainfo={"img_shape": shape, "ori_shape": shape, "scale_factor": (1.0, 1.0)})
        sample.gt_instances = InstanceData(bboxes=target["boxes"], labels=target["labels"])
        samples.append(sample)
    bgr = [image.flip(0).byte() for image in images]
    data = detector.data_preprocessor({"inputs": bgr, "data_samples": samples}, True)
    return data["inputs"], data["data_samples"]


@pytest.fixture(scope="module", params=DETECTORS, ids=lambda detector: f"{detector[0]}_r{detector[1]}")
def pair(request, tmp_path_factory) -> tuple[Any, Any, Any]:
    """The real detector, the same here, and a batch in both forms."""
    torch.manual_seed(0)
    family, depth = request.param
    theirs = build_in_mmdet(family, depth)
    path = save_as_mmdet_does(theirs, tmp_path_factory.mktemp(f"{family}_r{depth}"))
    ours = load_mmdet_checkpoint(path, min_size=96)
    images, targets = some_batch()
    inputs, samples = as_mmdet_takes_it(theirs, images, targets)
    return (theirs, inputs, samples), (ours, [image / 255 for image in images], targets), family


def flat(levels: list[Tensor]) -> Tensor:
    return torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in levels], dim=1)


@pytest.mark.mmdet
class TestAgainstMmdet:
    def test_what_is_read_from_the_file(self, pair):
        (theirs, *_), (ours, *_), family = pair
        assert type(ours) is {"gfl": GFL, "atss": ATSS}[family]
        assert ours.num_classes == CLASSES
        trained = {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}
        here = {mmdet_name(name, family) for name, p in ours.named_parameters() if p.requires_grad}
        assert here == trained

    @torch.no_grad()
    def test_predictions_and_boxes_agree(self, pair):
        (theirs, inputs, _), (ours, images, targets), family = pair
        batch, _ = ours.transform(images, targets)
        features = list(ours.backbone(batch.tensors).values())
        outputs, grid = ours.head(features), ours.grid(batch, features)
        logits, regression, *centerness = map(flat, theirs(inputs, mode="tensor"))
        assert logits.std() > 0.3
        torch.testing.assert_close(outputs.logits, logits, **TOLERANCE)
        torch.testing.assert_close(outputs.regression.flatten(2), regression, **TOLERANCE)
        if family == "atss":
            torch.testing.assert_close(outputs.centerness, centerness[0].squeeze(-1), **TOLERANCE)

        head = theirs.bbox_head
        sizes = [feature.shape[-2:] for feature in features]
        priors = torch.cat(head.prior_generator.grid_priors(sizes, device="cpu"))
        torch.testing.assert_close(grid.anchors, priors, rtol=0, atol=0)
        for image, boxes in enumerate(ours.decode(outputs.regression, grid)):
            if family == "gfl":
                distances = head.integral(regression[image]) * grid.strides[:, None]
                expected = head.bbox_coder.decode(head.anchor_center(priors), distances)
            else:
                expected = head.bbox_coder.decode(priors, regression[image])
            torch.testing.assert_close(boxes, expected, rtol=1e-4, atol=1e-3)

    def test_losses_and_gradients_agree(self, pair):
        """In float64 and of equal pixels: rounding to float32 moves features over a ReLU's edge."""
        (theirs, rounded, samples), (ours, images, targets), family = copy.deepcopy(pair)
        theirs, ours = theirs.double(), ours.double()
        images = [image.double() for image in images]
        inputs = ours.transform(images)[0].tensors
        torch.testing.assert_close(inputs.float(), rounded, **TOLERANCE)
        names = {"loss_cls": "classification", "loss_bbox": "bbox_regression"}
        names |= {"gfl": {"loss_dfl": "distribution"}, "atss": {"loss_centerness": "bbox_ctrness"}}[family]
        expected = {names[name]: sum(values) for name, values in theirs.train().loss(inputs, samples).items()}
        losses = ours.train()(images, targets)
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            assert losses[name].item() == pytest.approx(value.item(), rel=1e-4), name
        sum(expected.values()).backward()
        sum(losses.values()).backward()
        gradients = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                wanted = gradients[mmdet_name(name, family)].grad
                assert (parameter.grad - wanted).norm() <= 1e-4 * wanted.norm(), name

    @torch.no_grad()
    def test_detections_agree(self, pair):
        (theirs, inputs, samples), (ours, images, _), _ = pair
        expected = [sample.pred_instances for sample in theirs.eval().predict(inputs, samples)]
        for found, wanted in zip(ours.eval()(images), expected, strict=True):
            assert len(found["scores"]) == len(wanted) > 20
            # Rounding may order two of next to equal scores otherwise: each is held against the nearest.
            apart = torch.cdist(found["boxes"], wanted.bboxes)
            apart[found["labels"][:, None] != wanted.labels] = torch.inf
            nearest = apart.argmin(dim=1)
            assert nearest.unique().numel() == len(wanted)
            torch.testing.assert_close(found["scores"], wanted.scores[nearest], **TOLERANCE)
            torch.testing.assert_close(found["boxes"], wanted.bboxes[nearest], rtol=1e-4, atol=1e-3)
            assert torch.equal(found["labels"], wanted.labels[nearest])


# -- without mmdet --------------------------------------------------------------------------------


def load(state: dict[str, Tensor], folder: Path) -> GFL | ATSS:
    torch.save({"meta": {}, "state_dict": state}, folder / "weights.pth")
    return load_mmdet_checkpoint(folder / "weights.pth")


@pytest.mark.parametrize("family", ["gfl", "atss"])
def test_every_weight_finds_its_place(tmp_path, family):
    state = mmdet_state(family)
    assert "bbox_head.cls_convs.3.gn.bias" in state
    assert "neck.fpn_convs.4.conv.weight" in state
    detector = load(state, tmp_path)
    for key, value in detector.state_dict().items():
        assert torch.equal(value, state[mmdet_name(key, family)]), key


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_the_depth_is_read_from_the_keys(tmp_path, depth):
    detector = load(mmdet_state("gfl", f"resnet{depth}"), tmp_path)
    blocks = {18: 2, 34: 6, 50: 6, 101: 23}[depth]
    assert len(detector.backbone.body.layer3) == blocks
    assert detector.head.bins == 17


def without(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(prefix)}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda s: {**without(s, "bbox_head.gfl_cls"), "bbox_head.retina_cls.weight": torch.ones(1)},
            r"no GFL or ATSS detector: expected .*got \['bbox_head.gfl_reg.weight', 'bbox_head.retina_cls",
        ),
        (lambda s: without(s, "backbone.layer3.1"), "1 basic blocks in backbone.layer3, which is no ResNet"),
        (lambda s: without(s, "neck."), "holds no neck.lateral_convs.0.conv.weight"),
        (
            lambda s: without(s, "neck.fpn_convs.4"),
            r"2 keys missing \['neck.fpn_convs.4.conv.bias', 'neck.fpn_convs.4.conv.weight'\]",
        ),
        (
            lambda s: {**s, "backbone.layer4.0.conv2_offset.weight": torch.ones(1)},
            r"1 unknown \['backbone.layer4.0.conv2_offset.weight'\]",
        ),
        (
            lambda s: {**s, "backbone.conv1.weight": torch.ones(64, 3, 3, 3)},
            r"backbone.conv1.weight \(64, 3, 3, 3\) in the file, \(64, 3, 7, 7\) in the model",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, complaint):
    with pytest.raises(ValueError, match=complaint):
        load(change(mmdet_state("gfl")), tmp_path)
