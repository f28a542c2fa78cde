"""train_mnist.py as its users run it: what a run writes, how it ends, how it goes on, what it refuses."""

import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, call, cells, checkpoint_of, command, flags_of, log_of, raising, run, snapshot
from PIL import Image, ImageSequence

import train_mnist
from support.digits import draw_digits
from support.settings import DEFAULTS, FIXED
from utils import load_model, make_pair
from sr3 import SR3
from unet import UNet

GRIDS = ("hr", "lr", "refinement", "sr")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output of one run of 20 steps; not to be written to."""
    return run(tmp_path_factory.mktemp("finished") / "output")


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "output"))


def at_each_step(monkeypatch, function):
    """What the function makes of step, model and loss becomes the loss of that step of this process."""
    forward, steps = SR3.forward, itertools.count(1)
    monkeypatch.setattr(SR3, "forward", lambda self, *batch: function(next(steps), self, forward(self, *batch)))


def assert_same_training(output, other):
    """Weights, averages and moments are equal to the last bit."""
    parts = ("step", "model", "ema", "optimizer")
    found, expected = ({part: checkpoint_of(o)[part] for part in parts} for o in (output, other))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_run_logs_and_averages_its_weights_and_is_not_changed_by_drawing(finished, tmp_path, monkeypatch, capsys):
    """early_samples, every sample_every steps and the last one; a row of the log there and every LOG_EVERY steps."""
    losses, weights = [], []

    def remember(step, model, loss):
        losses.append(loss.item())
        weights.append([weight.detach().double() for weight in model.parameters()])  # before the step
        return loss

    at_each_step(monkeypatch, remember)
    monkeypatch.setattr(train_mnist, "LOG_EVERY", 8)
    output = run(tmp_path / "out put", early_samples=[3], sample_every=14)
    drawn, logged, rows = [3, 14, 20], [3, 8, 14, 16, 20], log_of(output)
    grids = [f"{name}-{step:06d}.png" for name in GRIDS for step in drawn]
    assert sorted(snapshot(output)) == sorted([*grids, "refinement.gif", "progress.png", "log.csv", "checkpoint.pt"])
    header = "dataset,step,loss,learning_rate,psnr,ssim,consistency"
    assert [int(row["step"]) for row in rows] == logged and ",".join(rows[0]) == header
    for row, before, step in zip(rows, [0, *logged], logged):
        mean = sum(losses[before:step]) / (step - before)  # since the row before
        assert float(row["loss"]) == pytest.approx(mean, rel=1e-4)
        assert float(row["learning_rate"]) == pytest.approx(1e-3 * step / 50, rel=1e-5)  # warming up
        assert row["dataset"] == "digits"
        assert all(cell == f"{float(cell):.6g}" for cell in list(row.values())[2:] if cell)
        metrics = [row[key] for key in ("psnr", "ssim", "consistency")]
        assert all(math.isfinite(float(m)) for m in metrics) if step in drawn else metrics == [""] * 3
    assert_same_training(output, finished)  # which drew at the end only
    checkpoint, average = checkpoint_of(output), weights[0]
    for step, now in enumerate([*weights[1:], checkpoint["model"].values()], start=1):
        decay = (1 + step) / (10 + step)  # 2/11, 3/12, …
        average = [decay * old + (1 - decay) * new for old, new in zip(average, now)]
    torch.testing.assert_close([value.double() for value in checkpoint["ema"].values()], average, atol=1e-6, rtol=1e-5)
    out = capsys.readouterr().out  # what will be there is said first, how to go on last, as a shell takes it
    assert out.startswith("digits: 3,000 images; 1 × cpu, float32.") and "progress.png" in out
    assert f"evaluate.py '{output}/checkpoint.pt'" in out and f"sample.py '{output}/checkpoint.pt'" in out


def assert_shows(picture, columns, images, atol=0.6):
    """A grid shows grey images in [-1, 1], rounded."""
    expected = (images.clamp(-1, 1) + 1).permute(0, 2, 3, 1) * 127.5
    torch.testing.assert_close(cells(picture, columns).float(), expected.expand(-1, -1, -1, 3), atol=atol, rtol=0)


def test_the_pictures_show_64_test_digits_and_what_the_averaged_weights_make_of_them(finished):
    model, average = load_model(finished / "checkpoint.pt"), checkpoint_of(finished)["ema"]
    assert not any(module.training for module in model.modules()) and model.step == 20
    assert all(torch.equal(weight, average[name]) for name, weight in model.state_dict().items())
    high_res, small, context = make_pair(draw_digits(500, 16, 1, seed=1)[0][:64], 4)
    low_res = small.repeat_interleave(4, 2).repeat_interleave(4, 3)  # each pixel a square
    generators = [torch.Generator().manual_seed(number) for number in range(64)]  # an image's seed is its number
    y_t, y_0_hat = ([pair[i] for pair in model.refine(context, 4, generators)] for i in (0, 1))
    generators = [torch.Generator().manual_seed(number) for number in range(64)]
    y_t, y_0_hat = zip(*model.refine(context, 4, generators))
    for name, images in (("hr", high_res), ("lr", low_res), ("sr", y_t[-1])):
        assert_shows(finished / f"{name}-000020.png", 8, images)
    error = ((y_t[-1].clamp(-1, 1).double() - high_res.double()) / 2).square().mean((1, 2, 3))
    assert float(log_of(finished)[-1]["psnr"]) == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)

    # The refinement shows the eight digits that are farthest from their first ŷ_0.
    chosen = (y_0_hat[0] - y_t[-1]).double().square().mean((1, 2, 3)).topk(8).indices
    columns = torch.stack([low_res, *y_0_hat[:3], y_t[-1], high_res], dim=1)
    assert_shows(finished / "refinement-000020.png", 6, columns[chosen].flatten(0, 1))
    with Image.open(finished / "refinement.gif") as animation:  # x, ŷ_0 and y_t of each step; again and again
        assert animation.n_frames == 4 and animation.info["loop"] == 0
        for now, estimate, frame in zip(y_t, y_0_hat, ImageSequence.Iterator(animation)):
            assert_shows(frame, 12, torch.stack([low_res, estimate, now], dim=1)[:16].flatten(0, 1), atol=1.6)
        assert animation.info["duration"] > 1000  # milliseconds: the last frame pauses


def test_progress_shows_the_same_digits_at_up_to_eight_steps_and_goes_on_when_resumed(tmp_path):
    steps = range(1, 15)
    output = run(tmp_path / "output", early_samples=[*steps], num_training_steps=7)
    run(output, "--resume", early_samples=[*steps], num_training_steps=14)
    rows = Image.open(output / "progress.png").crop((90, 0, 90 + 8 * 36 + 4, 9 * 36))
    shown = [f"sr-{step:06d}.png" for step in (1, 2, 3, 5, 7, 10, 14)] + ["hr-000014.png"]  # 14^(i / 7), rounded
    rows = Image.open(output / "progress.png")
    assert rows.height == 36 * len(shown)
    for i, name in enumerate(shown):
        expected = Image.open(output / name).crop((0, 0, rows.width - 90, 36))
        assert rows.crop((90, 36 * i, rows.width, 36 * (i + 1))).tobytes() == expected.convert("RGB").tobytes()


def test_a_regression_writes_the_same_grids_without_noise(tmp_path):
    output = run(tmp_path / "output", method="regression", channels=3, num_training_steps=1)
    pictures = [*(f"{name}-000001.png" for name in GRIDS), "progress.png"]
    assert sorted(snapshot(output, ".png", ".gif")) == sorted(pictures)
    columns = cells(output / "refinement-000001.png", 3).view(8, 3, 16, 16, 3)
    shown = [cells(output / f"{name}-000001.png", 8) for name in ("lr", "sr", "hr")]
    chosen = [next(i for i in range(64) if torch.equal(shown[2][i], row[2])) for row in columns]
    assert torch.equal(columns, torch.stack(shown, dim=1)[chosen])


def test_without_mnist_digits_are_drawn_with_a_loud_warning_and_named_in_log_and_checkpoint(tmp_path, capsys):
    output = run(tmp_path / "output", "--data_dir", tmp_path / "no", dataset="mnist", num_training_steps=2)
    assert log_of(output)[0]["dataset"] == checkpoint_of(output)["config"]["dataset"] == "digits"
    out, error = capsys.readouterr()
    words = ("!" * 80, "WARNING", "DRAWN DIGITS", str(tmp_path / "no"), "train-images-idx3-ubyte.gz")
    assert out.startswith("digits: 3,000 images") and all(word in error for word in words)


def test_settings_are_those_of_a_config_file_or_flags_and_flags_win(finished, tmp_path, monkeypatch):
    """Paths are those of the current folder."""
    monkeypatch.chdir(tmp_path)
    lines = TINY | {"features": 64, "early_samples": [1]}
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items())
    Path("tiny.toml").write_text(text, encoding="utf-8-sig")  # as Windows' Notepad does
    flags = ["--config_path", "tiny.toml", "--output_dir", "output", "--device", "cpu"]
    call(train_mnist, *flags, "--features", 8, "--early_samples")
    for output in (tmp_path / "output", finished):
        assert checkpoint_of(output)["config"] == DEFAULTS | TINY
    assert_same_training(tmp_path / "output", finished)


def test_a_short_training_beats_bicubic(tmp_path):
    network = {"channel_multipliers": [1], "attention_resolutions": [], "low_res_size": 12, "dropout": 0}
    training = {"batch_size": 16, "learning_rate": 0.01, "warmup_steps": 5, "num_training_steps": 200}
    output = run(tmp_path / "output", **network, **training, sample_every=200)
    y_0, _, context = make_pair(draw_digits(500, 16, 1, seed=1)[0][:64], 12)
    bicubic = -10 * ((context - y_0) / 2).square().mean((1, 2, 3)).log10().mean()
    assert float(log_of(output)[-1]["psnr"]) > bicubic + 0.5


def test_a_run_keeps_its_folder_until_it_is_killed_and_resumes_bit_for_bit(small_mnist, tmp_path, failure):
    killed, whole, data = tmp_path / "killed", tmp_path / "whole", ["--data_dir", small_mnist]
    settings = {"dataset": "mnist", "precision": "auto", "sample_every": 5}
    flags = command(killed, *data, **settings, num_training_steps=900)
    process, deadline = subprocess.Popen([sys.executable, ROOT / "train_mnist.py", *flags]), time.monotonic() + 120
    try:
        while not (killed / "log.csv").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)
        for resumed in ([], ["--resume"]):
            assert f"another run writes to {killed}" in failure(run, killed, *data, *resumed, **settings)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    step = checkpoint_of(killed)["step"]  # 5, or a later one where this test was slow to stop it
    for output, flags in ((killed, [*data, "--resume"]), (whole, data)):
        run(output, *flags, **settings, num_training_steps=step + 10)
    assert_same_training(killed, whole)


@pytest.mark.parametrize("number, last", [(signal.SIGINT, 7), (signal.SIGTERM, 11), (signal.SIGINT, 20)])
def test_a_signal_lets_the_step_finish_and_the_run_goes_on(finished, tmp_path, monkeypatch, capsys, number, last):
    """In step 7, after step 10, or in the last one: what is said to be last is saved, undrawn where there is more."""
    output, handler, signals = tmp_path / "output", signal.getsignal(number), [number]

    def interrupt(*_):
        if signals:
            signal.raise_signal(signals.pop())

    if last == 11:
        monkeypatch.setattr(train_mnist.tqdm, "set_postfix_str", interrupt)
    else:
        at_each_step(monkeypatch, lambda step, model, loss: (step == last and interrupt()) or loss)
    try:
        run(output, early_samples=[last])
        assert last == 20
    except SystemExit as exit:
        assert exit.code == 128 + number and list(snapshot(output)) == ["checkpoint.pt", "log.csv"]
    assert (f"stopped after step {last}; the same command with --resume" in capsys.readouterr().out) == (last < 20)
    assert checkpoint_of(output)["step"] == last and [row["step"] for row in log_of(output)] == [str(last)]
    assert signal.getsignal(number) == handler
    assert_same_training(run(output, "--resume"), finished)


def test_a_second_run_moves_what_the_first_left_and_loses_nothing(copied, capsys):
    for name in ("results.md", "comparison.png"):
        (copied / name).write_text("of evaluate.py")
    (copied / "notes.txt").write_text("mine")
    expected = {"notes.txt": b"mine"}
    for i in (1, 2):
        earlier = {name: content for name, content in snapshot(copied).items() if "/" not in name}
        expected |= {f"earlier-{i}/{name}": earlier[name] for name in earlier.keys() - {"notes.txt"}}
        run(copied, num_training_steps=i)
        found, new = snapshot(copied), {"log.csv", "checkpoint.pt", "refinement.gif", "progress.png"}
        new |= {f"{name}-{i:06d}.png" for name in GRIDS}
        assert expected.items() <= found.items() and found.keys() - expected.keys() == new
        assert f"earlier-{i}" in capsys.readouterr().out and checkpoint_of(copied)["step"] == i


def test_what_is_not_finite_ends_a_run_before_it_overwrites(copied, tmp_path, failure, monkeypatch):
    """A loss, in a resumed run, or a weight in a new one."""

    def spoil(step, model, loss):
        if step == 21:  # the last of the new run
            model.unet.conv_in.weight.data[0] = math.inf
        return loss * math.nan if step == 1 else loss

    at_each_step(monkeypatch, spoil)
    assert "is not finite: not saved" in failure(run, copied, "--resume", num_training_steps=21, status=1)
    assert "is not finite: not saved" in failure(run, tmp_path / "new", status=1)


@pytest.mark.parametrize("name", ["log.csv", "checkpoint.pt", "progress.png"])
def test_a_file_that_cannot_be_written_ends_a_run_only_where_it_is_the_last_one(copied, monkeypatch, capsys, name):
    """As where a spreadsheet has it open, or the disk is full for a while: here until step 22, or for good."""
    replace = os.replace

    def refuse(until, source, target):
        if target.name == until:
            monkeypatch.setattr(os, "replace", replace)
        raising(PermissionError(13, "Locked"))() if target.name == name else replace(source, target)

    for until, step, status in (("hr-000022.png", 22, None), ("never", 23, 2)):
        monkeypatch.setattr(os, "replace", partial(refuse, until))
        with nullcontext() if status is None else pytest.raises(SystemExit, match=str(status)):
            run(copied, "--resume", early_samples=[21], num_training_steps=step)
        assert f"{name} can't be written: Locked; going on" in capsys.readouterr().err
        assert not list(copied.glob("*.tmp")) and log_of(copied)[-1]["step"] in (str(step), "22")
        assert checkpoint_of(copied)["step"] == (22 if name == "checkpoint.pt" else step)


OUT_OF_MEMORY = RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
DISK_FULL = OSError(28, "No space left on device")
REFUSED = [  # flags, words of the line, what raises which error
    ("--num_training_steps many", "num_training_steps: 'many' is not a whole number above 0", None),
    ("--early_samples 5 0", "argument --early_samples: '0' is not a whole number above 0", None),
    ("--channels 2", "channels is 2: it must be 1 (grey) or 3 (colour)", None),
    ("--num_timesteps 100", "γ_T is 0.61; it must lie between 1e-8 and 0.01 (a larger beta_end lowers it)", None),
    ("--batch 3", "unrecognized arguments: --batch 3", None),
    ("--device toaster", "device toaster is none of cuda, mps (one rank only), cpu", None),
    ("--config_path none.toml", "none.toml: No such file", None),
    ("--dataset fashion_mnist --output_dir new", "fashion_mnist could not be downloaded", None),
    ("--output_dir file", "file: File exists", None),
    ("--output_dir file/below", "file/below: Not a directory", None),
    ("--output_dir new --resume", "checkpoint.pt: No such file", None),
    ("--resume --num_training_steps 21", "out of memory; give a smaller --batch_size", (SR3, "forward", OUT_OF_MEMORY)),
    ("--resume", "out of memory; give a smaller --batch_size", (torch, "load", MemoryError("no"))),
]


@pytest.mark.parametrize("flags, words, patch", REFUSED)
def test_what_cannot_work_leaves_earlier_results_alone(copied, tmp_path, failure, monkeypatch, flags, words, patch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    if patch:
        monkeypatch.setattr(*patch[:2], raising(patch[2]))
    assert words in failure(run, "output", "--data_dir", "none", *flags.split())
    assert not Path("new").exists()


CHANGED = {
    "method": "regression", "dataset": "mnist", "image_size": 32, "low_res_size": 8, "channels": 3, "features": 16,
    "channel_multipliers": [1, 1], "blocks_per_level": 2, "attention_resolutions": [16], "attention_heads": 4,
    "dropout": 0.2, "num_timesteps": 1000, "beta_start": 1e-5, "beta_end": 0.02, "loss_weight": "1",
}  # fmt: skip
FREE = {
    "sampling_steps": 2, "num_training_steps": 22, "batch_size": 2, "learning_rate": 0.01, "warmup_steps": 44,
    "max_grad_norm": 2.0, "sample_every": 9, "early_samples": [22], "precision": "auto", "seed": 1,
}  # fmt: skip


def test_a_resumed_run_takes_its_checkpoints_settings_and_can_change_the_training_only(failure, copied, tmp_path):
    """By flags, which all settings are, or by a config file."""
    assert tuple(CHANGED) == FIXED and list(CHANGED | FREE) == list(DEFAULTS)
    resume, config = ["--resume", "--output_dir", copied, "--device", "cpu"], tmp_path / "config.toml"
    for name, value in CHANGED.items():
        config.write_text(f"{name} = {json.dumps(value)}")
        for given in (flags_of({name: value}), ["--config_path", config]):
            line = failure(call, train_mnist, *resume, *given)
            assert f"{name} is {value}, in the checkpoint it is " in line
    before = checkpoint_of(copied)["config"]
    (copied / "log.csv").write_text("mine")  # written from the checkpoint, and never read
    call(train_mnist, *resume, *flags_of(FREE))
    assert checkpoint_of(copied)["config"] == before | FREE
    assert [row["step"] for row in log_of(copied)] == ["20", "22"]
    assert float(log_of(copied)[-1]["learning_rate"]) == 0.01 * 22 / 44


def test_what_is_no_whole_checkpoint_cannot_be_resumed(failure, copied):
    path, whole = copied / "checkpoint.pt", checkpoint_of(copied)
    contents = [b"", b"text", path.read_bytes()[:-100]]
    for fault in (
        ["a list"],
        {name: whole[name] for name in ("config", "step", "ema")},  # weights only
        whole | {"config": [1, 2]},
        whole | {"config": whole["config"] | {"features": "many"}},
        whole | {"model": None},
        whole | {"model": {f"{name}2": weight for name, weight in whole["model"].items()}},
        whole | {"optimizer": {}},
    ):
        torch.save(fault, buffer := io.BytesIO())
        contents.append(buffer.getvalue())
    for content in contents:
        path.write_bytes(content)
        line = failure(run, copied, "--resume")
        assert "checkpoint" in line and re.search("no checkpoint of this lesson|lacks|doesn't fit|'many' is not", line)


def test_a_resumed_run_has_the_data_that_it_began_with_or_stops(failure, copied, tmp_path, small_mnist, capsys):
    """Without MNIST it draws no digits; with pictures added, or without some, it says what has changed."""
    mnist = run(tmp_path / "mnist", "--data_dir", small_mnist, dataset="mnist", num_training_steps=1)
    more = ["--resume", "--num_training_steps", 2]
    line = failure(call, train_mnist, "--output_dir", mnist, "--data_dir", tmp_path / "no", *more)
    assert "mnist could not be downloaded" in line
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        Image.linear_gradient("L").rotate(30 * i).save(tmp_path / f"pictures/{i}.png")
    data = ["--data_dir", tmp_path / "pictures"]
    folder = run(tmp_path / "run", *data, dataset="folder", num_training_steps=1)
    (tmp_path / "pictures/0.png").rename(tmp_path / "0.png")
    line = failure(call, train_mnist, "--output_dir", folder, *data, *more)
    assert re.search(r"there are \d+ and \d+ images .* began with \d+ and \d+: a resumed run can't change", line)
    (tmp_path / "0.png").rename(tmp_path / "pictures/0.png")
    call(train_mnist, "--output_dir", folder, *data, *more)
    assert checkpoint_of(folder)["step"] == 2


def test_a_bug_keeps_its_traceback_also_where_it_raises_what_bad_input_raises(monkeypatch, tmp_path):
    for error in (ValueError("too many values to unpack"), RuntimeError("shape"), TypeError("no"), OSError("no file")):
        monkeypatch.setattr(UNet, "__init__", raising(error))
        with pytest.raises(type(error), match=str(error)):
            run(tmp_path / "output")


def test_it_runs_in_a_notebook_without_a_console_and_until_its_reader_is_gone(tmp_path, failure):
    """A notebook's streams are no files, pythonw on Windows has none, and `| head -0` closes one."""
    for stream in (io.StringIO(), None):
        with redirect_stdout(stream), redirect_stderr(stream):
            output = run(tmp_path / "output", num_training_steps=1)
        assert checkpoint_of(output)["step"] == 1
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stdout, redirect_stdout(stdout):
        assert "standard output: Broken pipe" in failure(run, tmp_path / "new")
