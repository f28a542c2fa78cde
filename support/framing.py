"""Frames a drawing or photo of a digit as MNIST frames its digits: a model of MNIST knows no others.

Those are white on black, fill a box of 20 of the picture's 28 pixels, and have their centre of mass in its middle.
"""

import torch
import torch.nn.functional as F
from PIL import ImageFilter
from torchvision.transforms import functional as TF

from support.errors import InputError

BOX = 20 / 28  # of the picture's side: the longer side of the digit's box
MIDDLE = 14.2 / 28  # of the side: MNIST's centres of mass lie between 14 and 15 of 28


def frame_digit(picture, size, name):
    """From a grey picture of any size the framed one, uint8 [1, 1, size, size]: white ink on black.

    A dark digit on a light ground is inverted. Shadows are evened out, specks and what touches the border are erased,
    very thin or thick strokes are brought near MNIST's. Raises InputError, which names the picture, where what is left
    is more than one thing, or has a shape that MNIST's digits don't have.
    """
    shrinking = 256 / max(picture.size)  # more pixels would only take more time
    digit = find_digit(picture.resize([max(1, round(shrinking * side)) for side in picture.size]), name)
    inked = (digit > 0.5).nonzero().float()
    longer = (inked.amax(0) - inked.amin(0)).max() + 1
    side = round(longer.item() / BOX)  # of the square that becomes the picture; it may reach beyond the digit's
    top, left = (inked.mean(0) - MIDDLE * side).ceil().int().tolist()
    return (255 * TF.resized_crop(digit[None], top, left, side, side, (size, size))).round().byte()[None]


def find_digit(picture, name):
    """The digit in a picture, as `fit_digit` returns it.

    Ink that fills the picture is all there is, on a ground of one level. Otherwise the ground is the median of what
    lies around each pixel, and ink that is joined to the border by ink as strong is none of the digit's.
    """
    levels = TF.to_tensor(picture)[0]  # [H, W] in 0…1
    small = TF.pad(picture.resize((48, 48)), 17, padding_mode="reflect")
    # Three quarters of the picture wide: smaller ones follow a sheet that lies on a desk, larger ones miss shadows.
    around = TF.center_crop(small.filter(ImageFilter.MedianFilter(35)), 48).resize(picture.size)
    for ground in (levels.median(), TF.to_tensor(around)[0]):
        inks = torch.stack([levels - ground, ground - levels]).clamp(min=0)  # [2, H, W]: light and dark
        if ground.ndim:
            border = inks.clone()
            border[:, 1:-1, 1:-1] = 0
            inks = inks - flood(border, inks)
        ink = inks[inks.square().sum((1, 2)).argmax()]
        ink = (ink / ink.quantile(0.998).clamp(min=0.06)).clamp(max=1)
        reached = min(ink.amax(dim).mean() for dim in (0, 1))  # by the digit: of the columns, of the rows
        if ground.ndim or reached > 0.8 and ink[[0, -1]].mean() < 0.6:  # but no frame
            digit = fit_digit(ink)
            if digit is not None:
                return digit
    raise InputError(
        f"{name} shows no single digit on an even ground: crop it, or draw it white on black; --as_is takes it as it is"
    )


def fit_digit(ink):
    """Of ink, [H, W] in 0…1, the digit, [120, 120], with a pen as MNIST's; None where it is no single digit.

    The longer side of its box has 80 pixels before the pen is changed. The limits are those of MNIST's test digits, of
    which about one in a hundred is beyond: more than one part, too wide, too much ink, too short or long a line.
    """
    wide = largest_within((ink > 0.35).float(), 3)  # so that small gaps part nothing
    numbers = torch.arange(1.0, 1 + ink.numel()).view(ink.shape) * wide
    numbers = flood(numbers, numbers.max() * wide).long()  # each part has the largest number in it
    amounts = torch.bincount(numbers.flatten(), ink.flatten(), minlength=2)
    amounts[0] = 0  # the ground
    largest, second = amounts.topk(2).values
    ink = ink * (numbers == amounts.argmax())  # without specks
    inked = (ink >= ink.max() / 3).nonzero()
    first, last = inked.amin(0), inked.amax(0)
    height, width = (last - first + 1).tolist()
    longer = max(height, width)
    top, left = (first - longer // 4).tolist()
    side = longer * 3 // 2
    digit = TF.resized_crop(ink[None], top, left, side, side, (120, 120))[0]
    digit = (2 * digit / digit.max() - 0.5).clamp(0, 1)  # edges as steep as a pen's
    edges = digit.diff(dim=0).abs().sum() + digit.diff(dim=1).abs().sum()
    pen = 2.54 * digit.sum() / edges  # pixels: a line has two edges, and |dx| + |dy| is 1.27 lengths on average
    area, length = digit.sum(), digit.sum() / pen
    if second >= largest / 12 or width > 1.5 * height or area > 2700 or not 60 < length < 270:
        return None
    reach = round((pen.clamp(7, 14) - pen).item() / 2)  # eight of ten of MNIST's are so wide; the median is 10
    return largest_within(digit, reach) if reach > 0 else -largest_within(-digit, -reach)


def flood(image, limit):
    """Lets the values of [N, H, W] or [H, W] spread to their neighbours, below the limit, until hardly any changes."""
    previous = image - 1
    while (image - previous).max() > 0.01:
        previous = image
        image = torch.minimum(largest_within(image, 1), limit)
    return image


def largest_within(image, reach):
    """The largest value around each pixel of [N, H, W] or [H, W], in a square of 2 · reach + 1 pixels."""
    return F.max_pool2d(image[None], 2 * reach + 1, stride=1, padding=reach)[0]
