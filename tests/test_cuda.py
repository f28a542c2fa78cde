"""What only a GPU can show: `CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_cuda.py`; elsewhere it is skipped."""

import csv

import pytest
import torch
from conftest import call, command, run

import train_mnist
from support import machine
from utils import load_model, super_resolve

REASON = "no CUDA device, or a hidden one: the tests hide GPUs unless CUDA_VISIBLE_DEVICES is set"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason=REASON)
CUDA = torch.device("cuda")


def losses_of(output):
    return [float(row["loss"]) for row in csv.DictReader((output / "log.csv").read_text().splitlines())]


def run_on_gpu(output, *flags, **settings):
    arguments = command(output, *flags, **settings)
    arguments[arguments.index("cpu")] = "cuda"
    call(train_mnist, *arguments)
    return output


def test_a_recorded_run_draws_and_learns_as_an_eager_one_and_is_resumed(tmp_path, monkeypatch):
    """The first losses are equal to the last bit; later ones differ as two eager runs do."""
    monkeypatch.setattr(train_mnist, "LOG_EVERY", 1)
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(0) or replay(graph))
    recorded = losses_of(run_on_gpu(tmp_path / "recorded", dropout=0.0))
    assert len(replays) == 17
    with monkeypatch.context() as patch:
        patch.setattr(machine, "record", lambda step, *_: step)
        eager = losses_of(run_on_gpu(tmp_path / "eager", dropout=0.0))
    assert recorded[:2] == eager[:2] and recorded == pytest.approx(eager, rel=0.02)
    assert len(set(recorded)) == 20  # each step draws noise of its own
    run_on_gpu(tmp_path / "recorded", "--resume", num_training_steps=30, dropout=0.0)
    cpu = losses_of(run(tmp_path / "eager", "--resume", num_training_steps=21, dropout=0.0))  # a GPU's run, on a CPU
    assert len(losses_of(tmp_path / "recorded")) == 30 and len(cpu) == 21


def test_a_step_that_cannot_be_recorded_goes_on_as_it_is_with_one_line(capsys):
    weight, calls = torch.zeros(4, device=CUDA), []

    def step():
        calls.append(torch.rand(4, device=CUDA))
        weight.add_(calls[-1])
        return weight.sum().item() and weight.sum()  # a graph can't wait for the device

    recorded = machine.record(step, CUDA)
    for _ in range(6):
        torch.manual_seed(0)
        loss = recorded()
    expected = torch.rand(4, device=CUDA, generator=torch.Generator(CUDA).manual_seed(0))
    torch.testing.assert_close(weight, 6 * expected)
    assert len(capsys.readouterr().err.strip().splitlines()) == 1 and torch.equal(loss, weight.sum())


def test_samples_are_those_of_a_cpu(tmp_path):
    path = run(tmp_path / "output", precision="float32") / "checkpoint.pt"
    low_res = torch.rand(600, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    cpu = super_resolve(load_model(path), low_res, range(600))
    gpu = super_resolve(load_model(path, CUDA), low_res.to(CUDA), range(600)).cpu()
    assert (cpu - gpu).abs().mean() < 0.02  # bfloat16 on some CPUs
