"""Quality against refinement steps and their spacing: `python tools/refinement_steps.py output/checkpoint.pt`.

Prints a table for test images that are in no grid. A row is a number of steps; the columns are two spacings of the
noise levels, t = T · (i / steps)^2 (the lesson's) and t = T · i / steps (even). A cell is PSNR, spread over error (1 is
perfect) and, of 500 images or more, the fool rate in per cent, for the config's variance.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import utils  # before torch: it lets an Apple GPU leave to the CPU what it lacks
import metrics
from sr3 import SR3, load_model


def spaced_evenly(model: SR3, steps: int) -> SR3:
    """The same network with a schedule of `steps` levels only, evenly spaced in the full one: draw with all of them."""
    T = len(model.gammas) - 1
    chosen = SR3(model.unet).to(model.gammas.device)
    chosen.config, chosen.gammas = model.config, model.gammas[[i * T // steps for i in range(steps + 1)]]
    return chosen


@utils.errors_in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data_dir", default=utils.HERE / "data")
    parser.add_argument("--device")
    parser.add_argument("--steps", type=int, nargs="+", default=(2, 5, 10, 25, 50, 100))
    parser.add_argument("--num_images", type=int, default=128)
    parser.error = utils.fail
    flags = parser.parse_args()
    if flags.num_images < 1:
        raise utils.InputError(f"--num_images is {flags.num_images}: give 1 or more")
    device = utils.choose_device(flags.device)
    model = load_model(flags.checkpoint, device)
    if not isinstance(model, SR3):
        raise utils.InputError(f"{flags.checkpoint} is a regression, which takes no steps; give an SR3")
    for steps in flags.steps:
        if not 1 <= steps < len(model.gammas):
            raise utils.InputError(f"--steps has {steps}: give numbers from 1 to {len(model.gammas) - 1}")
    data = model.config.data
    images, _ = utils.load_data_set(data, False, flags.data_dir)
    high_res, _, context = evaluate.make_pair(images[-flags.num_images :].to(device), data)
    reference, x = utils.to_unit(high_res), utils.to_unit(context)

    def cell(model: SR3, steps: int) -> str:
        model.config.sampling.steps = steps
        first, second = (evaluate.draw(model, context, seed) for seed in (0, 1))
        error = metrics.squared_difference(first, reference)
        ratio = evaluate.summarize_ratio(metrics.squared_difference(first, second), error)
        text = f"{metrics.psnr(first, reference).mean():.2f} / {ratio['mean']:.2f}"
        if len(first) >= 500:
            text += f" / {100 * metrics.fool_rate(first, reference, x).mean():.1f}"
        return text

    print("| steps | by squares | even |\n| --- | --- | --- |")
    for steps in flags.steps:
        print(f"| {steps} | {cell(model, steps)} | {cell(spaced_evenly(model, steps), steps)} |", flush=True)


if __name__ == "__main__":
    main()
