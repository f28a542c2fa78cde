"""Digits that look handwritten, drawn where MNIST can't be had: pen strokes, bent a little differently each time."""

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.transforms import functional as TF

# Three ways to write each of the ten digits. A stroke is a row of points "xy" on a 10 x 10 grid (x to the right,
# y down) that the pen passes through; "|" lifts the pen; a point given twice makes a corner.
STROKES = [
    ("40 21 13 16 28 49 68 76 73 61 40", "62 50 31 13 16 28 49 68 76 73 61 40 20", "50 31 24 27 39 58 65 62 51 31"),
    ("40 44 49", "32 50 50 54 59", "22 50 50 54 59 59|29 79"),
    ("12 30 51 53 36 19 19 49 79", "12 30 61 54 38 19 07 27 58 89", "11 40 62 54 36 19 19 49 88"),
    ("11 30 61 53 34 34 65 67 49 18", "10 60 60 34 34 65 67 49 18", "12 30 51 43 24 55 68 49 18"),
    ("20 15 15 45 85|60 54 59", "60 33 06 06 46 86|60 64 59", "10 13 35 64 70 70 64 59"),
    ("70 20 20 14 14 43 66 58 39 18", "20 14 14 43 66 58 39 18|20 50 80", "70 40 22 34 56 58 39 18"),
    ("60 32 15 17 39 58 66 45 16", "40 13 06 28 49 68 66 45 25 17", "70 43 16 28 49 67 55 27"),
    ("00 40 80 80 54 39", "02 00 40 70 70 54 48 49", "01 31 70 70 44 29|25 45 65"),
    ("61 40 22 44 67 49 27 44 62 61", "40 22 44 62 40|44 16 18 49 68 66 44", "70 40 21 34 56 58 39 18 26 44 62 70"),
    ("61 40 12 24 44 62 61 61 64 59", "62 40 12 24 44 62 61 61 65 48 29", "61 30 12 24 53 71 54 39"),
]
GLYPH = 64  # pixels on a side of the glyphs that all drawn digits are bent from
PENS = (4, 5, 7)  # of these widths


def draw_glyph(strokes, pen):
    """Strokes as white ink on black: float [1, GLYPH, GLYPH] in 0…1, the digit in the middle two thirds."""
    picture = Image.new("L", (GLYPH, GLYPH))
    for stroke in strokes.split("|"):
        points = torch.tensor([[int(x), int(y)] for x, y in stroke.split()]) / 9  # [points, 2]
        curve = F.interpolate(points[None, None], (50 * len(points), 2), mode="bicubic", align_corners=True)[0, 0]
        curve = GLYPH * ((curve - torch.tensor([0.44, 0.5])) * 2 / 3 + 0.5)
        ImageDraw.Draw(picture).line([tuple(point) for point in curve.tolist()], 255, pen, joint="curve")
        for x, y in curve[[0, -1]].tolist():  # round ends
            ImageDraw.Draw(picture).ellipse([x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2], 255)
    return TF.gaussian_blur(TF.to_tensor(picture), 5)


def draw_digits(num_images, image_size=32, channels=1, seed=0):
    """Digits that look handwritten, uint8 [N, channels, image_size, image_size] in 0…255, and labels, int64 [N] in 0…9.

    One channel is a white pen on black; three are a coloured pen on a dark coloured ground. Image i depends on the
    seed, the size, the channels and i only; its shape and label don't depend on the channels.
    """
    glyphs = torch.stack([draw_glyph(style, pen) for styles in STROKES for style in styles for pen in PENS])
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num_images, 8 + 18 + 6, generator=generator)  # row i belongs to image i
    chosen = (uniform[:, 0] * len(glyphs)).long()  # a label, a style and a pen
    images = []
    for u, kinds in zip(uniform.split(1000), chosen.split(1000)):
        size, width, slant, turn, right, down = (2 * u[:, 1:7] - 1).T  # -1…1, [B] each
        # Where each pixel of the image is found in the glyph: turned, slanted and scaled, then bent smoothly.
        size, turn = 1.1 + 0.06 * size, 0.15 * turn
        cos, sin = size * turn.cos(), size * turn.sin()
        x_axis = torch.stack([cos * (1.2 + 0.3 * width), sin + cos * (0.25 + 0.3 * slant), 0.04 * right], dim=1)
        y_axis = torch.stack([-sin, cos, 0.04 * down], dim=1)
        theta = torch.stack([x_axis, y_axis], dim=1)  # [B, 2, 3]
        grid = F.affine_grid(theta, [len(u), 1, image_size, image_size], align_corners=False)
        bend = (0.3 * u[:, 8:26] - 0.15).view(-1, 2, 3, 3)
        grid = grid + F.interpolate(bend, grid.shape[1:3], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        ink = F.grid_sample(glyphs[kinds], grid, align_corners=False)  # [B, 1, S, S]
        ink = ink * (0.85 + 0.15 * u[:, 7, None, None, None])
        if channels == 3:  # a bright pen on a dark ground
            pen, ground = u[:, 26:29, None, None], 0.35 * u[:, 29:32, None, None]
            ink = ground + ink * (0.4 + 0.6 * pen / pen.amax(1, keepdim=True) - ground)
        images.append((255 * ink).round().byte())
    return torch.cat(images), chosen // (len(glyphs) // 10)
