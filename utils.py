"""What the lesson needs besides the method: errors, settings, models, the machine, data sets, resampling, files."""

import sys

if sys.version_info < (3, 11):
    sys.exit("Python is %d.%d: this lesson needs 3.11 or newer" % sys.version_info[:2])

import csv
import io
import itertools
import os
import signal
import socket
import tomllib
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn
from urllib.error import URLError

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # before torch: what an Apple GPU lacks, its CPU does

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as TF
from tqdm import tqdm

from sr3 import SR3, Regression
from unet import UNet

HERE = Path(__file__).resolve().parent

# How a script starts and ends -----------------------------------------------------------------------------------------


class InputError(Exception):
    """Bad input, as one line for the user: what was wrong, the value, what to do. The script exits with status 2."""


AT_END = ExitStack()  # what a script undoes when it ends, however it ends: signal handlers, the lock of its folder


def fail(message: object, status: int = 2) -> NoReturn:
    """Ends the script with one line on stderr, which names the rank unless it is the first; status 2 is bad input."""
    rank = os.environ.get("RANK") or "0"
    script = Path(sys.argv[0]).name + f" (rank {rank})" * (rank != "0")
    with suppress(OSError, ValueError):
        print(f"{script}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(status)


@contextmanager
def errors_in_one_line(if_too_large: str = "give fewer images"):
    """Around a script's main part: what goes wrong with its input, files, memory or keyboard becomes one line."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is something else
            stream.reconfigure(errors="replace")  # a console without γ shows a question mark
    try:
        with AT_END:
            yield
        sys.stdout.flush()
    except InputError as error:
        fail(error)
    except OSError as error:
        if error.filename is None:  # the output's reader is gone, or its disk is full: what is left goes nowhere
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail(f"{error.filename or 'standard output'}: {error.strerror or error}; mend that, or give another path")
    except (RuntimeError, MemoryError) as error:
        words = ("out of memory", "allocate memory", "enough memory", "ALLOC_FAILED")  # the last is cuDNN's
        if isinstance(error, MemoryError) or any(word in str(error) for word in words):
            fail(f"out of memory; {if_too_large} ({str(error)[:100] or type(error).__name__})")
        if RANK == 0:
            raise
        with suppress(SystemExit):
            fail(f"stopped, most likely since another rank has failed ({str(error)[:100]})")
        os._exit(2)  # at once: now and then a thread that waits for the other rank aborts Python's own way out
    except KeyboardInterrupt:
        fail("stopped", status=130)


def catch_signals() -> list[int]:
    """A list that collects Ctrl-C and SIGTERM, so that the step can finish; a second one ends the script."""
    received = []

    def receive(number: int, _) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM) if RANKS == 1 else ():  # ranks would stop after different steps
        with suppress(ValueError):  # raised outside the main thread, which signals don't reach
            AT_END.callback(signal.signal, number, signal.signal(number, receive))
    return received


def read_ranks() -> tuple[int, int, int]:
    """Rank, local rank and number of ranks, as torchrun tells; without it 0, 0, 1. Fails where they don't agree."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ.get(name, "") for name in names}
    if given["WORLD_SIZE"] in ("", "1") and given["RANK"] in ("", "0"):
        return 0, 0, 1
    with suppress(ValueError):
        rank, local_rank, ranks = (int(given[name]) for name in names[:3])
        if 0 <= local_rank <= rank < ranks and given["MASTER_ADDR"] and given["MASTER_PORT"]:
            return rank, local_rank, ranks
    values = ", ".join(f"{name}={value!r}" for name, value in given.items())
    fail(f"the environment has {values}: start several ranks with torchrun, or unset these variables")


RANK, LOCAL_RANK, RANKS = read_ranks()


# Settings: those of configs/mnist.toml, where each is explained -------------------------------------------------------

VALUES = {  # words to choose from, or the least and the greatest number, also of a list; elsewhere 1 and a billion
    "method": ("sr3", "regression"), "dataset": ("mnist", "fashion_mnist", "cifar10", "folder", "digits"),
    "loss_weight": ("1/gamma", "1"), "precision": ("auto", "float32", "bfloat16"),
    "image_size": (16, 1024), "features": (8, 1024), "channel_multipliers": (1, 64), "dropout": (0, 0.9),
    "num_timesteps": (1, 100_000), "beta_start": (1e-7, 0.999), "beta_end": (1e-7, 0.999), "batch_size": (1, 10**6),
    "learning_rate": (1e-9, 1), "warmup_steps": (0, 10**9), "max_grad_norm": (1e-6, 1e6), "seed": (0, 2**31 - 1),
}  # fmt: skip
try:
    DEFAULTS = tomllib.loads((HERE / "configs/mnist.toml").read_text(encoding="utf-8-sig"))
except ValueError as error:
    fail(f"configs/mnist.toml is not valid TOML: {error}")


def load_config(path: str | Path | None = None, flags: dict | None = None, base: dict | None = None) -> SimpleNamespace:
    """All settings: those of `base`, by default configs/mnist.toml's, then a config file's own lines, then the flags.

    Flags that are None, or no settings, count as not given. Raises InputError for a file that is no TOML, an unknown
    setting, a value that is of another type than its default or out of range, and sizes that don't go together.
    """
    config, lines = SimpleNamespace(), {}
    try:
        if path:
            lines = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(f"{path} is not valid TOML: {error}") from None
    flags = {name: value for name, value in (flags or {}).items() if name in DEFAULTS and value is not None}
    for source, values in (("configs/mnist.toml: ", base or DEFAULTS), (f"{path}: ", lines), ("--", flags)):
        for name, value in values.items():
            setattr(config, name, check_setting(name, value, source))
    if config.low_res_size >= config.image_size:
        raise InputError(f"low_res_size is {config.low_res_size}: it must be less than image_size, {config.image_size}")
    if config.sampling_steps > config.num_timesteps:
        limit = f"it must be at most num_timesteps, {config.num_timesteps}"
        raise InputError(f"sampling_steps is {config.sampling_steps}: {limit}")
    return config


def check_setting(name: str, value: object, source: str) -> object:
    """The value, as a float where the default is one. InputError where it can't be; `source` opens the line."""
    if name not in DEFAULTS:
        raise InputError(f"{source}{name} is not a setting; the settings are {', '.join(DEFAULTS)}")
    default, values = DEFAULTS[name], VALUES.get(name, (1, 10**9))
    if isinstance(default, str):
        valid, wanted = value in values, f"one of {', '.join(map(str, values))}"
    else:
        kinds, word = ((int, float), "number") if isinstance(default, float) else ((int,), "whole number")
        low, high = values
        numbers = value if isinstance(default, list) else [value]
        valid = isinstance(numbers, list) and all(type(n) in kinds and low <= n <= high for n in numbers)
        wanted = "a list, each " * isinstance(default, list) + f"a {word} from {low:,} to {high:,}"
    if not valid:
        raise InputError(f"{source}{name} is {value!r}: it must be {wanted}")
    return type(default)(value)


# Models ---------------------------------------------------------------------------------------------------------------


def build_model(config: SimpleNamespace) -> SR3 | Regression:
    """The untrained model that a config describes. Raises InputError for what `UNet` or `SR3` refuses."""
    try:
        names = ("features", "channel_multipliers", "blocks_per_level", "attention_resolutions", "attention_heads")
        settings = {name: getattr(config, name) for name in (*names, "dropout", "image_size")}
        unet = UNet(image_channels=config.channels, **settings)
        if config.method == "regression":
            return Regression(unet)
        return SR3(unet, config.num_timesteps, config.beta_start, config.beta_end, config.loss_weight)
    except ValueError as error:
        raise InputError(error) from None


def load_model(path: str | Path, device: torch.device | str = "cpu") -> SR3 | Regression:
    """A checkpoint's model, its averaged weights, with its `config` and `step`. Raises InputError for anything else."""
    checkpoint = load_checkpoint(path)
    model = build_model(checkpoint["config"])
    model.config, model.step = checkpoint["config"], checkpoint["step"]
    load_state(model, checkpoint["ema"], path)  # half precision becomes float32 here
    return model.eval().to(device)


def super_resolve(model: SR3 | Regression, context: Tensor, steps: int, seed: int = 0) -> Tensor:
    """Samples for x, [N, C, H, W] in [-1, 1], 64 at a time; in [0, 1], rounded to 8 bits as a picture file has them."""
    device = context.device
    generator = torch.Generator(device).manual_seed(seed)
    precision = choose_precision("auto", device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
        parts = tqdm(context.split(64), desc="drawing", unit="batch", dynamic_ncols=True, leave=False)
        images = torch.cat([model.sample(part, steps, generator) for part in parts])
    return (255 * to_unit(images)).round() / 255


def load_state(part: nn.Module | torch.optim.Optimizer, state: dict, path: str | Path) -> None:
    """`load_state_dict`, with an InputError where the state, which is from the checkpoint at `path`, doesn't fit."""
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"its state doesn't fit ({type(error).__name__}: {str(error)[:100]})"
        raise InputError(f"{path} is of another version of this lesson, or damaged: {reason}; give another") from None


def load_checkpoint(path: str | Path, parts: tuple[str, ...] = ("config", "step", "ema")) -> dict:
    """What `save_checkpoint` wrote, on the CPU. Raises InputError for something else, or where a part is missing."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["config"].keys() != DEFAULTS.keys():
            raise ValueError("a setting is missing or unknown")
        return {name: checkpoint[name] for name in parts} | {"config": load_config(flags=checkpoint["config"])}
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what a damaged file raises depends on where the damage is
        reason = f"it is something else, cut off, or lacks one of {', '.join(parts)} ({type(error).__name__})"
        raise InputError(f"{path} is no checkpoint of this lesson: {reason}; give another") from None


# The machine ----------------------------------------------------------------------------------------------------------


def choose_device(name: str | None = None) -> torch.device:
    """The named device, else the first of cuda, mps and cpu that can compute; each rank has a GPU of its own.

    Raises InputError where the named one can't compute, and where there are fewer GPUs than ranks on this machine.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": RANKS == 1 and torch.backends.mps.is_available(), "cpu": True}
    kind = name.split(":")[0] if name else next(kind for kind in there if there[kind])
    if kind not in there or (kind == "mps" and RANKS > 1):
        ranks = f" with {RANKS} ranks" * (RANKS > 1)
        raise InputError(f"device {name}{ranks} is none of cuda, mps (one rank only), cpu; give another --device")
    if RANKS > 1 and kind == "cuda":
        if LOCAL_RANK >= (gpus := torch.cuda.device_count()):
            raise InputError(f"there are more ranks than GPUs, {gpus}; give --nproc_per_node={gpus}, or --device cpu")
        name = f"cuda:{LOCAL_RANK}"
        torch.cuda.set_device(name)
    for candidate in [name] if name else [kind for kind in there if there[kind]]:
        try:
            torch.ones(1, device=candidate).sum().item()  # fails on a GPU that is too old for this PyTorch
            return torch.zeros(1, device=candidate).device
        except (RuntimeError, AssertionError) as error:  # torch built without that device raises AssertionError
            reason = str(error).strip().splitlines()[0][:100]
        if name:
            raise InputError(f"device {name} can't compute here ({reason}); leave out --device to use what can")
        print(f"{candidate} is there but can't compute ({reason}); trying the next device", file=sys.stderr)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The type that autocast gives the network; with "auto" bfloat16 on a CPU that computes in it, else float32.

    Why float32 on GPUs? For a network as small as the default a GPU waits for its instructions, not for arithmetic, and
    autocast's conversions are instructions, too. Raises InputError for bfloat16 on a GPU that only emulates it.
    """
    if name == "auto":
        cpuinfo = Path("/proc/cpuinfo")  # Linux lists AVX512-BF16 and AMX there
        native = device.type == "cpu" and cpuinfo.exists() and "_bf16" in cpuinfo.read_text()
        return torch.bfloat16 if native else torch.float32
    if name == "bfloat16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise InputError('precision is "bfloat16", which this GPU only emulates; give --precision float32')
    return getattr(torch, name)


def compile_networks(networks: list[nn.Module], device: torch.device) -> None:
    """torch.compile each network in place. Raises InputError where that can't work, as without a C++ compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:  # of many kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"torch.compile doesn't work here ({reason}); leave out --compile") from None
    print("compiling the network; the first step takes some minutes", flush=True)
    for network in networks:
        network.compile(dynamic=False)  # batches keep their sizes


# Data sets: each becomes uint8 [N, C, S, S], small enough to lie in the device's memory as a whole --------------------


class DatasetUnavailable(InputError):
    """A data set is neither on disk nor downloadable."""


def load_data(
    config: SimpleNamespace, data_dir: str | Path, or_digits: bool = False, leave_out: Path | None = None
) -> list[tuple[Tensor, Tensor | None]]:
    """The training set and the test set: uint8 [N, channels, image_size, image_size] in 0…255 and labels, int64 [N].

    "mnist", "fashion_mnist" and "cifar10" are downloaded into `data_dir` where they are missing there. "folder" is all
    pictures below `data_dir` but those in `leave_out`, every tenth of them for testing; their labels are None. "digits"
    are drawn, with `or_digits` also where MNIST can't be had: `config.dataset` then says so. Raises DatasetUnavailable
    without files and network, InputError for files that are damaged.
    """
    dataset = [config.dataset]
    if RANK > 0:
        dist.broadcast_object_list(dataset)  # waits for the first rank, which may download and unpack
        config.dataset = dataset[0]
    data_dir, size, channels, sets = Path(data_dir), config.image_size, config.channels, []
    if config.dataset == "folder":
        images = load_folder(data_dir, size, channels, leave_out)  # [N, C, S, S]
        is_test = torch.arange(len(images)) % 10 == 0
        sets = [(images[~is_test] if len(images) > 1 else images, None), (images[is_test], None)]
    elif config.dataset != "digits":
        try:
            sets = [load_torchvision(config, train, data_dir) for train in (True, False)]
        except DatasetUnavailable as error:
            if not (or_digits and config.dataset == "mnist"):
                raise
            line = "!" * 100
            print(f"{line}\nWARNING: {error}.\nGOING ON WITH DRAWN DIGITS INSTEAD.\n{line}", file=sys.stderr)
            config.dataset = "digits"
    if config.dataset == "digits":
        sets = [draw_digits(60_000, size, channels, seed=0), draw_digits(10_000, size, channels, seed=1)]
    if RANKS > 1 and RANK == 0:
        dist.broadcast_object_list([config.dataset])
    return sets


def load_torchvision(config: SimpleNamespace, train: bool, data_dir: Path) -> tuple[Tensor, Tensor]:
    """`load_data` for one half of MNIST, Fashion-MNIST or CIFAR-10."""
    dataset, size = config.dataset, config.image_size
    name = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}[dataset]
    kind = getattr(torchvision.datasets, name)
    folder = data_dir if dataset == "cifar10" else data_dir / name / "raw"
    archives = [(kind.filename, kind.tgz_md5)] if dataset == "cifar10" else kind.resources
    for file, md5 in archives:
        if (folder / file).exists() and not torchvision.datasets.utils.check_integrity(folder / file, md5):
            raise InputError(f"{folder / file} is damaged (its MD5 is not {md5}); delete or replace it")
    socket.setdefaulttimeout(30)  # seconds: a server that doesn't answer must not hang the lesson
    try:
        data = kind(data_dir, train=train, download=True)  # only what is missing
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        offline = isinstance(error, (URLError, HTTPException, TimeoutError, ConnectionError))
        if offline or reason.startswith(("Error downloading", "File not found")):
            files = f"{', '.join(file for file, _ in archives)} into {folder.resolve()}"
            raise DatasetUnavailable(f"{dataset} could not be downloaded ({reason}); put {files}") from None
        if isinstance(error, OSError):  # such as a folder that can't be written, or a full disk
            raise OSError(error.errno, error.strerror or reason, str(error.filename or folder)) from None
        raise InputError(f"{dataset}: a file in {folder} is damaged ({reason}); delete it and run again") from None
    images = torch.as_tensor(data.data)  # [N, H, W], or [N, H, W, 3] from CIFAR-10
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    if config.channels == 1 and images.shape[1] == 3:
        images = TF.rgb_to_grayscale(images)
    images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return images.expand(-1, config.channels, -1, -1).contiguous(), torch.as_tensor(data.targets)


def load_folder(folder: Path, size: int, channels: int, leave_out: Path | None = None) -> Tensor:
    """All pictures below a folder, sorted, cropped to squares and resized: uint8 [N, channels, size, size].

    Links are followed; hidden folders and `leave_out` are not entered. Files that can't be read are named on stderr and
    left out, other files counted. Raises InputError where no picture remains.
    """
    paths, seen = [], {leave_out.resolve()} if leave_out else set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if (here := Path(parent).resolve()) in seen:  # also a link that leads in a circle
            folders.clear()
            continue
        seen.add(here)
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(parent, name) for name in files if not name.startswith(".")]
    pictures = sorted(path for path in paths if path.suffix.lower() in IMG_EXTENSIONS)
    others = Counter(path.suffix.lower() or "no ending" for path in set(paths) - set(pictures))
    images, small = [], []
    for path in tqdm(pictures, desc="reading pictures", unit="file", leave=False, disable=RANK > 0):
        try:
            picture = read_picture(path, channels, size)
        except Exception as error:  # a damaged picture can raise almost anything
            tqdm.write(f"skipping {path}: {error}", file=sys.stderr)
            continue
        small += [str(path)] * (min(picture.size) < size)
        images.append(TF.pil_to_tensor(ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)))
    if not images:
        raise InputError(f"no readable picture ({', '.join(IMG_EXTENSIONS)}) below {folder}; give another --data_dir")
    if small:
        print(f"{len(small)} smaller than {size}×{size}, enlarged, such as {', '.join(small[:3])}", file=sys.stderr)
    if others:
        counts = ", ".join(f"{number} of {ending}" for ending, number in others.most_common(5))
        print(f"{others.total()} files are no pictures, ignored: {counts}", file=sys.stderr)
    return torch.stack(images)


def read_picture(path: str | Path, channels: int, size: int | None = None) -> Image.Image:
    """A picture file's first frame, turned upright, as 8-bit grey or RGB; errors are Pillow's.

    What is transparent is laid on black; a black drawing on white, with a line on stderr. Grey levels of more than 8
    bits are scaled, such that white is what their type suggests. Where `size` is given, a large JPEG may be read at an
    eighth of its size or more, but at twice `size` at least.
    """
    picture = Image.open(path)
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


# Three ways to write each of the ten digits. A stroke is a row of points "xy" on a 10 x 10 grid (x to the right,
# y down) that the pen passes through; "|" lifts the pen; a point given twice makes a corner.
STROKES = [
    ("40 21 13 16 28 49 68 76 73 61 40", "62 50 31 13 16 28 49 68 76 73 61 40 20", "50 31 24 27 39 58 65 62 51 31"),
    ("40 44 49", "32 50 50 54 59", "22 50 50 54 59 59|29 79"),
    ("12 30 51 53 36 19 19 49 79", "12 30 61 54 38 19 07 27 58 89", "11 40 62 54 36 19 19 49 88"),
    ("11 30 61 53 34 34 65 67 49 18", "10 60 60 34 34 65 67 49 18", "12 30 51 43 24 55 68 49 18"),
    ("20 15 15 45 85|60 54 59", "60 33 06 06 46 86|60 64 59", "10 13 35 64 70 70 64 59"),
    ("70 20 20 14 14 43 66 58 39 18", "20 14 14 43 66 58 39 18|20 50 80", "70 40 22 34 56 58 39 18"),
    ("60 32 15 17 39 58 66 45 16", "40 13 06 28 49 68 66 45 25 17", "70 43 16 28 49 67 55 27"),
    ("00 40 80 80 54 39", "02 00 40 70 70 54 48 49", "01 31 70 70 44 29|25 45 65"),
    ("61 40 22 44 67 49 27 44 62 61", "40 22 44 62 40|44 16 18 49 68 66 44", "70 40 21 34 56 58 39 18 26 44 62 70"),
    ("61 40 12 24 44 62 61 61 64 59", "62 40 12 24 44 62 61 61 65 48 29", "61 30 12 24 53 71 54 39"),
]
GLYPH = 64  # pixels on a side of the glyphs that all drawn digits are bent from
PENS = (4, 5, 7)  # of these widths


def draw_glyph(strokes: str, pen: int) -> Tensor:
    """Strokes as white ink on black: float [1, GLYPH, GLYPH] in 0…1, the digit in the middle two thirds."""
    picture = Image.new("L", (GLYPH, GLYPH))
    for stroke in strokes.split("|"):
        points = torch.tensor([[int(x), int(y)] for x, y in stroke.split()]) / 9  # [points, 2]
        curve = F.interpolate(points[None, None], (50 * len(points), 2), mode="bicubic", align_corners=True)[0, 0]
        curve = GLYPH * ((curve - torch.tensor([0.44, 0.5])) * 2 / 3 + 0.5)
        ImageDraw.Draw(picture).line([tuple(point) for point in curve.tolist()], 255, pen, joint="curve")
        for x, y in curve[[0, -1]].tolist():  # round ends
            ImageDraw.Draw(picture).ellipse([x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2], 255)
    return TF.gaussian_blur(TF.to_tensor(picture), 5)


def draw_digits(num_images: int, image_size: int = 32, channels: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Digits that look handwritten, uint8 [N, channels, image_size, image_size] in 0…255, and labels, int64 [N] in 0…9.

    One channel is a white pen on black; three are a coloured pen on a dark coloured ground. Image i depends on the
    seed, the size, the channels and i only; its shape and label don't depend on the channels.
    """
    glyphs = torch.stack([draw_glyph(style, pen) for styles in STROKES for style in styles for pen in PENS])
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num_images, 8 + 18 + 6, generator=generator)  # row i belongs to image i
    chosen = (uniform[:, 0] * len(glyphs)).long()  # a label, a style and a pen
    images = []
    for u, kinds in zip(uniform.split(1000), chosen.split(1000)):
        size, width, slant, turn, right, down = (2 * u[:, 1:7] - 1).T  # -1…1, [B] each
        # Where each pixel of the image is found in the glyph: turned, slanted and scaled, then bent smoothly.
        size, turn = 1.1 + 0.06 * size, 0.15 * turn
        cos, sin = size * turn.cos(), size * turn.sin()
        x_axis = torch.stack([cos * (1.2 + 0.3 * width), sin + cos * (0.25 + 0.3 * slant), 0.04 * right], dim=1)
        y_axis = torch.stack([-sin, cos, 0.04 * down], dim=1)
        theta = torch.stack([x_axis, y_axis], dim=1)  # [B, 2, 3]
        grid = F.affine_grid(theta, [len(u), 1, image_size, image_size], align_corners=False)
        bend = (0.3 * u[:, 8:26] - 0.15).view(-1, 2, 3, 3)
        grid = grid + F.interpolate(bend, grid.shape[1:3], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        ink = F.grid_sample(glyphs[kinds], grid, align_corners=False)  # [B, 1, S, S]
        ink = ink * (0.85 + 0.15 * u[:, 7, None, None, None])
        if channels == 3:  # a bright pen on a dark ground
            pen, ground = u[:, 26:29, None, None], 0.35 * u[:, 29:32, None, None]
            ink = ground + ink * (0.4 + 0.6 * pen / pen.amax(1, keepdim=True) - ground)
        images.append((255 * ink).round().byte())
    return torch.cat(images), chosen // (len(glyphs) // 10)


# Bicubic resampling: how the low-resolution image is made, and from it the context x (the latter: section 2.4) --------


def make_pair(images: Tensor, low_res_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """From uint8 images [B, C, H, W] in 0…255 the target y_0, the low-resolution image and the context x, in [-1, 1].

    They are [B, C, H, W], [B, C, low_res_size, low_res_size] and [B, C, H, W]. x overshoots a little beyond [-1, 1].
    """
    high_res = to_float(images)
    low_res = downsample(high_res, low_res_size)
    return high_res, low_res, upsample(low_res, images.shape[-1])


def to_float(images: Tensor) -> Tensor:
    """uint8 images in 0…255 as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def downsample(images: Tensor, size: int) -> Tensor:
    """Shrink [B, C, H, W] in [-1, 1] to [B, C, size, size] bicubically, antialiased, clamped where it overshoots."""
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def upsample(images: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """Enlarge [B, C, h, w] to [B, C, size, size]: to the context x, or with "nearest-exact" to squares, to look at."""
    return F.interpolate(images, (size, size), mode=mode)


def to_unit(images: Tensor) -> Tensor:
    """Images in [-1, 1] as pictures and metrics want them, in [0, 1]; what lies outside is clamped."""
    return (images.clamp(-1, 1) + 1) / 2


# Files: written whole or not at all. What can't be read or written raises OSError, which becomes one line -------------


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file such that at every moment, whatever happens, it is either the old one or the new one, whole."""
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


def lock_folder(folder: Path) -> None:
    """Keep other runs out of a folder until this script ends, in whatever way. InputError where one is in it."""
    file = AT_END.enter_context(open(folder / ".lock", "w"))
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"another run writes to {folder}; wait for its end, or give another --output_dir") from None
    except OSError:  # a network drive without locks
        pass


def prepare_output(folder: Path) -> None:
    """Make the output folder, lock it, and move what an earlier training left there to a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    lock_folder(folder)
    write_atomically(folder / ".probe", bytes(4096))  # a full disk shows before anything is moved
    (folder / ".probe").unlink()
    names = ["log.csv", "checkpoint.pt", "results.md", "comparison.png", "refinement.gif"]
    names += ["[hls]r-[0-9]*.png", "refinement-[0-9]*.png"]
    earlier = [path for name in names for path in folder.glob(name)]
    if earlier:
        target = next(f for i in itertools.count(1) if not (f := folder / f"earlier-{i}").exists())
        target.mkdir()
        for path in earlier:  # log.csv first, which may be open in a spreadsheet
            path.rename(target / path.name)
        print(f"the results of an earlier run are now in {target}")


def load_log(path: Path, last_step: int) -> list[dict]:
    """The rows of a log up to that step; none where there is no log. Raises InputError for another CSV."""
    try:
        rows = [row | {"step": int(row["step"])} for row in csv.DictReader(path.read_text().splitlines())]
        return [row for row in rows if row["step"] <= last_step]
    except FileNotFoundError:
        return []
    except (KeyError, ValueError):
        raise InputError(f"{path} is not this lesson's log; move it away") from None


def save_log(path: Path, columns: list[str], rows: list[dict]) -> None:
    """Write the log as CSV; what a row lacks stays empty. Where that fails, it warns, and the next row tries again."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    try:
        write_atomically(path, buffer.getvalue().encode())
    except OSError as error:  # such as one that is open in a spreadsheet
        print(f"\n{path} can't be written: {error.strerror}; going on", file=sys.stderr)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write nested dictionaries of tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)  # straight to a full disk it would raise RuntimeError
    write_atomically(path, buffer.getvalue())


def picture_of(images: Tensor, columns: int, scale: int = 2, labels: list[str] | None = None) -> Image.Image:
    """[N, C, H, W] in [0, 1] as one picture in so many columns, with their labels; a pixel is scale × scale."""
    grid = torchvision.utils.make_grid(images.cpu(), nrow=columns, padding=2, pad_value=0.5)
    picture = TF.to_pil_image((255 * grid).round().byte())  # rows · (H + 2) + 2 by columns · (W + 2) + 2 pixels
    picture = picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)
    if labels:
        cell, font = scale * (images.shape[-1] + 2), ImageFont.load_default(12)
        picture = ImageOps.expand(picture, (0, 16 * max(label.count("\n") + 1 for label in labels), 0, 0), "white")
        for i, label in enumerate(labels):
            center = (cell * (i + 0.5) + scale, 1)  # the line's 16 pixels hold the tails of its letters, too
            ImageDraw.Draw(picture).multiline_text(center, label, "black", font, anchor="ma", align="center")
    return picture


def save_grid(path: Path, images: Tensor, columns: int, description: str, **options) -> None:
    """Write `picture_of` images, with its options, as a PNG; `description` goes into its EXIF data."""
    picture, buffer = picture_of(images, columns, **options), io.BytesIO()
    exif = picture.getexif()
    exif[0x010E] = description  # ImageDescription
    picture.save(buffer, format="png", exif=exif)
    write_atomically(path, buffer.getvalue())


def save_columns(path: Path, columns: dict[str, Tensor], description: str, scale: int = 2) -> None:
    """`save_grid` with a labelled column for each tensor, [N, C, H, W] in [0, 1], and a row for each image."""
    grid = torch.stack(list(columns.values()), dim=1).flatten(0, 1)
    save_grid(path, grid, len(columns), description, scale=scale, labels=list(columns))


def save_animation(path: Path, frames: list[Image.Image]) -> None:
    """Write a GIF that loops and pauses at its end."""
    buffer, milliseconds = io.BytesIO(), [120] * (len(frames) - 1) + [3000]
    frames[0].save(buffer, format="gif", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    write_atomically(path, buffer.getvalue())
