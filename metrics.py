"""How images are judged (the paper's section 4). A metric takes images in [0, 1] and returns one value for each.

The first functions compare pixels. The others ask small networks, which learn their task from real images in seconds:
what the digit is, and which of two images is real. The paper asked a ResNet-50 and people.
"""

from collections.abc import Callable
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
    has 0. A ratio of 1 is necessary for good samples, not sufficient: real digits that ignore x have 0.98.
    """
    return (images - others).square().mean(dim=(1, 2, 3))


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of [B, C, H, W]: -10 log10 of the mean squared error; [B].

    Infinite for equal images. It and SSIM favour the blurry regression over SR3; people do not (section 4).
    """
    return -10 * squared_difference(images, reference).log10()


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of [B, C, H, W], at most 1 (equal images); [B].

    The mean over channels and over all Gaussian windows, of 11×11 with σ = 1.5, that lie within the image. Raises
    ValueError for images smaller than the window.
    """
    if min(images.shape[2:]) < 11:
        raise ValueError(f"the images are {list(images.shape)}: SSIM's window needs 11×11 pixels or more")
    x, y = images.cpu().double(), reference.cpu().double()  # differences of squares: float32 is too short
    local_means = gaussian_blur(torch.cat([x, y, x * x, y * y, x * y]), 11, 1.5)[..., 5:-5, 5:-5]
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = local_means.chunk(5)  # [B, C, H - 10, W - 10] each
    variance_x, variance_y, covariance = mean_xx - mean_x**2, mean_yy - mean_y**2, mean_xy - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    similarity = similarity * (2 * covariance + c2) / (variance_x + variance_y + c2)
    return similarity.mean(dim=(1, 2, 3)).float().to(images.device)


def consistency(images: Tensor, low_res: Tensor) -> Tensor:
    """Mean squared difference, on the 0…255 scale, of images [B, C, H, W], shrunk again, and low_res [B, C, h, w]; [B].

    0 is perfect. (Section 4 has another scale.)
    """
    shrunk = F.interpolate(images, low_res.shape[2:], mode="bicubic", antialias=True).clamp(0, 1)
    return squared_difference(255 * shrunk, 255 * low_res)


def color_shift(images: Tensor, reference: Tensor) -> Tensor:
    """How far each channel's mean is from the reference's, on the 0…255 scale, averaged over channels; [B]."""
    return 255 * (images - reference).mean(dim=(2, 3)).abs().mean(dim=1)


def accuracy(images: Tensor, labels: Tensor, classifier: nn.Module) -> Tensor:
    """1.0 where a classifier of `train_classifier` sees the right class, else 0.0 (the paper's Table 3); [B]."""
    return (in_parts(classifier, images).argmax(dim=1) == labels).float()


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """Fréchet distance between two sets of features, [N, D] and [M, D], each taken as a Gaussian.

    |μ - ν|² + tr(A + B - 2 √(A B)) with the means μ, ν and covariances A, B. Of an Inception network's features this is
    FID; of a small digit classifier's it compares with no published figure. It falls as N grows, so compare sets of one
    size. NaN for a set of one, which has no covariance.
    """
    if min(len(features), len(others)) < 2:
        return float("nan")
    (mu, a), (nu, b) = ((f.mean(0), f.T.cov()) for f in (features.double().cpu(), others.double().cpu()))
    overlap = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()  # tr √(A B)
    return ((mu - nu).square().sum() + a.trace() + b.trace() - 2 * overlap).item()


def fool_rate(images: Tensor, reference: Tensor, context: Tensor, grain: float = 0.1) -> Tensor:
    """The paper's human test, done by a network: 1.0 where it takes an output for real, else 0.0; [B - B // 2].

    This is a classifier two-sample test (Lopez-Paz and Oquab, arXiv 1610.06545). The judge rates the output and the
    truth, each by itself with x beside it, and takes the higher rated one for real; a tie counts as 0.5. A mean of 0.5
    says that it can't tell them apart. It learns from the first half of the images and is asked about the second.
    `grain` is the standard deviation of noise in its eyes, new at each look: with 0 it sees what no person sees, such
    as whether black is 0 or 1 of 255, and is hardly ever fooled. All three are [B, C, H, W], B at least 2.
    """
    half = len(images) // 2
    generator = torch.Generator().manual_seed(0)

    def ratings(judge: nn.Module, indices: Tensor) -> tuple[Tensor, Tensor]:
        """How real the outputs and the real images look to the judge; [B] each."""
        candidates = torch.cat([images[indices], reference[indices]])  # [2B, C, H, W]
        candidates = candidates + grain * torch.randn(candidates.shape, generator=generator).to(images.device)
        return judge(torch.cat([context[indices].repeat(2, 1, 1, 1), candidates], dim=1)).flatten().chunk(2)

    def loss(judge: nn.Module, indices: Tensor) -> Tensor:
        output, real = ratings(judge, indices)
        return F.softplus(output - real).mean()  # -log of the probability that it says right

    judge = train_network(lambda: small_network(2 * images.shape[1], 1).to(images.device), loss, half, passes=20)
    with torch.no_grad():
        asked = torch.arange(half, len(images)).split(250)
        output, real = map(torch.cat, zip(*(ratings(judge, indices) for indices in asked)))
    return (output > real).float() + 0.5 * (output == real).float()


# The networks that judge ----------------------------------------------------------------------------------------------


def train_classifier(images: Tensor, labels: Tensor) -> nn.Module:
    """A small network that has learned the classes of real images, uint8 [N, C, H, W]; labels int64 [N] from 0.

    It sees each image once. Its features are what it computes before its last layer: `classifier[:-1]`, [B, 64].
    """

    def loss(network: nn.Module, indices: Tensor) -> Tensor:
        return F.cross_entropy(network(images[indices].float() / 255), labels[indices])

    classes = int(labels.max()) + 1
    return train_network(lambda: small_network(images.shape[1], classes).to(images.device), loss, len(images), passes=1)


def train_guesser(low_res: Tensor, labels: Tensor) -> nn.Module:
    """A network that has learned the classes from low-resolution images alone, [N, C, h, w]: what x says of the digit.

    The probability that it gives to the right class, on average, is how often a perfect sampler of p(y | x) would draw
    a digit of that class. Answering with the likeliest class is right more often than that.
    """
    classes, size = int(labels.max()) + 1, low_res[0].numel()

    def build() -> nn.Module:
        layers = nn.Flatten(), nn.BatchNorm1d(size), MLP(size, [256, 256, classes])
        return nn.Sequential(*layers).to(low_res.device)

    def loss(network: nn.Module, indices: Tensor) -> Tensor:
        return F.cross_entropy(network(low_res[indices]), labels[indices])

    return train_network(build, loss, len(low_res), passes=8)


def small_network(channels: int, outputs: int) -> nn.Module:
    """A convolutional network from [B, channels, H, W] by way of 64 features to [B, outputs]."""
    layers = []
    for width_in, width in pairwise((channels, 16, 32, 64, 64)):
        layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, outputs))


def train_network(build: Callable[[], nn.Module], loss: Callable, examples: int, passes: int) -> nn.Module:
    """The network that `build` makes, trained on loss(network, indices of examples), in evaluation mode.

    The examples come in random order, all of them in each pass. Weights and order are the same every time, and what
    torch draws elsewhere stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = build()
        batches = [batch for _ in range(passes) for batch in torch.randperm(examples).split(64)]
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.005, total_steps=len(batches))
    for indices in batches:
        optimizer.zero_grad()
        loss(network, indices).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def in_parts(function: Callable[..., Tensor], *images: Tensor) -> Tensor:
    """A network or a metric of images [N, C, H, W], 100 at a time: more might not fit into memory."""
    return torch.cat([function(*parts) for parts in zip(*(tensor.split(100) for tensor in images))])
