"""SR3 on MNIST: learns to draw 32×32 digits from 8×8 ones, and shows them in output/ while it learns.

    python train_mnist.py
    python train_mnist.py --config_path configs/mnist_8x.toml --output_dir output/8x
    python train_mnist.py --resume
    torchrun --standalone --nproc_per_node=8 train_mnist.py

Alongside the paper (arXiv 2104.07636), read `training_step` here, then sr3.py, then unet.py. evaluate.py judges.
"""

import argparse
import math
import time
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import utils  # before torch: it lets an Apple GPU leave to the CPU what it lacks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from metrics import consistency, psnr, ssim
from sr3 import build_model
from utils import HERE, RANK, RANKS, Config, InputError, downsample, fail, to_float, upsample

BAR_EVERY = 10  # steps between two looks at the loss; each makes the script wait for the device
LOG_EVERY = 100  # steps between two rows of log.csv, a multiple of BAR_EVERY


def make_pair(images: Tensor, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """From uint8 images in 0…255 the target y_0, the low-resolution image and the context x, scaled to [-1, 1]."""
    high_res = to_float(images)  # [B, C, H, W]
    low_res = downsample(high_res, config.data.low_res_size)  # [B, C, h, w]
    context = upsample(low_res, config.data.image_size)  # [B, C, H, W]
    return high_res, low_res, context


def training_step(run: "Run") -> Tensor:
    """Algorithm 1, once: returns the loss, a scalar that stays on the device."""
    settings = run.config.training
    run.step += 1
    torch.manual_seed(hash((settings.seed, run.step, RANK)))  # for each step, so that a resumed run draws the same
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


def train(run: "Run") -> None:
    """Trains until all steps are done or Ctrl-C; draws, logs and saves at the steps that the config names."""
    settings, stop_signals = run.config.training, utils.catch_signals()
    stop, shown_psnr = run.step >= settings.num_training_steps, "-"
    losses, started = [], time.perf_counter()  # since the last row of the log
    bar = tqdm(total=settings.num_training_steps, initial=run.step, unit="step", dynamic_ncols=True, disable=RANK > 0)
    with bar:
        while not stop:  # "until converged"
            losses.append(training_step(run))
            bar.update()

            # What does this step call for? Only from here on does the script wait for the device.
            stop = bool(stop_signals) or run.step == settings.num_training_steps
            drawing = stop or run.step % settings.sample_every == 0 or run.step in settings.early_samples
            logging = drawing or run.step % LOG_EVERY == 0
            if not logging and run.step % BAR_EVERY:
                continue
            loss = torch.stack(losses).mean() / RANKS
            if RANKS > 1:
                dist.all_reduce(loss)  # the sum over all ranks
            loss, speed = loss.item(), len(losses) * settings.batch_size / (time.perf_counter() - started)
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s, PSNR {shown_psnr}")
            if not logging:
                continue
            check_finite(run, loss, bar)
            if RANK == 0:
                results = draw(run) if drawing else {}
                shown_psnr = f"{results['psnr']:.1f} dB" if drawing else shown_psnr
                row = (run.config.data.dataset, run.step, loss, run.optimizer.param_groups[0]["lr"], speed)
                run.log.append(dict(zip(LOG_COLUMNS, row)) | results)
                save(run, with_checkpoint=drawing)
            losses, started = [], time.perf_counter()
    if run.step < settings.num_training_steps:
        print(f"stopped after step {run.step}; the same command with --resume goes on from there")
        raise SystemExit(128 + stop_signals[0])


def check_finite(run: "Run", loss: float, bar: tqdm) -> None:
    """Ends the script before anything is overwritten where the loss or a weight is no longer finite."""
    if not (math.isfinite(loss) and all(weight.isfinite().all() for weight in run.model.parameters())):
        bar.close()
        kept = f" {run.checkpoint_path} is as it was." if run.checkpoint_path.exists() else ""
        fail(f"step {run.step}: loss {loss} or a weight is not finite; lower training.learning_rate.{kept}", status=1)


# ----------------------------------------------------------------------------------------------------------------------
# The pictures, the log and the checkpoint

LOG_COLUMNS = ["dataset", "step", "loss", "learning_rate", "images_per_second", "psnr", "ssim", "consistency"]
LOG_COLUMNS += ["bicubic_psnr", "bicubic_ssim", "bicubic_consistency"]


def draw(run: "Run") -> dict[str, float]:
    """Writes grids of what the averaged weights make of the same noise every time; returns the mean metrics."""
    config = run.config
    high_res, low_res, context = make_pair(run.grid_images, config)  # [64, C, H or h, W or w]
    generator = torch.Generator(run.device).manual_seed(config.training.seed)  # its own: training stays as it is
    y_T = torch.randn(context.shape, generator=generator, device=run.device)
    states, estimates = [y_T[:16]], [y_T[:8]]  # of the first images, after 0, 1, … steps
    with run.autocast():
        for _, super_res, y_0 in run.ema.refine(context, **asdict(config.sampling), generator=generator, y_T=y_T):
            states.append(super_res[:16].clone())  # [16, C, H, W]
            estimates.append(y_0[:8].clone())

    pixels = upsample(low_res, config.data.image_size, "nearest-exact")  # [64, C, H, W], still h × w squares
    chosen = []
    if config.method == "sr3":  # a regression has neither noise nor steps to show
        steps = {0} | {round(config.sampling.steps ** (i / 6)) for i in range(6)}  # most change at first
        chosen = [estimates[i] for i in sorted(steps)]
    columns = [pixels[:8], *chosen, super_res[:8], high_res[:8]]
    refinement = torch.stack(columns, dim=1).flatten(0, 1)  # a row for each image
    grids = {"hr": (high_res, 8), "lr": (pixels, 8), "sr": (super_res, 8), "refinement": (refinement, len(columns))}
    for name, (images, width) in grids.items():
        path = run.output_dir / f"{name}-{run.step:06d}.png"
        utils.save_grid(path, utils.to_unit(images), width, f"{config.data.dataset}, step {run.step}")
    if config.method == "sr3" and run.step == config.training.num_training_steps:
        states = states[:: -math.ceil(len(states) / 50)][::-1]  # at most 50, the last one among them
        frames = [utils.to_unit(torch.stack([pixels[:16], y_t], dim=1).flatten(0, 1)) for y_t in states]
        utils.save_animation(run.output_dir / "refinement.gif", frames, columns=8)

    high_res, low_res, super_res, bicubic = map(utils.to_unit, (high_res, low_res, super_res, context))
    results = []
    for images in (super_res, bicubic):
        results += [psnr(images, high_res), ssim(images, high_res), consistency(images, low_res)]
    return {name: values.mean().item() for name, values in zip(LOG_COLUMNS[5:], results)}


def save(run: "Run", with_checkpoint: bool) -> None:
    if with_checkpoint:
        parts = {"model": run.model, "ema": run.ema, "optimizer": run.optimizer, "scaler": run.scaler}
        state = {"config": asdict(run.config), "step": run.step, "log": run.log}
        utils.save_checkpoint(run.checkpoint_path, state | {name: part.state_dict() for name, part in parts.items()})
    utils.save_log(run.output_dir / "log.csv", LOG_COLUMNS, run.log)


def restore(run: "Run", checkpoint: dict) -> None:
    """Put the state of a checkpoint into a run. Raises InputError where it is another run's, or doesn't fit."""
    path, configs = run.checkpoint_path, (checkpoint["config"], asdict(run.config))
    try:
        old, new = ({"method": c["method"], **c["data"], **c["model"], **c["diffusion"]} for c in configs)
        for name in new.keys() - {"fallback"}:
            if old[name] != new[name]:
                raise InputError(f"{name} is {new[name]!r}, in {path} it is {old[name]!r}; to resume, set it back")
        run.step, run.log = checkpoint["step"], checkpoint["log"]
        if run.step < 0 or not all(isinstance(row, dict) for row in run.log):
            raise ValueError
        run.model.load_state_dict(checkpoint["model"])
        run.ema.load_state_dict(checkpoint["ema"])
        groups = run.optimizer.state_dict()["param_groups"]  # this run's own, with what suits its device
        run.optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": groups})
        skipped = checkpoint["scaler"] and not run.optimizer.state  # float16 may have skipped each step so far
        for weight in [] if skipped else run.model.parameters():
            state = run.optimizer.state[weight]
            if not state["exp_avg"].shape == state["exp_avg_sq"].shape == weight.shape or float(state["step"]) < 0:
                raise ValueError
            for name in ("exp_avg", "exp_avg_sq"):  # as the weight lies in memory, which fused Adam relies on
                state[name] = torch.empty_like(weight).copy_(state[name])
        if checkpoint["scaler"]:  # one that was not in use has no state
            run.scaler.load_state_dict(checkpoint["scaler"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        if utils.out_of_memory(error):
            raise
        raise InputError(f"{path} is of another version of this lesson, or damaged: its state doesn't fit") from None


# ----------------------------------------------------------------------------------------------------------------------
# From the command line to a run


class Run:
    """All that a training works with. What can be wrong with the flags is found here, before anything is written."""

    def __init__(self, flags: argparse.Namespace):
        self.config = config = utils.load_config(flags.config_path, vars(flags))
        self.device = device = utils.choose_device(flags.device)
        precision = utils.choose_precision(config.training.precision, device)
        self.autocast = utils.choose_autocast(precision, device)  # the context that the network runs in: its precision
        self.output_dir = Path(flags.output_dir)
        self.checkpoint_path = self.output_dir / "checkpoint.pt"
        if config.training.batch_size % RANKS:
            raise InputError(f"training.batch_size is {config.training.batch_size}: {RANKS} ranks don't divide it")
        checkpoint = utils.load_checkpoint(self.checkpoint_path, utils.TRAINING) if flags.resume else None
        if RANKS > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        (images, _), (test_images, _) = utils.load_data(config.data, flags.data_dir)
        self.images = images.to(device)  # uint8 [N, C, H, W]: MNIST is 61 MB, so it lies on the device as a whole
        self.grid_images = test_images[:64].to(device)

        torch.manual_seed(config.training.seed)
        torch.backends.cudnn.benchmark = True  # shapes don't change, so the fastest convolutions are worth finding
        layout = utils.choose_layout(config.model.features, device)
        self.model = self.parallel = build_model(config).to(device, memory_format=layout)
        self.ema = deepcopy(self.model).eval().requires_grad_(False)  # the average of its weights, which draws
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=device.type != "mps")
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)  # lifts small gradients
        self.step, self.log = 0, []
        if checkpoint:
            restore(self, checkpoint)
        if RANK == 0:
            utils.prepare_output(self.output_dir, keep=flags.resume)
            utils.save_log(self.output_dir / "log.csv", LOG_COLUMNS, self.log)
            size, small = config.data.image_size, config.data.low_res_size
            weights = sum(weight.numel() for weight in self.model.parameters())
            print(f"{config.data.dataset}: {len(images):,} images of {size}×{size} from {small}×{small};", end=" ")
            print(f"{weights:,} weights; {RANKS} × {device.type} in {precision}; output: {self.output_dir}", flush=True)
        utils.compile_networks([self.model.unet, self.ema.unet], flags.compile, device)
        if RANKS > 1:
            self.parallel = nn.parallel.DistributedDataParallel(self.model)  # averages the gradients of all ranks


def tell_duration(run: Run) -> None:
    """On a CPU, times one step without taking it, and says how long all will take."""
    left = run.config.training.num_training_steps - run.step
    if run.device.type != "cpu" or left <= 1000 or RANKS > 1:
        return
    high_res, _, context = make_pair(run.images[: run.config.training.batch_size], run.config)
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        with run.autocast():
            run.model.loss(high_res, context).backward()
        run.optimizer.zero_grad()
    minutes = (time.perf_counter() - started) / 60
    print(f"on this CPU, {left:,} steps will take about {minutes * left:.0f} minutes", end="")
    advice = f"; for a good result in about {minutes * 1000:.0f} minutes, give --num_training_steps 1000"
    print("" if run.step else advice, flush=True)


@utils.errors_in_one_line("stopped; --resume goes on from the last checkpoint", "give a smaller --batch_size")
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--config_path", default=HERE / "configs/mnist.toml", help="default: configs/mnist.toml")
    parser.add_argument("--num_training_steps", type=int, help="how many steps to train, in all")
    parser.add_argument("--batch_size", type=int, help="images in a step")
    parser.add_argument("--data_dir", default=HERE / "data", help="where data sets are, or are put; default: data")
    parser.add_argument("--output_dir", default=HERE / "output", help="where results are put; default: output")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first of them that is there")
    parser.add_argument("--seed", type=int, help="of weights, batches and noise")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on GPUs")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output_dir")
    run = Run(parser.parse_args(arguments))
    tell_duration(run)
    train(run)
    if RANKS > 1:
        dist.destroy_process_group()
    if RANK == 0:
        print(f"all {run.step} steps are done; to judge them: python evaluate.py {run.checkpoint_path}")


if __name__ == "__main__":
    main()
