"""train_mnist.py as its users run it: what a run writes, how it ends, how it goes on, what it refuses."""

import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, call, cells, checkpoint_of, command, flags_of, log_of, raising, run, snapshot
from PIL import Image, ImageSequence

import train_mnist
import utils
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


def test_a_run_logs_and_averages_its_weights_and_is_not_changed_by_drawing(finished, tmp_path, monkeypatch):
    """early_samples, every sample_every steps and the last one; a row of the log there and every LOG_EVERY steps."""
    losses, weights, sizes, forward = [], [], set(), UNet.forward

    def remember(step, model, loss):
        losses.append(loss.item())
        weights.append([weight.detach().double() for weight in model.parameters()])  # before the step
        return loss

    at_each_step(monkeypatch, remember)
    monkeypatch.setattr(UNet, "forward", lambda unet, x, *rest: sizes.add(len(x)) or forward(unet, x, *rest))
    monkeypatch.setattr(train_mnist, "LOG_EVERY", 8)
    output = run(tmp_path / "output", early_samples=[3], sample_every=14)
    drawn, logged, rows = [3, 14, 20], [3, 8, 14, 16, 20], log_of(output)
    grids = [f"{name}-{step:06d}.png" for name in GRIDS for step in drawn]
    assert sorted(snapshot(output)) == sorted([*grids, "refinement.gif", "log.csv", "checkpoint.pt"])
    assert sizes == {4}  # the 64 images are drawn as many at a time as there are in a batch
    header = "dataset,step,loss,learning_rate,images_per_second,psnr,ssim,consistency"
    assert [int(row["step"]) for row in rows] == logged and ",".join(rows[0]) == header
    for row, before, step in zip(rows, [0, *logged], logged):
        mean = sum(losses[before:step]) / (step - before)  # since the row before
        assert float(row["loss"]) == pytest.approx(mean, rel=1e-4)
        assert float(row["learning_rate"]) == pytest.approx(1e-3 * step / 50, rel=1e-5)  # warming up
        assert float(row["images_per_second"]) > 0 and row["dataset"] == "digits"
        assert all(cell == f"{float(cell):.6g}" for cell in list(row.values())[2:] if cell)
        metrics = [row[key] for key in ("psnr", "ssim", "consistency")]
        assert all(math.isfinite(float(m)) for m in metrics) if step in drawn else metrics == [""] * 3
    assert_same_training(output, finished)  # which drew at the end only
    checkpoint, average = checkpoint_of(output), weights[0]
    for step, now in enumerate([*weights[1:], checkpoint["model"].values()], start=1):
        decay = (1 + step) / (10 + step)  # 2/11, 3/12, …
        average = [decay * old + (1 - decay) * new for old, new in zip(average, now)]
    torch.testing.assert_close([value.double() for value in checkpoint["ema"].values()], average, atol=1e-6, rtol=1e-5)


def assert_shows(picture, columns, images, atol=0.6):
    """A grid shows grey images in [-1, 1], rounded."""
    expected = (images.clamp(-1, 1) + 1).permute(0, 2, 3, 1) * 127.5
    torch.testing.assert_close(cells(picture, columns).float(), expected.expand(-1, -1, -1, 3), atol=atol, rtol=0)


def test_the_pictures_show_64_test_digits_and_what_the_averaged_weights_make_of_them(finished):
    model, average = utils.load_model(finished / "checkpoint.pt"), checkpoint_of(finished)["ema"]
    assert not any(module.training for module in model.modules()) and model.step == 20
    assert all(torch.equal(weight, average[name]) for name, weight in model.state_dict().items())
    high_res, small, context = utils.make_pair(utils.draw_digits(10_000, 16, 1, seed=1)[0][:64], 4)
    low_res = small.repeat_interleave(4, 2).repeat_interleave(4, 3)  # each pixel a square
    generator = torch.Generator().manual_seed(0)  # the config's seed
    parts = [list(model.refine(part, 4, generator)) for part in context.split(4)]
    y_t, y_0_hat = ([torch.cat([part[step][i] for part in parts]) for step in range(4)] for i in (0, 1))
    for name, images in (("hr", high_res), ("lr", low_res), ("sr", y_t[-1])):
        assert_shows(finished / f"{name}-000020.png", 8, images)
    error = ((y_t[-1].clamp(-1, 1).double() - high_res.double()) / 2).square().mean((1, 2, 3))
    assert float(log_of(finished)[-1]["psnr"]) == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)

    # The refinement shows the eight digits that are farthest from their first ŷ_0.
    chosen = (y_0_hat[0] - y_t[-1]).double().square().mean((1, 2, 3)).topk(8).indices
    columns = torch.stack([low_res, *y_0_hat[:3], y_t[-1], high_res], dim=1)
    assert_shows(finished / "refinement-000020.png", 6, columns[chosen].flatten(0, 1))
    with Image.open(finished / "refinement.gif") as animation:  # y_t after each step, beside x; again and again
        assert animation.n_frames == 4 and animation.info["loop"] == 0
        for now, frame in zip(y_t, ImageSequence.Iterator(animation)):
            assert_shows(frame, 10, torch.stack([low_res[:20], now[:20]], dim=1).flatten(0, 1), atol=1.6)
        assert animation.info["duration"] > 1000  # milliseconds: the last frame pauses


def test_a_regression_writes_the_same_grids_without_noise(tmp_path):
    output = run(tmp_path / "output", method="regression", channels=3, num_training_steps=1)
    assert sorted(snapshot(output, ".png", ".gif")) == [f"{name}-000001.png" for name in GRIDS]
    columns = cells(output / "refinement-000001.png", 3).view(8, 3, 16, 16, 3)
    shown = [cells(output / f"{name}-000001.png", 8) for name in ("lr", "sr", "hr")]
    chosen = [next(i for i in range(64) if torch.equal(shown[2][i], row[2])) for row in columns]
    assert torch.equal(columns, torch.stack(shown, dim=1)[chosen])


def test_without_mnist_digits_are_drawn_with_a_loud_warning_and_named_in_every_output(tmp_path, capsys):
    output = run(tmp_path / "output", "--data_dir", tmp_path / "no", dataset="mnist", num_training_steps=2)
    for grid in GRIDS:
        assert Image.open(output / f"{grid}-000002.png").getexif()[0x010E] == "digits, step 2"
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
        assert checkpoint_of(output)["config"] == utils.DEFAULTS | TINY
    assert_same_training(tmp_path / "output", finished)


def test_a_short_training_beats_bicubic(tmp_path):
    network = {"channel_multipliers": [1], "attention_resolutions": [], "low_res_size": 12, "dropout": 0}
    training = {"batch_size": 16, "learning_rate": 0.01, "warmup_steps": 5, "num_training_steps": 200}
    output = run(tmp_path / "output", **network, **training, sample_every=200)
    y_0, _, context = utils.make_pair(utils.draw_digits(10_000, 16, 1, seed=1)[0][:64], 12)
    bicubic = -10 * ((context.clamp(-1, 1) - y_0) / 2).square().mean((1, 2, 3)).log10().mean()
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


def test_a_run_cut_off_while_it_draws_has_saved_its_state_and_draws_again(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^130$"):
        patch.setattr(utils, "save_grid", raising(KeyboardInterrupt()))
        run(output := tmp_path / "output")
    assert list(snapshot(output)) == ["checkpoint.pt", "log.csv"] and log_of(output)[-1]["psnr"] == ""
    assert_same_training(output, finished)
    run(output, "--resume")
    assert snapshot(output, ".png", ".gif") == snapshot(finished, ".png", ".gif")
    (row,), (expected,) = log_of(output), log_of(finished)
    assert row | {"images_per_second": ""} == expected | {"images_per_second": ""}


def test_a_second_run_moves_what_the_first_left_and_loses_nothing(copied, capsys):
    for name in ("results.md", "comparison.png"):
        (copied / name).write_text("of evaluate.py")
    (copied / "notes.txt").write_text("mine")
    expected = {"notes.txt": b"mine"}
    for i in (1, 2):
        earlier = {name: content for name, content in snapshot(copied).items() if "/" not in name}
        expected |= {f"earlier-{i}/{name}": earlier[name] for name in earlier.keys() - {"notes.txt"}}
        run(copied, num_training_steps=i)
        found, new = snapshot(copied), {"log.csv", "checkpoint.pt", "refinement.gif"}
        new |= {f"{name}-{i:06d}.png" for name in GRIDS}
        assert expected.items() <= found.items() and found.keys() - expected.keys() == new
        assert f"earlier-{i}" in capsys.readouterr().out and checkpoint_of(copied)["step"] == i


def test_what_is_not_finite_ends_a_run_before_it_overwrites(copied, tmp_path, failure, monkeypatch):
    """A loss, in a resumed run, or a weight in a new one; the line speaks of a checkpoint only where there is one."""

    def spoil(step, model, loss):
        if step == 21:  # the last of the new run
            model.unet.conv_in.weight.data[0] = math.inf
        return loss * math.nan if step == 1 else loss

    at_each_step(monkeypatch, spoil)
    line = failure(run, copied, "--resume", num_training_steps=21, status=1)
    assert "finite" in line and f"{copied / 'checkpoint.pt'} is as it was" in line
    line = failure(run, tmp_path / "new", status=1)
    assert "finite" in line and "checkpoint" not in line


def test_a_log_that_cannot_be_replaced_is_only_warned_of(copied, monkeypatch, capsys):
    """As where a spreadsheet has it open; the checkpoint is written before."""
    replace, written = os.replace, []

    def replace_others(source, target):
        written.append(target.name)
        raising(PermissionError(13, "Locked"))() if target.name == "log.csv" else replace(source, target)

    monkeypatch.setattr(os, "replace", replace_others)
    run(copied, "--resume", num_training_steps=21)
    assert capsys.readouterr().err.count("log.csv can't be written: Locked; going on") == 2
    assert written[:2] == ["checkpoint.pt", "log.csv"] and checkpoint_of(copied)["step"] == 21
    assert log_of(copied)[-1]["step"] == "20" and not list(copied.glob("*.tmp"))


OUT_OF_MEMORY = RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
DISK_FULL = OSError(28, "No space left on device")
REFUSED = [  # flags, words of the line, what raises which error
    ("--num_training_steps many", "num_training_steps: invalid int value: 'many'", None),
    ("--early_samples 5 0", "--early_samples is [5, 0]: it must be a list, each a whole number from 1 to", None),
    ("--device toaster", "device toaster is none of cuda, mps (one rank only), cpu", None),
    ("--config_path none.toml", "none.toml: No such file", None),
    ("--dataset fashion_mnist --output_dir new", "fashion_mnist could not be downloaded", None),
    ("--output_dir file", "file: File exists", None),
    ("--output_dir file/below", "file/below: Not a directory", None),
    ("--output_dir new --resume", "checkpoint.pt: No such file", None),
    ("--compile", "(RuntimeError: no gcc); leave out --compile", (torch, "compile", RuntimeError("no gcc"))),
    ("", "No space left", (os, "fsync", DISK_FULL)),
    ("--resume --num_training_steps 21", "output/checkpoint.pt: No space left", (os, "fsync", DISK_FULL)),
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


FIXED = {
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
    assert list(FIXED | FREE) == list(utils.DEFAULTS)
    resume, config = ["--resume", "--output_dir", copied, "--device", "cpu"], tmp_path / "config.toml"
    for name, value in FIXED.items():
        config.write_text(f"{name} = {json.dumps(value)}")
        for given in (flags_of({name: value}), ["--config_path", config]):
            line = failure(call, train_mnist, *resume, *given)
            assert f"{name} is {value}, in {copied / 'checkpoint.pt'} it is " in line
    before = checkpoint_of(copied)["config"]
    with open(copied / "log.csv", "a") as log:
        log.write("digits,21,0.5,0.1,9,,,\n")  # of a step after the checkpoint
    call(train_mnist, *resume, *flags_of(FREE))
    assert checkpoint_of(copied)["config"] == before | FREE
    assert [row["step"] for row in log_of(copied)] == ["20", "22"]
    assert float(log_of(copied)[-1]["learning_rate"]) == 0.01 * 22 / 44


def test_what_is_no_whole_checkpoint_or_no_log_cannot_be_resumed(failure, copied):
    path, log, whole = copied / "checkpoint.pt", copied / "log.csv", checkpoint_of(copied)
    contents = [b"", b"text", path.read_bytes()[:-100]]
    for fault in (
        {name: whole[name] for name in ("config", "step", "ema")},  # weights only
        whole | {"config": whole["config"] | {"ema_decay": 0.99}},  # of another version
        whole | {"model": None},
        whole | {"model": {f"{name}2": weight for name, weight in whole["model"].items()}},
        whole | {"optimizer": {}},
    ):
        torch.save(fault, buffer := io.BytesIO())
        contents.append(buffer.getvalue())
    for content in contents:
        path.write_bytes(content)
        line = failure(run, copied, "--resume")
        assert str(path) in line and ("is no checkpoint of this lesson" in line or "its state doesn't fit" in line)
    torch.save(whole, path)
    log.write_text("step,loss\nmany,2\n")
    assert f"{log} is not this lesson's log" in failure(run, copied, "--resume")


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


def test_a_compiled_run_trains_to_the_same_weights(finished, tmp_path, monkeypatch):
    graphs = []
    backend = partial(torch.compile, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    monkeypatch.setattr(torch, "compile", backend)
    assert_same_training(run(tmp_path / "output", "--compile"), finished)
    assert len(graphs) == 1 + 2  # a look for a compiler, the network and its average
