"""metrics.py against closed forms and definitions in float64; the networks that judge, where the verdict is known."""

import math
import os

from support.data import load_data
from support.digits import draw_digits
from support.settings import complete_settings

import numpy as np
import pytest
import torch

import evaluate
import metrics
from evaluate import HeldOut
from metrics import accuracy, color_shift, consistency, frechet_distance, psnr, ssim
from utils import downsample, to_float, to_unit, upsample


def test_psnr_consistency_and_colour_shift_of_offsets_of_noise_and_of_equal_images():
    torch.manual_seed(0)
    reference = 0.3 + 0.4 * torch.rand(2, 3, 128, 128)
    low_res = to_unit(downsample(2 * reference - 1, 8))
    images = reference + torch.tensor([[0.1, -0.1, 0.1], [0.01, 0.01, -0.01]]).view(2, 3, 1, 1)
    torch.testing.assert_close(psnr(images, reference), torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(consistency(images, low_res), torch.tensor([25.5, 2.55]) ** 2, atol=0.01, rtol=0)
    torch.testing.assert_close(color_shift(images, reference), torch.tensor([25.5, 2.55]), atol=1e-3, rtol=0)
    noisy = reference + 0.05 * torch.randn_like(reference)
    torch.testing.assert_close(psnr(noisy, reference), torch.full((2,), -20 * math.log10(0.05)), atol=0.1, rtol=0)
    assert psnr(reference, reference).isinf().all() and consistency(reference, low_res).max() < 1e-6
    assert color_shift(reference.flip(3), reference).max() < 1e-3  # other pixels, but the same means


def test_ssim_agrees_with_its_definition_window_by_window_and_is_1_for_equal_images():
    torch.manual_seed(0)
    reference = torch.rand(2, 3, 17, 14)
    images = (reference + 0.2 * torch.randn_like(reference)).clamp(0, 1)
    images[1, 1], reference[1, 1] = 0.75, 0.25  # flat, without variance
    g = torch.tensor([math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)], dtype=torch.float64)
    w = g.outer(g) / g.sum() ** 2
    a, b = (v.double().unfold(2, 11, 1).unfold(3, 11, 1) for v in (images, reference))  # [B, C, H - 10, W - 10, 11, 11]
    ma, mb = ((w * v).sum((4, 5), keepdim=True) for v in (a, b))
    va, vb, vab = ((w * v).sum((4, 5), keepdim=True) for v in ((a - ma) ** 2, (b - mb) ** 2, (a - ma) * (b - mb)))
    similarity = (2 * ma * mb + 1e-4) * (2 * vab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    expected = similarity.flatten(1).mean(1)
    torch.testing.assert_close(ssim(images, reference).double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(ssim(reference, reference), torch.ones(2))
    with pytest.raises(ValueError, match="10"):
        ssim(torch.zeros(1, 1, 10, 16), torch.zeros(1, 1, 10, 16))


def gaussian(number, root, mean):
    """Features [number, 3] in float64 whose covariance is exactly root.T @ root, with that mean."""
    values = np.random.default_rng(number).normal(size=(number, 3))
    white = (values - values.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(values.T))).T
    return torch.from_numpy(white @ root + mean)


def test_the_frechet_distance_is_that_of_two_gaussians():
    """In closed form for diagonal covariances; else by the eigenvalues of A B, here of matrices that don't commute."""
    features, others = gaussian(100, np.diag([2, 1, 0]), 0), gaussian(150, np.diag([1, 3, 0.5]), [1, 0, -2])
    expected = (1 + 4) + (2 - 1) ** 2 + (1 - 3) ** 2 + (0 - 0.5) ** 2
    assert frechet_distance(features, others) == pytest.approx(expected, abs=1e-6)
    r, s = np.array([[2, 1, 0], [0, 1, 0.5], [1, 0, 0.3]]), np.array([[1, 0, 0], [2, 1, 0], [-1, 1, 3]])
    a, b = r.T @ r, s.T @ s
    assert abs(a @ b - b @ a).max() > 1
    features, others = gaussian(100, r, [0, 3, 0]), gaussian(150, s, 0)
    expected = 9 + np.trace(a + b) - 2 * np.sqrt(np.linalg.eigvals(a @ b)).sum()
    for one, other in ((features, others), (others, features)):
        assert frechet_distance(one, other) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-6)
    assert math.isnan(frechet_distance(features[:1], others))  # one alone has no covariance


def digits(number, channels=1):
    """Drawn digits as images in [0, 1], and their contexts."""
    images = draw_digits(number, 16, channels)[0] / 255
    return images, to_unit(upsample(downsample(2 * images - 1, 4), 16))


def test_the_guesser_gives_each_class_the_probability_that_the_picture_leaves_it():
    """Half of the pictures are light: class 2. A dark one is of class 0 three times in four, else of class 1."""
    random = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.where(random[:, 0] > 0.5, 2, (random[:, 0] < 0.125).long())
    pictures = (0.3 * random[:, 1] + 0.7 * (labels == 2)).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    probabilities = metrics.train_guesser(pictures, labels)(pictures).softmax(dim=1)
    off = probabilities[labels != 2] - torch.tensor([0.75, 0.25, 0])
    assert off.abs().max() < 0.1 and off.mean(0).abs().max() < 0.03 and probabilities[labels == 2, 2].min() > 0.95


@pytest.mark.skipif("SR3_DATA_DIR" not in os.environ, reason="SR3_DATA_DIR names no folder with MNIST")
def test_the_real_mnist_is_60000_and_10000_digits_known_by_the_classifier_and_guessed_from_16_pixels(all_cores):
    """The classifier learns from a third here. The originals have means of 33.3 and 33.8; enlarging keeps them."""
    sets = load_data(complete_settings(), os.environ["SR3_DATA_DIR"])
    for (images, labels), number, mean, ones in zip(sets, (60_000, 10_000), (33.32, 33.79), (6742, 1135)):
        assert images.shape == (number, 1, 32, 32) and abs(images.float().mean().item() - mean) < 0.3
        assert labels.shape == (number,) and (labels == 1).sum() == ones
    (images, labels), (tests, test_labels) = sets
    classifier = metrics.train_classifier(images[:20_000], labels[:20_000])
    assert accuracy(tests / 255, test_labels, classifier).mean() >= 0.98
    low_res, test_low_res = (downsample(to_float(some), 4) for some in (images, tests))
    assert accuracy(test_low_res, test_labels, metrics.train_guesser(low_res, labels)).mean() > 0.91


def fool_rate(images, reference, context, noise=0.1, asked=slice(None)):
    """How often the judges of three seeds take those of the images that they are asked about for real."""
    verdicts = torch.stack([metrics.fool_rate(images, reference, context, seed, noise) for seed in range(3)])
    return verdicts[:, asked].nanmean()


def test_the_judges_are_fooled_by_half_of_what_they_cannot_tell_and_by_nothing_else():
    images, context = digits(300)
    assert abs(fool_rate(images, images, context) - 0.5) < 4 * 0.5 / 260**0.5  # 7/8 of the images, most of them twice
    mixed = torch.stack([images[::2], context[1::2]], dim=1).flatten(0, 1)  # every second one is the reference itself
    assert abs(fool_rate(mixed, images, context, asked=slice(0, None, 2)) - 0.5) < 4 * 0.5 / 130**0.5
    assert fool_rate(mixed, images, context, asked=slice(1, None, 2)) < 0.05
    assert fool_rate(images.roll(1, dims=0), images, context) < 0.2  # real ones, but of another x
    ground = images.clamp(min=1 / 255)  # one level: every pixel of it shows without noise, hardly any with
    assert fool_rate(ground, images, context, noise=0) < 0.05 and fool_rate(ground, images, context) > 0.2
    images, context = digits(200, channels=3)
    assert fool_rate(context, images, context) < 0.05


def test_each_judge_is_asked_about_the_half_that_it_has_not_seen_another_half_for_each_seed():
    images, context = digits(20)
    asked = [~metrics.fool_rate(context, images, context, seed).isnan() for seed in range(3)]
    assert [mask.sum() for mask in asked] == [10, 10, 10]
    assert (asked[0] != asked[1]).any() and (asked[0] != asked[2]).any() and (asked[1] != asked[2]).any()
    outputs = torch.where(asked[0].view(-1, 1, 1, 1), images, context)  # a judge that never sees an equal pair …
    assert (metrics.fool_rate(outputs, images, context, noise=0)[asked[0]] == 0.5).all()  # … calls a tie


def test_judges_learn_the_same_every_time_and_what_is_drawn_elsewhere_stays():
    images, context = digits(20)
    for judge in (
        lambda: metrics.train_guesser(context, torch.arange(20) % 3)(context),
        lambda: metrics.fool_rate(context, images, context).nan_to_num(2),
    ):
        torch.manual_seed(1)
        first, state = judge(), torch.manual_seed(2).get_state()
        assert torch.equal(first, judge()) and torch.equal(state, torch.get_rng_state())


class OnAppleGPU(torch.Tensor):
    """A tensor that has no float64 until it is on the CPU, like one on an Apple GPU."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function is torch.Tensor.cpu:
            return arguments[0].as_subclass(torch.Tensor)
        result = super().__torch_function__(function, types, arguments, options or {})
        if isinstance(result, cls) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result


def test_no_metric_widens_before_it_has_left_an_apple_gpu():
    images, context = (values.as_subclass(OnAppleGPU) for values in digits(50))
    for widen in (lambda: images.double(), lambda: images.to(torch.float64), lambda: images.new_zeros(1).double()):
        with pytest.raises(TypeError, match="float64"):
            widen()
    labels = torch.arange(50).as_subclass(OnAppleGPU) % 10
    classifier = metrics.train_classifier((255 * images).byte(), labels)
    guess = metrics.predict(metrics.train_guesser(context, labels), context).softmax(dim=1)
    features = metrics.predict(classifier[:-1], images)
    test = HeldOut(images, 2 * images - 1, context, torch.arange(50), 50, labels, classifier, features, guess)
    rows = {"real": evaluate.score(images, test, context), "regression": evaluate.score(context, test, images)}
    rows["a perfect sampler"] = evaluate.perfect_sampler(test, rows)
    assert len(rows["regression"]) == 7 and len(rows["a perfect sampler"]) == 6
