"""What a run leaves in its folder: the log, the checkpoint, a lock, and earlier results moved aside.

Files are written whole or not at all. What can't be read or written raises OSError, which becomes one line.
"""

import csv
import io
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from support.errors import InputError


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file such that at every moment, whatever happens, it is either the old one or the new one, whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None  # a full disk names no file


def check_writable(path: Path) -> None:
    """Makes the folder of a file that is to be written after minutes of work, and raises OSError if it can't be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(21, "Is a folder", str(path))
    probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_atomically(probe, b"")
    probe.unlink()


@contextmanager
def failures_noted(failures: list[OSError]) -> Iterator[None]:
    """A file that can't be written ends no run: it is named, and the next one is tried when it is due."""
    try:
        yield
    except OSError as error:
        failures.append(error)
        print(f"\n{error.filename} can't be written: {error.strerror}; going on", file=sys.stderr)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, which it makes if need be. Raises InputError where one is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            hint = "wait for its end, or give another --output_dir"
            raise InputError(f"another run writes to {folder}; {hint}") from None
        except OSError:  # a network drive without locks
            pass
        yield  # the lock ends with the file, also when the process is killed


def prepare_output(folder: Path) -> None:
    """Moves what an earlier training left in the folder to a folder of its own."""
    names = ["log.csv", "checkpoint.pt", "progress.png", "results.md", "comparison.png", "refinement.gif"]
    names += ["[hls]r-[0-9]*.png", "refinement-[0-9]*.png"]
    earlier = [path for name in names for path in folder.glob(name)]
    if not earlier:
        return
    numbers = itertools.count(1)
    target = folder / f"earlier-{next(numbers)}"
    while target.exists():
        target = folder / f"earlier-{next(numbers)}"
    target.mkdir()
    for path in earlier:  # log.csv first, which may be open in a spreadsheet
        path.rename(target / path.name)
    print(f"the results of an earlier run are now in {target}")


def save_progress(folder: Path, row_height: int) -> None:
    """progress.png: the first row of the grids sr of up to eight steps, from few to many, and of the truth below.

    They are read from the grids' files, so a resumed run goes on with the same picture. `row_height` is in pixels.
    """
    grids = {int(path.stem[3:]): path for path in folder.glob("sr-[0-9]*.png")}
    first, last = min(grids), max(grids)
    chosen = set()
    for i in range(8):  # evenly spaced in the logarithm of the step
        wanted = first * (last / first) ** (i / 7)
        chosen.add(min(grids, key=lambda step: abs(step - wanted)))
    rows = [(f"step {step:,}", grids[step]) for step in sorted(chosen)]
    rows.append(("truth", folder / f"hr-{last:06d}.png"))
    grid = Image.open(grids[last])
    picture = Image.new("RGB", (90 + grid.width, len(rows) * row_height), "white")
    for i, (label, path) in enumerate(rows):
        row = Image.open(path).crop((0, 0, grid.width, row_height))
        picture.paste(row, (90, i * row_height))
        place = (8, (i + 0.5) * row_height)
        ImageDraw.Draw(picture).text(place, label, "black", ImageFont.load_default(12), anchor="lm")
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    write_atomically(folder / "progress.png", buffer.getvalue())


def save_log(path: Path, columns: list[str], rows: list[dict]) -> None:
    """Writes the log as CSV; what a row lacks stays empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    write_atomically(path, buffer.getvalue().encode())


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Writes nested dictionaries of tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)  # straight to a full disk it would raise RuntimeError
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: str | Path, parts: tuple[str, ...] = ("config", "step", "ema")) -> dict:
    """What `save_checkpoint` wrote, on the CPU. Raises InputError for something else, or where a part is missing."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what a damaged file raises depends on where the damage is
        reason = f"it is something else, or cut off ({type(error).__name__})"
        raise InputError(f"{path} is no checkpoint of this lesson: {reason}; give another") from None
    missing = [name for name in parts if not isinstance(checkpoint, dict) or name not in checkpoint]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}: it can't be used here; give another checkpoint")
    return checkpoint


def load_state(part: nn.Module | torch.optim.Optimizer, state: dict, path: str | Path) -> None:
    """`load_state_dict`, with an InputError where the state, which is from the checkpoint at `path`, doesn't fit."""
    try:
        if isinstance(part, torch.optim.Optimizer):  # its groups are this run's, and its device's
            state = part.state_dict() | {"state": state["state"]}
        part.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"its state doesn't fit ({type(error).__name__}: {str(error)[:100]})"
        raise InputError(f"{path} is of another version of this lesson, or damaged: {reason}; give another") from None


def load_networks(path: Path, data: str, networks: dict[str, nn.Module]) -> bool:
    """Loads the networks' weights from a file that was saved for the same data; False where there is none."""
    with suppress(OSError, InputError):  # none, or a damaged one
        kept = load_checkpoint(path, ("data", *networks))
        if kept["data"] == data:
            for name, network in networks.items():
                load_state(network, kept[name], path)
            return True
    return False


def check_same_data(checkpoint: dict | None, numbers: list[int]) -> None:
    """Raises InputError where a resumed run finds other numbers of images, for training and testing, than it had."""
    before = checkpoint.get("images", numbers) if checkpoint else numbers
    if numbers != before:
        found = f"there are {numbers[0]} and {numbers[1]} images for training and testing, this run began with"
        raise InputError(f"{found} {before[0]} and {before[1]}: a resumed run can't change its data")
