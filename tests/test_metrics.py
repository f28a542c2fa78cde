"""metrics.py against closed forms, and against the definition of SSIM written out window by window in float64."""

import math
import os

import pytest
import torch

import metrics
import utils
from metrics import consistency, fool_rate, psnr, squared_difference, ssim


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_of_a_constant_offset_is_its_closed_form(channels):
    reference = torch.full((2, channels, 16, 16), 0.4)
    images = reference + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(psnr(images, reference), torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)


def test_psnr_of_known_noise_and_of_equal_images():
    torch.manual_seed(0)
    reference = torch.rand(3, 1, 256, 256)
    noisy = reference + 0.05 * torch.randn_like(reference)
    torch.testing.assert_close(psnr(noisy, reference), torch.full((3,), -20 * math.log10(0.05)), atol=0.1, rtol=0)
    assert psnr(reference, reference).isinf().all()


def ssim_by_definition(x, y):
    """One image [H, W] in float64: every 11×11 window on its own, Gaussian weights with σ = 1.5."""
    g = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    w = torch.tensor([[a * b for b in g] for a in g], dtype=torch.float64)
    w /= w.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11].double(), y[i : i + 11, j : j + 11].double()
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb, vab = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
            values.append((2 * ma * mb + 1e-4) * (2 * vab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return torch.stack(values).mean()


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_agrees_with_its_definition(channels):
    torch.manual_seed(0)
    reference = torch.rand(2, channels, 17, 14)
    images = (reference + 0.2 * torch.randn_like(reference)).clamp(0, 1)
    expected = [sum(ssim_by_definition(*pair) for pair in zip(a, b)) / channels for a, b in zip(images, reference)]
    torch.testing.assert_close(ssim(images, reference).double(), torch.stack(expected), atol=1e-5, rtol=0)


def test_ssim_of_equal_images_is_1_and_of_an_offset_its_closed_form():
    reference = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(ssim(reference, reference), torch.ones(2))
    flat = torch.full((1, 1, 16, 16), 0.25)
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    torch.testing.assert_close(ssim(flat + 0.5, flat), torch.tensor([expected]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="10"):
        ssim(torch.zeros(1, 1, 10, 16), torch.zeros(1, 1, 10, 16))


def test_consistency_is_zero_for_the_source_and_squared_levels_for_an_offset():
    torch.manual_seed(0)
    images = torch.rand(3, 1, 32, 32)
    low_res = torch.nn.functional.interpolate(images, (8, 8), mode="bicubic", antialias=True).clamp(0, 1)
    assert consistency(images, low_res).max() < 1e-6
    flat = torch.full((2, 3, 32, 32), 0.5)
    offset = consistency(flat + 10 / 255, torch.full((2, 3, 8, 8), 0.5))
    torch.testing.assert_close(offset, torch.full((2,), 100.0), atol=0.01, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# The judges


def digits(number, channels=1, size=16):
    """Drawn digits as images in [0, 1], their contexts and their labels."""
    images, labels = utils.draw_digits(number, size, channels)
    context = utils.upsample(utils.downsample(images / 127.5 - 1, size // 4), size)
    return images / 255, utils.to_unit(context), labels


def test_the_classifier_learns_digits_and_sees_them_less_well_in_bicubic_images():
    images, labels = utils.draw_digits(4000, 16)
    classifier = metrics.train_classifier(images[:3500], labels[:3500])
    real, context, _ = digits(4000)
    right = metrics.accuracy(real[3500:], labels[3500:], classifier)
    assert right.shape == (500,) and set(right.tolist()) <= {0.0, 1.0} and right.mean() > 0.9
    wrong = metrics.accuracy(real[3500:], (labels[3500:] + 1) % 10, classifier)
    assert (right + wrong).max() == 1 and wrong.mean() < 0.1
    assert metrics.accuracy(context[3500:], labels[3500:], classifier).mean() < right.mean()


@pytest.mark.skipif("SR3_DATA_DIR" not in os.environ, reason="SR3_DATA_DIR names no folder with MNIST")
def test_the_classifier_knows_the_real_mnist():
    (images, labels), (test_images, test_labels) = (
        utils.load_data_set("mnist", train, os.environ["SR3_DATA_DIR"], 32, 1) for train in (True, False)
    )
    assert labels.shape == (60_000,) and test_labels.bincount().tolist()[:2] == [980, 1135]
    classifier = metrics.train_classifier(images, labels)
    assert metrics.accuracy(test_images / 255, test_labels, classifier).mean() >= 0.985


@pytest.mark.parametrize("channels", [1, 3])
def test_the_judge_cannot_tell_the_reference_from_itself(channels):
    images, context, _ = digits(400, channels)
    fooled = fool_rate(images, images, context)
    assert fooled.shape == (200,)
    assert abs(fooled.mean() - 0.5) < 4 * 0.5 / 200**0.5
    assert (fool_rate(images, images, context, grain=0) == 0.5).all()  # ties, all of them


@pytest.mark.parametrize("channels", [1, 3])
def test_the_judge_is_not_fooled_by_bicubic_images(channels):
    images, context, _ = digits(400, channels)
    assert fool_rate(context, images, context).mean() < 0.02


def test_sharp_eyes_see_what_grain_hides():
    """One level of 255 on the ground: seen by every pixel of it without grain, by hardly any with."""
    images, context, _ = digits(600)
    outputs = images.clamp(min=1 / 255)
    assert fool_rate(outputs, images, context, grain=0).mean() < 0.02
    assert fool_rate(outputs, images, context).mean() > 0.2


def test_the_judge_is_fooled_by_half_of_what_it_cannot_tell():
    """Every second output is the reference itself: at those it guesses, at the others it isn't fooled: 25 %."""
    images, context, _ = digits(1000)
    outputs = torch.stack([images[::2], context[1::2]], dim=1).flatten(0, 1)
    fooled = fool_rate(outputs, images, context).view(250, 2).mean(0)  # of either kind
    assert abs(fooled[0] - 0.5) < 4 * 0.5 / 250**0.5 and fooled[1] < 0.04


def test_the_judge_looks_at_the_low_resolution_picture():
    """Outputs that are real images, but of another digit: only x gives them away."""
    images, context, _ = digits(1500)
    assert fool_rate(images.roll(1, dims=0), images, context).mean() < 0.2


def test_a_seed_decides_what_a_judge_learns_and_nothing_else_changes():
    images, context, _ = digits(40)
    state = torch.get_rng_state()
    first, again = (fool_rate(images.flip(3), images, context) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(state, torch.get_rng_state())


def test_spread_over_error_of_a_perfect_sampler_is_1_and_of_its_mean_0():
    """Of draws from N(m, s²): two samples and the truth, 3 × 40,000 pixels; each mean is 2 s² = 0.02."""
    torch.manual_seed(0)
    truth, first, second = 0.5 + 0.1 * torch.randn(3, 4, 1, 100, 100)
    assert squared_difference(first, truth).shape == (4,)
    for pair in ((first, truth), (first, second)):
        assert squared_difference(*pair).mean().item() == pytest.approx(0.02, rel=0.05)
    assert (squared_difference(first, first) == 0).all()
