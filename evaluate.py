"""Judges trained models on test images, as the paper's section 4 does: `python evaluate.py CHECKPOINT…`

    python evaluate.py output/reference/8x/sr3.pt output/reference/8x/regression.pt --output_dir output/8x
    python evaluate.py output/checkpoint.pt --num_images 200 --num_samples 24

Takes checkpoints of SR3 and of the regression, of one data set, in any order. Prints a table with standard errors, and
writes it to results.md in --output_dir, with comparison.png: samples for five images from ambiguous to clear. A figure
is that of one sample for each image, but for spread / error, which takes two. Three samples or more are also asked
whether they doubt where they should: lists below the table tell, of samples that agree with a certain share of those
for the same image, how often they are right.
"""

from pathlib import Path

import torch

from metrics import (
    accuracy, calibration, color_shift, consistency, fool_rate, frechet_distance, predict, psnr, squared_difference,
    ssim, train_classifier, train_guesser
)  # fmt: skip
from support.data import load_data
from support.errors import InputError, argument_parser, one_line_errors
from support.machine import choose_device
from support.settings import HERE, check, positive
from utils import load_model, make_pair, picture_of_columns, super_resolve, to_unit, upsample


@one_line_errors()
def main(arguments=None):
    parser = argument_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", help="of train_mnist.py, or shipped")
    parser.add_argument("--num_images", type=positive, default=1000, help="test images, 3 or more; default: 1000")
    parser.add_argument("--num_samples", type=positive, default=2, help="samples for each image; default: 2")
    parser.add_argument("--sampling_steps", type=positive, help="refinement steps; default: those of the checkpoint")
    parser.add_argument("--data_dir", default=HERE / "data", help="where data sets are; default: data")
    parser.add_argument("--output_dir", default=HERE / "output", help="where the table goes; default: output")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first of them that can compute")
    flags = parser.parse_intermixed_args(arguments)

    # 1. Models
    device, folder = choose_device(flags.device), Path(flags.output_dir)
    models, kinds = {}, set()
    for path in flags.checkpoints:
        model = load_model(path, device)
        config = model.config
        check(vars(config) | {"sampling_steps": flags.sampling_steps or config.sampling_steps})
        kinds.add(f"{config.dataset}-{config.channels}x{config.low_res_size}-{config.image_size}")
        name = config.method.replace("sr3", "SR3")
        models[f"{name} ({path})" if name in models else name] = model
    if len(kinds) > 1:
        raise InputError(f"{' '.join(flags.checkpoints)} are of {' and '.join(kinds)}: give those of one data set")
    folder.mkdir(parents=True, exist_ok=True)  # now, not after minutes

    # 2. N of M test images, and networks that judge; without labels these have nothing to learn
    (images, labels), (tests, test_labels) = load_data(config, flags.data_dir)
    numbers = torch.randperm(len(tests), generator=torch.manual_seed(0))[: max(3, flags.num_images)]
    pair = make_pair(tests[numbers].to(device), config.low_res_size)
    truth, low_res, context = map(to_unit, pair)  # metrics and pictures are in [0, 1]
    if labels is not None:
        images, labels, answers = (some.to(device) for some in (images, labels, test_labels[numbers]))
        classifier = train_classifier(images / 255, labels)
        real_features = predict(classifier[:-1], tests.to(device) / 255)  # [M, 64]
        guesser = train_guesser(to_unit(make_pair(images, config.low_res_size)[1]), labels)
        guess = predict(guesser, low_res).softmax(dim=1)  # p(class | x), [N, classes]

    # 3. Outputs, [samples, N, C, H, W]: sample j for image n of the test set has the seed n + j · M, which no other has
    def draw(model, count, rows=slice(None)):
        return torch.stack([
            super_resolve(model, pair[1][rows], numbers[rows] + j * len(tests), flags.sampling_steps)
            for j in range(count)
        ])  # fmt: skip

    outputs = {"real images": [truth], "bicubic": [(255 * context).round() / 255]}
    note = (
        f"\n{len(numbers):,} test images of {config.dataset}, "
        f"{config.low_res_size}×{config.low_res_size} → {config.image_size}×{config.image_size}."
    )
    for name in sorted(models, key=str.lower):  # regressions first
        outputs[name] = draw(models[name], flags.num_samples)
        note += f" {name}: {models[name].step:,} training steps."

    # 4. The table
    rows = {}
    for name, (first, *others) in outputs.items():
        row = rows[name] = {
            "PSNR ↑": estimate(".1f", psnr(first, truth)),
            "SSIM ↑": estimate(".3f", ssim(first, truth)),
            "consistency ↓": estimate(".1f", consistency(first, low_res)),
        }
        if config.channels == 3:
            row["colour shift ↓"] = estimate(".1f", color_shift(first, truth))
        if labels is not None:
            row["accuracy"] = estimate(".1%", accuracy(first, answers, classifier))
            row["Fréchet distance ↓"] = estimate(
                ".2f", predict(classifier[:-1], first), statistic=lambda some: frechet_distance(some, real_features)
            )
        if len(first) >= 50:  # fewer teach the judges nothing
            verdicts = torch.stack([fool_rate(first, truth, context, seed) for seed in range(3)], dim=1)
            luck = verdicts.nanmean(dim=0).std() / 3**0.5  # of the three judges
            row["fool rate → 50%"] = estimate(".1%", verdicts, statistic=torch.nanmean, luck=luck)
        if others:
            spread, error = squared_difference(first, others[0]), squared_difference(first, truth)
            row["spread / error → 1"] = estimate(".2f", spread, error, statistic=lambda a, b: a.mean() / b.mean())

    # What samples of p(y | x) itself would score: estimates, since nobody has that sampler.
    # PSNR: their squared error is twice the variance of p(y | x), the error of the best regression: 3.01 dB below it.
    # Consistency: 0, as every y of p(y | x) shrinks to x. Fool rate, spread / error: by definition.
    # Accuracy: how often p(y | x) draws the right digit, says the guesser. Fréchet distance: real digits'.
    ideal = rows["a perfect sampler"] = {
        "consistency ↓": "0.0", "fool rate → 50%": "50.0%", "spread / error → 1": "1.00"
    }  # fmt: skip
    if "regression" in models:
        ideal["PSNR ↑"] = estimate(".1f", psnr(outputs["regression"][0], truth) - 3.01)
    if labels is not None:
        ideal["accuracy"] = estimate(".1%", guess.gather(1, answers[:, None]))
        ideal["Fréchet distance ↓"] = rows["real images"]["Fréchet distance ↓"]
        if flags.num_samples > 2:  # do they doubt where they should?
            classes = {
                name: torch.stack([predict(classifier, some).argmax(dim=1) for some in outputs[name]], dim=1)
                for name in models
            }  # [N, samples]
            classes["a perfect sampler"] = guess.multinomial(flags.num_samples, True)  # drawn from p(class | x)
            for name, seen in classes.items():
                rows[name]["calibration error ↓"] = estimate(
                    ".1%", seen, answers, statistic=lambda *some: calibration(*some)[0]
                )
                note += f"\n\n{name}: share of samples that agree → how often they are right (of how many)\n"
                for share, right, number in calibration(seen, answers)[1]:
                    note += f"\n- {share:.0%} → {right:.0%} ({number:.0f})"

    shown = {heading: "–" for row in rows.values() for heading in row}  # what a row lacks is a dash
    lines = [["", *shown], ["---"] * (1 + len(shown))]
    lines += [[name, *(shown | row).values()] for name, row in rows.items()]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines) + note
    print(text)  # first: what follows may fail
    (folder / "results.md").write_text(text + "\n", encoding="utf-8", errors="replace")  # a name may be no UTF-8

    # 5. The picture
    if "SR3" in models:
        chosen = torch.arange(min(5, len(truth)))
        if labels is not None:
            entropy = torch.special.entr(guess.cpu()).sum(dim=1)  # [N]
            wanted = entropy.quantile(0.98) * torch.linspace(1, 0.2, len(chosen))
            chosen = (entropy - wanted[:, None]).abs().argmin(dim=1)
        columns = {"input": upsample(low_res[chosen], config.image_size, "nearest-exact")}
        if "regression" in models:
            columns["regression"] = outputs["regression"][0, chosen]
        samples = draw(models["SR3"], 8, chosen)
        columns["mean of 8 samples"] = samples.mean(dim=0)
        columns |= {f"sample {i + 1}": samples[i] for i in range(4)} | {"truth": truth[chosen]}
        picture_of_columns(columns, scale=3).save(folder / "comparison.png")


def estimate(form, *values, statistic=torch.mean, luck=0.0):
    """A cell of the table: a statistic of values, each [N, …], and its standard error; a dash if it is infinite.

    The error is the jackknife's: how the statistic varies as each 20th of the N images in turn is left out. `luck` is
    another error, that of the judges: the squares of both are added.
    """
    groups = torch.arange(len(values[0])) % 20
    left = torch.tensor([statistic(*(some[groups != i] for some in values)) for i in groups.unique()])
    figure, error = statistic(*values), ((len(left) - 1) * left.var(correction=0) + luck**2).sqrt()
    return f"{figure:{form}} ± {error:{form}}".removesuffix("%") if figure.isfinite() else "–"


if __name__ == "__main__":
    main()
