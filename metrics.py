"""How images are judged (the paper's section 4): each metric takes images in [0, 1] and returns one value per image."""

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of [B, C, H, W] in [0, 1]: -10 log10 of the mean squared error; [B].

    Infinite for equal images. It and SSIM favour the blurry regression baseline over SR3; people do not (section 4).
    """
    return -10 * (images - reference).square().mean(dim=(1, 2, 3)).log10()


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of [B, C, H, W] in [0, 1], at most 1 (equal images); [B].

    Gaussian window of 11×11 with σ = 1.5, data range 1; the mean over windows that lie within the image and over
    channels. Raises ValueError for images smaller than the window.
    """
    device, (channels, height, width) = images.device, images.shape[1:]
    if min(height, width) < 11:
        raise ValueError(f"the images are {height}×{width}: SSIM's window needs 11×11 or more")
    images, reference = images.cpu().double(), reference.cpu().double()  # differences of squares: float32 is too short
    offsets = torch.arange(11, dtype=torch.float64) - 5
    gaussian = torch.exp(-(offsets**2) / (2 * 1.5**2))
    gaussian = gaussian / gaussian.sum()
    window = gaussian.outer(gaussian).expand(channels, 1, 11, 11)

    def local_mean(values: Tensor) -> Tensor:
        return F.conv2d(values, window, groups=channels)  # [B, C, H - 10, W - 10]

    x, y = local_mean(images), local_mean(reference)
    variance_x, variance_y = local_mean(images**2) - x**2, local_mean(reference**2) - y**2
    covariance = local_mean(images * reference) - x * y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * x * y + c1) * (2 * covariance + c2) / ((x**2 + y**2 + c1) * (variance_x + variance_y + c2))
    return similarity.mean(dim=(1, 2, 3)).float().to(device)


def consistency(images: Tensor, low_res: Tensor) -> Tensor:
    """Mean squared difference, on the 0…255 scale, of the downsampled images and the low-resolution input; [B].

    `images` are [B, C, H, W] and `low_res` [B, C, h, w], both in [0, 1]; 0 is perfect (section 4, on another scale).
    """
    downsampled = F.interpolate(images, low_res.shape[2:], mode="bicubic", antialias=True).clamp(0, 1)
    return (255 * (downsampled - low_res)).square().mean(dim=(1, 2, 3))
