"""What the scripts share: the pair (y_0, x) that is made from a picture, models, and pictures to look at.

Images that go into a model are in [-1, 1]. Those to look at or to measure, as `super_resolve` returns them, are in
[0, 1].
"""

from itertools import islice

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from sr3 import SR3, Regression, sample
from support.errors import InputError
from support.machine import autocast, choose_layout, choose_precision
from support.run import load_checkpoint
from support.settings import DEFAULTS, check
from unet import UNet

# The pair (y_0, x): the context x is made from y_0, by way of low_res -------------------------------------------------


def make_pair(images, low_res_size):
    """Makes y_0 [B, C, H, W], the low-resolution image [B, C, h, w] and x [B, C, H, W], all in [-1, 1].

    `images` are uint8 in 0…255; h and w are `low_res_size`. Both resamplings are clamped where they overshoot, so x
    stays in this range.
    """
    high_res = to_signed(images)
    low_res = downsample(high_res, low_res_size)
    return high_res, low_res, upsample(low_res, images.shape[-1])


def to_signed(images):
    """uint8 images in 0…255 as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_unit(images):
    """Images in [-1, 1] as pictures and metrics want them, in [0, 1]; what lies outside is clamped."""
    return (images.clamp(-1, 1) + 1) / 2


def downsample(images, size):
    """Shrinks [B, C, H, W] in [-1, 1] to [B, C, size, size] bicubically, antialiased, clamped where it overshoots."""
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def upsample(images, size, mode="bicubic"):
    """Enlarges [B, C, h, w] to [B, C, size, size], clamped: bicubic gives x, "nearest-exact" squares to look at."""
    return F.interpolate(images, (size, size), mode=mode).clamp(-1, 1)


# Models ---------------------------------------------------------------------------------------------------------------


def build_model(config):
    """The untrained model that a config describes. Raises InputError for sizes or noise levels that it can't have."""
    try:
        unet = UNet(
            config.channels, config.features, config.channel_multipliers, config.blocks_per_level,
            config.attention_resolutions, config.attention_heads, config.dropout, config.image_size
        )  # fmt: skip
        if config.method == "regression":
            return Regression(unet)
        return SR3(unet, config.num_timesteps, config.beta_start, config.beta_end, config.loss_weight)
    except ValueError as error:
        if error.__traceback__.tb_next.tb_next:  # raised not by a constructor but deeper: a bug
            raise
        raise InputError(error) from None


def load_model(path, device="cpu"):
    """A checkpoint's model with its averaged weights, `config` and `step`. Raises InputError for other files."""
    checkpoint, device = load_checkpoint(path), torch.device(device)
    config = check(DEFAULTS | checkpoint["config"])
    model = build_model(config)
    try:
        model.load_state_dict(checkpoint["ema"])  # shipped weights are in half precision; the model stays float32
    except RuntimeError as error:
        raise InputError(f"{path} is of another version of this lesson, or damaged: {error}") from None
    model.config, model.step = config, checkpoint["step"]
    return model.eval().to(device, memory_format=choose_layout(device, choose_precision(config.precision, device)))


def super_resolve(model, low_res, seeds, steps=None):
    """Samples for low-resolution images, [N, C, h, w] in [-1, 1]: [N, C, H, W] in [0, 1], rounded to 8 bits.

    `model` is from `load_model`; x is made here. Image i's noise depends on `seeds[i]` only. `steps` are the refinement
    steps, the checkpoint's own if None. Raises ValueError for `steps` out of range, and unless the images have the
    size that the model was trained for, and a seed each.
    """
    config, device, side = model.config, low_res.device, model.config.low_res_size
    if low_res.shape != (len(seeds), config.channels, side, side):
        raise ValueError(f"{[*low_res.shape]}, {len(seeds)} seeds: give [N, {config.channels}, {side}, {side}] and N")
    context = upsample(low_res, config.image_size)  # x
    precision = choose_precision(config.precision, device)
    generators = (torch.Generator().manual_seed(int(seed)) for seed in seeds)  # on the CPU: alike everywhere
    together = 512 if device.type == "cuda" else 64  # images
    steps = config.sampling_steps if steps is None else steps
    parts = []
    for part in tqdm(context.split(together), "drawing", leave=False):
        with autocast(device, precision):
            parts.append(sample(model, part, steps, list(islice(generators, len(part)))))
    return (255 * to_unit(torch.cat(parts))).round() / 255


# Pictures: images in [0, 1] as pictures to look at --------------------------------------------------------------------


def picture_of(images, columns, scale=2, labels=None):
    """[N, C, H, W] in [0, 1], N > 1, as one picture in `columns` columns, labelled; a pixel is drawn scale × scale."""
    grid = make_grid(images.cpu(), nrow=columns, padding=2, pad_value=0.5)
    picture = to_pil_image((255 * grid).round().byte())  # rows · (H + 2) + 2 by columns · (W + 2) + 2 pixels
    picture = picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)
    if labels:
        lines = max(label.count("\n") + 1 for label in labels)
        picture = ImageOps.expand(picture, (0, 16 * lines, 0, 0), "white")
        cell, font = scale * (images.shape[-1] + 2), ImageFont.load_default(12)
        for i, label in enumerate(labels):
            centre = (cell * (i + 0.5) + scale, 1)
            ImageDraw.Draw(picture).multiline_text(centre, label, "black", font, anchor="ma", align="center")
    return picture


def picture_of_columns(columns, scale=2):
    """A labelled column for each tensor, [N, C, H, W] in [0, 1], and a row for each image."""
    grid = torch.stack(list(columns.values()), dim=1).flatten(0, 1)
    return picture_of(grid, len(columns), scale, list(columns))
