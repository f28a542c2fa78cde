"""How fast the lesson is on this machine: `python tools/benchmark.py --config_path configs/mnist.toml`.

Prints one table. Its first row is the plain form of the same network (float32, contiguous, not compiled, Adam not
fused), the second what train_mnist.py does by itself on a CPU, the third what it does on a GPU, compiled; each runs in
its own process. A training step here is loss, gradients, clipping and Adam, without indexing, average and log.
"""

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils  # before torch: it lets an Apple GPU leave to the CPU what it lacks
import torch
from torch.utils.flop_counter import FlopCounterMode

from sr3 import build_model


def seconds(function, device: torch.device, repeats: int) -> float:
    """Seconds a call takes: the mean of `repeats` calls after two that are not counted."""
    for i in range(repeats + 2):
        if i == 2:
            wait(device)
            started = time.perf_counter()
        function()
    wait(device)
    return (time.perf_counter() - started) / repeats


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory() -> float:
    """The most memory that this process had, in bytes; unknown on Windows."""
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(flags: argparse.Namespace, form: str) -> dict[str, float]:
    config = utils.load_config(flags.config_path, vars(flags))
    device = utils.choose_device(flags.device)
    plain = form == "plain float32"
    precision = torch.float32 if plain else utils.choose_precision(config.training.precision, device)
    layout = torch.contiguous_format if plain else utils.choose_layout(config.model.features, device)
    autocast = utils.choose_autocast(precision, device)
    model = build_model(config).to(device, memory_format=layout)
    optimizer = torch.optim.Adam(model.parameters(), fused=not plain, foreach=False if plain else None)
    batch_size, size = config.training.batch_size, config.data.image_size
    high_res = torch.rand(batch_size, config.data.channels, size, size, device=device) * 2 - 1

    def training_step():
        context = utils.upsample(utils.downsample(high_res, config.data.low_res_size), size)
        with autocast():
            loss = model(high_res, context)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def forward():
        with autocast():
            model.unet(high_res, high_res, torch.full((batch_size,), 0.5, device=device))

    flops = []
    for function in (training_step, forward):
        with FlopCounterMode(display=False) as counter:
            function()
        flops.append(counter.get_total_flops())
    if "compiled" in form:
        utils.compile_networks([model.unet], True, device)
    side = 8192 if device.type == "cuda" else 2048
    matrix = torch.rand(side, side, device=device, dtype=precision)
    peak = 2 * side**3 / seconds(lambda: matrix @ matrix, device, 10)  # FLOP/s
    training, sampling = (seconds(function, device, flags.repeats) for function in (training_step, forward))
    gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if gpu else peak_memory()
    return {
        "training": batch_size / training,
        "sampling": batch_size / sampling / config.sampling.steps,
        "memory": memory / 2**30,
        "training_flops": flops[0] / training,
        "forward_flops": flops[1] / sampling,
        "peak": peak,
    }


@utils.errors_in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default=utils.HERE / "configs/mnist.toml")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--device")
    parser.add_argument("--repeats", type=int, default=5)
    parser.error = utils.fail
    flags = parser.parse_args()
    print("| form | training images/s | sampling images/s | memory GB | training TFLOP/s | forward TFLOP/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    base = None
    for form in ("plain float32", "lesson", "lesson, compiled"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            m = pool.submit(measure, flags, form).result()
        base = base or m
        cells = [f"{m[k]:.3g} ({m[k] / base[k]:.2f}×)" for k in ("training", "sampling")]
        cells += [f"{m['memory']:.1f}"]
        cells += [f"{m[k] / 1e12:.3g} ({m[k] / m['peak']:.0%} of peak)" for k in ("training_flops", "forward_flops")]
        print("| " + " | ".join([form, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
