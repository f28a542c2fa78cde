"""How fast the lesson is on this machine: `python tools/benchmark.py`, with any of the settings of train_mnist.py.

    python tools/benchmark.py --batch_size 128 --device cuda

Prints a table with a row for float32, bfloat16, and each of them compiled (--compile, which takes minutes). A training
step here is all of a step but its log; sampling is `sampling_steps` calls of the U-Net for each image.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils  # before torch: it lets the CPU do what an Apple GPU can't
import torch


def seconds(function: Callable, device: torch.device, repeats: int) -> float:
    """Seconds that a call takes: the mean of `repeats` calls after two that are not counted."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()

    for i in range(repeats + 2):
        if i == 2:
            wait()
            started = time.perf_counter()
        function()
    wait()
    return (time.perf_counter() - started) / repeats


def measure(config, device: torch.device, precision: str, compiled: bool, repeats: int) -> tuple[float, float]:
    """Images per second in training and in sampling."""
    model = utils.build_model(config).to(device)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
    if compiled:
        utils.compile_networks([model.unet], device)
    shape = (config.batch_size, config.channels, config.image_size, config.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, device=device)
    context = utils.make_pair(images, config.low_res_size)[2]

    def training_step() -> None:
        high_res, _, context = utils.make_pair(images, config.low_res_size)
        with autocast:
            loss = model(high_res, context)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def forward() -> None:
        with autocast:
            model.unet(context, context, context.new_full((len(context),), 0.5))

    training, sampling = (seconds(function, device, repeats) for function in (training_step, forward))
    return config.batch_size / training, config.batch_size / sampling / config.sampling_steps


@utils.errors_in_one_line("give a smaller --batch_size")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = utils.fail
    parser.add_argument("--config_path")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--device")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=20)
    flags = parser.parse_args()
    config, device = utils.load_config(flags.config_path, vars(flags)), utils.choose_device(flags.device)
    print("| form | training images/s | sampling images/s |\n| --- | --- | --- |")
    for compiled in (False, True) if flags.compile else (False,):
        for precision in ("float32", "bfloat16"):
            training, sampling = measure(config, device, precision, compiled, flags.repeats)
            print(f"| {precision}{', compiled' * compiled} | {training:.3g} | {sampling:.3g} |", flush=True)


if __name__ == "__main__":
    main()
