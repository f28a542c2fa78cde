"""Several ranks: gradients and runs of two on gloo, and what is chosen and refused on GPUs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import train_mnist
from sr3 import SR3
from unet import UNet
from utils import InputError

ROOT = Path(__file__).resolve().parent.parent


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
        for found, weight in zip(
            torch.load(tmp_path / f"{rank}.pt", weights_only=True), model.parameters(), strict=True
        ):
            torch.testing.assert_close(found, weight.grad, atol=1e-6, rtol=1e-4)


def torchrun_command(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*command, str(ROOT / "train_mnist.py"), "--device", "cpu", *map(str, arguments)]


def torchrun(*arguments):
    return subprocess.run(torchrun_command(*arguments), capture_output=True, text=True, timeout=120)


def test_a_two_rank_run_writes_one_set_of_grids_and_one_log_and_resumes(tiny_config, tmp_path):
    config, output = tiny_config(), tmp_path / "output"
    common = ["--config_path", config, "--output_dir", output]
    first = torchrun(*common, "--num_training_steps", 20)
    assert first.returncode == 0, first.stderr
    second = torchrun(*common, "--num_training_steps", 30, "--resume")
    assert second.returncode == 0, second.stderr
    steps = [line.split(",")[1] for line in (output / "log.csv").read_text().splitlines()]
    assert steps == ["step", "20", "30"]
    grids = [f"{name}-{step:06d}.png" for name in ("hr", "lr", "refinement", "sr") for step in (20, 30)]
    assert sorted(path.name for path in output.iterdir()) == sorted([*grids, "checkpoint.pt", "log.csv"])


def test_ctrl_c_ends_all_ranks_with_a_checkpoint_of_the_same_step(tiny_config, tmp_path):
    """A terminal sends SIGINT to torchrun and to its ranks; torchrun sends it to them once more."""
    output = tmp_path / "output"
    command = torchrun_command("--config_path", tiny_config(), "--output_dir", output, "--num_training_steps", 10**6)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.time() + 90
    while not (output / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert out.count("goes on from there") == 1, error
    checkpoint = torch.load(output / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] % 10 == 0 and f"step {checkpoint['step']};" in out
    assert (output / f"sr-{checkpoint['step']:06d}.png").exists() and not list(output.glob("*.tmp"))


def test_what_only_the_first_rank_finds_is_refused_in_one_line_too(tiny_config, tmp_path):
    (tmp_path / "empty").mkdir()
    config = tiny_config(dataset="folder")
    result = torchrun("--config_path", config, "--output_dir", tmp_path / "output", "--data_dir", tmp_path / "empty")
    assert result.returncode != 0 and not (tmp_path / "output").exists()
    assert result.stderr.count("train_mnist.py: no readable image") == 1
    assert "Connection closed" not in result.stderr and "RuntimeError" not in result.stderr


def test_a_batch_that_ranks_do_not_divide_is_refused_in_one_line(tiny_config, tmp_path):
    result = torchrun("--config_path", tiny_config(), "--output_dir", tmp_path / "output", "--batch_size", 3)
    assert result.returncode != 0 and not (tmp_path / "output").exists()
    lines = [line for line in result.stderr.splitlines() if line.startswith("train_mnist.py: ")]
    assert len(lines) == 1 and "batch_size is 3" in lines[0]


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_more_ranks_than_gpus_are_refused(monkeypatch, name):
    monkeypatch.setattr(train_mnist, "RANKS", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="more ranks than GPUs, 1"):
        train_mnist.choose_device(name)


@pytest.mark.parametrize("capability, precision", [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_t4_gets_float16_and_an_a100_bfloat16(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert train_mnist.choose_precision("auto", torch.device("cuda")) == precision
