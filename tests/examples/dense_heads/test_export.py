"""The detectors exported to ONNX answer as they do in PyTorch, on images with other numbers of candidates."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.examples.dense_heads.small import FAMILIES, small
from tests.helpers.packages import package
from tests.helpers.tiny import tiny_batch


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_exported_detectors_find_the_same(family, tmp_path):
    package("onnx")
    onnxruntime = package("onnxruntime")
    detector = small(family, score_thresh=0.3, detections_per_img=20).eval()
    keys, file = ["boxes", "scores", "labels"], tmp_path / "detector.onnx"
    # A dark image has other candidates than those of noise.
    images = [0.1 * tiny_batch(1)[0][0], *tiny_batch(3, seed=1)[0]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter says what will become of it
        torch.onnx.export(
            detector, (images[:1],), file, input_names=["image"], output_names=keys, dynamo=False
        )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = []
    for image, expected in zip(images, detector(images), strict=True):
        for key, value in zip(keys, session.run(keys, {"image": image.numpy()}), strict=True):
            torch.testing.assert_close(torch.from_numpy(value), expected[key], rtol=1e-4, atol=1e-4)
        found.append(len(expected["boxes"]))
    assert min(found) > 0
