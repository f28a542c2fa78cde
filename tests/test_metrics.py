"""metrics.py against closed forms and definitions in float64; the networks that judge, where the verdict is known."""

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
    assert close(psnr(images, reference), [20, 40]) and psnr(reference, reference).isinf().all()
    assert close(consistency(images, low_res), [25.5**2, 2.55**2], 0.01)
    assert close(consistency(reference, low_res), 0)
    assert close(color_shift(images, reference), [25.5, 2.55]) and close(color_shift(reference.flip(3), reference), 0)


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
    assert close(ssim(images, reference), similarity.flatten(1).mean(1), 1e-6)
    assert close(ssim(reference, reference), [1, 1], 1e-9)


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
    assert calibration(torch.tensor([[0, 0], [1, 1]]), torch.tensor([0, 2]))[0] == 0.5  # always sure: 1 - accuracy


def test_the_guesser_gives_each_class_the_probability_that_the_picture_leaves_it():
    """Half of the pictures are light: class 2. A dark one is of class 0 three times in four, else of class 1."""
    random = torch.rand(4000, generator=torch.manual_seed(0))
    labels = torch.where(random > 0.5, 2, (random < 0.125).long())
    pictures = (0.3 * torch.rand(4000) + 0.7 * (labels == 2)).view(-1, 1, 1, 1)
    probabilities = metrics.train_guesser(pictures, labels)(pictures).softmax(dim=1)
    assert close(probabilities[labels != 2].mean(0), [0.75, 0.25, 0], 0.03)
    assert probabilities[labels == 2, 2].min() > 0.95


def digits(number, channels=1):
    """Drawn digits as images in [0, 1], and their contexts."""
    images = draw_digits(number, 16, channels)[0] / 255
    return images, to_unit(upsample(downsample(2 * images - 1, 4), 16))


def test_the_judges_are_fooled_by_half_of_what_they_cannot_tell_and_by_nothing_else():
    images, context = digits(300)

    def rate(outputs, **options):
        return metrics.fool_rate(outputs, images, context, **options).nanmean()

    assert abs(rate(images) - 0.5) < 4 * 0.5 / 150**0.5
    assert rate(context) < 0.05 and rate(images.roll(1, dims=0)) < 0.2  # the second are real ones, but of another x
    ground = images.clamp(min=1 / 255)  # one level: every pixel of it shows without noise, hardly any with
    assert rate(ground, noise=0) < 0.05 and rate(ground) > 0.2


def test_each_judge_is_asked_about_the_half_that_it_has_not_seen_and_says_the_same_every_time():
    images, context = digits(20, channels=3)
    verdicts = [metrics.fool_rate(context, images, context, seed) for seed in (0, 0, 1)]
    torch.testing.assert_close(*verdicts[:2], equal_nan=True)
    asked = [~verdict.isnan() for verdict in verdicts]
    assert asked[0].sum() == 10 and (asked[0] != asked[2]).any()
    outputs = torch.where(asked[0].view(-1, 1, 1, 1), images, context)  # a judge that never sees an equal pair …
    assert (metrics.fool_rate(outputs, images, context, noise=0)[asked[0]] == 0.5).all()  # … calls a tie


def test_a_network_is_kept_at_its_path_and_trained_again_where_the_file_is_damaged_or_anothers(tmp_path, monkeypatch):
    path, other = tmp_path / "kept.pt", tmp_path / "other.pt"
    images, labels = torch.rand(20, 1, 16, 16), torch.arange(20)
    first = metrics.train_guesser(images, labels, path)(images)
    metrics.train_classifier(images, labels, other)
    for content in (path.read_bytes()[:-1000], other.read_bytes()):
        path.write_bytes(content)
        assert torch.equal(metrics.train_guesser(images, labels, path)(images), first)
        with monkeypatch.context() as patch:
            patch.delattr(torch.optim, "Adam")
            assert torch.equal(metrics.train_guesser(images, labels, path)(images), first)
    path.unlink()
    path.mkdir()  # where it can be neither read nor written, it is trained all the same
    assert torch.equal(metrics.train_guesser(images, labels, path)(images), first)
