"""Data sets: each becomes uint8 [N, C, S, S], small enough to lie in the device's memory as a whole."""

import math
import os
import socket
import struct
import sys
import zlib
from collections import Counter
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import functional as TF
from tqdm import tqdm

from support.digits import draw_digits
from support.errors import InputError

# What Pillow raises for a damaged file: UnidentifiedImageError is an OSError, AVIF's decoder raises RuntimeError.
# AttributeError, ImportError, NameError and TypeError are bugs.
PICTURE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, LookupError, ArithmeticError)
PICTURE_ERRORS += (struct.error, zlib.error, Image.DecompressionBombError)
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


def load_folder(folder: Path, size: int, channels: int) -> tuple[Tensor, Tensor]:
    """All pictures below a folder, as squares: uint8 [N, channels, size, size] for training, and others for testing.

    A picture's path below the folder decides, and one in ten is for testing: pictures that are added move no others.
    Pictures that can't be read are named on stderr and left out, other files counted. Raises InputError where no
    picture remains, and for a folder that this lesson wrote.
    """
    if is_output(folder):
        reason = "this lesson wrote it (checkpoint.pt, log.csv), and its grids are no data"
        raise InputError(f"{folder} is not read: {reason}; give another --data_dir, with your pictures alone")
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images, names, small, others = [], [], [], Counter()
    for path in tqdm(find_files(folder), desc="reading pictures", unit="file", leave=False):
        try:
            picture = read_picture(path, channels, size)
        except PICTURE_ERRORS as error:
            ending = path.suffix.lower()
            if isinstance(error, UnidentifiedImageError) and ending not in endings:
                others[ending or "no ending"] += 1
            else:
                tqdm.write(f"skipping {path}: {str(error) or type(error).__name__}", file=sys.stderr)
            continue
        if min(picture.size) < size:
            small.append(str(path))
        images.append(TF.pil_to_tensor(ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)))
        names.append(path.relative_to(folder).as_posix())
    if not images:
        raise InputError(f"no readable picture below {folder}; give another --data_dir")
    if small:
        print(f"{len(small)} smaller than {size}×{size}, enlarged, such as {', '.join(small[:3])}", file=sys.stderr)
    if others:
        counts = ", ".join(f"{number} of {ending}" for ending, number in others.most_common(5))
        print(f"{others.total()} files are no pictures, ignored: {counts}", file=sys.stderr)
    images = torch.stack(images)
    if len(images) == 1:
        print(f"{folder} has one picture, {names[0]}: it is both for training and for testing", file=sys.stderr)
        return images, images
    places = torch.tensor([zlib.crc32(os.fsencode(name)) / 2**32 for name in names])  # spread evenly in 0…1
    is_test = places < 0.1
    is_test[places.argmin()] = True  # neither set is empty
    is_test[places.argmax()] = False
    return images[~is_test], images[is_test]


def find_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted. Links are followed; hidden folders and those that this lesson wrote are not."""
    paths, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        parent = Path(parent)
        written = is_output(parent)
        if written:
            print(f"{parent} is not read: this lesson wrote it (checkpoint.pt, log.csv)", file=sys.stderr)
        if written or parent.resolve() in seen:  # the latter where a link leads in a circle
            folders.clear()
            continue
        seen.add(parent.resolve())
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [parent / name for name in files if not name.startswith(".")]
    # Reading a pipe would never end. A link that leads nowhere stays, to be named.
    return sorted(path for path in paths if os.path.isfile(path) or not os.path.exists(path))


def is_output(folder: Path) -> bool:
    """Whether this lesson wrote a folder, so that the pictures in it are grids, no data."""
    if (folder / "checkpoint.pt").exists() or not (folder / "log.csv").is_file():
        return (folder / "checkpoint.pt").exists()
    with open(folder / "log.csv", "rb") as file:
        return file.read(17) == b"dataset,step,loss"


def read_picture(path: str | Path, channels: int, size: int | None = None) -> Image.Image:
    """A picture file's first frame, turned upright, as 8-bit grey or RGB. Raises one of PICTURE_ERRORS.

    What is transparent is laid on black; a black drawing on white, with a line on stderr. Grey levels of more than 8
    bits are scaled, such that white is what their type suggests. Where `size` is given, a large JPEG may be read at an
    eighth of its size or more, but at twice `size` at least.
    """
    Image.init()  # imports all formats
    # Without these two, since Pillow reads a long text line by line, for minutes, to see that it is neither.
    formats = [name for name in Image.ID if name not in ("EPS", "IM")]
    with Image.open(path, formats=formats) as picture:
        if size:
            picture.draft(None, (2 * size, 2 * size))  # measured: photographs of 12 megapixels in a seventh of the time
        picture = ImageOps.exif_transpose(picture)
    mode = "L" if channels == 1 else "RGB"
    if picture.mode[0] in "IF":  # one grey level a pixel, of 16 or 32 bits
        whites = (1, 255, 65_535) if picture.mode == "F" else (65_535,)
        levels = picture.convert("F")
        highest = levels.getextrema()[1]
        white = next((white for white in whites if highest <= white), highest)
        return levels.point(lambda level: level * (255 / white) + 0.5).convert("L").convert(mode)
    if not picture.has_transparency_data:
        return picture.convert(mode)
    picture = picture.convert("RGBA")
    laid = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    if laid.convert("L").getextrema()[1] < 32 and picture.getchannel("A").getextrema()[1] > 0:
        print(f"{path} is black on a transparent ground: laid on white", file=sys.stderr)
        laid = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return laid.convert(mode)
