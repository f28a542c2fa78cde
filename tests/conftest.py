"""What several test files share: no network, runs that take a second, and how to look at what they did."""

import csv
import functools
import os
import re
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks on shared CPUs: threads would wait for each other
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # each new process would wake the GPU; test_cuda.py tells more

import numpy as np
import torch
from einops import rearrange
from PIL import Image

import support.data
import support.run
import train_mnist
from support.digits import draw_digits

TINY = {
    "dataset": "digits", "image_size": 16, "features": 8, "channel_multipliers": [1, 2], "attention_heads": 2,
    "dropout": 0.1, "sampling_steps": 4, "num_training_steps": 20, "batch_size": 4, "sample_every": 20,
    "early_samples": [], "precision": "float32",
}  # fmt: skip
DRAW_DIGITS = draw_digits


def raising(error):
    """A function that raises, whatever it is called with."""
    return lambda *_, **__: (_ for _ in ()).throw(error)


@functools.cache
def draw_few_digits(number, *arguments, **options):
    """Of a data set's 60,000 and 10,000 digits 3,000 and 500."""
    return DRAW_DIGITS(number // 20, *arguments, **options)


support.data.draw_digits = draw_few_digits
support.run.LOG_EVERY = 8  # steps: so that short runs, too, have rows without a grid
support.run.fcntl = None  # a folder is locked until the process ends, which for these runs is the tests' own
urllib.request.urlopen = raising(urllib.request.URLError("no network in tests"))


def write_mnist(data_dir, train, test):
    """Writes uint8 images [N, 28, 28] as MNIST's files; image i has the label i modulo 10."""
    raw = data_dir / "MNIST/raw"
    raw.mkdir(parents=True)
    for prefix, images in (("train", train), ("t10k", test)):
        for part, values in (("images-idx3", images), ("labels-idx1", torch.arange(len(images)).byte() % 10)):
            header = np.array([0x800 + values.ndim, *values.shape], ">u4")  # 8: uint8
            (raw / f"{prefix}-{part}-ubyte").write_bytes(header.tobytes() + values.numpy().tobytes())
    return data_dir


@pytest.fixture(scope="session")
def small_mnist(tmp_path_factory):
    """A --data_dir with 100 drawn digits for training and 70 for testing as MNIST's files: new processes start fast."""
    digits = DRAW_DIGITS(170, 28)[0][:, 0]
    return write_mnist(tmp_path_factory.mktemp("data"), digits[:100], digits[100:])


def command(output, *flags, **settings):
    """The flags of a run on the CPU that takes a second: TINY's settings, other settings, more flags."""
    given = ["--output_dir", output, "--device", "cpu"]
    for name, value in (TINY | settings).items():
        given += [f"--{name}", *np.ravel(value)]
    return [*map(str, [*given, *flags])]


def call(script, *arguments):
    """A script, given as its module, in this process."""
    script.main([*map(str, arguments)])


def run(output, *flags, **settings):
    """train_mnist.py with the flags of `command`; returns the output folder."""
    call(train_mnist, *command(output, *flags, **settings))
    return output


@pytest.fixture
def failure(tmp_path, capsys):
    """Called with a function and its arguments, returns the one line in which it fails. It leaves all files alone."""

    def fail(function, *arguments, **options):
        before = snapshot(tmp_path)
        with pytest.raises(SystemExit, match="^2$"):
            function(*arguments, **options)
        (line,) = re.findall("(?:^|: )error: (.+)", capsys.readouterr().err, re.MULTILINE)
        assert snapshot(tmp_path) == before
        return line

    return fail


def snapshot(folder, *endings):
    """The content of each file by its name; the lock, which is empty, is not told of."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if not endings or p.suffix in endings}


def checkpoint_of(output):
    return torch.load(output / "checkpoint.pt", weights_only=True)


def log_of(output):
    return list(csv.DictReader((output / "log.csv").read_text().splitlines()))


def cells(picture, size=16, scale=2):
    """The images of a grid, uint8 [rows, columns, 3, size, size], without labels and the two grey pixels in between."""
    picture = picture if isinstance(picture, Image.Image) else Image.open(picture)
    pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    grid = pixels[(len(pixels) - 2 * scale) % (scale * (size + 2)) :: scale, ::scale]  # labels are above the grid
    tiles = rearrange(grid[2:, 2:], "(r h) (c w) rgb -> r c rgb h w", h=size + 2, w=size + 2)
    return tiles[..., :size, :size]
