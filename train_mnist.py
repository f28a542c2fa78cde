"""SR3 on MNIST: learns to draw 32×32 digits from 8×8 ones, and shows them in output/ while it learns.

    python train_mnist.py
    python train_mnist.py --config_path configs/mnist_8x.toml --output_dir output/8x
    python train_mnist.py --resume
    torchrun --standalone --nproc_per_node=8 train_mnist.py

Beside the paper (arXiv 2104.07636), read `training_step` here, then sr3.py and unet.py. evaluate.py judges the result.
"""

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import utils  # before torch: it says what an Apple GPU may leave to the CPU
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from metrics import consistency, psnr, ssim
from sr3 import SR3, Regression, build_model
from utils import HERE, RANK, RANKS, Config, InputError, downsample, fail, to_float, upsample

BAR_EVERY = 10  # steps between two looks at the loss; each makes the script wait for the device
LOG_EVERY = 100  # steps between two rows of log.csv, a multiple of BAR_EVERY


@dataclass
class Run:
    """What a training works with."""

    config: Config
    device: torch.device
    autocast: Callable  # the context that the network runs in: its precision
    dataset: str
    images: Tensor  # the training set, uint8 [N, C, H, W]: MNIST is 61 MB, so it lies on the device as a whole
    grid_images: Tensor  # of the test set, uint8 [64, C, H, W]
    output_dir: Path
    model: SR3 | Regression
    parallel: nn.Module  # the model, which also averages the gradients of several ranks
    ema: SR3 | Regression  # the average of its weights, which is what draws
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # keeps float16's small gradients above 0
    step: int
    log: list[list]


def make_pair(images: Tensor, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """From uint8 images in 0…255 the target y_0, the low-resolution image and the context x, scaled to [-1, 1]."""
    high_res = to_float(images)  # [B, C, H, W]
    low_res = downsample(high_res, config.data.low_res_size)  # [B, C, h, w]
    context = upsample(low_res, config.data.image_size)  # [B, C, H, W]
    return high_res, low_res, context


def training_step(run: Run) -> Tensor:
    """Algorithm 1, once: returns the loss, a scalar that stays on the device."""
    settings = run.config.training
    run.step += 1
    torch.manual_seed(hash((settings.seed, run.step, RANK)))  # a step's own numbers: resuming repeats them
    # Line 2: a pair (x, y_0), the context made from the image itself.
    indices = torch.randint(len(run.images), (settings.batch_size // RANKS,), device=run.device)
    high_res, _, context = make_pair(run.images[indices], run.config)  # [B, C, H, W] each
    # Lines 3 and 4 are in SR3.loss; line 5: a gradient step on that loss.
    with run.autocast():
        loss = run.parallel(high_res, context)
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    nn.utils.clip_grad_norm_(run.model.parameters(), settings.max_grad_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = settings.learning_rate * min(1, run.step / max(1, settings.warmup_steps))
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    # The averaged weights; a young average forgets faster.
    decay = min(settings.ema_decay, (1 + run.step) / (10 + run.step))
    get_ema_multi_avg_fn(decay)(list(run.ema.parameters()), list(run.model.parameters()), None)
    return loss.detach()


def train(run: Run) -> None:
    """Trains until all steps are done or Ctrl-C; draws, logs and saves at the steps that the config names."""
    settings, stop_signals, stopping = run.config.training, catch_signals(), False
    loss_sum, steps, started, shown_psnr = torch.zeros((), device=run.device), 0, time.perf_counter(), "-"
    bar = tqdm(total=settings.num_training_steps, initial=run.step, unit="step", dynamic_ncols=True, disable=RANK > 0)
    with bar:
        while run.step < settings.num_training_steps and not stopping:
            loss_sum += training_step(run)
            steps += 1
            bar.update()

            # What does this step call for? Only from here on does the script wait for the device.
            stopping = bool(stop_signals)
            drawing = run.step % settings.sample_every == 0 or run.step in settings.early_samples
            drawing = drawing or stopping or run.step == settings.num_training_steps
            logging = drawing or run.step % LOG_EVERY == 0
            if not logging and run.step % BAR_EVERY:
                continue
            total = loss_sum.clone()
            if RANKS > 1:
                dist.all_reduce(total)  # the sum over all ranks
            loss = total.item() / RANKS / steps  # the mean since the last row
            speed = steps * settings.batch_size / (time.perf_counter() - started)
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s, PSNR {shown_psnr}")
            if not logging:
                continue
            check_finite(run, loss, bar)
            row = [run.dataset, run.step, loss, run.optimizer.param_groups[0]["lr"], speed]
            if drawing and RANK == 0:
                results = draw(run)
                row += results.values()
                shown_psnr = f"{results['psnr']:.1f} dB"
            run.log.append(row)
            if RANK == 0:
                save(run, with_checkpoint=drawing)
            loss_sum.zero_()
            steps, started = 0, time.perf_counter()
    if stopping and run.step < settings.num_training_steps:
        print(f"stopped after step {run.step}; the same command with --resume goes on from there")
        sys.exit(128 + stop_signals[0])


def catch_signals() -> list[int]:
    """Returns a list that collects Ctrl-C and SIGTERM, so that the step can finish; a second one ends the script.

    With several ranks the first one does, since they would not all stop after the same step.
    """
    received = []

    def receive(number: int, _) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    if RANKS == 1:
        signal.signal(signal.SIGINT, receive)
        signal.signal(signal.SIGTERM, receive)
    return received


# ----------------------------------------------------------------------------------------------------------------------
# The pictures, the log and the checkpoint

GRID = 64  # test images in a grid
LOG_COLUMNS = (
    "dataset,step,loss,learning_rate,images_per_second,"
    "psnr,ssim,consistency,bicubic_psnr,bicubic_ssim,bicubic_consistency"
)


def draw(run: Run) -> dict[str, float]:
    """Super-resolve the grid's images, and write one grid of each kind; returns the mean metrics.

    Every call starts from the same noise, so that grids differ by the weights alone.
    """
    config = run.config
    high_res, low_res, context = make_pair(run.grid_images, config)  # [64, C, H or h, W or w]
    generator = torch.Generator(run.device).manual_seed(config.training.seed)  # its own: training stays as it is
    y_T = torch.randn(context.shape, generator=generator, device=run.device)
    options = {"variance": config.sampling.variance, "generator": generator, "y_T": y_T}
    states, estimates = [y_T[:16]], [y_T[:8]]  # of the first images, after 0, 1, … steps
    with run.autocast():
        for _, super_res, y_0 in run.ema.refine(context, config.sampling.steps, **options):  # [64, C, H, W] each
            states.append(super_res[:16].clone())
            estimates.append(y_0[:8].clone())

    def save_images(name: str, images: Tensor, columns: int) -> None:
        path = run.output_dir / f"{name}-{run.step:06d}.png"
        utils.save_grid(path, utils.to_unit(images), columns, f"{run.dataset}, step {run.step}")

    pixels = utils.enlarge_pixels(low_res, config.data.image_size)  # [64, C, H, W], still h × w squares
    save_images("hr", high_res, 8)
    save_images("lr", pixels, 8)
    save_images("sr", super_res, 8)
    frames = []
    if config.method == "sr3":  # a regression has neither noise nor steps to show
        steps = len(estimates) - 1
        shown = sorted({0, *(round(steps ** (i / 6)) for i in range(6))})  # more of the first, which change most
        frames = [estimates[i] for i in shown]
    frames = [pixels[:8], *frames, super_res[:8], high_res[:8]]  # one column each
    save_images("refinement", torch.stack(frames, dim=1).flatten(0, 1), len(frames))
    if config.method == "sr3" and run.step == config.training.num_training_steps:
        states = states[:: -math.ceil(len(states) / 50)][::-1]  # at most 50, the last one among them
        frames = [utils.to_unit(torch.stack([pixels[:16], y_t], dim=1).flatten(0, 1)) for y_t in states]
        utils.save_animation(run.output_dir / "refinement.gif", frames, columns=8)

    results = {}
    high_res, low_res, super_res, bicubic = map(utils.to_unit, (high_res, low_res, super_res, context))
    for prefix, images in (("", super_res), ("bicubic_", bicubic)):
        results[prefix + "psnr"] = psnr(images, high_res).mean().item()
        results[prefix + "ssim"] = ssim(images, high_res).mean().item()
        results[prefix + "consistency"] = consistency(images, low_res).mean().item()
    return results


def check_finite(run: Run, loss: float, bar: tqdm) -> None:
    """Ends the script before anything is overwritten where the loss or a weight is no longer finite."""
    if math.isfinite(loss) and all(weight.isfinite().all() for weight in run.model.parameters()):
        return
    bar.close()
    checkpoint = run.output_dir / "checkpoint.pt"
    kept = f" {checkpoint} is as it was." if checkpoint.exists() else ""
    fail(f"step {run.step}: loss {loss} or a weight is not finite; lower training.learning_rate.{kept}", status=1)


def save(run: Run, with_checkpoint: bool) -> None:
    if with_checkpoint:
        state = {"config": asdict(run.config), "dataset": run.dataset, "step": run.step, "log": run.log}
        parts = {"model": run.model, "ema": run.ema, "optimizer": run.optimizer, "scaler": run.scaler}
        state |= {name: part.state_dict() for name, part in parts.items()}
        utils.save_checkpoint(run.output_dir / "checkpoint.pt", state)
    utils.save_log(run.output_dir / "log.csv", LOG_COLUMNS, run.log)


def restore(run: Run, checkpoint: dict, path: Path) -> None:
    """Put the state of a checkpoint into a run. Raises InputError where it is another run's, or doesn't fit."""
    utils.check_same_run(checkpoint, run.config, run.dataset, path)
    if not all(isinstance(row, list) for row in checkpoint["log"]):
        raise InputError(f"{path} is no checkpoint of this lesson: its log has no rows; give another")
    run.step, run.log = checkpoint["step"], checkpoint["log"]
    try:
        run.model.load_state_dict(checkpoint["model"])
        run.ema.load_state_dict(checkpoint["ema"])
        groups = run.optimizer.state_dict()["param_groups"]  # this run's own, with what suits its device
        run.optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": groups})
        for weight in run.model.parameters():
            state = run.optimizer.state[weight]
            if not state["exp_avg"].shape == state["exp_avg_sq"].shape == weight.shape or float(state["step"]) < 0:
                raise ValueError
            for name in ("exp_avg", "exp_avg_sq"):  # as the weight lies in memory, which fused Adam relies on
                state[name] = torch.empty_like(weight).copy_(state[name])
        if checkpoint["scaler"]:  # one that was not in use has no state
            run.scaler.load_state_dict(checkpoint["scaler"])
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        if utils.out_of_memory(error):
            raise
        raise InputError(f"{path} is of another version of this lesson, or damaged: its state doesn't fit") from None


# ----------------------------------------------------------------------------------------------------------------------
# From the command line to a run


def parse_flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--config_path", default=HERE / "configs/mnist.toml", help="default: configs/mnist.toml")
    parser.add_argument("--num_training_steps", type=int, help="how many steps to train, in all")
    parser.add_argument("--batch_size", type=int, help="images in a step")
    parser.add_argument("--data_dir", default=HERE / "data", help="where data sets are, or are put; default: data")
    parser.add_argument("--output_dir", default=HERE / "output", help="where results are put; default: output")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first of them that is there")
    parser.add_argument("--seed", type=int, help="of weights, batches and noise")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on GPUs with Triton"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output_dir")
    return parser.parse_args(arguments)


def set_up(flags: argparse.Namespace) -> Run:
    """All that can be wrong is found here, before anything is written."""
    training = {name: getattr(flags, name) for name in ("num_training_steps", "batch_size", "seed")}
    config = utils.load_config(flags.config_path, **training)
    settings, output_dir = config.training, Path(flags.output_dir)
    device = utils.choose_device(flags.device)
    precision = utils.choose_precision(settings.precision, device)
    if settings.batch_size % RANKS:
        raise InputError(f"training.batch_size is {settings.batch_size}: {RANKS} ranks don't divide it")
    if RANKS > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    checkpoint = utils.load_checkpoint(output_dir / "checkpoint.pt", utils.TRAINING) if flags.resume else None
    dataset, (images, _), (test_images, _) = utils.load_data(config.data, flags.data_dir)

    torch.manual_seed(settings.seed)
    torch.backends.cudnn.benchmark = True  # shapes don't change, so the fastest convolutions are worth finding
    model = build_model(config).to(device, memory_format=utils.choose_layout(config.model.features, device))
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    autocast, ema = utils.choose_autocast(precision, device), deepcopy(model).eval().requires_grad_(False)
    images, grid_images = images.to(device), test_images[:GRID].to(device)
    state = {"model": model, "parallel": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    run = Run(config, device, autocast, dataset, images, grid_images, output_dir, **state, step=0, log=[])
    if checkpoint:
        restore(run, checkpoint, output_dir / "checkpoint.pt")
    if RANK == 0:
        utils.prepare_output(output_dir, keep=flags.resume)
        utils.save_log(output_dir / "log.csv", LOG_COLUMNS, run.log)
        name, size, small = str(precision).removeprefix("torch."), config.data.image_size, config.data.low_res_size
        weights = sum(weight.numel() for weight in model.parameters())
        print(f"{dataset}: {len(images):,} images of {size}×{size} from {small}×{small}; {weights:,} weights; ", end="")
        print(f"{RANKS} × {device.type} in {name}; output: {output_dir}", flush=True)
    utils.compile_networks([model.unet, ema.unet], flags.compile, device)
    if RANKS > 1:
        run.parallel = DistributedDataParallel(model)
    return run


def tell_duration(run: Run) -> None:
    """On a CPU, times one step without taking it, and says how long all will take."""
    left = run.config.training.num_training_steps - run.step
    if run.device.type != "cpu" or left < 1000 or RANKS > 1:
        return
    high_res, _, context = make_pair(run.images[: run.config.training.batch_size], run.config)
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        with run.autocast():
            run.model.loss(high_res, context).backward()
        run.optimizer.zero_grad()
    minutes = (time.perf_counter() - started) / 60
    print(f"on this CPU, {left:,} steps will take about {minutes * left:.0f} minutes; for a good result ", end="")
    print(f"in about {minutes * 1000:.0f}, give --num_training_steps 1000", flush=True)


def main(arguments: list[str] | None = None) -> None:
    def script():
        run = set_up(parse_flags(arguments))
        tell_duration(run)
        train(run)
        if RANKS > 1:
            dist.destroy_process_group()
        if RANK == 0:
            print(
                f"all {run.step} steps are done; to judge them: python evaluate.py {run.output_dir / 'checkpoint.pt'}"
            )

    if_stopped = "stopped; the same command with --resume goes on from the last checkpoint, if there is one"
    utils.run_script(script, if_stopped, if_too_large="give a smaller batch_size")


if __name__ == "__main__":
    main()
