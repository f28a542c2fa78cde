"""utils.py: settings, the machine, data sets in their real file formats, bicubic resampling written out in float64."""

import math
import pickle
import tomllib
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from conftest import DRAW_DIGITS, ROOT, raising, write_mnist
from PIL import Image

import utils
from utils import InputError, build_model, load_config


def load(dataset, data_dir, size=16, channels=1, **options):
    """The training set and the test set."""
    settings = {"dataset": dataset, "image_size": size, "low_res_size": 4, "channels": channels}
    return utils.load_data(load_config(flags=settings), data_dir, **options)


def random_images(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_config_names_what_differs_from_mnist_and_builds_a_network_of_the_promised_size(path):
    config, lines = load_config(path), tomllib.loads(path.read_text(encoding="utf-8"))
    mnist = tomllib.loads((ROOT / "configs/mnist.toml").read_text(encoding="utf-8"))
    assert vars(config) == mnist | lines
    assert path.stem == "mnist" or all(mnist[name] != value for name, value in lines.items())
    low, high = (30, 50) if path.stem == "mnist_large" else (1.9, 2)
    assert low <= sum(p.numel() for p in build_model(config).parameters()) / 1e6 <= high


WRONG = """
    method = "gan"; dataset = 3; loss_weight = "gamma"; precision = "float16"; image_size = "32"; image_size = 32.0
    blocks_per_level = true; image_size = [32]; image_size = 8; image_size = 36; image_size = 1025; low_res_size = 0
    low_res_size = 32; channels = 0; channels = 2; features = 4; features = 12; features = 2048; attention_heads = 3
    channel_multipliers = 2; channel_multipliers = []; channel_multipliers = [0, 1]; channel_multipliers = [1, 2.0]
    channel_multipliers = [1, 1, 1, 1, 1, 1, 1]; attention_resolutions = [8, 9]; blocks_per_level = 0; dropout = "0"
    dropout = -0.1; dropout = 1; num_timesteps = 0; num_timesteps = 24; beta_start = 0; beta_start = 1
    beta_start = nan; beta_end = 1; sampling_steps = 0; sampling_steps = 2001; batch_size = 10_000_000
    learning_rate = 0; learning_rate = 2; early_samples = 5; early_samples = [0]; seed = -1; seed = 2147483648
    batchsize = 4; [training]
"""


@pytest.mark.parametrize("line", [line.strip() for line in WRONG.replace("\n", ";").split(";") if line.strip()])
def test_a_wrong_setting_is_refused_with_its_name(tmp_path, line):
    path, name = tmp_path / "wrong.toml", line.split(" = ")[0].strip("[]")
    path.write_text(line)
    with pytest.raises(InputError, match=name):
        build_model(load_config(path))
    for no_toml in (line + "\n" + line, line + "= [", line + "[" * 9999, line.encode() + b"# \xe9t\xe9"):
        path.write_bytes(no_toml if isinstance(no_toml, bytes) else no_toml.encode())
        with pytest.raises(InputError, match="wrong.toml is not valid TOML"):
            load_config(path)


def test_a_wrong_line_of_mnist_toml_itself_is_refused(monkeypatch):
    monkeypatch.setitem(utils.DEFAULTS, "batch_size", 0)
    with pytest.raises(InputError, match="configs/mnist.toml: batch_size is 0"):
        load_config()


def test_a_gpu_that_is_there_but_cannot_compute_is_passed_over_with_a_line_unless_it_is_named(monkeypatch, capsys):
    ones = torch.ones
    no_kernel = raising(RuntimeError("CUDA error: no kernel image is available\nCompile with TORCH_USE_CUDA_DSA"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda n, device: no_kernel() if "cuda" in str(device) else ones(n))
    assert utils.choose_device() == torch.device("cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cuda is there but can't compute (CUDA error: no kernel image is available)")
    for name in ("cuda", "cuda:99"):
        with pytest.raises(InputError, match=f"device {name} can't compute here .*no kernel.* leave out --device"):
            utils.choose_device(name)


def test_bfloat16_is_for_gpus_that_compute_in_it_and_auto_is_float32_on_all(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for capability in ((7, 5), (8, 0)):
        assert utils.choose_precision("auto", cuda) == utils.choose_precision("float32", cuda) == torch.float32
    assert utils.choose_precision("bfloat16", cuda) == torch.bfloat16
    capability = (7, 5)
    with pytest.raises(InputError, match="--precision float32"):
        utils.choose_precision("bfloat16", cuda)


def keys(x, a):
    """The cubic convolution kernel of Keys (1981)."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


@pytest.mark.parametrize("size, low_res_size", [(32, 8), (32, 4), (32, 5), (24, 16), (16, 1)])
def test_a_pair_is_shrunk_antialiased_and_enlarged_bicubically(size, low_res_size):
    """Down: a = -1/2, stretched by the factor, weights normalised to 1. Up: a = -3/4; the border repeats outwards."""
    noise = random_images(4, 3, size, size)
    images, factor = torch.cat([noise, (noise > 127) * 255]).byte(), size / low_res_size  # black and white overshoots
    y_0, low_res, context = (image.double() for image in utils.make_pair(images, low_res_size))
    down = [[keys((j + 0.5) / factor - (i + 0.5), -0.5) for j in range(size)] for i in range(low_res_size)]
    down = torch.tensor(down, dtype=torch.float64)
    down /= down.sum(1, keepdim=True)
    up = torch.zeros(size, low_res_size, dtype=torch.float64)
    for i in range(size):
        centre = (i + 0.5) / factor - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            up[i, min(max(j, 0), low_res_size - 1)] += keys(centre - j, -0.75)
    torch.testing.assert_close(y_0, images.double() / 127.5 - 1, atol=1e-6, rtol=0)
    torch.testing.assert_close(low_res, (down @ y_0 @ down.T).clamp(-1, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(context, up @ low_res @ up.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dataset, folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_files_are_read_pixel_by_pixel_and_where_cut_off_called_damaged(tmp_path, dataset, folder):
    images = random_images(7, 28, 28), random_images(3, 28, 28, seed=1)
    raw = write_mnist(tmp_path, *images, folder) / folder / "raw"
    for (found, labels), expected in zip(load(dataset, tmp_path, 28, 3), images):
        assert found.dtype == torch.uint8 and torch.equal(found, expected[:, None].repeat(1, 3, 1, 1))
        assert labels.dtype == torch.int64 and labels.tolist() == list(range(len(expected)))
    for path in (raw / "train-labels-idx1-ubyte", raw / "train-images-idx3-ubyte"):
        for keep in (-1, 12, 3, 0):
            path.write_bytes(path.read_bytes()[:keep])
            with pytest.raises(InputError, match=f"{dataset}: a file in .* is damaged"):
                load(dataset, tmp_path)


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
        with pytest.raises(utils.DatasetUnavailable, match=f"{path.name}.* into {path.parent}"):
            load(dataset, tmp_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half a download")
        with pytest.raises(InputError, match=f"{path} is damaged"):
            load(dataset, tmp_path)
        assert path.read_bytes() == b"half a download"


def save_picture(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_a_folder_gives_the_middle_square_of_every_picture_however_deep_and_every_tenth_for_testing(tmp_path, capsys):
    """Links are followed, hidden folders are not. Each crop is even and needs no rounding; nothing is resized."""
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    wide, high, grey = (rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((20, 36, 3), (44, 20, 3), (20, 20)))
    squares = np.stack([wide[:, 8:28], high[12:32], grey[..., None].repeat(3, 2)])  # in the order of their paths
    for path, pixels in (("../elsewhere/wide.png", wide), ("b/c/HIGH.PNG", high), ("grey.bmp", grey)):
        save_picture(folder / path, pixels)
    for left_out in (".trash/a.png", "b/.a.png", "output/sr.png"):
        save_picture(folder / left_out, high)
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    (folder / "b/circle").symlink_to(folder)
    (folder / "notes.txt").write_text("no picture")
    load_pictures = partial(load, "folder", folder, 20, leave_out=folder / "output")
    for channels, expected in ((3, squares.transpose(0, 3, 1, 2)), (1, squares[:, None] @ [0.299, 0.587, 0.114])):
        (train, _), (test, _) = load_pictures(channels=channels)
        found = torch.cat([test, train]).numpy()
        assert found.shape == expected.shape and np.abs(found - expected).max() < 0.6 * (channels == 1) + 1e-9
        assert "1 files are no pictures, ignored: 1 of .txt" in capsys.readouterr().err
    for i in range(25):  # later, in the same process
        save_picture(folder / f"z{i:02d}.png", np.full((20, 20 + i), 10 * i, dtype=np.uint8))
    train, test = (images[:, 0, 8, 8].tolist() for images, _ in load_pictures())
    assert test[1:] == [70, 170] and sorted(train[2:] + test[1:]) == list(range(0, 250, 10))  # of 28: 0, 10 and 20


def test_unreadable_and_small_pictures_are_named_and_a_folder_without_any_is_refused(tmp_path, capsys):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match=f"no readable picture .* below {folder}"):
            load("folder", folder)
    for name, height in (("a", 16), ("b", 16), ("small", 10)):
        save_picture(tmp_path / f"{name}.png", np.zeros((height, 20, 3), dtype=np.uint8))
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    (tmp_path / "text.jpg").write_text("no picture")
    assert len(load("folder", tmp_path)[0][0]) == 2  # a is for testing
    cut, text, small = capsys.readouterr().err.replace("\r", "").splitlines()[-3:]
    assert str(tmp_path / "cut.png") in cut and str(tmp_path / "text.jpg") in text
    assert "small.png" in small and "16×16" in small and "a.png" not in small


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
    monkeypatch.setattr(utils, "draw_digits", lambda number, *a, **k: asked.append(number) or DRAW_DIGITS(50, *a, **k))
    (train, _), (test, _) = load("digits", "nowhere", 32, 3)
    assert asked == [60_000, 10_000] and len(torch.cat([colour, train, test]).flatten(1).unique(dim=0)) == 1300
