"""sample.py: what its picture shows, pixel by pixel, which pictures it takes, and what it refuses."""

import numpy as np
import pytest
import torch
from conftest import DRAW_DIGITS, call, cells, run
from PIL import Image

import sample
import utils
from utils import downsample, load_model, to_float, upsample

SMALL = Image.fromarray(np.random.default_rng(0).integers(50, 200, (4, 4), dtype=np.uint8))
LARGE = SMALL.resize((60, 40), Image.Resampling.BILINEAR)


@pytest.fixture(scope="module")
def models(tmp_path_factory, small_mnist):
    """The checkpoints of an SR3 and a regression of MNIST's grey digits, and of an SR3 of coloured ones."""
    folder = tmp_path_factory.mktemp("models")
    kinds = {"grey": {}, "regression": {"method": "regression"}, "color": {"dataset": "digits", "channels": 3}}
    return {
        name: run(folder / name, "--data_dir", small_mnist, **{"dataset": "mnist"} | kind) / "checkpoint.pt"
        for name, kind in kinds.items()
    }


@pytest.fixture
def draw(models, tmp_path, monkeypatch):
    """Called with a model, pictures and flags, runs sample.py; returns its cells, [rows, columns, 16, 16, 3]."""
    monkeypatch.setattr(utils, "choose_precision", lambda *_: torch.float32)

    def run_sample(model, *arguments):
        output, arguments = tmp_path / "samples.png", list(arguments)
        for i, picture in enumerate(arguments):
            if isinstance(picture, Image.Image):
                arguments[i] = tmp_path / f"picture{i}.png"
                picture.save(arguments[i])
        call(sample, models.get(model, model), "--output", output, "--device", "cpu", *arguments)
        columns = (Image.open(output).width // 6 - 2) // 18
        return cells(output, columns, scale=6).view(-1, columns, 16, 16, 3).int()

    return run_sample


def levels(picture):
    return torch.from_numpy(np.array(picture)).int()


def test_a_row_shows_input_enlargement_samples_as_from_python_and_original(models, draw):
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


def test_bad_input_is_refused_in_one_line_and_an_earlier_picture_stays(draw, tmp_path, failure):
    LARGE.save(tmp_path / "samples.png")
    LARGE.crop((0, 0, 60, 3)).save(tmp_path / "flat.png")
    png = (tmp_path / "samples.png").read_bytes()
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "broken.png").write_bytes(png[:36] + b"\x09" + png[37:])  # a chunk's length; Pillow raises SyntaxError
    for words, model, *arguments in (
        ("no.png can't be read", "grey", tmp_path / "no.png"),
        ("text.png can't be read", "grey", tmp_path / "text.png"),
        ("broken.png can't be read", "grey", tmp_path / "broken.png"),
        (f"{tmp_path} can't be read", "grey", tmp_path),
        ("60×3 pixels, the model's input 4×4", "grey", tmp_path / "flat.png"),
        ("--num_samples is 0", "grey", "--num_samples", 0),
        ("sampling_steps is 2001: it must be at most num_timesteps, 2000", "grey", "--sampling_steps", 2001),
        ("must end in .png", "grey", "--output", tmp_path / "samples.jpg"),
        ("none/samples.png: No such file", "grey", "--output", tmp_path / "none/samples.png"),
        ("no checkpoint of this lesson", tmp_path / "text.png"),
        ("none.pt", tmp_path / "none.pt"),
    ):
        assert words in failure(draw, model, *arguments)
