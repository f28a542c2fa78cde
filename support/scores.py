"""Scores, each a mean and its standard error, and tables of them in Markdown."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

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


def mean_of(values: Tensor) -> Score:
    """The mean of values [N], one for each image, and its standard error."""
    values = values.cpu().double()
    return values.mean().item(), values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def fooled(verdicts: list[Tensor]) -> Score:
    """The mean of the judges' verdicts, [N] each as of `fool_rate`, and its standard error.

    It tells of both, the images' luck and the judges': the squares of the error over the images' means and of the
    spread between the judges' rates / √judges are added.
    """
    verdicts = torch.stack(verdicts).double()  # [judges, N], NaN for images that a judge was not asked about
    of_images = verdicts.nanmean(dim=0)
    _, images_error = mean_of(of_images[~of_images.isnan()])
    rate, judges_error = mean_of(verdicts.nanmean(dim=1))
    return rate, math.hypot(images_error, judges_error)


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
