"""metrics.py against closed forms, and against the definition of SSIM written out window by window in float64."""

import math
import os

import pytest
import torch

import metrics
import utils
from metrics import consistency, fool_rate, psnr, ssim


def test_psnr_of_an_offset_of_noise_and_of_equal_images():
    torch.manual_seed(0)
    reference = 0.4 * torch.rand(2, 3, 128, 128)
    images = reference + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(psnr(images, reference), torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)
    noisy = reference + 0.05 * torch.randn_like(reference)
    torch.testing.assert_close(psnr(noisy, reference), torch.full((2,), -20 * math.log10(0.05)), atol=0.1, rtol=0)
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


def test_ssim_agrees_with_its_definition_and_is_1_for_equal_images():
    torch.manual_seed(0)
    reference = torch.rand(2, 3, 17, 14)
    images = (reference + 0.2 * torch.randn_like(reference)).clamp(0, 1)
    images[1, 1], reference[1, 1] = 0.75, 0.25  # flat, without variance
    expected = [sum(ssim_by_definition(*pair) for pair in zip(a, b)) / 3 for a, b in zip(images, reference)]
    torch.testing.assert_close(ssim(images, reference).double(), torch.stack(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(ssim(reference, reference), torch.ones(2))
    with pytest.raises(ValueError, match="10"):
        ssim(torch.zeros(1, 1, 10, 16), torch.zeros(1, 1, 10, 16))


def test_consistency_is_zero_for_the_source_and_squared_levels_for_an_offset():
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    low_res = utils.to_unit(utils.downsample(2 * images - 1, 8))
    assert consistency(images, low_res).max() < 1e-6
    offset = consistency(torch.full((2, 3, 32, 32), 0.5 + 10 / 255), torch.full((2, 3, 8, 8), 0.5))
    torch.testing.assert_close(offset, torch.full((2,), 100.0), atol=0.01, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# The judges


def digits(number, channels=1):
    """Drawn digits as images in [0, 1], and their contexts."""
    images = utils.draw_digits(number, 16, channels)[0] / 255
    return images, utils.to_unit(utils.upsample(utils.downsample(2 * images - 1, 4), 16))


def test_the_classifier_learns_digits_and_sees_them_less_well_in_bicubic_images():
    images, labels = utils.draw_digits(3500, 16)
    classifier = metrics.train_classifier(images[500:], labels[500:])
    real, context = digits(500)  # the first of them
    right = metrics.accuracy(real, labels[:500], classifier)
    assert right.shape == (500,) and set(right.tolist()) <= {0.0, 1.0} and right.mean() > 0.9
    wrong = metrics.accuracy(real, (labels[:500] + 1) % 10, classifier)
    assert (right + wrong).max() == 1 and wrong.mean() < 0.1
    assert metrics.accuracy(context, labels[:500], classifier).mean() < right.mean()


@pytest.mark.skipif("SR3_DATA_DIR" not in os.environ, reason="SR3_DATA_DIR names no folder with MNIST")
def test_the_real_mnist_is_60000_and_10000_digits_which_the_classifier_knows(all_cores):
    """It learns from a third here. The originals' means are 33.3 and 33.8, and enlargement nearly keeps a mean."""
    config = utils.DataConfig("mnist", "", 32, 8, 1)
    sets = [utils.load_data_set(config, train, os.environ["SR3_DATA_DIR"]) for train in (True, False)]
    for (images, labels), number, mean, ones in zip(sets, (60_000, 10_000), (33.32, 33.79), (6742, 1135)):
        assert images.shape == (number, 1, 32, 32) and abs(images.float().mean().item() - mean) < 0.3
        assert labels.shape == (number,) and (labels == 1).sum() == ones
    classifier = metrics.train_classifier(sets[0][0][:20_000], sets[0][1][:20_000])
    assert metrics.accuracy(sets[1][0] / 255, sets[1][1], classifier).mean() >= 0.98


def test_the_judge_cannot_tell_the_reference_from_itself_but_is_not_fooled_by_bicubic_images():
    images, context = digits(200, channels=3)
    fooled = fool_rate(images, images, context)
    assert fooled.shape == (100,) and abs(fooled.mean() - 0.5) < 4 * 0.5 / 100**0.5
    assert fool_rate(context, images, context).mean() < 0.05


def test_the_judge_is_fooled_by_half_of_what_it_cannot_tell():
    """Every second output is the reference itself: at those it guesses, at the others it isn't fooled: 25 %."""
    images, context = digits(300)
    outputs = torch.stack([images[::2], context[1::2]], dim=1).flatten(0, 1)
    fooled = fool_rate(outputs, images, context).view(75, 2).mean(0)  # of either kind
    assert abs(fooled[0] - 0.5) < 4 * 0.5 / 75**0.5 and fooled[1] < 0.05


def test_sharp_eyes_see_what_grain_hides():
    """One level of 255 on the ground: seen by every pixel of it without grain, by hardly any with."""
    images, context = digits(200)
    outputs = images.clamp(min=1 / 255)
    assert fool_rate(outputs, images, context, grain=0).mean() < 0.05
    assert fool_rate(outputs, images, context).mean() > 0.2


def test_the_judge_looks_at_the_low_resolution_picture():
    """Outputs that are real images, but of another digit: only x gives them away."""
    images, context = digits(400)
    assert fool_rate(images.roll(1, dims=0), images, context).mean() < 0.2


def test_a_seed_decides_what_a_judge_learns_nothing_else_changes_and_a_tie_is_half():
    images, context = digits(20)
    state = torch.get_rng_state()
    first, again = (fool_rate(images.flip(3), images, context) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(state, torch.get_rng_state())
    outputs = torch.cat([context[:10], images[10:]])  # of which it is asked about the second half only
    assert (fool_rate(outputs, images, context, grain=0) == 0.5).all()
