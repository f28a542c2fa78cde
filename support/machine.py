"""The machine: its device, precision and signals, the ranks that torchrun starts, and the recorded training step."""

import datetime
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from support.errors import InputError, end


def choose_device(name: str | None = None) -> torch.device:
    """The named device, else the first of cuda, mps and cpu that can compute; each rank has a GPU of its own.

    Raises InputError where the named one can't compute, and where there are fewer GPUs than ranks on this machine.
    """
    several = launched_ranks() > 1
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and not several, "cpu": True}
    candidates = [name] if name else [kind for kind in there if there[kind]]
    if candidates[0].split(":")[0] not in there or (several and candidates[0] == "mps"):
        raise InputError(f"device {name} is none of cuda, mps (one rank only), cpu; give another --device")
    if several and candidates[0].startswith("cuda"):
        rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if rank >= gpus:
            raise InputError(f"there are more ranks than GPUs, {gpus}; give --nproc_per_node={gpus}, or --device cpu")
        candidates = [f"cuda:{rank}"]
    for candidate in candidates:
        try:
            torch.ones(1, device=candidate).sum().item()  # fails on a GPU that is too old for this PyTorch
            device = torch.zeros(1, device=candidate).device
            if device.type == "cuda":
                torch.cuda.set_device(device)  # a step is captured on the current one
            return device
        except (RuntimeError, AssertionError) as error:  # torch built without that device raises AssertionError
            reason = str(error).strip().splitlines()[0][:100]
        if name:
            raise InputError(f"device {name} can't compute here ({reason}); leave out --device to use what can")
        print(f"{candidate} is there but can't compute ({reason}); trying the next device", file=sys.stderr)
    raise InputError("no device can compute here")


def choose_precision(name: str, device: torch.device) -> str:
    """The type that autocast gives the network; with "auto" bfloat16 on a CPU that is faster in it, else float32.

    Which CPUs? Measured: training takes 0.72 of float32's time on an AMD EPYC (Zen 4), but 1.18 on an Intel Xeon with
    AVX512-BF16 alone. Why float32 on GPUs? A network as small as the default keeps a GPU busy with many small kernels,
    not with arithmetic, and autocast's conversions are kernels, too. Raises InputError for bfloat16 on a GPU that only
    emulates it.
    """
    if name == "auto":
        cpuinfo = Path("/proc/cpuinfo")  # on Linux
        features = cpuinfo.read_text() if device.type == "cpu" and cpuinfo.exists() else ""
        fast = "amx_bf16" in features or ("avx512_bf16" in features and "AuthenticAMD" in features)
        return "bfloat16" if fast else "float32"
    if name == "bfloat16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise InputError('precision is "bfloat16", which this GPU only emulates; give --precision float32')
    return name


def choose_layout(device: torch.device, precision: str = "auto") -> torch.memory_format:
    """How images and weights lie in memory: channels last, where that is faster. The results are the same.

    Measured: in float32 a forward pass on a Xeon takes 0.7 of the time; on an H200 a step of 128 images 0.8. In
    bfloat16 on a CPU a step takes 1.2 times as long.
    """
    slower = device.type == "cpu" and choose_precision(precision, device) == "bfloat16"
    return torch.contiguous_format if slower or device.type == "mps" else torch.channels_last


def autocast(device: torch.device, precision: str = "auto") -> torch.autocast:
    """The context in which the network computes. It keeps no copies of weights: a recorded step would read old ones."""
    enabled = choose_precision(precision, device) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def record(step: Callable[[], Tensor], device: torch.device, ranks: int = 1) -> Callable[[], Tensor]:
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
    graph, stream, calls, captured = torch.cuda.CUDAGraph(), torch.cuda.Stream(device), 0, None

    def recorded() -> Tensor:
        nonlocal calls, captured
        calls += 1
        if calls == 4:
            captured = capture(graph, step, device)
        if captured is not None:
            graph.replay()
            return captured
        if calls >= 4:
            return step()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            loss = step()
        torch.cuda.current_stream(device).wait_stream(stream)
        return loss

    return recorded


def capture(graph: torch.cuda.CUDAGraph, step: Callable[[], Tensor], device: torch.device) -> Tensor | None:
    """Captures a step, which isn't run, in a graph: what the step returns, or None and a line where that fails."""
    generator = torch.cuda.default_generators[device.index or 0]
    unharmed = generator.clone_state()  # a failed capture leaves the generator as if it were still captured
    try:
        with torch.cuda.graph(graph):
            return step()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    generator.graphsafe_set_state(unharmed)
    print(f"\nthe step can't be recorded ({reason}); going on without", file=sys.stderr)
    return None


def launched_ranks() -> int:
    """How many ranks torchrun has started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def join_ranks(device: torch.device) -> tuple[int, int]:
    """This process's rank and the number of ranks, which wait for each other here: 0 and 1 without torchrun."""
    if launched_ranks() == 1:
        return 0, 1
    patience = datetime.timedelta(hours=4)  # the others wait while the first rank downloads, or draws
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    return dist.get_rank(), dist.get_world_size()


def leave_ranks(ranks: int) -> None:
    if ranks > 1:
        dist.destroy_process_group()


def share_of_batch(batch_size: int, ranks: int) -> int:
    if batch_size % ranks:
        raise InputError(f"batch_size is {batch_size}: {ranks} ranks don't divide it")
    return batch_size // ranks


@contextmanager
def first_rank_first(rank: int, ranks: int) -> Iterator[None]:
    """The first rank runs the block before the others, which then find what it has downloaded."""
    if rank > 0:
        try:
            dist.barrier()
        except RuntimeError:
            end("stopped, since the first rank has")
    yield
    if rank == 0 and ranks > 1:
        dist.barrier()


@contextmanager
def caught_signals(ranks: int = 1) -> Iterator[list[int]]:
    """A list that collects Ctrl-C and SIGTERM, so that the step can finish; a second one ends the script."""
    received, earlier = [], {}

    def receive(number: int, _) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM) if ranks == 1 else ():  # ranks would stop after different steps
        with suppress(ValueError):  # raised outside the main thread, which signals don't reach
            earlier[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler or signal.SIG_DFL)
