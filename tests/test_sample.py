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
    """Two pictures; the checkpoints of an SR3 and a regression of grey digits, and of an SR3 of coloured ones."""
    folder = tmp_path_factory.mktemp("files")
    files = {"small": folder / "small.png", "wide": folder / "wide.png"}
    Image.fromarray(PIXELS).save(files["small"])
    WIDE.save(files["wide"])
    for name, settings in (("grey", {}), ("regression", {"method": "regression"}), ("color", {"channels": 3})):
        files[name] = run(folder / name, warmup_steps=0, **settings) / "checkpoint.pt"
    return files


@pytest.fixture
def draw(files, tmp_path):
    """Called with names of files and flags, runs sample.py: the cells, int [rows, columns, 3, 16, 16]."""
    output = tmp_path / "new/folder/samples.png"

    def draw(*arguments):
        call(sample, "--output", output, "--device", "cpu", *(files.get(name, name) for name in arguments))
        columns = Image.open(output).width // (6 * 18)
        return cells(output, columns, scale=6).movedim(3, 1).unflatten(0, (-1, columns)).int()

    return draw


def test_a_row_shows_the_input_its_enlargement_the_samples_and_the_original(files, draw):
    """Of a wide picture the middle square counts."""
    (row,) = draw("color", "wide", "--num_samples", 2, "--seed", 7)
    low_res, original = (downsample(to_signed(DIGIT), size).expand(2, 3, -1, -1) for size in (4, 16))
    enlarged = [upsample(low_res[:1], 16, mode) for mode in ("nearest-exact", "bicubic")]
    samples = super_resolve(load_model(files["color"]), low_res, [7, 8]) * 2 - 1
    expected = to_unit(torch.cat([*enlarged, samples, original[:1]]))  # [5, 3, 16, 16]
    assert (row - 255 * expected).abs().max() < 1.1


def test_a_picture_of_the_low_resolution_is_the_input_itself(draw):
    (row,) = draw("grey", "small")
    assert len(row) == 2 + 4 and (row[0, 0, ::4, ::4].numpy() == PIXELS).all()


def test_a_sample_depends_on_its_picture_and_seed_only(draw):
    (alone,) = draw("grey", "wide", "--as_is", "--num_samples", 1, "--seed", 7)
    among, _ = draw("grey", "wide", "--as_is", "small", "--num_samples", 2, "--seed", 6)
    assert (among[3] - alone[2]).abs().max() <= 1 and (among[2] - alone[2]).abs().max() > 20


def test_grey_digits_are_framed_unless_left_as_they_are(draw):
    originals = torch.stack([draw("grey", "wide")[0, -1], draw("grey", "wide", "--as_is")[0, -1]])
    expected = torch.cat([frame_digit(WIDE, 16, "wide"), 255 * to_unit(downsample(to_signed(DIGIT), 16))])
    assert (originals - expected).abs().max() < 0.6


def test_without_a_picture_eight_digits_are_drawn_by_the_seed(draw):
    grid, again = (draw("grey", "--num_samples", 2, "--seed", 3) for _ in range(2))
    assert grid.shape[:2] == (8, 5) and torch.equal(grid, again)
    assert torch.equal(grid[:, 4, :1], DRAW_DIGITS(8, 16, 1, seed=3)[0].int())


def test_a_regression_has_one_answer(draw):
    assert draw("regression", "wide").shape[:2] == (1, 4)


def test_what_is_wrong_is_told_in_one_line(draw, tmp_path, failure):
    text = tmp_path / "text.png"
    text.write_text("text")
    for *arguments, words in (
        ("grey", text, "text.png: Pillow can't read this PNG file"),
        (text, "text.png is no checkpoint"),
        ("none.pt", "none.pt is no checkpoint to use here (No such file"),
        ("grey", "--sampling_steps", 2001, "sampling_steps is 2001"),
        ("grey", "--seed", -1, "seed is -1"),
        ("grey", "--num_samples", 0, "--num_samples: invalid positive value: '0'"),
    ):
        assert words in failure(draw, *arguments)
