"""A frozen copy shares its numbers with the original and changes nothing about it."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from crosskd.frozen import frozen_copy
from tests.helpers.tiny import tiny_retinanet


def test_copy_is_frozen_and_the_original_is_not():
    detector = tiny_retinanet(batch_norm=True).train()
    detector.backbone.stem.requires_grad_(False)
    needs = {name: parameter.requires_grad for name, parameter in detector.named_parameters()}
    frozen = frozen_copy(detector)
    assert type(frozen) is type(detector)
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(module.training for module in detector.modules())
    assert {name: parameter.requires_grad for name, parameter in detector.named_parameters()} == needs


def test_copy_shares_every_number():
    detector = tiny_retinanet(batch_norm=True)
    originals, copies = detector.state_dict(), frozen_copy(detector).state_dict()
    assert originals.keys() == copies.keys()
    assert all(originals[name].data_ptr() == copies[name].data_ptr() for name in originals)


def test_copy_answers_as_the_original():
    detector = tiny_retinanet(batch_norm=True).eval()
    images = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        expected, found = detector(images), frozen_copy(detector)(images)
    for key, value in expected[0].items():
        assert torch.equal(found[0][key], value)


def test_tied_weights_stay_tied():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    copy = frozen_copy(nn.Sequential(first, second))
    assert copy[0].weight is copy[1].weight


def test_a_module_that_is_used_twice_stays_one():
    layer = nn.Linear(2, 2)
    copy = frozen_copy(nn.Sequential(layer, nn.ReLU(), layer))
    assert copy[0] is copy[2]
    assert copy[0] is not layer


def test_gradients_flow_through_and_stop_at_no_parameter():
    detector = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    inputs = torch.randn(4, 3, requires_grad=True)
    frozen_copy(detector)(inputs).sum().backward()
    assert inputs.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in detector.parameters())


def test_error_module_that_cannot_be_copied():
    module = nn.Linear(2, 2)
    module.lock = threading.Lock()
    with pytest.raises(
        TypeError, match=r"this Linear can't be copied \(.*lock.*\): the teacher is held as a"
    ):
        frozen_copy(module)
