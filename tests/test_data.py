"""support/data.py, support/digits.py: data sets in their real file formats, pictures as a user's folders have them."""

import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DRAW_DIGITS, write_mnist
from PIL import Image

from support.data import DOWNLOADS, load_data, read_picture
from support.errors import InputError


def load(dataset, data_dir, size=16, channels=1, **options):
    return load_data(SimpleNamespace(dataset=dataset, image_size=size, channels=channels), data_dir, **options)


def random_images(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_mnist_files_are_read_pixel_by_pixel(tmp_path):
    images = random_images(7, 28, 28), random_images(3, 28, 28, seed=1)
    for (found, labels), expected in zip(load("mnist", write_mnist(tmp_path, *images), 28, 3), images):
        assert torch.equal(found, expected[:, None].repeat(1, 3, 1, 1))
        assert labels.tolist() == list(range(len(expected)))


def test_cifar10_is_read_channels_first(monkeypatch):
    images = random_images(5, 3, 32, 32)
    data = SimpleNamespace(data=images.permute(0, 2, 3, 1).numpy(), targets=[3, 1, 4, 1, 5])  # as torchvision gives it
    monkeypatch.setitem(DOWNLOADS, "cifar10", (lambda *_, **__: data, "", ""))
    assert torch.equal(load("cifar10", "", 32, 3)[0][0], images)


def test_where_mnist_cant_be_had_a_new_run_draws_digits_loudly_and_any_other_ends(tmp_path, capsys):
    """Nothing stands in for other data sets."""
    raw, config = tmp_path / "MNIST/raw", SimpleNamespace(dataset="mnist", image_size=16, channels=1)
    with pytest.raises(InputError, match=f"^mnist can't be .*: put its files train-.*gz into {raw}, or delete"):
        load("mnist", tmp_path)
    (images, _), _ = load_data(config, tmp_path, or_digits=True)
    warning = capsys.readouterr().err
    assert "GOING ON WITH DRAWN DIGITS" in warning and f"t10k-labels-idx1-ubyte.gz into {raw}" in warning
    assert config.dataset == "digits" and torch.equal(images, load("digits", tmp_path)[0][0])
    with pytest.raises(InputError, match=f"^cifar10 can't .* cifar-10-python.tar.gz into {tmp_path}"):
        load("cifar10", tmp_path, or_digits=True)


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
    high = random_images(44, 20, 3).numpy()
    save_picture(tmp_path / "a/b/HIGH.PNG", high)
    (train, labels), (test, test_labels) = load("folder", tmp_path, 20, 3)
    assert labels is test_labels is None and len(train) + len(test) == 41
    assert high[12:32].transpose(2, 0, 1).tolist() in torch.cat([train, test]).tolist()


def test_a_pictures_pixels_alone_decide_whether_it_is_for_testing(tmp_path):
    """No training picture is a test picture, whatever it is called and whichever folder is given."""
    save_shades(tmp_path / "a/b", range(0, 200, 2))
    train, test = load_shades(tmp_path)
    assert 5 <= len(test) <= 15 and sorted(train + test) == [*range(0, 200, 2)]
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
    os.link(tmp_path / "7.png", tmp_path / "samples.png")  # sample.py's default
    save_shades(tmp_path / "run/deep", [201, 202])
    for file in ("checkpoint.pt", "results.md"):
        (tmp_path / "run" / file).touch()
        assert load_shades(tmp_path) == before
        assert f"{tmp_path}/run is passed over" in capsys.readouterr().err
        with pytest.raises(InputError, match="0 are for training and 0 for testing"):
            load_shades(tmp_path / "run")
        (tmp_path / "run" / file).unlink()


def test_pictures_that_cant_be_read_are_named_and_left_out(tmp_path, capsys):
    save_shades(tmp_path, range(40))
    before = load_shades(tmp_path)
    (tmp_path / "cut.PNG").write_bytes((tmp_path / "7.png").read_bytes()[:50])
    (tmp_path / "photo.HEIC").write_text("no picture")
    if sys.platform == "linux":  # a name that isn't UTF-8
        os.rename(tmp_path / "8.png", os.fsencode(tmp_path) + b"/\xff.png")
    capsys.readouterr()
    assert load_shades(tmp_path) == before
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    for line, name, kind in zip(lines, ("cut.PNG", "photo.HEIC"), ("PNG", "HEIC"), strict=True):
        assert line.startswith(f"left out: {tmp_path / name}: Pillow can't read this {kind} file")
        assert line.endswith("save it as JPEG or PNG")


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)  # every grey level once
OPACITY = np.where(RAMP % 3 == 0, 255, RAMP % 3 * 64).astype(np.uint8)  # full, a quarter, half
PICTURES = {  # the pixels, and the grey levels that they show
    "16 bits": (RAMP * np.uint16(257), RAMP),
    "transparent": (np.dstack([RAMP, RAMP, RAMP, OPACITY]), RAMP * (OPACITY / 255)),
    "black on nothing": (np.dstack([0 * RAMP, 0 * RAMP, 0 * RAMP, RAMP]), 255.0 - RAMP),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_read_as_it_looks(tmp_path, name):
    """Deep grey scaled, not clipped; what is transparent on black, a black drawing on white."""
    pixels, expected = PICTURES[name]
    save_picture(tmp_path / "a.png", pixels)
    grey, colour = (read_picture(tmp_path / "a.png", channels) for channels in (1, 3))
    assert grey.mode == "L" and np.abs(np.asarray(grey) - expected).max() <= 1
    assert colour.mode == "RGB" and colour.convert("L") == grey


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_a_turned_picture_is_read_upright_even_where_its_other_exif_is_damaged(tmp_path, kind):
    turned = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"  # the stored picture's top is on the right
    resolution = b"\x1a\x01\x02\0\x03\0\0\0" + b"72\0\0"  # a text where a number should be
    damaged = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + turned + resolution + b"\0\0\0\0"
    for exif, expected in ((damaged, np.rot90(RAMP, -1)), (b"Exif\0\0nothing", RAMP)):
        save_picture(tmp_path / f"a.{kind}", np.dstack([RAMP] * 3), exif=exif)
        found = np.asarray(read_picture(tmp_path / f"a.{kind}", 1), dtype=float)
        assert np.abs(found - expected).mean() < 4


def test_a_drawn_digit_depends_on_its_seed_and_index_only():
    images, labels = DRAW_DIGITS(1200, seed=3)  # 1,000 are drawn at a time
    torch.testing.assert_close(DRAW_DIGITS(5, seed=3), (images[:5], labels[:5]), rtol=0, atol=0)
    assert len(torch.cat([images, DRAW_DIGITS(1200, seed=4)[0]]).unique(dim=0)) == 2400
