"""Super-resolves pictures with a trained model: `python sample.py CHECKPOINT [PICTURE…]`

    python sample.py output/reference/8x/sr3.pt my_seven.png
    python sample.py output/reference/8x/sr3.pt --num_samples 8 --seed 1

A model of MNIST, or of drawn digits, knows digits that are white on black, of one size and in the middle: so your own
drawing or photo of a digit is inverted, scaled and moved until it is framed like them. What the model gets is the
row's "original", shrunk; --as_is leaves all pictures as they are, apart from cropping them to their middle squares, as
is done for other models, too. A picture of the model's low resolution is the input itself; then no row has an original.

Without a picture, eight digits are drawn. The result is one picture with a row for each input: the input, its bicubic
enlargement, the samples, and the original. Sample 1 of each row has the seed --seed, sample 2 the next one, and so on:
each depends on its seed and the input only.
"""

from pathlib import Path

import torch
from torchvision.transforms.functional import center_crop, pil_to_tensor

from support.data import read_picture
from support.digits import draw_digits
from support.errors import InputError, argument_parser, one_line_errors
from support.framing import frame_digit
from support.machine import choose_device
from support.settings import check, positive
from utils import downsample, load_model, picture_of_columns, super_resolve, to_signed, to_unit, upsample


@one_line_errors()
def main(arguments=None):
    parser = argument_parser(__doc__)
    parser.add_argument("checkpoint", help="of train_mnist.py, or shipped")
    parser.add_argument("pictures", nargs="*", help="a drawing or photo, or low-resolution pixels")
    parser.add_argument("--num_samples", type=positive, default=4, help="samples for each picture; default: 4")
    parser.add_argument("--sampling_steps", type=positive, help="refinement steps; default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=0, help="of each picture's first sample; default: 0")
    parser.add_argument("--as_is", action="store_true", help="don't frame digits as MNIST's are")
    parser.add_argument("--output", default="samples.png", help="the PNG to write; default: samples.png")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first of them that can compute")
    flags = parser.parse_intermixed_args(arguments)  # pictures may follow flags
    output = Path(flags.output)
    if output.suffix.lower() != ".png":
        raise InputError(f"--output is {output}: its name must end in .png")
    device = choose_device(flags.device)
    model = load_model(flags.checkpoint, device)
    config = model.config
    steps = flags.sampling_steps or config.sampling_steps
    check(vars(config) | {"sampling_steps": steps, "seed": flags.seed})
    output.parent.mkdir(parents=True, exist_ok=True)

    # Each image is uint8, [1, C, side, side]; they differ in side.
    images = [read_image(path, config, flags.as_is) for path in flags.pictures]
    images = images or draw_digits(8, config.image_size, config.channels, flags.seed)[0].split(1)

    def shrunk(size):
        return torch.cat([downsample(to_signed(image), size) for image in images])  # [N, C, size, size]

    low_res = shrunk(config.low_res_size)  # [N, C, h, w]

    # A regression has one answer.
    names = [f"sample {j + 1}" for j in range(flags.num_samples)] if config.method == "sr3" else ["regression"]
    seeds = [flags.seed + j for j in range(len(names)) for _ in images]
    low_res_of_all = torch.cat([low_res] * len(names)).to(device)  # [samples · N, C, h, w]
    samples = super_resolve(model, low_res_of_all, seeds, steps).cpu()  # [samples · N, C, H, W]
    columns = {
        "input": to_unit(upsample(low_res, config.image_size, "nearest-exact")),
        "bicubic": to_unit(upsample(low_res, config.image_size)),
    }
    columns |= zip(names, samples.split(len(images)))  # [N, C, H, W] each
    if all(image.shape[-1] > config.low_res_size for image in images):
        columns["original"] = to_unit(shrunk(config.image_size))
    picture_of_columns(columns, scale=3).save(output)
    print(f"{output}: {len(images)} × {len(names)} samples, seed {flags.seed}")


def read_image(path, config, as_is):
    """A picture file, framed or cropped to its middle square: uint8 [1, C, side, side]."""
    picture = read_picture(path, config.channels)
    is_digit = config.dataset in ("mnist", "digits") and config.channels == 1
    if is_digit and not as_is and max(picture.size) > config.low_res_size:
        return frame_digit(picture, config.image_size, path)
    return pil_to_tensor(center_crop(picture, min(picture.size)))[None]


if __name__ == "__main__":
    main()
