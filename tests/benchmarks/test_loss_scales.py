"""The benchmark of the losses' gradients, at its smallest size."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.test_benchmarks import load, tables
from tests.helpers.reference_files import bccd_folder

SMALL = ["--images", "2", "--batch", "2", "--measured", "1", "--width", "32", "--teacher", "resnet18"]


@pytest.mark.slow
def test_loss_scales_table(tmp_path):
    root, output = bccd_folder(), tmp_path / "scales.md"
    script = load("loss_scales")
    steps = ["--teacher-steps", "1", "--student-steps", "1", "--threads", str(torch.get_num_threads())]
    chosen = ["--families", "gfl", "retinanet", "--methods", "LD", "DRKD"]
    script.main(["--root", str(root), *chosen, *SMALL, *steps, "--output", str(output)])
    (rows,) = tables(output)
    losses = [row["loss"].strip("`") for row in rows]
    assert losses == [
        "kd_drkd_instance",
        "kd_drkd_pixel",
        "kd_drkd_relation",
        "kd_ld_cls",
        "kd_ld_main",
        "kd_ld_region",
    ]
    for row in rows:
        fresh, trained = (float(cell) for cell in row["gfl"].split(", "))
        assert fresh > 0
        assert trained > 0
    # LD compares distributions, which a RetinaNet doesn't predict.
    assert [row["retinanet"] == "no" for row in rows] == [False] * 3 + [True] * 3


def test_error_weights_of_several_families(tmp_path, capsys):
    script = load("loss_scales")
    with pytest.raises(SystemExit):
        script.main(["--root", str(tmp_path), "--teacher-weights", "teacher.pt"])
    assert "weights are of one family" in capsys.readouterr().err
