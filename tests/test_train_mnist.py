"""train_mnist.py as its users run it: what a run writes, how it ends, how it goes on, what it refuses."""

import csv
import errno
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, cells, checkpoint_of, draw_few_digits, flags_of, lines_of, run, snapshot, write_tiny_config
from PIL import Image

import sr3
import train_mnist
import utils

pytestmark = pytest.mark.usefixtures("few_digits")
GRIDS = ("hr", "lr", "sr", "refinement")
HEADER = (
    "dataset,step,loss,learning_rate,images_per_second,"
    "psnr,ssim,consistency,bicubic_psnr,bicubic_ssim,bicubic_consistency"
)


@pytest.fixture(scope="module")
def finished(few_digits, tmp_path_factory):
    """The config and the output of one run of 20 steps; not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_tiny_config(folder / "tiny.toml")
    return config, run(config, folder / "output")


@pytest.fixture
def copy_of_finished(finished, tmp_path):
    return finished[0], Path(shutil.copytree(finished[1], tmp_path / "output"))


@pytest.fixture
def on_loss(monkeypatch):
    """Called with a function of a call's number, the model and the loss: it sees each loss, and may return another."""

    def patch(function):
        calls, original = [], sr3.SR3.loss

        def loss(self, *images):
            calls.append(len(images[0]))
            value = original(self, *images)
            other = function(len(calls), self, value)
            return value if other is None else other

        for name in ("loss", "forward"):  # the same by two names
            monkeypatch.setattr(sr3.SR3, name, loss)
        return calls  # the batch sizes

    return patch


def log_of(output):
    return list(csv.DictReader(io.StringIO((output / "log.csv").read_text())))


def exit_of(config, output, *flags):
    with pytest.raises(SystemExit) as exit:
        run(config, output, *flags)
    return exit.value.code


def assert_same_training(output, other):
    """Weights, averages and moments are equal to the last bit."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value

    parts = [[checkpoint_of(o)[part] for part in ("step", "model", "ema", "optimizer")] for o in (output, other)]
    same = list(map(plain, parts[0])) == list(map(plain, parts[1]))
    assert same


# ----------------------------------------------------------------------------------------------------------------------
# What a run writes


def test_a_run_writes_its_grids_log_and_checkpoint_and_nothing_else(tiny_config, tmp_path, monkeypatch, on_loss):
    """early_samples, every sample_every steps and the last one; a row of the log there and every LOG_EVERY steps."""
    assert train_mnist.LOG_EVERY == 100
    monkeypatch.setattr(train_mnist, "LOG_EVERY", 10)  # so that 25 steps will do
    losses = []
    on_loss(lambda number, model, loss: losses.append(loss.item()))
    output = run(tiny_config(early_samples=[3, 7], sample_every=14, num_training_steps=25), tmp_path / "output")

    drawn, logged = [3, 7, 14, 25], [3, 7, 10, 14, 20, 25]
    grids = [f"{name}-{step:06d}.png" for name in GRIDS for step in drawn]
    assert sorted(p.name for p in output.iterdir()) == sorted([*grids, "refinement.gif", "log.csv", "checkpoint.pt"])
    rows = log_of(output)
    assert (output / "log.csv").read_text().startswith(HEADER + "\n") and len(losses) == 25
    assert [int(row["step"]) for row in rows] == logged
    for row, before, step in zip(rows, [0, *logged], logged):
        mean = sum(losses[before:step]) / (step - before)
        assert float(row["loss"]) == pytest.approx(mean, rel=1e-4)  # of the steps since the row before
        assert float(row["learning_rate"]) == pytest.approx(1e-3 * step / 50, rel=1e-5)  # warming up
        assert float(row["images_per_second"]) > 0 and row["dataset"] == "digits"
        metrics = [row[key] for key in HEADER.split(",")[5:]]
        assert all(math.isfinite(float(m)) for m in metrics) if step in drawn else metrics == [""] * 6
    assert checkpoint_of(output)["step"] == 25 and checkpoint_of(output)["dataset"] == "digits"


def test_the_grids_show_the_first_64_test_digits_and_what_was_made_of_them(finished):
    _, output = finished
    images = draw_few_digits(10_000, 16, 1, seed=1)[0][:64]
    high_res, low_res, super_res = (cells(output / f"{name}-000020.png", 8) for name in ("hr", "lr", "sr"))
    assert torch.equal(high_res, images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3))
    squares = low_res.view(64, 4, 4, 4, 4, 3).permute(0, 1, 3, 2, 4, 5)  # [N, row, column, y, x, 3]
    assert (squares == squares[:, :, :, :1, :1]).all()
    expected = (utils.downsample(images / 127.5 - 1, 4)[:, 0] + 1) * 127.5  # [64, 4, 4]
    assert (squares[:, :, :, 0, 0, 0] - expected).abs().max() < 0.51  # rounded

    columns = 7  # low resolution, noise, three of the four refinement steps, super-resolution, high resolution
    rows = cells(output / "refinement-000020.png", columns).view(8, columns, 16, 16, 3)
    for column, expected in ((0, low_res), (-2, super_res), (-1, high_res)):
        assert torch.equal(rows[:, column], expected[:8])
    assert rows[:, 1].float().std() > 60  # noise

    error = (super_res[..., 0].double() - high_res[..., 0].double()) / 255
    psnr = (-10 * error.square().mean((1, 2)).log10()).mean().item()
    assert float(log_of(output)[-1]["psnr"]) == pytest.approx(psnr, abs=0.1)


def test_the_animation_goes_from_noise_to_the_super_resolution_grid_and_stays_there(finished):
    low_res, super_res = (cells(finished[1] / f"{name}-000020.png", 8)[:16] for name in ("lr", "sr"))
    frames, durations = [], []
    with Image.open(finished[1] / "refinement.gif") as animation:
        assert animation.n_frames == 5 and animation.info["loop"] == 0  # y_T, …, y_0; again and again
        assert animation.size == (2 * (8 * 18 + 2), 2 * (4 * 18 + 2))
        for i in range(5):
            animation.seek(i)
            frames.append(cells(animation, 8, scale=2).view(16, 2, 16, 16, 3))  # x beside y_t
            durations.append(animation.info["duration"])
    assert all(torch.equal(frame[:, 0], low_res) for frame in frames) and durations[-1] > 2 * durations[0]
    assert frames[0][:, 1].float().std() > 60  # noise
    assert (frames[-1][:, 1].int() - super_res.int()).abs().max() <= 1


@pytest.mark.parametrize("name", ["mnist", "digits"])
def test_every_output_names_the_data_set_that_was_used(small_mnist, tiny_config, tmp_path, capsys, name):
    """That is drawn digits where MNIST is neither there nor to be downloaded, with an unmistakable warning."""
    data_dir = small_mnist if name == "mnist" else tmp_path / "none"
    flags = ["--data_dir", data_dir, "--num_training_steps", 2]
    output = run(tiny_config(dataset="mnist"), tmp_path / "output", *flags)
    for grid in GRIDS:
        assert Image.open(output / f"{grid}-000002.png").getexif()[0x010E] == f"{name}, step 2"
    assert log_of(output)[0]["dataset"] == checkpoint_of(output)["dataset"] == name
    out, error = capsys.readouterr()
    assert out.startswith({"mnist": "mnist: 100 images", "digits": "digits: 3,000 images"}[name])
    for words in ("!" * 80, "WARNING", "DRAWN DIGITS", str(data_dir), "train-images-idx3-ubyte.gz"):
        assert (words in error) == (name == "digits")


def test_flags_win_over_the_config_and_paths_are_of_the_current_folder(
    finished, tiny_config, tmp_path, monkeypatch, on_loss
):
    sizes, config = on_loss(lambda *_: None), tiny_config()
    monkeypatch.chdir(tmp_path)
    run(config.name, "output", "--num_training_steps", 3, "--batch_size", 2, "--seed", 5)
    checkpoint, other = checkpoint_of(tmp_path / "output"), checkpoint_of(finished[1])  # of seed 0
    training = checkpoint["config"]["training"]
    assert (training["num_training_steps"], training["batch_size"], training["seed"]) == (3, 2, 5) and sizes == [2] * 3
    name = "unet.conv_in.weight"
    assert (checkpoint["model"][name] - other["model"][name]).abs().mean() > 0.05  # other weights from the beginning


def test_a_regression_run_on_two_colour_pictures_writes_the_same_grids_without_noise(tiny_config, tmp_path):
    for i in range(11):  # two of them for testing
        Image.new("RGB", (20, 18), (20 * i, 100, 200)).save(tmp_path / f"{i:02}.png")
    config = tiny_config(method="regression", dataset="folder", channels=3, num_training_steps=1)
    output = run(config, tmp_path / "output", "--data_dir", tmp_path)
    names = [*(f"{name}-000001.png" for name in GRIDS), "checkpoint.pt", "log.csv"]
    assert sorted(p.name for p in output.iterdir()) == sorted(names)
    assert log_of(output)[-1]["psnr"] and isinstance(sr3.load_model(output / "checkpoint.pt"), sr3.Regression)
    rows = cells(output / "refinement-000001.png", 3).view(2, 3, 16, 16, 3)
    for column, name in enumerate(("lr", "sr", "hr")):
        assert torch.equal(rows[:, column], cells(output / f"{name}-000001.png", 2))


def test_a_short_training_beats_bicubic(tiny_config, tmp_path):
    training = {"batch_size": 32, "learning_rate": 5e-3, "warmup_steps": 20, "ema_decay": 0.97}
    config = tiny_config(**training, low_res_size=8, steps=6, num_training_steps=160, sample_every=160)
    row = log_of(run(config, tmp_path / "output", "--seed", 2))[-1]
    assert float(row["psnr"]) > float(row["bicubic_psnr"]) + 0.3


# ----------------------------------------------------------------------------------------------------------------------
# The weights


def test_drawing_never_changes_training(tiny_config, tmp_path):
    few = run(tiny_config(num_training_steps=8, dropout=0.2), tmp_path / "few")
    many = run(tiny_config(num_training_steps=8, dropout=0.2, early_samples=[1, 2, 5, 7]), tmp_path / "many")
    assert len(log_of(many)) == 5
    assert_same_training(few, many)


def test_the_ema_is_the_running_average_of_the_weights(tiny_config, tmp_path, on_loss):
    weights = []  # as each step finds them

    def see(_, model, __):
        weights.append({name: w.detach().double().clone() for name, w in model.named_parameters()})

    on_loss(see)
    config = tiny_config(ema_decay=0.5, learning_rate=0.01, warmup_steps=0, num_training_steps=10)
    checkpoint = checkpoint_of(run(config, tmp_path / "output"))
    weights = [*weights[1:], {name: checkpoint["model"][name].double() for name in weights[0]}]  # after steps 1 … 10
    average = weights[0]
    for step, now in enumerate(weights[1:], start=2):
        decay = min(0.5, (1 + step) / (10 + step))  # 3/12, 4/13, … 9/18, 0.5, 0.5
        average = {name: decay * average[name] + (1 - decay) * now[name] for name in now}
    for name, value in average.items():
        torch.testing.assert_close(checkpoint["ema"][name].double(), value, atol=1e-6, rtol=1e-5)


def test_load_model_draws_the_super_resolution_grid_with_the_averaged_weights(finished):
    _, output = finished
    model, checkpoint = sr3.load_model(str(output / "checkpoint.pt")), checkpoint_of(output)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(weight, checkpoint["ema"][name]) for name, weight in model.state_dict().items())
    assert not torch.equal(model.unet.conv_in.weight, checkpoint["model"]["unet.conv_in.weight"])
    context = utils.upsample(utils.downsample(draw_few_digits(10_000, 16, 1, seed=1)[0][:64] / 127.5 - 1, 4), 16)
    generator = torch.Generator().manual_seed(0)  # the config's seed
    y_T = torch.randn(context.shape, generator=generator)
    images = model.sample(context, steps=4, generator=generator, y_T=y_T)
    expected = (images.clamp(-1, 1) + 1) * 127.5
    assert (cells(output / "sr-000020.png", 8)[..., 0] - expected[:, 0]).abs().max() < 0.6  # rounded


def test_telling_the_duration_of_a_long_run_on_a_cpu_changes_nothing(tiny_config, tmp_path, monkeypatch, capsys):
    def train(run):  # not to the end
        print("begins")
        for _ in range(3):
            train_mnist.training_step(run)
        train_mnist.save(run, with_checkpoint=True)

    monkeypatch.setattr(train_mnist, "train", train)
    run(tiny_config(dropout=0.2), tmp_path / "999", "--num_training_steps", 999)
    assert "minutes" not in capsys.readouterr().out
    run(tiny_config(dropout=0.2), tmp_path / "1000", "--num_training_steps", 1000)
    told = r"\n.*1,000 steps .* \d+ minutes; .* --num_training_steps 1000\nbegins\n"
    assert len(re.findall(told, capsys.readouterr().out)) == 1
    assert_same_training(tmp_path / "999", tmp_path / "1000")


# ----------------------------------------------------------------------------------------------------------------------
# Stopping and going on


def start(cwd, *flags, stdout=subprocess.DEVNULL):
    command = [sys.executable, str(ROOT / "train_mnist.py"), *flags]
    return subprocess.Popen(command, cwd=cwd, text=True, encoding="utf-8", stdout=stdout, stderr=subprocess.PIPE)


def test_a_killed_run_resumes_bit_for_bit(tiny_config, small_mnist, tmp_path):
    config = tiny_config(dataset="mnist", precision="auto", dropout=0.1, sample_every=5)
    killed, whole, flags = tmp_path / "killed", tmp_path / "whole", ["--data_dir", small_mnist, "--num_training_steps"]
    process, deadline = start(tmp_path, *flags_of(config.name, "killed", *flags, 900)), time.monotonic() + 120
    try:
        while not (killed / "checkpoint.pt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    step = checkpoint_of(killed)["step"]  # 5, or a later one where this test was slow to kill
    assert process.returncode == -signal.SIGKILL and step % 5 == 0
    run(config, killed, *flags, step + 20, "--resume")
    run(config, whole, *flags, step + 20)
    assert_same_training(killed, whole)
    logs = [[row | {"images_per_second": ""} for row in log_of(output)] for output in (killed, whole)]
    assert logs[0] == logs[1] and len(logs[0]) == step // 5 + 4
    for path in [*whole.glob("*.png"), whole / "refinement.gif"]:
        assert (killed / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("number, where, last", [(signal.SIGINT, "step", 7), (signal.SIGTERM, "bar", 11)])
def test_a_signal_lets_the_step_finish_and_the_run_goes_on_later(
    finished, tmp_path, monkeypatch, capsys, on_loss, number, where, last
):
    """At whatever moment it comes, here in step 7 or after step 10, what the script says was last is saved."""
    (config, uninterrupted), output, signals = finished, tmp_path / "output", [number]

    def interrupt(here):
        if here and signals:
            signal.raise_signal(signals.pop())

    calls = on_loss(lambda i, *_: interrupt(where == "step" and i == 7))
    monkeypatch.setattr(train_mnist.tqdm, "set_postfix_str", lambda *_: interrupt(where == "bar"))
    assert exit_of(config, output) == 128 + number
    out = capsys.readouterr().out
    assert f"stopped after step {last};" in out and "--resume" in out
    assert checkpoint_of(output)["step"] == last and [row["step"] for row in log_of(output)] == [str(last)]
    assert sorted(p.name for p in output.glob("*.png")) == sorted(f"{name}-{last:06d}.png" for name in GRIDS)
    run(config, output, "--resume")
    assert len(calls) == 20
    assert_same_training(output, uninterrupted)


def test_a_signal_during_the_last_step_does_not_promise_more(tiny_config, tmp_path, capsys, on_loss):
    on_loss(lambda *_: signal.raise_signal(signal.SIGINT))
    run(tiny_config(), tmp_path / "output", "--num_training_steps", 1)
    assert checkpoint_of(tmp_path / "output")["step"] == 1 and "goes on" not in capsys.readouterr().out


def test_a_second_run_moves_what_the_first_left_and_loses_nothing(copy_of_finished, capsys):
    config, output = copy_of_finished
    expected = {Path("earlier-1") / path: content for path, content in snapshot(output).items()}
    (output / "notes.txt").write_text("mine")
    for i, steps in enumerate((1, 2), start=1):
        run(config, output, "--num_training_steps", steps)
        assert f"earlier-{i}" in capsys.readouterr().out and checkpoint_of(output)["step"] == steps
        found = snapshot(output)
        assert expected.items() <= found.items() and found[Path("notes.txt")] == b"mine"
        new = {path: content for path, content in found.items() if len(path.parts) == 1 and path.name != "notes.txt"}
        assert len(new) == 7 and not list(output.glob("*-000020.png"))
        expected |= {Path(f"earlier-{i + 1}") / path: content for path, content in new.items()}


@pytest.mark.parametrize("value, resumed", [(math.nan, True), (math.inf, False)])
def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_overwritten(
    copy_of_finished, tmp_path, capsys, on_loss, value, resumed
):
    """The line speaks of a checkpoint only where there is one."""
    config, output = copy_of_finished
    on_loss(lambda number, model, loss: loss * value if number == 5 else None)
    before = snapshot(output) if resumed else {Path("log.csv"): HEADER.encode() + b"\n"}
    output, flags = (output, ["--resume"]) if resumed else (tmp_path / "new", [])
    assert exit_of(config, output, "--num_training_steps", 40, *flags) == 1
    (line,) = lines_of("train_mnist.py: ", capsys.readouterr().err)
    assert (
        "finite" in line and (f"{output / 'checkpoint.pt'} is as it was" in line) == ("checkpoint" in line) == resumed
    )
    assert snapshot(output) == before


def test_a_full_disk_leaves_the_last_checkpoint_and_one_line(copy_of_finished, capsys):
    resource, (config, output) = pytest.importorskip("resource"), copy_of_finished
    before, limits = (output / "checkpoint.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # room for grids, not for a checkpoint
    try:
        assert exit_of(config, output, "--num_training_steps", 22, "--resume") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = lines_of("train_mnist.py: ", capsys.readouterr().err)
    assert str(output / "checkpoint.pt") in line and (output / "checkpoint.pt").read_bytes() == before
    assert (output / "sr-000022.png").exists() and not list(output.glob("*.tmp"))


def test_a_log_that_cannot_be_replaced_is_only_warned_of(copy_of_finished, monkeypatch, capsys):
    """As where a spreadsheet has it open: the checkpoint, which has its rows too, is written before."""
    config, output = copy_of_finished
    original, before, written = os.replace, (output / "log.csv").read_bytes(), []

    def replace(source, target):
        written.append(target.name)
        if target.name == "log.csv":
            raise PermissionError(errno.EACCES, "Permission denied", str(target))
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    run(config, output, "--num_training_steps", 22, "--resume")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "log.csv" in line]
    assert len(warnings) == 2 and all("Permission denied" in line and "going on" in line for line in warnings)
    assert written[-2:] == ["checkpoint.pt", "log.csv"] and (output / "log.csv").read_bytes() == before
    assert [row[1] for row in checkpoint_of(output)["log"]] == [20, 22]


def test_a_run_in_float32_resumes_in_float16(copy_of_finished, monkeypatch):
    """As where a CPU's checkpoint goes on on a GPU without bfloat16."""
    config, output = copy_of_finished
    monkeypatch.setattr(utils, "choose_precision", lambda *_: torch.float16)
    checkpoint = checkpoint_of(run(config, output, "--num_training_steps", 22, "--resume"))
    assert checkpoint["step"] == 22 and all(value.isfinite().all() for value in checkpoint["model"].values())


@pytest.mark.parametrize("layouts", [("channels_last", "contiguous_format"), ("contiguous_format", "channels_last")])
def test_a_run_goes_on_in_another_memory_layout(tiny_config, tmp_path, monkeypatch, layouts):
    """As between a CPU and a GPU: the moments of Adam are the same numbers, and lie in memory as their weights do."""
    config, (old, new), looked, train = tiny_config(), (getattr(torch, name) for name in layouts), [], train_mnist.train
    monkeypatch.setattr(utils, "choose_layout", lambda *_: old)
    changed, same = (run(config, tmp_path / name, "--num_training_steps", 5) for name in ("changed", "same"))
    moments = checkpoint_of(changed)["optimizer"]["state"]
    run(config, same, "--num_training_steps", 10, "--resume")

    def look(run):
        for i, weight in enumerate(run.model.parameters()):
            for name in ("exp_avg", "exp_avg_sq"):
                moment = run.optimizer.state[weight][name]
                assert torch.equal(moment, moments[i][name]) and moment.stride() == weight.stride()
        looked.append(run.model.unet.middle.block.conv1.weight.is_contiguous(memory_format=new))
        train(run)

    monkeypatch.setattr(utils, "choose_layout", lambda *_: new)
    monkeypatch.setattr(train_mnist, "train", look)
    run(config, changed, "--num_training_steps", 10, "--resume")
    changed, same = (torch.cat([w.flatten() for w in checkpoint_of(o)["model"].values()]) for o in (changed, same))
    assert looked == [True] and changed.isfinite().all()
    assert (changed - same).abs().mean() < 1e-5  # five steps later, of up to 2e-4 each


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong: one line, status 2, and nothing is overwritten


@pytest.fixture
def refused(finished, tmp_path, capsys):
    """Runs into an output folder with an earlier run; asserts the refusal, and returns its line."""

    def refuse(config, *flags, output=tmp_path / "output"):
        if output == tmp_path / "output" and not output.exists():
            shutil.copytree(finished[1], output)
        before = snapshot(tmp_path)
        capsys.readouterr()
        assert exit_of(config, output, *flags) == 2 and snapshot(tmp_path) == before
        error = capsys.readouterr().err
        assert error.count("\n") == len(lines_of("train_mnist.py: ", error)) == 1, error
        return error

    return refuse


BAD_FLAGS = {
    "--num_training_steps 0": "num_training_steps is 0",
    "--num_training_steps many": "num_training_steps: invalid int value: 'many'",
    "--batch_size -1": "batch_size is -1",
    "--seed -1": "seed is -1",
    "--learning_speed 3": "--learning_speed",
    "--device toaster": "device toaster is not one of cuda, mps and cpu",
    "--device cuda:99": "device cuda:99 is not there",
    "--config_path none.toml": "config none.toml can't be read: No such file",
}


@pytest.mark.parametrize("flags, words", BAD_FLAGS.items())
def test_bad_flags_are_refused(refused, tiny_config, flags, words):
    assert words in refused(tiny_config(), *flags.split())


def test_settings_and_data_that_do_not_go_with_this_machine_are_refused(refused, tiny_config, tmp_path):
    assert '"auto"' in refused(tiny_config(precision="float16"))  # on a CPU
    line = refused(tiny_config(dataset="mnist", fallback=""), "--data_dir", tmp_path)
    assert "train-images-idx3-ubyte.gz" in line and str(tmp_path) in line


def test_a_refused_run_makes_no_output_folder(refused, tiny_config, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        assert str(path) in refused(tiny_config(), output=path)
    refused(tiny_config(channels=2), output=tmp_path / "new")
    assert "--output_dir" in refused(tiny_config(), "--resume", output=tmp_path / "new")
    refused(tiny_config(dataset="folder"), "--data_dir", tmp_path / "none", output=tmp_path / "new")
    assert not (tmp_path / "new").exists()


OTHER_RUNS = {  # than of 8 features from 4×4 in 2000 steps, an SR3 of digits
    "model.features is 16, in the checkpoint it is 8": {"features": 16},
    "data.low_res_size is 8, in the checkpoint it is 4": {"low_res_size": 8},
    "diffusion.num_timesteps is 1000, in the checkpoint it is 2000": {"num_timesteps": 1000},
    "data.dataset is mnist, in the checkpoint it is digits": {"dataset": "mnist"},
    "method is regression, in the checkpoint it is sr3": {"method": "regression"},
}


@pytest.mark.parametrize("words", OTHER_RUNS)
def test_another_network_or_data_set_cannot_be_resumed(refused, tiny_config, small_mnist, words):
    assert words in refused(tiny_config(**OTHER_RUNS[words]), "--data_dir", small_mnist, "--resume")


def moments_of(checkpoint):
    return next(m for m in checkpoint["optimizer"]["state"].values() if m["exp_avg"].ndim == 2)


FAULTS = {
    "no weights": lambda c: c.update(model={}),
    "another weight's name": lambda c: c["model"].update(renamed=c["model"].pop("unet.conv_in.weight")),
    "no diffusion": lambda c: c["config"].pop("diffusion"),
    "no config": lambda c: c.update(config=None),
    "step": lambda c: c.update(step="x"),
    "log": lambda c: c.update(log=None),
    "short moment": lambda c: moments_of(c).update(exp_avg=moments_of(c)["exp_avg"][:1]),
    "transposed moment": lambda c: moments_of(c).update(exp_avg_sq=moments_of(c)["exp_avg_sq"].T),
    "optimizer": lambda c: c.update(optimizer={}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_checkpoint_cannot_be_resumed(refused, copy_of_finished, fault):
    config, output = copy_of_finished
    checkpoint = checkpoint_of(output)
    FAULTS[fault](checkpoint)
    utils.save_checkpoint(output / "checkpoint.pt", checkpoint)
    assert str(output / "checkpoint.pt") in refused(config, "--resume", "--num_training_steps", 40)


UNREADABLE = {
    "Permission denied": PermissionError(13, "Permission denied", "checkpoint.pt"),
    "Input/output error": OSError(5, "Input/output error"),
    "memory": MemoryError(),
    "can't allocate memory": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
}


@pytest.mark.parametrize("reason", UNREADABLE)
def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(refused, tiny_config, monkeypatch, reason):
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(UNREADABLE[reason]))
    line = refused(tiny_config(), "--resume", "--num_training_steps", 40)
    assert "checkpoint.pt can't be read" in line and reason in line.split("can't be read")[1]
    assert not any(word in line for word in ("delete", "damaged"))


OUT_OF_MEMORY = [
    RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory"),
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cpu", "cuda"])
def test_out_of_memory_asks_for_a_smaller_batch_in_one_line(tiny_config, tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(train_mnist, "training_step", lambda _: (_ for _ in ()).throw(error))
    assert exit_of(tiny_config(), tmp_path / "output") == 2
    (line,) = lines_of("train_mnist.py: ", capsys.readouterr().err)
    assert "batch_size" in line


def test_a_full_disk_at_the_start_is_refused_before_anything_is_moved(refused, tiny_config, monkeypatch):
    error = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(error))
    assert "No space left" in refused(tiny_config())


@pytest.mark.parametrize("kind", ["closed pipe", "full device"])
def test_an_output_that_takes_no_more_is_named_in_one_line(tiny_config, small_mnist, tmp_path, kind):
    if kind == "full device" and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    flags = flags_of(tiny_config(dataset="mnist"), "output", "--data_dir", small_mnist, "--num_training_steps", 1)
    reader, writer = os.pipe() if kind == "closed pipe" else [os.open("/dev/full", os.O_WRONLY) for _ in range(2)]
    os.close(reader)  # as with `| head -0`
    process = start(tmp_path, *flags, stdout=writer)
    os.close(writer)
    error = process.communicate(timeout=120)[1]
    (line,) = lines_of("train_mnist.py: ", error)
    assert process.returncode == 2 and re.search("output: (Broken pipe|No space left)", line)
    assert "Exception ignored" not in error
