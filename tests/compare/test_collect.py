from __future__ import annotations

import numpy as np
import pytest
import torch

from crosskd import collect_detections, compare
from tests.helpers.tiny import tiny_batch, tiny_retinanet


def loader_of(*image_ids: int):
    """Batches of one image each."""
    for image_id in image_ids:
        images, _ = tiny_batch(1, seed=image_id)
        yield images, [{"image_id": torch.tensor(image_id)}]


def test_a_detectors_answers_are_in_cocos_form_and_its_modes_are_kept():
    detector = tiny_retinanet(detections_per_img=5).train()
    detector.backbone.eval()
    modes = [module.training for module in detector.modules()]
    found = collect_detections(detector, loader_of(3, 8), categories={0: 10, 1: 11, 2: 12, 3: 13})
    assert [module.training for module in detector.modules()] == modes
    assert found.image_ids == (3, 8)
    assert found.parameters == sum(parameter.numel() for parameter in detector.parameters())
    assert found.seconds_per_image > 0
    (output,) = detector.eval()(tiny_batch(1, seed=8)[0])
    results = [result for result in found.results if result["image_id"] == 8]
    corners = torch.tensor([result["bbox"] for result in results])
    corners[:, 2:] += corners[:, :2]
    torch.testing.assert_close(corners, output["boxes"].detach())
    assert [result["category_id"] for result in results] == (output["labels"] + 10).tolist()
    assert [result["score"] for result in results] == output["scores"].tolist()


def test_modes_are_kept_where_the_detector_fails():
    detector = tiny_retinanet().train()
    with pytest.raises(ValueError, match="1 images came with 0 targets"):
        collect_detections(detector, [(tiny_batch(1)[0], [])])
    assert detector.training


def test_functions_and_arrays_are_taken():
    def session(images):
        return [
            {"boxes": np.float32([[1, 2, 4, 8]]), "scores": np.float32([0.5]), "labels": np.int64([2])}
            for _ in images
        ]

    found = collect_detections(session, loader_of(4))
    assert found.results == [{"image_id": 4, "category_id": 2, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.5}]
    assert found.parameters is None


def test_boxes_may_be_bfloat16():
    def detector(images):
        box = torch.tensor([[1, 2, 4, 8]], dtype=torch.bfloat16)
        return [{"boxes": box, "scores": box[0, :1] / 2, "labels": torch.tensor([2])} for _ in images]

    (found,) = collect_detections(detector, loader_of(4)).results
    assert found == {"image_id": 4, "category_id": 2, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.5}


def test_what_was_measured_is_a_cost():
    truth = {
        "images": [{"id": 4, "width": 64, "height": 64}],
        "annotations": [{"id": 1, "image_id": 4, "category_id": 1, "bbox": [1, 1, 20, 20]}],
        "categories": [{"id": 1, "name": "cell"}],
    }
    detector = tiny_retinanet(detections_per_img=5)
    found = collect_detections(detector, loader_of(4), categories=dict.fromkeys(range(4), 1))
    comparison = compare(
        truth, {"alone": found, "other": found.results}, costs={"other": {"MB": 3}}, resamples=2
    )
    assert comparison.costs["alone"] == {
        "seconds per image": found.seconds_per_image,
        "parameters": found.parameters,
    }
    assert comparison.costs["other"] == {"MB": 3}
    assert f"{found.parameters:,}" in str(comparison)


def test_nothing_in_the_loader_is_no_time():
    assert collect_detections(tiny_retinanet(), []).seconds_per_image is None


ANSWER = {"boxes": torch.zeros(1, 4), "scores": torch.zeros(1), "labels": torch.ones(1, dtype=torch.int64)}
IMAGES = [torch.zeros(3, 8, 8)]


@pytest.mark.parametrize(
    ("answers", "batches", "facts"),
    [
        ([ANSWER], [(IMAGES, [[]])], "image_id, got list"),
        ([ANSWER], [(IMAGES, [{"boxes": 1}])], "image_id"),
        ([ANSWER], [(IMAGES, [{"image_id": 5}])] * 2, "image 5 twice"),
        ([ANSWER, ANSWER], [(IMAGES, [{"image_id": 5}])], "1 images came with 1 targets and 2 answers"),
        ([torch.zeros(1, 6)], [(IMAGES, [{"image_id": 5}])], "boxes, scores, labels, got Tensor"),
        ([{"boxes": 1}], [(IMAGES, [{"image_id": 5}])], r"got \['boxes'\]"),
        (
            [{**ANSWER, "scores": torch.zeros(2)}],
            [(IMAGES, [{"image_id": 5}])],
            r"got \(1, 4\), \(2,\) and \(1,\)",
        ),
        (
            [{**ANSWER, "labels": torch.tensor([0])}],
            [(IMAGES, [{"image_id": 5}])],
            r"label 0, categories has \[1, 2\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(answers, batches, facts):
    with pytest.raises(ValueError, match=facts):
        collect_detections(lambda images: answers, batches, categories={1: 1, 2: 2})
