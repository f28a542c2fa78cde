"""utils.py: settings, bicubic resampling written out in float64, data sets in their real file formats, safe files."""

import errno
import math
import os
import pickle
import tomllib
from dataclasses import asdict
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import utils
from sr3 import build_model
from utils import InputError, downsample, draw_digits, load_config, upsample

CONFIGS = sorted((Path(utils.__file__).parent / "configs").glob("*.toml"))
MILLIONS = {"mnist_large": (30, 50)}  # weights, where not 3 to 5


def load_images(dataset, data_dir, train, size, channels):
    return utils.load_data_set(dataset, train, data_dir, size, channels)[0]


def random_images(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_read_as_written_and_builds_a_network_of_the_promised_size(path):
    config = load_config(path)
    assert asdict(config) == tomllib.loads(path.read_text(encoding="utf-8"))
    model = build_model(config)
    low, high = MILLIONS.get(path.stem, (3, 5))
    assert low <= sum(p.numel() for p in model.parameters()) / 1e6 <= high


def test_settings_have_their_types_and_keywords_replace_training_settings(tiny_config):
    config = load_config(tiny_config(dropout=0, max_grad_norm=2), batch_size=7, seed=None)
    assert type(config.model.dropout) is float and config.training.max_grad_norm == 2.0
    assert config.training.batch_size == 7 and config.training.seed == 0
    assert config.model.channel_multipliers == [1, 2] and config.training.early_samples == []
    assert config.training.learning_rate == 1e-3 and config.data.dataset == "digits"


WRONG = {
    "image_size": ["16", 16.0, True, 15, 1025, [16]],
    "low_res_size": [0, 16, 17, -4],
    "channels": [0, 2, 4],
    "dataset": ["emnist", 3, ""],
    "fallback": ["mnist", False],
    "features": [12, 4, 2048],
    "attention_heads": [3, 0],
    "channel_multipliers": [[], 2, [1, 2.0], [0, 1], [1, "2"], [True, 1]],
    "attention_resolutions": [[4], [8, 9], [0]],
    "dropout": [1, -0.1, "0"],
    "num_timesteps": [0, 3],  # fewer than the 4 sampling steps
    "beta_start": [0, 1, float("nan")],
    "beta_end": [float("inf"), -1],
    "steps": [0, 2001],
    "variance": ["both"],
    "batch_size": [0, -1, 10_000_000],
    "learning_rate": [0, 2, "1e-3"],
    "ema_decay": [1, -0.5],
    "early_samples": [5, [0], [2.5]],
    "precision": ["half"],
    "seed": [-1, 2**31],
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in WRONG.items() for value in values])
def test_a_wrong_setting_is_refused_with_its_name(tiny_config, key, value):
    path = tiny_config(**{key: value if isinstance(value, (str, list, bool, int)) or math.isfinite(value) else 7})
    if isinstance(value, float) and not math.isfinite(value):  # TOML's spelling, which JSON lacks
        path.write_text(path.read_text(encoding="utf-8").replace(f"{key} = 7", f"{key} = {value}"), encoding="utf-8")
    with pytest.raises(InputError, match=rf"(tiny\.toml|config): .*{key}"):
        build_model(load_config(path))


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("batch_size", "batchsize", ["training.batchsize", "batch_size"]),
        ("[sampling]", "[sampler]", ["sampler", "sampling"]),
        ("seed = 0", "", ["training.seed", "missing"]),
        ("[data]", "extra = 1\n[data]", ["extra"]),
        ("seed = 0", "seed = 0\nzzz = 1", ["training.zzz"]),
        ("[data]", "[data", ["TOML"]),
        ("seed = 0", "seed = 0\nseed = 1", ["TOML"]),
    ],
)
def test_a_config_with_other_keys_or_no_toml_is_refused(tiny_config, old, new, words):
    path = tiny_config()
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_config(path, batch_size=4)
    assert all(word in str(error.value) for word in ["tiny.toml", *words])


def test_a_config_with_a_byte_order_mark_is_read(tiny_config):
    path = tiny_config()
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert load_config(path).data.dataset == "digits"


STRANGE = {"latin-1": b"# \xe9t\xe9", "section is a number": b"data = 1\n", "deep": b"a = " + b"[" * 9999 + b"]" * 9999}


@pytest.mark.parametrize("kind", ["missing", "folder", *STRANGE])
def test_a_config_that_is_no_text_of_sections_is_refused(tmp_path, kind):
    path = tmp_path / "strange.toml"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(STRANGE[kind])
    with pytest.raises(InputError, match="strange.toml"):
        load_config(path, batch_size=4)


# ----------------------------------------------------------------------------------------------------------------------
# Bicubic resampling


def keys(x, a):
    """The cubic convolution kernel of Keys (1981)."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def shrinking_matrix(size, new_size):
    """float64 [new_size, size]: the kernel with a = -1/2, stretched by the factor, weights normalised to 1."""
    factor = size / new_size
    rows = [[keys((j + 0.5 - (i + 0.5) * factor) / factor, -0.5) for j in range(size)] for i in range(new_size)]
    matrix = torch.tensor(rows, dtype=torch.float64)
    return matrix / matrix.sum(1, keepdim=True)


def enlarging_matrix(size, new_size):
    """float64 [new_size, size]: the kernel with a = -3/4 on the four nearest pixels; the border repeats outwards."""
    matrix = torch.zeros(new_size, size, dtype=torch.float64)
    for i in range(new_size):
        centre = (i + 0.5) * size / new_size - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), size - 1)] += keys(centre - j, -0.75)
    return matrix


@pytest.mark.parametrize("size, new_size", [(32, 8), (16, 4), (32, 5), (24, 16), (16, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_downsample_is_the_antialiased_bicubic_clamped_to_an_image(size, new_size, channels):
    noise = random_images(4, channels, size, size).float() / 127.5 - 1
    images = torch.cat([noise, noise.sign()])  # black and white overshoots
    matrix = shrinking_matrix(size, new_size)
    exact = matrix @ images.double() @ matrix.T
    torch.testing.assert_close(downsample(images, new_size).double(), exact.clamp(-1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size, new_size", [(8, 32), (4, 16), (5, 32)])
@pytest.mark.parametrize("channels", [1, 3])
def test_upsample_is_bicubic(size, new_size, channels):
    images = random_images(2, channels, size, size).float() / 127.5 - 1
    matrix = enlarging_matrix(size, new_size)
    enlarged = upsample(images, new_size)
    assert enlarged.shape == (2, channels, new_size, new_size)
    torch.testing.assert_close(enlarged.double(), matrix @ images.double() @ matrix.T, atol=1e-5, rtol=0)


def test_bytes_become_minus_one_to_one_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    floats = utils.to_float(values)
    assert floats.dtype == torch.float32 and floats[0] == -1 and floats[255] == 1
    torch.testing.assert_close(utils.to_unit(floats), torch.arange(256) / 255, atol=1e-6, rtol=0)
    assert utils.to_unit(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]


# ----------------------------------------------------------------------------------------------------------------------
# Data sets from files


@pytest.mark.parametrize("dataset, folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_files_are_read_pixel_by_pixel(write_mnist, dataset, folder):
    train, test = random_images(7, 28, 28), random_images(3, 28, 28, seed=1)
    data_dir = write_mnist(train, test, folder)
    for is_train, images in ((True, train), (False, test)):
        found = load_images(dataset, data_dir, is_train, 28, 1)
        assert found.dtype == torch.uint8 and torch.equal(found, images[:, None])
        assert torch.equal(load_images(dataset, data_dir, is_train, 28, 3), images[:, None].repeat(1, 3, 1, 1))
        labels = utils.load_data_set(dataset, is_train, data_dir, 28, 1)[1]
        assert labels.dtype == torch.int64 and labels.tolist() == list(range(len(images)))


def test_cifar10_batches_are_read_pixel_by_pixel(tmp_path, monkeypatch):
    """Rows of 3072 bytes: the red plane, the green and the blue."""
    kind = torchvision.datasets.CIFAR10
    folder = tmp_path / kind.base_folder
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return md5((folder / name).read_bytes()).hexdigest()

    images = random_images(12, 3, 32, 32)  # two in each of six files
    lists = {}
    for i, (name, _) in enumerate([*kind.train_list, *kind.test_list]):
        part = images[2 * i : 2 * i + 2]
        lists[name] = write(name, {"data": part.flatten(1).numpy(), "labels": [i, i]})
    monkeypatch.setattr(kind, "train_list", [[name, lists[name]] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, lists[name]] for name, _ in kind.test_list])
    meta_md5 = write(kind.meta["filename"], {kind.meta["key"]: [str(i) for i in range(10)]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": meta_md5})

    assert torch.equal(load_images("cifar10", tmp_path, True, 32, 3), images[:10])
    assert torch.equal(load_images("cifar10", tmp_path, False, 32, 3), images[10:])
    assert utils.load_data_set("cifar10", True, tmp_path, 32, 3)[1].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    luma = (images.double() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    grey = load_images("cifar10", tmp_path, True, 32, 1)
    assert grey.shape == (10, 1, 32, 32) and (grey - luma[:10]).abs().max() < 0.6  # rounded


@pytest.mark.parametrize("dataset, file", [("mnist", "t10k-labels-idx1-ubyte.gz"), ("cifar10", "cifar-10-python")])
def test_without_files_and_network_a_data_set_is_unavailable_and_says_where_to_put_it(tmp_path, dataset, file):
    with pytest.raises(utils.DatasetUnavailable) as error:
        load_images(dataset, tmp_path, True, 32, 1)
    assert file in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize("keep", [0, 3, 12, -1])
def test_a_cut_off_file_is_damaged_not_downloaded(write_mnist, file, keep):
    data_dir = write_mnist(random_images(5, 28, 28), random_images(5, 28, 28))
    path = data_dir / "MNIST/raw" / file
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="damaged") as error:
        load_images("mnist", data_dir, True, 32, 1)
    assert not isinstance(error.value, utils.DatasetUnavailable) and "mnist" in str(error.value)


@pytest.mark.parametrize("dataset, file", [("mnist", "MNIST/raw/train-images-idx3-ubyte.gz"), ("cifar10", "")])
def test_a_damaged_archive_is_named_and_left_alone(tmp_path, dataset, file):
    path = tmp_path / (file or torchvision.datasets.CIFAR10.filename)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half a download")
    with pytest.raises(InputError, match="damaged") as error:
        load_images(dataset, tmp_path, True, 32, 1)
    assert str(path) in str(error.value) and path.read_bytes() == b"half a download"


def save_picture(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_a_folder_gives_the_middle_square_of_every_picture_however_deep(tmp_path):
    """Each side's crop is even, so there is no half pixel to round; at the square's own size nothing is resized."""
    rng = np.random.default_rng(0)
    wide, high, grey = (rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((20, 36, 3), (44, 20, 3), (20, 20)))
    save_picture(tmp_path / "a/wide.png", wide)
    save_picture(tmp_path / "b/c/HIGH.PNG", high)
    save_picture(tmp_path / "grey.bmp", grey)
    (tmp_path / "notes.txt").write_text("no picture")
    squares = [wide[:, 8:28], high[12:32], grey[..., None].repeat(3, 2)]  # in the order of their paths
    found = torch.cat([load_images("folder", tmp_path, train, 20, 3) for train in (False, True)])
    assert torch.equal(found, torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2))
    luma = (np.stack(squares) @ [0.299, 0.587, 0.114])[:, None]
    found = torch.cat([load_images("folder", tmp_path, train, 20, 1) for train in (False, True)])
    assert found.shape == (3, 1, 20, 20) and np.abs(found.numpy() - luma).max() < 0.6  # rounded


def test_every_tenth_picture_of_a_folder_is_for_testing_and_none_for_both(tmp_path):
    for i in range(25):
        save_picture(tmp_path / f"{i:02d}.png", np.full((16, 16 + i, 3), 10 * i, dtype=np.uint8))
    train, test = (load_images("folder", tmp_path, train, 16, 1)[:, 0, 8, 8].tolist() for train in (True, False))
    assert test == [0, 100, 200]  # pictures 0, 10 and 20
    assert sorted(train + test) == [10 * i for i in range(25)]


def test_an_unreadable_picture_is_named_and_skipped(tmp_path, capsys):
    for i in range(3):
        save_picture(tmp_path / f"{i}.png", np.full((16, 16, 3), i, dtype=np.uint8))
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    assert len(load_images("folder", tmp_path, True, 16, 1)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and str(tmp_path / "cut.png") in lines[0] and str(tmp_path / "text.jpg") in lines[1]


@pytest.mark.parametrize("mode, white", [("I;16", 65_535), ("I", 65_535), ("F", 1), ("F", 255)])
def test_deep_grey_pictures_are_scaled_not_clipped(tmp_path, mode, white):
    levels = np.linspace(0, white, 16 * 16).reshape(16, 16)
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    Image.fromarray(levels.astype(kind)).save(tmp_path / "deep.tif")
    assert Image.open(tmp_path / "deep.tif").mode == mode
    found = load_images("folder", tmp_path, True, 16, 1)[0, 0]
    assert np.abs(found.numpy() - 255 * levels / white).max() < 1


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:4] = 200  # bright at the top, as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored picture's top is on the right
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    found = load_images("folder", tmp_path, True, 16, 1)[0, 0]
    assert (found[:, -4:] == 200).all() and (found[:, :12] == 0).all()


def test_pictures_smaller_than_the_target_are_named(tmp_path, capsys):
    save_picture(tmp_path / "small.png", np.zeros((10, 20, 3), dtype=np.uint8))
    save_picture(tmp_path / "large.png", np.zeros((16, 16, 3), dtype=np.uint8))
    load_images("folder", tmp_path, True, 16, 3)
    error = capsys.readouterr().err
    assert "small.png" in error and "16×16" in error and "large.png" not in error


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_pictures_is_refused(tmp_path, exists):
    folder = tmp_path if exists else tmp_path / "nowhere"
    with pytest.raises(InputError) as error:
        load_images("folder", folder, True, 16, 3)
    assert str(folder) in str(error.value)


@pytest.mark.skipif("SR3_DATA_DIR" not in os.environ, reason="SR3_DATA_DIR doesn't name a folder with MNIST")
def test_the_real_mnist_is_60000_and_10000_digits():
    """The means of the 28×28 originals are 33.3 and 33.8; bilinear enlargement keeps a mean but for the border."""
    for train, number, mean in ((True, 60_000, 33.32), (False, 10_000, 33.79)):
        images = load_images("mnist", os.environ["SR3_DATA_DIR"], train, 32, 1)
        assert images.shape == (number, 1, 32, 32) and images.dtype == torch.uint8
        assert abs(images.float().mean().item() - mean) < 0.3


# ----------------------------------------------------------------------------------------------------------------------
# Drawn digits


@pytest.mark.parametrize("channels", [1, 3])
def test_a_digit_depends_on_its_seed_and_index_only(channels):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    images, labels = draw_digits(1200, 16, channels, seed=3)  # more than are drawn at a time
    assert torch.equal(torch.get_rng_state(), state)
    assert images.shape == (1200, channels, 16, 16) and images.dtype == torch.uint8
    assert labels.shape == (1200,) and labels.dtype == torch.int64
    for number in (1, 5):
        again, labels_again = draw_digits(number, 16, channels, seed=3)
        assert torch.equal(again, images[:number]) and torch.equal(labels_again, labels[:number])
    others = draw_digits(1200, 16, channels, seed=4)[0]
    assert len(torch.cat([images, others]).flatten(1).unique(dim=0)) == 2400  # no two alike


def test_digits_are_of_all_kinds_and_look_like_ink_on_paper():
    images, labels = draw_digits(1000, 32)
    assert (labels.bincount(minlength=10) > 60).all() and len(labels.unique()) == 10
    assert (images.amax((1, 2, 3)) >= 180).all() and (images[..., 0, :] == 0).float().mean() > 0.99  # bright, not cut
    ink = (images > 127).float().mean((1, 2, 3))
    assert 0.02 < ink.min() and ink.max() < 0.4


def test_a_colour_digit_has_the_shape_of_its_grey_one():
    """The ground is at most 0.35 in each channel, the pen 1 in one of them: 0.6 of it is between 38 and 60 % of ink."""
    grey, labels = draw_digits(200, 32, 1)
    colour, colour_labels = draw_digits(200, 32, 3)
    assert torch.equal(labels, colour_labels)
    bright = colour.amax(1, keepdim=True) > 0.6 * 255
    assert bright[grey > 0.62 * 255].all() and not bright[grey < 0.38 * 255].any()
    assert (colour.float().mean((2, 3)).std(dim=1) > 1).float().mean() > 0.9  # and colours they are


def test_drawn_training_and_test_images_are_60000_and_10000_different_ones(monkeypatch):
    asked = []
    monkeypatch.setattr(utils, "draw_digits", lambda number, *a, **k: asked.append(number) or draw_digits(50, *a, **k))
    train, test = (load_images("digits", "nowhere", train, 16, 1) for train in (True, False))
    assert asked == [60_000, 10_000]
    assert len(torch.cat([train, test]).flatten(1).unique(dim=0)) == 100


# ----------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("existed", [True, False])
def test_a_file_that_cannot_be_written_stays_the_old_one(tmp_path, monkeypatch, function, existed):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    if existed:
        utils.write_atomically(path, b"old")
    monkeypatch.setattr(os, function, full)
    with pytest.raises(InputError) as error:
        utils.write_atomically(path, b"new and longer")
    assert str(path) in str(error.value) and "No space" in str(error.value)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"] * existed


def test_a_file_written_without_trouble_is_the_new_one_alone(tmp_path):
    for content in (b"old", b"new"):
        utils.write_atomically(tmp_path / "file", content)
        assert [p.read_bytes() for p in tmp_path.iterdir()] == [content]


def test_a_death_before_the_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    utils.write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        utils.write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_grid_has_every_pixel_where_it_belongs_and_its_description(tmp_path):
    images = random_images(6, 3, 5, 5)
    utils.save_grid(tmp_path / "grid.png", images / 255, 3, "colours, step 7")
    picture = Image.open(tmp_path / "grid.png")
    assert picture.size == (3 * 7 + 2, 2 * 7 + 2) and picture.getexif()[0x010E] == "colours, step 7"
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    for i, image in enumerate(images):
        y, x = 2 + 7 * (i // 3), 2 + 7 * (i % 3)
        assert torch.equal(pixels[:, y : y + 5, x : x + 5], image)
    assert (pixels[:, :2] - 127.5).abs().max() <= 0.5  # grey between them


def test_a_log_has_six_digits_and_empty_cells_for_what_is_not_known(tmp_path):
    utils.save_log(tmp_path / "log.csv", "name,step,loss,psnr", [["a", 1, 0.123456789, 20.0], ["a", 1000000, 1e-7]])
    assert (tmp_path / "log.csv").read_text() == "name,step,loss,psnr\na,1,0.123457,20\na,1000000,1e-07,\n"


COMPLETE = {"config": {}, "dataset": "digits", "step": 1, "ema": {}}


@pytest.mark.parametrize(
    "content",
    [[1, 2], torch.ones(3), b"", b"text", None]
    + [{**COMPLETE, key: value} for key, value in (("config", None), ("step", "x"), ("dataset", 3), ("ema", [1]))],
    ids=lambda content: repr(content)[:60],
)
def test_what_is_no_checkpoint_is_refused_with_its_path(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is None:
        path.mkdir()
    else:
        torch.save(content, path)
    with pytest.raises(InputError) as error:
        utils.load_checkpoint(path)
    assert str(path) in str(error.value) and "delete" not in str(error.value)
