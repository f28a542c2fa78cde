"""SR3 on MNIST: learns to draw 32×32 digits from 4×4 ones, and shows them in output/ while it learns.

    python train_mnist.py
    python train_mnist.py --low_res_size 8 --output_dir output/4x
    python train_mnist.py --method regression --output_dir output/regression
    python train_mnist.py --resume
    torchrun --standalone --nproc_per_node=8 train_mnist.py --batch_size 128

Read this script from top to bottom beside the paper (arXiv 2104.07636), then sr3.py, then unet.py, then utils.py. All
settings and their reasons are in configs/mnist.toml. What lies in support/ is needed, but teaches nothing of SR3.
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
from utils import build_model, make_pair, picture_of, picture_of_columns, save_picture, to_unit, upsample

BAR_EVERY = 10  # steps between readings of the loss, each of which waits for the device
LOG_EVERY = 100  # steps between two rows of the log
LOG_COLUMNS = ["dataset", "step", "loss", "learning_rate", "psnr", "ssim", "consistency"]


@one_line_errors("give a smaller --batch_size or --image_size, or a smaller data set (all in memory)")
def main(arguments: list[str] | None = None) -> None:
    # 1. Settings ------------------------------------------------------------------------------------------------------
    # Those of configs/mnist.toml, overridden by the lines of --config_path, then by the flags. A resumed run starts
    # from its checkpoint's settings instead, so none needs to be repeated.
    parser = Parser(__doc__)
    parser.add_argument("--config_path", help="a file of settings that differ from configs/mnist.toml")
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

    # 2. Data ----------------------------------------------------------------------------------------------------------
    # All training images on the device (MNIST: 61 MB), and 64 test images for the grids. Where MNIST can't be had, a
    # new run draws digits instead, and config.dataset becomes "digits". The labels are not needed. Each of the `ranks`
    # processes that torchrun may have started has a device of its own, and its share of each batch.
    device = machine.choose_device(flags.device)
    rank, ranks = machine.join_ranks(device)
    batch_size, remainder = divmod(config.batch_size, ranks)
    if remainder:
        raise InputError(f"batch_size is {config.batch_size}: {ranks} ranks don't divide it")
    with machine.first_rank_first(rank, ranks):
        load = load_data if checkpoint else load_data_or_digits
        (images, _), (test_images, _) = load(config, flags.data_dir)
    numbers = [len(images), len(test_images)]
    if checkpoint and checkpoint.get("images", numbers) != numbers:
        was = "there are {} and {} images for training and testing, when this run began there were {} and {}"
        raise InputError(f"{was.format(*numbers, *checkpoint['images'])}: a resumed run can't change its data")
    images, grid_images = images.to(device), test_images[:64].to(device)  # uint8 [N or 64, C, H, W]

    # 3. Model ---------------------------------------------------------------------------------------------------------
    # SR3, or the regression baseline. `ema`, the moving average of its weights, makes the samples.
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = True  # shapes don't change, so the fastest convolutions are worth finding
    model = build_model(config).to(device)
    ema = deepcopy(model).eval()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)  # its learning rate is set in each step
    step, log = 0, []
    if checkpoint:
        for name, part in (("model", model), ("ema", ema), ("optimizer", optimizer)):
            output.load_state(part, checkpoint[name], checkpoint_path)
        step, log = checkpoint["step"], checkpoint.get("log", [])
    parallel = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model  # averages the ranks' gradients
    precision = machine.choose_precision(config.precision, device)
    if rank == 0:
        sizes = f"{config.image_size}×{config.image_size} from {config.low_res_size}×{config.low_res_size}"
        weights = sum(weight.numel() for weight in model.parameters())
        print(f"{config.dataset}: {len(images):,} images of {sizes}; {weights:,} weights;", end=" ")
        print(f"{ranks} × {device.type} in {precision}; output: {output_dir}")
        print("To look at there: progress.png, samples as the training goes on; sr, lr, hr and refinement, by step: the")
        print("samples, their inputs, the truth, and how samples form; log.csv, the losses", flush=True)

    # 4. Training: Algorithm 1 -----------------------------------------------------------------------------------------
    def training_step() -> Tensor:
        # Line 2: a pair (x, y_0); the context x is made from y_0 itself, shrunk and enlarged bicubically.
        indices = torch.randint(len(images), (batch_size,), device=device)
        high_res, _, context = make_pair(images[indices], config.low_res_size)  # y_0 and x, [B, C, H, W]
        # Lines 3 and 4 are in SR3.forward, which returns the loss of line 5. (A regression has no noise to draw.)
        with machine.autocast(device, precision):
            loss = parallel(high_res, context)
        # Line 5: a gradient step on that loss.
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        return loss.detach()

    losses, failures = [], []  # since the last row of the log: losses, and files that could not be written
    lock = output.lock(output_dir) if rank == 0 else nullcontext()  # no other run may write there meanwhile
    with lock, machine.caught_signals(ranks) as signals:  # a list, empty until Ctrl-C or SIGTERM
        if rank == 0 and not checkpoint:
            output.prepare_output(output_dir)
        steps = range(step + 1, config.num_training_steps + 1)
        bar = tqdm(steps, initial=step, total=steps.stop - 1, unit="step", dynamic_ncols=True, disable=rank > 0)
        for step in bar:  # "until converged"
            torch.manual_seed(hash((config.seed, step, rank)))  # in each step, so that a resumed run draws the same
            learning_rate = config.learning_rate * min(1, step / max(1, config.warmup_steps))
            optimizer.param_groups[0]["lr"] = learning_rate
            loss = training_step()
            # DDPM, too, averages its weights; this average covers about the last ninth of the steps so far.
            with torch.no_grad():
                for average, weight in zip(ema.parameters(), model.parameters(), strict=True):
                    average.lerp_(weight, 9 / (10 + step))

            # What is due after this step: a row of the log, pictures, the checkpoint, log.csv. Only this waits for the
            # device. Every rank trains; the first one does the rest.
            if rank > 0:
                continue
            losses.append(loss)
            last = step == config.num_training_steps
            stopping = bool(signals) and not last
            drawing = last or (step % config.sample_every == 0 or step in config.early_samples) and not stopping
            if step % BAR_EVERY == 0:
                bar.set_postfix_str(f"loss {loss.item():.4f}")
            if not (drawing or stopping or step % LOG_EVERY == 0):
                continue
            loss = torch.stack(losses).mean().item()
            if not (math.isfinite(loss) and all(weight.isfinite().all() for weight in model.parameters())):
                bar.close()
                kept = f"{checkpoint_path} is as it was" if checkpoint_path.exists() else "nothing is saved"
                end(f"step {step}: loss {loss} or a weight is not finite; lower --learning_rate; {kept}", status=1)
            row = {"dataset": config.dataset, "step": step, "loss": loss, "learning_rate": learning_rate}
            log.append(row)
            losses, failures = [], []
            if drawing:
                bar.set_description_str("drawing")
                with output.failures_noted(failures):
                    row |= draw(ema, grid_images, config, precision, output_dir, step)
                    line = f"step {step}: PSNR {row['psnr']:.1f} dB; {output_dir}/sr-{step:06d}.png"
                    bar.write(line, file=sys.stderr)
                bar.set_description_str()
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
        raise failures[0]  # of the last step: the next one can't make up for it
    if step < config.num_training_steps:
        print(f"stopped after step {step}; the same command with --resume goes on from there")
        raise SystemExit(128 + signals[0])
    if ranks > 1:
        torch.distributed.destroy_process_group()
    if rank == 0:
        path = shlex.quote(str(checkpoint_path))
        data = "" if flags.data_dir == HERE / "data" else f" --data_dir {shlex.quote(str(flags.data_dir))}"
        print(f"all {step} steps are done; to judge them: python evaluate.py {path}{data}")
        print(f"and to draw with them: python sample.py {path}")


def draw(model: nn.Module, images: Tensor, config, precision: str, output_dir: Path, step: int) -> dict:
    """Draws the same images from the same noise each time, and returns their metrics, the last columns of the log.

    Grids hr: the targets; lr: the inputs; sr: the results; refinement: the estimates ŷ_0 at six noise levels, for the
    eight images where they change most. progress.png: the first eight results of all drawings so far. The animation,
    of the last step, shows the input, ŷ_0 and y_t.
    """
    # Draw.
    high_res, low_res, context = make_pair(images, config.low_res_size)  # [64, C, H or h, W or w]
    generators = [torch.Generator().manual_seed(number) for number in range(len(images))]
    steps = config.sampling_steps if config.method == "sr3" else 1
    kept = {}  # by step, at most 50 pairs of y_t and ŷ_0, the last one among them
    with machine.autocast(images.device, precision):
        for i, pair in enumerate(model.refine(context, steps, generators), start=1):
            if (steps - i) % math.ceil(steps / 50) == 0:
                kept[i] = pair
    super_res = kept[steps][0]  # [64, C, H, W]

    # Choose and save.
    pixels = upsample(low_res, config.image_size, "nearest-exact")  # [64, C, H, W], of h × w visible squares
    for name, grid in (("hr", high_res), ("lr", pixels), ("sr", super_res)):
        save_picture(output_dir / f"{name}-{step:06d}.png", picture_of(to_unit(grid), 8))
    output.save_progress(output_dir, row_height=2 * (config.image_size + 2))
    columns = {"input": pixels}
    if config.method == "sr3":  # a regression has no steps to show
        shown = [list(kept)[(len(kept) - 1) * i // 6] for i in range(6)]
        columns |= {f"gamma\n{model.levels(steps)[i - 1]:.2g}": kept[i][1] for i in shown}  # step i starts there
    columns |= {"result": super_res, "truth": high_res}
    change = (next(iter(kept.values()))[1] - super_res).square().mean(dim=(1, 2, 3))  # from the first estimate
    rows = change.argsort(descending=True, stable=True)[:8]
    columns = {label: to_unit(column[rows]) for label, column in columns.items()}
    save_picture(output_dir / f"refinement-{step:06d}.png", picture_of_columns(columns))
    if config.method == "sr3" and step == config.num_training_steps:
        frames = []
        for y_t, y_0_hat in kept.values():
            cells = torch.stack([pixels, y_0_hat, y_t], dim=1)[:16]  # [16, 3, C, H, W]
            frames.append(picture_of(to_unit(cells.flatten(0, 1)), 12))
        pauses = [200] * (len(frames) - 1) + [3000]  # milliseconds
        animation = {"save_all": True, "append_images": frames[1:], "duration": pauses, "loop": 0}
        save_picture(output_dir / "refinement.gif", frames[0], **animation)

    # Measure.
    result, truth = to_unit(super_res), to_unit(high_res)
    return {
        "psnr": psnr(result, truth).mean().item(),
        "ssim": ssim(result, truth).mean().item(),
        "consistency": consistency(result, to_unit(low_res)).mean().item(),
    }


if __name__ == "__main__":
    main()
