"""sample.py: what its picture shows, whose noise is whose, and what it refuses."""

import numpy as np
import pytest
import torch
from conftest import DRAW_DIGITS, call, cells, run
from PIL import Image, ImageOps

import sample
from support.framing import frame_digit
from utils import downsample, load_model, super_resolve, to_signed, to_unit, upsample

PIXELS = np.arange(0, 240, 15, np.uint8).reshape(4, 4)
DIGIT = DRAW_DIGITS(1, 40)[0]  # [1, 1, 40, 40]
WIDE = ImageOps.expand(Image.fromarray(DIGIT[0, 0].numpy()), (10, 0))  # 60 × 40 pixels


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two pictures; the checkpoints of an SR3 of grey digits and of a regression of coloured ones."""
    folder = tmp_path_factory.mktemp("files")
    files = {"small": folder / "small.png", "wide": folder / "wide.png"}
    Image.fromarray(PIXELS).save(files["small"])
    WIDE.save(files["wide"])
    for method, channels in (("sr3", 1), ("regression", 3)):
        files[method] = run(folder / method, method=method, channels=channels, warmup_steps=0) / "checkpoint.pt"
    return files


@pytest.fixture
def draw(files, tmp_path):
    """Called with names of files and flags, runs sample.py: the cells, int [rows, columns, 3, 16, 16]."""
    output = tmp_path / "new/folder/samples.png"

    def draw(*arguments):
        call(sample, "--output", output, "--device", "cpu", *(files.get(name, name) for name in arguments))
        return cells(output, scale=3).int()

    return draw


def test_a_row_shows_the_input_its_enlargement_the_samples_and_the_original(files, draw):
    """Of a wide picture the middle square counts."""
    (row,) = draw("sr3", "wide", "--as_is", "--num_samples", 2, "--seed", 7)
    low_res, original = (downsample(to_signed(DIGIT), size) for size in (4, 16))
    enlarged = [upsample(low_res, 16, mode) for mode in ("nearest-exact", "bicubic")]
    samples = super_resolve(load_model(files["sr3"]), low_res.repeat(2, 1, 1, 1), [7, 8]) * 2 - 1
    expected = to_unit(torch.cat([*enlarged, samples, original]))  # [5, 1, 16, 16]
    assert (row - 255 * expected).abs().max() < 1.1


def test_samples_do_not_depend_on_other_pictures_and_a_small_one_is_the_input_itself(draw):
    (alone,), (row, small) = draw("sr3", "wide"), draw("sr3", "wide", "small")
    assert len(small) == 2 + 4 and (small[0, 0, ::4, ::4].numpy() == PIXELS).all()
    assert (row - alone[:6]).abs().max() <= 1  # without the original


def test_grey_digits_are_framed_others_are_not_and_a_regression_has_one_answer(draw):
    (*_, framed), (_, _, _, original) = *draw("sr3", "wide"), *draw("regression", "wide")
    assert (framed - frame_digit(WIDE, 16, "wide")).abs().max() < 0.6
    assert (original - 255 * to_unit(downsample(to_signed(DIGIT), 16))).abs().max() < 0.6


def test_without_a_picture_eight_digits_are_drawn_by_the_seed(draw):
    grid = draw("sr3", "--num_samples", 1, "--seed", 3)
    assert torch.equal(grid[:, 3, :1], DRAW_DIGITS(8, 16, 1, seed=3)[0].int())


def test_what_is_wrong_is_told_in_one_line(draw, tmp_path, failure):
    (text := tmp_path / "text.png").write_text("text")
    for *arguments, words in (
        ("sr3", text, "text.png: Pillow can't read this PNG file"),
        (text, "text.png is no checkpoint"),
        ("sr3", "--seed", -1, "seed is -1"),
        ("sr3", "--output", text.with_suffix(".pt"), "text.pt: its name must end in .png"),
    ):
        assert words in failure(draw, *arguments)
