"""Frames a drawing or photo of a digit as MNIST frames its digits: a model of MNIST knows no others.

Those are white on black, fill a box of 20 of the picture's 28 pixels, and have their centre of mass in its middle.
"""

import math
import sys

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional as TF

from support.errors import InputError

BOX = 20 / 28  # of the picture's side: the longer side of the digit's box
MIDDLE = 14.2 / 28  # of the side: MNIST's centres of mass lie between 14 and 15 of 28


def frame_digit(picture: Image.Image, size: int, name: str) -> Tensor:
    """From a grey picture of any size the framed one, uint8 [1, 1, size, size]: white ink on black.

    A dark digit on a light ground is inverted, with a line on stderr that begins with the picture's name. Shadows
    and grey levels are evened out, specks erased, very thin or thick strokes brought near MNIST's. Raises InputError
    where nothing stands out from an even ground.
    """
    picture = picture.copy()
    picture.thumbnail((1024, 1024))  # more pixels would only take more time
    ink, is_light = find_ink(TF.to_tensor(picture)[0], name)  # [H, W]
    ink = fit_pen(erase_specks(ink))
    longer = longer_side(ink)
    if longer < 5:
        raise InputError(f"{name} shows no digit, only specks; give another picture, or --as_is")
    if is_light:
        print(f"{name} has a light ground: inverted to white on black", file=sys.stderr)
    # The square that becomes the picture; it may reach beyond the canvas, so that gets a margin.
    side = longer / BOX
    margin = math.ceil(side)
    left = margin + centre_of_mass(ink.sum(dim=0)) - MIDDLE * side
    top = margin + centre_of_mass(ink.sum(dim=1)) - MIDDLE * side
    canvas = ImageOps.expand(TF.to_pil_image(ink), margin)
    square = (left, top, left + side, top + side)
    framed = TF.to_tensor(canvas.resize((size, size), Image.Resampling.BICUBIC, square))  # [1, size, size]
    enlarged = size / side
    if enlarged > 1.5:  # few pixels became many: edges get as steep as MNIST's again
        framed = (framed - 0.5) * enlarged / 1.5 + 0.5
    framed = framed / framed.max()
    return (255 * framed.clamp(0, 1)).round().byte()[None]


def find_ink(levels: Tensor, name: str) -> tuple[Tensor, bool]:
    """From grey levels, [H, W] in 0…1, the ink of each pixel, from 0 for the ground to 1; and whether it was dark.

    The ground is a smooth surface of second order in x and y, so that a shadow is no ink. It is fitted to the border at
    first, where ink is rare, then to all pixels that lie near the surface.
    """
    height, width = levels.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    terms = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], dim=-1)  # [H, W, 6]
    margin = 1 + min(height, width) // 20
    border = torch.ones_like(levels, dtype=torch.bool)
    border[margin:-margin, margin:-margin] = False
    ground = border & ((levels - levels[border].median()).abs() < 0.25)
    for _ in range(6):
        known = terms[ground]  # [pixels, 6]
        weights = torch.linalg.pinv(known.T @ known) @ (known.T @ levels[ground])  # least squares
        difference = levels - terms @ weights
        noise = 1.5 * difference[ground].abs().median()  # about the standard deviation of the paper's grain
        ground = difference.abs() <= (3 * noise).clamp(min=0.02)
    if ground[border].float().mean() < 2 / 3:
        raise InputError(f"{name} has no even ground around a digit (a hard shadow?); give another picture, or --as_is")
    is_light = bool(difference[~ground].sum() < 0)
    strength = (-difference if is_light else difference).clamp(min=0)
    pen = strength[~ground].square().sum() / strength[~ground].sum()  # a mean in which ink counts, and its halo hardly
    if not pen > max(0.06, 5 * noise):  # without any ink it is not a number
        raise InputError(f"{name} shows no digit that stands out from its ground; give another picture, or --as_is")
    white, black = strength[strength > pen / 2].quantile(0.8), 3 * noise
    return ((strength - black) / (white - black)).clamp(0, 1), is_light


def erase_specks(ink: Tensor) -> Tensor:
    """Erases the connected parts of [H, W] that have less than a thirtieth of the ink of the largest one."""
    cell = math.ceil(max(ink.shape) / 128)  # pixels: parts are told apart on a coarse grid
    has_ink = F.max_pool2d(ink[None, None], cell, ceil_mode=True) > 0.3
    amount = F.avg_pool2d(ink[None, None], cell, ceil_mode=True)
    numbers = torch.arange(1.0, 1 + has_ink.numel()).view(has_ink.shape) * has_ink
    previous = torch.zeros_like(numbers)
    while not torch.equal(numbers, previous):  # each cell takes its neighbours' largest number until a part has one
        previous = numbers
        numbers = F.max_pool2d(numbers, 3, stride=1, padding=1) * has_ink
    numbers = numbers.long()
    amounts = torch.bincount(numbers.flatten(), amount.flatten())  # of each part
    amounts[0] = 0  # no part
    kept = (amounts[numbers] > amounts.max() / 30).float()[0, 0]
    kept = largest_within(kept, 1)  # with its soft edges
    kept = kept.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    return ink * kept[: ink.shape[0], : ink.shape[1]]


def fit_pen(ink: Tensor) -> Tensor:
    """Makes the pen on [H, W] wider or narrower where its width is not usual in MNIST."""
    padded = F.pad(ink, (1, 1, 1, 1))
    edges = padded.diff(dim=0).abs().sum() + padded.diff(dim=1).abs().sum()
    pen = 2.54 * ink.sum() / edges  # pixels: a line has two edges, and |dx| + |dy| is 1.27 lengths on average
    longer = longer_side(ink)
    usual = pen.clamp(0.09 * longer, 0.17 * longer)  # so are eight of ten of MNIST's; the median is 0.12
    reach = round((usual - pen).item() / 2)
    if reach < 0:
        return -largest_within(-ink, -reach)
    return largest_within(ink, reach)


def largest_within(image: Tensor, reach: int) -> Tensor:
    """The largest value of [H, W] around each pixel, in a square of 2 · reach + 1 pixels."""
    width = 2 * reach + 1
    image = F.max_pool2d(image[None], (width, 1), stride=1, padding=(reach, 0))
    return F.max_pool2d(image, (1, width), stride=1, padding=(0, reach))[0]


def longer_side(ink: Tensor) -> int:
    """The longer side of the box around the ink of [H, W], in pixels."""
    sides = []
    for dim in (0, 1):
        inked = (ink.amax(dim) > 0.3).nonzero()
        sides.append((inked[-1] - inked[0]).item() + 1)
    return max(sides)


def centre_of_mass(masses: Tensor) -> float:
    """Where masses at the middles of pixels, [pixels], balance, in pixels from the first one's edge."""
    places = torch.arange(len(masses)) + 0.5
    return ((masses * places).sum() / masses.sum()).item()
