"""Channel statistics."""

from __future__ import annotations

import pytest
import torch

from crosskd._statistics import feature_statistics


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 7), (2, 3, 4, 5), (2, 3, 2, 3, 2)])
def test_mean_and_unbiased_deviation_of_each_channel(shape):
    features = 2 * torch.randn(shape).double() + 1
    statistics = feature_statistics(features)
    assert statistics.mean.shape == statistics.std.shape == (1, 3, *[1] * (len(shape) - 2))
    for channel in range(3):
        numbers = features[:, channel].flatten().numpy()
        assert statistics.mean.flatten()[channel].item() == pytest.approx(numbers.mean(), rel=1e-12)
        assert statistics.std.flatten()[channel].item() == pytest.approx(numbers.std(ddof=1), rel=1e-12)


def test_normalized_features_have_mean_0_and_deviation_1():
    features = 30 * torch.randn(4, 3, 8, 8).double() - 7
    normalized = feature_statistics(feature_statistics(features).normalize(features))
    torch.testing.assert_close(normalized.mean, torch.zeros_like(normalized.mean), rtol=0, atol=1e-12)
    torch.testing.assert_close(normalized.std, torch.ones_like(normalized.std), rtol=1e-6, atol=0)


def test_a_single_location_has_deviation_0():
    features = torch.randn(1, 3, 1, 1, requires_grad=True)
    statistics = feature_statistics(features)
    assert torch.equal(statistics.mean, features)
    assert torch.equal(statistics.std, torch.zeros(1, 3, 1, 1))
    normalized = statistics.normalize(features)
    normalized.sum().backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype):
    features = (400 * torch.rand(2, 3, 16, 16)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        statistics = feature_statistics(features)
    assert statistics.mean.dtype == statistics.std.dtype == torch.float32
    torch.testing.assert_close(statistics.std, feature_statistics(features.float()).std)


@pytest.mark.parametrize("shape", [(), (4,), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_error_nothing_to_measure(shape):
    with pytest.raises(ValueError, match=r"\(batch, channels, \*space\) and at least one element, got \("):
        feature_statistics(torch.zeros(shape))


def test_error_not_floating_point():
    with pytest.raises(TypeError, match=r"features must hold floating-point numbers, got torch\.uint8"):
        feature_statistics(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
