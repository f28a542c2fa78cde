"""metrics.py against closed forms, and against the definition of SSIM written out window by window in float64."""

import math

import pytest
import torch

from metrics import consistency, psnr, ssim


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
