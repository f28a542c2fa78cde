"""What sample.py makes of a drawing or photo: the digit as MNIST would frame it, or one line that says what to do."""

import pytest
import torch
from PIL import Image, ImageChops, ImageDraw, ImageOps

from support.errors import InputError
from support.framing import frame_digit

SEVEN = [(100, 60), (190, 60), (130, 180)]


def seven(width=14, ground=0, ink=255):
    picture = Image.new("L", (300, 240), ground)
    ImageDraw.Draw(picture).line(SEVEN, ink, width, joint="curve")
    return picture


def framed(picture):
    return frame_digit(picture, 28, "my.png")[0, 0] / 255  # [28, 28]


def difference(picture):
    return (framed(picture) - framed(seven())).abs().mean().item()


def test_the_longer_side_of_the_box_is_20_of_28_pixels_and_the_centre_of_mass_in_the_middle():
    image = frame_digit(seven(), 28, "my.png")
    assert image.shape == (1, 1, 28, 28) and image.dtype == torch.uint8
    image = image[0, 0].float()
    rows = (image.amax(dim=1) > 100).nonzero()
    assert abs(rows[-1] - rows[0] + 1 - 20) <= 1
    for masses in (image.sum(dim=0), image.sum(dim=1)):
        assert abs((masses * (torch.arange(28) + 0.5)).sum() / masses.sum() - 14.2) < 0.5


def test_a_light_ground_is_inverted():
    assert difference(ImageOps.invert(seven())) < 0.01


@pytest.mark.parametrize("width", [4, 9, 24])
def test_a_thin_or_thick_pen_becomes_as_wide_as_those_of_mnist(width):
    ink = framed(seven(width)).sum().item()
    assert 40 < ink < 120  # about 30 pixels of line, 1.8 to 3.4 pixels wide, and its ends


def draw_lines(picture):
    for y in range(10, 240, 25):
        ImageDraw.Draw(picture).line([(0, y), (300, y)], 170, 2)


def draw_edge(picture):
    ImageDraw.Draw(picture).polygon([(300, 0), (300, 240), (260, 240)], 40)


def draw_frame(picture):
    ImageDraw.Draw(picture).rectangle((0, 0, 299, 239), outline=0, width=9)


@pytest.mark.parametrize("draw", [draw_lines, draw_edge, draw_frame])
def test_lines_edges_and_frames_are_erased(draw):
    picture = seven(ground=235, ink=30)
    draw(picture)
    assert difference(picture) < 0.03


def test_shadows_are_evened_out():
    picture = seven(ground=235, ink=30)
    shadow = Image.linear_gradient("L").resize(picture.size).point(lambda level: 85 + 2 * level // 3)
    assert difference(ImageChops.multiply(picture, shadow)) < 0.03


@pytest.mark.parametrize("ground, ink", [(0, 255), (235, 30)])
def test_a_digit_that_is_cropped_to_its_box_is_all_there_is(ground, ink):
    assert difference(seven(ground=ground, ink=ink).crop((98, 54, 195, 181))) < 0.03


def draw_two(picture):
    ImageDraw.Draw(picture).line([(240, 60), (240, 180)], 255, 14)


def draw_box(picture):
    ImageDraw.Draw(picture).rectangle((60, 30, 240, 210), outline=255, width=6)


def draw_over(picture):
    picture.paste(0, (0, 0, 300, 240))


def draw_card(picture):
    picture.paste(255, (60, 40, 240, 200))


@pytest.mark.parametrize("draw", [draw_two, draw_box, draw_over, draw_card])
def test_two_things_none_or_no_line_are_refused_in_one_line_that_says_what_to_do(draw):
    picture = seven()
    draw(picture)
    with pytest.raises(InputError, match="^my.png shows no single digit .*: crop it, or draw it .*; --as_is .*$"):
        framed(picture)
