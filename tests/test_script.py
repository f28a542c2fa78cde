"""train_mnist.py as its users run it: what a run writes, how it ends, how it goes on, what it refuses."""

import contextlib
import csv
import functools
import io
import json
import math
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_tiny_config
from PIL import Image

import metrics
import sr3
import train_mnist
import utils

GRIDS = ("hr", "lr", "sr", "refinement")
HEADER = (
    "dataset,step,loss,learning_rate,images_per_second,"
    "psnr,ssim,consistency,bicubic_psnr,bicubic_ssim,bicubic_consistency"
)
DRAW_DIGITS = functools.cache(utils.draw_digits)


@pytest.fixture(autouse=True, scope="module")
def digits_drawn_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "draw_digits", DRAW_DIGITS)
        yield


def draw_few_digits(_, image_size, channels, seed):
    return DRAW_DIGITS(70, image_size, channels, seed)


def run(config, output, *flags):
    """main() in this process, whose signal handlers stay as they were."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    arguments = ["--config_path", config, "--output_dir", output, "--device", "cpu", *flags]
    try:
        train_mnist.main([str(argument) for argument in arguments])
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
    return output


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The config and the output of one run of 20 steps; not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_tiny_config(folder / "tiny.toml")
    return config, run(config, folder / "output")


@pytest.fixture
def copy_of_finished(finished, tmp_path):
    config, output = finished
    return config, Path(shutil.copytree(output, tmp_path / "output"))


def checkpoint_of(output):
    return torch.load(output / "checkpoint.pt", weights_only=True)


def log_of(output):
    return list(csv.DictReader(io.StringIO((output / "log.csv").read_text())))


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same(a, b):
    """Equal to the last bit: tensors, and dictionaries and lists of them."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            assert_same(*pair)
    else:
        assert a == b or a != a


def assert_same_training(a, b):
    a, b = checkpoint_of(a), checkpoint_of(b)
    assert a["step"] == b["step"]
    for part in ("model", "ema", "optimizer"):
        assert_same(a[part], b[part])


def without_speed(rows):
    return [[cell for i, cell in enumerate(row) if i != 4] for row in rows]


def cells(path, size=16, padding=2, columns=8):
    """The pictures of a grid, uint8 [N, size, size, 3], row by row."""
    pixels = torch.frombuffer(bytearray(Image.open(path).convert("RGB").tobytes()), dtype=torch.uint8)
    width, height = Image.open(path).size
    assert width == columns * (size + padding) + padding and (height - padding) % (size + padding) == 0
    pixels = pixels.view(height, width, 3)
    tops = range(padding, height, size + padding)
    return torch.stack(
        [pixels[y : y + size, x : x + size] for y in tops for x in range(padding, width, size + padding)]
    )


# ----------------------------------------------------------------------------------------------------------------------
# What a run writes


def test_a_run_writes_its_grids_log_and_checkpoint_and_nothing_else(tiny_config, tmp_path, monkeypatch):
    """early_samples, every sample_every steps and the last one; a row of the log there and every LOG_EVERY steps."""
    assert train_mnist.LOG_EVERY == 100
    monkeypatch.setattr(train_mnist, "LOG_EVERY", 10)  # so that 25 steps will do
    losses, original = [], sr3.SR3.loss

    def loss(self, *images):
        value = original(self, *images)
        losses.append(value.item())
        return value

    monkeypatch.setattr(sr3.SR3, "loss", loss)
    output = run(tiny_config(early_samples=[3, 7], sample_every=14, num_training_steps=25), tmp_path / "output")

    drawn, logged = [3, 7, 14, 25], [3, 7, 10, 14, 20, 25]
    grids = [f"{name}-{step:06d}.png" for name in GRIDS for step in drawn]
    assert sorted(p.name for p in output.iterdir()) == sorted([*grids, "log.csv", "checkpoint.pt"])
    assert (output / "log.csv").read_text().splitlines()[0] == HEADER
    rows = log_of(output)
    assert [int(row["step"]) for row in rows] == logged and len(losses) == 25
    for row, before, step in zip(rows, [0, *logged], logged):
        mean = sum(losses[before:step]) / (step - before)
        assert float(row["loss"]) == pytest.approx(mean, rel=1e-4)  # of the steps since the row before
        assert float(row["learning_rate"]) == pytest.approx(1e-3 * step / 50, rel=1e-5)  # warming up
        assert float(row["images_per_second"]) > 0 and row["dataset"] == "digits"
        metrics = [row[key] for key in HEADER.split(",")[5:]]
        assert all(math.isfinite(float(m)) for m in metrics) if step in drawn else metrics == [""] * 6
    assert checkpoint_of(output)["step"] == 25 and checkpoint_of(output)["dataset"] == "digits"


def test_the_grids_show_the_first_64_test_digits_and_what_was_made_of_them(finished):
    config, output = finished
    images = utils.load_images("digits", "", False, 16, 1)[:64]
    paths = {name: output / f"{name}-000020.png" for name in GRIDS}
    assert len({Image.open(paths[name]).size for name in ("hr", "lr", "sr")}) == 1

    high_res = cells(paths["hr"])
    assert torch.equal(high_res, images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3))

    low_res = cells(paths["lr"])
    squares = low_res.view(64, 4, 4, 4, 4, 3).permute(0, 1, 3, 2, 4, 5)  # [N, row, column, y, x, 3]
    assert (squares == squares[:, :, :, :1, :1]).all()
    expected = (utils.downsample(images / 127.5 - 1, 4)[:, 0] + 1) * 127.5  # [64, 4, 4]
    assert (squares[:, :, :, 0, 0, 0] - expected).abs().max() < 0.51  # rounded

    columns = 7  # low resolution, noise, three of the four refinement steps, super-resolution, high resolution
    rows = cells(paths["refinement"], columns=columns).view(8, columns, 16, 16, 3)
    super_res = cells(paths["sr"])
    for column, expected in ((0, low_res), (-2, super_res), (-1, high_res)):
        assert torch.equal(rows[:, column], expected[:8])
    assert rows[:, 1].float().std() > 60  # noise

    error = (super_res[..., 0].double() - high_res[..., 0].double()) / 255
    psnr = (-10 * error.square().mean((1, 2)).log10()).mean().item()
    assert float(log_of(output)[-1]["psnr"]) == pytest.approx(psnr, abs=0.1)


def test_every_output_names_the_data_set_that_was_used(write_mnist, tiny_config, tmp_path, capsys):
    images = torch.randint(256, (70, 28, 28), dtype=torch.uint8)
    data_dir = write_mnist(images, images[:9])
    output = run(tiny_config(dataset="mnist"), tmp_path / "o", "--data_dir", data_dir, "--num_training_steps", 2)
    for name in GRIDS:
        assert Image.open(output / f"{name}-000002.png").getexif()[0x010E] == "mnist, step 2"
    assert log_of(output)[0]["dataset"] == "mnist" and checkpoint_of(output)["dataset"] == "mnist"
    streams = capsys.readouterr()
    assert streams.out.startswith("mnist: 70 images") and "WARNING" not in streams.err
    assert len(cells(output / "hr-000002.png")) == 16  # nine pictures, in rows of eight


@pytest.mark.parametrize("number", [1, 2, 11])
def test_a_folder_of_a_few_colour_pictures_trains(tiny_config, tmp_path, number):
    for i in range(number):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (20, 18), (20 * i, 100, 200)).save(tmp_path / f"pictures/{i}.png")
    flags = ["--data_dir", tmp_path / "pictures", "--num_training_steps", 1]
    output = run(tiny_config(dataset="folder", channels=3), tmp_path / "output", *flags)
    columns = 1 if number < 11 else 2  # pictures for testing
    assert Image.open(output / "hr-000001.png").size == Image.open(output / "sr-000001.png").size
    assert Image.open(output / "refinement-000001.png").size == (7 * 18 + 2, columns * 18 + 2)
    assert log_of(output)[0]["dataset"] == "folder"


def test_without_mnist_and_network_digits_are_drawn_with_an_unmistakable_warning(tiny_config, tmp_path, capsys):
    flags = ["--data_dir", tmp_path / "data", "--num_training_steps", 1]
    output = run(tiny_config(dataset="mnist"), tmp_path / "output", *flags)
    error = capsys.readouterr().err
    assert "WARNING" in error and "digits" in error.lower() and str(tmp_path / "data") in error
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        assert f"{part}-ubyte.gz" in error
    assert log_of(output)[0]["dataset"] == "digits" and checkpoint_of(output)["dataset"] == "digits"
    assert Image.open(output / "sr-000001.png").getexif()[0x010E] == "digits, step 1"


def test_flags_win_over_the_config_and_paths_are_of_the_current_folder(tiny_config, tmp_path, monkeypatch):
    sizes, original = [], sr3.SR3.loss
    monkeypatch.setattr(sr3.SR3, "loss", lambda self, *i: sizes.append(len(i[0])) or original(self, *i))
    config = tiny_config()
    monkeypatch.chdir(tmp_path)
    flags = ["--num_training_steps", 3, "--batch_size", 2]
    run(config.name, "zero", *flags)
    run(config.name, "five", *flags, "--seed", 5)
    assert sizes == [2] * 6
    training = checkpoint_of(tmp_path / "five")["config"]["training"]
    assert (training["num_training_steps"], training["batch_size"], training["seed"]) == (3, 2, 5)
    assert checkpoint_of(tmp_path / "zero")["config"]["training"]["seed"] == 0
    first, second = (checkpoint_of(tmp_path / name)["model"] for name in ("zero", "five"))
    assert not torch.equal(first["unet.conv_in.weight"], second["unet.conv_in.weight"])


# ----------------------------------------------------------------------------------------------------------------------
# The weights


def test_drawing_never_changes_training(tiny_config, tmp_path):
    few = run(tiny_config(num_training_steps=8, dropout=0.2), tmp_path / "few")
    many = run(tiny_config(num_training_steps=8, dropout=0.2, early_samples=[1, 2, 5, 7]), tmp_path / "many")
    assert len(log_of(many)) == 5
    assert_same_training(few, many)


def test_the_ema_is_the_running_average_of_the_weights(tiny_config, tmp_path, monkeypatch):
    weights, original = [], sr3.SR3.loss

    def loss(self, *images):  # sees the weights that the step before left
        weights.append({name: w.detach().double().clone() for name, w in self.named_parameters()})
        return original(self, *images)

    monkeypatch.setattr(sr3.SR3, "loss", loss)
    config = tiny_config(ema_decay=0.5, learning_rate=0.01, warmup_steps=0, num_training_steps=10)
    output = run(config, tmp_path / "output")
    checkpoint = checkpoint_of(output)
    weights = [*weights[1:], {name: checkpoint["model"][name].double() for name in weights[0]}]  # after steps 1 … 10
    average = weights[0]
    for step, now in enumerate(weights[1:], start=2):
        decay = min(0.5, (1 + step) / (10 + step))  # 3/12, 4/13, … 9/18, 0.5, 0.5
        average = {name: decay * average[name] + (1 - decay) * now[name] for name in now}
    for name, value in average.items():
        torch.testing.assert_close(checkpoint["ema"]["module." + name].double(), value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("number", [1, 3])
def test_load_model_gives_the_averaged_weights_ready_to_sample(finished, number):
    _, output = finished
    model = train_mnist.load_model(output / "checkpoint.pt")
    assert not any(module.training for module in model.modules())
    checkpoint = checkpoint_of(output)
    for name, value in model.state_dict().items():
        assert torch.equal(value, checkpoint["ema"]["module." + name])
    assert not torch.equal(model.unet.conv_in.weight, checkpoint["model"]["unet.conv_in.weight"])
    images = model.sample(utils.upsample(torch.rand(number, 1, 4, 4) * 2 - 1, 16), steps=3)
    assert images.shape == (number, 1, 16, 16) and images.isfinite().all()


def test_the_super_resolution_grid_is_what_load_model_draws_from_the_grids_noise(finished):
    _, output = finished
    model = train_mnist.load_model(str(output / "checkpoint.pt"))
    test_images = utils.load_images("digits", "", False, 16, 1)[:64]
    context = utils.upsample(utils.downsample(test_images / 127.5 - 1, 4), 16)
    generator = torch.Generator().manual_seed(0)  # the config's seed
    y_T = torch.randn(context.shape, generator=generator)
    images = model.sample(context, steps=4, generator=generator, y_T=y_T)
    expected = (images.clamp(-1, 1) + 1) * 127.5
    assert (cells(output / "sr-000020.png")[..., 0] - expected[:, 0]).abs().max() < 0.6  # rounded


# ----------------------------------------------------------------------------------------------------------------------
# Stopping and going on


def start(cwd, *arguments):
    command = [sys.executable, str(ROOT / "train_mnist.py"), "--device", "cpu", *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.002)


def test_a_killed_run_resumes_bit_for_bit(tiny_config, tmp_path):
    config = tiny_config(precision="auto", dropout=0.1)
    common = ["--config_path", config.name, "--output_dir", "killed"]
    process = start(tmp_path, *common, "--num_training_steps", 100_000)
    try:
        wait_for(tmp_path / "killed/checkpoint.pt", process)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    step = checkpoint_of(tmp_path / "killed")["step"]  # 20, or a later one where this test was slow to kill
    assert step % 20 == 0
    run(config, tmp_path / "killed", "--num_training_steps", step + 20, "--resume")
    run(config, tmp_path / "whole", "--num_training_steps", step + 20)
    assert_same_training(tmp_path / "killed", tmp_path / "whole")
    killed, whole = (checkpoint_of(tmp_path / name)["log"] for name in ("killed", "whole"))
    assert_same(without_speed(killed), without_speed(whole))
    killed, whole = ([list(row.values()) for row in log_of(tmp_path / name)] for name in ("killed", "whole"))
    assert len(killed) == len(whole) > 1 and without_speed(killed) == without_speed(whole)
    for name in GRIDS:
        for at in (step, step + 20):
            file = f"{name}-{at:06d}.png"
            assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_the_run_goes_on_later(finished, tmp_path, monkeypatch, capsys, number):
    config, uninterrupted = finished
    calls, original = [], sr3.SR3.loss

    def loss(self, *images):
        calls.append(1)
        if len(calls) == 7:
            signal.raise_signal(number)
        return original(self, *images)

    monkeypatch.setattr(sr3.SR3, "loss", loss)
    output = tmp_path / "output"
    with pytest.raises(SystemExit) as exit:
        run(config, output)
    assert exit.value.code == 128 + number
    out = capsys.readouterr().out
    assert "step 7" in out and "--resume" in out
    assert checkpoint_of(output)["step"] == 7 and [row["step"] for row in log_of(output)] == ["7"]
    assert sorted(p.name for p in output.glob("*.png")) == sorted(f"{name}-000007.png" for name in GRIDS)
    run(config, output, "--resume")
    assert len(calls) == 20
    assert_same_training(output, uninterrupted)


def test_a_signal_during_the_last_step_does_not_promise_more(tiny_config, tmp_path, monkeypatch, capsys):
    """Where all steps are done, and no table was asked for, nothing is left to go on with."""
    original = sr3.SR3.loss
    monkeypatch.setattr(sr3.SR3, "loss", lambda self, *i: signal.raise_signal(signal.SIGINT) or original(self, *i))
    with contextlib.suppress(SystemExit):
        run(tiny_config(), tmp_path / "output", "--num_training_steps", 1)
    assert checkpoint_of(tmp_path / "output")["step"] == 1
    assert "goes on" not in capsys.readouterr().out


def test_ctrl_c_ends_the_script_with_status_130_and_no_traceback(tiny_config, tmp_path):
    config = tiny_config(sample_every=1000, early_samples=[1], num_training_steps=100_000)
    process = start(tmp_path, "--config_path", config, "--output_dir", "output")
    try:
        wait_for(tmp_path / "output/checkpoint.pt", process)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in error
    step = int(re.search(r"stopped after step (\d+); .*--resume", out)[1])
    output = tmp_path / "output"
    assert checkpoint_of(output)["step"] == step and int(log_of(output)[-1]["step"]) == step
    assert all((output / f"{name}-{step:06d}.png").exists() for name in GRIDS)


def test_a_second_run_moves_what_the_first_left_and_loses_nothing(copy_of_finished, capsys):
    config, output = copy_of_finished
    (output / "notes.txt").write_text("mine")
    first = snapshot(output)
    run(config, output, "--num_training_steps", 1)
    assert "earlier-1" in capsys.readouterr().out
    second = {path: content for path, content in snapshot(output).items() if path.parts[0] != "earlier-1"}
    del first[Path("notes.txt")]
    assert snapshot(output / "earlier-1") == first
    assert (output / "notes.txt").read_text() == "mine" and checkpoint_of(output)["step"] == 1
    assert not list(output.glob("*-000020.png"))
    run(config, output, "--num_training_steps", 2)
    assert "earlier-2" in capsys.readouterr().out
    del second[Path("notes.txt")]
    assert snapshot(output / "earlier-1") == first and snapshot(output / "earlier-2") == second


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_checkpoint_is_overwritten(
    copy_of_finished, monkeypatch, capsys, value
):
    config, output = copy_of_finished
    before, calls, original = snapshot(output), [], sr3.SR3.loss

    def loss(self, *images):
        calls.append(1)
        return original(self, *images) * (value if len(calls) == 5 else 1)

    monkeypatch.setattr(sr3.SR3, "loss", loss)
    with pytest.raises(SystemExit) as exit:
        run(config, output, "--num_training_steps", 40, "--resume")
    assert exit.value.code not in (None, 0)
    lines = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if "finite" in line]
    assert len(lines) == 1 and lines[0].startswith("train_mnist.py: ") and str(output / "checkpoint.pt") in lines[0]
    assert snapshot(output) == before


FULL_DISK = """
import resource, sys
sys.path.insert(0, {root!r})
import train_mnist
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
train_mnist.main(sys.argv[1:])
"""


def test_a_full_disk_leaves_the_last_checkpoint_and_one_line(copy_of_finished):
    config, output = copy_of_finished
    if resource.getrlimit(resource.RLIMIT_FSIZE)[1] != resource.RLIM_INFINITY:
        pytest.skip("file sizes are limited here already")
    before = (output / "checkpoint.pt").read_bytes()
    code = FULL_DISK.format(root=str(ROOT), limit=len(before) // 2)  # room for grids, not for a checkpoint
    flags = ["--device", "cpu", "--num_training_steps", "22", "--resume"]
    command = [sys.executable, "-c", code, "--config_path", str(config), "--output_dir", str(output), *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    lines = [line for line in re.split(r"[\r\n]+", result.stderr) if "train_mnist.py: " in line]
    assert len(lines) == 1 and str(output / "checkpoint.pt") in lines[0]
    assert lines[0].startswith("train_mnist.py: "), "it hangs on the progress bar"
    assert (output / "checkpoint.pt").read_bytes() == before
    assert (output / "sr-000022.png").exists() and not list(output.glob("*.tmp"))


def test_a_run_in_float32_resumes_in_float16(copy_of_finished, monkeypatch):
    """As where a CPU's checkpoint goes on on a GPU without bfloat16."""
    config, output = copy_of_finished
    monkeypatch.setattr(train_mnist, "choose_precision", lambda *_: torch.float16)
    run(config, output, "--num_training_steps", 22, "--resume")
    checkpoint = checkpoint_of(output)
    assert checkpoint["step"] == 22 and all(value.isfinite().all() for value in checkpoint["model"].values())


# ----------------------------------------------------------------------------------------------------------------------
# The baseline and the final table


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A regression and an SR3 run of 20 steps on few drawn digits with their tables: config and output of each."""
    folder = tmp_path_factory.mktemp("judged")
    configs = [
        write_tiny_config(folder / f"{method}.toml", method=method, channels=3, num_images=60)
        for method in ("regression", "sr3")
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "draw_digits", draw_few_digits)
        run(configs[0], folder / "regression")
        run(configs[1], folder / "sr3", "--regression_checkpoint", folder / "regression/checkpoint.pt")
    return configs, [folder / "regression", folder / "sr3"]


def results_of(output):
    return json.loads((output / "results.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON


def test_a_regression_run_writes_the_same_grids_without_noise(judged):
    _, (output, _) = judged
    names = [*(f"{name}-000020.png" for name in GRIDS), "checkpoint.pt", "log.csv", "results.json", "results.md"]
    assert sorted(p.name for p in output.iterdir()) == sorted(names)
    assert log_of(output)[-1]["psnr"] and checkpoint_of(output)["config"]["method"] == "regression"
    rows = cells(output / "refinement-000020.png", columns=3).view(8, 3, 16, 16, 3)
    for column, name in enumerate(("lr", "sr", "hr")):
        assert torch.equal(rows[:, column], cells(output / f"{name}-000020.png")[:8])
    model = train_mnist.load_model(output / "checkpoint.pt")
    assert isinstance(model, sr3.Regression) and not any(module.training for module in model.modules())


def test_the_table_has_a_row_for_each_method_and_agrees_with_independent_arithmetic(judged):
    _, (regression, output) = judged
    results = results_of(output)
    assert results["dataset"] == "digits" and results["num_images"] == 60
    rows = results["methods"]
    assert list(rows) == ["reference", "bicubic", "regression", "SR3"]
    assert list(results_of(regression)["methods"]) == ["reference", "bicubic", "regression"]
    assert [row["training_steps"] for row in rows.values()] == [None, None, 20, 20]
    assert rows["regression"] == results_of(regression)["methods"]["regression"]

    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))[:60]
    images = draw_few_digits(70, 16, 3, seed=1)[0][order].double()
    context = utils.upsample(utils.downsample(images.float() / 127.5 - 1, 4), 16).clamp(-1, 1).double()
    error = (((context + 1) * 127.5).round() - images) / 255
    psnr = -10 * error.square().mean((1, 2, 3)).log10()
    assert rows["bicubic"]["psnr"]["mean"] == pytest.approx(psnr.mean().item(), abs=1e-3)
    assert rows["bicubic"]["psnr"]["standard_error"] == pytest.approx(psnr.std().item() / 60**0.5, rel=1e-3)
    assert rows["reference"]["psnr"] == {"mean": "inf", "standard_error": "nan"}
    assert rows["reference"]["ssim"]["mean"] == pytest.approx(1) and rows["reference"]["consistency"]["mean"] < 1e-6
    fooled = rows["reference"]["fool_rate"]
    assert fooled["low"] < 0.5 < fooled["high"] and rows["bicubic"]["fool_rate"]["mean"] < 0.2

    text = (output / "results.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[:6]]
    assert lines[0] == [
        "method", "steps", "PSNR ↑", "SSIM ↑", "consistency ↓", "digit accuracy ↑", "fool rate → 50 %"
    ]  # fmt: skip
    assert lines[3][:3] == ["bicubic", "–", f"{psnr.mean():.2f} ± {psnr.std() / 60**0.5:.2f}"]
    assert lines[2][2] == "∞" and lines[5][:2] == ["SR3", "20"]


def test_the_diversity_grid_shows_x_eight_samples_their_deviation_the_regression_and_the_reference(judged):
    _, (regression, output) = judged
    rows = cells(output / "diversity.png", columns=12).view(8, 12, 16, 16, 3).double() / 255
    grids = {name: cells(output / f"{name}-000020.png")[:8] / 255 for name in ("lr", "hr")}
    torch.testing.assert_close(rows[:, 0], grids["lr"].double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows[:, 11], grids["hr"].double(), atol=1e-6, rtol=0)
    expected = cells(regression / "sr-000020.png")[:8] / 255
    torch.testing.assert_close(rows[:, 10], expected.double(), atol=1.1 / 255, rtol=0)
    samples = rows[:, 1:9]
    deviation = (samples - samples.mean(1, keepdim=True)).square().sum(1).div(7).sqrt()
    torch.testing.assert_close(rows[:, 9], (2 * deviation).clamp(max=1), atol=2.5 / 255, rtol=0)
    assert results_of(output)["diversity"] == pytest.approx(deviation.mean().item(), abs=0.002)
    assert not (regression / "diversity.png").exists()


def test_resuming_a_finished_run_only_judges_it(judged, tmp_path, monkeypatch, capsys):
    (_, config), (regression, output) = judged
    output = Path(shutil.copytree(output, tmp_path / "output"))
    before = snapshot(output)
    for name in ("results.json", "results.md", "diversity.png"):
        (output / name).unlink()
    monkeypatch.setattr(utils, "draw_digits", draw_few_digits)
    monkeypatch.setattr(sr3.SR3, "loss", None)  # no step is taken
    run(config, output, "--resume", "--regression_checkpoint", regression / "checkpoint.pt")
    assert snapshot(output) == before
    assert capsys.readouterr().out.endswith((output / "results.md").read_text())


def test_images_without_labels_have_a_dash_for_accuracy(tiny_config, tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(22):  # three of them for testing
        Image.new("RGB", (20, 18), (10 * i, 100, 200)).save(tmp_path / f"pictures/{i:02}.png")
    config = tiny_config(dataset="folder", channels=3, num_images=2000)
    output = run(config, tmp_path / "output", "--data_dir", tmp_path / "pictures", "--num_training_steps", 1)
    results = results_of(output)
    assert results["num_images"] == 3
    assert all(row["accuracy"] is None and row["fool_rate"] is None for row in results["methods"].values())
    rows = (output / "results.md").read_text().splitlines()[2:5]
    assert [[cell.strip() for cell in row.split("|")[6:8]] for row in rows] == [["–", "–"]] * 3  # too few for a judge
    assert (output / "diversity.png").exists()


def test_the_table_is_of_the_chosen_images_and_their_labels(tiny_config, tmp_path, monkeypatch):
    given, original = [], metrics.score
    monkeypatch.setattr(metrics, "score", lambda *images: given.append(images) or original(*images))
    monkeypatch.setattr(utils, "draw_digits", draw_few_digits)
    run(tiny_config(num_images=50, num_training_steps=1), tmp_path / "output")
    images, labels = draw_few_digits(70, 16, 1, seed=1)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))[:50]
    for outputs, reference, low_res, context, given_labels, _ in given:
        assert len(outputs) == 50 and torch.equal(given_labels, labels[order])
        torch.testing.assert_close(reference, images[order] / 255)
        torch.testing.assert_close(low_res, utils.to_unit(utils.downsample(images[order] / 127.5 - 1, 4)))
        torch.testing.assert_close(context, utils.to_unit(utils.upsample(2 * low_res - 1, 16)))
    assert torch.equal(given[0][0], given[0][1]) and (given[1][0] - given[1][3]).abs().max() < 0.51 / 255


def test_a_signal_while_the_last_pictures_are_drawn_leaves_the_table_for_later(
    tiny_config, tmp_path, monkeypatch, capsys
):
    original = train_mnist.draw
    monkeypatch.setattr(train_mnist, "draw", lambda *a: signal.raise_signal(signal.SIGINT) or original(*a))
    monkeypatch.setattr(train_mnist, "evaluate", lambda *_: pytest.fail("went on"))
    with pytest.raises(SystemExit) as exit:
        run(tiny_config(num_images=50, num_training_steps=1), tmp_path / "output")
    assert exit.value.code == 130 and checkpoint_of(tmp_path / "output")["step"] == 1
    assert "stopped after step 1" in capsys.readouterr().out


def test_ctrl_c_while_judging_leaves_a_finished_run_to_be_judged_later(
    copy_of_finished, tiny_config, monkeypatch, capsys
):
    output = copy_of_finished[1]
    monkeypatch.setattr(metrics, "train_classifier", lambda *_: signal.raise_signal(signal.SIGINT))
    before = snapshot(output)
    with pytest.raises(SystemExit) as exit:
        run(tiny_config(num_images=10), output, "--resume")
    assert exit.value.code == 130 and snapshot(output) == before
    lines = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if "train_mnist.py: " in line]
    assert len(lines) == 1 and "--resume" in lines[0]


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: one line, status 2, and nothing is overwritten


@pytest.fixture
def refused(finished, tmp_path, capsys, monkeypatch):
    """Runs into an output folder with an earlier run; asserts the refusal, and returns its line."""
    monkeypatch.setattr(utils, "draw_digits", draw_few_digits)  # it never comes to training

    def refuse(config, *flags, output=None):
        if output is None:
            output = tmp_path / "output"
            if not output.exists():
                shutil.copytree(finished[1], output)
        before = snapshot(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run(config, output, *flags)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and snapshot(tmp_path) == before
        assert error.count("\n") == 1 and error.startswith("train_mnist.py: "), error
        return error

    return refuse


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"batch_size": "four"}, ["training.batch_size", "four", "int"]),
        ({"features": 16.0}, ["model.features", "16.0", "int"]),
        ({"channel_multipliers": "big"}, ["model.channel_multipliers", "big"]),
        ({"dropout": 1.5}, ["model.dropout", "1.5", "0.9"]),
        ({"dataset": "emnist"}, ["data.dataset", "emnist", "mnist"]),
        ({"image_size": 18, "channel_multipliers": [1, 2, 2]}, ["image_size", "18", "4"]),
        ({"low_res_size": 16}, ["low_res_size", "16"]),
        ({"low_res_size": 20}, ["low_res_size", "20", "16"]),
        ({"channels": 2}, ["channels", "2", "1", "3"]),
        ({"features": 8, "attention_heads": 3}, ["features", "8", "3"]),
        ({"steps": 30, "num_timesteps": 20}, ["sampling.steps", "30", "20"]),
        ({"precision": "float16"}, ["float16", "CPU", "auto"]),
    ],
    ids=str,
)
def test_bad_settings_are_refused(refused, tiny_config, changes, words):
    line = refused(tiny_config(**changes))
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("batch_size = 4", "batch_sise = 4", ["training.batch_sise", "batch_size"]),
        ("[model]", "[modell]", ["modell", "model"]),
        ("seed = 0", "", ["training.seed", "missing"]),
        ("[model]", "[model", ["tiny.toml", "TOML"]),
    ],
)
def test_a_config_with_wrong_keys_is_refused(refused, tiny_config, old, new, words):
    path = tiny_config()
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    line = refused(path)
    assert all(word in line for word in words), line


def test_a_missing_config_is_refused(refused, tmp_path):
    assert str(tmp_path / "none.toml") in refused(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num_training_steps", 0], ["num_training_steps", "0"]),
        (["--num_training_steps", -5], ["num_training_steps", "-5"]),
        (["--num_training_steps", "many"], ["num_training_steps", "many"]),
        (["--batch_size", 0], ["batch_size", "0"]),
        (["--batch_size", -1], ["batch_size", "-1"]),
        (["--seed", -1], ["seed", "-1"]),
        (["--learning_speed", 3], ["--learning_speed"]),
        (["--config_path"], ["--config_path"]),
        (["--device", "toaster"], ["toaster", "--device"]),
        (["--device", ""], ["device"]),
        (["--device", "meta"], ["meta", "device"]),
        (["--device", "cuda:99"], ["cuda:99", "--device"]),
    ],
    ids=str,
)
def test_bad_flags_are_refused(refused, tiny_config, flags, words):
    line = refused(tiny_config(), *flags)
    assert all(word in line for word in words), line


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available here")
def test_cuda_where_there_is_none_is_refused(refused, tiny_config):
    assert "cuda" in refused(tiny_config(), "--device", "cuda")


@pytest.mark.parametrize("fault", ["archive", "cut off", "nothing", "empty folder", "a file"])
def test_data_that_is_damaged_or_missing_is_refused(refused, tiny_config, write_mnist, tmp_path, fault):
    images = torch.zeros(4, 28, 28, dtype=torch.uint8)
    data_dir, word = tmp_path / "data", "damaged"
    config = tiny_config(dataset="mnist")  # falling back to digits is for data that is missing, not for damaged data
    if fault == "archive":
        (data_dir / "MNIST/raw").mkdir(parents=True)
        (data_dir / "MNIST/raw/train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b half a download")
    elif fault == "cut off":
        path = write_mnist(images, images) / "MNIST/raw/t10k-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:1000])
    elif fault == "a file":
        data_dir.write_bytes(b"")
        word = "can't be written"
    else:
        data_dir.mkdir()
        word = "downloaded" if fault == "nothing" else "no readable image"
        config = tiny_config(dataset="mnist", fallback="") if fault == "nothing" else tiny_config(dataset="folder")
    line = refused(config, "--data_dir", data_dir)
    assert word in line and str(data_dir) in line
    if fault == "nothing":
        assert "train-images-idx3-ubyte.gz" in line


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_an_output_folder_that_cannot_be_is_refused(refused, tiny_config, tmp_path, path):
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / path) in refused(tiny_config(), output=tmp_path / path)


def test_a_refused_run_makes_no_output_folder(refused, tiny_config, tmp_path):
    refused(tiny_config(channels=2), output=tmp_path / "new")
    refused(tiny_config(), "--resume", output=tmp_path / "new")
    refused(tiny_config(dataset="folder"), "--data_dir", tmp_path / "none", output=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("fault", ["missing", "empty", "cut off", "text", "other", "half"])
def test_what_is_no_checkpoint_cannot_be_resumed_or_loaded(refused, finished, copy_of_finished, fault):
    config, output = copy_of_finished
    path = output / "checkpoint.pt"
    whole = path.read_bytes()
    if fault == "missing":
        path.unlink()
    elif fault in ("other", "half"):
        kept = ["step"] if fault == "other" else ["step", "config", "dataset"]
        checkpoint = torch.load(path, weights_only=True)
        torch.save({key: checkpoint[key] for key in kept}, path)
    else:
        path.write_bytes({"empty": b"", "cut off": whole[: len(whole) // 2], "text": b"no checkpoint"}[fault])
    assert str(path) in refused(config, "--num_training_steps", 40, "--resume")
    with pytest.raises(utils.InputError, match=re.escape(str(path))):
        train_mnist.load_model(path)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"features": 16}, ["model.features", "16", "8"]),
        ({"channel_multipliers": [1, 1]}, ["model.channel_multipliers", "[1, 1]", "[1, 2]"]),
        ({"attention_heads": 4}, ["model.attention_heads", "4", "2"]),
        ({"channels": 3}, ["data.channels", "3", "1"]),
        ({"low_res_size": 8}, ["data.low_res_size", "8", "4"]),
        ({"num_timesteps": 1000}, ["diffusion.num_timesteps", "1000", "2000"]),
        ({"dataset": "mnist"}, ["mnist", "digits"]),
        ({"method": "regression"}, ["method", "regression", "sr3"]),
    ],
    ids=str,
)
def test_another_network_or_data_set_cannot_be_resumed(refused, tiny_config, write_mnist, changes, words):
    data_dir = write_mnist(*[torch.zeros(70, 28, 28, dtype=torch.uint8)] * 2)
    line = refused(tiny_config(**changes), "--data_dir", data_dir, "--num_training_steps", 40, "--resume")
    assert all(word in line for word in words), line


def test_a_schedule_that_leaves_nothing_to_divide_by_is_refused(refused, tiny_config):
    assert "0.9" in refused(tiny_config(beta_end=0.9))


def test_a_checkpoint_of_another_version_is_refused(refused, copy_of_finished, finished):
    config, output = copy_of_finished
    checkpoint = checkpoint_of(output)
    checkpoint["model"]["unet.renamed"] = checkpoint["model"].pop("unet.conv_in.weight")
    utils.save_checkpoint(output / "checkpoint.pt", checkpoint)
    assert "another version" in refused(config, "--resume", "--num_training_steps", "40", output=output)


def test_a_full_disk_at_the_start_is_refused_before_anything_is_moved(refused, tiny_config, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils.os, "fsync", full)
    assert "No space left" in refused(tiny_config())


def test_the_command_itself_refuses_in_one_line_with_status_2(tiny_config, tmp_path):
    """As a user sees it, from another folder, with the shipped config."""
    process = start(tmp_path, "--batch_size", "0")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 2 and out == "" and not list(tmp_path.iterdir())
    assert error.startswith("train_mnist.py: ") and error.count("\n") == 1 and "batch_size is 0" in error


def test_a_baseline_that_cannot_be_compared_is_refused(refused, judged, finished, tiny_config):
    (regression_config, _), (regression, output) = judged
    checkpoint = regression / "checkpoint.pt"
    line = refused(tiny_config(), "--regression_checkpoint", checkpoint)
    assert str(checkpoint) in line and "channels 3" in line and "channels 1" in line
    line = refused(tiny_config(channels=3), "--regression_checkpoint", output / "checkpoint.pt")
    assert "sr3 on digits" in line and "regression on digits" in line
    assert "leave it out" in refused(regression_config, "--regression_checkpoint", checkpoint)
    assert "none.pt" in refused(tiny_config(regression_checkpoint="none.pt"))
