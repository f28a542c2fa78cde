"""torch.compile: what it must not do, which needs no compiler to show."""

from copy import deepcopy

import pytest
import torch
from test_unet import small_unet

import utils
from sr3 import SR3


def test_training_and_sampling_need_two_compiled_graphs():
    """The trained network's with gradients and the average's without, however often the two take turns."""
    torch._dynamo.reset()
    model, y_0 = SR3(small_unet()), torch.zeros(4, 1, 16, 16)
    average, graphs = deepcopy(model).eval(), []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    for unet in (model.unet, average.unet):
        unet.compile(dynamic=False, backend=count)
    for _ in range(3):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                model.loss(y_0, y_0).backward()
        with torch.autocast("cpu", torch.bfloat16):
            average.sample(y_0[:2], 3)
    assert len(graphs) == 2


@pytest.mark.parametrize("lacking", ["a compiler", "Triton"])
def test_where_it_cannot_work_one_line_says_so_and_nothing_is_compiled(monkeypatch, capsys, lacking):
    def no_compiler(function):
        def compiled(*_):
            raise RuntimeError("no C++ compiler\nfound")

        return compiled

    if lacking == "Triton":
        monkeypatch.setattr(utils, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(torch, "compile", no_compiler)
    unet = small_unet()
    utils.compile_networks([unet], True, torch.device("cuda" if lacking == "Triton" else "cpu"))
    assert unet._compiled_call_impl is None
    out, error = capsys.readouterr()
    assert len(error.splitlines()) == 1 and "torch.compile" in error and not out
    assert ("Triton is not installed" in error) == (lacking == "Triton")


def test_it_is_off_by_default_on_a_cpu_and_on_a_gpu_without_triton(monkeypatch, capsys):
    monkeypatch.setattr(utils, "find_spec", lambda name: None)
    for device in ("cpu", "cuda"):
        unet = small_unet()
        utils.compile_networks([unet], None, torch.device(device))
        assert unet._compiled_call_impl is None and capsys.readouterr() == ("", "")
