"""SR3 on MNIST: learns to draw 32×32 digits from 8×8 ones, and shows them in output/ while it learns.

    python train_mnist.py
    python train_mnist.py --num_training_steps 1000 --batch_size 64
    python train_mnist.py --config_path configs/color_digits.toml --output_dir output/color
    python train_mnist.py --resume
    python train_mnist.py --config_path configs/mnist_regression.toml --output_dir output/regression
    python train_mnist.py --resume --regression_checkpoint output/regression/checkpoint.pt
    torchrun --standalone --nproc_per_node=8 train_mnist.py

Beside the paper (arXiv 2104.07636) read SR3.loss and SR3.refine in sr3.py, UNet.forward in unet.py, then `train` below.
"""

import sys

if sys.version_info < (3, 11):
    sys.stderr.write("Python is %d.%d: this lesson needs 3.11 or newer\n" % sys.version_info[:2])
    sys.exit(2)

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # before torch: what an Apple GPU lacks, its CPU does

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import metrics
import utils
from metrics import consistency, psnr, ssim
from sr3 import SR3, Regression
from unet import UNet
from utils import Config, InputError, downsample, to_float, upsample

HERE = Path(__file__).resolve().parent
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
BAR_EVERY = 10  # steps between two looks at the loss; each makes the script wait for the device
LOG_EVERY = 100  # steps between two rows of log.csv, a multiple of BAR_EVERY
LOG_COLUMNS = (
    "dataset,step,loss,learning_rate,images_per_second,"
    "psnr,ssim,consistency,bicubic_psnr,bicubic_ssim,bicubic_consistency"
)
GRID = 64  # test images in a grid, and in a batch when many are drawn


# ----------------------------------------------------------------------------------------------------------------------
# The flags; they win over the config


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
    parser.add_argument("--regression_checkpoint", help="of a trained baseline, for its row in the final table")
    return parser.parse_args(arguments)


def fail(message: object, status: int = 2) -> NoReturn:
    """Ends the script with one line on stderr, from the first rank where there are several; status 2 is bad input."""
    if RANK == 0:
        print("train_mnist.py: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(status)


# ----------------------------------------------------------------------------------------------------------------------
# The machine


def choose_device(name: str | None) -> torch.device:
    """The device of that name, else cuda, else mps, else cpu; with several ranks on GPUs, each has one of its own.

    Raises InputError where it isn't there.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.split(":")[0] not in ("cuda", "mps", "cpu"):
        raise InputError(f"device {name} is not one of cuda, mps and cpu; leave out --device to use what is there")
    if RANKS > 1 and name == "mps":
        raise InputError(
            f"device mps with {RANKS} ranks: there is one Apple GPU; leave out torchrun, or give --device cpu"
        )
    if RANKS > 1 and name.startswith("cuda"):
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if int(os.environ["LOCAL_WORLD_SIZE"]) > gpus:
            raise InputError(f"there are more ranks than GPUs, {gpus}; give --nproc_per_node={gpus}, or --device cpu")
        name = f"cuda:{local_rank}"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch built without that device raises AssertionError
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name} is not there ({reason}); leave out --device to use what is") from None


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """What autocast uses for the network: with "auto" the fastest type that the machine computes natively."""
    if name == "float16" and device.type == "cpu":
        raise InputError('training.precision is "float16" on a CPU, which only emulates it; give "auto"')
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":  # bfloat16 is native since Ampere; a T4 only emulates it
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    cpuinfo = Path("/proc/cpuinfo")  # AMX or AVX512-BF16; Linux tells
    native = device.type == "cpu" and cpuinfo.exists() and "_bf16" in cpuinfo.read_text()
    return torch.bfloat16 if native else torch.float32


def choose_layout(config: Config, device: torch.device) -> torch.memory_format:
    """Channels last for wide networks and GPUs' matrix units; measured on CPUs: narrow ones train faster without."""
    wide = config.model.features >= 64 or device.type == "cuda"
    return torch.channels_last if wide else torch.contiguous_format


def compile_networks(unets: list[UNet], wanted: bool | None, device: torch.device) -> None:
    """torch.compile each network in place, by default on GPUs with Triton; says so in one line where it can't work."""
    if wanted is None:
        wanted = device.type == "cuda" and find_spec("triton") is not None
    if not wanted:
        return
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))  # fails where the compiler is missing
    except Exception as error:
        print(f"torch.compile doesn't work here ({type(error).__name__}); going on without it", file=sys.stderr)
        torch._dynamo.reset()
        return
    for unet in unets:
        unet.compile(dynamic=False)  # batches of training and of drawing keep their sizes


def join_ranks(device: torch.device) -> None:
    """Waits until all ranks are here; from then on they can exchange tensors."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of every rank's value, on all of them; with one rank the value itself."""
    if RANKS > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


# ----------------------------------------------------------------------------------------------------------------------
# The data


def load_data(config: Config, data_dir: Path) -> tuple[str, tuple, tuple]:
    """The name of the data set, its training and its test set; the config's fallback where it can't be had.

    A set is uint8 images [N, C, H, W] and int64 labels [N], or None in place of these.
    """
    size, channels = config.data.image_size, config.data.channels
    name = config.data.dataset
    try:
        return name, *(utils.load_data_set(name, data_dir, train, size, channels) for train in (True, False))
    except utils.DatasetUnavailable as error:
        name = config.data.fallback
        if not name:
            raise
        line = "!" * 100
        print(f"{line}\nWARNING: {error}.\nGOING ON WITH DRAWN {name.upper()} INSTEAD.\n{line}", file=sys.stderr)
    return name, *(utils.load_data_set(name, data_dir, train, size, channels) for train in (True, False))


def make_pair(images: Tensor, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """From uint8 images in 0…255 the target y_0, the low-resolution image and the context x, scaled to [-1, 1]."""
    high_res = to_float(images)  # [B, C, H, W]
    low_res = downsample(high_res, config.data.low_res_size)  # [B, C, h, w]
    context = upsample(low_res, config.data.image_size)  # [B, C, H, W]
    return high_res, low_res, context


# ----------------------------------------------------------------------------------------------------------------------
# The model


def build_model(config: Config) -> SR3 | Regression:
    try:
        unet = UNet(image_channels=config.data.channels, image_size=config.data.image_size, **asdict(config.model))
        return SR3(unet, **asdict(config.diffusion)) if config.method == "sr3" else Regression(unet)
    except ValueError as error:
        raise InputError(f"config: {error}") from None


def load_state(part, state: dict, checkpoint_path: str | Path) -> None:
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, AttributeError):
        raise InputError(f"{checkpoint_path} is of another version of this lesson; train again") from None


def load_model(checkpoint_path: str | Path, device: str = "cpu") -> SR3 | Regression:
    """A trained model with the averaged weights, ready to `sample`. Raises InputError for what is no checkpoint.

    model = load_model("output/checkpoint.pt")
    images = model.sample(upsample(low_res, 32), steps=25)  # low_res: [B, C, 8, 8] in [-1, 1]
    """
    checkpoint = utils.load_checkpoint(checkpoint_path)
    model = AveragedModel(build_model(utils.parse_config(checkpoint["config"], checkpoint_path)))
    load_state(model, checkpoint["ema"], checkpoint_path)
    return model.module.eval().to(device)


# ----------------------------------------------------------------------------------------------------------------------
# The pictures


def draw(
    model: SR3 | Regression, test_images: Tensor, config: Config, autocast: Callable, save: Callable
) -> dict[str, float]:
    """Super-resolve uint8 test images [N, C, H, W] and show it: `save(name, images, columns)` writes one grid.

    Every call starts from the same noise, so that grids differ by the weights alone. Returns the mean metrics.
    """
    high_res, low_res, context = make_pair(test_images, config)  # [64, C, H or h, W or w]
    generator = torch.Generator(context.device).manual_seed(config.training.seed)  # its own: training stays as it is
    y_T = torch.randn(context.shape, generator=generator, device=context.device)

    steps = config.sampling.steps
    shown = {round(steps ** (i / 6)) for i in range(6)}  # the first steps change most: more of them are shown
    frames = [y_T[:8]]
    with autocast():
        refinement = model.refine(context, steps, variance=config.sampling.variance, generator=generator, y_T=y_T)
        for i, (_, y_t, y_0) in enumerate(refinement, start=1):
            if i in shown:
                frames.append(y_0[:8])
    super_res = y_t  # [64, C, H, W]

    pixels = F.interpolate(low_res, high_res.shape[2:], mode="nearest-exact")  # [64, C, H, W], still h × w squares
    save("hr", high_res, 8)
    save("lr", pixels, 8)
    save("sr", super_res, 8)
    if config.method == "regression":
        frames = []  # it has neither noise nor steps to show
    frames = [pixels[:8], *frames, super_res[:8], high_res[:8]]  # one column each
    save("refinement", torch.stack(frames, dim=1).flatten(0, 1), len(frames))

    results = {}
    high_res, low_res, super_res, bicubic = map(utils.to_unit, (high_res, low_res, super_res, context))
    for prefix, images in (("", super_res), ("bicubic_", bicubic)):
        results[prefix + "psnr"] = psnr(images, high_res).mean().item()
        results[prefix + "ssim"] = ssim(images, high_res).mean().item()
        results[prefix + "consistency"] = consistency(images, low_res).mean().item()
    return results


# ----------------------------------------------------------------------------------------------------------------------
# The final table (section 4)


def load_baseline(checkpoint_path: str, config: Config, dataset: str, device: torch.device) -> tuple[Regression, int]:
    """The regression that SR3 is compared with, and the steps it was trained for.

    Raises InputError for a checkpoint of another method, data set or image size.
    """
    if config.method == "regression":
        raise InputError(f"regression_checkpoint is {checkpoint_path}, but this run trains a regression; leave it out")
    checkpoint = utils.load_checkpoint(checkpoint_path)

    def describe(method: str, dataset: str, data: dict) -> str:
        return f"{method} on {dataset}, " + "{low_res_size} -> {image_size}, channels {channels}".format_map(data)

    needed = describe("regression", dataset, asdict(config.data))
    found = describe(checkpoint["config"].get("method"), checkpoint["dataset"], checkpoint["config"]["data"])
    if found != needed:
        raise InputError(f"regression_checkpoint {checkpoint_path} is of {found}; this run needs one of {needed}")
    return load_model(checkpoint_path, device), checkpoint["step"]


def draw_all(model: SR3 | Regression, context: Tensor, config: Config, autocast: Callable, name: str) -> Tensor:
    """Super-resolve x of any number of images in batches: [N, C, H, W] in [-1, 1] -> the same in [0, 1]."""
    generator = torch.Generator(context.device).manual_seed(config.training.seed)
    options = {"variance": config.sampling.variance, "generator": generator}
    size = min(GRID, len(context))  # of all batches, the last one too: a compiled network is compiled for one size
    images = []
    for part in tqdm(context.split(size), desc=name, unit="batch", dynamic_ncols=True, leave=False):
        full = torch.cat([part, part[:1].expand(size - len(part), -1, -1, -1)])
        with autocast():
            images.append(model.sample(full, config.sampling.steps, **options)[: len(part)])
    return utils.to_unit(torch.cat(images))


def evaluate(
    models: dict[str, tuple[SR3 | Regression, int]],
    config: Config,
    dataset: str,
    train_set: tuple[Tensor, Tensor | None],
    test_set: tuple[Tensor, Tensor | None],
    autocast: Callable,
    output_dir: Path,
) -> None:
    """Judge each method's model, trained for so many steps: prints a table, writes results.md, .json and diversity.png.

    The sets are as `load_data` gives them, the training images on the device.
    """
    (train_images, train_labels), (test_images, test_labels) = train_set, test_set
    device, sizes = train_images.device, "{low_res_size}×{low_res_size} -> {image_size}×{image_size}"
    order = torch.randperm(len(test_images), generator=torch.Generator().manual_seed(0))
    chosen = order[: config.evaluation.num_images]  # the same in every run
    print(f"judging the methods by {len(chosen):,} test images", flush=True)

    images, low_res, context = make_pair(test_images[chosen].to(device), config)  # [N, C, H or h, W or w]
    outputs = {"reference": utils.to_unit(images), "bicubic": utils.to_unit(context)}
    outputs |= {name: draw_all(model, context, config, autocast, name) for name, (model, _) in models.items()}
    outputs = {name: (255 * images).round() / 255 for name, images in outputs.items()}  # as a picture file has them
    given = [outputs["reference"], utils.to_unit(low_res), utils.to_unit(context)]
    if train_labels is not None:
        classifier = metrics.train_classifier(train_images, train_labels.to(device))
        given += [test_labels[chosen].to(device), classifier]
    rows = {
        name: {"training_steps": models[name][1] if name in models else None} | metrics.score(images, *given)
        for name, images in outputs.items()
    }
    table = metrics.format_table(rows)
    if dataset not in ("mnist", "digits"):
        table = table.replace("digit accuracy", "accuracy")
    table += (
        f"\n{len(chosen):,} test images of {dataset}, {sizes.format_map(asdict(config.data))}; mean ± standard error, "
        f"of the fool rate also the 95 % interval; its judges learned from {len(chosen) // 2:,} pairs.\n"
    )
    results = {"dataset": dataset, "num_images": len(chosen), "config": asdict(config), "methods": rows}

    if "SR3" in models:  # its samples for the same x, and what the others make of that
        eight, low_res, context = make_pair(test_images[:8].to(device), config)
        samples = draw_all(models["SR3"][0], context.repeat_interleave(8, dim=0), config, autocast, "diversity")
        samples = rearrange(samples, "(b k) c h w -> b k c h w", k=8)
        results["diversity"] = metrics.diversity(samples).mean().item()
        table += (
            f"SR3 drew in {config.sampling.steps} refinement steps; the standard deviation of its samples for the same "
            f"input is {results['diversity']:.3f} on average.\n"
        )
        pixels = F.interpolate(low_res, eight.shape[2:], mode="nearest-exact")
        columns = [utils.to_unit(pixels), *samples.unbind(1), 2 * samples.std(dim=1)]  # twice, to be seen
        if "regression" in models:
            columns.append(draw_all(models["regression"][0], context, config, autocast, "regression"))
        columns.append(utils.to_unit(eight))
        grid = torch.stack(columns, dim=1).flatten(0, 1).clamp(0, 1)
    print(table, end="", flush=True)
    utils.write_atomically(output_dir / "results.md", table.encode())
    utils.write_atomically(output_dir / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    if "SR3" in models:
        description = f"{dataset}, step {models['SR3'][1]}"
        utils.save_grid(output_dir / "diversity.png", grid, len(columns), description)


# ----------------------------------------------------------------------------------------------------------------------
# The run


def train(flags: argparse.Namespace) -> None:
    config = utils.load_config(
        flags.config_path, num_training_steps=flags.num_training_steps, batch_size=flags.batch_size, seed=flags.seed
    )
    settings = config.training
    device = choose_device(flags.device)
    precision = choose_precision(settings.precision, device)
    torch.backends.cudnn.benchmark = True  # shapes don't change, so the fastest convolutions are worth finding
    autocast = nullcontext if precision == torch.float32 else partial(torch.autocast, device.type, precision)
    if settings.batch_size % RANKS:
        raise InputError(f"training.batch_size is {settings.batch_size}: {RANKS} ranks don't divide it")
    batch_size = settings.batch_size // RANKS  # of each rank
    if RANK > 0:
        join_ranks(device)  # waits for the first rank, which looks at everything first, downloads and unpacks
    output_dir = Path(flags.output_dir)
    checkpoint_path = output_dir / "checkpoint.pt"
    checkpoint = utils.load_checkpoint(checkpoint_path) if flags.resume else None

    # The data: 60,000 digits are 61 MB, so they lie on the device and batches are indexed from them.
    dataset, (train_images, train_labels), test_set = load_data(config, Path(flags.data_dir))
    train_images, grid_images = train_images.to(device), test_set[0][:GRID].to(device)  # uint8 [N, C, H, W]

    # The model, the average of its weights, which is what draws, and the optimizer.
    torch.manual_seed(settings.seed)
    model = build_model(config).to(device, memory_format=choose_layout(config, device))
    ema = AveragedModel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)  # keeps small gradients above 0

    parts = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}  # what a checkpoint holds
    step, log = 0, []
    if checkpoint:
        utils.check_same_run(checkpoint, config, dataset)
        step, log = checkpoint["step"], checkpoint["log"]
        for name, part in parts.items():
            if checkpoint[name]:  # a scaler that was not in use has no state
                load_state(part, checkpoint[name], checkpoint_path)
        if step >= settings.num_training_steps and RANK == 0:
            print(f"all {step} steps are done; to train on, give a larger --num_training_steps")
    if RANK == 0:
        models = {}  # what the final table compares: by method, the model and its training steps
        baseline_path = flags.regression_checkpoint or config.evaluation.regression_checkpoint
        if baseline_path:
            models["regression"] = load_baseline(baseline_path, config, dataset, device)
        utils.prepare_output(output_dir, keep=flags.resume)
        utils.save_log(output_dir / "log.csv", LOG_COLUMNS, log)
        if RANKS > 1:
            join_ranks(device)
    compile_networks([model.unet, ema.module.unet], flags.compile, device)
    parallel = DistributedDataParallel(model, broadcast_buffers=False) if RANKS > 1 else model  # averages gradients

    stop_signals = []  # Ctrl-C and SIGTERM let the step finish; a second one ends the script at once

    def ask_to_stop(signal_number, _):
        stop_signals.append(signal_number)
        if RANKS == 1:  # torchrun passes on the Ctrl-C that its ranks have seen already
            signal.signal(signal_number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)

    def save_images(name: str, images: Tensor, columns: int) -> None:
        path = output_dir / f"{name}-{step:06d}.png"
        utils.save_grid(path, utils.to_unit(images), columns, description=f"{dataset}, step {step}")

    if RANK == 0:
        print(
            f"{dataset}: {len(train_images):,} images of {config.data.image_size}×{config.data.image_size} from "
            f"{config.data.low_res_size}×{config.data.low_res_size}; {sum(p.numel() for p in model.parameters()):,} "
            f"weights; {RANKS} × {device.type} in {str(precision).removeprefix('torch.')}; output: {output_dir}"
        )
    loss_sum, log_steps, log_start, shown_psnr = torch.zeros((), device=device), 0, time.perf_counter(), "-"
    stopping = False
    with tqdm(
        total=settings.num_training_steps, initial=step, unit="step", dynamic_ncols=True, disable=RANK > 0
    ) as progress:
        while step < settings.num_training_steps and not stopping:
            step += 1
            torch.manual_seed(hash((settings.seed, step, RANK)))  # a step's own numbers: resuming repeats them

            # Algorithm 1, line 2: a pair (x, y_0), the context made from the image itself.
            indices = torch.randint(len(train_images), (batch_size,), device=device)
            high_res, _, context = make_pair(train_images[indices], config)  # [B, C, H, W] each

            # Lines 3 to 5: the loss, and one gradient step on it.
            with autocast():
                loss = parallel(high_res, context)  # model.loss, on every rank
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * min(1, step / max(1, settings.warmup_steps))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            decay = min(settings.ema_decay, (1 + step) / (10 + step))
            # A young average forgets faster. (`ema.update_parameters` would make the script wait for the device.)
            get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), None)

            # The log, and now and then the pictures: only from here on does the script wait for the device.
            progress.update()
            loss_sum += loss.detach()
            log_steps += 1
            if RANKS == 1:
                stopping = bool(stop_signals)
            elif step % BAR_EVERY == 0:  # all ranks stop after the same step
                stopping = sum_over_ranks(torch.tensor(len(stop_signals), device=device)).item() > 0
            drawing = step % settings.sample_every == 0 or step in settings.early_samples
            drawing = drawing or stopping or step == settings.num_training_steps
            if step % BAR_EVERY and not drawing:
                continue
            mean_loss = sum_over_ranks(loss_sum).item() / RANKS / log_steps  # since the last row
            images_per_second = log_steps * settings.batch_size / (time.perf_counter() - log_start)
            progress.set_postfix_str(f"loss {mean_loss:.4f}, {images_per_second:.0f} images/s, PSNR {shown_psnr}")
            if step % LOG_EVERY and not drawing:
                continue
            finite = torch.stack([weight.isfinite().all() for weight in model.parameters()]).all()
            if not (math.isfinite(mean_loss) and finite):
                progress.close()
                reason = f"loss {mean_loss} or a weight is not finite; lower training.learning_rate"
                fail(f"step {step}: {reason}. {checkpoint_path} is as it was", status=1)
            if RANK == 0:
                row = [dataset, step, mean_loss, optimizer.param_groups[0]["lr"], images_per_second]
                if drawing:
                    results = draw(ema.module, grid_images, config, autocast, save_images)
                    shown_psnr = f"{results['psnr']:.1f} dB"
                    row += results.values()
                log.append(row)
                utils.save_log(output_dir / "log.csv", LOG_COLUMNS, log)
            if RANK == 0 and drawing:
                state = {"config": asdict(config), "dataset": dataset, "step": step, "log": log}
                utils.save_checkpoint(
                    checkpoint_path, state | {name: part.state_dict() for name, part in parts.items()}
                )
            loss_sum.zero_()
            log_steps, log_start = 0, time.perf_counter()
    if RANKS > 1:
        dist.destroy_process_group()
    stopping = stopping or bool(stop_signals)
    if stopping and (step < settings.num_training_steps or config.evaluation.num_images):
        if RANK == 0:
            print(f"stopped after step {step}; the same command with --resume goes on from there")
        sys.exit(128 + (stop_signals or [signal.SIGINT])[0])

    # The final table; all is saved by now, so Ctrl-C may end the script at once.
    if RANK == 0 and config.evaluation.num_images:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        models["SR3" if config.method == "sr3" else "regression"] = ema.module, step
        evaluate(models, config, dataset, (train_images, train_labels), test_set, autocast, output_dir)


def main(arguments: list[str] | None = None) -> None:
    try:
        train(parse_flags(arguments))
    except InputError as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        fail("stopped; the same command with --resume goes on from the last checkpoint, if there is one", status=130)


if __name__ == "__main__":
    main()
