"""Quality against refinement steps: `python tests/refinement_steps.py --checkpoint output/checkpoint.pt`.

Prints one table for 64 test images that are in no grid. Rows are numbers of steps; columns are both variances with
levels evenly spaced in t, and the posterior one with levels t = T · (i / steps)^2, closer together where noise is low.
With `--fool_rate 1000 --steps 10 25 100` it asks the judge of the final table instead.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_mnist
import utils
from metrics import consistency, fool_rate, format_cell, psnr, ssim, summarize
from sr3 import SR3

STEPS = (1, 2, 5, 10, 25, 50, 100, 250, 1000)


def spaced(model: SR3, steps: int, power: float) -> SR3:
    """The same network with a schedule of `steps` levels only, t = T · (i / steps)^power of the full one."""
    T = len(model.gammas) - 1
    levels = sorted({max(i, round(T * (i / steps) ** power)) for i in range(steps + 1)})
    chosen = SR3(model.unet)
    chosen.gammas = model.gammas[levels]
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=train_mnist.HERE / "output/checkpoint.pt")
    parser.add_argument("--data_dir", default=train_mnist.HERE / "data")
    parser.add_argument("--device")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--fool_rate", type=int, metavar="N", help="of N test images, in place of the other columns")
    flags = parser.parse_args()
    device = train_mnist.choose_device(flags.device)
    precision = train_mnist.choose_precision("auto", device)
    autocast = partial(torch.autocast, device.type, precision, enabled=precision != torch.float32)
    checkpoint = utils.load_checkpoint(flags.checkpoint)
    config = utils.parse_config(checkpoint["config"], flags.checkpoint)
    model = train_mnist.load_model(flags.checkpoint, device)
    images = utils.load_images(
        checkpoint["dataset"], flags.data_dir, False, config.data.image_size, config.data.channels
    )
    chosen = images[64 : 64 + (flags.fool_rate or 64)].to(device)
    high_res, low_res, context = train_mnist.make_pair(chosen, config)
    reference, source, x = map(utils.to_unit, (high_res, low_res, context))

    def draw(model: SR3, steps: int, variance: str) -> torch.Tensor:
        config.sampling.steps, config.sampling.variance = steps, variance
        return train_mnist.draw_all(model, context, config, autocast, f"{steps} steps")

    def metrics_of(images: torch.Tensor) -> str:
        values = psnr(images, reference), ssim(images, reference), consistency(images, source)
        return "{:.2f} / {:.3f} / {:.1f}".format(*(value.mean().item() for value in values))

    print("bicubic:", metrics_of(x))
    columns = ["fool rate"] if flags.fool_rate else ["forward, 1 - α_t", "posterior, spaced by squares"]
    print(f"| steps | posterior | {' | '.join(columns)} |\n| --- | --- {'| --- ' * len(columns)}|")
    for steps in flags.steps:
        drawn = draw(model, steps, "posterior")
        cells = [metrics_of(drawn)]
        if flags.fool_rate:
            pictures = (255 * torch.stack([drawn, reference])).round() / 255
            fooled = summarize(fool_rate(*pictures, x), rate=True)
            cells.append(format_cell(fooled, 100))
        else:
            cells.append(metrics_of(draw(model, steps, "forward")))
            squares = spaced(model, steps, 2)  # the more levels, the less their spacing matters
            cells.append(metrics_of(draw(squares, len(squares.gammas) - 1, "posterior")) if steps <= 100 else "")
        print(f"| {steps} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
