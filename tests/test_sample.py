"""sample.py: what its picture shows, pixel by pixel, which pictures it takes, and what it refuses."""

import sys

import numpy as np
import pytest
import torch
from conftest import DRAW_DIGITS, cells, lines_of, run, write_tiny_config
from PIL import Image

import sample
import utils
from utils import downsample, load_model, picture_of, super_resolve, to_float, upsample

SMALL = Image.fromarray(np.random.default_rng(0).integers(50, 200, (4, 4), dtype=np.uint8))
LARGE = SMALL.resize((60, 40), Image.Resampling.BILINEAR)


@pytest.fixture(scope="module")
def models(few_digits, tmp_path_factory, small_mnist):
    """The checkpoints of an SR3 and a regression of grey digits like MNIST's, and of an SR3 of coloured ones."""
    folder, paths = tmp_path_factory.mktemp("models"), {}
    kinds = {"grey": {}, "regression": {"method": "regression"}, "color": {"dataset": "digits", "channels": 3}}
    for name, changes in kinds.items():
        config = write_tiny_config(folder / "tiny.toml", **{"dataset": "mnist"} | changes)
        paths[name] = run(config, folder / name, "--data_dir", small_mnist) / "checkpoint.pt"
    return paths


@pytest.fixture
def draw(models, tmp_path, monkeypatch):
    """Called with a model, pictures and flags, runs sample.py; returns its cells, [rows, columns, 16, 16, 3]."""
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    monkeypatch.setattr(utils, "draw_digits", DRAW_DIGITS)
    monkeypatch.setattr(utils, "choose_precision", lambda *_: torch.float32)
    output = tmp_path / "samples.png"

    def path_of(argument):
        """A picture's in a new file; other arguments stay as they are."""
        if not isinstance(argument, Image.Image):
            return argument
        argument.save(path := tmp_path / f"picture{len(list(tmp_path.iterdir()))}.png")
        return path

    def run_sample(model, *arguments):
        flags = ["--output", output, "--device", "cpu", *map(path_of, arguments)]
        sample.main([*map(str, [models.get(model, model), *flags])])
        columns = (Image.open(output).width // 6 - 2) // 18
        return cells(output, columns, scale=6).view(-1, columns, 16, 16, 3).int()

    return run_sample


def levels(picture):
    return torch.from_numpy(np.array(picture)).int()


def test_a_row_shows_input_enlargement_samples_as_from_python_and_original(models, draw, tmp_path):
    """Of a large picture the middle counts; one of the low-resolution size is used as it is, and has no original."""
    grid, middle = draw("grey", SMALL, LARGE), LARGE.crop((10, 0, 50, 40))
    assert grid.shape[:2] == (2, 7) and (grid == grid[..., :1]).all()
    small, large = (levels(middle.resize((size, size), Image.Resampling.BICUBIC)) for size in (4, 16))
    squares = torch.stack([levels(SMALL), small]).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(grid[0, 0, ..., 0], squares[0]) and (grid[1, 0, ..., 0] - squares[1]).abs().max() <= 1
    assert (grid[0, 6] == 128).all() and (grid[1, 6, ..., 0] - large).abs().max() <= 1

    low_res = torch.cat([downsample(to_float(levels(picture)[None, None]), 4) for picture in (SMALL, middle)])
    x = upsample(low_res, 16)  # [2, 1, 16, 16]
    assert (grid[:, 1, ..., 0] - (x[:, 0].clamp(-1, 1) + 1) * 127.5).abs().max() < 1.01
    model, x = load_model(models["grey"]), x.repeat_interleave(4, dim=0)
    picture_of(super_resolve(model, x, steps=4), columns=4).save(tmp_path / "python.png")
    assert torch.equal(cells(tmp_path / "python.png", 4).view(2, 4, 16, 16, 3).int(), grid[:, 2:6])
    expected = (model.sample(x, 4, torch.Generator().manual_seed(0)).clamp(-1, 1) + 1) * 127.5
    assert (grid[:, 2:6, ..., 0] - expected.view(2, 4, 16, 16)).abs().max() < 0.51
    assert draw("grey", SMALL).shape[:2] == (1, 6) and draw("regression", LARGE).shape[:2] == (1, 4)


def test_without_a_picture_eight_digits_are_drawn_and_a_seed_decides_all(draw, tmp_path):
    contents = []
    for seed in (4, 3, 3):
        grid = draw("grey", "--num_samples", 2, "--seed", seed)
        contents.append((tmp_path / "samples.png").read_bytes())
    assert contents[0] != contents[1] == contents[2]
    assert grid.shape[:2] == (8, 5) and torch.equal(grid[:, 4, ..., 0], DRAW_DIGITS(8, 16, 1, seed=3)[0][:, 0].int())
    one, other = (draw("grey", LARGE, "--seed", seed)[0] for seed in (0, 1))
    assert (one != other).flatten(1).any(1).tolist() == [False, False, True, True, True, True, False]


def test_light_pictures_for_a_model_of_white_on_black_get_a_hint_and_are_inverted_on_demand(draw, capsys):
    light = Image.new("L", (20, 20), 230)
    for model, flags, level, hints in ("grey", [], 230, 1), ("grey", ["--invert"], 25, 0), ("color", [], 230, 0):
        assert (draw(model, *flags, light)[0, 0] == level).all()
        assert capsys.readouterr().err.count(".png is mostly light") == hints


def test_pictures_become_grey_or_colour_as_the_model_wants_them(draw, tmp_path):
    red, blue = (Image.new("RGB", (20, 20), color) for color in ("red", "blue"))
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[blue])
    pictures = tmp_path / "moving.gif", Image.new("L", (20, 20), 90), Image.new("RGBA", (20, 20), (255, 255, 255, 0))
    assert draw("color", *pictures)[:, 0, 0, 0].tolist() == [[255, 0, 0], [90, 90, 90], [0, 0, 0]]
    assert draw("grey", *pictures)[:, 0, 0, 0].tolist() == [[76] * 3, [90] * 3, [0] * 3]


def test_bad_input_is_refused_in_one_line_and_an_earlier_picture_stays(draw, tmp_path, capsys):
    LARGE.save(tmp_path / "samples.png")
    png = (tmp_path / "samples.png").read_bytes()
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "broken.png").write_bytes(png[:36] + b"\x09" + png[37:])  # a chunk's length; Pillow raises SyntaxError
    for words, model, *arguments in (
        *(
            (f"{path} can't be read", "grey", tmp_path / path)
            for path in ("no.png", "text.png", "broken.png", tmp_path)
        ),
        ("60×3 pixels, the model's input 4×4", "grey", LARGE.crop((0, 0, 60, 3))),
        ("--num_samples is 0", "grey", "--num_samples", 0),
        ("sampling_steps is 2001: it must be at most num_timesteps, 2000", "grey", "--sampling_steps", 2001),
        ("must end in .png", "grey", "--output", tmp_path / "samples.jpg"),
        ("none/samples.png: No such file", "grey", "--output", tmp_path / "none/samples.png"),
        ("no checkpoint of this lesson", tmp_path / "text.png"),
        ("none.pt", tmp_path / "none.pt"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            draw(model, *arguments)
        [line] = lines_of("sample.py: ", capsys.readouterr().err)
        assert exit.value.code == 2 and words in line and (tmp_path / "samples.png").read_bytes() == png
