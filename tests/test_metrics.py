"""metrics.py against closed forms and definitions in float64; judges, where the verdict is known."""

import math

import torch

import metrics
from metrics import calibration, color_shift, consistency, frechet_distance, psnr, squared_difference, ssim
from support.digits import draw_digits
from utils import downsample, to_unit, upsample


def close(values, expected, tolerance=1e-3):
    return torch.allclose(values.double(), torch.as_tensor(expected).double(), rtol=0, atol=tolerance)


def test_pixels_that_are_off_by_a_tenth_and_by_a_hundredth():
    torch.manual_seed(0)
    reference = 0.3 + 0.4 * torch.rand(2, 3, 128, 128)
    low_res = to_unit(downsample(2 * reference - 1, 8))
    images = reference + torch.tensor([[0.1, -0.1, 0.1], [0.01, 0.01, -0.01]]).view(2, 3, 1, 1)
    assert close(squared_difference(images, reference), [0.01, 0.0001], 1e-6)
    assert close(psnr(images, reference), [20, 40])
    assert close(consistency(images, low_res), [25.5**2, 2.55**2], 0.01)
    assert close(color_shift(images, reference), [25.5, 2.55]) and close(color_shift(reference.flip(3), reference), 0)


def test_ssim_agrees_with_its_definition_window_by_window_and_is_1_for_equal_images():
    torch.manual_seed(0)
    reference = torch.rand(2, 3, 17, 14)
    images = reference + 0.2 * torch.randn_like(reference)
    g = torch.tensor([math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)], dtype=torch.float64)
    w = g.outer(g).flatten() / g.sum() ** 2
    a, b = (v.double().unfold(2, 11, 1).unfold(3, 11, 1).flatten(4) for v in (images, reference))  # a window of 121
    ma, mb = a @ w, b @ w
    da, db = a - ma[..., None], b - mb[..., None]
    structure = (2 * (da * db) @ w + 9e-4) / ((da**2 + db**2) @ w + 9e-4)
    similarity = structure * (2 * ma * mb + 1e-4) / (ma**2 + mb**2 + 1e-4)
    assert close(ssim(images, reference), similarity.flatten(1).mean(1), 1e-6)
    assert close(ssim(reference, reference), 1, 1e-9)


def test_the_frechet_distance_of_two_gaussians_adds_what_their_means_and_their_widths_differ_by():
    torch.manual_seed(0)
    white = torch.randn(100, 3).double()
    white = torch.linalg.qr(white - white.mean(0))[0] * 99**0.5  # its mean is 0, its covariance the identity
    turn = torch.linalg.qr(torch.randn(3, 3).double())[0]  # so that the features are correlated
    features, others = white * torch.tensor([2, 1, 0]) @ turn, white * torch.tensor([1, 3, 0.5]) @ turn
    expected = (2 - 1) ** 2 + (1 - 3) ** 2 + (0 - 0.5) ** 2 + (1 + 4 + 9)
    assert close(frechet_distance(features, others + torch.tensor([1, 2, 3])), expected, 1e-6)


def test_calibration_compares_the_share_of_samples_that_agree_with_how_often_they_are_right():
    classes = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [2, 0, 2, 2]])
    error, bins = calibration(classes, torch.tensor([0, 2, 2]))
    assert bins.tolist() == [[0.25, 0, 1], [0.75, 1, 3], [1, 0.5, 8]]
    assert error == (1 * 0.25 + 3 * 0.25 + 8 * 0.5) / 12  # the mean over samples


def test_the_guesser_gives_each_class_the_probability_that_the_picture_leaves_it():
    """Half of the pictures are light: class 2. A dark one is of class 0 three times in four, else of class 1."""
    random = torch.rand(4000, generator=torch.manual_seed(0))
    labels = torch.where(random > 0.5, 2, (random < 0.125).long())
    pictures = (0.3 * torch.rand(4000) + 0.7 * (labels == 2)).view(-1, 1, 1, 1)
    probabilities = metrics.train_guesser(pictures, labels)(pictures).softmax(dim=1)
    assert close(probabilities[labels != 2].mean(0), [0.75, 0.25, 0], 0.03)
    assert probabilities[labels == 2, 2].min() > 0.95


def test_a_judge_is_fooled_by_half_of_what_it_cannot_tell_apart_and_asked_only_about_what_it_has_not_seen():
    images = draw_digits(300, 16)[0] / 255
    context = to_unit(upsample(downsample(2 * images - 1, 4), 16))

    def judge(outputs, **options):
        return metrics.fool_rate(outputs, images, context, **options)

    assert abs(judge(images).nanmean() - 0.5) < 4 * 0.5 / 150**0.5
    assert judge(images.roll(1, dims=0)).nanmean() < 0.2  # real ones, but of another x
    blurred = judge(context)
    torch.testing.assert_close(judge(context), blurred, equal_nan=True)
    asked = ~blurred.isnan()
    assert asked.sum() == 150 and blurred.nanmean() < 0.05 and (judge(context, seed=1).isnan() == asked).any()
    outputs = torch.where(asked.view(-1, 1, 1, 1), images, context)  # a judge that never sees an equal pair …
    assert (judge(outputs, noise=0)[asked] == 0.5).all()  # … calls a tie
