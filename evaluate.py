"""Judges trained models on test images, as the paper's section 4 does: `python evaluate.py CHECKPOINT…`

    python evaluate.py output/reference/8x/sr3.pt output/reference/8x/regression.pt --output_dir output/8x
    python evaluate.py output/checkpoint.pt --num_images 200 --sampling_steps 100

Takes checkpoints of SR3 and of the regression, of one data set, in any order. Prints a table, and writes to
--output_dir results.md, the table with standard errors, comparison.png, samples for eight images from ambiguous to
clear, and the networks that judge, for the next time.
"""

import hashlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from support.data import load_data
from support.errors import InputError, Parser, one_line_errors
from support.machine import choose_device
from support.output import check_writable, failures_noted, load_networks, save_checkpoint, write_atomically
from support.scores import Score, fooled, format_table, jackknife, mean_of
from support.settings import HERE, check_together, number_reader

import torch
from PIL import Image
from torch import Tensor, nn

import metrics
from sr3 import SR3, Regression
from utils import downsample, load_model, make_pair, super_resolve, to_float, to_unit, upsample
from utils import picture_of_columns, save_picture


@dataclass
class HeldOut:
    """The N images that models are judged by, out of M in the test set, and what is known of them."""

    truth: Tensor  # [N, C, H, W] in [0, 1]
    low_res: Tensor  # [N, C, h, w] in [-1, 1]
    context: Tensor  # x, [N, C, H, W] in [-1, 1]
    seeds: Tensor  # int64 [N]: each image's number in the test set
    total: int  # M: seeds + M are other seeds, and no other image's
    labels: Tensor | None = None  # int64 [N]; without labels there is none of what follows
    classifier: nn.Module | None = None
    features: Tensor | None = None  # [M, 64]: the classifier's, of all real test images
    guess: Tensor | None = None  # [N, classes]: p(class | x)


@one_line_errors("give a smaller --num_images")
def main(arguments: list[str] | None = None) -> None:
    parser, above_0 = Parser(__doc__), number_reader(int, zero_allowed=False)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="of train_mnist.py, or shipped")
    parser.add_argument("--num_images", type=above_0, default=1000, help="test images to judge by; default: 1000")
    parser.add_argument("--sampling_steps", type=above_0, help="refinement steps; default: those of the checkpoint")
    parser.add_argument("--data_dir", default=HERE / "data", help="where data sets are; default: data")
    parser.add_argument("--output_dir", default=HERE / "output", help="where the table goes; default: output")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first of them that can compute")
    flags = parser.parse_intermixed_args(arguments)
    device, output_dir = choose_device(flags.device), Path(flags.output_dir)
    models = load_models(flags.checkpoints, device, flags.sampling_steps)
    config = next(iter(models.values())).config
    for name in ("results.md", "comparison.png"):
        check_writable(output_dir / name)  # now, not after minutes

    (images, labels), (test_images, test_labels) = load_data(config, flags.data_dir)
    chosen = torch.randperm(len(test_images), generator=torch.Generator().manual_seed(0))[: flags.num_images]
    high_res, low_res, context = make_pair(test_images[chosen].to(device), config.low_res_size)
    test = HeldOut(to_unit(high_res), low_res, context, chosen, total=len(test_images))
    if labels is not None:  # the networks that judge have something to learn
        test.labels = test_labels[chosen].to(device)
        test.classifier, guesser = find_judges(output_dir, config, images, labels, device)
        test.features = metrics.predict(test.classifier[:-1], test_images.to(device) / 255)
        test.guess = metrics.predict(guesser, to_unit(low_res)).softmax(dim=1)

    real = "real digits" if config.dataset in ("mnist", "digits") else "real images"
    bicubic = (255 * to_unit(context)).round() / 255
    rows = {real: score(test.truth, test), "bicubic": score(bicubic, test)}
    for name, model in models.items():
        first = second = super_resolve(model, low_res, test.seeds.tolist())
        if isinstance(model, SR3):  # a regression has one answer only
            second = super_resolve(model, low_res, (test.seeds + test.total).tolist())
        rows[name] = score(first, test, second)
    rows["a perfect sampler"] = perfect_sampler(test, rows)

    trained = ", ".join(f"{name}: {model.step:,} training steps" for name, model in models.items())
    sizes = f"{config.low_res_size}×{config.low_res_size} → {config.image_size}×{config.image_size}"
    note = f"\n{len(chosen):,} test images of {config.dataset}, {sizes}. {trained}.\n"
    print(format_table(rows) + note, end="", flush=True)  # first: what follows may fail
    failures = []
    with failures_noted(failures):
        write_atomically(output_dir / "results.md", (format_table(rows, with_errors=True) + note).encode())
    if "SR3" in models:
        picture = compare(models, test)
        with failures_noted(failures):
            save_picture(output_dir / "comparison.png", picture)
    if failures:
        sys.exit(2)


def load_models(paths: list[str], device: torch.device, steps: int | None) -> dict[str, SR3 | Regression]:
    """The models by the names of their rows, regressions first. Raises InputError where they are of different data."""
    regressions, samplers, wanted = {}, {}, {}
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"{path} is given twice; give each checkpoint once")
        model = load_model(path, device)
        model.config.sampling_steps = steps or model.config.sampling_steps
        check_together(model.config)
        for setting in ("dataset", "image_size", "low_res_size", "channels"):
            value = getattr(model.config, setting)
            if value != wanted.setdefault(setting, value):
                values = f"{setting} is {value} in {path}, {wanted[setting]} in {paths[0]}"
                raise InputError(f"{values}: give checkpoints of one data set")
        name, alike = ("SR3", samplers) if isinstance(model, SR3) else ("regression", regressions)
        alike[f"{name} ({path})" if name in alike else name] = model
    return regressions | samplers


def find_judges(folder: Path, config: SimpleNamespace, images: Tensor, labels: Tensor, device: torch.device):
    """The classifier and the guesser for training images, uint8 [N, C, H, W], and labels, [N], both on the CPU.

    They are read from a file in the folder, named by data and settings. Without one of these very images, they are
    trained and written there; if that fails, a line says so.
    """
    data = f"{config.dataset}-{config.channels}x{config.low_res_size}-{config.image_size}-{len(images)}"
    path = folder / f"judges-{data}.pt"
    data += hashlib.sha256(images.numpy()).hexdigest() + hashlib.sha256(labels.numpy()).hexdigest()
    classes = int(labels.max()) + 1
    classifier = metrics.small_network(config.channels, classes, device)
    guesser = metrics.guessing_network(config.channels * config.low_res_size**2, classes).to(device)
    if load_networks(path, data, {"classifier": classifier, "guesser": guesser}):
        print(f"judges read from {path}; delete it to train them again", flush=True)
        return classifier.eval(), guesser.eval()
    classifier = metrics.train_classifier(images.to(device), labels.to(device))
    low_res = to_unit(downsample(to_float(images), config.low_res_size))  # [N, C, h, w]
    guesser = metrics.train_guesser(low_res.to(device), labels.to(device))
    with failures_noted([]):
        save_checkpoint(path, {"data": data, "classifier": classifier.state_dict(), "guesser": guesser.state_dict()})
    return classifier, guesser


def score(images: Tensor, test: HeldOut, second: Tensor | None = None) -> dict[str, Score]:
    """All metrics of images [N, C, H, W] in [0, 1] that can be had; `second` are other samples for the same x."""
    scores = {
        "psnr": mean_of(metrics.psnr(images, test.truth)),
        "ssim": mean_of(metrics.ssim(images, test.truth)),
        "consistency": mean_of(metrics.consistency(images, to_unit(test.low_res))),
    }
    if images.shape[1] == 3:
        scores["color_shift"] = mean_of(metrics.color_shift(images, test.truth))
    if test.labels is not None:
        scores["accuracy"] = mean_of(metrics.accuracy(images, test.labels, test.classifier))
        features = metrics.predict(test.classifier[:-1], images)
        scores["frechet"] = jackknife(lambda i: metrics.frechet_distance(features[i], test.features), len(images))
    if len(images) >= 50:  # fewer teach the judges nothing
        context = to_unit(test.context)
        scores["fool_rate"] = fooled([metrics.fool_rate(images, test.truth, context, seed) for seed in range(3)])
    if second is not None:
        spread, error = (metrics.squared_difference(images, others).cpu() for others in (second, test.truth))

        def ratio(indices: Tensor) -> float:
            return (spread[indices].mean() / error[indices].mean()).item()

        scores["spread"] = jackknife(ratio, len(images))
    return scores


def perfect_sampler(test: HeldOut, rows: dict[str, dict[str, Score]]) -> dict[str, Score]:
    """What samples of p(y | x) itself would score: estimates, since nobody has that sampler.

    PSNR: their squared error is twice the variance of p(y | x), the error of the best regression, so 3.0 dB below it.
    Consistency: 0, since every y of p(y | x) shrinks to x. Fool rate: 50%, spread / error: 1, both by definition.
    Accuracy: how often p(y | x) draws the right digit, by a network that sees x alone. Fréchet distance: real digits'.
    """
    scores = {"consistency": (0.0, 0.0), "fool_rate": (0.5, 0.0), "spread": (1.0, 0.0)}
    regressions = [row["psnr"] for name, row in rows.items() if name.startswith("regression")]
    if regressions:
        best, error = max(regressions)
        scores["psnr"] = (best - 10 * math.log10(2), error)
    if test.labels is not None:
        scores["accuracy"] = mean_of(test.guess.gather(1, test.labels[:, None])[:, 0])
        scores["frechet"] = next(iter(rows.values()))["frechet"]
    return scores


def compare(models: dict[str, SR3 | Regression], test: HeldOut) -> Image.Image:
    """The input, the regression's answer, the mean of eight samples, four of them, and the truth; a row for each image.

    The images are eight from ambiguous to clear, evenly spaced in the entropy of `test.guess` from its 98% quantile,
    as samples for the most ambiguous few are no digits, to a fifth of that. Without a guess they are the first eight.
    """
    rows = list(range(min(8, len(test.truth))))
    if test.guess is not None:
        entropy = torch.special.entr(test.guess.cpu()).sum(dim=1)  # [N]
        highest = entropy.quantile(0.98)
        for i, target in enumerate(torch.linspace(highest, highest / 5, len(rows))):
            distance = (entropy - target).abs()
            distance[rows[:i]] = torch.inf  # none comes twice
            rows[i] = distance.argmin().item()
    truth, low_res = test.truth[rows], test.low_res[rows]
    columns = {"input": to_unit(upsample(low_res, truth.shape[-1], "nearest-exact"))}
    if "regression" in models:
        columns["regression"] = super_resolve(models["regression"], low_res, range(len(rows)))
    seeds = test.seeds[rows] + test.total * torch.arange(8)[:, None]  # [8, B]: the first two are those of the table
    samples = super_resolve(models["SR3"], low_res.repeat(8, 1, 1, 1), seeds.flatten().tolist()).unflatten(0, (8, -1))
    columns["mean of 8 samples"] = samples.mean(dim=0)
    for i in range(4):
        columns[f"sample {i + 1}"] = samples[i]  # [B, C, H, W]
    columns["truth"] = truth
    return picture_of_columns(columns, scale=3)


if __name__ == "__main__":
    main()
