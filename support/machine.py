"""The machine: its device and precision, the ranks that torchrun starts, and the recorded training step."""

import atexit
import os
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from support.errors import InputError


def choose_device(name=None):
    """The named device, else the first of cuda, mps and cpu; each rank has a GPU of its own.

    A GPU that can't compute is left for the CPU, with a line on stderr. Raises InputError where the named device can't
    compute, or a rank has no GPU.
    """
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    rank = os.environ.get("LOCAL_RANK")  # set by torchrun
    try:
        device = torch.device(name or found)
        if device.type == "cuda":
            device = torch.device("cuda", int(rank or device.index or 0))
            torch.cuda.set_device(device)
        torch.ones(1, device=device).sum().item()  # fails on a GPU that is too old for this PyTorch
        return device
    except (RuntimeError, AssertionError) as error:  # torch built without that device raises AssertionError
        reason = str(error).splitlines()[0]
    if name or rank:
        raise InputError(f"device {name or found} can't compute here ({reason}); give another --device, or fewer ranks")
    print(f"{found} is there but can't compute ({reason}); the CPU is taken instead", file=sys.stderr)
    return torch.device("cpu")


def choose_precision(name, device):
    """The type in which the network computes: "auto" is bfloat16 on a CPU that is faster in it, else float32.

    Such CPUs are those with AMX, and AMD's with AVX512-BF16.
    """
    if name != "auto":
        return name
    cpuinfo = Path("/proc/cpuinfo")  # on Linux
    features = cpuinfo.read_text() if device.type == "cpu" and cpuinfo.exists() else ""
    fast = "amx_bf16" in features or ("avx512_bf16" in features and "AuthenticAMD" in features)
    return "bfloat16" if fast else "float32"


def choose_layout(device, precision):
    """The memory layout of weights, which activations follow: channels last, except where that is slower."""
    slower = device.type == "mps" or (device.type == "cpu" and precision == "bfloat16")
    return torch.contiguous_format if slower else torch.channels_last


def autocast(device, precision):
    """The context in which the network computes. It keeps no copies of weights: a recorded step would read old ones."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)


def join_ranks(device, batch_size):
    """This process's rank and the number of ranks, 0 and 1 without torchrun. Only the first rank prints.

    Raises InputError where the ranks don't divide the batch.
    """
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if batch_size % ranks:
        raise InputError(f"batch_size is {batch_size}: {ranks} ranks don't divide it")
    if rank > 0:
        sys.stdout = None
    return rank, ranks


@contextmanager
def first_rank_first(rank, ranks):
    """The first rank runs the block before the others, which then find what it has downloaded."""
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and ranks > 1:
        dist.barrier()


def record(step, device, ranks):
    """The same training step, which a GPU repeats from a recording: one launch instead of about a thousand.

    Such small kernels take a GPU less time than Python takes to launch them, one by one. A CUDA graph launches all of
    them at once. The first three calls run as they are, on a side stream, as capturing demands; the fourth is captured,
    and from then on replayed. So `step` must do the same work on the same tensors each time: what changes, such as the
    learning rate, must be a tensor that is filled before the call. What it returns is overwritten by the next call.
    `torch.manual_seed` before a call decides what a replay draws, as without recording. Where capturing fails, a line
    says so and the run goes on without. On other devices, and with several ranks, `step` is returned as it is.
    """
    if device.type != "cuda" or ranks > 1:
        return step
    stream = torch.cuda.Stream(device)

    def losses():
        for _ in range(3):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                loss = step()
            torch.cuda.current_stream(device).wait_stream(stream)
            yield loss
        graph = torch.cuda.CUDAGraph()
        loss = capture(graph, step, device)
        while True:
            if loss is None:
                yield step()
            else:
                graph.replay()
                yield loss

    return partial(next, losses())


def capture(graph, step, device):
    """Captures a step, which isn't run, in a graph: what the step returns, or None and a line where that fails."""
    generator = torch.cuda.default_generators[device.index or 0]
    unharmed = generator.clone_state()  # a failed capture leaves the generator as if it were still captured
    try:
        with torch.cuda.graph(graph):
            return step()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    generator.graphsafe_set_state(unharmed)
    print(f"\nthe step can't be recorded ({reason}); it goes on unrecorded", file=sys.stderr)
    return None
