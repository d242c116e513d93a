"""The Python that README and documentation show runs as it stands there."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import models
from torchvision.models import detection, resnet
from torchvision.models.detection import backbone_utils
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms.functional import to_pil_image

import crosskd
from tests.helpers import detr
from tests.helpers.mmdet_recipes import mmdet_batch
from tests.helpers.packages import package
from tests.helpers.tiny import tiny_batch
from tests.helpers.yolo import batch_of

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PAGES = (
    "README.md",
    "docs/index.md",
    "docs/is_it_helping.md",
    "docs/adapters.md",
    "docs/backbones.md",
    "docs/cross_modality.md",
    "docs/methods/bckd.md",
    "docs/methods/cosine.md",
    "docs/methods/crosskd.md",
    "docs/methods/drkd.md",
    "docs/methods/imitation.md",
    "docs/methods/inherit.md",
    "docs/methods/fgd.md",
    "docs/methods/mgd.md",
    "docs/methods/mimicking.md",
    "docs/pairs.md",
    "docs/methods/pkd.md",
    "docs/methods/response.md",
    "docs/methods/cwd.md",
    "docs/methods/ssim.md",
    "docs/quickstart.md",
    "docs/torchvision.md",
    "docs/your_method.md",
)
# Pages that another test runs, with a framework of their own or on the examples' path.
ELSEWHERE = (
    "docs/compare.md",
    "docs/in_your_loop.md",
    "docs/methods/ld.md",
    "docs/mmdet.md",
    "docs/transformers.md",
    "docs/two_stages.md",
    "docs/yolo.md",
    "docs/your_classes.md",
    "docs/your_detector.md",
)


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Each Python block of a page with the line that it starts on; of a diff, what it leads to."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for fence in re.finditer(r"^```(python|diff)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        block = fence.group(2)
        if fence.group(1) == "diff":
            block = side_of_diff(block, "+")
        blocks.append((text[: fence.start(2)].count("\n"), block))
    return blocks


def side_of_diff(diff: str, side: str) -> str:
    """The lines of one side, ``"-"`` for before and ``"+"`` for after; the other's are empty."""
    kept = (line[1:] if line[:1] in ("", " ", side) else "" for line in diff.splitlines())
    return "\n".join(kept) + "\n"


def small_detectors(monkeypatch) -> None:
    """The detectors that pages build: on short networks, for small images, without downloads."""

    def small(kind: type[nn.Module]) -> Callable[..., nn.Module]:
        def build(weights: Any = None, weights_backbone: Any = None, **sizes: int) -> nn.Module:
            pyramid = resnet_fpn_backbone(
                backbone_name="resnet18",
                weights=None,
                returned_layers=[2, 3, 4],
                extra_blocks=LastLevelP6P7(256, 256),
            )
            detector = kind(pyramid, num_classes=4, min_size=64, max_size=64)
            # Its classes are likely everywhere, so that it is sure of something.
            nn.init.zeros_(detector.head.classification_head.cls_logits.bias)
            return detector

        return build

    class SmallRetinaNet(detection.RetinaNet):
        def __init__(self, backbone: nn.Module, num_classes: int, **options: Any) -> None:
            super().__init__(backbone, num_classes, **{"min_size": 64, "max_size": 64, **options})

    def without_weights(weights: Any = None, **options: Any) -> nn.Module:
        return resnet_fpn_backbone(weights=None, **options)

    def one_block_a_stage(weights: Any = None, **options: Any) -> nn.Module:
        return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], **options)

    def swin(weights: Any = None) -> nn.Module:
        return models.SwinTransformer([4, 4], 96, [1, 1, 1, 1], [3, 6, 12, 24], [7, 7])

    for name in ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"):
        monkeypatch.setattr(detection, name, small(detection.RetinaNet))
    monkeypatch.setattr(detection, "RetinaNet", SmallRetinaNet)
    monkeypatch.setattr(backbone_utils, "resnet_fpn_backbone", without_weights)
    monkeypatch.setattr(detection, "fcos_resnet50_fpn", small(detection.FCOS))
    for module, name in ((resnet, "resnet18"), (models, "resnet18"), (models, "resnet50")):
        monkeypatch.setattr(module, name, one_block_a_stage)
    monkeypatch.setattr(models, "swin_t", swin)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, monkeypatch, tmp_path):
    small_detectors(monkeypatch)
    monkeypatch.chdir(tmp_path)
    images, targets = tiny_batch()
    shown: dict[str, Any] = {"loader": [(images, targets)], "__name__": page}
    shown |= {"images": images, "targets": targets}
    blocks = python_blocks(ROOT / page)
    assert blocks
    for line, block in blocks:
        source = "\n" * line + block  # so that a traceback has the page's own line
        exec(compile(source, str(ROOT / page), "exec"), shown)
    assert "losses" in shown


def test_every_page_with_python_is_run():
    pages = {
        str(path.relative_to(ROOT))
        for path in (*ROOT.glob("docs/**/*.md"), ROOT / "README.md")
        if python_blocks(path)
    }
    assert pages == {*PAGES, *ELSEWHERE}


def diff_of(page: str) -> str:
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return diff


def test_the_readmes_loop_runs_before_the_diff_is_applied(monkeypatch, tmp_path):
    small_detectors(monkeypatch)
    monkeypatch.chdir(tmp_path)
    diff = diff_of("README.md")
    assert diff_of("docs/index.md") == diff
    plain = side_of_diff(diff, "-")
    assert "crosskd" not in plain
    shown: dict[str, Any] = {"loader": [tiny_batch()], "__name__": "README.md"}
    exec(compile(plain, "README.md", "exec"), shown)
    assert sorted(shown["losses"]) == ["bbox_regression", "classification"]


def small_faster_rcnn(weights: Any = None, weights_backbone: Any = None) -> nn.Module:
    """In place of torchvision's builders: on a ResNet-18, for small images, with random weights."""
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    return detection.FasterRCNN(backbone, 91, min_size=64, max_size=64, box_batch_size_per_image=8)


def test_python_of_two_stages_runs(monkeypatch, tmp_path):
    for name in ("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"):
        monkeypatch.setattr(detection, name, small_faster_rcnn)
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs/two_stages.md"
    shown: dict[str, Any] = {"loader": [tiny_batch(first_label=1)], "__name__": page.name}
    losses = []
    for line, block in python_blocks(page):
        exec(compile("\n" * line + block, str(page), "exec"), shown)
        losses.append({name for name in shown["losses"] if "kd" in name})
    rpn, box = ({f"kd_{head}_{kind}" for kind in ("cls", "reg")} for head in ("rpn", "box"))
    assert losses == [rpn | box, rpn | box]


def sections(page: Path) -> dict[str, list[tuple[int, str]]]:
    """A page's Python blocks by the heading that they stand under."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found: dict[str, list[tuple[int, str]]] = {}
    for line, block in python_blocks(page):
        heading = next(text for text in reversed(lines[:line]) if text.startswith("#"))
        found.setdefault(heading.lstrip("# "), []).append((line, block))
    return found


IN_YOUR_LOOP = sections(ROOT / "docs/in_your_loop.md")
QUERIES = {"kd_cls", "kd_l1", "kd_giou"}
# What a snippet needs beside the library, and what the tests are installed without.
NEEDS = {
    "TensorBoard": "tensorboard",
    "ONNX of the student": "onnxruntime",
}


def write_coco_folder(root: Path) -> None:
    """Two images a split, with a box of either category, in the form that the page asks for."""
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    categories = [{"id": 3, "name": "cell"}, {"id": 7, "name": "ring"}]
    for split, ids in {"train": (1, 2), "val": (3, 4)}.items():
        images, annotations = [], []
        for number in ids:
            images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 64})
            box = [8, 8, 30 + number, 40]
            category = 3 if number % 2 else 7
            of_box = {"id": number, "image_id": number, "category_id": category, "bbox": box}
            annotations.append({**of_box, "area": box[2] * box[3], "iscrowd": 0})
            to_pil_image(torch.rand(3, 64, 64)).save(root / f"images/{number}.png")
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/{split}.json").write_text(json.dumps(content))


@pytest.mark.skipif(not hasattr(crosskd, "compare"), reason="needs crosskd.compare")
def test_python_of_your_classes_runs(monkeypatch, tmp_path):
    package("onnx")
    small_detectors(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write_coco_folder(tmp_path / "data")
    page = ROOT / "docs/your_classes.md"
    smaller = {'"min_size": 256, "max_size": 448': '"min_size": 64, "max_size": 96', "epochs=6": "epochs=1"}
    assert all(page.read_text(encoding="utf-8").count(size) for size in smaller)
    shown: dict[str, Any] = {"__name__": "your_classes"}
    for line, block in python_blocks(page):
        source = "\n" * line + block
        for size, small in smaller.items():
            source = source.replace(size, small)
        exec(compile(source, str(page), "exec"), shown)
    assert (tmp_path / "student.onnx").exists()
    assert "AP" in str(shown["comparison"])
    assert shown["category_of"] == {0: 3, 1: 7}


def test_the_folder_of_your_classes_names_a_category_that_is_none(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_coco_folder(tmp_path / "data")
    path = tmp_path / "data/annotations/train.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["category_id"] = 9
    path.write_text(json.dumps(content))
    _, block = python_blocks(ROOT / "docs/your_classes.md")[0]
    with pytest.raises(ValueError, match=r"train.json: .*\[9\].*\[3, 7\]"):
        exec(compile(block, "your_classes.md", "exec"), {"__name__": "your_classes"})


def test_script_and_python_of_your_classes_train_alike():
    text = (ROOT / "docs/your_classes.md").read_text(encoding="utf-8")
    for option, in_python in {
        "--teacher retinanet_resnet50 ": "teacher = retinanet_resnet50_fpn(",
        "--teacher-learning-rate 1e-4 ": "train(teacher, 1e-4)",
        "--learning-rate 4e-4 ": "train(distiller, 4e-4)",
        "--student retinanet_resnet18 ": 'backbone_name="resnet18"',
        "--batch-size 4 ": "batch_size=4, shuffle=True",
        "--short-side 256 --long-side 448 ": '{"min_size": 256, "max_size": 448}',
    }.items():
        assert option in text
        assert in_python in text


def same_detections(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert len(left["scores"]) > 0
    assert torch.equal(left["labels"], right["labels"])
    torch.testing.assert_close(left["boxes"], right["boxes"], rtol=0, atol=1e-2)
    torch.testing.assert_close(left["scores"], right["scores"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("heading", [name for name in IN_YOUR_LOOP if name != "In your own loop"])
def test_snippets_of_your_own_loop_run(heading, monkeypatch, tmp_path):
    if heading in NEEDS:
        package(NEEDS[heading])
    small_detectors(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    images, targets = tiny_batch()
    shown: dict[str, Any] = {"images": images, "targets": targets, "__name__": "in_your_loop"}
    # As torchvision's own training makes its batches.
    pairs = list(zip(images, targets, strict=True)) * 4
    shown["loader"] = DataLoader(
        pairs, batch_size=2, collate_fn=lambda batch: tuple(zip(*batch, strict=True))
    )
    page = ROOT / "docs/in_your_loop.md"
    (start,) = IN_YOUR_LOOP["In your own loop"]
    before = None
    for line, block in (start, *IN_YOUR_LOOP[heading]):
        exec(compile("\n" * line + block, str(page), "exec"), shown)
        before = before or {name: value.clone() for name, value in shown["student"].state_dict().items()}
    student = shown["student"]
    trained = any(not torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert trained == ("of the student" not in heading or heading.startswith("EMA"))
    plain = student.eval()(images)
    if heading == "TorchScript of the student":
        same_detections(shown["detections"][0], plain[0])
    if heading == "ONNX of the student":
        found = {name: torch.from_numpy(shown[name]) for name in ("boxes", "scores", "labels")}
        same_detections(found, plain[0])
    if heading == "TensorBoard":
        assert list((tmp_path / "runs/crosskd").iterdir())
    if heading == "DistributedDataParallel":
        saved = torch.load("student.pt", weights_only=True)
        assert saved.keys() == student.state_dict().keys()


@pytest.mark.mmdet
def test_python_of_mmdets_page_runs(monkeypatch):
    """As it stands there, but for the weights: every one is random, and nothing is downloaded."""
    from mmdet.registry import MODELS
    from mmengine import hub

    import crosskd.checkpoints

    def without_weights(name, get_config=hub.get_config):
        config = get_config(name)
        config.model.backbone.init_cfg = None
        return config

    def random_weights(name):
        return MODELS.build(without_weights("mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py").model).state_dict()

    monkeypatch.setattr(hub, "get_config", without_weights)
    monkeypatch.setattr(crosskd.checkpoints, "read_mmdet_checkpoint", random_weights)
    page = ROOT / "docs/mmdet.md"
    ((line, block),) = python_blocks(page)
    shown: dict[str, Any] = {"loader": [mmdet_batch()], "__name__": page.name}
    exec(compile("\n" * line + block, str(page), "exec"), shown)
    assert sorted(shown["losses"]) == ["kd_cls", "kd_reg", "loss_bbox", "loss_cls", "loss_dfl"]
    assert len(shown["detections"]) == 2


def val_loader() -> list[Any]:
    """Two batches of images of two sizes, as docs/compare.md has them."""
    sizes = {3: (64, 96), 7: (80, 64)}
    return [([torch.rand(3, *size)], [{"image_id": image_id}]) for image_id, size in sizes.items()]


@pytest.mark.ultralytics
@pytest.mark.parametrize(
    ("name", "distilled"),
    [
        ("docs/yolo.md", ["kd_cls", "kd_reg"]),
        ("docs/methods/ld.md", ["kd_ld_cls", "kd_ld_main", "kd_ld_region", "kd_pkd"]),
    ],
)
def test_python_of_yolos_pages_runs(name, distilled):
    images, targets = batch_of()
    page = ROOT / name
    shown: dict[str, Any] = {"loader": [{"img": images, **targets}], "__name__": page.name}
    shown |= {"val_loader": val_loader(), "categories": {label: 10 + label for label in range(80)}}
    for line, block in python_blocks(page):
        exec(compile("\n" * line + block, str(page), "exec"), shown)
    assert sorted(shown["losses"]) == ["box_loss", "cls_loss", "dfl_loss", *distilled]
    assert "found" not in shown or shown["found"].image_ids == (3, 7)


TRANSFORMERS = sections(ROOT / "docs/transformers.md")


@pytest.mark.transformers
@pytest.mark.parametrize("heading", [name for name in TRANSFORMERS if name != "mmdet"])
def test_python_of_transformers_page_runs(heading, monkeypatch, tmp_path, capsys):
    needs = {"Under the Trainer": "accelerate", "A vision transformer as the teacher": "timm"}
    if heading in needs:
        package(needs[heading])
    monkeypatch.chdir(tmp_path)
    for side, width in (("teacher", 48), ("student", 32)):
        detr.detector_of("rt_detr", width).save_pretrained(f"folder/of/the/{side}")
    inputs = detr.batch_of()
    rows = [
        {"pixel_values": pixels, "labels": labels}
        for pixels, labels in zip(inputs["pixel_values"], inputs["labels"], strict=True)
    ]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        pixels = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": pixels, "labels": [row["labels"] for row in rows]}

    shown: dict[str, Any] = {"__name__": "transformers_page", "loader": [inputs], "inputs": inputs}
    shown |= {"dataset": rows, "collate": collate}
    if heading == "Is the student better?":
        from transformers import RTDetrImageProcessor

        RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained("folder/of/the/student")
        shown |= {"val_loader": val_loader(), "categories": {label: 10 + label for label in range(3)}}
    page = ROOT / "docs/transformers.md"
    blocks = [*TRANSFORMERS["Ten lines"], *(TRANSFORMERS[heading] if heading != "Ten lines" else ())]
    for line, block in blocks:
        exec(compile("\n" * line + block, str(page), "exec"), shown)
    if heading.startswith("What is shared"):
        # The page has the message as it is printed, broken into lines.
        assert " ".join(capsys.readouterr().out.split()) in " ".join(page.read_text().split())
    if heading in ("Ten lines", "Under the Trainer"):  # the others go on with the student
        result = detr.detector_of("rt_detr").from_pretrained("folder/of/the/result").state_dict()
        assert all(torch.equal(result[name], value) for name, value in shown["student"].state_dict().items())
    assert "found" not in shown or (shown["found"].image_ids, len(shown["found"].results)) == ((3, 7), 20)
    distilled = {"A vision transformer as the teacher": {"kd_cosine"}, "Feature maps": QUERIES | {"kd_pkd"}}
    found = {name for name in shown["losses"] if name.startswith("kd_")}
    assert found == distilled.get(heading, QUERIES)


@pytest.mark.mmdet
@pytest.mark.transformers
def test_python_of_mmdets_transformers_runs(monkeypatch):
    from mmdet.registry import MODELS

    from tests.helpers import mmdet_detr

    small = [mmdet_detr.detector_of("dino", seed=seed) for seed in range(2)]
    monkeypatch.setattr(MODELS, "build", lambda config: small.pop())
    images, samples = mmdet_detr.batch_of()
    shown: dict[str, Any] = {"loader": [{"inputs": images, "data_samples": samples}]}
    ((line, block),) = TRANSFORMERS["mmdet"]
    exec(compile("\n" * line + block, "docs/transformers.md", "exec"), {**shown, "__name__": "mmdet"}, shown)
    assert {*QUERIES, "kd_pkd", "loss_cls", "d0.dn_loss_iou"} <= set(shown["losses"])


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("docs/**/*.md")), ROOT / "README.md"], ids=lambda p: p.name
)
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_every_page_stands_in_the_table_of_contents():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    listed = "\n".join(re.findall(r"^```{toctree}\n(.*?)^```$", index, re.MULTILINE | re.DOTALL)).splitlines()
    docs = ROOT / "docs"
    pages = {path.relative_to(docs).with_suffix("").as_posix() for path in docs.glob("**/*.md")} - {"index"}
    assert pages <= set(listed)


def test_ci_runs_the_readmes_test_command():
    readme, ci = ((ROOT / path).read_text(encoding="utf-8") for path in ("README.md", ".ci/run"))
    assert ".venv/bin/python -m pytest" in readme
    peers = ("MMDET", "PACKAGES", "TRANSFORMERS", "ULTRALYTICS")
    required = " ".join(f"CROSSKD_REQUIRE_{peer}=1" for peer in peers)
    step = rf"^{required} \\\n +python -m pytest -n 2 "
    assert re.search(step, ci, flags=re.MULTILINE)
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_a_missing_package_skips_a_test_but_not_where_ci_has_installed_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delenv("CROSSKD_REQUIRE_PACKAGES", raising=False)
    with pytest.raises(pytest.skip.Exception):
        package("lightning")
    monkeypatch.setenv("CROSSKD_REQUIRE_PACKAGES", "1")
    with pytest.raises(ImportError):
        package("lightning")
