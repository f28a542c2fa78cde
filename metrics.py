"""How images are judged (the paper's section 4). A metric takes images in [0, 1] and returns one value for each.

The first functions compare pixels. The others ask small networks, which learn their task from real images in seconds:
what the digit is, and which of two images is real. The paper asked a ResNet-50 and people.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import MLP
from torchvision.transforms.functional import gaussian_blur


def squared_difference(images: Tensor, others: Tensor) -> Tensor:
    """Mean squared difference of [B, C, H, W] and others of the same shape; [B].

    Between two samples for the same x it is called spread, between a sample and the truth error. For a perfect sampler
    both are twice the variance of p(y | x) on average, so spread / error is 1; a regression, which has one answer only,
    has 0. A ratio of 1 is necessary for good samples, not sufficient: real digits drawn without regard to x have it.
    """
    return (images - others).square().mean(dim=(1, 2, 3))


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of [B, C, H, W]: -10 log10 of the mean squared error; [B].

    Infinite for equal images. It and SSIM favour the blurry regression over SR3; people do not (section 4).
    """
    return -10 * squared_difference(images, reference).log10()


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of [B, C, H, W], at most 1 (equal images); [B].

    The mean over channels and over all Gaussian windows, of 11×11 with σ = 1.5, that lie within the image.
    scikit-image with Gaussian weights, piq, pytorch-msssim (range 1) and dm-pix agree; torchmetrics 1.9 and kornia's
    default also count a mirrored frame, which gives unrelated digits 0.42 instead of 0.14. Raises ValueError for images
    smaller than the window.
    """
    if min(images.shape[2:]) < 11:
        raise ValueError(f"the images are {list(images.shape)}: SSIM's window needs 11×11 pixels or more")
    similarities = []
    for i in range(0, len(images), 100):  # more at a time might not fit into memory
        x = images[i : i + 100].cpu().double()  # differences of squares: float32 is too short
        y = reference[i : i + 100].cpu().double()
        local_means = gaussian_blur(torch.cat([x, y, x * x, y * y, x * y]), 11, 1.5)[..., 5:-5, 5:-5]
        mean_x, mean_y, mean_xx, mean_yy, mean_xy = local_means.chunk(5)  # [100, C, H - 10, W - 10] each
        variance_x, variance_y, covariance = mean_xx - mean_x**2, mean_yy - mean_y**2, mean_xy - mean_x * mean_y
        c1, c2 = 0.01**2, 0.03**2
        similarity = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        similarity = similarity * (2 * covariance + c2) / (variance_x + variance_y + c2)
        similarities.append(similarity.mean(dim=(1, 2, 3)))
    return torch.cat(similarities).float().to(images.device)


def consistency(images: Tensor, low_res: Tensor) -> Tensor:
    """Mean squared difference, on the 0…255 scale, of images [B, C, H, W], shrunk again, and low_res [B, C, h, w]; [B].

    low_res is in [0, 1], too. 0 is perfect. (Section 4 has another scale.)
    """
    shrunk = F.interpolate(images, low_res.shape[2:], mode="bicubic", antialias=True).clamp(0, 1)
    return squared_difference(255 * shrunk, 255 * low_res)


def color_shift(images: Tensor, reference: Tensor) -> Tensor:
    """How far each channel's mean is from the reference's, on the 0…255 scale, averaged over channels; [B]."""
    return 255 * (images - reference).mean(dim=(2, 3)).abs().mean(dim=1)


def accuracy(images: Tensor, labels: Tensor, classifier: nn.Module) -> Tensor:
    """1.0 where a classifier of `train_classifier` sees the right class, else 0.0 (the paper's Table 3); [B]."""
    return (predict(classifier, images).argmax(dim=1) == labels).float()


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """Fréchet distance between two sets of features, [N, D] and [M, D], each taken as a Gaussian.

    |μ - ν|² + tr(A + B - 2 √(A B)) with the means μ, ν and covariances A, B. Of an Inception network's features this is
    FID; of a small digit classifier's it can't be compared with published figures. It falls as N grows, so compare sets
    of one size. NaN for a set of one, which has no covariance.
    """
    if min(len(features), len(others)) < 2:
        return float("nan")
    features, others = features.cpu().double(), others.cpu().double()  # an Apple GPU has no float64
    a, b = features.T.cov(), others.T.cov()
    overlap = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()  # tr √(A B)
    return ((features.mean(0) - others.mean(0)).square().sum() + a.trace() + b.trace() - 2 * overlap).item()


def fool_rate(images: Tensor, reference: Tensor, context: Tensor, seed: int = 0, noise: float = 0.1) -> Tensor:
    """The paper's human test, done by a network: 1.0 where it takes an output for real, else 0.0; [B], on the CPU.

    This is a classifier two-sample test (Lopez-Paz and Oquab, arXiv 1610.06545). The judge rates the output and the
    truth, each by itself with x beside it, and takes the higher rated one for real; a tie counts as 0.5. A mean of 0.5
    says that it can't tell them apart. It learns from a random half of the images and is asked about the others; the
    first have NaN. The seed decides the half and whatever else is luck: judges of several seeds tell how much that is.
    `noise` is the standard deviation of noise in its eyes, new at each look: with 0 it sees what no person sees, such
    as whether black is 0 or 1 of 255, and is hardly ever fooled. All three are [B, C, H, W], B at least 2.
    """
    generator = torch.Generator().manual_seed(seed)
    learned, asked = torch.randperm(len(images), generator=generator).tensor_split([len(images) // 2])

    def ratings(judge: nn.Module, indices: Tensor) -> tuple[Tensor, Tensor]:
        """How real the outputs and the real images look to the judge; [B, 1] each."""
        candidates = torch.cat([images[indices], reference[indices]])  # [2B, C, H, W]
        candidates = candidates + noise * torch.randn(candidates.shape, generator=generator).to(images.device)
        return judge(torch.cat([context[indices].repeat(2, 1, 1, 1), candidates], dim=1)).chunk(2)

    def loss(judge: nn.Module, indices: Tensor) -> Tensor:
        output, real = ratings(judge, learned[indices])
        return F.softplus(output - real).mean()  # -log of the probability that it says right

    judge = small_network(2 * images.shape[1], 1, images.device, seed)
    passes = max(10, 1200 // len(learned))  # few images teach it something, too, if it sees them often
    train_network(judge, loss, len(learned), passes, batch_size=32, seed=seed)
    verdicts = torch.full((len(images),), torch.nan)
    with torch.no_grad():
        for indices in asked.split(250):
            output, real = ratings(judge, indices)
            verdicts[indices] = ((output > real).float() + 0.5 * (output == real).float())[:, 0].cpu()
    return verdicts


# The networks that judge ----------------------------------------------------------------------------------------------


def train_classifier(images: Tensor, labels: Tensor) -> nn.Module:
    """A small network that has learned the classes of real images, uint8 [N, C, H, W]; labels int64 [N] from 0.

    It sees each image once. Its features are what it computes before its last layer: `classifier[:-1]`, [B, 64].
    """

    def loss(network: nn.Module, indices: Tensor) -> Tensor:
        return F.cross_entropy(network(images[indices].float() / 255), labels[indices])

    classifier = small_network(images.shape[1], int(labels.max()) + 1, images.device)
    return train_network(classifier, loss, len(images), passes=1)


def train_guesser(low_res: Tensor, labels: Tensor) -> nn.Module:
    """A network that has learned the classes from low-resolution images alone, [N, C, h, w]: what x says of the digit.

    The probability that it gives to the right class, on average, is how often a perfect sampler of p(y | x) would draw
    a digit of that class. Answering with the likeliest class is right more often than that.
    """

    def loss(network: nn.Module, indices: Tensor) -> Tensor:
        return F.cross_entropy(network(low_res[indices]), labels[indices])

    guesser = guessing_network(low_res[0].numel(), int(labels.max()) + 1).to(low_res.device)
    return train_network(guesser, loss, len(low_res), passes=8, batch_size=256, max_rate=0.01)


def small_network(channels: int, outputs: int, device: torch.device, seed: int = 0) -> nn.Module:
    """A convolutional network from [B, channels, H, W] by way of 64 features to [B, outputs]."""
    with seeded(seed):
        layers = []
        for width_in, width in pairwise((channels, 16, 32, 64, 64)):
            layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.ReLU()]
        del layers[-3]  # the last pooling is the average of all pixels
        network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, outputs))
    fastest = torch.channels_last if device.type == "cpu" else torch.contiguous_format  # measured: 1.5 times as fast
    return network.to(device, memory_format=fastest)


def guessing_network(pixels: int, outputs: int) -> nn.Module:
    """A fully connected network from [B, C, h, w] with so many pixels, C · h · w, to [B, outputs]."""
    with seeded(0):
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(pixels), MLP(pixels, [256, 256, outputs]))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights that are made inside are the same every time, and what torch draws elsewhere stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def train_network(
    network: nn.Module, loss: Callable, examples: int, passes: int, batch_size=64, max_rate=0.005, seed=0
) -> nn.Module:
    """The network, trained on loss(network, indices of examples), in evaluation mode.

    The examples come in random order, all of them in each pass, and in the same order every time.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(passes):
        batches += torch.randperm(examples, generator=generator).split(batch_size)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=max_rate, total_steps=len(batches))
    for indices in batches:
        optimizer.zero_grad()
        loss(network, indices).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def predict(network: nn.Module, images: Tensor) -> Tensor:
    """What a network makes of images [N, C, H, W], 100 at a time: more might not fit into memory."""
    return torch.cat([network(batch) for batch in images.split(100)])
