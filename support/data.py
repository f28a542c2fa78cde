"""Data sets, and picture files as a user's disk has them: turned, transparent, of 16 bits or damaged."""

import os
import socket
import sys
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.transforms import functional as TF
from tqdm import tqdm

from support.digits import draw_digits
from support.errors import InputError

FILES = "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz"
DOWNLOADS = {  # torchvision's class, the folder of its files below --data_dir, and their names
    "mnist": (datasets.MNIST, "MNIST/raw", FILES),
    "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw", FILES),
    "cifar10": (datasets.CIFAR10, ".", "cifar-10-python.tar.gz"),
}
# The last six, which few versions of Pillow read, are tried nevertheless, so that they are named.
ENDINGS = (*Image.registered_extensions(), ".avif", ".dng", ".heic", ".heif", ".jxl", ".svg")


def load_data(config, data_dir, or_digits=False):
    """The training set and the test set: uint8 [N, channels, image_size, image_size] in 0…255 and labels, int64 [N].

    Those of DOWNLOADS are downloaded into `data_dir` where they are missing there. "folder" is all pictures below
    `data_dir`; their labels are None. "digits" are drawn. With `or_digits`, for a new run, they also stand in for MNIST
    that can't be had: a loud warning and `config.dataset` say so. Else that raises InputError.
    """
    if config.dataset == "folder":
        return load_folder(config, Path(data_dir))
    if config.dataset != "digits":
        try:
            return load_download(config, data_dir, True), load_download(config, data_dir, False)
        except InputError as error:
            if config.dataset != "mnist" or not or_digits:
                raise
            print(f"\n!!! WARNING: {error}.\n!!! GOING ON WITH DRAWN DIGITS INSTEAD.\n", file=sys.stderr)
            config.dataset = "digits"
    shape = config.image_size, config.channels
    return draw_digits(60_000, *shape, seed=0), draw_digits(10_000, *shape, seed=1)


def load_download(config, data_dir, train):
    """`load_data` for one half of a data set of DOWNLOADS."""
    if config.dataset not in DOWNLOADS:
        raise InputError(f"dataset is {config.dataset!r}: it must be folder, digits or one of {', '.join(DOWNLOADS)}")
    kind, folder, files = DOWNLOADS[config.dataset]
    socket.setdefaulttimeout(30)  # seconds: a server that doesn't answer must not hang the lesson
    try:
        data = kind(data_dir, train=train, download=True)  # only what is missing
    except Exception as error:  # no network, a full disk, damaged files: torchvision lets through what it meets
        raise InputError(
            f"{config.dataset} can't be downloaded or read ({type(error).__name__}: {' '.join(str(error).split())}): "
            f"put its files {files} into {Path(data_dir, folder).resolve()}, or delete damaged ones there"
        ) from None
    images = torch.as_tensor(data.data)  # [N, H, W], or [N, H, W, 3] from CIFAR-10
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    if images.shape[1] > config.channels:
        images = TF.rgb_to_grayscale(images)
    images = F.interpolate(images, config.image_size, mode="bilinear", antialias=True)
    return images.expand(-1, config.channels, -1, -1).contiguous(), torch.as_tensor(data.targets)


def load_folder(config, folder):
    """The middle squares of all pictures below a folder, resized, for training and for testing.

    A square's pixels decide, by their checksum, whether it is among the tenth for testing: so no training picture is
    ever a test picture too, and pictures that are added move no others. Pictures that can't be read are named on stderr
    and left out. Raises InputError where one half would be empty.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder.absolute()}; give another --data_dir")
    size, train, test = config.image_size, [], []
    for path in tqdm(find_pictures(folder), "reading pictures"):
        try:
            picture = read_picture(path, config.channels)
        except InputError as error:
            tqdm.write(f"left out: {error}", file=sys.stderr)
            continue
        square = TF.pil_to_tensor(ImageOps.fit(picture, (size, size), Image.BILINEAR))
        (test if zlib.crc32(square.numpy().tobytes()) < 2**32 / 10 else train).append(square)
    if not train or not test:
        raise InputError(
            f"of the readable pictures below {folder} (links to folders are not followed), "
            f"{len(train)} are for training and {len(test)} for testing; give a --data_dir with more"
        )
    return (torch.stack(train), None), (torch.stack(test), None)


def find_pictures(folder):
    """All picture files below a folder, sorted, but none that this lesson wrote. Links to folders are not followed."""
    paths = []
    for parent, folders, files in os.walk(folder):
        if "checkpoint.pt" in files or "results.md" in files:
            print(f"{parent} is passed over: this lesson wrote checkpoint.pt or results.md there", file=sys.stderr)
            folders.clear()
        else:
            paths += [Path(parent, file) for file in files if file.lower().endswith(ENDINGS) and file != "samples.png"]
    return sorted(paths)


def read_picture(path, channels):
    """A picture file's first frame, upright, as 8-bit grey (mode L) or RGB. Raises InputError where it can't be read.

    What is transparent is laid on black, or on white where nothing on black would be brighter than mid grey, as of a
    black drawing. 16 bits of grey are scaled to 8.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
        if picture.mode in ("F", "LAB"):
            raise ValueError(f"its pixels are of the mode {picture.mode}")
    except Exception as error:  # which one depends on where the damage is
        raise InputError(
            f"{path}: Pillow can't read this {Path(path).suffix[1:].upper()} file ({type(error).__name__}: {error}); "
            "give another, or save it as JPEG or PNG"
        ) from None
    try:
        ImageOps.exif_transpose(picture, in_place=True)
    except Exception:
        pass  # damaged EXIF: what can't be read leaves the pixels as they are, what can't be rewritten comes after them
    if "I" in picture.mode:  # 16 bits of grey: 65,535 is white
        picture = picture.convert("F").point(lambda level: level / 257 + 0.5).convert("L")
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        for ground in ("black", "white"):
            laid = Image.alpha_composite(Image.new("RGBA", picture.size, ground), picture)
            if laid.convert("L").getextrema()[1] > 127:
                break
        picture = laid
    return picture.convert("L" if channels == 1 else "RGB")
