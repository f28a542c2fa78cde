"""torch.compile: what it must not do, which needs no compiler to show."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from test_unet import small_unet

import utils
from sr3 import SR3


def test_training_and_sampling_need_two_compiled_graphs(monkeypatch):
    """The trained network's with gradients and the average's without, however often the two take turns."""
    graphs = []
    count = partial(torch.compile, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    monkeypatch.setattr(torch, "compile", count)
    model, y_0 = SR3(small_unet(image_size=8, multipliers=[1])), torch.zeros(4, 1, 8, 8)
    average = deepcopy(model).eval()
    utils.compile_networks([model.unet, average.unet], True, torch.device("cpu"))
    graphs.clear()  # the look for a compiler
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            model.loss(y_0, y_0).backward()
            average.sample(y_0[:2], 2)
    assert len(graphs) == 2


@pytest.mark.parametrize("wanted, device", [(True, "cpu"), (None, "cuda"), (None, "cpu"), (False, "cuda")])
def test_without_a_compiler_nothing_is_compiled_and_one_line_says_so(monkeypatch, capsys, wanted, device):
    """Triton's absence on a GPU shows in the same way."""

    def compiled(*_):
        raise RuntimeError("Cannot find a working triton installation\nor a C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda function: compiled)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    unet = small_unet()
    utils.compile_networks([unet], wanted, torch.device(device))
    assert unet._compiled_call_impl is None
    out, error = capsys.readouterr()
    tried = wanted if wanted is not None else device == "cuda"
    assert not out and len(error.splitlines()) == error.count("Cannot find a working triton installation)") == tried
