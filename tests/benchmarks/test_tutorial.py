"""The tutorial's numbers: made by the page's own code, one column for each student's weights."""

from __future__ import annotations

import re

import torch

from tests.benchmarks.test_benchmarks import load

tutorial = load("tutorial")


def test_a_case_is_trained_and_its_scores_stand_in_a_table():
    page = tutorial.page_code()
    scored = []

    def score(detector: torch.nn.Module) -> float:
        scored.append([parameter.detach().clone() for parameter in detector.parameters()])
        return float(len(scored))

    case = tutorial.Case("Shapes, F1", 2, *page["draw"](8, seed=0), score, 1, (2, 1), (1, 2))
    text = tutorial.measured(case, page)
    assert text.startswith("Shapes, F1; teacher 2 steps, students 1. The teacher has 7.0.\n")
    assert re.findall(r"^\| (.*) \|$", text, flags=re.MULTILINE) == [
        "weights | 1 | 2 | mean",
        "--- | --- | --- | ---",
        "before training | 1.0 | 4.0 | 2.5",
        "alone | 2.0 | 5.0 | 3.5",
        "distilled | 3.0 | 6.0 | 4.5",
    ]
    for start, alone, distilled in (scored[:3], scored[3:6]):
        for one, other in ((start, alone), (start, distilled), (alone, distilled)):
            assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
