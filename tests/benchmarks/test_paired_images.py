"""The table of what a teacher of another modality is worth."""

from __future__ import annotations

from tests.benchmarks.test_benchmarks import load

paired_images = load("paired_images")


def metrics_of(precision: float) -> dict[str, float]:
    return {"AP": precision, "AP50": 2 * precision, "AP75": precision / 2}


METRICS = {
    "results": {
        "teacher": metrics_of(40.0),
        "alone-0": metrics_of(20.0),
        "features+responses-0": metrics_of(25.0),
        "alone-3": metrics_of(22.0),
        "features+responses-3": metrics_of(24.0),
    },
    "options": {
        "data": "/somewhere/boards",
        "images": "images",
        "teacher_images": "images_pair",
        "random_backbone": False,
        "batch_size": 4,
        "crop": 160,
        "teacher_epochs": 7,
        "epochs": 5,
        "seeds": [0, 3],
    },
    "steps": 1125,
}


def test_the_table_has_the_test_splits_numbers_and_differences_seed_by_seed():
    text = paired_images.report(METRICS, ["--data", "/somewhere/boards", "--seeds", "0", "3"])
    assert "| teacher, on its own images | 1 | 40.0 | 80.0 | 20.0 |  |" in text
    assert "| student alone | 2 | 21.0 ± 1.4 | 42.0 ± 2.8 | 10.5 ± 0.7 |  |" in text
    expected = "| features, then responses | 2 | 24.5 ± 0.7 | 49.0 ± 1.4 | 12.2 ± 0.4 | +3.5 ± 2.1 |"
    assert expected in text
    assert "    python benchmarks/paired_images.py --data data/boards --seeds 0 3\n" in text
    for fact in ("boards, test split", "4 crops of 160", "for 7 epochs", "for 5 (1125 steps)", "seeds 0, 3"):
        assert fact in text
    assert "/somewhere" not in text


def test_without_the_student_alone_there_is_no_difference():
    results = {name: value for name, value in METRICS["results"].items() if not name.startswith("alone")}
    text = paired_images.report({**METRICS, "results": results}, [])
    assert "| features, then responses | 2 | 24.5 ± 0.7 | 49.0 ± 1.4 | 12.2 ± 0.4 |  |" in text
