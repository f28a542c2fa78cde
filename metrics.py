"""How images are judged (the paper's section 4): each metric takes images in [0, 1] and returns one value per image.

The first three compare pixels. The others ask what an image is worth to someone who looks at it, which the paper had
people answer, and a classifier; here two small networks do, that this module trains in less than a minute each.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


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


def train_classifier(images: Tensor, labels: Tensor, seed: int = 0) -> nn.Module:
    """Teach a small network the classes of real images: uint8 [N, C, H, W], labels int64 [N] from 0.

    Sees every image once. Measured on MNIST enlarged to 32×32: 99.0 % of the test images right, after 20 seconds on
    two CPU cores.
    """

    def loss(network: nn.Module, indices: Tensor) -> Tensor:
        return F.cross_entropy(network(images[indices].float() / 255), labels[indices])

    classes = int(labels.max()) + 1
    return train_network(images.shape[1], classes, loss, len(images), passes=1, seed=seed, device=images.device)


def fool_rate(images: Tensor, reference: Tensor, context: Tensor, seed: int = 0) -> Tensor:
    """The paper's human test, done by a network: 1.0 where it takes an output for real, else 0.0; [B - B // 2].

    The judge sees x and two candidates, the output and the real image, in random order, and says which is the real one.
    It learns from the first half of the images and is asked about the second. A mean of 0.5 says that it can't tell.
    All three are [B, C, H, W] in [0, 1], B at least 2.
    """
    half, device = len(images) // 2, images.device
    order = torch.rand(len(images), generator=torch.Generator().manual_seed(seed))
    real_is_second = order.to(device) < 0.5  # [B]
    swap = rearrange(real_is_second, "b -> b 1 1 1")
    candidates = torch.cat([images.where(swap, reference), reference.where(swap, images)], dim=1)  # [B, 2C, H, W]

    def prefers_second(judge: nn.Module, indices: Tensor) -> Tensor:
        """The log odds that the second candidate is the real one; [B]. The judge scores one after the other."""
        pairs = rearrange(candidates[indices], "b (two c) h w -> (two b) c h w", two=2)
        scores = judge(torch.cat([context[indices].repeat(2, 1, 1, 1), pairs], dim=1))  # [2B, 1]
        first, second = scores.flatten().chunk(2)
        return second - first

    def loss(judge: nn.Module, indices: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(prefers_second(judge, indices), real_is_second[indices].float())

    judge = train_network(2 * images.shape[1], 1, loss, half, passes=20, seed=seed, device=device)
    asked = torch.arange(half, len(images), device=device)
    with torch.no_grad():
        says_second = torch.cat([prefers_second(judge, indices) for indices in asked.split(250)]) > 0
    return (says_second != real_is_second[half:]).float()


def diversity(samples: Tensor) -> Tensor:
    """How much K results for the same x differ, [B, K, C, H, W] in [0, 1]: 0 for a regression; [B].

    The standard deviation of each pixel over the samples, averaged over pixels and channels.
    """
    return samples.std(dim=1).mean(dim=(1, 2, 3))


def train_network(
    channels: int,
    outputs: int,
    loss: Callable[[nn.Module, Tensor], Tensor],
    examples: int,
    passes: int,
    seed: int,
    device: torch.device,
) -> nn.Module:
    """A small network from [B, channels, H, W] to [B, outputs], trained on loss(network, indices of examples).

    The examples come in random order, all of them in each pass. The seed decides everything, and what torch draws
    elsewhere stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
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


def judge(
    images: Tensor,
    reference: Tensor,
    low_res: Tensor,
    context: Tensor,
    labels: Tensor | None = None,
    classifier: nn.Module | None = None,
) -> dict[str, dict | None]:
    """All metrics of images [B, C, H, W] in [0, 1], each as `summarize` gives it; None where it can't be had.

    The other images are as for the single metrics; without classifier and labels there is no accuracy, and without
    two images, one for the judge to learn from and one to be asked about, no fool rate.
    """
    return {
        "psnr": summarize(psnr(images, reference)),
        "ssim": summarize(ssim(images, reference)),
        "consistency": summarize(consistency(images, low_res)),
        "accuracy": summarize(accuracy(images, labels, classifier)) if classifier else None,
        "fool_rate": summarize(fool_rate(images, reference, context), rate=True) if len(images) > 1 else None,
    }


def summarize(values: Tensor, rate: bool = False) -> dict:
    """The mean of values [N], one per image, and its standard error; of a rate also the 95 % interval (Wilson's).

    None in place of a number that isn't finite, as JSON has none: the PSNR of equal images, the error of one value.
    """
    n, values = len(values), values.double()
    mean, deviation = values.mean().item(), values.std().item() if n > 1 else math.nan
    summary = {"mean": mean, "standard_error": deviation / math.sqrt(n)}
    summary = {key: number if math.isfinite(number) else None for key, number in summary.items()}
    if rate:
        z = 1.96
        middle, width = mean + z**2 / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
        summary["interval_95"] = [(middle - width) / (1 + z**2 / n), (middle + width) / (1 + z**2 / n)]
    return summary


def format_table(rows: dict[str, dict]) -> str:
    """The final table in Markdown: of each method its "training_steps" and what `judge` says."""
    lines = [["method", "steps", *(heading for heading, _, _ in COLUMNS.values())], ["---"] * (2 + len(COLUMNS))]
    for method, row in rows.items():
        cells = [method, f"{row['training_steps']:,}" if row["training_steps"] else "–"]
        for key, (_, factor, digits) in COLUMNS.items():
            if row[key] is None:
                cells.append("–")
                continue
            mean, error, *interval = row[key].values()
            cell = "∞" if mean is None else f"{factor * mean:.{digits}f}"
            cell += "" if error is None else f" ± {factor * error:.{digits}f}"
            cell += " %" if factor == 100 else ""
            for low, high in interval:
                cell += f" ({factor * low:.{digits}f} to {factor * high:.{digits}f})"
            cells.append(cell)
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
