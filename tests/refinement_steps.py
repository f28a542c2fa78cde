"""Quality against refinement steps: `python tests/refinement_steps.py --checkpoint output/checkpoint.pt`.

Prints one table for 64 test images that are in no grid. Rows are numbers of steps; columns are both variances with
levels evenly spaced in t, and the posterior one with levels t = T · (i / steps)^2, closer together where noise is low.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_mnist
import utils
from metrics import consistency, psnr, ssim
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
    flags = parser.parse_args()
    device = train_mnist.choose_device(flags.device)
    precision = train_mnist.choose_precision("auto", device)
    checkpoint = utils.load_checkpoint(flags.checkpoint)
    data = checkpoint["config"]["data"]
    model = train_mnist.load_model(flags.checkpoint, device)
    images = utils.load_images(checkpoint["dataset"], flags.data_dir, False, data["image_size"], data["channels"])
    high_res = utils.to_float(images[64:128].to(device))
    low_res = utils.downsample(high_res, data["low_res_size"])
    context = utils.upsample(low_res, data["image_size"])

    def mean_metrics(images: torch.Tensor) -> str:
        images, reference, source = map(utils.to_unit, (images, high_res, low_res))
        values = psnr(images, reference), ssim(images, reference), consistency(images, source)
        return "{:.2f} / {:.3f} / {:.1f}".format(*(value.mean().item() for value in values))

    def judge(model: SR3, steps: int, variance: str) -> str:
        generator = torch.Generator(device).manual_seed(0)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            images = model.sample(context, steps, variance=variance, generator=generator)
        return mean_metrics(images)

    print("bicubic:", mean_metrics(context))
    print("| steps | posterior | forward, 1 - α_t | posterior, spaced by squares |\n| --- | --- | --- | --- |")
    for steps in STEPS:
        cells = [judge(model, steps, "posterior"), judge(model, steps, "forward")]
        if steps <= 100:  # the more levels, the less their spacing matters
            squares = spaced(model, steps, 2)
            cells.append(judge(squares, len(squares.gammas) - 1, "posterior"))
        else:
            cells.append("")
        print(f"| {steps} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
