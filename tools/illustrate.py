"""README's pictures that no training writes.

    python tools/illustrate.py --output noise.png
    python tools/illustrate.py output/regression/checkpoint.pt output/checkpoint.pt --output samples.png
    python tools/illustrate.py output/reference/4x/sr3.pt --real_digits --output real_digits.png

Without a checkpoint: the low-resolution image, the context x, the target y_0, and y_t of equation (5) at five noise
levels γ, of MNIST. With checkpoints of one data set: the low-resolution image, x, what each model makes of it (an SR3
two samples), and y_0. With --real_digits, which needs scikit-learn: 8×8 digits that were never larger, and below them
the same rows.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.data import load_data
from support.errors import Parser, one_line_errors
from support.settings import HERE, complete_settings

import torch
from torch import Tensor

from sr3 import SR3
from utils import load_model, make_pair, super_resolve, to_unit, upsample
from utils import picture_of, picture_of_columns, save_picture


@one_line_errors()
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT")
    parser.add_argument("--data_dir", default=HERE / "data", help="where data sets are; default: data")
    parser.add_argument("--output", required=True, help="the PNG to write")
    parser.add_argument("--num_images", type=int, default=6, help="rows; default: 6")
    parser.add_argument("--real_digits", action="store_true", help="scikit-learn's 8×8 digits")
    flags = parser.parse_intermixed_args()
    models = [load_model(path) for path in flags.checkpoints]
    config = models[0].config if models else complete_settings()
    high_res = None
    if flags.real_digits:
        from sklearn.datasets import load_digits

        low_res = torch.tensor(load_digits().images[: flags.num_images]).float()[:, None] / 8 - 1  # 0…16 -> -1…1
    else:
        _, (images, _) = load_data(config, flags.data_dir)
        high_res, low_res, _ = make_pair(images[: flags.num_images], config.low_res_size)

    pixels, context = (upsample(low_res, config.image_size, mode) for mode in ("nearest-exact", "bicubic"))
    columns = {"input": to_unit(pixels), "bicubic x": to_unit(context)}
    for model in models:
        columns |= answers(model, low_res, several=sum(isinstance(other, SR3) for other in models) > 1)
    if high_res is not None:
        columns["truth y_0"] = to_unit(high_res)
    if not models:
        noise = torch.randn(high_res.shape, generator=torch.Generator().manual_seed(0))
        for gamma in (0.99, 0.8, 0.4, 0.1, 0.01):
            columns[f"gamma {gamma}"] = to_unit(gamma**0.5 * high_res + (1 - gamma) ** 0.5 * noise)  # equation (5)
    if flags.real_digits:
        picture = picture_of(torch.cat(list(columns.values())), columns=flags.num_images)  # a row for each
    else:
        picture = picture_of_columns(columns, scale=3)
    save_picture(Path(flags.output), picture)


def answers(model, low_res: Tensor, several: bool) -> dict[str, Tensor]:
    """The columns of one model: two samples of an SR3, named by its loss weight if there are several; or one answer."""
    numbers = torch.arange(len(low_res))  # an image's seed is its number
    if not isinstance(model, SR3):
        return {"regression": super_resolve(model, low_res, numbers.tolist())}
    name = f"weight {model.config.loss_weight}\n" if several else ""
    columns = {}
    for i in (0, 1):
        seeds = (numbers + i * len(numbers)).tolist()
        columns[f"{name}sample {i + 1}"] = super_resolve(model, low_res, seeds)
    return columns


if __name__ == "__main__":
    main()
