"""SR3 on MNIST: learns to draw 32×32 digits from 4×4 ones, and shows them in output/ while it learns.

    python train_mnist.py
    python train_mnist.py --low_res_size 8 --output_dir output/4x
    python train_mnist.py --method regression --output_dir output/regression
    python train_mnist.py --resume
    torchrun --standalone --nproc_per_node=8 train_mnist.py --batch_size 128

Read this script from top to bottom beside the paper (arXiv 2104.07636); then make_pair, the first function of utils.py;
then sr3.py and unet.py, and at last the rest of utils.py. All settings and their reasons are in configs/mnist.toml, and
each is a flag, too. support/ is needed, but teaches nothing about SR3.
"""

import math
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from metrics import consistency, psnr, ssim
from support import machine
from support.data import load_data
from support.errors import argument_parser, one_line_errors
from support.run import RESUMED, Run, load_checkpoint
from support.settings import HERE, add_settings, parse_settings
from utils import build_model, make_pair, picture_of, picture_of_columns, to_unit, upsample


@one_line_errors()
def main(arguments=None):
    # 1. Settings: those of configs/mnist.toml, of a resumed run, of --config_path, and the flags; later ones win -----
    parser = argument_parser(__doc__)
    parser.add_argument("--data_dir", default=HERE / "data", help="folder of the data sets; default: data")
    parser.add_argument("--output_dir", default=HERE / "output", help="folder of the results; default: output")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first of them that can compute")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output_dir")
    add_settings(parser)
    flags = parser.parse_args(arguments)
    folder = Path(flags.output_dir)
    checkpoint = load_checkpoint(folder / "checkpoint.pt", RESUMED) if flags.resume else None
    config = parse_settings(flags, checkpoint and checkpoint["config"])
    device = machine.choose_device(flags.device)
    precision = machine.choose_precision(config.precision, device)
    rank, ranks = machine.join_ranks(device, config.batch_size)  # torchrun starts several processes, 0 to ranks - 1

    # 2. Data: all training images on the device (MNIST: 61 MB), and 64 test images for the grids ---------------------
    # If MNIST can't be downloaded, a new run takes digits that this lesson draws. The labels are not needed.
    with machine.first_rank_first(rank, ranks):
        (images, _), (test_images, _) = load_data(config, flags.data_dir, or_digits=checkpoint is None)
    images, grid_images = images.to(device), test_images[:64].to(device)  # uint8 [N or 64, C, H, W]

    # 3. Model: SR3, or the regression baseline ------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    model = build_model(config).to(device, memory_format=machine.choose_layout(device, precision))
    ema = deepcopy(model).eval().requires_grad_(False)  # the moving average of its weights, which makes the samples
    # The learning rate and each new weight's share in the average are set before each step. They are tensors, because a
    # GPU repeats the step from a recording (`record` below), in which plain numbers would never change; `capturable`
    # lets Adam's own step be part of it.
    rate, share = torch.zeros(2, device=device)
    optimizer = torch.optim.Adam(model.parameters(), rate, fused=True, capturable=device.type == "cuda")
    # Run takes over the folder, and loads the states of a checkpoint; the optimizer's learning rate stays `rate`.
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    run = Run(folder, config, parts, [len(images), len(test_images)], checkpoint)
    parallel = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model  # averages the ranks' gradients
    print(f"{config.dataset}: {len(images):,} images; {ranks} × {device.type}, {precision}; pictures go into {folder}")

    # 4. Training: Algorithm 1 -----------------------------------------------------------------------------------------
    def training_step():
        # Line 2: a pair (x, y_0); the context x is made from y_0 itself, shrunk and enlarged bicubically.
        indices = torch.randint(len(images), (config.batch_size // ranks,), device=device)
        high_res, _, context = make_pair(images[indices], config.low_res_size)  # y_0 and x, [B, C, H, W]
        # Lines 3 and 4, γ and ε, are in SR3.forward, which returns the loss (6), weighted as `loss_weight` says.
        with machine.autocast(device, precision):
            loss = parallel(high_res, context)
        # Line 5: a gradient step on that loss. Clipping the gradient's norm is ours.
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        # Not in the algorithm, but DDPM does it, too: samples come from an average of the weights.
        for average, weight in zip(ema.parameters(), model.parameters()):
            average.lerp_(weight.detach(), share)
        return loss.detach()

    training_step = machine.record(training_step, device, ranks)  # on one GPU a CUDA graph, elsewhere unchanged
    for step in run.steps():  # repeats lines 2 to 5: from step 1, or from where a resumed run stopped, to the last
        torch.manual_seed(1_000_000 * config.seed + ranks * step + rank)  # a resumed run draws as an unbroken one
        rate.fill_(config.learning_rate * min(1, step / max(1, config.warmup_steps)))
        share.fill_(9 / (10 + step))  # so the averaged weights' mean age is a tenth of the steps so far
        loss = training_step()
        run.after(loss, lambda: draw(ema, grid_images, precision, run))  # what is due: log, grids, checkpoint


def draw(model, images, precision, run):
    """Super-resolves the same images from the same noise each time, writes grids, and returns metrics for the log.

    Grids: hr, the targets; lr, the inputs; sr, the results; refinement, the estimates ŷ_0 at up to six noise levels;
    progress, the results after fewer training steps beside the current ones.
    """
    config, step = run.config, run.step
    high_res, low_res, context = make_pair(images, config.low_res_size)  # [64, C, H or h, W or w]
    generators = [torch.Generator().manual_seed(number) for number in range(len(images))]
    with machine.autocast(images.device, precision):
        # Two tuples, with an element for each step, [64, C, H, W]: what it arrived at, and its ŷ_0.
        results, estimates = zip(*model.refine(context, config.sampling_steps, generators))
    truth, small, result = (to_unit(grid).cpu() for grid in (high_res, low_res, results[-1]))
    pixels = upsample(small, config.image_size, "nearest-exact")  # [64, C, H, W], of h × w visible squares
    for name, grid in (("hr", truth), ("lr", pixels), ("sr", result)):
        picture_of(grid, columns=8).save(run.folder / f"{name}-{step:06d}.png")

    # Of the first eight images, the refinement from left to right. A regression has no steps to show.
    columns = {"input": pixels[:8]}
    if config.method == "sr3":
        levels = model.levels(config.sampling_steps)
        for i in range(0, len(estimates), math.ceil(len(estimates) / 6)):
            columns[f"gamma\n{levels[i]:.2g}"] = to_unit(estimates[i][:8]).cpu()
    columns |= {"result": result[:8], "truth": truth[:8]}
    picture_of_columns(columns).save(run.folder / f"refinement-{step:06d}.png")

    # Of the same eight, the results so far, which a checkpoint keeps. From column to column the steps at least double.
    run.samples[step] = (255 * result[:8]).round().byte()
    chosen = [step]
    for earlier in sorted(run.samples, reverse=True):
        if earlier <= chosen[0] / 2:
            chosen.insert(0, earlier)
    columns = {f"step\n{number:,}": run.samples[number] / 255 for number in chosen}
    picture_of_columns(columns | {"truth": truth[:8]}).save(run.folder / "progress.png")
    return {
        "psnr": psnr(result, truth).mean(),
        "ssim": ssim(result, truth).mean(),
        "consistency": consistency(result, small).mean(),
    }


if __name__ == "__main__":
    main()
