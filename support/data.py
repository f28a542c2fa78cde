"""Data sets: each becomes uint8 [N, C, S, S], small enough to lie in the device's memory as a whole."""

import math
import socket
import sys
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torchvision.transforms import functional as TF

from support.digits import draw_digits
from support.errors import InputError
from support.pictures import PICTURE_ERRORS, load_folder, read_picture  # the first and the last for sample.py

ImagesAndLabels = tuple[Tensor, Tensor | None]


class DatasetUnavailable(InputError):
    """A data set is neither on disk nor downloadable."""


def load_data_or_digits(config: SimpleNamespace, data_dir: str | Path) -> tuple[ImagesAndLabels, ImagesAndLabels]:
    """`load_data`; where MNIST can't be had, drawn digits with a loud warning, and `config.dataset` says so."""
    try:
        return load_data(config, data_dir)
    except DatasetUnavailable as error:
        if config.dataset != "mnist":
            raise
        line = "!" * 100
        print(f"{line}\nWARNING: {error}.\nGOING ON WITH DRAWN DIGITS INSTEAD.\n{line}", file=sys.stderr)
    config.dataset = "digits"
    return load_data(config, data_dir)


def load_data(config: SimpleNamespace, data_dir: str | Path) -> tuple[ImagesAndLabels, ImagesAndLabels]:
    """The training set and the test set: uint8 [N, channels, image_size, image_size] in 0…255 and labels, int64 [N].

    "mnist", "fashion_mnist" and "cifar10" are downloaded into `data_dir` where they are missing there. "folder" is all
    pictures below `data_dir`; their labels are None. "digits" are drawn. Raises DatasetUnavailable without files and
    network, InputError for files that are damaged.
    """
    size, channels = config.image_size, config.channels
    if config.dataset == "digits":
        return draw_digits(60_000, size, channels, seed=0), draw_digits(10_000, size, channels, seed=1)
    if config.dataset == "folder":
        images, test_images = load_folder(Path(data_dir), size, channels)
        return (images, None), (test_images, None)
    return load_torchvision(config, True, Path(data_dir)), load_torchvision(config, False, Path(data_dir))


def load_torchvision(config: SimpleNamespace, train: bool, data_dir: Path) -> tuple[Tensor, Tensor]:
    """`load_data` for one half of MNIST, Fashion-MNIST or CIFAR-10."""
    name = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}[config.dataset]
    kind = getattr(torchvision.datasets, name)
    if name == "CIFAR10":
        folder, archives = data_dir, [(kind.filename, kind.tgz_md5)]
    else:
        folder, archives = data_dir / name / "raw", kind.resources
        check_mnist(folder, "train" if train else "t10k")
    for file, md5 in archives:  # torchvision would replace a damaged one without a word
        if (folder / file).exists() and not torchvision.datasets.utils.check_integrity(folder / file, md5):
            raise InputError(f"{folder / file} is damaged (its MD5 is not {md5}); delete or replace it")
    socket.setdefaulttimeout(30)  # seconds: a server that doesn't answer must not hang the lesson
    try:
        data = kind(data_dir, train=train, download=True)  # only what is missing
    except (OSError, HTTPException, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        offline = isinstance(error, (URLError, HTTPException, TimeoutError, ConnectionError))
        if offline or reason.startswith(("Error downloading", "File not found")):  # torchvision's RuntimeErrors
            files = f"{', '.join(file for file, _ in archives)} into {folder.resolve()}"
            raise DatasetUnavailable(f"{config.dataset} could not be downloaded ({reason}); put {files}") from None
        if isinstance(error, OSError):  # such as a folder that can't be written, or a full disk
            raise OSError(error.errno, error.strerror or reason, str(error.filename or folder)) from None
        raise
    images = torch.as_tensor(data.data)  # [N, H, W], or [N, H, W, 3] from CIFAR-10
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    if config.channels == 1 and images.shape[1] == 3:
        images = TF.rgb_to_grayscale(images)
    images = F.interpolate(images, (config.image_size, config.image_size), mode="bilinear", antialias=True)
    return images.expand(-1, config.channels, -1, -1).contiguous(), torch.as_tensor(data.targets)


def check_mnist(folder: Path, half: str) -> None:
    """Raises InputError where the unpacked images or labels of one half of MNIST are there but damaged."""
    number = 0  # of images
    for name, dimensions in ((f"{half}-images-idx3-ubyte", 3), (f"{half}-labels-idx1-ubyte", 1)):
        path = folder / name
        if not path.is_file():
            return  # torchvision unpacks or downloads all of them
        content, start = path.read_bytes(), 4 + 4 * dimensions
        sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
        if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != start + math.prod(sizes) or 0 in sizes:
            raise InputError(f"{path} is damaged (not what its own header says, or no header); delete it and run again")
        if dimensions == 1 and (sizes[0] != number or max(content[start:]) > 9):
            reason = f"{sizes[0]:,} labels up to {max(content[start:])} for {number:,} images"
            raise InputError(f"{path} is damaged ({reason}); delete it and run again")
        number = sizes[0]
