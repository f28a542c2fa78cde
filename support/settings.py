"""The settings of a run: configs/mnist.toml lists and explains them, and each is a flag of train_mnist.py.

To add a setting, add a line to mnist.toml: its value there is its default and its type (a number, a text or a list of
whole numbers), its comment is its --help. CHOICES and ABOVE, below, say which values it may have.
"""

import re
import tomllib
from argparse import SUPPRESS
from pathlib import Path
from types import SimpleNamespace

from support.errors import InputError

HERE = Path(__file__).resolve().parent.parent  # the lesson's folder
MNIST = HERE / "configs/mnist.toml"
CHOICES = {  # support/data.py has those of dataset
    "method": ("sr3", "regression"),
    "channels": (1, 3),
    "loss_weight": ("1/gamma", "1"),
    "precision": ("auto", "float32", "bfloat16"),
}
# Other numbers must be above 0. For image_size it is 10, as SSIM's window is 11 pixels wide.
ABOVE = {"image_size": 10, "dropout": -1e-9, "warmup_steps": -1, "seed": -1}


def read_toml(path):
    try:
        return tomllib.loads(Path(path).read_text("utf-8-sig"))
    except ValueError as error:  # also of a file that is no text
        raise InputError(f"{path} is not valid TOML: {error}") from None


DEFAULTS = read_toml(MNIST)
FIXED = list(DEFAULTS)[: list(DEFAULTS).index("sampling_steps")]  # a resumed run's data, network and diffusion


def positive(text):
    """Reads a whole number above 0, for argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def add_settings(parser):
    """Adds every setting as a flag, explained by its comment in mnist.toml. What is not given is left out."""
    parser.add_argument("--config_path", help="a file of settings that differ from configs/mnist.toml")
    comments = dict(re.findall(r"^(\w+) = .*?# (.*)$", MNIST.read_text("utf-8"), re.MULTILINE))
    for name, default in DEFAULTS.items():
        options = {"type": int, "nargs": "*"} if isinstance(default, list) else {"type": type(default)}
        about = f"{comments.get(name)}; default: {default}".replace("%", "%%")
        parser.add_argument(f"--{name}", help=about, default=SUPPRESS, **options)


def parse_settings(flags, resumed=None):
    """All settings of a run: mnist.toml's, then a resumed run's, those of --config_path, the flags; later ones win.

    Raises InputError where `check` does, and for what a resumed run can't change.
    """
    before = DEFAULTS | (resumed or {})
    lines = read_toml(flags.config_path) if flags.config_path else {}
    settings = before | lines | {name: value for name, value in vars(flags).items() if name in DEFAULTS}
    for name in FIXED if resumed else ():
        if settings[name] != before[name]:
            raise InputError(f"{name} is {settings[name]!r}: a resumed run can't change it from {before[name]!r}")
    return check(settings)


def check(settings):
    """The settings as attributes. Raises InputError for one that is unknown, of the wrong type, or out of range."""
    for name, value in settings.items():
        if name not in DEFAULTS:
            raise InputError(f"{name} is not a setting; the settings are {', '.join(DEFAULTS)}")
        kind = type(DEFAULTS[name])
        items, item_kind = (value, int) if kind is list else ([value], kind)
        if type(value) is not kind or any(type(item) is not item_kind for item in items):
            raise InputError(f"{name} is {value!r}: write it like {DEFAULTS[name]!r}")
        if value not in CHOICES.get(name, [value]):
            raise InputError(f"{name} is {value!r}: it must be one of {CHOICES[name]}")
        if item_kind is str:
            continue
        # The first number is image_size: so it is one before another's limit is computed from it.
        most = {
            "dropout": 0.99,
            "low_res_size": settings["image_size"] - 1,
            "sampling_steps": settings["num_timesteps"],
        }
        low, high = ABOVE.get(name, 0), most.get(name, 2**31)
        if not all(low < item <= high for item in items):
            raise InputError(f"{name} is {value}: it must be above {low} and at most {high}")
    return SimpleNamespace(**settings)
