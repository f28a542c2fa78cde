"""SR3 on MNIST: learns to draw 32×32 digits from 4×4 ones, and shows them in output/ while it learns.

    python train_mnist.py
    python train_mnist.py --low_res_size 8 --output_dir output/4x
    python train_mnist.py --method regression --output_dir output/regression
    python train_mnist.py --resume
    torchrun --standalone --nproc_per_node=8 train_mnist.py --batch_size 128

Read this script from top to bottom beside the paper (arXiv 2104.07636), then make_pair in utils.py, sr3.py and unet.py.
All settings and their reasons are in configs/mnist.toml. support/ is needed, but teaches nothing about SR3.
"""

import math
import shlex
import sys
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

from support import machine, output
from support.data import load_data, load_data_or_digits
from support.errors import InputError, Parser, end, one_line_errors
from support.settings import HERE, add_settings, parse_settings

import torch
from torch import Tensor, nn
from tqdm import tqdm

from metrics import consistency, psnr, ssim
from utils import build_model, make_pair, to_unit, upsample
from utils import picture_of, picture_of_columns, save_animation, save_picture

BAR_EVERY = 10  # steps between readings of the loss, each of which waits for the device
LOG_EVERY = 100  # steps between two rows of the log
LOG_COLUMNS = ["dataset", "step", "loss", "learning_rate", "psnr", "ssim", "consistency"]


@one_line_errors(if_too_large="give a smaller --batch_size or --image_size, or a smaller data set")
def main(arguments: list[str] | None = None) -> None:
    # 1. Settings ------------------------------------------------------------------------------------------------------
    # Those of configs/mnist.toml, overridden by the lines of --config_path, then by the flags. A resumed run starts
    # from its checkpoint's settings instead, so none needs to be repeated.
    parser = Parser(__doc__)
    parser.add_argument("--data_dir", default=HERE / "data", help="folder of the data sets; default: data")
    parser.add_argument("--output_dir", default=HERE / "output", help="folder of the results; default: output")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first of them that can compute")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output_dir")
    add_settings(parser)
    flags = parser.parse_args(arguments)
    output_dir = Path(flags.output_dir)
    checkpoint_path, checkpoint = output_dir / "checkpoint.pt", None
    if flags.resume:
        checkpoint = output.load_checkpoint(checkpoint_path, ("config", "step", "model", "ema", "optimizer"))
    config = parse_settings(parser, arguments, checkpoint and checkpoint["config"])
    if config.dataset == "folder" and output_dir.resolve() == Path(flags.data_dir).resolve():
        raise InputError(f"{output_dir} holds the pictures to learn from; give another --output_dir")

    # 2. Data ----------------------------------------------------------------------------------------------------------
    # All training images on the device (MNIST: 61 MB), and 64 test images for the grids. Where MNIST can't be had, a
    # new run takes digits that this lesson draws, and config.dataset becomes "digits". The labels are not needed.
    # torchrun starts several processes, `ranks`, each with a device of its own and its share of each batch.
    device = machine.choose_device(flags.device)
    rank, ranks = machine.join_ranks(device)
    batch_size = machine.share_of_batch(config.batch_size, ranks)
    with machine.first_rank_first(rank, ranks):
        load = load_data if checkpoint else load_data_or_digits
        (images, _), (test_images, _) = load(config, flags.data_dir)
    numbers = [len(images), len(test_images)]
    output.check_same_data(checkpoint, numbers)
    images, grid_images = images.to(device), test_images[:64].to(device)  # uint8 [N or 64, C, H, W]

    # 3. Model ---------------------------------------------------------------------------------------------------------
    # SR3, or the regression baseline. `ema`, the moving average of its weights, makes the samples.
    torch.manual_seed(config.seed)
    precision = machine.choose_precision(config.precision, device)
    model = build_model(config).to(device, memory_format=machine.choose_layout(device, precision))
    ema = deepcopy(model).eval()
    rate = torch.zeros((), device=device)  # the learning rate: a tensor, so that the CUDA graph below reads new values
    optimizer = torch.optim.Adam(model.parameters(), rate, fused=True, capturable=device.type == "cuda")
    step, log = 0, []
    if checkpoint:
        for name, part in (("model", model), ("ema", ema), ("optimizer", optimizer)):
            output.load_state(part, checkpoint[name], checkpoint_path)
        step, log = checkpoint["step"], checkpoint.get("log", [])
    parallel = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model  # averages the ranks' gradients
    if rank == 0:
        print(f"{config.dataset}: {len(images):,} images; {ranks} × {device.type}, {precision}. {output_dir} will have")
        print("progress.png, log.csv, checkpoint.pt; by step: sr (samples), lr (inputs), hr, refinement", flush=True)

    # 4. Training: Algorithm 1 -----------------------------------------------------------------------------------------
    def training_step() -> Tensor:
        # Line 2: a pair (x, y_0); the context x is made from y_0 itself, shrunk and enlarged bicubically.
        indices = torch.randint(len(images), (batch_size,), device=device)
        high_res, _, context = make_pair(images[indices], config.low_res_size)  # y_0 and x, [B, C, H, W]
        # Lines 3 and 4 are in SR3.forward, which returns the loss (6), weighted as `loss_weight` says.
        with machine.autocast(device, precision):
            loss = parallel(high_res, context)
        # Line 5: a gradient step on that loss.
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        return loss.detach()

    training_step = machine.record(training_step, device, ranks)  # on one GPU a CUDA graph, elsewhere unchanged
    averages, weights = list(ema.parameters()), list(model.parameters())
    losses, failures = [], []  # since the last row of the log: losses, and files that could not be written
    lock = output.lock(output_dir) if rank == 0 else nullcontext()  # keeps other runs out
    with lock, machine.caught_signals(ranks) as signals:  # a list, empty until Ctrl-C or SIGTERM
        if rank == 0 and not checkpoint:
            output.prepare_output(output_dir)
        steps = range(step + 1, config.num_training_steps + 1)
        bar = tqdm(steps, initial=step, total=steps.stop - 1, unit="step", dynamic_ncols=True, disable=rank > 0)
        for step in bar:  # "until converged"
            torch.manual_seed(hash((config.seed, step, rank)))  # in each step, so that a resumed run draws the same
            learning_rate = config.learning_rate * min(1, step / max(1, config.warmup_steps))
            optimizer.param_groups[0]["lr"].fill_(learning_rate)  # not `rate`, which a resumed run has replaced
            loss = training_step()
            # DDPM, too, samples with an average of its weights; here their mean age is a tenth of the steps so far.
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 9 / (10 + step))  # average.lerp_(weight, …) for all at once

            # What is due after this step? Only what follows waits for the device, and only the first rank does it.
            if rank > 0:
                continue
            losses.append(loss.clone())  # the next step may overwrite it
            last = step == config.num_training_steps
            stopping = bool(signals) and not last
            scheduled = step % config.sample_every == 0 or step in config.early_samples
            drawing = last or (scheduled and not stopping)
            if step % BAR_EVERY == 0:
                bar.set_postfix_str(f"loss {loss.item():.4f}")
            if not (drawing or stopping or step % LOG_EVERY == 0):
                continue
            loss = torch.stack(losses).mean().item()
            if not (math.isfinite(loss) and all(weight.isfinite().all() for weight in weights)):
                bar.close()
                end(f"step {step}: loss {loss} or a weight is not finite: not saved; lower --learning_rate", status=1)
            row = {"dataset": config.dataset, "step": step, "loss": loss, "learning_rate": learning_rate}
            log.append(row)
            losses, failures = [], []
            if drawing:
                with output.failures_noted(failures):
                    row |= draw(ema, grid_images, config, precision, output_dir, step)
                    bar.write(f"step {step}: PSNR {row['psnr']:.1f} dB; sr-{step:06d}.png", file=sys.stderr)
            if drawing or stopping:
                state = {"config": vars(config), "images": numbers, "step": step, "log": log}
                state |= {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
                with output.failures_noted(failures):
                    output.save_checkpoint(checkpoint_path, state)
            with output.failures_noted(failures):
                output.save_log(output_dir / "log.csv", LOG_COLUMNS, log)
            if stopping:
                break

    if failures:
        raise failures[0]  # of the last step: no later one can make up for it
    if step < config.num_training_steps:
        print(f"stopped after step {step}; the same command with --resume goes on from there")
        raise SystemExit(128 + signals[0])
    machine.leave_ranks(ranks)
    if rank == 0:
        path, data = shlex.quote(str(checkpoint_path)), shlex.quote(str(flags.data_dir))
        print(f"all {step} steps are done; to judge the model: python evaluate.py {path} --data_dir {data}")
        print(f"to draw with it: python sample.py {path}")


def draw(model: nn.Module, images: Tensor, config, precision: str, output_dir: Path, step: int) -> dict:
    """Draws the same images from the same noise each time, and returns their metrics, the last columns of the log.

    Grids: hr, the targets; lr, the inputs; sr, the results; refinement, the estimates ŷ_0 at up to six levels, for the
    eight images where they change most. The animation, after the last training step, shows the input, ŷ_0 and y_t.
    """
    # Draw: at most 50 pairs of y_t and ŷ_0 are kept, by step, the last one among them.
    high_res, low_res, context = make_pair(images, config.low_res_size)  # [64, C, H or h, W or w]
    generators = [torch.Generator().manual_seed(number) for number in range(len(images))]
    kept, steps = {}, config.sampling_steps if config.method == "sr3" else 1
    with machine.autocast(images.device, precision):
        for i, pair in enumerate(model.refine(context, steps, generators), start=1):
            if (steps - i) % math.ceil(steps / 50) == 0:
                kept[i] = pair
    super_res = kept[steps][0]  # [64, C, H, W]

    # Save the grids.
    pixels = upsample(low_res, config.image_size, "nearest-exact")  # [64, C, H, W], of h × w visible squares
    for name, grid in (("hr", high_res), ("lr", pixels), ("sr", super_res)):
        save_picture(output_dir / f"{name}-{step:06d}.png", picture_of(to_unit(grid), 8))
    output.save_progress(output_dir, row_height=2 * (config.image_size + 2))

    # Choose what the refinement shows.
    columns = {"input": pixels}
    if config.method == "sr3":  # a regression has no steps to show
        levels = model.levels(steps)  # step i, counted from 1, starts at levels[i - 1]
        chosen = [list(kept)[(len(kept) - 1) * i // 6] for i in range(6)]
        columns |= {f"gamma\n{levels[i - 1]:.2g}": kept[i][1] for i in chosen}
    columns |= {"result": super_res, "truth": high_res}
    change = (next(iter(kept.values()))[1] - super_res).square().mean(dim=(1, 2, 3))  # since the first estimate
    rows = change.argsort(descending=True, stable=True)[:8]
    columns = {label: to_unit(column[rows]) for label, column in columns.items()}
    save_picture(output_dir / f"refinement-{step:06d}.png", picture_of_columns(columns))

    # Animate.
    if config.method == "sr3" and step == config.num_training_steps:
        cells = [torch.stack([pixels, y_0_hat, y_t], dim=1)[:16] for y_t, y_0_hat in kept.values()]  # [16, 3, C, H, W]
        frames = [picture_of(to_unit(cell.flatten(0, 1)), 12) for cell in cells]
        save_animation(output_dir / "refinement.gif", frames)

    # Measure.
    result, truth, small = to_unit(super_res), to_unit(high_res), to_unit(low_res)
    scores = {"psnr": psnr(result, truth), "ssim": ssim(result, truth), "consistency": consistency(result, small)}
    return {name: values.mean().item() for name, values in scores.items()}


if __name__ == "__main__":
    main()
