"""Several ranks: runs of two on gloo, and what is chosen and refused on GPUs."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, checkpoint_of, flags_of, lines_of, run

import train_mnist
import utils

SCRIPT, TORCHRUN = ROOT / "train_mnist.py", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(*arguments, **environment):
    """A Python of its own process group."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "start_new_session": True}
    return subprocess.Popen([sys.executable, *arguments], env=os.environ | environment, **pipes)


def test_two_ranks_go_on_with_the_mean_of_their_gradients_and_write_one_set_of_files(
    tiny_config, small_mnist, tmp_path, monkeypatch
):
    """Adam's first moment is linear in the gradients: the mean of those that each rank's half of the batch gives."""
    config, output, losses, moments = tiny_config(dataset="mnist", max_grad_norm=1e6), tmp_path / "output", [], []
    data = ["--data_dir", small_mnist]
    run(config, output, *data)

    def train(run):  # one step
        losses.append(train_mnist.training_step(run).item())
        moments.append(torch.cat([run.optimizer.state[w]["exp_avg"].flatten() for w in run.model.parameters()]))

    monkeypatch.setattr(train_mnist, "train", train)
    for rank in range(2):
        monkeypatch.setattr(train_mnist, "RANK", rank)
        run(config, output, *data, "--batch_size", 2, "--resume")
    flags = flags_of(config, output, *data, "--num_training_steps", 21, "--resume")
    process = start(*TORCHRUN, SCRIPT, *flags)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0 and "deprecat" not in error, error
    assert out.count("2 × cpu") == out.count("steps are done") == 1

    grids = [f"{name}-{step:06d}.png" for name in ("hr", "lr", "refinement", "sr") for step in (20, 21)]
    assert sorted(p.name for p in output.iterdir()) == sorted([*grids, "checkpoint.pt", "log.csv", "refinement.gif"])
    log = [line.split(",") for line in (output / "log.csv").read_text().splitlines()]
    assert [row[1] for row in log] == ["step", "20", "21"]
    assert losses[0] != losses[1] and float(log[2][2]) == pytest.approx(sum(losses) / 2, rel=1e-4)
    state = checkpoint_of(output)["optimizer"]["state"]
    found = torch.cat([state[i]["exp_avg"].flatten() for i in range(len(state))])
    torch.testing.assert_close(found, (moments[0] + moments[1]) / 2, atol=1e-7, rtol=1e-4)


def test_ctrl_c_ends_all_ranks_at_once_and_leaves_the_last_checkpoint_whole(tiny_config, small_mnist, tmp_path):
    """A terminal sends SIGINT to torchrun and to its ranks; torchrun sends it to them once more."""
    config, output = tiny_config(dataset="mnist", sample_every=4), tmp_path / "output"
    flags = flags_of(config, output, "--data_dir", small_mnist, "--num_training_steps", 10**6)
    process, deadline = start(*TORCHRUN, SCRIPT, *flags), time.monotonic() + 90
    while not (output / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode != 0 and "are done" not in out, error
    assert checkpoint_of(output)["step"] % 4 == 0  # of sample_every


def test_what_only_the_first_rank_finds_ends_both_with_a_line_in_their_names(tiny_config, tmp_path):
    """Without torchrun, which may end the second one before it has said its line."""
    flags = flags_of(tiny_config(dataset="folder"), tmp_path / "output", "--data_dir", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    ranks = [start(SCRIPT, *flags, **group, RANK=str(rank)) for rank in range(2)]
    ends = [("train_mnist.py: ", "no readable image"), ("train_mnist.py (rank 1): ", "another rank has failed")]
    for process, (opening, words) in zip(ranks, ends):
        (line,) = lines_of(opening, process.communicate(timeout=120)[1])
        assert process.returncode == 2 and words in line
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("rank, opening", [(0, "train_mnist.py: "), (1, "train_mnist.py (rank 1): ")])
def test_a_batch_that_ranks_do_not_divide_is_refused_by_each_in_its_name(
    monkeypatch, tiny_config, tmp_path, capsys, rank, opening
):
    monkeypatch.setattr(utils, "RANK", rank)
    monkeypatch.setattr(train_mnist, "RANKS", 2)
    with pytest.raises(SystemExit) as exit:
        run(tiny_config(), tmp_path / "output", "--batch_size", 3)
    (line,) = lines_of(opening, capsys.readouterr().err)
    assert exit.value.code == 2 and "batch_size is 3: 2 ranks don't divide it" in line


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(utils, "RANKS", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(utils.InputError, match="more ranks than GPUs, 1"):
        utils.choose_device("cuda:0")


def test_torchrun_on_the_one_apple_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(utils, "RANKS", 2)
    with pytest.raises(utils.InputError, match=r"device mps with 2 ranks is not one of cuda, cpu"):
        utils.choose_device("mps")


@pytest.mark.parametrize("capability, precision", [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_t4_gets_float16_and_an_a100_bfloat16(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert utils.choose_precision("auto", torch.device("cuda")) == precision
