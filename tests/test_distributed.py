"""Several ranks: a run of two on gloo."""

import shutil
import subprocess
import sys
from contextlib import nullcontext

import torch
from conftest import ROOT, checkpoint_of, command, run, snapshot

from support import machine


def moments_of(output):
    """Adam's first moments, which are linear in the gradients, of all weights as one vector."""
    return torch.cat([state["exp_avg"].flatten() for state in checkpoint_of(output)["optimizer"]["state"].values()])


def test_two_ranks_use_the_mean_of_their_gradients_and_write_one_set_of_files(small_mnist, tmp_path, monkeypatch):
    """The same step, once by two ranks, and by each alone with its half of the batch."""
    output, alone = tmp_path / "output", [tmp_path / "0", tmp_path / "1"]
    settings = {"dataset": "mnist", "max_grad_norm": 1e6}
    run(output, "--data_dir", small_mnist, **settings)
    flags, settings = ["--data_dir", small_mnist, "--resume"], settings | {"num_training_steps": 21}
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model: model)
        patch.setattr(machine, "first_rank_first", lambda *_: nullcontext())
        for rank, folder in enumerate(alone):
            patch.setattr(machine, "join_ranks", lambda *_, rank=rank: (rank, 2))
            run(shutil.copytree(output, folder), *flags, **settings)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [*torchrun, ROOT / "train_mnist.py", *command(output, *flags, **settings)]
    process = subprocess.run(arguments, capture_output=True, encoding="utf-8", timeout=300)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("2 × cpu") == process.stdout.count("steps are done") == 1
    assert snapshot(output).keys() == snapshot(alone[0]).keys()
    first, second = map(moments_of, alone)
    assert not torch.allclose(first, second, rtol=0.01)
    torch.testing.assert_close(moments_of(output), (first + second) / 2, atol=1e-7, rtol=1e-4)
