"""How fast the lesson is on this machine: `python tools/benchmark.py`, with any of the settings of train_mnist.py.

    python tools/benchmark.py --batch_size 128 --device cuda

Prints a table with a row for float32 and bfloat16, on a GPU also recorded as train_mnist.py records its steps. A
training step here is all of a step but its log. Sampling is `sampling_steps` calls of the U-Net for each image, for as
many images at once as `super_resolve` takes.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import machine
from support.errors import Parser, one_line_errors
from support.settings import add_settings, parse_settings

import torch

from utils import build_model, make_pair


def seconds(function: Callable, device: torch.device, repeats: int) -> float:
    """Seconds that a call takes: the mean of `repeats` calls after six that are not counted."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()

    for _ in range(6):  # a GPU chooses its kernels, and the fourth call is recorded
        function()
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    wait()
    return (time.perf_counter() - started) / repeats


def measure(config, device: torch.device, precision: str, recorded: bool, repeats: int) -> tuple[float, float]:
    """Images per second in training and in sampling."""
    model = build_model(config).to(device, memory_format=machine.choose_layout(device, precision))
    averages, weights = [weight.detach().clone() for weight in model.parameters()], list(model.parameters())
    rate = torch.full((), config.learning_rate, device=device)
    optimizer = torch.optim.Adam(weights, rate, fused=True, capturable=device.type == "cuda")
    shape = (1000, config.channels, config.image_size, config.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, device=device)

    def training_step() -> torch.Tensor:
        indices = torch.randint(len(images), (config.batch_size,), device=device)
        high_res, _, context = make_pair(images[indices], config.low_res_size)
        with machine.autocast(device, precision):
            loss = model(high_res, context)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        optimizer.step()
        return loss.detach()

    if recorded:
        training_step = machine.record(training_step, device)

    @torch.no_grad()
    def whole_step() -> None:
        torch.manual_seed(0)
        rate.fill_(config.learning_rate)
        with torch.enable_grad():
            training_step()
        torch._foreach_lerp_(averages, weights, 0.1)

    together = 512 if device.type == "cuda" else 64
    context = make_pair(images[:together], config.low_res_size)[2]
    gamma = torch.full((together,), 0.5, device=device)

    @torch.no_grad()
    def forward() -> None:
        with machine.autocast(device, precision):
            model.unet(context, context, gamma)

    training, sampling = seconds(whole_step, device, repeats), seconds(forward, device, repeats)
    return config.batch_size / training, together / sampling / config.sampling_steps


@one_line_errors("give a smaller --batch_size")
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--device")
    parser.add_argument("--repeats", type=int, default=20)
    add_settings(parser)
    flags, config = parser.parse_args(), parse_settings(parser, None)
    device = machine.choose_device(flags.device)
    print("| form | ms a training step | training images/s | sampling images/s |\n| --- | --- | --- | --- |")
    for precision in ("float32", "bfloat16"):
        for recorded in (False, True) if device.type == "cuda" else (False,):
            training, sampling = measure(config, device, precision, recorded, flags.repeats)
            form = f"{precision}, recorded" if recorded else precision
            milliseconds = 1000 * config.batch_size / training
            print(f"| {form} | {milliseconds:.3g} | {training:.4g} | {sampling:.3g} |", flush=True)


if __name__ == "__main__":
    main()
