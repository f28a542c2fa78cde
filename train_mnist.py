"""SR3 on MNIST: learns to draw 32×32 digits from 4×4 ones, and shows them in output/ while it learns.

    python train_mnist.py
    python train_mnist.py --low_res_size 8 --output_dir output/4x
    python train_mnist.py --method regression --output_dir output/regression
    python train_mnist.py --resume
    torchrun --standalone --nproc_per_node=8 train_mnist.py --batch_size 128

Read this script from top to bottom beside the paper (arXiv 2104.07636), then sr3.py, then unet.py. All settings and
their reasons are in configs/mnist.toml.
"""

import argparse
import datetime
import math
import sys
import time
from copy import deepcopy
from pathlib import Path

import utils  # before torch: it lets the CPU do what an Apple GPU can't
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from metrics import consistency, psnr, ssim
from utils import DEFAULTS, HERE, RANK, RANKS, InputError, fail, make_pair, to_unit, upsample

# From utils.py: DEFAULTS are the settings of configs/mnist.toml, HERE is the folder of this script, and this process is
# number RANK of RANKS, 0 of 1 unless torchrun has started several.
BAR_EVERY = 10  # steps between readings of the loss, each of which waits for the device
LOG_EVERY = 100  # steps between two rows of log.csv
LOG_COLUMNS = ["dataset", "step", "loss", "learning_rate", "images_per_second", "psnr", "ssim", "consistency"]
# What is above sampling_steps in mnist.toml, a resumed run can't change: the data, the network and the diffusion.
FIXED = list(DEFAULTS)[: list(DEFAULTS).index("sampling_steps")]


@utils.errors_in_one_line("give a smaller --batch_size or --image_size, or a smaller data set (all in memory)")
def main(arguments: list[str] | None = None) -> None:
    # 1. Settings ------------------------------------------------------------------------------------------------------
    # Those of configs/mnist.toml, overridden by the lines of --config_path, then by the flags. A resumed run starts
    # from its checkpoint's settings instead, so none needs to be repeated.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--config_path", help="a file of settings that differ from configs/mnist.toml")
    parser.add_argument("--data_dir", default=HERE / "data", help="folder of the data sets; default: data")
    parser.add_argument("--output_dir", default=HERE / "output", help="folder of the results; default: output")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first of them that can compute")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network: worth it for long runs only")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output_dir")
    for name, default in DEFAULTS.items():
        several = isinstance(default, list)
        kind = int if several else type(default)
        parser.add_argument(f"--{name}", type=kind, nargs="*" if several else None, help=f"default: {default}")
    flags = parser.parse_args(arguments)

    output_dir = Path(flags.output_dir)
    checkpoint_path, log_path = output_dir / "checkpoint.pt", output_dir / "log.csv"
    checkpoint = None
    if flags.resume:
        if RANK == 0 and output_dir.is_dir():
            utils.lock_folder(output_dir)  # until this run ends; prepare_output locks a new run's
        checkpoint = utils.load_checkpoint(checkpoint_path, ("config", "step", "model", "ema", "optimizer"))
    config = utils.load_config(flags.config_path, vars(flags), checkpoint and vars(checkpoint["config"]))
    for name in FIXED if checkpoint else ():
        new, old = getattr(config, name), getattr(checkpoint["config"], name)
        if new != old:
            raise InputError(f"{name} is {new}, in {checkpoint_path} it is {old}: a resumed run can't change it")

    # 2. Machine -------------------------------------------------------------------------------------------------------
    # One device, or one for each rank that torchrun has started.
    device = utils.choose_device(flags.device)
    precision = utils.choose_precision(config.precision, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)
    torch.backends.cudnn.benchmark = True  # shapes don't change, so the fastest convolutions are worth finding
    if config.batch_size % RANKS:
        raise InputError(f"batch_size is {config.batch_size}: {RANKS} ranks don't divide it")
    if RANKS > 1:
        patience = datetime.timedelta(hours=4)  # the others wait while the first rank downloads, or draws
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)

    # 3. Data ----------------------------------------------------------------------------------------------------------
    # All training images on the device (MNIST: 61 MB), and 64 test images for the grids. Where MNIST can't be had,
    # digits are drawn instead, and config.dataset becomes "digits". The labels that come with both are not needed.
    # Pictures that an earlier run left in output_dir are no data.
    (images, _), (test_images, _) = utils.load_data(config, flags.data_dir, or_digits=True, leave_out=output_dir)
    images = images.to(device)  # uint8 [N, C, H, W]
    grid_images = test_images[:64].to(device)

    # 4. Model ---------------------------------------------------------------------------------------------------------
    # SR3, or the regression baseline. `ema`, the moving average of its weights, makes the samples.
    torch.manual_seed(config.seed)
    model = utils.build_model(config).to(device)
    ema = deepcopy(model).eval()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)  # its learning rate is set in each step
    if flags.compile:
        utils.compile_networks([model.unet, ema.unet], device)
    step, log = 0, []
    if checkpoint:
        for name, part in (("model", model), ("ema", ema), ("optimizer", optimizer)):
            utils.load_state(part, checkpoint[name], checkpoint_path)
        step, log = checkpoint["step"], utils.load_log(log_path, checkpoint["step"])
    elif RANK == 0:
        utils.prepare_output(output_dir)
    parallel = nn.parallel.DistributedDataParallel(model) if RANKS > 1 else model  # averages the ranks' gradients
    if RANK == 0:
        sizes = f"{config.image_size}×{config.image_size} from {config.low_res_size}×{config.low_res_size}"
        weights = sum(weight.numel() for weight in model.parameters())
        print(f"{config.dataset}: {len(images):,} images of {sizes}; {weights:,} weights;", end=" ")
        print(f"{RANKS} × {device.type} in {precision}; output: {output_dir}", flush=True)

    # 5. Training: Algorithm 1 -----------------------------------------------------------------------------------------

    stop_signals = utils.catch_signals()  # a list, empty until Ctrl-C or SIGTERM
    stop = step >= config.num_training_steps
    losses, started = [], time.perf_counter()  # since the last row of the log
    bar = tqdm(total=config.num_training_steps, initial=step, unit="step", dynamic_ncols=True, disable=RANK > 0)
    with bar:
        while not stop:  # "until converged"
            step += 1
            torch.manual_seed(hash((config.seed, step, RANK)))  # in each step, so that a resumed run draws the same
            # Line 2: a pair (x, y_0); the context x is made from y_0 itself, shrunk and enlarged bicubically.
            indices = torch.randint(len(images), (config.batch_size // RANKS,), device=device)
            high_res, _, context = make_pair(images[indices], config.low_res_size)  # y_0 and x, [B, C, H, W]
            # Lines 3 and 4 are in SR3.forward, which returns the loss of line 5. (A regression has no noise to draw.)
            with autocast:
                loss = parallel(high_res, context)
            # Line 5: a gradient step on that loss.
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            learning_rate = config.learning_rate * min(1, step / max(1, config.warmup_steps))
            optimizer.param_groups[0]["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()
            # DDPM, too, averages its weights; this average covers about the last ninth of the steps so far.
            with torch.no_grad():
                for average, weight in zip(ema.parameters(), model.parameters()):
                    average.lerp_(weight, 1 - (1 + step) / (10 + step))
            losses.append(loss.detach())
            bar.update()

            # What is due after this step? Only what follows waits for the device.
            stop = bool(stop_signals) or step == config.num_training_steps
            # (The last pictures are drawn after the loop.)
            drawing = not stop and (step % config.sample_every == 0 or step in config.early_samples)
            logging = stop or drawing or step % LOG_EVERY == 0
            if not logging and step % BAR_EVERY:
                continue
            loss = torch.stack(losses).mean() / RANKS
            if RANKS > 1:
                dist.all_reduce(loss)  # the sum over all ranks
            loss, speed = loss.item(), len(losses) * config.batch_size / (time.perf_counter() - started)
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s")
            if not logging:
                continue
            if not (math.isfinite(loss) and all(weight.isfinite().all() for weight in model.parameters())):
                bar.close()
                kept = f"; {checkpoint_path} is as it was" if checkpoint_path.exists() else ""
                fail(f"step {step}: loss {loss} or a weight is not finite; lower --learning_rate{kept}", status=1)
            if RANK == 0:
                # A row of the log; its last three columns are for what `draw` returns.
                log.append(dict(zip(LOG_COLUMNS, (config.dataset, step, loss, learning_rate, speed))))
                if stop or drawing:  # the state is saved before the slow drawing
                    state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
                    utils.save_checkpoint(checkpoint_path, {"config": vars(config), "step": step, **state})
                utils.save_log(log_path, LOG_COLUMNS, log)
                if drawing:
                    log[-1] |= draw(ema, grid_images, config, autocast, output_dir, step, bar)
                    utils.save_log(log_path, LOG_COLUMNS, log)
            losses, started = [], time.perf_counter()

        if step < config.num_training_steps:
            print(f"stopped after step {step}; the same command with --resume goes on from there")
            raise SystemExit(128 + stop_signals[0])
        if RANK == 0:  # also when resuming a run that was cut off while it drew its last pictures
            results = draw(ema, grid_images, config, autocast, output_dir, step, bar, animation=config.method == "sr3")
            if log and log[-1]["step"] == step:
                log[-1] |= results
            utils.save_log(log_path, LOG_COLUMNS, log)
    if RANKS > 1:
        dist.destroy_process_group()
    if RANK == 0:
        data = "" if flags.data_dir == HERE / "data" else f" --data_dir {flags.data_dir}"
        print(f"all {step} steps are done; to judge them: python evaluate.py {checkpoint_path}{data}")


def draw(model, images, config, autocast, output_dir: Path, step: int, bar: tqdm, animation: bool = False) -> dict:
    """Saves what `refine` makes of the same images and noise each time; returns metrics, the last columns of the log.

    Grids hr: the targets; lr: the inputs; sr: the results; refinement: the estimates ŷ_0 at six noise levels, for the
    eight images where they change most. The animation shows y_t, from noise to image.
    """
    bar.set_description_str(f"drawing {len(images)} images")
    high_res, low_res, context = make_pair(images, config.low_res_size)  # [64, C, H or h, W or w]
    generator = torch.Generator(images.device).manual_seed(config.seed)
    steps = config.sampling_steps if config.method == "sr3" else 1
    estimates = {1 + (steps - 1) * i // 6: [] for i in range(6)}  # ŷ_0 of these steps, for the refinement grid
    states = {i: [] for i in range(steps, 0, -math.ceil(steps / 50))} if animation else {}  # y_t, back from the last
    finished = []
    size = config.batch_size // RANKS  # as many at once as in a training step
    for start in range(0, len(images), size):
        with autocast:
            for i, (y_t, y_0_hat) in enumerate(model.refine(context[start : start + size], steps, generator), start=1):
                if i in estimates:
                    estimates[i].append(y_0_hat)
                if i in states:
                    states[i].append(y_t[: max(0, 20 - start)])
        finished.append(y_t)
    super_res = torch.cat(finished)  # [64, C, H, W]

    pixels = upsample(low_res, config.image_size, "nearest-exact")  # [64, C, H, W], of h × w visible squares
    estimates = {i: torch.cat(parts) for i, parts in estimates.items()}
    change = (estimates[1] - super_res).square().mean(dim=(1, 2, 3))  # from the first step's estimate to the result
    rows = change.argsort(descending=True, stable=True)[:8]
    columns = {"input": pixels}
    if config.method == "sr3":  # a regression has no steps to show
        levels = model.levels(steps)  # step i, counted from 1, starts at levels[i - 1]
        columns |= {f"gamma\n{levels[i - 1]:.2g}": estimate for i, estimate in estimates.items()}
    columns |= {"result": super_res, "truth": high_res}
    description = f"{config.dataset}, step {step}"
    for name, grid in (("hr", high_res), ("lr", pixels), ("sr", super_res)):
        utils.save_grid(output_dir / f"{name}-{step:06d}.png", to_unit(grid), 8, description)
    columns = {label: to_unit(column[rows]) for label, column in columns.items()}
    utils.save_columns(output_dir / f"refinement-{step:06d}.png", columns, description)
    if animation:
        pairs = [torch.stack([pixels[:20], torch.cat(states[i])], dim=1).flatten(0, 1) for i in sorted(states)]
        frames = [utils.picture_of(to_unit(pair), 10, labels=["input", "y_t"] * 5) for pair in pairs]
        utils.save_animation(output_dir / "refinement.gif", frames)

    high_res, low_res, super_res = map(to_unit, (high_res, low_res, super_res))
    results = {
        "psnr": psnr(super_res, high_res).mean().item(),
        "ssim": ssim(super_res, high_res).mean().item(),
        "consistency": consistency(super_res, low_res).mean().item(),
    }
    bar.set_description_str()
    bar.write(f"step {step}: PSNR {results['psnr']:.1f} dB; {output_dir}/sr-{step:06d}.png", file=sys.stderr)
    return results


if __name__ == "__main__":
    main()
