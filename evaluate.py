"""Judges trained models by test images (the paper's section 4): `python evaluate.py CHECKPOINT…`

    python evaluate.py output/reference/8x/sr3.pt output/reference/8x/regression.pt --output_dir output/8x
    python evaluate.py output/checkpoint.pt --num_images 200

Takes checkpoints of one data set, of SR3 and of the regression, in any order. Prints the table, and writes it to
--output_dir with two pictures of samples for the same input: results.md, results.json, comparison.png, diversity.png.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import utils  # before torch: it says what an Apple GPU may leave to the CPU
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

import metrics
from sr3 import SR3, Regression, load_model
from utils import HERE, Config, InputError, fail, to_unit

BATCH = 64  # images drawn at a time
COLUMNS = {  # heading, factor, digits
    "psnr": ("PSNR ↑", 1, 2),
    "ssim": ("SSIM ↑", 1, 3),
    "consistency": ("consistency ↓", 1, 1),
    "accuracy": ("accuracy ↑", 100, 1),
    "fool_rate": ("fool rate → 50 %", 100, 1),
    "spread_over_error": ("spread / error → 1", 1, 2),
}


@dataclass
class Trained:
    """A checkpoint to judge."""

    name: str  # of its row in the table
    model: SR3 | Regression
    config: Config
    steps: int


def load_trained(paths: list[str], device: torch.device) -> list[Trained]:
    """What is in the checkpoints, regressions first. Raises InputError where they are of different data."""
    found = []
    for path in paths:
        model, checkpoint = load_model(path, device), utils.load_checkpoint(path)
        name = "SR3" if isinstance(model, SR3) else "regression"
        name += f" ({path})" * any(other.name == name for other in found)  # another one of its kind
        config = utils.parse_config(checkpoint["config"], path)
        config.data.dataset, config.data.fallback = checkpoint["dataset"], ""  # what was really used
        found.append(Trained(name, model, config, checkpoint["step"]))
        if config.data != found[0].config.data:
            reason = f"{path} is of {config.data}, {paths[0]} of {found[0].config.data}"
            raise InputError(f"{reason}: give checkpoints of the same data")
    return sorted(found, key=lambda trained: isinstance(trained.model, SR3))


def make_pair(images: Tensor, data: utils.DataConfig) -> tuple[Tensor, Tensor, Tensor]:
    """From uint8 images y_0, the low-resolution image and x, in [-1, 1], as train_mnist.py makes them."""
    high_res = utils.to_float(images)  # [N, C, H, W]
    low_res = utils.downsample(high_res, data.low_res_size)
    return high_res, low_res, utils.upsample(low_res, data.image_size)


def draw(trained: Trained, context: Tensor, seed: int = 0) -> Tensor:
    """Super-resolve x [N, C, H, W] in batches; in [0, 1], rounded to 8 bits as a picture file has them."""
    device, sampling, images = context.device, trained.config.sampling, []
    options = {"variance": sampling.variance, "generator": torch.Generator(device).manual_seed(seed)}
    with utils.choose_autocast(utils.choose_precision("auto", device), device)():
        for part in tqdm(context.split(BATCH), desc=trained.name, unit="batch", dynamic_ncols=True, leave=False):
            images.append(trained.model.sample(part, sampling.steps, **options))
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


def score(images: Tensor, given: dict[str, Tensor], classifier: torch.nn.Module | None) -> dict[str, dict | None]:
    """All metrics of images [N, C, H, W] in [0, 1]: mean and standard error, or None where there is none.

    `given` has "reference", "low_res", "context", all in [0, 1], and "labels". PSNR is that of the mean squared error,
    so that one equal image doesn't make it infinite. Fewer than 50 images teach the fool rate's judge nothing.
    """
    error = summarize(metrics.squared_difference(images, given["reference"]))
    decibel = 10 / math.log(10) * error["standard_error"] / error["mean"] if error["mean"] else 0.0
    psnr = {"mean": -10 * math.log10(error["mean"]) if error["mean"] else "inf", "standard_error": decibel}
    ssim = torch.cat([metrics.ssim(*pair) for pair in zip(images.split(100), given["reference"].split(100))])
    judged = metrics.fool_rate(images, given["reference"], given["context"]) if len(images) >= 50 else None
    return {
        "psnr": psnr,
        "ssim": summarize(ssim),
        "consistency": summarize(metrics.consistency(images, given["low_res"])),
        "accuracy": summarize(metrics.accuracy(images, given["labels"], classifier)) if classifier else None,
        "fool_rate": None if judged is None else summarize(judged, rate=True),
        "spread_over_error": None,
        "training_steps": None,
    }


def format_table(rows: dict[str, dict]) -> str:
    """The table in Markdown: of each row its "training_steps" and what `score` says."""
    lines = [["method", "steps", *(heading for heading, _, _ in COLUMNS.values())], ["---"] * (2 + len(COLUMNS))]
    for name, row in rows.items():
        steps = f"{row['training_steps']:,}" if row["training_steps"] else "–"
        lines.append([name, steps, *(format_cell(row[key], *form) for key, (_, *form) in COLUMNS.items())])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def format_cell(summary: dict | None, factor: int, digits: int) -> str:
    """The mean ± its standard error, or a rate with its interval; in per cent with factor 100."""
    if summary is None:
        return "–"
    if summary["mean"] == "inf":
        return "∞"
    numbers = {key: f"{factor * number:.{digits}f}" for key, number in summary.items()}
    if "low" in numbers:
        return "{mean} % ({low} to {high})".format_map(numbers)
    return "{mean} ± {standard_error}".format_map(numbers) + " %" * (factor == 100)


def evaluate(flags: argparse.Namespace) -> None:
    device, output_dir = utils.choose_device(flags.device), Path(flags.output_dir)
    models = load_trained(flags.checkpoints, device)
    data = models[0].config.data
    (train_images, train_labels), (test_images, test_labels) = (
        utils.load_data_set(data.dataset, train, flags.data_dir, data.image_size, data.channels)
        for train in (True, False)
    )
    utils.prepare_output(output_dir, keep=True)

    chosen = torch.randperm(len(test_images), generator=torch.Generator().manual_seed(0))[: flags.num_images]
    high_res, low_res, context = make_pair(test_images[chosen].to(device), data)  # the same images in every run
    given = {"reference": to_unit(high_res), "low_res": to_unit(low_res), "context": to_unit(context)}
    classifier = None
    if train_labels is not None:
        classifier = metrics.train_classifier(train_images.to(device), train_labels.to(device))
        given["labels"] = test_labels[chosen].to(device)

    rows = {"reference": score(given["reference"], given, classifier)}
    rows["bicubic"] = score((255 * given["context"]).round() / 255, given, classifier)
    for trained in models:
        images = again = draw(trained, context)
        rows[trained.name] = score(images, given, classifier)
        if isinstance(trained.model, SR3):
            again = draw(trained, context, seed=1)
            mean = f"{trained.name}, mean of 2 samples"
            rows[mean] = score((images + again) / 2, given, classifier) | {"training_steps": trained.steps}
        spread, error = (metrics.squared_difference(images, others) for others in (again, given["reference"]))
        rows[trained.name] |= {"spread_over_error": summarize_ratio(spread, error), "training_steps": trained.steps}

    table = format_table(rows)
    judges = "; the fool rate's judges learned from half of them" if len(chosen) >= 50 else ""
    sizes = f"{data.low_res_size}×{data.low_res_size} -> {data.image_size}×{data.image_size}"
    table += (
        f"\n{len(chosen):,} test images of {data.dataset}, {sizes}; mean ± standard error, of the fool rate the 95 % "
        f"interval; PSNR of the mean squared error{judges}.\n"
    )
    configs = {trained.name: asdict(trained.config) for trained in models}
    results = {"dataset": data.dataset, "num_images": len(chosen), "methods": rows, "configs": configs}
    utils.write_atomically(output_dir / "results.md", table.encode())
    utils.write_atomically(output_dir / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    save_samples(output_dir, models, test_images[:8].to(device))
    print(table, end="")


def save_samples(output_dir: Path, models: list[Trained], images: Tensor) -> None:
    """Different samples of eight test images, where there is an SR3; of several models of a kind, the first.

    comparison.png: x, the regression's answer, four samples, the truth; each pixel a square of 3×3. diversity.png: x,
    eight samples, their mean, the regression's answer, the truth.
    """
    sr3 = next((trained for trained in models if isinstance(trained.model, SR3)), None)
    if sr3 is None:
        return
    high_res, low_res, context = make_pair(images, sr3.config.data)
    samples = draw(sr3, context.repeat_interleave(8, dim=0))
    samples = rearrange(samples, "(b k) c h w -> b k c h w", k=8)
    given, truth = to_unit(utils.enlarge_pixels(low_res, high_res.shape[2])), to_unit(high_res)
    answer = [draw(models[0], context)] if isinstance(models[0].model, Regression) else []
    few = [given, *answer, *samples.unbind(1)[:4], truth]
    all_of_them = [given, *samples.unbind(1), samples.mean(1), *answer, truth]
    for name, columns, scale in (("comparison", few, 3), ("diversity", all_of_them, 2)):
        grid = torch.stack(columns, dim=1).flatten(0, 1)
        utils.save_grid(output_dir / f"{name}.png", grid, len(columns), sr3.config.data.dataset, scale)


def main(arguments: list[str] | None = None) -> None:
    def script():
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

    utils.run_script(script)


if __name__ == "__main__":
    main()
