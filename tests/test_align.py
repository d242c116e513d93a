"""Alignment of features to a teacher's statistics, and the projection between widths."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosskd.align import ChannelProjection, align_statistics, feature_statistics, join_statistics
from tests.helpers.reference_files import load_parity


def test_published_value_and_gradient():
    published = load_parity("losses.pt")["align"]
    student = published["student_features"].requires_grad_()
    aligned = align_statistics(student, published["teacher_features"])
    torch.testing.assert_close(aligned, published["aligned"], rtol=1e-6, atol=1e-6)
    aligned.backward(published["cotangent"])
    torch.testing.assert_close(student.grad, published["grad_student_features"], rtol=1e-6, atol=1e-6)


def test_agrees_with_a_plain_calculation():
    student, teacher = torch.randn(2, 3, 2, 5).double(), 4 * torch.randn(2, 3, 4, 2).double() - 1

    def measure(channel: list[float]) -> tuple[float, float]:
        mean = math.fsum(channel) / len(channel)
        return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in channel) / (len(channel) - 1))

    channels = [x.transpose(0, 1).flatten(1).tolist() for x in (student, teacher)]
    expected = []
    for ours, theirs in zip(*channels, strict=True):
        (mean, std), (teacher_mean, teacher_std) = measure(ours), measure(theirs)
        expected.append([(x - mean) / (std + 1e-6) * teacher_std + teacher_mean for x in ours])
    aligned = align_statistics(student, teacher).transpose(0, 1).flatten(1)
    torch.testing.assert_close(aligned, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@given(
    shape=st.tuples(st.integers(2, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)),
    scale=st.floats(0.1, 10),
    offset=st.floats(-10, 10),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None)
def test_aligned_features_have_the_teachers_statistics(shape, scale, offset, seed):
    torch.manual_seed(seed)
    student, teacher = torch.randn(shape).double(), scale * torch.randn(shape).double() + offset
    found, wanted = feature_statistics(align_statistics(student, teacher)), feature_statistics(teacher)
    torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-8, atol=1e-8)
    # 1e-6 added to the student's own deviation: its share is the relative error.
    error = 1e-6 / feature_statistics(student).std.min().item()
    torch.testing.assert_close(found.std, wanted.std, rtol=2 * error, atol=1e-8)


def test_own_teacher_changes_nothing():
    features = torch.randn(2, 3, 5, 5).double()
    torch.testing.assert_close(align_statistics(features, features), features, rtol=1e-5, atol=1e-5)


def test_statistics_may_be_measured_before():
    student, teacher = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    measured = feature_statistics(teacher)
    assert torch.equal(align_statistics(student, measured), align_statistics(student, teacher))


def test_gradcheck_and_none_into_the_teacher():
    student, teacher = (torch.randn(2, 2, 2, 3).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda s: align_statistics(s, teacher.detach()), student)
    align_statistics(student, teacher).square().sum().backward()
    align_statistics(student, feature_statistics(teacher)).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("batch", [1, 2])
def test_level_of_one_location(batch):
    student = torch.randn(batch, 3, 1, 1, requires_grad=True)
    teacher = torch.randn(batch, 3, 1, 1)
    aligned = align_statistics(student, teacher)
    aligned.sum().backward()
    assert student.grad.isfinite().all()
    if batch == 1:
        assert torch.equal(aligned, teacher)  # nothing to scale: the mean is all there is
    else:
        torch.testing.assert_close(aligned.mean(0), teacher.mean(0))


def test_a_channel_that_never_fires_stays_finite():
    student = torch.randn(2, 3, 4, 4)
    student[:, 1] = 0
    student.requires_grad_()
    aligned = align_statistics(student, torch.randn(2, 3, 4, 4))
    aligned.square().sum().backward()
    assert aligned.isfinite().all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_calculated_in_float32(dtype):
    student, teacher = (1000 * torch.randn(2, 3, 16, 16) + 300).to(dtype), torch.randn(2, 3, 16, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        aligned = align_statistics(student, teacher)
    assert aligned.dtype == dtype
    assert torch.equal(aligned, align_statistics(student.float(), teacher.float()).to(dtype))


def test_error_other_width():
    message = (
        r"student features \(2, 3, 4, 4\) cannot take on statistics of 5 channels in 4 dimensions: project"
    )
    with pytest.raises(ValueError, match=message):
        align_statistics(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4))
    with pytest.raises(ValueError, match=r"student features \(2, 3\) .* 3 channels in 4 dimensions"):
        align_statistics(torch.zeros(2, 3), torch.zeros(2, 3, 4, 4))


def test_error_not_floating_point():
    with pytest.raises(
        TypeError, match=r"student_features must hold floating-point numbers, got torch\.int64"
    ):
        align_statistics(torch.zeros(2, 3, 4, 4).long(), torch.zeros(2, 3, 4, 4))


def test_projection():
    projection = ChannelProjection(3, 5)
    features = torch.randn(2, 3, 4, 6)
    projected = projection(features)
    weight, bias = projection.convolution.weight[..., 0, 0], projection.convolution.bias
    expected = torch.einsum("oc,bchw->bohw", weight, features) + bias[:, None, None]
    torch.testing.assert_close(projected, expected)
    projected.sum().backward()
    assert all(parameter.grad is not None for parameter in projection.parameters())


@pytest.mark.parametrize("widths", [(0, 4), (4, 0)])
def test_error_projection_of_no_channels(widths):
    message = rf"widths must be at least 1, got {widths[0]} \(student\) and {widths[1]} \(teacher\)"
    with pytest.raises(ValueError, match=message):
        ChannelProjection(*widths)


@pytest.mark.parametrize("space", [(), (7,), (4, 6), (2, 3, 4)])
def test_projection_of_any_number_of_locations(space):
    projection = ChannelProjection(3, 5)
    features = torch.randn(2, 3, *space)
    weight, bias = projection.convolution.weight[..., 0, 0], projection.convolution.bias
    expected = torch.nn.functional.linear(features.movedim(1, -1), weight, bias).movedim(-1, 1)
    torch.testing.assert_close(projection(features), expected)
    assert projection(features[:0]).shape == (0, 5, *space)


@pytest.mark.parametrize("space", [(), (7,)])
def test_features_of_linear_layers_are_aligned_by_channel(space):
    student, teacher = torch.randn(6, 3, *space).double(), 3 * torch.randn(6, 3, *space).double() + 1
    aligned = align_statistics(student, teacher)
    for channel in range(3):
        ours, theirs = student[:, channel], teacher[:, channel]
        expected = (ours - ours.mean()) / (ours.std() + 1e-6) * theirs.std() + theirs.mean()
        torch.testing.assert_close(aligned[:, channel], expected)


@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (3, 5, 5), (3,)])
def test_error_projection_of_other_features(shape):
    with pytest.raises(ValueError, match=r"expected features of shape \(batch, 3, \*space\), got \("):
        ChannelProjection(3, 5)(torch.zeros(shape))


# -- channel statistics ----------------------------------------------------------------------------


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


def test_error_features_that_are_not_floating_point():
    with pytest.raises(TypeError, match=r"features must hold floating-point numbers, got torch\.uint8"):
        feature_statistics(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (3, 4, 1, 1), (1, 4, 2, 2), (1, 4, 1, 1), (3, 4)])
def test_statistics_of_images_are_joined_to_those_of_their_batch(shape):
    features = 3 * torch.randn(shape) + 100
    joined = join_statistics([feature_statistics(image) for image in features.split(1)])
    together = feature_statistics(features)
    torch.testing.assert_close(joined.mean, together.mean)
    torch.testing.assert_close(joined.std, together.std, rtol=1e-4, atol=1e-5)
    assert joined.locations == together.locations == features[:, 0].numel()
