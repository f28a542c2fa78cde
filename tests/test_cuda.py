"""What only a GPU can show: `CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_cuda.py`; elsewhere it is skipped."""

import pytest
import torch
from conftest import log_of, run

import support.run
from support import machine

REASON = "no CUDA device, or a hidden one: the tests hide GPUs unless CUDA_VISIBLE_DEVICES is set"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason=REASON)
CUDA = torch.device("cuda")


def losses_of(output, *flags, **settings):
    """The logged losses of a run on the GPU."""
    return [float(row["loss"]) for row in log_of(run(output, "--device", "cuda", *flags, dropout=0.0, **settings))]


def test_a_recorded_run_draws_and_learns_as_an_eager_one_and_goes_on_on_a_cpu(tmp_path, monkeypatch):
    """The first losses are equal to the last bit; later ones differ as two eager runs do."""
    monkeypatch.setattr(support.run, "LOG_EVERY", 1)
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(0) or replay(graph))
    recorded = losses_of(tmp_path / "recorded")
    assert len(replays) == 17 and len(set(recorded)) == 20  # each step draws noise of its own
    monkeypatch.setattr(machine, "record", lambda step, *_: step)
    eager = losses_of(tmp_path / "eager")
    assert recorded[:2] == eager[:2] and recorded == pytest.approx(eager, rel=0.02)
    flags = "--device", "cpu", "--resume"
    assert losses_of(tmp_path / "recorded", *flags, num_training_steps=21)[:20] == recorded


def test_a_step_that_cannot_be_recorded_goes_on_as_it_is_with_one_line(capsys):
    weight = torch.zeros(4, device=CUDA)

    def step():
        weight.add_(torch.rand(4, device=CUDA))
        return weight.sum().item() and weight.sum()  # a graph can't wait for the device

    recorded = machine.record(step, CUDA, ranks=1)
    for _ in range(6):
        torch.manual_seed(0)
        loss = recorded()
    torch.manual_seed(0)
    torch.testing.assert_close(weight, 6 * torch.rand(4, device=CUDA))
    assert len(capsys.readouterr().err.strip().splitlines()) == 1 and torch.equal(loss, weight.sum())
