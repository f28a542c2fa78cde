"""Picture files, one or a whole folder, as a user's disk has them: of all formats, turned, transparent or damaged."""

import os
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import functional as TF
from tqdm import tqdm

from support.errors import InputError

# What Pillow raises for a damaged file: UnidentifiedImageError is an OSError, AVIF's decoder raises RuntimeError.
PICTURE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, LookupError, ArithmeticError)
PICTURE_ERRORS += (struct.error, zlib.error, Image.DecompressionBombError)
Image.preinit()  # the formats that most pictures have are tried first
Image.init()  # the others, but not two for which Pillow reads a long text line by line, to see that it is neither
FORMATS = [name for name in Image.ID if name not in ("EPS", "IM")]
ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}


def load_folder(folder: Path, size: int, channels: int) -> tuple[Tensor, Tensor]:
    """All pictures below a folder, as squares: uint8 [N, channels, size, size] for training, and others for testing.

    A picture's path below the folder decides, and one in ten is for testing: pictures that are added move no others.
    Pictures that can't be read are named on stderr and left out, other files counted. Raises InputError where no
    picture remains, and for a folder that this lesson wrote.
    """
    if is_output(folder):
        reason = "this lesson wrote it (checkpoint.pt, log.csv), and its grids are no data"
        raise InputError(f"{folder} is not read: {reason}; give another --data_dir, with your pictures alone")
    images, names, small, others = [], [], [], Counter()
    for path in tqdm(find_files(folder), desc="reading pictures", unit="file", leave=False):
        try:
            picture = read_picture(path, channels, size)
        except PICTURE_ERRORS as error:
            ending = path.suffix.lower()
            if isinstance(error, UnidentifiedImageError) and ending not in ENDINGS:
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
    log = folder / "log.csv"
    if log.is_file():
        with open(log, "rb") as file:
            if file.read(17) == b"dataset,step,loss":
                return True
    return (folder / "checkpoint.pt").exists()


def read_picture(path: str | Path, channels: int, size: int | None = None) -> Image.Image:
    """A picture file's first frame, turned upright, as 8-bit grey or RGB. Raises one of PICTURE_ERRORS.

    What is transparent is laid on black; a black drawing on white, with a line on stderr. Grey levels of more than 8
    bits are scaled, such that white is what their type suggests. Where `size` is given, a large JPEG may be read at an
    eighth of its size or more, but at twice `size` at least.
    """
    with Image.open(path, formats=FORMATS) as picture:
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
