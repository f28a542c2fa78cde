"""train_mnist.py as its users run it: what a run writes, how it ends, how it goes on, what it refuses."""

import fcntl
import itertools
import math
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DRAW_DIGITS, ROOT, cells, checkpoint_of, command, log_of, raising, run, snapshot, write_mnist

import support.run
from sr3 import SR3
from support.run import Run
from unet import ResidualBlock
from utils import build_model, load_model

SCHEDULE = {"early_samples": [3], "sample_every": 14}  # grids after steps 3, 14 and 20, and rows after 8 and 16
DISK_FULL = OSError(28, "No space left on device")


@pytest.fixture(autouse=True)
def a_row_every_eight_steps(monkeypatch):
    monkeypatch.setattr(support.run, "LOG_EVERY", 8)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """The folder of a run of 20 steps, not to be written to, and the loss and the weights after each."""
    steps, after = [], Run.after

    def trace(self, loss, draw):
        steps.append((loss.item(), [weight.detach().clone() for weight in self.parts["model"].parameters()]))
        after(self, loss, draw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "after", trace)
        patch.setattr(support.run, "LOG_EVERY", 8)
        return run(tmp_path_factory.mktemp("traced") / "output", **SCHEDULE), *zip(*steps)


@pytest.fixture
def copied(traced, tmp_path):
    return Path(shutil.copytree(traced[0], tmp_path / "output"))


def at_steps(monkeypatch, actions):
    """In the middle of steps, counted in this process, calls what stands behind their numbers."""
    forward, numbers = SR3.forward, itertools.count(1)
    monkeypatch.setattr(SR3, "forward", lambda *batch: (actions.get(next(numbers), int)(), forward(*batch))[1])


def assert_same(output, other):
    """Weights, averages and moments are equal to the last bit, logs and pictures to the last byte."""
    found, expected = ([checkpoint_of(o)[part] for part in ("model", "ema", "optimizer")] for o in (output, other))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert snapshot(output, ".csv", ".png", ".gif") == snapshot(other, ".csv", ".png", ".gif")


def test_a_run_writes_grids_and_a_log_of_mean_losses_and_the_rising_learning_rate(traced):
    output, losses, _ = traced
    grids = {f"{name}-{step:06d}.png" for name in ("sr", "lr", "hr", "refinement") for step in (3, 14, 20)}
    assert {*snapshot(output)} == grids | {"refinement.gif", "progress.png", "log.csv", "checkpoint.pt"}
    before = 0
    for row, step in zip(log_of(output), (3, 8, 14, 16, 20), strict=True):
        assert row["step"] == str(step) and bool(row["psnr"]) == bool(row["ssim"]) == (step in (3, 14, 20))
        assert float(row["loss"]) == pytest.approx(sum(losses[before:step]) / (step - before), rel=1e-4)
        assert float(row["learning_rate"]) == pytest.approx(1e-3 * step / 50, rel=1e-5)  # of 50 steps of warm-up
        before = step


def test_samples_are_made_with_the_average_of_all_weights_with_a_mean_age_of_a_tenth_of_the_steps(traced):
    output, _, weights = traced
    model = load_model(output / "checkpoint.pt")
    torch.manual_seed(0)
    average = list(build_model(model.config).parameters())
    for step, now in enumerate(weights, start=1):
        average = [(1 + step) / (10 + step) * old + 9 / (10 + step) * new for old, new in zip(average, now)]
    torch.testing.assert_close(list(model.parameters()), average, atol=1e-6, rtol=1e-5, check_stride=False)


def test_the_logged_psnr_is_that_of_the_pictures_and_progress_shows_their_first_column(traced):
    output = traced[0]
    sr, earlier, hr = (cells(output / f"{name}.png", 8) for name in ("sr-000020", "sr-000003", "hr-000020"))
    assert torch.equal(hr[..., 0], DRAW_DIGITS(500, 16, seed=1)[0][:64, 0])
    decibels = -10 * ((sr - hr.float()) / 255).square().mean((1, 2, 3)).log10().mean()
    assert float(log_of(output)[-1]["psnr"]) == pytest.approx(decibels.item(), abs=0.01)
    progress = torch.stack([earlier[:8], sr[:8], hr[:8]], dim=1).flatten(0, 1)
    assert torch.equal(cells(output / "progress.png", 3), progress)


def test_a_regression_in_colour_writes_the_same_grids(tmp_path):
    output = run(tmp_path, method="regression", channels=3, num_training_steps=1)
    lr, sr, hr = (cells(output / f"{name}-000001.png", 8)[:8] for name in ("lr", "sr", "hr"))
    assert torch.equal(cells(output / "refinement-000001.png", 3), torch.stack([lr, sr, hr], dim=1).flatten(0, 1))


def start(output, data_dir, *before, **options):
    """Starts a run in a process of its own, and returns it when it has saved for the first time."""
    flags = command(output, "--data_dir", data_dir, dataset="mnist", sample_every=5, num_training_steps=200)
    process = subprocess.Popen([*before, sys.executable, ROOT / "train_mnist.py", *flags], **options)
    wait_for(output, process.poll)
    return process


def test_a_killed_run_goes_on_bit_for_bit_and_keeps_its_folder_while_it_lives(small_mnist, tmp_path, failure, monkeypatch):
    killed, settings = tmp_path / "killed", {"dataset": "mnist", "sample_every": 5}
    process = start(killed, small_mnist)
    time.sleep(random.random())
