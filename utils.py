"""What the lesson needs besides the method: settings, the machine, data sets, bicubic resampling, grids, safe files."""

import sys

if sys.version_info < (3, 11):
    sys.stderr.write("Python is %d.%d: this lesson needs 3.11 or newer\n" % sys.version_info[:2])
    sys.exit(2)

import functools
import io
import itertools
import os
import signal
import socket
import tomllib
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, is_dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Literal, NoReturn, get_args, get_origin
from urllib.error import URLError

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # before torch: what an Apple GPU lacks, its CPU does

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import functional as TF
from torchvision.utils import make_grid

HERE = Path(__file__).resolve().parent
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them


class InputError(Exception):
    """Bad input, as one line for the user: what was wrong, the value, what to do. The script exits with status 2."""


class DatasetUnavailable(InputError):
    """A data set is neither on disk nor downloadable."""


def fail(message: object, status: int = 2) -> NoReturn:
    """Ends the script with one line on stderr, which names the rank unless it is the first; status 2 is bad input."""
    script = Path(sys.argv[0]).name + f" (rank {RANK})" * (RANK > 0)
    with suppress(OSError):
        print(f"{script}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(status)


@contextmanager
def errors_in_one_line(if_stopped: str = "stopped", if_too_large: str = "give fewer images"):
    """Around a script's main part: what goes wrong with its input, files, memory or keyboard becomes one line."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console without γ shows a question mark
    try:
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
        if out_of_memory(error):
            fail(f"out of memory; {if_too_large} ({str(error)[:100] or type(error).__name__})")
        if RANK == 0:
            raise
        fail(f"stopped, most likely since another rank has failed ({str(error)[:100]})")
    except KeyboardInterrupt:
        fail(if_stopped, status=130)


def out_of_memory(error: BaseException) -> bool:
    """Each device has its own words for it, most of them in a RuntimeError."""
    words = ("out of memory", "allocate memory", "enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def catch_signals() -> list[int]:
    """A list that collects Ctrl-C and SIGTERM, so that the step can finish; a second one ends the script.

    With several ranks the first one does: they would not all stop after the same step.
    """
    received = []

    def receive(number: int, _) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM) if RANKS == 1 else ():
        signal.signal(number, receive)
    return received


# ----------------------------------------------------------------------------------------------------------------------
# Settings: the keys of configs/*.toml, where each is explained, with their types and the values they may take


@dataclass
class DataConfig:
    dataset: Literal["mnist", "fashion_mnist", "cifar10", "folder", "digits"]
    fallback: Literal["digits", ""]
    image_size: Annotated[int, 16, 1024]
    low_res_size: Annotated[int, 1, 1023]
    channels: Annotated[int, 1, 3]


@dataclass
class ModelConfig:
    features: Annotated[int, 8, 1024]
    channel_multipliers: list[Annotated[int, 1, 64]]
    blocks_per_level: Annotated[int, 1, 16]
    attention_resolutions: list[Annotated[int, 1, 1024]]
    attention_heads: Annotated[int, 1, 64]
    dropout: Annotated[float, 0, 0.9]


@dataclass
class DiffusionConfig:
    num_timesteps: Annotated[int, 1, 100_000]
    beta_start: Annotated[float, 1e-7, 0.999]
    beta_end: Annotated[float, 1e-7, 0.999]


@dataclass
class SamplingConfig:
    steps: Annotated[int, 1, 100_000]
    variance: Literal["posterior", "forward"]


@dataclass
class TrainingConfig:
    num_training_steps: Annotated[int, 1, 10**9]
    batch_size: Annotated[int, 1, 10**6]
    learning_rate: Annotated[float, 1e-9, 1]
    warmup_steps: Annotated[int, 0, 10**9]
    max_grad_norm: Annotated[float, 1e-6, 1e6]
    ema_decay: Annotated[float, 0, 0.999999]
    sample_every: Annotated[int, 1, 10**9]
    early_samples: list[Annotated[int, 1, 10**9]]
    precision: Literal["auto", "float32", "bfloat16", "float16"]
    seed: Annotated[int, 0, 2**31 - 1]


@dataclass
class Config:
    method: Literal["sr3", "regression"]
    data: DataConfig
    model: ModelConfig
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    training: TrainingConfig


def load_config(path: str | Path, flags: dict | None = None) -> Config:
    """Read a config file; flags that are not None replace the settings of its [training] section that have their names.

    Raises InputError for a file that is no TOML, a key that is unknown or missing, a value of the wrong type or out of
    range, and sizes that don't go together.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(f"{path} is not valid TOML: {error}") from None
    training = values.get("training")
    if flags and isinstance(training, dict):
        training |= {name: flags[name] for name in training if flags.get(name) is not None}
    return parse_config(values, path)


def parse_config(values: dict, source: str | Path) -> Config:
    """Turn nested dictionaries into a Config; errors as `load_config`, naming `source`."""
    config = parse_value(values, f"{source}: ", Config)
    small, size = config.data.low_res_size, config.data.image_size
    if small >= size:
        raise InputError(f"{source}: data.low_res_size is {small}: it must be less than image_size, {size}")
    steps, T = config.sampling.steps, config.diffusion.num_timesteps
    if steps > T:
        raise InputError(f"{source}: sampling.steps is {steps}: it must be at most num_timesteps, {T}")
    return config


def parse_value(value: object, name: str, kind: type):
    """A value as the type of its setting wants it, a section as a dataclass; `name` opens the error lines."""
    if is_dataclass(kind):
        kinds, values = {f.name: f.type for f in fields(kind)}, dict(value) if isinstance(value, dict) else {}
        for key in [*values, *kinds]:
            if key not in kinds or key not in values:
                fault = "is missing" if key in kinds else "is not a setting"
                raise InputError(f"{name}{key} {fault}; the settings here are {', '.join(kinds)}")
        for key, of in kinds.items():
            values[key] = parse_value(values[key], f"{name}{key}" + "." * is_dataclass(of), of)
        return kind(**values)
    arguments = get_args(kind)
    if get_origin(kind) is list:
        if isinstance(value, list):
            return [parse_value(item, name, *arguments) for item in value]
        valid, hint = False, "a list"
    elif get_origin(kind) is Literal:
        valid, hint = value in arguments, f"one of {', '.join(map(repr, arguments))}"
    else:
        number, low, high = arguments
        valid = type(value) in (int, number) and low <= value <= high
        hint = f"a{' whole' * (number is int)} number from {low:,} to {high:,}"
    if not valid:
        raise InputError(f"{name} is {value!r}: it must be {hint}")
    return value


# ----------------------------------------------------------------------------------------------------------------------
# The machine: device, precision, memory layout, compiler


def choose_device(name: str | None) -> torch.device:
    """The device of that name, else cuda, else mps, else cpu; ranks have a GPU each. InputError if it isn't there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, kinds = name.split(":")[0], ("cuda", "mps", "cpu") if RANKS == 1 else ("cuda", "cpu")
    if kind not in kinds:
        ranks = f" with {RANKS} ranks" * (RANKS > 1)
        raise InputError(f"device {name}{ranks} is not one of {', '.join(kinds)}; give another --device")
    if RANKS > 1 and kind == "cuda":
        if int(os.environ["LOCAL_WORLD_SIZE"]) > (gpus := torch.cuda.device_count()):
            raise InputError(f"there are more ranks than GPUs, {gpus}; give --nproc_per_node={gpus}, or --device cpu")
        torch.cuda.set_device(name := f"cuda:{os.environ['LOCAL_RANK']}")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch built without that device raises AssertionError
        reason = str(error)[:80]
        raise InputError(f"device {name} is not there ({reason}); leave out --device to use what is") from None


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """What autocast uses for the network: with "auto" the fastest type that the machine computes natively."""
    if name == "float16" and device.type == "cpu":
        raise InputError('training.precision is "float16" on a CPU, which only emulates it; give "auto"')
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":  # bfloat16 is native since Ampere; a T4 only emulates it
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    cpuinfo = Path("/proc/cpuinfo")  # AMX or AVX512-BF16; Linux tells
    native = device.type == "cpu" and cpuinfo.exists() and "_bf16" in cpuinfo.read_text()
    return torch.bfloat16 if native else torch.float32


def choose_autocast(precision: torch.dtype, device: torch.device) -> Callable:
    """The context that a network runs in."""
    return nullcontext if precision == torch.float32 else functools.partial(torch.autocast, device.type, precision)


def choose_layout(features: int, device: torch.device) -> torch.memory_format:
    """Channels last for wide networks and GPUs' matrix units; measured on CPUs: narrow ones train faster without."""
    return torch.channels_last if features >= 64 or device.type == "cuda" else torch.contiguous_format


def compile_networks(networks: list[nn.Module], wanted: bool | None, device: torch.device) -> None:
    """torch.compile each network in place, by default on GPUs; one line says so where it can't work."""
    if not (device.type == "cuda" if wanted is None else wanted):
        return
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))  # fails without Triton, or a C++ compiler
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"torch.compile doesn't work here ({reason}); going on without it", file=sys.stderr)
        torch._dynamo.reset()
        return
    for network in networks:
        network.compile(dynamic=False)  # batches of training and of drawing keep their sizes


# ----------------------------------------------------------------------------------------------------------------------
# Data sets: all of them become uint8 [N, C, S, S], which is small enough to lie in the device's memory as a whole


def load_data(config: DataConfig, data_dir: str | Path) -> list[tuple[Tensor, Tensor | None]]:
    """The training and the test set, as `load_data_set` gives them; where they can't be had, those of the fallback.

    `config.dataset` then becomes that. With several ranks the first one loads, which may download and unpack, while the
    others wait to be told what it has chosen.
    """

    def load() -> list[tuple[Tensor, Tensor | None]]:
        return [load_data_set(config, train, data_dir) for train in (True, False)]

    if RANK == 0:
        try:
            sets = load()
        except DatasetUnavailable as error:
            if not config.fallback:
                raise
            config.dataset, line = config.fallback, "!" * 100
            print(f"{line}\nWARNING: {error}.\nGOING ON WITH DRAWN DIGITS INSTEAD.\n{line}", file=sys.stderr)
            sets = load()
    if RANKS > 1:
        chosen = [config.dataset]
        dist.broadcast_object_list(chosen)  # NCCL's init_process_group doesn't wait, this does
        config.dataset = chosen[0]
    return sets if RANK == 0 else load()


def load_data_set(config: DataConfig, train: bool, data_dir: str | Path) -> tuple[Tensor, Tensor | None]:
    """A data set's training or test images, uint8 [N, channels, image_size, image_size] in 0…255, and their labels.

    "mnist", "fashion_mnist" and "cifar10" are read from `data_dir`, downloaded into it first where they are missing;
    "folder" is all images below `data_dir`, every tenth of them for testing; "digits" is drawn. Resizing is bilinear
    and antialiased. Labels are int64 [N] from 0; a folder has None. Raises DatasetUnavailable without files and
    network, InputError for files that are damaged.
    """
    size, channels, labels = config.image_size, config.channels, None
    if config.dataset == "digits":
        return draw_digits(60_000 if train else 10_000, size, channels, seed=0 if train else 1)
    if config.dataset == "folder":
        images = load_folder(Path(data_dir), size)
        is_test = torch.arange(len(images)) % 10 == 0
        images = images[is_test != train] if len(images) > 1 else images
    else:
        images, labels = load_torchvision(config.dataset, train, Path(data_dir))
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    if channels == 1 and images.shape[1] == 3:
        images = torch.cat([TF.rgb_to_grayscale(part.float()).round().byte() for part in images.split(1000)])
    return images.expand(-1, channels, -1, -1).contiguous(), labels


def load_torchvision(dataset: str, train: bool, data_dir: Path) -> tuple[Tensor, Tensor]:
    """uint8 [N, C, H, W] of MNIST, Fashion-MNIST or CIFAR-10, int64 [N]; errors as `load_data_set`."""
    name = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}[dataset]
    kind = getattr(torchvision.datasets, name)
    if dataset == "cifar10":
        folder, archives = data_dir, [(kind.filename, kind.tgz_md5)]
    else:
        folder, archives = data_dir / name / "raw", kind.resources
    for file, md5 in archives:
        if (folder / file).exists() and not check_integrity(folder / file, md5):
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
    return images, torch.as_tensor(data.targets)


@functools.cache
def load_folder(folder: Path, image_size: int) -> Tensor:
    """All images below a folder, upright, centre-cropped to squares and resized: uint8 [N, 3, image_size, image_size].

    Files that can't be read are named on stderr and left out. Raises InputError where no image remains.
    """
    images, small = [], []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS):
        try:
            picture = ImageOps.exif_transpose(Image.open(path))
            if picture.mode[0] in "IF":  # one grey level a pixel, of 16 or 32 bits: white is what the type suggests
                grey = torch.from_numpy(np.array(picture, dtype=np.float32))  # [height, width]
                whites = (1, 255, 65_535) if picture.mode == "F" else (65_535,)
                white = next((white for white in whites if grey.max() <= white), grey.max())
                image = (255 * grey / white).round().clamp(min=0).byte().expand(3, -1, -1)
            else:
                image = TF.pil_to_tensor(picture.convert("RGB"))  # [3, height, width]
        except Exception as error:  # a damaged picture can raise almost anything
            print(f"skipping {path}: {error}", file=sys.stderr)
            continue
        side = min(image.shape[1:])
        small += [str(path)] * (side < image_size)
        images.append(TF.resize(TF.center_crop(image, side), [image_size, image_size], antialias=True))
    if not images:
        raise InputError(f"no readable image ({', '.join(IMG_EXTENSIONS)}) below {folder}; give another --data_dir")
    if small:
        names = ", ".join(small[:3]) + ", …" * (len(small) > 3)
        print(f"{len(small)} smaller than {image_size}×{image_size}, enlarged: {names}", file=sys.stderr)
    return torch.stack(images)


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
    images = []
    for u in uniform.split(1000):
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
        chosen = (u[:, 0] * len(glyphs)).long()  # a label, a style and a pen
        ink = F.grid_sample(glyphs[chosen], grid, align_corners=False)  # [B, 1, S, S]
        ink = ink * (0.85 + 0.15 * u[:, 7, None, None, None])
        if channels == 3:  # a bright pen on a dark ground
            pen, ground = u[:, 26:29, None, None], 0.35 * u[:, 29:32, None, None]
            ink = ground + ink * (0.4 + 0.6 * pen / pen.amax(1, keepdim=True) - ground)
        images.append((255 * ink).round().byte())
    labels = (uniform[:, 0] * len(glyphs)).long() // (len(glyphs) // 10)
    return torch.cat(images), labels


# ----------------------------------------------------------------------------------------------------------------------
# Bicubic resampling: how the low-resolution image is made, and from it the context x (the latter: section 2.4)


def to_float(images: Tensor) -> Tensor:
    """uint8 images in 0…255 as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_unit(images: Tensor) -> Tensor:
    """Images in [-1, 1] as pictures and metrics want them, in [0, 1]; what lies outside is clamped."""
    return (images.clamp(-1, 1) + 1) / 2


def downsample(images: Tensor, size: int) -> Tensor:
    """Shrink [B, C, H, W] in [-1, 1] to [B, C, size, size] bicubically, antialiased, clamped where it overshoots."""
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def upsample(images: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """Enlarge [B, C, h, w] to [B, C, size, size]: to the context x, or with "nearest-exact" to squares, to look at."""
    return F.interpolate(images, (size, size), mode=mode)


# ----------------------------------------------------------------------------------------------------------------------
# Files: written whole or not at all. What can't be read or written raises OSError, which becomes one line


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file such that at every moment, whatever happens, it is either the old one or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
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


def prepare_output(output_dir: Path, keep: bool) -> None:
    """Make the output folder; what an earlier training left in it is moved to a folder of its own, unless `keep`."""
    names = ["log.csv", "checkpoint.pt", "refinement.gif", "results.md", "results.json", "diversity.png"]
    names += ["comparison.png", *(f"{name}-[0-9]*.png" for name in ("hr", "lr", "sr", "refinement"))]
    output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(output_dir / ".probe", bytes(4096))  # a full disk shows before anything is moved
    (output_dir / ".probe").unlink()
    earlier = [path for name in names for path in output_dir.glob(name)]
    if earlier and not keep:
        folder = next(f for i in itertools.count(1) if not (f := output_dir / f"earlier-{i}").exists())
        folder.mkdir()
        for path in earlier:  # log.csv first, which may be open in a spreadsheet
            path.rename(folder / path.name)
        print(f"the results of an earlier run are now in {folder}")


def save_log(path: Path, columns: list[str], rows: list[dict]) -> None:
    """Write the log as CSV: a header, then the rows; what a row lacks stays empty.

    One that can't be written, such as one that is open in a spreadsheet, is only warned of: the next row tries again.
    """
    cells = [[row.get(name, "") for name in columns] for row in rows]
    lines = [",".join(f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in line) for line in cells]
    try:
        write_atomically(path, "\n".join([",".join(columns), *lines, ""]).encode())
    except OSError as error:
        print(f"\n{path} can't be written: {error.strerror}; going on", file=sys.stderr)


def picture_of(images: Tensor, columns: int, scale: int) -> Image.Image:
    """[N, C, H, W] in [0, 1] as one picture with so many images in a row, each pixel a square of scale × scale."""
    grid = make_grid(images.cpu(), nrow=columns, padding=2, pad_value=0.5)
    picture = TF.to_pil_image((255 * grid).round().byte())  # rows · (H + 2) + 2 by columns · (W + 2) + 2 pixels
    return picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)


def save_grid(path: Path, images: Tensor, columns: int, description: str, scale: int = 1) -> None:
    """Write [N, C, H, W] in [0, 1] as a PNG, laid out by `picture_of`; `description` goes into its EXIF data."""
    picture, buffer = picture_of(images, columns, scale), io.BytesIO()
    exif = picture.getexif()
    exif[0x010E] = description  # ImageDescription
    picture.save(buffer, format="png", exif=exif)
    write_atomically(path, buffer.getvalue())


def save_animation(path: Path, frames: list[Tensor], columns: int) -> None:
    """Write grids, each [N, C, H, W] in [0, 1], as a GIF of twice their size that loops and pauses at its end."""
    mode = "L" if frames[0].shape[1] == 1 else "RGB"  # grey is exact in a GIF; colours become a palette
    first, *others = [picture_of(frame, columns, scale=2).convert(mode) for frame in frames]
    buffer, milliseconds = io.BytesIO(), [120] * len(others) + [3000]
    first.save(buffer, format="gif", save_all=True, append_images=others, duration=milliseconds, loop=0)
    write_atomically(path, buffer.getvalue())


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write nested dictionaries of tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getvalue())


WEIGHTS = {"config": dict, "step": int, "ema": dict}  # what drawing needs of a checkpoint
TRAINING = WEIGHTS | {"log": list, "model": dict, "optimizer": dict, "scaler": dict}  # what resuming needs


def load_checkpoint(path: str | Path, parts: dict[str, type] = WEIGHTS) -> dict:
    """What `save_checkpoint` wrote, on the CPU. Raises InputError where it is something else, or a part is missing."""
    try:
        checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))
        for name, kind in parts.items():
            if not isinstance(checkpoint[name], kind):
                raise TypeError
        return {name: checkpoint[name] for name in parts}
    except Exception as error:  # what a damaged file raises depends on where the damage is
        if isinstance(error, OSError) or out_of_memory(error):
            raise
        reason = f"it is something else, cut off, or lacks one of {', '.join(parts)} ({type(error).__name__})"
        raise InputError(f"{path} is no checkpoint of this lesson: {reason}; give another") from None
