"""How images are judged (the paper's section 4). A metric takes images in [0, 1] and returns one value for each.

The first functions compare pixels. The next ask small networks, which learn their task from real images in seconds:
what the digit is, and which of two images is real. The paper asked a ResNet-50 and people. `frechet_distance` and
`calibration` judge a whole set of images.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import MLP
from torchvision.transforms.functional import gaussian_blur

from support.machine import choose_layout


def squared_difference(images, others):
    """Mean squared difference of [B, C, H, W] and others of the same shape; [B].

    Between two samples for the same x it is called spread, between a sample and the truth error. For a perfect sampler
    both are twice the variance of p(y | x) on average, so spread / error is 1; a regression, which has one answer only,
    has 0. A ratio of 1 is necessary for good samples, not sufficient: real digits drawn without regard to x have it.
    """
    return (images - others).square().mean(dim=(1, 2, 3))


def psnr(images, reference):
    """Peak signal-to-noise ratio in dB of [B, C, H, W]: -10 log10 of the mean squared error; [B].

    Infinite for equal images. It and SSIM favour the blurry regression over SR3; people do not (section 4).
    """
    return -10 * squared_difference(images, reference).log10()


def ssim(images, reference):
    """Structural similarity (Wang et al. 2004) of [B, C, H, W], at most 1 (equal images); [B].

    The mean over channels and over all Gaussian windows, of 11×11 with σ = 1.5, that lie within the image, so H and W
    are at least 11. In float64, on the CPU: differences of squares are too fine for float32.
    """

    def local_mean(values):
        return gaussian_blur(values, 11, 1.5)[..., 5:-5, 5:-5]  # [B, C, H - 10, W - 10]

    x, y = images.cpu().double(), reference.cpu().double()
    mean_x, mean_y = local_mean(x), local_mean(y)
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    covariance, variances = local_mean(x * y) - product, local_mean(x**2 + y**2) - squares
    luminance = (2 * product + 1e-4) / (squares + 1e-4)  # the constants are 0.01² and 0.03²
    return (luminance * (2 * covariance + 9e-4) / (variances + 9e-4)).mean(dim=(1, 2, 3))


def consistency(images, low_res):
    """Mean squared difference, on the 0…255 scale, of images [B, C, H, W], shrunk again, and low_res [B, C, h, w]; [B].

    low_res is in [0, 1], too. 0 is perfect. (Section 4 has another scale.)
    """
    shrunk = F.interpolate(images, low_res.shape[2:], mode="bicubic", antialias=True).clamp(0, 1)
    return squared_difference(255 * shrunk, 255 * low_res)


def color_shift(images, reference):
    """How far each channel's mean is from the reference's, on the 0…255 scale, averaged over channels; [B]."""
    return 255 * (images - reference).mean(dim=(2, 3)).abs().mean(dim=1)


def accuracy(images, labels, classifier):
    """1.0 where a classifier of `train_classifier` sees the right class, else 0.0 (the paper's Table 3); [B]."""
    return (predict(classifier, images).argmax(dim=1) == labels).float()


def calibration(classes, labels):
    """Do samples doubt where they should? Of the samples whose class a share s shows, a share s should be right.

    `classes` are int64 [N, K], those of K samples for the same x; labels are [N]. Each sample is a prediction, and the
    share of the K that show its class is its confidence. Returns the expected calibration error (Guo et al., arXiv
    1706.04599), a scalar, and the bins that it is made of, [bins, 3]: mean share, how often the samples are right,
    their number. The bins are [0, 0.1), [0.1, 0.2), … and {1}, without empty ones; the error is the mean over samples
    of their bin's |share - how often|. A regression is always sure, so its error is 1 - accuracy. A perfect sampler's
    is above 0, too, as its shares are those of K samples and its frequencies those of N images: compare with it.
    """
    agreeing = (classes[:, :, None] == classes[:, None]).sum(dim=2).flatten()  # of the K, with each sample; [N · K]
    share = agreeing / classes.shape[1]
    right = (classes == labels[:, None]).float().flatten()
    members = F.one_hot(10 * agreeing // classes.shape[1], 11).float()  # [N · K, 11]
    number = members.sum(dim=0)
    bins = torch.stack([share @ members / number, right @ members / number, number], dim=1)[number > 0]
    return ((share - right) @ members).abs().sum() / len(share), bins


def frechet_distance(features, others):
    """Fréchet distance between two sets of features, [N, D] and [M, D], each taken as a Gaussian.

    |μ - ν|² + tr(A + B - 2 √(A B)) with the means μ, ν and covariances A, B. Of an Inception network's features this is
    FID; of a small digit classifier's it can't be compared with published figures. It falls as N grows, so compare sets
    of one size; N and M are at least 2.
    """
    features, others = features.cpu().double(), others.cpu().double()  # an Apple GPU has no float64
    a, b = features.T.cov(), others.T.cov()
    overlap = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()  # tr √(A B)
    return (features.mean(0) - others.mean(0)).square().sum() + a.trace() + b.trace() - 2 * overlap


def fool_rate(images, reference, context, seed=0, noise=0.1):
    """The paper's human test, done by a network: 1.0 where it takes an output for real, else 0.0; [B], on the CPU.

    This is a classifier two-sample test (Lopez-Paz and Oquab, arXiv 1610.06545). The judge rates the output and the
    truth, each by itself with x beside it, and takes the higher rated one for real; a tie counts as 0.5. A mean of 0.5
    says that it can't tell them apart. It learns from a random half of the images and is asked about the others; the
    first have NaN. The seed decides the half and whatever else is luck: judges of several seeds tell how much that is.
    `noise` is the standard deviation of noise in its eyes, new at each look: with 0 it sees what no person sees, such
    as whether black is 0 or 1 of 255, and is hardly ever fooled. The images, the reference and the context are
    [B, C, H, W] each, B at least 2.
    """
    generator = torch.Generator().manual_seed(seed)
    learned, asked = torch.randperm(len(images), generator=generator).tensor_split([len(images) // 2])

    def lead(indices):
        """How much more real the outputs look to the judge than the real images; [B, 1]."""
        candidates = torch.cat([images[indices], reference[indices]])  # [2B, C, H, W]
        candidates += noise * torch.randn(candidates.shape, generator=generator).to(images.device)
        output, real = judge(torch.cat([context[indices].repeat(2, 1, 1, 1), candidates], dim=1)).chunk(2)
        return output - real

    judge = small_network(2 * images.shape[1], 1, images.device, seed)
    passes = max(10, 1200 // len(learned))  # few images teach it something, too, if it sees them often
    train_network(  # the loss is -log of the probability that it says right
        judge, lambda batch: F.softplus(lead(learned[batch])).mean(), len(learned), passes, batch_size=32, seed=seed
    )
    verdicts = torch.full((len(images),), torch.nan)
    with torch.no_grad():
        for indices in asked.split(250):
            verdicts[indices] = (lead(indices)[:, 0].sign().cpu() + 1) / 2
    return verdicts


# The networks that judge ----------------------------------------------------------------------------------------------


def train_classifier(images, labels):
    """A small network that has learned the classes of real images, [N, C, H, W] in [0, 1]; labels int64 [N] from 0.

    It sees each image once. Its features are what it computes before its last layer: `classifier[:-1]`, [B, 64].
    """
    classifier = small_network(images.shape[1], int(labels.max()) + 1, images.device)
    return train_network(
        classifier, lambda batch: F.cross_entropy(classifier(images[batch]), labels[batch]), len(images), 1
    )


def train_guesser(low_res, labels):
    """A network that has learned the classes from low-resolution images alone, [N, C, h, w]: what x says of the digit.

    The probability that it gives to the right class, on average, is how often a perfect sampler of p(y | x) would draw
    a digit of that class. Answering with the likeliest class is right more often than that.
    """
    torch.manual_seed(0)
    pixels, outputs = low_res[0].numel(), int(labels.max()) + 1
    guesser = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(pixels), MLP(pixels, [256, 256, outputs])).to(low_res.device)
    return train_network(
        guesser, lambda batch: F.cross_entropy(guesser(low_res[batch]), labels[batch]), len(low_res),
        passes=8, batch_size=256, max_rate=0.01
    )  # fmt: skip


def small_network(channels, outputs, device, seed=0):
    """A convolutional network from [B, channels, H, W] by way of 64 features to [B, outputs]."""
    torch.manual_seed(seed)
    layers = []
    for width_in, width in pairwise((channels, 16, 32, 64, 64)):
        layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.ReLU()]
    del layers[-3]  # the last pooling is the average of all pixels
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, outputs))
    return network.to(device, memory_format=choose_layout(device, "float32"))


def train_network(network, loss, examples, passes, batch_size=64, max_rate=0.005, seed=0):
    """The network, trained on loss(indices of examples), in evaluation mode.

    All examples come in each pass, in a random order that the seed decides.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = [
        batch for _ in range(passes) for batch in torch.randperm(examples, generator=generator).split(batch_size)
    ]
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=max_rate, total_steps=len(batches))
    for batch in batches:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def predict(network, images):
    """What a network makes of images [N, C, H, W], 100 at a time: more might not fit into memory."""
    return torch.cat([network(batch) for batch in images.split(100)])
