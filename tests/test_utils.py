"""utils.py: settings, bicubic resampling written out in float64, data sets in their real file formats, safe files."""

import errno
import math
import os
import pickle
import tomllib
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT
from PIL import Image

import utils
from sr3 import build_model, load_model
from utils import InputError, downsample, draw_digits, load_config, upsample


def load_images(dataset, data_dir, train, size, channels):
    return utils.load_data_set(utils.DataConfig(dataset, "", size, 4, channels), train, data_dir)[0]


def random_images(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_read_as_written_and_builds_a_network_of_the_promised_size(path):
    config = load_config(path)
    assert asdict(config) == tomllib.loads(path.read_text(encoding="utf-8"))
    low, high = (30, 50) if path.stem == "mnist_large" else (3, 5)
    assert low <= sum(p.numel() for p in build_model(config).parameters()) / 1e6 <= high


def test_flags_that_are_given_replace_training_settings(tiny_config):
    path = tiny_config(max_grad_norm=2)  # a whole number will do
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")  # with a byte order mark
    config = load_config(path, {"batch_size": 7, "seed": None, "resume": True})
    assert config.training.max_grad_norm == 2 and config.training.batch_size == 7 and config.training.seed == 0
    assert config.model.channel_multipliers == [1, 2] and config.training.early_samples == []


WRONG = {
    "image_size": ["16", 16.0, True, 15, 17, 1025, [16]], "low_res_size": [0, 16], "channels": [0, 2, 4],
    "dataset": ["emnist", 3], "fallback": ["mnist", False], "features": [12, 4, 2048], "attention_heads": [3, 0],
    "channel_multipliers": [[], 2, [1, 2.0], [0, 1], [1, "2"], [1] * 6], "attention_resolutions": [[4], [8, 9], [0]],
    "dropout": [1, -0.1, "0"], "num_timesteps": [0, 3], "beta_start": [0, 1], "beta_end": [1, -1],  # 3: of 4 steps
    "steps": [0, 2001], "variance": ["both"], "batch_size": [0, 10_000_000], "learning_rate": [0, 2, "1e-3"],
    "ema_decay": [1, -0.5], "early_samples": [5, [0], [2.5]], "precision": ["half"], "seed": [-1, 2**31],
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_setting_is_refused_with_its_name(tiny_config, key):
    for value in WRONG[key]:
        with pytest.raises(InputError, match=rf"(tiny\.toml|config): .*{key}"):
            build_model(load_config(tiny_config(**{key: value})))


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("batch_size", "batchsize", "training.batchsize is not a setting"),
        ("[sampling]", "[sampler]", "sampler is not a setting"),
        ("seed = 0", "", "training.seed is missing"),
        ("[data]", "extra = 1\n[data]", "extra is not a setting"),
        ("beta_start = 1e-6", "beta_start = nan", "beta_start is nan"),
        ("beta_end = 1e-2", "beta_end = inf", "beta_end is inf"),
        ("seed = 0", "seed = 0\nseed = 1", "not valid TOML"),
    ],
)
def test_a_config_of_other_keys_is_refused(tiny_config, old, new, words):
    path = tiny_config()
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=rf"tiny\.toml.*{words}"):
        load_config(path, {"batch_size": 4})


def test_a_config_that_is_no_text_of_sections_is_refused(tmp_path):
    path = tmp_path / "strange.toml"
    for content in (b"[data", b"# \xe9t\xe9", b"data = 1", b"a = " + b"[" * 9999):
        path.write_bytes(content)
        with pytest.raises(InputError, match="strange.toml"):
            load_config(path, {"batch_size": 4})


# ----------------------------------------------------------------------------------------------------------------------
# Bicubic resampling


def keys(x, a):
    """The cubic convolution kernel of Keys (1981)."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


@pytest.mark.parametrize("size, new_size", [(32, 8), (32, 5), (24, 16), (16, 1)])
def test_downsample_is_the_antialiased_bicubic_clamped_to_an_image(size, new_size):
    """The kernel with a = -1/2, stretched by the factor, weights normalised to 1."""
    noise = random_images(4, 3, size, size).float() / 127.5 - 1
    images = torch.cat([noise, noise.sign()])  # black and white overshoots
    factor = size / new_size
    rows = [[keys((j + 0.5) / factor - (i + 0.5), -0.5) for j in range(size)] for i in range(new_size)]
    matrix = torch.tensor(rows, dtype=torch.float64)
    matrix /= matrix.sum(1, keepdim=True)
    exact = matrix @ images.double() @ matrix.T
    torch.testing.assert_close(downsample(images, new_size).double(), exact.clamp(-1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size, new_size", [(8, 32), (5, 32)])
def test_upsample_is_bicubic(size, new_size):
    """The kernel with a = -3/4 on the four nearest pixels; the border repeats outwards."""
    images = random_images(2, 3, size, size).float() / 127.5 - 1
    matrix = torch.zeros(new_size, size, dtype=torch.float64)
    for i in range(new_size):
        centre = (i + 0.5) * size / new_size - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), size - 1)] += keys(centre - j, -0.75)
    exact = matrix @ images.double() @ matrix.T
    torch.testing.assert_close(upsample(images, new_size).double(), exact, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Data sets from files


@pytest.mark.parametrize("dataset, folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_files_are_read_pixel_by_pixel(write_mnist, dataset, folder):
    train, test = random_images(7, 28, 28), random_images(3, 28, 28, seed=1)
    data_dir = write_mnist(train, test, folder)
    for is_train, images in ((True, train), (False, test)):
        found, labels = utils.load_data_set(utils.DataConfig(dataset, "", 28, 7, 3), is_train, data_dir)
        assert found.dtype == torch.uint8 and torch.equal(found, images[:, None].repeat(1, 3, 1, 1))
        assert labels.dtype == torch.int64 and labels.tolist() == list(range(len(images)))


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
    train, labels = utils.load_data_set(utils.DataConfig("cifar10", "", 32, 8, 3), True, tmp_path)
    assert torch.equal(train, images[:10]) and labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert torch.equal(load_images("cifar10", tmp_path, False, 32, 3), images[10:])


@pytest.mark.parametrize(
    "dataset, file", [("mnist", "MNIST/raw/train-images-idx3-ubyte.gz"), ("cifar10", "cifar-10-python.tar.gz")]
)
def test_a_missing_archive_is_named_with_its_folder_and_a_damaged_one_is_left_alone(tmp_path, dataset, file):
    path = tmp_path / file
    with pytest.raises(utils.DatasetUnavailable, match=f"{path.name}.* into {path.parent}"):
        load_images(dataset, tmp_path, True, 32, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half a download")
    with pytest.raises(InputError, match=f"{path} is damaged"):
        load_images(dataset, tmp_path, True, 32, 1)
    assert path.read_bytes() == b"half a download"


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_a_cut_off_file_is_damaged_not_downloaded(write_mnist, file):
    data_dir = write_mnist(random_images(5, 28, 28), random_images(5, 28, 28))
    path = data_dir / "MNIST/raw" / file
    for keep in (-1, 12, 3, 0):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(InputError, match="mnist: a file in .* is damaged"):
            load_images("mnist", data_dir, True, 32, 1)


def save_picture(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def test_a_folder_gives_the_middle_square_of_every_picture_however_deep(tmp_path):
    """Each side's crop is even, so there is no half pixel to round; at the square's own size nothing is resized."""
    rng = np.random.default_rng(0)
    wide, high, grey = (rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((20, 36, 3), (44, 20, 3), (20, 20)))
    save_picture(tmp_path / "a/wide.png", wide)
    save_picture(tmp_path / "b/c/HIGH.PNG", high)
    save_picture(tmp_path / "grey.bmp", grey)
    (tmp_path / "notes.txt").write_text("no picture")
    squares = np.stack([wide[:, 8:28], high[12:32], grey[..., None].repeat(3, 2)])  # in the order of their paths
    colour, luma = (
        torch.cat([load_images("folder", tmp_path, train, 20, channels) for train in (False, True)]).numpy()
        for channels in (3, 1)
    )
    assert (colour == squares.transpose(0, 3, 1, 2)).all()
    assert luma.shape == (3, 1, 20, 20) and np.abs(luma[:, 0] - squares @ [0.299, 0.587, 0.114]).max() < 0.6  # rounded


def test_every_tenth_picture_of_a_folder_is_for_testing_and_none_for_both(tmp_path):
    for i in range(25):
        save_picture(tmp_path / f"{i:02d}.png", np.full((16, 16 + i, 3), 10 * i, dtype=np.uint8))
    train, test = (load_images("folder", tmp_path, train, 16, 1)[:, 0, 8, 8].tolist() for train in (True, False))
    assert test == [0, 100, 200] and sorted(train + test) == [10 * i for i in range(25)]


def test_unreadable_and_small_pictures_are_named_and_a_folder_without_any_is_refused(tmp_path, capsys):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match=folder.name):
            load_images("folder", folder, True, 16, 3)
    for name, height in (("a", 16), ("b", 16), ("small", 10)):
        save_picture(tmp_path / f"pictures/{name}.png", np.zeros((height, 20, 3), dtype=np.uint8))
    (tmp_path / "pictures/cut.png").write_bytes((tmp_path / "pictures/a.png").read_bytes()[:50])
    (tmp_path / "pictures/text.jpg").write_text("no picture")
    assert len(load_images("folder", tmp_path / "pictures", True, 16, 1)) == 2  # a is for testing
    cut, text, small = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "pictures/cut.png") in cut and str(tmp_path / "pictures/text.jpg") in text
    assert "small.png" in small and "16×16" in small and "a.png" not in small


@pytest.mark.parametrize(
    "mode, kind, white", [("I;16", "u2", 65_535), ("I", "i4", 65_535), ("F", "f4", 1), ("F", "f4", 255)]
)
def test_deep_grey_pictures_are_scaled_not_clipped(tmp_path, mode, kind, white):
    levels = np.linspace(0, white, 16 * 16).reshape(16, 16)
    save_picture(tmp_path / "deep.tif", levels.astype(kind))
    assert Image.open(tmp_path / "deep.tif").mode == mode
    found = load_images("folder", tmp_path, True, 16, 1)[0, 0]
    assert np.abs(found.numpy() - 255 * levels / white).max() < 1


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    pixels, exif = np.zeros((16, 16, 3), dtype=np.uint8), Image.Exif()
    pixels[:4] = 200  # bright at the top, as stored
    exif[0x0112] = 6  # the stored picture's top is on the right
    save_picture(tmp_path / "turned.png", pixels, exif=exif)
    found = load_images("folder", tmp_path, True, 16, 1)[0, 0]
    assert (found[:, -4:] == 200).all() and (found[:, :12] == 0).all()


# ----------------------------------------------------------------------------------------------------------------------
# Drawn digits


def test_a_digit_depends_on_its_seed_and_index_only():
    state = torch.get_rng_state()
    images, labels = draw_digits(1200, 16, 3, seed=3)  # more than are drawn at a time
    assert torch.equal(torch.get_rng_state(), state)
    again, labels_again = draw_digits(5, 16, 3, seed=3)
    assert torch.equal(again, images[:5]) and torch.equal(labels_again, labels[:5])
    others = draw_digits(1200, 16, 3, seed=4)[0]
    assert len(torch.cat([images, others]).flatten(1).unique(dim=0)) == 2400  # no two alike


def test_digits_are_of_all_kinds_look_like_ink_on_paper_and_have_one_shape_in_grey_and_colour():
    (grey, labels), (colour, colour_labels) = (draw_digits(1000, 32, channels) for channels in (1, 3))
    assert grey.shape == (1000, 1, 32, 32) and grey.dtype == torch.uint8 and labels.dtype == torch.int64
    assert (labels.bincount(minlength=10) > 60).all() and torch.equal(labels, colour_labels)
    assert (grey.amax((1, 2, 3)) >= 180).all() and (grey[..., 0, :] == 0).float().mean() > 0.99  # bright, not cut
    ink = (grey > 127).float().mean((1, 2, 3))
    assert 0.02 < ink.min() and ink.max() < 0.4
    # In colour the ground is at most 0.35, the pen 1 in one channel: 0.6 of it is between 38 and 60 % of ink.
    bright = colour.amax(1, keepdim=True) > 0.6 * 255
    assert bright[grey > 0.62 * 255].all() and not bright[grey < 0.38 * 255].any()
    assert (colour.float().mean((2, 3)).std(dim=1) > 1).float().mean() > 0.9  # and colours they are


def test_drawn_training_and_test_images_are_60000_and_10000_different_ones(monkeypatch):
    asked = []
    monkeypatch.setattr(utils, "draw_digits", lambda number, *a, **k: asked.append(number) or draw_digits(50, *a, **k))
    train, test = (load_images("digits", "nowhere", train, 16, 1) for train in (True, False))
    assert asked == [60_000, 10_000] and len(torch.cat([train, test]).flatten(1).unique(dim=0)) == 100


# ----------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space"), KeyboardInterrupt()], ids=["full", "killed"])
def test_a_file_is_the_new_one_or_where_that_fails_the_old_one(tmp_path, monkeypatch, function, error):
    path = tmp_path / "file"
    for content in (b"older", b"old"):
        utils.write_atomically(path, content)
        assert [p.read_bytes() for p in tmp_path.iterdir()] == [content]

    def fail(*_):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises((OSError, KeyboardInterrupt)) as raised:
        utils.write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"
    if raised.type is OSError:
        assert raised.value.filename == str(path) and len(list(tmp_path.iterdir())) == 1


def test_a_log_has_six_digits_and_empty_cells_for_what_is_not_known(tmp_path):
    rows = [{"step": 1, "loss": 0.123456789, "psnr": 20.0}, {"step": 1000000, "loss": 1e-7}]
    utils.save_log(tmp_path / "log.csv", ["step", "loss", "psnr"], rows)
    assert (tmp_path / "log.csv").read_text() == "step,loss,psnr\n1,0.123457,20\n1000000,1e-07,\n"


def test_what_is_no_checkpoint_is_cut_off_or_of_another_version_is_refused_with_its_path(tiny_config, tmp_path):
    path, complete = tmp_path / "checkpoint.pt", {"config": {}, "step": 1, "ema": {}}
    parts = [{name: complete[name] for name in complete if name != left_out} for left_out in complete]
    wrong = [complete | {name: None} for name in complete]
    for content in ([1, 2], torch.ones(3), b"", b"text", *parts, *wrong):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(InputError, match=str(path)):
            utils.load_checkpoint(path)
    utils.save_checkpoint(path, {**complete, "config": asdict(load_config(tiny_config()))})
    with pytest.raises(InputError, match=f"{path} is of another version"):
        load_model(path)  # without weights
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"{path} is no checkpoint of this lesson: it is something else, cut off"):
        load_model(path)
