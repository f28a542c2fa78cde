"""train_mnist.py as its users run it: what a run writes, how it ends, how it goes on, what it refuses."""

import csv
import errno
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
from conftest import ROOT, cells, checkpoint_of, draw_few_digits, flags_of, lines_of, run, write_tiny_config
from PIL import Image, ImageSequence

import sr3
import train_mnist
import utils

pytestmark = pytest.mark.usefixtures("few_digits")
STEP = train_mnist.training_step
GRIDS = ("hr", "lr", "sr", "refinement")
HEADER = (
    "dataset,step,loss,learning_rate,images_per_second,"
    "psnr,ssim,consistency,bicubic_psnr,bicubic_ssim,bicubic_consistency"
)


@pytest.fixture(scope="module")
def finished(few_digits, tmp_path_factory):
    """The config and the output of one run of 20 steps; not to be written to."""
    config = write_tiny_config(tmp_path_factory.mktemp("finished") / "tiny.toml")
    return config, run(config, config.parent / "output")


@pytest.fixture
def copy_of_finished(finished, tmp_path):
    return finished[0], Path(shutil.copytree(finished[1], tmp_path / "output"))


@pytest.fixture
def failure(capsys):
    """Called with what `run` takes, runs until it fails in one line; returns the exit status and all of stderr."""

    def fail(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run(*arguments)
        error = capsys.readouterr().err
        assert len(lines_of("train_mnist.py: ", error)) == 1, error
        return exit.value.code, error

    return fail


@pytest.fixture
def refused(copy_of_finished, tmp_path, failure):
    """Runs into an output folder with an earlier run; asserts that all stays as it was, and returns the line."""

    def refuse(config, *flags, output=tmp_path / "output"):
        before = snapshot(tmp_path)
        status, line = failure(config, output, *flags)
        assert status == 2 and line.count("\n") == 1 and snapshot(tmp_path) == before
        return line

    return refuse


def raising(error):
    """A function that raises, whatever it is called with."""
    return lambda *_, **__: (_ for _ in ()).throw(error)


def log_of(output):
    return list(csv.DictReader((output / "log.csv").read_text().splitlines()))


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_training(output, other):
    """Weights, averages and moments are equal to the last bit."""
    parts = ("step", "model", "ema", "optimizer")
    found, expected = ({part: checkpoint_of(o)[part] for part in parts} for o in (output, other))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_run_writes_its_grids_log_and_checkpoint_and_drawing_does_not_change_it(
    finished, tiny_config, tmp_path, monkeypatch
):
    """early_samples, every sample_every steps and the last one; a row of the log there and every LOG_EVERY steps."""
    losses = []
    monkeypatch.setattr(train_mnist, "LOG_EVERY", 8)
    monkeypatch.setattr(train_mnist, "training_step", lambda run: losses.append(STEP(run)) or losses[-1])
    output = run(tiny_config(early_samples=[3], sample_every=14), tmp_path / "output")
    drawn, logged = [3, 14, 20], [3, 8, 14, 16, 20]
    grids = [f"{name}-{step:06d}.png" for name in GRIDS for step in drawn]
    assert sorted(p.name for p in output.iterdir()) == sorted([*grids, "refinement.gif", "log.csv", "checkpoint.pt"])
    rows = log_of(output)
    assert [int(row["step"]) for row in rows] == logged and ",".join(rows[0]) == HEADER
    for row, before, step in zip(rows, [0, *logged], logged):
        mean = sum(losses[before:step]) / (step - before)  # since the row before
        assert float(row["loss"]) == pytest.approx(mean.item(), rel=1e-4)
        assert float(row["learning_rate"]) == pytest.approx(1e-3 * step / 50, rel=1e-5)  # warming up
        assert float(row["images_per_second"]) > 0 and row["dataset"] == "digits"
        metrics = [row[key] for key in HEADER.split(",")[5:]]
        assert all(math.isfinite(float(m)) for m in metrics) if step in drawn else metrics == [""] * 6
    assert_same_training(output, finished[1])  # which drew at the end only


def test_the_grids_show_the_first_64_test_digits_and_what_the_averaged_weights_make_of_them(finished):
    _, output = finished
    images = draw_few_digits(10_000, 16, 1, seed=1)[0][:64]
    high_res, low_res, super_res = (cells(output / f"{name}-000020.png", 8) for name in ("hr", "lr", "sr"))
    assert torch.equal(high_res, images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3))
    small = utils.downsample(images / 127.5 - 1, 4)
    pixels = ((small[:, 0] + 1) * 127.5).repeat_interleave(4, 1).repeat_interleave(4, 2)  # each a square
    assert (low_res - pixels[..., None]).abs().max() < 0.51  # rounded

    model, checkpoint = sr3.load_model(str(output / "checkpoint.pt")), checkpoint_of(output)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(weight, checkpoint["ema"][name]) for name, weight in model.state_dict().items())
    assert not torch.equal(model.unet.conv_in.weight, checkpoint["model"]["unet.conv_in.weight"])
    generator = torch.Generator().manual_seed(0)  # the config's seed
    y_T = torch.randn(images.shape, generator=generator)
    drawn = model.sample(utils.upsample(small, 16), steps=4, generator=generator, y_T=y_T).clamp(-1, 1)
    assert (super_res[..., 0] - (drawn[:, 0] + 1) * 127.5).abs().max() < 0.6  # rounded
    error = (drawn.double() / 2 - (images / 127.5 - 1).double() / 2).square().mean((1, 2, 3))
    assert float(log_of(output)[-1]["psnr"]) == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)

    # Columns: low resolution, noise, three of the four refinement steps, super-resolution, high resolution.
    rows = cells(output / "refinement-000020.png", 7).view(8, 7, 16, 16, 3)
    for column, expected in ((0, low_res), (-2, super_res), (-1, high_res)):
        assert torch.equal(rows[:, column], expected[:8])
    assert rows[:, 1].float().std() > 60  # noise


def test_the_animation_goes_from_noise_to_the_super_resolution_grid_and_stays_there(finished):
    low_res, super_res = (cells(finished[1] / f"{name}-000020.png", 8)[:16] for name in ("lr", "sr"))
    with Image.open(finished[1] / "refinement.gif") as animation:
        assert animation.n_frames == 5 and animation.info["loop"] == 0  # y_T, …, y_0; again and again
        frames = [frame.copy() for frame in ImageSequence.Iterator(animation)]
    assert frames[-1].info["duration"] > 2 * frames[0].info["duration"]
    frames = [cells(frame, 8, scale=2).view(16, 2, 16, 16, 3) for frame in frames]  # x beside y_t
    assert all(torch.equal(frame[:, 0], low_res) for frame in frames)
    assert frames[0][:, 1].float().std() > 60  # noise
    assert (frames[-1][:, 1].int() - super_res.int()).abs().max() <= 1


@pytest.mark.parametrize("name", ["mnist", "digits"])
def test_every_output_names_the_data_set_that_was_used(small_mnist, tiny_config, tmp_path, capsys, name):
    """That is drawn digits where MNIST is neither there nor to be downloaded, with an unmistakable warning."""
    data_dir = small_mnist if name == "mnist" else tmp_path / "none"
    output = run(tiny_config(dataset="mnist", num_training_steps=2), tmp_path / "output", "--data_dir", data_dir)
    for grid in GRIDS:
        assert Image.open(output / f"{grid}-000002.png").getexif()[0x010E] == f"{name}, step 2"
    assert log_of(output)[0]["dataset"] == checkpoint_of(output)["config"]["data"]["dataset"] == name
    out, error = capsys.readouterr()
    assert out.startswith({"mnist": "mnist: 100 images", "digits": "digits: 3,000 images"}[name])
    for words in ("!" * 80, "WARNING", "DRAWN DIGITS", str(data_dir), "train-images-idx3-ubyte.gz"):
        assert (words in error) == (name == "digits")


def test_flags_win_over_the_config_and_paths_are_of_the_current_folder(finished, tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tiny_config().name, "output", "--num_training_steps", 3, "--batch_size", 2, "--seed", 5)
    checkpoint, other = checkpoint_of(tmp_path / "output"), checkpoint_of(finished[1])
    assert checkpoint["step"] == 3 and checkpoint["config"]["training"]["batch_size"] == 2
    weights, others = (c["model"]["unet.conv_in.weight"] for c in (checkpoint, other))
    assert (weights - others).abs().mean() > 0.05  # other ones from the beginning


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
    network = {"channel_multipliers": [1], "attention_resolutions": [], "low_res_size": 12, "dropout": 0}
    training = {"batch_size": 16, "learning_rate": 0.01, "warmup_steps": 5, "ema_decay": 0.95}
    config = tiny_config(**network, **training, num_training_steps=200, sample_every=200)
    row = log_of(run(config, tmp_path / "output"))[-1]
    assert float(row["psnr"]) > float(row["bicubic_psnr"]) + 0.5


def test_the_ema_is_the_running_average_of_the_weights(tiny_config, tmp_path, monkeypatch):
    weights = []  # after each step

    def training_step(run):
        loss = STEP(run)
        weights.append({name: weight.detach().double() for name, weight in run.model.named_parameters()})
        return loss

    monkeypatch.setattr(train_mnist, "training_step", training_step)
    config = tiny_config(ema_decay=0.5, learning_rate=0.01, warmup_steps=0, num_training_steps=10)
    ema, average = checkpoint_of(run(config, tmp_path / "output"))["ema"], weights[0]
    for step, now in enumerate(weights[1:], start=2):
        decay = min(0.5, (1 + step) / (10 + step))  # 3/12, 4/13, … 9/18, 0.5, 0.5
        average = {name: decay * average[name] + (1 - decay) * now[name] for name in now}
    for name, value in average.items():
        torch.testing.assert_close(ema[name].double(), value, atol=1e-6, rtol=1e-5)


def test_telling_the_duration_of_a_long_run_on_a_cpu_changes_nothing(tiny_config, tmp_path, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(train_mnist, "train", lambda run: trained.append((STEP(run), run.model.state_dict())))
    for steps, told in ((1000, 0), (1001, 1)):
        run(tiny_config(), tmp_path / "output", "--num_training_steps", steps)
        line = r"\n.*1,001 steps .* \d+ minutes; .* \d+ minutes, give --num_training_steps 1000\n"
        assert len(re.findall(line, capsys.readouterr().out)) == told
    torch.testing.assert_close(*trained, rtol=0, atol=0)


def test_a_killed_run_resumes_bit_for_bit(tiny_config, small_mnist, tmp_path):
    config = tiny_config(dataset="mnist", precision="auto", sample_every=5)
    killed, whole, flags = tmp_path / "killed", tmp_path / "whole", ["--data_dir", small_mnist, "--num_training_steps"]
    process = subprocess.Popen([sys.executable, ROOT / "train_mnist.py", *flags_of(config, killed, *flags, 900)])
    deadline = time.monotonic() + 120
    try:
        while not (killed / "checkpoint.pt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    step = checkpoint_of(killed)["step"]  # 5, or a later one where this test was slow to kill
    run(config, killed, *flags, step + 10, "--resume")
    run(config, whole, *flags, step + 10)
    assert_same_training(killed, whole)
    logs = [[row | {"images_per_second": ""} for row in log_of(output)] for output in (killed, whole)]
    assert logs[0] == logs[1] and len(logs[0]) == step // 5 + 2
    for path in [*whole.glob("*.png"), whole / "refinement.gif"]:
        assert (killed / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("number, last", [(signal.SIGINT, 7), (signal.SIGTERM, 11)])
def test_a_signal_lets_the_step_finish_and_the_run_goes_on_later(finished, tmp_path, monkeypatch, capsys, number, last):
    """At whatever moment it comes, here in step 7 or after step 10, what the script says was last is saved."""
    (config, uninterrupted), output, signals = finished, tmp_path / "output", [number]

    def interrupt(*_):
        if signals:
            signal.raise_signal(signals.pop())

    if last == 7:
        monkeypatch.setattr(train_mnist, "training_step", lambda run: (run.step == 6 and interrupt()) or STEP(run))
    else:
        monkeypatch.setattr(train_mnist.tqdm, "set_postfix_str", interrupt)
    with pytest.raises(SystemExit) as exit:
        run(config, output)
    out = capsys.readouterr().out
    assert exit.value.code == 128 + number and f"stopped after step {last};" in out and "--resume" in out
    assert checkpoint_of(output)["step"] == last and [row["step"] for row in log_of(output)] == [str(last)]
    assert sorted(p.name for p in output.glob("*.png")) == sorted(f"{name}-{last:06d}.png" for name in GRIDS)
    assert_same_training(run(config, output, "--resume"), uninterrupted)


def test_a_signal_during_the_last_step_does_not_promise_more(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_mnist, "training_step", lambda run: signal.raise_signal(signal.SIGINT) or STEP(run))
    run(tiny_config(), tmp_path / "output", "--num_training_steps", 1)
    assert checkpoint_of(tmp_path / "output")["step"] == 1 and "goes on" not in capsys.readouterr().out


def test_a_second_run_moves_what_the_first_left_and_loses_nothing(copy_of_finished, capsys):
    config, output = copy_of_finished
    expected = {Path("earlier-1") / path: content for path, content in snapshot(output).items()}
    run(config, output, "--num_training_steps", 1)
    second = {path: content for path, content in snapshot(output).items() if len(path.parts) == 1}
    expected |= {Path("earlier-2") / path: content for path, content in second.items()}
    (output / "notes.txt").write_text("mine")
    run(config, output, "--num_training_steps", 2)
    found = snapshot(output)
    assert expected.items() <= found.items() and found[Path("notes.txt")] == b"mine"
    assert len(found) == len(expected) + 8  # the notes and the third run's four grids, animation, log and checkpoint
    assert "earlier-2" in capsys.readouterr().out and checkpoint_of(output)["step"] == 2


@pytest.mark.parametrize("resumed", [True, False])
def test_a_loss_or_weight_that_is_not_finite_stops_the_run_before_anything_is_overwritten(
    copy_of_finished, tmp_path, failure, monkeypatch, resumed
):
    """The line speaks of a checkpoint only where there is one."""
    config, output = copy_of_finished
    output, flags = (output, ["--resume"]) if resumed else (tmp_path / "new", [])
    before = snapshot(output) if resumed else {Path("log.csv"): HEADER.encode() + b"\n"}

    def training_step(run):
        loss = STEP(run)
        if run.step == 20:
            run.model.unet.conv_in.weight.data[0] = math.inf
        return loss * math.nan if resumed else loss

    monkeypatch.setattr(train_mnist, "training_step", training_step)
    status, error = failure(config, output, "--num_training_steps", 21, *flags)
    assert status == 1 and "finite" in error and snapshot(output) == before
    assert (f"{output / 'checkpoint.pt'} is as it was" in error) == ("checkpoint" in error) == resumed


def test_a_full_disk_leaves_the_last_checkpoint_and_one_line(copy_of_finished, failure):
    resource, (config, output) = pytest.importorskip("resource"), copy_of_finished
    before, limits = (output / "checkpoint.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # room for grids, not for a checkpoint
    try:
        status, error = failure(config, output, "--num_training_steps", 21, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and str(output / "checkpoint.pt") in error and not list(output.glob("*.tmp"))
    assert (output / "checkpoint.pt").read_bytes() == before and (output / "sr-000021.png").exists()


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
    run(config, output, "--num_training_steps", 21, "--resume")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "log.csv" in line]
    assert len(warnings) == 2 and all("Permission denied" in line and "going on" in line for line in warnings)
    assert written[-2:] == ["checkpoint.pt", "log.csv"] and (output / "log.csv").read_bytes() == before
    assert [row["step"] for row in checkpoint_of(output)["log"]] == [20, 21]


def test_a_run_in_float32_resumes_in_float16(copy_of_finished, monkeypatch):
    """As where a CPU's checkpoint goes on on a GPU without bfloat16."""
    config, output = copy_of_finished
    monkeypatch.setattr(utils, "choose_precision", lambda *_: torch.float16)
    checkpoint = checkpoint_of(run(config, output, "--num_training_steps", 21, "--resume"))
    assert checkpoint["step"] == 21 and all(value.isfinite().all() for value in checkpoint["model"].values())


@pytest.mark.parametrize("layouts", [("channels_last", "contiguous_format"), ("contiguous_format", "channels_last")])
def test_a_run_goes_on_in_another_memory_layout(tiny_config, tmp_path, monkeypatch, layouts):
    """As between a CPU and a GPU: the moments of Adam are the same numbers, and lie in memory as their weights do."""
    old, new = (getattr(torch, name) for name in layouts)
    config, output, resumed = tiny_config(), tmp_path / "output", []
    monkeypatch.setattr(utils, "choose_layout", lambda *_: old)
    saved = checkpoint_of(run(config, output, "--num_training_steps", 2))["optimizer"]["state"]
    monkeypatch.setattr(utils, "choose_layout", lambda *_: new)
    monkeypatch.setattr(train_mnist, "train", resumed.append)
    run(config, output, "--resume")
    assert resumed[0].model.unet.middle.block.conv1.weight.is_contiguous(memory_format=new)
    for i, weight in enumerate(resumed[0].model.parameters()):
        for name in ("exp_avg", "exp_avg_sq"):
            moment = resumed[0].optimizer.state[weight][name]
            assert torch.equal(moment, saved[i][name]) and moment.stride() == weight.stride()


REFUSED = [  # settings, flags, words of the line
    ({}, "--num_training_steps many", "num_training_steps: invalid int value: 'many'"),
    ({}, "--batch_size -1", "batch_size is -1"),
    ({}, "--learning_speed 3", "--learning_speed"),
    ({}, "--device toaster", "device toaster is not one of cuda, mps, cpu"),
    ({}, "--device cuda:99", "device cuda:99 is not there"),
    ({}, "--config_path none.toml", "none.toml: No such file"),
    ({"precision": "float16"}, "", '"auto"'),  # on a CPU
    ({"dataset": "fashion_mnist", "fallback": ""}, "", "fashion_mnist could not be downloaded"),
    ({"features": 16}, "--resume", "features is 16, in {} it is 8"),
    ({"num_timesteps": 1000}, "--resume", "num_timesteps is 1000, in {} it is 2000"),
    ({"dataset": "mnist"}, "--resume", "dataset is 'mnist', in {} it is 'digits'"),
    ({"method": "regression"}, "--resume", "method is 'regression', in {} it is 'sr3'"),
]


@pytest.mark.parametrize("settings, flags, words", REFUSED, ids=lambda value: str(value)[:40])
def test_what_does_not_go_with_this_machine_or_checkpoint_is_refused(
    refused, tiny_config, small_mnist, tmp_path, settings, flags, words
):
    line = refused(tiny_config(**settings), "--data_dir", small_mnist, *flags.split())
    assert words.format(tmp_path / "output/checkpoint.pt") in line


def test_a_refused_run_makes_no_output_folder(refused, tiny_config, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        assert str(path) in refused(tiny_config(), output=path)
    refused(tiny_config(channels=2), output=tmp_path / "new")
    assert "checkpoint.pt: No such file" in refused(tiny_config(), "--resume", output=tmp_path / "new")
    refused(tiny_config(dataset="folder"), "--data_dir", tmp_path / "none", output=tmp_path / "new")
    assert not (tmp_path / "new").exists()


FAULTS = {
    "weights only": lambda c: c.pop("optimizer"),
    "another weight's name": lambda c: c["model"].update(renamed=c["model"].pop("unet.conv_in.weight")),
    "log without rows": lambda c: c.update(log=[20]),
    "short moments": lambda c: [m.update(exp_avg=m["exp_avg"][:1]) for m in c["optimizer"]["state"].values()],
    "moments of nothing": lambda c: c["optimizer"].update(state={}),
    "a step of text": lambda c: c.update(step="20"),
    "no moments": lambda c: c.update(optimizer={}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_checkpoint_cannot_be_resumed(refused, copy_of_finished, fault):
    config, output = copy_of_finished
    checkpoint = checkpoint_of(output)
    FAULTS[fault](checkpoint)
    utils.save_checkpoint(output / "checkpoint.pt", checkpoint)
    assert str(output / "checkpoint.pt") in refused(config, "--resume")


@pytest.mark.parametrize("error", [RuntimeError("can't allocate memory"), MemoryError("out of memory")], ids=type)
def test_out_of_memory_asks_for_a_smaller_batch_and_calls_no_checkpoint_damaged(
    refused, failure, tiny_config, tmp_path, monkeypatch, error
):
    monkeypatch.setattr(train_mnist, "training_step", raising(error))
    status, line = failure(tiny_config(), tmp_path / "new")
    assert status == 2 and "batch_size" in line
    monkeypatch.setattr(torch, "load", raising(error))
    line = refused(tiny_config(), "--resume")
    assert str(error) in line and "damaged" not in line and "cut off" not in line


def test_a_full_disk_at_the_start_is_refused_before_anything_is_moved(refused, tiny_config, monkeypatch):
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
    assert "No space left" in refused(tiny_config())


def test_an_output_whose_reader_is_gone_is_named_in_one_line(tiny_config, tmp_path, monkeypatch, failure):
    """As with `| head -0`. What is left unwritten is not complained of at the end, where Python closes its output."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        status, line = failure(tiny_config(), tmp_path / "output")
    assert status == 2 and "standard output: Broken pipe" in line


def test_a_run_without_a_console_trains(tiny_config, tmp_path, monkeypatch):
    """As with `>&-`, or with pythonw on Windows."""
    monkeypatch.setattr(sys, "stdout", None)
    output = run(tiny_config(), tmp_path / "output", "--num_training_steps", 1)
    assert checkpoint_of(output)["step"] == 1
