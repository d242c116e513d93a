"""The Python that README and documentation show runs as it stands there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torchvision import models
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from tests.helpers.mmdet_recipes import mmdet_batch
from tests.helpers.tiny import tiny_batch
from tests.helpers.yolo import batch_of

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PAGES = (
    "README.md",
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
    "docs/methods/ld.md",
    "docs/mmdet.md",
    "docs/two_stages.md",
    "docs/yolo.md",
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
    """The detectors that pages build: on a ResNet-18, for small images, without downloads."""

    def small(kind: type[nn.Module]) -> Callable[..., nn.Module]:
        def build(weights: Any = None, weights_backbone: Any = None) -> nn.Module:
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

    for name in ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"):
        monkeypatch.setattr(detection, name, small(detection.RetinaNet))
    monkeypatch.setattr(detection, "fcos_resnet50_fpn", small(detection.FCOS))
    monkeypatch.setattr(models, "resnet50", lambda weights=None: models.resnet18(weights=None))


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


def test_the_readmes_loop_runs_before_the_diff_is_applied(monkeypatch, tmp_path):
    small_detectors(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    plain = side_of_diff(diff, "-")
    assert "crosskd" not in plain
    shown: dict[str, Any] = {"loader": [tiny_batch()], "__name__": "README.md"}
    exec(compile(plain, "README.md", "exec"), shown)
    assert sorted(shown["losses"]) == ["bbox_regression", "classification"]


def without_downloads(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A builder of torchvision's that makes the same Faster R-CNN for small images, with random weights."""

    def build_small(weights: Any = None, weights_backbone: Any = None) -> nn.Module:
        sizes = {"min_size": 64, "max_size": 64, "box_batch_size_per_image": 8}
        return build(weights=None, weights_backbone=None, **sizes)

    return build_small


def test_python_of_two_stages_runs(monkeypatch, tmp_path):
    for name in ("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"):
        monkeypatch.setattr(detection, name, without_downloads(getattr(detection, name)))
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs/two_stages.md"
    shown: dict[str, Any] = {"loader": [tiny_batch(first_label=1)], "__name__": page.name}
    losses = []
    for line, block in python_blocks(page):
        exec(compile("\n" * line + block, str(page), "exec"), shown)
        losses.append({name for name in shown["losses"] if "kd" in name})
    rpn, box = ({f"kd_{head}_{kind}" for kind in ("cls", "reg")} for head in ("rpn", "box"))
    assert losses == [rpn | box, rpn | {f"{name}_{key}" for name in ("crosskd", "mimic") for key in box}]


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
    ((line, block),) = python_blocks(page)
    shown: dict[str, Any] = {"loader": [{"img": images, **targets}], "__name__": page.name}
    exec(compile("\n" * line + block, str(page), "exec"), shown)
    assert sorted(shown["losses"]) == ["box_loss", "cls_loss", "dfl_loss", *distilled]


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
    step = r"^CROSSKD_REQUIRE_MMDET=1 CROSSKD_REQUIRE_ULTRALYTICS=1 \\\n +python -m pytest .*--cov "
    assert re.search(step, ci, flags=re.MULTILINE)
    assert re.search(r"^python -m coverage report .*--fail-under=95", ci, flags=re.MULTILINE)
    assert os.access(ROOT / ".ci/run", os.X_OK)
