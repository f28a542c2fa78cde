"""README's pictures of test images that no training writes.

    python tools/illustrate.py --output noise.png
    python tools/illustrate.py output/regression/checkpoint.pt output/checkpoint.pt --output samples.png

Without a checkpoint: the low-resolution image, the context x, the target y_0, and ỹ of equation (5) at five noise
levels γ, of MNIST. With checkpoints of one data set: the low-resolution image, x, what each model makes of it (an SR3
two samples), and y_0.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils  # before torch: it lets the CPU do what an Apple GPU can't
import torch

from sr3 import SR3
from utils import to_unit


@utils.errors_in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = utils.fail
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT")
    parser.add_argument("--data_dir", default=utils.HERE / "data", help="where data sets are; default: data")
    parser.add_argument("--output", required=True, help="the PNG to write")
    parser.add_argument("--num_images", type=int, default=6, help="rows; default: 6")
    flags = parser.parse_args()
    models = [utils.load_model(path) for path in flags.checkpoints]
    config = models[0].config if models else utils.load_config()
    _, (images, _) = utils.load_data(config, flags.data_dir)
    high_res, low_res, context = utils.make_pair(images[: flags.num_images], config.low_res_size)

    pixels = utils.upsample(low_res, config.image_size, "nearest-exact")
    columns = {"input": to_unit(pixels), "bicubic x": to_unit(context)}
    for model in models:
        if isinstance(model, SR3):
            name = f"weight {model.config.loss_weight}\n" if sum(isinstance(m, SR3) for m in models) > 1 else ""
            for seed in (0, 1):
                steps = model.config.sampling_steps
                columns[f"{name}sample {seed + 1}"] = utils.super_resolve(model, context, steps, seed)
        else:
            columns["regression"] = utils.super_resolve(model, context, steps=1)
    columns["truth y_0"] = to_unit(high_res)
    if not models:
        noise = torch.randn(high_res.shape, generator=torch.Generator().manual_seed(0))
        for gamma in (0.99, 0.8, 0.4, 0.1, 0.01):
            columns[f"gamma {gamma}"] = to_unit(gamma**0.5 * high_res + (1 - gamma) ** 0.5 * noise)  # equation (5)
    utils.save_columns(Path(flags.output), columns, config.dataset, scale=3)


if __name__ == "__main__":
    main()
