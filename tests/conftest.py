"""What several test files share: no network, runs that take a second, and how to look at what they wrote."""

import csv
import functools
import json
import os
import re
import struct
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks on shared CPUs: threads would wait for each other
for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(variable, None)  # the tests are one rank, wherever they are started

import numpy as np
import torch
from PIL import Image

import train_mnist
import utils

TINY = {
    "dataset": "digits", "image_size": 16, "features": 8, "channel_multipliers": [1, 2], "attention_heads": 2,
    "dropout": 0.1, "sampling_steps": 4, "num_training_steps": 20, "batch_size": 4, "sample_every": 20,
    "early_samples": [], "precision": "float32",
}  # fmt: skip
DRAW_DIGITS = utils.draw_digits


def raising(error):
    """A function that raises, whatever it is called with."""
    return lambda *_, **__: (_ for _ in ()).throw(error)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Downloads fail as without a network."""
    monkeypatch.setattr(urllib.request, "urlopen", raising(urllib.error.URLError("no network in tests")))


@pytest.fixture
def all_cores():
    """For tests that compute as much as a user's run."""
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@functools.cache
def draw_few_digits(number, image_size, channels, seed):
    """3,000 for training and 500 for testing."""
    return DRAW_DIGITS(number // 20, image_size, channels, seed)


@pytest.fixture(scope="module")
def few_digits():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "draw_digits", draw_few_digits)
        yield


def write_tiny_config(path, **changes):
    """A config of a run that takes a second, TINY with `changes`, which may be any JSON value; returns the path."""
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in {**TINY, **changes}.items()))
    return path


@pytest.fixture
def tiny_config(tmp_path):
    """Called with settings to change, writes a config of a run that takes a second, and returns its path."""
    return lambda **changes: write_tiny_config(tmp_path / "tiny.toml", **changes)


def write_mnist(data_dir, train, test, name="MNIST"):
    """Writes uint8 images [N, 28, 28] as MNIST's files; image i has the label i modulo 10."""
    raw = data_dir / name / "raw"
    raw.mkdir(parents=True)
    for prefix, images in (("train", train), ("t10k", test)):
        header = struct.pack(">4B3I", 0, 0, 8, 3, *images.shape)  # uint8, three dimensions
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        labels = struct.pack(">4BI", 0, 0, 8, 1, len(images)) + bytes(i % 10 for i in range(len(images)))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    return data_dir


@pytest.fixture(scope="session")
def small_mnist(tmp_path_factory):
    """A --data_dir with 100 drawn digits for training and 70 for testing as MNIST's files: new processes start fast."""
    train, test = (DRAW_DIGITS(number, 28, 1, seed)[0][:, 0] for number, seed in ((100, 0), (70, 1)))
    return write_mnist(tmp_path_factory.mktemp("data"), train, test)


def flags_of(config, output, *flags):
    """The command line of a run on the CPU; the config may be None."""
    config = ["--config_path", config] if config else []
    return [*map(str, [*config, "--output_dir", output, "--device", "cpu", *flags])]


def run(config, output, *flags):
    """train_mnist.py in this process; returns the output folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_mnist.py"])
        train_mnist.main(flags_of(config, output, *flags))
    return output


def checkpoint_of(output):
    return torch.load(output / "checkpoint.pt", weights_only=True)


def log_of(output):
    return list(csv.DictReader((output / "log.csv").read_text().splitlines()))


def lines_of(script, error):
    """What a script said of its end on stderr; the progress bar's lines end with carriage returns."""
    assert "Traceback" not in error and "None:" not in error, error
    return [line for line in re.split(r"[\r\n]+", error) if line.startswith(script)]


def cells(picture, columns, size=16, scale=2):
    """The images of a grid, uint8 [N, size, size, 3], row by row, without labels and the two grey pixels in between."""
    picture = picture if isinstance(picture, Image.Image) else Image.open(picture)
    pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    pixels = pixels[(len(pixels) - 2 * scale) % (scale * (size + 2)) :]  # labels are above the grid
    small = pixels[::scale, ::scale]  # each pixel is a square
    assert torch.equal(small.repeat_interleave(scale, 0).repeat_interleave(scale, 1), pixels)
    height, width, _ = small.shape
    assert width == columns * (size + 2) + 2 and (height - 2) % (size + 2) == 0
    corners = [(y, x) for y in range(2, height, size + 2) for x in range(2, width, size + 2)]
    return torch.stack([small[y : y + size, x : x + size] for y, x in corners])
