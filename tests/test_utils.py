"""utils.py: the pair written out in float64, models, an answer that is the image's own, pictures to look at."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DRAW_DIGITS, ROOT, cells

from metrics import psnr
from sr3 import sample
from support.data import load_data
from utils import load_model, make_pair, picture_of_columns, super_resolve, to_unit

SHIPPED = ROOT / "output/reference"


def keys(x, a):
    """The cubic convolution kernel of Keys (1981)."""
    x = x.abs()
    return torch.where(x < 1, (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x - 1) * (x - 2) ** 2 * (x < 2))


def test_a_pair_is_shrunk_antialiased_and_enlarged_bicubically():
    """Down: a = -1/2, stretched by the factor, weights normalised to 1. Up: a = -3/4; the border repeats outwards."""
    torch.manual_seed(0)
    images = F.interpolate(torch.randint(2, (4, 3, 4, 4)).byte() * 255, (32, 32))  # such squares overshoot
    y_0, low_res, context = (values.double() for values in make_pair(images, 8))
    offset = (torch.arange(32) + 0.5) / 4 - 0.5 - torch.arange(-2, 10).double()[:, None]  # [8 and a border of 2, 32]
    down, up = keys(offset[2:-2], -0.5), keys(offset, -0.75)
    down /= down.sum(1, keepdim=True)
    padded = F.pad(low_res, (2, 2, 2, 2), "replicate")
    assert (y_0 == images / 127.5 - 1).all()
    expected = (down @ y_0 @ down.T).clamp(-1, 1), (up.T @ padded @ up).clamp(-1, 1)
    torch.testing.assert_close((low_res, context), expected, atol=1e-5, rtol=0)


def test_an_answer_is_the_sample_of_its_input_and_seed_in_8_bits_and_the_models_precision():
    model, (_, low_res, context) = load_model(SHIPPED / "8x/sr3.pt"), make_pair(DRAW_DIGITS(66, 32)[0], 4)
    model.config.precision = "bfloat16"
    found = super_resolve(model, low_res, np.arange(66), 2)  # 64 together, then these two
    with torch.autocast("cpu", torch.bfloat16):
        expected = sample(model, context[64:], 2, [torch.Generator().manual_seed(seed) for seed in (64, 65)])
    assert torch.equal(found[64:], (127.5 * expected.clamp(-1, 1) + 127.5).round() / 255)


def test_a_picture_has_columns_under_their_labels_and_a_row_for_each_image():
    images = torch.rand(3, 2, 3, 16, 16)
    picture = picture_of_columns({"input": images[:, 0], "two\nlines": images[:, 1]})
    assert torch.equal(cells(picture), (255 * images).round().byte())


@pytest.mark.skipif("SR3_DATA_DIR" not in os.environ, reason="SR3_DATA_DIR names no folder with MNIST")
@pytest.mark.parametrize("factor", ["8x", "4x"])
def test_the_shipped_weights_draw_digits_as_well_as_their_logs_say(factor):
    """The log's last row is of the same 64 digits and noise."""
    model = load_model(SHIPPED / factor / "sr3.pt")
    _, (images, _) = load_data(model.config, os.environ["SR3_DATA_DIR"])
    high_res, low_res, _ = make_pair(images[:64], model.config.low_res_size)
    found = psnr(super_resolve(model, low_res, range(64)), to_unit(high_res)).mean()
    *_, logged, _, _ = (SHIPPED / factor / "log.csv").read_text().split(",")
    assert abs(found - float(logged)) < 0.2
