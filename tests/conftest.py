"""What several test files share: the lesson on sys.path, no network, a tiny config and tiny MNIST files."""

import json
import os
import re
import signal
import socket
import struct
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks on shared CPUs: threads would wait for each other

TINY = {
    "dataset": "digits", "image_size": 16, "low_res_size": 4,
    "features": 8, "channel_multipliers": [1, 2], "attention_resolutions": [8], "attention_heads": 2,
    "steps": 4, "num_training_steps": 20, "batch_size": 4, "sample_every": 20, "early_samples": [],
    "precision": "float32",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Downloads fail as without a network, and what a run sets for the whole process is put back."""

    def urlopen(*_, **__):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    timeout, handlers = socket.getdefaulttimeout(), [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    yield
    socket.setdefaulttimeout(timeout)
    for number, handler in handlers:
        signal.signal(number, handler)


def write_tiny_config(path, **changes):
    """configs/mnist.toml with the values of TINY and `changes`, which may be any JSON value; returns the path."""
    text = (ROOT / "configs/mnist.toml").read_text(encoding="utf-8")
    for key, value in {**TINY, **changes}.items():
        text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {json.dumps(value)}", text)
        assert count == 1, key
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def tiny_config(tmp_path):
    """Called with settings to change, writes a config of a run that takes a second, and returns its path."""
    return lambda **changes: write_tiny_config(tmp_path / "tiny.toml", **changes)


@pytest.fixture
def write_mnist(tmp_path):
    """Called with uint8 training and test images [N, 28, 28], writes them below a new --data_dir as MNIST's files."""

    def write(train, test, name="MNIST"):
        raw = tmp_path / "data" / name / "raw"
        raw.mkdir(parents=True)
        for prefix, images in (("train", train), ("t10k", test)):
            header = struct.pack(">4B3I", 0, 0, 8, 3, *images.shape)  # uint8, three dimensions
            (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + bytes(images.flatten().tolist()))
            labels = struct.pack(">4BI", 0, 0, 8, 1, len(images)) + bytes(i % 10 for i in range(len(images)))
            (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
        return tmp_path / "data"

    return write
