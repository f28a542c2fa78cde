"""support/: settings, how a script ends, the machine."""

import pytest
import torch
from conftest import ROOT, raising

from support import machine
from support.errors import InputError, argument_parser, one_line_errors
from support.settings import DEFAULTS, add_settings, parse_settings
from utils import build_model

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def parse(*arguments, resumed=None):
    add_settings(parser := argument_parser(""))
    return parse_settings(parser.parse_args([*map(str, arguments)]), resumed)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_builds_a_network(path):
    assert build_model(parse("--config_path", path))


def test_defaults_a_resumed_run_a_config_and_flags_win_in_this_order(tmp_path):
    """An old checkpoint that lacks a setting takes mnist.toml's."""
    (path := tmp_path / "a.toml").write_text("batch_size = 3\nseed = 3\nearly_samples = []")
    config = parse("--config_path", path, "--seed", 4, resumed={"features": 32, "batch_size": 2, "warmup_steps": 2})
    expected = {"features": 32, "warmup_steps": 2, "batch_size": 3, "early_samples": [], "seed": 4}
    assert vars(config) == DEFAULTS | expected


WRONG = """method = "gan"
image_size = 8
low_res_size = 32
channels = 2
channel_multipliers = [0, 1]
blocks_per_level = true
beta_start = nan
sampling_steps = 2001
early_samples = 5
seed = -1
feature = 8"""


@pytest.mark.parametrize("line", WRONG.splitlines())
def test_a_wrong_line_of_a_config_is_refused_with_its_name(tmp_path, line):
    (path := tmp_path / "wrong.toml").write_text(line)
    with pytest.raises(InputError, match=f"^{line.split()[0]} is "):
        parse("--config_path", path)


CHANGED = """--method=regression --dataset=cifar10 --image_size=64 --low_res_size=8 --channels=3 --features=24
--channel_multipliers=1 --blocks_per_level=2 --dropout=0.1 --attention_resolutions=16 --attention_heads=2
--num_timesteps=1000 --beta_start=1e-5 --beta_end=0.02 --loss_weight=1"""


@pytest.mark.parametrize("flag", CHANGED.split())
def test_a_resumed_run_cannot_change_its_data_its_network_or_its_diffusion(flag):
    with pytest.raises(InputError, match=f"{flag[2:].split('=')[0]} is .*: a resumed run can't change it"):
        parse(flag, resumed=DEFAULTS)


def test_bad_input_and_files_that_fail_end_a_script_with_one_line_each(capsys):
    for error in (InputError("size is 3:\n give 4"), FileNotFoundError(2, "No such file", "y.png")):
        with pytest.raises(SystemExit, match="^2$"):
            one_line_errors()(raising(error))()
    assert capsys.readouterr().err == "error: size is 3: give 4\nerror: [Errno 2] No such file: 'y.png'\n"


def test_a_gpu_that_cannot_compute_is_left_for_the_cpu_in_a_line_unless_it_was_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", raising(RuntimeError("no kernel image\nCompile with TORCH_USE")))
    assert machine.choose_device() == torch.device("cpu")
    assert capsys.readouterr().err == "cuda is there but can't compute (no kernel image); the CPU is taken instead\n"
    with pytest.raises(InputError, match="device cuda:1 can't compute here .no kernel image.; give another --device"):
        machine.choose_device("cuda:1")
