"""Several ranks: runs of two on gloo."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, checkpoint_of, flags_of, lines_of, log_of, run
from torch.optim.optimizer import register_optimizer_step_post_hook

import train_mnist
import utils
from sr3 import SR3

SCRIPT, TORCHRUN = ROOT / "train_mnist.py", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(*arguments, **environment):
    """A Python of its own process group."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "start_new_session": True}
    return subprocess.Popen([sys.executable, *arguments], env=os.environ | environment, **pipes)


def test_two_ranks_go_on_with_the_mean_of_their_gradients_and_write_one_set_of_files(
    tiny_config, small_mnist, tmp_path, monkeypatch
):
    """Adam's first moment is linear in the gradients: the mean of those that each rank's half of the batch gives."""
    config, output, forward = tiny_config(dataset="mnist", max_grad_norm=1e6), tmp_path / "output", SR3.forward
    flags, losses, moments = ["--data_dir", small_mnist, "--num_training_steps", 21, "--resume"], [], []
    run(config, output, *flags[:2])
    monkeypatch.setattr(SR3, "forward", lambda *batch: losses.append(forward(*batch)) or losses[-1])

    def remember(optimizer, *_):
        moments.append(torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()]))

    hook = register_optimizer_step_post_hook(remember)
    for rank in range(2):  # alone, with half a batch
        monkeypatch.setattr(train_mnist, "RANK", rank)
        run(config, shutil.copytree(output, tmp_path / f"rank {rank}"), *flags, "--batch_size", 2)
    hook.remove()
    process = start(*TORCHRUN, SCRIPT, *flags_of(config, output, *flags))
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0 and "deprecat" not in error, error
    assert out.count("2 × cpu") == out.count("steps are done") == 1

    grids = [f"{name}-{step:06d}.png" for name in ("hr", "lr", "refinement", "sr") for step in (20, 21)]
    files = sorted(path.name for path in output.iterdir())
    assert files == sorted([*grids, ".lock", "checkpoint.pt", "log.csv", "refinement.gif"])
    assert [row["step"] for row in log_of(output)] == ["20", "21"]
    first, second = (loss.item() for loss in losses)
    assert first != second and float(log_of(output)[-1]["loss"]) == pytest.approx((first + second) / 2, rel=1e-4)
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
    flags = flags_of(tiny_config(dataset="folder"), tmp_path / "output", "--data_dir", tmp_path / "none")
    with socket.create_server(("127.0.0.1", 0)) as server:
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    ranks = [start(SCRIPT, *flags, **group, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    ends = [("train_mnist.py: ", "no readable picture"), ("train_mnist.py (rank 1): ", "another rank has failed")]
    for process, (opening, words) in zip(ranks, ends):
        error = process.communicate(timeout=120)[1]
        (line,) = lines_of(opening, error)
        assert process.returncode == 2 and words in line, error
    assert not (tmp_path / "output").exists()


def test_ranks_are_read_from_a_complete_environment_only(monkeypatch, capsys):
    complete = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    single = {name: "" for name in complete}
    expected = [(complete, (3, 1, 4)), (single, (0, 0, 1)), (complete | {"WORLD_SIZE": "1", "RANK": "0"}, (0, 0, 1))]
    expected += [(complete | {name: ""}, None) for name in complete]  # srun, for one, gives no LOCAL_RANK
    expected += [(complete | change, None) for change in ({"RANK": "4"}, {"WORLD_SIZE": "four"}, {"LOCAL_RANK": "-1"})]
    for environment, ranks in expected:
        monkeypatch.setattr(os, "environ", environment)
        if ranks:
            assert utils.read_ranks() == ranks
            continue
        with pytest.raises(SystemExit, match="2"):
            utils.read_ranks()
        assert f"WORLD_SIZE={environment['WORLD_SIZE']!r}" in capsys.readouterr().err


def test_ranks_without_a_gpu_or_a_share_of_the_batch_of_their_own_are_refused(
    monkeypatch, tiny_config, tmp_path, capsys
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (("RANKS", 2), ("LOCAL_RANK", 1)):
        monkeypatch.setattr(utils, name, value)
    for device, words in (("cuda:0", "more ranks than GPUs, 1"), ("mps", "device mps with 2 ranks is none of cuda")):
        with pytest.raises(utils.InputError, match=words):
            utils.choose_device(device)
    monkeypatch.setattr(train_mnist, "RANKS", 2)
    with pytest.raises(SystemExit, match="2"):
        run(tiny_config(), tmp_path / "output", "--batch_size", 3)
    assert "batch_size is 3: 2 ranks don't divide it" in capsys.readouterr().err
