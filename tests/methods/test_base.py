"""A method of one's own needs a forward, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crosskd import PKD, CrossKD, Distiller, Method
from crosskd.methods import MapMethod, Step
from crosskd.towers import Tapped, TapPoint
from tests.helpers.tiny import tiny_batch, tiny_retinanet


class LogitDistance(Method):
    def __init__(self) -> None:
        super().__init__(name="distance")

    def forward(self, step: Step) -> dict[str, Tensor]:
        student, teacher = step.student.predictions, step.teacher.predictions
        return {"kd_distance": (student.logits - teacher.logits).square().mean()}


def distil(*methods: Method) -> tuple[Distiller, dict[str, Tensor]]:
    distiller = Distiller(tiny_retinanet(seed=1), tiny_retinanet(seed=2), methods)
    return distiller, distiller(*tiny_batch())


def test_a_method_that_looks_at_predictions_only():
    distiller, losses = distil(LogitDistance())
    images = distiller.student.transform(tiny_batch()[0])[0].tensors
    logits = [
        d.head(list(d.backbone(images).values()))["cls_logits"]
        for d in (distiller.student, distiller.teacher)
    ]
    torch.testing.assert_close(losses["kd_distance"], (logits[0] - logits[1]).square().mean())
    losses["kd_distance"].backward()
    assert distiller.student.head.classification_head.cls_logits.weight.grad.abs().sum() > 0


def test_its_defaults():
    method = LogitDistance()
    assert method.tap_points("classification") is None
    assert method.requires == {"predictions"}
    assert method.loss_names() == ()
    assert method.schedule is None
    features = torch.randn(1, 2, 3, 3)
    assert method.keep_of_teacher(Tapped.at("here", features)) is features


@pytest.mark.parametrize("given", [0.5, {"stop": 100}])
def test_error_something_else_than_a_schedule(given):
    with pytest.raises(TypeError, match=rf"Schedule\(stop=1000\), got a {type(given).__name__}"):
        PKD(schedule=given)


class FeatureDistance(LogitDistance):
    """Compares the towers' features, tapped at other places of student and teacher."""

    requires = frozenset({"towers"})

    def tap_points(self, branch: str) -> tuple[TapPoint, TapPoint] | None:
        return (TapPoint(1, "post"), TapPoint(2, "pre")) if branch == "classification" else None

    def forward(self, step: Step) -> dict[str, Tensor]:
        assert set(step.student.taps) == set(step.teacher.taps) == {"classification"}
        self.levels = step.student.taps["classification"], step.teacher.taps["classification"]
        pairs = zip(*self.levels, strict=True)
        return {"kd_features": sum((ours.read() - theirs).abs().mean() for ours, theirs in pairs)}


def test_a_method_that_taps_one_branch_at_two_places():
    distiller, losses = distil(FeatureDistance())
    assert losses["kd_features"] > 0
    student, teacher = distiller.methods["distance"].levels
    assert len(student) == len(teacher) == 3
    assert all((tapped.read() >= 0).all() for tapped in student)
    assert all((features < 0).any() for features in teacher)
    assert not any(features.requires_grad for features in teacher)


def test_methods_compose():
    _, losses = distil(CrossKD(), LogitDistance())
    assert {"kd_cls", "kd_reg", "kd_distance"} < losses.keys()


def test_a_method_without_forward_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Method(name="nothing")


def test_a_method_of_maps_without_a_weight_says_so():
    class Distance(MapMethod):
        def forward(self, step: Step) -> dict[str, Tensor]:
            losses = [(student - teacher).abs().mean() for _, student, teacher in self.compared(step)]
            return {"kd_distance": self.weight * torch.stack(losses).sum()}

    with pytest.raises(ValueError, match="Distance has no weight of its own: pass weight="):
        distil(Distance(name="distance"))
    _, losses = distil(Distance(2.0, name="distance"))
    assert losses["kd_distance"] > 0
