"""What the lesson needs beside the method: settings, data sets, bicubic resampling, picture grids and safe files."""

import difflib
import functools
import io
import itertools
import math
import os
import socket
import sys
import tomllib
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import functional as TF
from torchvision.utils import make_grid


class InputError(Exception):
    """Bad input, as one line for the user: what was wrong, the value, what to do. The script exits with status 2."""


class DatasetUnavailable(InputError):
    """A data set is neither on disk nor downloadable."""


# ----------------------------------------------------------------------------------------------------------------------
# Settings: the keys of configs/*.toml, where each is explained, with their types and what values they may take


def between(low, high):
    """A number, or each number of a list, that must be in [low, high]."""
    return field(metadata={"allowed": lambda value: low <= value <= high, "hint": f"from {low:,} to {high:,}"})


def one_of(*choices: str):
    return field(metadata={"allowed": choices.__contains__, "hint": "one of " + ", ".join(map(repr, choices))})


@dataclass
class DataConfig:
    dataset: str = one_of("mnist", "fashion_mnist", "cifar10", "folder", "digits")
    fallback: str = one_of("digits", "")
    image_size: int = between(16, 1024)
    low_res_size: int = between(1, 1023)
    channels: int = between(1, 3)


@dataclass
class ModelConfig:
    features: int = between(8, 1024)
    channel_multipliers: list[int] = between(1, 64)
    blocks_per_level: int = between(1, 16)
    attention_resolutions: list[int] = between(1, 1024)
    attention_heads: int = between(1, 64)
    dropout: float = between(0, 0.9)


@dataclass
class DiffusionConfig:
    num_timesteps: int = between(1, 100_000)
    beta_start: float = between(1e-7, 0.999)
    beta_end: float = between(1e-7, 0.999)


@dataclass
class SamplingConfig:
    steps: int = between(1, 100_000)
    variance: str = one_of("posterior", "forward")


@dataclass
class TrainingConfig:
    num_training_steps: int = between(1, 10**9)
    batch_size: int = between(1, 10**6)
    learning_rate: float = between(1e-9, 1)
    warmup_steps: int = between(0, 10**9)
    max_grad_norm: float = between(1e-6, 1e6)
    ema_decay: float = between(0, 0.999999)
    sample_every: int = between(1, 10**9)
    early_samples: list[int] = between(1, 10**9)
    precision: str = one_of("auto", "float32", "bfloat16", "float16")
    seed: int = between(0, 2**31 - 1)


@dataclass
class EvaluationConfig:
    num_images: int = between(0, 10**6)
    regression_checkpoint: str = field(metadata={"allowed": lambda _: True})


@dataclass
class Config:
    data: DataConfig
    model: ModelConfig
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    method: str = one_of("sr3", "regression")


def load_config(path: str | Path, **training: int | None) -> Config:
    """Read a config file; keyword arguments that are not None replace settings of its [training] section.

    Raises InputError for a file that is missing or is no TOML, a key that is unknown or missing, a value of the wrong
    type or out of range, and settings that don't go together.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"config {path} can't be read: {error.strerror}; give an existing file by --config_path"
        ) from None
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(f"config {path} is not valid TOML: {error}") from None
    if isinstance(values.get("training"), dict):
        values["training"] |= {key: value for key, value in training.items() if value is not None}
    return parse_config(values, path)


def parse_config(values: dict, source: str | Path) -> Config:
    """Turn nested dictionaries into a Config; errors as `load_config`, naming `source`."""
    config = parse_section(Config, values, f"{source}: ")
    data, model, steps = config.data, config.model, config.sampling.steps
    if data.channels == 2:
        raise InputError(f"{source}: data.channels is 2: it must be 1 (grey) or 3 (colour)")
    if data.low_res_size >= data.image_size:
        raise InputError(
            f"{source}: data.low_res_size is {data.low_res_size}: it must be smaller than image_size, {data.image_size}"
        )
    if not model.channel_multipliers:
        raise InputError(f"{source}: model.channel_multipliers is []: give one number for each level of the U-Net")
    divisor = 2 ** (len(model.channel_multipliers) - 1)
    if data.image_size % divisor:
        raise InputError(
            f"{source}: data.image_size is {data.image_size}: the U-Net's {len(model.channel_multipliers)} levels "
            f"need a multiple of {divisor}"
        )
    if model.features % 8 or model.features % model.attention_heads:
        raise InputError(
            f"{source}: model.features is {model.features}: it must be a multiple of 8 and of attention_heads, "
            f"{model.attention_heads}"
        )
    if steps > config.diffusion.num_timesteps:
        raise InputError(
            f"{source}: sampling.steps is {steps}: it must be at most num_timesteps, {config.diffusion.num_timesteps}"
        )
    return config


def parse_section(section: type, values: dict, where: str):
    """Make a dataclass of a dictionary, checking keys, types and ranges; `where` opens its error lines."""
    known = {f.name: f for f in fields(section)}
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise InputError(f"{where}{key} is not a setting; did you mean {nearest}?")
    settings = {}
    for name, setting in known.items():
        if name not in values:
            raise InputError(f"{where}{name} is missing; add it, see configs/mnist.toml")
        value, kind = values[name], setting.type
        if is_dataclass(kind):
            if not isinstance(value, dict):
                raise InputError(f"{where}{name} is {value!r}: it must be a section, [{name}]")
            settings[name] = parse_section(kind, value, f"{where}{name}.")
            continue
        if kind is float and type(value) is int:
            value = float(value)
        items, item_kind = (value, int) if type(value) is list and kind == list[int] else ([value], kind)
        if any(type(item) is not item_kind for item in items):
            raise InputError(f"{where}{name} is {value!r}: it must be of type {kind.__name__}")
        if not all(map(setting.metadata["allowed"], items)):
            raise InputError(f"{where}{name} is {value!r}: it must be {setting.metadata['hint']}")
        settings[name] = value
    return section(**settings)


# ----------------------------------------------------------------------------------------------------------------------
# Data sets: all of them become uint8 [N, C, S, S], which is small enough to lie in the device's memory as a whole


def load_images(dataset: str, data_dir: str | Path, train: bool, image_size: int, channels: int) -> Tensor:
    """The images of `load_data_set`, without labels."""
    return load_data_set(dataset, data_dir, train, image_size, channels)[0]


def load_data_set(
    dataset: str, data_dir: str | Path, train: bool, image_size: int, channels: int
) -> tuple[Tensor, Tensor | None]:
    """A data set's training or test images, uint8 [N, channels, image_size, image_size] in 0…255, and their labels.

    "mnist", "fashion_mnist" and "cifar10" are read from `data_dir`, downloaded into it first where they are missing;
    "folder" is all images below `data_dir`, every tenth of them for testing; "digits" is drawn. Resizing is bilinear
    and antialiased. Labels are int64 [N] from 0; a folder has None. Raises DatasetUnavailable without files and
    network, InputError for files that are damaged.
    """
    labels = None
    if dataset == "digits":
        return draw_digits(60_000 if train else 10_000, image_size, channels, seed=0 if train else 1)
    if dataset == "folder":
        images = load_folder(Path(data_dir), image_size)
        is_test = torch.arange(len(images)) % 10 == 0
        images = images[is_test != train] if len(images) > 1 else images
    else:
        images, labels = load_torchvision(dataset, Path(data_dir), train)
        images = F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)
    if channels == 1 and images.shape[1] == 3:
        images = torch.cat([TF.rgb_to_grayscale(part.float()).round().byte() for part in images.split(1000)])
    return images.expand(-1, channels, -1, -1).contiguous(), labels


def load_torchvision(dataset: str, data_dir: Path, train: bool) -> tuple[Tensor, Tensor]:
    """uint8 [N, C, H, W] of MNIST, Fashion-MNIST or CIFAR-10 in their own size, int64 [N]; errors as `load_images`."""
    names = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
    kind = getattr(torchvision.datasets, names[dataset])
    if dataset == "cifar10":
        folder, archives = data_dir, [(kind.filename, kind.tgz_md5)]
    else:
        folder, archives = data_dir / names[dataset] / "raw", kind.resources
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{error.strerror}; give another --data_dir"
        raise InputError(f"data folder {folder} can't be written: {reason}") from None
    for name, md5 in archives:
        if (folder / name).exists() and not check_integrity(folder / name, md5):
            raise InputError(f"{folder / name} is damaged (its MD5 is not {md5}); delete or replace it")
    try:
        data = kind(data_dir, train=train)
    except Exception as error:
        if not str(error).startswith("Dataset not found"):
            reason = str(error) or type(error).__name__
            raise InputError(f"{dataset} in {folder} is damaged ({reason}); delete it and run again") from None
        socket.setdefaulttimeout(30)  # seconds: a server that doesn't answer must not hang the lesson
        try:
            data = kind(data_dir, train=train, download=True)
        except PermissionError as error:
            reason = f"{error.strerror}; copy it to a folder of your own for --data_dir"
            raise InputError(f"{dataset} can't be unpacked into {folder}: {reason}") from None
        except (RuntimeError, OSError, HTTPException) as error:
            files = ", ".join(name for name, _ in archives)
            reason = " ".join(str(error).split())
            raise DatasetUnavailable(
                f"{dataset} could not be downloaded ({reason}); put {files} into {folder.resolve()}"
            ) from None
    images = torch.as_tensor(data.data)  # [N, H, W], or [N, H, W, 3] from CIFAR-10
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images, torch.as_tensor(data.targets)


@functools.cache
def load_folder(folder: Path, image_size: int) -> Tensor:
    """All images below a folder, centre-cropped to squares and resized: uint8 [N, 3, image_size, image_size].

    Files that can't be read are named on stderr and left out. Raises InputError where no image remains.
    """
    images = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS):
        try:
            image = TF.pil_to_tensor(default_loader(str(path)))  # [3, height, width]
        except Exception as error:  # a damaged picture can raise almost anything
            print(f"skipping {path}: {error}", file=sys.stderr)
            continue
        square = TF.center_crop(image, min(image.shape[1:]))
        images.append(TF.resize(square, [image_size, image_size], antialias=True))
    if not images:
        raise InputError(f"no readable image ({', '.join(IMG_EXTENSIONS)}) below {folder}; give another --data_dir")
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
DOTS = 96  # a digit is drawn as so many round dots, which lie closer together than the pen is wide
WAVES = 3  # and bent by so many random waves
# What differs from image to image, each evenly spread between two limits. Lengths are fractions of the image side.
JITTER = {
    "label": (0, 10), "style": (0, 3),
    "width": (0.65, 1.15), "slant": (-0.1, 0.5), "turn": (-0.15, 0.15),
    "size": (0.53, 0.61), "right": (-0.02, 0.02), "down": (-0.02, 0.02),
    "pen": (0.032, 0.064), "edge": (1.0, 1.6), "ink": (0.85, 1.0),  # radius, blur in pixels, brightness
    "hue": (0, 1), "ground": (0.25, 0.5), "second": (0.5, 0.75), "light": (0.1, 0.35), "sun": (0, 2 * math.pi),
}  # fmt: skip


def trace(strokes: str) -> Tensor:
    """Lay dots at equal distances along the strokes: float [DOTS, 2], (x, y) in about 0..1."""
    points = [torch.tensor([[int(x), int(y)] for x, y in stroke.split()]) / 9 for stroke in strokes.split("|")]
    curves = [F.interpolate(p[None, None], (50 * len(p), 2), mode="bicubic", align_corners=True) for p in points]
    curve = torch.cat(curves, dim=2)[0, 0]  # [many, 2], smooth
    step = curve.diff(dim=0).norm(dim=1)
    length = step.where(step < 0.05, 0).cumsum(0)  # a jump of the lifted pen leaves no ink
    return curve[torch.searchsorted(length, torch.linspace(0, length[-1].item(), DOTS))]


def colour(hue: Tensor) -> Tensor:
    """The fully saturated colour of a hue that goes round once from 0 to 1: [B, 1, 1] -> [B, 3, 1, 1]."""
    return (((hue[:, None] + torch.tensor([0, 2, 1]).view(3, 1, 1) / 3) % 1 * 6 - 3).abs() - 1).clamp(0, 1)


def render(uniform: Tensor, traces: Tensor, image_size: int, channels: int) -> tuple[Tensor, Tensor]:
    """Draw one image for each row of random numbers, float [B, P] in 0..1."""
    columns = uniform[:, :, None, None].unbind(1)  # each [B, 1, 1]
    jitter = {name: low + (high - low) * u for (name, (low, high)), u in zip(JITTER.items(), columns)}
    labels, styles = jitter["label"].long().flatten(), jitter["style"].long().flatten()
    x, y = traces[labels, styles].mT.split(1, dim=1)  # [B, 1, DOTS] each
    # A smooth bend moves neighbouring dots alike, so strokes that meet still meet.
    waves = 2 * uniform[:, len(JITTER) :].view(-1, 5, WAVES, 1) - 1
    push_x, push_y, along_x, along_y, phase = waves.unbind(1)  # [B, WAVES, 1] each
    bend = 0.06 * torch.sin(math.pi * (1.7 * along_x * x + 1.7 * along_y * y + phase))  # [B, WAVES, DOTS]
    x, y = x + (push_x * bend).sum(1, keepdim=True), y + (push_y * bend).sum(1, keepdim=True)
    x = jitter["width"] * x - jitter["slant"] * y
    cos, sin = jitter["turn"].cos(), jitter["turn"].sin()
    x, y = cos * x - sin * y, sin * x + cos * y

    # As in MNIST, the digit fits into a box and its centre of mass lies in the middle of the image.
    extent = torch.maximum(x.amax(2, True) - x.amin(2, True), y.amax(2, True) - y.amin(2, True))  # [B, 1, 1]
    x = (x - x.mean(2, True)) / extent * jitter["size"] + 0.5 + jitter["right"]
    y = (y - y.mean(2, True)) / extent * jitter["size"] + 0.5 + jitter["down"]

    # The ink of a pixel depends on its distance to the nearest dot; dot by dot needs little memory.
    pixel = (torch.arange(image_size) + 0.5) / image_size
    across, down = (pixel - x.mT).square(), (pixel - y.mT).square()  # [B, DOTS, S] each
    nearest = torch.full((len(uniform), image_size, image_size), math.inf)
    for dot in range(DOTS):
        nearest = torch.minimum(nearest, across[:, dot, None, :] + down[:, dot, :, None])
    ink = (jitter["pen"] - nearest.sqrt()) * image_size / jitter["edge"] + 0.5  # [B, S, S]
    images = (ink.clamp(0, 1) * jitter["ink"])[:, None]  # [B, 1, S, S]

    if channels == 3:  # a bright pen on a dark ground that fades from one colour to another
        hue, light = jitter["hue"], jitter["light"][:, None]
        first, second = light * colour(hue + jitter["ground"]), light * colour(hue + jitter["second"])
        fade = jitter["sun"].cos() * (pixel - 0.5) + jitter["sun"].sin() * (pixel[:, None] - 0.5)  # [B, S, S]
        ground = first + (second - first) * (0.5 + 0.7 * fade[:, None])
        images = ground + images * (0.25 + 0.75 * colour(hue) - ground)  # [B, 3, S, S]
    return (images * 255).round().to(torch.uint8), labels


def draw_digits(num_images: int, image_size: int = 32, channels: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw digits that look handwritten, for when MNIST can't be downloaded (our own drawing, no data needed).

    Returns images, uint8 [N, channels, image_size, image_size] in 0..255, and labels, int64 [N] in 0..9. One channel
    is a white pen on black; three are a coloured pen on a dark coloured ground. Image i depends on the seed, the
    size, the channels and i only; its shape and label don't depend on the channels.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num_images, len(JITTER) + 5 * WAVES, generator=generator)  # row i belongs to image i
    traces = torch.stack([trace(style) for styles in STROKES for style in styles]).view(10, 3, DOTS, 2)
    chunks = uniform.split(max(1, 2**17 // image_size**2))  # few at a time stay in the cache
    images, labels = zip(*(render(chunk, traces, image_size, channels) for chunk in chunks))
    return torch.cat(images), torch.cat(labels)


# ----------------------------------------------------------------------------------------------------------------------
# Bicubic resampling: how the low-resolution image is made, and from it the context x (the latter: section 2.4)


def to_float(images: Tensor) -> Tensor:
    """uint8 images in 0…255 as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_unit(images: Tensor) -> Tensor:
    """Images in [-1, 1] as pictures and metrics want them, in [0, 1]; what lies outside is clamped."""
    return (images.clamp(-1, 1) + 1) / 2


def downsample(images: Tensor, size: int) -> Tensor:
    """Shrink [B, C, H, W] in [-1, 1] to [B, C, size, size] bicubically, with antialiasing, clamped to [-1, 1].

    Bicubic weights are partly negative and overshoot at edges, but a low-resolution image is an image.
    """
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def upsample(images: Tensor, size: int) -> Tensor:
    """Enlarge [B, C, h, w] to [B, C, size, size] bicubically: the context x, which overshoots a little at edges."""
    return F.interpolate(images, (size, size), mode="bicubic")


# ----------------------------------------------------------------------------------------------------------------------
# Files: written whole or not at all


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file such that at every moment, whatever happens, it is either the old one or the new one, whole.

    Raises InputError where it can't be written.
    """
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
        reason = f"{error.strerror}; make room there, or give another --output_dir"
        raise InputError(f"{path} can't be written: {reason}") from None


def prepare_output(output_dir: Path, keep: bool) -> None:
    """Make the output folder; what an earlier run left in it is moved to a folder of its own, unless `keep`."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(output_dir / ".probe", bytes(4096))  # a full disk shows before anything is moved
        (output_dir / ".probe").unlink()
        names = (
            "checkpoint.pt",
            "log.csv",
            "results.*",
            "diversity.png",
            *(f"{name}-[0-9]*.png" for name in ("hr", "lr", "sr", "refinement")),
        )
        earlier = [path for name in names for path in output_dir.glob(name)]
        if earlier and not keep:
            folder = next(f for i in itertools.count(1) if not (f := output_dir / f"earlier-{i}").exists())
            folder.mkdir()
            for path in earlier:
                path.rename(folder / path.name)
            print(f"the results of an earlier run are now in {folder}")
    except OSError as error:
        reason = f"{error.strerror}; give another --output_dir"
        raise InputError(f"output folder {output_dir} can't be written: {reason}") from None


def save_log(path: Path, columns: str, rows: list[list]) -> None:
    """Write the log as CSV: a header, then the rows; numbers with six digits, what a row lacks stays empty."""
    width = columns.count(",") + 1
    lines = [[f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [",".join(line + [""] * (width - len(line))) for line in lines]
    write_atomically(path, "\n".join([columns, *lines, ""]).encode())


def save_grid(path: Path, images: Tensor, columns: int, description: str) -> None:
    """Write [N, C, H, W] in [0, 1] as a PNG with so many images in a row; `description` goes into its EXIF data."""
    grid = make_grid(images.cpu(), nrow=columns, padding=2, pad_value=0.5)
    picture = TF.to_pil_image((255 * grid).round().byte())  # [3, rows · (H + 2) + 2, columns · (W + 2) + 2]
    exif = picture.getexif()
    exif[0x010E] = description  # ImageDescription
    buffer = io.BytesIO()
    picture.save(buffer, format="png", exif=exif)
    write_atomically(path, buffer.getvalue())


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: str | Path) -> dict:
    """The dictionary that `save_checkpoint` wrote, on the CPU. Raises InputError where it is missing or damaged."""
    if not Path(path).is_file():
        raise InputError(f"there is no checkpoint {path}; give the path of one, or to resume, its --output_dir")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"config", "dataset", "step", "log", "model", "ema", "optimizer", "scaler"} - set(checkpoint)
        if missing:
            raise KeyError(*missing)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        reason = f"is no checkpoint of this lesson, or is cut off ({type(error).__name__}); delete it"
        raise InputError(f"{path} {reason}") from None
    return checkpoint


def check_same_run(checkpoint: dict, config: Config, dataset: str) -> None:
    """Raises InputError where a checkpoint is of another data set or method, or has another network or diffusion."""
    if checkpoint["dataset"] != dataset:
        reason = f"this run would use {dataset}; set data.dataset to what it was, or leave out --resume"
        raise InputError(f"the checkpoint is of a run on {checkpoint['dataset']}, {reason}")
    old, new = checkpoint["config"], asdict(config)
    if old.get("method") != config.method:
        raise InputError(
            f"method is {config.method}, in the checkpoint it is {old.get('method')}; to resume, set it back"
        )
    for section, key in [(s, key) for s in ("data", "model", "diffusion") for key in new[s]]:
        before, now = old[section].get(key), new[section][key]
        if before != now and key not in ("dataset", "fallback"):
            raise InputError(f"{section}.{key} is {now}, in the checkpoint it is {before}; to resume, set it back")
