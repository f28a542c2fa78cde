"""Judges trained models on test images, as the paper's section 4 does: `python evaluate.py CHECKPOINT…`

    python evaluate.py output/reference/8x/sr3.pt output/reference/8x/regression.pt --output_dir output/8x
    python evaluate.py output/checkpoint.pt --num_images 200 --sampling_steps 100

Takes checkpoints of SR3 and of the regression, of one data set, in any order. Prints a table, and writes to
--output_dir results.md, the table with standard errors, and comparison.png, samples for eight images from ambiguous to
clear.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import utils  # before torch: it lets the CPU do what an Apple GPU can't
import torch
from torch import Tensor

import metrics
from sr3 import SR3, Regression
from utils import HERE, InputError, fail, make_pair, super_resolve, to_unit, upsample

COLUMNS = {  # heading and format
    "psnr": ("PSNR ↑", ".1f"),
    "ssim": ("SSIM ↑", ".3f"),
    "consistency": ("consistency ↓", ".1f"),
    "color_shift": ("colour shift ↓", ".1f"),
    "accuracy": ("accuracy", ".1%"),
    "frechet": ("Fréchet distance ↓", ".2f"),
    "fool_rate": ("fool rate → 50%", ".1%"),
    "spread": ("spread / error → 1", ".2f"),
}
Score = tuple[float, float]  # a mean and its standard error


@utils.errors_in_one_line("give a smaller --num_images")
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="of train_mnist.py, or shipped")
    parser.add_argument("--num_images", type=int, default=1000, help="test images to judge by; default: 1000")
    parser.add_argument("--sampling_steps", type=int, help="refinement steps; default: those of the checkpoint")
    parser.add_argument("--data_dir", default=HERE / "data", help="where data sets are; default: data")
    parser.add_argument("--output_dir", default=HERE / "output", help="where the table goes; default: output")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first of them that can compute")
    flags = parser.parse_intermixed_args(arguments)
    if flags.num_images < 1:
        raise InputError(f"--num_images is {flags.num_images}: give 1 or more")

    device, output_dir = utils.choose_device(flags.device), Path(flags.output_dir)
    models = load_models(flags.checkpoints, device, flags.sampling_steps)
    config = next(iter(models.values())).config
    (images, labels), (test_images, test_labels) = utils.load_data(config, flags.data_dir, leave_out=output_dir)
    chosen = torch.randperm(len(test_images), generator=torch.Generator().manual_seed(0))[: flags.num_images]
    high_res, low_res, context = make_pair(test_images[chosen].to(device), config.low_res_size)
    given = SimpleNamespace(truth=to_unit(high_res), low_res=to_unit(low_res), context=context, guess=None)
    output_dir.mkdir(parents=True, exist_ok=True)

    if labels is not None:  # the networks that judge have something to learn
        given.labels = test_labels[chosen].to(device)
        given.classifier = metrics.train_classifier(images.to(device), labels.to(device))
        given.features = metrics.in_parts(given.classifier[:-1], test_images.to(device) / 255)
        small = to_unit(make_pair(images, config.low_res_size)[1]).to(device)  # [N, C, h, w]
        guesser = metrics.train_guesser(small, labels.to(device))
        given.guess = metrics.in_parts(guesser, given.low_res).softmax(dim=1)  # [N, classes]: p(class | x)

    noun = "digits" if config.dataset in ("mnist", "digits") else "images"
    bicubic = (255 * to_unit(context)).round() / 255
    rows = {f"real {noun}": score(given.truth, given), "bicubic": score(bicubic, given)}
    for name, model in models.items():
        first, second = (super_resolve(model, context, model.config.sampling_steps, seed) for seed in (0, 1))
        rows[name] = score(first, given, again=second)
    rows["a perfect sampler"] = perfect_sampler(given, rows)

    trained = ", ".join(f"{name}: {model.step:,} training steps" for name, model in models.items())
    sizes = f"{config.low_res_size}×{config.low_res_size} → {config.image_size}×{config.image_size}"
    note = f"\n{len(chosen):,} test images of {config.dataset}, {sizes}. {trained}.\n"
    utils.write_atomically(output_dir / "results.md", (format_table(rows, with_errors=True) + note).encode())
    if "SR3" in models:
        save_comparison(output_dir / "comparison.png", models, given)
    print(format_table(rows) + note, end="")


def load_models(paths: list[str], device: torch.device, steps: int | None) -> dict[str, SR3 | Regression]:
    """The models by the names of their rows, regressions first. Raises InputError where they are of different data."""
    models, wanted = {}, None
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"{path} is given twice; give each checkpoint once")
        model = utils.load_model(path, device)
        model.config = utils.load_config(flags={"sampling_steps": steps}, base=vars(model.config))
        data = {name: getattr(model.config, name) for name in ("dataset", "image_size", "low_res_size", "channels")}
        wanted = wanted or data
        for name, value in data.items():
            if value != wanted[name]:
                values = f"{name} is {value} in {path}, {wanted[name]} in {paths[0]}"
                raise InputError(f"{values}: give checkpoints of one data set")
        name = "SR3" if isinstance(model, SR3) else "regression"
        models[f"{name} ({path})" if name in models else name] = model
    return dict(sorted(models.items(), key=lambda item: isinstance(item[1], SR3)))


def score(images: Tensor, given: SimpleNamespace, again: Tensor | None = None) -> dict[str, Score]:
    """All metrics of images [N, C, H, W] in [0, 1] that can be had; `again` are other samples for the same x."""
    scores = {
        "psnr": mean_of(metrics.psnr(images, given.truth)),
        "ssim": mean_of(metrics.in_parts(metrics.ssim, images, given.truth)),
        "consistency": mean_of(metrics.consistency(images, given.low_res)),
    }
    if images.shape[1] == 3:
        scores["color_shift"] = mean_of(metrics.color_shift(images, given.truth))
    if given.guess is not None:
        scores["accuracy"] = mean_of(metrics.accuracy(images, given.labels, given.classifier))
        features = metrics.in_parts(given.classifier[:-1], images)
        scores["frechet"] = jackknife(lambda i: metrics.frechet_distance(features[i], given.features), len(images))
    if len(images) >= 50:  # fewer teach the judge nothing
        scores["fool_rate"] = mean_of(metrics.fool_rate(images, given.truth, to_unit(given.context)))
    if again is not None:
        spread, error = (metrics.squared_difference(images, others) for others in (again, given.truth))
        scores["spread"] = jackknife(lambda i: (spread[i].mean() / error[i].mean()).item(), len(images))
    return scores


def perfect_sampler(given: SimpleNamespace, rows: dict[str, dict[str, Score]]) -> dict[str, Score]:
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
    if given.guess is not None:
        scores["accuracy"] = mean_of(given.guess.gather(1, given.labels[:, None])[:, 0])
        scores["frechet"] = next(iter(rows.values()))["frechet"]
    return scores


def mean_of(values: Tensor) -> Score:
    """The mean of values [N], one for each image, and its standard error."""
    values = values.cpu().double()
    return values.mean().item(), values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def jackknife(statistic: Callable[[Tensor], float], number: int) -> Score:
    """A statistic of the images with given indices, and its standard error: how it varies as a 20th is left out."""
    indices, groups = torch.arange(number), min(20, number)
    values = torch.tensor([statistic(indices[indices % groups != i]) for i in range(groups)], dtype=torch.float64)
    return statistic(indices), math.sqrt((groups - 1) * values.var(correction=0).item())


def format_table(rows: dict[str, dict[str, Score]], with_errors: bool = False) -> str:
    """The table in Markdown; "–" stands for what there is not, or what is infinite."""
    colored = any("color_shift" in scores for scores in rows.values())
    shown = {name: column for name, column in COLUMNS.items() if colored or name != "color_shift"}
    lines = [["", *(heading for heading, _ in shown.values())], ["---"] * (1 + len(shown))]
    for name, scores in rows.items():
        cells = []
        for column, (_, form) in shown.items():
            mean, error = scores.get(column, (math.nan, math.nan))
            cell = f"{mean:{form}}" if math.isfinite(mean) else "–"
            if with_errors and math.isfinite(error):
                cell += f" ± {error:{form}}".removesuffix("%")
            cells.append(cell)
        lines.append([name, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def save_comparison(path: Path, models: dict[str, SR3 | Regression], given: SimpleNamespace) -> None:
    """The input, the regression's answer, the mean of eight samples, four of them, and the truth; a row for each image.

    The images are eight from ambiguous to clear: evenly spaced in the entropy of `given.guess`, [N, classes], what a
    network says that sees x alone. Without it they are the first eight.
    """
    chosen = list(range(min(8, len(given.truth))))
    if given.guess is not None:
        entropy = torch.special.entr(given.guess).sum(dim=1).cpu()  # [N]
        for i, target in enumerate(torch.linspace(entropy.max(), entropy.min(), len(chosen))):
            distance = (entropy - target).abs()
            distance[chosen[:i]] = torch.inf  # none comes twice
            chosen[i] = distance.argmin().item()
    model, truth, context = models["SR3"], given.truth[chosen], given.context[chosen]
    samples = super_resolve(model, context.repeat_interleave(8, dim=0), model.config.sampling_steps)
    samples = samples.unflatten(0, (-1, 8)).transpose(0, 1)  # [8, B, C, H, W]
    columns = {"input": upsample(given.low_res[chosen], truth.shape[-1], "nearest-exact")}
    if "regression" in models:
        columns["regression"] = super_resolve(models["regression"], context, steps=1)
    columns |= {"mean of 8 samples": samples.mean(dim=0)} | {f"sample {i + 1}": samples[i] for i in range(4)}
    columns["truth"] = truth
    utils.save_columns(path, columns, model.config.dataset, scale=3)


if __name__ == "__main__":
    main()
