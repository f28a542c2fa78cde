"""Several ranks: a run of two on gloo, and what is refused."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, checkpoint_of, command, log_of, run
from torch.optim.optimizer import register_optimizer_step_post_hook

import train_mnist
import utils
from sr3 import SR3

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_two_ranks_use_the_mean_of_their_gradients_and_write_one_set_of_files(small_mnist, tmp_path, monkeypatch):
    """Adam's first moment is linear in the gradients: the mean of those that each rank's half of the batch gives."""
    output, forward, losses, moments = tmp_path / "output", SR3.forward, [], []
    flags, settings = ["--data_dir", small_mnist], {"dataset": "mnist", "max_grad_norm": 1e6}
    run(output, *flags, **settings)
    flags, settings = [*flags, "--resume"], settings | {"num_training_steps": 21}
    monkeypatch.setattr(SR3, "forward", lambda *batch: losses.append(forward(*batch)) or losses[-1])

    def remember(optimizer, *_):
        moments.append(torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()]))

    hook = register_optimizer_step_post_hook(remember)
    for rank in range(2):  # alone, with half a batch
        monkeypatch.setattr(train_mnist, "RANK", rank)
        run(shutil.copytree(output, tmp_path / f"rank {rank}"), *flags, **settings, batch_size=2)
    hook.remove()
    script = [ROOT / "train_mnist.py", *command(output, *flags, **settings)]
    process = subprocess.run([*TORCHRUN, *script], check=False, capture_output=True, encoding="utf-8", timeout=300)
    assert process.returncode == 0 and "deprecat" not in process.stderr, process.stderr
    assert process.stdout.count("2 × cpu") == process.stdout.count("steps are done") == 1
    assert process.stderr.count("step 21: PSNR") == 1

    grids = [f"{name}-{step:06d}.png" for name in ("hr", "lr", "refinement", "sr") for step in (20, 21)]
    files = sorted(path.name for path in output.iterdir())
    assert files == sorted([*grids, ".lock", "checkpoint.pt", "log.csv", "refinement.gif"])
    assert [row["step"] for row in log_of(output)] == ["20", "21"]
    first, second = (loss.item() for loss in losses)
    assert first != second and float(log_of(output)[-1]["loss"]) == pytest.approx((first + second) / 2, rel=1e-4)
    state = checkpoint_of(output)["optimizer"]["state"]
    found = torch.cat([state[i]["exp_avg"].flatten() for i in range(len(state))])
    torch.testing.assert_close(found, (moments[0] + moments[1]) / 2, atol=1e-7, rtol=1e-4)


def test_what_only_the_first_rank_finds_ends_both_with_a_line_in_their_names(tmp_path):
    """Without torchrun, which may end the second one before it has said its line."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    flags = command(tmp_path / "output", "--data_dir", tmp_path / "none", dataset="folder")
    start = partial(subprocess.Popen, [sys.executable, ROOT / "train_mnist.py", *flags], stderr=subprocess.PIPE)
    ranks = [start(env=os.environ | group | {"RANK": rank, "LOCAL_RANK": rank}, encoding="utf-8") for rank in "01"]
    ends = ["train_mnist.py: no readable picture", "train_mnist.py (rank 1): stopped, most likely since another rank"]
    for process, opening in zip(ranks, ends):
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 2 and "Traceback" not in error, error
        assert sum(line.startswith(opening) for line in error.splitlines()) == 1, error
    assert not (tmp_path / "output").exists()


def test_ranks_are_read_from_a_complete_environment_only(monkeypatch, capsys):
    complete = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    expected = [(complete, (3, 1, 4)), (complete | {"WORLD_SIZE": "1", "RANK": "0"}, (0, 0, 1))]
    expected += [(dict.fromkeys(complete, ""), (0, 0, 1))]
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


def test_ranks_without_a_gpu_or_a_share_of_the_batch_of_their_own_are_refused(monkeypatch, tmp_path, failure):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (("RANKS", 2), ("LOCAL_RANK", 1)):
        monkeypatch.setattr(utils, name, value)
    for device, words in (("cuda:0", "more ranks than GPUs, 1"), ("mps", "device mps with 2 ranks is none of cuda")):
        with pytest.raises(utils.InputError, match=words):
            utils.choose_device(device)
    monkeypatch.setattr(train_mnist, "RANKS", 2)
    assert "batch_size is 3: 2 ranks don't divide it" in failure(run, tmp_path / "output", batch_size=3)
    handler = signal.getsignal(signal.SIGINT)  # Ctrl-C ends all ranks at once: they would not stop after the same step
    assert utils.catch_signals() == [] and signal.getsignal(signal.SIGINT) == handler
