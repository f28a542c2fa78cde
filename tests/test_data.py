"""support/data.py, support/digits.py: data sets in their real file formats, pictures as a user's folders have them."""

import os
import pickle
import socket
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import DRAW_DIGITS, write_mnist
from PIL import Image

from support.data import load_data, read_picture
from support.errors import InputError


def load(dataset, data_dir, size=16, channels=1, **options):
    return load_data(SimpleNamespace(dataset=dataset, image_size=size, channels=channels), data_dir, **options)


def random_images(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dataset, folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_files_are_read_pixel_by_pixel(tmp_path, dataset, folder):
    images = random_images(7, 28, 28), random_images(3, 28, 28, seed=1)
    write_mnist(tmp_path, *images, folder)
    for (found, labels), expected in zip(load(dataset, tmp_path, 28, 3), images, strict=True):
        assert found.dtype == torch.uint8 and torch.equal(found, expected[:, None].repeat(1, 3, 1, 1))
        assert labels.dtype == torch.int64 and labels.tolist() == list(range(len(expected)))


def test_cifar10_batches_are_read_pixel_by_pixel(tmp_path, monkeypatch):
    """Rows of 3072 bytes: the red plane, the green and the blue."""
    kind, images = torchvision.datasets.CIFAR10, random_images(6, 3, 32, 32)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)  # not the real files
    (folder := tmp_path / kind.base_folder).mkdir()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": []}))
    for i, (name, _) in enumerate([*kind.train_list, *kind.test_list]):  # one image in each of six
        (folder / name).write_bytes(pickle.dumps({"data": images[i].flatten()[None].numpy(), "labels": [i]}))
    (train, labels), (test, _) = load("cifar10", tmp_path, 32, 3)
    assert torch.equal(train, images[:5]) and torch.equal(test, images[5:]) and labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("damaged", [False, True])
def test_where_mnist_cant_be_had_a_new_run_draws_digits_loudly_and_a_resumed_one_ends(tmp_path, capsys, damaged):
    """Offline, or with a file that is cut off. Nothing stands in for other data sets."""
    raw = tmp_path / "MNIST/raw"
    if damaged:
        write_mnist(tmp_path, random_images(7, 28, 28), random_images(3, 28, 28))
        os.truncate(raw / "t10k-images-idx3-ubyte", 100)
    config = SimpleNamespace(dataset="mnist", image_size=16, channels=1)
    with pytest.raises(InputError, match=f"^mnist can't be .*: put its files train-.*gz into {raw}, or delete"):
        load_data(config, tmp_path)
    assert config.dataset == "mnist"
    (images, _), _ = load_data(config, tmp_path, or_digits=True)
    warning = capsys.readouterr().err
    assert "GOING ON WITH DRAWN DIGITS" in warning and f"t10k-labels-idx1-ubyte.gz into {raw}" in warning
    assert config.dataset == "digits" and torch.equal(images, load("digits", tmp_path)[0][0])
    for dataset, file in (("fashion_mnist", "t10k-labels-idx1-ubyte.gz"), ("cifar10", "cifar-10-python.tar.gz")):
        with pytest.raises(InputError, match=f"^{dataset} can't .* {file} into {tmp_path}"):
            load(dataset, tmp_path, or_digits=True)
    assert socket.getdefaulttimeout() <= 60  # seconds for a server that doesn't answer


def save_picture(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def save_shades(folder, shades):
    """Pictures of one shade of grey each; of the first 40 a few are for testing."""
    for shade in shades:
        save_picture(folder / f"{shade}.png", np.full((20, 20), shade, dtype=np.uint8))


def load_shades(folder):
    """The shades of grey that the pictures have, for training and for testing."""
    return [sorted(images[:, 0, 8, 8].tolist()) for images, _ in load("folder", folder)]


def test_a_folder_gives_the_middle_square_of_every_picture_however_deep(tmp_path):
    """Nothing is resized, and the crops are even."""
    save_shades(tmp_path, range(40))
    wide, high = (random_images(*shape, 3).numpy() for shape in ((20, 36), (44, 20)))
    save_picture(tmp_path / "a/wide.bmp", wide)
    save_picture(tmp_path / "b/c/HIGH.PNG", high)
    (train, labels), (test, test_labels) = load("folder", tmp_path, 20, 3)
    assert labels is test_labels is None and len(train) + len(test) == 42
    for square in (wide[:, 8:28], high[12:32]):
        assert square.transpose(2, 0, 1).tolist() in torch.cat([train, test]).tolist()


def test_a_pictures_pixels_alone_decide_whether_it_is_for_testing(tmp_path):
    """No training picture is a test picture, whatever it is called and whichever folder is given."""
    save_shades(tmp_path / "a/b", range(0, 200, 2))
    train, test = load_shades(tmp_path)
    below_a_tenth = [i for i in range(0, 200, 2) if zlib.crc32(bytes([i] * 16 * 16)) < 2**32 / 10]
    assert test == below_a_tenth and sorted(train + test) == [*range(0, 200, 2)]
    assert load_shades(tmp_path / "a/b") == [train, test]
    save_shades(tmp_path / "more and copies", range(200))
    more_train, more_test = map(set, load_shades(tmp_path))
    assert {*train} < more_train and {*test} < more_test and not more_train & more_test
    save_shades(tmp_path / "few", train[:3])
    with pytest.raises(InputError, match="3 are for training and 0 for testing; give a --data_dir with more"):
        load_shades(tmp_path / "few")


def test_the_lessons_own_pictures_are_passed_over(tmp_path, capsys):
    save_shades(tmp_path, range(40))
    before = load_shades(tmp_path)
    save_picture(tmp_path / "a/samples.png", np.full((20, 20), 200, dtype=np.uint8))
    for file in ("checkpoint.pt", "results.md"):
        save_shades(tmp_path / file[:3] / "deep", [201, 202])
        (tmp_path / file[:3] / file).touch()
    assert load_shades(tmp_path) == before
    lines = sorted(line for line in capsys.readouterr().err.splitlines() if "passed over" in line)
    assert [line.split()[0] for line in lines] == [f"{tmp_path}/che", f"{tmp_path}/res"]
    for folder, line in (("che", "che is passed over.*; give a"), ("nowhere", "there is no folder /.*/nowhere")):
        with pytest.raises(InputError, match=line):
            load_shades(tmp_path / folder)


def test_pictures_that_cant_be_read_are_named_and_left_out(tmp_path, capsys):
    save_shades(tmp_path, range(40))
    before = load_shades(tmp_path)
    (tmp_path / "cut.PNG").write_bytes((tmp_path / "7.png").read_bytes()[:50])
    for name in ("drawing.SVG", "photo.HEIC", "raw.DNG", "text.JPG", "notes.txt", ".DS_Store"):
        (tmp_path / name).write_text("no picture")
    if sys.platform == "linux":  # a name that isn't UTF-8
        os.rename(tmp_path / "8.png", os.fsencode(tmp_path) + b"/\xff.png")
    capsys.readouterr()
    assert load_shades(tmp_path) == before
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    for line, path in zip(lines, ("cut.PNG", "drawing.SVG", "photo.HEIC", "raw.DNG", "text.JPG"), strict=True):
        with pytest.raises(InputError, match=rf"{path}: Pillow can't read this \w*{path[-3:]} file .* save it as JPEG"):
            read_picture(tmp_path / path, 1)
        assert line.startswith(f"left out: {tmp_path / path}: Pillow can't read this")


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)  # every grey level once
OPACITY = np.where(RAMP % 3 == 0, 255, RAMP % 3 * 64).astype(np.uint8)  # full, a quarter, half
PICTURES = {  # the pixels, the file, options, and the grey levels that it shows
    "16 bits": (RAMP * np.uint16(257), "a.png", {}, RAMP),
    "16 bits, TIFF": (RAMP * np.uint16(257), "a.tif", {}, RAMP),
    "transparent": (np.dstack([RAMP, RAMP, RAMP, OPACITY]), "a.png", {}, RAMP * (OPACITY / 255)),
    "one level transparent": (RAMP, "a.png", {"transparency": 200}, RAMP * (RAMP != 200.0)),
    "black on nothing": (np.dstack([0 * RAMP, 0 * RAMP, 0 * RAMP, RAMP]), "a.png", {}, 255.0 - RAMP),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_read_as_it_looks(tmp_path, name):
    """Deep grey scaled, not clipped; what is transparent on black, a black drawing on white."""
    pixels, file, options, expected = PICTURES[name]
    save_picture(tmp_path / file, pixels, **options)
    grey, colour = (read_picture(tmp_path / file, channels) for channels in (1, 3))
    assert grey.mode == "L" and np.abs(np.asarray(grey) - expected).max() <= 1
    assert colour.mode == "RGB" and colour.convert("L") == grey


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_a_turned_picture_is_read_upright_even_where_its_other_exif_is_damaged(tmp_path, kind):
    stored = np.kron([[0, 80, 160], [250, 200, 120]], np.ones((24, 24))).astype(np.uint8)  # six even fields
    turned = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"  # the stored picture's top is on the right
    resolution = b"\x1a\x01\x02\0\x03\0\0\0" + b"72\0\0"  # a text where a number should be
    damaged = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + turned + resolution + b"\0\0\0\0"
    for exif, expected in ((damaged, np.rot90(stored, -1)), (b"Exif\0\0nothing", stored)):
        save_picture(tmp_path / f"a.{kind}", np.dstack([stored] * 3), exif=exif)
        found = np.asarray(read_picture(tmp_path / f"a.{kind}", 1))
        assert found.shape == expected.shape and np.abs(found - expected.astype(float)).mean() < 4


def test_a_drawn_digit_depends_on_its_seed_and_index_only():
    images, labels = DRAW_DIGITS(1200, seed=3)  # 1,000 are drawn at a time
    torch.rand(1)
    again, labels_again = DRAW_DIGITS(5, seed=3)
    assert torch.equal(again, images[:5]) and torch.equal(labels_again, labels[:5])
    assert len(torch.cat([images, DRAW_DIGITS(1200, seed=4)[0]]).unique(dim=0)) == 2400
