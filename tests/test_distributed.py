"""Several ranks: a run of two on gloo, and what is refused."""

import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT, checkpoint_of, command, log_of, raising, run, snapshot
from torch.optim.optimizer import register_optimizer_step_post_hook

from support import machine
from support.errors import InputError
from sr3 import SR3


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
    monkeypatch.setattr(machine, "first_rank_first", lambda *_: nullcontext())
    for rank in range(2):  # alone, with half a batch
        monkeypatch.setattr(machine, "join_ranks", lambda device, rank=rank: (rank, 1))
        run(shutil.copytree(output, tmp_path / f"rank {rank}"), *flags, **settings, batch_size=2)
    hook.remove()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [*torchrun, ROOT / "train_mnist.py", *command(output, *flags, **settings)]
    process = subprocess.run(script, check=False, capture_output=True, encoding="utf-8", timeout=300)
    assert process.returncode == 0 and process.stderr.count("step 21: PSNR") == 1, process.stderr
    assert process.stdout.count("2 × cpu") == process.stdout.count("steps are done") == 1
    grids = [f"{name}-{step:06d}.png" for name in ("hr", "lr", "refinement", "sr") for step in (20, 21)]
    assert {*snapshot(output)} == {*grids, "checkpoint.pt", "log.csv", "progress.png", "refinement.gif"}
    assert [row["step"] for row in log_of(output)] == ["20", "21"]
    first, second = (loss.item() for loss in losses)
    assert first != second and float(log_of(output)[-1]["loss"]) == pytest.approx(first, rel=1e-4)
    state = checkpoint_of(output)["optimizer"]["state"]
    found = torch.cat([state[i]["exp_avg"].flatten() for i in range(len(state))])
    torch.testing.assert_close(found, (moments[0] + moments[1]) / 2, atol=1e-7, rtol=1e-4)


def test_what_several_ranks_cannot_do_is_refused(monkeypatch, tmp_path, failure):
    """As torchrun starts the second of two. In an srun job the environment alone makes no ranks."""
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert machine.launched_ranks() == 1 and machine.join_ranks(torch.device("cpu")) == (0, 1)
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    for kind in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(kind, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, words in (("cuda:0", "more ranks than GPUs, 1"), (None, "more ranks"), ("mps", "mps is none of cuda")):
        with pytest.raises(InputError, match=words):
            machine.choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.choose_device() == machine.choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(machine, "join_ranks", lambda device: (1, machine.launched_ranks()))
    assert "batch_size is 3: 2 ranks don't divide it" in failure(run, tmp_path / "output", batch_size=3)
    handler = signal.getsignal(signal.SIGINT)  # Ctrl-C ends all ranks at once: they would not stop after the same step
    with machine.caught_signals(2) as signals:
        assert signals == [] and signal.getsignal(signal.SIGINT) == handler


def test_the_first_rank_goes_first_and_what_ends_it_ends_the_others_with_a_line(monkeypatch, failure):
    events = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: events.append("barrier"))
    for rank in range(2):
        with machine.first_rank_first(rank, 2):
            events.append("load")
    assert events == ["load", "barrier", "barrier", "load"]
    monkeypatch.setattr(sys, "argv", ["train_mnist.py"])
    monkeypatch.setattr(torch.distributed, "barrier", raising(RuntimeError("Connection closed by peer")))
    assert "stopped, since the first rank has" in failure(machine.first_rank_first(1, 2).__enter__)
