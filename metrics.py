"""How images are judged (the paper's section 4). A metric takes images in [0, 1] and returns one value for each.

The first functions compare pixels. The others ask small networks, which learn their task from real images in seconds:
what the digit is, and which of two images is real. The paper asked a ResNet-50 and people.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

GRAIN = 0.1  # standard deviation of the noise in the eyes of the fool rate's judge; images are in [0, 1]


def squared_difference(images: Tensor, others: Tensor) -> Tensor:
    """Mean squared difference of [B, C, H, W] and others of the same shape; [B].

    Of two samples for the same x it is their spread, of a sample and the truth the error. For a perfect sampler of
    p(y | x) both are twice the variance of p(y | x) on average, so spread / error is 1; a regression, which has one
    answer only, has 0. That is necessary for good samples, not sufficient: real digits that ignore x have 0.98.
    """
    return (images - others).square().mean(dim=(1, 2, 3))


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of [B, C, H, W]: -10 log10 of the mean squared error; [B].

    Infinite for equal images. It and SSIM favour the blurry regression over SR3; people do not (section 4).
    """
    return -10 * squared_difference(images, reference).log10()


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of [B, C, H, W], at most 1 (equal images); [B].

    Gaussian window of 11×11 with σ = 1.5, data range 1; the mean over the windows that lie within the image and over
    channels. Raises ValueError for images smaller than the window.
    """
    if min(images.shape[2:]) < 11:
        raise ValueError(f"the images are {list(images.shape)}: SSIM's window needs 11×11 pixels or more")
    x, y = images.cpu().double(), reference.cpu().double()  # differences of squares: float32 is too short

    def local_mean(values: Tensor) -> Tensor:
        return gaussian_blur(values, 11, 1.5)[..., 5:-5, 5:-5]  # [B, C, H - 10, W - 10]

    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x, variance_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    similarity = similarity * (2 * covariance + c2) / (variance_x + variance_y + c2)
    return similarity.mean(dim=(1, 2, 3)).float().to(images.device)


def consistency(images: Tensor, low_res: Tensor) -> Tensor:
    """Mean squared difference, on the 0…255 scale, of the images, shrunk again, and the low-resolution input; [B].

    `images` are [B, C, H, W], `low_res` [B, C, h, w]; 0 is perfect (section 4, where the scale is another).
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

    |μ - ν|² + tr(A + B - 2 √(A B)) with the means μ, ν and covariances A, B. With the features of an Inception network
    this is FID; with those of a small digit classifier it compares with no published figure. It falls with N towards
    its limit, so compare sets of one size. NaN for a set of one, which has no covariance.
    """
    if min(len(features), len(others)) < 2:
        return float("nan")
    (mu, a), (nu, b) = ((f.mean(0), f.T.cov()) for f in (features.double().cpu(), others.double().cpu()))
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # √A; √A B √A has the eigenvalues of A B
    overlap = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return ((mu - nu).square().sum() + a.trace() + b.trace() - 2 * overlap).item()


def fool_rate(images: Tensor, reference: Tensor, context: Tensor, grain: float = GRAIN) -> Tensor:
    """The paper's human test, done by a network: 1.0 where it takes an output for real, else 0.0; [B - B // 2].

    This is a classifier two-sample test (Lopez-Paz and Oquab, arXiv 1610.06545). The judge sees x and two candidates,
    the output and the truth, rates each by itself, and takes the higher rated one for real. A mean of 0.5 says that it
    can't tell them apart; a tie counts as 0.5. It learns from the first half of the images and is asked about the
    second. `grain` is the standard deviation of noise in its eyes, new at each look: with 0 it sees what no person
    sees, such as whether black is 0 or 1 of 255, and is hardly ever fooled. All three are [B, C, H, W], B at least 2.
    """
    half, device = len(images) // 2, images.device
    generator = torch.Generator().manual_seed(0)

    def ratings(judge: nn.Module, indices: Tensor) -> tuple[Tensor, Tensor]:
        """How real the outputs and the real images look to the judge; [B] each."""
        candidates = torch.cat([images[indices], reference[indices]])  # [2B, C, H, W]
        candidates = candidates + grain * torch.randn(candidates.shape, generator=generator).to(device)
        return judge(torch.cat([context[indices].repeat(2, 1, 1, 1), candidates], dim=1)).flatten().chunk(2)

    def loss(judge: nn.Module, indices: Tensor) -> Tensor:
        output, real = ratings(judge, indices)
        return F.softplus(output - real).mean()  # -log of the probability that it says right

    judge = train_network(lambda: small_network(2 * images.shape[1], 1), loss, half, passes=20, device=device)
    with torch.no_grad():
        asked = torch.arange(half, len(images), device=device).split(250)
        output, real = map(torch.cat, zip(*(ratings(judge, indices) for indices in asked)))
    return (output > real).float() + 0.5 * (output == real).float()


# ----------------------------------------------------------------------------------------------------------------------
# The networks that judge


def train_classifier(images: Tensor, labels: Tensor) -> nn.Module:
    """A small network that has learned the classes of real images, uint8 [N, C, H, W]; labels int64 [N] from 0.

    It sees each image once. Its features are what it computes before its last layer: `classifier[:-1]`, [B, 64].
    """

    def loss(network: nn.Module, indices: Tensor) -> Tensor:
        return F.cross_entropy(network(images[indices].float() / 255), labels[indices])

    classes = int(labels.max()) + 1
    return train_network(lambda: small_network(images.shape[1], classes), loss, len(images), 1, images.device)


def train_guesser(low_res: Tensor, labels: Tensor) -> nn.Module:
    """A network that has learned the classes from low-resolution images alone, [N, C, h, w]: what x says of the digit.

    The probability p that it gives to the right class, on average, is how often a perfect sampler of p(y | x) would
    draw a digit of that class. Answering with the likeliest class is right more often than that.
    """
    classes, size = int(labels.max()) + 1, low_res[0].numel()

    def build() -> nn.Module:
        layers = [nn.Linear(size, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, classes)]
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(size), *layers)

    def loss(network: nn.Module, indices: Tensor) -> Tensor:
        return F.cross_entropy(network(low_res[indices]), labels[indices])

    return train_network(build, loss, len(low_res), 8, low_res.device)


def small_network(channels: int, outputs: int) -> nn.Module:
    """A convolutional network from [B, channels, H, W] by way of 64 features to [B, outputs]."""
    layers, widths, halve = [], (channels, 16, 32, 64, 64), nn.MaxPool2d(2)
    for width_in, width, end in zip(widths, widths[1:], (halve, halve, halve, nn.AdaptiveAvgPool2d(1))):
        layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), end]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, outputs))


def train_network(
    build: Callable[[], nn.Module],
    loss: Callable[[nn.Module, Tensor], Tensor],
    examples: int,
    passes: int,
    device: torch.device,
) -> nn.Module:
    """The network that `build` makes, trained on loss(network, indices of examples), in evaluation mode.

    The examples come in random order, all of them in each pass. Weights and order are the same every time, and what
    torch draws elsewhere stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = build().to(device)
        batches = [batch for _ in range(passes) for batch in torch.randperm(examples).split(64)]
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.005, total_steps=len(batches))
    for indices in batches:
        optimizer.zero_grad()
        loss(network, indices.to(device)).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def in_parts(network: nn.Module, images: Tensor) -> Tensor:
    """network(images), 500 at a time."""
    return torch.cat([network(part) for part in images.split(500)])
