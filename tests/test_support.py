"""support/: settings and edits to them, how a script ends, the machine and the recorded step."""

import importlib.util
import re
import shutil
import sys
import tomllib
from unittest.mock import MagicMock

import pytest
import torch
from conftest import ROOT, call, raising

import support.settings
import train_mnist
import utils
from support import machine
from support.errors import InputError, Parser, one_line_errors
from support.settings import DEFAULTS, complete_settings

CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.toml"))}
TEXT = CONFIGS["mnist"].read_text(encoding="utf-8")


def parse(*arguments, settings=support.settings):
    """The settings of a script that has another flag beside them."""
    parser = Parser("")
    parser.add_argument("--output_dir")
    settings.add_settings(parser)
    return settings.parse_settings(parser, [*map(str, arguments)])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_names_what_differs_from_mnist_and_builds_a_network_of_the_promised_size(name):
    config, lines = parse("--config_path", CONFIGS[name]), tomllib.loads(CONFIGS[name].read_text(encoding="utf-8"))
    assert vars(config) == tomllib.loads(TEXT) | lines
    assert name == "mnist" or all(DEFAULTS[setting] != value for setting, value in lines.items())
    low, high = (30, 50) if name == "mnist_large" else (1.9, 2)
    assert low <= sum(weight.numel() for weight in utils.build_model(config).parameters()) / 1e6 <= high


WRONG = """
    method = "gan"; loss_weight = "gamma"; precision = "float16"; image_size = 32.0; image_size = [32, 32]
    image_size = 36; low_res_size = 32; channels = 2; blocks_per_level = true; features = 12; attention_heads = 3
    channel_multipliers = []; channel_multipliers = [0, 1]; channel_multipliers = [1, 1, 1, 1, 1, 1, 1]; dropout = 1
    attention_resolutions = [8, 9]; num_timesteps = 24; num_timesteps = 100; beta_start = nan; sampling_steps = 2001
    learning_rate = inf; early_samples = ["--help"]; early_samples = ["--output_dir=x"]; seed = 2147483648; seed = ""
    seed = -1; seed = 2026-01-01; [training]; feature = 8; "output dir" = 3; output_dir = "x"; resume = true
"""
WRONG = [line.strip() for line in WRONG.replace("\n", ";").split(";") if line.strip()]
NUMBERS = [name for name, value in DEFAULTS.items() if isinstance(value, int | float)]
WRONG += [f"{name} = 0" for name in NUMBERS if name not in ("dropout", "warmup_steps", "seed")]


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_line_of_a_config_is_refused_with_its_name(tmp_path, line):
    (tmp_path / "wrong.toml").write_text(line)
    with pytest.raises(InputError, match=line.split(" = ")[0].strip('[]"')):
        utils.build_model(parse("--config_path", tmp_path / "wrong.toml"))


def test_a_config_is_the_file_that_is_named_and_whatever_its_path_adds_to_the_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (path := tmp_path / "configs/mnist.toml").parent.mkdir()
    path.write_text("features = 32")
    found = vars(parse("--config_path", "configs/mnist.toml", "--warmup_steps", 0))
    assert found == DEFAULTS | {"features": 32, "warmup_steps": 0}
    for content in (b"seed = 1\nseed = 1", b"seed = [", b"x = " + b"[" * 9999, b"seed = 1 # \xe9t\xe9"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{path} is not valid TOML"):
            parse("--config_path", path)


def test_help_explains_every_setting_by_its_comment_and_names_its_choices(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "999")
    with pytest.raises(SystemExit, match="0"):
        call(train_mnist, "--help")
    shown = capsys.readouterr().out
    comments = dict(re.findall("^([a-z_]+) = .*?# (.*)$", TEXT, re.MULTILINE))
    assert all(f"{comments[name]}; default: {value}" in shown for name, value in DEFAULTS.items())
    assert "{mnist,fashion_mnist,cifar10,folder,digits}" in shown and "{auto,float32,bfloat16}" in shown


def edited(folder, text):
    """support/settings.py in a checkout whose mnist.toml has been edited."""
    for name in ("support", "configs"):
        (folder / name).mkdir(parents=True)
    (folder / "configs/mnist.toml").write_text(text, encoding="utf-8")
    copy = shutil.copy(ROOT / "support/settings.py", folder / "support")
    spec = importlib.util.spec_from_file_location("edited_settings", copy)
    settings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(settings)
    return settings


ADDED = 'weight_decay = 0.01\nbetas = [0.9, 0.99]\namsgrad = false\noptimizer = "adam"\nseed = 0 '
EDITS = {  # what is replaced by what, and what of the defaults that changes, or is missing
    "whole numbers": (r"(dropout|max_grad_norm) = (.)\.0", r"\1 = \2", {}),
    "a number for a word": ('loss_weight = "1/gamma"', "loss_weight = 1", {"loss_weight": "1"}),
    "lines added": ("seed = 0 ", ADDED, tomllib.loads(ADDED)),
    "lines deleted": ("(method|low_res_size|seed) = ", "# ", dict.fromkeys(("method", "low_res_size", "seed"))),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_to_mnist_toml_leave_weights_readable_flags_typed_and_other_configs_valid(tmp_path, monkeypatch, edit):
    """What is missing is named, and can be given as a flag; what is added is a setting like the others."""
    before, after, changes = EDITS[edit]
    path = ROOT / "output/reference/8x/sr3.pt"
    settings = edited(tmp_path, re.sub(f"^{before}", after, TEXT, flags=re.MULTILINE))
    monkeypatch.setattr(utils, "complete_settings", settings.complete_settings)
    assert vars(utils.load_model(path).config) == changes | torch.load(path, weights_only=True)["config"]
    flags, large = ["--config_path", CONFIGS["mnist_large"], "--dropout=0.2"], CONFIGS["mnist_large"].read_text()
    given = {name: DEFAULTS[name] for name, value in changes.items() if value is None}
    if given:
        with pytest.raises(InputError, match=f"configs/mnist.toml has no line for {', '.join(given)};"):
            parse(*flags, settings=settings)
    found = vars(parse(*flags, *(f"--{name}={value}" for name, value in given.items()), settings=settings))
    assert found == DEFAULTS | changes | given | tomllib.loads(large) | {"dropout": 0.2}
    assert all(type(found[name]) is type(value) for name, value in DEFAULTS.items())


def test_an_added_line_has_its_own_comment_or_none_and_one_that_is_another_flag_is_named(tmp_path):
    settings = edited(tmp_path / "a", TEXT.replace("seed = 0 ", "x_1 = 1\nx_2 = 2  # 7 % of it\nx_3 = 3\nseed = 0 "))
    settings.add_settings(parser := Parser(""))
    shown = re.split("--x_. N +", parser.format_help())[-3:]
    assert [" ".join(line.split()) for line in shown] == ["default: 1", "7 % of it; default: 2", "default: 3"]
    with pytest.raises(InputError, match="output_dir"):
        parse(settings=edited(tmp_path / "b", TEXT + 'output_dir = "x"'))


def test_a_checkpoints_unknown_settings_are_passed_over_with_a_line_and_missing_ones_are_mnist_tomls(capsys):
    assert vars(complete_settings({"features": 32, "shiny": 1}, "old.pt")) == DEFAULTS | {"features": 32}
    assert "old.pt: the setting shiny = 1 is unknown" in capsys.readouterr().err
    for wrong in ([1, 2], {"features": None}, {"features": [16, 16]}, {"channels": 2}, {"early_samples": ["--help"]}):
        with pytest.raises(InputError, match="old.pt|channels is 2"):
            complete_settings(wrong, "old.pt")


ENDS = [
    (InputError("size is 3:\n give 4"), "size is 3: give 4"),
    (OSError(13, "Permission denied", "/x/log.csv"), "/x/log.csv: Permission denied; free or correct it"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory; give fewer images (CUDA out of"),
    (KeyboardInterrupt(), "stopped"),
]


@pytest.mark.parametrize("error, words", ENDS, ids=lambda value: type(value).__name__)
def test_what_is_no_bug_ends_a_script_with_one_line(monkeypatch, failure, error, words):
    monkeypatch.setattr(sys, "argv", ["/home/me/sample.py"])
    line = failure(one_line_errors()(raising(error)), status=130 if words == "stopped" else 2)
    assert line.startswith(f"sample.py: {words}")


def test_a_gpu_that_is_there_but_cannot_compute_is_passed_over_with_a_line_unless_it_is_named(monkeypatch, capsys):
    ones = torch.ones
    no_kernel = raising(RuntimeError("CUDA error: no kernel image is available\nCompile with TORCH_USE_CUDA_DSA"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda n, device: no_kernel() if "cuda" in str(device) else ones(n))
    assert machine.choose_device() == torch.device("cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cuda is there but can't compute (CUDA error: no kernel image is available)")
    with pytest.raises(InputError, match="device cuda:99 can't compute here .*no kernel.* leave out --device"):
        machine.choose_device("cuda:99")


def test_bfloat16_is_for_gpus_that_compute_in_it_and_auto_is_float32_on_all(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for capability in ((7, 5), (8, 0)):
        assert machine.choose_precision("auto", cuda) == machine.choose_precision("float32", cuda) == "float32"
    assert machine.choose_precision("bfloat16", cuda) == "bfloat16"
    capability = (7, 5)
    with pytest.raises(InputError, match="--precision float32"):
        machine.choose_precision("bfloat16", cuda)


@pytest.mark.parametrize("fails", [False, True])
def test_a_gpus_step_is_recorded_in_its_fourth_call_or_goes_on_with_a_line(monkeypatch, capsys, fails):
    """On a pretended GPU. A capture that failed has done nothing, so its step is made up for."""
    losses, fakes = [torch.tensor(float(i)) for i in range(7)], {}
    step = MagicMock(side_effect=losses)
    for device, ranks in (("cpu", 1), ("mps", 1), ("cuda", 2)):
        assert machine.record(step, torch.device(device), ranks) is step
    for name in ("CUDAGraph", "Stream", "graph", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, fakes.setdefault(name, MagicMock()))
    monkeypatch.setattr(torch.cuda, "default_generators", [MagicMock()])
    if fails:  # which the end of the capture notices
        fakes["graph"].return_value.__exit__.side_effect = RuntimeError("operation not permitted\nwhen capturing")
    recorded, replay = machine.record(step, torch.device("cuda"), 1), fakes["CUDAGraph"].return_value.replay
    for calls, replays in [(1, 0), (2, 0), (3, 0)] + ([(5, 0), (6, 0)] if fails else [(4, 1), (4, 2)]):
        assert recorded() is losses[calls - 1] and (step.call_count, replay.call_count) == (calls, replays)
    line = "the step can't be recorded (operation not permitted); going on without"
    assert capsys.readouterr().err.strip() == (line if fails else "")
