"""Several ranks: gradients and runs of two on gloo, and what is chosen and refused on GPUs."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT, checkpoint_of, flags_of, lines_of, run
from torch.nn.parallel import DistributedDataParallel

import train_mnist
import utils
from sr3 import SR3
from unet import UNet


def build():
    torch.manual_seed(0)
    model = SR3(UNet(1, 8, [1, 2], 1, [8], 2, 0.0, 16))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model, torch.rand(8, 1, 16, 16) * 2 - 1


def gradients_of_a_rank(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model, images = build()
    half = images[4 * rank : 4 * rank + 4]
    parallel = DistributedDataParallel(model)
    torch.manual_seed(100 + rank)
    parallel(half, half).backward()
    torch.save([weight.grad for weight in model.parameters()], folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_half_the_batch_have_the_gradients_of_one_with_all(tmp_path):
    mp.spawn(gradients_of_a_rank, (29511 + os.getpid() % 1000, tmp_path), nprocs=2)
    model, images = build()
    losses = []
    for rank in range(2):
        torch.manual_seed(100 + rank)
        losses.append(model.loss(*[images[4 * rank : 4 * rank + 4]] * 2))
    (sum(losses) / 2).backward()  # the mean over the whole batch
    for rank in range(2):
        gradients = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for found, weight in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(found, weight.grad, atol=1e-6, rtol=1e-4)


@pytest.fixture
def torchrun(tiny_config, small_mnist, tmp_path):
    """Called with the data set's settings and flags, starts a run of two ranks into tmp_path / "output"."""

    def start(*flags, **changes):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        config = tiny_config(**{"dataset": "mnist"} | changes)
        command += [ROOT / "train_mnist.py", *flags_of(config, tmp_path / "output", "--data_dir", small_mnist, *flags)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        return subprocess.Popen(command, **pipes, start_new_session=True)

    return start


def finish(process):
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


def test_a_two_rank_run_writes_one_set_of_grids_and_one_log_and_resumes(torchrun, tmp_path):
    for flags in (["--num_training_steps", 20], ["--num_training_steps", 30, "--resume"]):
        status, out, error = finish(torchrun(*flags))
        assert status == 0 and "deprecat" not in error, error
        assert out.count("2 × cpu") == out.count("steps are done") == 1
    output = tmp_path / "output"
    steps = [line.split(",")[1] for line in (output / "log.csv").read_text().splitlines()]
    assert steps == ["step", "20", "30"]
    grids = [f"{name}-{step:06d}.png" for name in ("hr", "lr", "refinement", "sr") for step in (20, 30)]
    names = sorted(path.name for path in output.iterdir())
    assert names == sorted([*grids, "checkpoint.pt", "log.csv", "refinement.gif"])


def test_ctrl_c_ends_all_ranks_at_once_and_leaves_the_last_checkpoint_whole(torchrun, tmp_path):
    """A terminal sends SIGINT to torchrun and to its ranks; torchrun sends it to them once more."""
    process, deadline = torchrun("--num_training_steps", 10**6), time.monotonic() + 90
    while not (tmp_path / "output/checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    status, out, error = finish(process)
    assert status != 0 and "are done" not in out, error
    assert checkpoint_of(tmp_path / "output")["step"] % 20 == 0  # of sample_every


def test_what_only_the_first_rank_finds_is_refused_by_both(torchrun, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, error = finish(torchrun("--data_dir", tmp_path / "empty", dataset="folder"))
    assert status != 0 and not (tmp_path / "output").exists()
    (line,) = (line for line in error.splitlines() if line.startswith("train_mnist.py: "))
    assert "no readable image" in line and error.count("no readable image") == 1
    others = [line for line in error.splitlines() if line.startswith("train_mnist.py (rank 1): ")]
    assert all("another rank has failed" in line for line in others) and len(others) <= 1  # torchrun may be faster
    assert "RuntimeError" not in error


@pytest.mark.parametrize("rank, opening", [(0, "train_mnist.py: "), (1, "train_mnist.py (rank 1): ")])
def test_a_batch_that_ranks_do_not_divide_is_refused_by_each_in_its_name(
    monkeypatch, tiny_config, tmp_path, capsys, rank, opening
):
    for module, name, value in ((utils, "RANK", rank), (train_mnist, "RANKS", 2)):
        monkeypatch.setattr(module, name, value)
    with pytest.raises(SystemExit) as exit:
        run(tiny_config(), tmp_path / "output", "--batch_size", 3)
    (line,) = lines_of(opening, capsys.readouterr().err)
    assert exit.value.code == 2 and "batch_size is 3: 2 ranks don't divide it" in line


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "mps:0"])
def test_more_ranks_than_gpus_are_refused(monkeypatch, name):
    monkeypatch.setattr(utils, "RANKS", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    words = "more ranks than GPUs, 1" if "cuda" in name else f"device {name} with 2 ranks"
    with pytest.raises(utils.InputError, match=words):
        utils.choose_device(name)


@pytest.mark.parametrize("capability, precision", [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_t4_gets_float16_and_an_a100_bfloat16(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert utils.choose_precision("auto", torch.device("cuda")) == precision
