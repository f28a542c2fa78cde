"""sample.py: what its picture shows, how it frames digits, whose noise is whose, and what it refuses."""

import numpy as np
import pytest
import torch
from conftest import DRAW_DIGITS, call, cells, run
from PIL import Image, ImageChops, ImageDraw

import sample
import utils
from support.framing import frame_digit
from utils import downsample, load_model, to_float, upsample

SMALL = Image.fromarray(np.random.default_rng(0).integers(50, 200, (4, 4), dtype=np.uint8))
LARGE = SMALL.resize((60, 40), Image.Resampling.BILINEAR)


@pytest.fixture(scope="module")
def models(tmp_path_factory, small_mnist):
    """The checkpoints of an SR3 and a regression of MNIST's grey digits, an SR3 of coloured ones, one for 30 pixels."""
    folder = tmp_path_factory.mktemp("models")
    kinds = {"grey": {}, "regression": {"method": "regression"}, "color": {"dataset": "digits", "channels": 3}}
    kinds["thirty"] = {"image_size": 30, "low_res_size": 5, "attention_resolutions": [15]}
    settings = {"dataset": "mnist", "data_dir": small_mnist, "num_training_steps": 2, "sample_every": 2}
    return {name: run(folder / name, **settings | kind) / "checkpoint.pt" for name, kind in kinds.items()}


@pytest.fixture
def draw(models, tmp_path, monkeypatch):
    """Called with a model, pictures and flags, runs sample.py; returns its cells, [rows, columns, size, size, 3]."""
    monkeypatch.setattr(utils, "autocast", lambda device: torch.autocast(device.type, enabled=False))

    def run_sample(model, *arguments, size=16):
        output, arguments, scale = tmp_path / "samples.png", list(arguments), 100 // size
        for i, picture in enumerate(arguments):
            if isinstance(picture, Image.Image):
                arguments[i] = tmp_path / f"picture{i}.png"
                picture.save(arguments[i])
        call(sample, models.get(model, model), "--output", output, "--device", "cpu", *arguments)
        columns = (Image.open(output).width // scale - 2) // (size + 2)
        return cells(output, columns, size, scale).view(-1, columns, size, size, 3).int()

    return run_sample


def levels(picture):
    return torch.from_numpy(np.array(picture)).int()


def seven(size, at, height, pen, ink=255, ground=0):
    """A 7 in two strokes, its box's upper left corner at a point of a picture."""
    picture, (left, top) = Image.new("L", size, ground), at
    points = [(0, 0), (0.6 * height, 0), (0.25 * height, height)]
    ImageDraw.Draw(picture).line([(left + x, top + y) for x, y in points], ink, pen, joint="curve")
    return picture


def test_a_row_shows_input_enlargement_samples_as_from_python_and_original(models, draw):
    """As it is, the middle of a large picture counts; one of the low-resolution size has no original."""
    grid, middle = draw("grey", "--as_is", SMALL, LARGE), LARGE.crop((10, 0, 50, 40))
    assert grid.shape[:2] == (2, 7) and (grid == grid[..., :1]).all()
    small, large = (levels(middle.resize((size, size), Image.Resampling.BICUBIC)) for size in (4, 16))
    squares = torch.stack([levels(SMALL), small]).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(grid[0, 0, ..., 0], squares[0]) and (grid[1, 0, ..., 0] - squares[1]).abs().max() <= 1
    assert (grid[0, 6] == 128).all() and (grid[1, 6, ..., 0] - large).abs().max() <= 1

    low_res = torch.cat([downsample(to_float(levels(picture)[None, None]), 4) for picture in (SMALL, middle)])
    x = upsample(low_res, 16)  # [2, 1, 16, 16]
    assert (grid[:, 1, ..., 0] - (x[:, 0] + 1) * 127.5).abs().max() < 1.01
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1, 2, 3, 0, 1, 2, 3)]
    expected = load_model(models["grey"]).sample(x.repeat_interleave(4, dim=0), 4, generators)
    expected = (expected.clamp(-1, 1) + 1) * 127.5
    assert (grid[:, 2:6, ..., 0] - expected.view(2, 4, 16, 16)).abs().max() < 0.51
    assert torch.equal(draw("grey", SMALL)[0], grid[0, :6]) and draw("regression", LARGE, "--as_is").shape[:2] == (1, 4)


@pytest.mark.parametrize(("model", "size"), [("grey", 16), ("thirty", 30)])
def test_an_answer_depends_on_its_picture_and_seed_only(draw, model, size):
    """A batch of another size may round otherwise, so by a level."""
    other = seven((40, 40), (10, 6), 25, 4)
    alone = draw(model, LARGE, "--as_is", "--num_samples", 1, "--seed", 7, size=size)[0, 2]
    among = draw(model, other, LARGE, other, "--as_is", "--num_samples", 3, "--seed", 5, size=size)[1, 2:5]
    assert (among[2] - alone).abs().max() <= 1 and (among[0] - alone).abs().max() > 20


def test_without_a_picture_eight_digits_are_drawn_and_a_seed_decides_all(draw):
    other, grid, again = (draw("grey", "--num_samples", 2, "--seed", seed) for seed in (4, 3, 3))
    assert torch.equal(grid, again) and not torch.equal(grid, other)
    assert grid.shape[:2] == (8, 5) and torch.equal(grid[:, 4, ..., 0], DRAW_DIGITS(8, 16, 1, seed=3)[0][:, 0].int())
    one, other = (draw("grey", LARGE, "--as_is", "--seed", seed)[0] for seed in (0, 9))
    assert (one != other).flatten(1).any(1).tolist() == [False, False, True, True, True, True, False]


def photo():  # with a shadow, grain and dust
    picture = seven((640, 480), (380, 60), 150, 9, ink=70, ground=220)
    ImageDraw.Draw(picture).ellipse([20, 30, 24, 34], 60)
    grain = np.random.default_rng(0).normal(0, 4, (480, 640))
    return Image.fromarray((np.array(picture) * np.linspace(1, 0.5, 640) + grain).clip(0, 255).astype(np.uint8))


WHITE_SEVEN = seven((200, 200), (60, 30), 130, 16)
BROKEN = seven((200, 200), (50, 40), 120, 30)
BROKEN.paste(0, (0, 100, 200, 106))
DRAWINGS = {  # and whether their ground is light
    "large": (WHITE_SEVEN, False),
    "inverted": (ImageChops.invert(WHITE_SEVEN), True),
    "in a corner": (seven((400, 120), (350, 10), 40, 5), False),
    "small": (seven((40, 40), (20, 20), 14, 2), False),
    "thin": (seven((500, 400), (100, 20), 330, 2, 0, 255), True),
    "thick, in two strokes": (BROKEN, False),
    "on dark grey paper": (seven((90, 120), (20, 30), 60, 9, 140, 90), False),
    "pencil": (seven((300, 300), (90, 30), 200, 11, 150, 200), True),
    "up to the edges": (seven((100, 100), (0, 0), 99, 12, 0, 255), True),
    "photo": (photo(), True),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_is_framed_as_mnist_frames_its_digits(name, capsys):
    picture, is_light = DRAWINGS[name]
    framed = frame_digit(picture, 32, "seven.png")
    assert framed.dtype == torch.uint8 and capsys.readouterr().err.count("seven.png has a light ground") == is_light
    ink = framed.float().view(32, 32)
    for dim in (0, 1):
        assert abs((ink.sum(dim) @ (torch.arange(32) + 0.5) / ink.sum()).item() - 16) < 0.5
    rows, columns = ((ink.amax(dim) > 128).nonzero()[:, 0] for dim in (1, 0))
    assert abs(1 + (rows[-1] - rows[0]).item() - 32 * 20 / 28) <= 1 and len(columns) < len(rows)
    assert ink.max() == 255 and 0.05 < ink.mean() / 255 < 0.2
    assert ink[rows[:5]].sum() > 1.5 * ink[rows[-5:]].sum()  # upright


def test_a_digit_that_is_framed_like_mnist_stays_nearly_as_it_is():
    images = DRAW_DIGITS(20, 28, 1, seed=1)[0]
    for most in (255, 0.06 * 255):  # drawn digits are larger than MNIST's
        framed = torch.cat([frame_digit(Image.fromarray(image[0].numpy()), 28, "a digit") for image in images])
        assert (framed.float() - images.float()).square().mean().sqrt() < most
        images = framed


def test_framing_is_for_grey_digits_and_can_be_left_out(models, draw, capsys):
    drawing = seven((20, 20), (2, 2), 8, 2, 30, 230)
    as_is = levels(drawing.resize((16, 16), Image.Resampling.BICUBIC))
    framed = frame_digit(drawing, 16, "x")[0, 0].int()
    for model, flags, expected in (("grey", [], framed), ("grey", ["--as_is"], as_is), ("color", [], as_is)):
        assert (draw(model, *flags, drawing)[0, 6, ..., 0] - expected).abs().max() <= 1
        assert capsys.readouterr().err.count(".png has a light ground") == (expected is framed)
    checkpoint = torch.load(models["grey"], weights_only=True)
    checkpoint["config"]["dataset"] = "fashion_mnist"
    torch.save(checkpoint, models["grey"].with_name("fashion.pt"))
    assert (draw(models["grey"].with_name("fashion.pt"), drawing)[0, 6, ..., 0] - as_is).abs().max() <= 1


def test_what_is_wrong_is_told_in_one_line_before_minutes_of_work(draw, tmp_path, failure, monkeypatch):
    """An earlier picture stays."""
    monkeypatch.setattr(sample, "super_resolve", None)
    (tmp_path / "folder.png").mkdir()
    LARGE.save(tmp_path / "samples.png")
    LARGE.crop((0, 0, 60, 3)).save(tmp_path / "flat.png")
    png = (tmp_path / "samples.png").read_bytes()
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "broken.png").write_bytes(png[:36] + b"\x09" + png[37:])  # a chunk's length; Pillow raises SyntaxError
    Image.new("L", (50, 40)).save(tmp_path / "black.png")
    Image.new("L", (50, 40), 255).save(tmp_path / "white.png")
    Image.fromarray(np.random.default_rng(0).normal(200, 5, (90, 90)).astype(np.uint8)).save(tmp_path / "paper.png")
    for name in ("no.png", "text.png", "broken.png"):
        assert f"{name} can't be read" in failure(draw, "grey", tmp_path / name)
    for name in ("black.png", "white.png", "paper.png"):
        assert f"{name} shows no digit" in failure(draw, "grey", tmp_path / name)
    for words, model, *arguments in (
        (f"{tmp_path} can't be read", "grey", tmp_path),
        ("60×3 pixels, the model's input 4×4", "grey", "--as_is", tmp_path / "flat.png"),
        ("--num_samples: '0' is not", "grey", "--num_samples", 0),
        ("sampling_steps is 2001: it must be at most num_timesteps, 2000", "grey", "--sampling_steps", 2001),
        ("must end in .png", "grey", "--output", tmp_path / "samples.jpg"),
        ("text.png", "grey", "--output", tmp_path / "text.png" / "samples.png"),
        ("folder.png", "grey", "--output", tmp_path / "folder.png"),
        ("no checkpoint of this lesson", tmp_path / "text.png"),
        ("none.pt", tmp_path / "none.pt"),
    ):
        assert words in failure(draw, model, *arguments)
