"""Judges trained models on test images (the paper's section 4): `python evaluate.py CHECKPOINT…`

    python evaluate.py output/reference/8x/sr3.pt output/reference/8x/regression.pt --output_dir output/8x
    python evaluate.py output/checkpoint.pt --num_images 200

Takes checkpoints of one data set, of SR3 and of the regression, in any order. Prints the table, and writes it to
--output_dir with two pictures of samples for the same input: results.md, results.json, comparison.png, diversity.png.
"""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

import utils  # before torch: it lets an Apple GPU leave to the CPU what it lacks
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

import metrics
from sr3 import SR3, Regression, load_model
from utils import HERE, InputError, fail, to_unit

BATCH = 64  # images drawn at a time
COLUMNS = {  # heading, factor, digits
    "psnr": ("PSNR ↑", 1, 2),
    "ssim": ("SSIM ↑", 1, 3),
    "consistency": ("consistency ↓", 1, 1),
    "accuracy": ("accuracy ↑", 100, 1),
    "fool_rate": ("fool rate → 50 %", 100, 1),
    "spread_over_error": ("spread / error → 1", 1, 2),
}


def load_models(paths: list[str], device: torch.device) -> dict[str, SR3 | Regression]:
    """The models by the names of their rows, regressions first. Raises InputError where they are of different data."""
    models = {}
    for path in paths:
        model = load_model(path, device)
        name = "SR3" if isinstance(model, SR3) else "regression"
        name = f"{name} ({path})" if name in models else name
        if name in models:
            raise InputError(f"{path} is given twice; give each checkpoint once")
        models[name] = model
        model.config.data.fallback = ""  # says nothing of the data that were there
        found, expected = model.config.data, next(iter(models.values())).config.data
        if found != expected:
            raise InputError(f"{path} is of {found}, {paths[0]} of {expected}: give checkpoints of the same data")
    return dict(sorted(models.items(), key=lambda item: isinstance(item[1], SR3)))


def make_pair(images: Tensor, data: utils.DataConfig) -> tuple[Tensor, Tensor, Tensor]:
    """From uint8 images y_0, the low-resolution image and x, in [-1, 1], as train_mnist.py makes them."""
    high_res = utils.to_float(images)  # [N, C, H, W]
    low_res = utils.downsample(high_res, data.low_res_size)
    return high_res, low_res, utils.upsample(low_res, data.image_size)


def draw(model: SR3 | Regression, context: Tensor, seed: int = 0) -> Tensor:
    """Super-resolve x [N, C, H, W] in batches; in [0, 1], rounded to 8 bits as a picture file has them."""
    device, images = context.device, []
    options = asdict(model.config.sampling) | {"generator": torch.Generator(device).manual_seed(seed)}
    with utils.choose_autocast(utils.choose_precision("auto", device), device)():
        for part in tqdm(context.split(BATCH), desc="drawing", unit="batch", dynamic_ncols=True, leave=False):
            images.append(model.sample(part, **options))
    return (255 * to_unit(torch.cat(images))).round() / 255


def summarize(values: Tensor, rate: bool = False) -> dict[str, float]:
    """The mean of values [N], one per image, and its standard error; of a rate also Wilson's 95 % interval."""
    n, values = len(values), values.cpu().double()
    mean, z = values.mean().item(), 1.96
    summary = {"mean": mean, "standard_error": values.std().item() / math.sqrt(n) if n > 1 else 0.0}
    if rate:
        middle, width = mean + z**2 / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
        summary |= {"low": (middle - width) / (1 + z**2 / n), "high": (middle + width) / (1 + z**2 / n)}
    return summary


def summarize_ratio(values: Tensor, others: Tensor) -> dict[str, float]:
    """The ratio of two means over the same images, and its standard error to first order."""
    values, others = values.cpu().double(), others.cpu().double()
    ratio = values.mean() / others.mean()
    return summarize((values - ratio * others) / others.mean()) | {"mean": ratio.item()}


def score(images: Tensor, given: dict, classifier: torch.nn.Module | None, again: Tensor | None = None) -> dict:
    """All metrics of images [N, C, H, W] in [0, 1], summarized, or None where there is none; `again` are other samples.

    `given` has "reference", "low_res", "context", all in [0, 1], and "labels". PSNR is that of the mean squared error,
    so that one equal image doesn't make it infinite. Fewer than 50 images teach the fool rate's judge nothing.
    """
    reference = given["reference"]
    errors = metrics.squared_difference(images, reference)
    error = summarize(errors)
    scores = dict.fromkeys(COLUMNS)
    if error["mean"] > 0:
        decibel = 10 / math.log(10) * error["standard_error"] / error["mean"]
        scores["psnr"] = {"mean": -10 * math.log10(error["mean"]), "standard_error": decibel}
    ssim = [metrics.ssim(*parts) for parts in zip(images.split(100), reference.split(100))]
    scores["ssim"] = summarize(torch.cat(ssim))
    scores["consistency"] = summarize(metrics.consistency(images, given["low_res"]))
    if classifier:
        scores["accuracy"] = summarize(metrics.accuracy(images, given["labels"], classifier))
    if len(images) >= 50:
        scores["fool_rate"] = summarize(metrics.fool_rate(images, reference, given["context"]), rate=True)
    if again is not None:
        scores["spread_over_error"] = summarize_ratio(metrics.squared_difference(images, again), errors)
    return scores


def format_table(rows: dict[str, dict]) -> str:
    """The table in Markdown: of each row its "training_steps" and what `score` says."""
    lines = [["method", "steps", *(heading for heading, _, _ in COLUMNS.values())], ["---"] * (2 + len(COLUMNS))]
    for name, row in rows.items():
        steps = f"{row['training_steps']:,}" if "training_steps" in row else "–"
        lines.append([name, steps, *(format_cell(row[key], *form) for key, (_, *form) in COLUMNS.items())])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def format_cell(summary: dict | None, factor: int, digits: int) -> str:
    """The mean ± its standard error, or a rate with its interval; in per cent with factor 100."""
    if summary is None:
        return "–"
    numbers = {key: f"{factor * number:.{digits}f}" for key, number in summary.items()}
    if "low" in numbers:
        return "{mean} % ({low} to {high})".format_map(numbers)
    return "{mean} ± {standard_error}".format_map(numbers) + " %" * (factor == 100)


def evaluate(flags: argparse.Namespace) -> None:
    device, output_dir = utils.choose_device(flags.device), Path(flags.output_dir)
    models = load_models(flags.checkpoints, device)
    data = next(iter(models.values())).config.data
    train_set, (test_images, test_labels) = (utils.load_data_set(data, part, flags.data_dir) for part in (True, False))
    utils.prepare_output(output_dir, keep=True)

    generator = torch.Generator().manual_seed(0)  # the same images in every run
    chosen = torch.randperm(len(test_images), generator=generator)[: flags.num_images]
    high_res, low_res, context = make_pair(test_images[chosen].to(device), data)
    given = {"reference": to_unit(high_res), "low_res": to_unit(low_res), "context": to_unit(context)}
    classifier = None
    if test_labels is not None:
        classifier = metrics.train_classifier(*(part.to(device) for part in train_set))
        given["labels"] = test_labels[chosen].to(device)

    rows = {"reference": score(given["reference"], given, classifier)}
    rows["bicubic"] = score((255 * given["context"]).round() / 255, given, classifier)
    for name, model in models.items():
        first = draw(model, context)
        second = draw(model, context, seed=1) if isinstance(model, SR3) else first  # a regression has one answer
        trained = {"training_steps": model.training_steps}
        rows[name] = trained | score(first, given, classifier, second)
        if isinstance(model, SR3):
            rows[f"{name}, mean of 2 samples"] = trained | score((first + second) / 2, given, classifier)

    sizes = f"{data.low_res_size}×{data.low_res_size} -> {data.image_size}×{data.image_size}"
    table = format_table(rows) + (
        f"\n{len(chosen):,} test images of {data.dataset}, {sizes}; mean ± standard error, of the fool rate the 95 % "
        "interval; PSNR of the mean squared error; a fool rate's judge learns from half of the images.\n"
    )
    configs = {name: asdict(model.config) for name, model in models.items()}
    results = {"dataset": data.dataset, "num_images": len(chosen), "methods": rows, "configs": configs}
    utils.write_atomically(output_dir / "results.md", table.encode())
    utils.write_atomically(output_dir / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    save_samples(output_dir, models, test_images[:8].to(device))
    print(table, end="")


def save_samples(output_dir: Path, models: dict[str, SR3 | Regression], images: Tensor) -> None:
    """Different samples of eight test images, where there is an SR3; of several models of a kind, the first.

    comparison.png: the low-resolution image, the regression's answer, four samples, the truth; each pixel a square of
    3×3. diversity.png: the low-resolution image, eight samples, their mean, the regression's answer, the truth.
    """
    if "SR3" not in models:
        return
    data = models["SR3"].config.data
    high_res, low_res, context = make_pair(images, data)
    samples = draw(models["SR3"], context.repeat_interleave(8, dim=0))
    samples = rearrange(samples, "(b k) c h w -> k b c h w", k=8)
    given, truth = to_unit(utils.upsample(low_res, data.image_size, "nearest-exact")), to_unit(high_res)
    answer = [draw(models["regression"], context)] if "regression" in models else []
    few, many = [given, *answer, *samples[:4], truth], [given, *samples, samples.mean(0), *answer, truth]
    for name, columns, scale in (("comparison", few, 3), ("diversity", many, 2)):
        grid = torch.stack(columns, dim=1).flatten(0, 1)
        utils.save_grid(output_dir / f"{name}.png", grid, len(columns), data.dataset, scale)


@utils.errors_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="of train_mnist.py, or shipped")
    parser.add_argument("--num_images", type=int, default=1000, help="test images to judge by; default: 1000")
    parser.add_argument("--data_dir", default=HERE / "data", help="where data sets are; default: data")
    parser.add_argument("--output_dir", default=HERE / "output", help="where the table goes; default: output")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first of them that is there")
    flags = parser.parse_args(arguments)
    if flags.num_images < 1:
        raise InputError(f"--num_images is {flags.num_images}: give 1 or more")
    evaluate(flags)


if __name__ == "__main__":
    main()
