"""support/data.py, support/digits.py: data sets in their real file formats, pictures as a user's folders have them."""

import os
import pickle
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import DRAW_DIGITS, raising, write_mnist
from PIL import Image, ImageOps, features

import support.data
from support.data import PICTURE_ERRORS, DatasetUnavailable, load_data, load_data_or_digits
from support.errors import InputError


def settings(dataset, size=16, channels=1):
    return SimpleNamespace(dataset=dataset, image_size=size, low_res_size=4, channels=channels)


def load(dataset, data_dir, size=16, channels=1):
    """The training set and the test set."""
    return load_data(settings(dataset, size, channels), data_dir)


def random_images(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dataset, folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_files_are_read_pixel_by_pixel(tmp_path, dataset, folder):
    images = random_images(7, 28, 28), random_images(3, 28, 28, seed=1)
    write_mnist(tmp_path, *images, folder)
    for (found, labels), expected in zip(load(dataset, tmp_path, 28, 3), images, strict=True):
        assert found.dtype == torch.uint8 and torch.equal(found, expected[:, None].repeat(1, 3, 1, 1))
        assert labels.dtype == torch.int64 and labels.tolist() == list(range(len(expected)))


@pytest.mark.parametrize("name", ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"])
def test_of_mnists_files_the_damaged_one_is_named_and_left_alone(tmp_path, name):
    """Cut off, too long, without values, still packed, of another kind; labels that are no digits, or too few."""
    path = write_mnist(tmp_path, random_images(7, 28, 28), random_images(3, 28, 28)) / f"MNIST/raw/{name}-ubyte"
    whole = path.read_bytes()
    damaged = [whole[:-1], whole[:6], b"", whole + b"\0", whole[:4] + bytes(12), b"\x1f\x8b\x08\0" + whole[4:]]
    damaged += [whole[:3] + bytes([whole[3] ^ 2]) + whole[4:]]
    if "labels" in name:
        damaged += [whole[:-1] + b"\x0a", b"\0\0\x08\1\0\0\0\2\0\1"]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{path} is damaged .*; delete it"):
            load_data_or_digits(settings("mnist"), tmp_path)
        assert path.read_bytes() == content


def test_cifar10_batches_are_read_pixel_by_pixel(tmp_path, monkeypatch):
    """Rows of 3072 bytes: the red plane, the green and the blue."""
    kind, images = torchvision.datasets.CIFAR10, random_images(12, 3, 32, 32)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)  # not the real files
    files = {kind.meta["filename"]: {kind.meta["key"]: [str(i) for i in range(10)]}}
    for i, (name, _) in enumerate([*kind.train_list, *kind.test_list]):  # two images in each of six
        files[name] = {"data": images[2 * i : 2 * i + 2].flatten(1).numpy(), "labels": [i, i]}
    (tmp_path / kind.base_folder).mkdir()
    for name, content in files.items():
        (tmp_path / kind.base_folder / name).write_bytes(pickle.dumps(content))
    (train, labels), (test, _) = load("cifar10", tmp_path, 32, 3)
    assert torch.equal(train, images[:10]) and labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert torch.equal(test, images[10:])


def test_a_missing_archive_is_named_with_its_folder_and_a_damaged_one_is_left_alone(tmp_path):
    for dataset, file in (("mnist", "MNIST/raw/train-images-idx3-ubyte.gz"), ("cifar10", "cifar-10-python.tar.gz")):
        path = tmp_path / file
        with pytest.raises(DatasetUnavailable, match=f"{path.name}.* into {path.parent}"):
            load(dataset, tmp_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half a download")
        with pytest.raises(InputError, match=f"{path} is damaged"):
            load(dataset, tmp_path)
        assert path.read_bytes() == b"half a download"


def test_drawn_digits_stand_in_for_mnist_alone_and_only_where_they_are_asked_for(tmp_path, capsys):
    with pytest.raises(DatasetUnavailable):
        load("mnist", tmp_path)
    assert "WARNING" not in capsys.readouterr().err
    config = settings("mnist")
    (images, _), _ = load_data_or_digits(config, tmp_path)
    assert config.dataset == "digits" and "GOING ON WITH DRAWN DIGITS" in capsys.readouterr().err
    assert torch.equal(images, load("digits", tmp_path)[0][0])
    for dataset in ("fashion_mnist", "cifar10", "folder"):
        with pytest.raises(InputError):
            load_data_or_digits(settings(dataset), tmp_path)


def save_picture(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def shades(images):
    """Which of the pictures, each of one shade of grey, these are."""
    return set(images[0][:, 0, 8, 8].tolist())


def save_shades(folder, numbers, name="{}.png"):
    for number in numbers:
        save_picture(folder / name.format(number), np.full((20, 20), number, dtype=np.uint8))


def test_a_folder_gives_the_middle_square_of_every_picture_however_deep(tmp_path, capsys):
    """Links are followed, hidden folders are not. Each crop is even and needs no rounding; nothing is resized."""
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    wide, high, grey = (rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((20, 36, 3), (44, 20, 3), (20, 20)))
    squares = np.stack([wide[:, 8:28], high[12:32], grey[..., None].repeat(3, 2)])
    for path, pixels in (("../elsewhere/wide.png", wide), ("b/c/HIGH.PNG", high), ("grey.bmp", grey)):
        save_picture(folder / path, pixels)
    for left_out in (".trash/a.png", "b/.a.png"):
        save_picture(folder / left_out, high)
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    (folder / "b/circle").symlink_to(folder)
    (folder / "notes.txt").write_text("no picture")
    for channels, expected in ((3, squares.transpose(0, 3, 1, 2)), (1, squares[:, None] @ [0.299, 0.587, 0.114])):
        found = torch.cat([images for images, _ in load("folder", folder, 20, channels)]).double()
        distances = (found[:, None] - torch.from_numpy(expected)).abs().amax((2, 3, 4))  # [found, expected]
        assert distances.shape == (3, 3) and (distances.amin(0) < 0.6 * (channels == 1) + 1e-9).all()
        assert "1 files are no pictures, ignored: 1 of .txt" in capsys.readouterr().err


def test_a_pictures_own_path_decides_whether_it_is_for_testing(tmp_path):
    save_shades(tmp_path, range(0, 200, 2))
    train, test = map(shades, load("folder", tmp_path))
    below_a_tenth = {i for i in range(0, 200, 2) if zlib.crc32(f"{i}.png".encode()) < 2**32 / 10}
    assert test == below_a_tenth and 5 <= len(test) <= 15 and train | test == set(range(0, 200, 2))
    save_shades(tmp_path, range(1, 200, 2))
    more_train, more_test = map(shades, load("folder", tmp_path))
    assert train < more_train and test < more_test and len(more_train | more_test) == 200
    tmp_path.rename(moved := tmp_path.with_name("moved"))
    assert shades(load("folder", moved)[1]) == more_test


def test_neither_set_is_ever_empty_and_of_one_picture_a_line_says_that_it_is_both(tmp_path, capsys):
    save_shades(tmp_path, [7])
    assert [shades(images) for images in load("folder", tmp_path)] == [{7}, {7}]
    assert "one picture, 7.png: it is both for training and for testing" in capsys.readouterr().err
    numbers = sorted(range(256), key=lambda i: zlib.crc32(f"{i}.png".encode()))
    for name, few in (("all for testing", numbers[:3]), ("none", numbers[-3:])):
        save_shades(tmp_path / name, few)
        train, test = map(shades, load("folder", tmp_path / name))
        assert train | test == set(few) and not train & test and few[0] in test and few[-1] in train


def test_folders_that_the_lesson_wrote_are_no_data(tmp_path, capsys):
    save_shades(tmp_path, range(0, 40))
    before = [shades(images) for images in load("folder", tmp_path)]
    for name, content in (("checkpoint.pt", b"weights"), ("log.csv", b"dataset,step,loss,learning_rate\n")):
        folder = tmp_path / f"runs/{name[:3]}"
        save_shades(folder, [200], "sr-000400.png")
        save_shades(folder / "notes", [201])
        (folder / name).write_bytes(content)
    save_shades(tmp_path / "mine", [100])
    (tmp_path / "mine/log.csv").write_text("picture,where\n")
    train, test = (shades(images) for images in load("folder", tmp_path))
    assert before[0] <= train and before[1] <= test and (train | test) == {*range(40), 100}
    lines = [line for line in capsys.readouterr().err.splitlines() if "this lesson wrote it" in line]
    assert [str(tmp_path / f"runs/{name} ") in line for name, line in zip(("che", "log"), sorted(lines), strict=True)]
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(InputError, match=f"{tmp_path} is not read: this lesson wrote it"):
        load("folder", tmp_path)


def test_pillow_decides_which_files_are_pictures_and_reads_no_more_of_others_than_it_must(tmp_path, capsys):
    kinds = {"a.gif": "gif", "b.jfif": "jpeg", "c": "png", "d.tga": "tga", "e.txt": "png"}
    if features.check("avif"):
        kinds["f.avif"] = "avif"
    for i, (name, kind) in enumerate(kinds.items()):
        save_picture(tmp_path / name, np.full((20, 20), 30 * i, dtype=np.uint8), format=kind)
    (tmp_path / "long.txt").write_bytes(b"INFO: no picture\n" * 10**6)  # "name: value", a minute for Pillow's IM
    (tmp_path / "drawing").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n" + b"0 0 moveto\n" * 10**6)
    os.truncate(tmp_path / "long.txt", 10**12)  # no disk and no memory has that
    os.mkfifo(tmp_path / "pipe")
    images = torch.cat([images for images, _ in load("folder", tmp_path)])
    assert np.allclose(sorted(images[:, 0, 8, 8].tolist()), [30 * i for i in range(len(kinds))], atol=3)
    assert "2 files are no pictures, ignored: 1 of no ending, 1 of .txt" in capsys.readouterr().err


def test_unreadable_and_small_pictures_are_named_and_a_folder_without_any_is_refused(tmp_path, capsys):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match=f"no readable picture below {folder}"):
            load("folder", folder)
    for name, height in (("a", 16), ("b", 16), ("small", 10)):
        save_picture(tmp_path / f"{name}.png", np.zeros((height, 20, 3), dtype=np.uint8))
    for name in ("cut.png", "cut"):
        (tmp_path / name).write_bytes((tmp_path / "a.png").read_bytes()[:50])
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "text.jpg").write_text("no picture")
    assert sum(len(images) for images, _ in load("folder", tmp_path)) == 3
    *skipped, small = capsys.readouterr().err.replace("\r", "\n").splitlines()
    skipped = [line.split(":")[0] for line in skipped if line.startswith("skipping")]
    assert skipped == [f"skipping {tmp_path / name}" for name in ("cut", "cut.png", "gone.png", "text.jpg")]
    assert "small.png" in small and "16×16" in small and "a.png" not in small


def test_of_errors_while_reading_only_those_about_the_file_are_caught(tmp_path, monkeypatch):
    save_shades(tmp_path, [7])
    for bug in (AttributeError("no such method"), NameError("name"), ImportError("module"), TypeError("argument")):
        assert not isinstance(bug, PICTURE_ERRORS)
        monkeypatch.setattr(ImageOps, "exif_transpose", raising(bug))
        with pytest.raises(type(bug)):
            load("folder", tmp_path)


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)  # every grey level once
OPACITY = np.where(RAMP % 3 == 0, 255, RAMP % 3 * 64).astype(np.uint8)  # full, a quarter, half
ZERO, EXIF, PALETTE = 0 * RAMP, Image.Exif(), Image.fromarray(RAMP).convert("P")
EXIF[0x0112] = 6  # the stored picture's top is on the right
PALETTE.putpalette([255 - i for i in range(256) for _ in "RGB"])
PICTURES = {  # the planes or the picture, its mode and options, and the grey levels that it shows
    "16 bits": (RAMP * np.uint16(257), "I;16", {}, RAMP),
    "32 bits": (RAMP * np.int32(257), "I", {}, RAMP),
    "float to 1": (RAMP / np.float32(255), "F", {}, RAMP),
    "float to 255": (RAMP.astype(np.float32), "F", {}, RAMP),
    "turned by its camera": (RAMP, "L", {"exif": EXIF}, np.rot90(RAMP, -1)),
    "transparent palette": (PALETTE, "P", {"transparency": OPACITY.tobytes()}, (255 - RAMP) * (OPACITY / 255)),
    "LA": (np.dstack([RAMP, OPACITY]), "LA", {}, RAMP * (OPACITY / 255)),
    "one colour transparent": (np.dstack([RAMP] * 3), "RGB", {"transparency": (200,) * 3}, RAMP * (RAMP != 200)),
    "black on nothing": (np.dstack([ZERO, ZERO, ZERO, RAMP]), "RGBA", {}, 255 - RAMP),
}


@pytest.mark.filterwarnings("ignore:.*mode.*:DeprecationWarning")
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_read_as_it_looks(tmp_path, capsys, name):
    """Deep grey scaled, not clipped; upright; what is transparent on black, a black drawing on white with a line."""
    picture, mode, options, expected = PICTURES[name]
    picture = picture if mode == "P" else Image.fromarray(picture, mode if mode == "LA" else None)
    picture.save(path := tmp_path / ("picture.tif" if mode[0] in "IF" else "picture.png"), **options)
    assert Image.open(path).mode == mode
    for channels in (1, 3):
        found = load("folder", tmp_path, channels=channels)[0][0][0]
        assert np.abs(found.numpy() - expected).max() <= 1
    line = f"{path} is black on a transparent ground: laid on white"
    assert (line in capsys.readouterr().err) == (name == "black on nothing")


def test_a_digit_depends_on_its_seed_and_index_and_is_ink_of_one_shape_in_grey_and_colour(monkeypatch):
    state = torch.get_rng_state()
    (grey, labels), (colour, colour_labels) = (DRAW_DIGITS(1200, 32, channels, seed=3) for channels in (1, 3))
    assert torch.equal(torch.get_rng_state(), state)
    again, labels_again = DRAW_DIGITS(5, 32, 3, seed=3)  # 1,000 are drawn at a time
    assert torch.equal(again, colour[:5]) and torch.equal(labels_again, labels[:5])
    assert (labels.bincount(minlength=10) > 60).all() and torch.equal(labels, colour_labels)
    assert (grey.amax((1, 2, 3)) >= 180).all() and (grey[..., 0, :] == 0).float().mean() > 0.99  # bright, not cut
    ink = (grey > 127).float().mean((1, 2, 3))
    assert 0.02 < ink.min() and ink.max() < 0.4
    # In colour the ground is at most 0.35, the pen 1 in one channel: 0.6 of it is between 38 and 60 % of ink.
    bright = colour.amax(1, keepdim=True) > 0.6 * 255
    assert bright[grey > 0.62 * 255].all() and not bright[grey < 0.38 * 255].any()
    assert (colour.float().mean((2, 3)).std(dim=1) > 1).float().mean() > 0.9  # and colours they are

    asked = []
    draw = lambda number, *size, **seed: asked.append(number) or DRAW_DIGITS(50, *size, **seed)
    monkeypatch.setattr(support.data, "draw_digits", draw)
    (train, _), (test, _) = load("digits", "nowhere", 32, 3)
    assert asked == [60_000, 10_000] and len(torch.cat([colour, train, test]).flatten(1).unique(dim=0)) == 1300
