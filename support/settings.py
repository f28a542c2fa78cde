"""The settings of a run: configs/mnist.toml lists and explains them, and each is a flag of train_mnist.py.

To add a setting, add a line to mnist.toml: its value there is its default and its type, its comment is its --help.
"""

import argparse
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

from support.errors import InputError, Parser

HERE = Path(__file__).resolve().parent.parent  # the lesson's folder
MNIST = HERE / "configs/mnist.toml"
CHOICES = {
    "method": ("sr3", "regression"),
    "dataset": ("mnist", "fashion_mnist", "cifar10", "folder", "digits"),
    "loss_weight": ("1/gamma", "1"),
    "precision": ("auto", "float32", "bfloat16"),
}
ZERO_ALLOWED = ("dropout", "warmup_steps", "seed")  # all other numbers are positive


def read_toml(path: str | Path) -> dict:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:  # also of a file that is no text
        raise InputError(f"{path} is not valid TOML: {error}") from None


DEFAULTS = read_toml(MNIST)
FIXED = list(DEFAULTS)[: list(DEFAULTS).index("sampling_steps")]  # a resumed run's data, network and diffusion


def positive(text: str) -> int:
    """Reads a whole number above 0, for argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def add_settings(parser: Parser) -> None:
    """Adds every setting as a flag, explained by its comment in mnist.toml. What is not given is left out."""
    parser.add_argument("--config_path", help="a file of settings that differ from configs/mnist.toml")
    comments = dict(re.findall(r"^(\w+) = .*?# (.*)$", MNIST.read_text(encoding="utf-8"), re.MULTILINE))
    for name, default in DEFAULTS.items():
        options = {"type": type(default), "choices": CHOICES.get(name), "default": argparse.SUPPRESS}
        if isinstance(default, list):
            options |= {"type": int, "nargs": "*"}
        parser.add_argument(f"--{name}", help=f"{comments.get(name)}; default: {default}".replace("%", "%%"), **options)


def parse_settings(flags: argparse.Namespace, resumed: dict | None = None) -> SimpleNamespace:
    """All settings of a run: mnist.toml's, then a resumed run's, those of --config_path, the flags; later ones win.

    Raises InputError where `check` does, and for what a resumed run can't change.
    """
    before = DEFAULTS | (resumed or {})
    lines = read_toml(flags.config_path) if flags.config_path else {}
    given = {name: value for name, value in vars(flags).items() if name in DEFAULTS}
    config = check(before | lines | given)
    for name in FIXED if resumed else ():
        if getattr(config, name) != before[name]:
            change = f"{name} is {getattr(config, name)}, in the checkpoint {before[name]}"
            raise InputError(f"{change}: a resumed run can't change it")
    return config


def check(settings: dict) -> SimpleNamespace:
    """The settings as attributes. Raises InputError for one that is unknown, of the wrong type, or out of range."""
    for name, value in settings.items():
        if name not in DEFAULTS:
            raise InputError(f"{name} is not a setting; the settings are {', '.join(DEFAULTS)}")
        kind = type(DEFAULTS[name])
        items = value if kind is list else [value]
        number = int if kind is list else kind
        if type(value) is not kind or any(type(item) is not number for item in items):
            raise InputError(f"{name} is {value!r}: write it like {DEFAULTS[name]!r}")
        if value not in CHOICES.get(name, [value]):
            raise InputError(f"{name} is {value!r}: it must be one of {', '.join(CHOICES[name])}")
        if number is not str and not all(0 <= item < 2**31 and (item or name in ZERO_ALLOWED) for item in items):
            raise InputError(f"{name} is {value}: it must be above 0 ({', '.join(ZERO_ALLOWED)}: or 0) and below 2^31")
    config = SimpleNamespace(**settings)
    for name, fits, rule in (
        ("image_size", config.image_size >= 11, "at least 11, the size of SSIM's window"),
        ("low_res_size", config.low_res_size < config.image_size, "less than image_size"),
        ("channels", config.channels in (1, 3), "1 (grey) or 3 (colour)"),
        ("dropout", config.dropout < 1, "less than 1"),
        ("sampling_steps", config.sampling_steps <= config.num_timesteps, "at most num_timesteps"),
    ):
        if not fits:
            raise InputError(f"{name} is {settings[name]}: it must be {rule}")
    return config
