"""The settings of a run: configs/mnist.toml lists and explains them, and each is a flag of train_mnist.py.

A config's lines and a resumed run's settings are read as flags that stand before those of the command line, so that
argparse checks the names, types and choices of all three. To add a setting, add a line to mnist.toml.
"""

import argparse
import math
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from support.errors import InputError, Parser, end

HERE = Path(__file__).resolve().parent.parent  # the lesson's folder
KINDS = {  # what each setting is: one of some words, a number, or [numbers]; one that is not here is as its default
    "method": ("sr3", "regression"), "dataset": ("mnist", "fashion_mnist", "cifar10", "folder", "digits"),
    "image_size": int, "low_res_size": int, "channels": int,
    "features": int, "channel_multipliers": [int], "blocks_per_level": int, "attention_resolutions": [int],
    "attention_heads": int, "dropout": float,
    "num_timesteps": int, "beta_start": float, "beta_end": float, "loss_weight": ("1/gamma", "1"),
    "sampling_steps": int, "num_training_steps": int, "batch_size": int, "learning_rate": float, "warmup_steps": int,
    "max_grad_norm": float, "sample_every": int, "early_samples": [int],
    "precision": ("auto", "float32", "bfloat16"), "seed": int,
}  # fmt: skip
ZERO_ALLOWED = ("dropout", "warmup_steps", "seed")  # all other numbers are positive
FIXED = (  # what a resumed run can't change: the data, the network and the diffusion
    "method", "dataset", "image_size", "low_res_size", "channels", "features", "channel_multipliers",
    "blocks_per_level", "attention_resolutions", "attention_heads", "dropout", "num_timesteps", "beta_start",
    "beta_end", "loss_weight",
)  # fmt: skip


def read_toml(path: str | Path) -> dict:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(f"{path} is not valid TOML: {error}") from None


try:
    DEFAULTS = read_toml(HERE / "configs/mnist.toml")
except (InputError, OSError) as error:
    end(error)
SETTINGS = list(KINDS | DEFAULTS)


def number_reader(kind: type, zero_allowed: bool) -> Callable[[str], int | float]:
    """Reads a number for argparse: whole if `kind` is int, positive or, where that is allowed, zero."""
    wanted = "a whole number" if kind is int else "a number"
    wanted += f" from 0 to {2**31 - 1:,}" if zero_allowed else f" above 0, at most {2**31 - 1:,}"

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (0 <= value < 2**31) or (value == 0 and not zero_allowed):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return read


def read_truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def add_settings(parser: Parser) -> None:
    """Every setting as a flag, explained by its comment in mnist.toml. What is not given is left out."""
    parser.add_argument("--config_path", help="a file of settings that differ from configs/mnist.toml")
    toml = (HERE / "configs/mnist.toml").read_text(encoding="utf-8-sig")
    for name in SETTINGS:
        default = DEFAULTS.get(name)
        kind = KINDS.get(name, [type(item) for item in default] if isinstance(default, list) else type(default))
        comment = re.search(rf'^{name} *= *(?:"[^"]*"|[^"#\n]*) *# *(.*)$', toml, re.MULTILINE)
        explanation = f"{comment[1]}; default: {default}" if comment else f"default: {default}"
        options = {"default": argparse.SUPPRESS, "help": explanation.replace("%", "%%")}
        if isinstance(kind, list):
            options["nargs"] = "*"
            kind = kind[0] if kind else str
        if isinstance(kind, tuple):
            options["choices"] = kind
        elif kind is bool:
            options["type"] = read_truth
        elif kind in (int, float):
            options["type"] = number_reader(kind, name in ZERO_ALLOWED or name not in KINDS)
            options["metavar"] = "N" if kind is int else "X"
        else:
            options["type"] = str.strip
        try:
            parser.add_argument(f"--{name}", **options)
        except argparse.ArgumentError:
            raise InputError(f"configs/mnist.toml: {name} is a flag, but no setting; delete the line") from None


def as_flags(settings: dict) -> list[str]:
    """Settings as the command line has them, such as --features=16 --early_samples 50 100."""
    flags = []
    for name, value in settings.items():
        if isinstance(KINDS.get(name, DEFAULTS.get(name)), list):
            items = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *(f" {item}" for item in items)]  # with a blank no word is taken for a flag
        else:
            flags.append(f"--{name}={value}")
    return flags


def read_settings(parser: Parser, sources: list[tuple[str, dict]], arguments: list[str]) -> SimpleNamespace:
    """The settings of all sources, then the arguments: later ones win. Raises InputError for what is wrong."""
    found = argparse.Namespace()
    for source, settings in sources:
        unknown = [name for name in settings if name not in SETTINGS]
        if unknown:
            raise InputError(f"{source}: {unknown[0]} is not a setting; the settings are {', '.join(SETTINGS)}")
        try:
            parser.parse_args(as_flags(settings), found)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
    parser.parse_args(arguments, found)
    missing = [name for name in SETTINGS if not hasattr(found, name)]
    if missing:
        raise InputError(f"configs/mnist.toml has no line for {', '.join(missing)}; add it again, or give it as a flag")
    return SimpleNamespace(**{name: getattr(found, name) for name in SETTINGS})


def parse_settings(parser: Parser, arguments: list[str] | None, resumed: dict | None = None) -> SimpleNamespace:
    """All settings of a run: mnist.toml's or a resumed run's, then those of --config_path, then the flags.

    Raises InputError for what is wrong, and for what a resumed run can't change.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    sources = [("configs/mnist.toml", DEFAULTS)]
    if resumed is not None:
        resumed = vars(complete_settings(resumed, "the checkpoint"))
        sources.append(("the checkpoint", resumed))
    path = parser.parse_args(arguments).config_path
    if path:
        sources.append((str(path), read_toml(path)))
    config = read_settings(parser, sources, arguments)
    for name in FIXED if resumed is not None else ():
        new, old = getattr(config, name), resumed[name]
        if new != old:
            raise InputError(f"{name} is {new}, in the checkpoint it is {old}: a resumed run can't change it")
    check_together(config)
    return config


def complete_settings(settings: dict | None = None, source: str | Path = "the settings") -> SimpleNamespace:
    """A checkpoint's settings: those that it lacks are mnist.toml's, unknown ones are passed over with a line."""
    if not isinstance(settings, dict | None):
        raise InputError(f"{source} is no checkpoint of this lesson: its config is no list of settings; give another")
    known = {}
    for name, value in (settings or {}).items():
        if name in SETTINGS:
            known[name] = value
        else:
            print(f"{source}: the setting {name} = {value!r} is unknown here and passed over", file=sys.stderr)
    parser = Parser("")
    add_settings(parser)
    config = read_settings(parser, [("configs/mnist.toml", DEFAULTS), (str(source), known)], [])
    check_together(config)
    return config


def check_together(config: SimpleNamespace) -> None:
    """Raises InputError, which says what to give instead, for settings that don't go together."""
    multipliers, heads = config.channel_multipliers, config.attention_heads
    sizes = [config.image_size // 2**i for i in range(len(multipliers))]  # resolution of each scale of the U-Net
    if config.low_res_size >= config.image_size:
        raise InputError(f"low_res_size is {config.low_res_size}: it must be less than image_size, {config.image_size}")
    if config.sampling_steps > config.num_timesteps:
        limit = f"it must be at most num_timesteps, {config.num_timesteps}"
        raise InputError(f"sampling_steps is {config.sampling_steps}: {limit}")
    if config.channels not in (1, 3):
        raise InputError(f"channels is {config.channels}: it must be 1 (grey) or 3 (colour)")
    if not sizes or config.image_size % 2 ** (len(sizes) - 1):
        hint = "give one number for each scale, each at half the size of the scale above"
        raise InputError(f"image_size {config.image_size} and channel_multipliers {multipliers}: {hint}")
    if config.features % 8 or config.features % heads:  # 8 groups in each norm of the U-Net
        raise InputError(f"features is {config.features}: it must be a multiple of 8 and of attention_heads, {heads}")
    if not set(config.attention_resolutions) <= set(sizes):
        raise InputError(f"attention_resolutions is {config.attention_resolutions}: the scales have {sizes}")
    if config.dropout >= 1:
        raise InputError(f"dropout is {config.dropout}: it must be less than 1")
