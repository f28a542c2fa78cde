"""How images are judged (the paper's section 4): each metric takes images in [0, 1] and returns one value for each.

The first four compare pixels. The others ask what an image is worth to someone who looks at it. The paper asked people
and a classifier; here it is two small networks, which learn their task from real images in about a minute on a CPU.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRAIN = 0.1  # standard deviation of the noise in the eyes of the fool rate's judge; images are in [0, 1]


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of [B, C, H, W] in [0, 1]: -10 log10 of the mean squared error; [B].

    Infinite for equal images. It and SSIM favour the blurry regression baseline over SR3; people do not (section 4).
    """
    return -10 * squared_difference(images, reference).log10()


def squared_difference(images: Tensor, others: Tensor) -> Tensor:
    """Mean squared difference of [B, C, H, W] and others of the same shape; [B].

    Of two samples for the same x it is their spread, of a sample and the reference the error. A perfect sampler of
    p(y | x) has as much of one as of the other, on average: both are twice the posterior variance. A regression has no
    spread. Their ratio is the spread-skill ratio of ensemble forecasts; it needs no judge.
    """
    return (images - others).square().mean(dim=(1, 2, 3))


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


def accuracy(images: Tensor, labels: Tensor, classifier: nn.Module) -> Tensor:
    """1.0 where a classifier of `train_classifier` sees the right class, else 0.0 (the paper's Table 3); [B].

    `images` are [B, C, H, W] in [0, 1], `labels` int64 [B].
    """
    with torch.no_grad():
        logits = torch.cat([classifier(part) for part in images.split(500)])  # [B, classes]
    return (logits.argmax(dim=1) == labels).float()


def train_classifier(images: Tensor, labels: Tensor) -> nn.Module:
    """Teach a small network the classes of real images: uint8 [N, C, H, W], labels int64 [N] from 0.

    Sees every image once. Measured on MNIST enlarged to 32×32: 99.0 % of the test images right, after 20 seconds on
    two CPU cores.
    """

    def loss(network: nn.Module, indices: Tensor) -> Tensor:
        return F.cross_entropy(network(images[indices].float() / 255), labels[indices])

    classes = int(labels.max()) + 1
    return train_network(images.shape[1], classes, loss, len(images), passes=1, device=images.device)


def fool_rate(images: Tensor, reference: Tensor, context: Tensor, grain: float = GRAIN) -> Tensor:
    """The paper's human test, done by a network: 1.0 where it takes an output for real, else 0.0; [B - B // 2].

    That is a classifier two-sample test (Lopez-Paz and Oquab, arXiv 1610.06545). The judge sees x and two candidates,
    the output and the real image, and says which one is real. A mean of 0.5 says that it can't tell; a tie counts as
    0.5. It learns from the first half of the images and is asked about the second, for which values are returned. It
    rates each candidate by itself, so their order can't matter. `grain` is the standard deviation of noise in its eyes,
    new at each look: with 0 it sees what no person sees, such as whether black is 0 or 1 of 255, and is hardly ever
    fooled. All three images are [B, C, H, W] in [0, 1], B at least 2.
    """
    half, device = len(images) // 2, images.device
    generator = torch.Generator().manual_seed(0)

    def realness(judge: nn.Module, indices: Tensor) -> tuple[Tensor, Tensor]:
        """How real the outputs and the real images look to the judge; [B] each."""
        candidates = torch.cat([images[indices], reference[indices]])  # [2B, C, H, W]
        candidates = candidates + grain * torch.randn(candidates.shape, generator=generator).to(device)
        return judge(torch.cat([context[indices].repeat(2, 1, 1, 1), candidates], dim=1)).flatten().chunk(2)

    def loss(judge: nn.Module, indices: Tensor) -> Tensor:
        output, real = realness(judge, indices)
        return F.softplus(output - real).mean()  # -log of the probability that it says right

    judge = train_network(2 * images.shape[1], 1, loss, half, passes=20, device=device)
    with torch.no_grad():
        asked = torch.arange(half, len(images), device=device).split(250)
        output, real = map(torch.cat, zip(*(realness(judge, indices) for indices in asked)))
    return (output > real).float() + 0.5 * (output == real).float()


def train_network(
    channels: int,
    outputs: int,
    loss: Callable[[nn.Module, Tensor], Tensor],
    examples: int,
    passes: int,
    device: torch.device,
) -> nn.Module:
    """A small network from [B, channels, H, W] to [B, outputs], trained on loss(network, indices of examples).

    The examples come in random order, all of them in each pass. Weights and order are the same every time, and what
    torch draws elsewhere stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layers = []
        for width_in, width, end in (
            (channels, 16, nn.MaxPool2d(2)),
            (16, 32, nn.MaxPool2d(2)),
            (32, 64, nn.MaxPool2d(2)),
            (64, 64, nn.AdaptiveAvgPool2d(1)),
        ):
            layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), end]
        network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, outputs)).to(device)
        batches = [batch for _ in range(passes) for batch in torch.randperm(examples).split(64)]
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.005, total_steps=len(batches))
    for indices in batches:
        optimizer.zero_grad()
        loss(network, indices.to(device)).backward()
        optimizer.step()
        schedule.step()
    return network.eval()
