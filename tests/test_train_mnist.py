"""train_mnist.py as its users run it: what a run writes, how it ends, how it goes on, what it refuses."""

import io
import itertools
import math
import os
import re
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
from conftest import ROOT, TINY, cells, checkpoint_of, flags_of, log_of, raising, run, write_tiny_config
from PIL import Image, ImageSequence

import train_mnist
import utils
from sr3 import SR3, Regression
from unet import UNet

pytestmark = pytest.mark.usefixtures("few_digits")
GRIDS = ("hr", "lr", "refinement", "sr")


@pytest.fixture(scope="module")
def finished(few_digits, tmp_path_factory):
    """The config and the output of one run of 20 steps; not to be written to."""
    config = write_tiny_config(tmp_path_factory.mktemp("finished") / "tiny.toml")
    return config, run(config, config.parent / "output")


@pytest.fixture
def copied(finished, tmp_path):
    """Its config, and a copy of its output."""
    return finished[0], Path(shutil.copytree(finished[1], tmp_path / "output"))


@pytest.fixture
def failure(tmp_path, capsys):
    """Called with what `run` takes, runs until it fails in one line; returns it. Status 2 leaves all as it was."""

    def fail(config, output, *flags, status=2):
        before = snapshot(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run(config, output, *flags)
        error = capsys.readouterr().err
        (line,) = [line for line in re.split(r"[\r\n]+", error) if line.strip() and "%|" not in line]  # no bar's
        assert line.startswith("train_mnist.py: ") and "None:" not in line and exit.value.code == status, error
        assert status != 2 or snapshot(tmp_path) == before
        return line

    return fail


@pytest.fixture
def at_each_step(monkeypatch):
    """Called with a function of step, model and loss; what it returns becomes the loss of that step of this process."""

    def install(function):
        forward, steps = SR3.forward, itertools.count(1)
        monkeypatch.setattr(SR3, "forward", lambda self, *batch: function(next(steps), self, forward(self, *batch)))

    return install


def snapshot(folder, *endings):
    """The content of each file by its name; the lock, which is empty, is not told of."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if not endings or p.suffix in endings}


def assert_same_training(output, other):
    """Weights, averages and moments are equal to the last bit."""
    parts = ("step", "model", "ema", "optimizer")
    found, expected = ({part: checkpoint_of(o)[part] for part in parts} for o in (output, other))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_run_writes_grids_log_and_checkpoint_averages_its_weights_and_is_not_changed_by_drawing(
    finished, tiny_config, tmp_path, monkeypatch, at_each_step, capsys
):
    """early_samples, every sample_every steps and the last one; a row of the log there and every LOG_EVERY steps."""
    losses, weights, sizes, forward = [], [], set(), UNet.forward

    def remember(step, model, loss):
        losses.append(loss.item())
        weights.append([weight.detach().double() for weight in model.parameters()])  # before the step
        return loss

    at_each_step(remember)
    monkeypatch.setattr(UNet, "forward", lambda unet, x, *rest: sizes.add(len(x)) or forward(unet, x, *rest))
    monkeypatch.setattr(train_mnist, "LOG_EVERY", 8)
    output = run(tiny_config(early_samples=[3], sample_every=14), tmp_path / "output")
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
        metrics = [row[key] for key in ("psnr", "ssim", "consistency")]
        assert all(math.isfinite(float(m)) for m in metrics) if step in drawn else metrics == [""] * 3
    told = re.findall(r"step (\d+): PSNR (\S+) dB", capsys.readouterr().err)
    assert told == [(row["step"], f"{float(row['psnr']):.1f}") for row in rows if row["psnr"]]
    assert_same_training(output, finished[1])  # which drew at the end only
    checkpoint, average = checkpoint_of(output), weights[0]
    for step, now in enumerate([*weights[1:], checkpoint["model"].values()], start=1):
        decay = (1 + step) / (10 + step)  # 2/11, 3/12, …
        average = [decay * old + (1 - decay) * new for old, new in zip(average, now)]
    torch.testing.assert_close([value.double() for value in checkpoint["ema"].values()], average, atol=1e-6, rtol=1e-5)


def test_the_pictures_show_64_test_digits_and_what_the_averaged_weights_make_of_them(finished):
    _, output = finished
    images = utils.draw_digits(10_000, 16, 1, seed=1)[0][:64]
    high_res, low_res, super_res = (cells(output / f"{name}-000020.png", 8) for name in ("hr", "lr", "sr"))
    assert torch.equal(high_res, images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3))
    y_0, small, context = utils.make_pair(images, 4)
    pixels = ((small[:, 0] + 1) * 127.5).repeat_interleave(4, 1).repeat_interleave(4, 2)  # each a square
    assert (low_res - pixels[..., None]).abs().max() < 0.51  # rounded

    model, checkpoint = utils.load_model(output / "checkpoint.pt"), checkpoint_of(output)
    assert not any(module.training for module in model.modules()) and model.step == 20
    assert all(torch.equal(weight, checkpoint["ema"][name]) for name, weight in model.state_dict().items())
    generator = torch.Generator().manual_seed(0)  # the config's seed
    drawn = torch.cat([model.sample(part, 4, generator) for part in context.split(4)]).clamp(-1, 1)
    assert (super_res[..., 0] - (drawn[:, 0] + 1) * 127.5).abs().max() < 0.6  # rounded
    error = ((drawn.double() - y_0.double()) / 2).square().mean((1, 2, 3))
    assert float(log_of(output)[-1]["psnr"]) == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)

    # Columns of the refinement: low resolution, ŷ_0 of each step but the last, super-resolution, the truth: of the
    # eight digits that are farthest from their first ŷ_0.
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for part in context.split(4):
        first, *_ = [y_0_hat for _, y_0_hat in model.refine(part, 4, generator)]
        estimates.append(first)
    chosen = (torch.cat(estimates) - drawn).double().square().mean((1, 2, 3)).topk(8).indices
    rows = cells(output / "refinement-000020.png", 6).view(8, 6, 16, 16, 3)
    for column, expected in ((0, low_res), (-2, super_res), (-1, high_res)):
        assert torch.equal(rows[:, column], expected[chosen])
    with Image.open(output / "refinement.gif") as animation:  # y_t after each step, beside x; again and again
        assert animation.n_frames == 4 and animation.info["loop"] == 0
        frames = [frame.copy() for frame in ImageSequence.Iterator(animation)]
    assert frames[-1].info["duration"] > 2 * frames[0].info["duration"]
    frames = [cells(frame, 10).view(20, 2, 16, 16, 3) for frame in frames]
    assert all(torch.equal(frame[:, 0], low_res[:20]) for frame in frames)
    assert frames[0][:, 1].float().std() > 60  # noise
    assert (frames[-1][:, 1].int() - super_res[:20].int()).abs().max() <= 1


def test_without_mnist_digits_are_drawn_with_a_loud_warning_and_named_in_every_output(tiny_config, tmp_path, capsys):
    output = run(tiny_config(dataset="mnist", num_training_steps=2), tmp_path / "output", "--data_dir", tmp_path / "no")
    for grid in GRIDS:
        assert Image.open(output / f"{grid}-000002.png").getexif()[0x010E] == "digits, step 2"
    assert log_of(output)[0]["dataset"] == checkpoint_of(output)["config"]["dataset"] == "digits"
    out, error = capsys.readouterr()
    words = ("!" * 80, "WARNING", "DRAWN DIGITS", str(tmp_path / "no"), "train-images-idx3-ubyte.gz")
    assert out.startswith("digits: 3,000 images") and all(word in error for word in words)


def test_every_setting_is_a_flag_which_wins_over_the_config(finished, tmp_path, monkeypatch):
    """Paths are those of the current folder."""
    flags = [[f"--{name}", *(value if isinstance(value, list) else [value])] for name, value in TINY.items()]
    monkeypatch.chdir(tmp_path)
    Path("other.toml").write_text('features = 64\nearly_samples = [1]\ndataset = "cifar10"', encoding="utf-8-sig")
    run("other.toml", "output", *itertools.chain(*flags))
    assert checkpoint_of(tmp_path / "output")["config"] == utils.DEFAULTS | TINY
    assert_same_training(tmp_path / "output", finished[1])


def test_a_regression_run_on_two_colour_pictures_writes_the_same_grids_without_noise(tiny_config, tmp_path):
    for i in range(11):  # two of them for testing
        Image.new("RGB", (20, 18), (20 * i, 100, 200)).save(tmp_path / f"{i:02}.png")
    config = tiny_config(method="regression", dataset="folder", channels=3, num_training_steps=1)
    output = run(config, tmp_path / "output", "--data_dir", tmp_path)
    names = [*(f"{name}-000001.png" for name in GRIDS), "checkpoint.pt", "log.csv"]
    assert sorted(snapshot(output)) == sorted(names) and log_of(output)[-1]["psnr"]
    assert isinstance(utils.load_model(output / "checkpoint.pt"), Regression)
    rows = cells(output / "refinement-000001.png", 3).view(2, 3, 16, 16, 3)
    for column, name in enumerate(("lr", "sr", "hr")):
        assert torch.equal(rows[:, column], cells(output / f"{name}-000001.png", 2))


def test_a_short_training_beats_bicubic(tiny_config, tmp_path):
    network = {"channel_multipliers": [1], "attention_resolutions": [], "low_res_size": 12, "dropout": 0}
    training = {"batch_size": 16, "learning_rate": 0.01, "warmup_steps": 5, "num_training_steps": 200}
    output = run(tiny_config(**network, **training, sample_every=200), tmp_path / "output")
    y_0, _, context = utils.make_pair(utils.draw_digits(10_000, 16, 1, seed=1)[0][:64], 12)
    bicubic = -10 * ((context.clamp(-1, 1) - y_0) / 2).square().mean((1, 2, 3)).log10().mean()
    assert float(log_of(output)[-1]["psnr"]) > bicubic + 0.5


def test_a_run_keeps_its_folder_until_it_is_killed_and_resumes_bit_for_bit(tiny_config, small_mnist, tmp_path, failure):
    config = tiny_config(dataset="mnist", precision="auto", sample_every=5)
    killed, whole, flags = tmp_path / "killed", tmp_path / "whole", ["--data_dir", small_mnist, "--num_training_steps"]
    process = subprocess.Popen([sys.executable, ROOT / "train_mnist.py", *flags_of(config, killed, *flags, 900)])
    deadline = time.monotonic() + 120
    try:
        while not (killed / "log.csv").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)
        for resumed in ([], ["--resume"]):
            assert f"another run writes to {killed}" in failure(config, killed, *flags, 5, *resumed)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    step = checkpoint_of(killed)["step"]  # 5, or a later one where this test was slow to stop it
    run(config, killed, *flags, step + 10, "--resume")
    run(config, whole, *flags, step + 10)
    assert_same_training(killed, whole)
    # What was being drawn when it was killed is not drawn again.
    logs = [[row | {"images_per_second": ""} for row in log_of(o) if row["step"] != str(step)] for o in (killed, whole)]
    assert logs[0] == logs[1] and len(logs[0]) == step // 5 + 1
    for path, content in snapshot(whole, ".png", ".gif").items():
        assert f"{step:06d}" in path or (killed / path).read_bytes() == content


@pytest.mark.parametrize("number, last", [(signal.SIGINT, 7), (signal.SIGTERM, 11), (signal.SIGINT, 20)])
def test_a_signal_lets_the_step_finish_and_the_run_goes_on_later(
    finished, tmp_path, monkeypatch, at_each_step, capsys, number, last
):
    """In step 7, after step 10, or in the last one: what is said to be last is saved, undrawn where there is more."""
    (config, uninterrupted), output, handler = finished, tmp_path / "output", signal.getsignal(number)
    signals = [number]

    def interrupt(*_):
        if signals:
            signal.raise_signal(signals.pop())

    if last == 11:
        monkeypatch.setattr(train_mnist.tqdm, "set_postfix_str", interrupt)
    else:
        at_each_step(lambda step, model, loss: (step == last and interrupt()) or loss)
    try:
        run(config, output, "--early_samples", last)
        assert last == 20
    except SystemExit as exit:
        assert exit.code == 128 + number and list(snapshot(output)) == ["checkpoint.pt", "log.csv"]
    assert (f"stopped after step {last}; the same command with --resume" in capsys.readouterr().out) == (last < 20)
    assert checkpoint_of(output)["step"] == last and [row["step"] for row in log_of(output)] == [str(last)]
    assert signal.getsignal(number) == handler
    assert_same_training(run(config, output, "--resume"), uninterrupted)


def test_a_run_cut_off_while_it_draws_has_saved_its_state_and_draws_again(finished, tmp_path, failure):
    (config, uninterrupted), output = finished, tmp_path / "output"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "save_grid", raising(KeyboardInterrupt()))
        failure(config, output, status=130)
    assert list(snapshot(output)) == ["checkpoint.pt", "log.csv"] and log_of(output)[-1]["psnr"] == ""
    assert_same_training(output, uninterrupted)
    run(config, output, "--resume")
    assert snapshot(output, ".png", ".gif") == snapshot(uninterrupted, ".png", ".gif")
    (row,), (expected,) = log_of(output), log_of(uninterrupted)
    assert row | {"images_per_second": ""} == expected | {"images_per_second": ""}


def test_a_second_run_moves_what_the_first_left_and_loses_nothing(copied, capsys):
    (config, output), expected = copied, {}
    for name in ("results.md", "comparison.png"):
        (output / name).write_text("of evaluate.py")
    for i in (1, 2):
        expected |= {f"earlier-{i}/{path}": content for path, content in snapshot(output).items() if "/" not in path}
        run(config, output, "--num_training_steps", i)
        found, names = snapshot(output), {"refinement.gif", "log.csv", "checkpoint.pt"}
        assert expected.items() <= found.items() and len(found) == len(expected) + len(names) + len(GRIDS)
        assert names < found.keys() and f"earlier-{i}" in capsys.readouterr().out and checkpoint_of(output)["step"] == i
    (output / "notes.txt").write_text("mine")
    run(config, output, "--num_training_steps", 1)
    assert (output / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("resumed", [True, False])
def test_what_is_not_finite_ends_a_run_before_it_overwrites(copied, tmp_path, failure, at_each_step, resumed):
    """A loss, in a resumed run, or a weight; the line speaks of a checkpoint only where there is one."""

    def spoil(step, model, loss):
        if step == 20:
            model.unet.conv_in.weight.data[0] = math.inf
        return loss * math.nan if resumed else loss

    config, output, steps = (*copied, [21, "--resume"]) if resumed else (copied[0], tmp_path / "new", [20])
    before = snapshot(tmp_path)
    at_each_step(spoil)
    line = failure(config, output, "--num_training_steps", *steps, status=1)
    assert "finite" in line and snapshot(tmp_path) == before
    assert (f"{output / 'checkpoint.pt'} is as it was" in line) == ("checkpoint" in line) == resumed


def test_a_disk_without_room_for_a_checkpoint_keeps_the_last_one(copied, failure):
    resource, (config, output) = pytest.importorskip("resource"), copied
    size, limits = (output / "checkpoint.pt").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        assert str(output / "checkpoint.pt") in failure(config, output, "--num_training_steps", 21, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_log_that_cannot_be_replaced_is_only_warned_of(copied, monkeypatch, capsys):
    """As where a spreadsheet has it open; the checkpoint is written before."""
    (config, output), original, written = copied, os.replace, []
    before = (output / "log.csv").read_bytes()

    def replace(source, target):
        written.append(target.name)
        if target.name == "log.csv":
            raise PermissionError(13, "Locked")
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    run(config, output, "--num_training_steps", 21, "--resume")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "log.csv" in line]
    assert len(warnings) == 2 and all("Locked; going on" in line for line in warnings)
    assert written[:2] == ["checkpoint.pt", "log.csv"] and checkpoint_of(output)["step"] == 21
    assert (output / "log.csv").read_bytes() == before and not list(output.glob("*.tmp"))


OUT_OF_MEMORY = RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
REFUSED = [  # flags, words of the line, what raises which error
    ("--num_training_steps many", "num_training_steps: invalid int value: 'many'", None),
    ("--early_samples 5 0", "--early_samples is [5, 0]: it must be a list, each a whole number from 1 to", None),
    ("--device toaster", "device toaster is none of cuda, mps (one rank only), cpu", None),
    ("--config_path none.toml", "none.toml: No such file", None),
    ("--dataset fashion_mnist --output_dir new", "fashion_mnist could not be downloaded", None),
    ("--output_dir tiny.toml", "tiny.toml: File exists", None),
    ("--output_dir tiny.toml/below", "tiny.toml/below: Not a directory", None),
    ("--output_dir new --resume", "checkpoint.pt: No such file", None),
    ("--compile", "(RuntimeError: no gcc); leave out --compile", (torch, "compile", RuntimeError("no gcc"))),
    ("", "No space left", (os, "fsync", OSError(28, "No space left on device"))),
    ("--resume --num_training_steps 21", "out of memory; give a smaller --batch_size", (SR3, "forward", OUT_OF_MEMORY)),
    ("--resume", "out of memory; give a smaller --batch_size", (torch, "load", MemoryError("no"))),
]


@pytest.mark.parametrize("flags, words, patch", REFUSED)
def test_what_cannot_work_is_refused_in_one_line_and_leaves_earlier_results_where_they_were(
    copied, tiny_config, tmp_path, failure, monkeypatch, flags, words, patch
):
    monkeypatch.chdir(tmp_path)
    if patch:
        monkeypatch.setattr(*patch[:2], raising(patch[2]))
    assert words in failure(tiny_config(), "output", "--data_dir", "none", *flags.split())
    assert not (tmp_path / "new").exists()


OTHERS = {
    "method": "regression", "dataset": "mnist", "image_size": 32, "low_res_size": 8, "channels": 3, "features": 16,
    "channel_multipliers": [1, 1], "blocks_per_level": 2, "attention_resolutions": [16], "attention_heads": 4,
    "dropout": 0.2, "num_timesteps": 1000, "beta_start": 1e-5, "beta_end": 0.02, "loss_weight": "1",
}  # fmt: skip


def test_a_resumed_run_takes_its_checkpoints_settings_and_can_change_the_training_only(failure, tiny_config, copied):
    names, output = list(utils.DEFAULTS), copied[1]
    assert names[: names.index("sampling_steps")] == list(OTHERS)
    for name, value in OTHERS.items():
        flag = [f"--{name}", *(value if isinstance(value, list) else [value])]
        for config, flags in ((None, flag), (tiny_config(**{name: value}), [])):
            line = failure(config, output, "--resume", *flags)
            assert f"{name} is {value}, in {output / 'checkpoint.pt'} it is " in line
    changes = {"num_training_steps": 22, "sampling_steps": 2, "batch_size": 2, "learning_rate": 0.01}
    before, flags = checkpoint_of(output)["config"], [(f"--{name}", value) for name, value in changes.items()]
    run(None, output, "--resume", *itertools.chain(*flags))
    assert checkpoint_of(output)["config"] == before | changes
    assert log_of(output)[-1]["step"] == "22" and float(log_of(output)[-1]["learning_rate"]) == 0.01 * 22 / 50


FAULTS = {
    "weights only": lambda c: {name: c[name] for name in ("config", "step", "ema")},
    "settings of another version": lambda c: c | {"config": c["config"] | {"ema_decay": 0.99}},
    "no weights": lambda c: c | {"model": None},
    "another weight's name": lambda c: c | {"model": {f"{name}2": weight for name, weight in c["model"].items()}},
    "no moments": lambda c: c | {"optimizer": {}},
}


def test_what_is_no_whole_checkpoint_or_no_log_cannot_be_resumed(failure, copied):
    config, output = copied
    path, log, complete = output / "checkpoint.pt", output / "log.csv", checkpoint_of(output)
    contents = [b"", b"text", path.read_bytes()[:-100]]
    for fault in FAULTS.values():
        torch.save(fault(complete), buffer := io.BytesIO())
        contents.append(buffer.getvalue())
    for content in contents:
        path.write_bytes(content)
        line = failure(config, output, "--resume")
        assert str(path) in line and ("is no checkpoint of this lesson" in line or "its state doesn't fit" in line)
    torch.save(complete, path)
    log.write_text("step,loss\nmany,2\n")
    assert f"{log} is not this lesson's log" in failure(config, output, "--resume")


def test_it_runs_in_a_notebook_without_a_console_and_until_its_reader_is_gone(tiny_config, tmp_path, failure):
    """A notebook's streams are no files, pythonw on Windows has none, and `| head -0` closes one."""
    with pytest.raises(SystemExit) as exit, redirect_stdout(io.StringIO()) as out:
        train_mnist.main(["--help"])
    assert exit.value.code == 0 and all(f"--{name} " in out.getvalue() for name in utils.DEFAULTS)
    for stream in (io.StringIO(), None):
        with redirect_stdout(stream), redirect_stderr(stream):
            run(tiny_config(num_training_steps=1), tmp_path / "output")
        assert checkpoint_of(tmp_path / "output")["step"] == 1
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stdout, redirect_stdout(stdout):
        assert "standard output: Broken pipe" in failure(tiny_config(), tmp_path / "new")


def test_a_compiled_run_needs_two_graphs_and_trains_to_the_same_weights(finished, tmp_path, monkeypatch):
    """The trained network's with gradients and the average's without, however often the two take turns."""
    graphs = []
    backend = partial(torch.compile, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    monkeypatch.setattr(torch, "compile", backend)
    output = run(finished[0], tmp_path / "output", "--compile", "--early_samples", 2, 4)
    assert len(graphs) == 1 + 2  # the first is a look for a compiler
    assert_same_training(output, finished[1])
