"""train_mnist.py as its users run it: what a run writes, how it ends, how it goes on, what it refuses."""

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch
from conftest import ROOT, cells, checkpoint_of, command, log_of, raising, run, snapshot, write_mnist

import support.run
from sr3 import SR3
from support.run import Run
from unet import ResidualBlock
from utils import build_model, load_model

SCHEDULE = {"early_samples": [3], "sample_every": 14}  # grids after steps 3, 14 and 20, and rows after 8 and 16
MNIST = {"dataset": "mnist", "sample_every": 4}


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """The folder of a run of 20 steps, not to be written to, and the loss and the model after each."""
    steps, after = [], Run.after

    def trace(self, loss, draw):
        steps.append((loss.item(), deepcopy(self.parts["model"])))
        after(self, loss, draw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "after", trace)
        return run(tmp_path_factory.mktemp("traced") / "output", **SCHEDULE), *zip(*steps)


@pytest.fixture
def copied(traced, tmp_path):
    return Path(shutil.copytree(traced[0], tmp_path / "output"))


def at_steps(monkeypatch, actions):
    """In the middle of steps, counted in this process, calls what stands behind their numbers."""
    forward, numbers = SR3.forward, count(1)
    monkeypatch.setattr(SR3, "forward", lambda *batch: (actions.get(next(numbers), int)(), forward(*batch))[1])


def assert_same(output, other):
    """Weights, averages and moments are equal to the last bit, logs and pictures to the last byte."""
    for part in ("model", "ema", "optimizer"):
        torch.testing.assert_close(checkpoint_of(output)[part], checkpoint_of(other)[part], rtol=0, atol=0)
    assert snapshot(output, ".csv", ".png") == snapshot(other, ".csv", ".png")


def test_a_run_writes_grids_and_a_log_of_mean_losses_and_the_psnr_of_the_pictures(traced):
    output, losses, _ = traced
    grids = {f"{name}-{step:06d}.png" for name in ("sr", "lr", "hr", "refinement") for step in (3, 14, 20)}
    assert {*snapshot(output)} == grids | {"progress.png", "log.csv", "checkpoint.pt"}
    for row, (before, step) in zip(log_of(output), pairwise([0, 3, 8, 14, 16, 20]), strict=True):
        assert row["step"] == str(step) and bool(row["psnr"]) == (step in (3, 14, 20))
        assert float(row["loss"]) == pytest.approx(sum(losses[before:step]) / (step - before), rel=1e-4)
    assert checkpoint_of(output)["optimizer"]["param_groups"][0]["lr"] == pytest.approx(4e-4)  # 20 of 50 steps warm-up
    sr, hr = (cells(output / f"{name}-000020.png") / 255 for name in ("sr", "hr"))
    decibels = -10 * (sr - hr).square().mean((2, 3, 4)).log10().mean()
    assert float(row["psnr"]) == pytest.approx(decibels.item(), abs=0.01)


def test_samples_are_made_with_an_average_of_all_weights_whose_mean_age_is_a_tenth_of_the_steps(traced):
    output, _, models = traced
    final = load_model(output / "checkpoint.pt")
    torch.manual_seed(0)
    average = build_model(final.config).parameters()
    for step, now in enumerate(models, start=1):
        kept = (1 + step) / (10 + step)
        average = [kept * old + (1 - kept) * new for old, new in zip(average, now.parameters())]
    torch.testing.assert_close(list(final.parameters()), average, atol=1e-6, rtol=1e-5, check_stride=False)


def script(output, data_dir, **settings):
    """The command of a run in a process of its own, which soon saves."""
    flags = command(output, "--data_dir", data_dir, **MNIST, **settings)
    return [sys.executable, str(ROOT / "train_mnist.py"), *flags]


def wait_for(path):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's terminals, locks and /dev/full")


@linux
def test_a_killed_run_goes_on_bit_for_bit_and_keeps_its_folder_while_it_lives(
    small_mnist, tmp_path, failure, monkeypatch
):
    killed = tmp_path / "killed"
    process = subprocess.Popen(script(killed, small_mnist, num_training_steps=2000))
    try:
        wait_for(killed / "checkpoint.pt")
        time.sleep(random.random())
        process.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(support.run, "fcntl", pytest.importorskip("fcntl"))
        assert f"{killed} can't be used (another run writes to it)" in failure(run, killed)
    finally:
        process.kill()
    process.wait()
    steps = checkpoint_of(killed)["step"] + 6
    for output, *flags in ((killed, "--resume"), (tmp_path / "whole",)):
        run(output, "--data_dir", small_mnist, *flags, **MNIST, num_training_steps=steps)
    assert_same(killed, output)


@linux
def test_a_closed_terminal_ends_a_run_saved(small_mnist, tmp_path):
    """It sends SIGHUP, and then what the run says of it can't be written."""
    import pty

    arguments = script(tmp_path, small_mnist, num_training_steps=2000)
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # even if these tests run under nohup
        os.execv(sys.executable, arguments)
    wait_for(tmp_path / "checkpoint.pt")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGHUP
    assert checkpoint_of(tmp_path)["step"] < 2000


@linux
def test_under_nohup_a_run_goes_on_to_its_end_when_nothing_it_says_can_be_written(small_mnist, tmp_path):
    """The reader of its output has gone, and /dev/full is always full."""
    arguments = ["nohup", *script(tmp_path, small_mnist, num_training_steps=16)]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=full)
    process.stdout.close()
    wait_for(tmp_path / "checkpoint.pt")
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 0 and checkpoint_of(tmp_path)["step"] == 16


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_the_step_saved_and_resumed_it_is_as_unbroken(
    traced, tmp_path, monkeypatch, capsys, number
):
    output, before = tmp_path / "output", signal.signal(number, signal.SIG_DFL)
    at_steps(monkeypatch, {7: lambda: signal.raise_signal(number)})
    with pytest.raises(SystemExit, match=f"^{128 + number}$"):
        run(output, **SCHEDULE)
    assert "stopped after step 7; the same command with --resume goes on" in capsys.readouterr().out
    assert checkpoint_of(output)["step"] == 7
    run(output, "--resume", **SCHEDULE)
    signal.signal(number, before)
    assert_same(output, traced[0])


@pytest.mark.parametrize("name", ["log.csv", "checkpoint.pt.tmp"])
def test_what_cannot_be_written_is_a_line_and_tried_again_and_an_error_at_the_end(
    traced, tmp_path, monkeypatch, capsys, name
):
    """A folder that has the name of a file stands for a full disk: in steps 2 to 9, and again from 17 on."""
    output, path = tmp_path / "output", tmp_path / "output" / name

    def block():
        path.unlink(missing_ok=True)
        path.mkdir()

    at_steps(monkeypatch, {2: block, 10: path.rmdir, 17: block})
    with pytest.raises(SystemExit, match="^2$"):
        run(output, **SCHEDULE)
    reason = f"{output} can't be written to (Is a directory); "
    told = capsys.readouterr().err
    assert reason + "going on" in told and told.endswith(reason + "make room, or give another --output_dir\n")
    assert checkpoint_of(output)["step"] == (20 if name == "log.csv" else 14)
    path.rmdir()
    run(output, "--resume", **SCHEDULE)
    assert_same(output, traced[0])


def test_a_new_run_moves_what_earlier_ones_left_but_not_what_is_the_users(copied):
    expected = {f"earlier-1/{name}": content for name, content in snapshot(copied).items()} | {"notes.txt": b"mine"}
    (copied / "notes.txt").write_text("mine")
    run(copied, num_training_steps=1)
    assert expected.items() <= snapshot(copied).items()
    assert [path.name for path in copied.glob("sr-*")] == ["sr-000001.png"]


def test_a_run_goes_on_where_weights_lie_differently_in_memory(copied):
    """As in another precision, or on another device: Adam's moments still belong to their weights."""
    outputs = [copied]
    for precision in ("float32", "bfloat16"):
        outputs.append(shutil.copytree(copied, copied.parent / precision))
        run(outputs[-1], "--resume", num_training_steps=21, precision=precision)
    models = [checkpoint_of(output)["model"] for output in outputs]
    start, here, there = (torch.cat([values.flatten() for values in model.values()]) for model in models)
    assert (there - here).norm() < 0.4 * (here - start).norm()


def test_a_loss_that_is_not_finite_is_not_saved(copied, monkeypatch, failure):
    forward = SR3.forward
    monkeypatch.setattr(SR3, "forward", lambda *batch: math.nan * forward(*batch))
    assert "not finite after step 21, nothing is saved" in failure(run, copied, "--resume", num_training_steps=21)


def test_a_resumed_run_keeps_its_data(small_mnist, tmp_path, failure):
    """Digits that were drawn where MNIST is there now; MNIST where it is not, or has other images for testing."""
    drawn, output, blank = tmp_path / "drawn", tmp_path / "output", torch.zeros(100, 28, 28).byte()
    run(drawn, "--data_dir", tmp_path / "no", dataset="mnist", num_training_steps=1)
    run(drawn, "--data_dir", small_mnist, "--resume", num_training_steps=2)
    assert checkpoint_of(drawn)["config"]["dataset"] == "digits"
    run(output, "--data_dir", small_mnist, **MNIST, num_training_steps=1)
    write_mnist(tmp_path / "more", blank, blank)
    for data_dir, words in (("no", "mnist can't be downloaded"), ("more", "are [100, 100] images, not [100, 70]")):
        assert words in failure(run, output, "--resume", "--data_dir", tmp_path / data_dir, **MNIST)


REFUSED = {
    "--steps 3": "unrecognized arguments: --steps 3",
    "--features 12": "features 12: give a multiple of 8 and attention_heads 2",
    "--num_timesteps 100": "num_timesteps 100: γ_T is 0.61",
    "--dataset imagenet": "dataset is 'imagenet': it must be folder, digits or one of mnist, fashion_mnist, cifar10",
    "--device toaster": "device toaster can't compute here",
    "--config_path no.toml": "no.toml",
    "--config_path damaged/checkpoint.pt": "damaged/checkpoint.pt is not valid TOML",
    "--dataset folder --data_dir no": "no; give another --data_dir",
    "--output_dir damaged/log.csv": "log.csv can't be used (File exists); give another --output_dir",
    "--output_dir damaged --resume": "damaged/checkpoint.pt is no checkpoint to use here",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_wrong_input_is_refused_in_a_line_and_leaves_all_files_alone(copied, monkeypatch, failure, flags):
    monkeypatch.chdir(copied.parent)
    shutil.copytree("output", "damaged")
    os.truncate("damaged/checkpoint.pt", 99_999)
    assert REFUSED[flags] in failure(run, "output", *flags.split())
    assert not Path("no").exists()


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    """Also where it raises what a constructor raises for bad sizes."""
    monkeypatch.setattr(ResidualBlock, "__init__", raising(ValueError("a slip")))
    with pytest.raises(ValueError, match="a slip"):
        run(tmp_path)
