"""The page on comparing runs as it stands there, and a gain survives the export to ONNX."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

from tests.helpers.packages import package
from tests.helpers.tiny import tiny_batch, tiny_retinanet
from tests.test_docs import ROOT, python_blocks

CATEGORIES = {0: 5, 1: 6, 2: 8, 3: 9}


def students():
    """A detector, and the same with worse predictors."""
    strong = tiny_retinanet(detections_per_img=20).eval()
    weak = copy.deepcopy(strong)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in (
            weak.head.classification_head.cls_logits.weight,
            weak.head.regression_head.bbox_reg.weight,
        ):
            weights.add_(0.3 * weights.std() * torch.randn(weights.shape, generator=generator))
    return weak, strong


@torch.no_grad()
def write_data(folder, detector):
    """Images of noise, and as ground truth the detections that the detector is surest of, a little moved."""
    (folder / "val").mkdir()
    loader, images, annotations = [], [], []
    for image_id in range(6):
        (image,), _ = tiny_batch(1, seed=image_id)
        loader.append(([image], [{"image_id": image_id}]))
        to_pil_image(image).save(folder / "val" / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": 64, "height": 64})
        (output,) = detector([image])
        for box, label in zip(output["boxes"][:5].tolist(), output["labels"].tolist(), strict=False):
            left, top, right, bottom = box
            annotation = {"image_id": image_id, "category_id": CATEGORIES[label]}
            annotation |= {"id": len(annotations), "bbox": [left + 1, top, right - left, bottom - top]}
            annotations.append(annotation)
    categories = [{"id": category, "name": f"class {category}"} for category in CATEGORIES.values()]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "val.json").write_text(json.dumps(truth))
    return loader


@pytest.mark.slow
def test_the_pages_python_runs_and_the_gain_survives_the_export(tmp_path, monkeypatch):
    package("onnx")
    package("onnxruntime")
    monkeypatch.chdir(tmp_path)
    weak, strong = students()
    shown = {"student_alone": weak, "distilled_student": strong, "categories": CATEGORIES}
    shown["val_loader"] = write_data(tmp_path, strong)
    page = ROOT / "docs/compare.md"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter says what will become of it
        for line, block in python_blocks(page):
            exec(compile("\n" * line + block, str(page), "exec"), shown)
    assert (tmp_path / "out" / "comparison.png").exists()
    metrics, differences = shown["comparison"].metrics, shown["comparison"].differences
    assert differences["distilled"]["AP"].low > 1
    for name in ("alone", "distilled"):
        assert metrics[f"{name}, ONNX"]["AP"] == pytest.approx(metrics[name]["AP"], abs=0.1)
    assert differences["distilled, ONNX"]["AP"] == pytest.approx(differences["distilled"]["AP"], abs=0.1)
