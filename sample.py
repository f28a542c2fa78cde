"""Super-resolves pictures with a trained model: `python sample.py CHECKPOINT [PICTURE…]`

    python sample.py output/reference/8x/sr3.pt my_seven.png
    python sample.py output/reference/8x/sr3.pt --num_samples 8 --seed 1

Each picture is cropped to a square and shrunk to the low resolution that the model was trained for, unless it has that
size already. Without a picture, eight digits are drawn. The result is one picture with a row for each input: the input,
its bicubic enlargement, the samples, and the original.
"""

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import utils  # before torch: it lets the CPU do what an Apple GPU can't
import torch
from torch import Tensor
from torchvision.transforms import functional as TF

from utils import InputError, downsample, fail, to_float, to_unit, upsample


@utils.errors_in_one_line("give fewer pictures, or a smaller --num_samples")
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of train_mnist.py, or shipped")
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="MNIST's digits are centred, white on black")
    parser.add_argument("--num_samples", type=int, default=4, help="samples for each picture; default: 4")
    parser.add_argument("--sampling_steps", type=int, help="refinement steps; default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; default: 0")
    parser.add_argument("--invert", action="store_true", help="turn dark into light and light into dark")
    parser.add_argument("--output", default="samples.png", help="the picture to write; default: samples.png")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first of them that can compute")
    flags = parser.parse_intermixed_args(arguments)  # pictures may follow flags
    if not 1 <= flags.num_samples <= 1000:
        raise InputError(f"--num_samples is {flags.num_samples}: give a number from 1 to 1,000")
    output = Path(flags.output)
    if output.suffix.lower() != ".png":
        raise InputError(f"--output is {output}: its name must end in .png")
    started = time.perf_counter()
    device = utils.choose_device(flags.device)
    model = utils.load_model(flags.checkpoint, device)
    config = utils.load_config(flags=vars(flags), base=vars(model.config))

    if flags.pictures:
        images = [read_square(path, config, flags.invert) for path in flags.pictures]
    else:
        images = utils.draw_digits(8, config.image_size, config.channels, seed=config.seed)[0].split(1)
    images = [to_float(image) for image in images]  # [1, C, side, side] each, in [-1, 1]
    low_res = torch.cat([downsample(image, config.low_res_size) for image in images])  # [N, C, h, w]
    context = upsample(low_res, config.image_size)  # [N, C, H, W]

    number = flags.num_samples if config.method == "sr3" else 1  # a regression has one answer
    x = context.repeat_interleave(number, dim=0).to(device)
    samples = utils.super_resolve(model, x, config.sampling_steps, config.seed).cpu().unflatten(0, (-1, number))
    columns = {"input": to_unit(upsample(low_res, config.image_size, "nearest-exact")), "bicubic": to_unit(context)}
    for i in range(number):
        columns[f"sample {i + 1}" if config.method == "sr3" else "regression"] = samples[:, i]  # [N, C, H, W]
    originals = torch.cat([downsample(image, config.image_size) for image in images])
    has_original = torch.tensor([image.shape[-1] > config.low_res_size for image in images])
    originals[~has_original] = 0  # grey: an input without an original
    if has_original.any():
        columns["original"] = to_unit(originals)
    utils.save_columns(output, columns, f"seed {config.seed}", scale=max(1, 100 // config.image_size))
    print(f"{output}: {len(images)} × {number} samples, seed {config.seed}, {time.perf_counter() - started:.0f} s")


def read_square(path: str, config: SimpleNamespace, invert: bool) -> Tensor:
    """The middle square of a picture file: uint8 [1, C, side, side]. Raises InputError where it can't be used."""
    try:
        picture = utils.read_picture(path, config.channels)
    except Exception as error:  # a damaged picture can raise almost anything
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} can't be read as a picture ({reason}); give another") from None
    image = TF.pil_to_tensor(TF.center_crop(picture, min(picture.size)))[None]
    size = config.low_res_size
    if image.shape[-1] < size:
        sizes = f"{picture.width}×{picture.height} pixels, the model's input {size}×{size}"
        raise InputError(f"{path} has {sizes}; give a larger one")
    image = 255 - image if invert else image
    if config.dataset in ("mnist", "fashion_mnist") and image.float().mean() > 127:
        print(f"{path} is mostly light; {config.dataset} is white on black: --invert turns it round", file=sys.stderr)
    return image


if __name__ == "__main__":
    main()
