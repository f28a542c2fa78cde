"""How images are judged (the paper's section 4): each metric takes images in [0, 1] and returns one value for each.

The first three compare pixels. The others ask what an image is worth to someone who looks at it. The paper asked people
and a classifier; here it is two small networks. At 32×32 either learns its task in less than a minute on a CPU.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRAIN = 0.1  # standard deviation of the noise in the eyes of the fool rate's judge; images are in [0, 1]


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

    The judge sees x and two candidates, the output and the real image, and says which one is real. A mean of 0.5 says
    that it can't tell. It learns from the first half of the images and is asked about the second, for which values are
    returned. It rates each candidate by itself, so their order can't matter. `grain` is the standard deviation of noise
    in its eyes, new at each look: with 0 it sees what no person sees, such as whether black is 0 or 1 of 255, and is
    hardly ever fooled. All three images are [B, C, H, W] in [0, 1], B at least 2.
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
    return (output > real).float()


def diversity(samples: Tensor) -> Tensor:
    """How much K results for the same x differ, [B, K, C, H, W] in [0, 1]: 0 for a regression; [B].

    The standard deviation of each pixel over the samples, averaged over pixels and channels. Not in the paper.
    """
    return samples.std(dim=1).mean(dim=(1, 2, 3))


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


# ----------------------------------------------------------------------------------------------------------------------
# The final table

COLUMNS = {  # heading, factor, digits
    "psnr": ("PSNR ↑", 1, 2),
    "ssim": ("SSIM ↑", 1, 3),
    "consistency": ("consistency ↓", 1, 1),
    "accuracy": ("digit accuracy ↑", 100, 1),
    "fool_rate": ("fool rate → 50 %", 100, 1),
}


def score(
    images: Tensor,
    reference: Tensor,
    low_res: Tensor,
    context: Tensor,
    labels: Tensor | None = None,
    classifier: nn.Module | None = None,
) -> dict[str, dict | None]:
    """All metrics of images [B, C, H, W] in [0, 1], each as `summarize` gives it, or None where it can't be had.

    That is accuracy without labels and classifier, and the fool rate of fewer than 50 images, which teach a judge
    nothing. The other images are those of the single metrics.
    """

    def mean_of(metric: Callable[[Tensor, Tensor], Tensor], other: Tensor) -> dict:
        parts = zip(images.split(100), other.split(100))  # large images are many bytes
        return summarize(torch.cat([metric(*part) for part in parts]))

    return {
        "psnr": mean_of(psnr, reference),
        "ssim": mean_of(ssim, reference),
        "consistency": mean_of(consistency, low_res),
        "accuracy": summarize(accuracy(images, labels, classifier)) if classifier else None,
        "fool_rate": summarize(fool_rate(images, reference, context), rate=True) if len(images) >= 50 else None,
    }


def summarize(values: Tensor, rate: bool = False) -> dict:
    """The mean of values [N], one per image, and its standard error; of a rate also the 95 % interval (Wilson's).

    What isn't finite, such as the PSNR of equal images, becomes a string, "inf" or "nan", as JSON has no such numbers.
    """
    n, values = len(values), values.cpu().double()
    mean, deviation = values.mean().item(), values.std().item() if n > 1 else math.nan
    summary = {"mean": mean, "standard_error": deviation / math.sqrt(n)}
    if rate:
        z = 1.96
        middle, width = mean + z**2 / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
        low, high = (middle - width) / (1 + z**2 / n), (middle + width) / (1 + z**2 / n)
        summary |= {"low": max(0.0, low), "high": min(1.0, high)}
    return {key: number if math.isfinite(number) else str(number) for key, number in summary.items()}


def format_table(rows: dict[str, dict]) -> str:
    """The final table in Markdown: of each method its "training_steps" and what `score` says."""
    lines = [["method", "steps", *(heading for heading, _, _ in COLUMNS.values())], ["---"] * (2 + len(COLUMNS))]
    for method, row in rows.items():
        cells = [format_cell(row[key], factor, digits) for key, (_, factor, digits) in COLUMNS.items()]
        lines.append([method, f"{row['training_steps']:,}" if row["training_steps"] else "–", *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def format_cell(summary: dict | None, factor: int = 1, digits: int = 1) -> str:
    """What `summarize` gives, as text: the mean ± its standard error, in per cent with factor 100; "–" for None."""
    if summary is None:
        return "–"
    numbers = {key: f"{factor * float(number):.{digits}f}".replace("inf", "∞") for key, number in summary.items()}
    text = numbers["mean"]
    if numbers["standard_error"] != "nan":
        text += f" ± {numbers['standard_error']}"
    if factor == 100:
        text += " %"
    if "low" in numbers:
        text += f" ({numbers['low']} to {numbers['high']})"
    return text
